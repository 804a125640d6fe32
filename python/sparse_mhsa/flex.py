"""Softmax over the edges of a mask, computed by PyTorch's FlexAttention instead of by our kernels.

The edges become a `BlockMask`, made without N x N: its memory grows with the edges. `torch.compile` makes the kernel: a
call with another number of tokens, head dimension, dtype or device compiles another, and so may a mask that touches
another number of blocks. It is there to compare with, and for devices that have kernels of FlexAttention and none of
ours. What it cannot do is refused by name, never left to other code.

Source: FlexAttention, Dong et al., 2024 (arXiv 2412.05496).
"""

import functools
from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

from ._core import Edges
from .block_mask import to_block_mask
from .edges import EdgeSource
from .layer_mask import LayerMask

if TYPE_CHECKING:
    from torch.nn.attention.flex_attention import BlockMask

    from .mask import Mask

NAME = "flex"
_CPU_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_LIBRARY = torch.library.Library("sparse_mhsa", "FRAGMENT")  # type: ignore[no-untyped-call]
# Kernels that may be compiled in one process, each for a shape and a dtype; more raise. PyTorch allows 8 by itself.
_MOST_KERNELS = 256


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    layer_mask: "LayerMask | Mask",
    edges: EdgeSource | None,
    *,
    key_mask: Tensor | None,
    bias: Tensor | None,
    dropout_p: float,
    scale: float,
    needs_lse: bool,
) -> Tensor:
    """Attention over the edges of ``layer_mask``.

    Args:
        q: (B, H, N, D).
        k: (B, Hkv, S, D), S = N unless the mask is ``none``.
        v: (B, Hkv, S, Dv).
        layer_mask: the mask.
        edges: must be None: other edges than those of ``layer_mask``.
        key_mask: (B, S) bool, True = keep.
        bias: must be None.
        dropout_p: must be 0.
        scale: factor of the scores.
        needs_lse: must be false.

    Returns:
        (B, H, N, Dv) in the dtype of q; a query without a key gives 0.

    Raises:
        TypeError: a dtype that FlexAttention does not compute on the CPU.
        ValueError: an option that it cannot honour, on the CPU or anywhere.
    """
    refused = {
        "token_positions, add_bias_kv, add_zero_attn": edges is not None,
        "attn_mask": bias is not None,
        "dropout": dropout_p > 0.0,
        "need_weights, return_lse": needs_lse,
    }
    for option, asked in refused.items():
        if asked:
            raise ValueError(f"{option}: the backend `{NAME}` cannot honour it; the backend `vit` does")
    on_cpu = q.device.type == "cpu"
    if on_cpu and q.dtype not in _CPU_DTYPES:
        names = ", ".join(map(str, _CPU_DTYPES))
        raise TypeError(f"query: on the CPU the backend `{NAME}` computes {names}, got {q.dtype}")
    spec = None if layer_mask.is_dense else layer_mask.spec
    if torch.compiler.is_compiling():
        raise ValueError(
            f"backend: `{NAME}` compiles itself and cannot be part of a compiled function or exported program"
        )
    if spec is not None and q.numel() > 0 and not q.is_meta:
        # Made here, because torch.vmap, which a BlockMask is made with, does not work everywhere inside an operator.
        _block_mask(spec, q.shape[2], q.device)
    if not (torch.is_grad_enabled() and any(x.requires_grad for x in (q, k, v))):
        out: Tensor = torch.ops.sparse_mhsa.flex.default(q, k, v, spec, key_mask, scale)
        return out
    if on_cpu:
        raise ValueError(
            f"backend: `{NAME}` has no backward pass on the CPU; use torch.no_grad(), or the backend `vit`"
        )
    return _flex(q, k, v, spec, key_mask, scale)


def _flex(q: Tensor, k: Tensor, v: Tensor, spec: str | None, key_mask: Tensor | None, scale: float) -> Tensor:
    if q.numel() == 0 or v.numel() == 0 or k.shape[2] == 0:
        return q.new_zeros((*q.shape[:3], v.shape[3]))
    score_mod = None if key_mask is None else _without_keys(key_mask)
    grouped = k.shape[1] != q.shape[1]
    # Under a dispatch mode (a FLOP counter, for instance) torch.compile would leave FlexAttention uncompiled.
    with _disable_current_modes(), torch._dynamo.config.patch(recompile_limit=_MOST_KERNELS):
        block_mask = None if spec is None else _block_mask(spec, q.shape[2], q.device)
        out: Tensor = _compiled()(q, k, v, score_mod, block_mask, scale=scale, enable_gqa=grouped)
    return out.contiguous()


@functools.cache
def _compiled() -> Callable[..., Tensor]:
    from torch.nn.attention.flex_attention import flex_attention

    # As plain Python, FlexAttention makes all N x N scores; with fullgraph, what cannot be compiled raises instead.
    compiled: Callable[..., Tensor] = torch.compile(flex_attention, fullgraph=True, dynamic=False)
    return compiled


@functools.lru_cache(maxsize=64)
def _block_mask(spec: str, num_tokens: int, device: torch.device) -> "BlockMask":
    # Tensors made in inference mode would be of another kind, for which another kernel is compiled.
    with torch.inference_mode(False):
        return to_block_mask(Edges.from_spec(spec, num_tokens), device=device)


def forget_block_masks() -> None:
    """Make them anew: a mask was registered again, and its name means other edges."""
    _block_mask.cache_clear()


def _without_keys(key_mask: Tensor) -> Callable[..., Tensor]:
    def score_mod(score: Tensor, batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return torch.where(key_mask[batch, key], score, -torch.inf)

    return score_mod


def _define() -> None:
    """FlexAttention without derivatives as one operator, so that its calls can be seen and counted."""
    _LIBRARY.define(  # type: ignore[no-untyped-call]
        "flex(Tensor q, Tensor k, Tensor v, str? spec, Tensor? key_mask, float scale) -> Tensor",
        tags=(torch.Tag.pt2_compliant_tag, torch.Tag.flexible_layout),
    )
    for device in ("CPU", "CUDA", "MPS", "XPU"):
        _LIBRARY.impl("flex", _flex, device)  # type: ignore[no-untyped-call]
    torch.library.register_fake(
        "sparse_mhsa::flex", lambda q, k, v, *_: q.new_empty((*q.shape[:3], v.shape[3])), lib=_LIBRARY
    )


_define()
