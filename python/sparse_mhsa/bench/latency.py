"""``sparse-mhsa bench latency``: attention alone and whole layers, and from where on sparse is faster."""

import datetime
import itertools
import json
import logging
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch

from ..arguments import read_attention
from ..machine import environment
from ..train import require_packages
from ..train.checkpoint import make_folder, replacing, write_text
from .cases import Case
from .gate import EXTENT
from .layer import Layer, layer_inputs
from .limits import Bandwidth, peak_flops
from .measure import Call, interleave, spread
from .methods import METHODS, OURS, Attention, Method, Problem, UnaffordableError
from .options import BenchOptions, LatencyOptions
from .run import extra_memory, failure, forward, measure_case, no_room, refused, short_of_memory, step, torch_threads
from .table import MARKS

logger = logging.getLogger("sparse_mhsa")

SCHEMA = "sparse_mhsa-latency-1"
COMPARED = (OURS, "sdpa", "sdpa_masked", "flex", "reference_masked", "reference_gather")
DIRECTIONS = {"forward": "forward", "step": "forward and backward"}
KINDS = {"attention": "attention alone", "layer": "whole layer"}
PANELS = tuple(itertools.product(KINDS, DIRECTIONS))


class _Affordable(Method):
    """A method that is left out where the sizes measured before say that a call would take too long.

    Attributes:
        attend: what was prepared last, for the layers around it.
    """

    attend: Attention | None = None

    def __init__(self, method: Method, seconds: float) -> None:
        self.method, self.seconds, self.known = method, seconds, dict[int, float]()
        self.name, self.title, self.masked = method.name, method.title, method.masked
        self.stepwise, self.backward, self.quick = method.stepwise, method.backward, method.quick

    def memory(self, problem: Problem, *, backward: bool) -> int:
        return self.method.memory(problem, backward=backward)

    def prepare(self, problem: Problem) -> Attention:
        tokens = problem.case.num_tokens
        if self.known and self.name != OURS:
            before = max(self.known)
            expected = self.known[before] * (tokens / before) ** 2
            if expected > self.seconds:
                raise UnaffordableError(
                    f"left out: a call would take about {expected:.0f} s, --limit is {self.seconds:g}"
                )
        self.attend = self.method.prepare(problem)
        return self.attend


def bench_latency(options: LatencyOptions, command: str, methods: Sequence[Method] = METHODS) -> Path:
    """Measure, and write ``latency.json``, ``latency.md`` and ``latency.png`` into ``options.output_dir``.

    Args:
        options: sizes, mask and budget.
        command: what the user typed; the files quote it.
        methods: what there is to compare.

    Returns:
        The path of the table.

    Raises:
        ConfigError: the mask cannot be honoured.
        UsageError: a file or folder cannot be used.
    """
    require_packages("matplotlib")
    config = read_attention(options.attn_cfg)
    make_folder(options.output_dir)
    dtype = getattr(torch, options.dtype)
    rows: list[dict[str, Any]] = []
    report: dict[str, Any] = {
        "schema": SCHEMA,
        "created": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "command": command,
        "mask": config.mask,
        "attention_config": config.to_yaml(),
        "dtype": options.dtype,
        "methods": {method.name: method.title for method in methods if method.name in COMPARED},
        "rows": rows,
    }
    kernels = BenchOptions(repeat=options.repeat, budget=options.budget, memory=options.memory, dtypes=(options.dtype,))
    with torch_threads(options.threads):
        report["environment"] = environment()
        peak, bandwidth = peak_flops(dtype), Bandwidth()
        for batch in options.batches:
            compared = [_Affordable(method, options.limit) for method in methods if method.name in COMPARED]
            for tokens in sorted(options.tokens):
                case = Case(f"{config.mask}-{tokens}x{batch}", config, tokens, batch)
                alone: dict[str, dict[str, Any]] = {}
                for row in measure_case(case, dtype, compared, kernels, peak, bandwidth):
                    rows.append({"kind": "attention", **row})
                    logger.info("%s", _line(rows[-1], report))
                    _remember(compared, row)
                    alone[row["direction"]] = row["methods"]
                    _write(report, options.output_dir)  # what is measured survives a Ctrl-C
                for row in _layers(case, dtype, options, compared, alone):
                    rows.append(row)
                    logger.info("%s", _line(row, report))
                    _write(report, options.output_dir)
                for method in compared:
                    method.attend = None  # a dense mask takes the memory of the next size
    _plot(report, options.output_dir / "latency.png")
    return options.output_dir / "latency.md"


def _remember(compared: Sequence[_Affordable], row: dict[str, Any]) -> None:
    for method in compared:
        result = row["methods"][method.name]
        if result["status"] == "ok":
            seconds = result["seconds"]["median"]
            method.known[row["tokens"]] = max(seconds, method.known.get(row["tokens"], 0.0))


def _layers(
    case: Case,
    dtype: torch.dtype,
    options: LatencyOptions,
    compared: Sequence[_Affordable],
    alone: dict[str, dict[str, Any]],
) -> Iterator[dict[str, Any]]:
    """Whole layers: the same projections around every method that passed the gate and could be timed alone.

    Args:
        case: the size.
        dtype: of the inputs.
        options: turns, budget and limit.
        compared: the methods, prepared for this size.
        alone: their results by pass, without projections.
    """
    for direction in DIRECTIONS:
        results: dict[str, dict[str, Any]] = {}
        layers: dict[str, Layer] = {}
        for method in compared:
            result = alone[direction][method.name]
            if result["status"] != "ok" or method.attend is None:
                results[method.name] = result
            elif (seconds := result["seconds"]["median"]) > options.limit and method.name != OURS:
                reason = f"left out: attention alone takes {seconds:.0f} s, --limit is {options.limit:g}"
                results[method.name] = refused("left_out", reason)
            else:
                layers[method.name] = Layer(method.attend, case.num_heads)
        results |= _layer_times(case, dtype, options, direction, layers)
        yield {
            "kind": "layer",
            "direction": direction,
            "batch": case.batch,
            "tokens": case.num_tokens,
            "methods": {method.name: results[method.name] for method in compared},
        }


def _layer_times(
    case: Case, dtype: torch.dtype, options: LatencyOptions, direction: str, layers: dict[str, Layer]
) -> dict[str, dict[str, Any]]:
    backward = direction == "step"
    numbers = case.batch * case.num_heads * case.num_tokens * case.head_dim * dtype.itemsize
    # What goes in and comes out, q, k and v side by side, what attention gives; and the gradients of all of them: 7.2
    # and 11.8 times the input were seen.
    if layers and (refusal := no_room((13 if backward else 8) * numbers)) is not None:
        return dict.fromkeys(layers, refusal)
    try:
        inputs = layer_inputs(case, dtype)
        grad = torch.ones_like(inputs[0])
    except (MemoryError, RuntimeError) as error:  # not even room for what goes into the layers
        return {name: short_of_memory(error) for name in layers}
    results: dict[str, dict[str, Any]] = {}
    calls: dict[str, Call] = {}
    for name, layer in layers.items():
        call = partial(step, layer, inputs, grad) if backward else partial(forward, layer, inputs)
        try:
            call()  # not timed: what is compiled for other strides than alone would use up the budget
            calls[name] = call
        except (MemoryError, RuntimeError, ValueError) as error:
            results[name] = failure(name, error)
    turns = interleave(calls, repeat=options.repeat, budget=options.budget)
    results |= {name: refused("oom", message) for name, message in turns.short.items()}
    for name, times in turns.seconds.items():
        results[name] = {"status": "ok", "seconds": asdict(spread(times))}
        if options.memory and name != "flex":
            results[name] |= extra_memory(case, name, dtype, backward=backward, whole_layer=True)
    return results


def crossover(report: dict[str, Any], kind: str, direction: str, batch: int) -> dict[str, Any]:
    """Where sparse attention beats SDPA.

    Returns:
        ``sizes``: the numbers of tokens measured with both. ``tokens``: the least of them from which on sparse
        attention was always faster, None if there is none.
    """
    both = sorted(
        (row["tokens"], *(row["methods"].get(name, {}).get("seconds", {}).get("median") for name in (OURS, "sdpa")))
        for row in report["rows"]
        if (row["kind"], row["direction"], row["batch"]) == (kind, direction, batch)
    )
    both = [(tokens, ours, dense) for tokens, ours, dense in both if ours is not None and dense is not None]
    found = None
    for tokens, ours, dense in both:
        found = (tokens if found is None else found) if ours < dense else None
    return {"sizes": [tokens for tokens, *_ in both], "tokens": found}


def _write(report: dict[str, Any], folder: Path) -> None:
    report["crossover"] = [
        {"kind": kind, "direction": direction, "batch": batch, **crossover(report, kind, direction, batch)}
        for kind, direction in PANELS
        for batch in sorted({row["batch"] for row in report["rows"]})
    ]
    write_text(folder / "latency.json", json.dumps(report, indent=2, allow_nan=False) + "\n")
    write_text(folder / "latency.md", _markdown(report))


def _markdown(report: dict[str, Any]) -> str:
    machine, names = report["environment"], report["methods"]
    lines = [
        f"# Latency of `{report['mask']}`\n",
        f"Made by `{report['command']}` on {report['created']}: {machine['machine']}, {machine['threads']} threads, "
        f"load {machine['load_average']:.1f} at the start, torch {machine['torch']}, {report['dtype']}. Milliseconds, "
        f"medians; all methods of a row were compared with dense masked attention first, {EXTENT}, and then took "
        "turns. In brackets: peak memory beyond inputs and outputs, in MiB. Whole layers: the same projections around "
        "each method.\n",
        "| what | pass | B | N | " + " | ".join(names.values()) + " |",
        "|" + "---|" * (4 + len(names)),
    ]
    lines += [_line(row, report) for row in report["rows"]]
    lines += ["", "Sparse is faster than SDPA from N on, at every size measured:", ""]
    lines += [
        f"- {one['kind']}, {DIRECTIONS[one['direction']]}, batch {one['batch']}: "
        f"{one['tokens'] or ('at none' if one['sizes'] else 'not measured')}"
        for one in report["crossover"]
    ]
    reasons = [
        f"- {row['kind']}, {DIRECTIONS[row['direction']]}, B {row['batch']}, N {row['tokens']}, {names[name]}: "
        f"{result['reason']}"
        for row in report["rows"]
        for name, result in row["methods"].items()
        if result["status"] != "ok"
    ]
    return "\n".join([*lines, *(["", "Not measured:", "", *reasons] if reasons else [])]) + "\n"


def _line(row: dict[str, Any], report: dict[str, Any]) -> str:
    cells = [row["kind"], DIRECTIONS[row["direction"]], str(row["batch"]), str(row["tokens"])]
    for name in report["methods"]:
        result = row["methods"].get(name)
        if result is None:
            cells.append("")
        elif result["status"] != "ok":
            cells.append(MARKS[result["status"]])
        else:
            extra = result.get("extra_bytes")
            shown = f"{1e3 * result['seconds']['median']:.3g}"
            cells.append(shown if extra is None else f"{shown} [{extra / 2**20:.0f}]")
    return "| " + " | ".join(cells) + " |"


def _plot(report: dict[str, Any], path: Path) -> None:
    from matplotlib.figure import Figure
    from matplotlib.ticker import NullLocator

    tokens = sorted({row["tokens"] for row in report["rows"]})
    batches = sorted({row["batch"] for row in report["rows"]})
    figure = Figure(figsize=(5 * len(batches), 4 * len(PANELS)), layout="constrained")
    for line, (kind, direction) in zip(figure.subplots(len(PANELS), len(batches), squeeze=False), PANELS, strict=True):
        for axes, batch in zip(line, batches, strict=True):
            about = (kind, direction, batch)
            rows = [row for row in report["rows"] if (row["kind"], row["direction"], row["batch"]) == about]
            for place, (name, title) in enumerate(report["methods"].items()):
                results = [(row["tokens"], row["methods"][name]) for row in rows if name in row["methods"]]
                points = [(number, 1e3 * one["seconds"]["median"]) for number, one in results if one["status"] == "ok"]
                if results:
                    x, y = zip(*points, strict=True) if points else ((), ())
                    axes.plot(x, y, marker="o", markersize=3, label=title, color=f"C{place}")
                for number, one in results:
                    if one["status"] != "ok":
                        at, mark = (number, 0.02 + 0.045 * place), MARKS[one["status"]]
                        axes.annotate(
                            mark, at, xycoords=("data", "axes fraction"), color=f"C{place}", fontsize=5, ha="center"
                        )
            axes.set_xscale("log")
            if any(len(line.get_xdata()) for line in axes.lines):  # a logarithm needs something that was timed
                axes.set_yscale("log")
            axes.margins(x=0.15, y=0.45)  # for the legend above and the marks below
            axes.update_datalim([(number, 1.0) for number in tokens], updatey=False)
            axes.autoscale_view()
            axes.set_xticks(tokens, labels=[str(number) for number in tokens])
            axes.xaxis.set_minor_locator(NullLocator())
            axes.set_xlabel("tokens")
            axes.set_ylabel("ms")
            axes.set_title(f"{KINDS[kind]}, {DIRECTIONS[direction]}, batch {batch}", fontsize=9)
            axes.grid(color="#e9ecf1")
            axes.legend(fontsize=6, loc="upper left")
    with replacing(path) as file:
        figure.savefig(file, dpi=150)
