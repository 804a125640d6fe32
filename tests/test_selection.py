"""Masks that choose keys by content, against their definitions written with sorted scores.

Queries and keys are small whole numbers, so that scores are exact and ties are everywhere.
"""

import functools
import itertools

import pytest
import torch

import sparse_mhsa as sm
from sparse_mhsa.content import edges_of
from sparse_mhsa.functional import attend
from sparse_mhsa.layer_mask import LayerMask
from sparse_mhsa.reference import dense_attention

BATCH, HEADS = 2, 3


def whole_numbers(*shape, seed=0, dtype=torch.float32):
    return torch.randint(-2, 3, shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def layer_mask(mask, heads=HEADS, epoch=0, prefix=None, **mask_kwargs):
    config = sm.load_config({"mask": mask, "mask_kwargs": mask_kwargs})
    return LayerMask(config, heads, epoch=epoch, num_prefix_tokens=prefix)


def chosen(q, k, mask, scale=1.0, **options):
    """(B, H, N, N) bool of the edges that the operator chose."""
    _, row_ptr, col, _ = edges_of(q, k, mask, scale=scale, **options)
    batch, heads, tokens = q.shape[:3]
    dense = torch.zeros(batch * heads, tokens, tokens, dtype=torch.bool)
    for unit, row in itertools.product(range(batch * heads), range(tokens)):
        keys = col[row_ptr[unit, row] : row_ptr[unit, row + 1]]
        assert (keys.diff() > 0).all()
        dense[unit, row, keys] = True
    assert (col[row_ptr[-1, -1] :] == -1).all()
    return dense.view(batch, heads, tokens, tokens)


def best(scores, keep, allowed):
    """The highest of the allowed scores, the lower index first where they are equal."""
    order = sorted((i for i in range(len(scores)) if allowed[i]), key=lambda i: (-scores[i], i))
    return order[:keep]


def topk_by_definition(q, k, keep, prefix=1, causal=False, symmetric=False, rows=True, columns=True, key_mask=None):
    tokens = q.shape[2]
    past = torch.ones(tokens, tokens, dtype=torch.bool).tril() if causal else torch.ones(tokens, tokens) > 0
    mask = torch.zeros(*q.shape[:2], tokens, tokens, dtype=torch.bool)
    for b, h, i in itertools.product(*map(range, q.shape[:3])):
        allowed = past[i] if key_mask is None else past[i] & key_mask[b]
        scores = [float(q[b, h, i] @ k[b, h, j]) for j in range(tokens)]
        mask[b, h, i, best(scores, keep, allowed)] = True
    if symmetric:
        mask |= mask.transpose(-1, -2).clone()
    if columns:
        mask[..., :prefix] = True
    if columns and rows:
        mask[:, :, :prefix] = True
    return mask & past


@pytest.mark.parametrize("tokens", [1, 2, 5, 17, 70])
@pytest.mark.parametrize("keep", [0, 1, 3, 100])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"causal": True},
        {"symmetric": True},
        {"keep_cls_dense": False},
        {"cls_row_dense": False},
        {"causal": True, "cls_row_dense": False},
    ],
    ids=str,
)
def test_topk_keeps_the_best_keys_of_every_query(tokens, keep, options):
    q, k = whole_numbers(BATCH, HEADS, tokens, 3), whole_numbers(BATCH, HEADS, tokens, 3, seed=1)
    expected = topk_by_definition(
        q,
        k,
        keep,
        causal=options.get("causal", False),
        symmetric=options.get("symmetric", False),
        rows=options.get("cls_row_dense", True),
        columns=options.get("keep_cls_dense", True),
    )
    assert torch.equal(chosen(q, k, layer_mask("topk", k=keep, **options)), expected)


def test_topk_does_not_choose_padding():
    q, k = whole_numbers(BATCH, HEADS, 20, 3), whole_numbers(BATCH, HEADS, 20, 3, seed=1)
    key_mask = torch.arange(20) < torch.tensor([[20], [11]])
    got = chosen(q, k, layer_mask("topk", keep_cls_dense=False), key_mask=key_mask)
    assert torch.equal(got, topk_by_definition(q, k, 3, columns=False, key_mask=key_mask))


def test_topk_shares_keys_among_grouped_heads():
    q, k = whole_numbers(1, 4, 20, 3), whole_numbers(1, 2, 20, 3, seed=1)
    mask = layer_mask("topk", heads=4)
    assert torch.equal(chosen(q, k, mask), chosen(q, k.repeat_interleave(2, 1), mask))


def test_the_schedule_of_k_follows_the_epoch():
    q, k = whole_numbers(1, HEADS, 30, 3), whole_numbers(1, HEADS, 30, 3, seed=1)
    schedule = {"kind": "linear", "k_start": 9, "k_end": 1, "epochs": 5}
    for epoch, keep in enumerate([9, 7, 5, 3, 1, 1]):
        mask = layer_mask("topk", epoch=epoch, k_schedule=schedule, keep_cls_dense=False)
        assert (chosen(q, k, mask).sum(-1) == keep).all()


def test_a_schedule_of_one_epoch_has_its_end_and_says_so():
    q, k = whole_numbers(1, HEADS, 30, 3), whole_numbers(1, HEADS, 30, 3, seed=1)
    schedule = {"kind": "linear", "k_start": 5, "k_end": 2, "epochs": 1}
    mask = layer_mask("topk", k_schedule=schedule, keep_cls_dense=False)
    assert (chosen(q, k, mask).sum(-1) == 2).all()
    assert "a single epoch has `k_end`" in sm.masks.topk.__doc__


def blocks_by_definition(q, k, keep, size, pool, causal):
    tokens = q.shape[2]
    blocks = [list(range(start, min(start + size, tokens))) for start in range(0, tokens, size)]
    mask = torch.zeros(*q.shape[:2], tokens, tokens, dtype=torch.bool)
    for b, h in itertools.product(*map(range, q.shape[:2])):
        pooled = [
            [x[b, h, block].mean(0) if pool == "mean" else x[b, h, block].amax(0) for block in blocks] for x in (q, k)
        ]
        for i, block in enumerate(blocks):
            scores = [float(pooled[0][i] @ key) for key in pooled[1]]
            for j in best(scores, keep, [not causal or j <= i for j in range(len(blocks))]):
                mask[b, h, block[0] : block[-1] + 1, blocks[j][0] : blocks[j][-1] + 1] = True
    return mask & torch.ones(tokens, tokens, dtype=torch.bool).tril() if causal else mask


@pytest.mark.parametrize("tokens", [1, 4, 9, 40])
@pytest.mark.parametrize("pool", ["mean", "max"])
@pytest.mark.parametrize("causal", [False, True])
def test_block_topk_keeps_the_best_blocks(tokens, pool, causal):
    q, k = whole_numbers(BATCH, HEADS, tokens, 4), whole_numbers(BATCH, HEADS, tokens, 4, seed=1)
    mask = layer_mask("block_topk", k=2, block_size=4, pool=pool, causal=causal)
    assert torch.equal(chosen(q, k, mask), blocks_by_definition(q, k, 2, 4, pool, causal))


def test_a_negative_scale_turns_the_scores_of_blocks_around():
    q, k = whole_numbers(BATCH, HEADS, 20, 4), whole_numbers(BATCH, HEADS, 20, 4, seed=1)
    mask = layer_mask("block_topk", k=2, block_size=4)
    assert torch.equal(chosen(q, k, mask, scale=-0.5), chosen(-q, k, mask))


def test_prefix_tokens_are_dense_and_no_part_of_a_block():
    q, k = whole_numbers(BATCH, HEADS, 22, 4), whole_numbers(BATCH, HEADS, 22, 4, seed=1)
    got = chosen(q, k, layer_mask("block_topk", k=1, block_size=5, prefix=2))
    assert got[..., :2].all()
    assert got[:, :, :2].all()
    assert torch.equal(got[..., 2:, 2:], blocks_by_definition(q[:, :, 2:], k[:, :, 2:], 1, 5, "mean", False))


@pytest.mark.parametrize("score", ["key_norm", "embedding_norm", "attention"])
def test_importance_keeps_the_same_keys_for_every_query(score):
    generator = torch.Generator().manual_seed(0)
    q, k = (torch.randn(BATCH, HEADS, 25, 4, generator=generator, dtype=torch.float64) for _ in range(2))
    embeddings = torch.randn(BATCH, 25, 6, generator=generator, dtype=torch.float64)
    importance = {
        "key_norm": k.norm(dim=-1),
        "embedding_norm": embeddings.norm(dim=-1)[:, None].expand(-1, HEADS, -1),
        "attention": (q @ k.transpose(-1, -2)).softmax(-1).sum(-2),
    }[score]
    expected = torch.zeros(BATCH, HEADS, 25, dtype=torch.bool)
    expected.scatter_(-1, importance.topk(4).indices, True)
    got = chosen(q, k, layer_mask("importance", score=score, k=4), embeddings=embeddings)
    assert torch.equal(got, expected.unsqueeze(2).expand_as(got))


@pytest.mark.parametrize("score", ["key_norm", "embedding_norm", "attention"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_importance_is_compared_in_full_precision(score, dtype):
    """Importances lie close together: rounded to half precision, the lower index would win among many."""
    generator = torch.Generator().manual_seed(0)
    q, k = (0.5 * torch.randn(BATCH, HEADS, 400, 16, generator=generator).to(dtype) for _ in range(2))
    embeddings = torch.randn(BATCH, 400, 64, generator=generator).to(dtype)
    mask = layer_mask("importance", score=score, k=200)
    in_half = edges_of(q, k, mask, embeddings=embeddings).col
    in_double = edges_of(q.double(), k.double(), mask, embeddings=embeddings.double()).col
    assert torch.equal(in_half, in_double)


@pytest.mark.parametrize(
    ("name", "score"),
    [
        ("topk", None),
        ("block_topk", None),
        ("vertical_slash", None),
        ("importance", "key_norm"),
        ("importance", "embedding_norm"),
        ("importance", "attention"),
    ],
)
@pytest.mark.parametrize("padding", [[7, 8], [0, 1, 2, 3], [1, 4, 8], []])
@pytest.mark.parametrize("junk", [0.0, 50.0, float("nan")])
def test_padding_has_no_vote(name, score, padding, junk):
    """What real tokens choose does not depend on what padded ones hold, as keys or as queries."""
    kwargs = BY_CONTENT[name] if score is None else {"k": 3, "score": score}
    generator = torch.Generator().manual_seed(0)
    kept = torch.ones(BATCH, 9, dtype=torch.bool)
    kept[:, padding] = False
    x = torch.randn(BATCH, 9, 12, generator=generator, dtype=torch.float64)
    module = sm.SparseMHSA(
        12, HEADS, batch_first=True, dtype=torch.float64, config={"mask": name, "mask_kwargs": kwargs}
    )
    attend = lambda x: module(x, x, x, key_padding_mask=~kept, need_weights=False)[0]  # noqa: E731
    assert torch.equal(attend(x.masked_fill(~kept[..., None], junk))[kept], attend(x)[kept])


def test_importance_by_attention_is_what_the_other_tokens_give_without_padding():
    generator = torch.Generator().manual_seed(0)
    q, k = (torch.randn(BATCH, HEADS, 9, 4, generator=generator, dtype=torch.float64) for _ in range(2))
    kept = torch.tensor([0, 2, 3, 5, 6, 8])
    key_mask = torch.zeros(BATCH, 9, dtype=torch.bool)
    key_mask[:, kept] = True
    mask = layer_mask("importance", score="attention", k=3)
    whole = chosen(q, k, mask, key_mask=key_mask)[:, :, kept][..., kept]
    assert torch.equal(whole, chosen(q[:, :, kept], k[:, :, kept], mask))


def test_fixed_importance_does_not_depend_on_the_input():
    first = sm.masks.importance(num_tokens=9, num_heads=2, score="first", k=3).to_dense()
    assert torch.equal(first, (torch.arange(9) < 3).expand(2, 9, 9))
    listed = sm.masks.importance(num_tokens=9, num_heads=2, score="list", indices=[1, 7]).to_dense()
    assert listed.sum() == 2 * 9 * 2
    assert listed[..., [1, 7]].all()


TOO_MANY = {
    "topk": ({"k": 21}, "topk: k 21 is more than the 20 tokens and acts as 20"),
    "block_topk": ({"k": 6, "block_size": 4}, "block_topk: k 6 is more than the 5 blocks and acts as 5"),
    "importance": ({"k": 22}, "importance: k 22 is more than the 20 patches and acts as 20"),
}


@pytest.mark.parametrize("name", TOO_MANY)
def test_a_k_of_more_than_there_is_keeps_everything_and_says_so(name, caplog):
    kwargs, warning = TOO_MANY[name]
    q, k = whole_numbers(1, HEADS, 20, 3), whole_numbers(1, HEADS, 20, 3, seed=1)
    assert chosen(q, k, layer_mask(name, prefix=0, **kwargs)).all()
    assert warning in caplog.messages


BY_CONTENT = {
    "topk": {"k": 3},
    "block_topk": {"k": 2, "block_size": 4},
    "importance": {"k": 4},
    "vertical_slash": {"num_vertical": 3, "num_slash": 3, "last_queries": 8, "causal": True},
}


@pytest.mark.parametrize("name", BY_CONTENT)
def test_attention_over_chosen_edges_equals_dense_masked_attention_with_gradients(name):
    generator = torch.Generator().manual_seed(0)
    draw = lambda: torch.randn(BATCH, 24, 12, generator=generator, dtype=torch.float64)  # noqa: E731
    module = sm.SparseMHSA(
        12, HEADS, batch_first=True, dtype=torch.float64, config={"mask": name, "mask_kwargs": BY_CONTENT[name]}
    )
    x, grad_out = draw().requires_grad_(), draw()
    out, weights = module(x, x, x, average_attn_weights=False)
    q, k, v = (
        t.unflatten(-1, (HEADS, -1)).transpose(1, 2)
        for t in (x @ module.in_proj_weight.T + module.in_proj_bias).chunk(3, -1)
    )
    mask = chosen_with_scale(q, k, module.layer_mask)
    expected = module.out_proj(dense_attention(q, k, v, mask)[0].transpose(1, 2).flatten(2))
    torch.testing.assert_close(out, expected, rtol=1e-12, atol=1e-12)
    assert torch.equal(weights > 0, mask)
    got = torch.autograd.grad(out, x, grad_out)
    torch.testing.assert_close(got, torch.autograd.grad(expected, x, grad_out), rtol=1e-11, atol=1e-12)


def chosen_with_scale(q, k, mask):
    scale = q.shape[-1] ** -0.5
    return chosen(q.detach() * scale, k.detach(), mask)


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # torch's own tracing
@pytest.mark.parametrize("name", BY_CONTENT)
def test_the_same_bits_on_any_number_of_threads_and_compiled(name):
    module = sm.SparseMHSA(16, 4, batch_first=True, config={"mask": name, "mask_kwargs": BY_CONTENT[name]})
    x = torch.randn(2, 150, 16, generator=torch.Generator().manual_seed(0))
    run = lambda m: m(x, x, x, need_weights=False)[0]  # noqa: E731
    expected = run(module)
    threads = torch.get_num_threads()
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            assert torch.equal(run(module), expected)
    finally:
        torch.set_num_threads(threads)
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(run(compiled), expected)


@pytest.mark.parametrize("name", BY_CONTENT)
def test_without_content_there_are_no_edges_and_the_error_says_so(name):
    with pytest.raises(ValueError, match=f"`{name}` chooses keys by the content"):
        sm.Mask.from_config({"mask": name, "mask_kwargs": BY_CONTENT[name]}, num_tokens=10, num_heads=2)


@pytest.mark.parametrize(
    ("mask", "mask_kwargs", "message"),
    [
        ("topk", {"k": -1}, "k: expected 0 to"),
        ("topk", {"causal": True, "symmetric": True}, "symmetric: expected false"),
        ("topk", {"k_schedule": {"kind": "linear", "k_start": 1, "k_end": 2, "epochs": 0}}, "epochs: expected 1 to"),
        ("topk", {"k_schedule": {"kind": "exp", "k_start": 1, "k_end": 2, "epochs": 3}}, "unknown variant `exp`"),
        ("block_topk", {"k": 0}, "k: expected 1 to"),
        ("block_topk", {"block_size": 0}, "block_size: expected 1 to"),
        ("block_topk", {"pool": "sum"}, "unknown variant `sum`"),
        ("importance", {}, "k: expected a number of keys"),
        ("importance", {"score": "list"}, "indices: expected a list"),
        ("importance", {"k": 3, "indices": [1]}, "indices: expected nothing"),
        ("importance", {"k": 0}, "k: expected 1 to"),
        ("importance", {"score": "list", "indices": []}, "indices: expected at least one patch"),
    ],
)
def test_parameters_out_of_range_are_named(mask, mask_kwargs, message):
    with pytest.raises(sm.ConfigError, match=message):
        sm.load_config({"mask": mask, "mask_kwargs": mask_kwargs})


BY_EMBEDDINGS = {"mask": "importance", "mask_kwargs": {"score": "embedding_norm", "k": 2}}


@pytest.mark.parametrize(
    "call",
    [
        lambda q: edges_of(q, q, layer_mask("importance", heads=2, score="embedding_norm", k=2)),
        lambda q: sm.choose_masks(BY_EMBEDDINGS, q, q),
        lambda q: sm.recall(BY_EMBEDDINGS, q, q, top=2),
    ],
)
def test_embedding_norms_need_the_layer(call):
    with pytest.raises(ValueError, match=r"embeddings: expected the layer's input .*`score: embedding_norm`, got None"):
        call(torch.randn(1, 2, 8, 4))


@pytest.mark.parametrize(
    ("tensors", "error", "message"),
    [
        ({"embeddings": torch.ones(1, 4, 3)}, ValueError, r"embeddings: expected shape \(1, 9, E\), got \(1, 4, 3\)"),
        ({"embeddings": torch.ones(1, 9)}, ValueError, r"embeddings: expected shape \(1, 9, E\), got \(1, 9\)"),
        ({"embeddings": torch.ones(1, 9, 3).int()}, TypeError, "embeddings: expected a floating dtype, got torch.int"),
        ({"embeddings": [[1.0]]}, TypeError, "embeddings: expected a torch.Tensor, got list"),
        (
            {"key_padding_mask": torch.ones(1, 8).bool()},
            ValueError,
            r"key_padding_mask: expected shape \(B, S\) = \(1, 9\), got \(1, 8\)",
        ),
        ({"key_padding_mask": torch.ones(1, 9)}, TypeError, "key_padding_mask: expected dtype torch.bool"),
        ({"k": torch.ones(1, 2, 9, 3)}, ValueError, "key: expected shape"),
    ],
)
@pytest.mark.parametrize("config", ["mask: topk", BY_EMBEDDINGS], ids=["has no use for embeddings", "needs embeddings"])
@pytest.mark.parametrize("look", [sm.choose_masks, functools.partial(sm.recall, top=2)], ids=["choose_masks", "recall"])
def test_tensors_that_do_not_fit_are_named_as_the_caller_knows_them(look, config, tensors, error, message):
    q = torch.randn(1, 2, 9, 4)
    with pytest.raises(error, match=message):
        look(config, **{"q": q, "k": q, "embeddings": torch.ones(1, 9, 3)} | tensors)


def test_what_was_chosen_is_a_mask_to_look_at_and_to_reuse():
    q, k, v = (torch.randn(2, 4, 20, 3, generator=torch.Generator().manual_seed(i)) for i in range(3))
    config = {"mask": "topk", "mask_kwargs": {"k": 2}, "scale": 0.25, "on_empty_row": "error"}
    first, second = sm.choose_masks(config, q, k)
    assert first != second
    assert (first.name, first.num_prefix_tokens, first.head_dim) == ("topk", 1, 3)
    assert (first.scale, first.on_empty_row) == (0.25, "error")
    mask = LayerMask(sm.load_config(config), 4)
    expected, _ = sm.functional.attend(q, k, v, mask)
    got = torch.cat([sm.sparse_attention(q[:1], k[:1], v[:1], first), sm.sparse_attention(q[1:], k[1:], v[1:], second)])
    torch.testing.assert_close(got, expected)
    with pytest.raises(ValueError, match="does not choose keys by content"):
        sm.choose_masks("mask: none", q, k)


@pytest.mark.parametrize("name", BY_CONTENT)
def test_the_grid_of_the_configuration_must_be_that_of_the_tokens(name):
    config = {"mask": name, "mask_kwargs": BY_CONTENT[name], "num_prefix_tokens": 1, "grid": [3, 4]}
    q = torch.randn(1, 2, 13, 4)
    assert len(sm.choose_masks(config, q, q)) == 1
    with pytest.raises(sm.ConfigError, match="grid: has 12 cells, but 12 tokens with 1 prefix tokens leave 11 patches"):
        sm.choose_masks(config, q[:, :, 1:], q[:, :, 1:])


def test_arguments_that_cannot_be_are_refused_by_name():
    q = torch.randn(1, 2, 9, 4)
    with pytest.raises(ValueError, match="query: expected a head dimension of at least 1"):
        sm.choose_masks("mask: topk", q[..., :0], q[..., :0])
    with pytest.raises(ValueError, match="key: expected shape"):
        sm.choose_masks("mask: topk", q, q[..., :2])
    with pytest.raises(TypeError, match=r"query: expected a torch\.Tensor"):
        sm.choose_masks("mask: topk", q.tolist(), q)


# Masked logits as zero: keys that are not chosen keep a weight; values and gradients are those of dense attention.

CHOICES = {
    "topk": {"k": 2},
    "topk by head": {"k": [1, 2, 4], "causal": True},
    "block_topk": {"k": 1, "block_size": 3},
    "importance": {"score": "key_norm", "k": 2},
    "vertical_slash": {"num_vertical": 1, "num_slash": 2, "last_queries": 4, "window": 1, "causal": True},
}


def zero_logits(name, kwargs):
    config = {"mask": name.split()[0], "mask_kwargs": kwargs, "masked_logits": "zero"}
    return LayerMask(sm.load_config(config), HEADS, num_prefix_tokens=1)


def heads_of_tokens(*, tokens=8, kv_heads=HEADS):
    generator = torch.Generator().manual_seed(2)
    shapes = [(BATCH, heads, tokens, 4) for heads in (HEADS, kv_heads, kv_heads)]
    return [torch.randn(shape, generator=generator, dtype=torch.float64).requires_grad_() for shape in shapes]


@pytest.mark.parametrize(("name", "kwargs"), CHOICES.items())
@pytest.mark.parametrize("padded", [False, True])
def test_what_is_not_chosen_counts_as_zero(name, kwargs, padded):
    q, k, v = heads_of_tokens()
    mask = zero_logits(name, kwargs)
    key_mask = torch.arange(8) < torch.tensor([[8], [6]]) if padded else None
    keep = chosen(q, k, mask, key_mask=key_mask)
    assert not keep.all()
    truth, truth_lse = dense_attention(q, k, v, keep, key_mask=key_mask, scale=1.0, masked_logits="zero")
    other, _ = dense_attention(q, k, v, keep, key_mask=key_mask, scale=1.0)
    assert not torch.allclose(truth, other)
    out, lse = attend(q, k, v, mask, key_mask=key_mask, scale=1.0, needs_lse=True)
    torch.testing.assert_close(out, truth, rtol=0, atol=1e-12)
    torch.testing.assert_close(lse, truth_lse, rtol=0, atol=1e-12, check_dtype=False)
    got = torch.autograd.grad(out.square().sum(), (q, k, v))
    for mine, theirs in zip(got, torch.autograd.grad(truth.square().sum(), (q, k, v)), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=0, atol=1e-12)


@pytest.mark.parametrize(("name", "kwargs"), CHOICES.items())
def test_zero_logits_beside_a_choice_are_differentiated_twice(name, kwargs):
    def run(q, k, v):
        return attend(q, k, v, zero_logits(name, kwargs), scale=1.0)[0]

    inputs = heads_of_tokens(tokens=6)
    assert torch.autograd.gradcheck(run, inputs, fast_mode=True)
    assert torch.autograd.gradgradcheck(run, inputs, fast_mode=True)


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # torch's own tracing
def test_a_layer_gives_the_weights_of_zero_logits():
    layer = sm.SparseMHSA(
        12, HEADS, batch_first=True, dtype=torch.float64, config={"mask": "topk", "masked_logits": "zero"}
    )
    x = torch.randn(BATCH, 9, 12, dtype=torch.float64)
    _, weights = layer(x, x, x, average_attn_weights=False)
    assert (weights > 0).all()
    torch.testing.assert_close(weights.sum(-1), torch.ones(BATCH, HEADS, 9, dtype=torch.float64))
    out, _ = layer(x, x, x, need_weights=False)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x, x, x, need_weights=False)[0], out)


@pytest.mark.parametrize("name", [name for name in CHOICES if " " not in name])
def test_what_zero_logits_cannot_be_combined_with_is_refused(name):
    config = {"mask": name, "mask_kwargs": CHOICES[name], "masked_logits": "zero"}
    with pytest.raises(ValueError, match="dropout: expected 0 with `masked_logits: zero`"):
        sm.SparseMHSA(12, HEADS, dropout=0.1, config=config)
    layer = sm.SparseMHSA(12, HEADS, batch_first=True, config=config)
    x = torch.randn(1, 8, 12)
    with pytest.raises(ValueError, match="attn_mask: expected none with `masked_logits: zero`"):
        layer(x, x, x, attn_mask=torch.zeros(8, 8))
    with pytest.raises(ValueError, match="masked_logits: `zero` cannot be combined with token_positions"):
        layer(x, x, x, token_positions=torch.arange(8)[None])
    q = torch.randn(1, HEADS, 8, 4)
    with pytest.raises(
        ValueError, match=r"masked_logits: `.*` has `zero`, which a mask made from what it chooses cannot"
    ):
        sm.choose_masks(config, q, q)
