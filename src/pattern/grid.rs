//! The grid that patches lie on, and edges that are described axis by axis.

use std::ops::Range;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::edges::Builder;
use crate::error::{Error, Result};

/// How the tokens of a video grid are laid out.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum TokenOrder {
    /// Time slowest, columns fastest.
    RowMajor,
    /// Time fastest, as TimeSformer lays out its tokens.
    TFastest,
}

/// Shape and layout of a patch grid: `[H, W]` or `[T, H, W]`.
#[derive(Debug, Clone)]
pub struct Grid {
    shape: Vec<usize>,
    /// Distance in tokens between neighbours along each axis.
    strides: Vec<usize>,
    /// The axes, slowest first.
    slowest_first: Vec<usize>,
}

/// Which coordinates of an axis a query keeps, given its own coordinate there.
#[derive(Debug, Clone)]
pub enum Axis {
    /// The query's own.
    Same,
    /// All of them.
    All,
    /// Ranges for each coordinate of the query.
    Windows(Vec<Vec<Range<usize>>>),
}

impl Grid {
    /// # Errors
    /// [`Error::Config`] at `token_order` if time is to be the fastest axis of a grid without time.
    pub fn new(shape: &[usize], order: TokenOrder) -> Result<Self> {
        let mut slowest_first: Vec<usize> = (0..shape.len()).collect();
        if order == TokenOrder::TFastest {
            if shape.len() != 3 {
                return Err(Error::config(
                    "token_order",
                    format!(
                        "t_fastest needs a grid [T, H, W], but the grid is {shape:?}; allowed: row_major"
                    ),
                ));
            }
            slowest_first.rotate_left(1);
        }
        let mut strides = vec![1; shape.len()];
        let mut stride = 1;
        for &axis in slowest_first.iter().rev() {
            strides[axis] = stride;
            stride *= shape[axis];
        }
        Ok(Grid { shape: shape.to_vec(), strides, slowest_first })
    }

    /// Length of each axis.
    pub fn shape(&self) -> &[usize] {
        &self.shape
    }

    /// Number of patches.
    pub fn num_patches(&self) -> usize {
        self.shape.iter().product()
    }

    /// Add to `builder`, over the patches of this grid, the edges whose coordinates fit `axes` on every axis.
    pub fn keep(&self, builder: Builder, axes: &[Axis]) -> Builder {
        let n = self.num_patches();
        let [slowest, faster @ ..] = self.slowest_first.as_slice() else { return builder };
        let all = |axis: &usize| matches!(axes[*axis], Axis::All);
        if all(slowest) && faster.iter().all(all) {
            return builder.rect(0..n, 0..n);
        }
        if all(slowest) && faster.iter().all(|&axis| matches!(axes[axis], Axis::Same)) {
            // The same distances for every query: diagonals, whose size does not grow with the number of tokens.
            let step = self.strides[*slowest];
            let far = (n - step) as i64;
            return builder.band((-far, far, step), 0..n, 0..n);
        }
        let windows: Vec<_> =
            axes.iter().zip(&self.shape).map(|(axis, &length)| axis.windows(length)).collect();
        let complete = self.slowest_first.iter().rev().take_while(|axis| all(axis)).count();
        let product = Product { grid: self, windows, looped: (self.shape.len() - complete).max(1) };
        builder.by_row(|query, out| product.keys(0, 0, query, out))
    }
}

impl Axis {
    fn windows(&self, length: usize) -> Vec<Vec<Range<usize>>> {
        match self {
            Axis::Same => (0..length).map(|at| vec![at..at + 1]).collect(),
            Axis::All => vec![vec![0..length]; length],
            Axis::Windows(windows) => windows.clone(),
        }
    }
}

/// The keys of a query: all combinations of what it keeps on each axis.
struct Product<'a> {
    grid: &'a Grid,
    windows: Vec<Vec<Vec<Range<usize>>>>,
    /// This many of the slowest axes are walked; the faster ones are kept whole, so that keys come in long ranges.
    looped: usize,
}

impl Product<'_> {
    fn keys(&self, depth: usize, first_key: usize, query: usize, out: &mut Vec<Range<usize>>) {
        let axis = self.grid.slowest_first[depth];
        let stride = self.grid.strides[axis];
        for range in &self.windows[axis][query / stride % self.grid.shape[axis]] {
            if depth + 1 == self.looped {
                out.push(first_key + range.start * stride..first_key + range.end * stride);
            } else {
                for coordinate in range.clone() {
                    self.keys(depth + 1, first_key + coordinate * stride, query, out);
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::pattern::edges::EdgeSet;

    fn edges(grid: &Grid, axes: &[Axis]) -> EdgeSet {
        let n = grid.num_patches();
        grid.keep(EdgeSet::builder(n, n).unwrap(), axes).build().unwrap()
    }

    #[test]
    fn time_is_diagonals_where_it_is_slowest_and_space_where_it_is_fastest() {
        let shape = [4, 3, 5];
        let time =
            edges(&Grid::new(&shape, TokenOrder::RowMajor).unwrap(), &[Axis::All, Axis::Same, Axis::Same]);
        assert_eq!((time.diagonals().len(), time.runs().is_empty()), (7, true));
        let space =
            edges(&Grid::new(&shape, TokenOrder::TFastest).unwrap(), &[Axis::Same, Axis::All, Axis::All]);
        assert_eq!(space.nnz(), 4 * 15 * 15);
    }

    #[test]
    fn whole_fast_axes_are_one_run_per_query() {
        let space =
            edges(&Grid::new(&[4, 3, 5], TokenOrder::RowMajor).unwrap(), &[Axis::Same, Axis::All, Axis::All]);
        assert!((0..60).all(|query| space.runs().row(query).eq([query / 15 * 15..query / 15 * 15 + 15])));
    }

    #[test]
    fn only_a_grid_with_time_can_have_time_fastest() {
        let error = Grid::new(&[4, 5], TokenOrder::TFastest).unwrap_err().to_string();
        assert!(error.starts_with("token_order: t_fastest needs a grid [T, H, W]"), "{error}");
    }
}
