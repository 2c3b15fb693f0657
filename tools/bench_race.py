"""A race: all contestants in turn, in an order that rotates, and what comes of it as a table."""

import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

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


class Stopwatch:
    """Seconds a step from the first mark to the last; the device has then done its work."""

    def __init__(self, device: torch.device, steps: int) -> None:
        self.device, self.steps, self.marks = device, steps, []

    def mark(self, *_: Any) -> None:
        if self.device.type == "cuda" and len(self.marks) in (0, self.steps):
            torch.cuda.synchronize(self.device)
        self.marks.append(time.perf_counter())

    def per_step(self) -> float:
        return (self.marks[self.steps] - self.marks[0]) / self.steps


def ratio(ours: Sequence[float], theirs: Sequence[float]) -> tuple[float, float, float]:
    """Return median and quartiles of their time over ours, round by round."""
    each = [their / our for our, their in zip(ours, theirs)]
    low, middle, high = statistics.quantiles(each, n=4, method="inclusive")
    return middle, low, high


def table(
    seconds: Mapping[str, list[float]], columns: Mapping[str, Callable[[str], str]]
) -> list[str]:
    """Return a race as a table: how many times as fast as others each row is, then milliseconds.

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
        spread = (
            f"{1e3 * statistics.median(ours):.2f} ({1e3 * min(ours):.2f}-{1e3 * max(ours):.2f})"
        )
        lines.append(f"| {name} | " + " | ".join([*cells, spread]) + " |")
    return lines
