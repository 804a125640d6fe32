//! Windows that partition the patch grid, plain or shifted (Liu et al., 2021, Swin, arXiv 2103.14030).

use std::sync::Arc;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::edges::EdgeSet;
use super::grid::Axis;
use super::one_or_list::OneOrList;
use super::registry::check_range;
use super::{Context, HeadEdges, Pattern};
use crate::error::{Error, Result};

/// Query and key have the same (coordinate + `shift`) // `window_size` on every axis. Swin's shift s, which rolls the image
/// the other way, is `window_size` - s here.
///
/// Shifted windows that are cut by a border stay cut: opposite borders are not joined, just as shifted-window attention masks
/// them apart after its cyclic shift.
///
/// Source: Swin, Liu et al., 2021 (arXiv 2103.14030).
#[derive(Debug, Serialize, Deserialize, JsonSchema)]
pub struct GridWindow {
    /// Side of a window: one for all axes, or one per axis.
    #[schemars(extend("minimum" = 1, "items" = { "minimum": 1 }))]
    window_size: OneOrList<i64>,
    /// Shift of the windows against the grid, likewise.
    #[serde(default = "unshifted")]
    #[schemars(extend("minimum" = 0, "items" = { "minimum": 0 }))]
    shift: OneOrList<i64>,
    /// `[H, W]` or `[T, H, W]` of the tokens after the prefix, unless the document or the model gives it.
    #[serde(default)]
    #[schemars(length(min = 2, max = 3), inner(range(min = 1, max = u32::MAX)))]
    grid: Option<Vec<usize>>,
}

fn unshifted() -> OneOrList<i64> {
    OneOrList::One(0)
}

impl Pattern for GridWindow {
    const NAME: &'static str = "grid_window";
    const ABOUT: &'static str = "windows that partition the patch grid, plain or shifted";
    const BUDGET_KEYS: &'static [&'static [&'static str]] = &[&["window_size"]];
    const BUDGET_UNORDERED: &'static [&'static str] = &["window_size"];

    fn check(&self) -> Result<()> {
        self.window_size
            .values()
            .iter()
            .try_for_each(|&size| check_range("window_size", size, 1..=i64::MAX))?;
        self.shift.values().iter().try_for_each(|&shift| check_range("shift", shift, 0..=i64::MAX))
    }

    fn uses_grid(&self) -> bool {
        true
    }

    fn grid(&self) -> Option<&[usize]> {
        self.grid.as_deref()
    }

    fn edges(&self, context: &Context) -> Result<HeadEdges> {
        let grid = context.grid()?;
        let shape = grid.shape();
        let window_size = self.window_size.per_axis("window_size", shape)?;
        let shift = self.shift.per_axis("shift", shape)?;
        let mut axes = Vec::with_capacity(shape.len());
        for (axis, &length) in shape.iter().enumerate() {
            let (size, shift) = (window_size[axis] as u64, shift[axis] as u64);
            if shift >= size {
                let message = format!("expected 0 to {}, less than window_size, got {shift}", size - 1);
                return Err(Error::config("shift", message));
            }
            let window = |coordinate: u64| {
                let first = (coordinate + shift) / size * size;
                let end = (first + size - shift).min(length as u64);
                vec![first.saturating_sub(shift) as usize..end as usize]
            };
            axes.push(Axis::Windows((0..length as u64).map(window).collect()));
        }
        let n = grid.num_patches();
        Ok(vec![Arc::new(grid.keep(EdgeSet::builder(n, n)?, &axes).build()?)])
    }
}
