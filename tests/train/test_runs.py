"""Runs: what they write, and that they can be stopped and continued anywhere without a trace."""

import errno
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace

import pytest
import torch

from sparse_mhsa.cli import main
from sparse_mhsa.train import TrainingError, UsageError, engine, lock
from sparse_mhsa.train.checkpoint import read_checkpoint, trained_epoch, write_checkpoint
from sparse_mhsa.train.datasets import load_data
from sparse_mhsa.train.engine import BEST, LAST, LOG, Interrupted, Trainer
from sparse_mhsa.train.finetune import finetune
from sparse_mhsa.train.lock import LOCK, locked, runner
from sparse_mhsa.train.models import build_model
from sparse_mhsa.train.recipes import FinetuneOptions

MEASURES = ("train_loss", "train_acc1", "test_loss", "test_acc1", "test_acc5")
TIMES = ("step_time", "attention_time", "train_time", "peak_memory")


@pytest.mark.parametrize("sparse", [False, True], ids=["dense", "sparse"])
def test_a_run_writes_a_log_line_per_epoch_and_checkpoints_without_code_in_them(options, attn_cfg, log_of, sparse):
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
    assert state["best"] == max(entry["test_acc1"] for entry in log)


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
def test_an_interrupted_run_continues_bitwise(straight, tmp_path, stopped_after, log_of, without_times, steps):
    """In the first step, inside an epoch, in its last step, in the first of the next and inside that."""
    stopped = replace(straight.options, output_dir=tmp_path)
    state = read_checkpoint(stopped_after(stopped, steps))
    assert state["epoch"] * 11 + state["step"] == steps

    resumed = finetune(replace(stopped, resume=tmp_path / LAST))
    for key, value in straight.model.state_dict().items():
        assert torch.equal(value, resumed.model.state_dict()[key]), key
    assert without_times(log_of(tmp_path)) == without_times(straight.trainer.history)
    assert resumed.trainer.best_value == straight.trainer.best_value


def test_a_run_interrupted_while_testing_does_not_train_that_epoch_again(
    straight, tmp_path, monkeypatch, without_times
):
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


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("to", ["the process", "its group"])
def test_ctrl_c_and_sigterm_stop_the_command_with_130_and_a_loadable_checkpoint(tmp_path, log_of, number, to):
    """To a group as terminals, batch systems, ``timeout`` and torchrun send it, loader processes included."""
    folder = tmp_path / "run"
    sizes = f"--input-size 8 --patch-size 2 --epochs 500 --num-workers {2 * (to == 'its group')}"
    recipe = f"finetune --dataset digits {sizes} --output-dir"
    process = subprocess.Popen(
        [sys.executable, "-m", "sparse_mhsa", *recipe.split(), str(folder)],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        deadline = time.monotonic() + 200
        while not (folder / LOG).exists():  # one epoch is done, the next is under way
            assert process.poll() is None, process.communicate()[1]
            assert time.monotonic() < deadline
            time.sleep(0.05)
        if to == "its group":
            os.killpg(process.pid, number)
        process.send_signal(number)
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


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_before_the_first_step_is_told_too(monkeypatch, capsys, number):
    from sparse_mhsa.train import finetune as command

    monkeypatch.setattr(command, "build_model", lambda *_: os.kill(os.getpid(), number))
    assert main(["finetune", "--dataset", "digits"]) == 130
    assert capsys.readouterr().err == "interrupted\n"


@pytest.mark.parametrize(("epochs", "resumed"), [(0, False), (1, False), (0, True)])
def test_a_full_disk_says_how_to_go_on(options, checkpoint, monkeypatch, epochs, resumed):
    """From the last checkpoint of this very run, which need not be in its folder yet."""
    written = 0

    def full_after(path, state):
        nonlocal written
        if written == 2 * epochs:
            raise TrainingError(f"cannot write '{path}'")
        write_checkpoint(path, state)
        written += 1

    options.output_dir.mkdir()
    shutil.copy(checkpoint, options.output_dir / LAST)  # of another run, whatever happens
    monkeypatch.setattr(engine, "write_checkpoint", full_after)
    last = checkpoint if resumed else options.output_dir / LAST if epochs else None
    with pytest.raises(TrainingError, match=r"cannot write '.*\.pth'") as raised:
        finetune(replace(options, drop_path=0.1, resume=checkpoint if resumed else None, overwrite=True))
    assert str(raised.value).partition("'; ")[2] == (
        "" if last is None else f"once that is mended, continue with --resume {last}"
    )


def test_a_full_disk_between_last_and_best_loses_neither(straight, tmp_path, monkeypatch, without_times):
    """A run goes on from what was written before, and finds the best again."""
    written = []

    def second_does_not_fit(path, state):
        written.append(path.name)
        if len(written) == 4:
            raise TrainingError(f"cannot write '{path}'")
        write_checkpoint(path, state)

    run = replace(straight.options, output_dir=tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(engine, "write_checkpoint", second_does_not_fit)
        with pytest.raises(TrainingError, match="cannot write"):
            finetune(run)
    resumed = finetune(replace(run, resume=tmp_path / LAST))
    best = read_checkpoint(tmp_path / BEST)
    assert best["history"][-1]["test_acc1"] == best["best"] == resumed.trainer.best_value
    assert without_times(resumed.trainer.history) == without_times(straight.trainer.history)


@pytest.mark.parametrize("epochs", [1, 2])
def test_a_disk_full_for_the_first_last_checkpoint_leaves_the_best_to_go_on_from(
    straight, tmp_path, monkeypatch, without_times, log_of, epochs
):
    def only_best_fits(path, state):
        if path.name == LAST:
            raise TrainingError(f"cannot write '{path}'")
        write_checkpoint(path, state)

    run = replace(straight.options, output_dir=tmp_path, epochs=epochs)
    with monkeypatch.context() as patch:
        patch.setattr(engine, "write_checkpoint", only_best_fits)
        with pytest.raises(TrainingError, match=f"{LAST}'; once .* mended, continue with --resume {tmp_path / BEST}$"):
            finetune(run)
    with pytest.raises(UsageError, match=occupied(tmp_path, f"--resume {tmp_path / BEST}")):
        finetune(run)
    resumed = finetune(replace(run, resume=tmp_path / BEST))
    assert read_checkpoint(tmp_path / LAST)["epoch"] == len(log_of(tmp_path)) == epochs
    if epochs == straight.options.epochs:
        assert without_times(resumed.trainer.history) == without_times(straight.trainer.history)


def test_the_largest_seed_trains_and_resumes(options):
    run = replace(options, epochs=1, seed=2**63 - 1)
    finetune(run)
    assert finetune(replace(run, epochs=2, resume=options.output_dir / LAST)).trainer.epoch == 2


def test_a_linear_probe_is_tested_in_batches_of_one(options):
    probe = replace(options, epochs=1, linear_probe=True, patch_size=4, drop_path=0.1)
    trained = finetune(probe)
    seen = finetune(replace(probe, batch_size=1, resume=options.output_dir / LAST, eval=True))
    assert seen.results["test_acc1"] == trained.results["test_acc1"]


def test_evaluation_repeats_the_accuracy_of_the_checkpoint(options):
    trained = finetune(replace(options, epochs=1))
    seen = finetune(replace(options, resume=options.output_dir / LAST, eval=True))
    assert seen.results == {key: trained.trainer.history[-1][key] for key in seen.results}


@pytest.mark.parametrize("change", [{"two_branch": True}, {"cls_token": True}], ids=lambda change: next(iter(change)))
def test_weights_of_a_model_that_pools_otherwise_come_with_another_final_norm(options, change, caplog):
    """The default model normalises the mean of the patches, these all tokens: what was learned for one is new there."""
    caplog.set_level("INFO", "sparse_mhsa")
    first = finetune(replace(options, epochs=1))
    second = replace(options, finetune=options.output_dir / BEST, **change)
    model = build_model(second, load_data(second))
    assert torch.equal(model.blocks[0].attn.qkv.weight, first.model.blocks[0].attn.qkv.weight)
    assert torch.equal(model.norm.weight, torch.ones(64))
    assert "norm.bias, norm.weight" in caplog.text


CHANGING = {
    "random": "mask: random\nmask_kwargs: {k: 3}\n",
    "bigbird": "mask: bigbird\nmask_kwargs: {num_random: 2}\n",
    "topk": "mask: topk\nmask_kwargs: {k: 12, k_schedule: {kind: linear, k_start: 12, k_end: 2, epochs: 2}}\n",
}
"""Masks that are others in every epoch."""


@pytest.mark.parametrize("name", CHANGING)
def test_evaluation_sees_the_masks_of_the_epoch_that_the_checkpoint_was_tested_in(options, tmp_path, name):
    (tmp_path / "changing.yaml").write_text(CHANGING[name])
    run = replace(options, attn_cfg=tmp_path / "changing.yaml")
    history = finetune(run).trainer.history
    for checkpoint in (LAST, BEST):
        path = run.output_dir / checkpoint
        seen = finetune(replace(run, resume=path, eval=True)).results
        (logged,) = [entry for entry in history if entry["epoch"] == read_checkpoint(path)["epoch"] - 1]
        assert seen == {key: logged[key] for key in seen}


def test_averaged_weights_see_the_masks_of_the_epoch(options, tmp_path):
    (tmp_path / "changing.yaml").write_text(CHANGING["random"])
    trainer = finetune(replace(options, attn_cfg=tmp_path / "changing.yaml", model_ema=0.9)).trainer
    assert trainer.ema.module.blocks[0].attn.mask(17) == trainer.model.blocks[0].attn.mask(17)


def test_a_finished_run_that_is_resumed_has_the_masks_of_its_last_epoch(options, tmp_path):
    (tmp_path / "changing.yaml").write_text(CHANGING["random"])
    first = finetune(replace(options, attn_cfg=tmp_path / "changing.yaml"))
    again = finetune(replace(options, resume=options.output_dir / LAST))
    assert again.model.blocks[0].attn.mask(17) == first.model.blocks[0].attn.mask(17)


def test_weights_inside_an_epoch_were_last_trained_in_it(options, stopped_after):
    state = read_checkpoint(stopped_after(options, 13))
    assert (state["epoch"], state["step"], trained_epoch(state)) == (1, 2, 1)


def test_initial_weights_come_from_a_checkpoint_with_another_head(options):
    first = finetune(replace(options, epochs=1))
    second = replace(options, finetune=options.output_dir / BEST, nb_classes=12)
    model = build_model(second, load_data(second))
    assert torch.equal(model.blocks[0].attn.qkv.weight, first.model.blocks[0].attn.qkv.weight)
    assert model.head.weight.shape == (12, 64)


def test_a_loss_that_is_not_finite_stops_the_run(options):
    with pytest.raises(TrainingError, match=r"loss is (nan|inf)"):
        finetune(replace(options, lr=1e30, min_lr=0.0, epochs=1, warmup_epochs=0.0))


# The page.

FINETUNE_DIGITS = ("finetune", "--dataset", "digits", "--patch-size", "2")


@pytest.mark.parametrize("more", [[], ["--linear-probe"], ["--model-ema", "0.9"]], ids=["", "probe", "averaged"])
def test_the_command_writes_a_page_with_curves_and_masks(attn_cfg, tmp_path, capsys, more):
    words = [*FINETUNE_DIGITS, "--epochs", "2", "--batch-size", "256", "--output-dir"]
    assert main([*words, str(tmp_path), "--attn-cfg", str(attn_cfg), *more]) == 0
    assert f"report: {tmp_path / 'report.html'}" in capsys.readouterr().out
    page = (tmp_path / "report.html").read_text()
    assert page.count("<svg") == 1
    for shown in ("Loss", "Top-1 (%)", "Learning rate", "fibottention", "<th>blocks.3.attn</th>", "defaults filled in"):
        assert shown in page
    assert ("averaged weights" in page) == ("--model-ema" in more)
    assert ("Linear probe" in page) == ("--linear-probe" in more)
    assert f"sparse-mhsa {' '.join(words)} {tmp_path}" in page


def test_evaluation_and_plans_write_no_page(checkpoint, tmp_path):
    words = [*FINETUNE_DIGITS, "--batch-size", "128", "--output-dir", str(tmp_path)]
    assert main([*words, "--dry-run"]) == 0
    assert main([*words, "--epochs", "1", "--eval", "--resume", str(checkpoint)]) == 0
    assert not list(tmp_path.glob("*.html"))


# Output folders.


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def occupied(folder, way):
    return rf"^--output-dir: '{folder}' holds .*{way}, .* a new folder, .*--overwrite"


def test_starting_over_where_a_run_is_is_refused_and_costs_nothing(options, checkpoint, interrupt_in, monkeypatch):
    finetune(replace(options, epochs=1))
    before = contents(options.output_dir)
    monkeypatch.setattr(Trainer, "_train_step", interrupt_in(1))
    with pytest.raises(UsageError, match=occupied(options.output_dir, f"--resume {options.output_dir / LAST}")):
        finetune(options)
    with pytest.raises(UsageError, match=occupied(options.output_dir, f"--output-dir {checkpoint.parent}")):
        finetune(replace(options, resume=checkpoint))  # another run than that of the folder
    assert contents(options.output_dir) == before


def test_overwrite_leaves_nothing_of_the_earlier_run(options, interrupt_in, monkeypatch, without_times):
    finetune(options, "sparse-mhsa finetune")
    over = replace(options, overwrite=True, seed=1)
    monkeypatch.setattr(Trainer, "_train_step", interrupt_in(1))
    with pytest.raises(Interrupted):
        finetune(over)
    assert {
        name: len(content) for name, content in contents(options.output_dir).items() if name not in (LAST, LOCK)
    } == {LOG: 0}
    assert read_checkpoint(options.output_dir / LAST)["args"]["seed"] == 1
    resumed = finetune(replace(over, resume=options.output_dir / LAST))  # --overwrite may stay on the command line
    straight = finetune(replace(over, output_dir=options.output_dir / "straight"))
    assert without_times(resumed.trainer.history) == without_times(straight.trainer.history)


def test_overwrite_keeps_the_earlier_run_until_there_is_something_to_write(options):
    finetune(replace(options, epochs=1))
    before = contents(options.output_dir)
    with pytest.raises(TrainingError, match=r"loss is (nan|inf)"):
        finetune(replace(options, overwrite=True, lr=1e30, min_lr=0.0, epochs=1, warmup_epochs=0.0))
    assert contents(options.output_dir) == before


def test_a_plan_says_that_the_folder_holds_a_run(options, caplog):
    caplog.set_level("INFO", "sparse_mhsa")
    finetune(replace(options, epochs=1))
    before = contents(options.output_dir)
    caplog.clear()
    finetune(replace(options, dry_run=True))
    assert "plan: 2 epochs" in caplog.text
    assert f"--output-dir: '{options.output_dir}' holds a run" in caplog.text
    caplog.clear()
    finetune(replace(options, dry_run=True, overwrite=True))
    finetune(replace(options, dry_run=True, resume=options.output_dir / LAST))
    assert "holds a run" not in caplog.text
    assert contents(options.output_dir) == before


def test_a_folder_is_kept_to_one_run_at_a_time(options):
    run = replace(options, epochs=1)
    finetune(run)
    before = contents(options.output_dir)
    again = replace(run, epochs=2, resume=options.output_dir / LAST)
    message = rf"^--output-dir: another run is going on in '{options.output_dir}', process {os.getpid()} on .*: wait "
    with locked(options.output_dir):
        for second in (again, replace(run, overwrite=True)):
            with pytest.raises(UsageError, match=message):
                finetune(second)
        finetune(replace(run, resume=options.output_dir / LAST, eval=True))
        finetune(replace(run, dry_run=True))
        assert contents(options.output_dir) == before
    assert runner(options.output_dir) is None
    finetune(again)


def test_a_killed_run_leaves_its_folder_to_the_next(tmp_path):
    code = f"""
import os, signal
from pathlib import Path
from sparse_mhsa.train.lock import locked, runner
with locked(Path({str(tmp_path)!r})):
    assert runner(Path({str(tmp_path)!r})).startswith(f"process {{os.getpid()}} on "), "nobody"
    os.kill(os.getpid(), signal.SIGKILL)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (-signal.SIGKILL, "")
    assert (tmp_path / LOCK).read_text()
    with locked(tmp_path):
        pass


def test_a_lock_ends_with_its_run_whoever_was_forked_in_it(tmp_path, monkeypatch):
    """A loader process has the file open too; a copy of the descriptor stands for it."""
    taken = []
    flock = lock.fcntl.flock
    monkeypatch.setattr(lock.fcntl, "flock", lambda *given: (taken.append(os.dup(given[0].fileno())), flock(*given)))
    with locked(tmp_path):
        pass
    monkeypatch.undo()
    try:
        assert runner(tmp_path) is None
    finally:
        for copy in taken:
            os.close(copy)


def test_a_full_disk_leaves_the_lock_without_a_name(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "write", full)
    with locked(tmp_path):
        assert runner(tmp_path) == "another process"


@pytest.mark.parametrize("there", ["no such locks", "not on this disk"])
def test_where_there_are_no_locks_runs_go_without(tmp_path, monkeypatch, there):
    def refuse(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    if there == "no such locks":
        monkeypatch.setattr(lock, "fcntl", None)
    else:
        monkeypatch.setattr(lock.fcntl, "flock", refuse)
    with locked(tmp_path), locked(tmp_path):
        assert runner(tmp_path) is None


@pytest.mark.parametrize("command", ["pretrain", "video"])
def test_other_commands_do_not_start_over_either(command, tmp_path, capsys):
    (tmp_path / LAST).write_bytes(b"of a run")
    assert main([command, "--output-dir", str(tmp_path)]) == 2
    assert "--overwrite" in capsys.readouterr().err
    assert contents(tmp_path) == {LAST: b"of a run"}


def test_the_best_checkpoint_is_announced_where_it_is(options, checkpoint, tmp_path, caplog):
    state = torch.load(checkpoint, weights_only=True)
    state["history"][0]["test_acc1"] = state["best"] = 100.0  # never reached again
    first, second = tmp_path / "first", tmp_path / "second"
    first.mkdir()
    torch.save(state, first / LAST)
    caplog.set_level("INFO", "sparse_mhsa")
    resumed = replace(options, resume=first / LAST, output_dir=second)
    finetune(resumed)
    assert f"best test top-1 100.00 % in an earlier run's {BEST}, which is not beside {first / LAST}" in caplog.text
    assert not (second / BEST).exists()
    torch.save(state, first / BEST)
    finetune(replace(resumed, overwrite=True))
    assert f"best test top-1 100.00 % in {first / BEST}" in caplog.text
