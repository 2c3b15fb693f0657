"""Evaluation outside the training loop: weights of files (--eval), and the teacher."""

from argparse import Namespace
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

import engine
import models
from base.distributed import print_once
from base.errors import UserError
from checks import diagnose
from datasets import Loaders
from distill.teacher import LogitsOnly
from models import Student
from models.released import Released
from training import optim, setup
from training.checkpointer import resolve
from training.setup import Runtime, Training

if TYPE_CHECKING:
    from distill.cached_teacher import CachedTeacher


def build_file_results(
    args: Namespace, student: Student, loaders: Loaders, runtime: Runtime
) -> dict[str, float]:
    """Evaluate the weights of --resume, and its EMA weights if it has both; return the former's.

    Without --resume: those of --finetune, published weights, or random ones.
    """
    path = resolve(args.resume, Path(args.output_dir)) or args.finetune
    if args.resume and not path:
        raise UserError(f"--resume {args.resume}: {args.output_dir} has no checkpoint to evaluate")
    options: dict[str, Any] = {"amp_dtype": runtime.amp_dtype, "present": loaders.present}
    if not path:
        what = "published weights" if args.pretrained else "random weights (no --resume)"
        if args.pretrained and args.model.startswith("local-dir:"):
            what = args.model
        if args.pretrained:
            _print_input_differences("", args.model, runtime)
        print_once("weights", what)
        stats = engine.evaluate(loaders.val, student.network, runtime.device, **options)
        print_accuracy(stats, models.released.published(args.model) if args.pretrained else None)
        return stats
    _print_input_differences(path, args.model, runtime)
    by_key: dict[str, dict[str, float]] = {}
    for key in models.weight_keys(path):
        models.load_weights(student.network, path, key=key)
        print_once("weights", f"{path}, {key}" if key else path)
        stats = engine.evaluate(loaders.val, student.network, runtime.device, **options)
        print_accuracy(stats, models.released.published(args.model, path))
        by_key[key or "model"] = stats
    return by_key.get("model") or next(iter(by_key.values()))


def _print_input_differences(path: str, model: str, runtime: Runtime) -> None:
    """Print how the input differs from that of the weights. path: "" for published ones."""
    if changed := models.input_differences(path, model, runtime.inputs):
        print_once("WARNING", f"the input differs from that of the weights: {'; '.join(changed)}")


def print_accuracy(stats: dict[str, float], published: Released | None = None) -> None:
    """Print the accuracy, and the published one of the file if there is one."""
    line = f"Accuracy of the network on the {stats['count']} test images: {stats['acc1']:.1f}%"
    print_once(None, line)
    print_present(stats)
    if published is not None and (note := published.beside(stats["acc1"], int(stats["count"]))):
        print_once("published", note)


def print_present(stats: dict[str, float]) -> None:
    """Print the accuracy among the classes with images, if some classes have none."""
    if "acc1_present" in stats:
        among = f"Accuracy among the classes that have images: {stats['acc1_present']:.1f}%"
        print_once(None, among)


def check_student_and_teacher(
    args: Namespace,
    student: Student,
    teacher: LogitsOnly | None,
    loaders: Loaders,
    runtime: Runtime,
    predictions: list[Tensor],
) -> dict[str, float]:
    """Print the findings of --check; return the teacher's accuracy with --teacher-check.

    teacher: its network without features, or None if there is none. predictions: as for
    `engine.evaluate`.
    """
    if args.check or args.teacher_check:
        found = diagnose.build_findings(
            args, student, teacher, loaders, runtime.inputs, runtime.device
        )
        lines = found.problems
        if args.check:
            plan = optim.build_batch_plan(args, len(loaders.train), runtime.processes.world_size)
            lines = lines or [diagnose.check_passed(args, teacher)]
            lines = found.accuracies + optim.build_findings(args, plan) + lines
        for line in lines:
            print_once("check", line)
    if teacher is None or args.check or not args.teacher_check:
        return {}
    sizes = {diagnose.size_of(member) for member in teacher.teacher.members if member.classifies}
    print_once("teacher", f"accuracy on the evaluation set, {' and '.join(sorted(sizes))}")
    stats = engine.evaluate(
        loaders.val,
        teacher,
        runtime.device,
        header="Teacher:",
        present=loaders.present,
        predictions=predictions,
    )
    print_present(stats)
    return stats


def evaluate_epoch(
    training: Training, loaders: Loaders, runtime: Runtime, predictions: list[Tensor]
) -> tuple[dict[str, float], dict[str, float]]:
    """Evaluate the student and its moving average; {} where there is none.

    predictions: replaced by the student's, as for `engine.evaluate`.
    """
    options: dict[str, Any] = {
        "amp_dtype": runtime.amp_dtype,
        "interrupt": training.checkpointer,
        "present": loaders.present,
    }
    predictions.clear()
    stats = engine.evaluate(
        loaders.val,
        training.student.network,
        runtime.device,
        predictions=predictions,
        **options,
    )
    if training.ema is None:
        return stats, {}
    average = training.ema.on(runtime.device)
    return stats, engine.evaluate(
        loaders.val, average, runtime.device, header="Test EMA:", **options
    )


def fill_cache(args: Namespace, loaders: Loaders, cache: "CachedTeacher", runtime: Runtime) -> None:
    """Write the missing rows of the teacher's cache, or compare all rows with the teacher."""
    config = setup.build_step_config(args, loaders, cache, runtime)
    what = "Write" if args.teacher_cache_mode == "write" else "Verify"

    def query_epoch(epoch: int) -> None:
        loaders.set_epoch(epoch)
        header = f"{what}: [{epoch + 1}/{cache.cycle_epochs}]"
        step = replace(config, header=header, log_interval=50)
        engine.query_epoch(loaders.train, cache, runtime.device, epoch, config=step)

    cache.fill(query_epoch)
    print_once("teacher", cache.describe())
