"""Ctrl-C while training: the step under way is finished and saved."""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType


class Interrupted(KeyboardInterrupt):
    """Ctrl-C, after the step under way was finished and saved."""


@contextmanager
def catch_interrupt() -> Iterator[threading.Event]:
    """Turn the first Ctrl-C into an event; a second one interrupts at once, as usual.

    Outside the main thread, where Python delivers no signals, the event never comes.
    """
    event = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield event
        return
    previous = signal.getsignal(signal.SIGINT)

    def note(_signal: int, _frame: FrameType | None) -> None:
        event.set()
        signal.signal(signal.SIGINT, previous)

    signal.signal(signal.SIGINT, note)
    try:
        yield event
    finally:
        signal.signal(signal.SIGINT, previous)


def leave_interrupts_to_parent(_worker: int) -> None:
    """A terminal sends Ctrl-C to loader processes too; they must live until the step is finished."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
