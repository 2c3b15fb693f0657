"""The labels of a validation folder without class folders (--val-labels).

Three files are read: a table `name,class` (commas or tabs, with or without a header), Kaggle's
LOC_val_solution.csv of ImageNet, and the ground truth of ImageNet's development kit.
"""

import csv
import os
from collections.abc import Sequence
from pathlib import Path

from base.errors import UserError
from base.text import printable
from data.folders import list_tree, some

META = "meta.mat"  # of the development kit: the class of each number


def read_labelled_folder(folder: str, file: str) -> tuple[list[str], list[str]]:
    """Return the images below `folder`, as sorted paths relative to it, and their class names.

    Raises UserError for a file that cannot be read, and for images that are on one side only.
    """
    paths = list_tree(folder)[0]
    if not paths:
        raise UserError(f"{printable(folder)}: no images in it; --val-labels needs them")
    rows = _read_rows(file)
    if all(len(row) == 1 and row[0].isdecimal() for row in rows):
        return paths, _classes_by_number([int(row[0]) for row in rows], len(paths), file)
    return paths, _match(rows, paths, folder, file)


def _read_rows(file: str) -> list[list[str]]:
    """Return the rows of the file that are not empty, each with its cells."""
    try:
        text = Path(file).read_text(encoding="utf-8-sig")
        separator = "\t" if "\t" in text.partition("\n")[0] else ","
        rows = list(csv.reader(text.splitlines(), delimiter=separator))
    except (OSError, UnicodeDecodeError, csv.Error, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else "no text table"
        raise UserError(
            f"--val-labels {file}: cannot be read ({reason}); give a CSV file name,class"
        ) from error
    rows = [[cell.strip() for cell in row] for row in rows if any(row)]
    if not rows:
        raise UserError(f"--val-labels {file}: is empty; give a line name,class for each image")
    return rows


def _match(
    rows: Sequence[Sequence[str]], paths: Sequence[str], folder: str, file: str
) -> list[str]:
    """Return the class of each path. The rows may leave out the folder and the suffix."""
    by_name: dict[str, set[str]] = {}
    for path in paths:
        stem, name = os.path.splitext(path)[0], os.path.basename(path)
        for key in (path, stem, name, os.path.splitext(name)[0]):
            by_name.setdefault(key, set()).add(path)
    if rows[0][0] not in by_name:  # the header
        rows = rows[1:]
    class_of: dict[str, str] = {}
    for row in rows:
        if len(row) < 2 or not row[1]:
            raise UserError(
                f"--val-labels {file}: no class for {printable(row[0])}; give name,class on a line"
            )
        name, class_name = row[0], row[1].split(" ")[0] if _is_kaggle(row[1]) else row[1]
        found = by_name.get(name, set())
        if len(found) > 1:
            raise UserError(
                f"--val-labels {file}: {printable(name)} may be {some(sorted(found))}; give the "
                "whole path"
            )
        for path in found:
            if class_of.setdefault(path, class_name) != class_name:
                raise UserError(f"--val-labels {file}: two classes for {printable(name)}")
    if unknown := [row[0] for row in rows if row[0] not in by_name]:
        raise UserError(
            f"--val-labels {file}: {len(unknown)} of {len(rows)} images are not in "
            f"{printable(folder)} ({some(unknown)}); add them, or remove their lines"
        )
    if missing := [path for path in paths if path not in class_of]:
        raise UserError(
            f"--val-labels {file}: no line for {len(missing)} of {len(paths)} images in "
            f"{printable(folder)} ({some(missing)}); add them, or remove these images"
        )
    return [class_of[path] for path in paths]


def _is_kaggle(cell: str) -> bool:
    """Return whether a cell is a synset and boxes: `n03995372 85 1 499 272`, repeated."""
    words = cell.split(" ")
    is_synset = words[0][:1] == "n" and words[0][1:].isdecimal()
    return len(words) >= 5 and len(words) % 5 == 0 and is_synset


def _classes_by_number(numbers: Sequence[int], count: int, file: str) -> list[str]:
    """Return the synset of each number in ImageNet's ground truth, in the order of the images."""
    if len(numbers) != count:
        raise UserError(
            f"--val-labels {file}: {len(numbers)} lines for {count} images; each image, in the "
            "order of the names, needs one line"
        )
    from scipy.io import loadmat  # only this file needs it

    meta = Path(file).with_name(META)
    try:
        synsets = loadmat(meta, squeeze_me=True)["synsets"]
        names = {int(row["ILSVRC2012_ID"]): str(row["WNID"]) for row in synsets}
    except (OSError, KeyError, ValueError, TypeError, IndexError, NotImplementedError) as error:
        raise UserError(
            f"--val-labels {file}: has numbers, whose classes {META} beside it must give "
            f"({meta}: not there or not readable); unpack the whole development kit"
        ) from error
    if unknown := sorted(set(numbers) - set(names)):
        raise UserError(f"--val-labels {file}: {META} has no class {unknown[0]}")
    return [names[number] for number in numbers]
