//! Importance: every query of a head keeps the same few keys.

use std::sync::Arc;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::choice::{Choice, Importance as By};
use super::edges::EdgeSet;
use super::registry::{check_range, exactly_one_of};
use super::{Context, HeadEdges, Pattern, by_content};
use crate::error::{Error, Result};

/// Every query keeps the k most important keys of its head; of equal importance the lower index. Where a score is measured, a k of
/// more patches than there are keeps all of them, with a warning; `first` and `list` name patches, which must exist.
///
/// Importance is the L2 norm of the key (`key_norm`), the L2 norm of the token's embedding, the input of the layer
/// (`embedding_norm`), or the attention that the key would receive from all patches if nothing but padding were masked and
/// there were no prefix (`attention`). `first` keeps the first k patches and `list` those in `indices`, whatever the input. Source: the taxonomy of fixed and dynamic importance.
#[derive(Debug, Default, Serialize, Deserialize, JsonSchema)]
#[serde(default)]
#[schemars(extend("oneOf" = exactly_one_of(&["k", "indices"])))]
pub struct Importance {
    /// What makes a key important.
    score: Score,
    /// Keys that every query keeps; not with `score: list`.
    #[schemars(range(min = 1, max = u32::MAX))]
    k: Option<i64>,
    /// The patches that every query keeps, with `score: list`.
    #[schemars(length(min = 1), inner(range(min = 0, max = u32::MAX)))]
    indices: Option<Vec<i64>>,
}

/// What makes a key important.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
enum Score {
    #[default]
    KeyNorm,
    EmbeddingNorm,
    Attention,
    First,
    List,
}

impl Pattern for Importance {
    const NAME: &'static str = "importance";
    const ABOUT: &'static str = "the k keys of most importance, the same for every query of a head";
    const BUDGET_KEYS: &'static [&'static [&'static str]] = &[&["k"]];

    fn check(&self) -> Result<()> {
        match (self.score, self.k, &self.indices) {
            (Score::List, None, Some(indices)) => {
                if indices.is_empty() {
                    return Err(Error::config("indices", "expected at least one patch, got an empty list"));
                }
                indices.iter().try_for_each(|&index| check_range("indices", index, 0..=i64::from(u32::MAX)))
            }
            (Score::List, _, None) => {
                Err(Error::config("indices", "expected a list of patches with `score: list`, got nothing"))
            }
            (Score::List, Some(_), _) => Err(Error::config(
                "k",
                "expected nothing with `score: list`, whose number of keys is that of `indices`",
            )),
            (_, Some(k), None) => check_range("k", k, 1..=i64::from(u32::MAX)),
            (_, None, None) => Err(Error::config("k", "expected a number of keys, got nothing")),
            (_, _, Some(_)) => Err(Error::config("indices", "expected nothing except with `score: list`")),
        }
    }

    fn choice(&self, _epoch: u64) -> Option<Choice> {
        let by = match self.score {
            Score::KeyNorm => By::KeyNorm,
            Score::EmbeddingNorm => By::Given,
            Score::Attention => By::Attention,
            Score::First | Score::List => return None,
        };
        Some(Choice::Keys { keep: self.k.unwrap_or(0) as usize, by })
    }

    fn edges(&self, context: &Context) -> Result<HeadEdges> {
        let n = context.num_tokens;
        let mut builder = EdgeSet::builder(n, n)?;
        match self.score {
            Score::First => {
                let k = self.k.unwrap_or(0);
                check_range("k", k, 1..=n as i64)?;
                builder = builder.rect(0..n, 0..k as usize);
            }
            Score::List => {
                for &index in self.indices.iter().flatten() {
                    check_range("indices", index, 0..=n as i64 - 1)?;
                    builder = builder.rect(0..n, index as usize..index as usize + 1);
                }
            }
            Score::KeyNorm | Score::EmbeddingNorm | Score::Attention => return by_content(Self::NAME),
        }
        Ok(vec![Arc::new(builder.build()?)])
    }
}
