//! The two products that rows scattered over a matrix take part in, for one row with many edges.

use super::matrix::{Matrix, padded};
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
        // SAFETY: each call touches the columns from `d` on that its condition says exist.
        unsafe {
            while d + 4 * V::LANES <= matrix.width() {
                add_long_columns::<V, T, 4>(weights, matrix, columns, d, sum.add(d));
                d += 4 * V::LANES;
            }
            if d + 2 * V::LANES <= matrix.width() {
                add_long_columns::<V, T, 2>(weights, matrix, columns, d, sum.add(d));
                d += 2 * V::LANES;
            }
            if d + V::LANES <= matrix.width() {
                add_long_columns::<V, T, 1>(weights, matrix, columns, d, sum.add(d));
                d += V::LANES;
            }
            if d < matrix.width() {
                let mut total = <V as Memory<T::Acc>>::load(sum.add(d));
                for (&weight, &column) in weights.iter().zip(columns) {
                    let from = matrix.row(column as usize).add(d);
                    let values = <V as Memory<T>>::load_first(from, matrix.width() - d);
                    total = values.mul_add(V::splat(weight), total);
                }
                total.store(sum.add(d));
            }
        }
    }
}

/// The part of [`add_long_weighted`] that `N` registers from column `first` on hold.
///
/// Even and odd edges are summed apart: one sum alone would wait for its own last addition most of the time.
#[inline(always)]
unsafe fn add_long_columns<V, T, const N: usize>(
    weights: &[T::Acc],
    matrix: &Matrix<T>,
    columns: &[u32],
    first: usize,
    sum: *mut T::Acc,
) where
    T: Element,
    V: Vector<Lane = T::Acc> + Memory<T>,
{
    // SAFETY: the caller names rows and columns that exist.
    unsafe {
        let mut even = [V::splat(T::Acc::ZERO); N];
        let mut odd = even;
        let (column_pairs, last_column) = columns.as_chunks::<2>();
        let (weight_pairs, last_weight) = weights.as_chunks::<2>();
        for (pair, weights) in column_pairs.iter().zip(weight_pairs) {
            let (a, b) = (matrix.row(pair[0] as usize), matrix.row(pair[1] as usize));
            let (weight_a, weight_b) = (V::splat(weights[0]), V::splat(weights[1]));
            for i in 0..N {
                even[i] = <V as Memory<T>>::load(a.add(first + i * V::LANES)).mul_add(weight_a, even[i]);
                odd[i] = <V as Memory<T>>::load(b.add(first + i * V::LANES)).mul_add(weight_b, odd[i]);
            }
        }
        if let (&[column], &[weight]) = (last_column, last_weight) {
            let (a, weight) = (matrix.row(column as usize), V::splat(weight));
            for i in 0..N {
                even[i] = <V as Memory<T>>::load(a.add(first + i * V::LANES)).mul_add(weight, even[i]);
            }
        }
        for i in 0..N {
            let place = sum.add(i * V::LANES);
            (<V as Memory<T::Acc>>::load(place) + (even[i] + odd[i])).store(place);
        }
    }
}
