"""Every registered mask, whatever it is: a new mask is covered here without a new test."""

import copy
import itertools
import json
import math
import pickle
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch

import sparse_mhsa as sm
from comparison import assert_same
from predicates import ALL_TOKENS, ON_GRID, PREDICATES, VARIANTS, Size, default_prefix, exists
from sparse_mhsa import _core
from sparse_mhsa.content import edges_of
from sparse_mhsa.layer_mask import LayerMask
from sparse_mhsa.reference import dense_attention

CONFIGS = Path(__file__).parents[1] / "configs" / "attention"
MASKS = [entry["name"] for entry in _core.registered_masks()]
# Masks that choose keys by content have edges for given queries and keys only.
BY_CONTENT = {name for name in MASKS if sm.load_config(CONFIGS / f"{name}.yaml").by_content}
ON_A_GRID = {entry["name"] for entry in _core.registered_masks() if "grid" in entry["keys"]}
YAMLS = sorted(CONFIGS.glob("*.yaml"))
BATCH, HEADS, LAYERS = 2, 4, 5
SIZES = [*range(1, 12), 17, 31, 32, 33, 50, 64, 65, 70]
GRIDS = [
    (height, patches // height) for patches in range(1, 71) for height in range(1, patches + 1) if patches % height == 0
]
VIDEO_GRIDS = [(1, 1, 1), (2, 3, 4), (4, 3, 2), (3, 1, 7), (5, 5, 2), (3, 3, 7), (4, 4, 4)]


def grid_of(num_patches, num_axes):
    """A grid as near to a cube as the number of patches allows."""
    if num_axes == 1:
        return [num_patches]
    sides = [side for side in range(1, num_patches + 1) if num_patches % side == 0]
    side = min(sides, key=lambda side: abs(side - num_patches ** (1 / num_axes)))
    return [side, *grid_of(num_patches // side, num_axes - 1)]


def config_at(name, num_tokens):
    """The mask's YAML, where needed with positions and a grid that ``num_tokens`` tokens have, and with few keys."""
    document = json.loads(sm.load_config(CONFIGS / f"{name}.yaml").to_json())
    kwargs = document["mask_kwargs"]
    if name in BY_CONTENT:
        document["mask_kwargs"] = VARIANTS[name][0]
    if name in ON_A_GRID:
        document |= {"num_prefix_tokens": 0, "grid": grid_of(num_tokens, 3 if name == "space_time" else 2)}
    if name == "neighborhood":
        kwargs["kernel_size"] = [min(5, side - 1 + side % 2) for side in document["grid"]]
    if name == "pruning":
        document["num_prefix_tokens"] = 0
        kwargs["keep_ratio"] = max(kwargs["keep_ratio"], 1 / num_tokens)
    if name == "vertical_slash":
        document["num_prefix_tokens"] = 0
        kwargs["vertical"] = [0, num_tokens // 2]
    return document


class Content(NamedTuple):
    """What a mask by content chooses from: whole numbers, so that scores are exact and ties are everywhere."""

    q: torch.Tensor
    k: torch.Tensor
    embeddings: torch.Tensor

    @classmethod
    def of(cls, num_tokens, dtype=torch.float64):
        shape = (BATCH, HEADS, num_tokens, 4)
        generator = torch.Generator().manual_seed(num_tokens)
        q, k = (torch.randint(-2, 3, shape, generator=generator).to(dtype) for _ in range(2))
        return cls(q, k, torch.randint(-9, 9, (BATCH, num_tokens, 6), generator=generator).to(dtype))


def masks_of(config, num_tokens, layer=0, content=None):
    """The mask; one per sample where it depends on the content."""
    if not sm.load_config(config).by_content:
        return [sm.Mask.from_config(config, num_tokens, HEADS, layer=layer, num_layers=LAYERS)]
    q, k, embeddings = Content.of(num_tokens) if content is None else content
    return sm.choose_masks(config, q, k, layer=layer, embeddings=embeddings)


def mask_at(name, num_tokens, layer=0):
    return masks_of(config_at(name, num_tokens), num_tokens, layer)[0]


def attention_at(name, num_tokens, layer=0):
    """Attention under the mask as a function of (q, k, v), and its dense form as a function of (q, k)."""
    config = config_at(name, num_tokens)
    if name not in BY_CONTENT:
        mask = mask_at(name, num_tokens, layer)
        return (lambda q, k, v: sm.sparse_attention(q, k, v, mask)), lambda q, k: mask.to_dense()
    layer_mask = LayerMask(sm.load_config(config), HEADS, layer, LAYERS)

    def dense(q, k):
        return torch.stack([mask.to_dense() for mask in sm.choose_masks(config, q.detach(), k.detach(), layer=layer)])

    return (lambda q, k, v: sm.functional.attend(q, k, v, layer_mask)[0]), dense


def by_definition(config, num_tokens, layer, content):
    """(B, H, N, N) bool from the predicate, B = 1 where samples share it; None where the mask does not exist."""
    name, kwargs = config["mask"], config["mask_kwargs"]
    prefix = config.get("num_prefix_tokens", default_prefix(name, kwargs))
    outside = 0 if name in ALL_TOKENS else prefix
    t_fastest = config.get("token_order") == "t_fastest"
    dense = config.get("prefix_dense", True)
    grid = tuple(config.get("grid") or ())
    size = Size(num_tokens - outside, HEADS, layer, LAYERS, prefix, dense, grid, t_fastest)
    if not exists(name, size, **kwargs):
        return None
    kwargs = {key: value for key, value in kwargs.items() if key not in ("seed",)}
    samples = BATCH if sm.load_config(config).by_content else 1
    masks = np.full((samples, HEADS, num_tokens, num_tokens), dense)
    queries, keys = np.arange(size.tokens)[:, None], np.arange(size.tokens)[None, :]
    for sample, head in itertools.product(range(samples), range(HEADS)):
        q, k, embeddings = (x.double().numpy()[sample] for x in content)
        here = size._replace(
            q=q[head, outside:] / math.sqrt(q.shape[-1]), k=k[head, outside:], embeddings=embeddings[outside:]
        )
        masks[sample, head, outside:, outside:] = PREDICATES[name](queries, keys, head, here, **kwargs)
    return masks


def check_definition(config, num_tokens, layer=0, dtype=torch.float64):
    content = Content.of(num_tokens, dtype)
    expected = by_definition(config, num_tokens, layer, content)
    if expected is None:
        with pytest.raises(sm.ConfigError):
            masks_of(config, num_tokens, layer, content)
    else:
        got = np.stack([mask.to_dense().numpy() for mask in masks_of(config, num_tokens, layer, content)])
        np.testing.assert_array_equal(got, expected, str((config, num_tokens, layer)))


@pytest.mark.parametrize("name", MASKS)
def test_every_mask_has_a_definition_to_compare_with(name):
    assert name in PREDICATES
    assert VARIANTS[name]


@pytest.mark.parametrize("name", [name for name in MASKS if name not in ON_A_GRID])
def test_every_mask_keeps_exactly_the_edges_of_its_definition(name):
    for index, kwargs in enumerate(VARIANTS[name]):
        for num_tokens in SIZES if index else range(1, 71):
            for layer in (0, 3):
                check_definition({"mask": name, "mask_kwargs": kwargs}, num_tokens, layer)


@pytest.mark.parametrize("name", sorted(ON_A_GRID))
def test_every_grid_mask_keeps_exactly_the_edges_of_its_definition(name):
    for index, kwargs in enumerate(VARIANTS[name]):
        document = {"mask": name, "mask_kwargs": kwargs}
        for grid in GRIDS if index == 0 else GRIDS[::17]:
            check_definition(document | {"grid": list(grid)}, math.prod(grid))
        for grid in VIDEO_GRIDS:
            for order in ("row_major", "t_fastest"):
                config = document | {"grid": list(grid), "token_order": order, "num_prefix_tokens": 2}
                check_definition(config, math.prod(grid) + 2)


@pytest.mark.parametrize("name", sorted(BY_CONTENT))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_keys_are_chosen_alike_in_every_dtype_that_holds_the_content_exactly(name, dtype):
    for kwargs in VARIANTS[name]:
        check_definition({"mask": name, "mask_kwargs": kwargs}, 33, dtype=dtype)


@pytest.mark.parametrize(("name", "grid", "kwargs"), ON_GRID)
def test_parameters_of_a_grid_mask_may_differ_by_axis(name, grid, kwargs):
    check_definition({"mask": name, "mask_kwargs": kwargs, "grid": grid}, math.prod(grid))
    inside = {"mask": name, "mask_kwargs": kwargs | {"grid": grid}}
    outside = {"mask": name, "mask_kwargs": kwargs, "grid": grid}
    masks = [sm.Mask.from_config(c, math.prod(grid), HEADS).to_dense() for c in (inside, outside)]
    assert torch.equal(*masks)


@pytest.mark.parametrize("name", MASKS)
@pytest.mark.parametrize("prefix", [0, 3])
@pytest.mark.parametrize("dense", [True, False])
def test_a_prefix_is_dense_or_left_to_the_mask(name, prefix, dense):
    for kwargs in VARIANTS[name]:
        if kwargs.get("add_class_token") is False or (name == "random" and not dense and kwargs.get("k")):
            continue
        config = {"mask": name, "mask_kwargs": kwargs, "num_prefix_tokens": prefix, "prefix_dense": dense}
        if name in ON_A_GRID:
            config["grid"] = [3, 2, 5] if name == "space_time" else [6, 5]
        check_definition(config, 30 + prefix, layer=1)


@pytest.mark.parametrize("name", MASKS)
def test_every_mask_has_a_yaml_of_its_own_name(name):
    assert sm.load_config(CONFIGS / f"{name}.yaml").mask == name


@pytest.mark.parametrize("path", YAMLS, ids=lambda path: path.stem)
def test_every_shipped_yaml_loads_round_trips_and_gives_a_mask_at_vit_size(path):
    config = sm.load_config(path)
    assert sm.load_config(config.to_yaml()) == config
    num_tokens = 197
    if config.grid is not None:
        num_tokens = math.prod(config.grid) + config.num_prefix_tokens
    if not config.uses_edges:
        return
    if config.by_content:
        masks = sm.choose_masks(path, *torch.randn(2, BATCH, 12, num_tokens, 8))
    else:
        masks = [sm.Mask.from_config(path, num_tokens=num_tokens, num_heads=12, num_layers=12)]
    assert all(nnz > 0 for mask in masks for nnz in mask.nnz_per_head)


@pytest.mark.parametrize("name", MASKS)
@pytest.mark.parametrize("num_tokens", [1, 9, 70])
def test_counts_lists_and_pictures_agree_with_the_dense_mask(name, num_tokens):
    mask = mask_at(name, num_tokens, layer=2)
    dense = mask.to_dense()
    assert dense.shape == (HEADS, num_tokens, num_tokens)
    assert mask.nnz == int(dense.sum())
    assert mask.density == pytest.approx(dense.float().mean().item())
    row_ptr, col = mask.to_csr()
    rebuilt = torch.zeros_like(dense)
    for head in range(HEADS):
        rows = torch.repeat_interleave(torch.arange(num_tokens), row_ptr[head].diff())
        rebuilt[head, rows, col[row_ptr[head, 0] : row_ptr[head, -1]]] = True
        assert mask.degrees(head).tolist() == dense[head].sum(-1).tolist()
    assert torch.equal(rebuilt, dense)


@pytest.mark.parametrize("name", MASKS)
@pytest.mark.parametrize("num_tokens", [1, 6, 65])
def test_forward_and_backward_equal_dense_masked_attention(name, num_tokens):
    attend, dense = attention_at(name, num_tokens, layer=1)
    generator = torch.Generator().manual_seed(num_tokens)
    q, k, v, g = (torch.randn(2, HEADS, num_tokens, 7, dtype=torch.float64, generator=generator) for _ in range(4))
    results = []
    for run in (attend, lambda *qkv: dense_attention(*qkv, dense(q, k))[0]):
        leaves = [x.clone().requires_grad_() for x in (q, k, v)]
        out = run(*leaves)
        results.append((out, *torch.autograd.grad(out, leaves, g)))
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)


@pytest.fixture
def force_kernel():
    yield _core.force_kernel
    _core.force_kernel(None)


@pytest.mark.parametrize("num_tokens", [33, 70])
@pytest.mark.parametrize("kernel", ["edges", "lines", "panels"])
@pytest.mark.parametrize("name", [name for name in MASKS if name not in BY_CONTENT])
def test_it_is_a_matter_of_time_alone_which_kernel_computes_a_mask(name, kernel, num_tokens, force_kernel):
    """Those that are not chosen too: a later choice, or a mask registered tomorrow, may want them."""
    mask = mask_at(name, num_tokens)
    q, k, v, grad_out = (torch.randn(BATCH, HEADS, num_tokens, 8, dtype=torch.float64) for _ in range(4))
    leaves = [x.requires_grad_() for x in (q, k, v)]
    expected = dense_attention(*leaves, mask.to_dense())[0]
    force_kernel(kernel)
    got = sm.sparse_attention(*leaves, mask)
    assert_same(got, expected, atol=1e-12, what="out")
    grads = (torch.autograd.grad(out, leaves, grad_out) for out in (got, expected))
    for name, mine, truth in zip(("dq", "dk", "dv"), *grads, strict=True):
        assert_same(mine, truth, atol=1e-11, what=name)


def test_the_kernel_that_is_forced_computes(force_kernel):
    """All three can compute a window, and round differently."""
    mask = sm.Mask.from_config({"mask": "local", "mask_kwargs": {"window": 3}}, 70, HEADS, head_dim=24)
    tensors = [torch.randn(BATCH, HEADS, 70, 24) for _ in range(3)]
    outs = {}
    for kernel in ("edges", "lines", "panels"):
        force_kernel(kernel)
        assert {head.kernel for head in mask.explain().heads} == {kernel}
        outs[kernel] = sm.sparse_attention(*tensors, mask)
    assert all(not torch.equal(outs[a], outs[b]) for a, b in itertools.combinations(outs, 2))
    with pytest.raises(ValueError, match=r"unknown kernel `fast`; .*edges, lines, panels"):
        force_kernel("fast")


@pytest.mark.parametrize("name", MASKS)
def test_derivatives_of_first_and_second_order_are_right(name):
    attend, _ = attention_at(name, 6, layer=1)
    inputs = [torch.randn(1, HEADS, 6, 1, dtype=torch.float64, requires_grad=True) for _ in range(3)]
    assert torch.autograd.gradcheck(attend, inputs)
    assert torch.autograd.gradgradcheck(attend, inputs, fast_mode=True)


@pytest.mark.parametrize("name", MASKS)
def test_the_operator_contract_holds(name):
    layer_mask = LayerMask(sm.load_config(config_at(name, 9)), HEADS, num_layers=LAYERS)
    q, k, v = (torch.randn(2, HEADS, 9, 5) for _ in range(3))
    edges = (layer_mask.spec,)
    forward, backward = torch.ops.sparse_mhsa.forward, torch.ops.sparse_mhsa.backward
    if layer_mask.by_content:
        torch.library.opcheck(torch.ops.sparse_mhsa.select_edges, (q, k, layer_mask.spec, None, None, None, 0.3))
        edges = edges_of(q, k, layer_mask, scale=0.3)[1:3]
        forward, backward = torch.ops.sparse_mhsa.forward_edges, torch.ops.sparse_mhsa.backward_edges
    arguments = (q, k, v, *edges, None, None, None, 0.0, 0.3)
    torch.library.opcheck(forward, arguments)
    out, lse = forward(*arguments)
    torch.library.opcheck(backward, (torch.randn_like(out), q, k, v, out, lse, *arguments[3:]))


@pytest.mark.parametrize("name", MASKS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_low_precision_errs_at_most_twice_as_much_as_dense_torch(name, dtype):
    attend, dense = attention_at(name, 65, layer=1)
    exact = [torch.randn(2, HEADS, 65, 16, dtype=dtype).double() for _ in range(4)]
    kept = dense(*(x.to(dtype) for x in exact[:2]))

    def run(attend, cast):
        leaves = [x.to(cast).requires_grad_() for x in exact[:3]]
        out = attend(*leaves)
        return [out, *torch.autograd.grad(out, leaves, exact[3].to(cast))]

    def torch_dense(q, k, v):
        return torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=kept)

    reference = run(torch_dense, torch.float64)
    baseline = run(torch_dense, dtype)
    ours = run(attend, dtype)
    for index, (ref, base, got) in enumerate(zip(reference, baseline, ours, strict=True)):
        allowed = (2 if index == 0 else 3) * (base.double() - ref).abs().max() + 1e-6 * ref.abs().max()
        assert (got.double() - ref).abs().max() <= allowed


@pytest.mark.parametrize("num_tokens", [65, 66, 67, 130, 195])
@pytest.mark.parametrize("head_dim", [8, 32])
def test_with_dropout_dense_rows_are_the_same_bit_for_bit_on_any_number_of_threads(head_dim, num_tokens):
    """Where the rows are cut into tasks, one to three may be left of a dense run."""
    results, before = [], torch.get_num_threads()
    tensors = [torch.randn(2, 12, num_tokens, head_dim) for _ in range(4)]
    try:
        for threads in (1, 2, 3, 4):
            torch.set_num_threads(threads)
            torch.manual_seed(0)
            *leaves, grad_out = (x.clone().requires_grad_() for x in tensors)
            out = sm.sparse_attention(*leaves, None, dropout_p=0.1)
            results.append([out.detach(), *torch.autograd.grad(out, leaves, grad_out)])
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        for name, mine, theirs in zip(("out", "dq", "dk", "dv"), results[0], other, strict=True):
            assert torch.equal(mine, theirs), name


@pytest.mark.parametrize("name", MASKS)
def test_results_are_the_same_bit_for_bit_on_any_number_of_threads(name):
    attend, _ = attention_at(name, 300, layer=1)
    q, k, v = (torch.randn(2, HEADS, 300, 24, requires_grad=True) for _ in range(3))
    before = torch.get_num_threads()
    results = []
    try:
        for threads in (1, 2, 3, 1):
            torch.set_num_threads(threads)
            out = attend(q, k, v)
            results.append((out, *torch.autograd.grad(out.square().sum(), (q, k, v))))
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@pytest.mark.parametrize("name", MASKS)
def test_masks_and_modules_survive_pickling_and_copying(name):
    mask = mask_at(name, 33, layer=1)
    for twin in (pickle.loads(pickle.dumps(mask)), copy.deepcopy(mask)):
        assert twin == mask
        assert torch.equal(twin.to_dense(), mask.to_dense())
    config = config_at(name, 33)
    module = sm.SparseMHSA(16, HEADS, batch_first=True, config=config, layer=1, num_layers=LAYERS)
    x = torch.randn(2, 33, 16)
    expected = module(x, x, x, need_weights=False)[0]
    for twin in (pickle.loads(pickle.dumps(module)), copy.deepcopy(module)):
        assert torch.equal(twin(x, x, x, need_weights=False)[0], expected)


# Parameters that keep few keys of a long sequence, so that this test of masks whose share is fixed stays quick.
SPARSE_AT_ANY_LENGTH = {
    "strided": {"stride": 4096},
    "pruning": {"keep_ratio": 1e-4},
    "strided_columns": {"stride": 4096},
    "space_time": {"kind": "tube", "radius": 1},
    "union": {"masks": [{"mask": "fibottention"}, {"mask": "strided_columns", "mask_kwargs": {"stride": 4096}}]},
}


@pytest.mark.parametrize("name", [name for name in MASKS if name != "none" and name not in BY_CONTENT])
def test_the_edges_of_a_long_sequence_are_counted_without_a_matrix(name):
    """A fixed share of 131,073 x 131,073 entries is a mask too: only a matrix of them would not fit."""
    num_tokens = 131_072 if name in ON_A_GRID else 131_073
    config = config_at(name, num_tokens)
    config["mask_kwargs"].update(SPARSE_AT_ANY_LENGTH.get(name, {}))
    mask = sm.Mask.from_config(config, num_tokens=num_tokens, num_heads=HEADS)
    assert 0 < mask.density < 1
    degrees = mask.degrees(0)
    assert len(degrees) == num_tokens
    assert int(degrees.sum()) == mask.nnz_per_head[0]
