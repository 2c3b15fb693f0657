"""From the host's memory to a device, beside what a GPU computes."""

import functools

import torch
from torch import Tensor


def send(values: Tensor, device: torch.device, *, pin: bool = False) -> Tensor:
    """Return `values` on `device`; the host waits for nothing where they are pinned.

    A GPU copies on a stream of its own, while it still computes what was asked before; what is
    asked after this call finds the copy complete. pin: let the host copy them to pinned memory
    first, for what no loader has pinned.
    """
    if device.type != "cuda" or values.is_cuda:
        return values.to(device, non_blocking=True)
    values = values.pin_memory() if pin else values
    side, current = _side(device), torch.cuda.current_stream(device)
    with torch.cuda.stream(side):
        moved = values.to(device, non_blocking=True)
    current.wait_stream(side)
    moved.record_stream(current)  # its memory is not given away before `current` has used it
    return moved


@functools.cache
def _side(device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)
