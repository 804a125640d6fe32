//! How many edges a choice by content keeps before it has seen any content.

use super::Rule;
use crate::error::{Error, Result};
use crate::pattern::choice::{Choice, OfHead};

impl Rule {
    /// For every head, the edges and the patch-to-patch edges that are kept in the mean if all keys a query may choose are equally
    /// likely. Exact where the number does not depend on which keys they are.
    ///
    /// # Errors
    /// [`Error::Value`] when there are fewer tokens than prefix tokens.
    pub fn expected_edges(&self, num_tokens: usize, num_heads: usize) -> Result<Vec<(f64, f64)>> {
        if self.prefix > num_tokens {
            return Err(Error::Value(format!(
                "num_prefix_tokens: expected at most the {num_tokens} tokens there are, got {}",
                self.prefix
            )));
        }
        let of_head = |head: usize| match self.choice {
            Choice::TopK { keep, causal, symmetric, dense_rows } => {
                let keep = self.per_head.as_ref().map_or(keep, |heads| heads[head].keys);
                let dense_rows = if dense_rows { self.dense } else { 0 };
                self.top_keys_expected(num_tokens, keep, causal, symmetric, dense_rows)
            }
            Choice::TopBlocks { keep, block_size, causal, .. } => {
                let patches = num_tokens - self.prefix;
                let blocks = patches.div_ceil(block_size);
                let between: f64 = (0..patches)
                    .map(|patch| {
                        let (allowed, keys) =
                            if causal { (patch / block_size + 1, patch + 1) } else { (blocks, patches) };
                        keep.min(allowed) as f64 / allowed as f64 * keys as f64
                    })
                    .sum();
                (between + self.around(num_tokens), between)
            }
            Choice::VerticalSlash { columns, distances, nearest, .. } => {
                let shared = OfHead { keys: columns, distances };
                let OfHead { keys: columns, distances } =
                    self.per_head.as_ref().map_or(shared, |heads| heads[head]);
                let patches = num_tokens - self.prefix;
                let share = |of: usize| of.min(patches) as f64 / patches as f64;
                let dropped = (1.0 - share(columns)) * (1.0 - share(distances));
                let at_distance = |distance: usize| if distance < nearest { 1.0 } else { 1.0 - dropped };
                let between: f64 =
                    (0..patches).map(|distance| (patches - distance) as f64 * at_distance(distance)).sum();
                (between + self.around(num_tokens), between)
            }
            Choice::Keys { keep, .. } => {
                let patches = num_tokens - self.prefix;
                let between = (patches * keep.min(patches)) as f64;
                (between + self.around(num_tokens), between)
            }
        };
        Ok((0..num_heads).map(of_head).collect())
    }

    /// Edges of the dense prefix around patches.
    fn around(&self, num_tokens: usize) -> f64 {
        let of_row = |row: usize| {
            if row < self.dense { num_tokens } else { self.dense }
        };
        (0..num_tokens).map(of_row).sum::<usize>() as f64
    }

    fn top_keys_expected(
        &self,
        num_tokens: usize,
        keep: usize,
        causal: bool,
        symmetric: bool,
        dense_rows: usize,
    ) -> (f64, f64) {
        let (mut all, mut between) = (0.0, 0.0);
        for row in 0..num_tokens {
            let end = if causal { row + 1 } else { num_tokens };
            let chosen = keep.min(end) as f64 / end as f64;
            let share = if symmetric { 1.0 - (1.0 - chosen).powi(2) } else { chosen };
            let expected = |keys: usize, own: bool| match own {
                true => (keys - 1) as f64 * share + chosen,
                false => keys as f64 * share,
            };
            if row < dense_rows {
                all += end as f64;
            } else {
                let dense = self.dense.min(end);
                all += dense as f64 + expected(end - dense, row >= dense);
            }
            if row >= self.prefix {
                between += expected(end - self.prefix, true);
            }
        }
        (all, between)
    }
}
