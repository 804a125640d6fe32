"""``sparse-mhsa demo``: the same model trained dense and sparse, and a report that compares the two."""

import datetime
import logging
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import Mask, load_config, sparse_attention
from ..adapters import find_attention
from ..flops import attention_cost
from ..machine import environment
from . import DataError, TrainingError, UsageError, require_packages

require_packages("matplotlib", "timm")

import timm  # noqa: E402

from . import figures  # noqa: E402
from .checkpoint import read_checkpoint  # noqa: E402
from .datasets import ImageData  # noqa: E402
from .engine import checkpoint_of  # noqa: E402
from .finetune import Run, attention_text, finetune  # noqa: E402
from .interrupt import Interrupted  # noqa: E402
from .models import num_tokens  # noqa: E402
from .recipes import DemoOptions, FinetuneOptions, TrainOptions  # noqa: E402
from .report import SCHEMA, write_report  # noqa: E402
from .resume import MAY_DIFFER  # noqa: E402
from .timing import compare  # noqa: E402

logger = logging.getLogger("sparse_mhsa")

NOT_RECIPE = (
    "attn_cfg",
    "blr",
    "data_path",
    "dry_run",
    "finetune",
    "output_dir",
    "progress",
    "resume",
    "eval",
    "overwrite",
)
"""Options that the report does not list: paths, what has no effect on the result, and `blr`, which gives `lr`."""


def demo(options: DemoOptions, command: str) -> Path | None:
    """Train twice, measure, and write ``report.html`` and ``report.json`` into ``options.output_dir``.

    What a demo of the same recipe has trained there is not trained again: one that was interrupted goes on.

    Args:
        options: the recipe of both runs; ``attn_cfg`` is the attention of the sparse one.
        command: what the user typed; the report quotes it.

    Returns:
        The path of the HTML page; None after a dry run, and in all but the first process of a distributed run.

    Raises:
        UsageError: an option cannot be used as given.
        ConfigError: the attention configuration cannot be honoured.
        Interrupted: Ctrl-C was pressed; the same demo goes on after the last finished step.
    """
    # Read before the dense run, whose minutes a mistake in the configuration should not cost.
    if attention_text(options.attn_cfg) is None:
        raise UsageError("--attn-cfg: expected the attention configuration of the sparse run, got none")
    if options.two_branch:
        raise UsageError("--two-branch is for sparse-mhsa finetune: the demo compares what classifies and nothing else")
    _check_masks(options)
    with _without_resume():
        runs = {
            "dense": finetune(_run_options(options, "dense", None)),
            "sparse": finetune(_run_options(options, "sparse", options.attn_cfg)),
        }
    if options.dry_run or not runs["sparse"].trainer.world.is_first:
        return None
    logger.info("measuring, the two runs taking turns")
    masks = layer_masks(runs["sparse"].model)
    report = assemble(runs, masks, command)
    page = write_report(report, draw(runs, masks, report), options.output_dir)
    logger.info("report: %s", page)
    return page


def _check_masks(options: DemoOptions) -> None:
    """Refuse, before anything is trained, masks that do not fit the model or that have nothing to draw.

    Raises:
        UsageError: a layer chooses keys by content, or has a backend without edges.
        ConfigError: the attention configuration cannot be honoured.
    """
    level = logger.level
    logger.setLevel(logging.ERROR)  # the runs themselves will say it all
    try:
        planned = finetune(replace(_run_options(options, "sparse", options.attn_cfg), resume=None, dry_run=True))
    finally:
        logger.setLevel(level)
    for site in find_attention(planned.model):
        if site.layer_mask is not None and (site.backend is not None or site.layer_mask.by_content):
            why = "computes without edges" if site.backend is not None else "chooses keys anew for every input"
            raise UsageError(
                f"--attn-cfg '{options.attn_cfg}': the demo draws what every head keeps, and {site.name} {why}; "
                "compare it by sparse-mhsa finetune or bench accuracy"
            )


def layer_masks(model: nn.Module) -> list[Mask]:
    """The mask of every attention layer, as the model uses it; a layer left dense keeps everything."""
    tokens = num_tokens(model)
    masks = []
    for site in find_attention(model):
        dense = {"mask": "none", "num_prefix_tokens": site.num_prefix_tokens}
        if site.layer_mask is None:
            masks.append(Mask.from_config(dense, tokens, site.num_heads))
        else:
            masks.append(site.layer_mask.at(tokens))
    return masks


def assemble(runs: Mapping[str, Run], masks: Sequence[Mask], command: str) -> dict[str, Any]:
    """The data of the report; the module `report` documents its schema."""
    sparse = runs["sparse"]
    options, data = sparse.options, sparse.data
    model: Any = sparse.model
    site = find_attention(model)[0]
    num_heads, head_dim = site.adapter.heads(site.module)
    train_images, test_images = data.sizes
    return {
        "schema": SCHEMA,
        "created": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "command": command,
        "environment": {**environment(), "timm": timm.__version__},
        "data": {
            "name": options.dataset,
            "train_images": train_images,
            "test_images": test_images,
            "classes": data.num_classes,
            "image_size": data.input_size,
            "patch_size": model.patch_embed.patch_size[0],
            "tokens": num_tokens(model),
            "prefix_tokens": model.num_prefix_tokens,
        },
        "model": {
            "name": options.model,
            "layers": len(masks),
            "heads": num_heads,
            "head_dim": head_dim,
        },
        "recipe": {
            name: value
            for name, value in {**options.as_dict(), "lr": options.peak_lr}.items()
            if name not in NOT_RECIPE
        },
        "runs": {name: run_record(run) for name, run in runs.items()},
        "timing": measure({name: run.model for name, run in runs.items()}, masks, data, options),
        "masks": [mask_record(index, mask) for index, mask in enumerate(masks)],
    }


def run_record(run: Run) -> dict[str, Any]:
    """What the report says about one run."""
    cost = attention_cost(run.model, num_tokens(run.model))
    history = run.trainer.history
    return {
        "title": "dense" if run.attention is None else load_config(run.attention).mask,
        "attention_config": run.attention,
        "parameters": run.trainer.num_parameters,
        "epochs": history,
        "test_acc1_last": history[-1]["test_acc1"],
        "test_acc1_best": run.trainer.best_value,
        "attention_cost": {
            "edges": sum(layer.nnz for layer in cost.layers),
            "gmacs": cost.sparse("GMACs"),
            "gflops": cost.sparse("GFLOPs"),
            "pruning_ratio_patches": cost.pruning_ratio_patches,
            "pruning_ratio_whole": cost.pruning_ratio_whole,
        },
        "step_time": history[-1]["step_time"],
        "attention_time": history[-1]["attention_time"],
        "train_time": sum(entry["train_time"] for entry in history),
    }


def mask_record(layer: int, mask: Mask) -> dict[str, Any]:
    """What the report says about the mask of one layer."""
    return {"layer": layer, "pruning_ratio_patches": mask.pruning_ratio, "edges": mask.nnz_per_head}


def measure(
    models: Mapping[str, nn.Module], masks: Sequence[Mask], data: ImageData, options: TrainOptions
) -> dict[str, Any]:
    """Time both models at the run's true shapes, taking turns, on random inputs.

    ``core`` is forward and backward of what lies between the projections, for every layer:
    scaled_dot_product_attention against `sparse_attention` with the layer's mask. ``layer`` is the same for the
    trained models' attention modules, ``step`` for the whole models and their loss, without the update.
    """
    device = torch.device(options.device)
    generator = torch.Generator().manual_seed(options.seed)
    sites = {name: find_attention(model) for name, model in models.items()}
    first, tokens = sites["dense"][0], num_tokens(models["dense"])
    heads, head_dim = first.adapter.heads(first.module)

    def random(*shape: int) -> Tensor:
        return torch.randn(options.batch_size, *shape, generator=generator).to(device).requires_grad_()

    q, k, v = (random(heads, tokens, head_dim) for _ in range(3))
    x = random(tokens, heads * head_dim)
    images = random(data.in_chans, data.input_size, data.input_size).detach()
    labels = torch.arange(options.batch_size, device=device) % data.num_classes

    def trained(module: nn.Module) -> list[Tensor]:
        return [parameter for parameter in module.parameters() if parameter.requires_grad]

    def dense_core() -> None:
        for _ in masks:
            _differentiate(F.scaled_dot_product_attention(q, k, v), [q, k, v])

    def sparse_core() -> None:
        for mask in masks:
            _differentiate(sparse_attention(q, k, v, mask), [q, k, v])

    def layers(name: str) -> None:
        for site in sites[name]:
            _differentiate(site.module(x), [x, *trained(site.module)])

    def step(name: str) -> None:
        loss = F.cross_entropy(models[name](images), labels)
        torch.autograd.grad(loss, trained(models[name]))

    for model in models.values():
        model.train()
    functions: dict[str, dict[str, Callable[[], None]]] = {
        "core": {"dense": dense_core, "sparse": sparse_core},
        "layer": {name: partial(layers, name) for name in models},
        "step": {name: partial(step, name) for name in models},
    }
    timings = {
        kind: {name: asdict(timing) for name, timing in compare(by_run, device).items()}
        for kind, by_run in functions.items()
    }
    return {"batch_size": options.batch_size, **timings}


def draw(runs: Mapping[str, Run], masks: Sequence[Mask], report: Mapping[str, Any]) -> dict[str, str]:
    """The pictures of the report."""
    data = runs["sparse"].data
    # The first test image of every class, or of as many as a picture has room for: chosen by nobody.
    firsts: dict[int, Tensor] = {}
    for image, label in data.test:  # type: ignore[attr-defined]  # torch's Dataset declares no __iter__
        firsts.setdefault(int(label), image)
        if len(firsts) == min(data.num_classes, figures.SHOWN_CLASSES):
            break
    labels = sorted(firsts)
    batch = torch.stack([firsts[label] for label in labels])
    guesses = {report["runs"][name]["title"]: _classify(run, batch) for name, run in runs.items()}
    pictures = [figures.pixels(image, data.mean, data.std) for image in batch]
    model: Any = runs["sparse"].model
    rows, columns = model.patch_embed.grid_size
    return {
        "curves": figures.training_curves(report["runs"]),
        "predictions": figures.predictions(pictures, [data.class_names[label] for label in labels], guesses),
        "masks": figures.mask_grid(masks),
        "visible": figures.visible_patches(
            pictures[len(pictures) // 2],
            masks[0].to_dense().numpy(),
            (rows // 2, columns // 2),
            report["data"]["patch_size"],
            report["data"]["prefix_tokens"],
        ),
    }


def _run_options(options: DemoOptions, name: str, attn_cfg: Path | None) -> FinetuneOptions:
    # Another demo in the same folder is replaced, this one goes on.
    own = {"attn_cfg": attn_cfg, "output_dir": options.output_dir / name, "overwrite": True}
    run = FinetuneOptions(**{**asdict(options), **own})
    checkpoint = checkpoint_of(run.output_dir)
    return replace(run, resume=checkpoint) if checkpoint is not None and _is_of(run, checkpoint) else run


def _is_of(run: FinetuneOptions, checkpoint: Path) -> bool:
    """Whether a file is a checkpoint of this very run, which another demo in the same folder leaves there too."""
    try:
        state = read_checkpoint(checkpoint)
    except UsageError:  # damaged, or of an older version: trained anew
        return False
    free = {*MAY_DIFFER, "world_size"} - {"finetune"}  # torchrun tells the number of processes later
    recipe = {name: value for name, value in run.as_dict().items() if name not in free}
    same = all(state["args"].get(name, NotImplemented) == value for name, value in recipe.items())
    return same and state["attention"] == attention_text(run.attn_cfg)


@contextmanager
def _without_resume() -> Iterator[None]:
    """Let what ends a run point to the demo's own command, which knows no ``--resume``."""
    try:
        yield
    except (Interrupted, DataError, TrainingError) as error:
        message = re.sub("continue with --resume .*", "the same command goes on where it stopped", str(error))
        raise type(error)(message) from error


def _differentiate(output: Tensor, inputs: list[Tensor]) -> None:
    torch.autograd.grad(output, inputs, output.detach())


@torch.no_grad()
def _classify(run: Run, images: Tensor) -> list[str]:
    run.model.eval()
    logits = run.model(images.to(run.trainer.device))
    # With --nb-classes there may be outputs that no class of the data uses.
    return [run.data.class_names[index] for index in logits[:, : run.data.num_classes].argmax(dim=1).tolist()]
