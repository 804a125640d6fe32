"""The parameter of a mask that meets a budget."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from .._core import AttentionConfig
from ..config import MAX_TOKENS, ConfigLike, integer, integers, load_config
from ..flops import Unit
from .choice import Value, choose, document_of, with_values
from .cost import Budget, Place

__all__ = ["Solution", "Value", "solve_budget"]


@dataclass(frozen=True)
class Solution:
    """The value of a mask's parameter that meets a budget as closely as the mask can."""

    values: Mapping[str, Value]
    """What must be set in ``mask_kwargs``: one key, or several where none alone comes as close."""
    config: AttentionConfig
    """The configuration with these values."""
    density: float
    """Share of all query-key pairs that is then kept, prefix included."""
    pruning_ratio: float
    """1 - density over the patch-to-patch pairs, the convention of published tables."""
    edges: float
    """Pairs kept in all heads, and in all layers if there are ``num_layers``; a mean for a mask by content."""

    @property
    def parameter(self) -> str:
        """The first key of ``values``."""
        return next(iter(self.values))

    @property
    def value(self) -> Value:
        """What ``parameter`` must be."""
        return self.values[self.parameter]


def solve_budget(
    config: ConfigLike,
    num_tokens: int,
    num_heads: int,
    density: float | None = None,
    *,
    pruning_ratio: float | None = None,
    flops: float | None = None,
    unit: Unit | None = None,
    head_dim: int | None = None,
    num_layers: int | None = None,
    layer: int = 0,
    grid: Sequence[int] | None = None,
    num_prefix_tokens: int | None = None,
    parameter: str | None = None,
) -> Solution:
    """Set the parameter of a mask so that it keeps a given share of pairs, as closely as it can.

    So methods are compared at matched cost. The parameter is searched by counting edges, never with an N x N array:
    by bisection where more of it always means more pairs (or fewer), otherwise value by value. Of two values equally
    close the cheaper one, and of equal costs the lower value, is taken: also where no value changes what the mask
    keeps. Of several parameters (bigbird, block_topk, fibottention, longformer, sparse, vertical_slash) the one that
    comes closest is set, and another with it only where that comes closer still; where this misses by more than a
    four-hundredth of the budget, the first parameter's values up to 8 away are tried with the others set anew, and
    again around the best of them. Then all values are tried with each other if these are at most 4,096 (two parameters
    at up to 63 tokens), else, if what was found misses by more than a four-hundredth, one parameter is set anew for all
    values of the others if these are at most 676 (one at up to 675 tokens); the third parameter of bigbird and
    vertical_slash stays as it is where that makes too many. So no combination comes closer up to 63 tokens, and none
    much closer up to 675, except where more of a parameter, against the rule, means fewer pairs; beyond that no other
    value of one of them does, with the others as they are.

    A window on the grid gets one number for all axes, and a list by axis only where that comes closer. Heads and
    layers share what is set; `sparse_mhsa.budget.allocate` divides a budget among them. A mask that chooses keys by
    content is counted in the mean over queries and keys that are drawn independently from one normal distribution, so
    that scaled scores have a variance of 1: to a few percent for an estimated ``vertical_slash``, which looks at sums
    of weights, and to about a percent for ``block_topk`` with ``pool: max``, where a shorter last block loses the more
    often the more channels there are: 64 are taken.

    Args:
        config: whatever `load_config` takes; a mapping may leave out the parameter itself.
        num_tokens: N, all tokens.
        num_heads: H.
        density: share of all query-key pairs to keep, prefix included.
        pruning_ratio: 1 - density over the patch-to-patch pairs, the convention of published tables; instead.
        flops: cost of the two products of attention in all layers, in ``unit``; instead.
        unit: ``GMACs`` (a multiply-accumulate counts as one) or ``GFLOPs`` (as two), with ``flops``.
        head_dim: D, with ``flops``, and for masks that need it.
        num_layers: L, with ``flops``; all layers are counted. Without it one layer is.
        layer: which, without ``num_layers``.
        grid: [H, W] or [T, H, W] of the tokens after the prefix; the configuration's own value wins.
        num_prefix_tokens: leading tokens off the grid; the configuration's own value wins.
        parameter: key of ``mask_kwargs`` to set, and no other; default is what the mask names for it
            (``budget_keys`` in the registry). Required for masks that are registered by the program.

    Returns:
        What is set, the finished configuration and what it keeps.

    Raises:
        ConfigError: the configuration cannot be honoured, the backend has no edges, or the mask has no such
            parameter (the message says its density).
        TypeError: a number is none, or not whole where it counts.
        ValueError: not exactly one budget is given, or it is out of range, such as less than one key for each
                query; or ``grid`` does not have as many cells as there are tokens after the prefix.
    """
    if parameter is not None and not isinstance(parameter, str):
        raise TypeError(f"parameter: expected a key of mask_kwargs, got {type(parameter).__name__} {parameter!r:.60}")
    document = document_of(config)
    tokens, heads = integer("num_tokens", num_tokens, most=MAX_TOKENS), integer("num_heads", num_heads)
    layers = None if num_layers is None else integer("num_layers", num_layers, 1)
    sides = None if grid is None else integers("grid", grid)
    place = Place(tokens, heads, layer, layers, sides, num_prefix_tokens, head_dim)
    chosen = choose(document, parameter, place, Budget(density, pruning_ratio, flops, unit))
    finished = load_config(with_values(document, chosen.values))
    return Solution(chosen.values, finished, chosen.count.density, chosen.count.pruning_ratio, chosen.count.edges)
