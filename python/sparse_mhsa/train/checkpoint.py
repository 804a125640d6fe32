"""Checkpoints: plain containers of tensors, written atomically, read without unpickling code.

Keys of the file:
    format: `FORMAT`.
    model, optimizer: state dicts.
    epoch, step: where to go on: ``step`` steps of ``epoch`` are done.
    meter: running sums of the epoch that is under way.
    best_acc1: best test accuracy so far, or ``None``.
    history: what ``log.txt`` holds, one mapping per finished epoch.
    rng: states of the random generators of torch, NumPy and Python.
    args: the options of the run.
    attention: the attention configuration as YAML text, or ``None`` for dense attention.
"""

import os
import random
from pathlib import Path
from typing import Any

import numpy as np
import torch

from . import UsageError

FORMAT = "sparse_mhsa-finetune-1"
CONTENTS: dict[str, type | tuple[type, ...]] = {
    "model": dict,
    "optimizer": dict,
    "epoch": int,
    "step": int,
    "meter": dict,
    "best_acc1": (float, type(None)),
    "history": list,
    "rng": dict,
    "args": dict,
    "attention": (str, type(None)),
}


def write_checkpoint(path: Path, state: dict[str, Any]) -> None:
    """Replace ``path`` in one step: a crash or a full disk leaves the previous file as it was."""
    temporary = path.with_name(path.name + ".tmp")
    try:
        with temporary.open("wb") as file:
            torch.save({"format": FORMAT, **state}, file)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def read_checkpoint(path: Path) -> dict[str, Any]:
    """Read a checkpoint of `write_checkpoint` onto the CPU.

    Raises:
        UsageError: the file is missing, damaged, or not a checkpoint of a training run.
    """
    if not path.is_file():
        raise UsageError(f"--resume: no such file: '{path}'")
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch.load raises whatever the damaged part of the file leads to
        raise UsageError(f"--resume: '{path}' is not a readable checkpoint: {first_line(error)}") from error
    if not isinstance(state, dict) or state.get("format") != FORMAT:
        raise UsageError(f"--resume: '{path}' is not a checkpoint of sparse-mhsa finetune")
    for key, kind in CONTENTS.items():
        if not isinstance(state.get(key, NotImplemented), kind):
            raise UsageError(f"--resume: '{path}' is damaged: its {key!r} is missing or of the wrong kind")
    return state


def random_state() -> dict[str, Any]:
    """The states of every generator a training step may draw from."""
    _, keys, position, has_gauss, cached = np.random.get_state(legacy=True)
    state: dict[str, Any] = {
        "torch": torch.get_rng_state(),
        "numpy": (torch.from_numpy(np.asarray(keys).astype(np.int64)), position, has_gauss, cached),
        "python": random.getstate(),
    }
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state_all()
    return state


def set_random_state(state: dict[str, Any]) -> None:
    """Undo everything drawn since `random_state` returned ``state``."""
    torch.set_rng_state(state["torch"])
    keys, position, has_gauss, cached = state["numpy"]
    np.random.set_state(("MT19937", keys.numpy().astype(np.uint32), position, has_gauss, cached))
    random.setstate(state["python"])
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state_all(state["cuda"])


def seed_everything(seed: int) -> None:
    """Seed the generators of torch, NumPy and Python."""
    torch.manual_seed(seed)
    np.random.seed(seed % 2**32)
    random.seed(seed)


def first_line(error: BaseException) -> str:
    """The first line of an error's message: torch appends pages of advice."""
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
