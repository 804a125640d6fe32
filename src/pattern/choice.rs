//! Choices of keys that depend on the content of queries and keys. A pattern only says how to choose; the choice itself is made
//! where the tensors are, and gives an edge list per (batch, head).

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// Which keys to keep, given queries and keys.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Choice {
    /// Every query keeps the `keep` keys with the highest scaled scores; of equal scores the lower index.
    TopK {
        /// Keys per query.
        keep: usize,
        /// Only past keys, and the query's own.
        causal: bool,
        /// Query i also keeps key j where query j chose key i.
        symmetric: bool,
        /// Whether the queries of a dense prefix keep everything; its keys are kept by every query in any case.
        dense_rows: bool,
    },
    /// Every block of queries keeps the `keep` blocks of keys whose pooled scores are highest, and all pairs inside them.
    TopBlocks {
        /// Key blocks per query block.
        keep: usize,
        /// Patches per block; the last may have fewer.
        block_size: usize,
        /// How queries and keys of a block become one vector.
        pool: Pool,
        /// Only past keys, and the query's own.
        causal: bool,
    },
    /// Every query of a head keeps the same columns and distances into the past: those to which the last queries attend most.
    VerticalSlash {
        /// Key columns per head.
        columns: usize,
        /// Distances per head.
        distances: usize,
        /// Queries whose attention is looked at.
        last_queries: usize,
        /// Nearest keys that every query keeps besides, its own included.
        nearest: usize,
    },
    /// Every query of a head keeps the same `keep` keys: those of most importance.
    Keys {
        /// Keys per head.
        keep: usize,
        /// What makes a key important.
        by: Importance,
    },
}

/// What one head chooses, where heads differ.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct OfHead {
    /// Keys, or key columns.
    pub keys: usize,
    /// Distances, of a choice that has them.
    pub distances: usize,
}

/// How the vectors of a block become one.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum Pool {
    /// Their mean.
    #[default]
    Mean,
    /// The largest value of every channel.
    Max,
}

/// What makes a key important.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Importance {
    /// The L2 norm of its key vector in this head.
    KeyNorm,
    /// A number per token that the caller brings: the L2 norm of its embedding.
    Given,
    /// The attention it would receive from all queries of its head without a mask.
    Attention,
}
