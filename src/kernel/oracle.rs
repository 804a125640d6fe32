//! The definition, written as plainly as it can be: what every kernel is tested against.
//!
//! One query after the other, one key after the other, in a precision of choice: `P = f64` is the truth, and the tensors' own type
//! shows how far a straightforward evaluation is from it, in which every intermediate tensor (scores, weights, their gradients)
//! is stored in that type and only sums are wider.

use super::element::{Element, Real};
use super::shape::Sizes;
use super::{Attention, MaskedLogits, View4};
use crate::error::Result;

/// Contiguous results of a forward pass.
#[derive(Debug, Clone, PartialEq)]
pub struct Forward {
    /// (B, H, N, Dv)
    pub out: Vec<f64>,
    /// (B, H, N)
    pub lse: Vec<f64>,
}

/// Contiguous results of a backward pass.
#[derive(Debug, Clone, PartialEq)]
pub struct Backward {
    /// (B, H, N, D)
    pub dq: Vec<f64>,
    /// (B, Hkv, S, D)
    pub dk: Vec<f64>,
    /// (B, Hkv, S, Dv)
    pub dv: Vec<f64>,
}

/// One key that a query gives weight to.
struct Weight<R> {
    key: usize,
    /// Softmax of the scores.
    p: R,
    /// Whether the score depends on q and k, or is the constant of a masked logit.
    is_edge: bool,
    /// Dropout's factor.
    factor: R,
}

/// Outputs, computed in precision `P`.
///
/// # Errors
/// When the arguments do not fit together, as for the kernels.
pub fn forward<P: Element, T: Element>(problem: &Attention<T>) -> Result<Forward> {
    let sizes = problem.check()?;
    let mut result = Forward { out: Vec::new(), lse: Vec::new() };
    for (b, h, i) in queries(&sizes) {
        let (weights, lse) = weights::<P, T>(problem, &sizes, b, h, i);
        let mut out = vec![P::Acc::ZERO; sizes.value_dim];
        for weight in &weights {
            let v = row::<P::Acc, T>(&problem.v, b, h / sizes.group(), weight.key);
            add(&mut out, weight.p * weight.factor, &v);
        }
        result.out.extend(out.into_iter().map(Real::to_f64));
        result.lse.push(lse.to_f64());
    }
    Ok(result)
}

/// Gradients, computed in precision `P`, of a loss whose gradient with respect to the output is `grad_out`.
///
/// # Errors
/// As [`forward`].
pub fn backward<P: Element, T: Element>(problem: &Attention<T>, grad_out: &View4<T>) -> Result<Backward> {
    let sizes = problem.check()?;
    sizes.check_out("grad_out", grad_out.shape())?;
    let Sizes { dim, value_dim, .. } = sizes;
    let mut dq = vec![P::Acc::ZERO; sizes.batch * sizes.heads * sizes.queries * dim];
    let mut dk = vec![P::Acc::ZERO; sizes.batch * sizes.kv_heads * sizes.keys * dim];
    let mut dv = vec![P::Acc::ZERO; sizes.batch * sizes.kv_heads * sizes.keys * value_dim];
    for (b, h, i) in queries(&sizes) {
        let kv_head = h / sizes.group();
        let (weights, _) = weights::<P, T>(problem, &sizes, b, h, i);
        let grad = row::<P::Acc, T>(grad_out, b, h, i);
        let mut delta = P::Acc::ZERO;
        let mut dp = Vec::new();
        for weight in &weights {
            let v = row::<P::Acc, T>(&problem.v, b, kv_head, weight.key);
            dp.push(stored::<P>(stored::<P>(dot(&grad, &v)) * weight.factor));
            delta += weight.p * dp[dp.len() - 1];
        }
        let query = (b * sizes.heads + h) * sizes.queries + i;
        for (weight, dp) in weights.iter().zip(dp) {
            let key = (b * sizes.kv_heads + kv_head) * sizes.keys + weight.key;
            add(&mut dv[key * value_dim..(key + 1) * value_dim], weight.p * weight.factor, &grad);
            if weight.is_edge {
                let ds = P::Acc::from_f64(problem.scale) * stored::<P>(weight.p * (dp - delta));
                let (q, k) = (row(&problem.q, b, h, i), row(&problem.k, b, kv_head, weight.key));
                add(&mut dq[query * dim..(query + 1) * dim], ds, &k);
                add(&mut dk[key * dim..(key + 1) * dim], ds, &q);
            }
        }
    }
    let f64s = |values: Vec<P::Acc>| values.into_iter().map(Real::to_f64).collect();
    Ok(Backward { dq: f64s(dq), dk: f64s(dk), dv: f64s(dv) })
}

fn row<R: Real, T: Element>(tensor: &View4<T>, b: usize, h: usize, i: usize) -> Vec<R> {
    (0..tensor.shape()[3]).map(|d| real(tensor.at([b, h, i, d]))).collect()
}

fn dot<R: Real>(a: &[R], b: &[R]) -> R {
    let mut sum = R::ZERO;
    for (&a, &b) in a.iter().zip(b) {
        sum += a * b;
    }
    sum
}

fn add<R: Real>(sum: &mut [R], factor: R, row: &[R]) {
    for (sum, &value) in sum.iter_mut().zip(row) {
        *sum += factor * value;
    }
}

fn queries(sizes: &Sizes) -> impl Iterator<Item = (usize, usize, usize)> + use<> {
    let Sizes { batch, heads, queries, .. } = *sizes;
    (0..batch).flat_map(move |b| (0..heads).flat_map(move |h| (0..queries).map(move |i| (b, h, i))))
}

/// The keys of one query with their weights, and the log of the sum of the exponentials.
fn weights<P: Element, T: Element>(
    problem: &Attention<T>,
    sizes: &Sizes,
    b: usize,
    h: usize,
    i: usize,
) -> (Vec<Weight<P::Acc>>, P::Acc) {
    let mut runs = Vec::new();
    problem.plan.head(b, h, sizes.heads).by_query().row(i, &mut runs);
    let mut kept = vec![false; sizes.keys];
    for j in runs.into_iter().flatten() {
        kept[j] = true;
    }
    let q: Vec<P::Acc> = row(&problem.q, b, h, i);
    let mut scores: Vec<(usize, P::Acc, bool)> = Vec::new();
    for (j, kept) in kept.into_iter().enumerate() {
        if problem.key_mask.is_some_and(|mask| mask.at([b, j]) == 0) {
            continue;
        }
        if !kept {
            if problem.masked_logits == MaskedLogits::Zero {
                scores.push((j, P::Acc::ZERO, false));
            }
            continue;
        }
        let bias = problem.bias.map_or(P::Acc::ZERO, |bias| real::<P::Acc, T>(bias.at([b, h, i, j])));
        if bias == P::Acc::NEG_INFINITY {
            continue;
        }
        let k = row(&problem.k, b, h / sizes.group(), j);
        let score = stored::<P>(P::Acc::from_f64(problem.scale) * dot(&q, &k));
        scores.push((j, stored::<P>(score + bias), true));
    }
    let mut largest = P::Acc::NEG_INFINITY;
    for &(_, score, _) in &scores {
        if score > largest {
            largest = score;
        }
    }
    if largest == P::Acc::NEG_INFINITY && !scores.iter().any(|(_, score, _)| score.to_f64().is_nan()) {
        return (Vec::new(), P::Acc::NEG_INFINITY);
    }
    let mut sum = P::Acc::ZERO;
    for &(_, score, _) in &scores {
        sum += (score - largest).exp();
    }
    let weights = scores.iter().map(|&(key, score, is_edge)| Weight {
        key,
        p: stored::<P>((score - largest).exp() / sum),
        is_edge,
        factor: P::Acc::from_f64(
            problem.dropout.map_or(1.0, |d| d.factor((b * sizes.heads + h) as u64, i, key)),
        ),
    });
    (weights.collect(), largest + sum.ln())
}

/// What is left of an intermediate result where it is kept as a `P`.
fn stored<P: Element>(value: P::Acc) -> P::Acc {
    P::from_acc(value).to_acc()
}

fn real<R: Real, T: Element>(value: T) -> R {
    R::from_f64(value.to_acc().to_f64())
}
