//! Columns and distances estimated from the attention of the last queries.

use super::Content;
use crate::error::Result;
use crate::kernel::{Element, Real, Run, WeightSums, best};

/// What one head keeps.
pub(super) struct Slashes {
    /// Keys, ascending.
    pub columns: Vec<u32>,
    /// Distances into the past, ascending.
    pub distances: Vec<u32>,
}

/// Of every (batch, head), the `keep` columns and distances to which the last queries attend most, and the `nearest` distances.
pub(super) fn estimate<T: Element>(
    content: &Content<T>,
    keep: [usize; 2],
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
        let head = unit * tokens..(unit + 1) * tokens;
        let allowed = |key: usize| key_mask.is_none_or(|mask| mask.at([unit / heads, key]) != 0);
        let mut distances = best(&by_distance[head.clone()], keep[1], |_| true);
        distances.extend(0..nearest.min(tokens) as u32);
        distances.sort_unstable();
        distances.dedup();
        Slashes { columns: best(&by_key[head], keep[0], allowed), distances }
    };
    Ok((0..batch * heads).map(of_head).collect())
}
