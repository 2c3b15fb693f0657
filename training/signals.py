"""Signals that stop a run: SIGTERM, SIGUSR1, SIGUSR2 and Ctrl-C."""

import contextlib
import os
import signal
import time
from collections.abc import Iterator
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
        before = {number: signal.signal(number, self._record) for number in STOP_SIGNALS}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _record(self, number: int, frame: Any) -> None:
        now = time.monotonic()
        if self.number and (number != self.number or now - self._received_at > SAME_EVENT_S):
            os._exit(128 + number)
        self.number, self._received_at = number, now
