"""Train, distil and evaluate a vision transformer.

torchrun main.py --distillation-type hard                      # embedded images
torchrun --nproc_per_node=8 main.py --data-path IMAGENET ...   # DeiT's command line
python main.py --eval --resume FILE --data-path FOLDER
"""

import warnings
from argparse import Namespace
from collections.abc import Callable, Sequence
from dataclasses import replace

if __name__ == "__main__":
    import base.quiet_start

import base.wait_policy  # noqa: F401  before torch is imported
import datasets
import engine
import models
import options
from base import terminal
from base.distributed import print_once
from checks import evaluation
from checks.run_summary import RunSummary, build_summary
from data.samplers import BatchKey
from datasets import Loaders
from distill import objective
from training import exit_codes, metrics, run_folder, setup
from training.setup import Runtime, Training
from training.trained_classes import build_trained_classes, build_val_fraction


def main(args: Namespace, notes: Sequence[str] = (), about: Sequence[str] = ()) -> None:
    """Run the settings `args`. notes: warnings about flags; about: lines about the recipe."""
    runtime = setup.build_runtime(args)
    if args.dry_run:
        from checks import dry_run  # a run that trains never needs it

        plan = dry_run.build_plan(args, runtime.processes, runtime.inputs, runtime.amp_dtype)
        print_once(None, "\n".join([*plan, *about, *(f"WARNING: {note}" for note in notes)]))
        return
    with terminal.table(run_folder.build_is_run(args)), run_folder.build_settings(args) as settings:
        setup.print_notes(notes, about)
        set_up_and_train(settings, runtime)


def set_up_and_train(args: Namespace, runtime: Runtime) -> None:
    """Run the settings, whose output folder is known: evaluate, fill a cache, check or train."""
    trained = build_trained_classes(args)
    loaders = datasets.build_loaders(
        args, runtime.inputs, runtime.processes, trained, build_val_fraction(args)
    )
    student = setup.build_student(args, loaders, runtime)
    if args.eval:
        evaluation.build_file_results(args, student, loaders, runtime)
        return
    cache = setup.build_cache(args, loaders, runtime)
    teacher = cache or setup.build_live_teacher(args, loaders, runtime)
    if teacher is not None:
        print_once("teacher", teacher.describe())
    print_once("processes", setup.build_processes_line(args, runtime))
    if cache is not None and args.teacher_cache_mode in ("write", "verify"):
        evaluation.fill_cache(args, loaders, cache, runtime)
        return
    if args.minutes and not args.check:
        from checks import time_budget  # few runs have a time limit

        args = time_budget.build_settings(args, loaders, student, teacher, runtime)
    training = setup.build_training(args, loaders, student, teacher, runtime)
    predictions: list = []  # of the teacher
    teacher_stats = evaluation.check_student_and_teacher(
        args, student, training.teacher_logits, loaders, runtime, predictions
    )
    if not args.check:
        summary = build_summary(args, training, loaders, runtime, teacher_stats, predictions)
        train(args, training, loaders, runtime, summary)


def train(
    args: Namespace, training: Training, loaders: Loaders, runtime: Runtime, summary: RunSummary
) -> None:
    """Train and evaluate for the epochs that are left."""
    checkpointer, log = training.checkpointer, setup.build_log(args, training)
    summary.print_start()
    if log.has_board:
        from checks.board import Board  # only TensorBoard needs it

        board = Board(log, training, loaders, runtime, summary.teacher)
        board.first_batch()
    stats, ema_stats, predictions = {}, {}, []
    for epoch in checkpointer.epochs(args.epochs):
        train_stats = train_epoch(training, loaders, log, summary, epoch)
        if epoch == summary.first_epoch:
            objective.warn_about_small_terms(train_stats)
        stats, ema_stats = {}, {}
        if (epoch + 1) % args.val_interval == 0 or epoch + 1 == args.epochs:
            stats, ema_stats = evaluation.evaluate_epoch(training, loaders, runtime, predictions)
            training.config.schedule.end_epoch(epoch, stats["acc1"])
        speed, parameters = summary.speed.values(), training.student.num_parameters()
        images_seen = training.images_seen(epoch + 1)
        log.epoch(epoch, train_stats, stats, ema_stats, parameters, images_seen, speed=speed)
        if stats and log.has_board:
            board.attention()
        checkpointer.end_epoch(stats["acc1"] if stats else None)  # log.txt must be first
        summary.print_epoch(epoch, train_stats["loss"], stats, ema_stats, checkpointer.best)
    if skipped := setup.count_skipped_images(loaders, runtime):
        print_once("data", f"{skipped} unreadable images were left out")
    log.close()
    summary.print_end(stats, ema_stats, checkpointer.best, predictions)


def train_epoch(
    training: Training, loaders: Loaders, log: metrics.RunLog, summary: RunSummary, epoch: int
) -> dict[str, float]:
    """Train for one epoch, or for the rest of a resumed one; return its averages."""
    config = replace(training.config, header=f"Epoch: [{epoch + 1}/{summary.epochs}]")
    loaders.set_epoch(config.within_cycle(BatchKey(epoch, 0)).epoch, training.state.micro_step)
    summary.speed.start(training.state.micro_step)
    train_stats = engine.train_one_epoch(
        training.model,
        training.criterion,
        loaders.train,
        training.optimizer,
        training.state.device,
        epoch,
        teacher=training.teacher,
        config=config,
        state=training.state,
        hooks=training.hooks(log, epoch),
    )
    summary.speed.end_training()
    return train_stats


def parse_and_run(argv: Sequence[str] | None) -> None:
    """Parse the command line and run it."""
    settings = options.parse_args(argv)
    if settings.args.list_models is not None:
        print(models.released.table(settings.args.list_models))
    else:
        with exit_codes.user_errors_about_batch_size(settings.args.batch_size):
            main(settings.args, settings.notes, settings.about)


def run(
    argv: Sequence[str] | None = None, on_stop: Callable[[int], None] = lambda signal_number: None
) -> int:
    """Run a command line and return its exit code (see `training/exit_codes.py`).

    on_stop: called with the number of the signal that stopped the run.
    """
    warnings.filterwarnings("ignore", message=".*lr_scheduler.step.*")
    return exit_codes.exit_code_of(lambda: parse_and_run(argv), on_stop, argv)


if __name__ == "__main__":
    exit_codes.StopWhenClosed.install()
    exit_codes.end_program(run())
