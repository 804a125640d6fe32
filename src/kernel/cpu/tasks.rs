//! What tasks share, and how rows are cut into tasks.

use std::ops::Range;

use super::batch::{Allowed, Batch, STRIP, Strip};
use super::matrix::{Column, Matrix};
use super::tile::WORTH_PACKING;
use super::{lines, panel};
use crate::error::Result;
use crate::kernel::dropout::HeadDraws;
use crate::kernel::element::{Element, Real};
use crate::kernel::shape::Sizes;
use crate::kernel::{Attention, MaskedLogits, Run};
use crate::pattern::edges::EdgeSet;
use crate::plan::lines::Lines;
use crate::pool::Pool;

/// Multiplications below which another thread is not worth waking: a few tens of microseconds.
const WORTH_A_THREAD: usize = 1 << 20;
/// Multiplications per task, about: short enough to balance and to be interrupted, long enough not to count.
const PER_TASK: usize = 1 << 19;
/// Fewer than that where there would not be as many tasks per thread: heads, and rows of a head, cost very differently.
const TASKS_PER_THREAD: usize = 8;
/// But not so few that fetching a task counts.
const LEAST_PER_TASK: usize = 1 << 16;

/// Bytes of tensors that caches do not keep from one operator to the next.
const MORE_THAN_CACHES: usize = 8 << 20;

/// A problem whose arguments fit together.
#[derive(Debug)]
pub(super) struct Call<'a, T: Element> {
    pub problem: &'a Attention<'a, T>,
    pub sizes: Sizes,
    pub scale: T::Acc,
    /// Allowed keys per batch element, where those that are not edges keep a score of 0.
    background_keys: Option<Vec<usize>>,
    /// The heads that the panel kernel computes.
    pub panels: panel::Heads,
    /// The heads that the kernel for lines computes.
    pub lines: lines::Heads,
}

/// One head of a problem, and what the call allows in it.
#[derive(Debug, Clone, Copy)]
pub(super) struct Head<'a, T: Element> {
    pub q: Matrix<'a, T>,
    pub k: Matrix<'a, T>,
    pub v: Matrix<'a, T>,
    pub key_mask: Option<Column<'a, u8>>,
    pub bias: Option<Matrix<'a, T>>,
    pub draws: Option<HeadDraws>,
    /// The number of allowed keys, where those that are not edges keep a score of 0.
    allowed_keys: Option<usize>,
}

impl<'a, T: Element> Call<'a, T> {
    pub(super) fn new(problem: &'a Attention<'a, T>) -> Result<Self> {
        let sizes = problem.check()?;
        let allowed_keys = |batch: usize| match &problem.key_mask {
            Some(mask) => (0..sizes.keys).filter(|&key| mask.at([batch, key]) != 0).count(),
            None => sizes.keys,
        };
        let background_keys = (problem.masked_logits == MaskedLogits::Zero)
            .then(|| (0..sizes.batch).map(allowed_keys).collect());
        let lines = lines::Heads::of(problem, &sizes);
        let panels = panel::Heads::of(problem, &sizes, &lines);
        Ok(Call { problem, sizes, scale: T::Acc::from_f64(problem.scale), background_keys, panels, lines })
    }

    pub(super) fn head(&self, batch: usize, head: usize) -> Head<'a, T> {
        let Attention { q, k, v, key_mask, bias, dropout, .. } = self.problem;
        let kv_head = head / self.sizes.group();
        let index = (batch * self.sizes.heads + head) as u64;
        Head {
            q: Matrix::of(q, batch, head),
            k: Matrix::of(k, batch, kv_head),
            v: Matrix::of(v, batch, kv_head),
            key_mask: key_mask.as_ref().map(|mask| Column::of(mask, [batch, 0])),
            bias: bias.as_ref().map(|bias| Matrix::of(bias, batch, head)),
            draws: dropout
                .as_ref()
                .filter(|dropout| dropout.p > 0.0)
                .map(|dropout| HeadDraws::new(dropout, index)),
            allowed_keys: self.background_keys.as_ref().map(|keys| keys[batch]),
        }
    }

    /// Whether a kernel for regular edges computes head `head` of q.
    pub(super) fn is_regular(&self, batch: usize, head: usize) -> bool {
        self.panels.take(batch, head) || self.lines.take(batch, head)
    }

    /// Whether nothing is left to the general kernels.
    pub(super) fn all_regular(&self) -> bool {
        let Sizes { batch, heads, .. } = self.sizes;
        (0..batch * heads).all(|unit| self.is_regular(unit / heads, unit % heads))
    }

    /// The lines of a head that is computed by them, as its number among those of the batch.
    pub(super) fn lines_of(&self, unit: usize) -> &'a Lines {
        let heads = self.sizes.heads;
        self.problem.plan.head(unit / heads, unit % heads, heads).lines().expect("the head was taken")
    }

    pub(super) fn has_background(&self) -> bool {
        self.background_keys.is_some()
    }

    /// Whether q, k, v and the output are more than caches keep from one operator to the next.
    pub(super) fn exceeds_caches(&self) -> bool {
        let Sizes { batch, heads, kv_heads, queries, keys, dim, value_dim } = self.sizes;
        let rows = heads * queries + kv_heads * keys;
        batch * rows * (dim + value_dim) * size_of::<T>() > MORE_THAN_CACHES
    }

    /// Edges of all heads, taking the first batch element for all: an estimate of the work where their edges differ.
    fn edges(&self) -> usize {
        let Sizes { batch, heads, .. } = self.sizes;
        let (mut total, mut last) = (0, None);
        for head in 0..heads {
            let set = self.problem.plan.head(0, head, heads).by_query();
            let edges = match last {
                Some((counted, edges)) if std::ptr::eq(counted, set) => edges,
                _ => set.nnz(),
            };
            last = Some((set, edges));
            total += edges;
        }
        total.saturating_mul(batch)
    }

    /// The rows of `heads` heads per batch element in tasks, and the threads that are worth using for all of them. A task does
    /// `products` products of its rows per edge.
    pub(super) fn tasks(&self, heads: usize, rows: usize, products: usize, run: &Run) -> (Tasks, Pool) {
        let total = self.sizes.batch * heads * rows;
        let work =
            self.edges().saturating_mul(products).saturating_mul(self.sizes.dim.max(self.sizes.value_dim));
        let per_row = work / total.max(1) + 1;
        let pool = run.pool.at_most(work / WORTH_A_THREAD + 1);
        let per_task = (work / (TASKS_PER_THREAD * pool.parallelism())).clamp(LEAST_PER_TASK, PER_TASK);
        let rows_per_task = (per_task / per_row).max(1).next_multiple_of(super::tile::TILE).min(rows.max(1));
        (Tasks { heads, rows, rows_per_task, per_head: rows.div_ceil(rows_per_task) }, pool)
    }
}

impl<'a, T: Element> Head<'a, T> {
    /// The edges that take part in the softmax.
    pub(super) fn allowed(&self) -> Allowed<'a, T> {
        Allowed { key_mask: self.key_mask, bias: self.bias, by_key: false }
    }

    /// The edges that give values other weights than a background does. One that its bias removes is among them, because it has to
    /// be taken out of the background.
    pub(super) fn allowed_values(&self, by_key: bool) -> Allowed<'a, T> {
        let bias = if self.allowed_keys.is_some() { None } else { self.bias };
        Allowed { key_mask: self.key_mask, bias, by_key }
    }

    /// How many keys that are not edges keep a score of 0 for query `row`.
    pub(super) fn background_keys(&self, edges: &EdgeSet, row: usize) -> usize {
        match (self.allowed_keys, self.key_mask) {
            (None, _) => 0,
            (Some(allowed), None) => allowed - edges.degree(row),
            (Some(allowed), Some(mask)) => {
                let mut runs = Vec::new();
                edges.row(row, &mut runs);
                // SAFETY: the mask has an entry per key.
                allowed - runs.into_iter().flatten().filter(|&key| unsafe { mask.at(key) } != 0).count()
            }
        }
    }

    /// [`Self::background_keys`] of the rows of a strip.
    pub(super) fn background_keys_of(&self, edges: &EdgeSet, strip: &Strip) -> [usize; STRIP] {
        let mut keys = [0; STRIP];
        if self.allowed_keys.is_some() {
            for (slot, keys) in keys.iter_mut().enumerate().take(strip.rows) {
                *keys = self.background_keys(edges, strip.row + slot);
            }
        }
        keys
    }

    /// Multiply `weights`, one per place of `batch`, by dropout's factors.
    #[inline(always)]
    pub(super) fn drop_weights(&self, batch: &Batch, weights: &mut [T::Acc]) {
        if let Some(draws) = &self.draws {
            for strip in &batch.strips {
                for slot in 0..strip.rows {
                    let draws = draws.query(strip.row + slot);
                    for edge in 0..strip.lens[slot] as usize {
                        let place = strip.place(slot, edge);
                        weights[place] *= T::Acc::from_f64(draws.factor(batch.columns[place] as usize));
                    }
                }
            }
        }
    }

    /// Multiply `weights`, one per column of the long row `row`, by dropout's factors.
    #[inline(always)]
    pub(super) fn drop_long_weights(&self, row: usize, columns: &[u32], weights: &mut [T::Acc]) {
        if let Some(draws) = &self.draws {
            let draws = draws.query(row);
            for (weight, &column) in weights.iter_mut().zip(columns) {
                *weight *= T::Acc::from_f64(draws.factor(column as usize));
            }
        }
    }

    /// Where there is a bias, turn the dots of `batch` into scores `dot * scale + bias`. A bias of minus infinity wins over any dot.
    #[inline(always)]
    pub(super) fn add_bias(&self, scale: T::Acc, by_key: bool, batch: &Batch, dots: &mut [T::Acc]) {
        if let Some(bias) = &self.bias {
            batch.for_each_edge(dots, |row, column, dot| {
                *dot = biased(bias, scale, row, column, by_key, *dot)
            });
        }
    }

    /// [`Self::add_bias`] for some columns of the long row `row`.
    #[inline(always)]
    pub(super) fn add_long_bias(
        &self,
        scale: T::Acc,
        row: usize,
        by_key: bool,
        columns: &[u32],
        dots: &mut [T::Acc],
    ) {
        if let Some(bias) = &self.bias {
            for (dot, &column) in dots.iter_mut().zip(columns) {
                *dot = biased(bias, scale, row, column as usize, by_key, *dot);
            }
        }
    }
}

/// The score of an edge with this dot. Rows are keys if `by_key`.
fn biased<T: Element>(
    bias: &Matrix<T>,
    scale: T::Acc,
    row: usize,
    column: usize,
    by_key: bool,
    dot: T::Acc,
) -> T::Acc {
    let (query, key) = if by_key { (column, row) } else { (row, column) };
    // SAFETY: the bias has an entry per (query, key), and edges lie inside that shape.
    let bias = unsafe { bias.at(query, key) }.to_acc();
    if bias == T::Acc::NEG_INFINITY { bias } else { dot * scale + bias }
}

/// Ranges of rows, all heads of the batch after one another.
#[derive(Debug, Clone, Copy)]
pub(super) struct Tasks {
    heads: usize,
    rows: usize,
    rows_per_task: usize,
    per_head: usize,
}

impl Tasks {
    pub(super) fn len(&self, batch: usize) -> usize {
        batch * self.heads * self.per_head
    }

    /// How many tasks a head is.
    pub(super) fn per_head(&self) -> usize {
        self.per_head
    }

    /// The rows of task `part` of a head.
    pub(super) fn rows(&self, part: usize) -> Range<usize> {
        let start = part * self.rows_per_task;
        start..self.rows.min(start + self.rows_per_task)
    }

    /// Batch element, head and rows of a task.
    pub(super) fn get(&self, index: usize) -> (usize, usize, Range<usize>) {
        let (head, part) = (index / self.per_head, index % self.per_head);
        (head / self.heads, head % self.heads, self.rows(part))
    }
}

/// `rows` cut where rows that keep every column begin and end, and whether a part is worth packing as those are: many together,
/// also of which other tasks have the rest, for the bits of a result must not depend on how rows are divided. Where there is one column,
/// a query has one key, and its dS is 0 only if both passes add the channels of a dot in the same order: neither packs.
pub(super) fn runs_of_rows(
    edges: &EdgeSet,
    rows: Range<usize>,
) -> impl Iterator<Item = (Range<usize>, bool)> {
    let mut next = rows.start;
    let is_worth = |rows: usize| rows >= WORTH_PACKING && edges.num_cols() >= WORTH_PACKING;
    // The transpose of a set whose rows are all dense says so by its columns.
    let all_dense = edges.dense_cols().first().is_some_and(|cols| cols.len() == edges.num_cols());
    std::iter::from_fn(move || {
        if next >= rows.end {
            return None;
        }
        let start = next;
        if all_dense {
            next = rows.end;
            return Some((start..next, is_worth(edges.num_rows())));
        }
        let dense = edges.dense_rows().iter().find(|dense| dense.end > start);
        let (end, packed) = match dense {
            Some(dense) if dense.start <= start => (dense.end, is_worth(dense.len())),
            Some(dense) => (dense.start, false),
            None => (rows.end, false),
        };
        next = end.min(rows.end);
        Some((start..next, packed))
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::kernel::Isa;
    use crate::kernel::tests::{Case, Random};
    use crate::pattern::edges::EdgeSet;
    use crate::pool::{Never, simulate};
    use std::sync::Arc;

    /// A dense first row and column, and diagonals whose number depends on the head, as Fibottention has them.
    fn head(tokens: usize, diagonals: usize) -> Arc<EdgeSet> {
        let mut builder = EdgeSet::builder(tokens, tokens).unwrap().global(0..1);
        for index in 0..diagonals {
            builder = builder.diagonal(1 + (index * index) as i64, 0..tokens, 0..tokens);
        }
        Arc::new(builder.build().unwrap())
    }

    #[test]
    fn two_and_sixty_four_threads_are_kept_busy_by_few_heads() {
        // (tokens, batch, heads): from many heads of short sequences to one long sequence.
        for (tokens, batch, heads) in [(197, 16, 12), (1025, 2, 12), (4097, 1, 12), (8193, 1, 12)] {
            let sets: Vec<_> = (0..heads).map(|index| head(tokens, 3 + 4 * index)).collect();
            let sizes = [batch, heads, heads, tokens, tokens, 64, 64];
            let case = Case::<f32>::new(&mut Random(1), sizes, &sets);
            let problem = case.problem();
            let call = Call::new(&problem).unwrap();
            for threads in [1, 2, 64] {
                let run = Run { pool: Pool::of(threads), isa: Isa::Scalar, interrupt: &Never };
                let (tasks, pool) = call.tasks(heads, tokens, 2, &run);
                let costs: Vec<usize> = (0..tasks.len(batch))
                    .map(|index| {
                        let (_, head, rows) = tasks.get(index);
                        rows.map(|row| sets[head].degree(row)).sum()
                    })
                    .collect();
                let used = pool.parallelism();
                let longest = costs.iter().max().copied().unwrap_or(0);
                let ideal = costs.iter().sum::<usize>().div_ceil(used).max(longest);
                let (taken, bound) = (simulate(&costs, used), if threads <= 2 { 105 } else { 130 });
                assert!(
                    taken * 100 <= ideal * bound,
                    "{tokens} tokens, {used} of {threads} threads: {taken}, ideal {ideal}",
                );
            }
        }
    }
}
