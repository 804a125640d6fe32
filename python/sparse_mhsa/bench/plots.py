"""The results as pictures: how much longer every method takes, and the rows against the machine's limits."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..train.checkpoint import replacing
from .methods import OURS
from .table import DIRECTIONS


def plot(report: Mapping[str, Any], folder: Path) -> list[Path]:
    """Draw ``kernels-DTYPE-PASS.png`` for every dtype and pass: one group of bars per row, one bar per method.

    Returns:
        The files written.
    """
    import matplotlib

    matplotlib.use("agg")
    import matplotlib.pyplot as plt

    written = []
    for dtype in report["limits"]["flops"]:
        for direction, about in DIRECTIONS.items():
            rows = [row for row in report["rows"] if (row["dtype"], row["direction"]) == (dtype, direction)]
            rows = [row for row in rows if row["methods"][OURS]["status"] == "ok"]
            if not rows:
                continue
            others = [name for name in report["methods"] if name != OURS]
            figure, axes = plt.subplots(figsize=(8, 1.5 + 0.16 * len(rows) * (len(others) + 1)), layout="constrained")
            height = 0.8 / len(others)
            for index, name in enumerate(others):
                places, ratios, errors = [], [], []
                for position, row in enumerate(rows):
                    result = row["methods"][name]
                    if result["status"] == "ok":
                        ratio = result["speedup_of_ours"]
                        places.append(position + (index - (len(others) - 1) / 2) * height)
                        ratios.append(ratio["median"])
                        errors.append(
                            (ratio["median"] - ratio["lower_quartile"], ratio["upper_quartile"] - ratio["median"])
                        )
                if places:
                    spread = list(zip(*errors, strict=True))
                    axes.barh(places, ratios, height, xerr=spread, label=report["methods"][name], error_kw={"lw": 0.8})
            axes.set_xscale("log")
            axes.axvline(1, color="black", lw=0.8)
            axes.set_yticks(range(len(rows)), [row["case"] for row in rows])
            axes.invert_yaxis()
            axes.set_xlabel("times as long as sparse_mhsa (median and quartiles)")
            axes.set_title(f"{about}, {dtype}, {report['environment']['threads']} threads")
            if axes.get_legend_handles_labels()[0]:
                axes.legend(fontsize="small")
            path = folder / f"kernels-{dtype}-{direction}.png"
            with replacing(path) as file:
                figure.savefig(file, dpi=150)
            plt.close(figure)
            written.append(path)
    return written
