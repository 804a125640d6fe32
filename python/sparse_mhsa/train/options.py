"""Tables of options: names, types, defaults, ranges and help texts of a command, each written once.

The command line is generated from such a table and checkpoints store it.
"""

import math
from dataclasses import asdict, field, fields
from typing import Any

from . import UsageError


def option(
    default: Any,  # noqa: ANN401
    about: str,
    *,
    at_least: float | None = None,
    above: float | None = None,
    below: float | None = None,
    at_most: float | None = None,
    metavar: str | None = None,
) -> Any:  # noqa: ANN401
    """A dataclass field with its help text and allowed range."""
    bounds = {"at_least": at_least, "above": above, "below": below, "at_most": at_most}
    return field(default=default, metadata={"about": about, "metavar": metavar, **bounds})


def flag_name(field_name: str) -> str:
    """``attn_cfg`` -> ``--attn-cfg``."""
    return "--" + field_name.replace("_", "-")


SEEDS = 2**63
"""Seeds are below: torch, whose own range is twice as large, is also given seeds that follow the first one."""


class Options:
    """What every table of options has in common."""

    def __post_init__(self) -> None:
        for item in fields(self):  # type: ignore[arg-type]  # subclasses are dataclasses
            _check_range(item.name, getattr(self, item.name), item.metadata)

    def is_given(self, name: str) -> bool:
        """Whether an option has another value than its default."""
        default: object = type(self).__dataclass_fields__[name].default  # type: ignore[attr-defined]
        return bool(getattr(self, name) != default)

    def as_dict(self) -> dict[str, str | int | float | None]:
        """Plain values only, so that a checkpoint that stores them loads with ``weights_only=True``."""
        values = asdict(self)  # type: ignore[call-overload]
        return {
            name: value if isinstance(value, (int, float, type(None))) else _plain(value)
            for name, value in values.items()
        }


def _plain(value: object) -> str:
    return " ".join(map(str, value)) if isinstance(value, tuple) else str(value)


def _check_range(name: str, value: object, metadata: Any) -> None:  # noqa: ANN401
    for number in value if isinstance(value, tuple) else (value,):
        if isinstance(number, (int, float)):
            _check_number(name, number, metadata)


def _check_number(name: str, value: float, metadata: Any) -> None:  # noqa: ANN401
    at_least, above, below, at_most = (metadata[name] for name in ("at_least", "above", "below", "at_most"))
    # Written so that NaN fails every comparison.
    fits = (
        (isinstance(value, int) or math.isfinite(value))  # an integer may be larger than any float
        and (at_least is None or value >= at_least)
        and (above is None or value > above)
        and (below is None or value < below)
        and (at_most is None or value <= at_most)
    )
    if not fits:
        rules = [
            f"{word} {bound}" if isinstance(bound, int) else f"{word} {bound:g}"
            for word, bound in (("at least", at_least), ("above", above), ("below", below), ("at most", at_most))
            if bound is not None
        ]
        raise UsageError(f"{flag_name(name)} must be {' and '.join(rules) or 'a finite number'}, got {value}")
