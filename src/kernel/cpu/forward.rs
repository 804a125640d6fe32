//! Outputs and their log-sum-exps, by query.

use std::ops::Range;

use super::background::Background;
use super::batch::{Batch, Cursor, Lists, Next, PIECE, PLACES, ROWS, STRIP};
use super::buffer::Buffer;
use super::gather::{Sums, dots, weighted_sums};
use super::long::{LONG_GROUP, add_long_weighted, long_dots};
use super::matrix::{pack_rows, padded};
use super::row::{add_scaled, scale, write_scaled};
use super::tasks::{Call, Head, runs_of_rows};
use super::tile::{Block, TILE, multiply, pack, transpose};
use super::{lines, panel, widened};
use crate::error::Result;
use crate::kernel::element::{Element, Real};
use crate::kernel::simd::{Kernel, Memory, Vector};
use crate::kernel::softmax::{Beside, Running};
use crate::kernel::view::{Output, RowsMut, ViewMut4};
use crate::kernel::{Attention, Run};
use crate::pattern::edges::EdgeSet;

/// [`Attention::forward`].
pub(in crate::kernel) fn forward<T: Element>(
    problem: &Attention<T>,
    out: ViewMut4<T>,
    lse: &mut [f64],
    run: &Run,
) -> Result<()> {
    let sizes = problem.check()?;
    sizes.check_out("out", out.shape())?;
    if widened::is_needed(problem) {
        return widened::forward(problem, out, lse, run);
    }
    let mut copies = Default::default();
    let problem = &pack_rows(problem, &mut copies);
    let call = Call::new(problem)?;
    let lse = Output::new("lse", lse, &[sizes.batch, sizes.heads, sizes.queries, 1])?;
    panel::forward(&call, &out, &lse, run)?;
    lines::forward(&call, &out, &lse, run)?;
    if call.all_regular() {
        return Ok(());
    }
    let (tasks, pool) = call.tasks(sizes.heads, sizes.queries, 2, run);
    let background = call.has_background().then(|| Background::of_values(&call, run)).transpose()?;
    let isa = run.isa;
    pool.run(
        tasks.len(sizes.batch),
        || Scratch::new(&call),
        |scratch, index| {
            let (batch, head, rows) = tasks.get(index);
            if call.is_regular(batch, head) {
                return;
            }
            let task = Task {
                edges: call.problem.plan.head(batch, head, sizes.heads).by_query(),
                tensors: call.head(batch, head),
                scale: call.scale,
                first_row: (batch * sizes.heads + head) * sizes.queries,
                background: background.as_ref().map(|all| all.of_head(batch, head / sizes.group())),
                rows,
                out: out.head(batch, head),
                lse: &lse,
                scratch,
            };
            // SAFETY: every index is one task, and tasks do not share rows.
            unsafe { isa.run::<T>(task) };
        },
        run.interrupt,
    )
}

/// Some rows of one head.
struct Task<'a, T: Element> {
    edges: &'a EdgeSet,
    tensors: Head<'a, T>,
    scale: T::Acc,
    /// Where the head's first row lies in `lse`.
    first_row: usize,
    /// The sum of all allowed values.
    background: Option<&'a [T::Acc]>,
    rows: Range<usize>,
    out: RowsMut<'a, T>,
    lse: &'a Output<'a, f64>,
    scratch: &'a mut Scratch<T>,
}

/// What a thread keeps from task to task.
struct Scratch<T: Element> {
    lists: Lists,
    batch: Batch,
    /// Per strip of the batch: what the sums of its rows are multiplied by.
    factors: Vec<[T::Acc; STRIP]>,
    /// Per strip of the batch: what a key of the background weighs.
    background_weights: Vec<[T::Acc; STRIP]>,
    /// Dots, then weights, of a batch or of a piece of a long row.
    weights: Buffer<T::Acc>,
    /// The long row of q.
    query: Buffer<T::Acc>,
    /// Rows of the output.
    sums: Buffer<T::Acc>,
    tile: Option<Tile<T::Acc>>,
}

/// Panels of a tile; made when first needed.
struct Tile<R> {
    columns: Vec<u32>,
    running: Vec<Running<R>>,
    queries: Buffer<R>,
    keys: Buffer<R>,
    keys_transposed: Buffer<R>,
    values: Buffer<R>,
    weights: Buffer<R>,
    sums: Buffer<R>,
}

impl<T: Element> Scratch<T> {
    fn new(call: &Call<T>) -> Self {
        Scratch {
            lists: Lists::default(),
            batch: Batch::default(),
            factors: Vec::new(),
            background_weights: Vec::new(),
            weights: Buffer::zeros(PLACES.max(PIECE)),
            query: Buffer::zeros(padded(call.sizes.dim)),
            sums: Buffer::zeros(ROWS * padded(call.sizes.value_dim)),
            tile: None,
        }
    }
}

impl<R: Real> Tile<R> {
    fn new(dim: usize, value_dim: usize) -> Self {
        let panel = |width: usize| Buffer::zeros(TILE * padded(width));
        Tile {
            columns: Vec::with_capacity(TILE),
            running: Vec::with_capacity(TILE),
            queries: panel(dim),
            keys: panel(dim),
            keys_transposed: panel(dim),
            values: panel(value_dim),
            weights: panel(TILE),
            sums: panel(value_dim),
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
        let allowed = self.tensors.allowed_values(false);
        let mut lists = std::mem::take(&mut self.scratch.lists);
        let mut cursor = Cursor::new(self.edges, rows, allowed, &mut lists);
        // SAFETY: the caller's promise; the cursor names rows of this head only.
        unsafe {
            while let Some(next) = cursor.next(&mut self.scratch.batch) {
                match next {
                    Next::Batch => self.batch::<V>(),
                    Next::LongRow { row, .. } => self.long_row::<V>(row, &mut cursor),
                }
            }
        }
        self.scratch.lists = lists;
    }

    /// The rows of the batch in the scratch.
    #[inline(always)]
    unsafe fn batch<V: Vector<Lane = T::Acc> + Memory<T>>(&mut self) {
        let head = self.tensors;
        let Scratch { batch, factors, background_weights, weights, sums, .. } = &mut *self.scratch;
        // A bias is added to scores that are already scaled.
        let scale_left = if head.bias.is_some() { T::Acc::ONE } else { self.scale };
        // SAFETY: the batch names rows and columns of this head only; weights and sums have room for any batch.
        unsafe {
            dots::<V, T>(&head.q, &head.k, batch, weights);
            head.add_bias(self.scale, false, batch, weights);
            factors.clear();
            background_weights.clear();
            for strip in &batch.strips {
                let background = head.background_keys_of(self.edges, strip);
                let data = weights.as_mut_ptr().add(strip.start);
                let rows = Beside::weigh::<V>(data, strip.blocks, strip.lens, scale_left, background);
                for slot in 0..strip.rows {
                    self.lse.row_mut(self.first_row + strip.row + slot)[0] = rows.lse[slot];
                }
                factors.push(rows.factors);
                background_weights.push(rows.background_weights);
            }
            head.drop_weights(batch, weights);
            let Some(values) = self.background else {
                let to = Sums::Written { to: self.out, factors };
                weighted_sums::<V, T>(weights, &head.v, batch, to);
                return;
            };
            let (first, stride) = (batch.strips[0].row, padded(head.v.width()));
            sums.fill(T::Acc::ZERO);
            weighted_sums::<V, T>(weights, &head.v, batch, Sums::Added { to: sums, first });
            for (index, strip) in batch.strips.iter().enumerate() {
                for slot in 0..strip.rows {
                    let row = strip.row + slot;
                    let sum = &mut sums[(row - first) * stride..(row - first + 1) * stride];
                    add_scaled::<V>(values, background_weights[index][slot], sum);
                    write_scaled::<V, T>(sum, factors[index][slot], self.out.row_mut(row));
                }
            }
        }
    }

    /// A row with many columns.
    #[inline(always)]
    unsafe fn long_row<V: Vector<Lane = T::Acc> + Memory<T>>(&mut self, row: usize, cursor: &mut Cursor<T>) {
        let head = self.tensors;
        let Scratch { weights, query, sums, .. } = &mut *self.scratch;
        let sum = &mut sums[..padded(head.v.width())];
        let scale_left = if head.bias.is_some() { T::Acc::ONE } else { self.scale };
        let mut running = Running::new(head.background_keys(self.edges, row));
        // SAFETY: the cursor names columns of this head only; scratch rows have padded lengths.
        unsafe {
            head.q.stage::<V>(row, query);
            sum.fill(T::Acc::ZERO);
            while let Some(columns) = cursor.piece() {
                let len = columns.len();
                let dots = &mut weights[..len.next_multiple_of(LONG_GROUP)];
                long_dots::<V, T>(query, &head.k, columns, dots);
                head.add_long_bias(self.scale, row, false, columns, &mut weights[..len]);
                let correction = running.absorb::<V>(&mut weights[..padded(len)], len, scale_left);
                scale::<V>(sum, correction);
                head.drop_long_weights(row, columns, &mut weights[..len]);
                add_long_weighted::<V, T>(&weights[..len], &head.v, columns, sum);
            }
            if let Some(values) = self.background {
                add_scaled::<V>(values, running.background_weight(), sum);
            }
            let (factor, lse) = running.finish();
            write_scaled::<V, T>(sum, factor, self.out.row_mut(row));
            self.lse.row_mut(self.first_row + row)[0] = lse;
        }
    }

    /// Up to [`TILE`] rows that keep every column.
    #[inline(always)]
    unsafe fn tile<V: Vector<Lane = T::Acc> + Memory<T>>(&mut self, rows: Range<usize>) {
        let head = self.tensors;
        let (dim, value_dim) = (head.q.width(), head.v.width());
        let tile = self.scratch.tile.get_or_insert_with(|| Tile::new(dim, value_dim));
        let (stride, value_stride) = (padded(dim), padded(value_dim));
        let allowed = head.allowed();
        // SAFETY: rows and columns are those of this head; panels hold TILE rows of padded length.
        unsafe {
            pack::<V, T>(&head.q, rows.clone(), &mut tile.queries);
            tile.sums.fill(T::Acc::ZERO);
            tile.running.clear();
            tile.running.resize(rows.len(), Running::new(0));
            let mut next = 0;
            while allowed.take_keys(&mut next, self.edges.num_cols(), TILE, &mut tile.columns) {
                let count = tile.columns.len();
                pack::<V, T>(&head.k, tile.columns.iter().map(|&column| column as usize), &mut tile.keys);
                pack::<V, T>(&head.v, tile.columns.iter().map(|&column| column as usize), &mut tile.values);
                transpose::<V>(&tile.keys, count, dim, &mut tile.keys_transposed);
                multiply::<V, false>(
                    Block { data: &tile.queries, stride },
                    Block { data: &tile.keys_transposed, stride: TILE },
                    &mut tile.weights,
                    TILE,
                    (rows.len(), count, dim),
                );
                for (slot, row) in rows.clone().enumerate() {
                    let weights = &mut tile.weights[slot * TILE..(slot + 1) * TILE];
                    let correction = tile.running[slot].absorb::<V>(weights, count, self.scale);
                    if correction != T::Acc::ONE {
                        scale::<V>(
                            &mut tile.sums[slot * value_stride..(slot + 1) * value_stride],
                            correction,
                        );
                    }
                    head.drop_long_weights(row, &tile.columns, &mut weights[..count]);
                }
                multiply::<V, true>(
                    Block { data: &tile.weights, stride: TILE },
                    Block { data: &tile.values, stride: value_stride },
                    &mut tile.sums,
                    value_stride,
                    (rows.len(), value_dim, count),
                );
            }
            for (slot, row) in rows.enumerate() {
                let (factor, lse) = tile.running[slot].finish();
                let sum = &tile.sums[slot * value_stride..(slot + 1) * value_stride];
                write_scaled::<V, T>(sum, factor, self.out.row_mut(row));
                self.lse.row_mut(self.first_row + row)[0] = lse;
            }
        }
    }
}
