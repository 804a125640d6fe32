//! Results are as close to the oracle in f64 as a straightforward evaluation in the tensors' own precision.

use half::{bf16, f16};

use super::*;

/// Compare with the oracle on every instruction set. How much further off than plain arithmetic a result may be follows
/// flash-attention's rule; on top comes what rounding the ingredients of a sum may leave even where the sum is zero.
pub(super) fn check<T: Element>(case: &Case<T>, context: &str) {
    let (problem, grad_out) = (case.problem(), case.grad_out());
    let truth = expected::<f64, T>(&problem, &grad_out);
    let is_f64 = T::NAME == "f64";
    let plain = if is_f64 { truth.clone() } else { expected::<T, T>(&problem, &grad_out) };
    let [q, k, v, grad] = [&case.q, &case.k, &case.v, &case.grad_out].map(|tensor| magnitude(&f64s(tensor)));
    let width = case.sizes[6] as f64;
    let (epsilon, rounding) = if is_f64 { (1e-12, 6e-16) } else { (1e-6, 3e-7) };
    // Scores are as precise as their size lets them be.
    let from_scores = rounding * magnitude(&truth[1]);
    for isa in Isa::available() {
        for (index, (name, got)) in case.results(isa).named().into_iter().enumerate() {
            let plain: Vec<f64> = if name == "lse" {
                plain[index].clone()
            } else {
                plain[index].iter().map(|&x| round::<T>(x)).collect()
            };
            let (factor, ingredients) = match name {
                "out" => (2.0, v),
                "lse" => (2.0, 1.0),
                "dv" => (3.0, grad),
                _ => (3.0, grad * v * width.sqrt() * case.scale * q.max(k)),
            };
            let name = format!("{name} of {} on {} ({context})", T::NAME, isa.name());
            let error = distance(&name, &truth[index], &got);
            let scale = magnitude(&truth[index]).max(ingredients);
            let allowed = factor * distance(&name, &truth[index], &plain) + (epsilon + from_scores) * scale;
            assert!(
                error <= allowed,
                "{name}: off by {error:e}, allowed {allowed:e}, largest entry {scale:e}"
            );
        }
    }
}

fn round<T: Element>(value: f64) -> f64 {
    T::from_acc(T::Acc::from_f64(value)).to_acc().to_f64()
}

fn check_random_cases<T: Element>(cases: u64) {
    for seed in 0..cases {
        let case = Case::<T>::random(&mut Random(seed));
        check(&case, &format!("seed {seed}, sizes {:?}, dropout {:?}", case.sizes, case.dropout));
    }
}

#[test]
fn f64_agrees_with_the_oracle_to_twelve_digits() {
    check_random_cases::<f64>(100);
}

#[test]
fn f32_is_as_precise_as_plain_arithmetic() {
    check_random_cases::<f32>(100);
}

#[test]
fn bf16_is_as_precise_as_plain_arithmetic_rounded_once() {
    check_random_cases::<bf16>(80);
}

#[test]
fn f16_is_as_precise_as_plain_arithmetic_rounded_once() {
    check_random_cases::<f16>(80);
}

#[test]
fn every_width_of_head_is_read_to_its_end_and_no_further() {
    let mut random = Random(1);
    for d in [1, 3, 7, 8, 15, 16, 17, 31, 32, 33, 47, 48, 63, 64, 65, 80, 128, 130] {
        for dv in [1, 7, 16, 33, 64, 65] {
            let edges = random.edges(19, 23);
            check(
                &Case::<f64>::new(&mut random, [1, 2, 1, 19, 23, d, dv], std::slice::from_ref(&edges)),
                "widths",
            );
            check(
                &Case::<f32>::new(&mut random, [1, 2, 1, 19, 23, d, dv], std::slice::from_ref(&edges)),
                "widths",
            );
        }
    }
}

#[test]
fn every_number_of_tokens_around_a_tile_is_right_when_all_are_kept() {
    let mut random = Random(2);
    for n in [1, 2, 3, 4, 5, 15, 16, 17, 31, 33, 63, 64, 65, 127, 128, 129] {
        for s in [7, 64, 65] {
            let edges = Arc::new(EdgeSet::builder(n, s).unwrap().rect(0..n, 0..s).build().unwrap());
            check(&Case::<f64>::new(&mut random, [1, 2, 1, n, s, 16, 7], &[edges]), &format!("{n} x {s}"));
        }
    }
}

#[test]
fn rows_longer_than_a_batch_are_continued() {
    // Over 2048 edges in a row: a dense row, a dense column (long by key), long runs, and short rows between them.
    let n = 2200;
    let edges = EdgeSet::builder(n, n)
        .unwrap()
        .global(0..1)
        .rect(70..72, 20..2190)
        .diagonal(3, 0..n, 0..n)
        .build()
        .unwrap();
    for masked_logits in [MaskedLogits::NegInf, MaskedLogits::Zero] {
        let mut case = Case::<f64>::new(&mut Random(3), [1, 1, 1, n, n, 3, 2], &[Arc::new(edges.clone())]);
        case.masked_logits = masked_logits;
        // Later keys score higher, so that what was summed before has to shrink.
        case.k.iter_mut().enumerate().for_each(|(place, k)| *k *= 1.0 + (place / 3) as f64 / 500.0);
        case.key_mask = Some((0..n).map(|key| u8::from(key % 5 != 1)).collect());
        check(&case, &format!("{masked_logits:?}"));
    }
}

#[test]
fn large_scores_neither_overflow_nor_lose_the_largest() {
    for seed in 0..20 {
        let mut case = Case::<f32>::random(&mut Random(1000 + seed));
        case.q.iter_mut().for_each(|q| *q *= 300.0);
        check(&case, "large scores");
    }
    let mut case = Case::<f16>::random(&mut Random(7));
    case.q.iter_mut().for_each(|q| *q = f16::from_f32(q.to_f32() * 1e3));
    check(&case, "large scores");
}

#[test]
fn the_oracles_gradients_are_the_slopes_of_its_outputs() {
    for seed in 0..40 {
        let mut random = Random(2000 + seed);
        let mut case = Case::<f64>::random(&mut random);
        case.sizes[3] = case.sizes[3].min(9);
        case.sizes[4] = case.sizes[4].min(9);
        let [b, h, _, n, s, ..] = case.sizes;
        let sets: Vec<_> = (0..(b * h).max(1)).map(|_| random.edges(n, s)).collect();
        let small = Case::<f64>::new(&mut random, case.sizes, &sets);
        case = Case { dropout: case.dropout, masked_logits: case.masked_logits, ..small };

        let loss = |case: &Case<f64>| -> f64 {
            let out = oracle::forward::<f64, f64>(&case.problem()).unwrap().out;
            out.iter().zip(&case.grad_out).map(|(out, grad)| out * grad).sum()
        };
        let gradients = oracle::backward::<f64, f64>(&case.problem(), &case.grad_out()).unwrap();
        type Tensor = fn(&mut Case<f64>) -> &mut Vec<f64>;
        let tensors: [(&str, Tensor, Vec<f64>); 3] = [
            ("q", |c| &mut c.q, gradients.dq),
            ("k", |c| &mut c.k, gradients.dk),
            ("v", |c| &mut c.v, gradients.dv),
        ];
        for (name, tensor, gradient) in tensors {
            for _ in 0..gradient.len().min(6) {
                let index = random.below(gradient.len());
                let step = 1e-5;
                let mut moved = case.clone();
                tensor(&mut moved)[index] += step;
                let up = loss(&moved);
                tensor(&mut moved)[index] -= 2.0 * step;
                let slope = (up - loss(&moved)) / (2.0 * step);
                let error = (slope - gradient[index]).abs();
                assert!(
                    error < 1e-6 * (1.0 + slope.abs()),
                    "seed {seed}: d{name}[{index}] is {}, slope {slope}",
                    gradient[index]
                );
            }
        }
    }
}
