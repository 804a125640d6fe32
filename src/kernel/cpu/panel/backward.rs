//! Gradients: `dq_i = scale * sum_j dS_ij k_j`, `dk_j = scale * sum_i dS_ij q_i` and `dv_j = sum_i P_ij dO_i`, with
//! `P_ij = exp(s_ij - lse_i)`, `dS_ij = P_ij (dO_i . v_j - delta_i)` and `delta_i = sum_j P_ij (dO_i . v_j) = dO_i . O_i`: the sum,
//! which rounds like what it is subtracted from, unless a tile has so many squares that all their P would be computed once more for it.
//!
//! A tile's P and dS are computed once and used for all three, when there are heads enough for all threads; else dq goes by query and
//! dk and dv by key, which computes them twice. Sums are formed in the same order either way, so the bits are the same.

use std::ops::Range;

use super::micro::{SQUARE, Scores, SumOfKeys, SumOfQueries};
use super::packed::{Keys, Order, Packed, Panels, add_wild, set_bits};
use super::{GROUP, WORTH_A_THREAD, slots};
use crate::error::Result;
use crate::kernel::Run;
use crate::kernel::cpu::backward::{Delta, Outputs, Saved, mean_of_row, shift};
use crate::kernel::cpu::buffer::Buffer;
use crate::kernel::cpu::matrix::{CHAIN, Column, Matrix, padded};
use crate::kernel::cpu::row::write_scaled;
use crate::kernel::cpu::tasks::{Call, Head};
use crate::kernel::element::{Element, Real};
use crate::kernel::simd::{Kernel, Memory, Vector};
use crate::kernel::softmax::exp2;
use crate::kernel::view::Output;
use crate::plan::panels::{PANEL, Square, Squares};

/// Queries per task that writes dq alone.
const ROWS: usize = 8 * PANEL;
/// Panels of keys per task that writes dk and dv alone, at least.
const PANELS: usize = 8;
/// Such tasks per head, at most: every one looks at all queries.
const TASKS: usize = 64;
/// Multiplications above which one head is too long a task to be interrupted in time.
const TOO_LONG: usize = 1 << 33;

/// Write the gradients of the heads in `call.panels`.
pub(in crate::kernel::cpu) fn backward<T: Element>(
    call: &Call<T>,
    saved: &Saved<T>,
    outputs: Outputs<T>,
    run: &Run,
) -> Result<()> {
    let (sizes, units) = (call.sizes, call.panels.units());
    let plan = call.problem.plan;
    let work_of = |&unit: &usize| {
        let head = unit % sizes.kv_heads * sizes.group();
        let pairs = plan.head(unit / sizes.kv_heads, head, sizes.heads).in_panels().pairs;
        pairs * sizes.group() * (3 * sizes.dim + 2 * sizes.value_dim)
    };
    let longest = units.iter().map(work_of).max().unwrap_or(0);
    let pool = run.pool.at_most(units.iter().map(work_of).sum::<usize>() / WORTH_A_THREAD + 1);
    let panels = sizes.keys.div_ceil(PANEL);
    let isa = run.isa;
    // Three layouts of keys and values, and the sums of dk and dv, share the cache.
    let numbers = 3 * padded(sizes.dim) + 2 * padded(sizes.value_dim);
    let slots = slots(call, numbers * size_of::<T::Acc>());
    let run_tasks = |rows: usize, panels_per_task: usize, pass: Pass<T::Acc>| {
        let (by_rows, by_panels) =
            (sizes.queries.div_ceil(rows).max(1), panels.div_ceil(panels_per_task).max(1));
        let per_unit = by_rows * by_panels;
        pool.run(
            units.len() * per_unit,
            || Scratch::new(call, slots, rows.min(sizes.queries), panels_per_task, pass),
            |scratch, index| {
                let (row, panel) = (index % per_unit / by_panels * rows, index % by_panels * panels_per_task);
                let task = Task {
                    call,
                    saved,
                    unit: units[index / per_unit],
                    rows: row..sizes.queries.min(row + rows),
                    panels: panel..panels.min(panel + panels_per_task),
                    pass,
                    outputs,
                    scratch,
                };
                // SAFETY: every index is one task, and tasks do not share rows of what they write.
                unsafe { isa.run::<T>(task) };
            },
            run.interrupt,
        )
    };
    let (all_rows, all_panels) = (sizes.queries.max(1), panels.max(1));
    // Together they are 7 products, apart 3 + 4 + 2 that are computed again.
    let rounds = units.len().div_ceil(pool.parallelism()) * pool.parallelism();
    if rounds * 7 <= units.len() * 9 && longest < TOO_LONG {
        return run_tasks(all_rows, all_panels, Pass::Both);
    }
    let mut deltas = vec![T::Acc::ZERO; 2 * sizes.batch * sizes.heads * sizes.queries];
    let per_query = [sizes.batch, sizes.heads, sizes.queries, 2];
    run_tasks(ROWS, all_panels, Pass::Queries(&Output::new("delta", &mut deltas, &per_query)?))?;
    run_tasks(all_rows, PANELS.max(panels.div_ceil(TASKS)), Pass::Keys(&deltas))
}

/// Which gradients a task writes.
#[derive(Clone, Copy)]
enum Pass<'a, R> {
    /// All.
    Both,
    /// dq, and delta of every query.
    Queries(&'a Output<'a, R>),
    /// dk and dv, from delta of every query.
    Keys(&'a [R]),
}

impl<R> Pass<'_, R> {
    fn wants_queries(&self) -> bool {
        !matches!(self, Pass::Keys(_))
    }

    fn wants_keys(&self) -> bool {
        !matches!(self, Pass::Queries(_))
    }
}

/// Some queries and some keys of one head of k and v.
struct Task<'a, T: Element> {
    call: &'a Call<'a, T>,
    saved: &'a Saved<'a, T>,
    unit: usize,
    rows: Range<usize>,
    panels: Range<usize>,
    pass: Pass<'a, T::Acc>,
    outputs: Outputs<'a, T>,
    scratch: &'a mut Scratch<T::Acc>,
}

/// One head of q of a task.
struct Queries<'a, T: Element> {
    tensors: Head<'a, T>,
    grad_out: Matrix<'a, T>,
    out: Matrix<'a, T>,
    lse: Column<'a, f64>,
    /// Where the head's first query lies in the deltas.
    first_row: usize,
    /// Whether delta is a sum over keys.
    sums_delta: bool,
}

/// What a thread keeps from task to task.
struct Scratch<R> {
    squares: Vec<Square>,
    slots: Vec<usize>,
    keys: Keys<Panels<R>>,
    /// A tile of queries, of their outputs and of the gradients of those.
    queries: Panels<R>,
    out: Panels<R>,
    grad_out: Panels<R>,
    /// Scores, then P, of a tile's squares.
    weights: Buffer<R>,
    /// `dO . v`, then dS.
    grads: Buffer<R>,
    /// Per query of a tile: its lse in two parts, its delta.
    shifts: [[R; 2]; PANEL],
    deltas: [Delta<R>; PANEL],
    /// Sums for the rows and panels of a task.
    dq: Buffer<R>,
    dk: Buffer<R>,
    dv: Buffer<R>,
    /// The same over several heads of q, where they share keys: one chain of additions for all of them would lose digits.
    of_heads: [Buffer<R>; 2],
    /// One token.
    token: Buffer<R>,
}

impl<R: Real> Scratch<R> {
    fn new<T: Element<Acc = R>>(
        call: &Call<T>,
        slots: usize,
        rows: usize,
        panels: usize,
        pass: Pass<R>,
    ) -> Self {
        let (dim, value_dim) = (call.sizes.dim, call.sizes.value_dim);
        let (width, value_width) = (padded(dim), padded(value_dim));
        let sums = |wanted: bool, tokens: usize, width: usize| {
            Buffer::unset(if wanted { tokens * width } else { 0 })
        };
        Scratch {
            squares: Vec::new(),
            slots: Vec::new(),
            keys: Keys::new(
                Panels::new(dim, slots, Order::Both),
                Panels::new(value_dim, slots, Order::Columns),
                slots,
            ),
            queries: Panels::new(dim, 1, Order::Both),
            out: Panels::new(value_dim, 1, Order::Columns),
            grad_out: Panels::new(value_dim, 1, Order::Both),
            weights: Buffer::unset(GROUP * SQUARE),
            grads: Buffer::unset(GROUP * SQUARE),
            shifts: [[R::ZERO; 2]; PANEL],
            deltas: [[R::ZERO; 2]; PANEL],
            dq: sums(pass.wants_queries(), rows.next_multiple_of(PANEL), width),
            dk: sums(pass.wants_keys(), panels * PANEL, width),
            dv: sums(pass.wants_keys(), panels * PANEL, value_width),
            of_heads: [width, value_width]
                .map(|width| sums(pass.wants_keys() && call.sizes.group() > 1, panels * PANEL, width)),
            token: Buffer::unset(width.max(value_width)),
        }
    }
}

impl<T: Element> Kernel<T> for Task<'_, T> {
    #[inline(always)]
    unsafe fn run<V: Vector<Lane = T::Acc> + Memory<T>>(mut self) {
        let sizes = self.call.sizes;
        let (batch, kv_head) = (self.unit / sizes.kv_heads, self.unit % sizes.kv_heads);
        let (width, value_width) = (self.scratch.queries.width, self.scratch.grad_out.width);
        for sums in &mut self.scratch.of_heads {
            sums.fill(T::Acc::ZERO);
        }
        for head in kv_head * sizes.group()..(kv_head + 1) * sizes.group() {
            let plan = self.call.problem.plan.head(batch, head, sizes.heads);
            let limit = self.scratch.keys.len();
            let queries = Queries {
                tensors: self.call.head(batch, head),
                grad_out: self.saved.grad_out(batch, head),
                out: self.saved.out(batch, head),
                lse: self.saved.lse(batch, head),
                first_row: (batch * sizes.heads + head) * sizes.queries,
                sums_delta: plan.in_panels().squares <= GROUP.min(limit),
            };
            self.scratch.dq.fill(T::Acc::ZERO);
            self.scratch.dk.fill(T::Acc::ZERO);
            self.scratch.dv.fill(T::Acc::ZERO);
            let mut tiles = Squares::new(plan.by_query(), self.rows.clone());
            let mut squares = std::mem::take(&mut self.scratch.squares);
            // A sum over keys wants all of them at once.
            let limit = if queries.sums_delta { usize::MAX } else { limit };
            for panels in tiles.chunks(self.panels.clone(), limit) {
                for rows in tiles.rows_reaching(&panels) {
                    for start in rows.step_by(PANEL) {
                        tiles.of_tile(start, &panels, &mut squares);
                        // SAFETY: the caller's promise.
                        unsafe { self.tile::<V>(&queries, start, &squares) };
                    }
                }
            }
            self.scratch.squares = squares;
            let Scratch { dk, dv, of_heads, .. } = &mut *self.scratch;
            for (sums, of_head) in of_heads.iter_mut().zip([&*dk, dv]) {
                for (sum, &of_head) in sums.iter_mut().zip(&**of_head) {
                    *sum += of_head;
                }
            }
            if self.pass.wants_queries() {
                let dq = self.outputs.dq.head(batch, head);
                for (row, sum) in self.rows.clone().zip(self.scratch.dq.chunks_exact(width)) {
                    // SAFETY: the row belongs to this task.
                    unsafe { write_scaled::<V, T>(sum, self.call.scale, dq.row_mut(row)) };
                }
            }
        }
        if self.pass.wants_keys() {
            let (to_dk, to_dv) = (self.outputs.dk.head(batch, kv_head), self.outputs.dv.head(batch, kv_head));
            let keys = self.panels.start * PANEL..sizes.keys.min(self.panels.end * PANEL);
            let Scratch { dk, dv, of_heads, .. } = &*self.scratch;
            let [dk, dv] = if sizes.group() > 1 { of_heads.each_ref() } else { [dk, dv] };
            let sums = dk.chunks_exact(width).zip(dv.chunks_exact(value_width));
            for (key, (dk, dv)) in keys.zip(sums) {
                // SAFETY: the row belongs to this task.
                unsafe {
                    write_scaled::<V, T>(dk, T::Acc::ONE, to_dk.row_mut(key));
                    write_scaled::<V, T>(dv, T::Acc::ONE, to_dv.row_mut(key));
                }
            }
        }
    }
}

impl<T: Element> Task<'_, T> {
    /// Add what the tile that begins with query `start` and some of its keys give to each other.
    #[inline(always)]
    unsafe fn tile<V>(&mut self, head: &Queries<T>, start: usize, squares: &[Square])
    where
        V: Vector<Lane = T::Acc> + Memory<T>,
    {
        if squares.is_empty() {
            return;
        }
        let count = PANEL.min(self.rows.end - start);
        let group = GROUP.min(self.scratch.keys.len());
        // SAFETY: the queries exist; the rest is the caller's promise.
        unsafe {
            let sums_delta = head.sums_delta && squares.len() <= group;
            self.load::<V>(head, start, count, sums_delta);
            for part in squares.chunks(group) {
                self.weigh::<V>(head, part);
                self.differentiate::<V>(part, sums_delta && self.pass.wants_queries());
                if self.pass.wants_queries() {
                    self.sum_keys::<V>(&head.tensors.k, start, part);
                }
                if self.pass.wants_keys() {
                    self.sum_queries::<V>(head, start, part);
                }
            }
            if let Pass::Queries(deltas) = self.pass {
                for slot in 0..count {
                    let delta = &self.scratch.deltas[slot];
                    deltas.row_mut(head.first_row + start + slot).copy_from_slice(delta);
                }
            }
        }
    }

    /// Fill the tile of queries.
    #[inline(always)]
    unsafe fn load<V: Vector<Lane = T::Acc> + Memory<T>>(
        &mut self,
        head: &Queries<T>,
        start: usize,
        count: usize,
        sums_delta: bool,
    ) {
        let Scratch { queries, out, grad_out, shifts, deltas, .. } = &mut *self.scratch;
        let scale = self.call.scale;
        let bits = u16::MAX >> (PANEL - count);
        // SAFETY: the queries exist; panels by columns have PANEL numbers for each of their channels.
        unsafe {
            grad_out.pack::<V>(0, &head.grad_out, start, bits);
            deltas.fill([T::Acc::ZERO; 2]);
            if let Pass::Keys(all) = self.pass {
                let first = head.first_row + start;
                deltas[..count].copy_from_slice(&all.as_chunks().0[first..first + count]);
            } else if !sums_delta {
                out.pack::<V>(0, &head.out, start, bits);
                // Summed as scores are: where a query keeps one key, `dO . O` is the `dO . v` of it.
                for lane in (0..PANEL).step_by(V::LANES) {
                    let mut sum = V::splat(T::Acc::ZERO);
                    for first in (lane..grad_out.size()).step_by(CHAIN * PANEL) {
                        let mut part = V::splat(T::Acc::ZERO);
                        for place in (first..grad_out.size().min(first + CHAIN * PANEL)).step_by(PANEL) {
                            let grad = V::load(grad_out.columns.as_ptr().add(place));
                            part = grad.mul_add(V::load(out.columns.as_ptr().add(place)), part);
                        }
                        sum = sum + part;
                    }
                    let mut lanes = [T::Acc::ZERO; PANEL];
                    sum.store(lanes.as_mut_ptr());
                    for (delta, &sum) in deltas[lane..].iter_mut().zip(&lanes[..V::LANES]) {
                        delta[0] = sum;
                    }
                }
            }
            for slot in 0..count {
                shifts[slot] = shift(head.lse.at(start + slot));
            }
            queries.pack::<V>(0, &head.tensors.q, start, bits);
            queries.scale::<V>(scale, scale);
        }
    }

    /// P and `dO . v` of some squares, zero where a key is not kept.
    #[inline(always)]
    unsafe fn weigh<V: Vector<Lane = T::Acc> + Memory<T>>(&mut self, head: &Queries<T>, squares: &[Square]) {
        let Scratch { slots, keys, queries, grad_out, weights, grads, shifts, .. } = &mut *self.scratch;
        assert!(weights.len() >= squares.len() * SQUARE && grads.len() >= squares.len() * SQUARE);
        let tensors = head.tensors;
        // SAFETY: every square has its scores and gradients; the rest is the caller's promise.
        unsafe {
            keys.find::<V, T>(&tensors, self.unit, squares, slots);
            let scores = |tile, panels, width, dim, scores| {
                V::outline::<T::Acc>(Scores { tile, panels, width, dim, squares, slots, scores });
            };
            scores(&queries.columns, &keys.k.columns, keys.k.width, tensors.k.width(), weights);
            scores(&grad_out.columns, &keys.v.columns, keys.v.width, tensors.v.width(), grads);
            let zero = V::splat(T::Acc::ZERO);
            let log2_e = V::splat(T::Acc::from_f64(std::f64::consts::LOG2_E));
            for (index, (square, &slot)) in squares.iter().zip(&*slots).enumerate() {
                for query in 0..PANEL {
                    if !square.halves[query / (PANEL / 2)] {
                        continue;
                    }
                    let bits = u32::from(square.bits[query] & keys.allowed[slot]);
                    let [most, rest] = shifts[query];
                    let (most, rest) = (V::splat(most), V::splat(rest));
                    for lane in (query * PANEL..(query + 1) * PANEL).step_by(V::LANES) {
                        let place = index * SQUARE + lane;
                        let (weight, grad) = (weights.as_mut_ptr().add(place), grads.as_mut_ptr().add(place));
                        let mut p = exp2((V::load(weight) - most - rest) * log2_e);
                        if bits != u32::from(u16::MAX) {
                            let bits = bits >> (lane % PANEL);
                            p = p.keep(bits, zero);
                            V::load(grad).keep(bits, zero).store(grad);
                        }
                        p.store(weight);
                    }
                }
            }
        }
    }

    /// Turn `dO . v` of some squares into dS, if `sums_delta` with delta of their own; zero where a key is not kept.
    #[inline(always)]
    unsafe fn differentiate<V: Vector<Lane = T::Acc>>(&mut self, squares: &[Square], sums_delta: bool) {
        let Scratch { slots, keys, weights, grads, deltas, .. } = &mut *self.scratch;
        assert!(weights.len() >= squares.len() * SQUARE && grads.len() >= squares.len() * SQUARE);
        for (query, delta) in deltas.iter_mut().enumerate() {
            let rows = squares.iter().enumerate().filter(|(_, square)| square.halves[query / (PANEL / 2)]);
            let rows = rows.map(|(index, square)| {
                let bits = u32::from(square.bits[query] & keys.allowed[slots[index]]);
                (index * SQUARE + query * PANEL, bits)
            });
            // SAFETY: every square has its P and `dO . v`, in rows of whole registers.
            unsafe {
                let parts = if sums_delta { delta.len() } else { 0 };
                for part in 0..parts {
                    let zero = V::splat(T::Acc::ZERO);
                    let (mut sum, mut total) = (zero, zero);
                    let known = V::splat(delta[0]);
                    for (row, _) in rows.clone() {
                        for place in (row..row + PANEL).step_by(V::LANES) {
                            let p = V::load(weights.as_ptr().add(place));
                            sum = p.mul_add(V::load(grads.as_ptr().add(place)) - known, sum);
                            total = total + p;
                        }
                    }
                    delta[part] = mean_of_row([sum.sum(), total.sum()]);
                }
                let [delta, rest] = delta.map(|part| V::splat(part));
                let zero = V::splat(T::Acc::ZERO);
                for (row, bits) in rows {
                    for lane in (0..PANEL).step_by(V::LANES) {
                        let grad = grads.as_mut_ptr().add(row + lane);
                        let p = V::load(weights.as_ptr().add(row + lane));
                        let ds = p * (V::load(grad) - delta - rest);
                        // A delta that is not a number would make one of 0 as well.
                        let is_full = bits == u32::from(u16::MAX);
                        (if is_full { ds } else { ds.keep(bits >> lane, zero) }).store(grad);
                    }
                }
            }
        }
    }

    /// Add to dq.
    #[inline(always)]
    unsafe fn sum_keys<V>(&mut self, k: &Matrix<T>, start: usize, squares: &[Square])
    where
        V: Vector<Lane = T::Acc> + Memory<T>,
    {
        let Scratch { slots, keys, grads, dq, token, .. } = &mut *self.scratch;
        let width = keys.k.width;
        let place = start - self.rows.start;
        let dq = &mut dq[place * width..(place + PANEL) * width];
        // SAFETY: keys that are listed as wild exist; the rest is the caller's promise.
        unsafe {
            V::outline::<T::Acc>(SumOfKeys {
                weights: grads,
                panels: &keys.k.rows,
                width,
                squares,
                slots,
                out: dq,
            });
            for (index, (square, &slot)) in squares.iter().zip(&*slots).enumerate() {
                for key in set_bits(keys.k.wild[slot]) {
                    k.stage::<V>(square.panel * PANEL + key, token);
                    for query in (0..PANEL).filter(|&query| square.bits[query] >> key & 1 != 0) {
                        let ds = grads[index * SQUARE + query * PANEL + key];
                        add_wild::<V>(&token[..width], ds, &mut dq[query * width..(query + 1) * width]);
                    }
                }
            }
        }
    }

    /// Add to dk and dv.
    #[inline(always)]
    unsafe fn sum_queries<V>(&mut self, head: &Queries<T>, start: usize, squares: &[Square])
    where
        V: Vector<Lane = T::Acc> + Memory<T>,
    {
        let Scratch { slots, keys, queries, grad_out, weights, grads, dk, dv, token, .. } =
            &mut *self.scratch;
        for (index, (square, &slot)) in squares.iter().zip(&*slots).enumerate() {
            let square_of = index * SQUARE..(index + 1) * SQUARE;
            let kept = square.bits.map(|bits| bits & keys.allowed[slot]);
            let tiles = [
                (&*grads, &*queries, head.tensors.q, self.call.scale, &mut *dk),
                (&*weights, &*grad_out, head.grad_out, T::Acc::ONE, &mut *dv),
            ];
            for (weights, tile, matrix, factor, sums) in tiles {
                let (width, size) = (tile.width, tile.size());
                let place = (square.panel - self.panels.start) * size;
                let sums = &mut sums[place..place + size];
                let weights = &weights[square_of.clone()];
                // SAFETY: queries that are listed as wild exist; the rest is the caller's promise.
                unsafe {
                    V::outline::<T::Acc>(SumOfQueries {
                        weights,
                        tile: &tile.rows,
                        width,
                        halves: square.halves,
                        out: sums,
                    });
                    for query in set_bits(tile.wild[0]) {
                        matrix.stage::<V>(start + query, token);
                        for key in set_bits(kept[query]) {
                            let weight = weights[query * PANEL + key] * factor;
                            add_wild::<V>(&token[..width], weight, &mut sums[key * width..(key + 1) * width]);
                        }
                    }
                }
            }
        }
    }
}
