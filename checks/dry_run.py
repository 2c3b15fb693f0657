"""The plan of a run (--dry-run): its settings, networks, memory and time.

Shapes: B batch, C classes. Printed are multiply-adds (MACs), as in papers: DeiT-S has 4.6 G. FLOPs
in this file count a multiplication and an addition as two.
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
from base.flag_table import BY_DEST
from data.samplers import TrainSampler
from data.transforms import InputConfig
from distill import cache_store
from distill.teacher import build_sources, input_of
from training import optim
from training.metrics import clock
from training.trained_classes import build_trained_classes

# By --data-set: name, training images and classes. Used where the data is missing.
PUBLISHED_SIZES = {
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
    """Cost of a network: its parameters and how many of them train; for one image, FLOPs of the
    forward pass and bytes in float32 kept for the backward pass."""

    parameters: int
    trained: int
    flops: int
    kept_bytes: int

    def describe(self) -> str:
        return f"{self.parameters / 1e6:.2f} M parameters, {self.flops / 2e9:.2f} GMACs an image"


def network_size(make: Callable[[], nn.Module], height: int, width: int) -> Size:
    """Return the size of the network that `make` builds, on the meta device."""
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
class PlannedNetwork:
    """A network of the planned run. make: builds it. side: (height, width) of its images."""

    name: str
    make: Callable[[], nn.Module]
    side: tuple[int, int]
    size: Size


@dataclass(frozen=True)
class EpochSize:
    """Size of an epoch: micro-steps of one process, and images that all processes draw.

    what: the data in words.
    """

    steps: int
    images: int
    num_classes: int
    what: str


def build_plan(
    args: Namespace, processes: Processes, inputs: InputConfig, amp_dtype: torch.dtype | None
) -> list[str]:
    """Return the lines of --dry-run: what differs from the defaults, then data, sizes and time."""
    epoch_size = _build_epoch_size(args, processes, inputs)
    student = _build_planned_student(args, epoch_size.num_classes, inputs)
    teachers = _build_planned_teachers(args, epoch_size.num_classes)
    batch_plan = optim.build_batch_plan(args, epoch_size.steps, processes.world_size)
    return [
        *_build_changed_settings(args),
        f"data: {epoch_size.what}; {epoch_size.images} images an epoch",
        f"student: {student.name}, {student.size.describe()} of {inputs.describe()}",
        *(
            f"teacher: {teacher.name}, {teacher.size.describe()} of "
            f"{teacher.side[0]}x{teacher.side[1]}"
            for teacher in teachers
        ),
        *_build_cache(args, epoch_size),
        f"memory: {_build_memory(args, student, teachers, amp_dtype)}",
        f"time: {_build_time(args, student, teachers, epoch_size, processes, amp_dtype)}",
        f"recipe: {batch_plan.describe()}",
        *(f"WARNING: {line}" for line in optim.build_warnings(args, batch_plan.lr)),
        *(f"check: {line}" for line in optim.build_findings(args, batch_plan)),
    ]


def _build_changed_settings(args: Namespace) -> list[str]:
    """Return the settings that differ from the defaults of DeiT's flags, one a line."""
    changed = {
        key: list(value) if isinstance(value, tuple) else value
        for key, value in vars(args).items()
        if key not in BY_DEST or value != BY_DEST[key].default
    }
    lines = yaml.safe_dump(changed).splitlines() if changed else []
    return ["settings that differ from the defaults (--help-all):", *(f"  {x}" for x in lines)]


def _build_epoch_size(args: Namespace, processes: Processes, inputs: InputConfig) -> EpochSize:
    """Return the size of an epoch; the published one where the data is missing.

    Raises UserError for data that exists and cannot be used.
    """
    try:
        loaders = datasets.build_loaders(args, inputs, processes, build_trained_classes(args))
    except UserError as error:
        is_named_alone = not args.data_path and "/" in str(args.data_set)  # tfds/NAME
        if not is_named_alone and (not args.data_path or Path(args.data_path).exists()):
            raise
        return _build_published_size(args, processes, error.line())
    steps = len(loaders.train) if loaders.train is not None else 0
    sampler = loaders.train_sampler
    drawn = sampler.kept if sampler else steps * args.batch_size * processes.world_size
    return EpochSize(steps, drawn, loaders.num_classes, loaders.describe())


def _build_published_size(args: Namespace, processes: Processes, why: str) -> EpochSize:
    """Return the published size of the data set that was named.

    why: the reason why the data cannot be read.
    """
    name, images, classes = PUBLISHED_SIZES.get(str(args.data_set), PUBLISHED_SIZES["IMNET"])
    unknown = "" if args.data_set in PUBLISHED_SIZES else "of unknown size, "
    if args.inat_category != "name" and not args.nb_classes:
        unknown += "--nb-classes unknown, "
    classes = args.nb_classes or classes
    sampler = TrainSampler(
        images,
        num_replicas=processes.world_size,
        repeats=datasets.REPEATS if args.repeated_aug else 1,
    )
    what = f"missing, {unknown}{name}'s {images} images and {classes} classes assumed ({why})"
    return EpochSize(sampler.count // args.batch_size, sampler.kept, classes, what)


def _build_planned_student(
    args: Namespace, num_classes: int, inputs: InputConfig
) -> PlannedNetwork:
    """Return the student as the run builds it, without its initial weights."""

    def make(settings: Namespace = args) -> nn.Module:
        return models.build_student(settings, num_classes, inputs, with_weights=False)

    size = network_size(make, *inputs.input_size)
    if args.grad_checkpointing:  # the backward pass recomputes one block at a time
        plain = Namespace(**vars(args) | {"grad_checkpointing": False})
        whole = network_size(lambda: make(plain), *inputs.input_size)
        with torch.device("meta"):
            blocks = len(getattr(make().network, "blocks", ())) or 1
        size = replace(size, kept_bytes=size.kept_bytes + whole.kept_bytes // blocks)
    return PlannedNetwork(args.model, make, inputs.input_size, size)


def _build_planned_teachers(args: Namespace, num_classes: int) -> list[PlannedNetwork]:
    """Return the teachers of the run. Local files are read for their input size; nothing is
    downloaded."""
    found = []
    for source in build_sources(args):
        name, path = source.name, source.path
        side = input_of(name, path if Path(path).is_file() else "", source.side).input_size
        own = tuple(models.data_config(name)["input_size"][1:])
        make = partial(
            models.create_model,
            name,
            num_classes=num_classes if source.classifies else 0,
            img_size=None if side == own else side,
        )
        found.append(PlannedNetwork(name, make, side, network_size(make, *side)))
    return found


def _build_cache(args: Namespace, epoch_size: EpochSize) -> list[str]:
    """Return a line on the size of a cache of the teacher's logits."""
    if args.distillation_type == "none":
        return []
    views = args.teacher_cache_views or args.epochs
    rows = epoch_size.images * views
    topk = cache_store.read_topk(args.teacher_cache_topk, epoch_size.num_classes)
    sizes = [
        f"{amount(rows * cache_store.row_bytes(keep, epoch_size.num_classes))} with {keep}"
        for keep in dict.fromkeys((cache_store.ALL, topk, cache_store.HARD))
    ]
    return [f"cache: {', '.join(sizes)} (--teacher-cache-topk); {rows} rows, {views} views"]


def amount(size: float) -> str:
    """Return a number of bytes in the largest unit that gives at least 1."""
    units = ["bytes", "KiB", "MiB", "GiB", "TiB"]
    while size >= 1024 and len(units) > 1:
        size, units = size / 1024, units[1:]
    return f"{size:.1f} {units[0]}"


def duration(seconds: float) -> str:
    return clock(seconds) if seconds < 3 * DAY_S else f"{seconds / DAY_S:.1f} days"


def _build_memory(
    args: Namespace,
    student: PlannedNetwork,
    teachers: Sequence[PlannedNetwork],
    amp_dtype: torch.dtype | None,
) -> str:
    """Return in words the approximate memory of a process: weights, optimizer, and the batch."""
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
    student: PlannedNetwork,
    teachers: Sequence[PlannedNetwork],
    epoch_size: EpochSize,
    processes: Processes,
    amp_dtype: torch.dtype | None,
) -> str:
    """Return in words how long the run takes, by timing two steps of its networks."""
    device, batch = processes.device, args.batch_size
    if device.type == "cpu":
        flops = sum(planned.size.flops for planned in (student, *teachers))
        batch = max(1, min(batch, int(PROBE_FLOPS / flops)))
    alone = probe(student.make(), student.side, batch, device, amp_dtype, trains=True)
    teaching = sum(
        probe(teacher.make(), teacher.side, batch, device, amp_dtype, trains=False)
        for teacher in teachers
    )
    epoch = (alone + teaching) * epoch_size.steps * args.batch_size
    run = f"{args.epochs} epochs {duration(epoch * args.epochs)}"
    if args.minutes:
        run = f"about {max(1, round(60 * args.minutes / epoch))} in {args.minutes:g} minutes"
    cached = f" ({1 / alone:.1f} from a full cache of the teacher)" if teaching else ""
    return (
        f"{1 / (alone + teaching):.1f} images/s a process{cached} in a probe of {batch} random "
        f"images; an epoch {duration(epoch)}, {run}, if the data keeps up, "
        "without evaluation"
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
    """Return the seconds for one image: forward and backward, or forward alone.

    side: (height, width) of the images.
    """
    network = network.to(device).train(trains)
    models.select_kernels(network, device.type, amp_dtype)
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
