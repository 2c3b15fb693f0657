"""Augmentation on the device, held against Pillow and timm: by operation, by sample, by batch."""

import random
from collections.abc import Callable, Iterable
from functools import partial

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image, ImageFilter
from timm.data import auto_augment
from timm.data.auto_augment import LEVEL_TO_ARG, NAME_TO_OP
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from base.device import DeviceBatches
from base.distributed import Processes
from base.errors import UserError
from checks import visualize
from data import augment_program, device_augment, transforms
from data.augment_program import Tape
from data.byte_batches import ByteBatch, DeferNormalize, PendingImages, collate_bytes
from data.transforms import InputConfig, build_transform, posterize
from datasets import build_loaders
from options import get_args_parser
from tests.test_image_ops import scene

CPU, META = torch.device("cpu"), torch.device("meta")
CUDA = torch.device("cuda")
every_device = pytest.mark.parametrize("device", [CPU, pytest.param(CUDA, marks=pytest.mark.gpu)])
INPUTS = InputConfig((40, 56), mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225))
FILL = (124, 116, 104)
# Levels (of 10) that reach every argument: the middle, both ends, and what mstd makes of 9
LEVELS = (0.0, 4.7, 9.0, 10.0)
# Greatest and mean difference from Pillow in steps of 255, by operation; 0 and 0 where not named.
# Rounding in float32 moves single values of a warp by one.
WARP = (1, 4e-3)
TOLERANCE = {
    "Rotate": WARP,
    "ShearX": WARP,
    "ShearY": WARP,
    "TranslateX": WARP,
    "TranslateY": WARP,
    "TranslateXRel": WARP,
    "TranslateYRel": WARP,
}


def settings(*flags: str, name: str = "DIGITS"):
    return get_args_parser().parse_args(["--data-set", name, "--num-workers", "0", *flags])


@pytest.fixture(scope="module", params=["made", "real"])
def photographs(request: pytest.FixtureRequest) -> list[Image.Image]:
    if request.param == "made":
        flat = Image.new("RGB", (56, 40), (17, 200, 90))
        dark = Image.fromarray((np.asarray(scene(56, 40, 3)) // 4 + 30).astype(np.uint8))
        return [scene(56, 40), scene(56, 40, 1), flat, dark]
    folder = request.getfixturevalue("imagenet_sample") / "val"
    paths = sorted(folder.glob("*/*"))[::250]
    return [Image.open(path).convert("RGB").resize((112, 96)) for path in paths]


def batch_of(images: list[Image.Image]) -> Tensor:
    return torch.stack([torch.from_numpy(np.array(p)).permute(2, 0, 1) for p in images])


def carry_out(images: Tensor, tapes: list[Tape], device: torch.device = CPU) -> np.ndarray:
    """Return what the device makes of images by their tapes, (B, H, W, 3) in steps of 255."""
    length = max(1, *(len(tape.rows) for tape in tapes))
    rows = [tape.rows + [[0.0] * 8] * (length - len(tape.rows)) for tape in tapes]
    programs = torch.tensor(rows, dtype=torch.float64)
    found = device_augment.augment(images, programs, FILL, device)
    return found.cpu().int().permute(0, 2, 3, 1).numpy()


def compare(
    images: list[Image.Image],
    name: str,
    levels: tuple,
    device: torch.device,
    resample: Image.Resampling = Image.Resampling.BICUBIC,
) -> None:
    options = {"resample": resample, "fillcolor": FILL}
    base = name.removesuffix("Increasing").removesuffix("Original")
    exact = posterize if base == "Posterize" else NAME_TO_OP[name]
    tapes, theirs = [], []
    for image in images:
        tape = Tape(image.height, image.width)
        random.seed(3)
        augment_program._Operation(name)(tape, *levels, **options)
        random.seed(3)
        theirs.append(np.asarray(exact(image, *levels, **options)).astype(int))
        tapes.append(tape)
    greatest, mean = TOLERANCE.get(name, (0, 0))
    for one, other in zip(carry_out(batch_of(images), tapes, device), theirs):
        far = np.abs(one - other)
        assert far.max() <= greatest and far.mean() <= mean, (name, levels, far.max())


@every_device
@pytest.mark.parametrize("name", sorted(NAME_TO_OP))
def test_every_operation_of_timm_is_pillows_at_every_level(
    photographs: list[Image.Image], name: str, device: torch.device
) -> None:
    hparams = {"translate_const": 20, "translate_pct": 0.45}
    for level in LEVELS:
        for sign in (0.1, 0.9):  # which way timm's random negation goes
            arguments = LEVEL_TO_ARG[name]
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(auto_augment.random, "random", lambda sign=sign: sign)
                levels = tuple(arguments(level, hparams)) if arguments else ()
            compare(photographs, name, levels, device)


@pytest.mark.parametrize("name", ["Rotate", "ShearX", "TranslateYRel"])
def test_bilinear_warps_are_pillows_too(photographs: list[Image.Image], name: str) -> None:
    level = 17.0 if name == "Rotate" else 0.2137
    compare(photographs, name, (level,), CPU, Image.Resampling.BILINEAR)


@every_device
@pytest.mark.parametrize("radius", [0.1, 0.5, 1.3, 2.0, 3.0])
def test_blurs_are_pillows(
    photographs: list[Image.Image], radius: float, device: torch.device
) -> None:
    tapes = [Tape(p.height, p.width).add(augment_program.BLUR, radius) for p in photographs]
    ours = carry_out(batch_of(photographs), tapes, device)
    for one, image in zip(ours, photographs):
        theirs = np.asarray(image.filter(ImageFilter.GaussianBlur(radius))).astype(int)
        assert not np.abs(one - theirs).any()


# ---- whole transforms ----

TRANSFORMS: dict[str, list[str]] = {
    "DeiT": [],
    "no policy": ["--aa", "none", "--color-jitter", "0.4"],
    "AutoAugment": ["--aa", "original-mstd0.5"],
    "3-Augment": ["--ThreeAugment"],
    "simple crop": ["--ThreeAugment", "--src", "--color-jitter", "0"],
    "random interpolation": ["--train-interpolation", "random"],
    "coloured boxes": ["--reprob", "1", "--remode", "rand", "--recount", "3"],
    "black boxes": ["--reprob", "1", "--remode", "const"],
    "weighted": ["--aa", "rand-m9-n3-tweights-mstd0.5-inc1"],
}


def both(*flags: str) -> tuple[Callable, DeferNormalize]:
    args = settings(*flags)
    worker, other = (build_transform(True, args, INPUTS) for _ in range(2))
    return worker, DeferNormalize(other, augments=True)


def seeded(transform: Callable, image: Image.Image, seed: int):
    random.seed(seed), np.random.seed(seed), torch.manual_seed(seed)
    return transform(image)


def batch_for(deferred: DeferNormalize, image: Image.Image, seeds: Iterable[int]) -> ByteBatch:
    return collate_bytes([(seeded(deferred, image, seed), 0) for seed in seeds])


@pytest.mark.parametrize("case", TRANSFORMS)
def test_the_device_makes_the_sample_that_the_worker_would_make(case: str) -> None:
    worker, deferred = both(*TRANSFORMS[case])
    image, seeds = scene(90, 70), range(40)
    batch = batch_for(deferred, image, seeds)
    before = batch.images.clone()
    ours = deferred.finish(batch, CPU)
    assert ours.dtype == torch.float32 and ours.shape == (40, 3, 40, 56)
    assert batch.images.equal(before), "the caller's images are the caller's"
    std = torch.tensor(INPUTS.std).view(3, 1, 1)
    changed = 0
    for seed, one, crop in zip(seeds, ours, batch.images):
        far = (one - seeded(worker, image, seed)).abs() * std * 255
        # a step before a contrast or an equalization may become several
        assert far.mean() < 0.1 and (far > 2.5).float().mean() < 0.01, seed
        changed += not one.equal(transforms.Normalize(INPUTS.mean, INPUTS.std)(crop))
    assert changed > 10, "something was done at all"


@pytest.mark.parametrize("mode", ["pixel", "rand", "const"])
def test_erased_boxes_are_those_of_the_worker_bit_for_bit(mode: str) -> None:
    flags = ["--reprob", "1", "--remode", mode, "--recount", "3"]
    worker, deferred = both(*flags, "--aa", "none", "--color-jitter", "0")
    image, seeds = scene(90, 70), range(20)
    ours = deferred.finish(batch_for(deferred, image, seeds), CPU)
    assert ours.equal(torch.stack([seeded(worker, image, seed) for seed in seeds]))


@pytest.mark.parametrize("case", ["DeiT", "3-Augment"])
def test_no_sample_depends_on_its_neighbours(case: str) -> None:
    _, deferred = both(*TRANSFORMS[case])
    together = deferred.finish(batch_for(deferred, scene(90, 70), range(23)), CPU)
    order = torch.randperm(23, generator=torch.Generator().manual_seed(0))[:11]
    apart = deferred.finish(batch_for(deferred, scene(90, 70), order.tolist()), CPU)
    assert apart.equal(together[order])


class Traffic(TorchDispatchMode):
    """Counts the bytes that operators write, and what is copied to a device without data.

    Views write nothing. An operator in place writes its whole output.
    """

    copies = written = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        self.copies += function is torch.ops.aten._to_copy.default and (
            not args[0].is_meta and (kwargs or {}).get("device") == META
        )
        if not function.is_view:
            outputs = [x for x in tree_leaves(result) if isinstance(x, Tensor)]
            self.written += sum(x.numel() * x.element_size() for x in outputs)
        return result


@pytest.mark.parametrize(("case", "most"), [("DeiT", 2.5e9), ("3-Augment", 5.2e9)])
def test_a_batch_of_256_images_at_224_px_writes_few_bytes(case: str, most: float) -> None:
    """It was 12.2e9 and 17.3e9, with a temporary in int64 or float64 for every tap."""
    inputs = InputConfig((224, 224), INPUTS.mean, INPUTS.std)
    transform = build_transform(True, settings(*TRANSFORMS[case]), inputs)
    deferred = DeferNormalize(transform, augments=True)
    batch = batch_for(deferred, scene(256, 256), range(256))
    with Traffic() as traffic:
        assert deferred.finish(batch, META).shape == (256, 3, 224, 224)
    assert traffic.written < most


@pytest.mark.parametrize("case", TRANSFORMS)
def test_the_host_asks_the_device_for_nothing_and_sends_a_batch_in_four_copies(case: str) -> None:
    _, deferred = both(*TRANSFORMS[case])
    batch = batch_for(deferred, scene(90, 70), range(100))
    deferred.finish(batch, META)  # mean, std and fill go there once
    with Traffic() as traffic:
        found = deferred.finish(batch, META)  # has no numbers to be asked for
    assert found.is_meta and found.shape == batch.images.shape
    assert traffic.copies == 4, "images, erased values, numbers, and orders of the samples"


def test_a_batch_without_anything_to_do_is_only_normalised() -> None:
    _, deferred = both("--aa", "none", "--color-jitter", "0", "--reprob", "0")
    batch = batch_for(deferred, scene(90, 70), range(3))
    assert not batch.programs.any()
    exact = transforms.Normalize(INPUTS.mean, INPUTS.std)
    assert deferred.finish(batch, CPU).equal(torch.stack([*map(exact, batch.images)]))


@pytest.mark.gpu
def test_the_gpu_makes_what_the_cpu_makes() -> None:
    _, deferred = both("--reprob", "0.5")
    batch = batch_for(deferred, scene(90, 70), range(200))
    one, other = (deferred.finish(batch, device).cpu() for device in (CPU, CUDA))
    far = (one - other).abs() * 0.225 * 255
    assert far.mean() < 1e-2 and (far > 1.5).float().mean() < 1e-3


def test_what_only_workers_can_do_is_refused() -> None:
    with pytest.raises(UserError, match="--augment-on device: cannot do AugMix"):
        both("--aa", "augmix-m3-w3")


# ---- loaders ----


def load(*flags: str, rank: int = 0, world: int = 1):
    inputs = InputConfig((40, 40), INPUTS.mean, INPUTS.std)
    place = Processes(rank, rank, world, CPU, "single")
    return build_loaders(settings("--augment-on", "device", *flags), inputs, place)


def test_neither_workers_nor_processes_nor_a_resume_change_a_sample() -> None:
    flags = ["--reprob", "0.5"]
    data = load(*flags, "--batch-size", "12")
    data.set_epoch(1)
    alone = [batch for _, batch in zip(range(3), DeviceBatches(data.train, CPU))]
    assert alone[0][0].dtype == torch.float32 and alone[0][0].shape == (12, 3, 40, 40)
    workers = load(*flags, "--batch-size", "12", "--num-workers", "2")
    workers.set_epoch(1, 1)
    for (ours, label), (theirs, wanted) in zip(alone[1:], DeviceBatches(workers.train, CPU)):
        assert ours.equal(theirs) and label.equal(wanted)
    ranks = [load(*flags, "--batch-size", "6", rank=rank, world=2) for rank in (0, 1)]
    for rank in ranks:
        rank.set_epoch(1)
    for (ours, _), *parts in zip(alone, *(DeviceBatches(rank.train, CPU) for rank in ranks)):
        assert torch.stack([images for images, _ in parts], 1).flatten(0, 1).equal(ours)


def test_data_wait_does_not_include_the_augmentation_on_the_device() -> None:
    data = load("--batch-size", "4", "--num-workers", "0")
    data.set_epoch(0)
    images, _ = next(iter(data.train))
    assert isinstance(images, PendingImages), "what is waited for ends here"
    assert images.to(CPU).shape == (4, 3, 40, 40)


def test_tensorboard_shows_what_the_device_makes_of_the_batch() -> None:
    data = load("--batch-size", "4", "--num-workers", "0")
    data.set_epoch(0)
    images, labels = next(DeviceBatches(data.train, CPU))
    inputs = InputConfig((40, 40), INPUTS.mean, INPUTS.std)
    shown = visualize.train_batch(data.train, inputs, data.classes, CPU, count=4)
    captions = [[visualize.top_classes(row.float(), data.classes)] for row in F.one_hot(labels, 10)]
    assert shown.equal(visualize.grid(visualize.to_uint8(images, inputs), captions))


def test_evaluation_stays_as_it_is() -> None:
    (ours, _), (theirs, _) = (
        next(iter(make("--batch-size", "4").val))
        for make in (load, partial(load, "--augment-on", "worker"))
    )
    assert ours.equal(theirs)


@pytest.mark.slow
def test_a_run_augments_on_the_device_with_a_cached_teacher(run_inside, tmp_path) -> None:
    flags = [
        "--distillation-type",
        "hard",
        "--epochs",
        "1",
        "--batch-size",
        "256",
        "--num-workers",
        "0",
        "--teacher-cache",
        str(tmp_path / "cache"),
        "--no-teacher-check",
    ]
    written = run_inside(*flags, "--augment-on", "device", "--teacher-cache-mode", "write")
    assert written.returncode == 0, written.stderr
    found = run_inside(*flags, "--augment-on", "device", "--teacher-cache-mode", "verify")
    assert found.returncode == 0, found.stderr
    refused = run_inside(*flags, "--teacher-cache-mode", "read")
    assert refused.returncode == 2
    assert "augment_on was 'device' and is 'worker'" in refused.stderr
