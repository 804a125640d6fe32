//! Panels of [`PANEL`] tokens, widened to the type that is computed with and laid out for the micro-kernels.

use crate::kernel::cpu::buffer::Buffer;
use crate::kernel::cpu::matrix::{Matrix, padded};
use crate::kernel::cpu::tasks::Head;
use crate::kernel::element::{Element, Real};
use crate::kernel::simd::{Memory, Vector};
use crate::plan::panels::{PANEL, Square};

/// In which order a panel is needed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Order {
    /// `[width][PANEL]`
    Columns,
    /// `[PANEL][width]`
    Rows,
    /// Both.
    Both,
}

/// Panels of one matrix, each in a slot.
pub(super) trait Packed<T: Element> {
    /// Per slot, which tokens are left out because they are not finite; empty where none is ever left out.
    fn wild(&self) -> &[u16];

    /// Fill `slot` with the tokens from `first` on whose bit is set; the others are not read, and zeros.
    ///
    /// # Safety
    /// The instructions of `V` are available, and the tokens exist.
    unsafe fn pack<V>(&mut self, slot: usize, matrix: &Matrix<T>, first: usize, bits: u16)
    where
        V: Vector<Lane = T::Acc> + Memory<T>;
}

/// Room for some panels of one matrix.
#[derive(Debug)]
pub(super) struct Panels<R> {
    /// Padded.
    pub width: usize,
    pub columns: Buffer<R>,
    /// Tokens that are not finite are zeros here and listed in `wild`: a weight of zero would turn them into NaN.
    pub rows: Buffer<R>,
    /// Per panel, which tokens are not finite.
    pub wild: Vec<u16>,
    order: Order,
}

impl<R: Real> Panels<R> {
    pub fn new(width: usize, slots: usize, order: Order) -> Self {
        let width = padded(width);
        let slots_of =
            |kept: bool, least: usize| Buffer::unset(width * PANEL * if kept { slots } else { least });
        Panels {
            width,
            columns: slots_of(order != Order::Rows, 0),
            rows: slots_of(order != Order::Columns, 1),
            wild: vec![0; slots],
            order,
        }
    }

    /// Numbers per panel.
    pub fn size(&self) -> usize {
        self.width * PANEL
    }

    /// Multiply the panel at `slot` by `factors` of its columns and of its rows.
    ///
    /// # Safety
    /// The instructions of `V` are available.
    #[inline(always)]
    pub unsafe fn scale<V: Vector<Lane = R>>(&mut self, columns: R, rows: R) {
        // SAFETY: the caller's promise.
        unsafe {
            crate::kernel::cpu::row::scale::<V>(&mut self.columns, columns);
            if self.order != Order::Columns {
                crate::kernel::cpu::row::scale::<V>(&mut self.rows, rows);
            }
        }
    }
}

impl<T: Element> Packed<T> for Panels<T::Acc> {
    fn wild(&self) -> &[u16] {
        &self.wild
    }

    #[inline(always)]
    unsafe fn pack<V>(&mut self, slot: usize, matrix: &Matrix<T>, first: usize, bits: u16)
    where
        V: Vector<Lane = T::Acc> + Memory<T>,
    {
        let (width, size) = (self.width, self.width * PANEL);
        let at = if self.order == Order::Columns { 0 } else { slot * size };
        let rows = &mut self.rows[at..at + size];
        for (token, to) in rows.chunks_exact_mut(width).enumerate() {
            if bits >> token & 1 != 0 {
                // SAFETY: the caller says that the token exists; rows have padded width.
                unsafe { matrix.stage::<V>(first + token, to) };
            } else {
                to.fill(T::Acc::ZERO);
            }
        }
        if self.order != Order::Rows {
            let columns = &mut self.columns[slot * size..(slot + 1) * size];
            for column in (0..width).step_by(V::LANES) {
                for row in (0..PANEL).step_by(V::LANES) {
                    // SAFETY: whole registers divide a panel and a padded width, so the squares lie inside both.
                    unsafe {
                        let from = rows.as_ptr().add(row * width + column);
                        V::transpose(from, width, columns.as_mut_ptr().add(column * PANEL + row), PANEL);
                    }
                }
            }
        }
        if self.order != Order::Columns {
            self.wild[slot] = 0;
            // SAFETY: the caller's promise.
            if !unsafe { is_finite::<V>(rows) } {
                for (token, row) in rows.chunks_exact_mut(width).enumerate() {
                    // SAFETY: the caller's promise.
                    if !unsafe { is_finite::<V>(row) } {
                        row.fill(T::Acc::ZERO);
                        self.wild[slot] |= 1 << token;
                    }
                }
            }
        }
    }
}

/// Whether all of `numbers`, whole registers, are finite.
#[inline(always)]
unsafe fn is_finite<V: Vector>(numbers: &[V::Lane]) -> bool {
    // SAFETY: whole registers inside the slice.
    unsafe {
        let zero = V::splat(V::Lane::ZERO);
        let mut sum = zero;
        for i in (0..numbers.len()).step_by(V::LANES) {
            sum = V::load(numbers.as_ptr().add(i)).mul_add(zero, sum);
        }
        sum.sum() == V::Lane::ZERO
    }
}

/// Packed keys and values of one head after the other, kept while tiles that share them follow each other.
#[derive(Debug)]
pub(super) struct Keys<P> {
    pub k: P,
    pub v: P,
    /// Per slot: whose panel it holds.
    tags: Vec<Option<(usize, usize)>>,
    /// Per slot: the last use.
    used: Vec<u64>,
    now: u64,
    /// Per slot: the keys that exist and that `key_mask` allows.
    pub allowed: Vec<u16>,
}

impl<P> Keys<P> {
    /// `k` and `v` have room for `slots` panels.
    pub fn new(k: P, v: P, slots: usize) -> Self {
        Keys { k, v, tags: vec![None; slots], used: vec![0; slots], now: 0, allowed: vec![0; slots] }
    }

    /// The number of slots.
    pub fn len(&self) -> usize {
        self.tags.len()
    }

    /// Replace `slots` by where the panels of `squares`, no more than there are slots, are packed. `head` is number `unit` of the
    /// call's heads of k and v.
    ///
    /// # Safety
    /// The instructions of `V` are available.
    #[inline(always)]
    pub unsafe fn find<V, T>(
        &mut self,
        head: &Head<T>,
        unit: usize,
        squares: &[Square],
        slots: &mut Vec<usize>,
    ) where
        T: Element,
        P: Packed<T>,
        V: Vector<Lane = T::Acc> + Memory<T>,
    {
        assert!(squares.len() <= self.tags.len());
        self.now += 1;
        slots.clear();
        for square in squares {
            let tag = Some((unit, square.panel));
            let mut slot = square.panel % self.tags.len();
            // A slot that this very list uses for another panel is passed over.
            while self.tags[slot] != tag && self.used[slot] == self.now {
                slot = (slot + 1) % self.tags.len();
            }
            self.used[slot] = self.now;
            if self.tags[slot] != tag {
                let first = square.panel * PANEL;
                let mut allowed = 0;
                for key in first..(first + PANEL).min(head.k.rows()) {
                    allowed |= u16::from(head.allowed().keeps_key(key)) << (key - first);
                }
                // SAFETY: allowed keys exist.
                unsafe {
                    self.k.pack::<V>(slot, &head.k, first, allowed);
                    self.v.pack::<V>(slot, &head.v, first, allowed);
                }
                self.allowed[slot] = allowed;
                self.tags[slot] = tag;
            }
            slots.push(slot);
        }
    }
}

/// `to += weight * token`, for a token that panels by rows lack.
#[inline(always)]
pub(super) unsafe fn add_wild<V: Vector>(token: &[V::Lane], weight: V::Lane, to: &mut [V::Lane]) {
    assert!(token.len() >= to.len() && to.len().is_multiple_of(V::LANES));
    // SAFETY: whole registers, as asserted.
    unsafe {
        let weight = V::splat(weight);
        for d in (0..to.len()).step_by(V::LANES) {
            let place = to.as_mut_ptr().add(d);
            V::load(token.as_ptr().add(d)).mul_add(weight, V::load(place)).store(place);
        }
    }
}

/// The places of the bits that are set.
pub(super) fn set_bits(bits: u16) -> impl Iterator<Item = usize> {
    (0..PANEL).filter(move |place| bits >> place & 1 != 0)
}
