"""Before a run: what it will be and cost (--dry-run); do student and teacher suit (--check)?

Shapes: B batch, C classes. FLOPs count a multiplication and an addition as two, so that DeiT-S is
9.2 G where papers that count multiply-adds write 4.6 G.
"""

from argparse import Namespace

import torch
from torch import Tensor

import datasets
import models
from data.transforms import InputConfig
from distill.teacher import LogitsOnly, build_sources
from models import Student

SAMPLE = 128  # images on which a teacher is tried
FEW_TOKENS = 16  # a student with fewer patches learns little (DeiT issue 154)
MARGIN = 15.0  # points below its published accuracy at which a teacher is suspected


def build_findings(
    args: Namespace,
    student: Student,
    answers: LogitsOnly | None,
    loaders: datasets.Loaders,
    inputs: InputConfig,
    device: torch.device,
) -> list[str]:
    """Return what --check finds, a line each, with what to do about it; [] if all suits."""
    grid = getattr(getattr(student.network, "patch_embed", None), "num_patches", None)
    found = []
    if grid is not None and grid < FEW_TOKENS:
        found.append(
            f"student: sees an image as {grid} patches only; raise --input-size, or take a model "
            "with smaller patches"
        )
    if answers is None:
        return found
    names, paths = build_sources(args)
    images, labels = sample(loaders.val, SAMPLE)
    for teacher, name, path in zip(answers.teacher.members, names, paths):
        if not teacher.classifies:  # only its features are used
            continue
        lines = []
        if len(labels):
            logits = torch.cat([LogitsOnly(teacher)(x.to(device)).cpu() for x in images.split(16)])
            file = models.released.published(name, path)
            lines += teacher_findings(logits, labels, file.acc1 if file else None)
        lines += enlarged(teacher.adapter.size[0], inputs.input_size[0])
        whose = f"teacher {name}:" if len(names) > 1 else "teacher:"
        found += [line.replace("teacher:", whose, 1) for line in lines]
    return found


def check_passed(args: Namespace, answers: LogitsOnly | None) -> str:
    """Return what --check says where it finds nothing: that all suits which it examined."""
    if answers is not None:
        return "student and teacher suit the data and each other"
    why = "there is no teacher"
    if args.teacher_cache:
        why = "its teacher is not asked, since all answers are in the cache"
    elif args.match or args.ranking_kl_weight:
        why = "its teacher is asked for no classes"
    return f"the student suits the data; {why}"


def enlarged(size_T: int, size: int) -> list[str]:
    """Return a finding if a teacher of `size_T` pixels sees much smaller images enlarged."""
    if size_T <= 1.25 * size:
        return []
    return [
        f"teacher: was trained at {size_T} px and gets the student's {size} px enlarged; a "
        "teacher of the student's resolution knows more of them"
    ]


def sample(loader: torch.utils.data.DataLoader, count: int) -> tuple[Tensor, Tensor]:
    """Return images and labels from all over an evaluation set, `count` at most.

    From a stream, which has no order, the first ones.
    """
    data = loader.dataset
    if isinstance(loader.sampler, datasets.EvalSampler):
        total = len(data)  # type: ignore[arg-type]
        places = torch.linspace(0, total - 1, min(count, total)).long().tolist()
        pairs = [pair for place in places if (pair := data[place, 0]) is not None]
        images = [image for image, _ in pairs]
        labels = [label for _, label in pairs]
        if not pairs:
            return torch.empty(0), torch.empty(0)
        return torch.stack(images), torch.tensor(labels)
    images, labels = next(iter(loader))[:2]
    return images[:count], labels[:count]


def teacher_findings(logits: Tensor, labels: Tensor, published: float | None) -> list[str]:
    """Return what is wrong with a teacher, from its logits (P, C) of a sample and labels (P,).

    published: its known Acc@1 in percent. The floor is MARGIN points below it, else three times
    chance, but at most half way from chance to certainty. An accuracy that renaming the answers
    would mend is a label order: this needs five images a class.
    """
    count, num_classes = logits.shape
    answers = logits.argmax(1)
    acc1 = 100 * float((answers == labels).double().mean())
    chance = 1 / num_classes
    floor = published - MARGIN if published else 100 * min(3 * chance, (1 + chance) / 2)
    if acc1 >= floor:
        return []
    table = torch.zeros(num_classes, num_classes, dtype=torch.long)
    table.index_put_((answers, labels), torch.ones_like(labels), accumulate=True)
    renamed = 100 * float(table.max(1).values.sum()) / count
    if count >= 5 * num_classes and renamed >= floor and renamed > 2 * acc1:
        return [
            f"teacher: {acc1:.0f}% right on {count} images, {renamed:.0f}% with its classes "
            "renamed: its label order is another; compare the class folders"
        ]
    return [
        f"teacher: {acc1:.0f}% right on {count} images, at least {floor:.0f}% is expected; "
        "compare its weights, its classes, and its mean and std"
    ]
