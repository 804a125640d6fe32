//! Products of small dense blocks, for rows that share all their columns.

use super::matrix::{CHAIN, Matrix, padded};
use crate::kernel::element::{Element, Real};
use crate::kernel::simd::{Kernel, Memory, Vector};

/// Rows, and columns, per tile.
pub(super) const TILE: usize = 64;
/// From this many rows on, packing the columns they share pays.
pub(super) const WORTH_PACKING: usize = 4;

/// Widen `rows` of `matrix` into `panel`, one after the other at their [`padded`] width.
///
/// # Safety
/// The instructions of `V` are available; the rows exist, and `panel` has room for them.
#[inline(always)]
pub(super) unsafe fn pack<V, T>(
    matrix: &Matrix<T>,
    rows: impl ExactSizeIterator<Item = usize>,
    panel: &mut [T::Acc],
) where
    T: Element,
    V: Vector<Lane = T::Acc> + Memory<T>,
{
    for (row, to) in rows.zip(panel.chunks_exact_mut(padded(matrix.width()))) {
        // SAFETY: the caller's promise.
        unsafe { matrix.stage::<V>(row, to) };
    }
}

/// Turn a panel of `rows` rows of `width` into `width` rows of [`TILE`].
///
/// # Safety
/// The instructions of `V` are available; `panel` holds [`TILE`] rows and `to` as many columns, both padded.
#[inline(always)]
pub(super) unsafe fn transpose<V: Vector>(panel: &[V::Lane], rows: usize, width: usize, to: &mut [V::Lane]) {
    let stride = padded(width);
    assert!(rows <= TILE && panel.len() >= TILE * stride && to.len() >= TILE * stride);
    for row in (0..rows).step_by(V::LANES) {
        for column in (0..width).step_by(V::LANES) {
            // SAFETY: a tile's side and a padded width are whole registers, so the squares end inside both panels.
            unsafe {
                let from = panel.as_ptr().add(row * stride + column);
                V::transpose(from, stride, to.as_mut_ptr().add(column * TILE + row), TILE);
            }
        }
    }
}

/// A block of a row-major matrix.
#[derive(Clone, Copy)]
pub(super) struct Block<'a, R> {
    pub data: &'a [R],
    pub stride: usize,
}

/// `c = a * b`, or `c += a * b` with `ADD`: `a` is `m` x `depth`, `b` is `depth` x `n`, and `n` is rounded up to whole registers.
///
/// # Safety
/// The instructions of `V` are available; every row of the three blocks, rounded up likewise, lies inside its data.
#[inline(always)]
pub(super) unsafe fn multiply<V: Vector, const ADD: bool>(
    a: Block<V::Lane>,
    b: Block<V::Lane>,
    c: &mut [V::Lane],
    c_stride: usize,
    size: (usize, usize, usize),
) {
    // SAFETY: the caller's promise.
    unsafe { V::outline::<V::Lane>(Multiply::<_, ADD> { a, b, c, c_stride, size }) }
}

/// The arguments of [`multiply`].
struct Multiply<'a, R, const ADD: bool> {
    a: Block<'a, R>,
    b: Block<'a, R>,
    c: &'a mut [R],
    c_stride: usize,
    size: (usize, usize, usize),
}

impl<R: Real, const ADD: bool> Kernel<R> for Multiply<'_, R, ADD> {
    #[inline(always)]
    unsafe fn run<V: Vector<Lane = R> + Memory<R>>(self) {
        let Multiply { a, b, c, c_stride, size: (m, n, depth) } = self;
        debug_assert!(m == 0 || depth == 0 || a.data.len() >= (m - 1) * a.stride + depth);
        debug_assert!(depth == 0 || b.data.len() >= (depth - 1) * b.stride + n.next_multiple_of(V::LANES));
        debug_assert!(m == 0 || c.len() >= (m - 1) * c_stride + n.next_multiple_of(V::LANES));
        let (a_stride, b_stride) = (a.stride, b.stride);
        let mut column = 0;
        while column < n {
            let wide = column + V::LANES < n;
            // SAFETY: the caller says that these rows and columns exist.
            unsafe {
                let b = b.data.as_ptr().add(column);
                let mut row = 0;
                while row < m {
                    let a = a.data.as_ptr().add(row * a_stride);
                    let c = c.as_mut_ptr().add(row * c_stride + column);
                    // Sixteen sums leave room for the factors in 32 registers, eight in 16.
                    let rows = if V::REGISTERS >= 32 && m - row >= 8 {
                        8
                    } else if m - row >= 4 {
                        4
                    } else {
                        1
                    };
                    match (rows, wide) {
                        (8, true) => micro::<V, 8, 2, ADD>(a, a_stride, b, b_stride, c, c_stride, depth),
                        (8, false) => micro::<V, 8, 1, ADD>(a, a_stride, b, b_stride, c, c_stride, depth),
                        (4, true) => micro::<V, 4, 2, ADD>(a, a_stride, b, b_stride, c, c_stride, depth),
                        (4, false) => micro::<V, 4, 1, ADD>(a, a_stride, b, b_stride, c, c_stride, depth),
                        (_, true) => micro::<V, 1, 2, ADD>(a, a_stride, b, b_stride, c, c_stride, depth),
                        (_, false) => micro::<V, 1, 1, ADD>(a, a_stride, b, b_stride, c, c_stride, depth),
                    }
                    row += rows;
                }
            }
            column += if wide { 2 * V::LANES } else { V::LANES };
        }
    }
}

/// [`multiply`] for `M` rows and `N` registers of columns, whose sums stay in registers.
#[inline(always)]
unsafe fn micro<V: Vector, const M: usize, const N: usize, const ADD: bool>(
    a: *const V::Lane,
    a_stride: usize,
    b: *const V::Lane,
    b_stride: usize,
    c: *mut V::Lane,
    c_stride: usize,
    depth: usize,
) {
    // SAFETY: the caller says that these rows and columns exist.
    unsafe {
        for first in (0..depth.max(1)).step_by(CHAIN) {
            let mut sums = [[V::splat(V::Lane::ZERO); N]; M];
            for k in first..depth.min(first + CHAIN) {
                let mut columns = [V::splat(V::Lane::ZERO); N];
                for j in 0..N {
                    columns[j] = V::load(b.add(k * b_stride + j * V::LANES));
                }
                for i in 0..M {
                    let factor = V::splat(*a.add(i * a_stride + k));
                    for j in 0..N {
                        sums[i][j] = columns[j].mul_add(factor, sums[i][j]);
                    }
                }
            }
            for i in 0..M {
                for j in 0..N {
                    let place = c.add(i * c_stride + j * V::LANES);
                    let is_new = !ADD && first == 0;
                    let sum = if is_new { sums[i][j] } else { V::load(place) + sums[i][j] };
                    sum.store(place);
                }
            }
        }
    }
}
