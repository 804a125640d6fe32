"""The methods of the accuracy table, each set to the same attention budget."""

import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

from .. import sparsify
from .._core import AttentionConfig, ConfigError
from ..adapters import find_attention
from ..config import load_config
from ..flops import AttentionCost, attention_cost
from ..solve import Value, solve_budget

REFERENCE = "fibottention"
"""The method whose cost is the budget unless one is given: its published form has no free parameter."""


@dataclass(frozen=True)
class Method:
    """A row of the table.

    Attributes:
        title: in words.
        config: of the attention, without its parameter.
        parameter: key of ``mask_kwargs`` to set; None for the mask's own, or for no parameter.
        solved: it has a parameter at all.
    """

    title: str
    config: Mapping[str, Any]
    parameter: str | None = None
    solved: bool = True


def _mask(name: str, **mask_kwargs: object) -> dict[str, Any]:
    return {"mask": name, "mask_kwargs": mask_kwargs}


METHODS: dict[str, Method] = {
    "dense": Method("dense", {"mask": "none"}, solved=False),
    "random": Method("random, k keys per query", _mask("random", seed=0), "k"),
    "topk": Method("top-k by score", _mask("topk"), "k"),
    "pruning": Method("pruning to a budget, nearest first", _mask("pruning", method="position"), "keep_ratio"),
    "sparse-local": Method("Sparse Transformer, local", _mask("sparse", pattern="local"), "local_attn_ctx"),
    "sparse-strided": Method("Sparse Transformer, strided", _mask("sparse", pattern="strided"), "local_attn_ctx"),
    "sparse-fixed": Method(
        "Sparse Transformer, fixed",
        _mask("sparse", pattern="fixed", fixed_c=1, per_head_distinct=True, symmetric=False),
        "local_attn_ctx",
    ),
    "bigbird": Method("BigBird", _mask("bigbird"), "window"),
    "longformer": Method("Longformer", _mask("longformer", include_self=True), "window"),
    "linformer": Method("Linformer", {"backend": "linformer"}),
    "efficient": Method("Efficient Attention", {"backend": "efficient"}, solved=False),
    "efficient-local": Method("Efficient Attention in blocks", {"backend": "efficient_local"}),
    "fibottention": Method("Fibottention", _mask("fibottention", shuffled=False), "w_max"),
    "fibottention-modified": Method(
        "Fibottention, modified", _mask("fibottention", modified=True, shuffled=False), "w_max"
    ),
    "fibottention-shuffled": Method("Fibottention, shuffled", _mask("fibottention", shuffled=True), "w_max"),
    "fibottention-high-overlap": Method(
        "Fibottention, the same offsets in all heads",
        _mask("fibottention", shuffled=False, shared_offsets=True),
        "w_min",
    ),
    "fibottention-crossdiag": Method(
        "Fibottention along the anti-diagonal", _mask("fibottentioncrossdiag", shuffled=False), solved=False
    ),
    "neighborhood": Method("neighbourhood on the grid", _mask("neighborhood"), "kernel_size"),
}
"""By name, in the order of the published table."""


@dataclass(frozen=True)
class Solved:
    """A method at the budget, as closely as its parameter allows.

    Attributes:
        name: key of `METHODS`.
        config: the finished configuration as YAML text; None for dense attention.
        value: of its parameter; None if it has none.
        cost: of the attention of the model, per image.
    """

    name: str
    config: str | None
    value: Value | None
    cost: AttentionCost


def solve_methods(model: nn.Module, num_tokens: int, names: Iterable[str], budget: float | None) -> list[Solved]:
    """Set the parameter of every method so that the model's attention costs ``budget``, as closely as it can.

    Args:
        model: the dense model; it is swapped back and forth and left dense in the end.
        num_tokens: N.
        names: keys of `METHODS`.
        budget: GMACs of all layers for one image; None for those of `REFERENCE` as published.

    Returns:
        One solution per method.

    Raises:
        ConfigError: a method cannot be applied to the model.
        ValueError: the budget is below one key for each query.
    """
    from .. import densify

    def cost_of(config: Mapping[str, Any] | AttentionConfig) -> AttentionCost:
        sparsify(model, load_config(config))
        return attention_cost(model, num_tokens)

    try:
        target = cost_of(METHODS[REFERENCE].config).sparse("GMACs") if budget is None else budget
        return [_solve(name, model, num_tokens, target, cost_of, as_published=budget is None) for name in names]
    finally:
        densify(model)


def _solve(
    name: str,
    model: nn.Module,
    num_tokens: int,
    target: float,
    cost_of: Callable[[Mapping[str, Any] | AttentionConfig], AttentionCost],
    *,
    as_published: bool,
) -> Solved:
    method = METHODS[name]
    site = find_attention(model)[0]
    if name == "dense":
        return Solved(name, None, None, cost_of(method.config))
    if not method.solved or (as_published and name == REFERENCE):
        config = load_config(method.config)
        return Solved(name, config.to_yaml(), None, cost_of(config))
    if "backend" in method.config:
        return _solve_backend(name, num_tokens, site.num_heads, target, cost_of)
    try:
        solution = solve_budget(
            method.config,
            num_tokens,
            site.num_heads,
            flops=target,
            unit="GMACs",
            head_dim=site.adapter.heads(site.module)[1],
            num_layers=site.num_layers,
            grid=site.grid,
            num_prefix_tokens=site.num_prefix_tokens,
            parameter=method.parameter,
        )
    except ConfigError as error:
        raise ConfigError(f"{name}: {error}") from error
    # The prefix of the model, written down, so that the file means the same elsewhere.
    document = {**json.loads(solution.config.to_json()), "num_prefix_tokens": site.num_prefix_tokens}
    config = load_config(document)
    return Solved(name, config.to_yaml(), solution.value, cost_of(config))


def _solve_backend(
    name: str,
    num_tokens: int,
    num_heads: int,
    target: float,
    cost_of: Callable[[Mapping[str, Any] | AttentionConfig], AttentionCost],
) -> Solved:
    """Backends without edges: the one integer that their cost grows with, by bisection."""

    def config_of(value: int) -> dict[str, Any]:
        if name == "linformer":
            projector = {"max_seq_len": num_tokens, "r": value, "num_heads": num_heads}
            return {"backend": "linformer", "backend_kwargs": {"projector": projector}}
        return {"backend": "efficient_local", "backend_kwargs": {"block_size": value}}

    def cost(value: int) -> float:
        return cost_of(config_of(value)).sparse("GMACs")

    low, high = 1, num_tokens - 1
    while low < high:
        middle = (low + high) // 2
        low, high = (middle + 1, high) if cost(middle) < target else (low, middle)
    value = min((max(1, low - 1), low), key=lambda one: abs(cost(one) - target))
    config = load_config(config_of(value))
    return Solved(name, config.to_yaml(), value, cost_of(config))
