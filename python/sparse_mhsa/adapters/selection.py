"""Which attention layers of a model are meant: regular expressions on their names."""

import difflib
import logging
import re
from collections.abc import Sequence
from dataclasses import dataclass

from .registry import Site

_LOGGER = logging.getLogger("sparse_mhsa")
_MOST_NAMES = 12
"""How many names a message lists."""


@dataclass(frozen=True)
class Selection:
    """The ``include`` and ``exclude`` of `sparsify`; without ``include`` all that is sparse by design is meant."""

    include: tuple[re.Pattern[str], ...] | None
    exclude: tuple[re.Pattern[str], ...]

    @classmethod
    def of(cls, include: str | Sequence[str] | None, exclude: str | Sequence[str] | None) -> "Selection":
        """Compile both.

        Raises:
            TypeError: one is no text and no sequence of texts.
            ValueError: one is no regular expression.
        """
        return cls(None if include is None else _patterns("include", include), _patterns("exclude", exclude or ()))

    def why_not(self, site: Site) -> str | None:
        """Why a layer is not selected, or None if it is."""
        if any(pattern.search(site.name) for pattern in self.exclude):
            return "excluded"
        if self.include is not None:
            return None if any(pattern.search(site.name) for pattern in self.include) else "not included"
        return site.dense_by_design

    def refuse_idle(self, names: Sequence[str]) -> None:
        """Raise a ValueError if a pattern of ``include`` matches no name; one of ``exclude`` is only logged."""
        for pattern in self.include or ():
            if not any(pattern.search(name) for name in names):
                raise ValueError(f"include: {matches_none(pattern.pattern, names)}")
        for pattern in self.exclude:
            if not any(pattern.search(name) for name in names):
                _LOGGER.warning("exclude: %s", matches_none(pattern.pattern, names))


def matches_none(pattern: str, names: Sequence[str]) -> str:
    """The end of a message: a pattern matches nothing, these names look like it, and those exist."""
    near = difflib.get_close_matches(pattern, names, n=3)
    hint = f"; did you mean {' or '.join(f'`{name}`' for name in near)}?" if near else ""
    listed = [f"`{name or '(root)'}`" for name in names[:_MOST_NAMES]]
    rest = f" and {len(names) - _MOST_NAMES} more" if len(names) > _MOST_NAMES else ""
    return f"`{pattern}` matches none of the attention layers {', '.join(listed) or '(there are none)'}{rest}{hint}"


def _patterns(argument: str, patterns: str | Sequence[str]) -> tuple[re.Pattern[str], ...]:
    texts = [patterns] if isinstance(patterns, str) else patterns
    if not isinstance(texts, Sequence) or not all(isinstance(text, str) for text in texts):
        raise TypeError(
            f"{argument}: expected a regular expression or a sequence of them, as text, got {patterns!r:.60}"
        )
    return tuple(_pattern(argument, text) for text in texts)


def _pattern(argument: str, pattern: str) -> re.Pattern[str]:
    try:
        return re.compile(pattern)
    except re.error as error:
        raise ValueError(f"{argument}: `{pattern}` is not a regular expression: {error}") from error
