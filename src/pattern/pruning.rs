//! Pruning: the pairs worth a budget, chosen once and kept from then on.

mod pairs;

use std::sync::Arc;

use schemars::JsonSchema;
use serde::de::{Deserializer, Error as _};
use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::edges::EdgeSet;
use super::random::head_draws;
use super::registry::exactly_one_of;
use super::scores::{Kind, Scores};
use super::shares::Shares;
use super::{Context, HeadEdges, Pattern};
use crate::budget::allocate;
use crate::error::{Error, Result};
use pairs::{best, drawn, nearest};

/// Keep as many pairs of patches as a budget allows: never more, and within one pair per head of it.
///
/// Exactly one budget is given. `keep_ratio` r keeps at most r * H * P * P of the patch-to-patch pairs of the H heads of a layer,
/// `pruning_ratio` r drops at least r * H * P * P of them; prefix rows and columns are dense besides and not counted. `flops_budget`, in `unit`, is the cost of the
/// two products of attention over all pairs, prefix included, in all heads of all layers: 2 * pairs * head_dim multiply-accumulates,
/// of which a GFLOP counts each as two; above the cost of dense attention everything is kept. Every query patch keeps at least one
/// key; a budget below that is an error.
///
/// Which pairs: `position` takes the nearest first (by |i - j|, then the lower i, then the lower j). `random` draws one key per
/// query, and then any other pairs, all equally likely, by (seed, layer, head). `attention` and `magnitude` take the best key of
/// every query, and then the pairs of the highest mean attention or mean magnitude of the scaled score in the file `scores`, which
/// `sparse_mhsa.collect_scores` writes (of equal scores the lower i, then the lower j). Heads share the budget equally, or by
/// `weights`, as `sparse_mhsa.budget.allocate` does with P as the least share; where weights differ by layer, all layers share
/// what a ratio gives them together, and one layer may keep more than another. Source: static sparsification to an attention budget,
/// promised by the vision benchmark; edge pruning by magnitude goes back to Han et al. (2015, arXiv 1506.02626).
#[derive(Debug, Default, Serialize, Deserialize, JsonSchema)]
#[serde(default)]
#[schemars(extend("oneOf" = exactly_one_of(&["keep_ratio", "pruning_ratio", "flops_budget"])))]
pub struct Pruning {
    /// Share of the patch-to-patch pairs that is kept.
    #[schemars(extend("exclusiveMinimum" = 0, "maximum" = 1))]
    keep_ratio: Option<f64>,
    /// Share of the patch-to-patch pairs that is dropped.
    #[schemars(extend("minimum" = 0, "exclusiveMaximum" = 1))]
    pruning_ratio: Option<f64>,
    /// Cost of attention in all layers, in `unit`; needs num_layers and head_dim.
    #[schemars(extend("exclusiveMinimum" = 0))]
    flops_budget: Option<f64>,
    /// `GMACs` (a multiply-accumulate counts as one) or `GFLOPs` (as two), with `flops_budget`.
    unit: Option<Unit>,
    /// `attention` or `magnitude` (with `scores`), `random` or `position`; null is `attention` with `scores` and else `position`.
    method: Option<Method>,
    /// File of calibration scores, relative to the configuration's own file.
    scores: Option<String>,
    /// Digest of that file; filled in when it is read, so that another file in its place is an error.
    scores_digest: Option<String>,
    /// Importance by head, or by layer and head, or `measured` (from `scores`); null is equal.
    #[schemars(extend("not" = { "type": "number" }, "items" = { "minimum": 0, "items": { "minimum": 0 } }))]
    weights: Option<Weights>,
    /// Seed of `random`; null draws one when a mask or module is built.
    seed: Option<i64>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
enum Unit {
    GMACs,
    GFLOPs,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
enum Method {
    Attention,
    Magnitude,
    Random,
    Position,
}

#[derive(Debug, Clone, PartialEq, Serialize, JsonSchema)]
#[serde(untagged)]
enum Weights {
    /// `measured`
    Named(Measured),
    /// By head, or by layer and head.
    Given(Shares<f64>),
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
enum Measured {
    Measured,
}

impl<'de> Deserialize<'de> for Weights {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> std::result::Result<Self, D::Error> {
        match Value::deserialize(deserializer)? {
            Value::String(name) if name == "measured" => Ok(Weights::Named(Measured::Measured)),
            value @ Value::Array(_) => {
                serde_json::from_value(value).map(Weights::Given).map_err(D::Error::custom)
            }
            other => {
                let allowed = "a list by head, a list of such lists by layer, or \"measured\"";
                Err(D::Error::custom(format!("expected {allowed}, got {other}")))
            }
        }
    }
}

/// The budget that was given, by its key.
#[derive(Clone, Copy)]
enum Budget {
    Keep(f64),
    Prune(f64),
    /// Multiply-accumulates, and what was written.
    Flops(f64, f64),
}

impl Budget {
    fn key(self) -> &'static str {
        match self {
            Budget::Keep(_) => "keep_ratio",
            Budget::Prune(_) => "pruning_ratio",
            Budget::Flops(..) => "flops_budget",
        }
    }
}

/// The whole number that `x` is up to rounding errors of a few factors, or `x`.
fn settled(x: f64) -> f64 {
    if (x - x.round()).abs() <= 8.0 * f64::EPSILON * x.abs() { x.round() } else { x }
}

impl Pruning {
    fn budget(&self) -> Result<Budget> {
        match (self.keep_ratio, self.pruning_ratio, self.flops_budget) {
            (Some(ratio), None, None) => Ok(Budget::Keep(ratio)),
            (None, Some(ratio), None) => Ok(Budget::Prune(ratio)),
            (None, None, Some(budget)) => Ok(Budget::Flops(budget * 1e9 / self.per_mac(), budget)),
            _ => Err(Error::config(
                "",
                "give exactly one of keep_ratio, pruning_ratio, flops_budget (with unit: GMACs or GFLOPs)",
            )),
        }
    }

    /// Operations that a multiply-accumulate counts as.
    fn per_mac(&self) -> f64 {
        if self.unit == Some(Unit::GFLOPs) { 2.0 } else { 1.0 }
    }

    fn method(&self) -> Method {
        self.method.unwrap_or(if self.scores.is_some() { Method::Attention } else { Method::Position })
    }

    fn scores(&self) -> Result<Option<Arc<Scores>>> {
        let Some(path) = &self.scores else { return Ok(None) };
        let scores = match &self.scores_digest {
            Some(digest) => Scores::read_known(path, digest),
            None => Scores::read(path).map(|(_, scores)| scores),
        };
        let scores = scores.map_err(|error| error.below("scores"))?;
        let (asked, held) = match (self.method(), scores.about.kind) {
            (Method::Attention, Kind::Magnitude) => ("attention", "magnitude"),
            (Method::Magnitude, Kind::Attention) => ("magnitude", "attention"),
            _ => return Ok(Some(scores)),
        };
        let message = format!("`{asked}` needs a file of such scores, but '{path}' holds those of `{held}`");
        Err(Error::config("method", message))
    }

    /// Whether all layers share the budget because their weights differ.
    fn weighs_layers(&self) -> bool {
        match &self.weights {
            Some(Weights::Named(_)) => true,
            Some(Weights::Given(shares)) => shares.by_layer(),
            None => false,
        }
    }

    /// Importance of every head of every layer that shares the budget: all layers for a budget that is for all or weights that
    /// differ by layer, otherwise only this one.
    fn weights(&self, context: &Context, scores: Option<&Scores>) -> Result<Vec<Vec<f64>>> {
        let Context { layer, num_layers, .. } = *context;
        if !self.weighs_layers() && self.flops_budget.is_none() {
            return Ok(vec![self.weights_of_layer(context, scores)?]);
        }
        let key = if self.flops_budget.is_some() { "flops_budget" } else { "weights" };
        let layers = num_layers.ok_or_else(|| {
            Error::config(
                key,
                "is shared by all layers and needs num_layers, the number of them; it is unknown here",
            )
        })?;
        if layer >= layers {
            return Err(Error::config(
                key,
                format!("is shared by {layers} layers, but this is layer {layer} (from 0)"),
            ));
        }
        if let Some(Weights::Given(Shares::Layers(lists))) = &self.weights
            && lists.len() != layers
        {
            let message = format!("expected a list for each of the {layers} layers, got {}", lists.len());
            return Err(Error::config("weights", message));
        }
        (0..layers)
            .map(|layer| self.weights_of_layer(&Context { layer, ..context.clone() }, scores))
            .collect()
    }

    fn weights_of_layer(&self, context: &Context, scores: Option<&Scores>) -> Result<Vec<f64>> {
        let heads = context.num_heads;
        match (&self.weights, scores) {
            (None, _) => Ok(vec![1.0; heads]),
            (Some(Weights::Given(shares)), _) => shares.of_layer("weights", context),
            (Some(Weights::Named(Measured::Measured)), Some(scores)) => {
                Ok(scores.importance[context.layer * heads..][..heads].to_vec())
            }
            (Some(Weights::Named(Measured::Measured)), None) => Err(Error::config(
                "weights",
                "`measured` needs `scores`, a file of sparse_mhsa.collect_scores",
            )),
        }
    }

    /// Pairs of patches that each head of this layer keeps.
    fn pairs_per_head(&self, context: &Context, scores: Option<&Scores>) -> Result<Vec<u64>> {
        let (heads, patches) = (context.num_heads, context.num_tokens as u64);
        let budget = self.budget()?;
        let weights = self.weights(context, scores)?;
        let units = (weights.len() * heads) as f64;
        let prefix = context.dense_prefix() as u64;
        let beside = (prefix * (2 * (patches + context.prefix as u64) - prefix)) as f64 * units;
        let (one_each, all) = (units * patches as f64, units * patches as f64 * patches as f64);
        let total = match budget {
            Budget::Keep(ratio) => settled(ratio * all).floor(),
            Budget::Prune(ratio) => all - settled(ratio * all).ceil(),
            Budget::Flops(macs, _) => {
                let head_dim = context.head_dim.ok_or_else(|| {
                    Error::config(
                        "flops_budget",
                        "needs head_dim, the channels of a head; it is unknown here",
                    )
                })?;
                (settled(macs / (2 * head_dim) as f64).floor() - beside).min(all)
            }
        };
        if total < one_each {
            let (bound, given) = match budget {
                Budget::Keep(ratio) => (format!("at least {}", one_each / all), ratio),
                Budget::Prune(ratio) => (format!("at most {}", 1.0 - one_each / all), ratio),
                Budget::Flops(_, given) => {
                    let macs = (one_each + beside) * 2.0 * context.head_dim.unwrap_or(1) as f64;
                    (format!("at least {}", macs * self.per_mac() / 1e9), given)
                }
            };
            let message = format!(
                "expected {bound}, which is one key for each of the {patches} patches{}, got {given}",
                if beside > 0.0 && matches!(budget, Budget::Flops(..)) {
                    " and the dense prefix"
                } else {
                    ""
                }
            );
            return Err(Error::config(budget.key(), message));
        }
        let most = match (self.method(), scores) {
            (Method::Attention | Method::Magnitude, Some(scores)) => patches * scores.sizes[3] as u64,
            _ => patches * patches,
        };
        if total > units * most as f64 {
            let message = format!(
                "the file holds {} candidates per patch, {most} pairs per head, but the budget is for {}; collect the scores \
                 again with more candidates",
                most / patches,
                (total / units).ceil()
            );
            return Err(Error::config("scores", message));
        }
        let weights: Vec<f64> = weights.concat();
        let bounds = |bound: u64| vec![bound; weights.len()];
        let pairs = allocate(total as u64, &weights, &bounds(patches), &bounds(most));
        let pairs = pairs.map_err(|error| Error::config("weights", error.to_string()))?;
        let first = if pairs.len() > heads { context.layer * heads } else { 0 };
        Ok(pairs[first..first + heads].to_vec())
    }
}

impl Pattern for Pruning {
    const NAME: &'static str = "pruning";
    const ABOUT: &'static str =
        "as many pairs as a budget allows: the nearest, drawn ones, or the best on calibration data";
    const BUDGET_KEYS: &'static [&'static [&'static str]] = &[&["keep_ratio", "pruning_ratio"]];
    const FILES: &'static [&'static str] = &["scores"];

    fn resolve(&mut self) -> Result<()> {
        if let (Some(path), None) = (&self.scores, &self.scores_digest) {
            let (digest, _) = Scores::read(path).map_err(|error| error.below("scores"))?;
            self.scores_digest = Some(digest);
        }
        Ok(())
    }

    fn check(&self) -> Result<()> {
        let fail = |key: &str, message: String| Err(Error::config(key, message));
        match self.budget()? {
            Budget::Keep(ratio) if !(ratio > 0.0 && ratio <= 1.0) => {
                return fail("keep_ratio", format!("expected more than 0 and at most 1, got {ratio}"));
            }
            Budget::Prune(ratio) if !(0.0..1.0).contains(&ratio) => {
                return fail("pruning_ratio", format!("expected at least 0 and less than 1, got {ratio}"));
            }
            Budget::Flops(_, budget) if !(budget > 0.0 && budget.is_finite()) => {
                return fail("flops_budget", format!("expected a number above 0, got {budget}"));
            }
            Budget::Flops(..) if self.unit.is_none() => {
                return fail("unit", "expected GMACs or GFLOPs with flops_budget, got nothing".into());
            }
            Budget::Keep(_) | Budget::Prune(_) if self.unit.is_some() => {
                return fail("unit", "expected nothing except with flops_budget".into());
            }
            _ => {}
        }
        let method = self.method();
        let scored = matches!(method, Method::Attention | Method::Magnitude);
        if scored && self.scores.is_none() {
            let message =
                "needs `scores`, a file of sparse_mhsa.collect_scores; allowed without one: random, position";
            return fail("method", message.into());
        }
        if self.weights == Some(Weights::Named(Measured::Measured)) && self.scores.is_none() {
            return fail("weights", "`measured` needs `scores`, a file of sparse_mhsa.collect_scores".into());
        }
        if self.scores.is_some() && !scored && self.weights != Some(Weights::Named(Measured::Measured)) {
            return fail(
                "scores",
                "expected nothing with the methods random and position, which read none".into(),
            );
        }
        if self.scores.is_none() && self.scores_digest.is_some() {
            return fail("scores_digest", "expected nothing without `scores`".into());
        }
        if self.seed.is_some() && method != Method::Random {
            return fail("seed", "expected nothing except with `method: random`".into());
        }
        if let Some(Weights::Given(shares)) = &self.weights {
            let mut values = shares.values();
            if let Some(weight) = values.find(|weight| !(weight.is_finite() && *weight >= 0.0)) {
                return fail("weights", format!("expected finite numbers of at least 0, got {weight}"));
            }
        }
        Ok(())
    }

    fn uses_layer(&self) -> bool {
        self.weighs_layers() || self.flops_budget.is_some() || self.method() != Method::Position
    }

    fn uses_head_dim(&self) -> bool {
        self.flops_budget.is_some()
    }

    fn seeds(&mut self) -> Vec<&mut Option<i64>> {
        if self.method() == Method::Random { vec![&mut self.seed] } else { Vec::new() }
    }

    fn edges(&self, context: &Context) -> Result<HeadEdges> {
        let n = context.num_tokens;
        if n == 0 {
            return Ok(vec![Arc::new(EdgeSet::builder(0, 0)?.build()?)]);
        }
        let scores = self.scores()?;
        if let Some(scores) = &scores {
            check_sizes(scores, context)?;
        }
        let pairs = self.pairs_per_head(context, scores.as_deref())?;
        let mut sets = HeadEdges::with_capacity(pairs.len());
        for (head, &count) in pairs.iter().enumerate() {
            let set = match (self.method(), &scores) {
                (Method::Random, _) => drawn(n, count, head_draws(self.seed, false, head, context)?)?,
                (Method::Attention | Method::Magnitude, Some(scores)) => {
                    best(scores, context.layer, head, count)?
                }
                // Heads with the same budget share their edges.
                _ => match pairs[..head].iter().position(|&other| other == count) {
                    Some(other) => Arc::clone(&sets[other]),
                    None => nearest(n, count)?,
                },
            };
            sets.push(set);
        }
        Ok(sets)
    }
}

/// Scores are for the layers, heads and patches that they were measured on.
fn check_sizes(scores: &Scores, context: &Context) -> Result<()> {
    let [layers, heads, patches, _] = scores.sizes;
    let (got_layers, got_heads, got_patches) = (context.num_layers, context.num_heads, context.num_tokens);
    let fits = got_layers.is_none_or(|got| got == layers) && context.layer < layers;
    if fits && heads == got_heads && patches == got_patches {
        return Ok(());
    }
    let layer =
        got_layers.map_or_else(|| format!("layer {}", context.layer), |layers| format!("{layers} layers"));
    let message = format!(
        "the file is for {patches} patches and {heads} heads in {layers} layers, but the mask is for {got_patches} patches and \
         {got_heads} heads in {layer}"
    );
    Err(Error::config("scores", message))
}
