"""Budgets over heads and layers: one whole number of edges or keys, split equally or by importance."""

from collections.abc import Sequence
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from . import _core
from .config import integer

Weights: TypeAlias = Sequence[float] | Sequence[Sequence[float]] | NDArray[np.floating] | NDArray[np.integer]
"""One number per unit: (units,), or (layers, heads) or any other shape."""


def allocate(
    total: int,
    weights: Weights,
    minimum: int | NDArray[np.integer] | Sequence[int] = 0,
    maximum: int | NDArray[np.integer] | Sequence[int] | None = None,
) -> NDArray[np.int64]:
    """Split a budget among units in proportion to their weights.

    The quota of unit i is ``clip(level * weights[i], minimum[i], maximum[i])`` with the one ``level`` at which the
    quotas sum to ``total``; units of weight zero share equally what the others cannot take. Quotas are rounded by
    largest remainder, of equal remainders the larger weight and then the lower index first. Remainders that rounded
    weights cannot tell apart are equal, so that weights may be in any unit, such as shares of their sum. So sums are
    exact, every unit gets at least its minimum, a larger weight never gets less (where bounds are equal), and the
    result is a pure function of the arguments. Source: the uniform and adaptive budgets of sparse-attention
    taxonomies; largest remainder is Hamilton's method of apportionment.

    Args:
        total: what there is to share.
        weights: importance of each unit, finite and at least 0, of any shape; equal weights are a uniform budget.
        minimum: least share, one number or one per unit.
        maximum: largest share, likewise; None for no bound.

    Returns:
        Whole shares of the shape of ``weights``.

    Raises:
        TypeError: a count is not a whole number, or a weight no number.
        ValueError: weights are negative, not finite or ragged, or ``total`` lies outside the sums of minimum and
            maximum.
    """
    wanted = numbers("weights", weights)
    total = integer("total", total)
    least = _counts("minimum", minimum, wanted.shape)
    most = [max(total, unit) for unit in least] if maximum is None else _counts("maximum", maximum, wanted.shape)
    shares = _core.allocate(total, wanted.ravel().tolist(), least, most)
    return np.array(shares, dtype=np.int64).reshape(wanted.shape)


def uniform(total: int, units: int, minimum: int = 0) -> NDArray[np.int64]:
    """Split a budget equally; the first units get what does not divide.

    Args:
        total: what there is to share.
        units: how many share it.
        minimum: least share.

    Returns:
        (units,) whole shares.

    Raises:
        TypeError: a count is not a whole number.
        ValueError: ``total`` is less than the minimum of all units together, or ``units`` is negative.
    """
    return allocate(total, np.ones(integer("units", units)), minimum)


def numbers(name: str, values: Weights) -> NDArray[np.float64]:
    """An argument that is a number per unit, as an array; its ``name`` is in every error."""
    try:
        return np.asarray(values, dtype=np.float64)
    except (TypeError, ValueError) as error:
        raise type(error)(f"{name}: expected numbers, of one length in every layer: {error}") from error


def _counts(name: str, bound: object, shape: tuple[int, ...]) -> list[int]:
    counts = np.asarray(bound)
    if not np.issubdtype(counts.dtype, np.integer):
        raise TypeError(f"{name}: expected whole numbers, got {counts.dtype}")
    if counts.size and counts.min() < 0:
        raise ValueError(f"{name}: expected at least 0, got {counts.min()}")
    try:
        of_units: list[int] = np.broadcast_to(counts, shape).ravel().tolist()
    except ValueError as error:
        raise ValueError(f"{name}: expected one number, or one per weight {shape}, got shape {counts.shape}") from error
    return of_units
