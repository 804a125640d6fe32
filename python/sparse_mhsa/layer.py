"""What all sparse attention modules have in common, whichever framework they come from."""

from collections.abc import Iterator
from contextlib import contextmanager

from torch import Tensor, nn

from . import flex
from .backends import Backend, build_backend
from .config import integer
from .edges import EdgeSource
from .functional import dense_mask
from .layer_mask import LayerMask
from .mask import Mask
from .positions import check_positions, edges_at
from .presence import TokenPositions


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

    def _edges_at(
        self, token_positions: Tensor | None, num_tokens: int | None, num_heads: int, shape: tuple[int, int]
    ) -> EdgeSource | None:
        """The edges at (B, n) positions of the whole sequence; None for those of the mask itself.

        Raises:
            TypeError: ``token_positions`` is no int64 tensor.
            ValueError: it does not fit ``shape`` = (B, n), the mask or the backend.
        """
        if token_positions is None:
            if num_tokens is not None:
                raise ValueError("num_tokens: only has a meaning together with token_positions")
            # A backend takes the tokens that come in the order in which they come.
            if self.positions is None or self.backend is not None:
                return None
            token_positions, num_tokens = self.positions.of(shape[1]), self.positions.num_tokens
        if token_positions is None:
            return None
        if self.backend is not None:
            raise ValueError(f"token_positions: the backend `{self.backend.name}` has no edges that they could choose")
        check_positions(token_positions, shape)
        return edges_at(self.layer_mask, token_positions, num_heads, num_tokens)

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
            counts = mask.nnz_per_head
            if min(counts) < max(counts):
                low, high = (count / mask.num_tokens**2 for count in (min(counts), max(counts)))
                parts.append(f"density of heads={low:.4f}..{high:.4f}")
        return ", ".join(parts)


def set_epoch(model: nn.Module, epoch: int) -> None:
    """Tell every sparse attention layer of a model which training epoch it is.

    Args:
        model: with or without sparse layers.
        epoch: at least 0.

    Raises:
        TypeError: ``model`` is no module, or ``epoch`` no integer.
        ValueError: ``epoch`` is negative, or beyond 64 bits.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected a torch.nn.Module, got {type(model).__name__}")
    epoch = integer("epoch", epoch)
    for module in model.modules():
        if isinstance(module, SparseLayer):
            module.set_epoch(epoch)
