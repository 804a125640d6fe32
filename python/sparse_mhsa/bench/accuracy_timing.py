"""Training and inference time of the trained models of the accuracy table, taking turns in one process."""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..adapters import sparsify
from ..config import load_config
from ..layer import set_epoch
from ..train import UsageError
from ..train.checkpoint import read_checkpoint, trained_epoch
from ..train.datasets import ImageData
from ..train.engine import autocast
from ..train.models import build_model
from ..train.recipes import FinetuneOptions
from ..train.timing import compare
from .accuracy_methods import Solved


def read_run(path: Path) -> dict[str, Any]:
    """The checkpoint of a run of the table.

    Raises:
        UsageError: it cannot be used; the message says how the run is made again.
    """
    try:
        return read_checkpoint(path)
    except UsageError as error:
        reason = str(error).removeprefix("--resume: ")
        again = f"remove the folder '{path.parent}', and the same command makes its run again"
        raise UsageError(f"{reason}; {again}") from error


def measure(
    recipe: FinetuneOptions, data: ImageData, solved: Sequence[Solved], checkpoints: Mapping[str, Path]
) -> dict[str, dict[str, Any]]:
    """Time every method's trained model on the same batch.

    Args:
        recipe: of the runs.
        data: their images.
        solved: the methods.
        checkpoints: one trained model per method.

    Returns:
        By method, in the precision of the recipe: ``train_ms``, forward and backward of a batch, and
        ``inference_ms``, forward without gradients; each with ``median``, ``lower_quartile`` and ``upper_quartile``.

    Raises:
        UsageError: a checkpoint cannot be used.
    """
    device = torch.device(recipe.device)
    models: dict[str, nn.Module] = {}
    for method in solved:
        model = build_model(recipe, data)
        if method.config is not None:
            sparsify(model, load_config(method.config))
        state = read_run(checkpoints[method.name])
        model.load_state_dict(state["model"])
        set_epoch(model, trained_epoch(state))
        models[method.name] = model
    loader = torch.utils.data.DataLoader(data.test, batch_size=recipe.batch_size)
    images, labels = (x.to(device) for x in next(iter(loader)))

    def train(model: nn.Module) -> None:
        with autocast(recipe.amp, device):
            loss = F.cross_entropy(model(images), labels)
        torch.autograd.grad(loss, [parameter for parameter in model.parameters() if parameter.requires_grad])

    @torch.no_grad()
    def infer(model: nn.Module) -> Tensor:
        with autocast(recipe.amp, device):
            result: Tensor = model(images)
        return result

    results: dict[str, dict[str, Any]] = {name: {} for name in models}
    passes: tuple[tuple[str, bool, Callable[[nn.Module], object]], ...] = (
        ("train_ms", True, train),
        ("inference_ms", False, infer),
    )
    for key, training, function in passes:
        for model in models.values():
            model.train(training)
        timings = compare({name: partial(function, model) for name, model in models.items()}, device, repeats=5)
        for name, timing in timings.items():
            results[name][key] = {
                part: 1e3 * getattr(timing, part) for part in ("median", "lower_quartile", "upper_quartile")
            }
    return results
