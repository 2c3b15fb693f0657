"""Check correctness, speed, input pipeline and accuracy on a GPU, within a time limit.

    python experiments/gpu_plan.py --stages correctness speed input --minutes 9.5 --data IMAGENET
    python experiments/gpu_plan.py --stages accuracy --minutes 3 --data CIFAR10 --teacher CNN.pth

Every result is written to OUT/STAGE/NAME.json when it exists, and to OUT/results.md. Finished
measurements are skipped, failed ones are repeated. docs/gpu.md describes the stages and the aims.
With --toy everything is tiny and runs on a CPU.
"""

import argparse
import contextlib
import io
import json
import os
import statistics
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import numpy as np  # noqa: E402
import torch  # noqa: E402

import datasets  # noqa: E402
import main as training_program  # noqa: E402
import models  # noqa: E402
from base import distributed  # noqa: E402
from base.errors import UserError  # noqa: E402
from checks import dry_run  # noqa: E402
from data import packed  # noqa: E402
from experiments import bench_loader, benchmark  # noqa: E402
from experiments.bench_race import middle, race, ratio, spread  # noqa: E402
from experiments.bench_steps import CLASSES, Case, Ours, Reference, Timm  # noqa: E402
from experiments.compare import HARD, RECIPE  # noqa: E402
from experiments.gpu_checks import Checks  # noqa: E402

SIZES = {"small": 512, "base": 256, "tiny": 1024}  # batch by student
TOY_STUDENT = "deit_pico_distilled_patch8_32"
ROUNDS = 5
ENTRIES = 20_000  # images of an epoch in stage input
SOFT = "--distillation-type soft --distillation-tau 3 --distillation-reduction batchmean"
ROWS = {  # of stage accuracy; one seed of the first three must fit into the time
    "none": "--distillation-type none",
    "hard": HARD,
    "cached hard": HARD,
    "soft": SOFT,
    "VkD": f"{HARD} --match feature=pooled,loss=vkd,proj=orthogonal",
    "DIST": "--distillation-type soft --kd-loss-type dist",
}
MUST_FIT, SEEDS = 3, (0, 1, 2)
Result = dict[str, Any]


@dataclass(frozen=True)
class Plan:
    """Where, on what and how long to measure. end: in seconds of time.monotonic().

    data: an image folder, or "". teacher: weights for stage accuracy, or "". work: for files that
    are not results.
    """

    device: torch.device
    out: Path
    work: Path
    data: str
    teacher: str
    toy: bool
    end: float

    def left_s(self) -> float:
        """Return the seconds that are left."""
        return self.end - time.monotonic()

    def read(self, stage: str, name: str) -> Result:
        """Return a finished result. Raises UserError if there is none."""
        path = self.out / stage / f"{name}.json"
        if not path.exists():
            raise UserError(f"{path}: this measurement has not finished; it must run first")
        return json.loads(path.read_text())

    @property
    def precision(self) -> str:
        return "fp32" if self.toy else "bf16"

    def case(self, size: str) -> Case:
        """Return the case of a DeiT student at 224 px, or of a tiny one for a rehearsal."""
        if self.toy:
            return Case(TOY_STUDENT, "resnet_pico", 32, 2, self.device, self.work)
        student = f"deit_{size}_distilled_patch16_224"
        return Case(student, "regnety_160", 224, SIZES[size], self.device, self.work)


def correctness(plan: Plan) -> dict[str, Callable[[], Result]]:
    return Checks(plan.device, plan.work, toy=plan.toy).all()


def speed(plan: Plan) -> dict[str, Callable[[], Result]]:
    """Return the measurements of whole steps on batches in memory, the most valuable first."""
    precision = plan.precision

    def ours(teacher: str) -> Callable[[Case, str], Any]:
        return lambda case, backend: Ours(case, precision, teacher, backend=backend, steps=20)

    kinds = {
        "no teacher": ours("none"),
        "no teacher again": ours("none"),
        "live": ours("live"),
        "cached": ours("cached"),
        "reference": lambda case, backend: Reference(case, precision),
        "timm": lambda case, backend: Timm(case, precision, backend),
    }

    def steps(size: str, names: list[str], backend: str = "") -> Callable[[], Result]:
        makers = {name: kinds[name] for name in names}
        return lambda: measure_steps(plan, plan.case(size), makers, backend)

    main_rows, backend = list(kinds)[:-1], "eager" if plan.toy else "inductor"
    found = {
        "peak": lambda: measure_peak(plan),
        "small": steps("small", main_rows),
        "profile": lambda: profile(plan),
        "base": steps("base", main_rows[:3]),
        "tiny": steps("tiny", main_rows[:3]),
        "small compiled": steps("small", ["no teacher", "live"], backend),
        "small timm": steps("small", ["live", "timm"]),
    }
    if plan.toy:
        del found["small timm"]  # timm has no such small student
    return found


def measure_peak(plan: Plan) -> Result:
    """Return the FLOP/s of a product of two square bf16 matrices, the best of ten."""
    side, best = 64 if plan.toy else 8192, 0.0
    a = torch.randn(side, side, device=plan.device, dtype=torch.bfloat16)
    for _ in range(10):
        wait(plan.device)
        start = time.perf_counter()
        for _ in range(10):
            a @ a
        wait(plan.device)
        best = max(best, 10 * 2 * side**3 / (time.perf_counter() - start))
    return {"flops": best, "lines": [f"bf16 matrix product: {best / 1e12:.0f} TFLOP/s"]}


def wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def measure_steps(
    plan: Plan, case: Case, makers: dict[str, Callable[[Case, str], Any]], backend: str
) -> Result:
    """Compare whole steps; return seconds, and lines with images/s and the share of the peak."""
    entries = {name: make(case, backend) for name, make in makers.items()}
    seconds = race(entries, 2 if plan.toy else ROUNDS, 1 if plan.toy else 20)
    size = (case.size, case.size)
    flops = dry_run.network_size(
        lambda: models.create_model(case.student, num_classes=CLASSES, img_size=size), *size
    ).flops
    peak = plan.read("speed", "peak")["flops"]
    lines = [
        f"{case.student}, teacher {case.teacher}, B={case.batch}, {plan.precision} {backend}",
        "",
    ]
    return {"seconds": seconds, "lines": lines + rate_table(seconds, case.batch, 3 * flops / peak)}


def rate_table(seconds: dict[str, list[float]], batch: int, share: float = 0.0) -> list[str]:
    """Return a table of images/s and ratios to the first row and to the reference.

    share: of the peak, for one image per second; 0 leaves the column out.
    """
    first = next(iter(seconds))
    lines = [
        f"| | images/s | share of the peak, % | x {first} | x reference |",
        "|---|---|---|---|---|",
    ]
    for name, own in seconds.items():
        rate = batch / statistics.median(own)
        cells = [
            spread(ratio(own, seconds[base])) if base in seconds and base != name else ""
            for base in (first, "reference")
        ]
        peak = f"{100 * rate * share:.1f}" if share else ""
        rates = spread(tuple(batch / each for each in middle(own)), 0)
        lines.append(f"| {name} | {rates} | {peak} | {cells[0]} | {cells[1]} |")
    return lines


def profile(plan: Plan) -> Result:
    """Trace 12 steps around one printed line; the trace opens in a browser (chrome://tracing)."""
    ours = Ours(plan.case("small"), plan.precision, "none", flags=["--log-interval", "6"])
    ours.train(3)
    with torch.profiler.profile() as trace:
        ours.train(2 if plan.toy else 12)
        wait(plan.device)
    trace.export_chrome_trace(str(plan.out / "speed" / "trace.json"))
    key = "self_cuda_time_total" if plan.device.type == "cuda" else "self_cpu_time_total"
    table = trace.key_averages().table(sort_by=key, row_limit=20, max_name_column_width=60)
    return {"lines": ["```", *table.splitlines(), "```"]}


def input_pipeline(plan: Plan) -> dict[str, Callable[[], Result]]:
    return {"small": lambda: measure_input(plan)}


def measure_input(plan: Plan) -> Result:
    """Compare steps on batches from loaders with steps on batches in memory."""
    folder = plan.work / "images"
    with contextlib.redirect_stdout(io.StringIO()):
        source = Path(plan.data) if plan.data else bench_loader.write_noise(folder, 8)
        sources = {"JPEG files": ["IMNET", repeat_files(plan, source)]}
        for form in (packed.RAW, packed.JPEG):
            base = bench_loader.prepare(source, plan.work / form, form)
            sources[f"packed {form}"] = ["PREPARED", repeat_packed(plan, base)]
    case, workers = plan.case("small"), min(datasets.cores_here(), 1 if plan.toy else 99)
    entries: dict[str, Callable[[int], float]] = {
        name: Ours(case, plan.precision, "none") for name in ("in memory", "in memory again")
    }
    for name, (kind, path) in sources.items():
        for where in ("worker", "device"):
            flags = ["--data-set", kind, "--data-path", str(path), "--augment-on", where]
            flags += ["--num-workers", str(workers), "--no-repeated-aug"]
            entries[f"{name}, --augment-on {where}"] = Ours(
                case, plan.precision, "none", flags=flags
            )
    seconds = race(entries, 2, 1) if plan.toy else race(entries, 3, 20)
    lines = [f"{case.student}, B={case.batch}, {plan.precision}, {workers} workers", ""]
    return {"seconds": seconds, "lines": lines + rate_table(seconds, case.batch)}


def repeat_files(plan: Plan, source: Path) -> Path:
    """Return an image folder with many links to the validation images of `source`."""
    folder, entries = plan.work / "links", 16 if plan.toy else ENTRIES
    images = sorted((source / "val").resolve().glob("*/*"))
    for number in range(entries):
        image = images[number % len(images)]
        link = folder / "train" / image.parent.name / f"{number}{image.suffix}"
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(image)
    (folder / "val").symlink_to((source / "val").resolve())
    return folder


def repeat_packed(plan: Plan, base: Path) -> Path:
    """Return packed data whose table has the images of `base` many times."""
    folder = base.with_name(f"{base.name}_repeated")
    folder.mkdir()
    entries = 16 if plan.toy else ENTRIES
    table = np.resize(np.fromfile(base / "val.table", packed.ROW), entries)
    manifest = json.loads((base / packed.MANIFEST).read_text())
    digest = packed.hashlib.sha256(table.tobytes()).hexdigest()
    facts = manifest["splits"]["val"] | {"pictures": entries, "table": digest}
    for split in ("train", "val"):
        table.tofile(folder / f"{split}.table")
        os.link(base / "val.bin", folder / f"{split}.bin")
    packed.finish(folder, manifest | {"splits": {"train": facts, "val": facts}})
    return folder


def accuracy(plan: Plan) -> dict[str, Callable[[], Result]]:
    """Return the runs on CIFAR-10: one seed of every row, then more seeds."""
    found = {"epochs": lambda: choose_epochs(plan)}
    for seed in SEEDS[:1] if plan.toy else SEEDS:
        for name in ROWS:
            found[f"{name}, seed {seed}"] = lambda n=name, s=seed: train_row(plan, n, s)
    return found


def accuracy_flags(plan: Plan) -> list[str]:
    """Return the flags of every run of stage accuracy."""
    student = TOY_STUDENT if plan.toy else "deit_tiny_distilled_patch4_32"
    data = f"--data-set CIFAR10 --data-path {plan.data}" if plan.data else "--data-set DIGITS"
    teacher = f"--teacher-path {plan.teacher}" if plan.teacher else ""
    text = (
        f"{RECIPE} --batch-size {300 if plan.toy else 512} --lr 1e-3 --warmup-epochs 1 {data} "
        f"--model {student} --teacher-model resnet_pico {teacher} --device {plan.device} "
        f"--num-workers {0 if plan.toy else datasets.cores_here()} --no-teacher-check --output_dir"
    )
    return [*text.split(), str(plan.work / "run")]


def run_training(flags: list[str]) -> float:
    """Run main.py in this process; return the seconds. Raises UserError if it fails."""
    started, errors = time.monotonic(), io.StringIO()
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(errors):
        code = training_program.run(flags)
    if code:
        raise UserError(f"main.py ended with {code}: {errors.getvalue().strip()[-300:]}")
    return time.monotonic() - started


def choose_epochs(plan: Plan) -> Result:
    """Train one and two epochs; return how many fit, so that three rows finish one seed."""
    common = [*accuracy_flags(plan), *HARD.split(), "--epochs"]
    one = run_training([*common, "1", "--warmup-epochs", "0"])
    epoch_s = max(0.01, run_training([*common, "2", "--warmup-epochs", "0"]) - one)
    each = 0.9 * plan.left_s() / MUST_FIT - (one - epoch_s)
    epochs = 1 if plan.toy else max(2, int(each / epoch_s))
    return {"epochs": epochs, "epoch_s": epoch_s, "lines": [f"{epochs} epochs of {epoch_s:.1f} s"]}


def train_row(plan: Plan, name: str, seed: int) -> Result:
    """Train a row with a seed; return the last line of its log."""
    epochs = plan.read("accuracy", "epochs")["epochs"]
    flags = [*accuracy_flags(plan), *ROWS[name].split(), "--seed", str(seed)]
    flags += ["--epochs", str(epochs), "--warmup-epochs", str(min(1, epochs - 1))]
    if name.startswith("cached"):
        flags += ["--teacher-cache", str(plan.work / f"logits{seed}")]
    seconds = run_training(flags)
    log = json.loads((plan.work / "run" / "log.txt").read_text().splitlines()[-1])
    lines = [f"| {name}, seed {seed} | top-1 {log['test_acc1']:.2f} % | {seconds:.0f} s |"]
    return {"log": log, "seconds": seconds, "lines": lines}


STAGES = {
    "correctness": correctness,
    "speed": speed,
    "input": input_pipeline,
    "accuracy": accuracy,
}


def run(plan: Plan, stages: list[str]) -> bool:
    """Measure what has no result yet, while time is left. Returns whether nothing failed."""
    good = True
    for stage in stages:
        (plan.out / stage).mkdir(parents=True, exist_ok=True)
        for name, measure in STAGES[stage](plan).items():
            path = plan.out / stage / f"{name}.json"
            if path.exists():
                print(f"{stage}, {name}: measured before", flush=True)
                continue
            if plan.left_s() <= 0:
                print(f"{stage}, {name}: no time left", flush=True)
                continue
            started = time.monotonic()
            try:
                found = measure()
            except Exception as error:  # the other measurements still have a value
                traceback.print_exc()
                reason = "".join(traceback.format_exception_only(error)).strip()
                found, path = {"passed": False, "lines": [reason]}, path.with_suffix(".failed")
            good = good and found.get("passed", True)
            found["took_s"] = round(time.monotonic() - started, 1)
            path.write_text(json.dumps(found, indent=1) + "\n")
            write_page(plan.out, plan.device)
            print(f"\n{stage}, {name} ({found['took_s']} s)", *found["lines"], sep="\n", flush=True)
    return good


def write_page(out: Path, device: torch.device) -> None:
    """Write results.md from all results."""
    lines = ["# Results of experiments/gpu_plan.py", "", *benchmark.about(device)]
    for stage in STAGES:
        paths = sorted((out / stage).glob("*.*"), key=lambda path: path.stat().st_mtime_ns)
        for path in (p for p in paths if p.suffix in (".json", ".failed") and p.stem != "trace"):
            if path.suffix == ".json" or not path.with_suffix(".json").exists():
                lines += [
                    "",
                    f"## {stage}: {path.stem}",
                    "",
                    *json.loads(path.read_text())["lines"],
                ]
    (out / "results.md").write_text("\n".join(lines) + "\n")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("--stages", nargs="+", choices=STAGES, default=["correctness", "speed", "input"])
    add("--minutes", type=float, default=9.5, help="start no measurement after so many")
    add("--out", type=Path, default=ROOT / "runs" / "gpu")
    add("--data", default="", help="image folder of stage input or accuracy")
    add("--teacher", default="", help="checkpoint of resnet_pico, trained on --data")
    add("--toy", action="store_true", help="rehearse with tiny networks, on a CPU too")
    add("--device", default="auto")
    return parser


def main() -> int:
    args = _parser().parse_args()
    device = distributed.pick_device(args.device, 0)
    if device.type != "cuda" and not args.toy:
        raise UserError("no GPU was found; --toy rehearses the plan on a CPU")
    warnings.filterwarnings("ignore")
    end = time.monotonic() + 60 * args.minutes
    with tempfile.TemporaryDirectory() as work:
        plan = Plan(device, args.out, Path(work), args.data, args.teacher, args.toy, end)
        return int(not run(plan, args.stages))


if __name__ == "__main__":
    sys.exit(benchmark.run_program(main))
