//! Attention over a [`Plan`]: forward and backward on plain views of memory, without torch and without Python.
//!
//! For query i and the keys j that its head keeps (and that `key_mask` allows),
//! `s_ij = scale * q_i . k_j + bias_ij`, `p_ij = softmax_j(s_ij)`, `out_i = sum_j p_ij v_j`, `lse_i = log sum_j exp(s_ij)`.
//! A query without keys gives zeros, an `lse` of minus infinity and zero gradients. What is not kept is never read, so NaN there
//! does not spread; NaN in a kept place does. Heads of q may share heads of k and v (grouped queries).
#![allow(unsafe_code)]
// Indices name registers; iterators over them hide code from the inliner (see `simd`).
#![allow(clippy::needless_range_loop)]

mod cpu;
mod decode;
mod dropout;
mod element;
pub mod oracle;
mod selection;
mod shape;
pub mod simd;
mod softmax;
mod sums;
mod view;

#[cfg(test)]
mod tests;

pub use decode::{Decode, Slots, Step, Worth};
pub use dropout::Dropout;
pub use element::{Element, Real};
pub use selection::{NO_KEY, Selection, best};
pub use shape::{Shapes, Sizes};
pub use simd::Isa;
pub use sums::WeightSums;
pub use view::{View, View2, View4, ViewMut4};

use crate::error::Result;
use crate::plan::Plan;
use crate::pool::{Interrupt, Pool};

/// What the score of an edge is that the plan does not keep.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum MaskedLogits {
    /// The key gets no weight.
    #[default]
    NegInf,
    /// The score is 0, so the key keeps a weight of `exp(0)`: how published Fibottention checkpoints were trained. Keys excluded by
    /// `key_mask` still get none. `out_i = (sum_E (exp(s_ij) - 1) v_j + sum_j v_j) / (sum_E (exp(s_ij) - 1) + n)` over the
    /// n allowed keys, so the cost stays that of the edges E.
    Zero,
}

/// One attention problem: what is attended to, and the tensors it is computed from.
#[derive(Debug, Clone, Copy)]
pub struct Attention<'a, T: Element> {
    /// The edges of every head.
    pub plan: &'a Plan,
    /// (B, H, N, D)
    pub q: View4<'a, T>,
    /// (B, Hkv, S, D); Hkv divides H
    pub k: View4<'a, T>,
    /// (B, Hkv, S, Dv)
    pub v: View4<'a, T>,
    /// (B, S), non-zero = keep. Bytes, because foreign booleans need not be 0 or 1.
    pub key_mask: Option<View2<'a, u8>>,
    /// (B, H, N, S), broadcast with strides of 0, added to the scaled scores. An edge whose bias is minus infinity is not kept.
    pub bias: Option<View4<'a, T>>,
    /// Which weights are dropped.
    pub dropout: Option<Dropout>,
    /// Factor on q . k
    pub scale: f64,
    /// What edges that are not kept count for.
    pub masked_logits: MaskedLogits,
}

/// Where the gradients go, in the shapes of q, k and v.
#[derive(Debug)]
pub struct Gradients<'a, T> {
    /// (B, H, N, D)
    pub dq: ViewMut4<'a, T>,
    /// (B, Hkv, S, D)
    pub dk: ViewMut4<'a, T>,
    /// (B, Hkv, S, Dv)
    pub dv: ViewMut4<'a, T>,
}

/// How to compute: with which threads, which instructions, and who may stop it. None of it changes a result, except that
/// instruction sets round differently.
#[derive(Clone, Copy)]
pub struct Run<'a> {
    /// Threads.
    pub pool: Pool,
    /// Instruction set.
    pub isa: Isa,
    /// Polled on the calling thread about every 25 ms.
    pub interrupt: &'a dyn Interrupt,
}

impl<T: Element> Attention<'_, T> {
    /// Write `out` (B, H, N, Dv) and `lse` (B, H, N), contiguous. `lse` has more digits than f32, because the backward pass finds
    /// the weights from it: an error of `lse` is a relative error of every weight of the row.
    ///
    /// # Errors
    /// [`crate::error::Error::Shape`] or [`crate::error::Error::Value`] naming the argument that does not fit, before anything is
    /// written; [`crate::error::Error::Interrupted`], after which the outputs hold anything.
    pub fn forward(&self, out: ViewMut4<'_, T>, lse: &mut [f64], run: &Run) -> Result<()> {
        cpu::forward(self, out, lse, run)
    }

    /// Write the gradients of a loss whose gradient with respect to `out` is `grad_out` (B, H, N, Dv). `out` and `lse` are what
    /// [`Self::forward`] gave, as views so that they may have been moved or sliced since.
    ///
    /// Deterministic: every gradient is gathered by the task that owns it, in an order that no thread count changes.
    ///
    /// # Errors
    /// As [`Self::forward`].
    pub fn backward(
        &self,
        grad_out: View4<'_, T>,
        out: View4<'_, T>,
        lse: View<'_, f64, 3>,
        gradients: Gradients<'_, T>,
        run: &Run,
    ) -> Result<()> {
        cpu::backward(self, grad_out, out, lse, gradients, run)
    }
}
