//! Plain arrays, for machines without anything better; the compiler may still use what the baseline has.

use std::ops::{Add, Mul, Sub};

use super::{Kernel, MAX_LANES, Memory, Vector};
use crate::kernel::element::{Element, Real};

/// Run `kernel` with portable registers.
///
/// # Safety
/// What the kernel itself asks for.
#[inline(never)]
pub(super) unsafe fn enter<T: Element>(kernel: impl Kernel<T>) {
    // SAFETY: the portable registers need no instructions; the rest is the caller's promise.
    unsafe { kernel.run::<T::Scalar>() }
}

/// `N` numbers.
#[derive(Debug, Clone, Copy)]
pub struct Portable<R, const N: usize>([R; N]);

macro_rules! lanewise {
    ($trait:ident, $method:ident) => {
        impl<R: Real, const N: usize> $trait for Portable<R, N> {
            type Output = Self;
            #[inline(always)]
            fn $method(mut self, other: Self) -> Self {
                for lane in 0..N {
                    self.0[lane] = self.0[lane].$method(other.0[lane]);
                }
                self
            }
        }
    };
}

lanewise!(Add, add);
lanewise!(Sub, sub);
lanewise!(Mul, mul);

impl<R: Real, const N: usize> Vector for Portable<R, N> {
    type Lane = R;
    const LANES: usize = N;
    const REGISTERS: usize = 16;

    #[inline(always)]
    unsafe fn splat(value: R) -> Self {
        Portable([value; N])
    }

    #[inline(always)]
    fn mul_add(self, factor: Self, addend: Self) -> Self {
        self * factor + addend
    }

    #[inline(always)]
    fn min(mut self, other: Self) -> Self {
        for lane in 0..N {
            self.0[lane] = if self.0[lane] < other.0[lane] { self.0[lane] } else { other.0[lane] };
        }
        self
    }

    #[inline(always)]
    fn max(mut self, other: Self) -> Self {
        for lane in 0..N {
            self.0[lane] = if self.0[lane] > other.0[lane] { self.0[lane] } else { other.0[lane] };
        }
        self
    }

    #[inline(always)]
    fn round(mut self) -> Self {
        for lane in 0..N {
            self.0[lane] = self.0[lane].round();
        }
        self
    }

    #[inline(always)]
    fn power_of_two(mut self) -> Self {
        for lane in 0..N {
            self.0[lane] = self.0[lane].power_of_two();
        }
        self
    }

    #[inline(always)]
    fn or_zero_below(mut self, x: Self, bound: Self) -> Self {
        for lane in 0..N {
            self.0[lane] = if x.0[lane] < bound.0[lane] { R::ZERO } else { self.0[lane] };
        }
        self
    }

    #[inline(always)]
    fn where_below(mut self, x: Self, bound: Self, otherwise: Self) -> Self {
        for lane in 0..N {
            self.0[lane] = if x.0[lane] < bound.0[lane] { self.0[lane] } else { otherwise.0[lane] };
        }
        self
    }

    #[inline(always)]
    fn at_most(self, bound: Self) -> u32 {
        let mut bits = 0;
        for lane in 0..N {
            bits |= u32::from(self.0[lane] <= bound.0[lane]) << lane;
        }
        bits
    }

    #[inline(always)]
    fn first_or(mut self, count: usize, filler: Self) -> Self {
        for lane in 0..N {
            self.0[lane] = if lane < count { self.0[lane] } else { filler.0[lane] };
        }
        self
    }

    #[inline(always)]
    fn keep(mut self, bits: u32, filler: Self) -> Self {
        for lane in 0..N {
            self.0[lane] = if bits >> lane & 1 != 0 { self.0[lane] } else { filler.0[lane] };
        }
        self
    }

    #[inline(always)]
    fn sum(self) -> R {
        // Halves onto halves, as the wide registers do: more precise than one after the other, and not a chain of additions.
        let mut lanes = self.0;
        let mut width = N;
        while width > 1 {
            width /= 2;
            for lane in 0..width {
                lanes[lane] += lanes[lane + width];
            }
        }
        lanes[0]
    }

    #[inline(always)]
    fn largest(self) -> R {
        let mut largest = self.0[0];
        for lane in 1..N {
            largest = if self.0[lane] > largest { self.0[lane] } else { largest };
        }
        largest
    }

    #[inline(always)]
    fn sum_of_four(mut self) -> Self {
        for group in self.0.chunks_exact_mut(4) {
            group.fill((group[0] + group[2]) + (group[1] + group[3]));
        }
        self
    }

    #[inline(always)]
    fn max_of_four(mut self) -> Self {
        for group in self.0.chunks_exact_mut(4) {
            let largest = group.iter().copied().reduce(|a, b| if a > b { a } else { b });
            group.fill(largest.unwrap_or(R::ZERO));
        }
        self
    }

    #[inline(always)]
    fn begin_sums(registers: [Self; 4]) -> Self {
        let mut sums = [R::ZERO; N];
        for lane in 0..N {
            sums[lane] = registers[lane].sum();
        }
        Portable(sums)
    }

    #[inline(always)]
    fn finish_sums(begun: [Self; MAX_LANES / 4]) -> Self {
        begun[0]
    }

    #[inline(always)]
    unsafe fn spread(from: *const R) -> Self {
        let mut lanes = [R::ZERO; N];
        for (lane, value) in lanes.iter_mut().enumerate() {
            // SAFETY: the caller promised a number per group.
            *value = unsafe { *from.add(lane / 4) };
        }
        Portable(lanes)
    }

    #[inline(always)]
    unsafe fn outline<T: Element>(kernel: impl Kernel<T>) {
        // SAFETY: the caller's promise.
        unsafe { enter(kernel) }
    }

    #[inline(always)]
    unsafe fn transpose(from: *const R, from_stride: usize, to: *mut R, to_stride: usize) {
        for row in 0..N {
            for column in 0..N {
                // SAFETY: both places lie in the squares that the caller promised.
                unsafe { *to.add(column * to_stride + row) = *from.add(row * from_stride + column) };
            }
        }
    }
}

impl<T: Element, const N: usize> Memory<T> for Portable<T::Acc, N> {
    #[inline(always)]
    unsafe fn load(from: *const T) -> Self {
        let mut lanes = [T::Acc::ZERO; N];
        for (lane, value) in lanes.iter_mut().enumerate() {
            // SAFETY: the caller promised N elements.
            *value = unsafe { *from.add(lane) }.to_acc();
        }
        Portable(lanes)
    }

    #[inline(always)]
    unsafe fn load_first(from: *const T, count: usize) -> Self {
        let mut lanes = [T::Acc::ZERO; N];
        for (lane, value) in lanes.iter_mut().enumerate().take(count) {
            // SAFETY: the caller promised `count` elements.
            *value = unsafe { *from.add(lane) }.to_acc();
        }
        Portable(lanes)
    }

    #[inline(always)]
    unsafe fn store(self, to: *mut T) {
        for (lane, value) in self.0.into_iter().enumerate() {
            // SAFETY: the caller promised room for N elements.
            unsafe { *to.add(lane) = T::from_acc(value) };
        }
    }

    #[inline(always)]
    unsafe fn store_first(self, to: *mut T, count: usize) {
        for (lane, value) in self.0.into_iter().enumerate().take(count) {
            // SAFETY: the caller promised room for `count` elements.
            unsafe { *to.add(lane) = T::from_acc(value) };
        }
    }
}
