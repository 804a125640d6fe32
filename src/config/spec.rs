//! The canonical text of one layer's mask: all that an operator needs, besides tensors, to find its edges.

use std::sync::Arc;

use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::{MaskedLogits, TokenOrder};
use crate::error::{Error, Result};
use crate::pattern::edges::EdgeSet;
use crate::pattern::registry::{self, ReadError};
use crate::pattern::{AnyPattern, Context, EdgeCount, HeadEdges, head_counts, head_edges};

/// A mask in one layer. Its text travels inside compiled and exported graphs, so it names the mask by content and holds nothing
/// that depends on the process or on the number of tokens.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Spec {
    /// Canonical name.
    pub mask: String,
    /// Every parameter, defaults filled in.
    pub mask_kwargs: Value,
    /// What a masked logit counts as.
    pub masked_logits: MaskedLogits,
    /// Number of query heads.
    pub heads: usize,
    /// Channels of a head, if the mask depends on them and they are known.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub head_dim: Option<usize>,
    /// Zero-based layer, 0 if the mask does not depend on it.
    pub layer: usize,
    /// Number of layers, if the mask depends on the layer and the number is known.
    pub num_layers: Option<usize>,
    /// Epoch, 0 if the mask does not depend on it.
    pub epoch: u64,
    /// Shape of the patch grid, where known.
    pub grid: Option<Vec<u64>>,
    /// Layout of a video grid.
    pub token_order: TokenOrder,
    /// Leading tokens off the grid.
    pub num_prefix_tokens: u64,
    /// Whether prefix rows and columns are dense.
    pub prefix_dense: bool,
}

/// The edges of a mask at one number of tokens.
#[derive(Debug, Clone)]
pub struct MaskEdges {
    /// Edges per head; always one entry per head.
    pub heads: HeadEdges,
    /// Number of tokens N.
    pub num_tokens: usize,
    /// Leading tokens off the patch grid.
    pub num_prefix_tokens: usize,
}

impl Spec {
    /// The canonical text.
    pub fn to_text(&self) -> String {
        serde_json::to_string(self).expect("a spec is plain data")
    }

    /// Read [`Self::to_text`] back.
    ///
    /// # Errors
    /// [`Error::Value`] for text that is not a spec.
    pub fn from_text(text: &str) -> Result<Self> {
        let spec: Self =
            serde_json::from_str(text).map_err(|error| Error::Value(format!("spec: {error}")))?;
        if spec.heads == 0 {
            return Err(Error::Value("spec: heads: expected at least 1, got 0".into()));
        }
        Ok(spec)
    }

    /// The mask with its parameters.
    ///
    /// # Errors
    /// [`Error::Value`] for a name or parameters that no configuration would have.
    pub fn pattern(&self) -> Result<Box<dyn AnyPattern>> {
        let mask = registry::find(&self.mask)
            .ok_or_else(|| Error::Value(format!("spec: unknown mask `{}`", self.mask)))?;
        mask.read(&self.mask_kwargs).map_err(|error| match error {
            ReadError::Type { path, message } => Error::Value(format!("spec: mask_kwargs.{path}: {message}")),
            ReadError::Range(error) => error,
        })
    }

    /// What the mask may know at `num_tokens` tokens, prefix included.
    pub fn context(&self, num_tokens: usize) -> Context {
        Context {
            num_tokens,
            num_heads: self.heads,
            head_dim: self.head_dim,
            layer: self.layer,
            num_layers: self.num_layers,
            epoch: self.epoch,
            grid: self.grid.as_ref().map(|grid| grid.iter().map(|&side| side as usize).collect()),
            token_order: self.token_order,
            prefix: self.num_prefix_tokens as usize,
            prefix_dense: self.prefix_dense,
        }
    }

    /// The edges of every head for `num_tokens` tokens.
    ///
    /// # Errors
    /// What the mask reports for parameters that do not fit this size, head count or layer.
    pub fn edges(&self, num_tokens: usize) -> Result<MaskEdges> {
        let pattern = self.pattern()?;
        // An empty sequence has no prefix and no edges, whatever the mask.
        if num_tokens == 0 {
            let empty = Arc::new(EdgeSet::builder(0, 0)?.build()?);
            let heads = (0..self.heads).map(|_| Arc::clone(&empty)).collect();
            return Ok(MaskEdges { heads, num_tokens, num_prefix_tokens: 0 });
        }
        let prefix = self.num_prefix_tokens as usize;
        let context = self.context(num_tokens);
        let mut heads = head_edges(pattern.as_ref(), &context)?;
        if heads.len() == 1 {
            heads.resize(self.heads, heads[0].clone());
        }
        Ok(MaskEdges { heads, num_tokens, num_prefix_tokens: prefix })
    }

    /// How many edges every head has for `num_tokens` tokens.
    ///
    /// # Errors
    /// See [`Self::edges`].
    pub fn counts(&self, num_tokens: usize) -> Result<Vec<EdgeCount>> {
        let pattern = self.pattern()?;
        let mut counts = match num_tokens {
            0 => vec![EdgeCount::default()],
            _ => head_counts(pattern.as_ref(), &self.context(num_tokens))?,
        };
        if counts.len() == 1 {
            counts.resize(self.heads, counts[0]);
        }
        Ok(counts)
    }
}
