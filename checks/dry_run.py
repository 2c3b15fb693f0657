"""Before a run: what it will be and cost (--dry-run); do student and teacher suit (--check)?

Shapes: B batch, C classes. FLOPs count a multiplication and an addition as two, so that DeiT-S is
9.2 G where papers that count multiply-adds write 4.6 G.
"""

import time
from argparse import Namespace
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
import yaml
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import datasets
import models
from base.distributed import Processes
from base.errors import UserError
from data.samplers import TrainSampler
from data.transforms import InputConfig
from distill import cache_store
from distill.teacher import build_sources, input_of
from training import optim
from training.metrics import clock
from training.trained_classes import build_trained_classes

# What --data-set names, training images and classes: counted with where the data is not there.
EXTENTS = {
    "IMNET": ("ImageNet", 1_281_167, 1000),
    "CIFAR10": ("CIFAR-10", 50_000, 10),
    "CIFAR": ("CIFAR-100", 50_000, 100),
    "INAT": ("iNaturalist 2018", 437_513, 8142),
    "INAT19": ("iNaturalist 2019", 265_240, 1010),
}
PROBE_FLOPS = 2e11  # of one forward of the probe on a CPU
DAY_S = 86_400


@dataclass(frozen=True)
class Size:
    """What a network costs: parameters, those of them that train, and for one image FLOPs
    forward and bytes kept for backward in float32."""

    parameters: int
    trained: int
    flops: int
    kept_bytes: int

    def describe(self) -> str:
        return f"{self.parameters / 1e6:.2f} M parameters, {self.flops / 1e9:.2f} GFLOPs an image"


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
    every = list(network.parameters())
    trained = sum(p.numel() for p in every if p.requires_grad)
    return Size(sum(p.numel() for p in every), trained, counter.get_total_flops(), size)


@dataclass(frozen=True)
class Planned:
    """A network of the run that is planned; side: (height, width) of its images."""

    name: str
    make: Callable[[], nn.Module]
    side: tuple[int, int]
    size: Size


@dataclass(frozen=True)
class Extent:
    """How much data an epoch has: micro-steps of a process, and images drawn for all of them."""

    steps: int
    images: int
    num_classes: int
    what: str


def build_plan(
    args: Namespace, processes: Processes, inputs: InputConfig, amp_dtype: torch.dtype | None
) -> list[str]:
    """Return the lines of --dry-run: settings, data, sizes, memory, teacher cache, time, pace."""
    extent = _build_extent(args, processes, inputs)
    student = _build_planned_student(args, extent.num_classes, inputs)
    teachers = _build_planned_teachers(args, extent.num_classes)
    batch_plan = optim.build_batch_plan(args, extent.steps, processes.world_size)
    settings = {key: list(v) if isinstance(v, tuple) else v for key, v in vars(args).items()}
    return [
        *yaml.safe_dump(settings).splitlines(),
        f"data: {extent.what}; {extent.images} images an epoch",
        f"student: {student.name}, {student.size.describe()} of {inputs.describe()}",
        *(
            f"teacher: {teacher.name}, {teacher.size.describe()} of "
            f"{teacher.side[0]}x{teacher.side[1]}"
            for teacher in teachers
        ),
        *_build_cache(args, extent),
        f"memory: {_build_memory(args, student, teachers, amp_dtype)}",
        f"time: {_build_time(args, student, teachers, extent, processes, amp_dtype)}",
        f"recipe: {batch_plan.describe()}",
        *(f"WARNING: {line}" for line in optim.build_warnings(args, batch_plan.lr)),
    ]


def _build_extent(args: Namespace, processes: Processes, inputs: InputConfig) -> Extent:
    """Return how much data the run has; the published size where the data is not there.

    Raises UserError for data that is there and cannot be used.
    """
    try:
        loaders = datasets.build_loaders(args, inputs, processes, build_trained_classes(args))
    except UserError as error:
        is_named_alone = not args.data_path and "/" in str(args.data_set)  # tfds/NAME
        if not is_named_alone and (not args.data_path or Path(args.data_path).exists()):
            raise
        return _build_assumed(args, processes, error.line())
    steps = len(loaders.train) if loaders.train is not None else 0
    sampler = loaders.train_sampler
    drawn = sampler.kept if sampler else steps * args.batch_size * processes.world_size
    return Extent(steps, drawn, loaders.num_classes, loaders.describe())


def _build_assumed(args: Namespace, processes: Processes, why: str) -> Extent:
    """Return the published size of the data set that was asked for, and say so.

    why: what is the matter with the data.
    """
    name, images, classes = EXTENTS.get(str(args.data_set), EXTENTS["IMNET"])
    unknown = "" if args.data_set in EXTENTS else "of unknown size, "
    if args.inat_category != "name" and not args.nb_classes:
        unknown += "--nb-classes unknown, "
    classes = args.nb_classes or classes
    sampler = TrainSampler(
        images,
        num_replicas=processes.world_size,
        repeats=datasets.REPEATS if args.repeated_aug else 1,
    )
    what = f"not there, {unknown}{name}'s {images} images and {classes} classes assumed ({why})"
    return Extent(sampler.count // args.batch_size, sampler.kept, classes, what)


def _build_planned_student(args: Namespace, num_classes: int, inputs: InputConfig) -> Planned:
    """Return the student as the run builds it, but for its first weights."""

    def make(settings: Namespace = args) -> nn.Module:
        return models.build_student(settings, num_classes, inputs, with_weights=False)

    size = measure(make, *inputs.input_size)
    if args.grad_checkpointing:  # in the backward pass one block at a time is whole again
        plain = Namespace(**vars(args) | {"grad_checkpointing": False})
        whole = measure(lambda: make(plain), *inputs.input_size)
        with torch.device("meta"):
            blocks = len(getattr(make().network, "blocks", ())) or 1
        size = replace(size, kept_bytes=size.kept_bytes + whole.kept_bytes // blocks)
    return Planned(args.model, make, inputs.input_size, size)


def _build_planned_teachers(args: Namespace, num_classes: int) -> list[Planned]:
    """Return whom the run asks. Local files are looked into for their size, nothing is fetched."""
    classifies = args.distillation_type != "none"
    if not (classifies or args.match or args.ranking_kl_weight):
        return []
    found = []
    for name, path in zip(*build_sources(args)):
        make = partial(models.create_model, name, num_classes=num_classes if classifies else 0)
        side = input_of(name, path if Path(path).is_file() else "").input_size
        found.append(Planned(name, make, side, measure(make, *side)))
    return found


def _build_cache(args: Namespace, extent: Extent) -> list[str]:
    """Return a line on what a cache of the teacher's answers would take."""
    if args.distillation_type == "none":
        return []
    views = args.teacher_cache_views or args.epochs
    rows = extent.images * views
    asked = cache_store.read_topk(args.teacher_cache_topk, extent.num_classes)
    sizes = [
        f"{amount(rows * cache_store.row_bytes(keep, extent.num_classes))} with {keep}"
        for keep in dict.fromkeys((cache_store.ALL, asked, cache_store.HARD))
    ]
    return [f"cache: {', '.join(sizes)} (--teacher-cache-topk); {rows} answers, {views} views"]


def amount(size: float) -> str:
    """Return bytes in words, in the largest unit of which there is one."""
    units = ["bytes", "KiB", "MiB", "GiB", "TiB"]
    while size >= 1024 and len(units) > 1:
        size, units = size / 1024, units[1:]
    return f"{size:.1f} {units[0]}"


def duration(seconds: float) -> str:
    return clock(seconds) if seconds < 3 * DAY_S else f"{seconds / DAY_S:.1f} days"


def _build_memory(
    args: Namespace,
    student: Planned,
    teachers: Sequence[Planned],
    amp_dtype: torch.dtype | None,
) -> str:
    """Return in words what a process holds, about: weights and their company, and the batch."""
    moments = 1 if args.opt.lower() in ("sgd", "momentum", "nesterov", "lion") else 2
    copies = 1 + (args.model_ema and not args.model_ema_force_cpu)
    numbers = copies * student.size.parameters + (1 + moments) * student.size.trained
    weights = 4 * (numbers + sum(teacher.size.parameters for teacher in teachers))
    kept = student.size.kept_bytes * args.batch_size
    if amp_dtype is not None:
        kept //= 2
    return (
        f"about {amount(weights + kept)} a process: {amount(weights)} for weights, gradients, "
        f"optimizer, average and teacher, {amount(kept)} for the {args.batch_size} images of a "
        "micro-step"
    )


def _build_time(
    args: Namespace,
    student: Planned,
    teachers: Sequence[Planned],
    extent: Extent,
    processes: Processes,
    amp_dtype: torch.dtype | None,
) -> str:
    """Return in words how long the run takes, by a short probe of its networks."""
    device, batch = processes.device, args.batch_size
    if device.type == "cpu":
        flops = sum(planned.size.flops for planned in (student, *teachers))
        batch = max(1, min(batch, int(PROBE_FLOPS / flops)))
    alone = probe(student.make(), student.side, batch, device, amp_dtype, trains=True)
    asked = sum(
        probe(teacher.make(), teacher.side, batch, device, amp_dtype, trains=False)
        for teacher in teachers
    )
    epoch = (alone + asked) * extent.steps * args.batch_size
    cached = f" ({1 / alone:.1f} from a full cache of the teacher)" if asked else ""
    return (
        f"{1 / (alone + asked):.1f} images/s a process{cached} in a probe of {batch} random "
        f"images; an epoch {duration(epoch)}, {args.epochs} epochs "
        f"{duration(epoch * args.epochs)}, if the data keeps up, without evaluation"
    )


def probe(
    network: nn.Module,
    side: tuple[int, int],
    batch: int,
    device: torch.device,
    amp_dtype: torch.dtype | None,
    *,
    trains: bool,
    steps: int = 2,
) -> float:
    """Return the seconds an image takes: forward and backward, or forward alone.

    side: (height, width) of the images.
    """
    network = network.to(device).train(trains)
    models.fast.select_kernels(network, device.type, amp_dtype)
    images = torch.randn(batch, 3, *side, device=device)
    began = 0.0
    for step in range(steps + 1):
        if step == 1:  # the first one warms up
            _wait(device)
            began = time.perf_counter()
        with (
            torch.set_grad_enabled(trains),
            torch.autocast(device.type, dtype=amp_dtype, enabled=amp_dtype is not None),
        ):
            outputs = network(images)
        if trains:
            outputs = outputs if isinstance(outputs, tuple) else (outputs,)
            sum(F.softmax(output.float(), 1)[:, 0].sum() for output in outputs).backward()
    _wait(device)
    return (time.perf_counter() - began) / steps / batch


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
