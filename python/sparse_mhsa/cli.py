"""The ``sparse-mhsa`` command.

Exit codes: 0 success, 1 a training run that broke down, 2 bad usage or configuration, 130 Ctrl-C.
"""

import argparse
import json
import logging
import shlex
import sys
import types
import typing
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NoReturn, TypeVar

from ._core import ConfigError, __version__
from .bench.options import DTYPES, QUICK_BUDGET, BenchOptions
from .config import configs
from .train import TrainingError, UsageError
from .train.options import FinetuneOptions, TrainOptions, flag_name

if TYPE_CHECKING:
    from .mask import Mask

# Models, timm and matplotlib are imported by the commands that need them, so that --help stays quick.

DEMO_DEFAULTS = TrainOptions(
    attn_cfg=configs()["vit_fibottention"],
    epochs=6,
    lr=2e-3,
    min_lr=0.0,
    drop_path=0.0,
    smoothing=0.0,
    output_dir=Path("runs/demo"),
)
"""About two minutes per run on two cores."""

DEMO_WARMUP = 0.3
"""Share of the demo's epochs in which the learning rate rises, unless ``--warmup-epochs`` says otherwise."""


Options = TypeVar("Options", bound=TrainOptions)


class Parser(argparse.ArgumentParser):
    """Reports bad usage as a `UsageError`, so that every error leaves `main` through one door."""

    def error(self, message: str) -> NoReturn:
        """Raise instead of printing the usage and exiting."""
        raise UsageError(f"{message} (see {self.prog} --help)")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line.

    Args:
        arguments: what follows the program's name; ``sys.argv`` by default.

    Returns:
        The exit code.
    """
    try:
        given = list(sys.argv[1:] if arguments is None else arguments)
        parsed = build_parser().parse_args(hyphenate(given), argparse.Namespace(given=given))
        with log_to_stdout():
            return int(parsed.run(parsed))
    except SystemExit as stop:  # argparse has printed the help text or the version
        return int(stop.code or 0)
    except KeyboardInterrupt as stop:
        return fail(str(stop) or "interrupted", 130)
    except TrainingError as error:
        return fail(f"error: {error}", 1)
    except (UsageError, ConfigError, OSError) as error:
        return fail(f"error: {error}", 2)


@contextmanager
def log_to_stdout() -> Iterator[None]:
    """Show what the package logs, for as long as a command runs."""
    logger, handler = logging.getLogger("sparse_mhsa"), logging.StreamHandler(sys.stdout)
    handler.setFormatter(logging.Formatter("%(message)s"))
    level = logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    try:
        yield
    finally:
        logger.removeHandler(handler)
        logger.setLevel(level)


def fail(message: str, code: int) -> int:
    """Print ``message`` as one line on stderr and return ``code``."""
    print(" ".join(message.split()), file=sys.stderr)  # noqa: T201
    return code


def hyphenate(arguments: Sequence[str]) -> list[str]:
    """Let ``--batch_size=8`` mean ``--batch-size=8``; values and what follows ``--`` stay as they are."""
    result, options_end = [], False
    for argument in arguments:
        options_end = options_end or argument == "--"
        if argument.startswith("--") and not options_end:
            name, equals, value = argument.partition("=")
            argument = name.replace("_", "-") + equals + value
        result.append(argument)
    return result


def build_parser() -> Parser:
    """The parser of all commands; the chosen command's function is in ``run``."""
    parser = Parser(prog="sparse-mhsa", description="Sparse attention for PyTorch.", allow_abbrev=False)
    parser.add_argument("--version", action="version", version=f"sparse_mhsa {__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    def command(name: str, run: Any, about: str) -> Parser:  # noqa: ANN401
        added = commands.add_parser(name, help=about, description=about, allow_abbrev=False)
        added.set_defaults(run=run)
        return added

    add_options(
        command("finetune", run_finetune, "Train an image classifier with dense or sparse attention."),
        FinetuneOptions(),
    )
    add_options(
        command("demo", run_demo, "Train the same model dense and sparse and write a report that compares them."),
        DEMO_DEFAULTS,
    )
    masks = command("masks", run_masks, "List all masks, or count and draw the edges of an attention configuration.")
    masks.add_argument("file", type=Path, nargs="?", help="attention configuration (YAML)")
    masks.add_argument("--list", action="store_true", help="print a table of all masks and their parameters")
    masks.add_argument("--markdown", action="store_true", help="with --list: as a Markdown table")
    masks.add_argument("--tokens", type=positive, help="tokens of the sequence, prefix included")
    masks.add_argument("--heads", type=positive, help="attention heads")
    masks.add_argument("--module", metavar="NAME", help="name of the layer, for configurations with `layers`")
    masks.add_argument("--layer", type=natural, default=0, help="index of the layer (default: 0)")
    masks.add_argument("--num-layers", type=positive, help="layers of the model, for masks that depend on it")
    masks.add_argument("--epoch", type=natural, default=0, help="epoch, for masks that change with it (default: 0)")
    masks.add_argument("--head-dim", type=positive, help="channels per head, for masks that fit a budget")
    masks.add_argument("--prefix-tokens", type=natural, help="leading tokens off the grid; the mask's own by default")
    masks.add_argument("--grid", type=positive, nargs="+", help="patch grid: H W, or T H W")
    masks.add_argument("--plot", type=Path, metavar="FILE", help="draw every head into this image")
    bench = commands.add_parser("bench", help="Measure speed and memory.", allow_abbrev=False)
    subjects = bench.add_subparsers(required=True, metavar="WHAT")
    kernels = subjects.add_parser(
        "kernels",
        help="Attention over edges against dense, masked and other sparse attention.",
        description="Time attention over edges against dense, masked and other sparse attention, all in one process "
        "behind a correctness gate.",
        allow_abbrev=False,
    )
    kernels.set_defaults(run=run_bench_kernels)
    add_bench_options(kernels, "kernels.json, kernels.md and the pictures")
    kernels.add_argument("--no-memory", action="store_true", help="leave out memory and first-call cost")
    kernels.add_argument("--no-plots", action="store_true", help="write no pictures")
    decode = subjects.add_parser(
        "decode",
        help="One decoding step over caches against dense attention over everything.",
        description="Time one decoding step over a full cache and over caches that forget, against dense attention "
        "over everything, all in one process behind a correctness gate.",
        allow_abbrev=False,
    )
    decode.set_defaults(run=run_bench_decode, no_memory=True, no_plots=True)
    add_bench_options(decode, "decode.json and decode.md")
    config = command("config", run_config_list, "Work with attention configurations.")
    actions = config.add_subparsers(required=True, metavar="ACTION")
    check = actions.add_parser("check", help="Say whether configurations are valid.", allow_abbrev=False)
    check.add_argument("files", type=Path, nargs="+", metavar="FILE")
    check.set_defaults(run=run_config_check)
    listing = actions.add_parser("list", help="Show the paths of the configurations that come with the package.")
    listing.set_defaults(run=run_config_list)
    schema = actions.add_parser("schema", help="Print the JSON Schema of a configuration.", allow_abbrev=False)
    schema.set_defaults(run=run_config_schema)
    return parser


def add_options(parser: argparse.ArgumentParser, defaults: TrainOptions) -> None:
    """One command-line option per field of ``defaults``."""
    kinds = typing.get_type_hints(type(defaults))
    for item in fields(defaults):
        kind, default = kinds[item.name], getattr(defaults, item.name)
        about = item.metadata["about"].replace("%", "%%")
        if kind is bool:
            parser.add_argument(flag_name(item.name), action="store_true", help=about)
            continue
        if typing.get_origin(kind) is types.UnionType:  # X | None
            kind = typing.get_args(kind)[0]
        choices = typing.get_args(kind) if typing.get_origin(kind) is Literal else None
        parser.add_argument(
            flag_name(item.name),
            type=str if choices else kind,
            choices=choices,
            default=default,
            metavar=item.metadata["metavar"],
            help=about if default is None else f"{about} (default: {default})",
        )


def add_bench_options(parser: argparse.ArgumentParser, files: str) -> None:
    """The options that the subjects of ``sparse-mhsa bench`` share; ``files`` are what it writes."""
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
        default=default.budget,
        metavar="SECONDS",
        help=f"time that one method may take per row (default: {default.budget:g})",
    )
    parser.add_argument(
        "--output-dir",
        type=Path,
        default=default.output_dir,
        metavar="DIR",
        help=f"where {files} go (default: {default.output_dir})",
    )


def read_options(kind: type[Options], parsed: argparse.Namespace) -> Options:
    """The options dataclass from what `add_options` had parsed."""
    return kind(**{item.name: getattr(parsed, item.name) for item in fields(kind)})


def positive(text: str) -> int:
    """An integer of at least 1."""
    return _integer(text, 1)


def natural(text: str) -> int:
    """An integer of at least 0."""
    return _integer(text, 0)


def run_finetune(parsed: argparse.Namespace) -> int:
    """``sparse-mhsa finetune``."""
    options = read_options(FinetuneOptions, parsed)
    from .train.finetune import finetune

    finetune(options)
    return 0


def run_demo(parsed: argparse.Namespace) -> int:
    """``sparse-mhsa demo``."""
    if parsed.warmup_epochs is None:
        parsed.warmup_epochs = DEMO_WARMUP * parsed.epochs
    options = read_options(TrainOptions, parsed)
    from .train.demo import demo

    demo(options, shlex.join(["sparse-mhsa", *parsed.given]))
    return 0


def bench_options(parsed: argparse.Namespace) -> BenchOptions:
    """What `add_bench_options` had parsed."""
    return BenchOptions(
        rows=tuple(parsed.rows),
        dtypes=tuple(parsed.dtype),
        quick=parsed.quick,
        repeat=parsed.repeat,
        budget=min(parsed.budget, QUICK_BUDGET) if parsed.quick else parsed.budget,
        threads=parsed.threads,
        memory=not parsed.no_memory,
        plots=not parsed.no_plots,
        output_dir=parsed.output_dir,
    )


def run_bench_decode(parsed: argparse.Namespace) -> int:
    """``sparse-mhsa bench decode``."""
    options = bench_options(parsed)
    from .bench.decode import bench_decode

    return bench_decode(options, shlex.join(["sparse-mhsa", *parsed.given]))


def run_bench_kernels(parsed: argparse.Namespace) -> int:
    """``sparse-mhsa bench kernels``."""
    options = bench_options(parsed)
    from .bench.run import bench

    return bench(options, shlex.join(["sparse-mhsa", *parsed.given]))


def run_masks(parsed: argparse.Namespace) -> int:
    """``sparse-mhsa masks``."""
    from . import Mask, load_config

    if parsed.list:
        from .catalogue import table

        print(table(parsed.markdown), end="")  # noqa: T201
        return 0
    for name, value in (("FILE", parsed.file), ("--tokens", parsed.tokens), ("--heads", parsed.heads)):
        if value is None:
            raise UsageError(f"masks: the following arguments are required: {name} (unless --list is given)")
    config = load_config(parsed.file)
    try:
        mask = Mask.from_config(
            config if parsed.module is None else config.for_layer(parsed.module),
            parsed.tokens,
            parsed.heads,
            layer=parsed.layer,
            num_layers=parsed.num_layers,
            epoch=parsed.epoch,
            head_dim=parsed.head_dim,
            grid=parsed.grid,
            num_prefix_tokens=parsed.prefix_tokens,
        )
    except (ValueError, OverflowError) as error:  # numbers out of range for this mask
        raise error if isinstance(error, ConfigError) else UsageError(str(error)) from error
    patches = mask.num_tokens - mask.num_prefix_tokens
    print(  # noqa: T201
        f"{mask.name}: {mask.num_tokens} tokens ({mask.num_prefix_tokens} prefix), "
        f"{mask.num_heads} heads, layer {parsed.layer}"
    )
    row = "{:>5} {:>12} {:>10} {:>14} {:>11} {:>11}".format
    print(row("head", "nnz", "density", "pruning ratio", "min degree", "max degree"))  # noqa: T201
    for head, (nnz, between_patches) in enumerate(zip(mask.nnz_per_head, mask.nnz_patches_per_head, strict=True)):
        try:
            degrees = mask.degrees(head)
        except ValueError as error:  # more tokens than memory
            raise UsageError(str(error)) from error
        pruned = 1 - between_patches / patches**2 if patches > 0 else 0.0
        density = nnz / mask.num_tokens**2
        print(row(head, nnz, f"{density:.2%}", f"{pruned:.2%}", degrees.min(), degrees.max()))  # noqa: T201
    print(row("all", mask.nnz, f"{mask.density:.2%}", f"{mask.pruning_ratio:.2%}", "", ""))  # noqa: T201
    print("density: whole matrix; pruning ratio: patch to patch; degree: keys of a query")  # noqa: T201
    if parsed.plot is not None:
        save_plot(mask, parsed.plot)
        print(f"drawn: {parsed.plot}")  # noqa: T201
    return 0


def save_plot(mask: "Mask", path: Path) -> None:
    """Draw every head of ``mask`` into the image file ``path``."""
    from .train import require_packages

    require_packages("matplotlib")
    import matplotlib

    matplotlib.use("agg")
    figure = mask.plot()[0].get_figure(root=True)
    assert figure is not None
    try:
        figure.savefig(path, dpi=150)
    except ValueError as error:  # an ending that matplotlib has no format for
        raise UsageError(f"--plot '{path}': {error}") from error


def run_config_check(parsed: argparse.Namespace) -> int:
    """``sparse-mhsa config check``: every file is checked, also after one that failed."""
    from . import load_config

    code = 0
    for path in parsed.files:
        try:
            load_config(path)
            print(f"{path}: ok")  # noqa: T201
        except (ConfigError, OSError) as error:  # noqa: PERF203
            code = fail(f"error: {error}", 2)
    return code


def run_config_list(_: argparse.Namespace) -> int:
    """``sparse-mhsa config list``."""
    for path in configs().values():
        print(path)  # noqa: T201
    return 0


def run_config_schema(parsed: argparse.Namespace) -> int:
    """``sparse-mhsa config schema``."""
    from ._core import config_schema

    print(json.dumps(json.loads(config_schema()), indent=2))  # noqa: T201
    return 0


def _integer(text: str, least: int) -> int:
    value = int(text)
    if value < least:
        raise argparse.ArgumentTypeError(f"must be at least {least}, got {value}")
    return value
