//! Fibottention (Rahimian et al., 2024, arXiv 2406.19391): each head keeps the distances of one Wythoff or Fibonacci sequence.

use std::sync::Arc;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::edges::EdgeSet;
use super::registry::check_range;
use super::{Context, HeadEdges, Pattern};
use crate::error::Result;
use crate::rng::cpython_shuffle;

/// Query patch i of head h keeps key patch j if |i - j| is in F_h.
///
/// F_h is row h of the Wythoff array (`schedule: wythoff`) or 1, 2, 3, 5, 8, ... (`fibonacci`), cut at the head's window
/// w_h, which grows from `w_min` at the first head to `w_max` (default: patches / 3) at the last. `modified` puts the two
/// preceding terms before the row: i - 1 and floor(i * phi) before row i, 0 and 1 before the Fibonacci numbers, whose 0 is the query
/// itself. Distances are a set, so one that comes twice is one edge. `shuffled` deals the rows to the heads by a permutation seeded with the layer;
/// `shared_offsets` then gives every head the row of head 0. The first term is kept even beyond w_h unless `strict_window`.
///
/// Source: Fibottention, Rahimian et al., 2024 (arXiv 2406.19391), and its published code.
#[derive(Debug, Serialize, Deserialize, JsonSchema)]
#[serde(default)]
pub struct Fibottention {
    /// Sequence that a head's distances come from.
    schedule: Schedule,
    /// Put the two preceding terms before each sequence.
    modified: bool,
    /// `modified` includes the first row of the Wythoff array.
    prefix_first_head: bool,
    /// Deal the sequences to the heads anew in every layer.
    shuffled: bool,
    /// Every head takes the sequence of head 0.
    shared_offsets: bool,
    /// One prefix token unless the caller or the model has another number; `false` is `num_prefix_tokens: 0`, which both yield to.
    add_class_token: bool,
    /// Window of the first head, in patches.
    #[schemars(range(min = 0, max = MAX_WINDOW))]
    w_min: i64,
    /// Window of the last head, in patches; null for a third of them.
    #[schemars(range(min = 0, max = MAX_WINDOW))]
    w_max: Option<i64>,
    /// Drop the first term too where it is beyond the window.
    strict_window: bool,
}

impl Default for Fibottention {
    fn default() -> Self {
        Fibottention {
            schedule: Schedule::Wythoff,
            modified: false,
            prefix_first_head: true,
            shuffled: true,
            shared_offsets: false,
            add_class_token: true,
            w_min: DEFAULT_W_MIN,
            w_max: None,
            strict_window: false,
        }
    }
}

/// Which sequence a head's distances come from.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub(super) enum Schedule {
    /// Head i takes row i of the Wythoff array.
    Wythoff,
    /// Every head takes the first row: 1, 2, 3, 5, 8, ...
    Fibonacci,
}

pub(super) const DEFAULT_W_MIN: i64 = 5;
const MAX_WINDOW: i64 = 1 << 40;

/// How the sequences of all heads are made.
#[derive(Debug, Clone, Copy)]
pub(super) struct Sequences {
    pub schedule: Schedule,
    pub modified: bool,
    pub prefix_first_head: bool,
    pub w_min: i64,
    pub w_max: i64,
    pub strict_window: bool,
}

impl Sequences {
    /// The published variant for images: windows from 5 to a third of the patches.
    pub(super) fn for_patches(patches: usize, modified: bool) -> Self {
        Sequences {
            schedule: Schedule::Wythoff,
            modified,
            prefix_first_head: true,
            w_min: DEFAULT_W_MIN,
            w_max: (patches / 3) as i64,
            strict_window: false,
        }
    }

    /// w_i = w_min + trunc((w_max - w_min) / (H - 1) * (i - 1)) for head i = 1..H, in doubles and in exactly this order: the
    /// rounding decides a term for some sizes, and published masks were made this way.
    fn window(&self, head: usize, num_heads: usize) -> i64 {
        if num_heads == 1 {
            return self.w_min;
        }
        let step = (self.w_max - self.w_min) as f64 / (num_heads - 1) as f64;
        self.w_min + (step * (head - 1) as f64) as i64
    }

    /// First two terms for head i = 1..H. With f_i = floor(i * phi), row i of the Wythoff array starts f_i + i - 1, 2 f_i + i - 1,
    /// and the two terms before those are i - 1, f_i.
    fn start(&self, head: usize) -> (i64, i64) {
        let i = match self.schedule {
            Schedule::Wythoff => head as i64,
            Schedule::Fibonacci => 1,
        };
        let f = (i + (5 * i * i).isqrt()) / 2;
        if self.modified && (i > 1 || self.prefix_first_head) {
            (i - 1, f)
        } else {
            (f + i - 1, 2 * f + i - 1)
        }
    }

    /// The distances of head i = 1..H, ascending. A distance that the sequence repeats is repeated here.
    fn head(&self, head: usize, num_heads: usize) -> Vec<i64> {
        let window = self.window(head, num_heads);
        let (first, mut next) = self.start(head);
        let mut terms = vec![first];
        while next <= window {
            let following = terms[terms.len() - 1] + next;
            terms.push(next);
            next = following;
        }
        if self.strict_window {
            terms.retain(|&term| term <= window);
        }
        terms
    }

    /// The distances of every head, dealt out by the layer's permutation if `shuffle_seed` is given.
    pub(super) fn all(&self, num_heads: usize, shuffle_seed: Option<usize>) -> Vec<Vec<i64>> {
        let rows: Vec<_> = (1..=num_heads).map(|head| self.head(head, num_heads)).collect();
        match shuffle_seed {
            None => rows,
            Some(seed) => {
                cpython_shuffle(seed as u64, num_heads).into_iter().map(|row| rows[row].clone()).collect()
            }
        }
    }
}

impl Pattern for Fibottention {
    const NAME: &'static str = "fibottention";
    const ALIASES: &'static [&'static str] = &["fibo", "wythoff"];
    const ABOUT: &'static str = "each head keeps the distances of one Wythoff (or Fibonacci) sequence";
    const DEFAULT_PREFIX: Option<usize> = Some(1);
    const BUDGET_KEYS: &'static [&'static [&'static str]] = &[&["w_max"], &["w_min"]];

    fn check(&self) -> Result<()> {
        check_range("w_min", self.w_min, 0..=MAX_WINDOW)?;
        self.w_max.map_or(Ok(()), |w_max| check_range("w_max", w_max, 0..=MAX_WINDOW))
    }

    fn forced_prefix(&self) -> Option<usize> {
        (!self.add_class_token).then_some(0)
    }

    fn uses_layer(&self) -> bool {
        self.shuffled
    }

    fn edges(&self, context: &Context) -> Result<HeadEdges> {
        let n = context.num_tokens;
        let sequences = Sequences {
            schedule: self.schedule,
            modified: self.modified,
            prefix_first_head: self.prefix_first_head,
            w_min: self.w_min,
            w_max: self.w_max.unwrap_or((n / 3) as i64),
            strict_window: self.strict_window,
        };
        let mut heads = sequences.all(context.num_heads, self.shuffled.then_some(context.layer));
        if self.shared_offsets {
            heads.truncate(1);
        }
        let head = |distances: &Vec<i64>| -> Result<Arc<EdgeSet>> {
            let builder = distances.iter().fold(EdgeSet::builder(n, n)?, |builder, &distance| {
                builder.diagonal(distance, 0..n, 0..n).diagonal(-distance, 0..n, 0..n)
            });
            Ok(Arc::new(builder.build()?))
        };
        heads.iter().map(head).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn published(modified: bool) -> Vec<Vec<i64>> {
        Sequences::for_patches(196, modified).all(12, None)
    }

    #[test]
    fn sequences_at_196_patches_and_12_heads_are_the_published_ones() {
        let plain = published(false);
        assert_eq!(plain[0], [1, 2, 3, 5]);
        assert_eq!(plain[11], [30, 49]);
        let modified = published(true);
        assert_eq!(modified[0], [0, 1, 1, 2, 3, 5]);
        assert_eq!(modified[11], [11, 19, 30, 49]);
    }

    #[test]
    fn rows_of_the_wythoff_array_are_pairwise_disjoint() {
        let sequences = Sequences { w_min: 5000, w_max: 5000, ..Sequences::for_patches(0, false) };
        let mut seen = std::collections::HashSet::new();
        for term in sequences.all(64, None).into_iter().flatten() {
            assert!(seen.insert(term), "{term} is in two rows");
        }
    }

    #[test]
    fn a_strict_window_drops_the_first_term_that_lies_beyond_it() {
        let loose = Sequences::for_patches(49, false);
        let strict = Sequences { strict_window: true, ..loose };
        let beyond = |sequences: Sequences| {
            (1..=12)
                .flat_map(|h| sequences.head(h, 12).into_iter().filter(move |&t| t > sequences.window(h, 12)))
                .count()
        };
        assert!(beyond(loose) > 0);
        assert_eq!(beyond(strict), 0);
    }

    #[test]
    fn the_window_is_rounded_as_doubles_round() {
        let sequences = Sequences::for_patches(60, false);
        assert_eq!(sequences.window(12, 12), 19);
    }
}
