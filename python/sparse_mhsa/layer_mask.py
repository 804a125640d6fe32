"""The mask of one layer, before anybody knows how many tokens there will be."""

import functools
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

import torch

from ._core import AttentionConfig, ConfigError, Edges, registered_masks, selection_room
from .config import config_error, integer, integers
from .edges import EdgeSource

if TYPE_CHECKING:
    from .mask import Mask


MAX_CELLS = 2**32 - 1
"""The most cells that a patch grid may have."""
_MOST_TRIED = 2**16


@dataclass(frozen=True)
class LayerMask:
    """The mask of one layer for whatever number of tokens arrives: a configuration and the layer's place.

    Everything a forward pass reads is worked out once here, as plain Python values. A configuration that
    leaves the seed of a random mask open gets one here, from torch's default generator.
    """

    config: AttentionConfig
    num_heads: int
    layer: int = 0
    num_layers: int | None = None
    epoch: int = 0
    grid: tuple[int, ...] | None = None
    num_prefix_tokens: int | None = None
    head_dim: int | None = field(default=None, compare=False)
    """Channels of a head, for masks that fit a budget of operations."""
    spec: str = field(init=False, repr=False)
    """Canonical text of the mask: what the operators take."""
    name: str = field(init=False, repr=False)
    """Registered name of the mask, or of a backend that brings attention of its own."""
    backend: str = field(init=False, repr=False)
    """Registered name of what computes attention."""
    scale: float | None = field(init=False, repr=False)
    """Factor of the scores, None for 1 / sqrt(head_dim)."""
    on_empty_row: str = field(init=False, repr=False)
    """``zero`` or ``error``."""
    by_content: bool = field(init=False, repr=False)
    """Keys are chosen by the content of queries and keys: there are no edges before attention sees them."""
    needs_embeddings: bool = field(init=False, repr=False)
    """Keys are chosen by the norms of the layer's input."""
    num_prefix_tokens_used: int = field(init=False, repr=False)
    """Leading tokens off the grid, as configuration, model and mask settled it."""

    def __post_init__(self) -> None:
        if None in self.config.seeds:
            # Drawn once: from here on the mask, its copies and its pickles are the same.
            object.__setattr__(self, "config", self.config.with_seed(draw_seed()))
        config, grid = self.config, None if self.grid is None else list(integers("grid", self.grid))
        if config.layers:
            raise config_error(
                f"layers: {config.layers} are regular expressions on names of modules, and there is no model here; "
                "give the configuration to sparsify, or take one layer's with config.for_layer(name)",
                key="layers",
            )
        for name in ("num_heads", "layer", "num_layers", "epoch", "num_prefix_tokens", "head_dim"):
            number = getattr(self, name)
            if number is not None or name in ("num_heads", "layer", "epoch"):
                object.__setattr__(self, name, integer(name, number, least=int(name in ("num_layers", "head_dim"))))
        if grid is not None and (len(grid) not in (2, 3) or not 1 <= min(grid) <= math.prod(grid) <= MAX_CELLS):
            expected = f"[H, W] or [T, H, W], each at least 1 and together at most {MAX_CELLS} cells"
            raise ValueError(f"grid: expected {expected}, got {grid}")
        if self.num_layers is not None and self.layer >= self.num_layers:
            raise ValueError(
                f"layer: expected at most {self.num_layers - 1} of {self.num_layers} layers, got {self.layer}"
            )
        check_sizes(config, self.num_heads)
        place = (self.layer, self.num_layers, self.epoch, grid, self.num_prefix_tokens)
        spec = config.spec(self.num_heads, *place, self.head_dim)
        derived = {
            "spec": spec,
            "name": config.mask if config.uses_edges else config.backend,
            "backend": config.backend,
            "scale": config.scale,
            "on_empty_row": config.on_empty_row,
            "by_content": config.by_content,
            "needs_embeddings": config.by_content and '"score":"embedding_norm"' in spec,
            "num_prefix_tokens_used": int(json.loads(spec)["num_prefix_tokens"]),
        }
        for attribute, value in derived.items():
            object.__setattr__(self, attribute, value)
        self._refuse_what_never_works()

    def _refuse_what_never_works(self) -> None:
        """Raise now what no number of tokens would mend, and not in the first forward pass."""
        if not self.config.uses_edges or self.name not in _built_in_masks():
            return
        if self.by_content:
            selection_room(self.spec)  # reads the rule, which knows the heads and the layer
            return
        spec = json.loads(self.spec)
        prefix, grid = spec["num_prefix_tokens"], spec["grid"] or spec["mask_kwargs"].get("grid")
        sizes = (prefix + 36, prefix + 49) if grid is None else (prefix + math.prod(grid),)
        errors = [self._why_not(num_tokens) for num_tokens in sizes]
        # An error that speaks of the number of tokens differs from one to the other.
        if errors[0] is not None and len({str(error) for error in errors}) == 1:
            raise errors[0]

    def _why_not(self, num_tokens: int) -> ValueError | None:
        try:
            Edges.from_spec(self.spec, num_tokens, tried_out=True)
        except ValueError as error:
            return error
        return None

    @property
    def is_dense(self) -> bool:
        """Every query keeps every key."""
        return self.name == "none"

    @property
    def is_causal(self) -> bool:
        """No query gives a later key any weight, whatever the number of tokens."""
        return self.config.uses_edges and _keeps_no_later_key(self.spec)

    @property
    def masked_logits(self) -> str:
        """``neg_inf`` or ``zero``."""
        return self.config.masked_logits

    @property
    def grid_used(self) -> tuple[int, ...] | None:
        """Sides of the patch grid, as configuration, mask and model settled it."""
        spec = json.loads(self.spec)
        grid = spec["grid"] or spec["mask_kwargs"].get("grid")
        return None if grid is None else tuple(grid)

    def source(self, num_tokens: int) -> EdgeSource:
        """The edges for ``num_tokens`` tokens as the operators take them."""
        return EdgeSource(self.spec, None, None, self.masked_logits == "zero")

    @property
    def is_sparse(self) -> bool:
        """Attention is softmax over the edges of a mask that may drop some."""
        return self.config.uses_edges and not self.is_dense

    @property
    def num_tokens(self) -> int | None:
        """N, where the grid and the prefix are known."""
        given, prefix = self.config.grid, self.num_prefix_tokens
        if given is None and self.grid is not None and prefix is not None:
            # The model's own tokens, also where the configuration draws the line elsewhere.
            return math.prod(self.grid) + prefix
        grid = given or self.grid
        if grid is None or (prefix is None and self.config.num_prefix_tokens is None):
            return None
        return math.prod(grid) + self.num_prefix_tokens_used

    def at(self, num_tokens: int, head_dim: int | None = None) -> "Mask":
        """The edges for ``num_tokens`` tokens."""
        from .mask import Mask  # which needs this module

        return Mask(self, num_tokens, head_dim)

    def at_epoch(self, epoch: int) -> "LayerMask":
        """The same layer in another training epoch."""
        return self if epoch == self.epoch else replace(self, epoch=epoch)


def check_everywhere(config: AttentionConfig) -> None:
    """Raise where a configuration that names its grid works in no layer of any model.

    With ``layers`` it depends on the model what applies, and large grids would take long: these are not tried out.

    Raises:
        ConfigError: no mask can be made of it.
    """
    grid = config.grid or json.loads(config.to_json())["mask_kwargs"].get("grid")
    if config.layers or grid is None or math.prod(grid) > _MOST_TRIED:
        return
    errors: dict[str, ConfigError] = {}
    for number in (1, 2):
        try:
            LayerMask(config, config.num_heads or number, num_layers=number, head_dim=64)
            return
        except ConfigError as error:  # noqa: PERF203
            errors[str(error)] = error
    # An error that speaks of the number of heads or layers differs from one to the other.
    if len(errors) == 1:
        raise errors.popitem()[1]


def check_sizes(config: AttentionConfig | None, num_heads: int, embed_dim: int | None = None) -> None:
    """Raise where a configuration names other sizes than those of the layer it is used in.

    Args:
        config: the configuration; None has no sizes.
        num_heads: H of the layer.
        embed_dim: width of its tokens, None where it is unknown.

    Raises:
        ValueError: ``num_heads`` or ``embed_dim`` of the configuration is another.
    """
    if config is None:
        return
    for key, own, there in (("num_heads", config.num_heads, num_heads), ("embed_dim", config.embed_dim, embed_dim)):
        if None not in (own, there) and own != there:
            raise ValueError(f"{key}: the configuration is for {own}, but it is used with {there}")


@functools.cache
def _built_in_masks() -> frozenset[str]:
    return frozenset(entry["name"] for entry in registered_masks())


@functools.lru_cache(maxsize=1024)
def _keeps_no_later_key(spec: str) -> bool:
    mask = json.loads(spec)
    # With logits of zero, keys that are not kept have a weight all the same.
    whole = mask["num_prefix_tokens"] == 0 and mask["masked_logits"] == "neg_inf"
    return whole and mask["mask_kwargs"].get("causal") is True


def draw_seed() -> int:
    """A seed from torch's default generator, which `torch.manual_seed` governs."""
    return int(torch.randint(torch.iinfo(torch.int32).max, (), device="cpu"))


def check_grid(sides: Sequence[int], num_tokens: int, num_prefix_tokens: int) -> None:
    """Raise a ValueError unless a grid has as many cells as there are tokens after the prefix."""
    patches = num_tokens - num_prefix_tokens
    if math.prod(sides) != patches:
        raise ValueError(
            f"grid: {list(sides)} has {math.prod(sides)} cells, but {num_tokens} tokens with "
            f"{num_prefix_tokens} prefix tokens leave {patches} patches"
        )
