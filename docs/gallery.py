"""The table of masks in README.md and the gallery docs/masks.md, both made from the registry.

``python docs/gallery.py`` writes them, with one picture per mask from its YAML in configs/attention;
``python docs/gallery.py --check`` says what is stale. Pictures are only required to be there: their bytes depend on
the compression library.
"""

import math
import re
import sys
from pathlib import Path

import torch
from torch import Tensor

import sparse_mhsa as sm
from sparse_mhsa import viz
from sparse_mhsa.catalogue import Registered, registered, table

ROOT = Path(__file__).parents[1]
README = ROOT / "README.md"
PAGE = ROOT / "docs" / "masks.md"
PICTURES = ROOT / "docs" / "gallery"
CONFIGS = ROOT / "configs" / "attention"

BEGIN, END = "<!-- masks: made by `make docs` -->\n", "<!-- end of masks -->\n"
VIT_TOKENS, HEADS, LAYERS = 197, 6, 12


def readme() -> str:
    """README.md with a fresh table between its markers."""
    text = README.read_text(encoding="utf-8")
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise SystemExit(f"error: README.md: expected the lines {BEGIN.strip()!r} and {END.strip()!r}")
    return before + BEGIN + table(markdown=True) + END + after


def page() -> str:
    """docs/masks.md: definition, picture and YAML of every mask."""
    parts = [
        "# Masks\n\nMade by `make docs` from the registry: definitions and parameters are the comments in "
        "`src/pattern/`. "
        "Rows of a picture are queries, columns keys; one square per head.\n"
    ]
    return "\n".join([*parts, *(section(mask) for mask in registered())])


def section(mask: Registered) -> str:
    """One mask."""
    aliases = f" (also {', '.join(f'`{alias}`' for alias in mask.aliases)})" if mask.aliases else ""
    lines = [f"## `{mask.name}`{aliases}\n", f"{mask.about[0].upper()}{mask.about[1:]}.\n"]
    if mask.definition:
        # Rust's links between items mean nothing outside its documentation.
        lines.append(re.sub(r"\[(`[^`]+`)\](\([^)]*::[^)]*\))?", r"\1", mask.definition) + "\n")
    lines.append(f"![{mask.name}: the keys each query keeps](gallery/{mask.name}.png)\n")
    if mask.parameters:
        lines.append("| parameter | default | |\n|---|---|---|")
        for parameter in mask.parameters:
            default = "required" if parameter.required else f"`{parameter.default}`"
            about = " ".join(parameter.about.split())
            lines.append(f"| `{parameter.name}` | {default} | {about} |")
        lines.append("")
    yaml = (CONFIGS / f"{mask.name}.yaml").read_text(encoding="utf-8")
    lines.append(f"```yaml\n{yaml.rstrip()}\n```\n")
    return "\n".join(lines)


def picture(mask: Registered) -> bytes:
    """Every head of the mask's YAML at the size of a ViT, or at its own grid."""
    config = sm.load_config(CONFIGS / f"{mask.name}.yaml")
    if config.by_content:
        return viz.png(sm.choose_masks(config, *queries_and_keys())[0])
    layer_mask = sm.masks.LayerMask(config, HEADS, num_layers=LAYERS)
    return viz.png(layer_mask.at(layer_mask.num_tokens or VIT_TOKENS))


def queries_and_keys() -> tuple[Tensor, Tensor]:
    """Something to choose from, as a trained model might have it: vectors that depend on the place of a patch."""
    generator = torch.Generator().manual_seed(0)
    side = math.isqrt(VIT_TOKENS)
    places = torch.cartesian_prod(torch.arange(side), torch.arange(side)) / side
    waves = places @ torch.randn(HEADS, 2, 8, generator=generator) * 4
    features = torch.nn.functional.pad(torch.cat([waves.sin(), waves.cos()], -1), (0, 0, 1, 0))
    return features[None], features[None] + 0.1 * torch.randn(features.shape, generator=generator)


def main() -> int:
    """Write everything, or with ``--check`` compare."""
    texts = {README: readme(), PAGE: page()}
    pictures = {PICTURES / f"{mask.name}.png": mask for mask in registered()}
    if "--check" not in sys.argv[1:]:
        PICTURES.mkdir(exist_ok=True)
        for path, text in texts.items():
            path.write_text(text, encoding="utf-8")
        for path, mask in pictures.items():
            path.write_bytes(picture(mask))
        for path in set(PICTURES.glob("*.png")) - set(pictures):
            path.unlink()
        return 0
    stale = [path for path, text in texts.items() if not path.exists() or path.read_text(encoding="utf-8") != text]
    stale += [path for path in pictures if not path.exists()]
    stale += set(PICTURES.glob("*.png")) - set(pictures)
    for path in sorted(stale):
        sys.stderr.write(f"error: {path.relative_to(ROOT)} is stale: run `make docs` and commit what it writes\n")
    return 1 if stale else 0


if __name__ == "__main__":
    sys.exit(main())
