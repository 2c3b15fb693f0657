"""Which network the weights of a file are for, and their names in timm's terms.

Shapes: D width, C classes. `base.safe_load` reads the files.
"""

import inspect
import logging
import re
import sys
from collections import Counter
from collections.abc import Collection, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from base.errors import UserError
from models.deit import VITS
from models.released import NETWORKS

_logger = logging.getLogger(__name__)
Weights = dict[str, Tensor]
RAW_KEYS = ("model", "state_dict")
EMA_KEYS = ("model_ema", "state_dict_ema")
SELF_DISTILLED_KEYS = ("teacher", "student")  # DINO's; its evaluation takes the teacher
POSITIONS = re.compile(r"(^|\.)(pos_embed|positional_embedding|rel\w*_pos\w*)($|\.)")
WRAPPERS = ("module.", "_orig_mod.")  # left by DDP and torch.compile

HUGGING_FACE_PATCHES = "embeddings.patch_embeddings.projection.weight"
HUGGING_FACE_NAMES = (  # of transformers' ViT, DeiT and DINOv2, in this order
    (r"^embeddings\.cls_token$", "cls_token"),
    (r"^embeddings\.distillation_token$", "dist_token"),
    (r"^embeddings\.register_tokens$", "reg_token"),
    (r"^embeddings\.position_embeddings$", "pos_embed"),
    (r"^embeddings\.patch_embeddings\.projection\.", "patch_embed.proj."),
    (r"^encoder\.layer\.(\d+)\.", r"blocks.\1."),
    (r"\.layernorm_before\.", ".norm1."),
    (r"\.layernorm_after\.", ".norm2."),
    (r"\.attention\.attention\.(query|key|value)\.", r".attn.\1."),
    (r"\.attention\.output\.dense\.", ".attn.proj."),
    (r"\.intermediate\.dense\.", ".mlp.fc1."),
    (r"^(blocks\.\d+)\.output\.dense\.", r"\1.mlp.fc2."),
    (r"\.layer_scale(\d)\.lambda1$", r".ls\1.gamma"),
    (r"^layernorm\.", "norm."),
    (r"^(?:cls_)?classifier\.", "head."),
    (r"^distillation_classifier\.", "head_dist."),
)
HUGGING_FACE_UNUSED = ("pooler.", "embeddings.mask_token")  # not part of a classifier


def find_weights(content: Mapping[str, Any], source: str, key: str | None = None) -> Weights:
    """Return the state dict in what a file holds, without the prefixes of DDP and torch.compile.

    key: under which it is; default: `model`, `state_dict`, or DINO's `teacher`.
    Raises UserError if there is none.
    """
    if key:
        if not is_weights(content.get(key)):
            raise UserError(f"{source}: has no weights under {key!r}, only {some(content)}")
        weights = content[key]
    else:
        keys = [name for name in RAW_KEYS + SELF_DISTILLED_KEYS if is_weights(content.get(name))]
        weights = content[keys[0]] if keys else content
        if keys and keys[0] in SELF_DISTILLED_KEYS:
            _logger.info("%s: the weights under %r are taken", source, keys[0])
    if not is_weights(weights):
        raise UserError(f"{source}: holds no weights, only {some(content)}")
    if nameless := [key for key in weights if not isinstance(key, str)]:
        raise UserError(f"{source}: {some(nameless)} is no name of a tensor; damaged or changed")
    weights = {name: value for name, value in weights.items() if _is_entry(name, value)}
    for prefix in WRAPPERS:
        if all(name.startswith(prefix) for name in weights):
            weights = {name[len(prefix) :]: value for name, value in weights.items()}
    return weights


def is_weights(value: Any) -> bool:
    return isinstance(value, Mapping) and any(_is_entry(*item) for item in value.items())


def _is_entry(name: Any, value: Any) -> bool:
    return isinstance(name, str) and isinstance(value, Tensor)


def some(names: Iterable[Any], limit: int = 5) -> str:
    """Return the first names as words."""
    listed = [str(name) for name in names]
    return ", ".join(listed[:limit]) + (", ..." if len(listed) > limit else "") or "nothing"


def in_timms_names(weights: Weights, network: nn.Module, source: str) -> Weights:
    """Return the weights under the names of `network`, as far as their layout is known.

    Known are a prefix (Lightning's `model.`, `backbone.`, DINO's) and the names of Hugging Face's
    ViT, DeiT and DINOv2. timm converts others for its architectures (DeiT III, CaiT, ResMLP, CLIP,
    ...). A position embedding keeps its size.
    Raises UserError for a file that holds two such networks.
    """
    wanted = network.state_dict()
    if set(weights) == set(wanted):
        return weights
    weights = _from_hugging_face(weights) or _without_prefix(weights, wanted, source)
    return weights if set(weights) == set(wanted) else _by_timm(weights, network)


def _without_prefix(weights: Weights, wanted: Collection[str], source: str) -> Weights:
    """Return the entries below the prefix under which most of the wanted names are."""
    counts: Counter[str] = Counter()
    for name in weights:
        parts = name.split(".")
        for start in range(len(parts)):
            if ".".join(parts[start:]) in wanted:
                counts["".join(f"{part}." for part in parts[:start])] += 1
    most = max(counts.values(), default=0)
    best = [prefix for prefix, count in counts.items() if count == most]
    if not best or "" in best or most < len(wanted) / 2:
        return weights
    if len(best) > 1:
        best = [prefix for prefix in best if "teacher" in prefix] or best
    if len(best) > 1:
        raise UserError(
            f"{source}: holds {len(best)} networks, under {some(best)}; save one of them alone"
        )
    rest = [name for name in weights if not name.startswith(best[0])]
    if rest:
        _logger.info("%s: weights under %r; left out: %s", source, best[0], some(rest))
    return {
        name[len(best[0]) :]: value for name, value in weights.items() if name.startswith(best[0])
    }


def _from_hugging_face(weights: Weights) -> Weights | None:
    """Return the weights of a ViT or DeiT of `transformers` in timm's names; None for others."""
    roots = [name for name in weights if name.endswith(HUGGING_FACE_PATCHES)]
    if not roots:
        return None
    root, found = roots[0][: -len(HUGGING_FACE_PATCHES)], {}
    for name, value in weights.items():
        name = name.removeprefix(root)
        for pattern, replacement in HUGGING_FACE_NAMES:
            name = re.sub(pattern, replacement, name)
        if not name.startswith(HUGGING_FACE_UNUSED):
            found[name] = value
    for name in [name for name in found if ".attn.query." in name]:
        parts = [name.replace(".query.", f".{part}.") for part in ("query", "key", "value")]
        if all(part in found for part in parts):
            found[name.replace(".query.", ".qkv.")] = torch.cat([found.pop(p) for p in parts])
    return found


def _by_timm(weights: Weights, network: nn.Module) -> Weights:
    """Rename by timm's own function for this architecture, where it has one.

    timm also resamples position and patch embeddings, silently. These keep their shape here.
    """
    rename = getattr(sys.modules[type(network).__module__], "checkpoint_filter_fn", None)
    if rename is None:
        return weights
    own, kept = network.state_dict().get("pos_embed"), dict(weights)
    name = _name_of_positions(weights) if own is not None and own.dim() == 3 else ""
    if name:
        kept[name] = torch.zeros_like(own if weights[name].dim() == 3 else own[0])
    options = {"adapt_layer_scale": True}  # DeiT III's gamma_1 is timm's ls1.gamma
    if "adapt_layer_scale" not in inspect.signature(rename).parameters:
        options = {}
    try:
        renamed = rename(kept, network, **options)
    except (KeyError, RuntimeError, AttributeError, ValueError, IndexError, TypeError):
        return weights  # another architecture: the caller reports which
    if not isinstance(renamed, dict):
        return weights
    as_they_were = {
        key: value
        for key, value in weights.items()
        if key in renamed
        and renamed[key].dim() == value.dim()
        and renamed[key].shape != value.shape
    }
    if name and "pos_embed" in renamed:
        as_they_were["pos_embed"] = (
            weights[name] if weights[name].dim() == 3 else weights[name][None]
        )
    return renamed | as_they_were


def _name_of_positions(weights: Weights) -> str:
    """Return the name of the position embedding of the image tokens; "" if there is none."""
    names = [
        name
        for name, value in weights.items()
        if name.endswith(("pos_embed", "positional_embedding")) and value.dim() in (2, 3)
    ]
    names.sort(key=lambda name: "visual" not in name)  # CLIP's file has one of the text, too
    return names[0] if names else ""


def seems_to_be(weights: Mapping[str, Tensor]) -> str:
    """Return what network a state dict belongs to, as far as its names and shapes show it."""
    weights = _from_hugging_face(dict(weights)) or _below_patches(weights)
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
    registers = weights.get("reg_token", weights.get("register_tokens"))
    if registers is not None and registers.dim() == 3:
        shape += f", {registers.shape[1]} register tokens"
    found = [name for name, own in names.items() if own == (width, depth, side)]
    return f"{found[0]} ({shape})" if found else f"{kind} of {shape}"


def _below_patches(weights: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    """Return the entries that share the prefix of the patch embedding."""
    mark = "patch_embed.proj.weight"
    prefix = next((name[: -len(mark)] for name in weights if name.endswith(mark)), "")
    return {
        name[len(prefix) :]: value for name, value in weights.items() if name.startswith(prefix)
    }


def _family(weights: Mapping[str, Tensor]) -> tuple[str, dict[str, tuple[int, int, int]]]:
    """Return the kind of a state dict with patches and blocks, by timm's names or DeiT's, and the
    models of that kind: their width, depth and patch."""
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
