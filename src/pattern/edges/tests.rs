//! `EdgeSet` against a set of pairs: every law is checked on random descriptions.

use std::collections::BTreeSet;

use proptest::prelude::*;

use super::*;

pub(in crate::pattern) type Pairs = BTreeSet<(usize, usize)>;

#[derive(Debug, Clone)]
pub(in crate::pattern) enum Piece {
    Rect(Range<usize>, Range<usize>),
    Band(i64, i64, usize, Range<usize>, Range<usize>),
    Anti(i64, Range<usize>, Range<usize>),
    Edges(Pairs),
}

fn range(limit: usize) -> impl Strategy<Value = Range<usize>> {
    (0..=limit, 0..=limit).prop_map(|(a, b)| a.min(b)..a.max(b))
}

pub(in crate::pattern) fn piece(rows: usize, cols: usize) -> impl Strategy<Value = Piece> {
    let far = (rows + cols) as i64 + 3;
    prop_oneof![
        (range(rows + 2), range(cols + 2)).prop_map(|(r, c)| Piece::Rect(r, c)),
        Just(Piece::Rect(0..rows, 0..1)),
        Just(Piece::Rect(0..1, 0..cols)),
        (-far..far, -far..far, 1usize..4, range(rows), range(cols)).prop_map(|(a, b, s, r, c)| Piece::Band(
            a.min(b),
            a.max(b),
            s,
            r,
            c
        )),
        (-2..far, range(rows), range(cols)).prop_map(|(s, r, c)| Piece::Anti(s, r, c)),
        prop::collection::btree_set((0..rows, 0..cols), 0..12).prop_map(Piece::Edges),
    ]
}

fn csr(pairs: &Pairs, rows: usize) -> (Vec<i64>, Vec<i64>) {
    let row_ptr = (0..=rows).map(|row| pairs.range(..(row, 0)).count() as i64).collect();
    (row_ptr, pairs.iter().map(|&(_, col)| col as i64).collect())
}

pub(in crate::pattern) fn build(rows: usize, cols: usize, pieces: &[Piece]) -> (EdgeSet, Pairs) {
    let mut builder = EdgeSet::builder(rows, cols).unwrap();
    let mut pairs = Pairs::new();
    for piece in pieces {
        let keep: Box<dyn Fn(usize, usize) -> bool> = match piece.clone() {
            Piece::Rect(r, c) => {
                builder = builder.rect(r.clone(), c.clone());
                Box::new(move |i, j| r.contains(&i) && c.contains(&j))
            }
            Piece::Band(lo, hi, step, r, c) => {
                builder = builder.band((lo, hi, step), r.clone(), c.clone());
                Box::new(move |i, j| {
                    let offset = j as i64 - i as i64;
                    r.contains(&i)
                        && c.contains(&j)
                        && lo <= offset
                        && offset <= hi
                        && (offset - lo) % step as i64 == 0
                })
            }
            Piece::Anti(sum, r, c) => {
                builder = builder.anti_diagonal(sum, r.clone(), c.clone());
                Box::new(move |i, j| r.contains(&i) && c.contains(&j) && (i + j) as i64 == sum)
            }
            Piece::Edges(edges) => {
                let (row_ptr, col) = csr(&edges, rows);
                builder = builder.edge_list(&row_ptr, &col).unwrap();
                Box::new(move |i, j| edges.contains(&(i, j)))
            }
        };
        pairs.extend((0..rows).flat_map(|i| (0..cols).map(move |j| (i, j))).filter(|&(i, j)| keep(i, j)));
    }
    (builder.build().unwrap(), pairs)
}

fn description() -> impl Strategy<Value = (usize, usize, Vec<Piece>)> {
    (1usize..14, 1usize..14).prop_flat_map(|(rows, cols)| {
        (Just(rows), Just(cols), prop::collection::vec(piece(rows, cols), 0..6))
    })
}

proptest! {
    #[test]
    fn an_edge_set_is_the_union_of_its_pieces((rows, cols, pieces) in description()) {
        let (set, pairs) = build(rows, cols, &pieces);
        prop_assert_eq!(set.iter().collect::<Vec<_>>(), pairs.iter().copied().collect::<Vec<_>>());
        prop_assert_eq!(set.nnz(), pairs.len());
    }

    #[test]
    fn columns_lists_each_edge_of_a_row_exactly_once((rows, cols, pieces) in description()) {
        let (set, pairs) = build(rows, cols, &pieces);
        for row in 0..rows {
            let mut columns = Vec::new();
            set.columns(row, &mut columns);
            prop_assert_eq!(columns.len(), set.degree(row));
            columns.sort_unstable();
            let expected: Vec<u32> = pairs.iter().filter(|p| p.0 == row).map(|p| p.1 as u32).collect();
            prop_assert_eq!(columns, expected);
        }
    }

    #[test]
    fn transposing_swaps_every_pair_and_is_its_own_inverse((rows, cols, pieces) in description()) {
        let (set, pairs) = build(rows, cols, &pieces);
        let transposed = set.transposed();
        let swapped: Pairs = pairs.iter().map(|&(i, j)| (j, i)).collect();
        prop_assert_eq!(transposed.iter().collect::<Pairs>(), swapped);
        prop_assert_eq!(transposed.nnz(), set.nnz());
        prop_assert_eq!(transposed.transposed().iter().collect::<Pairs>(), pairs);
    }

    #[test]
    fn nnz_after_counts_the_edges_between_patches((rows, cols, pieces) in description(), prefix in 0usize..4) {
        let (set, pairs) = build(rows, cols, &pieces);
        let expected = pairs.iter().filter(|p| p.0 >= prefix && p.1 >= prefix).count();
        prop_assert_eq!(set.nnz_after(prefix), expected);
    }

    #[test]
    fn the_edges_after_a_prefix_are_those_between_patches((rows, cols, pieces) in description(), prefix in 0usize..4) {
        let (set, pairs) = build(rows, cols, &pieces);
        let expected: Pairs =
            pairs.iter().filter(|p| p.0 >= prefix && p.1 >= prefix).map(|&(i, j)| (i - prefix, j - prefix)).collect();
        let after = set.after(prefix);
        prop_assert_eq!((after.num_rows(), after.num_cols()), (rows.saturating_sub(prefix), cols.saturating_sub(prefix)));
        prop_assert_eq!(after.nnz(), expected.len());
        prop_assert_eq!(after.iter().collect::<Pairs>(), expected);
    }

    #[test]
    fn rows_given_one_by_one_are_kept((rows, cols, pieces) in description()) {
        let (set, pairs) = build(rows, cols, &pieces);
        let again = EdgeSet::builder(rows, cols).unwrap().by_row(|row, out| {
            out.extend(pairs.range((row, 0)..(row + 1, 0)).rev().map(|&(_, col)| col..col + 1));
        });
        prop_assert_eq!(again.build().unwrap().iter().collect::<Vec<_>>(), set.iter().collect::<Vec<_>>());
    }

    #[test]
    fn shifting_moves_every_edge_down_the_diagonal((rows, cols, pieces) in description(), shift in 0usize..3) {
        let (set, pairs) = build(rows, cols, &pieces);
        let moved = EdgeSet::builder(rows + shift, cols + shift).unwrap().shifted(&set, shift).build().unwrap();
        let expected: Pairs = pairs.iter().map(|&(i, j)| (i + shift, j + shift)).collect();
        prop_assert_eq!(moved.iter().collect::<Pairs>(), expected);
    }
}

#[test]
fn offsets_take_memory_independent_of_the_number_of_tokens() {
    let of = |n: usize| {
        let mut builder = EdgeSet::builder(n, n).unwrap().global(0..1);
        for offset in [1, 2, 3, 5, 8, 13] {
            builder = builder.diagonal(offset, 1..n, 1..n).diagonal(-offset, 1..n, 1..n);
        }
        builder.build().unwrap()
    };
    let huge = of((1 << 31) + 7);
    assert_eq!(huge.bytes(), of(64).bytes());
    assert_eq!(huge.nnz(), 2 * ((1usize << 31) + 7) - 1 + 2 * (6 * ((1usize << 31) + 6) - 32));
    let mut row = Vec::new();
    huge.row(1 << 31, &mut row);
    assert_eq!(row.last(), Some(&((1 << 31) + 5..(1 << 31) + 6)), "{row:?}");
}

#[test]
fn a_side_that_does_not_fit_the_index_type_is_refused() {
    assert!(matches!(EdgeSet::builder(1 << 33, 4), Err(Error::Overflow { .. })));
}

#[test]
fn a_broken_edge_list_is_refused_with_the_place_that_is_wrong() {
    let broken: [(&[i64], &[i64], &str); 6] = [
        (&[0, 1], &[0], "row_ptr: expected 3 entries"),
        (&[0, 1, 3], &[0, 1], "row_ptr: expected to start at 0"),
        (&[0, 3, 2], &[0, 1], "row 0 goes from 0 to 3"),
        (&[0, 1, 2], &[0, 2], "col: expected a key index from 0 to 1, got 2 in row 1"),
        (&[0, 1, 2], &[0, -1], "got -1 in row 1"),
        (&[0, 2, 2], &[1, 1], "ascend strictly within a row, got 1 after 1 in row 0"),
    ];
    for (row_ptr, col, expected) in broken {
        let error = EdgeSet::builder(2, 2).unwrap().edge_list(row_ptr, col).unwrap_err().to_string();
        assert!(error.contains(expected), "{error}");
    }
}

/// More diagonals than are kept as such, so that the short ones become bands.
#[test]
fn wide_bands_are_the_pairs_they_say() {
    let n = 150;
    let wide = |step: usize, rows: Range<usize>, cols: Range<usize>| Piece::Band(-149, 149, step, rows, cols);
    let extras: [&[Piece]; 3] = [
        &[],
        &[Piece::Rect(0..2, 0..n), Piece::Rect(0..n, 0..2)],
        &[Piece::Anti(150, 0..n, 0..n), Piece::Edges(Pairs::from([(3, 140), (149, 0)]))],
    ];
    for step in [1, 2] {
        for (rows, cols) in [(0..n, 0..n), (2..n, 2..n), (5..140, 0..n), (0..100, 30..n)] {
            for extra in extras {
                let pieces = [&[wide(step, rows.clone(), cols.clone())], extra].concat();
                let (set, pairs) = build(n, n, &pieces);
                assert_eq!(set.iter().collect::<Pairs>(), pairs, "{pieces:?}");
                assert_eq!(set.nnz(), pairs.len());
            }
        }
    }
}
