//! The exponential function on vectors, and softmax that can be continued.

use super::element::Real;
use super::simd::{MAX_LANES, Vector};

/// Constants of `exp`, after Cody and Waite: `exp(x) = 2^n exp(r)` with `n = round(x / ln 2)` and `|r| <= ln 2 / 2`.
#[derive(Debug, Clone, Copy)]
pub struct Exp<R: 'static> {
    log2_e: R,
    /// `ln 2` in two parts, the first short enough that its product with `n` is exact.
    ln_2: [R; 2],
    /// Below this, `exp` would be denormal, and denormals cost a hundred times more than other numbers: the result is zero.
    smallest: R,
    /// From here on the result is infinite.
    largest: R,
    largest_exponent: R,
    /// Of `r^2` and up, highest power first.
    coefficients: &'static [R],
    /// `2^x` would be denormal below this.
    smallest_exponent: R,
    /// Of `2^r`, `|r| <= 1/2`, from the highest power down to `r`.
    base_2: &'static [R],
}

impl Exp<f32> {
    pub(super) const F32: Self = Exp {
        log2_e: std::f32::consts::LOG2_E,
        ln_2: [355.0 / 512.0, -2.121_944_4e-4],
        smallest: -87.336_54,
        largest: 89.0,
        largest_exponent: 127.0,
        coefficients: &[1.987_569_1e-4, 1.398_199_9e-3, 8.333_452e-3, 4.166_579_6e-2, 1.666_666_5e-1, 0.5],
        smallest_exponent: -126.0,
        // Least relative error, 2e-9, among polynomials that are exact at 0.
        base_2: &[1.535_336_2e-4, 1.339_887_4e-3, 9.618_437e-3, 5.550_332_4e-2, 2.402_264_8e-1, 6.931_472e-1],
    };
}

impl Exp<f64> {
    /// Taylor's series up to `r^13`, which is short of `exp(r)` by less than 5e-18.
    pub(super) const F64: Self = Exp {
        log2_e: std::f64::consts::LOG2_E,
        ln_2: [0.693_145_751_953_125, 1.428_606_820_309_417_2e-6],
        smallest: -708.396_418_532_264_1,
        largest: 710.0,
        largest_exponent: 1023.0,
        coefficients: &[
            1.0 / 6_227_020_800.0,
            1.0 / 479_001_600.0,
            1.0 / 39_916_800.0,
            1.0 / 3_628_800.0,
            1.0 / 362_880.0,
            1.0 / 40_320.0,
            1.0 / 5_040.0,
            1.0 / 720.0,
            1.0 / 120.0,
            1.0 / 24.0,
            1.0 / 6.0,
            0.5,
        ],
        smallest_exponent: -1022.0,
        // ln(2)^k / k!
        base_2: &[
            1.3691488853904124e-12,
            2.5678435993488196e-11,
            4.44553827187081e-10,
            7.054911620801121e-09,
            1.0178086009239696e-07,
            1.3215486790144305e-06,
            1.5252733804059838e-05,
            0.00015403530393381606,
            0.0013333558146428441,
            0.009618129107628477,
            0.055504108664821576,
            0.2402265069591007,
            std::f64::consts::LN_2,
        ],
    };
}

/// `exp` of every lane within an ulp or two; exactly zero instead of a denormal number; infinity and NaN as usual.
///
/// Arguments in this crate are at most a rounding error above zero; those above `ln(largest) - ln(2) / 2` lose a few ulp more.
///
/// # Safety
/// The instructions of `V` are available.
#[inline(always)]
pub(super) unsafe fn exp<V: Vector>(x: V) -> V {
    let constants = &V::Lane::EXP;
    // SAFETY: the caller's promise.
    unsafe {
        // `min` gives its second operand where one is NaN, so that NaN goes through.
        let clamped = V::splat(constants.largest).min(x);
        let n = V::splat(constants.largest_exponent).min((clamped * V::splat(constants.log2_e)).round());
        let r = n.mul_add(V::splat(-constants.ln_2[0]), clamped);
        let r = n.mul_add(V::splat(-constants.ln_2[1]), r);
        let mut series = V::splat(constants.coefficients[0]);
        for &coefficient in &constants.coefficients[1..] {
            series = series.mul_add(r, V::splat(coefficient));
        }
        let fraction = series.mul_add(r * r, r) + V::splat(V::Lane::ONE);
        (fraction * n.power_of_two()).or_zero_below(x, V::splat(constants.smallest))
    }
}

/// `2^x` of every lane for x of at most 127, as precise as [`exp`]; exactly zero instead of a denormal number; NaN as usual.
///
/// # Safety
/// The instructions of `V` are available.
#[inline(always)]
pub(super) unsafe fn exp2<V: Vector>(x: V) -> V {
    let constants = &V::Lane::EXP;
    // SAFETY: the caller's promise.
    unsafe {
        let n = x.round();
        let r = x - n;
        let mut series = V::splat(constants.base_2[0]);
        for &coefficient in &constants.base_2[1..] {
            series = series.mul_add(r, V::splat(coefficient));
        }
        let fraction = series.mul_add(r, V::splat(V::Lane::ONE));
        (fraction * n.power_of_two()).or_zero_below(x, V::splat(constants.smallest_exponent))
    }
}

/// The softmax of one row, seen piece by piece.
///
/// `background` keys beside those seen have a score of 0: they are never listed, but counted in the sum, and every listed weight is
/// given relative to theirs.
#[derive(Debug, Clone, Copy)]
pub(super) struct Running<R> {
    largest: R,
    sum: R,
    background: R,
}

impl<R: Real> Running<R> {
    /// Nothing seen yet.
    pub(super) fn new(background: usize) -> Self {
        Running {
            largest: if background > 0 { R::ZERO } else { R::NEG_INFINITY },
            sum: R::ZERO,
            background: R::from_f64(background as f64),
        }
    }

    /// Replace the first `len` of `dots` (whose length is whole registers) by weights `exp(scale * dot - largest)`, less
    /// [`Self::background_weight`]. What was summed with earlier weights has to be multiplied by the result, because the largest
    /// score may have grown.
    ///
    /// # Safety
    /// The instructions of `V` are available.
    #[inline(always)]
    pub(super) unsafe fn absorb<V: Vector<Lane = R>>(&mut self, dots: &mut [R], len: usize, scale: R) -> R {
        debug_assert!(len <= dots.len() && dots.len().is_multiple_of(V::LANES));
        let data = dots.as_mut_ptr();
        // SAFETY: whole registers, as asserted.
        unsafe {
            let nothing = V::splat(R::NEG_INFINITY);
            let factor = V::splat(scale);
            let mut largest = nothing;
            for i in (0..len).step_by(V::LANES) {
                let mut scores = V::load(data.add(i)) * factor;
                if len - i < V::LANES {
                    scores = scores.first_or(len - i, nothing);
                }
                scores.store(data.add(i));
                largest = largest.max(scores);
            }
            let largest = largest.largest();
            let before = self.largest;
            // A NaN may hide from the maximum but not from the sum.
            if largest > before {
                self.largest = largest;
            }
            let shift = V::splat(if self.largest == R::NEG_INFINITY { R::ZERO } else { self.largest });
            let background = V::splat(self.background_weight());
            let mut sum = V::splat(R::ZERO);
            for i in (0..len).step_by(V::LANES) {
                let weights = exp(V::load(data.add(i)) - shift);
                sum = sum + weights;
                (weights - background).store(data.add(i));
            }
            let correction = if self.largest == before { R::ONE } else { exp_or_zero(before - self.largest) };
            self.sum = self.sum * correction + sum.sum();
            correction
        }
    }

    /// What a key with a score of 0 weighs now; nothing when there are none.
    #[inline(always)]
    pub(super) fn background_weight(&self) -> R {
        if self.background > R::ZERO { exp_or_zero(-self.largest) } else { R::ZERO }
    }

    /// What to multiply the weighted sum by, and the log of the sum of the exponentials. A row without keys gives zero and minus
    /// infinity.
    #[inline(always)]
    pub(super) fn finish(&self) -> (R, f64) {
        let total = self.sum + self.background * self.background_weight();
        if total == R::ZERO {
            return (R::ZERO, f64::NEG_INFINITY);
        }
        (R::ONE / total, log_sum_exp(self.largest, total))
    }
}

impl<R: Real> Running<R> {
    /// The softmax of a row, none of it background, whose pieces were each seen apart.
    pub(super) fn joined(pieces: impl Iterator<Item = Self> + Clone) -> Self {
        let mut whole = Running::new(0);
        for piece in pieces.clone() {
            if piece.largest > whole.largest {
                whole.largest = piece.largest;
            }
        }
        for piece in pieces {
            whole.sum += piece.sum * piece.share(&whole);
        }
        whole
    }

    /// What to multiply this piece's weights by to have those of the whole row.
    #[inline(always)]
    pub(super) fn share(&self, whole: &Self) -> R {
        if self.largest == R::NEG_INFINITY { R::ZERO } else { exp_or_zero(self.largest - whole.largest) }
    }
}

/// The softmax of four rows beside each other: blocks of four scores of each row, the scores of one row after those of another.
///
/// `background` is as in [`Running`].
#[derive(Debug, Clone, Copy)]
pub(super) struct Beside<R> {
    /// What to multiply the weighted sums by; 0 for a row without keys.
    pub factors: [R; 4],
    /// The log of the sum of the exponentials; minus infinity for a row without keys.
    pub lse: [f64; 4],
    /// What a key of the background weighs.
    pub background_weights: [R; 4],
}

impl<R: Real> Beside<R> {
    /// Replace the `blocks` blocks of dots from `data` on by weights, less that of the background. Row `i` has `lens[i]` of them;
    /// what lies behind a row's own is left as anything.
    ///
    /// # Safety
    /// The instructions of `V` are available, and `blocks` blocks of 16 numbers can be read and written at `data`.
    #[inline(always)]
    pub(super) unsafe fn weigh<V: Vector<Lane = R>>(
        data: *mut R,
        blocks: usize,
        lens: [u32; 4],
        scale: R,
        background: [usize; 4],
    ) -> Self {
        const BLOCK: usize = 16;
        // Lanes of a group of four, and the lengths of the four rows, as numbers.
        let mut order = [R::ZERO; MAX_LANES];
        for (lane, place) in order.iter_mut().enumerate() {
            *place = R::from_f64((lane % 4) as f64);
        }
        let (mut own, mut behind) = ([R::ZERO; 4], [R::ZERO; 4]);
        let mut whole_blocks = blocks;
        for row in 0..4 {
            own[row] = R::from_f64(f64::from(lens[row]));
            behind[row] = R::from_f64(background[row] as f64);
            whole_blocks = whole_blocks.min(lens[row] as usize / 4);
        }
        let has_background = background != [0; 4];
        let mut largest = [R::ZERO; 4];
        let mut sums = [R::ZERO; 4];
        let mut weights = [R::ZERO; 4];
        let rows_per_part = V::LANES / 4;
        // SAFETY: parts of blocks are whole registers; every part has a number for each of its rows.
        unsafe {
            let (nothing, zero) = (V::splat(R::NEG_INFINITY), V::splat(R::ZERO));
            let factor = V::splat(scale);
            let order = V::load(order.as_ptr());
            for part in 0..BLOCK / V::LANES {
                let data = data.add(part * V::LANES);
                let first = part * rows_per_part;
                let mut most = nothing;
                for block in 0..whole_blocks {
                    let scores = V::load(data.add(block * BLOCK)) * factor;
                    scores.store(data.add(block * BLOCK));
                    most = most.max(scores);
                }
                let len = V::spread(own.as_ptr().add(first));
                for block in whole_blocks..blocks {
                    let place = order + V::splat(R::from_f64((block * 4) as f64));
                    let scores = (V::load(data.add(block * BLOCK)) * factor).where_below(place, len, nothing);
                    scores.store(data.add(block * BLOCK));
                    most = most.max(scores);
                }
                most = most.max_of_four();
                let background = V::spread(behind.as_ptr().add(first));
                if has_background {
                    most = most.max(zero).where_below(zero, background, most);
                }
                let shift = most.where_below(nothing, most, zero);
                let light =
                    if has_background { exp(zero - shift).where_below(zero, background, zero) } else { zero };
                let mut sum = zero;
                for block in 0..blocks {
                    let place = data.add(block * BLOCK);
                    let weight = exp(V::load(place) - shift);
                    sum = sum + weight;
                    (weight - light).store(place);
                }
                let sum = background.mul_add(light, sum.sum_of_four());
                let mut lanes = [[R::ZERO; MAX_LANES]; 3];
                most.store(lanes[0].as_mut_ptr());
                sum.store(lanes[1].as_mut_ptr());
                light.store(lanes[2].as_mut_ptr());
                for i in 0..rows_per_part {
                    largest[first + i] = lanes[0][4 * i];
                    sums[first + i] = lanes[1][4 * i];
                    weights[first + i] = lanes[2][4 * i];
                }
            }
        }
        let mut rows =
            Beside { factors: [R::ZERO; 4], lse: [f64::NEG_INFINITY; 4], background_weights: weights };
        for row in 0..4 {
            if sums[row] != R::ZERO {
                rows.factors[row] = R::ONE / sums[row];
                rows.lse[row] = log_sum_exp(largest[row], sums[row]);
            }
        }
        rows
    }
}

/// The log of a sum of exponentials that is `total` relative to that of the `largest` score. As exact as both of them: a rounded sum
/// of a hundred and something would be off by more than the logarithm is.
pub(super) fn log_sum_exp<R: Real>(largest: R, total: R) -> f64 {
    largest.to_f64() + total.ln().to_f64()
}

/// [`exp`] of one number.
#[inline(always)]
pub(super) fn exp_or_zero<R: Real>(x: R) -> R {
    if x < R::EXP.smallest { R::ZERO } else { x.exp() }
}
