"""Masks by name: one function per registered mask.

Its keywords are those of the mask, ``token_order``, and those of `Mask.from_config`, which takes any configuration:
``masks.fibottention(num_tokens=197, num_heads=12, layer=3, shuffled=True)``.
"""

import difflib
import inspect
from collections.abc import Callable

from ._core import registered_masks
from .catalogue import registered_from
from .layer_mask import LayerMask
from .mask import Mask
from .register import user_masks

__all__ = ["LayerMask", "Mask"]

_OF_DOCUMENT = ("token_order",)
"""Keywords that are keys of a configuration beside ``mask_kwargs``: how to read a grid belongs to the grid."""


def _factories() -> dict[str, Callable[..., Mask]]:
    return {
        name: _factory(entry)
        for entry in [*registered_masks(), *user_masks()]
        for name in (entry["name"], *entry["aliases"])
    }


def _factory(entry: dict[str, object]) -> Callable[..., Mask]:
    name, keys = str(entry["name"]), list(entry["keys"])  # type: ignore[call-overload]
    sizes = [key for key in inspect.signature(Mask.from_config).parameters if key != "config"]

    # The grid is a parameter of some masks too, where it means the same.
    allowed = list(dict.fromkeys([*keys, *sizes, *_OF_DOCUMENT]))

    def make(**kwargs: object) -> Mask:
        for key in kwargs:
            if key not in allowed:
                close = difflib.get_close_matches(key, allowed, n=1)
                hint = f", did you mean `{close[0]}`?" if close else "."
                raise TypeError(f"masks.{name}: unknown keyword `{key}`{hint} Allowed: {', '.join(allowed)}")
        mask_kwargs = {key: value for key, value in kwargs.items() if key not in (*sizes, *_OF_DOCUMENT)}
        document = {key: value for key, value in kwargs.items() if key in _OF_DOCUMENT}
        shape = {key: value for key, value in kwargs.items() if key in sizes}
        config = {"mask": name, "mask_kwargs": mask_kwargs, **document}
        return Mask.from_config(config, **shape)  # type: ignore[arg-type]

    make.__name__ = make.__qualname__ = name
    make.__doc__ = _docstring(entry, keys, sizes)
    return make


def _docstring(entry: dict[str, object], keys: list[str], sizes: list[str]) -> str:
    definition, arguments = "", [f"    {key}: of the mask." for key in keys]
    if "schema" in entry:
        mask = registered_from(entry)
        definition, arguments = f"{mask.definition}\n\n", []
        for key in mask.parameters:
            default = "Required." if key.required else f"Default: {key.default}." if key.default else ""
            arguments.append(f"    {key.name}: {key.about} {default}".rstrip())
    about = str(entry["about"])
    return "\n".join(
        [
            f"{about[:1].upper()}{about[1:]}.\n\n{definition}Args:",
            *arguments,
            f"    {', '.join(sizes)}: as `Mask.from_config` takes them.",
            "    token_order: ``row_major`` or ``t_fastest``, as in a configuration; for masks that look at the grid.",
            "\nReturns:\n    The mask.",
            "\nRaises:",
            "    ConfigError: a value is out of range, or cannot be applied to so many tokens or heads.",
            "    TypeError: there is no such keyword.",
        ]
    )


def __getattr__(name: str) -> Callable[..., Mask]:
    factory = None if name.startswith("_") else _factories().get(name)
    if factory is None:
        close = difflib.get_close_matches(name, _factories(), n=1)
        hint = f"; did you mean `{close[0]}`?" if close else ""
        raise AttributeError(f"module {__name__!r} has no mask {name!r}{hint}")
    return factory


def __dir__() -> list[str]:
    return sorted([*__all__, *_factories()])
