"""Checkpoints: plain containers of tensors, written atomically, read without unpickling code.

Keys of the file:
    format: `FORMAT`.
    task: key of `TASKS`.
    model, optimizer: state dicts.
    ema: state dict of the averaged weights, or ``None``.
    scaler: state of the loss scale of ``--amp fp16``, else empty.
    epoch, step: where to go on: ``step`` steps of ``epoch`` are done.
    meter: running sums of the epoch that is under way.
    best: best value so far of the task's measure, or ``None``.
    history: what ``log.txt`` holds, one mapping per finished epoch.
    rng: states of the random generators of torch, NumPy and Python, one mapping per process.
    args: the options of the run.
    data: ``classes`` (names, in the order of the outputs), ``train_images`` (their number) and, in newer files,
        ``sets``: the `fingerprint` of both.
    attention: the attention configuration as YAML text, or ``None`` for dense attention.
    decoder_attention: likewise, of the decoder of a masked autoencoder.

What a file claims is checked here as far as one field allows; the module `resume` holds it against a run.
"""

import argparse
import errno
import math
import os
import random
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, NoReturn

import numpy as np
import torch
from torch import Tensor

from . import TrainingError, UsageError

FORMAT = "sparse_mhsa-train-3"


@dataclass(frozen=True)
class TaskLog:
    """What one kind of training writes about itself.

    Attributes:
        command: of `sparse-mhsa`.
        measures: what ``log.txt`` has for every epoch besides `HISTORY`.
        best: the measure that says which epoch was best.
        lower_is_better: it is a loss.
    """

    command: str
    measures: tuple[str, ...]
    best: str
    lower_is_better: bool = False


_CLASSIFIED = ("train_acc1", "test_loss", "test_acc1", "test_acc5")
TASKS = {
    "finetune": TaskLog("finetune", _CLASSIFIED, "test_acc1"),
    "pretrain": TaskLog("pretrain", ("test_loss",), "test_loss", lower_is_better=True),
    "video": TaskLog("video", _CLASSIFIED, "test_acc1"),
}
HISTORY = (
    "epoch",
    "train_lr",
    "train_loss",
    "n_parameters",
    "step_time",
    "attention_time",
    "train_time",
    "peak_memory",
)
"""The numbers that ``log.txt`` has for every epoch of every task. Those of averaged weights begin with ``ema_``."""
METER = {"images": int, "loss": float, "correct": int, "step_seconds": list, "attention_seconds": list}


class Field:
    """One value of a checkpoint, with the name that an error gives it.

    Args:
        path: the file.
        name: dotted path of the value inside it.
        value: what the file holds there; ``NotImplemented`` if it holds nothing.
    """

    def __init__(self, path: Path, name: str, value: Any) -> None:  # noqa: ANN401
        self.path, self.name, self.value = path, name, value

    def reject(self, expected: str, got: object = None) -> NoReturn:
        """Raise the `UsageError` that says what should stand here and what does."""
        if got is None:
            got = "nothing" if self.value is NotImplemented else f"{type(self.value).__name__} {self.value!r:.60}"
        raise UsageError(f"--resume: '{self.path}' is damaged: {self.name}: expected {expected}, got {got}")

    def __getitem__(self, key: str | int) -> "Field":
        if isinstance(key, int):
            return Field(self.path, f"{self.name}[{key}]", self.value[key])
        return Field(self.path, f"{self.name}.{key}" if self.name else key, self.value.get(key, NotImplemented))

    def instance(self, kind: type, expected: str) -> Any:  # noqa: ANN401
        """The value, if it is a ``kind``; ``True`` is not an `int` here."""
        if not isinstance(self.value, kind) or (isinstance(self.value, bool) and kind is not bool):
            self.reject(expected)
        return self.value

    def integer(self, least: int, most: int | None = None) -> int:
        """The value, if it is an integer of the range, both ends included."""
        expected = f"an integer of at least {least}" if most is None else f"an integer from {least} to {most}"
        value: int = self.instance(int, expected)
        if value < least or (most is not None and value > most):
            self.reject(expected, value)
        return value

    def number(self, least: float = -math.inf) -> float:
        """The value, if it is a finite number of at least ``least``."""
        if isinstance(self.value, bool) or not isinstance(self.value, (int, float)):
            self.reject("a finite number")
        if not math.isfinite(self.value) or self.value < least:
            self.reject("a finite number" if least == -math.inf else f"a number of at least {least:g}", self.value)
        return self.value

    def mapping(self) -> dict[str, Any]:
        """The value, if it is a mapping whose keys are names."""
        value: dict[str, Any] = self.instance(dict, "a mapping")
        for key in value:
            if not isinstance(key, str):
                self.reject("a mapping with names as keys", f"the key {key!r:.60}")
        return value

    def items(self) -> "list[Field]":
        """One field per item, if the value is a list."""
        return [self[index] for index in range(len(self.instance(list, "a list")))]

    def tensors(self) -> dict[str, Tensor]:
        """The value, if it is a mapping of names to tensors."""
        value = self.mapping()
        for key in value:
            self[key].instance(Tensor, "a tensor")
        return value


def make_folder(path: Path) -> None:
    """Make the folder that ``--output-dir`` names, and those above it.

    Raises:
        UsageError: it cannot be made.
    """
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(f"--output-dir: cannot make the folder '{path}': {error.strerror}") from error


def remove(path: Path) -> None:
    """Remove a file, if it is there.

    Raises:
        TrainingError: it cannot be removed.
    """
    try:
        path.unlink(missing_ok=True)
    except OSError as error:
        raise TrainingError(f"cannot remove '{path}': {error.strerror}") from error


@contextmanager
def replacing(path: Path) -> Iterator[BinaryIO]:
    """A file to write that takes the place of ``path`` once all of it is on the disk.

    Raises:
        TrainingError: it cannot be written; ``path`` is as it was.
    """
    temporary = path.with_name(path.name + ".tmp")
    try:
        with temporary.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except (OSError, RuntimeError) as error:
        # torch.save turns a write that failed into a RuntimeError about its own bookkeeping.
        cause = next((each for each in (error, error.__cause__, error.__context__) if isinstance(each, OSError)), error)
        kept = ", what it held before is kept" if path.exists() else ""
        raise TrainingError(f"cannot write '{path}'{kept}: {first_line(cause)}") from error
    finally:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Replace ``path`` in one step, as `replacing` does.

    Raises:
        TrainingError: the file cannot be written.
    """
    with replacing(path) as file:
        file.write(text.encode())


def write_checkpoint(path: Path, state: dict[str, Any]) -> None:
    """Replace ``path`` in one step: a crash or a full disk leaves the previous file as it was.

    Raises:
        TrainingError: the file cannot be written.
    """
    with replacing(path) as file:
        torch.save({"format": FORMAT, **state}, file)


def read_tensors(path: Path, flag: str) -> Any:  # noqa: ANN401
    """What torch saved in a file, onto the CPU; no code of the file is run.

    Raises:
        UsageError: the file is missing, damaged, or holds other than tensors and plain values; the message names
            ``flag``.
    """
    if not path.is_file():
        raise UsageError(f"{flag}: no such file: '{path}'")
    try:
        # Public MAE checkpoints keep the arguments of the run beside the weights.
        with torch.serialization.safe_globals([argparse.Namespace]):
            return torch.load(path, map_location="cpu", weights_only=True)
    except MemoryError:
        raise
    except Exception as error:  # torch.load raises whatever the damaged part of the file leads to
        raise UsageError(f"{flag}: '{path}' is not a readable checkpoint: {_unreadable(error)}") from error


def _unreadable(error: Exception) -> str:
    """Why a file cannot be loaded, in our words: torch's are about its reader, and advise to run code of the file."""
    # Of a file that was cut, torch may seek a place before its beginning.
    if isinstance(error, OSError) and error.errno not in (None, errno.EINVAL):
        return str(error.strerror)
    if (foreign := re.search(r"Unsupported global: GLOBAL (\S+)", str(error))) is not None:
        return f"it holds code or objects ({foreign[1]}), and only tensors and plain values are read"
    return "it is cut, damaged or of another kind"


def read_checkpoint(path: Path, task: str = "finetune") -> dict[str, Any]:
    """Read a checkpoint of `write_checkpoint` onto the CPU.

    Args:
        path: the file.
        task: key of `TASKS`: what it must have been written by.

    Returns:
        The state, each field checked on its own.

    Raises:
        UsageError: the file is missing, damaged, or not a checkpoint of a training run; the message names the field.
    """
    state = read_tensors(path, "--resume")
    if not isinstance(state, dict) or state.get("format") != FORMAT:
        command = TASKS[task].command
        raise UsageError(
            f"--resume: '{path}' is not a checkpoint of sparse-mhsa {command}, or of another version of it"
        )
    _check(Field(path, "", state), task)
    return state


def trained_epoch(state: dict[str, Any]) -> int:
    """The epoch that the weights of a checkpoint were last trained in, and tested in if it is finished."""
    epoch: int = state["epoch"]
    return max(epoch - 1, 0) if state["step"] == 0 else epoch


def _check(state: Field, task: str) -> None:
    """Every field on its own: kind and range."""
    if (written := state["task"].instance(str, "the name of a task")) != task:
        raise UsageError(f"--resume: '{state.path}' was written by sparse-mhsa {written}, not {TASKS[task].command}")
    state["model"].tensors()
    state["optimizer"].mapping()
    if state["ema"].value is not None:
        state["ema"].tensors()
    state["scaler"].mapping()
    for key, value in state["args"].mapping().items():
        if not isinstance(value, (str, int, float, type(None))):
            state["args"][key].reject("text, a number or nothing")
    epoch, _ = state["epoch"].integer(0), state["step"].integer(0)
    _check_history(state, task, epoch)
    meter = state["meter"]
    if meter.mapping().keys() != METER.keys():
        meter.reject(f"the keys {', '.join(METER)}", f"{', '.join(meter.value)}"[:200])
    meter["correct"].integer(0, meter["images"].integer(0))
    meter["loss"].number()
    for name in ("step_seconds", "attention_seconds"):
        for each in meter[name].items():
            each.number(0)
    for each in state["rng"].items():
        each.mapping()
    state["data"].mapping()
    state["data"]["train_images"].integer(1)
    if "sets" in state["data"].value:
        for name, known in state["data"]["sets"].mapping().items():
            if known is not None:
                state["data"]["sets"][name].instance(str, "the fingerprint of a set or nothing")
    for each in state["data"]["classes"].items():
        each.instance(str, "the name of a class")
    for name in ("attention", "decoder_attention"):
        if state[name].value is not None:
            state[name].instance(str, "YAML text or nothing")


def _check_history(state: Field, task: str, epoch: int) -> None:
    history, start = state["history"].items(), state["args"]["start_epoch"].integer(0)
    if start + len(history) != epoch:
        state["epoch"].reject(f"{start + len(history)}, as many as the history has", epoch)
    keys = {*HISTORY, *TASKS[task].measures}
    for index, entry in enumerate(history):
        averaged = {key for key in entry.mapping() if key.startswith("ema_")}
        if entry.value.keys() - averaged != keys:
            entry.reject(f"the keys {', '.join(sorted(keys))}", f"{', '.join(entry.value)}"[:200])
        entry["epoch"].integer(start + index, start + index)
        for key in entry.value:
            entry[key].number()
    if not history:
        state["best"].instance(type(None), "nothing before the first epoch is finished")
        return
    values = [entry.value[TASKS[task].best] for entry in history]
    best = min(values) if TASKS[task].lower_is_better else max(values)
    if state["best"].number() != best:
        state["best"].reject(f"{best}, the best of the history", state["best"].value)


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


def set_random_state(state: dict[str, Any], path: Path, name: str = "rng") -> None:
    """Undo everything drawn since `random_state` returned ``state``.

    Args:
        state: the states.
        path: the checkpoint that held them, for errors.
        name: of the field that held them, likewise.

    Raises:
        UsageError: a generator does not accept its state.
    """

    def restore_numpy(value: Any) -> None:  # noqa: ANN401
        keys, position, has_gauss, cached = value
        np.random.set_state(("MT19937", keys.numpy().astype(np.uint32), position, has_gauss, cached))

    restore: dict[str, Callable[[Any], None]] = {
        "torch": torch.set_rng_state,
        "numpy": restore_numpy,
        "python": random.setstate,
    }
    if "cuda" in state and torch.cuda.is_available():
        restore["cuda"] = torch.cuda.set_rng_state_all
    for generator, restore_one in restore.items():
        field = Field(path, name, state)[generator]
        try:
            restore_one(field.value)
        except Exception as error:  # whatever a generator raises for a state that is none
            field.reject(f"the state of a generator ({first_line(error)})")


def seed_everything(seed: int) -> None:
    """Seed the generators of torch, NumPy and Python."""
    torch.manual_seed(seed)
    np.random.seed(seed % 2**32)
    random.seed(seed)


def first_line(error: BaseException) -> str:
    """The first line of an error's message: torch appends pages of advice."""
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
