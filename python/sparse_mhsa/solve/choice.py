"""Which parameters of a mask are set to meet a budget, and how those that are set together are."""

import contextlib
import functools
import itertools
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from .. import _core
from .._core import AttentionConfig, ConfigError
from ..config import ConfigLike, config_error, load_config
from .axes import closest_by_axis
from .cost import Budget, Count, Place
from .search import closest, known, values_of

Value = int | float | list[int]

_NEAR = 8
"""Values on either side of the first parameter's that are tried with the other parameters set anew."""
_EVERY_COMBINATION = 2**12
"""So many combinations of values are all tried: those of two parameters at up to 63 tokens."""
_LINES = 26**2
"""With so many combinations of the others one parameter is set anew: of three parameters at up to 25 tokens."""
_CLOSE = 2.5e-3
"""Share of a budget by which it may be missed before values nearby are tried."""


@dataclass(frozen=True)
class Chosen:
    """Values that are set together."""

    values: Mapping[str, Value]
    count: Count
    missed: float
    """Edges between what they spend and the target."""


def choose(document: Mapping[str, Any], parameter: str | None, place: Place, budget: Budget) -> Chosen:
    """The values that meet a budget as closely as the mask of a configuration can.

    Args:
        document: the keys of the configuration; those that are searched may be missing.
        parameter: the only key of ``mask_kwargs`` that may be set; None for those that the mask names.
        place: where the mask is used.
        budget: what it may keep.

    Raises:
        ConfigError: the configuration cannot be honoured, or the mask has no such parameter.
        ValueError: no mask could meet the budget.
    """
    keys = [parameter] if parameter is not None else _budget_keys(document, place)
    _refuse_schedules(document, keys)
    if len(keys) == 1:
        try:
            return _number_or_list(document, keys[0], place, budget)
        except ConfigError as error:
            if parameter is None:
                _refuse_fixed(document, place, error)
            raise
    chosen = _set_in_turn(document, keys, place, budget)
    while True:
        closer = _closest_nearby(document, keys, chosen, place, budget)
        closer = _none_alone_closer(document, keys, closer, place, budget)
        if not closer.missed < chosen.missed:
            return _closest_of_all(document, keys, closer, place, budget)
        chosen = closer


def _refuse_schedules(document: Mapping[str, Any], keys: Sequence[str]) -> None:
    """Raise where a schedule sets by epoch what would be set once."""
    kwargs = document.get("mask_kwargs") or {}
    for key in keys:
        schedule = f"{key}_schedule"
        if kwargs.get(schedule) is not None:
            where = f"mask_kwargs.{schedule}"
            raise config_error(f"{where}: sets `{key}`; leave it out to let a budget set `{key}`", key=where)


def _refuse_fixed(document: Mapping[str, Any], place: Place, error: ConfigError) -> None:
    """Raise where nothing is wrong with a mask, but other keys of it say already what its parameter would."""
    try:
        kept = place.count(load_config(document))
    except ValueError:  # not complete without the parameter, or wrong whatever that is
        return
    raise config_error(
        f"mask: `{_mask_name(document)}` as it is configured leaves nothing to set ({error}); its density is "
        f"{kept.density:.4%}, its pruning ratio {kept.pruning_ratio:.4%}",
        key="mask",
    ) from None


def document_of(config: ConfigLike) -> dict[str, Any]:
    """The keys of a configuration; a mapping may be incomplete."""
    if isinstance(config, Mapping):
        inner = config.get("attention", config)
        # A backend alone may stand for a mask, which the configuration names once it is read.
        if isinstance(inner, Mapping) and isinstance(inner.get("mask_kwargs"), Mapping | None):
            named: dict[str, Any] = dict(inner)
            if named.get("mask") is not None or named.get("backend") is None:
                return named
    document: dict[str, Any] = json.loads(load_config(config).to_json())
    return document


def _rises_with(key: str, document: Mapping[str, Any]) -> bool:
    """Whether more of ``key`` is known never to mean fewer pairs."""
    entry = _registered(document)
    return entry is not None and key in itertools.chain(*entry["budget_keys"]) and key not in entry["budget_unordered"]


def _registered(document: Mapping[str, Any]) -> dict[str, Any] | None:
    name = _mask_name(document)
    return next((entry for entry in _core.registered_masks() if name in (entry["name"], *entry["aliases"])), None)


def _mask_name(document: Mapping[str, Any]) -> str:
    return str(document.get("mask") or "none").lower()


def _budget_keys(document: Mapping[str, Any], place: Place) -> list[str]:
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


def with_values(document: Mapping[str, Any], values: Mapping[str, Value]) -> dict[str, Any]:
    """The document with other ``mask_kwargs``."""
    return {**document, "mask_kwargs": dict(document.get("mask_kwargs") or {}) | dict(values)}


def _set_in_turn(document: Mapping[str, Any], keys: Sequence[str], place: Place, budget: Budget) -> Chosen:
    """The key that alone comes closest, then of the others each that comes closer still."""
    chosen: Chosen | None = None
    while keys:
        found = _closest_of(document, keys, place, budget)
        if chosen is None and isinstance(found, ConfigError):
            raise found
        if isinstance(found, ConfigError) or (chosen and not found.missed < chosen.missed):
            break
        values = {} if chosen is None else chosen.values
        chosen = Chosen({**values, found.key: found.value}, found.count, found.missed)
        document = with_values(document, chosen.values)
        keys = [key for key in keys if key != found.key]
    assert chosen is not None
    return chosen


def _closest_nearby(
    document: Mapping[str, Any], keys: Sequence[str], chosen: Chosen, place: Place, budget: Budget
) -> Chosen:
    """Set in turn, the first value takes all it can; another of it may leave what the others keep more exactly."""
    (first, value), *_ = chosen.values.items()
    assert not isinstance(value, list)
    others = [key for key in keys if key != first]
    for step in (sign * distance for distance in range(1, _NEAR + 1) for sign in (-1, 1)):
        if chosen.missed <= _CLOSE * budget.target(place, chosen.count):
            break
        fixed = {first: value + step}
        if value + step < 0:  # which some masks of the reference take for 0
            continue
        try:
            found = _set_in_turn(with_values(document, fixed), others, place, budget)
        except ConfigError:  # no value of the first, or none of the others with it
            continue
        if found.missed < chosen.missed:
            chosen = replace(found, values=fixed | dict(found.values))
    return chosen


def _none_alone_closer(
    document: Mapping[str, Any], keys: Sequence[str], chosen: Chosen, place: Place, budget: Budget
) -> Chosen:
    """Each of them again, with the others as they are now."""
    while True:
        found = _closest_of(with_values(document, chosen.values), keys, place, budget)
        if isinstance(found, ConfigError) or not found.missed < chosen.missed:
            return chosen
        chosen = Chosen({**chosen.values, found.key: found.value}, found.count, found.missed)


def _closest_of_all(
    document: Mapping[str, Any], keys: Sequence[str], chosen: Chosen, place: Place, budget: Budget
) -> Chosen:
    """All values with each other, or one key anew with all values of the others, where they are few enough."""
    numbers = range(place.num_tokens + 1)
    least = with_values(document, dict.fromkeys(keys, 1))
    keys = [key for key in keys if _changes(least, key, place)]
    if not keys or not chosen.missed or any(key.endswith("_ratio") for key in keys):
        return chosen
    while len(keys) > 2 and len(numbers) ** (len(keys) - 1) > _LINES:
        keys = keys[:-1]  # the least usual one stays as it is
    if len(numbers) ** len(keys) <= _EVERY_COMBINATION:
        return _closest_combination(document, keys, chosen, place, budget)
    *others, last = sorted(keys, key=lambda key: _rises_with(key, document))
    if chosen.missed <= _CLOSE * budget.target(place, chosen.count) or len(numbers) ** len(others) > _LINES:
        return chosen
    for combination in itertools.product(numbers, repeat=len(others)):
        values = dict(chosen.values) | dict(zip(others, combination, strict=True))
        found = _closest_of(with_values(document, values), [last], place, budget)
        if isinstance(found, _Found) and found.missed < chosen.missed:
            chosen = Chosen(values | {last: found.value}, found.count, found.missed)
    return chosen


def _closest_combination(
    document: Mapping[str, Any], keys: Sequence[str], chosen: Chosen, place: Place, budget: Budget
) -> Chosen:
    """All values with each other."""
    numbers = range(place.num_tokens + 1)
    for combination in itertools.product(numbers, repeat=len(keys)):
        values = dict(chosen.values) | dict(zip(keys, combination, strict=True))
        try:
            count = place.count(load_config(with_values(document, values)))
        except ValueError:
            continue
        missed = abs(budget.spent(count) - budget.target(place, count))
        if missed < chosen.missed:
            chosen = Chosen(values, count, missed)
    return chosen


def _changes(document: Mapping[str, Any], key: str, place: Place) -> bool:
    """Whether a key says anything about what is kept: the summaries of ``sparse`` do so in one of its patterns only."""
    counts = set()
    for value in (0, 1, 2, 3, place.num_tokens // 2):
        with contextlib.suppress(ValueError):
            counts.add(place.count(load_config(with_values(document, {key: value}))))
    return len(counts) > 1


@dataclass(frozen=True)
class _Found:
    """The value of one parameter that comes closest."""

    key: str
    value: int | float
    count: Count
    missed: float
    """Edges between what it spends and the target."""


def _closest_of(document: Mapping[str, Any], keys: Sequence[str], place: Place, budget: Budget) -> _Found | ConfigError:
    """The parameter that alone comes closest, of equally close ones the cheapest; or why none can be set."""

    def tried(key: str) -> _Found | ConfigError:
        try:
            return _closest_value(document, key, place, budget)
        except ConfigError as error:  # such as a number of what the mask is given as a list
            return error

    outcomes = [tried(key) for key in keys]
    found = [outcome for outcome in outcomes if isinstance(outcome, _Found)]
    return min(found, key=lambda one: (one.missed, budget.spent(one.count))) if found else outcomes[0]


def _closest_value(document: Mapping[str, Any], key: str, place: Place, budget: Budget) -> _Found:
    @functools.cache
    def count(value: float) -> Count | None:
        try:
            return place.count(with_value(value))
        except ValueError:
            return None

    def with_value(value: float) -> AttentionConfig:
        return load_config(with_values(document, {key: value}))

    rises = _rises_with(key, document)
    # Widths go to twice the tokens; where the last head's is set, those of the others are fractions of it.
    most = place.num_tokens * (max(2, place.num_heads) if rises else 2)
    heads = place.num_heads * (place.num_layers or 1)
    values = values_of(key, most, place.num_tokens, heads, lambda value: count(value) is not None)
    where = f"mask_kwargs.{key}"
    if values is None:
        # Raises what is wrong; a key that has no meaning here may be 0, and then something else is.
        for number in (1, 0):
            try:
                place.count(with_value(number))
            except ConfigError as error:  # noqa: PERF203
                if number == 0 or error.key != where:  # type: ignore[attr-defined]
                    raise
        raise config_error(f"{where}: no value can be applied to {place.num_tokens} tokens", key=where)
    first = known(count, values.at(0))
    target = budget.target(place, first)

    def cost(index: int) -> float | None:
        counted = count(values.at(index))
        return None if counted is None else budget.spent(counted)

    value = values.at(closest(cost, values.count, target, rises=rises))
    counted = known(count, value)
    return _Found(key, value, counted, abs(budget.spent(counted) - target))


def _number_or_list(document: Mapping[str, Any], key: str, place: Place, budget: Budget) -> Chosen:
    """The number that comes closest, or a list with one for each axis of the grid where that comes closer."""
    found = _closest_of(document, [key], place, budget)
    number = None if isinstance(found, ConfigError) else Chosen({key: found.value}, found.count, found.missed)
    values = _closest_list(document, key, place, budget) if number is None or number.missed else None
    if values is not None:
        count = place.count(load_config(with_values(document, {key: values})))
        missed = abs(budget.spent(count) - budget.target(place, count))
        if number is None or missed < number.missed:
            return Chosen({key: values}, count, missed)
    if number is None:
        assert isinstance(found, ConfigError)
        raise found
    return number


def _closest_list(document: Mapping[str, Any], key: str, place: Place, budget: Budget) -> list[int] | None:
    entry = _registered(document)
    if entry is None or "grid" not in entry["keys"]:
        return None

    def count(value: int | list[int]) -> Count | None:
        try:
            return place.count(load_config(with_values(document, {key: value})))
        except ValueError:
            return None

    grid = document.get("grid") or (document.get("mask_kwargs") or {}).get("grid") or place.grid
    if not isinstance(grid, Sequence) or not all(isinstance(side, int) for side in grid):
        return None  # the configuration is refused, and says so
    return closest_by_axis(count, grid, budget.spent, lambda found: budget.target(place, found))
