"""Train, distil and evaluate a vision transformer: the recipe, from top to bottom.

torchrun main.py --distillation-type hard                      # embedded images
torchrun --nproc_per_node=8 main.py --data-path IMAGENET ...   # DeiT's command line
python main.py --eval --resume FILE --data-path FOLDER
"""

import logging
import os
import sys
import time
import warnings
from argparse import Namespace
from collections.abc import Callable, Sequence
from pathlib import Path
from signal import Signals

import torch

import datasets
import engine
import models
import options
from base import distributed, files
from base.errors import EXIT_FAULT, EXIT_STOPPED, PeerLost, Stopped, UserError
from checks import diagnose, dry_run, visualize
from data import transforms
from distill import objective
from distill.cached_teacher import build_cached_teacher
from distill.teacher import build_identity, build_teacher
from training import metrics, optim, recipe
from training.checkpointer import build_checkpointer, resolve

_logger = logging.getLogger("main")


def main(args: Namespace, notes: Sequence[str] = (), about: Sequence[str] = ()) -> dict[str, float]:
    """Run what `args` asks for and return the last evaluation's numbers.

    notes: what to warn of; about: what to say of the recipe.
    """
    processes = distributed.init_processes(
        args.device, dist_url=args.dist_url, timeout_min=args.dist_timeout
    )
    metrics.set_up_logging(processes.rank)
    device = processes.device
    if device.type == "cpu":
        models.fast.keep_memory()
    amp_dtype = pick_amp(args.amp, device)
    teacher_amp = pick_amp(args.amp if args.teacher_amp == "auto" else args.teacher_amp, device)
    engine.seed_step(args.seed, "model")

    if args.output_dir and distributed.is_main() and not (args.eval or args.dry_run):
        files.make_folder(args.output_dir)
    inputs = models.build_input_config(args)
    if args.dry_run:
        plan = dry_run.build_plan(args, processes, inputs, amp_dtype)
        print_once(None, "\n".join([*plan, *about, *(f"WARNING: {note}" for note in notes)]))
        return {}
    for line in about:
        print_once(None, line)
    for note in notes:
        _logger.warning("%s", note)
    loaders = datasets.build_loaders(args, inputs, processes)
    student = models.build_student(args, loaders.num_classes, inputs).to(device)
    models.fast.select_kernels(student.network, device.type, amp_dtype)
    print_once("data", loaders.describe())
    print_once("student", f"{args.model}, {student.describe()}; input {inputs.describe()}")
    if args.eval:
        return evaluate_files(args, student, loaders, device, amp_dtype)
    cache = None
    if args.teacher_cache:
        teacher = cache = build_cached_teacher(args, loaders, inputs, processes, teacher_amp)
    else:
        teacher = build_teacher(args, loaders.num_classes, inputs, device, teacher_amp)
    if teacher is not None:
        print_once("teacher", teacher.describe())
    hint = (
        " (this CPU computes in bf16: --amp bf16)"
        if args.amp == "auto" and spares_bf16(device)
        else ""
    )
    print_once("processes", f"{processes.describe()}; amp {amp_dtype or 'off'}{hint}")
    model = student
    mixup_fn = transforms.build_mixup(args, loaders.num_classes)
    if cache is not None and args.teacher_cache_mode in ("write", "verify"):
        return fill_cache(args, loaders, cache, device, mixup_fn)
    cycle_epochs = teacher.cycle_epochs if teacher is not None else 0
    batch_plan = optim.build_batch_plan(args, len(loaders.train), processes.world_size)
    updates_per_epoch, effective = batch_plan.updates, batch_plan.batch
    ema = optim.build_ema(args, student.network)
    criterion = objective.build_objective(
        args,
        student,
        teacher,
        mixing=mixup_fn is not None,
        input_size=inputs.input_size,
        total_updates=args.epochs * updates_per_epoch,
    )
    if isinstance(criterion, objective.Objective):
        print_once("objective", criterion.describe())
    optimizer, _ = optim.build_optimizer(args, student, processes.world_size)
    schedule = optim.build_schedule(args, optimizer, updates_per_epoch, criterion.at_update)
    scaler = torch.amp.GradScaler(device.type) if amp_dtype == torch.float16 else None
    print_once("recipe", batch_plan.describe())

    state = engine.EpochState(device)
    checkpointer = build_checkpointer(
        args,
        {
            "model": student.network,
            "projections": student.trained_projections(),
            "optimizer": optimizer,
            "lr_scheduler": schedule,
            "scaler": scaler,
            "model_ema": ema,
        },
        state,
        facts={
            "processes": processes.world_size,
            "data": loaders.fingerprint(),
            "teacher": build_identity(args),
            "views that come again": cycle_epochs if cycle_epochs < args.epochs else 0,
        },
        classes=loaders.classes,
        steps=len(loaders.train) if loaders.train_sampler is not None else 0,
        device=device,
    )
    logits_only = teacher.logits_only() if teacher is not None else None
    teacher_stats = check_student_and_teacher(args, student, logits_only, loaders, inputs, device)
    if args.check:
        return {}
    if processes.world_size > 1:
        example = torch.zeros(2, 3, *inputs.input_size, device=device)
        model = distributed.data_parallel(student, example)
    if args.torchcompile:  # in place, so that names of weights stay; evaluation runs .network
        student.compile(backend=args.torchcompile, dynamic=False)
    log = metrics.RunLog(
        args.output_dir if distributed.is_main() else "",
        checkpointer.epoch,
        images_seen=checkpointer.global_step * effective,
    )
    log.config(vars(args))
    if log.has_board:
        loaders.set_epoch(0)
        log.scalars("val_teacher", teacher_stats, 0)
        shown = visualize.train_batch(
            loaders.train, inputs, loaders.classes, device, mixup_fn=mixup_fn, teacher=logits_only
        )
        log.image("train/batch", shown, 0)
    stats: dict[str, float] = {}
    started, first = time.time(), checkpointer.epoch

    for epoch in checkpointer.epochs(args.epochs):
        loaders.set_epoch(epoch % cycle_epochs if cycle_epochs else epoch, state.micro)
        seen = epoch * updates_per_epoch
        train_stats = engine.train_one_epoch(
            model,
            criterion,
            loaders.train,
            optimizer,
            device,
            epoch,
            teacher=teacher,
            schedule=schedule,
            loss_scaler=scaler,
            amp_dtype=amp_dtype,
            max_norm=args.clip_grad if args.clip_grad and args.clip_grad > 0 else None,
            accum_steps=args.grad_accum_steps,
            model_ema=ema,
            mixup_fn=mixup_fn,
            set_training_mode=args.train_mode,
            seed=args.seed,
            cycle_epochs=cycle_epochs,
            max_bad_steps=args.max_bad_steps,
            log_interval=args.log_interval,
            header=f"Epoch: [{epoch + 1}/{args.epochs}]",
            on_log=lambda update, shown, seen=seen: log.train(
                shown, criterion.term_weights, (seen + update + 1) * effective
            ),
            on_update=checkpointer.after_update,
            on_bad_batch=checkpointer.save_bad_batch,
            state=state,
        )
        if not stats:  # the first epoch of this process
            objective.warn_about_small_terms(train_stats)
        stats = engine.evaluate(
            loaders.val, student.network, device, amp_dtype=amp_dtype, interrupt=checkpointer
        )
        ema_stats = {}
        if ema is not None:
            ema_stats = engine.evaluate(
                loaders.val,
                ema.on(device),
                device,
                amp_dtype=amp_dtype,
                header="Test EMA:",
                interrupt=checkpointer,
            )
        schedule.end_epoch(epoch, stats["acc1"])
        images_seen = (epoch + 1) * updates_per_epoch * effective
        log.epoch(epoch, train_stats, stats, ema_stats, student.num_parameters(), images_seen)
        if log.has_board:
            log.scalars("val_teacher", teacher_stats, images_seen)  # a level line beside val
            looks = visualize.attention(
                student.network, diagnose.sample(loaders.val, 4)[0].to(device), inputs
            )
            log.image("val/attention", looks, images_seen)
        checkpointer.end_epoch(
            stats["acc1"]
        )  # after the log, from which a resumed run drops doubles
        report(stats)
        print_once(None, f"Max accuracy: {checkpointer.best:.2f}%")
        if left := args.epochs - epoch - 1:
            seconds = (time.time() - started) / (epoch + 1 - first) * left
            print_once(None, f"{left} epochs left, about {metrics.clock(seconds)}")
    if args.recipe and stats and (line := recipe.find(args.recipe).beside(stats["acc1"])):
        print_once("recipe", line)
    if not stats:
        print_once(None, f"Nothing to train: {checkpointer.epoch} of {args.epochs} epochs are done")
    print_once(None, f"Training time {metrics.clock(time.time() - started)}")
    skipped = int(distributed.all_reduce_sum(torch.tensor(loaders.skipped(), device=device)))
    if skipped:
        print_once("data", f"{skipped} unreadable images were left out")
    log.close()
    return stats


def check_student_and_teacher(args, student, answers, loaders, inputs, device) -> dict[str, float]:
    """Say what speaks against student and teacher, and return the teacher's accuracy if asked.

    answers: the teacher's logits, or None where no network answers.
    """
    if args.check or args.teacher_check:
        found = diagnose.build_findings(args, student, answers, loaders, inputs, device)
        for line in found or [diagnose.check_passed(args, answers)] * args.check:
            print_once("check", line)
    if answers is None or args.check or not args.teacher_check:
        return {}
    print_once("teacher", "accuracy on the evaluation set")
    return engine.evaluate(loaders.val, answers, device, header="Teacher:")


def fill_cache(args, loaders, teacher, device, mixup_fn) -> dict[str, float]:
    """Write the missing rows of the teacher's cache, or compare all rows with the teacher."""
    doing = "Write" if args.teacher_cache_mode == "write" else "Verify"

    def query_epoch(epoch: int) -> None:
        loaders.set_epoch(epoch)
        engine.query_epoch(
            loaders.train,
            teacher,
            device,
            epoch,
            mixup_fn=mixup_fn,
            seed=args.seed,
            header=f"{doing}: [{epoch + 1}/{teacher.cycle_epochs}]",
        )

    teacher.fill(query_epoch)
    print_once("teacher", teacher.describe())
    return {}


def pick_amp(wanted: str, device: torch.device) -> torch.dtype | None:
    """Return the autocast type of --amp: auto is bf16 (else fp16) on GPUs and off on CPUs."""
    if wanted == "auto":
        if device.type != "cuda":
            return None
        return torch.bfloat16 if torch.cuda.is_bf16_supported() else torch.float16
    return {"off": None, "bf16": torch.bfloat16, "fp16": torch.float16}[wanted]


def spares_bf16(device: torch.device) -> bool:
    """Return whether `auto` leaves a faster type alone: a CPU's runs are to repeat to the bit on
    every CPU's float32, and small networks gain nothing."""
    able = getattr(torch.cpu, "get_capabilities", dict)()
    return device.type == "cpu" and any(able.get(f"{unit}_bf16") for unit in ("avx512", "amx"))


def evaluate_files(args, student, loaders, device, amp_dtype) -> dict[str, float]:
    """Evaluate the weights of --resume, raw and EMA where the file has both."""
    path = resolve(args.resume, Path(args.output_dir)) or args.finetune
    if args.resume and not path:
        raise UserError(f"--resume {args.resume}: {args.output_dir} has no checkpoint to evaluate")
    if not path:
        what = "published weights" if args.pretrained else "random weights (no --resume)"
        if args.pretrained and args.model.startswith("local-dir:"):
            what = args.model
        print_once("weights", what)
        found = models.released.published(args.model) if args.pretrained else None
        return report(
            engine.evaluate(loaders.val, student.network, device, amp_dtype=amp_dtype), found
        )
    stats: dict[str, float] = {}
    for key in models.weight_keys(path):
        models.load_weights(student.network, path, key=key)
        print_once("weights", f"{path}, {key}" if key else path)
        stats[key or "model"] = report(
            engine.evaluate(loaders.val, student.network, device, amp_dtype=amp_dtype),
            models.released.published(args.model, path),
        )
    return stats.get("model") or next(iter(stats.values()))


def report(
    stats: dict[str, float], found: models.released.Released | None = None
) -> dict[str, float]:
    """Print an accuracy, and beside it the published one of the file, where there is one."""
    print_once(
        None, f"Accuracy of the network on the {stats['count']} test images: {stats['acc1']:.1f}%"
    )
    if found is not None and (line := found.beside(stats["acc1"], int(stats["count"]))):
        print_once("published", line)
    return stats


def print_once(what: str | None, line: str) -> None:
    """Print a line once, for all processes."""
    if distributed.is_main():
        print(f"{what}: {line}" if what else line, flush=True)


def run(
    argv: Sequence[str] | None = None, on_stop: Callable[[int], None] = lambda signal_number: None
) -> int:
    """Parse and run; return the exit code: 0 done, 2 for what the user can mend, in one line.

    A run that a signal has stopped returns EXIT_STOPPED, after `on_stop` has heard which.
    """
    warnings.filterwarnings("ignore", message=".*lr_scheduler.step.*")
    try:
        settings = options.parse_args(argv)
        if settings.args.list_models is not None:
            print(models.released.table(settings.args.list_models))
            return 0
        main(settings.args, settings.notes, settings.about)
    except KeyboardInterrupt:
        print_once(None, "Interrupted; --resume auto goes on from the last checkpoint")
        return 128 + Signals.SIGINT
    except UserError as error:
        if distributed.first_to_say(error.line(), code=2):
            print(f"error: {error.line()}", file=sys.stderr, flush=True)
        return 2  # without leaving the group: another process may still wait in a collective
    except Stopped as stop:
        name = Signals(stop.signal_number).name
        print_once(None, f"Stopped by {name}; --resume auto goes on from here")
        distributed.shutdown()
        on_stop(stop.signal_number)
        return EXIT_STOPPED
    except (RuntimeError, ConnectionError, EOFError) as error:
        if code := distributed.said_by_another():  # and it has left, so that a collective failed
            return code
        if reason := distributed.peer_lost_reason(error):
            what = "a process of this run has died or does not answer"
            advice = "--resume auto goes on; if one is only slow, raise --dist-timeout"
        elif "DataLoader timed out" in str(error):
            what, reason = "a DataLoader worker brings nothing", " ".join(str(error).split())
            advice = "does its disk still answer? --resume auto goes on; see --loader-timeout"
        elif "DataLoader worker" in str(error) or not isinstance(error, RuntimeError):
            what, reason = "a DataLoader worker is gone", " ".join(str(error).split())
            advice = "was the memory full? Use fewer --num-workers; --resume auto goes on"
        else:
            raise
        if isinstance(error, PeerLost) or distributed.first_to_say(what, code=1):
            print(f"error: {what} ({reason}); {advice}", file=sys.stderr, flush=True)
        return EXIT_FAULT
    distributed.shutdown()
    return 0


if __name__ == "__main__":
    code = run()
    sys.stdout.flush()
    sys.stderr.flush()
    if code == EXIT_FAULT:  # without waiting for a worker that its disk does not let go
        os._exit(code)
    sys.exit(code)
