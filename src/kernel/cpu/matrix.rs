//! One head of a tensor, at any strides.

use std::marker::PhantomData;

use crate::kernel::element::{Element, Real};
use crate::kernel::simd::{Memory, Vector};
use crate::kernel::{Attention, View, View4};

/// `len` rounded up to whole registers of any kind.
pub(super) const fn padded(len: usize) -> usize {
    len.next_multiple_of(16)
}

/// Channels, or tokens, that a product adds one after the other. Sums of such parts round about half as much as one chain of 64 does,
/// and where scores are large it is their rounding that a softmax shows.
pub(super) const CHAIN: usize = 16;

/// A whole register, or with `PART` the first `rest` lanes of one.
///
/// # Safety
/// They can be read.
#[inline(always)]
pub(super) unsafe fn load_part<V: Memory<T>, T, const PART: bool>(from: *const T, rest: usize) -> V {
    // SAFETY: the caller's promise.
    unsafe { if PART { V::load_first(from, rest) } else { V::load(from) } }
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
        Matrix {
            origin,
            row_stride: view.stride(2),
            column_stride: view.stride(3),
            rows,
            width,
            storage: PhantomData,
        }
    }

    /// Number of columns.
    #[inline(always)]
    pub(super) fn width(&self) -> usize {
        self.width
    }

    /// Number of rows.
    #[inline(always)]
    pub(super) fn rows(&self) -> usize {
        self.rows
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

    /// The first element of row `row`.
    ///
    /// # Safety
    /// The row exists.
    #[inline(always)]
    pub(super) unsafe fn row(&self, row: usize) -> *const T {
        debug_assert!(row < self.rows);
        // SAFETY: as above.
        unsafe { self.origin.offset(row as isize * self.row_stride) }
    }

    /// Elements from one row to the next.
    #[inline(always)]
    pub(super) fn row_stride(&self) -> isize {
        self.row_stride
    }

    /// Whether rows can be read a register at a time.
    #[inline(always)]
    pub(super) fn is_packed(&self) -> bool {
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
}

/// `tensor`, or a copy of it in `copy` where the elements of a row are not neighbours in memory.
pub(super) fn pack<'a, T: Element>(tensor: View4<'a, T>, copy: &'a mut Vec<T>) -> View4<'a, T> {
    let shape = tensor.shape();
    if shape[3] == 1 || tensor.stride(3) == 1 || shape.contains(&0) {
        return tensor;
    }
    let [batch, heads, rows, width] = shape;
    copy.reserve_exact(batch * heads * rows * width);
    for b in 0..batch {
        for h in 0..heads {
            let matrix = Matrix::of(&tensor, b, h);
            for row in 0..rows {
                // SAFETY: row and column lie inside the tensor.
                copy.extend((0..width).map(|d| unsafe { matrix.at(row, d) }));
            }
        }
    }
    View::contiguous("copy", copy, shape).expect("a copy has the shape of its tensor")
}

/// `problem` with the elements of every row of q, k and v next to each other, for which `copies` has room.
pub(super) fn pack_rows<'a, T: Element>(
    problem: &Attention<'a, T>,
    copies: &'a mut [Vec<T>; 3],
) -> Attention<'a, T> {
    let [q, k, v] = copies;
    Attention { q: pack(problem.q, q), k: pack(problem.k, k), v: pack(problem.v, v), ..*problem }
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
