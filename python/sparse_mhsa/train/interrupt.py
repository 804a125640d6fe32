"""Ctrl-C and SIGTERM while training: the step under way is finished and saved."""

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from types import FrameType
from typing import Any, TypeAlias

_Handler: TypeAlias = signal.Handlers | Callable[[int, FrameType | None], Any]

SIGNALS = signal.SIGINT, signal.SIGTERM
"""Ctrl-C, and how batch systems and torchrun end a process."""
SAME = 1.0
"""Seconds within which signals are one request: whoever ends a group of processes often ends its first one as well."""


class Interrupted(KeyboardInterrupt):
    """Ctrl-C or SIGTERM, after the step under way was finished and saved."""


@contextmanager
def catch_interrupt() -> Iterator[threading.Event]:
    """Turn the first Ctrl-C or SIGTERM into an event; one that comes later than `SAME` interrupts at once, as usual.

    Outside the main thread, where Python delivers no signals, the event never comes.
    """
    event = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield event
        return
    previous = {number: signal.getsignal(number) for number in SIGNALS}
    first = 0.0

    def restore() -> None:
        for number, handler in previous.items():
            signal.signal(number, handler)

    def note(number: int, _frame: FrameType | None) -> None:
        nonlocal first
        if not event.is_set():
            first = time.monotonic()
            event.set()
        elif time.monotonic() - first > SAME:
            restore()
            os.kill(os.getpid(), number)

    for number in SIGNALS:
        signal.signal(number, note)
    try:
        yield event
    finally:
        restore()


def sigterm_as_ctrl_c() -> AbstractContextManager[None]:
    """Let SIGTERM raise `KeyboardInterrupt` in the main thread; elsewhere, nothing changes."""
    return _handled(signal.SIGTERM, signal.default_int_handler)


@contextmanager
def _handled(number: signal.Signals, handler: _Handler) -> Iterator[None]:
    """Handle a signal otherwise; only the main thread may say how, and in others nothing changes."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    previous = signal.signal(number, handler)
    try:
        yield
    finally:
        signal.signal(number, previous)


TELLS_SENDER = hasattr(signal, "sigwaitinfo")
"""The system says who sent a signal; macOS does not, and there SIGTERM to a group ends loader processes."""


@contextmanager
def without_sigterm() -> Iterator[None]:
    """Let SIGTERM wait, also in processes that are forked inside the block, until they have been prepared for it."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM} if TELLS_SENDER else ())
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def without_sigchld() -> AbstractContextManager[None]:
    """Let the end of a loader process interrupt nothing.

    torch raises an error wherever the main thread is then, also inside a step, whose half cannot be saved. Whoever asks
    for the next batch is told of it as well.
    """
    return _handled(signal.SIGCHLD, signal.SIG_DFL)


def leave_interrupts_to_parent(_worker: int) -> None:
    """Signals to a whole group come to loader processes too; they must live until the step is finished.

    SIGTERM from the parent itself still ends them: that is how multiprocessing takes leave of a process.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if TELLS_SENDER:
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != os.getppid():
        pass
    os._exit(0)
