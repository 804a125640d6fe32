"""Masks for part of the tokens: where each token stood before others were dropped or the order was shuffled.

A masked autoencoder shows its encoder a shuffled quarter of the patches, and patch dropout leaves some out. A mask by
index would then relate tokens that were never neighbours. With the positions known, query i and key j of a sample are
related if the mask relates ``positions[i]`` and ``positions[j]``.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from .edges import EdgeSource
from .layer import SparseLayer
from .layer_mask import LayerMask
from .mask import Mask
from .ops import has_background


class TokenPositions:
    """Where the tokens of the current batch stood; shared by the layers of one stack. Copies start empty."""

    def __init__(self) -> None:
        self.positions: Tensor | None = None
        self.num_tokens = 0

    def __reduce__(self) -> tuple[type["TokenPositions"], tuple[()]]:
        return TokenPositions, ()

    def keep_patches(self, kept: Tensor | None, num_patches: int, num_prefix_tokens: int) -> None:
        """Take note of the patches that are left, each sample's in their present order, behind a prefix.

        Args:
            kept: (B, n) int64 indices of patches; None if all are there.
            num_patches: of the whole sample.
            num_prefix_tokens: leading tokens that are never dropped.
        """
        if kept is None:
            self.positions = None
            return
        prefix = torch.arange(num_prefix_tokens, device=kept.device).expand(kept.shape[0], -1)
        self.positions = torch.cat([prefix, kept + num_prefix_tokens], dim=1)
        self.num_tokens = num_prefix_tokens + num_patches

    def edges(self, layer_mask: LayerMask | Mask, q: Tensor) -> EdgeSource | None:
        """The edges between the tokens that are there, or None if none is missing.

        Args:
            layer_mask: the mask of the layer.
            q: (B, H, N, D).

        Raises:
            ValueError: the mask looks at the order of the tokens in another way than by its edges, or there are
                other tokens than the positions say.
        """
        if self.positions is None or layer_mask.is_dense or q.is_meta:
            return None
        batch, heads, queries, _ = q.shape
        if layer_mask.by_content:
            if layer_mask.name == "topk":  # keys are compared with each other, wherever they stand
                return None
            raise ValueError(f"mask: `{layer_mask.name}` cannot be applied to part of the tokens")
        if queries == self.num_tokens != self.positions.shape[1]:
            return None
        if self.positions.shape != (batch, queries):
            raise ValueError(
                f"token_positions: expected (B, N) = {(batch, queries)}, got {tuple(self.positions.shape)}"
            )
        source = layer_mask.source(self.num_tokens)
        if has_background(source.spec):
            raise ValueError("masked_logits: `zero` cannot be combined with token_positions")
        ((_, row_ptr, col),) = source.per_head(1, heads, self.num_tokens, self.num_tokens, q.device)
        return restrict(row_ptr, col, self.positions.to(q.device), self.num_tokens)


def restrict(row_ptr: Tensor, col: Tensor, positions: Tensor, num_tokens: int) -> EdgeSource:
    """The edges of a mask between some of its tokens, in time and memory proportional to the edges of those rows.

    Args:
        row_ptr: (H, N + 1) absolute offsets into ``col``.
        col: (nnz,) keys.
        positions: (B, n) which of the N tokens are there, and in which order.
        num_tokens: N.

    Returns:
        Edge tensors of B * H lists over n tokens.
    """
    batch, queries = positions.shape
    heads, device = row_ptr.shape[0], positions.device
    place = torch.full((batch, num_tokens), -1, dtype=torch.int64, device=device)
    place.scatter_(1, positions, torch.arange(queries, device=device).expand(batch, -1))
    rows = torch.arange(heads, device=device)[None, :, None], positions[:, None, :]
    starts = row_ptr[rows].flatten()
    degrees = row_ptr[rows[0], rows[1] + 1].flatten() - starts
    row = torch.repeat_interleave(torch.arange(batch * heads * queries, device=device), degrees)
    first = degrees.cumsum(0) - degrees
    edge = torch.arange(row.shape[0], device=device) - first[row] + starts[row]
    new_col = place[row // (heads * queries), col[edge]]
    kept = new_col >= 0
    # In ascending order within each row, whatever order the tokens are in.
    key = (row[kept] * queries + new_col[kept]).sort().values
    counts = torch.bincount(key // queries, minlength=batch * heads * queries)
    ends = counts.cumsum(0).view(batch * heads, queries)
    begin = ends[:, :1] - counts.view(batch * heads, queries)[:, :1]
    return EdgeSource(None, torch.cat([begin, ends], dim=1), key % queries)


@contextmanager
def token_positions(model: nn.Module, positions: Tensor, num_tokens: int) -> Iterator[None]:
    """Within it, the sparse layers of a model apply their masks at the original positions of the tokens.

    `sparsify` does this by itself for masked autoencoders and for patch dropout. With activation checkpointing the
    backward pass belongs inside too, because it runs the layers again.

    Args:
        model: a model or a part of one, such as an encoder.
        positions: (B, n) int64; where each of the n tokens stood, prefix tokens included.
        num_tokens: N, number of tokens of the whole sequence.

    Raises:
        TypeError: ``positions`` is no int64 tensor.
        ValueError: it has the wrong shape, positions out of range, or one of them twice in a sample.
    """
    if not isinstance(positions, Tensor) or positions.dtype != torch.int64:
        got = positions.dtype if isinstance(positions, Tensor) else type(positions).__name__
        raise TypeError(f"positions: expected an int64 tensor, got {got}")
    if positions.dim() != 2:
        raise ValueError(f"positions: expected shape (B, n), got {tuple(positions.shape)}")
    if positions.numel() and not 0 <= int(positions.min()) <= int(positions.max()) < num_tokens:
        raise ValueError(f"positions: expected numbers from 0 to {num_tokens - 1}")
    ordered = positions.sort(dim=1).values
    if (ordered[:, 1:] == ordered[:, :-1]).any():
        raise ValueError("positions: expected no position twice in a sample")
    shared = TokenPositions()
    shared.positions, shared.num_tokens = positions, num_tokens
    layers = [module for module in model.modules() if isinstance(module, SparseLayer)]
    before = [layer.positions for layer in layers]
    for layer in layers:
        layer.positions = shared
    try:
        yield
    finally:
        for layer, former in zip(layers, before, strict=True):
            layer.positions = former
