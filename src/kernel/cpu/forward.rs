//! Outputs and their log-sum-exps, by query.

use std::ops::Range;

use super::background::Background;
use super::batch::{Batch, Cursor, EDGES, Lists};
use super::buffer::Buffer;
use super::gather::{GROUP, add_scaled, add_weighted, dots, scale, write_scaled};
use super::matrix::padded;
use super::panel;
use super::tasks::{Call, Head, runs_of_rows};
use super::tile::{Block, TILE, WORTH_PACKING, multiply, pack, transpose};
use crate::error::Result;
use crate::kernel::element::{Element, Real};
use crate::kernel::simd::{Kernel, Memory, Vector};
use crate::kernel::softmax::Running;
use crate::kernel::view::Output;
use crate::kernel::{Attention, Run};
use crate::pattern::edges::EdgeSet;

/// [`Attention::forward`].
pub(in crate::kernel) fn forward<T: Element>(
    problem: &Attention<T>,
    out: &mut [T],
    lse: &mut [T::Acc],
    run: &Run,
) -> Result<()> {
    let call = Call::new(problem)?;
    let sizes = call.sizes;
    let out = Output::new("out", out, &[sizes.batch, sizes.heads, sizes.queries, sizes.value_dim])?;
    let lse = Output::new("lse", lse, &[sizes.batch, sizes.heads, sizes.queries, 1])?;
    panel::forward(&call, &out, &lse, run)?;
    if call.panels.take_all() {
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
            if call.panels.take(batch, head) {
                return;
            }
            let task = Task {
                edges: call.problem.plan.head(batch, head, sizes.heads).by_query(),
                tensors: call.head(batch, head),
                scale: call.scale,
                first_row: (batch * sizes.heads + head) * sizes.queries,
                background: background.as_ref().map(|all| all.of_head(batch, head / sizes.group())),
                rows,
                out: &out,
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
    /// Where the head's first row lies in the outputs.
    first_row: usize,
    /// The sum of all allowed values.
    background: Option<&'a [T::Acc]>,
    rows: Range<usize>,
    out: &'a Output<'a, T>,
    lse: &'a Output<'a, T::Acc>,
    scratch: &'a mut Scratch<T>,
}

/// What a thread keeps from task to task.
struct Scratch<T: Element> {
    lists: Lists,
    batch: Batch,
    copies: Vec<T>,
    running: Vec<Running<T::Acc>>,
    /// One row of q.
    query: Buffer<T::Acc>,
    /// Dots, then weights, of a batch.
    weights: Buffer<T::Acc>,
    /// One row of the output.
    sum: Buffer<T::Acc>,
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
            copies: Vec::new(),
            running: Vec::new(),
            query: Buffer::zeros(padded(call.sizes.dim)),
            weights: Buffer::zeros(EDGES),
            sum: Buffer::zeros(padded(call.sizes.value_dim)),
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
        let head = self.tensors;
        let Scratch { lists, batch, copies, running, query, weights, sum, .. } = &mut *self.scratch;
        let mut cursor = Cursor::new(self.edges, rows, head.allowed_values(false), lists);
        // A bias is added to scores that are already scaled.
        let scale_left = if head.bias.is_some() { T::Acc::ONE } else { self.scale };
        // SAFETY: the cursor names rows and columns of this head only; scratch rows have padded lengths.
        unsafe {
            while cursor.next(batch) {
                for piece in &batch.pieces {
                    head.q.stage::<V>(piece.row, query);
                    let groups = piece.start..piece.start + piece.len.next_multiple_of(GROUP);
                    dots::<V, T>(
                        query,
                        &head.k,
                        &batch.columns[groups.clone()],
                        &mut weights[groups],
                        copies,
                    );
                    let edges = piece.edges();
                    head.add_bias(
                        self.scale,
                        piece.row,
                        false,
                        &batch.columns[edges.clone()],
                        &mut weights[edges],
                    );
                }
                for (slot, piece) in batch.pieces.iter().enumerate() {
                    if piece.first {
                        running.truncate(slot);
                        running.push(Running::new(head.background_keys(self.edges, piece.row)));
                    }
                    let row = &mut weights[piece.padded_edges()];
                    let correction = running[slot].absorb::<V>(row, piece.len, scale_left);
                    if !piece.first {
                        scale::<V>(sum, correction);
                    }
                    head.drop_weights(piece.row, &batch.columns[piece.edges()], &mut weights[piece.edges()]);
                }
                for (slot, piece) in batch.pieces.iter().enumerate() {
                    if piece.first {
                        sum.fill(T::Acc::ZERO);
                    }
                    let edges = piece.edges();
                    add_weighted::<V, T>(
                        &weights[edges.clone()],
                        &head.v,
                        &batch.columns[edges],
                        sum,
                        copies,
                    );
                    if piece.last {
                        if let Some(values) = self.background {
                            add_scaled::<V>(values, running[slot].background_weight(), sum);
                        }
                        let (factor, lse) = running[slot].finish();
                        write_scaled::<V, T>(sum, factor, self.out.row_mut(self.first_row + piece.row));
                        self.lse.row_mut(self.first_row + piece.row)[0] = lse;
                    }
                }
            }
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
                    head.drop_weights(row, &tile.columns, &mut weights[..count]);
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
                write_scaled::<V, T>(sum, factor, self.out.row_mut(self.first_row + row));
                self.lse.row_mut(self.first_row + row)[0] = lse;
            }
        }
    }
}
