//! The softmax of each row and its output.

use tch::{Device, Kind, Tensor, no_grad};

use super::groups::By;
use super::problem::{Edges, Problem, Scores, either, fill};
use super::{Arguments, merged_heads};
use crate::error::Result;
use crate::pool::Interrupt;

/// The softmax of a group of queries, relative to the largest score of each row.
pub(super) struct Softmax {
    /// (samples, rows, width) `exp(s - largest)`.
    pub weights: Tensor,
    /// (samples, rows) largest score, 0 for rows without any.
    pub largest: Tensor,
    /// (samples, rows) sum of the weights, background included.
    pub total: Tensor,
    /// (samples, rows) weight of each key that is no edge; None without background.
    pub background: Option<Tensor>,
    /// Edges that the scores leave out.
    pub excluded: Option<Tensor>,
    /// Edges whose values weigh nothing. One that a bias removes may have to be taken out of the background first.
    pub unused: Option<Tensor>,
}

/// What all queries share where keys that are no edges keep a score of 0.
pub(super) struct Background {
    /// (samples, kv heads, Dv) sum of the visible values.
    values: Tensor,
    /// (samples, kv heads) number of visible keys.
    keys: Tensor,
}

impl Background {
    pub(super) fn new(problem: &Problem) -> Result<Self> {
        let size = problem.v.size();
        let keys = problem.sizes.keys as i64;
        let heads = if keys == 0 { 0 } else { size[1] / keys };
        let hidden = problem.key_mask.as_ref().map(Tensor::f_logical_not).transpose()?;
        let unread = hidden.map(|hidden| hidden.f_unsqueeze(2)).transpose()?;
        let visible = fill(problem.v.shallow_clone(), unread.as_ref(), 0.0)?;
        let counts = problem.full(&[size[0], size[1]], 1.0, problem.accumulator)?;
        let counts = match &problem.key_mask {
            Some(mask) => mask.f_to_kind(problem.accumulator)?,
            None => counts,
        };
        Ok(Background {
            values: visible.f_reshape([size[0], heads, keys, size[2]])?.f_sum_dim_intlist(
                2,
                false,
                problem.accumulator,
            )?,
            keys: counts.f_reshape([size[0], heads, keys])?.f_sum_dim_intlist(2, false, None)?,
        })
    }

    /// (samples, rows, Dv): the sum of visible values for each query of a group.
    pub(super) fn values_at(&self, problem: &Problem, edges: &Edges) -> Result<Tensor> {
        Ok(self.values.f_index_select(1, &Self::heads(problem, edges)?)?)
    }

    fn heads(problem: &Problem, edges: &Edges) -> Result<Tensor> {
        let of_q = problem.heads_of(edges, problem.sizes.queries)?;
        Ok(of_q.f_floor_divide_scalar(problem.sizes.group() as i64)?)
    }

    /// (samples, rows): how many visible keys are no edges.
    fn keys_at(&self, problem: &Problem, edges: &Edges, scores: &Scores) -> Result<Tensor> {
        let keys = self.keys.f_index_select(1, &Self::heads(problem, edges)?)?;
        let ones = problem.full(&scores.values.size(), 1.0, problem.accumulator)?;
        let seen = fill(ones, scores.hidden.as_ref(), 0.0)?.f_sum_dim_intlist(2, false, None)?;
        Ok(keys.f_sub(&seen)?)
    }
}

impl Softmax {
    /// Of a group of queries with vectors `q` (from [`Problem::at_rows`]).
    pub(super) fn new(
        problem: &Problem,
        edges: &Edges,
        q: &Tensor,
        background: Option<&Background>,
    ) -> Result<Self> {
        let dots = problem.dots(q, &problem.k, edges, None)?;
        let scores = problem.scores(dots, edges, By::Query)?;
        let mut largest = scores.values.f_amax(2, false)?;
        let empty = largest.f_eq(f64::NEG_INFINITY)?;
        let others = background.map(|all| all.keys_at(problem, edges, &scores)).transpose()?;
        // A row has a background only where a visible key is no edge; nothing is added and taken away again elsewhere.
        let without = others.as_ref().map(|keys| keys.f_eq(0.0)).transpose()?;
        if let Some(without) = &without {
            largest = largest.f_where_self(without, &largest.f_clamp_min(0.0)?)?;
        }
        let none = match &without {
            Some(without) => empty.f_logical_and(without)?,
            None => empty,
        };
        let largest = largest.f_masked_fill(&none, 0.0)?;
        let weights = scores.values.f_sub(&largest.f_unsqueeze(2)?)?.f_exp()?;
        let mut total = weights.f_sum_dim_intlist(2, false, None)?;
        let background = match (&others, &without) {
            (Some(keys), Some(without)) => {
                let unit = largest.f_neg()?.f_exp()?.f_masked_fill(without, 0.0)?;
                total = total.f_add(&unit.f_mul(keys)?)?;
                Some(unit)
            }
            _ => None,
        };
        let unused = match (&scores.excluded, &background) {
            (Some(excluded), Some(unit)) => {
                let weightless = excluded.f_logical_and(&unit.f_eq(0.0)?.f_unsqueeze(2)?)?;
                either(scores.hidden.as_ref().map(Tensor::shallow_clone), Some(weightless))?
            }
            (excluded, _) => excluded.as_ref().map(Tensor::shallow_clone),
        };
        Ok(Softmax { weights, largest, total, background, excluded: scores.excluded, unused })
    }

    /// The sum that weights are divided by, 1 for rows without keys.
    pub(super) fn divisor(&self) -> Result<Tensor> {
        Ok(self.total.f_masked_fill(&self.total.f_eq(0.0)?, 1.0)?)
    }
}

/// `out` (B, H, N, Dv) and `lse` (B, H, N).
///
/// # Errors
/// [`Error::Shape`](crate::error::Error::Shape) or [`Error::Value`](crate::error::Error::Value) naming the argument that does not
/// fit, [`Error::Torch`](crate::error::Error::Torch) for what libtorch reports, or
/// [`Error::Interrupted`](crate::error::Error::Interrupted).
pub(crate) fn forward(arguments: &Arguments, interrupt: &dyn Interrupt) -> Result<(Tensor, Tensor)> {
    no_grad(|| {
        let problem = Problem::new(arguments)?;
        let [samples, queries] = [problem.q.size()[0], problem.q.size()[1]];
        let value_dim = problem.sizes.value_dim as i64;
        let mut out = problem.full(&[samples, queries, value_dim], 0.0, problem.q.kind())?;
        // As the kernels give it, where the device has such numbers.
        let lse_kind = if problem.q.device() == Device::Mps { Kind::Float } else { Kind::Double };
        let mut lse = problem.full(&[samples, queries], f64::NEG_INFINITY, lse_kind)?;
        let background = problem.background.then(|| Background::new(&problem)).transpose()?;
        problem.for_each_group(By::Query, interrupt, |edges| {
            let q = problem.at_rows(&problem.q, edges)?;
            let softmax = Softmax::new(&problem, edges, &q, background.as_ref())?;
            let mut weights = softmax.weights.shallow_clone();
            if let Some(factors) = &edges.dropout {
                weights = weights.f_mul(factors)?;
            }
            if let Some(unit) = &softmax.background {
                weights = weights.f_sub(&unit.f_unsqueeze(2)?)?;
            }
            let mut sum = problem.weighted_sum(&weights, &problem.v, edges, softmax.unused.as_ref())?;
            if let (Some(all), Some(unit)) = (&background, &softmax.background) {
                let unit = unit.f_unsqueeze(2)?;
                let shadow = all.values_at(&problem, edges)?.f_mul(&unit)?;
                // A row without background takes nothing from it, not even NaN.
                sum = sum.f_add(&shadow.f_masked_fill(&unit.f_eq(0.0)?, 0.0)?)?;
            }
            let rows = sum.f_div(&softmax.divisor()?.f_unsqueeze(2)?)?.f_to_kind(problem.q.kind())?;
            let logs =
                softmax.total.f_log()?.f_to_kind(lse_kind)?.f_add(&softmax.largest.f_to_kind(lse_kind)?)?;
            let _ = out.f_index_copy_(1, &edges.rows, &rows)?;
            let _ = lse.f_index_copy_(1, &edges.rows, &logs)?;
            Ok(())
        })?;
        let [batch, heads, queries] =
            [problem.sizes.batch, problem.sizes.heads, problem.sizes.queries].map(|side| side as i64);
        let out = merged_heads(&out.f_reshape([batch, heads, queries, value_dim])?)?;
        Ok((out, lse.f_reshape([batch, heads, queries])?))
    })
}
