"""Calls of the operators that PyTorch's own dense attention computes faster than our kernels do.

That is bfloat16 with every key kept, where the processor has a matrix unit (AMX): PyTorch uses it in both directions,
our kernels in the forward pass alone. (Calls that ask for no derivative do not come so far: `functional.attend` leaves
those with every key kept to `scaled_dot_product_attention`, in every dtype.)
"""

import functools
import json
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from . import _core

_ATEN = torch.ops.aten
EXPLAINED = (
    "without derivatives, and in bfloat16 on a processor with a matrix unit, scaled_dot_product_attention computes it"
)


def _forward(q: Tensor, k: Tensor, v: Tensor, spec: str, *options: Any) -> tuple[Tensor, Tensor] | None:  # noqa: ANN401
    if not is_faster(q, k, v, spec, *options):
        return None
    q, k, v = map(_in_rows, (q, k, v))
    scale = options[-1]
    out, lse = _ATEN._scaled_dot_product_flash_attention_for_cpu.default(q, k, v, 0.0, False, scale=scale)
    return out, lse.to(torch.float64, memory_format=torch.contiguous_format)


def _backward(
    grad_out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    spec: str,
    *options: Any,  # noqa: ANN401
) -> tuple[Tensor, Tensor, Tensor] | None:
    if not is_faster(q, k, v, spec, *options):
        return None
    grad_out, q, k, v, out = map(_in_rows, (grad_out, q, k, v, out))
    scale = options[-1]
    grads: tuple[Tensor, Tensor, Tensor] = _ATEN._scaled_dot_product_flash_attention_for_cpu_backward.default(
        grad_out, q, k, v, out, lse.float(), 0.0, False, scale=scale
    )
    return grads


OPERATORS: dict[str, Callable[..., Any]] = {"forward": _forward, "backward": _backward}
"""By the operator's name and with its arguments: what it returns, or None where it is not to be handed over."""


def is_faster(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    spec: str,
    key_mask: Tensor | None,
    bias: Tensor | None,
    seed: Tensor | None,
    dropout_p: float,
    scale: float,
) -> bool:
    """Whether PyTorch computes this faster: arguments as the operators take them, on the CPU."""
    return (
        q.dtype == torch.bfloat16
        and key_mask is None
        and bias is None
        and dropout_p == 0.0
        and q.shape[1] == k.shape[1]
        and q.shape[3] == v.shape[3]
        and min(q.numel(), k.numel()) > 0
        and _keeps_everything(spec)
        and has_matrix_unit()
    )


def has_matrix_unit() -> bool:
    """Whether the kernels of this process may use one."""
    return _core.instruction_set() == "amx"


@functools.lru_cache(maxsize=64)
def _keeps_everything(spec: str) -> bool:
    mask: dict[str, object] = json.loads(spec)
    return mask["mask"] == "none"


def _in_rows(x: Tensor) -> Tensor:
    """Dense attention reads numbers of a row that are neighbours in memory."""
    return x if x.stride(-1) == 1 else x.contiguous()
