//! The two products that rows scattered over a matrix take part in, and a few on single rows of scratch.

use super::matrix::{Matrix, padded};
use crate::kernel::element::{Element, Real};
use crate::kernel::simd::{Kernel, Memory, Vector};

/// Dots come in groups of this many: their sums are reduced together.
pub(super) const GROUP: usize = 4;

/// `out[e] = x . matrix[rows[e]]`. `x` is padded with zeros; `rows` holds whole groups of [`GROUP`].
///
/// # Safety
/// - The instructions of `V` are available;
/// - every row exists, `x` has [`padded`] length and `out` the length of `rows`.
#[inline(always)]
pub(super) unsafe fn dots<V: Vector, T: Element>(
    x: &[T::Acc],
    matrix: &Matrix<T>,
    rows: &[u32],
    out: &mut [T::Acc],
    copies: &mut Vec<T>,
) {
    debug_assert!(
        x.len() >= padded(matrix.width()) && rows.len().is_multiple_of(GROUP) && out.len() == rows.len()
    );
    // SAFETY: the caller's promise.
    unsafe { V::outline(Dots { x, matrix, rows, out, copies }) }
}

/// The arguments of [`dots`].
struct Dots<'a, T: Element> {
    x: &'a [T::Acc],
    matrix: &'a Matrix<'a, T>,
    rows: &'a [u32],
    out: &'a mut [T::Acc],
    copies: &'a mut Vec<T>,
}

impl<T: Element> Kernel<T> for Dots<'_, T> {
    #[inline(always)]
    unsafe fn run<V: Vector<Lane = T::Acc> + Memory<T>>(self) {
        let Dots { x, matrix, rows, out, copies } = self;
        let (x, width) = (x.as_ptr(), matrix.width());
        for (rows, out) in rows.chunks_exact(GROUP).zip(out.as_chunks_mut::<GROUP>().0) {
            // SAFETY: the loads stay inside the rows, which the caller says exist.
            unsafe {
                let pointers: [*const T; GROUP] = matrix.packed_rows(rows, copies);
                let mut sums = [V::splat(T::Acc::ZERO); GROUP];
                let mut d = 0;
                while d + V::LANES <= width {
                    let x = <V as Memory<T::Acc>>::load(x.add(d));
                    for i in 0..GROUP {
                        sums[i] = <V as Memory<T>>::load(pointers[i].add(d)).mul_add(x, sums[i]);
                    }
                    d += V::LANES;
                }
                if d < width {
                    let x = <V as Memory<T::Acc>>::load(x.add(d));
                    for i in 0..GROUP {
                        sums[i] =
                            <V as Memory<T>>::load_first(pointers[i].add(d), width - d).mul_add(x, sums[i]);
                    }
                }
                V::sums(sums, out);
            }
        }
    }
}

/// `sum += weights[e] * matrix[rows[e]]` over all `e`.
///
/// # Safety
/// - The instructions of `V` are available;
/// - every row exists, `sum` has [`padded`] length and `weights` the length of `rows`.
#[inline(always)]
pub(super) unsafe fn add_weighted<V: Vector, T: Element>(
    weights: &[T::Acc],
    matrix: &Matrix<T>,
    rows: &[u32],
    sum: &mut [T::Acc],
    copies: &mut Vec<T>,
) {
    debug_assert!(sum.len() >= padded(matrix.width()) && weights.len() == rows.len());
    // SAFETY: the caller's promise.
    unsafe { V::outline(AddWeighted { weights, matrix, rows, sum, copies }) }
}

/// The arguments of [`add_weighted`].
struct AddWeighted<'a, T: Element> {
    weights: &'a [T::Acc],
    matrix: &'a Matrix<'a, T>,
    rows: &'a [u32],
    sum: &'a mut [T::Acc],
    copies: &'a mut Vec<T>,
}

impl<T: Element> Kernel<T> for AddWeighted<'_, T> {
    #[inline(always)]
    unsafe fn run<V: Vector<Lane = T::Acc> + Memory<T>>(self) {
        let AddWeighted { weights, matrix, rows, sum, copies } = self;
        let sum = sum.as_mut_ptr();
        let mut d = 0;
        // SAFETY: each call touches the columns from `d` on that its condition says exist.
        unsafe {
            while d + 4 * V::LANES <= matrix.width() {
                add_weighted_columns::<V, T, 4>(weights, matrix, rows, d, sum.add(d), copies);
                d += 4 * V::LANES;
            }
            if d + 2 * V::LANES <= matrix.width() {
                add_weighted_columns::<V, T, 2>(weights, matrix, rows, d, sum.add(d), copies);
                d += 2 * V::LANES;
            }
            if d + V::LANES <= matrix.width() {
                add_weighted_columns::<V, T, 1>(weights, matrix, rows, d, sum.add(d), copies);
                d += V::LANES;
            }
            if d < matrix.width() {
                let mut total = <V as Memory<T::Acc>>::load(sum.add(d));
                for (&weight, row) in weights.iter().zip(rows) {
                    let [row]: [*const T; 1] = matrix.packed_rows(std::slice::from_ref(row), copies);
                    let values = <V as Memory<T>>::load_first(row.add(d), matrix.width() - d);
                    total = values.mul_add(V::splat(weight), total);
                }
                total.store(sum.add(d));
            }
        }
    }
}

/// The part of [`add_weighted`] that `N` registers from column `first` on hold.
///
/// Even and odd edges are summed apart: one sum alone would wait for its own last addition most of the time.
#[inline(always)]
unsafe fn add_weighted_columns<V, T, const N: usize>(
    weights: &[T::Acc],
    matrix: &Matrix<T>,
    rows: &[u32],
    first: usize,
    sum: *mut T::Acc,
    copies: &mut Vec<T>,
) where
    T: Element,
    V: Vector<Lane = T::Acc> + Memory<T>,
{
    // SAFETY: the caller names rows and columns that exist.
    unsafe {
        let mut even = [V::splat(T::Acc::ZERO); N];
        let mut odd = even;
        let (row_pairs, last_row) = rows.as_chunks::<2>();
        let (weight_pairs, last_weight) = weights.as_chunks::<2>();
        for (pair, weights) in row_pairs.iter().zip(weight_pairs) {
            let [a, b]: [*const T; 2] = matrix.packed_rows(pair, copies);
            let (weight_a, weight_b) = (V::splat(weights[0]), V::splat(weights[1]));
            for i in 0..N {
                even[i] = <V as Memory<T>>::load(a.add(first + i * V::LANES)).mul_add(weight_a, even[i]);
                odd[i] = <V as Memory<T>>::load(b.add(first + i * V::LANES)).mul_add(weight_b, odd[i]);
            }
        }
        if let (&[_], &[weight]) = (last_row, last_weight) {
            let [a]: [*const T; 1] = matrix.packed_rows(last_row, copies);
            let weight = V::splat(weight);
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

/// `from * factor`, rounded to `T`.
///
/// # Safety
/// - The instructions of `V` are available;
/// - `from` has [`padded`] length for `to`.
#[inline(always)]
pub(super) unsafe fn write_scaled<V, T>(from: &[T::Acc], factor: T::Acc, to: &mut [T])
where
    T: Element,
    V: Vector<Lane = T::Acc> + Memory<T>,
{
    debug_assert!(from.len() >= padded(to.len()));
    let (from, width, to) = (from.as_ptr(), to.len(), to.as_mut_ptr());
    // SAFETY: reads stay inside the padded row and writes inside `to`.
    unsafe {
        let factor = V::splat(factor);
        let mut d = 0;
        while d + V::LANES <= width {
            <V as Memory<T>>::store(<V as Memory<T::Acc>>::load(from.add(d)) * factor, to.add(d));
            d += V::LANES;
        }
        if d < width {
            <V as Memory<T>>::store_first(
                <V as Memory<T::Acc>>::load(from.add(d)) * factor,
                to.add(d),
                width - d,
            );
        }
    }
}

/// `a . b` over padded rows.
///
/// # Safety
/// The instructions of `V` are available; both rows have the same [`padded`] length.
#[inline(always)]
pub(super) unsafe fn dot<V: Vector>(a: &[V::Lane], b: &[V::Lane]) -> V::Lane {
    debug_assert!(a.len() == b.len() && a.len().is_multiple_of(V::LANES));
    // SAFETY: whole registers, as asserted.
    unsafe {
        let mut sum = V::splat(V::Lane::ZERO);
        for d in (0..a.len()).step_by(V::LANES) {
            sum = V::load(a.as_ptr().add(d)).mul_add(V::load(b.as_ptr().add(d)), sum);
        }
        sum.sum()
    }
}

/// `row *= factor` over a padded row.
///
/// # Safety
/// The instructions of `V` are available.
#[inline(always)]
pub(super) unsafe fn scale<V: Vector>(row: &mut [V::Lane], factor: V::Lane) {
    debug_assert!(row.len().is_multiple_of(V::LANES));
    // SAFETY: whole registers, as asserted.
    unsafe {
        let factor = V::splat(factor);
        for d in (0..row.len()).step_by(V::LANES) {
            let place = row.as_mut_ptr().add(d);
            (V::load(place) * factor).store(place);
        }
    }
}

/// `to += factor * row` over padded rows, nothing where the factor is zero.
///
/// # Safety
/// The instructions of `V` are available.
#[inline(always)]
pub(super) unsafe fn add_scaled<V: Vector>(row: &[V::Lane], factor: V::Lane, to: &mut [V::Lane]) {
    assert!(row.len() == to.len() && row.len().is_multiple_of(V::LANES));
    if factor == V::Lane::ZERO {
        return;
    }
    // SAFETY: whole registers, as asserted.
    unsafe {
        let factor = V::splat(factor);
        for d in (0..row.len()).step_by(V::LANES) {
            let place = to.as_mut_ptr().add(d);
            V::load(row.as_ptr().add(d)).mul_add(factor, V::load(place)).store(place);
        }
    }
}
