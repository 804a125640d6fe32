//! Attention weights of the last queries, summed by key and by distance. One tile of queries at a time has all its scores in
//! memory; tiles follow each other, so that sums do not depend on the number of threads.

use super::batch::Allowed;
use super::buffer::Buffer;
use super::matrix::{Column, Matrix, padded};
use super::tile::{Block, TILE, multiply, pack, transpose};
use crate::error::Result;
use crate::kernel::element::{Element, Real};
use crate::kernel::simd::{Kernel, Memory, Vector};
use crate::kernel::softmax::exp;
use crate::kernel::view::Output;
use crate::kernel::{Run, WeightSums};

/// [`WeightSums::sum`].
pub(in crate::kernel) fn weight_sums<T: Element>(
    problem: &WeightSums<T>,
    by_key: &mut [T::Acc],
    by_distance: &mut [T::Acc],
    run: &Run,
) -> Result<()> {
    problem.check()?;
    let [batch, heads, tokens, dim] = problem.q.shape();
    let kv_heads = problem.k.shape()[1];
    by_key.fill(T::Acc::ZERO);
    by_distance.fill(T::Acc::ZERO);
    let by_key = Output::new("by_key", by_key, &[batch, heads, tokens])?;
    let by_distance = Output::new("by_distance", by_distance, &[batch, heads, tokens])?;
    if batch * heads * tokens == 0 {
        return Ok(());
    }
    let masks: Vec<_> =
        (0..batch).map(|batch| problem.key_mask.as_ref().map(|mask| Column::of(mask, [batch, 0]))).collect();
    let allowed = |batch: usize, head: usize| Allowed {
        key_mask: masks[batch],
        bias: problem.bias.as_ref().map(|bias| Matrix::of(bias, batch, head)),
        by_key: false,
    };
    let last: Vec<Vec<usize>> = (0..batch)
        .map(|batch| {
            let keeps = |&token: &usize| allowed(batch, 0).keeps_key(token);
            (0..tokens).rev().filter(keeps).take(problem.last_queries).collect()
        })
        .collect();
    let isa = run.isa;
    for tile in 0..last.iter().map(Vec::len).max().unwrap_or(0).div_ceil(TILE) {
        run.pool.run(
            batch * heads,
            || Scratch::new(dim, tokens),
            |scratch, unit| {
                let (batch, head) = (unit / heads, unit % heads);
                let Some(rows) = last[batch].chunks(TILE).nth(tile) else { return };
                // SAFETY: every index is one head, and heads do not share rows of the sums.
                let (by_key, by_distance) = unsafe { (by_key.row_mut(unit), by_distance.row_mut(unit)) };
                let task = Task {
                    q: Matrix::of(&problem.q, batch, head),
                    k: Matrix::of(&problem.k, batch, head * kv_heads / heads),
                    allowed: allowed(batch, head),
                    scale: T::Acc::from_f64(problem.scale),
                    rows,
                    by_key,
                    by_distance,
                    scratch,
                };
                // SAFETY: rows and keys are tokens of this head.
                unsafe { isa.run::<T>(task) };
            },
            run.interrupt,
        )?;
    }
    Ok(())
}

/// Up to [`TILE`] queries of one head, in any order.
struct Task<'a, T: Element> {
    q: Matrix<'a, T>,
    k: Matrix<'a, T>,
    allowed: Allowed<'a, T>,
    scale: T::Acc,
    rows: &'a [usize],
    by_key: &'a mut [T::Acc],
    by_distance: &'a mut [T::Acc],
    scratch: &'a mut Scratch<T::Acc>,
}

/// What a thread keeps from task to task.
struct Scratch<R> {
    columns: Vec<u32>,
    tile: Vec<u32>,
    queries: Buffer<R>,
    keys: Buffer<R>,
    keys_transposed: Buffer<R>,
    scores: Buffer<R>,
}

impl<R: Real> Scratch<R> {
    fn new(dim: usize, tokens: usize) -> Self {
        let panel = || Buffer::zeros(TILE * padded(dim));
        Scratch {
            columns: Vec::with_capacity(tokens),
            tile: Vec::with_capacity(TILE),
            queries: panel(),
            keys: panel(),
            keys_transposed: panel(),
            scores: Buffer::unset(TILE * tokens.next_multiple_of(TILE)),
        }
    }
}

impl<T: Element> Kernel<T> for Task<'_, T> {
    #[inline(always)]
    unsafe fn run<V: Vector<Lane = T::Acc> + Memory<T>>(self) {
        let Task { q, k, allowed, scale, rows, .. } = self;
        let Scratch { columns, tile, queries, keys, keys_transposed, scores } = self.scratch;
        let (dim, stride) = (q.width(), padded(q.width()));
        let width = scores.len() / TILE;
        let end = rows.iter().max().map_or(0, |&row| row + 1);
        columns.clear();
        let mut next = 0;
        // SAFETY: rows and columns are those of this head; panels hold TILE rows of padded length, and a row of scores whole tiles.
        unsafe {
            pack::<V, T>(&q, rows.iter().copied(), queries);
            while allowed.take_keys(&mut next, end, TILE, tile) {
                pack::<V, T>(&k, tile.iter().map(|&column| column as usize), keys);
                transpose::<V>(keys, tile.len(), dim, keys_transposed);
                multiply::<V, false>(
                    Block { data: queries, stride },
                    Block { data: keys_transposed, stride: TILE },
                    &mut scores[columns.len()..],
                    width,
                    (rows.len(), tile.len(), dim),
                );
                columns.extend_from_slice(tile);
            }
            for (slot, &row) in rows.iter().enumerate() {
                let visible = columns.partition_point(|&key| key as usize <= row);
                let scores = &mut scores[slot * width..][..visible.next_multiple_of(V::LANES)];
                let columns = &columns[..visible];
                let mut largest = T::Acc::NEG_INFINITY;
                for (score, &key) in scores.iter_mut().zip(columns) {
                    *score *= scale;
                    if let Some(bias) = &allowed.bias {
                        *score += bias.at(row, key as usize).to_acc();
                    }
                    largest = if *score > largest { *score } else { largest };
                }
                // No number is above minus infinity: there is no key, unless there is NaN, which must show.
                if largest == T::Acc::NEG_INFINITY && scores[..visible].iter().all(|&score| score == largest)
                {
                    continue;
                }
                // Lanes beyond the keys weigh nothing.
                scores[visible..].fill(T::Acc::NEG_INFINITY);
                let mut total = T::Acc::ZERO;
                for place in scores.chunks_exact_mut(V::LANES) {
                    let weights = exp(V::load(place.as_ptr()) - V::splat(largest));
                    weights.store(place.as_mut_ptr());
                    total += weights.sum();
                }
                for (&weight, &key) in scores.iter().zip(columns) {
                    let weight = weight / total;
                    self.by_key[key as usize] += weight;
                    self.by_distance[row - key as usize] += weight;
                }
            }
        }
    }
}
