"""A race: all contestants in turn, in an order that rotates, and what comes of it as a table."""

import contextlib
import multiprocessing
import signal
import statistics
import sys
import time
import traceback
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from base.errors import UserError

WARM_UPS = 2
Turn = Callable[[int], float]  # steps -> seconds a step


def race(contestants: Mapping[str, Turn], rounds: int, steps: int) -> dict[str, list[float]]:
    """Return the seconds a step of every contestant in every round."""
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


class Apart:
    """A contestant in a process of its own, as a program that runs alone: what others leave in the
    heap does not reach it.

    make: returns the contestant, from `arguments` that can be pickled. Called like the contestant;
    `get` reads one of its attributes, or what it returns if it is a method.
    Raises UserError when something fails there; the other process prints its traceback.
    """

    def __init__(self, make: Callable[..., Turn], *arguments: Any, **named: Any) -> None:
        context = multiprocessing.get_context("spawn")
        self.pipe, theirs = context.Pipe()
        self.process = context.Process(
            target=_serve, args=(theirs, make, arguments, named), daemon=True
        )
        self.process.start()
        theirs.close()
        self._answer()  # it is made

    def __call__(self, steps: int) -> float:
        return self.get("__call__", steps)

    def get(self, name: str, *arguments: Any) -> Any:
        with contextlib.suppress(BrokenPipeError):  # whose end the answer tells
            self.pipe.send((name, arguments))
        return self._answer()

    def end(self) -> None:
        """End the process, and its memory with it."""
        self.pipe.close()
        self.process.join()

    def _answer(self) -> Any:
        try:
            answer, fault = self.pipe.recv()
        except (EOFError, ConnectionResetError):
            self.process.join()
            raise UserError(
                f"a contestant's process ended by itself ({self.process.exitcode}); is there "
                "memory for all of them? take fewer --precision or --teacher at a time"
            ) from None
        if fault:
            raise UserError(f"a contestant failed: {fault}")
        return answer


def _serve(pipe: Any, make: Callable[..., Turn], arguments: Any, named: Any) -> None:
    warnings.filterwarnings("ignore")
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the race ends, and with it the pipe
    contestant: Any = None
    try:
        contestant = make(*arguments, **named)
        pipe.send((None, ""))
        while True:
            name, told = pipe.recv()
            found = getattr(contestant, name)
            pipe.send((found(*told) if callable(found) else found, ""))
    except (EOFError, ConnectionResetError, BrokenPipeError):  # the race is over
        pass
    except BaseException as error:
        traceback.print_exc()
        pipe.send((None, f"{type(error).__name__}: {error}"))


class Stopwatch:
    """Seconds a step over `steps` of them, after `lead` steps and one; the device has then done
    its work."""

    def __init__(self, device: torch.device, steps: int, lead: int = 0) -> None:
        self.device, self.steps, self.marks = device, steps, []
        self.ends = lead, lead + steps

    def mark(self, *_: Any) -> None:
        if self.device.type == "cuda" and len(self.marks) in self.ends:
            torch.cuda.synchronize(self.device)
        self.marks.append(time.perf_counter())

    def per_step(self) -> float:
        first, last = self.ends
        return (self.marks[last] - self.marks[first]) / self.steps


def middle(values: Sequence[float]) -> tuple[float, float, float]:
    """Return median and quartiles."""
    low, median, high = statistics.quantiles(values, n=4, method="inclusive")
    return median, low, high


def ratio(ours: Sequence[float], theirs: Sequence[float]) -> tuple[float, float, float]:
    """Return median and quartiles of their time over ours, round by round."""
    return middle([their / our for our, their in zip(ours, theirs)])


def table(
    seconds: Mapping[str, list[float]], columns: Mapping[str, Callable[[str], str]]
) -> list[str]:
    """Return a race as a table: how many times as fast as others each row is, then milliseconds.

    Brackets hold quartiles over the rounds.
    columns: from the name of a row to the row that it is compared with; one that did not run
    leaves the cell empty.
    """
    lines = ["| | " + " | ".join(columns) + " | ms a step |", "|" + "---|" * (len(columns) + 2)]
    for name, ours in seconds.items():
        bases = [column(name) for column in columns.values()]
        cells = [
            "{:.2f} ({:.2f}-{:.2f})".format(*ratio(ours, seconds[base]))
            if base in seconds and base != name
            else "1" * (base == name)
            for base in bases
        ]
        spread = "{:.2f} ({:.2f}-{:.2f})".format(*middle([1e3 * each for each in ours]))
        lines.append(f"| {name} | " + " | ".join([*cells, spread]) + " |")
    return lines
