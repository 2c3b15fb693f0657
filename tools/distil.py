"""From a folder of images to a distilled student: train a teacher, two students, and compare them.

    python tools/distil.py my_images
    python tools/distil.py my_images --minutes 60 --unlabelled-path more_images
    python tools/distil.py my_images --teacher-model resnet50 --teacher-path resnet50.pth

The steps are ordinary runs of main.py and the other tools. Each command is printed. Started again,
also after a kill, the same command continues: finished steps are skipped, and an unfinished run is
resumed. Flags that are not listed below are passed to all runs (--batch-size, --val-fraction, ...).
"""

import argparse
import ctypes
import json
import shlex
import signal
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import models  # noqa: E402
import options  # noqa: E402
from base import terminal  # noqa: E402
from base.distributed import STOP_SIGNALS  # noqa: E402
from base.errors import UserError  # noqa: E402
from data.image_source import Files  # noqa: E402
from data.sources import Part, open_source  # noqa: E402
from distill.teacher_classes import classes_of_teacher, match_outputs  # noqa: E402
from models import hub  # noqa: E402
from tools import result_table  # noqa: E402
from training import auto_recipe, run_folder  # noqa: E402
from training.checkpointer import NEWEST, load_run  # noqa: E402

TEACHER, ALONE, DISTILLED = "teacher", "labels-only", "distilled"
TEACHER_SHARE = 0.4  # of the minutes; both students share the rest
# Accurate at their size, and pretrained on ImageNet; the second one is fast without a GPU.
ON_GPU, ON_CPU, FROM_SCRATCH = "convnext_tiny.in12k_ft_in1k", "tf_efficientnet_lite0", "resnet_pico"
REPORT, EXPORTED = "report.html", "exported"
FORMATS = ("--formats", "safetensors")
PR_SET_PDEATHSIG = 1  # <sys/prctl.h>


@dataclass(frozen=True)
class Step:
    """A run of main.py: the name of its folder, and its flags without --output_dir."""

    name: str
    flags: tuple[str, ...]


def main(argv: Sequence[str] | None = None) -> int:
    try:
        args, others = _parser().parse_known_args(argv)
        args.out = args.out or run_folder.FOLDER / f"{Path(args.data).resolve().name}-distil"
        commands = build_commands(args, others)
    except UserError as error:
        print(f"error: {error.line()}", file=sys.stderr)
        return 2
    for command in commands:
        if code := run(command):
            print(f"\nended with exit code {code}; the same command continues")
            return code
    print("\n" + "\n".join(build_result(args, sys.argv[1:] if argv is None else argv)))
    return 0


def build_commands(args: argparse.Namespace, others: Sequence[str]) -> list[list[str]]:
    """Return the commands of all steps that are not finished. others: flags for all runs."""
    for path in args.plugin:
        models.plugins.load_plugin(path)
    out, plugins = args.out, flags_of("--plugin", args.plugin)
    steps = build_steps(args, (*others, *plugins), out)
    waiting = [step for step in steps if not is_finished(out / step.name)]
    commands = [main_command(step, out / step.name, args.nproc_per_node) for step in waiting]
    folders = [out / name for name in (DISTILLED, ALONE, TEACHER)]
    if not any(step.name == TEACHER for step in steps):
        folders.pop()  # a given teacher has no run
    if waiting or not is_newer(out / REPORT, folders):
        names = map(str, folders)
        words = ["tools/report.py", *names, "--out", str(out / REPORT), "--quiet", *plugins]
        commands.append(words)
    if waiting or not is_newer(out / EXPORTED / "config.json", folders[:1]):
        words = ["tools/export.py", str(folders[0]), str(out / EXPORTED), *FORMATS, *plugins]
        commands.append(words)
    return commands


def flags_of(name: str, values: Sequence[str]) -> tuple[str, ...]:
    """Return a flag that is given once for each value."""
    return tuple(word for value in values for word in (name, value))


def is_newer(file: Path, runs: Sequence[Path]) -> bool:
    """Return whether a file was written after the last checkpoint of each run."""
    if not file.exists():
        return False
    return all(
        file.stat().st_mtime >= path.stat().st_mtime
        for path in (run / NEWEST for run in runs)
        if path.exists()
    )


def build_result(args: argparse.Namespace, argv: Sequence[str]) -> list[str]:
    """Return the table of the three networks, the files, and the next commands."""
    out, plugins = args.out, flags_of("--plugin", args.plugin)
    found = json.loads((out / REPORT).with_suffix(".json").read_text())
    exported, student = str(out / EXPORTED), str(out / DISTILLED)
    commands = [
        terminal.command("tools/predict.py", exported, example_of(args.data), *plugins),
        terminal.command("tools/export.py", student, str(out / "all-formats"), *plugins),
        terminal.command("tools/distil.py", *longer(args, argv)),
    ]
    return [
        *result_table.lines(found, (TEACHER, ALONE, DISTILLED)),
        "",
        f"report    {out / REPORT}",
        f"student   {exported}",
        "next      classify images, export to ONNX and torch.export, train longer:",
        *(f"  {command}" for command in commands),
    ]


def longer(args: argparse.Namespace, argv: Sequence[str]) -> list[str]:
    """Return the words of the same command with four times the budget and another folder."""
    parser = options.Parser(add_help=False)
    for flag in ("--minutes", "--epochs", "--out"):
        parser.add_argument(flag)
    kept = parser.parse_known_args(argv)[1]
    spent = ("--minutes", f"{4 * args.minutes:g}")
    if args.epochs is not None:
        spent = ("--epochs", str(4 * args.epochs))
    return [*kept, *spent, "--out", f"{args.out}-long"]


def example_of(data: str) -> str:
    """Return a validation image of a folder, or the folder if it has none in a file."""
    try:
        source = open_source("IMNET", data, Part(is_train=False))
    except UserError:  # its validation images need flags of their own
        return data
    return source.path(0) if isinstance(source, Files) and len(source) else data


def _parser() -> argparse.ArgumentParser:
    about, _, rest = (__doc__ or "").partition("\n\n")
    parser = options.Parser(
        "distil.py",
        description=about,
        epilog=rest,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("data", help="image folder: one folder per class, or train and val folders of them")
    add("--out", type=Path, help="folder of the runs and results; default: runs/<data>-distil")
    add("--minutes", type=float, default=30.0, help="for all three runs; default: 30")
    add("--epochs", type=int, help="of every run, instead of --minutes")
    add("--model", default="", help="student; default: chosen from the data and the minutes")
    add("--teacher-model", default="", help="default: a CNN, pretrained if it can be downloaded")
    add("--teacher-path", default="", help="weights of --teacher-model; default: timm's")
    add("--distillation-type", default="hard", choices=("soft", "hard"))
    add("--unlabelled-path", action="append", default=[], help="images without labels; repeatable")
    add("--device", default="auto")
    add("--plugin", action="append", default=[], metavar="FILE.py", help="for all steps")
    add("--nproc-per-node", type=int, help="processes; default: one per GPU")
    return parser


def build_steps(args: argparse.Namespace, others: Sequence[str], out: Path) -> list[Step]:
    """Return the runs in their order. A given teacher that has the classes of the data is used.

    others: flags for all runs.
    """
    common = ("--data-path", args.data, "--device", args.device, *others)
    student = (*common, *(("--model", args.model) if args.model else ()))
    model, weights = choose_teacher(args)
    steps, share, path = [], 0.5, args.teacher_path
    if not (path and has_classes(model, path, args.data)):
        flags = (*common, "--model", model, *weights, *budget(args, TEACHER_SHARE))
        steps.append(Step(TEACHER, flags))
        share = (1 - TEACHER_SHARE) / 2
        path = str(out / TEACHER / NEWEST)
    steps.append(Step(ALONE, (*student, *budget(args, share))))
    teacher = ("--distillation-type", args.distillation_type)
    teacher += ("--teacher-model", model, "--teacher-path", path)
    teacher += flags_of("--unlabelled-path", args.unlabelled_path)
    steps.append(Step(DISTILLED, (*student, *teacher, *budget(args, share))))
    return steps


def budget(args: argparse.Namespace, share: float) -> tuple[str, str]:
    """Return the flag of a run that gets a share of the minutes."""
    if args.epochs is not None:
        return "--epochs", str(args.epochs)
    return "--minutes", f"{share * args.minutes:.4g}"


def choose_teacher(args: argparse.Namespace) -> tuple[str, tuple[str, ...]]:
    """Return the teacher's model, and the flags of its first weights."""
    model, path = args.teacher_model, args.teacher_path
    if path:
        if not model:
            raise UserError(f"--teacher-path {path}: give its model with --teacher-model")
        return model, ("--finetune", path)
    reason = hub.unreachable_reason()
    if not reason:
        return model or (ON_GPU if torch.cuda.is_available() else ON_CPU), ("--pretrained",)
    line = f"teacher: {model or FROM_SCRATCH} from scratch, because published weights cannot be "
    line += f"loaded ({reason}); with a file: --teacher-model NAME --teacher-path FILE"
    print(terminal.wrap(line))
    if model:
        return model, ()
    settings = argparse.Namespace(
        data_set=None, data_path=args.data, val_fraction=None, val_labels=""
    )
    data = auto_recipe.build_training_set(settings)
    student = auto_recipe.choose_student(data, args.minutes)[0] if data else {}
    return FROM_SCRATCH, ("--input-size", *map(str, student.get("input_size", [32])))


def has_classes(model: str, path: str, data: str) -> bool:
    """Return whether a teacher has an output for every class of a folder of images."""
    classes = open_source("IMNET", data, Part(is_train=True)).classes
    try:
        match_outputs(model, classes_of_teacher(model, path), len(classes), classes)
    except UserError as error:
        print(f"teacher: {path} is fine-tuned first ({error.line().partition(';')[0]})")
        return False
    return True


def is_finished(folder: Path) -> bool:
    """Return whether a run has reached its last epoch."""
    if not (folder / NEWEST).exists():
        return False
    saved = load_run(folder / NEWEST)
    finished = saved["epoch"] + 1 >= saved["args"]["epochs"]
    if finished:
        print(f"{folder}: finished before; remove it to repeat it")
    return finished


def main_command(step: Step, folder: Path, processes: int | None) -> list[str]:
    """Return the command of a run. processes: None for one per GPU."""
    count = processes or max(1, torch.cuda.device_count())
    launch = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={count}"]
    flags = [*step.flags, "--output_dir", str(folder), "--resume", "auto"]
    return [*(launch if count > 1 else []), "main.py", *flags]


def run(command: Sequence[str]) -> int:
    """Run a program of this repository and return its exit code; it gets our stop signals."""
    print(f"\n$ {terminal.python()} {shlex.join(command)}", flush=True)
    words = [str(ROOT / word) if word.endswith(".py") else word for word in command]
    process = subprocess.Popen([sys.executable, *words], preexec_fn=_end_with_parent)

    def pass_on(number: int, frame: object) -> None:
        if number != signal.SIGINT:  # a terminal sends Ctrl-C to the program itself
            process.send_signal(number)

    before = {number: signal.signal(number, pass_on) for number in STOP_SIGNALS}
    try:
        code = process.wait()
        return code if code >= 0 else 128 - code
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _end_with_parent() -> None:
    """Get a SIGTERM when the parent has died, so that a killed command leaves no run behind."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)


if __name__ == "__main__":
    sys.exit(main())
