"""timm's `Attention`, and the copies of it in MAE, DeiT and other repositories."""

import copy
import copyreg
import inspect
import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import ClassVar

import torch
from torch import Tensor, nn

from .._core import AttentionConfig
from ..config import ConfigLike, load_config
from ..extras import needed_for
from ..functional import dense_mask
from ..layer_mask import LayerMask, check_sizes
from ..mask import Mask
from .registry import Adapter, Layout, is_sharded, random_image, register_adapter
from .timm_layers import SparseAttention, SparseAttentionRope, dropout_probability, embed_dim_of, head_dim_of

_CHILDREN = {"qkv", "q_norm", "k_norm", "attn_drop", "norm", "gate", "proj", "proj_drop"}


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

    Raises:
        ValueError: the configuration names another ``embed_dim`` or ``num_heads``.
    """

    config: ClassVar[AttentionConfig] = AttentionConfig.parse("mask: none")
    unplaced: AttentionConfig | None = None
    """The configuration, if its mask depends on where in the model the layer is and nobody has told it."""

    def __init__(self, dim: int, num_heads: int = 8, *args: object, **kwargs: object) -> None:
        super().__init__()
        with needed_for("SparseTimmAttention", "timm"):
            from timm.layers.attention import Attention

        self.__dict__.update(Attention(dim, num_heads, *args, **kwargs).__dict__)  # type: ignore[arg-type]
        self.dense_class = Attention
        check_sizes(self.config, num_heads, dim)
        if _depends_on_place(self.config, num_heads):
            self.unplaced = self.config
            layer_mask = dense_mask(num_heads)
        else:
            layer_mask = LayerMask(self.config, num_heads)
        self.install(layer_mask, head_dim_of(self))
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
        self._check_placed()
        return super().forward(x, attn_mask, is_causal, token_positions=token_positions, num_tokens=num_tokens)

    @contextmanager
    def densely(self) -> Iterator[None]:
        """As in `SparseLayer`; there is no place to know."""
        before, self.unplaced = self.unplaced, None
        try:
            with super().densely():
                yield
        finally:
            self.unplaced = before

    def mask(self, num_tokens: int) -> Mask:
        """The edges, as `SparseLayer.mask`.

        Raises:
            RuntimeError: the mask depends on the place of the layer, which is unknown.
        """
        self._check_placed()
        return super().mask(num_tokens)

    def _check_placed(self) -> None:
        if self.unplaced is not None:
            raise RuntimeError(
                "layer: the mask depends on the depth of this layer, which timm does not tell it; call "
                "sparse_mhsa.sparsify(model, config) once the model is built"
            )

    def extra_repr(self) -> str:
        """Heads and mask."""
        if self.unplaced is None:
            return super().extra_repr()
        name = self.unplaced.mask if self.unplaced.uses_edges else self.unplaced.backend
        return f"num_heads={self.num_heads}, mask={name}, layer=unknown until sparsify(model, config)"


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
    """Swaps timm's `Attention`, `AttentionRope` and `EvaAttention`, and copies of `Attention`.

    A copy is a module that computes the same from ``qkv``, ``proj`` and ``num_heads``, whatever its class.
    """

    name = "timm"

    def matches(self, module: nn.Module) -> bool:
        """By class, or by structure together with a trial that it computes softmax attention."""
        if isinstance(module, SparseAttention):
            return True
        if type(module) in (*_classes("timm.layers.attention", "Attention"), *_rotary_classes()):
            return True
        # What is sharded by itself can be neither copied for the trial nor given another class.
        return _has_the_structure(module) and not is_sharded(module) and _computes_attention(module)

    def heads(self, module: nn.Module) -> tuple[int, int]:
        """Number of heads and head dimension."""
        assert isinstance(module.num_heads, int)
        return module.num_heads, head_dim_of(module)

    def embed_dim(self, module: nn.Module) -> int | None:
        """C."""
        return embed_dim_of(module)

    def sparsify(self, module: nn.Module, layer_mask: LayerMask | Mask) -> None:
        """Swap in place."""
        if not isinstance(module, SparseAttention):
            dense_class = type(module)
            module.__class__ = SparseAttentionRope if dense_class in _rotary_classes() else SparseAttention
            assert isinstance(module, SparseAttention)
            module.dense_class = dense_class
        module.__dict__.pop("unplaced", None)
        module.install(layer_mask, head_dim_of(module))

    def dropout(self, module: nn.Module) -> float:
        """Of ``attn_drop``."""
        return dropout_probability(module)

    def densify(self, module: nn.Module) -> None:
        """Swap back in place."""
        assert isinstance(module, SparseAttention)
        module.__dict__.pop("unplaced", None)
        module.revert()

    def layout(self, module: nn.Module) -> Layout | None:
        """Of a module that embeds patches, or at least knows what comes before them."""
        embedding, prefix = getattr(module, "patch_embed", None), _prefix(module)
        if embedding is None:
            return None if prefix is None else Layout(None, prefix)
        return Layout(_grid(embedding), prefix)

    def sample(self, model: nn.Module) -> Tensor | None:
        """One random image of the size that ``patch_embed`` expects."""
        embedding = getattr(model, "patch_embed", None)
        size = getattr(embedding, "img_size", None)
        return random_image(getattr(embedding, "proj", None), size) if isinstance(size, (tuple, list)) else None


def _classes(module: str, *names: str) -> tuple[type[nn.Module], ...]:
    """Classes of timm, which has not been imported if nobody has built a model with it."""
    found = sys.modules.get(module)
    return () if found is None else tuple(getattr(found, name) for name in names if hasattr(found, name))


def _rotary_classes() -> tuple[type[nn.Module], ...]:
    return (*_classes("timm.layers.attention", "AttentionRope"), *_classes("timm.models.eva", "EvaAttention"))


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


def _is_linear(module: nn.Module) -> bool:
    """A linear layer, or one inside a layer of PEFT."""
    return isinstance(getattr(module, "base_layer", module), nn.Linear)


def _has_the_structure(module: nn.Module) -> bool:
    children = dict(module.named_children())
    if not {"qkv", "proj"} <= children.keys() <= _CHILDREN or not _is_linear(children["qkv"]):
        return False
    if any(x is not None for x in (*module._parameters.values(), *module._buffers.values())):
        return False
    if hasattr(module, "window_size"):
        return False
    num_heads = getattr(module, "num_heads", None)
    packed = children["qkv"].out_features
    assert isinstance(packed, int)
    if not isinstance(num_heads, int) or num_heads < 1 or packed % (3 * num_heads):
        return False
    first, *others = list(inspect.signature(module.forward).parameters)
    return first == "x" and set(others) <= {"attn_mask", "is_causal"}


def _computes_attention(module: nn.Module) -> bool:
    """Whether a module of the right structure gives, on three random tokens, what `SparseAttention` gives."""
    dense = copy.deepcopy(module).eval()
    generator = torch.Generator().manual_seed(0)
    if any(parameter.is_meta for parameter in module.parameters()):
        dense.to_empty(device="cpu")
        for parameter in dense.parameters():
            nn.init.normal_(parameter, std=0.1, generator=generator)
    dense.to("cpu", torch.float64)
    sparse = copy.deepcopy(dense)
    adapter = TimmAdapter()
    adapter.sparsify(sparse, dense_mask(adapter.heads(dense)[0]))
    in_features = dense.get_submodule("qkv").in_features
    assert isinstance(in_features, int)
    x = torch.randn(1, 3, in_features, dtype=torch.float64, device="cpu", generator=generator)
    try:
        with torch.no_grad():
            # Not the modules themselves, so that no hook runs.
            expected, got = dense.forward(x), sparse.forward(x)
    except (AttributeError, IndexError, RuntimeError, TypeError, ValueError):
        return False
    return isinstance(expected, Tensor) and expected.shape == got.shape and torch.allclose(expected, got)
