//! Operations on single padded rows of scratch.

use super::matrix::padded;
use crate::kernel::element::{Element, Real};
use crate::kernel::simd::{Memory, Vector};

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

/// `a . b` over padded rows, summed as [`super::gather::dots`] sums: where a row keeps one key, `dO . O` is the `dO . v` of it.
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
        let (mut sums, zero) = ([V::Lane::ZERO; 4], V::splat(V::Lane::ZERO));
        V::sums([sum, zero, zero, zero], &mut sums);
        sums[0]
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
