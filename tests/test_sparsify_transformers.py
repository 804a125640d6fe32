"""`sparsify` on models of Hugging Face transformers, built small with random weights."""

import copy
import io
import json
import logging
import pickle

import pytest
import torch
from torch import nn

import sparse_mhsa as sm
from comparison import assert_same
from models import FIBOTTENTION, LOCAL
from sparse_mhsa.adapters import find_attention
from sparse_mhsa.adapters.transformers import restore
from sparse_mhsa.layer import SparseLayer

transformers = pytest.importorskip("transformers")
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning:transformers", "ignore::FutureWarning:transformers")

SIZES = {"hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 3, "intermediate_size": 32}
IMAGE = {"image_size": 32, "patch_size": 8}
TEXT = {**SIZES, "vocab_size": 50, "max_position_embeddings": 16, "bos_token_id": 0, "eos_token_id": 1}
CLIP = {"text_config": TEXT, "vision_config": {**SIZES, **IMAGE}}

VISION = {
    # name: (what is built, its configuration, number of tokens before the grid, grid, or None where the size is open)
    "ViT": ("ViTModel", {}, 1, (4, 4)),
    "DeiT": ("DeiTModel", {}, 2, (4, 4)),
    "DINOv2": ("Dinov2Model", {}, 1, None),
    "DINOv2 with registers": ("Dinov2WithRegistersModel", {"num_register_tokens": 4}, 5, None),
    "DINOv3": ("DINOv3ViTModel", {"num_register_tokens": 2}, 3, None),
    "CLIP": ("CLIPVisionModel", {}, 1, (4, 4)),
    "SigLIP": ("SiglipVisionModel", {}, 0, (4, 4)),
    "I-JEPA": ("IJepaModel", {}, 0, (4, 4)),
    "VideoMAE": ("VideoMAEModel", {"num_frames": 4, "tubelet_size": 2}, 0, (2, 4, 4)),
    "ViViT": ("VivitModel", {"num_frames": 4, "tubelet_size": [2, 8, 8]}, 1, (2, 4, 4)),
}
EDGES = "sparse_mhsa_test_edges"


def build(name, **options):
    model_class = getattr(transformers, name)
    config = model_class.config_class(**{**SIZES, **IMAGE, **options})
    return randomised(model_class(config))


def randomised(model):
    """In float64, with weights that are large enough for attention to matter."""
    model = model.double().eval()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.3)
    return model


def pixels(model, batch=2):
    frames = getattr(model.config, "num_frames", None)
    return torch.randn(batch, *(() if frames is None else (frames,)), 3, 32, 32, dtype=torch.float64)


@pytest.fixture(params=VISION)
def vision(request):
    name, options, prefix, grid = VISION[request.param]
    return build(name, **options), prefix, grid


@pytest.fixture(params=["ViT", "CLIP", "DINOv3", "VideoMAE"])
def model(request):
    """One of each way in which layers are made."""
    name, options, _, _ = VISION[request.param]
    return build(name, **options)


def dense_over_edges(module, query, key, value, attention_mask, scaling=None, dropout=0.0, **kwargs):
    """Dense attention that is told the edges: the oracle."""
    scores = query @ key.transpose(-1, -2) * (query.shape[-1] ** -0.5 if scaling is None else scaling)
    if attention_mask is not None:
        scores = scores.masked_fill(~attention_mask, -torch.inf)
    # A query whose keys are all padding has weights of zero.
    weights = scores.masked_fill(~module.keep[None], -torch.inf).softmax(-1).nan_to_num(0.0)
    return (weights @ value).transpose(1, 2).contiguous(), weights


def oracle(model, config, num_tokens, prefix, select=""):
    """The dense model with the edges of ``config`` in its layers."""
    transformers.AttentionInterface.register(EDGES, dense_over_edges)
    transformers.AttentionMaskInterface.register(EDGES, transformers.masking_utils.sdpa_mask)
    model = copy.deepcopy(model)
    sites = [site for site in find_attention(model) if select in site.name and site.dense_by_design is None]
    for site in sites:
        place = {"layer": site.layer, "num_layers": site.num_layers, "num_prefix_tokens": prefix, "grid": site.grid}
        site.module.keep = sm.Mask.from_config(config, num_tokens, site.num_heads, **place).to_dense()
        site.module.config._attn_implementation = EDGES
    return model


class TestVision:
    @pytest.mark.parametrize("implementation", ["eager", "sdpa"])
    def test_the_full_mask_is_the_dense_model(self, vision, implementation):
        model, _, _ = vision
        model.set_attn_implementation(implementation)
        x = pixels(model)
        dense = model(x).last_hidden_state
        truth = torch.autograd.grad(dense.square().sum(), list(model.parameters()), allow_unused=True)
        sm.sparsify(model, "mask: none")
        got = model(x).last_hidden_state
        # The models' own attention computes its softmax in float32.
        assert_same(got.detach(), dense.detach(), atol=1e-10 if implementation == "sdpa" else 1e-5)
        mine = torch.autograd.grad(got.square().sum(), list(model.parameters()), allow_unused=True)
        for a, b in zip(mine, truth, strict=True):
            assert (a is None) == (b is None)
            if a is not None:
                assert_same(a, b, atol=(1e-9 if implementation == "sdpa" else 1e-4) * (1.0 + float(b.abs().max())))

    @pytest.mark.parametrize("config", [LOCAL, FIBOTTENTION], ids=["local", "fibottention"])
    def test_the_swapped_model_is_the_dense_one_with_the_masks(self, vision, config):
        model, prefix, grid = vision
        x = pixels(model)
        num_tokens = prefix + (32 if "num_frames" in model.config.to_dict() else 16)
        expected = oracle(model, config, num_tokens, prefix)(x, output_attentions=True)
        dense = model(x).last_hidden_state.detach()
        report = sm.sparsify(model, config, verify=True)
        assert [row.layer for row in report.swapped] == [0, 1]
        assert {row.num_tokens for row in report.swapped} == {None if grid is None else num_tokens}
        got = model(x)
        assert_same(got.last_hidden_state.detach(), expected.last_hidden_state.detach(), atol=1e-10)
        assert not torch.allclose(got.last_hidden_state, dense)
        got.last_hidden_state.sum().backward()
        assert all(torch.isfinite(p.grad).all() for p in model.parameters() if p.grad is not None)

        got = model(x, output_attentions=True)
        assert len(got.attentions) == 2
        for mine, truth in zip(got.attentions, expected.attentions, strict=True):
            assert_same(mine.detach(), truth.detach(), atol=1e-10)

    def test_grid_and_prefix_are_inferred(self, vision):
        model, prefix, grid = vision
        sites = [site for site in find_attention(model) if site.dense_by_design is None]
        assert len(sites) == 2
        assert {(site.num_prefix_tokens, site.grid) for site in sites} == {(prefix, grid)}

    def test_densify_is_the_exact_inverse(self, model):
        before, x = copy.deepcopy(model), pixels(model)
        parameters = dict(model.named_parameters())
        sm.sparsify(model, LOCAL)
        sm.sparsify(model, FIBOTTENTION)
        assert all(parameter is parameters[name] for name, parameter in model.named_parameters())
        model.load_state_dict(before.state_dict(), strict=True)
        before.load_state_dict(model.state_dict(), strict=True)
        sm.densify(model)
        for (name, module), (_, original) in zip(model.named_modules(), before.named_modules(), strict=True):
            assert type(module) is type(original), name
            assert module.__dict__.keys() == original.__dict__.keys(), name
        assert model.config.to_dict() == before.config.to_dict()
        assert model.config._attn_implementation == before.config._attn_implementation
        assert torch.equal(model(x).last_hidden_state, before(x).last_hidden_state)

    def test_saved_and_restored(self, model, tmp_path):
        x = pixels(model)
        dense = model(x).last_hidden_state.detach()
        config = {"mask": "random", "mask_kwargs": {"k": 2, "keep_cls_dense": False}}
        first = next(site.name for site in find_attention(model))
        sm.sparsify(model, config, overrides={f"^{first}$": {"mask": "local", "mask_kwargs": {"window": 2}}})
        sparse = model(x).last_hidden_state.detach()
        model.save_pretrained(tmp_path)
        loaded = type(model).from_pretrained(tmp_path, dtype=torch.float64).eval()
        # Rotary frequencies are not saved, and float32 when they are computed anew.
        assert_same(loaded(x).last_hidden_state.detach(), dense, atol=1e-7)
        report = restore(loaded)
        assert [row.mask for row in report.swapped] == ["local", "random"]
        assert_same(loaded(x).last_hidden_state.detach(), sparse, atol=1e-7)


class TestInterface:
    def test_both_interfaces_know_our_name(self):
        sm.sparsify(build("ViTModel"), LOCAL)
        assert "sparse_mhsa" in transformers.AttentionInterface()
        assert "sparse_mhsa" in transformers.AttentionMaskInterface()

    def test_the_implementation_can_be_changed_at_run_time_and_back(self):
        model = build("ViTModel")
        x = pixels(model)
        dense = model(x).last_hidden_state.detach()
        sm.sparsify(model, LOCAL)
        sparse = model(x).last_hidden_state.detach()
        model.set_attn_implementation("eager")
        assert_same(model(x).last_hidden_state.detach(), dense, atol=1e-5)
        with pytest.raises(RuntimeError, match="stayed dense"):
            sm.adapters._verify(model, [(site, site.layer_mask) for site in find_attention(model)], x)
        model.set_attn_implementation("sparse_mhsa")
        assert torch.equal(model(x).last_hidden_state, sparse)

    def test_a_mask_that_is_not_in_use_says_so(self):
        model = build("ViTModel")
        sm.sparsify(model, LOCAL)
        assert "not in use" not in repr(model)
        model.set_attn_implementation("eager")
        assert repr(model).count("mask=local") == repr(model).count("not in use: attn_implementation is `eager`") == 2
        sm.sparsify(model, LOCAL, verify=True)
        assert "not in use" not in repr(model)
        sm.densify(model)
        assert model.config._attn_implementation == "eager"

    def test_a_model_that_names_us_but_was_not_swapped_is_refused(self):
        sm.adapters.transformers.register()
        model = transformers.ViTModel._from_config(
            transformers.ViTConfig(**SIZES, **IMAGE), attn_implementation="sparse_mhsa"
        )
        x = torch.randn(1, 3, 32, 32)
        with pytest.raises(RuntimeError, match=r"ViTAttention has no mask; call sparse_mhsa.sparsify\(model, config\)"):
            model(x)
        sm.sparsify(model, LOCAL, verify=True)
        model(x)

    def test_layers_beside_swapped_ones_stay_dense(self):
        model = build("ViTModel")
        x = pixels(model)
        expected = oracle(model, LOCAL, 17, 1, "layers.0")
        expected.layers[1].attention.keep = torch.ones(3, 17, 17, dtype=torch.bool)
        expected = expected(x, output_attentions=True)
        sm.sparsify(model, LOCAL, include="layers.0")
        got = model(x, output_attentions=True)
        assert_same(got.last_hidden_state.detach(), expected.last_hidden_state.detach(), atol=1e-10)
        for mine, truth in zip(got.attentions, expected.attentions, strict=True):
            assert_same(mine.detach(), truth.detach(), atol=1e-10)

    @pytest.mark.parametrize("config", ["mask: none", LOCAL], ids=["none", "local"])
    def test_padding_masks_arrive(self, config):
        model = randomised(transformers.BertModel(transformers.BertConfig(**TEXT)))
        tokens = torch.randint(2, 50, (2, 9))
        padding = torch.arange(9) < torch.tensor([[9], [6]])
        expected = oracle(model, config, 9, None)(tokens, attention_mask=padding.long()).last_hidden_state
        sm.sparsify(model, config, sample={"input_ids": tokens}, verify=True)
        got = model(tokens, attention_mask=padding.long()).last_hidden_state
        assert_same(got[padding].detach(), expected[padding].detach(), atol=1e-10)

    def test_masks_of_padding_take_no_quadratic_memory(self):
        mask = sm.adapters.transformers.attention_mask(
            2,
            1000,
            1000,
            attention_mask=torch.ones(2, 1000, dtype=torch.long).tril(900),
            mask_function=transformers.masking_utils.bidirectional_mask_function,
        )
        assert mask.shape == (2, 1, 1000, 1000)
        assert mask.untyped_storage().nbytes() == 2000
        expected = transformers.masking_utils.sdpa_mask(
            2,
            1000,
            1000,
            attention_mask=torch.ones(2, 1000, dtype=torch.bool).tril(900),
            mask_function=transformers.masking_utils.bidirectional_mask_function,
        )
        assert torch.equal(mask, expected)

    def test_what_cannot_be_honoured_is_an_error(self):
        model = build("ViTModel")
        sm.sparsify(model, LOCAL)
        with pytest.raises(ValueError, match="softcap: SparseViTAttention asks for it"):
            model(pixels(model), softcap=3.0)
        sm.sparsify(model, {"mask": "importance", "mask_kwargs": {"score": "embedding_norm", "k": 3}})
        with pytest.raises(ValueError, match="does not pass that input on"):
            model(pixels(model))

    @pytest.mark.parametrize("config", ["backend: efficient", "mask: topk"])
    def test_other_mechanisms(self, config):
        model = build("ViTModel")
        sm.sparsify(model, config, verify=True)
        assert torch.isfinite(model(pixels(model)).last_hidden_state).all()

    def test_dropout_comes_from_torchs_generator(self):
        model = build("ViTModel", attention_probs_dropout_prob=0.5)
        sm.sparsify(model, LOCAL)
        model.train()
        x = pixels(model)
        outputs = []
        for seed in (3, 4, 3):
            torch.manual_seed(seed)
            outputs.append(model(x).last_hidden_state.detach())
        assert torch.equal(outputs[0], outputs[2])
        assert not torch.equal(outputs[0], outputs[1])

    def test_gradient_checkpointing(self):
        model = build("ViTModel").train()
        sm.sparsify(model, LOCAL)
        x = pixels(model).requires_grad_()
        plain = torch.autograd.grad(model(x).last_hidden_state.square().sum(), x)[0]
        model.gradient_checkpointing_enable()
        assert torch.equal(torch.autograd.grad(model(x).last_hidden_state.square().sum(), x)[0], plain)

    @pytest.mark.parametrize("how", ["deepcopy", "pickle", "torch.save"])
    def test_copies_of_a_swapped_model(self, how):
        model = build("ViTModel")
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
        x = pixels(model)
        assert torch.equal(twin(x).last_hidden_state, model(x).last_hidden_state)
        assert isinstance(twin.layers[0].attention, type(model.layers[0].attention))
        sm.densify(twin)
        assert not any(isinstance(module, SparseLayer) for module in twin.modules())
        assert any(isinstance(module, SparseLayer) for module in model.modules())

    def test_models_on_the_meta_device(self):
        with torch.device("meta"):
            model = transformers.ViTModel(transformers.ViTConfig(**SIZES, **IMAGE)).eval()
        sm.sparsify(model, FIBOTTENTION, verify=True)

    def test_verifying_draws_nothing_from_the_default_generator(self):
        model, state = build("ViTModel"), torch.get_rng_state()
        sm.sparsify(model, LOCAL, verify=True)
        assert torch.equal(torch.get_rng_state(), state)

    @pytest.mark.filterwarnings("ignore:.*torch.jit.*:DeprecationWarning")
    def test_scripted_modules_beside_it_do_no_harm(self):
        class Wrapper(nn.Module):
            def __init__(self):
                super().__init__()
                self.head = torch.jit.trace(nn.Linear(3, 3), torch.randn(1, 3))
                self.backbone = build("ViTModel")

        assert len(sm.sparsify(Wrapper(), LOCAL).swapped) == 2

    def test_the_mask_is_shown(self):
        model = build("ViTModel")
        sm.sparsify(model, LOCAL)
        assert "mask=local, layer=1, num_tokens=17, density=0.2734" in repr(model.layers[1])

    @pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
    def test_fullgraph_compilation(self):
        torch._dynamo.reset()
        model = build("ViTModel")
        sm.sparsify(model, FIBOTTENTION)
        x = pixels(model)
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
        assert_same(compiled(x).last_hidden_state.detach(), model(x).last_hidden_state.detach(), atol=1e-12)
        torch._dynamo.reset()


SAVED = {
    # what is saved: its configuration, beside those of VISION
    **{name: options for name, options, _, _ in VISION.values()},
    "ViTForImageClassification": {"num_labels": 3},
    "DeiTForImageClassificationWithTeacher": {},
    "ViTMAEForPreTraining": {
        "decoder_hidden_size": 24,
        "decoder_num_hidden_layers": 1,
        "decoder_num_attention_heads": 3,
        "decoder_intermediate_size": 32,
    },
    "VideoMAEForVideoClassification": {"num_frames": 4, "tubelet_size": 2},
    "TimesformerModel": {"num_frames": 4},
    "TimesformerForVideoClassification": {"num_frames": 4, "attention_type": "joint_space_time"},
    "CLIPModel": None,
    "SiglipModel": None,
    "LlamaForCausalLM": None,
}


class TestRestore:
    @pytest.mark.parametrize("name", SAVED)
    def test_every_family_keeps_its_attention_beside_the_weights(self, name, tmp_path):
        model_class, options = getattr(transformers, name), SAVED[name]
        if options is not None:
            model = build(name, **options)
        elif name == "LlamaForCausalLM":
            model = randomised(model_class(model_class.config_class(**TEXT)))
        else:
            text = {**TEXT, "projection_size": 24} if name == "SiglipModel" else TEXT
            model = randomised(
                model_class(model_class.config_class(text_config=text, vision_config={**SIZES, **IMAGE}))
            )
        causal = name == "LlamaForCausalLM"
        inputs = {"use_cache": False} if causal else {"pixel_values": pixels(model, 1)}
        if causal or options is None:
            inputs["input_ids"] = torch.randint(2, 50, (1, 16))

        def run(model):
            torch.manual_seed(3)  # of what masked autoencoders drop
            found = model(**inputs)
            names = ("last_hidden_state", "logits", "image_embeds")
            return next(found[key] for key in names if found.get(key) is not None).detach()

        dense = run(model)
        config = {"mask": "local", "mask_kwargs": {"window": 1, "causal": causal}}
        swapped = sm.sparsify(model, config, include="self_attn" if causal else None).swapped
        sparse = run(model)
        assert not torch.allclose(sparse, dense)
        model.save_pretrained(tmp_path)
        loaded = model_class.from_pretrained(tmp_path, dtype=torch.float64).eval()
        # Rotary frequencies are not saved, and float32 when they are computed anew.
        assert_same(run(loaded), dense, atol=1e-7)
        assert [row.module for row in restore(loaded).swapped] == [row.module for row in swapped]
        assert_same(run(loaded), sparse, atol=1e-7)

    def test_a_model_without_a_saved_configuration_is_named(self):
        with pytest.raises(ValueError, match="the configuration of ViTModel has no `sparse_mhsa`"):
            restore(build("ViTModel"))

    def test_the_configuration_is_readable_beside_the_weights(self, tmp_path):
        model = build("ViTModel")
        sm.sparsify(model, LOCAL)
        model.save_pretrained(tmp_path)
        saved = json.loads((tmp_path / "config.json").read_text())["sparse_mhsa"]
        assert list(saved) == ["layers.0.attention", "layers.1.attention"]
        assert saved["layers.0.attention"]["mask_kwargs"]["window"] == 1


class TestTwoTowers:
    @pytest.mark.parametrize("name", ["CLIP", "Siglip"])
    def test_pixels_are_swapped_and_text_stays_dense_unless_named(self, name):
        config = getattr(transformers, f"{name}Config")(
            **{k: v for k, v in CLIP.items() if name == "CLIP" or "dim" not in k}
        )
        model = randomised(getattr(transformers, f"{name}Model")(config))
        inputs = {"input_ids": torch.randint(2, 50, (2, 16)), "pixel_values": torch.randn(2, 3, 32, 32).double()}
        inputs["input_ids"][:, -1] = 1
        dense = model(**inputs)
        report = sm.sparsify(model, LOCAL, verify=True, sample=inputs)
        assert {row.module.split(".")[0] for row in report.swapped} == {"vision_model"}
        assert {row.reason for row in report.skipped} <= {"text", "cross-attention"}
        got = model(**inputs)
        assert torch.equal(got.text_embeds, dense.text_embeds)
        assert not torch.allclose(got.image_embeds, dense.image_embeds)

        sm.densify(model)
        sm.sparsify(model, LOCAL, include="text_model", verify=True, sample=inputs)
        got = model(**inputs)
        assert torch.equal(got.image_embeds, dense.image_embeds)
        assert not torch.allclose(got.text_embeds, dense.text_embeds)

    def test_naming_us_again_leaves_the_other_tower_dense(self):
        """`set_attn_implementation` names one implementation in the configurations of both."""
        model = randomised(transformers.CLIPModel(transformers.CLIPConfig(**CLIP)))
        inputs = {"input_ids": torch.randint(2, 50, (1, 9)), "pixel_values": pixels(model, 1)}
        dense = model(**inputs)
        sm.sparsify(model, LOCAL)
        sparse = model(**inputs)
        model.set_attn_implementation("sdpa")
        assert_same(model(**inputs).image_embeds.detach(), dense.image_embeds.detach(), atol=1e-12)
        model.set_attn_implementation("sparse_mhsa")
        got = model(**inputs)
        assert torch.equal(got.image_embeds, sparse.image_embeds)
        assert_same(got.text_embeds.detach(), dense.text_embeds.detach(), atol=1e-12)


class TestDecoder:
    """Causal layers with fewer heads for keys; dense unless named."""

    @staticmethod
    def model(**options):
        options = {**TEXT, "num_attention_heads": 6, "num_key_value_heads": 2, "hidden_size": 48, **options}
        return randomised(transformers.MistralForCausalLM(transformers.MistralConfig(**options)))

    def test_autocast_makes_one_dtype_of_rotated_keys_and_values(self):
        """Queries and keys come out of the rotation in float32, values out of their projection in bfloat16."""
        tokens = torch.randint(2, 50, (2, 9))
        model = self.model().float()
        with torch.autocast("cpu", torch.bfloat16):
            dense = model(tokens, use_cache=False).logits
        sm.sparsify(model, "mask: none", include="self_attn")
        with torch.autocast("cpu", torch.bfloat16):
            got = model(tokens, use_cache=False).logits
        got.sum().backward()
        assert_same(got.detach(), dense.detach(), atol=0.05 * float(dense.detach().abs().max()))

    def test_logits_of_zero_do_not_let_it_see_the_future(self):
        model = self.model()
        config = {"mask": "local", "mask_kwargs": {"window": 2, "causal": True}, "masked_logits": "zero"}
        sm.sparsify(model, config, include="self_attn")
        with pytest.raises(ValueError, match="attn_mask: expected none with `masked_logits: zero`"):
            model(torch.randint(2, 50, (1, 9)), use_cache=False)

    def test_it_is_dense_unless_named(self):
        model = self.model()
        assert {row.reason for row in sm.sparsify(model, LOCAL, strict=False).rows} == {"decoder"}

    @pytest.mark.parametrize("padded", [False, True])
    def test_a_causal_local_mask_is_a_sliding_window(self, padded):
        tokens = torch.randint(2, 50, (2, 12))
        real = torch.ones(2, 12, dtype=torch.long)
        if padded:
            real[1, :4] = 0
        windowed = self.model(sliding_window=3)
        model = self.model(sliding_window=None)
        model.load_state_dict(windowed.state_dict(), strict=True)
        expected = windowed(tokens, attention_mask=real, use_cache=False).logits
        config = {"mask": "local", "mask_kwargs": {"window": 2, "causal": True}}
        sm.sparsify(model, config, include="self_attn", verify=True, sample={"input_ids": tokens, "use_cache": False})
        got = model(tokens, attention_mask=real, use_cache=False).logits
        assert_same(got[real.bool()].detach(), expected[real.bool()].detach(), atol=1e-10)

    @pytest.mark.filterwarnings("ignore::UserWarning")
    def test_generation_is_that_of_a_sliding_window(self):
        tokens = torch.randint(2, 50, (2, 7))
        windowed = self.model(sliding_window=3, eos_token_id=None)
        model = self.model(sliding_window=None, eos_token_id=None)
        model.load_state_dict(windowed.state_dict(), strict=True)
        config = {"mask": "local", "mask_kwargs": {"window": 2, "causal": True}}
        sm.sparsify(model, config, include="self_attn")
        options = {"max_new_tokens": 5, "do_sample": False}
        expected = windowed.generate(tokens, **options)
        assert torch.equal(model.generate(tokens, use_cache=False, **options), expected)
        with pytest.raises(ValueError, match=r"1 queries and 8 keys in SparseMistralAttention; .* use_cache=False"):
            model.generate(tokens, **options)

    def test_the_full_mask_stays_causal(self):
        tokens = torch.randint(2, 50, (2, 12))
        model = self.model(sliding_window=None)
        expected = model(tokens, use_cache=False).logits
        sm.sparsify(model, "mask: none", include="self_attn")
        assert_same(model(tokens, use_cache=False).logits.detach(), expected.detach(), atol=1e-10)


class TestTimesformer:
    """It has no attention interface: naming an implementation changes nothing."""

    @staticmethod
    def model(kind="divided_space_time"):
        return build("TimesformerModel", num_frames=4, attention_type=kind)

    def test_the_trap_is_there(self, caplog):
        sm.adapters.transformers.register()
        model, logger = self.model(), logging.getLogger("transformers")
        x = pixels(model)
        dense = model(x).last_hidden_state
        logger.addHandler(caplog.handler)
        model.config._attn_implementation = "sparse_mhsa"
        logger.removeHandler(caplog.handler)
        assert torch.equal(model(x).last_hidden_state, dense)

    @pytest.mark.parametrize("kind", ["divided_space_time", "space_only", "joint_space_time"])
    def test_the_full_mask_is_the_dense_model(self, kind):
        model = self.model(kind)
        x = pixels(model)
        dense = model(x, output_attentions=True)
        sm.sparsify(model, "mask: none", include="attention")
        got = model(x, output_attentions=True)
        assert_same(got.last_hidden_state.detach(), dense.last_hidden_state.detach(), atol=1e-11)
        for mine, truth in zip(got.attentions, dense.attentions, strict=True):
            assert_same(mine.detach(), truth.detach(), atol=1e-12)

    def test_space_is_swapped_and_time_stays_dense_unless_named(self):
        model = self.model()
        report = sm.sparsify(model, LOCAL, verify=True)
        rows = {row.module: (row.status, row.reason, row.num_tokens) for row in report.rows}
        assert rows["encoder.layer.1.attention.attention"] == ("swapped", "", 17)
        assert rows["encoder.layer.1.temporal_attention.attention"] == ("skipped", "temporal attention", None)
        report = sm.sparsify(model, LOCAL, include="temporal_attention", verify=True)
        assert len(report.swapped) == 2
        temporal = model.encoder.layer[0].temporal_attention.attention
        assert temporal.layer_mask.num_prefix_tokens == 0
        assert torch.equal(temporal.mask(4).to_dense()[0], torch.ones(4, 4).tril(1).triu(-1).bool())

    def test_the_weights_of_space_are_those_of_the_mask(self):
        model = self.model()
        x = pixels(model, batch=1)
        sm.sparsify(model, LOCAL)
        kept = model.encoder.layer[0].attention.attention.mask(17).to_dense()
        weights = model(x, output_attentions=True).attentions[0]
        assert weights.shape == (4, 3, 17, 17)
        assert torch.equal(weights > 0, kept.expand(4, -1, -1, -1))

    def test_joint_attention_has_time_fastest(self):
        model = self.model("joint_space_time")
        config = {"mask": "space_time", "mask_kwargs": {"kind": "space"}}
        sm.sparsify(model, config, verify=True)
        attention = model.encoder.layer[0].attention.attention
        kept = attention.mask(65).to_dense()[0, 1:, 1:]
        frame = torch.arange(64) % 4
        assert torch.equal(kept, frame[:, None] == frame)

    def test_densify_and_state_dicts(self):
        model = self.model()
        before = copy.deepcopy(model)
        sm.sparsify(model, LOCAL)
        model.load_state_dict(before.state_dict(), strict=True)
        sm.densify(model)
        for (name, module), (_, original) in zip(model.named_modules(), before.named_modules(), strict=True):
            assert type(module) is type(original), name
            assert module.__dict__.keys() == original.__dict__.keys(), name
