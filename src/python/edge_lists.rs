//! Edges as plain arrays and back.

use std::sync::Arc;

use numpy::ndarray::{Array3, ArrayView3};

use crate::config::MaskEdges;
use crate::error::{Error, Result};
use crate::pattern::HeadEdges;
use crate::pattern::edges::EdgeSet;

/// Room for `size` elements, or an error instead of an abort.
pub(super) fn reserved<T>(what: &str, size: usize) -> Result<Vec<T>> {
    let mut elements = Vec::new();
    elements
        .try_reserve_exact(size)
        .map_err(|_| Error::no_room(format_args!("{what}: an array of {size} entries")))?;
    Ok(elements)
}

/// Compressed rows of edge sets, one after the other: `row_ptr` with absolute offsets into `col`, columns ascending.
pub(super) fn compressed_rows<'a>(
    what: &str,
    sets: impl Iterator<Item = &'a EdgeSet> + Clone,
) -> Result<(Vec<i64>, Vec<i64>)> {
    let mut row_ptr = reserved(what, sets.clone().map(|set| set.num_rows() + 1).sum())?;
    let mut col = reserved(what, sets.clone().map(EdgeSet::nnz).sum())?;
    let mut runs = Vec::new();
    for set in sets {
        row_ptr.push(col.len() as i64);
        for row in 0..set.num_rows() {
            set.row(row, &mut runs);
            col.extend(runs.iter().cloned().flatten().map(|c| c as i64));
            row_ptr.push(col.len() as i64);
        }
    }
    Ok((row_ptr, col))
}

/// (H, N, N), true = keep.
pub(super) fn to_dense(mask: &MaskEdges) -> Result<Array3<bool>> {
    let (heads, n) = (mask.heads.len(), mask.num_tokens);
    let too_large = || {
        Error::Value(format!(
            "to_dense: {heads} heads x {n} x {n} cells do not fit in memory; use to_csr, which grows with the edges"
        ))
    };
    let size = heads.checked_mul(n).and_then(|rows| rows.checked_mul(n)).ok_or_else(too_large)?;
    let mut cells = Vec::new();
    cells.try_reserve_exact(size).map_err(|_| too_large())?;
    cells.resize(size, false);
    let mut runs = Vec::new();
    for (head, set) in mask.heads.iter().enumerate() {
        for row in 0..n {
            set.row(row, &mut runs);
            let cells = &mut cells[(head * n + row) * n..][..n];
            runs.iter().for_each(|run| cells[run.clone()].fill(true));
        }
    }
    Array3::from_shape_vec((heads, n, n), cells).map_err(|error| Error::Shape(error.to_string()))
}

/// The edges of (H, N, N) cells, nonzero = keep. Memory beside the result grows with its runs.
pub(super) fn from_dense(cells: ArrayView3<'_, u8>) -> Result<HeadEdges> {
    let mut heads = HeadEdges::with_capacity(cells.dim().0);
    for head in cells.outer_iter() {
        let (rows, cols) = head.dim();
        let (mut row_ptr, mut start, mut end) = (vec![0], Vec::new(), Vec::new());
        for row in head.outer_iter() {
            let mut inside = false;
            for (col, &cell) in row.iter().enumerate() {
                if (cell != 0) != inside {
                    inside = !inside;
                    if inside { &mut start } else { &mut end }.push(col as i64);
                }
            }
            if inside {
                end.push(cols as i64);
            }
            row_ptr.push(start.len() as i64);
        }
        let set =
            EdgeSet::builder(rows, cols)?.checked_rows(&row_ptr, &start, &end)?.build()?.regularised()?;
        heads.push(match heads.last() {
            Some(before) if **before == set => Arc::clone(before),
            _ => Arc::new(set),
        });
    }
    Ok(heads)
}

/// Whether two edge sets keep the same pairs, however they are held.
pub(super) fn same_edges(a: &EdgeSet, b: &EdgeSet) -> bool {
    if (a.num_rows(), a.num_cols(), a.nnz()) != (b.num_rows(), b.num_cols(), b.nnz()) {
        return false;
    }
    let (mut of_a, mut of_b) = (Vec::new(), Vec::new());
    a == b
        || (0..a.num_rows()).all(|row| {
            a.row(row, &mut of_a);
            b.row(row, &mut of_b);
            of_a == of_b
        })
}

/// The parts of one edge set as flat lists: dense rows, dense columns (start, end), diagonals (offset, start, end), and the runs
/// as compressed rows. What pickles hold: its size does not depend on the number of tokens where the edges are regular.
pub(super) type Parts = (Vec<i64>, Vec<i64>, Vec<i64>, Vec<i64>, Vec<i64>, Vec<i64>);

pub(super) fn to_parts(set: &EdgeSet) -> Parts {
    let flat = |ranges: &[std::ops::Range<usize>]| {
        ranges.iter().flat_map(|range| [range.start as i64, range.end as i64]).collect()
    };
    let diagonals = set.diagonals().iter().flat_map(|d| [d.offset, d.start as i64, d.end as i64]).collect();
    let (mut row_ptr, mut start, mut end) = (Vec::new(), Vec::new(), Vec::new());
    if !set.runs().is_empty() {
        row_ptr.push(0);
        for row in 0..set.num_rows() {
            for run in set.runs().row(row) {
                start.push(run.start as i64);
                end.push(run.end as i64);
            }
            row_ptr.push(start.len() as i64);
        }
    }
    (flat(set.dense_rows()), flat(set.dense_cols()), diagonals, row_ptr, start, end)
}

/// [`to_parts`] backwards. Whatever the lists hold, the result is a valid edge set: the builder clips and sorts it out.
pub(super) fn from_parts(num_tokens: usize, parts: &Parts) -> Result<EdgeSet> {
    let (rows, cols, diagonals, row_ptr, start, end) = parts;
    let n = num_tokens;
    let index = |value: i64| usize::try_from(value).unwrap_or(0).min(n);
    let mut builder = EdgeSet::builder(n, n)?;
    for range in rows.chunks_exact(2) {
        builder = builder.rect(index(range[0])..index(range[1]), 0..n);
    }
    for range in cols.chunks_exact(2) {
        builder = builder.rect(0..n, index(range[0])..index(range[1]));
    }
    for d in diagonals.chunks_exact(3) {
        let offset = d[0].clamp(-(n as i64), n as i64);
        builder = builder.diagonal(offset, index(d[1])..index(d[2]), 0..n);
    }
    if !row_ptr.is_empty() {
        builder = builder.checked_rows(row_ptr, start, end)?;
    }
    builder.build()
}
