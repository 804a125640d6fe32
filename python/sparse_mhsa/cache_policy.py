"""What a cache of keys and values forgets when it is full."""

import operator
from collections.abc import Mapping
from dataclasses import MISSING, dataclass
from difflib import get_close_matches
from typing import Literal, cast, get_args

Worth = Literal["recency", "attention", "low_norm", "high_norm"]
PolicyName = Literal["full", "sliding_window", "attention_sinks", "score_based", "combined", "norm_based"]

POLICIES: Mapping[PolicyName, Mapping[str, object]] = {
    "full": {},
    "sliding_window": {"capacity": None},
    # Xiao et al. found that a handful of first tokens is enough.
    "attention_sinks": {"capacity": None, "sinks": 4},
    "score_based": {"capacity": None},
    "combined": {"capacity": None, "recent": MISSING, "sinks": 0},
    "norm_based": {"capacity": None, "recent": 0, "sinks": 0, "keep": "low"},
}
"""The keys that each policy takes, with their defaults; `MISSING` where there is none."""


@dataclass(frozen=True)
class CachePolicy:
    """Which entries a cache keeps once a head holds more than ``capacity`` of them.

    Tokens join one after the other, and every policy is the same rule: the entry worth least has to go, but never one
    of the first ``sinks`` tokens of a sequence nor of the last ``recent``. Of equal worth the earlier token stays.

    ``full``
        all tokens. Source: decoding as in Vaswani et al., 2017 (arXiv 1706.03762), with what is computed kept.
    ``sliding_window``
        the last ``capacity`` tokens. Source: the rolling buffer of Mistral 7B, Jiang et al., 2023 (arXiv 2310.06825).
    ``attention_sinks``
        the first ``sinks`` tokens and the last ``capacity - sinks``. Source: StreamingLLM, Xiao et al., 2023
        (arXiv 2309.17453).
    ``score_based``
        the ``capacity`` tokens that received the largest sum of softmax weights since they came, over all queries
        and all heads of q that share the head. Source: the heavy hitters of H2O, Zhang et al., 2023
        (arXiv 2306.14048), without its recent tokens.
    ``combined``
        the last ``recent`` tokens and, of the others, those of the largest sum of weights. Source: H2O as published,
        Zhang et al., 2023 (arXiv 2306.14048).
    ``norm_based``
        the tokens whose keys have the smallest norm (``keep="low"``) or the largest (``keep="high"``). Source: Devoto
        et al., 2024 (arXiv 2406.11430), who keep the smallest.

    When room is made: by age, before the new token attends, so that a query sees ``capacity`` keys, its own among
    them; by anything else, after it, because a token must be attended to before it can be judged. The query of a
    full cache then sees ``capacity + 1`` keys, and the token itself may be the one to go.

    Args:
        name: one of the above.
        capacity: most entries of a head, at least 1; None where the cache says so (`KVCache`).
        recent: last tokens that are never forgotten, at least 0. ``combined`` needs it.
        sinks: first tokens that are never forgotten; 4 for ``attention_sinks``, else 0.
        keep: ``low`` or ``high``, for ``norm_based``; default ``low``.

    Raises:
        TypeError: a number is not whole.
        ValueError: a name is unknown, a policy does not take a key, or a number is out of range.
    """

    name: PolicyName
    capacity: int | None = None
    recent: int | None = None
    sinks: int | None = None
    keep: Literal["low", "high"] | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.name, str) or self.name not in POLICIES:
            close = get_close_matches(str(self.name), POLICIES, n=1)
            hint = f"did you mean `{close[0]}`? " if close else ""
            raise ValueError(f"policy: unknown name {self.name!r}; {hint}allowed: {', '.join(get_args(PolicyName))}")
        takes = POLICIES[self.name]
        for key in ("capacity", "recent", "sinks", "keep"):
            if getattr(self, key) is not None and key not in takes:
                allowed = ", ".join(takes) or "no keys"
                raise ValueError(
                    f"{key}: the policy `{self.name}` does not take it, got {getattr(self, key)!r}; it takes {allowed}"
                )
        for key, least in (("capacity", 1), ("recent", 0), ("sinks", 0)):
            if getattr(self, key) is not None:
                object.__setattr__(self, key, whole_number(getattr(self, key), key, least))
        if self.recent is None and takes.get("recent") is MISSING:
            raise ValueError(
                f"recent: the policy `{self.name}` needs it: how many of the last tokens are never forgotten"
            )
        if self.keep not in (None, "low", "high"):
            raise ValueError(f"keep: expected 'low' or 'high', got {self.keep!r}")
        if self.capacity is not None:
            self.check_capacity(self.capacity, "capacity")

    @property
    def worth(self) -> Worth:
        """What makes an entry worth keeping."""
        if self.name == "norm_based":
            return "high_norm" if self._value("keep") == "high" else "low_norm"
        return "attention" if self.name in ("score_based", "combined") else "recency"

    @property
    def rule(self) -> str:
        """The policy without its capacity, as text: caches of equal rules may go on from each other's states."""
        keys = ", ".join(f"{key}={self._value(key)}" for key in POLICIES[self.name] if key != "capacity")
        return f"{self.name}({keys})"

    @property
    def safe_first(self) -> int:
        """The first tokens that are never forgotten."""
        return cast(int, self._value("sinks")) or 0

    @property
    def safe_last(self) -> int:
        """The last tokens that are never forgotten."""
        return cast(int, self._value("recent")) or 0

    def _value(self, key: str) -> object:
        """What was given for ``key``, else its default; None where the policy does not take it."""
        given: object = getattr(self, key)
        return POLICIES[self.name].get(key) if given is None else given

    @property
    def least_capacity(self) -> int:
        """The smallest capacity that holds what is never forgotten, and by age the newest token too."""
        return max(1, self.safe_first + max(self.safe_last, int(self.worth == "recency")))

    def check_capacity(self, capacity: int, where: str) -> None:
        """Raise a ValueError unless ``capacity`` is enough for what is never forgotten."""
        if capacity < self.least_capacity:
            raise ValueError(
                f"{where}: the policy `{self.name}` with {self.safe_first} sinks and {self.safe_last} recent tokens "
                f"needs at least {self.least_capacity}, got {capacity}"
            )


def whole_number(value: object, name: str, least: int) -> int:
    """``value`` as an int.

    Raises:
        TypeError: it is not a whole number.
        ValueError: it is below ``least``.
    """
    try:
        number = operator.index(value)  # type: ignore[arg-type]
    except TypeError:
        raise TypeError(f"{name}: expected a whole number, got {value!r}") from None
    if isinstance(value, bool):
        raise TypeError(f"{name}: expected a whole number, got {value!r}")
    if number < least:
        raise ValueError(f"{name}: expected at least {least}, got {number}")
    return number


def check_policy(policy: object) -> None:
    """Raise a TypeError for what is no `CachePolicy`, the name of one for instance."""
    if not isinstance(policy, CachePolicy):
        raise TypeError(f"policy: expected a CachePolicy, got {type(policy).__name__}")
