"""Timing methods against each other: in one process, taking turns, and compared turn by turn."""

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

Call = Callable[[], object]


@dataclass(frozen=True)
class Spread:
    """Median and quartiles of what was measured."""

    median: float
    lower_quartile: float
    upper_quartile: float
    repeats: int

    @classmethod
    def of(cls, values: list[float]) -> "Spread":
        """The spread of at least one value."""
        if len(values) == 1:
            return cls(values[0], values[0], values[0], 1)
        lower, median, upper = statistics.quantiles(values, n=4, method="inclusive")
        return cls(median, lower, upper, len(values))


def seconds_of(call: Call) -> float:
    """Wall time of one call."""
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def interleave(calls: Mapping[str, Call], *, repeat: int, budget: float) -> dict[str, list[float | None]]:
    """Time every call ``repeat`` times, taking turns, so that what slows the machine down slows all of them.

    Every turn starts with another call. A call takes part in the first turns until it has used up its budget, but in
    at least three (one, if a single call takes longer than the budget).

    Args:
        calls: what to call, by name.
        repeat: turns.
        budget: seconds that each call may take in all.

    Returns:
        Per name, the seconds of every turn, ``None`` where it did not take part.
    """
    names = list(calls)
    seconds: dict[str, list[float | None]] = {name: [] for name in names}
    turns = {}
    for name in names:
        warm = seconds_of(calls[name])
        turns[name] = 1 if warm > budget else min(repeat, max(3, int(budget / max(warm, 1e-9))))
    for turn in range(max(turns.values(), default=0)):
        first = turn % len(names)
        for name in names[first:] + names[:first]:
            seconds[name].append(seconds_of(calls[name]) if turn < turns[name] else None)
    return seconds


def paired_ratio(numerator: list[float | None], denominator: list[float | None]) -> Spread:
    """The spread of the quotients of those turns in which both took part."""
    pairs = zip(numerator, denominator, strict=True)
    return Spread.of([a / b for a, b in pairs if a is not None and b is not None])


def spread(seconds: list[float | None]) -> Spread:
    """The spread of the turns in which a call took part."""
    return Spread.of([value for value in seconds if value is not None])
