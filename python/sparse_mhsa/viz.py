"""Pictures of masks, made from at most a few hundred pixels a side and never from an N x N matrix."""

import math
import struct
import zlib
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from .extras import needed_for

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from .mask import Mask

MAX_PIXELS = 512
"""Longest side of the picture of one head."""
GAMMA = 0.5
"""Exponent that keeps a few edges in a large cell visible."""


def plot(
    mask: "Mask", heads: Sequence[int] | None = None, ax: "Axes | None" = None, size: int = MAX_PIXELS
) -> "list[Axes]":
    """Draw heads of a mask, dark where edges are kept, queries downwards and keys to the right.

    Args:
        mask: what to draw.
        heads: which heads; default is all of them.
        ax: where to draw; needs exactly one head. Default is a new figure with one plot per head.
        size: longest side in pixels of one head, at most 512.

    Returns:
        The axes, one per head.

    Raises:
        ImportError: matplotlib is not installed.
        ValueError: ``heads`` is empty or names a head the mask does not have, or ``ax`` is given with
            several.
    """
    with needed_for("a plot", "matplotlib"):
        from matplotlib import pyplot as plt

    chosen = list(range(mask.num_heads)) if heads is None else list(heads)
    if not chosen or any(not 0 <= head < mask.num_heads for head in chosen):
        raise ValueError(f"heads: expected numbers from 0 to {mask.num_heads - 1}, got {chosen}")
    if ax is not None:
        if len(chosen) != 1:
            raise ValueError(f"heads: expected one head to draw on `ax`, got {len(chosen)}")
        axes = [ax]
    else:
        columns = min(4, len(chosen))
        rows = math.ceil(len(chosen) / columns)
        figure, grid = plt.subplots(
            rows, columns, figsize=(2.4 * columns, 2.6 * rows), squeeze=False, layout="constrained"
        )
        figure.suptitle(f"{mask.name}, {mask.num_tokens} tokens, density {mask.density:.2%}")
        axes = list(grid.flat)[: len(chosen)]
        for unused in list(grid.flat)[len(chosen) :]:
            unused.set_axis_off()
    entries = max(1, mask.num_tokens**2)
    nnz = mask.nnz_per_head
    for head, place in zip(chosen, axes, strict=True):
        image = mask.density_image(head, min(size, MAX_PIXELS))
        extent = (-0.5, mask.num_tokens - 0.5, mask.num_tokens - 0.5, -0.5)
        place.imshow(image**GAMMA, cmap="Greys", vmin=0.0, vmax=1.0, extent=extent, interpolation="nearest")
        place.set_title(f"head {head}, density {nnz[head] / entries:.2%}", fontsize="small")
        place.tick_params(labelsize="x-small")
        # A frame on the edge would hide the dense row and column of the CLS token.
        place.spines[:].set_position(("outward", 3))
        place.spines[:].set_color("lightgrey")
    return axes


def heat_maps(maps: Mapping[str, Sequence[Sequence[float]]], rows: Sequence[str], label: str) -> "list[Axes]":
    """Draw a share per layer (downwards) and head (to the right), one heat map per name, all from 0 to 1.

    Args:
        maps: by title, one list per layer with a share per head; layers may differ in heads.
        rows: names of the layers.
        label: what the colours mean.

    Returns:
        The axes, one per name.

    Raises:
        ImportError: matplotlib is not installed.
    """
    with needed_for("a plot", "matplotlib"):
        from matplotlib import pyplot as plt

    heads = max((len(line) for shares in maps.values() for line in shares), default=1)
    size = (1.6 + len(maps) * (0.6 + 0.22 * heads), 1.2 + 0.28 * len(rows))
    figure, grid = plt.subplots(1, len(maps), figsize=size, squeeze=False, layout="constrained", sharey=True)
    places = list(grid.flat)
    for place, (title, shares) in zip(places, maps.items(), strict=True):
        image = np.full((len(rows), heads), np.nan)
        for row, line in zip(image, shares, strict=True):
            row[: len(line)] = line
        drawn = place.imshow(image, cmap="viridis", vmin=0.0, vmax=1.0, interpolation="nearest", aspect="auto")
        place.set_title(f"{title}, mean {np.nanmean(image):.1%}", fontsize="small")
        place.set_xlabel("head", fontsize="small")
        place.set_yticks(range(len(rows)), rows)
        place.tick_params(labelsize="x-small")
    figure.colorbar(drawn, ax=places, label=label)
    return places


def png(mask: "Mask", max_heads: int = 64) -> bytes:
    """All heads of a mask as one PNG, dark where edges are kept, without matplotlib.

    Args:
        mask: what to draw.
        max_heads: heads after these are left out.

    Returns:
        The encoded picture, 8-bit grey.
    """
    shown = min(mask.num_heads, max_heads)
    tile = 128
    squares = []
    for head in range(shown):
        image = mask.density_image(head, tile)
        pixels = np.arange(tile) * len(image) // tile
        grey = 255.0 * (1.0 - image[np.ix_(pixels, pixels)] ** GAMMA)
        squares.append(np.round(grey).astype(np.uint8))
    return side_by_side(squares)


def side_by_side(squares: Sequence[NDArray[np.uint8]]) -> bytes:
    """Pictures of the same size as one PNG, six in a row.

    Args:
        squares: (h, w) grey or (h, w, 3) colour, each.
    """
    gap = 4
    columns = min(6, len(squares))
    rows = math.ceil(len(squares) / columns)
    height, width, *colours = squares[0].shape
    canvas = np.full((rows * (height + gap) + gap, columns * (width + gap) + gap, *colours), 214, dtype=np.uint8)
    for index, square in enumerate(squares):
        row, column = divmod(index, columns)
        top, left = gap + row * (height + gap), gap + column * (width + gap)
        canvas[top : top + height, left : left + width] = square
    return encode_png(canvas)


def encode_png(pixels: NDArray[np.uint8]) -> bytes:
    """A picture as a PNG file.

    Args:
        pixels: (h, w) grey or (h, w, 3) colour.
    """
    height, width = pixels.shape[:2]
    colour_type = 0 if pixels.ndim == 2 else 2

    def chunk(kind: bytes, data: bytes) -> bytes:
        checksum = zlib.crc32(kind + data)
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", checksum)

    header = struct.pack(">IIBBBBB", width, height, 8, colour_type, 0, 0, 0)
    lines = pixels.reshape(height, -1)
    lines = np.concatenate([np.zeros((height, 1), dtype=np.uint8), lines], axis=1)  # filter type 0 before each
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", header)
        + chunk(b"IDAT", zlib.compress(lines.tobytes(), 9))
        + chunk(b"IEND", b"")
    )
