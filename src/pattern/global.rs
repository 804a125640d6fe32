//! A few tokens that see, and are seen by, all.

use std::sync::Arc;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::edges::EdgeSet;
use super::registry::check_range;
use super::{Context, Domain, HeadEdges, Pattern};
use crate::error::{Error, Result};

/// Over all token indices, prefix included: query i keeps key j if i or j is global. A dense prefix is global as well.
///
/// Global are the first `num_global` tokens (1 if neither parameter is given) or those of `global_indices`, where a negative
/// index counts from the end.
///
/// Source: the global tokens of Longformer (arXiv 2004.05150) and BigBird (arXiv 2007.14062), alone.
#[derive(Debug, Default, Serialize, Deserialize, JsonSchema)]
#[serde(default)]
pub struct Global {
    /// The first this many tokens are global; 1 if neither parameter is given.
    #[schemars(range(min = 0))]
    num_global: Option<i64>,
    /// Which tokens are global; negative ones count from the end.
    global_indices: Option<Vec<i64>>,
}

impl Pattern for Global {
    const NAME: &'static str = "global";
    const ABOUT: &'static str = "a few tokens that see, and are seen by, all";
    const BUDGET_KEYS: &'static [&'static [&'static str]] = &[&["num_global"]];

    fn check(&self) -> Result<()> {
        if self.num_global.is_some() && self.global_indices.is_some() {
            return Err(Error::config(
                "global_indices",
                "give either num_global or global_indices, not both",
            ));
        }
        self.num_global.map_or(Ok(()), |number| check_range("num_global", number, 0..=i64::MAX))
    }

    fn domain(&self) -> Domain {
        Domain::Tokens
    }

    fn edges(&self, context: &Context) -> Result<HeadEdges> {
        let n = context.num_tokens;
        let mut builder = EdgeSet::builder(n, n)?.global(0..context.dense_prefix());
        match &self.global_indices {
            Some(indices) => {
                for &index in indices {
                    check_range("global_indices", index, -(n as i64)..=n as i64 - 1)?;
                    let token = index.rem_euclid(n as i64) as usize;
                    builder = builder.global(token..token + 1);
                }
            }
            None => {
                let number = self.num_global.unwrap_or(1);
                check_range("num_global", number, 0..=n as i64)?;
                builder = builder.global(0..number as usize);
            }
        }
        Ok(vec![Arc::new(builder.build()?)])
    }
}
