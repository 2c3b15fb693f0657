"""The progress of an epoch: how many micro-steps are done, and the sums behind its averages."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from base import distributed
from training.metrics import Meter
from training.non_finite import BadUpdateCounter


class EpochState:
    """Micro-steps done in an epoch, the sums behind its averages, and its bad updates.

    With the weights, this is the state of a run that stops in the middle of an epoch.
    """

    def __init__(self, device: torch.device) -> None:
        self.device, self.bad = device, BadUpdateCounter(device)
        self.reset()

    def reset(self) -> None:
        """Go to the beginning of an epoch."""
        self.micro_step = 0
        self.meters: dict[str, Meter] = {}
        self.bad.start_epoch()

    def add(self, values: Mapping[str, Tensor]) -> None:
        """Add scalars to the averages of their names."""
        for name, value in values.items():
            self.meters.setdefault(name, Meter(self.device)).update(value)

    def end_update(self, micro_step: int, grad_norm: Tensor) -> None:
        """Count an update as done, whose last micro-step is `micro_step`."""
        self.micro_step = micro_step + 1
        self.add({"grad_norm": grad_norm})

    def recent(self) -> dict[str, float]:
        """Return the averages since the last call; all processes must call it."""
        return {name: meter.recent() for name, meter in self.meters.items()}

    def averages(self) -> dict[str, float]:
        """Return the averages of the epoch; all processes must call it."""
        return {name: meter.average() for name, meter in self.meters.items()}

    def state_dict(self) -> dict[str, Any]:
        """Return plain values with the sums of every process (axis 0); all must call it."""
        sums = [meter.sums for meter in self.meters.values()]
        return {
            "micro_steps": self.micro_step,
            "meters": list(self.meters),
            "sums": distributed.all_gather(torch.stack(sums)).cpu() if sums else None,
            "bad": self.bad.counts.cpu(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Load this process's sums.

        If the number of processes has changed, the first process takes the sums of all.
        """
        self.micro_step = state["micro_steps"]
        self.bad.counts.copy_(state["bad"])
        sums = state["sums"]  # (processes, meters, 2, 2)
        if sums is not None and len(sums) != distributed.world_size():
            sums = [sums.sum(0) * distributed.is_main()] * distributed.world_size()
        for i, name in enumerate(state["meters"]):
            self.meters[name] = Meter(self.device)
            self.meters[name].sums.copy_(sums[distributed.rank()][i])
