"""Faster matrix products and kept memory on CPUs. `models.select_kernels` alone uses this module.

Logits differ in the last digits only. An optimisation is here if it saves a tenth of a step or more
(`results/cpu_optimisations.md`).
"""

import ctypes
import functools
import os
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

LEAST_FEATURES = 128  # of a matrix product for which oneDNN is used
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # of malloc.h
LARGEST, MOST_OF_OLD_GLIBC = 2**30, 2**25  # bytes of a block that the heap keeps


def tune_for_cpu(network: nn.Module, dtype: torch.dtype | None) -> None:
    """Keep freed memory, and use oneDNN in `network` where it is faster. dtype: autocast's."""
    keep_memory()
    if dtype is None and prefers_onednn():
        use_onednn(network)


def keep_memory() -> bool:
    """Let this process keep freed memory for its next step; return whether it does.

    Without this, glibc returns large blocks and the free end of its heap to the kernel, which
    clears thousands of pages in every step. Nothing changes without glibc, or if the environment
    sets thresholds (MALLOC_..._THRESHOLD_, GLIBC_TUNABLES). Without it steps take 1.03 to 1.09 of
    the CPU time.
    """
    stated = " ".join([*os.environ, os.environ.get("GLIBC_TUNABLES", "")]).lower()
    if "mmap_threshold" in stated or "trim_threshold" in stated:
        return False
    try:
        libc = ctypes.CDLL(None)
        blocks = any(libc.mallopt(M_MMAP_THRESHOLD, most) for most in (LARGEST, MOST_OF_OLD_GLIBC))
        heap = libc.mallopt(M_TRIM_THRESHOLD, 2**31 - 1)
    except (AttributeError, OSError, TypeError):
        return False
    return bool(blocks and heap)


@functools.cache
def prefers_onednn() -> bool:
    """Return whether float32 products on this CPU use oneDNN instead of torch's default, MKL.

    MKL runs at half its speed or less on AMD's CPUs with AVX-512. Measured on a core of a Zen 5: 95
    against 205 GFLOP/s; a step took 1.16 to 1.27 times as long. On a Zen 3 oneDNN is slower. The
    choice is not measured at run time, so that a resumed run makes the same one.
    """
    cpus = Path("/proc/cpuinfo")
    return (
        hasattr(torch.ops.mkldnn, "_linear_pointwise")
        and torch.backends.mkldnn.is_available()
        and torch.backends.mkl.is_available()
        and torch.backends.cpu.get_cpu_capability() == "AVX512"
        and cpus.is_file()
        and "AuthenticAMD" in cpus.read_text()
    )


def use_onednn(network: nn.Module) -> None:
    """Use oneDNN for the float32 products of linear layers with `LEAST_FEATURES` or more."""
    for module in network.modules():
        if type(module) is nn.Linear and min(module.weight.shape) >= LEAST_FEATURES:
            module.__class__ = OneDnnLinear


class OneDnnLinear(nn.Linear):
    """`nn.Linear` with the float32 products of oneDNN on CPUs."""

    def forward(self, input: Tensor) -> Tensor:
        plain = input.dtype == self.weight.dtype == torch.float32 and input.device.type == "cpu"
        if not plain or not input.numel() or torch.is_autocast_enabled("cpu"):
            return super().forward(input)
        return _OneDnnProduct.apply(input, self.weight, self.bias)


class _OneDnnProduct(torch.autograd.Function):
    """x w' + b for x (..., K), w (N, K), b (N,) or None."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, w: Tensor, b: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, w)
        return _times(x, w, b)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        (x, w), (for_x, for_w, for_b) = ctx.saved_tensors, ctx.needs_input_grad
        rows = gradient.reshape(-1, len(w)).contiguous()
        return (
            _times(rows, w.t()).view_as(x) if for_x else None,
            _times(rows.t(), x.reshape(-1, x.shape[-1]).t()) if for_w else None,
            rows.sum(0) if for_b else None,
        )


def _times(x: Tensor, w: Tensor, b: Tensor | None = None) -> Tensor:
    if torch.compiler.is_compiling():  # inductor accepts constant weights only
        return _opaque_times(x, w, b)
    return torch.ops.mkldnn._linear_pointwise(x, w, b, "none", [], "")


@torch.library.custom_op("vit_distillation::times", mutates_args=())
def _opaque_times(x: Tensor, w: Tensor, b: Tensor | None) -> Tensor:
    return torch.ops.mkldnn._linear_pointwise(x, w, b, "none", [], "")


@_opaque_times.register_fake
def _(x: Tensor, w: Tensor, b: Tensor | None) -> Tensor:
    return x.new_empty(*x.shape[:-1], len(w))
