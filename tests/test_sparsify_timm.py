"""`sparsify` on timm's Vision Transformers, and `SparseTimmAttention` in new ones."""

import copy
import io
import pickle
from typing import ClassVar

import pytest
import timm
import torch
from torch import nn

import sparse_mhsa as sm
from comparison import assert_same
from models import FIBOTTENTION, LOCAL, images, masked_attention, vit
from sparse_mhsa.adapters.timm import SparseTimmAttention


class TestTimm:
    def test_the_swapped_model_is_the_dense_one_with_the_masks(self):
        model = vit().eval()
        x = images(model)
        masks = [
            sm.Mask.from_config(FIBOTTENTION, 17, 3, layer=i, num_layers=3, grid=[4, 4], num_prefix_tokens=1)
            for i in range(3)
        ]
        expected_model = masked_attention(model, [mask.to_dense() for mask in masks])
        sm.sparsify(model, FIBOTTENTION, verify=True)
        expected, got = expected_model(x), model(x)
        assert_same(got, expected, atol=1e-12)
        truth = torch.autograd.grad(expected.square().sum(), list(expected_model.parameters()))
        mine = torch.autograd.grad(got.square().sum(), list(model.parameters()))
        for a, b in zip(mine, truth, strict=True):
            assert_same(a, b, atol=1e-10)

    @pytest.mark.parametrize("side", [9, 10])
    def test_an_image_encoder_of_a_policy(self, side):
        """82 or 101 tokens, and the mean of the patches instead of the class token."""
        model = vit(img_size=8 * side, global_pool="avg", num_classes=0).eval()
        tokens = side * side + 1
        place = {"num_layers": 3, "grid": [side, side], "num_prefix_tokens": 1}
        masks = [sm.Mask.from_config(FIBOTTENTION, tokens, 3, layer=i, **place).to_dense() for i in range(3)]
        expected_model = masked_attention(model, masks)
        report = sm.sparsify(model, FIBOTTENTION, verify=True)
        assert {row.num_tokens for row in report.swapped} == {tokens}
        x = images(model)
        assert_same(model(x).detach(), expected_model(x).detach(), atol=1e-12)

    def test_dropout_with_masked_logits_zero_is_refused_before_anything_is_swapped(self):
        model = vit(attn_drop_rate=0.1)
        with pytest.raises(sm.ConfigError, match=r"blocks.0.attn: dropout: expected 0 with `masked_logits: zero`"):
            sm.sparsify(model, {**FIBOTTENTION, "masked_logits": "zero"})
        assert type(model.blocks[0].attn) is timm.layers.attention.Attention

    def test_the_report_lists_every_layer(self):
        model = vit()
        report = sm.sparsify(model, FIBOTTENTION)
        assert [row.module for row in report.swapped] == [f"blocks.{i}.attn" for i in range(3)]
        mask = sm.masks.fibottention(num_tokens=17, num_heads=3, shuffled=True)
        row = report.rows[0]
        assert (row.adapter, row.layer, row.num_tokens, row.mask) == ("timm", 0, 17, "fibottention")
        assert (row.nnz, row.density) == (mask.nnz, mask.density)
        assert not report.skipped
        assert str(report).count("\n") == 4
        assert report._repr_html_().count("<tr>") == 4
        assert report.to_dict()["rows"][2]["layer"] == 2

    @pytest.mark.parametrize(
        ("name", "kwargs", "prefix"),
        [
            ("vit_tiny_patch16_224", {}, 1),
            ("vit_tiny_patch16_224", {"class_token": False, "global_pool": "avg"}, 0),
            ("vit_tiny_patch16_224", {"reg_tokens": 4}, 5),
            ("deit_tiny_distilled_patch16_224", {}, 2),
        ],
    )
    def test_prefix_tokens_and_grid_are_inferred(self, name, kwargs, prefix):
        model = vit(name, **kwargs)
        sm.sparsify(model, LOCAL, verify=True)
        layer_mask = model.blocks[1].attn.layer_mask
        assert (layer_mask.num_prefix_tokens, layer_mask.grid, layer_mask.layer) == (prefix, (4, 4), 1)
        mask = model.blocks[1].attn.mask(16 + prefix)
        assert mask.num_prefix_tokens == prefix

    def test_the_configuration_wins_over_what_is_inferred(self):
        model = vit()
        sm.sparsify(model, {**LOCAL, "num_prefix_tokens": 0})
        assert model.blocks[0].attn.mask(17).num_prefix_tokens == 0

    def test_images_of_any_size_leave_the_grid_open(self):
        model = vit(dynamic_img_size=True)
        report = sm.sparsify(model, LOCAL)
        assert report.rows[0].num_tokens is None
        assert report.rows[0].density is None
        model(torch.randn(1, 3, 48, 32, dtype=torch.float64))

    @pytest.mark.parametrize(
        "options", [{"qk_norm": True}, {"qkv_bias": False}, {"attn_drop_rate": 0.3}, {"proj_drop_rate": 0.3}]
    )
    def test_options_of_the_layer_survive(self, options):
        model = vit(**options).eval()
        x = images(model)
        expected = model(x)
        sm.sparsify(model, "mask: none")
        assert_same(model(x).detach(), expected.detach(), atol=1e-12)
        model.train()
        torch.manual_seed(3)
        first = model(x)
        assert torch.equal(first, model(x)) == (options.keys() <= {"qk_norm", "qkv_bias"})
        torch.manual_seed(3)
        assert torch.equal(first, model(x))

    @pytest.mark.parametrize(
        "options",
        [
            {"scale_norm": True},
            {"gated": True},
            {"attn_head_dim": 5},
            {"dim_out": 10},
            {"qk_norm": True, "qkv_bias": True},
            {"proj_bias": False},
            {"gated": True, "scale_norm": True, "attn_head_dim": 6, "dim_out": 7, "proj_drop": 0.5},
        ],
    )
    @pytest.mark.parametrize("fused", [False, True])
    def test_options_of_the_class_survive(self, options, fused, monkeypatch):
        monkeypatch.setattr(timm.layers.attention, "use_fused_attn", lambda: fused)
        torch.manual_seed(0)
        dense = timm.layers.attention.Attention(24, 3, norm_layer=nn.LayerNorm, **options).double().eval()
        x = torch.randn(2, 9, 24, dtype=torch.float64)
        keep = torch.rand(2, 1, 9, 9) < 0.7
        bias = torch.randn(2, 3, 9, 9, dtype=torch.float64)
        calls = [{}, {"attn_mask": keep}, {"attn_mask": bias}, {"is_causal": True}]
        if fused:  # without, timm forgets the one for the other
            calls += [{"attn_mask": keep | torch.eye(9, dtype=torch.bool), "is_causal": True}]
        expected = [dense(x, **call) for call in calls]
        sm.sparsify(dense, "mask: none")
        for call, out in zip(calls, expected, strict=True):
            assert_same(dense(x, **call).detach(), out.detach(), atol=1e-12)

    def test_models_without_patch_dropout_are_left_alone(self):
        model = timm.create_model("naflexvit_base_patch16_gap", depth=1, embed_dim=24, num_heads=3)
        sm.sparsify(model, LOCAL)
        assert model.patch_drop is None
        assert model.blocks[0].attn.positions is None

    def test_double_backward_of_a_swapped_layer(self):
        model = vit(depth=1).eval()
        sm.sparsify(model, FIBOTTENTION)
        x = torch.randn(1, 17, 24, dtype=torch.float64, requires_grad=True)
        attn = model.blocks[0].attn
        assert torch.autograd.gradgradcheck(attn, (x,), fast_mode=True)

    @pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
    def test_fullgraph_compilation(self):
        torch._dynamo.reset()
        model = vit(depth=2).eval()
        sm.sparsify(model, FIBOTTENTION)
        x = images(model)
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
        assert_same(compiled(x).detach(), model(x).detach(), atol=1e-12)
        torch._dynamo.reset()


class TestTimmAttnLayer:
    """`SparseTimmAttention` as the ``attn_layer`` of new models."""

    PLAIN: ClassVar = {"mask": "local", "mask_kwargs": {"window": 1}, "num_prefix_tokens": 1}

    @pytest.mark.parametrize("by_name", [False, True])
    def test_a_new_model_is_the_swapped_one(self, by_name, monkeypatch):
        layer = SparseTimmAttention.configured(self.PLAIN)
        if by_name:
            monkeypatch.setitem(timm.models.vision_transformer.ATTN_LAYERS, "sparse", layer)
        model = vit(attn_layer="sparse" if by_name else layer, qk_norm=True)
        swapped = vit(qk_norm=True)
        assert list(model.state_dict()) == list(swapped.state_dict())
        assert all(torch.equal(a, b) for a, b in zip(model.parameters(), swapped.parameters(), strict=True))
        sm.sparsify(swapped, self.PLAIN)
        x = images(model)
        assert torch.equal(model.eval()(x), swapped.eval()(x))
        assert isinstance(model.blocks[0].attn, SparseTimmAttention)
        assert "mask=local, layer=0" in repr(model.blocks[0].attn)
        sm.densify(model)
        assert type(model.blocks[0].attn) is timm.layers.attention.Attention
        assert "unplaced" not in model.blocks[0].attn.__dict__
        model.blocks[0].attn(torch.randn(1, 3, 24, dtype=torch.float64))

    @pytest.mark.parametrize(
        ("name", "kwargs", "prefix"),
        [("vit_tiny_patch16_224", {"reg_tokens": 4}, 5), ("deit_tiny_distilled_patch16_224", {}, 2)],
    )
    def test_registers_and_distillation_tokens_of_new_models(self, name, kwargs, prefix):
        config = {**self.PLAIN, "num_prefix_tokens": prefix}
        model = vit(name, attn_layer=SparseTimmAttention.configured(config), **kwargs).eval()
        swapped = vit(name, **kwargs).eval()
        swapped.load_state_dict(model.state_dict(), strict=True)
        sm.sparsify(swapped, LOCAL)
        x = images(model)
        assert torch.equal(model(x), swapped(x))

    @pytest.mark.parametrize("how", ["deepcopy", "pickle", "torch.save"])
    def test_copies(self, how):
        model = vit(attn_layer=SparseTimmAttention.configured(self.PLAIN)).eval()
        if how == "deepcopy":
            twin = copy.deepcopy(model)
        elif how == "pickle":
            twin = pickle.loads(pickle.dumps(model))
        else:
            file = io.BytesIO()
            torch.save(model, file)
            file.seek(0)
            twin = torch.load(file, weights_only=False)
        x = images(model)
        assert torch.equal(twin(x), model(x))

    @pytest.mark.parametrize(
        "config",
        [
            FIBOTTENTION,
            {**LOCAL, "layers": {"blocks.1": {"mask": "none", "mask_kwargs": {}}}},
            {
                "mask": "local",
                "mask_kwargs": {"window_schedule": {"kind": "linear", "start": 1, "end": 4}},
            },
        ],
    )
    def test_a_layer_that_must_know_its_depth_refuses_until_it_is_told(self, config):
        model = vit(attn_layer=SparseTimmAttention.configured(config)).eval()
        x = images(model)
        with pytest.raises(RuntimeError, match=r"depends on the depth of this layer.*call sparse_mhsa.sparsify"):
            model(x)
        name = config["mask"]
        assert f"mask={name}, layer=unknown until sparsify(model, config)" in repr(model.blocks[1].attn)
        with pytest.raises(RuntimeError, match="depends on the depth"):
            model.blocks[0].attn.mask(17)
        assert sm.sparsify(model, config, verify=True).swapped
        assert "layer=1" in repr(model.blocks[1].attn)
        assert "unknown" not in repr(model)
        swapped = vit().eval()
        sm.sparsify(swapped, config)
        assert [b.attn.layer_mask for b in model.blocks] == [b.attn.layer_mask for b in swapped.blocks]
        assert torch.equal(model(x), swapped(x))

    def test_the_class_alone_is_dense(self):
        layer = SparseTimmAttention(24, 3, qkv_bias=True)
        assert layer.layer_mask.is_dense
        assert layer.qkv.bias is not None
        assert layer(torch.randn(2, 5, 24)).shape == (2, 5, 24)

    def test_a_bad_configuration_is_refused_when_the_class_is_made(self):
        with pytest.raises(sm.ConfigError, match="fibotention"):
            SparseTimmAttention.configured("mask: fibotention")


@pytest.mark.parametrize(
    ("name", "reported"),
    [
        ("convit_tiny", "GPSA"),
        ("xcit_nano_12_p16_224", "XCA"),
        ("efficientvit_b0", "LiteMLA"),
        ("shvit_s1", "SHSA"),
        ("vit_base_patch16_xp_224", "ParallelScalingBlock"),
    ],
)
def test_attention_by_another_name_is_reported(name, reported):
    with torch.device("meta"):
        model = timm.create_model(name)
    report = sm.sparsify(model, "mask: none", strict=False)
    assert any(f"no adapter for {reported}" in row.reason for row in report.skipped)
