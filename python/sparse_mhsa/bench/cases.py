"""What is measured: one case per mechanism and size, in the order of the table."""

import fnmatch
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Protocol, TypeVar

import torch
from torch import Tensor

from .._core import registered_masks
from ..config import ConfigLike, configs, load_config
from ..layer_mask import LayerMask
from ..train import UsageError

NUM_HEADS, HEAD_DIM, NUM_LAYERS = 12, 64, 12
OTHER_SIZES = (1025, 197, 1569)
"""Masks outside the main rows: 32 x 32 patches and a class token, or where their file says so ViT's 14 x 14, or eight
frames of these."""
CHOICES = ("topk", "block_topk", "importance", "vertical_slash_estimated")
"""Files of masks that choose keys by content."""
BACKENDS = ("efficient_none", "efficient_local", "linformer_none")
"""Files of attention without edges."""


@dataclass(frozen=True)
class Case:
    """One mask at one size.

    Attributes:
        name: what ``--rows`` selects by, such as ``fibottention-197x8``.
        config: the attention configuration.
        num_tokens: N.
        batch: B.
        quick: part of ``--quick``.
        num_heads: H.
        head_dim: D.
    """

    name: str
    config: ConfigLike = field(repr=False)
    num_tokens: int
    batch: int = 1
    quick: bool = False
    num_heads: int = NUM_HEADS
    head_dim: int = HEAD_DIM

    @cached_property
    def layer_mask(self) -> LayerMask:
        """The mechanism in layer 0."""
        return LayerMask(load_config(self.config), self.num_heads, 0, NUM_LAYERS)

    def inputs(self, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
        """q, k, v (B, H, N, D) that require gradients, the same for the same shape."""
        generator = torch.Generator().manual_seed(self.num_tokens)
        shape = (self.batch, self.num_heads, self.num_tokens, self.head_dim)
        q, k, v = (torch.randn(shape, generator=generator).to(dtype).requires_grad_() for _ in range(3))
        return q, k, v


def all_cases() -> list[Case]:
    """The rows of the full table; masks that are registered later get theirs without being told."""
    fibottention = configs()["fibottention"]
    sizes = ((197, 8), (577, 2), (1025, 1), (2305, 1), (4097, 1), (8193, 1), (16385, 1))
    cases = [_case("fibottention", fibottention, n, batch, quick=n in (197, 1025)) for n, batch in sizes]
    for window, num_tokens in ((64, 1024), (64, 4096), (256, 4096), (512, 4096)):
        config = {"mask": "local", "mask_kwargs": {"window": window}}
        cases.append(_case(f"local_w{window}", config, num_tokens, quick=num_tokens == 1024))
    cases += [_case("none", {"mask": "none"}, n, batch, quick=n == 197) for n, batch in sizes[:5]]
    grid = {"mask": "neighborhood", "mask_kwargs": {"kernel_size": 7}, "grid": [32, 32], "num_prefix_tokens": 1}
    cases.append(_case("neighborhood_k7", grid, OTHER_SIZES[0]))
    # The file of `pruning` keeps the nearest pairs, a window. Drawn pairs lie as scattered as those that scores choose.
    drawn = {"mask_kwargs": {"keep_ratio": 0.02, "method": "random", "seed": 0}, "num_prefix_tokens": 1}
    cases.append(_case("pruning_drawn", {"mask": "pruning", **drawn}, OTHER_SIZES[0]))
    return cases + _other_masks() + _choices() + _backends()


def _choices() -> list[Case]:
    """Masks by content, whose time includes the choice."""
    shipped = configs()
    cases = [_case(name, shipped[name], OTHER_SIZES[0]) for name in CHOICES]
    return [*cases, *(_case(name, shipped[name], 4097) for name in ("topk", "vertical_slash_estimated"))]


def _backends() -> list[Case]:
    cases = []
    for name in BACKENDS:
        config = load_config(configs()[name])
        sizes = ((197, 8),) if config.backend == "linformer" else ((197, 8), (1025, 1), (4097, 1))
        cases += [_case(config.backend, config, num_tokens, batch) for num_tokens, batch in sizes]
    return cases


def _other_masks() -> list[Case]:
    shipped, cases = configs(), []
    for name in (entry["name"] for entry in registered_masks()):
        if name in ("fibottention", "local", "none") or name not in shipped or load_config(shipped[name]).by_content:
            continue
        for num_tokens in OTHER_SIZES:
            case = _case(name, shipped[name], num_tokens)
            try:
                case.layer_mask.at(num_tokens)
            except ValueError:  # a grid of another size
                continue
            cases.append(case)
            break
    return cases


class Row(Protocol):
    """What ``--rows`` and ``--quick`` choose from."""

    @property
    def name(self) -> str:
        """What the patterns are compared with."""

    @property
    def quick(self) -> bool:
        """Part of ``--quick``."""


RowT = TypeVar("RowT", bound=Row)


def select(cases: Sequence[RowT], patterns: Sequence[str] | None, *, quick: bool) -> list[RowT]:
    """The cases whose names match one of the shell patterns; all, or those of ``quick``, without patterns.

    Raises:
        UsageError: a pattern matches nothing.
    """
    if not patterns:
        return [case for case in cases if case.quick or not quick]
    for pattern in patterns:
        if not any(fnmatch.fnmatchcase(case.name, pattern) for case in cases):
            raise UsageError(f"--rows {pattern}: no such row; there are {', '.join(case.name for case in cases)}")
    return [case for case in cases if any(fnmatch.fnmatchcase(case.name, pattern) for pattern in patterns)]


def _case(name: str, config: ConfigLike, num_tokens: int, batch: int = 1, *, quick: bool = False) -> Case:
    suffix = f"x{batch}" if batch > 1 else ""
    parsed = load_config(config)
    return Case(f"{name}-{num_tokens}{suffix}", parsed, num_tokens, batch, quick)
