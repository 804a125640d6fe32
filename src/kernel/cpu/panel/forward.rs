//! Outputs and their log-sum-exps.

use std::ops::Range;

use super::micro::SQUARE;
use super::packed::{Keys, Packed, add_wild, set_bits};
use super::products::{Products, Tile, Widened};
use super::{GROUP, WORTH_A_THREAD, slots};
use crate::error::Result;
use crate::kernel::Run;
use crate::kernel::cpu::buffer::Buffer;
use crate::kernel::cpu::matrix::padded;
use crate::kernel::cpu::row::{self, write_scaled};
use crate::kernel::cpu::tasks::{Call, Head};
use crate::kernel::element::{Element, Real};
use crate::kernel::shape::Sizes;
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
    #[cfg(target_arch = "x86_64")]
    if let Some(pairs) = run.isa.pairs() {
        let sizes = call.sizes;
        // The largest score is that of the largest product only where the scale is positive.
        if T::IS_BF16 && call.scale > T::Acc::ZERO && sizes.dim > 0 && sizes.value_dim > 0 {
            return forward_with(pairs, call, out, lse, run);
        }
    }
    forward_with(Widened, call, out, lse, run)
}

fn forward_with<T: Element, P: Products<T>>(
    products: P,
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
    let slots = slots(call, P::bytes_per_key(sizes.dim, sizes.value_dim));
    let work = units.iter().map(pairs).sum::<usize>() * (sizes.dim + sizes.value_dim);
    run.pool.at_most(work / WORTH_A_THREAD + 1).run(
        units.len() * per_unit,
        || Scratch::<T, P>::new(&sizes, slots),
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
                products,
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
struct Task<'a, T: Element, P: Products<T>> {
    edges: &'a EdgeSet,
    tensors: Head<'a, T>,
    /// Number of the head of k and v.
    unit: usize,
    /// Of the scores.
    scale: T::Acc,
    products: P,
    /// Where the head's first query lies in the outputs.
    first_row: usize,
    rows: Range<usize>,
    out: RowsMut<'a, T>,
    lse: &'a Output<'a, f64>,
    scratch: &'a mut Scratch<T, P>,
}

/// What a thread keeps from task to task.
struct Scratch<T: Element, P: Products<T>> {
    squares: Vec<Square>,
    slots: Vec<usize>,
    keys: Keys<P::Panels>,
    /// A tile of queries.
    queries: P::Panels,
    room: P::Room,
    /// Scores, then weights, of a tile's squares.
    weights: Buffer<T::Acc>,
    /// Per query of the task: the largest score, the sum of weights, the weighted sum of values.
    largest: Buffer<T::Acc>,
    totals: Buffer<T::Acc>,
    sums: Buffer<T::Acc>,
    /// One value.
    value: Buffer<T::Acc>,
}

impl<T: Element, P: Products<T>> Scratch<T, P> {
    fn new(sizes: &Sizes, slots: usize) -> Self {
        let (dim, value_dim) = (sizes.dim, sizes.value_dim);
        Scratch {
            squares: Vec::new(),
            slots: Vec::new(),
            keys: Keys::new(P::keys(dim, slots), P::values(value_dim, slots), slots),
            queries: P::queries(dim),
            room: P::room(GROUP),
            weights: Buffer::unset(GROUP * SQUARE),
            largest: Buffer::unset(ROWS),
            totals: Buffer::unset(ROWS),
            sums: Buffer::unset(ROWS * padded(value_dim)),
            value: Buffer::unset(padded(value_dim)),
        }
    }
}

impl<T: Element, P: Products<T>> Kernel<T> for Task<'_, T, P> {
    #[inline(always)]
    unsafe fn run<V: Vector<Lane = T::Acc> + Memory<T>>(mut self) {
        let mut tiles = Squares::new(self.edges, self.rows.clone());
        let rows = self.rows.clone();
        self.scratch.largest.fill(T::Acc::NEG_INFINITY);
        self.scratch.totals.fill(T::Acc::ZERO);
        self.scratch.sums.fill(T::Acc::ZERO);
        let all = 0..self.edges.num_cols().div_ceil(PANEL);
        // SAFETY: whoever chose these products found that the machine has them.
        unsafe { self.products.begin() };
        for panels in tiles.chunks(all, self.scratch.keys.len()) {
            for start in rows.clone().step_by(PANEL) {
                let mut squares = std::mem::take(&mut self.scratch.squares);
                tiles.of_tile(start, &panels, &mut squares);
                // SAFETY: the caller's promise.
                unsafe { self.tile::<V>(start, &squares) };
                self.scratch.squares = squares;
            }
        }
        // SAFETY: it has begun.
        unsafe { self.products.finish() };
        let width = self.width();
        let scale = P::left_of_scale(self.scale);
        for (place, row) in rows.enumerate() {
            let scratch = &self.scratch;
            let total = scratch.totals[place];
            let (factor, lse) = if total == T::Acc::ZERO {
                (T::Acc::ZERO, f64::NEG_INFINITY)
            } else {
                (T::Acc::ONE / total, log_sum_exp(scratch.largest[place] * scale, total))
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

impl<T: Element, P: Products<T>> Task<'_, T, P> {
    /// Numbers per row of sums.
    fn width(&self) -> usize {
        padded(self.tensors.v.width())
    }

    /// Take some of the keys of the tile that begins with query `start` into its softmax.
    #[inline(always)]
    unsafe fn tile<V: Vector<Lane = T::Acc> + Memory<T>>(&mut self, start: usize, squares: &[Square]) {
        if squares.is_empty() {
            return;
        }
        let head = self.tensors;
        let count = PANEL.min(self.rows.end - start);
        let place = start - self.rows.start;
        let (width, scale, products) = (self.width(), P::left_of_scale(self.scale), self.products);
        let Scratch { slots, keys, queries, room, weights, largest, totals, sums, value, .. } =
            &mut *self.scratch;
        let sums = &mut sums[place * width..(place + PANEL) * width];
        // SAFETY: the queries exist; the rest is the caller's promise.
        unsafe {
            P::pack_queries::<V>(queries, &head.q, start, u16::MAX >> (PANEL - count), self.scale);
            for squares in squares.chunks(GROUP.min(keys.len())) {
                keys.find::<V, T>(&head, self.unit, squares, slots);
                let tile =
                    Tile { queries, keys: &keys.k, values: &keys.v, dim: head.q.width(), squares, slots };
                products.scores::<V>(room, &tile, weights);
                for query in 0..count {
                    let softmax = Softmax { squares, slots, allowed: &keys.allowed, query, scale };
                    let largest = &mut largest[place + query];
                    let (correction, total) = softmax.absorb::<V>(largest, weights);
                    totals[place + query] = totals[place + query] * correction + total;
                    if correction != T::Acc::ONE {
                        row::scale::<V>(&mut sums[query * width..(query + 1) * width], correction);
                    }
                }
                products.add_sums::<V>(room, &tile, weights, sums);
                for (index, (square, &slot)) in squares.iter().zip(&*slots).enumerate() {
                    for key in keys.v.wild().get(slot).into_iter().flat_map(|&wild| set_bits(wild)) {
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
struct Softmax<'a, R> {
    squares: &'a [Square],
    slots: &'a [usize],
    allowed: &'a [u16],
    query: usize,
    /// Positive: what scores have yet to be multiplied by.
    scale: R,
}

impl<R: Real> Softmax<'_, R> {
    /// Replace scores by weights `exp(scale (score - largest))`, zero where a key is not kept, after `largest` grew to the largest of them.
    /// Gives what earlier weights have to be multiplied by, and the sum of the new ones.
    #[inline(always)]
    unsafe fn absorb<V: Vector<Lane = R>>(&self, largest: &mut R, scores: &mut [R]) -> (R, R) {
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
            let scale = V::splat(self.scale * R::from_f64(std::f64::consts::LOG2_E));
            let mut total = V::splat(V::Lane::ZERO);
            for (index, square) in self.squares.iter().enumerate() {
                if !square.halves[half] {
                    continue;
                }
                for lane in (0..PANEL).step_by(V::LANES) {
                    let place = data.add(row(index) + lane);
                    let weight = exp2((V::load(place) - shift) * scale);
                    total = total + weight;
                    weight.store(place);
                }
            }
            let correction =
                if *largest == before { V::Lane::ONE } else { exp_or_zero((before - *largest) * self.scale) };
            (correction, total.sum())
        }
    }
}
