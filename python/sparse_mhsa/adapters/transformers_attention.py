"""The attention function and the mask function that transformers looks up under the name ``sparse_mhsa``."""

import math
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NoReturn

import torch
from torch import Tensor, nn

from ..content import edges_of
from ..functional import additive_bias, attend, autocast, causal_bias, check_qkv, dense_mask, draw_seed, weights_of
from ..layer import SparseLayer
from ..layer_mask import LayerMask
from ..mask import Mask
from .mixing import Mixed
from .verify import looking

if TYPE_CHECKING:
    from ..backends import Backend
    from .transformers_cache import GenerationLayer

IMPLEMENTATION = "sparse_mhsa"
"""Our name in both interfaces, and in the configuration that is saved."""

STAYS_DENSE = "_sparse_mhsa_stays_dense"
"""Mark of what has a configuration beside swapped layers and was not swapped."""
_NOT_HONOURED = ("softcap", "s_aux")


class SparseInterfaceLayer(Mixed, SparseLayer):
    """A layer of transformers whose attention function is `attention_forward`; mixed into the dense class."""

    config: Any
    dense_implementation: str | None
    """The attention implementation that its configuration named before, on the first of those that share one."""

    def extra_repr(self) -> str:
        """Mask, and whether it is in use: the attention implementation of a model can be set at any time."""
        named = self.config._attn_implementation
        in_use = "" if named == IMPLEMENTATION else f", not in use: attn_implementation is `{named}`"
        return self._mask_repr() + in_use


class JoiningTokens(Tensor):
    """New keys or values on their way from a `GenerationCache` to `attention_forward`, which alone may use them.

    To any other attention function they would be all there is.
    """

    cache_layer: "GenerationLayer"
    _tokens: Tensor | None

    @classmethod
    def of(cls, tokens: Tensor, cache_layer: "GenerationLayer") -> "JoiningTokens":
        """Mark (B, Hkv, N, D) keys or values as new ones of a layer."""
        joining = tokens.as_subclass(cls)
        joining._tokens, joining.cache_layer = tokens, cache_layer
        return joining

    def hand_over(self) -> Tensor:
        """What they are; once, because they join once."""
        if self._tokens is None:
            raise RuntimeError("cache: a layer uses the keys and values of another layer, which have joined already")
        tokens, self._tokens = self._tokens, None
        return tokens

    @classmethod
    def __torch_function__(
        cls,
        func: Callable[..., Any],
        types: Sequence[type],
        args: Sequence[object] = (),
        kwargs: Mapping[str, object] | None = None,
    ) -> NoReturn:
        """Refuse every operation."""
        raise RuntimeError(
            "cache: its keys and values are for the attention function of sparse_mhsa alone, and "
            f"{getattr(func, '__name__', func)} was called on them: by another attention function, then call "
            "sparse_mhsa.sparsify(model, config, include=...) with names of the layers that generate; or by a model "
            "that caches something else, such as compressed keys, which this cache cannot serve"
        )


def attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    position_bias: Tensor | None = None,
    embeddings: Tensor | None = None,
    sliding_window: int | None = None,
    **kwargs: object,
) -> tuple[Tensor, Tensor | None]:
    """What transformers calls for ``attn_implementation="sparse_mhsa"``.

    Args:
        module: the attention layer, which knows its mask.
        query: (B, H, N, D).
        key: (B, Hkv, S, D), or the new ones that a `GenerationCache` hands on.
        value: likewise.
        attention_mask: broadcastable to (B, H, N, S); bool (True = keep) or floating (added); None for all.
        dropout: probability that a weight is dropped.
        scaling: factor of the scores; the configured ``scale`` wins.
        is_causal: without ``attention_mask``, queries keep no later keys; default is the attribute of ``module``.
        position_bias: added to the scores, broadcastable to (B, H, N, S).
        embeddings: (B, S, C) input of the layer, for masks that choose keys by its norms; transformers passes none.
        sliding_window: keys that the model itself lets a query see; ``attention_mask`` says so too, but to a cache.
        **kwargs: what else the model passes on; ``output_attentions`` asks for the weights.

    Returns:
        The output (B, N, H, D), and the (B, H, N, S) weights after dropout if they are asked for, else None.

    Raises:
        RuntimeError: the model was not swapped by `sparsify`.
        ValueError: the model asks for something that cannot be honoured.
    """
    for name in _NOT_HONOURED:
        if kwargs.get(name) is not None:
            raise ValueError(f"{name}: {type(module).__name__} asks for it, and sparse_mhsa cannot honour it")
    layer_mask, backend = _mechanism(module, query.shape[1])
    causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    if isinstance(key, JoiningTokens) and isinstance(value, JoiningTokens):
        for name, asked in (
            ("is_causal", not causal),
            ("position_bias", position_bias is not None),
            ("dropout", dropout > 0.0),
            ("output_attentions", _wants_weights(module, kwargs)),
        ):
            if asked:
                raise ValueError(f"{name}: {type(module).__name__} asks for it, which a generation cache cannot honour")
        scale = scaling if layer_mask.scale is None else layer_mask.scale
        out = key.cache_layer.attend(
            module, query, key.hand_over(), value.hand_over(), attention_mask, scale, sliding_window
        )
        return out.transpose(1, 2).contiguous(), None
    check_qkv(query, key, value)
    if query.shape[2] != key.shape[2] and not layer_mask.is_dense:
        raise ValueError(
            f"key: expected as many keys as queries for the mask `{layer_mask.name}`, got {query.shape[2]} queries and "
            f"{key.shape[2]} keys in {type(module).__name__}; generation needs use_cache=False, or "
            "sparse_mhsa.generation_cache(model, policy), which takes the masks `none` and `local`"
        )
    key_mask, bias = _masks(attention_mask, query, key)
    # A mask that is causal itself needs no (N, S) array that says so.
    if causal and attention_mask is None and query.shape[2] > 1 and not layer_mask.is_causal:
        bias = causal_bias(query, key)
    if position_bias is not None:
        added = additive_bias(position_bias, query, key)
        bias = added if bias is None or added is None else bias + added
    wants_weights = _wants_weights(module, kwargs)
    if backend is not None:
        q, k, v = autocast(query, *(x.repeat_interleave(query.shape[1] // x.shape[1], 1) for x in (key, value)))
        out, weights = backend.attend(
            q, k, v, key_mask=key_mask, bias=bias, dropout_p=dropout, needs_weights=wants_weights
        )
        return out.transpose(1, 2).contiguous(), weights
    if layer_mask.needs_embeddings and embeddings is None:
        raise ValueError(
            f"mask: `{layer_mask.name}` by the norms of the layer's input cannot be had in {type(module).__name__}, "
            "because transformers does not pass that input on"
        )
    q, k, v = autocast(query, key, value)
    scale = scaling if layer_mask.scale is None else layer_mask.scale
    scale = 1.0 / math.sqrt(q.shape[-1]) if scale is None else scale
    seed = draw_seed() if dropout > 0.0 else None
    options: dict[str, Any] = {"key_mask": key_mask, "bias": bias, "dropout_p": dropout, "seed": seed, "scale": scale}
    shape = (q.shape[0], q.shape[2])
    edges = module._edges_at(None, None, q.shape[1], shape) if isinstance(module, SparseLayer) else None
    if not wants_weights:
        out, _ = attend(q, k, v, layer_mask, edges, embeddings=embeddings, **options)
        return out.transpose(1, 2).contiguous(), None
    if edges is None and layer_mask.by_content:
        edges = edges_of(q, k, layer_mask, key_mask=key_mask, bias=bias, scale=scale, embeddings=embeddings)
    out, lse = attend(q, k, v, layer_mask, edges, needs_lse=True, **options)
    weights = weights_of(q, k, lse, layer_mask.source(q.shape[2]) if edges is None else edges, **options)
    return out.transpose(1, 2).contiguous(), weights


def attention_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int = 0,
    kv_offset: int = 0,
    attention_mask: Tensor | None = None,
    allow_is_bidirectional_skip: bool = False,
    **kwargs: Any,  # noqa: ANN401  (handed on)
) -> Tensor | None:
    """What transformers calls to make the mask of a forward pass: its mask for SDPA (bool, True = keep).

    Where only padding is masked, no (N, S) array is made: the (B, 1, N, S) result is an expanded view of (B, S).
    """
    from transformers.masking_utils import bidirectional_mask_function, sdpa_mask

    padding = attention_mask is not None and attention_mask.dim() == 2 and attention_mask.shape[1] == kv_length
    if kwargs.get("mask_function") is bidirectional_mask_function and padding and not kv_offset:
        assert attention_mask is not None
        return attention_mask.to(torch.bool)[:, None, None, :].expand(batch_size, 1, q_length, kv_length)
    mask: Tensor | None = sdpa_mask(
        batch_size=batch_size,
        q_length=q_length,
        kv_length=kv_length,
        q_offset=q_offset,
        kv_offset=kv_offset,
        attention_mask=attention_mask,
        allow_is_bidirectional_skip=allow_is_bidirectional_skip,
        **kwargs,
    )
    return mask


def _mechanism(module: nn.Module, num_heads: int) -> "tuple[LayerMask | Mask, Backend | None]":
    if isinstance(module, SparseLayer):
        return module.layer_mask, module.backend
    if STAYS_DENSE in module.__dict__ or looking.get():
        return dense_mask(num_heads), None
    raise RuntimeError(
        f"attn_implementation: `{IMPLEMENTATION}` is named, but {type(module).__name__} has no mask; call "
        "sparse_mhsa.sparsify(model, config), or sparse_mhsa.adapters.transformers.restore(model) for a model that "
        "was saved with sparse attention; a dense model beside a swapped one needs a configuration object of its own"
    )


def _masks(attention_mask: Tensor | None, q: Tensor, k: Tensor) -> tuple[Tensor | None, Tensor | None]:
    """A mask that only hides keys as (B, S), anything else as an additive one."""
    if attention_mask is None:
        return None, None
    if attention_mask.dtype == torch.bool and attention_mask.dim() == 4 and attention_mask.shape[1] == 1:
        of_all_queries = attention_mask.stride(2) == 0 or attention_mask.shape[2] == 1
        if of_all_queries and attention_mask.shape[3] == k.shape[2]:
            return attention_mask[:, 0, 0].expand(q.shape[0], -1), None
    return None, additive_bias(attention_mask, q, k)


def _wants_weights(module: nn.Module, kwargs: dict[str, object]) -> bool:
    if kwargs.get("output_attentions") or getattr(getattr(module, "config", None), "output_attentions", False):
        return True
    # Layers such as VideoMAE's pass nothing on; transformers collects what their hooks see.
    capturing = sys.modules.get("transformers.utils.output_capturing")
    collector = getattr(capturing, "_active_collector", None)
    if collector is None or torch.compiler.is_compiling():
        return False
    return "attentions" in (collector.get() or ())
