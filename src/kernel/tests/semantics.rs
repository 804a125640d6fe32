//! What is promised about empty rows, masked places, NaN and infinities.

use super::*;

const NAN: f64 = f64::NAN;

fn set(n: usize, s: usize, pairs: &[(usize, usize)]) -> Arc<EdgeSet> {
    let builder = EdgeSet::builder(n, s).unwrap();
    Arc::new(pairs.iter().fold(builder, |builder, &(i, j)| builder.rect(i..i + 1, j..j + 1)).build().unwrap())
}

/// Sizes of one batch element with one head.
fn sizes(n: usize, s: usize) -> [usize; 7] {
    [1, 1, 1, n, s, 5, 3]
}

#[test]
fn a_query_without_keys_gives_zero_and_minus_infinity_and_no_gradient() {
    for isa in Isa::available() {
        let mut case = Case::<f64>::new(&mut Random(1), sizes(3, 4), &[set(3, 4, &[(0, 1), (2, 3)])]);
        case.q[5..10].fill(NAN);
        case.grad_out[3..6].fill(NAN);
        let results = case.results(isa);
        assert_eq!(results.out[3..6], [0.0; 3]);
        assert_eq!(results.lse[1], f64::NEG_INFINITY);
        assert_eq!(results.dq[5..10], [0.0; 5]);
        assert!(results.named().iter().all(|(_, values)| values.iter().all(|value| !value.is_nan())));
    }
}

#[test]
fn a_plan_without_edges_and_a_mask_without_keys_give_only_empty_rows() {
    let full = Arc::new(EdgeSet::builder(70, 9).unwrap().rect(0..70, 0..9).build().unwrap());
    let empty = Arc::new(EdgeSet::builder(70, 9).unwrap().build().unwrap());
    let banded = Arc::new(EdgeSet::builder(70, 9).unwrap().band((-20, 3, 1), 0..70, 0..9).build().unwrap());
    for isa in Isa::available() {
        for (plan, key_mask) in [(&empty, 1), (&full, 0), (&banded, 0)] {
            for masked_logits in [MaskedLogits::NegInf, MaskedLogits::Zero] {
                let mut case = Case::<f32>::new(&mut Random(2), sizes(70, 9), std::slice::from_ref(plan));
                case.key_mask = Some(vec![key_mask; 9]);
                case.masked_logits = masked_logits;
                if key_mask == 0 {
                    case.k.fill(f32::NAN);
                    case.v.fill(f32::NAN);
                } else if masked_logits == MaskedLogits::Zero {
                    continue;
                }
                let results = case.results(isa);
                assert!(results.lse.iter().all(|&lse| lse == f64::NEG_INFINITY));
                for (name, values) in results.named() {
                    assert!(name == "lse" || values.iter().all(|&value| value == 0.0), "{name} {values:?}");
                }
            }
        }
    }
}

#[test]
fn nothing_at_all_is_a_problem_too() {
    for sizes in [
        [0, 2, 1, 5, 4, 3, 2],
        [2, 0, 0, 5, 4, 3, 2],
        [2, 2, 1, 0, 4, 3, 2],
        [2, 2, 1, 5, 0, 3, 2],
        [1, 1, 1, 0, 0, 1, 1],
    ] {
        let edges = Arc::new(EdgeSet::builder(sizes[3], sizes[4]).unwrap().rect(0..5, 0..5).build().unwrap());
        for masked_logits in [MaskedLogits::NegInf, MaskedLogits::Zero] {
            let mut case = Case::<f32>::new(&mut Random(3), sizes, std::slice::from_ref(&edges));
            case.masked_logits = masked_logits;
            for isa in Isa::available() {
                let results = case.results(isa);
                assert!(results.out.iter().chain(&results.dk).chain(&results.dv).all(|&value| value == 0.0));
                assert!(results.lse.iter().all(|&lse| lse == f64::NEG_INFINITY));
            }
        }
    }
}

/// Put NaN into k and v of every key, and q and grad_out of every query, that has no edge at all.
fn poison_what_is_not_kept(case: &Case<f64>) -> Case<f64> {
    let mut poisoned = case.clone();
    let problem = case.problem();
    let [batch, heads, kv_heads, n, s, d, dv] = case.sizes;
    let mut key_used = vec![false; batch * kv_heads * s];
    for b in 0..batch {
        for h in 0..heads {
            for i in 0..n {
                let mut runs = Vec::new();
                case.plan.head(b, h, heads).by_query().row(i, &mut runs);
                let kept = |j: &usize| {
                    problem.key_mask.is_none_or(|mask| mask.at([b, *j]) != 0)
                        && problem.bias.is_none_or(|bias| bias.at([b, h, i, *j]) != f64::NEG_INFINITY)
                };
                let kept: Vec<usize> = runs.into_iter().flatten().filter(kept).collect();
                for &j in &kept {
                    key_used[(b * kv_heads + h / (heads / kv_heads)) * s + j] = true;
                }
                if kept.is_empty() {
                    let row = (b * heads + h) * n + i;
                    poisoned.q[row * d..(row + 1) * d].fill(NAN);
                    poisoned.grad_out[row * dv..(row + 1) * dv].fill(NAN);
                }
            }
        }
    }
    for (key, _) in key_used.iter().enumerate().filter(|(_, used)| !**used) {
        poisoned.k[key * d..(key + 1) * d].fill(NAN);
        poisoned.v[key * dv..(key + 1) * dv].fill(f64::INFINITY);
    }
    poisoned
}

#[test]
fn what_is_not_kept_may_hold_anything() {
    let mut poisoned_cases = 0;
    for seed in 0..150 {
        let mut case = Case::<f64>::random(&mut Random(4000 + seed));
        case.masked_logits = MaskedLogits::NegInf;
        let poisoned = poison_what_is_not_kept(&case);
        poisoned_cases += usize::from(poisoned.k.iter().any(|k| k.is_nan()));
        for isa in Isa::available() {
            assert!(case.results(isa).same_bits(&poisoned.results(isa)), "seed {seed} on {}", isa.name());
        }
    }
    assert!(poisoned_cases > 50, "only {poisoned_cases} cases had unused keys");
}

#[test]
fn values_of_masked_keys_may_hold_anything_with_a_background_too() {
    for seed in 0..40 {
        let mut case = Case::<f64>::random(&mut Random(4500 + seed));
        let [batch, _, kv_heads, _, s, d, dv] = case.sizes;
        (case.masked_logits, case.dropout, case.bias) = (MaskedLogits::Zero, None, None);
        case.key_mask = Some((0..batch * s).map(|key| u8::from(key % 3 != 0)).collect());
        let mut poisoned = case.clone();
        for key in (0..batch * kv_heads * s).filter(|key| (key / s / kv_heads * s + key % s) % 3 == 0) {
            poisoned.k[key * d..(key + 1) * d].fill(NAN);
            poisoned.v[key * dv..(key + 1) * dv].fill(NAN);
        }
        for isa in Isa::available() {
            assert!(case.results(isa).same_bits(&poisoned.results(isa)), "seed {seed} on {}", isa.name());
        }
    }
}

#[test]
fn nan_in_a_kept_place_reaches_every_result_that_depends_on_it() {
    // Query 0 keeps key 1, queries 1 to 6 keep all keys (a tile), the others only key 0.
    let edges =
        EdgeSet::builder(9, 5).unwrap().rect(0..1, 1..2).rect(1..7, 0..5).rect(7..9, 0..1).build().unwrap();
    for isa in Isa::available() {
        let clean = Case::<f32>::new(&mut Random(5), sizes(9, 5), &[Arc::new(edges.clone())]);
        for place in ["k", "v", "q", "bias"] {
            let mut case = clean.clone();
            match place {
                "k" => case.k[5 + 2] = f32::NAN,
                "v" => case.v[3 + 1] = f32::NAN,
                "bias" => {
                    case.bias = Some((0..45).map(|cell| if cell % 5 == 1 { f32::NAN } else { 0.0 }).collect())
                }
                _ => (0..7).for_each(|row| case.q[5 * row] = f32::NAN),
            }
            let results = case.results(isa);
            for row in 0..9 {
                let hit = row < 7;
                let out = &results.out[3 * row..3 * row + 3];
                let expected = if place == "v" { [false, hit, false] } else { [hit; 3] };
                for (value, nan) in out.iter().zip(expected) {
                    assert_eq!(
                        value.is_nan(),
                        nan,
                        "out of row {row} with NaN in {place} on {}: {out:?}",
                        isa.name()
                    );
                }
                assert_eq!(
                    results.lse[row].is_nan(),
                    hit && place != "v",
                    "lse of row {row} with NaN in {place}"
                );
                assert_eq!(results.dq[5 * row].is_nan(), hit, "dq of row {row} with NaN in {place}");
            }
        }
    }
}

#[test]
fn an_infinite_score_is_as_undefined_as_in_dense_attention() {
    let edges = set(2, 3, &[(0, 0), (0, 1), (1, 2)]);
    for isa in Isa::available() {
        let mut case = Case::<f32>::new(&mut Random(6), sizes(2, 3), std::slice::from_ref(&edges));
        case.bias = Some(vec![f32::INFINITY, 0.0, 0.0, 0.0, 0.0, 0.0]);
        let results = case.results(isa);
        assert!(results.out[..3].iter().all(|value| value.is_nan()));
        assert!(results.out[3..].iter().all(|value| value.is_finite()));
    }
}

#[test]
fn a_scale_of_zero_averages_and_a_negative_scale_prefers_the_smallest() {
    let edges = Arc::new(EdgeSet::builder(6, 5).unwrap().rect(0..6, 0..5).build().unwrap());
    for isa in Isa::available() {
        let mut case = Case::<f64>::new(&mut Random(7), sizes(6, 5), std::slice::from_ref(&edges));
        case.scale = 0.0;
        let results = case.results(isa);
        let mean: f64 = (0..5).map(|key| case.v[3 * key]).sum::<f64>() / 5.0;
        assert!((results.out[0] - mean).abs() < 1e-15);
        assert!(results.dq.iter().all(|&value| value == 0.0));

        case.scale = -1e4;
        let results = case.results(isa);
        let dot = |key: usize| (0..5).map(|d| case.q[d] * case.k[5 * key + d]).sum::<f64>();
        let least = (0..5).min_by(|&a, &b| dot(a).total_cmp(&dot(b))).unwrap();
        assert!((results.out[0] - case.v[3 * least]).abs() < 1e-12);
    }
}

#[test]
fn a_background_counts_as_keys_with_a_score_of_zero() {
    // One query, four allowed keys, one of them an edge.
    let edges = set(1, 5, &[(0, 2), (0, 4)]);
    let mut case = Case::<f64>::new(&mut Random(8), sizes(1, 5), std::slice::from_ref(&edges));
    case.masked_logits = MaskedLogits::Zero;
    case.key_mask = Some(vec![1, 1, 1, 1, 0]);
    let score = case.scale * (0..5).map(|d| case.q[d] * case.k[10 + d]).sum::<f64>();
    let total = score.exp() + 3.0;
    for isa in Isa::available() {
        let results = case.results(isa);
        assert!((results.lse[0] - total.ln()).abs() < 1e-14);
        for d in 0..3 {
            let others: f64 = [0, 1, 3].iter().map(|key| case.v[3 * key + d]).sum();
            assert!((results.out[d] - (score.exp() * case.v[6 + d] + others) / total).abs() < 1e-14);
            assert!(
                (results.dv[d] - case.grad_out[d] / total).abs() < 1e-14,
                "a background key gets its share of dv"
            );
            assert_eq!(results.dv[12 + d], 0.0);
        }
        assert!(results.dk[..10].iter().chain(&results.dk[15..]).all(|&value| value == 0.0));
    }
}

#[test]
fn the_key_of_an_edge_that_its_bias_removes_may_hold_anything() {
    let edges = Arc::new(EdgeSet::builder(8, 6).unwrap().band((-3, 2, 1), 0..8, 0..6).build().unwrap());
    for masked_logits in [MaskedLogits::NegInf, MaskedLogits::Zero] {
        let mut case = Case::<f64>::new(&mut Random(9), sizes(8, 6), std::slice::from_ref(&edges));
        case.masked_logits = masked_logits;
        case.bias = Some((0..48).map(|cell| if cell % 6 == 3 { f64::NEG_INFINITY } else { 0.5 }).collect());
        let mut poisoned = case.clone();
        poisoned.k[15..20].fill(NAN);
        for isa in Isa::available() {
            let (clean, poisoned) = (case.results(isa), poisoned.results(isa));
            assert!(clean.same_bits(&poisoned), "{masked_logits:?} on {}: {poisoned:?}", isa.name());
        }
    }
}

#[test]
fn a_query_whose_bias_removes_every_key_is_an_empty_row() {
    let edges = Arc::new(EdgeSet::builder(6, 4).unwrap().rect(0..6, 0..4).build().unwrap());
    for masked_logits in [MaskedLogits::NegInf, MaskedLogits::Zero] {
        let mut case = Case::<f32>::new(&mut Random(10), sizes(6, 4), std::slice::from_ref(&edges));
        case.masked_logits = masked_logits;
        case.bias = Some((0..24).map(|cell| if cell / 4 == 2 { f32::NEG_INFINITY } else { 0.25 }).collect());
        for isa in Isa::available() {
            let results = case.results(isa);
            assert_eq!((results.lse[2], &results.out[6..9]), (f64::NEG_INFINITY, &[0.0; 3][..]));
            assert_eq!(results.dq[10..15], [0.0; 5]);
            let [.., (_, dk), (_, dv)] = results.named();
            assert!(dk.iter().chain(&dv).all(|value| value.is_finite()), "{masked_logits:?}: {dk:?} {dv:?}");
        }
    }
}

#[test]
fn a_query_that_keeps_every_key_has_no_background_however_low_its_scores() {
    // exp(800) is no f64: a background of keys that are not there must not be added and taken away again.
    let edges = set(2, 3, &[(0, 0), (0, 1), (0, 2), (1, 1)]);
    let mut case = Case::<f64>::new(&mut Random(11), sizes(2, 3), std::slice::from_ref(&edges));
    case.bias = Some(vec![-800.0, -800.0, -801.0, 0.0, 0.0, 0.0]);
    for isa in Isa::available() {
        case.masked_logits = MaskedLogits::NegInf;
        let plain = case.results(isa);
        case.masked_logits = MaskedLogits::Zero;
        let zero = case.results(isa);
        assert_eq!(
            (&plain.out[..3], plain.lse[0], &plain.dq[..5]),
            (&zero.out[..3], zero.lse[0], &zero.dq[..5])
        );
        assert!(zero.dv.iter().chain(&zero.dk).all(|value| value.is_finite()), "{zero:?}");
    }
}
