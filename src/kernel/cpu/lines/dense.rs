//! One row against neighbouring rows of a matrix.

use std::ops::Range;

use super::dots::rest_of_dot;
use crate::kernel::cpu::matrix::{Matrix, load_part, padded};
use crate::kernel::element::{Element, Real};
use crate::kernel::simd::{Kernel, MAX_LANES, Memory, Vector};

/// `out[i] = x . matrix[rows.start + i]`.
///
/// To run it: the instructions are available, the rows exist, `x` has as many channels as `matrix`, and both are packed.
pub(super) struct RowDots<'a, T: Element> {
    pub x: *const T,
    pub matrix: &'a Matrix<'a, T>,
    pub rows: Range<usize>,
    pub out: &'a mut [T::Acc],
}

impl<T: Element> Kernel<T> for RowDots<'_, T> {
    #[inline(always)]
    unsafe fn run<V: Vector<Lane = T::Acc> + Memory<T>>(self) {
        assert!(self.out.len() == self.rows.len());
        // SAFETY: the caller's promise; the number of whole registers is that of the width.
        unsafe {
            match self.matrix.width() / V::LANES {
                4 => self.groups::<V, 4>(),
                8 => self.groups::<V, 8>(),
                _ => self.groups::<V, 0>(),
            }
        }
    }
}

impl<T: Element> RowDots<'_, T> {
    /// With `WHOLE` whole registers per row, or any number of them if 0. One register of results at a time.
    #[inline(always)]
    unsafe fn groups<V: Vector<Lane = T::Acc> + Memory<T>, const WHOLE: usize>(self) {
        let RowDots { x, matrix, rows, out } = self;
        let width = matrix.width();
        let whole = if WHOLE > 0 { WHOLE } else { width / V::LANES };
        let last = rows.end.saturating_sub(1);
        // SAFETY: the caller's promise; rows beyond the last are the last.
        unsafe {
            let zero = V::splat(T::Acc::ZERO);
            let mut kept = [zero; WHOLE];
            for c in 0..WHOLE {
                kept[c] = <V as Memory<T>>::load(x.add(c * V::LANES));
            }
            for (group, out) in out.chunks_mut(V::LANES).enumerate() {
                let mut begun = [zero; MAX_LANES / 4];
                for part in 0..V::LANES / 4 {
                    let first = rows.start + group * V::LANES + part * 4;
                    let y = [
                        matrix.row(first.min(last)),
                        matrix.row((first + 1).min(last)),
                        matrix.row((first + 2).min(last)),
                        matrix.row((first + 3).min(last)),
                    ];
                    let mut sums = [zero; 4];
                    for c in 0..WHOLE {
                        for i in 0..4 {
                            sums[i] =
                                <V as Memory<T>>::load(y[i].add(c * V::LANES)).mul_add(kept[c], sums[i]);
                        }
                    }
                    for i in 0..4 {
                        sums[i] = rest_of_dot::<V, T>(x, y[i], WHOLE, whole, width, sums[i]);
                    }
                    begun[part] = V::begin_sums(sums);
                }
                let sums = V::finish_sums(begun);
                if out.len() == V::LANES {
                    sums.store(out.as_mut_ptr());
                } else {
                    sums.store_first(out.as_mut_ptr(), out.len());
                }
            }
        }
    }
}

/// Rows that are summed before their sum is added to that of the others.
const PIECE: usize = 256;

/// `sum += sum_i weights[i] * matrix[rows.start + i]`.
///
/// To run it: the instructions are available, the rows exist, `matrix` is packed, and `sum` has [`padded`] length.
pub(super) struct RowSum<'a, T: Element> {
    pub weights: &'a [T::Acc],
    pub matrix: &'a Matrix<'a, T>,
    pub rows: Range<usize>,
    pub sum: &'a mut [T::Acc],
}

impl<T: Element> Kernel<T> for RowSum<'_, T> {
    #[inline(always)]
    unsafe fn run<V: Vector<Lane = T::Acc> + Memory<T>>(mut self) {
        let width = self.matrix.width();
        assert!(self.sum.len() >= padded(width) && self.weights.len() == self.rows.len());
        let mut d = 0;
        // SAFETY: each call touches the channels from `d` on that its condition says exist.
        unsafe {
            while d + 4 * V::LANES <= width {
                self.channels::<V, 4, false>(d);
                d += 4 * V::LANES;
            }
            while d + V::LANES <= width {
                self.channels::<V, 1, false>(d);
                d += V::LANES;
            }
            if d < width {
                self.channels::<V, 1, true>(d);
            }
        }
    }
}

impl<T: Element> RowSum<'_, T> {
    /// The channels from `d` on that `N` registers hold, or with `PART` those that are left, fewer than a register.
    ///
    /// Even and odd rows are summed apart: one sum alone would wait for its own last addition most of the time. Every
    /// [`PIECE`] rows are summed apart as well, so that what a sum of thousands has grown to rounds few of its terms.
    #[inline(always)]
    unsafe fn channels<V, const N: usize, const PART: bool>(&mut self, d: usize)
    where
        V: Vector<Lane = T::Acc> + Memory<T>,
    {
        let rest = self.matrix.width() - d;
        // SAFETY: the caller's promise.
        unsafe {
            let mut totals = [V::splat(T::Acc::ZERO); N];
            for (chunk, weights) in self.weights.chunks(PIECE).enumerate() {
                let mut sums = [[V::splat(T::Acc::ZERO); N]; 2];
                let row = self.rows.start + chunk * PIECE;
                let (pairs, last) = weights.as_chunks::<2>();
                for (index, pair) in pairs.iter().enumerate() {
                    for half in 0..2 {
                        let weight = V::splat(pair[half]);
                        let from = self.matrix.row(row + 2 * index + half).add(d);
                        for i in 0..N {
                            let values = load_part::<V, T, PART>(from.add(i * V::LANES), rest);
                            sums[half][i] = values.mul_add(weight, sums[half][i]);
                        }
                    }
                }
                if let &[weight] = last {
                    let from = self.matrix.row(self.rows.end - 1).add(d);
                    for i in 0..N {
                        let values = load_part::<V, T, PART>(from.add(i * V::LANES), rest);
                        sums[0][i] = values.mul_add(V::splat(weight), sums[0][i]);
                    }
                }
                for i in 0..N {
                    totals[i] = totals[i] + (sums[0][i] + sums[1][i]);
                }
            }
            for i in 0..N {
                let to = self.sum[d + i * V::LANES..].as_mut_ptr();
                (V::load(to) + totals[i]).store(to);
            }
        }
    }
}
