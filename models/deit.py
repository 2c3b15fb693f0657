"""Vision transformers with a class and a distillation token, registered with timm.

Shapes: B batch, N tokens (class, distillation, then the patches row by row), D width, C classes.
State-dict keys are those of the released DeiT files. The table below is the registry: a model is
one line in it.
"""

import sys
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from timm.models.deit import VisionTransformerDistilled
from timm.models.resnet import BasicBlock, ResNet
from timm.models.vision_transformer import VisionTransformer, checkpoint_filter_fn
from torch import Tensor, nn

FILES = "https://dl.fbaipublicfiles.com/deit/"


class DistilledVisionTransformer(VisionTransformerDistilled):
    """timm's distilled ViT, which by default returns both logits in training.

    In training it returns (class logits, distillation logits), (B, C) each, and their mean after
    `set_distilled_training(False)`; in evaluation their mean. With `global_pool=""` it returns the
    tokens (B, N, D), as timm's plain ViT. Takes VisionTransformer's arguments but `reg_tokens`.
    Source: Touvron et al. 2021 (arXiv 2012.12877).
    """

    def __init__(self, *, num_classes: int = 1000, weight_init: str = "", **vit: Any) -> None:
        # Not timm's order: a seed gives the same initial weights as in earlier versions, and both
        # tokens start as in DeiT (std 0.02; timm's class token starts with std 1e-6).
        VisionTransformer.__init__(self, num_classes=num_classes, weight_init="skip", **vit)
        if self.global_pool not in ("", "token"):
            raise ValueError(f"global_pool {self.global_pool!r}: a distilled ViT has 'token' or ''")
        self.weight_init_mode = weight_init
        VisionTransformer.init_weights(self, needs_reset=False)
        self.num_prefix_tokens = 2
        self.distilled_training = True
        width, tokens = self.embed_dim, self.patch_embed.num_patches + self.num_prefix_tokens
        options = {key: vit.get(key) for key in ("device", "dtype")}
        self.dist_token = nn.Parameter(torch.zeros(1, 1, width, **options))
        self.pos_embed = nn.Parameter(torch.zeros(1, tokens, width, **options))
        self.head_dist = nn.Linear(width, num_classes, **options) if num_classes else nn.Identity()
        if num_classes:
            nn.init.trunc_normal_(self.head_dist.weight, std=0.02)
            nn.init.zeros_(self.head_dist.bias)
        for tensor in (self.cls_token, self.dist_token, self.pos_embed):
            nn.init.trunc_normal_(tensor, std=0.02)

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """x: (B, N, D). Returns (B, C), or (B, D) before the heads, or both logits in training."""
        if self.global_pool == "":
            return x
        cls, dist = self.head_drop(x[:, 0]), self.head_drop(x[:, 1])  # (B, D) each
        if pre_logits:
            return (cls + dist) / 2
        cls, dist = self.head(cls), self.head_dist(dist)  # (B, C) each
        if self.distilled_training and self.training and not torch.jit.is_scripting():
            return cls, dist  # type: ignore[return-value]
        return (cls + dist) / 2

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Replace both heads by new ones for `num_classes`, 0 for none."""
        super().reset_classifier(num_classes, global_pool)
        if global_pool is not None:
            self.global_pool = global_pool


@dataclass(frozen=True)
class ViT:
    """Shape of a ViT, and its released file with its Acc@1 in percent."""

    width: int
    depth: int
    heads: int
    patch: int = 16
    pixels: int = 224
    file: str = ""
    acc1: float | None = None


SHAPES = {"tiny": (192, 12, 3), "small": (384, 12, 6), "base": (768, 12, 12)}


def _released(name: str, file_hash: str, acc1: float) -> dict[str, ViT]:
    file, pixels = f"{name}-{file_hash}.pth", int(name[-3:])
    return {name: ViT(*SHAPES[name.split("_")[1]], pixels=pixels, file=file, acc1=acc1)}


# Hashes in file names and accuracies are of DeiT's README (its evaluation commands, crop 0.875).
VITS = {
    **_released("deit_tiny_patch16_224", "a1311bcf", 72.202),
    **_released("deit_small_patch16_224", "cd65a155", 79.854),
    **_released("deit_base_patch16_224", "b5f2ef4d", 81.846),
    **_released("deit_tiny_distilled_patch16_224", "b40b3cf7", 74.476),
    **_released("deit_small_distilled_patch16_224", "649709d9", 81.164),
    **_released("deit_base_distilled_patch16_224", "df68dfff", 83.372),
    **_released("deit_base_patch16_384", "8de9b5d1", 82.890),
    **_released("deit_base_distilled_patch16_384", "d0272ac0", 85.224),
    # for the quick start: small images on a CPU
    "deit_pico_patch4_32": ViT(64, 4, 4, patch=4, pixels=32),
    "deit_pico_distilled_patch4_32": ViT(64, 4, 4, patch=4, pixels=32),
    "deit_tiny_distilled_patch4_32": ViT(192, 12, 3, patch=4, pixels=32),
    "deit_pico_patch8_32": ViT(64, 4, 4, patch=8, pixels=32),
    "deit_pico_distilled_patch8_32": ViT(64, 4, 4, patch=8, pixels=32),
}
CNN = "resnet_pico"  # the quick start's teacher


def _cfg(pixels: int, first_conv: str, classifier: Any, **more: Any) -> dict[str, Any]:
    small = pixels <= 32
    return {
        "num_classes": 10 if small else 1000,
        "input_size": (3, pixels, pixels),
        "pool_size": None,
        "crop_pct": 1.0 if small else 0.875,
        "interpolation": "bicubic",
        "mean": (0.5, 0.5, 0.5) if small else IMAGENET_DEFAULT_MEAN,
        "std": (0.5, 0.5, 0.5) if small else IMAGENET_DEFAULT_STD,
        "first_conv": first_conv,
        "classifier": classifier,
        "license": "apache-2.0",
        **more,
    }


def _vit_cfg(name: str) -> dict[str, Any]:
    vit = VITS[name]
    classifier = ("head", "head_dist") if "distilled" in name else "head"
    url = FILES + vit.file if vit.file else ""
    return _cfg(vit.pixels, "patch_embed.proj", classifier, url=url, fixed_input_size=True)


default_cfgs = generate_default_cfgs(
    {
        **{name + ".fb_in1k" * bool(vit.file): _vit_cfg(name) for name, vit in VITS.items()},
        CNN: _cfg(32, "conv1.0", "fc", pool_size=(2, 2)),
    }
)
__all__ = ["DistilledVisionTransformer"]  # timm adds every name it registers


def _vit_factory(name: str) -> Callable[..., nn.Module]:
    vit = VITS[name]
    network = DistilledVisionTransformer if "distilled" in name else VisionTransformer

    def factory(pretrained: bool = False, *, drop_rate: float = 0.0, **options: Any) -> nn.Module:
        # `drop_rate` is DeiT's --drop: timm 0.3 dropped tokens, projections and the MLP with it,
        # timm 1.0 only what enters the head.
        shape = {
            "img_size": vit.pixels,
            "patch_size": vit.patch,
            "embed_dim": vit.width,
            "depth": vit.depth,
            "num_heads": vit.heads,
            "pos_drop_rate": drop_rate,
            "proj_drop_rate": drop_rate,
        }
        return build_model_with_cfg(
            network,
            name,
            pretrained,
            pretrained_filter_fn=checkpoint_filter_fn,
            feature_cfg={"out_indices": options.pop("out_indices", 3), "feature_cls": "getter"},
            **(shape | options),
        )

    return factory


def _cnn_factory(pretrained: bool = False, **options: Any) -> nn.Module:
    shape = {
        "block": BasicBlock,
        "layers": (1, 1, 1, 1),
        "channels": (16, 32, 48, 64),
        "stem_type": "deep",
        "stem_width": 8,
    }
    return build_model_with_cfg(_resnet_without_pool, CNN, pretrained, **(shape | options))


def _resnet_without_pool(**options: Any) -> ResNet:
    """Return timm's ResNet without the pooling of its stem: small images are halved once there."""
    network = ResNet(**options)
    network.maxpool = nn.Identity()
    for stage in network.feature_info[1:]:  # timm counts the pooling
        stage["reduction"] //= 2
    return network


def register(module: str, name: str, factory: Callable[..., nn.Module], doc: str) -> None:
    """Register a model with timm, and make it an attribute of `module`, as timm requires."""
    factory.__name__ = factory.__qualname__ = name
    factory.__module__, factory.__doc__ = module, doc
    setattr(sys.modules[module], name, factory)
    with warnings.catch_warnings():  # eight of the names replace timm's
        warnings.filterwarnings("ignore", message="Overwriting .* in registry")
        register_model(factory)


for _name in VITS:
    _doc = f"Return {_name} of arXiv 2012.12877, options as timm's."
    register(__name__, _name, _vit_factory(_name), _doc)
register(__name__, CNN, _cnn_factory, "Return a ResNet of four basic blocks for 32-pixel images.")
