//! Sparse Transformer patterns over patches (Child et al., 2019, arXiv 1904.10509): local, strided, fixed.

use std::sync::Arc;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::edges::{Builder, EdgeSet};
use super::{Context, HeadEdges, Pattern, warn_clamped};
use crate::error::{Error, Result};

/// For query patch r and key patch c, with `local_attn_ctx` = x:
///
/// - local: 0 <= r - c <= x (the x previous patches and itself);
/// - strided: r >= c and x divides r - c;
/// - fixed: r and c in the same block of x patches, or c among the last `fixed_c` patches of an earlier block.
///
/// `symmetric` adds the transpose. `per_head_distinct` (fixed) splits the `fixed_c` summary columns among the heads.
///
/// Source: Sparse Transformers, Child et al., 2019 (arXiv 1904.10509).
#[derive(Debug, Serialize, Deserialize, JsonSchema)]
#[serde(default)]
pub struct Sparse {
    /// `local` (null too), `strided` or `fixed`.
    #[schemars(extend("enum" = ["local", "strided", "fixed", null]))]
    pattern: Option<String>,
    /// x; null for 64, or 128 for `fixed`, or all patches where there are fewer.
    local_attn_ctx: Option<i64>,
    /// Add the transpose.
    symmetric: bool,
    /// Summary patches at the end of a block; null for 16.
    fixed_c: Option<i64>,
    /// Heads share the summary patches out among them.
    per_head_distinct: bool,
}

impl Default for Sparse {
    fn default() -> Self {
        Sparse {
            pattern: None,
            local_attn_ctx: None,
            symmetric: true,
            fixed_c: None,
            per_head_distinct: false,
        }
    }
}

#[derive(Debug, Clone, Copy, PartialEq)]
enum Kind {
    Local,
    Strided,
    Fixed,
}

/// The reference's default context for local and strided.
const DEFAULT_CONTEXT: i64 = 64;
/// The reference's default block length and summary width for fixed.
const DEFAULT_BLOCK: i64 = 128;
const DEFAULT_SUMMARY: i64 = 16;

impl Sparse {
    fn kind(&self) -> Result<Kind> {
        match self.pattern.as_deref().unwrap_or("local").to_lowercase().as_str() {
            "local" => Ok(Kind::Local),
            "strided" => Ok(Kind::Strided),
            "fixed" => Ok(Kind::Fixed),
            other => Err(Error::config(
                "pattern",
                crate::error::unknown_name("pattern", other, &["local", "strided", "fixed"]),
            )),
        }
    }

    fn local(&self, builder: Builder, n: usize) -> Builder {
        let given = self.local_attn_ctx.unwrap_or(DEFAULT_CONTEXT.min(n as i64));
        let reach = given.clamp(0, (n as i64 - 1).max(0));
        if self.local_attn_ctx.is_some() && reach != given {
            warn_clamped(format!("sparse: local_attn_ctx {given} acts as {reach} for {n} patches"));
        }
        builder.band((-reach, if self.symmetric { reach } else { 0 }, 1), 0..n, 0..n)
    }

    fn strided(&self, mut builder: Builder, n: usize) -> Builder {
        let stride = self.local_attn_ctx.unwrap_or(DEFAULT_CONTEXT.min(n as i64)).max(1);
        // Starting from the diagonal keeps both halves on the same multiples of the stride.
        let farthest = n as i64 / stride * stride;
        builder = builder.band((-farthest, 0, stride as usize), 0..n, 0..n);
        if self.symmetric {
            builder = builder.band((0, farthest, stride as usize), 0..n, 0..n);
        }
        builder
    }

    /// Block length and summary width.
    fn fixed_sizes(&self, n: usize) -> (usize, usize) {
        let patches = n as i64;
        let given = self.local_attn_ctx.filter(|&block| block > 0);
        let block = given.unwrap_or(DEFAULT_BLOCK.min(patches.max(1))).clamp(1, (patches - 1).max(1));
        if given.is_some_and(|given| given != block) {
            warn_clamped(format!(
                "sparse: local_attn_ctx {} acts as {block} for {n} patches",
                given.unwrap_or_default()
            ));
        }
        let summary = self.fixed_c.unwrap_or(DEFAULT_SUMMARY.min(block)).clamp(0, block);
        (block as usize, summary as usize)
    }

    /// `summary` is the range of columns, counted inside a block, that later blocks see.
    fn fixed(
        &self,
        mut builder: Builder,
        n: usize,
        block: usize,
        summary: std::ops::Range<usize>,
    ) -> Builder {
        for start in (0..n).step_by(block) {
            let end = start + block;
            builder = builder.rect(start..end, start..end);
            let columns = start + summary.start..start + summary.end;
            builder = builder.rect(end..n.max(end), columns.clone());
            if self.symmetric {
                builder = builder.rect(columns, end..n.max(end));
            }
        }
        builder
    }
}

impl Pattern for Sparse {
    const NAME: &'static str = "sparse";
    const ABOUT: &'static str = "Sparse Transformer patterns: local, strided or fixed blocks with summaries";
    const DEFAULT_PREFIX: Option<usize> = Some(1);
    const BUDGET_KEYS: &'static [&'static [&'static str]] = &[&["local_attn_ctx"], &["fixed_c"]];
    const BUDGET_UNORDERED: &'static [&'static str] = &["local_attn_ctx"];

    fn check(&self) -> Result<()> {
        if self.kind()? == Kind::Strided && self.local_attn_ctx.is_some_and(|stride| stride < 1) {
            let got = self.local_attn_ctx.unwrap_or_default();
            return Err(Error::config(
                "local_attn_ctx",
                format!("expected a stride of at least 1, got {got}"),
            ));
        }
        Ok(())
    }

    fn edges(&self, context: &Context) -> Result<HeadEdges> {
        let n = context.num_tokens;
        let empty = || EdgeSet::builder(n, n);
        let set = |builder: Builder| builder.build().map(Arc::new);
        match self.kind()? {
            Kind::Local => Ok(vec![set(self.local(empty()?, n))?]),
            Kind::Strided => Ok(vec![set(self.strided(empty()?, n))?]),
            Kind::Fixed => {
                let (block, summary) = self.fixed_sizes(n);
                let first = block - summary;
                if !self.per_head_distinct {
                    return Ok(vec![set(self.fixed(empty()?, n, block, first..block))?]);
                }
                // The first (summary mod heads) heads get one column more.
                let heads = context.num_heads;
                let start = |head: usize| first + head * (summary / heads) + head.min(summary % heads);
                (0..heads).map(|h| set(self.fixed(empty()?, n, block, start(h)..start(h + 1)))).collect()
            }
        }
    }
}
