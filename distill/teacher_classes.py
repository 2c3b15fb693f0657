"""Match the outputs of a teacher with the classes of the student."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from timm.models import is_model, is_model_pretrained

import models
from base.errors import UserError
from data.labels import ModelClasses, map_labels
from models.class_names import classes_of_file, classes_of_published


@dataclass(frozen=True)
class TeacherOutputs:
    """count: outputs of the teacher. chosen: those of the student's classes, in its order, or None
    if they are the same outputs in the same order. note: what to print, or ""."""

    count: int
    chosen: tuple[int, ...] | None = None
    note: str = ""


def classes_of_teacher(name: str, path: str) -> ModelClasses | None:
    """Return the outputs of a teacher, or None if not known.

    name: its model; path: its file, or "" for published weights.
    """
    if path:
        return classes_of_file(path, name)
    return classes_of_published(name, models.data_config(name)["num_classes"])


def match_outputs(
    name: str, known: ModelClasses | None, num_classes: int, classes: Sequence[str] | None
) -> TeacherOutputs:
    """Match the outputs of a teacher with the student's classes by name.

    known: of `classes_of_teacher`. num_classes, classes: outputs of the student and their names,
    or None if unknown. Without names positions are used.
    Raises UserError if the teacher does not have the student's classes.
    """
    if known is None:
        return TeacherOutputs(num_classes)
    if known.count != num_classes:  # a few numbered folders are no ImageNet classes
        known = replace(known, numbered=False)
    try:
        found = map_labels(
            classes, len(classes or ()) or num_classes, "the data", known, given=num_classes
        )
    except UserError as error:
        reason = error.line()
        if known.count != num_classes:
            reason = f"{known.origin} has {known.count} classes, the data has {num_classes}"
        raise UserError(
            f"teacher {name}: {reason}; train a teacher on them first: {teacher_command(name)}"
        ) from error
    chosen = found.outputs
    if len(chosen) < num_classes == known.count:  # --nb-classes: outputs that have no class yet
        chosen += tuple(output for output in range(known.count) if output not in chosen)
    if len(chosen) != num_classes:
        raise UserError(
            f"teacher {name}: {known.origin} has {known.count} outputs, the student "
            f"{num_classes}; leave out --nb-classes"
        )
    if chosen == tuple(range(known.count)):
        return TeacherOutputs(known.count, None, found.note)
    note = f"{name}: {num_classes} of its {known.count} outputs, in the order of the data's classes"
    return TeacherOutputs(known.count, chosen, found.note or note)


def teacher_command(name: str) -> str:
    """Return the command that trains a teacher, from published weights where there are any."""
    source = ""
    if models.released.find(name) or (is_model(name) and is_model_pretrained(name)):
        source = " --pretrained"
    return f"python main.py --model {name}{source} --data-path ... --output_dir teacher"
