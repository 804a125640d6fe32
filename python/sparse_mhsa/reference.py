"""Dense masked attention in plain torch: slow, obvious, differentiable. What every test compares with."""

import math
from typing import Literal

import torch
from torch import Tensor


def dense_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None = None,
    *,
    key_mask: Tensor | None = None,
    bias: Tensor | None = None,
    dropout_factor: Tensor | None = None,
    scale: float | None = None,
    masked_logits: Literal["neg_inf", "zero"] = "neg_inf",
    dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor]:
    """Masked attention over all N x S pairs.

    ``p = softmax(scale * q k^T + bias)`` over the kept pairs, ``out = (p * dropout_factor) v``. With
    ``masked_logits="zero"`` a pair that ``mask`` drops keeps the logit 0 instead of none. A row without a key
    gives out 0, lse -inf and zero gradients.

    Args:
        q: (B, H, N, D).
        k: (B, H or Hkv, S, D).
        v: (B, H or Hkv, S, Dv).
        mask: bool, broadcastable to (B, H, N, S), True = keep; None keeps everything.
        key_mask: (B, S) bool, True = keep. Dropped keys are never read.
        bias: broadcastable to (B, H, N, S), added to the scores of kept pairs; -inf drops a pair altogether.
        dropout_factor: broadcastable to (B, H, N, S), 0 or 1 / (1 - p) for each weight.
        scale: default 1 / sqrt(D).
        masked_logits: what ``mask`` leaves of a dropped pair.
        dtype: compute in this dtype, for example torch.float64; default is that of q.

    Returns:
        out (B, H, N, Dv) and lse (B, H, N).
    """
    dtype = q.dtype if dtype is None else dtype
    group = q.shape[1] // k.shape[1]
    q, k, v = q.to(dtype), k.to(dtype), v.to(dtype)
    if group > 1:
        k, v = k.repeat_interleave(group, dim=1), v.repeat_interleave(group, dim=1)
    scale = 1.0 / math.sqrt(q.shape[-1]) if scale is None else scale
    if key_mask is not None:
        dropped = ~key_mask[:, None, :, None]
        k, v = k.masked_fill(dropped, 0.0), v.masked_fill(dropped, 0.0)

    scores = q @ k.transpose(-2, -1) * scale
    allowed = torch.ones_like(scores, dtype=torch.bool)
    if bias is not None:
        scores = scores + bias.to(dtype)
        allowed = allowed & (bias > -math.inf)
    if mask is not None and masked_logits == "zero":
        scores = scores.masked_fill(~mask, 0.0)
        allowed = allowed | ~mask
    elif mask is not None:
        allowed = allowed & mask
    if key_mask is not None:
        allowed = allowed & key_mask[:, None, None, :]

    scores = scores.masked_fill(~allowed, -math.inf)
    largest = scores.detach().amax(-1, keepdim=True) if scores.shape[-1] else scores.new_zeros(*scores.shape[:3], 1)
    largest = largest.masked_fill(largest == -math.inf, 0.0)
    weights = torch.exp(scores - largest)
    total = weights.sum(-1, keepdim=True)
    lse = (total.log() + largest).squeeze(-1).detach()
    weights = weights / total.masked_fill(total == 0, 1.0)
    if dropout_factor is not None:
        weights = weights * dropout_factor.to(dtype)
    return weights @ v, lse
