"""``report.html`` of one training run: its curves, what its attention costs, and what the command adds."""

import html
from collections.abc import Sequence
from pathlib import Path

from ..flops import AttentionCost
from . import figures
from .engine import PAGE, Trainer
from .page import folded, prose, table, write_page

Costs = Sequence[tuple[str, AttentionCost, int]]
"""Of attention: what it is, its cost for one sequence, and how many such sequences an input has."""


def write_run_page(trainer: Trainer, title: str, about: str, costs: Costs, command: str, pictures: str = "") -> Path:
    """Write the page of a finished run into its output folder and return its path.

    Args:
        trainer: with the history of the run.
        title: of the page.
        about: what was trained on what, and what came of it.
        costs: of its attention.
        command: what the user typed.
        pictures: HTML that follows the curves.

    Raises:
        TrainingError: the file cannot be written.
    """
    configs = {name: text for name, text in trainer.attention.items() if text is not None}
    body = f"""<p>{prose(about)}</p>
<h2>Training</h2><figure>{figures.run_curves(trainer.history)}</figure>
{pictures}
<h2>Attention</h2>{"".join(map(_masks, costs))}
{"".join(folded(f"{name}, defaults filled in", text) for name, text in configs.items())}
<p>Made by <code>{html.escape(command)}</code>.</p>"""
    return write_page(trainer.options.output_dir / PAGE, title, body)


def _masks(found: tuple[str, AttentionCost, int]) -> str:
    """The mask of every layer and what it keeps."""
    about, cost, sequences = found
    head = ("layer", "mask", "tokens", "heads", "edges", "of all pairs", "GMACs")
    rows = [
        (
            layer.name or str(index),
            layer.mask,
            f"{layer.num_tokens:,}",
            str(layer.num_heads),
            f"{layer.nnz:,}" if layer.backend_macs is None else "-",
            f"{layer.nnz / layer.dense_nnz:.2%}" if layer.backend_macs is None else "-",
            f"{layer.macs / 1e9:.3g}",
        )
        for index, layer in enumerate(cost.layers)
    ]
    times = "" if sequences == 1 else f"{sequences} sequences per input; for each "
    return f"<p>{prose(f'{about}: {times}{cost}.')}</p><figure>{table(head, rows)}</figure>"
