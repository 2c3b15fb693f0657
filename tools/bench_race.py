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
