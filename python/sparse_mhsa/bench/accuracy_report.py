"""The accuracy table as Markdown, CSV and an HTML page with plots."""

import csv
import io
import statistics
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from ..train.checkpoint import replacing
from ..train.figures import INK, svg
from ..train.page import counted, folded, page, prose, table
from .options import GPU_EXAMPLES

Row = Mapping[str, Any]

TITLE = "Accuracy at the same attention budget"


def _number(value: float | list[int] | None, text: str) -> str:
    if isinstance(value, list):  # one for each axis
        return " x ".join(text.format(one) for one in value)
    return "-" if value is None else text.format(value)


COLUMNS: dict[str, Callable[[Row], str]] = {
    "method": lambda row: row["title"],
    "parameter": lambda row: _number(row["value"], "{:g}"),
    "top-1 %": lambda row: f"{statistics.mean(row['test_acc1']):.2f}",
    "spread": lambda row: _number(spread(row["test_acc1"]), "{:.2f}"),
    "seeds": lambda row: str(len(row["seeds"])),
    "GMACs": lambda row: f"{row['gmacs']:.4g}",
    "GFLOPs": lambda row: f"{row['gflops']:.4g}",
    "of dense": lambda row: f"{row['gmacs'] / row['dense_gmacs']:.2%}",
    "pruned": lambda row: _number(row["pruning_ratio"], "{:.2%}"),
    "parameters": lambda row: f"{row['parameters']:,}",
    "train ms": lambda row: f"{row['train_ms']['median']:.1f}",
    "inference ms": lambda row: f"{row['inference_ms']['median']:.1f}",
    "peak MiB": lambda row: f"{statistics.mean(row['peak_memory']) / 2**20:.0f}",
}
"""Head of a column, and how a row fills it."""


def spread(values: list[float]) -> float | None:
    """Standard deviation over the seeds; None for a single one."""
    return statistics.stdev(values) if len(values) > 1 else None


def write_report(report: Mapping[str, Any], folder: Path) -> Path:
    """Write ``accuracy.md``, ``accuracy.csv`` and ``accuracy.html``.

    Returns:
        The path of the page.
    """
    texts = {"accuracy.md": markdown(report), "accuracy.csv": comma_separated(report), "accuracy.html": web(report)}
    for name, text in texts.items():
        with replacing(folder / name) as file:
            file.write(text.encode())
    return folder / "accuracy.html"


def markdown(report: Mapping[str, Any]) -> str:
    """The table, what it means, and the command of every run."""
    lines = [f"# {TITLE}\n", _about(report) + "\n"]
    lines += ["| " + " | ".join(COLUMNS) + " |", "|" + "---|" * len(COLUMNS)]
    lines += ["| " + " | ".join(cell(row) for cell in COLUMNS.values()) + " |" for row in report["rows"]]
    lines += ["", *(f"- {note}" for note in _notes(report))]
    lines += ["", "## One run again", "", _again(report), ""]
    lines += [
        f"- {row['title']} (`{row['method']}`): `{command}`" for row in report["rows"] for command in row["commands"]
    ]
    lines += ["", "## Other data sets, on a machine with GPUs (not run for this page)", ""]
    lines += [f"- `{command}`" for command in GPU_EXAMPLES]
    return "\n".join(lines) + "\n"


def comma_separated(report: Mapping[str, Any]) -> str:
    """One line per run, with unrounded numbers."""
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    each = ("seeds", "test_acc1", "test_acc5", "test_loss", "train_seconds", "peak_memory", "commands")
    once = ("method", "value", "gmacs", "gflops", "dense_gmacs", "pruning_ratio", "parameters")
    writer.writerow([*once, "train_ms", "inference_ms", *(name.removesuffix("s") for name in each)])
    for row in report["rows"]:
        shared = [row[name] for name in once] + [row[key]["median"] for key in ("train_ms", "inference_ms")]
        writer.writerows([*shared, *(row[name][run] for name in each)] for run in range(len(row["seeds"])))
    return buffer.getvalue()


def _about(report: Mapping[str, Any]) -> str:
    data, environment, recipe = report["data"], report["environment"], report["recipe"]
    seconds = sum(sum(row["train_seconds"]) for row in report["rows"])
    runs = sum(len(row["seeds"]) for row in report["rows"])
    return (
        f"{recipe['model']} on {data['name']} ({data['train_images']:,} training and {data['test_images']:,} test "
        f"images), {counted(recipe['epochs'], 'epoch')} per run. {counted(runs, 'run')}, "
        f"{seconds / 3600:.2f} hours of training steps in all, {report['jobs']} at a time, on "
        f"{environment['machine']} with {environment['cores']} cores ({environment['threads']} threads). "
        f"Made {report['created']} by `{report['command']}`."
    )


def _again(report: Mapping[str, Any]) -> str:
    return (
        "The command above with --methods NAME --seeds SEED before its -- and another --output-dir makes one run "
        "again, with the same budget. What it starts is below; it also writes the attention.yaml that is named there, "
        "whose text is in accuracy.json too. With the same code, processor and threads the accuracy is the same; where "
        "kernels have changed how they round since, it moves as it does with another seed."
    )


def _notes(report: Mapping[str, Any]) -> list[str]:
    train = report["data"]["train_images"]
    chooses = [
        f"{row['title']}: the choice of its keys is not among the products counted; it costs another half of dense "
        "attention, and is in the times."
        for row in report["rows"]
        if row["method"] == "topk"
    ]
    return [
        "top-1: mean over the seeds after the last epoch; spread: standard deviation over the seeds.",
        "GMACs and GFLOPs: the two products of attention in all layers for one image (a multiply-add counts as one, as "
        "two), without projections; a method whose parameter is a whole number may miss the budget a little, one "
        "without a parameter may miss it much.",
        *chooses,
        "pruned: share of patch-to-patch pairs left out; `-` for methods without pairs.",
        f"train ms and inference ms: a batch of {report['recipe']['batch_size']}, all methods taking turns in one "
        "process after training; forward and backward with loss, and forward alone.",
        "hours and the times in accuracy.csv are those of the clock: what else ran on the machine is in them.",
        "peak MiB: mean over the seeds of the largest resident memory of the training process (on a GPU: allocated "
        "there).",
        f"Small models trained this briefly on {train:,} images favour whatever structure helps at the start; the "
        "order of methods says little about large models trained to the end.",
    ]


def web(report: Mapping[str, Any]) -> str:
    """The page, with the plots inside it."""
    return page(TITLE, _body(report))


def _body(report: Mapping[str, Any]) -> str:
    rows = ([cell(row) for cell in COLUMNS.values()] for row in report["rows"])
    notes = "".join(f"<li>{prose(note)}</li>" for note in _notes(report))
    commands = "\n".join(command for row in report["rows"] for command in row["commands"])
    return f"""<p>{prose(_about(report))}</p>
<figure>{table(tuple(COLUMNS), rows)}</figure>
<h2>Accuracy against operations and against measured time</h2>
<figure>{_plots(report)}</figure>
<h2>How to read this</h2><ul>{notes}</ul>
<p>{prose(_again(report))}</p>
{folded("Commands of the runs", commands)}"""


def _plots(report: Mapping[str, Any]) -> str:
    figure = Figure(figsize=(11, 5), layout="constrained")
    axes = figure.subplots(1, 2, sharey=True)
    abouts = ("attention GFLOPs per image", "training step, ms per batch")
    for index, (one, about) in enumerate(zip(axes, abouts, strict=True)):
        for row in report["rows"]:
            place, mean = (row["gflops"], row["train_ms"]["median"])[index], statistics.mean(row["test_acc1"])
            one.errorbar(place, mean, yerr=spread(row["test_acc1"]) or 0.0, fmt="o", capsize=2)
            one.annotate(row["method"], (place, mean), (4, 3), textcoords="offset points", fontsize=6, color=INK)
        one.set_xlabel(about)
        one.grid(color="#e9ecf1")
    axes[0].set_xscale("log")
    axes[0].set_ylabel("test top-1 (%)")
    return svg(figure)
