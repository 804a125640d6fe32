"""LoRA of PEFT on top of swapped models, and swapping models that have it."""

import copy

import pytest
import torch
from torch import nn

import sparse_mhsa as sm
from comparison import assert_same
from models import FIBOTTENTION, encoder, timm, vit
from sparse_mhsa.layer import SparseLayer

peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")
pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")


def eva():
    return timm.create_model("eva02_tiny_patch14_224", img_size=56, depth=2, embed_dim=24, num_heads=3).double()


def hugging_face():
    sizes = {"hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 3, "intermediate_size": 32}
    config = transformers.ViTConfig(**sizes, image_size=32, patch_size=8, num_labels=5)
    return transformers.ViTForImageClassification(config).double()


MODELS = {
    # name: (model, modules that get LoRA, shape of an input)
    "torch.nn": (encoder, ["self_attn"], (2, 9, 12)),
    "timm": (vit, ["qkv", "attn.proj"], (2, 3, 32, 32)),
    "timm EVA": (eva, ["qkv", "attn.proj"], (2, 3, 56, 56)),
    "transformers": (hugging_face, ["q_proj", "v_proj"], (2, 3, 32, 32)),
}


@pytest.fixture(params=MODELS)
def case(request):
    make, targets, shape = MODELS[request.param]
    torch.manual_seed(0)
    model = make().eval()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.3)
    return model, targets, torch.randn(shape, dtype=torch.float64)


def with_lora(model, targets):
    # Adapters that start at zero would not show.
    config = peft.LoraConfig(r=2, target_modules=targets, init_lora_weights=False)
    return peft.get_peft_model(model, config).double().eval()


def output(model, x):
    out = model(x)
    return out if isinstance(out, torch.Tensor) else out.logits


def swapped_merged(adapted):
    """The model into whose weights the adapters are merged, dense until then, swapped afterwards."""
    merged = copy.deepcopy(adapted).merge_and_unload()
    sm.sparsify(merged, FIBOTTENTION)
    return merged


@pytest.mark.parametrize("first", ["swap", "lora"])
def test_swapping_and_adapting_commute(case, first):
    model, targets, x = case
    if first == "swap":
        dense = with_lora(copy.deepcopy(model), targets)
        sm.sparsify(model, FIBOTTENTION)
        adapted = with_lora(model, targets)
        adapted.load_state_dict(dense.state_dict(), strict=True)
        dense.load_state_dict(adapted.state_dict(), strict=True)
    else:
        dense = with_lora(model, targets)
        adapted = copy.deepcopy(dense)
        sm.sparsify(adapted, FIBOTTENTION)
    expected = swapped_merged(dense)
    assert_same(output(adapted, x).detach(), output(expected, x).detach(), atol=1e-10)
    assert not torch.allclose(output(adapted, x), output(dense, x))
    layers = {name: m for name, m in adapted.named_modules() if isinstance(m, SparseLayer)}
    assert len(layers) >= 2
    assert all(calls > 0 for calls in sm.adapters.sparse_calls(adapted, layers, x).values())


def test_only_the_adapters_are_trained(case):
    model, targets, x = case
    sm.sparsify(model, FIBOTTENTION)
    adapted = with_lora(model, targets)
    output(adapted, x).square().sum().backward()
    trained = {name for name, p in adapted.named_parameters() if p.grad is not None}
    assert trained == {name for name, _ in adapted.named_parameters() if "lora_" in name}


def test_adapters_trained_sparse_load_into_a_dense_model_and_back(case, tmp_path):
    model, targets, x = case
    base = copy.deepcopy(model)
    sm.sparsify(model, FIBOTTENTION)
    adapted = with_lora(model, targets)
    # Written apart from the base model, whose class PEFT looks up a file for.
    state = peft.get_peft_model_state_dict(adapted)
    dense = with_lora(base, targets)
    loaded = peft.set_peft_model_state_dict(dense, state)
    assert not loaded.unexpected_keys
    sm.sparsify(dense, FIBOTTENTION)
    assert_same(output(dense, x).detach(), output(adapted, x).detach(), atol=1e-12)
    sm.densify(adapted)
    sm.densify(dense)
    assert_same(output(dense, x).detach(), output(adapted, x).detach(), atol=1e-12)


def test_layers_wrapped_by_peft_keep_their_role():
    model = nn.TransformerDecoder(nn.TransformerDecoderLayer(12, 2, 16, batch_first=True), 1)
    adapted = with_lora(model, ["self_attn", "multihead_attn"])
    reasons = {row.module.split(".")[-2]: row.reason for row in sm.sparsify(adapted, FIBOTTENTION, strict=False).rows}
    assert reasons == {"self_attn": "decoder", "multihead_attn": "cross-attention"}
