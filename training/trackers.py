"""Where the curves of a run go besides log.txt: TensorBoard, Weights & Biases, MLflow.

All get the same tags, over the number of images seen.
"""

import importlib.util
import logging
import os
import threading
from argparse import Namespace
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol

from PIL import Image
from torch import Tensor

from base import files, flag_table, flags
from base.errors import UserError

_logger = logging.getLogger(__name__)
PROJECT = "vit-distillation"  # unless the tracker's own variable names another one
MOST_PARAMS, MOST_CHARACTERS = 100, 500  # of one call and of one value, in MLflow
# Settings in TensorBoard's table of runs; all of them are in its text.
COMPARED = frozenset(flag_table.with_fact(flags.COMPARED))


class Tracker(Protocol):
    """One run in a program that shows curves. images_seen: the horizontal axis."""

    def config(self, settings: Mapping[str, Any], text: str) -> None:
        """Store the settings; text: the same as YAML."""

    def scalars(self, values: Mapping[str, float], images_seen: int) -> None:
        """Add a point to each curve. values: by tag, such as train/loss."""

    def image(self, tag: str, image: Tensor, images_seen: int) -> None:
        """Add an image (3, height, width) uint8."""

    def close(self) -> None:
        """Write what is left."""


class TensorBoard:
    """Files for TensorBoard in a folder."""

    def __init__(self, folder: Path, images_seen: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        threading.excepthook = _leave_out_traceback
        self._writer = SummaryWriter(
            str(folder / "tensorboard"), purge_step=images_seen or None, max_queue=1000
        )

    def config(self, settings: Mapping[str, Any], text: str) -> None:
        from torch.utils.tensorboard.summary import hparams

        self._writer.add_text("config", f"```\n{text}```")
        kept = {
            k: v if isinstance(v, bool | int | float | str) else str(v)
            for k, v in settings.items()
            if k in COMPARED
        }
        for summary in hparams(kept, {"val/acc1": 0.0, "val_ema/acc1": 0.0})[:2]:
            self._writer.file_writer.add_summary(summary)

    def scalars(self, values: Mapping[str, float], images_seen: int) -> None:
        for tag, value in values.items():
            self._writer.add_scalar(tag, value, images_seen)

    def image(self, tag: str, image: Tensor, images_seen: int) -> None:
        self._writer.add_image(tag, image, images_seen)

    def close(self) -> None:
        self._writer.close()


def _leave_out_traceback(failed: threading.ExceptHookArgs) -> None:
    """Skip a thread's traceback if TensorBoard raises the same error in the next call."""
    is_board = "tensorboard" in type(failed.thread).__module__
    if not (isinstance(failed.exc_value, OSError) and is_board):
        threading.__excepthook__(failed)


class Wandb:
    """A run of Weights & Biases. A resumed run continues it, by the id in the run's folder."""

    def __init__(self, folder: Path, images_seen: int) -> None:
        import wandb

        self._wandb, file = wandb, folder / "wandb_id"
        self._run = wandb.init(
            project=os.environ.get("WANDB_PROJECT", PROJECT),
            name=folder.name,
            dir=str(folder),
            id=file.read_text() if images_seen and file.is_file() else None,
            resume="allow",
            settings=wandb.Settings(console="off"),
        )
        files.write_text_atomically(file, self._run.id)
        self._run.define_metric("images_seen")
        self._run.define_metric("*", step_metric="images_seen")

    def config(self, settings: Mapping[str, Any], text: str) -> None:
        self._run.config.update(dict(settings), allow_val_change=True)

    def scalars(self, values: Mapping[str, float], images_seen: int) -> None:
        self._run.log({**values, "images_seen": images_seen})

    def image(self, tag: str, image: Tensor, images_seen: int) -> None:
        shown = self._wandb.Image(image.permute(1, 2, 0).numpy())
        self._run.log({tag: shown, "images_seen": images_seen})

    def close(self) -> None:
        self._run.finish()


class Mlflow:
    """A run of MLflow. A resumed run continues it, by the id in the run's folder.

    Without MLFLOW_TRACKING_URI its data base mlflow.db and `mlruns` are beside the run's folder.
    """

    def __init__(self, folder: Path, images_seen: int) -> None:
        import mlflow

        name = os.environ.get("MLFLOW_EXPERIMENT_NAME", PROJECT)
        if not os.environ.get("MLFLOW_TRACKING_URI"):
            beside = folder.absolute().parent
            mlflow.set_tracking_uri(f"sqlite:///{beside / 'mlflow.db'}")
            if mlflow.get_experiment_by_name(name) is None:  # its files go to the working folder
                mlflow.create_experiment(name, artifact_location=(beside / "mlruns").as_uri())
        mlflow.set_experiment(name)
        self._mlflow, file = mlflow, folder / "mlflow_id"
        self._is_new = not (images_seen and file.is_file())
        known = None if self._is_new else file.read_text()
        run = mlflow.start_run(run_id=known, run_name=None if known else folder.name)
        files.write_text_atomically(file, run.info.run_id)

    def config(self, settings: Mapping[str, Any], text: str) -> None:
        if self._is_new:  # a parameter cannot be changed
            names = list(settings)
            for i in range(0, len(names), MOST_PARAMS):
                part = names[i : i + MOST_PARAMS]
                self._mlflow.log_params(
                    {name: str(settings[name])[:MOST_CHARACTERS] for name in part}
                )

    def scalars(self, values: Mapping[str, float], images_seen: int) -> None:
        self._mlflow.log_metrics(dict(values), step=images_seen)

    def image(self, tag: str, image: Tensor, images_seen: int) -> None:
        shown = Image.fromarray(image.permute(1, 2, 0).numpy())
        self._mlflow.log_image(shown, f"{tag}_{images_seen}.png")

    def close(self) -> None:
        self._mlflow.end_run()


class Checked:
    """A tracker whose errors after the start are warnings: training does not depend on it."""

    def __init__(self, tracker: Tracker, flag: str) -> None:
        self._tracker, self._flag = tracker, flag

    def config(self, *values: Any) -> None:
        self._call(self._tracker.config, *values)

    def scalars(self, *values: Any) -> None:
        self._call(self._tracker.scalars, *values)

    def image(self, *values: Any) -> None:
        self._call(self._tracker.image, *values)

    def close(self) -> None:
        self._call(self._tracker.close)

    def _call(self, method: Callable, *values: Any) -> None:
        try:
            method(*values)
        except Exception as error:
            _logger.warning("%s: not written (%s)", self._flag, error)


# By flag: the package to import, what to install, the tracker, and what to do if it cannot start
OPTIONAL: dict[str, tuple[str, str, Callable[[Path, int], Tracker], str]] = {
    "log_wandb": ("wandb", "wandb", Wandb, "run `wandb login`, or set WANDB_MODE=offline"),
    "log_mlflow": (
        "mlflow",
        "mlflow-skinny sqlalchemy alembic",
        Mlflow,
        "pip install mlflow-skinny sqlalchemy alembic, and check MLFLOW_TRACKING_URI",
    ),
}


def check_trackers(args: Namespace) -> None:
    """Raise UserError for a tracker whose package is not installed."""
    for dest, (module, package, *_) in OPTIONAL.items():
        if vars(args)[dest] and importlib.util.find_spec(module) is None:
            raise UserError(
                f"{_flag(dest)}: the package {module} is not installed; pip install {package}"
            )


def build_trackers(args: Namespace, images_seen: int) -> list[Tracker]:
    """Return the trackers of a run. images_seen: by a resumed run, so far.

    Raises UserError for one that cannot start.
    """
    folder = Path(args.output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    trackers: list[Tracker] = []
    try:
        trackers.append(TensorBoard(folder, images_seen))
    except ImportError as error:
        _logger.warning("no TensorBoard log: %s", error)
    except OSError as error:
        raise UserError(
            f"{folder / 'tensorboard'}: cannot be written ({error.strerror})"
        ) from error
    for dest, (_, _, make, advice) in OPTIONAL.items():
        if vars(args)[dest]:
            try:
                trackers.append(Checked(make(folder, images_seen), _flag(dest)))
            except Exception as error:  # of any class: each package has its own
                raise UserError(f"{_flag(dest)}: cannot start ({error}); {advice}") from error
    return trackers


def _flag(dest: str) -> str:
    return f"--{dest.replace('_', '-')}"
