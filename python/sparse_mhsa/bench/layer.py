"""A whole layer: the projections of multi-head self-attention around the attention of any method."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from .cases import Case
from .methods import Attention


@dataclass(frozen=True)
class Layer:
    """Multi-head self-attention as a function of tokens and weights, so that all methods have the same projections.

    Attributes:
        attend: the method's attention.
        num_heads: H.
    """

    attend: Attention
    num_heads: int

    def __call__(self, x: Tensor, in_weight: Tensor, in_bias: Tensor, out_weight: Tensor, out_bias: Tensor) -> Tensor:
        """(B, N, H * D) to the same; queries, keys and values come from one product, as in `nn.MultiheadAttention`."""
        projected = F.linear(x, in_weight, in_bias).view(*x.shape[:2], 3, self.num_heads, -1)
        q, k, v = projected.permute(2, 0, 3, 1, 4)
        return F.linear(self.attend(q, k, v).transpose(1, 2).flatten(2), out_weight, out_bias)


def layer_inputs(case: Case, dtype: torch.dtype) -> tuple[Tensor, ...]:
    """What a `Layer` is called with, requiring gradients; queries and keys get the spread of `Case.inputs`."""
    generator, width = torch.Generator().manual_seed(case.num_tokens), case.num_heads * case.head_dim
    weights = (torch.randn(shape, generator=generator) for shape in ((3 * width, width), (width, width)))
    w_in, w_out = (weight * width**-0.5 for weight in weights)
    x = torch.randn(case.batch, case.num_tokens, width, generator=generator)
    given = (x, w_in, torch.zeros(3 * width), w_out, torch.zeros(width))
    return tuple(tensor.to(dtype).requires_grad_() for tensor in given)
