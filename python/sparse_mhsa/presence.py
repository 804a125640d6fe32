"""Layers that are told which tokens are there, by who drops them and not by who calls them.

The layers of a masked autoencoder are called by code that knows nothing of masks. What drops the tokens notes down
where the remaining ones stood, and the sparse layers behind it read that.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn


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

    def of(self, num_tokens: int) -> Tensor | None:
        """The positions of ``num_tokens`` tokens, or None if these are all there are."""
        if self.positions is None or self.positions.is_meta:
            return None
        return None if num_tokens == self.num_tokens != self.positions.shape[1] else self.positions


@contextmanager
def token_positions(model: nn.Module, positions: Tensor, num_tokens: int) -> Iterator[None]:
    """Within it, the sparse layers of a model apply their masks at the original positions of the tokens.

    The same as the argument ``token_positions`` of every layer, for models that do not hand it on. `sparsify` does it
    by itself for masked autoencoders and for patch dropout. With activation checkpointing the backward pass belongs
    inside too, because it runs the layers again.

    Args:
        model: a model or a part of one, such as an encoder.
        positions: (B, n) int64; where each of the n tokens stood, prefix tokens included.
        num_tokens: N, number of tokens of the whole sequence.
    """
    from .layer import SparseLayer  # which needs this module

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
