"""What the keys of a weights file mean: strict loading, and fine-tuning from another shape.

Shapes: D width, N tokens, C classes. Reading the file safely is `checkpoint.py`'s business.
"""

import inspect
import math
import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from timm.layers import resample_abs_pos_embed
from torch import Tensor, nn

from base import safe_load
from base.errors import UserError
from models.deit import VITS
from models.released import NETWORKS

Weights = dict[str, Tensor]
RAW_KEYS = ("model", "state_dict")
EMA_KEYS = ("model_ema", "state_dict_ema")
WRAPPERS = ("module.", "_orig_mod.")  # left by DDP and torch.compile
MIN_MATCH = 0.5  # fine-tuning from less than this share of the parameters is a mistake


def weight_keys(source: str) -> list[str]:
    """Return under which keys a file holds weights: raw ones, then the average; [""] if bare.

    Raises UserError where something else has the place of either.
    """
    content = safe_load.read_weights_file(source)
    held = [[key for key in keys if _is_weights(content.get(key))] for keys in (RAW_KEYS, EMA_KEYS)]
    for keys, found in zip((RAW_KEYS, EMA_KEYS), held):
        if not found and (there := [key for key in keys if content.get(key) is not None]):
            kind = type(content[there[0]]).__name__
            raise UserError(f"{source}: {there[0]} is a {kind} without weights: damaged or changed")
    return [keys[0] for keys in held if keys] or [""]


def load_weights(
    network: nn.Module, source: str, *, key: str | None = None, without_head: bool = False
) -> None:
    """Load any released format into `network`, strictly: every tensor, every shape.

    source: a path or URL; the file may be a bare state dict, or hold it under `model` or
        `state_dict`, with `module.` before the names, in half precision, or with DeiT III's,
        CaiT's or ResMLP's own names for a timm model.
    key: what to take from a file with several (`model_ema` is the average); default: `model`.
    without_head: the network has no classifier (0 classes), and the file's is left out.
    Raises UserError saying what the file seems to be, if it is not for this network.
    """
    with safe_load.in_one_line(f"{source}: its weights do not fit the model"):
        _load(network, source, read_weights(source, key), without_head)


def _load(network: nn.Module, source: str, weights: Weights, without_head: bool) -> None:
    wanted = network.state_dict()
    if set(weights) != set(wanted):
        weights = _in_timms_names(weights, network)
    if without_head:
        heads = tuple(f"{name}." for name in head_names(network))
        weights = {name: value for name, value in weights.items() if not name.startswith(heads)}
    wrong = [
        name for name in wanted if name in weights and weights[name].shape != wanted[name].shape
    ]
    if set(weights) != set(wanted) or wrong:
        raise UserError(f"{source}: {_why_not(weights, wanted, wrong, network)}")
    safe_load.check_numbers(weights, wanted)
    network.load_state_dict(weights)


def read_weights(source: str, key: str | None = None) -> Weights:
    """Return the state dict of a file, without its wrappers and the prefixes on its names."""
    content = safe_load.read_weights_file(source)
    if key:
        if not _is_weights(content.get(key)):
            raise UserError(f"{source}: has no weights under {key!r}, only {_some(content)}")
        weights = content[key]
    else:
        held = [content[name] for name in RAW_KEYS if _is_weights(content.get(name))]
        weights = held[0] if held else content
    if not _is_weights(weights):
        raise UserError(f"{source}: holds no weights, only {_some(content)}")
    if nameless := [key for key in weights if not isinstance(key, str)]:
        raise UserError(f"{source}: {_some(nameless)} is no name of a tensor; damaged or changed")
    weights = {name: value for name, value in weights.items() if _is_entry(name, value)}
    for prefix in WRAPPERS:
        if all(name.startswith(prefix) for name in weights):
            weights = {name[len(prefix) :]: value for name, value in weights.items()}
    return weights


def _is_weights(value: Any) -> bool:
    return isinstance(value, Mapping) and any(_is_entry(*item) for item in value.items())


def _is_entry(name: Any, value: Any) -> bool:
    return isinstance(name, str) and isinstance(value, Tensor)


def _some(names: Any, limit: int = 5) -> str:
    names = [str(name) for name in names]
    return ", ".join(names[:limit]) + (", ..." if len(names) > limit else "") or "nothing"


def _in_timms_names(weights: Weights, network: nn.Module) -> Weights:
    """Rename a released file's keys by timm's own table for this architecture, where it has one."""
    rename = getattr(sys.modules[type(network).__module__], "checkpoint_filter_fn", None)
    if rename is None:
        return weights
    own = network.state_dict().get("pos_embed")
    if own is not None and "pos_embed" in weights and weights["pos_embed"].shape != own.shape:
        return weights  # timm would resample it in silence
    options = {"adapt_layer_scale": True}  # DeiT III's gamma_1 is timm's ls1.gamma
    if "adapt_layer_scale" not in inspect.signature(rename).parameters:
        options = {}
    try:
        renamed = rename(dict(weights), network, **options)
    except (KeyError, RuntimeError, AttributeError, ValueError, IndexError, TypeError):
        return weights  # another architecture: the caller says which
    return renamed if isinstance(renamed, dict) else weights


def _why_not(
    weights: Weights, wanted: Mapping[str, Tensor], wrong: list[str], network: nn.Module
) -> str:
    """Return in words why a file does not fit: the classes, the resolution, or the architecture."""
    heads = head_names(network)
    same_names = set(weights) == set(wanted)
    if same_names and wrong and all(name.rpartition(".")[0] in heads for name in wrong):
        return (
            f"holds {weights[wrong[0]].shape[0]} classes, the model has "
            f"{wanted[wrong[0]].shape[0]}; set --nb-classes, or use --finetune for a new head"
        )
    if same_names and wrong == ["pos_embed"]:
        return (
            f"has {weights['pos_embed'].shape[1]} tokens, the model "
            f"{wanted['pos_embed'].shape[1]}: "
            "another resolution; set --input-size, or use --finetune to resample it"
        )
    missing, surplus = sorted(set(wanted) - set(weights)), sorted(set(weights) - set(wanted))
    parts = [f"it looks like {seems_to_be(weights)}; the model is {seems_to_be(wanted)}"]
    if missing:
        parts.append(
            f"the file lacks {len(missing)} of {len(wanted)} tensors ({_some(missing, 2)})"
        )
    if surplus:
        parts.append(f"{len(surplus)} of its own fit nowhere ({_some(surplus, 2)})")
    if wrong:
        name = wrong[0]
        parts.append(
            f"{len(wrong)} have another shape ({name}: {tuple(weights[name].shape)}, model "
            f"{tuple(wanted[name].shape)})"
        )
    return "; ".join(parts)


def seems_to_be(weights: Mapping[str, Tensor]) -> str:
    """Return what network a state dict belongs to, as far as its names and shapes tell."""
    patch = weights.get("patch_embed.proj.weight", weights.get("stem.proj.weight"))
    numbers = [int(m.group(1)) for name in weights if (m := re.match(r"blocks\.(\d+)\.", name))]
    if patch is None or patch.dim() != 4 or not numbers:
        size = sum(value.numel() for value in weights.values())
        kind = (
            "a CNN" if any(v.dim() == 4 and v.shape[-1] > 1 for v in weights.values()) else "no ViT"
        )
        return f"{kind} of {size / 1e6:.2f} M numbers (first: {next(iter(weights), 'nothing')})"
    width, side, depth = patch.shape[0], patch.shape[-1], max(numbers) + 1
    kind, names = _family(weights)
    shape = f"width {width}, depth {depth}, patch {side}"
    found = [name for name, own in names.items() if own == (width, depth, side)]
    return f"{found[0]} ({shape})" if found else f"{kind} of {shape}"


def _family(weights: Mapping[str, Tensor]) -> tuple[str, dict[str, tuple[int, int, int]]]:
    """Return in words what a state dict with patches and blocks is of, by timm's names or DeiT's,
    and the models of that kind: their width, depth and patch."""
    for kind, prefix, marks in (
        ("a CaiT", "cait", ("blocks_token_only.0.attn.q.weight",)),
        ("a ResMLP", "resmlp", ("blocks.0.linear_tokens.weight", "blocks.0.attn.weight")),
        ("a ViT with LayerScale", "deit", ("blocks.0.ls1.gamma", "blocks.0.gamma_1")),
    ):
        if any(mark in weights for mark in marks):
            shapes = {name: own for name, (_, own) in NETWORKS.items() if name.startswith(prefix)}
            return kind, {
                name: (own["embed_dim"], own.get("depth") or own["num_blocks"], own["patch_size"])
                for name, own in shapes.items()
            }
    distilled = "dist_token" in weights
    return "a ViT", {
        name: (vit.width, vit.depth, vit.patch)
        for name, vit in VITS.items()
        if ("distilled" in name) == distilled
    }


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


@dataclass(frozen=True)
class FinetuneReport:
    """Which tensors fine-tuning took, resampled, left in the file, or starts afresh."""

    kept: list[str] = field(default_factory=list)
    resampled: list[str] = field(default_factory=list)
    dropped: list[str] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)
    share: float = 0.0

    def describe(self) -> str:
        parts = [f"{len(self.kept)} tensors kept ({100 * self.share:.0f}% of the parameters)"]
        for what in ("resampled", "dropped", "missing"):
            names = getattr(self, what)
            if names:
                word = "new" if what == "missing" else what
                parts.append(f"{len(names)} {word} ({_some(names, 4)})")
        return ", ".join(parts)


def finetune(
    network: nn.Module, source: str, *, outputs: Sequence[int] | None = None
) -> FinetuneReport:
    """Start `network` from a file with another head, resolution or number of prefix tokens.

    The position embedding is resampled (bicubic) to the network's patch grid, square or not; the
    class and distillation entries are kept. A tensor whose name or shape fits nowhere is dropped.
    outputs: the file's output for each one of the network; [] leaves the classifiers as they are,
        and None keeps the positions.
    Raises UserError if less than half of the network's parameters come from the file, and for what
    is no number.
    """
    with safe_load.in_one_line(f"--finetune {source}: its weights do not fit the model"):
        return _finetune(network, source, read_weights(source), outputs)


def _finetune(
    network: nn.Module, source: str, weights: Weights, outputs: Sequence[int] | None
) -> FinetuneReport:
    wanted = network.state_dict()
    if not set(weights) & set(wanted):
        weights = _in_timms_names(weights, network)
    safe_load.check_numbers(weights, wanted)
    taken: Weights = {}
    resampled: list[str] = []
    heads = tuple(f"{name}." for name in head_names(network))
    for name, value in weights.items():
        if name not in wanted or (name.startswith(heads) and outputs == []):
            continue
        if outputs and name.startswith(heads) and value.dim() and len(value) > max(outputs):
            value = value[list(outputs)]
        if name == "pos_embed" and _needs_resampling(weights, network):
            taken[name] = _resample(value, weights, network)
            resampled.append(name)
        elif value.shape == wanted[name].shape:
            taken[name] = value
    parameters = dict(network.named_parameters())
    total = sum(p.numel() for p in parameters.values())
    share = sum(p.numel() for name, p in parameters.items() if name in taken) / max(total, 1)
    if share < MIN_MATCH:
        raise UserError(
            f"--finetune {source}: only {100 * share:.0f}% of the parameters fit; it looks like "
            f"{seems_to_be(weights)}, the model is {seems_to_be(wanted)}"
        )
    network.load_state_dict(taken, strict=False)
    return FinetuneReport(
        kept=[name for name in taken if name not in resampled],
        resampled=resampled,
        dropped=[name for name in weights if name not in taken],
        missing=[name for name in wanted if name not in taken],
        share=share,
    )


def _prefix_tokens(weights: Mapping[str, Tensor]) -> int:
    return sum(name in weights for name in ("cls_token", "dist_token"))


def _needs_resampling(weights: Weights, network: nn.Module) -> bool:
    own = network.state_dict()
    return hasattr(network, "patch_embed") and (
        weights["pos_embed"].shape != own["pos_embed"].shape
        or _prefix_tokens(weights) != _prefix_tokens(own)
    )


def _resample(positions: Tensor, weights: Weights, network: nn.Module) -> Tensor:
    """Return `positions` (1, N, D) for the network's tokens; what the file lacks stays as it is."""
    own = network.state_dict()["pos_embed"].clone()
    grid = network.patch_embed.grid_size
    prefix_own = own.shape[1] - grid[0] * grid[1]
    prefix = _prefix_tokens(weights) if prefix_own else 0
    if positions.dim() != 3 or len(positions) != 1 or positions.shape[1] <= prefix:
        raise UserError(f"the file's position embedding has shape {tuple(positions.shape)}")
    side = math.isqrt(positions.shape[1] - prefix)
    old = (side, side)
    if side * side != positions.shape[1] - prefix:
        if positions.shape[1] - prefix != grid[0] * grid[1]:
            raise UserError(
                f"the file's position embedding has {positions.shape[1] - prefix} patches, which "
                f"is no square, and the model's grid is {grid[0]}x{grid[1]}; use the resolution it "
                "was trained at"
            )
        old = tuple(grid)
    if positions.shape[-1] != own.shape[-1]:
        return own
    patches = resample_abs_pos_embed(
        positions[:, prefix:].float(), list(grid), list(old), num_prefix_tokens=0
    )
    shared = min(prefix, prefix_own)
    own[:, :shared] = positions[:, :shared]
    own[:, prefix_own:] = patches
    return own


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
        raise UserError(f"--attn-only: {type(network).__name__} has no attention to train")
    network.requires_grad_(False)
    for module in attention:
        module.requires_grad_(True)
    for name in head_names(network):
        network.get_submodule(name).requires_grad_(True)
    if isinstance(getattr(network, "pos_embed", None), torch.nn.Parameter):
        network.pos_embed.requires_grad_(True)
