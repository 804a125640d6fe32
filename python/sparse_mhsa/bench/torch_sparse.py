"""Attention written with torch.sparse, head by head: the best that PyTorch's own sparse matrices allow."""

import warnings
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function


class CsrAttention:
    """Attention over fixed edges by `torch.sparse.sampled_addmm` and sparse products.

    Args:
        row_ptr: (H, N + 1) offsets into ``col``.
        col: (nnz of all heads,) key of every edge.
        scale: factor of the scores.
    """

    def __init__(self, row_ptr: Tensor, col: Tensor, scale: float) -> None:
        # PyTorch says once per process that its CSR tensors are in beta.
        warnings.filterwarnings("ignore", "Sparse CSR tensor support is in beta", UserWarning)
        self.scale = scale
        self.heads = [_Pattern(ptr - ptr[0], col[int(ptr[0]) : int(ptr[-1])]) for ptr in row_ptr]

    def __call__(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """(B, H, N, D) to (B, H, N, D)."""
        out: Tensor = _CsrAttention.apply(q, k, v, self)  # type: ignore[no-untyped-call]
        return out


class _Pattern:
    """The edges of one head in CSR form, and where each of them lies in the transpose."""

    def __init__(self, row_ptr: Tensor, col: Tensor) -> None:
        self.size = len(row_ptr) - 1
        self.row_ptr, self.col = row_ptr, col
        self.row = torch.repeat_interleave(torch.arange(self.size), row_ptr.diff())
        self.order = torch.argsort(col, stable=True)
        counts = torch.bincount(col, minlength=self.size)
        self.transposed_ptr = torch.cat((counts.new_zeros(1), counts.cumsum(0)))
        self.transposed_col = self.row[self.order]

    def matrix(self, values: Tensor) -> Tensor:
        return torch.sparse_csr_tensor(self.row_ptr, self.col, values, (self.size, self.size), check_invariants=False)

    def transpose(self, values: Tensor) -> Tensor:
        return torch.sparse_csr_tensor(
            self.transposed_ptr,
            self.transposed_col,
            values[self.order],
            (self.size, self.size),
            check_invariants=False,
        )

    def products(self, left: Tensor, right: Tensor) -> Tensor:
        """The entries of left right^T at the edges."""
        nothing = self.matrix(left.new_zeros(len(self.col)))
        values: Tensor = torch.sparse.sampled_addmm(nothing, left, right.t(), beta=0.0).values()
        return values

    def row_sum(self, values: Tensor) -> Tensor:
        return torch.segment_reduce(values, "sum", offsets=self.row_ptr)

    def softmax(self, scores: Tensor) -> Tensor:
        exp = (scores - torch.segment_reduce(scores, "max", offsets=self.row_ptr)[self.row]).exp()
        return exp / self.row_sum(exp)[self.row]


class _CsrAttention(Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, attention: CsrAttention) -> Tensor:  # noqa: ANN401
        out, weights = torch.empty_like(q), []
        for b in range(q.shape[0]):
            for h, pattern in enumerate(attention.heads):
                weights.append(pattern.softmax(attention.scale * pattern.products(q[b, h], k[b, h])))
                out[b, h] = pattern.matrix(weights[-1]) @ v[b, h]
        ctx.save_for_backward(q, k, v, *weights)
        ctx.attention = attention
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:  # noqa: ANN401
        q, k, v, *weights = ctx.saved_tensors
        attention = ctx.attention
        dq, dk, dv = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
        for b in range(q.shape[0]):
            for h, pattern in enumerate(attention.heads):
                p = weights[b * len(attention.heads) + h]
                dv[b, h] = pattern.transpose(p) @ grad[b, h]
                dp = pattern.products(grad[b, h], v[b, h])
                ds = attention.scale * p * (dp - pattern.row_sum(p * dp)[pattern.row])
                dq[b, h] = pattern.matrix(ds) @ k[b, h]
                dk[b, h] = pattern.transpose(ds) @ q[b, h]
        return dq, dk, dv, None
