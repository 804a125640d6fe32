//! The sizes of a problem, and the checks that every argument agrees with them.

use super::{Attention, Dropout, Element, MaskedLogits, View};
use crate::error::{Error, Result};
use crate::plan::Plan;

/// The sizes that all arguments share.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Sizes {
    /// B
    pub batch: usize,
    /// H, of queries.
    pub heads: usize,
    /// Hkv, of keys and values.
    pub kv_heads: usize,
    /// N
    pub queries: usize,
    /// S
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

/// The shapes of a problem's arguments, wherever their elements are.
#[derive(Debug, Clone, Copy)]
pub struct Shapes {
    /// (B, H, N, D)
    pub q: [usize; 4],
    /// (B, Hkv, S, D)
    pub k: [usize; 4],
    /// (B, Hkv, S, Dv)
    pub v: [usize; 4],
    /// (B, S)
    pub key_mask: Option<[usize; 2]>,
    /// (B, H, N, S)
    pub bias: Option<[usize; 4]>,
}

impl Shapes {
    /// The sizes of the problem, if its arguments fit together.
    ///
    /// # Errors
    /// [`Error::Shape`] or [`Error::Value`] naming the argument that does not fit.
    pub fn check(
        &self,
        plan: &Plan,
        dropout: Option<&Dropout>,
        masked_logits: MaskedLogits,
    ) -> Result<Sizes> {
        let [batch, heads, queries, dim] = self.q;
        let [_, kv_heads, keys, _] = self.k;
        let value_dim = self.v[3];
        if dim == 0 {
            return Err(shape("q", "a head dimension of at least 1", &self.q));
        }
        expect("k", self.k, [batch, kv_heads, keys, dim])?;
        expect("v", self.v, [batch, kv_heads, keys, value_dim])?;
        if value_dim == 0 {
            return Err(shape("v", "a head dimension of at least 1", &self.v));
        }
        if heads != kv_heads && (kv_heads == 0 || heads % kv_heads != 0) {
            return Err(shape("k", &format!("a number of heads that divides the {heads} of q"), &self.k));
        }
        if let Some(key_mask) = self.key_mask {
            expect("key_mask", key_mask, [batch, keys])?;
        }
        if let Some(bias) = self.bias {
            expect("bias", bias, [batch, heads, queries, keys])?;
        }
        if (plan.num_queries(), plan.num_keys()) != (queries, keys) {
            return Err(Error::Shape(format!(
                "edges: expected {queries} queries x {keys} keys, got {} x {}",
                plan.num_queries(),
                plan.num_keys()
            )));
        }
        plan.check_heads(batch, heads)?;
        if let Some(dropout) = dropout {
            dropout.check()?;
            if masked_logits == MaskedLogits::Zero && dropout.p > 0.0 {
                return Err(Error::Value(format!(
                    "dropout_p: expected 0 with masked_logits `zero`, got {}",
                    dropout.p
                )));
            }
        }
        Ok(Sizes { batch, heads, kv_heads, queries, keys, dim, value_dim })
    }
}

impl<T: Element> Attention<'_, T> {
    /// The sizes of this problem, if its arguments fit together.
    pub(super) fn check(&self) -> Result<Sizes> {
        let shapes = Shapes {
            q: self.q.shape(),
            k: self.k.shape(),
            v: self.v.shape(),
            key_mask: self.key_mask.as_ref().map(View::shape),
            bias: self.bias.as_ref().map(View::shape),
        };
        shapes.check(self.plan, self.dropout.as_ref(), self.masked_logits)
    }
}

impl Sizes {
    pub(super) fn check_out(&self, name: &str, shape: [usize; 4]) -> Result<()> {
        expect(name, shape, [self.batch, self.heads, self.queries, self.value_dim])
    }

    pub(super) fn check_gradients(&self, dq: [usize; 4], dk: [usize; 4], dv: [usize; 4]) -> Result<()> {
        expect("dq", dq, [self.batch, self.heads, self.queries, self.dim])?;
        expect("dk", dk, [self.batch, self.kv_heads, self.keys, self.dim])?;
        expect("dv", dv, [self.batch, self.kv_heads, self.keys, self.value_dim])
    }

    pub(super) fn check_lse<T>(&self, view: &View<'_, T, 3>) -> Result<()> {
        expect("lse", view.shape(), [self.batch, self.heads, self.queries])
    }
}

fn expect<const RANK: usize>(name: &str, got: [usize; RANK], expected: [usize; RANK]) -> Result<()> {
    if got == expected { Ok(()) } else { Err(shape(name, &format!("shape {expected:?}"), &got)) }
}

fn shape(name: &str, expected: &str, got: &[usize]) -> Error {
    Error::Shape(format!("{name}: expected {expected}, got {got:?}"))
}
