//! Rows with few edges are worked on four beside each other: wherever their edges begin and end, and however long they are.

use half::bf16;

use super::accuracy::check;
use super::*;

#[test]
fn diagonals_may_begin_and_end_at_any_row_of_a_strip() {
    let mut random = Random(1);
    for n in 1..=37 {
        for (prefix, keys) in [(0, n), (1, n), (0, n + 3), (2, n + 1)] {
            let mut builder =
                EdgeSet::builder(n, keys).unwrap().rect(0..prefix, 0..keys).rect(0..n, 0..prefix);
            for offset in [-13, -5, -2, 1, 3, 8] {
                builder = builder.diagonal(offset, prefix..n, prefix..keys);
            }
            for _ in 0..3 {
                let offset = random.below(2 * n) as i64 - n as i64;
                builder = builder.diagonal(offset, random.range(n), 0..keys);
            }
            let sets = [Arc::new(builder.build().unwrap())];
            let context = format!("{n} queries, {keys} keys, prefix {prefix}");
            check(&Case::<f32>::new(&mut random, [1, 2, 2, n, keys, 16, 16], &sets), &context);
            check(&Case::<f64>::new(&mut random, [1, 2, 1, n, keys, 5, 20], &sets), &context);
        }
    }
}

#[test]
fn rows_of_any_length_may_stand_beside_each_other() {
    let mut random = Random(2);
    let lens = [0, 1, 600, 3, 4, 5, 0, 0, 0, 0, 17, 400, 511, 512, 513, 2, 640, 0, 1];
    let (mut row_ptr, mut col) = (vec![0], vec![]);
    for len in lens {
        let mut columns: Vec<i64> = (0..640).collect();
        for place in 0..len {
            columns.swap(place, place + random.below(640 - place));
        }
        columns.truncate(len);
        columns.sort_unstable();
        col.extend(columns);
        row_ptr.push(col.len() as i64);
    }
    let edges =
        EdgeSet::builder(lens.len(), 640).unwrap().edge_list(&row_ptr, &col).unwrap().build().unwrap();
    for masked_logits in [MaskedLogits::NegInf, MaskedLogits::Zero] {
        let mut case =
            Case::<f64>::new(&mut random, [2, 2, 1, lens.len(), 640, 9, 8], &[Arc::new(edges.clone())]);
        case.masked_logits = masked_logits;
        check(&case, "long and short rows");
        case.key_mask = Some((0..2 * 640).map(|key| u8::from(key % 3 != 0)).collect());
        check(&case, "long and short rows of masked keys");
    }
}

#[test]
fn every_head_dimension_is_right() {
    let mut random = Random(3);
    let edges = EdgeSet::builder(9, 9).unwrap().global(0..1).diagonal(2, 0..9, 0..9).diagonal(-1, 0..9, 0..9);
    let sets = [Arc::new(edges.diagonal(0, 0..9, 0..9).build().unwrap())];
    for d in (1..=130).chain([160, 192, 255, 256]) {
        check(&Case::<f32>::new(&mut random, [1, 1, 1, 9, 9, d, d], &sets), &format!("width {d}"));
        check(&Case::<bf16>::new(&mut random, [1, 1, 1, 9, 9, d, d], &sets), &format!("width {d}"));
    }
}

#[test]
fn tensors_with_gaps_between_neighbouring_elements_are_copied_once() {
    let mut random = Random(4);
    let edges = Arc::new(EdgeSet::builder(11, 11).unwrap().band((-2, 2, 1), 0..11, 0..11).build().unwrap());
    let case = Case::<f32>::new(&mut random, [1, 1, 1, 11, 11, 6, 6], std::slice::from_ref(&edges));
    let spread: Vec<f32> = case.k.iter().flat_map(|&k| [k, f32::NAN]).collect();
    for isa in Isa::available() {
        let mut problem = case.problem();
        problem.k = View::strided("k", &spread, 0, [1, 1, 11, 6], [132, 132, 12, 2]).unwrap();
        let gapped = results(&problem, case.grad_out(), &run(isa, 1));
        assert!(gapped.same_bits(&case.results(isa)), "{}", isa.name());
    }
}
