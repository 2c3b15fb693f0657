"""Orders, shares and seeds: each a function of names, never of history."""

import random
from collections import Counter

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader, Dataset

from base.errors import UserError
from data.samplers import EvalSampler, SeededViews, TrainSampler, derive_seed


def keys_of(sampler: TrainSampler, epoch: int = 0) -> list[tuple[int, int]]:
    sampler.set_epoch(epoch)
    return list(sampler)


class Draws(Dataset):
    """Five images; each is the next number of every generator, and its own index."""

    def __len__(self) -> int:
        return 5

    def __getitem__(self, index: int) -> torch.Tensor:
        return torch.tensor(
            [random.random(), np.random.rand(), torch.rand(()).item(), index], dtype=torch.float64
        )


def state() -> tuple:
    return random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()


def test_a_derived_seed_depends_on_every_part_its_type_and_its_place() -> None:
    parts = [(), (0,), ("0",), (0, 1), (1, 0), ("ab", "c"), ("a", "bc"), ("a|i0",), ("a", 0), (-1,)]
    seeds = {derive_seed(*part) for part in parts}
    assert len(seeds) == len(parts)
    assert all(0 <= seed < 2**63 for seed in seeds)


def test_a_derived_seed_is_the_same_in_every_process_and_version() -> None:
    assert derive_seed(0, "order", 3) == derive_seed(np.int64(0), "order", torch.tensor(3))
    assert derive_seed(0, "order", 0) == 3119809112360274423, "old runs could not be resumed"


def test_a_seed_is_made_of_whole_numbers_and_words_only() -> None:
    with pytest.raises(TypeError):
        derive_seed(0.5)


def test_an_epoch_shows_every_image_once_in_an_order_of_its_own() -> None:
    sampler = TrainSampler(13, seed=1)
    first, second = keys_of(sampler, 0), keys_of(sampler, 1)
    assert sorted(first) == [(i, 0) for i in range(13)]
    assert sorted(second) == [(i, 1) for i in range(13)]
    assert [i for i, _ in first] != [i for i, _ in second] != list(range(13))
    assert keys_of(TrainSampler(13, seed=1), 1) == second, "history plays no part"
    assert keys_of(TrainSampler(13, seed=2), 1) != second, "the seed does"


def test_without_shuffling_the_images_come_in_order() -> None:
    assert keys_of(TrainSampler(4, shuffle=False), 2) == [(0, 2), (1, 2), (2, 2), (3, 2)]


@pytest.mark.parametrize("repeats", [1, 3])
@pytest.mark.parametrize(("length", "world"), [(61, 2), (61, 3), (600, 4)])
def test_the_ranks_batches_are_together_the_batch_of_one_process(
    repeats: int, length: int, world: int
) -> None:
    batch = 5
    options = dict(seed=7, repeats=repeats)
    alone = keys_of(TrainSampler(length, **options), 2)
    ranks = [
        keys_of(TrainSampler(length, num_replicas=world, rank=rank, **options), 2)
        for rank in range(world)
    ]
    assert len({len(keys) for keys in ranks}) == 1
    for k in range(len(ranks[0]) // batch):
        together = [key for keys in ranks for key in keys[k * batch : (k + 1) * batch]]
        assert sorted(together) == sorted(alone[k * batch * world : (k + 1) * batch * world])


@pytest.mark.parametrize(
    ("length", "world", "count"),
    [
        (1_281_167, 8, 160_128),
        (1000, 8, 96),
        (256, 1, 256),
        (511, 2, 128),
        (255, 2, 127),
        (5, 5, 1),
    ],
)
def test_repeated_augmentation_rounds_as_deit_and_keeps_small_sets(
    length: int, world: int, count: int
) -> None:
    assert len(TrainSampler(length, num_replicas=world, repeats=3)) == count


def test_repeated_augmentation_gives_three_views_of_a_third_of_the_images() -> None:
    keys = keys_of(TrainSampler(300, repeats=3, seed=3), epoch=4)
    assert len(keys) == 256
    views = Counter(index for index, _ in keys)
    assert len(views) == 86
    assert sorted(views.values()) == [1] + [3] * 85
    assert {view for _, view in keys} == {12, 13, 14}
    assert len(set(keys)) == 256, "no view comes twice"
    assert len({index for index, _ in keys[:3]}) == 1, "the copies follow each other"


def test_no_view_of_a_image_returns_in_a_later_epoch() -> None:
    sampler = TrainSampler(20, repeats=3)
    assert not set(keys_of(sampler, 0)) & set(keys_of(sampler, 1))


@pytest.mark.parametrize("repeats", [1, 3])
def test_a_resumed_epoch_goes_on_with_the_sample_it_stopped_at(repeats: int) -> None:
    options = dict(num_replicas=2, rank=1, seed=5, repeats=repeats)
    whole = keys_of(TrainSampler(41, **options), 3)
    resumed = TrainSampler(41, **options)
    resumed.set_epoch(3)
    resumed.set_start(8)
    assert list(resumed) == whole[8:]
    assert len(resumed) == len(whole) == 20, "the length of an epoch does not change"
    resumed.set_epoch(4)
    assert list(resumed) == keys_of(TrainSampler(41, **options), 4), "the next one is whole"


def test_a_start_beyond_the_epoch_is_refused() -> None:
    sampler = TrainSampler(4)
    sampler.set_start(4)
    assert list(sampler) == []
    with pytest.raises(ValueError, match="4 samples"):
        sampler.set_start(5)


def test_fewer_images_than_processes_are_refused_in_one_line() -> None:
    with pytest.raises(UserError, match="2 train images are too few for 3 processes"):
        TrainSampler(2, num_replicas=3)
    with pytest.raises(UserError, match="0 train images"):
        TrainSampler(0)


@pytest.mark.parametrize("sampler", [TrainSampler, EvalSampler])
def test_a_rank_outside_the_world_is_refused(sampler: type) -> None:
    with pytest.raises(ValueError, match="rank 2 of 2"):
        sampler(10, num_replicas=2, rank=2)


@pytest.mark.parametrize(("length", "world"), [(7, 3), (6, 3), (2, 4), (0, 2)])
def test_evaluation_counts_every_image_exactly_once(length: int, world: int) -> None:
    shares = [EvalSampler(length, world, rank) for rank in range(world)]
    together = [key for share in shares for key in share]
    assert sorted(together) == [(i, 0) for i in range(length)]
    sizes = [len(share) for share in shares]
    assert sizes == [len(list(share)) for share in shares]
    assert max(sizes) - min(sizes) <= 1


def test_a_view_depends_on_seed_view_and_index_and_not_on_history() -> None:
    views = SeededViews(Draws(), seed=3)
    before = views[2, 1]
    _ = views[4, 0], random.random(), torch.rand(9), np.random.rand(5)
    assert views[2, 1].equal(before)
    others = [views[2, 2], views[3, 1], SeededViews(Draws(), seed=4)[2, 1]]
    for other in others:
        assert (other[:3] != before[:3]).all(), "each of the three generators is seeded"


def test_the_main_process_generators_are_as_if_nothing_had_been_loaded() -> None:
    before = state()
    _ = SeededViews(Draws(), seed=3)[0, 0]
    assert state() == before


def test_the_generators_are_restored_also_after_a_failure() -> None:
    class Broken(Draws):
        def __getitem__(self, index: int) -> torch.Tensor:
            raise UserError(f"nothing at {index}")

    before = state()
    with pytest.raises(UserError, match="nothing at 1"):
        SeededViews(Broken(), seed=3)[1, 0]
    assert state() == before


def test_two_workers_load_what_no_worker_loads() -> None:
    views, sampler = SeededViews(Draws(), seed=3), TrainSampler(5, seed=1)
    assert len(views) == 5
    one, two = (
        torch.cat(list(DataLoader(views, 2, sampler=sampler, num_workers=workers)))
        for workers in (0, 2)
    )
    assert one.equal(two)
