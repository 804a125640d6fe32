"""Laws of numbers: data types, NaN and infinities, large and tiny scores, rows without keys, layouts."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

import sparse_mhsa as sm
from comparison import assert_as_good_as_dense, assert_same, oracle_with_grads
from sparse_mhsa.reference import dense_attention

FLOATS = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


def local(num_tokens, window=2, heads=2):
    config = {"mask": "local", "mask_kwargs": {"window": window}}
    return sm.Mask.from_config(config, num_tokens=num_tokens, num_heads=heads)


def draw(num_tokens, *, batch=1, heads=2, dim=16, magnitude=1.0, dtype=torch.float32):
    return [(torch.randn(batch, heads, num_tokens, dim) * magnitude).to(dtype) for _ in range(4)]


def run(q, k, v, grad_out, mask, **options):
    leaves = [x.detach().clone().requires_grad_() for x in (q, k, v)]
    out, lse = sm.sparse_attention(*leaves, mask, return_lse=True, **options)
    return out.detach(), lse, *torch.autograd.grad(out, leaves, grad_out)


QUANTITIES = {"out": 2, "lse": 2, "dq": 3, "dk": 3, "dv": 3}
"""What is compared, and how many times the error of dense torch it may have: the tolerance rule."""


def results(inputs, mask):
    """Ours, dense torch's in the same dtype, and the exact ones."""
    dense = mask.to_dense()
    plain, exact = (oracle_with_grads(*inputs, dense, dtype) for dtype in (inputs[0].dtype, torch.float64))
    return run(*inputs, mask), plain, exact


def assert_accurate(inputs, mask):
    """The tolerance rule."""
    for (name, factor), mine, base, truth in zip(QUANTITIES.items(), *results(inputs, mask), strict=True):
        assert_as_good_as_dense(mine, base, truth, factor=factor, what=name)


def around_a_tile(test):
    """Kernels for scattered and for dense edges, with one token more or less than their tiles have."""
    test = pytest.mark.parametrize("num_tokens", [15, 16, 17, 31, 32, 33])(test)
    return pytest.mark.parametrize("name", ["local", "fibottention", "none"])(test)


def mask_named(name, num_tokens):
    options = {"local": {"window": 2}, "random": {"k": 3}, "block": {"block_size": 8}}
    config = {"mask": name, "mask_kwargs": options.get(name, {})}
    return sm.Mask.from_config(config, num_tokens=num_tokens, num_heads=2)


@around_a_tile
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("magnitude", [1.0, 5.0])
def test_larger_inputs_lose_no_precision(name, num_tokens, magnitude, dtype):
    """Scores around a hundred too."""
    assert_accurate(draw(num_tokens, magnitude=magnitude, dtype=dtype), mask_named(name, num_tokens))


@around_a_tile
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_scores_of_two_thousand_lose_no_precision_where_they_are_exact(name, num_tokens, dtype):
    """Queries and keys of whole numbers, and a scale of 1/4: no order of additions rounds a score."""
    (q, k, *_), (_, _, v, grad_out) = draw(num_tokens, magnitude=20.0), draw(num_tokens)
    inputs = [x.to(dtype) for x in (q.round(), k.round(), v, grad_out)]
    assert_accurate(inputs, mask_named(name, num_tokens))


@around_a_tile
def test_scores_of_two_thousand_are_as_precise_as_dense_torch_in_the_median(name, num_tokens):
    """Float32 knows such a score to 1e-4, so that which result is better is luck in one draw, but not in many."""
    mask, draws = mask_named(name, num_tokens), 48
    errors = torch.zeros(2, len(QUANTITIES), draws, dtype=torch.float64)
    for index in range(draws):
        ours, plain, exact = results(draw(num_tokens, magnitude=20.0), mask)
        for which, got in enumerate((ours, plain)):
            for quantity, (x, truth) in enumerate(zip(got, exact, strict=True)):
                errors[which, quantity, index] = (x.double() - truth).abs().max()
    ours, plain = errors.median(dim=2).values
    for name, mine, base, factor in zip(QUANTITIES, ours, plain, QUANTITIES.values(), strict=True):
        assert mine <= factor * base, f"{name}: {mine:.3e}, plain torch {base:.3e}"


def gradients_of_one_key_head(q, grad_out, mask):
    """dq, dk and dv where every head shares one head of k and v: ours, dense torch's, the exact ones."""
    heads, num_tokens, dim = q.shape[1:]
    k, v = (torch.randn(1, 1, num_tokens, dim) for _ in range(2))
    for dtype, ours in ((torch.float32, True), (torch.float32, False), (torch.float64, False)):
        leaves = [x.detach().to(dtype).requires_grad_() for x in (q, k, v)]
        if ours:
            out = sm.sparse_attention(*leaves, mask)
        else:
            key, value = (x.expand(1, heads, -1, -1) for x in leaves[1:])
            scores = leaves[0] @ key.transpose(-1, -2) / math.sqrt(dim)
            if mask is not None:
                scores = scores.masked_fill(~mask.to_dense(), -math.inf)
            out = torch.softmax(scores, dim=-1) @ value
        yield torch.autograd.grad(out, leaves, grad_out.to(dtype))


@pytest.mark.parametrize(("num_tokens", "heads"), [(577, 32), (1025, 8)])
def test_many_query_heads_of_one_key_head_lose_no_precision(num_tokens, heads):
    """dk and dv are sums over the queries of every head that shares the key."""
    q, grad_out = (torch.randn(1, heads, num_tokens, 64) for _ in range(2))
    gradients = gradients_of_one_key_head(q, grad_out, None)
    for name, mine, base, truth in zip(("dq", "dk", "dv"), *gradients, strict=True):
        assert_as_good_as_dense(mine, base, truth, factor=3, what=name)


def assert_root_mean_squares(names, mine, base, truth):
    """At most three times the error of dense torch: the tolerance rule sees the worst entry alone."""
    for name, *results, exact in zip(names, mine, base, truth, strict=True):
        error, allowed = ((x.double() - exact).square().mean().sqrt() for x in results)
        assert error <= 3 * allowed, f"{name}: {error:.3e}, dense torch {allowed:.3e}"


@pytest.mark.parametrize("num_queries", [16, 100, 600, 4000])
@pytest.mark.parametrize("dim", [8, 13, 64])
def test_one_key_for_all_queries_gets_no_gradient(num_queries, dim):
    """Its weight is 1 whatever its score: dS is 0, and no sum of thousands of them rounds to anything else."""
    q, k, v = (torch.randn(1, 1, tokens, dim, requires_grad=True) for tokens in (num_queries, 1, 1))
    dq, dk = torch.autograd.grad(sm.sparse_attention(q, k, v, None).sum(), (q, k))
    assert not dq.any()
    assert not dk.any()


def test_a_bias_that_thousands_of_queries_share_loses_no_precision():
    q, k, v, grad_out = draw(2100, heads=2)
    bias = torch.randn(1, 1, 1, 2100)
    gradients = []
    for dtype, ours in ((torch.float32, True), (torch.float32, False), (torch.float64, False)):
        tensors, leaf = [x.to(dtype) for x in (q, k, v)], bias.to(dtype).requires_grad_()
        if ours:
            out = sm.sparse_attention(*tensors, None, attn_mask=leaf)
        else:
            out = F.scaled_dot_product_attention(*tensors, leaf)
        gradients.append(torch.autograd.grad(out, leaf, grad_out.to(dtype)))
    assert_root_mean_squares(["dbias"], *gradients)


@pytest.mark.parametrize("name", ["strided_columns", "longformer"])
@pytest.mark.parametrize("dim", [13, 64, 253])
def test_a_key_that_every_query_keeps_loses_no_precision(name, dim):
    """Its dv is a long sum, of one sign where `out.sum()` is differentiated; 13 channels fill no register."""
    config = {"mask": name, "num_prefix_tokens": 1, "mask_kwargs": {"stride": 64} if name == "strided_columns" else {}}
    mask = sm.Mask.from_config(config, num_tokens=1025, num_heads=3)
    q = torch.randn(1, 3, 1025, dim)
    assert_root_mean_squares(("dq", "dk", "dv"), *gradients_of_one_key_head(q, torch.ones_like(q), mask))


@pytest.mark.parametrize("like", [torch.ones_like, torch.randn_like])
def test_sums_over_thousands_of_tokens_lose_no_precision(like):
    """Terms of one sign, as `out.sum()` gives, in one chain of additions err up to ten times as much as dense torch."""
    mask = sm.masks.local(num_tokens=2049, num_heads=1, window=2049, causal=True)
    q, k, v, grad_out = draw(2049, heads=1, dim=64)
    assert_root_mean_squares(QUANTITIES, *results((q, k, v, like(grad_out)), mask))


def broken(results):
    """How many samples of the batch break the tolerance rule, each held to the error that dense torch has in it."""
    count = 0
    for sample in zip(*(zip(*each, strict=True) for each in results), strict=True):
        try:
            for (name, factor), mine, base, truth in zip(QUANTITIES.items(), *sample, strict=True):
                assert_as_good_as_dense(mine, base, truth, factor=factor, what=name)
        except AssertionError:
            count += 1
    return count


@pytest.mark.parametrize("num_tokens", [17, 33, 197])
@pytest.mark.parametrize("name", ["bigbird", "random", "local", "fibottention", "none"])
def test_where_one_key_has_nearly_all_the_weight_gradients_are_as_precise_as_what_is_left(name, num_tokens):
    """Scores up to two thousand, exact: dS is a difference of numbers that are all but equal."""
    q, k, v, grad_out = draw(num_tokens, batch=24, magnitude=20.0)
    assert broken(results((q.round(), k.round(), v, grad_out), mask_named(name, num_tokens))) == 0


@pytest.mark.parametrize(("num_tokens", "dim"), [(17, 64), (40, 64), (197, 128)])
def test_dense_parts_round_scores_less_than_a_chain_of_all_channels_would(num_tokens, dim):
    """Dense torch adds products of channels in one chain; sums of sixteen err half as much."""
    ours, plain, exact = results(draw(num_tokens, batch=12, dim=dim, magnitude=5.0), mask_named("none", num_tokens))
    error, allowed = ((got[0] - exact[0]).square().mean() for got in (ours, plain))
    assert error < 0.8**2 * allowed


@pytest.mark.parametrize(("num_tokens", "magnitude", "draws"), [(9, 5.0, 96), (33, 10.0, 48), (33, 20.0, 48)])
@pytest.mark.parametrize("name", ["local", "fibottention", "block", "none"])
def test_large_scores_break_the_rule_no_more_often_than_dense_torch_in_another_order(
    name, num_tokens, magnitude, draws
):
    """With channels and keys reordered, dense attention is the same sum, and as good a result as the one that rules."""
    mask = mask_named(name, num_tokens)
    order = torch.randperm(num_tokens)
    back, dense = order.argsort(), mask.to_dense().expand(draws, 2, num_tokens, num_tokens)[..., order]
    q, k, v, grad_out = draw(num_tokens, batch=draws, dim=64, magnitude=magnitude)
    mine, plain, exact = results((q, k, v, grad_out), mask)
    tensors = q.flip(-1), k.flip(-1)[:, :, order], v.flip(-1)[:, :, order], grad_out.flip(-1)
    out, lse, dq, dk, dv = oracle_with_grads(*tensors, dense, torch.float32)
    other = out.flip(-1), lse, dq.flip(-1), dk.flip(-1)[:, :, back], dv.flip(-1)[:, :, back]
    ours, theirs = broken((mine, plain, exact)), broken((other, plain, exact))
    assert theirs > 0, "the rule would hold for every order: it can be promised"
    assert ours - theirs <= 3 * math.sqrt(ours + theirs), "more than chance explains"


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("num_tokens", [17, 197, 512])
@pytest.mark.parametrize("kept", ["most of all", "most of what padding leaves", "few"])
@pytest.mark.parametrize("name", ["local", "random"])
def test_with_masked_logits_zero_little_may_be_left_of_much(name, kept, num_tokens, dtype):
    """Keys that are kept score far below 0: the weight lies on those that are dropped, however few they are."""
    width = {"most of all": num_tokens - 6, "most of what padding leaves": num_tokens // 3, "few": 2}[kept]
    config = {"mask": name, "mask_kwargs": {"window" if name == "local" else "k": width}, "masked_logits": "zero"}
    mask = sm.Mask.from_config(config, num_tokens=num_tokens, num_heads=2)
    padded = (torch.arange(num_tokens) < width + 3).unsqueeze(0) if kept == "most of what padding leaves" else None
    q, k, v, grad_out = draw(num_tokens, dtype=dtype)
    inputs = (q.abs() + 3, -k.abs() - 3, v, grad_out)
    ours = run(*inputs, mask, key_padding_mask=padded)
    assert ours[1].max() < math.log(num_tokens), "what is kept weighs next to nothing"
    options = {"key_mask": padded, "masked_logits": "zero"}
    plain, exact = (oracle_with_grads(*inputs, mask.to_dense(), kind, **options) for kind in (dtype, torch.float64))
    for (quantity, factor), mine, base, truth in zip(QUANTITIES.items(), ours, plain, exact, strict=True):
        assert_as_good_as_dense(mine, base, truth, factor=factor, what=quantity)


@around_a_tile
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_scores_of_two_thousand_keep_the_rule_in_half_precision(name, num_tokens, dtype):
    assert_accurate(draw(num_tokens, magnitude=20.0, dtype=dtype), mask_named(name, num_tokens))


@around_a_tile
def test_scores_of_two_thousand_are_exact_to_ten_digits_in_float64(name, num_tokens):
    ours, _, exact = results(draw(num_tokens, magnitude=20.0, dtype=torch.float64), mask_named(name, num_tokens))
    for mine, truth in zip(ours, exact, strict=True):
        assert_same(mine, truth, atol=1e-10 * max(1.0, float(truth.abs().max())))


@pytest.mark.parametrize("head_dim", [1, 3, 7, 33, 65, 256])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_every_head_dimension_is_as_precise(head_dim, dtype):
    assert_accurate(draw(19, dim=head_dim, dtype=dtype), local(19))


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("sign", [1, -1])
def test_scores_of_ten_thousand_stay_finite(dtype, sign):
    q, k, v, grad = draw(24, dim=1, dtype=dtype)
    q, k = torch.full_like(q, 100.0), torch.full_like(k, sign * 100.0)
    k[:, :, ::2] = sign * 99.0
    inputs, mask = (q, k, v, grad), local(24)
    results = run(*inputs, mask, scale=1.0)
    assert all(torch.isfinite(x).all() for x in results)
    expected, _ = dense_attention(*(x.double() for x in (q, k, v)), mask.to_dense(), scale=1.0)
    # The scores are whole numbers and tens apart, so every type knows them well enough to choose the same keys.
    assert_same(results[0].double(), expected, atol=4 * torch.finfo(dtype).eps * v.double().abs().max())


def test_gradients_at_large_scores_err_at_most_three_times_as_much_as_torchs_flash_kernel():
    # Scores of a thousand are known to a ten-thousandth, by torch's dense kernel as by ours.
    for seed in range(4):
        torch.manual_seed(seed)
        q, k, v, grad = (torch.randn(1, 2, 12, 16) for _ in range(4))
        q, k = q * 30, k * 30
        mask = sm.Mask.from_config({"mask": "none"}, num_tokens=12, num_heads=2)

        def flash(dtype, backend, tensors=(q, k, v, grad)):
            leaves = [x.to(dtype).requires_grad_() for x in tensors[:3]]
            with sdpa_kernel(backend):
                out = F.scaled_dot_product_attention(*leaves)
                return torch.autograd.grad(out, leaves, tensors[3].to(dtype))

        exact = flash(torch.float64, SDPBackend.MATH)
        plain = flash(torch.float32, SDPBackend.FLASH_ATTENTION)
        math_ = flash(torch.float32, SDPBackend.MATH)
        for mine, base, other, truth in zip(run(q, k, v, grad, mask)[2:], plain, math_, exact, strict=True):
            scale = truth.abs().max()
            allowed = 3 * max((base - truth).abs().max(), (other - truth).abs().max()) + 1e-6 * scale
            assert (mine - truth).abs().max() <= allowed


def test_weights_too_small_for_a_normal_number_are_exactly_zero_or_as_exact_as_torchs():
    # Scores of 0 and of -110 to -80: float32 ends at exp(-87.3), its denormal numbers at exp(-103.3).
    keys = 32
    q, v = torch.ones(1, 1, 1, 1), torch.randn(1, 1, keys, 4)
    k = torch.linspace(-110, -80, keys).reshape(1, 1, keys, 1)
    k[0, 0, 0] = 0.0
    out, lse = sm.sparse_attention(q, k, v, None, scale=1.0, return_lse=True)
    assert_same(out, v[:, :, :1], rtol=1e-6, atol=1e-30)
    assert lse.item() == 0.0


@pytest.mark.parametrize("where", ["start", "middle", "end", "everywhere"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_window_that_lies_in_the_padding_gives_zero_and_finite_gradients(where, dtype):
    keep = torch.ones(1, 600, dtype=torch.bool)
    span = {"start": slice(0, 200), "middle": slice(200, 400), "end": slice(400, 600), "everywhere": slice(0, 600)}
    keep[:, span[where]] = False
    q, k, v, grad = draw(600, heads=1, dim=8, dtype=dtype)
    k[:, :, span[where]], v[:, :, span[where]] = math.nan, math.inf
    mask = local(600, window=4, heads=1)
    out, lse, *grads = run(q, k, v, grad, mask, key_padding_mask=keep)
    empty = ~(mask.to_dense()[0] & keep).any(-1)
    assert empty.sum() >= 190
    assert (out[:, :, empty] == 0).all()
    assert (lse[:, :, empty] == -math.inf).all()
    assert torch.isfinite(lse[:, :, ~empty]).all()
    assert all(torch.isfinite(x).all() for x in (out, *grads))
    assert (grads[0][:, :, empty] == 0).all()
    assert all((x[:, :, span[where]] == 0).all() for x in grads[1:])


@pytest.mark.parametrize("scale", [math.inf, -math.inf, math.nan])
def test_a_scale_that_is_no_number_gives_what_dense_attention_gives(scale):
    q, k, v, _ = draw(9, dtype=torch.float64)
    mask = local(9)
    expected, lse = dense_attention(q, k, v, mask.to_dense(), scale=scale)
    got, got_lse = sm.sparse_attention(q, k, v, mask, scale=scale, return_lse=True)
    rows = torch.isnan(lse)
    assert torch.equal(torch.isnan(got_lse), rows)
    assert torch.equal(torch.isnan(got).all(-1), rows)
    assert_same(got[~rows], expected[~rows], atol=1e-12)


@pytest.mark.parametrize("place", ["q", "k", "v"])
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_what_is_not_a_number_in_an_attended_place_shows_where_dense_attention_shows_it(place, value):
    inputs = dict(zip("qkv", draw(9, dtype=torch.float64)[:3], strict=True))
    inputs[place][0, 0, 4, 1] = value
    mask = local(9)
    got, lse = sm.sparse_attention(*inputs.values(), mask, return_lse=True)
    reached = mask.to_dense()[0, :, 4] if place != "q" else torch.arange(9) == 4
    assert torch.isfinite(got[0, 1]).all()
    assert torch.isfinite(got[0, 0, ~reached]).all()
    # A key that scores +inf is undefined, one that scores -inf only loses its weight.
    undefined = ~torch.isfinite(got[0, 0]).all(-1)
    if math.isnan(value) or place == "v":
        assert torch.equal(undefined, reached)
    else:
        expected, expected_lse = dense_attention(*inputs.values(), mask.to_dense().unsqueeze(0))
        rows = reached & torch.isnan(expected_lse[0, 0])
        assert torch.isnan(lse[0, 0, rows]).all()
        assert_same(got[0, 0, ~reached], expected[0, 0, ~reached], atol=1e-12)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_misaligned_and_huge_strides_change_no_bit(dtype):
    mask = local(7)
    storage = torch.randn(3 + 2 * 7 * 5).to(dtype)
    misaligned = [storage[i : i + 70].view(1, 2, 7, 5) for i in (1, 2, 3)]
    # One row of memory, claimed to be any number of elements apart where a dimension has one entry only.
    far = [torch.as_strided(storage, (1, 2, 7, 5), (2**40, 5, 10, 1), i) for i in range(3)]
    for tensors in (misaligned, far):
        grad = torch.ones((), dtype=dtype).expand(1, 2, 7, 5)
        views, copies = run(*tensors, grad, mask), run(*(x.contiguous() for x in tensors), grad.contiguous(), mask)
        assert all(torch.equal(a, b) for a, b in zip(views, copies, strict=True))


def test_hooks_see_the_gradients_and_unused_outputs_need_none():
    q, k, v, _ = (x.requires_grad_() for x in draw(9, dtype=torch.float64))
    seen = []
    q.register_hook(lambda grad: seen.append(grad.clone()))
    out = sm.sparse_attention(q, k, v, local(9))
    out.register_hook(lambda grad: grad * 2)
    out.sum().backward()
    (expected,) = torch.autograd.grad(dense_attention(q, k, v, local(9).to_dense())[0].sum() * 2, q)
    assert_same(seen[0], expected, atol=1e-12)
    assert_same(q.grad, seen[0])


def test_subclasses_of_tensor_are_taken_for_what_they_hold():
    class Tagged(torch.Tensor):
        pass

    q, k, v, _ = draw(9)
    expected = sm.sparse_attention(q, k, v, local(9))
    got = sm.sparse_attention(*(x.as_subclass(Tagged) for x in (q, k, v)), local(9))
    assert torch.equal(torch.as_tensor(got).as_subclass(torch.Tensor), expected)


def test_parameters_are_tensors_too():
    q, k, v, _ = (torch.nn.Parameter(x) for x in draw(9))
    sm.sparse_attention(q, k, v, local(9)).sum().backward()
    assert all(torch.isfinite(x.grad).all() for x in (q, k, v))
