"""Attention among tokens picked out of a sequence: the mask applies at the places they came from."""

import re

import pytest
import torch
from torch import nn

import sparse_mhsa as sm
from sparse_mhsa.positions import restrict_edges
from sparse_mhsa.reference import dense_attention

BATCH, HEADS, TOKENS, DIM = 3, 4, 26, 8
GRID = (5, 5)
STATIC = ["fibottention", "local", "longformer", "bigbird", "neighborhood", "axial"]


def config_of(name):
    kwargs = {"local": {"window": 2, "causal": True}, "neighborhood": {"kernel_size": 3}}.get(name, {})
    return {"mask": name, "mask_kwargs": kwargs, "num_prefix_tokens": 1}


def picked(present=11, *, first_is_zero=True, seed=0):
    """(B, n) different places per sample, shuffled, the class token first."""
    generator = torch.Generator().manual_seed(seed)
    rows = []
    for _ in range(BATCH):
        order = torch.randperm(TOKENS - 1, generator=generator) + 1
        rows.append(torch.cat([torch.zeros(1, dtype=torch.int64), order])[:present])
    positions = torch.stack(rows)
    return positions if first_is_zero else positions.flip(1)


def sub_masks(mask, positions):
    """(B, H, n, n) bool: M[p][:, p] of every sample."""
    dense = mask.to_dense()
    return torch.stack([dense[:, p][:, :, p] for p in positions])


def random_qkv(present, dtype=torch.float64):
    generator = torch.Generator().manual_seed(1)
    shape = (BATCH, HEADS, present, DIM)
    return [torch.randn(shape, generator=generator, dtype=dtype).requires_grad_() for _ in range(3)]


@pytest.mark.parametrize("name", STATIC)
@pytest.mark.parametrize("present", [1, 7, 26])
def test_the_sub_mask_at_the_positions_of_each_sample_applies(name, present):
    mask = sm.Mask.from_config(config_of(name), TOKENS, HEADS, grid=GRID)
    positions = picked(present, first_is_zero=False)
    q, k, v = random_qkv(present)
    out, lse = sm.sparse_attention(q, k, v, mask, token_positions=positions, return_lse=True)
    expected, expected_lse = dense_attention(q, k, v, sub_masks(mask, positions))
    torch.testing.assert_close(out, expected, atol=1e-12, rtol=0)
    torch.testing.assert_close(lse, expected_lse, atol=1e-12, rtol=0)
    weight = torch.randn_like(out)
    got = torch.autograd.grad((out * weight).sum(), (q, k, v))
    for one, other in zip(got, torch.autograd.grad((expected * weight).sum(), (q, k, v)), strict=True):
        torch.testing.assert_close(one, other, atol=1e-12, rtol=0)


def test_all_positions_in_order_are_the_whole_sequence():
    mask = sm.Mask.from_config(config_of("fibottention"), TOKENS, HEADS)
    q, k, v = random_qkv(TOKENS)
    everything = torch.arange(TOKENS).expand(BATCH, -1)
    out = sm.sparse_attention(q, k, v, mask, token_positions=everything)
    assert torch.equal(out, sm.sparse_attention(q, k, v, mask))


def test_masks_made_of_edges_have_sub_masks_too():
    generator = torch.Generator().manual_seed(3)
    dense = torch.rand(HEADS, TOKENS, TOKENS, generator=generator) < 0.2
    mask, positions = sm.Mask.from_dense(dense), picked(9)
    q, k, v = random_qkv(9)
    out = sm.sparse_attention(q, k, v, mask, token_positions=positions)
    torch.testing.assert_close(out, dense_attention(q, k, v, sub_masks(mask, positions))[0], atol=1e-12, rtol=0)


def test_edges_come_in_ascending_order_and_cost_what_the_present_rows_keep():
    mask = sm.Mask.from_config(config_of("bigbird"), TOKENS, HEADS)
    row_ptr, col = torch.ops.sparse_mhsa.edge_index(mask.source(TOKENS).spec, TOKENS, TOKENS)
    positions = picked(12)
    offsets, keys = restrict_edges(row_ptr, col, positions)
    dense = sub_masks(mask, positions).flatten(0, 1)
    assert offsets.shape == (BATCH * HEADS, 13)
    assert len(keys) == dense.sum()
    for one, pointers in zip(dense, offsets, strict=True):
        for row, keep in enumerate(one):
            assert keys[pointers[row] : pointers[row + 1]].tolist() == keep.nonzero().flatten().tolist()


def test_the_operator_keeps_the_contract_of_torch():
    mask = sm.Mask.from_config(config_of("local"), TOKENS, HEADS)
    edges = torch.ops.sparse_mhsa.edge_index(mask.source(TOKENS).spec, TOKENS, TOKENS)
    tests = ("test_schema", "test_autograd_registration", "test_faketensor")
    torch.library.opcheck(restrict_edges, (*edges, picked(5)), test_utils=tests)


# Layers.


def sparse_mha(name="fibottention", **kwargs):
    torch.manual_seed(0)
    kwargs = {"grid": GRID, "batch_first": True, "dtype": torch.float64, **kwargs}
    return sm.SparseMHSA(HEADS * DIM, HEADS, config=config_of(name), layer=2, **kwargs)


@pytest.mark.parametrize("batch_first", [True, False])
def test_a_layer_takes_positions(batch_first):
    layer, positions = sparse_mha(batch_first=batch_first), picked()
    x = torch.randn(BATCH, positions.shape[1], HEADS * DIM, dtype=torch.float64)
    given = x if batch_first else x.transpose(0, 1)
    out, weights = layer(given, given, given, token_positions=positions, average_attn_weights=False)

    dense = nn.MultiheadAttention(HEADS * DIM, HEADS, batch_first=True, dtype=torch.float64)
    dense.load_state_dict(layer.state_dict())
    drop = ~sub_masks(layer.mask(TOKENS), positions).flatten(0, 1)
    expected, expected_weights = dense(x, x, x, attn_mask=drop, average_attn_weights=False)
    torch.testing.assert_close(out, expected if batch_first else expected.transpose(0, 1), atol=1e-12, rtol=0)
    torch.testing.assert_close(weights, expected_weights, atol=1e-12, rtol=0)


def test_an_unbatched_layer_takes_positions_too():
    layer, positions = sparse_mha(), picked()[:1]
    x = torch.randn(positions.shape[1], HEADS * DIM, dtype=torch.float64)
    one, _ = layer(x, x, x, token_positions=positions[0])
    batch, _ = layer(x[None], x[None], x[None], token_positions=positions)
    torch.testing.assert_close(one, batch[0], atol=1e-12, rtol=0)


def test_a_layer_without_a_grid_is_told_the_length_of_the_sequence():
    layer = sparse_mha(grid=None)
    x = torch.randn(BATCH, 11, HEADS * DIM, dtype=torch.float64)
    with pytest.raises(ValueError, match="num_tokens: expected the length of the whole sequence"):
        layer(x, x, x, token_positions=picked())
    out, _ = layer(x, x, x, token_positions=picked(), num_tokens=TOKENS)
    again, _ = sparse_mha()(x, x, x, token_positions=picked())
    assert torch.equal(out, again)


def test_timm_attention_takes_positions():
    attention = pytest.importorskip("timm.layers.attention")
    torch.manual_seed(0)
    layer = attention.Attention(HEADS * DIM, HEADS, qkv_bias=True).double()
    x, positions = torch.randn(BATCH, 11, HEADS * DIM, dtype=torch.float64), picked()
    mask = sm.Mask.from_config(config_of("fibottention"), TOKENS, HEADS)
    expected = layer(x, attn_mask=sub_masks(mask, positions))
    sm.sparsify(layer, config_of("fibottention"))
    torch.testing.assert_close(layer(x, token_positions=positions, num_tokens=TOKENS), expected, atol=1e-12, rtol=0)


@pytest.mark.parametrize("name", ["none", "topk"])
def test_masks_that_do_not_ask_for_places_ignore_them(name):
    layer = sparse_mha(name)
    x = torch.randn(BATCH, 11, HEADS * DIM, dtype=torch.float64)
    out, _ = layer(x, x, x, token_positions=picked())
    plain, _ = layer(x, x, x)
    assert torch.equal(out, plain)


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # torch's own tracing
def test_training_compiles_with_positions():
    layer = sparse_mha()
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    x, positions = torch.randn(BATCH, 11, HEADS * DIM, dtype=torch.float64), picked()
    eager, _ = layer(x, x, x, token_positions=positions, need_weights=False)
    out, _ = compiled(x, x, x, token_positions=positions, need_weights=False)
    torch.testing.assert_close(out, eager, atol=1e-12, rtol=0)


class TestMappedSamples:
    """`torch.func.vmap` over samples that keep different tokens, whose edge lists are of different lengths."""

    x, positions = torch.randn(BATCH, 11, HEADS * DIM, dtype=torch.float64), picked()

    @staticmethod
    def loss(layer, need_weights=False):
        def loss(x, positions):
            out, _ = layer(x, x, x, token_positions=positions, need_weights=need_weights)
            return out.square().sum()

        return loss

    @pytest.mark.parametrize("name", ["local", "bigbird", "topk"])
    @pytest.mark.parametrize("batched", [True, False])
    def test_gradients(self, name, batched):
        loss = self.loss(sparse_mha(name))
        x, positions = (t[:, None] if batched else t for t in (self.x, self.positions))
        got = torch.func.vmap(torch.func.grad(loss))(x, positions)
        for sample in range(BATCH):
            truth = torch.func.grad(loss)(x[sample], positions[sample])
            torch.testing.assert_close(got[sample], truth, atol=1e-12, rtol=0)

    def test_the_same_tokens_in_each(self):
        loss = self.loss(sparse_mha())
        got = torch.func.vmap(loss, (0, None))(self.x, self.positions[0])
        truth = torch.stack([loss(x, self.positions[0]) for x in self.x])
        torch.testing.assert_close(got, truth, atol=1e-12, rtol=1e-12)

    def test_what_cannot_be_had_says_what_to_do(self):
        layer = sparse_mha("local")
        slope = torch.func.grad(self.loss(layer))
        for function in (
            self.loss(layer, need_weights=True),
            torch.func.grad(lambda x, positions: slope(x, positions).square().sum()),
        ):
            with pytest.raises(NotImplementedError, match="call the function once per sample"):
                torch.func.vmap(function)(self.x, self.positions)


# Errors.


def outside():
    positions = picked()
    positions[1, 3] = TOKENS
    return positions


def twice():
    positions = picked()
    positions[2, 4] = positions[2, 5]
    return positions


@pytest.mark.parametrize(
    ("positions", "error", "message"),
    [
        (lambda: picked().int(), TypeError, "expected an int64 tensor, got torch.int32"),
        (lambda: [0, 1], TypeError, "expected an int64 tensor, got list"),
        (lambda: picked()[0], ValueError, r"expected shape \(B, n\) = \(3, 11\), got \(11,\)"),
        (lambda: picked(5), ValueError, r"expected shape \(B, n\) = \(3, 11\), got \(3, 5\)"),
        (outside, ValueError, "expected places from 0 to 25, got 0 to 26"),
        (twice, ValueError, "expected different places, sample 2 has one twice"),
    ],
)
def test_positions_that_do_not_fit_are_named(positions, error, message):
    x = torch.randn(BATCH, 11, HEADS * DIM, dtype=torch.float64)
    with pytest.raises(error, match=f"token_positions: {message}"):
        sparse_mha()(x, x, x, token_positions=positions())


@pytest.mark.parametrize("batch_first", [True, False])
def test_a_message_has_the_shape_that_the_caller_passed(batch_first):
    layer = sm.SparseMHSA(12, 3, config="mask: none", batch_first=batch_first)
    one = torch.randn(5, 12)
    for positions in (torch.arange(4), torch.arange(5).expand(1, 5)):
        given = re.escape(str(tuple(positions.shape)))
        with pytest.raises(ValueError, match=rf"token_positions: expected shape \(n,\) = \(5,\), got {given}"):
            layer(one, one, one, token_positions=positions)
    batch = torch.randn(3, 5, 12) if batch_first else torch.randn(5, 3, 12)
    with pytest.raises(ValueError, match=r"token_positions: expected shape \(B, n\) = \(3, 5\), got \(5, 3\)"):
        layer(batch, batch, batch, token_positions=torch.zeros(5, 3, dtype=torch.int64))


@pytest.mark.parametrize("mask", [None, sm.masks.local(num_tokens=9, num_heads=2, window=1)])
def test_the_function_refuses_positions_that_are_no_tensor_of_integers(mask):
    q = torch.randn(1, 2, 9, 4)
    for positions, got in (([0, 1], "list"), (torch.arange(9.0)[None], "torch.float32")):
        with pytest.raises(TypeError, match=f"token_positions: expected an int64 tensor, got {got}"):
            sm.sparse_attention(q, q, q, mask, token_positions=positions)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"mask": "block_topk", "mask_kwargs": {"k": 1}}, "chooses keys by content and by place"),
        ({"mask": "topk", "mask_kwargs": {"causal": True}}, "chooses keys by content and by place"),
        ({"backend": "efficient"}, "the backend `efficient` has no edges"),
        ({"mask": "local", "mask_kwargs": {"window": 2}, "masked_logits": "zero"}, "masked_logits: `zero` cannot"),
    ],
    ids=str,
)
def test_mechanisms_that_have_no_sub_mask_say_so(config, message):
    layer = sm.SparseMHSA(HEADS * DIM, HEADS, batch_first=True, config=config, grid=GRID, num_prefix_tokens=1)
    x = torch.randn(BATCH, 11, HEADS * DIM)
    with pytest.raises(ValueError, match=message):
        layer(x, x, x, token_positions=picked())


def test_a_length_that_contradicts_the_grid_is_refused():
    x = torch.randn(BATCH, 11, HEADS * DIM, dtype=torch.float64)
    with pytest.raises(ValueError, match="is for 26 tokens, got 30"):
        sparse_mha()(x, x, x, token_positions=picked(), num_tokens=30)
    with pytest.raises(ValueError, match="only has a meaning together with token_positions"):
        sparse_mha()(x, x, x, num_tokens=26)


def test_topk_expects_the_prefix_first():
    layer = sparse_mha("topk")
    x = torch.randn(BATCH, 11, HEADS * DIM, dtype=torch.float64)
    with pytest.raises(ValueError, match="expects the 1 prefix tokens first"):
        layer(x, x, x, token_positions=picked(first_is_zero=False))
