"""timm's `Attention`, and the copies of it in MAE, DeiT and other repositories."""

import copy
import copyreg
import inspect
import json
import logging
import sys
from typing import ClassVar

import torch
from torch import Tensor, nn

from .._core import AttentionConfig
from ..config import ConfigLike, load_config
from ..functional import additive_bias, attend, autocast, causal_bias, check_qkv, dense_mask
from ..layer import SparseLayer
from ..layer_mask import LayerMask
from ..mask import Mask
from .registry import Adapter, Layout, random_image, register_adapter

_LOGGER = logging.getLogger("sparse_mhsa")
_CHILDREN = {"qkv", "q_norm", "k_norm", "attn_drop", "norm", "gate", "proj", "proj_drop"}


class SparseAttention(SparseLayer):
    """timm's `Attention` over the edges of a mask. Made by swapping; `SparseTimmAttention` can be constructed.

    Parameters, submodules and state dict are those of the dense module. q, k and v are strided views of one
    packed projection, which the kernels read without a copy.
    """

    num_heads: int
    qkv: nn.Module
    proj: nn.Module
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
            is_causal: drop keys after the query instead of ``attn_mask``.
            token_positions: (B, N) int64, for N tokens picked out of a longer sequence: where in it each stands.
            num_tokens: length of the whole sequence, if the grid and the prefix of the layer do not tell it.

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
        bias = additive_bias(attn_mask, q, k)
        edges = self._edges_at(token_positions, num_tokens, self.num_heads, (batch, tokens))
        if self.backend is not None:
            out, _ = self.backend.attend(*autocast(q, k, v), bias=bias, dropout_p=self._dropout())
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
        out = self._optional("norm", out.transpose(1, 2).reshape(batch, tokens, -1))
        if gate is not None:
            out = out * gate
        return self._optional("proj_drop", self.proj(out))

    def _optional(self, name: str, x: Tensor) -> Tensor:
        module = getattr(self, name, None)
        result: Tensor = x if module is None else module(x)
        return result

    def install(self, layer_mask: LayerMask | Mask) -> None:
        """Attend by ``layer_mask`` from now on."""
        weight = self.get_parameter("qkv.weight")
        head_dim = weight.shape[0] // (3 * self.num_heads)
        self._set_mechanism(layer_mask, head_dim, _dropout_probability(self), weight)

    def _dropout(self) -> float:
        return _dropout_probability(self) if self.training else 0.0

    def extra_repr(self) -> str:
        """Heads and mask."""
        return f"num_heads={self.num_heads}, {self._mask_repr()}"


class _Configurable(type):
    """Class of classes that carry a configuration; pickle can write them, as timm keeps them in its models."""

    config: AttentionConfig


class SparseTimmAttention(SparseAttention, metaclass=_Configurable):
    """timm's `Attention`, built sparse: the ``attn_layer`` of new models.

    ``timm.create_model(name, attn_layer=SparseTimmAttention.configured(config))``, or by name after
    ``ATTN_LAYERS["sparse"] = SparseTimmAttention.configured(config)``. Parameters, initial values and state dict
    are those of timm's layer. timm does not tell a layer where in the model it is, nor the grid and the prefix
    tokens: ``sparsify(model, config)`` on the finished model does. Without it the configuration itself and the
    defaults of the mask decide, and a layer whose mask depends on its depth refuses to run.

    Args:
        dim: C, features.
        num_heads: H.
        *args: as timm's `Attention` takes them.
        **kwargs: likewise.
    """

    config: ClassVar[AttentionConfig] = AttentionConfig.parse("mask: none")
    unplaced: bool = False
    """The mask depends on where in the model the layer is, and nobody has told it."""

    def __init__(self, dim: int, num_heads: int = 8, *args: object, **kwargs: object) -> None:
        super().__init__()
        from timm.layers.attention import Attention

        self.__dict__.update(Attention(dim, num_heads, *args, **kwargs).__dict__)  # type: ignore[arg-type]
        self.dense_class = Attention
        self.unplaced = _depends_on_place(self.config, num_heads)
        self.install(dense_mask(num_heads) if self.unplaced else LayerMask(self.config, num_heads))
        # The class of the configuration has done its work.
        self.__class__ = SparseTimmAttention

    @classmethod
    def configured(cls, config: ConfigLike) -> type["SparseTimmAttention"]:
        """A class, as timm wants it, whose layers have ``config``.

        Args:
            config: whatever `load_config` takes.

        Raises:
            ConfigError: the configuration cannot be honoured.
        """
        made = _Configurable(cls.__name__, (SparseTimmAttention,), {"config": load_config(config)})
        return made  # type: ignore[return-value]

    def forward(
        self,
        x: Tensor,
        attn_mask: Tensor | None = None,
        is_causal: bool = False,
        *,
        token_positions: Tensor | None = None,
        num_tokens: int | None = None,
    ) -> Tensor:
        """Self-attention, as `SparseAttention`.

        Raises:
            RuntimeError: the mask depends on the place of the layer, which is unknown.
        """
        if self.unplaced:
            raise RuntimeError(
                "layer: the mask depends on the depth of this layer, which timm does not tell it; call "
                "sparse_mhsa.sparsify(model, config) once the model is built"
            )
        return super().forward(x, attn_mask, is_causal, token_positions=token_positions, num_tokens=num_tokens)


def _reduce_class(cls: _Configurable) -> str | tuple[object, ...]:
    if cls is SparseTimmAttention:
        return cls.__qualname__
    return SparseTimmAttention.configured, (cls.config,)


copyreg.pickle(_Configurable, _reduce_class)  # type: ignore[arg-type]


def _depends_on_place(config: AttentionConfig, num_heads: int) -> bool:
    """Whether a layer must know its name or depth: per-layer overrides, or a mask that uses the depth."""
    if json.loads(config.to_json())["layers"]:
        return True
    first, second = (config.spec(num_heads, layer, 2) for layer in (0, 1))
    return first != second


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
        if not isinstance(module, SparseAttention):
            dense_class = type(module)
            module.__class__ = SparseAttention
            assert isinstance(module, SparseAttention)
            module.dense_class = dense_class
        module.__dict__.pop("unplaced", None)
        module.install(layer_mask)

    def dropout(self, module: nn.Module) -> float:
        """Of ``attn_drop``."""
        return _dropout_probability(module)

    def densify(self, module: nn.Module) -> None:
        """Swap back in place."""
        assert isinstance(module, SparseAttention)
        dense_class = module.dense_class
        module.__dict__.pop("unplaced", None)
        del module.layer_mask, module.backend, module.dense_class
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

    def layout(self, module: nn.Module) -> Layout | None:
        """Of a module that embeds patches."""
        embedding = getattr(module, "patch_embed", None)
        return None if embedding is None else Layout(_grid(embedding), _prefix(module))

    def sample(self, model: nn.Module) -> Tensor | None:
        """One random image of the size that ``patch_embed`` expects."""
        embedding = getattr(model, "patch_embed", None)
        size = getattr(embedding, "img_size", None)
        return random_image(getattr(embedding, "proj", None), size) if isinstance(size, (tuple, list)) else None


def _grid(embedding: nn.Module) -> tuple[int, ...] | None:
    # With images of any size, the grid of the configured size is not the one that arrives.
    if getattr(embedding, "dynamic_img_pad", False) or not getattr(embedding, "strict_img_size", True):
        return None
    grid = getattr(embedding, "grid_size", None)
    return tuple(int(side) for side in grid) if isinstance(grid, (tuple, list)) else None


def _prefix(module: nn.Module) -> int | None:
    tokens = getattr(module, "num_prefix_tokens", None)
    if isinstance(tokens, int):
        return tokens
    if isinstance(getattr(module, "cls_token", None), Tensor):
        return 2 if isinstance(getattr(module, "dist_token", None), Tensor) else 1
    return None


def _dropout_probability(module: nn.Module) -> float:
    dropout = getattr(module, "attn_drop", None)
    return 0.0 if dropout is None else float(getattr(dropout, "p", dropout))


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
    dense = copy.deepcopy(module).to("cpu", torch.float64).eval()
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
