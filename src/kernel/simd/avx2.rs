//! 256-bit registers: AVX2, FMA and F16C.

use std::arch::x86_64::*;
use std::ops::{Add, Mul, Sub};

use half::{bf16, f16};

use super::{Kernel, MAX_LANES, Memory, Vector};
use crate::kernel::element::Element;

/// Run `kernel` where the compiler may use these instructions.
///
/// # Safety
/// The machine has AVX2, FMA and F16C, and what the kernel itself asks for.
#[inline(never)]
#[target_feature(enable = "avx2,fma,f16c")]
pub(super) unsafe fn enter<T: Element>(kernel: impl Kernel<T>) {
    // SAFETY: the caller's promise.
    unsafe { kernel.run::<T::Avx2>() }
}

register! {
    /// Eight f32.
    F32x8(__m256) = 8 x f32, one of 16;
    _mm256_set1_ps, _mm256_add_ps, _mm256_sub_ps, _mm256_mul_ps, _mm256_fmadd_ps, _mm256_min_ps, _mm256_max_ps;
    {
        #[inline(always)]
        fn round(self) -> Self {
            // SAFETY: a value of this type proves that the instructions exist.
            unsafe { Self(_mm256_round_ps::<{ _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC }>(self.0)) }
        }

        #[inline(always)]
        fn power_of_two(self) -> Self {
            // SAFETY: as above.
            unsafe {
                let exponent = _mm256_slli_epi32::<23>(_mm256_cvtps_epi32(self.0));
                Self(_mm256_castsi256_ps(_mm256_add_epi32(exponent, _mm256_castps_si256(_mm256_set1_ps(1.0)))))
            }
        }

        #[inline(always)]
        fn or_zero_below(self, x: Self, bound: Self) -> Self {
            // SAFETY: as above.
            unsafe { Self(_mm256_andnot_ps(_mm256_cmp_ps::<_CMP_LT_OQ>(x.0, bound.0), self.0)) }
        }

        #[inline(always)]
        fn where_below(self, x: Self, bound: Self, otherwise: Self) -> Self {
            // SAFETY: as above.
            unsafe { Self(_mm256_blendv_ps(otherwise.0, self.0, _mm256_cmp_ps::<_CMP_LT_OQ>(x.0, bound.0))) }
        }

        #[inline(always)]
        fn at_most(self, bound: Self) -> u32 {
            // SAFETY: as above.
            unsafe { _mm256_movemask_ps(_mm256_cmp_ps::<_CMP_LE_OQ>(self.0, bound.0)) as u32 }
        }

        #[inline(always)]
        fn sum_of_four(self) -> Self {
            // SAFETY: as above.
            unsafe {
                let two = _mm256_add_ps(self.0, _mm256_permute_ps::<0b01_00_11_10>(self.0));
                Self(_mm256_add_ps(two, _mm256_permute_ps::<0b10_11_00_01>(two)))
            }
        }

        #[inline(always)]
        fn max_of_four(self) -> Self {
            // SAFETY: as above.
            unsafe {
                let two = _mm256_max_ps(self.0, _mm256_permute_ps::<0b01_00_11_10>(self.0));
                Self(_mm256_max_ps(two, _mm256_permute_ps::<0b10_11_00_01>(two)))
            }
        }

        #[inline(always)]
        fn begin_sums([a, b, c, d]: [Self; 4]) -> Self {
            // SAFETY: as above.
            unsafe {
                let ab = _mm256_add_ps(_mm256_unpacklo_ps(a.0, b.0), _mm256_unpackhi_ps(a.0, b.0));
                let cd = _mm256_add_ps(_mm256_unpacklo_ps(c.0, d.0), _mm256_unpackhi_ps(c.0, d.0));
                Self(_mm256_add_ps(_mm256_shuffle_ps::<0x44>(ab, cd), _mm256_shuffle_ps::<0xee>(ab, cd)))
            }
        }

        #[inline(always)]
        fn finish_sums(begun: [Self; MAX_LANES / 4]) -> Self {
            // SAFETY: as above.
            unsafe {
                let [a, b] = [begun[0].0, begun[1].0];
                Self(_mm256_add_ps(_mm256_permute2f128_ps::<0x20>(a, b), _mm256_permute2f128_ps::<0x31>(a, b)))
            }
        }

        #[inline(always)]
        unsafe fn spread(from: *const f32) -> Self {
            // SAFETY: the caller's promise.
            unsafe { Self(_mm256_set_m128(_mm_set1_ps(*from.add(1)), _mm_set1_ps(*from))) }
        }

        #[inline(always)]
        fn first_or(self, count: usize, filler: Self) -> Self {
            // SAFETY: as above.
            unsafe { Self(_mm256_blendv_ps(filler.0, self.0, _mm256_castsi256_ps(first_mask(count)))) }
        }

        #[inline(always)]
        fn keep(self, bits: u32, filler: Self) -> Self {
            // SAFETY: as above.
            unsafe {
                let lanes = _mm256_setr_epi32(1, 2, 4, 8, 16, 32, 64, 128);
                let kept = _mm256_and_si256(_mm256_set1_epi32(bits as _), lanes);
                Self(_mm256_blendv_ps(filler.0, self.0, _mm256_castsi256_ps(_mm256_cmpeq_epi32(kept, lanes))))
            }
        }

        #[inline(always)]
        fn sum(self) -> f32 {
            // SAFETY: as above.
            unsafe {
                let four = _mm_add_ps(_mm256_castps256_ps128(self.0), _mm256_extractf128_ps::<1>(self.0));
                let two = _mm_add_ps(four, _mm_movehl_ps(four, four));
                _mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two)))
            }
        }

        #[inline(always)]
        fn largest(self) -> f32 {
            // SAFETY: as above.
            unsafe {
                let four = _mm_max_ps(_mm256_castps256_ps128(self.0), _mm256_extractf128_ps::<1>(self.0));
                let two = _mm_max_ps(four, _mm_movehl_ps(four, four));
                _mm_cvtss_f32(_mm_max_ss(two, _mm_movehdup_ps(two)))
            }
        }

        #[inline(always)]
        unsafe fn transpose(from: *const f32, from_stride: usize, to: *mut f32, to_stride: usize) {
            // SAFETY: the caller promises the instructions and both squares.
            unsafe {
                let zero = _mm256_setzero_ps();
                let mut pairs = [zero; 8];
                for i in 0..4 {
                    let (a, b) = (_mm256_loadu_ps(from.add(2 * i * from_stride)), _mm256_loadu_ps(from.add((2 * i + 1) * from_stride)));
                    pairs[2 * i] = _mm256_unpacklo_ps(a, b);
                    pairs[2 * i + 1] = _mm256_unpackhi_ps(a, b);
                }
                let mut quads = [zero; 8];
                for half in 0..2 {
                    let [a, b, c, d] = [pairs[4 * half], pairs[4 * half + 1], pairs[4 * half + 2], pairs[4 * half + 3]];
                    quads[4 * half] = _mm256_shuffle_ps::<0x44>(a, c);
                    quads[4 * half + 1] = _mm256_shuffle_ps::<0xee>(a, c);
                    quads[4 * half + 2] = _mm256_shuffle_ps::<0x44>(b, d);
                    quads[4 * half + 3] = _mm256_shuffle_ps::<0xee>(b, d);
                }
                for i in 0..4 {
                    _mm256_storeu_ps(to.add(i * to_stride), _mm256_permute2f128_ps::<0x20>(quads[i], quads[i + 4]));
                    _mm256_storeu_ps(to.add((i + 4) * to_stride), _mm256_permute2f128_ps::<0x31>(quads[i], quads[i + 4]));
                }
            }
        }
    }
}

register! {
    /// Four f64.
    F64x4(__m256d) = 4 x f64, one of 16;
    _mm256_set1_pd, _mm256_add_pd, _mm256_sub_pd, _mm256_mul_pd, _mm256_fmadd_pd, _mm256_min_pd, _mm256_max_pd;
    {
        #[inline(always)]
        fn round(self) -> Self {
            // SAFETY: a value of this type proves that the instructions exist.
            unsafe { Self(_mm256_round_pd::<{ _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC }>(self.0)) }
        }

        #[inline(always)]
        fn power_of_two(self) -> Self {
            // The sum's low bits hold the whole number: there is no conversion to 64-bit integers.
            const MAGIC: f64 = (3u64 << 51) as f64;
            // SAFETY: as above.
            unsafe {
                let whole = _mm256_castpd_si256(_mm256_add_pd(self.0, _mm256_set1_pd(MAGIC)));
                let exponent = _mm256_slli_epi64::<52>(whole);
                Self(_mm256_castsi256_pd(_mm256_add_epi64(exponent, _mm256_castpd_si256(_mm256_set1_pd(1.0)))))
            }
        }

        #[inline(always)]
        fn or_zero_below(self, x: Self, bound: Self) -> Self {
            // SAFETY: as above.
            unsafe { Self(_mm256_andnot_pd(_mm256_cmp_pd::<_CMP_LT_OQ>(x.0, bound.0), self.0)) }
        }

        #[inline(always)]
        fn where_below(self, x: Self, bound: Self, otherwise: Self) -> Self {
            // SAFETY: as above.
            unsafe { Self(_mm256_blendv_pd(otherwise.0, self.0, _mm256_cmp_pd::<_CMP_LT_OQ>(x.0, bound.0))) }
        }

        #[inline(always)]
        fn at_most(self, bound: Self) -> u32 {
            // SAFETY: as above.
            unsafe { _mm256_movemask_pd(_mm256_cmp_pd::<_CMP_LE_OQ>(self.0, bound.0)) as u32 }
        }

        #[inline(always)]
        fn sum_of_four(self) -> Self {
            // SAFETY: as above.
            unsafe {
                let two = _mm256_add_pd(self.0, _mm256_permute4x64_pd::<0b01_00_11_10>(self.0));
                Self(_mm256_add_pd(two, _mm256_permute_pd::<0b0101>(two)))
            }
        }

        #[inline(always)]
        fn max_of_four(self) -> Self {
            // SAFETY: as above.
            unsafe {
                let two = _mm256_max_pd(self.0, _mm256_permute4x64_pd::<0b01_00_11_10>(self.0));
                Self(_mm256_max_pd(two, _mm256_permute_pd::<0b0101>(two)))
            }
        }

        #[inline(always)]
        fn begin_sums([a, b, c, d]: [Self; 4]) -> Self {
            // SAFETY: as above.
            unsafe {
                let ab = _mm256_add_pd(_mm256_unpacklo_pd(a.0, b.0), _mm256_unpackhi_pd(a.0, b.0));
                let cd = _mm256_add_pd(_mm256_unpacklo_pd(c.0, d.0), _mm256_unpackhi_pd(c.0, d.0));
                Self(_mm256_add_pd(_mm256_permute2f128_pd::<0x20>(ab, cd), _mm256_permute2f128_pd::<0x31>(ab, cd)))
            }
        }

        #[inline(always)]
        fn finish_sums(begun: [Self; MAX_LANES / 4]) -> Self {
            begun[0]
        }

        #[inline(always)]
        unsafe fn spread(from: *const f64) -> Self {
            // SAFETY: the caller's promise.
            unsafe { Self(_mm256_set1_pd(*from)) }
        }

        #[inline(always)]
        fn first_or(self, count: usize, filler: Self) -> Self {
            // SAFETY: as above.
            unsafe { Self(_mm256_blendv_pd(filler.0, self.0, _mm256_castsi256_pd(first_mask(2 * count)))) }
        }

        #[inline(always)]
        fn keep(self, bits: u32, filler: Self) -> Self {
            // SAFETY: as above.
            unsafe {
                let lanes = _mm256_setr_epi64x(1, 2, 4, 8);
                let kept = _mm256_and_si256(_mm256_set1_epi64x(bits as _), lanes);
                Self(_mm256_blendv_pd(filler.0, self.0, _mm256_castsi256_pd(_mm256_cmpeq_epi64(kept, lanes))))
            }
        }

        #[inline(always)]
        fn sum(self) -> f64 {
            // SAFETY: as above.
            unsafe {
                let two = _mm_add_pd(_mm256_castpd256_pd128(self.0), _mm256_extractf128_pd::<1>(self.0));
                _mm_cvtsd_f64(_mm_add_sd(two, _mm_unpackhi_pd(two, two)))
            }
        }

        #[inline(always)]
        fn largest(self) -> f64 {
            // SAFETY: as above.
            unsafe {
                let two = _mm_max_pd(_mm256_castpd256_pd128(self.0), _mm256_extractf128_pd::<1>(self.0));
                _mm_cvtsd_f64(_mm_max_sd(two, _mm_unpackhi_pd(two, two)))
            }
        }

        #[inline(always)]
        unsafe fn transpose(from: *const f64, from_stride: usize, to: *mut f64, to_stride: usize) {
            // SAFETY: the caller promises the instructions and both squares.
            unsafe {
                let (a, b) = (_mm256_loadu_pd(from), _mm256_loadu_pd(from.add(from_stride)));
                let (c, d) = (_mm256_loadu_pd(from.add(2 * from_stride)), _mm256_loadu_pd(from.add(3 * from_stride)));
                let (ab, ab_odd) = (_mm256_unpacklo_pd(a, b), _mm256_unpackhi_pd(a, b));
                let (cd, cd_odd) = (_mm256_unpacklo_pd(c, d), _mm256_unpackhi_pd(c, d));
                _mm256_storeu_pd(to, _mm256_permute2f128_pd::<0x20>(ab, cd));
                _mm256_storeu_pd(to.add(to_stride), _mm256_permute2f128_pd::<0x20>(ab_odd, cd_odd));
                _mm256_storeu_pd(to.add(2 * to_stride), _mm256_permute2f128_pd::<0x31>(ab, cd));
                _mm256_storeu_pd(to.add(3 * to_stride), _mm256_permute2f128_pd::<0x31>(ab_odd, cd_odd));
            }
        }
    }
}

/// The first `count <= 8` words set.
///
/// # Safety
/// AVX2 is available.
#[inline(always)]
unsafe fn first_mask(count: usize) -> __m256i {
    static FIRST: [i32; 16] = [-1, -1, -1, -1, -1, -1, -1, -1, 0, 0, 0, 0, 0, 0, 0, 0];
    assert!(count <= 8);
    // SAFETY: the window lies in the table.
    unsafe { _mm256_loadu_si256(FIRST.as_ptr().add(8 - count).cast()) }
}

impl Memory<f32> for F32x8 {
    #[inline(always)]
    unsafe fn load(from: *const f32) -> Self {
        // SAFETY: the caller's promise.
        unsafe { Self(_mm256_loadu_ps(from)) }
    }

    #[inline(always)]
    unsafe fn load_first(from: *const f32, count: usize) -> Self {
        // SAFETY: the caller's promise; masked lanes are not touched.
        unsafe { Self(_mm256_maskload_ps(from, first_mask(count))) }
    }

    #[inline(always)]
    unsafe fn store(self, to: *mut f32) {
        // SAFETY: the caller's promise.
        unsafe { _mm256_storeu_ps(to, self.0) }
    }

    #[inline(always)]
    unsafe fn store_first(self, to: *mut f32, count: usize) {
        // SAFETY: as in `load_first`.
        unsafe { _mm256_maskstore_ps(to, first_mask(count), self.0) }
    }
}

impl Memory<f64> for F64x4 {
    #[inline(always)]
    unsafe fn load(from: *const f64) -> Self {
        // SAFETY: the caller's promise.
        unsafe { Self(_mm256_loadu_pd(from)) }
    }

    #[inline(always)]
    unsafe fn load_first(from: *const f64, count: usize) -> Self {
        // SAFETY: the caller's promise; masked lanes are not touched.
        unsafe { Self(_mm256_maskload_pd(from, first_mask(2 * count))) }
    }

    #[inline(always)]
    unsafe fn store(self, to: *mut f64) {
        // SAFETY: the caller's promise.
        unsafe { _mm256_storeu_pd(to, self.0) }
    }

    #[inline(always)]
    unsafe fn store_first(self, to: *mut f64, count: usize) {
        // SAFETY: as in `load_first`.
        unsafe { _mm256_maskstore_pd(to, first_mask(2 * count), self.0) }
    }
}

/// The 16-bit formats move eight at a time; there is no masked 16-bit move, so a partial one goes through an array.
macro_rules! half {
    ($type:ident, $widen:ident, $narrow:ident) => {
        impl Memory<$type> for F32x8 {
            #[inline(always)]
            unsafe fn load(from: *const $type) -> Self {
                // SAFETY: the caller's promise.
                unsafe { $widen(_mm_loadu_si128(from.cast())) }
            }

            #[inline(always)]
            unsafe fn load_first(from: *const $type, count: usize) -> Self {
                let mut lanes = [$type::ZERO; 8];
                // SAFETY: the caller promised `count < 8` elements.
                unsafe {
                    std::ptr::copy_nonoverlapping(from, lanes.as_mut_ptr(), count);
                    <Self as Memory<$type>>::load(lanes.as_ptr())
                }
            }

            #[inline(always)]
            unsafe fn store(self, to: *mut $type) {
                // SAFETY: the caller's promise.
                unsafe { _mm_storeu_si128(to.cast(), $narrow(self)) }
            }

            #[inline(always)]
            unsafe fn store_first(self, to: *mut $type, count: usize) {
                let mut lanes = [$type::ZERO; 8];
                // SAFETY: the caller promised room for `count < 8` elements.
                unsafe {
                    <Self as Memory<$type>>::store(self, lanes.as_mut_ptr());
                    std::ptr::copy_nonoverlapping(lanes.as_ptr(), to, count);
                }
            }
        }
    };
}

half!(bf16, widen_bf16, narrow_bf16);
half!(f16, widen_f16, narrow_f16);

/// bf16 is the upper half of an f32.
///
/// # Safety
/// AVX2 is available.
#[inline(always)]
unsafe fn widen_bf16(halves: __m128i) -> F32x8 {
    // SAFETY: the caller's promise.
    unsafe { F32x8(_mm256_castsi256_ps(_mm256_slli_epi32::<16>(_mm256_cvtepu16_epi32(halves)))) }
}

/// To nearest, ties to even; NaN stays NaN.
///
/// # Safety
/// AVX2 is available.
#[inline(always)]
unsafe fn narrow_bf16(value: F32x8) -> __m128i {
    // SAFETY: the caller's promise.
    unsafe {
        let bits = _mm256_castps_si256(value.0);
        let upper = _mm256_srli_epi32::<16>(bits);
        let odd = _mm256_and_si256(upper, _mm256_set1_epi32(1));
        let rounded =
            _mm256_srli_epi32::<16>(_mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff))));
        let quiet = _mm256_or_si256(upper, _mm256_set1_epi32(0x40));
        let is_nan = _mm256_castps_si256(_mm256_cmp_ps::<_CMP_UNORD_Q>(value.0, value.0));
        let words = _mm256_blendv_epi8(rounded, quiet, is_nan);
        let packed = _mm256_packus_epi32(words, words);
        _mm256_castsi256_si128(_mm256_permute4x64_epi64::<0b00_00_10_00>(packed))
    }
}

/// # Safety
/// F16C is available.
#[inline(always)]
unsafe fn widen_f16(halves: __m128i) -> F32x8 {
    // SAFETY: the caller's promise.
    unsafe { F32x8(_mm256_cvtph_ps(halves)) }
}

/// # Safety
/// F16C is available.
#[inline(always)]
unsafe fn narrow_f16(value: F32x8) -> __m128i {
    // SAFETY: the caller's promise.
    unsafe { _mm256_cvtps_ph::<_MM_FROUND_TO_NEAREST_INT>(value.0) }
}
