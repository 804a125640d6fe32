"""Masks that choose keys by the content of queries and keys: the choice, and a look at what was chosen."""

import math

import torch
from torch import Tensor

from .config import ConfigLike, load_config
from .converters import edges_from_csr
from .edges import EdgeSource
from .layer_mask import LayerMask
from .mask import Mask, MaskOptions


def edges_of(
    q: Tensor,
    k: Tensor,
    layer_mask: LayerMask | Mask,
    *,
    key_mask: Tensor | None = None,
    bias: Tensor | None = None,
    scale: float | None = None,
    embeddings: Tensor | None = None,
) -> EdgeSource:
    """The edges of a mask as the operators take them; chosen here and now where they depend on content.

    Args:
        q: (B, H, N, D).
        k: (B, Hkv, N, D).
        layer_mask: the mask.
        key_mask: (B, N) bool, True = keep; other keys are not chosen.
        bias: as in `attend`; part of the score.
        scale: factor of the scores; None for that of ``layer_mask``, else 1 / sqrt(D).
        embeddings: (B, N, E) input of the layer, for masks that choose keys by its norms.

    Returns:
        The edges, without gradient.

    Raises:
        ValueError: the mask needs ``embeddings`` and there are none.
    """
    if not layer_mask.by_content:
        return layer_mask.source(q.shape[2])
    importance = None
    if layer_mask.needs_embeddings and embeddings is not None:
        importance = embeddings.detach().to(q.dtype).norm(dim=-1)
    scale = layer_mask.scale if scale is None else scale
    scale = 1.0 / math.sqrt(q.shape[-1]) if scale is None else scale
    bias = None if bias is None else bias.detach()
    arguments = (layer_mask.spec, key_mask, bias, importance, scale)
    row_ptr, col = torch.ops.sparse_mhsa.select_edges.default(q.detach(), k.detach(), *arguments)
    return EdgeSource(None, row_ptr, col)


def choose_masks(
    config: ConfigLike,
    q: Tensor,
    k: Tensor,
    *,
    layer: int = 0,
    epoch: int = 0,
    num_prefix_tokens: int | None = None,
    key_padding_mask: Tensor | None = None,
    embeddings: Tensor | None = None,
) -> list[Mask]:
    """The edges that a mask by content (``topk``, ``block_topk``, ``importance``) chooses, to look at or to reuse.

    Args:
        config: whatever `load_config` takes.
        q: (B, H, N, D) queries.
        k: (B, H or Hkv, N, D) keys.
        layer: zero-based depth, for masks that depend on it.
        epoch: training epoch, for masks that change with it.
        num_prefix_tokens: leading tokens off the grid; the configuration's own value wins.
        key_padding_mask: (B, N) bool, True = keep; other keys are not chosen.
        embeddings: (B, N, E) input of the layer, for ``score: embedding_norm``.

    Returns:
        One mask per sample.

    Raises:
        ConfigError: the configuration cannot be honoured.
        ValueError: the mask does not choose by content; `Mask.from_config` makes it.
    """
    layer_mask = LayerMask(load_config(config), q.shape[1], layer, epoch=epoch, num_prefix_tokens=num_prefix_tokens)
    if not layer_mask.by_content:
        raise ValueError(f"config: `{layer_mask.name}` does not choose keys by content; use Mask.from_config")
    edges = edges_of(q, k, layer_mask, key_mask=key_padding_mask, embeddings=embeddings)
    prefix = layer_mask.num_prefix_tokens_used
    options = MaskOptions(q.shape[-1], layer_mask.scale, layer_mask.on_empty_row)
    return [
        Mask._of(edges_from_csr(row_ptr, col, None), layer_mask.name, options, prefix)
        for _, row_ptr, col in edges.per_head(q.shape[0], q.shape[1], q.shape[2], k.shape[2], q.device)
    ]
