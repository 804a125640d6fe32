//! The definition, written as plainly as it can be: what every kernel is tested against.
//!
//! One query after the other, one key after the other, in a precision of choice: f64 is the truth, and f32 shows how far a
//! straightforward evaluation in a tensor's own precision is from it.

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

/// Outputs, computed in precision `R`.
///
/// # Errors
/// When the arguments do not fit together, as for the kernels.
pub fn forward<R: Real, T: Element>(problem: &Attention<T>) -> Result<Forward> {
    let sizes = problem.check()?;
    let mut result = Forward { out: Vec::new(), lse: Vec::new() };
    for (b, h, i) in queries(&sizes) {
        let (weights, lse) = weights::<R, T>(problem, &sizes, b, h, i);
        for d in 0..sizes.value_dim {
            let mut sum = R::ZERO;
            for weight in &weights {
                let v = problem.v.at([b, h / sizes.group(), weight.key, d]);
                sum += weight.p * weight.factor * real::<R, T>(v);
            }
            result.out.push(sum.to_f64());
        }
        result.lse.push(lse.to_f64());
    }
    Ok(result)
}

/// Gradients, computed in precision `R`, of a loss whose gradient with respect to the output is `grad_out`.
///
/// # Errors
/// As [`forward`].
pub fn backward<R: Real, T: Element>(problem: &Attention<T>, grad_out: &View4<T>) -> Result<Backward> {
    let sizes = problem.check()?;
    sizes.check_out("grad_out", grad_out)?;
    let scale = R::from_f64(problem.scale);
    let mut dq = vec![R::ZERO; sizes.batch * sizes.heads * sizes.queries * sizes.dim];
    let mut dk = vec![R::ZERO; sizes.batch * sizes.kv_heads * sizes.keys * sizes.dim];
    let mut dv = vec![R::ZERO; sizes.batch * sizes.kv_heads * sizes.keys * sizes.value_dim];
    for (b, h, i) in queries(&sizes) {
        let kv_head = h / sizes.group();
        let (weights, _) = weights::<R, T>(problem, &sizes, b, h, i);
        let mut delta = R::ZERO;
        let mut dp = Vec::new();
        for weight in &weights {
            let mut dot = R::ZERO;
            for d in 0..sizes.value_dim {
                dot += real::<R, T>(grad_out.at([b, h, i, d])) * real::<R, T>(problem.v.at([b, kv_head, weight.key, d]));
            }
            dp.push(dot * weight.factor);
            delta += weight.p * dot * weight.factor;
        }
        for (weight, dp) in weights.iter().zip(dp) {
            let key_row = (b * sizes.kv_heads + kv_head) * sizes.keys + weight.key;
            let query_row = (b * sizes.heads + h) * sizes.queries + i;
            for d in 0..sizes.value_dim {
                dv[key_row * sizes.value_dim + d] +=
                    weight.p * weight.factor * real::<R, T>(grad_out.at([b, h, i, d]));
            }
            if weight.is_edge {
                let ds = scale * weight.p * (dp - delta);
                for d in 0..sizes.dim {
                    dq[query_row * sizes.dim + d] += ds * real::<R, T>(problem.k.at([b, kv_head, weight.key, d]));
                    dk[key_row * sizes.dim + d] += ds * real::<R, T>(problem.q.at([b, h, i, d]));
                }
            }
        }
    }
    let f64s = |values: Vec<R>| values.into_iter().map(Real::to_f64).collect();
    Ok(Backward { dq: f64s(dq), dk: f64s(dk), dv: f64s(dv) })
}

fn queries(sizes: &Sizes) -> impl Iterator<Item = (usize, usize, usize)> + use<> {
    let Sizes { batch, heads, queries, .. } = *sizes;
    (0..batch).flat_map(move |b| (0..heads).flat_map(move |h| (0..queries).map(move |i| (b, h, i))))
}

/// The keys of one query with their weights, and the log of the sum of the exponentials.
fn weights<R: Real, T: Element>(
    problem: &Attention<T>,
    sizes: &Sizes,
    b: usize,
    h: usize,
    i: usize,
) -> (Vec<Weight<R>>, R) {
    let mut runs = Vec::new();
    problem.plan.head(b, h, sizes.heads).by_query().row(i, &mut runs);
    let mut kept = vec![false; sizes.keys];
    for j in runs.into_iter().flatten() {
        kept[j] = true;
    }
    let mut scores: Vec<(usize, R, bool)> = Vec::new();
    for (j, kept) in kept.into_iter().enumerate() {
        if problem.key_mask.is_some_and(|mask| mask.at([b, j]) == 0) {
            continue;
        }
        if !kept {
            if problem.masked_logits == MaskedLogits::Zero {
                scores.push((j, R::ZERO, false));
            }
            continue;
        }
        let bias = problem.bias.map_or(R::ZERO, |bias| real::<R, T>(bias.at([b, h, i, j])));
        if bias == R::NEG_INFINITY {
            continue;
        }
        let mut dot = R::ZERO;
        for d in 0..sizes.dim {
            dot += real::<R, T>(problem.q.at([b, h, i, d])) * real::<R, T>(problem.k.at([b, h / sizes.group(), j, d]));
        }
        scores.push((j, R::from_f64(problem.scale) * dot + bias, true));
    }
    let mut largest = R::NEG_INFINITY;
    for &(_, score, _) in &scores {
        if score > largest {
            largest = score;
        }
    }
    if largest == R::NEG_INFINITY && !scores.iter().any(|(_, score, _)| score.to_f64().is_nan()) {
        return (Vec::new(), R::NEG_INFINITY);
    }
    let mut sum = R::ZERO;
    for &(_, score, _) in &scores {
        sum += (score - largest).exp();
    }
    let weights = scores.iter().map(|&(key, score, is_edge)| Weight {
        key,
        p: (score - largest).exp() / sum,
        is_edge,
        factor: R::from_f64(problem.dropout.map_or(1.0, |d| d.factor((b * sizes.heads + h) as u64, i, key))),
    });
    (weights.collect(), largest + sum.ln())
}

fn real<R: Real, T: Element>(value: T) -> R {
    R::from_f64(value.to_acc().to_f64())
}
