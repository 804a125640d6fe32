"""Timing methods against each other: in one process, taking turns, and compared turn by turn."""

import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field

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


def out_of_memory(error: Exception) -> str | None:
    """What an error says about memory that is missing, or None for an error about something else."""
    message = " ".join(str(error).split())
    # torch names what it could not allocate, our core what does not fit, the loader which library.
    signs = ("allocate memory", "fit in memory", "out of memory", "failed to map segment")
    if not isinstance(error, MemoryError) and not any(sign in message for sign in signs):
        return None
    return f"out of memory: {message[:200]}" if message else "out of memory"


@contextmanager
def memory_for(what: str) -> Iterator[None]:
    """Let an error about missing memory say what it was missing for."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if out_of_memory(error) is None:
            raise
        raise MemoryError(f"{what}: {error}") from error


@dataclass(frozen=True)
class Turns:
    """What `interleave` measured.

    Attributes:
        seconds: by name, those of every turn, ``None`` where the call did not take part.
        short: of the calls that ran out of memory, which are not in ``seconds``: what the error said.
    """

    seconds: dict[str, list[float | None]] = field(default_factory=dict)
    short: dict[str, str] = field(default_factory=dict)


def interleave(calls: Mapping[str, Call], *, repeat: int, budget: float) -> Turns:
    """Time every call ``repeat`` times, taking turns, so that what slows the machine down slows all of them.

    Every turn starts with another call. A call takes part in the first turns until it has used up its budget, but in
    at least three (one, if a single call takes longer than the budget). One that runs out of memory is left out.

    Args:
        calls: what to call, by name.
        repeat: turns.
        budget: seconds that each call may take in all.
    """
    names, measured = list(calls), Turns()

    def take(name: str) -> float | None:
        try:
            return seconds_of(calls[name])
        except (MemoryError, RuntimeError, ValueError) as error:
            message = out_of_memory(error)
            if message is None:
                raise
            measured.short[name] = message
            measured.seconds.pop(name, None)
            return None

    turns = {}
    for name in names:
        warm = take(name)
        if warm is not None:
            measured.seconds[name] = []
            turns[name] = 1 if warm > budget else min(repeat, max(3, int(budget / max(warm, 1e-9))))
    for turn in range(max(turns.values(), default=0)):
        first = turn % len(names)
        for name in names[first:] + names[:first]:
            if name in measured.seconds:
                seconds = take(name) if turn < turns[name] else None
                measured.seconds.get(name, []).append(seconds)
    return measured


def paired_ratio(numerator: list[float | None], denominator: list[float | None]) -> Spread:
    """The spread of the quotients of those turns in which both took part."""
    pairs = zip(numerator, denominator, strict=True)
    return Spread.of([a / b for a, b in pairs if a is not None and b is not None])


def spread(seconds: list[float | None]) -> Spread:
    """The spread of the turns in which a call took part."""
    return Spread.of([value for value in seconds if value is not None])
