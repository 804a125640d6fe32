"""What all sparse attention modules have in common, whichever framework they come from."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from . import flex
from .backends import Backend, build_backend
from .edges import EdgeSource
from .functional import dense_mask
from .layer_mask import LayerMask
from .mask import Mask
from .positions import TokenPositions, edges_at


class SparseLayer(nn.Module):
    """What every sparse attention module has besides its weights: the mask of its layer."""

    layer_mask: LayerMask | Mask
    """Immutable; no parameter and no buffer, so that state dicts are those of dense attention."""

    backend: Backend | None
    """Attention without edges; None for softmax over the edges of the mask."""

    positions: TokenPositions | None = None
    """Where the tokens stood before some were dropped; None where all are there, in their order."""

    def _set_mechanism(self, layer_mask: LayerMask | Mask, head_dim: int, dropout: float, like: Tensor) -> None:
        """Set `layer_mask` and `backend`. A backend that stays the same keeps its trained parameters."""
        backend = build_backend(layer_mask, head_dim, dropout, like)
        present = getattr(self, "backend", None)
        if backend is not None and present is not None:
            backend.take_parameters(present)
        self.backend = backend
        self.layer_mask = layer_mask

    def _remove_mechanism(self) -> None:
        """Leave nothing of what a swap added."""
        del self.layer_mask, self.backend
        self.__dict__.pop("positions", None)

    def mask(self, num_tokens: int) -> Mask:
        """The edges this layer uses for ``num_tokens`` tokens.

        Raises:
            ConfigError: the mask does not exist for that number.
        """
        return self.layer_mask.at(num_tokens)

    def _edges_at(self, token_positions: Tensor | None, num_tokens: int | None, q: Tensor) -> EdgeSource | None:
        """The edges at some positions of the whole sequence; None for those of the mask itself.

        Args:
            token_positions: (B, N) positions; None for those that were noted, if any.
            num_tokens: length of the whole sequence.
            q: (B, H, N, D).

        Raises:
            TypeError: ``token_positions`` is no int64 tensor.
            ValueError: it does not fit ``q``, the mask or the backend.
        """
        if token_positions is None:
            if num_tokens is not None:
                raise ValueError("num_tokens: only has a meaning together with token_positions")
            if self.positions is None or self.backend is not None:
                return None
            return self.positions.edges(self.layer_mask, q)
        if self.backend is not None:
            raise ValueError(f"token_positions: the backend `{self.backend.name}` has no edges that they could choose")
        edges = edges_at(self.layer_mask, token_positions, q.shape[1], num_tokens)
        shape = (q.shape[0], q.shape[2])
        if tuple(token_positions.shape) != shape:
            raise ValueError(f"token_positions: expected shape (B, n) = {shape}, got {tuple(token_positions.shape)}")
        return edges

    def set_epoch(self, epoch: int) -> None:
        """Tell masks that change during training which epoch it is."""
        self.layer_mask = self.layer_mask.at_epoch(epoch)

    @contextmanager
    def densely(self) -> Iterator[None]:
        """While it lasts, every query keeps every key, whatever the layer is configured for."""
        before = self.layer_mask, self.backend
        self.layer_mask, self.backend = dense_mask(self.layer_mask.num_heads), None
        try:
            yield
        finally:
            self.layer_mask, self.backend = before

    def __prepare_scriptable__(self) -> "SparseLayer":
        """Say that `torch.jit.script` is not supported, before its compiler stumbles over something unrelated."""
        raise RuntimeError(
            f"{type(self).__name__} cannot be compiled by torch.jit.script: TorchScript does not know the operators' "
            "autograd function; use torch.compile or torch.export, or densify the model first"
        )

    def _mask_repr(self) -> str:
        layer_mask = self.layer_mask
        config = layer_mask.config
        if config is not None and not config.uses_edges:
            return f"backend={layer_mask.name}, layer={layer_mask.layer}"
        parts = [f"mask={layer_mask.name}", f"layer={layer_mask.layer}"]
        if layer_mask.backend == flex.NAME:
            parts.insert(0, f"backend={flex.NAME}")
        if config is not None and config.seeds:
            parts.append(f"seed={', '.join(map(str, config.seeds))}")
        if layer_mask.num_tokens is not None:
            try:
                mask = self.mask(layer_mask.num_tokens)
            except ValueError:  # a grid that does not fit; forward says so, a repr must not raise
                return ", ".join(parts)
            parts += [f"num_tokens={mask.num_tokens}", f"density={mask.density:.4f}"]
        return ", ".join(parts)


def set_epoch(model: nn.Module, epoch: int) -> None:
    """Tell every sparse attention layer of a model which training epoch it is."""
    for module in model.modules():
        if isinstance(module, SparseLayer):
            module.set_epoch(epoch)


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
