"""Signals that stop a run: SIGTERM, SIGUSR1, SIGUSR2 and Ctrl-C."""

import contextlib
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

from base.distributed import STOP_SIGNALS

SAME_EVENT_S = 3.0  # a launcher may pass on a signal that the process group has already received


class StopSignals:
    """The number of the first stop signal, or 0. A second one ends the process at once."""

    def __init__(self) -> None:
        self.number = 0
        self._received_at = 0.0

    @contextlib.contextmanager
    def handled(self) -> Iterator[None]:
        """Record signals in the block, instead of ending the process."""
        with _handlers(self.record):
            yield

    def record(self, number: int, frame: Any) -> None:
        now = time.monotonic()
        if self.number and (number != self.number or now - self._received_at > SAME_EVENT_S):
            os._exit(128 + number)
        self.number, self._received_at = number, now


class StoppedEarly(KeyboardInterrupt):
    """A stop signal outside of training, where there is nothing to save."""

    def __init__(self, number: int) -> None:
        super().__init__(f"stopped by signal {number}")
        self.number = number


class RaiseStop:
    """A signal handler that raises StoppedEarly for the first signal. A second one ends at once."""

    def __init__(self) -> None:
        self._received = StopSignals()

    def __call__(self, number: int, frame: Any) -> None:
        is_first = not self._received.number
        self._received.record(number, frame)
        if is_first:
            raise StoppedEarly(number)

    @property
    def number(self) -> int:
        """The number of the signal that was raised, or 0. A library may have caught the error."""
        return self._received.number


@contextlib.contextmanager
def raised(end: Callable[[int], Any]) -> Iterator[RaiseStop]:
    """Raise StoppedEarly for a signal in the block. Yields the handler.

    end: is called with the number of a signal that does not reach the caller. Python does not raise
    it within `SAME_EVENT_S` while the main thread waits in a library, for example for other
    processes, and leaves it out in a `__del__`.
    In a thread other than the main one, signals are left as they are.
    """
    stop = RaiseStop()
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return
    reader, writer = os.pipe()
    os.set_blocking(writer, False)

    def watch() -> None:
        while data := os.read(reader, 1):
            number = data[0]
            if number in STOP_SIGNALS and signal.getsignal(number) is stop:
                time.sleep(SAME_EVENT_S)
                if not stop.number and signal.getsignal(number) is stop:
                    end(number)
        os.close(reader)

    def report(unraisable: Any) -> None:
        if isinstance(unraisable.exc_value, StoppedEarly):
            end(unraisable.exc_value.number)
        elif not stop.number:  # half-built objects that a stop leaves are no fault
            usual(unraisable)

    usual, sys.unraisablehook = sys.unraisablehook, report
    before = signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
    threading.Thread(target=watch, daemon=True).start()
    try:
        with _handlers(stop):
            yield stop
    finally:
        sys.unraisablehook = usual
        signal.set_wakeup_fd(before)
        os.close(writer)  # ends the thread


@contextlib.contextmanager
def _handlers(handler: Callable[[int, Any], None]) -> Iterator[None]:
    """Handle all stop signals by `handler` in the block."""
    before = {number: signal.signal(number, handler) for number in STOP_SIGNALS}
    try:
        yield
    finally:
        for number, old in before.items():
            signal.signal(number, old or signal.SIG_DFL)  # None: set outside of Python
