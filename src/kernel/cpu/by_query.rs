//! The backward pass over queries: `dq_i = scale * sum_j dS_ij k_j`, with `dS_ij = P_ij (dO_i . v_j - delta_i)` and
//! `delta_i = dO_i . O_i = sum_j P_ij (dO_i . v_j)`: the sum where all terms of a query are at hand, for it rounds like what it is
//! subtracted from.

use std::ops::Range;

use super::backward::{Saved, mean, shift};
use super::batch::{BLOCK, Batch, Cursor, GROUP, Lists, Next, PIECE, PLACES, STRIP, Strip};
use super::buffer::Buffer;
use super::gather::{Sums, dots, weighted_sums};
use super::long::{LONG_GROUP, add_long_weighted, long_dots};
use super::matrix::{Column, Matrix, padded};
use super::row::{dot, write_scaled};
use super::tasks::{Call, Head, runs_of_rows};
use super::tile::{Block, TILE, WORTH_PACKING, multiply, pack, transpose};
use crate::error::Result;
use crate::kernel::Run;
use crate::kernel::element::{Element, Real};
use crate::kernel::simd::{Kernel, MAX_LANES, Memory, Vector};
use crate::kernel::softmax::{exp, exp_or_zero};
use crate::kernel::view::{Output, RowsMut, ViewMut4};
use crate::pattern::edges::EdgeSet;

/// Write `dq`, `delta` of every query and, where there is a background, the weight that every query gives to a key in it.
pub(super) fn run<T: Element>(
    call: &Call<T>,
    saved: &Saved<T>,
    dq: &ViewMut4<T>,
    delta: &mut [T::Acc],
    background: &mut [T::Acc],
    run: &Run,
) -> Result<()> {
    let sizes = call.sizes;
    let per_query = [sizes.batch, sizes.heads, sizes.queries, 1];
    let delta = Output::new("delta", delta, &per_query)?;
    let background =
        if call.has_background() { Some(Output::new("background", background, &per_query)?) } else { None };
    let (tasks, pool) = call.tasks(sizes.heads, sizes.queries, 3, run);
    let isa = run.isa;
    pool.run(
        tasks.len(sizes.batch),
        || Scratch::new(call),
        |scratch, index| {
            let (batch, head, rows) = tasks.get(index);
            if call.is_regular(batch, head) {
                return;
            }
            let task = Task {
                edges: call.problem.plan.head(batch, head, sizes.heads).by_query(),
                tensors: call.head(batch, head),
                grad_out: saved.grad_out(batch, head),
                out: saved.out(batch, head),
                lse: saved.lse(batch, head),
                scale: call.scale,
                first_row: (batch * sizes.heads + head) * sizes.queries,
                rows,
                dq: dq.head(batch, head),
                delta: &delta,
                background: background.as_ref(),
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
    edges: &'a EdgeSet,
    tensors: Head<'a, T>,
    grad_out: Matrix<'a, T>,
    out: Matrix<'a, T>,
    lse: Column<'a, f64>,
    scale: T::Acc,
    /// Where the head's first query lies in `delta` and `background`.
    first_row: usize,
    rows: Range<usize>,
    dq: RowsMut<'a, T>,
    delta: &'a Output<'a, T::Acc>,
    background: Option<&'a Output<'a, T::Acc>>,
    scratch: &'a mut Scratch<T>,
}

/// What a thread keeps from task to task.
struct Scratch<T: Element> {
    lists: Lists,
    batch: Batch,
    /// One row of q, of grad_out, of out.
    query: Buffer<T::Acc>,
    grad_out: Buffer<T::Acc>,
    out: Buffer<T::Acc>,
    /// `q . k`, then `dS`, of a batch or of a piece of a long row.
    scores: Buffer<T::Acc>,
    /// `dO . v` likewise.
    grads: Buffer<T::Acc>,
    /// Ones, per strip of the batch.
    factors: Vec<[T::Acc; STRIP]>,
    /// A long row of dq.
    sum: Buffer<T::Acc>,
    tile: Option<Tile<T::Acc>>,
}

/// Panels of a tile; made when first needed.
struct Tile<R> {
    columns: Vec<u32>,
    deltas: Buffer<R>,
    queries: Buffer<R>,
    grad_out: Buffer<R>,
    keys: Buffer<R>,
    values: Buffer<R>,
    /// Keys, then values, one column per key.
    transposed: Buffer<R>,
    scores: Buffer<R>,
    grads: Buffer<R>,
    sums: Buffer<R>,
}

impl<T: Element> Scratch<T> {
    fn new(call: &Call<T>) -> Self {
        let row = |width: usize| Buffer::zeros(padded(width));
        let (dim, value_dim) = (call.sizes.dim, call.sizes.value_dim);
        Scratch {
            lists: Lists::default(),
            batch: Batch::default(),
            query: row(dim),
            grad_out: row(value_dim),
            out: row(value_dim),
            scores: Buffer::zeros(PLACES.max(PIECE)),
            grads: Buffer::zeros(PLACES.max(PIECE)),
            factors: Vec::new(),
            sum: row(dim),
            tile: None,
        }
    }
}

impl<R: Real> Tile<R> {
    fn new(dim: usize, value_dim: usize) -> Self {
        let panel = |width: usize| Buffer::zeros(TILE * padded(width));
        Tile {
            columns: Vec::with_capacity(TILE),
            deltas: Buffer::zeros(TILE),
            queries: panel(dim),
            grad_out: panel(value_dim),
            keys: panel(dim),
            values: panel(value_dim),
            transposed: panel(dim.max(value_dim)),
            scores: panel(TILE),
            grads: panel(TILE),
            sums: panel(dim),
        }
    }
}

impl<T: Element> Kernel<T> for Task<'_, T> {
    #[inline(always)]
    unsafe fn run<V: Vector<Lane = T::Acc> + Memory<T>>(mut self) {
        for (rows, is_dense) in runs_of_rows(self.edges, self.rows.clone()) {
            // SAFETY: the caller's promise; a bias may remove single edges, which tiles cannot leave unread.
            unsafe {
                if is_dense && rows.len() >= WORTH_PACKING && self.tensors.bias.is_none() {
                    for start in rows.clone().step_by(TILE) {
                        self.tile::<V>(start..rows.end.min(start + TILE));
                    }
                } else {
                    self.batches::<V>(rows);
                }
            }
        }
    }
}

impl<T: Element> Task<'_, T> {
    /// Rows with their own columns each.
    #[inline(always)]
    unsafe fn batches<V: Vector<Lane = T::Acc> + Memory<T>>(&mut self, rows: Range<usize>) {
        let mut lists = std::mem::take(&mut self.scratch.lists);
        let mut cursor = Cursor::new(self.edges, rows, self.tensors.allowed(), &mut lists);
        // SAFETY: the caller's promise; the cursor names rows of this head only.
        unsafe {
            while let Some(next) = cursor.next(&mut self.scratch.batch) {
                match next {
                    Next::Batch => self.batch::<V>(),
                    Next::LongRow(row) => self.long_row::<V>(row, &mut cursor),
                }
            }
        }
        self.scratch.lists = lists;
    }

    /// Write the weight that query `row` gives to a key in its background, where the call has any; returns whether the query has one.
    #[inline(always)]
    unsafe fn weigh_background(&self, row: usize) -> bool {
        let Some(background) = self.background else { return false };
        let has_keys = self.tensors.background_keys(self.edges, row) > 0;
        // SAFETY: the row is one of this task's.
        unsafe {
            background.row_mut(self.first_row + row)[0] =
                if has_keys { exp_or_zero(T::Acc::from_f64(-self.lse.at(row))) } else { T::Acc::ZERO };
        }
        has_keys
    }

    /// `dO . O` of query `row`, whose gradient is staged.
    #[inline(always)]
    unsafe fn dot_of_output<V: Vector<Lane = T::Acc> + Memory<T>>(&mut self, row: usize) -> T::Acc {
        let Scratch { grad_out, out, .. } = &mut *self.scratch;
        // SAFETY: the row is one of this task's; scratch rows have padded lengths.
        unsafe {
            self.grad_out.stage::<V>(row, grad_out);
            self.out.stage::<V>(row, out);
            dot::<V>(grad_out, out)
        }
    }

    /// The rows of the batch in the scratch.
    #[inline(always)]
    unsafe fn batch<V: Vector<Lane = T::Acc> + Memory<T>>(&mut self) {
        let head = self.tensors;
        // A bias is added to scores that are already scaled.
        let scale_left = if head.bias.is_some() { T::Acc::ONE } else { self.scale };
        // SAFETY: the batch names rows and columns of this head only; scratch has room for any batch.
        unsafe {
            {
                let Scratch { batch, scores, grads, .. } = &mut *self.scratch;
                dots::<V, T>(&head.q, &head.k, batch, scores);
                dots::<V, T>(&self.grad_out, &head.v, batch, grads);
                head.add_bias(self.scale, false, batch, scores);
                head.drop_weights(batch, grads);
            }
            for index in 0..self.scratch.batch.strips.len() {
                let strip = self.scratch.batch.strips[index];
                let (mut shifts, mut known) = ([[T::Acc::ZERO; STRIP]; 2], [None; STRIP]);
                for slot in 0..strip.rows {
                    let row = strip.row + slot;
                    [shifts[0][slot], shifts[1][slot]] = shift(self.lse.at(row));
                    if self.weigh_background(row) {
                        known[slot] = Some(self.dot_of_output::<V>(row));
                    }
                }
                let Scratch { scores, grads, .. } = &mut *self.scratch;
                let deltas =
                    differentiate::<V>(&strip, scores, grads, [scale_left, self.scale], &shifts, known);
                for slot in 0..strip.rows {
                    self.delta.row_mut(self.first_row + strip.row + slot)[0] = deltas[slot];
                }
            }
            let Scratch { batch, scores, factors, .. } = &mut *self.scratch;
            factors.clear();
            factors.resize(batch.strips.len(), [T::Acc::ONE; STRIP]);
            let to = Sums::Written { to: self.dq, factors };
            weighted_sums::<V, T>(scores, &head.k, batch, to);
        }
    }

    /// A row with many columns.
    #[inline(always)]
    unsafe fn long_row<V: Vector<Lane = T::Acc> + Memory<T>>(&mut self, row: usize, cursor: &mut Cursor<T>) {
        let head = self.tensors;
        let scale_left = if head.bias.is_some() { T::Acc::ONE } else { self.scale };
        // SAFETY: the cursor names columns of this head only; scratch rows have padded lengths.
        unsafe {
            let delta = self.dot_of_output::<V>(row);
            self.delta.row_mut(self.first_row + row)[0] = delta;
            self.weigh_background(row);
            let Scratch { query, grad_out, scores, grads, sum, .. } = &mut *self.scratch;
            head.q.stage::<V>(row, query);
            sum.fill(T::Acc::ZERO);
            let shift = shift(self.lse.at(row));
            while let Some(columns) = cursor.piece() {
                let len = columns.len();
                let groups = len.next_multiple_of(LONG_GROUP);
                long_dots::<V, T>(query, &head.k, columns, &mut scores[..groups]);
                long_dots::<V, T>(grad_out, &head.v, columns, &mut grads[..groups]);
                head.add_long_bias(self.scale, row, false, columns, &mut scores[..len]);
                head.drop_long_weights(row, columns, &mut grads[..len]);
                let (scores, grads) = (&mut scores[..padded(len)], &grads[..padded(len)]);
                score_gradients::<V>(scores, grads, scale_left, shift, delta, self.scale);
                add_long_weighted::<V, T>(&scores[..len], &head.k, columns, sum);
            }
            write_scaled::<V, T>(sum, T::Acc::ONE, self.dq.row_mut(row));
        }
    }

    /// Up to [`TILE`] rows that keep every column. They have no background.
    #[inline(always)]
    unsafe fn tile<V: Vector<Lane = T::Acc> + Memory<T>>(&mut self, rows: Range<usize>) {
        let head = self.tensors;
        let (dim, value_dim) = (head.q.width(), head.v.width());
        let (stride, value_stride) = (padded(dim), padded(value_dim));
        let out = &mut self.scratch.out;
        let tile = self.scratch.tile.get_or_insert_with(|| Tile::new(dim, value_dim));
        let allowed = head.allowed();
        let count_rows = rows.len();
        // SAFETY: rows and columns are those of this head; panels hold TILE rows of padded length.
        unsafe {
            pack::<V, T>(&head.q, rows.clone(), &mut tile.queries);
            pack::<V, T>(&self.grad_out, rows.clone(), &mut tile.grad_out);
            for (slot, row) in rows.clone().enumerate() {
                self.out.stage::<V>(row, out);
                // In the order of `multiply`: where a query gives one key all the weight, `dO . O` is the `dO . v` of it.
                let grad_out = &tile.grad_out[slot * value_stride..slot * value_stride + value_dim];
                let mut delta = V::splat(T::Acc::ZERO);
                for (&grad, &out) in grad_out.iter().zip(&**out) {
                    delta = V::splat(grad).mul_add(V::splat(out), delta);
                }
                tile.deltas[slot] = delta.largest();
                self.delta.row_mut(self.first_row + row)[0] = tile.deltas[slot];
                if let Some(background) = self.background {
                    background.row_mut(self.first_row + row)[0] = T::Acc::ZERO;
                }
            }
            tile.sums.fill(T::Acc::ZERO);
            let mut next = 0;
            while allowed.take_keys(&mut next, self.edges.num_cols(), TILE, &mut tile.columns) {
                let count = tile.columns.len();
                pack::<V, T>(&head.k, tile.columns.iter().map(|&column| column as usize), &mut tile.keys);
                pack::<V, T>(&head.v, tile.columns.iter().map(|&column| column as usize), &mut tile.values);
                transpose::<V>(&tile.keys, count, dim, &mut tile.transposed);
                multiply::<V, false>(
                    Block { data: &tile.queries, stride },
                    Block { data: &tile.transposed, stride: TILE },
                    &mut tile.scores,
                    TILE,
                    (count_rows, count, dim),
                );
                transpose::<V>(&tile.values, count, value_dim, &mut tile.transposed);
                multiply::<V, false>(
                    Block { data: &tile.grad_out, stride: value_stride },
                    Block { data: &tile.transposed, stride: TILE },
                    &mut tile.grads,
                    TILE,
                    (count_rows, count, value_dim),
                );
                for (slot, row) in rows.clone().enumerate() {
                    let (start, end) = (slot * TILE, slot * TILE + padded(count));
                    head.drop_long_weights(row, &tile.columns, &mut tile.grads[start..start + count]);
                    let (shift, delta) = (shift(self.lse.at(row)), tile.deltas[slot]);
                    let scores = &mut tile.scores[start..end];
                    score_gradients::<V>(
                        scores,
                        &tile.grads[start..end],
                        self.scale,
                        shift,
                        delta,
                        self.scale,
                    );
                }
                multiply::<V, true>(
                    Block { data: &tile.scores, stride: TILE },
                    Block { data: &tile.keys, stride },
                    &mut tile.sums,
                    stride,
                    (count_rows, dim, count),
                );
            }
            for (slot, row) in rows.enumerate() {
                let sum = &tile.sums[slot * stride..(slot + 1) * stride];
                write_scaled::<V, T>(sum, T::Acc::ONE, self.dq.row_mut(row));
            }
        }
    }
}

/// Replace the dots of a strip by `scale * P * (grad - delta)`, with `P = exp(scale_left * dot - shifts[0] - shifts[1])`; returns
/// delta of every row, which is `sum P grad / sum P` where it is not known: sums of P are 1 but for the rounding of the log-sum-exp.
#[inline(always)]
unsafe fn differentiate<V: Vector>(
    strip: &Strip,
    dots: &mut [V::Lane],
    grads: &[V::Lane],
    [scale_left, scale]: [V::Lane; 2],
    shifts: &[[V::Lane; STRIP]; 2],
    known: [Option<V::Lane>; STRIP],
) -> [V::Lane; STRIP] {
    let places = strip.places();
    assert!(places.end <= dots.len() && places.end <= grads.len());
    let mut deltas = [V::Lane::ZERO; STRIP];
    let whole = strip.common() / GROUP;
    let mut order = [V::Lane::ZERO; MAX_LANES];
    for (lane, place) in order.iter_mut().enumerate() {
        *place = V::Lane::from_f64((lane % GROUP) as f64);
    }
    let lens = strip.lens.map(|len| V::Lane::from_f64(f64::from(len)));
    let parts = BLOCK / V::LANES;
    // SAFETY: parts of blocks are whole registers; every part has a number for each of its rows.
    unsafe {
        let (zero, order) = (V::splat(V::Lane::ZERO), V::load(order.as_ptr()));
        let (scale_left, scale) = (V::splat(scale_left), V::splat(scale));
        for part in 0..parts {
            let first = part * (STRIP / parts);
            let [most, rest] =
                [V::spread(shifts[0].as_ptr().add(first)), V::spread(shifts[1].as_ptr().add(first))];
            let start = places.start + part * V::LANES;
            let (dots, grads) = (dots.as_mut_ptr().add(start), grads.as_ptr().add(start));
            let len = V::spread(lens.as_ptr().add(first));
            let (mut sum, mut total) = (zero, zero);
            for block in 0..strip.blocks {
                let (place, mut grad) = (dots.add(block * BLOCK), V::load(grads.add(block * BLOCK)));
                let mut p = exp(V::load(place) * scale_left - most - rest);
                p.store(place);
                if block >= whole {
                    let edge = order + V::splat(V::Lane::from_f64((block * GROUP) as f64));
                    (p, grad) = (p.where_below(edge, len, zero), grad.where_below(edge, len, zero));
                }
                sum = p.mul_add(grad, sum);
                total = total + p;
            }
            let mut lanes = [V::Lane::ZERO; MAX_LANES];
            mean::<V>(sum.sum_of_four(), total.sum_of_four()).store(lanes.as_mut_ptr());
            for row in 0..STRIP / parts {
                deltas[first + row] = known[first + row].unwrap_or(lanes[row * GROUP]);
            }
            let delta = V::spread(deltas.as_ptr().add(first));
            for block in 0..strip.blocks {
                let place = dots.add(block * BLOCK);
                (V::load(place) * (V::load(grads.add(block * BLOCK)) - delta) * scale).store(place);
            }
        }
    }
    deltas
}

/// Replace dots by `scale * P * (grad - delta)`, with `P = exp(scale_left * dot - shift[0] - shift[1])`.
#[inline(always)]
unsafe fn score_gradients<V: Vector>(
    dots: &mut [V::Lane],
    grads: &[V::Lane],
    scale_left: V::Lane,
    shift: [V::Lane; 2],
    delta: V::Lane,
    scale: V::Lane,
) {
    debug_assert!(dots.len() == grads.len() && dots.len().is_multiple_of(V::LANES));
    // SAFETY: whole registers, as asserted.
    unsafe {
        let (scale_left, delta, scale) = (V::splat(scale_left), V::splat(delta), V::splat(scale));
        let [most, rest] = [V::splat(shift[0]), V::splat(shift[1])];
        for i in (0..dots.len()).step_by(V::LANES) {
            let dot = dots.as_mut_ptr().add(i);
            let p = exp(V::load(dot) * scale_left - most - rest);
            (p * (V::load(grads.as_ptr().add(i)) - delta) * scale).store(dot);
        }
    }
}
