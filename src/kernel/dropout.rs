//! Attention dropout without state: whether an edge is kept is a pure function of a seed and the edge's place.

use crate::error::{Error, Result};

/// Weights are zeroed with probability `p` and the others grow by `1 / (1 - p)`.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Dropout {
    /// The same seed drops the same edges.
    pub seed: u64,
    /// In 0..=1.
    pub p: f64,
}

impl Dropout {
    /// Whether the edge from `query` to `key` keeps its weight. `head` counts heads over the batch: `batch * H + head`.
    #[inline]
    pub fn keep(&self, head: u64, query: usize, key: usize) -> bool {
        self.factor(head, query, key) != 0.0
    }

    /// What the edge's weight is multiplied by: 0 or `1 / (1 - p)`.
    #[inline]
    pub fn factor(&self, head: u64, query: usize, key: usize) -> f64 {
        HeadDraws::new(self, head).query(query).factor(key)
    }

    pub(super) fn check(&self) -> Result<()> {
        if (0.0..=1.0).contains(&self.p) {
            return Ok(());
        }
        Err(Error::Value(format!("dropout_p: expected a probability from 0 to 1, got {}", self.p)))
    }
}

/// The draws of one head.
#[derive(Debug, Clone, Copy)]
pub(super) struct HeadDraws {
    state: u64,
    threshold: u64,
    kept_factor: f64,
}

/// The draws of one query: 32 bits per key.
///
/// Per edge only 32-bit multiplications, which vector units have; the 64-bit mixing that tells seeds, heads and queries apart
/// happens once per query.
#[derive(Debug, Clone, Copy)]
pub(super) struct QueryDraws {
    before: u32,
    after: u32,
    threshold: u64,
    kept_factor: f64,
}

const ODD: u64 = 0x9e37_79b9_7f4a_7c15;

impl HeadDraws {
    #[inline]
    pub(super) fn new(dropout: &Dropout, head: u64) -> Self {
        HeadDraws {
            state: mix64(mix64(dropout.seed.wrapping_add(ODD)) ^ head).wrapping_add(ODD),
            threshold: (dropout.p * (1u64 << 32) as f64).round() as u64,
            kept_factor: if dropout.p < 1.0 { 1.0 / (1.0 - dropout.p) } else { 0.0 },
        }
    }

    #[inline(always)]
    pub(super) fn query(&self, query: usize) -> QueryDraws {
        let state = mix64(self.state ^ query as u64);
        QueryDraws {
            before: state as u32,
            after: (state >> 32) as u32,
            threshold: self.threshold,
            kept_factor: self.kept_factor,
        }
    }
}

impl QueryDraws {
    /// 0 or `1 / (1 - p)`. Two rounds with different keys, because after one alone the draws of two queries would be the same
    /// sequence moved.
    #[inline(always)]
    pub(super) fn factor(&self, key: usize) -> f64 {
        let bits = mix32(mix32(key as u32 ^ self.before).wrapping_add(self.after));
        if u64::from(bits) >= self.threshold { self.kept_factor } else { 0.0 }
    }
}

/// The finaliser of splitmix64.
#[inline(always)]
fn mix64(mut x: u64) -> u64 {
    x = (x ^ (x >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    x = (x ^ (x >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    x ^ (x >> 31)
}

/// A bijection of 32 bits with almost no bias (Wellons' lowbias32).
#[inline(always)]
fn mix32(mut x: u32) -> u32 {
    x = (x ^ (x >> 16)).wrapping_mul(0x21f0_aaad);
    x = (x ^ (x >> 15)).wrapping_mul(0x735a_2d97);
    x ^ (x >> 15)
}
