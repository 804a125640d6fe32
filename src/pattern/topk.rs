//! Top-k: every query keeps the keys with the highest scores.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::choice::{Choice, OfHead};
use super::registry::check_range;
use super::shares::Shares;
use super::{Context, Domain, HeadEdges, Pattern, by_content};
use crate::error::{Error, Result};

/// Query i keeps the k keys j with the highest scaled scores `scale * q_i . k_j`; of equal scores the lower j. A k of more tokens
/// than there are keeps all of them, with a warning; k = 0 keeps the dense prefix alone, and without it no key, so that outputs are
/// zero.
///
/// The choice is made per sample and head, and no gradient passes through it. `causal` chooses among keys j <= i, fewer than k
/// where there are fewer. `symmetric` adds the pair (j, i) for every chosen (i, j). `keep_cls_dense` keeps the prefix dense: its
/// keys for every query and, unless `cls_row_dense` is false, every key for its queries (with `causal`: every past one).
/// `k_schedule` replaces k by a number that changes with the epoch;
/// lists give every head its own, such as `sparse_mhsa.budget.allocate` makes. Source: the vision benchmark's Top-K baseline.
#[derive(Debug, Serialize, Deserialize, JsonSchema)]
#[serde(default)]
pub struct TopK {
    /// Keys that every query keeps: one number, a list by head, or a list by layer of lists by head.
    #[schemars(extend(
        "minimum" = 0,
        "maximum" = MAX_KEEP,
        "items" = { "minimum": 0, "maximum": MAX_KEEP, "items": { "minimum": 0, "maximum": MAX_KEEP } }
    ))]
    k: Shares<i64>,
    /// Only j <= i.
    causal: bool,
    /// Add the transpose.
    symmetric: bool,
    /// Every query keeps the keys of the prefix.
    keep_cls_dense: bool,
    /// Prefix tokens keep every key, with `keep_cls_dense`.
    cls_row_dense: bool,
    /// k by epoch: `{kind, k_start, k_end, epochs}`, kind `linear`, `cosine` or `step`; a single epoch has `k_end`.
    k_schedule: Option<Schedule>,
}

impl Default for TopK {
    fn default() -> Self {
        TopK {
            k: Shares::All(3),
            causal: false,
            symmetric: false,
            keep_cls_dense: true,
            cls_row_dense: true,
            k_schedule: None,
        }
    }
}

/// k as a function of the epoch: `k_start` at epoch 0, `k_end` from the last of `epochs` epochs on, monotone between;
/// a single epoch has `k_end`.
#[derive(Debug, Clone, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
struct Schedule {
    kind: Kind,
    #[schemars(range(min = 0, max = MAX_KEEP))]
    k_start: i64,
    #[schemars(range(min = 0, max = MAX_KEEP))]
    k_end: i64,
    #[schemars(range(min = 1, max = MAX_KEEP))]
    epochs: i64,
}

/// How k goes from its start to its end.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
enum Kind {
    /// In equal steps, rounded.
    Linear,
    /// Along half a cosine, slow at both ends, rounded.
    Cosine,
    /// At once, in the middle of the epochs.
    Step,
}

impl Schedule {
    fn at(&self, epoch: u64) -> i64 {
        let last = (self.epochs - 1).max(0) as f64;
        let progress = if last == 0.0 { 1.0 } else { (epoch as f64 / last).min(1.0) };
        let share = match self.kind {
            Kind::Linear => progress,
            Kind::Cosine => (1.0 - (std::f64::consts::PI * progress).cos()) / 2.0,
            Kind::Step => f64::from(u8::from(progress >= 0.5)),
        };
        // Both ends are exact: the share is exactly 0 and 1 there.
        (self.k_start as f64 + (self.k_end - self.k_start) as f64 * share).round() as i64
    }
}

/// More keys than this can mean nothing at any size accepted.
const MAX_KEEP: i64 = u32::MAX as i64;

impl Pattern for TopK {
    const NAME: &'static str = "topk";
    const ABOUT: &'static str = "the k keys with the highest scores, chosen anew for every input";
    const DEFAULT_PREFIX: Option<usize> = Some(1);
    const BUDGET_KEYS: &'static [&'static [&'static str]] = &[&["k"]];

    fn check(&self) -> Result<()> {
        self.k.values().try_for_each(|k| check_range("k", k, 0..=MAX_KEEP))?;
        if self.causal && self.symmetric {
            return Err(Error::config(
                "symmetric",
                "expected false with `causal: true`, because the transposed pairs would show the future",
            ));
        }
        if let Some(schedule) = &self.k_schedule {
            check_range("k_schedule.k_start", schedule.k_start, 0..=MAX_KEEP)?;
            check_range("k_schedule.k_end", schedule.k_end, 0..=MAX_KEEP)?;
            check_range("k_schedule.epochs", schedule.epochs, 1..=MAX_KEEP)?;
        }
        Ok(())
    }

    fn domain(&self) -> Domain {
        Domain::Tokens
    }

    fn uses_layer(&self) -> bool {
        self.k_schedule.is_none() && self.k.by_layer()
    }

    fn uses_epoch(&self) -> bool {
        self.k_schedule.is_some()
    }

    fn choice(&self, epoch: u64) -> Option<Choice> {
        Some(Choice::TopK {
            keep: match &self.k_schedule {
                Some(schedule) => schedule.at(epoch),
                None => self.k.values().max().unwrap_or_default(),
            } as usize,
            causal: self.causal,
            symmetric: self.symmetric,
            dense_rows: self.keep_cls_dense && self.cls_row_dense,
        })
    }

    fn choice_per_head(&self, context: &Context) -> Result<Option<Vec<OfHead>>> {
        if self.k_schedule.is_some() || matches!(self.k, Shares::All(_)) {
            return Ok(None);
        }
        let keys = self.k.of_layer("k", context)?;
        Ok(Some(keys.into_iter().map(|k| OfHead { keys: k as usize, distances: 0 }).collect()))
    }

    fn keeps_prefix_dense(&self) -> bool {
        self.keep_cls_dense
    }

    fn edges(&self, _context: &Context) -> Result<HeadEdges> {
        by_content(Self::NAME)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn keeps(kind: Kind, k_start: i64, k_end: i64, epochs: i64) -> Vec<i64> {
        let schedule = Schedule { kind, k_start, k_end, epochs };
        (0..epochs as u64 + 2).map(|epoch| schedule.at(epoch)).collect()
    }

    #[test]
    fn schedules_are_exact_at_both_ends_and_monotone_between() {
        assert_eq!(keeps(Kind::Linear, 10, 2, 5), [10, 8, 6, 4, 2, 2, 2]);
        assert_eq!(keeps(Kind::Cosine, 0, 100, 5), [0, 15, 50, 85, 100, 100, 100]);
        assert_eq!(keeps(Kind::Step, 7, 3, 4), [7, 7, 3, 3, 3, 3]);
        assert_eq!(keeps(Kind::Linear, 9, 4, 1), [4, 4, 4]);
    }
}
