//! Scattered diagonals beside single dense rows and columns, which are worked on without lists of edges.

use super::accuracy::check;
use super::*;

fn scattered(n: usize, dense: usize, offsets: &[i64]) -> Arc<EdgeSet> {
    let builder = EdgeSet::builder(n, n).unwrap().global(0..dense);
    Arc::new(
        offsets.iter().fold(builder, |builder, &o| builder.diagonal(o, dense..n, dense..n)).build().unwrap(),
    )
}

#[test]
fn every_number_of_lines_and_of_dense_tokens_is_right() {
    let mut random = Random(1);
    for dense in 0..4 {
        for count in [0, 1, 3, 40, 90] {
            // Far from each other, so that the panel kernel would waste most of what it computes.
            let offsets: Vec<_> = (0..count).map(|i| (i - count / 2) * 7 + 1).collect();
            let edges = scattered(150, dense, &offsets);
            let head = Plan::new(std::slice::from_ref(&edges)).unwrap();
            assert!(head.head(0, 0, 1).lines().is_some());
            let case =
                Case::<f32>::new(&mut random, [2, 1, 1, 150, 150, 20, 16], std::slice::from_ref(&edges));
            check(&case, &format!("{count} diagonals, {dense} dense tokens"));
        }
    }
}

#[test]
fn pieces_of_diagonals_in_any_row_are_right() {
    for seed in 0..60 {
        let mut random = Random(seed);
        let n = 1 + random.below(200);
        let mut builder = EdgeSet::builder(n, n).unwrap();
        for _ in 0..1 + random.below(9) {
            let offset = random.below(2 * n) as i64 - n as i64;
            builder = builder.diagonal(offset, random.range(n), random.range(n));
        }
        let sets = [Arc::new(builder.build().unwrap())];
        check(&Case::<f64>::new(&mut random, [1, 1, 1, n, n, 7, 9], &sets), &format!("seed {seed}"));
    }
}

#[test]
fn heads_whose_numbers_do_not_fit_at_a_time_give_the_same_bits_on_any_number_of_threads() {
    let n = 1500;
    let offsets: Vec<_> = (-20..20).map(|i| i * 31 + 3).collect();
    let sets: Vec<_> = (0..5).map(|dense| scattered(n, dense % 3, &offsets[dense..])).collect();
    let case = Case::<f32>::new(&mut Random(3), [1, 5, 5, n, n, 16, 16], &sets);
    for isa in Isa::available() {
        let expected = case.results(isa);
        for threads in [2, 3, 8] {
            let got = results(&case.problem(), case.grad_out(), &run(isa, threads));
            assert!(got.same_bits(&expected), "{threads} threads, {}", isa.name());
        }
    }
}

#[test]
fn a_query_that_gives_everything_to_one_key_has_no_gradient_at_all() {
    let n = 64;
    let mut case =
        Case::<f32>::new(&mut Random(4), [1, 1, 1, n, n, 32, 32], &[scattered(n, 1, &[-9, 5, 17])]);
    // Scores of millions, so that every other weight underflows.
    case.q.iter_mut().for_each(|q| *q *= 1e6);
    for isa in Isa::available() {
        let results = case.results(isa);
        assert!(results.dq.iter().all(|&dq| dq == 0.0), "{}", isa.name());
        assert!(results.dv.iter().any(|&dv| dv != 0.0));
    }
}
