"""torch's own transformer layers around `SparseMHSA`: they compute what they compute with the mask given to dense
attention, in training and evaluation, padded or not."""

import copy
import math

import pytest
import torch
from torch import nn

import sparse_mhsa as sm
from comparison import assert_same
from sparse_mhsa.module import SparseMHSA

LOCAL = {"mask": "local", "mask_kwargs": {"window": 1}}
SIZES = {"d_model": 12, "nhead": 2, "dim_feedforward": 16, "dropout": 0.0, "dtype": torch.float64}
# torch warns of dense encoders that it cannot make nested; what matters here is what they compute.
pytestmark = pytest.mark.filterwarnings("ignore:enable_nested_tensor is True:UserWarning")


def rand(*shape):
    return torch.randn(shape, dtype=torch.float64)


def dropped(num_tokens, batch, *, causal=False):
    """(B * H, N, N) bool, True = drop, of LOCAL."""
    drop = ~sm.masks.local(num_tokens=num_tokens, num_heads=2, window=1).to_dense()
    if causal:
        drop = drop | torch.ones(num_tokens, num_tokens, dtype=torch.bool).triu(1)
    return drop.repeat(batch, 1, 1)


def padding(batch, num_tokens):
    """(B, N) bool: the last sample is two tokens shorter."""
    padded = torch.zeros(batch, num_tokens, dtype=torch.bool)
    padded[-1, -2:] = True
    return padded


def assert_same_results(sparse, dense, call, *, training, kept=...):
    """Outputs and parameter gradients of two models; ``call(model, which)`` runs one of them."""
    for model in (sparse, dense):
        model.train(training)
    outs = [call(model, model is dense)[kept] for model in (sparse, dense)]
    assert_same(outs[0].detach(), outs[1].detach(), atol=1e-11, what="out")
    grads = [
        torch.autograd.grad(out.square().sum(), list(m.parameters()))
        for out, m in zip(outs, (sparse, dense), strict=True)
    ]
    for mine, theirs in zip(*grads, strict=True):
        assert_same(mine, theirs, atol=1e-9, what="gradient")
    with torch.no_grad():
        assert_same(call(sparse, False)[kept], outs[1].detach(), atol=1e-11, what="out without autograd")


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("norm_first", [False, True])
@pytest.mark.parametrize("batch_first", [False, True])
def test_an_encoder(training, padded, norm_first, batch_first):
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(**SIZES, batch_first=batch_first, norm_first=norm_first)
    dense = nn.TransformerEncoder(layer, 2)
    sparse = copy.deepcopy(dense)
    sm.sparsify(sparse, LOCAL)
    x = rand(3, 7, 12)
    pad = padding(3, 7) if padded else None

    def call(model, masked):
        given = x if batch_first else x.transpose(0, 1)
        out = model(given, mask=dropped(7, 3) if masked else None, src_key_padding_mask=pad)
        return out if batch_first else out.transpose(0, 1)

    # A row of the mask that padding empties is NaN in dense attention: compare the tokens that are there.
    kept = ~pad if padded else ...
    if padded:
        sparse_out, dense_out = call(sparse.train(), False), call(dense.train(), True)
        assert_same(sparse_out[kept].detach(), dense_out[kept].detach(), atol=1e-11)
        with torch.no_grad():
            assert_same(call(sparse.train(training), False)[kept], dense_out[kept].detach(), atol=1e-11)
        loss = sparse_out[kept].square().sum()
        assert all(torch.isfinite(g).all() for g in torch.autograd.grad(loss, list(sparse.parameters())))
    else:
        assert_same_results(sparse, dense, call, training=training)


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("causal_hint", [False, True])
def test_a_whole_transformer(training, causal_hint):
    torch.manual_seed(0)
    sizes = {**SIZES, "num_encoder_layers": 2, "num_decoder_layers": 2}
    dense = nn.Transformer(**sizes, batch_first=True)
    sparse = copy.deepcopy(dense)
    report = sm.sparsify(sparse, LOCAL, include="self_attn")
    assert len(report.swapped) == 4
    src, tgt = rand(2, 7, 12), rand(2, 5, 12)
    causal = nn.Transformer.generate_square_subsequent_mask(5, dtype=torch.float64)

    def call(model, masked):
        masks = {"tgt_mask": causal, "tgt_is_causal": causal_hint}
        if masked:
            local = torch.zeros(4, 5, 5, dtype=torch.float64).masked_fill(dropped(5, 2, causal=True), -math.inf)
            masks = {"src_mask": dropped(7, 2), "tgt_mask": local}
        return model(src, tgt, **masks)

    assert_same_results(sparse, dense, call, training=training)


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("unbatched", [False, True])
def test_a_decoder_layer_with_every_mask(training, unbatched):
    torch.manual_seed(0)
    dense = nn.TransformerDecoderLayer(**SIZES, batch_first=True)
    sparse = copy.deepcopy(dense)
    sm.sparsify(sparse, LOCAL, include=r"^self_attn")
    sm.sparsify(sparse, "mask: none", include="multihead_attn")
    assert all(type(m) is SparseMHSA for m in (sparse.self_attn, sparse.multihead_attn))
    tgt, memory = rand(2, 5, 12), rand(2, 8, 12)
    pads = {"tgt_key_padding_mask": padding(2, 5), "memory_key_padding_mask": padding(2, 8)}
    if unbatched:
        tgt, memory, pads = tgt[0], memory[0], {name: pad[0] for name, pad in pads.items()}

    def call(model, masked):
        of_memory = torch.zeros(5, 8, dtype=torch.bool)
        of_memory[:, 3] = True
        mask = dropped(5, 1 if unbatched else 2)
        return model(tgt, memory, tgt_mask=mask if masked else None, memory_mask=of_memory, **pads)

    kept = ... if unbatched else ~pads["tgt_key_padding_mask"]
    if unbatched:
        assert_same_results(sparse, dense, call, training=training)
    else:
        assert_same(call(sparse.train(training), False)[kept].detach(), call(dense, True)[kept].detach(), atol=1e-11)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("need_weights", [False, True])
@pytest.mark.parametrize("training", [False, True])
def test_autocast_gives_the_types_of_the_parent(dtype, need_weights, training):
    dense = nn.MultiheadAttention(16, 2, batch_first=True).train(training)
    sparse = SparseMHSA.from_dense(dense, None)
    x = torch.randn(2, 5, 16)
    with torch.autocast("cpu", dtype=dtype):
        (out, weights), (mine, my_weights) = (layer(x, x, x, need_weights=need_weights) for layer in (dense, sparse))
    assert mine.dtype == out.dtype == dtype
    assert_same(mine.float(), out.float(), atol=2e-2)
    if need_weights:
        assert my_weights.dtype == weights.dtype
        assert_same(my_weights.float(), weights.float(), atol=1e-2)


class TestWhatOthersReadOrCall:
    """Methods and attributes of the parent beyond `forward`."""

    def test_merge_masks(self):
        dense = nn.MultiheadAttention(12, 3, batch_first=True)
        sparse = SparseMHSA.from_dense(dense, LOCAL)
        query, drop, pad = torch.randn(2, 5, 12), torch.rand(5, 5) < 0.5, padding(2, 5)
        for masks in ((None, None), (drop, None), (None, pad), (drop, pad)):
            expected, got = dense.merge_masks(*masks, query), sparse.merge_masks(*masks, query)
            assert expected[1] == got[1]
            assert expected[0] is got[0] is None or torch.equal(expected[0], got[0])

    @pytest.mark.parametrize("kwargs", [{}, {"kdim": 5, "vdim": 7}, {"add_bias_kv": True}, {"bias": False}])
    def test_reset_parameters_draws_what_the_parent_draws(self, kwargs):
        layers = nn.MultiheadAttention(12, 3, **kwargs), SparseMHSA(12, 3, config=LOCAL, **kwargs)
        for layer in layers:
            torch.manual_seed(3)
            layer._reset_parameters()
        state = dict(layers[0].named_parameters())
        for name, parameter in layers[1].named_parameters():
            if not name.startswith("out_proj.weight"):  # which the parent does not draw again
                assert torch.equal(parameter, state[name])

    def test_old_pickles_of_the_parent_lack_an_attribute(self):
        layer = SparseMHSA(12, 3, config=LOCAL)
        state = layer.__getstate__()
        del state["_qkv_same_embed_dim"]
        twin = SparseMHSA.__new__(SparseMHSA)
        twin.__setstate__(state)
        assert twin._qkv_same_embed_dim
        assert twin.layer_mask == layer.layer_mask

    @pytest.mark.parametrize("kwargs", [{}, {"kdim": 5, "vdim": 7, "add_bias_kv": True}, {"add_zero_attn": True}])
    def test_attributes(self, kwargs):
        dense, sparse = nn.MultiheadAttention(12, 3, 0.25, **kwargs), SparseMHSA(12, 3, 0.25, config=LOCAL, **kwargs)
        plain = (int, float, bool, type(None))
        names = [name for name, value in vars(dense).items() if isinstance(value, plain)]
        assert {"embed_dim", "kdim", "vdim", "_qkv_same_embed_dim", "num_heads", "dropout", "batch_first"} <= {*names}
        assert {name: getattr(sparse, name) for name in names} == {name: getattr(dense, name) for name in names}
        assert sparse._parameters.keys() == dense._parameters.keys()
        assert type(sparse.out_proj) is type(dense.out_proj)
        assert sparse.__constants__ == dense.__constants__

    def test_a_projection_bias_of_another_precision(self):
        sparse = SparseMHSA(4, 4, batch_first=True, dtype=torch.float64)
        sparse.in_proj_bias = nn.Parameter(torch.randn(12).half())
        x = rand(2, 4, 4)
        exact = SparseMHSA(4, 4, batch_first=True, dtype=torch.float64)
        exact.load_state_dict(sparse.state_dict())
        assert_same(sparse(x, x, x)[0].detach(), exact(x, x, x)[0].detach(), atol=1e-12)

    @pytest.mark.filterwarnings("ignore:.*torch.jit.script:DeprecationWarning")
    def test_torchscript_is_refused_by_name(self):
        model = nn.Sequential(nn.Linear(12, 12))
        model.attention = SparseMHSA(12, 3, config=LOCAL)
        with pytest.raises(RuntimeError, match=r"SparseMHSA cannot be compiled by torch.jit.script.*torch.compile"):
            torch.jit.script(model)

    @pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
    def test_a_padded_encoder_compiles_whole(self):
        torch._dynamo.reset()
        layer = nn.TransformerEncoderLayer(**SIZES, batch_first=True)
        model = nn.TransformerEncoder(layer, 1, enable_nested_tensor=False).eval()
        sm.sparsify(model, LOCAL)
        x, pad = rand(2, 7, 12), padding(2, 7)
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
        out = compiled(x, src_key_padding_mask=pad)
        assert_same(out.detach(), model(x, src_key_padding_mask=pad).detach(), atol=1e-12)
        torch._dynamo.reset()
