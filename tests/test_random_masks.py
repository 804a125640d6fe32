"""Masks drawn at random: exact counts, uniform choice, and draws that depend on nothing but their arguments."""

import copy
import io
import pickle
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import sparse_mhsa as sm

CONFIGS = Path(__file__).parents[1] / "configs" / "attention"
HEADS = 3


def dense(config, num_tokens=60, **where):
    return sm.Mask.from_config(config, num_tokens, HEADS, **where).to_dense().numpy()


def random(**kwargs):
    return {"mask": "random", "mask_kwargs": {"seed": 5, **kwargs}}


def bigbird(**kwargs):
    return {"mask": "bigbird", "mask_kwargs": kwargs}


class TestCounts:
    @pytest.mark.parametrize("k", [1, 4, 58, 59, 60])
    @pytest.mark.parametrize("prefix", [0, 1, 3])
    def test_random_keeps_exactly_k_keys_outside_the_dense_prefix(self, k, prefix):
        mask = dense(random(k=k) | {"num_prefix_tokens": prefix})
        assert mask[:, :prefix].all()
        assert mask[:, :, :prefix].all()
        assert (mask[:, prefix:, prefix:].sum(-1) == min(k, 60 - prefix)).all()

    def test_causal_random_keeps_fewer_where_fewer_exist(self):
        mask = dense(random(k=7, causal=True, keep_cls_dense=False))
        assert not np.triu(mask, 1).any()
        assert (mask.sum(-1) == np.minimum(7, np.arange(1, 61))).all()

    @pytest.mark.parametrize("prefix", [0, 1, 4])
    def test_causal_random_never_sees_the_future_whatever_is_dense(self, prefix):
        mask = dense(random(k=3, causal=True) | {"num_prefix_tokens": prefix})
        assert not np.triu(mask, 1).any()
        past = np.tri(60, dtype=bool)
        assert (mask[:, :prefix] == past[:prefix]).all()
        assert (mask[:, :, :prefix] == past[:, :prefix]).all()
        assert (mask[:, prefix:, prefix:].sum(-1) == np.minimum(3, np.arange(1, 61 - prefix))).all()

    def test_symmetric_and_causal_contradict_each_other(self):
        with pytest.raises(sm.ConfigError, match=r"symmetric: expected false with `causal: true`"):
            sm.load_config(random(k=3, causal=True, symmetric=True))

    @pytest.mark.parametrize("keep", [0.001, 0.1, 0.25, 0.5, 0.9, 1.0])
    @pytest.mark.parametrize("causal", [False, True])
    def test_a_ratio_is_of_the_allowed_keys_and_keeps_at_least_one(self, keep, causal):
        mask = dense(random(keep_ratio=keep, causal=causal))[:, 1:, 1:]
        allowed = np.arange(1, 60) if causal else np.full(59, 59)
        assert (mask.sum(-1) == [max(1, round(keep * a)) for a in allowed]).all()

    def test_a_mask_ratio_is_the_rest(self):
        mask = dense(random(mask_ratio=0.9805), num_tokens=197)
        assert (mask[:, 1:, 1:].sum(-1) == round((1 - 0.9805) * 196)).all()

    def test_symmetric_adds_the_transpose_of_what_was_drawn(self):
        drawn, both = (dense(random(k=3, symmetric=s, keep_cls_dense=False)) for s in (False, True))
        np.testing.assert_array_equal(both, drawn | drawn.transpose(0, 2, 1))

    @pytest.mark.parametrize("num_random", [0, 1, 5, 52, 53, 60])
    def test_bigbird_adds_exactly_num_random_keys_where_so_many_are_left(self, num_random):
        kwargs = {"window": 2, "num_global": 1, "global_indices": [0, 30]}
        base = dense(bigbird(num_random=0, **kwargs))
        mask = dense(bigbird(num_random=num_random, **kwargs))
        assert mask[base].all()
        left = ~base & ~np.eye(60, dtype=bool)
        assert ((mask & ~base).sum(-1) == np.minimum(left.sum(-1), num_random)).all()

    def test_bigbird_never_draws_the_query_itself(self):
        mask = dense(bigbird(window=0, num_random=59, num_global=0, keep_cls_dense=False))
        np.testing.assert_array_equal(mask, np.broadcast_to(~np.eye(60, dtype=bool), mask.shape))

    def test_symmetric_bigbird(self):
        drawn, both = (dense(bigbird(num_random=2, symmetric=s)) for s in (False, True))
        np.testing.assert_array_equal(both, drawn | drawn.transpose(0, 2, 1))

    def test_published_pruning_ratio_of_bigbird(self):
        mask = sm.Mask.from_config(CONFIGS / "vit_bigbird.yaml", num_tokens=197, num_heads=12)
        assert mask.pruning_ratio == pytest.approx(0.9796, abs=1e-4)


class TestDraws:
    def test_every_key_is_as_likely_as_any_other(self):
        mask = sm.Mask.from_config(random(k=3, keep_cls_dense=False), 40, 64).to_dense().numpy()
        counts = mask.sum((0, 1))
        expected = 64 * 40 * 3 / 40
        # 39 degrees of freedom: beyond 72.1 with probability 0.001, and the draws are always the same. Drawing without
        # replacement makes the counts of one row less scattered than independent draws.
        assert ((counts - expected) ** 2 / expected).sum() < 72.1
        gaps = np.array([np.roll(mask[:, i], -i, axis=-1).sum(0) for i in range(40)]).sum(0)
        assert ((gaps - expected) ** 2 / expected).sum() < 72.1

    @pytest.mark.parametrize("config", [random(k=3), bigbird(num_random=3)])
    def test_layers_heads_and_epochs_draw_their_own(self, config):
        masks = [dense(config, layer=layer, epoch=epoch) for layer in (0, 1) for epoch in (0, 1)]
        heads = [head.tobytes() for mask in masks for head in mask]
        assert len(set(heads)) == len(heads) == 4 * HEADS

    @pytest.mark.parametrize("mask", [random, bigbird])
    def test_what_is_switched_off_changes_nothing(self, mask):
        k = {"k": 3} if mask is random else {"num_random": 3}
        np.testing.assert_array_equal(*(dense(mask(reseed_each_epoch=False, **k), epoch=e) for e in (0, 7)))
        heads = dense(mask(per_head_same=True, **k))
        assert (heads == heads[0]).all()
        assert (dense(mask(**(k | {"seed": 6}))) != dense(mask(**(k | {"seed": 5})))).any()

    def test_the_draws_are_a_fixed_function_of_their_arguments(self):
        """Any platform and any later version must draw these, or published seeds lose their meaning."""
        mask = sm.Mask.from_config(random(k=3), 12, 2, layer=1, epoch=2)
        drawn = [[row[1:].nonzero().flatten().tolist() for row in head[1:4, :]] for head in mask.to_dense()]
        assert drawn == [[[1, 3, 7], [5, 6, 10], [4, 5, 9]], [[0, 1, 2], [0, 4, 10], [3, 7, 10]]]

    def test_threads_and_processes_agree(self):
        code = (
            "import torch, sparse_mhsa as sm; torch.set_num_threads(1);"
            "m = sm.Mask.from_config('mask: random\\nmask_kwargs: {k: 3, seed: 5}', 500, 2);"
            "print(int((m.to_csr()[1] * torch.arange(m.nnz)).sum()))"
        )
        out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
        mask = sm.Mask.from_config(random(k=3), 500, 2)
        assert int(out) == int((mask.to_csr()[1] * torch.arange(mask.nnz)).sum())

    def test_the_batch_plays_no_part(self):
        q, k, v = (torch.randn(4, HEADS, 60, 8) for _ in range(3))
        mask = sm.Mask.from_config(random(k=3), 60, HEADS)
        whole = sm.sparse_attention(q, k, v, mask)
        torch.testing.assert_close(whole[2:3], sm.sparse_attention(q[2:3], k[2:3], v[2:3], mask), rtol=0, atol=0)


OPEN = {"mask": "random", "mask_kwargs": {"k": 3, "seed": None}}


class TestOpenSeeds:
    def test_a_seed_comes_from_torchs_generator_and_stays(self):
        torch.manual_seed(3)
        first = sm.Mask.from_config(OPEN, 60, HEADS)
        second = sm.Mask.from_config(OPEN, 60, HEADS)
        torch.manual_seed(3)
        again = sm.Mask.from_config(OPEN, 60, HEADS)
        assert first == again != second
        for twin in (
            copy.deepcopy(first),
            pickle.loads(pickle.dumps(first)),
            sm.Mask.from_config(first.config.to_yaml(), 60, HEADS),
        ):
            assert twin == first
            assert torch.equal(twin.to_dense(), first.to_dense())

    def test_masks_without_an_open_seed_leave_the_generator_alone(self):
        torch.manual_seed(3)
        state = torch.get_rng_state()
        sm.Mask.from_config(random(k=3), 60, HEADS)
        sm.Mask.from_config("mask: bigbird", 60, HEADS)
        assert torch.equal(state, torch.get_rng_state())

    def test_a_module_shows_its_seed_and_keeps_it(self):
        module = sm.SparseMHSA(12, HEADS, batch_first=True, config=OPEN)
        (seed,) = module.layer_mask.config.seeds
        assert f"seed={seed}" in repr(module)
        file = io.BytesIO()
        torch.save(module, file)
        file.seek(0)
        for twin in (copy.deepcopy(module), torch.load(file, weights_only=False)):
            assert twin.mask(60) == module.mask(60)
        module.set_epoch(1)
        assert module.layer_mask.config.seeds == [seed]
        assert module.mask(60) != twin.mask(60)

    def test_layers_of_a_model_draw_their_own(self):
        layers = [sm.SparseMHSA(12, HEADS, config=OPEN) for _ in range(2)]
        assert layers[0].mask(60) != layers[1].mask(60)

    def test_seeds_inside_composites(self):
        config = {"mask": "union", "mask_kwargs": {"masks": [OPEN, OPEN]}}
        mask = sm.Mask.from_config(config, 60, HEADS)
        one, two = mask.config.seeds
        assert two == one + 1
        assert sm.Mask.from_config(mask.config, 60, HEADS) == mask
        assert (mask.to_dense()[:, 1:, 1:].sum(-1) > 3).any()
