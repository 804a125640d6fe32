//! What tensors may hold, and what is computed with.

use std::fmt::{Debug, Display};
use std::ops::{Add, AddAssign, Div, Mul, MulAssign, Neg, Sub};

use half::{bf16, f16};

use super::simd::{Memory, Vector, scalar};
#[cfg(target_arch = "x86_64")]
use super::simd::{avx2, avx512};
use super::softmax::Exp;

/// A tensor's data type. Loaded into, summed in and rounded once from `Acc`.
pub trait Element: Copy + Send + Sync + Debug + 'static {
    /// f64 for f64, else f32.
    type Acc: Real;
    /// How errors and benches call it.
    const NAME: &'static str;
    /// Whether this type is `bf16`, which some machines multiply in pairs.
    const IS_BF16: bool;
    /// Exact.
    fn to_acc(self) -> Self::Acc;
    /// Rounded to nearest, ties to even.
    fn from_acc(value: Self::Acc) -> Self;

    /// The register that instruction set `scalar` computes with.
    type Scalar: Vector<Lane = Self::Acc> + Memory<Self>;
    /// The register that instruction set `avx2` computes with.
    #[cfg(target_arch = "x86_64")]
    type Avx2: Vector<Lane = Self::Acc> + Memory<Self>;
    /// The register that instruction set `avx512` computes with.
    #[cfg(target_arch = "x86_64")]
    type Avx512: Vector<Lane = Self::Acc> + Memory<Self>;
}

/// The arithmetic of one lane: f32 or f64.
pub trait Real:
    Element<Acc = Self>
    + PartialOrd
    + Display
    + Add<Output = Self>
    + AddAssign
    + Sub<Output = Self>
    + Mul<Output = Self>
    + MulAssign
    + Div<Output = Self>
    + Neg<Output = Self>
{
    /// 0
    const ZERO: Self;
    /// 1
    const ONE: Self;
    /// Minus infinity
    const NEG_INFINITY: Self;
    /// Constants of the exponential function.
    const EXP: Exp<Self>;
    /// Rounded to nearest.
    fn from_f64(value: f64) -> Self;
    /// Exact.
    fn to_f64(self) -> f64;
    /// Natural logarithm.
    fn ln(self) -> Self;
    /// `e^self`
    fn exp(self) -> Self;
    /// The nearest integer.
    fn round(self) -> Self;
    /// `2^self` for a whole number whose power is a normal number.
    fn power_of_two(self) -> Self;
    /// A number and a key as one whole number.
    type Place: Copy + Ord + Debug + Send;
    /// Lower for the higher number. Zeros of either sign are equal, and NaN is before all: what is attended to may be NaN, and then
    /// must show.
    fn place(self) -> Self::Place;
    /// A place among those of the same number: the lower key comes first.
    fn with_key(place: Self::Place, key: u32) -> Self::Place;
    /// A number equal to that of a place, and its key.
    fn placed(place: Self::Place) -> (Self, u32);
}

macro_rules! real {
    ($type:ident, $bits:ident, $place:ident, $exp:expr, $scalar:ty, $avx2:ty, $avx512:ty) => {
        impl Element for $type {
            type Acc = $type;
            const NAME: &'static str = stringify!($type);
            const IS_BF16: bool = false;
            #[inline(always)]
            fn to_acc(self) -> $type {
                self
            }
            #[inline(always)]
            fn from_acc(value: $type) -> $type {
                value
            }
            type Scalar = $scalar;
            #[cfg(target_arch = "x86_64")]
            type Avx2 = $avx2;
            #[cfg(target_arch = "x86_64")]
            type Avx512 = $avx512;
        }

        impl Real for $type {
            const ZERO: Self = 0.0;
            const ONE: Self = 1.0;
            const NEG_INFINITY: Self = $type::NEG_INFINITY;
            const EXP: Exp<Self> = $exp;
            #[inline(always)]
            fn from_f64(value: f64) -> Self {
                value as $type
            }
            #[inline(always)]
            fn to_f64(self) -> f64 {
                f64::from(self)
            }
            #[inline(always)]
            fn ln(self) -> Self {
                $type::ln(self)
            }
            #[inline(always)]
            fn exp(self) -> Self {
                $type::exp(self)
            }
            #[inline(always)]
            fn round(self) -> Self {
                // Adding and removing 1.5 * 2^mantissa rounds to nearest without a call into the C library.
                const MAGIC: $type = 1.5 * (1u64 << ($type::MANTISSA_DIGITS - 1)) as $type;
                (self + MAGIC) - MAGIC
            }
            #[inline(always)]
            fn power_of_two(self) -> Self {
                // The sum's low bits hold the whole number, which the shift moves into the exponent.
                const MAGIC: $type = 1.5 * (1u64 << ($type::MANTISSA_DIGITS - 1)) as $type;
                let exponent = (self + MAGIC).to_bits() << ($type::MANTISSA_DIGITS - 1);
                <$type>::from_bits(exponent.wrapping_add((1.0 as $type).to_bits()))
            }
            type Place = $place;
            #[inline(always)]
            fn place(self) -> $place {
                // Adding zero makes -0 positive. The bits of negative numbers are lower for the higher one as they are.
                let bits = (self + 0.0).to_bits();
                let negative = (0 as $bits).wrapping_sub(bits >> ($bits::BITS - 1));
                let order = bits ^ (!negative >> 1);
                let order = order * $bits::from(!self.is_nan());
                <$place>::from(order) << u32::BITS
            }
            #[inline(always)]
            fn with_key(place: $place, key: u32) -> $place {
                place | <$place>::from(key)
            }
            #[inline(always)]
            fn placed(place: $place) -> (Self, u32) {
                let order = (place >> u32::BITS) as $bits;
                let negative = (0 as $bits).wrapping_sub(order >> ($bits::BITS - 1));
                let bits = order ^ (!negative >> 1);
                (<$type>::from_bits(bits), place as u32)
            }
        }
    };
}

real!(f32, u32, u64, Exp::F32, scalar::Portable<f32, 4>, avx2::F32x8, avx512::F32x16);
real!(f64, u64, u128, Exp::F64, scalar::Portable<f64, 4>, avx2::F64x4, avx512::F64x8);

macro_rules! half {
    ($type:ident, $is_bf16:literal) => {
        impl Element for $type {
            type Acc = f32;
            const NAME: &'static str = stringify!($type);
            const IS_BF16: bool = $is_bf16;
            #[inline(always)]
            fn to_acc(self) -> f32 {
                self.to_f32()
            }
            #[inline(always)]
            fn from_acc(value: f32) -> Self {
                $type::from_f32(value)
            }
            type Scalar = scalar::Portable<f32, 4>;
            #[cfg(target_arch = "x86_64")]
            type Avx2 = avx2::F32x8;
            #[cfg(target_arch = "x86_64")]
            type Avx512 = avx512::F32x16;
        }
    };
}

half!(bf16, true);
half!(f16, false);
