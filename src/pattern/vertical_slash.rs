//! Columns and diagonals: the vertical-slash pattern (Jiang et al., 2024, MInference, arXiv 2407.02490) with given lists.

use std::sync::Arc;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::edges::EdgeSet;
use super::registry::check_range;
use super::{Context, HeadEdges, Pattern};
use crate::error::{Error, Result};

/// Query patch i keeps key patch j if j is in `vertical`, or |i - j| is in `slash`, or |i - j| <= `window`; with `causal` also
/// j <= i.
#[derive(Debug, Default, Serialize, Deserialize, JsonSchema)]
#[serde(default)]
pub struct VerticalSlash {
    /// Key patches that every query keeps.
    vertical: Vec<i64>,
    /// Distances that every query keeps, to both sides unless `causal`.
    slash: Vec<i64>,
    /// Half width of a sliding window besides.
    window: Option<i64>,
    /// Only j <= i.
    causal: bool,
}

impl Pattern for VerticalSlash {
    const NAME: &'static str = "vertical_slash";
    const ABOUT: &'static str = "listed key columns and listed distances, plus a window";
    const BUDGET_KEYS: &'static [&'static str] = &["window"];

    fn check(&self) -> Result<()> {
        if self.vertical.is_empty() && self.slash.is_empty() && self.window.is_none() {
            return Err(Error::config(
                "",
                "give at least one of vertical (key columns), slash (distances), window (half width)",
            ));
        }
        self.vertical.iter().try_for_each(|&column| check_range("vertical", column, 0..=i64::MAX))?;
        self.slash.iter().try_for_each(|&distance| check_range("slash", distance, 0..=i64::MAX))?;
        self.window.map_or(Ok(()), |window| check_range("window", window, 0..=i64::MAX))
    }

    fn edges(&self, context: &Context) -> Result<HeadEdges> {
        let n = context.num_tokens;
        let mut builder = EdgeSet::builder(n, n)?;
        for &column in &self.vertical {
            if column >= n as i64 {
                return Err(Error::config(
                    "vertical",
                    format!("expected key columns of the {n} patches (from 0), got {column}"),
                ));
            }
            let column = column as usize;
            builder = builder.rect(if self.causal { column } else { 0 }..n, column..column + 1);
        }
        for &distance in &self.slash {
            builder = builder.diagonal(-distance, 0..n, 0..n);
            if !self.causal {
                builder = builder.diagonal(distance, 0..n, 0..n);
            }
        }
        if let Some(window) = self.window {
            builder = builder.band((-window, if self.causal { 0 } else { window }, 1), 0..n, 0..n);
        }
        Ok(vec![Arc::new(builder.build())])
    }
}
