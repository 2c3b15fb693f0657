"""The settings of a run as it saves them: in config.yaml, checkpoints and bad_batch.pth."""

import os
from collections.abc import Mapping
from typing import Any

from base import files

# Settings that name files or folders
PATHS = ("data_path", "val_labels", "teacher_path", "teacher_cache", "finetune")
PATHS += ("distill_config", "plugin", "unlabelled_path")
MODELS = ("model", "teacher_model")  # `local-dir:FOLDER` names one, too
LOCAL = "local-dir:"
# Settings of one start of a run. A run that repeats another from its config.yaml has its own. The
# epochs that --minutes has chosen are in `epochs`.
OF_ONE_START = ("output_dir", "resume", "resume_anyway", "recipe", "minutes", "plugin")
OF_ONE_START += ("eval", "check", "dry_run", "list_models", "local_rank", "world_size")
OF_ONE_START += ("dist_url", "distributed", "help", "print_completion")


def to_save(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return settings in plain types, with absolute paths of the files and folders that exist."""
    plain = {name: files.to_plain(value) for name, value in settings.items()}
    paths = {name: absolute(plain[name]) for name in PATHS if name in plain}
    return plain | paths | {name: _absolute_model(plain[name]) for name in MODELS if name in plain}


def absolute(value: Any) -> Any:
    """Return the paths of existing files and folders as absolute paths, all else unchanged."""
    if isinstance(value, list | tuple):
        return [absolute(each) for each in value]
    is_path = isinstance(value, str) and value and os.path.exists(value)
    return os.path.abspath(value) if is_path else value


def _absolute_model(value: Any) -> Any:
    """Return the name of a model with an absolute path, if it names a folder; or a list of them."""
    if isinstance(value, list):
        return [_absolute_model(each) for each in value]
    is_local = isinstance(value, str) and value.startswith(LOCAL)
    return LOCAL + absolute(value.removeprefix(LOCAL)) if is_local else value


def is_same(was: Any, now: Any) -> bool:
    """Return whether a setting of an older file, with relative paths, is that of this run."""
    return now in (absolute(was), _absolute_model(was))
