"""One way to turn whatever a user holds into an `AttentionConfig`."""

import json
import math
import operator
import re
import sys
from collections.abc import Iterable, Mapping
from importlib.resources import files
from pathlib import Path, PurePath
from typing import TypeAlias

import numpy as np

from ._core import AttentionConfig, ConfigError

MAX_CONFIG_BYTES = 64 * 1024
"""Longest document that is read from disk; the parser refuses longer text as well."""

ConfigLike: TypeAlias = AttentionConfig | Mapping[str, object] | Path | str
"""What every ``config`` argument takes; OmegaConf nodes are accepted too."""


def configs() -> dict[str, Path]:
    """The attention configurations that come with the package.

    Returns:
        Name, such as ``"vit_fibottention"``, to the path of its YAML file, in alphabetical order.
    """
    folder = files(__package__) / "configs" / "attention"
    assert isinstance(folder, Path)  # a compiled extension is never imported from inside an archive
    return {path.stem: path for path in sorted(folder.glob("*.yaml"))}


def load_config(config: ConfigLike) -> AttentionConfig:
    """Parse an attention configuration.

    Args:
        config: a path to a YAML file (`str` or `Path`), YAML or JSON text (a `str` with a line break or a
            colon), a mapping (its numbers may be NumPy's, its texts paths, its values OmegaConf nodes), an OmegaConf
            node, or an `AttentionConfig`, which is returned as it is.

    Returns:
        The typed, range-checked configuration.

    Raises:
        ConfigError: the document cannot be honoured; the message names file, line and key.
        FileNotFoundError: ``config`` names a file that does not exist.
        TypeError: ``config`` is of none of these kinds, or a mapping holds something YAML cannot express.
    """
    if isinstance(config, AttentionConfig):
        return config
    if _is_omegaconf(config):
        config = _of_omegaconf(config)  # type: ignore[assignment]
        if not isinstance(config, Mapping):
            raise config_error("config: expected a mapping with keys such as `mask`, got an OmegaConf list")
    if isinstance(config, Mapping):
        return _load_mapping(config)
    if isinstance(config, Path):
        return _load_file(config)
    if isinstance(config, str):
        return _load_string(config)
    raise TypeError(
        f"config: expected a path, YAML text, mapping, OmegaConf node or AttentionConfig, got {type(config).__name__}"
    )


def _is_omegaconf(value: object) -> bool:
    omegaconf = sys.modules.get("omegaconf")
    return omegaconf is not None and bool(omegaconf.OmegaConf.is_config(value))


def _of_omegaconf(node: object) -> object:
    """What a node holds once its interpolations are resolved."""
    omegaconf = sys.modules["omegaconf"]
    try:
        return omegaconf.OmegaConf.to_container(node, resolve=True, throw_on_missing=True, enum_to_str=True)
    except omegaconf.errors.OmegaConfBaseException as error:
        raise config_error(f"config: {error}", key=getattr(error, "full_key", None)) from error


_ESCAPED = re.compile(r"[\x7f-\x9f\u2028\u2029\ud800-\udfff\ufeff\ufffe\uffff]")
"""What YAML takes in quotes only if it is escaped. JSON would escape more, and as surrogates, which YAML refuses."""


def _load_mapping(config: Mapping[str, object]) -> AttentionConfig:
    try:
        return AttentionConfig.parse(_mapping_text(config))
    except ConfigError as error:
        # Nobody has written the text that is parsed here, so that places in it say nothing.
        message = re.sub(r"\Aline \d+, column \d+: ", "", str(error))
        raise config_error(message, key=error.key) from None  # type: ignore[attr-defined]


def _mapping_text(config: Mapping[str, object]) -> str:
    try:
        text = json.dumps(_plain(config), allow_nan=False, ensure_ascii=False)
        return _ESCAPED.sub(lambda match: f"\\u{ord(match[0]):04x}", text)
    except ConfigError:
        raise
    except (TypeError, ValueError, RecursionError) as error:
        raise TypeError(f"config: the mapping cannot be written as YAML: {error}") from error


def _plain(value: object, *path: str) -> object:
    """What JSON can write: NumPy's numbers and arrays, paths and OmegaConf nodes as Python has them."""
    if _is_omegaconf(value):
        value = _of_omegaconf(value)
    elif isinstance(value, (np.generic, np.ndarray)):
        value = value.tolist()
    elif isinstance(value, PurePath):
        value = str(value)
    if isinstance(value, Mapping):
        return {key: _plain(inner, *path, str(key)) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(inner, *path, str(index)) for index, inner in enumerate(value)]
    if isinstance(value, float) and not math.isfinite(value):
        key = ".".join(path)
        raise config_error(f"{key}: {value} is not a finite number", key=key)
    if value is not None and not isinstance(value, (bool, int, float, str)):
        raise TypeError(f"{type(value).__name__} is no number, text, list, mapping or null")
    return value


def _load_string(config: str) -> AttentionConfig:
    if "\n" in config or not config.strip():
        return AttentionConfig.parse(config)
    if _is_file(config) or config.endswith((".yaml", ".yml")):
        return _load_file(Path(config))
    if ":" in config:
        return AttentionConfig.parse(config)
    own = configs().get(config)
    hint = f"for a mask of that name write 'mask: {config}'" if own is None else f"the package has '{own}'"
    raise config_error(f"config: {config!r} is neither an existing file nor YAML text; {hint}")


def _is_file(name: str) -> bool:
    try:
        return Path(name).is_file()
    except (OSError, ValueError):  # text too long for a file name, or with a null character in it
        return False


def _load_file(path: Path) -> AttentionConfig:
    if not path.exists():
        own = configs().get(path.stem)
        hint = "" if own is None else f"; the package has '{own}'"
        raise FileNotFoundError(f"config: no such file: '{path}'{hint}")
    if path.is_dir():
        raise config_error(f"{path}: is a directory; expected a YAML file", str(path))
    with path.open("rb") as file:
        data = file.read(MAX_CONFIG_BYTES + 1)
    if len(data) > MAX_CONFIG_BYTES:
        raise config_error(f"{path}: longer than the {MAX_CONFIG_BYTES} bytes a config may have", str(path))
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise config_error(f"{path}: not UTF-8 text: {error}", str(path)) from error
    return AttentionConfig.parse(text, source=str(path))


def config_error(message: str, source: str | None = None, key: str | None = None) -> ConfigError:
    """A `ConfigError` with the attributes that the parser's own have."""
    error = ConfigError(message)
    vars(error).update(source=source, line=None, key=key)
    return error


MAX_HEADS = 4096
"""The most heads that a mask may have."""
MAX_TOKENS = 2**32 - 2
"""The most tokens that a mask may be for: columns are stored in 32 bits."""


def integer(name: str, value: object, least: int = 0, most: int = 2**63 - 1) -> int:
    """An argument that counts something.

    Args:
        name: of the argument.
        value: what was given for it; any integer, NumPy's too, but not a bool.
        least: the smallest number allowed.
        most: the largest.

    Returns:
        The number.

    Raises:
        TypeError: ``value`` is no integer.
        ValueError: it is less than ``least`` or more than ``most``.
    """
    try:
        if isinstance(value, bool):
            raise TypeError
        number = operator.index(value)  # type: ignore[arg-type]
    except TypeError:
        raise TypeError(f"{name}: expected an integer, got {type(value).__name__} {value!r:.60}") from None
    if number < least:
        raise ValueError(f"{name}: expected at least {least}, got {number}")
    if number > most:
        raise ValueError(f"{name}: expected at most {most}, got {number}")
    return number


def index(name: str, value: object, count: int) -> int:
    """An argument that names one of ``count`` things, from 0 on; see `integer`."""
    number = integer(name, value, -(2**63))
    if not 0 <= number < count:
        raise ValueError(f"{name}: expected 0 to {count - 1}, got {number}")
    return number


def integers(name: str, values: object, least: int = 0) -> tuple[int, ...]:
    """An argument that is a list of such numbers; see `integer`."""
    if not isinstance(values, Iterable) or isinstance(values, (str, bytes)):
        raise TypeError(f"{name}: expected a list of integers, got {type(values).__name__} {values!r:.60}")
    return tuple(integer(name, value, least) for value in values)
