"""Ctrl-C and SIGTERM while training: the step under way is finished and saved."""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

SIGNALS = signal.SIGINT, signal.SIGTERM
"""Ctrl-C, and how batch systems and torchrun end a process."""


class Interrupted(KeyboardInterrupt):
    """Ctrl-C or SIGTERM, after the step under way was finished and saved."""


@contextmanager
def catch_interrupt() -> Iterator[threading.Event]:
    """Turn the first Ctrl-C or SIGTERM into an event; a second one interrupts at once, as usual.

    Outside the main thread, where Python delivers no signals, the event never comes.
    """
    event = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield event
        return
    previous = {number: signal.getsignal(number) for number in SIGNALS}

    def restore() -> None:
        for number, handler in previous.items():
            signal.signal(number, handler)

    def note(_signal: int, _frame: FrameType | None) -> None:
        event.set()
        restore()

    for number in SIGNALS:
        signal.signal(number, note)
    try:
        yield event
    finally:
        restore()


@contextmanager
def sigterm_as_ctrl_c() -> Iterator[None]:
    """Let SIGTERM raise `KeyboardInterrupt` in the main thread; elsewhere, nothing changes."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    previous = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, previous)


def leave_interrupts_to_parent(_worker: int) -> None:
    """A terminal sends Ctrl-C to loader processes too; they must live until the step is finished."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
