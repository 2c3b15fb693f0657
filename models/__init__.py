"""All networks by name: timm's models, those registered here among them."""

import difflib
import logging
from argparse import Namespace
from collections.abc import Mapping, Sequence
from typing import Any

import timm
import torch
from timm.data import resolve_data_config
from timm.layers import PatchEmbed
from timm.models.deit import VisionTransformerDistilled
from torch import nn

from base import safe_load
from base.errors import UserError, differences
from data.transforms import InputConfig
from models import fast, hub, plugins, released
from models.class_names import config_beside, outputs_to_keep
from models.deit import DistilledVisionTransformer
from models.file_layouts import POSITIONS, some
from models.loading import (
    FinetuneReport,
    finetune,
    freeze_all_but_attention,
    head_names,
    load_weights,
    select_outputs,
    weight_keys,
    zero_heads,
)
from models.student import Student, both_logits, checkpoint_blocks, has_distillation_head

__all__ = [
    "SOURCES",
    "DistilledVisionTransformer",
    "FinetuneReport",
    "Student",
    "both_logits",
    "build_input_config",
    "build_student",
    "checkpoint_blocks",
    "create_model",
    "data_config",
    "finetune",
    "freeze_all_but_attention",
    "has_distillation_head",
    "head_names",
    "input_differences",
    "load_weights",
    "plugins",
    "released",
    "select_kernels",
    "select_outputs",
    "set_attention",
    "stated_input",
    "to_inputs",
    "weight_keys",
]
_logger = logging.getLogger(__name__)
INPUT_FLAGS = ("input_size", "mean", "std", "interpolation", "eval_crop_ratio")
SOURCES = ("hf-hub:", "hf_hub:", "local-dir:")  # where timm can take a model from, by prefix


def check_name(name: str) -> None:
    """Raise UserError, with the closest names, for a model that timm does not know."""
    if name.startswith(SOURCES):
        return
    architecture, _, tag = name.partition(".")
    if not timm.is_model(architecture):
        close = difflib.get_close_matches(architecture, timm.list_models(), n=3, cutoff=0.6)
        hint = (
            f"did you mean {' or '.join(close)}?" if close else "timm.list_models() has all names"
        )
        raise UserError(f"model {name}: unknown to timm; {hint}")
    if not tag:
        return
    try:
        known_tag = timm.models.get_pretrained_cfg(name, allow_unregistered=False)
    except RuntimeError:  # newer timm raises
        known_tag = None
    if known_tag is None:
        known = timm.list_models(f"{architecture}.*", pretrained=True)
        raise UserError(
            f"model {name}: no weights of that tag; known: {', '.join(known) or 'none'}"
        )


def create_model(
    name: str,
    *,
    num_classes: int | None = None,
    img_size: tuple[int, int] | None = None,
    drop_rate: float = 0.0,
    drop_path_rate: float = 0.0,
    pretrained: bool = False,
) -> nn.Module:
    """Return a timm model. What it cannot take (img_size of a CNN) is not passed to it.

    num_classes: None for the model's own. img_size: (height, width) in pixels.
    Raises UserError for an unknown name, and for pretrained weights that cannot be fetched.
    """
    check_name(name)
    options: dict[str, Any] = {"num_classes": num_classes, "img_size": img_size}
    options |= {"drop_rate": drop_rate or None, "drop_path_rate": drop_path_rate or None}
    file = released.find(name) if pretrained else None
    if file is not None:
        network = _create_by_timm(name, options, False)
        if num_classes in (None, 1000) and img_size in (None, (file.pixels,) * 2):
            load_weights(network, file.url)
        else:
            _logger.info("%s: %s", file.file, finetune(network, file.url).describe())
        return network
    loads_itself = name.startswith(SOURCES) or plugins.source_of(name)
    if pretrained and not loads_itself and not timm.models.is_model_pretrained(name):
        raise UserError(f"model {name}: timm has no published weights for it; give a file")
    network = _create_by_timm(name, options, pretrained)
    if pretrained:
        _report_resampling(network, name, img_size)
    if pretrained and num_classes is not None:
        _start_new_head(network, name, num_classes)
    return network


def _create_by_timm(name: str, options: dict[str, Any], pretrained: bool) -> nn.Module:
    """Return timm's network, built without those of the options that it does not take."""
    size, classes = options["img_size"], options["num_classes"]
    unreachable = hub.unreachable_reason() if pretrained or name.startswith(SOURCES[:2]) else ""
    while True:
        try:
            with hub.cached_files_only(bool(unreachable)):
                return timm.create_model(name, pretrained=pretrained, **options)
        except TypeError as error:
            unknown = [key for key in options if f"'{key}'" in str(error)]
            if "unexpected keyword" not in str(error) or not unknown:
                raise
            if unknown[0] == "num_classes":
                raise UserError(
                    f"model {name}: has no classifier, it cannot be trained here"
                ) from error
            if unknown[0] != "img_size" and options[unknown[0]] is not None:
                _logger.warning(
                    "%s has no %s; it is left out", name, unknown[0].replace("_rate", "")
                )
            del options[unknown[0]]
        except Exception as error:  # whatever the network stack of timm's sources raises
            reason = " ".join(str(error).split())[:200] or type(error).__name__
            if pretrained or name.startswith(SOURCES):
                raise UserError(
                    f"model {name}: its weights cannot be fetched ({unreachable or reason}); "
                    "give a local file (--finetune, --teacher-path), or start without any"
                ) from error
            if isinstance(error, AssertionError | ValueError | RuntimeError):
                raise UserError(
                    f"model {name} cannot be built with input {size}, {classes} classes: {reason}"
                ) from error
            raise


def _report_resampling(network: nn.Module, name: str, img_size: tuple[int, int] | None) -> None:
    """Log that timm has resampled published position embeddings to another input size."""
    published = (getattr(network, "pretrained_cfg", None) or {}).get("input_size")
    if img_size is None or not published or tuple(published[1:]) == img_size:
        return
    if found := [key for key in network.state_dict() if POSITIONS.search(key)]:
        _logger.warning(
            "%s: published for %dx%d pixels; resampled for %dx%d: %s",
            name,
            *published[1:],
            *img_size,
            some(found, 2),
        )


def _start_new_head(network: nn.Module, name: str, num_classes: int) -> None:
    """Set a head to zero that replaces the published one, and report the replacement."""
    config = getattr(network, "pretrained_cfg", None) or {}  # a plugin's network may have none
    published = config.get("num_classes") or num_classes
    if published == num_classes:
        return
    if "clip" in f"{config.get('architecture')}.{config.get('tag')}" and published % 64 == 0:
        _logger.warning(
            "%s: the published projection to %d dimensions is dropped; its features are those "
            "before the projection",
            name,
            published,
        )
    if num_classes:
        zero_heads(network, head_names(network))
        _logger.info(
            "%s: a new head of %d classes starts at zero; the published one has %d",
            name,
            num_classes,
            published,
        )


def data_config(name: str) -> dict[str, Any]:
    """Return timm's resolved data configuration of a model, which describes its input.

    Keys: input_size (3, height, width), mean, std, interpolation, crop_pct, and num_classes. A
    network that a plugin registered without any gets timm's defaults.
    """
    check_name(name)
    if name.startswith(SOURCES):
        config = create_model(name).pretrained_cfg
    else:
        config = timm.models.get_pretrained_cfg(name)
        config = config.to_dict() if config is not None else {"input_size": (3, 224, 224)}
    resolved = resolve_data_config({}, pretrained_cfg=config)
    return resolved | {
        "num_classes": config.get("num_classes"),
        "fixed_input_size": config.get("fixed_input_size", False),
    }


def build_input_config(args: Namespace) -> InputConfig:
    """Return the student's input: the model's own configuration, unless flags replace it."""
    given = {name: getattr(args, name) for name in INPUT_FLAGS}
    return to_inputs(data_config(args.model), **given)


def to_inputs(own: Mapping[str, Any], **given: Any) -> InputConfig:
    """Return the input of a data configuration (see `data_config`).

    given: the flags of `INPUT_FLAGS`, which replace its values unless they are None.
    """
    size = given.get("input_size") or own["input_size"][1:]
    return InputConfig(
        input_size=(size[0], size[-1]),
        mean=tuple(given.get("mean") or own["mean"]),
        std=tuple(given.get("std") or own["std"]),
        interpolation=given.get("interpolation") or own["interpolation"],
        crop_ratio=given.get("eval_crop_ratio") or own["crop_pct"],
    )


def stated_input(path: str) -> dict[str, Any] | None:
    """Return the data configuration of an export (its config.json) or of a released file by name.

    Keys as of `data_config`. None for other files. Raises UserError for a damaged config.json.
    """
    config = config_beside(path).get("pretrained_cfg")
    if isinstance(config, dict):
        what = f"{path}: the pretrained_cfg in its config.json is damaged"
        try:
            with safe_load.in_one_line(what):
                found = resolve_data_config({}, pretrained_cfg=config)
                found |= {key: tuple(map(float, found[key])) for key in ("mean", "std")}
                to_inputs(found)  # checks the values
                return found
        except UserError as error:
            raise UserError(f"{what} ({error})") from error
    file = released.published("", path) if path else None
    names = [name for name, known in released.RELEASED.items() if known is file]
    return data_config(names[0]) if names else None


def input_differences(path: str, model: str, inputs: InputConfig) -> list[str]:
    """Return the differences between `inputs` and the input that weights were trained with.

    path: of a file, or "" for the published weights of `model`. Empty for files of other
    programs, which do not state their input.
    """
    settings = safe_load.read_weights_file(path).get("args") if path else None
    if not path:
        trained = to_inputs(data_config(model))
    elif isinstance(settings, Mapping) and all(k in settings for k in ("model", *INPUT_FLAGS)):
        with safe_load.in_one_line(f"{path}: its settings are damaged"):
            flags = {name: settings[name] for name in ("model", *INPUT_FLAGS)}
            trained = build_input_config(Namespace(**flags))
    elif stated := stated_input(path):
        trained = to_inputs(stated)
    else:
        return []
    was, now = vars(trained), vars(inputs)
    if trained.is_small and inputs.is_small:  # neither is cropped
        was, now = was | {"crop_ratio": None}, now | {"crop_ratio": None}
    return list(differences(was, now))


def build_student(
    args: Namespace,
    num_classes: int,
    inputs: InputConfig,
    *,
    classes: Sequence[str] | None = None,
    with_weights: bool = True,
) -> Student:
    """Return the module that trains, with its first weights.

    classes: names of its outputs, with which those of --finetune are matched.
    with_weights: False reads and fetches none; the sizes are the same.
    Raises UserError for a model that is unknown or does not suit the kind of distillation.
    """
    network = create_model(
        args.model,
        num_classes=num_classes,
        img_size=inputs.input_size,
        drop_rate=args.drop,
        drop_path_rate=args.drop_path,
        pretrained=args.pretrained and with_weights,
    )
    origin = ""
    if args.pretrained and not args.resume:
        origin = "from its published weights"
        if args.model.startswith("local-dir:"):
            origin = "from that folder"
        if data_config(args.model)["num_classes"] not in (None, num_classes):
            origin += f", with a new head for {num_classes} classes"
    check_patch_size(network, inputs.input_size)
    if args.finetune and not args.resume and with_weights:
        outputs, note = outputs_to_keep(args.finetune, args.model, classes)
        report = finetune(network, args.finetune, outputs=outputs)
        origin = f"from {args.finetune}: " + ", ".join(filter(None, [report.describe(), note]))
    if args.attn_only:
        freeze_all_but_attention(network)
    if args.grad_checkpointing:
        checkpoint_blocks(network)
    both = _build_heads(args, network)
    return Student(
        network,
        heads="both" if both else "one",
        submodels=2 if args.cosub else 1,
        origin=origin,
    )


def check_patch_size(network: nn.Module, size: tuple[int, int]) -> None:
    """Raise UserError for an input (height, width) without a whole patch, or with part of one."""
    for module in network.modules():
        if isinstance(module, PatchEmbed):
            height, width = module.patch_size
            small = size[0] < height or size[1] < width
            if small or (module.strict_img_size and (size[0] % height or size[1] % width)):
                raise UserError(
                    f"--input-size {size[0]} {size[1]}: the model has patches of {height} x "
                    f"{width} pixels; give multiples of {height} and {width}"
                )


def _build_heads(args: Namespace, network: nn.Module) -> bool:
    """Return whether the loss gets the logits of both heads."""
    if args.distillation_type == "none":
        return False
    two_heads = has_distillation_head(network)
    if args.distillation_head == "cls" and two_heads:
        raise UserError(
            f"--distillation-head cls: {args.model} has a distillation head, which would stay "
            "untrained; leave the flag out, or use a plain student"
        )
    both = args.distillation_head == "dist" or (args.distillation_head == "auto" and two_heads)
    if both and not args.train_mode and not isinstance(network, VisionTransformerDistilled):
        raise UserError(f"--no-train-mode: {args.model} returns both logits in training mode only")
    return both


def select_kernels(network: nn.Module, device_type: str, dtype: torch.dtype | None) -> None:
    """Select the fastest kernels for a device, as measured. dtype: autocast's, or None."""
    set_attention(network, fused=prefers_fused_attention(device_type, dtype))
    if device_type == "cpu":
        fast.tune_for_cpu(network, dtype)


def prefers_fused_attention(device_type: str, dtype: torch.dtype | None) -> bool:
    """Return whether torch's fused attention is faster than plain softmax attention.

    dtype: autocast's, or None. On a CPU the fused kernel takes 1.5 times as long in half precision,
    and a few percent less in float32. On GPUs it is expected to be faster (not measured).
    """
    return device_type != "cpu" or dtype is None


def set_attention(network: nn.Module, *, fused: bool) -> None:
    """Set timm's attention layers to torch's fused kernel, or to plain products and softmax."""
    for module in network.modules():
        if isinstance(getattr(module, "fused_attn", None), bool):
            module.fused_attn = fused  # type: ignore[assignment]
