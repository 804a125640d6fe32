//! 512-bit registers: AVX-512 F, BW, DQ and VL, as every server since Skylake has them.

use std::arch::x86_64::*;
use std::ops::{Add, Mul, Sub};

use half::{bf16, f16};

use super::avx2::{F32x8, F64x4};
use super::{Kernel, MAX_LANES, Memory, Vector};
use crate::kernel::element::Element;

/// Run `kernel` where the compiler may use these instructions.
///
/// # Safety
/// The machine has AVX2, FMA, F16C and AVX-512 F, BW, DQ and VL, and what the kernel itself asks for.
#[inline(never)]
#[target_feature(enable = "avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl")]
pub(super) unsafe fn enter<T: Element>(kernel: impl Kernel<T>) {
    // SAFETY: the caller's promise.
    unsafe { kernel.run::<T::Avx512>() }
}

register! {
    /// Sixteen f32.
    F32x16(__m512) = 16 x f32, one of 32;
    _mm512_set1_ps, _mm512_add_ps, _mm512_sub_ps, _mm512_mul_ps, _mm512_fmadd_ps, _mm512_min_ps, _mm512_max_ps;
    {
        #[inline(always)]
        fn round(self) -> Self {
            // SAFETY: a value of this type proves that the instructions exist.
            unsafe { Self(_mm512_roundscale_ps::<{ _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC }>(self.0)) }
        }

        #[inline(always)]
        fn power_of_two(self) -> Self {
            // SAFETY: as above.
            unsafe { Self(_mm512_scalef_ps(_mm512_set1_ps(1.0), self.0)) }
        }

        #[inline(always)]
        fn or_zero_below(self, x: Self, bound: Self) -> Self {
            // SAFETY: as above.
            unsafe { Self(_mm512_maskz_mov_ps(_mm512_cmp_ps_mask::<_CMP_NLT_UQ>(x.0, bound.0), self.0)) }
        }

        #[inline(always)]
        fn where_below(self, x: Self, bound: Self, otherwise: Self) -> Self {
            // SAFETY: as above.
            unsafe {
                Self(_mm512_mask_mov_ps(otherwise.0, _mm512_cmp_ps_mask::<_CMP_LT_OQ>(x.0, bound.0), self.0))
            }
        }

        #[inline(always)]
        fn at_most(self, bound: Self) -> u32 {
            // SAFETY: as above.
            unsafe { u32::from(_mm512_cmp_ps_mask::<_CMP_LE_OQ>(self.0, bound.0)) }
        }

        #[inline(always)]
        fn sum_of_four(self) -> Self {
            // SAFETY: as above.
            unsafe {
                let two = _mm512_add_ps(self.0, _mm512_permute_ps::<0b01_00_11_10>(self.0));
                Self(_mm512_add_ps(two, _mm512_permute_ps::<0b10_11_00_01>(two)))
            }
        }

        #[inline(always)]
        fn max_of_four(self) -> Self {
            // SAFETY: as above.
            unsafe {
                let two = _mm512_max_ps(self.0, _mm512_permute_ps::<0b01_00_11_10>(self.0));
                Self(_mm512_max_ps(two, _mm512_permute_ps::<0b10_11_00_01>(two)))
            }
        }

        #[inline(always)]
        fn begin_sums([a, b, c, d]: [Self; 4]) -> Self {
            // SAFETY: as above.
            unsafe {
                let ab = _mm512_add_ps(_mm512_unpacklo_ps(a.0, b.0), _mm512_unpackhi_ps(a.0, b.0));
                let cd = _mm512_add_ps(_mm512_unpacklo_ps(c.0, d.0), _mm512_unpackhi_ps(c.0, d.0));
                Self(_mm512_add_ps(_mm512_shuffle_ps::<0x44>(ab, cd), _mm512_shuffle_ps::<0xee>(ab, cd)))
            }
        }

        #[inline(always)]
        fn finish_sums(begun: [Self; MAX_LANES / 4]) -> Self {
            // SAFETY: as above.
            unsafe {
                let [a, b, c, d] = [begun[0].0, begun[1].0, begun[2].0, begun[3].0];
                let ab = _mm512_add_ps(_mm512_shuffle_f32x4::<0x88>(a, b), _mm512_shuffle_f32x4::<0xdd>(a, b));
                let cd = _mm512_add_ps(_mm512_shuffle_f32x4::<0x88>(c, d), _mm512_shuffle_f32x4::<0xdd>(c, d));
                Self(_mm512_add_ps(_mm512_shuffle_f32x4::<0x88>(ab, cd), _mm512_shuffle_f32x4::<0xdd>(ab, cd)))
            }
        }

        #[inline(always)]
        unsafe fn spread(from: *const f32) -> Self {
            // SAFETY: the caller's promise.
            unsafe {
                let four = _mm512_castps128_ps512(_mm_loadu_ps(from));
                let groups = _mm512_set_epi32(3, 3, 3, 3, 2, 2, 2, 2, 1, 1, 1, 1, 0, 0, 0, 0);
                Self(_mm512_permutexvar_ps(groups, four))
            }
        }

        #[inline(always)]
        fn first_or(self, count: usize, filler: Self) -> Self {
            // SAFETY: as above.
            unsafe { Self(_mm512_mask_mov_ps(filler.0, ((1u32 << count) - 1) as __mmask16, self.0)) }
        }

        #[inline(always)]
        fn keep(self, bits: u32, filler: Self) -> Self {
            // SAFETY: as above.
            unsafe { Self(_mm512_mask_mov_ps(filler.0, bits as __mmask16, self.0)) }
        }

        #[inline(always)]
        fn sum(self) -> f32 {
            let [low, high] = self.halves();
            (low + high).sum()
        }

        #[inline(always)]
        fn largest(self) -> f32 {
            let [low, high] = self.halves();
            low.max(high).largest()
        }

        #[inline(always)]
        unsafe fn transpose(from: *const f32, from_stride: usize, to: *mut f32, to_stride: usize) {
            for (row, column) in [(0, 0), (0, 8), (8, 0), (8, 8)] {
                // SAFETY: four squares of eight make the square of sixteen that the caller promised.
                unsafe {
                    let (from, to) = (from.add(row * from_stride + column), to.add(column * to_stride + row));
                    F32x8::transpose(from, from_stride, to, to_stride);
                }
            }
        }
    }
}

register! {
    /// Eight f64.
    F64x8(__m512d) = 8 x f64, one of 32;
    _mm512_set1_pd, _mm512_add_pd, _mm512_sub_pd, _mm512_mul_pd, _mm512_fmadd_pd, _mm512_min_pd, _mm512_max_pd;
    {
        #[inline(always)]
        fn round(self) -> Self {
            // SAFETY: a value of this type proves that the instructions exist.
            unsafe { Self(_mm512_roundscale_pd::<{ _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC }>(self.0)) }
        }

        #[inline(always)]
        fn power_of_two(self) -> Self {
            // SAFETY: as above.
            unsafe { Self(_mm512_scalef_pd(_mm512_set1_pd(1.0), self.0)) }
        }

        #[inline(always)]
        fn or_zero_below(self, x: Self, bound: Self) -> Self {
            // SAFETY: as above.
            unsafe { Self(_mm512_maskz_mov_pd(_mm512_cmp_pd_mask::<_CMP_NLT_UQ>(x.0, bound.0), self.0)) }
        }

        #[inline(always)]
        fn where_below(self, x: Self, bound: Self, otherwise: Self) -> Self {
            // SAFETY: as above.
            unsafe {
                Self(_mm512_mask_mov_pd(otherwise.0, _mm512_cmp_pd_mask::<_CMP_LT_OQ>(x.0, bound.0), self.0))
            }
        }

        #[inline(always)]
        fn at_most(self, bound: Self) -> u32 {
            // SAFETY: as above.
            unsafe { u32::from(_mm512_cmp_pd_mask::<_CMP_LE_OQ>(self.0, bound.0)) }
        }

        #[inline(always)]
        fn sum_of_four(self) -> Self {
            // SAFETY: as above.
            unsafe {
                let two = _mm512_add_pd(self.0, _mm512_permutex_pd::<0b01_00_11_10>(self.0));
                Self(_mm512_add_pd(two, _mm512_permute_pd::<0b0101_0101>(two)))
            }
        }

        #[inline(always)]
        fn max_of_four(self) -> Self {
            // SAFETY: as above.
            unsafe {
                let two = _mm512_max_pd(self.0, _mm512_permutex_pd::<0b01_00_11_10>(self.0));
                Self(_mm512_max_pd(two, _mm512_permute_pd::<0b0101_0101>(two)))
            }
        }

        #[inline(always)]
        fn begin_sums([a, b, c, d]: [Self; 4]) -> Self {
            // SAFETY: as above.
            unsafe {
                let ab = _mm512_add_pd(_mm512_unpacklo_pd(a.0, b.0), _mm512_unpackhi_pd(a.0, b.0));
                let cd = _mm512_add_pd(_mm512_unpacklo_pd(c.0, d.0), _mm512_unpackhi_pd(c.0, d.0));
                Self(_mm512_add_pd(_mm512_shuffle_f64x2::<0x88>(ab, cd), _mm512_shuffle_f64x2::<0xdd>(ab, cd)))
            }
        }

        #[inline(always)]
        fn finish_sums(begun: [Self; MAX_LANES / 4]) -> Self {
            // SAFETY: as above.
            unsafe {
                let [a, b] = [begun[0].0, begun[1].0];
                Self(_mm512_add_pd(_mm512_shuffle_f64x2::<0x88>(a, b), _mm512_shuffle_f64x2::<0xdd>(a, b)))
            }
        }

        #[inline(always)]
        unsafe fn spread(from: *const f64) -> Self {
            // SAFETY: the caller's promise.
            unsafe {
                let two = _mm512_castpd128_pd512(_mm_loadu_pd(from));
                Self(_mm512_permutexvar_pd(_mm512_set_epi64(1, 1, 1, 1, 0, 0, 0, 0), two))
            }
        }

        #[inline(always)]
        fn first_or(self, count: usize, filler: Self) -> Self {
            // SAFETY: as above.
            unsafe { Self(_mm512_mask_mov_pd(filler.0, ((1u32 << count) - 1) as __mmask8, self.0)) }
        }

        #[inline(always)]
        fn keep(self, bits: u32, filler: Self) -> Self {
            // SAFETY: as above.
            unsafe { Self(_mm512_mask_mov_pd(filler.0, bits as __mmask8, self.0)) }
        }

        #[inline(always)]
        fn sum(self) -> f64 {
            let [low, high] = self.halves();
            (low + high).sum()
        }

        #[inline(always)]
        fn largest(self) -> f64 {
            let [low, high] = self.halves();
            low.max(high).largest()
        }

        #[inline(always)]
        unsafe fn transpose(from: *const f64, from_stride: usize, to: *mut f64, to_stride: usize) {
            for (row, column) in [(0, 0), (0, 4), (4, 0), (4, 4)] {
                // SAFETY: four squares of four make the square of eight that the caller promised.
                unsafe {
                    let (from, to) = (from.add(row * from_stride + column), to.add(column * to_stride + row));
                    F64x4::transpose(from, from_stride, to, to_stride);
                }
            }
        }
    }
}

impl F32x16 {
    #[inline(always)]
    fn halves(self) -> [F32x8; 2] {
        // SAFETY: a value of this type proves that the instructions exist.
        unsafe { [F32x8(_mm512_castps512_ps256(self.0)), F32x8(_mm512_extractf32x8_ps::<1>(self.0))] }
    }
}

impl F64x8 {
    #[inline(always)]
    fn halves(self) -> [F64x4; 2] {
        // SAFETY: a value of this type proves that the instructions exist.
        unsafe { [F64x4(_mm512_castpd512_pd256(self.0)), F64x4(_mm512_extractf64x4_pd::<1>(self.0))] }
    }
}

/// Moves that take a mask: masked lanes are not touched.
macro_rules! masked {
    ($register:ident, $type:ident, $mask:ident; $load:ident, $load_first:ident, $store:ident, $store_first:ident, $stream:ident) => {
        impl Memory<$type> for $register {
            #[inline(always)]
            unsafe fn load(from: *const $type) -> Self {
                // SAFETY: the caller's promise.
                unsafe { Self($load(from)) }
            }

            #[inline(always)]
            unsafe fn load_first(from: *const $type, count: usize) -> Self {
                debug_assert!(count < <$register as Vector>::LANES);
                // SAFETY: the mask has `count` bits.
                unsafe { Self($load_first(((1u32 << count) - 1) as $mask, from)) }
            }

            #[inline(always)]
            unsafe fn store(self, to: *mut $type) {
                // SAFETY: the caller's promise.
                unsafe { $store(to, self.0) }
            }

            #[inline(always)]
            unsafe fn store_past_caches(self, to: *mut $type) {
                // SAFETY: the caller's promise; the instruction wants a whole line.
                unsafe {
                    if to.addr().is_multiple_of(size_of::<Self>()) {
                        $stream(to, self.0)
                    } else {
                        $store(to, self.0)
                    }
                }
            }

            #[inline(always)]
            unsafe fn store_first(self, to: *mut $type, count: usize) {
                debug_assert!(count < <$register as Vector>::LANES);
                // SAFETY: the mask has `count` bits.
                unsafe { $store_first(to, ((1u32 << count) - 1) as $mask, self.0) }
            }
        }
    };
}

masked!(F32x16, f32, __mmask16; _mm512_loadu_ps, _mm512_maskz_loadu_ps, _mm512_storeu_ps, _mm512_mask_storeu_ps, _mm512_stream_ps);
masked!(F64x8, f64, __mmask8; _mm512_loadu_pd, _mm512_maskz_loadu_pd, _mm512_storeu_pd, _mm512_mask_storeu_pd, _mm512_stream_pd);

/// The 16-bit formats move sixteen at a time.
macro_rules! half {
    ($type:ident, $widen:ident, $narrow:ident) => {
        impl Memory<$type> for F32x16 {
            #[inline(always)]
            unsafe fn load(from: *const $type) -> Self {
                // SAFETY: the caller's promise.
                unsafe { $widen(_mm256_loadu_si256(from.cast())) }
            }

            #[inline(always)]
            unsafe fn load_first(from: *const $type, count: usize) -> Self {
                debug_assert!(count < 16);
                // SAFETY: the mask has `count` bits, and masked lanes are not touched.
                unsafe { $widen(_mm256_maskz_loadu_epi16(((1u32 << count) - 1) as __mmask16, from.cast())) }
            }

            #[inline(always)]
            unsafe fn store(self, to: *mut $type) {
                // SAFETY: the caller's promise.
                unsafe { _mm256_storeu_si256(to.cast(), $narrow(self)) }
            }

            #[inline(always)]
            unsafe fn store_first(self, to: *mut $type, count: usize) {
                debug_assert!(count < 16);
                // SAFETY: the mask has `count` bits, and masked lanes are not touched.
                unsafe {
                    _mm256_mask_storeu_epi16(to.cast(), ((1u32 << count) - 1) as __mmask16, $narrow(self))
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
/// AVX-512 F is available.
#[inline(always)]
unsafe fn widen_bf16(halves: __m256i) -> F32x16 {
    // SAFETY: the caller's promise.
    unsafe { F32x16(_mm512_castsi512_ps(_mm512_slli_epi32::<16>(_mm512_cvtepu16_epi32(halves)))) }
}

/// To nearest, ties to even; NaN stays NaN.
///
/// # Safety
/// AVX-512 F is available.
#[inline(always)]
unsafe fn narrow_bf16(value: F32x16) -> __m256i {
    // SAFETY: the caller's promise.
    unsafe {
        let bits = _mm512_castps_si512(value.0);
        let upper = _mm512_srli_epi32::<16>(bits);
        let odd = _mm512_and_si512(upper, _mm512_set1_epi32(1));
        let rounded =
            _mm512_srli_epi32::<16>(_mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff))));
        let quiet = _mm512_or_si512(upper, _mm512_set1_epi32(0x40));
        let is_nan = _mm512_cmp_ps_mask::<_CMP_UNORD_Q>(value.0, value.0);
        _mm512_cvtepi32_epi16(_mm512_mask_mov_epi32(rounded, is_nan, quiet))
    }
}

/// # Safety
/// AVX-512 F is available.
#[inline(always)]
unsafe fn widen_f16(halves: __m256i) -> F32x16 {
    // SAFETY: the caller's promise.
    unsafe { F32x16(_mm512_cvtph_ps(halves)) }
}

/// # Safety
/// AVX-512 F is available.
#[inline(always)]
unsafe fn narrow_f16(value: F32x16) -> __m256i {
    // SAFETY: the caller's promise.
    unsafe { _mm512_cvtps_ph::<_MM_FROUND_TO_NEAREST_INT>(value.0) }
}
