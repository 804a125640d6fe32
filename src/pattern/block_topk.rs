//! Block top-k: blocks of keys are chosen by the scores of their pooled vectors, at a cost of (N / block)^2.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::choice::{Choice, Pool};
use super::registry::check_range;
use super::{Context, HeadEdges, Pattern, by_content};
use crate::error::Result;

/// Patches are cut into blocks of `block_size` (the last may be shorter). Every block of queries keeps the k blocks of keys with the
/// highest score between pooled vectors, `scale * pool(q of the block) . pool(k of the block)`; of equal scores the lower index. A k
/// of more blocks than there are keeps all of them, with a warning.
///
/// All pairs inside a chosen block are kept. `causal` chooses among past blocks and the block itself, and keeps only j <= i. The
/// choice is made per sample and head, and no gradient passes through it. Source: block selection as in InfLLM and MInference.
#[derive(Debug, Serialize, Deserialize, JsonSchema)]
#[serde(default)]
pub struct BlockTopK {
    /// Key blocks that a query block keeps.
    #[schemars(range(min = 1, max = u32::MAX))]
    k: i64,
    /// Patches in a block.
    #[schemars(range(min = 1, max = u32::MAX))]
    block_size: i64,
    /// How the vectors of a block become one.
    pool: Pool,
    /// Only j <= i.
    causal: bool,
}

impl Default for BlockTopK {
    fn default() -> Self {
        BlockTopK { k: 2, block_size: 32, pool: Pool::Mean, causal: false }
    }
}

impl Pattern for BlockTopK {
    const NAME: &'static str = "block_topk";
    const ABOUT: &'static str =
        "the k blocks of keys that match a block of queries best, chosen anew for every input";
    const BUDGET_KEYS: &'static [&'static [&'static str]] = &[&["k"], &["block_size"]];
    const BUDGET_UNORDERED: &'static [&'static str] = &["block_size"];

    fn check(&self) -> Result<()> {
        check_range("k", self.k, 1..=i64::from(u32::MAX))?;
        check_range("block_size", self.block_size, 1..=i64::from(u32::MAX))
    }

    fn choice(&self, _epoch: u64) -> Option<Choice> {
        Some(Choice::TopBlocks {
            keep: self.k as usize,
            block_size: self.block_size as usize,
            pool: self.pool,
            causal: self.causal,
        })
    }

    fn edges(&self, _context: &Context) -> Result<HeadEdges> {
        by_content(Self::NAME)
    }
}
