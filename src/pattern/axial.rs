//! Axial attention (Ho et al., 2019, arXiv 1912.12180): the lines through the query along each axis of the patch grid.

use std::sync::Arc;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::edges::EdgeSet;
use super::grid::Axis;
use super::{Context, HeadEdges, Pattern};
use crate::error::Result;

/// Query and key agree on all axes but one: row and column of an image, or row, column and time of a video.
///
/// Source: axial attention, Ho et al., 2019 (arXiv 1912.12180).
#[derive(Debug, Default, Serialize, Deserialize, JsonSchema)]
#[serde(default)]
pub struct Axial {
    /// `[H, W]` or `[T, H, W]` of the tokens after the prefix, unless the document or the model gives it.
    #[schemars(length(min = 2, max = 3), inner(range(min = 1, max = u32::MAX)))]
    grid: Option<Vec<usize>>,
}

impl Pattern for Axial {
    const NAME: &'static str = "axial";
    const ABOUT: &'static str = "the query's row and column (and time) on the patch grid";

    fn uses_grid(&self) -> bool {
        true
    }

    fn grid(&self) -> Option<&[usize]> {
        self.grid.as_deref()
    }

    fn edges(&self, context: &Context) -> Result<HeadEdges> {
        let grid = context.grid()?;
        let (n, num_axes) = (grid.num_patches(), grid.shape().len());
        let mut builder = EdgeSet::builder(n, n)?;
        for free in 0..num_axes {
            let axes: Vec<_> =
                (0..num_axes).map(|axis| if axis == free { Axis::All } else { Axis::Same }).collect();
            builder = grid.keep(builder, &axes);
        }
        Ok(vec![Arc::new(builder.build()?)])
    }
}
