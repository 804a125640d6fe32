//! Which keys have the highest scores: the choice behind masks that depend on the content of queries and keys.

use std::cmp::Ordering;

use super::{Element, Real, Run, View2, View4, cpu};
use crate::error::{Error, Result};

/// Stands where a query has fewer keys to choose from than it may keep.
pub const NO_KEY: u32 = u32::MAX;

/// For every query i, the `keep` keys j with the highest `scale * q_i . k_j + bias_ij`; of equal scores the lower j, and NaN counts
/// as higher than any number. Only keys that the call allows are chosen, and no gradient passes through the choice.
#[derive(Debug, Clone, Copy)]
pub struct Selection<'a, T: Element> {
    /// (B, H, N, D)
    pub q: View4<'a, T>,
    /// (B, Hkv, S, D); Hkv divides H
    pub k: View4<'a, T>,
    /// (B, S), non-zero = allowed.
    pub key_mask: Option<View2<'a, u8>>,
    /// (B, H, N, S), added to the scaled scores. A key whose bias is minus infinity is not allowed.
    pub bias: Option<View4<'a, T>>,
    /// Factor on q . k
    pub scale: f64,
    /// Most keys per query.
    pub keep: usize,
    /// Allow only keys j <= i.
    pub causal: bool,
}

impl<T: Element> Selection<'_, T> {
    /// Write `chosen` (B, H, N, keep), contiguous: ascending keys, then [`NO_KEY`] where there are fewer. Memory beyond that does
    /// not grow with N x S.
    ///
    /// # Errors
    /// [`Error::Shape`] naming the argument that does not fit; [`Error::Interrupted`].
    pub fn choose(&self, chosen: &mut [u32], run: &Run) -> Result<()> {
        cpu::select(self, chosen, run)
    }

    /// Whether the arguments fit together.
    pub(super) fn check(&self) -> Result<()> {
        let [batch, heads, queries, dim] = self.q.shape();
        let [_, kv_heads, keys, _] = self.k.shape();
        let fail = |name: &str, expected: String, got: &[usize]| {
            Err(Error::Shape(format!("{name}: expected {expected}, got {got:?}")))
        };
        if dim == 0 {
            return fail("q", "a head dimension of at least 1".into(), &self.q.shape());
        }
        let divides = heads == kv_heads || (kv_heads > 0 && heads.is_multiple_of(kv_heads));
        if self.k.shape() != [batch, kv_heads, keys, dim] || !divides {
            let expected = format!("shape ({batch}, a divisor of {heads}, S, {dim})");
            return fail("k", expected, &self.k.shape());
        }
        if let Some(mask) = &self.key_mask
            && mask.shape() != [batch, keys]
        {
            return fail("key_mask", format!("shape {:?}", [batch, keys]), &mask.shape());
        }
        if let Some(bias) = &self.bias
            && bias.shape() != [batch, heads, queries, keys]
        {
            return fail("bias", format!("shape {:?}", [batch, heads, queries, keys]), &bias.shape());
        }
        Ok(())
    }
}

/// The indices of the `keep` highest `scores` among those allowed, ascending; of equal scores the lower index.
pub fn best<R: Real>(scores: &[R], keep: usize, allowed: impl Fn(usize) -> bool) -> Vec<u32> {
    let mut order: Vec<u32> = (0..scores.len() as u32).filter(|&index| allowed(index as usize)).collect();
    let better = |a: &u32, b: &u32| by_score(scores[*a as usize], scores[*b as usize]).then(a.cmp(b));
    if keep < order.len() {
        if keep > 0 {
            order.select_nth_unstable_by(keep - 1, better);
        }
        order.truncate(keep);
    }
    order.sort_unstable();
    order
}

/// The higher score first, NaN before all: what is attended to may be NaN, and then must show.
#[inline(always)]
pub(super) fn by_score<R: Real>(a: R, b: R) -> Ordering {
    a.place().cmp(&b.place())
}
