"""What the machine can do, measured beside the rows: multiply-adds per second, and bytes per second by working set."""

import bisect
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from itertools import pairwise

import torch

from .measure import memory_for

MATRIX = 1536
"""Side of the square matrices whose product stands for the peak rate."""
WORKING_SETS = tuple(1 << bits for bits in range(15, 29, 2))
"""Bytes per thread, 32 KiB to 128 MiB."""
PRIVATE = 1 << 20
"""Up to here a working set is taken to lie in caches that threads do not share."""


def best(call: Callable[[], object], seconds: float = 0.2) -> float:
    """The shortest time of a call within about ``seconds``: a rate of the machine, not of its other users."""
    call()
    times: list[float] = []
    end = time.perf_counter() + seconds
    while not times or time.perf_counter() < end:
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return min(times)


def peak_flops(dtype: torch.dtype) -> float:
    """Floating-point operations per second of torch's matrix product, the closest to the FMA peak from Python."""
    with memory_for(f"measuring the machine's peak rate by matrices of {MATRIX} x {MATRIX}"):
        a, b = (torch.randn(MATRIX, MATRIX).to(dtype) for _ in range(2))
        return 2 * MATRIX**3 / best(lambda: a @ b)


class Bandwidth:
    """Bytes per second of a triad a + 2 b -> c whose three arrays together have a given size."""

    def __init__(self) -> None:
        self.rates: dict[int, float] = {}
        nothing = torch.zeros(1)
        threads = torch.get_num_threads()
        for size in WORKING_SETS:
            private = size <= PRIVATE
            # In private caches one thread is measured: waking the others would take longer than the copying.
            share = f"{size >> 10} KiB per thread"
            with _threads(1 if private else threads), memory_for(f"measuring the memory's bandwidth with {share}"):
                overhead = best(partial(torch.add, nothing, nothing, alpha=2, out=nothing), 0.02)
                a, b, c = (torch.ones(size * (1 if private else threads) // 12) for _ in range(3))
                taken = best(partial(torch.add, a, b, alpha=2, out=c), 0.1)
            rate = 3 * a.numel() * a.element_size() / max(taken - overhead, 1e-9)
            self.rates[size] = rate * (threads if private else 1)
        # A larger working set is never faster; where it seems so, something else ran during the smaller one.
        for larger, smaller in pairwise(sorted(self.rates, reverse=True)):
            self.rates[smaller] = max(self.rates[smaller], self.rates[larger])

    def at(self, size: int) -> float:
        """Bytes per second of all threads together when each works on ``size`` bytes."""
        sizes = sorted(self.rates)
        return self.rates[sizes[min(bisect.bisect_left(sizes, size), len(sizes) - 1)]]


@contextmanager
def _threads(number: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(number)
    try:
        yield
    finally:
        torch.set_num_threads(before)
