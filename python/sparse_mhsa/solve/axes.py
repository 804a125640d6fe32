"""The closest of all lists of values, one for each axis of a grid."""

import bisect
import itertools
import math
from collections.abc import Callable, Iterator, Sequence

from .cost import Count


def closest_by_axis(
    count: Callable[[list[int]], Count | None],
    sides: Sequence[int],
    spent: Callable[[Count], float],
    target: Callable[[Count], float],
) -> list[int] | None:
    """The list whose cost is closest to the target; of equally close ones the cheapest, then the lowest.

    What a mask by axis keeps is the product of what it keeps along each, so that every axis is counted alone.

    Args:
        count: the edges with a list of values, None where it cannot be applied.
        sides: of the grid.
        spent: what of a count the target is about.
        target: edges to keep, beside what dense attention would.

    Returns:
        One value per axis; None if the mask takes no lists.
    """
    first = next((values for values in _from_the_least(sides) if count(values) is not None), None)
    base = None if first is None else count(first)
    if first is None or base is None:
        return None
    along = [_growths(count, first, axis, side, base) for axis, side in enumerate(sides)]
    # How many times the patches of the first list are wanted; the prefix keeps what it does.
    wanted = (target(base) - spent(base) + base.patches) / base.patches
    *others, last = along
    growths = [growth for growth, _ in last]
    best = (math.inf, math.inf, first)
    for chosen in itertools.product(*others):
        growth = math.prod(growth for growth, _ in chosen)
        at = bisect.bisect_left(growths, wanted / growth)
        for growth_of_last, value in last[max(0, at - 1) : at + 1]:
            kept = growth * growth_of_last
            # Products in another order differ in their last digits.
            found = (round(abs(kept - wanted), 9), round(kept, 9), [*(value for _, value in chosen), value])
            best = min(best, found)
    return best[2]


def _from_the_least(sides: Sequence[int]) -> Iterator[list[int]]:
    """Lists to start from: with the same value for all axes if that can be."""
    for value in range(1, 2 * max(sides, default=0) + 2):
        yield [value] * len(sides)
    yield from map(list, itertools.product(*(range(1, side + 1) for side in sides)))


def _growths(
    count: Callable[[list[int]], Count | None], first: list[int], axis: int, side: int, base: Count
) -> list[tuple[float, int]]:
    """How many times as many patches each value keeps along an axis, ascending; of equal growths the lowest value."""
    growths: dict[float, int] = {}
    # Windows beyond the side differ by where a shift cuts them.
    for value in range(first[axis] + 2 * side):
        found = count([*first[:axis], value, *first[axis + 1 :]])
        if found is not None:
            growths.setdefault(found.patches / base.patches, value)
            if found.patches >= side * base.patches:  # from the query alone to the whole axis
                break
    return sorted(growths.items())
