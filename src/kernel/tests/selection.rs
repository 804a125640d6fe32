//! The choice of the best keys, against sorting all of them. Inputs are small whole numbers, so that scores are exact on every
//! instruction set and ties are everywhere.

use half::{bf16, f16};

use super::{Random, run};
use crate::kernel::{Element, Isa, NO_KEY, Real, Selection, View};

struct Case<T> {
    sizes: [usize; 6],
    q: Vec<T>,
    k: Vec<T>,
    key_mask: Option<Vec<u8>>,
    bias: Option<Vec<T>>,
    keep: usize,
    causal: bool,
    scale: f64,
}

impl<T: Element> Case<T> {
    fn random(random: &mut Random) -> Self {
        let group = 1 + random.below(2);
        let kv_heads = 1 + random.below(2);
        let [b, h, g] = [random.below(3), group * kv_heads, kv_heads];
        let (n, s, d) = (1 + random.below(150), 1 + random.below(200), 1 + random.below(20));
        let whole = |random: &mut Random, len: usize| -> Vec<T> {
            (0..len).map(|_| T::from_acc(T::Acc::from_f64(random.below(5) as f64 - 2.0))).collect()
        };
        let (q, k) = (whole(random, b * h * n * d), whole(random, b * g * s * d));
        let key_mask = random.chance(0.3).then(|| (0..b * s).map(|_| random.below(3) as u8).collect());
        let bias = random.chance(0.3).then(|| {
            let mut bias = whole(random, b * h * n * s);
            for value in &mut bias {
                if random.chance(0.3) {
                    *value = T::from_acc(T::Acc::NEG_INFINITY);
                }
            }
            bias
        });
        let keep = [0, 1, 2, 3, 7, 40, 300][random.below(7)];
        let scale = [1.0, 0.5, -2.0, 0.0][random.below(4)];
        Case { sizes: [b, h, g, n, s, d], q, k, key_mask, bias, keep, causal: random.chance(0.4), scale }
    }

    fn problem(&self) -> Selection<'_, T> {
        let [b, h, g, n, s, d] = self.sizes;
        Selection {
            q: View::contiguous("q", &self.q, [b, h, n, d]).unwrap(),
            k: View::contiguous("k", &self.k, [b, g, s, d]).unwrap(),
            key_mask: self.key_mask.as_ref().map(|mask| View::contiguous("key_mask", mask, [b, s]).unwrap()),
            bias: self.bias.as_ref().map(|bias| View::contiguous("bias", bias, [b, h, n, s]).unwrap()),
            scale: self.scale,
            keep: self.keep,
            causal: self.causal,
        }
    }

    fn chosen(&self, isa: Isa, threads: usize) -> Vec<u32> {
        let [b, h, _, n, ..] = self.sizes;
        let mut chosen = vec![7; b * h * n * self.keep];
        self.problem().choose(&mut chosen, &run(isa, threads)).unwrap();
        chosen
    }

    /// All allowed keys, sorted.
    fn expected(&self) -> Vec<u32> {
        let [b, h, g, n, s, d] = self.sizes;
        let mut expected = Vec::new();
        for (unit, row) in (0..b * h).flat_map(|unit| (0..n).map(move |row| (unit, row))) {
            let kv = unit / h * g + unit % h / (h / g);
            let at = |values: &[T], start: usize| {
                values[start * d..][..d].iter().map(|x| x.to_acc().to_f64()).collect::<Vec<_>>()
            };
            let q = at(&self.q, unit * n + row);
            let mut scored: Vec<(f64, u32)> = (0..s)
                .filter(|&key| !self.causal || key <= row)
                .filter(|&key| self.key_mask.as_ref().is_none_or(|mask| mask[unit / h * s + key] != 0))
                .map(|key| {
                    let k = at(&self.k, kv * s + key);
                    let dot: f64 = q.iter().zip(k).map(|(q, k)| q * k).sum();
                    let bias =
                        self.bias.as_ref().map_or(0.0, |b| b[(unit * n + row) * s + key].to_acc().to_f64());
                    (dot * self.scale + bias, key as u32)
                })
                .filter(|(score, _)| *score != f64::NEG_INFINITY)
                .collect();
            scored.sort_by(|a, b| b.0.partial_cmp(&a.0).unwrap().then(a.1.cmp(&b.1)));
            let mut keys: Vec<u32> = scored.iter().take(self.keep).map(|(_, key)| *key).collect();
            keys.sort_unstable();
            keys.resize(self.keep, NO_KEY);
            expected.extend(keys);
        }
        expected
    }
}

fn check<T: Element>(cases: usize) {
    for isa in Isa::available() {
        for seed in 0..cases as u64 {
            let case = Case::<T>::random(&mut Random(seed));
            assert!(case.chosen(isa, 2) == case.expected(), "{} {} seed {seed}", T::NAME, isa.name());
        }
    }
}

#[test]
fn every_query_keeps_its_best_keys_and_the_lower_index_wins_a_tie() {
    check::<f32>(60);
    check::<f64>(30);
    check::<bf16>(20);
    check::<f16>(20);
}

#[test]
fn zeros_of_either_sign_tie() {
    let (q, k) = ([1.0f32], [-0.0f32, 0.0, -0.0, 0.0]);
    let problem = Selection {
        q: View::contiguous("q", &q, [1, 1, 1, 1]).unwrap(),
        k: View::contiguous("k", &k, [1, 1, 4, 1]).unwrap(),
        key_mask: None,
        bias: None,
        scale: 1.0,
        keep: 2,
        causal: false,
    };
    for isa in Isa::available() {
        let mut chosen = [9; 2];
        problem.choose(&mut chosen, &run(isa, 1)).unwrap();
        assert_eq!(chosen, [0, 1]);
    }
}

#[test]
fn nan_is_chosen_first_so_that_it_shows() {
    let q = [1.0f32];
    let mut k: Vec<f32> = (0..500).map(|key| key as f32).collect();
    k[3] = f32::NAN;
    k[490] = f32::NAN;
    for isa in Isa::available() {
        let mut chosen = [0; 3];
        Selection {
            q: View::contiguous("q", &q, [1, 1, 1, 1]).unwrap(),
            k: View::contiguous("k", &k, [1, 1, 500, 1]).unwrap(),
            key_mask: None,
            bias: None,
            scale: 1.0,
            keep: 3,
            causal: false,
        }
        .choose(&mut chosen, &run(isa, 1))
        .unwrap();
        assert_eq!(chosen, [3, 490, 499]);
    }
}

#[test]
fn threads_do_not_change_the_choice() {
    let case = Case::<f32>::random(&mut Random(5));
    for isa in Isa::available() {
        let one = case.chosen(isa, 1);
        assert!((2..6).all(|threads| case.chosen(isa, threads) == one));
    }
}

#[test]
fn arguments_that_do_not_fit_are_named() {
    let case = Case::<f32> {
        sizes: [1, 2, 1, 3, 4, 5],
        q: vec![0.0; 30],
        k: vec![0.0; 20],
        key_mask: Some(vec![1; 4]),
        bias: None,
        keep: 2,
        causal: false,
        scale: 1.0,
    };
    let short = [0u8; 3];
    let mut problem = case.problem();
    problem.key_mask = Some(View::contiguous("key_mask", &short, [1, 3]).unwrap());
    let error = problem.choose(&mut [0; 12], &run(Isa::Scalar, 1)).unwrap_err().to_string();
    assert!(error.contains("key_mask") && error.contains("[1, 4]"), "{error}");
    let error = case.problem().choose(&mut [0; 11], &run(Isa::Scalar, 1)).unwrap_err().to_string();
    assert!(error.contains("chosen"), "{error}");
}
