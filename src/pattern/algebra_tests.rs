//! Set operations against sets of pairs, on random descriptions.

use std::collections::BTreeSet;

use proptest::prelude::*;

use super::super::edges::tests::{Pairs, Piece, build, piece};
use super::*;

/// Two descriptions over the same tokens.
fn two() -> impl Strategy<Value = (usize, usize, Vec<Piece>, Vec<Piece>)> {
    (1usize..14, 1usize..14).prop_flat_map(|(rows, cols)| {
        let pieces = || prop::collection::vec(piece(rows, cols), 0..5);
        (Just(rows), Just(cols), pieces(), pieces())
    })
}

fn pairs_of(set: &EdgeSet) -> Vec<(usize, usize)> {
    set.iter().collect()
}

/// The parts of a canonical set never meet: a kernel would count such an edge twice.
fn assert_canonical(set: &EdgeSet) {
    let mut columns = Vec::new();
    for row in 0..set.num_rows() {
        columns.clear();
        set.columns(row, &mut columns);
        assert_eq!(columns.iter().collect::<BTreeSet<_>>().len(), columns.len(), "row {row} of {set:?}");
    }
    assert_eq!(set.nnz(), set.iter().count());
}

proptest! {
    #[test]
    fn operations_are_those_of_sets((rows, cols, first, second) in two()) {
        let ((a, of_a), (b, of_b)) = (build(rows, cols, &first), build(rows, cols, &second));
        let all: Pairs = (0..rows).flat_map(|row| (0..cols).map(move |col| (row, col))).collect();
        for (got, expected) in [
            (a.union(&b), &of_a | &of_b),
            (a.intersection(&b), &of_a & &of_b),
            (a.difference(&b), &of_a - &of_b),
            (a.complement(), &all - &of_a),
        ] {
            let got = got.unwrap();
            assert_canonical(&got);
            prop_assert_eq!(pairs_of(&got), expected.into_iter().collect::<Vec<_>>());
        }
    }

    #[test]
    fn the_jaccard_index_is_the_share_of_common_edges((rows, cols, first, second) in two()) {
        let ((a, of_a), (b, of_b)) = (build(rows, cols, &first), build(rows, cols, &second));
        let (both, either) = ((&of_a & &of_b).len(), (&of_a | &of_b).len());
        let expected = if either == 0 { 1.0 } else { both as f64 / either as f64 };
        prop_assert_eq!(a.jaccard(&b).unwrap(), expected);
        prop_assert_eq!(b.jaccard(&a).unwrap(), expected);
    }

    #[test]
    fn complement_exchanges_union_and_intersection((rows, cols, first, second) in two()) {
        let ((a, _), (b, _)) = (build(rows, cols, &first), build(rows, cols, &second));
        let outside_both = a.complement().unwrap().intersection(&b.complement().unwrap()).unwrap();
        prop_assert_eq!(pairs_of(&a.union(&b).unwrap().complement().unwrap()), pairs_of(&outside_both));
        prop_assert_eq!(pairs_of(&a.complement().unwrap().complement().unwrap()), pairs_of(&a));
    }
}

fn bands(n: usize, offsets: &[i64]) -> EdgeSet {
    let builder = EdgeSet::builder(n, n).unwrap().global(0..1);
    offsets.iter().fold(builder, |builder, &offset| builder.diagonal(offset, 1..n, 1..n)).build().unwrap()
}

#[test]
fn diagonals_and_dense_parts_combine_without_visiting_rows() {
    // Two billion tokens: anything that grows with them would neither fit nor return.
    let n = (1 << 31) + 7;
    let patches = |builder: Builder| builder.band((-2, 2, 1), 1..n, 1..n).build().unwrap();
    let (a, b) = (bands(n, &[-3, 1, 8]), bands(n, &[1, 2]));
    let prefix = 2 * n - 1;
    let union = a.union(&b).unwrap();
    assert_eq!(union.nnz(), prefix + 4 * (n - 1) - (3 + 1 + 8 + 2));
    assert_eq!(a.intersection(&b).unwrap(), bands(n, &[1]));
    let window = patches(EdgeSet::builder(n, n).unwrap());
    assert_eq!(window.difference(&bands(n, &[1])).unwrap().nnz(), window.nnz() - (n - 2));
    let dense = EdgeSet::builder(n, n).unwrap().rect(0..n, 3..5).build().unwrap();
    assert_eq!(dense.complement().unwrap().dense_cols(), &[0..3, 5..n]);
}

#[test]
fn a_complement_takes_memory_for_edges_and_rows_and_not_for_cells() {
    let n = 1 << 17;
    let complement = bands(n, &[-3, 1, 8]).complement().unwrap();
    assert_eq!(complement.nnz(), n * n - bands(n, &[-3, 1, 8]).nnz());
    assert!(complement.bytes() < 64 * n, "{} bytes", complement.bytes());
    assert_eq!(complement.complement().unwrap().nnz(), bands(n, &[-3, 1, 8]).nnz());
}

#[test]
fn what_the_second_operand_does_not_touch_stays_dense() {
    let n = 40;
    let a = bands(n, &[2]);
    let patches = EdgeSet::builder(n, n).unwrap().band((-1, 3, 1), 1..n, 1..n).build().unwrap();
    assert_eq!(a.difference(&patches).unwrap(), bands(n, &[]));
}

#[test]
fn many_short_pieces_of_diagonals_are_stored_as_runs() {
    // 200 dense columns cut each of 200 diagonals into 200 pieces, of which every row meets at most 200.
    let n = 4000;
    let columns = (0..200)
        .fold(EdgeSet::builder(n, n).unwrap(), |b, c| b.rect(0..n, c * 20..c * 20 + 1))
        .build()
        .unwrap();
    let slashes = EdgeSet::builder(n, n).unwrap().band((0, 3999, 20), 0..n, 0..n).build().unwrap();
    let union = columns.union(&slashes).unwrap();
    assert!(union.diagonals().len() <= 128 + 8 * 200, "{} diagonals", union.diagonals().len());
    assert_canonical(&union);
}

#[test]
fn heads_that_share_operands_share_the_result() {
    let (a, b) = (Arc::new(bands(9, &[1])), Arc::new(bands(9, &[2])));
    let heads =
        Operation::Union.apply_per_head(&vec![a.clone(), b.clone(), a.clone()], &vec![b.clone()]).unwrap();
    assert_eq!(heads.len(), 3);
    assert!(Arc::ptr_eq(&heads[0], &heads[2]) && !Arc::ptr_eq(&heads[0], &heads[1]));
    let error = Operation::Union.apply_per_head(&vec![a.clone(), b.clone()], &vec![a.clone(), b.clone(), a]);
    assert!(error.unwrap_err().to_string().contains("got 2 and 3"));
}

#[test]
fn operands_of_different_size_are_refused() {
    for operation in [Operation::Union, Operation::Intersection, Operation::Difference] {
        let error = operation.apply(&bands(9, &[1]), &bands(8, &[1])).unwrap_err().to_string();
        assert!(error.contains("9 x 9 and 8 x 8"), "{error}");
    }
}
