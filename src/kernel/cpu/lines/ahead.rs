//! Rows that are needed soon, on their way from memory while something else is computed.

use std::ops::Range;

use crate::kernel::cpu::matrix::Matrix;
use crate::kernel::element::Element;
use crate::kernel::simd::{LINE, prefetch};

/// Rows of `N` matrices, fetched one at a time.
#[derive(Debug)]
pub(super) struct Ahead<const N: usize> {
    streams: [Stream; N],
    /// The stream whose turn it is.
    turn: usize,
}

/// Rows of one matrix.
#[derive(Debug, Clone, Copy)]
struct Stream {
    next: *const u8,
    /// Bytes from row to row.
    stride: isize,
    /// Bytes of a row.
    width: usize,
    /// How many are left.
    rows: usize,
}

impl Stream {
    fn new<T: Element>(matrix: &Matrix<T>, rows: &Range<usize>) -> Self {
        let rows = rows.start..rows.end.min(matrix.rows());
        Stream {
            // SAFETY: the row exists if there are any.
            next: if rows.is_empty() { std::ptr::null() } else { unsafe { matrix.row(rows.start) }.cast() },
            stride: matrix.row_stride() * size_of::<T>() as isize,
            width: matrix.width() * size_of::<T>(),
            rows: rows.len(),
        }
    }
}

impl<const N: usize> Ahead<N> {
    /// Rows `rows` of each of these, as far as they have them.
    pub(super) fn new<T: Element>(matrices: Option<[&Matrix<T>; N]>, rows: &Range<usize>) -> Self {
        let none = Stream { next: std::ptr::null(), stride: 0, width: 0, rows: 0 };
        match matrices {
            Some(matrices) => Ahead { streams: matrices.map(|matrix| Stream::new(matrix, rows)), turn: 0 },
            None => Ahead { streams: [none; N], turn: N },
        }
    }

    /// Fetch the next row.
    #[inline(always)]
    pub(super) fn step(&mut self) {
        let Some(stream) = self.streams.get_mut(self.turn) else { return };
        if stream.rows == 0 {
            self.turn += 1;
            return;
        }
        for byte in (0..stream.width).step_by(LINE) {
            prefetch(stream.next.wrapping_add(byte));
        }
        stream.next = stream.next.wrapping_offset(stream.stride);
        stream.rows -= 1;
    }

    /// Fetch what is left.
    pub(super) fn finish(&mut self) {
        while self.turn < N {
            self.step();
        }
    }
}
