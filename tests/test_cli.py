"""The `sparse-mhsa` command: what it prints, and how it fails."""

import argparse
import json
import os
import signal
import subprocess
import sys
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from sparse_mhsa import Mask, load_config
from sparse_mhsa.cli import build_parser, hyphenate, main

CONFIG = "attention:\n  mask: local\n  mask_kwargs:\n    window: 2\n"


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """The runs are tiny: more threads would only wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def local(tmp_path):
    path = tmp_path / "local.yaml"
    path.write_text(CONFIG)
    return path


@pytest.fixture
def run(capsys):
    """Calls the command with words, then with arguments that stay whole: exit code, stdout, stderr."""

    def call(words, *arguments):
        code = main([*words.split(), *map(str, arguments)])
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return call


def one_line_error(code, err):
    return code == 2 and err.startswith("error: ") and err.count("\n") == 1 and "Traceback" not in err


# Bad usage.


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("", "COMMAND"),
        ("train", "invalid choice: 'train'"),
        ("finetune --epoch 3", "unrecognized arguments: --epoch 3"),
        ("finetune --epochs three", "--epochs: invalid int value: 'three'"),
        ("finetune --dataset cifar", "--dataset: invalid choice: 'cifar'"),
        ("finetune --batch-size 0", "--batch-size must be at least 1, got 0"),
        ("finetune --dataset imagefolder", "--dataset imagefolder needs --data-path"),
        ("finetune --dataset imagefolder --data-path nowhere", "no such folder: 'nowhere'"),
        ("finetune --dataset digits --attn-cfg nowhere.yaml", "no such file: 'nowhere.yaml'"),
        ("finetune --dataset digits --resume nowhere.pth", "no such file: 'nowhere.pth'"),
        ("demo --dataset digits --attn-cfg nowhere.yaml", "no such file: 'nowhere.yaml'"),
        (
            "finetune --dataset digits --output-dir /dev/null/run",
            "--output-dir: cannot make the folder '/dev/null/run': Not a directory",
        ),
        ("masks nowhere.yaml --tokens 9 --heads 2", "no such file: 'nowhere.yaml'"),
        ("masks x.yaml --tokens 0 --heads 2", "--tokens: must be at least 1, got 0"),
        ("masks x.yaml --heads 2", "required: --tokens"),
        ("config check", "required: FILE"),
    ],
)
def test_bad_usage_is_one_line_on_stderr_and_exit_code_2(run, words, message):
    code, _, err = run(words)
    assert one_line_error(code, err)
    assert message in err


@pytest.mark.parametrize(
    ("text", "line", "message"),
    [
        (
            "attention:\n  mask: fibotention\n",
            2,
            "attention.mask: unknown mask `fibotention`: did you mean `fibottention`?",
        ),
        (
            "mask: local\nmask_kwargs:\n  windw: 3\n",
            3,
            "mask_kwargs.windw: unknown key `windw`: did you mean `window`?",
        ),
        ("mask: local\nmask_kwargs:\n  window: wide\n", 3, "mask_kwargs.window"),
        ("mask: [\n", 2, ""),
    ],
    ids=["unknown mask", "unknown key", "wrong type", "not YAML"],
)
@pytest.mark.parametrize(
    "command", ["config check", "masks --tokens 9 --heads 2", "finetune --attn-cfg", "demo --attn-cfg"]
)
def test_a_bad_configuration_is_named_by_file_line_and_key_before_anything_runs(
    run, tmp_path, command, text, line, message
):
    path = tmp_path / "bad.yaml"
    path.write_text(text)
    code, out, err = run(command, path)
    assert one_line_error(code, err)
    assert f"bad.yaml:{line}:" in err
    assert message in err
    assert out == ""


@pytest.mark.parametrize(
    ("command", "package", "extra"), [("finetune", "mlxtend", "train"), ("video --epochs 1", "av", "video")]
)
def test_a_missing_package_is_named_with_what_installs_it(run, monkeypatch, command, package, extra):
    from sparse_mhsa import train

    monkeypatch.setattr(train, "find_spec", lambda name: None if name == package else find_spec(name))
    code, _, err = run(command)
    assert one_line_error(code, err)
    assert f"{package} is not installed" in err
    assert f"pip install 'sparse_mhsa[{extra}]'" in err


def test_ctrl_c_exits_with_130_and_without_a_traceback(run, monkeypatch, local):
    def interrupt(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(Mask, "from_config", interrupt)
    code, _, err = run("masks --tokens 9 --heads 2", local)
    assert (code, err) == (130, "interrupted\n")


SHORT = RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes")


@pytest.mark.parametrize(
    "error", [SHORT, MemoryError(), ImportError("_image.so: failed to map segment from shared object")], ids=type
)
def test_running_out_of_memory_is_one_line_and_exit_code_1(run, monkeypatch, local, error):
    def short(*_, **__):
        raise error

    monkeypatch.setattr(Mask, "from_config", short)
    code, _, err = run("masks --tokens 9 --heads 2", local)
    assert (code, err) == (1, ": ".join(["error", "out of memory", *([str(error)] if str(error) else [])]) + "\n")


def test_an_error_that_nobody_expects_keeps_its_traceback(run, monkeypatch, local):
    def broken(*_, **__):
        raise RuntimeError("mat1 and mat2 shapes cannot be multiplied")

    monkeypatch.setattr(Mask, "from_config", broken)
    with pytest.raises(RuntimeError, match="mat1 and mat2"):
        run("masks --tokens 9 --heads 2", local)


@pytest.mark.parametrize("kind", ["kernels --no-plots", "latency"])
@pytest.mark.parametrize(("allocate", "what"), [("randn", "peak rate"), ("ones", "bandwidth")])
def test_a_machine_too_small_to_be_measured_says_what_did_not_fit(run, monkeypatch, tmp_path, kind, allocate, what):
    pytest.importorskip("timm")
    pytest.importorskip("matplotlib")

    def short(*_, **__):
        raise SHORT

    monkeypatch.setattr(torch, allocate, short)
    code, _, err = run(f"bench {kind} --output-dir", tmp_path)
    assert code == 1
    assert err.startswith("error: out of memory: measuring the ")
    assert what in err.partition(" DefaultCPUAllocator")[0]
    assert err.count("\n") == 1


# Options.


def test_underscores_and_hyphens_name_the_same_option_and_values_keep_theirs():
    given = ["finetune", "--output_dir=runs/my_run", "--batch_size", "snake_case", "--", "--a_b"]
    assert hyphenate(given) == [
        "finetune", "--output-dir=runs/my_run", "--batch-size", "snake_case", "--", "--a_b"
    ]  # fmt: skip


@pytest.mark.parametrize("command", ["finetune", "pretrain", "video", "demo"])
@pytest.mark.parametrize(
    ("words", "peak"), [("--blr=0.001", 0.0005), ("--blr 0.5", 0.25), ("--lr 0.5 --blr 0.1", 0.5), ("--lr=0.5", 0.5)]
)
def test_a_base_rate_that_is_given_wins_over_a_rate_that_is_only_the_default(monkeypatch, command, words, peak):
    for package in ("timm", "torchvision", "tqdm", "matplotlib"):
        pytest.importorskip(package)
    taken = []
    monkeypatch.setattr(f"sparse_mhsa.train.{command}.{command}", lambda options, _: taken.append(options.peak_lr))
    assert main([command, "--batch-size", "128", *words.split()]) == 0
    assert taken == [pytest.approx(peak)]


def test_every_option_is_documented(run):
    for command in ("finetune", "demo", "masks"):
        code, out, _ = run(f"{command} --help")
        assert code == 0
        assert "--help" in out
    code, out, _ = run("finetune --help")
    names = """dataset attn-cfg data-path model nb-classes epochs batch-size blr weight-decay warmup-epochs
        seed output-dir resume eval"""
    for name in names.split():
        assert f"--{name}" in out


def test_help_does_not_load_the_training_libraries():
    code = """
import sys
from sparse_mhsa.cli import main
assert main(["finetune", "--help"]) == 0
loaded = {"timm", "torchvision", "matplotlib", "sklearn", "mlxtend"} & set(sys.modules)
assert not loaded, loaded
"""
    subprocess.run([sys.executable, "-c", code], check=True, stdout=subprocess.DEVNULL)


def parsers(parser):
    yield parser
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for part in action.choices.values():
                yield from parsers(part)


@pytest.mark.parametrize("parser", list(parsers(build_parser())), ids=lambda parser: parser.prog)
def test_every_help_ends_with_examples_of_the_command(parser):
    text, _, examples = parser.format_help().partition("examples:\n")
    assert text
    lines = [line.strip() for line in examples.strip().splitlines()]
    assert lines
    first = [line for line in lines if line.startswith("sparse-mhsa") or "sparse_mhsa" in line]
    assert any(line.startswith(parser.prog) for line in first), lines


def test_the_module_is_the_command(local):
    done = subprocess.run(
        [sys.executable, "-m", "sparse_mhsa", "config", "check", str(local)], capture_output=True, text=True
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, f"{local}: ok\n", "")


# masks and config.


def test_masks_counts_what_the_mask_holds(run, local):
    """A window of 2 over 9 tokens: 3 + 4 + 5 * 5 + 4 + 3 = 39 of 81 entries."""
    code, out, _ = run("masks --tokens 9 --heads 2", local)
    assert code == 0
    rows = [line.split() for line in out.splitlines()]
    percent = "48.15%"
    assert ["0", "39", percent, "51.85%", "3", "5"] in rows
    assert ["1", "39", percent, "51.85%", "3", "5"] in rows
    assert ["all", "78", percent, "51.85%"] in rows


def test_masks_says_where_a_choice_by_content_is_to_be_seen(run, tmp_path):
    path = tmp_path / "topk.yaml"
    path.write_text("mask: topk")
    code, _, err = run("masks --tokens 9 --heads 2", path)
    assert one_line_error(code, err)
    assert "`topk` chooses keys by the content" in err
    assert "`choose_masks` shows them" in err


def test_masks_follows_layer_and_grid(run, tmp_path):
    path = tmp_path / "fibottention.yaml"
    path.write_text("mask: fibottention\n")
    tables = []
    for layer in (0, 1):
        code, out, _ = run(f"masks --tokens 50 --heads 4 --layer {layer}", path)
        assert code == 0
        mask = Mask.from_config(path, 50, 4, layer=layer)
        table = [line.split() for line in out.splitlines() if line.strip()[:1].isdigit()]
        assert [int(row[1]) for row in table] == mask.nnz_per_head
        for head, row in enumerate(table):
            degrees = mask.to_dense()[head].sum(dim=1)
            assert (int(row[4]), int(row[5])) == (degrees.min(), degrees.max())
        tables.append(table)
    assert tables[0] != tables[1]  # the heads are shuffled by layer


def test_masks_draws_every_head(run, local, tmp_path):
    pytest.importorskip("matplotlib")
    picture = tmp_path / "masks.png"
    code, out, _ = run("masks --tokens 9 --heads 2", local, "--plot", picture)
    assert code == 0
    assert str(picture) in out
    assert picture.read_bytes().startswith(b"\x89PNG")
    code, _, err = run("masks --tokens 9 --heads 2", local, "--plot", tmp_path / "masks.xyz")
    assert one_line_error(code, err)
    assert "--plot" in err


def test_config_check_goes_on_after_a_bad_file(run, local, tmp_path):
    bad = tmp_path / "bad.yaml"
    bad.write_text("mask: nothing\n")
    code, out, err = run("config check", bad, local)
    assert code == 2
    assert out == f"{local}: ok\n"
    assert "bad.yaml:1:" in err


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "mask: grid_window\nmask_kwargs: {window_size: 7, shift: 9}\ngrid: [14, 14]",
            "mask_kwargs.shift: expected 0 to 6, less than window_size, got 9",
        ),
        (
            "mask: neighborhood\nmask_kwargs: {kernel_size: 3, stride: 5, grid: [14, 14]}",
            "mask_kwargs.stride: expected 1 to 3, got 5",
        ),
        (
            "mask: space_time\nmask_kwargs: {kind: space}\ngrid: [14, 13]\nnum_heads: 6",
            "grid: space_time needs [T, H, W], got [14, 13]",
        ),
    ],
)
def test_config_check_tries_out_masks_whose_grid_it_knows(run, tmp_path, text, message):
    never = tmp_path / "never.yaml"
    never.write_text(text)
    code, out, err = run("config check", never)
    assert (code, out, err) == (2, "", f"error: {never}: {message}\n")


@pytest.mark.parametrize(
    "text",
    [
        "mask: grid_window\nmask_kwargs: {window_size: 7, shift: 9}",
        "mask: grid_window\nmask_kwargs: {window_size: 7, shift: 9}\ngrid: [14, 14]\n"
        "layers: {'.*': {mask_kwargs: {window_size: 7}}}",
        "mask: per_head\nmask_kwargs: {masks: [{mask: axial, heads: 2}, {mask: none}]}\ngrid: [14, 14]",
        "mask: random\nmask_kwargs: {k: [[1, 2, 3], [4, 5, 6]]}\ngrid: [14, 14]",
    ],
    ids=["no grid", "layers", "heads", "heads and layers"],
)
def test_config_check_takes_what_may_work_in_some_model(run, tmp_path, text):
    some = tmp_path / "some.yaml"
    some.write_text(text)
    assert run("config check", some) == (0, f"{some}: ok\n", "")


def test_the_shipped_configs_are_those_of_the_repository_and_all_valid(run):
    code, out, _ = run("config list")
    assert code == 0
    shipped = [Path(line) for line in out.splitlines()]
    repository = Path(__file__).parents[1] / "configs" / "attention"
    assert {path.name: path.read_text() for path in shipped} == {
        path.name: path.read_text() for path in repository.glob("*.yaml")
    }
    assert run("config check", *shipped)[0] == 0


def test_a_shipped_configuration_goes_by_its_name_unless_there_is_such_a_file(run, monkeypatch, tmp_path):
    pytest.importorskip("timm")
    monkeypatch.chdir(tmp_path)
    code, out, _ = run("masks local --tokens 9 --heads 1")
    assert code == 0
    assert out.startswith("local: 9 tokens")
    assert "bigbird.yaml: ok" in run("config check bigbird")[1]
    assert run("finetune --dataset digits --dry-run --attn-cfg vit_fibottention")[0] == 0
    (tmp_path / "local").write_text("mask: strided\nmask_kwargs: {stride: 3}\n")
    assert run("masks local --tokens 9 --heads 1")[1].startswith("strided: 9 tokens")
    code, _, err = run("masks locale --tokens 9 --heads 1")
    assert code == 2
    assert "no such file: 'locale'" in err


def test_a_dry_run_of_the_demo_plans_both_runs_and_leaves_no_file(run, monkeypatch, tmp_path, caplog):
    pytest.importorskip("timm")
    pytest.importorskip("matplotlib")
    monkeypatch.chdir(tmp_path)
    assert run("demo --dataset digits --patch-size 2 --dry-run")[0] == 0
    assert caplog.text.count("attention of the whole run, forward and backward") == 2
    assert list(tmp_path.iterdir()) == []


def test_the_demo_finds_its_configuration_from_any_folder(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    given = ["demo"]
    parsed = build_parser().parse_args(given, argparse.Namespace(given=given))
    assert load_config(parsed.attn_cfg).mask == "fibottention"


# The commands that train.


def test_finetune_prints_what_it_did_and_evaluates_its_checkpoint(run, local, tmp_path):
    pytest.importorskip("timm")
    recipe = "finetune --dataset digits --patch_size 2 --batch_size 256 --epochs 1"
    given = ("--attn_cfg", local, "--output_dir", tmp_path)
    code, out, err = run(recipe, *given)
    assert (code, err) == (0, "")
    assert "epoch 1/1" in out
    assert "17 tokens" in out
    code, out, _ = run(recipe, *given, "--eval", "--resume", tmp_path / "checkpoint-last.pth")
    assert code == 0
    last = json.loads((tmp_path / "log.txt").read_text().splitlines()[-1])
    assert f'"test_acc1": {last["test_acc1"]}' in out


def test_a_run_that_breaks_down_is_not_bad_usage(run, tmp_path):
    pytest.importorskip("timm")
    recipe = "finetune --dataset digits --patch-size 4 --lr 1e30 --epochs 1 --warmup-epochs 0"
    code, _, err = run(recipe, "--output-dir", tmp_path)
    assert code == 1
    assert err.startswith("error: the loss is")


def test_a_progress_bar_is_shown_when_asked_for(run, tmp_path):
    pytest.importorskip("timm")
    recipe = "finetune --dataset digits --patch-size 4 --epochs 1"
    assert run(recipe, "--output-dir", tmp_path)[2] == ""  # stderr is no terminal here
    assert "epoch 1/1" in run(recipe + " --progress on --overwrite", "--output-dir", tmp_path)[2]


def test_demo_reports_both_runs(run, local, tmp_path):
    pytest.importorskip("timm")
    pytest.importorskip("matplotlib")
    folder = tmp_path / "demo"
    recipe = "demo --dataset digits --patch-size 2 --batch-size 256 --epochs 1 --warmup-epochs 0.3"
    code, out, _ = run(recipe, "--attn-cfg", local, "--output-dir", folder)
    assert code == 0
    assert str(folder / "report.html") in out

    report = json.loads((folder / "report.json").read_text())
    assert report["schema"] == "sparse_mhsa-demo-1"
    assert report["command"] == f"sparse-mhsa {recipe} --attn-cfg {local} --output-dir {folder}"
    dense, sparse = report["runs"]["dense"], report["runs"]["sparse"]
    for name, one in report["runs"].items():
        log = [json.loads(line) for line in (folder / name / "log.txt").read_text().splitlines()]
        assert one["epochs"] == log
        assert one["test_acc1_last"] == log[-1]["test_acc1"]
        assert one["attention_cost"]["gflops"] == pytest.approx(2 * one["attention_cost"]["gmacs"])
        assert 0 < one["attention_time"] < one["step_time"]
    assert dense["parameters"] == sparse["parameters"]
    # 16 patches and a class token; 4 layers of 4 heads of 16 channels.
    assert dense["attention_cost"]["edges"] == 4 * 4 * 17**2
    assert dense["attention_cost"]["gmacs"] == pytest.approx(2 * 4 * 17**2 * 64 / 1e9)
    assert dense["attention_cost"]["pruning_ratio_patches"] == 0
    # A window of 2 over 16 patches keeps 74 of 256; with the class token's row and column 107 of 289.
    assert sparse["attention_cost"]["edges"] == 4 * 4 * 107
    assert sparse["attention_cost"]["pruning_ratio_patches"] == pytest.approx(1 - 74 / 256)
    assert sparse["attention_cost"]["pruning_ratio_whole"] == pytest.approx(1 - 107 / 289)
    assert [layer["edges"] for layer in report["masks"]] == [[107] * 4] * 4
    for kind in ("core", "layer", "step"):
        for name in ("dense", "sparse"):
            timing = report["timing"][kind][name]
            assert 0 < timing["lower_quartile"] <= timing["median"] <= timing["upper_quartile"]

    page = (folder / "report.html").read_text()
    assert page.count("<img") == 3
    assert page.count("<svg") == 1
    for text in ("GMACs", "GFLOPs", "Pruning ratio", f"{sparse['test_acc1_last']:.1f} %", "torch"):
        assert text in page
    for external in ("http://", "https://", "<script", "<link"):
        assert external not in page.replace("http://www.w3.org", "")
    assert (folder / "report.html").stat().st_size < 2_000_000


def test_a_demo_goes_on_where_it_was_interrupted_with_the_same_command(run, tmp_path, monkeypatch):
    pytest.importorskip("timm")
    pytest.importorskip("matplotlib")
    from sparse_mhsa.train.engine import Trainer

    recipe = f"demo --dataset digits --patch-size 4 --batch-size 256 --epochs 1 --output-dir {tmp_path}"
    steps, original = [], Trainer._train_step

    def train_step(self, batches):
        steps.append(self.attention["attention"] is not None)
        if len(steps) == 7:  # 5 for the dense run, 2 for the sparse one
            os.kill(os.getpid(), signal.SIGINT)
        return original(self, batches)

    monkeypatch.setattr(Trainer, "_train_step", train_step)
    code, _, err = run(recipe)
    assert code == 130
    assert err.strip() == "interrupted; the same command goes on where it stopped"
    assert run(recipe)[0] == 0
    assert steps == [False] * 5 + [True] * 5
    assert (tmp_path / "report.html").is_file()
    # Another recipe is another demo, though the folder is the same.
    assert run(recipe, "--seed", 1)[0] == 0
    assert len(steps) == 20


def test_a_demo_goes_on_where_the_disk_was_full(run, tmp_path, monkeypatch):
    pytest.importorskip("timm")
    pytest.importorskip("matplotlib")
    from sparse_mhsa.train import TrainingError, engine

    recipe = f"demo --dataset digits --patch-size 4 --batch-size 256 --epochs 1 --output-dir {tmp_path}"
    write = engine.write_checkpoint

    def only_best_fits(path, state):
        if path.name == engine.LAST:
            raise TrainingError(f"cannot write '{path}'")
        write(path, state)

    with monkeypatch.context() as patch:
        patch.setattr(engine, "write_checkpoint", only_best_fits)
        code, _, err = run(recipe)
    assert code == 1
    assert err.strip().endswith("once that is mended, the same command goes on where it stopped")
    code, out, _ = run(recipe)
    assert code == 0
    assert f"resuming {tmp_path / 'dense' / engine.BEST} at epoch 2" in out


def test_of_a_distributed_demo_only_the_first_process_measures_and_writes(monkeypatch, tmp_path):
    pytest.importorskip("timm")
    pytest.importorskip("matplotlib")
    from sparse_mhsa.train import demo as module
    from sparse_mhsa.train.commands import DEMO_DEFAULTS
    from sparse_mhsa.train.distributed import World

    monkeypatch.setattr(module, "_check_masks", lambda _: None)
    trained = SimpleNamespace(trainer=SimpleNamespace(world=World(rank=1, size=2)))
    monkeypatch.setattr(module, "finetune", lambda _: trained)
    assert module.demo(replace(DEMO_DEFAULTS, output_dir=tmp_path), "sparse-mhsa demo --dist") is None
    assert list(tmp_path.iterdir()) == []


def test_a_table_names_the_runs_that_a_killed_command_left_going(run, tmp_path):
    pytest.importorskip("timm")
    from sparse_mhsa.train.lock import locked

    folder = tmp_path / "dense" / "seed-1"
    folder.mkdir(parents=True)
    words = f"bench accuracy --methods dense --seeds 0 1 --output-dir {tmp_path} -- --dataset digits --patch-size 4"
    with locked(folder):
        code, _, err = run(words)
    assert code == 2
    assert f"going on in '{tmp_path}': process {os.getpid()} on " in err
    assert f" trains in '{folder}'; wait until they have ended, or end them, and the same command goes on" in err
    assert not (tmp_path / "dense" / "seed-0").exists()


def test_a_table_of_a_published_set_can_be_planned_without_it(run):
    pytest.importorskip("timm")
    words = "bench accuracy --dry-run --methods dense fibottention --seeds 0 --"
    code, out, _ = run(f"{words} --dataset cifar10 --data-path nowhere --patch-size 8 --input-size 32 --epochs 1")
    assert code == 0
    assert "sparse-mhsa finetune --dataset cifar10 --data-path nowhere" in out
    assert "--dry-run" not in out


def test_a_demo_of_a_linear_probe_reports(run, tmp_path):
    pytest.importorskip("timm")
    pytest.importorskip("matplotlib")
    recipe = "demo --dataset digits --patch-size 4 --batch-size 256 --epochs 1 --linear-probe --output-dir"
    assert run(recipe, tmp_path)[0] == 0
    assert (tmp_path / "report.html").is_file()


@pytest.mark.parametrize(
    ("flags", "config", "message"),
    [
        ("--two-branch", "mask: none", "--two-branch is for sparse-mhsa finetune"),
        ("", "mask: topk", "blocks.0.attn chooses keys anew for every input"),
        ("", "backend: efficient", "blocks.0.attn computes without edges"),
        ("", "mask: axial\ngrid: [3, 3]", "--attn-cfg: blocks.0.attn: grid: [3, 3] has 9 cells"),
    ],
)
def test_a_demo_refuses_before_it_trains(run, tmp_path, flags, config, message):
    pytest.importorskip("timm")
    pytest.importorskip("matplotlib")
    (tmp_path / "attention.yaml").write_text(f"{config}\n")
    recipe = f"demo --dataset digits --patch-size 4 --batch-size 256 --epochs 1 {flags}"
    code, out, err = run(recipe, "--attn-cfg", tmp_path / "attention.yaml", "--output-dir", tmp_path / "demo")
    assert one_line_error(code, err)
    assert message in err
    assert out == ""
    assert not (tmp_path / "demo").exists()


@pytest.mark.parametrize(
    ("command", "name"),
    [
        ("bench latency --tokens 16 --batches 1 --repeat 1 --budget 0.01 --output-dir", "latency.json"),
        ("calibrate LOCAL --dataset digits --patch-size 4 --batches 1 --no-plots --output-dir", "calibration.json"),
        ("masks LOCAL --tokens 17 --heads 2 --plot", "plot.png"),
    ],
)
def test_a_full_disk_is_told_with_the_file_that_has_no_room(run, local, tmp_path, command, name):
    pytest.importorskip("timm")
    pytest.importorskip("matplotlib")
    resource = pytest.importorskip("resource")
    place = tmp_path / name if name == "plot.png" else tmp_path
    (tmp_path / name).write_text("before")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (16, before[1]))
    try:
        code, _, err = run(command.replace("LOCAL", str(local)), place)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert code == 1
    assert err.splitlines()[-1].startswith(f"error: cannot write '{tmp_path / name}'")
    if name != "plot.png":
        assert (tmp_path / name).read_text() == "before"
