"""``report.json`` and ``report.html``: two runs that differ in their attention only, side by side.

Schema of ``report.json`` (times in seconds, accuracies in percent):

- ``schema``: `SCHEMA`; ``created``: UTC time; ``command``: how to make it again.
- ``environment``: versions of ``sparse_mhsa``, ``torch``, ``timm`` and ``python``; ``machine``, ``cores``,
  ``threads``.
- ``data``: ``name``, ``train_images``, ``test_images``, ``classes``, ``image_size``, ``patch_size``,
  ``tokens``, ``prefix_tokens``.
- ``model``: ``name``, ``layers``, ``heads``, ``head_dim``.
- ``recipe``: the options that both runs share.
- ``runs``: ``dense`` and ``sparse``, each with

  - ``title``; ``attention_config``: YAML text with every default filled in, or null; ``parameters``;
  - ``epochs``: the run's log; ``test_acc1_last``, ``test_acc1_best``;
  - ``attention_cost``: per image, over all layers and heads: ``edges``; ``gmacs`` (a multiply-add counts as
    one); ``gflops`` (it counts as two); ``pruning_ratio_patches`` (1 - kept / all entries between patches);
    ``pruning_ratio_whole`` (1 - kept / all entries of the N x N matrix);
  - ``step_time`` and ``attention_time``: medians per training step of the last epoch; ``train_time``: sum of
    all steps.

- ``timing``: ``batch_size``, and forward + backward of ``core`` (attention without projections, all layers),
  ``layer`` (attention modules) and ``step`` (whole model), each with, per run, ``median``,
  ``lower_quartile``, ``upper_quartile``, ``repeats``.
- ``masks``: per layer: ``layer``, ``pruning_ratio_patches`` and, one value per head, ``edges``.
"""

import html
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from .checkpoint import write_text
from .page import counted, folded, page, prose, table

SCHEMA = "sparse_mhsa-demo-1"

Report = Mapping[str, Any]
"""The data of ``report.json``."""


def write_report(report: Report, figures: Mapping[str, str], folder: Path) -> Path:
    """Write both files into ``folder``.

    Args:
        report: data of the schema above.
        figures: HTML of the pictures ``curves``, ``masks``, ``visible`` and ``predictions``.
        folder: existing folder.

    Returns:
        The path of the HTML page; it needs no other file and no network.
    """
    write_text(folder / "report.json", json.dumps(report, indent=2, allow_nan=False) + "\n")
    path = folder / "report.html"
    write_text(path, render(report, figures))
    return path


def render(report: Report, figures: Mapping[str, str]) -> str:
    """The HTML page."""
    title = f"{report['runs']['sparse']['title']} against dense attention"
    cards = "".join(
        f"<div><strong>{html.escape(value)}</strong><span>{html.escape(about)}</span></div>"
        for value, about in _cards(report)
    )
    notes = "".join(f"<li><b>{html.escape(name)}</b>: {prose(text)}</li>" for name, text in _notes(report))
    body = f"""<p>{html.escape(_summary(report))}</p>
<section class="cards">{cards}</section>
<h2>Numbers</h2>
{_table(report)}
<h2>Training</h2>
<figure>{figures["curves"]}</figure>
<h2>Test images</h2>
<p>The first test image of every class, of ten classes at most. Mistakes are red.</p>
<figure>{figures["predictions"]}</figure>
<h2>Every head's mask</h2>
<p>A point is a query (its row) that attends to a key (its column). Above each head: the share of the whole
matrix that it keeps.</p>
<figure>{figures["masks"]}</figure>
<h2>What one patch sees</h2>
<p>In the first layer, the patch in the red frame attends to the patches that are not tinted. What it sees
adds up over the layers.</p>
<figure>{figures["visible"]}</figure>
<h2>How to read this</h2>
<ul>{notes}</ul>
{folded("Attention configuration, defaults filled in", report["runs"]["sparse"]["attention_config"])}"""
    return page(title, body)


def _summary(report: Report) -> str:
    data, model = report["data"], report["model"]
    return (
        f"{model['name']} ({model['layers']} layers, {model['heads']} heads of {model['head_dim']} channels) "
        f"on {data['name']}: {data['train_images']:,} training and {data['test_images']:,} test images of "
        f"{data['image_size']} \N{MULTIPLICATION SIGN} {data['image_size']} pixels, {data['tokens']} tokens. "
        f"Two runs ({counted(report['recipe']['epochs'], 'epoch')}) that differ in their attention only: same initial "
        "weights, same images in the same order, same steps."
    )


def _cards(report: Report) -> list[tuple[str, str]]:
    dense, sparse, timing = report["runs"]["dense"], report["runs"]["sparse"], report["timing"]
    gmacs, dense_gmacs = sparse["attention_cost"]["gmacs"], dense["attention_cost"]["gmacs"]
    return [
        (
            f"{sparse['test_acc1_last']:.1f} %",
            f"test top-1 with {sparse['title']}; dense reaches {dense['test_acc1_last']:.1f} %",
        ),
        (
            f"{_times(dense_gmacs / gmacs)} fewer",
            f"attention operations: {_giga(gmacs)} GMACs per image instead of {_giga(dense_gmacs)}",
        ),
        (_speed(timing["core"]), f"attention alone, forward and backward: {_versus(timing['core'])}"),
        (_speed(timing["step"]), f"whole model, forward and backward: {_versus(timing['step'])}"),
    ]


def _notes(report: Report) -> list[tuple[str, str]]:
    data, model, recipe = report["data"], report["model"], report["recipe"]
    timing, environment = report["timing"], report["environment"]
    versions = ", ".join(f"{name} {environment[name]}" for name in ("sparse_mhsa", "torch", "timm", "python"))
    return [
        (
            f"One run per method, seed {recipe['seed']}",
            "another seed moves the accuracies by a few points. A small model trained this briefly on "
            f"{data['train_images']:,} images favours whatever has the more helpful structure at the start; "
            "it says little about large models trained to the end.",
        ),
        (
            "Operations",
            "the two matrix products of attention (scores and weighted sum) of all layers, per image, "
            "without the projections. GMACs count a multiply-add as one operation, GFLOPs as two.",
        ),
        (
            "Pruning ratio",
            "the share of entries left out: between patches (the convention of published tables), and over "
            f"the whole matrix, prefix tokens ({data['prefix_tokens']}) included.",
        ),
        (
            "Times",
            f"all at batch size {timing['batch_size']}, measured after training on random inputs, the two "
            f"methods taking turns; median and quartiles of {timing['core']['dense']['repeats']} calls each. "
            f"Attention alone: all {model['layers']} layers from given queries, keys and values, PyTorch's "
            "scaled_dot_product_attention against sparse_attention. Attention layers: the trained models' "
            "attention modules, projections included. Whole model: with its loss, without the update.",
        ),
        (
            "While training",
            "wall time of the attention modules' forward passes and of the whole step (forward, backward, "
            "update; without loading images), medians over the last epoch. The two runs followed each other, "
            "so other work on the machine may have slowed one of them more.",
        ),
        (
            "Machine",
            f"{environment['machine']}, {environment['cores']} cores, {environment['threads']} threads; {versions}.",
        ),
        ("Recipe", ", ".join(f"{name} {value}" for name, value in recipe.items() if value is not None) + "."),
        ("Made", f"{report['created']} by `{report['command']}`; the data of this page is in report.json."),
    ]


def _table(report: Report) -> str:
    runs, timing = report["runs"], report["timing"]

    def row(about: str, value: Callable[[str, Mapping[str, Any]], str]) -> list[str]:
        return [about, *(value(name, run) for name, run in runs.items())]

    def spread(kind: str, name: str) -> str:
        values = timing[kind][name]
        low, high = _ms(values["lower_quartile"]), _ms(values["upper_quartile"])
        return f"{_ms(values['median'])} ms ({low} to {high})"

    rows = [
        row("Test top-1 after the last epoch", lambda _, run: f"{run['test_acc1_last']:.1f} %"),
        row("Test top-1 of the best epoch", lambda _, run: f"{run['test_acc1_best']:.1f} %"),
        row("Parameters", lambda _, run: f"{run['parameters']:,}"),
        row("Attention GMACs per image", lambda _, run: _giga(run["attention_cost"]["gmacs"])),
        row("Attention GFLOPs per image", lambda _, run: _giga(run["attention_cost"]["gflops"])),
        row(
            "Pruning ratio, patch to patch",
            lambda _, run: _percent(run["attention_cost"]["pruning_ratio_patches"]),
        ),
        row(
            "Pruning ratio, whole matrix",
            lambda _, run: _percent(run["attention_cost"]["pruning_ratio_whole"]),
        ),
        row("Edges, all layers and heads", lambda _, run: f"{run['attention_cost']['edges']:,}"),
        row("Attention alone, forward + backward", lambda name, _: spread("core", name)),
        row("Attention layers, forward + backward", lambda name, _: spread("layer", name)),
        row("Whole model, forward + backward", lambda name, _: spread("step", name)),
        row("While training: attention forward", lambda _, run: f"{_ms(run['attention_time'])} ms"),
        row("While training: whole step", lambda _, run: f"{_ms(run['step_time'])} ms"),
        row("All training steps", lambda _, run: f"{run['train_time']:.0f} s"),
    ]
    return table(["", *(run["title"] for run in runs.values())], rows)


def _speed(timing: Mapping[str, Any]) -> str:
    """How many times faster the sparse run is, or slower: whatever was measured."""
    ratio = timing["dense"]["median"] / timing["sparse"]["median"]
    return f"{_times(ratio)} faster" if ratio >= 1 else f"{_times(1 / ratio)} slower"


def _versus(timing: Mapping[str, Any]) -> str:
    return f"{_ms(timing['sparse']['median'])} ms instead of {_ms(timing['dense']['median'])} ms"


def _times(ratio: float) -> str:
    return f"{ratio:.0f}\N{MULTIPLICATION SIGN}" if ratio >= 10 else f"{ratio:.1f}\N{MULTIPLICATION SIGN}"


def _giga(value: float) -> str:
    return f"{value:.3g}"


def _percent(share: float) -> str:
    return f"{100 * share:.2f} %"


def _ms(seconds: float) -> str:
    return f"{1e3 * seconds:.3g}" if seconds < 1 else f"{1e3 * seconds:.0f}"
