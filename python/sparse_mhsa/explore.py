"""What one token sees: the keys of a query, folded back onto the patch grid and laid over an image.

`overlay` draws it with matplotlib. `Explorer` shows it in a notebook, with sliders where ipywidgets is installed and as
a picture of all heads where it is not. Each looks at the edges of one query at a time.
"""

import base64
import html
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from .config import integer, integers
from .extras import needed_for
from .viz import GAMMA, encode_png

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from .mask import Mask

Query = int | Sequence[int]
"""A token, counted from 0 with the prefix, or the (row, column) of a patch."""

SIDE = 224
"""Pixels of the longer side of the picture of a patch grid, as far as whole patches allow."""
_MARK = np.array([214, 39, 40], dtype=np.uint8)
"""The colour of the query."""
_HIDDEN = 0.25
"""How much remains of a patch that the query does not see."""
_GAP = 6
MAX_SHOWN = 12
"""Heads in the static picture."""


@dataclass(frozen=True)
class PatchView:
    """A mask over the patches of an image.

    Attributes:
        mask: whose edges are looked at.
        rows: patches from top to bottom.
        columns: patches from left to right.
        pixels: (rows * c, columns * c, 3) uint8, the image in whole patches of c pixels.
    """

    mask: "Mask"
    rows: int
    columns: int
    pixels: NDArray[np.uint8]

    @classmethod
    def of(cls, mask: "Mask", image: ArrayLike | None = None, grid: Sequence[int] | None = None) -> "PatchView":
        """Find the patch grid of a mask and cut an image to it.

        Args:
            mask: what to look at.
            image: (h, w), (h, w, 3) or (h, w, 4); numbers from 0 to 255 if it is uint8, from 0 to 1 otherwise. It is
                stretched over the grid. None for plain grey patches.
            grid: [H, W]; by default what the mask was made with, or a square.

        Raises:
            TypeError: ``image`` or ``grid`` holds something else than numbers.
            ValueError: the mask has no grid of two sides, ``grid`` does not fit it, or ``image`` is no image.
        """
        rows, columns = _sides(mask, grid)
        cell = max(4, SIDE // max(rows, columns))
        if image is None:
            pixels = np.full((rows * cell, columns * cell, 3), 96, dtype=np.uint8)
        else:
            source = _rgb(image)
            down = np.arange(rows * cell) * source.shape[0] // (rows * cell)
            right = np.arange(columns * cell) * source.shape[1] // (columns * cell)
            pixels = source[np.ix_(down, right)]
        return cls(mask, rows, columns, pixels)

    def token(self, query: Query) -> int:
        """The token that a query names.

        Raises:
            TypeError: it is no integer and no pair of integers.
            ValueError: there is no such token or patch.
        """
        if isinstance(query, Sequence):
            place = integers("query", query)
            if len(place) != 2 or not (0 <= place[0] < self.rows and 0 <= place[1] < self.columns):
                raise ValueError(
                    f"query: expected a patch from (0, 0) to ({self.rows - 1}, {self.columns - 1}), got {tuple(place)}"
                )
            return self.mask.num_prefix_tokens + place[0] * self.columns + place[1]
        token = integer("query", query)
        if token >= self.mask.num_tokens:
            raise ValueError(f"query: expected a token from 0 to {self.mask.num_tokens - 1}, got {token}")
        return token

    def picture(self, head: int, query: Query) -> NDArray[np.uint8]:
        """The image with the patches pale that a query of a head does not see, and the query framed.

        Returns:
            (h, w, 3) uint8.
        """
        token, prefix = self.token(query), self.mask.num_prefix_tokens
        keys = self.mask.keys(head, token).numpy()
        seen = np.zeros(self.rows * self.columns, dtype=bool)
        seen[keys[keys >= prefix] - prefix] = True
        cell = self.pixels.shape[0] // self.rows
        bright = np.kron(seen.reshape(self.rows, self.columns), np.ones((cell, cell), dtype=bool))[..., None]
        pale = np.round(255 - _HIDDEN * (255.0 - self.pixels)).astype(np.uint8)
        result = np.where(bright, self.pixels, pale)
        if token >= prefix:
            row, column = divmod(token - prefix, self.columns)
            patch = result[row * cell : (row + 1) * cell, column * cell : (column + 1) * cell]
            width = max(1, cell // 8)
            patch[:width] = patch[-width:] = patch[:, :width] = patch[:, -width:] = _MARK
        return result

    def caption(self, head: int, query: Query) -> str:
        """The query and what it sees, in words."""
        token, prefix = self.token(query), self.mask.num_prefix_tokens
        keys = self.mask.keys(head, token)
        off = int((keys < prefix).sum())
        where = f"patch {divmod(token - prefix, self.columns)}" if token >= prefix else "off the grid"
        beside = f" and {off} of {prefix} off the grid" if prefix else ""
        patches = self.rows * self.columns
        return f"head {head}, token {token} ({where}): sees {len(keys) - off} of {patches} patches{beside}"


def _sides(mask: "Mask", grid: Sequence[int] | None) -> tuple[int, int]:
    patches = mask.num_tokens - mask.num_prefix_tokens
    if grid is None:
        grid = mask.grid
    if grid is None:
        side = math.isqrt(max(0, patches))
        if patches < 1 or side * side != patches:
            raise ValueError(f"grid: expected [H, W], because {patches} patches are no square; got None")
        return side, side
    sides = integers("grid", grid)
    if len(sides) != 2 or min(sides) < 1 or math.prod(sides) != patches:
        raise ValueError(f"grid: expected [H, W] with {patches} patches, got {list(sides)}")
    return sides[0], sides[1]


def _rgb(image: ArrayLike) -> NDArray[np.uint8]:
    """(h, w, 3) uint8."""
    array = np.asarray(image)
    if array.dtype != np.uint8:
        if not (np.issubdtype(array.dtype, np.floating) and np.isfinite(array).all()):
            raise TypeError(f"image: expected uint8, or finite numbers from 0 to 1, got {array.dtype}")
        array = np.round(255 * np.clip(array, 0, 1)).astype(np.uint8)
    if array.ndim == 2:
        array = np.repeat(array[..., None], 3, axis=2)
    if array.ndim != 3 or array.shape[2] not in (3, 4) or 0 in array.shape:
        raise ValueError(f"image: expected (h, w), (h, w, 3) or (h, w, 4), got {array.shape}")
    return array[..., :3]


def overlay(
    mask: "Mask",
    image: ArrayLike | None,
    query: Query,
    heads: Sequence[int] | None = None,
    grid: Sequence[int] | None = None,
) -> "list[Axes]":
    """Draw which patches of an image a query sees, one plot per head.

    Args:
        mask: whose edges are looked at.
        image: see `PatchView.of`.
        query: a token, or the (row, column) of a patch.
        heads: which heads; default is all of them.
        grid: [H, W]; by default what the mask was made with, or a square.

    Returns:
        The axes, one per head.

    Raises:
        ImportError: matplotlib is not installed.
        TypeError: an argument is of another kind.
        ValueError: an argument does not fit the mask.
    """
    with needed_for("a plot", "matplotlib"):
        from matplotlib import pyplot as plt

    view = PatchView.of(mask, image, grid)
    chosen = list(range(mask.num_heads)) if heads is None else list(heads)
    pictures = [view.picture(head, query) for head in chosen]
    if not pictures:
        raise ValueError("heads: expected at least one, got []")
    columns = min(6, len(chosen))
    rows = math.ceil(len(chosen) / columns)
    figure, places = plt.subplots(rows, columns, figsize=(2 * columns, 2.2 * rows), squeeze=False, layout="constrained")
    for place in places.flat:
        place.set_axis_off()
    figure.suptitle(f"{mask.name}: what token {view.token(query)} sees", fontsize="medium")
    axes = list(places.flat)[: len(chosen)]
    for head, picture, place in zip(chosen, pictures, axes, strict=True):
        place.imshow(picture, interpolation="nearest")
        place.set_title(f"head {head}", fontsize="small")
    return axes


class Explorer:
    """A mask to look around in, in a notebook.

    With ipywidgets installed there are sliders for head and query. Without it, or where a stored notebook is only read,
    there is a picture of what one query sees in every head.

    Args:
        mask: what to look at.
        image: see `PatchView.of`.
        grid: likewise.
        query: where to begin; by default the patch in the middle.

    Raises:
        TypeError: an argument is of another kind.
        ValueError: an argument does not fit the mask.
    """

    def __init__(
        self,
        mask: "Mask",
        image: ArrayLike | None = None,
        grid: Sequence[int] | None = None,
        query: Query | None = None,
    ) -> None:
        self.view = PatchView.of(mask, image, grid)
        self.query = self.view.token((self.view.rows // 2, self.view.columns // 2) if query is None else query)

    @property
    def mask(self) -> "Mask":
        """What is looked at."""
        return self.view.mask

    def png(self, head: int, query: Query) -> bytes:
        """The matrix of a head with the row of a query marked, and beside it the patches that the query sees."""
        patches, token = self.view.picture(head, query), self.view.token(query)
        density = self.mask.density_image(head, SIDE)
        places = np.arange(SIDE) * len(density) // SIDE
        matrix = np.round(255 * (1 - density[np.ix_(places, places)] ** GAMMA)).astype(np.uint8)[..., None].repeat(3, 2)
        row = places == token * len(density) // self.mask.num_tokens
        # Only the empty cells, so that the keys of the row stay visible.
        matrix[row[:, None] & (matrix.min(axis=2) > 250)] = _MARK
        return encode_png(_side_by_side([matrix, patches]))

    def widget(self) -> Any:  # noqa: ANN401  (ipywidgets is optional)
        """Sliders and picture as an `ipywidgets.Widget`.

        Raises:
            ImportError: ipywidgets is not installed.
        """
        with needed_for("a slider", "ipywidgets"):
            import ipywidgets

        head = ipywidgets.IntSlider(0, 0, self.mask.num_heads - 1, description="head")
        query = ipywidgets.IntSlider(self.query, 0, self.mask.num_tokens - 1, description="query")
        picture, caption = ipywidgets.Image(format="png"), ipywidgets.Label()

        def show(_: object = None) -> None:
            picture.value = self.png(head.value, query.value)
            caption.value = self.view.caption(head.value, query.value)

        for slider in (head, query):
            slider.observe(show, names="value")
        show()
        return ipywidgets.VBox([ipywidgets.HBox([head, query]), picture, caption])

    def _repr_html_(self) -> str:
        shown = range(min(self.mask.num_heads, MAX_SHOWN))
        pictures = [self.view.picture(head, self.query) for head in shown]
        lines = [np.hstack([_framed(x) for x in pictures[start : start + 6]]) for start in range(0, len(pictures), 6)]
        width = max(line.shape[1] for line in lines)
        canvas = np.vstack([np.pad(x, ((0, 0), (0, width - x.shape[1]), (0, 0)), constant_values=255) for x in lines])
        picture = base64.b64encode(encode_png(canvas)).decode("ascii")
        captions = "".join(f"<li>{html.escape(self.view.caption(head, self.query))}</li>" for head in shown)
        more = self.mask.num_heads - len(shown)
        rest = f"<p>{more} more heads are not shown.</p>" if more else ""
        return (
            f"<p>{html.escape(self.mask.name)}: what token {self.query} sees, head by head</p>"
            f'<img alt="patches seen by each head" src="data:image/png;base64,{picture}">'
            f"<details><summary>in numbers</summary><ul>{captions}</ul></details>{rest}"
        )

    def _repr_mimebundle_(self, **options: object) -> Mapping[str, object]:
        """The widget if there can be one, and always the picture, which is what stays in a stored notebook."""
        bundle: dict[str, object] = {"text/plain": repr(self), "text/html": self._repr_html_()}
        try:
            widget = self.widget()
        except ImportError:
            return bundle
        return {**widget._repr_mimebundle_(**options), **bundle}

    def __repr__(self) -> str:
        return f"Explorer({self.mask!r}, query={self.query})"


def _framed(picture: NDArray[np.uint8]) -> NDArray[np.uint8]:
    return np.pad(picture, ((0, _GAP), (0, _GAP), (0, 0)), constant_values=255)


def _side_by_side(pictures: Sequence[NDArray[np.uint8]]) -> NDArray[np.uint8]:
    height = max(len(picture) for picture in pictures)
    padded = [np.pad(x, ((0, height - len(x)), (0, 0), (0, 0)), constant_values=255) for x in pictures]
    return np.hstack([_framed(picture) for picture in padded])
