//! The two products that rows scattered over a matrix take part in, for the strips of a batch: dots with them, and weighted sums of
//! them.

use super::batch::{BLOCK, Batch, GROUP, STRIP};
use super::matrix::{Matrix, load_part, padded};
use crate::kernel::element::{Element, Real};
use crate::kernel::simd::{Kernel, MAX_LANES, Memory, Vector};
use crate::kernel::view::RowsMut;

/// `out[place] = rows[row of place] . matrix[column of place]` at every place of `batch` that is an edge, anything at the others.
///
/// # Safety
/// - The instructions of `V` are available;
/// - rows and columns exist, and both matrices are packed and equally wide;
/// - `out` has room for every place.
#[inline(always)]
pub(super) unsafe fn dots<V: Vector, T: Element>(
    rows: &Matrix<T>,
    matrix: &Matrix<T>,
    batch: &Batch,
    out: &mut [T::Acc],
) {
    debug_assert!(rows.width() == matrix.width() && out.len() >= batch.columns.len());
    // SAFETY: the caller's promise.
    unsafe { V::outline(Dots { rows, matrix, batch, out }) }
}

/// The arguments of [`dots`].
struct Dots<'a, T: Element> {
    rows: &'a Matrix<'a, T>,
    matrix: &'a Matrix<'a, T>,
    batch: &'a Batch,
    out: &'a mut [T::Acc],
}

impl<T: Element> Kernel<T> for Dots<'_, T> {
    #[inline(always)]
    unsafe fn run<V: Vector<Lane = T::Acc> + Memory<T>>(self) {
        // SAFETY: the caller's promise; the number of whole registers is that of the width.
        unsafe {
            match self.matrix.width() / V::LANES {
                1 => self.strips::<V, 1>(),
                2 => self.strips::<V, 2>(),
                3 => self.strips::<V, 3>(),
                4 => self.strips::<V, 4>(),
                5 => self.strips::<V, 5>(),
                6 => self.strips::<V, 6>(),
                8 => self.strips::<V, 8>(),
                _ => self.strips::<V, 0>(),
            }
        }
    }
}

impl<T: Element> Dots<'_, T> {
    /// With `WHOLE` whole registers per row, or any number of them if 0.
    #[inline(always)]
    unsafe fn strips<V: Vector<Lane = T::Acc> + Memory<T>, const WHOLE: usize>(self) {
        let Dots { rows, matrix, batch, out } = self;
        let columns = batch.columns.as_ptr();
        for strip in &batch.strips {
            // SAFETY: strips name rows, columns and places that exist; loads stay inside rows.
            unsafe {
                let mut x = [rows.row(strip.row); STRIP];
                for slot in 1..strip.rows {
                    x[slot] = rows.row(strip.row + slot);
                }
                let common = strip.common();
                let mut seen = 0;
                for block in strip.places().step_by(BLOCK) {
                    let (from, to) = (columns.add(block), out.as_mut_ptr().add(block));
                    if seen < common {
                        Self::block::<V, WHOLE>(matrix, &x, from, to);
                    } else {
                        for slot in 0..strip.rows {
                            if seen < strip.lens[slot] as usize {
                                let sums = four_dots::<V, T, WHOLE>(matrix, x[slot], from.add(slot * GROUP));
                                V::sums(sums, &mut *to.add(slot * GROUP).cast());
                            }
                        }
                    }
                    seen += GROUP;
                }
            }
        }
    }

    /// The block at `columns` with edges of all four rows. Written out, so that all sums stay in registers.
    #[inline(always)]
    unsafe fn block<V: Vector<Lane = T::Acc> + Memory<T>, const WHOLE: usize>(
        matrix: &Matrix<T>,
        x: &[*const T; STRIP],
        columns: *const u32,
        out: *mut T::Acc,
    ) {
        // SAFETY: the caller's promise.
        unsafe {
            let mut sums = [V::splat(T::Acc::ZERO); MAX_LANES];
            if V::LANES == 16 {
                let a = four_dots::<V, T, WHOLE>(matrix, x[0], columns);
                let b = four_dots::<V, T, WHOLE>(matrix, x[1], columns.add(4));
                let c = four_dots::<V, T, WHOLE>(matrix, x[2], columns.add(8));
                let d = four_dots::<V, T, WHOLE>(matrix, x[3], columns.add(12));
                for i in 0..4 {
                    (sums[i], sums[4 + i], sums[8 + i], sums[12 + i]) = (a[i], b[i], c[i], d[i]);
                }
                V::sum_each(&sums).store(out);
            } else if V::LANES == 8 {
                for half in 0..2 {
                    let a = four_dots::<V, T, WHOLE>(matrix, x[2 * half], columns.add(8 * half));
                    let b = four_dots::<V, T, WHOLE>(matrix, x[2 * half + 1], columns.add(8 * half + 4));
                    for i in 0..4 {
                        (sums[i], sums[4 + i]) = (a[i], b[i]);
                    }
                    V::sum_each(&sums).store(out.add(8 * half));
                }
            } else {
                for slot in 0..STRIP {
                    let a = four_dots::<V, T, WHOLE>(matrix, x[slot], columns.add(GROUP * slot));
                    sums[..4].copy_from_slice(&a);
                    V::sum_each(&sums).store(out.add(GROUP * slot));
                }
            }
        }
    }
}

/// Products of the row at `x` with four columns, to be summed over lanes.
#[inline(always)]
unsafe fn four_dots<V: Vector<Lane = T::Acc> + Memory<T>, T: Element, const WHOLE: usize>(
    matrix: &Matrix<T>,
    x: *const T,
    columns: *const u32,
) -> [V; GROUP] {
    let width = matrix.width();
    let whole = if WHOLE > 0 { WHOLE } else { width / V::LANES };
    let rest = width - whole * V::LANES;
    // SAFETY: the caller names a row and columns that exist; loads stay inside them.
    unsafe {
        let mut pointers = [matrix.row(*columns as usize); GROUP];
        for i in 1..GROUP {
            pointers[i] = matrix.row(*columns.add(i) as usize);
        }
        let mut sums = [V::splat(T::Acc::ZERO); GROUP];
        for c in 0..whole {
            let x = <V as Memory<T>>::load(x.add(c * V::LANES));
            for i in 0..GROUP {
                sums[i] = <V as Memory<T>>::load(pointers[i].add(c * V::LANES)).mul_add(x, sums[i]);
            }
        }
        if rest > 0 {
            let x = <V as Memory<T>>::load_first(x.add(whole * V::LANES), rest);
            for i in 0..GROUP {
                sums[i] =
                    <V as Memory<T>>::load_first(pointers[i].add(whole * V::LANES), rest).mul_add(x, sums[i]);
            }
        }
        sums
    }
}

/// Where weighted sums of the rows of a batch go.
pub(super) enum Sums<'a, T: Element> {
    /// Added to [`padded`] rows of scratch, the first of which is for row `first`.
    Added { to: &'a mut [T::Acc], first: usize },
    /// Times `factors` (one per strip and row) to the rows of an output.
    Written { to: RowsMut<'a, T>, factors: &'a [[T::Acc; STRIP]] },
}

/// For every row of `batch`, the sum of `weights[place] * matrix[column of place]` over its edges.
///
/// # Safety
/// - The instructions of `V` are available;
/// - columns exist, and `matrix` is packed;
/// - `weights` has a number for every place, and there is room for every row of the batch, which nobody else uses.
#[inline(always)]
pub(super) unsafe fn weighted_sums<V: Vector, T: Element>(
    weights: &[T::Acc],
    matrix: &Matrix<T>,
    batch: &Batch,
    sums: Sums<T>,
) {
    debug_assert!(weights.len() >= batch.columns.len());
    // SAFETY: the caller's promise.
    unsafe { V::outline(WeightedSums { weights, matrix, batch, sums }) }
}

/// The arguments of [`weighted_sums`].
struct WeightedSums<'a, T: Element> {
    weights: &'a [T::Acc],
    matrix: &'a Matrix<'a, T>,
    batch: &'a Batch,
    sums: Sums<'a, T>,
}

impl<T: Element> Kernel<T> for WeightedSums<'_, T> {
    #[inline(always)]
    unsafe fn run<V: Vector<Lane = T::Acc> + Memory<T>>(mut self) {
        let width = self.matrix.width();
        for index in 0..self.batch.strips.len() {
            let mut d = 0;
            // SAFETY: each call touches the columns from `d` on that its condition says exist.
            unsafe {
                // Sixteen sums leave room for the weights in 32 registers, eight in 16.
                while V::REGISTERS >= 32 && d + 4 * V::LANES <= width {
                    self.columns::<V, 4, false>(index, d);
                    d += 4 * V::LANES;
                }
                while d + 2 * V::LANES <= width {
                    self.columns::<V, 2, false>(index, d);
                    d += 2 * V::LANES;
                }
                if d + V::LANES <= width {
                    self.columns::<V, 1, false>(index, d);
                    d += V::LANES;
                }
                if d < width {
                    self.columns::<V, 1, true>(index, d);
                }
            }
        }
    }
}

impl<T: Element> WeightedSums<'_, T> {
    /// The columns from `d` on that `N` registers hold, or with `PART` those that are left, fewer than a register.
    #[inline(always)]
    unsafe fn columns<V: Vector<Lane = T::Acc> + Memory<T>, const N: usize, const PART: bool>(
        &mut self,
        index: usize,
        d: usize,
    ) {
        let strip = &self.batch.strips[index];
        let (columns, weights) = (self.batch.columns.as_ptr(), self.weights.as_ptr());
        let rest = self.matrix.width() - d;
        let common = strip.common();
        // SAFETY: strips name rows, columns and places that exist; loads stay inside rows.
        unsafe {
            let mut totals = [[V::splat(T::Acc::ZERO); N]; STRIP];
            for edge in 0..common {
                let place = strip.place(0, edge);
                for slot in 0..STRIP {
                    let weight = V::splat(*weights.add(place + slot * GROUP));
                    let from = self.matrix.row(*columns.add(place + slot * GROUP) as usize).add(d);
                    for i in 0..N {
                        let values = load_part::<V, T, PART>(from.add(i * V::LANES), rest);
                        totals[slot][i] = values.mul_add(weight, totals[slot][i]);
                    }
                }
            }
            // Written out, so that the sums stay in registers.
            let [a, b, c, e] = totals;
            self.finish::<V, N, PART>(index, 0, d, a);
            self.finish::<V, N, PART>(index, 1, d, b);
            self.finish::<V, N, PART>(index, 2, d, c);
            self.finish::<V, N, PART>(index, 3, d, e);
        }
    }

    /// Add the edges of row `slot` that not all rows of the strip have, and pass the row on.
    #[inline(always)]
    unsafe fn finish<V: Vector<Lane = T::Acc> + Memory<T>, const N: usize, const PART: bool>(
        &mut self,
        index: usize,
        slot: usize,
        d: usize,
        mut totals: [V; N],
    ) {
        let strip = &self.batch.strips[index];
        if slot >= strip.rows {
            return;
        }
        let rest = self.matrix.width() - d;
        // SAFETY: as in `columns`; where sums go has room for the row.
        unsafe {
            for edge in strip.common()..strip.lens[slot] as usize {
                let place = strip.place(slot, edge);
                let weight = V::splat(self.weights[place]);
                let from = self.matrix.row(self.batch.columns[place] as usize).add(d);
                for i in 0..N {
                    totals[i] =
                        load_part::<V, T, PART>(from.add(i * V::LANES), rest).mul_add(weight, totals[i]);
                }
            }
            let row = strip.row + slot;
            match &mut self.sums {
                Sums::Added { to, first } => {
                    let start = (row - *first) * padded(self.matrix.width()) + d;
                    let to = to[start..start + N * V::LANES].as_mut_ptr();
                    for i in 0..N {
                        let to = to.add(i * V::LANES);
                        (V::load(to) + totals[i]).store(to);
                    }
                }
                Sums::Written { to, factors } => {
                    let factor = V::splat(factors[index][slot]);
                    let to = &mut to.row_mut(row)[d..];
                    debug_assert!(to.len() == rest);
                    for i in 0..N {
                        let to = to.as_mut_ptr().add(i * V::LANES);
                        let total = totals[i] * factor;
                        if PART {
                            <V as Memory<T>>::store_first(total, to, rest);
                        } else {
                            <V as Memory<T>>::store(total, to);
                        }
                    }
                }
            }
        }
    }
}
