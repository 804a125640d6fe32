//! Fibottention's bands laid parallel to the anti-diagonal.

use std::sync::Arc;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::edges::EdgeSet;
use super::fibottention::Sequences;
use super::{Context, HeadEdges, Pattern};
use crate::error::Result;

/// Query patch r of head h keeps key patch c if |r + c - (P - 1)| is in F_h, for P patches and the sequences F_h of
/// [`Fibottention`](super::fibottention::Fibottention).
///
/// Source: a variant in the published code of Fibottention, Rahimian et al., 2024 (arXiv 2406.19391).
#[derive(Debug, Serialize, Deserialize, JsonSchema)]
#[serde(default)]
pub struct CrossDiagonal {
    /// One prefix token unless the caller or the model has another number; `false` is `num_prefix_tokens: 0`, which both yield to.
    add_class_token: bool,
    /// Put the two preceding terms before each sequence.
    modified: bool,
    /// Deal the sequences to the heads anew in every layer.
    shuffled: bool,
}

impl Default for CrossDiagonal {
    fn default() -> Self {
        CrossDiagonal { add_class_token: true, modified: false, shuffled: true }
    }
}

impl Pattern for CrossDiagonal {
    const NAME: &'static str = "fibottentioncrossdiag";
    const ALIASES: &'static [&'static str] = &["crossdiag"];
    const ABOUT: &'static str = "Fibottention's sequences around the anti-diagonal";
    const DEFAULT_PREFIX: Option<usize> = Some(1);

    fn forced_prefix(&self) -> Option<usize> {
        (!self.add_class_token).then_some(0)
    }

    fn uses_layer(&self) -> bool {
        self.shuffled
    }

    fn edges(&self, context: &Context) -> Result<HeadEdges> {
        let n = context.num_tokens;
        let middle = n as i64 - 1;
        let sequences = Sequences::for_patches(n, self.modified);
        let head = |distances: &Vec<i64>| -> Result<Arc<EdgeSet>> {
            let builder = distances.iter().fold(EdgeSet::builder(n, n)?, |builder, &distance| {
                builder.anti_diagonal(middle + distance, 0..n, 0..n).anti_diagonal(
                    middle - distance,
                    0..n,
                    0..n,
                )
            });
            Ok(Arc::new(builder.build()?))
        };
        sequences.all(context.num_heads, self.shuffled.then_some(context.layer)).iter().map(head).collect()
    }
}
