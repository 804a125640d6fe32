"""Masks, sequences, shuffles and outputs against data from the published code (see golden/README.md)."""

import json
import math
from collections import Counter
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch

import sparse_mhsa as sm
from sparse_mhsa import _core
from sparse_mhsa.functional import attend
from sparse_mhsa.masks import LayerMask

GOLDEN = Path(__file__).parent / "golden"
TOLERANCE = 1e-9

# How the data's names for variants are written in a configuration.
MASK_NAMES = {"fibottention_robot": "fibottention"}


@cache
def manifest(name):
    return json.loads((GOLDEN / name).read_text())["cases"]


@cache
def archive(name):
    with np.load(GOLDEN / name) as data:
        return {key: data[key] for key in data.files}


def golden_mask(case):
    """(H, N, N) bool."""
    n = case["n_tokens"]
    planes = archive(case["file"])["planes"][case["planes"]]
    return np.unpackbits(planes, axis=1, count=n * n).reshape(-1, n, n).astype(bool)


def config_of(mask, mask_kwargs):
    return {"mask": MASK_NAMES.get(mask, mask), "mask_kwargs": mask_kwargs}


def registered():
    return {entry["name"] for entry in _core.registered_masks()}


MASK_CASES = [c for c in manifest("masks.json") if MASK_NAMES.get(c["mask"], c["mask"]) in registered()]


@pytest.mark.parametrize("case", MASK_CASES, ids=[c["id"] for c in MASK_CASES])
def test_every_golden_mask_matches_edge_by_edge(case):
    mask = sm.Mask.from_config(
        config_of(case["mask"], case["params"]),
        num_tokens=case["n_tokens"],
        num_heads=case["heads"],
        layer=case["depth"] or 0,
    )
    expected = golden_mask(case)
    np.testing.assert_array_equal(mask.to_dense().numpy(), expected)
    assert mask.nnz_per_head == [int(head.sum()) for head in expected] == case["nnz"]


def test_every_golden_case_of_a_static_mask_is_checked():
    names = Counter(case["mask"] for case in MASK_CASES)
    everything = Counter(case["mask"] for case in manifest("masks.json"))
    del everything["efficient_local"]  # the support of a linear backend, not a mask
    assert names == everything
    assert names.total() == 1042


def softmax_cases():
    """Outputs of the softmax backend under masks that are registered here."""
    for case in manifest("outputs.json"):
        family = case.get("backend") in ("vit", "vit_qchunk", "fibottention_sparse")
        if family and case["id"].startswith("N") and (case["mask"] or "none") in registered() | {"none"}:
            yield case


OUTPUT_CASES = list(softmax_cases())


@pytest.mark.parametrize("case", OUTPUT_CASES, ids=[c["id"] for c in OUTPUT_CASES])
def test_golden_outputs_and_gradients_of_the_softmax_backend(case):
    arrays = archive(case["file"])
    q, k, v, g = (torch.from_numpy(arrays[case["inputs"][name]]) for name in ("q", "k", "v", "g"))
    for tensor in (q, k, v):
        tensor.requires_grad_()
    config = config_of(case["mask"] or "none", case["mask_kwargs"] or {})
    if case["backend"] != "vit":
        config |= {"backend": case["backend"], "backend_kwargs": case["backend_kwargs"] or {}}
    # Not a Mask of this size: some masks have no edges before they see queries and keys.
    layer_mask = LayerMask(sm.load_config(config), q.shape[1], layer=case["depth"] or 0)
    out, _ = attend(q, k, v, layer_mask)
    torch.testing.assert_close(out, torch.from_numpy(arrays[case["arrays"]["out"]]), rtol=0, atol=TOLERANCE)
    if "dq" in case["arrays"]:
        out.backward(g)
        for name, tensor in (("dq", q), ("dk", k), ("dv", v)):
            expected = torch.from_numpy(arrays[case["arrays"][name]])
            torch.testing.assert_close(tensor.grad, expected, rtol=0, atol=TOLERANCE)


EXPLICIT_CASES = [case for case in manifest("outputs.json") if case["mask"] == "explicit"]


@pytest.mark.parametrize("case", EXPLICIT_CASES, ids=[c["id"] for c in EXPLICIT_CASES])
def test_golden_outputs_and_gradients_of_masks_given_as_edges(case):
    """What the published code's random generator drew: its stream is nobody's model, but its results are."""
    arrays = archive(case["file"])
    q, k, v, g = (torch.from_numpy(arrays[case["inputs"][name]]) for name in ("q", "k", "v", "g"))
    shape = case["mask_shape"]
    bits = np.unpackbits(arrays[case["arrays"]["mask_bits"]].ravel(), count=math.prod(shape)).reshape(shape)
    kept = torch.from_numpy(bits).bool().flatten(0, 1)
    degrees = kept.sum(-1).flatten().cumsum(0).reshape(kept.shape[:2])
    before = torch.cat([torch.zeros(1, dtype=torch.int64), degrees[:-1, -1]])
    row_ptr, col = torch.cat([before[:, None], degrees], 1), kept.nonzero()[:, 2].contiguous()
    options = (None, None, None, 0.0, q.shape[-1] ** -0.5)
    out, lse = torch.ops.sparse_mhsa.forward_edges(q, k, v, row_ptr, col, *options)
    torch.testing.assert_close(out, torch.from_numpy(arrays[case["arrays"]["out"]]), rtol=0, atol=TOLERANCE)
    gradients = torch.ops.sparse_mhsa.backward_edges(g, q, k, v, out, lse, row_ptr, col, *options)
    for name, gradient in zip(("dq", "dk", "dv"), gradients, strict=True):
        if name in case["arrays"]:
            expected = torch.from_numpy(arrays[case["arrays"][name]])
            torch.testing.assert_close(gradient, expected, rtol=0, atol=TOLERANCE)


def test_the_golden_outputs_cover_every_registered_mask_with_a_reference():
    covered = {case["mask"] or "none" for case in OUTPUT_CASES}
    assert covered >= {"none", "sparse", "fibottention", "fibottentioncrossdiag", "longformer", "topk"}


OFFSET_CASES = manifest("offsets.json")


@pytest.mark.parametrize("case", OFFSET_CASES, ids=lambda c: f"P{c['patches']}H{c['heads']}{'m' * c['modified']}")
def test_golden_fibottention_sequences_are_the_distances_each_head_keeps(case):
    patches = case["patches"]
    mask = sm.masks.fibottention(
        num_tokens=patches,
        num_heads=case["heads"],
        modified=case["modified"],
        w_min=case["w_min"],
        w_max=case["w_max"],
        shuffled=False,
        add_class_token=False,
    )
    row_ptr, col = mask.to_csr()
    for head, offsets in enumerate(case["offsets"]):
        rows = torch.repeat_interleave(torch.arange(patches), row_ptr[head].diff())
        columns = col[row_ptr[head, 0] : row_ptr[head, -1]]
        kept = set((rows - columns).abs().tolist())
        assert kept == {offset for offset in offsets if offset < patches}


PERMUTATION_CASES = [c for c in manifest("permutations.json") if c["heads"] > 1]


@pytest.mark.parametrize("case", PERMUTATION_CASES, ids=lambda c: f"H{c['heads']}seed{c['seed']}")
def test_golden_shuffles_deal_the_sequences_to_the_heads(case):
    def degrees(**options):
        mask = sm.masks.fibottention(
            num_tokens=600, num_heads=case["heads"], layer=case["seed"], w_min=300, w_max=300, **options
        )
        return [tuple(mask.degrees(head).tolist()) for head in range(case["heads"])]

    plain, shuffled = degrees(shuffled=False), degrees(shuffled=True)
    assert len(set(plain)) == case["heads"], "the rows must be distinguishable for this test to mean anything"
    assert shuffled == [plain[index] for index in case["perm"]]


def module_cases():
    for case in manifest("outputs.json"):
        if case["id"].startswith("module") and case["backend"] == "vit" and case["mask"] in registered():
            yield case


@pytest.mark.parametrize("case", list(module_cases()), ids=lambda c: c["id"])
def test_golden_attention_module_with_the_scale_applied_once_and_twice(case):
    arrays = archive(case["file"])
    weights = {name: torch.from_numpy(arrays[key]) for name, key in case["inputs"].items()}
    heads = case["heads"]
    for scaling in ("out_scale_off", "out_scale_on"):
        config = config_of(case["mask"], case["mask_kwargs"] or {})
        dim = weights["x"].shape[-1]
        if scaling == "out_scale_on":
            config["scale"] = heads / dim  # 1 / head_dim: the published wiring divides by sqrt(head_dim) twice
        module = sm.SparseMHSA(
            dim, heads, batch_first=True, dtype=torch.float64, config=config, layer=case["depth"] or 0
        )
        names = {
            "in_proj_weight": "qkv.weight",
            "in_proj_bias": "qkv.bias",
            "out_proj.weight": "proj.weight",
            "out_proj.bias": "proj.bias",
        }
        module.load_state_dict({ours: weights[theirs] for ours, theirs in names.items()})
        out, _ = module(weights["x"], weights["x"], weights["x"], need_weights=False)
        expected = torch.from_numpy(arrays[case["arrays"][scaling]])
        torch.testing.assert_close(out, expected, rtol=0, atol=TOLERANCE)


def union(*parts):
    return {
        "mask": "union",
        "mask_kwargs": {"masks": [{"mask": mask, "mask_kwargs": kwargs} for mask, kwargs in parts]},
    }


TAXONOMY = {
    "local_window": lambda p: (
        {"mask": "local", "mask_kwargs": {"window": p["half_width"]}}
        if "half_width" in p
        else {"mask": "local", "mask_kwargs": {"window_size": p["total_width"]}}
    ),
    "local_plus_global": lambda p: union(
        ("local", {"window": p["half_width"]}), ("global", {"global_indices": p["global_tokens"]})
    ),
    "strided": lambda p: {"mask": "strided", "mask_kwargs": {"stride": p["stride"], "causal": p["causal"]}},
    "local_plus_strided_columns_plus_global": lambda p: union(
        ("local", {"window": p["half_width"]}),
        ("strided_columns", {"stride": p["stride"], "causal": True}),
        ("global", {"global_indices": p["global_tokens"]}),
    ),
    "block": lambda p: {"mask": "block", "mask_kwargs": {"block_size": p["block"], "layout": p["layout"]}},
}

TAXONOMY_CASES = [case for case in manifest("taxonomy.json") if "keys_per_query" in case]


@pytest.mark.parametrize("case", TAXONOMY_CASES, ids=lambda case: case["id"])
def test_worked_examples_of_the_taxonomy(case):
    config = TAXONOMY[case["mechanism"]](case["params"])
    mask = sm.Mask.from_config(config, num_tokens=case["params"]["n"], num_heads=2)
    for head in mask.to_dense():
        assert [row.nonzero().flatten().tolist() for row in head] == case["keys_per_query"]


# Densities of the published table at 197 tokens and 12 heads, as pruning ratios over the patches.
PUBLISHED = {
    "vit_fibottention": 0.9801,
    "vit_fibottention_shuffled": 0.9801,
    "vit_fibottention_crossdiag": 0.9801,
    "fibottention_high_overlap": 0.9598,
    "vit_longformer": 0.9847,
    "dna": 0.9899,
    "vit_bigbird": 0.9796,
    "vit_sparse_local": 0.9847,
    "vit_sparse_strided": 0.9860,
    "vit_sparse_fixed": 0.6546,
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_pruning_ratios(name):
    config = GOLDEN.parents[1] / "configs" / "attention" / f"{name}.yaml"
    mask = sm.Mask.from_config(config, num_tokens=197, num_heads=12)
    assert mask.pruning_ratio == pytest.approx(PUBLISHED[name], abs=1.01e-4)
