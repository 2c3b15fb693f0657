"""The same network, faster: attention and matrix products that suit the device, and a frozen
network made lean.

Nothing here changes what a network computes but in the last digits of its precision.
"""

import copy
import ctypes
import functools
import os
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from timm.layers import BatchNormAct2d, PatchEmbed
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from base.errors import UserError

FOLDING_ERROR = 1e-3  # of the largest output; folding moves it by about 1e-5
CAST_BY_AUTOCAST = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)
LEAST_FEATURES = 128  # of a matrix product that is worth another library
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD, MADV_HUGEPAGE = -1, -3, 14  # of malloc.h and mman.h
HEAP, HUGE_PAGE, MOST_OF_OLD_GLIBC = 2**29, 2**21, 2**25  # bytes


def select_kernels(network: nn.Module, device_type: str, dtype: torch.dtype | None) -> None:
    """Let `network` compute in the ways that measured fastest. dtype: autocast's, or None."""
    set_attention(network, fused=prefers_fused_attention(device_type, dtype))
    if device_type == "cpu" and dtype is not None:
        use_patch_products(network)
    elif device_type == "cpu" and prefers_onednn():
        use_onednn(network)


def keep_memory() -> bool:
    """Let this process keep the memory that it frees, for its next step; return whether it will.

    Unless told otherwise glibc gives large blocks and the free end of its heap back, and the kernel
    has to clear thousands of pages anew in every step on a CPU. The first `HEAP` bytes are to be
    huge pages where Linux has them on demand. A process that was started with thresholds of its own
    (MALLOC_..._THRESHOLD_, GLIBC_TUNABLES), or without glibc, is left alone.
    """
    told = " ".join([*os.environ, os.environ.get("GLIBC_TUNABLES", "")]).lower()
    if "mmap_threshold" in told or "trim_threshold" in told:
        return False
    try:
        libc = ctypes.CDLL(None)
        blocks = any(libc.mallopt(M_MMAP_THRESHOLD, most) for most in (2 * HEAP, MOST_OF_OLD_GLIBC))
        heap = libc.mallopt(M_TRIM_THRESHOLD, 2**31 - 1)
        size, place = ctypes.c_size_t, ctypes.c_void_p
        libc.malloc.restype = libc.sbrk.restype = place
        start = libc.sbrk(0)
        libc.free(place(libc.malloc(size(HEAP))))  # addresses, no memory yet
        aligned = -(-start // HUGE_PAGE) * HUGE_PAGE
        libc.madvise(place(aligned), size(max(0, libc.sbrk(0) - aligned)), MADV_HUGEPAGE)
    except (AttributeError, OSError, TypeError):
        return False
    return bool(blocks and heap)


@functools.cache
def prefers_onednn() -> bool:
    """Return whether float32 products on this CPU are oneDNN's and not, as torch's, MKL's.

    MKL runs at half its speed or less on AMD's CPUs with AVX-512 (measured on Zen 5: 95 against
    205 GFLOP/s on a core). Elsewhere nothing was measured and torch's choice stays. This must not
    be a measurement of its own, which might come out otherwise when a run goes on.
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


def use_patch_products(network: nn.Module) -> None:
    """Let `network` embed its patches by a matrix product under autocast on a CPU."""
    for module in network.modules():
        layer = module.proj if isinstance(module, PatchEmbed) else None
        if type(layer) is nn.Conv2d and layer.kernel_size == layer.stride:
            layer.__class__ = PatchProduct


class PatchProduct(nn.Conv2d):
    """The convolution of timm's `PatchEmbed`, whose patches do not overlap, as a matrix product.

    In bf16 on a CPU it takes 0.6 of the time, and its tokens lie as the blocks want them; the last
    digits differ. In float32, where it is no faster, and elsewhere it is the convolution.
    """

    def forward(self, input: Tensor) -> Tensor:
        """input: (B, C, H, W). Returns (B, D, H/P, W/P)."""
        (height, width), (p, q) = input.shape[-2:], self.kernel_size
        even = input.dim() == 4 and not height % p and not width % q
        if not even or input.device.type != "cpu" or not torch.is_autocast_enabled("cpu"):
            return super().forward(input)
        rows = input.to(torch.get_autocast_dtype("cpu")).unflatten(3, (-1, q)).unflatten(2, (-1, p))
        patches = rows.permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2)  # (B, N, CPP)
        tokens = F.linear(patches, self.weight.flatten(1), self.bias)
        return tokens.transpose(1, 2).unflatten(2, (height // p, width // q))


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
    if torch.compiler.is_compiling():  # inductor would take weights that are constant alone
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
    """Keep the inputs of the blocks alone, and compute the rest again in the backward pass.

    Raises UserError for a network that cannot, or whose BatchNorm would count a batch twice.
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


@torch.no_grad()
def optimize_for_inference(
    network: nn.Module, dtype: torch.dtype, size: tuple[int, int], device_type: str
) -> tuple[nn.Module, int]:
    """Return a frozen network for autocast of `dtype`, and how many BatchNorms were folded.

    What autocast would cast at every call (the weights of convolutions and matrix products) is
    cast once; BatchNorm is folded into the convolution before it, and convolutions see channels
    last. size: (height, width) of the images (B, 3, height, width), which are to come
    channels-last too.
    """
    network, count = fold_batch_norms(network.eval(), size)
    for module in network.modules():
        if isinstance(module, CAST_BY_AUTOCAST):
            module.to(dtype)
    select_kernels(network, device_type, dtype)
    return network.to(memory_format=torch.channels_last), count


@torch.no_grad()
def fold_batch_norms(network: nn.Module, size: tuple[int, int]) -> tuple[nn.Module, int]:
    """Return a copy with every BatchNorm folded into the convolution before it, and their number.

    The pairs are found by running the network, in evaluation mode, on a random image of `size`
    (height, width). If the folded one then says something else, because a convolution's output is
    used elsewhere too or its weights are no plain ones, the network comes back as it was, with 0.
    """
    image = torch.randn(1, 3, *size, generator=torch.Generator().manual_seed(0))
    pairs, before = _pairs(network, image)
    if not pairs or not isinstance(before, Tensor):
        return network, 0
    folded = copy.deepcopy(network)
    for conv_name, norm_name in pairs:
        conv, norm = folded.get_submodule(conv_name), folded.get_submodule(norm_name)
        folded.set_submodule(conv_name, fuse_conv_bn_eval(conv, norm))
        rest = [norm.drop, norm.act] if isinstance(norm, BatchNormAct2d) else []
        folded.set_submodule(norm_name, nn.Sequential(*rest))
    error = (folded(image) - before).abs().max() / before.abs().max()
    return (folded, len(pairs)) if error < FOLDING_ERROR else (network, 0)


def _pairs(network: nn.Module, image: Tensor) -> tuple[list[tuple[str, str]], object]:
    """Return (convolution, BatchNorm) by name, where one runs on the other's output, and what the
    network says."""
    said: dict[str, list[Tensor]] = {}
    heard: dict[str, list[Tensor]] = {}
    hooks = []
    for name, module in network.named_modules():
        if isinstance(module, nn.Conv2d):
            note = said.setdefault(name, [])
            hooks.append(module.register_forward_hook(lambda _, __, y, note=note: note.append(y)))
        elif type(module) in (nn.BatchNorm2d, BatchNormAct2d) and module.affine:
            note = heard.setdefault(name, [])
            hooks.append(
                module.register_forward_pre_hook(lambda _, x, note=note: note.append(x[0]))
            )
    try:
        answer = network(image)
    finally:
        for hook in hooks:
            hook.remove()
    by_output = {id(outputs[0]): name for name, outputs in said.items() if len(outputs) == 1}
    return [
        (by_output[id(inputs[0])], name)
        for name, inputs in heard.items()
        if len(inputs) == 1 and id(inputs[0]) in by_output
    ], answer
