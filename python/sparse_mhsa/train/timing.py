"""Measuring time: attention inside a running model, and functions against each other."""

import resource
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import nn


def synchronize(device: torch.device) -> None:
    """Wait for the device, so that a clock read next sees finished work."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def peak_memory(device: torch.device) -> int:
    """Largest memory so far in bytes: allocated on a GPU, else resident in this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


class AttentionClock:
    """Adds up the wall time of the forward pass of attention layers, projections included.

    Args:
        layers: modules to measure; they must not contain each other.
        device: where they run.
    """

    def __init__(self, layers: Iterable[nn.Module], device: torch.device) -> None:
        self.device = device
        self.seconds = 0.0
        self._entered = 0.0
        self._handles = [
            handle
            for layer in layers
            for handle in (
                layer.register_forward_pre_hook(self._enter),
                layer.register_forward_hook(self._leave),
            )
        ]

    def lap(self) -> float:
        """The seconds since the last lap."""
        seconds, self.seconds = self.seconds, 0.0
        return seconds

    def close(self) -> None:
        """Take the hooks off the layers."""
        for handle in self._handles:
            handle.remove()

    def _enter(self, *_: object) -> None:
        synchronize(self.device)
        self._entered = time.perf_counter()

    def _leave(self, *_: object) -> None:
        synchronize(self.device)
        self.seconds += time.perf_counter() - self._entered


@dataclass(frozen=True)
class Timing:
    """Seconds of one call over several repeats."""

    median: float
    lower_quartile: float
    upper_quartile: float
    repeats: int


def compare(
    functions: Mapping[str, Callable[[], object]],
    device: torch.device,
    *,
    repeats: int = 7,
    warm_up: int = 1,
) -> dict[str, Timing]:
    """Time functions against each other, taking turns: what slows the machine down slows all of them.

    Args:
        functions: what to call, by name.
        device: where they run.
        repeats: measured calls of each.
        warm_up: calls of each that are not counted.

    Returns:
        One `Timing` per function, under its name.
    """
    seconds: dict[str, list[float]] = {name: [] for name in functions}
    for turn in range(warm_up + repeats):
        for name, function in functions.items():
            synchronize(device)
            start = time.perf_counter()
            function()
            synchronize(device)
            if turn >= warm_up:
                seconds[name].append(time.perf_counter() - start)
    return {name: _summary(values) for name, values in seconds.items()}


def _summary(seconds: list[float]) -> Timing:
    lower, median, upper = statistics.quantiles(seconds, n=4, method="inclusive")
    return Timing(median, lower, upper, len(seconds))
