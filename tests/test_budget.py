"""Budgets: sums are exact, bounds hold, and importance decides."""

import json
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sparse_mhsa.budget import allocate, uniform

TAXONOMY = json.loads((Path(__file__).parent / "golden" / "taxonomy.json").read_text())
GOLDEN = [case for case in TAXONOMY["cases"] if case["mechanism"] == "uniform_budget"]


@pytest.mark.parametrize("case", GOLDEN, ids=lambda case: case["id"])
def test_uniform_budgets_are_those_of_the_published_examples(case):
    params = case["params"]
    assert uniform(params["total"], params["heads"]).tolist() == case["per_unit"]


def test_what_does_not_divide_goes_to_the_first_units():
    assert uniform(8, 3).tolist() == [3, 3, 2]
    assert uniform(2, 4).tolist() == [1, 1, 0, 0]


def test_adaptive_budgets_follow_the_weights_of_layers_and_heads():
    assert allocate(11, [8, 3]).tolist() == [8, 3]
    shares = allocate(60, [[1, 2, 3], [0, 4, 0]], minimum=2)
    assert shares.shape == (2, 3)
    assert shares.tolist() == [[6, 11, 17], [2, 22, 2]]


def hamilton(total, weights):
    """Largest remainder in exact fractions."""
    whole = sum(map(Fraction, weights))
    quotas = [total * Fraction(weight) / whole for weight in weights]
    shares = [int(quota) for quota in quotas]
    order = sorted(range(len(weights)), key=lambda i: (shares[i] - quotas[i], -weights[i], i))
    for i in order[: total - sum(shares)]:
        shares[i] += 1
    return shares


@given(st.integers(0, 10_000), st.lists(st.integers(1, 64), max_size=30))
def test_without_bounds_it_is_the_method_of_largest_remainder(total, weights):
    weights.append(4096 - sum(weights))  # so that double precision holds every quota exactly, ties included
    assert allocate(total, weights).tolist() == hamilton(total, weights)


def test_remainders_that_are_equal_stay_so_in_decimals_and_in_shares_of_the_sum():
    assert allocate(30, [16, 3, 9, 14]).tolist() == [12, 2, 6, 10]
    assert allocate(30, [1.6, 0.3, 0.9, 1.4]).tolist() == [12, 2, 6, 10]
    assert allocate(30, np.array([16, 3, 9, 14]) / 42).tolist() == [12, 2, 6, 10]


@given(
    st.integers(0, 10_000),
    st.lists(st.integers(0, 100), min_size=2, max_size=30).filter(any),
    st.sampled_from([2.0**-40, 2.0**40, 0.1, 1e-3, 1e-30, 1e30, 1 / 3]),
)
def test_weights_of_any_unit_are_shared_by_as_their_whole_numbers_are(total, weights, unit):
    assert allocate(total, np.array(weights) * unit).tolist() == hamilton(total, weights)


@given(
    st.lists(st.tuples(st.floats(0, 1e6), st.integers(0, 40), st.integers(0, 500)), min_size=1, max_size=40),
    st.floats(0, 1),
)
def test_sums_are_exact_and_bounds_hold(units, place):
    weights = [unit[0] for unit in units]
    minimum = np.array([unit[1] for unit in units])
    maximum = minimum + [unit[2] for unit in units]
    total = int(minimum.sum() + place * (maximum - minimum).sum())
    shares = allocate(total, weights, minimum, maximum)
    assert shares.sum() == total
    assert (shares >= minimum).all()
    assert (shares <= maximum).all()
    assert shares.tolist() == allocate(total, weights, minimum, maximum).tolist()


@given(st.lists(st.floats(0, 1e6), min_size=2, max_size=40), st.integers(0, 5000), st.integers(0, 3))
def test_a_larger_weight_never_gets_less(weights, spare, minimum):
    shares = allocate(spare + minimum * len(weights), weights, minimum)
    order = np.argsort(weights, kind="stable")
    ranked, shares = np.array(weights)[order], shares[order]
    assert (shares[1:] >= shares[:-1])[ranked[1:] > ranked[:-1]].all()


@given(st.lists(st.floats(0.01, 1e3), min_size=1, max_size=20), st.integers(0, 5000))
def test_more_weight_for_all_changes_nothing(weights, total):
    assert allocate(total, weights).tolist() == allocate(total, np.array(weights) * 1024.0).tolist()


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((3, [1, 1], 2), ValueError, "total: expected at least 4, the sum of minimum over 2 units, got 3"),
        ((3, [1, 1], 5), ValueError, "total: expected at least 10, the sum of minimum over 2 units, got 3"),
        ((9, [1, 1], 0, 4), ValueError, "total: expected at most 8, the sum of maximum over 2 units, got 9"),
        ((-1, [1]), ValueError, "total: expected at least 0, got -1"),
        ((3.5, [1]), TypeError, "total: expected an integer, got float 3.5"),
        ((3, ["a", 1]), ValueError, "weights: expected numbers.*'a'"),
        ((3, [None, {}]), TypeError, "weights: expected numbers"),
        ((3, [[1, 2], [3]]), ValueError, "weights: expected numbers, of one length in every layer"),
        ((3, [1, -1]), ValueError, "weights: expected finite numbers of at least 0, got -1"),
        ((3, [1, float("inf")]), ValueError, "weights: .*got inf"),
        ((3, [1, 1], 0.5), TypeError, "minimum: expected whole numbers"),
        ((3, [1, 1], -2), ValueError, "minimum: expected at least 0, got -2"),
        ((3, [1, 1], [1, 1, 1]), ValueError, r"minimum: expected one number, or one per weight \(2,\)"),
        ((5, [1, 1], 3, 2), ValueError, "minimum: expected at most the maximum 2, got 3"),
    ],
)
def test_what_cannot_be_split_says_what_is_wrong(arguments, error, message):
    with pytest.raises(error, match=message):
        allocate(*arguments)


@pytest.mark.parametrize(
    ("units", "error", "message"),
    [(-1, ValueError, "units: expected at least 0, got -1"), (2.5, TypeError, "units: expected an integer, got float")],
)
def test_what_is_no_number_of_units_is_named(units, error, message):
    with pytest.raises(error, match=message):
        uniform(5, units)
