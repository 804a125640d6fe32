"""TensorBoard events of a run."""

import logging
import os
import socket
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any

from . import UsageError, require_packages

logger = logging.getLogger("sparse_mhsa")


class Events:
    """Writes what a run measures for TensorBoard, or nothing without a folder.

    Where it cannot write any more, it says so and the run goes on without events. The records are written here and not
    by torch's ``SummaryWriter``, whose thread reports a full disk by a traceback.

    Args:
        folder: where the event files go.

    Raises:
        UsageError: tensorboard is not installed, or the folder cannot be made.
    """

    def __init__(self, folder: Path | None) -> None:
        self._folder = folder
        self._records: Any = None
        if folder is None:
            return
        require_packages("tensorboard")
        from tensorboard.summary.writer.record_writer import (  # type: ignore[import-untyped]
            RecordWriter,
        )

        name = f"events.out.tfevents.{int(time.time()):010d}.{socket.gethostname()}.{os.getpid()}.{time.monotonic_ns()}"
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self._records = RecordWriter((folder / name).open("xb"))
        except OSError as error:
            raise UsageError(f"--log-dir '{folder}': {error.strerror}") from error
        self._write(file_version="brain.Event:2")

    def __enter__(self) -> "Events":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._flush()
        self._close()

    def step(self, epochs: float, loss: float, rate: float) -> None:
        """A training step, at ``1000 * epochs``, so that runs of other batch sizes line up."""
        self._scalars({"train/loss": loss, "train/lr": rate}, int(1000 * epochs))

    def epoch(self, epoch: int, entry: Mapping[str, float]) -> None:
        """The test measures after ``epoch`` epochs."""
        shown = {f"perf/{name}": entry[name] for name in entry if name.startswith(("test_", "ema_", "train_acc"))}
        self._scalars(shown, epoch)
        self._flush()

    def _scalars(self, values: Mapping[str, float], place: int) -> None:
        if self._records is None:
            return
        from torch.utils.tensorboard.summary import scalar

        for name, value in values.items():
            self._write(step=place, summary=scalar(name, value))  # type: ignore[no-untyped-call]

    def _write(self, **fields: Any) -> None:  # noqa: ANN401
        if self._records is None:
            return
        from tensorboard.compat.proto.event_pb2 import Event  # type: ignore[import-untyped]

        try:
            self._records.write(Event(wall_time=time.time(), **fields).SerializeToString())
        except OSError as error:
            self._give_up(error)

    def _flush(self) -> None:
        try:
            if self._records is not None:
                self._records.flush()
        except OSError as error:
            self._give_up(error)

    def _give_up(self, error: OSError) -> None:
        self._close()
        logger.warning("--log-dir '%s': %s; no more events are written", self._folder, error.strerror)

    def _close(self) -> None:
        records, self._records = self._records, None
        if records is not None:
            with suppress(OSError):  # what is left in the buffer does not fit either
                records.close()
