"""One run at a time in an output folder: a lock that the system takes back when its process ends, however it does."""

import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO

try:
    import fcntl
except ImportError:  # a system without such locks
    fcntl = None  # type: ignore[assignment]

from . import UsageError

LOCK = "run.lock"
"""The file in the output folder that is locked. It stays there: removing it could take it from a run that waits."""


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Keep a folder to this run, for as long as the block lasts.

    Args:
        folder: is there.

    Raises:
        UsageError: another run is going on in it, or nothing can be written there.
    """
    path = folder / LOCK
    try:
        file = path.open("a+")
    except OSError as error:
        raise UsageError(f"--output-dir: cannot write '{path}': {error.strerror}") from error
    with file:
        if not _try(file):
            raise UsageError(
                f"--output-dir: another run is going on in '{folder}', {_named(file)}: wait until it has ended, end "
                "it, or give another folder"
            )
        with suppress(OSError):  # a full disk: the lock holds without a name in it
            file.truncate(0)
            # Past the buffer of the file, which would try again when it is closed.
            os.write(file.fileno(), f"process {os.getpid()} on {socket.gethostname()}\n".encode())
        try:
            yield
        finally:
            if fcntl is not None:  # at once, although processes that were forked have the file open too
                with suppress(OSError):
                    fcntl.flock(file, fcntl.LOCK_UN)


def runner(folder: Path) -> str | None:
    """The process that has `locked` a folder, in words; ``None`` where none has."""
    try:
        with (folder / LOCK).open("r+") as file:
            return None if _try(file) else _named(file)
    except OSError:
        return None


def _try(file: IO[str]) -> bool:
    """Lock a file, unless somebody else has."""
    if fcntl is None:
        return True
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:  # a file system without locks
        return True
    return True


def _named(file: IO[str]) -> str:
    file.seek(0)
    return file.read(200).strip() or "another process"
