"""Features of timm models: hidden states, attention and pooled features.

Shapes: B batch, N tokens (prefix tokens first), D width, H heads.
The numbering, once for the whole repository (TextBrewer's and Hugging Face's):

    hidden[0]     the embedding output, input of block 0             (B, N, D)
    hidden[i]     the output of block i, before the final norm       (B, N, D)
    attention[i]  the map of block i+1                               (B, H, N, N)
    pooled[0]     the input of the classifier                        (B, D)

A CNN has no embedding output: hidden[k] is its k-th stage map as tokens, (B, height*width, D),
row by row. Only tapped features are computed: a tap is a forward hook on one module, and a
network without taps has no hooks.
"""

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from timm.models.vision_transformer import Attention
from torch import Tensor, nn

from base.errors import UserError

FEATURES = ["hidden", "attention", "pooled"]
ATTENTION_KINDS = ("scores", "probabilities")
CLASS_ATTENTION = ("blocks_token_only", "cls_attn_blocks")  # CaiT's and XCiT's: after the blocks

REORDERED = ("Hiera", "HieraDet")  # their tokens are not in the order of the image

# For networks that the taps do not know: functions from (images, the network's output) to a dict
# with these keys, TextBrewer's protocol. An entry is added by assignment and named on the command
# line. `hidden` and `attention` are lists, which the layers of a match count from 0.
ADAPTOR_KEYS = ["logits", "logits_mask", "losses", "inputs_mask", "labels", "hidden", "attention"]
ADAPTORS: dict[str, Callable[[Tensor, Any], Mapping[str, Any]]] = {}


class Tap(NamedTuple):
    """One feature of a network. kind, of attention: scores (q k^T scale) or their softmax."""

    feature: str
    layer: int
    kind: str = "scores"


@dataclass(frozen=True)
class TappedOutput:
    """A network's output and its tapped features, by key.

    mask: (B,N), 1 keeps a token, and losses, scalars of the network's own: only from an adaptor.
    """

    logits: Any
    states: dict[Any, Any]
    mask: Tensor | None = None
    losses: tuple[Tensor, ...] = ()


@dataclass(frozen=True)
class Layout:
    """A network's number of layers by feature, its prefix tokens by name, its patch grid."""

    hidden: int
    attention: int
    prefix: tuple[str, ...] = ()
    grid: tuple[int, int] | None = None


def layout_of(network: nn.Module) -> Layout:
    """Return the layout of `network`, a timm model. Raises UserError if it cannot be tapped."""
    blocks = _blocks(network)
    if type(network).__name__ in REORDERED:
        raise _unreadable(network, "its tokens are not in the order of the image")
    if blocks is not None:
        joins_later = any(hasattr(network, stage) for stage in CLASS_ATTENTION)
        prefix = 0 if joins_later else getattr(network, "num_prefix_tokens", 0)
        names = [name for name in ("cls", "dist") if _has_token(network, name)][:prefix]
        names += ["register"] * (prefix - len(names))
        grid = getattr(getattr(network, "patch_embed", None), "grid_size", None)
        return Layout(len(blocks) + 1, len(blocks), tuple(names), grid and tuple(grid))
    stages = _stages(network)
    if not stages:
        raise UserError(
            f"{type(network).__name__} names no layers that could be tapped (no `blocks`, no "
            "`feature_info`); give it an adaptor: --plugin FILE.py with --student-adaptor or "
            "--teacher-adaptor"
        )
    modules = dict(network.named_modules())
    if missing := [stage for stage in stages if stage not in modules]:
        raise _unreadable(network, f"it has no module {missing[0]!r}, which timm names as a stage")
    return Layout(len(stages), 0)


def _has_token(network: nn.Module, name: str) -> bool:
    return getattr(network, f"{name}_token", None) is not None


def _blocks(network: nn.Module) -> nn.Module | None:
    """Return the blocks of a plain transformer: tokens (B, N, D) in, tokens out."""
    blocks = getattr(network, "blocks", None)
    plain = isinstance(blocks, nn.Sequential | nn.ModuleList) and hasattr(network, "pos_embed")
    return blocks if plain else None


def _stages(network: nn.Module) -> list[str]:
    return [stage["module"] for stage in getattr(network, "feature_info", None) or []]


@dataclass
class _Record:
    """Where the hooks put the features, while `active`."""

    active: bool = False
    states: dict[Tap, Tensor] = field(default_factory=dict)


class FeatureTaps:
    """Hooks on the wanted layers of one network, which record during `forward` alone.

    A copy of a tapped network (an average of its weights) carries hooks that stay idle.
    Raises UserError, naming the valid range or the attention class, for what cannot be tapped.
    """

    def __init__(self, network: nn.Module, taps: Iterable[Tap]) -> None:
        self.layout = layout_of(network)
        self._name, self._tokens = type(network).__name__, _number_of_tokens(network, self.layout)
        self._taps = dict.fromkeys(taps)
        self.maps: dict[Tap, tuple[int, int]] = {}  # (height, width) of a CNN's maps
        self._record = _Record()
        self._hooks: list[Any] = []
        for tap in self._taps:
            self._install(network, tap)

    def forward(self, network: Callable[[Tensor], Any], images: Tensor) -> TappedOutput:
        """Run `network` once on images (B, 3, height, width); return its output and features."""
        self._record.active = True
        try:
            output = network(images)
        finally:
            self._record.active = False
        states, self._record.states = self._record.states, {}
        if unused := [tap for tap in self._taps if tap not in states]:
            reason = f"its forward pass does not call the module of {unused[0].feature} layer "
            raise _unreadable(self._name, f"{reason}{unused[0].layer}")
        # Attention is computed here, outside blocks that gradient checkpointing runs again.
        return TappedOutput(output, {tap: _finished(state, tap) for tap, state in states.items()})

    def remove(self) -> None:
        """Take the hooks off the network."""
        while self._hooks:
            self._hooks.pop().remove()

    def grid(self, tap: Tap, patches: int) -> tuple[int, int]:
        """Return height and width of a tap's `patches`. Raises UserError if the grid is unknown."""
        side = math.isqrt(patches)
        for grid in (self.maps.get(tap), self.layout.grid, (side, side)):
            if grid and grid[0] * grid[1] == patches:
                return grid
        raise UserError(f"{tap.feature} layer {tap.layer}: its {patches} patches are no known grid")

    def _install(self, network: nn.Module, tap: Tap) -> None:
        name = type(network).__name__
        if tap.feature not in FEATURES:
            raise UserError(f"feature {tap.feature!r} is not known; known: {', '.join(FEATURES)}")
        valid = range(getattr(self.layout, tap.feature, 1))
        if not valid:
            raise UserError(f"{name} has no attention to match, it is a CNN; match hidden instead")
        if tap.layer not in range(-len(valid), len(valid)):
            raise UserError(
                f"{tap.feature} layer {tap.layer} of {name} is out of range: its layers are 0 to "
                f"{valid.stop - 1}"
            )
        getattr(self, f"_tap_{tap.feature}")(network, tap, valid[tap.layer])

    def _keep(self, tap: Tap, tensor: Tensor) -> None:
        if self._record.active:
            self._record.states[tap] = tensor

    def _keep_input(self, module: nn.Module, tap: Tap) -> None:
        hook = module.register_forward_pre_hook(lambda _, inputs: self._keep(tap, inputs[0]))
        self._hooks.append(hook)

    def _keep_output(self, module: nn.Module, tap: Tap) -> None:
        hook = module.register_forward_hook(lambda _, __, output: self._keep(tap, output))
        self._hooks.append(hook)

    def _tap_hidden(self, network: nn.Module, tap: Tap, layer: int) -> None:
        blocks = _blocks(network)
        if blocks is None:
            self._tap_stage(network, tap, layer)
            return

        def keep_tokens(tokens: Any) -> None:
            if self._record.active:
                _check_tokens(network, tap, tokens, self._tokens)
                self._record.states[tap] = tokens

        if layer == 0:
            hook = blocks[0].register_forward_pre_hook(lambda _, inputs: keep_tokens(inputs[0]))
        else:
            hook = blocks[layer - 1].register_forward_hook(lambda _, __, out: keep_tokens(out))
        self._hooks.append(hook)

    def _tap_stage(self, network: nn.Module, tap: Tap, layer: int) -> None:
        """Tap a stage of a network without plain blocks: its map, row by row, or its tokens."""
        info = network.feature_info[layer]  # type: ignore[index]
        stage, width = network.get_submodule(info["module"]), info["num_chs"]
        channels_last = getattr(network, "output_fmt", "NCHW") == "NHWC"

        def keep_map(_: nn.Module, __: Any, output: Any) -> None:
            if not self._record.active:
                return
            _check_stage(network, tap, output, width, channels_last=channels_last)
            if output.dim() == 4:
                output = output if channels_last else output.permute(0, 2, 3, 1)
                self.maps[tap] = (output.shape[1], output.shape[2])
                output = output.flatten(1, 2)  # (B, N, D)
            self._record.states[tap] = output

        self._hooks.append(stage.register_forward_hook(keep_map))

    def _tap_attention(self, network: nn.Module, tap: Tap, layer: int) -> None:
        attention = getattr(_blocks(network)[layer], "attn", None)  # type: ignore[index]
        if type(attention) is not Attention:
            raise UserError(
                f"attention layer {layer} of {type(network).__name__} is a "
                f"{type(attention).__name__}: only timm's plain Attention can be read exactly "
                "(others add a bias or a rotation); match hidden instead"
            )
        query = tap._replace(kind="query")

        def keep_attention(_: nn.Module, __: Any, key: Tensor) -> None:
            if self._record.active:
                scores = self._record.states.pop(query), key, attention.scale
                self._record.states[tap] = scores

        self._keep_output(attention.q_norm, query)
        self._hooks.append(attention.k_norm.register_forward_hook(keep_attention))

    def _tap_pooled(self, network: nn.Module, tap: Tap, layer: int) -> None:
        classifier = network.get_classifier()
        if isinstance(classifier, tuple):  # a distilled ViT: the input of the class token's head
            classifier = classifier[0]
        self._keep_input(classifier, tap)


def attention_map(query: Tensor, key: Tensor, scale: float, kind: str) -> Tensor:
    """Return the attention (B, H, N, N) of queries and keys (B, H, N, D/H), in at least float32.

    The fused kernel does not return its map, so it is computed again; it equals timm's plain
    attention before dropout.
    """
    with torch.autocast(query.device.type, enabled=False):
        query, key = (x.to(torch.promote_types(x.dtype, torch.float32)) for x in (query, key))
        scores = (query * scale) @ key.transpose(-2, -1)
    return scores.softmax(-1) if kind == "probabilities" else scores


def _finished(state: Any, tap: Tap) -> Tensor:
    """Return a recorded state; of attention, the map of its query, key and scale."""
    return attention_map(*state, tap.kind) if isinstance(state, tuple) else state


def _unreadable(network: nn.Module | str, reason: str) -> UserError:
    name = network if isinstance(network, str) else type(network).__name__
    return UserError(
        f"{name} cannot be tapped: {reason}; use another model, match its pooled "
        "feature, or give it an adaptor: --plugin FILE.py with --student-adaptor or "
        "--teacher-adaptor"
    )


def _number_of_tokens(network: nn.Module, layout: Layout) -> int | None:
    """Return how many tokens a block must have, or None where the number depends on the image."""
    if layout.grid is None or getattr(network, "dynamic_img_size", False):
        return None
    return len(layout.prefix) + layout.grid[0] * layout.grid[1]


def _check_tokens(network: nn.Module, tap: Tap, tokens: Any, count: int | None) -> None:
    """Raise UserError unless a block's tokens are (B, N, D), with the layout's N."""
    if not isinstance(tokens, Tensor) or tokens.dim() != 3:
        raise _unreadable(network, f"hidden layer {tap.layer} is not a tensor (B, N, D)")
    if count is not None and tokens.shape[1] != count:
        raise _unreadable(
            network, f"hidden layer {tap.layer} has {tokens.shape[1]} tokens, expected {count}"
        )


def _check_stage(
    network: nn.Module, tap: Tap, output: Any, width: int, *, channels_last: bool
) -> None:
    """Raise UserError unless a stage returns a map or tokens of `width` channels."""
    if not isinstance(output, Tensor) or output.dim() not in (3, 4):
        raise _unreadable(network, f"hidden layer {tap.layer} is not a map (B, D, height, width)")
    axis = 1 if output.dim() == 4 and not channels_last else -1
    if output.shape[axis] != width:
        raise _unreadable(
            network,
            f"hidden layer {tap.layer} is {tuple(output.shape)}, without {width} channels on "
            f"axis {axis}",
        )


class AdaptorTaps:
    """The features that an adaptor reads from a network's output, instead of `FeatureTaps`.

    Raises UserError at the first forward pass for an unknown key, and for a layer that the adaptor
    does not give. `logits_mask` and `labels` are unknown too: the label of an image comes from the
    data.
    """

    layout = Layout(0, 0)

    def __init__(
        self, adaptor: Callable[[Tensor, Any], Mapping[str, Any]], taps: Iterable[Tap] = ()
    ) -> None:
        self.adaptor, self.taps = adaptor, tuple(dict.fromkeys(taps))

    def forward(self, network: Callable[[Tensor], Any], images: Tensor) -> TappedOutput:
        """Run `network` once on images (B, 3, height, width) and read its output."""
        found = self.adaptor(images, network(images))
        known = {"logits", "losses", "inputs_mask", *FEATURES}
        if not isinstance(found, Mapping) or set(found) - known:
            given = sorted(found) if isinstance(found, Mapping) else type(found).__name__
            raise UserError(f"adaptor: returned {given}; for images the keys are {sorted(known)}")
        logits, own = found.get("logits"), found.get("losses", ())
        return TappedOutput(
            logits[0] if isinstance(logits, list) and len(logits) == 1 else logits,
            {tap: self._state(found, tap) for tap in self.taps},
            found.get("inputs_mask"),
            (own,) if isinstance(own, Tensor) else tuple(own),
        )

    def grid(self, tap: Tap, patches: int) -> tuple[int, int]:
        """Return the square grid of `patches`. Raises UserError if their number is no square."""
        side = math.isqrt(patches)
        if side * side != patches:
            raise UserError(
                f"{tap.feature} layer {tap.layer}: an adaptor's {patches} tokens have no square "
                "grid; leave prefix tokens out, or leave out resize"
            )
        return side, side

    def _state(self, found: Mapping[str, Any], tap: Tap) -> Tensor:
        states = found.get(tap.feature, ())
        if tap.layer not in range(-len(states), len(states)):
            raise UserError(
                f"{tap.feature} layer {tap.layer}: the adaptor returned {len(states)} of them"
            )
        return states[tap.layer]


def taps_on(network: nn.Module, taps: Iterable[Tap], adaptor: Any = None) -> Any:
    """Return the taps of a network: hooks, or those of the adaptor if there is one."""
    return FeatureTaps(network, taps) if adaptor is None else AdaptorTaps(adaptor, taps)
