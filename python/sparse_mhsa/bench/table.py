"""The results as text: one line per row, for the terminal and for Markdown."""

import datetime
from collections.abc import Mapping
from typing import Any

from ..machine import environment
from .gate import EXTENT
from .methods import OURS

DIRECTIONS = {"forward": "forward", "step": "forward + backward"}
MARKS = {"failed": "FAILED", "unsupported": "unsupported", "left_out": "left out", "oom": "out of memory"}


def table_head(report: Mapping[str, Any], dtype: str) -> str:
    """Title and head of the table of one dtype, as Markdown."""
    titles = [title for name, title in report["methods"].items() if name != OURS]
    columns = ["row", "pass", "density", "ms", "ns / edge", "of FMA peak", "of bandwidth", "of gather", "extra MB"]
    columns += ["choice ms", "choice / QK^T", "mask ms", "first call ms", *(f"x {title}" for title in titles)]
    rate = report["limits"]["flops"][dtype] / 1e9
    return "\n".join(
        [
            f"\n{dtype}, {report['environment']['threads']} threads, matrix product {rate:.0f} GFLOP/s\n",
            _line(columns),
            "|" + "---|" * len(columns),
        ]
    )


def row_line(row: Mapping[str, Any], report: Mapping[str, Any]) -> str:
    """One row as a line of the table."""
    ours = row["methods"][OURS]
    ratios = [_ratio(row["methods"][name], ours) for name in report["methods"] if name != OURS]
    return _line([row["case"], DIRECTIONS[row["direction"]], _share(row["density"]), *_own(ours), *ratios])


def new_report(schema: str, command: str) -> dict[str, Any]:
    """A report without rows: what the user typed, when, and on which machine."""
    return {
        "schema": schema,
        "created": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "command": command,
        "environment": environment(),
        "rows": [],
    }


def made_by(report: Mapping[str, Any]) -> str:
    """Where the numbers of a report come from, as a paragraph."""
    machine = report["environment"]
    return (
        f"Made by `{report['command']}` on {report['created']}: {machine['machine']}, {machine['cores']} cores, "
        f"{machine['threads']} threads, load {machine['load_average']:.1f} at the start, torch {machine['torch']}, "
        f"sparse_mhsa {machine['sparse_mhsa']}.\n"
    )


def markdown(report: Mapping[str, Any]) -> str:
    """The whole report as Markdown."""
    parts = [
        "# Kernels\n",
        made_by(report),
        f"Every method of a row was first compared with dense masked attention in float64, {EXTENT}, then timed in "
        "one process with the others, taking turns. "
        "`ms`, `ns / edge` and shares are of sparse_mhsa; `x METHOD` is how many times longer METHOD takes, the median "
        "over turns and the quartiles. `of bandwidth`: inputs and outputs moved once; "
        "`of gather`: a row read per edge and operand (above 100 % where edges share what they read). `extra MB`: peak "
        "memory beyond inputs, outputs and gradients in a fresh process; `mask ms` and `first call ms` likewise. Where "
        "edges are chosen by content, the choice is part of `ms`, while the other methods are given the edges; "
        "`choice ms` is the choice alone, and `choice / QK^T` its time over half that of dense SDPA, whose other half "
        "is the product with the values.",
    ]
    for dtype in report["limits"]["flops"]:
        rows = [row for row in report["rows"] if row["dtype"] == dtype]
        parts.append("\n".join([table_head(report, dtype), *(row_line(row, report) for row in rows)]))
    reasons = {
        f"- {row['case']}, {row['dtype']}, {DIRECTIONS[row['direction']]}, {report['methods'][name]}: "
        f"{MARKS[result['status']]}: {result['reason']}"
        for row in report["rows"]
        for name, result in row["methods"].items()
        if result["status"] != "ok"
    }
    if reasons:
        parts.append("\nNot measured:\n\n" + "\n".join(sorted(reasons)))
    rates = ", ".join(f"{_size(int(size))} {rate / 1e9:.0f}" for size, rate in report["limits"]["bandwidth"].items())
    parts.append(f"\nBandwidth by working set per thread (GB/s, all threads): {rates}.")
    return "\n".join(parts) + "\n"


def _own(ours: Mapping[str, Any]) -> list[str]:
    if ours["status"] != "ok":
        return [MARKS[ours["status"]], *[""] * 9]
    share, choice = ours["bandwidth"], ours.get("choice", {})
    return [
        f"{1e3 * ours['seconds']['median']:.3g}",
        f"{ours['ns_per_edge']:.2f}" if "ns_per_edge" in ours else "",
        f"{ours['flops_share']:.0%}" if "flops_share" in ours else "",
        f"{share['compulsory_share']:.0%}",
        f"{share['gather_share']:.0%}" if "gather_share" in share else "",
        f"{ours['extra_bytes'] / 1e6:.1f}" if "extra_bytes" in ours else "",
        f"{1e3 * choice['seconds']['median']:.3g}" if choice else "",
        _spread(choice["over_qkt"]) if "over_qkt" in choice else "",
        f"{1e3 * ours['mask_seconds']:.2f}" if "mask_seconds" in ours else "",
        f"{1e3 * ours['first_call_seconds']:.2f}" if "first_call_seconds" in ours else "",
    ]


def _ratio(result: Mapping[str, Any], ours: Mapping[str, Any]) -> str:
    if result["status"] != "ok":
        return MARKS[result["status"]]
    if ours["status"] != "ok":
        return ""
    return _spread(result["speedup_of_ours"])


def _spread(ratio: Mapping[str, float]) -> str:
    return f"{ratio['median']:.3g} ({ratio['lower_quartile']:.3g} to {ratio['upper_quartile']:.3g})"


def _share(density: float | None) -> str:
    return "no edges" if density is None else f"{density:.2%}"


def _size(size: int) -> str:
    return f"{size >> 20} MiB" if size >= 1 << 20 else f"{size >> 10} KiB"


def _line(cells: list[str]) -> str:
    return "| " + " | ".join(cells) + " |"
