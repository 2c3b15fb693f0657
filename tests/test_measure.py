"""What a network costs: counted by hand, and timed by torch.utils.benchmark."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn

import models
from tools import measure


@pytest.fixture
def timed(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    """Replace the clock: a forward pass takes a second an image. Returns what was timed."""
    shapes = []

    class Timer:
        def __init__(self, statement: str, *, globals: dict, num_threads: int) -> None:
            assert num_threads == torch.get_num_threads(), "the benchmark's default is one"
            self.shape = tuple(globals["images"].shape)
            eval(statement, globals)

        def blocked_autorange(self, min_run_time: float) -> SimpleNamespace:
            shapes.append(self.shape)
            return SimpleNamespace(median=float(self.shape[0]))

    monkeypatch.setattr(measure, "Timer", Timer)
    return shapes


def test_cost_by_hand(timed) -> None:
    network = nn.Sequential(nn.Flatten(), nn.Linear(3 * 4 * 5, 7), nn.BatchNorm1d(7))
    cost = measure.measure(network, (4, 5))
    assert timed == [(1, 3, 4, 5), (8, 3, 4, 5)]
    assert cost.parameters == 60 * 7 + 7 + 14 and cost.gmacs == pytest.approx(60 * 7 / 1e9)
    assert cost.size_mb == (4 * (60 * 7 + 7 + 28) + 8) / 1e6, "buffers too"
    assert (cost.latency_ms, cost.images_per_s, cost.batch) == (1000, 1, 8)
    assert cost.device == "CPU, 1 thread"
    assert cost.describe().endswith("1000.00 ms an image, 1 images/s (CPU, 1 thread)")


def test_no_kernel_of_a_cpu_is_left_out_of_the_multiply_adds(timed) -> None:
    network = models.create_model("deit_tiny_patch16_224", num_classes=10).eval()
    models.fast.use_onednn(network)
    assert measure.measure(network, (224, 224)).gmacs == pytest.approx(1.25, abs=0.02)


def test_a_network_is_really_timed() -> None:
    cost = measure.measure(nn.Sequential(nn.Flatten(), nn.Linear(48, 7)), (4, 4), seconds=0.01)
    assert 0 < cost.latency_ms < 1000 and cost.images_per_s > 1
