"""Compute the loss of a bad batch again: print its terms, in the run and here.

    python tools/replay.py OUT/bad_batch.pth
    python tools/replay.py OUT/bad_batch.pth --amp off --device cpu

A run that --max-bad-steps has ended leaves the file: the images as they were mixed, labels, the
teacher's answer, weights and projections. The draws (stochastic depth, dropout) follow from seed,
epoch, step and process, so that on the run's device and in its precision the terms are the run's.
Another --amp tells whether precision was to blame.
"""

import argparse
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import engine  # noqa: E402
import models  # noqa: E402
import options  # noqa: E402
from base import distributed, safe_load  # noqa: E402
from base.device import autocast, pick_amp  # noqa: E402
from base.errors import UserError  # noqa: E402
from distill import objective  # noqa: E402
from distill.teacher import build_teacher  # noqa: E402

NEEDED = (
    "args",
    "images",
    "labels",
    "teacher_outputs",
    "terms",
    "model",
    "projections",
    "seed",
    "epoch",
    "micro_step",
    "rank",
    "update",
    "updates_per_epoch",
    "num_classes",
)


def main(argv: Sequence[str] | None = None) -> int:
    parser = options.Parser("replay.py", description=__doc__.split("\n")[0])
    parser.add_argument("batch", type=Path, help="bad_batch.pth of a run")
    parser.add_argument("--amp", choices=("off", "bf16", "fp16"), help="default: the run's")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--plugin", default=[], action="append", help="the run's, to run it again")
    try:
        given = parser.parse_args(argv)
        saved, found = replay(given.batch, amp=given.amp, device=given.device, plugins=given.plugin)
    except UserError as error:
        print(f"error: {error.line()}", file=sys.stderr)
        return 2
    print(f"epoch {saved['epoch']}, step {saved['micro_step']}, process {saved['rank']}")
    print(f"{'':20}{'the run':>15}{'here':>15}")
    for name, was in saved["terms"].items():
        print(f"{name:20}{float(was):15.8g}{float(found[name]):15.8g}")
    return 0


def replay(
    path: Path, *, amp: str | None = None, device: str = "auto", plugins: Sequence[str] = ()
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Return what the file holds, and the loss and its terms as computed here.

    amp: off, bf16, fp16 or auto; None is the run's. plugins: files to run; the file's own are not.
    Raises UserError for any other file, and one that is damaged.
    """
    saved = safe_load.read_weights_file(path)
    if missing := [key for key in NEEDED if key not in saved]:
        raise UserError(f"{path}: has no {', '.join(missing)}, so it is no bad_batch.pth")
    processes = distributed.init_processes(device)
    with safe_load.in_one_line(f"{path}: damaged, or of another version"):
        settings = options.settings_of_run(saved["args"], str(path))
        args = argparse.Namespace(**settings | {"amp": amp or settings["amp"]})
        models.plugins.load_given_plugins(plugins, args.plugin, path)
        found = build_terms(args, saved, processes)
        for value in saved["terms"].values():
            float(value)  # raises TypeError for a list
        for name in ("epoch", "micro_step", "rank"):
            int(saved[name])
        if saved["terms"].keys() != found.keys():
            raise ValueError(f"terms {', '.join(saved['terms'])}, here {', '.join(found)}")
    return saved, found


def build_terms(
    args: argparse.Namespace, saved: Mapping[str, Any], processes: distributed.Processes
) -> dict[str, Tensor]:
    """Return the loss and its unweighted terms of a saved batch. Raises UserError."""
    device, classes = processes.device, int(saved["num_classes"])
    amp_dtype = pick_amp(args.amp, device)
    teacher_amp = amp_dtype if args.teacher_amp == "auto" else pick_amp(args.teacher_amp, device)
    inputs = models.build_input_config(args)
    start = {"pretrained": False, "finetune": ""}  # the weights are in the file
    student = models.build_student(argparse.Namespace(**vars(args) | start), classes, inputs)
    models.select_kernels(student.network, device.type, amp_dtype)
    names = saved.get("classes")  # a file of an older version has none
    labelled = saved.get("mean_labelled")  # only of a run with unlabelled images
    teacher = build_teacher(args, classes, inputs, device, teacher_amp, classes=names)
    criterion = objective.build_objective(
        args,
        student.to(device),
        teacher,
        mixing=saved["labels"].dim() == 2,
        input_size=inputs.input_size,
        total_updates=args.epochs * saved["updates_per_epoch"],
        mean_labelled=None if labelled is None else lambda update: float(labelled),
    )
    criterion.at_update(saved["update"])
    student.network.load_state_dict(saved["model"])
    if saved["projections"]:
        student.projections.load_state_dict(saved["projections"])
    images, labels = saved["images"].to(device), saved["labels"].to(device)
    answers = saved["teacher_outputs"]
    if isinstance(answers, Mapping):  # what it saw inside is asked for again
        answers = teacher(images)
    elif answers is not None:
        answers = (
            answers.to(device) if isinstance(answers, Tensor) else [a.to(device) for a in answers]
        )
    student.train(args.train_mode)
    engine.seed_step(saved["seed"], "step", saved["epoch"], saved["micro_step"], saved["rank"])
    with autocast(device, amp_dtype):
        outputs = student(images)
    loss = criterion(images, outputs, labels, teacher_outputs=answers)
    return {"loss": loss.detach(), **criterion.terms}


if __name__ == "__main__":
    sys.exit(main())
