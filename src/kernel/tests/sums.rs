//! Sums of the last queries' attention weights, against softmax written out in f64.

use half::bf16;

use super::{Random, run, values};
use crate::kernel::{Element, Isa, Real, View, WeightSums};

struct Case<T> {
    sizes: [usize; 5],
    q: Vec<T>,
    k: Vec<T>,
    key_mask: Option<Vec<u8>>,
    bias: Option<Vec<T>>,
    last_queries: usize,
}

impl<T: Element> Case<T> {
    fn random(random: &mut Random) -> Self {
        let kv_heads = 1 + random.below(2);
        let [b, h, g] = [1 + random.below(2), kv_heads * (1 + random.below(2)), kv_heads];
        let (n, d) = (random.below(150), 1 + random.below(20));
        let key_mask = random.chance(0.4).then(|| (0..b * n).map(|_| random.below(3) as u8).collect());
        let bias = random.chance(0.4).then(|| {
            let mut bias: Vec<T> = values(random, b * h * n * n, 2.0);
            for value in &mut bias {
                if random.chance(0.3) {
                    *value = T::from_acc(T::Acc::NEG_INFINITY);
                }
            }
            bias
        });
        Case {
            sizes: [b, h, g, n, d],
            q: values(random, b * h * n * d, 2.0),
            k: values(random, b * g * n * d, 2.0),
            key_mask,
            bias,
            last_queries: [1, 7, 64, 65, 500][random.below(5)],
        }
    }

    fn sums(&self, isa: Isa, threads: usize) -> [Vec<f64>; 2] {
        let [b, h, g, n, d] = self.sizes;
        let mut sums = [vec![T::Acc::ONE; b * h * n], vec![T::Acc::ONE; b * h * n]];
        let [by_key, by_distance] = &mut sums;
        let problem = WeightSums {
            q: View::contiguous("q", &self.q, [b, h, n, d]).unwrap(),
            k: View::contiguous("k", &self.k, [b, g, n, d]).unwrap(),
            key_mask: self.key_mask.as_ref().map(|mask| View::contiguous("key_mask", mask, [b, n]).unwrap()),
            bias: self.bias.as_ref().map(|bias| View::contiguous("bias", bias, [b, h, n, n]).unwrap()),
            scale: 0.5,
            last_queries: self.last_queries,
        };
        problem.sum(by_key, by_distance, &run(isa, threads)).unwrap();
        sums.map(|sums| sums.into_iter().map(Real::to_f64).collect())
    }

    fn expected(&self) -> [Vec<f64>; 2] {
        let [b, h, g, n, d] = self.sizes;
        let [mut by_key, mut by_distance] = [vec![0.0; b * h * n], vec![0.0; b * h * n]];
        for unit in 0..b * h {
            let kv = unit / h * g + unit % h / (h / g);
            let allowed =
                |token: usize| self.key_mask.as_ref().is_none_or(|mask| mask[unit / h * n + token] != 0);
            for row in (0..n).rev().filter(|&row| allowed(row)).take(self.last_queries) {
                let weight = |key: usize| {
                    let at = |all: &[T], index: usize| all[index].to_acc().to_f64();
                    let dot: f64 = (0..d)
                        .map(|c| at(&self.q, (unit * n + row) * d + c) * at(&self.k, (kv * n + key) * d + c))
                        .sum();
                    let bias = self.bias.as_ref().map_or(0.0, |bias| at(bias, (unit * n + row) * n + key));
                    (dot * 0.5 + bias).exp()
                };
                let keys: Vec<usize> = (0..=row).filter(|&key| allowed(key)).collect();
                let total: f64 = keys.iter().map(|&key| weight(key)).sum();
                for key in keys.into_iter().filter(|_| total > 0.0) {
                    by_key[unit * n + key] += weight(key) / total;
                    by_distance[unit * n + row - key] += weight(key) / total;
                }
            }
        }
        [by_key, by_distance]
    }
}

fn check<T: Element>(cases: u64, tolerance: f64) {
    for isa in Isa::available() {
        for seed in 0..cases {
            let case = Case::<T>::random(&mut Random(seed));
            let got = case.sums(isa, 2);
            assert_eq!(got, case.sums(isa, 1), "threads change {} {} seed {seed}", T::NAME, isa.name());
            for (got, expected) in got.iter().flatten().zip(case.expected().iter().flatten()) {
                assert!(
                    (got - expected).abs() <= tolerance * (1.0 + expected),
                    "{} {} seed {seed}: expected {expected}, got {got}",
                    T::NAME,
                    isa.name()
                );
            }
        }
    }
}

#[test]
fn weights_of_the_last_queries_are_summed_by_key_and_by_distance() {
    check::<f32>(60, 2e-5);
    check::<f64>(40, 1e-12);
    check::<bf16>(20, 2e-5);
}

#[test]
fn a_query_without_a_key_gives_nothing_and_nan_shows() {
    let bias = [f64::NEG_INFINITY, 0.0, 0.0, 0.0];
    let sums = |q: [f64; 2], bias| {
        let case = Case {
            sizes: [1, 1, 1, 2, 1],
            q: q.to_vec(),
            k: vec![1.0; 2],
            key_mask: None,
            bias: Some(bias),
            last_queries: 2,
        };
        case.sums(Isa::Scalar, 1)
    };
    assert_eq!(sums([1.0, 1.0], bias.to_vec()), [vec![0.5, 0.5], vec![0.5, 0.5]]);
    assert!(sums([1.0, f64::NAN], bias.to_vec()).iter().flatten().all(|sum| sum.is_nan()));
}
