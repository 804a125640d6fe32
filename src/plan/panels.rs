//! Edges seen as squares of [`PANEL`] queries x [`PANEL`] keys: what the panel kernel computes whole, and masks where a square is not full.

use std::ops::Range;

use crate::pattern::edges::EdgeSet;
use crate::pattern::edges::merge_ranges;

/// Queries, and keys, per square.
pub const PANEL: usize = 16;

/// One square that holds an edge.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Square {
    /// Its keys are `PANEL * panel` and the following.
    pub panel: usize,
    /// Per query, the keys that it keeps: bit j for the j-th.
    pub bits: [u16; PANEL],
    /// Whether the first, the second half of the queries keeps any key.
    pub halves: [bool; 2],
}

/// Diagonals at regular distances inside a rectangle: row r keeps the columns `r + lo, r + lo + step, ... <= r + hi` among `cols`.
#[derive(Debug, Clone)]
struct Band {
    lo: i64,
    hi: i64,
    step: i64,
    rows: Range<i64>,
    cols: Range<i64>,
    /// Rows of the last diagonal.
    last: Range<i64>,
}

impl Band {
    /// Take the next diagonal in, if the result is still a band.
    fn extend(&mut self, offset: i64, rows: &Range<i64>) -> bool {
        let step = offset - self.hi;
        if self.hi != self.lo && step != self.step {
            return false;
        }
        // While the first column limits, every diagonal starts a step before the last one; while the first row does, at it.
        let rows_start = self.rows.start.min(rows.start);
        let was_limited_by_column = self.last.start == self.cols.start - self.hi;
        if rows_start < self.rows.start && !was_limited_by_column
            || rows.start != rows_start.max(self.cols.start - offset)
        {
            return false;
        }
        // Likewise at the end: first the last row limits, then the last column.
        let cols_end = self.cols.end.max(rows.end + offset);
        let was_limited_by_row = self.last.end == self.rows.end;
        if cols_end > self.cols.end && !was_limited_by_row || rows.end != self.rows.end.min(cols_end - offset)
        {
            return false;
        }
        self.rows.start = rows_start;
        self.cols.end = cols_end;
        (self.step, self.hi, self.last) = (step, offset, rows.clone());
        true
    }

    /// First and one past the last column that `row` may keep.
    fn columns(&self, row: i64) -> Range<usize> {
        if !self.rows.contains(&row) {
            return 0..0;
        }
        let first = row + self.lo;
        let skipped = (self.cols.start - first).max(0);
        let start = first + (skipped as u64).next_multiple_of(self.step as u64) as i64;
        let end = (row + self.hi + 1).min(self.cols.end);
        if start < end { start as usize..end as usize } else { 0..0 }
    }
}

/// The squares of some rows of an edge set, tile by tile.
#[derive(Debug)]
pub struct Squares<'a> {
    edges: &'a EdgeSet,
    rows: Range<usize>,
    bands: Vec<Band>,
    /// Columns of the rows of a tile: per row, and together in panels.
    runs: Vec<Range<usize>>,
    panels: Vec<Range<usize>>,
    /// Where the panels of each range begin among the squares.
    starts: Vec<usize>,
}

impl<'a> Squares<'a> {
    /// For tiles inside `rows`.
    pub fn new(edges: &'a EdgeSet, rows: Range<usize>) -> Self {
        let mut bands: Vec<Band> = Vec::new();
        for diagonal in edges.diagonals().iter().filter(|d| d.start < rows.end && rows.start < d.end) {
            let range = diagonal.start.max(rows.start) as i64..diagonal.end.min(rows.end) as i64;
            let offset = diagonal.offset;
            if !bands.last_mut().is_some_and(|band| band.extend(offset, &range)) {
                let cols = range.start + offset..range.end + offset;
                bands.push(Band { lo: offset, hi: offset, step: 1, rows: range.clone(), cols, last: range });
            }
        }
        Squares { edges, rows, bands, runs: Vec::new(), panels: Vec::new(), starts: Vec::new() }
    }

    /// `panels` at once where rows in the middle and at the end need no more than `limit` of them, else `limit` at a time.
    pub fn chunks(
        &mut self,
        panels: Range<usize>,
        limit: usize,
    ) -> impl Iterator<Item = Range<usize>> + use<> {
        let keys = panels.start * PANEL..self.edges.num_cols().min(panels.end * PANEL);
        let mut needed = 0;
        for row in [self.rows.start.midpoint(self.rows.end), self.rows.end.saturating_sub(1)] {
            self.list_panels(row..self.rows.end.min(row + 1), &keys);
            needed = needed.max(self.panels.iter().map(ExactSizeIterator::len).sum());
        }
        let step = if needed <= limit { panels.len().max(1) } else { limit };
        panels.clone().step_by(step).map(move |start| start..panels.end.min(start + step))
    }

    /// Ranges of whole tiles that hold every row with a key in `panels`, ascending.
    pub fn rows_reaching(&self, panels: &Range<usize>) -> Vec<Range<usize>> {
        let rows = &self.rows;
        let (first, last) = ((panels.start * PANEL) as i64, (panels.end * PANEL) as i64 - 1);
        let dense_cols = self.edges.dense_cols().iter();
        if !self.edges.runs().is_empty()
            || dense_cols.clone().any(|cols| (cols.start as i64) <= last && first < cols.end as i64)
        {
            return vec![rows.clone()];
        }
        let of_bands = self.bands.iter().map(|band| {
            let start = (first - band.hi).max(band.rows.start);
            start as usize..(last - band.lo + 1).min(band.rows.end).max(start) as usize
        });
        let mut ranges: Vec<_> = self.edges.dense_rows().iter().cloned().chain(of_bands).collect();
        for range in &mut ranges {
            let (start, end) = (range.start.max(rows.start), range.end.min(rows.end));
            let tile = |row: usize| rows.start + (row - rows.start) / PANEL * PANEL;
            *range = if start < end { tile(start)..rows.end.min(tile(end - 1) + PANEL) } else { 0..0 };
        }
        merge_ranges(&mut ranges);
        ranges
    }

    /// Replace `squares` by those of the tile of rows that begins with `start`, among the panels `among`; ascending.
    pub fn of_tile(&mut self, start: usize, among: &Range<usize>, squares: &mut Vec<Square>) {
        let end = self.rows.end.min(start + PANEL);
        let keys = among.start * PANEL..self.edges.num_cols().min(among.end * PANEL);
        self.list_panels(start..end, &keys);
        self.starts.clear();
        let mut count = 0;
        for range in &self.panels {
            self.starts.push(count);
            count += range.len();
        }
        squares.clear();
        let empty = Square { panel: 0, bits: [0; PANEL], halves: [false; 2] };
        squares.resize(count, empty);
        for (place, panel) in self.panels.iter().cloned().flatten().enumerate() {
            squares[place].panel = panel;
        }
        for row in start..end {
            self.mark(row, row - start, &keys, squares);
        }
        for square in squares.iter_mut() {
            let (low, high) = square.bits.split_at(PANEL / 2);
            square.halves = [low, high].map(|half| half.iter().any(|&bits| bits != 0));
        }
        squares.retain(|square| square.halves != [false; 2]);
    }

    /// The panels that hold a column of `rows`, as ranges that do not touch.
    fn list_panels(&mut self, rows: Range<usize>, keys: &Range<usize>) {
        self.panels.clear();
        if self.edges.dense_rows().iter().any(|dense| dense.start < rows.end && rows.start < dense.end) {
            self.panels.push(keys.clone());
        } else {
            self.panels.extend(self.edges.dense_cols().iter().cloned());
            for band in &self.bands {
                let (first, last) = (rows.start as i64, rows.end as i64 - 1);
                let (first, last) = (first.max(band.rows.start), last.min(band.rows.end - 1));
                if first <= last {
                    let start = (first + band.lo).max(band.cols.start);
                    let end = (last + band.hi + 1).min(band.cols.end);
                    self.panels.push(start.max(0) as usize..end.max(0) as usize);
                }
            }
            if !self.edges.runs().is_empty() {
                self.panels.extend(rows.flat_map(|row| self.edges.runs().row(row)));
            }
        }
        for range in &mut self.panels {
            let (start, end) = (range.start.max(keys.start), range.end.min(keys.end));
            *range = if start < end { start / PANEL..end.div_ceil(PANEL) } else { 0..0 };
        }
        merge_ranges(&mut self.panels);
    }

    /// Set the bits of `row`, the `slot`-th of its tile.
    fn mark(&mut self, row: usize, slot: usize, keys: &Range<usize>, squares: &mut [Square]) {
        self.runs.clear();
        if self.edges.is_dense_row(row) {
            self.runs.push(keys.clone());
        } else {
            self.runs.extend(self.edges.dense_cols().iter().cloned());
            for band in &self.bands {
                let columns = band.columns(row as i64);
                if band.step == 1 {
                    self.runs.push(columns);
                } else {
                    self.runs.extend(columns.step_by(band.step as usize).map(|column| column..column + 1));
                }
            }
            self.runs.extend(self.edges.runs().row(row));
        }
        for run in &self.runs {
            let (start, end) = (run.start.max(keys.start), run.end.min(keys.end));
            if start >= end {
                continue;
            }
            let (first, last) = (start / PANEL, (end - 1) / PANEL);
            let range = self.panels.partition_point(|panels| panels.end <= first);
            let place = self.starts[range] + first - self.panels[range].start;
            let from = u16::MAX << (start % PANEL);
            let to = u16::MAX >> (PANEL - 1 - (end - 1) % PANEL);
            if first == last {
                squares[place].bits[slot] |= from & to;
            } else {
                squares[place].bits[slot] |= from;
                for square in &mut squares[place + 1..place + last - first] {
                    square.bits[slot] = u16::MAX;
                }
                squares[place + last - first].bits[slot] |= to;
            }
        }
    }
}

/// How many pairs of the panel kernel cost as much as two edges of the general kernel: 2.3 to 2.7 forward, 3.3 to 3.4 with backward.
const PAIRS_PER_TWO_EDGES: usize = 3;
/// How many pairs of the panel kernel cost as much as six edges of the kernel for lines.
pub(super) const PAIRS_PER_SIX_EDGES_OF_LINES: usize = 7;
/// Tiles to judge an edge set by.
const TILES: usize = 64;

/// What the panel kernel would make of a head.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Coverage {
    /// Pairs that it computes, kept or not.
    pub pairs: usize,
    /// Squares that a tile of queries needs, unless it is exceptional.
    pub squares: usize,
    /// Whether that is less work than going edge by edge.
    pub pays: bool,
    /// Whether that is less work even than going along lines, where a head has them.
    pub beats_lines: bool,
}

impl Coverage {
    /// Judged by some tiles, evenly spread.
    pub fn of(edges: &EdgeSet) -> Self {
        let tiles = edges.num_rows().div_ceil(PANEL);
        let seen = tiles.min(TILES);
        let (mut pairs, mut kept, mut squares, mut counts) = (0, 0, Vec::new(), Vec::new());
        for index in 0..seen {
            let start = index * tiles / seen * PANEL;
            let rows = start..edges.num_rows().min(start + PANEL);
            let all = 0..edges.num_cols().div_ceil(PANEL);
            Squares::new(edges, rows).of_tile(start, &all, &mut squares);
            counts.push(squares.len());
            for square in &squares {
                pairs += square.halves.iter().filter(|&&half| half).count() * PANEL * PANEL / 2;
                kept += square.bits.iter().map(|bits| bits.count_ones() as usize).sum::<usize>();
            }
        }
        counts.sort_unstable();
        Coverage {
            pairs: (pairs as u128 * tiles as u128 / seen.max(1) as u128) as usize,
            squares: counts.get(counts.len() * 7 / 8).copied().unwrap_or(0),
            pays: pairs * 2 <= kept * PAIRS_PER_TWO_EDGES,
            beats_lines: pairs * 6 <= kept * PAIRS_PER_SIX_EDGES_OF_LINES,
        }
    }
}
