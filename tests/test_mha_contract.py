"""`SparseMHSA` without sparsity is `torch.nn.MultiheadAttention`: outputs, weights, gradients, over all arguments."""

import math
import re
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn

from comparison import assert_same
from sparse_mhsa.module import SparseMHSA


@dataclass
class Call:
    """One way to build and call the layer."""

    layer: dict[str, Any]
    shapes: list[tuple[int, ...]]
    same: str
    """Which of query, key and value are one tensor."""
    masks: dict[str, torch.Tensor]
    options: dict[str, bool]


def _mask(draw, shape, dtype):
    """A mask that leaves every query its first key."""
    keep = torch.rand(shape) < draw(st.sampled_from([0.3, 0.7, 1.0]))
    keep[..., 0] = True
    if dtype == torch.bool:
        return ~keep
    return torch.randn(shape, dtype=dtype).masked_fill(~keep, -math.inf)


@st.composite
def calls(draw):
    torch.manual_seed(draw(st.integers(0, 2**16)))
    flag = st.booleans()
    heads, head_dim = draw(st.integers(1, 4)), draw(st.integers(1, 5))
    dim = heads * head_dim
    same = draw(st.sampled_from(["all", "key and value", "query and key", "none"]))
    kdim = vdim = dim
    if same in ("key and value", "none"):
        kdim = draw(st.sampled_from([dim, 3]))
        vdim = kdim if same == "key and value" else draw(st.sampled_from([dim, 5]))
    batch, queries = draw(st.integers(1, 3)), draw(st.integers(1, 6))
    keys = queries if same in ("all", "query and key") else draw(st.integers(1, 6))
    batched, batch_first = draw(flag), draw(flag)

    def shape(tokens, features):
        if not batched:
            return (tokens, features)
        return (batch, tokens, features) if batch_first else (tokens, batch, features)

    dtype = draw(st.sampled_from([torch.bool, torch.float64]))
    masks = {}
    if draw(flag):
        of_heads = ((batch if batched else 1) * heads,) if draw(flag) else ()
        masks["attn_mask"] = _mask(draw, (*of_heads, queries, keys), dtype)
    if draw(flag):
        masks["key_padding_mask"] = _mask(draw, (batch, keys) if batched else (keys,), dtype)
    options = {"need_weights": draw(flag), "average_attn_weights": draw(flag)}
    if "attn_mask" in masks and draw(flag):
        causal = torch.full((queries, keys), -math.inf, dtype=torch.float64).triu(1)
        masks["attn_mask"] = causal.isinf() if dtype == torch.bool else causal
        options["is_causal"] = True
    layer = {
        "embed_dim": dim,
        "num_heads": heads,
        "kdim": kdim,
        "vdim": vdim,
        "batch_first": batch_first,
        **{name: draw(flag) for name in ("bias", "add_bias_kv", "add_zero_attn")},
    }
    return Call(layer, [shape(queries, dim), shape(keys, kdim), shape(keys, vdim)], same, masks, options)


def _results(layer, call, inputs):
    """Output, weights, and gradients of inputs, float masks and parameters."""
    leaves = {name: x.clone().requires_grad_() for name, x in inputs.items()}
    query = leaves["query"]
    key = query if call.same in ("all", "query and key") else leaves["key"]
    value = {"all": query, "key and value": key}.get(call.same, leaves["value"])
    masks = {name: m.clone().requires_grad_(m.is_floating_point()) for name, m in call.masks.items()}
    out, weights = layer(query, key, value, **masks, **call.options)
    loss = out.square().sum() + (0 if weights is None else (weights * weights.detach().cos()).sum())
    wanted = {**leaves, **masks, **dict(layer.named_parameters())}
    wanted = {name: leaf for name, leaf in wanted.items() if leaf.requires_grad}
    grads = torch.autograd.grad(loss, list(wanted.values()), allow_unused=True)
    return out.detach(), None if weights is None else weights.detach(), dict(zip(wanted, grads, strict=True))


@settings(
    max_examples=80, deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture]
)
@given(call=calls())
@pytest.mark.parametrize("config", [None, "mask: none"])
def test_outputs_weights_and_gradients_are_those_of_the_parent(config, call):
    dense = nn.MultiheadAttention(dtype=torch.float64, **call.layer)
    with torch.no_grad():
        for parameter in dense.parameters():
            parameter.copy_(torch.randn_like(parameter) / 2)
    sparse = SparseMHSA.from_dense(dense, config)
    inputs = {
        name: torch.randn(shape, dtype=torch.float64)
        for name, shape in zip(("query", "key", "value"), call.shapes, strict=True)
    }
    out, weights, grads = _results(dense, call, inputs)
    mine, my_weights, my_grads = _results(sparse, call, inputs)
    assert_same(mine, out, atol=1e-11, what="out")
    assert (my_weights is None) == (weights is None)
    if weights is not None:
        assert_same(my_weights, weights, atol=1e-11, what="weights")
    for name, grad in grads.items():
        got = my_grads[name]
        if grad is None or got is None:
            # What is unused in one may have a gradient of zero in the other.
            assert all(g is None or not g.any() for g in (grad, got)), name
        else:
            assert_same(got, grad.masked_fill(grad.isnan(), 0.0), atol=1e-10, what=f"gradient of {name}")
    # The same without autograd, where dense attention takes other paths.
    with torch.no_grad():
        key = inputs["query"] if call.same in ("all", "query and key") else inputs["key"]
        value = {"all": inputs["query"], "key and value": key}.get(call.same, inputs["value"])
        for layer in (dense, sparse):
            layer.eval()
        expected = dense(inputs["query"], key, value, **call.masks, **call.options)[0]
        got = sparse(inputs["query"], key, value, **call.masks, **call.options)[0]
        assert_same(got, expected, atol=1e-11, what="out in evaluation")


@st.composite
def broken_calls(draw):
    """A call with one or two things about it that may be wrong."""
    call = draw(calls())
    for _ in range(draw(st.integers(1, 2))):
        what = draw(st.sampled_from(["size", "dimension", "mask", "type of mask", "hint"]))
        if what in ("size", "dimension"):
            which = draw(st.integers(0, 2))
            call.shapes[which] = _resized(draw, call.shapes[which], what == "dimension")
        elif what == "hint":
            call.options["is_causal"] = True
        elif call.masks:
            name = draw(st.sampled_from(sorted(call.masks)))
            mask = call.masks[name]
            if what == "mask":
                mask = torch.zeros(_resized(draw, mask.shape, draw(st.booleans())), dtype=mask.dtype)
            else:
                mask = torch.zeros(mask.shape, dtype=draw(st.sampled_from([torch.int64, torch.uint8])))
            call.masks[name] = mask
    return call


def _resized(draw, shape, dimension):
    shape = list(shape)
    index = draw(st.integers(0, len(shape) - 1))
    if not dimension:
        shape[index] = max(0, shape[index] + draw(st.sampled_from([-1, 1, 2])))
    elif draw(st.booleans()) and len(shape) > 2:
        del shape[index]
    else:
        shape.insert(index, 2)
    return tuple(shape)


def _refusal(layer, call):
    """The error of a call, or None."""
    inputs = [torch.zeros(shape, dtype=torch.float64) for shape in call.shapes]
    key = inputs[0] if call.same in ("all", "query and key") else inputs[1]
    value = {"all": inputs[0], "key and value": key}.get(call.same, inputs[2])
    try:
        layer(inputs[0], key, value, **call.masks, **call.options)
    except (AssertionError, RuntimeError) as error:
        return error
    return None


OPERATORS = "shapes cannot be multiplied|is invalid for input of size|Sizes of tensors must match"
"""What operators inside the parent say where it has no words of its own."""


@pytest.mark.filterwarnings("ignore:Support for mismatched")
@settings(
    max_examples=300, deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture]
)
@given(call=broken_calls())
def test_what_the_parent_refuses_is_refused_with_its_type_and_its_words(call):
    dense = nn.MultiheadAttention(dtype=torch.float64, **call.layer)
    theirs, ours = _refusal(dense, call), _refusal(SparseMHSA.from_dense(dense, "mask: none"), call)
    assert type(ours) is type(theirs), (theirs, ours)
    if theirs is None:
        return
    if re.search(OPERATORS, str(theirs)):
        assert re.fullmatch(r"key: expected (batch size \d+ like query|embedding dimension \d+), got \d+", str(ours))
        return
    words = [str(theirs), str(ours)]
    if len(call.shapes[0]) == 2 or dense.batch_first or dense.bias_k is not None or dense.add_zero_attn:
        # The parent shows shapes in its own layout, and with the keys that it appends.
        words = [re.sub(r"\d+(, \d+)*", "N", text) for text in words]
    assert words[1] == words[0]
