"""Compare the speed of several functions: all in turn, in an order that rotates, as one table."""

import multiprocessing
import signal
import statistics
import sys
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from typing import Any

import torch

from base.errors import UserError

WARM_UPS = 2  # rounds that are not counted
Contestant = Callable[[int], float]  # number of steps to seconds per step
_own: Any = None  # the contestant of this process


def race(contestants: Mapping[str, Contestant], rounds: int, steps: int) -> dict[str, list[float]]:
    """Return the seconds per step of every contestant in every round."""
    names, seconds = list(contestants), {name: [] for name in contestants}
    for number in range(-WARM_UPS, rounds):
        print(f"\rround {number + 1}/{rounds} ", end="", file=sys.stderr, flush=True)
        first = number % len(names)
        for name in names[first:] + names[:first]:
            took = contestants[name](steps)
            if number >= 0:
                seconds[name].append(took)
    print("\r\033[K", end="", file=sys.stderr)
    return seconds


class OwnProcess:
    """A contestant in a process of its own, so that contestants do not share a heap.

    make: returns the contestant. Its arguments must be picklable.
    Raises UserError if the process ends, and otherwise what the contestant raises.
    """

    method = "spawn"  # a fork would share the heap of this process

    def __init__(self, make: Callable[..., Contestant], *arguments: Any, **named: Any) -> None:
        context = multiprocessing.get_context(self.method)
        self.pool = ProcessPoolExecutor(1, context, initializer=_be_quiet)
        self._call(_make, make, arguments, named)

    def __call__(self, steps: int) -> float:
        return self._call(_run, steps)

    def attribute(self, name: str) -> Any:
        """Return an attribute of the contestant."""
        return self._call(_attribute, name)

    def end(self) -> None:
        """End the process, which frees its memory."""
        self.pool.shutdown()

    def _call(self, function: Callable, *arguments: Any) -> Any:
        try:
            return self.pool.submit(function, *arguments).result()
        except BrokenProcessPool:
            raise UserError(
                "the process of a contestant ended, perhaps for lack of memory; "
                "give fewer --precision or --teacher at a time"
            ) from None


def _be_quiet() -> None:
    warnings.filterwarnings("ignore")
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C ends the race in the main process


def _make(make: Callable[..., Contestant], arguments: tuple, named: dict[str, Any]) -> None:
    global _own
    _own = make(*arguments, **named)


def _run(steps: int) -> float:
    return _own(steps)


def _attribute(name: str) -> Any:
    return getattr(_own, name)


class Stopwatch:
    """Measures seconds per step over `steps` of them, after `lead` steps and one more."""

    def __init__(self, device: torch.device, steps: int, lead: int = 0) -> None:
        self.device, self.steps, self.marks = device, steps, []
        self.ends = lead, lead + steps

    def mark(self, *_: Any) -> None:
        """Note the end of a step."""
        if self.device.type == "cuda" and len(self.marks) in self.ends:
            torch.cuda.synchronize(self.device)
        self.marks.append(time.perf_counter())

    def per_step(self) -> float:
        first, last = self.ends
        return (self.marks[last] - self.marks[first]) / self.steps


def middle(values: Sequence[float]) -> tuple[float, float, float]:
    """Return the median and the quartiles."""
    low, median, high = statistics.quantiles(values, n=4, method="inclusive")
    return median, low, high


def ratio(ours: Sequence[float], theirs: Sequence[float]) -> tuple[float, float, float]:
    """Return median and quartiles, over the rounds, of their time divided by ours."""
    return middle([their / our for our, their in zip(ours, theirs)])


def spread(values: tuple[float, float, float], digits: int = 2) -> str:
    """Return a median with its quartiles in brackets."""
    return "{0:.{3}f} ({1:.{3}f}-{2:.{3}f})".format(*values, digits)


def table(
    seconds: Mapping[str, list[float]],
    columns: Mapping[str, Callable[[str], str]],
    unit: str = "ms per step",
) -> list[str]:
    """Return a Markdown table: how many times as fast as others each row is, and its time.

    columns: map the name of a row to the row that it is compared with; the cell is empty if that
    row was not measured.
    """
    lines = ["| | " + " | ".join([*columns, unit]) + " |", "|" + "---|" * (len(columns) + 2)]
    for name, ours in seconds.items():
        bases = [column(name) for column in columns.values()]
        cells = [
            spread(ratio(ours, seconds[base])) if base in seconds and base != name else ""
            for base in bases
        ]
        cells = ["1" if base == name else cell for base, cell in zip(bases, cells)]
        time_ms = spread(middle([1e3 * each for each in ours]))
        lines.append("| " + " | ".join([name, *cells, time_ms]) + " |")
    return lines
