"""`sparsify` and `densify` on torch's, timm's and copied models."""

import copy
import io
import pickle
import types
from typing import ClassVar

import pytest
import torch
from torch import nn

import sparse_mhsa as sm
from comparison import assert_same
from sparse_mhsa.adapters import Adapter, find_attention, registry
from sparse_mhsa.adapters.timm import SparseAttention, SparseTimmAttention
from sparse_mhsa.module import SparseMHSA

timm = pytest.importorskip("timm")

FIBOTTENTION = {"mask": "fibottention", "mask_kwargs": {"shuffled": True}}
LOCAL = {"mask": "local", "mask_kwargs": {"window": 1}}


def vit(name="vit_tiny_patch16_224", depth=3, **kwargs):
    torch.manual_seed(0)
    options = {"img_size": 32, "patch_size": 8, "embed_dim": 24, "num_heads": 3, "depth": depth, "num_classes": 5}
    return timm.create_model(name, **{**options, **kwargs}).double()


def images(model, batch=2):
    return torch.randn(batch, 3, *model.patch_embed.img_size, dtype=torch.float64)


def encoder(depth=2, **kwargs):
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(12, 2, 16, dropout=0.0, batch_first=True, dtype=torch.float64)
    return nn.TransformerEncoder(layer, depth, **kwargs)


class CopiedAttention(nn.Module):
    """The attention that MAE, DeiT and Fibottention copied from an early timm."""

    def __init__(self, dim=24, num_heads=3, qk_scale=None):
        super().__init__()
        self.num_heads = num_heads
        self.scale = qk_scale or (dim // num_heads) ** -0.5
        self.qkv = nn.Linear(dim, 3 * dim)
        self.attn_drop = nn.Dropout(0.0)
        self.proj = nn.Linear(dim, dim)
        self.proj_drop = nn.Dropout(0.0)

    def forward(self, x):
        batch, tokens, dim = x.shape
        q, k, v = self.qkv(x).reshape(batch, tokens, 3, self.num_heads, -1).permute(2, 0, 3, 1, 4)
        attn = self.attn_drop((q @ k.transpose(-2, -1) * self.scale).softmax(-1))
        return self.proj_drop(self.proj((attn @ v).transpose(1, 2).reshape(batch, tokens, dim)))


class ChannelAttention(CopiedAttention):
    """Same parameters, other mathematics: attention between channels."""

    def forward(self, x):
        batch, tokens, dim = x.shape
        q, k, v = self.qkv(x).reshape(batch, tokens, 3, self.num_heads, -1).permute(2, 0, 3, 1, 4)
        attn = (q.transpose(-2, -1) @ k).softmax(-1)
        return self.proj((attn @ v.transpose(-2, -1)).permute(0, 3, 1, 2).reshape(batch, tokens, dim))


def masked_attention(model, masks):
    """Outputs of a dense timm model whose layers get the given masks as their attn_mask."""

    class Masked(nn.Module):
        def __init__(self, attn, mask):
            super().__init__()
            self.attn, self.mask = attn, mask

        def forward(self, x, attn_mask=None, is_causal=False):
            return self.attn(x, attn_mask=self.mask)

    model = copy.deepcopy(model)
    for block, mask in zip(model.blocks, masks, strict=True):
        block.attn = Masked(block.attn, mask)
    return model


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
        expected = [dense(x, **call) for call in calls]
        sm.sparsify(dense, "mask: none")
        for call, out in zip(calls, expected, strict=True):
            assert_same(dense(x, **call).detach(), out.detach(), atol=1e-12)

    def test_dropped_patches_are_warned_of(self, caplog):
        model = vit(patch_drop_rate=0.5)
        sm.sparsify(model, LOCAL)
        assert "VisionTransformer drops patches in training" in caplog.text
        caplog.clear()
        sm.sparsify(vit(), LOCAL)
        assert not caplog.text

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


class TestTorch:
    @pytest.mark.parametrize("training", [False, True])
    @pytest.mark.parametrize("padded", [False, True])
    def test_an_encoder_is_the_dense_one_with_the_mask(self, training, padded):
        model = encoder().train(training)
        x = torch.randn(2, 9, 12, dtype=torch.float64)
        padding = torch.zeros(2, 9, dtype=torch.bool)
        padding[1, 6:] = True
        options = {"src_key_padding_mask": padding} if padded else {}
        drop = ~sm.masks.local(num_tokens=9, num_heads=2, window=1).to_dense()
        expected = copy.deepcopy(model).train()(x, mask=drop.repeat(2, 1, 1), **options)
        report = sm.sparsify(model, LOCAL, verify=True, sample=(x,))
        assert [row.adapter for row in report.swapped] == ["torch.nn", "torch.nn"]
        with torch.no_grad():
            got = model(x, **options)
        kept = ~padding if padded else torch.ones_like(padding)
        assert_same(got[kept], expected.detach()[kept], atol=1e-12)

    def test_nested_tensors_are_switched_off_and_on_again(self):
        model = encoder()
        assert model.use_nested_tensor
        sm.sparsify(model, LOCAL)
        assert not model.use_nested_tensor
        sm.sparsify(model, FIBOTTENTION)
        sm.densify(model)
        assert model.use_nested_tensor
        assert "_dense_use_nested_tensor" not in model.__dict__

    def test_decoders_and_cross_attention_stay_dense_unless_named(self):
        model = nn.Transformer(12, 2, 1, 1, 16, batch_first=True)
        report = sm.sparsify(model, LOCAL)
        status = {row.module: (row.status, row.reason) for row in report.rows}
        assert status == {
            "encoder.layers.0.self_attn": ("swapped", ""),
            "decoder.layers.0.self_attn": ("skipped", "decoder"),
            "decoder.layers.0.multihead_attn": ("skipped", "cross-attention"),
        } or status["decoder.layers.0.multihead_attn"] == ("skipped", "decoder")
        report = sm.sparsify(model, LOCAL, include="decoder.*self_attn")
        assert [row.module for row in report.swapped] == ["decoder.layers.0.self_attn"]
        assert type(model.decoder.layers[0].multihead_attn) is nn.MultiheadAttention

    def test_a_decoder_without_a_telling_name(self):
        layer = nn.TransformerDecoderLayer(12, 2, 16)
        reasons = {row.module: row.reason for row in sm.sparsify(nn.ModuleList([layer]), LOCAL, strict=False).rows}
        assert reasons == {"0.self_attn": "decoder", "0.multihead_attn": "cross-attention"}

    def test_the_model_may_itself_be_the_attention(self):
        layer = nn.MultiheadAttention(12, 3)
        report = sm.sparsify(layer, LOCAL)
        assert type(layer) is SparseMHSA
        assert "(root)" in str(report)
        sm.densify(layer)
        assert type(layer) is nn.MultiheadAttention

    def test_subclasses_are_listed_not_swapped(self):
        class MyMultiheadAttention(nn.MultiheadAttention):
            pass

        model = nn.ModuleDict({"mine": MyMultiheadAttention(12, 3), "torchs": nn.MultiheadAttention(12, 3)})
        report = sm.sparsify(model, LOCAL)
        assert [row.module for row in report.swapped] == ["torchs"]
        assert "no adapter for" in report.skipped[0].reason
        assert report.skipped[0].module == "mine"


class TestCopies:
    def test_a_copied_attention_is_recognised_by_what_it_computes(self):
        for scale in (None, 0.3):
            dense = CopiedAttention(qk_scale=scale).double()
            model = nn.ModuleDict({"blocks": nn.ModuleList([dense])})
            x = torch.randn(2, 9, 24, dtype=torch.float64)
            expected = dense(x)
            sm.sparsify(model, "mask: none")
            assert type(dense) is SparseAttention
            assert_same(dense(x).detach(), expected.detach(), atol=1e-12)
            sm.densify(model)
            assert type(dense) is CopiedAttention

    def test_same_parameters_but_other_mathematics_is_left_alone(self):
        model = nn.ModuleDict({"a": ChannelAttention(), "b": CopiedAttention()})
        report = sm.sparsify(model, LOCAL)
        assert [(row.module, row.status) for row in report.rows] == [("b", "swapped"), ("a", "skipped")]

    def test_the_trial_leaves_random_state_hooks_and_modes_alone(self):
        dense = CopiedAttention()
        dense.attn_drop.p = 0.5
        calls = []
        dense.register_forward_hook(lambda *_: calls.append(1))
        state = torch.get_rng_state()
        assert find_attention(dense)
        assert torch.equal(state, torch.get_rng_state())
        assert not calls
        assert dense.training
        assert dense.attn_drop.training
        assert dense.qkv.weight.dtype == torch.float32

    def test_temporal_attention_stays_dense_unless_named(self):
        model = nn.ModuleDict({"attn": CopiedAttention(), "temporal_attn": CopiedAttention()})
        report = sm.sparsify(model, LOCAL)
        assert {row.module: row.reason for row in report.rows} == {"attn": "", "temporal_attn": "temporal attention"}

    def test_a_wrong_rank_is_refused(self):
        model = CopiedAttention()
        sm.sparsify(model, LOCAL)
        with pytest.raises(ValueError, match=r"x: expected shape \(B, N, C\), got \(2, 3, 9, 24\)"):
            model(torch.randn(2, 3, 9, 24))


class TestSelection:
    def test_layers_keep_their_number_whatever_is_included(self):
        model = vit(depth=12)
        sm.sparsify(model, FIBOTTENTION, include=r"blocks\.(9|10)\.")
        assert (model.blocks[9].attn.layer_mask.layer, model.blocks[10].attn.layer_mask.layer) == (9, 10)
        assert model.blocks[9].attn.layer_mask.num_layers == 12
        assert type(model.blocks[0].attn).__name__ == "Attention"

    def test_stacks_are_numbered_separately(self):
        model = nn.ModuleDict(
            {
                "blocks": nn.ModuleList([CopiedAttention() for _ in range(2)]),
                "others": nn.ModuleList([CopiedAttention() for _ in range(3)]),
            }
        )
        sm.sparsify(model, LOCAL)
        places = {s.name: (s.layer, s.num_layers) for s in find_attention(model)}
        assert places["others.1"] == (1, 3)
        assert places["blocks.1"] == (1, 2)

    def test_exclude_wins_over_include(self):
        model = vit()
        report = sm.sparsify(model, LOCAL, include=["blocks.0", "blocks.1"], exclude="blocks.1")
        assert [(row.module, row.reason) for row in report.skipped] == [
            ("blocks.1.attn", "excluded"),
            ("blocks.2.attn", "not included"),
        ]

    def test_overrides_replace_keys_for_matching_layers(self):
        model = vit()
        report = sm.sparsify(model, LOCAL, overrides={r"blocks\.[01]\.attn": {"mask": "none", "mask_kwargs": {}}})
        assert [row.mask for row in report.rows] == ["none", "none", "local"]
        config = {**LOCAL, "layers": {r"blocks\.2\.attn": {"mask_kwargs": {"window": 3}}}}
        sm.sparsify(model, config)
        windows = [model.blocks[i].attn.mask(17).nnz for i in range(3)]
        assert windows[0] == windows[1] < windows[2]

    def test_an_override_without_a_layer_is_a_mistake(self):
        with pytest.raises(ValueError, match=r"overrides: `blocks.7` matches none of the attention layers"):
            sm.sparsify(vit(), LOCAL, overrides={"blocks.7": {"mask": "none"}})
        sm.sparsify(vit(), LOCAL, overrides={"blocks.7": {"mask": "none"}}, strict=False)

    @pytest.mark.parametrize("argument", ["include", "exclude"])
    def test_a_pattern_that_is_no_regular_expression_is_named(self, argument):
        with pytest.raises(ValueError, match=rf"{argument}: `\(` is not a regular expression"):
            sm.sparsify(vit(), LOCAL, **{argument: ["blocks", "("]})

    def test_nothing_to_swap_is_an_error_with_the_table(self):
        with pytest.raises(ValueError, match="model: nothing to swap in Linear"):
            sm.sparsify(nn.Linear(2, 2), LOCAL)
        with pytest.raises(ValueError, match=r"(?s)nothing to swap.*blocks.0.attn.*not included"):
            sm.sparsify(vit(), LOCAL, include="nowhere")
        assert not sm.sparsify(nn.Linear(2, 2), LOCAL, strict=False).rows

    def test_a_configuration_that_does_not_fit_a_layer_changes_nothing(self):
        model = vit()
        config = {**LOCAL, "layers": {"blocks.1": {"mask": "longformer", "mask_kwargs": {"per_head_dilation": [1, 2]}}}}
        with pytest.raises(sm.ConfigError, match=r"blocks.1.attn: .*per_head_dilation"):
            sm.sparsify(model, config)
        assert not any(isinstance(module, SparseAttention) for module in model.modules())
        report = sm.sparsify(model, config, strict=False)
        assert [row.status for row in report.rows] == ["swapped", "skipped", "swapped"]
        assert "per_head_dilation" in report.rows[1].reason


class TestInPlace:
    def test_everything_but_the_class_stays(self):
        model = vit().eval()
        attn = model.blocks[0].attn
        attn.proj.weight.requires_grad_(False)
        calls = []
        handle = attn.register_forward_hook(lambda *_: calls.append("hook"))
        parameters = dict(model.named_parameters())
        optimizer = torch.optim.AdamW(model.parameters())
        keys = list(model.state_dict())
        sm.sparsify(model, LOCAL)
        assert model.blocks[0].attn is attn
        assert not attn.training
        assert not attn.proj.weight.requires_grad
        assert all(parameter is parameters[name] for name, parameter in model.named_parameters())
        assert optimizer.param_groups[0]["params"][5] is list(model.parameters())[5]
        assert list(model.state_dict()) == keys
        model(images(model))
        handle.remove()
        model(images(model))
        assert calls == ["hook"]

    @pytest.mark.parametrize("make", [vit, encoder])
    def test_densify_is_the_exact_inverse(self, make):
        model = make().eval()
        before = copy.deepcopy(model)
        sm.sparsify(model, LOCAL)
        sm.sparsify(model, FIBOTTENTION)
        sm.densify(model)
        for (name, module), (_, original) in zip(model.named_modules(), before.named_modules(), strict=True):
            assert type(module) is type(original), name
            assert module.__dict__.keys() == original.__dict__.keys(), name
            assert len(module._forward_pre_hooks) == len(original._forward_pre_hooks)
        x = images(model) if make is vit else torch.randn(2, 9, 12, dtype=torch.float64)
        assert torch.equal(model(x), before(x))
        sm.densify(model)

    @pytest.mark.parametrize("make", [vit, encoder])
    def test_doing_it_again_gives_another_configuration(self, make):
        model, once = make(), make()
        sm.sparsify(model, FIBOTTENTION)
        sm.sparsify(model, LOCAL)
        sm.sparsify(once, LOCAL)
        for site, other in zip(find_attention(model), find_attention(once), strict=True):
            assert site.layer_mask == other.layer_mask
            assert len(site.module._forward_pre_hooks) == len(other.module._forward_pre_hooks)

    def test_state_dicts_load_both_ways(self):
        dense, sparse = vit(), vit()
        sm.sparsify(sparse, LOCAL)
        sparse.load_state_dict(dense.state_dict(), strict=True)
        dense.load_state_dict(sparse.state_dict(), strict=True)

    @pytest.mark.parametrize("make", [vit, encoder])
    @pytest.mark.parametrize("how", ["deepcopy", "pickle", "torch.save"])
    def test_copies_of_a_swapped_model(self, make, how):
        model = make().eval()
        sm.sparsify(model, FIBOTTENTION)
        if how == "deepcopy":
            twin = copy.deepcopy(model)
        elif how == "pickle":
            twin = pickle.loads(pickle.dumps(model))
        else:
            file = io.BytesIO()
            torch.save(model, file)
            file.seek(0)
            twin = torch.load(file, weights_only=False)
        x = images(model) if make is vit else torch.randn(2, 9, 12, dtype=torch.float64)
        assert torch.equal(twin(x), model(x))
        sm.densify(twin)
        assert not any(isinstance(module, (SparseAttention, SparseMHSA)) for module in twin.modules())

    def test_shared_attention_is_one_layer(self):
        shared = nn.MultiheadAttention(12, 3)
        model = nn.ModuleList([shared, shared])
        assert len(sm.sparsify(model, LOCAL).rows) == 1
        assert type(model[1]) is SparseMHSA

    def test_set_epoch_reaches_swapped_layers(self):
        model = vit()
        sm.sparsify(model, LOCAL)
        sm.set_epoch(model, 4)
        assert model.blocks[2].attn.layer_mask.epoch == 4

    def test_models_on_the_meta_device(self):
        with torch.device("meta"):
            model = vit()
            copied = CopiedAttention()
        sm.sparsify(model, FIBOTTENTION, verify=True)
        sm.sparsify(copied, FIBOTTENTION)
        assert model(torch.randn(2, 3, 32, 32, device="meta", dtype=torch.float64)).shape == (2, 5)


class TestVerify:
    def test_a_layer_that_is_never_called_is_found(self):
        class Bypass(nn.Module):
            def __init__(self):
                super().__init__()
                self.used, self.bypassed = CopiedAttention(), CopiedAttention()

            def forward(self, x):
                return self.used(x) + nn.functional.linear(x, self.bypassed.proj.weight)

        with pytest.raises(RuntimeError, match=r"stayed dense.*: bypassed$"):
            sm.sparsify(Bypass(), LOCAL, verify=True, sample=torch.randn(1, 5, 24))

    def test_a_layer_that_is_called_but_computes_densely_is_found(self):
        model = vit()
        attn = model.blocks[1].attn
        patched = attn.forward = types.MethodType(type(attn).forward, attn)
        with pytest.raises(RuntimeError, match=r"stayed dense.*: blocks.1.attn$"):
            sm.sparsify(model, LOCAL, verify=True)
        assert attn.forward is patched

    def test_the_encoder_fast_path_would_be_found(self):
        model = encoder()
        x = torch.randn(2, 9, 12, dtype=torch.float64)
        sm.sparsify(model, LOCAL, verify=True, sample=x)
        for layer in model.layers:
            layer.self_attn._forward_pre_hooks.clear()
        sites = {site.name: site.module for site in find_attention(model)}
        calls = sm.adapters.sparse_calls(model.eval(), sites, x)
        assert set(calls.values()) == {0}

    def test_it_leaves_the_model_as_it_was(self):
        model = vit()
        model.blocks[1].eval()
        modes = [module.training for module in model.modules()]
        state = torch.get_rng_state()
        attributes = [set(module.__dict__) for module in model.blocks[0].attn.modules()]
        sm.sparsify(model, LOCAL, verify=True)
        assert [module.training for module in model.modules()] == modes
        assert torch.equal(torch.get_rng_state(), state)
        added = [set(m.__dict__) - before for m, before in zip(model.blocks[0].attn.modules(), attributes, strict=True)]
        assert added[0] == {"layer_mask", "backend", "dense_class"}
        assert not any(added[1:])

    def test_forms_of_the_sample(self):
        x = torch.randn(2, 9, 12, dtype=torch.float64)
        for sample in (x, (x,), {"src": x}):
            sm.sparsify(encoder(), LOCAL, verify=True, sample=sample)

    def test_a_sample_is_asked_for_where_the_model_does_not_tell(self):
        with pytest.raises(ValueError, match="sample: expected an input for TransformerEncoder"):
            sm.sparsify(encoder(), LOCAL, verify=True)

    def test_dense_layers_need_no_proof(self):
        sm.sparsify(vit(), "mask: none", verify=True)


class TestOwnAdapter:
    def test_a_users_adapter_takes_part(self, monkeypatch):
        monkeypatch.setattr(registry, "_ADAPTERS", list(registry._ADAPTERS))

        class Mine(nn.Module):
            num_heads = 2

        @sm.adapters.register_adapter
        class MyAdapter(Adapter):
            name = "mine"

            def matches(self, module):
                return isinstance(module, Mine)

            def heads(self, module):
                return module.num_heads, 4

            def sparsify(self, module, layer_mask):
                module.seen = layer_mask

            def densify(self, module):
                del module.seen

        model = nn.ModuleList([Mine(), Mine()])
        report = sm.sparsify(model, LOCAL)
        assert [row.adapter for row in report.rows] == ["mine", "mine"]
        assert model[1].seen.layer == 1


class TestTorchvision:
    @staticmethod
    def vit(**kwargs):
        torchvision = pytest.importorskip("torchvision")
        torch.manual_seed(0)
        options = {"image_size": 32, "patch_size": 8, "num_layers": 3, "num_heads": 3, "hidden_dim": 24, "mlp_dim": 32}
        return torchvision.models.VisionTransformer(**options, num_classes=5, **kwargs).double()

    def test_the_swapped_model_is_the_dense_one_with_the_masks(self):
        model = self.vit().eval()
        torch.nn.init.normal_(model.heads.head.weight)
        x = torch.randn(2, 3, 32, 32, dtype=torch.float64)
        masks = [
            sm.Mask.from_config(FIBOTTENTION, 17, 3, layer=i, num_layers=3, grid=[4, 4], num_prefix_tokens=1)
            for i in range(3)
        ]
        masked = copy.deepcopy(model)
        for block, mask in zip(masked.encoder.layers, masks, strict=True):
            drop = ~mask.to_dense().repeat(2, 1, 1)
            dense = block.self_attention
            forward = dense.forward
            dense.forward = lambda *args, forward=forward, drop=drop, **kw: forward(*args, attn_mask=drop, **kw)
        report = sm.sparsify(model, FIBOTTENTION, verify=True)
        assert [row.module for row in report.swapped] == [
            f"encoder.layers.encoder_layer_{i}.self_attention" for i in range(3)
        ]
        assert [(row.layer, row.num_tokens, row.nnz) for row in report.rows] == [
            (i, 17, mask.nnz) for i, mask in enumerate(masks)
        ]
        for context in (torch.no_grad(), torch.enable_grad()):
            with context:
                assert_same(model(x).detach(), masked(x).detach(), atol=1e-11)
        state = self.vit().state_dict()
        model.load_state_dict(state, strict=True)
        self.vit().load_state_dict(model.state_dict(), strict=True)

    def test_a_convolutional_stem_and_the_meta_device(self):
        torchvision = pytest.importorskip("torchvision")
        stem = torchvision.models.vision_transformer.ConvStemConfig(8, 3, 2)
        with torch.device("meta"):
            model = self.vit(conv_stem_configs=[stem, stem, stem])
        report = sm.sparsify(model, LOCAL, verify=True)
        assert {row.num_tokens for row in report.rows} == {17}

    def test_windowed_attention_is_listed_not_swapped(self):
        torchvision = pytest.importorskip("torchvision")
        model = torchvision.models.swin_t(weights=None)
        report = sm.sparsify(model, LOCAL, strict=False)
        assert not report.swapped
        assert {row.reason for row in report.skipped} == {"no adapter for ShiftedWindowAttention"}


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
        sm.densify(model)
        assert type(model.blocks[0].attn) is timm.layers.attention.Attention
        assert "unplaced" not in model.blocks[0].attn.__dict__
        model.blocks[0].attn(torch.randn(1, 3, 24, dtype=torch.float64))

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
        assert sm.sparsify(model, config, verify=True).swapped
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
