//! Every kernel, on every instruction set of the machine, against the oracle.

mod accuracy;
mod decode;
mod determinism;
mod dropout;
mod layout;
mod lines;
mod panels;
mod rejected;
mod selection;
mod semantics;
mod strips;
mod sums;

use std::sync::Arc;

use super::oracle;
use super::*;
use crate::pattern::edges::EdgeSet;
use crate::pool::Never;

/// splitmix64: cases differ, runs do not.
pub(super) struct Random(pub u64);

impl Random {
    pub fn bits(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut x = self.0;
        x = (x ^ (x >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        x = (x ^ (x >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        x ^ (x >> 31)
    }

    /// In `0..limit`.
    pub fn below(&mut self, limit: usize) -> usize {
        (self.bits() % limit.max(1) as u64) as usize
    }

    /// In -1..1.
    pub fn uniform(&mut self) -> f64 {
        self.bits() as i64 as f64 / 2f64.powi(63)
    }

    pub fn chance(&mut self, p: f64) -> bool {
        self.uniform().abs() < p
    }

    fn range(&mut self, limit: usize) -> std::ops::Range<usize> {
        let (a, b) = (self.below(limit + 1), self.below(limit + 1));
        a.min(b)..a.max(b)
    }

    /// Any mixture of what masks are made of; sometimes nothing, sometimes everything.
    pub fn edges(&mut self, rows: usize, cols: usize) -> Arc<EdgeSet> {
        let mut builder = EdgeSet::builder(rows, cols).unwrap();
        if self.chance(0.15) {
            builder = builder.rect(0..rows, 0..cols);
        }
        for _ in 0..self.below(5) {
            let far = (rows + cols) as i64;
            builder = match self.below(6) {
                0 => builder.rect(self.range(rows), self.range(cols)),
                1 => builder.global(0..1 + self.below(3)),
                2 => builder.rect(self.range(rows), 0..cols),
                3 => {
                    let lo = self.below(2 * far as usize + 1) as i64 - far;
                    let hi = lo + self.below(20) as i64;
                    builder.band((lo, hi, 1 + self.below(3)), self.range(rows), self.range(cols))
                }
                4 => builder.anti_diagonal(self.below(rows + cols) as i64, 0..rows, 0..cols),
                _ => {
                    let (mut row_ptr, mut col) = (vec![0], vec![]);
                    for _ in 0..rows {
                        let density = self.uniform().abs() * 0.3;
                        col.extend((0..cols as i64).filter(|_| self.chance(density)));
                        row_ptr.push(col.len() as i64);
                    }
                    builder.edge_list(&row_ptr, &col).unwrap()
                }
            };
        }
        Arc::new(builder.build().unwrap())
    }
}

/// A problem that owns its tensors, all contiguous.
#[derive(Clone)]
pub(super) struct Case<T: Element> {
    pub sizes: [usize; 7],
    pub plan: Plan,
    pub q: Vec<T>,
    pub k: Vec<T>,
    pub v: Vec<T>,
    pub grad_out: Vec<T>,
    pub key_mask: Option<Vec<u8>>,
    pub bias: Option<Vec<T>>,
    pub dropout: Option<Dropout>,
    pub scale: f64,
    pub masked_logits: MaskedLogits,
}

pub(super) fn values<T: Element>(random: &mut Random, len: usize, magnitude: f64) -> Vec<T> {
    (0..len).map(|_| T::from_acc(T::Acc::from_f64(random.uniform() * magnitude))).collect()
}

impl<T: Element> Case<T> {
    /// `sizes` are B, H, Hkv, N, S, D, Dv.
    pub fn new(random: &mut Random, sizes: [usize; 7], sets: &[Arc<EdgeSet>]) -> Self {
        let [b, h, g, n, s, d, dv] = sizes;
        Case {
            sizes,
            plan: Plan::new(sets).unwrap(),
            q: values(random, b * h * n * d, 2.0),
            k: values(random, b * g * s * d, 2.0),
            v: values(random, b * g * s * dv, 2.0),
            grad_out: values(random, b * h * n * dv, 2.0),
            key_mask: None,
            bias: None,
            dropout: None,
            scale: 1.0 / (d as f64).sqrt(),
            masked_logits: MaskedLogits::NegInf,
        }
    }

    /// Random in everything, options included.
    pub fn random(random: &mut Random) -> Self {
        let group = 1 + random.below(3);
        let kv_heads = 1 + random.below(2);
        let widths = [1, 3, 7, 16, 33, 64, 65];
        let sizes = [
            random.below(3),
            group * kv_heads,
            kv_heads,
            1 + random.below(70),
            1 + random.below(70),
            widths[random.below(7)],
            widths[random.below(7)],
        ];
        let [b, h, _, n, s, ..] = sizes;
        let count = [1, h, (b * h).max(1)][random.below(3)];
        let sets: Vec<_> = (0..count).map(|_| random.edges(n, s)).collect();
        let mut case = Self::new(random, sizes, &sets);
        if random.chance(0.3) {
            case.key_mask = Some(
                (0..b * s)
                    .map(|_| if random.chance(0.3) { 0 } else { 1 + random.below(255) as u8 })
                    .collect(),
            );
        }
        if random.chance(0.3) {
            let mut bias = values(random, b * h * n * s, 2.0);
            for value in &mut bias {
                if random.chance(0.1) {
                    *value = T::from_acc(T::Acc::NEG_INFINITY);
                }
            }
            case.bias = Some(bias);
        }
        match random.below(4) {
            0 => case.dropout = Some(Dropout { seed: random.bits(), p: random.uniform().abs() }),
            1 => case.masked_logits = MaskedLogits::Zero,
            _ => {}
        }
        case
    }

    pub fn problem(&self) -> Attention<'_, T> {
        let [b, h, g, n, s, d, dv] = self.sizes;
        Attention {
            plan: &self.plan,
            q: View::contiguous("q", &self.q, [b, h, n, d]).unwrap(),
            k: View::contiguous("k", &self.k, [b, g, s, d]).unwrap(),
            v: View::contiguous("v", &self.v, [b, g, s, dv]).unwrap(),
            key_mask: self.key_mask.as_ref().map(|mask| View::contiguous("key_mask", mask, [b, s]).unwrap()),
            bias: self.bias.as_ref().map(|bias| View::contiguous("bias", bias, [b, h, n, s]).unwrap()),
            dropout: self.dropout,
            scale: self.scale,
            masked_logits: self.masked_logits,
        }
    }

    pub fn grad_out(&self) -> View4<'_, T> {
        let [b, h, _, n, _, _, dv] = self.sizes;
        View::contiguous("grad_out", &self.grad_out, [b, h, n, dv]).unwrap()
    }

    /// Results of the kernels on one thread.
    pub fn results(&self, isa: Isa) -> Results<T> {
        results(&self.problem(), self.grad_out(), &run(isa, 1))
    }
}

pub(super) fn run(isa: Isa, threads: usize) -> Run<'static> {
    Run { pool: Pool::of(threads), isa, interrupt: &Never }
}

/// All that forward and backward give.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct Results<T: Element> {
    pub out: Vec<T>,
    pub lse: Vec<f64>,
    pub dq: Vec<T>,
    pub dk: Vec<T>,
    pub dv: Vec<T>,
}

/// Forward and backward into memory full of NaN, so that a place that is not written shows.
pub(super) fn results<T: Element>(problem: &Attention<T>, grad_out: View4<T>, run: &Run) -> Results<T> {
    let [b, h, n, d] = problem.q.shape();
    let [_, g, s, dv] = problem.v.shape();
    let poison = |len: usize| vec![T::from_acc(T::Acc::from_f64(f64::NAN)); len];
    let mut results = Results {
        out: poison(b * h * n * dv),
        lse: vec![f64::NAN; b * h * n],
        dq: poison(b * h * n * d),
        dk: poison(b * g * s * d),
        dv: poison(b * g * s * dv),
    };
    problem.forward(room(&mut results.out, [b, h, n, dv]), &mut results.lse, run).unwrap();
    problem
        .backward(
            grad_out,
            View::contiguous("out", &results.out, [b, h, n, dv]).unwrap(),
            View::contiguous("lse", &results.lse, [b, h, n]).unwrap(),
            Gradients {
                dq: room(&mut results.dq, [b, h, n, d]),
                dk: room(&mut results.dk, [b, g, s, d]),
                dv: room(&mut results.dv, [b, g, s, dv]),
            },
            run,
        )
        .unwrap();
    results
}

/// Contiguous room of the right size.
pub(super) fn room<T>(data: &mut [T], shape: [usize; 4]) -> ViewMut4<'_, T> {
    ViewMut4::contiguous("room", data, shape).unwrap()
}

pub(super) fn f64s<T: Element>(values: &[T]) -> Vec<f64> {
    values.iter().map(|value| value.to_acc().to_f64()).collect()
}

impl<T: Element> Results<T> {
    pub fn named(&self) -> [(&'static str, Vec<f64>); 5] {
        [
            ("out", f64s(&self.out)),
            ("lse", self.lse.clone()),
            ("dq", f64s(&self.dq)),
            ("dk", f64s(&self.dk)),
            ("dv", f64s(&self.dv)),
        ]
    }

    /// Equal bit for bit, NaN included.
    pub fn same_bits(&self, other: &Self) -> bool {
        let bits = |results: &Self| {
            results.named().map(|(_, values)| values.iter().map(|v| v.to_bits()).collect::<Vec<_>>())
        };
        bits(self) == bits(other)
    }
}

/// The oracle's results in precision `P`.
pub(super) fn expected<P: Element, T: Element>(problem: &Attention<T>, grad_out: &View4<T>) -> [Vec<f64>; 5] {
    let forward = oracle::forward::<P, T>(problem).unwrap();
    let backward = oracle::backward::<P, T>(problem, grad_out).unwrap();
    [forward.out, forward.lse, backward.dq, backward.dk, backward.dv]
}

/// Largest magnitude of the finite entries.
pub(super) fn magnitude(values: &[f64]) -> f64 {
    values.iter().filter(|value| value.is_finite()).fold(0.0, |largest, value| largest.max(value.abs()))
}

/// Largest distance; both must be NaN, or the same infinity, in the same places.
pub(super) fn distance(name: &str, expected: &[f64], got: &[f64]) -> f64 {
    assert_eq!(expected.len(), got.len(), "{name}: length");
    let mut largest = 0.0f64;
    for (index, (&e, &g)) in expected.iter().zip(got).enumerate() {
        if e.is_finite() && g.is_finite() {
            largest = largest.max((e - g).abs());
        } else {
            assert!(e.is_nan() && g.is_nan() || e == g, "{name}[{index}]: expected {e}, got {g}");
        }
    }
    largest
}
