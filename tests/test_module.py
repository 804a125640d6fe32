"""`SparseMHSA`: the contract of `torch.nn.MultiheadAttention`, and what sparsity adds to it."""

import copy
import io
import math
import pickle
import warnings
from typing import ClassVar

import pytest
import torch
from torch import nn

import sparse_mhsa as sm
from comparison import assert_same
from sparse_mhsa.module import SparseMHSA
from sparse_mhsa.reference import dense_attention

FIBOTTENTION = {"mask": "fibottention"}
LOCAL = {"mask": "local", "mask_kwargs": {"window": 1}}


def pair(embed_dim=12, num_heads=3, config=None, **kwargs):
    """A dense layer and a sparse one with the same weights, in float64."""
    torch.manual_seed(1)
    dense = nn.MultiheadAttention(embed_dim, num_heads, dtype=torch.float64, **kwargs)
    with torch.no_grad():
        for parameter in dense.parameters():
            parameter.copy_(torch.randn_like(parameter) / 3)
    return dense, SparseMHSA.from_dense(copy.deepcopy(dense), config)


def rand(*shape, grad=False):
    return torch.randn(shape, dtype=torch.float64, requires_grad=grad)


def grads_of(layer, out, inputs):
    parameters = [p for p in layer.parameters() if p.requires_grad]
    return torch.autograd.grad(out, [*inputs, *parameters], allow_unused=True)


def assert_same_layer(dense, sparse, inputs, *, grads=True, **kwargs):
    """Outputs, weights and gradients of a sparse layer without sparsity are those of the dense one."""
    results = []
    for layer in (dense, sparse):
        leaves = [x.detach().clone().requires_grad_() for x in inputs]
        out, weights = layer(*leaves, **kwargs)
        loss = out.square().sum() + (0 if weights is None else weights.square().sum())
        results.append((out.detach(), weights, grads_of(layer, loss, leaves) if grads else ()))
    (out, weights, truth), (mine, my_weights, got) = results
    assert_same(mine, out, atol=1e-12, what="out")
    assert (weights is None) == (my_weights is None)
    if weights is not None:
        assert_same(my_weights.detach(), weights.detach(), atol=1e-12, what="weights")
    for theirs, ours in zip(truth, got, strict=True):
        assert (theirs is None) == (ours is None)
        if theirs is not None:
            assert_same(ours, theirs, atol=1e-10, what="gradient")


def masks_for(shape, batch, heads, dtype):
    """A mask that leaves every query at least one key."""
    keep = torch.rand(shape) < 0.6
    keep[..., 0] = True
    return ~keep if dtype == torch.bool else torch.randn(shape, dtype=dtype).masked_fill(~keep, -math.inf)


class TestParityWithoutSparsity:
    @pytest.mark.parametrize("batch_first", [False, True])
    @pytest.mark.parametrize("need_weights", [False, True])
    @pytest.mark.parametrize("average", [False, True])
    def test_self_attention(self, batch_first, need_weights, average):
        x = rand(2, 5, 12)
        dense, sparse = pair(batch_first=batch_first)
        assert_same_layer(dense, sparse, [x, x, x], need_weights=need_weights, average_attn_weights=average)
        leaf = x.clone().requires_grad_()
        for layer in (dense, sparse):
            out = layer(leaf, leaf, leaf, need_weights=need_weights, average_attn_weights=average)[0]
            leaf.grad = None
            out.sum().backward()
            layer.result = leaf.grad
        assert_same(sparse.result, dense.result, atol=1e-12)

    @pytest.mark.parametrize("need_weights", [False, True])
    @pytest.mark.parametrize("bias", [False, True])
    @pytest.mark.parametrize("sizes", [{}, {"kdim": 7}, {"vdim": 5}, {"kdim": 7, "vdim": 5}])
    def test_cross_attention(self, need_weights, bias, sizes):
        dense, sparse = pair(batch_first=True, bias=bias, **sizes)
        query, key = rand(2, 5, 12), rand(2, 8, sizes.get("kdim", 12))
        value = rand(2, 8, sizes.get("vdim", 12))
        assert_same_layer(dense, sparse, [query, key, value], need_weights=need_weights)

    def test_key_is_value(self):
        dense, sparse = pair(batch_first=True)
        query, memory = rand(2, 5, 12), rand(2, 8, 12)
        assert_same(sparse(query, memory, memory)[0], dense(query, memory, memory)[0], atol=1e-12)
        value = rand(2, 8, 12)
        assert_same(sparse(memory, memory, value)[0], dense(memory, memory, value)[0], atol=1e-12)

    @pytest.mark.parametrize("need_weights", [False, True])
    @pytest.mark.parametrize("average", [False, True])
    def test_unbatched(self, need_weights, average):
        for batch_first in (False, True):
            dense, sparse = pair(batch_first=batch_first)
            query, key, value = rand(4, 12), rand(6, 12), rand(6, 12)
            mask = masks_for((3, 4, 6), 1, 3, torch.bool)
            padding = torch.tensor([False] * 5 + [True])
            options = {"need_weights": need_weights, "average_attn_weights": average}
            assert_same_layer(dense, sparse, [query, key, value], **options)
            options |= {"attn_mask": mask, "key_padding_mask": padding}
            assert_same_layer(dense, sparse, [query, key, value], **options)

    @pytest.mark.parametrize("need_weights", [False, True])
    @pytest.mark.parametrize("dtype", [torch.bool, torch.float64])
    @pytest.mark.parametrize("per_head", [False, True])
    @pytest.mark.parametrize("padded", [False, True])
    def test_masks_have_the_polarity_of_the_parent(self, need_weights, dtype, per_head, padded):
        dense, sparse = pair(batch_first=True)
        inputs = [rand(2, 4, 12), rand(2, 6, 12), rand(2, 6, 12)]
        mask = masks_for((6, 4, 6) if per_head else (4, 6), 2, 3, dtype)
        padding = masks_for((2, 6), 2, 3, dtype) if padded else None
        assert_same_layer(dense, sparse, inputs, need_weights=need_weights, attn_mask=mask, key_padding_mask=padding)

    @pytest.mark.parametrize("need_weights", [True, False])
    @pytest.mark.parametrize("masked", ["attn_mask", "key_padding_mask"])
    @pytest.mark.parametrize("large", [1e5, -1e5, torch.finfo(torch.float64).min])
    def test_a_finite_number_in_a_mask_stays_finite_in_a_precision_that_has_none_as_large(
        self, need_weights, masked, large
    ):
        layer = SparseMHSA(8, 2, batch_first=True, dtype=torch.float16, config="mask: none")
        x = torch.randn(1, 4, 8, dtype=torch.float16)
        mask = torch.zeros(4, 4, dtype=torch.float64) if masked == "attn_mask" else torch.zeros(1, 4).double()
        mask[..., :2] = large
        given = layer(x, x, x, need_weights=need_weights, **{masked: mask})
        drop = torch.tensor([large < 0] * 2 + [large > 0] * 2)
        expected = layer(x, x, x, need_weights=need_weights, key_padding_mask=drop[None])
        # So large a number leaves the scores that are added to it two decimals.
        torch.testing.assert_close(given, expected, atol=1e-2, rtol=0)
        mask[...] = large
        given = layer(x, x, x, need_weights=need_weights, **{masked: mask})
        torch.testing.assert_close(given, layer(x, x, x, need_weights=need_weights), atol=1e-2, rtol=0)

    def test_mixed_mask_types_warn_as_in_the_parent(self):
        dense, sparse = pair(batch_first=True)
        x = rand(2, 4, 12)
        options = {"attn_mask": rand(4, 4), "key_padding_mask": torch.zeros(2, 4, dtype=torch.bool)}
        outs = []
        for layer in (dense, sparse):
            with pytest.warns(UserWarning, match="Support for mismatched key_padding_mask and attn_mask"):
                outs.append(layer(x, x, x, **options)[0])
        assert_same(outs[1], outs[0], atol=1e-12)

    @pytest.mark.parametrize("need_weights", [False, True])
    def test_causal_hint(self, need_weights):
        dense, sparse = pair(batch_first=True)
        x = rand(2, 5, 12)
        mask = nn.Transformer.generate_square_subsequent_mask(5, dtype=torch.float64)
        assert_same_layer(dense, sparse, [x, x, x], need_weights=need_weights, attn_mask=mask, is_causal=True)

    @pytest.mark.parametrize("need_weights", [False, True])
    @pytest.mark.parametrize(
        "extra", [{"add_bias_kv": True}, {"add_zero_attn": True}, {"add_bias_kv": True, "add_zero_attn": True}]
    )
    def test_appended_keys(self, need_weights, extra):
        dense, sparse = pair(batch_first=True, **extra)
        inputs = [rand(2, 4, 12), rand(2, 6, 12), rand(2, 6, 12)]
        masks = {
            "attn_mask": masks_for((6, 4, 6), 2, 3, torch.float64),
            "key_padding_mask": masks_for((2, 6), 2, 3, torch.float64),
        }
        assert_same_layer(dense, sparse, inputs, need_weights=need_weights)
        assert_same_layer(dense, sparse, inputs, need_weights=need_weights, **masks)
        masks["key_padding_mask"] = torch.isinf(masks["key_padding_mask"])
        masks["attn_mask"] = torch.isinf(masks["attn_mask"])
        assert_same_layer(dense, sparse, inputs, need_weights=need_weights, **masks)

    @pytest.mark.parametrize("training", [False, True])
    def test_autocast(self, training):
        dense = nn.MultiheadAttention(16, 2, batch_first=True).train(training)
        sparse = SparseMHSA.from_dense(dense, None)
        x = torch.randn(2, 5, 16)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            (out, weights), (mine, my_weights) = (layer(x, x, x) for layer in (dense, sparse))
        assert (mine.dtype, my_weights.dtype) == (out.dtype, weights.dtype) == (torch.bfloat16, torch.bfloat16)
        assert_same(mine.float(), out.float(), atol=2e-2)

    def test_empty_batch(self):
        _, sparse = pair(batch_first=True, config=FIBOTTENTION)
        out, weights = sparse(*[rand(0, 5, 12)] * 3, attn_mask=torch.zeros(0, 5, 5, dtype=torch.bool))
        assert (out.shape, weights.shape) == ((0, 5, 12), (0, 5, 5))


class TestConstruction:
    @pytest.mark.parametrize(
        "kwargs",
        [
            {},
            {"bias": False},
            {"kdim": 3, "vdim": 5},
            {"add_bias_kv": True, "batch_first": True},
            {"add_zero_attn": True},
        ],
    )
    def test_same_parameters_initial_values_and_state_dict(self, kwargs):
        torch.manual_seed(5)
        dense = nn.MultiheadAttention(12, 3, **kwargs)
        after_dense = torch.rand(1)
        torch.manual_seed(5)
        sparse = SparseMHSA(12, 3, config=FIBOTTENTION, **kwargs)
        assert torch.equal(after_dense, torch.rand(1))
        assert list(sparse.state_dict()) == list(dense.state_dict())
        assert all(torch.equal(sparse.state_dict()[key], value) for key, value in dense.state_dict().items())
        sparse.load_state_dict(dense.state_dict(), strict=True)
        dense.load_state_dict(sparse.state_dict(), strict=True)
        assert isinstance(sparse, nn.MultiheadAttention)

    def test_from_dense_shares_parameters_and_leaves_the_original_alone(self):
        dense = nn.MultiheadAttention(12, 3, dropout=0.3, batch_first=True).eval()
        dense.in_proj_bias.requires_grad_(False)
        calls = []
        dense.register_forward_hook(lambda *_: calls.append("hook"))
        sparse = SparseMHSA.from_dense(dense, FIBOTTENTION, layer=2, num_layers=4)
        assert type(dense) is nn.MultiheadAttention
        assert not dense._forward_pre_hooks
        assert all(a is b for a, b in zip(sparse.parameters(), dense.parameters(), strict=True))
        assert (sparse.training, sparse.dropout, sparse.batch_first) == (False, 0.3, True)
        assert not sparse.in_proj_bias.requires_grad
        assert (sparse.layer_mask.layer, sparse.layer_mask.num_layers) == (2, 4)
        sparse(*[torch.randn(1, 5, 12)] * 3)
        assert calls == ["hook"]
        with pytest.raises(TypeError, match=r"mha: expected a torch.nn.MultiheadAttention, got Linear"):
            SparseMHSA.from_dense(nn.Linear(2, 2), None)

    def test_from_yaml(self, tmp_path):
        path = tmp_path / "attention.yaml"
        path.write_text("attention:\n  mask: local\n  mask_kwargs: {window: 2}\n")
        layer = SparseMHSA.from_yaml(path, 12, 3, batch_first=True, layer=1)
        assert (layer.embed_dim, layer.num_heads, layer.batch_first) == (12, 3, True)
        assert layer.mask(9) == sm.masks.local(num_tokens=9, num_heads=3, window=2, layer=1)
        with pytest.raises(ValueError, match=r"embed_dim: expected a number"):
            SparseMHSA.from_yaml(path, num_heads=3)
        with pytest.raises(FileNotFoundError, match=r"missing.yaml"):
            SparseMHSA.from_yaml(tmp_path / "missing.yaml", 12, 3)
        path.write_text("mask: local\nmask_kwargs: {window: 2}\nembed_dim: 16\nnum_heads: 4\n")
        layer = SparseMHSA.from_yaml(path)
        assert (layer.embed_dim, layer.num_heads) == (16, 4)
        with pytest.raises(ValueError, match="embed_dim: the configuration is for 16, but it is used with 8"):
            SparseMHSA.from_yaml(path, embed_dim=8)
        with pytest.raises(ValueError, match="num_heads: the configuration is for 4, but it is used with 2"):
            SparseMHSA.from_yaml(path, num_heads=2)

    @pytest.mark.parametrize(("name", "least"), [("layer", 0), ("num_layers", 1), ("num_prefix_tokens", 0)])
    def test_a_number_that_is_too_small_is_refused_by_name(self, name, least):
        with pytest.raises(ValueError, match=f"{name}: expected at least {least}, got {least - 1}"):
            SparseMHSA(12, 3, config=FIBOTTENTION, **{name: least - 1})

    @pytest.mark.parametrize("name", ["attn_mask", "key_padding_mask"])
    @pytest.mark.parametrize("need_weights", [True, False])
    @pytest.mark.parametrize(
        ("change", "error", "message"),
        [
            (lambda mask: mask.to("meta"), ValueError, "expected device cpu like query, got meta"),
            (lambda mask: mask.to_sparse(), TypeError, "expected a dense tensor, got layout torch.sparse_coo"),
            (lambda mask: mask.numpy(), TypeError, "expected a torch.Tensor, got ndarray"),
        ],
    )
    def test_masks_must_be_dense_tensors_beside_the_query(self, name, need_weights, change, error, message):
        """Elsewhere there is memory that nobody wrote, as on ``meta``."""
        x = rand(1, 5, 12)
        mask = torch.zeros(5, 5) if name == "attn_mask" else torch.zeros(1, 5)
        for config in (None, FIBOTTENTION, {"mask": "topk"}):
            layer = SparseMHSA(12, 3, config=config, batch_first=True, dtype=torch.float64)
            with pytest.raises(error, match=f"{name}: {message}"):
                layer(x, x, x, need_weights=need_weights, **{name: change(mask.bool())})

    def test_a_layer_beyond_the_last_is_refused(self):
        with pytest.raises(ValueError, match="layer: expected at most 1 of 2 layers, got 2"):
            SparseMHSA(12, 3, config=FIBOTTENTION, layer=2, num_layers=2)

    @pytest.mark.parametrize("grid", [[], [9], [3, 0], [1, 1, 3, 3]])
    def test_a_grid_has_two_or_three_sides_also_where_the_mask_does_not_look_at_it(self, grid):
        with pytest.raises(ValueError, match=r"grid: expected \[H, W\] or \[T, H, W\], each at least 1"):
            SparseMHSA(12, 3, config=LOCAL, grid=grid)

    def test_dropout_with_masked_logits_zero_is_refused_when_the_layer_is_built(self):
        with pytest.raises(ValueError, match="dropout: expected 0 with `masked_logits: zero`"):
            SparseMHSA(12, 3, dropout=0.1, config={"mask": "fibottention", "masked_logits": "zero"})

    def test_sizes_are_checked_by_the_parent(self):
        with pytest.raises(ValueError, match="embed_dim and num_heads must be greater than 0"):
            SparseMHSA(0, 2)
        with pytest.raises(AssertionError, match="embed_dim must be divisible by num_heads"):
            SparseMHSA(5, 2)

    def test_repr_shows_the_mask_and_the_density_where_n_is_known(self):
        assert "mask=fibottention, layer=2" in repr(SparseMHSA(12, 3, config=FIBOTTENTION, layer=2))
        text = repr(SparseMHSA(12, 3, config=FIBOTTENTION, grid=[4, 4], num_prefix_tokens=1))
        mask = sm.masks.fibottention(num_tokens=17, num_heads=3)
        low, high = min(mask.nnz_per_head) / 17**2, max(mask.nnz_per_head) / 17**2
        assert low < high
        assert f"num_tokens=17, density={mask.density:.4f}, density of heads={low:.4f}..{high:.4f}" in text
        local = {"mask": "local", "mask_kwargs": {"window": 1}}
        same_heads = repr(SparseMHSA(12, 3, config=local, grid=[4, 4], num_prefix_tokens=1))
        assert "density=" in same_heads
        assert "heads=0" not in same_heads

    @pytest.mark.parametrize("how", ["deepcopy", "pickle", "torch.save"])
    def test_copies_and_pickles_carry_the_mask(self, how):
        layer = SparseMHSA(12, 3, config=FIBOTTENTION, layer=2, batch_first=True)
        layer.set_epoch(3)
        if how == "deepcopy":
            twin = copy.deepcopy(layer)
        elif how == "pickle":
            twin = pickle.loads(pickle.dumps(layer))
        else:
            file = io.BytesIO()
            torch.save(layer, file)
            file.seek(0)
            twin = torch.load(file, weights_only=False)
        assert twin.layer_mask == layer.layer_mask
        x = torch.randn(2, 9, 12)
        assert torch.equal(layer(x, x, x)[0], twin(x, x, x)[0])

    def test_state_dict_is_plain_tensors(self):
        layer = SparseMHSA(12, 3, config=FIBOTTENTION)
        file = io.BytesIO()
        torch.save(layer.state_dict(), file)
        file.seek(0)
        layer.load_state_dict(torch.load(file, weights_only=True), strict=True)

    def test_conversions_of_dtype_and_device(self):
        layer = SparseMHSA(12, 3, config=FIBOTTENTION, batch_first=True)
        for dtype in (torch.bfloat16, torch.float16, torch.float64):
            layer.to(dtype)
            x = torch.randn(1, 9, 12, dtype=dtype)
            assert layer(x, x, x)[0].dtype == dtype
        layer = SparseMHSA(12, 3, config=FIBOTTENTION, batch_first=True, device="meta")
        x = torch.randn(2, 9, 12, device="meta")
        assert layer(x, x, x, need_weights=False)[0].shape == (2, 9, 12)

    def test_set_epoch_reaches_every_layer(self):
        model = nn.ModuleList([SparseMHSA(12, 3, config=FIBOTTENTION) for _ in range(2)])
        sm.set_epoch(model, 7)
        assert [layer.layer_mask.epoch for layer in model] == [7, 7]

    @pytest.mark.parametrize(
        ("model", "epoch", "error", "message"),
        [
            (nn.Linear(1, 1), -1, ValueError, "epoch: expected at least 0, got -1"),
            (nn.Linear(1, 1), 1.5, TypeError, "epoch: expected an integer, got float 1.5"),
            ([nn.Linear(1, 1)], 1, TypeError, "model: expected a torch.nn.Module, got list"),
        ],
    )
    def test_set_epoch_refuses_what_is_no_epoch_and_no_model_whatever_the_model_holds(
        self, model, epoch, error, message
    ):
        with pytest.raises(error, match=message):
            sm.set_epoch(model, epoch)

    def test_the_canonical_text_is_built_once_and_not_in_forward(self, monkeypatch):
        layer = SparseMHSA(12, 3, config=FIBOTTENTION, batch_first=True)
        built = []
        original = sm.masks.LayerMask.__post_init__
        monkeypatch.setattr(sm.masks.LayerMask, "__post_init__", lambda self: built.append(original(self)))
        x = torch.randn(1, 5, 12)
        layer(x, x, x)
        layer.set_epoch(0)
        assert not built
        layer.set_epoch(1)
        assert len(built) == 1


class TestSparsity:
    @staticmethod
    def dense_equivalent(sparse, x, **kwargs):
        """The dense parent with the mask of the sparse layer as its attn_mask (True = drop)."""
        dense = nn.MultiheadAttention(
            sparse.embed_dim, sparse.num_heads, batch_first=True, dtype=x.dtype, bias=sparse.in_proj_bias is not None
        ).eval()
        dense.load_state_dict(sparse.state_dict())
        drop = ~sparse.mask(x.shape[1]).to_dense()
        return dense(x, x, x, attn_mask=drop.repeat(x.shape[0], 1, 1), **kwargs)

    @pytest.mark.parametrize("config", [FIBOTTENTION, LOCAL, {"mask": "longformer", "mask_kwargs": {"window": 2}}])
    @pytest.mark.parametrize("average", [False, True])
    def test_it_is_the_dense_layer_with_the_mask(self, config, average):
        _, sparse = pair(config=config, batch_first=True)
        x = rand(2, 9, 12)
        out, weights = sparse(x, x, x, average_attn_weights=average)
        expected, expected_weights = self.dense_equivalent(sparse, x, average_attn_weights=average)
        assert_same(out, expected, atol=1e-12)
        assert_same(weights, expected_weights, atol=1e-12)

    def test_user_masks_intersect_with_the_pattern(self):
        _, sparse = pair(config=FIBOTTENTION, batch_first=True)
        x = rand(2, 9, 12)
        drop = torch.rand(9, 9) < 0.3
        padding = torch.zeros(2, 9, dtype=torch.bool)
        padding[0, 6:] = True
        out, weights = sparse(x, x, x, attn_mask=drop, key_padding_mask=padding, average_attn_weights=False)
        kept = sparse.mask(9).to_dense() & ~drop & ~padding[:, None, None]
        assert (weights[~kept] == 0).all()
        assert_same(weights.sum(-1), kept.any(-1).double(), atol=1e-12)
        empty = ~kept.any(-1).any(1)
        assert torch.allclose(out[empty], sparse.out_proj.bias.expand(int(empty.sum()), -1))

    def test_a_query_without_a_key_gives_the_output_bias_and_finite_gradients(self):
        _, sparse = pair(config=LOCAL, batch_first=True)
        x = rand(2, 5, 12, grad=True)
        drop = torch.zeros(5, 5, dtype=torch.bool)
        drop[2] = True
        for need_weights in (False, True):
            out, weights = sparse(x, x, x, attn_mask=drop, need_weights=need_weights)
            assert_same(out[:, 2].detach(), sparse.out_proj.bias.detach().expand(2, -1), atol=0)
            loss = out.square().sum() + (weights.square().sum() if need_weights else 0)
            assert all(torch.isfinite(grad).all() for grad in grads_of(sparse, loss, [x]))
        assert (weights[:, 2] == 0).all()

    def test_on_empty_row_error(self):
        sparse = SparseMHSA(12, 3, config={**LOCAL, "on_empty_row": "error"}, batch_first=True)
        x = torch.randn(2, 5, 12)
        sparse(x, x, x)
        padding = torch.zeros(2, 5, dtype=torch.bool)
        padding[1] = True
        with pytest.raises(RuntimeError, match=r"on_empty_row.*sample 1"):
            sparse(x, x, x, key_padding_mask=padding)

    @pytest.mark.parametrize(
        "extra", [{"add_bias_kv": True}, {"add_zero_attn": True}, {"add_bias_kv": True, "add_zero_attn": True}]
    )
    def test_appended_keys_are_kept_by_every_query(self, extra):
        dense, sparse = pair(config=FIBOTTENTION, batch_first=True, **extra)
        x = rand(2, 9, 12)
        drop = (~sparse.mask(9).to_dense()).repeat(2, 1, 1)
        padding = torch.zeros(2, 9, dtype=torch.bool)
        padding[1, 4:] = True
        for masks in ({}, {"key_padding_mask": padding}):
            out, weights = sparse(x, x, x, average_attn_weights=False, **masks)
            expected = dense(x, x, x, attn_mask=drop, average_attn_weights=False, **masks)
            assert_same(out, expected[0], atol=1e-12)
            assert_same(weights, expected[1], atol=1e-12)
        got = grads_of(sparse, sparse(x, x, x)[0].square().sum(), [])
        truth = grads_of(dense, dense(x, x, x, attn_mask=drop)[0].square().sum(), [])
        for mine, theirs in zip(got, truth, strict=True):
            assert_same(mine, theirs, atol=1e-10)

    def test_zero_logits_weights_and_appended_keys(self):
        config = {**FIBOTTENTION, "masked_logits": "zero"}
        _, sparse = pair(config=config, batch_first=True)
        x = rand(2, 9, 12)
        padding = torch.zeros(2, 9, dtype=torch.bool)
        padding[1, 4:] = True
        _, weights = sparse(x, x, x, key_padding_mask=padding, average_attn_weights=False)
        q, k, _ = (
            y.unflatten(-1, (3, 4)).transpose(1, 2)
            for y in nn.functional.linear(x, sparse.in_proj_weight, sparse.in_proj_bias).chunk(3, -1)
        )
        identity = torch.eye(9, dtype=torch.float64).expand(2, 3, 9, 9)
        expected, _ = dense_attention(
            q, k, identity, sparse.mask(9).to_dense(), key_mask=~padding, masked_logits="zero"
        )
        assert_same(weights, expected, atol=1e-12)
        with pytest.raises(ValueError, match="masked_logits"):
            pair(config=config, batch_first=True, add_zero_attn=True)[1](x, x, x)

    @pytest.mark.parametrize("dtype", [torch.bool, torch.float64])
    def test_zero_logits_let_nothing_through_that_another_mask_drops(self, dtype):
        """Pairs that the pattern drops keep weight, which a causal mask or additive padding cannot take from them."""
        _, sparse = pair(config={**FIBOTTENTION, "masked_logits": "zero"}, batch_first=True)
        x = rand(2, 9, 12)
        future = torch.ones(9, 9, dtype=torch.bool).triu(1)
        padding = torch.arange(9).expand(2, 9) > 6
        if dtype != torch.bool:
            future, padding = (torch.zeros(m.shape, dtype=dtype).masked_fill(m, -torch.inf) for m in (future, padding))
        with pytest.raises(ValueError, match="attn_mask: expected none with `masked_logits: zero`"):
            sparse(x, x, x, attn_mask=future)
        if dtype == torch.bool:
            sparse(x, x, x, key_padding_mask=padding)
        else:
            with pytest.raises(ValueError, match="attn_mask: expected none with `masked_logits: zero`"):
                sparse(x, x, x, key_padding_mask=padding)

    def test_square_masks_refuse_cross_attention(self):
        _, sparse = pair(config=LOCAL, batch_first=True)
        with pytest.raises(ValueError, match="`local` is square, but query has 5 tokens and key has 7"):
            sparse(rand(2, 5, 12), rand(2, 7, 12), rand(2, 7, 12))

    def test_double_backward(self):
        _, sparse = pair(config=FIBOTTENTION, batch_first=True)
        x = rand(1, 5, 12, grad=True)
        assert torch.autograd.gradgradcheck(lambda x: sparse(x, x, x, need_weights=False)[0], (x,), fast_mode=True)

    def test_weights_are_differentiable(self):
        _, sparse = pair(config=FIBOTTENTION, batch_first=True)
        x = rand(1, 5, 12, grad=True)
        for average in (False, True):
            assert torch.autograd.gradcheck(
                lambda x, average=average: sparse(x, x, x, average_attn_weights=average)[1], (x,), fast_mode=True
            )


class TestDropout:
    def test_weights_are_those_after_dropout_and_give_the_output(self):
        torch.manual_seed(0)
        sparse = SparseMHSA(12, 3, dropout=0.5, config=FIBOTTENTION, batch_first=True, dtype=torch.float64)
        x = rand(2, 30, 12)
        out, weights = sparse(x, x, x, average_attn_weights=False)
        kept = sparse.mask(30).to_dense().expand(2, -1, -1, -1)
        dropped = (weights[kept] == 0).double().mean()
        assert 0.4 < dropped < 0.6
        v = nn.functional.linear(x, sparse.in_proj_weight[24:], sparse.in_proj_bias[24:])
        context = weights @ v.unflatten(-1, (3, 4)).transpose(1, 2)
        expected = sparse.out_proj(context.transpose(1, 2).flatten(2))
        assert_same(out.detach(), expected.detach(), atol=1e-12)

    def test_none_in_evaluation(self):
        sparse = SparseMHSA(12, 3, dropout=0.5, config=FIBOTTENTION, batch_first=True)
        x = torch.randn(2, 9, 12)
        assert not torch.equal(sparse(x, x, x)[0], sparse(x, x, x)[0])
        sparse.eval()
        assert torch.equal(sparse(x, x, x)[0], sparse(x, x, x)[0])

    def test_the_seed_replays_it(self):
        sparse = SparseMHSA(12, 3, dropout=0.5, config=FIBOTTENTION, batch_first=True)
        x = torch.randn(2, 9, 12)
        torch.manual_seed(4)
        first = sparse(x, x, x)[0]
        torch.manual_seed(4)
        assert torch.equal(first, sparse(x, x, x)[0])


class TestMessages:
    """Word for word those of the parent where it has one."""

    CASES: ClassVar = {
        "4-D query": (([1, 2, 5, 12],) * 3, {}),
        "2-D key": (([2, 5, 12], [5, 12], [5, 12]), {}),
        "2-D query, 3-D key": (([5, 12], [2, 5, 12], [2, 5, 12]), {}),
        "embedding": (([2, 5, 8],) * 3, {}),
        "value shape": (([2, 5, 12], [2, 6, 12], [2, 7, 12]), {}),
        "int mask": (([2, 5, 12],) * 3, {"attn_mask": torch.zeros(5, 5, dtype=torch.int64)}),
        "int padding": (([2, 5, 12],) * 3, {"key_padding_mask": torch.zeros(2, 5, dtype=torch.int64)}),
        "2-D mask shape": (([2, 5, 12],) * 3, {"attn_mask": torch.zeros(4, 5, dtype=torch.bool)}),
        "3-D mask shape": (([2, 5, 12],) * 3, {"attn_mask": torch.zeros(5, 5, 5, dtype=torch.bool)}),
        "4-D mask": (([2, 5, 12],) * 3, {"attn_mask": torch.zeros(1, 1, 5, 5, dtype=torch.bool)}),
        "padding batch": (([2, 5, 12],) * 3, {"key_padding_mask": torch.zeros(3, 5, dtype=torch.bool)}),
        "padding length": (([2, 5, 12],) * 3, {"key_padding_mask": torch.zeros(2, 6, dtype=torch.bool)}),
        "1-D padding": (([2, 5, 12],) * 3, {"key_padding_mask": torch.zeros(5, dtype=torch.bool)}),
        "causal without mask": (([2, 5, 12],) * 3, {"is_causal": True}),
    }

    @pytest.mark.parametrize("case", CASES)
    def test_as_the_parent_says_it(self, case):
        shapes, kwargs = self.CASES[case]
        inputs = [torch.randn(shape) for shape in shapes]
        dense = nn.MultiheadAttention(12, 3, batch_first=False)
        if len(shapes[0]) == 3:
            # The parent reports shapes in its inner layout, (S, B, E); give both the same to read.
            inputs = [x.transpose(0, 1) if x.dim() == 3 else x for x in inputs]
        with pytest.raises((AssertionError, RuntimeError)) as expected:
            dense(*inputs, **kwargs)
        sparse = SparseMHSA(12, 3, config=FIBOTTENTION)
        with pytest.raises(type(expected.value)) as got:
            sparse(*inputs, **kwargs)
        assert str(got.value) == str(expected.value)

    def test_other_features_of_key_and_value(self):
        sparse = SparseMHSA(12, 3, kdim=5, vdim=7, batch_first=True)
        with pytest.raises(AssertionError, match=r"expecting key weights shape of \(12, 6\), but got .*\[12, 5\]"):
            sparse(torch.randn(2, 4, 12), torch.randn(2, 4, 6), torch.randn(2, 4, 7))
        with pytest.raises(AssertionError, match="key's sequence and batch dims"):
            sparse(torch.randn(2, 4, 12), torch.randn(2, 4, 5), torch.randn(2, 5, 7))

    def test_batches_must_agree(self):
        sparse = SparseMHSA(12, 3, batch_first=True)
        with pytest.raises(RuntimeError, match="key: expected batch size 2 like query, got 3"):
            sparse(torch.randn(2, 4, 12), torch.randn(3, 4, 12), torch.randn(3, 4, 12))

    def test_nested_tensors_say_how_to_avoid_them(self):
        sparse = SparseMHSA(12, 3, batch_first=True)
        nested = torch.nested.nested_tensor([torch.randn(3, 12), torch.randn(5, 12)], layout=torch.jagged)
        with pytest.raises(AssertionError, match=r"does not support NestedTensor.*enable_nested_tensor=False"):
            sparse(nested, nested, nested)

    def test_many_tokens_with_weights_warn_once(self, monkeypatch):
        monkeypatch.setattr(sm.functional, "MANY_TOKENS", 8)
        sm.functional.warn_of_dense_weights.cache_clear()
        sparse = SparseMHSA(12, 3, config=FIBOTTENTION, batch_first=True)
        x = torch.randn(1, 9, 12)
        with pytest.warns(UserWarning, match="need_weights=True makes a dense tensor"):
            sparse(x, x, x)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            sparse(x, x, x)
        sm.functional.warn_of_dense_weights.cache_clear()


class TestTransformerLayers:
    @pytest.mark.parametrize("training", [False, True])
    def test_the_encoder_fast_path_does_not_bypass_the_mask(self, training):
        encoder = nn.TransformerEncoderLayer(12, 2, 16, dropout=0.0, batch_first=True, dtype=torch.float64)
        encoder.train(training)
        x = rand(2, 9, 12)
        with torch.no_grad():
            dense = encoder(x)
            drop = ~sm.masks.local(num_tokens=9, num_heads=2, window=1).to_dense()
            expected = encoder(x, src_mask=drop.repeat(2, 1, 1))
            encoder.self_attn = SparseMHSA.from_dense(encoder.self_attn, LOCAL)
            got = encoder(x)
            assert_same(got, expected, atol=1e-12)
            assert not torch.allclose(got, dense)
            again = copy.deepcopy(encoder)
            assert_same(pickle.loads(pickle.dumps(again))(x), expected, atol=1e-12)

    @pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
    @pytest.mark.parametrize("how", [{"need_weights": False}, {}, {"average_attn_weights": False}])
    @pytest.mark.parametrize("config", [None, FIBOTTENTION], ids=["none", "fibottention"])
    def test_fullgraph_compilation(self, config, how):
        layer = SparseMHSA(12, 3, config=config, batch_first=True, dtype=torch.float64)
        x = rand(2, 9, 12, grad=True)

        def loss(x):
            return sum(part.square().sum() for part in layer(x, x, x, **how) if part is not None)

        torch._dynamo.reset()
        compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
        assert_same(torch.autograd.grad(compiled(x), x)[0], torch.autograd.grad(loss(x), x)[0], atol=1e-11)
        torch._dynamo.reset()

    def test_ensembles_over_functional_calls(self):
        layer = SparseMHSA(12, 3, config=FIBOTTENTION, batch_first=True, dtype=torch.float64)
        parameters = {name: p.detach() for name, p in layer.named_parameters()}
        x = rand(4, 5, 12)

        def loss(parameters, x):
            out = torch.func.functional_call(layer, parameters, (x[None],) * 3, {"need_weights": False})[0]
            return out.square().sum()

        got = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0))(parameters, x)
        for i in range(4):
            for name, grad in torch.func.grad(loss)(parameters, x[i]).items():
                assert_same(got[name][i], grad, atol=1e-11)
