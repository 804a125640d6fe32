"""Trying a mask on any model: `patch_sdpa` stands in for torch's functions of attention."""

import inspect
import warnings
from collections.abc import Callable, Iterable, Mapping
from types import TracebackType
from typing import Any, NamedTuple

import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules import module as hooks
from torch.overrides import TorchFunctionMode
from torch.utils.hooks import RemovableHandle

from .config import ConfigLike, config_error, load_config
from .functional import attend, bias_of_call
from .layer_mask import LayerMask
from .module import SparseMHSA, check_layer
from .presence import is_backward

_SIGNATURE = inspect.signature(F.multi_head_attention_forward)
_OF_FORWARD = (
    "query", "key", "value", "key_padding_mask", "need_weights", "attn_mask", "average_attn_weights", "is_causal"
)  # fmt: skip
"""What that function and the ``forward`` of the layer take alike."""
_OF_LAYER = (
    "num_heads", "training", "add_zero_attn", "bias_k", "bias_v", "in_proj_bias", "q_proj_weight", "k_proj_weight",
    "v_proj_weight",
)  # fmt: skip
"""What that function takes and the layer has as an attribute of the same name."""


class patch_sdpa(TorchFunctionMode):  # noqa: N801  (used as a function)
    """A context in which `scaled_dot_product_attention` and `nn.MultiheadAttention` attend over the edges of a mask.

        with sparse_mhsa.patch_sdpa("configs/attention/vit_fibottention.yaml") as patched:
            model(x)
        patched.calls  # how many were replaced

    It needs to know nothing of the model and changes nothing in it, which is good for a first look. `sparsify` knows
    which layer is which, and the grid and the prefix tokens of the model; here they are those of the configuration.
    Calls are numbered as layers in their order within a call of the outermost module.

    Replaced is self-attention: calls of `torch.nn.functional.scaled_dot_product_attention` with (B, H, N, D), keys of
    the same samples and as many as queries, and `nn.MultiheadAttention` with as many, with and without weights, and so
    torch's transformer layers and torchvision's Vision Transformers, which leave their fast path for it. Masks and
    ``is_causal`` of the calls, and a ``scale`` unless the configuration has one, are kept.

    It cannot see attention that a model spells out in products and a softmax (``attn_implementation="eager"``, timm's
    ``fused_attn=False``, files from before torch 2.0), FlexAttention, functions of other libraries, and TorchScript.
    With gradient checkpointing the backward pass is an error inside the context, and outside of it computes layers
    densely. `sparsify` is for all of these.

    Args:
        config: whatever `load_config` takes.

    Raises:
        ConfigError: the configuration cannot be honoured, or has a backend without edges, which has no place here.
        RuntimeError: inside the context, a backward pass computes modules again.

    Warns:
        UserWarning: on leaving, if no call was replaced.
    """

    def __init__(self, config: ConfigLike) -> None:
        super().__init__()
        self.config = load_config(config)
        if not self.config.uses_edges:
            raise config_error(
                f"backend: `{self.config.backend}` cannot replace a function call; use sparsify", key="backend"
            )
        self.calls = 0
        """How many calls were replaced."""
        self.skipped = 0
        """How many calls were left alone, because they were no self-attention."""
        self._layer = 0
        self._depth = 0
        self._layer_masks: dict[tuple[int, int], LayerMask] = {}
        self._handles: list[RemovableHandle] = []

    def __enter__(self) -> "patch_sdpa":
        self.calls = self.skipped = self._layer = self._depth = 0
        self._handles = [
            hooks.register_module_forward_pre_hook(self._on_call),
            hooks.register_module_forward_hook(self._on_return, always_call=True),
        ]
        super().__enter__()  # type: ignore[no-untyped-call]
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        super().__exit__(kind, error, trace)  # type: ignore[no-untyped-call]
        for handle in self._handles:
            handle.remove()
        if self.calls == 0 and error is None:
            warnings.warn(
                "patch_sdpa: no call of scaled_dot_product_attention and no nn.MultiheadAttention was replaced "
                f"({self.skipped} were no self-attention); what spells attention out in products and a softmax, and "
                "attention of other libraries, cannot be seen from here: use sparsify",
                stacklevel=2,
            )

    def _on_call(self, *_: object) -> None:
        if is_backward():
            raise RuntimeError(
                "patch_sdpa: gradient checkpointing computes modules again in the backward pass, where nobody can tell "
                "which layer they are; use sparsify"
            )
        if self._depth == 0:
            self._layer = 0
        self._depth += 1

    def _on_return(self, *_: object) -> None:
        self._depth -= 1

    def __torch_function__(
        self,
        func: Callable[..., object],
        types: Iterable[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> object:
        if func is F.scaled_dot_product_attention:
            return self._replaced(*args, **(kwargs or {}))
        if func is F.multi_head_attention_forward:
            return self._replaced_layer(*args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))

    def _replaced(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> Tensor:
        if not _is_self_attention(query, key, value, enable_gqa):
            self.skipped += 1
            return F.scaled_dot_product_attention(
                query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa
            )
        self.calls += 1
        layer_mask = self._layer_mask(query.shape[1])
        bias = bias_of_call(attn_mask, is_causal, query, key, layer_mask, None)
        chosen = layer_mask.scale if layer_mask.scale is not None else scale
        return attend(query, key, value, layer_mask, bias=bias, dropout_p=dropout_p, scale=chosen)[0]

    def _replaced_layer(self, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor | None]:  # noqa: ANN401
        """What `nn.MultiheadAttention` calls, with (N, B, E) or (N, E)."""
        bound = _SIGNATURE.bind(*args, **kwargs)
        bound.apply_defaults()
        call = bound.arguments
        if call["query"].shape[0] != call["key"].shape[0] or (call["static_k"], call["static_v"]) != (None, None):
            self.skipped += 1
            return F.multi_head_attention_forward(*args, **kwargs)
        self.calls += 1
        layer_mask = self._layer_mask(call["num_heads"])
        layer = _layer(call)
        check_layer(layer, layer_mask)
        layer.layer_mask, layer.backend = layer_mask, None
        return layer.forward(**{name: call[name] for name in _OF_FORWARD})

    def _layer_mask(self, num_heads: int) -> LayerMask:
        place = num_heads, self._layer
        self._layer += 1
        if place not in self._layer_masks:
            self._layer_masks[place] = LayerMask(self.config, num_heads, place[1])
            if None in self.config.seeds:
                # A seed that was drawn is drawn once for all layers.
                self.config = self._layer_masks[place].config
        return self._layer_masks[place]


def _is_self_attention(query: Tensor, key: Tensor, value: Tensor, enable_gqa: bool) -> bool:
    """Whether these are the tokens of one sequence per sample; what torch broadcasts or refuses is left to torch."""
    if any(tensor.is_nested or tensor.dim() != 4 for tensor in (query, key, value)):
        return False
    batch, heads, tokens, _ = query.shape
    same = key.shape[0] == value.shape[0] == batch and key.shape[2] == value.shape[2] == tokens
    return same and key.shape[1] == value.shape[1] and (enable_gqa or key.shape[1] in (1, heads))


class _Projection(NamedTuple):
    weight: Tensor
    bias: Tensor | None


def _layer(call: Mapping[str, Any]) -> SparseMHSA:
    """A layer of the weights with which `multi_head_attention_forward` is called, without a mask."""
    layer = SparseMHSA.__new__(SparseMHSA)
    nn.Module.__init__(layer)
    width, separate = call["embed_dim_to_check"], call["use_separate_proj_weight"]
    # Not by setattr: what is given are tensors, not all of them parameters, and nothing is to be registered.
    layer.__dict__.update(
        {name: call[name] for name in _OF_LAYER},
        embed_dim=width,
        kdim=call["k_proj_weight"].shape[1] if separate else width,
        vdim=call["v_proj_weight"].shape[1] if separate else width,
        _qkv_same_embed_dim=not separate,
        head_dim=width // call["num_heads"],
        dropout=call["dropout_p"],
        batch_first=False,
        in_proj_weight=None if separate else call["in_proj_weight"],
        out_proj=_Projection(call["out_proj_weight"], call["out_proj_bias"]),
    )
    return layer
