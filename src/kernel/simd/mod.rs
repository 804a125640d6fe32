//! Vectors: a few operations on registers of each instruction set, and the choice between sets at run time.
//!
//! Kernels are written once over [`Vector`]. They are `#[inline(always)]` down to the last operation, so that everything is
//! compiled inside one of the `enter` functions, the only ones with `#[target_feature]`. An operation that is not inlined would
//! lose the feature; that is why kernels do not hide vector code in closures given to iterators.

#[cfg(target_arch = "x86_64")]
#[macro_use]
mod x86;
#[cfg(target_arch = "x86_64")]
pub mod avx2;
#[cfg(target_arch = "x86_64")]
pub mod avx512;
#[cfg(target_arch = "x86_64")]
pub mod pairs;
pub mod scalar;

use std::ops::{Add, Mul, Sub};
use std::sync::OnceLock;

use super::element::{Element, Real};
use crate::error::{Error, Result, unknown_name};

/// The most lanes of any register.
pub const MAX_LANES: usize = 16;

/// Order what was stored past the caches before whatever is stored later.
#[inline(always)]
pub fn fence() {
    #[cfg(target_arch = "x86_64")]
    // SAFETY: every machine of this architecture has the instruction.
    unsafe {
        std::arch::x86_64::_mm_sfence();
    }
}

/// A register of `LANES` numbers, in groups of four.
///
/// A value proves that the instructions exist: whatever makes one is unsafe, whatever uses one is not.
pub trait Vector:
    Copy + Add<Output = Self> + Sub<Output = Self> + Mul<Output = Self> + Memory<<Self as Vector>::Lane>
{
    /// One number.
    type Lane: Real;
    /// Numbers per register: a multiple of 4, at most [`MAX_LANES`].
    const LANES: usize;
    /// Registers that the set has.
    const REGISTERS: usize;

    /// `value` in every lane.
    ///
    /// # Safety
    /// The instructions of `Self` are available.
    unsafe fn splat(value: Self::Lane) -> Self;

    /// `self * factor + addend`, rounded once where the set has such an instruction.
    fn mul_add(self, factor: Self, addend: Self) -> Self;
    /// The smaller number; `other` where either is NaN.
    fn min(self, other: Self) -> Self;
    /// The larger number; `other` where either is NaN.
    fn max(self, other: Self) -> Self;
    /// The nearest whole number.
    fn round(self) -> Self;
    /// `2^self` for whole numbers whose power is a normal number.
    fn power_of_two(self) -> Self;
    /// `self`, but 0 in lanes where `x < bound`.
    fn or_zero_below(self, x: Self, bound: Self) -> Self;
    /// `self` in lanes where `x < bound`, else `otherwise`.
    fn where_below(self, x: Self, bound: Self, otherwise: Self) -> Self;
    /// A bit per lane: whether `self <= bound`, which NaN never is.
    fn at_most(self, bound: Self) -> u32;
    /// The first `count <= LANES` lanes of `self`, the others of `filler`.
    fn first_or(self, count: usize, filler: Self) -> Self;
    /// The lanes of `self` whose bit is set in `bits`, the others of `filler`.
    fn keep(self, bits: u32, filler: Self) -> Self;
    /// Sum of the lanes.
    fn sum(self) -> Self::Lane;
    /// The largest lane; NaN may or may not be noticed.
    fn largest(self) -> Self::Lane;
    /// In every lane, the sum of the lanes of its group of four.
    fn sum_of_four(self) -> Self;
    /// In every lane, the largest lane of its group of four; NaN may or may not be noticed.
    fn max_of_four(self) -> Self;
    /// What [`Self::finish_sums`] makes the sums of these registers from.
    fn begin_sums(registers: [Self; 4]) -> Self;
    /// Lane `4 g + i` is the sum of register `i` of those that `begun[g]` was made from; those beyond `LANES / 4` do not count.
    fn finish_sums(begun: [Self; MAX_LANES / 4]) -> Self;

    /// Lane `i` is the sum of `registers[i]`; those beyond `LANES` do not count.
    #[inline(always)]
    fn sum_each(registers: &[Self; MAX_LANES]) -> Self {
        let [a, b, c, d, e, f, g, h, i, j, k, l, m, n, o, p] = *registers;
        let first = Self::begin_sums([a, b, c, d]);
        let second = if Self::LANES >= 8 { Self::begin_sums([e, f, g, h]) } else { first };
        let (third, fourth) = if Self::LANES == 16 {
            (Self::begin_sums([i, j, k, l]), Self::begin_sums([m, n, o, p]))
        } else {
            (first, first)
        };
        Self::finish_sums([first, second, third, fourth])
    }
    /// The sums of four registers, written to `out`: the same numbers as those of [`Self::sum_each`], bit for bit, so that it does
    /// not matter where an edge's dot product is computed.
    #[inline(always)]
    fn sums([a, b, c, d]: [Self; 4], out: &mut [Self::Lane; 4]) {
        // SAFETY: values of this type prove that the instructions exist; four numbers fit into `out`.
        unsafe {
            let mut registers = [Self::splat(Self::Lane::ZERO); MAX_LANES];
            (registers[0], registers[1], registers[2], registers[3]) = (a, b, c, d);
            let sums = Self::sum_each(&registers);
            if Self::LANES == 4 {
                sums.store(out.as_mut_ptr())
            } else {
                sums.store_first(out.as_mut_ptr(), 4)
            }
        }
    }

    /// `LANES / 4` numbers from `from`, each in a group of four lanes.
    ///
    /// # Safety
    /// The instructions of `Self` are available and `LANES / 4` numbers can be read at `from`.
    unsafe fn spread(from: *const Self::Lane) -> Self;

    /// Run `kernel` in a function of its own. For code that many places share: inlined into each it would be compiled for each.
    ///
    /// # Safety
    /// The instructions of `Self` are available, and what the kernel itself asks for.
    unsafe fn outline<T: Element>(kernel: impl Kernel<T>);

    /// Copy a square of `LANES` x `LANES` numbers, turning rows into columns.
    ///
    /// # Safety
    /// - The instructions of `Self` are available;
    /// - rows of `LANES` numbers can be read at every multiple of `from_stride` from `from`, and written likewise at `to`.
    unsafe fn transpose(from: *const Self::Lane, from_stride: usize, to: *mut Self::Lane, to_stride: usize);
}

/// Moves between a register and elements of type `T` in memory. Never touches an element beyond those named.
pub trait Memory<T>: Copy {
    /// A whole register from `from`.
    ///
    /// # Safety
    /// The instructions of `Self` are available and `LANES` elements can be read at `from`.
    unsafe fn load(from: *const T) -> Self;

    /// The first `count < LANES` lanes from `from`, zeros in the others.
    ///
    /// # Safety
    /// The instructions of `Self` are available and `count` elements can be read at `from`.
    unsafe fn load_first(from: *const T, count: usize) -> Self;

    /// The whole register to `to`, rounded to `T`.
    ///
    /// # Safety
    /// `LANES` elements can be written at `to`.
    unsafe fn store(self, to: *mut T);

    /// [`Self::store`], past the caches where that is possible.
    ///
    /// # Safety
    /// As there; [`fence`] comes before another thread reads.
    #[inline(always)]
    unsafe fn store_past_caches(self, to: *mut T) {
        // SAFETY: the caller's promise.
        unsafe { self.store(to) }
    }

    /// The first `count < LANES` lanes to `to`, rounded to `T`.
    ///
    /// # Safety
    /// `count` elements can be written at `to`.
    unsafe fn store_first(self, to: *mut T, count: usize);
}

/// Code that can run on any instruction set.
pub trait Kernel<T: Element> {
    /// Must be `#[inline(always)]`.
    ///
    /// # Safety
    /// The instructions of `V` are available, and whatever the kernel itself asks for.
    unsafe fn run<V: Vector<Lane = T::Acc> + Memory<T>>(self);
}

/// An instruction set that kernels are compiled for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Isa {
    /// Whatever every machine of this architecture has.
    Scalar,
    /// AVX2, FMA and F16C.
    Avx2,
    /// AVX-512 F, BW, DQ and VL.
    Avx512,
    /// That, and products of bfloat16: AVX-512 BF16.
    Avx512Bf16,
    /// That, and the matrix unit: AMX TILE and BF16.
    Amx,
}

impl Isa {
    /// From the most portable to the fastest.
    const ALL: [Isa; 5] = [Isa::Scalar, Isa::Avx2, Isa::Avx512, Isa::Avx512Bf16, Isa::Amx];

    /// Name in `SPARSE_MHSA_SIMD`.
    pub fn name(self) -> &'static str {
        match self {
            Isa::Scalar => "scalar",
            Isa::Avx2 => "avx2",
            Isa::Avx512 => "avx512",
            Isa::Avx512Bf16 => "avx512bf16",
            Isa::Amx => "amx",
        }
    }

    /// Whether this machine has it.
    pub fn is_available(self) -> bool {
        match self {
            Isa::Scalar => true,
            #[cfg(target_arch = "x86_64")]
            Isa::Avx2 => {
                is_x86_feature_detected!("avx2")
                    && is_x86_feature_detected!("fma")
                    && is_x86_feature_detected!("f16c")
            }
            #[cfg(target_arch = "x86_64")]
            Isa::Avx512 => {
                Isa::Avx2.is_available()
                    && is_x86_feature_detected!("avx512f")
                    && is_x86_feature_detected!("avx512bw")
                    && is_x86_feature_detected!("avx512dq")
                    && is_x86_feature_detected!("avx512vl")
            }
            #[cfg(target_arch = "x86_64")]
            Isa::Avx512Bf16 => Isa::Avx512.is_available() && pairs::Pairs::Dots.is_available(),
            #[cfg(target_arch = "x86_64")]
            Isa::Amx => Isa::Avx512.is_available() && pairs::Pairs::Tiles.is_available(),
            #[cfg(not(target_arch = "x86_64"))]
            _ => false,
        }
    }

    /// Whether it is faster than those before it, where it is available.
    fn is_worthwhile(self) -> bool {
        match self {
            #[cfg(target_arch = "x86_64")]
            Isa::Avx512Bf16 => pairs::doubles_products(),
            _ => true,
        }
    }

    /// The sets of this machine, the most portable first.
    pub fn available() -> Vec<Isa> {
        Isa::ALL.into_iter().filter(|isa| isa.is_available()).collect()
    }

    /// The set named by the environment variable `SPARSE_MHSA_SIMD`, else the fastest. Looked up once per process.
    ///
    /// # Errors
    /// [`Error::Value`] when the variable names no set, or one that this machine lacks.
    pub fn selected() -> Result<Isa> {
        static SELECTED: OnceLock<Result<Isa>> = OnceLock::new();
        if let Some(selected) = SELECTED.get() {
            return selected.clone();
        }
        // Not `get_or_init`: a logger may wait for another thread, which must not wait for this one.
        let selected = Isa::choose(std::env::var("SPARSE_MHSA_SIMD").ok().as_deref());
        if let Ok(isa) = &selected {
            log::debug!("instruction set {}", isa.name());
        }
        SELECTED.get_or_init(|| selected).clone()
    }

    fn choose(request: Option<&str>) -> Result<Isa> {
        let names = Isa::ALL.map(Isa::name);
        let Some(request) = request.filter(|name| !name.is_empty()) else {
            let fastest = Isa::available().into_iter().rev().find(|isa| isa.is_worthwhile());
            return Ok(fastest.expect("scalar is always worthwhile"));
        };
        match Isa::ALL.into_iter().find(|isa| isa.name() == request) {
            None => Err(Error::Value(format!(
                "SPARSE_MHSA_SIMD: {}",
                unknown_name("instruction set", request, &names)
            ))),
            Some(isa) if !isa.is_available() => {
                let available: Vec<_> = Isa::available().into_iter().map(Isa::name).collect();
                Err(Error::Value(format!(
                    "SPARSE_MHSA_SIMD: this machine lacks `{request}`; it has {}",
                    available.join(", ")
                )))
            }
            Some(isa) => Ok(isa),
        }
    }

    /// What multiplies pairs of bfloat16.
    #[cfg(target_arch = "x86_64")]
    pub fn pairs(self) -> Option<pairs::Pairs> {
        match self {
            Isa::Avx512Bf16 => Some(pairs::Pairs::Dots),
            Isa::Amx => Some(pairs::Pairs::Tiles),
            _ => None,
        }
    }

    /// Run `kernel` with this set's registers.
    ///
    /// # Safety
    /// What the kernel itself asks for.
    ///
    /// # Panics
    /// When the machine lacks the set.
    pub(super) unsafe fn run<T: Element>(self, kernel: impl Kernel<T>) {
        match self {
            // SAFETY: the portable registers need no instructions; the rest is the caller's promise.
            Isa::Scalar => unsafe { scalar::enter(kernel) },
            #[cfg(target_arch = "x86_64")]
            Isa::Avx2 => {
                assert!(self.is_available());
                // SAFETY: the instructions were just found; the rest is the caller's promise.
                unsafe { avx2::enter(kernel) }
            }
            #[cfg(target_arch = "x86_64")]
            Isa::Avx512 | Isa::Avx512Bf16 | Isa::Amx => {
                assert!(self.is_available());
                // SAFETY: as above.
                unsafe { avx512::enter(kernel) }
            }
            #[cfg(not(target_arch = "x86_64"))]
            _ => unreachable!("not available on this architecture"),
        }
    }
}

#[cfg(test)]
#[path = "tests.rs"]
mod tests;
