//! Decoding against float64 lists that grow and shrink as the definition says, on every instruction set.

use half::{bf16, f16};

use super::{Random, distance, f64s, magnitude, run};
use crate::kernel::{Decode, Element, Isa, Real, Slots, Step, View, Worth};

/// One entry of one head, in the order of arrival.
#[derive(Clone)]
struct Entry {
    key: Vec<f64>,
    value: Vec<f64>,
    position: i64,
    attention: f64,
}

/// `softmax(scale * q k^T)`, its weighted values, and the log of the sum.
fn attend(q: &[f64], entries: &[Entry], scale: f64, width: usize) -> (Vec<f64>, Vec<f64>, f64) {
    let dots = entries.iter().map(|entry| entry.key.iter().zip(q).map(|(k, q)| k * q).sum::<f64>() * scale);
    let scores: Vec<f64> = dots.collect();
    let largest = scores.iter().copied().fold(f64::NEG_INFINITY, f64::max);
    let sum: f64 = scores.iter().map(|score| (score - largest).exp()).sum();
    let weights: Vec<f64> = scores.iter().map(|score| (score - largest).exp() / sum).collect();
    let mut out = vec![0.0; width];
    for (weight, entry) in weights.iter().zip(entries) {
        out.iter_mut().zip(&entry.value).for_each(|(out, value)| *out += weight * value);
    }
    let lse = if entries.is_empty() { f64::NEG_INFINITY } else { largest + sum.ln() };
    (out, weights, lse)
}

fn numbers<T: Element>(random: &mut Random, len: usize) -> Vec<T> {
    (0..len).map(|_| T::from_acc(T::Acc::from_f64(random.uniform() * 2.0))).collect()
}

fn tolerance<T: Element>() -> f64 {
    match T::NAME {
        "f64" => 1e-12,
        "f32" => 2e-6,
        "f16" => 2e-3,
        _ => 1.6e-2,
    }
}

fn close<T: Element>(name: &str, expected: &[f64], got: &[f64], factor: f64) {
    let far = distance(name, expected, got);
    let allowed = tolerance::<T>() * factor * magnitude(expected).max(1.0);
    assert!(far <= allowed, "{name} {}: {far} of {allowed}", T::NAME);
}

/// Caches of known lengths, S slots each.
struct Case<T> {
    sizes: [usize; 7],
    q: Vec<T>,
    k: Vec<T>,
    v: Vec<T>,
    lengths: Vec<i64>,
    causal: bool,
}

impl<T: Element> Case<T> {
    fn random(random: &mut Random, most: usize) -> Self {
        let (b, g, group) = (1 + random.below(2), 1 + random.below(3), 1 + random.below(3));
        let (n, s) = (1 + random.below(3), 1 + random.below(most));
        let (d, e) = (1 + random.below(40), 1 + random.below(70));
        let (q, mut k, mut v) = (
            numbers(random, b * g * group * n * d),
            numbers(random, b * g * s * d),
            numbers(random, b * g * s * e),
        );
        let lengths: Vec<i64> = (0..b * g).map(|_| random.below(s + 1) as i64).collect();
        // What lies behind the length must not be read.
        let nothing = T::from_acc(T::Acc::from_f64(f64::NAN));
        for (unit, &length) in lengths.iter().enumerate() {
            k[(unit * s + length as usize) * d..(unit + 1) * s * d].fill(nothing);
            v[(unit * s + length as usize) * e..(unit + 1) * s * e].fill(nothing);
        }
        Case { sizes: [b, g, group, n, s, d, e], q, k, v, lengths, causal: random.chance(0.5) }
    }

    fn problem(&self) -> Decode<'_, T> {
        let [b, g, group, n, s, d, e] = self.sizes;
        Decode {
            q: View::contiguous("q", &self.q, [b, g * group, n, d]).unwrap(),
            k: View::contiguous("k", &self.k, [b, g, s, d]).unwrap(),
            v: View::contiguous("v", &self.v, [b, g, s, e]).unwrap(),
            lengths: &self.lengths,
            causal: self.causal,
            scale: 0.7,
        }
    }

    fn results(&self, isa: Isa, threads: usize) -> [Vec<f64>; 3] {
        let [b, g, group, n, s, _, e] = self.sizes;
        let unset = T::from_acc(T::Acc::from_f64(f64::NAN));
        let (mut out, mut lse) = (vec![unset; b * g * group * n * e], vec![f64::NAN; b * g * group * n]);
        let mut weights = vec![unset.to_acc(); b * g * s];
        self.problem().attend(&mut out, &mut lse, Some(&mut weights), &run(isa, threads)).unwrap();
        [f64s(&out), lse, f64s(&weights)]
    }

    fn expected(&self) -> [Vec<f64>; 3] {
        let [b, g, group, n, s, d, e] = self.sizes;
        let (q, k, v) = (f64s(&self.q), f64s(&self.k), f64s(&self.v));
        let (mut out, mut lse, mut weights) = (vec![], vec![], vec![0.0; b * g * s]);
        for head in 0..b * g * group {
            for i in 0..n {
                let (unit, row) = (head / group, head * n + i);
                let hidden = if self.causal { n - 1 - i } else { 0 };
                let seen = (self.lengths[unit] as usize).saturating_sub(hidden);
                let entry = |slot: usize| Entry {
                    key: k[(unit * s + slot) * d..][..d].to_vec(),
                    value: v[(unit * s + slot) * e..][..e].to_vec(),
                    position: 0,
                    attention: 0.0,
                };
                let entries: Vec<Entry> = (0..seen).map(entry).collect();
                let (row_out, row_weights, row_lse) = attend(&q[row * d..][..d], &entries, 0.7, e);
                out.extend(row_out);
                lse.push(row_lse);
                weights[unit * s..].iter_mut().zip(row_weights).for_each(|(sum, weight)| *sum += weight);
            }
        }
        [out, lse, weights]
    }
}

fn ragged<T: Element>() {
    for (seed, most) in (0..24).zip([1, 3, 17, 300, 900].into_iter().cycle()) {
        let case = Case::<T>::random(&mut Random(seed), most);
        let [out, lse, weights] = case.expected();
        for isa in Isa::available() {
            let [got_out, got_lse, got_weights] = case.results(isa, 1 + seed as usize % 3);
            close::<T>("out", &out, &got_out, 1.0);
            // Inputs are exact, and these two are kept in the precision of sums.
            close::<T::Acc>("lse", &lse, &got_lse, 4.0);
            close::<T::Acc>("weights", &weights, &got_weights, 4.0);
        }
    }
}

#[test]
fn queries_see_the_entries_of_their_head_and_nothing_behind_them() {
    ragged::<f32>();
    ragged::<f64>();
    ragged::<bf16>();
    ragged::<f16>();
}

#[test]
fn threads_do_not_change_a_bit() {
    // Few heads and a long cache: its pieces are shared out.
    for seed in 0..6 {
        let case = Case::<f32>::random(&mut Random(seed), 40_000);
        for isa in Isa::available() {
            let one = case.results(isa, 1);
            let same = |threads| {
                case.results(isa, threads).map(|v| v.iter().map(|x| x.to_bits()).collect::<Vec<_>>())
            };
            assert!((2..9).step_by(2).all(|threads| same(threads) == same(1)));
            assert!(one[0].iter().all(|x| x.is_finite()) || case.lengths.contains(&0));
        }
    }
}

/// A cache that tokens join in several calls.
struct Session<T> {
    sizes: [usize; 6],
    q: Vec<T>,
    k: Vec<T>,
    v: Vec<T>,
    positions: Vec<i64>,
    capacities: Vec<i64>,
    worth: Worth,
    sinks: i64,
    recent: i64,
    window: Option<i64>,
    calls: Vec<usize>,
}

/// What remains of a session.
struct Remains {
    out: Vec<f64>,
    lse: Vec<f64>,
    /// Per unit, in order of arrival.
    entries: Vec<Vec<Entry>>,
}

impl<T: Element> Session<T> {
    fn random(random: &mut Random) -> Self {
        let (b, g, group) = (1 + random.below(2), 1 + random.below(2), 1 + random.below(3));
        let (d, e) = (1 + random.below(20), 1 + random.below(20));
        let calls: Vec<usize> = (0..1 + random.below(5)).map(|_| 1 + random.below(40)).collect();
        let n = calls.iter().sum();
        let mut positions = Vec::new();
        for _ in 0..b {
            let mut next = 0;
            for _ in 0..n {
                let padding = random.chance(0.1);
                positions.push(if padding { -1 } else { next });
                next += i64::from(!padding);
            }
        }
        let capacities: Vec<i64> = (0..g).map(|_| 1 + random.below(30) as i64).collect();
        let least = capacities.iter().copied().min().unwrap() as usize;
        let sinks = random.below(least);
        let recent = random.below(least - sinks + 1);
        Session {
            sizes: [b, g, group, n, d, e],
            q: numbers(random, b * g * group * n * d),
            k: numbers(random, b * g * n * d),
            v: numbers(random, b * g * n * e),
            positions,
            capacities,
            worth: Worth::ALL[random.below(4)],
            sinks: sinks as i64,
            recent: recent as i64,
            window: random.chance(0.5).then(|| random.below(20) as i64),
            calls,
        }
    }

    /// Run all calls through the kernel.
    fn remains(&self, isa: Isa, threads: usize) -> Remains {
        let [b, g, group, n, d, e] = self.sizes;
        let spare = self.worth.spare() as i64;
        let mut starts = vec![0i64];
        self.capacities.iter().for_each(|capacity| starts.push(starts.last().unwrap() + capacity + spare));
        let room = *starts.last().unwrap() as usize;
        let nothing = T::from_acc(T::Acc::from_f64(f64::NAN));
        let (mut keys, mut values) = (vec![nothing; b * room * d], vec![nothing; b * room * e]);
        let ranked = if spare == 0 { 0 } else { b * room };
        let (mut positions, mut worths) = (vec![-9i64; b * room], vec![nothing.to_acc(); ranked]);
        let mut lengths = vec![0i64; b * g];
        let heads = g * group;
        let (mut out, mut lse) = (vec![f64::NAN; b * heads * n * e], vec![f64::NAN; b * heads * n]);
        let mut first = 0;
        for &count in &self.calls {
            let tokens = first..first + count;
            let part = |values: &[T], rows: usize, width: usize| -> Vec<T> {
                (0..rows)
                    .flat_map(|row| values[(row * n + first) * width..][..count * width].to_vec())
                    .collect()
            };
            let (q, k, v) = (part(&self.q, b * heads, d), part(&self.k, b * g, d), part(&self.v, b * g, e));
            let of_sample = |sample: usize| self.positions[sample * n..][tokens.clone()].to_vec();
            let token_positions: Vec<i64> = (0..b).flat_map(of_sample).collect();
            let (mut part_out, mut part_lse) =
                (vec![nothing; b * heads * count * e], vec![f64::NAN; b * heads * count]);
            Step {
                q: Some(View::contiguous("q", &q, [b, heads, count, d]).unwrap()),
                k: View::contiguous("k", &k, [b, g, count, d]).unwrap(),
                v: View::contiguous("v", &v, [b, g, count, e]).unwrap(),
                positions: &token_positions,
                capacities: &self.capacities,
                worth: self.worth,
                sinks: self.sinks,
                recent: self.recent,
                window: self.window,
                scale: 0.7,
            }
            .run(
                Slots {
                    keys: &mut keys,
                    values: &mut values,
                    positions: &mut positions,
                    worths: &mut worths,
                    lengths: &mut lengths,
                    starts: &starts,
                },
                &mut part_out,
                &mut part_lse,
                &run(isa, threads),
            )
            .unwrap();
            for row in 0..b * heads {
                let got = f64s(&part_out[row * count * e..][..count * e]);
                out[(row * n + first) * e..][..count * e].copy_from_slice(&got);
                lse[row * n + first..][..count].copy_from_slice(&part_lse[row * count..][..count]);
            }
            first += count;
        }
        let entries = (0..b * g).map(|unit| {
            let base = unit / g * room + starts[unit % g] as usize;
            let mut entries: Vec<Entry> = (base..base + lengths[unit] as usize)
                .map(|slot| Entry {
                    key: f64s(&keys[slot * d..][..d]),
                    value: f64s(&values[slot * e..][..e]),
                    position: positions[slot],
                    attention: worths.get(slot).map_or(0.0, |worth| worth.to_f64()),
                })
                .collect();
            entries.sort_by_key(|entry| entry.position);
            entries
        });
        Remains { entries: entries.collect(), out, lse }
    }

    /// The definition, token by token.
    fn expected(&self) -> Remains {
        let [b, g, group, n, d, e] = self.sizes;
        let (q, k, v) = (f64s(&self.q), f64s(&self.k), f64s(&self.v));
        let (mut out, mut lse) =
            (vec![0.0; b * g * group * n * e], vec![f64::NEG_INFINITY; b * g * group * n]);
        let mut remains = Vec::new();
        for unit in 0..b * g {
            let mut entries: Vec<Entry> = Vec::new();
            let capacity = self.capacities[unit % g] as usize;
            for token in 0..n {
                let newest = self.positions[unit / g * n + token];
                if newest < 0 {
                    continue;
                }
                let row = unit * n + token;
                let entry = Entry {
                    key: k[row * d..][..d].to_vec(),
                    value: v[row * e..][..e].to_vec(),
                    position: newest,
                    attention: 0.0,
                };
                entries.push(entry);
                let trim = |entries: &mut Vec<Entry>| {
                    if entries.len() > capacity {
                        let norm = |entry: &Entry| entry.key.iter().map(|x| x * x).sum::<f64>().sqrt();
                        let worth = |entry: &Entry| match self.worth {
                            Worth::Recency => entry.position as f64,
                            Worth::Attention => entry.attention,
                            Worth::LowNorm => -norm(entry),
                            Worth::HighNorm => norm(entry),
                        };
                        let candidates = (0..entries.len()).filter(|&i| {
                            entries[i].position >= self.sinks && entries[i].position <= newest - self.recent
                        });
                        let least = candidates
                            .rev()
                            .min_by(|&a, &b| worth(&entries[a]).total_cmp(&worth(&entries[b])))
                            .unwrap();
                        entries.remove(least);
                    }
                };
                if self.worth == Worth::Recency {
                    trim(&mut entries);
                }
                let is_hidden =
                    |entry: &Entry| self.window.is_some_and(|window| newest - entry.position > window);
                let hidden = entries.partition_point(is_hidden);
                for head in unit * group..(unit + 1) * group {
                    let row = head * n + token;
                    let (row_out, weights, row_lse) = attend(&q[row * d..][..d], &entries[hidden..], 0.7, e);
                    out[row * e..][..e].copy_from_slice(&row_out);
                    lse[row] = row_lse;
                    for (entry, weight) in entries[hidden..].iter_mut().zip(weights) {
                        entry.attention += weight;
                    }
                }
                if self.worth != Worth::Recency {
                    trim(&mut entries);
                }
            }
            remains.push(entries);
        }
        Remains { out, lse, entries: remains }
    }
}

fn sessions<T: Element>(count: u64) {
    for seed in 0..count {
        let session = Session::<T>::random(&mut Random(seed));
        let expected = session.expected();
        for isa in Isa::available() {
            let got = session.remains(isa, 1 + seed as usize % 2);
            for (unit, (expected, got)) in expected.entries.iter().zip(&got.entries).enumerate() {
                let positions = |entries: &[Entry]| entries.iter().map(|e| e.position).collect::<Vec<_>>();
                let about = format!("{} {:?} seed {seed} unit {unit}", T::NAME, session.worth);
                assert_eq!(positions(expected), positions(got), "{about}");
                for (expected, got) in expected.iter().zip(got) {
                    assert!(expected.key == got.key && expected.value == got.value, "{about}");
                    if session.worth == Worth::Attention {
                        close::<T::Acc>("attention", &[expected.attention], &[got.attention], 20.0);
                    }
                }
            }
            close::<T>("out", &expected.out, &got.out, 1.0);
            close::<T::Acc>("lse", &expected.lse, &got.lse, 4.0);
        }
    }
}

#[test]
fn a_cache_keeps_what_the_definition_keeps() {
    sessions::<f64>(60);
    sessions::<f32>(30);
    sessions::<bf16>(15);
    sessions::<f16>(15);
}

#[test]
fn shared_pieces_and_whole_heads_forget_alike() {
    let (n, d) = (3000, 32);
    let mut random = Random(3);
    let session = Session::<f32> {
        sizes: [1, 1, 2, n, d, d],
        q: numbers(&mut random, 2 * n * d),
        k: numbers(&mut random, n * d),
        v: numbers(&mut random, n * d),
        positions: (0..n as i64).collect(),
        capacities: vec![2700],
        worth: Worth::Attention,
        sinks: 2,
        recent: 5,
        window: Some(2500),
        // One token at a time at the end, which is when threads share pieces.
        calls: [vec![2690], vec![1; 300], vec![10]].concat(),
    };
    for isa in Isa::available() {
        let bits = |threads: usize| {
            let remains = session.remains(isa, threads);
            let of_entry = |entry: &Entry| (entry.position, entry.attention.to_bits());
            let entries: Vec<_> = remains.entries[0].iter().map(of_entry).collect();
            (entries, remains.out.iter().map(|x| x.to_bits()).collect::<Vec<_>>())
        };
        assert!(bits(1) == bits(4), "{}", isa.name());
    }
}

#[test]
fn nan_is_kept_so_that_it_shows() {
    let (q, v) = (vec![1.0f32; 4], vec![1.0f32; 4]);
    let k = [0.5, f32::NAN, 0.25, 0.75];
    let (mut out, mut lse) = (vec![0.0; 4], vec![0.0; 4]);
    let (mut keys, mut values, mut positions, mut worths) = ([0.0f32; 3], [0.0f32; 3], [0; 3], [0.0f32; 3]);
    let step = Step {
        q: Some(View::contiguous("q", &q, [1, 1, 4, 1]).unwrap()),
        k: View::contiguous("k", &k, [1, 1, 4, 1]).unwrap(),
        v: View::contiguous("v", &v, [1, 1, 4, 1]).unwrap(),
        positions: &[0, 1, 2, 3],
        capacities: &[2],
        worth: Worth::LowNorm,
        sinks: 0,
        recent: 0,
        window: None,
        scale: 1.0,
    };
    let mut lengths = [0];
    let slots = Slots {
        keys: &mut keys,
        values: &mut values,
        positions: &mut positions,
        worths: &mut worths,
        lengths: &mut lengths,
        starts: &[0, 3],
    };
    step.run(slots, &mut out, &mut lse, &run(Isa::Scalar, 1)).unwrap();
    positions[..2].sort_unstable();
    assert_eq!((lengths[0], &positions[..2]), (2, &[1, 2][..]));
    assert!(!out[0].is_nan() && out[1..].iter().all(|x| x.is_nan()), "{out:?}");
}

/// Spoils a step, its lengths or its starts.
type Spoil<'a> = &'a dyn Fn(&mut Step<f32>, &mut [i64], &mut [i64]);

#[test]
fn what_does_not_fit_is_named_before_anything_is_written() {
    let session = Session::<f32> {
        sizes: [1, 2, 1, 3, 4, 4],
        q: vec![0.0; 24],
        k: vec![0.0; 24],
        v: vec![0.0; 24],
        positions: vec![0, 1, 2],
        capacities: vec![2, 2],
        worth: Worth::Attention,
        sinks: 0,
        recent: 0,
        window: None,
        calls: vec![3],
    };
    let fails = |change: Spoil, expected: &str| {
        let k = View::contiguous("k", &session.k, [1, 2, 3, 4]).unwrap();
        let mut step = Step {
            q: Some(k),
            k,
            v: k,
            positions: &session.positions,
            capacities: &session.capacities,
            worth: session.worth,
            sinks: 0,
            recent: 0,
            window: None,
            scale: 1.0,
        };
        let (mut lengths, mut starts) = ([0, 0], [0, 3, 6]);
        change(&mut step, &mut lengths, &mut starts);
        let (mut keys, mut values, mut worths) = ([7.0f32; 24], [7.0f32; 24], [7.0f32; 6]);
        let slots = Slots {
            keys: &mut keys,
            values: &mut values,
            positions: &mut [0; 6],
            worths: &mut worths,
            lengths: &mut lengths,
            starts: &starts,
        };
        let error =
            step.run(slots, &mut [0.0; 24], &mut [0.0; 6], &run(Isa::Scalar, 1)).unwrap_err().to_string();
        assert!(error.starts_with(expected), "{error}");
        assert!(keys.iter().chain(&values).chain(&worths).all(|&x| x == 7.0));
    };
    let other = View::contiguous("v", &[0.0; 16], [1, 1, 4, 4]).unwrap();
    fails(&|_, lengths, _| lengths[1] = 3, "lengths: expected 0 to 2, got 3");
    fails(&|_, lengths, _| lengths[0] = -1, "lengths: expected 0 to 2, got -1");
    fails(&|_, _, starts| starts[1] = 2, "keys: head 0 needs 3 slots");
    fails(&|_, _, starts| starts[2] = 7, "starts: expected 0 to 6, got 7");
    fails(&|_, _, starts| starts[0] = 1, "starts: expected ascending offsets from 0");
    fails(&|step, _, _| step.capacities = &[2, 0], "capacities: expected 1 to ");
    fails(&|step, _, _| step.capacities = &[2], "capacities: expected 2 elements");
    fails(&|step, _, _| step.positions = &[0, 1], "token_positions: expected 3 elements");
    fails(&|step, _, _| step.sinks = -1, "sinks: expected 0 to ");
    fails(&|step, _, _| step.recent = -1, "recent: expected 0 to ");
    fails(&|step, _, _| step.window = Some(-1), "window: expected 0 to ");
    fails(&|step, _, _| step.v = other, "v: expected shape [1, 2, 3, 4], got [1, 1, 4, 4]");
    fails(&|step, _, _| step.q = Some(other), "k: expected a number of heads that divides the 1 of q");
    fails(&|step, _, _| step.worth = Worth::Recency, "worths: expected 0 elements");

    let case = Case::<f32>::random(&mut Random(1), 4);
    let long = vec![99; case.lengths.len()];
    let problem = Decode { lengths: &long, ..case.problem() };
    let error = problem.attend(&mut [], &mut [], None, &run(Isa::Scalar, 1)).unwrap_err().to_string();
    assert!(error.starts_with("lengths: expected 0 to "), "{error}");
}
