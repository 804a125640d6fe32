//! Random numbers that must be the same everywhere: CPython's shuffle, as the published Fibottention masks use it, and a
//! counter-based generator for masks that are drawn.

use std::collections::HashSet;

use rand_mt::Mt;

use crate::error::{Error, Result};

/// The permutation that `random.seed(seed); random.shuffle(list(range(len)))` gives in CPython.
///
/// CPython seeds MT19937 with the 32-bit words of |seed|, least significant first, and shuffles from the last element down,
/// drawing below `n` by rejection on the leading bits. The generator is private: nobody else's random state is touched.
pub fn cpython_shuffle(seed: u64, len: usize) -> Vec<usize> {
    let words = [seed as u32, (seed >> 32) as u32];
    let key = if words[1] == 0 { &words[..1] } else { &words[..] };
    let mut generator = Mt::new_with_key(key.iter().copied());
    let mut permutation: Vec<usize> = (0..len).collect();
    for i in (1..len).rev() {
        permutation.swap(i, below(&mut generator, i as u32 + 1) as usize);
    }
    permutation
}

/// A uniform number below `n` (`n` >= 1), drawing as CPython's `_randbelow_with_getrandbits` does.
fn below(generator: &mut Mt, n: u32) -> u32 {
    let bits = u32::BITS - n.leading_zeros();
    loop {
        let candidate = generator.next_u32() >> (u32::BITS - bits);
        if candidate < n {
            return candidate;
        }
    }
}

/// Philox4x32-10 (Salmon et al., 2011, "Parallel random numbers: as easy as 1, 2, 3"): 128 random bits that are a pure function of
/// a key and a counter. Short enough to own; the known answers of its authors are a test.
fn philox(mut key: [u32; 2], mut counter: [u32; 4]) -> [u32; 4] {
    for _ in 0..10 {
        let product = |factor: u32, word: u32| {
            let product = u64::from(factor) * u64::from(word);
            ((product >> 32) as u32, product as u32)
        };
        let (high0, low0) = product(0xd251_1f53, counter[0]);
        let (high1, low1) = product(0xcd9e_8d57, counter[2]);
        counter = [high1 ^ counter[1] ^ key[0], low1, high0 ^ counter[3] ^ key[1], low0];
        key = [key[0].wrapping_add(0x9e37_79b9), key[1].wrapping_add(0xbb67_ae85)];
    }
    counter
}

/// The draws of one head's mask: a pure function of (seed, layer, head, epoch) and the row, whoever asks and in whatever order.
#[derive(Debug, Clone, Copy)]
pub struct HeadDraws {
    key: [u32; 2],
    head: u32,
}

impl HeadDraws {
    /// `head` must fit 32 bits.
    pub fn new(seed: i64, layer: usize, head: usize, epoch: u64) -> Self {
        let halves = |word: u64| [word as u32, (word >> 32) as u32];
        let ([layer0, layer1], [epoch0, epoch1]) = (halves(layer as u64), halves(epoch));
        let [first, second, ..] = philox(halves(seed as u64), [layer0, layer1, epoch0, epoch1]);
        HeadDraws { key: [first, second], head: head as u32 }
    }

    /// The draws of row `row`, which must fit 32 bits.
    pub fn row(&self, row: usize) -> RowDraws {
        RowDraws { key: self.key, counter: [0, row as u32, self.head, 0], block: [0; 4], used: 4 }
    }
}

/// The draws of one row, in order.
#[derive(Debug, Clone)]
pub struct RowDraws {
    key: [u32; 2],
    counter: [u32; 4],
    block: [u32; 4],
    used: usize,
}

impl RowDraws {
    fn next_u32(&mut self) -> u32 {
        if self.used == self.block.len() {
            self.block = philox(self.key, self.counter);
            self.counter[0] += 1;
            self.used = 0;
        }
        self.used += 1;
        self.block[self.used - 1]
    }

    /// A uniform number below `n` (`n` >= 1), by Lemire's multiplication with rejection: exactly uniform.
    pub fn below(&mut self, n: u32) -> u32 {
        loop {
            let product = u64::from(self.next_u32()) * u64::from(n);
            // The rejected products are the first 2^32 mod n of each residue.
            if product as u32 >= n.wrapping_neg() % n {
                return (product >> 32) as u32;
            }
        }
    }
}

impl RowDraws {
    /// A uniform number below `n` (`n` >= 1), as [`Self::below`] for more candidates than 32 bits hold.
    fn below_wide(&mut self, n: u64) -> u64 {
        loop {
            let word = u64::from(self.next_u32()) << 32 | u64::from(self.next_u32());
            let product = u128::from(word) * u128::from(n);
            if product as u64 >= n.wrapping_neg() % n {
                return (product >> 64) as u64;
            }
        }
    }

    /// `k` distinct numbers below `n`, every subset equally likely, in no particular order (Floyd's method), in O(k).
    pub fn subset(&mut self, n: u64, k: u64) -> Vec<u64> {
        let mut chosen = HashSet::with_capacity(k as usize);
        let mut order = Vec::with_capacity(k as usize);
        for last in n - k.min(n)..n {
            let drawn = self.below_wide(last + 1);
            let fresh = if chosen.contains(&drawn) { last } else { drawn };
            chosen.insert(fresh);
            order.push(fresh);
        }
        order
    }
}

/// Draws subsets. Holds one mark per candidate, so that a subset of k costs O(k) whatever it is drawn from.
#[derive(Debug)]
pub struct Sampler {
    marks: Vec<u32>,
    mark: u32,
}

impl Sampler {
    /// For subsets of at most `most` candidates.
    ///
    /// # Errors
    /// [`Error::Value`] when the marks of so many do not fit in memory.
    pub fn new(most: usize) -> Result<Self> {
        let mut marks = Vec::new();
        let no_room = |_| Error::no_room(format_args!("a draw among {most} candidates"));
        marks.try_reserve_exact(most).map_err(no_room)?;
        marks.resize(most, 0);
        Ok(Sampler { marks, mark: 0 })
    }

    /// Replace `chosen` by `k` distinct numbers below `n`, every subset equally likely, in no particular order (Floyd's method).
    pub fn choose(&mut self, draws: &mut RowDraws, n: usize, k: usize, chosen: &mut Vec<usize>) {
        if self.mark == u32::MAX {
            self.marks.fill(0);
            self.mark = 0;
        }
        self.mark += 1;
        chosen.clear();
        for last in n - k.min(n)..n {
            let drawn = draws.below(last as u32 + 1) as usize;
            let fresh = if self.marks[drawn] == self.mark { last } else { drawn };
            self.marks[fresh] = self.mark;
            chosen.push(fresh);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn philox_gives_the_known_answers_of_its_authors() {
        assert_eq!(philox([0; 2], [0; 4]), [0x6627e8d5, 0xe169c58d, 0xbc57ac4c, 0x9b00dbd8]);
        assert_eq!(philox([u32::MAX; 2], [u32::MAX; 4]), [0x408f276d, 0x41c83b0e, 0xa20bc7c6, 0x6d5451fd]);
        let pi = [0x243f6a88, 0x85a308d3, 0x13198a2e, 0x03707344];
        assert_eq!(philox([0xa4093822, 0x299f31d0], pi), [0xd16cfe09, 0x94fdcceb, 0x5001e420, 0x24126ea1]);
    }

    #[test]
    fn every_argument_of_the_draws_counts() {
        let first =
            |seed, layer, head, epoch, row| HeadDraws::new(seed, layer, head, epoch).row(row).next_u32();
        let base = first(1, 2, 3, 4, 5);
        assert_eq!(base, first(1, 2, 3, 4, 5));
        let others = [
            first(-1, 2, 3, 4, 5),
            first(1 << 32, 2, 3, 4, 5),
            first(1, 1, 3, 4, 5),
            first(1, 2, 4, 4, 5),
            first(1, 2, 3, 5, 5),
            first(1, 2, 3, 1 << 40, 5),
            first(1, 2, 3, 4, 6),
        ];
        assert!(others.iter().all(|&other| other != base));
    }

    #[test]
    fn subsets_of_any_size_are_distinct_and_equally_likely() {
        let draws = HeadDraws::new(3, 0, 0, 0);
        for (n, k) in [(0, 0), (1, 1), (10, 0), (10, 10), (1 << 40, 100)] {
            let chosen: HashSet<u64> = draws.row(0).subset(n, k).into_iter().collect();
            assert!(chosen.len() as u64 == k && chosen.iter().all(|&number| number < n));
        }
        let (rows, mut counts) = (20_000, std::collections::BTreeMap::new());
        for row in 0..rows {
            let mut chosen = draws.row(row).subset(5, 2);
            chosen.sort_unstable();
            *counts.entry(chosen).or_insert(0) += 1;
        }
        // Each of the 10 pairs 2,000 times, within five standard deviations.
        assert!(counts.len() == 10 && counts.values().all(|&count: &i32| (count - 2000).abs() < 215));
    }

    #[test]
    fn every_subset_is_equally_likely() {
        let (n, k, rows) = (5, 2, 40_000);
        let (draws, mut sampler, mut chosen) =
            (HeadDraws::new(7, 0, 0, 0), Sampler::new(n).unwrap(), Vec::new());
        let mut counts = std::collections::BTreeMap::new();
        for row in 0..rows {
            sampler.choose(&mut draws.row(row), n, k, &mut chosen);
            chosen.sort_unstable();
            assert!(chosen.len() == k && chosen[0] < chosen[1] && chosen[1] < n);
            *counts.entry(chosen.clone()).or_insert(0) += 1;
        }
        let expected = rows as f64 / 10.0;
        let chi_square: f64 = counts.values().map(|&c| (f64::from(c) - expected).powi(2) / expected).sum();
        // 9 degrees of freedom: beyond 27.9 with probability 0.001, and the draws are always the same.
        assert!(counts.len() == 10 && chi_square < 27.9, "{chi_square}");
    }

    #[test]
    fn asking_for_more_than_there_are_gives_all() {
        let (mut sampler, mut chosen) = (Sampler::new(4).unwrap(), Vec::new());
        sampler.choose(&mut HeadDraws::new(0, 0, 0, 0).row(0), 4, 9, &mut chosen);
        chosen.sort_unstable();
        assert_eq!(chosen, [0, 1, 2, 3]);
        sampler.choose(&mut HeadDraws::new(0, 0, 0, 0).row(0), 0, 9, &mut chosen);
        assert!(chosen.is_empty());
    }

    #[test]
    fn the_generator_is_cpythons() {
        let first_five = |seed: u32| -> Vec<u32> {
            let mut generator = Mt::new_with_key([seed]);
            (0..5).map(|_| generator.next_u32()).collect()
        };
        assert_eq!(first_five(0), [3626764237, 1654615998, 3255389356, 3823568514, 1806341205]);
        assert_eq!(first_five(1), [577090037, 2444712010, 3639700191, 3445702192, 3280387012]);
    }

    #[test]
    fn shuffles_equal_cpythons() {
        assert_eq!(cpython_shuffle(0, 12), [1, 9, 8, 5, 10, 2, 3, 7, 4, 0, 11, 6]);
        assert_eq!(cpython_shuffle(11, 16), [10, 5, 0, 1, 9, 4, 6, 2, 3, 15, 11, 7, 12, 8, 13, 14]);
        assert_eq!(cpython_shuffle(3, 1), [0]);
        assert!(cpython_shuffle(3, 0).is_empty());
    }

    #[test]
    fn seeds_beyond_32_bits_use_both_words() {
        // CPython: random.seed(2**32 + 5); random.shuffle(list(range(8)))
        assert_eq!(cpython_shuffle((1 << 32) + 5, 8), [5, 6, 1, 0, 4, 7, 3, 2]);
    }
}
