//! Dots of rows with the columns that lines have in them.

use std::ops::Range;

use super::{BLOCK, STRIP};
use crate::kernel::cpu::matrix::Matrix;
use crate::kernel::element::{Element, Real};
use crate::kernel::simd::{Kernel, MAX_LANES, Memory, Vector};
use crate::plan::lines::Line;

/// `out[line][row] = rows[row] . matrix[column of line]` for a block of rows, anything where a line has no edge. A line has [`BLOCK`]
/// numbers, the first of them for the first row.
///
/// To run it: the instructions are available, rows and columns exist, and both matrices are packed and equally wide.
pub(super) struct Dots<'a, T: Element> {
    pub rows: &'a Matrix<'a, T>,
    pub matrix: &'a Matrix<'a, T>,
    /// Cut to the block.
    pub lines: &'a [Line],
    /// At most [`BLOCK`].
    pub block: Range<usize>,
    /// Room for [`MAX_LANES`]` * `[`STRIP`] numbers per line.
    pub begun: &'a mut [T::Acc],
    pub out: &'a mut [T::Acc],
}

impl<T: Element> Kernel<T> for Dots<'_, T> {
    #[inline(always)]
    unsafe fn run<V: Vector<Lane = T::Acc> + Memory<T>>(self) {
        let strips = MAX_LANES / STRIP;
        assert!(self.block.len() <= BLOCK && self.out.len() >= self.lines.len() * BLOCK);
        assert!(self.begun.len() >= self.lines.len() * strips * MAX_LANES);
        // SAFETY: the caller's promise; the number of whole registers is that of the width.
        unsafe {
            match self.matrix.width() / V::LANES {
                2 => self.groups::<V, 2>(),
                3 => self.groups::<V, 3>(),
                4 => self.groups::<V, 4>(),
                5 => self.groups::<V, 5>(),
                6 => self.groups::<V, 6>(),
                8 => self.groups::<V, 8>(),
                _ => self.groups::<V, 0>(),
            }
        }
    }
}

impl<T: Element> Dots<'_, T> {
    /// With `WHOLE` whole registers per row, or any number of them if 0. One register of rows at a time.
    #[inline(always)]
    unsafe fn groups<V: Vector<Lane = T::Acc> + Memory<T>, const WHOLE: usize>(mut self) {
        for first in self.block.clone().step_by(V::LANES) {
            for strip in 0..V::LANES / STRIP {
                let start = first + strip * STRIP;
                let rows = start..self.block.end.min(start + STRIP);
                // SAFETY: the caller's promise.
                unsafe {
                    if rows.len() == STRIP {
                        self.strip::<V, WHOLE>(start, strip);
                    } else if rows.start < rows.end {
                        for index in 0..self.lines.len() {
                            self.part::<V, WHOLE>(index, &rows, strip);
                        }
                    }
                }
            }
            for index in 0..self.lines.len() {
                // SAFETY: every line has that many numbers, as asserted.
                unsafe {
                    let begun = self.begun.as_ptr().add(index * MAX_LANES * STRIP);
                    let load = |strip: usize| if strip * STRIP < V::LANES { strip * V::LANES } else { 0 };
                    let parts = [
                        V::load(begun.add(load(0))),
                        V::load(begun.add(load(1))),
                        V::load(begun.add(load(2))),
                        V::load(begun.add(load(3))),
                    ];
                    let to = self.out.as_mut_ptr().add(index * BLOCK + first - self.block.start);
                    V::finish_sums(parts).store(to);
                }
            }
        }
    }

    /// Begin the sums of the whole strip of rows from `start` on.
    #[inline(always)]
    unsafe fn strip<V: Vector<Lane = T::Acc> + Memory<T>, const WHOLE: usize>(
        &mut self,
        start: usize,
        strip: usize,
    ) {
        let rows = start..start + STRIP;
        // SAFETY: the caller's promise; lines name columns that exist in all rows that they cover.
        unsafe {
            let x = [
                self.rows.row(start),
                self.rows.row(start + 1),
                self.rows.row(start + 2),
                self.rows.row(start + 3),
            ];
            let mut kept = [[V::splat(T::Acc::ZERO); WHOLE]; STRIP];
            for slot in 0..STRIP {
                for c in 0..WHOLE {
                    kept[slot][c] = <V as Memory<T>>::load(x[slot].add(c * V::LANES));
                }
            }
            for index in 0..self.lines.len() {
                let line = self.lines[index];
                if !line.covers(&rows) {
                    self.part::<V, WHOLE>(index, &rows, strip);
                    continue;
                }
                let (first, step) =
                    (self.matrix.row(line.column(start)), line.step as isize * self.matrix.row_stride());
                let y = [first, first.offset(step), first.offset(2 * step), first.offset(3 * step)];
                let mut sums = [V::splat(T::Acc::ZERO); STRIP];
                for c in 0..WHOLE {
                    for slot in 0..STRIP {
                        let y = <V as Memory<T>>::load(y[slot].add(c * V::LANES));
                        sums[slot] = y.mul_add(kept[slot][c], sums[slot]);
                    }
                }
                let whole = self.whole::<V, WHOLE>();
                for slot in 0..STRIP {
                    sums[slot] =
                        rest_of_dot::<V, T>(x[slot], y[slot], WHOLE, whole, self.matrix.width(), sums[slot]);
                }
                self.begin::<V>(index, strip, sums);
            }
        }
    }

    /// Begin the sums of those of up to [`STRIP`] rows that line `index` covers.
    #[inline(always)]
    unsafe fn part<V: Vector<Lane = T::Acc> + Memory<T>, const WHOLE: usize>(
        &mut self,
        index: usize,
        rows: &Range<usize>,
        strip: usize,
    ) {
        let Some(line) = self.lines[index].within(rows) else { return };
        let whole = self.whole::<V, WHOLE>();
        // SAFETY: as above.
        unsafe {
            let mut sums = [V::splat(T::Acc::ZERO); STRIP];
            for row in line.start..line.end {
                let (x, y) = (self.rows.row(row), self.matrix.row(line.column(row)));
                let sum = &mut sums[row - rows.start];
                *sum = rest_of_dot::<V, T>(x, y, 0, whole, self.matrix.width(), *sum);
            }
            self.begin::<V>(index, strip, sums);
        }
    }

    #[inline(always)]
    unsafe fn begin<V: Vector<Lane = T::Acc>>(&mut self, index: usize, strip: usize, sums: [V; STRIP]) {
        // SAFETY: every line has that many numbers, as asserted.
        unsafe {
            let to = self.begun.as_mut_ptr().add(index * MAX_LANES * STRIP + strip * V::LANES);
            V::begin_sums(sums).store(to);
        }
    }

    /// Whole registers per row.
    #[inline(always)]
    fn whole<V: Vector, const WHOLE: usize>(&self) -> usize {
        if WHOLE > 0 { WHOLE } else { self.matrix.width() / V::LANES }
    }
}

/// Add to `sum` the products of `x` and `y` from register `first` on: up to `whole` whole ones, and what is left of the width.
#[inline(always)]
pub(super) unsafe fn rest_of_dot<V: Vector<Lane = T::Acc> + Memory<T>, T: Element>(
    x: *const T,
    y: *const T,
    first: usize,
    whole: usize,
    width: usize,
    mut sum: V,
) -> V {
    // SAFETY: the caller says that both have `width` channels.
    unsafe {
        for c in first..whole {
            let x = <V as Memory<T>>::load(x.add(c * V::LANES));
            sum = <V as Memory<T>>::load(y.add(c * V::LANES)).mul_add(x, sum);
        }
        let rest = width - whole * V::LANES;
        if rest > 0 {
            let x = <V as Memory<T>>::load_first(x.add(whole * V::LANES), rest);
            sum = <V as Memory<T>>::load_first(y.add(whole * V::LANES), rest).mul_add(x, sum);
        }
        sum
    }
}
