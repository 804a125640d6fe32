//! Products of bfloat16 in pairs, where the machine has them.
//!
//! Weights are rounded to bfloat16 before they multiply values, as dense attention in bfloat16 does; their sum is not.

use half::bf16;

use super::micro::SQUARE;
use super::packed::Packed;
use super::products::{Products, Tile};
use crate::kernel::cpu::buffer::Buffer;
use crate::kernel::cpu::matrix::{Matrix, padded};
use crate::kernel::element::Element;
use crate::kernel::simd::pairs::{DEPTH, Pairs, Term, narrow};
use crate::kernel::simd::{Memory, Vector};
use crate::plan::panels::PANEL;

/// How the numbers of a panel lie.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Layout {
    /// `[PANEL][width]`: queries.
    Rows,
    /// `[width / 2][PANEL][2]`: keys, for products over channels.
    Channels,
    /// `[PANEL / 2][width][2]`: values, for weighted sums of tokens.
    Tokens,
}

/// Room for some panels of one matrix.
#[derive(Debug)]
pub(super) struct PairPanels {
    /// Padded.
    width: usize,
    layout: Layout,
    numbers: Buffer<bf16>,
    /// Tokens of a panel as they come.
    rows: Buffer<bf16>,
    /// Of values per slot, which tokens are not finite: a weight of zero would turn them into NaN.
    wild: Vec<u16>,
}

impl PairPanels {
    fn new(width: usize, slots: usize, layout: Layout) -> Self {
        let wild = vec![0; if layout == Layout::Tokens { slots } else { 0 }];
        let numbers = Buffer::unset(width * PANEL * slots);
        PairPanels { width, layout, numbers, rows: Buffer::unset(width * PANEL), wild }
    }

    /// Where the panel at `slot` begins.
    fn panel(&self, slot: usize) -> *const bf16 {
        let size = self.width * PANEL;
        self.numbers[slot * size..(slot + 1) * size].as_ptr()
    }
}

impl<T: Element> Packed<T> for PairPanels {
    fn wild(&self) -> &[u16] {
        &self.wild
    }

    #[inline(always)]
    unsafe fn pack<V>(&mut self, slot: usize, matrix: &Matrix<T>, first: usize, bits: u16)
    where
        V: Vector<Lane = T::Acc> + Memory<T>,
    {
        let (width, size) = (self.width, self.width * PANEL);
        let to = &mut self.numbers[slot * size..(slot + 1) * size];
        let rows = if self.layout == Layout::Rows { &mut *to } else { &mut *self.rows };
        for (token, to) in rows.chunks_exact_mut(width).enumerate() {
            let taken = if bits >> token & 1 != 0 { matrix.width() } else { 0 };
            // SAFETY: the caller says that the token exists.
            unsafe { copy_row(matrix, first + token, &mut to[..taken]) };
            to[taken..].fill(bf16::ZERO);
        }
        match self.layout {
            Layout::Rows => (),
            Layout::Channels => {
                // Pairs of channels are turned as the numbers of 32 bits that they are.
                let (from, to) = (self.rows.as_ptr().cast::<V::Lane>(), to.as_mut_ptr().cast::<V::Lane>());
                for pair in (0..width / 2).step_by(V::LANES) {
                    for row in (0..PANEL).step_by(V::LANES) {
                        // SAFETY: whole registers divide a panel and half a padded width, and both places are that large.
                        unsafe {
                            V::transpose(
                                from.add(row * width / 2 + pair),
                                width / 2,
                                to.add(pair * PANEL + row),
                                PANEL,
                            );
                        }
                    }
                }
            }
            Layout::Tokens => {
                self.wild[slot] = 0;
                for (token, row) in self.rows.chunks_exact_mut(width).enumerate() {
                    if !is_finite(row) {
                        row.fill(bf16::ZERO);
                        self.wild[slot] |= 1 << token;
                    }
                }
                for (to, rows) in to.chunks_exact_mut(2 * width).zip(self.rows.chunks_exact(2 * width)) {
                    let (even, odd) = rows.split_at(width);
                    for (to, (&even, &odd)) in to.chunks_exact_mut(2).zip(even.iter().zip(odd)) {
                        to[0] = even;
                        to[1] = odd;
                    }
                }
            }
        }
    }
}

/// Copy the first numbers of a row.
///
/// # Safety
/// The row exists and has as many.
#[inline(always)]
unsafe fn copy_row<T: Element>(matrix: &Matrix<T>, row: usize, to: &mut [bf16]) {
    assert!(T::IS_BF16);
    // SAFETY: the caller's promise; `T` is `bf16`.
    unsafe {
        if matrix.is_packed() && !to.is_empty() {
            let from: *const bf16 = matrix.row(row).cast();
            // Whole registers, because a call of `memcpy` takes longer than so few numbers.
            let (whole, rest) = to.as_chunks_mut::<32>();
            for (i, to) in whole.iter_mut().enumerate() {
                *to = from.add(32 * i).cast::<[bf16; 32]>().read_unaligned();
            }
            let first = 32 * whole.len();
            for (i, to) in rest.iter_mut().enumerate() {
                *to = from.add(first + i).read();
            }
        } else {
            for (d, to) in to.iter_mut().enumerate() {
                *to = std::ptr::from_ref(&matrix.at(row, d)).cast::<bf16>().read();
            }
        }
    }
}

#[inline(always)]
fn is_finite(row: &[bf16]) -> bool {
    const EXPONENT: u16 = 0x7f80;
    row.iter().fold(true, |finite, number| finite & (number.to_bits() & EXPONENT != EXPONENT))
}

/// What a thread keeps from tile to tile.
#[derive(Debug)]
pub(super) struct Room {
    terms: Vec<Term>,
    /// Weights of a tile's squares.
    rounded: Buffer<bf16>,
}

// SAFETY: the pointers among the terms are written and read within one tile, by one thread.
unsafe impl Send for Room {}

impl Room {
    fn list<T: Element>(&mut self, tile: &Tile<T, Pairs>, panels: &PairPanels) {
        self.terms.clear();
        let all = tile.squares.iter().zip(tile.slots);
        self.terms
            .extend(all.map(|(square, &slot)| Term { panel: panels.panel(slot), halves: square.halves }));
    }
}

impl<T: Element> Products<T> for Pairs {
    type Panels = PairPanels;
    type Room = Room;

    fn bytes_per_key(dim: usize, value_dim: usize) -> usize {
        (dim.next_multiple_of(DEPTH) + padded(value_dim)) * size_of::<bf16>()
    }

    fn queries(dim: usize) -> PairPanels {
        PairPanels::new(dim.next_multiple_of(DEPTH), 1, Layout::Rows)
    }

    fn keys(dim: usize, slots: usize) -> PairPanels {
        PairPanels::new(dim.next_multiple_of(DEPTH), slots, Layout::Channels)
    }

    fn values(value_dim: usize, slots: usize) -> PairPanels {
        PairPanels::new(padded(value_dim), slots, Layout::Tokens)
    }

    fn room(squares: usize) -> Room {
        Room { terms: Vec::new(), rounded: Buffer::unset(squares * SQUARE) }
    }

    /// Queries multiplied by it would have to be rounded.
    fn left_of_scale(scale: T::Acc) -> T::Acc {
        scale
    }

    unsafe fn begin(self) {
        // SAFETY: the caller's promise.
        unsafe { Pairs::begin(self) }
    }

    unsafe fn finish(self) {
        // SAFETY: the caller's promise.
        unsafe { Pairs::finish(self) }
    }

    #[inline(always)]
    unsafe fn pack_queries<V>(
        queries: &mut PairPanels,
        matrix: &Matrix<T>,
        first: usize,
        bits: u16,
        _scale: T::Acc,
    ) where
        V: Vector<Lane = T::Acc> + Memory<T>,
    {
        // SAFETY: the caller's promise.
        unsafe { queries.pack::<V>(0, matrix, first, bits) }
    }

    #[inline(always)]
    unsafe fn scores<V>(self, room: &mut Room, tile: &Tile<T, Self>, scores: &mut [T::Acc])
    where
        V: Vector<Lane = T::Acc> + Memory<T>,
    {
        assert!(T::IS_BF16 && scores.len() >= tile.squares.len() * SQUARE);
        assert!(tile.queries.width == tile.keys.width);
        room.list(tile, tile.keys);
        let queries = tile.queries.panel(0);
        // SAFETY: sizes as asserted; `T::Acc` is f32, and the panels were found.
        unsafe { Pairs::scores(self, queries, tile.keys.width, &room.terms, scores.as_mut_ptr().cast()) }
    }

    #[inline(always)]
    unsafe fn add_sums<V>(
        self,
        room: &mut Room,
        tile: &Tile<T, Self>,
        weights: &[T::Acc],
        sums: &mut [T::Acc],
    ) where
        V: Vector<Lane = T::Acc> + Memory<T>,
    {
        let numbers = tile.squares.len() * SQUARE;
        assert!(T::IS_BF16 && weights.len() >= numbers && room.rounded.len() >= numbers);
        let width = tile.values.width;
        assert!(sums.len() >= PANEL * width);
        room.list(tile, tile.values);
        // SAFETY: sizes as asserted; `T::Acc` is f32, the panels were found, and a machine with pairs can narrow.
        unsafe {
            narrow(weights.as_ptr().cast(), room.rounded.as_mut_ptr(), numbers);
            for (square, rounded) in tile.squares.iter().zip(room.rounded.chunks_exact_mut(SQUARE)) {
                for half in (0..2).filter(|&half| !square.halves[half]) {
                    rounded[half * SQUARE / 2..(half + 1) * SQUARE / 2].fill(bf16::ZERO);
                }
            }
            Pairs::add_sums(self, room.rounded.as_ptr(), &room.terms, width, sums.as_mut_ptr().cast());
        }
    }
}
