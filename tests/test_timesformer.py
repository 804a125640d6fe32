"""TimeSformer: the block of the published data, models in the manner of the original code, and old model files."""

import argparse
import copy
import pickle
import sys

import numpy as np
import pytest
import torch
from torch import nn

import sparse_mhsa as sm
from comparison import assert_same
from models import FIBOTTENTION, LOCAL, CopiedAttention, timm
from sparse_mhsa.adapters import find_attention
from sparse_mhsa.adapters.legacy import legacy_imports
from sparse_mhsa.adapters.timesformer import SparseBareAttention
from test_golden import TOLERANCE, archive, manifest

transformers = pytest.importorskip("transformers")

HUGGING_FACE = {
    "norm1": "layernorm_before",
    "attn.qkv": "attention.attention.qkv",
    "attn.proj": "attention.output.dense",
    "temporal_norm1": "temporal_layernorm",
    "temporal_attn.qkv": "temporal_attention.attention.qkv",
    "temporal_attn.proj": "temporal_attention.output.dense",
    "temporal_fc": "temporal_dense",
    "norm2": "layernorm_after",
    "mlp.fc1": "intermediate.dense",
    "mlp.fc2": "output.dense",
}
CASES = [case for case in manifest("outputs.json") if case.get("kind") == "divided_space_time_block"]


@pytest.mark.parametrize("case", CASES, ids=[case["id"] for case in CASES])
def test_a_block_of_space_and_time_is_the_published_one(case):
    config = transformers.TimesformerConfig(
        hidden_size=24, num_attention_heads=3, intermediate_size=48, num_hidden_layers=case["depth"] + 1,
        num_frames=4, image_size=32, patch_size=8, layer_norm_eps=1e-5, drop_path_rate=0,
    )  # fmt: skip
    model = transformers.TimesformerModel(config).double().eval()
    layer = model.encoder.layer[case["depth"]]
    inputs = {name: torch.from_numpy(archive(case["file"])[key]) for name, key in case["inputs"].items()}
    x = inputs.pop("x")
    parts = ((name.rpartition("."), tensor) for name, tensor in inputs.items())
    layer.load_state_dict({f"{HUGGING_FACE[part]}.{kind}": tensor for (part, _, kind), tensor in parts}, strict=True)
    sm.sparsify(model, {"mask": case["mask"], "mask_kwargs": case.get("mask_kwargs", {})})
    expected = torch.from_numpy(archive(case["file"])[case["arrays"]["out"]])
    assert_same(layer(x)[0].detach(), expected, atol=TOLERANCE)


class Attention(CopiedAttention):
    """As published: projections can be left out."""

    def __init__(self, dim=24, num_heads=3, with_qkv=True):
        super().__init__(dim, num_heads)
        self.with_qkv = with_qkv
        if not with_qkv:
            del self.qkv, self.proj, self.proj_drop

    def forward(self, x):
        if self.with_qkv:
            return super().forward(x)
        batch, tokens, dim = x.shape
        heads = x.reshape(batch, tokens, self.num_heads, -1).permute(0, 2, 1, 3)
        weights = self.attn_drop((heads @ heads.transpose(-2, -1) * self.scale).softmax(-1))
        return (weights @ heads).transpose(1, 2).reshape(batch, tokens, dim)


class PatchEmbed(nn.Module):
    def __init__(self):
        super().__init__()
        self.img_size, self.patch_size = (32, 32), (8, 8)
        self.proj = nn.Conv2d(3, 24, 8, 8)

    def forward(self, x):
        return self.proj(x.transpose(1, 2).flatten(0, 1)).flatten(2).transpose(1, 2)


class Block(nn.Module):
    def __init__(self, attention_type):
        super().__init__()
        self.attention_type = attention_type
        self.attn = Attention()
        if attention_type == "divided_space_time":
            self.temporal_attn = Attention()

    def forward(self, x, batch):
        if self.attention_type != "divided_space_time":
            return x + self.attn(x)
        cls, patches = x[:, :1], x[:, 1:]
        patches = patches + self.temporal_attn(patches.reshape(batch * 16, -1, 24)).reshape(patches.shape)
        frames = patches.view(batch, 16, -1, 24).transpose(1, 2)
        frames = torch.cat([cls.unsqueeze(1).expand(-1, frames.shape[1], -1, -1), frames], dim=2)
        out = self.attn(frames.flatten(0, 1)).view(frames.shape)
        return torch.cat([cls + out[:, :, :1].mean(1), patches + out[:, :, 1:].transpose(1, 2).flatten(1, 2)], dim=1)


class VisionTransformer(nn.Module):
    """As published: time varies fastest, behind one class token."""

    def __init__(self, attention_type, num_frames=4):
        super().__init__()
        self.attention_type = attention_type
        self.patch_embed = PatchEmbed()
        self.cls_token = nn.Parameter(torch.randn(1, 1, 24))
        if attention_type != "space_only":
            self.time_embed = nn.Parameter(torch.randn(1, num_frames, 24))
        self.blocks = nn.ModuleList([Block(attention_type) for _ in range(2)])

    def forward(self, x):
        batch, frames = x.shape[0], x.shape[2]
        x = self.patch_embed(x)
        if self.attention_type != "space_only":
            x = x.view(batch, frames, 16, 24).transpose(1, 2) + self.time_embed
            x = x.flatten(1, 2)
        x = torch.cat([self.cls_token.expand(x.shape[0], -1, -1), x], dim=1)
        for block in self.blocks:
            x = block(x, batch)
        return x


class TestOriginal:
    @pytest.mark.parametrize("kind", ["divided_space_time", "space_only", "joint_space_time"])
    def test_the_full_mask_is_the_dense_model(self, kind):
        model = VisionTransformer(kind).double()
        x = torch.randn(2, 3, 4, 32, 32, dtype=torch.float64)
        expected = model(x)
        state = model.state_dict()
        report = sm.sparsify(model, "mask: none", include="attn", verify=True)
        assert len(report.swapped) == (4 if kind == "divided_space_time" else 2)
        assert_same(model(x).detach(), expected.detach(), atol=1e-11)
        model.load_state_dict(state, strict=True)

    def test_space_has_a_class_token_and_time_has_none(self):
        model = VisionTransformer("divided_space_time")
        report = sm.sparsify(model, FIBOTTENTION, verify=True)
        rows = {row.module: (row.reason, row.num_tokens, row.layer) for row in report.rows}
        assert rows == {
            "blocks.0.attn": ("", 17, 0),
            "blocks.0.temporal_attn": ("temporal attention", None, 0),
            "blocks.1.attn": ("", 17, 1),
            "blocks.1.temporal_attn": ("temporal attention", None, 1),
        }
        sm.sparsify(model, LOCAL, include="temporal_attn", verify=True)
        temporal = model.blocks[1].temporal_attn
        assert torch.equal(temporal.mask(4).to_dense()[0], torch.ones(4, 4).tril(1).triu(-1).bool())

    def test_the_prefix_tokens_of_the_model_are_not_those_of_time(self):
        model = VisionTransformer("divided_space_time")
        config = {**LOCAL, "num_prefix_tokens": 1}
        sm.sparsify(model, config, include="attn", verify=True)
        block, window = model.blocks[0], torch.ones(4, 4).tril(1).triu(-1).bool()
        assert block.attn.mask(17).to_dense()[0, 0].all()
        assert torch.equal(block.temporal_attn.mask(4).to_dense()[0], window)
        sm.sparsify(model, config, include="temporal", overrides={"temporal": {"num_prefix_tokens": 1}})
        assert block.temporal_attn.mask(4).to_dense()[0, 0].all()

    @pytest.mark.parametrize("source", ["original", "transformers"])
    def test_frames_that_a_mask_leaves_without_a_key_are_told_and_can_be_helped(self, source):
        if source == "original":
            model = VisionTransformer("divided_space_time")
        else:
            sizes = {"hidden_size": 24, "num_attention_heads": 3, "intermediate_size": 48, "num_hidden_layers": 2}
            config = transformers.TimesformerConfig(**sizes, num_frames=4, image_size=32, patch_size=8)
            model = transformers.TimesformerModel(config)
        with pytest.warns(UserWarning, match=r"temporal\S*: some queries keep no key, so that attention gives them 0"):
            report = sm.sparsify(model, FIBOTTENTION, include="temporal", verify=True)
        # One head of three has distances as short as four frames.
        assert {(row.num_tokens, row.empty_rows) for row in report.swapped} == {(4, 8)}
        assert "swapped: 8 rows without a key" in str(report)
        own_key = {"mask": "local", "mask_kwargs": {"window": 0}}
        helped = {"mask": "union", "mask_kwargs": {"masks": [FIBOTTENTION, own_key]}}
        report = sm.sparsify(model, helped, include="temporal", verify=True)
        assert {row.empty_rows for row in report.swapped} == {0}

    @pytest.mark.parametrize("kind", ["space", "time", "divided"])
    def test_joint_attention_has_time_fastest(self, kind):
        model = VisionTransformer("joint_space_time")
        sm.sparsify(model, {"mask": "space_time", "mask_kwargs": {"kind": kind}}, verify=True)
        kept = model.blocks[0].attn.mask(65).to_dense()[0, 1:, 1:]
        place, frame = torch.arange(64) // 4, torch.arange(64) % 4
        space, time = frame[:, None] == frame, place[:, None] == place
        assert torch.equal(kept, {"space": space, "time": time, "divided": space | time}[kind])

    def test_the_configured_order_wins(self):
        config = {"mask": "space_time", "mask_kwargs": {"kind": "space"}, "token_order": "t_fastest"}
        model = nn.ModuleDict({"attn": CopiedAttention()})
        sm.sparsify(model, {**config, "grid": [4, 4, 4], "num_prefix_tokens": 1})
        frame = torch.arange(64) % 4
        assert torch.equal(model["attn"].mask(65).to_dense()[0, 1:, 1:], frame[:, None] == frame)


class TestWithoutProjections:
    def test_the_full_mask_is_the_dense_layer(self):
        layer = Attention(with_qkv=False)
        model = nn.ModuleList([layer])
        x = torch.randn(2, 9, 24, dtype=torch.float64, requires_grad=True)
        expected = layer(x)
        sm.sparsify(model, "mask: none")
        assert type(layer) is SparseBareAttention
        got = layer(x)
        assert_same(got.detach(), expected.detach(), atol=1e-12)
        mine, truth = (torch.autograd.grad(out.square().sum(), x)[0] for out in (got, expected))
        assert_same(mine, truth, atol=1e-11)
        sm.densify(model)
        assert type(layer) is Attention

    def test_a_mask_is_applied(self):
        layer = Attention(with_qkv=False).double()
        sm.sparsify(layer, LOCAL, verify=True, sample=torch.randn(2, 9, 24).double())
        x = torch.randn(2, 9, 24, dtype=torch.float64)
        heads = x.view(2, 9, 3, 8).transpose(1, 2)
        keep = layer.mask(9).to_dense()
        expected = nn.functional.scaled_dot_product_attention(heads, heads, heads, attn_mask=keep)
        assert_same(layer(x), expected.transpose(1, 2).flatten(2), atol=1e-12)


MODELS_VIT = """
from functools import partial
import torch
import timm.models.vision_transformer
from torch._six import container_abcs
from torch.nn.modules.linear import _LinearWithBias
import numpy as np
import timm
import timm.optim.optim_factory as optim_factory
from timm.models.vision_transformer import Block

assert timm.__version__ == "0.3.2"

frequencies = np.arange(4, dtype=np.float)
block = Block(24, 3, 4.0, qkv_bias=True, qk_scale=None)
scaled = Block(24, 3, 4.0, qkv_bias=True, qk_scale=0.25)
groups = optim_factory.add_weight_decay(block, 0.05)

class VisionTransformer(timm.models.vision_transformer.VisionTransformer):
    def forward_features(self, x):
        x = self.patch_embed(x)
        x = torch.cat((self.cls_token.expand(x.shape[0], -1, -1), x), dim=1) + self.pos_embed
        for blk in self.blocks:
            x = blk(x)
        return self.norm(x)[:, 0]
"""


class TestLegacyImports:
    def test_a_file_of_2021_is_imported_built_and_swapped(self, tmp_path, monkeypatch):
        (tmp_path / "old_models_vit.py").write_text(MODELS_VIT)
        monkeypatch.syspath_prepend(str(tmp_path))
        with legacy_imports():
            import old_models_vit

            model = old_models_vit.VisionTransformer(
                img_size=32, patch_size=8, embed_dim=24, depth=2, num_heads=3, num_classes=5
            )
        assert old_models_vit.scaled.attn.scale == 0.25
        decayed, kept = old_models_vit.groups
        assert (decayed["weight_decay"], kept["weight_decay"]) == (0.0, 0.05)
        model = model.double().eval()
        x = torch.randn(2, 3, 32, 32, dtype=torch.float64)
        dense = copy.deepcopy(model)(x).detach()
        assert dense.shape == (2, 5)
        sm.sparsify(model, "mask: none", verify=True)
        assert_same(model(x).detach(), dense, atol=1e-12)
        report = sm.sparsify(model, FIBOTTENTION, verify=True)
        assert {row.num_tokens for row in report.swapped} == {17}
        model(x).sum().backward()

    def test_everything_is_as_it_was_afterwards(self):
        vision_transformer = timm.models.vision_transformer
        version = timm.__version__
        before = (vision_transformer.Block, vision_transformer.VisionTransformer, "torch._six" in sys.modules)
        with legacy_imports():
            assert vision_transformer.Block is not before[0]
            assert np.float is float
        after = (vision_transformer.Block, vision_transformer.VisionTransformer, "torch._six" in sys.modules)
        assert after == before
        assert timm.__version__ == version != "0.3.2"
        assert not hasattr(sys.modules.get("timm.optim.optim_factory"), "add_weight_decay")
        assert not hasattr(np, "float")
        assert not hasattr(torch.nn.modules.linear, "_LinearWithBias")

    def test_a_checkpoint_with_the_arguments_of_the_program_is_loaded_within_it_alone(self, tmp_path):
        path = tmp_path / "checkpoint-0.pth"
        torch.save({"model": {}, "args": argparse.Namespace(blr=1e-3)}, path)
        with legacy_imports():
            assert torch.load(path)["args"].blr == 1e-3
        with pytest.raises(pickle.UnpicklingError, match="Namespace"):
            torch.load(path)

    def test_the_size_of_an_image_has_its_old_name(self):
        from torchvision.transforms import functional

        with legacy_imports():
            assert functional._get_image_size(torch.zeros(3, 5, 7)) == [7, 5]
        assert not hasattr(functional, "_get_image_size")

    def test_a_scale_of_its_own_survives_the_swap(self):
        with legacy_imports():
            block = timm.models.vision_transformer.Block(24, 3, qk_scale=0.25).double().eval()
        x = torch.randn(2, 9, 24, dtype=torch.float64)
        dense = block(x).detach()
        assert find_attention(block)
        sm.sparsify(block, "mask: none")
        assert_same(block(x).detach(), dense, atol=1e-12)
