"""The device of this process: copies to it, its random generator, its precision."""

import contextlib
import random
from collections.abc import Iterable, Iterator

import numpy as np
import torch
from torch import Tensor


def to_device(values: Tensor, device: torch.device, *, pin: bool = False) -> Tensor:
    """Return `values` on `device`. The host does not wait if they are in pinned memory.

    pin: copy them to pinned memory first, for tensors that no loader has pinned.
    """
    if pin and device.type == "cuda" and values.device.type == "cpu":
        values = values.pin_memory()
    return values.to(device, non_blocking=True)


class DeviceBatches:
    """Iterates over the batches (images, labels, ...) of a loader, with the first two on `device`.

    `fetch_ahead` starts the copy of the next batch early: before the host waits for the device.
    """

    def __init__(self, batches: Iterable, device: torch.device) -> None:
        self._batches, self.device = iter(batches), device
        self._ahead: list[tuple[Tensor, Tensor]] = []
        self.batch_size = 0  # of the batch that was fetched last

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        return self

    def __next__(self) -> tuple[Tensor, Tensor]:
        return self._ahead.pop() if self._ahead else self._fetch()

    def fetch_ahead(self) -> None:
        """Fetch the next batch now. There must be one."""
        self._ahead.append(self._fetch())

    def _fetch(self) -> tuple[Tensor, Tensor]:
        images, labels, *_ = next(self._batches)
        self.batch_size = len(labels)
        return to_device(images, self.device), to_device(labels, self.device)


def use_fast_kernels(device: torch.device, fast: bool) -> None:
    """Turn on cudnn.benchmark and TF32 on a GPU, or turn them off for results that repeat."""
    if device.type != "cuda":
        return
    torch.backends.cudnn.benchmark = fast
    torch.backends.cudnn.allow_tf32 = fast
    torch.backends.cuda.matmul.allow_tf32 = fast


def seed_device(seed: int) -> None:
    """Seed the generators of Python, NumPy, torch's CPU, and this process's GPU if it has one."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.default_generator.manual_seed(seed)  # torch.manual_seed inspects the stack: 0.2 to 0.8 ms
    if torch.cuda.is_initialized():
        torch.cuda.default_generators[torch.cuda.current_device()].manual_seed(seed)


def autocast(device: torch.device, dtype: torch.dtype | None) -> contextlib.AbstractContextManager:
    """Return torch's autocast of `dtype` on `device`, or an empty context for None."""
    if dtype is None:
        return contextlib.nullcontext()
    return torch.autocast(device.type, dtype=dtype)


def pick_amp(name: str, device: torch.device) -> torch.dtype | None:
    """Return the autocast type of --amp: auto, off, bf16 or fp16.

    auto: off on CPUs; on GPUs bf16, or fp16 where bf16 is emulated (compute capability below 8).
    """
    if name == "auto":
        if device.type != "cuda":
            return None
        return torch.bfloat16 if has_native_bf16() else torch.float16
    return {"off": None, "bf16": torch.bfloat16, "fp16": torch.float16}[name]


def has_native_bf16() -> bool:
    """Return whether this GPU computes bf16 itself. T4, RTX 20 and GTX 16 only emulate it."""
    return torch.cuda.is_bf16_supported(including_emulation=False)


def cpu_has_bf16(device: torch.device) -> bool:
    """Return whether `device` is a CPU with bf16 instructions.

    --amp auto does not use them: runs on CPUs stay repeatable, and small networks gain nothing.
    """
    able = torch.cpu.get_capabilities()
    return device.type == "cpu" and any(able.get(f"{unit}_bf16") for unit in ("avx512", "amx"))
