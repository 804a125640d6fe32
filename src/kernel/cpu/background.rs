//! Keys that are not edges but keep a score of 0 ([`MaskedLogits::Zero`](crate::kernel::MaskedLogits::Zero)): what they
//! contribute is the same for every row, so it is summed once per head.

use super::matrix::{Matrix, padded};
use super::tasks::Call;
use crate::error::Result;
use crate::kernel::element::{Element, Real};
use crate::kernel::view::Output;
use crate::kernel::{Run, View4};

/// What the background of all queries adds to every key's dv.
#[derive(Debug, Clone, Copy)]
pub(super) struct Share<'a, R> {
    /// The weight that every query gives to a key that is no edge.
    pub weights: &'a [R],
    /// `grad_out` summed with these weights, per head of q.
    pub sums: &'a Background<R>,
}

/// One weighted sum of rows per head, at padded width.
#[derive(Debug)]
pub(super) struct Background<R> {
    sums: Vec<R>,
    width: usize,
    heads: usize,
}

impl<R: Real> Background<R> {
    /// For the forward pass: the sum of the allowed values, per head of v.
    pub(super) fn of_values<T: Element<Acc = R>>(call: &Call<T>, run: &Run) -> Result<Self> {
        let weight = |batch: usize, _head: usize, key: usize| {
            let allowed = call.problem.key_mask.is_none_or(|mask| mask.at([batch, key]) != 0);
            if allowed { R::ONE } else { R::ZERO }
        };
        Self::of_rows(&call.problem.v, weight, run)
    }

    /// For the backward pass: the sum of `grad_out`, each row times `weights` (one per query of all heads), per head of q.
    pub(super) fn of_grad_out<T: Element<Acc = R>>(
        grad_out: &View4<T>,
        weights: &[R],
        run: &Run,
    ) -> Result<Self> {
        let [_, heads, queries, _] = grad_out.shape();
        let weight =
            |batch: usize, head: usize, query: usize| weights[(batch * heads + head) * queries + query];
        Self::of_rows(grad_out, weight, run)
    }

    /// Sums in f64, because the rows may be as many as there are tokens. A row that weighs nothing is not read.
    fn of_rows<T: Element<Acc = R>>(
        tensor: &View4<T>,
        weight: impl Fn(usize, usize, usize) -> R + Sync,
        run: &Run,
    ) -> Result<Self> {
        let [batch, heads, rows, width] = tensor.shape();
        let mut sums = vec![R::ZERO; batch * heads * padded(width)];
        let output = Output::new("background", &mut sums, &[batch, heads, padded(width)])?;
        run.pool.run(
            batch * heads,
            || vec![0.0; width],
            |sum: &mut Vec<f64>, index| {
                let (batch, head) = (index / heads, index % heads);
                let matrix = Matrix::of(tensor, batch, head);
                sum.fill(0.0);
                for row in 0..rows {
                    let weight = weight(batch, head, row);
                    if weight != R::ZERO {
                        for (d, sum) in sum.iter_mut().enumerate() {
                            // SAFETY: row and column lie inside the tensor.
                            *sum += weight.to_f64() * unsafe { matrix.at(row, d) }.to_acc().to_f64();
                        }
                    }
                }
                // SAFETY: every head is one task.
                let output = unsafe { output.row_mut(index) };
                for (to, sum) in output.iter_mut().zip(sum) {
                    *to = R::from_f64(*sum);
                }
            },
            run.interrupt,
        )?;
        Ok(Background { sums, width: padded(width), heads })
    }

    /// The sum of head `head` of the tensor it was made from.
    pub(super) fn of_head(&self, batch: usize, head: usize) -> &[R] {
        let start = (batch * self.heads + head) * self.width;
        &self.sums[start..start + self.width]
    }
}
