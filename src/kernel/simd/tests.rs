//! Every operation of every register against the same operation on single numbers.

use half::{bf16, f16};

use super::*;
use crate::kernel::softmax::exp;
use crate::kernel::tests::Random;

/// Check `kernel` on every instruction set of this machine.
fn on_every_set<T: Element>(kernel: impl Kernel<T> + Copy) {
    for isa in Isa::available() {
        // SAFETY: the set is available, and these kernels ask for nothing else.
        unsafe { isa.run::<T>(kernel) };
    }
}

fn numbers<R: Real>(random: &mut Random, len: usize) -> Vec<R> {
    (0..len).map(|_| R::from_f64(random.uniform() * 8.0)).collect()
}

fn lanes<V: Vector>(value: V) -> Vec<V::Lane> {
    let mut lanes = vec![V::Lane::ZERO; V::LANES];
    // SAFETY: there is room for every lane.
    unsafe { value.store(lanes.as_mut_ptr()) };
    lanes
}

fn close<R: Real>(got: R, expected: R) -> bool {
    let epsilon = if R::NAME == "f32" { 1e-5 } else { 1e-14 };
    (got - expected).to_f64().abs() <= epsilon * (1.0 + expected.to_f64().abs())
}

#[derive(Clone, Copy)]
struct Arithmetic;

impl<R: Real> Kernel<R> for Arithmetic {
    #[inline(always)]
    unsafe fn run<V: Vector<Lane = R> + Memory<R>>(self) {
        let mut random = Random(1);
        for _ in 0..50 {
            let [a, b, c, d] = [(); 4].map(|()| numbers::<R>(&mut random, V::LANES));
            // SAFETY: every list has LANES numbers.
            let [va, vb, vc, vd] = unsafe { [&a, &b, &c, &d].map(|list| V::load(list.as_ptr())) };
            // SAFETY: the caller's promise.
            let zero = unsafe { V::splat(R::ZERO) };
            let sums = {
                let mut sums = [R::ZERO; 4];
                V::sums([va, vb, vc, vd], &mut sums);
                sums
            };
            for lane in 0..V::LANES {
                let (x, y, z) = (a[lane], b[lane], c[lane]);
                assert!(lanes(va + vb)[lane] == x + y);
                assert!(lanes(va - vb)[lane] == x - y);
                assert!(lanes(va * vb)[lane] == x * y);
                assert!(close(lanes(va.mul_add(vb, vc))[lane], x * y + z));
                assert!(lanes(va.min(vb))[lane] == if x < y { x } else { y });
                assert!(lanes(va.max(vb))[lane] == if x > y { x } else { y });
                assert!(lanes(va.round())[lane].to_f64() == x.to_f64().round_ties_even());
                assert!(
                    lanes(va.round().power_of_two())[lane].to_f64()
                        == 2f64.powf(x.to_f64().round_ties_even())
                );
                assert!(lanes(va.or_zero_below(vb, vc))[lane] == if y < z { R::ZERO } else { x });
                let below = lanes(va.where_below(vb, vc, vd))[lane];
                assert!(below == if y < z { x } else { d[lane] });
                assert!((va.at_most(vb) >> lane & 1 != 0) == (x <= y));
                assert!(va.at_most(va) >> lane & 1 != 0);
                // SAFETY: the test runs what is available.
                assert!(va.at_most(unsafe { V::splat(R::from_f64(f64::NAN)) }) == 0);
                let group = &a[lane / 4 * 4..lane / 4 * 4 + 4];
                let expected = R::from_f64(group.iter().map(|x| x.to_f64()).sum());
                assert!(close(lanes(va.sum_of_four())[lane], expected));
                let most = lanes(va.max_of_four())[lane];
                assert!(group.iter().all(|&x| x <= most) && group.contains(&most));
                // SAFETY: the list has LANES numbers.
                assert!(lanes(unsafe { V::spread(a.as_ptr()) })[lane] == a[lane / 4]);
                for count in 0..=V::LANES {
                    assert!(lanes(va.first_or(count, vb))[lane] == if lane < count { x } else { y });
                }
                let bits = random.bits() as u32;
                assert!(lanes(va.keep(bits, vb))[lane] == if bits >> lane & 1 == 1 { x } else { y });
            }
            for (list, sum) in [&a, &b, &c, &d].into_iter().zip(sums) {
                let expected = R::from_f64(list.iter().map(|x| x.to_f64()).sum());
                assert!(close(sum, expected), "{sum} {expected}");
            }
            let mut registers = [zero; MAX_LANES];
            let rows: Vec<Vec<R>> = (0..V::LANES).map(|_| numbers(&mut random, V::LANES)).collect();
            for (register, row) in registers.iter_mut().zip(&rows) {
                // SAFETY: every row has LANES numbers.
                *register = unsafe { V::load(row.as_ptr()) };
            }
            for (sum, row) in lanes(V::sum_each(&registers)).into_iter().zip(&rows) {
                assert!(close(sum, R::from_f64(row.iter().map(|x| x.to_f64()).sum())));
            }
            let each = lanes(V::sum_each(&registers));
            let [ra, rb, rc, rd] = [registers[0], registers[1], registers[2], registers[3]];
            let mut four = [R::ZERO; 4];
            V::sums([ra, rb, rc, rd], &mut four);
            assert!(four == each[..4], "not the same sums: {four:?} {each:?}");
            assert!(close(va.sum(), sums[0]) && close(vd.sum(), sums[3]));
            assert!(a.iter().all(|&x| x <= va.largest()) && a.contains(&va.largest()));
            assert!(zero.largest() == R::ZERO);
        }
    }
}

#[test]
fn arithmetic_is_that_of_single_numbers() {
    on_every_set::<f32>(Arithmetic);
    on_every_set::<f64>(Arithmetic);
}

#[derive(Clone, Copy)]
struct NanRules;

impl<R: Real> Kernel<R> for NanRules {
    #[inline(always)]
    unsafe fn run<V: Vector<Lane = R> + Memory<R>>(self) {
        // SAFETY: the caller's promise.
        let [nan, one] = unsafe { [R::from_f64(f64::NAN), R::ONE].map(|value| V::splat(value)) };
        let is_nan = |value: V| lanes(value).iter().all(|x| x.to_f64().is_nan());
        assert!(is_nan(one.min(nan)) && is_nan(one.max(nan)), "the second operand");
        assert!(!is_nan(nan.min(one)) && !is_nan(nan.max(one)), "the second operand");
        assert!(is_nan(nan.or_zero_below(nan, one)), "NaN is not below anything");
    }
}

#[test]
fn nan_follows_the_documented_rules() {
    on_every_set::<f32>(NanRules);
    on_every_set::<f64>(NanRules);
}

#[derive(Clone, Copy)]
struct Moves;

impl<T: Element> Kernel<T> for Moves {
    #[inline(always)]
    unsafe fn run<V: Vector<Lane = T::Acc> + Memory<T>>(self) {
        let mut random = Random(2);
        // Lengths are exact, so that a sanitizer sees any element too many.
        for count in 0..=V::LANES {
            let source: Vec<T> =
                (0..count).map(|_| T::from_acc(T::Acc::from_f64(random.uniform() * 100.0))).collect();
            // SAFETY: `source` has `count` elements.
            let value = unsafe {
                if count == V::LANES {
                    <V as Memory<T>>::load(source.as_ptr())
                } else {
                    <V as Memory<T>>::load_first(source.as_ptr(), count)
                }
            };
            let expected = source.iter().map(|x| x.to_acc()).chain(std::iter::repeat(T::Acc::ZERO));
            assert!(lanes(value).into_iter().zip(expected).all(|(x, y)| x == y), "load {count}");

            let mut target = vec![T::from_acc(T::Acc::ZERO); count];
            // SAFETY: `target` has room for `count` elements.
            unsafe {
                if count == V::LANES {
                    value.store(target.as_mut_ptr())
                } else {
                    value.store_first(target.as_mut_ptr(), count)
                }
            };
            assert!(target.iter().zip(&source).all(|(x, y)| x.to_acc() == y.to_acc()), "store {count}");
        }
        let (rows, columns) = (V::LANES + 3, V::LANES + 5);
        let from: Vec<T::Acc> = numbers(&mut random, rows * columns);
        let mut to = vec![T::Acc::ZERO; rows * columns];
        // SAFETY: both squares lie inside the lists.
        unsafe { V::transpose(from.as_ptr(), columns, to.as_mut_ptr(), rows) };
        for row in 0..V::LANES {
            for column in 0..V::LANES {
                assert!(to[column * rows + row] == from[row * columns + column]);
            }
        }
    }
}

#[test]
fn moves_touch_what_they_name_and_squares_turn_around() {
    on_every_set::<f32>(Moves);
    on_every_set::<f64>(Moves);
    on_every_set::<bf16>(Moves);
    on_every_set::<f16>(Moves);
}

#[derive(Clone, Copy)]
struct Rounding;

impl<T: Element<Acc = f32>> Kernel<T> for Rounding {
    #[inline(always)]
    unsafe fn run<V: Vector<Lane = f32> + Memory<T>>(self) {
        // Every exponent, both signs, mantissas around the ties, infinities and NaN.
        let mut bits: Vec<u32> = (0..512u32)
            .flat_map(|exponent| {
                [0u32, 1, 0xfff, 0x1000, 0x1001, 0x7fff, 0x8000, 0x8001, 0x1_8000, 0x7f_ffff]
                    .map(|m| exponent << 23 | m)
            })
            .collect();
        bits.resize(bits.len().next_multiple_of(V::LANES), 0);
        for chunk in bits.chunks_exact(V::LANES) {
            let source: Vec<f32> = chunk.iter().map(|&bits| f32::from_bits(bits)).collect();
            let mut target = vec![T::from_acc(0.0); V::LANES];
            // SAFETY: both lists have LANES entries.
            unsafe {
                <V as Memory<T>>::store(<V as Memory<f32>>::load(source.as_ptr()), target.as_mut_ptr())
            };
            for (&x, got) in source.iter().zip(target) {
                let (expected, got) = (T::from_acc(x).to_acc(), got.to_acc());
                assert!(
                    expected.to_bits() == got.to_bits() || expected.is_nan() && got.is_nan(),
                    "{x:e}: {got:e}, not {expected:e}"
                );
            }
        }
    }
}

#[test]
fn halves_round_to_nearest_even() {
    on_every_set::<bf16>(Rounding);
    on_every_set::<f16>(Rounding);
}

#[derive(Clone, Copy)]
struct Exponential;

impl<R: Real> Kernel<R> for Exponential {
    #[inline(always)]
    unsafe fn run<V: Vector<Lane = R> + Memory<R>>(self) {
        let is_f32 = R::NAME == "f32";
        // SAFETY: the caller's promise.
        let of = |x: f64| unsafe { exp(V::splat(R::from_f64(x))).largest().to_f64() };
        let (smallest, ulp) =
            if is_f32 { (-87.336_54, f64::from(f32::EPSILON)) } else { (-708.396, f64::EPSILON) };
        let mut worst = 0.0f64;
        let steps = 200_000;
        for step in 0..=steps {
            let x = R::from_f64(smallest + (1.0 - smallest) * f64::from(step) / f64::from(steps)).to_f64();
            worst = worst.max((of(x) / x.exp() - 1.0).abs() / ulp);
        }
        assert!(worst < if is_f32 { 1.5 } else { 4.0 }, "off by {worst} epsilon in {}", R::NAME);
        assert_eq!(
            (of(0.0), of(-0.0), of(f64::NEG_INFINITY), of(f64::INFINITY)),
            (1.0, 1.0, 0.0, f64::INFINITY)
        );
        assert!(of(f64::NAN).is_nan());
        let largest = if is_f32 { 88.7 } else { 709.7 };
        assert!(
            (of(largest) / R::from_f64(largest).to_f64().exp() - 1.0).abs() < 1e-5,
            "the last finite octave"
        );
        assert_eq!(of(largest + 0.5), f64::INFINITY);
        let tiny = if is_f32 { f64::from(f32::MIN_POSITIVE) } else { f64::MIN_POSITIVE };
        for step in 0..4000 {
            let x = smallest - 0.5 + f64::from(step) / 4000.0;
            assert!(of(x) == 0.0 || of(x) >= tiny, "exp({x}) is denormal");
        }
        assert_eq!([-88.0, -104.0, -745.0, -1e30].map(|x| of(if is_f32 { x } else { x * 9.0 })), [0.0; 4]);
    }
}

#[test]
fn exp_is_precise_and_underflows_to_zero_without_denormals() {
    on_every_set::<f32>(Exponential);
    on_every_set::<f64>(Exponential);
}

#[test]
fn the_set_can_be_chosen_by_name() {
    let (fastest, last) = (Isa::choose(None).unwrap(), *Isa::available().last().unwrap());
    assert!(fastest == last || (fastest, last) == (Isa::Avx512, Isa::Avx512Bf16), "{fastest:?}");
    assert_eq!(Isa::choose(Some("")), Isa::choose(None));
    for isa in Isa::ALL {
        match Isa::choose(Some(isa.name())) {
            Ok(chosen) => assert!(chosen == isa && isa.is_available()),
            Err(error) => {
                assert!(!isa.is_available());
                assert!(error.to_string().contains("this machine lacks"), "{error}");
            }
        }
    }
    let error = Isa::choose(Some("avx3")).unwrap_err().to_string();
    assert!(
        error.contains("SPARSE_MHSA_SIMD: unknown instruction set `avx3`: did you mean `avx2`?"),
        "{error}"
    );
}

/// What [`pairs`] computes, against the same sums in f64.
#[cfg(target_arch = "x86_64")]
mod products_of_pairs {
    use half::bf16;

    use super::super::pairs::{Pairs, Term, narrow};
    use super::super::*;
    use crate::kernel::tests::{Random, values};

    const SIDE: usize = 16;

    fn available() -> impl Iterator<Item = Pairs> {
        Isa::available().into_iter().filter_map(Isa::pairs)
    }

    fn close(got: f32, want: f64, sum_of_magnitudes: f64) -> bool {
        (f64::from(got) - want).abs() <= 1e-5 * sum_of_magnitudes
    }

    /// Squares of which both halves, one or none are needed.
    fn terms(panels: &[Vec<bf16>]) -> Vec<Term> {
        let halves = |s: usize| [s % 4 != 1, s % 4 != 2 && s != 3];
        panels
            .iter()
            .enumerate()
            .map(|(s, panel)| Term { panel: panel.as_ptr(), halves: halves(s) })
            .collect()
    }

    #[test]
    fn scores_are_products_of_rows_and_columns() {
        let mut random = Random(41);
        for unit in available() {
            for (width, count) in (1..=8).flat_map(|chunks| (1..=9).map(move |count| (32 * chunks, count))) {
                let tile: Vec<bf16> = values(&mut random, SIDE * width, 2.0);
                let panels: Vec<Vec<bf16>> =
                    (0..count).map(|_| values(&mut random, SIDE * width, 2.0)).collect();
                let terms = terms(&panels);
                let mut scores = vec![f32::NAN; count * SIDE * SIDE];
                // SAFETY: the set is available; there are sixteen rows, so many panels, and as many squares.
                unsafe {
                    unit.begin();
                    unit.scores(tile.as_ptr(), width, &terms, scores.as_mut_ptr());
                    unit.finish();
                }
                for (s, panel) in panels.iter().enumerate() {
                    for (i, j) in (0..SIDE).flat_map(|i| (0..SIDE).map(move |j| (i, j))) {
                        let products = (0..width).map(|d| {
                            let key = panel[d / 2 * 2 * SIDE + 2 * j + d % 2];
                            tile[i * width + d].to_f64() * key.to_f64()
                        });
                        let (want, most) =
                            products.fold((0.0, 0.0), |(sum, most), p| (sum + p, most + p.abs()));
                        let got = scores[(s * SIDE + i) * SIDE + j];
                        let needed = terms[s].halves[i / 8];
                        assert!(
                            !needed || close(got, want, most),
                            "{unit:?}, {width}, {s} {i} {j}: {got} {want}"
                        );
                    }
                }
            }
        }
    }

    #[test]
    fn weighted_sums_are_added_to_what_is_there() {
        let mut random = Random(42);
        for unit in available() {
            for (width, count) in (1..=16).flat_map(|n| [0, 1, 2, 5, 33].map(move |count| (SIDE * n, count)))
            {
                let panels: Vec<Vec<bf16>> =
                    (0..count).map(|_| values(&mut random, SIDE * width, 2.0)).collect();
                let terms = terms(&panels);
                let mut weights: Vec<bf16> = values(&mut random, count * SIDE * SIDE, 1.0);
                for (s, term) in terms.iter().enumerate() {
                    for half in (0..2).filter(|&half| !term.halves[half]) {
                        let first = s * SIDE * SIDE + half * SIDE * SIDE / 2;
                        weights[first..first + SIDE * SIDE / 2].fill(bf16::ZERO);
                    }
                }
                let before: Vec<f32> = values(&mut random, SIDE * width, 2.0);
                let mut out = before.clone();
                // SAFETY: the set is available; there are so many squares of weights, panels of eight pairs, and sixteen rows.
                unsafe {
                    unit.begin();
                    unit.add_sums(weights.as_ptr(), &terms, width, out.as_mut_ptr());
                    unit.finish();
                }
                for (i, c) in (0..SIDE).flat_map(|i| (0..width).map(move |c| (i, c))) {
                    let products = panels.iter().enumerate().flat_map(|(s, panel)| {
                        let weights = &weights[(s * SIDE + i) * SIDE..];
                        (0..SIDE).map(move |j| {
                            weights[j].to_f64() * panel[j / 2 * 2 * width + 2 * c + j % 2].to_f64()
                        })
                    });
                    let start = f64::from(before[i * width + c]);
                    let (want, most) =
                        products.fold((start, start.abs()), |(sum, most), p| (sum + p, most + p.abs()));
                    let got = out[i * width + c];
                    assert!(close(got, want, most), "{unit:?}, {width}, {count}, {i} {c}: {got} {want}");
                }
            }
        }
    }

    #[test]
    fn numbers_are_rounded_to_the_nearest_and_ties_to_even() {
        let mut random = Random(43);
        let mut numbers: Vec<f32> = values(&mut random, 16 * 50, 4.0);
        numbers.extend((0..16).map(|i| 1.0 + (2 * i + 1) as f32 / 256.0));
        numbers.extend([0.0, -0.0, f32::INFINITY, f32::MAX].repeat(4));
        if available().next().is_some() {
            let mut got = vec![bf16::NAN; numbers.len()];
            // SAFETY: the set is available, and the numbers exist at both places.
            unsafe { narrow(numbers.as_ptr(), got.as_mut_ptr(), numbers.len()) };
            assert!(got.iter().zip(&numbers).all(|(got, &x)| got.to_bits() == bf16::from_f32(x).to_bits()));
        }
    }
}
