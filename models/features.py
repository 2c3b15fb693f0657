"""What a network saw inside: hidden states, attention and pooled features of timm models.

Shapes: B batch, N tokens (prefix tokens first), P prefix tokens, D width, H heads.
The numbering, once for the whole repository (TextBrewer's and Hugging Face's):

    hidden[0]     the embedding output, input of block 0             (B, N, D)
    hidden[i]     the output of block i, before the final norm       (B, N, D)
    attention[i]  the map of block i+1                               (B, H, N, N)
    pooled[0]     what the classifier sees                           (B, D)

A CNN has no embedding output: hidden[k] is its k-th stage map as tokens, (B, height*width, D),
row by row. Only what is asked for is computed: a tap is a forward hook on one module, and a
network without taps has no hooks.
"""

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from timm.layers import Attention
from torch import Tensor, nn

from errors import UserError

FEATURES = ["hidden", "attention", "pooled"]
ATTENTION_KINDS = ("scores", "probabilities")


@dataclass(frozen=True)
class Tap:
    """A tensor wanted from inside. `kind` of attention: scores (q k^T scale) or probabilities."""

    feature: str
    layer: int
    kind: str = "scores"


@dataclass(frozen=True)
class Layout:
    """What a network offers: how many of each feature, its prefix tokens, its heads' widths."""

    num_hidden: int
    num_attention: int
    num_prefix_tokens: int
    is_transformer: bool

    def valid(self, feature: str) -> range:
        return range({"hidden": self.num_hidden, "attention": self.num_attention}.get(feature, 1))


def layout_of(network: nn.Module) -> Layout:
    """Return what `network` (a timm model) offers. Raises UserError if it has no known layers."""
    blocks = _blocks(network)
    if blocks is not None:
        return Layout(len(blocks) + 1, len(blocks), getattr(network, "num_prefix_tokens", 0), True)
    stages = _stages(network)
    if not stages:
        raise UserError(
            f"{type(network).__name__} names no layers that could be tapped (no `blocks`, no "
            "`feature_info`); give it an adaptor with --plugin"
        )
    return Layout(len(stages), 0, 0, False)


def _blocks(network: nn.Module) -> nn.Sequential | None:
    """Return the blocks of a plain transformer: tokens (B, N, D) in, tokens out."""
    blocks = getattr(network, "blocks", None)
    if isinstance(blocks, nn.Sequential | nn.ModuleList) and hasattr(network, "pos_embed"):
        return blocks
    return None


def _stages(network: nn.Module) -> list[str]:
    info = getattr(network, "feature_info", None)
    return [stage["module"] for stage in info] if info else []


@dataclass
class Record:
    """Where the hooks put what they saw, while `active`."""

    active: bool = False
    seen: dict[Tap, Tensor] = field(default_factory=dict)


class FeatureTaps:
    """Hooks on the wanted layers of one network, and the tensors of its last recorded forward.

    Raises UserError, naming the valid range or the attention class, for what cannot be tapped.
    """

    def __init__(self, network: nn.Module, taps: Iterable[Tap]) -> None:
        self.taps = tuple(dict.fromkeys(taps))
        self.layout = layout_of(network) if self.taps else None
        self._record = Record()
        self._queries: dict[int, Tensor] = {}
        self._handles: list[Any] = []
        for tap in self.taps:
            self._install(network, tap)

    def __deepcopy__(self, memo: dict) -> "FeatureTaps":
        raise UserError("a network with taps cannot be copied: copy it before its taps are set")

    def remove(self) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def forward(self, network: nn.Module, images: Tensor) -> tuple[Any, dict[Tap, Tensor]]:
        """Run `network` once on images (B, 3, height, width); return its output and the tapped."""
        self._record.active = True
        try:
            output = network(images)
        finally:
            self._record.active = False
        seen, self._record.seen = self._record.seen, {}
        self._queries.clear()
        return output, seen

    def _install(self, network: nn.Module, tap: Tap) -> None:
        if tap.feature not in FEATURES:
            raise UserError(f"unknown feature {tap.feature!r}; known: {', '.join(FEATURES)}")
        valid = self.layout.valid(tap.feature)  # type: ignore[union-attr]
        name = type(network).__name__
        if tap.feature == "attention" and not valid:
            raise UserError(f"{name} has no attention maps to match; match `hidden` instead")
        if tap.layer not in range(-len(valid), len(valid)):
            raise UserError(
                f"{tap.feature} layer {tap.layer} of {name} is out of range: it has "
                f"{valid.start} to {valid.stop - 1}"
            )
        if tap.feature == "hidden":
            self._tap_hidden(network, tap, valid[tap.layer])
        elif tap.feature == "attention":
            self._tap_attention(network, tap, valid[tap.layer])
        else:
            self._tap_pooled(network, tap)

    def _tap_hidden(self, network: nn.Module, tap: Tap, layer: int) -> None:
        blocks = _blocks(network)
        if blocks is None:
            module = network.get_submodule(_stages(network)[layer])
            channels_last = getattr(network, "output_fmt", "NCHW") == "NHWC"

            def keep_map(_: nn.Module, __: Any, output: Tensor) -> None:
                if self._record.active:
                    self._record.seen[tap] = as_tokens(output, channels_last)

            self._handles.append(module.register_forward_hook(keep_map))
        elif layer == 0:

            def keep_input(_: nn.Module, inputs: tuple) -> None:
                if self._record.active:
                    self._record.seen[tap] = inputs[0]

            self._handles.append(blocks[0].register_forward_pre_hook(keep_input))
        else:

            def keep_output(_: nn.Module, __: Any, output: Tensor) -> None:
                if self._record.active:
                    self._record.seen[tap] = output

            self._handles.append(blocks[layer - 1].register_forward_hook(keep_output))

    def _tap_attention(self, network: nn.Module, tap: Tap, layer: int) -> None:
        attention = getattr(_blocks(network)[layer], "attn", None)  # type: ignore[index]
        if type(attention) is not Attention:
            raise UserError(
                f"attention layer {layer} of {type(network).__name__} is a "
                f"{type(attention).__name__}: only timm's plain Attention can be tapped exactly "
                "(others add a bias or a rotation); match `hidden` instead"
            )
        if tap.kind not in ATTENTION_KINDS:
            raise UserError(f"unknown attention kind {tap.kind!r}; known: scores, probabilities")

        def keep_query(_: nn.Module, __: Any, query: Tensor) -> None:
            if self._record.active:
                self._queries[layer] = query

        def keep_scores(_: nn.Module, __: Any, key: Tensor) -> None:
            if self._record.active:
                self._record.seen[tap] = attention_map(
                    self._queries[layer], key, attention.scale, tap.kind
                )

        self._handles.append(attention.q_norm.register_forward_hook(keep_query))
        self._handles.append(attention.k_norm.register_forward_hook(keep_scores))

    def _tap_pooled(self, network: nn.Module, tap: Tap) -> None:
        classifier = network.get_classifier()
        if isinstance(classifier, tuple):  # a distilled ViT: the class token's head
            classifier = classifier[0]

        def keep_input(_: nn.Module, inputs: tuple) -> None:
            if self._record.active:
                self._record.seen[tap] = inputs[0]

        self._handles.append(classifier.register_forward_pre_hook(keep_input))


def as_tokens(feature_map: Tensor, channels_last: bool = False) -> Tensor:
    """Return a feature map (B, D, height, width), or channels-last, as tokens (B, N, D)."""
    if feature_map.dim() != 4:
        return feature_map
    if not channels_last:
        feature_map = feature_map.permute(0, 2, 3, 1)
    return feature_map.flatten(1, 2)


def attention_map(query: Tensor, key: Tensor, scale: float, kind: str) -> Tensor:
    """Return the attention (B, H, N, N) of queries and keys (B, H, N, D/H), in at least float32.

    It is computed beside the fused kernel, which does not give its map away; equal to timm's plain
    attention before dropout.
    """
    with torch.autocast(query.device.type, enabled=False):
        query = query.float() if query.dtype in (torch.float16, torch.bfloat16) else query
        scores = (query * scale) @ key.to(query.dtype).transpose(-2, -1)
    return scores.softmax(-1) if kind == "probabilities" else scores
