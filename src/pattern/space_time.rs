//! Space and time on a video grid (Bertasius et al., 2021, TimeSformer, arXiv 2102.05095).

use std::sync::Arc;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::edges::EdgeSet;
use super::grid::Axis;
use super::registry::check_range;
use super::{Context, HeadEdges, Pattern};
use crate::error::{Error, Result};

/// On the grid `[T, H, W]`, query (t, h, w) keeps key (t', h', w') if, by `kind`:
///
/// - space: t = t';
/// - time: (h, w) = (h', w');
/// - divided: either of the two;
/// - joint: always;
/// - tube: |h - h'| <= `radius` and |w - w'| <= `radius`, at any time.
///
/// Source: TimeSformer, Bertasius et al., 2021 (arXiv 2102.05095); tubes are this library's own.
#[derive(Debug, Serialize, Deserialize, JsonSchema)]
pub struct SpaceTime {
    /// Which pairs are kept.
    kind: Kind,
    /// For `tube`: how far from the query's place, in patches.
    #[serde(default)]
    #[schemars(range(min = 0))]
    radius: i64,
    /// `[T, H, W]` of the tokens after the prefix, unless the document or the model gives it.
    #[serde(default)]
    #[schemars(length(min = 2, max = 3), inner(range(min = 1, max = u32::MAX)))]
    grid: Option<Vec<usize>>,
}

#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
enum Kind {
    Space,
    Time,
    Divided,
    Joint,
    Tube,
}

impl Pattern for SpaceTime {
    const NAME: &'static str = "space_time";
    const ABOUT: &'static str = "space, time, both, or tubes through time, on a video grid";
    const BUDGET_KEYS: &'static [&'static [&'static str]] = &[&["radius"]];

    fn check(&self) -> Result<()> {
        check_range("radius", self.radius, 0..=i64::MAX)?;
        if self.kind != Kind::Tube && self.radius != 0 {
            return Err(Error::config(
                "radius",
                format!("has a meaning only with kind: tube, got {}", self.radius),
            ));
        }
        Ok(())
    }

    fn uses_grid(&self) -> bool {
        true
    }

    fn grid(&self) -> Option<&[usize]> {
        self.grid.as_deref()
    }

    fn edges(&self, context: &Context) -> Result<HeadEdges> {
        let grid = context.grid()?;
        let &[_, height, width] = grid.shape() else {
            return Err(Error::config("grid", format!("space_time needs [T, H, W], got {:?}", grid.shape())));
        };
        let near = |length: usize| {
            if self.radius == 0 {
                return Axis::Same;
            }
            let radius = self.radius.min(length as i64) as usize;
            let window = |at: usize| vec![at.saturating_sub(radius)..(at + radius + 1).min(length)];
            Axis::Windows((0..length).map(window).collect())
        };
        let space = [Axis::Same, Axis::All, Axis::All];
        let time = [Axis::All, Axis::Same, Axis::Same];
        let n = grid.num_patches();
        let builder = EdgeSet::builder(n, n)?;
        let builder = match self.kind {
            Kind::Space => grid.keep(builder, &space),
            Kind::Time => grid.keep(builder, &time),
            Kind::Divided => grid.keep(grid.keep(builder, &space), &time),
            Kind::Joint => builder.rect(0..n, 0..n),
            Kind::Tube => grid.keep(builder, &[Axis::All, near(height), near(width)]),
        };
        Ok(vec![Arc::new(builder.build()?)])
    }
}
