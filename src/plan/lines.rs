//! Edges as lines: where a mask is made of diagonals, of columns that every row keeps and of rows that keep everything, rows that lie
//! beside each other have their edges beside each other, and no list of them is needed.

use std::ops::Range;

use crate::pattern::edges::EdgeSet;

/// Of more dense rows, or columns, products of blocks make better use than lines do.
const MANY_DENSE: usize = 4;

/// One edge in each of some consecutive rows: a diagonal, or a part of a column.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Line {
    /// First row.
    pub start: usize,
    /// One past the last row.
    pub end: usize,
    /// Column of the edge in row 0, if it had one.
    origin: isize,
    /// How far the column moves from one row to the next: 1 on a diagonal, 0 in a column.
    pub step: usize,
    /// Where the number of the edge in row 0 would be, among one number per edge of the head.
    pub at: isize,
}

impl Line {
    /// The column in `row`, one of the line's.
    #[inline(always)]
    pub fn column(&self, row: usize) -> usize {
        (self.origin + (row * self.step) as isize) as usize
    }

    /// Where the number of the edge in `row` is.
    #[inline(always)]
    pub fn place(&self, row: usize) -> usize {
        (self.at + row as isize) as usize
    }

    /// Whether the line has an edge in each of these rows.
    #[inline(always)]
    pub fn covers(&self, rows: &Range<usize>) -> bool {
        self.start <= rows.start && rows.end <= self.end
    }

    /// The part of the line in `rows`, if there is one.
    #[inline]
    pub fn within(&self, rows: &Range<usize>) -> Option<Self> {
        let part = Line { start: self.start.max(rows.start), end: self.end.min(rows.end), ..*self };
        (part.start < part.end).then_some(part)
    }
}

/// One head's edges as lines, in both directions. Every edge has a number of its own between 0 and [`Lines::len`].
#[derive(Debug)]
pub struct Lines {
    /// Rows are the queries that do not keep every key.
    pub by_query: Vec<Line>,
    /// Rows are the keys that not every query keeps.
    pub by_key: Vec<Line>,
    /// Queries that keep every key: query, and the place of its first edge; those of the others follow.
    pub dense_queries: Vec<(usize, usize)>,
    /// Keys that every query keeps. The rows of their lines are queries, and the columns that key.
    pub dense_keys: Vec<(usize, Vec<Line>)>,
    /// The other queries.
    pub queries: Vec<Range<usize>>,
    /// The other keys.
    pub keys: Vec<Range<usize>>,
    /// Number of edges.
    pub len: usize,
}

impl Lines {
    /// `None` where there are irregular edges or many dense rows or columns.
    pub fn of(edges: &EdgeSet) -> Option<Self> {
        let count = |ranges: &[Range<usize>]| ranges.iter().map(ExactSizeIterator::len).sum::<usize>();
        let (rows, cols) = (edges.dense_rows(), edges.dense_cols());
        if !edges.runs().is_empty() || count(rows) >= MANY_DENSE || count(cols) >= MANY_DENSE {
            return None;
        }
        let (queries, keys) = (others(rows, edges.num_rows()), others(cols, edges.num_cols()));
        let mut len = 0;
        let mut dense_queries = Vec::new();
        let (mut by_query, mut by_key) = (Vec::new(), Vec::new());
        for query in rows.iter().cloned().flatten() {
            dense_queries.push((query, len));
            by_key.extend(keys.iter().map(|keys| Line {
                start: keys.start,
                end: keys.end,
                origin: query as isize,
                step: 0,
                at: len as isize,
            }));
            len += edges.num_cols();
        }
        let mut dense_keys = Vec::new();
        for key in cols.iter().cloned().flatten() {
            let mut lines: Vec<_> = dense_queries
                .iter()
                .map(|&(query, first)| Line {
                    start: query,
                    end: query + 1,
                    origin: key as isize,
                    step: 0,
                    at: (first + key) as isize - query as isize,
                })
                .collect();
            for rows in &queries {
                let at = len as isize - rows.start as isize;
                let line = Line { start: rows.start, end: rows.end, origin: key as isize, step: 0, at };
                by_query.push(line);
                lines.push(line);
                len += rows.len();
            }
            dense_keys.push((key, lines));
        }
        for diagonal in edges.diagonals() {
            let (start, end, offset) = (diagonal.start, diagonal.end, diagonal.offset as isize);
            let at = len as isize - start as isize;
            by_query.push(Line { start, end, origin: offset, step: 1, at });
            let to_key = |query: usize| (query as isize + offset) as usize;
            by_key.push(Line {
                start: to_key(start),
                end: to_key(end),
                origin: -offset,
                step: 1,
                at: at - offset,
            });
            len += end - start;
        }
        Some(Lines { by_query, by_key, dense_queries, dense_keys, queries, keys, len })
    }
}

/// What `ranges`, ascending and apart, leave of `0..len`.
fn others(ranges: &[Range<usize>], len: usize) -> Vec<Range<usize>> {
    let starts = std::iter::once(0).chain(ranges.iter().map(|range| range.end));
    let ends = ranges.iter().map(|range| range.start).chain(std::iter::once(len));
    starts.zip(ends).map(|(start, end)| start..end).filter(|range| !range.is_empty()).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_hold_every_edge_once_and_under_one_number_in_both_directions() {
        let n = 23;
        for keys in [n, n - 3, n + 5] {
            let mut builder = EdgeSet::builder(n, keys).unwrap().rect(0..1, 0..keys).rect(9..10, 0..keys);
            builder = builder.rect(0..n, 0..1).rect(0..n, 7..8);
            for offset in [-20, -4, -1, 2, 3, 19] {
                builder = builder.diagonal(offset, 0..n, 0..keys);
            }
            let edges = builder.diagonal(5, 3..6, 0..keys).diagonal(5, 12..20, 0..keys).build().unwrap();
            let lines = Lines::of(&edges).unwrap();
            let expected: Vec<_> = edges.iter().collect();
            assert_eq!(lines.len, expected.len());

            let mut by_query: Vec<_> = lines
                .dense_queries
                .iter()
                .flat_map(|&(q, at)| (0..keys).map(move |k| (q, k, at + k)))
                .collect();
            by_query.extend(
                lines.by_query.iter().flat_map(|l| (l.start..l.end).map(|q| (q, l.column(q), l.place(q)))),
            );
            let mut by_key: Vec<_> = lines
                .by_key
                .iter()
                .flat_map(|l| (l.start..l.end).map(|k| (l.column(k), k, l.place(k))))
                .collect();
            for (key, parts) in &lines.dense_keys {
                by_key.extend(parts.iter().flat_map(|l| (l.start..l.end).map(|q| (q, *key, l.place(q)))));
            }
            by_query.sort_unstable();
            by_key.sort_unstable();
            assert_eq!(by_query, by_key);
            assert!(by_query.iter().map(|&(query, key, _)| (query, key)).eq(expected));
            let mut places: Vec<_> = by_query.iter().map(|&(.., place)| place).collect();
            places.sort_unstable();
            assert!(places.into_iter().eq(0..lines.len));
        }
    }

    #[test]
    fn irregular_edges_and_many_dense_rows_are_no_lines() {
        let edges = |rows: Range<usize>| EdgeSet::builder(20, 20).unwrap().rect(rows, 0..20);
        assert!(Lines::of(&edges(0..3).build().unwrap()).is_some());
        assert!(Lines::of(&edges(0..4).build().unwrap()).is_none());
        assert!(Lines::of(&edges(0..1).anti_diagonal(12, 0..20, 0..20).build().unwrap()).is_none());
    }
}
