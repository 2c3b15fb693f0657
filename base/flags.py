"""One row per flag of main.py: `Flag`, and what is derived from a table of them.

The table is `base/flag_table.py`. The parser, `--help`, the range checks, the notes about flags
without effect, the resume check, the cache manifest and TensorBoard's table of runs read it.
"""

import argparse
import math
from argparse import Namespace
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from base.errors import UserError, shorten

MAX_INTEGER = 2**63


class Range(NamedTuple):
    """The numbers that a flag accepts. above: without `low` itself."""

    low: float
    high: float = math.inf
    above: bool = False

    def describe(self) -> str:
        if self.above:
            return f"above {self.low}" + (f", at most {self.high}" if self.high < math.inf else "")
        if self.high == math.inf:
            return f"at least {self.low}"
        return f"between {self.low} and {self.high}"

    def contains(self, value: float) -> bool:
        above_low = value > self.low if self.above else value >= self.low
        return above_low and value <= self.high


SHARE, FROM_0, FROM_1, POSITIVE = Range(0, 1), Range(0), Range(1), Range(0, above=True)


class Idle(NamedTuple):
    """When a flag has no effect, as a function of all settings, and why."""

    test: Callable[[Namespace], Any]
    why: str


# Facts about a flag that are yes or no.
MAY_CHANGE = "may change on resume"  # it does not reach the weights, or another check covers it
TRANSFORM = "changes the teacher's input: transform"  # a teacher cache is valid for one value
MIXING = "changes the teacher's input: mixing"  # the same, where images are mixed
COMPARED = "compared"  # a column of TensorBoard's table of runs
COMMON = "common"  # part of the short --help


class Flag:
    """All facts about one flag.

    name: with dashes; other spellings and short names in `aliases`. kind: the type of its value, or
        a function of the word; bool is a switch.
    facts: in any order, the `Range` that a run can use, the `Idle` case, and the words above.
    repeat: "list" collects repetitions; "several" keeps one value as it is and makes a list of
        more; "merge" joins KEY=VALUE words into a dictionary.
    options: choices, nargs, metavar, const, as argparse has them.
    """

    def __init__(
        self,
        name: str,
        kind: Callable[[str], Any],
        default: Any,
        *facts: Range | Idle | str,
        aliases: tuple[str, ...] = (),
        repeat: str = "",
        **options: Any,
    ) -> None:
        self.name, self.kind, self.default = name, kind, default
        self.aliases, self.repeat, self.options = aliases, repeat, options
        self.facts = frozenset(fact for fact in facts if isinstance(fact, str))
        self.valid = next((fact for fact in facts if isinstance(fact, Range)), None)
        self.idle = next((fact for fact in facts if isinstance(fact, Idle)), None)
        self.text = self.off_text = ""

    def help(self, text: str, off: str = "") -> "Flag":
        """Set the help text and return the flag. off: of `--no-NAME`, which the flag then has."""
        self.text, self.off_text = text, off
        return self

    @property
    def dest(self) -> str:
        """The name in the settings."""
        return self.name.removeprefix("--").replace("-", "_")

    @property
    def choices(self) -> tuple[str, ...]:
        return self.options.get("choices", ())

    def value_type(self) -> Any:
        """Return the type of the flag's value in a file, for `structured.convert`."""
        kind: Any = self.kind if isinstance(self.kind, type) else str | list[str | float | dict]
        if self.repeat == "merge":
            return dict[str, str | int | float | bool | list[float] | None]
        if self.repeat == "list":
            kind = list[kind | dict[str, Any]] if kind is str else list[kind]
        elif self.repeat == "several" or "nargs" in self.options and self.options["nargs"] != "?":
            kind = kind | list[kind]
        return kind | None if self.default is None else kind

    def help_text(self) -> str:
        """Return the help with the default at its end."""
        if "default:" in self.text:
            return self.text
        default = self.default
        if isinstance(default, bool):
            default = "on" if default else "off"
        elif default in (None, "", [], {}):
            default = "none"
        return f"{self.text} (default: {default})"

    def check(self, value: Any) -> None:
        """Raise UserError for a number or text that no run can use."""
        for number in value if isinstance(value, list) else [value]:
            if isinstance(number, str) and "\0" in number:
                raise UserError(f"{self.name} {shorten(number)}: has a null character")
            if isinstance(number, bool) or not isinstance(number, int | float):
                continue
            if isinstance(number, int) and abs(number) >= MAX_INTEGER:
                raise UserError(f"{self.name} {shorten(number)}: is too large")
            if math.isnan(number) or (self.valid is not None and math.isinf(number)):
                raise UserError(f"{self.name} {number}: must be a finite number")
            if self.valid is not None and not self.valid.contains(number):
                raise UserError(f"{self.name} {number}: must be {self.valid.describe()}")

    def add_to(self, group: Any) -> None:
        """Add the flag to a parser or to a group of one."""
        names = (self.name, *self.aliases)
        text = self.help_text().replace("%", "%%")
        if self.kind is bool:
            group.add_argument(*names, action="store_true", dest=self.dest, help=text)
            if self.off_text:
                off = "--no-" + self.name.removeprefix("--")
                group.add_argument(off, action="store_false", dest=self.dest, help=self.off_text)
            group.set_defaults(**{self.dest: self.default})
            return
        options = dict(self.options, type=self.kind, default=self.default)
        if self.repeat:
            options["action"] = ACTIONS[self.repeat]
        group.add_argument(*names, dest=self.dest, help=text, **options)


class Repeatable(argparse.Action):
    """A flag whose single value stays as it is, and whose repetitions make a list."""

    def __call__(self, parser, namespace, value, option_string=None):  # type: ignore[no-untyped-def]
        owner, given = getattr(self, "_given", (None, []))
        given = [*given, value] if owner is namespace else [value]
        self._given = (namespace, given)
        setattr(namespace, self.dest, value if len(given) == 1 else given)


class Settings(argparse.Action):
    """A flag of KEY=VALUE words, which become a dictionary."""

    def __call__(self, parser, namespace, values, option_string=None):  # type: ignore[no-untyped-def]
        setattr(namespace, self.dest, getattr(namespace, self.dest, {}) | dict(values))


ACTIONS: dict[str, Any] = {"list": "append", "several": Repeatable, "merge": Settings}


def idle_notes(flags: Sequence[Flag], settings: Namespace, explicit: frozenset[str]) -> list[str]:
    """Return one line for every flag in `explicit` that does nothing in this run."""
    return [
        f"{flag.name} has no effect here: {flag.idle.why}"
        for flag in flags
        if flag.idle is not None and flag.dest in explicit and flag.idle.test(settings)
    ]
