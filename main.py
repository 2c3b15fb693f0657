"""Train, distil and evaluate a vision transformer: the recipe, from top to bottom.

torchrun main.py --distillation-type hard                      # embedded pictures
torchrun --nproc_per_node=8 main.py --data-path IMAGENET ...   # DeiT's command line
python main.py --eval --resume FILE --data-path FOLDER
"""

import logging
import sys
import time
import warnings
from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import nn

import augment
import checkpoint
import datasets
import distributed
import engine
import losses
import metrics
import models
import optim
import options
import pictures
import preflight
import recipe
import teachers
from errors import UserError

_logger = logging.getLogger("main")


def main(args: Namespace, notes: Sequence[str] = ()) -> dict[str, float]:
    """Run what `args` asks for and return the last evaluation's numbers."""
    processes = distributed.init_processes(args.device, dist_url=args.dist_url)
    metrics.set_up_logging(processes.rank)
    device = processes.device
    amp_dtype = pick_amp(args.amp, device)
    engine.seed_step(args.seed, "model")

    inputs = models.build_input_config(args)
    if args.dry_run:
        tell(None, "\n".join([*preflight.build_plan(args, processes, inputs, amp_dtype), *notes]))
        return {}
    loaders = datasets.build_loaders(args, inputs, processes)
    student = models.build_student(args, loaders.num_classes, inputs).to(device)
    tell("data", loaders.describe())
    tell("student", f"{args.model}, {student.describe()}; input {inputs.describe()}")
    if args.eval:
        return evaluate_files(args, student, loaders, device, amp_dtype)
    teacher = teachers.build_teacher(args, loaders.num_classes, inputs, device, amp_dtype)
    if teacher is not None:
        tell("teacher", teacher.describe())
    tell("processes", f"{processes.describe()}; amp {amp_dtype or 'off'}")
    for note in notes:
        _logger.warning("%s", note)
    teacher_stats: dict[str, float] = {}
    if args.check or args.teacher_check:
        found = preflight.build_findings(args, student, teacher, loaders, inputs, device)
        for line in found or ["student and teacher suit the data and each other"] * args.check:
            tell("check", line)
        if args.check:
            return {}
    if teacher is not None and args.teacher_check:
        tell("teacher", "accuracy on the evaluation set")
        teacher_stats = engine.evaluate(
            loaders.val, teacher, device, amp_dtype=None, header="Teacher:"
        )

    model = student
    mixup_fn = augment.build_mixup(args, loaders.num_classes)
    criterion = losses.build_criterion(
        args, mixing=mixup_fn is not None, head=student.distillation_head
    )
    optimizer, lr = optim.build_optimizer(args, student, processes.world_size)
    updates_per_epoch = -(-len(loaders.train) // args.grad_accum_steps)
    schedule = optim.build_schedule(args, optimizer, updates_per_epoch)
    scaler = torch.amp.GradScaler(device.type) if amp_dtype == torch.float16 else None
    ema = optim.build_ema(args, student.network)
    effective = args.batch_size * processes.world_size * args.grad_accum_steps
    tell("recipe", f"{args.epochs} epochs of {updates_per_epoch} updates, effective batch "
         f"{effective}, learning rate {lr:.3g}")  # fmt: skip

    start_epoch, best = args.start_epoch, 0.0
    if args.resume:
        saved = checkpoint.load_checkpoint(args.resume)
        start_epoch, best = restore(saved, student, optimizer, schedule, scaler, ema, args.resume)
    if processes.world_size > 1:
        model = nn.parallel.DistributedDataParallel(
            student, device_ids=[device.index] if device.type == "cuda" else None
        )
    log = metrics.RunLog(args.output_dir if distributed.is_main() else "", start_epoch)
    log.config(vars(args))
    if log.has_board:
        loaders.set_epoch(start_epoch)
        log.scalars("val_teacher", {k: v for k, v in teacher_stats.items() if k != "count"}, 0)
        shown = pictures.train_batch(
            loaders.train, inputs, loaders.classes, device, mixup_fn=mixup_fn, teacher=teacher
        )
        log.picture("train/batch", shown, 0)
    stats: dict[str, float] = {}
    started = time.time()

    for epoch in range(start_epoch, args.epochs):
        loaders.set_epoch(epoch)
        seen = epoch * updates_per_epoch
        train_stats = engine.train_one_epoch(
            model, criterion, loaders.train, optimizer, device, epoch,
            teacher=teacher, schedule=schedule, loss_scaler=scaler, amp_dtype=amp_dtype,
            max_norm=args.clip_grad if args.clip_grad and args.clip_grad > 0 else None,
            accum_steps=args.grad_accum_steps, model_ema=ema, mixup_fn=mixup_fn,
            set_training_mode=args.train_mode, seed=args.seed,
            max_bad_steps=args.max_bad_steps, log_interval=args.log_interval,
            header=f"Epoch: [{epoch + 1}/{args.epochs}]",
            on_log=lambda update, shown, seen=seen: log.scalars(
                "train", shown, (seen + update + 1) * effective
            ),
        )  # fmt: skip
        stats = engine.evaluate(loaders.val, student.network, device, amp_dtype=amp_dtype)
        ema_stats = {}
        if ema is not None:
            ema_stats = engine.evaluate(
                loaders.val, ema.on(device), device, amp_dtype=amp_dtype, header="Test EMA:"
            )
        schedule.end_epoch(epoch, stats["acc1"])
        is_best, best = stats["acc1"] > best, max(best, stats["acc1"])
        if args.output_dir and distributed.is_main():
            for name in ["checkpoint.pth"] + ["best_checkpoint.pth"] * is_best:
                checkpoint.save_checkpoint(
                    Path(args.output_dir, name), model=student.network, optimizer=optimizer,
                    lr_scheduler=schedule, epoch=epoch, model_ema=ema, scaler=scaler, args=args,
                    extra={"best_acc1": best, "global_step": (epoch + 1) * updates_per_epoch,
                           "classes": loaders.classes},
                )  # fmt: skip
        log.epoch(epoch, train_stats, stats, ema_stats, student.num_parameters(),
                  (epoch + 1) * updates_per_epoch * effective)  # fmt: skip
        if log.has_board:
            looks = pictures.attention(
                student.network, preflight.sample(loaders.val, 4)[0].to(device), inputs
            )
            log.picture("val/attention", looks, (epoch + 1) * updates_per_epoch * effective)
        distributed.barrier()
        tell(None, f"Accuracy of the network on the {stats['count']} test images: "
             f"{stats['acc1']:.1f}%")  # fmt: skip
        tell(None, f"Max accuracy: {best:.2f}%")
    if args.recipe and stats and (line := recipe.find(args.recipe).beside(stats["acc1"])):
        tell("recipe", line)
    tell(None, f"Training time {metrics.clock(time.time() - started)}")
    skipped = int(distributed.all_reduce_sum(torch.tensor(loaders.skipped(), device=device)))
    if skipped:
        tell("data", f"{skipped} unreadable pictures were left out")
    log.close()
    return stats


def restore(saved, student, optimizer, schedule, scaler, ema, source: str) -> tuple[int, float]:
    """Put a checkpoint back into the parts of a run; return its next epoch and best accuracy."""
    try:
        student.network.load_state_dict(saved["model"])
        optimizer.load_state_dict(saved["optimizer"])
    except (RuntimeError, ValueError, KeyError) as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(
            f"--resume {source}: is of another model or optimizer ({reason}); use the flags it was "
            "made with, or --finetune to take its weights alone"
        ) from error
    schedule.load_state_dict(saved.get("lr_scheduler", {}))
    if scaler is not None and "scaler" in saved:
        scaler.load_state_dict(saved["scaler"])
    if ema is not None:
        if "model_ema" in saved:
            ema.load_state_dict(saved["model_ema"])
        else:
            ema.refresh(student.network)
    return saved["epoch"] + 1, float(saved.get("best_acc1", 0.0))


def pick_amp(wanted: str, device: torch.device) -> torch.dtype | None:
    """Return the autocast type of --amp: auto is bf16 (else fp16) on GPUs and off on CPUs."""
    if wanted == "auto":
        if device.type != "cuda":
            return None
        return torch.bfloat16 if torch.cuda.is_bf16_supported() else torch.float16
    return {"off": None, "bf16": torch.bfloat16, "fp16": torch.float16}[wanted]


def evaluate_files(args, student, loaders, device, amp_dtype) -> dict[str, float]:
    """Evaluate the weights of --resume, raw and EMA where the file has both."""
    path = args.resume or args.finetune
    if not path:
        what = "published weights" if args.pretrained else "random weights (no --resume)"
        tell("weights", what)
        found = models.released.published(args.model) if args.pretrained else None
        return report(
            engine.evaluate(loaders.val, student.network, device, amp_dtype=amp_dtype), found
        )
    stats: dict[str, float] = {}
    for key in models.weight_keys(path):
        models.load_weights(student.network, path, key=key)
        tell("weights", f"{path}, {key}" if key else path)
        stats[key or "model"] = report(
            engine.evaluate(loaders.val, student.network, device, amp_dtype=amp_dtype),
            models.released.published(args.model, path),
        )
    return stats.get("model") or next(iter(stats.values()))


def report(
    stats: dict[str, float], found: models.released.Released | None = None
) -> dict[str, float]:
    """Print an accuracy, and beside it the published one of the file, where there is one."""
    tell(None, f"Accuracy of the network on the {stats['count']} test images: {stats['acc1']:.1f}%")
    if found is not None and (line := found.beside(stats["acc1"], int(stats["count"]))):
        tell("published", line)
    return stats


def tell(what: str | None, line: str) -> None:
    """Print a line once, for all processes."""
    if distributed.is_main():
        print(f"{what}: {line}" if what else line, flush=True)


def run(argv: Sequence[str] | None = None) -> int:
    """Parse, run, and turn what the user can mend into one line and exit code 2."""
    warnings.filterwarnings("ignore", message=".*lr_scheduler.step.*")
    try:
        settings = options.parse_args(argv)
        if settings.args.list_models is not None:
            print(models.released.table(settings.args.list_models))
            return 0
        main(settings.args, settings.notes)
    except UserError as error:
        if distributed.first_to_say(error.line()):
            print(f"error: {error.line()}", file=sys.stderr, flush=True)
        return 2  # without leaving the group: another process may still wait in a collective
    distributed.shutdown()
    return 0


if __name__ == "__main__":
    sys.exit(run())
