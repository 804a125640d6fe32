"""Caches of keys and values against lists that grow and shrink as their definitions say (`cache_oracle`)."""

import copy
import io
import math
import pickle

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

import sparse_mhsa as sm
from cache_oracle import CacheOracle
from comparison import assert_as_good_as_dense
from sparse_mhsa import KVCache, LayerCache
from sparse_mhsa.cache_policy import CachePolicy
from sparse_mhsa.reference import dense_attention

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
POLICIES = {
    "full": {},
    "sliding_window": {},
    "attention_sinks": {"sinks": 2},
    "score_based": {},
    "combined": {"recent": 2, "sinks": 1},
    "norm_based": {"recent": 1},
}
VARIANTS = [
    *POLICIES.items(),
    ("attention_sinks", {}),
    ("attention_sinks", {"sinks": 0}),
    ("combined", {"recent": 3}),
    ("combined", {"recent": 0}),
    ("combined", {"recent": 4, "sinks": 1}),
    ("norm_based", {}),
    ("norm_based", {"keep": "high", "sinks": 2}),
]


def tensors(batch=2, heads=4, kv_heads=2, tokens=20, dim=8, value_dim=6, dtype=torch.float64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    shapes = ((batch, heads, tokens, dim), (batch, kv_heads, tokens, dim), (batch, kv_heads, tokens, value_dim))
    return [2 * torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for shape in shapes]


def layer(name, capacity, **options):
    return LayerCache(CachePolicy(name, **options), None if name == "full" else capacity)


def in_calls(cache, q, k, v, sizes, **options):
    """Feed the tokens in calls of these sizes."""
    parts = [x.split(sizes, dim=2) for x in (q, k, v)]
    return torch.cat([cache.attend(*part, **options) for part in zip(*parts, strict=True)], dim=2)


def assert_holds(cache, oracle, atol=1e-12):
    """The same tokens in the same order, with their keys, values and scores."""
    entries = cache.entries()
    for b, heads in enumerate(oracle.heads):
        for h, head in enumerate(heads):
            length = int(entries.lengths[b, h])
            assert entries.positions[b, h, :length].tolist() == [token.position for token in head.tokens]
            assert (entries.positions[b, h, length:] == -1).all()
            assert np.array_equal(entries.keys[b, h, :length], np.array([token.key for token in head.tokens]))
            assert np.array_equal(entries.values[b, h, :length], np.array([token.value for token in head.tokens]))
            if cache.policy.worth == "attention":
                scores = [token.score for token in head.tokens]
                assert entries.worths[b, h, :length].numpy() == pytest.approx(np.array(scores), abs=atol)


# What is kept, and what is seen.


@pytest.mark.parametrize("sizes", [[1] * 20, [20], [7, 1, 1, 5, 6], [5, 15]], ids=str)
@pytest.mark.parametrize(("name", "options"), VARIANTS, ids=str)
def test_tokens_see_and_the_cache_keeps_what_the_definition_says(name, options, sizes):
    q, k, v = tensors()
    cache, oracle = layer(name, 6, **options), CacheOracle(name, [6, 6], 2, **options)
    start = 0
    for size in sizes:
        part = [x[:, :, start : start + size] for x in (q, k, v)]
        out, lse = cache.attend_with_lse(*part)
        expected_out, expected_lse = oracle.attend(*(x.numpy() for x in part))
        assert torch.allclose(out, torch.from_numpy(expected_out), atol=1e-12, rtol=0)
        assert torch.allclose(lse, torch.from_numpy(expected_lse), atol=1e-12, rtol=0)
        assert_holds(cache, oracle)
        start += size


@pytest.mark.parametrize(("name", "options"), POLICIES.items(), ids=str)
def test_heads_have_capacities_of_their_own_and_padding_does_not_join(name, options):
    q, k, v = tensors(batch=3, heads=6, kv_heads=3, tokens=24)
    real = torch.rand(3, 24, generator=torch.Generator().manual_seed(1)) < 0.7
    real[0, :9] = False  # padding on the left
    real[1, -9:] = False  # and on the right
    capacities = [4, 9, 30]
    cache = layer(name, capacities, **options)
    oracle = CacheOracle(name, capacities, 3, **options)
    for start, end in ((0, 11), (11, 12), (12, 13), (13, 24)):
        part = [x[:, :, start:end] for x in (q, k, v)]
        out = cache.attend(*part, token_mask=real[:, start:end])
        expected, _ = oracle.attend(*(x.numpy() for x in part), real=real[:, start:end])
        assert torch.allclose(out, torch.from_numpy(expected), atol=1e-12, rtol=0)
        assert_holds(cache, oracle)
    assert cache.tokens_seen.tolist() == real.sum(1).tolist()
    bounded = torch.tensor([24, 24, 24] if name == "full" else capacities)
    assert torch.equal(cache.lengths, torch.minimum(real.sum(1)[:, None], bounded))


@pytest.mark.parametrize("window", [0, 3, 5, 30])
@pytest.mark.parametrize("sizes", [[1] * 20, [20], [7, 1, 1, 5, 6]], ids=str)
@pytest.mark.parametrize(("name", "options"), POLICIES.items(), ids=str)
def test_a_window_hides_what_is_kept_further_back(name, options, sizes, window):
    q, k, v = tensors()
    cache, oracle = layer(name, 6, **options), CacheOracle(name, [6, 6], 2, window, **options)
    start = 0
    for size in sizes:
        part = [x[:, :, start : start + size] for x in (q, k, v)]
        out, lse = cache.attend_with_lse(*part, window=window)
        expected_out, expected_lse = oracle.attend(*(x.numpy() for x in part))
        assert torch.allclose(out, torch.from_numpy(expected_out), atol=1e-12, rtol=0)
        assert torch.allclose(lse, torch.from_numpy(expected_lse), atol=1e-12, rtol=0)
        assert_holds(cache, oracle)
        start += size


@pytest.mark.parametrize("prompt", [1, 2, 9, 13, 40])
@pytest.mark.parametrize(
    ("name", "options"), [v for v in VARIANTS if v[0] in ("full", "sliding_window", "attention_sinks")]
)
def test_a_prompt_in_one_call_uses_the_mask_that_the_policy_amounts_to(name, options, prompt, monkeypatch):
    """Heads of different capacities too; and the masks' kernels did it."""
    from sparse_mhsa import ops

    calls = []
    attention = ops.attention
    monkeypatch.setattr(ops, "attention", lambda *a, **kw: calls.append(a) or attention(*a, **kw))
    q, k, v = tensors(tokens=prompt + 3)
    whole, steps = (layer(name, [5, 12], **options) for _ in range(2))
    got = in_calls(whole, q, k, v, [prompt, 1, 1, 1])
    assert len(calls) == (prompt > 1)
    assert torch.allclose(got, in_calls(steps, q, k, v, [1] * (prompt + 3)), atol=1e-12, rtol=0)
    for a, b in zip(whole.entries(), steps.entries(), strict=True):
        assert (a is None and b is None) or torch.equal(a, b)


def test_the_published_window_keeps_c_d_e():
    cache = layer("sliding_window", 3)
    in_calls(cache, *tensors(tokens=5), [5])
    assert cache.entries().positions[0, 0].tolist() == [2, 3, 4]


def with_scores(policy, capacity, scores):
    """A cache whose tokens have received these sums of weights; the next token gets next to nothing."""
    count = len(scores)
    cache = LayerCache(policy, capacity)
    zeros = torch.zeros(1, 1, count, 2, dtype=torch.float64)
    cache.attend(zeros, zeros, zeros)
    state = cache.state_dict()
    state["worths"][0, :count] = torch.tensor(scores, dtype=torch.float64)
    cache.load_state_dict(state)
    return cache


def next_token(cache):
    """A query whose weights are all equal, so that they change no order."""
    zeros = torch.zeros(1, 1, 1, 2, dtype=torch.float64)
    cache.attend(zeros, zeros, zeros)
    return cache.entries().positions[0, 0].tolist()


def test_heavy_hitters_stay():
    """Of A .1, B .9, C .3, D .8 the first to go is the newest, E, and A is next where E is safe."""
    scores = [0.1, 0.9, 0.3, 0.8]
    assert next_token(with_scores(CachePolicy("score_based"), 4, scores)) == [0, 1, 2, 3]
    assert next_token(with_scores(CachePolicy("combined", recent=1), 4, scores)) == [1, 2, 3, 4]
    assert next_token(with_scores(CachePolicy("combined", recent=1, sinks=1), 4, scores)) == [0, 1, 3, 4]
    assert next_token(with_scores(CachePolicy("combined", recent=4), 4, scores)) == [1, 2, 3, 4]


def test_of_equal_scores_the_earlier_token_stays():
    assert next_token(with_scores(CachePolicy("combined", recent=1), 3, [0.5, 0.5, 0.5])) == [0, 1, 3]
    keys = torch.ones(1, 1, 6, 2, dtype=torch.float64)
    cache = layer("norm_based", 3)
    cache.attend(keys, keys, keys)
    assert cache.entries().positions[0, 0].tolist() == [0, 1, 2]


# While nothing has been forgotten, it is full attention.


@pytest.mark.parametrize("sizes", [[40], [1] * 40, [33, 1, 1, 5]], ids=["one call", "steps", "mixed"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("name", "options"), POLICIES.items(), ids=str)
def test_a_cache_that_has_forgotten_nothing_is_full_causal_attention(name, options, dtype, sizes):
    q, k, v = tensors(tokens=40, dim=17, value_dim=33, dtype=dtype)
    causal = torch.ones(40, 40, dtype=torch.bool).tril()
    got = in_calls(layer(name, 40, **options), q, k, v, sizes)
    assert got.dtype == dtype
    exact, _ = dense_attention(q, k, v, causal, dtype=torch.float64)
    plain, _ = dense_attention(q, k, v, causal)
    assert_as_good_as_dense(got, plain, exact, factor=2, what=name)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_decode_attention_reads_ragged_caches_and_nothing_behind_them(dtype, causal):
    lengths = torch.tensor([[0, 1, 700], [513, 3, 256]])
    q, k, v = tensors(heads=6, kv_heads=3, tokens=700, dim=40, value_dim=20, dtype=dtype)
    q = q[:, :, :3]
    places = torch.arange(700)
    behind = lengths[:, :, None] <= places
    for x in (k, v):
        x.masked_fill_(behind[..., None], torch.nan)
    hidden = torch.tensor([2, 1, 0]) if causal else torch.zeros(3, dtype=torch.int64)
    mask = places < (lengths[:, :, None, None] - hidden[:, None])
    mask = mask.repeat_interleave(2, dim=1)
    zeroed = [x.masked_fill(behind[..., None], 0) for x in (k, v)]
    exact, _ = dense_attention(q, *zeroed, mask, dtype=torch.float64)
    plain, _ = dense_attention(q, *zeroed, mask)
    got = sm.decode_attention(q, k, v, lengths, causal=causal)
    assert_as_good_as_dense(got, plain, exact, factor=2, what="out")
    strided = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in (q, k, v)]
    assert torch.equal(sm.decode_attention(*strided, lengths, causal=causal), got)
    turned = [x.transpose(2, 3).contiguous().transpose(2, 3) for x in (q, k, v)]
    assert torch.equal(sm.decode_attention(*turned, lengths, causal=causal), got)


def test_the_operator_sums_the_weights_of_every_key():
    q, k, v = tensors(tokens=300)
    lengths = torch.tensor([[300, 17], [256, 1]])
    _, lse, weights = torch.ops.sparse_mhsa.decode(q[:, :, :2], k, v, lengths, False, True, 0.5)
    scores = 0.5 * q[:, :, :2] @ k.repeat_interleave(2, dim=1).transpose(-2, -1)
    seen = torch.arange(300) < lengths.repeat_interleave(2, dim=1)[:, :, None, None]
    scores = scores.masked_fill(~seen, -torch.inf)
    assert torch.allclose(lse, scores.logsumexp(-1), atol=1e-12, rtol=0)
    assert torch.allclose(weights, scores.softmax(-1).unflatten(1, (2, 2)).sum((2, 3)), atol=1e-12, rtol=0)


# Laws.


@st.composite
def sessions(draw):
    name = draw(st.sampled_from(sorted(POLICIES)))
    options = dict(POLICIES[name])
    least = CachePolicy(name, **options).least_capacity
    kv_heads, group = draw(st.integers(1, 3)), draw(st.integers(1, 2))
    capacities = draw(st.lists(st.integers(least, least + 9), min_size=kv_heads, max_size=kv_heads))
    sizes = draw(st.lists(st.integers(1, 12), min_size=1, max_size=6))
    return name, options, capacities, group, sizes, draw(st.integers(0, 99))


@settings(max_examples=60, deadline=None)
@given(sessions())
def test_laws_of_every_cache(session):
    name, options, capacities, group, sizes, seed = session
    sinks, recent = options.get("sinks", 0), options.get("recent", 0)
    heads = len(capacities)
    q, k, v = tensors(2, heads * group, heads, sum(sizes), 4, 3, seed=seed)
    cache = layer(name, capacities, **options)
    outs, seen, kept = [], 0, None
    for part in zip(*(x.split(sizes, dim=2) for x in (q, k, v)), strict=True):
        outs.append(cache.attend(*part))
        seen += part[0].shape[2]
        entries = cache.entries()
        bound = torch.tensor([seen] * heads if name == "full" else [min(seen, c) for c in capacities])
        assert torch.equal(entries.lengths, bound.expand(2, -1))  # as many as there is room for, and never more
        for b in range(2):
            for h in range(heads):
                length = int(bound[h])
                positions = entries.positions[b, h, :length]
                assert (positions.diff() > 0).all()  # original positions, in order of arrival
                always = {*range(min(sinks, seen)), *range(max(0, seen - recent), seen)}
                assert always <= set(positions.tolist())  # sinks and recent tokens
                assert torch.equal(entries.keys[b, h, :length], k[b, h, positions])
                assert torch.equal(entries.values[b, h, :length], v[b, h, positions])
                if kept is not None:  # what was forgotten does not come back
                    new = set(range(seen - part[0].shape[2], seen))
                    assert set(positions.tolist()) <= {*kept.positions[b, h].tolist(), *new}
        kept = entries
    out = torch.cat(outs, dim=2)
    # A prompt is single steps; samples and heads do not know of each other.
    steps = layer(name, capacities, **options)
    assert torch.allclose(in_calls(steps, q, k, v, [1] * sum(sizes)), out, atol=1e-12, rtol=0)
    assert torch.equal(steps.entries().positions, kept.positions)
    one = layer(name, capacities[:1], **options)
    assert torch.allclose(
        in_calls(one, q[1:, :group], k[1:, :1], v[1:, :1], sizes), out[1:, :group], atol=1e-12, rtol=0
    )


@pytest.mark.parametrize(("name", "options"), POLICIES.items(), ids=str)
def test_threads_do_not_change_a_bit(name, options):
    q, k, v = tensors(1, 2, 1, 1200, 64, 64, dtype=torch.float32)
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            cache = layer(name, 1100, **options)
            out = in_calls(cache, q, k, v, [1090, *[1] * 110])
            results.append((out, *cache.entries()))
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(a is b or torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_memory_is_that_of_the_capacities_and_grows_only_with_need():
    q, k, v = tensors(1, 2, 2, 4000, 8, 8, dtype=torch.float32)
    cache = KVCache(CachePolicy("sliding_window"), 1, capacity=[[10, 1000]])
    cache.attend(0, *(x[:, :, :4] for x in (q, k, v)))
    bookkeeping = 8 * (1 + 2 + 3 + 2)
    assert cache.memory().bytes_allocated == 2 * 4 * (8 * 4 * 2 + 8) + bookkeeping
    cache.attend(0, *(x[:, :, 4:] for x in (q, k, v)))
    memory = cache.memory()
    assert memory.entries == 1010
    assert memory.tokens_seen == 8000
    assert memory.bytes_used == 1010 * 2 * 8 * 4
    assert memory.bytes_allocated == 1010 * (8 * 4 * 2 + 8) + bookkeeping
    assert memory.bytes_full == 8000 * 2 * 8 * 4
    assert str(memory).startswith("1010 of 8000 entries kept (12.6%): 63.1 KiB of 500.0 KiB, ")


def test_a_budget_is_shared_among_layers_and_heads():
    policy = CachePolicy("combined", recent=3)
    cache = KVCache.with_budget(policy, 60, [[1, 3], [0, 6]])
    q, k, v = tensors(tokens=100)
    for index in range(2):
        cache.attend(index, q, k, v)
    lengths = torch.stack([layer.lengths[0] for layer in cache])
    assert lengths.sum() == 60
    assert lengths.min() == lengths[1, 0] == 3
    assert lengths[1, 1] > lengths[0, 1] > lengths[0, 0]
    equal = KVCache.with_budget(policy, 62, torch.ones(4, 4).tolist())
    assert [cache._capacity for cache in equal] == [(4, 4, 4, 4)] * 3 + [(4, 4, 3, 3)]
    with pytest.raises(ValueError, match="total"):
        KVCache.with_budget(policy, 11, [[1, 1], [1, 1]])


def test_a_budget_and_a_capacity_are_one_too_many():
    policy = CachePolicy("score_based", capacity=3)
    with pytest.raises(ValueError, match="capacity: the policy `score_based` has 3 and total is 10; give one of them"):
        KVCache.with_budget(policy, 10, [[1, 1]])


# For attention by other means.


@pytest.mark.parametrize("capacity", [6, 40, [6, 11]], ids=str)
@pytest.mark.parametrize("sizes", [[9, 1, 1, 1, 8, 1], [1] * 20], ids=str)
@pytest.mark.parametrize(
    ("name", "options"), [v for v in VARIANTS if v[0] not in ("score_based", "combined", "norm_based")]
)
def test_update_returns_what_the_new_tokens_attend_to(name, options, sizes, capacity):
    q, k, v = tensors(tokens=sum(sizes))
    real = torch.ones(2, sum(sizes), dtype=torch.bool)
    real[0, :3] = False
    for mask in (None, real):
        ours, theirs = layer(name, capacity, **options), layer(name, capacity, **options)
        start = 0
        for size in sizes:
            part = [x[:, :, start : start + size] for x in (q, k, v)]
            token_mask = None if mask is None else mask[:, start : start + size]
            keys, values, seen = theirs.update(*part[1:], token_mask=token_mask)
            if seen is not None and seen.shape[1] == 2:
                seen = seen.repeat_interleave(2, dim=1)
            expected, _ = dense_attention(part[0], keys, values, seen)
            got = ours.attend(*part, token_mask=token_mask)
            if token_mask is not None:
                expected = expected * token_mask[:, None, :, None]
            assert torch.allclose(got, expected, atol=1e-12, rtol=0)
            start += size


def test_update_of_a_full_cache_needs_no_mask_and_goes_to_sdpa():
    q, k, v = tensors(tokens=12)
    cache = layer("full", None)
    cache.update(k[:, :, :11], v[:, :, :11])
    keys, values, mask = cache.update(k[:, :, 11:], v[:, :, 11:])
    assert mask is None
    assert torch.equal(keys, k)
    assert torch.equal(values, v)
    expected = F.scaled_dot_product_attention(q[:, :, 11:], k, v, enable_gqa=True)
    again = layer("full", None)
    assert torch.allclose(in_calls(again, q, k, v, [11, 1])[:, :, 11:], expected, atol=1e-12, rtol=0)


def test_update_of_a_cache_by_norms():
    q, k, v = tensors(tokens=20)
    ours, theirs = layer("norm_based", 6), layer("norm_based", 6)
    for start, size in ((0, 5), *((i, 1) for i in range(5, 20))):
        part = [x[:, :, start : start + size] for x in (q, k, v)]
        keys, values, mask = theirs.update(*part[1:])
        mask = None if mask is None else mask.expand(-1, 2, -1, -1).repeat_interleave(2, dim=1)
        assert torch.allclose(ours.attend(*part), dense_attention(part[0], keys, values, mask)[0], atol=1e-12, rtol=0)
    with pytest.raises(ValueError, match=r"one by one when the cache is full, .*; use attend"):
        theirs.update(k[:, :, :2], v[:, :, :2])
    with pytest.raises(ValueError, match="policy: `combined` needs the weights of the attention; use attend"):
        layer("combined", 6, recent=2).update(k, v)


# Life of a cache.


def used(name, options, tokens=20):
    cache = KVCache(CachePolicy(name, **options), 2, capacity=None if name == "full" else [[6, 9], [8, 8]])
    for index in range(2):
        cache.attend(index, *tensors(tokens=tokens, seed=index))
    return cache


def go_on(cache, samples=2):
    return [cache.attend(index, *tensors(samples, tokens=3, seed=7 + index)) for index in range(2)]


def assert_equal(a, b):
    assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def through_a_file(cache):
    file = io.BytesIO()
    torch.save(cache.state_dict(), file)
    file.seek(0)
    other = KVCache(cache.policy, 2, capacity=[layer._capacity for layer in cache])
    other.load_state_dict(torch.load(file, weights_only=True))
    return other


COPIES = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda cache: pickle.loads(pickle.dumps(cache)),
    "state_dict": through_a_file,
}


@pytest.mark.parametrize("way", COPIES)
@pytest.mark.parametrize(("name", "options"), POLICIES.items(), ids=str)
def test_a_copy_goes_on_as_the_original_and_apart_from_it(name, options, way):
    cache = used(name, options)
    other = COPIES[way](cache)
    before = cache.state_dict()
    outs = go_on(other)
    assert_equal(before.values(), cache.state_dict().values())
    assert_equal(go_on(cache), outs)
    assert_equal(cache.state_dict().values(), other.state_dict().values())


@pytest.mark.parametrize(("name", "options"), POLICIES.items(), ids=str)
def test_beams_are_reordered_and_their_number_changes(name, options):
    cache, other = used(name, options), used(name, options)
    cache.reorder(torch.tensor([1, 1, 0]))
    part = tensors(3, tokens=2, seed=9)
    out = cache.attend(0, *part)
    alone = other.attend(0, *(x[:2] for x in (part[0][[2, 0]], part[1][[2, 0]], part[2][[2, 0]])))
    assert torch.allclose(out[[2, 0]], alone, atol=1e-12, rtol=0)
    assert not torch.equal(out[0], out[1])  # copies, and not the same memory
    assert cache[0].tokens_seen.tolist() == [22, 22, 22]


@pytest.mark.parametrize(("name", "options"), POLICIES.items(), ids=str)
def test_a_reset_cache_is_as_new_and_takes_other_sizes(name, options):
    cache = used(name, options)
    cache.reset()
    assert cache.memory().bytes_allocated == 0
    assert cache[0].lengths.numel() == cache[0].tokens_seen.numel() == 0
    fresh = KVCache(CachePolicy(name, **options), 2, capacity=None if name == "full" else [[6, 9], [8, 8]])
    assert_equal(go_on(cache, samples=5), go_on(fresh, samples=5))


def test_an_unused_cache_has_an_empty_state():
    cache = used("combined", {"recent": 2})
    cache.load_state_dict({})
    assert cache.state_dict() == {}
    with pytest.raises(ValueError, match="no entries"):
        cache[0].entries()


def test_a_cache_made_in_inference_mode_works_outside_of_it():
    cache = layer("combined", 4, recent=1)
    q, k, v = tensors(tokens=10)
    with torch.inference_mode():
        first = cache.attend(*(x[:, :, :5] for x in (q, k, v)))
    rest = cache.attend(*(x[:, :, 5:] for x in (q, k, v)))
    assert torch.equal(torch.cat((first, rest), 2), in_calls(layer("combined", 4, recent=1), q, k, v, [5, 5]))


def test_autocast_decides_the_dtype():
    q, k, v = tensors(tokens=3, dtype=torch.float32)
    cache = layer("full", None)
    with torch.autocast("cpu", torch.bfloat16):
        assert cache.attend(q, k, v).dtype == torch.bfloat16
        cache.update(k, v.bfloat16())
    assert cache.entries().keys.dtype == cache.entries().values.dtype == torch.bfloat16


# Operators.


def test_operators_keep_their_contracts():
    q, k, v = tensors(tokens=6)
    checks = ("test_schema", "test_faketensor", "test_aot_dispatch_dynamic")
    lengths = torch.tensor([[6, 2], [0, 5]])
    for weights in (True, False):
        arguments = (q[:, :, :2], k, v, lengths, True, weights, 0.3)
        torch.library.opcheck(torch.ops.sparse_mhsa.decode.default, arguments, test_utils=checks)
    cache = layer("combined", 4, recent=1)
    cache.attend(q, k, v)
    slots = cache._slots
    changed = (slots.keys, slots.values, slots.positions, slots.worths, slots.lengths)
    positions = torch.arange(6, 12).expand(2, -1).contiguous()
    arguments = (q, k, v, positions, *changed, slots.starts, slots.capacities, "attention", 0, 1, 0.3)
    torch.library.opcheck(torch.ops.sparse_mhsa.cache_step.default, arguments, test_utils=checks)


def test_decoding_compiles_whole():
    q, k, v = tensors(tokens=6)
    lengths = torch.tensor([[6, 2], [0, 5]])
    compiled = torch.compile(sm.decode_attention, fullgraph=True, backend="aot_eager", dynamic=True)
    for options in ({}, {"scale": 0.3}, {"scale": 0.7}):
        got, expected = (f(q[:, :, :2], k, v, lengths, **options) for f in (compiled, sm.decode_attention))
        assert torch.equal(got, expected)


def test_a_step_counts_as_a_change_of_what_it_writes():
    cache = layer("full", None)
    q, k, v = tensors(tokens=1)
    cache.attend(q, k, v)
    cache.attend(q, k, v)
    cache.attend(q, k, v)  # room for two more after this
    before = cache._slots.keys._version
    cache.attend(q, k, v)
    assert cache._slots.keys._version == before + 1


def test_memory_that_is_shared_is_refused():
    q, k, v = tensors(tokens=6)
    cache = layer("combined", 4, recent=1)
    cache.attend(q, k, v)
    slots = cache._slots
    rest = (slots.starts, slots.capacities, "attention", 0, 1, 0.3)
    positions = torch.arange(6, 12).expand(2, -1).contiguous()
    step = torch.ops.sparse_mhsa.cache_step.default
    with pytest.raises(ValueError, match=r"lengths: expected memory of its own, .* shares it with positions"):
        step(
            q,
            k,
            v,
            positions,
            slots.keys,
            slots.values,
            slots.positions,
            slots.worths,
            slots.positions.view(-1)[:4].view(2, 2),
            *rest,
        )
    own = torch.zeros(2, 12, 8, dtype=torch.float64)
    others = (slots.values, slots.positions, slots.worths, slots.lengths)
    with pytest.raises(ValueError, match=r"keys: expected memory of its own, .* shares it with k"):
        step(q, own.view(2, 2, 6, 8), v, positions, own, *others, *rest)


# What is refused.


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (("sliding",), ValueError, r"policy: unknown name 'sliding'; did you mean `sliding_window`\? allowed: full, "),
        (("full", 3), ValueError, "capacity: the policy `full` does not take it, got 3; it takes no keys"),
        (("sliding_window", 3, 1), ValueError, "recent: the policy `sliding_window` does not take it, got 1"),
        (("score_based", 3, None, None, "low"), ValueError, "keep: the policy `score_based` does not take it"),
        (("sliding_window", 0), ValueError, "capacity: expected at least 1, got 0"),
        (("sliding_window", 2.5), TypeError, "capacity: expected a whole number, got 2.5"),
        (("sliding_window", True), TypeError, "capacity: expected a whole number, got True"),
        (("combined", 8), ValueError, "recent: the policy `combined` needs it"),
        (("combined", 8, -1), ValueError, "recent: expected at least 0, got -1"),
        (("combined", 8, 7, 2), ValueError, "capacity: .* with 2 sinks and 7 recent tokens needs at least 9, got 8"),
        (("attention_sinks", 4), ValueError, "capacity: .* with 4 sinks and 0 recent tokens needs at least 5, got 4"),
        (("norm_based", 4, None, None, "middle"), ValueError, "keep: expected 'low' or 'high', got 'middle'"),
    ],
)
def test_policies_that_make_no_sense_are_refused(arguments, error, message):
    with pytest.raises(error, match=message):
        CachePolicy(*arguments)


@pytest.mark.parametrize(
    ("capacity", "message"),
    [
        (None, "capacity: the policy `combined` needs one"),
        (2, "capacity: .* needs at least 3, got 2"),
        ([[4, 2], [4, 4]], "capacity: .* needs at least 3, got 2"),
        ([4, 4, 4], r"capacity: expected one entry per layer \(2\), got 3"),
    ],
)
def test_capacities_that_make_no_sense_are_refused(capacity, message):
    with pytest.raises(ValueError, match=message):
        KVCache(CachePolicy("combined", recent=3), 2, capacity=capacity)


@pytest.mark.parametrize("capacity", [2.5, [[4, 4], [[4], [4]]], [4.0, 4], "88", np.ones(2)], ids=str)
def test_capacities_that_are_no_whole_numbers_are_refused(capacity):
    with pytest.raises(TypeError, match="capacity: expected a whole number, got "):
        KVCache(CachePolicy("combined", recent=3), 2, capacity=capacity)


@pytest.mark.parametrize(
    "capacity", [np.int64(5), np.array(5), np.array([5, 5]), [[5, 5], [5, 5, 5]], torch.tensor([5, 5])]
)
def test_capacities_are_given_in_any_form(capacity):
    cache = KVCache(CachePolicy("combined", recent=3), 2, capacity=capacity)
    cache.attend(0, *tensors())
    assert (cache[0].lengths == 5).all()


def test_tokens_that_do_not_fit_are_refused_and_change_nothing():
    cache = layer("combined", 6, recent=2)
    q, k, v = tensors()
    cache.attend(q, k, v)
    before = cache.state_dict()
    wrong = [
        ((q[:1], k[:1], v[:1]), {}, ValueError, r"key: expected \(B, Hkv, D\) = \(2, 2, 8\) as in the cache"),
        ((q, k[:, :1], v[:, :1]), {}, ValueError, r"key: expected \(B, Hkv, D\) = \(2, 2, 8\) as in the cache"),
        ((q, k, v[..., :5]), {}, ValueError, "value: expected 6 channels as in the cache, got 5"),
        ((q.float(), k.float(), v.float()), {}, TypeError, "key: expected torch.float64 as in the cache"),
        ((q[:, :, :3], k, v), {}, ValueError, "query and key: expected as many tokens, got 3 and 20"),
        ((q, k, v), {"token_mask": torch.ones(2, 3) > 0}, ValueError, r"token_mask: expected shape \(B, N\) = "),
        ((q, k, v), {"token_mask": torch.ones(2, 20)}, TypeError, "token_mask: expected torch.bool, got torch.float32"),
        ((q, k, v), {"window": -1}, ValueError, "window: expected at least 0, got -1"),
        ((q, k, v), {"scale": math.nan}, ValueError, "scale: expected a finite number, got nan"),
        ((q, k, v), {"scale": "0.1"}, TypeError, "scale: expected a number, got str"),
        ((q, k, v), {"window": 0.5}, TypeError, "window: expected a whole number, got 0.5"),
        ((q, k, v.clone().requires_grad_()), {}, RuntimeError, "decoding has no gradient"),
    ]  # fmt: skip
    for tokens, options, error, message in wrong:
        with pytest.raises(error, match=message):
            cache.attend(*tokens, **options)
    assert_equal(before.values(), cache.state_dict().values())
    with torch.no_grad():
        cache.attend(*wrong[-1][0])


@pytest.mark.parametrize(
    ("scale", "error", "message"),
    [
        (math.inf, ValueError, "scale: expected a finite number, got inf"),
        ("0.1", TypeError, "scale: expected a number, got str"),
    ],
)
def test_decoding_refuses_a_scale_that_is_no_finite_number(scale, error, message):
    q, k, v = tensors(tokens=6)
    with pytest.raises(error, match=message):
        sm.decode_attention(q[:, :, :1], k, v, torch.tensor([[6], [6]]), scale=scale)


def test_orders_that_do_not_exist_are_refused():
    cache = used("full", {})
    for index, error, message in (
        (torch.tensor([2]), ValueError, "index: expected 0 to 1, got 2 to 2"),
        (torch.tensor([-1]), ValueError, "index: expected 0 to 1, got -1 to -1"),
        (torch.tensor([[0]]), ValueError, "index: expected one dimension"),
        (torch.tensor([0.0]), TypeError, "index: expected whole numbers"),
    ):
        with pytest.raises(error, match=message):
            cache.reorder(index)


SPOILED = {
    "missing": (lambda s: s.pop("0.seen"), ValueError, "state: expected keys, values"),
    "unknown layer": (lambda s: s.update({"2.keys": s["0.keys"]}), ValueError, "state: unknown name '2.keys'"),
    "too long": (lambda s: s["0.lengths"].fill_(99), ValueError, "lengths: expected at most"),
    "negative": (lambda s: s["0.lengths"].fill_(-1), ValueError, "lengths: expected at most"),
    "starts": (lambda s: s["0.starts"].fill_(0), ValueError, "starts: expected ascending offsets from 0 to "),
    "positions": (lambda s: s["0.positions"].fill_(3), ValueError, "positions: expected different tokens"),
    "negative positions": (lambda s: s["0.positions"].sub_(40), ValueError, "positions: expected different tokens"),
    "future": (lambda s: s["0.seen"].fill_(9), ValueError, "positions: expected different tokens"),
    "dtype": (lambda s: s.update({"0.values": s["0.values"].float()}), TypeError, "values: expected torch.float64"),
    "floats": (lambda s: s.update({"0.lengths": s["0.lengths"].double()}), TypeError, "lengths: expected torch.int64"),
    "shape": (lambda s: s.update({"0.worths": s["0.worths"][:, 1:]}), ValueError, "worths: expected shape"),
    "policy": (lambda s: s.update({"0.policy": s["0.keys"]}), ValueError, "got torch.float64 of shape"),
    "rank": (lambda s: s.update({"0.keys": s["0.keys"][0]}), ValueError, "keys: expected 3 dimensions"),
}


@pytest.mark.parametrize("spoiled", SPOILED)
def test_states_that_lie_are_refused(spoiled):
    spoil, error, message = SPOILED[spoiled]
    cache = used("combined", {"recent": 2})
    state = cache.state_dict()
    spoil(state)
    with pytest.raises(error, match=message):
        cache.load_state_dict(state)


@pytest.mark.parametrize(
    ("name", "options", "rule"),
    [
        ("sliding_window", {}, r"sliding_window\(\)"),
        ("norm_based", {}, r"norm_based\(recent=0, sinks=0, keep=low\)"),
        ("combined", {"recent": 3}, r"combined\(recent=3, sinks=0\)"),
    ],
)
def test_a_state_of_another_policy_is_refused(name, options, rule):
    state = used("combined", {"recent": 2}).state_dict()
    with pytest.raises(
        ValueError, match=rf"policy: expected a state of `{rule}` .* got `combined\(recent=2, sinks=0\)`"
    ):
        used(name, options).load_state_dict(state)


def test_a_capacity_of_the_policy_is_no_part_of_what_a_state_is_of():
    state = used("combined", {"recent": 2}).state_dict()
    cache = KVCache(CachePolicy("combined", recent=2, capacity=9), 2)
    cache.load_state_dict(state)
    assert_equal(cache.state_dict().values(), state.values())


@pytest.mark.parametrize(
    ("name", "options", "bound"),
    [("score_based", {}, "least"), ("norm_based", {"keep": "high"}, "least"), ("norm_based", {}, "most")],
)
def test_worths_that_no_later_entry_could_have_are_refused(name, options, bound):
    cache = used(name, options)
    state = cache.state_dict()
    state["1.worths"].neg_()
    with pytest.raises(ValueError, match=rf"worths: the policy `{name}\(.*\)` expects at {bound} 0, got "):
        cache.load_state_dict(state)


@pytest.mark.parametrize(
    ("state", "message"),
    [
        (None, "state: expected a mapping of names to tensors, got NoneType"),
        ({0: torch.zeros(1)}, "state: expected names '<layer>.<tensor>', got 0"),
    ],
)
def test_what_is_no_state_is_refused_by_name(state, message):
    with pytest.raises(TypeError, match=message):
        used("combined", {"recent": 2}).load_state_dict(state)


def test_what_is_no_tensor_of_a_state_is_refused_by_name():
    cache = used("combined", {"recent": 2})
    with pytest.raises(TypeError, match=r"values: expected a torch.Tensor, got list"):
        cache.load_state_dict({**cache.state_dict(), "1.values": [1.0]})


def test_a_name_is_no_policy():
    with pytest.raises(TypeError, match="policy: expected a CachePolicy, got str"):
        KVCache.with_budget("sliding_window", 40, [[1.0]])
    with pytest.raises(ValueError, match="policy: unknown name"):
        CachePolicy(["a"])


def test_a_refused_state_leaves_every_layer_as_it_was():
    cache = used("combined", {"recent": 2})
    before = {name: tensor.clone() for name, tensor in cache.state_dict().items()}
    state = used("combined", {"recent": 2}, tokens=9).state_dict()
    del state["1.keys"]
    with pytest.raises(ValueError, match="keys"):
        cache.load_state_dict(state)
    after = cache.state_dict()
    assert before.keys() == after.keys()
    assert_equal(before.values(), after.values())


def test_an_interrupted_cache_says_so_until_it_is_reset(monkeypatch):
    cache = layer("full", None)
    tokens = tensors(tokens=4)
    cache.attend(*tokens)

    def interrupted(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(type(cache._slots), "join", interrupted)
        with pytest.raises(KeyboardInterrupt):
            cache.attend(*tokens)
    with pytest.raises(RuntimeError, match="interrupted in the middle of a step and holds anything; reset it"):
        cache.attend(*tokens)
    cache.reset()
    cache.attend(*tokens)


def test_lengths_that_make_no_sense_are_refused():
    q, k, v = tensors(tokens=6)
    for lengths, error, message in (
        (torch.tensor([[7, 0], [0, 0]]), ValueError, "lengths: expected 0 to 6, got 7"),
        (torch.tensor([[-1, 0], [0, 0]]), ValueError, "lengths: expected 0 to 6, got -1"),
        (torch.tensor([1, 2]), ValueError, r"lengths: expected shape \(B, Hkv\) = \(2, 2\) or \(B, 1\), got \(2,\)"),
        (torch.ones(2, 2), TypeError, "lengths: expected whole numbers, got torch.float32"),
    ):
        with pytest.raises(error, match=message):
            sm.decode_attention(q[:, :, :1], k, v, lengths)
    with pytest.raises(RuntimeError, match="decoding has no gradient"):
        sm.decode_attention(q[:, :, :1].requires_grad_(), k, v, torch.tensor([[1], [2]]))


@pytest.mark.parametrize("layer", [2, -1])
def test_a_layer_that_a_cache_does_not_have_is_named(layer):
    cache = sm.KVCache(sm.CachePolicy("full"), num_layers=2)
    q, k, v = tensors(tokens=1)
    for call in (lambda: cache.attend(layer, q, k, v), lambda: cache.update(layer, k, v)):
        with pytest.raises(ValueError, match=f"layer: expected 0 to 1, got {layer}"):
            call()
