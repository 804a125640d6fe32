//! The edges of a few rows as flat lists, cut so that everything computed from them stays in the innermost cache.

use std::ops::Range;

use super::matrix::{Column, Matrix, padded};
use crate::kernel::element::{Element, Real};
use crate::pattern::edges::{Diagonal, EdgeSet};

/// Rows per batch: enough to keep the arithmetic units busy while single rows wait for their own results.
pub(super) const ROWS: usize = 16;
/// Edges per batch, and per piece of a row that is longer.
pub(super) const EDGES: usize = 2048;

/// Some edges of one row.
#[derive(Debug, Clone, Copy)]
pub(super) struct Piece {
    pub row: usize,
    /// Where its edges start in the batch: a multiple of every register's length.
    pub start: usize,
    /// Number of edges.
    pub len: usize,
    /// Whether no earlier piece belongs to the row.
    pub first: bool,
    /// Whether no later piece belongs to the row.
    pub last: bool,
}

impl Piece {
    pub fn edges(&self) -> Range<usize> {
        self.start..self.start + self.len
    }

    /// The edges and the padding behind them.
    pub fn padded_edges(&self) -> Range<usize> {
        self.start..self.start + padded(self.len)
    }
}

/// Pieces of rows: any number of whole rows (empty ones too), or one piece of a long row.
#[derive(Debug, Default)]
pub(super) struct Batch {
    pub pieces: Vec<Piece>,
    /// The columns of all edges. Padding repeats a column of its row, so that reading a few more than asked for stays in bounds.
    pub columns: Vec<u32>,
}

impl Batch {
    fn clear(&mut self) {
        self.pieces.clear();
        self.columns.clear();
    }

    /// Make a piece of the columns appended since `start`, as far as `allowed` lets them.
    fn close<T: Element>(&mut self, row: usize, start: usize, ends: (bool, bool), allowed: &Allowed<T>) {
        if allowed.is_restricted() {
            let mut kept = start;
            for edge in start..self.columns.len() {
                let column = self.columns[edge];
                self.columns[kept] = column;
                kept += usize::from(allowed.keeps(row, column as usize));
            }
            self.columns.truncate(kept);
        }
        let len = self.columns.len() - start;
        if let Some(&column) = self.columns[start..].last() {
            self.columns.resize(start + padded(len), column);
        }
        self.pieces.push(Piece { row, start, len, first: ends.0, last: ends.1 });
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
}

/// Lists of a cursor, kept from one use to the next.
#[derive(Debug, Default)]
pub(super) struct Lists {
    /// Diagonals that pass through the rows of a unit.
    near: Vec<Diagonal>,
    /// Diagonals that pass through the rows of a batch.
    active: Vec<Diagonal>,
    /// What is left of a long row, last run first.
    rest: Vec<Range<usize>>,
    /// By how much the columns of a row are further than those of the row before it.
    steps: Vec<u32>,
}

/// Walks over the edges of some rows, batch by batch.
#[derive(Debug)]
pub(super) struct Cursor<'a, T> {
    edges: &'a EdgeSet,
    rows: Range<usize>,
    allowed: Allowed<'a, T>,
    lists: &'a mut Lists,
    /// Columns that every row keeps.
    dense_cols: usize,
    /// Whether the first of `rows` is a long row already begun.
    begun: bool,
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
        lists.rest.clear();
        let dense_cols = edges.dense_cols().iter().map(ExactSizeIterator::len).sum();
        Cursor { edges, rows, allowed, lists, dense_cols, begun: false }
    }

    /// Fill `batch` with the next edges; `false` when there are no rows left.
    pub(super) fn next(&mut self, batch: &mut Batch) -> bool {
        batch.clear();
        let rows = self.rows.start..self.rows.end.min(self.rows.start + ROWS);
        if self.begun {
            self.continue_long_row(batch, false);
            return true;
        }
        self.lists.active.clear();
        self.lists
            .active
            .extend(self.lists.near.iter().filter(|d| d.start < rows.end && rows.start < d.end).cloned());
        let all_through = self.lists.active.iter().all(|d| d.start <= rows.start && rows.end <= d.end);
        if all_through && self.are_parallel(&rows) {
            self.fill_with_parallel_rows(rows, batch);
            return !batch.pieces.is_empty();
        }
        for row in rows {
            let is_dense = self.edges.is_dense_row(row);
            let most = if is_dense { self.edges.num_cols() } else { self.at_most(row) };
            if most > EDGES {
                if batch.pieces.is_empty() {
                    self.edges.row(row, &mut self.lists.rest);
                    self.lists.rest.reverse();
                    self.continue_long_row(batch, true);
                }
                return true;
            }
            let start = batch.columns.len();
            if start + padded(most) > EDGES {
                return true;
            }
            if is_dense {
                batch.columns.extend(0..self.edges.num_cols() as u32);
            } else {
                self.append(row, all_through, &mut batch.columns);
            }
            batch.close(row, start, (true, true), &self.allowed);
            self.rows.start += 1;
        }
        !batch.pieces.is_empty()
    }

    /// Whether `rows`, which all diagonals near them pass through, keep nothing but these and dense columns, few enough for a batch.
    fn are_parallel(&self, rows: &Range<usize>) -> bool {
        self.edges.runs().is_empty()
            && !self.allowed.is_restricted()
            && padded(self.dense_cols + self.lists.active.len()) <= EDGES
            && !self.edges.dense_rows().iter().any(|dense| dense.start < rows.end && rows.start < dense.end)
    }

    /// Every row is the one before it, moved along the diagonals: no need to look at the edges again.
    fn fill_with_parallel_rows(&mut self, rows: Range<usize>, batch: &mut Batch) {
        if rows.is_empty() {
            return;
        }
        self.append(rows.start, true, &mut batch.columns);
        batch.close(rows.start, 0, (true, true), &self.allowed);
        let (first, width) = (batch.pieces[0], batch.columns.len());
        let steps = &mut self.lists.steps;
        steps.clear();
        steps.resize(self.dense_cols, 0);
        steps.resize(first.len, 1);
        steps.resize(width, steps.last().copied().unwrap_or(0));
        let count = rows.len().min(EDGES / width.max(1));
        for row in rows.start + 1..rows.start + count {
            let start = batch.columns.len();
            batch.columns.extend_from_within(start - width..);
            batch.columns[start..].iter_mut().zip(&*steps).for_each(|(column, step)| *column += step);
            batch.pieces.push(Piece { row, start, ..first });
        }
        self.rows.start += count;
    }

    /// No fewer than the columns of `row`, which is not dense.
    fn at_most(&self, row: usize) -> usize {
        let runs: usize = self.edges.runs().row(row).map(|run| run.len()).sum();
        self.dense_cols + self.lists.active.len() + runs
    }

    /// Append the columns of `row`, which is not dense.
    fn append(&self, row: usize, all_through: bool, columns: &mut Vec<u32>) {
        for range in self.edges.dense_cols() {
            columns.extend(range.start as u32..range.end as u32);
        }
        if all_through {
            columns.extend(self.lists.active.iter().map(|d| (row as i64 + d.offset) as u32));
        } else {
            columns
                .extend(self.lists.active.iter().filter_map(|d| d.column(row)).map(|column| column as u32));
        }
        for run in self.edges.runs().row(row) {
            columns.extend(run.start as u32..run.end as u32);
        }
    }

    /// The next piece of the first row, whose remaining runs are listed.
    fn continue_long_row(&mut self, batch: &mut Batch, first: bool) {
        while batch.columns.len() < EDGES
            && let Some(run) = self.lists.rest.last_mut()
        {
            let end = run.end.min(run.start + EDGES - batch.columns.len());
            batch.columns.extend(run.start as u32..end as u32);
            run.start = end;
            if run.start == run.end {
                self.lists.rest.pop();
            }
        }
        let last = self.lists.rest.is_empty();
        batch.close(self.rows.start, 0, (first, last), &self.allowed);
        self.begun = !last;
        self.rows.start += usize::from(last);
    }
}
