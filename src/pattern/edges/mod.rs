//! `EdgeSet`: which keys each query may attend to, for one head, as a few segments and never as an N x N array.
//!
//! Patterns describe themselves with overlapping [`Builder`] calls (bands, rectangles, anti-diagonals, edge lists). `build`
//! turns them into one canonical form whose parts are pairwise disjoint, because a kernel must meet every edge exactly once:
//! dense rows, then dense columns, then diagonals, then per-row runs for what is left. Each part is what some kernel is fast at,
//! and all but the runs cost memory that does not depend on the number of tokens.

mod builder;
mod runs;

use std::ops::Range;

pub use builder::Builder;
pub use runs::Runs;

pub(crate) use super::segments::merge_ranges;
use crate::error::{Error, Result};

/// Edges `(row, row + offset)` for every `row` in `rows`.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub struct Diagonal {
    /// Key index minus query index.
    pub offset: i64,
    /// First row of the diagonal.
    pub start: usize,
    /// One past its last row.
    pub end: usize,
}

impl Diagonal {
    /// The column this diagonal holds in `row`, if it passes through it.
    #[inline]
    pub fn column(&self, row: usize) -> Option<usize> {
        (self.start <= row && row < self.end).then(|| (row as i64 + self.offset) as usize)
    }
}

/// The edges of one head in canonical form. Rows are queries and columns are keys.
///
/// A cell belongs to the first part that covers it: dense row, dense column, diagonal, run. Diagonals and runs never reach into
/// dense rows or columns, nor into each other.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct EdgeSet {
    num_rows: usize,
    num_cols: usize,
    dense_rows: Vec<Range<usize>>,
    dense_cols: Vec<Range<usize>>,
    diagonals: Vec<Diagonal>,
    runs: Runs,
}

impl EdgeSet {
    /// Start describing the edges of a `num_rows` x `num_cols` mask.
    ///
    /// # Errors
    /// [`Error::Overflow`] when a side does not fit 32 bits, the width in which irregular columns are stored.
    pub fn builder(num_rows: usize, num_cols: usize) -> Result<Builder> {
        for (what, size) in [("number of queries", num_rows), ("number of keys", num_cols)] {
            if size >= u32::MAX as usize {
                return Err(Error::Overflow { what, size: size as u128, limit: u32::MAX as u128 - 1 });
            }
        }
        Ok(Builder::new(num_rows, num_cols))
    }

    /// Number of queries.
    pub fn num_rows(&self) -> usize {
        self.num_rows
    }

    /// Number of keys.
    pub fn num_cols(&self) -> usize {
        self.num_cols
    }

    /// Ranges of rows that keep every column; ascending, not touching.
    pub fn dense_rows(&self) -> &[Range<usize>] {
        &self.dense_rows
    }

    /// Ranges of columns kept by every row; ascending, not touching.
    pub fn dense_cols(&self) -> &[Range<usize>] {
        &self.dense_cols
    }

    /// Diagonals, ascending by offset and then by first row.
    pub fn diagonals(&self) -> &[Diagonal] {
        &self.diagonals
    }

    /// What no other part can express.
    pub fn runs(&self) -> &Runs {
        &self.runs
    }

    /// Whether `row` keeps every column.
    #[inline]
    pub fn is_dense_row(&self, row: usize) -> bool {
        self.dense_rows.iter().any(|range| range.contains(&row))
    }

    /// Number of edges.
    pub fn nnz(&self) -> usize {
        let dense_rows: usize = self.dense_rows.iter().map(ExactSizeIterator::len).sum();
        let dense_cols: usize = self.dense_cols.iter().map(ExactSizeIterator::len).sum();
        dense_rows * self.num_cols
            + dense_cols * (self.num_rows - dense_rows)
            + self.diagonals.iter().map(|d| d.end - d.start).sum::<usize>()
            + self.runs.nnz()
    }

    /// Number of edges `(row, col)` with `row >= prefix` and `col >= prefix`: those between patches.
    pub fn nnz_after(&self, prefix: usize) -> usize {
        let after = |range: &Range<usize>| range.end.saturating_sub(range.start.max(prefix));
        let dense_rows: usize = self.dense_rows.iter().map(after).sum();
        let dense_cols: usize = self.dense_cols.iter().map(after).sum();
        let cols = self.num_cols.saturating_sub(prefix);
        let rows = self.num_rows.saturating_sub(prefix);
        let diagonals = self.diagonals.iter().map(|d| {
            let first = (d.start as i64).max(prefix as i64).max(prefix as i64 - d.offset);
            (d.end as i64 - first).max(0) as usize
        });
        let runs = if self.runs.is_empty() {
            0
        } else {
            (prefix..self.num_rows).flat_map(|row| self.runs.row(row)).map(|run| after(&run)).sum()
        };
        dense_rows * cols + dense_cols * (rows - dense_rows) + diagonals.sum::<usize>() + runs
    }

    /// Append the columns of `row` to `out`, each exactly once and always in the same order (dense columns, diagonals, runs).
    #[inline]
    pub fn columns(&self, row: usize, out: &mut Vec<u32>) {
        if self.is_dense_row(row) {
            out.extend(0..self.num_cols as u32);
            return;
        }
        for range in &self.dense_cols {
            out.extend(range.start as u32..range.end as u32);
        }
        out.extend(self.diagonals.iter().filter_map(|diagonal| diagonal.column(row)).map(|col| col as u32));
        for run in self.runs.row(row) {
            out.extend(run.start as u32..run.end as u32);
        }
    }

    /// Replace `out` by the columns of `row` as ascending runs that neither overlap nor touch.
    pub fn row(&self, row: usize, out: &mut Vec<Range<usize>>) {
        out.clear();
        if self.is_dense_row(row) {
            out.push(0..self.num_cols);
        } else {
            out.extend(self.dense_cols.iter().cloned());
            out.extend(
                self.diagonals.iter().filter_map(|diagonal| diagonal.column(row)).map(|col| col..col + 1),
            );
            out.extend(self.runs.row(row));
            merge_ranges(out);
        }
    }

    /// Number of columns that `row` keeps.
    pub fn degree(&self, row: usize) -> usize {
        if self.is_dense_row(row) {
            return self.num_cols;
        }
        self.dense_cols.iter().map(ExactSizeIterator::len).sum::<usize>()
            + self.diagonals.iter().filter(|diagonal| diagonal.column(row).is_some()).count()
            + self.runs.row(row).map(|run| run.len()).sum::<usize>()
    }

    /// Every edge `(row, col)` once, ascending by row and then by column.
    pub fn iter(&self) -> impl Iterator<Item = (usize, usize)> + '_ {
        (0..self.num_rows).flat_map(move |row| {
            let mut runs = Vec::new();
            self.row(row, &mut runs);
            runs.into_iter().flatten().map(move |col| (row, col))
        })
    }

    /// Whether the mask keeps everything.
    pub fn is_full(&self) -> bool {
        self.nnz() == self.num_rows * self.num_cols
    }

    /// The edges with queries and keys exchanged.
    #[must_use]
    pub fn transposed(&self) -> Self {
        let mut diagonals: Vec<_> = self
            .diagonals
            .iter()
            .map(|d| Diagonal {
                offset: -d.offset,
                start: (d.start as i64 + d.offset) as usize,
                end: (d.end as i64 + d.offset) as usize,
            })
            .collect();
        diagonals.sort_unstable();
        EdgeSet {
            num_rows: self.num_cols,
            num_cols: self.num_rows,
            dense_rows: self.dense_cols.clone(),
            dense_cols: self.dense_rows.clone(),
            diagonals,
            runs: self.runs.transposed(self.num_rows, self.num_cols),
        }
    }

    /// The edges `(row, col)` with `row >= prefix` and `col >= prefix`, counted from there: those between patches.
    #[must_use]
    pub fn after(&self, prefix: usize) -> Self {
        let (num_rows, num_cols) =
            (self.num_rows.saturating_sub(prefix), self.num_cols.saturating_sub(prefix));
        let moved = |ranges: &[Range<usize>]| -> Vec<Range<usize>> {
            let cut = ranges.iter().map(|r| r.start.saturating_sub(prefix)..r.end.saturating_sub(prefix));
            cut.filter(|range| !range.is_empty()).collect()
        };
        let diagonals = self.diagonals.iter().filter_map(|d| {
            let first = (d.start as i64).max(prefix as i64).max(prefix as i64 - d.offset);
            let (start, end) = (first as usize - prefix, d.end.saturating_sub(prefix));
            (start < end).then_some(Diagonal { offset: d.offset, start, end })
        });
        EdgeSet {
            num_rows,
            num_cols,
            dense_rows: moved(&self.dense_rows),
            dense_cols: moved(&self.dense_cols),
            diagonals: diagonals.collect(),
            runs: self.runs.after(prefix, self.num_rows),
        }
    }

    /// Bytes held, for the plan cache's bound.
    pub fn bytes(&self) -> usize {
        size_of::<Self>()
            + (self.dense_rows.len() + self.dense_cols.len()) * size_of::<Range<usize>>()
            + self.diagonals.len() * size_of::<Diagonal>()
            + self.runs.bytes()
    }
}

#[cfg(test)]
pub(super) mod tests;
