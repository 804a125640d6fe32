//! Outputs and their log-sum-exps.

use std::ops::Range;

use super::dense::{RowDots, RowSum};
use super::dots::Dots;
use super::sums::Sums;
use super::{BLOCK, STRIP, bits, blocks, most_lines, near, rows_per_block};
use crate::error::Result;
use crate::kernel::Run;
use crate::kernel::cpu::batch::PIECE;
use crate::kernel::cpu::buffer::Buffer;
use crate::kernel::cpu::matrix::padded;
use crate::kernel::cpu::row::{scale, write_scaled};
use crate::kernel::cpu::tasks::{Call, Head};
use crate::kernel::element::{Element, Real};
use crate::kernel::simd::{Kernel, MAX_LANES, Memory, Vector, fence};
use crate::kernel::softmax::{Running, exp, log_sum_exp};
use crate::kernel::view::{Output, RowsMut, ViewMut4};
use crate::plan::lines::{Line, Lines};

/// Write `out` and `lse` of the heads in `call.lines`.
pub(in crate::kernel::cpu) fn forward<T: Element>(
    call: &Call<T>,
    out: &ViewMut4<T>,
    lse: &Output<f64>,
    run: &Run,
) -> Result<()> {
    let (sizes, units) = (call.sizes, call.lines.units());
    if units.is_empty() {
        return Ok(());
    }
    let lines = |unit: usize| call.lines_of(unit);
    let (tasks, pool) = call.tasks(sizes.heads, sizes.queries, 2, run);
    let per_head = tasks.per_head();
    let most = most_lines(units.iter().map(|&unit| lines(unit)));
    let (isa, past_caches) = (run.isa, call.exceeds_caches());
    pool.run(
        units.len() * per_head,
        || Scratch::new(call, most),
        |scratch, index| {
            let unit = units[index / per_head];
            let task = Task {
                lines: lines(unit),
                tensors: call.head(unit / sizes.heads, unit % sizes.heads),
                past_caches,
                scale: call.scale,
                first_row: unit * sizes.queries,
                rows: tasks.rows(index % per_head),
                out: out.head(unit / sizes.heads, unit % sizes.heads),
                lse,
                scratch,
            };
            // SAFETY: every index is one task, and tasks do not share rows.
            unsafe { isa.run::<T>(task) };
        },
        run.interrupt,
    )
}

/// Some queries of one head.
struct Task<'a, T: Element> {
    lines: &'a Lines,
    tensors: Head<'a, T>,
    /// Whether the output goes past the caches.
    past_caches: bool,
    scale: T::Acc,
    /// Where the head's first query lies in `lse`.
    first_row: usize,
    rows: Range<usize>,
    out: RowsMut<'a, T>,
    lse: &'a Output<'a, f64>,
    scratch: &'a mut Scratch<T::Acc>,
}

/// What a thread keeps from task to task.
struct Scratch<R> {
    near: Vec<Line>,
    active: Vec<Line>,
    begun: Buffer<R>,
    /// Dots, then weights, of a block: [`BLOCK`] of each line.
    weights: Buffer<R>,
    /// One over the sum of a row's weights.
    factors: Buffer<R>,
    /// Dots, then weights, of a piece of a dense row.
    piece: Buffer<R>,
    /// A dense row of the output.
    sum: Buffer<R>,
}

impl<R: Real> Scratch<R> {
    fn new<T: Element<Acc = R>>(call: &Call<T>, lines: usize) -> Self {
        Scratch {
            near: Vec::with_capacity(lines),
            active: Vec::with_capacity(lines),
            begun: Buffer::zeros(lines * MAX_LANES * STRIP),
            weights: Buffer::zeros(lines * BLOCK),
            factors: Buffer::zeros(BLOCK),
            piece: Buffer::zeros(PIECE),
            sum: Buffer::zeros(padded(call.sizes.value_dim)),
        }
    }
}

impl<T: Element> Kernel<T> for Task<'_, T> {
    #[inline(always)]
    unsafe fn run<V: Vector<Lane = T::Acc> + Memory<T>>(mut self) {
        let (lines, rows) = (self.lines, self.rows.clone());
        for rows in blocks(&lines.queries, rows.clone(), rows_per_block(lines.by_query.len())) {
            // SAFETY: the caller's promise.
            unsafe { self.block::<V>(rows) };
        }
        // After its neighbours, which have brought keys and values to the second cache.
        for &(query, _) in lines.dense_queries.iter().filter(|(query, _)| rows.contains(query)) {
            // SAFETY: the caller's promise.
            unsafe { self.dense_row::<V>(query) };
        }
        if self.past_caches {
            fence();
        }
    }
}

impl<T: Element> Task<'_, T> {
    #[inline(always)]
    unsafe fn block<V: Vector<Lane = T::Acc> + Memory<T>>(&mut self, rows: Range<usize>) {
        let Head { q, k, v, .. } = &self.tensors;
        let Scratch { near: lines, active, begun, weights, factors, .. } = &mut *self.scratch;
        near(&self.lines.by_query, &rows, lines);
        // SAFETY: the rows and the columns of their lines are those of this head; a block's lines have BLOCK numbers each.
        unsafe {
            V::outline::<T>(Dots { rows: q, matrix: k, lines, block: rows.clone(), begun, out: weights });
            for first in rows.clone().step_by(V::LANES) {
                let place = first - rows.start;
                let (most, total) = softmax::<V>(lines, first, self.scale, weights.as_mut_ptr().add(place));
                let (mut largest, mut totals) = ([T::Acc::ZERO; MAX_LANES], [T::Acc::ZERO; MAX_LANES]);
                <V as Memory<T::Acc>>::store(most, largest.as_mut_ptr());
                <V as Memory<T::Acc>>::store(total, totals.as_mut_ptr());
                for lane in 0..V::LANES.min(rows.end - first) {
                    let (factor, lse) = if totals[lane] == T::Acc::ZERO {
                        (T::Acc::ZERO, f64::NEG_INFINITY)
                    } else {
                        (T::Acc::ONE / totals[lane], log_sum_exp(largest[lane], totals[lane]))
                    };
                    factors[place + lane] = factor;
                    self.lse.row_mut(self.first_row + first + lane)[0] = lse;
                }
            }
            for (index, line) in lines.iter_mut().enumerate() {
                line.at = (index * BLOCK) as isize - rows.start as isize;
            }
            V::outline::<T>(Sums {
                weights,
                matrix: v,
                lines,
                block: rows,
                factors: Some(factors),
                to: self.out,
                past_caches: self.past_caches,
                active,
            });
        }
    }

    /// A query that keeps every key.
    #[inline(always)]
    unsafe fn dense_row<V: Vector<Lane = T::Acc> + Memory<T>>(&mut self, row: usize) {
        let Head { q, k, v, .. } = &self.tensors;
        let Scratch { piece, sum, .. } = &mut *self.scratch;
        sum.fill(T::Acc::ZERO);
        let mut running = Running::new(0);
        // SAFETY: rows and columns are those of this head.
        unsafe {
            for start in (0..k.rows()).step_by(PIECE) {
                let rows = start..k.rows().min(start + PIECE);
                let len = rows.len();
                V::outline::<T>(RowDots {
                    x: q.row(row),
                    matrix: k,
                    rows: rows.clone(),
                    out: &mut piece[..len],
                });
                let correction = running.absorb::<V>(&mut piece[..padded(len)], len, self.scale);
                scale::<V>(sum, correction);
                V::outline::<T>(RowSum { weights: &piece[..len], matrix: v, rows, sum });
            }
            let (factor, lse) = running.finish();
            write_scaled::<V, T>(sum, factor, self.out.row_mut(row));
            self.lse.row_mut(self.first_row + row)[0] = lse;
        }
    }
}

/// Replace the dots of a register of rows from `first` on by `exp(scale * dot - largest)`, zero where a line has no edge. Gives the
/// rows' largest scores and the sums of their weights.
#[inline(always)]
unsafe fn softmax<V: Vector>(lines: &[Line], first: usize, scale: V::Lane, data: *mut V::Lane) -> (V, V) {
    // SAFETY: the caller says that every line has a register of rows at `data` and every BLOCK numbers from there.
    unsafe {
        let nothing = V::splat(V::Lane::NEG_INFINITY);
        let zero = V::splat(V::Lane::ZERO);
        let scale = V::splat(scale);
        let rows = first..first + V::LANES;
        let mut most = nothing;
        for (index, line) in lines.iter().enumerate() {
            let place = data.add(index * BLOCK);
            let mut score = V::load(place) * scale;
            if !line.covers(&rows) {
                score = score.keep(bits::<V>(line, first), nothing);
            }
            score.store(place);
            most = most.max(score);
        }
        let shift = most.where_below(nothing, most, zero);
        let mut total = zero;
        for index in 0..lines.len() {
            let place = data.add(index * BLOCK);
            let weight = exp(V::load(place) - shift);
            total = total + weight;
            weight.store(place);
        }
        (most, total)
    }
}
