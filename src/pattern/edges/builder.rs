//! From overlapping segments to the canonical edge set.

use std::collections::TryReserveError;
use std::ops::Range;

use super::super::segments::{Segment, merge_ranges, subtract_ranges};
use super::{Diagonal, EdgeSet, Runs};
use crate::error::{Error, Result};

/// Up to this many diagonals are kept as such, however short.
const MANY_DIAGONALS: usize = 128;
/// Of more than that, those on less than one row in `SHORT` are stored as runs.
const SHORT: usize = 8;

/// Collects overlapping segments; [`Builder::build`] makes them canonical. Everything is clipped to the mask.
#[derive(Debug, Clone)]
pub struct Builder {
    num_rows: usize,
    num_cols: usize,
    segments: Vec<Segment>,
    /// The first segment that memory had no room for, kept until `build` so that calls chain.
    failed: Option<Error>,
}

impl Builder {
    pub(super) fn new(num_rows: usize, num_cols: usize) -> Self {
        Builder { num_rows, num_cols, segments: Vec::new(), failed: None }
    }

    /// Keep every column of `rows` and every row of `cols`: how a prefix (CLS, registers) or a global token behaves.
    #[must_use]
    pub fn global(self, tokens: Range<usize>) -> Self {
        let (rows, cols) = (self.num_rows, self.num_cols);
        self.rect(tokens.clone(), 0..cols).rect(0..rows, tokens)
    }

    /// Keep `rows` x `cols`.
    #[must_use]
    pub fn rect(self, rows: Range<usize>, cols: Range<usize>) -> Self {
        self.push(Ok(Segment::Rect { rows, cols }))
    }

    /// Inside `rows` x `cols`, keep `(r, c)` with `c - r` in `lo, lo + step, ..., <= hi`.
    #[must_use]
    pub fn band(self, offsets: (i64, i64, usize), rows: Range<usize>, cols: Range<usize>) -> Self {
        let (lo, hi, step) = offsets;
        self.push(Ok(Segment::Band { lo, hi, step: step.max(1), rows, cols }))
    }

    /// Inside `rows` x `cols`, keep `(r, c)` with `c - r` equal to `offset`.
    #[must_use]
    pub fn diagonal(self, offset: i64, rows: Range<usize>, cols: Range<usize>) -> Self {
        self.band((offset, offset, 1), rows, cols)
    }

    /// Inside `rows` x `cols`, keep `(r, c)` with `r + c` equal to `sum`.
    #[must_use]
    pub fn anti_diagonal(self, sum: i64, rows: Range<usize>, cols: Range<usize>) -> Self {
        self.push(Ok(Segment::AntiDiagonal { sum, rows, cols }))
    }

    /// Keep the edges of a compressed-row list. Columns must ascend strictly within a row.
    ///
    /// # Errors
    /// [`Error::Value`] when the list is not a valid compressed-row description of this mask.
    pub fn edge_list(self, row_ptr: &[i64], col: &[i64]) -> Result<Self> {
        let segment = Segment::edge_list(self.num_rows, self.num_cols, row_ptr, col)?;
        Ok(self.push(Ok(segment)))
    }

    /// Keep the runs of every row: `start[i]..end[i]` for i in `row_ptr[row]..row_ptr[row + 1]`.
    ///
    /// # Errors
    /// [`Error::Value`] when the runs do not ascend, touch one another, or leave the mask.
    pub fn checked_rows(self, row_ptr: &[i64], start: &[i64], end: &[i64]) -> Result<Self> {
        let valid = row_ptr.len() == self.num_rows + 1
            && start.len() == end.len()
            && row_ptr[0] == 0
            && row_ptr.is_sorted()
            && row_ptr[self.num_rows] == start.len() as i64
            && row_ptr.windows(2).all(|span| {
                let (start, end) =
                    (&start[span[0] as usize..span[1] as usize], &end[span[0] as usize..span[1] as usize]);
                let mut last = -1;
                start.iter().zip(end).all(|(&from, &to)| {
                    let ascends = last < from && from < to && to <= self.num_cols as i64;
                    last = to;
                    ascends
                })
            });
        if !valid {
            return Err(Error::Value("runs: expected ascending runs inside the mask, row by row".into()));
        }
        let runs: Vec<_> = start.iter().zip(end).map(|(&from, &to)| from as usize..to as usize).collect();
        let row_ptr: Vec<_> = row_ptr.iter().map(|&pointer| pointer as usize).collect();
        Ok(self.rows(&row_ptr, &runs))
    }

    /// Keep the runs of every row: `runs[row_ptr[row]..row_ptr[row + 1]]`, each inside the mask.
    #[must_use]
    pub(in crate::pattern) fn rows(self, row_ptr: &[usize], runs: &[Range<usize>]) -> Self {
        let starts = runs.iter().map(|run| run.start as u32);
        let ends = runs.iter().map(|run| run.end as u32);
        self.push(Segment::shifted_runs(row_ptr, starts, ends, 0))
    }

    fn push(mut self, segment: Result<Segment>) -> Self {
        if let Err(error) = segment.and_then(|segment| push(&mut self.segments, segment)) {
            self.failed = self.failed.or(Some(error));
        }
        self
    }

    /// Keep, in every row, the columns that `columns` appends: ranges in any order, which may overlap and reach beyond the mask.
    #[must_use]
    pub fn by_row(self, columns: impl FnMut(usize, &mut Vec<Range<usize>>)) -> Self {
        let segment = Segment::by_row(self.num_rows, self.num_cols, columns);
        self.push(segment)
    }

    /// Keep the edges of `other`, moved by `(shift, shift)`: how a mask over patches becomes a mask over tokens.
    #[must_use]
    pub fn shifted(mut self, other: &EdgeSet, shift: usize) -> Self {
        let (rows, cols) = (shift..shift + other.num_rows, shift..shift + other.num_cols);
        let moved = |range: &Range<usize>| range.start + shift..range.end + shift;
        for range in &other.dense_rows {
            self = self.rect(moved(range), cols.clone());
        }
        for range in &other.dense_cols {
            self = self.rect(rows.clone(), moved(range));
        }
        for d in &other.diagonals {
            self = self.diagonal(d.offset, d.start + shift..d.end + shift, cols.clone());
        }
        let Runs { row_ptr, start, end } = &other.runs;
        if !other.runs.is_empty() {
            let (starts, ends) = (start.iter().copied(), end.iter().copied());
            self = self.push(Segment::shifted_runs(row_ptr, starts, ends, shift));
        }
        self
    }

    /// The canonical edge set.
    ///
    /// # Errors
    /// [`Error::Value`] when it does not fit in memory.
    pub fn build(self) -> Result<EdgeSet> {
        if let Some(error) = self.failed {
            return Err(error);
        }
        let (num_rows, num_cols) = (self.num_rows, self.num_cols);
        let (mut dense_rows, mut dense_cols) = (Vec::new(), Vec::new());
        let (mut diagonals, mut rest) = (Vec::new(), Vec::new());
        for segment in self.segments {
            match segment.clipped(num_rows, num_cols) {
                Segment::Rect { rows, cols } if rows.is_empty() || cols.is_empty() => {}
                Segment::Rect { rows, cols } if cols == (0..num_cols) => push(&mut dense_rows, rows)?,
                Segment::Rect { rows, cols } if rows == (0..num_rows) => push(&mut dense_cols, cols)?,
                Segment::Band { lo, hi, step, rows, cols } => {
                    for offset in (lo..=hi).step_by(step) {
                        let start = (rows.start as i64).max(cols.start as i64 - offset);
                        let end = (rows.end as i64).min(cols.end as i64 - offset);
                        if start < end {
                            let diagonal = Diagonal { offset, start: start as usize, end: end as usize };
                            push(&mut diagonals, diagonal)?;
                        }
                    }
                }
                other => push(&mut rest, other)?,
            }
        }
        merge_ranges(&mut dense_rows);
        merge_ranges(&mut dense_cols);
        let mut diagonals = disjoint_diagonals(diagonals, &dense_rows, &dense_cols)?;
        let mut short = Vec::new();
        if diagonals.len() > MANY_DIAGONALS {
            // Whoever visits a row looks at every diagonal, so many short pieces would cost far more than their edges.
            let is_short = |d: &mut Diagonal| (d.end - d.start) * SHORT < num_rows;
            short = bands(diagonals.extract_if(.., is_short))?;
        }
        let mut set =
            EdgeSet { num_rows, num_cols, dense_rows, dense_cols, diagonals, runs: Runs::default() };
        // Short diagonals share no edge with the others, so nothing has to be cut out of them alone.
        let covers = if rest.is_empty() { None } else { Some(&set) };
        rest.try_reserve(short.len()).map_err(no_room)?;
        rest.extend(short);
        if !rest.is_empty() {
            set.runs = remaining_runs((num_rows, num_cols), &set.dense_rows, covers, rest)?;
        }
        Ok(set)
    }
}

fn no_room(_: TryReserveError) -> Error {
    Error::no_room("a mask of so many parts")
}

fn push<T>(parts: &mut Vec<T>, part: T) -> Result<()> {
    parts.try_reserve(1).map_err(no_room)?;
    parts.push(part);
    Ok(())
}

/// Join the pieces of each offset, then cut out what dense rows and columns already cover.
fn disjoint_diagonals(
    mut diagonals: Vec<Diagonal>,
    dense_rows: &[Range<usize>],
    dense_cols: &[Range<usize>],
) -> Result<Vec<Diagonal>> {
    diagonals.sort_unstable();
    let mut pieces = Vec::new();
    pieces.try_reserve(diagonals.len()).map_err(no_room)?;
    for group in diagonals.chunk_by(|a, b| a.offset == b.offset) {
        let offset = group[0].offset;
        let mut ranges: Vec<_> = group.iter().map(|d| d.start..d.end).collect();
        merge_ranges(&mut ranges);
        subtract_ranges(&mut ranges, dense_rows.iter().cloned());
        let to_row = |col: usize| (col as i64 - offset).max(0) as usize;
        subtract_ranges(&mut ranges, dense_cols.iter().map(|cols| to_row(cols.start)..to_row(cols.end)));
        pieces.try_reserve(ranges.len()).map_err(no_room)?;
        pieces.extend(ranges.into_iter().map(|rows| Diagonal { offset, start: rows.start, end: rows.end }));
    }
    Ok(pieces)
}

/// Diagonals, ascending by offset, as bands: equally spaced ones that fill a rectangle from border to border become one.
fn bands(diagonals: impl Iterator<Item = Diagonal>) -> Result<Vec<Segment>> {
    let mut groups: Vec<Vec<Diagonal>> = Vec::new();
    for diagonal in diagonals {
        let last = groups.last_mut().filter(|group| {
            let steps = |a: &Diagonal, b: &Diagonal| b.offset - a.offset;
            let spaced =
                group.len() < 2 || steps(&group[0], &group[1]) == steps(&group[group.len() - 1], &diagonal);
            // Of two neighbours that end at the same border, one is the other moved along it.
            let before = &group[group.len() - 1];
            let step = steps(before, &diagonal);
            let to_left = diagonal.start == before.start && diagonal.end as i64 == before.end as i64 - step;
            let to_top = diagonal.start as i64 == before.start as i64 - step && diagonal.end == before.end;
            let same = group.len() < 2 || (group[0].start == group[1].start) == to_left;
            step > 0 && spaced && same && (to_left || to_top)
        });
        match last {
            Some(group) => push(group, diagonal)?,
            None => push(&mut groups, vec![diagonal])?,
        }
    }
    let mut bands = Vec::new();
    bands.try_reserve_exact(groups.len()).map_err(no_room)?;
    let found = groups.into_iter().map(|group| {
        let (first, last) = (&group[0], &group[group.len() - 1]);
        let column = |row: usize, offset: i64| (row as i64 + offset) as usize;
        // The first and the last offset bound the columns, one at its start and one at its end.
        let cols = group.iter().map(|d| column(d.start, d.offset)).min().unwrap_or(0)
            ..group.iter().map(|d| column(d.end, d.offset)).max().unwrap_or(0);
        let rows =
            group.iter().map(|d| d.start).min().unwrap_or(0)..group.iter().map(|d| d.end).max().unwrap_or(0);
        let step = group.get(1).map_or(1, |second| (second.offset - first.offset) as usize);
        Segment::Band { lo: first.offset, hi: last.offset, step, rows, cols }
    });
    bands.extend(found);
    Ok(bands)
}

/// What `rest` adds to what `covers` holds, row by row. The rows where a segment is active are swept in order, so a row only looks at
/// segments that reach it.
fn remaining_runs(
    (num_rows, num_cols): (usize, usize),
    dense_rows: &[Range<usize>],
    covers: Option<&EdgeSet>,
    mut rest: Vec<Segment>,
) -> Result<Runs> {
    let no_room = |_| Error::no_room(format_args!("a mask with runs in {num_rows} rows"));
    rest.sort_unstable_by_key(|segment| segment.rows().start);
    let mut runs = Runs::default();
    runs.row_ptr.try_reserve_exact(num_rows + 1).map_err(no_room)?;
    runs.row_ptr.resize(num_rows + 1, 0);
    // Room for the longest row, before and after merging; given back at once.
    Vec::<[Range<usize>; 2]>::new().try_reserve_exact(num_cols).map_err(no_room)?;
    let (mut active, mut covered, mut row_runs): (Vec<Segment>, _, _) = (Vec::new(), Vec::new(), Vec::new());
    active.try_reserve_exact(rest.len()).map_err(no_room)?;
    let mut waiting = rest.into_iter().peekable();
    for row in 0..num_rows {
        while let Some(segment) = waiting.next_if(|segment| segment.rows().start <= row) {
            active.push(segment);
        }
        active.retain(|segment| segment.rows().end > row);
        if !active.is_empty() && !dense_rows.iter().any(|range| range.contains(&row)) {
            row_runs.clear();
            active.iter().for_each(|segment| segment.row(row, &mut row_runs));
            merge_ranges(&mut row_runs);
            if let Some(set) = covers {
                set.row(row, &mut covered);
                subtract_ranges(&mut row_runs, covered.iter().cloned());
            }
            runs.start.try_reserve(row_runs.len()).map_err(no_room)?;
            runs.end.try_reserve(row_runs.len()).map_err(no_room)?;
            runs.start.extend(row_runs.iter().map(|run| run.start as u32));
            runs.end.extend(row_runs.iter().map(|run| run.end as u32));
        }
        runs.row_ptr[row + 1] = runs.start.len();
    }
    Ok(if runs.is_empty() { Runs::default() } else { runs })
}
