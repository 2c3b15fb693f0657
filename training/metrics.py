"""Metrics, progress output and log files.

Shapes: B batch, C classes. The host waits for the device only to print a line.
"""

import functools
import json
import logging
import math
import os
import resource
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor

from base import distributed, files, terminal
from base.errors import UserError
from base.text import printable
from training import run_settings
from training.trackers import Tracker

_logger = logging.getLogger(__name__)


def accuracy(logits: Tensor, labels: Tensor, topk: Sequence[int] = (1, 5)) -> list[Tensor]:
    """Return how many of B images have their label among the k best logits, for each k.

    logits: (B, C); labels: (B,). Counts are 0-dim float tensors on the device; with fewer than k
    classes all of them are among the best.
    """
    best = logits.topk(min(max(topk), logits.shape[1]), dim=1).indices  # (B, k)
    hits = best == labels[:, None]
    return [hits[:, :k].any(dim=1).sum().float() for k in topk]


class Meter:
    """A running mean of scalars, summed on the device and over all processes when read.

    Values that are not finite are left out, so that one skipped update does not hide an epoch.
    """

    def __init__(self, device: torch.device) -> None:
        # rows: since the beginning, since `recent` was read; columns: sum, count
        self.sums = torch.zeros(2, 2, dtype=torch.float64, device=device)

    def update(self, value: Tensor | float) -> None:
        value = torch.as_tensor(value, device=self.sums.device).detach().double()
        finite = torch.isfinite(value)
        self.sums += torch.stack([torch.where(finite, value, 0.0), finite.double()])

    def recent(self) -> float:
        """Return the mean since the last call, over all processes, which must all call it."""
        since = self.sums[1].clone()
        self.sums[1] = 0
        return _mean(since)

    def average(self) -> float:
        """Return the mean since the beginning, over all processes, which must all call it."""
        return _mean(self.sums[0])


def _mean(sum_and_count: Tensor) -> float:
    total, count = distributed.all_reduce_sum(sum_and_count).tolist()
    return total / count if count else float("nan")


class ProgressLogger:
    """One line every `interval` steps: step, time left, numbers, images a second, data wait.

    A terminal has a live line with a bar and the first numbers, which is replaced `REFRESH_S`
    after it was printed. Only the first process prints. start: steps that a resumed epoch has
    done before.
    """

    REFRESH_S = 0.2

    def __init__(self, length: int, header: str, *, interval: int = 10, start: int = 0) -> None:
        self.length, self.header, self.interval, self.start = length, header, interval, start
        self._prints = distributed.is_main()
        self._begin = self._mark = self._shown = time.perf_counter()
        self._waited = 0.0
        self._steps_at_mark = start
        self._numbers = ""  # of the live line

    def __call__(self, batches: Iterable) -> Iterator[Any]:
        """Yield the batches, and measure how long each was waited for."""
        self._begin = self._mark = start = time.perf_counter()
        for done, batch in enumerate(batches, start=self.start):
            now = time.perf_counter()
            self._waited += now - start
            if self._prints and now - self._shown > self.REFRESH_S:
                self._show(done)
            yield batch
            start = time.perf_counter()
        if self._prints:
            terminal.erase()
            seconds = time.perf_counter() - self._begin
            share = 100 * self._waited / max(seconds, 1e-9)
            terminal.detail(
                f"{self.header} {self.length - self.start} steps in {clock(seconds)}, "
                f"data wait {share:.0f}%"
            )

    def due(self, step: int, span: int = 1) -> bool:
        """Return whether a line is due at `step`, or was at one of the `span` - 1 before it."""
        passed = (step + 1) // self.interval > (step + 1 - span) // self.interval
        return passed or step + 1 == self.length

    def log(
        self, step: int, values: Mapping[str, float], *, images_per_step: int = 0
    ) -> dict[str, float]:
        """Print the line of a step. images_per_step: images of all processes together.

        Returns the rates it has measured, empty in processes that do not print.
        """
        if not self._prints:
            return {}
        now, done = time.perf_counter(), step + 1
        parts = [f"[{done}/{self.length}]", f"eta {clock(self._seconds_left(done))}"]
        parts += [f"{name} {number(value)}" for name, value in values.items()]
        numbers = [f"{name} {number(value)}" for name, value in values.items()][:2]
        rates = {}
        if images_per_step:
            steps = done - self._steps_at_mark
            rate = images_per_step * steps / max(now - self._mark, 1e-9)
            rates = {"images_per_s": rate, "data_wait": self._waited / max(now - self._begin, 1e-9)}
            parts += [f"{rate:.0f} images/s", f"data wait {100 * rates['data_wait']:.0f}%"]
            numbers = [*numbers[:1], f"{rate:.0f} images/s"]
        rates["memory_mib"] = peak_memory() / 2**20
        parts.append(f"memory {rates['memory_mib']:.0f} MiB")
        self._mark, self._steps_at_mark = now, done
        self._numbers = "  ".join(numbers)
        if not terminal.is_terminal():
            terminal.detail(f"{self.header} {'  '.join(parts)}")
        else:
            terminal.log_only(f"{self.header} {'  '.join(parts)}")
            self._show(done)
        return rates

    def _seconds_left(self, done: int) -> float:
        seconds = time.perf_counter() - self._begin
        return seconds / max(done - self.start, 1) * (self.length - done)

    def _show(self, done: int) -> None:
        """Replace the live line of a terminal."""
        self._shown = time.perf_counter()
        eta = clock(self._seconds_left(done)) if done > self.start else "?"
        count = f"{bar(done / max(self.length, 1))} {done}/{self.length}"
        terminal.live(f"{self.header} {count}  eta {eta}  {self._numbers}")


def bar(share: float, width: int = 12) -> str:
    """Return a bar of `width` steps, in ASCII for every terminal. share: of the work, 0 to 1."""
    full = int(share * width)
    return f"[{'#' * full}{'.' * (width - full)}]"


def peak_memory() -> int:
    """Return the most bytes held until now: of tensors on the GPU, or else of the process."""
    if torch.cuda.is_available() and torch.cuda.max_memory_allocated():
        return torch.cuda.max_memory_allocated()
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def number(value: float) -> str:
    """Return a number as text: four significant digits, small and large ones with exponent."""
    return f"{value:.4f}" if 1e-3 <= abs(value) < 1e4 or value == 0 else f"{value:.2e}"


def clock(seconds: float) -> str:
    """Return seconds as h:mm:ss, with days in the hours."""
    whole = int(seconds + 0.5)
    return f"{whole // 3600}:{whole // 60 % 60:02d}:{whole % 60:02d}"


def _writes(name: str) -> Callable:
    """Report disk errors in a method of `RunLog` as one-line user errors. name: of the file."""

    def decorate(method: Callable) -> Callable:
        @functools.wraps(method)
        def write(self: "RunLog", *args: Any, **options: Any) -> Any:
            try:
                return method(self, *args, **options)
            except OSError as error:
                raise UserError(
                    f"{self._folder / name}: cannot be written ({error.strerror or error}); the "
                    "checkpoints are untouched; free the disk, and continue with --resume auto"
                ) from error

        return write

    return decorate


class RunLog:
    """`log.txt` (one JSON object an epoch, DeiT's keys first), `config.yaml` and the trackers.

    The x axis of a tracker is the number of images, so that runs of different batch size overlay.
    A run that starts at `start_epoch` removes older entries of that and later epochs.
    With an empty `output_dir` nothing is written.
    """

    @_writes("log.txt")
    def __init__(
        self, output_dir: str, start_epoch: int = 0, trackers: Sequence[Tracker] = ()
    ) -> None:
        self._folder, self._trackers = Path(output_dir) if output_dir else None, trackers
        if self._folder is not None:
            self._folder.mkdir(parents=True, exist_ok=True)
            keep_epochs_before(self._folder / "log.txt", start_epoch)

    @_writes("config.yaml")
    def config(self, settings: Mapping[str, Any]) -> None:
        """Write the settings of the run, every flag with its value."""
        if self._folder is not None:
            text = yaml.safe_dump(run_settings.to_save(settings), sort_keys=True)
            files.write_text_atomically(self._folder / "config.yaml", text)
            for tracker in self._trackers:
                tracker.config(settings, text)

    @property
    def has_board(self) -> bool:
        """Whether a tracker shows images."""
        return bool(self._trackers)

    @_writes("tensorboard")
    def image(self, tag: str, image: Tensor | None, images_seen: int) -> None:
        """Give an image (3, height, width), uint8, to all trackers."""
        for tracker in self._trackers if image is not None else ():
            tracker.image(tag, image, images_seen)

    @_writes("tensorboard")
    def scalars(self, prefix: str, values: Mapping[str, float], images_seen: int) -> None:
        """Give `values` to all trackers as `prefix/name`, but for the count of images."""
        named = {f"{prefix}/{name}": value for name, value in values.items() if name != "count"}
        for tracker in self._trackers if named else ():
            tracker.scalars(named, images_seen)

    def train(
        self, values: Mapping[str, float], weights: Mapping[str, float], images_seen: int
    ) -> None:
        """Write averages under train/, and under train_weighted/ what each term adds to the loss.

        weights: of the loss's terms, by name. While they are constant, the parts add up to loss.
        """
        self.scalars("train", values, images_seen)
        parts = {name: weight * values[name] for name, weight in weights.items() if name in values}
        self.scalars("train_weighted", parts, images_seen)

    @_writes("log.txt")
    def epoch(
        self,
        epoch: int,
        train: Mapping[str, float],
        val: Mapping[str, float],
        ema: Mapping[str, float],
        n_parameters: int,
        images_seen: int,
        *,
        speed: Mapping[str, float] | None = None,
    ) -> None:
        """Add the line of an epoch: train_*, test_*, epoch, n_parameters, ema_*, speed."""
        if self._folder is None:
            return
        self.scalars("val", val, images_seen)
        self.scalars("val_ema", ema, images_seen)
        line = {f"train_{name}": value for name, value in train.items()}
        line |= {f"test_{name}": value for name, value in val.items()}
        line |= {"epoch": epoch, "n_parameters": n_parameters}
        line |= {f"ema_{name}": value for name, value in ema.items() if name != "count"}
        line |= speed or {}
        with (self._folder / "log.txt").open("a") as file:
            known = {name: value if math.isfinite(value) else None for name, value in line.items()}
            file.write(json.dumps(known) + "\n")  # JSON has no NaN
            file.flush()
            os.fsync(file.fileno())

    @_writes("tensorboard")
    def close(self) -> None:
        for tracker in self._trackers:
            tracker.close()


def keep_epochs_before(path: Path, epoch: int) -> None:
    """Drop the lines of `epoch` and later ones, and a truncated last line, from a log.txt."""
    if path.exists():
        lines = [json.dumps(line) + "\n" for line in read_log(path) if line["epoch"] < epoch]
        files.write_text_atomically(path, "".join(lines))


def read_log(path: Path) -> list[dict[str, Any]]:
    """Return the epochs of a log.txt, [] for no file. Other lines are left out with a warning."""
    epochs = []
    for line in path.read_text(errors="replace").splitlines() if path.is_file() else ():
        try:
            values = json.loads(line)
        except (ValueError, RecursionError):
            values = None
        if isinstance(values, dict) and isinstance(values.get("epoch"), int):
            epochs.append(values)
        else:
            _logger.warning("%s: dropped a line that is no epoch: %.40s", path, line)
    return epochs


class _PrintableFormatter(logging.Formatter):
    """Escapes control characters, which may come from file and class names.

    A terminal's live line is replaced.
    """

    def format(self, record: logging.LogRecord) -> str:
        start = terminal.ERASE if terminal.shows_table() and sys.stderr.isatty() else ""
        return start + printable(super().format(record), keep="\n\t")


def set_up_logging(rank: int) -> None:
    """Send log records to stderr: from INFO on in the first process, from WARNING in others."""
    number = f" [{rank}]" if rank else ""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(_PrintableFormatter(f"%(levelname)s{number}: %(message)s"))
    level = logging.WARNING if rank else logging.INFO
    logging.basicConfig(level=level, handlers=[handler], force=True)
    for noisy in ("timm", "PIL", "urllib3", "httpx", "huggingface_hub", "tensorboard"):
        logging.getLogger(noisy).setLevel(logging.WARNING)
