//! Queries that keep every key, in tiles.

use std::ops::Range;

use super::{Scratch, Task, differentiate_row, sum_rest, weigh};
use crate::kernel::cpu::backward::{Delta, mean_of_row, shift};
use crate::kernel::cpu::buffer::Buffer;
use crate::kernel::cpu::matrix::{CHAIN, Column, padded};
use crate::kernel::cpu::row::write_scaled;
use crate::kernel::cpu::tasks::Head;
use crate::kernel::cpu::tile::{Block, TILE, multiply, pack, transpose};
use crate::kernel::element::{Element, Real};
use crate::kernel::simd::{Memory, Vector};

/// Parts of a tile whose columns are kept at a time: from its sums over up to 512 keys a row gets its delta.
const MOST_PARTS: usize = 8;

/// Panels of a tile; made when first needed.
pub(super) struct Tile<R> {
    queries: Buffer<R>,
    grad_out: Buffer<R>,
    deltas: Vec<Delta<R>>,
    /// Up to [`TILE`] columns each: all of a row if there are few, else those at hand.
    parts: Vec<Part<R>>,
    values: Buffer<R>,
    /// Keys, then values, one column per key.
    transposed: Buffer<R>,
    sums: Buffer<R>,
}

/// Some columns of a tile.
struct Part<R> {
    columns: Vec<u32>,
    keys: Buffer<R>,
    /// P, then dS.
    weights: Buffer<R>,
    /// `dO . v`
    grads: Buffer<R>,
}

impl<R: Real> Tile<R> {
    fn new(dim: usize, value_dim: usize, parts: usize) -> Self {
        let panel = |width: usize| Buffer::zeros(TILE * padded(width));
        let part = || Part {
            columns: Vec::with_capacity(TILE),
            keys: panel(dim),
            weights: panel(TILE),
            grads: panel(TILE),
        };
        Tile {
            queries: panel(dim),
            grad_out: panel(value_dim),
            deltas: Vec::with_capacity(TILE),
            parts: std::iter::repeat_with(part).take(parts).collect(),
            values: panel(value_dim),
            transposed: panel(dim.max(value_dim)),
            sums: panel(dim),
        }
    }

    /// P and `dO . v` of the columns of part `index`.
    #[inline(always)]
    unsafe fn weigh<V, T>(
        &mut self,
        index: usize,
        head: &Head<T>,
        rows: Range<usize>,
        scale: R,
        lse: &Column<f64>,
    ) where
        T: Element<Acc = R>,
        V: Vector<Lane = R> + Memory<T>,
    {
        let Tile { queries, grad_out, parts, values, transposed, .. } = self;
        let Part { columns, keys, weights, grads } = &mut parts[index];
        let (dim, value_dim, count) = (head.q.width(), head.v.width(), columns.len());
        // SAFETY: the caller says that rows and columns are those of the head; panels hold TILE rows of padded length.
        unsafe {
            let products = [
                (&head.k, &mut *keys, &*queries, &mut *weights, dim),
                (&head.v, &mut *values, &*grad_out, &mut *grads, value_dim),
            ];
            for (matrix, panel, tile, to, width) in products {
                pack::<V, T>(matrix, columns.iter().map(|&column| column as usize), panel);
                transpose::<V>(panel, count, width, transposed);
                multiply::<V, false>(
                    Block { data: tile, stride: padded(width) },
                    Block { data: transposed, stride: TILE },
                    to,
                    TILE,
                    (rows.len(), count, width),
                );
            }
            for (slot, row) in rows.enumerate() {
                let place = slot * TILE..(slot + 1) * TILE;
                let (weights, grads) = (&mut weights[place.clone()], &mut grads[place]);
                head.drop_long_weights(row, columns, &mut grads[..count]);
                weigh::<V>(weights, count, scale, shift(lse.at(row)));
            }
        }
    }
}

impl<T: Element> Task<'_, T> {
    /// Up to [`TILE`] rows that keep every column. They have no background.
    #[inline(always)]
    pub(super) unsafe fn tile<V: Vector<Lane = T::Acc> + Memory<T>>(&mut self, rows: Range<usize>) {
        let head = self.tensors;
        let (dim, value_dim) = (head.q.width(), head.v.width());
        let (stride, value_stride) = (padded(dim), padded(value_dim));
        let (columns, allowed) = (self.edges.num_cols(), head.allowed());
        let sums_delta = columns <= MOST_PARTS * TILE;
        let Scratch { out, tile, .. } = &mut *self.scratch;
        let tile = tile.get_or_insert_with(|| {
            Tile::new(dim, value_dim, if sums_delta { columns.div_ceil(TILE) } else { 1 })
        });
        // SAFETY: rows and columns are those of this head; panels hold TILE rows of padded length.
        unsafe {
            pack::<V, T>(&head.q, rows.clone(), &mut tile.queries);
            pack::<V, T>(&self.grad_out, rows.clone(), &mut tile.grad_out);
            tile.deltas.clear();
            tile.deltas.resize(rows.len(), [T::Acc::ZERO; 2]);
            for (slot, row) in rows.clone().enumerate().filter(|_| !sums_delta) {
                self.out.stage::<V>(row, out);
                // In the order of `multiply`: where a query gives one key all the weight, `dO . O` is the `dO . v` of it.
                let grad_out = &tile.grad_out[slot * value_stride..slot * value_stride + value_dim];
                let mut delta = V::splat(T::Acc::ZERO);
                for (grad_out, out) in grad_out.chunks(CHAIN).zip(out.chunks(CHAIN)) {
                    let mut part = V::splat(T::Acc::ZERO);
                    for (&grad, &out) in grad_out.iter().zip(out) {
                        part = V::splat(grad).mul_add(V::splat(out), part);
                    }
                    delta = delta + part;
                }
                tile.deltas[slot][0] = delta.largest();
            }
            tile.sums.fill(T::Acc::ZERO);
            let mut next = 0;
            while next < columns {
                let mut used = 0;
                while used < tile.parts.len()
                    && allowed.take_keys(&mut next, columns, TILE, &mut tile.parts[used].columns)
                {
                    tile.weigh::<V, T>(used, &head, rows.clone(), self.scale, &self.lse);
                    used += 1;
                }
                for (slot, delta) in tile.deltas.iter_mut().enumerate().filter(|_| sums_delta) {
                    let place = slot * TILE..(slot + 1) * TILE;
                    for which in 0..delta.len() {
                        let mut sums = [T::Acc::ZERO; 2];
                        for part in &tile.parts[..used] {
                            let (weights, grads) = (&part.weights[place.clone()], &part.grads[place.clone()]);
                            let [sum, total] = sum_rest::<V>(weights, grads, part.columns.len(), delta[0]);
                            sums = [sums[0] + sum, sums[1] + total];
                        }
                        delta[which] = mean_of_row(sums);
                    }
                }
                for part in &mut tile.parts[..used] {
                    let count = part.columns.len();
                    for slot in 0..rows.len() {
                        let place = slot * TILE..(slot + 1) * TILE;
                        let (weights, grads) = (&mut part.weights[place.clone()], &part.grads[place]);
                        differentiate_row::<V>(weights, grads, count, tile.deltas[slot], self.scale);
                    }
                    multiply::<V, true>(
                        Block { data: &part.weights, stride: TILE },
                        Block { data: &part.keys, stride },
                        &mut tile.sums,
                        stride,
                        (rows.len(), dim, count),
                    );
                }
            }
            for (slot, row) in rows.enumerate() {
                let ([most, rest], [delta, left]) = (shift(self.lse.at(row)), tile.deltas[slot]);
                self.of_queries.row_mut(self.first_row + row)[0] = [most, rest, delta, left];
                if let Some(background) = self.background {
                    background.row_mut(self.first_row + row)[0] = T::Acc::ZERO;
                }
                let sum = &tile.sums[slot * stride..(slot + 1) * stride];
                write_scaled::<V, T>(sum, T::Acc::ONE, self.dq.row_mut(row));
            }
        }
    }
}
