"""Masks as objects: which keys each query keeps, counted, converted and shown.

`Mask.from_config` takes any configuration. Besides that there is one function per registered mask, whose
keywords are those of the mask and those of `Mask.from_config`:
``masks.fibottention(num_tokens=197, num_heads=12, layer=3, shuffled=True)``.
"""

import base64
import difflib
import functools
import html
import inspect
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from . import viz
from ._core import AttentionConfig, Edges, registered_masks
from .config import ConfigLike, load_config
from .flops import Unit, attention_macs, in_unit

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["LayerMask", "Mask"]


@dataclass(frozen=True)
class LayerMask:
    """The mask of one layer for whatever number of tokens arrives: a configuration and the layer's place.

    Everything a forward pass reads is worked out once here, as plain Python values.
    """

    config: AttentionConfig
    num_heads: int
    layer: int = 0
    num_layers: int | None = None
    epoch: int = 0
    grid: tuple[int, ...] | None = None
    num_prefix_tokens: int | None = None
    spec: str = field(init=False, repr=False)
    """Canonical text of the mask: what the operators take."""
    name: str = field(init=False, repr=False)
    """Registered name of the mask."""
    scale: float | None = field(init=False, repr=False)
    """Factor of the scores, None for 1 / sqrt(head_dim)."""
    on_empty_row: str = field(init=False, repr=False)
    """``zero`` or ``error``."""

    def __post_init__(self) -> None:
        config, grid = self.config, None if self.grid is None else list(self.grid)
        for name in ("num_heads", "layer", "num_layers", "epoch", "num_prefix_tokens"):
            number = getattr(self, name)
            if number is not None and number < 0:
                raise ValueError(f"{name}: expected at least 0, got {number}")
        if grid is not None and min(grid, default=0) < 1:
            raise ValueError(f"grid: expected sides of at least 1, got {grid}")
        if config.num_heads not in (None, self.num_heads):
            raise ValueError(
                f"num_heads: the configuration is for {config.num_heads} heads, but it is used with {self.num_heads}"
            )
        derived = {
            "spec": config.spec(self.num_heads, self.layer, self.num_layers, self.epoch, grid, self.num_prefix_tokens),
            "name": config.mask,
            "scale": config.scale,
            "on_empty_row": config.on_empty_row,
        }
        for attribute, value in derived.items():
            object.__setattr__(self, attribute, value)

    @property
    def is_dense(self) -> bool:
        """Every query keeps every key."""
        return self.name == "none"

    @property
    def num_tokens(self) -> int | None:
        """N, where the grid and the prefix are known."""
        grid = self.config.grid or self.grid
        prefix = self.config.num_prefix_tokens
        prefix = self.num_prefix_tokens if prefix is None else prefix
        return None if grid is None or prefix is None else math.prod(grid) + prefix

    def at(self, num_tokens: int, head_dim: int | None = None) -> "Mask":
        """The edges for ``num_tokens`` tokens."""
        return Mask(self, num_tokens, head_dim)

    def at_epoch(self, epoch: int) -> "LayerMask":
        """The same layer in another training epoch."""
        return self if epoch == self.epoch else replace(self, epoch=epoch)


class Mask:
    """The edges of every head of one mask in one layer, for one number of tokens. Immutable.

    Memory and time grow with the segments that describe the edges, never with N x N; only `to_dense` and
    `to_csr` are larger. Masks with the same definition and number of tokens are equal and have the same hash.

    Args:
        layer_mask: definition of the mask.
        num_tokens: N, all tokens, prefix included.
        head_dim: default of `flops`.

    Raises:
        ConfigError: the mask does not exist for ``num_tokens``.
    """

    __slots__ = ("_edges", "_head_dim", "_layer_mask", "_num_tokens")

    def __init__(self, layer_mask: LayerMask, num_tokens: int, head_dim: int | None = None) -> None:
        if num_tokens < 0:
            raise ValueError(f"num_tokens: expected at least 0, got {num_tokens}")
        self._layer_mask = layer_mask
        self._num_tokens = num_tokens
        self._head_dim = head_dim
        self._edges = Edges.from_spec(layer_mask.spec, num_tokens)

    @classmethod
    def from_config(
        cls,
        config: ConfigLike,
        num_tokens: int,
        num_heads: int,
        layer: int = 0,
        num_layers: int | None = None,
        epoch: int = 0,
        head_dim: int | None = None,
        grid: Sequence[int] | None = None,
        num_prefix_tokens: int | None = None,
    ) -> "Mask":
        """The mask that a configuration describes.

        Args:
            config: whatever `load_config` takes.
            num_tokens: N, all tokens.
            num_heads: H.
            layer: zero-based depth, for masks that depend on it.
            num_layers: number of layers, for masks that depend on it.
            epoch: training epoch, for masks that change with it.
            head_dim: default of `flops`.
            grid: [H, W] or [T, H, W] of the tokens after the prefix; the configuration's own value wins.
            num_prefix_tokens: leading tokens off the grid; the configuration's own value wins.

        Returns:
            The mask.

        Raises:
            ConfigError: the configuration cannot be honoured, or not for these sizes.
        """
        sides = None if grid is None else tuple(grid)
        layer_mask = LayerMask(load_config(config), num_heads, layer, num_layers, epoch, sides, num_prefix_tokens)
        return cls(layer_mask, num_tokens, head_dim)

    @property
    def layer_mask(self) -> LayerMask:
        """The definition, without a number of tokens."""
        return self._layer_mask

    @property
    def config(self) -> AttentionConfig:
        """The configuration the mask was made from."""
        return self._layer_mask.config

    @property
    def spec(self) -> str:
        """Canonical text of the mask: what the operators take."""
        return self._layer_mask.spec

    @property
    def num_tokens(self) -> int:
        """N, all tokens."""
        return self._num_tokens

    @property
    def num_heads(self) -> int:
        """H."""
        return self._layer_mask.num_heads

    @property
    def num_prefix_tokens(self) -> int:
        """Leading tokens off the patch grid, as the mask resolved them."""
        return self._edges.num_prefix_tokens

    @property
    def head_dim(self) -> int | None:
        """Head dimension that `flops` uses by default."""
        return self._head_dim

    @property
    def nnz_per_head(self) -> list[int]:
        """Edges kept by each head, over the whole N x N matrix."""
        return self._edges.nnz()

    @property
    def nnz(self) -> int:
        """Edges kept, over all heads."""
        return sum(self.nnz_per_head)

    @property
    def nnz_patches(self) -> int:
        """Edges kept whose query and key are both patches, over all heads."""
        return sum(self._edges.nnz_patches())

    @property
    def density(self) -> float:
        """Share of the H x N x N entries that is kept."""
        return self.nnz / max(1, self.num_heads * self.num_tokens**2)

    @property
    def pruning_ratio(self) -> float:
        """1 - density over the patch-to-patch entries, as published tables have it; 0 without patches."""
        patches = self.num_tokens - self.num_prefix_tokens
        return 1.0 - self.nnz_patches / (self.num_heads * patches**2) if patches > 0 else 0.0

    def to_dense(self) -> Tensor:
        """(H, N, N) bool, True = keep."""
        return torch.from_numpy(self._edges.to_dense())

    def to_csr(self) -> tuple[Tensor, Tensor]:
        """Edges as the operator ``forward_edges`` takes them.

        Returns:
            ``row_ptr`` (H, N + 1) int64 with absolute offsets into ``col`` (nnz,) int64, columns ascending
            within a row.
        """
        pointers, columns, before = [], [], 0
        for head in range(self.num_heads):
            row_ptr, col = self._edges.to_csr(head)
            pointers.append(row_ptr + before)
            columns.append(col)
            before += len(col)
        return torch.from_numpy(np.stack(pointers)), torch.from_numpy(np.concatenate(columns))

    def degrees(self, head: int) -> Tensor:
        """(N,) int64: keys kept by each query of a head."""
        return torch.from_numpy(self._edges.degrees(head))

    def density_image(self, head: int, size: int = 512) -> NDArray[np.float32]:
        """(s, s) share of kept entries in each cell of a head's mask, s = min(size, N), in O(edges)."""
        return self._edges.density_image(head, size)

    def flops(self, head_dim: int | None = None, unit: Unit = "GMACs") -> float:
        """Cost of attention over this mask for one sample: 2 * nnz * head_dim multiply-accumulates.

        Args:
            head_dim: D; default is the one the mask was made with.
            unit: a multiply-accumulate counts as one in GMACs and as two in GFLOPs.

        Returns:
            The cost in billions.

        Raises:
            ValueError: no head dimension is known, or ``unit`` is neither.
        """
        head_dim = self._head_dim if head_dim is None else head_dim
        if head_dim is None:
            raise ValueError("head_dim: expected a number, because the mask was made without one; got None")
        return in_unit(attention_macs(self.nnz, head_dim), unit)

    def plot(self, heads: Sequence[int] | None = None, ax: "Axes | None" = None, size: int = 512) -> "list[Axes]":
        """Draw the mask with matplotlib; see `sparse_mhsa.viz.plot`."""
        return viz.plot(self, heads=heads, ax=ax, size=size)

    def __repr__(self) -> str:
        return (
            f"Mask({self.config.mask}, num_tokens={self.num_tokens}, num_heads={self.num_heads}, "
            f"nnz={self.nnz}, density={self.density:.4f}, pruning_ratio={self.pruning_ratio:.4f})"
        )

    def _repr_png_(self) -> bytes:
        return viz.png(self)

    def _repr_html_(self) -> str:
        per_head = self.nnz_per_head
        rows = {
            "mask": self.config.mask,
            "tokens": f"{self.num_tokens} ({self.num_prefix_tokens} prefix)",
            "heads": str(self.num_heads),
            "edges": f"{self.nnz} ({min(per_head)} to {max(per_head)} per head)",
            "density": f"{self.density:.2%}",
            "pruning ratio (patches)": f"{self.pruning_ratio:.2%}",
        }
        if self._head_dim is not None:
            rows["attention"] = f"{self.flops():.4g} GMACs, {self.flops(unit='GFLOPs'):.4g} GFLOPs"
        cells = "".join(f"<tr><th>{html.escape(k)}</th><td>{html.escape(v)}</td></tr>" for k, v in rows.items())
        picture = base64.b64encode(viz.png(self)).decode("ascii")
        return f'<table>{cells}</table><img alt="mask of each head" src="data:image/png;base64,{picture}">'

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Mask):
            return NotImplemented
        return (self.spec, self.num_tokens) == (other.spec, other.num_tokens)

    def __hash__(self) -> int:
        return hash((self.spec, self.num_tokens))

    def __reduce__(self) -> "tuple[type[Mask], tuple[LayerMask, int, int | None]]":
        return Mask, (self._layer_mask, self._num_tokens, self._head_dim)


@functools.cache
def _factories() -> dict[str, Callable[..., Mask]]:
    return {name: _factory(entry) for entry in registered_masks() for name in (entry["name"], *entry["aliases"])}


def _factory(entry: dict[str, object]) -> Callable[..., Mask]:
    name, keys = str(entry["name"]), list(entry["keys"])  # type: ignore[call-overload]
    sizes = [key for key in inspect.signature(Mask.from_config).parameters if key != "config"]

    def make(**kwargs: object) -> Mask:
        for key in kwargs:
            if key not in sizes and key not in keys:
                close = difflib.get_close_matches(key, [*sizes, *keys], n=1)
                hint = f", did you mean `{close[0]}`?" if close else ""
                raise TypeError(f"masks.{name}: unknown keyword `{key}`{hint} Allowed: {', '.join([*keys, *sizes])}")
        mask_kwargs = {key: value for key, value in kwargs.items() if key not in sizes}
        shape = {key: value for key, value in kwargs.items() if key in sizes}
        return Mask.from_config({"mask": name, "mask_kwargs": mask_kwargs}, **shape)  # type: ignore[arg-type]

    make.__name__ = make.__qualname__ = name
    make.__doc__ = (
        f"{entry['about']}\n\nArgs:\n    **kwargs: of the mask: {', '.join(keys) or 'none'}; "
        f"of `Mask.from_config`: {', '.join(sizes)}.\n\nReturns:\n    The mask."
    )
    return make


def __getattr__(name: str) -> Callable[..., Mask]:
    factory = None if name.startswith("_") else _factories().get(name)
    if factory is None:
        close = difflib.get_close_matches(name, _factories(), n=1)
        hint = f"; did you mean `{close[0]}`?" if close else ""
        raise AttributeError(f"module {__name__!r} has no mask {name!r}{hint}")
    return factory


def __dir__() -> list[str]:
    return sorted([*__all__, *_factories()])
