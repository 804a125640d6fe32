//! Windows, blocks and dense attention: squares of 16 queries x 16 keys computed whole, at the speed of matrix multiplication, with
//! masks where a square is not full.
//!
//! Keys and values are packed a panel at a time and serve every tile of queries that meets them. The softmax of a tile sees a long
//! row of scores at once: `2^(log2(e) (s - m))`. The difference comes first, and the same one in both passes: scores in base 2 would
//! be rounded on their way to the log-sum-exp and back, and where one key has all the weight its gradient would be that rounding.

mod backward;
mod forward;
#[cfg(target_arch = "x86_64")]
mod in_pairs;
mod micro;
mod packed;
mod products;

pub(super) use backward::backward;
pub(super) use forward::forward;

use super::lines;
use super::tasks::Call;
use crate::kernel::element::Element;
use crate::kernel::shape::Sizes;
use crate::kernel::{Attention, MaskedLogits};
use crate::plan::{self, panels::PANEL};

/// Bytes of packed keys and values per thread, about: with the scores, less than the second cache.
const PACKED_BYTES: usize = 3 << 18;
/// Squares whose scores a tile holds at a time: 32 KiB of f32.
const GROUP: usize = 32;
/// Multiplications below which another thread is not worth waking: a few tens of microseconds.
const WORTH_A_THREAD: usize = 1 << 20;

/// Which heads of k and v the panel kernel computes, with all heads of q that share them.
#[derive(Debug)]
pub(super) struct Heads {
    /// Per (batch, head of k and v).
    taken: Vec<bool>,
    kv_heads: usize,
    /// Heads of q per head of k and v.
    group: usize,
}

impl Heads {
    /// Heads whose edges fill enough of their squares. Dropout, biases and backgrounds are left to the general kernels.
    pub fn of<T: Element>(problem: &Attention<T>, sizes: &Sizes, lines: &lines::Heads) -> Self {
        let (kv_heads, group) = (sizes.kv_heads, sizes.group());
        let plan = problem.plan;
        let is_plain = problem.bias.is_none()
            && problem.dropout.is_none_or(|dropout| dropout.p == 0.0)
            && problem.masked_logits == MaskedLogits::NegInf;
        let suits = |unit: usize| {
            let (batch, kv_head) = (unit / kv_heads, unit % kv_heads);
            let mut heads = kv_head * group..(kv_head + 1) * group;
            heads.all(|head| {
                !lines.take(batch, head)
                    && plan.head(batch, head, sizes.heads).kernel_of(false) == plan::Kernel::Panels
            })
        };
        Heads {
            taken: (0..sizes.batch * kv_heads).map(|unit| is_plain && suits(unit)).collect(),
            kv_heads,
            group,
        }
    }

    /// Whether head `head` of q is computed here.
    pub fn take(&self, batch: usize, head: usize) -> bool {
        self.taken[batch * self.kv_heads + head / self.group]
    }

    /// The heads of k and v computed here, as numbers among those of the batch.
    fn units(&self) -> Vec<usize> {
        (0..self.taken.len()).filter(|&unit| self.taken[unit]).collect()
    }
}

/// How many panels of keys a thread keeps packed, where all layouts of one token have so many bytes in total. No more than tiles
/// that follow each other share: what is packed anew should take the place of something that is still in the cache.
fn slots<T: Element>(call: &Call<T>, bytes: usize) -> usize {
    let heads = call.sizes.heads;
    let needed = |unit: &usize| {
        let (batch, first) = (unit / call.sizes.kv_heads, unit % call.sizes.kv_heads * call.sizes.group());
        let squares = |head: usize| call.problem.plan.head(batch, head, heads).in_panels().squares;
        (first..first + call.sizes.group()).map(squares).max().unwrap_or(0)
    };
    let needed = call.panels.units().iter().map(needed).max().unwrap_or(0);
    let most = PACKED_BYTES / (bytes * PANEL);
    (needed + needed / 4 + 2).min(most).max(1)
}
