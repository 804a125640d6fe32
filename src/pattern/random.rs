//! Keys drawn at random for each query.

use std::sync::Arc;

use schemars::JsonSchema;
use serde::de::{Deserializer, Error as _};
use serde::{Deserialize, Serialize};

use super::edges::EdgeSet;
use super::registry::{check_range, exactly_one_of};
use super::shares::Shares;
use super::{Context, Domain, EdgeCount, HeadEdges, Pattern, warn_clamped};
use crate::error::{Error, Result};
use crate::rng::{HeadDraws, Sampler};

/// Over all token indices: each query keeps exactly k distinct keys, every subset of its allowed keys equally likely.
///
/// Allowed are the keys outside the dense prefix, with `causal` those up to the query; where fewer than k are allowed, all are kept.
/// Exactly one of `k`, `keep_ratio` (r) and `mask_ratio` (1 - r) is given; a ratio means k = max(1, round(r * allowed)) for the
/// query's number of allowed keys, halves rounded to even. `symmetric` adds the transpose and does not go with `causal`. With
/// `keep_cls_dense` the prefix is dense last of all: every query keeps its keys and its queries keep every key, with `causal` every
/// past one, so that nothing sees the future. The draws depend on (seed, layer, head, epoch) and the query alone.
///
/// Source: the vision benchmark's Random baseline; the draws are this library's own.
#[derive(Debug, Serialize, Deserialize, JsonSchema)]
#[serde(default)]
#[schemars(extend("oneOf" = exactly_one_of(&["k", "keep_ratio", "mask_ratio"])))]
pub struct Random {
    /// Keys per query: one number, a list by head, or a list by layer of lists by head.
    #[schemars(extend("minimum" = 1, "items" = { "minimum": 1, "items": { "minimum": 1 } }))]
    k: Option<Shares<i64>>,
    /// Share of the allowed keys that is kept.
    #[schemars(extend("exclusiveMinimum" = 0, "maximum" = 1))]
    keep_ratio: Option<f64>,
    /// Share of the allowed keys that is dropped.
    #[schemars(extend("minimum" = 0, "exclusiveMaximum" = 1))]
    mask_ratio: Option<f64>,
    /// Only j <= i.
    causal: bool,
    /// Add the transpose.
    symmetric: bool,
    /// Prefix tokens see, and are seen by, all.
    keep_cls_dense: bool,
    /// All heads share one draw.
    per_head_same: bool,
    /// Seed of the draws; null draws one when a mask or module is built.
    #[serde(deserialize_with = "seed_or_none")]
    #[schemars(extend("type" = ["integer", "string", "null"], "pattern" = "^[Nn][Oo][Nn][Ee]$"))]
    seed: Option<i64>,
    /// Draw anew in every epoch.
    reseed_each_epoch: bool,
}

impl Default for Random {
    fn default() -> Self {
        Random {
            k: None,
            keep_ratio: None,
            mask_ratio: None,
            causal: false,
            symmetric: false,
            keep_cls_dense: true,
            per_head_same: false,
            seed: None,
            reseed_each_epoch: true,
        }
    }
}

/// An integer or null. The reference's own file writes `seed: None`, which YAML reads as a string, so that string is null too.
fn seed_or_none<'de, D: Deserializer<'de>>(deserializer: D) -> std::result::Result<Option<i64>, D::Error> {
    match serde_json::Value::deserialize(deserializer)? {
        serde_json::Value::Null => Ok(None),
        serde_json::Value::String(text) if text.eq_ignore_ascii_case("none") => Ok(None),
        value => value.as_i64().map(Some).ok_or_else(|| {
            D::Error::custom(format!("expected an integer, or null for a drawn one; got {value}"))
        }),
    }
}

impl Random {
    /// Keys to draw for a query with this many allowed ones; `k` is that of its head.
    fn drawn(&self, k: Option<i64>, allowed: usize) -> usize {
        match (k, self.keep_ratio, self.mask_ratio) {
            (Some(k), ..) => (k as usize).min(allowed),
            (_, Some(keep), _) => of_ratio(keep, allowed),
            (.., mask) => of_ratio(1.0 - mask.unwrap_or_default(), allowed),
        }
    }

    /// Keys of a query that sees those before it and, unless `causal`, those after.
    fn visible(&self, query: usize, num_tokens: usize) -> usize {
        if self.causal { query + 1 } else { num_tokens }
    }

    /// Leading tokens that are kept without being drawn.
    fn never_drawn(&self, context: &Context) -> usize {
        if self.keep_cls_dense { context.dense_prefix() } else { 0 }
    }

    /// k of each head that has its own draw, if it is a number.
    fn keys(&self, context: &Context) -> Result<Vec<Option<i64>>> {
        let keys = self.k.as_ref().map(|k| k.of_layer("k", context)).transpose()?;
        let (n, drawn_from) = (context.num_tokens, context.num_tokens - self.never_drawn(context));
        if let Some(k) = keys.iter().flatten().max().filter(|&&k| k > drawn_from as i64) {
            warn_clamped(format!("random: k {k} acts as {drawn_from} for {n} tokens"));
        }
        let heads = if self.per_head_same { 1 } else { context.num_heads };
        Ok((0..heads)
            .map(|head| keys.as_ref().map(|keys| if keys.len() == 1 { keys[0] } else { keys[head] }))
            .collect())
    }

    fn head(&self, k: Option<i64>, draws: HeadDraws, context: &Context) -> Result<Arc<EdgeSet>> {
        let n = context.num_tokens;
        let first = self.never_drawn(context);
        let (mut sampler, mut chosen) = (Sampler::new(n)?, Vec::new());
        let drawn = EdgeSet::builder(n, n)?.by_row(|query, out| {
            if query < first {
                out.push(0..self.visible(query, n));
            } else {
                let allowed = self.visible(query, n) - first;
                sampler.choose(&mut draws.row(query), allowed, self.drawn(k, allowed), &mut chosen);
                out.extend(chosen.iter().map(|&key| first + key..first + key + 1));
            }
        });
        let mut builder = drawn;
        if self.symmetric {
            let transposed = builder.clone().build()?.transposed();
            builder = builder.shifted(&transposed, 0);
        }
        Ok(Arc::new(builder.rect(first..n, 0..first).build()?))
    }
}

fn of_ratio(keep: f64, allowed: usize) -> usize {
    ((keep * allowed as f64).round_ties_even() as usize).clamp(1, allowed.max(1)).min(allowed)
}

impl Pattern for Random {
    const NAME: &'static str = "random";
    const ABOUT: &'static str = "a given number of keys per query, drawn uniformly without replacement";
    const DEFAULT_PREFIX: Option<usize> = Some(1);
    const BUDGET_KEYS: &'static [&'static [&'static str]] = &[&["k", "keep_ratio", "mask_ratio"]];
    const IGNORED: &'static [&'static str] = &["plot_once"];

    fn check(&self) -> Result<()> {
        let given = [self.k.is_some(), self.keep_ratio.is_some(), self.mask_ratio.is_some()];
        if given.into_iter().filter(|given| *given).count() != 1 {
            let message = "give exactly one of k (keys per query), keep_ratio, mask_ratio";
            return Err(Error::config("", message));
        }
        if self.causal && self.symmetric {
            return Err(Error::config(
                "symmetric",
                "expected false with `causal: true`, because the transposed pairs would show the future",
            ));
        }
        if let Some(k) = &self.k {
            k.values().try_for_each(|k| check_range("k", k, 1..=i64::MAX))?;
            if self.per_head_same && !matches!(k, Shares::All(_)) {
                return Err(Error::config("k", "expected one number with `per_head_same: true`, got a list"));
            }
        }
        if let Some(keep) = self.keep_ratio.filter(|keep| !(*keep > 0.0 && *keep <= 1.0)) {
            return Err(Error::config(
                "keep_ratio",
                format!("expected more than 0 and at most 1, got {keep}"),
            ));
        }
        if let Some(mask) = self.mask_ratio.filter(|mask| !(*mask >= 0.0 && *mask < 1.0)) {
            return Err(Error::config(
                "mask_ratio",
                format!("expected at least 0 and less than 1, got {mask}"),
            ));
        }
        Ok(())
    }

    fn domain(&self) -> Domain {
        Domain::Tokens
    }

    fn uses_layer(&self) -> bool {
        true
    }

    fn uses_epoch(&self) -> bool {
        self.reseed_each_epoch
    }

    fn seeds(&mut self) -> Vec<&mut Option<i64>> {
        vec![&mut self.seed]
    }

    /// Every query draws a known number of keys; which ones they are counts only where pairs may be drawn twice or prefix keys be
    /// drawn at all.
    fn count(&self, context: &Context) -> Result<Option<Vec<EdgeCount>>> {
        let (n, prefix) = (context.num_tokens, context.prefix);
        let first = self.never_drawn(context);
        if self.symmetric || first != prefix {
            return Ok(None);
        }
        let of_head = |k| {
            let mut count = EdgeCount::default();
            for query in 0..n {
                let visible = self.visible(query, n);
                if query < first {
                    count.add(visible, 0);
                } else {
                    let drawn = self.drawn(k, visible - first);
                    count.add(first + drawn, drawn);
                }
            }
            count
        };
        Ok(Some(self.keys(context)?.into_iter().map(of_head).collect()))
    }

    fn edges(&self, context: &Context) -> Result<HeadEdges> {
        let head =
            |(head, k)| self.head(k, head_draws(self.seed, self.reseed_each_epoch, head, context)?, context);
        self.keys(context)?.into_iter().enumerate().map(head).collect()
    }
}

/// The draws of head `head` here.
pub(super) fn head_draws(
    seed: Option<i64>,
    reseed_each_epoch: bool,
    head: usize,
    context: &Context,
) -> Result<HeadDraws> {
    let seed = seed.ok_or_else(|| {
        Error::config(
            "seed",
            "expected a number: null means one that is drawn when a mask or module is built",
        )
    })?;
    let epoch = if reseed_each_epoch { context.epoch } else { 0 };
    Ok(HeadDraws::new(seed, context.layer, head, epoch))
}
