"""The closest of many values to a target, looking at as few of their costs as it takes."""

import bisect
import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TypeVar

_Key = TypeVar("_Key")
_Value = TypeVar("_Value")

_EVERY_VALUE = 4096
"""Values that are tried one by one where more of a parameter does not always mean more pairs."""
_FEW = 256
"""So many are looked at before it is said that more of them means more pairs, or fewer; of others a few."""


@dataclass(frozen=True)
class Values:
    """The values a parameter may take, in order: ``first + index * step``, divided by ``whole`` for a ratio."""

    first: int
    step: int
    count: int
    whole: int | None = None
    dropped: bool = False

    def at(self, index: int) -> int | float:
        """The value at a place in their order."""
        number = self.first + index * self.step
        if self.whole is None:
            return number
        return 1.0 - number / self.whole if self.dropped else number / self.whole


def values_of(key: str, most: int, num_tokens: int, num_heads: int, is_valid: Callable[[float], bool]) -> Values | None:
    """From the least value that can be applied to ``most``; those at the end may be too large."""
    if key.endswith("_ratio"):
        # As fine as the pairs of all heads are. The least share is looked for from below, where masks are cheap.
        pairs = num_heads * max(1, num_tokens) ** 2
        shares = Values(1, 1, pairs, pairs, dropped=key in ("mask_ratio", "pruning_ratio"))
        enough = next((index for index in _doubling(pairs) if is_valid(shares.at(index))), None)
        if enough is None:
            return None
        first = _first(enough, lambda index: is_valid(shares.at(index)))
        return replace(shares, first=first + 1, count=pairs - first)
    start = next((value for value in range(num_tokens + 2) if is_valid(value)), None)
    if start is None:
        return None
    step = next((step for step in (1, 2) if is_valid(start + step)), 1)
    return Values(start, step, max(most + 1 - start, 0) // step + 1)


def _doubling(count: int) -> Iterator[int]:
    """0, 1, 2, 4, ... and the last index below ``count``."""
    index = 0
    while index < count - 1:
        yield index
        index = max(1, 2 * index)
    yield count - 1


def _first(count: int, holds: Callable[[int], bool]) -> int:
    """The first index at which ``holds``, which stays true from there on; ``count`` if there is none."""
    return bisect.bisect_left(range(count), True, key=holds)


def closest(cost: Callable[[int], float | None], count: int, target: float, *, rises: bool) -> int:
    """The index whose cost is closest to ``target``; of equally close ones the cheapest, of equal costs the first.

    Costs are None from some index on. If it is known that they rise, nothing far above the target is looked at. The
    first value stands apart from that order: it may be a 0 that means a default.
    """
    looked: dict[int, float] = {}
    candidates: Sequence[int]
    for index in _doubling(count):
        found = cost(index)
        if found is None:
            count = _first(index, lambda i: i not in looked and cost(i) is None)
            looked[count - 1] = known(cost, count - 1)
            break
        looked[index] = found
        if rises and _rises(looked) and max(target, looked.get(1, math.inf)) <= found > looked[1]:
            break
    if not rises:
        spread = range(count) if count <= _FEW else (round((count - 1) * i / 16) for i in range(17))
        looked |= {index: known(cost, index) for index in spread}
    if len(set(looked.values())) == 1:
        return 0
    falls = {index: -found for index, found in looked.items()}
    if _rises(looked):
        candidates = [0, 1, *_around(cost, looked, target)]
    elif _rises(falls):
        candidates = [0, 1, *_around(lambda index: -known(cost, index), falls, -target)]
    else:
        stride = -(-count // _EVERY_VALUE)
        near = min(range(0, count, stride), key=lambda index: abs(known(cost, index) - target))
        candidates = range(max(0, near - stride + 1), min(count, near + stride)) if stride > 1 else range(count)
    return min(candidates, key=lambda i: (abs(known(cost, i) - target), known(cost, i), i))


def known(of: Callable[[_Key], _Value | None], key: _Key) -> _Value:
    """What is there, or the search is wrong."""
    found = of(key)
    assert found is not None
    return found


def _rises(looked: Mapping[int, float]) -> bool:
    """Whether costs never fall, those of the first value aside."""
    costs = [looked[index] for index in sorted(looked) if index != 0]
    return all(a <= b for a, b in itertools.pairwise(costs))


def _around(cost: Callable[[int], float | None], looked: Mapping[int, float], target: float) -> Sequence[int]:
    """The first indices of the two costs around ``target``. Costs rise from index 1 on; the last has been looked at."""

    def cost_at(index: int) -> float:
        return known(cost, index)

    last = max(looked)
    after = _reached(cost_at, looked, target)
    if after == 1:
        return [after]
    # Of equal costs the first; seldom are there many.
    bound, distance = cost_at(after - 1), 1
    while (least := max(1, after - 1 - distance)) > 1 and cost_at(least) >= bound:
        distance *= 2
    before = least + _first(after - 1 - least, lambda i: cost_at(least + i) >= bound)
    return [before] if after > last else [after, before]


def _reached(cost: Callable[[int], float], looked: Mapping[int, float], target: float) -> int:
    """The first index from 1 on whose cost is at least ``target``, or the one after the last.

    Counting is dear where masks are large, and costs are mostly close to a straight line: two guesses are on that line,
    the third halves what is left.
    """
    below = max((i for i, found in looked.items() if i > 0 and found < target), default=0)
    reached = min((i for i, found in looked.items() if i > 0 and found >= target), default=max(looked) + 1)
    guesses = 0
    while reached - below > 1:
        guesses += 1
        guess = (below + reached) // 2
        if guesses % 3 and below > 0:
            low, high = cost(below), cost(reached)
            on_line = below + math.ceil((target - low) / (high - low) * (reached - below))
            guess = min(max(on_line, below + 1), reached - 1)
        if cost(guess) < target:
            below = guess
        else:
            reached = guess
    return reached
