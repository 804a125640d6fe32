"""Which implementation computes attention: our kernels, or ATen operators on any device."""

import functools
import os
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from difflib import get_close_matches
from typing import Literal

import torch

EngineName = Literal["auto", "cpu", "cuda", "aten"]

ENVIRONMENT_VARIABLE = "SPARSE_MHSA_ENGINE"
NAMES: tuple[EngineName, ...] = ("auto", "cpu", "cuda", "aten")
_chosen: ContextVar[EngineName | None] = ContextVar("sparse_mhsa_engine", default=None)


@contextmanager
def engine(name: EngineName) -> Iterator[None]:
    """Choose what computes attention inside the ``with`` block, in this thread or asyncio task only.

    The operators ask when they run, so the choice also holds inside compiled functions. The backward pass, whenever
    and in whichever thread it runs, uses what was chosen when the forward pass ran. Without a choice the environment
    variable ``SPARSE_MHSA_ENGINE`` decides, and without it ``auto``.

    Args:
        name:
            ``auto``: our kernels for CPU tensors, ATen operators for tensors on CUDA, MPS and XPU devices.
            ``cpu``: our kernels; a tensor on another device is an error.
            ``aten``: ATen operators on every device, the CPU included. Time and memory grow with the edges
            kept here too, but not as fast as our kernels. It has been tested on the CPU and not run on a GPU.
            ``cuda``: reserved for native CUDA kernels, which this version does not have.

    Raises:
        ValueError: ``name`` is none of these.
        NotImplementedError: ``name`` is ``cuda``.
    """
    token = _chosen.set(_checked(name, "engine"))
    try:
        yield
    finally:
        _chosen.reset(token)


def chosen_engine() -> EngineName:
    """What is chosen right now, here.

    Raises:
        ValueError: ``SPARSE_MHSA_ENGINE`` names no engine.
        NotImplementedError: it names ``cuda``.
    """
    return _chosen.get() or _from_environment()


def engine_for(device: torch.device, chosen: EngineName | None = None) -> Literal["cpu", "aten"]:
    """The engine for tensors on ``device``.

    Args:
        device: where the tensors are.
        chosen: the choice to go by; default is what is chosen right now.

    Raises:
        RuntimeError: engine ``cpu`` is chosen and ``device`` is another.
        ValueError: ``SPARSE_MHSA_ENGINE`` names no engine.
        NotImplementedError: it names ``cuda``.
    """
    chosen = chosen or chosen_engine()
    if chosen == "aten" or (chosen == "auto" and device.type != "cpu"):
        return "aten"
    if device.type != "cpu":
        raise RuntimeError(f"engine: `{chosen}` computes CPU tensors only, got one on {device}; use `auto` or `aten`")
    return "cpu"


@functools.cache
def _from_environment() -> EngineName:
    return _checked(os.environ.get(ENVIRONMENT_VARIABLE) or "auto", ENVIRONMENT_VARIABLE)


def _checked(name: str, source: str) -> EngineName:
    if name not in NAMES:
        close = get_close_matches(str(name), NAMES, n=1)
        hint = f"did you mean `{close[0]}`? " if close else ""
        raise ValueError(f"{source}: unknown engine {name!r}; {hint}allowed: {', '.join(NAMES)}")
    if name == "cuda":
        raise NotImplementedError(
            f"{source}: this version has no native CUDA kernels; `auto` computes CUDA tensors with ATen operators"
        )
    return name
