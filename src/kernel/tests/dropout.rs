//! Dropout is a pure function of seed, head, query and key, with the statistics of independent coins.

use super::*;

#[test]
fn the_share_kept_is_one_minus_p() {
    for p in [0.0, 0.05, 0.1, 0.5, 0.9, 1.0] {
        let dropout = Dropout { seed: 5, p };
        let draws = 400 * 500;
        let kept = (0..400)
            .flat_map(|i| (0..500).map(move |j| (i, j)))
            .filter(|&(i, j)| dropout.keep(3, i, j))
            .count();
        let (expected, deviation) = (draws as f64 * (1.0 - p), (draws as f64 * p * (1.0 - p)).sqrt());
        assert!((kept as f64 - expected).abs() <= 4.0 * deviation, "p = {p}: kept {kept} of {draws}");
    }
}

#[test]
fn neighbours_in_every_direction_and_other_seeds_are_independent() {
    let p = 0.5;
    let keep = |seed: u64, head: u64, i: usize, j: usize| Dropout { seed, p }.keep(head, i, j);
    type Other<'a> = &'a dyn Fn(usize, usize) -> bool;
    let pairs: [(&str, Other); 7] = [
        ("next key", &|i, j| keep(1, 2, i, j + 1)),
        ("next query", &|i, j| keep(1, 2, i + 1, j)),
        ("diagonal", &|i, j| keep(1, 2, i + 1, j + 1)),
        ("swapped", &|i, j| keep(1, 2, j, i)),
        ("next head", &|i, j| keep(1, 3, i, j)),
        ("next seed", &|i, j| keep(2, 2, i, j)),
        ("seed with other high bits", &|i, j| keep(1 | 1 << 63, 2, i, j)),
    ];
    let size = 600;
    for (name, other) in pairs {
        let mut same = 0;
        for i in 0..size {
            for j in i + 1..size {
                same += usize::from(keep(1, 2, i, j) == other(i, j));
            }
        }
        let draws = (size * (size - 1) / 2) as f64;
        assert!(
            (same as f64 - draws / 2.0).abs() < 4.5 * draws.sqrt() / 2.0,
            "{name}: {same} of {draws} agree"
        );
    }
}

#[test]
fn rows_and_columns_keep_binomial_numbers() {
    // Chi-square of the numbers kept per row and per column: near its mean, the number of rows, with variance of about twice it.
    let (size, p) = (512usize, 0.25);
    let dropout = Dropout { seed: 77, p };
    for by_key in [false, true] {
        let chi_square: f64 = (0..size)
            .map(|a| {
                let kept = (0..size)
                    .filter(|&b| if by_key { dropout.keep(0, b, a) } else { dropout.keep(0, a, b) })
                    .count();
                (kept as f64 - size as f64 * (1.0 - p)).powi(2) / (size as f64 * p * (1.0 - p))
            })
            .sum();
        assert!((chi_square - size as f64).abs() < 5.0 * (2.0 * size as f64).sqrt(), "{chi_square}");
    }
}

#[test]
fn factors_restore_the_mean_and_everything_may_be_dropped() {
    let dropout = Dropout { seed: 1, p: 0.75 };
    assert!((0..100).all(|key| dropout.factor(0, 0, key) == if dropout.keep(0, 0, key) { 4.0 } else { 0.0 }));

    let mut case = Case::<f32>::random(&mut Random(11));
    (case.dropout, case.masked_logits) = (Some(Dropout { seed: 1, p: 1.0 }), MaskedLogits::NegInf);
    let results = case.results(Isa::selected().unwrap());
    for (name, values) in results.named() {
        assert!(name == "lse" || values.iter().all(|&value| value == 0.0), "{name}");
    }
}

#[test]
fn the_kernels_drop_exactly_these_edges() {
    // With v the identity, outputs are the weights themselves.
    let (n, s) = (70, 16);
    for full in [true, false] {
        let builder = EdgeSet::builder(n, s).unwrap();
        let builder = if full { builder.rect(0..n, 0..s) } else { builder.band((-40, 7, 2), 0..n, 0..s) };
        let edges = Arc::new(builder.build().unwrap());
        let mut case = Case::<f64>::new(&mut Random(12), [1, 2, 2, n, s, 4, s], std::slice::from_ref(&edges));
        case.v = (0..2 * s * s).map(|cell| f64::from(cell / s % s == cell % s)).collect();
        let whole = case.clone();
        let dropout = Dropout { seed: 99, p: 0.4 };
        case.dropout = Some(dropout);
        for isa in Isa::available() {
            let (whole, dropped) = (whole.results(isa), case.results(isa));
            let distance = distance("lse", &whole.lse, &dropped.lse);
            assert!(distance < 1e-14, "the softmax comes before dropout, but lse is off by {distance:e}");
            for (index, (&p, &got)) in whole.out.iter().zip(&dropped.out).enumerate() {
                let (head, i, j) = (index / (n * s), index / s % n, index % s);
                let expected = p * dropout.factor(head as u64, i, j);
                assert!((got - expected).abs() <= 1e-15, "({head}, {i}, {j}): {got}, expected {expected}");
            }
        }
    }
}
