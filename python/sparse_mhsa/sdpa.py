"""Trying a mask on any model: `patch_sdpa` stands in for `torch.nn.functional.scaled_dot_product_attention`."""

import warnings
from collections.abc import Callable, Iterable, Mapping
from types import TracebackType
from typing import Any

import torch.nn.functional as F
from torch import Tensor
from torch.nn.modules import module as hooks
from torch.overrides import TorchFunctionMode
from torch.utils.hooks import RemovableHandle

from .config import ConfigLike, config_error, load_config
from .functional import additive_bias, attend, causal_bias
from .layer_mask import LayerMask
from .presence import is_backward


class patch_sdpa(TorchFunctionMode):  # noqa: N801  (used as a function)
    """A context in which calls of `scaled_dot_product_attention` attend over the edges of a mask.

        with sparse_mhsa.patch_sdpa("configs/attention/vit_fibottention.yaml") as patched:
            model(x)
        print(patched.calls)

    It needs to know nothing of the model and changes nothing in it, which is good for a first look. `sparsify` knows
    which layer is which, and the grid and the prefix tokens of the model; here they are those of the configuration.
    Calls are numbered as layers in their order within a call of the outermost module.

    Only self-attention is replaced: (B, H, N, D) with as many keys as queries. It does not see attention inside
    functions of torch, which is that of `nn.MultiheadAttention`, of torch's transformer layers and of torchvision's
    Vision Transformers. With gradient checkpointing the backward pass is an error inside the context, and outside of
    it computes layers densely: use `sparsify` there. Masks and ``is_causal`` of the calls, and a ``scale`` unless the
    configuration has one, are kept.

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
                f"patch_sdpa: no call of scaled_dot_product_attention was replaced ({self.skipped} were no "
                "self-attention); the model computes attention in another way, use sparsify",
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
        if func is not F.scaled_dot_product_attention:
            return func(*args, **(kwargs or {}))
        return self._replaced(*args, **(kwargs or {}))

    def _replaced(self, query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> Tensor:  # noqa: ANN401
        if query.dim() != 4 or key.dim() != 4 or query.shape[2] != key.shape[2]:
            self.skipped += 1
            return F.scaled_dot_product_attention(query, key, value, *args, **kwargs)
        self.calls += 1
        return self._attend(query, key, value, *args, **kwargs)

    def _attend(
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
        layer_mask = self._layer_mask(query.shape[1])
        if is_causal and attn_mask is not None:
            raise ValueError("attn_mask: scaled_dot_product_attention takes either a mask or is_causal")
        bias = additive_bias(attn_mask, query, key)
        if is_causal and not layer_mask.is_causal:
            bias = causal_bias(query, key)
        chosen = layer_mask.scale if layer_mask.scale is not None else scale
        return attend(query, key, value, layer_mask, bias=bias, dropout_p=dropout_p, scale=chosen)[0]

    def _layer_mask(self, num_heads: int) -> LayerMask:
        place = num_heads, self._layer
        self._layer += 1
        if place not in self._layer_masks:
            self._layer_masks[place] = LayerMask(self.config, num_heads, place[1])
            if None in self.config.seeds:
                # A seed that was drawn is drawn once for all layers.
                self.config = self._layer_masks[place].config
        return self._layer_masks[place]
