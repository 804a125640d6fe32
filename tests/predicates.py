"""The definition of each mask as a few lines of Python, written from the definition and not from the Rust.

`PREDICATES[name]` is called as ``keep(queries, keys, head, size, **mask_kwargs)`` with index arrays of shape (n, 1) and
(1, n), and says which pairs the head keeps. For masks over patches the indices count patches and ``size.tokens`` is the
number of patches; for `ALL_TOKENS` they count tokens. A mask by content reads the scaled queries, the keys and the
embeddings of these tokens from ``size``. `VARIANTS[name]` lists parameters worth trying, and `exists` says whether a
mask can be built at a size with them: where not, it must raise.
"""

import functools
import math
import random as python_random
from fractions import Fraction
from typing import NamedTuple

import numpy as np


class Size(NamedTuple):
    """What a mask may know about where it is used."""

    tokens: int
    heads: int
    layer: int
    num_layers: int
    prefix: int = 0
    prefix_dense: bool = True
    grid: tuple[int, ...] = ()
    t_fastest: bool = False
    q: np.ndarray | None = None
    """(n, D) queries of the head, scaled."""
    k: np.ndarray | None = None
    """(n, D) keys of the head."""
    embeddings: np.ndarray | None = None
    """(n, E) input of the layer."""

    @property
    def dense_prefix(self):
        return range(self.prefix if self.prefix_dense else 0)


ALL_TOKENS = {"none", "longformer", "global", "bigbird", "random", "per_head", "topk"}
DEFAULT_PREFIX = {
    "sparse": 1,
    "fibottention": 1,
    "fibottentioncrossdiag": 1,
    "longformer": 1,
    "bigbird": 1,
    "random": 1,
    "topk": 1,
}
COMPOSITES = {"union", "intersection", "difference", "per_head"}


def default_prefix(name, kwargs):
    if name in COMPOSITES:
        return max(default_prefix(part["mask"], part.get("mask_kwargs", {})) for part in kwargs["masks"])
    return 0 if kwargs.get("add_class_token") is False else DEFAULT_PREFIX.get(name, 0)


def none(i, j, head, size):
    return np.ones_like(i + j, dtype=bool)


def local(
    i, j, head, size, window=None, window_size=None, dilation=1, causal=False, include_self=True, window_schedule=None
):
    if window_schedule is not None:
        start, end = window_schedule["start"], window_schedule["end"]
        share = size.layer / (size.num_layers - 1)
        linear = start + (end - start) * share
        window = round(linear if window_schedule["kind"] == "linear" else start * (end / start) ** share)
    elif window is None:
        window = (window_size - 1) // 2
    near = (abs(i - j) <= window * dilation) & ((i - j) % dilation == 0) & ((j <= i) | (not causal))
    return np.where(i == j, include_self, near)


def strided(i, j, head, size, stride, causal=True):
    return ((i - j) % stride == 0) & ((j <= i) | (not causal))


def strided_columns(i, j, head, size, stride, offset=0, causal=False):
    return (j % stride == offset) & ((j <= i) | (not causal))


def block(i, j, head, size, block_size, layout="diagonal"):
    a, b = i // block_size, j // block_size
    if layout == "full":
        return np.ones_like(a + b, dtype=bool)
    if layout == "diagonal":
        return a == b
    if isinstance(layout, dict):
        return abs(a - b) <= layout["band"]
    return np.array(layout, dtype=bool)[a, b]


def everywhere(i, j, tokens):
    return np.isin(i, list(tokens)) | np.isin(j, list(tokens))


def global_(i, j, head, size, num_global=1, global_indices=None):
    tokens = set(range(num_global)) if global_indices is None else {g % size.tokens for g in global_indices}
    return everywhere(i, j, tokens | set(size.dense_prefix))


def vertical_slash(
    i,
    j,
    head,
    size,
    vertical=(),
    slash=(),
    window=None,
    causal=False,
    num_vertical=None,
    num_slash=None,
    last_queries=64,
):
    if num_vertical is not None or num_slash is not None:
        weights = np.where(j <= i, np.exp(size.q @ size.k.T), 0)
        weights = (weights / weights.sum(-1, keepdims=True))[-last_queries:]
        rows = np.arange(size.tokens)[-last_queries:]
        past = np.array([weights[rows >= d, rows[rows >= d] - d].sum() for d in range(size.tokens)])
        vertical, slash = (
            best(sums[None], keep or 0, True)[0].nonzero()[0]
            for sums, keep in ((weights.sum(0), num_vertical), (past, num_slash))
        )
    kept = np.isin(j, list(vertical)) | np.isin(abs(i - j), list(slash))
    if window is not None:
        kept = kept | (abs(i - j) <= window)
    return kept & ((j <= i) | (not causal))


def longformer(
    i,
    j,
    head,
    size,
    window=1,
    window_size=None,
    dilation=1,
    per_head_dilation=None,
    num_global=1,
    global_indices=None,
    symmetric=True,
    include_self=False,
    keep_cls_dense=True,
):
    window = window if window_size is None else window_size // 2
    step = max(1, dilation if per_head_dilation is None else per_head_dilation[head])
    in_window = np.isin(abs(i - j), [k * step for k in range(0 if include_self else 1, max(window, 0) + 1)])
    tokens = set(range(num_global)) if global_indices is None else set(global_indices)
    return in_window | everywhere(i, j, tokens | set(size.dense_prefix if keep_cls_dense else ()))


def bigbird(
    i,
    j,
    head,
    size,
    window=1,
    num_random=1,
    num_global=1,
    global_indices=None,
    keep_cls_dense=True,
    symmetric=False,
    per_head_same=False,
    per_batch_same=True,
):
    """What is not drawn; all of it for the `VARIANTS`, which draw nothing or all."""
    tokens = set(range(num_global)) if global_indices is None else set(global_indices)
    dense = everywhere(i, j, tokens | set(size.dense_prefix if keep_cls_dense else ()))
    in_window = (abs(i - j) <= window) & (window > 0)
    return dense | in_window | ((i != j) & (num_random >= size.tokens))


def random(i, j, head, size, causal=False, symmetric=False, keep_cls_dense=True, **_):
    """For the `VARIANTS`, which draw all that is allowed."""
    return (j <= i) | (not causal)


def sparse(
    i, j, head, size, pattern="local", local_attn_ctx=None, symmetric=True, fixed_c=None, per_head_distinct=False
):
    def directed(r, c):
        if pattern == "local":
            reach = min(64, size.tokens) if local_attn_ctx is None else local_attn_ctx
            return (r - c >= 0) & (r - c <= reach)
        if pattern == "strided":
            stride = min(64, size.tokens) if local_attn_ctx is None else local_attn_ctx
            return (r >= c) & ((r - c) % max(stride, 1) == 0)
        block = min(local_attn_ctx or min(128, size.tokens), max(size.tokens - 1, 1))
        summary = min(16, block) if fixed_c is None else min(fixed_c, block)
        first, last = 0, summary
        if per_head_distinct:
            extra = summary % size.heads
            first = head * (summary // size.heads) + min(head, extra)
            last = first + summary // size.heads + (head < extra)
        place = c % block - (block - summary)
        return (r // block == c // block) | ((c // block < r // block) & (first <= place) & (place < last))

    return directed(i, j) | (symmetric & directed(j, i))


def pairs_of_heads(size, keep_ratio=None, pruning_ratio=None, weights=None, **_):
    """Pairs of patches that each head keeps: heads share the budget equally, the first ones what does not divide."""
    pairs = size.heads * size.tokens**2
    keep = math.floor(Fraction(str(keep_ratio)) * pairs) if pruning_ratio is None else None
    keep = pairs - math.ceil(Fraction(str(pruning_ratio)) * pairs) if keep is None else keep
    if weights is None:
        return [keep // size.heads + (head < keep % size.heads) for head in range(size.heads)]
    return largest_remainder(keep, weights, size.tokens)


def largest_remainder(total, weights, least):
    """In exact fractions, for weights under which no head has all its pairs: heads below the least get that."""
    shares, free = {}, set(range(len(weights)))
    while True:
        level = Fraction(total - sum(shares.values()), sum(weights[h] for h in free))
        low = {h for h in free if level * weights[h] < least}
        if not low:
            break
        shares |= dict.fromkeys(low, least)
        free -= low
    quotas = {h: level * weights[h] for h in free}
    shares |= {h: math.floor(quota) for h, quota in quotas.items()}
    by_remainder = sorted(free, key=lambda h: (shares[h] - quotas[h], -weights[h], h))
    for h in by_remainder[: total - sum(shares.values())]:
        shares[h] += 1
    return [shares[h] for h in range(len(weights))]


def pruning(i, j, head, size, **kwargs):
    order = np.lexsort([key.ravel() for key in np.broadcast_arrays(j, i, abs(i - j))])  # the last key first
    kept = np.zeros(size.tokens**2, dtype=bool)
    kept[order[: pairs_of_heads(size, **kwargs)[head]]] = True
    return kept.reshape(size.tokens, size.tokens)


@functools.cache
def fibottention_distances(patches, heads, layer, schedule, modified, shuffled, w_min, w_max, strict, prefix_first):
    golden = (1 + math.sqrt(5)) / 2
    rows = []
    for head in range(1, heads + 1):
        i = head if schedule == "wythoff" else 1
        window = w_min + (int((w_max - w_min) / (heads - 1) * (head - 1)) if heads > 1 else 0)
        a, b = math.floor(math.floor(i * golden) * golden), math.floor(math.floor(i * golden) * golden**2)
        if modified and (i > 1 or prefix_first):
            a, b = a - (b - a), b - a
        row = [a]
        while b <= window:
            row.append(b)
            a, b = b, a + b
        rows.append({term for term in row if term <= window or not strict})
    if shuffled:
        order = list(range(heads))
        python_random.Random(layer).shuffle(order)
        rows = [rows[k] for k in order]
    return [sorted(row) for row in rows]


def fibottention(
    i,
    j,
    head,
    size,
    schedule="wythoff",
    modified=False,
    prefix_first_head=True,
    shuffled=True,
    shared_offsets=False,
    add_class_token=True,
    w_min=5,
    w_max=None,
    strict_window=False,
):
    w_max = size.tokens // 3 if w_max is None else w_max
    options = (schedule, modified, shuffled, w_min, w_max, strict_window, prefix_first_head)
    distances = fibottention_distances(size.tokens, size.heads, size.layer, *options)
    return np.isin(abs(i - j), distances[0 if shared_offsets else head])


def fibottentioncrossdiag(i, j, head, size, add_class_token=True, modified=False, shuffled=True):
    options = ("wythoff", modified, shuffled, 5, size.tokens // 3, False, True)
    distances = fibottention_distances(size.tokens, size.heads, size.layer, *options)
    return np.isin(abs(i + j - (size.tokens - 1)), distances[head])


def coordinates(index, size):
    """One array per axis of the grid."""
    if not size.t_fastest:
        return np.unravel_index(index, size.grid)
    time, height, width = size.grid
    h, w, t = np.unravel_index(index, (height, width, time))
    return t, h, w


def per_axis(value, size):
    return value if isinstance(value, (list, tuple)) else [value] * len(size.grid)


def neighborhood(i, j, head, size, kernel_size, dilation=1, stride=1, causal=False, grid=None):
    kept = True
    axes = (
        coordinates(i, size),
        coordinates(j, size),
        size.grid,
        *(per_axis(v, size) for v in (kernel_size, dilation)),
    )
    for q, c, length, k, d, s, is_causal in zip(*axes, per_axis(stride, size), per_axis(causal, size), strict=True):
        a, b = q // d, c // d
        members = -(-(length - q % d) // d)
        if is_causal:
            leader = np.minimum(a // s * s + s - 1, members - 1)
            in_window = (b <= a) & (leader - b < k)
        else:
            leader = np.minimum(a // s * s + s // 2, members - 1)
            start = np.minimum(np.maximum(leader - k // 2, 0), members - k)
            in_window = (b >= start) & (b < start + k)
        kept = kept & in_window & (q % d == c % d)
    return kept


def axial(i, j, head, size, grid=None):
    same = [q == k for q, k in zip(coordinates(i, size), coordinates(j, size), strict=True)]
    return sum(part.astype(int) for part in same) >= len(size.grid) - 1


def grid_window(i, j, head, size, window_size, shift=0, grid=None):
    kept = True
    axes = (coordinates(i, size), coordinates(j, size), per_axis(window_size, size), per_axis(shift, size))
    for q, k, w, s in zip(*axes, strict=True):
        kept = kept & ((q + s) // w == (k + s) // w)
    return kept


def space_time(i, j, head, size, kind, radius=0, grid=None):
    (t, h, w), (t2, h2, w2) = coordinates(i, size), coordinates(j, size)
    space, time = t == t2, (h == h2) & (w == w2)
    return {
        "space": space,
        "time": time,
        "divided": space | time,
        "joint": space | True,
        "tube": (abs(h - h2) <= radius) & (abs(w - w2) <= radius),
    }[kind]


def part_between_patches(part, i, j, head, size):
    name, kwargs = part["mask"], part.get("mask_kwargs", {})
    if name in ALL_TOKENS:
        return PREDICATES[name](
            i + size.prefix, j + size.prefix, head, size._replace(tokens=size.tokens + size.prefix), **kwargs
        )
    return PREDICATES[name](i, j, head, size, **kwargs)


def union(i, j, head, size, masks):
    return functools.reduce(np.logical_or, (part_between_patches(part, i, j, head, size) for part in masks))


def intersection(i, j, head, size, masks):
    return functools.reduce(np.logical_and, (part_between_patches(part, i, j, head, size) for part in masks))


def difference(i, j, head, size, masks):
    first, *rest = (part_between_patches(part, i, j, head, size) for part in masks)
    return functools.reduce(lambda kept, other: kept & ~other, rest, first)


def heads_of(masks, num_heads):
    """Which part each head takes."""
    owner = {head: part for part in masks if isinstance(part.get("heads"), list) for head in part["heads"]}
    free = [head for head in range(num_heads) if head not in owner]
    for part in sorted(masks, key=lambda part: part.get("heads") is None):
        if not isinstance(part.get("heads"), list):
            count = part.get("heads", len(free))
            owner |= {free.pop(0): part for _ in range(count)}
    return owner


def per_head(i, j, head, size, masks):
    part = heads_of(masks, size.heads)[head]
    name, kwargs = part["mask"], part.get("mask_kwargs", {})
    if name in ALL_TOKENS:
        return PREDICATES[name](i, j, head, size, **kwargs)
    patches = size._replace(tokens=size.tokens - size.prefix)
    between = np.zeros((size.tokens, size.tokens), dtype=bool)
    inside = i[size.prefix :] - size.prefix, j[:, size.prefix :] - size.prefix
    between[size.prefix :, size.prefix :] = PREDICATES[name](*inside, head, patches, **kwargs)
    return everywhere(i, j, size.dense_prefix) | between


def best(scores, keep, allowed):
    """The ``keep`` highest of the allowed scores of each row, the lower index first where they are equal."""
    order = np.argsort(np.where(allowed, -scores, np.inf), axis=-1, kind="stable")
    return (np.argsort(order, axis=-1) < keep) & allowed


def topk(
    i, j, head, size, k=3, causal=False, symmetric=False, keep_cls_dense=True, cls_row_dense=True, k_schedule=None
):
    """With the k of epoch 0."""
    past = (j <= i) | (not causal)
    chosen = best(size.q @ size.k.T, k if k_schedule is None else k_schedule["k_start"], past)
    prefix = size.dense_prefix if keep_cls_dense else ()
    dense = np.isin(j, prefix) | (cls_row_dense & np.isin(i, prefix))
    return (chosen | (symmetric & chosen.T) | dense) & past


def block_topk(i, j, head, size, k=2, block_size=32, pool="mean", causal=False):
    starts = range(0, size.tokens, block_size)
    q, keys = (
        np.stack([getattr(np, pool)(x[start : start + block_size], axis=0) for start in starts])
        for x in (size.q, size.k)
    )
    past = np.tri(len(starts), dtype=bool) | (not causal)
    return best(q @ keys.T, k, past)[i // block_size, j // block_size] & ((j <= i) | (not causal))


def importance(i, j, head, size, score="key_norm", k=None, indices=None):
    if score == "list":
        return np.isin(j, indices)
    if score == "first":
        return j < k
    if score == "attention":
        weights = np.exp(size.q @ size.k.T)
        received = (weights / weights.sum(-1, keepdims=True)).sum(0)
    else:
        received = np.linalg.norm(size.k if score == "key_norm" else size.embeddings, axis=-1)
    return best(received[None], k, True)


PREDICATES = {
    f.__name__.rstrip("_"): f
    for f in (
        none,
        local,
        strided,
        strided_columns,
        block,
        global_,
        vertical_slash,
        longformer,
        bigbird,
        random,
        pruning,
        sparse,
        fibottention,
        fibottentioncrossdiag,
        neighborhood,
        axial,
        grid_window,
        space_time,
        union,
        intersection,
        difference,
        per_head,
        topk,
        block_topk,
        importance,
    )
}


def exists(name, size, **kwargs):
    """Whether the mask can be built at this size with these parameters."""
    if name == "global":
        indices = kwargs.get("global_indices")
        if indices is None:
            return kwargs.get("num_global", 1) <= size.tokens
        return all(-size.tokens <= index < size.tokens for index in indices)
    if name == "vertical_slash":
        return all(column < size.tokens for column in kwargs.get("vertical", ()))
    if name == "block" and isinstance(kwargs.get("layout"), list):
        return len(kwargs["layout"]) == -(-size.tokens // kwargs["block_size"])
    if name == "neighborhood":
        kernel, dilation = per_axis(kwargs["kernel_size"], size), per_axis(kwargs.get("dilation", 1), size)
        return all(k <= max(length // d, 1) for k, d, length in zip(kernel, dilation, size.grid, strict=True))
    if name == "space_time":
        return len(size.grid) == 3
    if name == "importance" and kwargs.get("score") in ("first", "list"):
        return max([kwargs.get("k", 0), *(index + 1 for index in kwargs.get("indices", ()))]) <= size.tokens
    if name == "pruning":
        return sum(pairs_of_heads(size, **kwargs | {"weights": None})) >= size.heads * size.tokens
    return True


VARIANTS = {
    "none": [{}],
    "local": [
        {"window": 0},
        {"window": 3},
        {"window_size": 5, "causal": True},
        {"window": 2, "dilation": 3, "include_self": False},
        {"window": 10**12 // 4, "dilation": 2},
        {"window_schedule": {"kind": "linear", "start": 0, "end": 7}},
        {"window_schedule": {"kind": "geometric", "start": 1, "end": 20}, "dilation": 2},
    ],
    "strided": [
        {"stride": 3},
        {"stride": 1},
        {"stride": 7, "causal": False},
        {"stride": 2**62},
    ],
    "strided_columns": [
        {"stride": 3},
        {"stride": 5, "offset": 4, "causal": True},
        {"stride": 1, "causal": True},
        {"stride": 2**62, "offset": 2**61},
    ],
    "block": [
        {"block_size": 4},
        {"block_size": 1, "layout": {"band": 2}},
        {"block_size": 7, "layout": {"band": 10**12}},
        {"block_size": 2**62},
        {"block_size": 5, "layout": "full"},
        {"block_size": 11, "layout": [[1, 0, 1], [0, 0, 1], [1, 1, 0]]},
    ],
    "global": [
        {},
        {"num_global": 0},
        {"num_global": 3},
        {"global_indices": [0, -1]},
        {"global_indices": [2, -2, 5, 2]},
    ],
    "vertical_slash": [
        {"vertical": [0], "slash": [3], "window": 1},
        {"vertical": [4, 1], "slash": [0, 8], "causal": True},
        {"num_vertical": 2, "num_slash": 3, "window": 1, "causal": True},
        {"num_slash": 4, "last_queries": 3, "causal": True},
        {"num_vertical": 10**9, "last_queries": 1, "causal": True},
        {"slash": [5, 5, 10**12]},
        {"window": 0},
    ],
    "longformer": [
        {},
        {"window": 0, "include_self": True},
        {"window": 3, "dilation": 2},
        {"window_size": 5, "num_global": 0, "keep_cls_dense": False},
        {"window": 2, "global_indices": [0, 5, 9], "include_self": True},
        {"window": 2, "per_head_dilation": [3, 1, 2, 0], "keep_cls_dense": False, "num_global": 2},
    ],
    "bigbird": [
        {"num_random": 0},
        {"window": 3, "num_random": 0, "num_global": 0, "keep_cls_dense": False},
        {"window": 0, "num_random": 0, "global_indices": [-3, 2, 99]},
        {"window": 2, "num_random": 99, "global_indices": [3]},
        {"window": -4, "num_random": 70, "symmetric": True, "per_batch_same": False},
    ],
    "random": [
        {"keep_ratio": 1.0, "seed": 0},
        {"mask_ratio": 0, "seed": 0, "causal": True},
        {"k": 99, "seed": 0, "keep_cls_dense": False, "causal": True},
        {"keep_ratio": 1, "seed": 0, "keep_cls_dense": False, "symmetric": True},
    ],
    "pruning": [
        {"keep_ratio": 0.1},
        {"keep_ratio": 1},
        {"pruning_ratio": 0},
        {"pruning_ratio": 0.7, "method": "position"},
        {"keep_ratio": 0.37, "weights": [1, 2, 1, 3]},
    ],
    "sparse": [
        {},
        {"pattern": "local", "local_attn_ctx": 2, "symmetric": False},
        {"pattern": "strided", "local_attn_ctx": 5},
        {"pattern": "strided", "local_attn_ctx": 1, "symmetric": False},
        {"pattern": "fixed", "local_attn_ctx": 7, "fixed_c": 2},
        {"pattern": "fixed", "local_attn_ctx": 6, "fixed_c": 6, "symmetric": False, "per_head_distinct": True},
        {"pattern": "fixed", "local_attn_ctx": 9, "fixed_c": 3, "per_head_distinct": True},
    ],
    "fibottention": [
        {},
        {"modified": True},
        {"shuffled": False, "w_min": 3, "w_max": 40},
        {"shared_offsets": True, "strict_window": True},
        {"schedule": "fibonacci", "w_min": 2, "w_max": 21},
        {"modified": True, "prefix_first_head": False, "w_min": 69, "w_max": 69},
        {"schedule": "fibonacci", "modified": True},
        {"schedule": "fibonacci", "modified": True, "prefix_first_head": False},
        {"add_class_token": False},
    ],
    "fibottentioncrossdiag": [{}, {"modified": True, "shuffled": False}, {"add_class_token": False}],
    "neighborhood": [
        {"kernel_size": 3},
        {"kernel_size": 1},
        {"kernel_size": 3, "dilation": 2},
        {"kernel_size": 5, "stride": 2},
        {"kernel_size": 5, "stride": 5},
        {"kernel_size": 3, "stride": 3, "dilation": 2, "causal": True},
        {"kernel_size": 5, "stride": 3, "causal": True},
    ],
    "axial": [{}],
    "grid_window": [{"window_size": 3}, {"window_size": 4, "shift": 3}, {"window_size": 1}, {"window_size": 2**40}],
    "space_time": [
        {"kind": "space"},
        {"kind": "time"},
        {"kind": "divided"},
        {"kind": "joint"},
        {"kind": "tube"},
        {"kind": "tube", "radius": 1},
        {"kind": "tube", "radius": 10**12},
    ],
    "union": [
        {"masks": [{"mask": "fibottention"}, {"mask": "local", "mask_kwargs": {"window": 1}}]},
        {
            "masks": [
                {
                    "mask": "union",
                    "mask_kwargs": {
                        "masks": [{"mask": "longformer"}, {"mask": "block", "mask_kwargs": {"block_size": 2}}]
                    },
                }
            ]
        },
        {"masks": [{"mask": "global"}, {"mask": "strided", "mask_kwargs": {"stride": 5}}]},
        {"masks": [{"mask": "longformer", "mask_kwargs": {"global_indices": [3], "keep_cls_dense": False}}]},
    ],
    "intersection": [
        {"masks": [{"mask": "fibottention"}, {"mask": "local", "mask_kwargs": {"window": 12}}]},
        {"masks": [{"mask": "longformer", "mask_kwargs": {"window": 9}}, {"mask": "fibottentioncrossdiag"}]},
        {
            "masks": [
                {"mask": "strided_columns", "mask_kwargs": {"stride": 2}},
                {"mask": "strided", "mask_kwargs": {"stride": 3}},
                {"mask": "none"},
            ]
        },
    ],
    "difference": [
        {"masks": [{"mask": "none"}, {"mask": "fibottention"}]},
        {
            "masks": [
                {"mask": "local", "mask_kwargs": {"window": 6}},
                {"mask": "strided", "mask_kwargs": {"stride": 2, "causal": False}},
                {"mask": "block", "mask_kwargs": {"block_size": 3}},
            ]
        },
    ],
    "per_head": [
        {"masks": [{"mask": "local", "mask_kwargs": {"window": 2}, "heads": [2]}, {"mask": "fibottention"}]},
        {
            "masks": [
                {"mask": "longformer", "heads": 1},
                {"mask": "strided", "mask_kwargs": {"stride": 4}, "heads": [3, 0]},
                {"mask": "sparse", "heads": 1},
            ]
        },
        {"masks": [{"mask": "fibottention", "mask_kwargs": {"shuffled": False}, "heads": 4}]},
    ],
    "topk": [
        {"k": 2},
        {"k": 0, "keep_cls_dense": False},
        {"k": 5, "causal": True},
        {"symmetric": True},
        {"k": 4, "causal": True, "keep_cls_dense": False},
        {"cls_row_dense": False},
        {"k": 10**9},
        {"k_schedule": {"kind": "linear", "k_start": 6, "k_end": 1, "epochs": 4}},
    ],
    "block_topk": [
        {"k": 2, "block_size": 2},
        {"k": 1, "block_size": 1, "pool": "max"},
        {"k": 3, "block_size": 4, "causal": True},
        {"k": 2, "block_size": 7, "pool": "max", "causal": True},
        {"k": 10**9, "block_size": 8},
        {"block_size": 10**9},
    ],
    "importance": [
        {"k": 2},
        {"k": 4, "score": "embedding_norm"},
        {"k": 3, "score": "attention"},
        {"k": 10**9},
        {"k": 5, "score": "first"},
        {"score": "list", "indices": [7, 0, 7]},
    ],
}

# Parameters that need a grid of their own.
ON_GRID = [
    ("neighborhood", [7, 10], {"kernel_size": [3, 5], "dilation": [2, 1], "stride": [1, 3], "causal": [False, True]}),
    ("neighborhood", [4, 5, 6], {"kernel_size": [3, 1, 5], "causal": [True, False, False]}),
    ("neighborhood", [5, 3, 4], {"kernel_size": [5, 3, 1], "dilation": [1, 1, 3], "stride": [2, 1, 1]}),
    ("grid_window", [9, 7], {"window_size": [4, 2], "shift": [1, 0]}),
    ("grid_window", [4, 4, 5], {"window_size": [2, 3, 5], "shift": [0, 2, 4]}),
]
