//! BigBird (Zaheer et al., 2020, arXiv 2007.14062): window, global tokens and a few random keys per query.

use std::ops::Range;
use std::sync::Arc;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::edges::{Builder, EdgeSet};
use super::longformer::global_tokens;
use super::random::head_draws;
use super::segments::merge_ranges;
use super::{Context, Domain, EdgeCount, HeadEdges, Pattern, warn_clamped};
use crate::error::Result;
use crate::rng::{HeadDraws, Sampler};

/// Over all token indices, CLS included: query i keeps key j if |i - j| <= window (for a window of at least 1), or if i or j is
/// global, or (with `keep_cls_dense`) a prefix token. Besides, each query keeps `num_random` distinct keys, every subset of
/// those that are neither kept already nor the query itself equally likely; all of them where there are fewer. `symmetric`
/// adds the transpose. The draws depend on (seed, layer, head, epoch) and the query alone.
///
/// Source: BigBird, Zaheer et al., 2020 (arXiv 2007.14062); the draws are this library's own.
#[derive(Debug, Serialize, Deserialize, JsonSchema)]
#[serde(default)]
pub struct BigBird {
    /// Half width of the sliding window; 0 for none.
    window: i64,
    /// Random keys per query.
    num_random: i64,
    /// The first this many tokens are global.
    num_global: i64,
    /// Which tokens are global, instead of the first ones.
    global_indices: Option<Vec<i64>>,
    /// Add the transpose.
    symmetric: bool,
    /// Prefix tokens see, and are seen by, all.
    keep_cls_dense: bool,
    /// All heads share one draw.
    per_head_same: bool,
    /// Accepted without effect: a mask does not depend on the batch.
    per_batch_same: bool,
    /// Seed of the draws; null draws one when a mask or module is built.
    seed: Option<i64>,
    /// Draw anew in every epoch.
    reseed_each_epoch: bool,
}

impl Default for BigBird {
    fn default() -> Self {
        BigBird {
            window: 1,
            num_random: 1,
            num_global: 1,
            global_indices: None,
            symmetric: false,
            keep_cls_dense: true,
            per_head_same: false,
            per_batch_same: true,
            seed: Some(1234),
            reseed_each_epoch: true,
        }
    }
}

impl BigBird {
    /// Window, globals and prefix; and the globals and prefix as ranges.
    fn base(&self, context: &Context) -> Result<(Builder, Vec<Range<usize>>)> {
        let n = context.num_tokens;
        let tokens = global_tokens(Self::NAME, self.num_global, self.global_indices.as_deref(), n);
        let mut globals: Vec<_> = tokens.into_iter().map(|token| token..token + 1).collect();
        if self.keep_cls_dense {
            globals.push(0..context.dense_prefix());
        }
        merge_ranges(&mut globals);
        let mut builder = EdgeSet::builder(n, n)?;
        if self.window > 0 {
            builder = builder.band((-self.window, self.window, 1), 0..n, 0..n);
        }
        builder = globals.iter().fold(builder, |builder, tokens| builder.global(tokens.clone()));
        Ok((builder, globals))
    }

    /// From how many of the `n` keys `query` draws: all but those it keeps already and itself, which become `taken`.
    fn allowed(
        &self,
        query: usize,
        n: usize,
        globals: &[Range<usize>],
        taken: &mut Vec<Range<usize>>,
    ) -> usize {
        let window = self.window.clamp(0, n as i64) as usize;
        taken.clear();
        taken.extend(globals.iter().cloned());
        taken.push(query.saturating_sub(window)..(query + window + 1).min(n));
        merge_ranges(taken);
        n - taken.iter().map(ExactSizeIterator::len).sum::<usize>()
    }

    fn head(&self, draws: HeadDraws, context: &Context) -> Result<Arc<EdgeSet>> {
        let n = context.num_tokens;
        let (base, globals) = self.base(context)?;
        let num_random = self.num_random.max(0) as usize;
        let (mut sampler, mut chosen, mut taken) = (Sampler::new(n)?, Vec::new(), Vec::new());
        let drawn = EdgeSet::builder(n, n)?.by_row(|query, out| {
            if globals.iter().any(|range| range.contains(&query)) {
                return;
            }
            let allowed = self.allowed(query, n, &globals, &mut taken);
            sampler.choose(&mut draws.row(query), allowed, num_random, &mut chosen);
            chosen.sort_unstable();
            // The allowed keys are counted with the taken ranges left out; walking both in order puts them back.
            let (mut skipped, mut ahead) = (0, taken.iter().peekable());
            for &rank in &chosen {
                while let Some(range) = ahead.next_if(|range| range.start <= rank + skipped) {
                    skipped += range.len();
                }
                out.push(rank + skipped..rank + skipped + 1);
            }
        });
        let drawn = drawn.build()?;
        let mut builder = base.shifted(&drawn, 0);
        if self.symmetric {
            builder = builder.shifted(&drawn.transposed(), 0);
        }
        Ok(Arc::new(builder.build()?))
    }
}

impl Pattern for BigBird {
    const NAME: &'static str = "bigbird";
    const ABOUT: &'static str = "sliding window, global tokens and a few random keys per query";
    const DEFAULT_PREFIX: Option<usize> = Some(1);
    const BUDGET_KEYS: &'static [&'static [&'static str]] = &[&["num_random"], &["window"], &["num_global"]];
    const IGNORED: &'static [&'static str] = &["plot_once"];

    fn check(&self) -> Result<()> {
        for (key, value) in
            [("window", self.window), ("num_random", self.num_random), ("num_global", self.num_global)]
        {
            if value < 0 {
                warn_clamped(format!("bigbird: {key} {value} acts as 0"));
            }
        }
        if !self.per_batch_same {
            log::info!("bigbird: per_batch_same has no effect, because masks do not depend on the batch");
        }
        Ok(())
    }

    fn domain(&self) -> Domain {
        Domain::Tokens
    }

    fn uses_layer(&self) -> bool {
        self.num_random > 0
    }

    fn uses_epoch(&self) -> bool {
        self.num_random > 0 && self.reseed_each_epoch
    }

    fn seeds(&mut self) -> Vec<&mut Option<i64>> {
        vec![&mut self.seed]
    }

    /// Every query that is not global draws a known number of keys; which ones they are counts only where pairs may be drawn twice
    /// or prefix keys be drawn at all.
    fn count(&self, context: &Context) -> Result<Option<Vec<EdgeCount>>> {
        let (n, prefix) = (context.num_tokens, context.prefix);
        let (base, globals) = self.base(context)?;
        let covered =
            prefix == 0 || globals.first().is_some_and(|first| first.start == 0 && first.end >= prefix);
        if self.symmetric || !covered {
            return Ok(None);
        }
        let mut count = EdgeCount::of(&base.build()?, prefix);
        let (num_random, mut taken) = (self.num_random.max(0) as usize, Vec::new());
        for query in (0..n).filter(|query| !globals.iter().any(|range| range.contains(query))) {
            let drawn = num_random.min(self.allowed(query, n, &globals, &mut taken));
            count.add(drawn, drawn);
        }
        Ok(Some(vec![count]))
    }

    fn edges(&self, context: &Context) -> Result<HeadEdges> {
        if self.num_random <= 0 {
            return Ok(vec![Arc::new(self.base(context)?.0.build()?)]);
        }
        let heads = if self.per_head_same { 1 } else { context.num_heads };
        (0..heads)
            .map(|head| self.head(head_draws(self.seed, self.reseed_each_epoch, head, context)?, context))
            .collect()
    }
}
