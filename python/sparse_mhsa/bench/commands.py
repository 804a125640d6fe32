"""The commands of ``sparse-mhsa bench``."""

import argparse
import logging
import shlex
from pathlib import Path
from typing import Any

from ..arguments import Parser, add_command, add_group, add_options, hyphenate, is_given, positive, read_options
from ..train import UsageError
from ..train.recipes import FinetuneOptions
from .options import DTYPES, GPU_EXAMPLES, QUICK_BUDGET, AccuracyOptions, BenchOptions, LatencyOptions


def add_commands(commands: Any) -> None:  # noqa: ANN401  (what add_subparsers returned)
    """Add ``bench`` and what it measures."""
    kinds = add_group(
        commands,
        "bench",
        "WHAT",
        "Measure speed, memory and accuracy.",
        ("sparse-mhsa bench kernels --quick", "sparse-mhsa bench latency --tokens 197 1025 --batches 1"),
    )
    kernels = add_command(
        kinds,
        "kernels",
        run_bench_kernels,
        "Time attention over edges against dense, masked and other sparse attention, all in one process behind a "
        "correctness gate.",
        ("sparse-mhsa bench kernels --quick", "sparse-mhsa bench kernels --rows 'fibottention-*' --dtype float32"),
    )
    add_kernel_options(kernels, "kernels.json, kernels.md and the pictures")
    kernels.add_argument("--no-memory", action="store_true", help="leave out memory and first-call cost")
    kernels.add_argument("--no-plots", action="store_true", help="write no pictures")
    accuracy = add_command(
        kinds,
        "accuracy",
        run_bench_accuracy,
        "Train the same model with every method at the same attention budget, and write a table. What follows -- "
        "goes to sparse-mhsa finetune.",
        (
            "sparse-mhsa bench accuracy --seeds 0 1 2 -- --epochs 10",
            "sparse-mhsa bench accuracy --methods dense fibottention topk --seeds 0 -- --dataset digits --epochs 3",
            *GPU_EXAMPLES,
        ),
    )
    add_options(accuracy, AccuracyOptions())
    accuracy.add_argument("recipe", nargs="*", help="options of sparse-mhsa finetune, after --")
    latency = add_command(
        kinds,
        "latency",
        run_bench_latency,
        "Time attention alone and whole layers over growing sequences against dense and masked attention, and say from "
        "how many tokens on sparse attention is faster.",
        ("sparse-mhsa bench latency --memory", "sparse-mhsa bench latency --tokens 197 1025 --batches 1 --repeat 5"),
    )
    add_options(latency, LatencyOptions())
    decode = add_command(
        kinds,
        "decode",
        run_bench_decode,
        "Time one decoding step over a full cache and over caches that forget, against dense attention over "
        "everything, all in one process behind a correctness gate.",
        ("sparse-mhsa bench decode --quick",),
    )
    decode.set_defaults(no_memory=True, no_plots=True)
    add_kernel_options(decode, "decode.json and decode.md")
    choice = add_command(
        kinds,
        "choice",
        run_bench_choice,
        "Time every kernel that can compute a mask against the one that is chosen, behind a correctness gate. The exit "
        "code is 1 where another one is much faster.",
        ("sparse-mhsa bench choice --quick", "sparse-mhsa bench choice --rows 'local_*'"),
    )
    choice.set_defaults(no_memory=True, no_plots=True)
    add_kernel_options(choice, "choice.json and choice.md")


def add_kernel_options(parser: argparse.ArgumentParser, files: str) -> None:
    """The options that ``bench kernels`` and ``bench decode`` share; ``files`` are what it writes."""
    default = BenchOptions()
    parser.add_argument("--quick", action="store_true", help="a subset that takes less than two minutes on two cores")
    parser.add_argument(
        "--rows",
        nargs="+",
        default=(),
        metavar="PATTERN",
        help="names of rows, such as 'fibottention-*' (default: all)",
    )
    parser.add_argument(
        "--dtype", nargs="+", default=default.dtypes, choices=DTYPES, help="element types (default: float32)"
    )
    parser.add_argument("--threads", type=positive, help="threads (default: torch's own number)")
    parser.add_argument(
        "--repeat", type=positive, default=default.repeat, help=f"turns per row (default: {default.repeat})"
    )
    parser.add_argument(
        "--budget",
        type=float,
        metavar="SECONDS",
        help=f"time that one method may take per row (default: {default.budget:g}, with --quick {QUICK_BUDGET:g})",
    )
    parser.add_argument(
        "--output-dir",
        type=Path,
        default=default.output_dir,
        metavar="DIR",
        help=f"where {files} go (default: {default.output_dir})",
    )


def bench_options(parsed: argparse.Namespace) -> BenchOptions:
    """What `add_kernel_options` had parsed."""
    return BenchOptions(
        rows=tuple(parsed.rows),
        dtypes=tuple(parsed.dtype),
        quick=parsed.quick,
        repeat=parsed.repeat,
        budget=parsed.budget if parsed.budget is not None else QUICK_BUDGET if parsed.quick else BenchOptions.budget,
        threads=parsed.threads,
        memory=not parsed.no_memory,
        plots=not parsed.no_plots,
        output_dir=parsed.output_dir,
    )


def run_bench_kernels(parsed: argparse.Namespace) -> int:
    """``sparse-mhsa bench kernels``."""
    options = bench_options(parsed)
    from .run import bench

    return bench(options, shlex.join(["sparse-mhsa", *parsed.given]))


def run_bench_decode(parsed: argparse.Namespace) -> int:
    """``sparse-mhsa bench decode``."""
    options = bench_options(parsed)
    from .decode import bench_decode

    return bench_decode(options, shlex.join(["sparse-mhsa", *parsed.given]))


def run_bench_choice(parsed: argparse.Namespace) -> int:
    """``sparse-mhsa bench choice``."""
    options = bench_options(parsed)
    from .choice import bench_choice

    return bench_choice(options, shlex.join(["sparse-mhsa", *parsed.given]))


ACCURACY_DEFAULTS = ("--epochs", "10", "--lr", "2e-3", "--min-lr", "0", "--drop-path", "0", "--smoothing", "0")
"""The recipe of ``bench accuracy`` where no other is given."""

ACCURACY_REFUSES = {
    **dict.fromkeys(
        ("--attn-cfg", "--resume", "--dist", "--seed", "--output-dir", "--dry-run"),
        "is set by bench accuracy itself, for every run",
    ),
    "--overwrite": "has no meaning: what is finished is kept, and what was interrupted goes on",
    "--eval": "trains nothing, and the table is of trained models",
    "--two-branch": "trains a decoder too, and budgets and times of the table are those of models that only classify",
}
"""Options of ``finetune`` that the recipe of ``bench accuracy`` cannot have, and why."""


def run_bench_accuracy(parsed: argparse.Namespace) -> int:
    """``sparse-mhsa bench accuracy``."""
    options = read_options(AccuracyOptions, parsed)
    words = hyphenate(parsed.recipe) or list(ACCURACY_DEFAULTS)
    for flag, why in ACCURACY_REFUSES.items():
        if is_given(flag, words):
            raise UsageError(f"{flag} after -- {why}")
    parser = Parser(prog="sparse-mhsa finetune", allow_abbrev=False)
    add_options(parser, FinetuneOptions())
    # A plan needs no more data than one of finetune does.
    planned = ["--dry-run"] if options.dry_run else []
    recipe = read_options(FinetuneOptions, parser.parse_args([*words, *planned]))
    from .accuracy import bench_accuracy

    page = bench_accuracy(options, recipe, words, shlex.join(["sparse-mhsa", *parsed.given]))
    if page is not None:
        logging.getLogger("sparse_mhsa").info("table: %s", page)
    return 0


def run_bench_latency(parsed: argparse.Namespace) -> int:
    """``sparse-mhsa bench latency``."""
    options = read_options(LatencyOptions, parsed)
    from .latency import bench_latency

    path = bench_latency(options, shlex.join(["sparse-mhsa", *parsed.given]))
    logging.getLogger("sparse_mhsa").info("table: %s", path)
    return 0
