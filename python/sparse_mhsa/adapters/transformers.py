"""Hugging Face transformers: models that call attention through its interface.

The interface looks a function up by name for every call, so `sparsify` registers ours as ``sparse_mhsa`` in
`AttentionInterface` *and* `AttentionMaskInterface` (without the second, transformers drops padding masks), and
names it in the configuration that the swapped layers read. A layer of such a model that was not swapped stays
dense; a model that names ``sparse_mhsa`` without having been swapped is refused.

`save_pretrained` writes the attention configuration into ``config.json`` under ``sparse_mhsa``; weights are those
of the dense model. `from_pretrained` gives the dense model back, and `restore` swaps it again.
"""

import inspect
import json
import re
import sys
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..cache import KVCache
from ..cache_policy import CachePolicy
from ..extras import needed_for
from ..layer import SparseLayer
from ..layer_cache import Capacity
from ..layer_mask import LayerMask
from ..mask import Mask
from .mixing import mixed_class
from .registry import Adapter, Layout, register_adapter, sides
from .transformers_attention import (
    IMPLEMENTATION,
    STAYS_DENSE,
    SparseInterfaceLayer,
    attention_forward,
    attention_mask,
)

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from .report import Report
    from .transformers_cache import GenerationCache


def register() -> None:
    """Make ``sparse_mhsa`` known to transformers; `sparsify` does it for models that need it."""
    with needed_for("this model", "transformers"):
        from transformers import AttentionInterface, AttentionMaskInterface

    AttentionInterface.register(IMPLEMENTATION, attention_forward)
    AttentionMaskInterface.register(IMPLEMENTATION, attention_mask)


def restore(model: nn.Module) -> "Report":
    """Swap the layers of a loaded model that were swapped when it was saved, with the configuration they had.

    Args:
        model: from `from_pretrained`, of the class that was saved.

    Returns:
        The report of `sparsify`.

    Raises:
        ValueError: the model was not saved with sparse attention.
    """
    from . import sparsify

    saved = getattr(getattr(model, "config", None), IMPLEMENTATION, None)
    if saved is None:
        raise ValueError(f"model: the configuration of {type(model).__name__} has no `{IMPLEMENTATION}`; use sparsify")
    layers = {f"^{re.escape(name)}$": config for name, config in saved.items()}
    return sparsify(model, "mask: none", include=list(layers), overrides=layers)


def generation_cache(
    model: nn.Module, policy: CachePolicy, *, capacity: Capacity | Sequence[Sequence[int]] | None = None
) -> "GenerationCache":
    """A cache for ``generate`` of a swapped decoder of transformers, that forgets by a policy.

    Keys are kept as they were rotated, at the positions their tokens had. While nothing has been forgotten, the model
    generates what it would with ``use_cache=False``. A causal window (the mask ``local``, or the model's own
    ``sliding_window``) hides what is kept further back. A prompt joins token by token, as if it had been generated: one
    that is longer than the cache is forgotten in part while it is read. Beams are reordered; tokens cannot be taken
    back, which assisted generation would need. Inference only, on the CPU.

    Example:
        >>> sm.sparsify(model, "mask: none", include="self_attn")
        >>> cache = sm.generation_cache(model, sm.CachePolicy("attention_sinks", capacity=512))
        >>> model.generate(ids, past_key_values=cache)  # newer releases of transformers say cache=cache

    Args:
        model: a decoder whose layers `sparsify` swapped, with the mask ``none`` or ``local``.
        policy: what is forgotten.
        capacity: most entries per head: one number, one per layer, or one per layer and head of k; default is that of
            the policy.

    Returns:
        A `transformers.Cache` for one batch at a time; ``cache.reset()`` before the next, ``cache.kv`` is the
        `KVCache` with what is kept.

    Raises:
        ImportError: transformers is not installed.
        ValueError: the model was not swapped, a mask has no meaning for a cache, or the capacities do not fit.
    """
    with needed_for("generation_cache", "transformers"):
        from .transformers_cache import GenerationCache, check_model

    # Only layers that know their place in a cache take one.
    layers = [m for m in model.modules() if isinstance(m, SparseInterfaceLayer) and hasattr(m, "layer_idx")]
    return GenerationCache(KVCache(policy, check_model(model, layers), capacity=capacity))


@register_adapter
class TransformersAdapter(Adapter):
    """Swaps layers of transformers, and of modules made like them, that call attention through its interface."""

    name = "transformers"

    def matches(self, module: nn.Module) -> bool:
        """By the code of ``forward``, which looks the attention function up."""
        if isinstance(module, SparseInterfaceLayer):
            return True
        # Classes of TorchScript have no `forward`.
        forward = getattr(type(module), "forward", None)
        code = None if forward is None else getattr(inspect.unwrap(forward), "__code__", None)
        names = getattr(code, "co_names", ())
        return "ALL_ATTENTION_FUNCTIONS" in names and _num_heads(module) is not None

    def heads(self, module: nn.Module) -> tuple[int, int]:
        """Number of heads and head dimension."""
        heads, head_dim = _num_heads(module), _first_number(module, ("head_dim", "attention_head_size"))
        assert heads is not None
        if head_dim is None:
            width = getattr(getattr(module, "config", None), "hidden_size", heads)
            head_dim = width // heads
        return int(heads), int(head_dim)

    def embed_dim(self, module: nn.Module) -> int | None:
        """Of the layer, or of its configuration."""
        for owner in (module, getattr(module, "config", None)):
            width = _first_number(owner, ("embed_dim", "hidden_size"))
            if width is not None:
                return int(width)
        return None

    def sparsify(self, module: nn.Module, layer_mask: LayerMask | Mask) -> None:
        """Swap in place."""
        register()
        if not isinstance(module, SparseInterfaceLayer):
            module.__class__ = mixed_class(SparseInterfaceLayer, type(module))
            assert isinstance(module, SparseInterfaceLayer)
            module.dense_implementation = None
        # Layers share their configuration: the first one finds what it was.
        if module.config._attn_implementation != IMPLEMENTATION:
            module.dense_implementation = module.config._attn_implementation
        module.__dict__.pop(STAYS_DENSE, None)
        module.config._attn_implementation = IMPLEMENTATION
        module._set_mechanism(layer_mask, self.heads(module)[1], self.dropout(module), next(module.parameters()))

    def dropout(self, module: nn.Module) -> float:
        """Of the attention weights."""
        found = _first_number(module, ("attention_dropout", "dropout_prob", "dropout"))
        return 0.0 if found is None else float(found)

    def densify(self, module: nn.Module) -> None:
        """Swap back in place."""
        assert isinstance(module, SparseInterfaceLayer)
        if module.config._attn_implementation == IMPLEMENTATION:
            module.config._attn_implementation = module.dense_implementation or "sdpa"
        dense_class = module.dense_class
        module._remove_mechanism()
        del module.dense_implementation
        dense: nn.Module = module
        dense.__class__ = dense_class

    def dense_by_design(self, parent: nn.Module | None, name: str) -> str | None:
        """Text towers, causal layers and cross-attention."""
        module = None if parent is None else getattr(parent, name.rpartition(".")[2])
        if "cross" in name or getattr(module, "is_cross_attention", False):
            return "cross-attention"
        if getattr(module, "is_causal", False):
            return "decoder"
        return "text" if "text_model" in name.split(".") else None

    def layout(self, module: nn.Module) -> Layout | None:
        """Of a vision model: the grid from its configuration, the prefix from its embeddings."""
        config, embeddings = getattr(module, "config", None), getattr(module, "embeddings", None)
        if embeddings is None or not hasattr(config, "image_size"):
            return None
        return Layout(_grid(config), _prefix(embeddings))

    def sample(self, model: nn.Module) -> Tensor | None:
        """Random pixels of the size in the configuration, for models of nothing but pixels."""
        config: Any = getattr(model, "config", None)
        grid = sides(getattr(config, "image_size", None))
        if getattr(model, "main_input_name", None) != "pixel_values" or grid is None:
            return None
        _first, *others = inspect.signature(model.forward).parameters.values()
        if any(p.default is p.empty and p.kind is p.POSITIONAL_OR_KEYWORD for p in others):
            return None
        frames = () if getattr(config, "num_frames", None) is None else (config.num_frames,)
        weight = next(model.parameters())
        # Not from the default generator, whose draws belong to the user.
        generator = None if weight.is_meta else torch.Generator(weight.device)
        shape = (1, *frames, config.num_channels, *grid)
        return torch.randn(shape, generator=generator, device=weight.device).to(weight.dtype)

    def finish(self, model: nn.Module) -> None:
        """Mark the layers that stay dense beside swapped ones, and keep the configuration with the model's own."""
        modules = list(model.modules())
        # Not only those that share a configuration: `set_attn_implementation` names ours in every one.
        any_swapped = any(isinstance(module, SparseInterfaceLayer) for module in modules)
        for module in modules:
            if any_swapped and hasattr(module, "config") and not isinstance(module, SparseLayer):
                module.__dict__[STAYS_DENSE] = True
            else:
                module.__dict__.pop(STAYS_DENSE, None)
        for pretrained in _outermost_pretrained(model):
            swapped = {
                name: _without(json.loads(m.layer_mask.config.to_json()), "layers", "embed_dim", "num_heads")
                for name, m in pretrained.named_modules()
                if isinstance(m, SparseLayer) and m.layer_mask.config is not None
            }
            if swapped:
                setattr(pretrained.config, IMPLEMENTATION, swapped)
            elif hasattr(pretrained.config, IMPLEMENTATION):
                delattr(pretrained.config, IMPLEMENTATION)


def _num_heads(module: nn.Module) -> int | float | None:
    names = ("num_attention_heads", "num_heads")
    own = _first_number(module, names)
    return _first_number(getattr(module, "config", None), names) if own is None else own


def _without(document: dict[str, object], *keys: str) -> dict[str, object]:
    return {key: value for key, value in document.items() if key not in keys}


def _first_number(module: object, names: tuple[str, ...]) -> int | float | None:
    found = (getattr(module, name, None) for name in names)
    return next((value for value in found if isinstance(value, (int, float))), None)


def _grid(config: object) -> tuple[int, ...] | None:
    """Patches per axis, where the model takes images of one size."""
    image, tubelet = sides(getattr(config, "image_size", None)), getattr(config, "tubelet_size", None)
    # These interpolate their positions to whatever image arrives.
    if image is None or getattr(config, "model_type", "").startswith("dinov"):
        return None
    frames, patch = tubelet, sides(getattr(config, "patch_size", None))
    if isinstance(tubelet, (list, tuple)):
        frames, patch = tubelet[0], sides(tubelet[1:])
    if patch is None:
        return None
    spatial = (image[0] // patch[0], image[1] // patch[1])
    return spatial if frames is None else (getattr(config, "num_frames", 1) // frames, *spatial)


def _prefix(embeddings: nn.Module) -> int:
    """Leading tokens: class token, distillation token, registers."""
    count = 0
    for name in ("cls_token", "class_embedding", "distillation_token", "register_tokens"):
        token = getattr(embeddings, name, None)
        if isinstance(token, Tensor):
            count += 1 if token.dim() < 3 else token.shape[1]
    return count


def _outermost_pretrained(model: nn.Module) -> "Iterator[PreTrainedModel]":
    loaded = sys.modules.get("transformers.modeling_utils")
    if loaded is None:
        return
    found: list[str] = []
    for name, module in model.named_modules():
        if isinstance(module, loaded.PreTrainedModel) and not any(
            not outer or name.startswith(f"{outer}.") for outer in found
        ):
            found.append(name)
            yield module
