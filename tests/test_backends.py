"""Backends with attention of their own: definitions, golden data, the module around them, and those of users."""

import copy
import inspect
import itertools
import json
import pickle
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import sparse_mhsa as sm
from comparison import assert_as_good_as_dense
from sparse_mhsa import backends
from sparse_mhsa.backends import Efficient, EfficientLocal, Linformer, Place
from sparse_mhsa.flops import attention_cost

GOLDEN = Path(__file__).parent / "golden"
CONFIGS = {
    "efficient": {"backend": "efficient"},
    "efficient_local": {"backend": "efficient_local", "backend_kwargs": {"block_size": 3}},
    "blockwise": {"backend": "efficient_local", "backend_kwargs": {"block_size": 3, "normalize": "blockwise"}},
    "linformer": {"backend": "linformer", "backend_kwargs": {"projector": {"max_seq_len": 20, "r": 4}}},
    "linformer_per_head": {
        "backend": "linformer",
        "backend_kwargs": {
            "projector": {"max_seq_len": 21, "r": 3, "shared_heads": False, "share_kv": False, "separate_cls": False}
        },
    },
}
HEADS, DIM = 3, 24


def module(name="linformer", **kwargs):
    return sm.SparseMHSA(DIM, HEADS, batch_first=True, config=CONFIGS[name], **{"dtype": torch.float64} | kwargs)


def backend_of(name):
    return module(name).backend


def qkv(tokens, dtype=torch.float64, width=8):
    return [torch.randn(2, HEADS, tokens, width, dtype=dtype) for _ in range(3)]


@cache
def archive(name):
    with np.load(GOLDEN / name) as data:
        return {key: torch.from_numpy(data[key]) for key in data.files}


GOLDEN_CASES = [
    case
    for case in json.loads((GOLDEN / "outputs.json").read_text())["cases"]
    if case.get("backend") in ("efficient", "efficient_local", "linformer")
]


@pytest.mark.parametrize("case", GOLDEN_CASES, ids=[c["id"] for c in GOLDEN_CASES])
def test_golden_outputs_and_gradients(case):
    arrays = archive(case["file"])
    names = {key: arrays[value] for key, value in case["inputs"].items()}
    config = {"backend": case["backend"], "backend_kwargs": case["backend_kwargs"]}
    projections = {key: arrays[case["arrays"][key]] for key in ("E_k", "E_v") if key in case["arrays"]}
    if case["id"].startswith("module"):
        check_golden_module(case, config, names, projections)
        return
    # The published backends scale nothing, except where the case says that q was scaled before.
    config["scale"] = 8**-0.5 if "multiplied" in case["scaling"] else 1.0
    layer = sm.SparseMHSA(DIM, HEADS, dtype=torch.float64, config=config).backend
    layer.load_state_dict(projections)
    leaves = [names[key].clone().requires_grad_() for key in ("q", "k", "v")]
    out, weights = layer.attend(*leaves, needs_weights=True)
    torch.testing.assert_close(out, arrays[case["arrays"]["out"]], rtol=0, atol=1e-9)
    torch.testing.assert_close(weights @ leaves[2], out, rtol=0, atol=1e-9)
    wanted = {**dict(zip(("dq", "dk", "dv"), leaves, strict=True)), **{f"d{k}": v for k, v in layer.named_parameters()}}
    for name, leaf in wanted.items():
        if name in case["arrays"]:
            (grad,) = torch.autograd.grad(out, leaf, names["g"], retain_graph=True)
            torch.testing.assert_close(grad, arrays[case["arrays"][name]], rtol=0, atol=1e-9)


def check_golden_module(case, config, weights, projections):
    for scaling, scale in (("out_scale_off", 1.0), ("out_scale_on", 8**-0.5)):
        layer = sm.SparseMHSA(DIM, HEADS, batch_first=True, dtype=torch.float64, config=config | {"scale": scale})
        layer.load_state_dict(
            {
                "in_proj_weight": weights["qkv.weight"],
                "in_proj_bias": weights["qkv.bias"],
                "out_proj.weight": weights["proj.weight"],
                "out_proj.bias": weights["proj.bias"],
                **{f"backend.{name}": value for name, value in projections.items()},
            }
        )
        out, _ = layer(weights["x"], weights["x"], weights["x"], need_weights=False)
        expected = archive(case["file"])[case["arrays"][scaling]]
        torch.testing.assert_close(out, expected, rtol=0, atol=1e-9)


def test_no_golden_case_is_left_out():
    assert len(GOLDEN_CASES) == 31


# Independent definitions, written as matrices of weights.


def efficient_weights(q, k):
    return q.softmax(-1) @ k.softmax(-2).transpose(-2, -1)


def efficient_local_weights(q, k, size, num_global, blockwise):
    tokens = q.shape[2]
    weights = torch.zeros(*q.shape[:2], tokens, tokens, dtype=q.dtype)
    weights[:, :, :num_global] = efficient_weights(q, k)[:, :, :num_global]
    normalised = k[:, :, num_global:].softmax(-2)
    for start in range(num_global, tokens, size):
        block = slice(start, min(start + size, tokens))
        inside = slice(block.start - num_global, block.stop - num_global)
        keys = k[:, :, block].softmax(-2) if blockwise else normalised[:, :, inside]
        weights[:, :, block, block] = q[:, :, block].softmax(-1) @ keys.transpose(-2, -1)
    return weights


@pytest.mark.parametrize("num_global", [0, 1, 3])
@pytest.mark.parametrize("normalize", ["reference", "blockwise"])
def test_efficient_local_is_its_definition_for_every_remainder(num_global, normalize):
    for tokens, size in itertools.product(range(1, 15), (1, 3, 9, 50)):
        layer = EfficientLocal(Place(HEADS, 8, num_global), block_size=size, normalize=normalize)
        q, k, v = qkv(tokens)
        expected = efficient_local_weights(q, k, size, min(num_global, tokens), normalize == "blockwise")
        out, weights = layer.attend(q, k, v, needs_weights=True)
        torch.testing.assert_close(weights, expected, rtol=1e-12, atol=1e-14)
        torch.testing.assert_close(out, expected @ v, rtol=1e-12, atol=1e-14)
        if normalize == "blockwise":
            torch.testing.assert_close(weights.sum(-1), torch.ones(2, HEADS, tokens, dtype=torch.float64))


@pytest.mark.parametrize("prefix", [0, 1, 3])
@pytest.mark.parametrize("name", ["linformer", "linformer_per_head"])
def test_linformer_is_softmax_over_projected_keys(name, prefix):
    config = CONFIGS[name] | {"num_prefix_tokens": prefix}
    layer = sm.SparseMHSA(DIM, HEADS, dtype=torch.float64, config=config).backend
    q, k, v = qkv(16)
    e_k, e_v = layer.E_k, layer.E_k if layer.E_v is None else layer.E_v
    kept = prefix if name == "linformer" else 0

    def shorten(x, e):
        e = e.expand(HEADS, -1, -1)[:, : 16 - kept]
        return torch.cat([x[:, :, :kept], torch.einsum("hnr,bhnd->bhrd", e, x[:, :, kept:])], 2)

    expected = (q @ shorten(k, e_k).transpose(-2, -1) / 8**0.5).softmax(-1) @ shorten(v, e_v)
    torch.testing.assert_close(layer.attend(q, k, v)[0], expected, rtol=1e-12, atol=1e-14)
    rows = {"linformer": 20, "linformer_per_head": 21}[name] - prefix
    assert e_k.shape[-2] == rows


@pytest.mark.parametrize("name", CONFIGS)
def test_derivatives_of_first_and_second_order_are_right(name):
    layer = backend_of(name)
    leaves = [x[:1, :, :, :2].clone().requires_grad_() for x in qkv(5)]

    def run(q, k, v, *_):
        return layer.attend(q, k, v)[0]

    inputs = (*leaves, *layer.parameters())
    assert torch.autograd.gradcheck(run, inputs, fast_mode=True)
    assert torch.autograd.gradgradcheck(run, inputs, fast_mode=True, atol=1e-4)


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@torch.no_grad()
def test_low_precision_errs_as_little_as_the_same_formula_in_plain_torch(name, dtype):
    layer = backend_of(name)
    exact = [x.to(dtype).double() for x in qkv(19)]
    low = copy.deepcopy(layer).to(dtype)
    layer.load_state_dict(low.state_dict())
    reference = layer.attend(*exact)[0]
    got = low.attend(*(x.to(dtype) for x in exact))[0]
    base = weights_of(name, low, *(x.to(dtype) for x in exact[:2])) @ exact[2].to(dtype)
    assert got.dtype == dtype
    assert_as_good_as_dense(got, base, reference, factor=2, what=name)


def weights_of(name, layer, q, k):
    if name == "efficient":
        return efficient_weights(q, k)
    if name in ("efficient_local", "blockwise"):
        return efficient_local_weights(q, k, 3, 1, name == "blockwise")
    kept = 1 if name == "linformer" else 0
    e = layer.E_k.expand(HEADS, -1, -1)[:, : 19 - kept]
    short = torch.cat([k[:, :, :kept], e.transpose(-2, -1) @ k[:, :, kept:]], 2)
    weights = (q @ short.transpose(-2, -1) * 8**-0.5).softmax(-1)
    e = (layer.E_k if layer.E_v is None else layer.E_v).expand(HEADS, -1, -1)[:, : 19 - kept]
    return torch.cat([weights[..., :kept], weights[..., kept:] @ e.transpose(-2, -1)], -1)


# Through the module.


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("padding", [torch.bool, torch.float64])
def test_padded_keys_count_as_if_the_sequence_were_shorter(name, padding):
    layer = module(name)
    x = torch.randn(2, 16, DIM, dtype=torch.float64)
    x[:, 11:] = torch.nan
    drop = torch.arange(16).expand(2, -1) >= 11
    if padding != torch.bool:
        drop = torch.zeros(2, 16, dtype=padding).masked_fill(drop, -torch.inf)
    out, weights = layer(x, x, x, key_padding_mask=drop)
    short, short_weights = layer(x[:, :11], x[:, :11], x[:, :11])
    torch.testing.assert_close(out[:, :11], short, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(weights[:, :11, :11], short_weights, rtol=1e-12, atol=1e-12)
    assert torch.equal(weights[:, :11, 11:], torch.zeros(2, 11, 5, dtype=torch.float64))


@pytest.mark.parametrize("name", CONFIGS)
def test_a_sample_without_keys_gives_zero_and_finite_gradients(name):
    layer = backend_of(name)
    leaves = [x.requires_grad_() for x in qkv(9)]
    keep = torch.ones(2, 9, dtype=torch.bool)
    keep[1] = False
    out, _ = layer.attend(*leaves, key_mask=keep)
    assert torch.equal(out[1], torch.zeros_like(out[1]))
    assert all(torch.isfinite(grad).all() for grad in torch.autograd.grad(out.sum(), leaves))


@pytest.mark.parametrize("name", CONFIGS)
def test_weights_are_those_that_made_the_output_also_with_dropout(name):
    dropout = 0.5 if name.startswith("linformer") else 0.0
    layer = module(name, dropout=dropout).train()
    x = torch.randn(2, 13, DIM, dtype=torch.float64)
    out, weights = layer(x, x, x, average_attn_weights=False)
    v = layer._project(x, x, x, True)[2]
    torch.testing.assert_close(layer._merge(weights @ v, True), out)
    assert layer(x, x, x)[1].shape == (2, 13, 13)
    assert layer(x[0], x[0], x[0])[1].shape == (13, 13)


def test_linformer_drops_its_weights_in_training_only():
    layer = module("linformer", dropout=0.5)
    x = torch.randn(2, 13, DIM, dtype=torch.float64)
    assert not torch.equal(layer(x, x, x)[0], layer(x, x, x)[0])
    layer.eval()
    assert torch.equal(layer(x, x, x)[0], layer(x, x, x)[0])


@pytest.mark.parametrize("name", CONFIGS)
def test_what_cannot_be_honoured_is_an_error_that_names_it(name):
    layer, x = module(name), torch.randn(2, 9, DIM, dtype=torch.float64)
    causal = nn.Transformer.generate_square_subsequent_mask(9, dtype=torch.float64)
    with pytest.raises(ValueError, match="attn_mask: the backend"):
        layer(x, x, x, attn_mask=causal)
    with pytest.raises(ValueError, match="attn_mask: the backend"):
        layer(x, x, x, attn_mask=causal, is_causal=True, need_weights=False)
    with pytest.raises(ValueError, match=r"key_padding_mask: .* 0 and -inf only"):
        layer(x, x, x, key_padding_mask=torch.ones(2, 9, dtype=torch.float64))
    # One that would be broadcast too.
    for shape, message in (((1, 9), r"shape\[0\] to be 2, but got 1"), ((2, 8), r"shape\[1\] to be 9, but got 8")):
        with pytest.raises(AssertionError, match=rf"Expected key_padded_mask\.{message}"):
            layer(x, x, x, key_padding_mask=torch.zeros(shape, dtype=torch.bool))
    with pytest.raises(ValueError, match=r"key: the backend `.*` relates the tokens of one sequence"):
        layer(x, x[:, :5], x[:, :5])
    for option in ("add_bias_kv", "add_zero_attn"):
        with pytest.raises(sm.ConfigError, match=r"backend: .* add_bias_kv or add_zero_attn"):
            module(name, **{option: True})
    with pytest.raises(sm.ConfigError, match=r"backend: `.*` has no edges"):
        layer.mask(9)
    with pytest.raises(sm.ConfigError, match=r"backend: `.*` has no edges"):
        sm.Mask.from_config(CONFIGS[name], 9, HEADS)


@pytest.mark.parametrize("name", ["efficient", "efficient_local"])
def test_attention_without_weights_to_drop_refuses_dropout(name):
    with pytest.raises(ValueError, match="dropout: expected 0"):
        module(name, dropout=0.1)


def test_linformer_says_which_length_and_heads_it_is_for():
    layer, x = module("linformer"), torch.randn(1, 21, DIM, dtype=torch.float64)
    layer(x[:, :20], x[:, :20], x[:, :20])
    with pytest.raises(ValueError, match=r"21 tokens need backend_kwargs.projector.max_seq_len of at least 21, got 20"):
        layer(x, x, x)
    layer = module("linformer_per_head")
    with pytest.raises(ValueError, match=r"max_seq_len of at least 22, got 21"):
        layer(x, x, x)

    def heads(n):
        return {"backend": "linformer", "backend_kwargs": {"projector": {"max_seq_len": 20, "r": 4, "num_heads": n}}}

    sm.SparseMHSA(DIM, HEADS, config=heads(3))
    with pytest.raises(sm.ConfigError, match="num_heads: expected 3, the heads of the layer, or null; got 4") as raised:
        sm.SparseMHSA(DIM, HEADS, config=heads(4))
    assert raised.value.key == "backend_kwargs.projector.num_heads"


@pytest.mark.parametrize("name", CONFIGS)
def test_empty_and_tiny_sequences(name):
    layer = module(name)
    for tokens in (0, 1, 2):
        x = torch.randn(2, tokens, DIM, dtype=torch.float64)
        out, weights = layer(x, x, x)
        assert out.shape == (2, tokens, DIM)
        assert weights.shape == (2, tokens, tokens)
        assert torch.isfinite(out).all()


@pytest.mark.parametrize("name", ["linformer", "linformer_per_head"])
def test_projections_are_trained_saved_loaded_and_moved_with_the_layer(name):
    layer = module(name)
    names = {"backend.E_k"} | ({"backend.E_v"} if name == "linformer_per_head" else set())
    assert {key for key in layer.state_dict() if key.startswith("backend")} == names
    x = torch.randn(2, 16, DIM, dtype=torch.float64)
    optimiser = torch.optim.SGD(layer.parameters(), 0.1)
    before = layer.backend.E_k.detach().clone()
    layer(x, x, x)[0].square().sum().backward()
    optimiser.step()
    assert not torch.equal(before, layer.backend.E_k)
    other = module(name)
    other.load_state_dict(layer.state_dict(), strict=True)
    assert torch.equal(other(x, x, x)[0], layer(x, x, x)[0])
    with pytest.raises(RuntimeError, match=r"backend\.E_k"):
        other.load_state_dict(nn.MultiheadAttention(DIM, HEADS, dtype=torch.float64).state_dict(), strict=True)
    assert layer.float().backend.E_k.dtype == torch.float32
    assert layer.to("meta").backend.E_k.is_meta
    assert sm.SparseMHSA(DIM, HEADS, config=CONFIGS[name], device="meta").backend.E_k.is_meta


@pytest.mark.parametrize("name", CONFIGS)
def test_copies_and_pickles_compute_the_same(name):
    layer, x = module(name), torch.randn(2, 16, DIM, dtype=torch.float64)
    expected = layer(x, x, x)[0]
    for twin in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert torch.equal(twin(x, x, x)[0], expected)
        assert str(twin) == str(layer)


@pytest.mark.parametrize("name", CONFIGS)
def test_autocast_gives_what_dense_attention_gives(name):
    layer, x = module(name, dtype=torch.float32), torch.randn(2, 16, DIM)
    dense = nn.MultiheadAttention(DIM, HEADS, batch_first=True)
    exact = layer(x, x, x, need_weights=False)[0]
    with torch.autocast("cpu", torch.bfloat16):
        out = layer(x, x, x, need_weights=False)[0]
        assert out.dtype == dense(x, x, x, need_weights=False)[0].dtype
        out.float().sum().backward()
    assert (out - exact).abs().max() < 0.05
    assert all(parameter.grad.dtype == torch.float32 for parameter in layer.parameters())


@pytest.mark.parametrize("name", CONFIGS)
def test_the_whole_layer_compiles_without_a_graph_break(name):
    layer, x = module(name), torch.randn(2, 16, DIM, dtype=torch.float64)
    compiled = torch.compile(lambda x: layer(x, x, x, need_weights=False)[0], backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), layer(x, x, x)[0])


def test_the_same_backend_keeps_what_its_projections_have_learned():
    dense = nn.MultiheadAttention(DIM, HEADS, batch_first=True)
    layer = sm.SparseMHSA.from_dense(dense, CONFIGS["linformer"])
    assert layer.in_proj_weight is dense.in_proj_weight
    assert "backend" not in dict(dense.named_children())
    model = nn.Sequential(layer)
    learned = layer.backend.E_k
    sm.sparsify(model, CONFIGS["linformer"])
    assert layer.backend.E_k is learned
    sm.sparsify(model, CONFIGS["linformer"] | {"scale": 0.3})
    assert layer.backend.E_k is learned
    assert layer.backend.place.scale == 0.3
    sm.sparsify(model, CONFIGS["linformer"] | {"num_prefix_tokens": 2})
    assert layer.backend.E_k is not learned
    assert layer.backend.E_k.shape == (18, 4)


# Through whole models.


@pytest.mark.parametrize("name", CONFIGS)
def test_sparsify_and_densify_torch_layers(name):
    encoder = nn.TransformerEncoder(
        nn.TransformerEncoderLayer(DIM, HEADS, 32, dropout=0.0, batch_first=True), 2, enable_nested_tensor=False
    ).eval()
    x, before = torch.randn(2, 16, DIM), set(encoder.state_dict())
    padding = torch.arange(16).expand(2, -1) >= 12
    dense = encoder(x, src_key_padding_mask=padding)
    report = sm.sparsify(encoder, CONFIGS[name], verify=True, sample=x)
    assert [row.mask for row in report.swapped] == [CONFIGS[name]["backend"]] * 2
    out = encoder(x, src_key_padding_mask=padding)
    short = encoder(x[:, :12])
    torch.testing.assert_close(out[:, :12], short, rtol=1e-4, atol=1e-5)
    sm.densify(encoder)
    assert set(encoder.state_dict()) == before
    torch.testing.assert_close(encoder(x, src_key_padding_mask=padding), dense)


def tiny_vit(**kwargs):
    timm = pytest.importorskip("timm")
    return timm.create_model(
        "vit_tiny_patch16_224", img_size=32, patch_size=8, depth=2, embed_dim=DIM, num_heads=HEADS, **kwargs
    ).eval()


@pytest.mark.parametrize("name", CONFIGS)
def test_sparsify_and_densify_timm_models(name):
    model, x = tiny_vit(), torch.randn(2, 3, 32, 32)
    before, dense = model.state_dict(), model(x)
    sm.sparsify(model, CONFIGS[name], verify=True)
    out = model(x)
    assert not torch.allclose(out, dense)
    saved = model.state_dict()
    twin = tiny_vit()
    sm.sparsify(twin, CONFIGS[name])
    twin.load_state_dict(saved, strict=True)
    assert torch.equal(twin(x), out)
    copied = pickle.loads(pickle.dumps(model))
    assert torch.equal(copied(x), out)
    sm.densify(model)
    assert set(model.state_dict()) == set(before)
    torch.testing.assert_close(model(x), dense)


def test_timm_and_torch_compute_the_same_linformer():
    model = tiny_vit()
    sm.sparsify(model, CONFIGS["linformer"])
    attention = model.blocks[0].attn
    layer = module("linformer", dtype=torch.float32)
    layer.load_state_dict(
        {
            "in_proj_weight": attention.qkv.weight,
            "in_proj_bias": attention.qkv.bias,
            "out_proj.weight": attention.proj.weight,
            "out_proj.bias": attention.proj.bias,
            "backend.E_k": attention.backend.E_k,
        }
    )
    x = torch.randn(2, 17, DIM)
    torch.testing.assert_close(attention(x), layer(x, x, x)[0])


def test_a_model_is_left_alone_when_one_layer_cannot_take_the_backend():
    short = {"backend": "linformer", "backend_kwargs": {"projector": {"max_seq_len": 16, "r": 4}}}
    model = tiny_vit()
    with pytest.raises(sm.ConfigError, match=r"blocks.0.attn: query: 17 tokens need .*max_seq_len of at least 17"):
        sm.sparsify(model, short)
    assert "17 tokens" in str(sm.sparsify(model, short | {"layers": {r"\.1\.": CONFIGS["linformer"]}}, strict=False))
    assert [type(block.attn).__name__ for block in model.blocks] == ["Attention", "SparseAttention"]
    dropping = tiny_vit(attn_drop_rate=0.1)
    with pytest.raises(sm.ConfigError, match=r"blocks.0.attn: dropout: expected 0"):
        sm.sparsify(dropping, CONFIGS["efficient"])
    sm.sparsify(dropping, CONFIGS["linformer"])


def test_costs_of_linear_backends_are_counted_as_torch_counts_them():
    from torch.utils.flop_counter import FlopCounterMode

    for name, config in CONFIGS.items():
        model = tiny_vit()
        sm.sparsify(model, config)
        cost = attention_cost(model, 17)
        assert [layer.mask for layer in cost.layers] == [config["backend"]] * 2
        layer = model.blocks[0].attn.backend
        with FlopCounterMode(display=False) as counter:
            layer.attend(*qkv(17, torch.float32))
        counted = counter.get_total_flops() // (2 * 2)  # two samples; torch counts a multiply-accumulate as two
        if name in ("efficient_local", "blockwise"):  # torch also counts the last block's padding
            assert layer.macs(17) <= counted <= layer.macs(17 + 2)
        else:
            assert layer.macs(17) == counted, name
        assert cost.sparse("GMACs") == pytest.approx(2 * layer.macs(17) / 1e9)


# Users' own.


@pytest.fixture
def registered(monkeypatch):
    """Register backends for one test. The configuration loader keeps their names, so each test uses its own."""
    monkeypatch.setattr(backends, "_IMPLEMENTATIONS", dict(backends._IMPLEMENTATIONS))
    return sm.register_backend


def test_a_function_becomes_a_backend(registered):
    @registered("mean_of_values", replace=True)  # once for every engine
    def mean_of_values(q, k, v, *, key_mask=None, weight: float = 1.0):
        """Every query gets the mean of all values."""
        keep = torch.ones(v.shape[0], v.shape[2], dtype=torch.bool) if key_mask is None else key_mask
        keep = keep[:, None, :, None].to(v.dtype)
        return weight * ((v * keep).sum(-2, keepdim=True) / keep.sum(-2, keepdim=True)).expand_as(q)

    config = sm.load_config("backend: mean_of_values\nbackend_kwargs: {weight: 0.5}")
    layer = sm.SparseMHSA(DIM, HEADS, batch_first=True, config=config)
    x = torch.randn(2, 9, DIM)
    out = layer(x, x, x, need_weights=False)[0]
    v = x @ layer.in_proj_weight[2 * DIM :].T
    torch.testing.assert_close(out, layer.out_proj(0.5 * v.mean(1, keepdim=True)).expand_as(out))
    for twin in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert torch.equal(twin(x, x, x, need_weights=False)[0], out)
    with pytest.raises(ValueError, match="need_weights: the backend `mean_of_values` has no attention weights"):
        layer(x, x, x)
    with pytest.raises(sm.ConfigError, match="scale: the backend `mean_of_values` has none"):
        sm.SparseMHSA(DIM, HEADS, config="{backend: mean_of_values, scale: 0.5}")
    model = tiny_vit()
    sm.sparsify(model, {"mask": "none", "layers": {"blocks.1": {"backend": "mean_of_values"}}})
    assert model.blocks[1].attn.backend.name == "mean_of_values"
    assert model.blocks[0].attn.backend is None
    assert torch.isfinite(model(torch.randn(1, 3, 32, 32))).all()


def test_keywords_of_a_backend_are_checked_against_its_signature(registered):
    @registered("many_keywords")
    def many_keywords(q, k, v, width: int, *, mode: str | None = None, sizes: list[int] = (), ratio: float = 0.5):
        return v

    def load(**kwargs):
        return sm.load_config({"backend": "many_keywords", "backend_kwargs": kwargs})

    assert json.loads(load(width=1).to_json())["backend_kwargs"] == {
        "width": 1,
        "mode": None,
        "sizes": [],
        "ratio": 0.5,
    }
    assert load(width=1, ratio=2) == load(width=1, ratio=2, mode=None)
    for kwargs, message in [
        ({}, "backend_kwargs.width: missing"),
        ({"width": 1.5}, "backend_kwargs.width: expected integer, got a number"),
        ({"width": True}, "backend_kwargs.width: expected integer, got a boolean"),
        ({"width": 1, "mode": 3}, "backend_kwargs.mode: expected string or null, got a number"),
        ({"width": 1, "sizes": "a"}, "backend_kwargs.sizes: expected array, got a string"),
        ({"width": 1, "widht": 1}, "unknown key `widht`: did you mean `width`?"),
    ]:
        with pytest.raises(sm.ConfigError, match=message.replace("?", r"\?")):
            load(**kwargs)
    with pytest.raises(sm.ConfigError, match="cannot apply the mask `local`"):
        sm.load_config("backend: many_keywords\nbackend_kwargs: {width: 1}\nmask: local")
    with pytest.raises(sm.ConfigError, match="did you mean `many_keywords`"):
        sm.load_config("backend: many_keyword")


def test_a_class_becomes_a_backend_with_parameters_of_its_own(registered):
    @registered("gated_mean")
    class GatedMean(sm.Backend):
        """The mean of all values times a trained gate."""

        linear_in_values = True

        def __init__(self, place, *, start: float = 1.0):
            super().__init__(place)
            self.gate = nn.Parameter(torch.full((place.num_heads, 1, 1), start))

        def forward(self, q, k, v):
            return self.gate * v.mean(-2, keepdim=True).expand(*q.shape[:3], v.shape[3])

    layer = sm.SparseMHSA(DIM, HEADS, batch_first=True, config="{backend: gated_mean, backend_kwargs: {start: 0.0}}")
    x = torch.randn(2, 9, DIM)
    assert "backend.gate" in layer.state_dict()
    assert torch.equal(layer(x, x, x)[0], layer.out_proj.bias.expand(2, 9, DIM))
    torch.testing.assert_close(layer(x, x, x)[1], torch.zeros(2, 9, 9))
    with pytest.raises(ValueError, match="key_padding_mask: the backend `gated_mean` cannot honour it"):
        layer(x, x, x, key_padding_mask=torch.zeros(2, 9, dtype=torch.bool))
    with pytest.raises(ValueError, match="dropout: expected 0"):
        sm.SparseMHSA(DIM, HEADS, dropout=0.1, config="backend: gated_mean")


def test_malformed_registrations_are_refused(registered):
    def any_keywords(q, k, v, **kwargs):
        return v

    def default_without_yaml(q, k, v, thing=object()):  # noqa: B008
        return v

    for name, what, error, message in [
        ("efficient", lambda q, k, v: v, ValueError, "belongs to a built-in"),
        ("Mine", lambda q, k, v: v, ValueError, "lower-case"),
        ("wide", any_keywords, TypeError, "expected named keywords"),
        ("thing", default_without_yaml, TypeError, "the default of `thing` is no YAML"),
        ("short", lambda q, k: k, TypeError, "expected to be called with q, k, v"),
        ("no_backend", nn.Linear, TypeError, "subclass of Backend"),
    ]:
        with pytest.raises(error, match=message):
            registered(name)(what)
    registered("registered_twice", replace=True)(lambda q, k, v: v)
    with pytest.raises(ValueError, match="registered already"):
        registered("registered_twice")(lambda q, k, v: v)
    registered("registered_twice", replace=True)(lambda q, k, v: v)


def test_constructors_take_the_keywords_that_the_configuration_knows():
    for name, kind in (("efficient", Efficient), ("efficient_local", EfficientLocal), ("linformer", Linformer)):
        keywords = {key for key in inspect.signature(kind.__init__).parameters if key not in ("self", "place")}
        config = next(config for config in CONFIGS.values() if config["backend"] == name)
        assert set(json.loads(sm.load_config(config).to_json())["backend_kwargs"]) == keywords
