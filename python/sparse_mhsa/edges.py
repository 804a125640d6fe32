"""Attention over an edge list, composed of differentiable ATen operators.

The kernels give values and first derivatives. Everything beyond them lives here: the derivative of the
backward pass, the gradient of an additive bias, and the attention weights themselves. One head is handled at
a time, so memory is O(batch x edges of a head x head_dim).

Notation, per edge (i, j) of a head: ``s = scale * q_i.k_j + bias``, ``p = exp(s) / Z_i``. With
``masked_logits: zero`` a key that is visible but not an edge has logit 0 and the weight ``1 / Z_i``, the
*background* of row i. Every exponential is taken relative to the saved lse of its row, a constant that
cancels in ``p``.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
from torch import Tensor


class VmapInfo(Protocol):
    """What torch tells a rule for `torch.func.vmap`."""

    batch_size: int


def is_mapped(tensor: Tensor) -> bool:
    """Whether `torch.func.vmap` maps over a tensor right now."""
    functorch = torch._C._functorch
    # A gradient inside the map wraps its tensors once more.
    while not torch.compiler.is_compiling() and functorch.is_functorch_wrapped_tensor(tensor):
        if functorch.is_batchedtensor(tensor):
            return True
        tensor = functorch.get_unwrapped(tensor)
    return False


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which scores of q and k in ``dtype`` are accumulated."""
    return torch.float64 if dtype == torch.float64 else torch.float32


class EdgeSource(NamedTuple):
    """A mask as the operators take it: the canonical text ``spec``, or its edges as tensors.

    ``row_ptr`` is (P, N + 1) int64 with absolute offsets into ``col``, P = 1 (shared), H or B * H.
    """

    spec: str | None
    row_ptr: Tensor | None
    col: Tensor | None
    background: bool = False
    """True for ``masked_logits: zero``, as ``spec`` says it too."""

    def per_head(
        self, batch: int, num_heads: int, num_queries: int, num_keys: int, device: torch.device
    ) -> list[tuple[slice, Tensor, Tensor]]:
        """Edges on ``device`` as (samples that share them, ``row_ptr`` (H, N + 1), ``col``), one entry per list."""
        everyone = slice(0, batch)
        if self.spec is not None:
            row_ptr, col = torch.ops.sparse_mhsa.edge_index.default(self.spec, num_queries, num_keys)
            return [(everyone, row_ptr.to(device), col.to(device))]
        if self.row_ptr is None or self.col is None:
            raise ValueError("edges: expected a spec, or both row_ptr and col")
        if is_mapped(self.row_ptr) or is_mapped(self.col):
            raise NotImplementedError(
                "torch.func.vmap: attention weights and second derivatives cannot be had of edges that differ between "
                "the mapped samples (token_positions, or a mask by content); call the function once per sample"
            )
        row_ptr, col = self.row_ptr.to(device), self.col.to(device)
        # Lists chosen by content have room to spare, which holds no edges.
        col = col[: int(row_ptr[-1, -1])] if row_ptr.numel() else col
        if row_ptr.shape[0] == num_heads:
            return [(everyone, row_ptr, col)]
        if row_ptr.shape[0] == 1:
            starts = torch.arange(num_heads, device=device).mul(col.shape[0]).unsqueeze(1)
            return [(everyone, row_ptr + starts, col.repeat(num_heads))]
        samples = []
        for sample, pointers in enumerate(row_ptr.split(num_heads)):  # type: ignore[no-untyped-call]
            first, last = int(pointers[0, 0]), int(pointers[-1, -1])
            samples.append((slice(sample, sample + 1), pointers - first, col[first:last]))
        return samples


@dataclass(frozen=True, eq=False)
class HeadEdges:
    """The edges of one head for the samples that share them, with the constants that belong to them."""

    samples: slice
    head: int
    rows: Tensor
    """(E,) query of each edge."""
    cols: Tensor
    """(E,) key of each edge."""
    shift: Tensor
    """(b, N) saved lse of each row, 0 where a row is empty."""
    key_mask: Tensor | None
    """(b, S) bool, True = keep."""
    bias: Tensor | None
    """(b, E) additive bias of each edge."""
    visible: Tensor | None
    """(b, E) bool: ``key_mask`` keeps the key of the edge. Otherwise it is no edge at all."""
    kept: Tensor | None
    """(b, E) bool: visible, and its bias above -inf. A visible edge that is not kept has no weight."""
    dropout: Tensor | None
    """(b, E) 0 or 1 / (1 - p)."""
    scale: float
    background: bool

    def weights(self, q: Tensor, k: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Softmax weights before dropout.

        Args:
            q: (b, N, D).
            k: (b, S, D).
            bias: (b, E), or None.

        Returns:
            ``p`` (b, E), and the background weight (b, N) of each row, or None without background.
        """
        q_at, k_at = q.index_select(1, self.rows), _hide(k.index_select(1, self.cols), self.kept)
        scores = (q_at * k_at).sum(-1) * self.scale
        if bias is not None:
            scores = scores + bias
        weights = _hide(torch.exp(scores - self.shift.index_select(1, self.rows)), self.kept)
        total = self._sum_rows(weights)
        unit = None
        if self.background:
            unit = torch.exp(-self.shift)
            total = total + unit * self._background_keys(k.shape[1])
        total = total.masked_fill(total == 0, 1.0)
        weights = weights / total.index_select(1, self.rows)
        return weights, None if unit is None else unit / total

    def _background_keys(self, num_keys: int) -> Tensor:
        """(b, N) number of visible keys that are no edge of the row."""
        edges = self.shift.new_ones(self.shift.shape[0], self.rows.shape[0])
        keys = num_keys if self.key_mask is None else self.key_mask.sum(1, keepdim=True)
        return keys - self._sum_rows(_hide(edges, self.visible))

    def _sum_rows(self, at_edges: Tensor) -> Tensor:
        return torch.zeros_like(self.shift).index_add(1, self.rows, at_edges)

    def first_order(
        self, grad_out: Tensor, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Gradients of one head's output, as a differentiable function of everything they depend on.

        With ``dp = grad_out_i.v_j`` and ``delta_i = grad_out_i.out_i``: ``ds = p (dp - delta)``, and dq, dk,
        dv are sums of ``ds * k``, ``ds * q`` and ``p * grad_out`` over the edges.

        Args:
            grad_out: (b, N, Dv).
            q: (b, N, D).
            k: (b, S, D).
            v: (b, S, Dv).
            bias: (b, E), or None.

        Returns:
            dq (b, N, D), dk (b, S, D), dv (b, S, Dv) and ds (b, E), the gradient of the biased scores.
        """
        weights, background = self.weights(q, k, bias)
        q_at, k_at = q.index_select(1, self.rows), _hide(k.index_select(1, self.cols), self.kept)
        grad_at, v_at = grad_out.index_select(1, self.rows), v.index_select(1, self.cols)
        dp = (grad_at * _hide(v_at, self.kept)).sum(-1)
        dropped = weights
        if self.dropout is not None:
            dp, dropped = dp * self.dropout, weights * self.dropout
        delta = self._sum_rows(weights * dp)
        dv_at = dropped.unsqueeze(-1) * grad_at
        if background is not None:
            shadow = self._sum_rows((grad_at * _hide(v_at, self.visible)).sum(-1))
            everything = (grad_out * self._of_visible_keys(v).sum(1, keepdim=True)).sum(-1)
            delta = delta + background * (everything - shadow)
            dv_at = dv_at - _hide(background.index_select(1, self.rows).unsqueeze(-1) * grad_at, self.visible)
        ds = weights * (dp - delta.index_select(1, self.rows))

        dq = torch.zeros_like(q).index_add(1, self.rows, ds.unsqueeze(-1) * k_at) * self.scale
        dk = torch.zeros_like(k).index_add(1, self.cols, ds.unsqueeze(-1) * q_at) * self.scale
        dv = torch.zeros_like(v).index_add(1, self.cols, dv_at)
        if background is not None:
            from_all_rows = (background.unsqueeze(-1) * grad_out).sum(1, keepdim=True)
            dv = dv + self._of_visible_keys(from_all_rows.expand_as(v))
        return dq, dk, dv, ds

    def _of_visible_keys(self, of_keys: Tensor) -> Tensor:
        """(b, S, ...) with zeros at keys that ``key_mask`` drops."""
        return of_keys if self.key_mask is None else of_keys.masked_fill(~self.key_mask.unsqueeze(-1), 0.0)

    def dense_weights(self, q: Tensor, k: Tensor) -> Tensor:
        """(b, N, S) weights after dropout."""
        num_keys = k.shape[1]
        weights, background = self.weights(q, k, self.bias)
        if self.dropout is not None:
            weights = weights * self.dropout
        dense = weights.new_zeros(*self.shift.shape, num_keys)
        if background is not None:
            dense = self._of_visible_keys(background.unsqueeze(1).expand(-1, num_keys, -1)).transpose(1, 2)
            weights = weights - _hide(background.index_select(1, self.rows), self.visible)
        flat = dense.flatten(1).index_add(1, self.rows * num_keys + self.cols, weights)
        return flat.view(*self.shift.shape, num_keys)


def _hide(at_edges: Tensor, kept: Tensor | None) -> Tensor:
    """Zero what belongs to edges that are not kept, so that nothing stored there (NaN, inf) is ever used."""
    if kept is None:
        return at_edges
    return at_edges.masked_fill(~(kept if at_edges.dim() == 2 else kept.unsqueeze(-1)), 0.0)


def _bias_index(bias: Tensor, rows: Tensor, cols: Tensor) -> Tensor:
    """(E,) position of each edge in one head's bias of shape (..., N or 1, S or 1), flattened."""
    queries, keys = bias.shape[-2:]
    rows = rows if queries > 1 else torch.zeros_like(rows)
    return rows * keys + cols if keys > 1 else rows


def _bias_at_edges(bias: Tensor, samples: slice, head: int, rows: Tensor, cols: Tensor) -> Tensor:
    """(b or 1, E) values of a (B or 1, H or 1, N or 1, S or 1) bias on the edges of one head."""
    one_head = bias[:, head if bias.shape[1] > 1 else 0]
    if bias.shape[0] > 1:
        one_head = one_head[samples]
    return one_head.flatten(1).index_select(1, _bias_index(bias, rows, cols))


class EdgeAttention:
    """One attention call seen edge by edge; inputs are promoted to the accumulation dtype.

    Args:
        q: (B, H, N, D).
        k: (B, Hkv, S, D).
        lse: (B, H, N) as the forward kernel returned it.
        edges: the mask.
        key_mask: (B, S) bool, True = keep.
        seed: int64 scalar, needed with dropout.
        dropout_p: dropout probability of the attention weights.
        scale: factor of the scores.
    """

    def __init__(
        self,
        q: Tensor,
        k: Tensor,
        lse: Tensor,
        edges: EdgeSource,
        key_mask: Tensor | None,
        seed: Tensor | None,
        dropout_p: float,
        scale: float,
    ) -> None:
        self.lse, self.key_mask, self.seed = lse.detach().to(accumulation_dtype(q.dtype)), key_mask, seed
        self.dropout_p, self.scale = dropout_p, scale
        self.edges = edges
        self.batch, self.num_heads, self.num_queries = q.shape[:3]
        self.num_keys = k.shape[2]
        self.group = self.num_heads // k.shape[1] if k.shape[1] else 1

    def heads(self, bias: Tensor | None) -> Iterator[HeadEdges]:
        """Every head of every group of samples that shares its edges; heads vary fastest."""
        shift = self.lse.masked_fill(self.lse == -torch.inf, 0.0)
        lists = self.edges.per_head(self.batch, self.num_heads, self.num_queries, self.num_keys, shift.device)
        for samples, row_ptr, col in lists:
            factors = self._dropout(samples, row_ptr, col)
            bounds = [int(start) for start in row_ptr[:, 0]] + [int(row_ptr[-1, -1])]
            queries = torch.arange(self.num_queries, device=col.device)
            key_mask = None if self.key_mask is None else self.key_mask[samples]
            for head in range(self.num_heads):
                span = slice(bounds[head], bounds[head + 1])
                rows, cols = torch.repeat_interleave(queries, row_ptr[head].diff()), col[span]
                kept = visible = None if key_mask is None else key_mask.index_select(1, cols)
                at_edges = None
                if bias is not None:
                    at_edges = _bias_at_edges(bias, samples, head, rows, cols).to(shift.dtype)
                    at_edges = at_edges.expand(shift[samples].shape[0], -1)
                    finite = at_edges.detach() > -torch.inf
                    kept = finite if visible is None else finite & visible
                yield HeadEdges(
                    samples=samples,
                    head=head,
                    rows=rows,
                    cols=cols,
                    shift=shift[samples, head],
                    key_mask=key_mask,
                    bias=at_edges,
                    visible=visible,
                    kept=kept,
                    dropout=None if factors is None else factors[:, span],
                    scale=self.scale,
                    background=self.edges.background,
                )

    def _dropout(self, samples: slice, row_ptr: Tensor, col: Tensor) -> Tensor | None:
        if self.seed is None or self.dropout_p == 0.0:
            return None
        kept: Tensor = torch.ops.sparse_mhsa.dropout_keep.default(
            row_ptr, col, self.batch, self.num_heads, self.seed, self.dropout_p
        )
        # With probability 1 nothing is kept.
        return kept[samples].to(self.lse.dtype) * (1.0 / (1.0 - self.dropout_p) if self.dropout_p < 1.0 else 0.0)

    def bias_gradient(self, grad_out: Tensor, q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
        """Gradient of ``bias``, in its dtype and broadcast shape, from the edges alone."""
        parts = []
        for edges in self.heads(bias):
            queries, keys = self._of_queries(edges), self._of_keys(edges)
            ds = edges.first_order(queries(grad_out), queries(q), keys(k), keys(v), edges.bias)[3]
            parts.append(_sum_to_bias(ds, bias, edges))
        return self._gather_bias(parts, bias)

    def second_order(
        self,
        cotangents: Sequence[Tensor],
        grad_out: Tensor,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        bias: Tensor | None,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor | None]:
        """Vector-Jacobian product of the backward pass.

        Args:
            cotangents: of dq, dk, dv and, where the backward pass returned it, of the bias gradient.
            grad_out: (B, H, N, Dv).
            q: (B, H, N, D).
            k: (B, Hkv, S, D).
            v: (B, Hkv, S, Dv).
            bias: (B or 1, H or 1, N or 1, S or 1), or None.

        Returns:
            Gradients of grad_out, q, k, v and bias.
        """
        if q.is_meta:  # Shapes are all there is; the edges are not at hand.
            of_bias = None if bias is None else torch.empty_like(bias)
            return torch.empty_like(grad_out), torch.empty_like(q), torch.empty_like(k), torch.empty_like(v), of_bias
        parts: list[tuple[Tensor, ...]] = []
        bias_parts: list[Tensor] = []
        of_dq, of_dk, of_dv, *of_dbias = cotangents
        for edges in self.heads(bias):
            queries, keys = self._of_queries(edges), self._of_keys(edges)
            primals = [queries(grad_out), queries(q), keys(k), keys(v)]
            if edges.bias is not None:
                primals.append(edges.bias)
            of_ds = torch.zeros_like(edges.shift[:, :1]).expand(-1, edges.cols.shape[0])
            for of_bias in of_dbias:
                at_edges = _bias_at_edges(of_bias, edges.samples, edges.head, edges.rows, edges.cols)
                of_ds = of_ds + at_edges.to(of_ds.dtype)
            grads = _pull_back(edges, primals, (queries(of_dq), keys(of_dk), keys(of_dv), of_ds))
            parts.append(grads[:4])
            if bias is not None:
                bias_parts.append(_sum_to_bias(grads[4], bias, edges))
        of_grad_out, of_q, of_k, of_v = zip(*parts, strict=True)
        return (
            self._gather(of_grad_out).to(grad_out.dtype),
            self._gather(of_q).to(q.dtype),
            self._gather_keys(of_k).to(k.dtype),
            self._gather_keys(of_v).to(v.dtype),
            None if bias is None else self._gather_bias(bias_parts, bias),
        )

    def weights(self, q: Tensor, k: Tensor, bias: Tensor | None) -> Tensor:
        """(B, H, N, S) attention weights after dropout, in the dtype of q; rows without a key are zero."""
        return self._gather(list(self._dense_heads(q, k, bias))).to(q.dtype)

    def mean_weights(self, q: Tensor, k: Tensor, bias: Tensor | None) -> Tensor:
        """(B, N, S) mean of `weights` over the heads, one head at a time."""
        samples: list[Tensor] = []
        for place, dense in enumerate(self._dense_heads(q, k, bias)):
            if place % self.num_heads == 0:
                samples.append(dense)
            else:
                samples[-1] = samples[-1] + dense
        return torch.cat(samples).div(self.num_heads).to(q.dtype)

    def _dense_heads(self, q: Tensor, k: Tensor, bias: Tensor | None) -> Iterator[Tensor]:
        for edges in self.heads(bias):
            yield edges.dense_weights(self._of_queries(edges)(q), self._of_keys(edges)(k))

    def _of_queries(self, edges: HeadEdges) -> Callable[[Tensor], Tensor]:
        """Picks (b, N, D) out of (B, H, N, D), in the accumulation dtype."""
        return lambda tensor: tensor[edges.samples, edges.head].to(self.lse.dtype)

    def _of_keys(self, edges: HeadEdges) -> Callable[[Tensor], Tensor]:
        """Picks (b, S, D) out of (B, Hkv, S, D), in the accumulation dtype."""
        return lambda tensor: tensor[edges.samples, edges.head // self.group].to(self.lse.dtype)

    def _gather(self, parts: Sequence[Tensor]) -> Tensor:
        """(B, H, ...) from one part per head, in the order of `heads`."""
        starts = range(0, len(parts), self.num_heads)
        return torch.cat([torch.stack(list(parts[start : start + self.num_heads]), 1) for start in starts])

    def _gather_keys(self, parts: Sequence[Tensor]) -> Tensor:
        """(B, Hkv, ...): as `_gather`, where the heads that share a key add up."""
        whole = self._gather(parts)
        shape = (self.batch, self.num_heads // self.group, self.group, *whole.shape[2:])
        return whole if self.group == 1 else whole.view(shape).sum(2)

    def _gather_bias(self, parts: Sequence[Tensor], bias: Tensor) -> Tensor:
        whole = self._gather(parts)
        for dim in (0, 1):
            if bias.shape[dim] == 1:
                whole = whole.sum(dim, keepdim=True)
        return whole.to(bias.dtype)


def _sum_to_bias(values: Tensor, bias: Tensor, edges: HeadEdges) -> Tensor:
    """(b or 1, N or 1, S or 1) sums of (b, E) values: the adjoint of reading a bias at the edges."""
    queries, keys = bias.shape[-2:]
    if bias.shape[0] == 1:
        values = values.sum(0, keepdim=True)
    # Thousands of pairs may share an entry, one chain of additions each: in float64, which only MPS has not.
    wide = values if values.device.type == "mps" else values.double()
    total = wide.new_zeros(values.shape[0], queries * keys)
    total = total.index_add(1, _bias_index(bias, edges.rows, edges.cols), wide)
    return total.to(values.dtype).view(values.shape[0], queries, keys)


def _pull_back(edges: HeadEdges, primals: Sequence[Tensor], cotangents: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    def first_order(
        grad_out: Tensor, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None = None
    ) -> tuple[Tensor, ...]:
        return edges.first_order(grad_out, q, k, v, bias)

    # vjp rather than autograd.grad: it differentiates whatever the grad mode is.
    pull_back = torch.func.vjp(first_order, *primals)[1]
    grads: tuple[Tensor, ...] = pull_back(cotangents)
    return grads


def append_visible_keys(row_ptr: Tensor, col: Tensor, num_keys: int, extra: int) -> EdgeSource:
    """The edges plus one to each of ``extra`` keys that follow the ``num_keys`` others, for every query.

    Args:
        row_ptr: (H, N + 1) absolute offsets into ``col``.
        col: (nnz,) keys.
        num_keys: S, without the new keys.
        extra: how many keys were appended.

    Returns:
        Edge tensors over S + extra keys.
    """
    num_heads, num_queries = row_ptr.shape[0], row_ptr.shape[1] - 1
    device = col.device
    rows = torch.arange(num_heads * num_queries, device=device).view(num_heads, num_queries)
    row_of_edge = torch.repeat_interleave(rows.flatten(), row_ptr.diff(dim=1).flatten())
    new_col = col.new_empty(col.shape[0] + extra * rows.numel())
    new_col[torch.arange(col.shape[0], device=device) + extra * row_of_edge] = col
    ends = row_ptr[:, 1:] + extra * rows
    for place in range(extra):
        new_col[ends + place] = num_keys + place
    steps = torch.arange(num_queries + 1, device=device)
    before = steps + num_queries * torch.arange(num_heads, device=device).unsqueeze(1)
    return EdgeSource(None, row_ptr + extra * before, new_col)
