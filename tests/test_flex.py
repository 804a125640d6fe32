"""The backend `flex`: FlexAttention over our edges equals dense masked attention, and refuses what it cannot do."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import sparse_mhsa as sm
from comparison import assert_same
from sparse_mhsa import flex
from sparse_mhsa.reference import dense_attention

HEADS, TOKENS = 2, 150
FIBOTTENTION = {"backend": "flex", "mask": "fibottention"}

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torch's own, while it compiles


def mask_of(config, num_tokens=TOKENS, num_heads=HEADS):
    return sm.Mask.from_config(config, num_tokens=num_tokens, num_heads=num_heads)


def qkv(num_tokens=TOKENS, dtype=torch.float32, heads=HEADS, kv_heads=HEADS):
    return [torch.randn(2, h, num_tokens, 16, dtype=dtype) for h in (heads, kv_heads, kv_heads)]


def layer(config=FIBOTTENTION, **options):
    return sm.SparseMHSA(16 * HEADS, HEADS, batch_first=True, config=config, **options)


# More than 128 tokens, so that there are several blocks; one shape, so that FlexAttention is compiled once for all.
class TestValues:
    @pytest.mark.parametrize(
        "config",
        [
            FIBOTTENTION,
            {"backend": "flex", "mask": "none"},
            {"backend": "flex", "mask": "local", "mask_kwargs": {"window": 3, "causal": True}, "scale": 0.3},
            {"backend": "flex", "mask": "block", "mask_kwargs": {"block_size": 7}},
            {"backend": "flex", "mask": "strided", "mask_kwargs": {"stride": 40, "causal": True}},
        ],
        ids=lambda config: config["mask"],
    )
    def test_it_is_dense_masked_attention(self, config):
        q, k, v = qkv()
        mask = mask_of(config)
        expected, _ = dense_attention(q, k, v, mask.to_dense(), scale=config.get("scale"))
        assert_same(sm.sparse_attention(q, k, v, mask), expected, rtol=1e-5, atol=2e-6)

    def test_padded_keys_and_samples_without_any_key(self):
        q, k, v = qkv()
        keep = torch.ones(2, TOKENS, dtype=torch.bool)
        keep[0, 77:] = False
        keep[1] = False
        mask = mask_of(FIBOTTENTION)
        out = sm.sparse_attention(q, k, v, mask, key_padding_mask=keep)
        expected, _ = dense_attention(q, k, v, mask.to_dense(), key_mask=keep)
        assert_same(out, expected, rtol=1e-5, atol=2e-6)
        assert (out[1] == 0).all()

    def test_layers_and_swapped_models(self):
        config = {"mask": "fibottention", "num_prefix_tokens": 1}
        by_flex, by_kernels = layer(config | {"backend": "flex"}).eval(), layer(config).eval()
        by_kernels.load_state_dict(by_flex.state_dict())
        x = torch.randn(2, TOKENS, 16 * HEADS)
        padding = torch.zeros(2, TOKENS, dtype=torch.bool)
        padding[0, 100:] = True
        with torch.no_grad():
            for options in ({}, {"key_padding_mask": padding}):
                got, weights = by_flex(x, x, x, need_weights=False, **options)
                assert weights is None
                assert_same(got, by_kernels(x, x, x, need_weights=False, **options)[0], rtol=1e-5, atol=2e-6)
        assert "backend=flex, mask=fibottention" in repr(by_flex)

    def test_verification_counts_its_calls(self):
        encoder = torch.nn.TransformerEncoder(
            torch.nn.TransformerEncoderLayer(16 * HEADS, HEADS, 32, batch_first=True, dropout=0.0), 2
        )
        sample = torch.randn(2, TOKENS, 16 * HEADS)
        report = sm.sparsify(encoder, FIBOTTENTION, sample=sample, verify=True)
        assert len(report.swapped) == 2

    def test_a_mask_registered_again_means_its_new_edges(self):
        q, k, v = qkv()
        for shift in (0, 1):
            edges = torch.eye(TOKENS).roll(shift, 1).bool()
            sm.register_mask("flexible", edges, replace=True)
            got = sm.sparse_attention(q, k, v, mask_of({"backend": "flex", "mask": "flexible"}))
            assert_same(got, v.roll(-shift, 2), atol=1e-6)

    def test_its_operations_are_counted(self):
        mask, arguments = mask_of(FIBOTTENTION), qkv()
        with FlopCounterMode(display=False) as counter:
            sm.sparse_attention(*arguments, mask)
        assert counter.get_total_flops() == 2 * 2 * mask.nnz * (16 + 16)

    def test_nothing_to_attend_to(self):
        q, k, v = (torch.randn(0, HEADS, 6, 4) for _ in range(3))
        assert sm.sparse_attention(q, k, v, mask_of(FIBOTTENTION, 6)).shape == q.shape
        q, k, v = (x.to("meta") for x in qkv())
        assert sm.sparse_attention(q, k, v, mask_of(FIBOTTENTION)).is_meta

    @pytest.mark.slow
    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    def test_half_types(self, dtype):
        q, k, v = qkv(dtype=dtype)
        mask = mask_of(FIBOTTENTION)
        expected, _ = dense_attention(*(x.double() for x in (q, k, v)), mask.to_dense())
        got = sm.sparse_attention(q, k, v, mask).double()
        assert_same(got, expected, atol=4 * torch.finfo(dtype).eps)

    @pytest.mark.slow
    def test_heads_of_q_share_heads_of_k_and_v(self):
        q, k, v = qkv(heads=4, kv_heads=2)
        mask = mask_of(FIBOTTENTION, num_heads=4)
        expected, _ = dense_attention(q, k, v, mask.to_dense())
        assert_same(sm.sparse_attention(q, k, v, mask), expected, rtol=1e-5, atol=2e-6)


class TestRefusals:
    @pytest.mark.parametrize(
        ("option", "message"),
        [
            ({"attn_mask": torch.zeros(TOKENS, TOKENS)}, "attn_mask: the backend `flex` cannot honour it"),
            ({"dropout_p": 0.5}, "dropout: the backend `flex`"),
            ({"return_lse": True}, "need_weights, return_lse: the backend `flex`"),
        ],
    )
    def test_options_are_named(self, option, message):
        with pytest.raises(ValueError, match=message):
            sm.sparse_attention(*qkv(), mask_of(FIBOTTENTION), **option)

    def test_weights_of_a_layer(self):
        x = torch.randn(2, TOKENS, 16 * HEADS)
        with torch.no_grad(), pytest.raises(ValueError, match="need_weights, return_lse: the backend `flex`"):
            layer()(x, x, x)

    def test_dropout_of_a_layer_before_anything_runs(self):
        with pytest.raises(
            ValueError, match=r"dropout: expected 0, because the backend `flex` drops no weights; got 0.1"
        ):
            layer(dropout=0.1)

    def test_keys_that_are_added_to_a_mask(self):
        x = torch.randn(2, TOKENS, 16 * HEADS)
        with torch.no_grad(), pytest.raises(ValueError, match="add_zero_attn: the backend `flex`"):
            layer(add_zero_attn=True)(x, x, x, need_weights=False)

    def test_gradients_on_the_cpu(self):
        x = torch.randn(2, TOKENS, 16 * HEADS)
        with pytest.raises(ValueError, match=r"backend: `flex` has no backward pass on the CPU; use torch.no_grad\(\)"):
            layer()(x, x, x, need_weights=False)

    def test_compilation_from_outside(self):
        q, k, v = qkv()
        mask = mask_of(FIBOTTENTION)
        compiled = torch.compile(lambda q: sm.sparse_attention(q, k, v, mask), fullgraph=True, backend="aot_eager")
        with pytest.raises(Exception, match="`flex` compiles itself and cannot be part of a compiled function"):
            compiled(q)

    def test_float64_on_the_cpu(self):
        with pytest.raises(
            TypeError, match=r"on the CPU the backend `flex` computes torch.float32, .* got torch.float64"
        ):
            sm.sparse_attention(*qkv(dtype=torch.float64), mask_of(FIBOTTENTION))

    @pytest.mark.parametrize(
        ("config", "message"),
        [
            ({"mask": "topk"}, r"mask: the backend `flex` needs edges .* `topk` chooses them by content"),
            ({"mask": "importance", "mask_kwargs": {"k": 3}}, r"mask: .*`importance` chooses them by content"),
            ({"mask": "none", "masked_logits": "zero"}, r"masked_logits: the backend `flex` .* cannot honour `zero`"),
            ({"mask": "none", "on_empty_row": "error"}, r"on_empty_row: the backend `flex` .* cannot honour `error`"),
            ({"mask": "none", "backend_kwargs": {"block": 1}}, r"backend_kwargs.block: unknown key"),
        ],
    )
    def test_configurations(self, config, message):
        with pytest.raises(sm.ConfigError, match=message):
            sm.load_config({"backend": "flex", **config})

    def test_the_name_is_taken(self):
        with pytest.raises(ValueError, match="the name `flex` belongs to a built-in backend"):
            sm.register_backend("flex")(lambda q, k, v: v)


def test_edges_without_a_configuration_are_for_our_kernels():
    mask = mask_of(FIBOTTENTION)
    assert mask.backend == flex.NAME
    assert (mask | mask).backend == "vit"
