"""TimeSformer, as transformers has it and as its authors published it.

Spatial attention (a class token and the patches of one frame) and joint space-time attention are swapped; temporal
attention (the frames of one patch, without a class token) stays dense unless ``include`` names it. The tokens of joint
attention have time varying fastest.

The attention of the original repository is recognised by the timm adapter, as a copy of timm's; here is the form
without projections (``with_qkv=False``), and what both kinds of model tell about their tokens.
"""

import math
import sys

from torch import Tensor, nn

from ..layer_mask import LayerMask
from ..mask import Mask
from .registry import Adapter, Layout, random_image, register_adapter, sides
from .timm_layers import SparseAttention, dropout_probability, embed_dim_of, head_dim_of
from .transformers_attention import attention_forward


class SparseTimesformerSelfAttention(SparseAttention):
    """transformers' `TimesformerSelfAttention` over the edges of a mask. Made by swapping."""

    def forward(self, hidden_states: Tensor, output_attentions: bool = False) -> tuple[Tensor, ...]:  # type: ignore[override]
        """Self-attention.

        Args:
            hidden_states: (B, N, C), where B counts frames or patches too.
            output_attentions: also return the (B, H, N, N) weights.

        Returns:
            (B, N, C), and the weights if asked for.
        """
        q, k, v = self._project(hidden_states)
        out, weights = attention_forward(
            self,
            q,
            k,
            v,
            None,
            dropout=self._dropout(),
            scaling=getattr(self, "scale", None),
            is_causal=False,
            output_attentions=output_attentions,
            embeddings=hidden_states,
        )
        context = out.flatten(2)
        return (context,) if weights is None else (context, weights)


class SparseBareAttention(SparseAttention):
    """Attention without parameters, q = k = v = x, over the edges of a mask. Made by swapping."""

    def _project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        if x.dim() != 3:
            raise ValueError(f"x: expected shape (B, N, C), got {tuple(x.shape)}")
        heads = x.view(*x.shape[:2], self.num_heads, -1).transpose(1, 2)
        return heads, heads, heads


@register_adapter
class TimesformerAdapter(Adapter):
    """Swaps `TimesformerSelfAttention`, and attention without projections."""

    name = "timesformer"

    def matches(self, module: nn.Module) -> bool:
        """By class, or by the switch for projections being off."""
        return _new_class(module) is not None

    def heads(self, module: nn.Module) -> tuple[int, int]:
        """Number of heads and head dimension."""
        assert isinstance(module.num_heads, int)
        if hasattr(module, "qkv"):
            return module.num_heads, head_dim_of(module)
        assert isinstance(module.scale, float)
        return module.num_heads, round(module.scale**-2)

    def embed_dim(self, module: nn.Module) -> int | None:
        """C, which without projections is that of all heads together."""
        return embed_dim_of(module) if hasattr(module, "qkv") else math.prod(self.heads(module))

    def sparsify(self, module: nn.Module, layer_mask: LayerMask | Mask) -> None:
        """Swap in place."""
        new_class = _new_class(module)
        assert new_class is not None
        if not isinstance(module, SparseAttention):
            dense_class = type(module)
            module.__class__ = new_class
            assert isinstance(module, SparseAttention)
            module.dense_class = dense_class
        module.install(layer_mask, self.heads(module)[1])

    def dropout(self, module: nn.Module) -> float:
        """Of ``attn_drop``."""
        return dropout_probability(module)

    def densify(self, module: nn.Module) -> None:
        """Swap back in place."""
        assert isinstance(module, SparseAttention)
        module.revert()

    def layout(self, module: nn.Module) -> Layout | None:
        """Of a model, or a layer of transformers' model, that names its kind of attention."""
        kind = getattr(module, "attention_type", None)
        if kind not in ("divided_space_time", "space_only", "joint_space_time"):
            return None
        # Layers and models of transformers have a configuration, and the original model has a patch embedding.
        source = getattr(module, "config", None) or getattr(module, "patch_embed", None)
        image, patch = sides(getattr(source, "image_size", getattr(source, "img_size", None))), None
        if image is not None:
            patch = sides(getattr(source, "patch_size", None))
        if image is None or patch is None:
            return None
        grid = (image[0] // patch[0], image[1] // patch[1])
        if kind != "joint_space_time":
            return Layout(grid, 1)
        frames = getattr(source, "num_frames", None)
        embedding = getattr(module, "time_embed", None)
        if frames is None and isinstance(embedding, Tensor):
            frames = embedding.shape[1]
        return Layout(None if frames is None else (frames, *grid), 1, "t_fastest")

    def sample(self, model: nn.Module) -> Tensor | None:
        """One random clip for the original model: (B, C, T, H, W)."""
        if getattr(model, "attention_type", None) is None or not hasattr(model, "patch_embed"):
            return None
        embedding = model.patch_embed
        image, times = sides(getattr(embedding, "img_size", None)), getattr(model, "time_embed", None)
        if image is None:
            return None
        frames = times.shape[1] if isinstance(times, Tensor) else 2
        return random_image(getattr(embedding, "proj", None), (frames, *image))


def _new_class(module: nn.Module) -> type[SparseAttention] | None:
    """What ``module``, dense or swapped, becomes or is; None if it is not ours."""
    if isinstance(module, (SparseTimesformerSelfAttention, SparseBareAttention)):
        return type(module)
    models = sys.modules.get("transformers.models.timesformer.modeling_timesformer")
    if models is not None and type(module) is models.TimesformerSelfAttention:
        return SparseTimesformerSelfAttention
    bare = getattr(module, "with_qkv", None) is False and isinstance(getattr(module, "scale", None), float)
    return SparseBareAttention if bare and isinstance(getattr(module, "num_heads", None), int) else None
