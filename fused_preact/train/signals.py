"""SIGINT and SIGTERM: a run finishes its step and writes a checkpoint; everywhere else they end the program."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

GRACE_S = 20.0  # for the step; torchrun kills what has not ended after 30 s


class Interrupted(KeyboardInterrupt):
    """Signal ``number`` was obeyed."""

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.number = number


class _State:
    asked = 0  # the signal that a run has yet to obey
    deferring = False


_state = _State()


def _received(number: int, frame: FrameType | None) -> None:
    if _state.deferring and not _state.asked:
        _state.asked = number  # the second one is not waited for
        return
    raise Interrupted(number)


@contextmanager
def handled() -> Iterator[None]:
    """Within it the first signal is ``Interrupted``, or waits where a run says ``deferred``. Ignored ones stay so."""
    before = {}
    if threading.current_thread() is threading.main_thread():
        for number in (signal.SIGINT, signal.SIGTERM):
            if signal.getsignal(number) is not signal.SIG_IGN:
                before[number] = signal.signal(number, _received)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def deferred() -> Iterator[Callable[[], int]]:
    """Within it the first signal only makes the function it gives return that signal's number instead of 0."""
    _state.asked, _state.deferring = 0, True
    try:
        yield lambda: _state.asked
    finally:
        asked, _state.asked, _state.deferring = _state.asked, 0, False
    if asked:  # it came after the last look
        raise Interrupted(asked)


def number_of(error: KeyboardInterrupt) -> int:
    """The signal behind ``error``."""
    return error.number if isinstance(error, Interrupted) else signal.SIGINT


def watch(give_up: Callable[[], None]) -> None:
    """Run ``give_up`` and end the process where a signal is not obeyed within ``GRACE_S`` seconds.

    A main thread that waits in a collective for a rank that has gone runs no handler of Python's; another one does.
    """
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    signal.set_wakeup_fd(writer, warn_on_full_buffer=False)

    def wait() -> None:
        while os.read(reader, 1)[0] not in (signal.SIGINT, signal.SIGTERM):
            pass
        threading.Event().wait(GRACE_S)
        give_up()
        os._exit(1)

    threading.Thread(target=wait, daemon=True, name="signals").start()
