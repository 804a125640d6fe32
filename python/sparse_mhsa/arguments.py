"""Building blocks of the command line: a parser, and options generated from a table."""

import argparse
import types
import typing
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any, Literal, NoReturn, TypeVar

from ._core import AttentionConfig
from .config import configs, load_config
from .train import UsageError
from .train.options import Options as OptionTable
from .train.options import flag_name

Options = TypeVar("Options", bound=OptionTable)

CONFIGURATION = "YAML"
"""What ``--help`` calls the value of an option that is read by `configuration`."""


class Parser(argparse.ArgumentParser):
    """Reports bad usage as a `UsageError`, so that every error leaves `main` through one door."""

    def error(self, message: str) -> NoReturn:
        """Raise instead of printing the usage and exiting."""
        raise UsageError(f"{message} (see {self.prog} --help)")


def with_examples(*lines: str) -> dict[str, Any]:
    """What a parser is made with, so that its help ends with these command lines."""
    return {
        "epilog": "examples:\n" + "\n".join(f"  {line}" for line in lines),
        "formatter_class": argparse.RawDescriptionHelpFormatter,
    }


def add_group(commands: Any, name: str, metavar: str, about: str, examples: tuple[str, ...]) -> Any:  # noqa: ANN401
    """Add a command that consists of others.

    Args:
        commands: what ``add_subparsers`` returned.
        name: of the group.
        metavar: what the help calls one of the others.
        about: a sentence.
        examples: command lines for the end of the help text.

    Returns:
        What to add the others to.
    """
    group = commands.add_parser(name, help=about, description=about, allow_abbrev=False, **with_examples(*examples))
    return group.add_subparsers(required=True, metavar=metavar)


def add_command(commands: Any, name: str, run: Any, about: str, examples: tuple[str, ...]) -> Parser:  # noqa: ANN401
    """Add a command.

    Args:
        commands: what ``add_subparsers`` returned.
        name: of the command.
        run: called with the parsed arguments; returns the exit code.
        about: a sentence.
        examples: command lines for the end of the help text.

    Returns:
        The parser of the command.
    """
    added: Parser = commands.add_parser(
        name,
        help=about,
        description=about,
        allow_abbrev=False,
        **with_examples(*examples),
    )
    added.set_defaults(run=run)
    return added


def add_options(parser: argparse.ArgumentParser, defaults: OptionTable) -> None:
    """One command-line option per field of ``defaults``."""
    kinds = typing.get_type_hints(type(defaults))
    for item in fields(defaults):  # type: ignore[arg-type]  # option tables are dataclasses
        kind, default = kinds[item.name], getattr(defaults, item.name)
        if item.default == ():  # what it stands for depends on other options, which are not read yet
            default = ()
        about = item.metadata["about"].replace("%", "%%")
        if kind is bool:
            parser.add_argument(flag_name(item.name), action="store_true", help=about)
            continue
        if typing.get_origin(kind) is types.UnionType:  # X | None
            kind = typing.get_args(kind)[0]
        count = None
        if typing.get_origin(kind) is tuple:
            kind, second = typing.get_args(kind)
            count = "+" if second is Ellipsis else 2
        choices = typing.get_args(kind) if typing.get_origin(kind) is Literal else None
        reader = configuration if item.metadata["metavar"] == CONFIGURATION else kind
        parser.add_argument(
            flag_name(item.name),
            type=str if choices else reader,
            choices=choices,
            default=default,
            nargs=count,
            metavar=item.metadata["metavar"],
            help=about if default in (None, ()) else f"{about} (default: {_shown(default)})",
        )


def _shown(default: Any) -> str:  # noqa: ANN401
    if isinstance(default, Path) and default == configs().get(default.stem):
        return default.stem
    return " ".join(map(str, default)) if isinstance(default, tuple) else str(default)


def read_options(kind: type[Options], parsed: argparse.Namespace) -> Options:
    """The options dataclass from what `add_options` had parsed."""
    values = {item.name: getattr(parsed, item.name) for item in fields(kind)}  # type: ignore[arg-type]
    return kind(**{name: tuple(value) if isinstance(value, list) else value for name, value in values.items()})


def read_attention(path: Path, flag: str = "--attn-cfg") -> AttentionConfig:
    """The attention configuration of the file that an option names.

    Raises:
        UsageError: there is no such file, or it cannot be read; the message names ``flag``.
        ConfigError: it cannot be honoured; the message names file, line and key.
    """
    try:
        return load_config(path)
    except OSError as error:
        raise UsageError(f"{flag}: {str(error).removeprefix('config: ')}") from error


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


def is_given(flag: str, arguments: Sequence[str]) -> bool:
    """Whether a command line names an option, whatever value it gives."""
    return any(word.partition("=")[0] == flag for word in hyphenate(arguments))


def configuration(text: str) -> Path:
    """A file with an attention configuration, or the name of one that comes with the package."""
    path = Path(text)
    return path if path.exists() else configs().get(text, path)


def positive(text: str) -> int:
    """An integer of at least 1."""
    return _integer(text, 1)


def natural(text: str) -> int:
    """An integer of at least 0."""
    return _integer(text, 0)


def _integer(text: str, least: int) -> int:
    value = int(text)
    if value < least:
        raise argparse.ArgumentTypeError(f"must be at least {least}, got {value}")
    return value
