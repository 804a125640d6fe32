"""timm's `Attention`, and the copies of it in MAE, DeiT and other repositories."""

import copy
import inspect
import logging
import sys

import torch
from torch import Tensor, nn

from ..functional import additive_bias, attend, causal_bias, check_qkv, dense_mask
from ..layer import SparseLayer
from ..masks import LayerMask, Mask
from .registry import Adapter, register_adapter

_LOGGER = logging.getLogger("sparse_mhsa")
_CHILDREN = {"qkv", "q_norm", "k_norm", "attn_drop", "norm", "gate", "proj", "proj_drop"}


class SparseAttention(SparseLayer):
    """timm's `Attention` over the edges of a mask. Made by swapping, never constructed.

    Parameters, submodules and state dict are those of the dense module. q, k and v are strided views of one
    packed projection, which the kernels read without a copy.
    """

    num_heads: int
    qkv: nn.Module
    proj: nn.Module
    dense_class: type[nn.Module]
    """What the module was."""

    def forward(self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
        """Self-attention.

        Args:
            x: (B, N, C).
            attn_mask: broadcastable to (B, H, N, N); bool (True = keep) or floating (added), as in timm.
            is_causal: drop keys after the query instead of ``attn_mask``.

        Returns:
            (B, N, C).
        """
        if x.dim() != 3:
            raise ValueError(f"x: expected shape (B, N, C), got {tuple(x.shape)}")
        batch, tokens, _ = x.shape
        gate = getattr(self, "gate", None)
        gate = None if gate is None else gate(x).sigmoid()
        q, k, v = self.qkv(x).unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)
        q, k = self._optional("q_norm", q), self._optional("k_norm", k)
        check_qkv(q, k, v)
        if is_causal:
            attn_mask = causal_bias(q, k)
        scale = self.layer_mask.scale
        out, _ = attend(
            q,
            k,
            v,
            self.layer_mask,
            bias=additive_bias(attn_mask, q, k),
            dropout_p=self._dropout(),
            scale=getattr(self, "scale", None) if scale is None else scale,
        )
        out = self._optional("norm", out.transpose(1, 2).reshape(batch, tokens, -1))
        if gate is not None:
            out = out * gate
        return self._optional("proj_drop", self.proj(out))

    def _optional(self, name: str, x: Tensor) -> Tensor:
        module = getattr(self, name, None)
        result: Tensor = x if module is None else module(x)
        return result

    def _dropout(self) -> float:
        dropout = getattr(self, "attn_drop", None)
        if dropout is None or not self.training:
            return 0.0
        return float(getattr(dropout, "p", dropout))

    def extra_repr(self) -> str:
        """Heads and mask."""
        return f"num_heads={self.num_heads}, {self._mask_repr()}"


@register_adapter
class TimmAdapter(Adapter):
    """Swaps timm's `Attention` and modules that compute the same from ``qkv``, ``proj`` and ``num_heads``."""

    name = "timm"

    def matches(self, module: nn.Module) -> bool:
        """By class, or by structure together with a trial that it computes softmax attention."""
        if isinstance(module, SparseAttention):
            return True
        layers = sys.modules.get("timm.layers.attention")
        if layers is not None and type(module) is layers.Attention:
            return True
        return _has_the_structure(module) and _computes_attention(module)

    def heads(self, module: nn.Module) -> tuple[int, int]:
        """Number of heads and head dimension."""
        packed = module.get_submodule("qkv").out_features
        assert isinstance(module.num_heads, int)
        assert isinstance(packed, int)
        return module.num_heads, packed // (3 * module.num_heads)

    def sparsify(self, module: nn.Module, layer_mask: LayerMask | Mask) -> None:
        """Swap in place."""
        dense_class = type(module)
        module.__class__ = SparseAttention
        assert isinstance(module, SparseAttention)
        if dense_class is not SparseAttention:
            module.dense_class = dense_class
        module.layer_mask = layer_mask

    def densify(self, module: nn.Module) -> None:
        """Swap back in place."""
        assert isinstance(module, SparseAttention)
        dense_class = module.dense_class
        del module.layer_mask, module.dense_class
        dense: nn.Module = module
        dense.__class__ = dense_class

    def finish(self, model: nn.Module) -> None:
        """Warn of patches dropped in training: masks go by position, and the positions close up."""
        sparse = any(isinstance(module, SparseAttention) for module in model.modules())
        if sparse and not isinstance(getattr(model, "patch_drop", nn.Identity()), nn.Identity):
            _LOGGER.warning(
                "%s drops patches in training; its masks then apply to the patches left, as if they were neighbours",
                type(model).__name__,
            )

    def sample(self, model: nn.Module) -> Tensor | None:
        """One random image of the size that ``patch_embed`` expects."""
        embedding = getattr(model, "patch_embed", None)
        size = getattr(embedding, "img_size", None)
        projection = getattr(embedding, "proj", None)
        if not isinstance(size, (tuple, list)) or not isinstance(projection, nn.Conv2d):
            return None
        weight = projection.weight
        generator = torch.Generator(weight.device) if weight.device.type != "meta" else None
        shape = (1, projection.in_channels, *size)
        return torch.randn(shape, generator=generator, device=weight.device).to(weight.dtype)


def _has_the_structure(module: nn.Module) -> bool:
    children = dict(module.named_children())
    if not {"qkv", "proj"} <= children.keys() <= _CHILDREN or not isinstance(children["qkv"], nn.Linear):
        return False
    if any(x is not None for x in (*module._parameters.values(), *module._buffers.values())):
        return False
    num_heads = getattr(module, "num_heads", None)
    if not isinstance(num_heads, int) or num_heads < 1 or children["qkv"].out_features % (3 * num_heads):
        return False
    first, *others = list(inspect.signature(module.forward).parameters)
    return first == "x" and set(others) <= {"attn_mask", "is_causal"}


def _computes_attention(module: nn.Module) -> bool:
    """Whether a module of the right structure gives, on three random tokens, what `SparseAttention` gives."""
    if any(parameter.is_meta for parameter in module.parameters()):
        return True
    dense = copy.deepcopy(module).double().eval()
    sparse = copy.deepcopy(dense)
    adapter = TimmAdapter()
    adapter.sparsify(sparse, dense_mask(adapter.heads(dense)[0]))
    qkv = dense.get_submodule("qkv")
    assert isinstance(qkv, nn.Linear)
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(1, 3, qkv.in_features, dtype=torch.float64, generator=generator)
    try:
        with torch.no_grad():
            # Not the modules themselves, so that no hook runs.
            expected, got = dense.forward(x), sparse.forward(x)
    except (AttributeError, IndexError, RuntimeError, TypeError, ValueError):
        return False
    return isinstance(expected, Tensor) and expected.shape == got.shape and torch.allclose(expected, got)
