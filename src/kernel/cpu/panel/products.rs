//! What a tile of queries is computed with: how its panels are packed, and the two products of the forward pass.

use super::micro::{Scores, SumOfKeys};
use super::packed::{Order, Packed, Panels};
use crate::kernel::cpu::matrix::{Matrix, padded};
use crate::kernel::element::{Element, Real};
use crate::kernel::simd::{Memory, Vector};
use crate::plan::panels::Square;

/// A way to compute scores and weighted sums of values.
pub(super) trait Products<T: Element>: Copy + Send + Sync {
    /// Packed queries, keys or values.
    type Panels: Packed<T>;
    /// What a thread keeps for it from tile to tile.
    type Room;

    /// Bytes of a packed key and its value.
    fn bytes_per_key(dim: usize, value_dim: usize) -> usize;
    /// Room for a tile of queries.
    fn queries(dim: usize) -> Self::Panels;
    /// Room for so many panels of keys.
    fn keys(dim: usize, slots: usize) -> Self::Panels;
    /// Room for so many panels of values.
    fn values(value_dim: usize, slots: usize) -> Self::Panels;
    /// Room for tiles of up to so many squares.
    fn room(squares: usize) -> Self::Room;

    /// What scores have to be multiplied by, where they should be multiplied by `scale`.
    fn left_of_scale(scale: T::Acc) -> T::Acc;

    /// Get ready on this thread; [`Self::finish`] comes afterwards.
    ///
    /// # Safety
    /// The machine has what this multiplies with.
    unsafe fn begin(self);

    /// Leave this thread as it was.
    ///
    /// # Safety
    /// [`Self::begin`] came before.
    unsafe fn finish(self);

    /// Pack the queries from `first` on whose bit is set, multiplied by what [`Self::left_of_scale`] leaves out.
    ///
    /// # Safety
    /// The instructions of `V` are available, and the queries exist.
    unsafe fn pack_queries<V>(
        queries: &mut Self::Panels,
        matrix: &Matrix<T>,
        first: usize,
        bits: u16,
        scale: T::Acc,
    ) where
        V: Vector<Lane = T::Acc> + Memory<T>;

    /// The scores of a tile with the keys of some squares, except for halves of squares that keep nothing.
    ///
    /// # Safety
    /// The instructions of `V` are available; between [`Self::begin`] and [`Self::finish`].
    unsafe fn scores<V>(self, room: &mut Self::Room, tile: &Tile<T, Self>, scores: &mut [T::Acc])
    where
        V: Vector<Lane = T::Acc> + Memory<T>;

    /// Add the weighted sums of the values of some squares to a tile's rows. Weights of halves of squares that keep nothing mean
    /// nothing.
    ///
    /// # Safety
    /// The instructions of `V` are available; between [`Self::begin`] and [`Self::finish`].
    unsafe fn add_sums<V>(
        self,
        room: &mut Self::Room,
        tile: &Tile<T, Self>,
        weights: &[T::Acc],
        sums: &mut [T::Acc],
    ) where
        V: Vector<Lane = T::Acc> + Memory<T>;
}

/// A tile of queries, the squares it has to do with, and where their panels are.
pub(super) struct Tile<'a, T: Element, P: Products<T>> {
    pub queries: &'a P::Panels,
    pub keys: &'a P::Panels,
    pub values: &'a P::Panels,
    /// Channels of queries and keys.
    pub dim: usize,
    pub squares: &'a [Square],
    pub slots: &'a [usize],
}

/// Everything is widened to the type that is computed with.
#[derive(Debug, Clone, Copy)]
pub(super) struct Widened;

impl<T: Element> Products<T> for Widened {
    type Panels = Panels<T::Acc>;
    type Room = ();

    fn bytes_per_key(dim: usize, value_dim: usize) -> usize {
        (padded(dim) + padded(value_dim)) * size_of::<T::Acc>()
    }

    fn queries(dim: usize) -> Panels<T::Acc> {
        Panels::new(dim, 1, Order::Columns)
    }

    fn keys(dim: usize, slots: usize) -> Panels<T::Acc> {
        Panels::new(dim, slots, Order::Columns)
    }

    fn values(value_dim: usize, slots: usize) -> Panels<T::Acc> {
        Panels::new(value_dim, slots, Order::Rows)
    }

    fn room(_squares: usize) {}

    /// Queries are multiplied by it instead: there are fewer of them than scores.
    fn left_of_scale(_scale: T::Acc) -> T::Acc {
        T::Acc::ONE
    }

    unsafe fn begin(self) {}

    unsafe fn finish(self) {}

    #[inline(always)]
    unsafe fn pack_queries<V>(
        queries: &mut Panels<T::Acc>,
        matrix: &Matrix<T>,
        first: usize,
        bits: u16,
        scale: T::Acc,
    ) where
        V: Vector<Lane = T::Acc> + Memory<T>,
    {
        // SAFETY: the caller's promise.
        unsafe {
            queries.pack::<V>(0, matrix, first, bits);
            queries.scale::<V>(scale, T::Acc::ONE);
        }
    }

    #[inline(always)]
    unsafe fn scores<V>(self, _room: &mut (), tile: &Tile<T, Self>, scores: &mut [T::Acc])
    where
        V: Vector<Lane = T::Acc> + Memory<T>,
    {
        let &Tile { queries, keys, dim, squares, slots, .. } = tile;
        let (tile, panels, width) = (&*queries.columns, &*keys.columns, keys.width);
        // SAFETY: the caller's promise.
        unsafe { V::outline::<T::Acc>(Scores { tile, panels, width, dim, squares, slots, scores }) }
    }

    #[inline(always)]
    unsafe fn add_sums<V>(self, _room: &mut (), tile: &Tile<T, Self>, weights: &[T::Acc], sums: &mut [T::Acc])
    where
        V: Vector<Lane = T::Acc> + Memory<T>,
    {
        let &Tile { values, squares, slots, .. } = tile;
        let (panels, width, out) = (&*values.rows, values.width, sums);
        // SAFETY: the caller's promise.
        unsafe { V::outline::<T::Acc>(SumOfKeys { weights, panels, width, squares, slots, out }) }
    }
}
