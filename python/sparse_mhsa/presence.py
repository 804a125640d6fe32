"""Layers that are told which tokens are there, by who drops them and not by who calls them.

The layers of a masked autoencoder are called by code that knows nothing of masks. What drops the tokens notes down
where the remaining ones stood, and the sparse layers behind it read that.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from weakref import WeakSet

import torch
from torch import Tensor, nn


class _Awaited:
    """A forward pass whose backward pass has not come to its end."""


def is_backward() -> bool:
    """Whether this thread is inside a backward pass, where gradient checkpointing computes layers again."""
    return not torch.compiler.is_compiling() and bool(torch._C._current_graph_task_id() != -1)


class TokenPositions:
    """Where the tokens of the current batch stood; shared by the layers of one stack. Copies start empty."""

    def __init__(self) -> None:
        self.positions: Tensor | None = None
        self.num_tokens = 0
        self._awaited: WeakSet[_Awaited] = WeakSet()

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

    def hold_until_backward(self, kept: Tensor) -> None:
        """The layers may be computed again until the gradient of ``kept``, what they begin with, is there."""
        if torch.compiler.is_compiling() or not kept.requires_grad or torch._C._functorch.peek_interpreter_stack():
            return
        awaited = _Awaited()
        self._awaited.add(awaited)
        kept.register_hook(lambda _: self._awaited.discard(awaited))  # type: ignore[no-untyped-call]

    def of(self, num_tokens: int) -> Tensor | None:
        """The positions of ``num_tokens`` tokens, or None if these are all there are.

        Raises:
            RuntimeError: a layer is computed again in a backward pass, and it cannot be told for which batch.
        """
        if is_backward() and len(self._awaited) > 1:
            raise RuntimeError(
                "token_positions: with gradient checkpointing, layers behind dropped tokens are computed again in the "
                "backward pass, at the positions of the last batch; call backward after each forward pass"
            )
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
