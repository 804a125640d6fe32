//! One query per head against a cache: memory is read once, so work is split where memory is. Entries come in pieces of fixed length,
//! which threads share out when heads are few, and which are joined in their order whoever computed them.

use super::buffer::Buffer;
use super::long::{LONG_GROUP, add_long_weighted, long_dots};
use super::matrix::{Matrix, pack, padded};
use super::row::{add_scaled, write_scaled};
use super::slots::Kept;
use crate::error::Result;
use crate::kernel::decode::{Decode, Slots, Step};
use crate::kernel::element::{Element, Real};
use crate::kernel::simd::{Kernel, Memory, Vector};
use crate::kernel::softmax::Running;
use crate::kernel::view::Output;
use crate::kernel::{Run, View4};

/// Entries whose weights are summed in one go.
const PIECE: usize = 256;
/// Tokens after which a thread looks whether it should stop.
const BLOCK: usize = 64;
/// Multiplications below which another thread is not worth waking.
const WORTH_A_THREAD: usize = 1 << 17;

/// [`Decode::attend`].
pub(in crate::kernel) fn decode<T: Element>(
    problem: &Decode<T>,
    out: &mut [T],
    lse: &mut [f64],
    weights: Option<&mut [T::Acc]>,
    run: &Run,
) -> Result<()> {
    problem.check()?;
    let [batch, kv_heads, keys, _] = problem.k.shape();
    let (mut k_copy, mut v_copy) = (Vec::new(), Vec::new());
    let weights = weights.map(|weights| {
        weights.fill(T::Acc::ZERO);
        Output::new("weights", weights, &[batch, kv_heads, keys])
    });
    let given = Given {
        problem,
        k: pack(problem.k, &mut k_copy),
        v: pack(problem.v, &mut v_copy),
        weights: weights.transpose()?,
    };
    let most = problem.lengths.iter().copied().max().unwrap_or(0) as usize;
    let queries = Queries::new(problem.q, kv_heads, problem.v.shape()[3], problem.scale, out, lse)?;
    attend_in_turn(&given, Some(queries), [batch * kv_heads, problem.q.shape()[2]], most, run)
}

/// [`Step::run`].
pub(in crate::kernel) fn step<T: Element>(
    problem: &Step<T>,
    slots: Slots<T>,
    out: &mut [T],
    lse: &mut [f64],
    run: &Run,
) -> Result<()> {
    problem.check(&slots)?;
    let [batch, kv_heads, tokens, _] = problem.k.shape();
    let kept = Kept::new(problem, slots)?;
    let queries = problem
        .q
        .map(|q| Queries::new(q, kv_heads, problem.v.shape()[3], problem.scale, out, lse))
        .transpose()?;
    attend_in_turn(&kept, queries, [batch * kv_heads, tokens], kept.most_entries(), run)
}

/// What a query of a unit (the heads of q that share one head of k in one sample) attends to.
pub(super) struct Visible<'a, T> {
    pub keys: Matrix<'a, T>,
    pub values: Matrix<'a, T>,
    /// The first so many of their rows.
    pub len: usize,
    /// The positions of these rows, and the first position that is seen; all rows are without.
    pub since: Option<(&'a [i64], i64)>,
}

impl<T> Visible<'_, T> {
    /// The rows of a piece that are seen, ascending.
    fn rows(&self, piece: usize) -> impl Iterator<Item = usize> {
        let rows = piece * PIECE..self.len.min((piece + 1) * PIECE);
        rows.filter(|&row| self.since.is_none_or(|(positions, first)| positions[row] >= first))
    }
}

/// Where keys are, and what happens around the attention of a token.
pub(super) trait Cache<T: Element>: Sync {
    /// Token `token` arrives at unit `unit`: what its queries see; nothing for padding.
    ///
    /// # Safety
    /// Nobody else uses the unit, until its token left.
    unsafe fn arrive(&self, unit: usize, token: usize) -> Option<Visible<'_, T>>;
    /// Where the weights of the entries are summed up, if anyone asks.
    ///
    /// # Safety
    /// As above.
    #[expect(clippy::mut_from_ref, reason = "disjointness is the caller's promise")]
    unsafe fn weights(&self, unit: usize, len: usize) -> Option<&mut [T::Acc]>;
    /// The token has been attended to.
    ///
    /// # Safety
    /// As above.
    unsafe fn leave(&self, unit: usize, token: usize);
}

/// A cache that somebody else looks after.
struct Given<'a, T: Element> {
    problem: &'a Decode<'a, T>,
    k: View4<'a, T>,
    v: View4<'a, T>,
    weights: Option<Output<'a, T::Acc>>,
}

impl<T: Element> Cache<T> for Given<'_, T> {
    unsafe fn arrive(&self, unit: usize, token: usize) -> Option<Visible<'_, T>> {
        let [_, kv_heads, ..] = self.k.shape();
        let length = self.problem.lengths[unit] as usize;
        let behind = self.problem.q.shape()[2] - 1 - token;
        Some(Visible {
            keys: Matrix::of(&self.k, unit / kv_heads, unit % kv_heads),
            values: Matrix::of(&self.v, unit / kv_heads, unit % kv_heads),
            len: if self.problem.causal { length.saturating_sub(behind) } else { length },
            since: None,
        })
    }

    unsafe fn weights(&self, unit: usize, len: usize) -> Option<&mut [T::Acc]> {
        // SAFETY: the unit is the caller's alone.
        self.weights.as_ref().map(|weights| unsafe { &mut weights.row_mut(unit)[..len] })
    }

    unsafe fn leave(&self, _unit: usize, _token: usize) {}
}

/// The queries, and where their results go.
struct Queries<'a, T: Element> {
    q: View4<'a, T>,
    out: Output<'a, T>,
    lse: Output<'a, f64>,
    kv_heads: usize,
    scale: T::Acc,
}

impl<'a, T: Element> Queries<'a, T> {
    fn new(
        q: View4<'a, T>,
        kv_heads: usize,
        value_dim: usize,
        scale: f64,
        out: &'a mut [T],
        lse: &'a mut [f64],
    ) -> Result<Self> {
        let [batch, heads, tokens, _] = q.shape();
        Ok(Queries {
            q,
            out: Output::new("out", out, &[batch, heads, tokens, value_dim])?,
            lse: Output::new("lse", lse, &[batch, heads, tokens, 1])?,
            kv_heads,
            scale: T::Acc::from_f64(scale),
        })
    }

    /// Heads of q per head of k.
    fn group(&self) -> usize {
        self.q.shape()[1] / self.kv_heads
    }

    /// The head of q, among those of all samples, that is number `slot` of unit `unit`.
    fn head(&self, unit: usize, slot: usize) -> usize {
        unit * self.group() + slot
    }
}

/// Softmax and weighted sums of pieces that are not joined yet.
struct Parts<R> {
    softmax: Vec<Running<R>>,
    sums: Buffer<R>,
    weights: Buffer<R>,
}

impl<R: Real> Parts<R> {
    fn new(count: usize, width: usize) -> Self {
        Parts {
            softmax: vec![Running::new(0); count],
            sums: Buffer::unset(count * padded(width)),
            weights: Buffer::unset(count * PIECE),
        }
    }

    fn shared(&mut self, width: usize) -> Result<SharedParts<'_, R>> {
        let count = self.softmax.len();
        Ok(SharedParts {
            softmax: Output::new("softmax", &mut self.softmax, &[count, 1])?,
            sums: Output::new("sums", &mut self.sums, &[count, padded(width)])?,
            weights: Output::new("weights", &mut self.weights, &[count, PIECE])?,
        })
    }
}

/// The same, one row per piece, each written by the task that computes the piece.
struct SharedParts<'a, R> {
    softmax: Output<'a, Running<R>>,
    sums: Output<'a, R>,
    weights: Output<'a, R>,
}

/// What a thread keeps from task to task.
struct Scratch<R> {
    columns: Vec<u32>,
    query: Buffer<R>,
    sum: Buffer<R>,
}

impl<R: Real> Scratch<R> {
    fn new(dim: usize, value_dim: usize) -> Self {
        Scratch {
            columns: Vec::with_capacity(PIECE),
            query: Buffer::zeros(padded(dim)),
            sum: Buffer::zeros(padded(value_dim)),
        }
    }
}

/// Every unit sees its tokens one after the other; `most` is the longest cache any of them can meet.
fn attend_in_turn<T: Element>(
    cache: &impl Cache<T>,
    queries: Option<Queries<T>>,
    [units, tokens]: [usize; 2],
    most: usize,
    run: &Run,
) -> Result<()> {
    let Some(queries) = queries else {
        return join_only(cache, [units, tokens], run);
    };
    if units == 0 || tokens == 0 {
        return Ok(());
    }
    let ([.., dim], [_, value_dim]) = (queries.q.shape(), [0, queries.out.width()]);
    let group = queries.group();
    let pieces = most.div_ceil(PIECE).max(1);
    let of_one_token = (units * group).saturating_mul(most).saturating_mul(dim + value_dim);
    let isa = run.isa;
    let pool = |work: usize| run.pool.at_most(work / WORTH_A_THREAD + 1);
    if units < pool(of_one_token).parallelism() && pieces > 1 {
        let mut parts = Parts::new(units * pieces * group, value_dim);
        let parts = parts.shared(value_dim)?;
        for token in 0..tokens {
            // SAFETY: this thread alone uses every unit.
            let visible: Vec<_> = (0..units).map(|unit| unsafe { cache.arrive(unit, token) }).collect();
            let task = |unit: usize| Task {
                cache,
                queries: &queries,
                parts: &parts,
                visible: visible[unit].as_ref(),
                unit,
                token,
                first_part: unit * pieces * group,
            };
            let make_scratch = || Scratch::new(dim, value_dim);
            pool(of_one_token).run(
                units * pieces,
                make_scratch,
                |scratch, index| {
                    let piece = Piece { task: task(index / pieces), piece: index % pieces, scratch };
                    if piece.exists() {
                        // SAFETY: every piece is one task, and pieces do not share parts.
                        unsafe { isa.run::<T>(piece) };
                    }
                },
                run.interrupt,
            )?;
            pool(of_one_token / PIECE).run(
                units,
                make_scratch,
                |scratch, unit| {
                    // SAFETY: every unit is one task, and all its pieces are done.
                    unsafe {
                        isa.run::<T>(Finish { task: task(unit), scratch });
                        cache.leave(unit, token);
                    }
                },
                run.interrupt,
            )?;
        }
        return Ok(());
    }
    for start in (0..tokens).step_by(BLOCK) {
        let block = start..tokens.min(start + BLOCK);
        pool(of_one_token.saturating_mul(block.len())).run(
            units,
            || (Scratch::new(dim, value_dim), Parts::new(pieces * group, value_dim)),
            |(scratch, parts), unit| {
                let Ok(parts) = parts.shared(value_dim) else { unreachable!("parts have their own size") };
                for token in block.clone() {
                    // SAFETY: every unit is one task; its tokens and pieces come one after the other.
                    unsafe {
                        let visible = cache.arrive(unit, token);
                        let visible = visible.as_ref();
                        let task = Task {
                            cache,
                            queries: &queries,
                            parts: &parts,
                            visible,
                            unit,
                            token,
                            first_part: 0,
                        };
                        for piece in 0..pieces {
                            let piece = Piece { task, piece, scratch };
                            if piece.exists() {
                                isa.run::<T>(piece);
                            }
                        }
                        isa.run::<T>(Finish { task, scratch });
                        cache.leave(unit, token);
                    }
                }
            },
            run.interrupt,
        )?;
    }
    Ok(())
}

/// Tokens that nobody asks anything of.
fn join_only<T: Element>(cache: &impl Cache<T>, [units, tokens]: [usize; 2], run: &Run) -> Result<()> {
    for start in (0..tokens).step_by(BLOCK) {
        let block = start..tokens.min(start + BLOCK);
        let join = |_: &mut (), unit: usize| {
            for token in block.clone() {
                // SAFETY: every unit is one task.
                unsafe {
                    let _ = cache.arrive(unit, token);
                    cache.leave(unit, token);
                }
            }
        };
        run.pool.at_most(1).run(units, || (), join, run.interrupt)?;
    }
    Ok(())
}

/// One token of one unit.
struct Task<'a, T: Element, C> {
    cache: &'a C,
    queries: &'a Queries<'a, T>,
    parts: &'a SharedParts<'a, T::Acc>,
    visible: Option<&'a Visible<'a, T>>,
    unit: usize,
    token: usize,
    /// Where the unit's parts start: one per piece and head, the heads of a piece side by side.
    first_part: usize,
}

impl<T: Element, C> Clone for Task<'_, T, C> {
    fn clone(&self) -> Self {
        *self
    }
}

impl<T: Element, C> Copy for Task<'_, T, C> {}

impl<T: Element, C> Task<'_, T, C> {
    fn len(&self) -> usize {
        self.visible.map_or(0, |visible| visible.len)
    }

    fn part(&self, piece: usize, slot: usize) -> usize {
        self.first_part + piece * self.queries.group() + slot
    }
}

/// The entries of one piece.
struct Piece<'a, T: Element, C> {
    task: Task<'a, T, C>,
    piece: usize,
    scratch: &'a mut Scratch<T::Acc>,
}

impl<T: Element, C> Piece<'_, T, C> {
    fn exists(&self) -> bool {
        self.piece * PIECE < self.task.len()
    }
}

impl<T: Element, C: Cache<T>> Kernel<T> for Piece<'_, T, C> {
    #[inline(always)]
    unsafe fn run<V: Vector<Lane = T::Acc> + Memory<T>>(self) {
        let Piece { task, piece, scratch } = self;
        let Some(visible) = task.visible else { return };
        let queries = task.queries;
        scratch.columns.clear();
        scratch.columns.extend(visible.rows(piece).map(|row| row as u32));
        let columns = scratch.columns.as_slice();
        for slot in 0..queries.group() {
            let heads = queries.q.shape()[1];
            let head = queries.head(task.unit, slot);
            let part = task.part(piece, slot);
            // SAFETY: columns are rows of both matrices, which are packed; parts hold whole pieces and padded rows.
            unsafe {
                Matrix::of(&queries.q, head / heads, head % heads).stage::<V>(task.token, &mut scratch.query);
                let weights = task.parts.weights.row_mut(part);
                let groups = columns.len().next_multiple_of(LONG_GROUP);
                long_dots::<V, T>(&scratch.query, &visible.keys, columns, &mut weights[..groups]);
                let mut softmax = Running::new(0);
                softmax.absorb::<V>(&mut weights[..padded(columns.len())], columns.len(), queries.scale);
                task.parts.softmax.row_mut(part)[0] = softmax;
                let sum = task.parts.sums.row_mut(part);
                sum.fill(T::Acc::ZERO);
                add_long_weighted::<V, T>(&weights[..columns.len()], &visible.values, columns, sum);
            }
        }
    }
}

/// The pieces of one unit become its outputs.
struct Finish<'a, T: Element, C> {
    task: Task<'a, T, C>,
    scratch: &'a mut Scratch<T::Acc>,
}

impl<T: Element, C: Cache<T>> Kernel<T> for Finish<'_, T, C> {
    #[inline(always)]
    unsafe fn run<V: Vector<Lane = T::Acc> + Memory<T>>(self) {
        let Finish { task, scratch } = self;
        let (queries, parts) = (task.queries, task.parts);
        let len = task.len();
        let pieces = len.div_ceil(PIECE);
        let tokens = queries.q.shape()[2];
        // SAFETY: the unit and all its parts are this task's alone.
        unsafe {
            let mut received = task.cache.weights(task.unit, len);
            for slot in 0..queries.group() {
                let part = |piece: usize| parts.softmax.row_mut(task.part(piece, slot))[0];
                let whole = Running::joined((0..pieces).map(part));
                let (factor, lse) = whole.finish();
                scratch.sum.fill(T::Acc::ZERO);
                for piece in 0..pieces {
                    let share = part(piece).share(&whole);
                    let index = task.part(piece, slot);
                    add_scaled::<V>(parts.sums.row_mut(index), share, &mut scratch.sum);
                    if let (Some(received), Some(visible)) = (&mut received, task.visible) {
                        for (row, &weight) in visible.rows(piece).zip(parts.weights.row_mut(index).iter()) {
                            received[row] += weight * (share * factor);
                        }
                    }
                }
                let row = queries.head(task.unit, slot) * tokens + task.token;
                write_scaled::<V, T>(&scratch.sum, factor, queries.out.row_mut(row));
                queries.lse.row_mut(row)[0] = lse;
            }
        }
    }
}
