//! The gradients: dq by query, then dk and dv by key.
//!
//! With `dp = factor * dO_i . v_j` and `delta_i = sum_j p_ij dp_ij`: `ds = p (dp - delta)`, and dq, dk, dv are sums of `scale ds k`,
//! `scale ds q` and `factor p dO` over the edges. Delta has two parts, the sum as it is rounded and `sum_j p_ij (dp_ij - delta_i)`:
//! where two keys share all the weight, the difference cancels. A background of weight `u_i` per key adds `u_i dO_i . sum of its values` to delta
//! and `u_i dO_i` to dv of every visible key that is no edge.

use tch::{Tensor, no_grad};

use super::forward::{Background, Softmax};
use super::groups::By;
use super::problem::{Problem, either, fill};
use super::{Arguments, merged_heads};
use crate::error::Result;
use crate::pool::Interrupt;

/// What the pass over keys needs to know of every query, (samples, heads * N) each.
struct OfQueries {
    largest: Tensor,
    divisor: Tensor,
    delta: [Tensor; 2],
    /// The softmax weight of a key in the background, 0 where there is none.
    background: Tensor,
}

/// dq (B, H, N, D), dk (B, Hkv, S, D) and dv (B, Hkv, S, Dv), for `grad_out` (B, H, N, Dv).
///
/// # Errors
/// As [`super::forward`].
pub(crate) fn backward(
    arguments: &Arguments,
    grad_out: &Tensor,
    interrupt: &dyn Interrupt,
) -> Result<(Tensor, Tensor, Tensor)> {
    no_grad(|| {
        let problem = Problem::new(arguments)?;
        let grad_out = problem.of_queries("grad_out", grad_out, problem.sizes.value_dim)?;
        let (dq, of_queries) = by_query(&problem, &grad_out, interrupt)?;
        let (dk, dv) = by_key(&problem, &grad_out, &of_queries, interrupt)?;
        Ok((
            merged_heads(&dq.f_reshape(arguments.q.size())?)?,
            merged_heads(&dk.f_reshape(arguments.k.size())?)?,
            merged_heads(&dv.f_reshape(arguments.v.size())?)?,
        ))
    })
}

fn by_query(problem: &Problem, grad_out: &Tensor, interrupt: &dyn Interrupt) -> Result<(Tensor, OfQueries)> {
    let mut dq = problem.full(&problem.q.size(), 0.0, problem.q.kind())?;
    let number = |value: f64| problem.full(&problem.q.size()[..2], value, problem.accumulator);
    let mut all = OfQueries {
        largest: number(0.0)?,
        divisor: number(1.0)?,
        delta: [number(0.0)?, number(0.0)?],
        background: number(0.0)?,
    };
    let background = problem.background.then(|| Background::new(problem)).transpose()?;
    problem.for_each_group(By::Query, interrupt, |edges| {
        let q = problem.at_rows(&problem.q, edges)?;
        let softmax = Softmax::new(problem, edges, &q, background.as_ref())?;
        let divisor = softmax.divisor()?;
        let p = softmax.weights.f_div(&divisor.f_unsqueeze(2)?)?;
        let grads = problem.at_rows(grad_out, edges)?;
        let mut dp = problem.dots(&grads, &problem.v, edges, None)?;
        if let Some(factors) = &edges.dropout {
            dp = dp.f_mul(factors)?;
        }
        let dp = fill(dp, softmax.unused.as_ref(), 0.0)?;
        let mut delta = p.f_mul(&dp)?;
        let mut rest = None;
        if let (Some(shared), Some(unit)) = (&background, &softmax.background) {
            let unit = unit.f_div(&divisor)?;
            let _ = all.background.f_index_copy_(1, &edges.rows, &unit)?;
            let everything = shared
                .values_at(problem, edges)?
                .f_mul(&grads.f_squeeze_dim(2)?)?
                .f_sum_dim_intlist(2, false, None)?;
            let everything = everything.f_mul(&unit)?.f_masked_fill(&unit.f_eq(0.0)?, 0.0)?;
            delta = delta.f_sub(&dp.f_mul(&unit.f_unsqueeze(2)?)?)?;
            delta = delta.f_sum_dim_intlist(2, false, None)?.f_add(&everything)?;
        } else {
            delta = delta.f_sum_dim_intlist(2, false, None)?;
            let left = p.f_mul(&dp.f_sub(&delta.f_unsqueeze(2)?)?)?;
            rest = Some(left.f_sum_dim_intlist(2, false, None)?);
        }
        let mut ds = dp.f_sub(&delta.f_unsqueeze(2)?)?;
        let _ = all.delta[0].f_index_copy_(1, &edges.rows, &delta)?;
        if let Some(rest) = rest {
            ds = ds.f_sub(&rest.f_unsqueeze(2)?)?;
            let _ = all.delta[1].f_index_copy_(1, &edges.rows, &rest)?;
        }
        let ds = p.f_mul(&ds)?;
        let ds = fill(ds, softmax.excluded.as_ref(), 0.0)?;
        let rows = problem.weighted_sum(&ds, &problem.k, edges, softmax.excluded.as_ref())?;
        let _ = dq.f_index_copy_(1, &edges.rows, &rows.f_mul_scalar(problem.scale)?.f_to_kind(dq.kind())?)?;
        let _ = all.largest.f_index_copy_(1, &edges.rows, &softmax.largest)?;
        let _ = all.divisor.f_index_copy_(1, &edges.rows, &divisor)?;
        Ok(())
    })?;
    Ok((dq, all))
}

fn by_key(
    problem: &Problem,
    grad_out: &Tensor,
    of_queries: &OfQueries,
    interrupt: &dyn Interrupt,
) -> Result<(Tensor, Tensor)> {
    let mut dk = problem.full(&problem.k.size(), 0.0, problem.k.kind())?;
    let mut dv = problem.full(&problem.v.size(), 0.0, problem.v.kind())?;
    let from_background =
        problem.background.then(|| from_all_queries(problem, grad_out, of_queries)).transpose()?;
    problem.for_each_group(By::Key, interrupt, |edges| {
        let k = problem.at_rows(&problem.k, edges)?;
        let dots = problem.dots(&k, &problem.q, edges, None)?;
        let scores = problem.scores(dots, edges, By::Key)?;
        let excluded = scores.excluded.as_ref();
        let of_query = |flat: &Tensor| problem.gather_numbers(flat, edges);
        let weights = scores.values.f_sub(&of_query(&of_queries.largest)?)?.f_exp()?;
        let p = fill(weights.f_div(&of_query(&of_queries.divisor)?)?, excluded, 0.0)?;

        let mut dp = problem.dots(&problem.at_rows(&problem.v, edges)?, grad_out, edges, None)?;
        let mut weights = p.shallow_clone();
        if let Some(factors) = &edges.dropout {
            (dp, weights) = (dp.f_mul(factors)?, weights.f_mul(factors)?);
        }
        let [delta, rest] = &of_queries.delta;
        let ds = p.f_mul(&dp.f_sub(&of_query(delta)?)?.f_sub(&of_query(rest)?)?)?;
        let ds = fill(ds, excluded, 0.0)?;
        let rows = problem.weighted_sum(&ds, &problem.q, edges, excluded)?.f_mul_scalar(problem.scale)?;
        let _ = dk.f_index_copy_(1, &edges.rows, &rows.f_to_kind(dk.kind())?)?;

        let rows = match &from_background {
            None => problem.weighted_sum(&weights, grad_out, edges, excluded)?,
            Some(everything) => {
                let unit = of_query(&of_queries.background)?;
                let weightless =
                    excluded.map(|excluded| excluded.f_logical_and(&unit.f_eq(0.0)?)).transpose()?;
                let unused = either(scores.hidden.as_ref().map(Tensor::shallow_clone), weightless)?;
                let weights = fill(weights.f_sub(&unit)?, unused.as_ref(), 0.0)?;
                let own = problem.weighted_sum(&weights, grad_out, edges, unused.as_ref())?;
                let heads = problem.heads_of(edges, problem.sizes.keys)?;
                let whole = own.f_add(&everything.f_index_select(1, &heads)?)?;
                let hidden = problem
                    .key_mask
                    .as_ref()
                    .map(|mask| mask.f_index_select(1, &edges.rows)?.f_logical_not()?.f_unsqueeze(2));
                fill(whole, hidden.transpose()?.as_ref(), 0.0)?
            }
        };
        let _ = dv.f_index_copy_(1, &edges.rows, &rows.f_to_kind(dv.kind())?)?;
        Ok(())
    })?;
    Ok((dk, dv))
}

/// (samples, kv heads, Dv): what the background of all queries adds to the dv of every visible key.
fn from_all_queries(problem: &Problem, grad_out: &Tensor, of_queries: &OfQueries) -> Result<Tensor> {
    let sizes = &problem.sizes;
    let weights = of_queries.background.f_unsqueeze(2)?;
    let weighted = grad_out.f_to_kind(problem.accumulator)?.f_mul(&weights)?;
    // A query without background gives nothing, not even NaN.
    let weighted = weighted.f_masked_fill(&weights.f_eq(0.0)?, 0.0)?;
    let [samples, rows, width] = [0, 1, 2].map(|axis| weighted.size()[axis]);
    let per_kv_head = (sizes.group() * sizes.queries) as i64;
    let kv_heads = if per_kv_head == 0 { 0 } else { rows / per_kv_head };
    Ok(weighted.f_reshape([samples, kv_heads, per_kv_head, width])?.f_sum_dim_intlist(2, false, None)?)
}
