"""`sparsify(verify=True)`: the proof that swapped layers compute sparsely."""

import types

import pytest
import torch
from torch import nn

import sparse_mhsa as sm
from models import LOCAL, CopiedAttention, encoder, vit
from sparse_mhsa.adapters import find_attention


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

    def test_a_model_that_is_nothing_but_a_wrapper_tells_what_is_inside(self):
        class Wrapper(nn.Module):
            def __init__(self, model):
                super().__init__()
                self.model = model

            def forward(self, x):
                return self.model(x)

        report = sm.sparsify(Wrapper(Wrapper(vit())), LOCAL, verify=True)
        assert report.swapped[0].module == "model.model.blocks.0.attn"

    def test_nothing_is_swapped_where_the_sample_is_missing(self):
        model = encoder()
        with pytest.raises(ValueError, match="sample"):
            sm.sparsify(model, LOCAL, verify=True)
        assert type(model.layers[0].self_attn) is nn.MultiheadAttention

    def test_an_input_in_the_place_of_verify_is_refused(self):
        with pytest.raises(TypeError, match=r"verify: expected True or False, got Tensor; .* passed as sample="):
            sm.sparsify(encoder(), LOCAL, verify=torch.randn(2, 9, 12))

    LINFORMER = "backend: linformer\nbackend_kwargs: {projector: {max_seq_len: 17, r: 4, num_heads: 3}}"

    @pytest.mark.parametrize("config", [LINFORMER, "backend: efficient", "backend: efficient_local"])
    def test_backends_without_edges_are_proven_too(self, config):
        model = vit()
        sm.sparsify(model, config, verify=True)
        assert not any(m._forward_pre_hooks for m in model.modules())
        attn = model.blocks[1].attn
        # The dense layer that it was, under its new name.
        attn.forward = types.MethodType(attn.dense_class.forward, attn)
        with pytest.raises(RuntimeError, match=r"stayed dense.* no backend was called in: blocks.1.attn$"):
            sm.sparsify(model, config, verify=True)

    def test_dense_layers_need_no_proof(self):
        sm.sparsify(vit(), "mask: none", verify=True)
