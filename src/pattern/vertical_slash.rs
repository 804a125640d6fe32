//! Columns and diagonals: the vertical-slash pattern (Jiang et al., 2024, MInference, arXiv 2407.02490), listed or estimated.

use std::sync::Arc;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::choice::{Choice, OfHead};
use super::edges::EdgeSet;
use super::registry::{at_least_one_of, check_range};
use super::shares::Shares;
use super::{Context, HeadEdges, Pattern, by_content};
use crate::error::{Error, Result};

/// Query patch i keeps key patch j if j is in `vertical`, or |i - j| is in `slash`, or |i - j| <= `window`; with `causal` also
/// j <= i.
///
/// With `num_vertical` or `num_slash` instead of lists, columns and distances are estimated anew for every sample and head, from
/// the causal attention weights p_ij among patches (a softmax over patches alone, prefix tokens aside) of the last `last_queries`
/// of them that padding leaves: the columns are the `num_vertical`
/// keys j with the largest sum of p_ij over those i, the distances the `num_slash` numbers d with the largest sum of p_ij over
/// i - j = d; of equal sums the lower number, and all of them where there are fewer. That is a causal mask and asks for
/// `causal: true`; no gradient passes through the choice. Source: MInference, Jiang et al., 2024 (arXiv 2407.02490), which
/// also keeps the first keys (here: prefix tokens) and the nearest (here: `window`).
#[derive(Debug, Serialize, Deserialize, JsonSchema)]
#[serde(default)]
#[schemars(extend("anyOf" = at_least_one_of(&["vertical", "slash", "window", "num_vertical", "num_slash"])))]
pub struct VerticalSlash {
    /// Key patches that every query keeps.
    #[schemars(inner(range(min = 0)))]
    vertical: Vec<i64>,
    /// Distances that every query keeps, to both sides unless `causal`; those beyond the last patch keep nothing.
    #[schemars(inner(range(min = 0)))]
    slash: Vec<i64>,
    /// Half width of a sliding window besides.
    #[schemars(range(min = 0))]
    window: Option<i64>,
    /// Only j <= i; must be true for estimated columns and distances, which are never anything else.
    causal: bool,
    /// How many key patches to estimate, in place of lists: one number, a list by head, or a list by layer of lists by head.
    #[schemars(extend(
        "minimum" = 0,
        "maximum" = MOST,
        "items" = { "minimum": 0, "maximum": MOST, "items": { "minimum": 0, "maximum": MOST } }
    ))]
    num_vertical: Option<Shares<i64>>,
    /// How many distances to estimate, in place of lists; likewise.
    #[schemars(extend(
        "minimum" = 0,
        "maximum" = MOST,
        "items" = { "minimum": 0, "maximum": MOST, "items": { "minimum": 0, "maximum": MOST } }
    ))]
    num_slash: Option<Shares<i64>>,
    /// Queries whose attention the estimate looks at.
    #[schemars(range(min = 1, max = MOST))]
    last_queries: i64,
}

impl Default for VerticalSlash {
    fn default() -> Self {
        VerticalSlash {
            vertical: Vec::new(),
            slash: Vec::new(),
            window: None,
            causal: false,
            num_vertical: None,
            num_slash: None,
            last_queries: 64,
        }
    }
}

/// No sequence has more tokens.
const MOST: i64 = u32::MAX as i64;

impl VerticalSlash {
    /// `num_vertical` and `num_slash`, with their names.
    fn counts(&self) -> [(&'static str, &Shares<i64>); 2] {
        const NONE: &Shares<i64> = &Shares::All(0);
        [("num_vertical", &self.num_vertical), ("num_slash", &self.num_slash)]
            .map(|(key, count)| (key, count.as_ref().unwrap_or(NONE)))
    }

    /// The most that a head chooses.
    fn most(&self) -> [usize; 2] {
        self.counts().map(|(_, count)| count.values().max().unwrap_or_default() as usize)
    }

    fn is_estimated(&self) -> bool {
        self.num_vertical.is_some() || self.num_slash.is_some()
    }

    fn check_estimate(&self) -> Result<()> {
        let exclusive = |key: &str| {
            Error::config(
                key,
                "expected nothing with num_vertical or num_slash, which estimate columns and distances",
            )
        };
        if !self.vertical.is_empty() {
            return Err(exclusive("vertical"));
        }
        if !self.slash.is_empty() {
            return Err(exclusive("slash"));
        }
        if !self.causal {
            return Err(Error::config(
                "causal",
                "expected true with num_vertical or num_slash, because the estimate is one of causal attention; got false",
            ));
        }
        if self.most() == [0, 0] {
            return Err(Error::config("num_vertical", "expected at least 1 here or in num_slash, got 0"));
        }
        Ok(())
    }
}

impl Pattern for VerticalSlash {
    const NAME: &'static str = "vertical_slash";
    const ABOUT: &'static str = "key columns and distances, listed or estimated from the attention of the last queries, plus a window";
    const BUDGET_KEYS: &'static [&'static [&'static str]] = &[&["window"], &["num_slash"], &["num_vertical"]];

    fn check(&self) -> Result<()> {
        for (key, count) in self.counts() {
            count.values().try_for_each(|count| check_range(key, count, 0..=MOST))?;
        }
        check_range("last_queries", self.last_queries, 1..=MOST)?;
        if self.is_estimated() {
            self.check_estimate()?;
        } else if self.vertical.is_empty() && self.slash.is_empty() && self.window.is_none() {
            return Err(Error::config(
                "",
                "give at least one of vertical (key columns), slash (distances), window (half width), num_vertical and \
                 num_slash (how many to estimate)",
            ));
        }
        self.vertical.iter().try_for_each(|&column| check_range("vertical", column, 0..=i64::MAX))?;
        self.slash.iter().try_for_each(|&distance| check_range("slash", distance, 0..=i64::MAX))?;
        self.window.map_or(Ok(()), |window| check_range("window", window, 0..=i64::MAX))
    }

    fn choice(&self, _epoch: u64) -> Option<Choice> {
        let [columns, distances] = self.most();
        self.is_estimated().then(|| Choice::VerticalSlash {
            columns,
            distances,
            last_queries: self.last_queries as usize,
            nearest: self.window.map_or(0, |window| (window as usize).saturating_add(1)),
        })
    }

    fn uses_layer(&self) -> bool {
        self.counts().iter().any(|(_, count)| count.by_layer())
    }

    fn choice_per_head(&self, context: &Context) -> Result<Option<Vec<OfHead>>> {
        if self.counts().iter().all(|(_, count)| matches!(count, Shares::All(_))) {
            return Ok(None);
        }
        let [columns, distances] = self.counts().map(|(key, count)| count.of_layer(key, context));
        let (columns, distances) = (columns?, distances?);
        let at = |counts: &[i64], head: usize| counts[if counts.len() == 1 { 0 } else { head }] as usize;
        let of_head = |head| OfHead { keys: at(&columns, head), distances: at(&distances, head) };
        Ok(Some((0..context.num_heads).map(of_head).collect()))
    }

    fn edges(&self, context: &Context) -> Result<HeadEdges> {
        if self.is_estimated() {
            return by_content(Self::NAME);
        }
        let (n, causal) = (context.num_tokens, self.causal);
        let mut builder = EdgeSet::builder(n, n)?;
        for &column in &self.vertical {
            if column >= n as i64 {
                return Err(Error::config(
                    "vertical",
                    format!("expected key columns of the {n} patches (from 0), got {column}"),
                ));
            }
            let column = column as usize;
            builder = builder.rect(if causal { column } else { 0 }..n, column..column + 1);
        }
        for &distance in &self.slash {
            builder = builder.diagonal(-distance, 0..n, 0..n);
            if !causal {
                builder = builder.diagonal(distance, 0..n, 0..n);
            }
        }
        if let Some(window) = self.window {
            builder = builder.band((-window, if causal { 0 } else { window }, 1), 0..n, 0..n);
        }
        Ok(vec![Arc::new(builder.build()?)])
    }
}
