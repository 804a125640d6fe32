"""The accuracy table: methods at the same budget, runs that are never done twice, and what it writes."""

import csv
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from types import SimpleNamespace

import pytest

pytest.importorskip("timm")
pytest.importorskip("sklearn")
pytest.importorskip("matplotlib")

import torch

import sparse_mhsa as sm
from sparse_mhsa.bench import accuracy_timing
from sparse_mhsa.bench.accuracy_methods import METHODS, solve_methods
from sparse_mhsa.cli import main
from sparse_mhsa.flops import attention_cost
from sparse_mhsa.train.datasets import digits
from sparse_mhsa.train.models import build_model
from sparse_mhsa.train.recipes import FinetuneOptions

pytestmark = pytest.mark.slow  # trains in many processes

TOKENS = 65
BUDGET = 0.0003
"""A seventh of dense attention."""
NO_PARAMETER = {"dense", "efficient", "fibottention-crossdiag"}


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return build_model(FinetuneOptions(dataset="digits"), digits())


@pytest.fixture(scope="module")
def solved(model):
    return {method.name: method for method in solve_methods(model, TOKENS, METHODS, BUDGET)}


@pytest.mark.parametrize("name", METHODS)
def test_a_method_meets_the_budget_as_closely_as_its_parameter_allows(model, solved, name):
    method = solved[name]
    if name == "dense":
        assert method.config is None
        assert method.cost.sparse() == method.cost.dense()
        return
    again = sm.load_config(method.config)
    sm.sparsify(model, again)
    assert attention_cost(model, TOKENS).sparse() == method.cost.sparse()
    sm.densify(model)
    if name in NO_PARAMETER:
        assert method.value is None
        return
    assert method.cost.sparse() == pytest.approx(BUDGET, rel=0.35)

    # A neighbouring value is no closer.
    document = json.loads(again.to_json())
    if name == "linformer":
        kwargs = document["backend_kwargs"]["projector"]
        key, step = "r", 1
    elif name == "efficient-local":
        kwargs, key, step = document["backend_kwargs"], "block_size", 1
    else:
        kwargs, key = document["mask_kwargs"], METHODS[name].parameter
        step = {"keep_ratio": 0.05, "kernel_size": 2}.get(key, 1)
    for value in neighbours(method.value, step):
        kwargs[key] = value
        try:
            sm.sparsify(model, document)
        except ValueError:  # outside the range of the parameter
            continue
        other = attention_cost(model, TOKENS).sparse()
        assert abs(other - BUDGET) >= abs(method.cost.sparse() - BUDGET) - 1e-12
    sm.densify(model)


def neighbours(value, step):
    """A step up and down, of a list by axis along each of its axes."""
    if not isinstance(value, list):
        return [value - step, value + step]
    changes = [
        [step * sign * (axis == along) for axis in range(len(value))] for along in range(len(value)) for sign in (-1, 1)
    ]
    return [[number + change for number, change in zip(value, one, strict=True)] for one in changes]


def test_the_default_budget_is_that_of_the_published_method(model):
    budgeted = {method.name: method for method in solve_methods(model, TOKENS, ["fibottention", "random"], None)}
    assert budgeted["fibottention"].value is None
    assert budgeted["random"].cost.sparse() == pytest.approx(budgeted["fibottention"].cost.sparse(), rel=0.2)
    assert all(type(block.attn).__name__ == "Attention" for block in model.blocks)


RECIPE = ["--dataset", "digits", "--patch-size", "4", "--epochs", "1", "--batch-size", "256", "--drop-path", "0"]


def table(folder, *more, recipe=RECIPE, methods=("dense", "topk"), seeds=("0", "1")):
    words = ["bench", "accuracy", "--methods", *methods, "--seeds", *seeds, "--output-dir", str(folder)]
    return main([*words, "--budget", "0.000006", "--threads", "1", *more, "--", *recipe])


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp("table")
    assert table(folder, "--jobs", "2") == 0
    return folder


def test_every_row_has_its_numbers_and_the_commands_that_made_it(finished):
    report = json.loads((finished / "accuracy.json").read_text())
    assert [row["method"] for row in report["rows"]] == ["dense", "topk"]
    for row in report["rows"]:
        assert row["seeds"] == [0, 1]
        for seed, accuracy, command in zip(row["seeds"], row["test_acc1"], row["commands"], strict=True):
            folder = finished / row["method"] / f"seed-{seed}"
            (entry,) = [json.loads(line) for line in (folder / "log.txt").read_text().splitlines()]
            assert entry["test_acc1"] == accuracy
            assert command == (folder / "command.txt").read_text().strip()
            assert f"--seed {seed}" in command
        assert 0 < row["train_ms"]["lower_quartile"] <= row["train_ms"]["median"]
        assert row["inference_ms"]["median"] > 0
        assert row["gflops"] == pytest.approx(2 * row["gmacs"])
        assert min(row["peak_memory"]) > 50 * 2**20
    with (finished / "accuracy.csv").open() as file:
        lines = list(csv.DictReader(file))
    assert [(line["method"], line["seed"]) for line in lines] == [
        ("dense", "0"),
        ("dense", "1"),
        ("topk", "0"),
        ("topk", "1"),
    ]
    text = (finished / "accuracy.md").read_text()
    mean = sum(report["rows"][1]["test_acc1"]) / 2
    assert f"| top-k by score | {report['rows'][1]['value']:g} | {mean:.2f} |" in text
    page = (finished / "accuracy.html").read_text()
    assert page.count("<svg") == 1
    assert "http" not in page.replace("http://www.w3.org", "")


def test_a_row_is_made_again_by_the_command_beside_it(finished, tmp_path):
    report = json.loads((finished / "accuracy.json").read_text())
    words = report["rows"][1]["commands"][0].split()
    folder = words.index("--output-dir") + 1
    words[folder] = str(tmp_path)
    torch.set_num_threads(1)
    assert main(words[1:]) == 0
    again = json.loads((tmp_path / "log.txt").read_text())
    assert again["test_acc1"] == report["rows"][1]["test_acc1"][0]


def test_what_is_finished_is_not_done_again(finished, capsys):
    before = (finished / "dense" / "seed-0" / "log.txt").stat().st_mtime_ns
    assert table(finished) == 0
    assert "4 runs, 4 of them finished before" in capsys.readouterr().out
    assert (finished / "dense" / "seed-0" / "log.txt").stat().st_mtime_ns == before


@pytest.mark.parametrize("stage", ["finished", "under way"])
def test_a_run_whose_checkpoint_was_cut_is_to_be_removed_and_made_again(finished, tmp_path, capsys, stage):
    folder = shutil.copytree(finished, tmp_path / "table")
    run = folder / "dense" / ("seed-0" if stage == "finished" else "seed-1")
    path = run / "checkpoint-last.pth"
    path.write_bytes(path.read_bytes()[:-1000])
    if stage == "under way":
        (run / "log.txt").unlink()
    assert table(folder) == 2
    assert capsys.readouterr().err == (
        f"error: '{path}' is not a readable checkpoint: it is cut, damaged or of another kind; "
        f"remove the folder '{run}', and the same command makes its run again\n"
    )
    shutil.rmtree(run)
    assert table(folder) == 0
    assert "4 runs, 3 of them finished before" in capsys.readouterr().out


def test_a_run_goes_on_from_its_best_checkpoint_where_the_disk_was_full_for_the_last(finished, tmp_path, capsys):
    folder = shutil.copytree(finished, tmp_path / "table")
    run = folder / "dense" / "seed-1"
    for name in ("checkpoint-last.pth", "log.txt", "output.txt"):
        (run / name).unlink()
    assert table(folder) == 0
    assert "4 runs, 3 of them finished before" in capsys.readouterr().out
    assert f"resuming {run / 'checkpoint-best.pth'} at epoch 2" in (run / "output.txt").read_text()


def test_a_folder_keeps_to_one_recipe_and_budget(finished, capsys):
    assert table(finished, recipe=[*RECIPE, "--lr", "0.1"]) == 2
    assert "holds runs of another recipe" in capsys.readouterr().err
    assert table(finished, "--budget", "0.00001") == 2
    assert "holds another configuration" in capsys.readouterr().err


def test_a_budget_below_one_key_for_each_query_names_the_option(tmp_path, capsys):
    assert table(tmp_path / "none", "--budget", "1e-7", "--dry-run") == 2
    assert "--budget: flops: expected at least one key for each query" in capsys.readouterr().err


def test_a_dry_run_prints_the_plan(tmp_path, capsys):
    assert table(tmp_path / "none", "--dry-run") == 0
    out = capsys.readouterr().out
    assert "topk, k" in out
    assert out.count("sparse-mhsa finetune --dataset digits") == 4
    assert re.search(rf"files: 2\.3 MiB per checkpoint in {tmp_path / 'none'}, which can be written; .* are free", out)
    assert not (tmp_path / "none").exists()


def test_a_dry_run_says_whether_the_runs_could_be_written(tmp_path, monkeypatch, capsys):
    (tmp_path / "file").write_text("")
    assert table(tmp_path / "file" / "none", "--dry-run") == 0
    assert f"which cannot be made: '{tmp_path / 'file'}' is not a folder" in capsys.readouterr().out
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=20 * 2**20))
    assert table(tmp_path / "none", "--dry-run", seeds=("0",)) == 0
    assert "which can be written" in capsys.readouterr().out
    assert table(tmp_path / "none", "--dry-run") == 0
    assert "which has too little room for the 9 there are at a time; 20.0 MiB are free there" in capsys.readouterr().out


def test_runs_over_several_processes_say_how_they_are_started(tmp_path, capsys):
    assert table(tmp_path, "--nproc-per-node", "2", seeds=("0",), methods=("dense",)) == 0
    (row,) = json.loads((tmp_path / "accuracy.json").read_text())["rows"]
    (command,) = row["commands"]
    assert command.startswith("torchrun --standalone --nproc-per-node=2 -m sparse_mhsa finetune --dataset digits ")
    assert command.endswith(" --dist")
    (entry,) = [json.loads(line) for line in (tmp_path / "dense" / "seed-0" / "log.txt").read_text().splitlines()]
    assert [entry["test_acc1"]] == row["test_acc1"]


def test_times_are_those_of_the_precision_that_was_trained_in(monkeypatch):
    recipe = FinetuneOptions(dataset="digits", patch_size=4, batch_size=8, amp="bf16")
    seen = []
    model = build_model(recipe, digits())
    model.head.register_forward_hook(lambda *given: seen.append(given[2].dtype))
    monkeypatch.setattr(accuracy_timing, "build_model", lambda *_: model)
    monkeypatch.setattr(
        accuracy_timing, "read_checkpoint", lambda _: {"model": model.state_dict(), "epoch": 1, "step": 0}
    )
    (dense,) = solve_methods(model, 5, ["dense"], None)
    accuracy_timing.measure(recipe, digits(), [dense], {"dense": None})
    assert set(seen) == {torch.bfloat16}


def test_times_are_those_of_the_masks_of_the_last_epoch(monkeypatch):
    recipe = FinetuneOptions(dataset="digits", patch_size=4, batch_size=8)
    model = build_model(recipe, digits())
    (drawn,) = solve_methods(model, 5, ["random"], 0.000006)
    state = {"model": model.state_dict(), "epoch": 3, "step": 0}
    monkeypatch.setattr(accuracy_timing, "build_model", lambda *_: model)
    monkeypatch.setattr(accuracy_timing, "read_checkpoint", lambda _: state)
    accuracy_timing.measure(recipe, digits(), [drawn], {"random": None})
    assert {block.attn.layer_mask.epoch for block in model.blocks} == {2}


@pytest.mark.parametrize(
    ("more", "recipe", "message"),
    [
        (["--methods", "magic"], RECIPE, "--methods: there is no 'magic'; allowed: dense, random"),
        (["--seeds", "1", "1"], RECIPE, "--seeds must be different, got 1 1"),
        ([], ["--epochs", "0"], "--epochs must be at least 1"),
        ([], ["--resume", "x.pth"], "--resume after -- is set by bench accuracy itself"),
        ([], ["--seed=0"], "--seed after -- is set by bench accuracy itself"),
        ([], [*RECIPE, "--overwrite"], "--overwrite after -- has no meaning: what is finished is kept"),
        ([], ["--eval"], "--eval after -- trains nothing, and the table is of trained models"),
        ([], [*RECIPE, "--two-branch"], "--two-branch after -- trains a decoder too, and budgets and times"),
        ([], ["--output-dir", "here"], "--output-dir after -- is set by bench accuracy itself"),
        ([], ["--epoch", "3"], "unrecognized arguments: --epoch 3 (see sparse-mhsa finetune --help)"),
    ],
)
def test_bad_usage_is_named(tmp_path, capsys, more, recipe, message):
    assert table(tmp_path, *more, recipe=recipe) == 2
    err = capsys.readouterr().err
    assert message in err
    assert err.count("\n") == 1


@pytest.mark.parametrize(
    "interrupt",
    [lambda pid: os.killpg(pid, signal.SIGINT), lambda pid: os.kill(pid, signal.SIGTERM)],
    ids=["Ctrl-C", "SIGTERM"],
)
def test_a_signal_stops_the_runs_where_they_are_and_the_same_command_goes_on(tmp_path, interrupt):
    """A terminal sends Ctrl-C to the whole group, a batch system SIGTERM to the one process that it started."""
    words = ["bench", "accuracy", "--methods", "dense", "topk", "--seeds", "0", "--threads", "1", "--budget", "0.00001"]
    words += ["--output-dir", str(tmp_path), "--", *RECIPE, "--epochs", "8"]
    start = [sys.executable, "-m", "sparse_mhsa", *words]
    # A group of its own, as a terminal gives to a command: Ctrl-C reaches every process in it.
    options = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    process = subprocess.Popen(start, start_new_session=True, **options)
    log = tmp_path / "dense" / "seed-0" / "log.txt"
    while not log.is_file():
        assert process.poll() is None
        time.sleep(0.01)
    interrupt(process.pid)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "interrupted; the same command goes on where the runs stopped" in output
    assert "failed" not in output
    assert "seed 0: stopped" in output
    assert "continue with --resume" in (log.parent / "output.txt").read_text()
    assert main(words) == 0
    assert [json.loads(line)["epoch"] for line in log.read_text().splitlines()] == list(range(8))


def test_a_run_that_fails_leaves_the_others(tmp_path, capsys):
    assert (
        table(tmp_path, recipe=[*RECIPE, "--lr", "1e30", "--warmup-epochs", "0"], seeds=("0",), methods=("dense",)) == 1
    )
    err = capsys.readouterr().err
    assert re.search(r"1 of 1 runs failed, the first is .*seed-0 \(error: the loss is (nan|inf)", err)
    assert "error: the loss is" in (tmp_path / "dense" / "seed-0" / "output.txt").read_text()
