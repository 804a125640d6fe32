"""What a mask is made of and what attention over it costs, as a table."""

import html
from dataclasses import dataclass, fields

from ._core import Edges
from .config import integer
from .flops import attention_macs, in_unit


@dataclass(frozen=True)
class HeadExplanation:
    """One head: the segments that hold its edges, and the work that they cause."""

    head: int
    dense_rows: int
    """Queries that keep every key."""
    dense_cols: int
    """Keys kept by every query."""
    diagonals: int
    """Diagonals, each with one key per query at a fixed distance."""
    runs: int
    """Runs of consecutive keys of single queries: what is irregular."""
    edges: int
    edges_in_dense: int
    edges_on_diagonals: int
    edges_in_runs: int
    bytes: int
    """Memory of the segments, one direction."""
    shared_with: int | None
    """The first of the heads before this one that holds the same edges in the same memory, None if there is none."""
    gmacs: float | None = None
    """Multiply-accumulates of q k^T and p v for one sample, in billions, where the head dimension is known."""
    kernel: str | None = None
    """``edges`` (edge by edge), ``lines`` (along diagonals and single dense rows and columns) or ``panels`` (squares of
    pairs computed whole): the choice of the cost model where the head dimension is known. Calls with a bias or dropout,
    and ``masked_logits: zero``, always go edge by edge; with a key mask, or where heads share keys, nothing goes along
    lines."""
    predicted_seconds: float | None = None
    """Forward time for one sample in float32 on one thread, as the cost model predicts it: good for comparing heads and
    masks, since machines differ by a factor."""


@dataclass(frozen=True)
class Explanation:
    """How a mask is held and what it costs, head by head."""

    title: str
    num_tokens: int
    num_prefix_tokens: int
    density: float
    heads: tuple[HeadExplanation, ...]
    handed_over: str | None = None
    """Which calls PyTorch's dense attention computes instead of the kernels named below, None for none."""

    @property
    def edges(self) -> int:
        """Edges over all heads."""
        return sum(head.edges for head in self.heads)

    @property
    def bytes(self) -> int:
        """Memory of the segments, counting shared heads once."""
        return sum(head.bytes for head in self.heads if head.shared_with is None)

    def _table(self) -> tuple[list[str], list[list[str]]]:
        shown = [
            field.name
            for field in fields(HeadExplanation)
            if any(getattr(h, field.name) is not None for h in self.heads)
        ]
        return shown, [[_text(getattr(head, name)) for name in shown] for head in self.heads]

    def _summary(self) -> str:
        return (
            f"{self.title}: {self.num_tokens} tokens ({self.num_prefix_tokens} prefix), {len(self.heads)} heads, "
            f"{self.edges} edges, density {self.density:.2%}, {self.bytes} bytes"
            + ("" if self.handed_over is None else f"; {self.handed_over}")
        )

    def __str__(self) -> str:
        names, rows = self._table()
        widths = [max(len(cell) for cell in column) for column in zip(names, *rows, strict=True)]
        lines = [
            "  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in (names, *rows)
        ]
        return "\n".join([self._summary(), *lines])

    def _repr_html_(self) -> str:
        names, rows = self._table()
        head = "".join(f"<th>{html.escape(name)}</th>" for name in names)
        body = "".join(f"<tr>{''.join(f'<td>{html.escape(cell)}</td>' for cell in row)}</tr>" for row in rows)
        return f"<p>{html.escape(self._summary())}</p><table><tr>{head}</tr>{body}</table>"


def explain(edges: Edges, title: str, head_dim: int | None, handed_over: str | None = None) -> Explanation:
    """Describe edges head by head.

    Args:
        edges: of all heads.
        title: what to call them.
        head_dim: D, for the cost; None leaves it out.
        handed_over: which calls other code computes.

    Returns:
        The table.

    Raises:
        ValueError: ``head_dim`` is not positive.
    """
    head_dim = None if head_dim is None else integer("head_dim", head_dim, 1)
    heads = []
    for head in range(edges.num_heads):
        entry = edges.describe(head, head_dim)
        gmacs = None if head_dim is None else in_unit(attention_macs(entry["edges"], head_dim), "GMACs")
        heads.append(HeadExplanation(head=head, gmacs=gmacs, **entry))
    density = sum(edges.nnz()) / max(1, edges.num_heads * edges.num_tokens**2)
    return Explanation(title, edges.num_tokens, edges.num_prefix_tokens, density, tuple(heads), handed_over)


def _text(value: object) -> str:
    if value is None:
        return "-"
    return f"{value:.4g}" if isinstance(value, float) else str(value)
