"""Ways in which swapped attention silently computes something else, each reproduced and shut."""

import copy
import functools
import math
import warnings

import pytest
import torch
from torch import nn

import sparse_mhsa as sm
from comparison import assert_same
from sparse_mhsa.adapters import find_attention
from sparse_mhsa.adapters.timm import SparseTimmAttention
from sparse_mhsa.module import SparseMHSA

timm = pytest.importorskip("timm")
torchvision = pytest.importorskip("torchvision")

LOCAL = {"mask": "local", "mask_kwargs": {"window": 1}}
SHUFFLED = {"mask": "fibottention", "mask_kwargs": {"shuffled": True}}


def rand(*shape):
    return torch.randn(shape, dtype=torch.float64)


def encoder(depth=2, **kwargs):
    layer = nn.TransformerEncoderLayer(12, 2, 16, dropout=0.0, batch_first=True, dtype=torch.float64)
    return nn.TransformerEncoder(layer, depth, **kwargs).eval()


def vit(name="vit_tiny_patch16_224", **kwargs):
    options = {"img_size": 32, "patch_size": 8, "embed_dim": 24, "num_heads": 3, "depth": 3, "num_classes": 5}
    return timm.create_model(name, **{**options, **kwargs}).double().eval()


def masked(model, num_tokens, batch):
    """The dense encoder, with the mask LOCAL as torch wants it."""
    drop = ~sm.masks.local(num_tokens=num_tokens, num_heads=2, window=1).to_dense()
    return lambda x, **kwargs: copy.deepcopy(model).train()(x, mask=drop.repeat(batch, 1, 1), **kwargs)


class TestTransformerEncoderLayerInEvaluation:
    """Without autograd it calls a fused kernel with the weights of its attention and never the attention."""

    def test_the_trap_is_there(self):
        layer = encoder(1).layers[0]
        layer.self_attn.forward = None
        with torch.no_grad():
            layer(rand(2, 7, 12))

    @pytest.mark.parametrize("how", ["sparsify", "from_dense", "constructor"])
    def test_the_mask_counts(self, how):
        model = encoder(1)
        x = rand(2, 7, 12)
        expected = masked(model, 7, 2)(x).detach()
        layer = model.layers[0]
        if how == "sparsify":
            sm.sparsify(model, LOCAL)
        elif how == "from_dense":
            layer.self_attn = SparseMHSA.from_dense(layer.self_attn, LOCAL)
        else:
            state = layer.self_attn.state_dict()
            layer.self_attn = SparseMHSA(12, 2, batch_first=True, dtype=torch.float64, config=LOCAL).eval()
            layer.self_attn.load_state_dict(state, strict=True)
        for context in (torch.no_grad(), torch.inference_mode()):
            with context:
                assert_same(model(x).clone(), expected, atol=1e-12)


class TestNestedTensorsOfAnEncoder:
    """In evaluation a padded batch is turned into a nested tensor before the first layer."""

    padding = torch.arange(7) >= torch.tensor([[7], [4]])

    def test_the_trap_is_there(self):
        model = encoder()
        seen = []
        model.layers[0].register_forward_pre_hook(lambda _, args: seen.append(args[0].is_nested))
        with torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            model(rand(2, 7, 12), src_key_padding_mask=self.padding)
        assert seen == [True]

    def test_sparsify_keeps_the_batch_padded(self):
        model = encoder()
        x = rand(2, 7, 12)
        expected = masked(model, 7, 2)(x, src_key_padding_mask=self.padding).detach()
        sm.sparsify(model, LOCAL)
        with torch.no_grad():
            got = model(x, src_key_padding_mask=self.padding)
        assert_same(got[~self.padding], expected[~self.padding], atol=1e-12)

    def test_a_layer_swapped_by_hand_says_what_to_do(self):
        model = encoder()
        for layer in model.layers:
            layer.self_attn = SparseMHSA.from_dense(layer.self_attn, LOCAL)
        x = rand(2, 7, 12)
        with torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with pytest.raises(AssertionError, match=r"NestedTensor.*use_nested_tensor = False"):
                model(x, src_key_padding_mask=self.padding)
            model.use_nested_tensor = False
            assert torch.isfinite(model(x, src_key_padding_mask=self.padding)).all()

    def test_padding_arrives_as_floats(self):
        layer = SparseMHSA(12, 2, batch_first=True, dtype=torch.float64, config=LOCAL)
        x = rand(2, 7, 12)
        floats = torch.zeros(2, 7).masked_fill(self.padding, -math.inf)
        as_bool, as_float = (layer(x, x, x, key_padding_mask=mask)[0] for mask in (self.padding, floats))
        assert_same(as_float.detach(), as_bool.detach(), atol=1e-12)


class TestTorchvisionInEvaluation:
    """`nn.MultiheadAttention` itself has a native kernel there, which no interception of SDPA sees."""

    def test_the_mask_counts(self):
        model = torchvision.models.VisionTransformer(32, 8, 2, 2, 12, 16, num_classes=3).double().eval()
        nn.init.normal_(model.heads.head.weight)
        x = rand(1, 3, 32, 32)
        with torch.no_grad():
            dense = model(x)
            sm.sparsify(model, LOCAL, verify=True)
            sparse = model(x)
        assert not torch.allclose(sparse, dense)
        assert_same(sparse, model(x).detach(), atol=1e-12)


class TestTimm:
    def test_a_partial_is_no_attn_layer(self):
        """`issubclass` is called on it; our factory gives a class."""
        with pytest.raises(TypeError, match="issubclass"):
            vit(attn_layer=functools.partial(timm.layers.attention.Attention))
        assert isinstance(SparseTimmAttention.configured("mask: none"), type)
        assert isinstance(
            vit(attn_layer=SparseTimmAttention.configured("mask: none")).blocks[2].attn, SparseTimmAttention
        )

    def test_depth_reaches_the_masks_that_need_it(self):
        """timm tells its attention no depth, and one cache for all layers would give each the first one's shuffle."""
        model = vit()
        sm.sparsify(model, SHUFFLED)
        layers = [block.attn for block in model.blocks]
        assert [layer.layer_mask.layer for layer in layers] == [0, 1, 2]
        masks = [layer.mask(17) for layer in layers]
        assert len(set(masks)) > 1
        calls = [0, 1, 0, 2, 1]
        x = rand(1, 17, 24)
        first = {i: layers[i](x) for i in (0, 1, 2)}
        assert all(torch.equal(layers[i](x), first[i]) for i in calls)
        for i in range(3):
            single = sm.Mask.from_config(SHUFFLED, 17, 3, layer=i, num_layers=3, grid=[4, 4], num_prefix_tokens=1)
            assert torch.equal(masks[i].to_dense(), single.to_dense())

    @pytest.mark.parametrize(
        ("name", "options", "prefix"),
        [
            ("vit_tiny_patch16_224", {"class_token": False, "global_pool": "avg"}, 0),
            ("vit_tiny_patch16_224", {}, 1),
            ("deit_tiny_distilled_patch16_224", {}, 2),
            ("vit_tiny_patch16_224", {"reg_tokens": 4}, 5),
        ],
    )
    def test_prefix_tokens_are_counted_not_assumed(self, name, options, prefix):
        model = vit(name, **options)
        sm.sparsify(model, LOCAL)
        kept = model.blocks[0].attn.mask(16 + prefix).to_dense()
        patches = sm.masks.local(num_tokens=16, num_heads=3, window=1).to_dense()
        assert kept[:, :prefix].all()
        assert kept[:, :, :prefix].all()
        assert torch.equal(kept[:, prefix:, prefix:], patches)


class TestPolarity:
    """True drops in `nn.MultiheadAttention`, and keeps everywhere else."""

    def test_each_interface_has_its_own(self):
        keep = torch.ones(5, 5, dtype=torch.bool).tril()
        mha = SparseMHSA(12, 3, batch_first=True, dtype=torch.float64)
        _, weights = mha(*[rand(1, 5, 12)] * 3, attn_mask=~keep)
        assert torch.equal(weights[0] > 0, keep)
        q, k, v = rand(3, 1, 3, 5, 4)
        expected = nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=keep)
        assert_same(sm.sparse_attention(q, k, v, None, attn_mask=keep), expected, atol=1e-12)
        attn = timm.layers.attention.Attention(12, 3).double()
        x = rand(2, 5, 12)
        expected = attn(x, attn_mask=keep)
        sm.sparsify(attn, "mask: none")
        assert_same(attn(x, attn_mask=keep).detach(), expected.detach(), atol=1e-12)


class TestIsinstance:
    """Policies, optimiser groupings, PEFT and quantisers look for `nn.MultiheadAttention` and its attributes."""

    def test_a_sparse_layer_is_one(self):
        model = encoder()
        sm.sparsify(model, LOCAL)
        layer = model.layers[0].self_attn
        assert isinstance(layer, nn.MultiheadAttention)
        assert layer._qkv_same_embed_dim is True
        claimed = {
            p
            for m in model.modules()
            if isinstance(m, (nn.Linear, nn.MultiheadAttention, nn.LayerNorm))
            for p in m.parameters()
        }
        assert claimed == set(model.parameters())


class TestTheProof:
    """`verify` counts operator calls, so a model that stays dense cannot pass for a sparse one."""

    def test_the_encoder_with_its_fast_path_back_on_is_caught(self):
        model = encoder()
        original = SparseMHSA._adopt

        def adopt(self, layer_mask):
            original(self, layer_mask)
            self._forward_pre_hooks.clear()

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(SparseMHSA, "_adopt", adopt)
            with pytest.raises(RuntimeError, match=r"verify: stayed dense.*layers.0.self_attn, layers.1.self_attn"):
                sm.sparsify(model, LOCAL, verify=True, sample=rand(1, 7, 12))
        assert len(find_attention(model)) == 2
