//! Attention over a [`Plan`](crate::plan::Plan) as ATen operators: the engine of every device that has no kernels of its own, and on
//! the CPU a second implementation to hold the first against.
//!
//! Same semantics as [`crate::kernel`], by other means: rows are grouped by degree and padded ([`groups`]), vectors are gathered a
//! bounded chunk of edges at a time, and every sum is a reduction along one axis. Memory is the tensors, three numbers per query and
//! one chunk. No addition is scattered, so a result does not depend on threads or on the order in which a device schedules work.
//! Scores and sums are float32 for half types, and float64 where keys that are no edges keep a score and are few, as in the kernels. The backward pass recomputes the softmax from the scores.
//!
//! Not run on a GPU: what is known is that it computes the right thing on the CPU, and that all its operators agree about devices.

mod backward;
mod bias;
mod forward;
mod groups;
mod problem;

use tch::Tensor;

use crate::attention::ResolvedMask;
use crate::error::{Error, Result};
use crate::kernel::Dropout;

pub(super) use backward::backward;
pub(super) use forward::forward;

/// One attention problem on any device; the fields are those of [`crate::kernel::Attention`].
#[derive(Clone, Copy)]
pub(super) struct Arguments<'a> {
    pub resolved: &'a ResolvedMask,
    /// (B, H, N, D)
    pub q: &'a Tensor,
    /// (B, Hkv, S, D)
    pub k: &'a Tensor,
    /// (B, Hkv, S, Dv)
    pub v: &'a Tensor,
    /// (B, S) bool, True = keep.
    pub key_mask: Option<&'a Tensor>,
    /// Broadcastable to (B, H, N, S), in the dtype of q.
    pub bias: Option<&'a Tensor>,
    pub dropout: Option<Dropout>,
    pub scale: f64,
}

/// Some columns of a group.
#[derive(Debug, Clone, Copy)]
struct Step {
    start: i64,
    len: i64,
}

impl Step {
    /// The part of the last axis that the step covers; all of it where one value serves every column.
    fn of(self, tensor: &Tensor) -> Result<Tensor> {
        let axis = tensor.dim() as i64 - 1;
        if tensor.size()[axis as usize] == 1 {
            return Ok(tensor.shallow_clone());
        }
        Ok(tensor.f_narrow(axis, self.start, self.len)?)
    }
}

/// (batch, head, token, channel) in the order of memory in which the kernels give it, the heads of a token side by side: what an
/// operator gives must not depend on the engine.
fn merged_heads(tensor: &Tensor) -> Result<Tensor> {
    Ok(tensor.f_transpose(1, 2)?.f_contiguous()?.f_transpose(1, 2)?)
}

/// `bias` as (batch, heads, queries, keys), at no cost: broadcasting is a matter of strides.
pub(super) fn expand_bias(bias: &Tensor, full: [usize; 4]) -> Result<Tensor> {
    let size = full.map(|side| side as i64);
    bias.f_expand(size, false).map_err(|_| {
        Error::Shape(format!("bias: expected a shape that broadcasts to {size:?}, got {:?}", bias.size()))
    })
}
