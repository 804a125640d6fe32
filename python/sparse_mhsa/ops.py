"""The operators of namespace ``sparse_mhsa`` and their derivatives.

``torch.ops.sparse_mhsa.forward`` and ``backward`` take a mask as its canonical text, ``forward_edges`` and
``backward_edges`` as edge tensors; both meet in the same kernels. The operators have no autograd of their
own: the `torch.autograd.Function` classes below carry it, so that torch.func, torch.compile and double
backward are all right. `attention` is the door to use from Python.
"""

import functools
import inspect
import json
from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.autograd.function import FunctionCtx

from . import _core, handover
from .edges import EdgeAttention, EdgeSource, VmapInfo
from .engine import NAMES, chosen_engine, engine_for

_LIBRARY = torch.library.Library("sparse_mhsa", "DEF")  # type: ignore[no-untyped-call]
# Devices whose tensors the operators take, as torch dispatches them. All but the CPU share one implementation.
_DEVICES = ("CPU", "CUDA", "MPS", "XPU")
# The kernels read any strides, so a compiler may keep whatever layout it has.
_TAGS = (torch.Tag.pt2_compliant_tag, torch.Tag.flexible_layout)
_QKV = "Tensor q, Tensor k, Tensor v"
_OPTIONS = "Tensor? key_mask, Tensor? bias, Tensor? seed, float dropout_p, float scale"
# What `chosen_engine` gave when the forward pass ran; without it the operator goes by what is chosen when it runs.
_ENGINE = "*, Tensor? engine=None"
# Visible keys that are not edges keep the logit 0; a spec says so itself.
_BACKGROUND = ", bool background=False"


def _lse_dtype(device: torch.device) -> torch.dtype:
    """What the operators give ``lse`` in, where the device has it: the weights are found from it again."""
    return torch.float32 if device.type == "mps" else torch.float64


def _new_heads(like: Tensor, shape: Sequence[int]) -> Tensor:
    """(B, H, N, D), the heads of a token side by side in memory, so that merging them costs nothing."""
    batch, heads, tokens, dim = shape
    return like.new_empty((batch, tokens, heads, dim)).transpose(1, 2)


def _fake_forward(q: Tensor, k: Tensor, v: Tensor, *_: object, **__: object) -> tuple[Tensor, Tensor]:
    return _new_heads(q, (*q.shape[:3], v.shape[3])), q.new_empty(q.shape[:3], dtype=_lse_dtype(q.device))


def _fake_backward(
    grad_out: Tensor, q: Tensor, k: Tensor, v: Tensor, *_: object, **__: object
) -> tuple[Tensor, Tensor, Tensor]:
    return _new_heads(q, q.shape), _new_heads(k, k.shape), _new_heads(v, v.shape)


def _kernel(name: str) -> Callable[..., Any]:
    """The core's function, told which engine to use when it runs: never when it is traced."""
    compute, dense = getattr(_core, name), handover.OPERATORS.get(name)

    def run(first: Tensor, *args: object, engine: Tensor | None = None, **options: bool) -> Any:  # noqa: ANN401
        found = engine_for(first.device, None if engine is None else NAMES[int(engine)])
        if dense is not None and found == "cpu" and (result := dense(first, *args)) is not None:
            return result
        return compute(found, first, *args, **options)

    return run


def _implement(name: str, implementation: Callable[..., Any]) -> None:
    for device in _DEVICES:
        _LIBRARY.impl(name, implementation, device)  # type: ignore[no-untyped-call]


def _define_kernels() -> None:
    for suffix, edges, own in (("", "str spec", ""), ("_edges", "Tensor row_ptr, Tensor col", _BACKGROUND)):
        forward, backward = f"forward{suffix}", f"backward{suffix}"
        _LIBRARY.define(  # type: ignore[no-untyped-call]
            f"{forward}({_QKV}, {edges}, {_OPTIONS}, {_ENGINE}{own}) -> (Tensor out, Tensor lse)", tags=_TAGS
        )
        _LIBRARY.define(  # type: ignore[no-untyped-call]
            f"{backward}(Tensor grad_out, {_QKV}, Tensor out, Tensor lse, {edges}, {_OPTIONS}, {_ENGINE}{own})"
            " -> (Tensor dq, Tensor dk, Tensor dv)",
            tags=_TAGS,
        )
        for name, fake in ((forward, _fake_forward), (backward, _fake_backward)):
            _implement(name, _kernel(name))
            torch.library.register_fake(f"sparse_mhsa::{name}", fake, lib=_LIBRARY)


def _bias_gradient(
    grad_out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lse: Tensor,
    spec: str | None,
    row_ptr: Tensor | None,
    col: Tensor | None,
    key_mask: Tensor | None,
    bias: Tensor,
    seed: Tensor | None,
    dropout_p: float,
    scale: float,
    *,
    background: bool = False,
) -> Tensor:
    source = EdgeSource(spec, row_ptr, col, background)
    attention = EdgeAttention(q, k, lse, source, key_mask, seed, dropout_p, scale)
    return attention.bias_gradient(grad_out, q, k, v, bias).contiguous()


def _fake_edge_index(spec: str, num_queries: int, num_keys: int) -> tuple[Tensor, Tensor]:
    edges = torch.library.get_ctx().new_dynamic_size()
    row_ptr = torch.empty(json.loads(spec)["heads"], num_queries + 1, dtype=torch.int64)
    return row_ptr, torch.empty(edges, dtype=torch.int64)


def _dropout_keep(row_ptr: Tensor, col: Tensor, batch: int, num_heads: int, seed: Tensor, dropout_p: float) -> Tensor:
    # Which edges keep their weight, and not the factor 1 / (1 - p) in float64: not every device has that dtype.
    kept = _core.dropout_keep(row_ptr.cpu(), col.cpu(), batch, num_heads, seed, dropout_p) != 0
    return kept if col.device.type == "cpu" else kept.to(col.device)


def _fake_dropout_keep(
    row_ptr: Tensor, col: Tensor, batch: int, num_heads: int, seed: Tensor, dropout_p: float
) -> Tensor:
    return col.new_empty(batch, col.shape[0], dtype=torch.bool)


def _fake_select_edges(
    q: Tensor,
    k: Tensor,
    spec: str,
    key_mask: Tensor | None,
    bias: Tensor | None,
    importance: Tensor | None,
    scale: float,
) -> tuple[Tensor, Tensor]:
    batch, heads, queries, _ = q.shape
    # Room for the longest lists, so that their shapes depend on sizes alone.
    chosen, dense = _core.selection_room(spec) or (0, 0)
    room = (torch.sym_min(chosen, queries) + dense) * batch * heads * queries  # type: ignore[no-untyped-call]
    row_ptr = q.new_empty((batch * heads, queries + 1), dtype=torch.int64)
    return row_ptr, q.new_empty((room,), dtype=torch.int64)


def _map_select_edges(
    info: VmapInfo, in_dims: tuple[int | None, ...], *args: object
) -> tuple[tuple[Tensor, ...], tuple[int, ...]]:
    return _one_by_one(_ops.select_edges.default, info.batch_size, in_dims, args)


def _define_selection() -> None:
    """The choice of edges by content. Its outputs are integers, so nothing is differentiated."""
    _LIBRARY.define(  # type: ignore[no-untyped-call]
        "select_edges(Tensor q, Tensor k, str spec, Tensor? key_mask, Tensor? bias, Tensor? importance, float scale)"
        " -> (Tensor row_ptr, Tensor col)",
        tags=_TAGS,
    )
    _LIBRARY.impl("select_edges", _core.select_edges, "CPU")  # type: ignore[no-untyped-call]
    torch.library.register_fake("sparse_mhsa::select_edges", _fake_select_edges, lib=_LIBRARY)
    torch.library.register_vmap("sparse_mhsa::select_edges", _map_select_edges, lib=_LIBRARY)


def _define_edge_lists() -> None:
    """What `EdgeAttention` asks of the core: as operators, because plain calls fail inside torch.func transforms."""
    _LIBRARY.define(  # type: ignore[no-untyped-call]
        "edge_index(str spec, SymInt num_queries, SymInt num_keys) -> (Tensor row_ptr, Tensor col)",
        tags=(torch.Tag.pt2_compliant_tag, torch.Tag.dynamic_output_shape),
    )
    _LIBRARY.define(  # type: ignore[no-untyped-call]
        "dropout_keep(Tensor row_ptr, Tensor col, SymInt batch, int num_heads, Tensor seed, float dropout_p) -> Tensor",
        tags=_TAGS,
    )
    # Without tensor arguments there is no device to dispatch on.
    _LIBRARY.impl("edge_index", _core.edge_index, "BackendSelect")  # type: ignore[no-untyped-call]
    _implement("dropout_keep", _dropout_keep)
    torch.library.register_fake("sparse_mhsa::edge_index", _fake_edge_index, lib=_LIBRARY)
    torch.library.register_fake("sparse_mhsa::dropout_keep", _fake_dropout_keep, lib=_LIBRARY)


def _define_bias_gradient() -> None:
    _LIBRARY.define(  # type: ignore[no-untyped-call]
        f"bias_gradient(Tensor grad_out, {_QKV}, Tensor lse, str? spec, Tensor? row_ptr, Tensor? col,"
        " Tensor? key_mask, Tensor bias, Tensor? seed, float dropout_p, float scale, *, bool background=False)"
        " -> Tensor",
        tags=_TAGS,
    )
    _implement("bias_gradient", _bias_gradient)
    torch.library.register_fake(
        "sparse_mhsa::bias_gradient",
        lambda grad_out, q, k, v, lse, spec, row_ptr, col, key_mask, bias, *_, **__: bias.new_empty(bias.shape),
        lib=_LIBRARY,
    )


def _define_choice() -> None:
    """The choice of the engine as a tensor: what a compiled forward pass saves for its backward pass must be one."""
    _LIBRARY.define("chosen_engine() -> Tensor", tags=_TAGS)  # type: ignore[no-untyped-call]
    _LIBRARY.impl(  # type: ignore[no-untyped-call]
        "chosen_engine", lambda: torch.tensor(NAMES.index(chosen_engine()), device="cpu"), "BackendSelect"
    )
    torch.library.register_fake(
        "sparse_mhsa::chosen_engine", lambda: torch.empty((), dtype=torch.int64, device="cpu"), lib=_LIBRARY
    )


_define_kernels()
_define_choice()
_define_edge_lists()
_define_bias_gradient()
_define_selection()
_ops = torch.ops.sparse_mhsa

_Dims: TypeAlias = tuple[int | None, ...]
_Inputs: TypeAlias = tuple[Any, ...]


class _Context(FunctionCtx):
    """What the Functions keep between their two halves; a type only, torch makes the objects."""

    spec: str | None
    background: bool
    dropout_p: float
    scale: float
    saved_tensors: tuple[Tensor, ...]
    needs_input_grad: tuple[bool, ...]


class _Attention(torch.autograd.Function):
    """``(q, k, v, *options) -> (out, lse)``; lse is not differentiable."""

    @staticmethod
    def forward(
        q: Tensor,
        k: Tensor,
        v: Tensor,
        key_mask: Tensor | None,
        bias: Tensor | None,
        seed: Tensor | None,
        row_ptr: Tensor | None,
        col: Tensor | None,
        engine: Tensor | None,
        spec: str | None,
        background: bool,
        dropout_p: float,
        scale: float,
    ) -> tuple[Tensor, Tensor]:
        options = (key_mask, bias, seed, dropout_p, scale)
        result: tuple[Tensor, Tensor]
        if spec is not None:
            result = _ops.forward.default(q, k, v, spec, *options, engine=engine)
        else:
            result = _ops.forward_edges.default(q, k, v, row_ptr, col, *options, engine=engine, background=background)
        return result

    @staticmethod
    def setup_context(ctx: _Context, inputs: _Inputs, output: tuple[Tensor, Tensor]) -> None:
        *tensors, ctx.spec, ctx.background, ctx.dropout_p, ctx.scale = inputs
        ctx.save_for_backward(*tensors, *output)
        ctx.mark_non_differentiable(output[1])

    @staticmethod
    def backward(ctx: _Context, grad_out: Tensor, _grad_lse: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, key_mask, bias, seed, row_ptr, col, engine, out, lse = ctx.saved_tensors
        wants_bias = ctx.needs_input_grad[4]
        tensors = (grad_out, q, k, v, out, lse, key_mask, bias, seed, row_ptr, col, engine)
        differentiable = needs_autograd(grad_out, q, k, v, bias)
        run = _AttentionBackward.apply if differentiable else _AttentionBackward.forward
        dq, dk, dv, *dbias = run(*tensors, ctx.spec, ctx.background, ctx.dropout_p, ctx.scale, wants_bias)
        return dq, dk, dv, None, dbias[0] if wants_bias else None, *[None] * 8

    @staticmethod
    def vmap(info: VmapInfo, in_dims: _Dims, *args: object) -> tuple[tuple[Tensor, ...], tuple[int, ...]]:
        inputs: _Inputs = args
        if not _folds(in_dims[5:8], dropout_p=inputs[11]):
            return _one_by_one(_Attention.apply, info.batch_size, in_dims, inputs)
        batch = _batch_of(inputs[0], in_dims[0])
        fold = functools.partial(_fold, size=info.batch_size, batch=batch)
        folded = [fold(tensor, dim) for tensor, dim in zip(inputs[:5], in_dims[:5], strict=True)]
        out, lse = _Attention.apply(*folded, *inputs[5:])  # type: ignore[no-untyped-call]
        sizes = (info.batch_size, batch)
        return (out.unflatten(0, sizes), lse.unflatten(0, sizes)), (0, 0)


class _AttentionBackward(torch.autograd.Function):
    """``(grad_out, q, k, v, out, lse, *options, wants_bias) -> (dq, dk, dv[, dbias])``.

    Its derivative recomputes the first order from grad_out, q, k, v and bias; ``out`` and ``lse`` are
    functions of those and count as constants.
    """

    @staticmethod
    def forward(
        grad_out: Tensor,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        out: Tensor,
        lse: Tensor,
        key_mask: Tensor | None,
        bias: Tensor | None,
        seed: Tensor | None,
        row_ptr: Tensor | None,
        col: Tensor | None,
        engine: Tensor | None,
        spec: str | None,
        background: bool,
        dropout_p: float,
        scale: float,
        wants_bias: bool,
    ) -> tuple[Tensor, ...]:
        saved, options = (grad_out, q, k, v, out, lse), (key_mask, bias, seed, dropout_p, scale)
        grads: tuple[Tensor, ...]
        if spec is not None:
            grads = _ops.backward.default(*saved, spec, *options, engine=engine)
        else:
            grads = _ops.backward_edges.default(*saved, row_ptr, col, *options, engine=engine, background=background)
        if not wants_bias:
            return grads
        source = (spec, row_ptr, col)
        return *grads, _ops.bias_gradient.default(grad_out, q, k, v, lse, *source, *options, background=background)

    @staticmethod
    def setup_context(ctx: _Context, inputs: _Inputs, output: tuple[Tensor, ...]) -> None:
        *tensors, ctx.spec, ctx.background, ctx.dropout_p, ctx.scale, _ = inputs
        ctx.save_for_backward(*tensors)

    @staticmethod
    def backward(ctx: _Context, *cotangents: Tensor) -> tuple[Tensor | None, ...]:
        grad_out, q, k, v, _, lse, key_mask, bias, seed, row_ptr, col, _ = ctx.saved_tensors
        edges = EdgeSource(ctx.spec, row_ptr, col, ctx.background)
        attention = EdgeAttention(q, k, lse, edges, key_mask, seed, ctx.dropout_p, ctx.scale)
        grads = attention.second_order(cotangents, grad_out, q, k, v, bias)
        return *grads[:4], None, None, None, grads[4], *[None] * 9

    @staticmethod
    def vmap(info: VmapInfo, in_dims: _Dims, *args: object) -> tuple[tuple[Tensor, ...], tuple[int, ...]]:
        inputs: _Inputs = args
        if not _folds(in_dims[8:11], dropout_p=inputs[14]):
            return _one_by_one(_AttentionBackward.apply, info.batch_size, in_dims, inputs)
        batch = _batch_of(inputs[1], in_dims[1])
        fold = functools.partial(_fold, size=info.batch_size, batch=batch)
        folded = [fold(tensor, dim) for tensor, dim in zip(inputs[:8], in_dims[:8], strict=True)]
        grads = _AttentionBackward.apply(*folded, *inputs[8:])  # type: ignore[no-untyped-call]
        whole = [grad.unflatten(0, (info.batch_size, batch)) for grad in grads]
        if inputs[16] and _batch_of(inputs[7], in_dims[7]) == 1:
            whole[3] = whole[3].sum(1, keepdim=True)
        return tuple(whole), (0,) * len(whole)


for _function in (_Attention, _AttentionBackward):
    # torch asks for the signature in every call, and working it out takes longer than the kernel of a small problem.
    vars(_function)["forward"].__func__.__signature__ = inspect.signature(_function.forward)


def _folds(in_dims: _Dims, dropout_p: float) -> bool:
    """Whether a vmapped call is one call with a larger batch.

    Not with dropout, whose draws depend on the place in the batch, nor where the edges are mapped over.
    """
    return dropout_p == 0.0 and all(dim is None for dim in in_dims)


def _batch_of(tensor: Tensor, dim: int | None) -> int:
    return tensor.shape[0] if dim is None else tensor.movedim(dim, 0).shape[1]


def _fold(tensor: Tensor | None, dim: int | None, size: int, batch: int) -> Tensor | None:
    """(B or 1, ...) mapped over ``dim`` (or not mapped) as (size * B, ...)."""
    if tensor is None:
        return None
    mapped = tensor.unsqueeze(0) if dim is None else tensor.movedim(dim, 0)
    return mapped.expand(size, batch, *mapped.shape[2:]).flatten(0, 1)


def _one_by_one(
    function: Callable[..., tuple[Tensor, ...]], size: int, in_dims: _Dims, args: tuple[Any, ...]
) -> tuple[tuple[Tensor, ...], tuple[int, ...]]:
    samples = [
        function(*(arg if dim is None else arg.select(dim, i) for arg, dim in zip(args, in_dims, strict=True)))
        for i in range(size)
    ]
    outputs = tuple(torch.stack(parts) for parts in zip(*samples, strict=True))
    return outputs, (0,) * len(outputs)


def _nested_grads() -> int:
    """How many torch.func.grad (or vjp, jacrev) calls surround the code that runs or is being traced."""
    stack = torch._C._functorch.get_interpreter_stack() or []
    return sum(layer.key() == torch._C._functorch.TransformType.Grad for layer in stack)


# What `torch.compiler.assume_constant_result` sets, which would import the whole compiler.
_nested_grads._dynamo_marked_constant = True  # type: ignore[attr-defined]


def needs_autograd(*tensors: Tensor | None) -> bool:
    """Whether a derivative of some kind may be asked of a call with these inputs."""
    return (
        (torch.is_grad_enabled() and any(tensor is not None and tensor.requires_grad for tensor in tensors))
        or torch.compiler.is_compiling()
        or torch._C._are_functorch_transforms_active()
        or forward_ad._current_level >= 0
    )


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    edges: EdgeSource,
    *,
    key_mask: Tensor | None = None,
    bias: Tensor | None = None,
    seed: Tensor | None = None,
    dropout_p: float = 0.0,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """``softmax(scale * q k^T + bias)`` over the edges, times v; the operators with their derivatives.

    Args:
        q: (B, H, N, D), any strides.
        k: (B, Hkv, S, D), Hkv a divisor of H.
        v: (B, Hkv, S, Dv).
        edges: the mask.
        key_mask: (B, S) bool, True = keep.
        bias: (B or 1, H or 1, N or 1, S or 1) in the dtype of q; an edge with bias -inf is not kept.
        seed: int64 scalar, needed with dropout.
        dropout_p: probability that a weight is dropped.
        scale: factor of the scores.

    Returns:
        out (B, H, N, Dv) and lse (B, H, N), float64 (on MPS, which has none, float32); lse carries no gradient. A
        row without a key gives 0 and -inf.
    """
    spec, row_ptr, col, background = edges
    if needs_autograd(q, k, v, bias):
        if torch.compiler.is_compiling():
            if _nested_grads() > 1:
                raise NotImplementedError(
                    "torch.compile would drop the second derivative of attention; "
                    "leave nested torch.func.grad calls out of the compiled function"
                )
            # Dynamo takes an input of torch.func.grad for a constant, and its gradient for zero, until an
            # operator has touched it.
            q, k, v = q.view_as(q), k.view_as(k), v.view_as(v)
            bias = None if bias is None else bias.view_as(bias)
        result: tuple[Tensor, Tensor] = _Attention.apply(  # type: ignore[no-untyped-call]
            q,
            k,
            v,
            key_mask,
            bias,
            seed,
            row_ptr,
            col,
            _ops.chosen_engine.default(),
            spec,
            background,
            dropout_p,
            scale,
        )
        return result
    return _Attention.forward(q, k, v, key_mask, bias, seed, row_ptr, col, None, spec, background, dropout_p, scale)
