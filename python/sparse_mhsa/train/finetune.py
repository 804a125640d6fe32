"""``sparse-mhsa finetune``: train or evaluate one image classifier, with sparse attention or without."""

import json
import logging
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from ..arguments import read_attention
from ..flops import AttentionCost, attention_cost
from . import UsageError, require_packages
from .checkpoint import read_checkpoint, seed_everything
from .datasets import ImageData, load_data
from .distributed import World, world_of
from .interrupt import sigterm_as_ctrl_c
from .recipes import FinetuneOptions, ImageOptions, PretrainOptions, RunOptions, TrainOptions, VideoOptions

require_packages("timm", "torchvision", "tqdm")

from .dry_run import plan  # noqa: E402
from .engine import BEST, Trainer, occupied  # noqa: E402
from .models import build_model, num_tokens  # noqa: E402
from .resume import resolve_attention  # noqa: E402
from .tasks import Classification, TwoBranch  # noqa: E402

logger = logging.getLogger("sparse_mhsa")

Recipe = TypeVar("Recipe", bound=RunOptions)


@dataclass(frozen=True)
class Run:
    """A finished run.

    Attributes:
        options: its recipe.
        data: its images.
        model: the trained model.
        trainer: what trained it, with its ``history``.
        attention: its attention configuration as YAML text, or ``None`` for dense attention.
        results: test loss and accuracies of the model as it is now; empty after a dry run.
    """

    options: TrainOptions
    data: ImageData
    model: nn.Module
    trainer: Trainer
    attention: str | None
    results: dict[str, Any]


def finetune(options: FinetuneOptions, command: str | None = None) -> Run:
    """Train the model that ``options`` describe, or evaluate its checkpoint.

    Args:
        options: the recipe.
        command: what the user typed; ``report.html`` quotes it, and is written only if it is given.

    Raises:
        UsageError: an option, path, data set or checkpoint cannot be used as given.
        ConfigError: the attention configuration cannot be honoured.
        TrainingError: the loss became infinite or NaN.
        Interrupted: Ctrl-C was pressed; the last checkpoint continues after the last finished step.
    """
    writes = command is not None and not (options.eval or options.dry_run)
    if writes:  # now rather than after hours of training
        require_packages("matplotlib")
    with started(options) as (options, world):
        run = _finetune(options, world)
        if writes and world.is_first:
            logger.info("report: %s", _write_page(run, command))
        return run


def _write_page(run: Run, command: str | None) -> Path:
    from .run_page import write_run_page

    options, last = run.options, run.trainer.history[-1]
    train_images, test_images = run.data.sizes
    kind = "Linear probe" if options.linear_probe else "Two branches" if options.two_branch else "Classifier"
    about = (
        f"{options.model} on {options.dataset}: {train_images:,} training and {test_images:,} test images, "
        f"{run.data.num_classes} classes, {'dense' if run.attention is None else 'sparse'} attention. Test top-1 "
        f"{last['test_acc1']:.2f} % after the last epoch, best {run.trainer.best_value:.2f} %; guessing gives "
        f"{100 / run.data.num_classes:.1f} %."
    )
    return write_run_page(run.trainer, kind, about, image_costs(run.model), command or "")


def _finetune(options: FinetuneOptions, world: World) -> Run:
    if options.linear_probe and options.batch_size * world.size == 1 and not options.eval:
        raise UsageError("--batch-size must be at least 2 for --linear-probe, which normalises over the batch, got 1")
    seed_everything(options.seed)
    # Read first: a bad checkpoint or configuration should not cost the time that data and model take.
    state = read_checkpoint(options.resume) if options.resume else None
    attention = attention_text(options.attn_cfg)
    if state is not None and options.resume is not None:
        attention = resolve_attention(state, options.resume, options.attn_cfg, attention)
    data = load_data(options)
    model = build_model(options, data)
    if attention is not None:
        sparsify_model(model, attention, options, include=r"^blocks\." if options.two_branch else None)
    task = (TwoBranch if options.two_branch else Classification)(options, options.nb_classes or data.num_classes)
    trainer = Trainer(model, data, options, task, {"attention": attention}, world)
    describe(trainer)
    # Again, for packages that draw while they are imported; the same weights everywhere, other dropout in each process.
    seed_everything(options.seed + world.rank)
    results = run(trainer, options, state, image_costs(model))
    return Run(options, data, model, trainer, attention, results)


def run(
    trainer: Trainer,
    options: FinetuneOptions | PretrainOptions | VideoOptions,
    state: dict[str, Any] | None,
    costs: list[tuple[str, AttentionCost, int]],
) -> dict[str, Any]:
    """Continue from ``state``, train or evaluate, and say what came of it.

    Args:
        trainer: the run, ready to start.
        options: its recipe.
        state: of the checkpoint to go on from, or None.
        costs: of attention, for a dry run: what it is, its cost, and how many such sequences an input has.

    Returns:
        The last results.

    Raises:
        UsageError: ``state`` is the checkpoint of another run.
        TrainingError: the loss became infinite or NaN.
        Interrupted: Ctrl-C was pressed.
    """
    only_evaluate = getattr(options, "eval", False)
    if state is not None and options.resume is not None:
        if only_evaluate:
            trainer.load_weights(state, options.resume)
        else:
            trainer.load_state(state, options.resume)
            logger.info("resuming %s at epoch %d, step %d", options.resume, trainer.epoch + 1, trainer.step)
    if options.dry_run:
        for line in plan(trainer, costs):
            logger.info("%s", line)
        return {}
    if only_evaluate:
        results = trainer.evaluate()
        logger.info("test %s", json.dumps(results))
        return results
    trainer.fit()
    where = trainer.best or f"an earlier run's {BEST}, which is not beside {options.resume}"
    if "test_acc1" in trainer.history[-1]:
        logger.info("best test top-1 %.2f %% in %s", trainer.best_value, where)
    else:
        logger.info("best test loss %.4f in %s", trainer.best_value, where)
    return trainer.history[-1]


@contextmanager
def started(options: Recipe) -> Iterator[tuple[Recipe, World]]:
    """The processes of a run, connected, and its options as they turn out there; the first says which have no effect.

    Raises:
        UsageError: the device or the processes cannot be used, or the output folder holds another run.
    """
    check_device(options.device)
    writes = not any(getattr(options, name, False) for name in ("eval", "dry_run", "overwrite"))
    if writes and (message := occupied(options)) is not None:
        raise UsageError(message)
    # Processes of --dist are left to the system: one that waits for the others handles no signal itself.
    with nullcontext() if options.dist else sigterm_as_ctrl_c(), world_of(options) as world, only_first_logs(world):
        if world.is_first:
            for message in options.without_effect():
                logger.warning("%s", message)
        yield replace(options, world_size=world.size, device=str(world.device)), world


@contextmanager
def only_first_logs(world: World) -> Iterator[None]:
    """Let the other processes of a distributed run log warnings only."""
    level = logger.level
    if not world.is_first:
        logger.setLevel(logging.WARNING)
    try:
        yield
    finally:
        logger.setLevel(level)


def attention_text(path: Path | None, flag: str = "--attn-cfg") -> str | None:
    """The attention configuration of a file, defaults filled in, as YAML text; ``None`` without one.

    Raises:
        UsageError: there is no such file; the message names ``flag``.
        ConfigError: it cannot be honoured; the message names file, line and key.
    """
    return None if path is None else read_attention(path, flag).to_yaml()


def sparsify_model(
    model: nn.Module,
    attention: str,
    options: RunOptions,
    include: str | None = None,
    flag: str = "--attn-cfg",
    sample: Tensor | None = None,
) -> None:
    """Swap the model's attention and prove that the sparse path is the one that runs."""
    from .. import ConfigError, load_config, sparsify

    try:
        report = sparsify(model, load_config(attention), include=include, verify=True, sample=sample)
    except ConfigError as error:  # the configuration is valid, and does not fit this model
        raise ConfigError(f"{flag}: {error}") from error
    except ValueError as error:
        raise UsageError(f"{flag} and --model {options.model_name}: {error}") from error
    logger.info("%s", report)


def image_costs(model: nn.Module) -> list[tuple[str, AttentionCost, int]]:
    """What attention costs for an image, of which every token reaches every layer."""
    tokens = num_tokens(model)
    return [(f"{tokens} tokens", attention_cost(model, tokens), 1)]


def describe(trainer: Trainer) -> None:
    """Log what is about to be trained on what, and what its attention costs."""
    options, data = trainer.options, trainer.data
    assert isinstance(options, ImageOptions)
    tokens = num_tokens(trainer.model)
    logger.info(
        "%s: %d training and %d test images, %s, %d x %d pixels",
        options.dataset,
        *data.sizes,
        f"{data.num_classes} classes" if data.num_classes > 1 else "one class",
        data.input_size,
        data.input_size,
    )
    logger.info("%s: %s trainable parameters, %d tokens", options.model, f"{trainer.num_parameters:,}", tokens)
    logger.info("%s, per image", attention_cost(trainer.model, tokens))


def check_device(name: str) -> None:
    """Raise a `UsageError` for a device that torch does not know or cannot reach, or that computes nothing."""
    try:
        device = torch.empty(0, device=torch.device(name)).device
    except (RuntimeError, AssertionError) as error:
        raise UsageError(f"--device {name}: {str(error).splitlines()[0]}") from error
    if device.type == "meta":
        raise UsageError(f"--device {name}: its tensors hold no data, and nothing is computed there")
