//! The two products that everything is made of, on squares of [`PANEL`] x [`PANEL`] numbers whose sums stay in registers.
//!
//! A panel of tokens is stored by columns (`[width][PANEL]`, for products over channels) or by rows (`[PANEL][width]`, for weighted
//! sums of tokens). Squares of scores are `[query][key]`.

use crate::kernel::cpu::matrix::CHAIN;
use crate::kernel::element::Real;
use crate::kernel::simd::{Kernel, Memory, Vector};
use crate::plan::panels::{PANEL, Square};

/// Numbers per square.
pub(super) const SQUARE: usize = PANEL * PANEL;

/// `scores[s][i][j] = sum_d tile[d][i] * panels[slots[s]][d][j]`, except for halves of squares that keep nothing.
pub(super) struct Scores<'a, R> {
    /// The queries, by columns.
    pub tile: &'a [R],
    /// Packed panels by columns, each of `padded` width.
    pub panels: &'a [R],
    pub width: usize,
    pub dim: usize,
    pub squares: &'a [Square],
    pub slots: &'a [usize],
    pub scores: &'a mut [R],
}

impl<R: Real> Kernel<R> for Scores<'_, R> {
    #[inline(always)]
    unsafe fn run<V: Vector<Lane = R> + Memory<R>>(self) {
        let Scores { tile, panels, width, dim, squares, slots, scores } = self;
        let size = width * PANEL;
        assert!(squares.len() == slots.len() && scores.len() >= squares.len() * SQUARE);
        assert!(
            dim <= width && tile.len() >= size && slots.iter().all(|slot| (slot + 1) * size <= panels.len())
        );
        // Three panels of one register and eight rows are 24 sums, with room for their factors in 32 registers.
        let whole = V::LANES == PANEL && V::REGISTERS >= 32;
        for (group, part) in squares.chunks(3).enumerate() {
            let panel = |index: usize| {
                let slot = slots[3 * group + index.min(part.len() - 1)];
                // SAFETY: the slot was found inside the panels.
                unsafe { panels.as_ptr().add(slot * size) }
            };
            for half in 0..2 {
                if !part.iter().any(|square| square.halves[half]) {
                    continue;
                }
                let row = half * PANEL / 2;
                // SAFETY: the tile has PANEL columns of `dim` numbers, as every panel has, and every square has its scores.
                unsafe {
                    let tile = tile.as_ptr().add(row);
                    let out = scores.as_mut_ptr().add(3 * group * SQUARE + row * PANEL);
                    match (whole, part.len()) {
                        (true, 3) => scores_of::<V, 8, 3>(tile, [0, 1, 2].map(panel), out, SQUARE, dim),
                        (true, 2) => scores_of::<V, 8, 2>(tile, [0, 1].map(panel), out, SQUARE, dim),
                        (true, _) => scores_of::<V, 8, 1>(tile, [0].map(panel), out, SQUARE, dim),
                        (false, _) => {
                            for index in 0..part.len() {
                                narrow_scores::<V>(tile, panel(index), out.add(index * SQUARE), dim);
                            }
                        }
                    }
                }
            }
        }
    }
}

/// Eight rows of one square, for registers shorter than a panel or few.
#[inline(always)]
unsafe fn narrow_scores<V: Vector>(
    tile: *const V::Lane,
    panel: *const V::Lane,
    out: *mut V::Lane,
    dim: usize,
) {
    // SAFETY: the caller's promise; two registers divide a panel evenly.
    unsafe {
        for column in (0..PANEL).step_by(2 * V::LANES) {
            let panels = [panel.add(column), panel.add(column + V::LANES)];
            if V::REGISTERS >= 32 {
                scores_of::<V, 8, 2>(tile, panels, out.add(column), V::LANES, dim);
            } else {
                for row in [0, 4] {
                    let out = out.add(row * PANEL + column);
                    scores_of::<V, 4, 2>(tile.add(row), panels, out, V::LANES, dim);
                }
            }
        }
    }
}

/// `M` rows of scores with the keys of `N` registers.
#[inline(always)]
unsafe fn scores_of<V: Vector, const M: usize, const N: usize>(
    tile: *const V::Lane,
    panels: [*const V::Lane; N],
    out: *mut V::Lane,
    out_step: usize,
    dim: usize,
) {
    // SAFETY: the caller says that these places exist.
    unsafe {
        for first in (0..dim).step_by(CHAIN) {
            let mut sums = [[V::splat(V::Lane::ZERO); N]; M];
            for d in first..dim.min(first + CHAIN) {
                let mut keys = [V::splat(V::Lane::ZERO); N];
                for j in 0..N {
                    keys[j] = V::load(panels[j].add(d * PANEL));
                }
                for i in 0..M {
                    let query = V::splat(*tile.add(d * PANEL + i));
                    for j in 0..N {
                        sums[i][j] = keys[j].mul_add(query, sums[i][j]);
                    }
                }
            }
            for i in 0..M {
                for j in 0..N {
                    let place = out.add(i * PANEL + j * out_step);
                    let sum = if first == 0 { sums[i][j] } else { V::load(place) + sums[i][j] };
                    sum.store(place);
                }
            }
        }
    }
}

/// `out[i] += sum_s sum_j weights[s][i][j] * panels[slots[s]][j]`: weighted sums of keys or values for the queries of a tile.
pub(super) struct SumOfKeys<'a, R> {
    pub weights: &'a [R],
    /// Packed panels by rows.
    pub panels: &'a [R],
    pub width: usize,
    pub squares: &'a [Square],
    pub slots: &'a [usize],
    /// `PANEL` rows of `width`.
    pub out: &'a mut [R],
}

impl<R: Real> Kernel<R> for SumOfKeys<'_, R> {
    #[inline(always)]
    unsafe fn run<V: Vector<Lane = R> + Memory<R>>(self) {
        let SumOfKeys { weights, panels, width, squares, slots, out } = self;
        let size = width * PANEL;
        assert!(squares.len() == slots.len() && weights.len() >= squares.len() * SQUARE && out.len() >= size);
        assert!(slots.iter().all(|slot| (slot + 1) * size <= panels.len()));
        for half in 0..2 {
            let terms = || {
                let all = squares.iter().zip(slots).enumerate();
                all.filter(move |(_, (square, _))| square.halves[half]).map(|(index, (_, slot))| Term {
                    weights: weights[index * SQUARE + half * SQUARE / 2..].as_ptr(),
                    rows: panels[slot * size..].as_ptr(),
                })
            };
            // SAFETY: `out` has PANEL rows.
            let out = unsafe { out.as_mut_ptr().add(half * size / 2) };
            // SAFETY: the places of the terms, and of eight rows, exist.
            unsafe { sums::<V, false, _>(&terms, PANEL, width, out) };
        }
    }
}

/// `out[j] += sum_i weights[i][j] * tile[i]`: what the queries of a tile give to the keys of one panel.
pub(super) struct SumOfQueries<'a, R> {
    pub weights: &'a [R],
    /// The queries, by rows.
    pub tile: &'a [R],
    pub width: usize,
    pub halves: [bool; 2],
    /// `PANEL` rows of `width`.
    pub out: &'a mut [R],
}

impl<R: Real> Kernel<R> for SumOfQueries<'_, R> {
    #[inline(always)]
    unsafe fn run<V: Vector<Lane = R> + Memory<R>>(self) {
        let SumOfQueries { weights, tile, width, halves, out } = self;
        assert!(weights.len() >= SQUARE && tile.len() >= width * PANEL && out.len() >= width * PANEL);
        let (first, depth) = match halves {
            [true, true] => (0, PANEL),
            [false, true] => (PANEL / 2, PANEL / 2),
            [true, false] => (0, PANEL / 2),
            [false, false] => return,
        };
        for half in 0..2 {
            let terms = || {
                std::iter::once(Term {
                    weights: weights[first * PANEL + half * PANEL / 2..].as_ptr(),
                    rows: tile[first * width..].as_ptr(),
                })
            };
            // SAFETY: `out` has PANEL rows.
            let out = unsafe { out.as_mut_ptr().add(half * PANEL / 2 * width) };
            // SAFETY: the places of the term, and of eight rows, exist.
            unsafe { sums::<V, true, _>(&terms, depth, width, out) };
        }
    }
}

/// Some rows to be summed, and the first of their weights.
struct Term<R> {
    weights: *const R,
    rows: *const R,
}

/// Add weighted sums to eight rows at `out`. The weight of row j in sum i is `weights[i][j]`, or `weights[j][i]` if `TRANSPOSED`.
#[inline(always)]
unsafe fn sums<V: Vector, const TRANSPOSED: bool, I: Iterator<Item = Term<V::Lane>>>(
    terms: &impl Fn() -> I,
    depth: usize,
    width: usize,
    out: *mut V::Lane,
) {
    let mut column = 0;
    while column < width {
        let left = (width - column) / V::LANES;
        // SAFETY: the caller says that eight rows of `width` exist.
        let taken = unsafe {
            let out = out.add(column);
            if V::REGISTERS >= 32 {
                // Four registers go as two and two, so that no column is left alone.
                match left {
                    1 => sums_of::<V, 8, 1, TRANSPOSED>(terms(), depth, width, column, out, 0),
                    2 | 4 => sums_of::<V, 8, 2, TRANSPOSED>(terms(), depth, width, column, out, 0),
                    _ => sums_of::<V, 8, 3, TRANSPOSED>(terms(), depth, width, column, out, 0),
                }
            } else {
                for row in [0, 4] {
                    let out = out.add(row * width);
                    match left {
                        1 => sums_of::<V, 4, 1, TRANSPOSED>(terms(), depth, width, column, out, row),
                        _ => sums_of::<V, 4, 2, TRANSPOSED>(terms(), depth, width, column, out, row),
                    };
                }
                left.min(2)
            }
        };
        column += taken * V::LANES;
    }
}

/// [`sums`] for `M` rows, from `row` on, and `N` registers of columns; gives `N`.
#[inline(always)]
unsafe fn sums_of<V: Vector, const M: usize, const N: usize, const TRANSPOSED: bool>(
    terms: impl Iterator<Item = Term<V::Lane>>,
    depth: usize,
    width: usize,
    column: usize,
    out: *mut V::Lane,
    row: usize,
) -> usize {
    let (step, across) = if TRANSPOSED { (PANEL, 1) } else { (1, PANEL) };
    // SAFETY: the caller says that these places exist.
    unsafe {
        for term in terms {
            let weights = term.weights.add(row * across);
            let rows = term.rows.add(column);
            // A panel's rows alone are one chain: a chain of all tokens rounds several times as much as dense torch does.
            let mut sums = [[V::splat(V::Lane::ZERO); N]; M];
            for k in 0..depth {
                let mut values = [V::splat(V::Lane::ZERO); N];
                for j in 0..N {
                    values[j] = V::load(rows.add(k * width + j * V::LANES));
                }
                for i in 0..M {
                    let weight = V::splat(*weights.add(k * step + i * across));
                    for j in 0..N {
                        sums[i][j] = values[j].mul_add(weight, sums[i][j]);
                    }
                }
            }
            for i in 0..M {
                for j in 0..N {
                    let place = out.add(i * width + j * V::LANES);
                    (V::load(place) + sums[i][j]).store(place);
                }
            }
        }
    }
    N
}
