"""Learning rates: over the epochs, and over the layers. Both are those of the MAE recipes."""

import math
import re
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn


def learning_rate(epoch: float, *, peak: float, least: float, warmup_epochs: float, epochs: int) -> float:
    """Linear warm-up from 0 to ``peak``, then half a cosine down to ``least``.

    Args:
        epoch: epochs done, fractions included.
        peak: learning rate after the warm-up.
        least: learning rate at the end.
        warmup_epochs: length of the warm-up.
        epochs: length of the run, warm-up included.

    Returns:
        The learning rate of the next step.
    """
    if epoch < warmup_epochs:
        return peak * epoch / warmup_epochs
    share = (epoch - warmup_epochs) / (epochs - warmup_epochs)
    return least + (peak - least) * 0.5 * (1.0 + math.cos(math.pi * share))


def set_learning_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """Give every group ``rate`` times the group's own factor."""
    for group in optimizer.param_groups:
        group["lr"] = rate * group["lr_scale"]


def layer_of(name: str, depth: int) -> int:
    """The layer that a parameter of a Vision Transformer belongs to.

    Args:
        name: of the parameter.
        depth: number of blocks.

    Returns:
        0 for what makes the tokens, b + 1 for block b, depth + 1 for what follows the blocks.
    """
    if name.split(".")[0] in ("cls_token", "pos_embed", "time_embed", "patch_embed", "reg_token", "dist_token"):
        return 0
    block = re.match(r"blocks\.(\d+)\.", name)
    return depth + 1 if block is None else int(block[1]) + 1


def parameter_groups(
    model: nn.Module, *, weight_decay: float, layer_decay: float | None = None
) -> list[dict[str, Any]]:
    """The trainable parameters for an optimiser, grouped by weight decay and learning rate.

    Vectors (biases, norms), tokens and position embeddings get no weight decay. With ``layer_decay`` the learning rate
    of layer l of L = depth + 1 is multiplied by ``layer_decay ** (L - l)``.

    Args:
        model: a Vision Transformer.
        weight_decay: of matrices.
        layer_decay: factor per layer below the head; None for the same rate everywhere.

    Returns:
        Groups with ``params``, ``weight_decay`` and ``lr_scale``, in the order in which the model lists its parameters.
    """
    exempt = _without_decay(model)
    depth = len(getattr(model, "blocks", ()))
    groups: dict[tuple[int, float], dict[str, Any]] = {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        decay = 0.0 if parameter.ndim <= 1 or name in exempt else weight_decay
        layer = depth + 1 if layer_decay is None else layer_of(name, depth)
        scale = 1.0 if layer_decay is None else layer_decay ** (depth + 1 - layer)
        group = groups.setdefault((layer, decay), {"params": [], "weight_decay": decay, "lr_scale": scale})
        group["params"].append(parameter)
    return list(groups.values())


def _without_decay(model: nn.Module) -> set[str]:
    listed: Iterable[str] = model.no_weight_decay() if hasattr(model, "no_weight_decay") else ()  # type: ignore[operator]
    return {*listed, "cls_token", "pos_embed", "time_embed", "mask_token", "reg_token", "dist_token"}
