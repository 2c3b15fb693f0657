"""Every checkpoint that came with DeiT's code: DeiT, DeiT III, CaiT and ResMLP, by DeiT's names.

A network is one line in `NETWORKS`, a file one line in `RELEASED`, by `name.tag`; the first tag of
a name is its default. They are timm's classes with DeiT's recipe, which differs from timm's where a
run starts from scratch. LayerScale begins at DeiT's value: 1e-4 for DeiT III (timm 1e-6), 0.1 for
resmlp_12 (timm 1e-4). Stochastic depth is the same in every block; timm's ViT ramps it.
PatchConvNet's files are left out: timm has no such class.

Accuracies are Acc@1 in percent on ImageNet's 50,000 validation images, of DeiT's READMEs; with
three decimals those of timm's results table, where DeiT printed none. A crop is the one at which
the number was measured, timm's where DeiT's README names none.
"""

import difflib
import fnmatch
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any
from urllib.parse import urlparse

import timm
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.models import build_model_with_cfg, generate_default_cfgs
from timm.models.cait import Cait
from timm.models.mlp_mixer import Affine, MlpMixer, ResBlock
from timm.models.vision_transformer import Block, VisionTransformer
from timm.models.vision_transformer import checkpoint_filter_fn as vit_filter
from torch import nn

from base import terminal
from base.errors import UserError
from base.safe_load import HASH_IN_NAME
from models.deit import FILES, VITS, register

FULL_VALIDATION_SET = 50_000  # images; with fewer the published number cannot be compared


@dataclass(frozen=True)
class Released:
    """A released file: its name below FILES, Acc@1 in percent, and how it was measured.

    timm: timm's name of the same weights. A file name without hash has no published one.
    """

    file: str
    acc1: float | None
    timm: str
    pixels: int = 224
    crop: float = 0.875
    note: str = ""

    @property
    def url(self) -> str:
        """URL of the file; `#unverified` marks one without a published hash."""
        return FILES + self.file + ("" if self.hash else "#unverified")

    @property
    def hash(self) -> str:
        """The beginning of the file's SHA-256, from its name, or ""."""
        found = HASH_IN_NAME.search(self.file)
        return found.group(1) if found else ""

    def beside(self, acc1: float, count: int) -> str:
        """Return the published accuracy and the difference to `acc1` (percent) of `count` images.

        Empty where the two cannot be compared: no published number, or not the full set.
        """
        if self.acc1 is None or count != FULL_VALIDATION_SET:
            return ""
        return (
            f"{self.acc1:g}% for {self.file} ({self.pixels} px, crop {self.crop:g}); measured "
            f"{acc1:.3f}%, {acc1 - self.acc1:+.3f}"
        )


def _deit3(size: str, patch: int, *rows: tuple) -> dict[str, Released]:
    """rows: (pixels, Acc@1 trained on ImageNet-1k, Acc@1 of ImageNet-21k and then 1k)."""
    found = {}
    for column, (data, tag) in enumerate((("1k", "fb_in1k"), ("21k", "fb_in22k_ft_in1k"))):
        for pixels, *acc1 in rows:
            version = "_v1" if (size, data) == ("huge", "21k") else ""
            found[f"deit_{size}_patch{patch}_LS.{pixels}_{data}"] = Released(
                f"deit_3_{size}_{pixels}_{data}{version}.pth",
                acc1[column],
                f"deit3_{size}_patch{patch}_{pixels}.{tag}",
                pixels,
                0.9 if (pixels, data) == (224, "1k") else 1.0,
                "" if data == "1k" else "pre-trained on ImageNet-21k, fine-tuned on 1k",
            )
    return found


def _cait(name: str, file: str, acc1: float) -> dict[str, Released]:
    pixels = int(file[-3:])
    same = f"cait_{name[5:].lower().removesuffix('_224')}_{pixels}.fb_dist_in1k"
    return {f"{name}.dist": Released(f"{file}.pth", acc1, same, pixels, 1.0)}


def _resmlp(name: str, same: str, acc1: float, dist: float, **more: float | None) -> dict:
    tags = {"no_dist": (acc1, "fb_in1k"), "dist": (dist, "fb_distilled_in1k")}
    tags |= {"dino": (None, "fb_dino")} if "dino" in more else {}
    tags |= {"22k": (more["in22k"], "fb_in22k_ft_in1k")} if "in22k" in more else {}
    notes = {"dino": "self-supervised", "22k": "pre-trained on ImageNet-22k, fine-tuned on 1k"}
    return {
        f"{name}.{tag}": Released(
            f"{name}_{tag}.pth", number, f"{same}.{theirs}", 224, 0.9, notes.get(tag, "")
        )
        for tag, (number, theirs) in tags.items()
    }


RELEASED: dict[str, Released] = {
    **{
        f"{name}.fb_in1k": Released(vit.file, vit.acc1, f"{name}.fb_in1k", vit.pixels)
        for name, vit in VITS.items()
        if vit.file
    },
    **_deit3("small", 16, (224, 81.4, 83.1), (384, 83.4, 84.8)),
    **_deit3("medium", 16, (224, 83.0, 84.5)),
    **_deit3("base", 16, (224, 83.8, 85.7), (384, 85.0, 86.7)),
    **_deit3("large", 16, (224, 84.9, 87.0), (384, 85.8, 87.7)),
    **_deit3("huge", 14, (224, 85.2, 87.2)),
    **_cait("cait_XXS24_224", "XXS24_224", 78.400),
    **_cait("cait_XXS24", "XXS24_384", 80.954),
    **_cait("cait_XXS36_224", "XXS36_224", 79.750),
    **_cait("cait_XXS36", "XXS36_384", 82.204),
    **_cait("cait_XS24", "XS24_384", 84.1),
    **_cait("cait_S24_224", "S24_224", 83.5),
    **_cait("cait_S24", "S24_384", 85.1),
    **_cait("cait_S36", "S36_384", 85.4),
    **_cait("cait_M36", "M36_384", 86.1),
    **_cait("cait_M48", "M48_448", 86.5),
    **_resmlp("resmlp_12", "resmlp_12_224", 76.660, 77.8, dino=None),
    **_resmlp("resmlp_24", "resmlp_24_224", 79.380, 80.8, dino=None),
    **_resmlp("resmlp_36", "resmlp_36_224", 79.772, 81.1),
    **_resmlp("resmlpB_24", "resmlp_big_24_224", 81.034, 83.6, in22k=84.4),
    # timm's class and name, but timm's default weights of that name are not DeiT's teacher
    "regnety_160.deit_in1k": Released(
        "regnety_160-a5fe301d.pth", 83.0, "regnety_160.deit_in1k", 224, 0.95, "DeiT's teacher"
    ),
}


def _vit(width: int, depth: int, heads: int, patch: int = 16) -> tuple:
    shape = {"embed_dim": width, "depth": depth, "num_heads": heads, "patch_size": patch}
    return VisionTransformer, shape | {"no_embed_class": True, "init_values": 1e-4}


def _class_attention(width: int, depth: int, heads: int, init: float) -> tuple:
    shape = {"embed_dim": width, "depth": depth, "num_heads": heads, "patch_size": 16}
    return Cait, shape | {"init_values": init}


def _mlp(width: int, depth: int, patch: int, init: float) -> tuple:
    shape = {"embed_dim": width, "num_blocks": depth, "patch_size": patch, "mlp_ratio": 4}
    return MlpMixer, shape | {
        "block_layer": partial(ResBlock, init_values=init),
        "norm_layer": Affine,
    }


NETWORKS: dict[str, tuple[type[nn.Module], dict[str, Any]]] = {
    "deit_small_patch16_LS": _vit(384, 12, 6),
    "deit_medium_patch16_LS": _vit(512, 12, 8),
    "deit_base_patch16_LS": _vit(768, 12, 12),
    "deit_large_patch16_LS": _vit(1024, 24, 16),
    "deit_huge_patch14_LS": _vit(1280, 32, 16, patch=14),
    "cait_XXS24_224": _class_attention(192, 24, 4, 1e-5),
    "cait_XXS24": _class_attention(192, 24, 4, 1e-5),
    "cait_XXS36_224": _class_attention(192, 36, 4, 1e-5),
    "cait_XXS36": _class_attention(192, 36, 4, 1e-5),
    "cait_XS24": _class_attention(288, 24, 6, 1e-5),
    "cait_S24_224": _class_attention(384, 24, 8, 1e-5),
    "cait_S24": _class_attention(384, 24, 8, 1e-5),
    "cait_S36": _class_attention(384, 36, 8, 1e-6),
    "cait_M36": _class_attention(768, 36, 16, 1e-6),
    "cait_M48": _class_attention(768, 48, 16, 1e-6),
    "resmlp_12": _mlp(384, 12, 16, 0.1),
    "resmlp_24": _mlp(384, 24, 16, 1e-5),
    "resmlp_36": _mlp(384, 36, 16, 1e-6),
    "resmlpB_24": _mlp(768, 24, 8, 1e-6),
}
# What DeiT's --drop reached in each family; timm's own drop_rate is before the head alone.
DROPOUT = {
    VisionTransformer: ("drop_rate",),
    Cait: ("pos_drop_rate", "proj_drop_rate"),
    MlpMixer: ("proj_drop_rate",),
}


def find(name: str) -> Released | None:
    """Return the file of a model name with tag, or the first file of one without."""
    if name in RELEASED:
        return RELEASED[name]
    files = [file for key, file in RELEASED.items() if key.partition(".")[0] == name]
    return files[0] if files else None


def published(name: str, source: str = "") -> Released | None:
    """Return the released file that `source` (a path or URL) is a copy of, by its name.

    Without a source it is the model's default file.
    """
    if not source:
        return find(name)
    file = os.path.basename(urlparse(source).path)
    return next((found for found in RELEASED.values() if found.file == file), None)


def plain_timm(name: str) -> tuple[str, dict[str, Any]]:
    """Return the architecture and arguments with which timm alone builds a model of this name.

    Its state dict and logits are the same. `resnet_pico` has no such architecture and is returned
    as it is: no ResNet of timm leaves out the pooling of its stem.
    """
    architecture = name.partition(".")[0]
    vit = VITS.get(architecture)
    if vit is None or vit.file:
        found = find(architecture)
        return (found.timm if found else name).partition(".")[0], {}
    kind = "distilled_" if "distilled" in architecture else ""
    return f"deit_tiny_{kind}patch16_224", {
        "patch_size": vit.patch,
        "embed_dim": vit.width,
        "depth": vit.depth,
        "num_heads": vit.heads,
    }


def table(pattern: str = "*") -> str:
    """Return the released checkpoints with names that match `pattern`, one a line, as text.

    pattern: a part of the name, or the whole with wildcards, in any case of letters. The hash is
    the beginning of the file's SHA-256, where one is published.
    Raises UserError if none matches.
    """
    found = {name: file for name, file in RELEASED.items() if _matches(name, pattern)}
    others = [name for name in timm.list_models() if _matches(name, pattern) and not find(name)]
    others.sort(key=lambda name: not name.startswith(pattern.lower()))  # else by the alphabet
    if not found:
        raise UserError(
            f"--list-models {pattern}: no released checkpoint; {_instead(pattern, others)}"
        )
    rows = [("name", "top-1", "px", "crop", "hash", "file", "timm's name", "")]
    for name, file in found.items():
        acc1, crop = "-" if file.acc1 is None else f"{file.acc1:g}", f"{file.crop:g}"
        measured = acc1, str(file.pixels), crop
        rows.append((name, *measured, file.hash or "-", file.file, file.timm, file.note))
    lines = terminal.align(rows, left=len(rows[0]))
    if others and pattern.strip("*"):
        lines.append(f"timm also has {_some(others)}")
    return "\n".join(lines)


def _matches(name: str, pattern: str) -> bool:
    """Return whether `pattern` is a part of a name, or its whole, or that without its tag."""
    name, pattern = name.lower(), pattern.lower()
    if not set(pattern) & set("*?["):
        return pattern in name
    return any(fnmatch.fnmatchcase(part, pattern) for part in (name, name.partition(".")[0]))


def _instead(pattern: str, others: list[str]) -> str:
    """Return names close to a pattern that no released name matches."""
    if others:
        return f"timm has {_some(others)}, which --model takes too"
    if "patchconv" in pattern.lower():
        return "timm has no PatchConvNet, so DeiT's files of it are left out"
    names = list(dict.fromkeys(key.partition(".")[0] for key in RELEASED))
    close = difflib.get_close_matches(pattern, names, n=3)
    return f"did you mean {' or '.join(close)}?" if close else "--list-models alone prints all"


def _some(names: list[str], limit: int = 8) -> str:
    rest = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(names[:limit]) + rest


def _cfg(name: str, found: Released) -> dict[str, Any]:
    network = NETWORKS[name.partition(".")[0]][0]
    return {
        "url": found.url,
        "num_classes": 1000,
        "input_size": (3, found.pixels, found.pixels),
        "fixed_input_size": True,  # so that a tag brings its resolution
        "pool_size": None,
        "crop_pct": found.crop,
        "interpolation": "bicubic",
        "mean": IMAGENET_DEFAULT_MEAN,
        "std": IMAGENET_DEFAULT_STD,
        "first_conv": "stem.proj" if network is MlpMixer else "patch_embed.proj",
        "classifier": "head",
        "license": "apache-2.0",
    }


default_cfgs = generate_default_cfgs(
    {
        name: _cfg(name, file)
        for name, file in RELEASED.items()
        if name.partition(".")[0] in NETWORKS
    }
)
__all__ = ["NETWORKS", "RELEASED", "Released", "find", "plain_timm", "published", "table"]


def _factory(name: str) -> Callable[..., nn.Module]:
    network, shape = NETWORKS[name]

    def factory(
        pretrained: bool = False,
        *,
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        **options: Any,
    ) -> nn.Module:
        settings = shape | dict.fromkeys(DROPOUT[network], drop_rate) | options
        settings["drop_path_rate"] = drop_path_rate
        if network is VisionTransformer:
            settings["block_fn"] = partial(_constant_depth, drop_path_rate)
            rename = partial(vit_filter, adapt_layer_scale=True)
        else:
            rename = sys.modules[network.__module__].checkpoint_filter_fn
        return build_model_with_cfg(
            network,
            name,
            pretrained,
            pretrained_filter_fn=rename,
            feature_cfg={"out_indices": settings.pop("out_indices", 3), "feature_cls": "getter"},
            **settings,
        )

    return factory


def _constant_depth(drop_path_rate: float, **block: Any) -> nn.Module:
    return Block(**block | {"drop_path": drop_path_rate})


for _name in NETWORKS:
    _doc = f"Return {_name} as DeiT's code built it, options as timm's."
    register(__name__, _name, _factory(_name), _doc)
