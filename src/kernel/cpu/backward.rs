//! Gradients, in two passes that both gather: dq (and what the second pass needs of every query) by query, then dk and dv by key.

use super::background::{Background, Share};
use super::matrix::{Column, Matrix, pack, pack_rows};
use super::tasks::Call;
use super::{by_key, by_query, lines, panel, widened};
use crate::error::Result;
use crate::kernel::element::{Element, Real};
use crate::kernel::simd::Vector;
use crate::kernel::view::ViewMut4;
use crate::kernel::{Attention, Gradients, Run, View, View4};

/// The tensors that only the backward pass reads.
#[derive(Debug, Clone, Copy)]
pub(super) struct Saved<'a, T: Element> {
    pub grad_out: View4<'a, T>,
    pub out: View4<'a, T>,
    pub lse: View<'a, f64, 3>,
}

/// Where gradients go.
#[derive(Clone, Copy)]
pub(super) struct Outputs<'a, T> {
    pub dq: &'a ViewMut4<'a, T>,
    pub dk: &'a ViewMut4<'a, T>,
    pub dv: &'a ViewMut4<'a, T>,
}

impl<'a, T: Element> Saved<'a, T> {
    pub(super) fn grad_out(&self, batch: usize, head: usize) -> Matrix<'a, T> {
        Matrix::of(&self.grad_out, batch, head)
    }

    pub(super) fn out(&self, batch: usize, head: usize) -> Matrix<'a, T> {
        Matrix::of(&self.out, batch, head)
    }

    pub(super) fn lse(&self, batch: usize, head: usize) -> Column<'a, f64> {
        Column::of(&self.lse, [batch, head, 0])
    }
}

/// What is subtracted from a score before the exponential: its row's `lse`, but so that a row without keys gives nothing. In two
/// parts, because the difference is as precise as what is subtracted, and one f32 is not: first the larger one, which leaves little.
#[inline(always)]
pub(super) fn shift<R: Real>(lse: f64) -> [R; 2] {
    if lse == f64::NEG_INFINITY {
        return [-R::NEG_INFINITY, R::ZERO];
    }
    let most = R::from_f64(lse);
    let rest = lse - most.to_f64();
    [most, if rest.is_finite() { R::from_f64(rest) } else { R::ZERO }]
}

/// The delta of a query in two parts, so that where two keys share all the weight the difference `dO . v - delta`, which cancels, is
/// as precise as what is left of it: the [`mean`] of `dO . v` as it is rounded, and the mean of `dO . v - delta`, which it lost.
pub(super) type Delta<R> = [R; 2];

/// What a key needs to know of a query: its [`shift`] and its [`Delta`].
pub(super) type OfQuery<R> = [R; 4];

/// `sum P x / sum P`, for sums of P that are 1 but for the rounding of the log-sum-exp, or 0 like all P: `1 / (1 + e) = 1 - e` to the
/// last bit. Where one key has all the weight, it is the `x` of it.
#[inline(always)]
pub(super) unsafe fn mean<V: Vector>(sum: V, total: V) -> V {
    // SAFETY: the caller's promise that the instructions of `V` are available.
    unsafe { sum * (V::splat(V::Lane::from_f64(2.0)) - total) }
}

/// [`mean`] of one row.
pub(super) fn mean_of_row<R: Real>([sum, total]: [R; 2]) -> R {
    sum * (R::from_f64(2.0) - total)
}

/// [`Attention::backward`].
pub(in crate::kernel) fn backward<T: Element>(
    problem: &Attention<T>,
    grad_out: View4<T>,
    out: View4<T>,
    lse: View<f64, 3>,
    gradients: Gradients<T>,
    run: &Run,
) -> Result<()> {
    let sizes = problem.check()?;
    sizes.check_out("grad_out", grad_out.shape())?;
    sizes.check_out("out", out.shape())?;
    sizes.check_lse(&lse)?;
    sizes.check_gradients(gradients.dq.shape(), gradients.dk.shape(), gradients.dv.shape())?;
    if widened::is_needed(problem) {
        return widened::backward(problem, grad_out, gradients, run);
    }
    let Gradients { dq, dk, dv } = gradients;
    let (mut copies, mut copy) = Default::default();
    let problem = &pack_rows(problem, &mut copies);
    let grad_out = pack(grad_out, &mut copy);
    let call = Call::new(problem)?;
    let saved = Saved { grad_out, out, lse };
    let queries = sizes.batch * sizes.heads * sizes.queries;

    let outputs = Outputs { dq: &dq, dk: &dk, dv: &dv };
    panel::backward(&call, &saved, outputs, run)?;
    lines::backward(&call, &saved, outputs, run)?;
    if call.all_regular() {
        return Ok(());
    }
    let mut of_queries = vec![[T::Acc::ZERO; 4]; queries];
    let mut weights = vec![T::Acc::ZERO; if call.has_background() { queries } else { 0 }];
    by_query::run(&call, &saved, &dq, &mut of_queries, &mut weights, run)?;

    let sums =
        call.has_background().then(|| Background::of_grad_out(&saved.grad_out, &weights, run)).transpose()?;
    let background = sums.as_ref().map(|sums| Share { weights: &weights, sums });
    by_key::run(&call, &saved, &of_queries, background, &dk, &dv, run)
}
