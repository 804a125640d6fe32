//! Keys that every query keeps, in tiles.

use std::ops::Range;

use super::{Queries, Scratch};
use crate::kernel::cpu::buffer::Buffer;
use crate::kernel::cpu::matrix::padded;
use crate::kernel::cpu::tile::{Block, TILE, multiply, pack, transpose};
use crate::kernel::element::{Element, Real};
use crate::kernel::simd::{Memory, Vector};

/// Panels of a tile; made when first needed.
pub(super) struct Tile<R> {
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

/// Add what keys that every query keeps gather from one head. The sums of row `r` are row `r - start` of the scratch.
#[inline(always)]
pub(super) unsafe fn tile<V, T>(
    queries: &Queries<T>,
    rows: Range<usize>,
    start: usize,
    scratch: &mut Scratch<T>,
) where
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
            queries.terms(&tile.columns, terms);
            for (slot, row) in rows.clone().enumerate() {
                queries.factors(row, &tile.columns, terms);
                let range = slot * TILE..slot * TILE + padded(count);
                let (scores, grads) = (&mut tile.scores[range.clone()], &mut tile.grads[range]);
                terms.apply::<V>(scores, grads, queries.scale, queries.scale);
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
