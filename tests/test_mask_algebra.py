"""Masks made from edges and from one another: set operations, converters, comparison, and attention over them."""

import copy
import os
import pickle
import subprocess
import sys
import textwrap

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import sparse_mhsa as sm
from comparison import assert_same, oracle_with_grads
from sparse_mhsa import block_mask
from sparse_mhsa.reference import dense_attention

pytestmark = pytest.mark.filterwarnings("ignore:Sparse CSR tensor support is in beta state")

N, HEADS = 33, 3


def config_masks(num_tokens=N, num_heads=HEADS):
    sizes = {"num_tokens": num_tokens, "num_heads": num_heads, "num_prefix_tokens": 1}
    return {
        "local": sm.masks.local(window=2, **sizes),
        "fibottention": sm.masks.fibottention(**sizes),
        "longformer": sm.masks.longformer(window=3, **sizes),
        "none": sm.masks.none(**sizes),
    }


def scattered(num_tokens=N, num_heads=HEADS, density=0.2, seed=0):
    """Irregular edges, with an empty row and a full one."""
    generator = torch.Generator().manual_seed(seed)
    dense = torch.rand(num_heads, num_tokens, num_tokens, generator=generator) < density
    dense[:, 3], dense[:, 5] = False, True
    return dense


def made_masks():
    masks = config_masks()
    local, fibo = masks["local"], masks["fibottention"]
    return {
        "union": local | fibo,
        "intersection": masks["longformer"] & fibo,
        "difference": fibo - local,
        "complement": ~fibo,
        "nested": (local | fibo) & ~masks["longformer"],
        "from_dense": sm.Mask.from_dense(scattered()),
        "from_csr": sm.Mask.from_csr(*fibo.to_csr()),
        "from_function": sm.Mask.from_function(lambda head, row: [row, (row + head + 1) % N], N, HEADS),
        "per_head": sm.Mask.per_head([local, fibo, sm.Mask.from_dense(scattered(num_heads=1)[0])]),
        "empty": local - local,
    }


MADE = made_masks()
each_mask = pytest.mark.parametrize("mask", MADE.values(), ids=MADE)


class TestOperations:
    @pytest.mark.parametrize("first", [*config_masks(), "scattered"])
    @pytest.mark.parametrize("second", [*config_masks(), "scattered"])
    def test_they_are_those_of_sets(self, first, second):
        masks = {**config_masks(), "scattered": sm.Mask.from_dense(scattered(), num_prefix_tokens=1)}
        a, b = masks[first], masks[second]
        x, y = a.to_dense(), b.to_dense()
        for got, expected in ((a | b, x | y), (a & b, x & y), (a - b, x & ~y), (~a, ~x)):
            assert torch.equal(got.to_dense(), expected), got.name
            assert got.nnz == expected.sum()
            assert got == sm.Mask.from_dense(expected, num_prefix_tokens=1)

    def test_a_mask_of_one_head_meets_every_head_of_another(self):
        shared = sm.masks.local(num_tokens=N, num_heads=1, window=2)
        fibo = sm.masks.fibottention(num_tokens=N, num_heads=HEADS)
        for got in (shared | fibo, fibo | shared):
            assert got.num_heads == HEADS
            assert torch.equal(got.to_dense(), shared.to_dense() | fibo.to_dense())

    def test_other_sizes_and_other_things_are_refused(self):
        local = config_masks()["local"]
        with pytest.raises(ValueError, match="expected the same number of tokens, got 33 and 34"):
            local | config_masks(num_tokens=34)["local"]
        with pytest.raises(ValueError, match="expected the same number of heads, or one, got 3 and 4"):
            local & config_masks(num_heads=4)["local"]
        with pytest.raises(TypeError, match=r"expected a sparse_mhsa.Mask, got Tensor"):
            local - local.to_dense()

    def test_options_that_disagree_or_cannot_be_kept_are_refused(self):
        config = {"mask": "local", "mask_kwargs": {"window": 1}}
        plain = sm.Mask.from_config(config, N, 1)
        scaled = sm.Mask.from_config({**config, "scale": 0.5}, N, 1)
        strict = sm.Mask.from_config({**config, "on_empty_row": "error"}, N, 1)
        zero = sm.Mask.from_config({**config, "masked_logits": "zero"}, N, 1)
        with pytest.raises(ValueError, match=r"scale: expected the same in every mask, got None and 0.5"):
            plain | scaled
        with pytest.raises(ValueError, match="on_empty_row: expected the same in every mask, got zero and error"):
            plain | strict
        with pytest.raises(ValueError, match="masked_logits: `local` has `zero`"):
            _ = ~zero
        assert (~scaled).scale == 0.5
        assert (strict - strict).on_empty_row == "error"

    def test_regular_masks_over_many_tokens_stay_segments(self):
        n = 1_000_000
        a = sm.masks.local(num_tokens=n, num_heads=1, window=3, num_prefix_tokens=1)
        b = sm.masks.local(num_tokens=n, num_heads=1, window=9, dilation=3, num_prefix_tokens=1)
        union = a | b
        assert union.nnz == a.nnz + b.nnz - (a & b).nnz
        assert union.explain().bytes < 10_000
        assert (~a).nnz == n * n - a.nnz


class TestFromDense:
    def test_one_mask_for_all_heads_or_one_for_each(self):
        dense = scattered()
        assert torch.equal(sm.Mask.from_dense(dense).to_dense(), dense)
        assert torch.equal(sm.Mask.from_dense(dense.numpy()).to_dense(), dense)
        assert torch.equal(sm.Mask.from_dense(dense[0], num_heads=2).to_dense(), dense[:1].expand(2, N, N))
        strided = scattered(num_tokens=2 * N)[:, ::2, 1::2].transpose(1, 2)
        assert torch.equal(sm.Mask.from_dense(strided).to_dense(), strided)

    @pytest.mark.parametrize("n", [0, 1, 2])
    def test_few_tokens(self, n):
        mask = sm.Mask.from_dense(torch.ones(2, n, n, dtype=torch.bool))
        assert (mask.num_tokens, mask.nnz) == (n, 2 * n * n)
        assert mask == ~~mask

    @pytest.mark.parametrize(
        ("dense", "error", "message"),
        [
            (torch.ones(4, 4), TypeError, r"dense: expected dtype bool \(True = keep\), got float32"),
            (torch.ones(4, 5, dtype=torch.bool), ValueError, r"dense: expected shape \(N, N\) .*, got \(4, 5\)"),
            (torch.ones(4, dtype=torch.bool), ValueError, "dense: expected shape"),
            (torch.ones(0, 4, 4, dtype=torch.bool), ValueError, "dense: expected shape"),
            (torch.ones(2, 2, 4, 4, dtype=torch.bool), ValueError, "dense: expected shape"),
            (
                torch.ones(4, 4, dtype=torch.bool, device="meta"),
                TypeError,
                "dense: expected a dense tensor with values",
            ),
            (torch.ones(4, 4, dtype=torch.bool).to_sparse(), TypeError, "dense: expected a dense tensor with values"),
            ([[True, False], [True]], TypeError, "dense: expected an array"),
        ],
    )
    def test_what_is_no_dense_mask_is_refused(self, dense, error, message):
        with pytest.raises(error, match=message):
            sm.Mask.from_dense(dense)

    def test_heads_and_prefix_must_fit(self):
        with pytest.raises(ValueError, match="num_heads: expected 3, the heads that the edges are for, got 2"):
            sm.Mask.from_dense(scattered(), num_heads=2)
        with pytest.raises(ValueError, match="num_prefix_tokens: expected 0 to 33, got 34"):
            sm.Mask.from_dense(scattered(), num_prefix_tokens=34)

    def test_bands_are_recognised_and_held_as_diagonals(self):
        mask = config_masks(num_tokens=200)["fibottention"]
        again = sm.Mask.from_dense(mask.to_dense(), num_prefix_tokens=1)
        assert again == mask
        assert [head.runs for head in again.explain().heads] == [0, 0, 0]


BROKEN_TENSORS = [
    (torch.sparse_csr, ([0, 5, 2, 2, 2, 2, 2], [1, 2]), (6, 6)),
    (torch.sparse_csr, ([0, 2, 4, 6, 8, 10, 40], [0] * 10), (6, 6)),
    (torch.sparse_csr, ([0, -5, 2, 2, 2, 2, 2], [1, 2]), (6, 6)),
    (torch.sparse_csr, ([1, 1, 2, 2, 2, 2, 2], [1, 2]), (6, 6)),
    (torch.sparse_csr, ([0, 1, 1, 1, 1, 1, 1], [1, 2]), (6, 6)),
    (torch.sparse_csr, ([0, 0, 0, 0, 0, 0, 0, 0, 1], [1]), (6, 6)),
    (torch.sparse_csc, ([0, 2, 4, 6, 8, 10, 40], [0] * 10), (6, 6)),
    (torch.sparse_csc, ([0, 1, 1, 1, 1, 1, 1], [9]), (6, 6)),
    (torch.sparse_bsr, ([0, 1, 2, 50], [0, 1, 2]), (6, 6)),
    (torch.sparse_coo, [[0], [6], [1]], (2, 6, 6)),
    (torch.sparse_coo, [[1], [-1], [1]], (2, 6, 6)),
    (torch.sparse_coo, [[9], [1]], (6, 6)),
]


def unchecked(layout, indices, size):
    """A tensor as torch makes it without looking at its indices, which is what it does by default."""
    if layout == torch.sparse_coo:
        return torch.sparse_coo_tensor(indices, torch.ones(len(indices[0])), size, check_invariants=False)
    pointers, plain = map(torch.tensor, indices)
    values = torch.ones(len(plain), 2, 2) if layout == torch.sparse_bsr else torch.ones(len(plain))
    return torch.sparse_compressed_tensor(pointers, plain, values, size, layout=layout, check_invariants=False)


class TestFromCsr:
    def test_it_reads_what_to_csr_writes(self):
        for mask in MADE.values():
            assert sm.Mask.from_csr(*mask.to_csr(), num_prefix_tokens=mask.num_prefix_tokens) == mask

    def test_shared_rows_and_any_integer_dtype(self):
        row_ptr, col = torch.tensor([0, 1, 1, 3], dtype=torch.int32), np.array([2, 0, 1], dtype=np.uint8)
        mask = sm.Mask.from_csr(row_ptr, col, num_heads=4)
        assert mask.num_heads == 4
        assert mask.to_dense()[3].tolist() == [[False, False, True], [False] * 3, [True, True, False]]

    def test_torch_and_scipy_and_back(self):
        sparse = pytest.importorskip("scipy.sparse")
        mask = MADE["from_dense"]
        for head in range(HEADS):
            dense = mask.to_dense()[head]
            csr = mask.to_torch_sparse(head)
            assert (csr.layout, csr.dtype) == (torch.sparse_csr, torch.float32)
            assert torch.equal(csr.to_dense() > 0, dense)
            assert torch.equal(sm.Mask.from_csr(csr).to_dense()[0], dense)
            matrix = mask.to_scipy(head)
            assert np.array_equal(matrix.toarray(), dense.numpy())
            assert torch.equal(sm.Mask.from_csr(matrix).to_dense()[0], dense)
            unsorted = sparse.coo_matrix(dense.numpy()[::-1])
            assert torch.equal(sm.Mask.from_csr(unsorted).to_dense()[0], dense.flip(0))

    @pytest.mark.filterwarnings("ignore:Sparse (CSR|CSC|BSR|BSC) tensor support is in beta state")
    @pytest.mark.parametrize("layout", [torch.sparse_coo, torch.sparse_csr, torch.sparse_csc])
    def test_a_batch_of_torch_sparse_is_one_mask_per_head(self, layout):
        dense = torch.stack([torch.eye(5), torch.eye(5).flip(0)])
        mask = sm.Mask.from_csr(dense.to_sparse(layout=layout))
        assert torch.equal(mask.to_dense(), dense > 0)

    def test_heads_of_a_sparse_tensor_may_keep_different_numbers_of_keys(self):
        dense = torch.stack([torch.eye(5), torch.zeros(5, 5), torch.ones(5, 5)])
        assert torch.equal(sm.Mask.from_csr(dense.to_sparse_coo()).to_dense(), dense > 0)

    @pytest.mark.parametrize(
        ("row_ptr", "col", "error", "message"),
        [
            ([0, 1, 2], [0, 2], ValueError, "col: expected a key index from 0 to 1, got 2 in row 1"),
            ([0, 1, 2], [0, -1], ValueError, "got -1 in row 1"),
            ([0, 2, 2], [1, 1], ValueError, "ascend strictly within a row, got 1 after 1"),
            ([0, 2, 2], [1, 0], ValueError, "ascend strictly within a row, got 0 after 1"),
            ([0, 2, 1], [0, 1], ValueError, "row_ptr"),
            ([1, 1, 2], [0, 1], ValueError, "row_ptr"),
            ([0, 1, 3], [0, 1], ValueError, "row_ptr"),
            ([0, 1, 2**62], [0, 1], ValueError, "row_ptr"),
            ([-(2**62), 1, 2], [0, 1], ValueError, "row_ptr"),
            ([[0, 1, 2], [3, 3, 3]], [0, 1, 0], ValueError, "row_ptr: edge set 1 must start at 2"),
            ([0.0, 1.0], [0], TypeError, "row_ptr: expected integers, got dtype float64"),
            ([0, 1], [0.5], TypeError, "col: expected integers, got dtype float64"),
            ([True, True], [0], TypeError, "row_ptr: expected integers, got dtype bool"),
            ([[[0]]], [], ValueError, r"row_ptr: expected shape \(N \+ 1,\) or \(H, N \+ 1\)"),
            ([[]], [], ValueError, r"row_ptr: expected N \+ 1 entries"),
            ([0, 1], [[0]], ValueError, "col: expected one dimension"),
            (np.array([0, 2**63 + 1], dtype=np.uint64), [0], ValueError, r"expected numbers below 2\*\*63"),
            ([[0, 1], [0]], [0], TypeError, "row_ptr: expected an array"),
            ([0, 1], None, TypeError, "without `col`, expected a sparse torch tensor or a scipy sparse matrix"),
        ],
    )
    def test_malformed_lists_are_refused_by_name(self, row_ptr, col, error, message):
        with pytest.raises(error, match=message):
            sm.Mask.from_csr(row_ptr, col)

    @pytest.mark.filterwarnings("ignore:Sparse (CSR|CSC|BSR|BSC) tensor support is in beta state")
    @pytest.mark.parametrize("broken", BROKEN_TENSORS)
    def test_indices_of_sparse_tensors_are_looked_at_before_anything_is_read(self, broken):
        layout, indices, size = broken
        with pytest.raises(ValueError, match="row_ptr: "):
            sm.Mask.from_csr(unchecked(layout, indices, size))

    def test_zeros_that_are_stored_are_edges(self):
        sparse = pytest.importorskip("scipy.sparse")
        for layout in ("csr", "csc", "coo", "bsr", "dia", "lil"):
            matrix = sparse.eye_array(4, format=layout)
            matrix.data[0] = 0 if layout != "lil" else [0.0]
            assert sm.Mask.from_csr(matrix).nnz == 4, layout

    def test_indices_of_scipy_matrices_are_looked_at_before_anything_is_read(self):
        sparse = pytest.importorskip("scipy.sparse")
        rows = sparse.csr_matrix((np.ones(2), np.array([1, 2]), np.array([0, 500, 2])), shape=(2, 2))
        columns, pairs = sparse.csc_matrix(np.eye(6)), sparse.coo_matrix(np.eye(6))
        columns.indices[1] = pairs.row[1] = 90_000_000
        for matrix in (rows, columns, pairs):
            with pytest.raises(ValueError):  # noqa: PT011  in the words of scipy
                sm.Mask.from_csr(matrix)

    @pytest.mark.parametrize("shape", [(0, 0), (2, 0, 0)])
    def test_a_sparse_tensor_may_have_no_tokens(self, shape):
        assert sm.Mask.from_csr(torch.zeros(shape).to_sparse()).to_dense().shape[-2:] == (0, 0)

    def test_a_sparse_tensor_must_have_heads_and_values(self):
        with pytest.raises(ValueError, match=r"row_ptr: expected shape .*, got \(0, 7\)"):
            sm.Mask.from_csr(torch.zeros(0, 6, 6).to_sparse())
        nested = torch.nested.nested_tensor([torch.rand(2, 3)], layout=torch.jagged)
        with pytest.raises(TypeError, match="row_ptr: without `col`, expected a sparse torch tensor"):
            sm.Mask.from_csr(nested)

    def test_a_sparse_tensor_must_be_square(self):
        with pytest.raises(ValueError, match=r"expected a sparse tensor of \(N, N\) or \(H, N, N\), got \(2, 3\)"):
            sm.Mask.from_csr(torch.ones(2, 3).to_sparse_csr())


def few_keys(k, num_tokens, num_heads, seed=0):
    return sm.masks.random(num_tokens=num_tokens, num_heads=num_heads, k=k, seed=seed)


def captured(made):
    """The tensors that a `BlockMask` needs beside its lists of blocks."""
    held = (cell.cell_contents for cell in made.mask_mod.__closure__)
    return [value for value in held if isinstance(value, torch.Tensor)]


def held_by(made):
    return sum(tensor.untyped_storage().nbytes() for tensor in captured(made))


class TestBlockMask:
    @each_mask
    @pytest.mark.parametrize("block_size", [8, 20, 128])
    def test_it_keeps_the_same_pairs_and_no_block_too_many(self, mask, block_size):
        made = mask.to_block_mask(block_size)
        heads = mask.num_heads
        dense = mask.to_dense()
        at = [torch.arange(side) for side in (heads, N, N)]
        head, query, key = torch.meshgrid(*at, indexing="ij")
        kept = made.mask_mod(torch.zeros_like(head), head, query, key)
        assert torch.equal(kept, dense)
        side = -(-N // block_size)
        padded = torch.nn.functional.pad(dense, (0, side * block_size - N) * 2)
        blocks = padded.unflatten(2, (side, block_size)).unflatten(1, (side, block_size)).sum((2, 4))
        assert torch.equal(made.to_dense()[0].bool(), blocks > 0)
        full = torch.zeros(heads, side, side + 1, dtype=torch.bool)
        for row in (blocks == block_size**2).nonzero():
            full[tuple(row)] = True
        assert torch.equal(made.full_kv_num_blocks[0], full.sum(-1, dtype=torch.int32))

    @pytest.mark.filterwarnings("ignore")
    def test_flex_attention_over_it_is_ours(self):
        from torch.nn.attention.flex_attention import flex_attention

        q, k, v, _ = inputs(MADE["nested"])
        for name in ("nested", "from_dense", "complement"):
            got = flex_attention(q, k, v, block_mask=MADE[name].to_block_mask(16))
            assert_same(got, sm.sparse_attention(q, k, v, MADE[name]), rtol=1e-10, atol=1e-12)

    def test_many_tokens(self):
        mask = sm.masks.local(num_tokens=20_000, num_heads=1, window=64)
        assert mask.to_block_mask().kv_num_blocks.max() == 3

    @pytest.mark.parametrize("tokens", [2048, 16_384])
    @pytest.mark.parametrize(
        ("name", "options", "bytes_per_edge"), [("fibottention", {}, 10), ("random", {"k": 2}, 288)]
    )
    def test_memory_grows_with_the_edges_and_not_with_all_pairs(self, name, options, bytes_per_edge, tokens):
        mask = getattr(sm.masks, name)(num_tokens=tokens, num_heads=3, **options)
        blocks = 4 * 3 * (tokens // 128) ** 2  # a number for each
        room = 9 / 8  # so that masks that differ a little are compiled once
        assert held_by(mask.to_block_mask()) <= room * bytes_per_edge * mask.nnz + blocks

    def test_it_is_never_more_than_the_bits_of_all_pairs_and_an_eighth(self):
        mask = few_keys(256, 2048, 3)
        assert mask.to_block_mask().kv_num_blocks.sum() == 3 * 16**2
        assert held_by(mask.to_block_mask()) <= 9 / 8 * 9 / 8 * 3 * 2048**2 / 8

    def test_heads_that_share_edges_share_their_bits(self):
        one, eight = (
            held_by(sm.masks.local(num_tokens=2048, num_heads=heads, window=3).to_block_mask()) for heads in (1, 8)
        )
        assert eight == one + 7 * 4 * (2048 // 128) ** 2  # beside the bits, a number per pair of blocks

    def test_full_blocks_and_tiles_take_no_bits(self):
        nothing_and_everything = 2 * (64 * 4 + 32)
        none = sm.masks.none(num_tokens=2048, num_heads=1).to_block_mask()
        assert held_by(none) == 4 * 16**2 + nothing_and_everything
        # All that is left of the blocks of 128 is full tiles and empty ones.
        halves = sm.masks.block(num_tokens=2048, num_heads=1, block_size=64).to_block_mask()
        assert held_by(halves) == 4 * 16**2 + nothing_and_everything + 16 * 64 * 4

        # Nor do blocks that are smaller than a tile.
        small = sm.masks.none(num_tokens=64, num_heads=1).to_block_mask(8)
        assert held_by(small) == 4 * 8**2 + 2 * (4 + 32)

    def test_many_edges_are_looked_at_a_strip_at_a_time(self, monkeypatch):
        looked_at = []

        def seen(rows, *others, of=block_mask._blocks_and_tiles):
            looked_at.append(rows)
            return of(rows, *others)

        monkeypatch.setattr(block_mask, "_blocks_and_tiles", seen)
        monkeypatch.setattr(block_mask, "_MOST_EDGES", 200)
        mask = sm.masks.local(num_tokens=N, num_heads=1, window=2)
        self.test_it_keeps_the_same_pairs_and_no_block_too_many(mask, 8)
        assert [len(rows) for rows in looked_at] == [mask.nnz]
        looked_at.clear()
        monkeypatch.setattr(block_mask, "_MOST_EDGES", 80)  # of at most 40 per row of blocks
        self.test_it_keeps_the_same_pairs_and_no_block_too_many(mask, 8)
        assert [rows.unique().tolist() for rows in looked_at] == [[*range(16)], [*range(16, 32)], [32]]

    def test_masks_that_differ_a_little_share_kernels(self):
        masks = [few_keys(1, 2048, 3, seed) for seed in range(6)]
        made = [mask.to_block_mask() for mask in masks]
        assert len({int(each.kv_num_blocks.sum()) for each in made}) > 1
        # Two kernels where the masks are to both sides of a length.
        assert len({tuple(x.shape for x in captured(each)) for each in made}) <= 2

    @pytest.mark.slow
    @pytest.mark.filterwarnings("ignore")
    def test_one_compiled_function_takes_masks_of_several_lengths(self):
        """By itself, torch makes its second kernel for any length, and that does not compile on the CPU."""
        from torch.nn.attention.flex_attention import flex_attention

        compiled = torch.compile(flex_attention)
        for tokens in (140, 197):
            mask = sm.masks.fibottention(num_tokens=tokens, num_heads=2)
            q, k, v = (torch.randn(1, 2, tokens, 16) for _ in range(3))
            with torch.no_grad():
                got = compiled(q, k, v, block_mask=mask.to_block_mask())
            assert_same(got, sm.sparse_attention(q, k, v, mask), rtol=1e-4, atol=1e-5)

    def test_sizes(self):
        with pytest.raises(ValueError, match="block_size: expected at least 1, got 0"):
            MADE["union"].to_block_mask(0)
        with pytest.raises(ValueError, match="expected at least one token"):
            sm.masks.none(num_tokens=0, num_heads=1).to_block_mask()

    def test_weights_of_masked_pairs_would_be_lost(self):
        config = {"mask": "strided", "mask_kwargs": {"stride": 2}, "masked_logits": "zero"}
        with pytest.raises(ValueError, match="masked_logits: `strided` has `zero`, which a BlockMask cannot keep"):
            sm.Mask.from_config(config, num_tokens=4, num_heads=1).to_block_mask()


class TestFromFunction:
    def test_bools_and_indices_in_any_order_mean_the_same(self):
        dense = scattered()
        bools = sm.Mask.from_function(lambda head, row: dense[head, row], N, HEADS)
        indices = sm.Mask.from_function(lambda head, row: dense[head, row].nonzero()[:, 0].flip(0), N, HEADS)
        assert bools == indices == sm.Mask.from_dense(dense)

    def test_keys_may_come_one_by_one(self):
        expected = sm.Mask.from_function(lambda head, row: [0, row] if row else [0], 5, 1)
        for keys in (set, dict.fromkeys, lambda keys: (key for key in sorted(set(keys))), lambda keys: iter(set(keys))):
            assert sm.Mask.from_function(lambda head, row, keys=keys: keys([row, 0]), 5, 1) == expected
        bools = sm.Mask.from_function(lambda head, row: (col <= row for col in range(5)), 5, 1)
        assert torch.equal(bools.to_dense()[0], torch.ones(5, 5).tril() > 0)

    def test_it_asks_once_per_head_and_query(self):
        asked = []
        sm.Mask.from_function(lambda head, row: asked.append((head, row)) or [row], 4, 2)
        assert asked == [(head, row) for head in range(2) for row in range(4)]

    def test_no_tokens(self):
        assert sm.Mask.from_function(lambda head, row: [0], 0, 2).nnz == 0

    @pytest.mark.parametrize(
        ("row", "error", "message"),
        [
            ([4], ValueError, "row 0 of head 0: expected key indices from 0 to 3, got 4"),
            ([-1, 2], ValueError, "expected key indices from 0 to 3, got -1"),
            ([1, 2, 1], ValueError, "expected every key index once, got 1 twice"),
            ([0.5], TypeError, "expected integers, got dtype float64"),
            ([True, False], ValueError, r"expected 4 bools, got shape \(2,\)"),
            ([[0, 1]], ValueError, r"in one dimension, got shape \(1, 2\)"),
            (None, TypeError, "expected integers, got dtype object"),
            ("keys", TypeError, "expected integers"),
            (torch.zeros(4, dtype=torch.bool, device="meta"), TypeError, "expected a dense tensor with values"),
        ],
    )
    def test_rows_that_are_no_keys_are_refused_by_place(self, row, error, message):
        with pytest.raises(error, match=message):
            sm.Mask.from_function(lambda *_: row, 4, 1)

    def test_what_it_raises_comes_through(self):
        with pytest.raises(ZeroDivisionError):
            sm.Mask.from_function(lambda head, row: [1 // 0], 4, 1)


class TestPerHead:
    def test_each_head_takes_its_own(self):
        masks = config_masks()
        one = sm.masks.local(num_tokens=N, num_heads=1, window=5, num_prefix_tokens=1)
        mask = sm.Mask.per_head([masks["fibottention"], one, masks["longformer"]])
        sources = (masks["fibottention"], one, masks["longformer"])
        expected = [source.to_dense()[head if source.num_heads > 1 else 0] for head, source in enumerate(sources)]
        assert torch.equal(mask.to_dense(), torch.stack(expected))
        assert mask.num_prefix_tokens == 1

    def test_heads_and_tokens_must_fit(self):
        masks = config_masks()
        with pytest.raises(ValueError, match="expected 1 or 2 heads in mask 0, got 3"):
            sm.Mask.per_head([masks["local"]] * 2)
        with pytest.raises(ValueError, match="expected 1 head in mask 0, got 3"):
            sm.Mask.per_head([masks["local"]])
        with pytest.raises(ValueError, match="expected at least one"):
            sm.Mask.per_head([])
        with pytest.raises(ValueError, match="expected 33 tokens in each, got 9"):
            sm.Mask.per_head([sm.masks.none(num_tokens=n, num_heads=1) for n in (33, 9)])


class TestValue:
    @each_mask
    def test_counts_are_those_of_the_dense_mask(self, mask):
        dense = mask.to_dense()
        assert mask.nnz_per_head == dense.sum((1, 2)).tolist()
        for head in range(HEADS):
            assert torch.equal(mask.degrees(head), dense[head].sum(-1))
        assert mask.num_empty_rows == tuple((~dense.any(-1)).sum(-1).tolist())
        prefix = mask.num_prefix_tokens
        assert mask.nnz_patches == dense[:, prefix:, prefix:].sum()

    @each_mask
    def test_pickle_copy_hash_and_equality(self, mask):
        for twin in (pickle.loads(pickle.dumps(mask)), copy.deepcopy(mask), copy.copy(mask)):
            assert twin == mask
            assert hash(twin) == hash(mask)
            assert (twin.name, twin.num_prefix_tokens, twin.nnz_per_head) == (
                mask.name,
                mask.num_prefix_tokens,
                mask.nnz_per_head,
            )
        changed = mask.to_dense()
        changed[0, 2, 7] ^= True
        assert mask != sm.Mask.from_dense(changed, num_prefix_tokens=mask.num_prefix_tokens)
        assert mask != sm.Mask.from_dense(mask.to_dense(), num_prefix_tokens=mask.num_prefix_tokens + 1)

    def test_equal_edges_make_equal_masks_however_they_are_held(self):
        fibo = config_masks()["fibottention"]
        again = sm.Mask.from_dense(fibo.to_dense(), num_prefix_tokens=1)
        assert fibo == again == (fibo | fibo)
        assert len({fibo, again, fibo & fibo}) == 1

    def test_pickles_of_regular_masks_do_not_grow_with_the_tokens(self):
        size = {n: len(pickle.dumps(config_masks(n)["local"] | config_masks(n)["fibottention"])) for n in (100, 9000)}
        assert size[9000] < 4 * size[100]

    @each_mask
    def test_explanation_and_pictures(self, mask):
        explanation = mask.explain(head_dim=8)
        assert explanation.edges == mask.nnz
        for head in explanation.heads:
            assert head.edges == head.edges_in_dense + head.edges_on_diagonals + head.edges_in_runs
            assert head.gmacs == pytest.approx(2 * 8 * head.edges / 1e9)
            assert str(head.edges) in str(explanation)
        assert mask.name in str(explanation)
        assert "<table>" in explanation._repr_html_()
        assert mask._repr_html_().startswith("<table>")
        assert mask.name in repr(mask)

    def test_an_explanation_says_which_heads_share_their_memory(self):
        shared = sm.masks.local(window=1, num_tokens=9, num_heads=3).explain()
        assert [head.shared_with for head in shared.heads] == [None, 0, 0]
        assert shared.bytes == shared.heads[0].bytes
        own = sm.masks.fibottention(num_tokens=20, num_heads=3).explain()
        assert [head.shared_with for head in own.heads] == [None] * 3
        assert own.bytes == sum(head.bytes for head in own.heads)
        assert [line.split()[-1] for line in str(shared).splitlines()[2:]] == ["-", "0", "0"]

    def test_an_explanation_names_the_kernel_and_the_time_it_predicts(self):
        shape = {"num_tokens": 1024, "num_heads": 1}
        window, scattered = sm.masks.local(window=64, **shape), sm.masks.vertical_slash(slash=[3, 55, 233], **shape)
        (of_window,), (of_scattered,) = window.explain(64).heads, scattered.explain(64).heads
        assert (of_window.kernel, of_scattered.kernel) == ("panels", "lines")
        assert window.explain(128).heads[0].predicted_seconds > of_window.predicted_seconds > 0
        assert of_window.predicted_seconds / of_window.edges < of_scattered.predicted_seconds / of_scattered.edges
        assert "panels" in str(window.explain(64))
        assert "kernel" not in str(window.explain())

    def test_it_says_which_calls_are_handed_over(self):
        none = sm.masks.none(num_tokens=9, num_heads=1).explain()
        assert none.handed_over is not None
        assert none.handed_over in str(none)
        assert none.handed_over in none._repr_html_()
        assert sm.masks.local(num_tokens=9, num_heads=1, window=9).explain().handed_over is None

    def test_overlap_is_the_jaccard_index(self):
        for mask in MADE.values():
            dense = mask.to_dense()
            both = (dense[:, None] & dense).sum((2, 3)).double()
            either = (dense[:, None] | dense).sum((2, 3)).double()
            expected = torch.where(either == 0, 1.0, both / either.clamp(min=1))
            assert_same(mask.overlap(), expected, rtol=1e-15)

    @pytest.mark.parametrize(
        "of_head",
        [sm.Mask.degrees, sm.Mask.density_image, sm.Mask.to_scipy, sm.Mask.to_torch_sparse, lambda m, h: m.keys(h, 0)],
    )
    def test_a_head_that_is_not_there_is_named(self, of_head):
        for head in (HEADS, -1, 2**70):
            with pytest.raises(ValueError, match=f"head: expected (0 to {HEADS - 1}|at most .*), got {head}"):
                of_head(MADE["union"], head)
        with pytest.raises(TypeError, match="head: expected an integer, got str 'a'"):
            of_head(MADE["union"], "a")

    def test_the_head_dimension_must_be_positive(self):
        with pytest.raises(ValueError, match="head_dim: expected at least 1, got 0"):
            MADE["union"].flops(0)
        with pytest.raises(ValueError, match="head_dim: expected at least 1, got 0"):
            MADE["union"].explain(0)


def inputs(mask, dim=4, batch=2):
    shape = (batch, mask.num_heads, mask.num_tokens, dim)
    return [torch.randn(shape, dtype=torch.float64) for _ in range(4)]


TOO_LARGE = {
    "lists": "sm.masks.none(num_tokens=4_000_000_000, num_heads=1).to_csr()",
    "a dense matrix": "sm.masks.none(num_tokens=4_000_000_000, num_heads=1).to_dense()",
    "a sparse tensor": "sm.masks.none(num_tokens=4_000_000_000, num_heads=1).to_torch_sparse(0)",
    "degrees": "sm.masks.none(num_tokens=4_000_000_000, num_heads=1).degrees(0)",
    "a complement": "~sm.masks.local(num_tokens=4_000_000_000, num_heads=1, window=1)",
    "the runs of a complement": "~sm.masks.local(num_tokens=20_000_000, num_heads=1, window=1)",
    "rows": "sm.masks.random(num_tokens=400_000_000, num_heads=1, k=3, seed=0)",
    "a grid": "sm.masks.axial(num_tokens=400_000_000, num_heads=1, grid=[20_000, 20_000])",
    "diagonals": "sm.masks.strided(num_tokens=400_000_000, num_heads=1, stride=2)",
    "a wide band": "sm.masks.local(num_tokens=400_000_000, num_heads=1, window=100_000_000)",
}


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="limits the address space by Linux's means")
def test_what_does_not_fit_in_memory_is_an_error_and_no_abort():
    """With 1 GiB more of address space than the process has, a failed allocation aborts unless it is asked for."""
    code = f"""
        import resource, sparse_mhsa as sm
        from pathlib import Path
        pages = int(Path("/proc/self/statm").read_text().split()[0])
        limit = pages * resource.getpagesize() + (1 << 30)
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
        for what, expression in {TOO_LARGE!r}.items():
            try:
                eval(expression)
            except ValueError as error:
                assert "fit in memory" in str(error), (what, error)
            else:
                raise SystemExit(f"{{what}}: no error")
        mask = sm.masks.none(num_tokens=4_000_000_000, num_heads=1)
        local = sm.masks.local(num_tokens=4_000_000_000, num_heads=1, window=1)
        assert (~mask).nnz == 0 and (mask & local).nnz == local.nnz
    """
    environment = {**os.environ, "RUST_BACKTRACE": "0"}
    subprocess.run([sys.executable, "-c", textwrap.dedent(code)], check=True, timeout=240, env=environment)


class TestAttention:
    @each_mask
    def test_values_and_gradients_are_those_of_dense_masked_attention(self, mask):
        q, k, v, grad = inputs(mask)
        leaves = [x.clone().requires_grad_() for x in (q, k, v)]
        out, lse = sm.sparse_attention(*leaves, mask, return_lse=True)
        got = (out, lse, *torch.autograd.grad(out, leaves, grad))
        expected = oracle_with_grads(q, k, v, grad, mask.to_dense(), torch.float64)
        for name, x, y in zip(("out", "lse", "dq", "dk", "dv"), got, expected, strict=True):
            assert_same(x.detach(), y, rtol=1e-10, atol=1e-11, what=name)

    def test_double_backward(self):
        mask = sm.Mask.from_dense(scattered(num_tokens=7))
        q, k, v, _ = inputs(mask, dim=2, batch=1)
        leaves = [x.requires_grad_() for x in (q, k, v)]
        assert torch.autograd.gradgradcheck(lambda q, k, v: sm.sparse_attention(q, k, v, mask), leaves, fast_mode=True)

    def test_vmap(self):
        mask = MADE["from_dense"]
        q, k, v = (torch.randn(3, 2, HEADS, N, 4) for _ in range(3))
        got = torch.vmap(lambda q, k, v: sm.sparse_attention(q, k, v, mask))(q, k, v)
        expected = torch.stack([sm.sparse_attention(*x, mask) for x in zip(q, k, v, strict=True)])
        assert_same(got, expected)

    @pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
    def test_compiled_without_graph_breaks_and_told_apart(self):
        """Also when the lists are first needed inside the compiled function."""
        torch._dynamo.reset()
        compiled = torch.compile(sm.sparse_attention, fullgraph=True, backend="aot_eager")
        q, k, v, _ = inputs(MADE["union"])
        q.requires_grad_()
        for mask in (made_masks()["nested"], made_masks()["from_dense"]):
            out = compiled(q, k, v, mask)
            (got,) = torch.autograd.grad(out.sum(), q)
            expected, _ = dense_attention(q, k, v, mask.to_dense())
            assert_same(out.detach(), expected.detach(), rtol=1e-10, atol=1e-12)
            assert_same(got, torch.autograd.grad(expected.sum(), q)[0], rtol=1e-9, atol=1e-11)

    def test_a_complement_that_is_only_a_step_on_the_way_never_lists_its_edges(self):
        n = 200_000
        wide = sm.masks.local(num_tokens=n, num_heads=1, window=2)
        narrow = sm.masks.local(num_tokens=n, num_heads=1, window=1)
        mask = wide & ~narrow
        assert mask.nnz == wide.nnz - narrow.nnz
        assert mask == wide - narrow

    def test_of_other_sizes_is_refused(self):
        q = torch.randn(1, HEADS, N + 1, 4)
        with pytest.raises(ValueError, match="mask: expected 34 tokens like query, got a mask of 33 tokens"):
            sm.sparse_attention(q, q, q, MADE["union"])


class TestModule:
    @each_mask
    def test_a_mask_is_a_configuration(self, mask):
        sparse = sm.SparseMHSA(12, HEADS, batch_first=True, config=mask, dtype=torch.float64)
        dense = torch.nn.MultiheadAttention(12, HEADS, batch_first=True, dtype=torch.float64)
        dense.load_state_dict(sparse.state_dict())
        x = torch.randn(2, N, 12, dtype=torch.float64)
        out, weights = sparse(x, x, x, average_attn_weights=False)
        keep = mask.to_dense()
        drop = (~keep).repeat(2, 1, 1)
        expected, expected_weights = dense(x, x, x, attn_mask=drop, average_attn_weights=False)
        # Rows without a key are NaN in the dense module.
        alive = keep.any(-1).all(0)
        assert_same(out[:, alive].detach(), expected[:, alive].detach(), rtol=1e-10, atol=1e-12)
        kept_weights = torch.where(keep.any(-1)[..., None], expected_weights, 0.0)
        assert_same(weights.detach(), kept_weights.detach(), rtol=1e-10, atol=1e-12)
        for twin in (copy.deepcopy(sparse), pickle.loads(pickle.dumps(sparse))):
            assert twin.mask(N) == mask
            assert_same(twin(x, x, x)[0].detach(), out.detach())
        assert mask.name in repr(sparse)

    def test_extra_keys_join_the_edges(self):
        mask = MADE["from_dense"]
        sparse = sm.SparseMHSA(12, HEADS, batch_first=True, add_zero_attn=True, add_bias_kv=True, config=mask)
        dense = torch.nn.MultiheadAttention(12, HEADS, batch_first=True, add_zero_attn=True, add_bias_kv=True)
        dense.load_state_dict(sparse.state_dict())
        x = torch.randn(2, N, 12)
        expected = dense(x, x, x, attn_mask=(~mask.to_dense()).repeat(2, 1, 1))[0]
        assert_same(sparse(x, x, x)[0].detach(), expected.detach(), rtol=1e-4, atol=1e-6)

    def test_it_is_for_its_own_tokens_and_heads_only(self):
        with pytest.raises(ValueError, match="config: expected a mask of 2 heads, got one of 3"):
            sm.SparseMHSA(12, 2, config=MADE["union"])
        x = torch.randn(1, N + 1, 12)
        sparse = sm.SparseMHSA(12, HEADS, batch_first=True, config=MADE["union"])
        with pytest.raises(ValueError, match="was made for 33 tokens, but there are 34"):
            sparse(x, x, x)
        with pytest.raises(ValueError, match="was made for 33 tokens, but there are 34"):
            sparse.mask(N + 1)

    def test_a_mask_from_a_configuration_keeps_its_options(self):
        config = {"mask": "fibottention", "masked_logits": "zero", "scale": 0.25}
        by_config = sm.SparseMHSA(12, HEADS, batch_first=True, config=config)
        by_mask = sm.SparseMHSA(12, HEADS, batch_first=True, config=sm.Mask.from_config(config, N, HEADS))
        by_mask.load_state_dict(by_config.state_dict())
        x = torch.randn(2, N, 12)
        assert_same(by_mask(x, x, x)[0], by_config(x, x, x)[0])

    def test_dense_modules_take_one_and_give_it_back(self):
        dense = torch.nn.MultiheadAttention(12, HEADS)
        sparse = sm.SparseMHSA.from_dense(dense, MADE["union"])
        assert sparse.in_proj_weight is dense.in_proj_weight
        assert sparse.mask(N) is MADE["union"]
        sm.set_epoch(sparse, 3)
        assert sparse.mask(N) is MADE["union"]


@settings(deadline=None, max_examples=40)
@given(st.integers(1, 24), st.integers(0, 2**32 - 1), st.floats(0, 1))
def test_any_edges_survive_every_form(num_tokens, seed, density):
    generator = torch.Generator().manual_seed(seed)
    dense = torch.rand(2, num_tokens, num_tokens, generator=generator) < density
    mask = sm.Mask.from_dense(dense)
    forms = (
        sm.Mask.from_csr(*mask.to_csr()),
        pickle.loads(pickle.dumps(mask)),
        ~~mask,
        sm.Mask.per_head([sm.Mask.from_csr(mask.to_torch_sparse(head)) for head in range(2)]),
    )
    for form in forms:
        assert torch.equal(form.to_dense(), dense)
        assert form == mask


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: sm.Mask.from_dense(torch.ones(2, 2, dtype=torch.bool), num_heads=10**12), ValueError, "num_heads"),
        (lambda: sm.Mask.from_dense(torch.ones(2, 2, dtype=torch.bool), num_heads=-1), ValueError, "num_heads"),
        (lambda: sm.Mask.from_csr([0, 1], [0], num_heads=2**70), ValueError, "num_heads"),
        (lambda: sm.Mask.from_function(lambda _, row: [row], None, 1), TypeError, "num_tokens"),
        (lambda: sm.Mask.per_head([1]), TypeError, "masks"),
        (lambda: sm.Mask.per_head(sm.Mask.from_dense(torch.ones(2, 2).bool())), TypeError, "masks"),
        (lambda: sm.Mask.from_function([[0]], 1, 1), TypeError, "keep"),
        (lambda: sm.Mask.from_dense(torch.ones(2, 2).bool(), num_prefix_tokens=1.0), TypeError, "num_prefix_tokens"),
        (lambda: sm.Mask.from_dense(torch.ones(2, 2).bool(), num_prefix_tokens=3), ValueError, "num_prefix_tokens"),
        (lambda: sm.Mask.from_csr(0, []), ValueError, "row_ptr"),
        (lambda: sm.Mask.from_config("mask: none", num_tokens=2**70, num_heads=1), ValueError, "num_tokens"),
        (lambda: sm.Mask.from_config("mask: none", num_tokens=4, num_heads=None), TypeError, "num_heads"),
        (lambda: sm.Mask.from_config("mask: none", num_tokens=4, num_heads=1, layer=None), TypeError, "layer"),
    ],
)
def test_a_size_that_no_mask_has_is_named(make, error, message):
    with pytest.raises(error, match=f"^{message}: expected"):
        make()
