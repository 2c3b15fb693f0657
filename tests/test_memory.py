"""What a training step keeps in memory until its update."""

import weakref

import torch
from torch import Tensor, nn

import engine
from losses import DistillationLoss
from training.step_config import StepConfig

CPU = torch.device("cpu")


class Batches:
    """A loader that counts how many of its batches are alive when it makes the next one."""

    def __init__(self, count: int) -> None:
        self.count, self.alive, self.most = count, weakref.WeakSet(), 0

    def __len__(self) -> int:
        return self.count

    def __iter__(self):
        for _ in range(self.count):
            images = torch.randn(3, 3, 2, 2)
            self.alive.add(images)
            self.most = max(self.most, len(self.alive))
            yield images, torch.arange(3)
            del images


class OneHead(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(12, 4)

    def forward(self, images: Tensor) -> Tensor:
        return self.layer(images.flatten(1))


def test_accumulation_does_not_hold_the_micro_batches_of_an_update() -> None:
    features, most = weakref.WeakSet(), 0

    def teacher(images: Tensor, key: object) -> Tensor:
        nonlocal most
        logits = images.flatten(1)[:, :4].clone()
        features.add(logits)
        most = max(most, len(features))
        return logits

    model, loader = OneHead(), Batches(8)
    engine.train_one_epoch(
        model,
        DistillationLoss(nn.CrossEntropyLoss(), None, "soft", 0.5, 1.0, head="cls"),
        loader,
        torch.optim.SGD(model.parameters(), lr=0.1),
        CPU,
        0,
        teacher=teacher,
        config=StepConfig(accum_steps=4),
    )
    assert loader.most <= 2, "the batch that is used, and the next one"
    assert most == 1, "the teacher's outputs are freed before those of the next batch"
