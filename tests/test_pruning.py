"""Pruning to a budget: never above it, within one pair per head of it, one key per row at least, the best pairs."""

import copy
import math
import pickle

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import sparse_mhsa as sm
from sparse_mhsa.adapters import find_attention
from sparse_mhsa.budget import allocate
from sparse_mhsa.probe import Seen
from sparse_mhsa.scores import _Layer

PATCHES, HEADS, LAYERS, HEAD_DIM = 21, 3, 4, 8


def mask_of(num_tokens=PATCHES, heads=HEADS, layer=0, num_layers=LAYERS, head_dim=HEAD_DIM, prefix=0, **kwargs):
    config = {"mask": "pruning", "mask_kwargs": kwargs, "num_prefix_tokens": prefix}
    return sm.Mask.from_config(config, num_tokens, heads, layer, num_layers, head_dim=head_dim)


def made_scores(candidates=PATCHES, kind="attention", seed=0, ties=False):
    """Scores of every pair, or of random candidates, and the dense (L, H, P, P) they are part of."""
    draws = np.random.default_rng(seed)
    dense = (
        draws.integers(0, 4, (LAYERS, HEADS, PATCHES, PATCHES))
        if ties
        else draws.random((LAYERS, HEADS, PATCHES, PATCHES))
    )
    dense = dense.astype(np.float32)
    keys = np.sort(draws.permuted(np.broadcast_to(np.arange(PATCHES), dense.shape), axis=-1)[..., :candidates])
    importance, bound = draws.random((LAYERS, HEADS)) + 0.1, np.zeros((LAYERS, HEADS))
    scores = np.take_along_axis(dense, keys, -1)
    return sm.Scores(kind, 5, 0, keys.astype(np.uint32), scores, importance, bound), dense


@pytest.fixture
def saved(tmp_path):
    """The path of a file of scores of every pair, and those scores."""
    scores, dense = made_scores()
    path = tmp_path / "scores.safetensors"
    scores.save(path)
    return path, dense


# The laws of a budget, by whatever method.

METHODS = [{"method": "position"}, {"method": "random", "seed": 3}, {"method": "attention"}]


def with_file(method, path):
    return method | ({"scores": str(path)} if method["method"] == "attention" else {})


@given(
    st.sampled_from(METHODS),
    st.floats(0.06, 1.0),
    st.sampled_from([None, [1.0, 2.0, 5.0], [0.0, 0.0, 1.0]]),
    st.integers(0, LAYERS - 1),
)
@settings(max_examples=60, deadline=None)
def test_a_ratio_is_never_exceeded_and_met_within_one_pair_per_head(tmp_path_factory, method, ratio, weights, layer):
    path = tmp_path_factory.mktemp("scores") / "scores.safetensors"
    made_scores()[0].save(path)
    pairs = HEADS * PATCHES**2
    for kwargs in ({"keep_ratio": ratio}, {"pruning_ratio": 1 - ratio}):
        mask = mask_of(layer=layer, weights=weights, **kwargs, **with_file(method, path))
        assert mask.nnz_patches <= ratio * pairs + 1e-9
        assert mask.nnz_patches > ratio * pairs - HEADS
        assert all(int(mask.degrees(head).min()) >= 1 for head in range(HEADS))


@given(
    st.sampled_from(METHODS[:2]),
    st.floats(1.0, 25.0),
    st.integers(0, 3),
    st.booleans(),
    st.sampled_from(["GMACs", "GFLOPs"]),
)
@settings(max_examples=60, deadline=None)
def test_a_budget_of_operations_counts_every_layer_head_and_pair(method, share, prefix, dense, unit):
    tokens = PATCHES + prefix
    around = prefix * (2 * tokens - prefix) if dense else 0
    least = LAYERS * HEADS * (PATCHES + around)
    operations = 2 * HEAD_DIM * (1 if unit == "GMACs" else 2)
    budget = share * least * operations / 1e9
    config = {
        "mask": "pruning",
        "mask_kwargs": {"flops_budget": budget, "unit": unit} | method,
        "num_prefix_tokens": prefix,
        "prefix_dense": dense,
    }
    masks = [sm.Mask.from_config(config, tokens, HEADS, layer, LAYERS, head_dim=HEAD_DIM) for layer in range(LAYERS)]
    cost = sum(mask.flops(HEAD_DIM, unit) for mask in masks)
    everything = LAYERS * HEADS * (PATCHES**2 + around) * operations / 1e9
    assert cost <= budget * (1 + 1e-12)
    assert cost > min(budget, everything) - LAYERS * HEADS * operations / 1e9


def test_one_key_per_row_is_the_least_budget_and_all_pairs_the_largest():
    for patches in range(1, 71):
        mask = mask_of(patches, keep_ratio=1 / patches)
        assert torch.equal(mask.to_dense(), torch.eye(patches, dtype=torch.bool).expand(HEADS, -1, -1))
        assert mask_of(patches, keep_ratio=1).density == 1
        assert mask_of(patches, pruning_ratio=0, method="random", seed=0).density == 1
    assert mask_of(flops_budget=10.0, unit="GFLOPs").density == 1


def test_prefix_tokens_are_dense_beside_a_ratio():
    mask = mask_of(PATCHES + 2, prefix=2, keep_ratio=0.2)
    assert mask.to_dense()[:, :2].all()
    assert mask.to_dense()[:, :, :2].all()
    assert mask.nnz_patches == math.floor(0.2 * HEADS * PATCHES**2)


@pytest.mark.parametrize("depth", [1, 2])
def test_the_prefix_counts_in_a_budget_of_operations_inside_other_masks_too(depth):
    alone = {"mask": "pruning", "mask_kwargs": {"flops_budget": 2e-5, "unit": "GMACs"}}
    inside = alone
    for _ in range(depth):
        inside = {"mask": "union", "mask_kwargs": {"masks": [inside]}}
    masks = [
        sm.Mask.from_config(config | {"num_prefix_tokens": 2}, PATCHES + 2, HEADS, num_layers=1, head_dim=HEAD_DIM)
        for config in (alone, inside)
    ]
    assert masks[0].nnz < HEADS * (PATCHES + 2) ** 2
    assert masks[0] == masks[1]


def test_a_budget_is_shared_by_layers_and_heads_as_their_weights_say():
    weights = [[1, 2, 3], [4, 5, 6], [7, 8, 9], [10, 11, 12]]
    masks = [mask_of(layer=layer, keep_ratio=0.3, weights=weights) for layer in range(LAYERS)]
    total = math.floor(0.3 * LAYERS * HEADS * PATCHES**2)
    expected = allocate(total, weights, PATCHES, PATCHES**2)
    assert [mask.nnz_per_head for mask in masks] == expected.tolist()
    operations = 2 * HEAD_DIM * total / 1e9
    masks = [mask_of(layer=layer, flops_budget=operations, unit="GMACs", weights=weights) for layer in range(LAYERS)]
    assert [mask.nnz_per_head for mask in masks] == expected.tolist()


# Which pairs.


def best_pairs(scores, count):
    """The best key of every row, and then the best other pairs; the first of equals."""
    flat = [(-scores[i, j], i, j) for i in range(PATCHES) for j in range(PATCHES)]
    firsts = [min(pair for pair in flat if pair[1] == i) for i in range(PATCHES)]
    rest = sorted(set(flat) - set(firsts))[: count - PATCHES]
    kept = np.zeros((PATCHES, PATCHES), dtype=bool)
    for _, i, j in firsts + rest:
        kept[i, j] = True
    return kept


@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize("ratio", [1 / PATCHES, 0.11, 0.5, 1.0])
@pytest.mark.parametrize("kind", ["attention", "magnitude"])
def test_the_best_scores_are_kept(tmp_path, ties, ratio, kind):
    scores, dense = made_scores(kind=kind, ties=ties)
    scores.save(tmp_path / "scores")
    for layer in (0, 3):
        mask = mask_of(layer=layer, keep_ratio=ratio, scores=str(tmp_path / "scores"), method=kind)
        got = mask.to_dense().numpy()
        for head, count in enumerate(mask.nnz_per_head):
            np.testing.assert_array_equal(got[head], best_pairs(dense[layer, head], count))


def test_pairs_are_chosen_among_the_candidates(tmp_path):
    scores, _ = made_scores(candidates=5)
    scores.save(tmp_path / "scores")
    mask = mask_of(keep_ratio=5 / PATCHES, scores=str(tmp_path / "scores"), layer=2)
    chosen = np.zeros((HEADS, PATCHES, PATCHES), dtype=bool)
    np.put_along_axis(chosen, scores.keys[2].astype(np.int64), True, -1)
    np.testing.assert_array_equal(mask.to_dense().numpy(), chosen)
    with pytest.raises(sm.ConfigError, match=r"mask_kwargs.scores: the file holds 5 candidates per patch, 105 pairs"):
        mask_of(keep_ratio=0.3, scores=str(tmp_path / "scores"))


def test_measured_importance_shares_the_budget(tmp_path):
    scores, _ = made_scores()
    scores.save(tmp_path / "scores")
    masks = [
        mask_of(layer=i, keep_ratio=0.3, scores=str(tmp_path / "scores"), weights="measured") for i in range(LAYERS)
    ]
    total = math.floor(0.3 * LAYERS * HEADS * PATCHES**2)
    expected = allocate(total, scores.importance, PATCHES, PATCHES**2)
    assert [mask.nnz_per_head for mask in masks] == expected.tolist()


def test_random_pairs_depend_on_seed_layer_and_head_alone():
    def drawn(**other):
        return mask_of(keep_ratio=0.2, method="random", **({"seed": 1} | other)).to_dense()

    assert torch.equal(drawn(), drawn())
    for other in ({"seed": 2}, {"layer": 1}):
        assert not torch.equal(drawn(), drawn(**other))
    assert not torch.equal(drawn()[0], drawn()[1])


def test_random_pairs_are_spread_evenly():
    draws = torch.stack([mask_of(7, keep_ratio=0.4, method="random", seed=seed).to_dense() for seed in range(1500)])
    counts = draws.float().mean((0, 1))
    expected = (19 / 49 + 20 / 49 + 19 / 49) / 3  # 58 of 3 x 49 pairs
    assert (counts - 58 / 147).abs().max() < 5 * math.sqrt(expected * (1 - expected) / 4500)
    rows = draws.sum(-1)
    assert rows.min() == 1
    assert rows.max() >= 6  # no row has a quota


# A configuration like any other.


def test_relative_paths_are_relative_to_the_file_and_stay_valid(saved, tmp_path, monkeypatch):
    path, _ = saved
    (tmp_path / "sub").mkdir()
    document = "mask: pruning\nmask_kwargs: {keep_ratio: 0.2, scores: ../scores.safetensors}\n"
    nested = (
        "mask: union\nmask_kwargs:\n  masks:\n  - {mask: local, mask_kwargs: {window: 1}}\n"
        "  - {mask: pruning, mask_kwargs: {keep_ratio: 0.2, scores: ../scores.safetensors}}\n"
    )
    by_layer = "layers:\n  a:\n    mask: pruning\n    mask_kwargs: {keep_ratio: 0.2, scores: ../scores.safetensors}\n"
    expected = mask_of(keep_ratio=0.2, scores=str(path))
    for text in (document, nested, by_layer):
        (tmp_path / "sub" / "config.yaml").write_text(text)
        config = sm.load_config(tmp_path / "sub" / "config.yaml")
        for again in (config, sm.load_config(config.to_yaml()), pickle.loads(pickle.dumps(config))):
            assert again == config
            monkeypatch.chdir("/")
            mask = sm.Mask.from_config(again.for_layer("a"), PATCHES, HEADS, num_layers=LAYERS)
            assert (
                ((expected & mask) == expected) if text is nested else torch.equal(mask.to_dense(), expected.to_dense())
            )
            monkeypatch.undo()
    monkeypatch.chdir(tmp_path)
    relative = mask_of(keep_ratio=0.2, scores="scores.safetensors")
    assert torch.equal(relative.to_dense(), expected.to_dense())


def test_edges_stay_fixed_when_the_file_is_another_one(saved):
    path, _ = saved
    config = sm.load_config({"mask": "pruning", "mask_kwargs": {"keep_ratio": 0.2, "scores": str(path)}})
    before = sm.Mask.from_config(config, PATCHES, HEADS).to_dense()
    for seed in (1, 2, 3):  # more files than are kept in memory
        made_scores(seed=seed)[0].save(path)
        fresh = mask_of(keep_ratio=0.2, scores=str(path))
        assert not torch.equal(fresh.to_dense(), before)
    with pytest.raises(sm.ConfigError, match=r"mask_kwargs.scores: .*the file has changed"):
        sm.Mask.from_config(config, PATCHES, HEADS)


def test_modules_train_pickle_and_copy(saved):
    path, _ = saved
    config = {"mask": "pruning", "mask_kwargs": {"keep_ratio": 0.2, "scores": str(path), "weights": "measured"}}
    module = sm.SparseMHSA(24, HEADS, batch_first=True, config=config, layer=1, num_layers=LAYERS)
    x = torch.randn(2, PATCHES, 24, requires_grad=True)
    out = module(x, x, x)[0]
    out.square().sum().backward()
    assert x.grad is not None
    assert torch.isfinite(x.grad).all()
    for twin in (pickle.loads(pickle.dumps(module)), copy.deepcopy(module)):
        assert torch.equal(twin(x, x, x)[0], out)
    dense = sm.SparseMHSA.from_dense(module, sm.Mask.from_dense(module.mask(PATCHES).to_dense()))
    torch.testing.assert_close(dense(x, x, x)[0], out)


def test_a_module_knows_its_head_dim_and_a_model_its_layers():
    config = {"mask": "pruning", "mask_kwargs": {"flops_budget": 1e-5, "unit": "GMACs"}}
    module = sm.SparseMHSA(24, HEADS, config=config, num_layers=LAYERS)
    assert module.mask(PATCHES).nnz == mask_of(flops_budget=1e-5, unit="GMACs").nnz
    with pytest.raises(sm.ConfigError, match=r"mask_kwargs.flops_budget: .*needs num_layers"):
        sm.SparseMHSA(24, HEADS, config=config)
    model = encoder()
    sm.sparsify(model, config)
    cost = sum(layer.self_attn.mask(PATCHES).flops(HEAD_DIM) for layer in model.layers)
    assert 1e-5 - LAYERS * HEADS * 2 * HEAD_DIM / 1e9 < cost <= 1e-5


# Bad input.

FILE = "SCORES"


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({}, "mask_kwargs: give exactly one of keep_ratio, pruning_ratio, flops_budget"),
        ({"keep_ratio": 0.1, "pruning_ratio": 0.9}, "mask_kwargs: give exactly one of"),
        ({"keep_ratio": 0.0}, "mask_kwargs.keep_ratio: expected more than 0 and at most 1, got 0"),
        ({"keep_ratio": 1.5}, "mask_kwargs.keep_ratio: .*got 1.5"),
        ({"pruning_ratio": 1.0}, "mask_kwargs.pruning_ratio: expected at least 0 and less than 1, got 1"),
        ({"flops_budget": -1.0, "unit": "GMACs"}, "mask_kwargs.flops_budget: expected a number above 0, got -1"),
        ({"flops_budget": 1.0}, "mask_kwargs.unit: expected GMACs or GFLOPs"),
        ({"keep_ratio": 0.5, "unit": "GMACs"}, "mask_kwargs.unit: expected nothing except with flops_budget"),
        ({"flops_budget": 1.0, "unit": "TFLOPs"}, "mask_kwargs.unit: .*TFLOPs.*GMACs.*GFLOPs"),
        ({"keep_ratio": 0.04}, "mask_kwargs.keep_ratio: expected at least 0.0476.* one key for each of the 21 patches"),
        ({"pruning_ratio": 0.96}, "mask_kwargs.pruning_ratio: expected at most 0.952.*, got 0.96"),
        ({"flops_budget": 1e-9, "unit": "GMACs"}, "mask_kwargs.flops_budget: expected at least 4.0.*e-6|0.00000403.*"),
        ({"keep_ratio": 0.5, "method": "attention"}, "mask_kwargs.method: needs `scores`"),
        ({"keep_ratio": 0.5, "method": "nearest"}, "mask_kwargs.method: .*nearest.*position"),
        ({"keep_ratio": 0.5, "weights": "measured"}, "mask_kwargs.weights: `measured` needs `scores`"),
        ({"keep_ratio": 0.5, "weights": 3}, "mask_kwargs.weights: expected a list by head"),
        (
            {"keep_ratio": 0.5, "weights": [1, 2]},
            "mask_kwargs.weights: expected one value for each of the 3 heads",
        ),
        (
            {"keep_ratio": 0.5, "weights": [1, -2, 1]},
            "mask_kwargs.weights: .*at least 0, got -2",
        ),
        ({"keep_ratio": 0.5, "weights": [[1, 1, 1]]}, "mask_kwargs.weights: expected a list for each of the 4 layers"),
        ({"keep_ratio": 0.5, "seed": 1}, "mask_kwargs.seed: expected nothing except with `method: random`"),
        ({"keep_ratio": 0.5, "scores_digest": "ab"}, "mask_kwargs.scores_digest: expected nothing without `scores`"),
        ({"keep_ratio": 0.5, "scores": "/nowhere/scores"}, "mask_kwargs.scores: '/nowhere/scores': No such file"),
        ({"keep_ratio": 0.5, "scores": "/dev/null"}, "mask_kwargs.scores: '/dev/null': not a regular file"),
        ({"keep_ratio": 0.5, "scores": FILE, "method": "magnitude"}, "mask_kwargs.method: `magnitude` needs"),
        ({"keep_ratio": 0.5, "scores": FILE, "method": "random"}, "mask_kwargs.scores: expected nothing with"),
        ({"keep_ratio": 0.5, "keepratio": 1}, "unknown key `keepratio`"),
    ],
)
def test_what_cannot_be_honoured_names_key_value_and_what_is_allowed(saved, kwargs, message):
    kwargs = {key: str(saved[0]) if value == FILE else value for key, value in kwargs.items()}
    with pytest.raises(sm.ConfigError, match=message):
        mask_of(**kwargs)


def test_scores_are_for_their_sizes(saved):
    kwargs = {"keep_ratio": 0.5, "scores": str(saved[0])}
    message = "mask_kwargs.scores: the file is for 21 patches and 3 heads in 4 layers, but the mask is for"
    for sizes in ({"num_tokens": 20}, {"heads": 4}, {"num_layers": 5}, {"layer": 4, "num_layers": None}):
        with pytest.raises(sm.ConfigError, match=message):
            mask_of(**kwargs, **sizes)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda data: data[:100], "not a safetensors file"),
        (lambda data: b"", "not a safetensors file"),
        (lambda data: data.replace(b"sparse_mhsa.scores", b"something_elsexxxx"), "not written by"),
        (lambda data: data.replace(b'"U32"', b'"I32"'), "keys: expected U32, got I32"),
        (lambda data: data.replace(b'\\"samples\\"', b'\\"simples\\"'), "metadata: unknown field `simples`"),
        (lambda data: data[:-4] + b"\xff\xff\xff\xff", "expected"),
    ],
)
def test_a_broken_file_is_an_error_and_never_read_beyond(saved, change, message):
    path, _ = saved
    path.write_bytes(change(path.read_bytes()))
    for read in (sm.Scores.load, lambda file: mask_of(keep_ratio=0.5, scores=str(file))):
        with pytest.raises(sm.ConfigError, match=message):
            read(path)


def test_scores_that_could_not_be_read_back_are_not_written(tmp_path):
    scores, _ = made_scores()
    scores.keys[0, 0, 0, :2] = 5, 2
    with pytest.raises(ValueError, match="keys: expected ascending patches below 21"):
        scores.save(tmp_path / "scores")
    assert not list(tmp_path.iterdir())


# Calibration.


def encoder(seed=0):
    torch.manual_seed(seed)
    layer = torch.nn.TransformerEncoderLayer(HEADS * HEAD_DIM, HEADS, 16, batch_first=True, dropout=0.1)
    return torch.nn.TransformerEncoder(layer, LAYERS, enable_nested_tensor=False)


def batches(count=3, size=4):
    generator = torch.Generator().manual_seed(7)
    return [torch.randn(size, PATCHES, HEADS * HEAD_DIM, generator=generator) for _ in range(count)]


def dense_scores(model, data, kind):
    """(L, H, P, P) in float64, from the projections themselves."""
    sums = torch.zeros(LAYERS, HEADS, PATCHES, PATCHES, dtype=torch.float64)
    looked_at = torch.zeros(LAYERS, HEADS, dtype=torch.float64)
    model = copy.deepcopy(model).double().eval()
    for batch in data:
        x = batch.double()
        for index, layer in enumerate(model.layers):
            attention = layer.self_attn
            q, k, _ = torch.nn.functional.linear(x, attention.in_proj_weight, attention.in_proj_bias).chunk(3, -1)
            q, k = (y.unflatten(-1, (HEADS, HEAD_DIM)).transpose(1, 2) for y in (q, k))
            logits = q @ k.transpose(-1, -2) / math.sqrt(HEAD_DIM)
            weights = logits.softmax(-1)
            sums[index] += (weights if kind == "attention" else logits.abs()).sum(0)
            looked_at[index] += (-(weights * weights.log()).sum(-1)).exp().mean(-1).sum(0)
            x = layer(x)
    samples = sum(len(batch) for batch in data)
    return sums / samples, looked_at / samples


@pytest.mark.parametrize("kind", ["attention", "magnitude"])
def test_collected_scores_are_the_means_over_the_data(kind):
    model, data = encoder(), batches()
    expected, looked_at = dense_scores(model, data, kind)
    every = sm.collect_scores(model, data, method=kind, candidates=1000)
    assert every.keys.shape == expected.shape
    assert (every.kind, every.samples, every.num_prefix_tokens) == (kind, 12, 0)
    torch.testing.assert_close(torch.from_numpy(every.scores).double(), expected, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(torch.from_numpy(every.importance), looked_at, rtol=1e-4, atol=1e-6)
    assert not every.bound.any()


@pytest.mark.parametrize("candidates", [1, 4, 20])
def test_scores_of_candidates_are_exact_and_the_others_bounded(candidates):
    model, data = encoder(), batches()
    expected, _ = dense_scores(model, data, "attention")
    found = sm.collect_scores(model, data, candidates=candidates)
    keys = torch.from_numpy(found.keys.astype(np.int64))
    assert keys.shape[-1] == candidates
    assert (keys.diff(dim=-1) > 0).all()
    torch.testing.assert_close(torch.from_numpy(found.scores).double(), expected.gather(-1, keys), rtol=1e-4, atol=1e-6)
    outside = expected.scatter(-1, keys, 0.0).amax((-1, -2))
    bound = torch.from_numpy(found.bound)
    assert (outside <= bound + 1e-6).all()
    assert (bound <= 1 / (candidates + 1) + 1e-6).all()


def test_a_pair_that_is_always_attended_to_is_never_lost():
    """However the other weights move about: what is above the bound is a candidate."""
    (site,) = find_attention(torch.nn.MultiheadAttention(16, 1))
    layer = _Layer(site, "attention", 2, 0)
    generator = torch.Generator().manual_seed(0)
    k = torch.eye(16)[None, None]
    for _ in range(200):
        q = torch.full((1, 1, 16, 16), -30.0)
        q[..., 5] = 1.5  # beside one other key of score 2: a weight of 0.38, and the bound is 1 / 3
        q.scatter_(-1, torch.randint(16, (1, 1, 16, 1), generator=generator), 2.0)
        layer.observe(Seen(q, k, k, k, k[..., 0], None, None, 1.0, None))
    assert (layer.keys == 5).any(-1).all()


def test_calibration_leaves_the_model_as_it_was():
    model, data = encoder().train(), batches()
    model.layers[1].eval()
    sm.sparsify(model, {"mask": "local", "mask_kwargs": {"window": 2}}, include=r"layers\.2\.")
    state, modes = copy.deepcopy(model.state_dict()), [module.training for module in model.modules()]
    classes = [type(module) for module in model.modules()]
    before = copy.deepcopy(model).eval()(data[0])
    sm.collect_scores(model, data)
    assert [module.training for module in model.modules()] == modes
    assert [type(module) for module in model.modules()] == classes
    assert all(torch.equal(x, state[name]) for name, x in model.state_dict().items())
    assert torch.equal(model.eval()(data[0]), before)


def test_calibrated_pruning_keeps_more_of_attention_than_position_does(tmp_path):
    model, data = encoder(), batches()
    expected, _ = dense_scores(model, data, "attention")
    sm.collect_scores(model, data, candidates=8).save(tmp_path / "scores")
    kept = []
    for kwargs in ({}, {"scores": str(tmp_path / "scores")}):
        report = sm.sparsify(model, {"mask": "pruning", "mask_kwargs": {"keep_ratio": 0.2} | kwargs})
        assert sum(row.status == "swapped" for row in report.rows) == LAYERS
        masks = torch.stack([layer.self_attn.mask(PATCHES).to_dense() for layer in model.layers])
        kept.append((expected * masks).sum(-1).mean().item())
    assert kept[1] > kept[0]


def test_padding_is_not_attended_to_and_padded_queries_do_not_count():
    model, data = encoder(), batches(1, 2)
    padding = torch.zeros(2, PATCHES, dtype=torch.bool)
    padding[1, 15:] = True
    found = sm.collect_scores(
        model, data, candidates=1000, forward=lambda model, x: model(x, src_key_padding_mask=padding)
    )
    alone = sm.collect_scores(model, [data[0][:1]], candidates=1000)
    np.testing.assert_allclose(found.scores[:, :, 15:], alone.scores[:, :, 15:] / 2, rtol=1e-4, atol=1e-6)
    first = found.scores[0].sum(-1)
    np.testing.assert_allclose(first[:, :15], 1.0, rtol=1e-4)
    np.testing.assert_allclose(first[:, 15:], 0.5, rtol=1e-4)


@pytest.mark.parametrize("kind", ["attention", "magnitude"])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_attention_that_is_not_finite_is_an_error_and_not_a_row_without_attention(kind, value):
    first, second = batches(2)
    second[1, 3, 5] = value
    with pytest.raises(ValueError, match=r"loader: batch 1 .* layer `layers\.0\.self_attn` .*not finite, samples 1;"):
        sm.collect_scores(encoder(), [first, second], method=kind)


def test_a_batch_of_no_samples_is_an_error_that_names_it():
    first, second = batches(2)
    with pytest.raises(ValueError, match=r"loader: batch 1 .* layer `layers\.0\.self_attn` no sample, or padding"):
        sm.collect_scores(encoder(), [first, second[:0]])


@pytest.mark.parametrize("kind", ["attention", "magnitude"])
def test_queries_that_may_attend_to_nothing_have_no_scores(kind):
    nothing = torch.zeros(PATCHES, PATCHES, dtype=torch.bool)
    nothing[4] = True
    attention = torch.nn.MultiheadAttention(HEADS * HEAD_DIM, HEADS, batch_first=True)
    found = sm.collect_scores(
        attention,
        batches(1),
        method=kind,
        candidates=PATCHES,
        forward=lambda model, x: model(x, x, x, attn_mask=nothing, need_weights=False),
    )
    assert np.isfinite(found.scores).all()
    assert not found.scores[:, :, 4].any()
    assert found.scores[:, :, [3, 5]].all()


@pytest.mark.parametrize("kind", ["attention", "magnitude"])
def test_what_stands_in_padding_does_not_matter(kind):
    model, (x,) = encoder(), batches(1)
    padding = torch.zeros(len(x), PATCHES, dtype=torch.bool)
    padding[1, 15:] = True

    def found(value):
        return sm.collect_scores(
            model,
            [x.masked_fill(padding[..., None], value)],
            method=kind,
            forward=lambda model, x: model(x, src_key_padding_mask=padding),
        )

    np.testing.assert_array_equal(found(math.nan).scores, found(0.0).scores)
    np.testing.assert_array_equal(found(math.nan).importance, found(0.0).importance)


@pytest.mark.parametrize("name", ["candidates", "num_prefix_tokens"])
@pytest.mark.parametrize("value", [2.5, True, "3"])
def test_what_is_no_number_of_tokens_is_named(name, value):
    with pytest.raises(TypeError, match=f"{name}: expected an integer, got {type(value).__name__}"):
        sm.collect_scores(encoder(), batches(), **{name: value})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"method": "nearest"}, "method: expected attention or magnitude, got 'nearest'"),
        ({"candidates": 0}, "candidates: expected at least 1, got 0"),
        ({"num_prefix_tokens": -1}, "num_prefix_tokens: expected at least 0, got -1"),
        ({"loader": []}, "loader: gave no batch"),
        ({"loader": lambda: iter(batches())}, "loader: gave 12 samples at first, and then 0"),
        ({"loader": [torch.randn(1, n, 24) for n in (5, 6)]}, "saw 5 and then 6"),
        ({"include": "nothing"}, "include: `nothing` matches none of the attention layers"),
        (
            {"include": r"layers\.[01]\."},
            "model: expected one whole stack of attention layers, got [^,]*, [^,]*; use",
        ),
        ({"num_prefix_tokens": PATCHES}, "expected tokens beside the 21 prefix tokens"),
    ],
)
def test_what_cannot_be_collected_says_why(change, message):
    change = {key: value() if callable(value) else value for key, value in change.items()}
    arguments = {"loader": batches(), "candidates": 3} | change
    with pytest.raises(ValueError, match=message):
        sm.collect_scores(encoder(), arguments.pop("loader"), **arguments)
