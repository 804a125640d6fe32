"""Uninitialised memory is NaN in every test.

A kernel that forgets to write an element, or reads scratch before writing it, then cannot pass by luck.
"""

import functools
import os
import sys

# Threads of OpenMP that spin while they wait keep others from working: where anything else runs, a test takes several
# times as long. Read when torch is loaded, also by the processes that tests start.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import pytest
import torch
from torch.utils._device import _device_constructors

import sparse_mhsa as sm
from engines import NO_ATTENTION, runs_on_both

# `torch.device` contexts recognise allocation functions by identity, and cache them: the real ones, not our wrappers.
_device_constructors()


def _poisoned(allocate):
    @functools.wraps(allocate)
    def wrapper(*args, **kwargs):
        tensor = allocate(*args, **kwargs)
        caller = sys._getframe(1).f_globals.get("__name__", "")
        if caller.startswith("sparse_mhsa") and tensor.is_floating_point() and not tensor.requires_grad:
            tensor.fill_(torch.nan)
        return tensor

    return wrapper


@pytest.fixture(autouse=True)
def nan_in_fresh_memory(monkeypatch):
    """Poison what Python code of the package allocates, and, through torch's own switch, what the core does."""
    for owner, name in (
        (torch, "empty"),
        (torch, "empty_like"),
        (torch, "empty_strided"),
        (torch.Tensor, "new_empty"),
        (torch.Tensor, "new_empty_strided"),
    ):
        monkeypatch.setattr(owner, name, _poisoned(getattr(owner, name)))
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", True)
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(before)


@pytest.fixture(autouse=True)
def same_draws():
    """Every test starts from the same random state."""
    torch.manual_seed(0)


def pytest_generate_tests(metafunc):
    """Run a test on both engines, unless `engines` says why not; one that asks for it by name runs on both anyway."""
    asked = any("engine" in mark.args for mark in metafunc.definition.iter_markers("usefixtures"))
    if asked or runs_on_both(_node_id(metafunc.definition)):
        metafunc.parametrize("engine", ["cpu", "aten"], indirect=True)


def _node_id(item):
    return item.nodeid.removeprefix("tests/")


@pytest.fixture(autouse=True)
def engine(request, monkeypatch):
    """The test runs once on our kernels and once on ATen operators: each holds the other to its word."""
    chosen = getattr(request, "param", None)
    if chosen is not None:
        with sm.engine(chosen):
            yield chosen
        return
    if _node_id(request.node).startswith(NO_ATTENTION):

        def refuse(*_):
            raise AssertionError("this test computes attention: take it off the list in tests/engines.py")

        monkeypatch.setattr(sm.ops, "engine_for", refuse)
    yield None
