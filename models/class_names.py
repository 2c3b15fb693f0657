"""Class names of the outputs of trained weights."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import timm

from base import safe_load
from base.errors import UserError
from data.folders import some
from data.labels import ModelClasses, imagenet_names
from models import released
from models.loading import read_weights

CONFIG, CONFIG_BYTES = "config.json", 2**24  # of an export; a larger file is not read
# Where timm, torchvision, DeiT and Hugging Face keep the classifier
HEADS = ("head.weight", "fc.weight", "head.fc.weight", "classifier.weight")
LOCAL = "local-dir:"


def classes_of_file(path: str, model: str = "") -> ModelClasses | None:
    """Return the outputs of a weights file; None if it has no classifier that is recognised.

    model: the name of its architecture, which has the name of the classifier. The names come
    from `classes` in a checkpoint of this repository, or from `label_names` in the config.json
    beside an export. For the published ImageNet weights of DeiT they come from timm.
    Raises UserError for a file that cannot be read.
    """
    content = safe_load.read_weights_file(path)
    count = _count_outputs(read_weights(path), model)
    names = _names(content.get("classes")) or _names(config_beside(path).get("label_names"))
    if count is None or (names and len(names) > count):
        return None
    if names is None and model and released.published(model, path) is not None:
        return ModelClasses(count, imagenet_names(count), path, numbered=True)
    return ModelClasses(count, names, path)


def classes_of_published(model: str, count: int | None) -> ModelClasses | None:
    """Return the outputs of the weights that `--pretrained` loads, or None if not known.

    model: a name of timm's or ours, or `local-dir:FOLDER` of an export. count: the number of
    classes in its configuration.
    """
    if model.startswith(LOCAL):
        folder = Path(model.removeprefix(LOCAL))
        names = _names(_read_config(folder / CONFIG).get("label_names"))
        fits = count and (names is None or len(names) <= count)
        return ModelClasses(count, names, str(folder)) if count and fits else None
    if not count:
        return None
    names = None if ":" in model else imagenet_names(count)  # a hub model may be of any data
    return ModelClasses(count, names, f"the published {model}", numbered=names is not None)


def outputs_to_keep(
    path: str, model: str, classes: Sequence[str] | None
) -> tuple[list[int] | None, str]:
    """Return which outputs of a file fine-tuning starts from, and in words what becomes of them.

    classes: the names of the new outputs. The list has an output of the file for each of them; it
    is empty if the file lacks one, and None if either side has no names, so positions count.
    """
    known = classes_of_file(path, model)
    if known is None or classes is None or tuple(classes) == known.names:
        return None, ""
    names = known.names
    if names is None or len(set(names)) < len(names):
        if known.count != len(classes):
            return None, ""
        return None, "no class names in the file, its outputs are taken in the data's order"
    if missing := [name for name in classes if name not in names]:
        return [], f"a new head, as the file has no class {some(missing)}"
    return [names.index(name) for name in classes], "the head's outputs matched by class name"


def _count_outputs(weights: Mapping[str, Any], model: str) -> int | None:
    """Return how many outputs the classifier in a state dict has."""
    config = timm.models.get_pretrained_cfg(model) if model and ":" not in model else None
    own = config.classifier if config is not None else None
    own = (own,) if isinstance(own, str) else own or ()
    for name in (*(f"{part}.weight" for part in own), *HEADS):
        if name in weights:
            return int(weights[name].shape[0])
    return None


def _names(value: Any) -> tuple[str, ...] | None:
    """Return class names from a file, or None for anything but a list of text."""
    if not isinstance(value, list | tuple) or not value:
        return None
    return tuple(value) if all(isinstance(name, str) for name in value) else None


def config_beside(path: str) -> dict[str, Any]:
    """Return the config.json beside the safetensors file of an export, or {}."""
    if safe_load.is_url(path) or Path(path).suffix != ".safetensors":
        return {}
    config = Path(path).with_name(CONFIG)
    return _read_config(config) if config.is_file() else {}


def _read_config(path: Path) -> dict[str, Any]:
    """Return the content of an export's config.json. Raises UserError if it cannot be read."""
    try:
        if not path.is_file() or path.stat().st_size > CONFIG_BYTES:
            raise UserError(f"{path}: not there, or no config.json of an export")
        content = json.loads(path.read_text())
    except (OSError, ValueError, RecursionError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"{path}: not readable as JSON ({type(error).__name__})") from error
    return content if isinstance(content, dict) else {}
