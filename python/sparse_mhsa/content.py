"""Masks that choose keys by the content of queries and keys: the choice, and a look at what was chosen."""

import json
import math
from collections.abc import Sequence

import torch
from torch import Tensor

from .config import ConfigLike, config_error, integer, load_config
from .converters import edges_from_csr
from .edges import EdgeSource, accumulation_dtype
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
    # Rounded to half precision, importances that differ would be equal, and the lower index would win.
    dtype = accumulation_dtype(q.dtype)
    importance = None
    if layer_mask.needs_embeddings:
        if embeddings is None:
            raise ValueError(
                "embeddings: expected the layer's input (B, N, E) for `score: embedding_norm`, got None; a module, "
                "such as `sparsify` swaps in, passes its own"
            )
        importance = embeddings.detach().to(dtype).norm(dim=-1)
    scale = layer_mask.scale if scale is None else scale
    scale = 1.0 / math.sqrt(q.shape[-1]) if scale is None else scale
    bias = None if bias is None else bias.detach().to(dtype)
    arguments = (layer_mask.spec, key_mask, bias, importance, scale)
    row_ptr, col = torch.ops.sparse_mhsa.select_edges.default(q.detach().to(dtype), k.detach().to(dtype), *arguments)
    return EdgeSource(None, row_ptr, col, layer_mask.masked_logits == "zero")


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
    """The edges that a mask by content (such as ``topk``) chooses, to look at or to reuse.

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
        TypeError: a tensor has a wrong type or dtype.
        ConfigError: the configuration cannot be honoured.
        ValueError: a tensor has a wrong shape or is missing, the mask does not choose by content (`Mask.from_config`
            makes it), or it has ``masked_logits: zero``, which its edges alone cannot keep.
    """
    from .functional import autocast  # which needs this module

    _check_tensors(q, k, key_padding_mask, embeddings)
    q, k, _ = autocast(q, k, k)
    layer_mask = LayerMask(load_config(config), q.shape[1], layer, epoch=epoch, num_prefix_tokens=num_prefix_tokens)
    if not layer_mask.by_content:
        raise ValueError(f"config: `{layer_mask.name}` does not choose keys by content; use Mask.from_config")
    if layer_mask.masked_logits != "neg_inf":
        raise ValueError(
            f"masked_logits: `{layer_mask.name}` has `zero`, which a mask made from what it chooses cannot keep"
        )
    edges = edges_of(q, k, layer_mask, key_mask=key_padding_mask, embeddings=embeddings)
    prefix = layer_mask.num_prefix_tokens_used
    options = MaskOptions(q.shape[-1], layer_mask.scale, layer_mask.on_empty_row)
    return [
        Mask._of(edges_from_csr(row_ptr, col, None), layer_mask.name, options, prefix)
        for _, row_ptr, col in edges.per_head(q.shape[0], q.shape[1], q.shape[2], k.shape[2], q.device)
    ]


def recall(
    config: ConfigLike | Mask,
    q: Tensor,
    k: Tensor,
    *,
    top: int,
    layer: int = 0,
    num_layers: int | None = None,
    epoch: int = 0,
    grid: Sequence[int] | None = None,
    num_prefix_tokens: int | None = None,
    key_padding_mask: Tensor | None = None,
    embeddings: Tensor | None = None,
) -> Tensor:
    """How many of the exactly best keys a mask keeps: ``|kept & best| / |best|`` over all queries of a head.

    The best keys of a query are those that the mask ``topk`` keeps with ``k: top``, among past keys if the mask is
    ``causal``. Scores are streamed, so that memory is O(N top) and the edges of the mask. A cheap choice such as
    ``block_topk`` is best compared at its own size, ``top = k * block_size``.

    Args:
        config: whatever `load_config` takes, for any mask; or a `Mask`.
        q: (B, H, N, D) queries.
        k: (B, H or Hkv, N, D) keys.
        top: keys that count as best, per query.
        layer: zero-based depth, for masks that depend on it.
        num_layers: number of layers, for masks that depend on it.
        epoch: training epoch, for masks that change with it.
        grid: [H, W] or [T, H, W] of the tokens after the prefix; the configuration's own value wins.
        num_prefix_tokens: leading tokens off the grid; the configuration's own value wins.
        key_padding_mask: (B, N) bool, True = keep; other keys are neither chosen nor best.
        embeddings: (B, N, E) input of the layer, for ``score: embedding_norm``.

    Returns:
        (B, H) float64 from 0 to 1; 1 where there is no key at all.

    Raises:
        ConfigError: the configuration cannot be honoured.
        TypeError: ``top`` is no integer, or a tensor has a wrong type or dtype.
        ValueError: ``top`` is less than 1, a tensor has a wrong shape or is missing, or the configuration names a
            backend without edges.
    """
    top = integer("top", top, 1)
    _check_tensors(q, k, key_padding_mask, embeddings)
    layer_mask: LayerMask | Mask
    if isinstance(config, Mask):
        layer_mask = config
    else:
        sides = None if grid is None else tuple(grid)
        layer_mask = LayerMask(load_config(config), q.shape[1], layer, num_layers, epoch, sides, num_prefix_tokens)
    if layer_mask.config is not None and not layer_mask.config.uses_edges:
        raise config_error(f"backend: `{layer_mask.name}` has no edges, and so no recall", key="backend")
    options = {"key_mask": key_padding_mask, "embeddings": embeddings}
    exact = {"k": top, "causal": _is_causal(layer_mask), "keep_cls_dense": False}
    best = LayerMask(load_config({"mask": "topk", "mask_kwargs": exact, "num_prefix_tokens": 0}), q.shape[1])
    kept_edges = edges_of(q, k, layer_mask, **options)  # type: ignore[arg-type]
    best_edges = edges_of(q, k, best, key_mask=key_padding_mask, scale=layer_mask.scale)
    batch, heads, queries = q.shape[:3]
    sizes = (batch, heads, queries, k.shape[2], q.device)
    shares = torch.ones(batch, heads, dtype=torch.float64)
    kept = [(samples, _numbered(ptr, col, k.shape[2])) for samples, ptr, col in kept_edges.per_head(*sizes)]
    for sample, (_, row_ptr, col) in enumerate(best_edges.per_head(*sizes)):
        wanted = _numbered(row_ptr, col, k.shape[2])
        have = next(numbers for samples, numbers in kept if samples.start <= sample < samples.stop)
        found = torch.isin(wanted, have, assume_unique=True).cumsum(0)
        total = torch.cat([found.new_zeros(1), found])[row_ptr[:, [0, -1]]].diff(dim=1).flatten()
        count = row_ptr[:, -1] - row_ptr[:, 0]
        shares[sample] = torch.where(count > 0, total.double() / count, shares[sample])
    return shares


def _check_tensors(q: Tensor, k: Tensor, key_padding_mask: Tensor | None, embeddings: Tensor | None) -> None:
    """Raise an error that names the argument unless they fit together, also what this mask has no use for."""
    from .functional import check_beside, check_key_mask, check_qkv  # which needs this module

    check_qkv(q, k, k)
    check_key_mask(key_padding_mask, q, k)
    if embeddings is None:
        return
    check_beside(embeddings, "embeddings", q)
    if not embeddings.is_floating_point():
        raise TypeError(f"embeddings: expected a floating dtype, got {embeddings.dtype}")
    batch, num_tokens = q.shape[0], k.shape[2]
    if embeddings.dim() != 3 or embeddings.shape[:2] != (batch, num_tokens):
        raise ValueError(f"embeddings: expected shape ({batch}, {num_tokens}, E), got {tuple(embeddings.shape)}")


def _is_causal(layer_mask: LayerMask | Mask) -> bool:
    config = layer_mask.config
    return config is not None and json.loads(config.to_json())["mask_kwargs"].get("causal") is True


def _numbered(row_ptr: Tensor, col: Tensor, num_keys: int) -> Tensor:
    """(nnz,) a number per edge, ascending, that tells head, query and key."""
    heads, queries = row_ptr.shape[0], row_ptr.shape[1] - 1
    rows = torch.repeat_interleave(torch.arange(heads * queries, device=col.device), row_ptr.diff(dim=1).flatten())
    return rows * num_keys + col
