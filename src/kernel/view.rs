//! Views of tensors. Those that are read may have any strides, every reachable element checked once to lie inside the storage; those
//! that are written have contiguous rows, which tasks fill side by side.

use std::fmt;
use std::marker::PhantomData;
use std::ops::Range;

use crate::error::{Error, Result};

/// Elements at `origin + sum(index[d] * strides[d])`. Strides count elements and may be 0 (broadcast) or negative.
#[derive(Clone, Copy)]
pub struct View<'a, T, const RANK: usize> {
    origin: *const T,
    shape: [usize; RANK],
    strides: [isize; RANK],
    storage: PhantomData<&'a [T]>,
}

/// `(batch, head, token, channel)` and the like.
pub type View4<'a, T> = View<'a, T, 4>;
/// `(batch, key)`.
pub type View2<'a, T> = View<'a, T, 2>;

// SAFETY: a view only reads, and borrows what it reads as `&'a [T]` would.
unsafe impl<T: Sync, const RANK: usize> Send for View<'_, T, RANK> {}
// SAFETY: as above.
unsafe impl<T: Sync, const RANK: usize> Sync for View<'_, T, RANK> {}

impl<'a, T, const RANK: usize> View<'a, T, RANK> {
    /// A contiguous tensor. `name` is what errors call it.
    ///
    /// # Errors
    /// [`Error::Shape`] when `data` does not hold exactly `shape`.
    pub fn contiguous(name: &str, data: &'a [T], shape: [usize; RANK]) -> Result<Self> {
        let size = shape.iter().try_fold(1usize, |size, &extent| size.checked_mul(extent));
        if size != Some(data.len()) {
            return Err(Error::Shape(format!(
                "{name}: expected {} elements for shape {shape:?}, got {}",
                size.map_or("more than memory holds".to_owned(), |size| size.to_string()),
                data.len()
            )));
        }
        let mut strides = [1i64; RANK];
        for dim in (1..RANK).rev() {
            strides[dim - 1] = strides[dim].saturating_mul(shape[dim] as i64);
        }
        Self::strided(name, data, 0, shape, strides)
    }

    /// A tensor whose first element is `storage[offset]`.
    ///
    /// # Errors
    /// [`Error::Shape`] when an index inside `shape` would leave `storage`.
    pub fn strided(
        name: &str,
        storage: &'a [T],
        offset: usize,
        shape: [usize; RANK],
        strides: [i64; RANK],
    ) -> Result<Self> {
        // SAFETY: a slice is its own storage: aligned, readable and not written to for 'a.
        unsafe { Self::from_raw_parts(name, storage.as_ptr(), storage.len(), offset, shape, strides) }
    }

    /// A tensor whose first element is `storage.add(offset)`, in a storage of `storage_len` elements.
    ///
    /// # Errors
    /// [`Error::Shape`] when an index inside `shape` would leave the storage; [`Error::Value`] when `storage` is not aligned.
    ///
    /// # Safety
    /// - `storage` points to `storage_len` initialised elements in one allocation (or `storage_len` is 0);
    /// - nobody writes to them during `'a`.
    pub unsafe fn from_raw_parts(
        name: &str,
        storage: *const T,
        storage_len: usize,
        offset: usize,
        shape: [usize; RANK],
        strides: [i64; RANK],
    ) -> Result<Self> {
        let empty = shape.contains(&0);
        if !empty {
            let (mut lowest, mut highest) = (offset as i128, offset as i128);
            for dim in 0..RANK {
                // A step that is never taken cannot leave the storage, whatever its stride says.
                let reach = (shape[dim] as i128 - 1) * i128::from(strides[dim]);
                let end = if reach < 0 { &mut lowest } else { &mut highest };
                *end = end.saturating_add(reach);
            }
            if lowest < 0 || highest >= storage_len as i128 {
                return Err(Error::Shape(format!(
                    "{name}: shape {shape:?} with strides {strides:?} reaches elements {lowest} to {highest} of a storage of {storage_len}"
                )));
            }
            if !storage.is_aligned() {
                return Err(Error::Value(format!(
                    "{name}: expected storage aligned to {} bytes, got address {storage:p}",
                    align_of::<T>()
                )));
            }
        }
        let strides =
            std::array::from_fn(|dim| if empty || shape[dim] == 1 { 0 } else { strides[dim] as isize });
        let origin = if empty { std::ptr::dangling() } else { storage.wrapping_add(offset) };
        Ok(View { origin, shape, strides, storage: PhantomData })
    }

    /// Length of every dimension.
    pub fn shape(&self) -> [usize; RANK] {
        self.shape
    }

    /// Without the first `start` entries of dimension `dim`.
    ///
    /// # Panics
    /// When there are fewer.
    #[must_use]
    pub fn after(&self, dim: usize, start: usize) -> Self {
        assert!(start <= self.shape[dim], "{start} entries of {:?} in dimension {dim}", self.shape);
        self.part(dim, start, self.shape[dim] - start)
    }

    /// Entry `index` of dimension `dim`, which stays with length 1.
    ///
    /// # Panics
    /// When there is none.
    #[must_use]
    pub fn only(&self, dim: usize, index: usize) -> Self {
        assert!(index < self.shape[dim], "entry {index} of {:?} in dimension {dim}", self.shape);
        self.part(dim, index, 1)
    }

    fn part(&self, dim: usize, start: usize, len: usize) -> Self {
        let mut part = View { ..*self };
        part.shape[dim] = len;
        if part.shape.contains(&0) {
            part.origin = std::ptr::dangling();
        } else {
            // Every index of the part is one of the whole, whose extent was checked.
            part.origin = self.origin.wrapping_offset(start as isize * self.strides[dim]);
        }
        part
    }

    /// Step of dimension `dim` in elements; 0 where the dimension has fewer than two elements.
    pub(super) fn stride(&self, dim: usize) -> isize {
        self.strides[dim]
    }
}

impl<T: Copy, const RANK: usize> View<'_, T, RANK> {
    /// The element at `index`.
    ///
    /// # Panics
    /// When `index` is outside the shape.
    pub fn at(&self, index: [usize; RANK]) -> T {
        assert!(
            (0..RANK).all(|dim| index[dim] < self.shape[dim]),
            "index {index:?} outside shape {:?}",
            self.shape
        );
        // SAFETY: the index is inside the shape.
        unsafe { *self.pointer(index) }
    }

    /// Where the element at `index` lies.
    ///
    /// # Safety
    /// `index` lies inside the shape.
    #[inline(always)]
    pub(super) unsafe fn pointer(&self, index: [usize; RANK]) -> *const T {
        let mut pointer = self.origin;
        for dim in 0..RANK {
            // SAFETY: construction checked that every index inside the shape stays in one allocation.
            pointer = unsafe { pointer.offset(index[dim] as isize * self.strides[dim]) };
        }
        pointer
    }
}

impl<T, const RANK: usize> fmt::Debug for View<'_, T, RANK> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("View")
            .field("shape", &self.shape)
            .field("strides", &self.strides)
            .finish_non_exhaustive()
    }
}

/// A tensor `(batch, head, token, channel)` to be written. Rows are contiguous, and no two of them share elements.
#[derive(Debug)]
pub struct ViewMut4<'a, T> {
    data: *mut T,
    shape: [usize; 4],
    /// Steps of batch, head and token in elements.
    steps: [usize; 3],
    owner: PhantomData<&'a mut [T]>,
}

impl<'a, T> ViewMut4<'a, T> {
    /// In memory in the order of its dimensions. `name` is what errors call it.
    ///
    /// # Errors
    /// [`Error::Shape`] when `data` does not hold exactly `shape`.
    pub fn contiguous(name: &str, data: &'a mut [T], shape: [usize; 4]) -> Result<Self> {
        check_room(name, data.len(), &shape)?;
        let [_, heads, tokens, width] = shape;
        Ok(Self::new(data, shape, [heads * tokens * width, tokens * width, width]))
    }

    /// In memory `(batch, token, head, channel)`: the rows of a token's heads lie side by side, as the projections around attention
    /// have them, so that merging the heads costs nothing.
    ///
    /// # Errors
    /// As [`Self::contiguous`].
    pub fn merged_heads(name: &str, data: &'a mut [T], shape: [usize; 4]) -> Result<Self> {
        check_room(name, data.len(), &shape)?;
        let [_, heads, tokens, width] = shape;
        Ok(Self::new(data, shape, [heads * tokens * width, width, heads * width]))
    }

    fn new(data: &'a mut [T], shape: [usize; 4], steps: [usize; 3]) -> Self {
        ViewMut4 { data: data.as_mut_ptr(), shape, steps, owner: PhantomData }
    }

    /// Length of every dimension.
    pub fn shape(&self) -> [usize; 4] {
        self.shape
    }

    /// The rows of one head.
    pub(super) fn head(&self, batch: usize, head: usize) -> RowsMut<'_, T> {
        assert!(batch < self.shape[0] && head < self.shape[1], "head {head} of {batch} in {:?}", self.shape);
        let [batch_step, head_step, step] = self.steps;
        let place = if self.shape.contains(&0) { 0 } else { batch * batch_step + head * head_step };
        RowsMut {
            data: self.data.wrapping_add(place),
            rows: self.shape[2],
            width: self.shape[3],
            step,
            owner: PhantomData,
        }
    }
}

// SAFETY: rows are only handed out by `RowsMut`, under the contract of its `row_mut`.
unsafe impl<T: Send> Send for ViewMut4<'_, T> {}
// SAFETY: as above.
unsafe impl<T: Send> Sync for ViewMut4<'_, T> {}

/// The rows of one head of a [`ViewMut4`].
#[derive(Debug, Clone, Copy)]
pub(super) struct RowsMut<'a, T> {
    data: *mut T,
    rows: usize,
    width: usize,
    step: usize,
    owner: PhantomData<&'a mut [T]>,
}

// SAFETY: rows are only handed out under the contract of `row_mut`.
unsafe impl<T: Send> Send for RowsMut<'_, T> {}
// SAFETY: as above.
unsafe impl<T: Send> Sync for RowsMut<'_, T> {}

impl<'a, T> RowsMut<'a, T> {
    /// Row `row`.
    ///
    /// # Safety
    /// No other borrow of this row exists: every row belongs to one task.
    pub(super) unsafe fn row_mut(&self, row: usize) -> &'a mut [T] {
        assert!(row < self.rows);
        // SAFETY: the row lies inside the tensor and meets no other; the caller promises that nobody else holds it.
        unsafe { std::slice::from_raw_parts_mut(self.data.add(row * self.step), self.width) }
    }
}

fn check_room(name: &str, len: usize, shape: &[usize]) -> Result<()> {
    let size = shape.iter().try_fold(1usize, |size, &extent| size.checked_mul(extent));
    if size == Some(len) {
        return Ok(());
    }
    Err(Error::Shape(format!("{name}: expected contiguous room for shape {shape:?}, got {len} elements")))
}

/// A contiguous output `(rows, width)` that tasks fill side by side.
#[derive(Debug, Clone, Copy)]
pub(super) struct Output<'a, T> {
    all: RowsMut<'a, T>,
}

impl<'a, T> Output<'a, T> {
    /// `data` in rows of `width`.
    pub(super) fn new(name: &str, data: &'a mut [T], shape: &[usize]) -> Result<Self> {
        check_room(name, data.len(), shape)?;
        let width = shape.last().copied().unwrap_or(1);
        let rows = data.len().checked_div(width).unwrap_or(0);
        let all = RowsMut { data: data.as_mut_ptr(), rows, width, step: width, owner: PhantomData };
        Ok(Output { all })
    }

    /// Row `row`.
    ///
    /// # Safety
    /// No other borrow of this row exists: every row belongs to one task.
    #[expect(clippy::mut_from_ref, reason = "disjointness is the caller's promise")]
    pub(super) unsafe fn row_mut(&self, row: usize) -> &mut [T] {
        // SAFETY: the caller's promise.
        unsafe { self.all.row_mut(row) }
    }

    /// Neighbouring rows in one.
    ///
    /// # Safety
    /// No other borrow of these rows exists.
    #[expect(clippy::mut_from_ref, reason = "disjointness is the caller's promise")]
    pub(super) unsafe fn rows_mut(&self, rows: Range<usize>) -> &mut [T] {
        let (start, len) = self.place(&rows);
        // SAFETY: the rows lie inside the output; the caller promises that nobody else holds them.
        unsafe { std::slice::from_raw_parts_mut(self.all.data.add(start), len) }
    }

    /// Neighbouring rows in one, for reading.
    ///
    /// # Safety
    /// They have been written, and nobody writes to them while the borrow lasts.
    pub(super) unsafe fn read_rows(&self, rows: Range<usize>) -> &[T] {
        let (start, len) = self.place(&rows);
        // SAFETY: the rows lie inside the output; the rest is the caller's promise.
        unsafe { std::slice::from_raw_parts(self.all.data.add(start), len) }
    }

    /// Rows `rows` for reading, as the only head of a tensor.
    ///
    /// # Safety
    /// Nobody writes to any of these rows while the view lives.
    pub(super) unsafe fn view(&self, rows: Range<usize>) -> View4<'_, T> {
        let (start, _) = self.place(&rows);
        let RowsMut { data, rows: all, width, .. } = self.all;
        let (shape, strides) = ([1, 1, rows.len(), width], [0, 0, width as i64, 1]);
        // SAFETY: `data` holds all rows; the caller promises that these are only read.
        let view = unsafe { View::from_raw_parts("rows", data, all * width, start, shape, strides) };
        view.expect("the rows lie inside the output")
    }

    /// Where `rows` begin, and how many elements they are.
    fn place(&self, rows: &Range<usize>) -> (usize, usize) {
        assert!(rows.start <= rows.end && rows.end <= self.all.rows);
        (rows.start * self.all.width, rows.len() * self.all.width)
    }

    /// Number of rows.
    pub(super) fn rows(&self) -> usize {
        self.all.rows
    }

    /// Length of a row.
    pub(super) fn width(&self) -> usize {
        self.all.width
    }
}
