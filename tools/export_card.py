"""The model card of an export: how the student was trained, its accuracy, and how to load it.

`content` is what `safe_load.read_weights_file` returns. DeiT's files have fewer entries than
ours; a bare state dict has none.
"""

import re
from argparse import Namespace
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

import models
from base import files, safe_load
from base.text import printable
from data.transforms import InputConfig
from distill.teacher import build_sources
from models.deit import CNN
from models.file_layouts import EMA_KEYS
from training import metrics, optim
from training.checkpointer import BEST

Rows = list[tuple[str, str]]
AUGMENTATION = (
    "ThreeAugment",
    "src",
    "aa",
    "color_jitter",
    "reprob",
    "mixup",
    "cutmix",
    "cutmix_minmax",
    "smoothing",
    "repeated_aug",
    "drop",
    "drop_path",
    "bce_loss",
)
MARKUP = re.compile(r"([\\`*<>\[\]|])")
SHOWN_CLASSES = 20  # of their names; all of them are in config.json


def settings_of(content: Mapping[str, Any]) -> dict[str, Any]:
    """Return the flags that a checkpoint was trained with; {} if it holds none."""
    settings = content.get("args") or {}
    return dict(settings if isinstance(settings, Mapping) else vars(settings))


def history(path: Path, content: Mapping[str, Any], key: str) -> Rows:
    """Return the rows of the card: accuracy of the weights under `key`, data, recipe, teacher."""
    settings, facts = settings_of(content), content.get("facts") or {}
    rows = _result(path, content, key)
    if settings.get("data_set"):
        folder = f" ({Path(settings['data_path']).name})" * bool(settings.get("data_path"))
        counts = str(facts.get("data", "")).partition(",")[0]
        rows.append(("data", f"{settings['data_set']}{folder}"))
        if " + " in counts:
            rows.append(("trained and evaluated on", counts))
    rows += _recipe(settings, facts) + _teacher(settings, facts)
    rows.append(("weights", f"{path.name}, {key}"))
    return [*rows, ("sha256 of the checkpoint", files.hash_of(path))]


def _result(path: Path, content: Mapping[str, Any], key: str) -> Rows:
    """Return the accuracy of exactly these weights, where the run has recorded it."""
    found = models.released.published("", str(path))
    if found is not None and found.acc1 is not None:
        return [("published top-1", f"{found.acc1:g}%")]
    epoch = content.get("epoch")
    if not isinstance(epoch, int) or epoch < 0:
        return []
    if (content.get("tally") or {}).get("micro_steps"):
        return [("top-1", f"not measured: stopped within epoch {epoch + 2}")]
    name = "ema_acc1" if key in EMA_KEYS else "test_acc1"
    acc1 = present = None
    for line in metrics.read_log(path.with_name("log.txt")):
        if line.get("epoch") == epoch:
            acc1, present = line.get(name), line.get(f"{name}_present")
    if acc1 is None and path.name == BEST and key not in EMA_KEYS:
        acc1 = content.get("best_acc1")
    where = f"after epoch {epoch + 1}"
    rows = [("top-1", f"{acc1:.2f}% {where}" if acc1 is not None else f"not known, {where}")]
    if present is not None:
        rows.append(("top-1 among the classes with images", f"{present:.2f}% {where}"))
    return rows


def _recipe(settings: Mapping[str, Any], facts: Mapping[str, Any]) -> Rows:
    rows = [(name, str(settings[name])) for name in ("recipe", "epochs") if settings.get(name)]
    processes = facts.get("processes") or settings.get("world_size")
    if processes and settings.get("batch_size"):
        steps = settings.get("grad_accum_steps", 1)
        effective = settings["batch_size"] * processes * steps
        rows.append(
            (
                "effective batch",
                f"{effective}: --batch-size {settings['batch_size']}, "
                f"processes {processes}, --grad-accum-steps {steps}",
            )
        )
        if settings.get("lr") is not None:
            scale = 1 if settings.get("unscale_lr") else effective / optim.REFERENCE_BATCH
            rows.append(("learning rate", f"{settings['lr'] * scale:.3g}"))
    if settings.get("opt"):
        rows.append(
            (
                "optimizer",
                f"{settings['opt']}, weight decay "
                f"{settings.get('weight_decay')}, {settings.get('sched')} schedule, "
                f"{settings.get('warmup_epochs')} epochs of warm-up",
            )
        )
    on = [
        f"{name} {settings[name]}"
        for name in AUGMENTATION
        if settings.get(name) not in (None, "", "none", False, 0, 0.0)
    ]
    if "mixup" in settings:
        rows.append(("augmentation and regularisation", ", ".join(on) or "none"))
    if settings.get("finetune"):
        rows.append(("fine-tuned from", _brief(settings["finetune"])))
    if "seed" in settings:
        rows.append(("seed", str(settings["seed"])))
    return rows


def _teacher(settings: Mapping[str, Any], facts: Mapping[str, Any]) -> Rows:
    """Return the teachers, with the hash that the checkpoint has of them; [] without a teacher."""
    kind = settings.get("distillation_type", "none")
    if kind == "none" and not settings.get("match") and not settings.get("ranking_kl_weight"):
        return []
    rows = [("distillation", kind)]
    if kind != "none":
        tau = f", tau {settings.get('distillation_tau')}" * (kind == "soft")
        rows = [("distillation", f"{kind}, alpha {settings.get('distillation_alpha')}{tau}")]
    if settings.get("match"):
        rows.append(("matched", ", ".join(map(str, settings["match"]))))
    names, paths = build_sources(
        Namespace(
            teacher_model=settings.get("teacher_model", ""),
            teacher_path=settings.get("teacher_path") or "",
        )
    )
    recorded = facts.get("teacher") or []
    for i, (name, path) in enumerate(zip(names, paths)):
        known = None if path else models.released.find(name)
        weights = _brief(path) if path else known.file if known else "timm's published weights"
        rows.append(("teacher", f"{name}, {weights}"))
        there = Path(path)
        now = files.hash_of(there) if path and there.is_file() else ""
        if i < len(recorded) and path:
            rows.append(("sha256 of the teacher", recorded[i]))
            if now and now != recorded[i]:
                rows.append(("note", f"the file has changed since: its sha256 is {now}"))
        elif known and known.hash:  # checked whenever the file is read
            rows.append(("sha256 of the teacher", f"begins with {known.hash}"))
        elif now:  # a checkpoint that is not ours
            rows.append(("sha256 of the teacher's file today", now))
    return rows


def _brief(source: str) -> str:
    """Return a URL as it is, and of a path the file name alone, without this machine's folders."""
    return source if safe_load.is_url(source) else Path(source).name


@dataclass(frozen=True, kw_only=True)
class Card:
    """What the model card states.

    about: the network, its input and output. files: a line for each file, its name first.
    license, data_license: the Hub's identifiers. repository: on the Hub, "" for none.
    """

    title: str
    about: str
    rows: Rows
    classes: list[str] | None
    files: list[str]
    inputs: InputConfig
    license: str
    data_license: str
    repository: str = ""

    def text(self) -> str:
        """Return the card as Markdown, with the Hub's front matter."""
        licences = [
            ("licence of the weights", self.license),
            ("licence of the training data", self.data_license),
        ]
        parts = [
            f"# {escape(self.title)}",
            escape(self.about),
            *self._classes(),
            "\n".join(
                ["| | |", "|---|---|"]
                + [f"| {escape(name)} | {escape(value)} |" for name, value in self.rows + licences]
            ),
            "## Files",
            "\n".join(f"- {line}" for line in self.files),
            "## Loading",
            "Run these lines in this folder. They need only the packages that they import.",
            *(f"```python\n{code}```" for code in self._loading()),
        ]
        return self._front_matter() + "\n\n".join(parts) + "\n"

    def _front_matter(self) -> str:
        front = {
            "license": self.license,
            "data_license": self.data_license,
            "library_name": "timm",
            "pipeline_tag": "image-classification",
            "tags": ["image-classification", "timm", "knowledge-distillation"],
        }
        return f"---\n{yaml.safe_dump(front, sort_keys=False)}---\n\n"

    def _classes(self) -> list[str]:
        if not self.classes:
            return []
        shown = [escape(str(name)) for name in self.classes[:SHOWN_CLASSES]]
        total = len(self.classes)
        more = f", ... ({total} in config.json)" if total > len(shown) else ""
        return [f"Classes in the order of the logits: {', '.join(shown)}{more}."]

    def _loading(self) -> list[str]:
        names = {line.partition(":")[0] for line in self.files}
        codes = []
        if "model.safetensors" in names:
            name = self.title.partition(".")[0]
            codes.append(_loading_of_resnet_pico(self) if name == CNN else LOAD_IN_TIMM)
        if "model.pt2" in names:
            codes.append(LOAD_EXPORTED.format(size=self.inputs.input_size))
        if "model.onnx" in names:
            codes.append(LOAD_ONNX.format(size=self.inputs.input_size))
        if self.repository and "model.safetensors" in names and self.title != CNN:
            codes.append(LOAD_FROM_HUB.format(repository=self.repository))
        return codes


def escape(text: str) -> str:
    """Return `text` for one line of Markdown: no control characters, no markup, no table cells."""
    return MARKUP.sub(r"\\\1", printable(text))


def _loading_of_resnet_pico(card: Card) -> str:
    inputs = card.inputs
    return LOAD_RESNET_PICO.format(
        mean=inputs.mean,
        std=inputs.std,
        size=(3, *inputs.input_size),
        interpolation=inputs.interpolation,
        crop=inputs.crop_ratio,
    )


PREDICT = """
image = Image.new("RGB", (320, 240), "orange")  # or Image.open("photo.jpg").convert("RGB")
with torch.no_grad():
    probabilities = network(transform(image)[None]).softmax(1)
print(probabilities.topk(1))
"""
LOAD_IN_TIMM = (
    """import timm
import torch
from PIL import Image

network = timm.create_model("local-dir:.", pretrained=True).eval()
config = timm.data.resolve_model_data_config(network)
transform = timm.data.create_transform(**config, is_training=False)
"""
    + PREDICT
)
LOAD_RESNET_PICO = (
    """import timm
import torch
from PIL import Image
from safetensors.torch import load_file
from timm.models.resnet import BasicBlock, ResNet

weights = load_file("model.safetensors")
network = ResNet(
    BasicBlock,
    layers=(1, 1, 1, 1),
    channels=(16, 32, 48, 64),
    stem_type="deep",
    stem_width=8,
    num_classes=len(weights["fc.bias"]),
)
network.maxpool = torch.nn.Identity()  # timm has no name for a ResNet without this pooling
network.load_state_dict(weights)
network.eval()
transform = timm.data.create_transform(
    input_size={size},
    mean={mean},
    std={std},
    interpolation="{interpolation}",
    crop_pct={crop},
)
"""
    + PREDICT
)
LOAD_EXPORTED = """import torch

network = torch.export.load("model.pt2").module()
print(network(torch.zeros(1, 3, *{size})).shape)
"""
LOAD_ONNX = """import numpy
import onnxruntime

session = onnxruntime.InferenceSession("model.onnx")
images = numpy.zeros((1, 3, *{size}), dtype="float32")
print(session.run(None, {{"images": images}})[0].shape)
"""
LOAD_FROM_HUB = """import timm

network = timm.create_model("hf-hub:{repository}", pretrained=True).eval()
"""
