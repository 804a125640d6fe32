"""The parameter of a mask that meets a budget."""

import bisect
import functools
import itertools
import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeVar

from . import _core
from ._core import AttentionConfig, ConfigError, Edges
from .config import ConfigLike, config_error, load_config
from .flops import Unit, attention_macs, in_unit
from .layer_mask import LayerMask

_Key = TypeVar("_Key")
_Value = TypeVar("_Value")

_EVERY_VALUE = 4096
"""Values that are tried one by one where more of a parameter does not always mean more pairs."""
_NEAR = 8
"""Values on either side of the first parameter's that are tried with the other parameters set anew."""
_CLOSE = 5e-3
"""Share of a budget by which it may be missed before values nearby are tried."""


@dataclass(frozen=True)
class Solution:
    """The value of a mask's parameter that meets a budget as closely as the mask can."""

    values: Mapping[str, int | float]
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
    def value(self) -> int | float:
        """What ``parameter`` must be."""
        return self.values[self.parameter]


@dataclass(frozen=True)
class _Count:
    """Edges of a mask, and of dense attention, in all heads and layers."""

    edges: float
    patches: float
    dense_edges: int
    dense_patches: int
    queries: int
    patch_queries: int

    @property
    def density(self) -> float:
        return self.edges / max(1, self.dense_edges)

    @property
    def pruning_ratio(self) -> float:
        return 1.0 - self.patches / self.dense_patches if self.dense_patches else 0.0


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
    close the cheaper one, and of equal costs the lower value, is taken. Of several parameters (bigbird, block_topk)
    the one that comes closest is set, and another with it only where that comes closer still; where this misses by more
    than a two-hundredth of the budget, the first parameter's values up to 8 away are tried with the others set anew. In
    the end no other value of one of them, with the others as they are, comes closer. A mask that chooses keys by
    content is counted in the mean over contents for which every key is equally likely to be chosen. Parameters are
    numbers: a list of them (a kernel by axis, widths by head) is not searched.

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
        ValueError: not exactly one budget is given, or it is out of range, such as less than one key for each
                query.
    """
    document = _document(config)
    place = _Place(num_tokens, num_heads, layer, num_layers, grid, num_prefix_tokens, head_dim)
    budget = _Budget(density, pruning_ratio, flops, unit)
    keys = [parameter] if parameter is not None else _budget_keys(document, place)
    chosen = _set_in_turn(document, keys, place, budget)
    if len(keys) > 1:
        chosen = _closest_nearby(document, keys, chosen, place, budget)
        chosen = _none_alone_closer(document, keys, chosen, place, budget)
    finished = load_config(_with_values(document, chosen.values))
    return Solution(chosen.values, finished, chosen.count.density, chosen.count.pruning_ratio, chosen.count.edges)


@dataclass(frozen=True)
class _Place:
    """Where a mask is used."""

    num_tokens: int
    num_heads: int
    layer: int
    num_layers: int | None
    grid: Sequence[int] | None
    num_prefix_tokens: int | None
    head_dim: int | None

    def count(self, config: AttentionConfig) -> _Count:
        """The edges of one layer, or of all."""
        if not config.uses_edges:
            raise config_error(f"backend: `{config.backend}` has no edges to count", key="backend")
        if None in config.seeds:
            config = config.with_seed(0)  # numbers do not depend on it, and torch's generator is left alone
        sides = None if self.grid is None else tuple(self.grid)
        layers = [self.layer] if self.num_layers is None else range(self.num_layers)
        rest = (self.num_layers, 0, sides, self.num_prefix_tokens, self.head_dim)
        masks = [LayerMask(config, self.num_heads, layer, *rest) for layer in layers]
        of_spec = {spec: self._edges(spec, masks[0].by_content) for spec in {mask.spec for mask in masks}}
        edges, patches = (sum(of_spec[mask.spec][which] for mask in masks) for which in (0, 1))
        heads, num_patches = self.num_heads * len(masks), max(0, self.num_tokens - masks[0].num_prefix_tokens_used)
        queries, patch_queries = heads * self.num_tokens, heads * num_patches
        return _Count(edges, patches, queries * self.num_tokens, patch_queries * num_patches, queries, patch_queries)

    def _edges(self, spec: str, by_content: bool) -> tuple[float, float]:
        if by_content:
            all_edges, between = zip(*_core.expected_edges(spec, self.num_tokens), strict=True)
            return math.fsum(all_edges), math.fsum(between)
        edges = Edges.from_spec(spec, self.num_tokens, tried_out=True)
        return sum(edges.nnz()), sum(edges.nnz_patches())


def _document(config: ConfigLike) -> dict[str, Any]:
    """The keys of a configuration; a mapping may be incomplete."""
    if isinstance(config, Mapping):
        inner = config.get("attention", config)
        if isinstance(inner, Mapping) and isinstance(inner.get("mask_kwargs") or {}, Mapping):
            return dict(inner)
    document: dict[str, Any] = json.loads(load_config(config).to_json())
    return document


def _rises_with(key: str, document: Mapping[str, Any]) -> bool:
    """Whether more of ``key`` is known never to mean fewer pairs."""
    entry = _registered(document)
    return entry is not None and entry["budget_rises"] and any(key in names for names in entry["budget_keys"])


def _registered(document: Mapping[str, Any]) -> dict[str, Any] | None:
    name = _mask_name(document)
    return next((entry for entry in _core.registered_masks() if name in (entry["name"], *entry["aliases"])), None)


def _mask_name(document: Mapping[str, Any]) -> str:
    return str(document.get("mask") or "none").lower()


def _budget_keys(document: Mapping[str, Any], place: _Place) -> list[str]:
    """One key for each quantity that sets how many pairs the mask keeps: those that are given, then the others."""
    name, entry = _mask_name(document), _registered(document)
    quantities: list[list[str]] = [] if entry is None else entry["budget_keys"]
    if not quantities:
        kept = place.count(load_config(document))
        raise config_error(
            f"mask: `{name}` names no parameter that sets how many pairs it keeps; its density is {kept.density:.4%}, "
            f"its pruning ratio {kept.pruning_ratio:.4%}",
            key="mask",
        )
    kwargs = document.get("mask_kwargs") or {}
    given = {key for key, value in kwargs.items() if value is not None}
    keys = [next((key for key in names if key in given), names[0]) for names in quantities]
    return sorted(keys, key=lambda key: key not in given)


@dataclass(frozen=True)
class _Budget:
    """What the caller asks for."""

    density: float | None
    pruning_ratio: float | None
    flops: float | None
    unit: Unit | None

    def spent(self, count: _Count) -> float:
        """What of a mask's cost the budget is about."""
        return count.edges if self.pruning_ratio is None else count.patches

    def target(self, place: _Place, like: _Count) -> float:
        """Edges to keep, between patches for a pruning ratio: at least one for each query."""
        kept = self._edges(place, like)
        dense, queries = (
            (like.dense_edges, like.queries) if self.pruning_ratio is None else (like.dense_patches, like.patch_queries)
        )
        if kept < queries * (1 - 1e-12):
            name = next(name for name in ("density", "pruning_ratio", "flops") if getattr(self, name) is not None)
            raise ValueError(
                f"{name}: expected at least one key for each query, a density of {queries / dense:.4%}, got "
                f"{getattr(self, name)}, which is {kept / dense:.4%}"
            )
        return kept

    def _edges(self, place: _Place, like: _Count) -> float:
        given = {"density": self.density, "pruning_ratio": self.pruning_ratio, "flops": self.flops}
        if sum(value is not None for value in given.values()) != 1:
            raise ValueError(f"budget: give exactly one of {', '.join(given)}")
        if self.flops is None and self.unit is not None:
            raise ValueError(f"unit: expected None except with flops, got {self.unit!r}")
        if self.density is not None:
            if not 0.0 < self.density <= 1.0:
                raise ValueError(f"density: expected more than 0 and at most 1, got {self.density}")
            return self.density * like.dense_edges
        if self.pruning_ratio is not None:
            if not 0.0 <= self.pruning_ratio < 1.0:
                raise ValueError(f"pruning_ratio: expected at least 0 and less than 1, got {self.pruning_ratio}")
            return (1.0 - self.pruning_ratio) * like.dense_patches
        assert self.flops is not None
        if not 0.0 < self.flops < math.inf:
            raise ValueError(f"flops: expected a number above 0, got {self.flops}")
        for name, value in (("unit", self.unit), ("head_dim", place.head_dim), ("num_layers", place.num_layers)):
            if value is None:
                raise ValueError(f"{name}: expected a value with flops, got None")
        assert self.unit is not None
        assert place.head_dim is not None
        return self.flops / in_unit(attention_macs(1, place.head_dim), self.unit)


@dataclass(frozen=True)
class _Chosen:
    """Values that are set together."""

    values: Mapping[str, int | float]
    count: _Count
    missed: float
    """Edges between what they spend and the target."""


def _with_values(document: Mapping[str, Any], values: Mapping[str, int | float]) -> dict[str, Any]:
    return {**document, "mask_kwargs": dict(document.get("mask_kwargs") or {}) | dict(values)}


def _set_in_turn(document: Mapping[str, Any], keys: Sequence[str], place: _Place, budget: _Budget) -> _Chosen:
    """The key that alone comes closest, then of the others each that comes closer still."""
    chosen: _Chosen | None = None
    while keys:
        found = _closest_of(document, keys, place, budget)
        if chosen is None and isinstance(found, ConfigError):
            raise found
        if isinstance(found, ConfigError) or (chosen and not found.missed < chosen.missed):
            break
        values = {} if chosen is None else chosen.values
        chosen = _Chosen({**values, found.key: found.value}, found.count, found.missed)
        document = _with_values(document, chosen.values)
        keys = [key for key in keys if key != found.key]
    assert chosen is not None
    return chosen


def _closest_nearby(
    document: Mapping[str, Any], keys: Sequence[str], chosen: _Chosen, place: _Place, budget: _Budget
) -> _Chosen:
    """Set in turn, the first value takes all it can; another of it may leave what the others keep more exactly."""
    (first, value), *_ = chosen.values.items()
    others = [key for key in keys if key != first]
    for step in (sign * distance for distance in range(1, _NEAR + 1) for sign in (-1, 1)):
        if chosen.missed <= _CLOSE * budget.target(place, chosen.count):
            break
        fixed = {first: value + step}
        if value + step < 0:  # which some masks of the reference take for 0
            continue
        try:
            found = _set_in_turn(_with_values(document, fixed), others, place, budget)
        except ConfigError:  # no value of the first, or none of the others with it
            continue
        if found.missed < chosen.missed and all(found.values.values()):  # no part of the mask is dropped for it
            chosen = replace(found, values=fixed | dict(found.values))
    return chosen


def _none_alone_closer(
    document: Mapping[str, Any], keys: Sequence[str], chosen: _Chosen, place: _Place, budget: _Budget
) -> _Chosen:
    """Each of them again, with the others as they are now."""
    while True:
        found = _closest_of(_with_values(document, chosen.values), keys, place, budget)
        if isinstance(found, ConfigError) or not found.missed < chosen.missed:
            return chosen
        chosen = _Chosen({**chosen.values, found.key: found.value}, found.count, found.missed)


@dataclass(frozen=True)
class _Found:
    """The value of one parameter that comes closest."""

    key: str
    value: int | float
    count: _Count
    missed: float
    """Edges between what it spends and the target."""


def _closest_of(
    document: Mapping[str, Any], keys: Sequence[str], place: _Place, budget: _Budget
) -> _Found | ConfigError:
    """The parameter that alone comes closest, of equally close ones the cheapest; or why none can be set."""

    def tried(key: str) -> _Found | ConfigError:
        try:
            return _closest_value(document, key, place, budget)
        except ConfigError as error:  # such as a number of what the mask is given as a list
            return error

    outcomes = [tried(key) for key in keys]
    found = [outcome for outcome in outcomes if isinstance(outcome, _Found)]
    return min(found, key=lambda one: (one.missed, budget.spent(one.count))) if found else outcomes[0]


def _closest_value(document: Mapping[str, Any], key: str, place: _Place, budget: _Budget) -> _Found:
    @functools.cache
    def count(value: float) -> _Count | None:
        try:
            return place.count(with_value(value))
        except ValueError:
            return None

    def with_value(value: float) -> AttentionConfig:
        return load_config(_with_values(document, {key: value}))

    rises = _rises_with(key, document)
    # Widths go to twice the tokens; where the last head's is set, those of the others are fractions of it.
    most = place.num_tokens * (max(2, place.num_heads) if rises else 2)
    values = _values(key, most, place.num_tokens, lambda value: count(value) is not None)
    where = f"mask_kwargs.{key}"
    if values is None:
        place.count(with_value(1))  # raises what is wrong
        raise config_error(f"{where}: no value can be applied to {place.num_tokens} tokens", key=where)
    first = _known(count, values.at(0))
    target = budget.target(place, first)

    def cost(index: int) -> float | None:
        counted = count(values.at(index))
        return None if counted is None else budget.spent(counted)

    index = _closest(cost, values.count, target, rises=rises)
    if index is None:
        raise config_error(
            f"{where}: does not change how many pairs `{document.get('mask')}` keeps, a density of {first.density:.4%}",
            key=where,
        )
    closest = _known(count, values.at(index))
    return _Found(key, values.at(index), closest, abs(budget.spent(closest) - target))


@dataclass(frozen=True)
class _Values:
    """The values a parameter may take, in order: ``first + index * step``, divided by ``whole`` for a ratio."""

    first: int
    step: int
    count: int
    whole: int | None = None
    dropped: bool = False

    def at(self, index: int) -> int | float:
        number = self.first + index * self.step
        if self.whole is None:
            return number
        return 1.0 - number / self.whole if self.dropped else number / self.whole


def _values(key: str, most: int, num_tokens: int, is_valid: Callable[[float], bool]) -> _Values | None:
    """From the least value that can be applied to ``most``; those at the end may be too large."""
    if key.endswith("_ratio"):
        # As fine as pairs are. The least share is looked for from below, where masks are cheap.
        pairs = max(1, num_tokens) ** 2
        shares = _Values(1, 1, pairs, pairs, dropped=key in ("mask_ratio", "pruning_ratio"))
        enough = next((index for index in _doubling(pairs) if is_valid(shares.at(index))), None)
        if enough is None:
            return None
        first = _first(enough, lambda index: is_valid(shares.at(index)))
        return replace(shares, first=first + 1, count=pairs - first)
    start = next((value for value in range(num_tokens + 2) if is_valid(value)), None)
    if start is None:
        return None
    step = next((step for step in (1, 2) if is_valid(start + step)), 1)
    return _Values(start, step, max(most + 1 - start, 0) // step + 1)


def _doubling(count: int) -> Iterator[int]:
    """0, 1, 2, 4, ... and the last index below ``count``."""
    index = 0
    while index < count - 1:
        yield index
        index = max(1, 2 * index)
    yield count - 1


def _first(count: int, holds: Callable[[int], bool]) -> int:
    """The first index at which ``holds``, which stays true from there on; ``count`` if there is none."""
    return bisect.bisect_left(range(count), True, key=holds)


def _closest(cost: Callable[[int], float | None], count: int, target: float, *, rises: bool) -> int | None:
    """The index whose cost is closest to ``target``, or None if all costs are equal.

    Costs are None from some index on. If it is known that they rise, nothing far above the target is looked at. The
    first value stands apart from that order: it may be a 0 that means a default.
    """
    looked: dict[int, float] = {}
    candidates: Sequence[int]
    for index in _doubling(count):
        found = cost(index)
        if found is None:
            count = _first(index, lambda i: i not in looked and cost(i) is None)
            looked[count - 1] = _known(cost, count - 1)
            break
        looked[index] = found
        if rises and _rises(looked) and max(target, looked.get(1, math.inf)) <= found > looked[1]:
            break
    if not rises:
        looked |= {index: _known(cost, index) for index in (round((count - 1) * i / 16) for i in range(17))}
    if len(set(looked.values())) == 1:
        return None
    falls = {index: -found for index, found in looked.items()}
    if _rises(looked):
        candidates = [0, 1, *_around(cost, looked, target)]
    elif _rises(falls):
        candidates = [0, 1, *_around(lambda index: -_known(cost, index), falls, -target)]
    else:
        stride = -(-count // _EVERY_VALUE)
        near = min(range(0, count, stride), key=lambda index: abs(_known(cost, index) - target))
        candidates = range(max(0, near - stride + 1), min(count, near + stride)) if stride > 1 else range(count)
    return min(candidates, key=lambda i: (abs(_known(cost, i) - target), _known(cost, i), i))


def _known(of: Callable[[_Key], _Value | None], key: _Key) -> _Value:
    found = of(key)
    assert found is not None
    return found


def _rises(looked: Mapping[int, float]) -> bool:
    """Whether costs never fall, those of the first value aside."""
    costs = [looked[index] for index in sorted(looked) if index != 0]
    return all(a <= b for a, b in itertools.pairwise(costs))


def _around(cost: Callable[[int], float | None], looked: Mapping[int, float], target: float) -> Sequence[int]:
    """The first indices of the two costs around ``target``. Costs rise from index 1 on; the last has been looked at."""

    def known(index: int) -> float:
        return _known(cost, index)

    last = max(looked)
    after = _reached(known, looked, target)
    if after == 1:
        return [after]
    # Of equal costs the first; seldom are there many.
    bound, distance = known(after - 1), 1
    while (least := max(1, after - 1 - distance)) > 1 and known(least) >= bound:
        distance *= 2
    before = least + _first(after - 1 - least, lambda i: known(least + i) >= bound)
    return [before] if after > last else [after, before]


def _reached(cost: Callable[[int], float], looked: Mapping[int, float], target: float) -> int:
    """The first index from 1 on whose cost is at least ``target``, or the one after the last.

    Counting is dear where masks are large, and costs are mostly close to a straight line: two guesses are on that line,
    the third halves what is left.
    """
    below = max((i for i, found in looked.items() if i > 0 and found < target), default=0)
    reached = min((i for i, found in looked.items() if i > 0 and found >= target), default=max(looked) + 1)
    guesses = 0
    while reached - below > 1:
        guesses += 1
        guess = (below + reached) // 2
        if guesses % 3 and below > 0:
            low, high = cost(below), cost(reached)
            on_line = below + math.ceil((target - low) / (high - low) * (reached - below))
            guess = min(max(on_line, below + 1), reached - 1)
        if cost(guess) < target:
            below = guess
        else:
            reached = guess
    return reached
