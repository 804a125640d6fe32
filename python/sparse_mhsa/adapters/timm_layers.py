"""timm's self-attention over the edges of a mask, with and without rotary position embeddings."""

import torch
from torch import Tensor, nn

from ..edges import EdgeSource
from ..functional import attend, autocast, bias_of_call, check_qkv
from ..layer import SparseLayer
from ..layer_mask import LayerMask
from ..mask import Mask


class SparseAttention(SparseLayer):
    """timm's `Attention` over the edges of a mask. Made by swapping; `SparseTimmAttention` can be constructed.

    Parameters, submodules and state dict are those of the dense module. q, k and v are strided views of one
    packed projection, which the kernels read without a copy.
    """

    num_heads: int
    dense_class: type[nn.Module]
    """What the module was."""

    def forward(
        self,
        x: Tensor,
        attn_mask: Tensor | None = None,
        is_causal: bool = False,
        *,
        token_positions: Tensor | None = None,
        num_tokens: int | None = None,
    ) -> Tensor:
        """Self-attention.

        Args:
            x: (B, N, C).
            attn_mask: broadcastable to (B, H, N, N); bool (True = keep) or floating (added), as in timm.
            is_causal: drop keys after the query, besides what ``attn_mask`` drops.
            token_positions: (B, N) int64, for N tokens picked out of a longer sequence: where in it each stands.
            num_tokens: length of the whole sequence, if the grid and the prefix of the layer do not tell it.

        Returns:
            (B, N, C).
        """
        q, k, v = self._project(x)
        q, k = self._optional("q_norm", q), self._optional("k_norm", k)
        edges = self._edges_at(token_positions, num_tokens, self.num_heads, (x.shape[0], x.shape[1]))
        return self._attend(x, q, k, v, edges, attn_mask, is_causal)

    def _project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """q, k and v as (B, H, N, D) views."""
        if x.dim() != 3:
            raise ValueError(f"x: expected shape (B, N, C), got {tuple(x.shape)}")
        q, k, v = self.get_submodule("qkv")(x).unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)
        return q, k, v

    def _attend(
        self,
        x: Tensor,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        edges: EdgeSource | None,
        attn_mask: Tensor | None,
        is_causal: bool,
    ) -> Tensor:
        """What follows the projections: attention, norm, gate and output projection."""
        check_qkv(q, k, v)
        bias = bias_of_call(attn_mask, is_causal, q, k, self.layer_mask, edges)
        if self.backend is not None:
            q, k, v = autocast(q, *(heads.repeat_interleave(q.shape[1] // k.shape[1], 1) for heads in (k, v)))
            out, _ = self.backend.attend(q, k, v, bias=bias, dropout_p=self._dropout())
        else:
            scale = self.layer_mask.scale
            out, _ = attend(
                q,
                k,
                v,
                self.layer_mask,
                edges,
                bias=bias,
                dropout_p=self._dropout(),
                scale=getattr(self, "scale", None) if scale is None else scale,
                embeddings=x,
            )
        out = self._optional("norm", out.transpose(1, 2).flatten(2))
        gate = getattr(self, "gate", None)
        if gate is not None:
            out = out * gate(x).sigmoid()
        return self._optional("proj_drop", self._optional("proj", out))

    def _optional(self, name: str, x: Tensor) -> Tensor:
        module = getattr(self, name, None)
        result: Tensor = x if module is None else module(x)
        return result

    def install(self, layer_mask: LayerMask | Mask, head_dim: int) -> None:
        """Attend by ``layer_mask`` from now on."""
        like = next(self.parameters(), torch.empty(0))
        self._set_mechanism(layer_mask, head_dim, dropout_probability(self), like)

    def revert(self) -> nn.Module:
        """Make the layer what it was, in place."""
        dense: nn.Module = self
        dense_class = self.dense_class
        self._remove_mechanism()
        del self.dense_class
        dense.__class__ = dense_class
        return dense

    def _dropout(self) -> float:
        return dropout_probability(self) if self.training else 0.0

    def extra_repr(self) -> str:
        """Heads and mask."""
        return f"num_heads={self.num_heads}, {self._mask_repr()}"


class SparseAttentionRope(SparseAttention):
    """timm's `AttentionRope` and `EvaAttention` (EVA, DINOv3, Perception Encoder) over the edges of a mask.

    Projections are packed or separate, keys and values may have fewer heads than queries, and the tokens after
    ``num_prefix_tokens`` are rotated by timm's own function. Made by swapping.
    """

    num_prefix_tokens: int
    k_bias: Tensor
    v_bias: Tensor

    def forward(  # type: ignore[override]
        self,
        x: Tensor,
        rope: Tensor | None = None,
        attn_mask: Tensor | None = None,
        is_causal: bool = False,
        *,
        token_positions: Tensor | None = None,
        num_tokens: int | None = None,
    ) -> Tensor:
        """Self-attention.

        Args:
            x: (B, N, C).
            rope: rotary embedding of the tokens after the prefix, as timm's models pass it.
            attn_mask: broadcastable to (B, H, N, N); bool (True = keep) or floating (added), as in timm.
            is_causal: drop keys after the query, besides what ``attn_mask`` drops.
            token_positions: (B, N) int64, for N tokens picked out of a longer sequence: where in it each stands.
            num_tokens: length of the whole sequence, if the grid and the prefix of the layer do not tell it.

        Returns:
            (B, N, C).
        """
        q, k, v = self._project(x)
        q, k = self._optional("q_norm", q), self._optional("k_norm", k)
        if rope is not None:
            q, k = (self._rotate(heads, rope).type_as(v) for heads in (q, k))
        edges = self._edges_at(token_positions, num_tokens, self.num_heads, (x.shape[0], x.shape[1]))
        return self._attend(x, q, k, v, edges, attn_mask, is_causal)

    def _project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        packed = getattr(self, "qkv", None)
        if packed is None:
            head_dim = head_dim_of(self)
            q, k, v = (
                self.get_submodule(name)(x).unflatten(-1, (-1, head_dim)).transpose(1, 2)
                for name in ("q_proj", "k_proj", "v_proj")
            )
            return q, k, v
        q_bias = getattr(self, "q_bias", None)
        if q_bias is None:
            return super()._project(x)
        bias = torch.cat((q_bias, self.k_bias, self.v_bias))
        # What wraps the projection, such as LoRA, would be passed over by reading its weight.
        if getattr(self, "qkv_bias_separate", False) or type(packed) is not nn.Linear:
            projected = packed(x) + bias
        else:
            projected = nn.functional.linear(x, packed.weight, bias)
        q, k, v = projected.unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)
        return q, k, v

    def _rotate(self, heads: Tensor, rope: Tensor) -> Tensor:
        from timm.layers.pos_embed_sincos import apply_rot_embed_cat

        prefix, patches = heads.tensor_split((self.num_prefix_tokens,), dim=2)
        rotated = apply_rot_embed_cat(patches, rope, half=getattr(self, "rotate_half", False))
        return torch.cat([prefix, rotated], dim=2)


def head_dim_of(module: nn.Module) -> int:
    """D, from the projection of the queries, alone or together with keys and values."""
    num_heads = module.num_heads
    assert isinstance(num_heads, int)
    packed = getattr(module, "qkv", None)
    return _projection(module).shape[0] // (num_heads if packed is None else 3 * num_heads)


def embed_dim_of(module: nn.Module) -> int:
    """C, from the same projection."""
    return _projection(module).shape[1]


def _projection(module: nn.Module) -> Tensor:
    """The weight of the projection of the queries, alone or together with keys and values."""
    packed = getattr(module, "qkv", None)
    # A layer that wraps the projection, such as LoRA's, shows its weight too.
    weight = (module.get_submodule("q_proj") if packed is None else packed).weight
    assert isinstance(weight, Tensor)
    return weight


def dropout_probability(module: nn.Module) -> float:
    """Of ``attn_drop``, a module or a number."""
    dropout = getattr(module, "attn_drop", None)
    return 0.0 if dropout is None else float(getattr(dropout, "p", dropout))
