"""``sparse-mhsa ablate heads``: what a trained classifier loses without each of its heads."""

import html
import json
import logging
import statistics
import typing
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import fields, replace
from pathlib import Path
from types import UnionType
from typing import Any

import torch
from torch import Tensor, nn

from ..adapters import Site, find_attention
from . import UsageError, require_packages
from .checkpoint import make_folder, read_checkpoint, seed_everything, write_text
from .recipes import AblationOptions, FinetuneOptions

require_packages("timm", "torchvision", "tqdm", "matplotlib")

from ..config import load_config  # noqa: E402
from ..mask import Mask  # noqa: E402
from . import figures  # noqa: E402
from .datasets import load_data  # noqa: E402
from .distributed import World  # noqa: E402
from .engine import Trainer  # noqa: E402
from .finetune import check_device, sparsify_model  # noqa: E402
from .interrupt import sigterm_as_ctrl_c  # noqa: E402
from .models import build_model, num_tokens  # noqa: E402
from .page import table, write_page  # noqa: E402
from .structure import mask_record  # noqa: E402
from .tasks import Classification, TwoBranch  # noqa: E402

logger = logging.getLogger("sparse_mhsa")

SCHEMA = "sparse_mhsa-ablation-1"


def ablate_heads(options: AblationOptions, command: str) -> dict[str, Any]:
    """Test a checkpoint without each head, and write ``heads.json`` and ``heads.html``.

    A head is taken away by zeroing the columns of the output projection that belong to it, in all layers at once (and
    with ``per_layer`` in each); the bias of the projection stays.

    Returns:
        The data of ``heads.json``.

    Raises:
        UsageError: the checkpoint, its data or the folder cannot be used.
        KeyboardInterrupt: Ctrl-C was pressed or SIGTERM came; the files hold the heads that were tested.
    """
    check_device(options.device)
    with _named_by("--checkpoint"):
        state = read_checkpoint(options.checkpoint)
    recipe = recipe_of(state, options.checkpoint)
    own: dict[str, Any] = {"device": options.device, "progress": options.progress, "finetune": None}
    # Nothing is trained: what only training needs must not restrict the batches to test.
    own |= {"accum_iter": 1, "mixup": 0.0, "cutmix": 0.0, "cutmix_minmax": None}
    recipe = replace(recipe, **own, data_path=options.data_path or recipe.data_path)
    seed_everything(recipe.seed)
    data = load_data(recipe)
    recipe = replace(recipe, batch_size=min(options.batch_size, data.sizes[0]))
    model = build_model(recipe, data)
    if state["attention"] is not None:
        sparsify_model(model, state["attention"], recipe, include=r"^blocks\." if recipe.two_branch else None)
    task = (TwoBranch if recipe.two_branch else Classification)(recipe, recipe.nb_classes or data.num_classes)
    trainer = Trainer(
        model, data, recipe, task, {"attention": state["attention"]}, World(device=torch.device(recipe.device))
    )
    with _named_by("--checkpoint"):
        trainer.load_weights(state, options.checkpoint)
    sites = [site for site in find_attention(model) if not site.name.startswith("decoder")]
    make_folder(options.output_dir)  # now rather than after the tests
    results: dict[str, Any] = {
        "schema": SCHEMA,
        "command": command,
        "checkpoint": str(options.checkpoint),
        "attention": state["attention"],
        "partial": True,
        "masks": _masks(sites, num_tokens(model)),
    }
    try:
        with sigterm_as_ctrl_c():
            _test(results, trainer, sites, per_layer=options.per_layer)
    except KeyboardInterrupt:
        if results.get("heads"):
            page = _write(results, options.output_dir)
            raise KeyboardInterrupt(f"interrupted; the heads that were tested are in {page}") from None
        raise
    results["partial"] = False
    logger.info("report: %s", _write(results, options.output_dir))
    return results


def _write(results: Mapping[str, Any], folder: Path) -> Path:
    write_text(folder / "heads.json", json.dumps(results, indent=2, allow_nan=False) + "\n")
    return write_page(folder / "heads.html", "What each head is worth", _body(results))


@contextmanager
def _named_by(flag: str) -> Iterator[None]:
    """Let errors about a checkpoint name the option that it was given by here."""
    try:
        yield
    except UsageError as error:
        raise UsageError(str(error).replace("--resume:", f"{flag}:", 1)) from error


def recipe_of(state: Mapping[str, Any], path: Path) -> FinetuneOptions:
    """The options of the run that wrote a checkpoint, as one process of its own.

    Raises:
        UsageError: the checkpoint's options are none.
    """
    kinds = typing.get_type_hints(FinetuneOptions)
    values = {}
    for item in fields(FinetuneOptions):
        value = state["args"].get(item.name)
        kind = kinds[item.name]
        if typing.get_origin(kind) is UnionType:
            kind = typing.get_args(kind)[0]
        if value is None:
            continue
        if kind is Path:
            value = Path(value)
        elif typing.get_origin(kind) is tuple:
            value = tuple(float(part) for part in str(value).split())
        values[item.name] = value
    alone = {"dist": False, "dist_eval": False, "world_size": 1, "local_rank": -1, "resume": None, "eval": False}
    alone |= {"attn_cfg": None, "log_dir": None, "dist_on_itp": False}
    try:
        return FinetuneOptions(**{**values, **alone})
    except (TypeError, UsageError) as error:
        raise UsageError(f"'{path}': args: {error}") from error


@contextmanager
def without_head(sites: list[Site], head: int) -> Iterator[None]:
    """Zero what the output projections of some layers read of one head."""
    saved: list[tuple[Tensor, slice, Tensor]] = []
    try:
        for site in sites:
            weight = _output_projection(site.module)
            _, width = site.adapter.heads(site.module)
            columns = slice(head * width, (head + 1) * width)
            saved.append((weight, columns, weight[:, columns].clone()))
            weight[:, columns] = 0.0
        yield
    finally:
        for weight, columns, before in saved:
            weight[:, columns] = before


def _output_projection(module: nn.Module) -> Tensor:
    name = next(name for name in ("proj", "out_proj") if hasattr(module, name))
    return module.get_parameter(f"{name}.weight").data


def _test(results: dict[str, Any], trainer: Trainer, sites: list[Site], *, per_layer: bool) -> None:
    """Put the accuracies into ``results`` one by one, so that it holds those before a Ctrl-C."""
    whole = results["test_acc1"] = trainer.evaluate()["test_acc1"]
    logger.info("with all heads: top-1 %.2f %%", whole)
    heads: list[dict[str, Any]] = []
    for head in range(sites[0].num_heads):
        with without_head(sites, head):
            accuracy = trainer.evaluate()["test_acc1"]
        logger.info("without head %d: top-1 %.2f %%, drop %.2f", head, accuracy, whole - accuracy)
        heads = [*heads, {"head": head, "test_acc1": accuracy, "drop": whole - accuracy}]
        results |= {"heads": heads, "mean_drop": statistics.mean(one["drop"] for one in heads)}
    if not per_layer:
        return
    for site in sites:
        row = []
        for head in range(site.num_heads):
            with without_head([site], head):
                row.append(whole - trainer.evaluate()["test_acc1"])
        results.setdefault("drop_per_layer", []).append(row)


def _masks(sites: list[Site], tokens: int) -> list[dict[str, Any]]:
    """What the masks look like; nothing for masks by content and backends, which have none to look at."""
    records = []
    for layer, site in enumerate(sites):
        layer_mask = site.layer_mask
        if layer_mask is None:
            config = load_config({"mask": "none", "num_prefix_tokens": site.num_prefix_tokens})
            records.append(mask_record(layer, Mask.from_config(config, tokens, site.num_heads)))
        elif site.backend is None and not layer_mask.by_content:
            records.append(mask_record(layer, layer_mask.at(tokens)))
    return records


def _body(results: Mapping[str, Any]) -> str:
    rows = [(str(one["head"]), f"{one['test_acc1']:.2f}", f"{one['drop']:+.2f}") for one in results["heads"]]
    parts = [
        f"<p>{html.escape(results['checkpoint'])}: top-1 {results['test_acc1']:.2f} % with all heads; a head taken "
        f"from all layers costs {results['mean_drop']:.2f} points in the mean.</p>",
        table(("head", "top-1 without it (%)", "drop"), rows),
        f"<figure>{figures.bars([one['drop'] for one in results['heads']], 'head', 'drop of top-1 (points)')}</figure>",
    ]
    if results["partial"]:
        parts.insert(0, "<p>Stopped before the end: what is below is not all that was to be tested.</p>")
    if "drop_per_layer" in results:
        drops = results["drop_per_layer"]
        parts.append("<h2>Drop per layer and head</h2>")
        parts.append(f"<figure>{figures.matrices({'layers by heads': drops}, 'head', 'layer')}</figure>")
    if results["masks"]:
        overlaps = {f"layer {record['layer']}": record["overlap"] for record in results["masks"]}
        parts += [
            "<h2>Overlap of the heads</h2><p>Jaccard index: edges of both heads over edges of either.</p>",
            f"<figure>{figures.matrices(overlaps, 'head', 'head')}</figure>",
            "<h2>Keys per query</h2>",
            f"<figure>{figures.degree_histograms(results['masks'])}</figure>",
            "<h2>Layers until every token has met every other</h2><ul>",
            *(
                f"<li>layer {record['layer']} ({html.escape(record['mask'])}): {_hops(record['hops'])}; among patches "
                f"alone: {_hops(record['hops_between_patches'])}</li>"
                for record in results["masks"]
            ),
            "</ul>",
        ]
    parts.append(f"<p>Made by <code>{html.escape(results['command'])}</code>; the numbers are in heads.json.</p>")
    return "\n".join(parts)


def _hops(number: int | None) -> str:
    return "never" if number is None else str(number)
