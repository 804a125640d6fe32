"""The kernel that the cost model chooses, against every other one that can compute the mask.

All of them take turns in one process, each behind the gate of `bench kernels`. A choice that takes more than
`TOLERATED` times as long as another kernel is wrong.
"""

import json
import logging
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from .._core import force_kernel
from ..train.checkpoint import make_folder, write_text
from .cases import Case, all_cases, select
from .limits import Bandwidth, peak_flops
from .methods import OURS, Attention, Problem, Sparse, UnsupportedError
from .options import BenchOptions
from .run import exit_code, measure_case, torch_threads
from .table import DIRECTIONS, made_by, new_report

logger = logging.getLogger("sparse_mhsa")

SCHEMA = "sparse_mhsa-bench-choice-1"
KERNELS = ("edges", "lines", "panels")
TOLERATED = 1.3
LONGEST = 4097
"""Kernels that are not chosen may take long: longer sequences are left out."""


class Forced(Sparse):
    """This package with one kernel for all heads, or with the chosen ones.

    Args:
        kernel: its name, None for the choice.
    """

    def __init__(self, kernel: str | None) -> None:
        self.kernel = kernel
        self.name = self.title = kernel or OURS

    def prepare(self, problem: Problem) -> Attention:
        """See that the kernel computes every head."""
        attend = super().prepare(problem)
        if self.kernel is not None and set(kernels_of(problem, self.kernel)) != {self.kernel}:
            raise UnsupportedError("does not compute every head")

        def forced(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            # Not undone: the backward pass comes later, and whatever is called next says what it wants.
            force_kernel(self.kernel)
            return attend(q, k, v)

        return forced


def kernels_of(problem: Problem, kernel: str | None) -> list[str]:
    """The kernels of all heads, sorted and each once, if ``kernel`` is forced."""
    force_kernel(kernel)
    return sorted({str(head.kernel) for head in problem.mask.explain(problem.case.head_dim).heads})


def cases() -> list[Case]:
    """Every row of `bench kernels` whose edges stand, and windows, steps and widths of head between two kernels."""
    rows = [case for case in all_cases() if case.num_tokens <= LONGEST and not case.layer_mask.by_content]
    rows = [case for case in rows if Problem(case, torch.float32).backend is None]
    for window in (1, 2, 4, 8, 16, 32):
        config = {"mask": "local", "mask_kwargs": {"window": window}, "num_prefix_tokens": 1}
        rows.append(Case(f"window{window}-1025", config, 1025, quick=window in (2, 8)))
    for dilation in (2, 4):
        config = {"mask": "local", "mask_kwargs": {"window": 16, "dilation": dilation}}
        rows.append(Case(f"dilated{dilation}-1025", config, 1025))
    for head_dim in (32, 80, 128):
        config = {"mask": "local", "mask_kwargs": {"window": 8}, "num_prefix_tokens": 1}
        rows.append(Case(f"window8-d{head_dim}-1025", config, 1025, head_dim=head_dim))
    return rows


def bench_choice(options: BenchOptions, command: str, rows: Sequence[Case] | None = None) -> int:
    """Measure the rows that ``options`` select and write ``choice.json`` and ``choice.md``.

    Args:
        options: what the command line says.
        command: what the user typed; the files quote it.
        rows: what to measure; `cases` but for tests.

    Returns:
        The exit code: 1 if a kernel computed the wrong thing or a choice is wrong, else 0.

    Raises:
        UsageError: an option cannot be used as given.
    """
    selected = select(cases() if rows is None else rows, options.rows, quick=options.quick)
    make_folder(options.output_dir)
    methods = [Forced(None), *map(Forced, KERNELS)]
    options = replace(options, memory=False, plots=False)
    report = new_report(SCHEMA, command)
    try:
        with torch_threads(options.threads):
            bandwidth = Bandwidth()
            logger.info("%s", _head())
            for name in options.dtypes:
                dtype = getattr(torch, name)
                peak = peak_flops(dtype)
                for case in selected:
                    chosen = kernels_of(Problem(case, dtype), None)
                    for row in measure_case(case, dtype, methods, options, peak, bandwidth):
                        row["chosen"], row["best"] = chosen, _best(row)
                        report["rows"].append(row)
                        logger.info("%s", _line(row))
                    _write(report, options)
    finally:
        force_kernel(None)
    logger.info("written: %s", options.output_dir / "choice.md")
    wrong = [row for row in report["rows"] if row["best"] is not None and row["best"] < 1 / TOLERATED]
    for row in wrong:
        logger.error("WRONG CHOICE %s %s: another kernel takes %.2f of its time", *_names(row), row["best"])
    return max(exit_code(report), int(bool(wrong)))


def _best(row: dict[str, Any]) -> float | None:
    """The time of the fastest kernel over that of the choice."""
    ratios = [row["methods"][name].get("speedup_of_ours") for name in KERNELS]
    return min((ratio["median"] for ratio in ratios if ratio is not None), default=None)


def _names(row: dict[str, Any]) -> tuple[str, str]:
    return f"{row['case']} {row['dtype']}", DIRECTIONS[row["direction"]]


def _write(report: dict[str, Any], options: BenchOptions) -> None:
    write_text(options.output_dir / "choice.json", json.dumps(report, indent=2, allow_nan=False) + "\n")
    page = [
        "# Choice of kernels\n",
        made_by(report),
        "`ms` is the time with the kernels that the cost model chooses; the other columns say how many times longer "
        "the mask takes with one kernel for all heads: median over turns and quartiles, each behind a comparison with "
        f"dense attention in float64. A choice is wrong where one of them is below {1 / TOLERATED:.2f}.\n",
        _head(),
        *(_line(row) for row in report["rows"]),
    ]
    write_text(options.output_dir / "choice.md", "\n".join(page) + "\n")


def _head() -> str:
    columns = ["row", "dtype", "pass", "chosen", "ms", *KERNELS, ""]
    return "\n".join(("| " + " | ".join(columns) + " |", "|" + "---|" * len(columns)))


def _line(row: dict[str, Any]) -> str:
    ours = row["methods"][OURS]
    cells = [row["case"], row["dtype"], DIRECTIONS[row["direction"]], ", ".join(row["chosen"])]
    cells.append(f"{1e3 * ours['seconds']['median']:.3g}" if ours["status"] == "ok" else ours["status"])
    for name in KERNELS:
        ratio = row["methods"][name].get("speedup_of_ours")
        if ratio is None:
            cells.append("-" if row["methods"][name]["status"] == "unsupported" else row["methods"][name]["status"])
        else:
            cells.append(f"{ratio['median']:.2f} ({ratio['lower_quartile']:.2f} to {ratio['upper_quartile']:.2f})")
    cells.append("WRONG" if row["best"] is not None and row["best"] < 1 / TOLERATED else "")
    return "| " + " | ".join(cells) + " |"
