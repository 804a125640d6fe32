//! The two products that rows scattered over a matrix take part in, for one row with many edges.

use super::matrix::{CHAIN, Matrix, load_part, padded};
use crate::kernel::element::{Element, Real};
use crate::kernel::simd::{Kernel, Memory, Vector};

/// Dots of long rows come in groups of this many, whose sums are reduced together.
pub(super) const LONG_GROUP: usize = 4;

/// `out[e] = x . matrix[columns[e]]` for one long row. `x` is padded with zeros, `out` to whole groups.
///
/// # Safety
/// - The instructions of `V` are available;
/// - every column exists, and `matrix` is packed;
/// - `x` has [`padded`] length, and `out` the length of `columns` in whole groups of [`LONG_GROUP`].
#[inline(always)]
pub(super) unsafe fn long_dots<V: Vector, T: Element>(
    x: &[T::Acc],
    matrix: &Matrix<T>,
    columns: &[u32],
    out: &mut [T::Acc],
) {
    debug_assert!(
        x.len() >= padded(matrix.width()) && out.len() >= columns.len().next_multiple_of(LONG_GROUP)
    );
    // SAFETY: the caller's promise.
    unsafe { V::outline(LongDots { x, matrix, columns, out }) }
}

/// The arguments of [`long_dots`].
struct LongDots<'a, T: Element> {
    x: &'a [T::Acc],
    matrix: &'a Matrix<'a, T>,
    columns: &'a [u32],
    out: &'a mut [T::Acc],
}

impl<T: Element> Kernel<T> for LongDots<'_, T> {
    #[inline(always)]
    unsafe fn run<V: Vector<Lane = T::Acc> + Memory<T>>(self) {
        let LongDots { x, matrix, columns, out } = self;
        let (x, width) = (x.as_ptr(), matrix.width());
        for (columns, out) in columns.chunks(LONG_GROUP).zip(out.as_chunks_mut::<LONG_GROUP>().0) {
            // SAFETY: the loads stay inside the rows, which the caller says exist.
            unsafe {
                let mut pointers = [matrix.row(columns[0] as usize); LONG_GROUP];
                for i in 1..columns.len() {
                    pointers[i] = matrix.row(columns[i] as usize);
                }
                let mut sums = [V::splat(T::Acc::ZERO); LONG_GROUP];
                let mut d = 0;
                while d + V::LANES <= width {
                    let x = <V as Memory<T::Acc>>::load(x.add(d));
                    for i in 0..LONG_GROUP {
                        sums[i] = <V as Memory<T>>::load(pointers[i].add(d)).mul_add(x, sums[i]);
                    }
                    d += V::LANES;
                }
                if d < width {
                    let x = <V as Memory<T::Acc>>::load(x.add(d));
                    for i in 0..LONG_GROUP {
                        sums[i] =
                            <V as Memory<T>>::load_first(pointers[i].add(d), width - d).mul_add(x, sums[i]);
                    }
                }
                V::sums(sums, out);
            }
        }
    }
}

/// `sum += weights[e] * matrix[columns[e]]` over all `e`, for one long row.
///
/// # Safety
/// - The instructions of `V` are available;
/// - every column exists, and `matrix` is packed;
/// - `sum` has [`padded`] length and `weights` the length of `columns`.
#[inline(always)]
pub(super) unsafe fn add_long_weighted<V: Vector, T: Element>(
    weights: &[T::Acc],
    matrix: &Matrix<T>,
    columns: &[u32],
    sum: &mut [T::Acc],
) {
    debug_assert!(sum.len() >= padded(matrix.width()) && weights.len() == columns.len());
    // SAFETY: the caller's promise.
    unsafe { V::outline(AddLongWeighted { weights, matrix, columns, sum }) }
}

/// The arguments of [`add_long_weighted`].
struct AddLongWeighted<'a, T: Element> {
    weights: &'a [T::Acc],
    matrix: &'a Matrix<'a, T>,
    columns: &'a [u32],
    sum: &'a mut [T::Acc],
}

impl<T: Element> Kernel<T> for AddLongWeighted<'_, T> {
    #[inline(always)]
    unsafe fn run<V: Vector<Lane = T::Acc> + Memory<T>>(self) {
        let AddLongWeighted { weights, matrix, columns, sum } = self;
        let sum = sum.as_mut_ptr();
        let mut d = 0;
        // SAFETY: each call touches the channels from `d` on that its condition says exist.
        unsafe {
            while d + 4 * V::LANES <= matrix.width() {
                add_long_channels::<V, T, 4, false>(weights, matrix, columns, d, sum.add(d));
                d += 4 * V::LANES;
            }
            if d + 2 * V::LANES <= matrix.width() {
                add_long_channels::<V, T, 2, false>(weights, matrix, columns, d, sum.add(d));
                d += 2 * V::LANES;
            }
            if d + V::LANES <= matrix.width() {
                add_long_channels::<V, T, 1, false>(weights, matrix, columns, d, sum.add(d));
                d += V::LANES;
            }
            if d < matrix.width() {
                add_long_channels::<V, T, 1, true>(weights, matrix, columns, d, sum.add(d));
            }
        }
    }
}

/// The part of [`add_long_weighted`] that `N` registers from channel `d` on hold, or with `PART` the channels that are left, fewer than a
/// register.
///
/// Even and odd edges are summed apart: one sum alone would wait for its own last addition most of the time. Each is a chain of
/// [`CHAIN`] edges, so that what a sum of thousands has grown to rounds few of its terms.
#[inline(always)]
unsafe fn add_long_channels<V, T, const N: usize, const PART: bool>(
    weights: &[T::Acc],
    matrix: &Matrix<T>,
    columns: &[u32],
    d: usize,
    sum: *mut T::Acc,
) where
    T: Element,
    V: Vector<Lane = T::Acc> + Memory<T>,
{
    let rest = matrix.width() - d;
    // SAFETY: the caller names rows and channels that exist.
    unsafe {
        let mut totals = [V::splat(T::Acc::ZERO); N];
        for (columns, weights) in columns.chunks(2 * CHAIN).zip(weights.chunks(2 * CHAIN)) {
            let mut sums = [[V::splat(T::Acc::ZERO); N]; 2];
            let (column_pairs, last_column) = columns.as_chunks::<2>();
            let (weight_pairs, last_weight) = weights.as_chunks::<2>();
            for (pair, weights) in column_pairs.iter().zip(weight_pairs) {
                for half in 0..2 {
                    let weight = V::splat(weights[half]);
                    let from = matrix.row(pair[half] as usize).add(d);
                    for i in 0..N {
                        let values = load_part::<V, T, PART>(from.add(i * V::LANES), rest);
                        sums[half][i] = values.mul_add(weight, sums[half][i]);
                    }
                }
            }
            if let (&[column], &[weight]) = (last_column, last_weight) {
                let (from, weight) = (matrix.row(column as usize).add(d), V::splat(weight));
                for i in 0..N {
                    let values = load_part::<V, T, PART>(from.add(i * V::LANES), rest);
                    sums[0][i] = values.mul_add(weight, sums[0][i]);
                }
            }
            for i in 0..N {
                totals[i] = totals[i] + (sums[0][i] + sums[1][i]);
            }
        }
        for i in 0..N {
            let place = sum.add(i * V::LANES);
            (<V as Memory<T::Acc>>::load(place) + totals[i]).store(place);
        }
    }
}
