"""Masks of the user's own, valid wherever a built-in one is: YAML, composites, `sparsify`, `masks`."""

import functools
import inspect
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias, TypeVar

import numpy as np
import torch
from torch import Tensor

from . import _core
from ._core import Edges
from .converters import edges_from_csr, edges_from_dense, edges_from_function, edges_from_rows
from .flex import forget_block_masks

_Function = TypeVar("_Function", bound=Callable[..., object])
_Defined: TypeAlias = Callable[..., object]

_USER_MASKS: dict[str, dict[str, object]] = {}
_replaced = 0
_FORMS = (
    "a Mask, bool (N, N) or (H, N, N), a sparse matrix, (row_ptr, col), a list of key indices per query, "
    "or a function keep(head, row)"
)


@dataclass(frozen=True)
class MaskContext:
    """What a registered mask may know about where it is used."""

    num_tokens: int
    """Number of patches: tokens without the prefix, over which the mask speaks."""
    num_heads: int
    """H."""
    grid: tuple[int, ...] | None
    """[H, W] or [T, H, W] of the patches, where known."""
    _layer: int = field(repr=False)
    _num_layers: int | None = field(repr=False)
    _epoch: int = field(repr=False)
    _declared: frozenset[str] = field(repr=False)

    @property
    def layer(self) -> int:
        """Zero-based depth, for masks registered with ``uses_layer=True``."""
        self._require("layer")
        return self._layer

    @property
    def num_layers(self) -> int | None:
        """Number of layers where known, for masks registered with ``uses_layer=True``."""
        self._require("layer")
        return self._num_layers

    @property
    def epoch(self) -> int:
        """Training epoch, for masks registered with ``uses_epoch=True``."""
        self._require("epoch")
        return self._epoch

    def _require(self, what: str) -> None:
        if what not in self._declared:
            raise ValueError(
                f"the mask depends on the {what}, but was registered without uses_{what}=True, "
                "so that its edges would be shared"
            )


def register_mask(
    name: str,
    mask: object = None,
    *,
    about: str | None = None,
    uses_layer: bool = False,
    uses_epoch: bool = False,
    replace: bool = False,
) -> Callable[[_Function], _Function]:
    """Make a mask known under a name, in YAML and everywhere else.

    As a decorator it takes a function of a `MaskContext` and of the ``mask_kwargs``, which are checked against its
    signature::

        @sparse_mhsa.register_mask("every_other")
        def every_other(context, step=2):
            \"\"\"Query i keeps every key j with i - j a multiple of step.\"\"\"
            return lambda head, row: range(row % step, context.num_tokens, step)

        sparse_mhsa.SparseMHSA(768, 12, config={"mask": "every_other", "mask_kwargs": {"step": 3}})
        sparse_mhsa.masks.every_other(num_tokens=197, num_heads=12, num_prefix_tokens=1)

    The function speaks about patches only: prefix tokens are taken off before and become dense rows and
    columns after, as for built-in masks. It returns edges over N patches, for each head or shared by all: a
    `Mask`, a bool tensor or array (N, N) or (H, N, N), a torch or scipy sparse matrix, compressed rows
    ``(row_ptr, col)``, a list with the key indices of each query, or a function ``keep(head, row)`` that is
    asked for one query at a time (`Mask.from_function`).

    It must be pure: edges are cached by the parameters, N, heads and grid, and the layer and epoch if declared.
    A process that reads a model or graph which names the mask must register it first.

    Args:
        name: lower case, in YAML ``mask: name``.
        mask: the edges themselves, in one of the forms above, instead of a function: the mask then exists for one N.
        about: one sentence; default is the first line of the docstring.
        uses_layer: the edges change from layer to layer.
        uses_epoch: the edges change from epoch to epoch.
        replace: the name may be registered already. Modules and configurations use the new function from then on;
            a `Mask` that was made before keeps its edges.

    Returns:
        A decorator that returns the function unchanged. With ``mask`` the mask is registered at once.

    Raises:
        TypeError: the function takes no context, or parameters without a name (``*args``, ``**kwargs``).
        ValueError: the name is that of another mask, or no lower-case identifier.
    """
    if not isinstance(name, str) or not name.isidentifier() or name != name.lower():
        raise ValueError(f"name: expected a lower-case identifier, got {name!r}")
    built_in = {alias for entry in _core.registered_masks() for alias in (entry["name"], *entry["aliases"])}
    if name in built_in:
        raise ValueError(f"name: `{name}` is a built-in mask")
    if name in _USER_MASKS and not replace:
        raise ValueError(f"name: `{name}` is registered already; pass replace=True to register it again")

    def register(function: _Function) -> _Function:
        keys, required = _parameters(name, function)
        lines = (about or inspect.getdoc(function) or "registered from Python").splitlines()
        declared = frozenset(what for what, uses in (("layer", uses_layer), ("epoch", uses_epoch)) if uses)
        _core.register_mask(name, lines[0], keys, required, uses_layer, uses_epoch, _cached(name, function, declared))
        forget_block_masks()
        global _replaced
        _replaced += name in _USER_MASKS
        _USER_MASKS[name] = {"name": name, "aliases": [], "about": lines[0], "keys": keys}
        return function

    if mask is not None:
        register(lambda context: mask)
    return register


def user_masks() -> list[dict[str, object]]:
    """One mapping per registered mask, as `_core.registered_masks` has them for the built-in ones."""
    return list(_USER_MASKS.values())


def replacements() -> int:
    """How often a name has been registered again; only then may the edges of a configuration have changed."""
    return _replaced


def _parameters(name: str, function: object) -> tuple[list[str], list[str]]:
    """Names of the ``mask_kwargs``, and those without a default."""
    if not callable(function):
        raise TypeError(f"mask `{name}`: expected a function of (context, ...), got {type(function).__name__}")
    parameters = list(inspect.signature(function).parameters.values())
    positional = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    if not parameters or parameters[0].kind not in positional:
        raise TypeError(f"mask `{name}`: expected a function whose first parameter is the context")
    others = parameters[1:]
    for parameter in others:
        if parameter.kind not in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY):
            raise TypeError(
                f"mask `{name}`: expected parameters with names, so that a wrong key in mask_kwargs can be told, "
                f"got `{parameter}`"
            )
    names = [parameter.name for parameter in others]
    return names, [parameter.name for parameter in others if parameter.default is parameter.empty]


def _cached(name: str, function: _Defined, declared: frozenset[str]) -> Callable[[Mapping[str, Any], str], Edges]:
    """The function as the core calls it."""

    @functools.lru_cache(maxsize=64)
    def edges(sizes: tuple[Any, ...], kwargs: str) -> Edges:
        num_tokens, num_heads, grid, layer, num_layers, epoch = sizes
        context = MaskContext(num_tokens, num_heads, grid, layer, num_layers, epoch, declared)
        return _as_edges(function(context, **json.loads(kwargs)), num_tokens, num_heads)

    def call(context: Mapping[str, Any], kwargs: str) -> Edges:
        grid = None if context["grid"] is None else tuple(context["grid"])
        places = (context["layer"], context["num_layers"], context["epoch"])
        return edges((context["num_tokens"], context["num_heads"], grid, *places), kwargs)

    call.__name__ = call.__qualname__ = name
    return call


def _as_edges(result: object, num_tokens: int, num_heads: int) -> Edges:
    from .mask import Mask

    if isinstance(result, Mask):
        edges = result._edges
    elif isinstance(result, tuple) and len(result) == 2:
        edges = edges_from_csr(*result)
    elif callable(result):
        edges = edges_from_function(result, num_tokens, num_heads)
    elif isinstance(result, np.ndarray) or (isinstance(result, Tensor) and result.layout == torch.strided):
        edges = edges_from_dense(result)
    elif isinstance(result, Sequence) and not isinstance(result, (str, bytes)):
        edges = edges_from_rows(result)
    else:
        try:
            edges = edges_from_csr(result)
        except TypeError as error:
            raise TypeError(f"expected {_FORMS}, got {type(result).__name__}") from error
    if edges.num_tokens != num_tokens or edges.num_heads not in (1, num_heads):
        raise ValueError(
            f"expected edges of 1 or {num_heads} heads over {num_tokens} patches, "
            f"got {edges.num_heads} heads over {edges.num_tokens}"
        )
    return edges
