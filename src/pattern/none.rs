//! No mask: dense attention.

use std::sync::Arc;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::edges::EdgeSet;
use super::{Context, Domain, HeadEdges, Pattern};
use crate::error::Result;

/// Every query keeps every key.
///
/// Source: attention, Vaswani et al., 2017 (arXiv 1706.03762).
#[derive(Debug, Serialize, Deserialize, JsonSchema)]
pub struct None {}

impl Pattern for None {
    const NAME: &'static str = "none";
    const ALIASES: &'static [&'static str] = &["dense", "full"];
    const ABOUT: &'static str = "every query keeps every key: dense attention";

    fn domain(&self) -> Domain {
        Domain::Tokens
    }

    fn edges(&self, context: &Context) -> Result<HeadEdges> {
        let n = context.num_tokens;
        Ok(vec![Arc::new(EdgeSet::builder(n, n)?.rect(0..n, 0..n).build()?)])
    }
}
