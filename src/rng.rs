//! Random numbers that must be the same everywhere: CPython's shuffle, as the published Fibottention masks use it.

use rand_mt::Mt;

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

#[cfg(test)]
mod tests {
    use super::*;

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
