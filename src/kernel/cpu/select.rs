//! The keys with the highest scores of every query. Scores come tile by tile and are forgotten at once: time is that of all of
//! them, memory that of the keys kept.

use std::ops::Range;

use super::batch::Allowed;
use super::buffer::Buffer;
use super::matrix::{Column, Matrix, padded};
use super::tile::{Block, TILE, multiply, pack, transpose};
use crate::error::{Error, Result};
use crate::kernel::element::{Element, Real};
use crate::kernel::simd::{Kernel, MAX_LANES, Memory, Vector};
use crate::kernel::view::Output;
use crate::kernel::{NO_KEY, Run, Selection};

/// Multiplications below which another thread is not worth waking.
const WORTH_A_THREAD: usize = 1 << 20;
/// Queries per task: keys are packed once for all of them.
const ROWS: usize = 4 * TILE;
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
    let tasks = queries.div_ceil(ROWS);
    let work = (batch * heads * queries).saturating_mul(keys).saturating_mul(dim);
    let isa = run.isa;
    run.pool.at_most(work / WORTH_A_THREAD + 1).run(
        batch * heads * tasks,
        || Scratch::new(dim, queries.min(ROWS)),
        |scratch, index| {
            let (unit, start) = (index / tasks, index % tasks * ROWS);
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
                rows: start..queries.min(start + ROWS),
                first_row: unit * queries,
                chosen: &chosen,
                scratch,
            };
            // SAFETY: every index is some rows of one head, and tasks do not share rows.
            unsafe { isa.run::<T>(task) };
        },
        run.interrupt,
    )
}

/// Up to [`ROWS`] rows of one head.
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
struct Scratch<R: Real> {
    columns: Vec<u32>,
    queries: Buffer<R>,
    keys: Buffer<R>,
    keys_transposed: Buffer<R>,
    scores: Buffer<R>,
    /// Per row.
    candidates: Vec<Candidates<R>>,
}

impl<R: Real> Scratch<R> {
    fn new(dim: usize, rows: usize) -> Self {
        let panel = |width: usize| Buffer::zeros(TILE * padded(width));
        Scratch {
            columns: Vec::with_capacity(TILE),
            queries: Buffer::zeros(rows * padded(dim)),
            keys: panel(dim),
            keys_transposed: panel(dim),
            scores: panel(TILE),
            candidates: (0..rows).map(|_| Candidates::default()).collect(),
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
                for first in (0..rows.len()).step_by(TILE) {
                    let part = rows.start + first..rows.end.min(rows.start + first + TILE);
                    if causal && columns[0] as usize >= part.end {
                        continue;
                    }
                    multiply::<V, false>(
                        Block { data: &scratch.queries[first * stride..], stride },
                        Block { data: &scratch.keys_transposed, stride: TILE },
                        &mut scratch.scores,
                        TILE,
                        (part.len(), count, dim),
                    );
                    for (slot, row) in part.enumerate() {
                        let visible =
                            if causal { columns.partition_point(|&key| key as usize <= row) } else { count };
                        let scores = &mut scratch.scores[slot * TILE..(slot + 1) * TILE];
                        let columns = &columns[..visible];
                        let candidates = &mut scratch.candidates[first + slot];
                        match &bias {
                            None => candidates.offer::<V>(scores, columns, scale, keep, |_| true),
                            Some(bias) => {
                                for (score, &key) in scores.iter_mut().zip(columns) {
                                    *score = *score * scale + bias.at(row, key as usize).to_acc();
                                }
                                let allowed = |key| allowed.keeps(row, key as usize);
                                candidates.offer::<V>(scores, columns, T::Acc::ONE, keep, allowed);
                            }
                        }
                    }
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
struct Candidates<R: Real> {
    places: Vec<R::Place>,
    /// The worst score that is still kept, once there are more candidates than places: what is no better need not come in,
    /// because keys arrive in ascending order and the lower index wins a tie.
    bar: Option<R>,
}

impl<R: Real> Default for Candidates<R> {
    fn default() -> Self {
        Candidates { places: Vec::new(), bar: None }
    }
}

impl<R: Real> Candidates<R> {
    fn clear(&mut self) {
        self.places.clear();
        self.bar = None;
    }

    /// Take in those of `keys` that may be among the `keep` best. Their scores are `scale` times `scores`, which end with a whole
    /// register.
    ///
    /// # Safety
    /// The instructions of `V` are available.
    #[inline(always)]
    unsafe fn offer<V: Vector<Lane = R>>(
        &mut self,
        scores: &[R],
        keys: &[u32],
        scale: R,
        keep: usize,
        allowed: impl Fn(u32) -> bool,
    ) {
        assert!(scores.len() >= keys.len().next_multiple_of(V::LANES));
        for (index, keys) in keys.chunks(V::LANES).enumerate() {
            // SAFETY: the scores are there, as asserted; the instructions are the caller's promise.
            let scores = unsafe { V::load(scores.as_ptr().add(index * V::LANES)) * V::splat(scale) };
            let mut passing = u32::MAX >> (u32::BITS as usize - keys.len());
            if let Some(bar) = self.bar {
                // SAFETY: as above. NaN passes, and is sorted out with the others.
                passing &= !scores.at_most(unsafe { V::splat(bar) });
            }
            if passing == 0 {
                continue;
            }
            let mut values = [R::ZERO; MAX_LANES];
            // SAFETY: no register has more lanes.
            unsafe { scores.store(values.as_mut_ptr()) };
            // All at once, which takes registers; one by one it takes branches that nothing predicts.
            let mut places = [R::ZERO.place(); MAX_LANES];
            for lane in 0..V::LANES {
                places[lane] = values[lane].place();
            }
            while passing != 0 {
                let lane = passing.trailing_zeros() as usize;
                passing &= passing - 1;
                if allowed(keys[lane]) {
                    self.places.push(R::with_key(places[lane], keys[lane]));
                }
            }
            if self.places.len() >= keep + keep.max(SPARE) {
                self.cut(keep);
            }
        }
    }

    /// Keep the best.
    #[inline(never)]
    fn cut(&mut self, keep: usize) {
        if self.places.len() <= keep {
            return;
        }
        let (_, &mut worst, _) = self.places.select_nth_unstable(keep - 1);
        self.bar = Some(R::placed(worst).0);
        self.places.truncate(keep);
    }

    /// The keys kept, ascending, then [`NO_KEY`].
    #[inline(never)]
    fn write(&mut self, keep: usize, to: &mut [u32]) {
        self.cut(keep);
        let (keys, rest) = to.split_at_mut(self.places.len());
        for (key, &place) in keys.iter_mut().zip(&self.places) {
            *key = R::placed(place).1;
        }
        keys.sort_unstable();
        rest.fill(NO_KEY);
    }
}
