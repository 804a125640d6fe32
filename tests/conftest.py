"""Uninitialised memory is NaN in every test.

A kernel that forgets to write an element, or reads scratch before writing it, then cannot pass by luck.
"""

import functools
import sys

import pytest
import torch
from torch.utils._device import _device_constructors

import sparse_mhsa as sm

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


@pytest.fixture(params=["cpu", "aten"])
def engine(request):
    """The test runs once on our kernels and once on ATen operators: each holds the other to its word."""
    with sm.engine(request.param):
        yield request.param
