"""What a model would lose, as a table: the share of dense attention's mass that candidate masks keep."""

import html
import json
import math
import numbers
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING

from . import viz
from ._core import AttentionConfig
from .config import load_config

if TYPE_CHECKING:
    from matplotlib.axes import Axes

DENSE = "dense"
"""How a recommendation calls a layer for which no candidate keeps enough."""


@dataclass(frozen=True)
class Kept:
    """What one candidate keeps in one head, averaged over all queries of all samples."""

    config: str
    """Name of the candidate."""
    layer: str
    """Name of the module."""
    head: int
    mass: float
    """Share of dense attention's weights that falls on the edges: ``mean_i sum_(j kept) p_ij`` with dense p."""
    error: float
    """``|out - dense out| / |dense out|`` of the head's output, Euclidean over queries and channels."""
    density: float
    """Edges over N^2."""


@dataclass(frozen=True)
class Calibration:
    """What `calibrate` measured; prints as a table."""

    configs: Mapping[str, AttentionConfig]
    """The candidates, by name."""
    rows: tuple[Kept, ...]
    """One per layer, candidate and head, in the order of the model."""
    num_batches: int
    """Batches that were looked at."""
    layer_configs: Mapping[tuple[str, str], AttentionConfig]
    """What a candidate is in a layer, by names of candidate and layer."""

    @property
    def layers(self) -> tuple[str, ...]:
        """Names of the layers."""
        return tuple(dict.fromkeys(row.layer for row in self.rows))

    def of(self, config: str, layer: str) -> tuple[Kept, ...]:
        """The heads of one candidate in one layer."""
        return tuple(row for row in self.rows if (row.config, row.layer) == (config, layer))

    def to_dict(self) -> dict[str, object]:
        """Everything as plain data."""
        configs = {name: json.loads(config.to_json()) for name, config in self.configs.items()}
        return {"num_batches": self.num_batches, "configs": configs, "rows": [asdict(row) for row in self.rows]}

    def recommend(self, mass: float = 0.9) -> str:
        """The cheapest candidate for every layer that keeps enough of its attention, as a configuration.

        Enough is a mean over the heads of at least ``mass``; cheapest is of least density, and of equal ones the first.
        A layer for which no candidate keeps enough stays dense.

        Args:
            mass: share of dense attention's weights to keep, above 0 and at most 1.

        Returns:
            YAML text that `load_config` takes, for `sparsify` on the same model.

        Raises:
            TypeError: ``mass`` is no number.
            ValueError: it is out of range.
        """
        if isinstance(mass, bool) or not isinstance(mass, numbers.Real):
            raise TypeError(f"mass: expected a number above 0 and at most 1, got {mass!r}")
        if not 0.0 < mass <= 1.0:
            raise ValueError(f"mass: expected above 0 and at most 1, got {mass}")
        chosen = {layer: self._cheapest(layer, mass) for layer in self.layers}
        documents = {layer: self._document(name, layer) for layer, name in chosen.items()}
        common = Counter(json.dumps(document) for document in documents.values()).most_common(1)
        base = json.loads(common[0][0]) if common else {"mask": "none"}
        different = {
            f"^{re.escape(layer)}$": {key: value for key, value in document.items() if value != base[key]}
            for layer, document in documents.items()
            if document != base
        }
        lines = [f"# Of {', '.join(self.configs)}: the cheapest that keeps {mass:g} of the attention of each layer, as"]
        lines += [f"# measured on {self.num_batches} batches."]
        lines += [f"#   {layer}: {name}" for layer, name in chosen.items()]
        return "\n".join(lines) + "\n" + load_config({**base, "layers": different}).to_yaml()

    def _cheapest(self, layer: str, mass: float) -> str:
        measured = [(name, self.of(name, layer)) for name in self.configs]
        enough = [
            (_mean(row.density for row in heads), name)
            for name, heads in measured
            if _mean(row.mass for row in heads) >= mass
        ]
        return min(enough, key=lambda each: each[0])[1] if enough else DENSE

    def _document(self, name: str, layer: str) -> dict[str, object]:
        config = load_config("mask: none") if name == DENSE else self.layer_configs[name, layer]
        document: dict[str, object] = json.loads(config.to_json())
        return {key: value for key, value in document.items() if key not in ("layers", "embed_dim", "num_heads")}

    def plot(self) -> "list[Axes]":
        """Draw the mass kept, layers downwards and heads to the right, one heat map per candidate.

        Raises:
            ImportError: matplotlib is not installed.
        """
        maps = {name: [[row.mass for row in self.of(name, layer)] for layer in self.layers] for name in self.configs}
        return viz.heat_maps(maps, self.layers, "attention mass kept")

    def _table(self) -> list[tuple[str, ...]]:
        lines: list[tuple[str, ...]] = [("layer", "candidate", "density", "mass", "least head", "output error")]
        for layer in self.layers:
            for name in self.configs:
                heads = self.of(name, layer)
                least = min(heads, key=lambda row: row.mass)
                means = (_mean(getattr(row, key) for row in heads) for key in ("density", "mass", "error"))
                density, mass, error = (f"{mean:.2%}" for mean in means)
                lines.append((layer, name, density, mass, f"{least.mass:.2%} ({least.head})", error))
        return lines

    def __str__(self) -> str:
        table = self._table()
        widths = [max(map(len, column)) for column in zip(*table, strict=True)]
        lines = []
        for line in table:
            cells = [cell.ljust(width) if place < 2 else cell.rjust(width)
                     for place, (cell, width) in enumerate(zip(line, widths, strict=True))]  # fmt: skip
            lines.append("  ".join(cells).rstrip())
        return "\n".join(lines)

    def _repr_html_(self) -> str:
        def line(cells: Sequence[str], tag: str) -> str:
            return "<tr>" + "".join(f"<{tag}>{html.escape(cell)}</{tag}>" for cell in cells) + "</tr>"

        head, *body = self._table()
        return f"<table>{line(head, 'th')}{''.join(line(cells, 'td') for cells in body)}</table>"


def _mean(values: Iterable[float]) -> float:
    numbers = list(values)
    return math.fsum(numbers) / len(numbers)
