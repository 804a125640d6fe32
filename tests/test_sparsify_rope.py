"""`sparsify` on timm's models with rotary position embeddings: EVA, EVA-02, DINOv3, Perception Encoder, NaFlexViT."""

import copy
import io

import pytest
import torch
from torch import nn

import sparse_mhsa as sm
from comparison import assert_same
from models import FIBOTTENTION, LOCAL, timm
from sparse_mhsa.adapters.timm_layers import SparseAttention

SMALL = {"depth": 2, "embed_dim": 24, "num_heads": 3, "num_classes": 5}
MODELS = {
    "eva": ("eva_large_patch14_196", {"img_size": 56}),
    "eva02": ("eva02_tiny_patch14_224", {"img_size": 56}),
    "eva02, separate projections": ("eva02_tiny_patch14_224", {"img_size": 56, "qkv_fused": False}),
    "dinov3": ("vit_small_patch16_dinov3", {"img_size": 64}),
    "dinov3, biased": ("vit_small_patch16_dinov3_qkvb", {"img_size": 64}),
    "mixed frequencies": ("vit_base_patch16_rope_mixed_224", {"img_size": 64}),
    "registers": ("vit_base_patch16_rope_reg1_gap_256", {"img_size": 64}),
    "perception encoder": ("vit_pe_core_tiny_patch16_384", {"img_size": 64}),
}


@pytest.fixture(params=MODELS)
def model(request):
    name, options = MODELS[request.param]
    model = timm.create_model(name, **SMALL, **options).double().eval()
    # What starts at zero or close to it would hide what is left out.
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.3)
    return model


def images(model, batch=2):
    return torch.randn(batch, 3, *model.patch_embed.img_size, dtype=torch.float64)


def masked(model, config):
    """The dense model, whose layers get the masks of ``config`` as their attn_mask."""
    model, prefix = copy.deepcopy(model), model.num_prefix_tokens
    for layer, block in enumerate(model.blocks):
        place = {"layer": layer, "num_layers": len(model.blocks), "num_prefix_tokens": prefix}
        mask = sm.Mask.from_config(config, 16 + prefix, 3, **place).to_dense()
        forward = block.attn.forward
        block.attn.forward = lambda x, forward=forward, mask=mask, **kw: forward(x, **{**kw, "attn_mask": mask})
    return model


class TestRotary:
    @pytest.mark.filterwarnings("ignore:There is a performance drop:UserWarning")  # of a dense pooling, torch's own
    def test_it_is_a_function_of_its_parameters(self, model):
        """Which then are tensors, and no parameters."""
        sm.sparsify(model, FIBOTTENTION)
        x = images(model)
        parameters = {name: parameter.detach() for name, parameter in model.named_parameters()}

        def loss(parameters, sample):
            return torch.func.functional_call(model, parameters, (sample[None],)).square().sum()

        got = torch.func.vmap(torch.func.grad(loss), (None, 0))(parameters, x)
        model(x[1:]).square().sum().backward()
        for name, parameter in model.named_parameters():
            if parameter.grad is not None:
                torch.testing.assert_close(got[name][1], parameter.grad)

    def test_the_full_mask_is_the_dense_model(self, model):
        x = images(model)
        dense = model(x)
        truth = torch.autograd.grad(dense.square().sum(), list(model.parameters()), allow_unused=True)
        sm.sparsify(model, "mask: none")
        got = model(x)
        assert_same(got.detach(), dense.detach(), atol=1e-12)
        mine = torch.autograd.grad(got.square().sum(), list(model.parameters()), allow_unused=True)
        for a, b in zip(mine, truth, strict=True):
            assert (a is None) == (b is None)
            if a is not None:
                assert_same(a, b, rtol=1e-9, atol=1e-9)

    @pytest.mark.parametrize("config", [LOCAL, FIBOTTENTION], ids=["local", "fibottention"])
    def test_the_swapped_model_is_the_dense_one_with_the_masks(self, model, config):
        x = images(model)
        expected = masked(model, config)(x).detach()
        dense = model(x).detach()
        report = sm.sparsify(model, config, verify=True)
        assert [(row.module, row.layer) for row in report.swapped] == [(f"blocks.{i}.attn", i) for i in range(2)]
        assert all(isinstance(block.attn, SparseAttention) for block in model.blocks)
        got = model(x)
        assert_same(got.detach(), expected, atol=1e-11)
        assert not torch.allclose(got, dense)
        got.sum().backward()
        assert all(torch.isfinite(p.grad).all() for p in model.parameters() if p.grad is not None)

    def test_state_dicts_load_both_ways_and_densify_is_the_inverse(self, model):
        x, dense = images(model), copy.deepcopy(model)
        sm.sparsify(model, LOCAL)
        model.load_state_dict(dense.state_dict(), strict=True)
        dense.load_state_dict(model.state_dict(), strict=True)
        sm.densify(model)
        for (name, module), (_, original) in zip(model.named_modules(), dense.named_modules(), strict=True):
            assert type(module) is type(original), name
            assert module.__dict__.keys() == original.__dict__.keys(), name
        assert torch.equal(model(x), dense(x))

    def test_gradient_checkpointing(self, model):
        x = images(model).requires_grad_()
        sm.sparsify(model, LOCAL)
        model.train()
        plain = torch.autograd.grad(model(x).square().sum(), x)[0]
        model.set_grad_checkpointing()
        assert torch.equal(torch.autograd.grad(model(x).square().sum(), x)[0], plain)

    def test_saved_and_loaded(self, model):
        x = images(model)
        sm.sparsify(model, LOCAL)
        file = io.BytesIO()
        torch.save(model, file)
        file.seek(0)
        assert torch.equal(torch.load(file, weights_only=False)(x), model(x))


def test_grouped_queries():
    torch.manual_seed(0)
    layer = timm.layers.attention.AttentionRope(24, 6, qkv_fused=False, num_kv_heads=2).double()
    rope = torch.randn(8, 8, dtype=torch.float64)
    x = torch.randn(2, 9, 24, dtype=torch.float64)
    keep = torch.rand(2, 1, 9, 9) < 0.7
    calls = [{}, {"rope": rope}, {"rope": rope, "attn_mask": keep}, {"rope": rope, "is_causal": True}]
    dense = [layer(x, **call).detach() for call in calls]
    sm.sparsify(layer, "mask: none")
    for call, expected in zip(calls, dense, strict=True):
        assert_same(layer(x, **call).detach(), expected, atol=1e-12)


def test_a_backend_without_grouped_queries_gets_the_heads_it_needs():
    layer = timm.layers.attention.AttentionRope(24, 6, qkv_fused=False, num_kv_heads=2)
    sm.sparsify(layer, "backend: efficient", verify=True, sample=torch.randn(2, 9, 24))


def test_naflex_models_pass_their_padding_as_masks():
    model = timm.create_model("naflexvit_base_patch16_gap", depth=2, embed_dim=24, num_heads=3, num_classes=5)
    model = model.double().eval()
    batch = {
        "patches": torch.randn(2, 9, 3 * 16 * 16, dtype=torch.float64),
        "patch_coord": torch.cartesian_prod(torch.arange(3), torch.arange(3)).expand(2, -1, -1),
        "patch_valid": torch.arange(9) < torch.tensor([[9], [6]]),
    }
    dense = model(batch).detach()
    report = sm.sparsify(model, "mask: none")
    assert {row.adapter for row in report.rows} == {"timm"}
    assert_same(model(batch).detach(), dense, atol=1e-12)
    sm.sparsify(model, LOCAL, verify=True, sample=(batch,))
    assert model.blocks[0].attn.layer_mask.num_prefix_tokens == model.num_prefix_tokens
    assert torch.isfinite(model(batch)).all()


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
def test_fullgraph_compilation():
    torch._dynamo.reset()
    model = timm.create_model("vit_small_patch16_dinov3", img_size=64, **SMALL).double().eval()
    sm.sparsify(model, FIBOTTENTION)
    x = images(model)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    assert_same(compiled(x).detach(), model(x).detach(), atol=1e-12)
    torch._dynamo.reset()


@pytest.mark.parametrize(
    ("name", "options", "reason"),
    [
        ("beit_base_patch16_224", {}, "adds biases by relative position"),
        ("swin_tiny_patch4_window7_224", {}, "adds biases by relative position"),
        ("vit_relpos_small_patch16_224", {}, "adds biases by relative position"),
        ("davit_tiny", {}, "attends within windows already"),
    ],
)
def test_what_is_not_supported_is_skipped_with_its_reason(name, options, reason):
    with torch.device("meta"):
        model = timm.create_model(name, **options)
    report = sm.sparsify(model, LOCAL, strict=False)
    assert not report.swapped
    assert any(reason in row.reason for row in report.skipped), report
