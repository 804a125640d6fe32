"""What `sparsify` and `densify` select, number and leave alone, on any model."""

import copy
import io
import pickle

import pytest
import torch
from torch import nn

import sparse_mhsa as sm
from comparison import assert_same
from models import FIBOTTENTION, LOCAL, ChannelAttention, CopiedAttention, encoder, images, vit
from sparse_mhsa.adapters import Adapter, find_attention, registry
from sparse_mhsa.adapters.timm import SparseAttention
from sparse_mhsa.module import SparseMHSA


def sized_model(framework):
    """A model of a framework, and the sizes of its attention."""
    sizes = {"embed_dim": 24, "num_heads": 3}
    if framework == "torch":
        return encoder(), {"embed_dim": 12, "num_heads": 2}
    if framework == "timm":
        return vit(), sizes
    if framework == "timm with rope":
        return vit("vit_small_patch16_dinov3", **sizes), sizes
    if framework == "bare":
        bare = nn.Module()
        bare.num_heads, bare.scale, bare.with_qkv, bare.attn_drop = 3, 8**-0.5, False, nn.Dropout(0.0)
        return bare, sizes
    transformers = pytest.importorskip("transformers")
    options = {"hidden_size": 24, "num_attention_heads": 3, "num_hidden_layers": 2, "intermediate_size": 8}
    options |= {"image_size": 16, "patch_size": 8}
    if framework == "timesformer":
        config = transformers.TimesformerConfig(**options, num_frames=2)
        return transformers.TimesformerModel(config), sizes
    return transformers.ViTModel(transformers.ViTConfig(**options)), sizes


class TestSelection:
    def test_layers_keep_their_number_whatever_is_included(self):
        model = vit(depth=12)
        sm.sparsify(model, FIBOTTENTION, include=r"blocks\.(9|10)\.")
        assert (model.blocks[9].attn.layer_mask.layer, model.blocks[10].attn.layer_mask.layer) == (9, 10)
        assert model.blocks[9].attn.layer_mask.num_layers == 12
        assert type(model.blocks[0].attn).__name__ == "Attention"

    def test_a_layer_with_another_name_counts_in_its_stack(self):
        class Model(nn.Module):
            def __init__(self):
                super().__init__()
                self.first = nn.MultiheadAttention(8, 4, batch_first=True)
                self.layers = nn.ModuleList([self.first, *(nn.MultiheadAttention(8, 4) for _ in range(2))])

        places = {site.name: (site.layer, site.num_layers) for site in find_attention(Model())}
        assert places == {"first": (0, 3), "layers.1": (1, 3), "layers.2": (2, 3)}

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

    def test_a_layer_that_was_swapped_before_and_is_not_included_keeps_its_mask(self):
        model = vit()
        sm.sparsify(model, LOCAL, include=r"blocks\.0\.")
        report = sm.sparsify(model, FIBOTTENTION, include=r"blocks\.1\.")
        rows = {row.module: (row.mask, row.status, row.reason) for row in report.rows}
        assert rows["blocks.0.attn"] == ("local", "skipped", "not included, keeps `local`")
        assert rows["blocks.1.attn"] == ("fibottention", "swapped", "")
        assert rows["blocks.2.attn"] == ("", "skipped", "not included")

    @pytest.mark.parametrize("size", ["embed_dim", "num_heads"])
    @pytest.mark.parametrize("framework", ["torch", "timm", "timm with rope", "timesformer", "bare", "transformers"])
    def test_a_configuration_for_layers_of_another_size_is_refused_in_every_framework(self, framework, size):
        model, sizes = sized_model(framework)
        wrong = sizes[size] + 1
        before = [type(module) for module in model.modules()]
        message = f"{size}: the configuration is for {wrong}, but it is used with {sizes[size]}"
        with pytest.raises(sm.ConfigError, match=message):
            sm.sparsify(model, {**LOCAL, size: wrong})
        assert [type(module) for module in model.modules()] == before
        assert sm.sparsify(model, {**LOCAL, **sizes}).swapped

    @pytest.mark.parametrize("size", ["embed_dim", "num_heads"])
    @pytest.mark.parametrize("config", [LOCAL, FIBOTTENTION])
    def test_timms_layer_built_sparse_refuses_a_configuration_of_another_size(self, config, size):
        with pytest.raises(ValueError, match=f"{size}: the configuration is for 7, but it is used with"):
            sm.adapters.SparseTimmAttention.configured({**config, size: 7})(24, 3)
        sm.adapters.SparseTimmAttention.configured({**config, "embed_dim": 24, "num_heads": 3})(24, 3)

    def test_a_pattern_of_include_that_matches_nothing_says_what_there_is(self):
        message = r"include: `block.1.atn` matches none .*`blocks.0.attn`.*did you mean `blocks.1.attn`"
        with pytest.raises(ValueError, match=message):
            sm.sparsify(vit(), LOCAL, include=["blocks.0", "block.1.atn"])
        with pytest.raises(ValueError, match=r"include: `nope` matches none .*`blocks.11.attn`$"):
            sm.sparsify(vit(depth=12), LOCAL, include="nope")
        with pytest.raises(ValueError, match=r"`nope` matches none .*`blocks.11.attn` and 2 more$"):
            sm.sparsify(vit(depth=14), LOCAL, include="nope")
        report = sm.sparsify(vit(), LOCAL, include="nope", strict=False)
        assert {row.reason for row in report.rows} == {"not included"}

    def test_a_pattern_of_exclude_that_matches_nothing_is_logged(self, caplog):
        assert len(sm.sparsify(vit(), LOCAL, exclude="decoder").swapped) == 3
        assert "exclude: `decoder` matches none of the attention layers `blocks.0.attn`" in caplog.text

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
        for wrong in ([1], "blocks", {"blocks.0": "none"}):
            with pytest.raises(TypeError, match="overrides: expected a mapping of regular expressions to mappings"):
                sm.sparsify(vit(), LOCAL, overrides=wrong)
        sm.sparsify(vit(), LOCAL, overrides={"blocks.7": {"mask": "none"}}, strict=False)

    @pytest.mark.parametrize("argument", ["include", "exclude"])
    def test_a_pattern_that_is_no_regular_expression_is_named(self, argument):
        with pytest.raises(ValueError, match=rf"{argument}: `\(` is not a regular expression"):
            sm.sparsify(vit(), LOCAL, **{argument: ["blocks", "("]})
        for wrong in (3, [3], {"blocks"}):
            with pytest.raises(TypeError, match=f"{argument}: expected a regular expression or a sequence of them"):
                sm.sparsify(vit(), LOCAL, **{argument: wrong})

    @pytest.mark.parametrize(
        ("model", "got"), [("vit_base", "str"), (nn.MultiheadAttention, "the class MultiheadAttention"), ([], "list")]
    )
    def test_what_is_no_model_is_named(self, model, got):
        for call in (lambda: sm.sparsify(model, LOCAL), lambda: sm.densify(model)):
            with pytest.raises(TypeError, match=f"model: expected a torch.nn.Module, got {got}"):
                call()

    def test_nothing_to_swap_is_an_error_with_the_table(self):
        with pytest.raises(ValueError, match="model: nothing to swap in Linear"):
            sm.sparsify(nn.Linear(2, 2), LOCAL)
        with pytest.raises(ValueError, match=r"(?s)nothing to swap.*temporal_attn.*temporal attention"):
            sm.sparsify(nn.ModuleDict({"temporal_attn": CopiedAttention()}), LOCAL)
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


class Backwards(nn.Module):
    """Its layers are called in the opposite order of their registration."""

    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList([CopiedAttention() for _ in range(3)])

    def forward(self, x):
        for block in reversed(self.blocks):
            x = x + block(x)
        return x


class TestOrder:
    def test_a_run_on_the_sample_numbers_the_layers(self):
        model = Backwards()
        report = sm.sparsify(model, FIBOTTENTION, sample=torch.randn(1, 5, 24))
        assert [(row.module, row.layer) for row in report.rows] == [("blocks.2", 0), ("blocks.1", 1), ("blocks.0", 2)]
        assert [block.layer_mask.layer for block in model.blocks] == [2, 1, 0]
        assert not any(block._forward_pre_hooks for block in model.blocks)
        assert model.training

    def test_without_one_it_is_the_order_of_the_modules(self):
        model = Backwards()
        sm.sparsify(model, FIBOTTENTION)
        assert [block.layer_mask.layer for block in model.blocks] == [0, 1, 2]

    def test_doing_it_again_keeps_the_order(self):
        model, x = Backwards(), torch.randn(1, 5, 24)
        first = sm.sparsify(model, FIBOTTENTION, sample=x, verify=True)
        assert sm.sparsify(model, FIBOTTENTION, sample=x) == first

    def test_what_the_layers_were_before_does_not_disturb_the_run(self):
        model = Backwards()
        sm.sparsify(model, {**LOCAL, "grid": [2, 2], "num_prefix_tokens": 1})
        before = [block.layer_mask for block in model.blocks]
        with pytest.raises(sm.ConfigError):
            sm.sparsify(model, {**LOCAL, "num_heads": 7}, sample=torch.randn(1, 9, 24))
        assert [block.layer_mask for block in model.blocks] == before
        sm.sparsify(model, LOCAL, sample=torch.randn(1, 9, 24))
        assert [block.layer_mask.layer for block in model.blocks] == [2, 1, 0]

    def test_layers_that_are_not_called_come_last(self):
        model = Backwards()
        model.blocks.append(CopiedAttention())
        model.forward = lambda x: model.blocks[2](model.blocks[3](x))
        rows = sm.sparsify(model, LOCAL, sample=torch.randn(1, 5, 24)).rows
        assert [row.module for row in rows] == ["blocks.3", "blocks.2", "blocks.0", "blocks.1"]

    def test_the_fast_path_of_torchs_encoder_hides_no_layer(self):
        model = encoder()
        model.layers = nn.ModuleList(list(model.layers))
        x = torch.randn(2, 9, 12, dtype=torch.float64)
        # The last layer is registered first.
        model.layers._modules = {"1": model.layers[1], "0": model.layers[0]}
        rows = sm.sparsify(model, LOCAL, sample=x).rows
        assert [(row.module, row.layer) for row in rows] == [
            ("layers.1.self_attn", 0),
            ("layers.0.self_attn", 1),
        ]

    @pytest.mark.parametrize("sample", ["text", 3])
    def test_a_sample_of_the_wrong_type_is_named(self, sample):
        with pytest.raises(TypeError, match="sample: expected a tensor, positional arguments or keyword"):
            sm.sparsify(Backwards(), LOCAL, sample=sample)


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
        swapped = sm.sparsify(model, FIBOTTENTION).swapped
        report = sm.densify(model)
        assert [(row.module, row.mask, row.layer) for row in report.restored] == [
            (row.module, "fibottention", row.layer) for row in swapped
        ]
        assert "restored" in str(report)
        for (name, module), (_, original) in zip(model.named_modules(), before.named_modules(), strict=True):
            assert type(module) is type(original), name
            assert module.__dict__.keys() == original.__dict__.keys(), name
            assert len(module._forward_pre_hooks) == len(original._forward_pre_hooks)
        x = images(model) if make is vit else torch.randn(2, 9, 12, dtype=torch.float64)
        assert torch.equal(model(x), before(x))
        assert {row.reason for row in sm.densify(model).skipped} == {"dense already"}

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
            copied, of_channels = CopiedAttention(), ChannelAttention()
            assert not find_attention(of_channels)
            assert find_attention(copied)
            sm.sparsify(model, "mask: random\nmask_kwargs: {k: 3}")
        sm.sparsify(model, FIBOTTENTION, verify=True)
        sm.sparsify(copied, FIBOTTENTION)
        assert model(torch.randn(2, 3, 32, 32, device="meta", dtype=torch.float64)).shape == (2, 5)


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
