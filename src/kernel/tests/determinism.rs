//! The same bits whatever the number of threads, run after run; and a stop when asked for.

use std::cell::Cell;
use std::time::{Duration, Instant};

use super::*;
use crate::error::Error;

fn large_case<T: Element>(seed: u64) -> Case<T> {
    let n = 300;
    let mut random = Random(seed);
    let band = EdgeSet::builder(n, n).unwrap().global(0..1).band((-90, 90, 3), 0..n, 0..n);
    let full = EdgeSet::builder(n, n).unwrap().rect(0..n, 0..n);
    let mixed =
        EdgeSet::builder(n, n).unwrap().rect(100..200, 0..n).rect(0..n, 7..80).rect(220..260, 120..290);
    let sets: Vec<_> =
        [band, full, mixed.clone(), mixed].map(|builder| Arc::new(builder.build().unwrap())).into();
    Case::new(&mut random, [3, 4, 2, n, n, 33, 20], &sets)
}

/// Heads for the kernel of lines.
fn large_case_of_lines() -> Case<f32> {
    let n = 700;
    let head = |distances: &[i64]| {
        let builder = EdgeSet::builder(n, n).unwrap().global(0..1);
        let all = distances.iter().fold(builder, |all, &distance| all.diagonal(distance, 0..n, 0..n));
        Arc::new(all.build().unwrap())
    };
    let sets = [head(&[-300, -17, 0, 5, 44]), head(&[-5, 0, 5, 8, 13, 21, 34, 55, 89, 144, 233, 377, 610])];
    assert!(
        sets.iter().all(|set| Plan::new(std::slice::from_ref(set)).unwrap().head(0, 0, 1).lines().is_some())
    );
    Case::new(&mut Random(6), [8, 2, 2, n, n, 64, 64], &sets)
}

/// More threads get smaller tasks, so that rows share tasks with others.
#[test]
fn one_to_forty_threads_give_the_same_bits() {
    for isa in Isa::available() {
        for case in [large_case::<f32>(1), large_case_of_lines()] {
            let one = case.results(isa);
            for threads in (2..=8).chain([16, 40]) {
                let many = results(&case.problem(), case.grad_out(), &run(isa, threads));
                assert!(one.same_bits(&many), "{threads} threads on {}", isa.name());
            }
        }
    }
}

#[test]
fn fifty_runs_on_all_threads_give_the_same_bits() {
    let mut case = large_case::<f32>(2);
    case.dropout = Some(Dropout { seed: 3, p: 0.3 });
    let isa = Isa::selected().unwrap();
    let first = results(&case.problem(), case.grad_out(), &run(isa, 4));
    for repeat in 0..50 {
        let again = results(&case.problem(), case.grad_out(), &run(isa, 4));
        assert!(first.same_bits(&again), "repeat {repeat}");
    }
}

#[test]
fn instruction_sets_differ_by_rounding_only() {
    let case = large_case::<f32>(3);
    let reference = case.results(Isa::Scalar);
    for isa in Isa::available() {
        for ((name, expected), (_, got)) in reference.named().into_iter().zip(case.results(isa).named()) {
            let error = distance(name, &expected, &got);
            assert!(error < 4e-6 * magnitude(&expected), "{name} on {}: {error:e}", isa.name());
        }
    }
}

#[test]
fn threads_that_call_at_once_do_not_disturb_each_other() {
    let case = large_case::<f32>(4);
    let isa = Isa::selected().unwrap();
    let expected = case.results(isa);
    std::thread::scope(|scope| {
        for threads in [1, 2, 2, 3] {
            let (case, expected) = (&case, &expected);
            scope.spawn(move || {
                for _ in 0..3 {
                    assert!(
                        results(&case.problem(), case.grad_out(), &run(isa, threads)).same_bits(expected)
                    );
                }
            });
        }
    });
}

#[test]
fn an_interrupt_stops_a_long_call_within_a_moment() {
    // Dense attention over 40,000 tokens would take minutes.
    let n = 40_000;
    let plan =
        Plan::new(&[Arc::new(EdgeSet::builder(n, n).unwrap().rect(0..n, 0..n).build().unwrap())]).unwrap();
    let zeros = vec![0.0f32; n * 16];
    let view = View::contiguous("q", &zeros, [1, 1, n, 16]).unwrap();
    let problem = Attention {
        plan: &plan,
        q: view,
        k: view,
        v: view,
        key_mask: None,
        bias: None,
        dropout: None,
        scale: 1.0,
        masked_logits: MaskedLogits::NegInf,
    };
    let (mut out, mut lse) = (vec![0.0; n * 16], vec![0.0; n]);
    for threads in [1, 3] {
        let asked = Cell::new(None);
        let stop = || {
            asked.set(asked.get().or(Some(Instant::now())));
            true
        };
        let run = Run { pool: Pool::of(threads), isa: Isa::selected().unwrap(), interrupt: &stop };
        assert_eq!(problem.forward(room(&mut out, [1, 1, n, 16]), &mut lse, &run), Err(Error::Interrupted));
        assert!(asked.get().unwrap().elapsed() < Duration::from_secs(1));
        let again = vec![0.0; n * 16];
        let (mut dq, mut dk, mut dv) = (again.clone(), again.clone(), again);
        let [dq, dk, dv] = [&mut dq, &mut dk, &mut dv].map(|data| room(data, [1, 1, n, 16]));
        let gradients = Gradients { dq, dk, dv };
        let lse = View::contiguous("lse", &lse, [1, 1, n]).unwrap();
        assert_eq!(problem.backward(view, view, lse, gradients, &run), Err(Error::Interrupted));
    }
}
