"""TensorBoard events of a run."""

import logging
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

from . import UsageError, require_packages

logger = logging.getLogger("sparse_mhsa")


class Events:
    """Writes what a run measures for TensorBoard, or nothing without a folder.

    Where it cannot write any more, it says so and the run goes on without events.

    Args:
        folder: where the event files go.

    Raises:
        UsageError: tensorboard is not installed, or the folder cannot be made.
    """

    def __init__(self, folder: Path | None) -> None:
        self._folder = folder
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
        self._write("close")

    def step(self, epochs: float, loss: float, rate: float) -> None:
        """A training step, at ``1000 * epochs``, so that runs of other batch sizes line up."""
        self._scalars({"train/loss": loss, "train/lr": rate}, int(1000 * epochs))

    def epoch(self, epoch: int, entry: Mapping[str, float]) -> None:
        """The test measures after ``epoch`` epochs."""
        shown = {f"perf/{name}": entry[name] for name in entry if name.startswith(("test_", "ema_", "train_acc"))}
        self._scalars(shown, epoch)
        self._write("flush")

    def _scalars(self, values: Mapping[str, float], place: int) -> None:
        for name, value in values.items():
            self._write("add_scalar", name, value, place)

    def _write(self, method: str, *arguments: Any) -> None:  # noqa: ANN401
        if self._writer is None:
            return
        try:
            getattr(self._writer, method)(*arguments)
        except OSError as error:
            self._writer = None
            logger.warning("--log-dir '%s': %s; no more events are written", self._folder, error.strerror)
