//! Attention with a background where queries keep most of their keys, in f64 whatever the tensors hold.
//!
//! What a query keeps is taken from the sum of all values. Where it keeps most of them and scores them far below 0, the two are almost
//! equal, and rounding them in f32 would leave the errors of a long sum in a short one.

use super::matrix::Matrix;
use crate::error::Result;
use crate::kernel::element::{Element, Real};
use crate::kernel::view::{Output, ViewMut4};
use crate::kernel::{Attention, Gradients, MaskedLogits, Run, View, View4};

/// Whether a call of this type has to be computed here. Keys that a mask hides may leave few that are not edges.
pub(super) fn is_needed<T: Element>(problem: &Attention<T>) -> bool {
    problem.masked_logits == MaskedLogits::Zero
        && size_of::<T::Acc>() < size_of::<f64>()
        && (problem.key_mask.is_some() || problem.plan.keeps_most())
}

/// [`Attention::forward`], of arguments that fit together.
pub(super) fn forward<T: Element>(
    problem: &Attention<T>,
    out: ViewMut4<T>,
    lse: &mut [f64],
    run: &Run,
) -> Result<()> {
    let wide = Wide::of(problem, run)?;
    let mut exact = Tensor::zeros(out.shape());
    super::forward(&wide.problem(problem)?, exact.view_mut()?, lse, run)?;
    exact.write(&out, run)
}

/// [`Attention::backward`], of arguments that fit together, from an output that was never rounded.
pub(super) fn backward<T: Element>(
    problem: &Attention<T>,
    grad_out: View4<T>,
    gradients: Gradients<T>,
    run: &Run,
) -> Result<()> {
    let wide = Wide::of(problem, run)?;
    let problem = &wide.problem(problem)?;
    let grad_out = Tensor::of(&grad_out, run)?;
    let [batch, heads, queries, _] = problem.q.shape();
    let (mut out, mut lse) = (Tensor::zeros(grad_out.shape), vec![0.0; batch * heads * queries]);
    super::forward(problem, out.view_mut()?, &mut lse, run)?;
    let lse = View::contiguous("lse", &lse, [batch, heads, queries])?;

    let Gradients { dq, dk, dv } = gradients;
    let [mut wide_dq, mut wide_dk, mut wide_dv] = [&dq, &dk, &dv].map(|to| Tensor::zeros(to.shape()));
    let exact = Gradients { dq: wide_dq.view_mut()?, dk: wide_dk.view_mut()?, dv: wide_dv.view_mut()? };
    super::backward(problem, grad_out.view()?, out.view()?, lse, exact, run)?;
    wide_dq.write(&dq, run)?;
    wide_dk.write(&dk, run)?;
    wide_dv.write(&dv, run)
}

/// Copies of a problem's tensors.
struct Wide {
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Option<Tensor>,
}

impl Wide {
    fn of<T: Element>(problem: &Attention<T>, run: &Run) -> Result<Self> {
        Ok(Wide {
            q: Tensor::of(&problem.q, run)?,
            k: Tensor::of(&problem.k, run)?,
            v: Tensor::of(&problem.v, run)?,
            bias: problem.bias.as_ref().map(|bias| Tensor::of(bias, run)).transpose()?,
        })
    }

    /// `like`, but of these tensors.
    fn problem<'a, T: Element>(&'a self, like: &Attention<'a, T>) -> Result<Attention<'a, f64>> {
        let Attention { plan, key_mask, dropout, scale, masked_logits, .. } = *like;
        Ok(Attention {
            plan,
            q: self.q.view()?,
            k: self.k.view()?,
            v: self.v.view()?,
            bias: self.bias.as_ref().map(Tensor::view).transpose()?,
            key_mask,
            dropout,
            scale,
            masked_logits,
        })
    }
}

/// A tensor of f64. Dimensions along which it was broadcast are so again.
struct Tensor {
    data: Vec<f64>,
    shape: [usize; 4],
    strides: [i64; 4],
}

impl Tensor {
    fn zeros(shape: [usize; 4]) -> Self {
        Self::unset(shape, shape)
    }

    /// With one entry along the dimensions where `stored` says 1.
    fn unset(shape: [usize; 4], stored: [usize; 4]) -> Self {
        let mut strides = [0; 4];
        let mut size = 1;
        for dim in (0..4).rev() {
            if stored[dim] > 1 {
                strides[dim] = size as i64;
            }
            size *= stored[dim];
        }
        Tensor { data: vec![0.0; size], shape, strides }
    }

    fn of<T: Element>(tensor: &View4<T>, run: &Run) -> Result<Self> {
        let mut stored = tensor.shape();
        if !stored.contains(&0) {
            for dim in (0..4).filter(|&dim| tensor.stride(dim) == 0) {
                stored[dim] = 1;
            }
        }
        let mut copy = Self::unset(tensor.shape(), stored);
        if copy.data.is_empty() {
            return Ok(copy);
        }
        let [batch, heads, rows, width] = stored;
        let to = Output::new("copy", &mut copy.data, &[batch, heads, rows * width])?;
        run.pool.run(
            batch * heads,
            || (),
            |(), unit| {
                let from = Matrix::of(tensor, unit / heads, unit % heads);
                // SAFETY: every head is one task.
                let to = unsafe { to.row_mut(unit) };
                for (row, to) in to.chunks_exact_mut(width).enumerate() {
                    for (d, to) in to.iter_mut().enumerate() {
                        // SAFETY: row and column lie inside the tensor.
                        *to = unsafe { from.at(row, d) }.to_acc().to_f64();
                    }
                }
            },
            run.interrupt,
        )?;
        Ok(copy)
    }

    fn view(&self) -> Result<View4<'_, f64>> {
        View::strided("copy", &self.data, 0, self.shape, self.strides)
    }

    fn view_mut(&mut self) -> Result<ViewMut4<'_, f64>> {
        ViewMut4::contiguous("copy", &mut self.data, self.shape)
    }

    /// Rounded.
    fn write<T: Element>(&self, to: &ViewMut4<T>, run: &Run) -> Result<()> {
        let [batch, heads, rows, width] = self.shape;
        run.pool.run(
            batch * heads,
            || (),
            |(), unit| {
                let to = to.head(unit / heads, unit % heads);
                for row in 0..rows {
                    let from = &self.data[(unit * rows + row) * width..][..width];
                    // SAFETY: every head is one task.
                    for (to, &from) in unsafe { to.row_mut(row) }.iter_mut().zip(from) {
                        *to = T::from_acc(T::Acc::from_f64(from));
                    }
                }
            },
            run.interrupt,
        )
    }
}
