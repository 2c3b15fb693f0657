"""Errors that end a run: user errors, a failed process, and a stop by a signal."""

import reprlib
from collections.abc import Iterator, Mapping
from typing import Any

from base.text import printable

MAX_LINE = 2000  # characters of an error


class UserError(ValueError):
    """A wrong setting, file or image.

    The message is one line: the setting, what was found, what to do. `main.py` prints it on
    stderr and ends with exit code 2.
    """

    def line(self) -> str:
        """Return the message on one line, also after a DataLoader worker has wrapped it.

        A worker re-raises `UserError("Caught UserError in DataLoader worker ... <traceback>")`,
        in which the original message follows the last `UserError: `.
        """
        message = str(self)
        if "Original Traceback" in message:
            message = message.rsplit("UserError: ", 1)[-1]
        line = printable(" ".join(message.split()))
        return line if len(line) <= MAX_LINE else f"{line[:MAX_LINE]} ..."


def system_error(error: BaseException | None) -> OSError | None:
    """Return the error of the system, such as a full disk, that led to `error`; None for others.

    torch and other libraries raise an error of their own while they handle it.
    """
    while error is not None and not (isinstance(error, OSError) and error.strerror):
        error = error.__context__
    return error


_SHORT = reprlib.Repr()
_SHORT.maxlevel, _SHORT.maxlist, _SHORT.maxdict, _SHORT.maxstring, _SHORT.maxother = 2, 6, 4, 60, 60


def shorten(value: Any, limit: int = 80, *, quote: bool = True) -> str:
    """Return a value as text of at most `limit` characters, for a message.

    A whole value may be endless: aliases of a YAML file expand when they are printed. quote: put
    text in quotation marks.
    """
    text = _SHORT.repr(value) if quote or not isinstance(value, str) else value
    return text if len(text) <= limit else f"{text[: limit - 3]}..."


def differences(was: Mapping[str, Any], now: Mapping[str, Any], what: str = "") -> Iterator[str]:
    """Yield in words, with both values, each entry that differs; of nested ones, each of theirs."""
    for name in sorted({*was, *now}):
        one, other = was.get(name), now.get(name)
        if isinstance(one, Mapping) and isinstance(other, Mapping):
            yield from differences(one, other, f"{what}{name} ")
        elif one != other:
            yield f"{what}{name} was {shorten(one)} and is {shorten(other)}"


def describe(error: Exception) -> str:
    """Return an error in words; one of the user's own code with its kind, such as a NameError."""
    named = isinstance(error, ValueError | RuntimeError)
    return str(error) if named else f"{type(error).__name__}: {error}"


class CorruptFile(UserError):
    """A damaged file, or one of another kind. `--resume auto` then tries an older one."""


EXIT_FAULT = 1  # a process or a DataLoader worker has died or hangs; --resume auto continues
EXIT_STOPPED = 75  # sysexits' EX_TEMPFAIL: nothing is wrong, start again later


class Stopped(Exception):
    """The run received a stop signal. All processes raise this together.

    folder: of the checkpoint that was written, or "". The exit code is `EXIT_STOPPED`, or 130 for
    Ctrl-C.
    """

    def __init__(self, signal_number: int, *, folder: str = "") -> None:
        super().__init__(f"stopped by signal {signal_number}")
        self.signal_number, self.folder = signal_number, folder


class PeerLost(RuntimeError):
    """Another process of the run did not start, has died, or does not respond."""
