"""The pictures of a report, as text for an HTML page: inline SVG for curves, PNG data for images."""

import base64
import io
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.ticker import LogLocator, MaxNLocator, NullLocator, ScalarFormatter
from numpy.typing import NDArray
from torch import Tensor

if TYPE_CHECKING:
    from ..mask import Mask

COLOURS = {"dense": "#8a94a6", "sparse": "#0b7a75"}
"""One colour per run, everywhere in the report."""
SHOWN_CLASSES = 10
"""At most so many classes, or images without classes, are shown in a report."""
INK, FRAME, MARK = "#1d2433", "#c5cad3", "#e4572e"


def training_curves(runs: Mapping[str, Mapping[str, Any]]) -> str:
    """Test accuracy and training loss per epoch, one line per run.

    Args:
        runs: by name: ``title`` and ``epochs`` (the run's log).
    """
    figure = Figure(figsize=(9, 3.1), layout="constrained")
    accuracy, loss = figure.subplots(1, 2)
    for name, run in runs.items():
        epochs = [entry["epoch"] + 1 for entry in run["epochs"]]
        look = {"color": COLOURS[name], "marker": "o", "markersize": 4, "linewidth": 2, "label": run["title"]}
        accuracy.plot(epochs, [entry["test_acc1"] for entry in run["epochs"]], **look)
        loss.plot(epochs, [entry["train_loss"] for entry in run["epochs"]], **look)
    accuracy.set_ylim(0, 100)
    loss.set_ylim(bottom=0)
    for axes, title in ((accuracy, "Test top-1 (%)"), (loss, "Training loss")):
        axes.set_title(title, loc="left", fontsize=10, color=INK)
        axes.set_xlabel("epoch")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.grid(color="#e9ecf1")
        axes.tick_params(color=FRAME)
        for side, spine in axes.spines.items():
            spine.set_visible(side in ("left", "bottom"))
            spine.set_color(FRAME)
    accuracy.legend(frameon=False, loc="lower right")
    return svg(figure)


def mask_grid(masks: Sequence["Mask"]) -> str:
    """Every head (column) of every layer (row); a point is a query (row) that attends to a key (column).

    Args:
        masks: one per layer.
    """
    layers, heads = len(masks), masks[0].num_heads
    figure = Figure(figsize=(2.1 * heads, 2.25 * layers), layout="constrained")
    for layer, row in enumerate(figure.subplots(layers, heads, squeeze=False)):
        kept = masks[layer].nnz_per_head
        for head, axes in enumerate(row):
            masks[layer].plot(heads=[head], ax=axes)
            share = kept[head] / masks[layer].num_tokens ** 2
            _label(axes, f"layer {layer}, head {head}: {100 * share:.1f} %")
    return _png(figure)


def visible_patches(
    image: NDArray[np.float32],
    mask: NDArray[np.bool_],
    patch: tuple[int, int],
    patch_size: int,
    num_prefix: int,
) -> str:
    """What one patch sees: the image, and per head the image with what it does not attend to tinted.

    Args:
        image: (H, W) or (H, W, 3), values in [0, 1].
        mask: (heads, N, N) of one layer, True = keep; patches are in row-major order.
        patch: row and column of the query on the patch grid.
        patch_size: pixels per patch side.
        num_prefix: tokens before the first patch.
    """
    rows, columns = (side // patch_size for side in image.shape[:2])
    query = num_prefix + patch[0] * columns + patch[1]
    figure = Figure(figsize=(1.75 * (len(mask) + 2), 2.0), layout="constrained")
    first, *others = figure.subplots(1, len(mask) + 2)
    _picture(first, image)
    _label(first, "the image")
    views = [*mask[:, query, num_prefix:], mask[:, query, num_prefix:].any(axis=0)]
    for index, (axes, seen) in enumerate(zip(others, views, strict=True)):
        seen_pixels = seen.reshape(rows, columns).repeat(patch_size, axis=0).repeat(patch_size, axis=1)
        _picture(axes, image, shade=~seen_pixels)
        name = f"head {index}" if index < len(mask) else "all heads"
        _label(axes, f"{name}: {int(seen.sum())} patches")
    for axes in (first, *others):
        corner = (patch[1] * patch_size - 0.5, patch[0] * patch_size - 0.5)
        axes.add_patch(Rectangle(corner, patch_size, patch_size, fill=False, edgecolor=MARK, linewidth=1.6))
    return _png(figure)


def predictions(
    images: Sequence[NDArray[np.float32]], labels: Sequence[str], guesses: Mapping[str, Sequence[str]]
) -> str:
    """Test images with what each run says; mistakes are red.

    Args:
        images: (H, W) or (H, W, 3) each, values in [0, 1].
        labels: the true class of each.
        guesses: by run title: the predicted class of each.
    """
    figure = Figure(figsize=(1.05 * len(images), 1.3 + 0.2 * len(guesses)), layout="constrained")
    for index, axes in enumerate(figure.subplots(1, len(images), squeeze=False)[0]):
        _picture(axes, images[index])
        _label(axes, f"is {labels[index]}")
        for line, (title, guess) in enumerate(guesses.items()):
            wrong = guess[index] != labels[index]
            axes.text(
                0.5,
                -0.08 - 0.2 * line,
                f"{title}: {guess[index]}",
                transform=axes.transAxes,
                ha="center",
                va="top",
                fontsize=7,
                color=MARK if wrong else INK,
                weight="bold" if wrong else "normal",
            )
    return _png(figure)


def pixels(image: Tensor, mean: Sequence[float], std: Sequence[float]) -> NDArray[np.float32]:
    """A normalised image (C, H, W) as (H, W) or (H, W, 3) values in [0, 1]."""
    restored = image.float() * torch.tensor(std)[:, None, None] + torch.tensor(mean)[:, None, None]
    return restored.clamp(0, 1).permute(1, 2, 0).squeeze(-1).numpy().astype(np.float32)


CURVES = {
    "Loss": {"train_loss": "training", "test_loss": "test", "ema_test_loss": "test, averaged weights"},
    "Top-1 (%)": {"train_acc1": "training", "test_acc1": "test", "ema_test_acc1": "test, averaged weights"},
    "Learning rate": {"train_lr": "at the end of the epoch"},
}
"""What is drawn of a run, if its log has it: by panel, the keys of the log and what they are."""


def run_curves(history: Sequence[Mapping[str, float]]) -> str:
    """Losses, accuracies where there are any, and the learning rate of one run per epoch."""
    panels = {title: [name for name in names if name in history[0]] for title, names in CURVES.items()}
    panels = {title: names for title, names in panels.items() if names}
    figure = Figure(figsize=(3.6 * len(panels), 3.1), layout="constrained")
    epochs = [entry["epoch"] + 1 for entry in history]
    for axes, (title, names) in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels.items(), strict=True):
        for name, colour in zip(names, (*COLOURS.values(), MARK), strict=False):
            values = [entry[name] for entry in history]
            axes.plot(epochs, values, color=colour, linewidth=2, marker="o", markersize=3, label=CURVES[title][name])
        axes.set_title(title, loc="left", fontsize=10, color=INK)
        axes.set_xlabel("epoch")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.grid(color="#e9ecf1")
        axes.legend(frameon=False, fontsize=8)
    return svg(figure)


def bars(values: Sequence[float], place: str, about: str) -> str:
    """One bar per value.

    Args:
        values: numbers.
        place: what the position of a bar means.
        about: what its height means.
    """
    figure = Figure(figsize=(6, 2.6), layout="constrained")
    axes = figure.subplots()
    axes.bar(range(len(values)), values, color=COLOURS["sparse"])
    axes.set_xticks(range(len(values)))
    axes.set_xlabel(place)
    axes.set_ylabel(about)
    axes.axhline(0, color=FRAME, linewidth=0.8)
    return svg(figure)


def matrices(values: Mapping[str, Sequence[Sequence[float]]], columns: str, rows: str) -> str:
    """Small matrices side by side on one colour scale, with their numbers.

    Args:
        values: by title.
        columns: what a column is.
        rows: what a row is.
    """
    arrays = {title: np.asarray(matrix) for title, matrix in values.items()}
    across = min(4, len(arrays))
    down = -(-len(arrays) // across)
    figure = Figure(figsize=(2.8 * across, 2.7 * down), layout="constrained")
    low = min(0.0, *(float(array.min()) for array in arrays.values()))
    high = max(1e-9, *(float(array.max()) for array in arrays.values()))
    grid = figure.subplots(down, across, squeeze=False).ravel()
    for axes in grid[len(arrays) :]:
        axes.set_axis_off()
    for axes, (title, array) in zip(grid, arrays.items(), strict=False):
        axes.imshow(array, vmin=low, vmax=high, cmap="viridis")
        for axis in (axes.xaxis, axes.yaxis):
            axis.set_major_locator(MaxNLocator(integer=True))
        axes.set_title(title, fontsize=8, color=INK)
        axes.set_xlabel(columns, fontsize=7)
        axes.set_ylabel(rows, fontsize=7)
        axes.tick_params(labelsize=6)
        if array.size <= 64:
            for row, column in np.ndindex(*array.shape):
                value = array[row, column]
                # The bright end of the colour scale takes dark letters.
                colour = INK if value > low + 0.6 * (high - low) else "white"
                axes.text(column, row, f"{value:.2g}", ha="center", va="center", fontsize=6, color=colour)
    return _png(figure)


def degree_histograms(records: Sequence[Mapping[str, Any]]) -> str:
    """How many queries keep how many keys, one panel per layer and one line per head.

    Args:
        records: of `structure.mask_record`.
    """
    across = min(4, len(records))
    down = -(-len(records) // across)
    figure = Figure(figsize=(2.8 * across, 2.2 * down), layout="constrained")
    grid = figure.subplots(down, across, squeeze=False, sharex=True).ravel()
    for axes in grid[len(records) :]:
        axes.set_axis_off()
    for axes, record in zip(grid, records, strict=False):
        for head, pairs in enumerate(record["degrees"]):
            keys, queries = zip(*pairs, strict=True)
            axes.plot(keys, queries, marker=".", markersize=3, linewidth=0.8, label=f"head {head}")
        axes.set_title(f"layer {record['layer']}", fontsize=8, color=INK)
        axes.set_xlabel("keys of a query", fontsize=7)
        axes.set_ylabel("queries", fontsize=7)
        axes.set_xscale("log")
        axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.xaxis.set_major_formatter(ScalarFormatter())
        axes.xaxis.set_minor_locator(NullLocator())
        axes.tick_params(labelsize=6)
    grid[0].legend(fontsize=5, frameon=False)
    return _png(figure)


def picture_rows(rows: Mapping[str, Sequence[NDArray[np.float32]]]) -> str:
    """Rows of pictures, each with a name.

    Args:
        rows: by name: (H, W) or (H, W, 3) images, values in [0, 1], as many in every row.
    """
    columns = max(map(len, rows.values()))
    figure = Figure(figsize=(1.1 * columns, 1.3 * len(rows)), layout="constrained")
    for line, (name, images) in zip(figure.subplots(len(rows), columns, squeeze=False), rows.items(), strict=True):
        for axes, image in zip(line, images, strict=True):
            _picture(axes, image)
            _label(axes, "")
        line[0].set_title(name, fontsize=8, color=INK, loc="left")
    return _png(figure)


def _picture(axes: Axes, image: NDArray[np.float32], shade: NDArray[np.bool_] | None = None) -> None:
    grey = image.ndim == 2
    # Inverted for grey images (dark strokes on white), so that what is hidden can be tinted.
    pixels = np.repeat(1 - image[..., None], 3, axis=-1) if grey else image
    if shade is not None:
        tint = np.array([0.80, 0.84, 0.88], dtype=np.float32)
        pixels = np.where(shade[..., None], 0.25 * pixels + 0.75 * tint, pixels)
    axes.imshow(pixels.clip(0, 1), interpolation="nearest")


def _label(axes: Axes, title: str) -> None:
    axes.set_title(title, fontsize=8, color=INK)
    axes.set_xticks([])
    axes.set_yticks([])
    for spine in axes.spines.values():
        spine.set_color(FRAME)


def _png(figure: Figure) -> str:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=120)
    data = base64.b64encode(buffer.getvalue()).decode("ascii")
    return f'<img alt="" src="data:image/png;base64,{data}">'


def svg(figure: Figure) -> str:
    """A figure as inline SVG, the same text for the same data."""
    buffer = io.StringIO()
    with rc_context({"svg.fonttype": "none", "svg.hashsalt": "sparse_mhsa"}):
        figure.savefig(
            buffer,
            format="svg",
            transparent=True,
            metadata=dict.fromkeys(("Creator", "Date", "Format", "Type")),
        )
    text = buffer.getvalue()
    return text[text.index("<svg") :]
