"""Checkpoints and exact resume.

All randomness is a function of names (see `data/samplers.py`). So a checkpoint holds the weights,
the optimizer, scaler and moving average, the position in the epoch, and the settings.
"""

import logging
import os
import re
import reprlib
import time
from argparse import Namespace
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol

import torch

from base import distributed, files, flag_table, flags, safe_load, terminal
from base.errors import CorruptFile, Stopped, UserError
from training import run_settings
from training.optim import load_optimizer_state
from training.signals import StopSignals
from training.state import EpochState

_logger = logging.getLogger(__name__)

FORMAT = 3
SAVE = 1  # a request to save; below every stop signal's number
REQUIRED = {"model": dict, "optimizer": dict, "epoch": int}
OURS = {
    "format": int,
    "outline": str,
    "args": dict,
    "facts": dict,
    "tally": dict,
    "global_step": int,
    "best_acc1": float,
}
WEIGHTS = ("model", "model_ema", "projections")
MOST_EPOCHS = 2**31
OPTIMIZER_OPTIONS = ("weight_decay", "betas", "eps", "momentum")  # those that have a flag
NEWEST, BEST = "checkpoint.pth", "best_checkpoint.pth"
# Settings that a resumed run may change: they do not change the weights. --data-path and
# --teacher-path are among them because images and file hashes are compared. --epochs is, because
# longer training is common.
MAY_CHANGE = frozenset(flag_table.with_fact(flags.MAY_CHANGE))


class Stateful(Protocol):
    def state_dict(self) -> dict[str, Any]: ...
    def load_state_dict(self, state: Any) -> Any: ...


class Checkpointer:
    """Writes the checkpoints of a run to `folder`, resumes from them, and stops on a signal.

    parts: objects with a state, by their key in the checkpoint; `model` and `optimizer` at least.
    settings: every flag; facts: what must stay the same besides flags (processes, data).
    steps: micro-steps of an epoch; 0 for streamed data, which has no fixed order. Then an
        unfinished epoch starts again.
    keep: checkpoints besides the best. every_steps (updates), every_minutes: 0 is never.
    With an empty folder nothing is written.
    """

    def __init__(
        self,
        folder: str,
        parts: Mapping[str, Stateful],
        state: EpochState,
        *,
        settings: Mapping[str, Any],
        facts: Mapping[str, Any],
        steps: int,
        device: torch.device,
        keep: int = 2,
        every_steps: int = 0,
        every_minutes: float = 0,
        classes: list[str] | None = None,
    ) -> None:
        self.folder = Path(folder) if folder else None
        self.parts, self.state, self.steps, self.keep = parts, state, steps, keep
        self.classes = classes  # names, for students of this network
        self.settings, self.facts = run_settings.to_save(settings), files.to_plain(facts)
        self.every_steps, self.every_minutes = every_steps, every_minutes
        self.epoch, self.global_step, self.best = int(settings.get("start_epoch", 0)), 0, -1.0
        self._signals = StopSignals()
        self._agree = distributed.Agreement(device)
        self._saved_at = time.monotonic()

    def take_folder(self) -> None:
        """Lock the folder for this run, and remove incomplete files of a killed run.

        For the first process. Raises UserError while another run writes there.
        """
        if self.folder is None:
            return
        try:
            self._lock = files.lock_folder(self.folder)
            for leftover in self.folder.glob(".*.[0-9]*.tmp"):
                leftover.unlink(missing_ok=True)
        except OSError as error:
            raise UserError(
                f"--output_dir {self.folder}: {error.filename or files.LOCK}: "
                f"{error.strerror}; repair it, or choose another"
            ) from error

    def clear(self, source: str) -> None:
        """Move an earlier run in the folder aside, unless `source` (of --resume) continues it.

        For the first process.
        """
        if self.folder is None or is_auto(source):
            return
        if not source or Path(source).resolve().parent != self.folder.resolve():
            move_earlier_run(self.folder)

    # ---- when to save, when to stop

    def epochs(self, count: int) -> Iterator[int]:
        """Yield the epochs that are left of `count`; a stop signal in between is recorded."""
        with self._signals.handled():
            if count == 0:
                self.save()  # a run of no epochs keeps its weights
            yield from range(self.epoch, count)

    @property
    def stop_signal(self) -> int:
        """The signal that this process received, or 0."""
        return self._signals.number

    def stop(self) -> None:
        """Save and raise Stopped. All processes must call it, whichever received the signal."""
        received = torch.tensor(self.stop_signal, device=self._agree.device)
        number = int(distributed.all_gather(received).max())
        self.save()
        raise Stopped(number, folder=str(self.folder or ""))

    def after_update(self, global_step: int) -> None:
        """Save if it is due. Stop in all processes if one of them has received a signal."""
        self.global_step = global_step
        request = self._agree(self.stop_signal or SAVE * self._minutes_are_over())
        if request > SAVE:
            self.stop()
        if request == SAVE or (self.every_steps and global_step % self.every_steps == 0):
            self.save()

    def _minutes_are_over(self) -> bool:
        """Return, in the first process, whether --checkpoint-minutes are over; true once."""
        now = time.monotonic()
        over = self.every_minutes > 0 and now - self._saved_at >= 60 * self.every_minutes
        if over:
            self._saved_at = now
        return over and distributed.is_main()

    def end_epoch(self, acc1: float | None) -> None:
        """Save after an epoch; also as the best, if its accuracy (percent) is the highest.

        acc1: None after an epoch without evaluation (--val-interval), which is not saved.
        """
        self.epoch += 1
        self.state.reset()
        if acc1 is not None:
            is_best, self.best = acc1 > self.best, max(self.best, acc1)
            self.save(is_best=is_best)

    # ---- writing

    def save(self, *, is_best: bool = False) -> None:
        """Write a checkpoint; all processes must call it."""
        state = self.state.state_dict()
        self._saved_at = time.monotonic()
        if self.folder is not None:
            distributed.on_main(lambda: self._write(state, is_best))

    def _write(self, state: dict[str, Any], is_best: bool) -> None:
        groups = self.parts["optimizer"].param_groups  # type: ignore[attr-defined]
        if not all(files.is_finite(parameter) for group in groups for parameter in group["params"]):
            raise UserError(
                f"after update {self.global_step} the weights are not finite and not saved; "
                f"{self.folder / NEWEST} is as it was; lower --lr, set --clip-grad 1, or use "
                "--amp bf16"
            )
        content = {name: part.state_dict() for name, part in self.parts.items()}
        content |= {
            "epoch": self.epoch - 1,  # the last finished one, as DeiT
            "global_step": self.global_step,
            "best_acc1": self.best,
            "tally": state,
            "args": self.settings,
            "facts": self.facts,
            "classes": self.classes,
            "format": FORMAT,
        }
        content["outline"] = files.outline(content)
        files.save_atomically(
            content,
            self.folder / NEWEST,
            keep=self.keep,
            copy_to=self.folder / BEST if is_best else None,
        )

    def save_bad_batch(self, batch: Mapping[str, Any]) -> str:
        """Write a file that reproduces a batch with a non-finite loss; return its path."""
        if self.folder is None:
            return "no file, because --output_dir is empty"
        path = self.folder / "bad_batch.pth"
        try:
            files.save_atomically({**files.to_plain(batch), "args": self.settings}, path)
        except UserError as error:  # why it was written is more to the point
            return f"no file ({error.line()})"
        return str(path)

    # ---- resuming

    def resume(self, source: str, *, anyway: bool = False) -> str:
        """Load the run of `source`; return a description of its position.

        source: a file, a URL, `auto` (the newest in our folder), or `auto:` and one of the former,
            for where the folder has none yet.
        Raises UserError for a file that cannot be read or belongs to another run, and, unless
        `anyway`, for settings that must not change.
        """
        found: dict[str, Any] = {}

        def usable(path: Path) -> None:
            saved = load_run(path)
            # Loading is the check. All processes load the chosen file again below. A file with
            # other settings may be intact and of another run.
            if not any(self._changes(saved)):
                self._restore(path, saved)
            found.update(saved)

        def choose() -> str:
            path = resolve(source, self.folder, usable, aside=not self.settings.get("check"))
            if path and not found and not safe_load.is_url(path):  # all processes load a URL
                found.update(load_run(path))
            return path

        path = distributed.on_main(choose)
        if not path:
            return "no checkpoint yet, starting from the beginning"
        saved = found or load_run(path)
        changes = list(self._changes(saved))
        if changes and not anyway:
            raise UserError(
                f"--resume {path}: {'; '.join(changes)}. This must not change within a run; give "
                "the first value, or --resume-anyway"
            )
        for change in changes:
            _logger.warning("resumed anyway: %s", change)
        self._restore(path, saved)
        self._warn(saved)
        return f"{path}, epoch {self.epoch}, step {self.state.micro_step} of {self.steps}"

    def _warn(self, saved: Mapping[str, Any]) -> None:
        """Warn about allowed changes that affect the rest of the run."""
        was = saved["args"].get("epochs") if "facts" in saved else None
        now = self.settings.get("epochs")
        if was is not None and was != now:
            _logger.warning(
                "--epochs was %s and is %s: the schedule follows the new number", was, now
            )
        if "tally" in saved and saved["tally"]["micro_steps"] and not self.steps:
            _logger.warning("streamed data: epoch %d starts again", self.epoch)

    def _changes(self, saved: Mapping[str, Any]) -> Iterator[str]:
        """Yield each setting that differs from `saved`, with both values."""
        if "facts" not in saved:
            return  # DeiT's, which has no such entries
        for was, now in ((saved["args"], self.settings), (saved["facts"], self.facts)):
            for name in sorted(set(was) & set(now) - MAY_CHANGE):
                # Older files have paths as they were given.
                if differ(was[name], now[name]) and not run_settings.is_same(was[name], now[name]):
                    what = f"--{name.replace('_', '-')}" if was is saved["args"] else f"{name}:"
                    yield f"{what} was {reprlib.repr(was[name])} and is {reprlib.repr(now[name])}"

    def _restore(self, path: str | Path, saved: Mapping[str, Any]) -> None:
        """Load all parts of `saved`. Raises UserError if one does not fit or contains NaN."""
        try:
            for name, part in self.parts.items():
                if name in saved:
                    if name in WEIGHTS:
                        safe_load.check_numbers(saved[name], part.state_dict(), same_type=True)
                    if name == "optimizer":
                        load_optimizer_state(part, saved[name], self._own_options(saved))
                    else:
                        part.load_state_dict(saved[name])
                elif hasattr(part, "refresh"):  # the average starts from the weights
                    part.refresh(self.parts["model"])
                elif name not in ("lr_scheduler", "scaler"):
                    raise ValueError(f"no {name} in it")
            self.epoch, self.best = saved["epoch"] + 1, float(saved.get("best_acc1", 0.0))
            self.global_step = int(saved.get("global_step", 0))
            self._restore_tally(saved)
        except safe_load.UNREADABLE as error:
            reason = " ".join(str(error).split())[:200]
            kind = CorruptFile if "facts" in saved else UserError  # DeiT's may be of any model
            raise kind(
                f"--resume {path}: damaged, or of another model or optimizer ({reason}); use the "
                "flags it was made with, or --finetune to take its weights alone"
            ) from error

    def _own_options(self, saved: Mapping[str, Any]) -> tuple[str, ...]:
        """Return the optimizer's options that follow this run's flags; of a file of DeiT's, none.

        Without --resume-anyway they are as in the file.
        """
        if "facts" not in saved:
            return ()
        return (*OPTIMIZER_OPTIONS, *(self.settings.get("opt_kwargs") or {}))

    def _restore_tally(self, saved: Mapping[str, Any]) -> None:
        self.state.reset()
        if "tally" not in saved:  # DeiT's
            return
        state = dict(saved["tally"])
        if state["micro_steps"] and not self.steps:  # streamed data: the epoch starts again
            return
        was, now = (
            settings["batch_size"] * facts["processes"]
            for settings, facts in ((saved["args"], saved["facts"]), (self.settings, self.facts))
        )
        if was != now:  # the same number of images, rounded down to whole updates
            group = self.settings["grad_accum_steps"]
            state["micro_steps"] = state["micro_steps"] * was // now // group * group
        if not 0 <= state["micro_steps"] <= self.steps:
            raise ValueError(f"step {state['micro_steps']} of {self.steps}")
        self.state.load_state_dict(state)


def load_run(source: str | Path) -> dict[str, Any]:
    """Return the checkpoint of a run: one of ours, checked to be complete, or one of DeiT's.

    Raises UserError for a file of weights alone, and for an incomplete one.
    """
    content = safe_load.read_weights_file(source)
    kinds: dict[str, type] = dict(REQUIRED)
    if set(OURS) & set(content) - {"args"}:  # the only one that DeiT's have too
        check_whole(source, content)
        kinds |= OURS
    if missing := [key for key in kinds if key not in content]:
        raise CorruptFile(
            f"{source}: has no {', '.join(missing)}, so no run can resume from it; to start from "
            "its weights use --finetune"
        )
    for key, kind in kinds.items():
        if not isinstance(content[key], kind):
            found = type(content[key]).__name__
            raise CorruptFile(f"{source}: {key} is a {found}, not a {kind.__name__}: damaged")
    if not -1 <= content["epoch"] < MOST_EPOCHS:
        raise CorruptFile(f"{source}: epoch {content['epoch']}: damaged")
    return content


def check_whole(source: str | Path, content: Mapping[str, Any]) -> None:
    """Raise UserError if one of our checkpoints differs from what was written."""
    found = content.get("format")
    if isinstance(found, int) and found != FORMAT:
        raise UserError(
            f"{source}: has format {found}, this program reads {FORMAT}; end the run with the "
            "version that began it, or take its weights with --finetune"
        )
    rest = {key: value for key, value in content.items() if key != "outline"}
    try:
        whole = files.outline(rest) == content.get("outline")
    except safe_load.UNREADABLE:
        whole = False
    if not whole:
        raise CorruptFile(
            f"{source}: does not hold what was written, something is missing or of another kind: "
            "damaged or changed; take one from before, or its weights alone with --finetune"
        )


def is_auto(source: str) -> bool:
    """Return whether a --resume looks for the newest checkpoint: `auto`, or `auto:OTHERWISE`."""
    return source.partition(":")[0] == "auto"


def resolve(
    source: str,
    folder: Path | None,
    usable: Callable[[Path], Any] = load_run,
    *,
    aside: bool = False,
) -> str:
    """Return the file or URL that `source` (see `Checkpointer.resume`) means, or "" for none."""
    if not is_auto(source):
        return source
    found = find_newest(folder, usable, aside=aside) if folder else None
    return str(found or source.partition(":")[2])


def find_newest(
    folder: Path, usable: Callable[[Path], Any] = load_run, *, aside: bool = False
) -> Path | None:
    """Return the newest complete checkpoint in `folder`, or None if there is none.

    usable: raises CorruptFile for a damaged checkpoint. Its other errors are not caught.
    aside: rename newer, damaged ones to NAME.damaged.
    Raises UserError if all are damaged.
    """
    older = {
        int(match[1]): path
        for path in folder.glob("checkpoint-*.pth")
        if (match := re.fullmatch(r"checkpoint-(\d+)\.pth", path.name))
    }
    names = [folder / NEWEST, *(older[age] for age in sorted(older)), folder / BEST]
    damaged = []
    for path in filter(os.path.lexists, names):
        try:
            usable(path)
        except CorruptFile as error:
            _logger.warning("%s; taking the one before", error.line())
            damaged.append(path)
            continue
        for bad in damaged if aside else ():
            rename_corrupt(bad)
        return path
    if damaged:
        raise UserError(
            f"--resume auto: no checkpoint in {folder} can be read "
            f"({', '.join(path.name for path in damaged)}); remove them to begin again"
        )
    return None


def rename_corrupt(path: Path) -> None:
    """Rename a damaged file to NAME.damaged, NAME.damaged-2, ... Raises UserError if it cannot."""
    number, target = 1, path.with_name(f"{path.name}.damaged")
    while os.path.lexists(target):
        number += 1
        target = path.with_name(f"{path.name}.damaged-{number}")
    try:
        os.replace(path, target)
    except OSError as error:
        raise UserError(
            f"{path}: damaged, and cannot be renamed ({error.strerror}): do it, or remove it"
        ) from error


def differ(one: Any, other: Any) -> bool:
    """Return whether two settings differ. Values that cannot be compared differ."""
    try:
        return bool(one != other)
    except (RuntimeError, TypeError, ValueError):
        return True


def build_checkpointer(
    args: Namespace,
    parts: Mapping[str, Stateful | None],
    state: EpochState,
    *,
    facts: Mapping[str, Any],
    steps: int,
    device: torch.device,
    classes: list[str] | None = None,
) -> Checkpointer:
    """Return the checkpointer of a run, after --resume. Parts that are None are left out."""
    checkpointer = Checkpointer(
        args.output_dir,
        {name: part for name, part in parts.items() if part is not None},
        state,
        settings=vars(args),
        facts=facts,
        steps=steps,
        device=device,
        keep=args.keep_checkpoints,
        every_steps=args.checkpoint_steps,
        every_minutes=args.checkpoint_minutes,
        classes=classes,
    )
    if not args.check:
        distributed.on_main(checkpointer.take_folder)
    if args.resume:
        where = checkpointer.resume(args.resume, anyway=args.resume_anyway)
        _logger.info("resume: %s", where)
    if not args.check:
        distributed.on_main(lambda: checkpointer.clear(args.resume))
    return checkpointer


def move_earlier_run(folder: Path) -> None:
    """Move the files of an earlier run in `folder` to previous-1, previous-2, ... and warn."""
    names = [*folder.glob("*checkpoint*.pth"), folder / "log.txt", folder / "tensorboard"]
    names.append(folder / terminal.LOG)
    found = [path for path in names if path.exists()]
    if not found:
        return
    number = 1
    while (folder / f"previous-{number}").exists():
        number += 1
    aside = folder / f"previous-{number}"
    try:
        aside.mkdir()
        for path in found:
            os.replace(path, aside / path.name)
    except OSError as error:
        raise UserError(
            f"{folder} holds an earlier run, which cannot be moved to {aside} ({error.strerror}); "
            "continue it by --resume auto, or choose another --output_dir"
        ) from error
    _logger.warning(
        "%s holds an earlier run: moved to %s (--resume auto continues it instead)",
        folder,
        aside,
    )
