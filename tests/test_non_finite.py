"""Bad updates: how they are counted, what they leave unchanged, and which batch is found."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from base.errors import UserError
from training.non_finite import (
    BadBatchFinder,
    BadUpdateCounter,
    NormStatistics,
    unchanged_buffers,
)

CPU = torch.device("cpu")
GOOD, BAD = torch.tensor(False), torch.tensor(True)


def test_bad_updates_are_counted_in_a_row_and_in_the_epoch() -> None:
    counter = BadUpdateCounter(CPU)
    for bad in (BAD, GOOD, BAD, BAD):
        assert bool(counter.end_update(bad)) is bool(bad)
    assert (counter.in_a_row, counter.in_epoch) == (2, 3)
    counter.start_epoch()
    assert (counter.in_a_row, counter.in_epoch) == (2, 0)


def test_one_bad_loss_of_several_micro_steps_makes_the_update_bad() -> None:
    counter = BadUpdateCounter(CPU)
    counter.add_loss(torch.tensor(float("inf")))
    counter.add_loss(torch.tensor(1.0))
    assert counter.end_update(GOOD)
    counter.add_loss(torch.tensor(1.0))
    assert not counter.end_update(GOOD), "the next update starts anew"


def test_statistics_return_to_those_of_the_last_good_update() -> None:
    norm = nn.BatchNorm1d(3)
    statistics = NormStatistics(norm)
    norm(torch.randn(5, 3))
    statistics.end_update(GOOD)
    good = {name: value.clone() for name, value in norm.state_dict().items()}
    norm(torch.full((5, 3), torch.nan))
    statistics.end_update(BAD)
    assert all(torch.equal(value, good[name]) for name, value in norm.state_dict().items())
    with unchanged_buffers(norm):
        norm(torch.randn(5, 3))
    assert all(torch.equal(value, good[name]) for name, value in norm.state_dict().items())


def finder(limit: int, saved: list[dict[str, Any]]) -> tuple[BadUpdateCounter, BadBatchFinder]:
    """Return a finder whose batches are losses; a batch is replayed as loss times weight."""
    network = nn.Linear(1, 1)

    def replay(loss: Tensor, step: int) -> tuple[Tensor, dict[str, Any]]:
        return loss * network.weight.sum(), {"micro_step": step}

    def save(batch: dict[str, Any]) -> str:
        saved.append(batch)
        return "bad_batch.pth"

    counter = BadUpdateCounter(CPU)
    return counter, BadBatchFinder(counter, network, limit, replay=replay, save=save)


def run_updates(limit: int, updates: list[tuple[float, float]], saved: list) -> None:
    """Run updates of two micro-steps each, given by their losses."""
    counter, found = finder(limit, saved)
    for update, losses in enumerate(updates):
        for step, value in enumerate(losses, start=2 * update):
            loss = torch.tensor(value)
            counter.add_loss(loss)
            found.add({"loss": loss}, loss, step, is_last=step % 2 == 1)
        counter.end_update(GOOD)
        where = {"epoch": 0, "update": update, "updates_per_epoch": len(updates)}
        found.end_update(where, look=True)


NAN = float("nan")


@pytest.mark.parametrize(
    ("limit", "updates", "step"),
    [
        (1, [(NAN, 1.0)], 0),
        (2, [(1.0, 1.0), (NAN, 1.0), (NAN, 1.0)], 4),
        (2, [(1.0, 1.0), (NAN, 1.0), (1.0, NAN)], 5),
        (2, [(NAN, 1.0), (1.0, NAN), (1.0, 1.0)], 3),
    ],
)
def test_the_bad_micro_step_of_the_last_update_is_found_and_saved(limit, updates, step) -> None:
    saved: list[dict[str, Any]] = []
    words = f"{limit} updates in a row.*step {step}, process 0: loss nan; the batch is in bad_batch"
    with pytest.raises(UserError, match=words):
        run_updates(limit, updates, saved)
    assert [batch["micro_step"] for batch in saved] == [step]
    assert saved[0]["update"] == step // 2 and saved[0]["rank"] == 0


def test_fewer_bad_updates_than_the_limit_end_nothing() -> None:
    saved: list[dict[str, Any]] = []
    run_updates(3, [(NAN, 1.0), (1.0, NAN), (1.0, 1.0), (NAN, 1.0), (NAN, NAN)], saved)
    assert not saved
