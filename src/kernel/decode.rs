//! Attention of new tokens to a cache of keys and values, and the cache's own rule for what it forgets.

use super::{Element, Run, View4, cpu};
use crate::error::{Error, Result};

/// Attention of the last few queries to caches that each head fills to a length of its own:
/// `out = softmax(scale * q k^T) v` over the first `lengths` keys.
#[derive(Debug, Clone, Copy)]
pub struct Decode<'a, T: Element> {
    /// (B, H, N, D)
    pub q: View4<'a, T>,
    /// (B, Hkv, S, D); Hkv divides H
    pub k: View4<'a, T>,
    /// (B, Hkv, S, Dv)
    pub v: View4<'a, T>,
    /// (B, Hkv), contiguous: how many of the S keys there are. The others are never read.
    pub lengths: &'a [i64],
    /// Query i is token `length - N + i`, and does not see those behind it.
    pub causal: bool,
    /// Factor on q . k
    pub scale: f64,
}

impl<T: Element> Decode<'_, T> {
    /// Write `out` (B, H, N, Dv), `lse` (B, H, N) and, if asked for, `weights` (B, Hkv, S): the softmax weight that each key
    /// received, summed over the queries and over the heads of q that share it. All contiguous. A query without keys gives 0 and
    /// minus infinity.
    ///
    /// # Errors
    /// [`Error::Shape`] or [`Error::Value`] naming the argument that does not fit, before anything is written;
    /// [`Error::Interrupted`], after which the outputs hold anything.
    pub fn attend(
        &self,
        out: &mut [T],
        lse: &mut [f64],
        weights: Option<&mut [T::Acc]>,
        run: &Run,
    ) -> Result<()> {
        cpu::decode(self, out, lse, weights, run)
    }

    /// Whether the arguments fit together.
    pub(super) fn check(&self) -> Result<()> {
        let [batch, heads, _, dim] = self.q.shape();
        let [_, kv_heads, keys, _] = self.k.shape();
        check_heads(heads, kv_heads, &self.k.shape())?;
        expect("q", "a head dimension of at least 1", dim > 0, &self.q.shape())?;
        expect_shape("k", self.k.shape(), [batch, kv_heads, keys, dim])?;
        let value_dim = self.v.shape()[3];
        expect_shape("v", self.v.shape(), [batch, kv_heads, keys, value_dim])?;
        expect("v", "a head dimension of at least 1", value_dim > 0, &self.v.shape())?;
        expect(
            "lengths",
            "one per sample and head",
            self.lengths.len() == batch * kv_heads,
            &[self.lengths.len()],
        )?;
        in_range("lengths", self.lengths, 0, keys)
    }
}

/// What makes an entry of a cache worth keeping; the entry worth least is forgotten first. Of equal worth the earlier token is kept,
/// and NaN counts as worth more than any number, so that it shows.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Worth {
    /// How late its token came.
    Recency,
    /// The sum of the weights that its key received since it came (heavy hitters; Zhang et al., H2O, 2023).
    Attention,
    /// A small norm of its key (Devoto et al., 2024).
    LowNorm,
    /// A large norm of its key.
    HighNorm,
}

impl Worth {
    /// In the order of the names below.
    pub(super) const ALL: [Worth; 4] = [Worth::Recency, Worth::Attention, Worth::LowNorm, Worth::HighNorm];
    /// What callers call them.
    pub const NAMES: [&'static str; 4] = ["recency", "attention", "low_norm", "high_norm"];

    /// The worth of that name.
    pub fn named(name: &str) -> Option<Self> {
        Self::ALL.into_iter().zip(Self::NAMES).find(|(_, known)| *known == name).map(|(worth, _)| worth)
    }

    /// Entries that a head holds beyond its capacity while a step lasts. A new token must be attended to before it can be judged by
    /// anything but its age.
    pub fn spare(self) -> usize {
        usize::from(self != Worth::Recency)
    }
}

/// The entries of all heads, in slots: head h of a sample owns slots `starts[h]..starts[h + 1]` of its row and fills the first
/// `lengths` of them, in any order.
#[derive(Debug)]
pub struct Slots<'a, T: Element> {
    /// (B, S, D)
    pub keys: &'a mut [T],
    /// (B, S, Dv)
    pub values: &'a mut [T],
    /// (B, S): which token of the sample an entry was.
    pub positions: &'a mut [i64],
    /// (B, S): what `Worth` says of an entry, in accumulator precision. Empty for `Recency`.
    pub worths: &'a mut [T::Acc],
    /// (B, Hkv)
    pub lengths: &'a mut [i64],
    /// (Hkv + 1,), ascending from 0 to S.
    pub starts: &'a [i64],
}

/// New tokens join a cache one after the other: each is written, attends, and then the cache is brought back to its capacity.
/// (Where worth is recency, room is made before the token attends.)
#[derive(Debug, Clone, Copy)]
pub struct Step<'a, T: Element> {
    /// (B, H, N, D); without queries tokens only join.
    pub q: Option<View4<'a, T>>,
    /// (B, Hkv, N, D)
    pub k: View4<'a, T>,
    /// (B, Hkv, N, Dv)
    pub v: View4<'a, T>,
    /// (B, N), contiguous: which token of its sample each is, ascending; negative for padding, which neither joins nor attends.
    pub positions: &'a [i64],
    /// (Hkv,): most entries of a head, at least 1.
    pub capacities: &'a [i64],
    /// What is kept.
    pub worth: Worth,
    /// The first tokens of a sample that are never forgotten (attention sinks; Xiao et al., StreamingLLM, 2023).
    pub sinks: i64,
    /// The last tokens that are never forgotten.
    pub recent: i64,
    /// A query does not see entries that came more than so many tokens before it, whatever the cache keeps.
    pub window: Option<i64>,
    /// Factor on q . k
    pub scale: f64,
}

impl<T: Element> Step<'_, T> {
    /// Move `slots` on by N tokens, and write `out` (B, H, N, Dv) and `lse` (B, H, N), contiguous, empty without queries. Padding
    /// gives 0 and minus infinity.
    ///
    /// Memory beyond that grows with the entries of the cache, and the result does not depend on the number of threads.
    ///
    /// # Errors
    /// [`Error::Shape`] or [`Error::Value`] naming the argument that does not fit, before anything is written;
    /// [`Error::Interrupted`], after which `slots` and outputs hold anything.
    pub fn run(&self, slots: Slots<'_, T>, out: &mut [T], lse: &mut [f64], run: &Run) -> Result<()> {
        cpu::step(self, slots, out, lse, run)
    }

    /// Whether the arguments fit together: after this no index can leave its slice.
    pub(super) fn check(&self, slots: &Slots<'_, T>) -> Result<()> {
        let [batch, kv_heads, tokens, dim] = self.k.shape();
        let value_dim = self.v.shape()[3];
        expect("k", "a head dimension of at least 1", dim > 0, &self.k.shape())?;
        expect("v", "a head dimension of at least 1", value_dim > 0, &self.v.shape())?;
        expect_shape("v", self.v.shape(), [batch, kv_heads, tokens, value_dim])?;
        if let Some(q) = &self.q {
            let [_, heads, ..] = q.shape();
            check_heads(heads, kv_heads, &self.k.shape())?;
            expect_shape("q", q.shape(), [batch, heads, tokens, dim])?;
        }
        let units = batch * kv_heads;
        let len = |name: &str, got: usize, expected: usize| {
            expect(name, &format!("{expected} elements"), got == expected, &[got])
        };
        len("token_positions", self.positions.len(), batch * tokens)?;
        len("capacities", self.capacities.len(), kv_heads)?;
        in_range("capacities", self.capacities, 1, i64::MAX as usize)?;
        in_range("sinks", &[self.sinks], 0, i64::MAX as usize)?;
        in_range("recent", &[self.recent], 0, i64::MAX as usize)?;
        in_range("window", self.window.as_slice(), 0, i64::MAX as usize)?;
        len("starts", slots.starts.len(), kv_heads + 1)?;
        let room = slots.positions.len().checked_div(batch).unwrap_or(0);
        len("positions", slots.positions.len(), batch * room)?;
        in_range("starts", slots.starts, 0, room)?;
        let ascends = slots.starts.windows(2).all(|pair| pair[0] <= pair[1]);
        expect("starts", "ascending offsets from 0", ascends && slots.starts[0] == 0, &[kv_heads + 1])?;
        len("keys", slots.keys.len(), batch * room * dim)?;
        len("values", slots.values.len(), batch * room * value_dim)?;
        let ranked = if self.worth == Worth::Recency { 0 } else { batch * room };
        len("worths", slots.worths.len(), ranked)?;
        len("lengths", slots.lengths.len(), units)?;
        for (unit, &length) in slots.lengths.iter().enumerate() {
            let (sample, head) = (unit / kv_heads, unit % kv_heads);
            let capacity = self.capacities[head] as usize;
            in_range("lengths", &[length], 0, capacity)?;
            let of_sample = &self.positions[sample * tokens..][..tokens];
            let joining = of_sample.iter().filter(|&&position| position >= 0).count();
            let most = capacity.saturating_add(self.worth.spare()).min(length as usize + joining);
            let room = (slots.starts[head + 1] - slots.starts[head]) as usize;
            if room < most {
                return Err(Error::Value(format!(
                    "keys: head {head} needs {most} slots for its {length} entries and {joining} more, got {room}"
                )));
            }
        }
        Ok(())
    }
}

fn check_heads(heads: usize, kv_heads: usize, k: &[usize]) -> Result<()> {
    let divides = heads == kv_heads || (kv_heads > 0 && heads.is_multiple_of(kv_heads));
    expect("k", &format!("a number of heads that divides the {heads} of q"), divides, k)
}

fn expect_shape(name: &str, got: [usize; 4], expected: [usize; 4]) -> Result<()> {
    expect(name, &format!("shape {expected:?}"), got == expected, &got)
}

fn expect(name: &str, expected: &str, holds: bool, got: &[usize]) -> Result<()> {
    if holds { Ok(()) } else { Err(Error::Shape(format!("{name}: expected {expected}, got {got:?}"))) }
}

fn in_range(name: &str, values: &[i64], low: i64, high: usize) -> Result<()> {
    let high = i64::try_from(high).unwrap_or(i64::MAX);
    match values.iter().find(|&&value| value < low || value > high) {
        None => Ok(()),
        Some(value) => Err(Error::Value(format!("{name}: expected {low} to {high}, got {value}"))),
    }
}
