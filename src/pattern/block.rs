//! Blocks of neighbouring patches that see whole blocks.

use std::ops::Range;
use std::sync::Arc;

use schemars::JsonSchema;
use serde::de::{Deserializer, Error as _};
use serde::{Deserialize, Serialize};
use serde_json::{Value, from_value};

use super::edges::EdgeSet;
use super::registry::check_range;
use super::{Context, HeadEdges, Pattern};
use crate::error::{Error, Result, unknown_name};

/// Query patch i keeps key patch j if `layout` keeps (i // block_size, j // block_size). The last block may be shorter.
///
/// Source: block-sparse attention as in Sparse Transformers, Child et al., 2019 (arXiv 1904.10509).
#[derive(Debug, Serialize, Deserialize, JsonSchema)]
pub struct Block {
    /// Patches in a block.
    #[schemars(range(min = 1))]
    block_size: i64,
    /// `diagonal`, `full`, `{band: n}` (blocks at most n apart), or a matrix of 0 and 1 over blocks.
    #[serde(default)]
    layout: Layout,
}

/// Which blocks see which.
#[derive(Debug, Serialize, JsonSchema)]
#[serde(untagged)]
#[schemars(deny_unknown_fields)]
enum Layout {
    /// `diagonal` (each its own) or `full` (all).
    Named(#[schemars(extend("enum" = NAMES))] String),
    /// Blocks at most this far apart.
    Band {
        #[schemars(range(min = 0))]
        band: i64,
    },
    /// 0 or 1 for each query block (row) and key block (column).
    Matrix(#[schemars(inner(length(min = 1), inner(range(min = 0, max = 1))))] Vec<Vec<i64>>),
}

const NAMES: &[&str] = &["diagonal", "full"];
const ALLOWED: &str = "\"diagonal\", \"full\", {band: n} or a matrix of 0 and 1 over blocks";

impl Default for Layout {
    fn default() -> Self {
        Layout::Named(NAMES[0].to_owned())
    }
}

impl<'de> Deserialize<'de> for Layout {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> std::result::Result<Self, D::Error> {
        #[derive(Deserialize)]
        #[serde(deny_unknown_fields)]
        struct Band {
            band: i64,
        }
        let value = Value::deserialize(deserializer)?;
        match &value {
            Value::String(name) => Ok(Layout::Named(name.to_lowercase())),
            Value::Object(_) => {
                from_value(value).map(|Band { band }| Layout::Band { band }).map_err(D::Error::custom)
            }
            Value::Array(_) => from_value(value).map(Layout::Matrix).map_err(D::Error::custom),
            other => Err(D::Error::custom(format!("expected {ALLOWED}, got {other}"))),
        }
    }
}

impl Layout {
    fn check(&self) -> Result<()> {
        match self {
            Layout::Named(name) if NAMES.contains(&name.as_str()) => Ok(()),
            Layout::Named(name) => {
                let message =
                    format!("{}, {{band: n}}, or a matrix of 0 and 1", unknown_name("layout", name, NAMES));
                Err(Error::config("layout", message))
            }
            Layout::Band { band } => check_range("layout.band", *band, 0..=i64::MAX),
            Layout::Matrix(rows) => {
                for (index, row) in rows.iter().enumerate() {
                    if row.len() != rows.len() {
                        let message =
                            format!("expected {} entries, one per block, got {}", rows.len(), row.len());
                        return Err(Error::config(format!("layout.{index}"), message));
                    }
                    if let Some(wrong) = row.iter().find(|entry| !(0..=1).contains(*entry)) {
                        return Err(Error::config(
                            format!("layout.{index}"),
                            format!("expected 0 or 1, got {wrong}"),
                        ));
                    }
                }
                Ok(())
            }
        }
    }

    /// The key blocks of query block `block`, of `num_blocks`, as ranges.
    fn keys(&self, block: usize, num_blocks: usize) -> Vec<Range<usize>> {
        match self {
            Layout::Named(name) if name == "full" => vec![0..num_blocks],
            Layout::Named(_) => vec![block..block + 1],
            Layout::Band { band } => {
                let band = (*band).min(num_blocks as i64) as usize;
                vec![block.saturating_sub(band)..(block + band + 1).min(num_blocks)]
            }
            Layout::Matrix(rows) => {
                let kept = rows[block].iter().enumerate().filter(|(_, entry)| **entry == 1);
                kept.map(|(key, _)| key..key + 1).collect()
            }
        }
    }
}

impl Pattern for Block {
    const NAME: &'static str = "block";
    const ABOUT: &'static str = "blocks of patches that see whole blocks, by a layout over blocks";
    const BUDGET_KEYS: &'static [&'static [&'static str]] = &[&["block_size"]];
    const BUDGET_UNORDERED: &'static [&'static str] = &["block_size"];

    fn check(&self) -> Result<()> {
        check_range("block_size", self.block_size, 1..=i64::MAX)?;
        self.layout.check()
    }

    fn edges(&self, context: &Context) -> Result<HeadEdges> {
        let n = context.num_tokens;
        let size = self.block_size.min(n.max(1) as i64) as usize;
        let num_blocks = n.div_ceil(size);
        if let Layout::Matrix(rows) = &self.layout
            && rows.len() != num_blocks
        {
            let message = format!(
                "expected {num_blocks} x {num_blocks} entries, because {n} patches make {num_blocks} blocks of {}; got {} x {}",
                self.block_size,
                rows.len(),
                rows.len()
            );
            return Err(Error::config("layout", message));
        }
        let mut builder = EdgeSet::builder(n, n)?;
        for block in 0..num_blocks {
            for keys in self.layout.keys(block, num_blocks) {
                builder = builder.rect(block * size..(block + 1) * size, keys.start * size..keys.end * size);
            }
        }
        Ok(vec![Arc::new(builder.build()?)])
    }
}
