"""What a run prints: a table with one live line on a terminal, every line elsewhere.

The log file of a run gets every line in both cases. Only the first process calls these functions.
"""

import contextlib
import logging
import os
import shlex
import shutil
import sys
import textwrap
from collections.abc import Iterator, Sequence
from contextvars import ContextVar
from logging.handlers import MemoryHandler
from pathlib import Path

LOG = "output.log"  # in a run's folder
ROOT = Path(__file__).resolve().parents[1]
WIDTH = 79  # columns; the last one of a terminal stays empty
ERASE = "\r\033[K"  # the line of the terminal on which the cursor is
MOST_LINES = 10_000  # kept until the folder of the run is ready
_lines = logging.getLogger("terminal")
_lines.propagate = False
_lines.setLevel(logging.INFO)
_mode: ContextVar[str] = ContextVar("mode", default="lines")  # or "table", "silent"


def is_terminal() -> bool:
    return sys.stdout.isatty()


def shows_table() -> bool:
    """Return whether details are left out of standard output, which is a terminal."""
    return _mode.get() == "table" and is_terminal()


def detail(text: str) -> None:
    """Print a line, in table mode only to the log file."""
    if _mode.get() != "silent":
        if not shows_table():
            print(text, flush=True)
        log_only(text)


def log_only(text: str) -> None:
    """Write a line to the log file only."""
    if _mode.get() != "silent":
        _lines.info("%s", text)


def important(text: str) -> None:
    """Print a line in every mode."""
    if shows_table():
        erase()
    print(text, flush=True)
    _lines.info("%s", text)


def fit(text: str) -> str:
    """Return a long line broken into several of at most `WIDTH` columns, in table mode only."""
    if not shows_table():
        return text
    return wrap(text)


def wrap(text: str) -> str:
    """Return a long line broken into several of at most `WIDTH` columns; words stay whole."""
    return textwrap.fill(
        text, WIDTH, subsequent_indent="  ", break_long_words=False, break_on_hyphens=False
    )


def align(rows: Sequence[Sequence[str]], left: int = 1) -> list[str]:
    """Return rows of cells as lines. The first `left` columns are aligned left, others right."""
    widths = [max(map(len, column)) for column in zip(*rows)]
    return [
        "  ".join(
            cell.ljust(width) if number < left else cell.rjust(width)
            for number, (cell, width) in enumerate(zip(cells, widths))
        ).rstrip()
        for cells in rows
    ]


def python() -> str:
    """Return the word that starts this Python in the user's shell, such as `python`."""
    name, here = "python", Path(sys.executable).absolute()
    found = shutil.which(name)
    if found and Path(found).absolute().parent == here.parent:
        return name
    return _short(here)


def command(program: str, *words: str) -> str:
    """Return the command that runs a program of this repository, such as tools/predict.py."""
    return shlex.join([python(), _short(ROOT / program), *words])


def _short(path: Path) -> str:
    """Return a path relative to the working directory if it lies in it."""
    relative = os.path.relpath(path)
    return str(path) if relative.startswith(os.pardir) else relative


def row(text: str) -> None:
    """Print a line in table mode only."""
    if shows_table():
        print(f"{ERASE}{text}", flush=True)


def live(text: str) -> None:
    """Replace the live line of a terminal. Elsewhere nothing is printed."""
    if is_terminal() and _mode.get() != "silent":
        width = shutil.get_terminal_size().columns - 1  # a wrapped line cannot be overwritten
        print(f"\r{text[:width]}\033[K", end="", flush=True)


def erase() -> None:
    """Remove the live line of a terminal."""
    live("")


@contextlib.contextmanager
def silent() -> Iterator[None]:
    """Print nothing in the block, and write nothing to the log file."""
    before = _mode.set("silent")
    try:
        yield
    finally:
        _mode.reset(before)


@contextlib.contextmanager
def table(is_used: bool) -> Iterator[None]:
    """Print details in the block to the log file only, if standard output is a terminal.

    is_used: False prints every line. The lines are kept until `open_log` names the file.
    """
    before = _mode.set("table" if is_used else "lines")
    buffer = MemoryHandler(MOST_LINES, flushLevel=logging.CRITICAL + 1)
    loggers = (_lines, logging.getLogger()) if is_used else ()
    for logger in loggers:
        logger.addHandler(buffer)
    try:
        yield
    finally:
        if shows_table():
            erase()
        for logger in loggers:
            logger.removeHandler(buffer)
        if buffer.target is not None:
            buffer.target.close()
        buffer.close()
        _mode.reset(before)


class _LogFile(logging.FileHandler):
    """A log file whose write errors are ignored: log.txt and the checkpoints report a full disk."""

    def handleError(self, record: logging.LogRecord) -> None:
        pass


def open_log(folder: Path) -> None:
    """Write the lines of the block of `table` until now, and all later ones, to the log file."""
    for handler in _lines.handlers:
        if isinstance(handler, MemoryHandler):
            file = _LogFile(folder / LOG, encoding="utf-8", errors="backslashreplace")
            file.setFormatter(logging.Formatter("%(asctime)s %(message)s", "%Y-%m-%d %H:%M:%S"))
            handler.setTarget(file)
            handler.flush()
            handler.capacity = 1  # every line at once
