//! Budgets: one whole number split among units (heads, layers, caches) in proportion to their weights.

use crate::error::{Error, Result};

/// Largest total: far beyond any number of edges, small enough that quotas in double precision lose no unit.
const MAX_TOTAL: u64 = 1 << 52;

/// Split `total` among units in proportion to `weights`, with at least `minimum[i]` and at most `maximum[i]` for unit i.
///
/// The quota of unit i is `clamp(level * weights[i], minimum[i], maximum[i])`, with the one level at which quotas sum to `total`;
/// units of weight zero share equally what the others cannot take. Quotas are rounded by largest remainder: down, then up again
/// by one for the largest fractions until the sum is exact, of equal fractions the larger weight and then the lower index first.
/// Fractions that rounded weights cannot tell apart are equal, so that weights may be measured in any unit. Sums are exact, and with
/// equal bounds a larger weight never gets less.
///
/// # Errors
/// [`Error::Value`] naming `total`, `weights`, `minimum` or `maximum`, its value and what is allowed.
pub fn allocate(total: u64, weights: &[f64], minimum: &[u64], maximum: &[u64]) -> Result<Vec<u64>> {
    check(total, weights, minimum, maximum)?;
    let quotas = quotas(total, weights, minimum, maximum);
    let mut shares: Vec<u64> = quotas.iter().map(|quota| quota.whole as u64).collect();
    let order = by_remainder(&quotas, weights);
    let mut missing = total as i128 - shares.iter().map(|&share| i128::from(share)).sum::<i128>();
    // Twice, because double precision may leave a quota that should be whole just below or above it.
    for &unit in order.iter().chain(&order) {
        if missing > 0 && shares[unit] < maximum[unit] {
            shares[unit] += 1;
            missing -= 1;
        }
    }
    for &unit in order.iter().rev() {
        if missing < 0 && shares[unit] > minimum[unit] {
            shares[unit] -= 1;
            missing += 1;
        }
    }
    debug_assert_eq!(missing, 0);
    Ok(shares)
}

/// Units in the order in which what is left after rounding down goes to them.
fn by_remainder(quotas: &[Quota], weights: &[f64]) -> Vec<usize> {
    let units = quotas.len();
    let fraction = |unit: usize| quotas[unit].fraction;
    let mut order: Vec<usize> = (0..units).collect();
    order.sort_by(|&a, &b| fraction(b).total_cmp(&fraction(a)));
    // What rounding a weight, the sum of all, and the few steps from them to a quota can move that quota by, at most.
    let slack = |unit: usize| quotas[unit].value() * 2.0 * units as f64 * f64::EPSILON;
    let mut rank = vec![0_usize; units];
    for pair in order.windows(2) {
        let (unit, next) = (pair[0], pair[1]);
        let is_less = fraction(unit) - fraction(next) > slack(unit) + slack(next);
        rank[next] = rank[unit] + usize::from(is_less);
    }
    let by_weight = |a: usize, b: usize| weights[b].total_cmp(&weights[a]);
    order.sort_by(|&a, &b| rank[a].cmp(&rank[b]).then(by_weight(a, b)).then(a.cmp(&b)));
    order
}

/// `total` split equally among `units`; the first ones get what does not divide.
///
/// # Errors
/// [`Error::Value`] without units to take a `total` above zero.
pub fn uniform(total: u64, units: usize) -> Result<Vec<u64>> {
    allocate(total, &vec![1.0; units], &vec![0; units], &vec![total; units])
}

fn check(total: u64, weights: &[f64], minimum: &[u64], maximum: &[u64]) -> Result<()> {
    let fail = |message: String| Err(Error::Value(message));
    for (name, bounds) in [("minimum", minimum), ("maximum", maximum)] {
        if bounds.len() != weights.len() {
            return fail(format!(
                "{name}: expected {} values, one per weight, got {}",
                weights.len(),
                bounds.len()
            ));
        }
    }
    if let Some(weight) = weights.iter().find(|weight| !(weight.is_finite() && **weight >= 0.0)) {
        return fail(format!("weights: expected finite numbers of at least 0, got {weight}"));
    }
    if let Some(unit) = (0..weights.len()).find(|&unit| minimum[unit] > maximum[unit]) {
        return fail(format!(
            "minimum: expected at most the maximum {}, got {} for unit {unit}",
            maximum[unit], minimum[unit]
        ));
    }
    let sum = |bounds: &[u64]| bounds.iter().map(|&bound| u128::from(bound)).sum::<u128>();
    let (least, most) = (sum(minimum), sum(maximum).min(u128::from(MAX_TOTAL)));
    let units = weights.len();
    if u128::from(total) < least {
        return fail(format!(
            "total: expected at least {least}, the sum of minimum over {units} units, got {total}"
        ));
    }
    if u128::from(total) > most {
        return fail(format!(
            "total: expected at most {most}, the sum of maximum over {units} units, got {total}"
        ));
    }
    Ok(())
}

/// A share before rounding.
#[derive(Clone, Copy)]
struct Quota {
    whole: f64,
    fraction: f64,
}

impl Quota {
    /// `product / divisor`, cut by the remainder, which double precision has exactly: so equal fractions of whole weights are equal.
    fn of(product: f64, divisor: f64) -> Self {
        let remainder = product % divisor;
        Self { whole: ((product - remainder) / divisor).round(), fraction: remainder / divisor }
    }

    fn value(self) -> f64 {
        self.whole + self.fraction
    }
}

/// Shares before rounding. A round fixes the units whose bound the common level breaks, on the side where more is broken, as a
/// solver of two-sided bounds must; every round fixes at least one.
fn quotas(total: u64, weights: &[f64], minimum: &[u64], maximum: &[u64]) -> Vec<Quota> {
    let units = weights.len();
    let mut quotas: Vec<Option<Quota>> = vec![None; units];
    // By a power of two, so that whole weights keep exact quotas. Weights so small that the sum would lose them count as zero.
    let largest = weights.iter().copied().fold(f64::MIN_POSITIVE, f64::max);
    let scale = f64::from_bits(largest.to_bits() & !((1 << (f64::MANTISSA_DIGITS - 1)) - 1));
    let weights: Vec<f64> = weights.iter().map(|weight| weight / scale).collect();
    loop {
        let free: Vec<usize> = (0..units).filter(|&unit| quotas[unit].is_none()).collect();
        let fixed: f64 = quotas.iter().flatten().map(|quota| quota.value()).sum();
        let rest = total as f64 - fixed;
        let sum: f64 = free.iter().map(|&unit| weights[unit]).sum();
        let quota = |unit: usize| {
            if sum > 0.0 { Quota::of(rest * weights[unit], sum) } else { Quota::of(rest, free.len() as f64) }
        };
        let wanted = |unit: usize| quota(unit).value();
        let below = |unit: usize| (minimum[unit] as f64 - wanted(unit)).max(0.0);
        let above = |unit: usize| (wanted(unit) - maximum[unit] as f64).max(0.0);
        let lacking: f64 = free.iter().map(|&unit| below(unit)).sum();
        let excess: f64 = free.iter().map(|&unit| above(unit)).sum();
        if lacking == 0.0 && excess == 0.0 {
            for &unit in &free {
                quotas[unit] = Some(quota(unit));
            }
            return quotas.into_iter().flatten().collect();
        }
        let broken: Vec<(usize, f64)> = if lacking > excess {
            free.iter().filter(|&&unit| below(unit) > 0.0).map(|&unit| (unit, minimum[unit] as f64)).collect()
        } else {
            free.iter().filter(|&&unit| above(unit) > 0.0).map(|&unit| (unit, maximum[unit] as f64)).collect()
        };
        for (unit, bound) in broken {
            quotas[unit] = Some(Quota { whole: bound, fraction: 0.0 });
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn bounded(total: u64, weights: &[f64], minimum: u64, maximum: u64) -> Result<Vec<u64>> {
        allocate(total, weights, &vec![minimum; weights.len()], &vec![maximum; weights.len()])
    }

    #[test]
    fn shares_follow_the_weights() {
        assert_eq!(uniform(8, 2).unwrap(), [4, 4]);
        assert_eq!(uniform(8, 3).unwrap(), [3, 3, 2]);
        assert_eq!(bounded(11, &[8.0, 3.0], 0, 11).unwrap(), [8, 3]);
        // Largest remainder: quotas 4.2, 1.4, 1.4, the first of the equal fractions takes the seventh.
        assert_eq!(bounded(7, &[3.0, 1.0, 1.0], 0, 7).unwrap(), [4, 2, 1]);
        assert_eq!(bounded(6, &[1.0, 2.0, 3.0], 0, 6).unwrap(), [1, 2, 3]);
        // Quotas 16 1/3, 8 3/11, 12 1/11, 12 1/11, 11 29/33 and 9 1/3: of the equal thirds the larger weight's is first.
        assert_eq!(
            bounded(70, &[77.0, 39.0, 57.0, 57.0, 56.0, 44.0], 0, 70).unwrap(),
            [17, 8, 12, 12, 12, 9]
        );
    }

    #[test]
    fn fractions_that_are_equal_stay_so_in_weights_of_any_unit() {
        // Quotas 11 3/7, 2 1/7, 6 3/7 and 10: of the equal fractions the larger weight's is first.
        assert_eq!(bounded(30, &[16.0, 3.0, 9.0, 14.0], 0, 30).unwrap(), [12, 2, 6, 10]);
        assert_eq!(bounded(30, &[1.6, 0.3, 0.9, 1.4], 0, 30).unwrap(), [12, 2, 6, 10]);
        for unit in [0.1, 1e-3, 1e-200, 1e30, 1.0 / 42.0, 1.0 / 1024.0] {
            let weights = [16.0, 3.0, 9.0, 14.0].map(|weight| weight * unit);
            assert_eq!(bounded(30, &weights, 0, 30).unwrap(), [12, 2, 6, 10], "{unit}");
        }
    }

    #[test]
    fn bounds_hold_and_what_they_take_or_leave_goes_to_the_others() {
        assert_eq!(bounded(10, &[100.0, 1.0, 1.0], 2, 10).unwrap(), [6, 2, 2]);
        assert_eq!(bounded(10, &[100.0, 1.0, 1.0], 0, 4).unwrap(), [4, 3, 3]);
        assert_eq!(bounded(9, &[0.0, 0.0, 1.0], 1, 9).unwrap(), [1, 1, 7]);
        assert_eq!(bounded(9, &[0.0, 0.0, 1.0], 0, 3).unwrap(), [3, 3, 3]);
        assert_eq!(bounded(5, &[0.0, 0.0], 0, 9).unwrap(), [3, 2]);
        assert_eq!(bounded(0, &[], 0, 0).unwrap(), [0; 0]);
    }

    #[test]
    fn what_cannot_be_split_is_an_error_that_says_why() {
        let message = |result: Result<Vec<u64>>| result.unwrap_err().to_string();
        assert!(
            message(bounded(3, &[1.0, 1.0], 2, 9))
                .contains("total: expected at least 4, the sum of minimum over 2 units")
        );
        assert!(message(bounded(19, &[1.0, 1.0], 2, 9)).contains("total: expected at most 18"));
        assert!(
            message(bounded(4, &[1.0, -1.0], 0, 9))
                .contains("weights: expected finite numbers of at least 0, got -1")
        );
        assert!(message(bounded(4, &[f64::NAN], 0, 9)).contains("got NaN"));
        assert!(message(bounded(4, &[1.0], 5, 3)).contains("minimum: expected at most the maximum 3, got 5"));
        assert!(message(allocate(4, &[1.0], &[], &[9])).contains("minimum: expected 1 values"));
        assert!(message(uniform(1, 0)).contains("over 0 units"));
    }

    fn problem() -> impl Strategy<Value = (Vec<(f64, u64, u64)>, f64)> {
        let weight =
            prop_oneof![Just(0.0), 0.0..1.0f64, (1u32..5).prop_map(f64::from), Just(1e300), Just(1e-300)];
        let unit = (weight, 0u64..50, 0u64..1000);
        (proptest::collection::vec(unit, 1..40), 0.0..=1.0f64)
    }

    proptest! {
        #[test]
        fn sums_are_exact_bounds_hold_and_equal_bounds_keep_the_order_of_weights((units, place) in problem()) {
            let weights: Vec<f64> = units.iter().map(|unit| unit.0).collect();
            let minimum: Vec<u64> = units.iter().map(|unit| unit.1).collect();
            let maximum: Vec<u64> = units.iter().map(|unit| unit.1 + unit.2).collect();
            let (least, most): (u64, u64) = (minimum.iter().sum(), maximum.iter().sum());
            let total = least + (place * (most - least) as f64) as u64;
            let shares = allocate(total, &weights, &minimum, &maximum).unwrap();
            prop_assert_eq!(shares.iter().sum::<u64>(), total);
            for unit in 0..units.len() {
                prop_assert!((minimum[unit]..=maximum[unit]).contains(&shares[unit]));
            }
            let shares = bounded(total, &weights, 0, total).unwrap();
            for (a, b) in (0..units.len()).flat_map(|a| (0..units.len()).map(move |b| (a, b))) {
                prop_assert!(weights[a] <= weights[b] || shares[a] >= shares[b]);
            }
        }

        #[test]
        fn without_binding_bounds_every_share_is_within_one_of_its_quota(
            weights in proptest::collection::vec(0.01..10.0f64, 1..40),
            total in 0u64..1_000_000_000_000,
        ) {
            let sum: f64 = weights.iter().sum();
            for (share, weight) in bounded(total, &weights, 0, total).unwrap().into_iter().zip(&weights) {
                prop_assert!((share as f64 - total as f64 * weight / sum).abs() < 1.001);
            }
        }
    }
}
