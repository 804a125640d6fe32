//! Every `stride`-th key, counted from the query (the strided pattern of Child et al., 2019, arXiv 1904.10509).

use std::sync::Arc;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::edges::EdgeSet;
use super::registry::check_range;
use super::{Context, HeadEdges, Pattern};
use crate::error::Result;

/// Query patch i keeps key patch j if `stride` divides i - j; with `causal` also j <= i.
///
/// Source: the strided pattern of Sparse Transformers, Child et al., 2019 (arXiv 1904.10509), without its window.
#[derive(Debug, Serialize, Deserialize, JsonSchema)]
pub struct Strided {
    /// Distance between the keys of a query.
    #[schemars(range(min = 1))]
    stride: i64,
    /// Only j <= i.
    #[serde(default = "causal_by_default")]
    causal: bool,
}

fn causal_by_default() -> bool {
    true
}

impl Pattern for Strided {
    const NAME: &'static str = "strided";
    const ABOUT: &'static str = "every stride-th patch, counted from the query";
    const BUDGET_KEYS: &'static [&'static [&'static str]] = &[&["stride"]];
    const BUDGET_UNORDERED: &'static [&'static str] = &["stride"];

    fn check(&self) -> Result<()> {
        check_range("stride", self.stride, 1..=i64::MAX)
    }

    fn edges(&self, context: &Context) -> Result<HeadEdges> {
        let n = context.num_tokens;
        // A multiple of the stride, so that both halves meet at distance 0.
        let farthest = n as i64 / self.stride * self.stride;
        let last = if self.causal { 0 } else { farthest };
        let step = self.stride.min(n as i64 + 1) as usize;
        Ok(vec![Arc::new(EdgeSet::builder(n, n)?.band((-farthest, last, step), 0..n, 0..n).build()?)])
    }
}
