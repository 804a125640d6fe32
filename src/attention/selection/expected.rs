//! How many edges a choice by content keeps before it has seen any content.

use super::Rule;
use crate::error::{Error, Result};
use crate::pattern::choice::{Choice, OfHead, Pool};

impl Rule {
    /// For every head, the edges and the patch-to-patch edges that are kept in the mean if keys are drawn independently from one
    /// normal distribution: all that a query may choose are equally likely, but for a shorter block and for the columns and
    /// distances of `vertical_slash`. Exact where the number does not depend on which keys they are.
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
            Choice::TopBlocks { keep, block_size, pool, causal } => {
                let between = top_blocks_expected(num_tokens - self.prefix, keep, block_size, pool, causal);
                (between + self.around(num_tokens), between)
            }
            Choice::VerticalSlash { columns, distances, last_queries, nearest } => {
                let shared = OfHead { keys: columns, distances };
                let of_head = self.per_head.as_ref().map_or(shared, |heads| heads[head]);
                let between = slashes_expected(num_tokens - self.prefix, of_head, last_queries, nearest);
                (between + self.around(num_tokens), between)
            }
            Choice::Keys { keep, .. } => {
                let patches = num_tokens - self.prefix;
                let between = (patches * keep.min(patches)) as f64;
                (between + self.around(num_tokens), between)
            }
        };
        let alike = self.per_head.is_none();
        Ok(if alike { vec![of_head(0); num_heads] } else { (0..num_heads).map(of_head).collect() })
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

/// Pairs between `patches` patches of which every block of queries keeps `keep` blocks of keys.
fn top_blocks_expected(patches: usize, keep: usize, block_size: usize, pool: Pool, causal: bool) -> f64 {
    let whole = patches / block_size;
    let of_row = |patch: usize, share_of_last: f64| {
        let (blocks, keys) = match causal {
            true => (patch / block_size + 1, patch + 1),
            false => (patches.div_ceil(block_size), patches),
        };
        let keep = keep.min(blocks) as f64;
        if blocks == whole + 1 && whole > 0 {
            let of_whole = (keep - share_of_last) / whole as f64;
            of_whole * (whole * block_size) as f64 + share_of_last * (keys - whole * block_size) as f64
        } else {
            keep / blocks as f64 * keys as f64
        }
    };
    let share_of_last = share_of_shorter(keep, whole, patches % block_size, block_size, pool);
    (0..patches).map(|patch| of_row(patch, share_of_last)).sum()
}

/// How likely a block of `shorter` keys is one of the `keep` best beside `others` blocks of `block_size`.
///
/// The integral is over the score t that the `keep`-th best of the others has, in units of their deviation.
fn share_of_shorter(keep: usize, others: usize, shorter: usize, block_size: usize, pool: Pool) -> f64 {
    if keep > others {
        return 1.0;
    }
    let (lower, wider) = law_of_shorter(shorter, block_size, pool);
    let log_density = |t: f64| {
        let (worse, better) = ((others - keep) as f64, (keep - 1) as f64);
        worse * above(-t).ln() + better * above(t).ln() - t * t / 2.0
    };
    let most = units().map(log_density).fold(f64::NEG_INFINITY, f64::max);
    let (mut total, mut won) = (0.0, 0.0);
    for t in units() {
        let density = (log_density(t) - most).exp();
        total += density;
        won += density * above((t + lower) / wider);
    }
    won / total
}

/// By how much the mean score of a block of `shorter` keys is lower than that of one of `block_size`, and how many times as large its
/// deviation is, both in units of the deviation of the latter.
///
/// Keys are standard normal in every channel. Their mean over n keys has a variance of 1 / n. Their maximum is lower where there are
/// fewer of them, and so is the score with the maximum of the queries, which is positive: the more the more channels there are, for which
/// [`CHANNELS`] are taken.
fn law_of_shorter(shorter: usize, block_size: usize, pool: Pool) -> (f64, f64) {
    if pool == Pool::Mean {
        return (0.0, (block_size as f64 / shorter.max(1) as f64).sqrt());
    }
    let ((mean, variance), (own_mean, own_variance)) =
        (law_of_largest(block_size), law_of_largest(shorter.max(1)));
    let square_of_query = mean * mean + variance;
    let lower = CHANNELS.sqrt() * mean * (mean - own_mean) / (square_of_query * variance).sqrt();
    (lower, (own_variance / variance).sqrt())
}

/// What heads usually have.
const CHANNELS: f64 = 64.0;

/// Mean and variance of the largest of `count` standard normal numbers.
fn law_of_largest(count: usize) -> (f64, f64) {
    let (mut total, mut first, mut second) = (0.0, 0.0, 0.0);
    for t in units() {
        let density = ((count as f64 - 1.0) * above(-t).ln() - t * t / 2.0).exp();
        total += density;
        first += density * t;
        second += density * t * t;
    }
    let mean = first / total;
    (mean, second / total - mean * mean)
}

/// Places to sum a function of a normal number at.
fn units() -> impl Iterator<Item = f64> {
    (-12 * PER_UNIT..=12 * PER_UNIT).map(|step| f64::from(step) / f64::from(PER_UNIT))
}

/// Pairs between `patches` patches of which a head keeps columns, distances and the `nearest` distances.
fn slashes_expected(patches: usize, of_head: OfHead, last_queries: usize, nearest: usize) -> f64 {
    let column = share_of_sums(of_head.keys, patches, last_queries);
    let mut distance = share_of_sums(of_head.distances, patches, last_queries);
    distance.iter_mut().take(nearest).for_each(|share| *share = 1.0);
    // Row i has the keys i - d; so distance d crosses the first `patches - d` columns.
    let mut columns_dropped = vec![0.0];
    for share in &column {
        columns_dropped.push(columns_dropped[columns_dropped.len() - 1] + 1.0 - share);
    }
    let kept =
        |(d, share): (usize, &f64)| (patches - d) as f64 - (1.0 - share) * columns_dropped[patches - d];
    distance.iter().enumerate().map(kept).sum()
}

/// How likely each column is among the `keep` with the largest sums of causal attention from the last queries; the same for
/// distances.
///
/// Query i gives each of its i + 1 keys a weight of mean 1 / (i + 1), and keys and distances from x on get none from queries before
/// x: the first ones have sums of more weights, and of larger ones. With scores of variance 1, exp(score) has a variance of e - 1
/// times its squared mean. Sums count as normal and independent; `keep` of them are expected above a common bound.
fn share_of_sums(keep: usize, patches: usize, last_queries: usize) -> Vec<f64> {
    if keep == 0 || keep >= patches {
        return vec![if keep == 0 { 0.0 } else { 1.0 }; patches];
    }
    let first_query = patches.saturating_sub(last_queries);
    let (mut mean, mut variance) = (0.0, 0.0);
    // From the last query back; all before the first query have the sums of that one.
    let of_query = |query: usize| {
        let weight = 1.0 / (query + 1) as f64;
        mean += weight;
        variance += (std::f64::consts::E - 1.0) * weight * weight;
        (mean, f64::sqrt(variance))
    };
    let laws: Vec<(f64, f64)> = (first_query..patches).rev().map(of_query).collect();
    let shares = |bound: f64| laws.iter().map(move |(mean, deviation)| above((bound - mean) / deviation));
    let alike = first_query as f64;
    let expected = |bound: f64| alike * shares(bound).next_back().unwrap_or(0.0) + shares(bound).sum::<f64>();
    let most = mean + 40.0 * variance.sqrt();
    let (mut low, mut high) = (-most, most);
    for _ in 0..HALVINGS {
        let middle = f64::midpoint(low, high);
        if expected(middle) > keep as f64 { low = middle } else { high = middle }
    }
    let mut shares: Vec<f64> = shares(high).collect();
    shares.resize(patches, shares[shares.len() - 1]);
    shares.reverse();
    shares
}

/// Of an interval; what is left of it is below the precision of its ends.
const HALVINGS: usize = 64;

/// Steps of an integral over a normal distribution, which must resolve the best of many.
const PER_UNIT: i32 = 128;

/// The probability that a standard normal number is above `x`.
fn above(x: f64) -> f64 {
    let density = (-x * x / 2.0).exp() / (2.0 * std::f64::consts::PI).sqrt();
    if x < -3.0 {
        1.0 - above(-x)
    } else if x < 3.0 {
        let (mut term, mut sum) = (x, x);
        for odd in (3..100).step_by(2) {
            term *= x * x / f64::from(odd);
            sum += term;
        }
        0.5 - density * sum
    } else {
        density / (1..60).rev().fold(x, |rest, i| x + f64::from(i) / rest)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_normal_distribution_is_that_of_tables() {
        for (x, expected) in [
            (0.0, 0.5),
            (1.0, 0.158_655_253_931_457_05),
            (-2.0, 0.977_249_868_051_820_8),
            (2.999_999, 0.001_349_902_463_6),
            (3.0, 0.001_349_898_031_630_094_5),
            (6.0, 9.865_876_450_376_98e-10),
        ] {
            assert!((above(x) / expected - 1.0).abs() < 1e-9, "{x}: {}", above(x));
        }
    }

    #[test]
    fn the_law_of_the_largest_is_that_of_tables() {
        for (count, mean, variance) in
            [(1, 0.0, 1.0), (2, 0.564_189_58, 0.681_690_11), (10, 1.538_752_73, 0.343_5)]
        {
            let (found, spread) = law_of_largest(count);
            assert!(
                (found - mean).abs() < 1e-6 && (spread - variance).abs() < 1e-3,
                "{count}: {found} {spread}"
            );
        }
    }

    #[test]
    fn early_columns_are_likelier_and_as_many_are_expected_as_are_kept() {
        for (keep, patches, last_queries) in
            [(1, 1, 1), (5, 49, 64), (8, 196, 64), (1, 196, 1), (195, 196, 3), (0, 7, 2)]
        {
            let shares = share_of_sums(keep, patches, last_queries);
            assert_eq!(shares.len(), patches);
            assert!(
                (shares.iter().sum::<f64>() - keep as f64).abs() < 1e-9,
                "{keep} of {patches}: {shares:?}"
            );
            let alike = patches.saturating_sub(last_queries);
            assert!(shares[..alike].iter().all(|&share| share == shares[0]), "{shares:?}");
        }
        let shares = share_of_sums(8, 196, 64);
        assert!(shares[0] > 8.0 / 196.0 && shares[0] > 2.0 * shares[195], "{shares:?}");
    }

    #[test]
    fn pairs_of_columns_and_distances_are_counted_once() {
        let all = |patches: usize| (patches * (patches + 1) / 2) as f64;
        let count = |keys, distances, nearest| slashes_expected(9, OfHead { keys, distances }, 4, nearest);
        assert_eq!(count(9, 0, 0), all(9));
        assert_eq!(count(0, 9, 0), all(9));
        assert_eq!(count(9, 9, 9), all(9));
        assert_eq!(count(0, 0, 2), 17.0);
        assert!(count(2, 3, 1) < count(2, 0, 1) + count(0, 3, 1) - 9.0);
    }

    #[test]
    fn a_block_as_long_as_the_others_is_as_likely_and_a_shorter_one_wins_or_loses_more_often() {
        for (keep, others) in [(1, 6), (3, 6), (6, 6), (40, 4000), (4000, 4000)] {
            let share = |shorter| share_of_shorter(keep, others, shorter, 32, Pool::Mean);
            let equal = keep as f64 / (others + 1) as f64;
            assert!((share(32) - equal).abs() < 1e-6, "{keep} of {others}: {}", share(32));
            let extreme = (share(1) - 0.5).abs();
            assert!(extreme < (equal - 0.5).abs() + 1e-9, "{keep} of {others}: {}", share(1));
        }
        // Maxima of fewer are lower, and of as many no other.
        for (keep, others) in [(1, 1), (2, 3), (40, 4000)] {
            let share = |shorter| share_of_shorter(keep, others, shorter, 32, Pool::Max);
            assert!((share(32) - keep as f64 / (others + 1) as f64).abs() < 1e-6);
            assert!(share(31) < share(32) && share(8) < share(31) && share(8) < 1e-3);
        }
        // One of two: the sign of a difference, whatever the variances.
        assert!((share_of_shorter(1, 1, 1, 32, Pool::Mean) - 0.5).abs() < 1e-9);
        assert_eq!(share_of_shorter(2, 1, 1, 32, Pool::Mean), 1.0);
    }
}
