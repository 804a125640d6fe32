//! One head of a tensor, and the two products that rows scattered over it take part in.

use std::marker::PhantomData;

use crate::kernel::element::{Element, Real};
use crate::kernel::simd::{Memory, Vector};
use crate::kernel::view::{View, View4};

/// Products with rows come in groups of this many: their sums are reduced together.
pub(super) const GROUP: usize = 4;

/// `len` rounded up to whole registers of any kind.
pub(super) const fn padded(len: usize) -> usize {
    len.next_multiple_of(16)
}

/// The rows of one head: `(tokens, width)` with any strides.
#[derive(Debug, Clone, Copy)]
pub(super) struct Matrix<'a, T> {
    origin: *const T,
    row_stride: isize,
    column_stride: isize,
    rows: usize,
    width: usize,
    storage: PhantomData<&'a [T]>,
}

// SAFETY: a matrix only reads, and borrows what it reads as `&'a [T]` would.
unsafe impl<T: Sync> Send for Matrix<'_, T> {}
// SAFETY: as above.
unsafe impl<T: Sync> Sync for Matrix<'_, T> {}

impl<'a, T: Element> Matrix<'a, T> {
    /// Head `head` of batch element `batch`.
    pub(super) fn of(view: &View4<'a, T>, batch: usize, head: usize) -> Self {
        let [batches, heads, rows, width] = view.shape();
        assert!(batch < batches && head < heads);
        let origin = if rows * width == 0 {
            std::ptr::dangling()
        } else {
            // SAFETY: the index lies inside the shape.
            unsafe { view.pointer([batch, head, 0, 0]) }
        };
        Matrix { origin, row_stride: view.stride(2), column_stride: view.stride(3), rows, width, storage: PhantomData }
    }

    /// Number of columns.
    #[inline(always)]
    pub(super) fn width(&self) -> usize {
        self.width
    }

    /// The element at `(row, column)`.
    ///
    /// # Safety
    /// Both lie inside the matrix.
    #[inline(always)]
    pub(super) unsafe fn at(&self, row: usize, column: usize) -> T {
        debug_assert!(row < self.rows && column < self.width);
        // SAFETY: the view checked its extent; the caller stays inside the shape.
        unsafe { *self.row(row).offset(column as isize * self.column_stride) }
    }

    #[inline(always)]
    unsafe fn row(&self, row: usize) -> *const T {
        debug_assert!(row < self.rows);
        // SAFETY: as above.
        unsafe { self.origin.offset(row as isize * self.row_stride) }
    }

    /// Whether rows can be read a register at a time.
    #[inline(always)]
    fn is_packed(&self) -> bool {
        self.column_stride == 1 || self.width == 1
    }

    /// Widen row `row` into `to`, whose padding becomes zero.
    ///
    /// # Safety
    /// - The instructions of `V` are available;
    /// - the row exists, and `to` has [`padded`] room for it.
    #[inline(always)]
    pub(super) unsafe fn stage<V: Vector<Lane = T::Acc> + Memory<T>>(&self, row: usize, to: &mut [T::Acc]) {
        debug_assert!(to.len() >= padded(self.width));
        // SAFETY: reads stay inside the row and writes inside `to`.
        unsafe {
            if self.is_packed() {
                let from = self.row(row);
                let mut d = 0;
                while d + V::LANES <= self.width {
                    <V as Memory<T>>::load(from.add(d)).store(to.as_mut_ptr().add(d));
                    d += V::LANES;
                }
                if d < self.width {
                    <V as Memory<T>>::load_first(from.add(d), self.width - d).store(to.as_mut_ptr().add(d));
                    d += V::LANES;
                }
                while d < padded(self.width) {
                    V::splat(T::Acc::ZERO).store(to.as_mut_ptr().add(d));
                    d += V::LANES;
                }
            } else {
                for (d, to) in to.iter_mut().enumerate() {
                    *to = if d < self.width { self.at(row, d).to_acc() } else { T::Acc::ZERO };
                }
            }
        }
    }

    /// Pointers to `N` rows whose elements are neighbours: the rows themselves, or copies of them in `copies`.
    #[inline(always)]
    unsafe fn packed_rows<const N: usize>(&self, rows: &[u32], copies: &mut Vec<T>) -> [*const T; N] {
        let mut pointers = [self.origin; N];
        // SAFETY: the caller names rows that exist.
        unsafe {
            if self.is_packed() {
                for (pointer, &row) in pointers.iter_mut().zip(rows) {
                    *pointer = self.row(row as usize);
                }
            } else {
                self.copy_rows(rows, copies);
                for (index, pointer) in pointers.iter_mut().enumerate() {
                    *pointer = copies.as_ptr().add(index * self.width);
                }
            }
        }
        pointers
    }

    #[inline(never)]
    unsafe fn copy_rows(&self, rows: &[u32], copies: &mut Vec<T>) {
        copies.clear();
        for &row in rows {
            // SAFETY: the caller names rows that exist.
            copies.extend((0..self.width).map(|d| unsafe { self.at(row as usize, d) }));
        }
    }
}

/// `out[e] = x . matrix[rows[e]]`. `x` is padded with zeros; `rows` holds whole groups of [`GROUP`].
///
/// # Safety
/// - The instructions of `V` are available;
/// - every row exists, `x` has [`padded`] length and `out` the length of `rows`.
#[inline(always)]
pub(super) unsafe fn dots<V, T>(
    x: &[T::Acc],
    matrix: &Matrix<T>,
    rows: &[u32],
    out: &mut [T::Acc],
    copies: &mut Vec<T>,
) where
    T: Element,
    V: Vector<Lane = T::Acc> + Memory<T>,
{
    debug_assert!(x.len() >= padded(matrix.width) && rows.len().is_multiple_of(GROUP) && out.len() == rows.len());
    let x = x.as_ptr();
    for (rows, out) in rows.chunks_exact(GROUP).zip(out.as_chunks_mut::<GROUP>().0) {
        // SAFETY: the loads stay inside the rows, which the caller says exist.
        unsafe {
            let pointers: [*const T; GROUP] = matrix.packed_rows(rows, copies);
            let mut sums = [V::splat(T::Acc::ZERO); GROUP];
            let mut d = 0;
            while d + V::LANES <= matrix.width {
                let x = <V as Memory<T::Acc>>::load(x.add(d));
                for i in 0..GROUP {
                    sums[i] = <V as Memory<T>>::load(pointers[i].add(d)).mul_add(x, sums[i]);
                }
                d += V::LANES;
            }
            if d < matrix.width {
                let x = <V as Memory<T::Acc>>::load(x.add(d));
                for i in 0..GROUP {
                    sums[i] = <V as Memory<T>>::load_first(pointers[i].add(d), matrix.width - d).mul_add(x, sums[i]);
                }
            }
            V::sums(sums, out);
        }
    }
}

/// `sum += weights[e] * matrix[rows[e]]` over all `e`.
///
/// # Safety
/// - The instructions of `V` are available;
/// - every row exists, `sum` has [`padded`] length and `weights` the length of `rows`.
#[inline(always)]
pub(super) unsafe fn add_weighted<V, T>(
    weights: &[T::Acc],
    matrix: &Matrix<T>,
    rows: &[u32],
    sum: &mut [T::Acc],
    copies: &mut Vec<T>,
) where
    T: Element,
    V: Vector<Lane = T::Acc> + Memory<T>,
{
    debug_assert!(sum.len() >= padded(matrix.width) && weights.len() == rows.len());
    let sum = sum.as_mut_ptr();
    let mut d = 0;
    // SAFETY: each call touches the columns from `d` on that its loop condition says exist.
    unsafe {
        while d + 4 * V::LANES <= matrix.width {
            add_weighted_columns::<V, T, 4>(weights, matrix, rows, d, sum.add(d), copies);
            d += 4 * V::LANES;
        }
        if d + 2 * V::LANES <= matrix.width {
            add_weighted_columns::<V, T, 2>(weights, matrix, rows, d, sum.add(d), copies);
            d += 2 * V::LANES;
        }
        if d + V::LANES <= matrix.width {
            add_weighted_columns::<V, T, 1>(weights, matrix, rows, d, sum.add(d), copies);
            d += V::LANES;
        }
        if d < matrix.width {
            let mut total = <V as Memory<T::Acc>>::load(sum.add(d));
            for (&weight, row) in weights.iter().zip(rows) {
                let [row]: [*const T; 1] = matrix.packed_rows(std::slice::from_ref(row), copies);
                let values = <V as Memory<T>>::load_first(row.add(d), matrix.width - d);
                total = values.mul_add(V::splat(weight), total);
            }
            total.store(sum.add(d));
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
            <V as Memory<T>>::store_first(<V as Memory<T::Acc>>::load(from.add(d)) * factor, to.add(d), width - d);
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

/// A per-token number of one head, at any stride.
#[derive(Debug, Clone, Copy)]
pub(super) struct Column<'a, T> {
    origin: *const T,
    stride: isize,
    len: usize,
    storage: PhantomData<&'a [T]>,
}

// SAFETY: a column only reads, and borrows what it reads as `&'a [T]` would.
unsafe impl<T: Sync> Send for Column<'_, T> {}
// SAFETY: as above.
unsafe impl<T: Sync> Sync for Column<'_, T> {}

impl<'a, T: Copy> Column<'a, T> {
    /// The last dimension of `view` at `index` (whose last entry must be 0).
    pub(super) fn of<const RANK: usize>(view: &View<'a, T, RANK>, index: [usize; RANK]) -> Self {
        let len = view.shape()[RANK - 1];
        let origin = if len == 0 {
            std::ptr::dangling()
        } else {
            assert!((0..RANK).all(|dim| index[dim] < view.shape()[dim]));
            // SAFETY: the index lies inside the shape.
            unsafe { view.pointer(index) }
        };
        Column { origin, stride: view.stride(RANK - 1), len, storage: PhantomData }
    }

    /// Entry `index`.
    ///
    /// # Safety
    /// `index` exists.
    #[inline(always)]
    pub(super) unsafe fn at(&self, index: usize) -> T {
        debug_assert!(index < self.len);
        // SAFETY: the view checked its extent; the caller stays inside the shape.
        unsafe { *self.origin.offset(index as isize * self.stride) }
    }
}
