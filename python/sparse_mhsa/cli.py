"""The ``sparse-mhsa`` command.

Exit codes: 0 success, 1 a run that broke down or ran out of memory, 2 bad usage or configuration, 130 Ctrl-C, or
SIGTERM to a run that saves itself. What only measures writes row by row, and SIGTERM simply ends it.
"""

import argparse
import json
import logging
import sys
import textwrap
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from ._core import ConfigError, __version__
from .arguments import Parser, add_command, add_group, configuration, hyphenate, natural, positive, with_examples
from .bench import commands as bench_commands
from .bench.measure import out_of_memory
from .config import configs, load_config
from .train import TrainingError, UsageError
from .train import commands as train_commands

if TYPE_CHECKING:
    from .mask import Mask

# Models, timm and matplotlib are imported by the commands that need them, so that --help stays quick.


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
    except (MemoryError, RuntimeError, ImportError) as error:  # also a library that is imported when it is needed
        message = out_of_memory(error)
        if message is None:
            raise
        return fail(f"error: {message}", 1)


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


SCHEMA_LIMITS = (
    "What it refuses, `config check` refuses too, except names of masks and backends in capitals. What it cannot say "
    "is left to `config check`: a number such as 1.0 where an integer is wanted, which for JSON Schema is one; how the "
    "parameters of a mask depend on each other, beyond which of them exclude each other; what depends on whether a "
    "mask uses the grid or chooses keys by content; and the parameters in an entry of `layers` that names no mask."
)
"""Where the schema and the loader differ, and why."""


def build_parser() -> Parser:
    """The parser of all commands; the chosen command's function is in ``run``."""
    parser = Parser(
        prog="sparse-mhsa",
        description="Sparse attention for PyTorch.",
        allow_abbrev=False,
        **with_examples(
            "sparse-mhsa masks --list",
            "sparse-mhsa demo",
            "sparse-mhsa finetune --dataset mnist5k --attn-cfg vit_fibottention --epochs 5",
            "sparse-mhsa COMMAND --help",
        ),
    )
    parser.add_argument("--version", action="version", version=f"sparse_mhsa {__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    train_commands.add_commands(commands)
    masks = add_command(
        commands,
        "masks",
        run_masks,
        "List what there is, or count and draw the edges of an attention configuration.",
        (
            "sparse-mhsa masks --list",
            "sparse-mhsa masks vit_fibottention --tokens 197 --heads 12",
            "sparse-mhsa masks neighborhood --tokens 197 --heads 3 --grid 14 14 --prefix-tokens 1 --plot heads.png",
        ),
    )
    masks.add_argument(
        "file", type=configuration, nargs="?", help="attention configuration: a YAML file or a name from `config list`"
    )
    masks.add_argument(
        "--list", action="store_true", help="print all masks, backends and cache policies, with their parameters"
    )
    masks.add_argument("--markdown", action="store_true", help="with --list: as Markdown tables")
    masks.add_argument("--tokens", type=positive, help="tokens of the sequence, prefix included")
    masks.add_argument("--heads", type=positive, help="attention heads")
    masks.add_argument("--module", metavar="NAME", help="name of the layer, for configurations with `layers`")
    masks.add_argument("--layer", type=natural, default=0, help="index of the layer (default: 0)")
    masks.add_argument("--num-layers", type=positive, help="layers of the model, for masks that depend on it")
    masks.add_argument("--epoch", type=natural, default=0, help="epoch, for masks that change with it (default: 0)")
    masks.add_argument("--head-dim", type=positive, help="channels per head, for masks that fit a budget")
    masks.add_argument(
        "--prefix-tokens", type=natural, help="leading tokens off the grid, unless FILE says; the mask's own by default"
    )
    masks.add_argument("--grid", type=positive, nargs="+", help="patch grid, unless FILE says: H W, or T H W")
    masks.add_argument("--plot", type=Path, metavar="FILE", help="draw every head into this image")
    bench_commands.add_commands(commands)
    actions = add_group(
        commands,
        "config",
        "ACTION",
        "Work with attention configurations.",
        ("sparse-mhsa config list", "sparse-mhsa config check my.yaml"),
    )
    check = add_command(
        actions,
        "check",
        run_config_check,
        "Say whether configurations are valid.",
        ("sparse-mhsa config check my.yaml", "sparse-mhsa config check vit_fibottention configs/*.yaml"),
    )
    check.add_argument("files", type=configuration, nargs="+", metavar="FILE")
    add_command(
        actions,
        "list",
        run_config_list,
        "Show the paths of the configurations that come with the package.",
        ("sparse-mhsa config list",),
    )
    schema = add_command(
        actions,
        "schema",
        run_config_schema,
        "Print the JSON Schema of a configuration.",
        ("sparse-mhsa config schema > attention.schema.json",),
    )
    schema.description = textwrap.fill(f"Print the JSON Schema of a configuration. {SCHEMA_LIMITS}")
    return parser


def run_masks(parsed: argparse.Namespace) -> int:
    """``sparse-mhsa masks``."""
    from . import Mask, load_config

    if parsed.markdown and not parsed.list:
        raise UsageError("masks: --markdown needs --list")
    if parsed.list and parsed.file is not None:
        raise UsageError(f"masks: --list shows what there is and takes no FILE, got '{parsed.file}'")
    if parsed.list:
        from .catalogue import tables

        heading = "## {}\n\n{}".format if parsed.markdown else "{}:\n{}".format
        print("\n".join(heading(*part) for part in tables(parsed.markdown).items()), end="")  # noqa: T201
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
    if path.is_dir():
        raise UsageError(f"--plot '{path}': expected a file, it is a directory")
    import matplotlib

    matplotlib.use("agg")
    figure = mask.plot()[0].get_figure(root=True)
    assert figure is not None
    try:
        # Without a format, matplotlib would write to another name than the one that was asked for.
        figure.savefig(path, dpi=150, format=path.suffix[1:] or "png")
    except ValueError as error:  # an ending that matplotlib has no format for
        raise UsageError(f"--plot '{path}': {error}") from error
    except OSError as error:
        raise TrainingError(f"cannot write '{path}': {error}") from error


def run_config_check(parsed: argparse.Namespace) -> int:
    """``sparse-mhsa config check``: every file is checked, also after one that failed.

    Where a file says what the grid is, its mask is tried out as well.
    """
    from .layer_mask import check_everywhere

    code = 0
    for path in parsed.files:
        try:
            config = load_config(path)
        except (ConfigError, OSError) as error:
            code = fail(f"error: {error}", 2)
            continue
        try:
            check_everywhere(config)
            print(f"{path}: ok")  # noqa: T201
        except ConfigError as error:
            code = fail(f"error: {path}: {error}", 2)
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
