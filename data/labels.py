"""Match the class names of data with the outputs of a model.

A data set numbers its classes as its reader sorts them. A trained model has an order of its own.
The two are matched by name; only if one side has no names, by position.
"""

import difflib
from collections.abc import Sequence
from dataclasses import dataclass

from timm.data import ImageNetInfo, infer_imagenet_subset

from base.errors import UserError
from base.text import printable
from data.folders import some


@dataclass(frozen=True)
class ModelClasses:
    """The outputs of a model.

    count: how many. names: of the first outputs, in their order, or None if unknown.
    origin: what has these outputs, in words for messages.
    numbered: True for published ImageNet weights: class folders may be named 0 to 999.
    """

    count: int
    names: tuple[str, ...] | None
    origin: str
    numbered: bool = False


@dataclass(frozen=True)
class LabelMap:
    """outputs: the output of the model for each class of the data. names: of the outputs, in their
    order, as far as they are known. note: what to print, or ""."""

    outputs: tuple[int, ...]
    names: tuple[str, ...] | None
    note: str = ""


def imagenet_names(count: int) -> tuple[str, ...] | None:
    """Return the synset ids of published ImageNet weights with `count` outputs, if there are."""
    subset = infer_imagenet_subset({"num_classes": count})
    return tuple(ImageNetInfo(subset).label_names()) if subset else None


def map_labels(
    names: Sequence[str] | None, count: int, what: str, model: ModelClasses, *, given: int | None
) -> LabelMap:
    """Return for each class of the data the output of `model` with the same name.

    names: the class names of the data, or None. count: the number of its classes; what: the data
    in words. given: --nb-classes, which lets the data have fewer classes than a model without
    names has outputs.
    Raises UserError for names that the model does not have, and for numbers that do not fit.
    """
    names, known = _unique(names), _unique(model.names)
    note = ""
    synsets = imagenet_names(model.count) if names and known is None else None
    if names and synsets and set(names) <= set(synsets):
        known = synsets
        note = f"{model.origin}: stores no class names; its outputs are taken as ImageNet's"
    if names is None or known is None:
        return _by_position(names, count, what, model, given)
    if model.numbered and all(name.isdecimal() and int(name) < model.count for name in names):
        note = f"{what}: the folder names are taken as ImageNet's class numbers"
        return LabelMap(tuple(map(int, names)), known, note)
    number = {name: output for output, name in enumerate(known)}
    if unknown := [name for name in names if name not in number]:
        raise UserError(_unknown_names(unknown, what, known, model.origin))
    return LabelMap(tuple(number[name] for name in names), known, note)


def _unique(names: Sequence[str] | None) -> tuple[str, ...] | None:
    """Return the names, or None if two are the same, which makes them ambiguous."""
    return tuple(names) if names and len(set(names)) == len(names) else None


def _unknown_names(unknown: Sequence[str], what: str, known: Sequence[str], origin: str) -> str:
    spelled = {name.lower(): name for name in known}
    close = difflib.get_close_matches(unknown[0].lower(), spelled, n=1, cutoff=0.6)
    hint = f" (did you mean {printable(spelled[close[0]])}?)" if close else ""
    return (
        f"{what}: not a class of {origin}: {some(unknown)}{hint}; it has {len(known)} classes "
        f"({some(known)}); rename it to one of these, or remove it"
    )


def _by_position(
    names: Sequence[str] | None, count: int, what: str, model: ModelClasses, given: int | None
) -> LabelMap:
    """Return the identity. Raises UserError if the numbers of classes differ."""
    if count > model.count or (count < model.count and given != model.count):
        advice = "train a new head for the data with --finetune, without --eval"
        if count < model.count:
            advice = (
                f"if these are the first of them in this order, give --nb-classes {model.count}"
            )
        raise UserError(
            f"{what}: {count} classes, {model.origin} has {model.count}, and one of the two has "
            f"no class names; {advice}"
        )
    if names is None:
        note = f"{what}: has no class names; its labels are taken as output numbers"
    else:
        note = (
            f"{model.origin}: stores no class names; its outputs are taken in the order of the "
            f"data's classes ({some(names)})"
        )
    return LabelMap(tuple(range(count)), model.names or names, note)
