"""The results as text: one line per row, for the terminal and for Markdown."""

from collections.abc import Mapping
from typing import Any

from .methods import OURS

DIRECTIONS = {"forward": "forward", "step": "forward + backward"}
MARKS = {"failed": "FAILED", "unsupported": "-", "oom": "OOM"}


def table_head(report: Mapping[str, Any], dtype: str) -> str:
    """Title and head of the table of one dtype, as Markdown."""
    titles = [title for name, title in report["methods"].items() if name != OURS]
    columns = ["row", "pass", "density", "ms", "ns / edge", "of FMA peak", "of bandwidth", "of gather", "extra MB"]
    columns += ["mask ms", "first call ms", *(f"x {title}" for title in titles)]
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
    return _line([row["case"], DIRECTIONS[row["direction"]], f"{row['density']:.2%}", *_own(ours), *ratios])


def markdown(report: Mapping[str, Any]) -> str:
    """The whole report as Markdown."""
    environment = report["environment"]
    parts = [
        "# Kernels\n",
        f"Made by `{report['command']}` on {report['created']}: {environment['machine']}, "
        f"{environment['cores']} cores, {environment['threads']} threads, "
        f"load {environment['load_average']:.1f} at the start, "
        f"torch {environment['torch']}, sparse_mhsa {environment['sparse_mhsa']}.\n",
        "Every method of a row was first compared with dense masked attention in float64, then timed in one process "
        "with the others, taking turns. `ms`, `ns / edge` and shares are of sparse_mhsa; `x METHOD` is how many times "
        "longer METHOD takes, the median over turns and the quartiles. `of bandwidth`: inputs and outputs moved once; "
        "`of gather`: a row read per edge and operand (above 100 % where edges share what they read). `extra MB`: peak "
        "memory beyond inputs, outputs and gradients in a fresh process; `mask ms` and `first call ms` likewise.",
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
        return [MARKS[ours["status"]], *[""] * 7]
    share = ours["bandwidth"]
    cells = [
        f"{1e3 * ours['seconds']['median']:.3g}",
        f"{ours['ns_per_edge']:.2f}",
        f"{ours['flops_share']:.0%}",
        f"{share['compulsory_share']:.0%}",
        f"{share['gather_share']:.0%}",
    ]
    if "extra_bytes" not in ours:
        return [*cells, "", "", ""]
    return [
        *cells,
        f"{ours['extra_bytes'] / 1e6:.1f}",
        f"{1e3 * ours['mask_seconds']:.2f}",
        f"{1e3 * ours['first_call_seconds']:.2f}",
    ]


def _ratio(result: Mapping[str, Any], ours: Mapping[str, Any]) -> str:
    if result["status"] != "ok":
        return MARKS[result["status"]]
    if ours["status"] != "ok":
        return ""
    ratio = result["speedup_of_ours"]
    return f"{ratio['median']:.3g} ({ratio['lower_quartile']:.3g} to {ratio['upper_quartile']:.3g})"


def _size(size: int) -> str:
    return f"{size >> 20} MiB" if size >= 1 << 20 else f"{size >> 10} KiB"


def _line(cells: list[str]) -> str:
    return "| " + " | ".join(cells) + " |"
