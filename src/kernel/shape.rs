//! The sizes of a problem, and the checks that every argument agrees with them.

use super::{Attention, Element, MaskedLogits, View, View4};
use crate::error::{Error, Result};

/// The sizes that all arguments share.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Sizes {
    pub batch: usize,
    pub heads: usize,
    pub kv_heads: usize,
    pub queries: usize,
    pub keys: usize,
    /// D, of queries and keys.
    pub dim: usize,
    /// Dv, of values and outputs.
    pub value_dim: usize,
}

impl Sizes {
    /// Heads of q per head of k and v.
    pub fn group(&self) -> usize {
        self.heads / self.kv_heads.max(1)
    }
}

impl<T: Element> Attention<'_, T> {
    /// The sizes of this problem, if its arguments fit together.
    pub(super) fn check(&self) -> Result<Sizes> {
        let [batch, heads, queries, dim] = self.q.shape();
        let [_, kv_heads, keys, _] = self.k.shape();
        let value_dim = self.v.shape()[3];
        if dim == 0 {
            return Err(shape("q", "a head dimension of at least 1", &self.q.shape()));
        }
        expect("k", &self.k, [batch, kv_heads, keys, dim])?;
        expect("v", &self.v, [batch, kv_heads, keys, value_dim])?;
        if value_dim == 0 {
            return Err(shape("v", "a head dimension of at least 1", &self.v.shape()));
        }
        if heads != kv_heads && (kv_heads == 0 || heads % kv_heads != 0) {
            return Err(shape(
                "k",
                &format!("a number of heads that divides the {heads} of q"),
                &self.k.shape(),
            ));
        }
        if let Some(key_mask) = &self.key_mask {
            expect("key_mask", key_mask, [batch, keys])?;
        }
        if let Some(bias) = &self.bias {
            expect("bias", bias, [batch, heads, queries, keys])?;
        }
        if (self.plan.num_queries(), self.plan.num_keys()) != (queries, keys) {
            return Err(Error::Shape(format!(
                "edges: expected {queries} queries x {keys} keys, got {} x {}",
                self.plan.num_queries(),
                self.plan.num_keys()
            )));
        }
        self.plan.check_heads(batch, heads)?;
        if let Some(dropout) = &self.dropout {
            dropout.check()?;
            if self.masked_logits == MaskedLogits::Zero && dropout.p > 0.0 {
                return Err(Error::Value(format!(
                    "dropout_p: expected 0 with masked_logits `zero`, got {}",
                    dropout.p
                )));
            }
        }
        Ok(Sizes { batch, heads, kv_heads, queries, keys, dim, value_dim })
    }
}

impl Sizes {
    pub fn check_out<T>(&self, name: &str, view: &View4<'_, T>) -> Result<()> {
        expect(name, view, [self.batch, self.heads, self.queries, self.value_dim])
    }

    pub fn check_lse<T>(&self, view: &View<'_, T, 3>) -> Result<()> {
        expect("lse", view, [self.batch, self.heads, self.queries])
    }
}

fn expect<T, const RANK: usize>(name: &str, view: &View<'_, T, RANK>, expected: [usize; RANK]) -> Result<()> {
    if view.shape() == expected {
        Ok(())
    } else {
        Err(shape(name, &format!("shape {expected:?}"), &view.shape()))
    }
}

fn shape(name: &str, expected: &str, got: &[usize]) -> Error {
    Error::Shape(format!("{name}: expected {expected}, got {got:?}"))
}
