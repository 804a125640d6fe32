"""What attention costs: multiply-accumulates, GMACs, GFLOPs and pruning ratios.

Counted are the two matrix products of attention, q k^T and p v, not the projections: ``2 * nnz * head_dim``
multiply-accumulates per layer, summed over heads. A multiply-accumulate counts as one in GMACs and as two in
GFLOPs; published tables that say "GFLOPs" often mean GMACs, so every number here names its unit.

Importing this module teaches `torch.utils.flop_counter.FlopCounterMode` what our operators cost. For dense attention on
the CPU that counter says 0; `flop_counter` makes one that knows better.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode, register_flop_formula

from . import flex, ops  # noqa: F401  (define the operators that the formulas are for)
from ._core import Edges, count_edges
from .layer_mask import LayerMask

_OPS = torch.ops.sparse_mhsa
_ATEN = torch.ops.aten
_Shape: TypeAlias = Sequence[int]

Unit: TypeAlias = Literal["GMACs", "GFLOPs"]
_OPERATIONS_PER_MAC = {"GMACs": 1, "GFLOPs": 2}


def attention_macs(nnz: int, head_dim: int, value_dim: int | None = None) -> int:
    """Multiply-accumulates of q k^T and p v over ``nnz`` edges.

    Args:
        nnz: edges kept, summed over heads.
        head_dim: D of queries and keys.
        value_dim: Dv of values; default D.

    Returns:
        ``nnz * (D + Dv)``.
    """
    return nnz * (head_dim + (head_dim if value_dim is None else value_dim))


def in_unit(macs: int, unit: Unit) -> float:
    """Multiply-accumulates as GMACs or GFLOPs.

    Raises:
        ValueError: ``unit`` is neither.
    """
    if unit not in _OPERATIONS_PER_MAC:
        raise ValueError(f"unit: expected 'GMACs' or 'GFLOPs', got {unit!r}")
    return macs * _OPERATIONS_PER_MAC[unit] / 1e9


@dataclass(frozen=True)
class LayerCost:
    """Attention of one layer for one sample."""

    name: str
    mask: str
    num_heads: int
    num_tokens: int
    num_prefix_tokens: int
    head_dim: int
    nnz: int
    nnz_patches: int
    backend_macs: int | None = None
    """Multiply-accumulates of a backend without edges, which prunes no pair; None for softmax over edges."""

    @property
    def dense_nnz(self) -> int:
        """Edges without sparsity: H * N * N."""
        return self.num_heads * self.num_tokens**2

    @property
    def dense_nnz_patches(self) -> int:
        """Patch-to-patch edges without sparsity."""
        return self.num_heads * (self.num_tokens - self.num_prefix_tokens) ** 2

    @property
    def macs(self) -> int:
        """Multiply-accumulates over the edges kept."""
        return attention_macs(self.nnz, self.head_dim) if self.backend_macs is None else self.backend_macs

    @property
    def dense_macs(self) -> int:
        """Multiply-accumulates of dense attention."""
        return attention_macs(self.dense_nnz, self.head_dim)


@dataclass(frozen=True)
class AttentionCost:
    """Attention of a whole model for one sample, layer by layer."""

    layers: tuple[LayerCost, ...]

    def sparse(self, unit: Unit = "GMACs") -> float:
        """Cost over the edges kept."""
        return in_unit(sum(layer.macs for layer in self.layers), unit)

    def dense(self, unit: Unit = "GMACs") -> float:
        """Cost of the same layers with dense attention."""
        return in_unit(sum(layer.dense_macs for layer in self.layers), unit)

    @property
    def density(self) -> float:
        """Share of all query-key pairs that is kept, prefix rows and columns included."""
        return _ratio(sum(x.nnz for x in self.layers), sum(x.dense_nnz for x in self.layers))

    @property
    def pruning_ratio_patches(self) -> float:
        """1 - density over the patch-to-patch entries, the convention of published tables."""
        kept = sum(layer.nnz_patches for layer in self.layers)
        return 1.0 - _ratio(kept, sum(layer.dense_nnz_patches for layer in self.layers))

    @property
    def pruning_ratio_whole(self) -> float:
        """1 - density over the whole matrix."""
        return 1.0 - self.density

    def to_dict(self) -> dict[str, object]:
        """Totals and layers as plain data."""
        return {
            "sparse_gmacs": self.sparse("GMACs"),
            "sparse_gflops": self.sparse("GFLOPs"),
            "dense_gmacs": self.dense("GMACs"),
            "dense_gflops": self.dense("GFLOPs"),
            "density": self.density,
            "pruning_ratio_patches": self.pruning_ratio_patches,
            "pruning_ratio_whole": self.pruning_ratio_whole,
            "layers": [
                {
                    "name": layer.name,
                    "mask": layer.mask,
                    "num_tokens": layer.num_tokens,
                    "nnz": layer.nnz,
                    "gmacs": in_unit(layer.macs, "GMACs"),
                    "gflops": in_unit(layer.macs, "GFLOPs"),
                    "dense_gmacs": in_unit(layer.dense_macs, "GMACs"),
                }
                for layer in self.layers
            ],
        }

    def __str__(self) -> str:
        return (
            f"attention: {self.sparse('GMACs'):.4g} GMACs = {self.sparse('GFLOPs'):.4g} GFLOPs "
            f"(dense {self.dense('GMACs'):.4g} GMACs = {self.dense('GFLOPs'):.4g} GFLOPs), "
            f"pruned {self.pruning_ratio_patches:.2%} patch-to-patch, "
            f"{self.pruning_ratio_whole:.2%} of the whole matrix"
        )


def _ratio(part: int, whole: int) -> float:
    return part / whole if whole else 1.0


def attention_cost(model: nn.Module, num_tokens: int) -> AttentionCost:
    """Cost of every self-attention layer of a model, sparse layers by their masks and the others as dense.

    A mask that chooses keys by content counts in the mean over contents for which every key is equally likely.

    Args:
        model: any model whose attention an adapter knows.
        num_tokens: N that reaches the layers, prefix tokens included.

    Returns:
        One entry per layer, in module order, and totals.

    Raises:
        ConfigError: a layer's mask cannot be built for ``num_tokens``.
    """
    from .adapters import find_attention

    layers = []
    for site in find_attention(model):
        num_heads, head_dim = site.adapter.heads(site.module)
        backend = site.backend
        layer_mask = site.layer_mask
        if layer_mask is None or backend is not None:
            prefix = site.num_prefix_tokens or 0
            edges, patches = num_heads * num_tokens**2, num_heads * max(0, num_tokens - prefix) ** 2
            name, macs = ("none", None) if backend is None else (backend.name, backend.macs(num_tokens))
        elif isinstance(layer_mask, LayerMask) and layer_mask.by_content:
            all_edges, between = zip(*count_edges(layer_mask.spec, num_tokens), strict=True)
            edges, patches = round(math.fsum(all_edges)), round(math.fsum(between))
            name, prefix, macs = layer_mask.name, layer_mask.num_prefix_tokens_used, None
        else:
            mask = layer_mask.at(num_tokens)
            name, prefix, edges, patches = mask.name, mask.num_prefix_tokens, mask.nnz, mask.nnz_patches
            macs = None
        layers.append(LayerCost(site.name, name, num_heads, num_tokens, prefix, head_dim, edges, patches, macs))
    return AttentionCost(tuple(layers))


def flop_counter(*, depth: int = 2, display: bool = False) -> FlopCounterMode:
    """A counter of operations that counts attention on the CPU too, sparse and dense.

        with flop_counter() as counter:
            model(x)
        counter.get_total_flops()

    torch's own counter takes the kernels that `scaled_dot_product_attention` and, in evaluation, torch's attention and
    encoder layers call on the CPU for free, so that a dense model looks cheaper than it is.

    Args:
        depth: of the modules in the table.
        display: print the table on leaving.

    Returns:
        The context; it leaves torch's registry of formulas alone.
    """
    formulas = {
        _ATEN._scaled_dot_product_flash_attention_for_cpu: _flops_of_sdpa,
        _ATEN._scaled_dot_product_flash_attention_for_cpu_backward: _flops_of_sdpa_backward,
        _ATEN._native_multi_head_attention: _flops_of_self_attention,
        _ATEN._transformer_encoder_layer_fwd: _flops_of_encoder_layer,
    }
    return FlopCounterMode(depth=depth, display=display, custom_mapping=formulas)


def _flops_of_sdpa(q: _Shape, k: _Shape, v: _Shape, *_: object, **__: object) -> int:
    return 2 * math.prod(q[:3]) * k[2] * (q[3] + v[3])


def _flops_of_sdpa_backward(grad: _Shape, q: _Shape, k: _Shape, v: _Shape, *_: object, **__: object) -> int:
    return 2 * math.prod(q[:3]) * k[2] * (3 * q[3] + 2 * v[3])


def _flops_of_self_attention(q: _Shape, *_: object, **__: object) -> int:
    """Of a layer with its four projections."""
    batch, tokens, width = q
    return 2 * batch * tokens * width * (4 * width + 2 * tokens)


def _flops_of_encoder_layer(x: _Shape, *rest: _Shape, **__: object) -> int:
    batch, tokens, width = x
    hidden = rest[13][0]  # of `ffn_weight_1`
    return _flops_of_self_attention(x) + 2 * batch * tokens * width * 2 * hidden


# FLOP formulas: a multiply-accumulate counts as two. The forward pass multiplies q.k and p.v, the backward
# pass q.k once more, dv, grad.v, dq and dk.


def _edges_of_spec(q: _Shape, k: _Shape, spec: str) -> int:
    batch, num_heads, num_queries = q[:3]
    if num_queries != k[2]:  # only the dense mask may be rectangular
        return batch * num_heads * num_queries * k[2]
    return batch * sum(Edges.from_spec(spec, num_queries).nnz())


def _edges_of_lists(q: _Shape, row_ptr: _Shape, col: _Shape) -> int:
    return col[0] * (q[0] * q[1] // row_ptr[0])


@register_flop_formula(_OPS.forward)
def _(q: _Shape, k: _Shape, v: _Shape, spec: str, *_: object, **__: object) -> int:
    return 2 * _edges_of_spec(q, k, spec) * (q[3] + v[3])


@register_flop_formula(_OPS.forward_edges)
def _(q: _Shape, k: _Shape, v: _Shape, row_ptr: _Shape, col: _Shape, *_: object, **__: object) -> int:
    return 2 * _edges_of_lists(q, row_ptr, col) * (q[3] + v[3])


@register_flop_formula(_OPS.backward)
def _(
    grad: _Shape,
    q: _Shape,
    k: _Shape,
    v: _Shape,
    out: _Shape,
    lse: _Shape,
    spec: str,
    *_: object,
    **__: object,
) -> int:
    return 2 * _edges_of_spec(q, k, spec) * (3 * q[3] + 2 * v[3])


@register_flop_formula(_OPS.backward_edges)
def _(
    grad: _Shape,
    q: _Shape,
    k: _Shape,
    v: _Shape,
    out: _Shape,
    lse: _Shape,
    row_ptr: _Shape,
    col: _Shape,
    *_: object,
    **__: object,
) -> int:
    return 2 * _edges_of_lists(q, row_ptr, col) * (3 * q[3] + 2 * v[3])


@register_flop_formula(_OPS.bias_gradient)
def _(
    grad: _Shape,
    q: _Shape,
    k: _Shape,
    v: _Shape,
    lse: _Shape,
    spec: str | None,
    row_ptr: _Shape,
    col: _Shape,
    *_: object,
    **__: object,
) -> int:
    edges = _edges_of_lists(q, row_ptr, col) if spec is None else _edges_of_spec(q, k, spec)
    return 2 * edges * (q[3] + v[3])


@register_flop_formula(_OPS.flex)
def _(q: _Shape, k: _Shape, v: _Shape, spec: str | None, *_: object, **__: object) -> int:
    pairs = q[0] * q[1] * q[2] * k[2] if spec is None else _edges_of_spec(q, k, spec)
    return 2 * pairs * (q[3] + v[3])
