"""`sparsify` on torch's own transformer layers and torchvision's Vision Transformers."""

import copy

import pytest
import torch
from torch import nn

import sparse_mhsa as sm
from comparison import assert_same
from models import FIBOTTENTION, LOCAL, encoder
from sparse_mhsa.module import SparseMHSA


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

    @pytest.mark.parametrize(
        ("config", "options", "message"),
        [
            ({**LOCAL, "embed_dim": 7}, {}, "embed_dim: the configuration is for 7"),
            (
                {**FIBOTTENTION, "masked_logits": "zero"},
                {"dropout": 0.1},
                "dropout: expected 0 with `masked_logits: zero`",
            ),
            ({**FIBOTTENTION, "masked_logits": "zero"}, {"add_zero_attn": True}, "masked_logits: `zero` cannot be"),
            ({"mask": "topk"}, {"add_bias_kv": True}, "mask: `topk` cannot be combined with add_bias_kv"),
            ({"backend": "efficient"}, {"add_bias_kv": True}, "backend: `efficient` cannot be combined"),
        ],
    )
    def test_a_layer_that_cannot_take_the_configuration_leaves_the_whole_model_as_it_was(
        self, config, options, message
    ):
        model = nn.Sequential(nn.MultiheadAttention(12, 3), nn.MultiheadAttention(12, 3, **options))
        with pytest.raises(sm.ConfigError, match=f"[01]: {message}"):
            sm.sparsify(model, config)
        assert {type(layer) for layer in model} == {nn.MultiheadAttention}
        if options:
            report = sm.sparsify(model, config, strict=False)
            assert [row.status for row in report.rows] == ["swapped", "skipped"]
            assert type(model[1]) is nn.MultiheadAttention

    def test_a_layer_is_converted_wholly_or_not_at_all(self):
        config = {**FIBOTTENTION, "masked_logits": "zero"}
        zero_logits = SparseMHSA(12, 3, config=config).layer_mask
        layer = nn.MultiheadAttention(12, 3, dropout=0.1)
        with pytest.raises(ValueError, match="dropout"):
            SparseMHSA.convert(layer, zero_logits)
        assert type(layer) is nn.MultiheadAttention

    def test_subclasses_are_listed_not_swapped(self):
        class MyMultiheadAttention(nn.MultiheadAttention):
            pass

        model = nn.ModuleDict({"mine": MyMultiheadAttention(12, 3), "torchs": nn.MultiheadAttention(12, 3)})
        report = sm.sparsify(model, LOCAL)
        assert [row.module for row in report.swapped] == ["torchs"]
        assert "no adapter for" in report.skipped[0].reason
        assert report.skipped[0].module == "mine"


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
        assert {row.reason for row in report.skipped} == {
            "no adapter for ShiftedWindowAttention, which adds biases by relative position"
        }
