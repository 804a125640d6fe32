//! An additive bias that is read only where there are edges.

use tch::{Kind, Tensor};

use crate::error::Result;

/// The elements of a bias that differ, in one row per sample (or one for all).
pub(super) struct Bias {
    values: Tensor,
    /// What a step along batch, head, query and key adds to a place in a row.
    steps: [i64; 4],
}

impl Bias {
    /// `expanded` is (B, H, N, S); axes along which it does not change (strides of 0) are kept once.
    pub(super) fn new(expanded: &Tensor, shared: bool) -> Result<Self> {
        let mut values = expanded.shallow_clone();
        for (axis, stride) in expanded.stride().into_iter().enumerate() {
            if stride == 0 && values.size()[axis] > 1 {
                values = values.f_narrow(axis as i64, 0, 1)?;
            }
        }
        let size = values.size();
        let mut steps = [0; 4];
        let mut step = 1;
        for axis in (0..4).rev() {
            if size[axis] > 1 && !(axis == 0 && shared) {
                steps[axis] = step;
            }
            step *= size[axis];
        }
        let samples = if shared { size[0] } else { 1 };
        let per_sample = if samples == 0 { 0 } else { values.numel() as i64 / samples };
        Ok(Bias { values: values.f_reshape([samples, per_sample])?, steps })
    }

    /// Where in a row the bias of an edge is.
    pub(super) fn place(&self, batch: usize, head: usize, query: usize, key: usize) -> i64 {
        let index = [batch, head, query, key];
        index.iter().zip(self.steps).map(|(&index, step)| index as i64 * step).sum()
    }

    /// (samples or 1, rows, width) values at `places`, (rows, width).
    pub(super) fn at(&self, places: &Tensor, kind: Kind) -> Result<Tensor> {
        let size = places.size();
        let at = self.values.f_index_select(1, &places.f_reshape(-1)?)?;
        Ok(at.f_to_kind(kind)?.f_reshape([-1, size[0], size[1]])?)
    }
}
