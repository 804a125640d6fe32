//! Scattered diagonals beside single dense rows and columns: neighbouring rows have neighbouring columns, so that edges need no lists.
//!
//! A block of rows goes through three steps, each over all of its lines: dots, softmax (one register of rows at a time, so that
//! nothing is reduced across lanes), weighted sums. A whole block finishes a step before the next one begins, because then the keys of
//! one line are still in the first cache when the next line comes to them; with the values in between they would not be.

mod backward;
mod dense;
mod dots;
mod forward;
mod sums;

pub(super) use backward::backward;
pub(super) use forward::forward;

use std::ops::Range;

use crate::kernel::element::Element;
use crate::kernel::shape::Sizes;
use crate::kernel::simd::{MAX_LANES, Vector};
use crate::kernel::{Attention, MaskedLogits};
use crate::plan;
use crate::plan::lines::{Line, Lines};

/// Most rows per block, and numbers per line of a block.
const BLOCK: usize = 64;
/// Numbers per block, about: they stay in the first cache.
const NUMBERS: usize = 4096;
/// Rows whose sums are in registers at a time.
const STRIP: usize = 4;

/// The heads computed here.
#[derive(Debug)]
pub(super) struct Heads {
    /// Per (batch, head).
    taken: Vec<bool>,
    heads: usize,
}

impl Heads {
    /// Heads whose edges are lines, unless the panel kernel is faster. What removes single edges, and heads of k and v that several
    /// heads of q share, are left to the other kernels.
    pub fn of<T: Element>(problem: &Attention<T>, sizes: &Sizes) -> Self {
        let is_plain = problem.bias.is_none()
            && problem.key_mask.is_none()
            && problem.dropout.is_none_or(|dropout| dropout.p == 0.0)
            && problem.masked_logits == MaskedLogits::NegInf
            && sizes.group() == 1;
        let suits = |unit: usize| {
            problem.plan.head(unit / sizes.heads, unit % sizes.heads, sizes.heads).kernel()
                == plan::Kernel::Lines
        };
        Heads {
            taken: (0..sizes.batch * sizes.heads).map(|unit| is_plain && suits(unit)).collect(),
            heads: sizes.heads,
        }
    }

    /// Whether head `head` is computed here.
    pub fn take(&self, batch: usize, head: usize) -> bool {
        self.taken[batch * self.heads + head]
    }

    /// The heads computed here, as numbers among those of the batch.
    fn units(&self) -> Vec<usize> {
        (0..self.taken.len()).filter(|&unit| self.taken[unit]).collect()
    }
}

/// Rows per block, for a head with so many lines.
fn rows_per_block(lines: usize) -> usize {
    (NUMBERS / lines.max(1)).clamp(MAX_LANES, BLOCK) / MAX_LANES * MAX_LANES
}

/// The rows of `ranges` that lie in `rows`, cut into blocks.
fn blocks(ranges: &[Range<usize>], rows: Range<usize>, step: usize) -> impl Iterator<Item = Range<usize>> {
    let parts = ranges.iter().map(move |range| range.start.max(rows.start)..range.end.min(rows.end));
    parts.filter(|part| part.start < part.end).flat_map(move |part| {
        (part.start..part.end).step_by(step).map(move |start| start..part.end.min(start + step))
    })
}

/// The lines that pass through `rows`, each cut to them.
fn near(lines: &[Line], rows: &Range<usize>, near: &mut Vec<Line>) {
    near.clear();
    near.extend(lines.iter().filter_map(|line| line.within(rows)));
}

/// Which rows of the register of rows from `first` on `line` covers, as bits.
#[inline(always)]
fn bits<V: Vector>(line: &Line, first: usize) -> u32 {
    let place = |row: usize| row.clamp(first, first + V::LANES) - first;
    let below = |lanes: usize| ((1u64 << lanes) - 1) as u32;
    below(place(line.end)) & !below(place(line.start))
}

/// The most lines of any head.
fn most_lines<'a>(lines: impl Iterator<Item = &'a Lines>) -> usize {
    lines.map(|lines| lines.by_query.len()).max().unwrap_or(0)
}
