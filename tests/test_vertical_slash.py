"""Columns and distances estimated from the attention of the last queries, against a dense softmax."""

import itertools

import pytest
import torch

import sparse_mhsa as sm
from sparse_mhsa.content import edges_of
from sparse_mhsa.layer_mask import LayerMask
from sparse_mhsa.reference import dense_attention

BATCH, HEADS = 2, 3


def numbers(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def layer_mask(heads=HEADS, prefix=None, **mask_kwargs):
    config = {"mask": "vertical_slash", "mask_kwargs": {"causal": True, **mask_kwargs}}
    return LayerMask(sm.load_config(config), heads, num_prefix_tokens=prefix)


def chosen(q, k, mask, **options):
    """(B, H, N, N) bool of the edges that the operator chose."""
    edges = edges_of(q, k, mask, **options).per_head(*q.shape[:3], k.shape[2], q.device)
    dense = torch.zeros(*q.shape[:3], k.shape[2], dtype=torch.bool)
    for samples, row_ptr, col in edges:
        for head, row in itertools.product(range(q.shape[1]), range(q.shape[2])):
            dense[samples, head, row, col[row_ptr[head, row] : row_ptr[head, row + 1]]] = True
    return dense


def best(scores, keep):
    """The indices of the highest scores, the lower index first where they are equal."""
    return sorted(range(len(scores)), key=lambda index: (-scores[index], index))[:keep]


def by_definition(q, k, num_vertical, num_slash, last_queries=64, window=None, keep=None, bias=None):
    """One head: q, k (N, D); keep (N,) the tokens that padding leaves."""
    tokens = len(q)
    keep = torch.ones(tokens, dtype=torch.bool) if keep is None else keep
    i, j = torch.arange(tokens)[:, None], torch.arange(tokens)[None, :]
    scores = q @ k.T * q.shape[1] ** -0.5 + (0.0 if bias is None else bias)
    weights = scores.masked_fill((j > i) | ~keep, -torch.inf).softmax(-1).nan_to_num(0.0)
    rows = [row for row in range(tokens) if keep[row]][-last_queries:]
    of_key = weights[rows].sum(0)
    of_distance = [float(sum(weights[row, row - d] for row in rows if row >= d)) for d in range(tokens)]
    columns = best([float(x) if kept else -1.0 for x, kept in zip(of_key, keep, strict=True)], num_vertical)
    columns = [column for column in columns if keep[column]]
    distances = best(of_distance, num_slash)
    mask = torch.isin(j, torch.tensor(columns, dtype=torch.long)) | torch.isin(
        i - j, torch.tensor(distances, dtype=torch.long)
    )
    return (mask | (i - j <= (-1 if window is None else window))) & (j <= i)


def all_heads(q, k, **options):
    group = q.shape[1] // k.shape[1]
    return torch.stack(
        [
            torch.stack([by_definition(q[b, h], k[b, h // group], **options) for h in range(q.shape[1])])
            for b in range(q.shape[0])
        ]
    )


def test_heads_and_layers_may_have_budgets_of_their_own():
    q, k = numbers(2, 4, 40, 8), numbers(2, 2, 40, 8, seed=1)
    columns, distances = sm.budget.allocate(24, [[1, 2, 3, 4], [4, 4, 1, 1]], minimum=1).tolist(), [0, 1, 2, 3]
    kwargs = {"num_vertical": columns, "num_slash": distances, "causal": True}
    config = {"mask": "vertical_slash", "mask_kwargs": kwargs}
    for layer in (0, 1):
        masks = sm.choose_masks(config, q, k, layer=layer)
        for sample, head in itertools.product(range(2), range(4)):
            expected = by_definition(q[sample, head], k[sample, head // 2], columns[layer][head], distances[head])
            assert torch.equal(masks[sample].to_dense()[head], expected)
    for kwargs, key in [
        ({"num_vertical": [1, 2]}, "num_vertical: expected one value for each of the 4 heads, got 2"),
        ({"num_slash": [[1, 2, 3, 4]]}, "num_slash: has lists for 1 layers, but this is layer 1"),
        ({"num_slash": [1, 2, 3, -4]}, "num_slash: expected 0 to 4294967295, got -4"),
    ]:
        with pytest.raises(sm.ConfigError, match=f"mask_kwargs.{key}"):
            sm.choose_masks(config | {"mask_kwargs": {"causal": True} | kwargs}, q, k, layer=1)


@pytest.mark.parametrize("tokens", [1, 2, 9, 40, 70, 131])
@pytest.mark.parametrize(
    "options",
    [
        {"num_vertical": 3, "num_slash": 4},
        {"num_vertical": 5, "num_slash": 0},
        {"num_vertical": 0, "num_slash": 2, "window": 1},
        {"num_vertical": 2, "num_slash": 2, "last_queries": 1},
        {"num_vertical": 4, "num_slash": 3, "last_queries": 100},
        {"num_vertical": 1000, "num_slash": 1000},
    ],
    ids=str,
)
def test_columns_and_distances_are_those_to_which_the_last_queries_attend_most(tokens, options):
    q, k = numbers(BATCH, HEADS, tokens, 5), 2 * numbers(BATCH, HEADS, tokens, 5, seed=1)
    assert torch.equal(chosen(q, k, layer_mask(**options)), all_heads(q, k, **options))


def test_columns_and_distances_differ_by_sample_and_head():
    q, k = numbers(BATCH, HEADS, 60, 5), 2 * numbers(BATCH, HEADS, 60, 5, seed=1)
    masks = chosen(q, k, layer_mask(num_vertical=3, num_slash=3)).flatten(0, 1)
    assert not any(torch.equal(a, b) for a, b in itertools.combinations(masks, 2))


def test_of_equal_sums_the_lower_number_is_kept():
    """Without scores every past key weighs the same, so that of all sums by key only the first 16 are largest."""
    q = torch.zeros(1, 1, 20, 4, dtype=torch.float64)
    got = chosen(q, q, layer_mask(heads=1, num_vertical=2, num_slash=1, last_queries=4))[0, 0]
    i, j = torch.arange(20)[:, None], torch.arange(20)[None, :]
    assert torch.equal(got, ((j < 2) | (i == j)) & (j <= i))


def test_grouped_heads_share_keys():
    q, k = numbers(BATCH, 4, 30, 5), 2 * numbers(BATCH, 2, 30, 5, seed=1)
    options = {"num_vertical": 3, "num_slash": 3}
    assert torch.equal(chosen(q, k, layer_mask(heads=4, **options)), all_heads(q, k, **options))


def test_a_prefix_is_dense_and_no_part_of_the_estimate():
    q, k = numbers(BATCH, HEADS, 32, 5), 2 * numbers(BATCH, HEADS, 32, 5, seed=1)
    options = {"num_vertical": 3, "num_slash": 3, "last_queries": 8}
    got = chosen(q, k, layer_mask(prefix=2, **options))
    assert got[..., :2].all()
    assert got[:, :, :2].all()
    assert torch.equal(got[..., 2:, 2:], all_heads(q[:, :, 2:], k[:, :, 2:], **options))


@pytest.mark.parametrize("side", ["right", "left"])
def test_padding_is_neither_looked_from_nor_chosen(side):
    """The estimate of a padded sequence is that of the sequence alone."""
    q, k = numbers(1, HEADS, 30, 5), 2 * numbers(1, HEADS, 30, 5, seed=1)
    keep = torch.arange(30) < 19 if side == "right" else torch.arange(30) >= 11
    mask = layer_mask(num_vertical=3, num_slash=3, last_queries=8)
    got = chosen(q, k.masked_fill(~keep[:, None], torch.nan), mask, key_mask=keep[None])
    assert torch.equal(got[..., keep, :][..., keep], chosen(q[:, :, keep], k[:, :, keep], mask))


def test_an_additive_mask_is_part_of_the_scores():
    q, k, bias = numbers(1, 1, 30, 5), numbers(1, 1, 30, 5, seed=1), 3 * numbers(1, 1, 30, 30, seed=2)
    bias[..., ::3] = -torch.inf
    options = {"num_vertical": 3, "num_slash": 3}
    got = chosen(q, k, layer_mask(heads=1, **options), bias=bias)
    assert torch.equal(got[0, 0], by_definition(q[0, 0], k[0, 0], bias=bias[0, 0], **options))


def test_a_module_with_padding_attends_over_the_estimate_and_learns_through_its_edges():
    options = {"num_vertical": 3, "num_slash": 3, "last_queries": 8}
    config = {"mask": "vertical_slash", "mask_kwargs": {"causal": True, **options}}
    module = sm.SparseMHSA(12, HEADS, batch_first=True, dtype=torch.float64, config=config)
    x, grad_out = numbers(BATCH, 24, 12).requires_grad_(), numbers(BATCH, 24, 12, seed=1)
    keep = torch.arange(24) < torch.tensor([[24], [15]])
    out, _ = module(x, x, x, key_padding_mask=~keep, need_weights=False)
    q, k, v = (
        t.unflatten(-1, (HEADS, -1)).transpose(1, 2)
        for t in (x @ module.in_proj_weight.T + module.in_proj_bias).chunk(3, -1)
    )
    mask = torch.stack([torch.stack([by_definition(a, b, keep=each, **options) for a, b in zip(*qk, strict=True)])
                        for *qk, each in zip(q.detach(), k.detach(), keep, strict=True)])  # fmt: skip
    expected, _ = dense_attention(q, k, v, mask & keep[:, None, None, :])
    expected = module.out_proj(expected.transpose(1, 2).flatten(2))
    torch.testing.assert_close(out, expected, rtol=1e-12, atol=1e-12)
    got = torch.autograd.grad(out, x, grad_out)
    torch.testing.assert_close(got, torch.autograd.grad(expected, x, grad_out), rtol=1e-11, atol=1e-12)


def test_a_timm_model_takes_the_shipped_configuration():
    timm = pytest.importorskip("timm")
    model = timm.create_model("vit_tiny_patch16_224", depth=2, img_size=64, num_classes=3).double().eval()
    report = sm.sparsify(model, sm.configs()["vertical_slash_estimated"], verify=True)
    assert [row.mask for row in report.rows] == ["vertical_slash"] * 2


def test_what_was_estimated_is_a_mask_to_look_at():
    q, k = numbers(BATCH, HEADS, 40, 5), numbers(BATCH, HEADS, 40, 5, seed=1)
    mask_kwargs = {"num_vertical": 3, "num_slash": 4, "window": 0, "causal": True}
    config = {"mask": "vertical_slash", "mask_kwargs": mask_kwargs}
    masks = torch.stack([mask.to_dense() for mask in sm.choose_masks(config, q, k)])
    assert torch.equal(masks, all_heads(q, k, num_vertical=3, num_slash=4, window=0))


def test_both_faces_of_the_mask_round_trip_and_are_causal_as_they_say():
    estimated = sm.load_config({"mask": "vertical_slash", "mask_kwargs": {"num_slash": 2, "causal": True}})
    assert estimated.by_content
    assert "causal: true" in estimated.to_yaml()
    assert sm.load_config(estimated.to_yaml()) == estimated
    listed = sm.load_config({"mask": "vertical_slash", "mask_kwargs": {"slash": [2]}})
    assert not listed.by_content
    assert "causal: false" in listed.to_yaml()
    assert sm.load_config(listed.to_yaml()) == listed
