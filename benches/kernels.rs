//! Time per call of the kernels at the sizes of vision transformers: H = 12 heads of 64 channels, f32, two threads.
//!
//! `cargo bench --no-default-features --bench kernels`; compare rows of one run with each other, not runs.

#![allow(missing_docs, reason = "criterion's macros declare functions without")]

use std::hint::black_box;
use std::sync::Arc;
use std::time::Duration;

use criterion::{BenchmarkId, Criterion, Throughput, criterion_group, criterion_main};
use sparse_mhsa::kernel::{Attention, Gradients, Isa, MaskedLogits, Run, View, ViewMut4};
use sparse_mhsa::pattern::edges::EdgeSet;
use sparse_mhsa::plan::Plan;
use sparse_mhsa::pool::{Never, Pool};

const HEADS: usize = 12;
const DIM: usize = 64;

/// Distances that grow like Fibonacci numbers, another start for every head, beside a dense first token.
fn fibonacci(tokens: usize) -> Vec<Arc<EdgeSet>> {
    let set = |head: usize| {
        let window = 5 + (tokens / 3).saturating_sub(5) * head / (HEADS - 1);
        let mut builder = EdgeSet::builder(tokens, tokens).expect("fits").global(0..1);
        let (mut a, mut b) = (1 + head as i64, 2 + 2 * head as i64);
        while a <= window as i64 {
            builder = builder.diagonal(a, 1..tokens, 1..tokens).diagonal(-a, 1..tokens, 1..tokens);
            (a, b) = (b, a + b);
        }
        Arc::new(builder.build().unwrap())
    };
    (0..HEADS).map(set).collect()
}

fn window(tokens: usize, half: i64) -> Vec<Arc<EdgeSet>> {
    let builder = EdgeSet::builder(tokens, tokens).expect("fits");
    vec![Arc::new(builder.band((-half, half, 1), 0..tokens, 0..tokens).build().unwrap())]
}

fn dense(tokens: usize) -> Vec<Arc<EdgeSet>> {
    vec![Arc::new(
        EdgeSet::builder(tokens, tokens).expect("fits").rect(0..tokens, 0..tokens).build().unwrap(),
    )]
}

fn values(len: usize, seed: u64) -> Vec<f32> {
    let mut state = seed;
    let mut next = || {
        state = state.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
        (state >> 40) as f32 / (1u64 << 23) as f32 - 1.0
    };
    (0..len).map(|_| next()).collect()
}

/// Where a tensor is written.
fn room(data: &mut [f32], shape: [usize; 4]) -> ViewMut4<'_, f32> {
    ViewMut4::contiguous("room", data, shape).expect("fits")
}

fn kernels(criterion: &mut Criterion) {
    let run = Run { pool: Pool::of(2), isa: Isa::selected().expect("an instruction set"), interrupt: &Never };
    for (tokens, batch) in [(197, 8), (1025, 1), (4097, 1)] {
        let mut masks = vec![("fibonacci", fibonacci(tokens)), ("window64", window(tokens, 64))];
        if tokens < 4097 {
            masks.push(("dense", dense(tokens)));
        }
        for (name, sets) in masks {
            let plan = Plan::new(&sets).expect("same sizes");
            let edges: usize = sets.iter().map(|set| set.nnz()).sum::<usize>() * HEADS / sets.len() * batch;
            let shape = [batch, HEADS, tokens, DIM];
            let size = shape.iter().product();
            let [q, k, v, grad] = [1, 2, 3, 4].map(|seed| values(size, seed));
            let (mut out, mut lse) = (vec![0.0f32; size], vec![0.0; size / DIM]);
            let [mut dq, mut dk, mut dv] = [(); 3].map(|()| vec![0.0f32; size]);
            let view = |data| View::contiguous("tensor", data, shape).expect("fits");
            let problem = Attention {
                plan: &plan,
                q: view(&q),
                k: view(&k),
                v: view(&v),
                key_mask: None,
                bias: None,
                dropout: None,
                scale: 1.0 / (DIM as f64).sqrt(),
                masked_logits: MaskedLogits::NegInf,
            };
            let mut group = criterion.benchmark_group(name);
            group
                .sample_size(10)
                .warm_up_time(Duration::from_millis(200))
                .measurement_time(Duration::from_millis(800));
            group.throughput(Throughput::Elements(edges as u64));
            group.bench_function(BenchmarkId::new("forward", tokens), |bencher| {
                bencher.iter(|| {
                    problem.forward(room(black_box(&mut out), shape), &mut lse, &run).expect("valid")
                });
            });
            problem.forward(room(&mut out, shape), &mut lse, &run).expect("valid");
            group.bench_function(BenchmarkId::new("backward", tokens), |bencher| {
                bencher.iter(|| {
                    let out = View::contiguous("out", &out, shape).expect("fits");
                    let lse = View::contiguous("lse", &lse, [batch, HEADS, tokens]).expect("fits");
                    let gradients = Gradients {
                        dq: room(&mut dq, shape),
                        dk: room(&mut dk, shape),
                        dv: room(black_box(&mut dv), shape),
                    };
                    problem.backward(view(&grad), out, lse, gradients, &run).expect("valid");
                });
            });
            group.finish();
        }
    }
}

criterion_group!(benches, kernels);
criterion_main!(benches);
