"""Checks of student and teacher before a run (--check, --teacher-check).

Shapes: P images of a sample, C classes.
"""

from argparse import Namespace
from dataclasses import dataclass, field

import torch
from torch import Tensor

import datasets
import models
from data.transforms import InputConfig
from distill.teacher import LogitsOnly, Teacher, build_sources
from models import Student

SAMPLE = 128  # images on which a teacher is evaluated
FEW_PATCHES = 16  # a student with fewer patches learns little (DeiT issue 154)
MARGIN = 15.0  # points below its published accuracy at which a teacher is reported


@dataclass
class Findings:
    """What the checks found, a line each.

    accuracies: of every teacher on the sample. problems: with advice; [] if there are none.
    """

    accuracies: list[str] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)


def build_findings(
    args: Namespace,
    student: Student,
    teacher: LogitsOnly | None,
    loaders: datasets.Loaders,
    inputs: InputConfig,
    device: torch.device,
) -> Findings:
    """Return the accuracy of every teacher on a sample, and the problems of student and teachers.

    teacher: its network without features, or None if there is none.
    """
    found = Findings()
    patches = getattr(getattr(student.network, "patch_embed", None), "num_patches", None)
    if patches is not None and patches < FEW_PATCHES:
        found.problems.append(
            f"student: divides an image into {patches} patches only; raise --input-size, or use a "
            "model with smaller patches"
        )
    if teacher is None:
        return found
    sources = build_sources(args)
    images, labels = sample(loaders.val, SAMPLE)
    for member, source in zip(teacher.teacher.members, sources):
        if not member.classifies:  # only its features are used
            continue
        what = f"teacher {source.name}" if len(sources) > 1 else "teacher"
        problems = upscaled(member.adapter.size[0], inputs.input_size[0])
        if len(labels):
            logits = _logits(member, images, device)
            file = models.released.published(source.name, source.path)
            problems = teacher_problems(logits, labels, file.acc1 if file else None) + problems
            found.accuracies.append(f"{what}: {accuracy_line(logits, labels)}, {size_of(member)}")
        found.problems += [f"{what}: {problem}" for problem in problems]
    return found


def _logits(teacher: Teacher, images: Tensor, device: torch.device) -> Tensor:
    """Return the logits (P, C) of a sample on the CPU, in batches of 16."""
    network = LogitsOnly(teacher)
    return torch.cat([network(batch.to(device)).cpu() for batch in images.split(16)])


def size_of(teacher: Teacher) -> str:
    """Return the teacher's input size in words."""
    return "input {}x{}".format(*teacher.adapter.size)


def check_passed(args: Namespace, teacher: LogitsOnly | None) -> str:
    """Return what --check prints if it finds no problem: what it has checked."""
    if teacher is not None:
        return "no problem found in the student and the teacher"
    why = "there is no teacher"
    if args.teacher_cache:
        why = "the teacher is not checked, because all its logits are in the cache"
    elif args.match or args.ranking_kl_weight:
        why = "the teacher is not checked, because only its features are used"
    return f"no problem found in the student; {why}"


def upscaled(size_T: int, size: int) -> list[str]:
    """Return a problem if images are enlarged much for a teacher of `size_T` pixels."""
    if size_T <= 1.25 * size:
        return []
    return [
        f"was trained at {size_T} px, and the student's images of {size} px are enlarged for it; "
        "a teacher trained at the student's size is often more accurate on them"
    ]


def accuracy_line(logits: Tensor, labels: Tensor) -> str:
    acc1 = 100 * float((logits.argmax(1) == labels).double().mean())
    return f"Acc@1 {acc1:.1f} on a sample of {len(labels)} images"


def sample(loader: datasets.ImageLoader, count: int) -> tuple[Tensor, Tensor]:
    """Return images and labels, evenly spread over an evaluation set, `count` at most.

    Of streamed data, which has no fixed order, the first ones.
    """
    if isinstance(loader.sampler, datasets.EvalSampler):
        total = len(loader.dataset)  # type: ignore[arg-type]
        positions = torch.linspace(0, total - 1, min(count, total)).long().tolist()
        batch = loader.load([(position, 0) for position in positions])
    else:
        batch = next(iter(loader))
    if batch is None:
        return torch.empty(0), torch.empty(0)
    images, labels = (part.to(torch.device("cpu"))[:count] for part in batch)
    return images, labels


def teacher_problems(logits: Tensor, labels: Tensor, published: float | None) -> list[str]:
    """Return the problems of a teacher, from its logits (P, C) of a sample and the labels (P,).

    published: its known Acc@1 in percent. The lowest accepted accuracy is MARGIN points below it.
    Without it, that is three times chance, but at most half way from chance to 100 %. If another
    order of the classes would reach it, the order is reported; this needs five images a class.
    """
    count, num_classes = logits.shape
    predictions = logits.argmax(1)
    acc1 = 100 * float((predictions == labels).double().mean())
    chance = 1 / num_classes
    lowest = published - MARGIN if published else 100 * min(3 * chance, (1 + chance) / 2)
    if acc1 >= lowest:
        return []
    table = torch.zeros(num_classes, num_classes, dtype=torch.long)
    table.index_put_((predictions, labels), torch.ones_like(labels), accumulate=True)
    reordered = 100 * float(table.max(1).values.sum()) / count
    if count >= 5 * num_classes and reordered >= lowest and reordered > 2 * acc1:
        return [
            f"Acc@1 is {acc1:.0f} % on {count} images, and {reordered:.0f} % with its classes in "
            "another order: its label order differs; compare the names of the classes"
        ]
    return [
        f"Acc@1 is {acc1:.0f} % on {count} images, at least {lowest:.0f} % is expected; compare "
        "its weights, its classes, and its mean and std"
    ]
