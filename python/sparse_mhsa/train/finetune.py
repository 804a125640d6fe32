"""``sparse-mhsa finetune``: train or evaluate one image classifier, with sparse attention or without."""

import json
import logging
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from . import UsageError, require_packages
from .checkpoint import read_checkpoint, seed_everything
from .datasets import ImageData, load_data
from .options import FinetuneOptions, TrainOptions

require_packages("timm", "torchvision", "tqdm")

from .engine import BEST, Trainer  # noqa: E402
from .models import build_model, num_tokens  # noqa: E402
from .resume import resolve_attention  # noqa: E402

logger = logging.getLogger("sparse_mhsa")


@dataclass(frozen=True)
class Run:
    """A finished run.

    Attributes:
        options: its recipe.
        data: its images.
        model: the trained model.
        trainer: what trained it, with its ``history``.
        attention: its attention configuration as YAML text, or ``None`` for dense attention.
        results: test loss and accuracies of the model as it is now.
    """

    options: TrainOptions
    data: ImageData
    model: nn.Module
    trainer: Trainer
    attention: str | None
    results: dict[str, Any]


def finetune(options: FinetuneOptions) -> Run:
    """Train the model that ``options`` describe, or evaluate its checkpoint.

    Raises:
        UsageError: an option, path, data set or checkpoint cannot be used as given.
        ConfigError: the attention configuration cannot be honoured.
        TrainingError: the loss became infinite or NaN.
        Interrupted: Ctrl-C was pressed; the last checkpoint continues after the last finished step.
    """
    check_device(options.device)
    seed_everything(options.seed)
    # Read first: a bad checkpoint or configuration should not cost the time that data and model take.
    state = read_checkpoint(options.resume) if options.resume else None
    attention = attention_text(options)
    if state is not None and options.resume is not None:
        attention = resolve_attention(state, options.resume, options.attn_cfg, attention)
    data = load_data(options)
    model = build_model(options, data)
    if attention is not None:
        sparsify_model(model, attention, options)
    trainer = Trainer(model, data, options, attention, on_epoch=_set_epoch if attention is not None else None)
    describe(trainer)
    if state is not None and options.resume is not None:
        if options.eval:
            trainer.load_weights(state, options.resume)
        else:
            trainer.load_state(state, options.resume)
            logger.info("resuming %s at epoch %d, step %d", options.resume, trainer.epoch + 1, trainer.step)
    if options.eval:
        results = trainer.evaluate()
        logger.info("test %s", json.dumps(results))
    else:
        trainer.fit()
        results = trainer.history[-1]
        where = trainer.best or f"an earlier run's {BEST}, which is not beside {options.resume}"
        logger.info("best test top-1 %.2f %% in %s", trainer.best_acc1, where)
    return Run(options, data, model, trainer, attention, results)


def attention_text(options: TrainOptions) -> str | None:
    """The attention configuration, defaults filled in, as YAML text; ``None`` without ``--attn-cfg``."""
    if options.attn_cfg is None:
        return None
    from .. import load_config

    return load_config(options.attn_cfg).to_yaml()


def sparsify_model(model: nn.Module, attention: str, options: TrainOptions) -> None:
    """Swap the model's attention and prove that the sparse path is the one that runs."""
    from .. import ConfigError, load_config, sparsify

    try:
        report = sparsify(model, load_config(attention), verify=True)
    except ConfigError:
        raise
    except ValueError as error:
        raise UsageError(f"--attn-cfg '{options.attn_cfg}' and --model {options.model}: {error}") from error
    logger.info("%s", report)


def describe(trainer: Trainer) -> None:
    """Log what is about to be trained on what, and what its attention costs."""
    from ..flops import attention_cost

    options, data = trainer.options, trainer.data
    tokens = num_tokens(trainer.model)
    logger.info(
        "%s: %d training and %d test images, %d classes, %d x %d pixels",
        options.dataset,
        *data.sizes,
        data.num_classes,
        data.input_size,
        data.input_size,
    )
    logger.info("%s: %.2f M parameters, %d tokens", options.model, trainer.num_parameters / 1e6, tokens)
    logger.info("%s, per image", attention_cost(trainer.model, tokens))


def check_device(name: str) -> None:
    """Raise a `UsageError` for a device that torch does not know or cannot reach."""
    try:
        torch.empty(0, device=torch.device(name))
    except (RuntimeError, AssertionError) as error:
        raise UsageError(f"--device {name}: {str(error).splitlines()[0]}") from error


def _set_epoch(model: nn.Module, epoch: int) -> None:
    from .. import set_epoch

    set_epoch(model, epoch)
