//! The keys with the highest scores of every query. Scores come tile by tile and are forgotten at once: time is that of all of
//! them, memory that of the keys kept.

use std::cmp::Ordering;
use std::ops::Range;

use super::batch::Allowed;
use super::buffer::Buffer;
use super::matrix::{Column, Matrix, padded};
use super::tile::{Block, TILE, multiply, pack, transpose};
use crate::error::{Error, Result};
use crate::kernel::element::{Element, Real};
use crate::kernel::selection::by_score;
use crate::kernel::simd::{Kernel, Memory, Vector};
use crate::kernel::view::Output;
use crate::kernel::{NO_KEY, Run, Selection};

/// Multiplications below which another thread is not worth waking.
const WORTH_A_THREAD: usize = 1 << 20;
/// A row collects this many candidates beyond those it keeps before it sorts out the worst.
const SPARE: usize = 64;

/// [`Selection::choose`].
pub(in crate::kernel) fn select<T: Element>(
    problem: &Selection<T>,
    chosen: &mut [u32],
    run: &Run,
) -> Result<()> {
    let [batch, heads, queries, dim] = problem.q.shape();
    let [_, kv_heads, keys, _] = problem.k.shape();
    problem.check()?;
    if problem.keep == 0 {
        return Ok(());
    }
    if keys >= NO_KEY as usize {
        return Err(Error::Overflow {
            what: "number of keys",
            size: keys as u128,
            limit: u128::from(NO_KEY) - 1,
        });
    }
    let chosen = Output::new("chosen", chosen, &[batch, heads, queries, problem.keep])?;
    let tiles = queries.div_ceil(TILE);
    let work = (batch * heads * queries).saturating_mul(keys).saturating_mul(dim);
    let isa = run.isa;
    run.pool.at_most(work / WORTH_A_THREAD + 1).run(
        batch * heads * tiles,
        || Scratch::new(dim),
        |scratch, index| {
            let (unit, start) = (index / tiles, index % tiles * TILE);
            let (batch, head) = (unit / heads, unit % heads);
            let bias = problem.bias.as_ref().map(|bias| Matrix::of(bias, batch, head));
            let task = Task {
                q: Matrix::of(&problem.q, batch, head),
                k: Matrix::of(&problem.k, batch, head * kv_heads / heads),
                allowed: Allowed {
                    key_mask: problem.key_mask.as_ref().map(|mask| Column::of(mask, [batch, 0])),
                    bias,
                    by_key: false,
                },
                bias,
                scale: T::Acc::from_f64(problem.scale),
                keep: problem.keep,
                causal: problem.causal,
                num_keys: keys,
                rows: start..queries.min(start + TILE),
                first_row: unit * queries,
                chosen: &chosen,
                scratch,
            };
            // SAFETY: every index is one tile of rows of one head, and tiles do not share rows.
            unsafe { isa.run::<T>(task) };
        },
        run.interrupt,
    )
}

/// Up to [`TILE`] rows of one head.
struct Task<'a, T: Element> {
    q: Matrix<'a, T>,
    k: Matrix<'a, T>,
    allowed: Allowed<'a, T>,
    bias: Option<Matrix<'a, T>>,
    scale: T::Acc,
    keep: usize,
    causal: bool,
    num_keys: usize,
    rows: Range<usize>,
    /// Where the head's first row lies in what is written.
    first_row: usize,
    chosen: &'a Output<'a, u32>,
    scratch: &'a mut Scratch<T::Acc>,
}

/// What a thread keeps from task to task.
struct Scratch<R> {
    columns: Vec<u32>,
    queries: Buffer<R>,
    keys: Buffer<R>,
    keys_transposed: Buffer<R>,
    scores: Buffer<R>,
    candidates: Vec<Candidates<R>>,
}

impl<R: Real> Scratch<R> {
    fn new(dim: usize) -> Self {
        let panel = |width: usize| Buffer::zeros(TILE * padded(width));
        Scratch {
            columns: Vec::with_capacity(TILE),
            queries: panel(dim),
            keys: panel(dim),
            keys_transposed: panel(dim),
            scores: panel(TILE),
            candidates: (0..TILE).map(|_| Candidates::default()).collect(),
        }
    }
}

impl<T: Element> Kernel<T> for Task<'_, T> {
    #[inline(always)]
    unsafe fn run<V: Vector<Lane = T::Acc> + Memory<T>>(self) {
        let Task { q, k, allowed, bias, scale, keep, causal, ref rows, .. } = self;
        let scratch = self.scratch;
        let (dim, stride) = (q.width(), padded(q.width()));
        scratch.candidates.iter_mut().for_each(Candidates::clear);
        let end = if causal { self.num_keys.min(rows.end) } else { self.num_keys };
        let mut next = 0;
        // SAFETY: rows and columns are those of this head; panels hold TILE rows of padded length.
        unsafe {
            pack::<V, T>(&q, rows.clone(), &mut scratch.queries);
            while allowed.take_keys(&mut next, end, TILE, &mut scratch.columns) {
                let columns = &scratch.columns;
                let count = columns.len();
                pack::<V, T>(&k, columns.iter().map(|&column| column as usize), &mut scratch.keys);
                transpose::<V>(&scratch.keys, count, dim, &mut scratch.keys_transposed);
                multiply::<V, false>(
                    Block { data: &scratch.queries, stride },
                    Block { data: &scratch.keys_transposed, stride: TILE },
                    &mut scratch.scores,
                    TILE,
                    (rows.len(), count, dim),
                );
                for (slot, row) in rows.clone().enumerate() {
                    let visible =
                        if causal { columns.partition_point(|&key| key as usize <= row) } else { count };
                    let scores = &mut scratch.scores[slot * TILE..slot * TILE + visible];
                    let columns = &columns[..visible];
                    match &bias {
                        None => scores.iter_mut().for_each(|score| *score *= scale),
                        Some(bias) => {
                            for (score, &key) in scores.iter_mut().zip(columns) {
                                *score = *score * scale + bias.at(row, key as usize).to_acc();
                            }
                        }
                    }
                    scratch.candidates[slot].offer(scores, columns, keep, |key| {
                        bias.is_none() || allowed.keeps(row, key as usize)
                    });
                }
            }
            for (slot, row) in rows.clone().enumerate() {
                scratch.candidates[slot].write(keep, self.chosen.row_mut(self.first_row + row));
            }
        }
    }
}

/// The best keys of one row so far, and some that may yet turn out to be among them.
#[derive(Debug)]
struct Candidates<R> {
    entries: Vec<(R, u32)>,
    /// The worst score that is still kept, once there are more candidates than places: what is no better need not come in,
    /// because keys arrive in ascending order and the lower index wins a tie.
    bar: Option<R>,
}

impl<R> Default for Candidates<R> {
    fn default() -> Self {
        Candidates { entries: Vec::new(), bar: None }
    }
}

impl<R: Real> Candidates<R> {
    fn clear(&mut self) {
        self.entries.clear();
        self.bar = None;
    }

    #[inline(always)]
    fn offer(&mut self, scores: &[R], keys: &[u32], keep: usize, allowed: impl Fn(u32) -> bool) {
        if let Some(bar) = self.bar {
            // Most tiles hold nothing that passes; this loop has no branches. NaN passes, to be looked at below.
            let mut passing = 0u32;
            for &score in scores {
                passing += u32::from(!is_at_most(score, bar));
            }
            if passing == 0 {
                return;
            }
        }
        for (&score, &key) in scores.iter().zip(keys) {
            let passes = self.bar.is_none_or(|bar| by_score(score, bar) == Ordering::Less);
            if passes && allowed(key) {
                self.entries.push((score, key));
                if self.entries.len() >= keep + keep.max(SPARE) {
                    self.cut(keep);
                }
            }
        }
    }

    /// Keep the best.
    #[inline(never)]
    fn cut(&mut self, keep: usize) {
        if self.entries.len() <= keep {
            return;
        }
        let better = |a: &(R, u32), b: &(R, u32)| by_score(a.0, b.0).then(a.1.cmp(&b.1));
        let (_, worst, _) = self.entries.select_nth_unstable_by(keep - 1, better);
        self.bar = Some(worst.0);
        self.entries.truncate(keep);
    }

    /// The keys kept, ascending, then [`NO_KEY`].
    #[inline(never)]
    fn write(&mut self, keep: usize, to: &mut [u32]) {
        self.cut(keep);
        to.fill(NO_KEY);
        for (place, (_, key)) in to.iter_mut().zip(&self.entries) {
            *place = *key;
        }
        to[..self.entries.len()].sort_unstable();
    }
}

#[inline(always)]
fn is_at_most<R: Real>(score: R, bar: R) -> bool {
    score <= bar
}
