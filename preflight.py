"""Before a run: what it will be and cost (--dry-run); do student and teacher suit (--check)?

Shapes: B batch, C classes. FLOPs count a multiplication and an addition as two, so that DeiT-S is
9.2 G where papers that count multiply-adds write 4.6 G.
"""

import time
from argparse import Namespace
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
import yaml
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import cache
import checkpoint
import datasets
import models
from augment import InputConfig
from distributed import Processes
from errors import UserError
from metrics import clock
from models import Student
from teachers import Answers, Teacher

IMAGENET = 1_281_167, 1000  # training pictures and classes, assumed where no data is there
SAMPLE = 128  # pictures on which a teacher is tried
FEW_TOKENS = 16  # a student with fewer patches learns little (DeiT issue 154)
MARGIN = 15.0  # points below its published accuracy at which a teacher is suspected
PROBE_FLOPS = 2e11  # of one forward of the probe on a CPU
GIB = 2**30


@dataclass(frozen=True)
class Size:
    """What a network costs: parameters, and for one picture FLOPs forward and bytes kept for
    backward in float32."""

    parameters: int
    flops: int
    kept_bytes: int

    def describe(self) -> str:
        return f"{self.parameters / 1e6:.2f} M parameters, {self.flops / 1e9:.2f} GFLOPs a picture"


def measure(make: Callable[[], nn.Module], height: int, width: int) -> Size:
    """Return the size of the network that `make` builds, without computing anything."""
    with torch.device("meta"):
        network, image = make().train(), torch.empty(1, 3, height, width)
    own = {p.untyped_storage()._cdata for p in network.parameters()}
    kept: dict[int, Tensor] = {}

    def pack(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage()._cdata] = tensor
        return tensor

    with (
        FlopCounterMode(display=False) as counter,
        torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor),
    ):
        network(image)
    size = sum(t.untyped_storage().nbytes() for key, t in kept.items() if key not in own)
    return Size(sum(p.numel() for p in network.parameters()), counter.get_total_flops(), size)


def build_plan(
    args: Namespace, processes: Processes, inputs: InputConfig, amp_dtype: torch.dtype | None
) -> list[str]:
    """Return the lines of --dry-run: settings, data, sizes, memory, teacher cache, time."""
    lines = yaml.safe_dump(
        {key: list(v) if isinstance(v, tuple) else v for key, v in vars(args).items()}
    ).splitlines()
    pictures, num_classes, about = _build_data(args, processes, inputs)
    effective = args.batch_size * processes.world_size * args.grad_accum_steps
    lines.append(f"data: {about}; {pictures} pictures an epoch, effective batch {effective}")

    def student() -> nn.Module:
        return models.create_model(args.model, num_classes=num_classes, img_size=inputs.input_size)

    def teacher() -> nn.Module:
        return models.create_model(args.teacher_model, num_classes=num_classes)

    sizes = [measure(student, *inputs.input_size)]
    lines.append(f"student: {args.model}, {sizes[0].describe()} of {inputs.describe()}")
    side = inputs.input_size
    if args.distillation_type != "none":
        side = models.data_config(args.teacher_model)["input_size"][1:]
        sizes.append(measure(teacher, *side))
        lines.append(f"teacher: {args.teacher_model}, {sizes[1].describe()} of {side[0]}x{side[1]}")
        rows = pictures * (args.teacher_cache_views or args.epochs)
        kept = {keep: rows * cache.row_bytes(keep, num_classes) / GIB
                for keep in (cache.ALL, cache.HARD)}  # fmt: skip
        lines.append(
            f"cache: {kept[cache.ALL]:.1f} GiB with --teacher-cache-topk all, "
            f"{kept[cache.HARD]:.2f} GiB with hard, {rows} answers"
        )
    lines.append(f"memory: {_build_memory(args, sizes, amp_dtype)}")
    batch = args.batch_size
    if processes.device.type == "cpu":
        batch = max(1, min(batch, int(PROBE_FLOPS / sum(size.flops for size in sizes))))
    networks = [student(), *([teacher()] if len(sizes) > 1 else [])]
    seconds = probe(networks, [inputs.input_size, side], batch, processes.device, amp_dtype)
    epoch = seconds * pictures / processes.world_size
    lines.append(
        f"time: {1 / seconds:.1f} images/s a process in a probe of {batch} random pictures; an "
        f"epoch {clock(epoch)}, {args.epochs} epochs {clock(epoch * args.epochs)}, if the data "
        "keeps up, without evaluation"
    )
    return lines


def _build_data(args: Namespace, processes: Processes, inputs: InputConfig) -> tuple[int, int, str]:
    """Return pictures an epoch, classes, and what data it is; ImageNet's where none is there."""
    try:
        loaders = datasets.build_loaders(args, inputs, processes)
    except UserError as error:
        return IMAGENET[0], args.nb_classes or IMAGENET[1], f"ImageNet assumed ({error.line()})"
    pictures = len(loaders.train) * args.batch_size * processes.world_size  # type: ignore[arg-type]
    return pictures, loaders.num_classes, loaders.describe()


def _build_memory(args: Namespace, sizes: Sequence[Size], amp_dtype: torch.dtype | None) -> str:
    """Return in words what a process holds, about: weights and their company, and the batch."""
    moments = 1 if args.opt.lower() in ("sgd", "momentum", "nesterov") else 2
    copies = 2 + moments + (args.model_ema and not args.model_ema_force_cpu)
    weights = 4 * copies * sizes[0].parameters + 4 * sum(size.parameters for size in sizes[1:])
    kept = sizes[0].kept_bytes * args.batch_size * (2 if args.cosub else 1)
    if amp_dtype is not None:
        kept //= 2
    return (
        f"about {(weights + kept) / GIB:.1f} GiB a process: {weights / GIB:.1f} for weights, "
        f"gradients, optimizer, average and teacher, {kept / GIB:.1f} for the {args.batch_size} "
        "pictures of a micro-step"
    )


def probe(
    networks: Sequence[nn.Module],
    sides: Sequence[tuple[int, int]],
    batch: int,
    device: torch.device,
    amp_dtype: torch.dtype | None,
    steps: int = 2,
) -> float:
    """Return the seconds a picture takes: student forward and backward, teacher forward.

    networks: the student, and the teacher if there is one; sides: the size each of them sees.
    """
    student, *rest = (network.to(device).train() for network in networks)
    images = [torch.randn(batch, 3, *side, device=device) for side in sides]
    began = 0.0
    for step in range(steps + 1):
        if step == 1:  # the first one warms up
            _wait(device)
            began = time.perf_counter()
        with torch.autocast(device.type, dtype=amp_dtype, enabled=amp_dtype is not None):
            with torch.no_grad():
                for network in rest:
                    network.eval()(images[1])
            outputs = student(images[0])
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        sum(F.softmax(output.float(), 1)[:, 0].sum() for output in outputs).backward()
    _wait(device)
    return (time.perf_counter() - began) / steps / batch


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def build_findings(
    args: Namespace,
    student: Student,
    answers: Answers | None,
    loaders: datasets.Loaders,
    inputs: InputConfig,
    device: torch.device,
) -> list[str]:
    """Return what --check finds, a line each, with what to do about it; [] if all suits."""
    grid = getattr(getattr(student.network, "patch_embed", None), "num_patches", None)
    found = []
    if grid is not None and grid < FEW_TOKENS:
        found.append(
            f"student: sees a picture as {grid} patches only; raise --input-size, or take a model "
            "with smaller patches"
        )
    if answers is None or not isinstance(answers.teacher, Teacher):
        return found
    teacher = answers.teacher
    found += label_order(classes_of(args.teacher_path), loaders.classes)
    images, labels = sample(loaders.val, SAMPLE)
    if len(labels):
        logits = torch.cat([answers(part.to(device)).cpu() for part in images.split(16)])
        file = models.released.published(args.teacher_model, args.teacher_path)
        found += teacher_findings(logits, labels, file.acc1 if file else None)
    size = inputs.input_size
    if teacher.adapter.size[0] > 1.25 * size[0]:
        found.append(
            f"teacher: was trained at {teacher.adapter.size[0]} px and gets the student's "
            f"{size[0]} px enlarged; a teacher of the student's resolution knows more of them"
        )
    return found


def sample(loader: torch.utils.data.DataLoader, count: int) -> tuple[Tensor, Tensor]:
    """Return pictures and labels from all over an evaluation set, `count` at most.

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


def classes_of(source: str) -> list[str] | None:
    """Return the class names a run of this repository left in its checkpoint, if it is one."""
    if not source or not Path(source).is_file():
        return None
    names = checkpoint.read_weights_file(source).get("classes")
    return list(names) if isinstance(names, list | tuple) else None


def label_order(theirs: list[str] | None, ours: list[str] | None) -> list[str]:
    """Return a finding if the teacher's classes are not the data's, name by name."""
    if theirs is None or ours is None or theirs == ours:
        return []
    if sorted(theirs) == sorted(ours):
        return [f"teacher: has the data's {len(ours)} classes in another order; train it on "
                "folders of the same names"]  # fmt: skip
    first = next(
        (pair for pair in zip(theirs, ours) if pair[0] != pair[1]), (len(theirs), len(ours))
    )
    return [f"teacher: was trained on other classes ({first[0]} where the data has {first[1]}); "
            "train it on this data"]  # fmt: skip


def teacher_findings(logits: Tensor, labels: Tensor, published: float | None) -> list[str]:
    """Return what is wrong with a teacher, from its logits (P, C) of a sample and labels (P,).

    published: its known Acc@1 in percent. The floor is MARGIN points below it, else three times
    chance, but at most half way from chance to certainty. An accuracy that renaming the answers
    would mend is a label order: this needs five pictures a class.
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
        return [f"teacher: {acc1:.0f}% right on {count} pictures, {renamed:.0f}% with its classes "
                "renamed: its label order is another; compare the class folders"]  # fmt: skip
    return [f"teacher: {acc1:.0f}% right on {count} pictures, at least {floor:.0f}% is expected; "
            "compare its weights, its classes, and its mean and std"]  # fmt: skip
