"""What can never work is refused when a layer is built or a model is swapped, not in the first forward pass."""

import itertools

import pytest
import torch
from torch import nn

import sparse_mhsa as sm

NEVER = [
    ({"mask": "per_head", "mask_kwargs": {"masks": [{"mask": "none", "heads": [0, 1, 9]}]}}, "heads"),
    ({"mask": "per_head", "mask_kwargs": {"masks": [{"mask": "none", "heads": [0]}]}}, "head"),
    ({"mask": "longformer", "mask_kwargs": {"per_head_dilation": [1, 2, 3]}}, "per_head_dilation"),
    ({"mask": "local", "mask_kwargs": {"window_schedule": {"kind": "list", "values": [1]}}}, "window_schedule"),
    ({"mask": "grid_window", "mask_kwargs": {"window_size": 2, "shift": 5}, "grid": [4, 4]}, "shift"),
    ({"mask": "space_time", "mask_kwargs": {"kind": "space"}, "grid": [4, 4]}, "grid"),
    ({"mask": "neighborhood", "mask_kwargs": {"kernel_size": 5}, "grid": [3, 3]}, "kernel_size"),
    ({"mask": "axial"}, "grid"),
]

UNSEEN = itertools.count(1001)
"""Numbers of keys that no test has used: a warning comes once."""


@pytest.mark.parametrize(("config", "key"), NEVER, ids=[f"{config['mask']}-{key}" for config, key in NEVER])
def test_a_configuration_that_fits_no_number_of_tokens_is_refused_by_name(config, key):
    with pytest.raises(sm.ConfigError, match=key):
        sm.SparseMHSA(16, 4, config=config, layer=1, num_layers=2)
    encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(16, 4), 2, enable_nested_tensor=False)
    with pytest.raises(sm.ConfigError, match=key):
        sm.sparsify(encoder, config)
    assert all(type(layer.self_attn) is nn.MultiheadAttention for layer in encoder.layers)


def test_what_only_some_numbers_of_tokens_allow_waits_for_them():
    layer = sm.SparseMHSA(8, 2, batch_first=True, config={"mask": "vertical_slash", "mask_kwargs": {"vertical": [90]}})
    x = torch.randn(1, 100, 8)
    assert layer(x, x, x, need_weights=False)[0].shape == x.shape
    with pytest.raises(sm.ConfigError, match="vertical"):
        layer(x[:, :50], x[:, :50], x[:, :50], need_weights=False)


def test_only_the_number_of_tokens_that_is_used_is_warned_of(caplog):
    k = next(UNSEEN)
    config = {"mask": "random", "mask_kwargs": {"k": k}}
    sm.SparseMHSA(16, 4, config=config)
    assert caplog.text == ""
    sm.Mask.from_config(config, 43, 4)
    assert [record.message for record in caplog.records] == [f"random: k {k} acts as 42 for 43 tokens"]


def test_a_mask_by_content_is_no_part_of_another():
    with pytest.raises(sm.ConfigError, match=r"masks\.0\.mask: `topk` chooses keys by the content"):
        sm.load_config({"mask": "union", "mask_kwargs": {"masks": [{"mask": "topk"}]}})


def test_a_subclass_of_torchs_layer_is_listed_as_left_dense():
    class Own(nn.MultiheadAttention):
        pass

    model = nn.ModuleDict({"a": nn.MultiheadAttention(8, 2), "b": Own(8, 2)})
    rows = {row.module: row for row in sm.sparsify(model, "mask: local\nmask_kwargs: {window: 1}").rows}
    assert (rows["a"].status, rows["b"].status) == ("swapped", "skipped")
    assert "Own" in rows["b"].reason


def test_what_a_backend_of_a_user_returns_is_checked():
    answers = {
        "shape": lambda v: v.mean(2, keepdim=True),
        "dtype": lambda v: v.double(),
        "kind": lambda v: None,
    }

    @sm.register_backend("answers", replace=True)
    def backend(q, k, v, answer: str):
        return answers[answer](v)

    x = torch.randn(2, 5, 16)
    for answer, message in (("shape", r"expected \(B, H, N, Dv\)"), ("dtype", "float64"), ("kind", "NoneType")):
        layer = sm.SparseMHSA(
            16, 2, batch_first=True, config={"backend": "answers", "backend_kwargs": {"answer": answer}}
        )
        with pytest.raises((TypeError, ValueError), match=f"backend `answers`.*{message}"):
            layer(x, x, x, need_weights=False)


@pytest.mark.parametrize("average", [True, False])
def test_tensors_without_data_have_weights_of_the_right_shape(average):
    x = torch.empty(2, 5, 16, device="meta")
    options = {"batch_first": True, "device": "meta"}
    expected = nn.MultiheadAttention(16, 4, **options)(x, x, x, average_attn_weights=average)
    got = sm.SparseMHSA(16, 4, config="mask: fibo", **options)(x, x, x, average_attn_weights=average)
    assert [y.shape for y in got] == [y.shape for y in expected]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_gradients_of_rows_with_few_keys_follow_the_tolerance_rule(dtype):
    from comparison import assert_as_good_as_dense, oracle_with_grads

    for seed in range(30):
        torch.manual_seed(seed)
        q, k, v, grad = (torch.randn(1, 2, 3, 65).to(dtype) for _ in range(4))
        mask = sm.Mask.from_dense(torch.rand(2, 3, 3) < 0.7)
        leaves = [x.clone().requires_grad_() for x in (q, k, v)]
        got = torch.autograd.grad(sm.sparse_attention(*leaves, mask, scale=1.0), leaves, grad)
        plain, exact = (
            oracle_with_grads(q, k, v, grad, mask.to_dense(), of, scale=1.0)[2:] for of in (dtype, torch.float64)
        )
        for name, mine, base, truth in zip(("dq", "dk", "dv"), got, plain, exact, strict=True):
            assert_as_good_as_dense(mine, base, truth, factor=3, what=f"{name}, seed {seed}")
