//! Where the last queries look: the estimate behind columns and distances that are chosen by content.

use super::{Element, Run, Selection, View2, View4, cpu};
use crate::error::{Error, Result};

/// Causal attention weights `p_ij = softmax_j(scale * q_i . k_j + bias_ij)` over the allowed keys j <= i, of the last queries i that
/// are allowed as keys, summed by key and by distance i - j. A query without a key gives nothing.
#[derive(Debug, Clone, Copy)]
pub struct WeightSums<'a, T: Element> {
    /// (B, H, N, D)
    pub q: View4<'a, T>,
    /// (B, Hkv, N, D); Hkv divides H
    pub k: View4<'a, T>,
    /// (B, N), non-zero = allowed, as key and as query.
    pub key_mask: Option<View2<'a, u8>>,
    /// (B, H, N, N), added to the scaled scores.
    pub bias: Option<View4<'a, T>>,
    /// Factor on q . k
    pub scale: f64,
    /// How many queries, at most.
    pub last_queries: usize,
}

impl<T: Element> WeightSums<'_, T> {
    /// Write the sums over i of p_ij into `by_key` (B, H, N) at j and into `by_distance` (B, H, N) at i - j, both contiguous. Memory
    /// beyond that grows with N, never with its square.
    ///
    /// # Errors
    /// [`Error::Shape`] naming the argument that does not fit; [`Error::Interrupted`].
    pub fn sum(&self, by_key: &mut [T::Acc], by_distance: &mut [T::Acc], run: &Run) -> Result<()> {
        cpu::weight_sums(self, by_key, by_distance, run)
    }

    /// Whether the arguments fit together.
    pub(super) fn check(&self) -> Result<()> {
        let [queries, keys] = [self.q.shape()[2], self.k.shape()[2]];
        if queries != keys {
            return Err(Error::Shape(format!("k: expected {queries} tokens like q, got {keys}")));
        }
        let WeightSums { q, k, key_mask, bias, scale, .. } = *self;
        Selection { q, k, key_mask, bias, scale, keep: 0, causal: true }.check()
    }
}
