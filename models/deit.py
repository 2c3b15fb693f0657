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
from timm.layers import resample_abs_pos_embed
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from timm.models.resnet import BasicBlock, ResNet
from timm.models.vision_transformer import VisionTransformer, checkpoint_filter_fn
from torch import Tensor, nn

FILES = "https://dl.fbaipublicfiles.com/deit/"


class DistilledVisionTransformer(VisionTransformer):
    """timm's ViT with a second prefix token that learns from a teacher, and a head for it.

    In training it returns (class logits, distillation logits), (B, C) each, in evaluation their
    mean. Takes VisionTransformer's arguments except `global_pool` and `reg_tokens`.
    Source: Touvron et al. 2021 (arXiv 2012.12877).
    """

    def __init__(self, *, num_classes: int = 1000, **vit: Any) -> None:
        super().__init__(num_classes=num_classes, **vit)
        self.num_prefix_tokens = 2
        self.dist_token = nn.Parameter(torch.zeros(1, 1, self.embed_dim))
        grid = self.patch_embed.num_patches
        self.pos_embed = nn.Parameter(torch.zeros(1, grid + self.num_prefix_tokens, self.embed_dim))
        self.head_dist = self._new_head(num_classes)
        for tensor in (self.cls_token, self.dist_token, self.pos_embed):
            nn.init.trunc_normal_(tensor, std=0.02)

    def _new_head(self, num_classes: int) -> nn.Module:
        if num_classes == 0:
            return nn.Identity()
        head = nn.Linear(self.embed_dim, num_classes)
        nn.init.trunc_normal_(head.weight, std=0.02)
        nn.init.zeros_(head.bias)
        return head

    def forward(self, x: Tensor, *, both: bool | None = None) -> Tensor | tuple[Tensor, Tensor]:
        """Return both logits (True), their mean (False), or by `training` (None).

        x: (B, 3, height, width).
        """
        return self.forward_head(self.forward_features(x), both=both)

    def _pos_embed(self, x: Tensor) -> Tensor:
        positions = self.pos_embed
        if self.dynamic_img_size:  # x: (B, height, width, D)
            positions = resample_abs_pos_embed(
                positions,
                new_size=[x.shape[1], x.shape[2]],
                old_size=list(self.patch_embed.grid_size),
                num_prefix_tokens=self.num_prefix_tokens,
            )
            x = x.flatten(1, 2)
        prefix = [token.expand(x.shape[0], -1, -1) for token in (self.cls_token, self.dist_token)]
        return self.pos_drop(torch.cat([*prefix, x], dim=1) + positions)  # (B, N, D)

    def forward_head(
        self, x: Tensor, pre_logits: bool = False, *, both: bool | None = None
    ) -> Tensor | tuple[Tensor, Tensor]:
        cls, dist = self.head_drop(x[:, 0]), self.head_drop(x[:, 1])  # (B, D) each
        if pre_logits:
            return (cls + dist) / 2
        cls, dist = self.head(cls), self.head_dist(dist)  # (B, C) each
        if both is None:
            both = self.training
        return (cls, dist) if both else (cls + dist) / 2

    @torch.jit.ignore
    def get_classifier(self) -> tuple[nn.Module, nn.Module]:  # type: ignore[override]
        return self.head, self.head_dist

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Give both tokens fresh heads of `num_classes`, 0 for none."""
        if global_pool not in (None, "token"):
            raise ValueError(f"global_pool {global_pool!r}: a distilled ViT reads its two tokens")
        self.num_classes = num_classes
        device = self.pos_embed.device
        self.head = self._new_head(num_classes).to(device).train(self.training)
        self.head_dist = self._new_head(num_classes).to(device).train(self.training)

    @torch.jit.ignore
    def no_weight_decay(self) -> set[str]:
        return {"pos_embed", "cls_token", "dist_token"}

    @torch.jit.ignore
    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        return {
            "stem": r"^cls_token|dist_token|pos_embed|patch_embed",
            "blocks": [(r"^blocks\.(\d+)", None), (r"^norm", (99999,))],
        }


@dataclass(frozen=True)
class ViT:
    """A line of the table: the shape, and the released file with its Acc@1 in percent."""

    width: int
    depth: int
    heads: int
    patch: int = 16
    pixels: int = 224
    file: str = ""
    acc1: float | None = None


# File names and accuracies are of DeiT's README (its evaluation commands, crop 0.875).
VITS = {
    "deit_tiny_patch16_224": ViT(
        192, 12, 3, file="deit_tiny_patch16_224-a1311bcf.pth", acc1=72.202
    ),
    "deit_small_patch16_224": ViT(
        384, 12, 6, file="deit_small_patch16_224-cd65a155.pth", acc1=79.854
    ),
    "deit_base_patch16_224": ViT(
        768, 12, 12, file="deit_base_patch16_224-b5f2ef4d.pth", acc1=81.846
    ),
    "deit_tiny_distilled_patch16_224": ViT(
        192, 12, 3, file="deit_tiny_distilled_patch16_224-b40b3cf7.pth", acc1=74.476
    ),
    "deit_small_distilled_patch16_224": ViT(
        384, 12, 6, file="deit_small_distilled_patch16_224-649709d9.pth", acc1=81.164
    ),
    "deit_base_distilled_patch16_224": ViT(
        768, 12, 12, file="deit_base_distilled_patch16_224-df68dfff.pth", acc1=83.372
    ),
    "deit_base_patch16_384": ViT(
        768, 12, 12, pixels=384, file="deit_base_patch16_384-8de9b5d1.pth", acc1=82.890
    ),
    "deit_base_distilled_patch16_384": ViT(
        768, 12, 12, pixels=384, file="deit_base_distilled_patch16_384-d0272ac0.pth", acc1=85.224
    ),
    # The quick start's: small images on a CPU.
    "deit_pico_patch4_32": ViT(64, 4, 4, patch=4, pixels=32),
    "deit_pico_distilled_patch4_32": ViT(64, 4, 4, patch=4, pixels=32),
    "deit_pico_patch8_32": ViT(64, 4, 4, patch=8, pixels=32),
    "deit_pico_distilled_patch8_32": ViT(64, 4, 4, patch=8, pixels=32),
}
CNN = "resnet_pico"  # the quick start's teacher


def _cfg(pixels: int, first_conv: str, classifier: Any, file: str = "") -> dict[str, Any]:
    small = pixels <= 32
    return {
        "url": FILES + file if file else "",
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
    }


def _tagged(name: str) -> str:
    return f"{name}.fb_in1k" if VITS[name].file else name


def _classifier(name: str) -> Any:
    return ("head", "head_dist") if "distilled" in name else "head"


default_cfgs = generate_default_cfgs(
    {
        **{
            _tagged(name): _cfg(vit.pixels, "patch_embed.proj", _classifier(name), vit.file)
            for name, vit in VITS.items()
        },
        CNN: _cfg(32, "conv1.0", "fc"),
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
    network = build_model_with_cfg(ResNet, CNN, pretrained, **(shape | options))
    network.maxpool = nn.Identity()  # small images: the stem halves them once, not twice
    return network


def _register(name: str, factory: Callable[..., nn.Module], doc: str) -> None:
    factory.__name__ = factory.__qualname__ = name
    factory.__module__, factory.__doc__ = __name__, doc
    setattr(sys.modules[__name__], name, factory)
    with warnings.catch_warnings():  # eight of the names are timm's too; ours are meant to win
        warnings.filterwarnings("ignore", message="Overwriting .* in registry")
        register_model(factory)


for _name in VITS:
    _register(_name, _vit_factory(_name), f"Return {_name} of arXiv 2012.12877, options as timm's.")
_register(CNN, _cnn_factory, "Return a ResNet of four basic blocks for 32-pixel images.")
