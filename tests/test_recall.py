"""The share of the exactly best keys that a mask keeps, against sorting the scores of every query."""

import pytest
import torch

import sparse_mhsa as sm

BATCH, HEADS, TOKENS = 2, 3, 40


@pytest.fixture
def content():
    generator = torch.Generator().manual_seed(0)
    q, k = (torch.randn(BATCH, HEADS, TOKENS, 5, generator=generator, dtype=torch.float64) for _ in range(2))
    return q, k


def by_definition(mask, q, k, top, causal=False, keep=None):
    """mask (B, H, N, N); keep (B, N)."""
    scores = q @ k.transpose(-1, -2)
    if causal:
        scores = scores.masked_fill(torch.ones(TOKENS, TOKENS, dtype=torch.bool).triu(1), -torch.inf)
    if keep is not None:
        scores = scores.masked_fill(~keep[:, None, None, :], -torch.inf)
    values, keys = scores.topk(min(top, TOKENS))
    exists = values > -torch.inf
    return (mask.gather(-1, keys) & exists).sum((-1, -2)) / exists.sum((-1, -2))


CONFIGS = {
    "block_topk": {"mask": "block_topk", "mask_kwargs": {"k": 2, "block_size": 4}},
    "causal": {"mask": "block_topk", "mask_kwargs": {"k": 2, "block_size": 4, "causal": True}},
    "prefix": {"mask": "block_topk", "mask_kwargs": {"k": 1, "block_size": 4}, "num_prefix_tokens": 3},
    "estimated": {"mask": "vertical_slash", "mask_kwargs": {"num_vertical": 4, "num_slash": 4, "causal": True}},
    "importance": {"mask": "importance", "mask_kwargs": {"k": 5}},
}


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("top", [1, 8, 100])
def test_recall_counts_the_best_keys_among_the_edges(content, name, top):
    mask = torch.stack([mask.to_dense() for mask in sm.choose_masks(CONFIGS[name], *content)])
    expected = by_definition(mask, *content, top, causal=name in ("causal", "estimated"))
    got = sm.recall(CONFIGS[name], *content, top=top)
    torch.testing.assert_close(got, expected.double())
    assert got.min() > 0
    assert got.max() < 1 or top == 100


def test_recall_of_a_static_mask_and_of_a_mask_object_is_counted_per_sample(content):
    config = {"mask": "local", "mask_kwargs": {"window": 3}}
    mask = sm.Mask.from_config(config, TOKENS, HEADS)
    expected = by_definition(mask.to_dense().expand(BATCH, -1, -1, -1), *content, 4).double()
    torch.testing.assert_close(sm.recall(config, *content, top=4), expected)
    torch.testing.assert_close(sm.recall(mask, *content, top=4), expected)
    assert len(set(expected.flatten().tolist())) > 1


def test_the_exact_choice_and_the_dense_mask_recall_everything(content):
    exact = {"mask": "topk", "mask_kwargs": {"k": 6, "keep_cls_dense": False}}
    assert (sm.recall(exact, *content, top=6) == 1).all()
    assert (sm.recall(exact, *content, top=12) == 0.5).all()
    assert (sm.recall("mask: none", *content, top=6) == 1).all()


def test_more_blocks_recall_more(content):
    of = [sm.recall({"mask": "block_topk", "mask_kwargs": {"k": k, "block_size": 4}}, *content, top=8).mean()
          for k in (1, 3, 6, 10)]  # fmt: skip
    assert of == sorted(of)
    assert of[-1] == 1


def test_padding_is_neither_chosen_nor_best(content):
    keep = torch.arange(TOKENS) < torch.tensor([[TOKENS], [25]])
    config = CONFIGS["block_topk"]
    masks = sm.choose_masks(config, *content, key_padding_mask=keep)
    mask = torch.stack([mask.to_dense() for mask in masks])
    got = sm.recall(config, *content, top=8, key_padding_mask=keep)
    torch.testing.assert_close(got, by_definition(mask, *content, 8, keep=keep).double())


def test_what_has_no_recall_is_refused(content):
    with pytest.raises(ValueError, match="top: expected at least 1, got 0"):
        sm.recall("mask: none", *content, top=0)
    with pytest.raises(TypeError, match=r"top: expected an integer, got float 1\.5"):
        sm.recall("mask: none", *content, top=1.5)
    with pytest.raises(sm.ConfigError, match="backend: `efficient` has no edges"):
        sm.recall("backend: efficient", *content, top=1)
