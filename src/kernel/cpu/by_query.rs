//! The backward pass over queries: `dq_i = scale * sum_j dS_ij k_j`, with `dS_ij = P_ij (dO_i . v_j - delta_i)` and
//! `delta_i = dO_i . O_i = sum_j P_ij (dO_i . v_j)`: the sum where all terms of a query are at hand, for it rounds like what it is
//! subtracted from. See [`Delta`].

mod tile;

use std::ops::Range;

use self::tile::Tile;
use super::backward::{Delta, OfQuery, Saved, mean, mean_of_row, shift};
use super::batch::{BLOCK, Batch, Cursor, GROUP, Lists, Next, PIECE, PLACES, STRIP, Strip};
use super::buffer::Buffer;
use super::gather::{Sums, dots, weighted_sums};
use super::long::{LONG_GROUP, add_long_weighted, long_dots};
use super::matrix::{Column, Matrix, padded};
use super::row::{dot, write_scaled};
use super::tasks::{Call, Head, runs_of_rows};
use super::tile::TILE;
use crate::error::Result;
use crate::kernel::Run;
use crate::kernel::element::{Element, Real};
use crate::kernel::simd::{Kernel, MAX_LANES, Memory, Vector};
use crate::kernel::softmax::{exp, exp_or_zero};
use crate::kernel::view::{Output, RowsMut, ViewMut4};
use crate::pattern::edges::EdgeSet;

/// Write `dq`, what a key needs of every query and, where there is a background, the weight that every query gives to a key in it.
pub(super) fn run<T: Element>(
    call: &Call<T>,
    saved: &Saved<T>,
    dq: &ViewMut4<T>,
    of_queries: &mut [OfQuery<T::Acc>],
    background: &mut [T::Acc],
    run: &Run,
) -> Result<()> {
    let sizes = call.sizes;
    let per_query = [sizes.batch, sizes.heads, sizes.queries, 1];
    let of_queries = Output::new("of_queries", of_queries, &per_query)?;
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
                of_queries: &of_queries,
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
    /// Where the head's first query lies in `of_queries` and `background`.
    first_row: usize,
    rows: Range<usize>,
    dq: RowsMut<'a, T>,
    of_queries: &'a Output<'a, OfQuery<T::Acc>>,
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

impl<T: Element> Kernel<T> for Task<'_, T> {
    #[inline(always)]
    unsafe fn run<V: Vector<Lane = T::Acc> + Memory<T>>(mut self) {
        for (rows, in_tiles) in runs_of_rows(self.edges, self.rows.clone()) {
            // SAFETY: the caller's promise; a bias may remove single edges, which tiles cannot leave unread.
            unsafe {
                if in_tiles && self.tensors.bias.is_none() {
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
                    Next::LongRow { row, in_pieces } => self.long_row::<V>(row, in_pieces, &mut cursor),
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
                    let parts = [shifts[0][slot], shifts[1][slot], deltas[0][slot], deltas[1][slot]];
                    self.of_queries.row_mut(self.first_row + strip.row + slot)[0] = parts;
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
    unsafe fn long_row<V>(&mut self, row: usize, in_pieces: bool, cursor: &mut Cursor<T>)
    where
        V: Vector<Lane = T::Acc> + Memory<T>,
    {
        let head = self.tensors;
        let scale_left = if head.bias.is_some() { T::Acc::ONE } else { self.scale };
        // SAFETY: the cursor names columns of this head only; scratch rows have padded lengths.
        unsafe {
            let has_background = self.weigh_background(row);
            let known = (has_background || in_pieces).then(|| self.dot_of_output::<V>(row));
            let mut delta = [known.unwrap_or(T::Acc::ZERO), T::Acc::ZERO];
            let Scratch { query, grad_out, scores, grads, sum, .. } = &mut *self.scratch;
            head.q.stage::<V>(row, query);
            self.grad_out.stage::<V>(row, grad_out);
            sum.fill(T::Acc::ZERO);
            let shift = shift(self.lse.at(row));
            while let Some(columns) = cursor.piece() {
                let len = columns.len();
                let groups = len.next_multiple_of(LONG_GROUP);
                long_dots::<V, T>(query, &head.k, columns, &mut scores[..groups]);
                long_dots::<V, T>(grad_out, &head.v, columns, &mut grads[..groups]);
                head.add_long_bias(self.scale, row, false, columns, &mut scores[..len]);
                head.drop_long_weights(row, columns, &mut grads[..len]);
                weigh::<V>(scores, len, scale_left, shift);
                if known.is_none() {
                    delta[0] = mean_of_row(sum_rest::<V>(scores, grads, len, T::Acc::ZERO));
                    delta[1] = mean_of_row(sum_rest::<V>(scores, grads, len, delta[0]));
                }
                differentiate_row::<V>(scores, grads, len, delta, self.scale);
                add_long_weighted::<V, T>(&scores[..len], &head.k, columns, sum);
            }
            self.of_queries.row_mut(self.first_row + row)[0] = [shift[0], shift[1], delta[0], delta[1]];
            write_scaled::<V, T>(sum, T::Acc::ONE, self.dq.row_mut(row));
        }
    }
}

/// Replace the dots of a strip by `scale * P * (grad - delta)`, with `P = exp(scale_left * dot - shifts[0] - shifts[1])`; returns
/// delta of every row, which is a sum where it is not known.
#[inline(always)]
unsafe fn differentiate<V: Vector>(
    strip: &Strip,
    dots: &mut [V::Lane],
    grads: &[V::Lane],
    [scale_left, scale]: [V::Lane; 2],
    shifts: &[[V::Lane; STRIP]; 2],
    known: [Option<V::Lane>; STRIP],
) -> [[V::Lane; STRIP]; 2] {
    let places = strip.places();
    assert!(places.end <= dots.len() && places.end <= grads.len());
    let mut deltas = [[V::Lane::ZERO; STRIP]; 2];
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
            let own = Own { order, len, whole };
            let (mut sum, mut total) = (zero, zero);
            for block in 0..strip.blocks {
                let (place, grad) = (dots.add(block * BLOCK), V::load(grads.add(block * BLOCK)));
                let p = exp(V::load(place) * scale_left - most - rest);
                p.store(place);
                let p = own.of(block, p);
                sum = p.mul_add(own.of(block, grad), sum);
                total = total + p;
            }
            let total = total.sum_of_four();
            let known: [_; 2] = [known, known.map(|delta| delta.map(|_| V::Lane::ZERO))];
            let delta = spread_means::<V>(sum, total, first, &known[0], &mut deltas[0]);
            sum = zero;
            for block in 0..strip.blocks {
                let (p, grad) = (V::load(dots.add(block * BLOCK)), V::load(grads.add(block * BLOCK)));
                sum = own.of(block, p).mul_add(own.of(block, grad - delta), sum);
            }
            let rest = spread_means::<V>(sum, total, first, &known[1], &mut deltas[1]);
            for block in 0..strip.blocks {
                let place = dots.add(block * BLOCK);
                (V::load(place) * (V::load(grads.add(block * BLOCK)) - delta - rest) * scale).store(place);
            }
        }
    }
    deltas
}

/// Which places of a strip are edges.
#[derive(Clone, Copy)]
struct Own<V> {
    /// The edge of every place of the first block.
    order: V,
    /// The number of edges of its row.
    len: V,
    /// Blocks that hold nothing else.
    whole: usize,
}

impl<V: Vector> Own<V> {
    /// `numbers` of block `block`, zero where there is no edge.
    #[inline(always)]
    unsafe fn of(self, block: usize, numbers: V) -> V {
        if block < self.whole {
            return numbers;
        }
        // SAFETY: the caller's promise that the instructions of `V` are available.
        unsafe {
            let edge = self.order + V::splat(V::Lane::from_f64((block * GROUP) as f64));
            numbers.where_below(edge, self.len, V::splat(V::Lane::ZERO))
        }
    }
}

/// The means of the rows of a part of a strip, the first of which is row `first`, or what is known of them: written to `means`, and
/// every one in the places of its row.
#[inline(always)]
unsafe fn spread_means<V: Vector>(
    sum: V,
    total: V,
    first: usize,
    known: &[Option<V::Lane>; STRIP],
    means: &mut [V::Lane; STRIP],
) -> V {
    // SAFETY: the caller's promise that the instructions of `V` are available; a part has LANES / GROUP rows.
    unsafe {
        let mut lanes = [V::Lane::ZERO; MAX_LANES];
        mean::<V>(sum.sum_of_four(), total).store(lanes.as_mut_ptr());
        for row in 0..V::LANES / GROUP {
            means[first + row] = known[first + row].unwrap_or(lanes[row * GROUP]);
        }
        V::spread(means.as_ptr().add(first))
    }
}

/// Replace the dots of a row by `P = exp(scale_left * dot - shift[0] - shift[1])`.
#[inline(always)]
unsafe fn weigh<V: Vector>(dots: &mut [V::Lane], len: usize, scale_left: V::Lane, shift: [V::Lane; 2]) {
    let dots = &mut dots[..padded(len)];
    // SAFETY: padded lengths are whole registers.
    unsafe {
        let scale_left = V::splat(scale_left);
        let [most, rest] = [V::splat(shift[0]), V::splat(shift[1])];
        for i in (0..len).step_by(V::LANES) {
            let dot = dots.as_mut_ptr().add(i);
            exp(V::load(dot) * scale_left - most - rest).store(dot);
        }
    }
}

/// `sum P (grad - delta)` and `sum P` of a row.
#[inline(always)]
unsafe fn sum_rest<V: Vector>(
    weights: &[V::Lane],
    grads: &[V::Lane],
    len: usize,
    delta: V::Lane,
) -> [V::Lane; 2] {
    let (weights, grads) = (&weights[..padded(len)], &grads[..padded(len)]);
    // SAFETY: padded lengths are whole registers.
    unsafe {
        let (zero, delta) = (V::splat(V::Lane::ZERO), V::splat(delta));
        let (mut sum, mut total) = (zero, zero);
        for i in (0..len).step_by(V::LANES) {
            let count = V::LANES.min(len - i);
            let rest = V::load(grads.as_ptr().add(i)) - delta;
            let p = V::load(weights.as_ptr().add(i)).first_or(count, zero);
            sum = p.mul_add(rest.first_or(count, zero), sum);
            total = total + p;
        }
        [sum.sum(), total.sum()]
    }
}

/// Replace P of a row by `scale * P * (grad - delta)`.
#[inline(always)]
unsafe fn differentiate_row<V: Vector>(
    weights: &mut [V::Lane],
    grads: &[V::Lane],
    len: usize,
    delta: Delta<V::Lane>,
    scale: V::Lane,
) {
    let (weights, grads) = (&mut weights[..padded(len)], &grads[..padded(len)]);
    // SAFETY: padded lengths are whole registers.
    unsafe {
        let (scale, [delta, rest]) = (V::splat(scale), delta.map(|part| V::splat(part)));
        for i in (0..len).step_by(V::LANES) {
            let weight = weights.as_mut_ptr().add(i);
            (V::load(weight) * (V::load(grads.as_ptr().add(i)) - delta - rest) * scale).store(weight);
        }
    }
}
