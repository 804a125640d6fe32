"""The operators and `sparse_attention`: values, derivatives of every order, transforms, compilation, bad input."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch.autograd import gradcheck, gradgradcheck
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

import sparse_mhsa as sm
from comparison import assert_as_good_as_dense, assert_same, oracle_with_grads
from sparse_mhsa import _core, ops
from sparse_mhsa.edges import EdgeSource
from sparse_mhsa.reference import dense_attention

CONFIGS = {
    "none": {"mask": "none"},
    "local": {"mask": "local", "mask_kwargs": {"window": 2}},
    "local_causal_without_self": {
        "mask": "local",
        "mask_kwargs": {"window": 3, "causal": True, "include_self": False},
    },
    "longformer": {
        "mask": "longformer",
        "mask_kwargs": {"window": 1, "dilation": 2, "global_indices": [0, 3]},
    },
    "fibottention": {"mask": "fibottention"},
    "crossdiag": {"mask": "fibottentioncrossdiag"},
    "sparse_fixed": {
        "mask": "sparse",
        "mask_kwargs": {"pattern": "fixed", "local_attn_ctx": 3, "fixed_c": 2, "per_head_distinct": True},
    },
    "published_fibottention": {"mask": "fibottention", "masked_logits": "zero"},
    "local_zero": {"mask": "local", "mask_kwargs": {"window": 1}, "masked_logits": "zero"},
}
WITH_BIAS = [name for name, config in CONFIGS.items() if "masked_logits" not in config]
"""Masks beside which there may be another."""
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


def mask_of(name, num_tokens, num_heads=2):
    return sm.Mask.from_config(CONFIGS[name], num_tokens=num_tokens, num_heads=num_heads)


def oracle_options(mask):
    return {"mask": mask.to_dense(), "masked_logits": mask.config.masked_logits}


def qkv(batch=2, heads=2, queries=6, dim=3, *, keys=None, kv_heads=None, value_dim=None, dtype=torch.float64):
    keys, kv_heads = keys or queries, kv_heads or heads
    q = torch.randn(batch, heads, queries, dim, dtype=torch.float64)
    k = torch.randn(batch, kv_heads, keys, dim, dtype=torch.float64)
    v = torch.randn(batch, kv_heads, keys, value_dim or dim, dtype=torch.float64)
    return q.to(dtype), k.to(dtype), v.to(dtype)


def with_grad(*tensors):
    return [tensor.detach().clone().requires_grad_() for tensor in tensors]


def compare_with_oracle(q, k, v, mask, **options):
    """Out, lse and all three gradients by the tolerance rule."""
    key_mask, bias = options.get("key_mask"), options.get("bias")
    leaves = with_grad(q, k, v)
    out, lse = sm.sparse_attention(
        *leaves,
        mask,
        key_padding_mask=key_mask,
        attn_mask=bias,
        scale=options.get("scale"),
        return_lse=True,
    )
    grad_out = torch.randn_like(out)
    got = (out.detach(), lse, *torch.autograd.grad(out, leaves, grad_out))
    options = {**options, **oracle_options(mask)}
    allowed = options.pop("mask")
    exact = oracle_with_grads(q, k, v, grad_out, allowed, torch.float64, **options)
    plain = oracle_with_grads(q, k, v, grad_out, allowed, q.dtype, **options)
    names = ("out", "lse", "dq", "dk", "dv")
    for name, mine, base, truth in zip(names, got, plain, exact, strict=True):
        assert_as_good_as_dense(mine, base, truth, factor=2 if name in ("out", "lse") else 3, what=name)
    return got


class TestValues:
    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    @pytest.mark.parametrize("name", CONFIGS)
    def test_forward_and_backward_match_the_dense_oracle(self, name, dtype):
        compare_with_oracle(*qkv(queries=33, dim=16, dtype=dtype), mask_of(name, 33))

    @pytest.mark.parametrize("num_tokens", [1, 2, 5, 15, 16, 17, 64, 65])
    @pytest.mark.parametrize("name", CONFIGS)
    def test_every_sequence_length(self, name, num_tokens):
        compare_with_oracle(*qkv(queries=num_tokens, heads=3), mask_of(name, num_tokens, 3))

    @pytest.mark.parametrize("dim", [1, 3, 7, 33, 65])
    @pytest.mark.parametrize("value_dim", [1, 8, 33])
    def test_every_head_dimension(self, dim, value_dim):
        for dtype in DTYPES:
            tensors = qkv(queries=9, dim=dim, value_dim=value_dim, dtype=dtype)
            compare_with_oracle(*tensors, mask_of("local", 9))

    @pytest.mark.parametrize(("batch", "heads"), [(0, 2), (1, 1), (3, 1)])
    def test_empty_batch_and_single_head(self, batch, heads):
        for name in ("none", "fibottention"):
            compare_with_oracle(*qkv(batch=batch, heads=heads), mask_of(name, 6, heads))

    @pytest.mark.parametrize("name", ["none", "local", "fibottention", "local_zero"])
    def test_heads_of_q_share_heads_of_k_and_v(self, name):
        compare_with_oracle(*qkv(heads=6, kv_heads=2), mask_of(name, 6, 6))

    @pytest.mark.parametrize("name", CONFIGS)
    def test_large_scores(self, name):
        q, k, v = qkv(queries=12, dim=8)
        # Of whole numbers, with a scale of 1/4, so that no order of additions rounds a score.
        compare_with_oracle((q * 30).round(), (k * 30).round(), v, mask_of(name, 12), scale=0.25)
        # Scores, about as large as lse, are known to eps * |lse|.
        single, double = (
            [x.to(dtype).requires_grad_() for x in (q * 30, k * 30, v)] for dtype in (q.float().dtype, q.dtype)
        )
        mask = mask_of(name, 12)
        lse = sm.sparse_attention(*double, mask, return_lse=True)[1].abs().max().item()
        got = torch.autograd.grad(sm.sparse_attention(*single, mask).sum(), single)
        truth = torch.autograd.grad(sm.sparse_attention(*double, mask).sum(), double)
        for mine, theirs in zip(got, truth, strict=True):
            scale = max(1.0, theirs.abs().max().item())
            assert_same(mine.double(), theirs, atol=8 * torch.finfo(torch.float32).eps * lse * scale)

    @pytest.mark.parametrize("scale", [0.0, 1.5, -0.7])
    def test_scale_replaces_the_default(self, scale):
        compare_with_oracle(*qkv(), mask_of("local", 6), scale=scale)

    def test_the_configured_scale_is_used_and_an_argument_wins(self):
        q, k, v = qkv()
        mask = sm.Mask.from_config({**CONFIGS["local"], "scale": 0.25}, num_tokens=6, num_heads=2)
        expected, _ = dense_attention(q, k, v, mask.to_dense(), scale=0.25)
        assert_same(sm.sparse_attention(q, k, v, mask), expected, atol=1e-14)
        expected, _ = dense_attention(q, k, v, mask.to_dense(), scale=2.0)
        assert_same(sm.sparse_attention(q, k, v, mask, scale=2.0), expected, atol=1e-13)

    @pytest.mark.parametrize("gradients", [False, True])
    def test_without_a_mask_it_is_dense_attention(self, gradients):
        q, k, v = (x.requires_grad_(gradients) for x in qkv(keys=9, value_dim=5))
        assert_same(
            sm.sparse_attention(q, k, v, None).detach(),
            F.scaled_dot_product_attention(q, k, v).detach(),
            atol=1e-14,
        )

    def test_the_dense_shortcut_is_taken_only_where_nothing_is_masked(self):
        q, k, v = qkv()
        keep, padding = torch.ones(6, 6).tril().bool(), torch.ones(2, 6, dtype=torch.bool)
        padding[1, 3:] = False
        bias = torch.randn(6, 6, dtype=torch.float64)
        for mask in (None, mask_of("none", 6)):
            for attn_mask, key_mask in ((keep, None), (bias, None), (None, padding), (bias, padding)):
                got = sm.sparse_attention(q, k, v, mask, attn_mask=attn_mask, key_padding_mask=key_mask)
                options = {"mask": keep} if attn_mask is keep else {"bias": attn_mask}
                expected, _ = dense_attention(q, k, v, key_mask=key_mask, **options)
                assert_same(got, expected, atol=1e-14)

    def test_the_dense_shortcut_propagates_nan_of_attended_places(self):
        q, k, v = qkv()
        k[0, 0, 2, 0] = torch.nan
        out = sm.sparse_attention(q, k, v, None)
        assert torch.isnan(out[0, 0]).all()
        assert not torch.isnan(out[1]).any()

    def test_two_runs_are_bitwise_equal_whatever_the_thread_count(self):
        q, k, v = qkv(queries=100, dim=16, dtype=torch.float32)
        mask = mask_of("fibottention", 100)
        before = torch.get_num_threads()
        results = []
        try:
            for threads in (1, 2, 3):
                torch.set_num_threads(threads)
                leaves = with_grad(q, k, v)
                out = sm.sparse_attention(*leaves, mask)
                results.append((out.detach(), *torch.autograd.grad(out.square().sum(), leaves)))
        finally:
            torch.set_num_threads(before)
        for other in results[1:]:
            assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


class TestMasking:
    @pytest.mark.parametrize("name", CONFIGS)
    def test_key_padding_intersects_with_the_mask(self, name):
        keep = torch.ones(3, 17, dtype=torch.bool)
        keep[0, :5] = False
        keep[1, 8:] = False
        keep[2] = False
        compare_with_oracle(*qkv(batch=3, queries=17), mask_of(name, 17), key_mask=keep)

    @pytest.mark.parametrize("name", WITH_BIAS)
    @pytest.mark.parametrize("shape", [(2, 2, 7, 7), (1, 2, 7, 7), (2, 1, 7, 7), (7, 7), (2, 1, 1, 7), (7, 1), ()])
    def test_bias_broadcasts(self, name, shape):
        for dtype in (torch.float64, torch.float32):
            tensors = qkv(queries=7, dtype=dtype)
            compare_with_oracle(*tensors, mask_of(name, 7), bias=torch.randn(shape, dtype=dtype))

    @pytest.mark.parametrize("name", WITH_BIAS)
    def test_minus_infinity_in_the_bias_drops_the_pair_altogether(self, name):
        bias = torch.randn(2, 2, 9, 9, dtype=torch.float64)
        bias[torch.rand_like(bias) < 0.4] = -math.inf
        bias[:, :, 4] = -math.inf
        compare_with_oracle(*qkv(queries=9), mask_of(name, 9), bias=bias)

    def test_bool_attn_mask_true_means_keep(self):
        q, k, v = qkv()
        keep = torch.rand(6, 6) < 0.5
        keep[3] = False
        mask = mask_of("local", 6)
        got, lse = sm.sparse_attention(q, k, v, mask, attn_mask=keep, return_lse=True)
        expected, expected_lse = dense_attention(q, k, v, mask.to_dense() & keep)
        assert_same(got, expected, atol=1e-14)
        assert_same(lse, expected_lse, atol=1e-14)

    @pytest.mark.parametrize("name", [None, "none", "local", "fibottention"])
    def test_a_row_without_a_key_gives_zero_and_minus_infinity_and_no_gradient(self, name):
        q, k, v = with_grad(*qkv())
        keep = torch.ones(6, 6, dtype=torch.bool)
        keep[2] = False
        mask = None if name is None else mask_of(name, 6)
        out, lse = sm.sparse_attention(q, k, v, mask, attn_mask=keep, return_lse=True)
        dq, dk, dv = torch.autograd.grad(out.sum(), (q, k, v))
        assert (out[:, :, 2] == 0).all()
        assert (lse[:, :, 2] == -math.inf).all()
        assert (dq[:, :, 2] == 0).all()
        assert all(torch.isfinite(grad).all() for grad in (dq, dk, dv))

    def test_on_empty_row_error_names_the_place(self):
        q, k, v = qkv()
        config = {**CONFIGS["local"], "on_empty_row": "error"}
        mask = sm.Mask.from_config(config, num_tokens=6, num_heads=2)
        sm.sparse_attention(q, k, v, mask)
        keep = torch.ones(2, 2, 6, 6, dtype=torch.bool)
        keep[1, 0, 4] = False
        with pytest.raises(RuntimeError, match=r"on_empty_row.*query 4 of head 0 in sample 1"):
            sm.sparse_attention(q, k, v, mask, attn_mask=keep)

    @pytest.mark.parametrize("name", ["local", "fibottention", "local_causal_without_self"])
    def test_what_no_query_keeps_is_never_read(self, name):
        q, k, v = qkv(queries=12)
        mask = mask_of(name, 12)
        keep = torch.ones(2, 12, dtype=torch.bool)
        keep[:, 5:8] = False
        bias = torch.zeros(1, 1, 1, 12, dtype=torch.float64)
        bias[..., 9] = -math.inf
        clean = with_grad(q, k, v)
        expected = sm.sparse_attention(*clean, mask, key_padding_mask=keep, attn_mask=bias)
        poisoned = with_grad(q, k, v)
        with torch.no_grad():
            for tensor, value in ((poisoned[1], torch.nan), (poisoned[2], math.inf)):
                tensor[:, :, 5:8] = value
                tensor[:, :, 9] = value
        got = sm.sparse_attention(*poisoned, mask, key_padding_mask=keep, attn_mask=bias)
        assert torch.equal(got, expected)
        for create_graph in (False, True):
            first = torch.autograd.grad(got.square().sum(), poisoned[0], create_graph=create_graph)[0]
            truth = torch.autograd.grad(expected.square().sum(), clean[0], create_graph=create_graph)[0]
            assert_same(first.detach(), truth.detach(), what="dq")
            if create_graph:
                got, expected = first, truth
            else:
                got = sm.sparse_attention(*poisoned, mask, key_padding_mask=keep, attn_mask=bias)
                expected = sm.sparse_attention(*clean, mask, key_padding_mask=keep, attn_mask=bias)
        second = torch.autograd.grad(got.square().sum(), poisoned[0])[0]
        assert_same(second, torch.autograd.grad(expected.square().sum(), clean[0])[0], what="second order")

    def test_nan_in_an_attended_place_propagates(self):
        q, k, v = qkv()
        v[0, 0, 3] = torch.nan
        out = sm.sparse_attention(q, k, v, mask_of("local", 6))
        reached = torch.isnan(out[0, 0]).all(-1)
        assert reached.tolist() == [False, True, True, True, True, True]
        assert not torch.isnan(out[:, 1]).any()


class TestLayouts:
    @staticmethod
    def layouts():
        base = torch.randn(2, 7, 2, 5, dtype=torch.float64)
        packed = torch.randn(2, 7, 3, 2, 5, dtype=torch.float64)
        storage = torch.randn(2 * 2 * 7 * 5 + 3, dtype=torch.float64)
        yield "transposed", [base.transpose(1, 2)] * 3
        yield "packed", list(packed.permute(2, 0, 3, 1, 4).unbind(0))
        yield "storage offset", [storage[i : i + 2 * 2 * 7 * 5].view(2, 2, 7, 5) for i in (0, 1, 3)]
        yield "every other element", [torch.randn(2, 2, 14, 10, dtype=torch.float64)[:, :, ::2, ::2]] * 3
        yield (
            "one key for all",
            [x.expand(2, 2, 7, 5) for x in torch.randn(3, 2, 2, 1, 5, dtype=torch.float64)],
        )
        yield (
            "one sample for all",
            [x.expand(2, 2, 7, 5) for x in torch.randn(3, 1, 2, 7, 5, dtype=torch.float64)],
        )

    @pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
    def test_strides_do_not_change_a_bit(self, dtype):
        mask = mask_of("fibottention", 7)
        for name, tensors in self.layouts():
            views = [x if dtype == torch.float64 else x.to(dtype=dtype) for x in tensors]
            grad_out = torch.randn(2, 7, 2, 5, dtype=dtype).transpose(1, 2)
            results = []
            for inputs in (views, [x.contiguous() for x in views]):
                leaves = [x.detach().requires_grad_() for x in inputs]
                out = sm.sparse_attention(*leaves, mask)
                results.append((out.detach(), *torch.autograd.grad(out, leaves, grad_out)))
            for got, expected in zip(*results, strict=True):
                assert torch.equal(got, expected), name

    @pytest.mark.parametrize("kv_heads", [6, 2])
    def test_merging_the_heads_of_outputs_and_gradients_costs_nothing(self, kv_heads):
        """In memory (B, N, H, D), as torch's own attention on the CPU has it."""
        q, k, v = qkv(heads=6, queries=3, kv_heads=kv_heads)
        mask = mask_of("local", 3, 6)
        out, lse = sm.sparse_attention(q, k, v, mask, return_lse=True)
        options = (mask.spec, None, None, None, 0.0, 1.0)
        grads = torch.ops.sparse_mhsa.backward(torch.ones_like(out), q, k, v, out, lse, *options)
        for tensor in (out, *grads):
            assert tensor.transpose(1, 2).flatten(2).untyped_storage().data_ptr() == tensor.untyped_storage().data_ptr()
        assert lse.is_contiguous()

    @pytest.mark.parametrize(
        "reduce",
        [
            torch.sum,
            torch.mean,
            lambda out: out.transpose(1, 2).sum(),
            lambda out: out[:, :, :1].expand(-1, -1, 4, -1).sum(),
        ],
        ids=["sum", "mean", "transposed", "expanded"],
    )
    def test_gradients_of_any_layout_arrive(self, reduce):
        q, k, v = qkv()
        mask = mask_of("local", 6)
        leaves = with_grad(q, k, v)
        got = torch.autograd.grad(reduce(sm.sparse_attention(*leaves, mask)), leaves)
        truth = with_grad(q, k, v)
        expected = torch.autograd.grad(reduce(dense_attention(*truth, mask.to_dense())[0]), truth)
        for mine, theirs in zip(got, expected, strict=True):
            assert_same(mine, theirs, atol=1e-13)

    def test_q_is_k_is_v(self):
        x = torch.randn(2, 2, 6, 3, dtype=torch.float64, requires_grad=True)
        mask = mask_of("fibottention", 6)
        (got,) = torch.autograd.grad(sm.sparse_attention(x, x, x, mask).square().sum(), x)
        (expected,) = torch.autograd.grad(dense_attention(x, x, x, mask.to_dense())[0].square().sum(), x)
        assert_same(got, expected, atol=1e-12)


class TestEdgesAsTensors:
    @staticmethod
    def lists(batch, heads, tokens):
        mask = mask_of("fibottention", tokens, heads)
        row_ptr, col = mask.to_csr()
        nnz = len(col)
        own = torch.cat([row_ptr + nnz * sample for sample in range(batch)])
        dense = mask.to_dense()
        return {
            "shared": (row_ptr[:1], col[: int(row_ptr[0, -1])], dense[:1]),
            "per head": (row_ptr, col, dense),
            "per batch and head": (own, col.repeat(batch), dense),
        }

    @pytest.mark.parametrize("kind", ["shared", "per head", "per batch and head"])
    def test_values_and_derivatives(self, kind):
        row_ptr, col, dense = self.lists(2, 3, 8)[kind]
        q, k, v = with_grad(*qkv(heads=3, queries=8))
        edges = EdgeSource(None, row_ptr, col)

        def attend(q, k, v, **options):
            return ops.attention(q, k, v, edges, scale=0.7, **options)[0]

        assert_same(attend(q, k, v).detach(), dense_attention(q, k, v, dense, scale=0.7)[0].detach(), atol=1e-14)
        assert gradcheck(attend, (q, k, v))
        assert gradgradcheck(attend, (q, k, v), fast_mode=True)
        seed = torch.tensor(3)
        assert gradgradcheck(lambda *x: attend(*x, seed=seed, dropout_p=0.5), (q, k, v), fast_mode=True)

    def test_an_empty_batch(self):
        row_ptr, col, _ = self.lists(1, 2, 6)["per head"]
        q, k, v = with_grad(*qkv(batch=0))
        out, _ = ops.attention(q, k, v, EdgeSource(None, row_ptr, col), scale=1.0)
        grads = torch.autograd.grad(out.sum(), (q, k, v), create_graph=True)
        torch.autograd.grad(sum(grad.sum() for grad in grads), (q, k, v))

    @pytest.mark.parametrize(
        ("row_ptr", "col"),
        [
            ([[0, 1, 2, 3, 4, 5, 7]], [0, 1, 2, 3, 4, 5]),
            ([[0, 1, 2, 3, 4, 5, 6]], [0, 1, 2, 3, 4, 6]),
            ([[0, 1, 2, 3, 4, 5, 6]], [0, 1, 2, 3, 4, -1]),
            ([[0, 2, 2, 3, 4, 5, 6]], [1, 0, 2, 3, 4, 5]),
            ([[0, 2, 2, 3, 4, 5, 6]], [1, 1, 2, 3, 4, 5]),
            ([[0, 3, 2, 3, 4, 5, 6]], [0, 1, 2, 3, 4, 5]),
            ([[0, 1, 2, 3, 4, 6]], [0, 1, 2, 3, 4, 5]),
            ([[0, 1, 2, 3, 4, 5, 6]] * 3, [0, 1, 2, 3, 4, 5]),
        ],
        ids=[
            "past the end",
            "key too large",
            "negative",
            "unsorted",
            "twice",
            "decreasing",
            "too short",
            "P = 3",
        ],
    )
    def test_edges_that_cannot_be_are_refused(self, row_ptr, col):
        q, k, v = qkv()
        with pytest.raises(ValueError, match=r"row_ptr|col|edges"):
            ops.attention(q, k, v, EdgeSource(None, torch.tensor(row_ptr), torch.tensor(col)), scale=1.0)


class TestDerivatives:
    @pytest.mark.parametrize("name", CONFIGS)
    def test_first_and_second_order(self, name):
        mask = mask_of(name, 7)
        keep = torch.ones(2, 7, dtype=torch.bool)
        keep[1, 2:4] = False
        inputs = with_grad(*qkv(queries=7))
        for key_mask in (None, keep):

            def attend(q, k, v, key_mask=key_mask):
                return sm.sparse_attention(q, k, v, mask, key_padding_mask=key_mask)

            assert gradcheck(attend, inputs)
            assert gradgradcheck(attend, inputs, fast_mode=True)

    @pytest.mark.parametrize("name", ["none", "fibottention", "local"])
    @pytest.mark.parametrize("shape", [(2, 2, 6, 6), (1, 2, 6, 6), (2, 1, 6, 6), (6, 6), (2, 1, 1, 6), (6, 1), (1,)])
    def test_the_bias_has_derivatives_too(self, name, shape):
        mask = mask_of(name, 6)
        bias = torch.randn(shape, dtype=torch.float64)
        if len(shape) == 4 and shape[2] == 6:
            bias[..., 1, :] = bias[..., 3, 2] = -math.inf
        inputs = with_grad(*qkv(), bias)

        def attend(q, k, v, bias=bias):
            return sm.sparse_attention(q, k, v, mask, attn_mask=bias)

        leaves = with_grad(*inputs)
        options = {"bias": leaves[3], "masked_logits": mask.config.masked_logits}
        expected, _ = dense_attention(*leaves[:3], mask.to_dense(), **options)
        truth = torch.autograd.grad(expected.square().sum(), leaves)
        got = torch.autograd.grad(attend(*inputs).square().sum(), inputs)
        for name_, mine, theirs in zip("qkvb", got, truth, strict=True):
            assert_same(mine, torch.nan_to_num(theirs), atol=1e-12, what=f"d{name_}")
        # Finite differences of a bias of -inf do not exist, those of the rest do.
        wanted = inputs if torch.isfinite(bias).all() else inputs[:3]
        assert gradcheck(attend, wanted)
        assert gradgradcheck(attend, wanted, fast_mode=True)

    def test_grouped_heads(self):
        mask = mask_of("local", 6, 4)
        inputs = with_grad(*qkv(heads=4, kv_heads=2))
        assert gradcheck(lambda *x: sm.sparse_attention(*x, mask), inputs)
        assert gradgradcheck(lambda *x: sm.sparse_attention(*x, mask), inputs, fast_mode=True)

    def test_third_order(self):
        mask = mask_of("local", 4, 1)
        q, k, v = with_grad(*qkv(batch=1, heads=1, queries=4, dim=2))

        def second(q, k, v):
            (first,) = torch.autograd.grad(sm.sparse_attention(q, k, v, mask).square().sum(), q, create_graph=True)
            return torch.autograd.grad(first.square().sum(), k, create_graph=True)[0]

        assert gradcheck(second, (q, k, v))

    @pytest.mark.parametrize("wanted", range(1, 8))
    def test_any_subset_of_inputs_may_need_gradients(self, wanted):
        tensors = qkv()
        mask = mask_of("fibottention", 6)
        leaves = [x.clone().requires_grad_(bool(wanted >> i & 1)) for i, x in enumerate(tensors)]
        needed = [x for x in leaves if x.requires_grad]
        got = torch.autograd.grad(sm.sparse_attention(*leaves, mask).square().sum(), needed)
        expected = torch.autograd.grad(dense_attention(*leaves, mask.to_dense())[0].square().sum(), needed)
        for mine, theirs in zip(got, expected, strict=True):
            assert_same(mine, theirs, atol=1e-12)

    def test_a_gradient_penalty_is_that_of_dense_attention(self):
        mask = mask_of("fibottention", 6)

        def penalty(attend):
            q, k, v = with_grad(*inputs)
            grads = torch.autograd.grad(attend(q, k, v).pow(3).sum(), (q, k, v), create_graph=True)
            loss = sum(grad.square().sum() for grad in grads)
            return torch.autograd.grad(loss, (q, k, v))

        inputs = qkv()
        got = penalty(lambda *x: sm.sparse_attention(*x, mask))
        expected = penalty(lambda *x: dense_attention(*x, mask.to_dense())[0])
        for mine, theirs in zip(got, expected, strict=True):
            assert_same(mine, theirs, rtol=1e-10, atol=1e-10)

    def test_lse_carries_no_gradient(self):
        q, k, v = with_grad(*qkv())
        _, lse = sm.sparse_attention(q, k, v, mask_of("local", 6), return_lse=True)
        assert not lse.requires_grad

    def test_editing_an_input_in_place_before_backward_raises(self):
        for place in range(3):
            tensors = [x + 0 for x in with_grad(*qkv())]
            out = sm.sparse_attention(*tensors, mask_of("local", 6))
            tensors[place].add_(1)
            with pytest.raises(RuntimeError, match="modified by an inplace operation"):
                out.sum().backward()

    def test_a_graph_can_be_kept_and_used_again(self):
        q, k, v = with_grad(*qkv())
        out = sm.sparse_attention(q, k, v, mask_of("local", 6)).sum()
        first = torch.autograd.grad(out, q, retain_graph=True)[0]
        assert torch.equal(first, torch.autograd.grad(out, q)[0])

    def test_no_graph_without_gradients(self):
        q, k, v = with_grad(*qkv())
        for context in (torch.no_grad(), torch.inference_mode()):
            with context:
                assert not sm.sparse_attention(q, k, v, mask_of("local", 6)).requires_grad

    @pytest.mark.parametrize("reentrant", [False, True])
    def test_checkpointing_replays_dropout(self, reentrant):
        inputs = with_grad(*qkv())
        mask = mask_of("local", 6)

        def attend(q, k, v):
            return sm.sparse_attention(q, k, v, mask, dropout_p=0.5)

        torch.manual_seed(7)
        expected = torch.autograd.grad(attend(*inputs).square().sum(), inputs)
        torch.manual_seed(7)
        leaves = with_grad(*inputs)
        checkpoint(attend, *leaves, use_reentrant=reentrant).square().sum().backward()
        for mine, theirs in zip(leaves, expected, strict=True):
            assert torch.equal(mine.grad, theirs)

    @pytest.mark.filterwarnings("ignore:.*torch.jit.script.*:DeprecationWarning")
    def test_forward_mode_is_refused_rather_than_dropped(self):
        q, k, v = qkv()
        with pytest.raises(NotImplementedError):
            torch.func.jvp(lambda q: sm.sparse_attention(q, k, v, mask_of("local", 6)), (q,), (q,))
        with torch.autograd.forward_ad.dual_level():
            dual = torch.autograd.forward_ad.make_dual(q, torch.ones_like(q))
            with pytest.raises(NotImplementedError):
                sm.sparse_attention(dual, k, v, mask_of("local", 6))


class TestTransforms:
    @staticmethod
    def loss(q, k, v, bias=None, key_mask=None, name="fibottention"):
        mask = mask_of(name, 6)
        return sm.sparse_attention(q, k, v, mask, attn_mask=bias, key_padding_mask=key_mask).square().sum()

    def test_func_grad_is_autograd(self):
        tensors = qkv()
        leaves = with_grad(*tensors)
        expected = torch.autograd.grad(self.loss(*leaves), leaves)
        for mine, theirs in zip(torch.func.grad(self.loss, (0, 1, 2))(*tensors), expected, strict=True):
            assert_same(mine, theirs)

    def test_func_grad_of_grad(self):
        q, k, v = qkv()

        def penalty(q, attend):
            return torch.func.grad(lambda q: attend(q, k, v).square().sum())(q).square().sum()

        mask = mask_of("fibottention", 6)
        got = torch.func.grad(lambda q: penalty(q, lambda *x: sm.sparse_attention(*x, mask)))(q)
        expected = torch.func.grad(lambda q: penalty(q, lambda *x: dense_attention(*x, mask.to_dense())[0]))(q)
        assert_same(got, expected, rtol=1e-10, atol=1e-10)

    @pytest.mark.parametrize("name", ["none", "fibottention", "local"])
    @pytest.mark.parametrize(
        "in_dims", [(0, 0, 0, None, None), (0, None, None, None, None), (1, 0, 2, 0, 0), (0, 0, 0, None, 0)]
    )
    def test_per_sample_gradients(self, name, in_dims):
        size = 3
        shapes = {
            "q": (2, 2, 6, 3),
            "k": (2, 2, 6, 3),
            "v": (2, 2, 6, 3),
            "bias": (1, 1, 6, 6),
            "key_mask": (2, 6),
        }
        args = []
        for (what, shape), dim in zip(shapes.items(), in_dims, strict=True):
            full = list(shape) if dim is None else [*shape[:dim], size, *shape[dim:]]
            tensor = torch.randn(full, dtype=torch.float64)
            args.append(tensor > -1.0 if what == "key_mask" else tensor)

        def gradient(*args):
            return torch.func.grad(lambda *x: self.loss(*x, name=name), (0, 1, 2, 3))(*args)

        got = torch.func.vmap(gradient, in_dims=in_dims)(*args)
        for i in range(size):
            sample = [x if dim is None else x.select(dim, i) for x, dim in zip(args, in_dims, strict=True)]
            for mine, theirs in zip(got, gradient(*sample), strict=True):
                assert_same(mine[i], theirs, atol=1e-12)

    def test_per_sample_second_order(self):
        q, k, v = (torch.randn(3, 2, 2, 6, 3, dtype=torch.float64) for _ in range(3))

        def penalty(q, k, v):
            return torch.func.grad(lambda q: torch.func.grad(self.loss)(q, k, v).square().sum())(q)

        got = torch.func.vmap(penalty)(q, k, v)
        for i in range(3):
            assert_same(got[i], penalty(q[i], k[i], v[i]), rtol=1e-10, atol=1e-10)

    @pytest.mark.parametrize("randomness", ["same", "different"])
    def test_dropout_follows_the_randomness_of_vmap(self, randomness):
        q, k, v = (x.expand(3, *x.shape) for x in qkv())
        mask = mask_of("none", 6)
        out = torch.func.vmap(lambda q, k, v: sm.sparse_attention(q, k, v, mask, dropout_p=0.5), randomness=randomness)(
            q, k, v
        )
        assert torch.equal(out[0], out[1]) == (randomness == "same")


class TestDropout:
    @pytest.mark.parametrize("name", ["none", "local", "fibottention"])
    def test_it_is_the_oracle_with_the_factors_of_the_core(self, name):
        q, k, v = with_grad(*qkv(batch=3, queries=9))
        mask, seed = mask_of(name, 9), torch.tensor(11)
        row_ptr, col = _core.edge_index(mask.spec, 9, 9)
        kept = _core.dropout_keep(row_ptr, col, 3, 2, seed, 0.4)
        factor = torch.zeros(3, 2, 9, 9, dtype=torch.float64)
        for head in range(2):
            span = slice(int(row_ptr[head, 0]), int(row_ptr[head, -1]))
            rows = torch.repeat_interleave(torch.arange(9), row_ptr[head].diff())
            factor[:, head, rows, col[span]] = kept[:, span]
        edges = mask.source(9)

        def attend(q, k, v):
            return ops.attention(q, k, v, edges, seed=seed, dropout_p=0.4, scale=0.7)[0]

        expected, _ = dense_attention(q, k, v, mask.to_dense(), dropout_factor=factor, scale=0.7)
        assert_same(attend(q, k, v).detach(), expected.detach(), atol=1e-13)
        grad_out = torch.randn_like(expected)
        truth = torch.autograd.grad(expected, (q, k, v), grad_out)
        for mine, theirs in zip(torch.autograd.grad(attend(q, k, v), (q, k, v), grad_out), truth, strict=True):
            assert_same(mine, theirs, atol=1e-12)
        assert gradgradcheck(attend, (q, k, v), fast_mode=True)

    def test_the_share_of_dropped_weights_is_p_and_the_mean_is_kept(self):
        n, p = 200, 0.3
        row_ptr, col = _core.edge_index(mask_of("none", n).spec, n, n)
        factor = _core.dropout_keep(row_ptr, col, 2, 2, torch.tensor(5), p)
        dropped = (factor == 0).double().mean().item()
        deviation = math.sqrt(p * (1 - p) / factor.numel())
        assert abs(dropped - p) < 5 * deviation
        assert set(factor.unique().tolist()) == {0.0, 1 / (1 - p)}

    def test_which_edges_are_kept_is_no_float64_tensor(self):
        """Not every device has that dtype, and the second derivative asks for it."""
        row_ptr, col = _core.edge_index(mask_of("local", 9).spec, 9, 9)
        arguments = (row_ptr, col, 3, 2, torch.tensor(11), 0.4)
        kept = torch.ops.sparse_mhsa.dropout_keep(*arguments)
        assert kept.dtype == torch.bool
        assert torch.equal(kept, _core.dropout_keep(*arguments) > 0)

    def test_manual_seed_replays_and_the_next_call_differs(self):
        q, k, v = qkv()
        mask = mask_of("none", 6)
        torch.manual_seed(1)
        first, second = (sm.sparse_attention(q, k, v, mask, dropout_p=0.5) for _ in range(2))
        torch.manual_seed(1)
        assert torch.equal(first, sm.sparse_attention(q, k, v, mask, dropout_p=0.5))
        assert not torch.equal(first, second)

    def test_no_draw_without_dropout(self):
        state = torch.get_rng_state()
        sm.sparse_attention(*qkv(), mask_of("local", 6), dropout_p=0.0)
        torch.manual_seed(0)
        qkv()
        after = torch.get_rng_state()
        torch.set_rng_state(state)
        qkv()
        assert not torch.equal(state, after)

    def test_p_of_one_drops_everything(self):
        q, k, v = with_grad(*qkv())
        out = sm.sparse_attention(q, k, v, mask_of("local", 6), dropout_p=1.0)
        assert (out == 0).all()
        assert all((grad == 0).all() for grad in torch.autograd.grad(out.sum(), (q, k, v)))

    @pytest.mark.parametrize("p", [-0.1, 1.1, math.nan])
    def test_p_must_be_a_probability(self, p):
        with pytest.raises(ValueError, match="dropout_p: expected a probability"):
            sm.sparse_attention(*qkv(), mask_of("local", 6), dropout_p=p)


class TestAutocast:
    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    def test_it_casts_as_scaled_dot_product_attention_does(self, dtype):
        q, k, v = with_grad(*qkv(dtype=torch.float32))
        bias = torch.randn(6, 6)
        with torch.autocast("cpu", dtype=dtype):
            out = sm.sparse_attention(q, k, v, mask_of("local", 6), attn_mask=bias)
            assert out.dtype == dtype == F.scaled_dot_product_attention(q, k, v).dtype
        assert torch.autograd.grad(out.sum(), q)[0].dtype == torch.float32

    def test_dtypes_may_differ_where_it_makes_them_one(self):
        """As where queries and keys were rotated in float32, and values come from a projection."""
        q, k, v = with_grad(*qkv(dtype=torch.float32))
        mask = mask_of("local", 6)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            out = sm.sparse_attention(q, k, v.bfloat16(), mask)
        assert torch.equal(out, sm.sparse_attention(q.bfloat16(), k.bfloat16(), v.bfloat16(), mask))
        with pytest.raises(TypeError, match="to have the same dtype"):
            sm.sparse_attention(q, k, v.bfloat16(), mask)
        with torch.autocast("cpu", dtype=torch.bfloat16), pytest.raises(TypeError, match="value: expected one of"):
            sm.sparse_attention(q, k, v.long(), mask)

    def test_float64_stays(self):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert sm.sparse_attention(*qkv(), mask_of("local", 6)).dtype == torch.float64


class TestOperators:
    @staticmethod
    def calls():
        q, k, v = qkv()
        grad = torch.randn_like(q)
        keep = torch.ones(2, 6, dtype=torch.bool)
        bias = torch.randn(1, 2, 1, 6, dtype=torch.float64)
        mask = mask_of("fibottention", 6)
        row_ptr, col = mask.to_csr()
        seed = torch.tensor(1)
        library = torch.ops.sparse_mhsa
        for spec, options in (
            (mask.spec, (None, None, None, 0.0, 0.5)),
            (mask.spec, (keep, bias, seed, 0.25, 0.5)),
        ):
            out, lse = library.forward(q, k, v, spec, *options)
            yield library.forward.default, (q, k, v, spec, *options)
            yield library.backward.default, (grad, q, k, v, out, lse, spec, *options)
            yield library.forward_edges.default, (q, k, v, row_ptr, col, *options)
            yield library.backward_edges.default, (grad, q, k, v, out, lse, row_ptr, col, *options)
        yield library.bias_gradient.default, (grad, q, k, v, lse, mask.spec, None, None, *options)
        yield library.bias_gradient.default, (grad, q, k, v, lse, None, row_ptr, col, *options)
        yield library.edge_index.default, (mask.spec, 6, 6)
        yield library.dropout_keep.default, (row_ptr, col, 2, 2, seed, 0.25)
        yield library.chosen_engine.default, ()

    def test_opcheck(self):
        for operator, args in self.calls():
            result = torch.library.opcheck(operator, args)
            assert set(result.values()) == {"SUCCESS"}, (operator, result)

    def test_opcheck_with_strided_inputs(self):
        q, k, v = (x.transpose(1, 2) for x in qkv(heads=6, queries=2))
        spec = mask_of("local", 6).spec
        torch.library.opcheck(torch.ops.sparse_mhsa.forward.default, (q, k, v, spec, None, None, None, 0.0, 0.5))

    def test_meta_tensors_give_shapes(self):
        q, k, v = (x.to("meta") for x in qkv(value_dim=5, dtype=torch.bfloat16))
        out, lse = sm.sparse_attention(q, k, v, mask_of("local", 6), return_lse=True)
        assert (out.device.type, out.shape, out.dtype) == ("meta", (2, 2, 6, 5), torch.bfloat16)
        assert (lse.shape, lse.dtype) == ((2, 2, 6), torch.float32)

    def test_flops_are_counted_from_the_edges(self):
        q, k, v = with_grad(*qkv(dim=3, value_dim=5))
        mask = mask_of("fibottention", 6)
        with FlopCounterMode(display=False) as counter:
            out = sm.sparse_attention(q, k, v, mask)
        assert counter.get_total_flops() == 2 * 2 * mask.nnz * (3 + 5)
        with FlopCounterMode(display=False) as counter:
            out.sum().backward()
        assert counter.get_total_flops() == 2 * 2 * mask.nnz * (3 * 3 + 2 * 5)
        row_ptr, col = mask.to_csr()
        with FlopCounterMode(display=False) as counter:
            ops.attention(q, k, v, EdgeSource(None, row_ptr, col), scale=1.0)
            ops.attention(q, k, v, EdgeSource(None, row_ptr[:1], col[: row_ptr[0, -1]]), scale=1.0)
        assert counter.get_total_flops() == 2 * 2 * (mask.nnz + 2 * mask.nnz_per_head[0]) * (3 + 5)
        rectangular = qkv(keys=4, dim=3)
        with FlopCounterMode(display=False) as counter:
            sm.sparse_attention(*rectangular, None, return_lse=True)
        assert counter.get_total_flops() == 2 * 2 * 2 * 6 * 4 * (3 + 3)


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
class TestCompile:
    @pytest.fixture(autouse=True)
    def fresh_dynamo(self):
        torch._dynamo.reset()
        yield
        torch._dynamo.reset()

    @staticmethod
    def loss(mask, **options):
        def compute(q, k, v, bias=None):
            return sm.sparse_attention(q, k, v, mask, attn_mask=bias, **options).square().sum()

        return compute

    @pytest.mark.parametrize("name", ["none", "fibottention", "local_zero", None])
    def test_fullgraph_forward_and_backward(self, name):
        inputs = with_grad(*qkv())
        loss = self.loss(None if name is None else mask_of(name, 6))
        compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
        got = torch.autograd.grad(compiled(*inputs), inputs)
        for mine, theirs in zip(got, torch.autograd.grad(loss(*inputs), inputs), strict=True):
            assert_same(mine, theirs, atol=1e-12)
        with torch.no_grad():
            assert_same(compiled(*inputs), loss(*inputs), atol=1e-12)

    def test_fullgraph_with_a_bias_that_learns(self):
        inputs = with_grad(*qkv(), torch.randn(1, 2, 6, 6, dtype=torch.float64))
        loss = self.loss(mask_of("fibottention", 6))
        got = torch.autograd.grad(torch.compile(loss, fullgraph=True, backend="aot_eager")(*inputs), inputs)
        for mine, theirs in zip(got, torch.autograd.grad(loss(*inputs), inputs), strict=True):
            assert_same(mine, theirs, atol=1e-12)

    def test_fullgraph_with_dropout_draws_what_eager_draws(self):
        inputs = qkv()
        mask = mask_of("none", 6)
        loss = self.loss(mask, dropout_p=0.5)
        compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
        torch.manual_seed(3)
        expected = loss(*inputs)
        torch.manual_seed(3)
        assert_same(compiled(*inputs), expected, atol=1e-12)

    def test_compiled_func_grad_is_not_zero(self):
        inputs = qkv()
        loss = self.loss(mask_of("fibottention", 6))
        expected = torch.func.grad(loss)(*inputs)
        got = torch.compile(torch.func.grad(loss), fullgraph=True, backend="aot_eager")(*inputs)
        assert_same(got, expected, atol=1e-12)

    def test_dynamic_batch(self):
        mask = mask_of("fibottention", 6)
        loss = self.loss(mask)
        compiled = torch.compile(loss, fullgraph=True, backend="aot_eager", dynamic=True)
        for batch in (2, 3, 5):
            inputs = with_grad(*qkv(batch=batch))
            got = torch.autograd.grad(compiled(*inputs), inputs)
            for mine, theirs in zip(got, torch.autograd.grad(loss(*inputs), inputs), strict=True):
                assert_same(mine, theirs, atol=1e-12)

    def test_dynamic_scale(self):
        q, k, v = qkv()
        mask = mask_of("fibottention", 6)

        def attend(scale):
            return sm.sparse_attention(q, k, v, mask, scale=scale)

        compiled = torch.compile(attend, fullgraph=True, backend="aot_eager", dynamic=True)
        for scale in (0.3, 0.7, 2.0):
            assert_same(compiled(scale), attend(scale), atol=1e-12)

    def test_nested_func_grad_is_refused_rather_than_wrong(self):
        q, k, v = qkv()
        loss = self.loss(mask_of("fibottention", 6))

        def penalty(q):
            return torch.func.grad(loss)(q, k, v).square().sum()

        compiled = torch.compile(torch.func.grad(penalty), fullgraph=True, backend="aot_eager")
        with pytest.raises(Exception, match=r"leave nested torch.func.grad calls out of the compiled function"):
            compiled(q)
        inner = torch.compile(lambda q: loss(q, k, v), backend="aot_eager")
        got = torch.func.grad(lambda q: torch.func.grad(inner)(q).square().sum())(q)
        assert_same(got, torch.func.grad(penalty)(q), rtol=1e-10, atol=1e-10)

    @pytest.mark.slow
    @pytest.mark.filterwarnings("ignore::DeprecationWarning")
    def test_inductor(self):
        inputs = with_grad(*(x.transpose(1, 2) for x in qkv(heads=6, queries=2)))
        loss = self.loss(mask_of("fibottention", 6))
        got = torch.autograd.grad(torch.compile(loss, fullgraph=True)(*inputs), inputs)
        for mine, theirs in zip(got, torch.autograd.grad(loss(*inputs), inputs), strict=True):
            assert_same(mine, theirs, atol=1e-12)

    def test_export(self):
        class Block(torch.nn.Module):
            def __init__(self):
                super().__init__()
                self.mask = mask_of("fibottention", 6)

            def forward(self, q, k, v):
                return sm.sparse_attention(q, k, v, self.mask)

        inputs = qkv()
        exported = torch.export.export(Block(), inputs).module()
        assert_same(exported(*inputs), Block()(*inputs), atol=1e-14)


class TestBadInput:
    @pytest.mark.parametrize(
        ("change", "error", "message"),
        [
            ({"q": [1]}, TypeError, r"query: expected a torch.Tensor, got list"),
            (
                {"k": torch.zeros(2, 2, 6, 3)},
                TypeError,
                r"same dtype, but got query.dtype: torch.float64 key.dtype: ",
            ),
            (
                {"v": torch.zeros(2, 2, 6, 3, device="meta", dtype=torch.float64)},
                ValueError,
                r"value.device: meta",
            ),
            (
                {"q": torch.zeros(2, 6, 3, dtype=torch.float64)},
                ValueError,
                r"query: expected shape \(B, H, N, D\)",
            ),
            (
                {"k": torch.zeros(3, 2, 6, 3, dtype=torch.float64)},
                ValueError,
                r"key: expected shape \(2, .*, 3\)",
            ),
            ({"k": torch.zeros(2, 2, 6, 4, dtype=torch.float64)}, ValueError, r"key: expected shape"),
            (
                {"v": torch.zeros(2, 2, 5, 3, dtype=torch.float64)},
                ValueError,
                r"value: expected shape \(2, 2, 6, Dv\)",
            ),
            ({"mask": "local"}, TypeError, r"mask: expected a sparse_mhsa.Mask or None, got str"),
            (
                {"attn_mask": torch.zeros(6, 6, dtype=torch.int64)},
                TypeError,
                r"attn_mask: expected bool .* torch.int64",
            ),
            ({"attn_mask": torch.zeros(6, 5)}, ValueError, r"attn_mask: .*\(2, 2, 6, 6\), got \(6, 5\)"),
            (
                {"attn_mask": torch.zeros(1, 2, 2, 6, 6)},
                ValueError,
                r"attn_mask: expected a shape that broadcasts",
            ),
            ({"attn_mask": torch.zeros(6, 6, device="meta")}, ValueError, r"attn_mask: expected device cpu"),
            (
                {"key_padding_mask": torch.zeros(2, 6)},
                TypeError,
                r"key_padding_mask: expected dtype torch.bool",
            ),
            (
                {"key_padding_mask": torch.ones(2, 5).bool()},
                ValueError,
                r"key_padding_mask: .*\(2, 6\), got \(2, 5\)",
            ),
            (
                {"q": torch.zeros(2, 2, 6, 3, dtype=torch.float64).to_sparse()},
                TypeError,
                r"query: expected a dense tensor, got layout torch.sparse_coo",
            ),
            (
                {"attn_mask": torch.ones(6, 6).to_sparse()},
                TypeError,
                r"attn_mask: expected a dense tensor, got layout torch.sparse_coo",
            ),
            (
                {"key_padding_mask": torch.ones(2, 6).bool().to_sparse()},
                TypeError,
                r"key_padding_mask: expected a dense tensor, got layout torch.sparse_coo",
            ),
            ({"scale": torch.tensor(0.5)}, TypeError, r"scale: expected a number, got Tensor"),
            ({"dropout_p": "a"}, TypeError, r"dropout_p: expected a number, got str"),
            ({"dropout_p": None}, TypeError, r"dropout_p: expected a number, got NoneType"),
            ({"scale": "1"}, TypeError, r"scale: expected a number, got str"),
        ],
    )
    def test_the_message_names_argument_expected_and_got(self, change, error, message):
        q, k, v = qkv()
        arguments = {"q": q, "k": k, "v": v, "mask": mask_of("local", 6), **change}
        with pytest.raises(error, match=message):
            sm.sparse_attention(**arguments)

    def test_integers_are_refused(self):
        q, k, v = (x.long() for x in qkv())
        with pytest.raises(TypeError, match=r"query: expected one of torch.float32.*got torch.int64"):
            sm.sparse_attention(q, k, v, None)

    def test_a_mask_for_other_sizes_is_refused(self):
        q, k, v = qkv()
        with pytest.raises(ValueError, match=r"mask: expected 6 tokens like query, got a mask of 7 tokens"):
            sm.sparse_attention(q, k, v, mask_of("local", 7))
        with pytest.raises(ValueError, match=r"mask: expected 2 heads like query, got a mask of 3 heads"):
            sm.sparse_attention(q, k, v, mask_of("local", 6, 3))

    def test_only_the_dense_mask_may_be_rectangular(self):
        q, k, v = qkv(keys=4)
        with pytest.raises(ValueError, match=r"`local` is square, but query has 6 tokens and key has 4"):
            sm.sparse_attention(q, k, v, mask_of("local", 6))
        expected, _ = dense_attention(q, k, v)
        assert_same(sm.sparse_attention(q, k, v, mask_of("none", 6)), expected, atol=1e-14)

    def test_heads_of_k_must_divide_those_of_q(self):
        q, k, v = qkv(heads=4, kv_heads=3)
        with pytest.raises(ValueError, match="key: expected a number of heads that divides the 4 of query, got 3"):
            sm.sparse_attention(q, k, v, None)

    def test_nested_tensors_are_refused(self):
        nested = torch.nested.nested_tensor([torch.randn(2, 3)], layout=torch.jagged)
        with pytest.raises(TypeError, match="query: expected a dense tensor, got a nested one"):
            sm.sparse_attention(nested, nested, nested, None)

    def test_another_mask_beside_zero_logits_is_refused(self):
        mask = mask_of("local_zero", 6)
        keep = torch.ones(6, 6, dtype=torch.bool).tril()
        for attn_mask in (keep, torch.zeros(6, 6, dtype=torch.float64)):
            with pytest.raises(ValueError, match="attn_mask: expected none with `masked_logits: zero`"):
                sm.sparse_attention(*qkv(), mask, attn_mask=attn_mask)

    def test_dropout_with_zero_logits_is_refused(self):
        with pytest.raises(ValueError, match="dropout_p"):
            sm.sparse_attention(*qkv(), mask_of("local_zero", 6), dropout_p=0.5)


class TestReference:
    """The oracle itself, held against torch where torch is right."""

    def test_it_is_scaled_dot_product_attention(self):
        q, k, v = qkv(keys=9, value_dim=5)
        keep, bias = torch.rand(2, 2, 6, 9) < 0.6, torch.randn(6, 9, dtype=torch.float64)
        keep[0, 0, 2] = False
        additive = bias.masked_fill(~keep, -math.inf)
        expected = F.scaled_dot_product_attention(q, k, v, attn_mask=additive)
        assert_same(dense_attention(q, k, v, keep, bias=bias)[0], expected, atol=1e-14)

    def test_zero_logits_by_their_definition(self):
        q, k, v = qkv()
        keep = torch.rand(2, 2, 6, 6) < 0.5
        scores = (q @ k.transpose(-2, -1) / math.sqrt(3)) * keep
        out, lse = dense_attention(q, k, v, keep, masked_logits="zero")
        assert_same(out, scores.softmax(-1) @ v, atol=1e-14)
        assert_same(lse, scores.logsumexp(-1), atol=1e-14)
