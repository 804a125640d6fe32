//! Columns and distances estimated from the attention of the last queries.

use super::Content;
use crate::error::Result;
use crate::kernel::{Element, Real, Run, WeightSums, best};
use crate::pattern::choice::OfHead;

/// What one head keeps.
pub(super) struct Slashes {
    /// Keys, ascending.
    pub columns: Vec<u32>,
    /// Distances into the past, ascending.
    pub distances: Vec<u32>,
}

/// Of every (batch, head), the columns and distances to which the last queries attend most, as many as `of_heads` says, and the
/// `nearest` distances.
pub(super) fn estimate<T: Element>(
    content: &Content<T>,
    of_heads: &[OfHead],
    last_queries: usize,
    nearest: usize,
    run: &Run,
) -> Result<Vec<Slashes>> {
    let [batch, heads, tokens, _] = content.q.shape();
    let Content { q, k, key_mask, bias, scale, .. } = *content;
    let mut by_key = vec![T::Acc::ZERO; batch * heads * tokens];
    let mut by_distance = by_key.clone();
    WeightSums { q, k, key_mask, bias, scale, last_queries }.sum(&mut by_key, &mut by_distance, run)?;
    let of_head = |unit: usize| {
        let keep = of_heads[unit % heads];
        let head = unit * tokens..(unit + 1) * tokens;
        let allowed = |key: usize| key_mask.is_none_or(|mask| mask.at([unit / heads, key]) != 0);
        let mut distances = best(&by_distance[head.clone()], keep.distances, |_| true);
        distances.extend(0..nearest.min(tokens) as u32);
        distances.sort_unstable();
        distances.dedup();
        Slashes { columns: best(&by_key[head], keep.keys, allowed), distances }
    };
    Ok((0..batch * heads).map(of_head).collect())
}
