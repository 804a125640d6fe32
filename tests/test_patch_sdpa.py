"""`patch_sdpa`: a mask on any model that calls torch's attention function."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import sparse_mhsa as sm
from comparison import assert_same
from models import FIBOTTENTION, LOCAL, CopiedAttention, encoder, images, vit

CONFIG = {**FIBOTTENTION, "num_prefix_tokens": 1}


def qkv(*shape, heads=None):
    q, k, v = torch.randn(3, *shape, dtype=torch.float64)
    return (q, k, v) if heads is None else (q, k[:, :heads], v[:, :heads])


class Attention(nn.Module):
    def forward(self, q, k, v, **options):
        return F.scaled_dot_product_attention(q, k, v, **options)


class TestCalls:
    @pytest.mark.parametrize("options", ["nothing", "keep", "bias", "causal", "both", "scale", "grouped"])
    def test_the_call_is_kept_and_the_mask_added(self, options):
        keep = torch.rand(2, 1, 9, 9) < 0.8
        keep |= torch.eye(9, dtype=torch.bool)
        given = {
            "nothing": {},
            "keep": {"attn_mask": keep},
            "bias": {"attn_mask": torch.randn(4, 9, 9, dtype=torch.float64)},
            "causal": {"is_causal": True},
            "both": {"attn_mask": keep, "is_causal": True},
            "scale": {"scale": 0.3},
            "grouped": {"enable_gqa": True},
        }[options]
        q, k, v = qkv(2, 4, 9, 8, heads=2 if options == "grouped" else None)
        edges = sm.masks.local(num_tokens=9, num_heads=4, window=1).to_dense()
        told = dict(given)
        if options == "bias":
            told["attn_mask"] = given["attn_mask"].masked_fill(~edges, -torch.inf)
        else:
            told["attn_mask"] = edges & given.get("attn_mask", torch.tensor(True))
        if told.pop("is_causal", False):
            told["attn_mask"] = told["attn_mask"].tril()
        expected = F.scaled_dot_product_attention(q, k, v, **told)
        with sm.patch_sdpa(LOCAL) as patched:
            got = F.scaled_dot_product_attention(q, k, v, **given)
            by_name = F.scaled_dot_product_attention(query=q, key=k, value=v, **given)
        assert_same(got, expected, atol=1e-12)
        assert_same(by_name, expected, atol=1e-12)
        assert (patched.calls, patched.skipped) == (2, 0)

    def test_the_configured_scale_wins(self):
        q, k, v = qkv(1, 2, 5, 4)
        with sm.patch_sdpa("{mask: none, scale: 0.7}"):
            got = F.scaled_dot_product_attention(q, k, v, scale=0.1)
        assert_same(got, F.scaled_dot_product_attention(q, k, v, scale=0.7), atol=1e-12)

    def test_cross_attention_is_left_alone(self):
        q, k, v = qkv(1, 2, 5, 4)
        with sm.patch_sdpa(LOCAL) as patched:
            cross = F.scaled_dot_product_attention(q[:, :, :3], k, v)
            F.scaled_dot_product_attention(q[0], k[0], v[0])
            F.scaled_dot_product_attention(q, k, v)
        assert torch.equal(cross, F.scaled_dot_product_attention(q[:, :, :3], k, v))
        assert (patched.calls, patched.skipped) == (1, 2)

    @pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors:UserWarning")
    def test_what_torch_broadcasts_or_refuses_is_left_to_torch(self):
        q, k, v = qkv(2, 4, 5, 4)
        ragged = [
            torch.nested.nested_tensor([x[0].transpose(0, 1)], layout=torch.jagged).transpose(1, 2) for x in (q, k, v)
        ]
        calls = [(q, k[:1], v[:1]), (q[:1], k, v), (q[:, :1], k, v), ragged]
        expected = [F.scaled_dot_product_attention(*call) for call in calls]
        with sm.patch_sdpa(LOCAL) as patched:
            got = [F.scaled_dot_product_attention(*call) for call in calls]
            with pytest.raises(RuntimeError, match="size of tensor a"):
                F.scaled_dot_product_attention(q, k[:, :2], v[:, :2])
            F.scaled_dot_product_attention(q, k[:, :1], v[:, :1])  # one head for all needs no enable_gqa
        for mine, truth in zip(got[:3], expected[:3], strict=True):
            assert torch.equal(mine, truth)
        assert torch.equal(got[3].values(), expected[3].values())
        assert (patched.calls, patched.skipped) == (1, 5)

    def test_gradients(self):
        q, k, v = (x.requires_grad_() for x in qkv(1, 2, 5, 4))
        with sm.patch_sdpa(LOCAL):
            assert torch.autograd.gradcheck(F.scaled_dot_product_attention, (q, k, v), fast_mode=True)

    def test_afterwards_everything_is_as_it_was(self):
        q, k, v = qkv(1, 2, 5, 4)
        dense = F.scaled_dot_product_attention(q, k, v)
        with pytest.raises(KeyError), sm.patch_sdpa(LOCAL):
            raise KeyError
        assert torch.equal(F.scaled_dot_product_attention(q, k, v), dense)
        assert not torch.nn.modules.module._global_forward_pre_hooks
        assert not torch.nn.modules.module._global_forward_hooks


class TestModels:
    @pytest.mark.parametrize("training", [False, True])
    def test_a_model_gives_what_the_swapped_one_gives(self, training):
        model = vit().train(training)
        x = images(model)
        dense = model(x).detach()
        with sm.patch_sdpa(CONFIG) as patched:
            got = [model(x).detach() for _ in range(2)]
        assert patched.calls == 6
        sm.sparsify(model, {**FIBOTTENTION, "grid": None})
        expected = model(x).detach()
        # The layers of the second pass are numbered anew.
        for each in got:
            assert_same(each, expected, atol=1e-12)
        assert not torch.allclose(expected, dense)

    @pytest.mark.parametrize("reentrant", [False, True])
    def test_layers_that_are_computed_again_are_an_error(self, reentrant):
        model = vit().train()
        for block in model.blocks:
            block.forward = lambda x, forward=block.attn.forward: torch.utils.checkpoint.checkpoint(
                forward, x, use_reentrant=reentrant
            )
        with sm.patch_sdpa(CONFIG):
            loss = model(images(model).requires_grad_()).square().sum()
            with pytest.raises(RuntimeError, match="patch_sdpa: gradient checkpointing"):
                loss.backward()

    def test_a_failing_pass_does_not_disturb_the_numbers(self):
        model = vit()
        x = images(model)
        with sm.patch_sdpa(CONFIG):
            first = model(x)
            model.norm.forward, forward = None, model.norm.forward
            with pytest.raises(TypeError):
                model(x)
            model.norm.forward = forward
            assert torch.equal(model(x), first)

    def test_random_masks_stay_the_same_within_the_context(self):
        model = vit().eval()
        x = images(model)
        with sm.patch_sdpa("{mask: random, mask_kwargs: {k: 3}}"):
            assert torch.equal(model(x), model(x))

    @pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
    @pytest.mark.filterwarnings("ignore:Using .*torch.compile.* when there are global hooks:UserWarning")
    def test_compiled(self):
        torch._dynamo.reset()
        model = vit(depth=2).eval()
        x = images(model)
        with sm.patch_sdpa(CONFIG):
            expected = model(x).detach()
            got = torch.compile(model, backend="aot_eager")(x).detach()
        assert_same(got, expected, atol=1e-12)
        torch._dynamo.reset()


class TestMultiheadAttention:
    """Torch's layer calls a function of its own, which does not let a mode see what it calls."""

    @pytest.mark.parametrize("training", [True, False])
    @pytest.mark.parametrize("grad", [True, False])
    @pytest.mark.parametrize("padded", [True, False])
    def test_transformer_layers_leave_their_fast_path(self, training, grad, padded):
        model = encoder().train(training)
        x = torch.randn(2, 7, 12, dtype=torch.float64)
        options = {"src_key_padding_mask": torch.arange(7).expand(2, 7) > 4} if padded else {}
        with torch.set_grad_enabled(grad):
            with sm.patch_sdpa(LOCAL) as patched:
                got = model(x, **options)
            sm.sparsify(model, LOCAL)
            assert_same(got.detach(), model(x, **options).detach(), atol=1e-12)
        assert (patched.calls, patched.skipped) == (2, 0)

    @pytest.mark.parametrize("need_weights", [True, False])
    @pytest.mark.parametrize(
        "layer", [{}, {"batch_first": True}, {"kdim": 6, "vdim": 5}, {"add_bias_kv": True}, {"bias": False}], ids=str
    )
    @pytest.mark.parametrize("masked", ["", "attn_mask", "key_padding_mask", "is_causal"])
    def test_the_contract_is_that_of_the_swapped_layer(self, need_weights, layer, masked):
        torch.manual_seed(0)
        dense = nn.MultiheadAttention(12, 2, dtype=torch.float64, **layer)
        sparse = sm.SparseMHSA.from_dense(dense, LOCAL)
        shape = (2, 5) if dense.batch_first else (5, 2)
        q, k, v = (torch.randn(*shape, size, dtype=torch.float64) for size in (12, dense.kdim, dense.vdim))
        causal = torch.ones(5, 5, dtype=torch.bool).triu(1)
        options = {
            "": {},
            "attn_mask": {"attn_mask": torch.randn(5, 5, dtype=torch.float64), "average_attn_weights": False},
            "key_padding_mask": {"key_padding_mask": torch.arange(5).expand(2, 5) > 3},
            "is_causal": {"attn_mask": causal, "is_causal": True},
        }[masked]
        with sm.patch_sdpa(LOCAL) as patched:
            got = dense(q, k, v, need_weights=need_weights, **options)
        expected = sparse(q, k, v, need_weights=need_weights, **options)
        assert patched.calls == 1
        assert_same(got[0].detach(), expected[0].detach(), atol=1e-12)
        assert (got[1] is None) == (expected[1] is None) == (not need_weights)
        if need_weights:
            assert_same(got[1].detach(), expected[1].detach(), atol=1e-12)
        wanted = list(dense.parameters())
        grads = [torch.autograd.grad(out.square().sum(), wanted) for out in (got[0], expected[0])]
        for mine, truth in zip(*grads, strict=True):
            assert_same(mine, truth, atol=1e-10)

    def test_cross_attention_is_left_alone(self):
        layer = nn.MultiheadAttention(12, 2, dtype=torch.float64)
        x, memory = torch.randn(5, 2, 12, dtype=torch.float64), torch.randn(7, 2, 12, dtype=torch.float64)
        with sm.patch_sdpa(LOCAL) as patched:
            layer(x, x, x)
            cross, _ = layer(x, memory, memory)
        assert torch.equal(cross, layer(x, memory, memory)[0])
        assert (patched.calls, patched.skipped) == (1, 1)

    def test_dropout_is_that_of_the_layer(self):
        layer = nn.MultiheadAttention(12, 2, dropout=1.0, bias=False)
        x = torch.randn(5, 2, 12)
        with sm.patch_sdpa(LOCAL):
            assert not layer(x, x, x)[0].any()
            assert layer.eval()(x, x, x)[0].any()

    @pytest.mark.parametrize("compiled", [False, True])
    @pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
    @pytest.mark.filterwarnings("ignore:Using .*torch.compile.* when there are global hooks:UserWarning")
    @pytest.mark.filterwarnings("ignore:Dynamo does not know how to trace:UserWarning")  # our wrapper of torch.empty
    def test_torchvision(self, compiled):
        torchvision = pytest.importorskip("torchvision")
        torch._dynamo.reset()
        model = torchvision.models.VisionTransformer(32, 8, 2, 3, 24, 32, num_classes=4).double().eval()
        nn.init.normal_(model.heads.head.weight)
        x = torch.randn(2, 3, 32, 32, dtype=torch.float64)
        run = torch.compile(model, backend="aot_eager") if compiled else model
        with torch.no_grad():
            dense = model(x)
            with sm.patch_sdpa(CONFIG) as patched:
                got = run(x)
            sm.sparsify(model, CONFIG)
            assert_same(got, model(x), atol=1e-12)
        assert patched.calls == 2
        assert not torch.allclose(got, dense)
        torch._dynamo.reset()


class TestMessages:
    def test_no_call_is_warned_of(self):
        eager = CopiedAttention()
        message = r"no nn.MultiheadAttention was replaced \(0 were no self-attention\); what spells attention out"
        with pytest.warns(UserWarning, match=message), sm.patch_sdpa(LOCAL) as patched:
            eager(torch.randn(1, 5, 24))
        assert patched.calls == 0

    def test_what_a_layer_cannot_honour_is_an_error(self):
        layer = nn.MultiheadAttention(12, 2, add_zero_attn=True)
        x = torch.randn(5, 2, 12)
        with sm.patch_sdpa({"mask": "topk"}), pytest.raises(ValueError, match="`topk` cannot be combined with add_b"):
            layer(x, x, x)

    def test_an_error_is_not_joined_by_a_warning(self):
        with pytest.raises(KeyError), sm.patch_sdpa(LOCAL):
            raise KeyError

    def test_backends_without_edges_have_no_place_here(self):
        with pytest.raises(sm.ConfigError, match="`efficient` cannot replace a function call; use sparsify"):
            sm.patch_sdpa("backend: efficient")

    def test_causal_calls_do_not_join_logits_of_zero(self):
        """What such a mask drops has a weight, so that later keys would have one."""
        q, k, v = qkv(1, 2, 5, 4)
        config = {"mask": "local", "mask_kwargs": {"window": 1, "causal": True}, "masked_logits": "zero"}
        with sm.patch_sdpa(config), pytest.raises(ValueError, match="expected none with `masked_logits: zero`"):
            F.scaled_dot_product_attention(q, k, v, is_causal=True)
