"""Recipes: the published runs by name, and how to keep their batch on other machines.

A recipe is a YAML file in `recipes/`: `flags` of main.py, the `source` of its number, `expected`
(Acc@1 in percent and its tolerance), `effective-batch` (images an update), and `needs`: flags that
the user must give.
"""

import difflib
import os
from argparse import Namespace
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import msgspec

from base import structured
from base.errors import UserError, shorten
from training import run_settings

FOLDER = Path(__file__).resolve().parents[1] / "recipes"
AUTO, NONE = "auto", "none"
UNPUBLISHED = (AUTO, NONE, "")  # values of --recipe without a file


@dataclass(frozen=True)
class Recipe:
    """A recipe file, or the config.yaml of a run, as it is read. `flags` by destination name.

    plugins: files that the run had.
    """

    name: str
    source: str
    flags: dict[str, Any]
    acc1: float | None = None
    tolerance: float = 0.0
    effective_batch: int | None = None
    needs: dict[str, str] = field(default_factory=dict)
    plugins: tuple[str, ...] = ()

    def expects(self) -> str:
        """Return the expected accuracy and its source as text."""
        number = "no published accuracy"
        if self.acc1 is not None:
            number = f"{self.acc1:g} ± {self.tolerance:g}% expected"
        return f"{number} ({self.source or 'no source given'})"

    def beside(self, acc1: float) -> str:
        """Return the expected accuracy beside the one reached, both in percent; "" if none."""
        if self.acc1 is None:
            return ""
        word = "within" if abs(acc1 - self.acc1) <= self.tolerance else "outside"
        return (
            f"{self.name} expects {self.acc1:g} ± {self.tolerance:g}% ({self.source}); reached "
            f"{acc1:.2f}%, {word} it"
        )


class _Expected(msgspec.Struct, forbid_unknown_fields=True):
    """The expected accuracy of a recipe, in percent."""

    acc1: Annotated[float, msgspec.Meta(ge=0, le=100)] | None = None
    tolerance: Annotated[float, msgspec.Meta(ge=0, le=100)] = 0.0


class _File(msgspec.Struct, rename={"effective_batch": "effective-batch"}):
    """The keys of a recipe file. Other keys are the author's notes."""

    flags: dict[str, Any]
    source: str | None = None
    expected: _Expected | None = None
    effective_batch: Annotated[int, msgspec.Meta(ge=1)] | None = None
    needs: dict[str, str] | None = None


def names() -> list[str]:
    return sorted(path.stem for path in FOLDER.glob("*.yaml"))


def find(name: str) -> Recipe:
    """Return a recipe by name, or of a YAML file by path. Raises UserError for an unknown one."""
    is_file = name.endswith((".yaml", ".yml"))
    path = Path(name) if is_file else FOLDER / f"{name}.yaml"
    if not os.path.isfile(path):  # Path.is_file raises for a name that is too long
        if is_file:
            raise UserError(f"--recipe {name}: not there; give a YAML file or a recipe's name")
        close = difflib.get_close_matches(name, names(), n=3)
        hint = f"did you mean {' or '.join(close)}? " if close else ""
        known = ", ".join([AUTO, NONE, *names()])
        raise UserError(f"--recipe {name}: unknown; {hint}known: {known}")
    values = structured.read(path, dict[str, Any], what="--recipe")
    if is_of_run(values):
        named = values.get("plugin") or []
        source = f"the settings of {path}"
        flags = {k: v for k, v in values.items() if k not in run_settings.OF_ONE_START}
        return Recipe(name=path.stem, source=source, flags=flags, plugins=tuple(map(str, named)))
    content = structured.convert(values, _File, f"--recipe {path}")
    expected = content.expected or _Expected()
    return Recipe(
        name=path.stem,
        source=" ".join((content.source or "").split()),
        flags={flag.replace("-", "_"): value for flag, value in content.flags.items()},
        acc1=expected.acc1,
        tolerance=expected.tolerance,
        effective_batch=content.effective_batch,
        needs=content.needs or {},
    )


def is_of_run(values: Mapping[str, Any]) -> bool:
    """Return whether the content of a YAML file is the config.yaml of a run, not a recipe."""
    return "flags" not in values and {"output_dir", "data_set", "epochs"} <= values.keys()


def beside(name: str, acc1: float) -> str:
    """Return `Recipe.beside` of a published recipe, "" for any other value of --recipe."""
    return find(name).beside(acc1) if name not in UNPUBLISHED else ""


def check_needs(recipe: Recipe, args: Namespace) -> None:
    """Raise UserError if a flag that the recipe needs is not given."""
    given = vars(args)
    for flag, what in recipe.needs.items():
        name = flag.replace("-", "_")
        if name not in given:
            raise UserError(f"--recipe {recipe.name}: needs: unknown flag {shorten(flag)}")
        if not given[name] and not args.resume:
            raise UserError(f"--recipe {recipe.name}: give --{flag}, {what}")


def fit_batch(
    recipe: Recipe, batch_size: int, accum: int, world_size: int, explicit: frozenset[str]
) -> dict[str, int]:
    """Return the --batch-size and --grad-accum-steps that keep the recipe's effective batch.

    Flags of the command line (`explicit`) stay. Without a solution in whole numbers nothing
    changes. Many processes share the batch; few processes accumulate it.
    """
    wanted = recipe.effective_batch
    step = batch_size * world_size
    if wanted is None or "grad_accum_steps" in explicit or step * accum == wanted:
        return {}
    if wanted % step == 0:
        return {"grad_accum_steps": wanted // step}
    if "batch_size" in explicit or wanted % world_size:
        return {}
    share = wanted // world_size  # images of each process in an update
    size = max(n for n in range(1, min(batch_size, share) + 1) if share % n == 0)
    return {"batch_size": size, "grad_accum_steps": share // size}


def describe(recipe: Recipe, changed: Mapping[str, Any], fitted: Mapping[str, int]) -> list[str]:
    """Return the expected accuracy, and a line for every flag that differs from the recipe.

    changed: flags of the command line with another value than the recipe's, by destination name;
    fitted: those that keep its batch on this number of processes.
    """
    lines = [recipe.expects()]
    for flag, value in changed.items():
        shown = repr(value) if value == "" else value
        lines.append(f"--{flag.replace('_', '-')} {shown} instead of {recipe.flags[flag]}")
    if fitted:
        how = " ".join(f"--{flag.replace('_', '-')} {value}" for flag, value in fitted.items())
        lines.append(f"{how} keeps the effective batch of {recipe.effective_batch}")
    return [f"recipe {recipe.name}: {line}" for line in lines]


def batch_warnings(recipe: Recipe, effective: int) -> list[str]:
    """Return a line if the effective batch is not the recipe's."""
    if recipe.effective_batch in (None, effective):
        return []
    return [
        f"recipe {recipe.name}: effective batch {effective} instead of "
        f"{recipe.effective_batch}; expect another accuracy, or change --batch-size"
    ]
