"""Every mask, backend and cache policy, as data and as tables: from the registries, and the docstrings behind them."""

import inspect
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import MISSING, dataclass
from typing import Any

from ._core import AttentionConfig, config_schema, registered_masks
from .backends import documentation, has_attention_of_its_own
from .cache_policy import POLICIES, CachePolicy


@dataclass(frozen=True)
class Parameter:
    """One of the ``mask_kwargs`` of a mask, of the ``backend_kwargs`` of a backend, or of the keys of a policy."""

    name: str
    about: str
    required: bool
    default: str
    """As YAML; empty if required."""


@dataclass(frozen=True)
class Mechanism:
    """What is known of a mask, a backend or a cache policy."""

    name: str
    aliases: tuple[str, ...]
    about: str
    """One sentence."""
    definition: str
    """What it computes or keeps, and whose it is."""
    parameters: tuple[Parameter, ...]


@dataclass(frozen=True)
class Registered(Mechanism):
    """What the registry knows of a mask."""

    default_prefix: int | None
    """Prefix tokens if nobody says how many there are; None if that depends on the parameters."""


def registered() -> tuple[Registered, ...]:
    """Every registered mask, in the order of the documentation."""
    return tuple(registered_from(entry) for entry in registered_masks())


def registered_from(entry: dict[str, Any]) -> Registered:
    """An entry of ``_core.registered_masks`` or ``register.user_masks``, read."""
    schema = json.loads(entry["schema"])
    required = schema.get("required", [])
    parameters = tuple(
        Parameter(key, of.get("description", ""), key in required, json.dumps(of["default"]) if "default" in of else "")
        for key, of in schema["properties"].items()
        if key in entry["keys"]
    )
    definition = schema.get("description", "")
    return Registered(
        entry["name"], tuple(entry["aliases"]), entry["about"], definition, parameters, entry["default_prefix"]
    )


def backends() -> tuple[Mechanism, ...]:
    """Every backend that a configuration may name and this process has, those of users too."""
    definitions = json.loads(config_schema())["$defs"]
    names = [
        name
        for name in definitions["document"]["properties"]["backend"]["enum"]
        # The schema has titles for those with attention of their own.
        if name and (has_attention_of_its_own(name) or "title" not in definitions.get(f"backend_{name}", {}))
    ]
    # Names for the same are one backend: the configuration reads them as the same.
    groups: dict[str, list[str]] = {}
    for name in names:
        of = name if has_attention_of_its_own(name) else AttentionConfig.parse(f"backend: {name}").to_json()
        groups.setdefault(of, []).append(name)
    masks = {mask.name: mask for mask in registered()}
    found = []
    for name, *aliases in groups.values():
        definition, kwargs = documentation(name), {}
        about = _first_sentence(definition)
        if not has_attention_of_its_own(name):
            config = AttentionConfig.parse(f"backend: {name}")
            if config.mask != "none":
                # The default of a parameter may be another than that of the mask.
                kwargs = json.loads(config.to_json())["mask_kwargs"]
                about = f"softmax over the mask ``{config.mask}``: {masks[config.mask].about}"
                definition = masks[config.mask].definition
        parameters = tuple(_parameters(definitions[f"backend_{name}"], definitions, kwargs))
        found.append(Mechanism(name, tuple(aliases), about, definition, parameters))
    return tuple(found)


def _parameters(
    schema: Mapping[str, Any], definitions: Mapping[str, Any], defaults: Mapping[str, Any], prefix: str = ""
) -> Iterator[Parameter]:
    """The parameters of a JSON Schema, ``outer.inner`` for those inside another; without those that have no effect."""
    for key, of in schema["properties"].items():
        inner = definitions.get(str(of.get("$ref", "")).removeprefix("#/$defs/"), {})
        if "properties" in inner:
            yield from _parameters(inner, definitions, defaults.get(key, {}), f"{prefix}{key}.")
        elif key in schema.get("required", ()):
            yield Parameter(prefix + key, of.get("description", ""), True, "")
        elif "default" in of:
            default = json.dumps(defaults.get(key, of["default"]))
            yield Parameter(prefix + key, of.get("description", ""), False, default)


def policies() -> tuple[Mechanism, ...]:
    """Every policy by which a cache forgets, in the order of the docstring of `CachePolicy`."""
    text = inspect.getdoc(CachePolicy) or ""
    definitions = dict(re.findall(r"^``(\w+)``\n((?: {4}.+\n)+)", text, re.MULTILINE))
    keys = dict(re.findall(r"^ {4}(\w+): (.+(?:\n {8}.+)*)", text, re.MULTILINE))
    found = []
    for name, defaults in POLICIES.items():
        definition = " ".join(definitions[name].split())
        parameters = tuple(
            Parameter(key, keys[key], default is MISSING, "" if default is MISSING else json.dumps(default))
            for key, default in defaults.items()
        )
        found.append(Mechanism(name, (), _first_sentence(definition), definition, parameters))
    return tuple(found)


def _first_sentence(text: str) -> str:
    paragraph = " ".join(text.partition("\n\n")[0].split())
    return paragraph.partition(". ")[0].removesuffix(".")


def tables(markdown: bool) -> dict[str, str]:
    """What there is, by kind: names, one sentence, parameters with defaults, and prefix tokens of masks."""
    masks = registered()
    prefixes = ["-" if mask.default_prefix is None else str(mask.default_prefix) for mask in masks]
    return {
        "masks": _table(masks, "each query keeps", markdown, prefixes),
        "backends": _table(backends(), "computes", markdown),
        "cache policies": _table(policies(), "keeps", markdown),
    }


def _table(mechanisms: Sequence[Mechanism], does: str, markdown: bool, prefixes: Sequence[str] = ()) -> str:
    header = ["name (aliases)", does, "parameters (default)"]
    code = "`{}`".format if markdown else str
    rows = []
    for of in mechanisms:
        aliases = f" ({', '.join(map(code, of.aliases))})" if of.aliases else ""
        parameters = ", ".join(f"{code(x.name)} ({'required' if x.required else x.default})" for x in of.parameters)
        rows.append([code(of.name) + aliases, of.about.replace("``", "`" if markdown else ""), parameters])
    if markdown:
        if prefixes:
            header.append("prefix")
            rows = [[*row, prefix] for row, prefix in zip(rows, prefixes, strict=True)]
        lines = [f"| {' | '.join(row)} |" for row in [header, *rows]]
        lines.insert(1, "|---" * len(header) + "|")
    else:
        if prefixes:
            rows = [[f"{name}, prefix {prefix}", *rest] for (name, *rest), prefix in zip(rows, prefixes, strict=True)]
        lines = ["\n    ".join(filter(None, row)) for row in rows]
    return "\n".join(lines) + "\n"
