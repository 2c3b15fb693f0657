"""Batches that cross to a GPU as bytes: the same pixels, in a quarter of the bytes."""

import numpy as np
import pytest
import torch
from PIL import Image

import datasets
from base.distributed import Processes
from data import byte_batches
from data.byte_batches import ByteLoader, DeferNormalize, collate_bytes, finish
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
    found = finish(batch, deferred.mean, deferred.std, CPU)
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
    loader = ByteLoader(
        SeededViews(data, args.seed),
        deferred=deferred,
        device=CPU,
        sampler=sampler,
        batch_size=8,
        num_workers=args.num_workers,
    )
    for (ours, label), (theirs, wanted), _ in zip(loader, plain, range(3)):
        assert ours.equal(theirs) and label.tolist() == wanted.tolist()


def test_on_a_gpu_training_uses_bytes_and_evaluation_floats(monkeypatch) -> None:
    kinds = []
    monkeypatch.setattr(
        byte_batches, "ByteLoader", lambda *_, **options: kinds.append(options) or [0]
    )
    cuda = Processes(0, 0, 1, torch.device("cuda"), "single")
    loaders = build_loaders(settings("--batch-size", "8", "--no-pin-mem"), INPUTS, cuda)
    assert len(kinds) == 1 and isinstance(kinds[0]["deferred"], DeferNormalize)
    assert isinstance(loaders.val, datasets.EvalLoader)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_the_gpu_normalises_as_the_cpu_does() -> None:
    args = settings("--reprob", "1")
    data, _ = build_dataset(True, args, INPUTS)
    data.transform = deferred = DeferNormalize(data.transform)
    batch = collate_bytes([SeededViews(data, 5)[number, 0] for number in range(12)])
    device = torch.device("cuda")
    there = finish(batch, deferred.mean.to(device), deferred.std.to(device), device).cpu()
    torch.testing.assert_close(there, finish(batch, deferred.mean, deferred.std, CPU))
