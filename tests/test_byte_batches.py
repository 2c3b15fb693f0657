"""Batches that cross to a GPU as bytes: the same pixels, in a quarter of the bytes."""

import numpy as np
import pytest
import torch
from PIL import Image

from base.distributed import Processes
from checks import diagnose
from data.byte_batches import DeferNormalize, PendingImages, collate_bytes
from data.loaders import ImageLoader
from data.samplers import SeededViews
from data.transforms import InputConfig, build_transform
from datasets import build_dataset, build_loaders
from options import get_args_parser

INPUTS = InputConfig((40, 40), mean=(0.4, 0.5, 0.6), std=(0.2, 0.25, 0.3))
CPU = torch.device("cpu")
CASES = {
    "DeiT": ["--reprob", "1"],
    "several boxes": ["--reprob", "0.7", "--recount", "3"],
    "one colour each": ["--reprob", "1", "--remode", "rand"],
    "black boxes": ["--reprob", "1", "--remode", "const"],
    "no erasing": ["--reprob", "0"],
    "AugMix": ["--aa", "augmix-m3-w3"],
    "3-Augment": ["--ThreeAugment"],
}


def settings(*flags: str):
    return get_args_parser().parse_args(["--data-set", "DIGITS", "--num-workers", "0", *flags])


@pytest.mark.parametrize("case", CASES)
def test_the_pixels_are_those_of_the_workers_bit_for_bit(case: str) -> None:
    args = settings(*CASES[case])
    data, _ = build_dataset(True, args, INPUTS)
    keys = [(number, number % 3) for number in range(12)]
    wanted = torch.stack([SeededViews(data, 5)[key][0] for key in keys])
    data.transform = deferred = DeferNormalize(build_transform(True, args, INPUTS, hflip=0))
    batch = collate_bytes([SeededViews(data, 5)[key] for key in keys])
    assert batch.images.dtype == torch.uint8
    found = deferred.finish(batch, CPU)
    assert found.equal(wanted)
    assert batch.labels.tolist() == [data.source.load(index)[1] for index, _ in keys]


def test_deits_recipe_crosses_in_a_third_of_the_bytes_at_most() -> None:
    args = settings()
    transform = DeferNormalize(build_transform(True, args, INPUTS))
    image = Image.fromarray(np.full((64, 64, 3), 99, np.uint8))
    batch = collate_bytes([(transform(image), 0) for _ in range(256)])
    bytes_now = sum(part.numel() * part.element_size() for part in batch)
    assert bytes_now < 4 * batch.images.numel() / 3


@pytest.mark.parametrize("workers", ["0", "2"])
def test_a_loader_of_bytes_gives_the_batches_of_the_plain_one(workers, monkeypatch) -> None:
    args = settings("--batch-size", "8", "--reprob", "1")
    args.num_workers = int(workers)
    place = Processes(0, 0, 1, CPU, "single")
    plain = build_loaders(args, INPUTS, place).train
    data, _ = build_dataset(True, args, INPUTS)
    sampler = build_loaders(args, INPUTS, place).train_sampler
    data.transform = deferred = DeferNormalize(data.transform)
    loader = ImageLoader(
        SeededViews(data, args.seed),
        deferred=deferred,
        sampler=sampler,
        batch_size=8,
        num_workers=args.num_workers,
    )
    for (ours, label), (theirs, wanted), _ in zip(loader, plain, range(3)):
        assert ours.to(CPU).equal(theirs) and label.tolist() == wanted.tolist()


def test_on_a_gpu_training_and_evaluation_use_bytes() -> None:
    cuda, cpu = (Processes(0, 0, 1, torch.device(name), "single") for name in ("cuda", "cpu"))
    args = settings("--batch-size", "8", "--no-pin-mem")
    loaders, plain = (build_loaders(args, INPUTS, place) for place in (cuda, cpu))
    for mine, theirs in ((loaders.train, plain.train), (loaders.val, plain.val)):
        (images, labels), (wanted, wanted_labels) = next(iter(mine)), next(iter(theirs))
        assert isinstance(images, PendingImages) and images.batch.images.dtype == torch.uint8
        assert images.to(CPU).equal(wanted) and labels.equal(wanted_labels)
    sample, exact = (diagnose.sample(each.val, 5) for each in (loaders, plain))
    assert sample[0].equal(exact[0]) and sample[1].equal(exact[1])


def test_an_unreadable_image_is_left_out_of_a_batch_of_bytes() -> None:
    deferred = DeferNormalize(build_transform(False, settings(), INPUTS))
    image = deferred(Image.fromarray(np.full((64, 64, 3), 99, np.uint8)))
    assert collate_bytes([None, (image, 3), None]).labels.tolist() == [3]
    data = [(image, 3), None, None, None, (image, 5)]
    loader = ImageLoader(data, deferred=deferred, batch_size=2)
    assert [labels.tolist() for _, labels in loader] == [[3], [5]]
    assert loader.load([1, 2]) is None and loader.load([1, 4])[1].tolist() == [5]
    assert [labels.tolist() for _, labels in loader.subset([4, 0])] == [[5, 3]]


@pytest.mark.gpu
def test_the_gpu_normalises_as_the_cpu_does() -> None:
    args = settings("--reprob", "1")
    data, _ = build_dataset(True, args, INPUTS)
    data.transform = deferred = DeferNormalize(data.transform)
    batch = collate_bytes([SeededViews(data, 5)[number, 0] for number in range(12)])
    there = deferred.finish(batch, torch.device("cuda")).cpu()
    torch.testing.assert_close(there, deferred.finish(batch, CPU))
