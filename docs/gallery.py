"""The tables in README.md and the gallery docs/masks.md, docs/backends.md and docs/caches.md, made from the registries.

``python docs/gallery.py`` writes them, with pictures from real runs: of each mask and backend one for every YAML that
shows it, of each cache policy one. ``python docs/gallery.py --check`` says what is stale. Pictures are only required
to be there: their bytes depend on the compression library.
"""

import inspect
import re
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

import sparse_mhsa as sm
from sparse_mhsa import viz
from sparse_mhsa.backends import build_backend
from sparse_mhsa.budget import allocate
from sparse_mhsa.catalogue import Mechanism, backends, policies, registered, tables
from sparse_mhsa.functional import attend

ROOT = Path(__file__).parents[1]
README = ROOT / "README.md"
DOCS = ROOT / "docs"
PICTURES = DOCS / "gallery"
CONFIGS = ROOT / "configs" / "attention"

MADE_BY = "made by `make docs`"
VIT_SIDE, HEADS, LAYERS = 14, 6, 12
BACKEND_SIDE, BACKEND_HEADS = 8, 12
CACHE_TOKENS, CACHE_HEADS, CAPACITY, RECENT = 48, 6, 12, 4
CELL = 3
"""Pixels along a side of a cell in the picture of a cache."""

BUDGET = "budget"
BUDGET_CODE = (
    'sm.KVCache.with_budget(sm.CachePolicy("score_based"), '
    f"total={CAPACITY * CACHE_HEADS}, weights=[{[*range(1, CACHE_HEADS + 1)]}])"
)

KEPT, FORGOTTEN, TO_COME = (40, 70, 130), (214, 214, 214), (255, 255, 255)
"""Colours of a token in a cache."""


def readme() -> str:
    """README.md with fresh tables between its markers."""
    text = README.read_text(encoding="utf-8")
    for kind, table in tables(markdown=True).items():
        begin, end = f"<!-- {kind}: {MADE_BY} -->\n", f"<!-- end of {kind} -->\n"
        before, found, rest = text.partition(begin)
        _, closed, after = rest.partition(end)
        if not found or not closed:
            raise SystemExit(f"error: README.md: expected the lines {begin.strip()!r} and {end.strip()!r}")
        text = before + begin + table + end + after
    return text


def masks_page() -> str:
    """docs/masks.md: definition, picture and YAML of every mask."""
    first = (
        "# Masks\n\nMade by `make docs` from the registry: definitions and parameters are the comments in "
        "`src/pattern/`. "
        "Rows of a picture are queries, columns keys; one square per head.\n"
    )
    of = "the keys each query keeps"
    return "\n".join([first, *(section(mask, configs_of_mask(mask), of, PICTURES) for mask in registered())])


def backends_page() -> str:
    """docs/backends.md, likewise."""
    first = (
        "# Backends\n\nMade by `make docs` from docstrings and the registry. Rows of a picture are queries, columns "
        f"keys; one square per head, of {1 + BACKEND_SIDE**2} tokens. A cell is the weight that the query gives to the "
        "value of the key, read off the output for one-hot values: the darker the larger, relative to the largest of "
        "the head; negative weights are red.\n"
    )
    of = "the weight each query gives to each key"
    folder = PICTURES / "backends"
    return "\n".join([first, *(section(backend, configs_of_backend(backend), of, folder) for backend in backends())])


def caches_page() -> str:
    """docs/caches.md: definition, picture and Python of every cache policy, and budgets."""
    folder, room = PICTURES / "caches", CAPACITY * CACHE_HEADS
    parts = [
        "# Cache policies\n\nMade by `make docs` from the docstring of `CachePolicy`. Rows of a picture are steps of "
        "decoding, columns positions; one square per head. Blue is kept after the step, grey forgotten, white to come. "
        f"Queries and keys are random, {CACHE_TOKENS} tokens; but for `full`, every head has room for {CAPACITY}.\n"
    ]
    for policy in policies():
        parts += [*heading(policy), picture_link(policy.name, "what is kept after each step", folder)]
        parts += [*parameters(policy), python(cache_code(policy))]
    parts += [
        "## Budgets\n",
        # Args and Raises are for those who call it.
        *(f"{(inspect.getdoc(of) or '').split('Args:')[0].strip()}\n" for of in (sm.KVCache.with_budget, allocate)),
        f"The same {room} entries as above, shared in proportion to weights:\n",
        picture_link(BUDGET, "what heads of different capacities keep after each step", folder),
        python(BUDGET_CODE),
    ]
    return "\n".join(parts)


def python(code: str) -> str:
    """A block of code."""
    return f"```python\n{code}\n```\n"


def section(mechanism: Mechanism, configs: Sequence[Path], shows: str, folder: Path) -> str:
    """One mask or backend: its parameters, and a picture with every YAML."""
    lines = heading(mechanism)
    for name, config in named(mechanism, configs).items():
        lines.append(picture_link(name, shows, folder))
        if name == mechanism.name:
            lines += parameters(mechanism)
        lines.append(f"```yaml\n{config.read_text(encoding='utf-8').rstrip()}\n```\n")
    return "\n".join(lines)


def named(mechanism: Mechanism, configs: Sequence[Path]) -> dict[str, Path]:
    """What the pictures are called: the first like the mechanism, others like the YAML that shows more of it."""
    return {mechanism.name if config is configs[0] else config.stem: config for config in configs}


def heading(mechanism: Mechanism) -> list[str]:
    """Names, sentence and definition."""
    aliases = f" (also {', '.join(f'`{alias}`' for alias in mechanism.aliases)})" if mechanism.aliases else ""
    # A docstring begins with its sentence.
    texts = [] if mechanism.definition.startswith(mechanism.about) else [mechanism.about + "."]
    texts += [mechanism.definition] if mechanism.definition else []
    texts[0] = texts[0][0].upper() + texts[0][1:]
    # Rust's links between items mean nothing outside its documentation.
    plain = [re.sub(r"\[(`[^`]+`)\](\([^)]*::[^)]*\))?", r"\1", text) for text in texts]
    return [f"## `{mechanism.name}`{aliases}\n", *(f"{text}\n" for text in plain)]


def picture_link(name: str, shows: str, folder: Path) -> str:
    """A picture of the page."""
    return f"![{name}: {shows}]({(folder / name).relative_to(DOCS)}.png)\n"


def parameters(mechanism: Mechanism) -> list[str]:
    """The table of parameters."""
    if not mechanism.parameters:
        return []
    lines = ["| parameter | default | |", "|---|---|---|"]
    for parameter in mechanism.parameters:
        default = "required" if parameter.required else f"`{parameter.default}`"
        lines.append(f"| `{parameter.name}` | {default} | {' '.join(parameter.about.split())} |")
    return ["\n".join(lines), ""]


def configs_of_mask(mask: Mechanism) -> list[Path]:
    """The YAML called like the mask, and those that show more of it."""
    more = [path for path in sorted(CONFIGS.glob(f"{mask.name}_*.yaml")) if sm.load_config(path).mask == mask.name]
    return [CONFIGS / f"{mask.name}.yaml", *more]


def configs_of_backend(backend: Mechanism) -> list[Path]:
    """Every YAML of a backend without edges; of one with edges, which are those of any mask, the densest."""
    asks = re.compile(rf"^ *backend: {backend.name}$", re.MULTILINE)
    found = [path for path in sorted(CONFIGS.glob("*.yaml")) if asks.search(path.read_text(encoding="utf-8"))]
    if not found:
        raise SystemExit(f"error: configs/attention: no YAML asks for the backend {backend.name!r}")
    if not sm.load_config(found[0]).uses_edges:
        return found
    return sorted(found, key=lambda path: sm.load_config(path).mask != "none")[:1]


def mask_picture(path: Path) -> bytes:
    """Every head of a mask at the size of a ViT, or at its own grid."""
    config = sm.load_config(path)
    if config.by_content:
        return viz.png(sm.choose_masks(config, *queries_and_keys(VIT_SIDE, HEADS))[0])
    layer_mask = sm.masks.LayerMask(config, HEADS, num_layers=LAYERS)
    return viz.png(layer_mask.at(layer_mask.num_tokens or 1 + VIT_SIDE**2))


def backend_picture(path: Path) -> bytes:
    """What the backend makes of one-hot values: its weights."""
    return viz.side_by_side([coloured(weights) for weights in weights_of(path)])


@torch.no_grad()
def weights_of(path: Path) -> Tensor:
    """(H, N, N): the output of attention whose value at key j is 1 in channel j and 0 elsewhere."""
    torch.manual_seed(0)  # of parameters that a backend brings
    layer_mask = sm.masks.LayerMask(sm.load_config(path), BACKEND_HEADS, num_layers=LAYERS)
    q, k = queries_and_keys(BACKEND_SIDE, BACKEND_HEADS)
    v = torch.eye(k.shape[2]).expand(1, BACKEND_HEADS, -1, -1)
    backend = build_backend(layer_mask, q.shape[3], 0.0, q)
    return (attend(q, k, v, layer_mask) if backend is None else backend.attend(q, k, v))[0][0]


def coloured(weights: Tensor) -> np.ndarray:
    """(N, N) weights as pixels, two by two for each."""
    depth = (weights.abs() / weights.abs().max()).numpy() ** viz.GAMMA
    light = np.round(255.0 * (1.0 - depth)).astype(np.uint8)
    red = np.where(weights.numpy() < 0, np.uint8(255), light)
    return np.stack([red, light, light], axis=-1).repeat(2, axis=0).repeat(2, axis=1)


def cache_code(policy: Mechanism) -> str:
    """The cache of the picture."""
    chosen = {"capacity": CAPACITY, "recent": RECENT}
    names = [of.name for of in policy.parameters if of.required or of.name == "capacity"]
    given = "".join(f", {name}={chosen[name]}" for name in names)
    return f'sm.KVCache(sm.CachePolicy("{policy.name}"{given}), num_layers=1)'


def cache_picture(code: str) -> bytes:
    """What the cache that ``code`` makes holds after each token, one square per head."""
    cache = eval(code, {"sm": sm})
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, CACHE_HEADS, CACHE_TOKENS, 8, generator=generator) for _ in range(3))
    pixels = np.full((CACHE_HEADS, CACHE_TOKENS, CACHE_TOKENS, 3), TO_COME, dtype=np.uint8)
    for step in range(CACHE_TOKENS):
        token = slice(step, step + 1)
        cache.attend(0, q[:, :, token], k[:, :, token], v[:, :, token])
        pixels[:, step, : step + 1] = FORGOTTEN
        for head, kept in enumerate(cache[0].entries().positions[0]):
            pixels[head, step, kept[kept >= 0]] = KEPT
    return viz.side_by_side(list(pixels.repeat(CELL, axis=1).repeat(CELL, axis=2)))


def queries_and_keys(side: int, heads: int) -> tuple[Tensor, Tensor]:
    """Something to choose from, as a trained model might have it: vectors that depend on the place of a patch."""
    generator = torch.Generator().manual_seed(0)
    places = torch.cartesian_prod(torch.arange(side), torch.arange(side)) / side
    waves = places @ torch.randn(heads, 2, 8, generator=generator) * 4
    features = torch.nn.functional.pad(torch.cat([waves.sin(), waves.cos()], -1), (0, 0, 1, 0))
    return features[None], features[None] + 0.1 * torch.randn(features.shape, generator=generator)


def pictures() -> dict[Path, Callable[[], bytes]]:
    """How every picture is made."""
    made: dict[Path, Callable[[], bytes]] = {}
    for mask in registered():
        for name, config in named(mask, configs_of_mask(mask)).items():
            made[PICTURES / f"{name}.png"] = partial(mask_picture, config)
    for backend in backends():
        for name, config in named(backend, configs_of_backend(backend)).items():
            made[PICTURES / "backends" / f"{name}.png"] = partial(backend_picture, config)
    for policy in policies():
        made[PICTURES / "caches" / f"{policy.name}.png"] = partial(cache_picture, cache_code(policy))
    made[PICTURES / "caches" / f"{BUDGET}.png"] = partial(cache_picture, BUDGET_CODE)
    return made


def main() -> int:
    """Write everything, or with ``--check`` compare."""
    texts = {
        README: readme(),
        DOCS / "masks.md": masks_page(),
        DOCS / "backends.md": backends_page(),
        DOCS / "caches.md": caches_page(),
    }
    made, present = pictures(), set(PICTURES.rglob("*.png"))
    if "--check" not in sys.argv[1:]:
        for path, text in texts.items():
            path.write_text(text, encoding="utf-8")
        for path, picture in made.items():
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(picture())
        for path in present - set(made):
            path.unlink()
        return 0
    stale = [path for path, text in texts.items() if not path.exists() or path.read_text(encoding="utf-8") != text]
    stale += present ^ set(made)
    for path in sorted(stale):
        sys.stderr.write(f"error: {path.relative_to(ROOT)} is stale: run `make docs` and commit what it writes\n")
    return 1 if stale else 0


if __name__ == "__main__":
    sys.exit(main())
