//! The backward pass over keys: `dk_j = scale * sum_i dS_ij q_i` and `dv_j = sum_i P_ij dO_i`, over the queries of every head that
//! shares the key, always in the same order.

mod tile;

use std::ops::Range;

use self::tile::{Tile, tile};
use super::background::Share;
use super::backward::{OfQuery, Saved};
use super::batch::{Batch, Cursor, GROUP, Lists, Next, PIECE, PLACES, STRIP};
use super::buffer::Buffer;
use super::gather::{Sums, dots, weighted_sums};
use super::long::{LONG_GROUP, add_long_weighted, long_dots};
use super::matrix::{Matrix, padded};
use super::row::{add_scaled, write_scaled};
use super::tasks::{Call, Head, runs_of_rows};
use super::tile::TILE;
use crate::error::Result;
use crate::kernel::Run;
use crate::kernel::element::{Element, Real};
use crate::kernel::simd::{Kernel, Memory, Vector};
use crate::kernel::softmax::exp;
use crate::kernel::view::{RowsMut, ViewMut4};
use crate::pattern::edges::EdgeSet;

/// Write `dk` and `dv`.
pub(super) fn run<T: Element>(
    call: &Call<T>,
    saved: &Saved<T>,
    of_queries: &[OfQuery<T::Acc>],
    background: Option<Share<T::Acc>>,
    dk: &ViewMut4<T>,
    dv: &ViewMut4<T>,
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
            if !call.is_regular(batch, head) {
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
            // Heads that share keys are all computed here, or none of them.
            if call.is_regular(batch, kv_head * sizes.group()) {
                return;
            }
            let (dk, dv) = (dk.head(batch, kv_head), dv.head(batch, kv_head));
            let task = Task { call, saved, of_queries, background, batch, kv_head, rows, dk, dv, scratch };
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
    of_queries: &'a [OfQuery<T::Acc>],
    background: Option<Share<'a, T::Acc>>,
    batch: usize,
    kv_head: usize,
    rows: Range<usize>,
    dk: RowsMut<'a, T>,
    dv: RowsMut<'a, T>,
    scratch: &'a mut Scratch<T>,
}

/// One head of q, as its keys see it.
struct Queries<'a, T: Element> {
    edges: &'a EdgeSet,
    tensors: Head<'a, T>,
    grad_out: Matrix<'a, T>,
    of_queries: &'a [OfQuery<T::Acc>],
    /// What every query gives to a key that is no edge.
    background: Option<&'a [T::Acc]>,
    scale: T::Acc,
}

/// What a thread keeps from task to task.
struct Scratch<T: Element> {
    lists: Lists,
    batch: Batch,
    /// The long row of k, of v.
    key: Buffer<T::Acc>,
    value: Buffer<T::Acc>,
    /// `q . k`, then `dS`, of a batch or of a piece of a long row.
    scores: Buffer<T::Acc>,
    /// `dO . v`, then the weight of `dO` in dv, likewise.
    grads: Buffer<T::Acc>,
    terms: QueryTerms<T::Acc>,
    /// [`TILE`] rows of dk, of dv.
    dk: Buffer<T::Acc>,
    dv: Buffer<T::Acc>,
    /// Ones, per strip of the batch.
    factors: Vec<[T::Acc; STRIP]>,
    tile: Option<Tile<T::Acc>>,
}

/// Numbers of a batch or of a piece of a long row.
const NUMBERS: usize = if PLACES > PIECE { PLACES } else { PIECE };

/// What a key needs to know of the queries it meets, one entry per place or edge.
struct QueryTerms<R> {
    /// Each part of [`OfQuery`].
    of_queries: [Buffer<R>; 4],
    background: Buffer<R>,
    /// Dropout's factors.
    factors: Buffer<R>,
}

impl<T: Element> Scratch<T> {
    fn new(call: &Call<T>) -> Self {
        let (dim, value_dim) = (padded(call.sizes.dim), padded(call.sizes.value_dim));
        let zeros = |len: usize| Buffer::zeros(len);
        let mut ones = zeros(NUMBERS);
        ones.fill(T::Acc::ONE);
        Scratch {
            lists: Lists::default(),
            batch: Batch::default(),
            key: zeros(dim),
            value: zeros(value_dim),
            scores: zeros(NUMBERS),
            grads: zeros(NUMBERS),
            terms: QueryTerms {
                of_queries: std::array::from_fn(|_| zeros(NUMBERS)),
                background: zeros(NUMBERS),
                factors: ones,
            },
            dk: zeros(TILE * dim),
            dv: zeros(TILE * value_dim),
            factors: Vec::new(),
            tile: None,
        }
    }
}

impl<T: Element> Kernel<T> for Task<'_, T> {
    #[inline(always)]
    unsafe fn run<V: Vector<Lane = T::Acc> + Memory<T>>(mut self) {
        let group = self.call.sizes.group();
        for start in self.rows.clone().step_by(TILE) {
            let rows = start..self.rows.end.min(start + TILE);
            // SAFETY: the caller's promise.
            unsafe {
                if group == 1 && self.background.is_none() {
                    let queries = self.queries(self.kv_head);
                    for (part, in_tiles) in runs_of_rows(queries.edges, rows) {
                        if in_tiles {
                            self.clear(part.start - start..part.end - start);
                            self.gather::<V>(&queries, part.clone(), start, in_tiles);
                            self.write::<V>(part, start);
                        } else {
                            self.batches::<V>(&queries, part, start, true);
                        }
                    }
                    continue;
                }
                self.clear(0..rows.len());
                for head in self.kv_head * group..(self.kv_head + 1) * group {
                    let queries = self.queries(head);
                    for (part, in_tiles) in runs_of_rows(queries.edges, rows.clone()) {
                        self.gather::<V>(&queries, part, start, in_tiles);
                    }
                    if let Some(share) = self.background {
                        let sum = share.sums.of_head(self.batch, head);
                        for dv in self.scratch.dv.chunks_exact_mut(sum.len()).take(rows.len()) {
                            add_scaled::<V>(sum, T::Acc::ONE, dv);
                        }
                    }
                }
                self.write::<V>(rows, start);
            }
        }
    }
}

impl<'a, T: Element> Task<'a, T> {
    fn queries(&self, head: usize) -> Queries<'a, T> {
        let sizes = self.call.sizes;
        let first = (self.batch * sizes.heads + head) * sizes.queries;
        Queries {
            edges: self.call.problem.plan.head(self.batch, head, sizes.heads).by_key(),
            tensors: self.call.head(self.batch, head),
            grad_out: self.saved.grad_out(self.batch, head),
            of_queries: &self.of_queries[first..first + sizes.queries],
            background: self.background.map(|share| &share.weights[first..first + sizes.queries]),
            scale: self.call.scale,
        }
    }

    /// Begin the sums of rows of the scratch.
    fn clear(&mut self, slots: Range<usize>) {
        let (stride, value_stride) = (padded(self.call.sizes.dim), padded(self.call.sizes.value_dim));
        self.scratch.dk[slots.start * stride..slots.end * stride].fill(T::Acc::ZERO);
        self.scratch.dv[slots.start * value_stride..slots.end * value_stride].fill(T::Acc::ZERO);
    }

    /// Write the sums of `rows`, those of row `r` from row `r - start` of the scratch.
    #[inline(always)]
    unsafe fn write<V: Vector<Lane = T::Acc> + Memory<T>>(&mut self, rows: Range<usize>, start: usize) {
        let (stride, value_stride) = (padded(self.call.sizes.dim), padded(self.call.sizes.value_dim));
        for row in rows {
            let slot = row - start;
            // SAFETY: the row belongs to this task.
            let (to_dk, to_dv) = unsafe { (self.dk.row_mut(row), self.dv.row_mut(row)) };
            if self.call.problem.key_mask.is_some_and(|mask| mask.at([self.batch, row]) == 0) {
                to_dk.fill(T::from_acc(T::Acc::ZERO));
                to_dv.fill(T::from_acc(T::Acc::ZERO));
                continue;
            }
            let dk = &self.scratch.dk[slot * stride..(slot + 1) * stride];
            let dv = &self.scratch.dv[slot * value_stride..(slot + 1) * value_stride];
            // SAFETY: the caller's promise.
            unsafe {
                write_scaled::<V, T>(dk, T::Acc::ONE, to_dk);
                write_scaled::<V, T>(dv, T::Acc::ONE, to_dv);
            }
        }
    }

    /// Add what `rows` gather from one head to the scratch.
    #[inline(always)]
    unsafe fn gather<V: Vector<Lane = T::Acc> + Memory<T>>(
        &mut self,
        queries: &Queries<T>,
        rows: Range<usize>,
        start: usize,
        in_tiles: bool,
    ) {
        // SAFETY: the caller's promise; a bias may remove single edges, which tiles cannot leave unread.
        unsafe {
            if in_tiles && queries.tensors.bias.is_none() {
                tile::<V, T>(queries, rows, start, self.scratch);
            } else {
                self.batches::<V>(queries, rows, start, false);
            }
        }
    }

    /// What keys with their own queries each gather from one head: added to the scratch, or written if it is `all` that they get.
    #[inline(always)]
    unsafe fn batches<V: Vector<Lane = T::Acc> + Memory<T>>(
        &mut self,
        queries: &Queries<T>,
        rows: Range<usize>,
        start: usize,
        all: bool,
    ) {
        let mut lists = std::mem::take(&mut self.scratch.lists);
        let mut cursor = Cursor::new(queries.edges, rows, queries.tensors.allowed_values(true), &mut lists);
        // SAFETY: the caller's promise; the cursor names rows of this head only.
        unsafe {
            while let Some(next) = cursor.next(&mut self.scratch.batch) {
                match next {
                    Next::Batch => self.batch::<V>(queries, start, all),
                    Next::LongRow { row, .. } => {
                        if all {
                            self.clear(row - start..row - start + 1);
                        }
                        long_row::<V, T>(queries, row, &mut cursor, start, self.scratch);
                        if all {
                            self.write::<V>(row..row + 1, start);
                        }
                    }
                }
            }
        }
        self.scratch.lists = lists;
    }

    /// [`Self::batches`] for the rows of the batch in the scratch.
    #[inline(always)]
    unsafe fn batch<V: Vector<Lane = T::Acc> + Memory<T>>(
        &mut self,
        queries: &Queries<T>,
        start: usize,
        all: bool,
    ) {
        let head = queries.tensors;
        let Scratch { batch, scores, grads, terms, dk, dv, factors, .. } = &mut *self.scratch;
        // A bias is added to scores that are already scaled.
        let scale_left = if head.bias.is_some() { T::Acc::ONE } else { queries.scale };
        let places = batch.columns.len();
        // SAFETY: the batch names rows and columns of this head only; scratch has room for any batch.
        unsafe {
            dots::<V, T>(&head.k, &head.q, batch, scores);
            dots::<V, T>(&head.v, &queries.grad_out, batch, grads);
            head.add_bias(queries.scale, true, batch, scores);
            queries.terms(&batch.columns, terms);
            if let Some(draws) = &head.draws {
                batch.for_each_edge(&mut terms.factors, |key, query, factor| {
                    *factor = T::Acc::from_f64(draws.query(query).factor(key));
                });
            }
            terms.apply::<V>(&mut scores[..places], &mut grads[..places], scale_left, queries.scale);
            let (to_dk, to_dv) = if all {
                factors.clear();
                factors.resize(batch.strips.len(), [T::Acc::ONE; STRIP]);
                (Sums::Written { to: self.dk, factors }, Sums::Written { to: self.dv, factors })
            } else {
                (Sums::Added { to: dk, first: start }, Sums::Added { to: dv, first: start })
            };
            weighted_sums::<V, T>(scores, &head.q, batch, to_dk);
            weighted_sums::<V, T>(grads, &queries.grad_out, batch, to_dv);
        }
    }
}

impl<T: Element> Queries<'_, T> {
    /// List what a key needs of the queries `columns`.
    #[inline(always)]
    fn terms(&self, columns: &[u32], terms: &mut QueryTerms<T::Acc>) {
        let lists = terms.of_queries.each_mut().map(|list| &mut list[..columns.len()]);
        // Four at a time, which the compiler turns around in registers.
        let (groups, others) = columns.as_chunks::<GROUP>();
        for (group, queries) in groups.iter().enumerate() {
            let found = queries.map(|query| self.of_queries[query as usize]);
            for part in 0..lists.len() {
                let place = group * GROUP..(group + 1) * GROUP;
                lists[part][place].copy_from_slice(&found.map(|query| query[part]));
            }
        }
        for (edge, &query) in (columns.len() - others.len()..).zip(others) {
            for (part, &number) in self.of_queries[query as usize].iter().enumerate() {
                lists[part][edge] = number;
            }
        }
        if let Some(background) = self.background {
            for (edge, &query) in columns.iter().enumerate() {
                terms.background[edge] = background[query as usize];
            }
        }
    }

    #[inline(always)]
    fn factors(&self, row: usize, columns: &[u32], terms: &mut QueryTerms<T::Acc>) {
        if let Some(draws) = &self.tensors.draws {
            for (edge, &query) in columns.iter().enumerate() {
                terms.factors[edge] = T::Acc::from_f64(draws.query(query as usize).factor(row));
            }
        }
    }
}

impl<R: Real> QueryTerms<R> {
    /// Replace dots `scores` by `scale * P * (factor * grad - delta)` and `grads` by `P * factor - background`, with
    /// `P = exp(scale_left * dot - shift)`.
    #[inline(always)]
    unsafe fn apply<V: Vector<Lane = R>>(&self, scores: &mut [R], grads: &mut [R], scale_left: R, scale: R) {
        let len = scores.len();
        assert!(grads.len() == len && len <= NUMBERS && len.is_multiple_of(V::LANES));
        // SAFETY: whole registers, as asserted; every list has NUMBERS entries.
        unsafe {
            let (scale_left, scale) = (V::splat(scale_left), V::splat(scale));
            for i in (0..len).step_by(V::LANES) {
                let (score, grad) = (scores.as_mut_ptr().add(i), grads.as_mut_ptr().add(i));
                let factor = V::load(self.factors.as_ptr().add(i));
                let [most, rest, delta, left] =
                    self.of_queries.each_ref().map(|part| V::load(part.as_ptr().add(i)));
                let p = exp(V::load(score) * scale_left - most - rest);
                let grad_of_p = V::load(grad) * factor - delta - left;
                (p * grad_of_p * scale).store(score);
                (p * factor - V::load(self.background.as_ptr().add(i))).store(grad);
            }
        }
    }
}

/// Add what a key with many queries gathers from one head. The sums of row `r` are row `r - start` of the scratch.
#[inline(always)]
unsafe fn long_row<V, T>(
    queries: &Queries<T>,
    row: usize,
    cursor: &mut Cursor<T>,
    start: usize,
    scratch: &mut Scratch<T>,
) where
    T: Element,
    V: Vector<Lane = T::Acc> + Memory<T>,
{
    let head = queries.tensors;
    let (stride, value_stride) = (padded(head.k.width()), padded(head.v.width()));
    let Scratch { key, value, scores, grads, terms, dk, dv, .. } = scratch;
    let scale_left = if head.bias.is_some() { T::Acc::ONE } else { queries.scale };
    let slot = row - start;
    let dk = &mut dk[slot * stride..(slot + 1) * stride];
    let dv = &mut dv[slot * value_stride..(slot + 1) * value_stride];
    // SAFETY: the cursor names columns of this head only; scratch rows have padded lengths.
    unsafe {
        head.k.stage::<V>(row, key);
        head.v.stage::<V>(row, value);
        while let Some(columns) = cursor.piece() {
            let len = columns.len();
            let groups = len.next_multiple_of(LONG_GROUP);
            long_dots::<V, T>(key, &head.q, columns, &mut scores[..groups]);
            long_dots::<V, T>(value, &queries.grad_out, columns, &mut grads[..groups]);
            head.add_long_bias(queries.scale, row, true, columns, &mut scores[..len]);
            queries.terms(columns, terms);
            queries.factors(row, columns, terms);
            let (scores, grads) = (&mut scores[..padded(len)], &mut grads[..padded(len)]);
            terms.apply::<V>(scores, grads, scale_left, queries.scale);
            add_long_weighted::<V, T>(&scores[..len], &head.q, columns, dk);
            add_long_weighted::<V, T>(&grads[..len], &queries.grad_out, columns, dv);
        }
    }
}
