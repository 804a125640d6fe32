"""Masks, sequences, shuffles and outputs against data from the published code (see golden/README.md)."""

import json
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch

import sparse_mhsa as sm
from sparse_mhsa import _core

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


def test_no_golden_mask_of_a_registered_name_is_left_out():
    counts = {name: sum(c["mask"] == name for c in MASK_CASES) for name in ("fibottention", "longformer", "sparse")}
    assert counts == {"fibottention": 545, "longformer": 116, "sparse": 298}


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
    mask = sm.Mask.from_config(config, num_tokens=q.shape[2], num_heads=q.shape[1], layer=case["depth"] or 0)
    out = sm.sparse_attention(q, k, v, mask)
    torch.testing.assert_close(out, torch.from_numpy(arrays[case["arrays"]["out"]]), rtol=0, atol=TOLERANCE)
    if "dq" in case["arrays"]:
        out.backward(g)
        for name, tensor in (("dq", q), ("dk", k), ("dv", v)):
            expected = torch.from_numpy(arrays[case["arrays"][name]])
            torch.testing.assert_close(tensor.grad, expected, rtol=0, atol=TOLERANCE)


def test_the_golden_outputs_cover_every_registered_mask_with_a_reference():
    covered = {case["mask"] or "none" for case in OUTPUT_CASES}
    assert covered >= {"none", "sparse", "fibottention", "fibottentioncrossdiag", "longformer"}


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
