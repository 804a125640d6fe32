//! Outputs and their log-sum-exps.

use std::ops::Range;

use super::micro::{SQUARE, Scores, SumOfKeys};
use super::packed::{Keys, Order, Panels, add_wild, set_bits};
use super::{GROUP, WORTH_A_THREAD, slots};
use crate::error::Result;
use crate::kernel::Run;
use crate::kernel::cpu::buffer::Buffer;
use crate::kernel::cpu::matrix::padded;
use crate::kernel::cpu::row::{scale, write_scaled};
use crate::kernel::cpu::tasks::{Call, Head};
use crate::kernel::element::{Element, Real};
use crate::kernel::simd::{Kernel, Memory, Vector};
use crate::kernel::softmax::{exp_or_zero, exp2, log_sum_exp};
use crate::kernel::view::{Output, RowsMut, ViewMut4};
use crate::pattern::edges::EdgeSet;
use crate::plan::panels::{PANEL, Square, Squares};

/// Queries per task.
const ROWS: usize = 8 * PANEL;

/// Write `out` and `lse` of the heads in `call.panels`.
pub(in crate::kernel::cpu) fn forward<T: Element>(
    call: &Call<T>,
    out: &ViewMut4<T>,
    lse: &Output<f64>,
    run: &Run,
) -> Result<()> {
    let (sizes, units) = (call.sizes, call.panels.units());
    let per_head = sizes.queries.div_ceil(ROWS);
    let per_unit = per_head * sizes.group();
    let plan = call.problem.plan;
    let pairs = |&unit: &usize| {
        let head = unit % sizes.kv_heads * sizes.group();
        plan.head(unit / sizes.kv_heads, head, sizes.heads).in_panels().pairs * sizes.group()
    };
    let isa = run.isa;
    let slots = slots(call, padded(sizes.dim) + padded(sizes.value_dim));
    let work = units.iter().map(pairs).sum::<usize>() * (sizes.dim + sizes.value_dim);
    run.pool.at_most(work / WORTH_A_THREAD + 1).run(
        units.len() * per_unit,
        || Scratch::new(call, slots),
        |scratch, index| {
            let unit = units[index / per_unit];
            let batch = unit / sizes.kv_heads;
            let head = unit % sizes.kv_heads * sizes.group() + index % per_unit / per_head;
            let start = index % per_head * ROWS;
            let task = Task {
                edges: plan.head(batch, head, sizes.heads).by_query(),
                tensors: call.head(batch, head),
                unit,
                scale: call.scale,
                first_row: (batch * sizes.heads + head) * sizes.queries,
                rows: start..sizes.queries.min(start + ROWS),
                out: out.head(batch, head),
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
    edges: &'a EdgeSet,
    tensors: Head<'a, T>,
    /// Number of the head of k and v.
    unit: usize,
    /// Of the scores, in base 2.
    scale: T::Acc,
    /// Where the head's first query lies in the outputs.
    first_row: usize,
    rows: Range<usize>,
    out: RowsMut<'a, T>,
    lse: &'a Output<'a, f64>,
    scratch: &'a mut Scratch<T::Acc>,
}

/// What a thread keeps from task to task.
struct Scratch<R> {
    squares: Vec<Square>,
    slots: Vec<usize>,
    keys: Keys<R>,
    /// A tile of queries.
    queries: Panels<R>,
    /// Scores, then weights, of a tile's squares.
    weights: Buffer<R>,
    /// Per query of the task: the largest score, the sum of weights, the weighted sum of values.
    largest: Buffer<R>,
    totals: Buffer<R>,
    sums: Buffer<R>,
    /// One value.
    value: Buffer<R>,
}

impl<R: Real> Scratch<R> {
    fn new<T: Element<Acc = R>>(call: &Call<T>, slots: usize) -> Self {
        let (dim, value_dim) = (call.sizes.dim, call.sizes.value_dim);
        Scratch {
            squares: Vec::new(),
            slots: Vec::new(),
            keys: Keys::new(
                Panels::new(dim, slots, Order::Columns),
                Panels::new(value_dim, slots, Order::Rows),
            ),
            queries: Panels::new(dim, 1, Order::Columns),
            weights: Buffer::unset(GROUP * SQUARE),
            largest: Buffer::unset(ROWS),
            totals: Buffer::unset(ROWS),
            sums: Buffer::unset(ROWS * padded(value_dim)),
            value: Buffer::unset(padded(value_dim)),
        }
    }
}

impl<T: Element> Kernel<T> for Task<'_, T> {
    #[inline(always)]
    unsafe fn run<V: Vector<Lane = T::Acc> + Memory<T>>(mut self) {
        let mut tiles = Squares::new(self.edges, self.rows.clone());
        let rows = self.rows.clone();
        self.scratch.largest.fill(T::Acc::NEG_INFINITY);
        self.scratch.totals.fill(T::Acc::ZERO);
        self.scratch.sums.fill(T::Acc::ZERO);
        let all = 0..self.edges.num_cols().div_ceil(PANEL);
        for panels in tiles.chunks(all, self.scratch.keys.len()) {
            for start in rows.clone().step_by(PANEL) {
                let mut squares = std::mem::take(&mut self.scratch.squares);
                tiles.of_tile(start, &panels, &mut squares);
                // SAFETY: the caller's promise.
                unsafe { self.tile::<V>(start, &squares) };
                self.scratch.squares = squares;
            }
        }
        let width = self.scratch.keys.v.width;
        for (place, row) in rows.enumerate() {
            let scratch = &self.scratch;
            let total = scratch.totals[place];
            let (factor, lse) = if total == T::Acc::ZERO {
                (T::Acc::ZERO, f64::NEG_INFINITY)
            } else {
                (T::Acc::ONE / total, log_sum_exp(scratch.largest[place], total))
            };
            let sum = &scratch.sums[place * width..(place + 1) * width];
            // SAFETY: the row belongs to this task.
            unsafe {
                write_scaled::<V, T>(sum, factor, self.out.row_mut(row));
                self.lse.row_mut(self.first_row + row)[0] = lse;
            }
        }
    }
}

impl<T: Element> Task<'_, T> {
    /// Take some of the keys of the tile that begins with query `start` into its softmax.
    #[inline(always)]
    unsafe fn tile<V: Vector<Lane = T::Acc> + Memory<T>>(&mut self, start: usize, squares: &[Square]) {
        if squares.is_empty() {
            return;
        }
        let head = self.tensors;
        let count = PANEL.min(self.rows.end - start);
        let place = start - self.rows.start;
        let Scratch { slots, keys, queries, weights, largest, totals, sums, value, .. } = &mut *self.scratch;
        let width = keys.v.width;
        let sums = &mut sums[place * width..(place + PANEL) * width];
        // SAFETY: the queries exist; the rest is the caller's promise.
        unsafe {
            queries.pack::<V, T>(0, &head.q, start, u16::MAX >> (PANEL - count));
            queries.scale::<V>(self.scale, T::Acc::ONE);
            for squares in squares.chunks(GROUP.min(keys.len())) {
                keys.find::<V, T>(&head, self.unit, squares, slots);
                V::outline::<T::Acc>(Scores {
                    tile: &queries.columns,
                    panels: &keys.k.columns,
                    width: keys.k.width,
                    dim: head.q.width(),
                    squares,
                    slots,
                    scores: weights,
                });
                for query in 0..count {
                    let softmax = Softmax { squares, slots, allowed: &keys.allowed, query };
                    let largest = &mut largest[place + query];
                    let (correction, total) = softmax.absorb::<V>(largest, weights);
                    totals[place + query] = totals[place + query] * correction + total;
                    if correction != T::Acc::ONE {
                        scale::<V>(&mut sums[query * width..(query + 1) * width], correction);
                    }
                }
                V::outline::<T::Acc>(SumOfKeys {
                    weights,
                    panels: &keys.v.rows,
                    width,
                    squares,
                    slots,
                    out: sums,
                });
                for (index, (square, &slot)) in squares.iter().zip(&*slots).enumerate() {
                    for key in set_bits(keys.v.wild[slot]) {
                        head.v.stage::<V>(square.panel * PANEL + key, value);
                        for query in (0..count).filter(|&query| square.bits[query] >> key & 1 != 0) {
                            let weight = weights[index * SQUARE + query * PANEL + key];
                            add_wild::<V>(value, weight, &mut sums[query * width..(query + 1) * width]);
                        }
                    }
                }
            }
        }
    }
}

/// One query's row of scores.
struct Softmax<'a> {
    squares: &'a [Square],
    slots: &'a [usize],
    allowed: &'a [u16],
    query: usize,
}

impl Softmax<'_> {
    /// Replace scores by weights `2^(score - largest)`, zero where a key is not kept, after `largest` grew to the largest of them.
    /// Gives what earlier weights have to be multiplied by, and the sum of the new ones.
    #[inline(always)]
    unsafe fn absorb<V: Vector>(&self, largest: &mut V::Lane, scores: &mut [V::Lane]) -> (V::Lane, V::Lane) {
        assert!(scores.len() >= self.squares.len() * SQUARE && self.query < PANEL);
        let row = |index: usize| index * SQUARE + self.query * PANEL;
        let half = self.query / (PANEL / 2);
        // SAFETY: every square has its scores.
        unsafe {
            let data = scores.as_mut_ptr();
            let nothing = V::splat(V::Lane::NEG_INFINITY);
            let mut most = nothing;
            for (index, (square, &slot)) in self.squares.iter().zip(self.slots).enumerate() {
                if !square.halves[half] {
                    continue;
                }
                let bits = u32::from(square.bits[self.query] & self.allowed[slot]);
                for lane in (0..PANEL).step_by(V::LANES) {
                    let place = data.add(row(index) + lane);
                    let mut score = V::load(place);
                    if bits != u32::from(u16::MAX) {
                        score = score.keep(bits >> lane, nothing);
                        score.store(place);
                    }
                    most = most.max(score);
                }
            }
            let (before, most) = (*largest, most.largest());
            // A NaN may hide from the maximum but not from the sum.
            if most > before {
                *largest = most;
            }
            let shift = V::splat(if *largest == V::Lane::NEG_INFINITY { V::Lane::ZERO } else { *largest });
            let log2_e = V::splat(V::Lane::from_f64(std::f64::consts::LOG2_E));
            let mut total = V::splat(V::Lane::ZERO);
            for (index, square) in self.squares.iter().enumerate() {
                if !square.halves[half] {
                    continue;
                }
                for lane in (0..PANEL).step_by(V::LANES) {
                    let place = data.add(row(index) + lane);
                    let weight = exp2((V::load(place) - shift) * log2_e);
                    total = total + weight;
                    weight.store(place);
                }
            }
            let correction = if *largest == before { V::Lane::ONE } else { exp_or_zero(before - *largest) };
            (correction, total.sum())
        }
    }
}
