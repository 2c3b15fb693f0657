"""One update: which micro-steps belong to it, the learning rate before it, the average after it."""

import pytest
import torch
from torch import nn

from training.non_finite import BadUpdateCounter
from training.step_config import StepConfig
from training.updater import Updater

CPU = torch.device("cpu")


def updater(micro_steps: int, **settings: object) -> Updater:
    model = nn.Linear(1, 1, bias=False)
    nn.init.ones_(model.weight)
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    counter = BadUpdateCounter(CPU)
    return Updater(
        model, optimizer, StepConfig(**settings), counter, epoch=2, micro_steps=micro_steps
    )


def test_the_last_update_of_an_epoch_may_have_fewer_micro_steps() -> None:
    one = updater(5, accum_steps=2)
    steps = range(5)
    assert one.updates == 3
    assert [one.index(step) for step in steps] == [0, 0, 1, 1, 2]
    assert [one.global_index(step) for step in steps] == [6, 6, 7, 7, 8]
    assert [one.size(step) for step in steps] == [2, 2, 2, 2, 1]
    assert [one.completes(step) for step in steps] == [False, True, False, True, True]


def test_gradients_of_micro_steps_are_averaged_and_clipped_together() -> None:
    one = updater(2, accum_steps=2, max_norm=0.5)
    for step, slope in enumerate((1.0, 5.0)):
        with one.micro_step(step):
            one.backward(slope * one.model.weight.sum(), step)
    assert one.step(1) == pytest.approx(3.0), "the norm before clipping: (1 + 5) / 2"
    assert one.model.weight.item() == pytest.approx(0.5)
    assert one.model.weight.grad is None


def test_the_schedule_runs_before_and_the_average_after_every_update() -> None:
    calls: list[tuple] = []

    class Schedule:
        def step(self, global_step: int, epoch: int) -> None:
            calls.append(("schedule", global_step, epoch))

    one = updater(
        3, accum_steps=2, schedule=Schedule(), update_ema=lambda n: calls.append(("average", n))
    )
    for step in range(3):
        with one.micro_step(step):
            one.backward(one.model.weight.sum(), step)
        if one.completes(step):
            one.step(step)
    assert calls == [("schedule", 4, 2), ("average", 4), ("schedule", 5, 2), ("average", 5)]


@pytest.mark.parametrize("scale", [None, 1.0])
def test_a_non_finite_loss_changes_no_weight(scale: float | None) -> None:
    scaler = torch.amp.GradScaler("cpu", init_scale=scale) if scale else None
    one = updater(1, loss_scaler=scaler)
    with one.micro_step(0):
        one.backward(one.model.weight.sum() * float("inf"), 0)
    one.step(0)
    assert one.model.weight.item() == 1 and one.counter.in_epoch == 1
