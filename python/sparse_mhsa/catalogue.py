"""What the registry knows of every mask, as data and as a table."""

import json
from dataclasses import dataclass
from typing import Any

from ._core import registered_masks


@dataclass(frozen=True)
class Parameter:
    """One of the ``mask_kwargs`` of a mask."""

    name: str
    about: str
    required: bool
    default: str
    """As YAML; empty if required."""


@dataclass(frozen=True)
class Registered:
    """What the registry knows of a mask."""

    name: str
    aliases: tuple[str, ...]
    about: str
    """One sentence."""
    definition: str
    """Which keys a query keeps, as the source defines it."""
    parameters: tuple[Parameter, ...]
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


def table(markdown: bool) -> str:
    """Every registered mask: names, what it keeps, parameters with defaults, and prefix tokens, as a table."""
    header = ("name (aliases)", "each query keeps", "parameters (default)", "prefix")
    rows = [header]
    for mask in registered():
        code = "`{}`".format if markdown else str
        aliases = f" ({', '.join(map(code, mask.aliases))})" if mask.aliases else ""
        parameters = ", ".join(f"{code(x.name)} ({'required' if x.required else x.default})" for x in mask.parameters)
        prefix = "-" if mask.default_prefix is None else str(mask.default_prefix)
        rows.append((code(mask.name) + aliases, mask.about, parameters, prefix))
    if markdown:
        lines = [f"| {' | '.join(row)} |" for row in rows]
        lines.insert(1, "|---" * len(header) + "|")
    else:
        lines = [f"{name}, prefix {prefix}\n    {about}\n    {parameters}" for name, about, parameters, prefix in rows]
    return "\n".join(lines) + "\n"
