"""Attention among some tokens of a sequence: the edges of a mask at the places where those tokens came from.

A masked autoencoder shows its encoder a shuffled quarter of the patches. A mask speaks about places in the whole
sequence, so it is the sub-mask ``M[p][:, p]`` at the positions ``p`` of each sample that applies, not the mask of a
shorter sequence. Time and memory grow with the edges of the rows that are present.
"""

import json

import torch
import torch.nn.functional as F
from torch import Tensor

from .edges import EdgeSource, VmapInfo, is_mapped
from .layer_mask import LayerMask
from .mask import Mask


def edges_at(
    layer_mask: LayerMask | Mask, token_positions: Tensor, num_heads: int, num_tokens: int | None = None
) -> EdgeSource | None:
    """The edges of a mask among the tokens that are present, counted in the order in which they arrive.

    Args:
        layer_mask: the mask of the whole sequence.
        token_positions: (B, n) int64: where token i of each sample stands in the whole sequence of N tokens, prefix
            included; all different within a sample.
            What `check_positions` lets through.
        num_heads: H.
        num_tokens: N, where the mask does not know it.

    Returns:
        One edge list per sample and head; None where positions make no difference: the dense mask, and ``topk``.

    Raises:
        ValueError: the positions do not fit, N is unknown, or the mask cannot be taken apart.
    """
    if layer_mask.is_dense:
        return None
    if layer_mask.masked_logits == "zero":
        raise ValueError("masked_logits: `zero` cannot be combined with token_positions")
    if layer_mask.by_content:
        _check_choice(layer_mask, token_positions)
        return None
    known = layer_mask.num_tokens
    if None not in (known, num_tokens) and known != num_tokens:
        raise ValueError(f"num_tokens: the mask `{layer_mask.name}` is for {known} tokens, got {num_tokens}")
    whole = num_tokens if known is None else known
    if whole is None:
        raise ValueError(
            f"num_tokens: expected the length of the whole sequence, which the mask `{layer_mask.name}` does not know; "
            "got None"
        )
    device = token_positions.device
    ((_, row_ptr, col),) = layer_mask.source(whole).per_head(1, num_heads, whole, whole, device)
    return EdgeSource(None, *restrict_edges(row_ptr, col, token_positions))


def check_positions(token_positions: object, shape: tuple[int, ...]) -> None:
    """Raise unless ``token_positions`` is an int64 tensor of a shape, (B, n) or without a batch (n,).

    Raises:
        TypeError: it is no int64 tensor.
        ValueError: its shape is another.
    """
    if not isinstance(token_positions, Tensor) or token_positions.dtype != torch.int64:
        got = token_positions.dtype if isinstance(token_positions, Tensor) else type(token_positions).__name__
        raise TypeError(f"token_positions: expected an int64 tensor, got {got}")
    if tuple(token_positions.shape) != shape:
        letters = "(B, n)" if len(shape) == 2 else "(n,)"
        raise ValueError(f"token_positions: expected shape {letters} = {shape}, got {tuple(token_positions.shape)}")


@torch.library.custom_op("sparse_mhsa::restrict_edges", mutates_args=())
def restrict_edges(row_ptr: Tensor, col: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
    """The edges between the tokens at ``positions``, for every sample and head.

    Args:
        row_ptr: (H, N + 1) int64 absolute offsets into ``col``.
        col: (nnz,) int64 keys.
        positions: (B, n) int64, different within a sample.

    Returns:
        ``row_ptr`` (B * H, n + 1) and ``col``, ascending within a row, both counted in the order of ``positions``.

    Raises:
        ValueError: a position is outside the sequence or occurs twice.
    """
    (heads, tokens), (batch, present) = (row_ptr.shape[0], row_ptr.shape[1] - 1), positions.shape
    device = positions.device
    if positions.numel() and (positions.min() < 0 or positions.max() >= tokens):
        low, high = int(positions.min()), int(positions.max())
        raise ValueError(f"token_positions: expected places from 0 to {tokens - 1}, got {low} to {high}")
    order = torch.arange(present, device=device).expand(batch, -1)
    place = positions.new_full((batch, tokens), -1).scatter_(1, positions, order)
    if not torch.equal(place.gather(1, positions), order):
        sample = int((place.gather(1, positions) != order).any(1).nonzero()[0])
        raise ValueError(f"token_positions: expected different places, sample {sample} has one twice")
    # The edges of the rows that are present, row after row: sample slowest, then head, then query.
    degrees = row_ptr.diff(dim=1)[:, positions].transpose(0, 1).flatten()
    starts = row_ptr[:, :-1][:, positions].transpose(0, 1).flatten()
    rows = torch.repeat_interleave(torch.arange(degrees.numel(), device=device), degrees)
    within = torch.arange(rows.numel(), device=device) - (degrees.cumsum(0) - degrees)[rows]
    keys = col[starts[rows] + within]
    samples = torch.div(rows, max(1, heads * present), rounding_mode="floor")
    keys = place.flatten()[samples * tokens + keys]
    rows, keys = rows[keys >= 0], keys[keys >= 0]
    keys = (rows * max(1, present) + keys).sort().values % max(1, present)
    ends = torch.bincount(rows, minlength=degrees.numel()).cumsum(0)
    offsets = torch.cat([ends.new_zeros(1), ends])
    first = present * torch.arange(batch * heads, device=device)[:, None]
    return offsets[first + torch.arange(present + 1, device=device)], keys


@restrict_edges.register_fake
def _(row_ptr: Tensor, col: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
    lists = positions.shape[0] * row_ptr.shape[0]
    edges = torch.library.get_ctx().new_dynamic_size()
    return positions.new_empty(lists, positions.shape[1] + 1), positions.new_empty(edges)


@restrict_edges.register_vmap
def _(info: VmapInfo, in_dims: tuple[int | None, ...], *args: Tensor) -> tuple[tuple[Tensor, Tensor], tuple[int, int]]:
    """One sample after another. They must be of one size, so the shorter ``col`` end in room that holds no edges."""
    lists = [
        restrict_edges(*(arg if dim is None else arg.select(dim, i) for arg, dim in zip(args, in_dims, strict=True)))
        for i in range(info.batch_size)
    ]
    room = max(col.shape[0] for _, col in lists)
    cols = [F.pad(col, (0, room - col.shape[0]), value=-1) for _, col in lists]
    return (torch.stack([row_ptr for row_ptr, _ in lists]), torch.stack(cols)), (0, 0)


def _check_choice(layer_mask: LayerMask | Mask, positions: Tensor) -> None:
    """Raise where a mask that chooses keys by content also asks where they stand."""
    spec = json.loads(layer_mask.spec) if isinstance(layer_mask, LayerMask) else {}
    if layer_mask.name != "topk" or spec["mask_kwargs"].get("causal"):
        raise ValueError(
            f"mask: `{layer_mask.name}` chooses keys by content and by place; it cannot be combined with "
            "token_positions"
        )
    prefix = spec["num_prefix_tokens"]
    # Neither traced nor mapped positions can be looked at.
    if torch.compiler.is_compiling() or is_mapped(positions) or positions.shape[1] < prefix:
        return
    if not (positions[:, :prefix] == torch.arange(prefix, device=positions.device)).all():
        raise ValueError(f"token_positions: `topk` expects the {prefix} prefix tokens first, in their order")
