//! Weighted sums of the columns that lines have in rows.

use std::ops::Range;

use super::STRIP;
use crate::kernel::cpu::matrix::{Matrix, load_part};
use crate::kernel::element::{Element, Real};
use crate::kernel::simd::{Kernel, Memory, Vector};
use crate::kernel::view::RowsMut;
use crate::plan::lines::Line;

/// For every row of a block, the sum of `weights[place of the edge] * matrix[column of the edge]` over the row's edges, line after line,
/// times the row's factor.
///
/// To run it: the instructions are available, columns and places exist, `matrix` is packed, and nobody else uses the rows of `to`.
pub(super) struct Sums<'a, T: Element> {
    pub weights: &'a [T::Acc],
    pub matrix: &'a Matrix<'a, T>,
    /// Cut to the block.
    pub lines: &'a [Line],
    pub block: Range<usize>,
    /// One per row of the block; ones if there are none.
    pub factors: Option<&'a [T::Acc]>,
    pub to: RowsMut<'a, T>,
    /// Whether `to` is too large to stay in the caches: then it goes past them, and [`fence`] comes before another thread reads.
    ///
    /// [`fence`]: crate::kernel::simd::fence
    pub past_caches: bool,
    /// Room for a list of lines.
    pub active: &'a mut Vec<Line>,
}

impl<T: Element> Kernel<T> for Sums<'_, T> {
    #[inline(always)]
    unsafe fn run<V: Vector<Lane = T::Acc> + Memory<T>>(mut self) {
        assert!(self.factors.is_none_or(|factors| factors.len() >= self.block.len()));
        let (mut row, mut until) = (self.block.start, self.block.start);
        while row < self.block.end {
            if row >= until {
                until = self.activate(row);
            }
            // SAFETY: the caller's promise; all active lines cover the rows.
            unsafe {
                if row + STRIP <= until {
                    self.rows::<V, STRIP>(row);
                    row += STRIP;
                } else {
                    self.rows::<V, 1>(row);
                    row += 1;
                }
            }
        }
    }
}

impl<T: Element> Sums<'_, T> {
    /// List the lines through `row`, and tell up to which row they are the same.
    fn activate(&mut self, row: usize) -> usize {
        self.active.clear();
        let mut until = self.block.end;
        for line in self.lines {
            if line.start > row {
                until = until.min(line.start);
            } else if line.end > row {
                until = until.min(line.end);
                self.active.push(*line);
            }
        }
        until
    }

    /// `ROWS` rows from `row` on, which all active lines cover.
    #[inline(always)]
    unsafe fn rows<V: Vector<Lane = T::Acc> + Memory<T>, const ROWS: usize>(&mut self, row: usize) {
        let width = self.matrix.width();
        let mut d = 0;
        // SAFETY: each call touches the channels from `d` on that its condition says exist.
        unsafe {
            // Sixteen sums leave room for the weights in 32 registers, eight in 16.
            while V::REGISTERS >= 32 && d + 4 * V::LANES <= width {
                self.channels::<V, ROWS, 4, false>(row, d);
                d += 4 * V::LANES;
            }
            while d + 2 * V::LANES <= width {
                self.channels::<V, ROWS, 2, false>(row, d);
                d += 2 * V::LANES;
            }
            if d + V::LANES <= width {
                self.channels::<V, ROWS, 1, false>(row, d);
                d += V::LANES;
            }
            if d < width {
                self.channels::<V, ROWS, 1, true>(row, d);
            }
        }
    }

    /// The channels from `d` on that `N` registers hold, or with `PART` those that are left, fewer than a register.
    #[inline(always)]
    unsafe fn channels<V, const ROWS: usize, const N: usize, const PART: bool>(
        &mut self,
        row: usize,
        d: usize,
    ) where
        V: Vector<Lane = T::Acc> + Memory<T>,
    {
        let rest = self.matrix.width() - d;
        // SAFETY: the caller's promise.
        unsafe {
            let mut totals = [[V::splat(T::Acc::ZERO); N]; ROWS];
            for line in &*self.active {
                let place = line.place(row);
                debug_assert!(place + ROWS <= self.weights.len());
                let weights = self.weights.as_ptr().add(place);
                let (first, step) =
                    (self.matrix.row(line.column(row)).add(d), line.step as isize * self.matrix.row_stride());
                for slot in 0..ROWS {
                    let weight = V::splat(*weights.add(slot));
                    let from = first.offset(slot as isize * step);
                    for i in 0..N {
                        let values = load_part::<V, T, PART>(from.add(i * V::LANES), rest);
                        totals[slot][i] = values.mul_add(weight, totals[slot][i]);
                    }
                }
            }
            for slot in 0..ROWS {
                let factor = match self.factors {
                    Some(factors) => factors[row + slot - self.block.start],
                    None => T::Acc::ONE,
                };
                let factor = V::splat(factor);
                let to = self.to.row_mut(row + slot)[d..].as_mut_ptr();
                for i in 0..N {
                    let total = totals[slot][i] * factor;
                    if PART {
                        <V as Memory<T>>::store_first(total, to, rest);
                    } else if self.past_caches {
                        <V as Memory<T>>::store_past_caches(total, to.add(i * V::LANES));
                    } else {
                        <V as Memory<T>>::store(total, to.add(i * V::LANES));
                    }
                }
            }
        }
    }
}
