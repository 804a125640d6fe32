"""Attention of the newest tokens to a cache of keys and values: the operators, and the function over them.

``torch.ops.sparse_mhsa.decode`` reads a cache that its caller looks after; ``cache_step`` also appends to one and
forgets, in place (`KVCache` is its face). Decoding is inference: neither has a derivative.
"""

import math

import torch
from torch import Tensor

from . import _core
from .functional import autocast, check_qkv, check_scale
from .ops import needs_autograd

_LIBRARY = torch.library.Library("sparse_mhsa", "FRAGMENT")  # type: ignore[no-untyped-call]
_TAGS = (torch.Tag.pt2_compliant_tag, torch.Tag.flexible_layout)


def decode_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lengths: Tensor,
    *,
    causal: bool = True,
    scale: float | None = None,
) -> Tensor:
    """Attention of the last N tokens to caches that every sample and head fills to a length of its own.

    ``softmax(scale * q k^T) v`` over the first ``lengths`` keys of each head; what lies behind them is never read.
    Long caches are cut into pieces that threads share, so that one sample of few heads keeps a processor busy
    (Dao et al., "Flash-Decoding", 2023); the result is the same bit for bit on any number of threads. Time grows
    with the entries, memory beyond the output with those of one token.

    Args:
        q: (B, H, N, D) float32, float64, bfloat16 or float16, on the CPU, any strides.
        k: (B, Hkv, S, D) with Hkv a divisor of H.
        v: (B, Hkv, S, Dv).
        lengths: (B, Hkv) or (B, 1) integers from 0 to S.
        causal: the N tokens are the last entries of the cache, and none sees those behind it; False lets all of them
            see all entries.
        scale: factor of the scores; default 1 / sqrt(D).

    Returns:
        (B, H, N, Dv). A query without keys gives 0.

    Raises:
        TypeError: an argument has a wrong type or dtype.
        ValueError: an argument has a wrong shape, device or value.
        RuntimeError: a gradient is asked for.
    """
    check_qkv(q, k, v)
    refuse_gradients(q, k, v)
    check_on_cpu(q)
    expected = (q.shape[0], k.shape[1])
    if lengths.dim() != 2 or lengths.shape[0] != expected[0] or lengths.shape[1] not in (1, expected[1]):
        raise ValueError(f"lengths: expected shape (B, Hkv) = {expected} or (B, 1), got {tuple(lengths.shape)}")
    if lengths.is_floating_point() or lengths.dtype == torch.bool:
        raise TypeError(f"lengths: expected whole numbers, got {lengths.dtype}")
    check_scale(scale)
    q, k, v = autocast(q, k, v)
    scale = 1.0 / math.sqrt(q.shape[-1]) if scale is None else scale
    counts = lengths.to(torch.int64).expand(expected).contiguous()
    out: Tensor = torch.ops.sparse_mhsa.decode.default(q, k, v, counts, causal, False, scale)[0]
    return out


def refuse_gradients(*tensors: Tensor) -> None:
    """Raise a RuntimeError where a derivative may be asked of a call with these inputs."""
    if torch.compiler.is_compiling():
        asked = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors)
    else:
        asked = needs_autograd(*tensors)
    if asked:
        raise RuntimeError(
            "decoding has no gradient: it is inference over a cache; call it under torch.no_grad(), "
            "or train with sparse_attention"
        )


def check_on_cpu(tensor: Tensor) -> None:
    """Raise a ValueError for a device that has no decoding kernel."""
    if tensor.device.type not in ("cpu", "meta"):
        raise ValueError(f"query, key and value: decoding computes CPU tensors only, got {tensor.device}")


def worth_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which weights are summed up."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def _fake_decode(
    q: Tensor, k: Tensor, v: Tensor, lengths: Tensor, causal: bool, needs_weights: bool, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    weights = k.shape[:3] if needs_weights else (0, 0, 0)
    return (
        q.new_empty((*q.shape[:3], v.shape[3])),
        q.new_empty(q.shape[:3], dtype=torch.float64),
        q.new_empty(weights, dtype=worth_dtype(q.dtype)),
    )


def _cache_step(
    q: Tensor | None,
    k: Tensor,
    v: Tensor,
    token_positions: Tensor,
    keys: Tensor,
    values: Tensor,
    positions: Tensor,
    worths: Tensor,
    lengths: Tensor,
    *rest: object,
) -> tuple[Tensor, Tensor]:
    changed = (keys, values, positions, worths, lengths)
    # As torch's own in-place operators do; tensors made in inference mode do not count versions.
    torch.autograd.graph.increment_version([tensor for tensor in changed if not tensor.is_inference()])
    step: tuple[Tensor, Tensor] = _core.cache_step(q, k, v, token_positions, *changed, *rest)  # type: ignore[arg-type]
    return step


def _fake_cache_step(
    q: Tensor | None, k: Tensor, v: Tensor, token_positions: Tensor, keys: Tensor, *rest: object
) -> tuple[Tensor, Tensor]:
    if q is None:
        return k.new_empty((0, 0, 0, 0)), k.new_empty((0, 0, 0), dtype=torch.float64)
    return q.new_empty((*q.shape[:3], v.shape[3])), q.new_empty(q.shape[:3], dtype=torch.float64)


_LIBRARY.define(  # type: ignore[no-untyped-call]
    "decode(Tensor q, Tensor k, Tensor v, Tensor lengths, bool causal, bool needs_weights, float scale)"
    " -> (Tensor out, Tensor lse, Tensor weights)",
    tags=_TAGS,
)
_LIBRARY.define(  # type: ignore[no-untyped-call]
    "cache_step(Tensor? q, Tensor k, Tensor v, Tensor token_positions, Tensor(a!) keys, Tensor(b!) values,"
    " Tensor(c!) positions, Tensor(d!) worths, Tensor(e!) lengths, Tensor starts, Tensor capacities, str worth,"
    " int sinks, int recent, float scale, int? window=None) -> (Tensor out, Tensor lse)",
    tags=torch.Tag.pt2_compliant_tag,
)
_LIBRARY.impl("decode", _core.decode, "CPU")  # type: ignore[no-untyped-call]
_LIBRARY.impl("cache_step", _cache_step, "CPU")  # type: ignore[no-untyped-call]
torch.library.register_fake("sparse_mhsa::decode", _fake_decode, lib=_LIBRARY)
torch.library.register_fake("sparse_mhsa::cache_step", _fake_cache_step, lib=_LIBRARY)
