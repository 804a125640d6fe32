//! The edges of a few rows as lists, four rows beside each other, cut so that everything computed from them stays in the innermost
//! caches.

use std::ops::Range;

use super::matrix::{Column, Matrix};
use crate::kernel::element::{Element, Real};
use crate::pattern::edges::{Diagonal, EdgeSet};

/// Rows per strip.
pub(super) const STRIP: usize = 4;
/// Edges of a row per block.
pub(super) const GROUP: usize = 4;
/// Places per block: [`GROUP`] edges of each of [`STRIP`] rows, the edges of one row after those of another.
pub(super) const BLOCK: usize = STRIP * GROUP;
/// Rows per batch: enough to keep the arithmetic units busy while single rows wait for their own results.
pub(super) const ROWS: usize = 16;
/// Places per batch.
pub(super) const PLACES: usize = 2048;
/// A row with more edges is long: it is worked on alone, a piece at a time.
const LONG: usize = PLACES / STRIP;
/// Edges per piece of a long row.
pub(super) const PIECE: usize = 2048;

/// Up to [`STRIP`] neighbouring rows, whose edges lie in the same blocks.
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct Strip {
    /// The first row.
    pub row: usize,
    /// How many rows there are.
    pub rows: usize,
    /// Edges of each row; 0 for those that are not there.
    pub lens: [u32; STRIP],
    /// Where the blocks begin in the batch.
    pub start: usize,
    /// Number of blocks.
    pub blocks: usize,
}

impl Strip {
    /// How many edges every row of a whole strip has; 0 where it is not whole.
    #[inline(always)]
    pub(super) fn common(&self) -> usize {
        let [a, b, c, d] = self.lens;
        a.min(b).min(c.min(d)) as usize
    }

    /// Places of all edges.
    #[inline(always)]
    pub(super) fn places(&self) -> Range<usize> {
        self.start..self.start + self.blocks * BLOCK
    }

    /// The place of edge `edge` of the strip's row `slot`.
    #[inline(always)]
    pub(super) fn place(&self, slot: usize, edge: usize) -> usize {
        self.start + edge / GROUP * BLOCK + slot * GROUP + edge % GROUP
    }
}

/// Some strips and the columns of their edges.
#[derive(Debug, Default)]
pub(super) struct Batch {
    pub strips: Vec<Strip>,
    /// The column at every place. Places beyond a row's edges repeat a column of the row, so that reading them reads nothing else;
    /// those of a row without edges name any column.
    pub columns: Vec<u32>,
    /// How far the columns of a strip move from one strip to the next.
    steps: Vec<u32>,
}

impl Batch {
    /// Call `edit` with the row, the column and the number of every edge.
    #[inline(always)]
    pub(super) fn for_each_edge<R>(&self, numbers: &mut [R], mut edit: impl FnMut(usize, usize, &mut R)) {
        for strip in &self.strips {
            for slot in 0..strip.rows {
                for edge in 0..strip.lens[slot] as usize {
                    let place = strip.place(slot, edge);
                    edit(strip.row + slot, self.columns[place] as usize, &mut numbers[place]);
                }
            }
        }
    }
}

/// What a call allows beyond the plan.
#[derive(Debug, Clone, Copy)]
pub(super) struct Allowed<'a, T> {
    /// Non-zero = keep, per key.
    pub key_mask: Option<Column<'a, u8>>,
    /// Minus infinity = drop, per (query, key).
    pub bias: Option<Matrix<'a, T>>,
    /// Whether rows are keys.
    pub by_key: bool,
}

impl<T: Element> Allowed<'_, T> {
    fn is_restricted(&self) -> bool {
        self.key_mask.is_some() || self.bias.is_some()
    }

    /// Whether the call allows key `key` at all.
    pub(super) fn keeps_key(&self, key: usize) -> bool {
        // SAFETY: the mask has an entry per key.
        self.key_mask.is_none_or(|mask| unsafe { mask.at(key) } != 0)
    }

    /// Replace `keys` by up to `limit` of the keys in `next..end` that the call allows, and move `next` behind them; `false` when
    /// there are none.
    pub(super) fn take_keys(&self, next: &mut usize, end: usize, limit: usize, keys: &mut Vec<u32>) -> bool {
        keys.clear();
        while *next < end && keys.len() < limit {
            if self.keeps_key(*next) {
                keys.push(*next as u32);
            }
            *next += 1;
        }
        !keys.is_empty()
    }

    /// Whether the call allows `column` in `row`.
    pub(super) fn keeps(&self, row: usize, column: usize) -> bool {
        let (query, key) = if self.by_key { (column, row) } else { (row, column) };
        self.keeps_key(key)
            // SAFETY: the bias has an entry per (query, key).
            && self.bias.is_none_or(|bias| unsafe { bias.at(query, key) }.to_acc() != T::Acc::NEG_INFINITY)
    }

    /// Drop the columns of `row` that the call does not allow.
    fn restrict(&self, row: usize, columns: &mut Vec<u32>) {
        if self.is_restricted() {
            columns.retain(|&column| self.keeps(row, column as usize));
        }
    }
}

/// Lists of a cursor, kept from one use to the next.
#[derive(Debug, Default)]
pub(super) struct Lists {
    /// Diagonals that pass through the rows of a cursor.
    near: Vec<Diagonal>,
    /// The columns of the rows of a strip.
    rows: [Vec<u32>; STRIP],
    /// What is left of a long row, last run first.
    rest: Vec<Range<usize>>,
    /// The columns of a piece of a long row.
    piece: Vec<u32>,
}

/// What a cursor comes to next.
pub(super) enum Next {
    /// The batch holds the next strips.
    Batch,
    /// A row too long for a batch; its pieces come from [`Cursor::piece`].
    LongRow {
        /// Its number.
        row: usize,
        /// Whether there can be more than one piece.
        in_pieces: bool,
    },
}

/// Walks over the edges of some rows.
#[derive(Debug)]
pub(super) struct Cursor<'a, T> {
    edges: &'a EdgeSet,
    rows: Range<usize>,
    allowed: Allowed<'a, T>,
    lists: &'a mut Lists,
    /// Columns that every row keeps.
    dense_cols: usize,
    /// Whether rows between the ends of diagonals are moved copies of each other.
    is_regular: bool,
    /// The long row that was announced.
    long_row: usize,
}

impl<'a, T: Element> Cursor<'a, T> {
    pub(super) fn new(
        edges: &'a EdgeSet,
        rows: Range<usize>,
        allowed: Allowed<'a, T>,
        lists: &'a mut Lists,
    ) -> Self {
        lists.near.clear();
        lists
            .near
            .extend(edges.diagonals().iter().filter(|d| d.start < rows.end && rows.start < d.end).cloned());
        let dense_cols = edges.dense_cols().iter().map(ExactSizeIterator::len).sum();
        let meets_dense =
            edges.dense_rows().iter().any(|dense| dense.start < rows.end && rows.start < dense.end);
        let is_regular = edges.runs().is_empty() && !allowed.is_restricted() && !meets_dense;
        Cursor { edges, rows, allowed, lists, dense_cols, is_regular, long_row: 0 }
    }

    /// The next strips in `batch`, or the next long row; `None` when there are no rows left.
    pub(super) fn next(&mut self, batch: &mut Batch) -> Option<Next> {
        batch.strips.clear();
        batch.columns.clear();
        let end = self.rows.end.min(self.rows.start + ROWS);
        while self.rows.start < end {
            let row = self.rows.start;
            let mut rows = (end - row).min(STRIP);
            let mut longest = 0;
            for index in 0..rows {
                let most = self.at_most(row + index);
                if most > LONG {
                    rows = index;
                    break;
                }
                longest = longest.max(most);
            }
            if rows == 0 {
                if batch.strips.is_empty() {
                    self.rows.start += 1;
                    self.begin_long_row(row);
                    return Some(Next::LongRow { row, in_pieces: self.at_most(row) > PIECE });
                }
                break;
            }
            if batch.columns.len() + longest.next_multiple_of(GROUP) * STRIP > PLACES {
                break;
            }
            self.append(row, rows, batch);
            self.rows.start += rows;
            if rows == STRIP && self.is_regular {
                self.append_moved_copies(end, batch);
            }
        }
        (!batch.strips.is_empty()).then_some(Next::Batch)
    }

    /// The next allowed columns of the long row; `None` when there are no more.
    pub(super) fn piece(&mut self) -> Option<&[u32]> {
        let Lists { rest, piece, .. } = &mut *self.lists;
        while !rest.is_empty() {
            piece.clear();
            while piece.len() < PIECE
                && let Some(run) = rest.last_mut()
            {
                let end = run.end.min(run.start + PIECE - piece.len());
                piece.extend(run.start as u32..end as u32);
                run.start = end;
                if run.start == run.end {
                    rest.pop();
                }
            }
            self.allowed.restrict(self.long_row, piece);
            if !piece.is_empty() {
                return Some(piece);
            }
        }
        None
    }

    fn begin_long_row(&mut self, row: usize) {
        self.long_row = row;
        self.edges.row(row, &mut self.lists.rest);
        self.lists.rest.reverse();
    }

    /// No fewer than the columns of `row`.
    fn at_most(&self, row: usize) -> usize {
        if !self.is_regular && self.edges.is_dense_row(row) {
            return self.edges.num_cols();
        }
        let runs: usize = self.edges.runs().row(row).map(|run| run.len()).sum();
        self.dense_cols + self.lists.near.len() + runs
    }

    /// Append the strip of `rows` rows from `row` on, none of them long.
    fn append(&mut self, row: usize, rows: usize, batch: &mut Batch) {
        let mut strip = Strip { row, rows, start: batch.columns.len(), ..Strip::default() };
        for slot in 0..rows {
            let list = &mut self.lists.rows[slot];
            list.clear();
            if self.edges.is_dense_row(row + slot) {
                list.extend(0..self.edges.num_cols() as u32);
            } else {
                for range in self.edges.dense_cols() {
                    list.extend(range.start as u32..range.end as u32);
                }
                list.extend(
                    self.lists.near.iter().filter_map(|d| d.column(row + slot)).map(|column| column as u32),
                );
                for run in self.edges.runs().row(row + slot) {
                    list.extend(run.start as u32..run.end as u32);
                }
            }
            self.allowed.restrict(row + slot, list);
            strip.lens[slot] = list.len() as u32;
        }
        strip.blocks = (strip.lens.into_iter().max().unwrap_or(0) as usize).div_ceil(GROUP);
        batch.columns.resize(strip.start + strip.blocks * BLOCK, 0);
        let blocks = batch.columns[strip.start..].as_chunks_mut::<BLOCK>().0;
        for slot in 0..STRIP {
            let list: &[u32] = if slot < rows { &self.lists.rows[slot] } else { &[] };
            let mut last = list.last().copied().unwrap_or(0);
            let mut columns = list.iter();
            for block in &mut *blocks {
                for place in &mut block[slot * GROUP..(slot + 1) * GROUP] {
                    last = columns.next().copied().unwrap_or(last);
                    *place = last;
                }
            }
        }
        batch.strips.push(strip);
    }

    /// After a strip of parallel rows: until a diagonal begins or ends, every strip is the one before it, moved along the diagonals.
    fn append_moved_copies(&mut self, end: usize, batch: &mut Batch) {
        let Some(&(mut strip)) = batch.strips.last() else { return };
        let mut limit = end;
        for d in &self.lists.near {
            for edge in [d.start, d.end] {
                if edge > strip.row {
                    limit = limit.min(edge);
                }
            }
        }
        let width = strip.blocks * BLOCK;
        if limit < strip.row + 2 * STRIP || width == 0 {
            return;
        }
        batch.steps.clear();
        batch.steps.resize(width, STRIP as u32);
        let (len, dense) = (strip.lens[0] as usize, self.dense_cols);
        for edge in 0..dense {
            for slot in 0..STRIP {
                batch.steps[edge / GROUP * BLOCK + slot * GROUP + edge % GROUP] = 0;
            }
        }
        // The padding repeats the last column.
        if len == dense {
            batch.steps.fill(0);
        }
        while self.rows.start + STRIP <= limit && batch.columns.len() + width <= PLACES {
            let start = batch.columns.len();
            batch.columns.extend_from_within(start - width..);
            batch.columns[start..].iter_mut().zip(&batch.steps).for_each(|(column, step)| *column += step);
            strip.row += STRIP;
            strip.start = start;
            batch.strips.push(strip);
            self.rows.start += STRIP;
        }
    }
}
