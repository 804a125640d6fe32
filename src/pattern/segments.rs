//! The overlapping pieces that patterns describe themselves with, before [`super::edges`] makes them canonical.

use std::ops::Range;

use crate::error::{Error, Result};

/// A piece of a mask. Pieces may overlap and may reach beyond the mask.
#[derive(Debug, Clone)]
pub(super) enum Segment {
    /// Every cell of a rectangle.
    Rect { rows: Range<usize>, cols: Range<usize> },
    /// Cells of a rectangle whose `col - row` is `lo + n * step <= hi`.
    Band { lo: i64, hi: i64, step: usize, rows: Range<usize>, cols: Range<usize> },
    /// Cells of a rectangle whose `row + col` is `sum`.
    AntiDiagonal { sum: i64, rows: Range<usize>, cols: Range<usize> },
    /// Runs per row in compressed rows; `row_ptr[0]` belongs to row `first_row`, columns are moved by `shift`.
    Rows { first_row: usize, row_ptr: Vec<usize>, start: Vec<u32>, end: Vec<u32>, shift: usize },
}

impl Segment {
    pub(super) fn edge_list(num_rows: usize, num_cols: usize, row_ptr: &[i64], col: &[i64]) -> Result<Self> {
        let invalid = |message: String| Err(Error::Value(message));
        if row_ptr.len() != num_rows + 1 {
            return invalid(format!(
                "row_ptr: expected {} entries (queries + 1), got {}",
                num_rows + 1,
                row_ptr.len()
            ));
        }
        if row_ptr[0] != 0 || row_ptr[num_rows] != col.len() as i64 {
            return invalid(format!(
                "row_ptr: expected to start at 0 and end at {} (the number of columns given), got {} and {}",
                col.len(),
                row_ptr[0],
                row_ptr[num_rows]
            ));
        }
        let mut runs = (vec![0usize; num_rows + 1], Vec::new(), Vec::new());
        for row in 0..num_rows {
            let (from, to) = (row_ptr[row], row_ptr[row + 1]);
            if from > to || to > col.len() as i64 {
                return invalid(format!(
                    "row_ptr: must not decrease nor pass the columns given; row {row} goes from {from} to {to}"
                ));
            }
            let mut last: Option<u32> = None;
            for &c in &col[from as usize..to as usize] {
                if c < 0 || c >= num_cols as i64 {
                    return invalid(format!(
                        "col: expected a key index from 0 to {}, got {c} in row {row}",
                        num_cols as i64 - 1
                    ));
                }
                let c = c as u32;
                match last {
                    Some(previous) if c <= previous => {
                        return invalid(format!(
                            "col: must ascend strictly within a row, got {c} after {previous} in row {row}"
                        ));
                    }
                    Some(previous) if c == previous + 1 => *runs.2.last_mut().expect("a run is open") = c + 1,
                    _ => {
                        runs.1.push(c);
                        runs.2.push(c + 1);
                    }
                }
                last = Some(c);
            }
            runs.0[row + 1] = runs.1.len();
        }
        Ok(Segment::Rows { first_row: 0, row_ptr: runs.0, start: runs.1, end: runs.2, shift: 0 })
    }

    /// The columns that `columns` appends for each row, as ranges in any order.
    ///
    /// # Errors
    /// [`Error::Value`] when they do not fit in memory.
    pub(super) fn by_row(
        num_rows: usize,
        num_cols: usize,
        mut columns: impl FnMut(usize, &mut Vec<Range<usize>>),
    ) -> Result<Self> {
        let no_room = |_| Error::no_room(format_args!("a mask with runs in {num_rows} rows"));
        let (mut row_ptr, mut start, mut end) = (Vec::new(), Vec::new(), Vec::new());
        row_ptr.try_reserve_exact(num_rows + 1).map_err(no_room)?;
        // Room for the longest row, which `columns` takes without asking; given back at once.
        Vec::<Range<usize>>::new().try_reserve_exact(num_cols).map_err(no_room)?;
        let mut ranges: Vec<Range<usize>> = Vec::new();
        row_ptr.push(0);
        for row in 0..num_rows {
            ranges.clear();
            columns(row, &mut ranges);
            ranges.iter_mut().for_each(|range| range.end = range.end.min(num_cols));
            merge_ranges(&mut ranges);
            start.try_reserve(ranges.len()).map_err(no_room)?;
            end.try_reserve(ranges.len()).map_err(no_room)?;
            start.extend(ranges.iter().map(|range| range.start as u32));
            end.extend(ranges.iter().map(|range| range.end as u32));
            row_ptr.push(start.len());
        }
        Ok(Segment::Rows { first_row: 0, row_ptr, start, end, shift: 0 })
    }

    /// Runs that start at row and column `shift`.
    ///
    /// # Errors
    /// [`Error::Value`] when they do not fit in memory.
    pub(super) fn shifted_runs(
        row_ptr: &[usize],
        start: impl ExactSizeIterator<Item = u32>,
        end: impl ExactSizeIterator<Item = u32>,
        shift: usize,
    ) -> Result<Self> {
        let (row_ptr, start, end) = (collected(row_ptr.iter().copied())?, collected(start)?, collected(end)?);
        Ok(Segment::Rows { first_row: shift, row_ptr, start, end, shift })
    }

    /// The part inside a `num_rows` x `num_cols` mask. Bands keep only offsets that can meet it, so a huge band costs nothing.
    pub(super) fn clipped(self, num_rows: usize, num_cols: usize) -> Self {
        let clip = |range: Range<usize>, end: usize| range.start.min(end)..range.end.min(end);
        match self {
            Segment::Rect { rows, cols } => {
                Segment::Rect { rows: clip(rows, num_rows), cols: clip(cols, num_cols) }
            }
            Segment::Band { lo, hi, step, rows, cols } => {
                let least = -(num_rows as i64);
                let skipped = (least.saturating_sub(lo)).max(0) as u64 / step as u64 * step as u64;
                Segment::Band {
                    lo: lo.saturating_add_unsigned(skipped),
                    hi: hi.min(num_cols as i64),
                    step,
                    rows: clip(rows, num_rows),
                    cols: clip(cols, num_cols),
                }
            }
            Segment::AntiDiagonal { sum, rows, cols } => {
                Segment::AntiDiagonal { sum, rows: clip(rows, num_rows), cols: clip(cols, num_cols) }
            }
            rows @ Segment::Rows { .. } => rows,
        }
    }

    pub(super) fn rows(&self) -> Range<usize> {
        match self {
            Segment::Rect { rows, .. } | Segment::Band { rows, .. } | Segment::AntiDiagonal { rows, .. } => {
                rows.clone()
            }
            Segment::Rows { first_row, row_ptr, .. } => *first_row..first_row + row_ptr.len() - 1,
        }
    }

    /// Append the columns of `row` (which must be one of [`Self::rows`]) as runs.
    pub(super) fn row(&self, row: usize, out: &mut Vec<Range<usize>>) {
        match self {
            Segment::Rect { cols, .. } => out.push(cols.clone()),
            Segment::Band { lo, hi, step, cols, .. } => out.extend(
                (*lo..=*hi)
                    .step_by(*step)
                    .map(|offset| row as i64 + offset)
                    .filter(|col| cols.start as i64 <= *col && *col < cols.end as i64)
                    .map(|col| col as usize..col as usize + 1),
            ),
            Segment::AntiDiagonal { sum, cols, .. } => {
                let col = sum - row as i64;
                if cols.start as i64 <= col && col < cols.end as i64 {
                    out.push(col as usize..col as usize + 1);
                }
            }
            Segment::Rows { first_row, row_ptr, start, end, shift } => {
                let range = row_ptr[row - first_row]..row_ptr[row - first_row + 1];
                out.extend(range.map(|i| start[i] as usize + shift..end[i] as usize + shift));
            }
        }
    }
}

/// The elements of an iterator, if memory holds them.
fn collected<T>(elements: impl ExactSizeIterator<Item = T>) -> Result<Vec<T>> {
    let mut all = Vec::new();
    let size = elements.len();
    let no_room = |_| Error::no_room(format_args!("a mask with {size} entries in its rows"));
    all.try_reserve_exact(size).map_err(no_room)?;
    all.extend(elements);
    Ok(all)
}

/// Sort, drop empty ranges, and join those that overlap or touch.
pub(crate) fn merge_ranges(ranges: &mut Vec<Range<usize>>) {
    ranges.retain(|range| !range.is_empty());
    ranges.sort_unstable_by_key(|range| range.start);
    ranges.dedup_by(|next, kept| {
        let joins = next.start <= kept.end;
        if joins {
            kept.end = kept.end.max(next.end);
        }
        joins
    });
}

/// Remove `cuts` (ascending) from `ranges` (ascending, disjoint).
pub(super) fn subtract_ranges(ranges: &mut Vec<Range<usize>>, cuts: impl Iterator<Item = Range<usize>>) {
    let mut kept = Vec::with_capacity(ranges.len());
    let mut cuts = cuts.filter(|cut| !cut.is_empty()).peekable();
    for range in ranges.drain(..) {
        let mut start = range.start;
        // A cut may reach into the next range too, so it is only dropped once it ends before this range does.
        while start < range.end {
            match cuts.peek() {
                Some(cut) if cut.end <= start => {
                    cuts.next();
                }
                Some(cut) if cut.start < range.end => {
                    if cut.start > start {
                        kept.push(start..cut.start);
                    }
                    start = cut.end;
                }
                _ => {
                    kept.push(start..range.end);
                    break;
                }
            }
        }
    }
    *ranges = kept;
}
