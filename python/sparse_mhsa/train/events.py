"""TensorBoard events of a run."""

from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

from . import UsageError, require_packages


class Events:
    """Writes what a run measures for TensorBoard, or nothing without a folder.

    Args:
        folder: where the event files go.

    Raises:
        UsageError: tensorboard is not installed, or the folder cannot be made.
    """

    def __init__(self, folder: Path | None) -> None:
        self._writer: Any = None
        if folder is None:
            return
        require_packages("tensorboard")
        from torch.utils.tensorboard import SummaryWriter

        try:
            self._writer = SummaryWriter(str(folder))
        except OSError as error:
            raise UsageError(f"--log-dir '{folder}': {error.strerror}") from error

    def __enter__(self) -> "Events":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._writer is not None:
            self._writer.close()

    def step(self, epochs: float, loss: float, rate: float) -> None:
        """A training step, at ``1000 * epochs``, so that runs of other batch sizes line up."""
        if self._writer is not None:
            place = int(1000 * epochs)
            self._writer.add_scalar("train/loss", loss, place)
            self._writer.add_scalar("train/lr", rate, place)

    def epoch(self, epoch: int, entry: Mapping[str, float]) -> None:
        """The test measures after ``epoch`` epochs."""
        if self._writer is None:
            return
        for name, value in entry.items():
            if name.startswith(("test_", "ema_", "train_acc")):
                self._writer.add_scalar(f"perf/{name}", value, epoch)
        self._writer.flush()
