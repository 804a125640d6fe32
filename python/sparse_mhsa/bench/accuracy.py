"""``sparse-mhsa bench accuracy``: the same model trained with every method at the same attention budget.

Every run is a ``sparse-mhsa finetune`` in a process of its own, with its own folder and the command beside it. What is
finished is not done again, and what was interrupted goes on.
"""

import datetime
import json
import logging
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ..train import TrainingError, UsageError, require_packages

require_packages("timm", "torchvision", "tqdm", "matplotlib")

from .._core import ConfigError  # noqa: E402
from ..machine import environment  # noqa: E402
from ..train.checkpoint import make_folder, write_text  # noqa: E402
from ..train.datasets import ImageData, load_data  # noqa: E402
from ..train.dry_run import checkpoint_bytes, room  # noqa: E402
from ..train.engine import LAST, LOG, checkpoint_of  # noqa: E402
from ..train.interrupt import sigterm_as_ctrl_c  # noqa: E402
from ..train.lock import runner  # noqa: E402
from ..train.models import build_model, num_tokens  # noqa: E402
from ..train.recipes import FinetuneOptions  # noqa: E402
from .accuracy_methods import METHODS, Solved, solve_methods  # noqa: E402
from .accuracy_report import write_report  # noqa: E402
from .accuracy_timing import measure, read_run  # noqa: E402
from .options import AccuracyOptions  # noqa: E402

logger = logging.getLogger("sparse_mhsa")

SCHEMA = "sparse_mhsa-accuracy-1"
INTERRUPTED = 130
"""Exit code of a run after Ctrl-C or SIGTERM; it has saved itself and goes on with the same command."""


@dataclass(frozen=True)
class Task:
    """One run of the table."""

    method: Solved
    seed: int
    folder: Path
    words: tuple[str, ...]
    """What follows ``sparse-mhsa finetune``."""
    processes: int = 1

    @property
    def command(self) -> str:
        """As a user would type it."""
        start = ["torchrun", *self.torchrun] if self.torchrun else ["sparse-mhsa"]
        return shlex.join([*start, "finetune", *self.words])

    @property
    def torchrun(self) -> list[str]:
        """What torchrun is told in order to start the run; nothing for a run that needs none."""
        if self.processes == 1:
            return []
        return ["--standalone", f"--nproc-per-node={self.processes}", "-m", "sparse_mhsa"]


def bench_accuracy(
    options: AccuracyOptions, recipe: FinetuneOptions, words: Sequence[str], command: str
) -> Path | None:
    """Train, measure, and write ``accuracy.json``, ``.md``, ``.csv`` and ``.html`` into ``options.output_dir``.

    Args:
        options: methods, seeds, budget and processes.
        recipe: of every run.
        words: the same recipe as it was given on the command line.
        command: what the user typed; the report quotes it.

    Returns:
        The page, or None after a dry run.

    Raises:
        UsageError: an option cannot be used as given, or the folder holds the runs of another recipe.
        ConfigError: a method cannot be applied to the model.
        TrainingError: runs failed; the others are finished and kept.
    """
    data = load_data(recipe)
    model = build_model(recipe, data)
    names = options.methods or tuple(METHODS)
    for name in names:
        if name not in METHODS:
            raise UsageError(f"--methods: there is no {name!r}; allowed: {', '.join(METHODS)}")
    logger.info("setting %d methods to the same budget", len(names))
    try:
        solved = solve_methods(model, num_tokens(model), names, options.budget)
    except ConfigError:
        raise
    except ValueError as error:
        raise UsageError(f"--budget: {error}") from error
    for method in solved:
        value = "" if method.value is None else f", {METHODS[method.name].parameter or 'parameter'} {method.value}"
        logger.info("%s%s: %s", method.name, value, method.cost)
    tasks = _tasks(options, solved, words)
    if options.dry_run:
        for task in tasks:
            logger.info("%s", task.command)
        size = checkpoint_bytes(model, averaged=recipe.model_ema is not None)
        # The last and the best one of every run, and those that are being written.
        kept = room(options.output_dir, size, 2 * len(tasks) + options.jobs)
        logger.info("files: %.1f MiB per checkpoint in %s, %s", size / 2**20, options.output_dir, kept)
        return None
    _prepare(options, solved, words)
    _check_runners(options, tasks)
    _check_checkpoints(recipe, tasks)
    failed = _run_all(options, recipe, tasks)
    if failed:
        lines = (failed[0].folder / "output.txt").read_text(encoding="utf-8", errors="replace").strip().splitlines()
        last = lines[-1] if lines else "no output"
        raise TrainingError(
            f"{len(failed)} of {len(tasks)} runs failed, the first is {failed[0].folder} ({last}): "
            "see output.txt there; the others are kept, and the same command goes on"
        )
    logger.info("measuring times, the methods taking turns")
    report = _assemble(options, recipe, data, solved, tasks, command)
    return write_report(report, options.output_dir)


def _tasks(options: AccuracyOptions, solved: Sequence[Solved], words: Sequence[str]) -> list[Task]:
    """One run per seed and method; seeds vary slowest, so that a table of one seed is complete first."""
    tasks = []
    for seed in options.seeds:
        for method in solved:
            folder = options.output_dir / method.name / f"seed-{seed}"
            own = ["--seed", str(seed), "--output-dir", str(folder)]
            if method.config is not None:
                own += ["--attn-cfg", str(options.output_dir / method.name / "attention.yaml")]
            if options.nproc_per_node > 1:
                own.append("--dist")
            tasks.append(Task(method, seed, folder, (*words, *own), options.nproc_per_node))
    return tasks


def _prepare(options: AccuracyOptions, solved: Sequence[Solved], words: Sequence[str]) -> None:
    """Write the configurations, and refuse a folder whose runs have another recipe or other configurations."""
    make_folder(options.output_dir)
    recipe = options.output_dir / "recipe.txt"
    line = shlex.join(words) + "\n"
    if recipe.is_file() and (before := recipe.read_text()) != line:
        raise UsageError(
            f"--output-dir: '{options.output_dir}' holds runs of another recipe ({before.strip() or 'the default'}); "
            "give another folder or the same recipe"
        )
    write_text(recipe, line)
    for method in solved:
        if method.config is None:
            continue
        path = options.output_dir / method.name / "attention.yaml"
        path.parent.mkdir(exist_ok=True)
        if path.is_file() and path.read_text() != method.config:
            raise UsageError(f"--output-dir: '{path}' holds another configuration; was --budget another?")
        write_text(path, method.config)


def _timed(tasks: Sequence[Task]) -> dict[str, Path]:
    """By method, the checkpoint that is timed: that of the first seed."""
    return {task.method.name: task.folder / LAST for task in reversed(tasks)}


def _check_runners(options: AccuracyOptions, tasks: Sequence[Task]) -> None:
    """Refuse runs that are going on, as those of a command that was killed, which no one else could stop, are."""
    found = ((task.folder, runner(task.folder)) for task in tasks)
    going = [f"{process} trains in '{folder}'" for folder, process in found if process is not None]
    if going:
        raise UsageError(
            f"--output-dir: runs of an earlier command are going on in '{options.output_dir}': {', '.join(going)}; "
            "wait until they have ended, or end them, and the same command goes on"
        )


def _check_checkpoints(recipe: FinetuneOptions, tasks: Sequence[Task]) -> None:
    """Refuse a checkpoint that a run would go on from, or that will be timed, before anything is trained."""
    timed = set(_timed(tasks).values())
    for task in tasks:
        path = checkpoint_of(task.folder)
        if path is not None and (path in timed or not is_finished(task, recipe)):
            read_run(path)


def _run_all(options: AccuracyOptions, recipe: FinetuneOptions, tasks: Sequence[Task]) -> list[Task]:
    """Run what is not finished, ``options.jobs`` at a time; returns the runs that failed."""
    todo = [task for task in tasks if not is_finished(task, recipe)]
    logger.info("%d runs, %d of them finished before", len(tasks), len(tasks) - len(todo))
    started = time.perf_counter()
    failed: list[Task] = []
    processes: list[subprocess.Popen[bytes]] = []

    def run(task: Task) -> None:
        code = _run(options, task, processes)
        if code != 0:
            failed.append(task)
        minutes = (time.perf_counter() - started) / 60
        outcome = {0: "", INTERRUPTED: "stopped"}.get(code, "failed") or _result(task)
        logger.info("%s, seed %d: %s (%.1f min)", task.method.name, task.seed, outcome, minutes)

    with ThreadPoolExecutor(options.jobs) as pool, sigterm_as_ctrl_c():
        try:
            list(pool.map(run, todo))
        except KeyboardInterrupt:
            pool.shutdown(wait=False, cancel_futures=True)
            _stop(processes)
            raise KeyboardInterrupt("interrupted; the same command goes on where the runs stopped") from None
    return failed


def _stop(processes: Sequence[subprocess.Popen[bytes]]) -> None:
    """Pass a Ctrl-C on to the runs, which save themselves, and wait for them; likewise every further one."""
    for process in processes:
        if process.poll() is None:
            process.send_signal(signal.SIGINT)
    try:
        for process in processes:
            process.wait()
    except KeyboardInterrupt:
        _stop(processes)


def _run(options: AccuracyOptions, task: Task, processes: list[subprocess.Popen[bytes]]) -> int:
    task.folder.mkdir(parents=True, exist_ok=True)
    words = list(task.words)
    if (checkpoint := checkpoint_of(task.folder)) is not None:
        words += ["--resume", str(checkpoint)]
    start = [sys.executable, "-m", *(["torch.distributed.run", *task.torchrun] if task.torchrun else ["sparse_mhsa"])]
    env = dict(os.environ)
    if options.threads is not None:
        env["OMP_NUM_THREADS"] = str(options.threads)
    (task.folder / "command.txt").write_text(task.command + "\n")
    with (task.folder / "output.txt").open("ab") as output:
        # A session of its own: the terminal's Ctrl-C comes here alone, and is passed on once.
        process = subprocess.Popen(
            [*start, "finetune", *words], stdout=output, stderr=subprocess.STDOUT, env=env, start_new_session=True
        )
        processes.append(process)
        return process.wait()


def is_finished(task: Task, recipe: FinetuneOptions) -> bool:
    """Whether the log of a run has every epoch."""
    log = read_log(task.folder)
    return len(log) == recipe.epochs - recipe.start_epoch


def read_log(folder: Path) -> list[dict[str, Any]]:
    """The finished epochs of a run."""
    path = folder / LOG
    return [json.loads(line) for line in path.read_text().splitlines()] if path.is_file() else []


def _result(task: Task) -> str:
    return f"top-1 {read_log(task.folder)[-1]['test_acc1']:.2f} %"


def _assemble(
    options: AccuracyOptions,
    recipe: FinetuneOptions,
    data: ImageData,
    solved: Sequence[Solved],
    tasks: Sequence[Task],
    command: str,
) -> dict[str, Any]:
    """The data of the report."""
    timing = measure(replace(recipe, output_dir=options.output_dir), data, solved, _timed(tasks))
    rows = []
    for method in solved:
        runs = [task for task in tasks if task.method.name == method.name]
        logs = [read_log(task.folder) for task in runs]
        rows.append(
            {
                "method": method.name,
                "title": METHODS[method.name].title,
                "attention_config": method.config,
                "value": method.value,
                "seeds": [task.seed for task in runs],
                "commands": [task.command for task in runs],
                "test_acc1": [log[-1]["test_acc1"] for log in logs],
                "test_acc5": [log[-1]["test_acc5"] for log in logs],
                "test_loss": [log[-1]["test_loss"] for log in logs],
                "train_seconds": [sum(entry["train_time"] for entry in log) for log in logs],
                "peak_memory": [max(entry["peak_memory"] for entry in log) for log in logs],
                "parameters": logs[0][-1]["n_parameters"],
                "gmacs": method.cost.sparse("GMACs"),
                "gflops": method.cost.sparse("GFLOPs"),
                "dense_gmacs": method.cost.dense("GMACs"),
                "pruning_ratio": method.cost.pruning_ratio_patches if _has_edges(method) else None,
                **timing[method.name],
            }
        )
    report = {
        "schema": SCHEMA,
        "created": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "command": command,
        "environment": environment(),
        "recipe": {name: value for name, value in recipe.as_dict().items() if value not in (None, False)},
        "data": {"name": recipe.dataset, "train_images": data.sizes[0], "test_images": data.sizes[1]},
        "jobs": options.jobs,
        "rows": rows,
    }
    write_text(options.output_dir / "accuracy.json", json.dumps(report, indent=2, allow_nan=False) + "\n")
    return report


def _has_edges(method: Solved) -> bool:
    return all(layer.backend_macs is None for layer in method.cost.layers)
