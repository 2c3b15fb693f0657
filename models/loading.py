"""Load weights from files: strictly, or for fine-tuning with another head or resolution.

Shapes: D width, N tokens, C classes. `file_layouts` reads the names of tensors, `positions` the
position embedding.
"""

import logging
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import timm
import torch
from torch import Tensor, nn

from base import safe_load
from base.errors import UserError
from models import positions
from models.file_layouts import (
    EMA_KEYS,
    RAW_KEYS,
    Weights,
    find_weights,
    in_timms_names,
    is_weights,
    seems_to_be,
    some,
)

_logger = logging.getLogger(__name__)
MIN_MATCH = 0.5  # fine-tuning from less than this share of the parameters is a mistake
REGISTERS = ("reg_token", "register_tokens")


@dataclass(frozen=True)
class Advice:
    """What to do about weights that do not fit a model, by reason."""

    classes: str = (
        "set --nb-classes {} if the data has no more classes; else train a new head with "
        "--finetune, without --eval"
    )
    no_head: str = "train a head with --finetune, without --eval"
    square: str = "set --input-size {}, or train at another size with --finetune"
    not_square: str = square
    model: str = "use --model {}"


TEACHER_ADVICE = Advice(
    classes="use a teacher with the student's classes",
    no_head="give it a head by training it with --finetune",
    square="set --teacher-input-size {}",
    not_square="use a checkpoint of this repository that has its --input-size {}",
    model="use --teacher-model {}",
)


def weight_keys(source: str) -> list[str]:
    """Return under which keys a file holds weights: raw ones, then the average; [""] if bare.

    Raises UserError where one of these keys holds something else.
    """
    content = safe_load.read_weights_file(source)
    held = [[key for key in keys if is_weights(content.get(key))] for keys in (RAW_KEYS, EMA_KEYS)]
    for keys, found in zip((RAW_KEYS, EMA_KEYS), held):
        if not found and (there := [key for key in keys if content.get(key) is not None]):
            kind = type(content[there[0]]).__name__
            raise UserError(f"{source}: {there[0]} is a {kind} without weights: damaged or changed")
    return [keys[0] for keys in held if keys] or [""]


def read_weights(source: str, key: str | None = None) -> Weights:
    """Return the state dict of a file, without the prefixes of DDP and torch.compile."""
    return find_weights(safe_load.read_weights_file(source), source, key)


def load_weights(
    network: nn.Module,
    source: str,
    *,
    key: str | None = None,
    without_head: bool = False,
    advice: Advice = Advice(),
) -> None:
    """Load any released format into `network`, strictly: every tensor, every shape.

    source: a path or URL. The file may be a bare state dict, or hold it under `model`,
        `state_dict` or DINO's `teacher`. Names may have prefixes, or be those of DeiT III, CaiT,
        ResMLP or Hugging Face for a timm model. Half precision is converted.
    key: what to take from a file with several (`model_ema` is the average); default: `model`.
    without_head: the network has no classifier (0 classes), and the file's is left out.
    advice: how to fix a mismatch, for the error.
    Raises UserError with what the file seems to be, if it is not for this network.
    """
    with safe_load.in_one_line(f"{source}: its weights do not fit the model"):
        content = safe_load.read_weights_file(source)
        weights = find_weights(content, source, key)
        _load(network, source, weights, _settings_of(content), without_head, advice)


def _settings_of(content: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return the settings of the run that wrote a checkpoint, {} if there are none."""
    settings = content.get("args")
    return settings if isinstance(settings, Mapping) else {}


def _load(
    network: nn.Module,
    source: str,
    weights: Weights,
    settings: Mapping[str, Any],
    without_head: bool,
    advice: Advice,
) -> None:
    wanted = network.state_dict()
    weights = in_timms_names(weights, network, source)
    if without_head:
        heads = tuple(f"{name}." for name in head_names(network))
        weights = {name: value for name, value in weights.items() if not name.startswith(heads)}
    _check_attention_heads(network, source, settings, advice)
    own, file = _position_layouts(network, weights, settings)
    stated = positions.grid_of_settings(settings, weights)
    if own and file and not stated and math.prod(file.grid) == math.prod(own.grid):
        if file.grid != own.grid:
            _logger.warning("%s: states no patch grid, %dx%d is assumed", source, *own.grid)
        file = positions.Layout(file.tokens, own.grid)
    same_width = own and file and weights["pos_embed"].shape[-1] == wanted["pos_embed"].shape[-1]
    if own and file and same_width and file.grid == own.grid and file.tokens != own.tokens:
        weights = weights | positions.convert(weights, file, network, own)
    wrong = [
        name for name in wanted if name in weights and weights[name].shape != wanted[name].shape
    ]
    if own and file and file.grid != own.grid and "pos_embed" not in wrong:
        wrong.append("pos_embed")  # as many patches, in another grid
    if set(weights) != set(wanted) or wrong:
        raise UserError(f"{source}: {_mismatch(weights, wanted, wrong, network, settings, advice)}")
    safe_load.check_numbers(weights, wanted)
    network.load_state_dict(weights)


def _position_layouts(
    network: nn.Module, weights: Weights, settings: Mapping[str, Any]
) -> tuple[positions.Layout | None, positions.Layout | None]:
    """Return the layouts of the position embeddings of network and file, None where it has none."""
    own = positions.layout_of_network(network)
    if own is None or not isinstance(weights.get("pos_embed"), Tensor):
        return own, None
    stated = positions.grid_of_settings(settings, weights)
    return own, positions.layout_of_file(weights, own, stated)


def _check_attention_heads(
    network: nn.Module, source: str, settings: Mapping[str, Any], advice: Advice
) -> None:
    """Raise UserError for a file of an architecture with another number of attention heads.

    No tensor has this number; it is taken from the model that the file's settings name.
    """
    stated = str(settings.get("model") or "").partition(".")[0]
    own = (getattr(network, "pretrained_cfg", None) or {}).get("architecture")
    if not stated or stated == own or not timm.is_model(stated):
        return
    with torch.device("meta"):
        other = timm.create_model(stated)
    counts = [_attention_heads(each) for each in (network, other)]
    if counts[0] and counts[1] and counts[0] != counts[1]:
        raise UserError(
            f"{source}: is of {stated}, which has {counts[1]} attention heads; the model has "
            f"{counts[0]}; {advice.model.format(stated)}"
        )


def _attention_heads(network: nn.Module) -> int:
    heads = [getattr(module, "num_heads", None) for module in network.modules()]
    return next((count for count in heads if isinstance(count, int)), 0)


def _mismatch(
    weights: Weights,
    wanted: Mapping[str, Tensor],
    wrong: list[str],
    network: nn.Module,
    settings: Mapping[str, Any],
    advice: Advice,
) -> str:
    """Return why a file does not fit: classifier, resolution, tokens, or the architecture."""
    heads = tuple(f"{name}." for name in head_names(network))
    missing, surplus = sorted(set(wanted) - set(weights)), sorted(set(weights) - set(wanted))
    if not missing and not surplus and wrong and all(name.startswith(heads) for name in wrong):
        found, own = weights[wrong[0]].shape[0], wanted[wrong[0]].shape[0]
        return f"holds {found} classes, the model has {own}; {advice.classes.format(found)}"
    if not missing and not surplus and wrong == ["pos_embed"]:
        return _other_resolution(network, weights, settings, advice)
    lacks_head = heads and missing and all(name.startswith(heads) for name in missing)
    if lacks_head and not surplus and not wrong:
        return (
            f"has no classifier ({some(missing, 2)}), as self-supervised weights have none; "
            f"{advice.no_head}"
        )
    if not missing and not wrong and all(name.startswith(REGISTERS) for name in surplus):
        count = weights[surplus[0]].shape[1]
        return f"has {count} register tokens, the model none; use a model of timm with _reg{count}"
    parts = [f"it looks like {seems_to_be(weights)}; the model is {seems_to_be(wanted)}"]
    if missing:
        parts.append(f"the file lacks {len(missing)} of {len(wanted)} tensors ({some(missing, 2)})")
    if surplus:
        parts.append(f"{len(surplus)} of its tensors are not in the model ({some(surplus, 2)})")
    if wrong:
        name = wrong[0]
        parts.append(
            f"{len(wrong)} have another shape ({name}: {tuple(weights[name].shape)}, model "
            f"{tuple(wanted[name].shape)})"
        )
    return "; ".join(parts)


def _other_resolution(
    network: nn.Module, weights: Weights, settings: Mapping[str, Any], advice: Advice
) -> str:
    own, file = _position_layouts(network, weights, settings)
    if own is None or file is None:
        return (
            f"has {weights['pos_embed'].shape[1]} position embeddings, the model has "
            f"{network.state_dict()['pos_embed'].shape[1]}"
        )
    patch = weights["patch_embed.proj.weight"].shape[-2:]
    height, width = (side * pixels for side, pixels in zip(file.grid, patch))
    if height == width:
        todo = advice.square.format(height)
    else:
        todo = advice.not_square.format(f"{height} {width}")
    return (
        f"its position embedding has {file.describe()}, the model's {own.describe()}: another "
        f"resolution; {todo}"
    )


def head_names(network: nn.Module) -> list[str]:
    """Return the module names of a network's classifiers (two in a distilled ViT)."""
    classifier = network.get_classifier() if hasattr(network, "get_classifier") else ()
    parts = classifier if isinstance(classifier, tuple | list) else (classifier,)
    return [
        name
        for name, module in network.named_modules()
        if name and any(module is part for part in parts)
    ]


def select_outputs(network: nn.Module, outputs: Sequence[int]) -> None:
    """Keep only these outputs of the network's classifiers, in this order.

    Raises UserError for a classifier that is neither linear nor a convolution.
    """
    chosen = torch.tensor(outputs)
    for name in head_names(network):
        head = network.get_submodule(name)
        if not isinstance(head, nn.Linear | nn.Conv2d):
            raise UserError(f"the classifier {type(head).__name__} has no outputs to choose from")
        head.weight = nn.Parameter(head.weight.detach()[chosen])
        if head.bias is not None:
            head.bias = nn.Parameter(head.bias.detach()[chosen])
        if isinstance(head, nn.Linear):
            head.out_features = len(chosen)
        else:
            head.out_channels = len(chosen)
    network.num_classes = len(chosen)


def zero_heads(network: nn.Module, names: list[str]) -> None:
    """Set new classifiers to zero, so that the first loss is log(C)."""
    with torch.no_grad():
        for name in names:
            for parameter in network.get_submodule(name).parameters():
                parameter.zero_()


@dataclass(frozen=True)
class FinetuneReport:
    """Which tensors come from the file, are resampled, stay in the file, or are new."""

    kept: list[str] = field(default_factory=list)
    resampled: list[str] = field(default_factory=list)
    dropped: list[str] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)
    share: float = 0.0
    new_heads: list[str] = field(default_factory=list)

    def describe(self) -> str:
        parts = [f"{len(self.kept)} tensors kept ({100 * self.share:.0f}% of the parameters)"]
        for word, names in (
            ("resampled", self.resampled),
            ("dropped", self.dropped),
            ("new", self.missing),
        ):
            if names:
                parts.append(f"{len(names)} {word} ({some(names, 4)})")
        if self.new_heads:
            parts.append(f"new head at zero ({', '.join(self.new_heads)})")
        return ", ".join(parts)


def finetune(
    network: nn.Module, source: str, *, outputs: Sequence[int] | None = None
) -> FinetuneReport:
    """Initialise `network` from a file with another head, resolution or number of prefix tokens.

    The position embedding is resampled (bicubic) to the network's patch grid, square or not; the
    class and distillation entries are kept. A tensor with another name or shape is dropped. A
    head that the file does not fill starts at zero.
    outputs: the file's output for each one of the network; [] leaves out the file's classifiers,
        and None keeps the positions.
    Raises UserError if less than half of the network's parameters come from the file, and for
    values that are not finite.
    """
    with safe_load.in_one_line(f"--finetune {source}: its weights do not fit the model"):
        content = safe_load.read_weights_file(source)
        weights = find_weights(content, source)
        return _finetune(network, source, weights, _settings_of(content), outputs)


def _finetune(
    network: nn.Module,
    source: str,
    weights: Weights,
    settings: Mapping[str, Any],
    outputs: Sequence[int] | None,
) -> FinetuneReport:
    wanted = network.state_dict()
    weights = in_timms_names(weights, network, source)
    safe_load.check_numbers(weights, wanted)
    taken = {
        name: value
        for name, value in weights.items()
        if name in wanted and value.shape == wanted[name].shape
    }
    resampled: list[str] = []
    heads = tuple(f"{name}." for name in head_names(network))
    for name in [name for name in weights if name.startswith(heads)]:
        if outputs == []:
            taken.pop(name, None)
        elif outputs and weights[name].dim() and len(weights[name]) > max(outputs):
            value = weights[name][list(outputs)]
            if name in wanted and value.shape == wanted[name].shape:
                taken[name] = value
    own, file = _position_layouts(network, weights, settings)
    same_width = own and file and weights["pos_embed"].shape[-1] == wanted["pos_embed"].shape[-1]
    if same_width and file != own:
        taken |= positions.convert(weights, file, network, own)  # type: ignore[arg-type]
        resampled.append("pos_embed")
    parameters = dict(network.named_parameters())
    total = sum(p.numel() for p in parameters.values())
    share = sum(p.numel() for name, p in parameters.items() if name in taken) / max(total, 1)
    if share < MIN_MATCH:
        raise UserError(
            f"--finetune {source}: only {100 * share:.0f}% of the parameters fit; it looks like "
            f"{seems_to_be(weights)}, the model is {seems_to_be(wanted)}"
        )
    _check_attention_heads(network, source, settings, Advice())
    network.load_state_dict(taken, strict=False)
    new_heads = [name for name in head_names(network) if f"{name}.weight" not in taken]
    zero_heads(network, new_heads)
    dropped = [name for name in weights if name not in taken]
    if any(name.startswith(REGISTERS) for name in dropped):
        _logger.warning("%s: its register tokens are dropped, the model has none", source)
    return FinetuneReport(
        kept=[name for name in taken if name not in resampled],
        resampled=resampled,
        dropped=dropped,
        missing=[name for name in wanted if name not in taken],
        share=share,
        new_heads=new_heads,
    )


def freeze_all_but_attention(network: nn.Module) -> None:
    """Train attention, classifiers and position embedding only.

    Attention is found by module type, so parallel blocks and class attention count too.
    Raises UserError if the network has none.
    Source: Touvron et al. 2022 (arXiv 2203.09795), DeiT's --attn-only.
    """
    attention = [
        module
        for module in network.modules()
        if re.search(r"attn|attention", type(module).__name__, re.IGNORECASE)
        and next(module.parameters(), None) is not None
    ]
    if not attention:
        raise UserError(
            f"--attn-only: {type(network).__name__} has no attention to train; leave the flag out"
        )
    network.requires_grad_(False)
    for module in attention:
        module.requires_grad_(True)
    for name in head_names(network):
        network.get_submodule(name).requires_grad_(True)
    if isinstance(getattr(network, "pos_embed", None), torch.nn.Parameter):
        network.pos_embed.requires_grad_(True)
