"""The order of the samples, and the seed of each.

A sampler yields keys `(index, view)`. `SeededViews` seeds all generators from (seed, view, index)
before it loads a sample. So the pixels do not depend on the number of workers or on a resume.
"""

import hashlib
import operator
import random
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset, Sampler, get_worker_info

from base.errors import UserError

Key = tuple[int, int]
ROUNDING = 256  # DeiT keeps a multiple of this many samples in an epoch of repeated augmentation


class BatchKey(NamedTuple):
    """Which batch of a run: `epoch` (in the cycle, where views repeat) and `micro_step`, from 0.

    Mixing and cached teacher logits are functions of it.
    """

    epoch: int
    micro_step: int


def derive_seed(*parts: int | str) -> int:
    """Return a seed in [0, 2**63) that depends on every part, its type and its position."""
    words = [
        f"s{len(part)}:{part}" if isinstance(part, str) else f"i{operator.index(part)}"
        for part in parts
    ]
    digest = hashlib.blake2b("|".join(words).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1


class TrainSampler(Sampler[Key]):
    """One process's share of a shuffled epoch, with `repeats` views of every image drawn.

    Process r takes the samples r, r + num_replicas, ... of one common order. So the k-th batches of
    B of all processes are together the k-th batch of num_replicas * B of a single process.

    An epoch has about `length` samples. With repeats=1 each image comes once, and the
    `length % num_replicas` last of the order are left out. With repeats=3 (DeiT) the order is a
    permutation in which each image comes three times in a row. The first `length // 256 * 256`
    samples are kept, about a third of the images. Below 256 images the first `length` are kept,
    because the rounding would leave nothing.
    Raises UserError if not every process gets a sample.
    Source: RASampler of DeiT; differs in that the order depends on `seed` and works in one process.
    """

    def __init__(
        self,
        length: int,
        *,
        num_replicas: int = 1,
        rank: int = 0,
        seed: int = 0,
        repeats: int = 1,
        shuffle: bool = True,
    ) -> None:
        _check_place(num_replicas, rank)
        if repeats < 1:
            raise UserError(f"{repeats} repeats of an image: must be at least 1")
        kept = length // ROUNDING * ROUNDING if repeats > 1 and length >= ROUNDING else length
        self.kept = kept  # in an epoch, before it is shared
        self.count = kept // num_replicas
        if self.count < 1:
            raise UserError(
                f"{length} train images are too few for {num_replicas} processes; "
                "start fewer processes or add images"
            )
        self.length, self.num_replicas, self.rank = length, num_replicas, rank
        self.seed, self.repeats, self.shuffle = seed, repeats, shuffle
        self.epoch = self.start = 0

    def set_epoch(self, epoch: int) -> None:
        """Choose the order of `epoch`, from its first sample on."""
        self.epoch, self.start = epoch, 0

    def set_start(self, start: int) -> None:
        """Skip the first `start` samples of this process, until the next `set_epoch`."""
        if not 0 <= start <= self.count:
            raise ValueError(f"start {start}: this process has {self.count} samples in an epoch")
        self.start = start

    def __len__(self) -> int:
        """Return the samples of this process in a whole epoch, without regard to `set_start`."""
        return self.count

    def __iter__(self) -> Iterator[Key]:
        order = self._order(self.epoch)
        places = torch.arange(self.rank, self.count * self.num_replicas, self.num_replicas)
        places = places[self.start :]
        indices = order[places // self.repeats].tolist()
        views = (self.epoch * self.repeats + places % self.repeats).tolist()
        yield from zip(indices, views)

    def _order(self, epoch: int) -> Tensor:
        if not self.shuffle:
            return torch.arange(self.length)
        generator = torch.Generator().manual_seed(derive_seed(self.seed, "order", epoch))
        return torch.randperm(self.length, generator=generator)

    def count_below(self, index: int, epoch: int, span: int) -> Tensor:
        """Return how many samples of all processes have an index below `index`.

        The counts are those of each `span` samples in a row of the common order, (spans,).
        """
        places = torch.arange(self.count * self.num_replicas)
        is_below = self._order(epoch)[places // self.repeats] < index
        padded = torch.nn.functional.pad(is_below.long(), (0, -len(is_below) % span))
        return padded.view(-1, span).sum(1)


class EvalSampler(Sampler[Key]):
    """One process's share of all images in order, without padding or duplicates.

    Shares may differ by one image and may be empty. The view of every key is 0.
    """

    def __init__(self, length: int, num_replicas: int = 1, rank: int = 0) -> None:
        _check_place(num_replicas, rank)
        self.indices = range(rank, length, num_replicas)

    def __len__(self) -> int:
        return len(self.indices)

    def __iter__(self) -> Iterator[Key]:
        return ((index, 0) for index in self.indices)


def _check_place(num_replicas: int, rank: int) -> None:
    if not 0 <= rank < num_replicas:
        raise ValueError(f"rank {rank} of {num_replicas} processes: must be in [0, {num_replicas})")


class SeededViews(Dataset):
    """`dataset` by key `(index, view)`; its random numbers depend on (seed, view, index) alone.

    The CPU generators of Python, NumPy and torch are seeded. In the main process (no workers) their
    state is restored afterwards. The generators of a GPU are not used.
    """

    def __init__(self, dataset: Dataset, seed: int) -> None:
        self.dataset, self.seed = dataset, seed

    def __len__(self) -> int:
        return len(self.dataset)  # type: ignore[arg-type]

    def __getitem__(self, key: Key) -> Any:
        index, view = key
        seed = derive_seed(self.seed, "view", view, index)
        if get_worker_info() is not None:
            seed_cpu(seed)
            return self.dataset[index]
        before = random.getstate(), np.random.get_state(), torch.get_rng_state()
        try:
            seed_cpu(seed)
            return self.dataset[index]
        finally:
            random.setstate(before[0])
            np.random.set_state(before[1])
            torch.set_rng_state(before[2])


def seed_cpu(seed: int) -> None:
    """Seed Python's, NumPy's and torch's CPU generators."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.default_generator.manual_seed(seed)  # torch.manual_seed would reseed the GPUs too
