"""The module that trains: the student network, its projections, and the outputs for the loss.

Shapes: B batch, C classes.
"""

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from base.errors import UserError
from models.features import TappedOutput


class Student(nn.Module):
    """Wraps a network for training; `.network` alone is evaluated, averaged and exported.

    heads: "both" returns (class logits, distillation logits), in any mode of the network. So
        distillation works with dropout off. "one" returns one Tensor. If the network has two heads
        it is their mean, so that both train.
    submodels: 2 passes every batch twice, concatenated, with two draws of stochastic depth, and
        returns logits (2B, C) (Cosub).
    origin: where the initial weights come from, as printed at the start of a run.
    Raises UserError for "both" with a network without distillation head.
    """

    def __init__(
        self, network: nn.Module, *, heads: str = "one", submodels: int = 1, origin: str = ""
    ) -> None:
        super().__init__()
        self.network = network
        self.heads, self.submodels, self.origin = heads, submodels, origin
        self.taps: Any = None
        self.projections: nn.Module = nn.ModuleDict()
        if heads == "both" and not has_distillation_head(network):
            raise UserError(
                f"{type(network).__name__} has no distillation head; use a student with one, such "
                "as deit_tiny_distilled_patch16_224, or --distillation-head cls"
            )
        if has_distillation_head(network):
            network.set_distilled_training(heads == "both")  # type: ignore[operator]

    @property
    def distillation_head(self) -> str:
        """The head that is trained on the teacher's logits: "dist" or "cls"."""
        return "dist" if self.heads == "both" else "cls"

    def observe(self, taps: Any, projections: nn.Module) -> None:
        """From now on, return `TappedOutput` instead of bare logits.

        taps: `FeatureTaps` on the network, or what has its `forward`. projections: from the
        tapped states to those that the loss compares; they train, and no copy of the network has
        them.
        """
        self.taps, self.projections = taps, projections

    def forward(self, images: Tensor) -> Tensor | tuple[Tensor, Tensor] | TappedOutput:
        """images: (B, 3, height, width). Returns (B, C), a pair, (2B, C), or `TappedOutput`."""
        if self.taps is not None:
            output = self.tapped(images)
            return replace(output, states=self.projections(output.states))
        if self.submodels == 1:
            return self._logits(images)
        return self._logits(torch.cat([images] * self.submodels))

    def tapped(self, images: Tensor) -> TappedOutput:
        """Return the network's logits and the tapped states, before projections."""
        return self.taps.forward(self._logits, images)

    def _logits(self, images: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        if self.heads == "both" and not self.network.training:
            return both_logits(self.network, images)
        return self.network(images)

    def trained_projections(self) -> nn.Module | None:
        """Return the projections, or None if nothing in them trains."""
        return self.projections if any(True for _ in self.projections.parameters()) else None

    def num_parameters(self) -> int:
        """Return how many of the network's parameters train."""
        return sum(p.numel() for p in self.network.parameters() if p.requires_grad)

    def describe(self) -> str:
        every = sum(p.numel() for p in self.network.parameters())
        two = has_distillation_head(self.network)
        text = f"{every / 1e6:.2f} M parameters, class {'and distillation head' if two else 'head'}"
        if self.num_parameters() < every:
            text += f", {self.num_parameters() / 1e6:.2f} M of them train"
        return f"{text}, {self.origin}" if self.origin else text


def has_distillation_head(network: nn.Module) -> bool:
    """Return whether a network has a second head by timm's convention: ViT, LeViT, PiT."""
    return hasattr(network, "set_distilled_training")


def both_logits(network: nn.Module, images: Tensor) -> tuple[Tensor, Tensor]:
    """Return class and distillation logits (B, C) of a distilled ViT, in evaluation mode too.

    images: (B, 3, height, width).
    """
    tokens = network.forward_features(images)  # type: ignore[operator]
    cls, dist = network.head_drop(tokens[:, 0]), network.head_drop(tokens[:, 1])
    return network.head(cls), network.head_dist(dist)


def checkpoint_blocks(network: nn.Module) -> None:
    """Keep only the inputs of the blocks, and recompute the rest in the backward pass.

    Raises UserError for a network without this option, or with BatchNorm, which would
    count every batch twice.
    """
    name = type(network).__name__
    if any(isinstance(module, nn.modules.batchnorm._BatchNorm) for module in network.modules()):
        raise UserError(
            f"--grad-checkpointing: {name} has BatchNorm, which would count every batch "
            "twice; leave the flag out"
        )
    try:
        network.set_grad_checkpointing(True)
    except (AttributeError, AssertionError, NotImplementedError) as error:
        raise UserError(
            f"--grad-checkpointing: {name} does not support it; leave the flag out"
        ) from error
