"""Compare the speed of a distillation step, and of the input pipeline, with DeiT's and timm's.

    OMP_NUM_THREADS=1 taskset -c 0 python experiments/benchmark.py
    python experiments/benchmark.py --parts step --teacher regnety_016 --batch-size 8 --torchcompile

All rows of a table run in turn, in an order that rotates from round to round, after two rounds of
warm-up. A ratio is the median over the rounds, with its quartiles. One row runs twice under two
names: its ratio to itself shows the noise. Our step is `engine.train_one_epoch` with what `main.py`
builds. On a GPU use experiments/gpu_plan.py.
"""

import argparse
import json
import os
import statistics
import sys
import tempfile
import warnings
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import timm  # noqa: E402

import models  # noqa: E402
from base import distributed  # noqa: E402
from base.errors import UserError  # noqa: E402
from experiments import bench_loader  # noqa: E402
from experiments.about import about  # noqa: E402
from experiments.bench_race import OwnProcess, race, table  # noqa: E402
from experiments.bench_steps import PRECISIONS, Case, Ours, Reference, Timm  # noqa: E402


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("--parts", nargs="+", choices=("step", "loader"), default=["step", "loader"])
    add("--student", default="deit_tiny_distilled_patch16_224")
    add("--teacher", nargs="+", default=["regnety_160", "regnety_016"])
    add("--batch-size", nargs="+", type=int, default=[4, 8], help="one for each teacher")
    add("--img-size", type=int, default=224, help="pixels")
    add("--precision", nargs="+", choices=PRECISIONS, default=["fp32", "bf16"])
    add(
        "--torchcompile",
        nargs="?",
        const="inductor",
        default="",
        metavar="BACKEND",
        help="compare compiled steps too",
    )
    add("--rounds", type=int, default=7)
    add("--steps", type=int, default=2, help="timed steps of a turn, after one that is not")
    add("--device", default="auto")
    add("--loader-data", default="", help="folder with val/<class>/*.jpg; default: noise images")
    add("--loader-images", type=int, default=150, help="of a turn")
    add("--json", type=Path, metavar="FILE", help="write all seconds there")
    return parser


def main() -> int:
    args = _parser().parse_args()
    if len(args.teacher) != len(args.batch_size):
        raise UserError("--batch-size: give one for each --teacher")
    if args.rounds < 2 or args.steps < 1 or args.loader_images < 1:
        raise UserError("--rounds must be at least 2, --steps and --loader-images 1")
    student = models.create_model(args.student, num_classes=1)
    if "step" in args.parts and not models.has_distillation_head(student):
        raise UserError(f"--student {args.student}: has no distillation head; give one that has")
    warnings.filterwarnings("ignore")
    os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")  # no pool for each contestant
    device = distributed.pick_device(args.device, 0)
    found: dict[str, Any] = {"about": about(device)}
    save(args.json, found)
    print("\n".join(found["about"]), flush=True)
    with tempfile.TemporaryDirectory() as folder:
        jobs = {}
        for teacher, batch in zip(args.teacher, args.batch_size):
            case = (args.student, teacher, args.img_size, batch, device, Path(folder))
            jobs[f"step {teacher}"] = lambda case=case: measure_step(Case(*case), args)
        jobs["loader"] = lambda: bench_loader.measure(
            args.loader_data, args.loader_images, args.rounds
        )
        for name, measure in jobs.items():
            if name.split()[0] in args.parts:
                found[name] = measure()
                print("\n" + "\n".join(found[name]["lines"]), flush=True)
                save(args.json, found)
    return 0


def measure_step(case: Case, args: argparse.Namespace) -> dict[str, Any]:
    """Compare whole steps, each row in a process of its own; return seconds and table lines."""
    entries: dict[str, OwnProcess] = {}
    for precision in args.precision:
        entries[f"reference, {precision}"] = OwnProcess(Reference, case, precision)
        for backend in dict.fromkeys(["", args.torchcompile]):
            kind = precision + " compiled" * bool(backend)
            if hasattr(timm.models.deit, case.student):
                entries[f"timm, {kind}"] = OwnProcess(Timm, case, precision, backend)
            for name, teacher in {
                "live": "live",
                "no teacher": "none",
                "no teacher again": "none",
                "cached": "cached",
            }.items():
                entries[f"{name}, {kind}"] = OwnProcess(
                    Ours, case, precision, teacher, backend=backend, steps=args.steps
                )
    seconds = race(entries, args.rounds, args.steps)
    write_s = {p: entries[f"cached, {p}"].attribute("write_s") for p in args.precision}
    for entry in entries.values():
        entry.end()
    columns = {
        "x reference, same precision": lambda name: f"reference, {kind_of(name).split()[0]}",
        "x timm, same kind": lambda name: f"timm, {kind_of(name)}",
        "x reference, fp32": lambda name: "reference, fp32",
        "x no teacher, same kind": lambda name: f"no teacher, {kind_of(name)}",
    }
    lines = [f"### {case.student} from {case.teacher}, {case.size} px, B={case.batch}", ""]
    lines += table(seconds, columns)
    for precision in args.precision:
        live, cached = (
            statistics.median(seconds[f"{kind}, {precision}"]) / case.batch
            for kind in ("live", "cached")
        )
        lines += ["", f"Cache, {precision}: {break_even(write_s[precision], live, cached)}"]
    return {"seconds": seconds, "write_s": write_s, "lines": lines}


def kind_of(name: str) -> str:
    """Return the precision of a row, and whether it is compiled."""
    return name.partition(", ")[2]


def break_even(write_s: float, live_s: float, cached_s: float) -> str:
    """Return after how many runs a cache has paid for its writing; seconds per image."""
    saved = live_s - cached_s
    text = f"writing takes {1e3 * write_s:.1f} ms per image; reading saves "
    if saved <= 0:
        return text + "nothing."
    return (
        f"{text}{1e3 * saved:.1f} ms per image and epoch. With a view for every epoch, writing "
        f"costs what {write_s / saved:.2f} runs save."
    )


def save(path: Path | None, found: dict[str, Any]) -> None:
    """Write what was measured so far. Raises UserError if the file cannot be written."""
    try:
        if path is not None:
            path.write_text(json.dumps(found, indent=1) + "\n")
    except OSError as error:
        raise UserError(f"--json {path}: {error.strerror}") from error


def run_program(program: Any) -> int:
    """Return the exit code of a program; print a UserError as one line."""
    try:
        return program()
    except UserError as error:
        print(f"error: {error.line()}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("\nstopped", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(run_program(main))
