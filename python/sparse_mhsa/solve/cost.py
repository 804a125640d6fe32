"""What a mask costs, and what a budget asks for."""

import math
import sys
from dataclasses import dataclass
from numbers import Real

from .. import _core
from .._core import AttentionConfig
from ..config import config_error
from ..flops import Unit, attention_macs, in_unit
from ..layer_mask import LayerMask, check_grid


@dataclass(frozen=True)
class Count:
    """Edges of a mask, and of dense attention, in all heads and layers."""

    edges: float
    patches: float
    dense_edges: int
    dense_patches: int
    queries: int
    patch_queries: int

    @property
    def density(self) -> float:
        """Share of all pairs."""
        return self.edges / max(1, self.dense_edges)

    @property
    def pruning_ratio(self) -> float:
        """1 - density between patches."""
        return 1.0 - self.patches / self.dense_patches if self.dense_patches else 0.0


@dataclass(frozen=True)
class Place:
    """Where a mask is used."""

    num_tokens: int
    num_heads: int
    layer: int
    num_layers: int | None
    grid: tuple[int, ...] | None
    num_prefix_tokens: int | None
    head_dim: int | None

    def count(self, config: AttentionConfig) -> Count:
        """The edges of one layer, or of all."""
        if not config.uses_edges:
            raise config_error(f"backend: `{config.backend}` has no edges to count", key="backend")
        if None in config.seeds:
            config = config.with_seed(0)  # numbers do not depend on it, and torch's generator is left alone
        layers = [self.layer] if self.num_layers is None else range(self.num_layers)
        rest = (self.num_layers, 0, self.grid, self.num_prefix_tokens)
        first = LayerMask(config, self.num_heads, layers[0], *rest, self.head_dim)
        if self.grid is not None:
            check_grid(self.grid, self.num_tokens, first.num_prefix_tokens_used)
        # Most masks are the same in all layers.
        grid = None if self.grid is None else list(self.grid)
        place = (self.num_layers, 0, grid, self.num_prefix_tokens, self.head_dim)
        specs = [first.spec, *(config.spec(self.num_heads, layer, *place) for layer in layers[1:])]
        of_spec = {spec: self._edges(spec) for spec in set(specs)}
        edges, patches = (sum(of_spec[spec][which] for spec in specs) for which in (0, 1))
        heads, num_patches = self.num_heads * len(layers), max(0, self.num_tokens - first.num_prefix_tokens_used)
        queries, patch_queries = heads * self.num_tokens, heads * num_patches
        return Count(edges, patches, queries * self.num_tokens, patch_queries * num_patches, queries, patch_queries)

    def _edges(self, spec: str) -> tuple[float, float]:
        edges, patches = zip(*_core.count_edges(spec, self.num_tokens), strict=True)
        return math.fsum(edges), math.fsum(patches)


@dataclass(frozen=True)
class Budget:
    """What the caller asks for."""

    density: float | None
    pruning_ratio: float | None
    flops: float | None
    unit: Unit | None

    def spent(self, count: Count) -> float:
        """What of a mask's cost the budget is about."""
        return count.edges if self.pruning_ratio is None else count.patches

    def target(self, place: Place, like: Count) -> float:
        """Edges to keep, between patches for a pruning ratio: at least one for each query."""
        dense, queries = (
            (like.dense_edges, like.queries) if self.pruning_ratio is None else (like.dense_patches, like.patch_queries)
        )
        # Beside a budget far beyond dense attention, all masks would be equally far from it.
        kept = min(self._edges(place, like), dense)
        if kept < queries * (1 - 1e-12):
            name = next(name for name in ("density", "pruning_ratio", "flops") if getattr(self, name) is not None)
            raise ValueError(
                f"{name}: expected at least one key for each query, a density of {queries / dense:.4%}, got "
                f"{getattr(self, name)}, which is {kept / dense:.4%}"
            )
        return kept

    def _edges(self, place: Place, like: Count) -> float:
        given = {"density": self.density, "pruning_ratio": self.pruning_ratio, "flops": self.flops}
        if sum(value is not None for value in given.values()) != 1:
            raise ValueError(f"budget: give exactly one of {', '.join(given)}")
        for key, number in given.items():
            if number is not None and (isinstance(number, bool) or not isinstance(number, Real)):
                raise TypeError(f"{key}: expected a number, got {type(number).__name__} {number!r:.60}")
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
        if not 0.0 < self.flops <= sys.float_info.max:
            raise ValueError(f"flops: expected a finite number above 0, got {self.flops!r:.60}")
        for name, value in (("unit", self.unit), ("head_dim", place.head_dim), ("num_layers", place.num_layers)):
            if value is None:
                raise ValueError(f"{name}: expected a value with flops, got None")
        assert self.unit is not None
        assert place.head_dim is not None
        return self.flops / in_unit(attention_macs(1, place.head_dim), self.unit)
