"""What is measured: one case per mask and size, in the order of the table."""

import fnmatch
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from .._core import registered_masks
from ..config import configs, load_config
from ..mask import Mask
from ..train import UsageError

NUM_HEADS, HEAD_DIM, NUM_LAYERS = 12, 64, 12
OTHER_SIZES = (1025, 197)
"""Masks outside the main rows: 32 x 32 patches and a class token, or ViT's 14 x 14 where their file says so."""


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
    config: Any = field(repr=False)
    num_tokens: int
    batch: int = 1
    quick: bool = False
    num_heads: int = NUM_HEADS
    head_dim: int = HEAD_DIM

    def mask(self) -> Mask:
        """The edges of layer 0.

        Raises:
            ValueError: the mask does not exist for this size.
        """
        return Mask.from_config(self.config, self.num_tokens, self.num_heads, layer=0, num_layers=NUM_LAYERS)


def all_cases() -> list[Case]:
    """The rows of the full table; masks that are registered later get theirs without being told."""
    fibottention = configs()["fibottention"]
    sizes = ((197, 8), (577, 2), (1025, 1), (2305, 1), (4097, 1), (8193, 1), (16385, 1))
    cases = [_case("fibottention", fibottention, n, batch, quick=n in (197, 1025)) for n, batch in sizes]
    for window, num_tokens in ((64, 1024), (64, 4096), (256, 4096), (512, 4096)):
        config = {"mask": "local", "mask_kwargs": {"window": window}}
        cases.append(_case(f"local_w{window}", config, num_tokens, quick=num_tokens == 1024))
    cases += [_case("none", {"mask": "none"}, n, batch, quick=n == 197) for n, batch in sizes[:5]]
    return cases + _other_masks()


def _other_masks() -> list[Case]:
    shipped, cases = configs(), []
    for name in (entry["name"] for entry in registered_masks()):
        if name in ("fibottention", "local", "none") or name not in shipped:
            continue
        for num_tokens in OTHER_SIZES:
            case = _case(name, shipped[name], num_tokens)
            try:
                case.mask()
            except ValueError:  # a grid of another size
                continue
            cases.append(case)
            break
    return cases


def select(patterns: Sequence[str] | None, *, quick: bool) -> list[Case]:
    """The cases whose names match one of the shell patterns; all, or those of ``quick``, without patterns.

    Raises:
        UsageError: a pattern matches nothing.
    """
    cases = all_cases()
    if not patterns:
        return [case for case in cases if case.quick or not quick]
    for pattern in patterns:
        if not any(fnmatch.fnmatchcase(case.name, pattern) for case in cases):
            raise UsageError(f"--rows {pattern}: no such row; there are {', '.join(case.name for case in cases)}")
    return [case for case in cases if any(fnmatch.fnmatchcase(case.name, pattern) for pattern in patterns)]


def _case(name: str, config: Any, num_tokens: int, batch: int = 1, *, quick: bool = False) -> Case:  # noqa: ANN401
    suffix = f"x{batch}" if batch > 1 else ""
    parsed = load_config(config)
    return Case(f"{name}-{num_tokens}{suffix}", parsed, num_tokens, batch, quick)
