//! Gradients: by query dq, and with it P and dS of every edge, from which dk and dv are summed by key. 5 products instead of the 7 that
//! computing P and dS again would take.
//!
//! Some heads at a time, because the numbers of all edges may be too many to keep.

use std::ops::Range;

use super::dense::{RowDots, RowSum};
use super::dots::Dots;
use super::sums::Sums;
use super::{BLOCK, STRIP, bits, blocks, most_lines, near, rows_per_block};
use crate::error::Result;
use crate::kernel::Run;
use crate::kernel::cpu::backward::{Outputs, Saved, mean, shift};
use crate::kernel::cpu::buffer::Buffer;
use crate::kernel::cpu::matrix::{Column, Matrix, padded};
use crate::kernel::cpu::row::write_scaled;
use crate::kernel::cpu::tasks::{Call, Head};
use crate::kernel::element::{Element, Real};
use crate::kernel::simd::{Kernel, MAX_LANES, Memory, Vector, fence};
use crate::kernel::softmax::exp;
use crate::kernel::view::{Output, RowsMut};
use crate::plan::lines::{Line, Lines};

/// Bytes of P and dS that are kept even if it is those of more heads than there are threads.
const KEPT_BYTES: usize = 1 << 20;

/// Write the gradients of the heads in `call.lines`.
pub(in crate::kernel::cpu) fn backward<T: Element>(
    call: &Call<T>,
    saved: &Saved<T>,
    outputs: Outputs<T>,
    run: &Run,
) -> Result<()> {
    let (sizes, units) = (call.sizes, call.lines.units());
    let most = most_lines(units.iter().map(|&unit| call.lines_of(unit)));
    let (by_query, pool) = call.tasks(sizes.heads, sizes.queries, 3, run);
    let (by_key, _) = call.tasks(sizes.heads, sizes.keys, 2, run);
    let (isa, past_caches) = (run.isa, call.exceeds_caches());
    let mut left = &units[..];
    let mut kept = Buffer::zeros(0);
    while !left.is_empty() {
        let (group, rest) = left.split_at(heads_at_a_time(call, left, pool.parallelism()));
        left = rest;
        // Where the numbers of each head begin: P, then dS.
        let mut starts = vec![0];
        for &unit in group {
            starts.push(starts.last().copied().unwrap_or(0) + 2 * call.lines_of(unit).len);
        }
        let total = starts.last().copied().unwrap_or(0);
        if kept.len() < total {
            kept = Buffer::unset(total);
        }
        let room = kept.len();
        let numbers = Output::new("kept", &mut kept, &[room, 1])?;
        for (keys, tasks) in [(false, &by_query), (true, &by_key)] {
            pool.run(
                group.len() * tasks.per_head(),
                || Scratch::new(call, most),
                |scratch, index| {
                    let (place, part) = (index / tasks.per_head(), index % tasks.per_head());
                    let unit = group[place];
                    let (batch, head) = (unit / sizes.heads, unit % sizes.heads);
                    let lines = call.lines_of(unit);
                    let task = Task {
                        lines,
                        tensors: call.head(batch, head),
                        grad_out: saved.grad_out(batch, head),
                        past_caches,
                        lse: saved.lse(batch, head),
                        scale: call.scale,
                        rows: tasks.rows(part),
                        keys,
                        kept: &numbers,
                        start: starts[place],
                        dq: outputs.dq.head(batch, head),
                        dk: outputs.dk.head(batch, head),
                        dv: outputs.dv.head(batch, head),
                        scratch,
                    };
                    // SAFETY: every index is one task, and tasks do not share rows of what they write.
                    unsafe { isa.run::<T>(task) };
                },
                run.interrupt,
            )?;
        }
    }
    Ok(())
}

/// As many of `units` as threads, and more of them as long as their numbers are few.
fn heads_at_a_time<T: Element>(call: &Call<T>, units: &[usize], threads: usize) -> usize {
    let mut bytes = 0;
    let few = units.iter().take_while(|&&unit| {
        bytes += 2 * call.lines_of(unit).len * size_of::<T::Acc>();
        bytes <= KEPT_BYTES
    });
    few.count().max(threads).clamp(1, units.len())
}

/// Some queries, or some keys, of one head.
struct Task<'a, T: Element> {
    lines: &'a Lines,
    tensors: Head<'a, T>,
    grad_out: Matrix<'a, T>,
    /// Whether gradients go past the caches.
    past_caches: bool,
    lse: Column<'a, f64>,
    scale: T::Acc,
    rows: Range<usize>,
    /// Whether rows are keys.
    keys: bool,
    /// P, then dS, of every edge of the head by its number, from `start` on.
    kept: &'a Output<'a, T::Acc>,
    start: usize,
    dq: RowsMut<'a, T>,
    dk: RowsMut<'a, T>,
    dv: RowsMut<'a, T>,
    scratch: &'a mut Scratch<T::Acc>,
}

/// What a thread keeps from task to task.
struct Scratch<R> {
    near: Vec<Line>,
    active: Vec<Line>,
    begun: Buffer<R>,
    /// Dots, then P, of a block: [`BLOCK`] of each line.
    weights: Buffer<R>,
    /// `dO . v`, then dS.
    grads: Buffer<R>,
    /// What is subtracted from the scores of a block's rows, in two parts.
    shifts: [Buffer<R>; 2],
    /// A row of an output.
    sum: Buffer<R>,
}

impl<R: Real> Scratch<R> {
    fn new<T: Element<Acc = R>>(call: &Call<T>, lines: usize) -> Self {
        let block = || Buffer::zeros(lines * BLOCK);
        Scratch {
            near: Vec::with_capacity(lines),
            active: Vec::with_capacity(lines),
            begun: Buffer::zeros(lines * MAX_LANES * STRIP),
            weights: block(),
            grads: block(),
            shifts: [Buffer::zeros(BLOCK), Buffer::zeros(BLOCK)],
            sum: Buffer::zeros(padded(call.sizes.dim.max(call.sizes.value_dim))),
        }
    }
}

impl<T: Element> Kernel<T> for Task<'_, T> {
    #[inline(always)]
    unsafe fn run<V: Vector<Lane = T::Acc> + Memory<T>>(mut self) {
        let lines = self.lines;
        let rows = self.rows.clone();
        // SAFETY: the caller's promise.
        unsafe {
            if self.keys {
                for keys in blocks(&lines.keys, rows.clone(), rows_per_block(lines.by_key.len())) {
                    self.block_of_keys::<V>(keys);
                }
                for (key, parts) in lines.dense_keys.iter().filter(|(key, _)| rows.contains(key)) {
                    self.dense_key::<V>(*key, parts);
                }
            } else {
                for queries in blocks(&lines.queries, rows.clone(), rows_per_block(lines.by_query.len())) {
                    self.block_of_queries::<V>(queries);
                }
                for &(query, first) in lines.dense_queries.iter().filter(|(query, _)| rows.contains(query)) {
                    self.dense_query::<V>(query, first);
                }
            }
        }
        if self.past_caches {
            fence();
        }
    }
}

impl<'a, T: Element> Task<'a, T> {
    /// dq of some queries, and P and dS of their edges.
    #[inline(always)]
    unsafe fn block_of_queries<V: Vector<Lane = T::Acc> + Memory<T>>(&mut self, rows: Range<usize>) {
        let Head { q, k, v, .. } = &self.tensors;
        let Scratch { near: lines, active, begun, weights, grads, shifts, .. } = &mut *self.scratch;
        near(&self.lines.by_query, &rows, lines);
        // SAFETY: the rows and the columns of their lines are those of this head; a block's lines have BLOCK numbers each; the numbers
        // of a query's edges belong to the task that has the query.
        unsafe {
            V::outline::<T>(Dots { rows: q, matrix: k, lines, block: rows.clone(), begun, out: weights });
            V::outline::<T>(Dots {
                rows: &self.grad_out,
                matrix: v,
                lines,
                block: rows.clone(),
                begun,
                out: grads,
            });
            for row in rows.clone() {
                let place = row - rows.start;
                [shifts[0][place], shifts[1][place]] = shift(self.lse.at(row));
            }
            for first in rows.clone().step_by(V::LANES) {
                let place = first - rows.start;
                let [most, rest] = &*shifts;
                let shift = [V::load(most.as_ptr().add(place)), V::load(rest.as_ptr().add(place))];
                let (weights, grads) = (weights.as_mut_ptr().add(place), grads.as_mut_ptr().add(place));
                differentiate::<V>(lines, first, self.scale, shift, weights, grads);
            }
            for (index, line) in lines.iter_mut().enumerate() {
                let from = index * BLOCK + line.start - rows.start;
                let (place, count) = (self.start + line.place(line.start), line.end - line.start);
                self.kept.rows_mut(place..place + count).copy_from_slice(&weights[from..from + count]);
                let place = place + self.lines.len;
                self.kept.rows_mut(place..place + count).copy_from_slice(&grads[from..from + count]);
                line.at = (index * BLOCK) as isize - rows.start as isize;
            }
            V::outline::<T>(Sums {
                weights: grads,
                matrix: k,
                lines,
                block: rows,
                factors: None,
                to: self.dq,
                past_caches: self.past_caches,
                active,
            });
        }
    }

    /// [`Self::block_of_queries`] for a query that keeps every key, whose numbers begin with that of edge `first`.
    #[inline(always)]
    unsafe fn dense_query<V: Vector<Lane = T::Acc> + Memory<T>>(&mut self, row: usize, first: usize) {
        let Head { q, k, v, .. } = &self.tensors;
        let sum = &mut self.scratch.sum[..padded(q.width())];
        sum.fill(T::Acc::ZERO);
        // SAFETY: rows and columns are those of this head; the numbers of a query's edges belong to the task that has the query.
        unsafe {
            let first = self.start + first;
            let weights = self.kept.rows_mut(first..first + k.rows());
            let first = first + self.lines.len;
            let grads = self.kept.rows_mut(first..first + k.rows());
            let keys = 0..k.rows();
            V::outline::<T>(RowDots { x: q.row(row), matrix: k, rows: keys.clone(), out: weights });
            V::outline::<T>(RowDots { x: self.grad_out.row(row), matrix: v, rows: keys.clone(), out: grads });
            let [most, rest] = shift::<T::Acc>(self.lse.at(row));
            let (scale, most, rest) = (V::splat(self.scale), V::splat(most), V::splat(rest));
            let zero = V::splat(T::Acc::ZERO);
            let (mut delta, mut left, mut total) = (zero, zero, zero);
            for (weights, grads) in weights.chunks_mut(V::LANES).zip(grads.chunks(V::LANES)) {
                let p = exp(load::<V>(weights) * scale - most - rest).first_or(weights.len(), zero);
                delta = p.mul_add(load::<V>(grads), delta);
                total = total + p;
                store(p, weights);
            }
            let total = V::splat(total.sum());
            let delta = mean::<V>(V::splat(delta.sum()), total);
            for (weights, grads) in weights.chunks(V::LANES).zip(grads.chunks(V::LANES)) {
                left = load::<V>(weights).mul_add(load::<V>(grads) - delta, left);
            }
            let left = mean::<V>(V::splat(left.sum()), total);
            for (weights, grads) in weights.chunks(V::LANES).zip(grads.chunks_mut(V::LANES)) {
                store(load::<V>(weights) * (load::<V>(grads) - delta - left) * scale, grads);
            }
            V::outline::<T>(RowSum { weights: grads, matrix: k, rows: keys, sum });
            write_scaled::<V, T>(sum, T::Acc::ONE, self.dq.row_mut(row));
        }
    }

    /// P and dS of the head.
    ///
    /// # Safety
    /// The first pass is over.
    unsafe fn kept(&self) -> [&'a [T::Acc]; 2] {
        let (start, len) = (self.start, self.lines.len);
        // SAFETY: the caller's promise.
        unsafe {
            [self.kept.read_rows(start..start + len), self.kept.read_rows(start + len..start + 2 * len)]
        }
    }

    /// dk and dv of some keys.
    #[inline(always)]
    unsafe fn block_of_keys<V: Vector<Lane = T::Acc> + Memory<T>>(&mut self, rows: Range<usize>) {
        // SAFETY: the rows and the columns of their lines are those of this head, whose numbers were written by the first pass.
        unsafe {
            let [weights, grads] = self.kept();
            let Scratch { near: lines, active, .. } = &mut *self.scratch;
            near(&self.lines.by_key, &rows, lines);
            for (weights, matrix, to) in
                [(grads, &self.tensors.q, self.dk), (weights, &self.grad_out, self.dv)]
            {
                let block = rows.clone();
                V::outline::<T>(Sums {
                    weights,
                    matrix,
                    lines,
                    block,
                    factors: None,
                    to,
                    past_caches: self.past_caches,
                    active,
                });
            }
        }
    }

    /// [`Self::block_of_keys`] for a key that every query keeps.
    #[inline(always)]
    unsafe fn dense_key<V: Vector<Lane = T::Acc> + Memory<T>>(&mut self, key: usize, lines: &[Line]) {
        // SAFETY: as above.
        unsafe {
            let [weights, grads] = self.kept();
            for (weights, matrix, to) in
                [(grads, &self.tensors.q, self.dk), (weights, &self.grad_out, self.dv)]
            {
                let sum = &mut self.scratch.sum[..padded(matrix.width())];
                sum.fill(T::Acc::ZERO);
                for line in lines {
                    let weights = &weights[line.place(line.start)..][..line.end - line.start];
                    V::outline::<T>(RowSum { weights, matrix, rows: line.start..line.end, sum });
                }
                write_scaled::<V, T>(sum, T::Acc::ONE, to.row_mut(key));
            }
        }
    }
}

/// Turn the dots of a register of rows from `first` on into P, and `dO . v` into `scale * dS`; zero where a line has no edge.
///
/// For delta see [`Delta`](crate::kernel::cpu::backward::Delta).
#[inline(always)]
unsafe fn differentiate<V: Vector>(
    lines: &[Line],
    first: usize,
    scale: V::Lane,
    [most, rest]: [V; 2],
    weights: *mut V::Lane,
    grads: *mut V::Lane,
) {
    // SAFETY: the caller says that every line has a register of rows at `weights` and `grads` and every BLOCK numbers from there.
    unsafe {
        let (zero, scale) = (V::splat(V::Lane::ZERO), V::splat(scale));
        let rows = first..first + V::LANES;
        let (mut delta, mut left, mut total) = (zero, zero, zero);
        for (index, line) in lines.iter().enumerate() {
            let (weight, grad) = (weights.add(index * BLOCK), grads.add(index * BLOCK));
            let mut p = exp(V::load(weight) * scale - most - rest);
            let mut dp = V::load(grad);
            if !line.covers(&rows) {
                let bits = bits::<V>(line, first);
                (p, dp) = (p.keep(bits, zero), dp.keep(bits, zero));
                dp.store(grad);
            }
            delta = p.mul_add(dp, delta);
            total = total + p;
            p.store(weight);
        }
        let delta = mean::<V>(delta, total);
        for index in 0..lines.len() {
            let (weight, grad) = (weights.add(index * BLOCK), grads.add(index * BLOCK));
            left = V::load(weight).mul_add(V::load(grad) - delta, left);
        }
        let left = mean::<V>(left, total);
        for index in 0..lines.len() {
            let (weight, grad) = (weights.add(index * BLOCK), grads.add(index * BLOCK));
            (V::load(weight) * (V::load(grad) - delta - left) * scale).store(grad);
        }
    }
}

/// Up to a register of numbers, zeros in the other lanes.
#[inline(always)]
unsafe fn load<V: Vector>(from: &[V::Lane]) -> V {
    // SAFETY: no more is read than there is.
    unsafe {
        if from.len() == V::LANES { V::load(from.as_ptr()) } else { V::load_first(from.as_ptr(), from.len()) }
    }
}

/// As many lanes as there is room for.
#[inline(always)]
unsafe fn store<V: Vector>(lanes: V, to: &mut [V::Lane]) {
    // SAFETY: no more is written than there is room for.
    unsafe {
        if to.len() == V::LANES {
            lanes.store(to.as_mut_ptr())
        } else {
            lanes.store_first(to.as_mut_ptr(), to.len())
        }
    }
}
