"""The cache that ``model.generate`` of transformers takes, over caches of ours that forget by a policy.

A `transformers.Cache` gets the new keys and values of a layer and returns all that is kept, as rectangular tensors; it
never sees queries. Caches whose heads keep different tokens, or that judge tokens by the attention they receive, need
both. So `GenerationCache.update` returns the new tokens as they came, marked with where they have to join, and
`transformers_attention.attention_forward`, which transformers calls next, lets them join and attend in one step.
"""

import json
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache, CacheLayerMixin

from ..cache import KVCache
from ..layer import SparseLayer
from ..layer_cache import LayerCache
from .transformers_attention import JoiningTokens, SparseInterfaceLayer

_LAYER_TYPES = ("full_attention", "sliding_attention")
"""The kinds of layers, as configurations of transformers name them, whose keys a window describes."""


class GenerationCache(Cache):
    """What `generation_cache` makes: a `transformers.Cache` over a `KVCache`.

    ``get_seq_length`` counts the tokens that have come, padding included, whatever has been forgotten of them: it is
    where position ids and attention masks go on. ``get_max_length`` is the most entries that a head keeps, -1 for no
    bound.
    """

    kv: KVCache
    """What is kept."""
    layers: "list[GenerationLayer]"  # type: ignore[assignment]

    def __init__(self, kv: KVCache) -> None:
        self.kv = kv
        super().__init__(layers=[GenerationLayer(layer, len(kv)) for layer in kv])

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: object, **kwargs: object
    ) -> tuple[Tensor, Tensor]:
        """Hand new keys and values on to our attention function, which lets them join.

        Raises:
            ValueError: the cache is for fewer layers, or holds another number of samples.
            RuntimeError: an earlier forward pass broke off.
        """
        if layer_idx >= len(self.layers):
            raise ValueError(
                f"cache: it is for {len(self.layers)} layers, and the model has a layer {layer_idx}; make one for this "
                "model with sparse_mhsa.generation_cache(model, policy)"
            )
        if layer_idx == 0 and len({layer.get_seq_length() for layer in self.layers}) > 1:
            raise RuntimeError("cache: an earlier forward pass broke off between two layers; reset it")
        return self.layers[layer_idx].update(key_states, value_states)

    def get_max_cache_shape(self, layer_idx: int | None = None) -> int:
        """`get_max_length`, by its earlier name."""
        most: int = self.get_max_length(layer_idx)
        return most

    def __repr__(self) -> str:
        """The policy and what is held."""
        return f"GenerationCache({self.kv})"


class GenerationLayer(CacheLayerMixin):  # type: ignore[no-untyped-call]
    """One layer of a `GenerationCache`."""

    supports_early_init = False

    def __init__(self, held: LayerCache, num_layers: int) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.held = held
        self.num_layers = num_layers
        self.tokens = 0

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: object, **kwargs: object
    ) -> tuple[Tensor, Tensor]:
        """The new tokens, marked as those of this layer."""
        samples = self.held.lengths.shape[0]
        if samples not in (0, key_states.shape[0]):
            raise ValueError(
                f"cache: it holds {samples} samples, and {key_states.shape[0]} arrive; reset it before other prompts"
            )
        return JoiningTokens.of(key_states, self), JoiningTokens.of(value_states, self)

    def attend(
        self,
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        scale: float | None,
        sliding_window: int | None,
    ) -> Tensor:
        """Let new tokens join and attend.

        Args:
            module: the attention layer, which knows its mask.
            query: (B, H, N, D).
            key: (B, Hkv, N, D) of the new tokens.
            value: (B, Hkv, N, Dv).
            attention_mask: (B, 1, N, N) bool, which of the new tokens see each other; None for all earlier ones.
            scale: factor of the scores.
            sliding_window: tokens that the model itself lets a query see, its own among them.

        Returns:
            (B, H, N, Dv).

        Raises:
            ValueError: the cache is for another number of layers, or a mask cannot be applied to what it keeps.
        """
        config = getattr(module, "config", None)
        expected = getattr(config, "num_hidden_layers", self.num_layers)
        if expected != self.num_layers:
            raise ValueError(
                f"cache: it is for {self.num_layers} layers, and {type(module).__name__} is one of {expected}; make "
                "one for this model with sparse_mhsa.generation_cache(model, policy)"
            )
        windows = [window_of(module), None if sliding_window is None else sliding_window - 1]
        real = _real_tokens(attention_mask, query.shape[2], sliding_window)
        window = min((window for window in windows if window is not None), default=None)
        out = self.held.attend(query, key, value, token_mask=real, scale=scale, window=window)
        self.tokens += query.shape[2]
        return out

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Nothing: the first tokens bring the sizes."""

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Masks are about the new tokens alone: what they see of the others is the policy's."""
        return query_length, self.tokens

    def get_seq_length(self) -> int:
        """Tokens that have come, padding included."""
        return self.tokens

    def get_max_length(self) -> int:
        """Most entries of a head, -1 for no bound."""
        capacity = self.held.capacity
        return -1 if capacity is None else capacity if isinstance(capacity, int) else max(capacity)

    def reset(self) -> None:
        """Forget everything, sizes included."""
        self.held.reset()
        self.tokens = 0

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Make sample i what sample ``beam_idx[i]`` was."""
        self.held.reorder(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every sample."""
        self.held.reorder(self._samples().repeat_interleave(repeats))

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep some samples."""
        self.held.reorder(self._samples()[indices])

    def _samples(self) -> Tensor:
        return torch.arange(self.held.lengths.shape[0], device="cpu")

    def crop(self, tokens_to_remove: int) -> None:
        """Refused: what was forgotten for a token does not come back with its removal."""
        if tokens_to_remove != 0:
            raise ValueError(
                f"cache: tokens cannot be taken back from a cache that forgets, got crop({tokens_to_remove}); assisted "
                "generation needs a transformers.DynamicCache"
            )


def check_model(model: nn.Module, layers: Sequence[SparseInterfaceLayer]) -> int:
    """The number of layers of a decoder whose attention can be given a cache.

    Args:
        model: of transformers.
        layers: those of its swapped layers that take a cache.

    Raises:
        ValueError: it was not swapped, is no decoder alone, or has layers that a cache cannot serve.
    """
    name = type(model).__name__
    if not layers:
        raise ValueError(
            f"model: {name} has no swapped attention that takes a cache; call sparse_mhsa.sparsify(model, config, "
            "include=...) first, with names of the layers that generate, such as 'self_attn'"
        )
    config = layers[0].config
    if getattr(config, "is_encoder_decoder", False):
        raise ValueError(f"model: {name} has an encoder, and the cache is for decoders alone")
    others = set(getattr(config, "layer_types", None) or ()) - set(_LAYER_TYPES)
    if others:
        raise ValueError(f"model: {name} has layers of {', '.join(sorted(others))}, which the cache cannot serve")
    if getattr(config, "kv_sharing_modes", None) or getattr(config, "num_kv_shared_layers", None):
        raise ValueError(f"model: {name} has layers that share keys and values, which the cache cannot serve")
    for layer in layers:
        window_of(layer)
    return int(config.num_hidden_layers)


def window_of(module: nn.Module) -> int | None:
    """How many tokens back the mask of a layer reaches; None for all.

    Raises:
        ValueError: its mask is neither ``none`` nor a plain window, or its backend is not softmax over edges.
    """
    if not isinstance(module, SparseLayer):
        return None
    layer_mask = module.layer_mask
    if module.backend is None and layer_mask.backend == "vit":
        if layer_mask.is_dense:
            return None
        spec = json.loads(layer_mask.spec) if layer_mask.name == "local" and layer_mask.spec else {}
        kwargs = spec.get("mask_kwargs", {})
        plain = kwargs.get("dilation") == 1 and kwargs.get("include_self") and not kwargs.get("window_schedule")
        if plain and not spec["num_prefix_tokens"] and spec["masked_logits"] == "neg_inf":
            window = kwargs["window"]
            return int(kwargs["window_size"] // 2 if window is None else window)
    raise ValueError(
        f"mask: a cache can apply `none` and `local` with one window (no dilation, no prefix), and "
        f"{type(module).__name__} has `{layer_mask.name}`; generate with use_cache=False"
    )


def _real_tokens(attention_mask: Tensor | None, tokens: int, sliding_window: int | None) -> Tensor | None:
    """(B, N) bool: which of the new tokens are no padding; None for all."""
    if attention_mask is None:
        return None
    shape = tuple(attention_mask.shape)
    if attention_mask.dtype != torch.bool or len(shape) != 4 or shape[1:] != (1, tokens, tokens):
        raise ValueError(
            f"attention_mask: a cache expects (B, tokens so far) from the caller, which becomes bool (B, 1, {tokens}, "
            f"{tokens}) for {tokens} new tokens; got {attention_mask.dtype} {shape}"
        )
    # A token sees itself unless it is padding.
    real = attention_mask.diagonal(dim1=2, dim2=3)[:, 0]
    causal = torch.ones(tokens, tokens, dtype=torch.bool, device=attention_mask.device).tril()
    if sliding_window is not None:
        causal = causal.triu(1 - sliding_window)
    if not torch.equal(attention_mask, causal & real[:, None, None, :]):
        raise ValueError("attention_mask: a cache honours causal masks and padding, and this one says more than that")
    return real
