//! Longformer's sliding window with dilation and global tokens (Beltagy et al., 2020, arXiv 2004.05150).

use std::sync::Arc;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::edges::EdgeSet;
use super::local::half_width;
use super::{Context, Domain, HeadEdges, Pattern, warn_clamped};
use crate::error::{Error, Result};

/// Over all token indices, CLS included: query i keeps key j if |i - j| = k * dilation for a k in 1..=window (from 0 with
/// `include_self`), or if i or j is global, or (with `keep_cls_dense`) a prefix token.
///
/// Source: Longformer, Beltagy et al., 2020 (arXiv 2004.05150).
#[derive(Debug, Serialize, Deserialize, JsonSchema)]
#[serde(default)]
pub struct Longformer {
    /// Half width: keys on each side; 1 if neither width is given.
    window: Option<i64>,
    /// Odd total width, 2 * window + 1.
    #[schemars(range(min = 1), extend("not" = { "type": "integer", "multipleOf": 2 }))]
    window_size: Option<i64>,
    /// Distance between neighbouring keys of the window.
    dilation: i64,
    /// One dilation per head, instead.
    per_head_dilation: Option<Vec<i64>>,
    /// The first this many tokens are global.
    num_global: i64,
    /// Which tokens are global, instead of the first ones.
    global_indices: Option<Vec<i64>>,
    /// Accepted without effect: every such mask is symmetric.
    symmetric: bool,
    /// A query keeps its own key.
    include_self: bool,
    /// Prefix tokens see, and are seen by, all.
    keep_cls_dense: bool,
}

impl Default for Longformer {
    fn default() -> Self {
        Longformer {
            window: None,
            window_size: None,
            dilation: 1,
            per_head_dilation: None,
            num_global: 1,
            global_indices: None,
            symmetric: true,
            include_self: false,
            keep_cls_dense: true,
        }
    }
}

/// The global tokens of the reference's masks: a list, or the first `num_global`. What lies outside `0..num_tokens` is dropped.
pub(super) fn global_tokens(
    mask: &str,
    num_global: i64,
    global_indices: Option<&[i64]>,
    num_tokens: usize,
) -> Vec<usize> {
    let inside = |&index: &i64| {
        let inside = 0 <= index && index < num_tokens as i64;
        if !inside {
            warn_clamped(format!(
                "{mask}: global index {index} is none of the {num_tokens} tokens and is dropped"
            ));
        }
        inside
    };
    match global_indices {
        Some(indices) => indices.iter().copied().filter(inside).map(|index| index as usize).collect(),
        None => (0..num_tokens.min(num_global.max(0) as usize)).collect(),
    }
}

/// The reference clamps a dilation below one.
fn at_least_one(dilation: i64) -> usize {
    if dilation < 1 {
        warn_clamped(format!("longformer: dilation {dilation} acts as 1"));
    }
    dilation.max(1) as usize
}

impl Longformer {
    fn window(&self) -> Result<i64> {
        match (self.window, self.window_size) {
            (Some(_), Some(_)) => Err(Error::config(
                "window_size",
                "give either window (half width) or window_size (odd total width), not both",
            )),
            (_, Some(size)) => half_width("window_size", size),
            (Some(window), _) if window < 0 => {
                warn_clamped(format!("longformer: window {window} acts as 0"));
                Ok(0)
            }
            (window, _) => Ok(window.unwrap_or(1)),
        }
    }

    fn head(&self, dilation: i64, globals: &[usize], context: &Context) -> Result<Arc<EdgeSet>> {
        let n = context.num_tokens;
        let step = at_least_one(dilation);
        let reach = self.window()?.saturating_mul(step as i64);
        let mut builder = EdgeSet::builder(n, n)?.band((-reach, -(step as i64), step), 0..n, 0..n).band(
            (step as i64, reach, step),
            0..n,
            0..n,
        );
        if self.include_self {
            builder = builder.diagonal(0, 0..n, 0..n);
        }
        for &index in globals {
            builder = builder.global(index..index + 1);
        }
        if self.keep_cls_dense {
            builder = builder.global(0..context.dense_prefix());
        }
        Ok(Arc::new(builder.build()?))
    }
}

impl Pattern for Longformer {
    const NAME: &'static str = "longformer";
    const ABOUT: &'static str = "dilated sliding window plus global tokens";
    const DEFAULT_PREFIX: Option<usize> = Some(1);
    const BUDGET_KEYS: &'static [&'static [&'static str]] = &[&["window", "window_size"], &["num_global"]];
    const IGNORED: &'static [&'static str] = &["seed", "reseed_each_epoch", "plot_once"];

    fn check(&self) -> Result<()> {
        self.window().map(|_| ())
    }

    fn domain(&self) -> Domain {
        Domain::Tokens
    }

    fn edges(&self, context: &Context) -> Result<HeadEdges> {
        let globals =
            global_tokens(Self::NAME, self.num_global, self.global_indices.as_deref(), context.num_tokens);
        match &self.per_head_dilation {
            None => Ok(vec![self.head(self.dilation, &globals, context)?]),
            Some(dilations) if dilations.len() != context.num_heads => Err(Error::config(
                "per_head_dilation",
                format!("expected one dilation per head ({}), got {}", context.num_heads, dilations.len()),
            )),
            Some(dilations) => {
                dilations.iter().map(|&dilation| self.head(dilation, &globals, context)).collect()
            }
        }
    }
}
