"""The model card of an export: how the student was trained, its accuracy, and how to load it.

`content` is what `safe_load.read_weights_file` returns. DeiT's files have fewer entries than
ours; a bare state dict has none.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader

import models
from base import files, safe_load
from base.text import printable
from data.transforms import InputConfig
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
    names, paths = (settings.get(name) or "" for name in ("teacher_model", "teacher_path"))
    names, paths = ([x] if isinstance(x, str) else x for x in (names, paths))
    paths = paths if any(paths) else [""] * len(names)
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
    """What the model card states. Its text is model_card.md.jinja.

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
        pages = Environment(
            loader=FileSystemLoader(Path(__file__).parent), keep_trailing_newline=True
        )
        pages.filters["markdown"] = escape
        licences = [
            ("licence of the weights", self.license),
            ("licence of the training data", self.data_license),
        ]
        return pages.get_template("model_card.md.jinja").render(
            vars(self)
            | {
                "rows": self.rows + licences,
                "written": [line.partition(":")[0] for line in self.files],
                "is_cnn": self.title.partition(".")[0] == CNN,
            }
        )


def escape(text: str) -> str:
    """Return `text` for one line of Markdown: no control characters, no markup, no table cells."""
    return MARKUP.sub(r"\\\1", printable(text))
