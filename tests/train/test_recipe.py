"""The MAE fine-tuning recipe: schedules against golden values, and every option that changes a step."""

import json
import math
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

from sparse_mhsa.cli import main
from sparse_mhsa.train import UsageError
from sparse_mhsa.train.checkpoint import read_checkpoint
from sparse_mhsa.train.datasets import load_data
from sparse_mhsa.train.distributed import GatheredBatchNorm
from sparse_mhsa.train.engine import LAST, Trainer
from sparse_mhsa.train.finetune import finetune
from sparse_mhsa.train.loading import EpochOrder
from sparse_mhsa.train.models import build_model, load_initial_weights
from sparse_mhsa.train.recipes import FinetuneOptions
from sparse_mhsa.train.schedule import layer_of, learning_rate, parameter_groups, set_learning_rate
from sparse_mhsa.train.tasks import Classification

GOLDEN = json.loads((Path(__file__).parents[1] / "golden" / "train_utils.json").read_text())


@pytest.fixture
def quick(options):
    """A run of one epoch in 22 steps over 5 tokens, without anything random."""
    # Tests compare several runs, and need the files of none after the next.
    return replace(options, epochs=1, batch_size=64, patch_size=4, drop_path=0.0, warmup_epochs=0.5, overwrite=True)


# Learning rates.


@pytest.mark.parametrize("case", GOLDEN["lr_schedule"], ids=lambda case: f"{case['epochs']} epochs")
def test_the_learning_rate_is_that_of_the_reference(case):
    for epoch, expected in case["points"]:
        got = learning_rate(
            epoch,
            peak=case["lr"],
            least=case["min_lr"],
            warmup_epochs=case["warmup_epochs"],
            epochs=case["epochs"],
        )
        assert got == pytest.approx(expected, rel=1e-12, abs=1e-18)


@pytest.mark.parametrize("case", GOLDEN["layer_decay"], ids=lambda case: f"{case['depth']} layers")
def test_the_layer_decay_is_that_of_the_reference(case):
    class Named(nn.Module):
        """Parameters with the names of the golden rows."""

        def __init__(self):
            super().__init__()
            self.blocks = nn.ModuleList(nn.Module() for _ in range(case["depth"]))
            for name, _, _ in case["rows"]:
                *path, last = name.split(".")
                module = self
                for part in path:
                    if part not in dict(module.named_children()):
                        module.add_module(part, nn.Module())
                    module = module.get_submodule(part)
                module.register_parameter(last, nn.Parameter(torch.zeros(2, 2)))

    model = Named()
    scales = {
        id(parameter): group["lr_scale"]
        for group in parameter_groups(model, weight_decay=0.05, layer_decay=case["layer_decay"])
        for parameter in group["params"]
    }
    for name, layer, scale in case["rows"]:
        assert layer_of(name, case["depth"]) == layer
        assert scales[id(model.get_parameter(name))] == pytest.approx(scale, rel=1e-12)


def test_every_trainable_parameter_is_in_one_group_and_only_matrices_decay(quick):
    model = build_model(quick, load_data(quick))
    groups = parameter_groups(model, weight_decay=0.05, layer_decay=0.75)
    listed = [id(parameter) for group in groups for parameter in group["params"]]
    assert sorted(listed) == sorted(id(parameter) for parameter in model.parameters())
    decaying = {id(p) for group in groups if group["weight_decay"] > 0 for p in group["params"]}
    for name, parameter in model.named_parameters():
        matrix = parameter.ndim > 1 and name not in ("cls_token", "pos_embed")
        assert (id(parameter) in decaying) == matrix, name


def test_a_step_uses_the_rate_of_its_place_times_that_of_its_layer(quick):
    model = build_model(quick, load_data(quick))
    optimizer = torch.optim.AdamW(parameter_groups(model, weight_decay=0.0, layer_decay=0.5), lr=1.0)
    set_learning_rate(optimizer, 0.25)
    rates = {group["lr"] for group in optimizer.param_groups}
    assert rates == {0.25 * 0.5 ** (5 - layer) for layer in range(6)}


def test_the_peak_grows_with_everything_that_makes_a_step_larger(quick):
    recipe = replace(quick, lr=None, blr=1e-3)
    assert recipe.peak_lr == pytest.approx(1e-3 * 64 / 256)
    assert replace(recipe, accum_iter=4, world_size=2).peak_lr == pytest.approx(8 * recipe.peak_lr)


# What changes a step.


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    folder = tmp_path_factory.mktemp("plain")
    return finetune(
        FinetuneOptions(
            dataset="digits",
            epochs=1,
            batch_size=256,
            lr=2e-3,
            patch_size=4,
            drop_path=0.0,
            warmup_epochs=0.5,
            output_dir=folder,
        )
    )


def weights_of(run):
    return torch.cat([parameter.detach().flatten() for parameter in run.model.parameters()])


def test_accumulated_batches_are_one_larger_batch(quick):
    whole = finetune(quick)
    parts = finetune(replace(quick, batch_size=16, accum_iter=4))
    assert len(parts.trainer.loaders.train) == 89
    assert parts.trainer.steps_per_epoch == whole.trainer.steps_per_epoch == 22
    for key in ("train_loss", "test_loss"):
        assert parts.results[key] == pytest.approx(whole.results[key], rel=1e-4)
    torch.testing.assert_close(weights_of(parts), weights_of(whole), atol=2e-3, rtol=0)


@pytest.mark.parametrize(
    "change",
    [
        {"mixup": 0.8},
        {"cutmix": 1.0},
        {"cutmix_minmax": (0.2, 0.8)},
        {"mixup": 0.8, "cutmix": 1.0, "mixup_switch_prob": 0.1},
        {"mixup": 0.8, "mixup_mode": "elem"},
        {"mixup": 0.8, "mixup_prob": 0.3},
        {"reprob": 0.5},
        {"reprob": 0.5, "remode": "const"},
        {"reprob": 0.5, "recount": 3},
        {"smoothing": 0.0},
        {"drop_path": 0.5},
        {"clip_grad": 0.01},
        {"layer_decay": 0.5},
        {"weight_decay": 1.0},
        {"cls_token": True},
        {"amp": "bf16"},
        {"two_branch": True},
    ],
    ids=str,
)
def test_an_option_changes_the_run(quick, plain, change):
    changed = finetune(replace(quick, batch_size=256, **change))
    assert changed.results["train_loss"] != plain.results["train_loss"] or not torch.equal(
        weights_of(changed), weights_of(plain)
    )


@pytest.mark.parametrize("mode", ["batch", "pair", "elem"])
@pytest.mark.parametrize(
    ("shares", "sides"),
    [
        ((0.25, 0.75), {2, 3, 4, 5}),
        ((0.5, 0.5), {4}),
        ((0.05, 0.1), {1}),
        ((0.3, 0.3), {2}),
        ((1.0, 1.0), {8}),
    ],
    ids=str,
)
def test_what_cutmix_pastes_is_between_the_shares_and_at_least_a_pixel(quick, shares, sides, mode):
    """Sides in pixels of images of 8 x 8; as in timm, the larger share itself is drawn only where there is no other."""
    task = Classification(replace(quick, cutmix_minmax=shares, mixup_mode=mode), 10)
    np.random.seed(0)
    seen = set()
    for _ in range(100):
        images = torch.cat([torch.zeros(1, 1, 8, 8), torch.ones(1, 1, 8, 8)])
        mixed, _ = task.mixup(images, torch.tensor([0, 1]))
        seen |= {int(mixed[0, 0].amax(0).sum()), int(mixed[0, 0].amax(1).sum())}
    assert seen == sides


def test_a_run_with_everything_random_repeats_itself(quick):
    everything = {"mixup": 0.8, "cutmix": 1.0, "reprob": 0.5, "drop_path": 0.3, "batch_size": 256}
    first, second = (finetune(replace(quick, **everything)) for _ in range(2))
    assert torch.equal(weights_of(first), weights_of(second))


def test_half_precision_computes_nearly_the_same(quick):
    full = finetune(quick)
    for amp in ("bf16", "fp16"):
        half = finetune(replace(quick, amp=amp))
        assert half.results["train_loss"] == pytest.approx(full.results["train_loss"], rel=0.05)
        assert next(half.model.parameters()).dtype == torch.float32


def test_averaged_weights_are_tested_too_and_follow_the_definition(quick):
    recipe = replace(quick, model_ema=0.9)
    data = load_data(recipe)
    torch.manual_seed(0)
    trainer = Trainer(build_model(recipe, data), data, recipe, Classification(recipe, 10))
    averaged = trainer.model.head.weight.detach().clone()
    for _ in range(3):
        trainer._train_step([next(iter(trainer.loaders.train))])
        averaged = 0.9 * averaged + 0.1 * trainer.model.head.weight.detach()
    torch.testing.assert_close(trainer.ema.module.head.weight, averaged)

    results = finetune(recipe).results
    assert {"ema_test_loss", "ema_test_acc1", "ema_test_acc5"} <= results.keys()
    assert results["ema_test_loss"] != results["test_loss"]


@pytest.mark.parametrize("steps", [3, 11])
@pytest.mark.parametrize(
    "change",
    [
        {"accum_iter": 2, "batch_size": 64, "model_ema": 0.99, "mixup": 0.8, "reprob": 0.3, "layer_decay": 0.7},
        {"amp": "fp16", "cutmix": 1.0, "drop_path": 0.2},
        {"two_branch": True, "drop_path": 0.2},
    ],
    ids=lambda change: next(iter(change)),
)
def test_everything_resumes_bitwise(options, stopped_after, without_times, tmp_path, change, steps):
    recipe = replace(options, patch_size=4, epochs=2, **change)
    straight = finetune(recipe)
    path = stopped_after(replace(recipe, output_dir=tmp_path / "stopped"), steps)
    resumed = finetune(replace(recipe, output_dir=tmp_path / "stopped", resume=path))
    for key, value in straight.model.state_dict().items():
        assert torch.equal(value, resumed.model.state_dict()[key]), key
    if straight.trainer.ema is not None:
        assert torch.equal(straight.trainer.ema.module.head.weight, resumed.trainer.ema.module.head.weight)
    assert without_times(resumed.trainer.history) == without_times(straight.trainer.history)


def test_a_start_epoch_skips_what_would_come_before(quick, log_of):
    run = finetune(replace(quick, epochs=3, start_epoch=2))
    assert [entry["epoch"] for entry in log_of(quick.output_dir)] == [2]
    resumed = finetune(replace(quick, epochs=4, start_epoch=2, resume=quick.output_dir / LAST))
    assert [entry["epoch"] for entry in resumed.trainer.history] == [2, 3]
    assert run.trainer.history == resumed.trainer.history[:1]


def test_tensorboard_sees_steps_and_epochs(quick, tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run = finetune(replace(quick, log_dir=tmp_path / "events"))
    events = EventAccumulator(str(tmp_path / "events"))
    events.Reload()
    losses = events.Scalars("train/loss")
    assert len(losses) == 22
    assert losses[-1].step == 1000
    assert np.mean([x.value for x in losses]) == pytest.approx(run.results["train_loss"], rel=1e-5)
    (accuracy,) = events.Scalars("perf/test_acc1")
    assert accuracy.value == pytest.approx(run.results["test_acc1"])


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a device that is always full")
def test_a_full_disk_under_tensorboard_is_one_line_and_not_the_end_of_the_run(tmp_path):
    """By the command in a process of its own, since a thread's traceback would reach stderr and nothing else."""
    pytest.importorskip("tensorboard")
    folder = tmp_path / "events"
    program = """
import pathlib, sys
from sparse_mhsa.cli import main
opened = pathlib.Path.open
def on_a_full_disk(path, *args, **kwargs):
    return open("/dev/full", "wb") if "tfevents" in path.name else opened(path, *args, **kwargs)
pathlib.Path.open = on_a_full_disk
sys.exit(main(sys.argv[1:]))
"""
    words = ["finetune", "--dataset", "digits", "--patch-size", "4", "--epochs", "2", "--output-dir"]
    done = subprocess.run(
        [sys.executable, "-c", program, *words, str(tmp_path), "--log-dir", str(folder)],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert done.returncode == 0
    assert done.stderr == ""
    assert done.stdout.count(f"--log-dir '{folder}': No space left on device; no more events are written") == 1
    assert read_checkpoint(tmp_path / LAST)["epoch"] == 2


# Initial weights and probes.


def test_a_linear_probe_trains_the_head_alone(quick, checkpoint, caplog):
    recipe = replace(quick, patch_size=2, linear_probe=True, finetune=checkpoint, epochs=3, lr=0.02)
    with caplog.at_level("INFO", "sparse_mhsa"):
        run = finetune(recipe)
    assert "vit_micro: 650 trainable parameters" in caplog.text
    before = read_checkpoint(checkpoint)["model"]
    after = run.model.state_dict()
    changed = {name for name, value in before.items() if name not in after or not torch.equal(value, after[name])}
    assert changed == {"head.weight", "head.bias"}
    assert {"head.1.weight", "head.1.bias"} <= after.keys()
    assert run.trainer.num_parameters == 64 * 10 + 10
    assert run.results["test_acc1"] > 50


def test_weights_that_do_not_fit_are_named(quick, checkpoint, tmp_path):
    model = build_model(replace(quick, patch_size=2), load_data(quick))
    weights = dict(read_checkpoint(checkpoint)["model"])
    del weights["blocks.0.attn.qkv.weight"]
    weights["extra"] = torch.zeros(1)
    torch.save({"model": weights}, tmp_path / "odd.pth")
    with pytest.raises(UsageError, match=r"odd\.pth.*it has no blocks\.0\.attn\.qkv\.weight; it also has extra"):
        load_initial_weights(model, tmp_path / "odd.pth")
    (tmp_path / "text.pth").write_text("nothing")
    with pytest.raises(UsageError, match=r"--finetune: .*text\.pth' is not a readable checkpoint: it is cut, damaged"):
        load_initial_weights(model, tmp_path / "text.pth")


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda weight: weight * torch.nan, "expected finite numbers, got NaN or infinity"),
        (lambda weight: weight.long(), "expected floating-point numbers, got int64"),
    ],
    ids=["nan", "integers"],
)
def test_weights_that_are_no_numbers_to_compute_with_are_named(quick, checkpoint, tmp_path, damage, message):
    weights = dict(read_checkpoint(checkpoint)["model"])
    name = "blocks.0.mlp.fc1.weight"
    torch.save({"model": {**weights, name: damage(weights[name])}}, tmp_path / "odd.pth")
    with pytest.raises(UsageError, match=rf"^--finetune: '.*odd\.pth' is damaged: {name}: {message}$"):
        finetune(replace(quick, patch_size=2, finetune=tmp_path / "odd.pth"))


def test_the_head_of_a_probe_starts_a_probe_and_no_other_classifier(quick, checkpoint, tmp_path, caplog):
    caplog.set_level("INFO", "sparse_mhsa")
    probe = replace(quick, patch_size=2, linear_probe=True, batch_size=256)
    finetune(replace(probe, finetune=checkpoint))
    assert "new: head.0.num_batches_tracked, head.0.running_mean, head.0.running_var, head.1.bias" in caplog.text
    assert "; left out: head\n" in caplog.text
    path = (quick.output_dir / LAST).rename(tmp_path / "probe.pth")
    given = read_checkpoint(path)["model"]
    again = build_model(replace(probe, finetune=path), load_data(probe)).state_dict()
    assert all(torch.equal(again[name], value) for name, value in given.items())

    caplog.clear()
    whole = build_model(replace(quick, patch_size=2, finetune=path), load_data(quick)).state_dict()
    assert "new: head.bias, head.weight; left out: head\n" in caplog.text
    assert torch.equal(whole["patch_embed.proj.weight"], given["patch_embed.proj.weight"])


# A plan instead of a run.


def test_a_dry_run_trains_nothing_and_says_what_a_run_takes(quick, attn_cfg, caplog):
    caplog.set_level("INFO", "sparse_mhsa")
    run = finetune(replace(quick, patch_size=2, attn_cfg=attn_cfg, dry_run=True))
    assert run.results == {}
    assert not quick.output_dir.exists()
    edges = sum(block.attn.mask(17).nnz for block in run.model.blocks)
    assert "1 epoch of 22 steps, 64 inputs each" in caplog.text
    assert f"17 tokens: {edges:,} edges over 4 layers and all heads" in caplog.text
    assert "MiB for the activations of a batch of 64" in caplog.text


@pytest.mark.parametrize("given", [[], ["--data-path", "nowhere"]], ids=["not given", "not there"])
def test_a_dry_run_of_a_published_data_set_needs_no_data(given, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    words = ["finetune", "--dataset", "cifar100", "--patch-size", "14", "--epochs", "2", "--dry-run", *given]
    assert main(words) == 0
    out = capsys.readouterr().out
    assert "the plan takes the published cifar100" in out
    assert "cifar100: 50,000 training and 10,000 test images" in out.replace("50000", "50,000").replace(
        "10000", "10,000"
    )
    assert "2 epochs of 781 steps, 64 inputs each" in out
    assert not list(tmp_path.iterdir())
    assert main([word for word in words if word != "--dry-run"]) == 2


def test_a_dry_run_that_cannot_know_the_size_says_what_is_missing(capsys):
    words = ["finetune", "--dataset", "imagefolder", "--data-path", "nowhere", "--nb-classes", "5", "--dry-run"]
    assert main(words) == 2
    assert "--data-path: no such folder: 'nowhere'" in capsys.readouterr().err


def test_a_dry_run_says_whether_the_output_folder_can_be_written(quick, tmp_path, monkeypatch, caplog):
    caplog.set_level("INFO", "sparse_mhsa")
    (tmp_path / "file").write_text("")
    for folder, message in (
        (tmp_path / "new" / "run", "which can be written; "),
        (tmp_path / "file" / "run", f"which cannot be made: '{tmp_path / 'file'}' is not a folder"),
    ):
        finetune(replace(quick, dry_run=True, output_dir=folder))
        assert f"per checkpoint in {folder}, {message}" in caplog.text
    monkeypatch.setattr(os, "access", lambda *_: False)
    finetune(replace(quick, dry_run=True, output_dir=tmp_path / "locked"))
    assert f"in {tmp_path / 'locked'}, which cannot be made: no permission for '{tmp_path}'" in caplog.text
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_a_dry_run_says_that_the_disk_is_too_small_for_the_checkpoints(quick, tmp_path, monkeypatch, caplog):
    caplog.set_level("INFO", "sparse_mhsa")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=2**20))
    finetune(replace(quick, dry_run=True, output_dir=tmp_path / "run"))
    assert "which has too little room for the 3 there are at a time; 1.0 MiB are free there" in caplog.text


# Several processes.


def launch(folder, processes, *arguments):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    recipe = "-m sparse_mhsa finetune --dist --patch-size 4 --epochs 2 --lr 2e-3 --drop-path 0"
    return subprocess.run(
        [*command, *recipe.split(), "--output-dir", str(folder), *arguments],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )


def test_two_processes_compute_what_one_does_with_the_same_global_batch(options, tmp_path, log_of):
    recipe = replace(options, patch_size=4, drop_path=0.0)
    alone = finetune(recipe)
    done = launch(tmp_path, 2, "--dataset", "digits", "--batch-size", "32", "--accum-iter", "2", "--dist-eval")
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("epoch 2/2") == 1
    log = log_of(tmp_path)
    for one, other in zip(log, alone.trainer.history, strict=True):
        assert one["train_lr"] == other["train_lr"]
        for key in ("train_loss", "test_loss"):
            assert one[key] == pytest.approx(other[key], rel=1e-3)
        assert math.isclose(one["test_acc1"], other["test_acc1"], abs_tol=0.6)
    state = read_checkpoint(tmp_path / LAST)
    assert len(state["rng"]) == state["args"]["world_size"] == 2
    with pytest.raises(UsageError, match="--world-size 2, this run has 1"):
        finetune(
            replace(recipe, batch_size=32, accum_iter=2, dist_url="env://", resume=tmp_path / LAST, output_dir=tmp_path)
        )


def test_two_processes_probe_as_one_does_and_test_what_they_save(options, tmp_path, log_of):
    recipe = replace(options, patch_size=4, linear_probe=True, lr=0.05)
    alone = finetune(recipe)
    words = ["--dataset", "digits", "--batch-size", "64", "--linear-probe", "--lr", "0.05", "--dist-eval"]
    done = launch(tmp_path, 2, *words)
    assert done.returncode == 0, done.stderr[-3000:]
    log = log_of(tmp_path)
    for one, other in zip(log, alone.trainer.history, strict=True):
        for key in ("train_loss", "test_loss"):
            assert one[key] == pytest.approx(other[key], rel=1e-5)
    saved = finetune(replace(recipe, batch_size=64, eval=True, resume=tmp_path / LAST, output_dir=tmp_path))
    assert saved.results["test_loss"] == pytest.approx(log[-1]["test_loss"], rel=1e-6)


def normalised_by_all(rank: int, meeting: str, images: torch.Tensor, grad: torch.Tensor, results: Path) -> None:
    """What one of two processes with four and three of seven images makes of them."""
    torch.distributed.init_process_group("gloo", init_method=meeting, rank=rank, world_size=2)
    norm = GatheredBatchNorm(images.shape[1], eps=1e-6).double()
    own = slice(0, 4) if rank == 0 else slice(4, 7)
    x = images[own].clone().requires_grad_()
    out = norm(x)
    out.backward(grad[own])
    torch.save({"out": out.detach(), "grad": x.grad, "state": norm.state_dict()}, results / f"{rank}.pt")
    torch.distributed.destroy_process_group()


def test_a_norm_of_uneven_batches_is_that_of_all_images_with_its_gradient_and_names(tmp_path):
    images = 100 + 3 * torch.randn(7, 5, dtype=torch.float64)
    grad = torch.randn_like(images)
    norm, x = nn.BatchNorm1d(5, eps=1e-6, affine=False).double(), images.clone().requires_grad_()
    out = norm(x)
    out.backward(grad)
    torch.multiprocessing.spawn(normalised_by_all, (f"file://{tmp_path / 'meeting'}", images, grad, tmp_path), 2)
    parts = [torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1)]
    torch.testing.assert_close(torch.cat([part["out"] for part in parts]), out.detach(), atol=1e-10, rtol=0)
    torch.testing.assert_close(torch.cat([part["grad"] for part in parts]), x.grad, atol=1e-10, rtol=0)
    for part in parts:
        torch.testing.assert_close(part["state"], dict(norm.state_dict()))


@pytest.mark.parametrize("part", ["train", pytest.param("val", marks=pytest.mark.slow)])
def test_an_image_that_one_process_cannot_read_stops_all_of_them_and_costs_nothing(
    options, image_root, tmp_path, log_of, part
):
    recipe = replace(options, dataset="imagefolder", data_path=image_root, patch_size=4, batch_size=8, drop_path=0.0)
    data = load_data(recipe)
    # Of the last step of the first epoch, or of the second process's share of the test images.
    index = list(EpochOrder(24, options.seed))[-1]
    broken = Path((data.train.samples[index] if part == "train" else data.test.samples[1])[0])
    content = broken.read_bytes()
    broken.write_bytes(content[: len(content) // 2])
    words = ["--dataset", "imagefolder", "--data-path", str(image_root), "--batch-size", "4", "--dist-eval"]
    done = launch(tmp_path, 2, *words)
    assert done.returncode != 0
    assert f"error: {broken}: not a readable image: " in done.stderr
    assert f"continue with --resume {tmp_path / LAST}" in done.stderr
    assert "Error(s)" not in done.stderr
    state = read_checkpoint(tmp_path / LAST)
    assert (state["epoch"], state["step"]) == (0, 2 if part == "train" else 3)

    broken.write_bytes(content)
    done = launch(tmp_path, 2, *words, "--resume", str(tmp_path / LAST))
    assert done.returncode == 0, done.stderr[-3000:]
    straight = finetune(recipe)
    for one, other in zip(log_of(tmp_path), straight.trainer.history, strict=True):
        for key in ("train_loss", "test_loss"):
            assert one[key] == pytest.approx(other[key], rel=1e-3)


@pytest.fixture
def open_mpi(monkeypatch):
    """What mpirun tells a process."""
    for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR"):
        monkeypatch.delenv(name, raising=False)

    def start(rank, size):
        for name, value in (("RANK", rank), ("SIZE", size), ("LOCAL_RANK", rank)):
            monkeypatch.setenv(f"OMPI_COMM_WORLD_{name}", str(value))

    return start


@pytest.mark.slow
def test_open_mpi_starts_processes_too(tmp_path, open_mpi):
    recipe = ["--dataset", "digits", "--patch-size", "4", "--epochs", "1", "--batch-size", "64", "--lr", "2e-3"]
    place = f"file://{tmp_path / 'meeting'}"
    words = ["finetune", "--dist", "--dist-on-itp", "--dist-url", place, *recipe, "--output-dir", str(tmp_path / "run")]
    processes = []
    for rank in (0, 1):
        open_mpi(rank, 2)
        env = {**os.environ, "OMP_NUM_THREADS": "1"}
        start = [sys.executable, "-m", "sparse_mhsa", *words]
        processes.append(subprocess.Popen(start, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True))
    outputs = [process.communicate(timeout=240)[0] for process in processes]
    assert [process.returncode for process in processes] == [0, 0], outputs
    assert "epoch 1/1" in outputs[0]
    assert outputs[1] == ""
    assert read_checkpoint(tmp_path / "run" / LAST)["args"]["world_size"] == 2


def test_open_mpi_without_an_address_says_how_to_give_one(options, open_mpi):
    open_mpi(0, 2)
    with pytest.raises(UsageError, match=r"--dist-url env://: .*MASTER_ADDR.*give --dist-url tcp://HOST:PORT"):
        finetune(replace(options, dist=True, dist_on_itp=True))


def test_processes_that_were_not_meant_to_train_together_are_refused(options, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UsageError, match="WORLD_SIZE is 2, but --dist is not given"):
        finetune(options)


def test_the_defaults_are_those_of_the_recipe():
    options = FinetuneOptions()
    assert (options.weight_decay, options.smoothing, options.min_lr, options.blr) == (0.05, 0.1, 1e-6, 1e-3)
    assert (options.drop_path, options.mixup_prob, options.mixup_switch_prob, options.remode) == (
        0.1,
        1.0,
        0.5,
        "pixel",
    )
