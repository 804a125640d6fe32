//! The backward pass over keys: `dk_j = scale * sum_i dS_ij q_i` and `dv_j = sum_i P_ij dO_i`, over the queries of every head that
//! shares the key, always in the same order.

use std::ops::Range;

use super::background::Share;
use super::backward::{Saved, shift};
use super::batch::{Batch, Cursor, EDGES, Lists};
use super::buffer::Buffer;
use super::gather::{GROUP, add_scaled, add_weighted, dots, write_scaled};
use super::matrix::{Column, Matrix, padded};
use super::tasks::{Call, Head, runs_of_rows};
use super::tile::{Block, TILE, WORTH_PACKING, multiply, pack, transpose};
use crate::error::Result;
use crate::kernel::Run;
use crate::kernel::element::{Element, Real};
use crate::kernel::simd::{Kernel, Memory, Vector};
use crate::kernel::softmax::exp;
use crate::kernel::view::Output;
use crate::pattern::edges::EdgeSet;

/// Write `dk` and `dv`.
pub(super) fn run<T: Element>(
    call: &Call<T>,
    saved: &Saved<T>,
    delta: &[T::Acc],
    background: Option<Share<T::Acc>>,
    dk: &Output<T>,
    dv: &Output<T>,
    run: &Run,
) -> Result<()> {
    let sizes = call.sizes;
    let plan = call.problem.plan;
    // Turning a mask around takes time of its own, which must not be spent while other tasks wait for it.
    run.pool.run(
        sizes.batch * sizes.heads,
        || (),
        |(), index| {
            let (batch, head) = (index / sizes.heads, index % sizes.heads);
            if !call.panels.take(batch, head) {
                plan.head(batch, head, sizes.heads).by_key();
            }
        },
        run.interrupt,
    )?;
    let (tasks, pool) = call.tasks(sizes.kv_heads, sizes.keys, 4, run);
    let isa = run.isa;
    pool.run(
        tasks.len(sizes.batch),
        || Scratch::new(call),
        |scratch, index| {
            let (batch, kv_head, rows) = tasks.get(index);
            if call.panels.take_keys(batch, kv_head) {
                return;
            }
            let task = Task { call, saved, delta, background, batch, kv_head, rows, dk, dv, scratch };
            // SAFETY: every index is one task, and tasks do not share rows.
            unsafe { isa.run::<T>(task) };
        },
        run.interrupt,
    )
}

/// Some keys of one head of k and v.
struct Task<'a, T: Element> {
    call: &'a Call<'a, T>,
    saved: &'a Saved<'a, T>,
    delta: &'a [T::Acc],
    background: Option<Share<'a, T::Acc>>,
    batch: usize,
    kv_head: usize,
    rows: Range<usize>,
    dk: &'a Output<'a, T>,
    dv: &'a Output<'a, T>,
    scratch: &'a mut Scratch<T>,
}

/// One head of q, as its keys see it.
struct Queries<'a, T: Element> {
    edges: &'a EdgeSet,
    tensors: Head<'a, T>,
    grad_out: Matrix<'a, T>,
    lse: Column<'a, T::Acc>,
    delta: &'a [T::Acc],
    /// What every query gives to a key that is no edge.
    background: Option<&'a [T::Acc]>,
    scale: T::Acc,
}

/// What a thread keeps from task to task.
struct Scratch<T: Element> {
    lists: Lists,
    batch: Batch,
    copies: Vec<T>,
    /// One row of k, of v.
    key: Buffer<T::Acc>,
    value: Buffer<T::Acc>,
    /// `q . k`, then `dS`, of a batch.
    scores: Buffer<T::Acc>,
    /// `dO . v`, then the weight of `dO` in dv, of a batch.
    grads: Buffer<T::Acc>,
    terms: QueryTerms<T::Acc>,
    /// [`TILE`] rows of dk, of dv.
    dk: Buffer<T::Acc>,
    dv: Buffer<T::Acc>,
    tile: Option<Tile<T::Acc>>,
}

/// What a key needs to know of the queries it meets, one entry per edge.
struct QueryTerms<R> {
    shifts: Buffer<R>,
    deltas: Buffer<R>,
    background: Buffer<R>,
    /// Dropout's factors.
    factors: Buffer<R>,
}

/// Panels of a tile; made when first needed.
struct Tile<R> {
    columns: Vec<u32>,
    keys: Buffer<R>,
    values: Buffer<R>,
    queries: Buffer<R>,
    grad_out: Buffer<R>,
    /// Queries, then their gradients, one column per query.
    transposed: Buffer<R>,
    scores: Buffer<R>,
    grads: Buffer<R>,
}

impl<T: Element> Scratch<T> {
    fn new(call: &Call<T>) -> Self {
        let (dim, value_dim) = (padded(call.sizes.dim), padded(call.sizes.value_dim));
        let zeros = |len: usize| Buffer::zeros(len);
        let mut ones = zeros(EDGES);
        ones.fill(T::Acc::ONE);
        Scratch {
            lists: Lists::default(),
            batch: Batch::default(),
            copies: Vec::new(),
            key: zeros(dim),
            value: zeros(value_dim),
            scores: zeros(EDGES),
            grads: zeros(EDGES),
            terms: QueryTerms {
                shifts: zeros(EDGES),
                deltas: zeros(EDGES),
                background: zeros(EDGES),
                factors: ones,
            },
            dk: zeros(TILE * dim),
            dv: zeros(TILE * value_dim),
            tile: None,
        }
    }
}

impl<R: Real> Tile<R> {
    fn new(dim: usize, value_dim: usize) -> Self {
        let panel = |width: usize| Buffer::zeros(TILE * padded(width));
        Tile {
            columns: Vec::with_capacity(TILE),
            keys: panel(dim),
            values: panel(value_dim),
            queries: panel(dim),
            grad_out: panel(value_dim),
            transposed: panel(dim.max(value_dim)),
            scores: panel(TILE),
            grads: panel(TILE),
        }
    }
}

impl<T: Element> Kernel<T> for Task<'_, T> {
    #[inline(always)]
    unsafe fn run<V: Vector<Lane = T::Acc> + Memory<T>>(self) {
        let sizes = self.call.sizes;
        let plan = self.call.problem.plan;
        let scratch = self.scratch;
        for start in self.rows.clone().step_by(TILE) {
            let rows = start..self.rows.end.min(start + TILE);
            scratch.dk.fill(T::Acc::ZERO);
            scratch.dv.fill(T::Acc::ZERO);
            for head in self.kv_head * sizes.group()..(self.kv_head + 1) * sizes.group() {
                let first = (self.batch * sizes.heads + head) * sizes.queries;
                let queries = Queries {
                    edges: plan.head(self.batch, head, sizes.heads).by_key(),
                    tensors: self.call.head(self.batch, head),
                    grad_out: self.saved.grad_out(self.batch, head),
                    lse: self.saved.lse(self.batch, head),
                    delta: &self.delta[first..first + sizes.queries],
                    background: self.background.map(|share| &share.weights[first..first + sizes.queries]),
                    scale: self.call.scale,
                };
                for (part, is_dense) in runs_of_rows(queries.edges, rows.clone()) {
                    // SAFETY: the caller's promise; a bias may remove single edges, which tiles cannot leave unread.
                    unsafe {
                        if is_dense && part.len() >= WORTH_PACKING && queries.tensors.bias.is_none() {
                            tile::<V, T>(&queries, part, start, scratch);
                        } else {
                            batches::<V, T>(&queries, part, start, scratch);
                        }
                    }
                }
                if let Some(share) = self.background {
                    let sum = share.sums.of_head(self.batch, head);
                    for dv in scratch.dv.chunks_exact_mut(sum.len()).take(rows.len()) {
                        // SAFETY: the caller's promise.
                        unsafe { add_scaled::<V>(sum, T::Acc::ONE, dv) };
                    }
                }
            }
            let first = (self.batch * sizes.kv_heads + self.kv_head) * sizes.keys;
            let (stride, value_stride) = (padded(sizes.dim), padded(sizes.value_dim));
            for (slot, row) in rows.enumerate() {
                // SAFETY: the row belongs to this task.
                let (to_dk, to_dv) = unsafe { (self.dk.row_mut(first + row), self.dv.row_mut(first + row)) };
                if self.call.problem.key_mask.is_some_and(|mask| mask.at([self.batch, row]) == 0) {
                    to_dk.fill(T::from_acc(T::Acc::ZERO));
                    to_dv.fill(T::from_acc(T::Acc::ZERO));
                    continue;
                }
                let dk = &scratch.dk[slot * stride..(slot + 1) * stride];
                let dv = &scratch.dv[slot * value_stride..(slot + 1) * value_stride];
                // SAFETY: the caller's promise.
                unsafe {
                    write_scaled::<V, T>(dk, T::Acc::ONE, to_dk);
                    write_scaled::<V, T>(dv, T::Acc::ONE, to_dv);
                }
            }
        }
    }
}

impl<T: Element> Queries<'_, T> {
    /// List what key `row` needs of the queries `columns`, from place `at` on.
    #[inline(always)]
    fn terms(&self, columns: &[u32], at: usize, terms: &mut QueryTerms<T::Acc>) {
        for (edge, &query) in columns.iter().enumerate() {
            // SAFETY: columns are queries of this head.
            terms.shifts[at + edge] = shift(unsafe { self.lse.at(query as usize) });
            terms.deltas[at + edge] = self.delta[query as usize];
        }
        if let Some(background) = self.background {
            for (edge, &query) in columns.iter().enumerate() {
                terms.background[at + edge] = background[query as usize];
            }
        }
    }

    #[inline(always)]
    fn factors(&self, row: usize, columns: &[u32], at: usize, terms: &mut QueryTerms<T::Acc>) {
        if let Some(draws) = &self.tensors.draws {
            for (edge, &query) in columns.iter().enumerate() {
                terms.factors[at + edge] = T::Acc::from_f64(draws.query(query as usize).factor(row));
            }
        }
    }
}

impl<R: Real> QueryTerms<R> {
    /// Replace dots `scores` by `scale * P * (factor * grad - delta)` and `grads` by `P * factor - background`, with
    /// `P = exp(scale_left * dot - shift)`, for the edges whose terms begin at `at`.
    #[inline(always)]
    unsafe fn apply<V: Vector<Lane = R>>(
        &self,
        at: usize,
        scores: &mut [R],
        grads: &mut [R],
        scale_left: R,
        scale: R,
    ) {
        let len = scores.len();
        assert!(grads.len() == len && at + len <= EDGES && len.is_multiple_of(V::LANES));
        // SAFETY: whole registers, as asserted; every list has EDGES entries.
        unsafe {
            let (scale_left, scale) = (V::splat(scale_left), V::splat(scale));
            for i in (0..len).step_by(V::LANES) {
                let (score, grad) = (scores.as_mut_ptr().add(i), grads.as_mut_ptr().add(i));
                let factor = V::load(self.factors.as_ptr().add(at + i));
                let p = exp(V::load(score) * scale_left - V::load(self.shifts.as_ptr().add(at + i)));
                let grad_of_p = V::load(grad) * factor - V::load(self.deltas.as_ptr().add(at + i));
                (p * grad_of_p * scale).store(score);
                (p * factor - V::load(self.background.as_ptr().add(at + i))).store(grad);
            }
        }
    }
}

/// Add what keys with their own queries each gather from one head. The sums of row `r` are row `r - start` of the scratch.
#[inline(always)]
unsafe fn batches<V, T>(queries: &Queries<T>, rows: Range<usize>, start: usize, scratch: &mut Scratch<T>)
where
    T: Element,
    V: Vector<Lane = T::Acc> + Memory<T>,
{
    let head = queries.tensors;
    let (stride, value_stride) = (padded(head.k.width()), padded(head.v.width()));
    let Scratch { lists, batch, copies, key, value, scores, grads, terms, dk, dv, .. } = scratch;
    let mut cursor = Cursor::new(queries.edges, rows, head.allowed_values(true), lists);
    // A bias is added to scores that are already scaled.
    let scale_left = if head.bias.is_some() { T::Acc::ONE } else { queries.scale };
    // SAFETY: the cursor names rows and columns of this head only; scratch rows have padded lengths.
    unsafe {
        while cursor.next(batch) {
            for piece in &batch.pieces {
                head.k.stage::<V>(piece.row, key);
                head.v.stage::<V>(piece.row, value);
                let groups = piece.start..piece.start + piece.len.next_multiple_of(GROUP);
                let columns = &batch.columns[groups.clone()];
                dots::<V, T>(key, &head.q, columns, &mut scores[groups.clone()], copies);
                dots::<V, T>(value, &queries.grad_out, columns, &mut grads[groups], copies);
                let columns = &batch.columns[piece.edges()];
                head.add_bias(queries.scale, piece.row, true, columns, &mut scores[piece.edges()]);
                queries.terms(columns, piece.start, terms);
                queries.factors(piece.row, columns, piece.start, terms);
            }
            for piece in &batch.pieces {
                let range = piece.padded_edges();
                terms.apply::<V>(
                    range.start,
                    &mut scores[range.clone()],
                    &mut grads[range],
                    scale_left,
                    queries.scale,
                );
            }
            for piece in &batch.pieces {
                let (range, columns) = (piece.edges(), &batch.columns[piece.edges()]);
                let slot = piece.row - start;
                let dk = &mut dk[slot * stride..(slot + 1) * stride];
                add_weighted::<V, T>(&scores[range.clone()], &head.q, columns, dk, copies);
                let dv = &mut dv[slot * value_stride..(slot + 1) * value_stride];
                add_weighted::<V, T>(&grads[range], &queries.grad_out, columns, dv, copies);
            }
        }
    }
}

/// [`batches`] for keys that every query keeps.
#[inline(always)]
unsafe fn tile<V, T>(queries: &Queries<T>, rows: Range<usize>, start: usize, scratch: &mut Scratch<T>)
where
    T: Element,
    V: Vector<Lane = T::Acc> + Memory<T>,
{
    let head = queries.tensors;
    let (dim, value_dim) = (head.k.width(), head.v.width());
    let (stride, value_stride) = (padded(dim), padded(value_dim));
    let Scratch { terms, dk, dv, tile, .. } = scratch;
    let tile = tile.get_or_insert_with(|| Tile::new(dim, value_dim));
    let m = rows.len();
    let first = rows.start - start;
    // SAFETY: rows and columns are those of this head; panels hold TILE rows of padded length.
    unsafe {
        pack::<V, T>(&head.k, rows.clone(), &mut tile.keys);
        pack::<V, T>(&head.v, rows.clone(), &mut tile.values);
        for chunk in (0..queries.edges.num_cols()).step_by(TILE) {
            let columns = chunk..queries.edges.num_cols().min(chunk + TILE);
            let count = columns.len();
            tile.columns.clear();
            tile.columns.extend(columns.clone().map(|column| column as u32));
            pack::<V, T>(&head.q, columns.clone(), &mut tile.queries);
            pack::<V, T>(&queries.grad_out, columns, &mut tile.grad_out);
            transpose::<V>(&tile.queries, count, dim, &mut tile.transposed);
            multiply::<V, false>(
                Block { data: &tile.keys, stride },
                Block { data: &tile.transposed, stride: TILE },
                &mut tile.scores,
                TILE,
                (m, count, dim),
            );
            transpose::<V>(&tile.grad_out, count, value_dim, &mut tile.transposed);
            multiply::<V, false>(
                Block { data: &tile.values, stride: value_stride },
                Block { data: &tile.transposed, stride: TILE },
                &mut tile.grads,
                TILE,
                (m, count, value_dim),
            );
            queries.terms(&tile.columns, 0, terms);
            for (slot, row) in rows.clone().enumerate() {
                queries.factors(row, &tile.columns, 0, terms);
                let range = slot * TILE..slot * TILE + padded(count);
                let (scores, grads) = (&mut tile.scores[range.clone()], &mut tile.grads[range]);
                terms.apply::<V>(0, scores, grads, queries.scale, queries.scale);
            }
            multiply::<V, true>(
                Block { data: &tile.scores, stride: TILE },
                Block { data: &tile.queries, stride },
                &mut dk[first * stride..],
                stride,
                (m, dim, count),
            );
            multiply::<V, true>(
                Block { data: &tile.grads, stride: TILE },
                Block { data: &tile.grad_out, stride: value_stride },
                &mut dv[first * value_stride..],
                value_stride,
                (m, value_dim, count),
            );
        }
    }
}
