"""Checkpoints: one that cannot be used is named, field by field, and nothing of it is taken over."""

import math
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from sparse_mhsa.train import TrainingError, UsageError
from sparse_mhsa.train.checkpoint import random_state, read_checkpoint, set_random_state, write_checkpoint
from sparse_mhsa.train.datasets import load_data
from sparse_mhsa.train.engine import LAST, Trainer
from sparse_mhsa.train.finetune import finetune
from sparse_mhsa.train.models import build_model
from sparse_mhsa.train.recipes import FinetuneOptions
from sparse_mhsa.train.tasks import Classification

# Checkpoints that cannot be used.


class WritesAFile:
    """Unpickling it runs code."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


@pytest.mark.parametrize("damage", ["missing", "empty", "text", "truncated", "foreign", "key missing", "pickled code"])
def test_a_damaged_checkpoint_is_named_and_never_executed(options, checkpoint, tmp_path, damage):
    path = tmp_path / "damaged.pth"
    content = checkpoint.read_bytes()
    if damage == "empty":
        path.touch()
    elif damage == "text":
        path.write_text("not a checkpoint")
    elif damage == "truncated":
        path.write_bytes(content[: len(content) // 2])
    elif damage == "foreign":
        torch.save({"model": {}}, path)
    elif damage == "key missing":
        state = torch.load(checkpoint, weights_only=True)
        del state["optimizer"]
        torch.save(state, path)
    elif damage == "pickled code":
        torch.save(WritesAFile(tmp_path / "executed"), path)
    with pytest.raises(UsageError, match=r"--resume: .*damaged\.pth") as raised:
        finetune(replace(options, resume=path))
    if damage in ("empty", "text", "truncated"):
        assert str(raised.value).endswith("is not a readable checkpoint: it is cut, damaged or of another kind")
    if damage == "pickled code":
        assert "it holds code or objects (getattr), and only tensors and plain values are read" in str(raised.value)
    assert "\n" not in str(raised.value)
    assert not (tmp_path / "executed").exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"seed": 1}, "--seed 0, this run has 1"),
        ({"batch_size": 64}, "--batch-size 128, this run has 64"),
        (
            {"patch_size": 4},
            r"another model than vit_micro: pos_embed is float32 \(1, 17, 64\), this run's .*\(1, 5, 64\)",
        ),
        ({"model": "vit_tiny_patch16_224"}, "another model than vit_tiny_patch16_224: "),
        ({"nb_classes": 12}, r"another model .*head.weight is float32 \(10, 64\), this run's is float32 \(12, 64\)"),
        ({"layer_decay": 0.5}, "--layer-decay None, this run has 0.5"),
        ({"attn_cfg": True}, "trained with dense attention, but --attn-cfg is '.*fibottention.yaml'"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_a_checkpoint_of_another_run_is_refused(options, checkpoint, attn_cfg, change, message):
    change = {key: attn_cfg if key == "attn_cfg" else value for key, value in change.items()}
    with pytest.raises(UsageError, match=message):
        finetune(replace(options, resume=checkpoint, **change))


@pytest.fixture(scope="module")
def half_way(tmp_path_factory, stopped_after):
    """A run of 2 x 11 steps that stopped after 14, and its trainer."""
    folder = tmp_path_factory.mktemp("half")
    recipe = FinetuneOptions(dataset="digits", epochs=2, batch_size=128, patch_size=4, output_dir=folder)
    path = stopped_after(recipe, 14)
    data = load_data(recipe)
    return path, Trainer(build_model(recipe, data), data, recipe, Classification(recipe, data.num_classes))


def set_item(*keys):
    """Replaces the item at this path of a checkpoint."""

    def change(state, value):
        for key in keys[:-1]:
            state = state[key]
        state[keys[-1]] = value

    return change


@pytest.mark.parametrize("value", [{1: 2}, [None], "x", -5, math.nan, True], ids=repr)
@pytest.mark.parametrize("key", ["model", "optimizer", "epoch", "step", "meter", "history", "rng", "args", "data"])
def test_a_field_of_another_kind_is_named(half_way, tmp_path, key, value):
    path, trainer = half_way
    state = torch.load(path, weights_only=True)
    state[key] = value
    torch.save(state, tmp_path / "damaged.pth")
    with pytest.raises(UsageError, match=rf"damaged\.pth' .*{key}.*: expected .*, got ") as raised:
        trainer.load_state(read_checkpoint(tmp_path / "damaged.pth"), tmp_path / "damaged.pth")
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("keys", "value", "message"),
    [
        (["epoch"], 99, "epoch: expected 1, as many as the history has, got 99"),
        (["step"], 10**9, "step: expected an integer from 0 to 11, got 1000000000"),
        (["step"], 4, "meter.images: expected an integer from 512 to 512, got 384"),
        (["history"], ["x"], "history.0.: expected a mapping, got str 'x'"),
        (["history", 0, "test_acc1"], None, "history.0..test_acc1: expected a finite number, got NoneType None"),
        (["history", 0, "epoch"], 7, "history.0..epoch: expected an integer from 0 to 0, got 7"),
        (["history", 0, "test_acc1"], 0.5, "best: expected 0.5, the best of the history"),
        (["best"], None, "best: expected a finite number, got NoneType None"),
        (["meter", "step_seconds"], 1, "meter.step_seconds: expected a list, got int 1"),
        (["meter", "step_seconds"], [0.1], "step_seconds: expected one duration for each of the 3 steps done, got 1"),
        (["meter", "attention_seconds", 1], -1.0, "attention_seconds.1.: expected a number of at least 0, got -1"),
        (["meter", "correct"], 10**6, "meter.correct: expected an integer from 0 to 384, got 1000000"),
        (["meter", "loss"], math.inf, "meter.loss: expected a finite number, got inf"),
        (["meter", "more"], 1, "meter: expected the keys images, loss"),
        (["model", "head.bias"], 3, "model.head.bias: expected a tensor, got int 3"),
        (["model", "head.bias"], torch.zeros(9), r"head.bias is float32 \(9,\), this run's is float32 \(10,\)"),
        (["model", "head.bias"], torch.zeros(10).double(), r"head.bias is float64 \(10,\)"),
        (["model", "head.bias"], torch.zeros(10).to_sparse(), r"head.bias is sparse_coo float32 \(10,\)"),
        (["model", "head.bias"], torch.zeros(10, device="meta"), r"head.bias is without values"),
        (["model", "head.bias"], torch.full((10,), math.nan), "model.head.bias: expected finite numbers, got NaN"),
        (["model", "tail"], torch.zeros(1), "it also has tail"),
        (["optimizer", "state", 0, "exp_avg"], torch.zeros(3), r"state.0..exp_avg: expected float32 \(1, 1, 64\)"),
        (["optimizer", "state", 0, "exp_avg"], torch.full((1, 1, 64), math.inf), "exp_avg: expected finite numbers"),
        (["optimizer", "state", 0, "exp_avg_sq"], -torch.ones(1, 1, 64), "exp_avg_sq: expected finite numbers of at"),
        (["optimizer", "state", 0, "step"], torch.tensor(1e9), "state.0..step: expected a number from 1 to 14"),
        (["optimizer", "state", 0, "step"], 14, "optimizer.state.0..step: expected a tensor, got int 14"),
        (["optimizer", "state", 0], {}, "optimizer.state.0.: expected step, exp_avg and exp_avg_sq"),
        (["optimizer", "state", 10**6], {}, "optimizer.state.1000000.: expected a parameter from 0 to"),
        (["optimizer", "state", "a"], {}, "optimizer.state.'a'.: expected a parameter from 0 to"),
        (["optimizer", "param_groups"], [], "optimizer.param_groups: expected 2 groups of"),
        (["optimizer", "param_groups", 0], 1, "optimizer.param_groups.0.: expected a mapping, got int 1"),
        (["rng", 0, "torch"], torch.zeros(3), "rng.0..torch: expected the state of a generator"),
        (["rng", 0, "numpy"], (1, 2), "rng.0..numpy: expected the state of a generator"),
        (["rng", 0, "python"], (3, (1, 2), None), "rng.0..python: expected the state of a generator"),
        (["args", "seed"], torch.zeros(2), "args.seed: expected text, a number or nothing"),
        (["data", "classes"], ["a"] * 10, "other classes .*digits .10 and 10; only there: a; only here: 0, 1"),
        (["data", "train_images"], 1439, "written with 1439 training images, this run has 1438"),
    ],
    ids=lambda value: ".".join(map(str, value)) if isinstance(value, list) and value[:1] != ["x"] else "",
)  # fmt: skip
def test_a_wrong_value_is_named_and_nothing_of_it_is_taken_over(half_way, tmp_path, keys, value, message):
    path, trainer = half_way
    before = trainer.model.head.weight.clone()
    state = torch.load(path, weights_only=True)
    set_item(*keys)(state, value)
    torch.save(state, tmp_path / "damaged.pth")
    with pytest.raises(UsageError, match=rf"damaged\.pth' .*{message}") as raised:
        trainer.load_state(read_checkpoint(tmp_path / "damaged.pth"), tmp_path / "damaged.pth")
    assert "\n" not in str(raised.value)
    assert torch.equal(trainer.model.head.weight, before)
    assert (trainer.epoch, trainer.step, trainer.history) == (0, 0, [])


def test_a_field_that_is_not_there_is_named(half_way, tmp_path):
    path, trainer = half_way
    for key in torch.load(path, weights_only=True).keys() - {"format", "attention"}:
        state = torch.load(path, weights_only=True)
        del state[key]
        torch.save(state, tmp_path / "damaged.pth")
        with pytest.raises(UsageError, match=rf"{key}: expected .*, got nothing"):
            trainer.load_state(read_checkpoint(tmp_path / "damaged.pth"), tmp_path / "damaged.pth")


def test_a_checkpoint_of_a_longer_run_is_refused(options, checkpoint, tmp_path):
    longer = replace(options, epochs=2, output_dir=tmp_path / "longer")
    finetune(longer)
    with pytest.raises(UsageError, match="epoch: 2 epochs are finished, --epochs is 1"):
        finetune(replace(longer, epochs=1, resume=tmp_path / "longer" / LAST))


def test_the_options_of_the_resumed_run_win_over_those_of_the_checkpoint(options, checkpoint, caplog):
    resumed = finetune(replace(options, epochs=2, weight_decay=0.5, resume=checkpoint))
    assert {group["weight_decay"] for group in resumed.trainer.optimizer.param_groups} == {0.5, 0.0}


# A checkpoint knows its attention.


@pytest.fixture(scope="module")
def sparse_checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sparse")
    (folder / "local.yaml").write_text("mask: local\nmask_kwargs: {window: 2}\nnum_prefix_tokens: 1\n")
    finetune(
        FinetuneOptions(
            dataset="digits",
            epochs=1,
            batch_size=128,
            patch_size=2,
            attn_cfg=folder / "local.yaml",
            output_dir=folder,
        )
    )
    return folder / LAST


@pytest.mark.parametrize("given", [False, True], ids=["from the checkpoint", "repeated"])
def test_a_sparse_checkpoint_is_evaluated_sparse(options, sparse_checkpoint, given):
    attn_cfg = sparse_checkpoint.with_name("local.yaml") if given else None
    seen = finetune(replace(options, resume=sparse_checkpoint, eval=True, attn_cfg=attn_cfg))
    (entry,) = read_checkpoint(sparse_checkpoint)["history"]
    assert seen.results == {key: entry[key] for key in seen.results}
    assert type(seen.model.blocks[0].attn).__name__ != "Attention"


def test_an_attention_that_contradicts_the_checkpoint_is_refused_with_what_differs(
    options, sparse_checkpoint, tmp_path
):
    other = tmp_path / "other.yaml"
    other.write_text("mask: local\nmask_kwargs: {window: 3}\nnum_prefix_tokens: 1\n")
    for evaluate in (False, True):
        with pytest.raises(UsageError, match=r"other\.yaml': it has window: 2 where the file has window: 3"):
            finetune(replace(options, resume=sparse_checkpoint, attn_cfg=other, eval=evaluate))


def test_an_attention_that_cannot_be_read_is_named(options, sparse_checkpoint, tmp_path):
    state = torch.load(sparse_checkpoint, weights_only=True)
    state["attention"] = "mask: nothing\n"
    torch.save(state, tmp_path / "damaged.pth")
    with pytest.raises(UsageError, match=r"damaged\.pth' is damaged: attention: .*unknown mask `nothing`"):
        finetune(replace(options, resume=tmp_path / "damaged.pth"))


# Writing.


def test_an_interrupted_write_leaves_the_previous_checkpoint(tmp_path, checkpoint, monkeypatch):
    path = tmp_path / LAST
    path.write_bytes(checkpoint.read_bytes())

    def disk_full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", disk_full)
    with pytest.raises(TrainingError, match=r"cannot write .*last\.pth', what it held .* is kept: .*No space left"):
        write_checkpoint(path, {})
    assert path.read_bytes() == checkpoint.read_bytes()
    assert list(tmp_path.iterdir()) == [path]


def test_a_disk_that_fills_up_while_torch_writes_is_named(tmp_path):
    """The limit on a file's size stands for the full disk; torch reports it as a RuntimeError of its own."""
    path = tmp_path / LAST
    write_checkpoint(path, {"small": 1})
    before = path.read_bytes()
    code = f"""
import resource, signal, torch
from pathlib import Path
from sparse_mhsa.train import TrainingError
from sparse_mhsa.train.checkpoint import write_checkpoint
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (65536, 65536))
try:
    write_checkpoint(Path({str(path)!r}), {{"large": torch.zeros(100_000)}})
except TrainingError as error:
    assert "File too large" in str(error), error
    assert "is kept" in str(error), error
else:
    raise AssertionError("nothing was raised")
"""
    subprocess.run([sys.executable, "-c", code], check=True)
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


def test_random_state_survives_a_checkpoint(tmp_path):
    def draw():
        import random

        return torch.rand(3).tolist(), np.random.standard_normal(3).tolist(), random.random()

    np.random.standard_normal()  # leaves the second of a pair of normals cached
    torch.save(random_state(), tmp_path / "rng")
    expected = draw()
    set_random_state(torch.load(tmp_path / "rng", weights_only=True), tmp_path / "rng")
    assert draw() == expected
