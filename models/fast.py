"""Kernels by device: attention, and on CPUs matrix products and memory.

They change what a network computes in the last digits only. What gained less than a tenth of a step
by `results/cpu_optimisations.md` is not here.
"""

import ctypes
import functools
import os
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from base.errors import UserError

LEAST_FEATURES = 128  # of a matrix product for which oneDNN is used
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # of malloc.h
LARGEST, MOST_OF_OLD_GLIBC = 2**30, 2**25  # bytes of a block that the heap keeps


def select_kernels(network: nn.Module, device_type: str, dtype: torch.dtype | None) -> None:
    """Select the kernels that measured fastest for a device. dtype: autocast's, or None."""
    set_attention(network, fused=prefers_fused_attention(device_type, dtype))
    if device_type == "cpu" and dtype is None and prefers_onednn():
        use_onednn(network)


def keep_memory() -> bool:
    """Let this process keep freed memory for its next step; return whether it does.

    Without this, glibc returns large blocks and the free end of its heap to the kernel, which
    clears thousands of pages in every step on a CPU. A process that was started with thresholds of
    its own (MALLOC_..._THRESHOLD_, GLIBC_TUNABLES), or without glibc, is left as it is. Measured:
    steps without it take 1.03 to 1.09 of the CPU time (results/cpu_optimisations.md).
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

    MKL runs at half its speed or less on AMD's CPUs with AVX-512 (measured on Zen 5: 95 against
    205 GFLOP/s on a core); a step took 1.16 to 1.27 times as long. On a Zen 3 oneDNN is slower. The
    choice is no measurement, so that it is the same when a run is resumed.
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
    """Let `network`'s linear layers of `LEAST_FEATURES` and more multiply by oneDNN in float32."""
    for module in network.modules():
        if type(module) is nn.Linear and min(module.weight.shape) >= LEAST_FEATURES:
            module.__class__ = OneDnnLinear


class OneDnnLinear(nn.Linear):
    """`nn.Linear`, whose float32 products on a CPU are oneDNN's; they differ in the last digits."""

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


def prefers_fused_attention(device_type: str, dtype: torch.dtype | None) -> bool:
    """Return whether torch's fused attention is the faster one, on CPUs by measurement.

    dtype: autocast's, or None. On a CPU the fused kernel takes 1.5 times as long as plain softmax
    attention in half precision, in float32 a few percent less; on GPUs it is expected to be the
    faster one (not measured).
    """
    return device_type != "cpu" or dtype is None


def set_attention(network: nn.Module, *, fused: bool) -> None:
    """Let timm's attention layers use torch's fused kernel or plain matrix products and softmax."""
    for module in network.modules():
        if isinstance(getattr(module, "fused_attn", None), bool):
            module.fused_attn = fused  # type: ignore[assignment]


def checkpoint_blocks(network: nn.Module) -> None:
    """Keep only the inputs of the blocks, and recompute the rest in the backward pass.

    Raises UserError for a network without this option, or with BatchNorm, whose statistics would
    count a batch twice.
    """
    name = type(network).__name__
    if any(isinstance(module, nn.modules.batchnorm._BatchNorm) for module in network.modules()):
        raise UserError(
            f"--grad-checkpointing: {name} has BatchNorm, whose statistics would see every batch "
            "twice; leave the flag out"
        )
    try:
        network.set_grad_checkpointing(True)
    except (AttributeError, AssertionError, NotImplementedError) as error:
        raise UserError(f"--grad-checkpointing: {name} cannot; leave the flag out") from error
