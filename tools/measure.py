"""What a network costs on this machine: parameters, multiply-adds, size and speed.

cost = measure(network, (224, 224))
print(cost.describe())
"""

import copy
import logging
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

# Its import warns where there is a CUDA toolkit and no GPU.
logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)
from torch.utils.benchmark import Timer  # noqa: E402

CPU_BATCH, GPU_BATCH = 8, 128  # images in a batch, for the throughput


@dataclass(frozen=True)
class Cost:
    """The cost of a network in evaluation mode.

    gmacs: multiply-adds of one image in 10^9. size_mb: its parameters and buffers in 10^6 bytes.
    latency_ms: of one image. images_per_s: in batches of `batch`. device: where it was measured.
    """

    parameters: int
    gmacs: float
    size_mb: float
    latency_ms: float
    images_per_s: float
    batch: int
    device: str

    def describe(self) -> str:
        """Return all of it in one line."""
        return (
            f"{self.parameters / 1e6:.2f} M parameters, {self.gmacs:.3g} GMACs, "
            f"{self.size_mb:.1f} MB, {self.latency_ms:.2f} ms an image, "
            f"{self.images_per_s:.0f} images/s ({self.device})"
        )


def together(costs: Sequence[Cost]) -> Cost:
    """Return the cost of several networks that all get every image."""
    return Cost(
        parameters=sum(cost.parameters for cost in costs),
        gmacs=sum(cost.gmacs for cost in costs),
        size_mb=sum(cost.size_mb for cost in costs),
        latency_ms=sum(cost.latency_ms for cost in costs),
        images_per_s=1 / sum(1 / cost.images_per_s for cost in costs),
        batch=costs[0].batch,
        device=costs[0].device,
    )


@torch.no_grad()
def measure(network: nn.Module, size: Sequence[int], *, seconds: float = 0.3) -> Cost:
    """Return the cost of a network, measured on its own device with PyTorch's present threads.

    size: (height, width) of its images. seconds: that each of two speeds is measured for, at
    least; both are medians of torch.utils.benchmark.
    """
    network.eval()
    device = next(network.parameters()).device
    one = torch.zeros(1, 3, *size, device=device)
    on_meta = copy.deepcopy(network).to("meta")  # where no kernel escapes the counter
    with FlopCounterMode(display=False) as counter:
        on_meta(one.to("meta"))
    is_gpu, threads = device.type == "cuda", torch.get_num_threads()
    batch = GPU_BATCH if is_gpu else CPU_BATCH
    many = torch.zeros(batch, 3, *size, device=device)
    name = torch.cuda.get_device_name(device) if is_gpu else "CPU"
    return Cost(
        parameters=sum(p.numel() for p in network.parameters()),
        gmacs=counter.get_total_flops() / 2e9,
        size_mb=sum(t.nbytes for t in network.state_dict().values()) / 1e6,
        latency_ms=1e3 * _seconds(network, one, seconds),
        images_per_s=batch / _seconds(network, many, seconds),
        batch=batch,
        device=name if is_gpu else f"{name}, {threads} thread{'s' * (threads > 1)}",
    )


def _seconds(network: nn.Module, images: torch.Tensor, seconds: float) -> float:
    """Return the median time of a forward pass of `images`."""
    timer = Timer(
        "network(images)",
        globals={"network": network, "images": images},
        num_threads=torch.get_num_threads(),
    )
    return timer.blocked_autorange(min_run_time=seconds).median
