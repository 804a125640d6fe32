"""Every registered mask, whatever it is: a new mask is covered here without a new test."""

import copy
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch

import sparse_mhsa as sm
from predicates import ALL_TOKENS, DEFAULT_PREFIX, PREDICATES, VARIANTS, Size
from sparse_mhsa import _core
from sparse_mhsa.reference import dense_attention

CONFIGS = Path(__file__).parents[1] / "configs" / "attention"
MASKS = [entry["name"] for entry in _core.registered_masks()]
YAMLS = sorted(CONFIGS.glob("*.yaml"))
HEADS, LAYERS = 4, 5
SIZES = [*range(1, 12), 17, 31, 32, 33, 50, 64, 65, 70]


def mask_of_yaml(name, num_tokens, layer=0):
    return sm.Mask.from_config(
        CONFIGS / f"{name}.yaml", num_tokens=num_tokens, num_heads=HEADS, layer=layer, num_layers=LAYERS
    )


def by_definition(name, kwargs, num_tokens, layer):
    """(H, N, N) bool, from the predicate."""
    prefix = 0 if kwargs.get("add_class_token") is False or name in ALL_TOKENS else DEFAULT_PREFIX.get(name, 0)
    size = Size(num_tokens - prefix, HEADS, layer, LAYERS)
    mask = np.ones((HEADS, num_tokens, num_tokens), dtype=bool)
    for head, i, j in np.ndindex(HEADS, size.tokens, size.tokens):
        mask[head, i + prefix, j + prefix] = PREDICATES[name](i, j, head, size, **kwargs)
    return mask


@pytest.mark.parametrize("name", MASKS)
def test_every_mask_keeps_exactly_the_edges_of_its_definition(name):
    if name not in PREDICATES:
        pytest.skip(f"tests/predicates.py has no definition of `{name}` to compare with")
    for kwargs in VARIANTS[name]:
        for num_tokens in SIZES:
            for layer in (0, 3):
                config = {"mask": name, "mask_kwargs": kwargs}
                size = {"num_tokens": num_tokens, "num_heads": HEADS, "layer": layer, "num_layers": LAYERS}
                got = sm.Mask.from_config(config, **size).to_dense().numpy()
                np.testing.assert_array_equal(got, by_definition(name, kwargs, num_tokens, layer), str((kwargs, size)))


@pytest.mark.parametrize("name", MASKS)
def test_every_mask_has_a_yaml_of_its_own_name(name):
    assert sm.load_config(CONFIGS / f"{name}.yaml").mask == name


@pytest.mark.parametrize("path", YAMLS, ids=lambda path: path.stem)
def test_every_shipped_yaml_loads_round_trips_and_gives_a_mask_at_vit_size(path):
    config = sm.load_config(path)
    assert sm.load_config(config.to_yaml()) == config
    mask = sm.Mask.from_config(path, num_tokens=197, num_heads=12, num_layers=12)
    assert all(nnz > 0 for nnz in mask.nnz_per_head)


@pytest.mark.parametrize("name", MASKS)
@pytest.mark.parametrize("num_tokens", [1, 9, 70])
def test_counts_lists_and_pictures_agree_with_the_dense_mask(name, num_tokens):
    mask = mask_of_yaml(name, num_tokens, layer=2)
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
    mask = mask_of_yaml(name, num_tokens, layer=1)
    generator = torch.Generator().manual_seed(num_tokens)
    q, k, v, g = (torch.randn(2, HEADS, num_tokens, 7, dtype=torch.float64, generator=generator) for _ in range(4))
    results = []
    for attend in (lambda *qkv: sm.sparse_attention(*qkv, mask), lambda *qkv: dense_attention(*qkv, mask.to_dense())):
        leaves = [x.clone().requires_grad_() for x in (q, k, v)]
        out = attend(*leaves)
        out = out[0] if isinstance(out, tuple) else out
        results.append((out, *torch.autograd.grad(out, leaves, g)))
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", MASKS)
def test_derivatives_of_first_and_second_order_are_right(name):
    mask = mask_of_yaml(name, 6, layer=1)
    inputs = [torch.randn(1, HEADS, 6, 1, dtype=torch.float64, requires_grad=True) for _ in range(3)]
    assert torch.autograd.gradcheck(lambda q, k, v: sm.sparse_attention(q, k, v, mask), inputs)
    assert torch.autograd.gradgradcheck(lambda q, k, v: sm.sparse_attention(q, k, v, mask), inputs)


@pytest.mark.parametrize("name", MASKS)
def test_the_operator_contract_holds(name):
    mask = mask_of_yaml(name, 9)
    q, k, v = (torch.randn(2, HEADS, 9, 5) for _ in range(3))
    arguments = (q, k, v, mask.spec, None, None, None, 0.0, 0.3)
    torch.library.opcheck(torch.ops.sparse_mhsa.forward, arguments)
    out, lse = torch.ops.sparse_mhsa.forward(*arguments)
    torch.library.opcheck(torch.ops.sparse_mhsa.backward, (torch.randn_like(out), q, k, v, out, lse, *arguments[3:]))


@pytest.mark.parametrize("name", MASKS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_low_precision_errs_at_most_twice_as_much_as_dense_torch(name, dtype):
    mask = mask_of_yaml(name, 65, layer=1)
    exact = [torch.randn(2, HEADS, 65, 16, dtype=dtype).double() for _ in range(4)]
    dense = mask.to_dense()

    def run(attend, cast):
        leaves = [x.to(cast).requires_grad_() for x in exact[:3]]
        out = attend(*leaves)
        return [out, *torch.autograd.grad(out, leaves, exact[3].to(cast))]

    def torch_dense(q, k, v):
        return torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=dense)

    reference = run(torch_dense, torch.float64)
    baseline = run(torch_dense, dtype)
    ours = run(lambda q, k, v: sm.sparse_attention(q, k, v, mask), dtype)
    for index, (ref, base, got) in enumerate(zip(reference, baseline, ours, strict=True)):
        allowed = (2 if index == 0 else 3) * (base.double() - ref).abs().max() + 1e-6 * ref.abs().max()
        assert (got.double() - ref).abs().max() <= allowed


@pytest.mark.parametrize("name", MASKS)
def test_results_are_the_same_bit_for_bit_on_any_number_of_threads(name):
    mask = mask_of_yaml(name, 300, layer=1)
    q, k, v = (torch.randn(2, HEADS, 300, 24, requires_grad=True) for _ in range(3))
    before = torch.get_num_threads()
    results = []
    try:
        for threads in (1, 2, 3, 1):
            torch.set_num_threads(threads)
            out = sm.sparse_attention(q, k, v, mask)
            results.append((out, *torch.autograd.grad(out.square().sum(), (q, k, v))))
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@pytest.mark.parametrize("name", MASKS)
def test_masks_and_modules_survive_pickling_and_copying(name):
    mask = mask_of_yaml(name, 33, layer=1)
    for twin in (pickle.loads(pickle.dumps(mask)), copy.deepcopy(mask)):
        assert twin == mask
        assert torch.equal(twin.to_dense(), mask.to_dense())
    module = sm.SparseMHSA(16, HEADS, batch_first=True, config=CONFIGS / f"{name}.yaml", layer=1, num_layers=LAYERS)
    x = torch.randn(2, 33, 16)
    expected = module(x, x, x, need_weights=False)[0]
    for twin in (pickle.loads(pickle.dumps(module)), copy.deepcopy(module)):
        assert torch.equal(twin(x, x, x, need_weights=False)[0], expected)


@pytest.mark.parametrize("name", [name for name in MASKS if name != "none"])
def test_the_edges_of_a_long_sequence_are_counted_without_a_matrix(name):
    """A fixed share of 131,073 x 131,073 entries is a mask too: only a matrix of them would not fit."""
    mask = mask_of_yaml(name, 131_073)
    assert 0 < mask.density < 1
    degrees = mask.degrees(0)
    assert len(degrees) == 131_073
    assert int(degrees.sum()) == mask.nnz_per_head[0]
