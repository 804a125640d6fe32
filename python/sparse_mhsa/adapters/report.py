"""What `sparsify` or `densify` did, layer by layer."""

import html
from dataclasses import asdict, dataclass, field
from typing import Literal


@dataclass(frozen=True)
class Row:
    """One attention layer."""

    module: str
    """Name in the model."""
    adapter: str
    """Which adapter handled it; empty where none does."""
    status: Literal["swapped", "skipped", "restored"]
    reason: str = ""
    """Why it was skipped."""
    mask: str = ""
    layer: int | None = None
    num_tokens: int | None = None
    """N, where the model tells."""
    density: float | None = None
    """Share of the whole matrix that is kept, where N is known."""
    nnz: int | None = None
    """Edges kept over all heads, where N is known."""
    empty_rows: int | None = None
    """Queries that keep no key, over all heads, where N is known."""


@dataclass(frozen=True)
class Report:
    """Every attention layer of a model and what became of it; prints as a table."""

    rows: tuple[Row, ...] = field(default_factory=tuple)

    @property
    def swapped(self) -> tuple[Row, ...]:
        """Rows of the layers that are sparse now."""
        return tuple(row for row in self.rows if row.status == "swapped")

    @property
    def restored(self) -> tuple[Row, ...]:
        """Rows of the layers that are dense again."""
        return tuple(row for row in self.rows if row.status == "restored")

    @property
    def skipped(self) -> tuple[Row, ...]:
        """Rows of the layers that stayed as they were."""
        return tuple(row for row in self.rows if row.status == "skipped")

    def to_dict(self) -> dict[str, object]:
        """The rows as plain data."""
        return {"rows": [asdict(row) for row in self.rows]}

    def __str__(self) -> str:
        if not self.rows:
            return "no attention layers found"
        table = [_HEADER, *(_cells(row) for row in self.rows)]
        widths = [max(len(line[column]) for line in table) for column in range(len(_HEADER))]
        lines = ["  ".join(cell.ljust(w) for cell, w in zip(line, widths, strict=True)).rstrip() for line in table]
        lines.insert(1, "  ".join("-" * width for width in widths))
        return "\n".join(lines)

    def _repr_html_(self) -> str:
        def line(cells: tuple[str, ...], tag: str) -> str:
            return "<tr>" + "".join(f"<{tag}>{html.escape(cell)}</{tag}>" for cell in cells) + "</tr>"

        body = "".join(line(_cells(row), "td") for row in self.rows)
        return f"<table><thead>{line(_HEADER, 'th')}</thead><tbody>{body}</tbody></table>"


_HEADER = ("module", "adapter", "mask", "layer", "N", "density", "nnz", "status")


def _cells(row: Row) -> tuple[str, ...]:
    def shown(value: object) -> str:
        return "-" if value in (None, "") else str(value)

    density = "-" if row.density is None else f"{row.density:.2%}"
    reason = row.reason or (f"{row.empty_rows} rows without a key" if row.empty_rows else "")
    status = f"{row.status}: {reason}" if reason else row.status
    name = row.module or "(root)"
    facts = (shown(row.adapter), shown(row.mask), shown(row.layer), shown(row.num_tokens))
    return (name, *facts, density, shown(row.nnz), status)
