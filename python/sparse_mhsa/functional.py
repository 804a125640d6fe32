"""Sparse attention as a function, and the argument checks that every front end shares."""

import functools
import math
import operator
import warnings
from typing import Literal, overload

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from . import flex, ops
from ._core import AttentionConfig
from .content import edges_of
from .edges import EdgeAttention, EdgeSource, accumulation_dtype
from .layer_mask import LayerMask
from .mask import Mask
from .positions import check_positions, edges_at

_DEVICES = ("cpu", "cuda", "mps", "xpu", "meta")
MANY_TOKENS = 4096
"""Number of tokens above which dense attention weights deserve a warning."""
_DENSE_MASKS: dict[int, LayerMask] = {}
"""The mask ``none`` by its number of heads."""
_NUMBERS = (int, float, np.number, torch.SymInt, torch.SymFloat)
_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


@overload
def sparse_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Mask | None,
    *,
    attn_mask: Tensor | None = None,
    key_padding_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    scale: float | None = None,
    token_positions: Tensor | None = None,
    return_lse: Literal[False] = False,
) -> Tensor: ...


@overload
def sparse_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Mask | None,
    *,
    attn_mask: Tensor | None = None,
    key_padding_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    scale: float | None = None,
    token_positions: Tensor | None = None,
    return_lse: Literal[True],
) -> tuple[Tensor, Tensor]: ...


def sparse_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Mask | None,
    *,
    attn_mask: Tensor | None = None,
    key_padding_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    scale: float | None = None,
    token_positions: Tensor | None = None,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Attention over the edges of a mask: ``softmax(scale * q k^T + attn_mask) v``, kept entries only.

    Polarity: as in `torch.nn.functional.scaled_dot_product_attention`, **True means keep** in ``attn_mask``
    and in ``key_padding_mask``. (`torch.nn.MultiheadAttention`, and so `SparseMHSA.forward`, means the
    opposite.) Both intersect with ``mask``: they can only remove edges.

    A row left without a key gives 0, an lse of -inf and zero gradients, never NaN. Values at keys that no
    query keeps are never read, so NaN there does no harm. Without anything masked and without gradients the
    dense mask is handed to `scaled_dot_product_attention`, which computes the same.

    Source: attention, Vaswani et al., 2017 (arXiv 1706.03762).

    Args:
        q: (B, H, N, D) float32, float64, bfloat16 or float16, any strides.
        k: (B, H or Hkv, S, D) with Hkv a divisor of H.
        v: (B, H or Hkv, S, Dv).
        mask: which keys each query keeps, for H heads and N tokens; None for all. Only the mask ``none`` may
            be rectangular (N != S).
        attn_mask: broadcastable to (B, H, N, S); bool (True = keep) or floating (added to the scaled scores).
        key_padding_mask: (B, S) bool, True = keep.
        dropout_p: probability that a weight is dropped. The draw comes from torch's default generator.
        scale: factor of the scores; default is the mask's configured scale, else 1 / sqrt(D).
        token_positions: (B, N) int64, for N tokens picked out of a longer sequence that ``mask`` is for: where in it
            each stands, in the order in which they arrive. Query i then keeps key j if the mask keeps
            (token_positions[i], token_positions[j]).
        return_lse: also return the log of the sum of the exponentials of each row.

    Returns:
        out (B, H, N, Dv) in the dtype of q (under autocast, the autocast dtype), and with ``return_lse`` lse
        (B, H, N), float64 for float64 inputs and float32 otherwise, without gradient.

    Raises:
        TypeError: an argument has a wrong type or dtype.
        ValueError: an argument has a wrong shape, device or value, the mask is for other sizes, or there is an
            ``attn_mask`` beside ``masked_logits: zero``.
        RuntimeError: a row is empty and the mask's configuration says ``on_empty_row: error``.
    """
    check_qkv(q, k, v)
    if mask is not None:
        _check_mask(mask, q, token_positions)
    check_key_mask(key_padding_mask, q, k)
    _check_number("dropout_p", dropout_p)
    if scale is not None:  # NaN and infinity give what dense attention makes of them
        _check_number("scale", scale)
    layer_mask = dense_mask(q.shape[1]) if mask is None else mask
    edges = None
    if token_positions is not None:
        check_positions(token_positions, (q.shape[0], q.shape[2]))
        edges = edges_at(layer_mask, token_positions, q.shape[1])
    out, lse = attend(
        q,
        k,
        v,
        layer_mask,
        edges,
        key_mask=key_padding_mask,
        bias=additive_bias(attn_mask, q, k),
        dropout_p=dropout_p,
        scale=scale,
        needs_lse=return_lse,
    )
    return (out, lse.to(accumulation_dtype(out.dtype))) if return_lse else out


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    layer_mask: LayerMask | Mask,
    edges: EdgeSource | None = None,
    *,
    key_mask: Tensor | None = None,
    bias: Tensor | None = None,
    dropout_p: float = 0.0,
    seed: Tensor | None = None,
    scale: float | None = None,
    needs_lse: bool = False,
    embeddings: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """What `sparse_attention` and the modules share once shapes are checked.

    Args:
        q: (B, H, N, D).
        k: (B, Hkv, S, D).
        v: (B, Hkv, S, Dv).
        layer_mask: which keys each query keeps, the scale, and what to do with empty rows.
        edges: the edges where they are not simply those of ``layer_mask``.
        key_mask: (B, S) bool, True = keep.
        bias: four dimensions, broadcastable to (B, H, N, S), added to the scores.
        dropout_p: probability that a weight is dropped.
        seed: of the dropout; drawn here if None.
        scale: factor of the scores; None for that of ``layer_mask``, else 1 / sqrt(D).
        needs_lse: the caller reads ``lse``; without it, ``lse`` may be an empty tensor.
        embeddings: (B, S, E) input of the layer, for masks that choose keys by its norms.

    Returns:
        out (B, H, N, Dv) and lse (B, H, N).

    Raises:
        ValueError: ``dropout_p`` is no probability, the mask cannot be applied to N queries and S keys, or there is a
            ``bias`` beside ``masked_logits: zero``.
        RuntimeError: a row is empty and ``on_empty_row`` is ``error``.
    """
    if not 0.0 <= dropout_p <= 1.0:
        raise ValueError(f"dropout_p: expected a probability between 0 and 1, got {dropout_p}")
    if bias is not None and layer_mask.masked_logits == "zero":
        raise ValueError(
            "attn_mask: expected none with `masked_logits: zero`, which gives pairs that the pattern drops a weight "
            "that no mask could take away; padding can be given as a bool key_padding_mask"
        )
    whole = layer_mask.is_dense and edges is None
    if edges is None:
        check_square(layer_mask, q.shape[2], k.shape[2])
    q, k, v = autocast(q, k, v)
    scale = layer_mask.scale if scale is None else scale
    scale = 1.0 / math.sqrt(q.shape[-1]) if scale is None else scale
    if layer_mask.backend == flex.NAME:
        out = flex.attend(
            q,
            k,
            v,
            layer_mask,
            edges,
            key_mask=key_mask,
            bias=bias,
            dropout_p=dropout_p,
            scale=scale,
            needs_lse=needs_lse,
        )
        return out, q.new_empty(0)
    unmasked = whole and key_mask is None and bias is None and k.shape[2] > 0
    if unmasked and dropout_p == 0.0 and not needs_lse and not ops.needs_autograd(q, k, v):
        grouped = k.shape[1] != q.shape[1]
        return F.scaled_dot_product_attention(q, k, v, scale=scale, enable_gqa=grouped), q.new_empty(0)
    if dropout_p > 0.0 and seed is None:
        seed = draw_seed()
    bias = None if bias is None else bias_as(q.dtype, bias)
    if edges is None:
        edges = edges_of(q, k, layer_mask, key_mask=key_mask, bias=bias, scale=scale, embeddings=embeddings)
    out, lse = ops.attention(q, k, v, edges, key_mask=key_mask, bias=bias, seed=seed, dropout_p=dropout_p, scale=scale)
    if layer_mask.on_empty_row == "error":
        _refuse_empty_rows(lse)
    return out, lse


def weights_of(
    q: Tensor,
    k: Tensor,
    lse: Tensor,
    edges: EdgeSource,
    *,
    key_mask: Tensor | None = None,
    bias: Tensor | None = None,
    dropout_p: float = 0.0,
    seed: Tensor | None = None,
    scale: float,
    averaged: bool = False,
) -> Tensor:
    """The dense attention weights of a call of `attend`, which takes O(N x S) memory.

    Args:
        q: (B, H, N, D) as `attend` got it.
        k: (B, Hkv, S, D).
        lse: (B, H, N) as `attend` returned it.
        edges: the mask.
        key_mask: as `attend` got it.
        bias: likewise.
        dropout_p: likewise.
        seed: likewise.
        scale: factor of the scores.
        averaged: mean over the heads.

    Returns:
        (B, H, N, S), or (B, N, S) averaged, after dropout.
    """
    if q.is_meta:
        return q.new_empty((q.shape[0], *(() if averaged else q.shape[1:2]), q.shape[2], k.shape[2]))
    if k.shape[2] > MANY_TOKENS:
        warn_of_dense_weights(k.shape[2])
    attention = EdgeAttention(q, k, lse, edges, key_mask, seed, dropout_p, scale)
    bias = None if bias is None else bias_as(q.dtype, bias)
    return attention.mean_weights(q, k, bias) if averaged else attention.weights(q, k, bias)


@functools.cache
def warn_of_dense_weights(num_keys: int) -> None:
    """Say once per number of keys that weights were asked for which are not proportional to the edges."""
    warnings.warn(
        f"need_weights=True makes a dense tensor of attention weights over {num_keys} tokens; pass "
        "need_weights=False to keep memory proportional to the edges",
        stacklevel=4,
    )


def check_square(layer_mask: LayerMask | Mask, num_queries: int, num_keys: int) -> None:
    """Raise a ValueError where a mask other than ``none`` meets different numbers of queries and keys."""
    if num_queries != num_keys and not layer_mask.is_dense:
        raise ValueError(
            f"mask: `{layer_mask.name}` is square, but query has {num_queries} tokens and key has {num_keys};"
            " only the mask `none` may be rectangular"
        )


def draw_seed() -> Tensor:
    """A dropout seed from torch's default generator, which `torch.manual_seed` and checkpointing govern."""
    return torch.randint(torch.iinfo(torch.int64).max, (), dtype=torch.int64)


def dense_mask(num_heads: int) -> LayerMask:
    """The mask ``none``."""
    num_heads = operator.index(num_heads)  # a number where it is traced as a symbol: one compiled graph for each
    _make_dense_mask(num_heads)
    return _DENSE_MASKS[num_heads]


def _make_dense_mask(num_heads: int) -> None:
    if num_heads not in _DENSE_MASKS:
        _DENSE_MASKS[num_heads] = LayerMask(AttentionConfig.parse("mask: none"), num_heads)


# What `torch.compiler.assume_constant_result` sets, which would import the whole compiler: Dynamo calls it while
# tracing, because it cannot see into the compiled core, and then finds the mask in the dictionary.
_make_dense_mask._dynamo_marked_constant = True  # type: ignore[attr-defined]


def autocast(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Cast as `scaled_dot_product_attention` does under autocast: everything but float64."""
    if _autocast_dtype(q) == q.dtype == k.dtype == v.dtype:  # nearly always, and small calls feel every microsecond
        return q, k, v
    q, k, v = (x.to(_autocast_dtype(x)) for x in (q, k, v))
    return q, k, v


def _autocast_dtype(x: Tensor) -> torch.dtype:
    device = x.device.type
    if x.dtype == torch.float64 or not torch.amp.is_autocast_available(device):
        return x.dtype
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype


def check_qkv(q: Tensor, k: Tensor, v: Tensor) -> None:
    """Raise a TypeError or ValueError that names the argument unless q, k and v fit together.

    Under autocast they may have different dtypes, as rotated queries and keys have beside values: `autocast` follows.
    """
    for name, tensor in (("query", q), ("key", k), ("value", v)):
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{name}: expected a torch.Tensor, got {type(tensor).__name__}")
        if tensor.is_nested:
            raise TypeError(f"{name}: expected a dense tensor, got a nested one; pad it and pass key_padding_mask")
        if tensor.layout != torch.strided:
            raise TypeError(f"{name}: expected a dense tensor, got layout {tensor.layout}")
    same_dtype = q.dtype == k.dtype == v.dtype
    if not (same_dtype or _autocast_dtype(q) == _autocast_dtype(k) == _autocast_dtype(v)):
        raise TypeError(
            "Expected query, key, and value to have the same dtype, but got "
            f"query.dtype: {q.dtype} key.dtype: {k.dtype} and value.dtype: {v.dtype} instead."
        )
    for name, tensor in (("query", q), ("key", k), ("value", v)):
        if tensor.dtype not in _DTYPES:
            raise TypeError(f"{name}: expected one of {', '.join(map(str, _DTYPES))}, got {tensor.dtype}")
    if not q.device == k.device == v.device:
        raise ValueError(
            "Expected query, key, and value to have the same device type, but got "
            f"query.device: {q.device} key.device: {k.device} and value.device: {v.device} instead."
        )
    if q.device.type not in _DEVICES:
        raise ValueError(f"query: expected a tensor on one of the devices {', '.join(_DEVICES)}, got {q.device}")
    if q.dim() != 4:
        raise ValueError(f"query: expected shape (B, H, N, D), got {tuple(q.shape)}")
    batch, heads, _, dim = q.shape
    if dim == 0:
        raise ValueError(f"query: expected a head dimension of at least 1, got shape {tuple(q.shape)}")
    if k.dim() != 4 or (k.shape[0], k.shape[3]) != (batch, dim):
        raise ValueError(f"key: expected shape ({batch}, H or Hkv, S, {dim}), got {tuple(k.shape)}")
    if k.shape[1] != heads and (k.shape[1] == 0 or heads % k.shape[1]):
        raise ValueError(f"key: expected a number of heads that divides the {heads} of query, got {k.shape[1]}")
    if v.dim() != 4 or v.shape[:3] != k.shape[:3]:
        raise ValueError(f"value: expected shape ({', '.join(map(str, k.shape[:3]))}, Dv), got {tuple(v.shape)}")


def check_key_mask(key_mask: Tensor | None, q: Tensor, k: Tensor) -> None:
    """Raise unless ``key_mask`` is None or a (B, S) bool tensor on the device of q."""
    if key_mask is None:
        return
    check_beside(key_mask, "key_padding_mask", q)
    if key_mask.dtype != torch.bool:
        raise TypeError(f"key_padding_mask: expected dtype torch.bool (True = keep), got {key_mask.dtype}")
    expected = (q.shape[0], k.shape[2])
    if tuple(key_mask.shape) != expected:
        raise ValueError(f"key_padding_mask: expected shape (B, S) = {expected}, got {tuple(key_mask.shape)}")


def additive_bias(attn_mask: Tensor | None, q: Tensor, k: Tensor) -> Tensor | None:
    """A keep-mask or an additive mask as a four-dimensional additive one.

    Args:
        attn_mask: broadcastable to (B, H, N, S); bool (True = keep) or floating, or None.
        q: (B, H, N, D).
        k: (B, Hkv, S, D).

    Returns:
        (B or 1, H or 1, N or 1, S or 1) floating, -inf where a bool mask drops, or None.

    Raises:
        TypeError: ``attn_mask`` is neither bool nor floating.
        ValueError: its shape does not broadcast, or it is on another device.
    """
    if attn_mask is None:
        return None
    check_beside(attn_mask, "attn_mask", q)
    if attn_mask.dtype != torch.bool and not attn_mask.is_floating_point():
        raise TypeError(f"attn_mask: expected bool (True = keep) or a floating dtype, got {attn_mask.dtype}")
    full = (q.shape[0], q.shape[1], q.shape[2], k.shape[2])
    shape = (1,) * (4 - attn_mask.dim()) + tuple(attn_mask.shape)
    if len(shape) != 4 or any(side not in (1, whole) for side, whole in zip(shape, full, strict=True)):
        raise ValueError(
            f"attn_mask: expected a shape that broadcasts to (B, H, N, S) = {full}, got {tuple(attn_mask.shape)}"
        )
    if attn_mask.dtype == torch.bool:
        attn_mask = torch.zeros(attn_mask.shape, dtype=q.dtype, device=q.device).masked_fill(~attn_mask, -math.inf)
    return attn_mask.reshape(shape)


def bias_of_call(
    attn_mask: Tensor | None,
    is_causal: bool,
    q: Tensor,
    k: Tensor,
    layer_mask: LayerMask | Mask,
    edges: EdgeSource | None,
) -> Tensor | None:
    """What a call of `scaled_dot_product_attention` masks besides ``layer_mask``: both, where it says both.

    Args:
        attn_mask: as `additive_bias` takes it.
        is_causal: queries keep no later keys.
        q: (B, H, N, D).
        k: (B, Hkv, S, D).
        layer_mask: the mask of the layer.
        edges: where they are not simply those of ``layer_mask``.

    Returns:
        As `additive_bias`, whose errors it raises.
    """
    bias = additive_bias(attn_mask, q, k)
    # A mask that is causal itself needs no (N, S) array that says so.
    if not is_causal or (edges is None and layer_mask.is_causal):
        return bias
    return causal_bias(q, k) if bias is None else bias + causal_bias(q, k)


def bias_as(dtype: torch.dtype, bias: Tensor) -> Tensor:
    """An additive mask in the precision of the scores; what is finite stays finite, as large as ``dtype`` allows."""
    limit = torch.finfo(dtype).max
    if torch.finfo(bias.dtype).max <= limit:
        return bias.to(dtype)
    return torch.where(bias.isinf(), bias, bias.clamp(-limit, limit)).to(dtype)


def causal_bias(q: Tensor, k: Tensor) -> Tensor:
    """(1, 1, N, S) additive mask that leaves query i the keys 0 to i, as `scaled_dot_product_attention` means it."""
    return torch.full((1, 1, q.shape[2], k.shape[2]), -math.inf, dtype=q.dtype, device=q.device).triu(1)


def check_scale(scale: float | None) -> None:
    """Raise a TypeError or ValueError unless ``scale`` is None or a finite number: others spoil a cache for good."""
    if scale is None:
        return
    _check_number("scale", scale)
    if not -math.inf < scale < math.inf:  # comparisons, which a number that is traced as a symbol has too
        raise ValueError(f"scale: expected a finite number, got {scale}")


def _check_number(name: str, value: object) -> None:
    if not isinstance(value, _NUMBERS):
        raise TypeError(f"{name}: expected a number, got {type(value).__name__}")


def check_beside(tensor: Tensor, name: str, q: Tensor) -> None:
    """Raise a TypeError or ValueError that names the argument unless it is dense and on the device of the query."""
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name}: expected a torch.Tensor, got {type(tensor).__name__}")
    if tensor.layout != torch.strided:
        raise TypeError(f"{name}: expected a dense tensor, got layout {tensor.layout}")
    if tensor.device != q.device:
        raise ValueError(f"{name}: expected device {q.device} like query, got {tensor.device}")


def _check_mask(mask: Mask, q: Tensor, token_positions: Tensor | None) -> None:
    if not isinstance(mask, Mask):
        raise TypeError(f"mask: expected a sparse_mhsa.Mask or None, got {type(mask).__name__}")
    heads, queries = q.shape[1:3]
    if mask.num_heads != heads:
        raise ValueError(f"mask: expected {heads} heads like query, got a mask of {mask.num_heads} heads")
    if token_positions is None and mask.num_tokens != queries:
        raise ValueError(f"mask: expected {queries} tokens like query, got a mask of {mask.num_tokens} tokens")


def _refuse_empty_rows(lse: Tensor) -> None:
    empty = lse == -math.inf
    if torch.compiler.is_compiling():
        torch._assert_async(~empty.any(), "on_empty_row: error, and a query has no key left")
        return
    if empty.any():
        batch, head, row = (int(index) for index in empty.nonzero()[0])
        raise RuntimeError(
            f"on_empty_row: error, and {int(empty.sum())} queries have no key left after mask, attn_mask and "
            f"key_padding_mask; the first is query {row} of head {head} in sample {batch}"
        )
