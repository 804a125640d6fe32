"""The definition of each mask as a few lines of Python, written from the definition and not from the Rust.

`PREDICATES[name]` is called as ``keep(query, key, head, size, **mask_kwargs)`` and says whether the head keeps the key.
For masks over patches, query and key count patches and ``size.tokens`` is the number of patches; for `ALL_TOKENS` they
count tokens. `VARIANTS[name]` lists parameters worth trying.
"""

import functools
import math
import random
from typing import NamedTuple


class Size(NamedTuple):
    """What a mask may know about where it is used."""

    tokens: int
    heads: int
    layer: int
    num_layers: int


ALL_TOKENS = {"none", "longformer"}
DEFAULT_PREFIX = {"sparse": 1, "fibottention": 1, "fibottentioncrossdiag": 1, "longformer": 1}


def none(i, j, head, size):
    return True


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
    if i == j:
        return include_self
    return abs(i - j) <= window * dilation and (i - j) % dilation == 0 and (j <= i or not causal)


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
    in_window = abs(i - j) in {k * step for k in range(0 if include_self else 1, max(window, 0) + 1)}
    everywhere = set(range(num_global)) if global_indices is None else set(global_indices)
    if keep_cls_dense:
        everywhere.add(0)
    return in_window or i in everywhere or j in everywhere


def sparse(
    i, j, head, size, pattern="local", local_attn_ctx=None, symmetric=True, fixed_c=None, per_head_distinct=False
):
    def directed(r, c):
        if pattern == "local":
            reach = min(64, size.tokens) if local_attn_ctx is None else local_attn_ctx
            return 0 <= r - c <= reach
        if pattern == "strided":
            stride = min(64, size.tokens) if local_attn_ctx is None else local_attn_ctx
            return r >= c and (r - c) % stride == 0
        block = min(local_attn_ctx or min(128, size.tokens), max(size.tokens - 1, 1))
        summary = min(16, block) if fixed_c is None else min(fixed_c, block)
        first, last = 0, summary
        if per_head_distinct:
            extra = summary % size.heads
            first = head * (summary // size.heads) + min(head, extra)
            last = first + summary // size.heads + (head < extra)
        place = c % block - (block - summary)
        return r // block == c // block or (c // block < r // block and first <= place < last)

    return directed(i, j) or (symmetric and directed(j, i))


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
        random.Random(layer).shuffle(order)
        rows = [rows[k] for k in order]
    return rows


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
    return abs(i - j) in distances[0 if shared_offsets else head]


def fibottentioncrossdiag(i, j, head, size, add_class_token=True, modified=False, shuffled=True):
    options = ("wythoff", modified, shuffled, 5, size.tokens // 3, False, True)
    distances = fibottention_distances(size.tokens, size.heads, size.layer, *options)
    return abs(i + j - (size.tokens - 1)) in distances[head]


PREDICATES = {f.__name__: f for f in (none, local, longformer, sparse, fibottention, fibottentioncrossdiag)}

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
    "longformer": [
        {},
        {"window": 0, "include_self": True},
        {"window": 3, "dilation": 2},
        {"window_size": 5, "num_global": 0, "keep_cls_dense": False},
        {"window": 2, "global_indices": [0, 5, 9], "include_self": True},
        {"window": 2, "per_head_dilation": [3, 1, 2, 0], "keep_cls_dense": False, "num_global": 2},
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
        {"add_class_token": False},
    ],
    "fibottentioncrossdiag": [{}, {"modified": True, "shuffled": False}, {"add_class_token": False}],
}
