"""How a model's heads differ, and how far what a token knows travels through its layers."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..mask import Mask

MOST_SOURCES = 256
"""Tokens that `hops` starts from; evenly spaced ones where there are more."""


def mask_record(layer: int, mask: Mask) -> dict[str, Any]:
    """What a mask looks like from the outside, as plain data.

    Args:
        layer: zero-based depth.
        mask: of that layer.

    Returns:
        ``layer``, ``mask``, ``edges`` and ``density`` per head; ``overlap``, the (H, H) Jaccard indices of the heads;
        ``degrees``, per head how many queries keep how many keys, as [keys, queries] pairs; ``hops``, layers of this
        mask until every token has met every other, None if some never meet, and the same among patches alone.
    """
    square = mask.num_tokens**2
    return {
        "layer": layer,
        "mask": mask.name,
        "edges": mask.nnz_per_head,
        "density": [edges / max(1, square) for edges in mask.nnz_per_head],
        "overlap": mask.overlap().tolist(),
        "degrees": [_histogram(mask, head) for head in range(mask.num_heads)],
        "hops": hops(mask),
        "hops_between_patches": hops(mask, patches_only=True),
    }


def hops(mask: Mask, *, patches_only: bool = False) -> int | None:
    """Layers of a mask, all heads together, until every token has received something from every other.

    Breadth-first search, in time and memory proportional to the edges for each token that it starts from: every token,
    or `MOST_SOURCES` evenly spaced ones, which makes the result a lower bound.

    Args:
        mask: of a layer.
        patches_only: without the prefix tokens, which see and are seen by everything.

    Returns:
        The number of layers, 0 for a single token; None if some token never hears of another.
    """
    first = mask.num_prefix_tokens if patches_only else 0
    count = mask.num_tokens - first
    if count <= 1:
        return 0
    # Information flows from key to query: the search follows columns, so it needs the queries of every key.
    starts, queries = _queries_of_keys(mask, first)
    sources = range(count) if count <= MOST_SOURCES else np.linspace(0, count - 1, MOST_SOURCES).astype(int).tolist()
    furthest = 0
    for source in sources:
        distance = _eccentricity(source, starts, queries, count)
        if distance is None:
            return None
        furthest = max(furthest, distance)
    return furthest


def _queries_of_keys(mask: Mask, first: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """The edges of all heads from token ``first`` on, by key: where each key's queries begin, and the queries."""
    row_ptr, col = (tensor.numpy() for tensor in mask.to_csr())
    rows = np.repeat(np.tile(np.arange(mask.num_tokens), mask.num_heads), np.diff(row_ptr, axis=1).ravel())
    inside = (rows >= first) & (col >= first)
    count = mask.num_tokens - first
    pairs = np.unique((col[inside] - first) * count + rows[inside] - first)
    keys, queries = pairs // count, pairs % count
    return np.searchsorted(keys, np.arange(count + 1)), queries


def _eccentricity(source: int, starts: NDArray[np.int64], queries: NDArray[np.int64], count: int) -> int | None:
    seen = np.zeros(count, dtype=bool)
    seen[source] = True
    frontier, distance, left = np.array([source]), 0, count - 1
    while left:
        lengths = starts[frontier + 1] - starts[frontier]
        places = np.repeat(starts[frontier] - np.cumsum(lengths) + lengths, lengths) + np.arange(lengths.sum())
        reached = np.unique(queries[places])
        frontier = reached[~seen[reached]]
        if not frontier.size:
            return None
        seen[frontier] = True
        left -= frontier.size
        distance += 1
    return distance


def _histogram(mask: Mask, head: int) -> list[Sequence[int]]:
    keys, queries = np.unique(mask.degrees(head).numpy(), return_counts=True)
    return [[int(a), int(b)] for a, b in zip(keys, queries, strict=True)]
