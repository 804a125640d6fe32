"""What a run would take, worked out without training: tokens, edges, operations and memory."""

import os
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from ..flops import AttentionCost
from .engine import Trainer, occupied
from .page import counted


def plan(trainer: Trainer, costs: Sequence[tuple[str, AttentionCost, int]]) -> Iterator[str]:
    """The plan of a run in words.

    Memory for activations is what one forward pass of two inputs keeps for its backward pass, scaled to a batch.

    Args:
        trainer: the run, ready to start.
        costs: of attention: what it is, its cost, and how many such sequences an input has.

    Yields:
        Lines of text.
    """
    options, model = trainer.options, trainer.model
    steps = trainer.steps_per_epoch * (options.epochs - trainer.epoch)
    yield (
        f"plan: {counted(options.epochs - trainer.epoch, 'epoch')} of {counted(trainer.steps_per_epoch, 'step')}, "
        f"{counted(options.images_per_step, 'input')} each, learning rate up to {options.peak_lr:.3g}"
    )
    gmacs = 0.0
    for about, cost, sequences in costs:
        edges = sum(layer.nnz for layer in cost.layers)
        yield f"{about}: {edges:,} edges over {len(cost.layers)} layers and all heads, {sequences} times per input"
        gmacs += sequences * cost.sparse("GMACs")
    total = 3 * 2 * gmacs * steps * options.images_per_step  # a backward pass counts as two forward ones
    yield f"attention of the whole run, forward and backward: about {total:,.4g} GFLOPs"
    checkpoint = checkpoint_bytes(model, averaged=trainer.ema is not None)
    gradients = sum(x.numel() * x.element_size() for x in model.parameters() if x.requires_grad)
    held = _mib(checkpoint + gradients)
    yield f"memory: {held} for weights, gradients, moments{' and averaged weights' if trainer.ema else ''}"
    per_image = _kept_bytes(trainer) / 2
    yield f"memory: about {_mib(per_image * options.batch_size)} for the activations of a batch of {options.batch_size}"
    yield f"files: {_mib(checkpoint)} per checkpoint in {options.output_dir}, {room(options.output_dir, checkpoint)}"
    if not getattr(options, "overwrite", False) and (message := occupied(options)) is not None:
        yield message


KEPT = 3
"""Checkpoints that there must be room for: the last one, the best one, and the one that is being written."""


def checkpoint_bytes(model: nn.Module, *, averaged: bool) -> int:
    """Bytes of a checkpoint: the weights, two moments of those that are trained, and averaged weights."""
    weights = sum(x.numel() * x.element_size() for x in model.parameters())
    trained = sum(x.numel() * x.element_size() for x in model.parameters() if x.requires_grad)
    return weights + 2 * trained + averaged * weights


def room(folder: Path, checkpoint: int, kept: int = KEPT) -> str:
    """Whether a folder that need not exist yet could be written, and whether it has room for checkpoints of a size."""
    there = next(place for place in (folder.absolute(), *folder.absolute().parents) if place.exists())
    if not there.is_dir():
        return f"which cannot be made: '{there}' is not a folder"
    if not os.access(there, os.W_OK | os.X_OK):
        return f"which cannot be {'written' if there == folder.absolute() else 'made'}: no permission for '{there}'"
    free = shutil.disk_usage(there).free
    if free < kept * checkpoint:
        return f"which has too little room for the {kept} there are at a time; {_mib(free)} are free there"
    return f"which can be written; {_mib(free)} are free there"


def _kept_bytes(trainer: Trainer) -> int:
    """Bytes that the forward pass of two images keeps for the backward pass, each storage counted once."""
    kept: dict[int, tuple[int, Tensor]] = {}

    def note(tensor: Tensor) -> Tensor:
        if not isinstance(tensor, torch.nn.Parameter):
            storage = tensor.untyped_storage()
            # The tensor is kept so that no later one takes its address.
            kept[storage.data_ptr()] = (storage.nbytes(), tensor)
        return tensor

    parameters = {parameter.untyped_storage().data_ptr() for parameter in trainer.model.parameters()}
    loader = iter(torch.utils.data.DataLoader(trainer.data.test, batch_size=2))
    image, target = (x.to(trainer.device) for x in next(loader))
    trainer.model.train()
    with torch.random.fork_rng(), torch.autograd.graph.saved_tensors_hooks(note, lambda x: x), trainer.autocast():
        trainer.task.loss(trainer.model, image, target)
    return sum(size for address, (size, _) in kept.items() if address not in parameters)


def _mib(size: float) -> str:
    return f"{size / 2**20:,.1f} MiB"
