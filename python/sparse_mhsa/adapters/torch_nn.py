"""`torch.nn.MultiheadAttention`, and with it torch's transformer layers and torchvision's Vision Transformers."""

from torch import Tensor, nn

from ..layer_mask import LayerMask
from ..mask import Mask
from ..module import SparseMHSA, check_layer
from .registry import Adapter, Layout, random_image, register_adapter

_DENSE_NESTED_TENSOR = "_dense_use_nested_tensor"
"""Where an encoder keeps the ``use_nested_tensor`` it had before the swap."""


@register_adapter
class TorchAdapter(Adapter):
    """Swaps `torch.nn.MultiheadAttention` for `SparseMHSA`."""

    name = "torch.nn"

    def matches(self, module: nn.Module) -> bool:
        """Exactly these classes: a subclass may compute something else."""
        return type(module) in (nn.MultiheadAttention, SparseMHSA)

    def heads(self, module: nn.Module) -> tuple[int, int]:
        """Number of heads and head dimension."""
        assert isinstance(module, nn.MultiheadAttention)
        return module.num_heads, module.head_dim

    def embed_dim(self, module: nn.Module) -> int | None:
        """E."""
        assert isinstance(module, nn.MultiheadAttention)
        return int(module.embed_dim)

    def sparsify(self, module: nn.Module, layer_mask: LayerMask | Mask) -> None:
        """Swap in place."""
        assert isinstance(module, nn.MultiheadAttention)
        SparseMHSA.convert(module, layer_mask)

    def check(self, module: nn.Module, layer_mask: LayerMask | Mask) -> None:
        """Sizes and appended keys."""
        assert isinstance(module, nn.MultiheadAttention)
        check_layer(module, layer_mask)

    def dropout(self, module: nn.Module) -> float:
        """Of the attention weights."""
        assert isinstance(module, nn.MultiheadAttention)
        return float(module.dropout)

    def densify(self, module: nn.Module) -> None:
        """Swap back in place."""
        assert isinstance(module, SparseMHSA)
        module.revert()

    def dense_by_design(self, parent: nn.Module | None, name: str) -> str | None:
        """Decoders and cross-attention, such as pooling by a learned query."""
        if name.rpartition(".")[2] == "multihead_attn" or "cross" in name:
            return "cross-attention"
        if isinstance(getattr(parent, "probe", None), nn.Parameter):
            return "cross-attention"
        return "decoder" if isinstance(parent, nn.TransformerDecoderLayer) else None

    def layout(self, module: nn.Module) -> Layout | None:
        """Of torchvision's Vision Transformers, which have a class token and take square images of one size."""
        side = _image_side(module)
        patch = getattr(module, "patch_size", None)
        if side is None or not isinstance(patch, int):
            return None
        return Layout((side // patch, side // patch), 1)

    def sample(self, model: nn.Module) -> Tensor | None:
        """One random image for torchvision's Vision Transformers."""
        side = _image_side(model)
        return None if side is None else random_image(getattr(model, "conv_proj", None), (side, side))

    def finish(self, model: nn.Module) -> None:
        """Keep encoders with sparse layers from turning padded inputs into nested tensors."""
        for encoder in model.modules():
            if not isinstance(encoder, nn.TransformerEncoder):
                continue
            sparse = any(isinstance(module, SparseMHSA) for module in encoder.modules())
            if sparse and _DENSE_NESTED_TENSOR not in encoder.__dict__:
                encoder.__dict__[_DENSE_NESTED_TENSOR] = encoder.use_nested_tensor
                encoder.use_nested_tensor = False
            elif not sparse and _DENSE_NESTED_TENSOR in encoder.__dict__:
                encoder.use_nested_tensor = encoder.__dict__.pop(_DENSE_NESTED_TENSOR)


def _image_side(module: nn.Module) -> int | None:
    """Of the images that a torchvision Vision Transformer takes, which is known by its parts; else None."""
    side = getattr(module, "image_size", None)
    is_vit = isinstance(getattr(module, "class_token", None), Tensor) and hasattr(module, "conv_proj")
    return side if is_vit and isinstance(side, int) else None
