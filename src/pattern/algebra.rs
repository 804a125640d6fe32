//! Set operations on edges: union, intersection, difference and complement.
//!
//! Dense rows, dense columns and diagonals meet each other as whole segments. Only what is irregular in one of the operands is
//! walked row by row, so time and memory are proportional to the rows plus the edges of the operands. The complement of a
//! sparse set is dense; it is held as a few runs per row, never as cells.

use std::ops::Range;
use std::sync::Arc;

use super::HeadEdges;
use super::edges::{Builder, Diagonal, EdgeSet};
use super::segments::{merge_ranges, subtract_ranges};
use crate::error::{Error, Result};

/// A set operation on two operands.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Operation {
    /// Edges of either.
    Union,
    /// Edges of both.
    Intersection,
    /// Edges of the first that are not in the second.
    Difference,
}

impl Operation {
    /// Apply to the edges of one head.
    ///
    /// # Errors
    /// [`Error::Shape`] when the operands differ in size, [`Error::Value`] when the result does not fit in memory.
    pub fn apply(self, a: &EdgeSet, b: &EdgeSet) -> Result<EdgeSet> {
        match self {
            Operation::Union => a.union(b),
            Operation::Intersection => a.intersection(b),
            Operation::Difference => a.difference(b),
        }
    }

    /// Apply head by head. An operand with one edge set shares it among all heads, and heads whose operands are shared share
    /// the result.
    ///
    /// # Errors
    /// [`Error::Shape`] when the operands differ in size or in their number of heads.
    pub fn apply_per_head(self, a: &HeadEdges, b: &HeadEdges) -> Result<HeadEdges> {
        if a.is_empty() || b.is_empty() || (a.len() != b.len() && a.len() != 1 && b.len() != 1) {
            return Err(Error::Shape(format!(
                "expected masks with the same number of heads, got {} and {}",
                a.len(),
                b.len()
            )));
        }
        let heads = a.len().max(b.len());
        let operands = |head: usize| (&a[head % a.len()], &b[head % b.len()]);
        let mut results = HeadEdges::with_capacity(heads);
        for head in 0..heads {
            let (x, y) = operands(head);
            let earlier = (0..head).find(|&other| {
                let (p, q) = operands(other);
                Arc::ptr_eq(p, x) && Arc::ptr_eq(q, y)
            });
            results.push(match earlier {
                Some(earlier) => Arc::clone(&results[earlier]),
                None => Arc::new(self.apply(x, y)?),
            });
        }
        Ok(results)
    }
}

impl EdgeSet {
    /// Edges of `self` or `other`.
    ///
    /// # Errors
    /// [`Error::Shape`] when the operands differ in size, [`Error::Value`] when the result does not fit in memory.
    pub fn union(&self, other: &EdgeSet) -> Result<EdgeSet> {
        same_size(self, other)?.shifted(self, 0).shifted(other, 0).build()
    }

    /// Edges of both `self` and `other`.
    ///
    /// # Errors
    /// [`Error::Shape`] when the operands differ in size, [`Error::Value`] when the result does not fit in memory.
    pub fn intersection(&self, other: &EdgeSet) -> Result<EdgeSet> {
        let mut builder = same_size(self, other)?;
        let (all_rows, all_cols) = (0..self.num_rows(), 0..self.num_cols());
        for rows in overlaps(self.dense_rows(), other.dense_rows()) {
            builder = builder.rect(rows, all_cols.clone());
        }
        for cols in overlaps(self.dense_cols(), other.dense_cols()) {
            builder = builder.rect(all_rows.clone(), cols);
        }
        for (dense, sparse) in [(self, other), (other, self)] {
            // Corners that lie in a row or column dense in both are there already, and would only be runs to sort out.
            let (mut rows, mut cols) = (dense.dense_rows().to_vec(), sparse.dense_cols().to_vec());
            subtract_ranges(&mut rows, sparse.dense_rows().iter().cloned());
            subtract_ranges(&mut cols, dense.dense_cols().iter().cloned());
            for rows in &rows {
                for cols in &cols {
                    builder = builder.rect(rows.clone(), cols.clone());
                }
            }
            for diagonal in sparse.diagonals() {
                let through = diagonal.start..diagonal.end;
                for rows in overlaps(dense.dense_rows(), std::slice::from_ref(&through)) {
                    builder = builder.diagonal(diagonal.offset, rows, all_cols.clone());
                }
                for cols in dense.dense_cols() {
                    builder = builder.diagonal(diagonal.offset, through.clone(), cols.clone());
                }
            }
        }
        for diagonal in self.diagonals() {
            for twin in same_offset(other, diagonal.offset) {
                let rows = diagonal.start.max(twin.start)..diagonal.end.min(twin.end);
                builder = builder.diagonal(diagonal.offset, rows, all_cols.clone());
            }
        }
        if self.runs().is_empty() && other.runs().is_empty() {
            return builder.build();
        }
        let mut irregular = Rows::new(self.num_rows(), self.num_cols())?;
        let mut covered = Vec::new();
        for row in all_rows {
            for (runs, other) in [(self.runs(), other), (other.runs(), self)] {
                if runs.row(row).next().is_some() {
                    other.row(row, &mut covered);
                    irregular.extend(&overlaps(&runs.row(row).collect::<Vec<_>>(), &covered))?;
                }
            }
            irregular.close_row(row);
        }
        irregular.add_to(builder).build()
    }

    /// Edges of `self` that are not in `other`.
    ///
    /// # Errors
    /// [`Error::Shape`] when the operands differ in size, [`Error::Value`] when the result does not fit in memory.
    pub fn difference(&self, other: &EdgeSet) -> Result<EdgeSet> {
        let mut builder = same_size(self, other)?;
        let (num_rows, num_cols) = (self.num_rows(), self.num_cols());
        let open_rows = outside(other.dense_rows(), num_rows);
        let only_dense = other.diagonals().is_empty() && other.runs().is_empty();
        if only_dense {
            let open_cols = outside(other.dense_cols(), num_cols);
            for rows in overlaps(self.dense_rows(), &open_rows) {
                for cols in &open_cols {
                    builder = builder.rect(rows.clone(), cols.clone());
                }
            }
            for cols in overlaps(self.dense_cols(), &open_cols) {
                for rows in &open_rows {
                    builder = builder.rect(rows.clone(), cols.clone());
                }
            }
        }
        // Dense columns that `other` never touches stay dense.
        let mut broken_cols = self.dense_cols().to_vec();
        if !only_dense && other.dense_rows().is_empty() {
            let untouched = outside(&touched_columns(other)?, num_cols);
            for cols in overlaps(self.dense_cols(), &untouched) {
                builder = builder.rect(0..num_rows, cols);
            }
            subtract_ranges(&mut broken_cols, untouched.into_iter());
        }
        // A diagonal that a run of `other` crosses breaks into pieces: it becomes irregular as a whole.
        let crossed = crossed_by_runs(self, other);
        let mut broken_diagonals = Vec::new();
        for (diagonal, crossed) in self.diagonals().iter().zip(crossed) {
            if crossed {
                broken_diagonals.push(diagonal.clone());
                continue;
            }
            let to_row = |col: usize| (col as i64 - diagonal.offset).max(0) as usize;
            let through = diagonal.start..diagonal.end;
            let mut rows = overlaps(&open_rows, std::slice::from_ref(&through));
            subtract_ranges(&mut rows, other.dense_cols().iter().map(|c| to_row(c.start)..to_row(c.end)));
            subtract_ranges(&mut rows, same_offset(other, diagonal.offset).iter().map(|d| d.start..d.end));
            for rows in rows {
                builder = builder.diagonal(diagonal.offset, rows, 0..num_cols);
            }
        }
        // What is left is irregular, if anything: rows that `other` breaks up, columns that it breaks up, and runs.
        let broken_rows = !only_dense && !self.dense_rows().is_empty();
        let broken_cols = if only_dense { Vec::new() } else { broken_cols };
        if broken_diagonals.is_empty() && !broken_rows && broken_cols.is_empty() && self.runs().is_empty() {
            return builder.build();
        }
        let mut irregular = Rows::new(num_rows, num_cols)?;
        let mut broken_diagonals = Sweep::new(broken_diagonals);
        let (mut kept, mut removed) = (Vec::new(), Vec::new());
        for row in 0..num_rows {
            kept.clear();
            broken_diagonals.columns(row, &mut kept);
            if !self.is_dense_row(row) {
                kept.extend(self.runs().row(row));
                kept.extend(broken_cols.iter().cloned());
            } else if broken_rows {
                kept.push(0..num_cols);
            }
            if !kept.is_empty() {
                merge_ranges(&mut kept);
                other.row(row, &mut removed);
                subtract_ranges(&mut kept, removed.iter().cloned());
                irregular.extend(&kept)?;
            }
            irregular.close_row(row);
        }
        irregular.add_to(builder).build()
    }

    /// Every pair that is not an edge.
    ///
    /// # Errors
    /// [`Error::Value`] when its runs do not fit in memory.
    pub fn complement(&self) -> Result<EdgeSet> {
        let (rows, cols) = (self.num_rows(), self.num_cols());
        EdgeSet::builder(rows, cols)?.rect(0..rows, 0..cols).build()?.difference(self)
    }

    /// Jaccard index: edges of both over edges of either, 1 for two empty sets.
    ///
    /// # Errors
    /// [`Error::Shape`] when the operands differ in size, [`Error::Value`] when the result does not fit in memory.
    pub fn jaccard(&self, other: &EdgeSet) -> Result<f64> {
        let both = self.intersection(other)?.nnz();
        let either = self.nnz() + other.nnz() - both;
        Ok(if either == 0 { 1.0 } else { both as f64 / either as f64 })
    }
}

fn same_size(a: &EdgeSet, b: &EdgeSet) -> Result<Builder> {
    if (a.num_rows(), a.num_cols()) != (b.num_rows(), b.num_cols()) {
        return Err(Error::Shape(format!(
            "expected masks over the same tokens, got {} x {} and {} x {}",
            a.num_rows(),
            a.num_cols(),
            b.num_rows(),
            b.num_cols()
        )));
    }
    EdgeSet::builder(a.num_rows(), a.num_cols())
}

/// What two ascending, disjoint lists of ranges have in common.
fn overlaps(a: &[Range<usize>], b: &[Range<usize>]) -> Vec<Range<usize>> {
    let (mut common, mut i, mut j) = (Vec::new(), 0, 0);
    while let (Some(x), Some(y)) = (a.get(i), b.get(j)) {
        let both = x.start.max(y.start)..x.end.min(y.end);
        if !both.is_empty() {
            common.push(both);
        }
        if x.end <= y.end {
            i += 1;
        } else {
            j += 1;
        }
    }
    common
}

/// `0..end` without `ranges`.
fn outside(ranges: &[Range<usize>], end: usize) -> Vec<Range<usize>> {
    let mut rest: Vec<_> = std::iter::once(0..end).filter(|range| !range.is_empty()).collect();
    subtract_ranges(&mut rest, ranges.iter().cloned());
    rest
}

/// The diagonals of `set` at one offset.
fn same_offset(set: &EdgeSet, offset: i64) -> &[Diagonal] {
    let diagonals = set.diagonals();
    let from = diagonals.partition_point(|d| d.offset < offset);
    let to = diagonals.partition_point(|d| d.offset <= offset);
    &diagonals[from..to]
}

/// Columns with an edge outside the dense rows of `set`; ascending and disjoint.
fn touched_columns(set: &EdgeSet) -> Result<Vec<Range<usize>>> {
    let mut touched = set.dense_cols().to_vec();
    let parts = set.diagonals().len() + set.runs().len();
    let no_room = |_| Error::no_room(format_args!("a difference of masks with {parts} diagonals and runs"));
    touched.try_reserve(parts).map_err(no_room)?;
    touched.extend(
        set.diagonals()
            .iter()
            .map(|d| (d.start as i64 + d.offset) as usize..(d.end as i64 + d.offset) as usize),
    );
    if !set.runs().is_empty() {
        touched.extend((0..set.num_rows()).flat_map(|row| set.runs().row(row)));
    }
    merge_ranges(&mut touched);
    Ok(touched)
}

/// Which diagonals of `set` share a cell with a run of `other`.
fn crossed_by_runs(set: &EdgeSet, other: &EdgeSet) -> Vec<bool> {
    let diagonals = set.diagonals();
    let mut crossed = vec![false; diagonals.len()];
    if other.runs().is_empty() || diagonals.is_empty() {
        return crossed;
    }
    for row in 0..other.num_rows() {
        for run in other.runs().row(row) {
            let (low, high) = (run.start as i64 - row as i64, run.end as i64 - row as i64);
            let first = diagonals.partition_point(|d| d.offset < low);
            for (index, diagonal) in diagonals.iter().enumerate().skip(first) {
                if diagonal.offset >= high {
                    break;
                }
                crossed[index] |= diagonal.column(row).is_some();
            }
        }
    }
    crossed
}

/// Diagonals met row by row: a row only looks at those that reach it.
struct Sweep {
    waiting: std::iter::Peekable<std::vec::IntoIter<Diagonal>>,
    active: Vec<Diagonal>,
}

impl Sweep {
    fn new(mut diagonals: Vec<Diagonal>) -> Self {
        diagonals.sort_unstable_by_key(|d| d.start);
        Sweep { waiting: diagonals.into_iter().peekable(), active: Vec::new() }
    }

    /// Append the columns of `row` to `out`. Rows must come in order.
    fn columns(&mut self, row: usize, out: &mut Vec<Range<usize>>) {
        while let Some(diagonal) = self.waiting.next_if(|d| d.start <= row) {
            self.active.push(diagonal);
        }
        self.active.retain(|d| d.end > row);
        out.extend(self.active.iter().filter_map(|d| d.column(row)).map(|col| col..col + 1));
    }
}

/// Collects the runs of consecutive rows; a row that turns out to be full becomes a dense row.
struct Rows {
    num_cols: usize,
    row_ptr: Vec<usize>,
    runs: Vec<Range<usize>>,
    full: Vec<Range<usize>>,
}

impl Rows {
    /// # Errors
    /// [`Error::Value`] when not even the pointers to the rows would fit in memory.
    fn new(num_rows: usize, num_cols: usize) -> Result<Self> {
        let no_room = |_| Error::no_room(format_args!("a result with runs in {num_rows} rows"));
        // Room for these pointers, for those of the result, and for one run per row on the way; given back at once.
        Vec::<[usize; 6]>::new().try_reserve_exact(num_rows + 1).map_err(no_room)?;
        let mut row_ptr = Vec::new();
        row_ptr.try_reserve_exact(num_rows + 1).map_err(no_room)?;
        row_ptr.push(0);
        Ok(Rows { num_cols, row_ptr, runs: Vec::new(), full: Vec::new() })
    }

    /// # Errors
    /// [`Error::Value`] when the runs do not fit in memory.
    fn extend(&mut self, runs: &[Range<usize>]) -> Result<()> {
        let rows = self.row_ptr.capacity() - 1;
        let no_room = |_| Error::no_room(format_args!("a result with runs in {rows} rows"));
        self.runs.try_reserve(runs.len()).map_err(no_room)?;
        self.runs.extend_from_slice(runs);
        Ok(())
    }

    fn close_row(&mut self, row: usize) {
        let from = *self.row_ptr.last().expect("starts with 0");
        if let [run] = &self.runs[from..]
            && *run == (0..self.num_cols)
        {
            self.runs.truncate(from);
            self.full.push(row..row + 1);
        }
        self.row_ptr.push(self.runs.len());
    }

    fn add_to(self, builder: Builder) -> Builder {
        let full = self.full.into_iter();
        let builder = full.fold(builder, |builder, rows| builder.rect(rows, 0..self.num_cols));
        if self.runs.is_empty() { builder } else { builder.rows(&self.row_ptr, &self.runs) }
    }
}

#[cfg(test)]
#[path = "algebra_tests.rs"]
mod tests;
