//! The same evenly spaced keys for every query.

use std::sync::Arc;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::edges::EdgeSet;
use super::registry::check_range;
use super::{Context, HeadEdges, Pattern};
use crate::error::Result;

/// Query patch i keeps key patch j if j mod `stride` = `offset`; with `causal` also j <= i.
///
/// Source: the columns of the fixed pattern of Sparse Transformers, Child et al., 2019 (arXiv 1904.10509), without its blocks.
#[derive(Debug, Serialize, Deserialize, JsonSchema)]
pub struct StridedColumns {
    /// Distance between the keys.
    #[schemars(range(min = 1))]
    stride: i64,
    /// The first of them.
    #[serde(default)]
    #[schemars(range(min = 0))]
    offset: i64,
    /// Only j <= i.
    #[serde(default)]
    causal: bool,
}

impl Pattern for StridedColumns {
    const NAME: &'static str = "strided_columns";
    const ABOUT: &'static str = "every stride-th patch, the same ones for every query";
    const BUDGET_KEYS: &'static [&'static [&'static str]] = &[&["stride"]];
    const BUDGET_UNORDERED: &'static [&'static str] = &["stride"];

    fn check(&self) -> Result<()> {
        check_range("stride", self.stride, 1..=i64::MAX)?;
        check_range("offset", self.offset, 0..=self.stride - 1)
    }

    fn edges(&self, context: &Context) -> Result<HeadEdges> {
        let n = context.num_tokens;
        // Beyond the mask, one stride or offset is like another; clamping keeps the arithmetic below from overflowing.
        let columns =
            || (self.offset.min(n as i64) as usize..n).step_by(self.stride.min(n as i64 + 1) as usize);
        let builder = EdgeSet::builder(n, n)?;
        let builder = if self.causal {
            builder.by_row(|query, out| {
                out.extend(columns().take_while(|&key| key <= query).map(|key| key..key + 1));
            })
        } else {
            columns().fold(builder, |builder, key| builder.rect(0..n, key..key + 1))
        };
        Ok(vec![Arc::new(builder.build()?)])
    }
}
