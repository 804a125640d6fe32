//! What the registers of AVX2 and AVX-512 have in common: the same operations under systematic names.

/// Define a register and those parts of its `Vector` and `Memory` that are one instruction each; the block at the end is the rest
/// of its `impl Vector`.
macro_rules! register {
    (
        $(#[$doc:meta])* $name:ident($register:ty) = $lanes:literal x $lane:ty, one of $registers:literal;
        $splat:ident, $add:ident, $sub:ident, $mul:ident, $mul_add:ident, $min:ident, $max:ident;
        { $($rest:tt)* }
    ) => {
        $(#[$doc])*
        #[derive(Debug, Clone, Copy)]
        pub struct $name(pub(super) $register);

        register!(@operator $name, Add, add, $add);
        register!(@operator $name, Sub, sub, $sub);
        register!(@operator $name, Mul, mul, $mul);

        impl Vector for $name {
            type Lane = $lane;
            const LANES: usize = $lanes;
            const REGISTERS: usize = $registers;

            #[inline(always)]
            unsafe fn splat(value: $lane) -> Self {
                // SAFETY: the caller promises the instructions.
                unsafe { Self($splat(value)) }
            }

            #[inline(always)]
            fn mul_add(self, factor: Self, addend: Self) -> Self {
                // SAFETY: a value of this type proves that the instructions exist.
                unsafe { Self($mul_add(self.0, factor.0, addend.0)) }
            }

            #[inline(always)]
            fn min(self, other: Self) -> Self {
                // SAFETY: as above.
                unsafe { Self($min(self.0, other.0)) }
            }

            #[inline(always)]
            fn max(self, other: Self) -> Self {
                // SAFETY: as above.
                unsafe { Self($max(self.0, other.0)) }
            }

            #[inline(always)]
            unsafe fn outline<T: Element>(kernel: impl Kernel<T>) {
                // SAFETY: the caller's promise.
                unsafe { enter(kernel) }
            }

            $($rest)*
        }
    };

    (@operator $name:ident, $trait:ident, $method:ident, $instruction:ident) => {
        impl $trait for $name {
            type Output = Self;
            #[inline(always)]
            fn $method(self, other: Self) -> Self {
                // SAFETY: a value of this type proves that the instructions exist.
                unsafe { Self($instruction(self.0, other.0)) }
            }
        }
    };
}
