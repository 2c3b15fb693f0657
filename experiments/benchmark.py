"""How fast a distillation step is, beside the steps it is meant to beat; tables in Markdown.

    OMP_NUM_THREADS=1 taskset -c 0 python experiments/benchmark.py
    python experiments/benchmark.py --parts step --teacher regnety_016 --batch-size 8 --torchcompile

Every part is one race: all contestants in turn, in an order that rotates from round to round, after
two rounds to warm up. A ratio is the median over the rounds of (their time / ours) within a round,
with its quartiles; one contestant runs twice under two names, which says what a ratio of nothing
looks like here. Our step is `engine.train_one_epoch` itself, with what the command line builds.
Shapes: B batch, C classes.
"""

import argparse
import gc
import json
import os
import platform
import shlex
import statistics
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import timm  # noqa: E402
import torch  # noqa: E402
import torch.nn.functional as F  # noqa: E402
from timm.optim import create_optimizer_v2  # noqa: E402
from timm.utils import ModelEma, ModelEmaV3  # noqa: E402
from torch import Tensor, nn  # noqa: E402

import datasets  # noqa: E402
import models  # noqa: E402
import options  # noqa: E402
from base import distributed  # noqa: E402
from base.errors import UserError  # noqa: E402
from checks import dry_run  # noqa: E402
from distill.teacher import Teacher, build_teacher  # noqa: E402
from experiments import bench_loader  # noqa: E402
from experiments.bench_gpu import measure_gpu  # noqa: E402
from experiments.bench_growth import measure_growth  # noqa: E402
from experiments.bench_race import Apart, Stopwatch, Turn, race, table  # noqa: E402
from experiments.bench_steps import CLASSES, PRECISIONS, Case, Ours, Reference, Timm  # noqa: E402
from training import optim  # noqa: E402

PARTS = ("step", "optimizer", "agreement", "loader", "gpu", "growth")
SHIPPED = ROOT / "models" / "weights" / "resnet_pico_digits.safetensors"


# --- parts --------------------------------------------------------------------------------------


def measure_step(case: Case, args: argparse.Namespace) -> dict[str, Any]:
    """Race the whole step, live, cached and without a teacher, against the reference's and timm's.

    Every contestant has a process of its own. Returns the seconds by contestant; the lines of the
    tables are under "lines".
    """
    entries: dict[str, Apart] = {}
    write_s: dict[str, float] = {}
    backends = {"": "", " compiled": args.torchcompile} if args.torchcompile else {"": ""}
    for precision in args.precision:
        dtype, folder = PRECISIONS[precision], case.folder / f"{case.teacher} {precision}"
        entries[f"reference, {precision}"] = Apart(Reference, case, dtype)
        for suffix, backend in backends.items():
            kind = precision + suffix
            if hasattr(timm.models.deit, case.student):
                entries[f"timm, {kind}"] = Apart(Timm, case, dtype, backend)
            live = entries[f"live, {kind}"] = Apart(Ours, case, dtype, "live", backend=backend)
            if precision not in write_s:
                write_s[precision] = live.get("write", str(folder), args.steps + 1)
            for again in ("", " again"):  # which is the A/A control
                entries[f"no teacher, {kind}{again}"] = Apart(
                    Ours, case, dtype, "none", backend=backend
                )
            entries[f"cached, {kind}"] = Apart(
                Ours, case, dtype, "cached", backend=backend, steps=args.steps, answers=str(folder)
            )
    seconds = race(entries, args.rounds, args.steps)
    reading_s = {
        precision: entries[f"cached, {precision}"].get("reading_s", args.steps + 1)
        for precision in args.precision
    }
    for entry in entries.values():
        entry.end()

    flops = dry_run.network_size(
        lambda: models.create_model(case.student, num_classes=CLASSES, img_size=(case.size,) * 2),
        case.size,
        case.size,
    ).flops
    lines = [f"### {case.student} from {case.teacher}, {case.size} px, B={case.batch}", ""]

    def precision_of(name: str) -> str:
        return name.partition(", ")[2].split()[0]

    def kind_of(name: str) -> str:
        return name.partition(", ")[2].removesuffix(" again")

    columns = {
        "x reference, same precision": lambda name: f"reference, {precision_of(name)}",
        "x timm, same precision": lambda name: f"timm, {precision_of(name)}",
        "x timm, both compiled": lambda name: f"timm, {kind_of(name)}" * ("compiled" in name),
        "x reference, fp32": lambda name: "reference, fp32",
        "x no teacher, same kind": lambda name: f"no teacher, {kind_of(name)}",
    }
    if not args.torchcompile:
        del columns["x timm, both compiled"]
    lines += table(seconds, columns)
    if not any(name.startswith("timm") for name in seconds):
        lines += ["", "Not measured: timm's task, which has no distilled student of that name."]
    lines += ["", f"The student's step is 3 x {flops / 1e9:.2f} GFLOP an image."]
    for precision in args.precision:
        live, cached = (
            statistics.median(seconds[f"{kind}, {precision}"]) / case.batch
            for kind in ("live", "cached")
        )
        reading = 1e3 * reading_s[precision]
        lines += [
            "",
            f"Cache, {precision}: {break_even(write_s[precision], live, cached)} Reading "
            f"the answers to a batch takes {reading:.3f} ms of a step.",
        ]
    return {
        "case": f"{case.student} {case.teacher} {case.size} {case.batch}",
        "seconds": seconds,
        "write_s": write_s,
        "lines": lines,
    }


def break_even(write_s: float, live_s: float, cached_s: float) -> str:
    """Return in words when a cache has paid for itself; seconds an image of each."""
    text = f"writing takes {1e3 * write_s:.1f} ms an image and view; "
    saved = live_s - cached_s
    if saved <= 0:
        return text + "reading saves nothing, this teacher is as fast as the disk."
    runs = write_s / saved
    return (
        f"{text}reading instead of asking saves {1e3 * saved:.1f} ms an image and epoch. With a "
        f"view for every epoch the writing costs what {runs:.2f} runs save; a single run gains if "
        f"it has fewer than {1 / runs:.2f} views for each of its epochs."
    )


def measure_optimizer(case: Case, args: argparse.Namespace) -> dict[str, Any]:
    """Race the optimizer with its average, on the student's weights and random gradients."""

    def entry(make: Callable[[nn.Module], tuple[Any, Callable[[int], None]]]) -> Turn:
        settings = case.args()
        student = models.build_student(settings, CLASSES, models.build_input_config(settings))
        student.to(case.device).train()
        for parameter in student.parameters():
            parameter.grad = torch.randn_like(parameter) * 1e-3
        optimizer, update = make(student)
        done = 0

        def turn(steps: int) -> float:
            nonlocal done
            watch = Stopwatch(case.device, steps)
            for _ in range(steps + 1):
                optimizer.step()
                done += 1
                update(done)
                watch.mark()
            return watch.per_step()

        return turn

    def first(student: nn.Module) -> tuple[Any, Callable[[int], None]]:
        ema = ModelEma(student.network, decay=0.99996)
        optimizer = create_optimizer_v2(student.network, opt="adamw", lr=1e-4, weight_decay=0.05)
        return optimizer, lambda step: ema.update(student.network)

    def third(student: nn.Module) -> tuple[Any, Callable[[int], None]]:
        ema = ModelEmaV3(student.network, decay=0.99996, use_warmup=True)
        optimizer = create_optimizer_v2(
            student.network, opt="adamw", lr=1e-4, weight_decay=0.05, fused=True
        )
        return optimizer, lambda step: ema.update(student.network, step=step)

    def ours(student: nn.Module) -> tuple[Any, Callable[[int], None]]:
        settings = case.args()
        optimizer, _ = optim.build_optimizer(settings, student, 1)
        ema = optim.build_ema(settings, student.network)
        return optimizer, lambda step: ema.update(student.network, step)

    names = {
        "default AdamW, timm's ModelEma": first,
        "fused AdamW, ModelEmaV3": third,
        "ours": ours,
        "ours again": ours,
    }
    seconds = race({name: entry(make) for name, make in names.items()}, 3 * args.rounds, 10)
    columns = {f"x {base}": lambda _, base=base: base for base in list(names)[:3]}
    lines = ["### Optimizer and EMA", "", *table(seconds, columns)]
    return {"seconds": seconds, "lines": lines}


@torch.no_grad()
def measure_agreement(args: argparse.Namespace, device: torch.device) -> dict[str, Any]:
    """Compare the labels of a trained teacher in bf16 with those in float32, on real images."""
    flags = ["--model", args.student, "--distillation-type", "hard", "--eval"]
    if args.agreement_data:
        size = str(models.data_config(args.agreement_teacher)["input_size"][-1])
        flags += ["--data-path", args.agreement_data, "--input-size", size, "--batch-size", "32"]
    else:
        flags[1] = "deit_pico_distilled_patch4_32"
    flags += ["--teacher-model", args.agreement_teacher, "--teacher-path", args.agreement_path]
    settings = options.parse_args(flags).args
    inputs = models.build_input_config(settings)
    processes = distributed.Processes(0, 0, 1, device, "single")
    loaders = datasets.build_loaders(settings, inputs, processes)
    asked = {
        name: build_teacher(settings, loaders.num_classes, inputs, device, dtype)
        for name, dtype in (("fp32", None), ("bf16, folded, channels-last", torch.bfloat16))
    }
    asked["bf16, autocast alone"] = Teacher(
        asked["fp32"].network, asked["fp32"].adapter, amp_dtype=torch.bfloat16
    )
    said: dict[str, list[Tensor]] = {name: [] for name in asked}
    labels = []
    for images, answers, *_ in loaders.val:
        labels.append(answers)
        for name, teacher in asked.items():
            said[name].append(teacher(images.to(device)).cpu())
    found = {name: torch.cat(logits) for name, logits in said.items()}
    labels, exact = torch.cat(labels), found["fp32"]
    lines = [
        f"### Labels of {args.agreement_teacher}, trained, on {len(labels)} real images",
        "",
        "| | same label as fp32, % | same, where fp32 is over 50 % sure | top-1, % | "
        "mean KL from fp32, nats |",
        "|---|---|---|---|---|",
    ]
    shares = {}
    sure = exact.softmax(1).amax(1) > 0.5
    for name, logits in found.items():
        same = logits.argmax(1) == exact.argmax(1)
        top = 100 * (logits.argmax(1) == labels).double().mean()
        kl = F.kl_div(
            logits.double().log_softmax(1),
            exact.double().log_softmax(1),
            reduction="batchmean",
            log_target=True,
        )
        shares[name] = float(same.double().mean())
        lines.append(
            f"| {name} | {100 * shares[name]:.2f} | "
            f"{100 * float(same[sure].double().mean()):.2f} | {top:.2f} | {kl:.1e} |"
        )
    return {"same": shares, "images": len(labels), "lines": lines}


def measure_loader(args: argparse.Namespace) -> dict[str, Any]:
    """Measure the input pipeline as experiments/bench_loader.py does."""
    found = bench_loader.run(args.loader_data, 0, args.loader_images, args.rounds)
    return found | {"lines": ["### Loader", "", *found["lines"]]}


# --- the program --------------------------------------------------------------------------------


def _parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    add = made.add_argument
    add("--parts", nargs="+", choices=PARTS, default=list(PARTS))
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
        help="race compiled steps too",
    )
    add("--rounds", type=int, default=7)
    add("--steps", type=int, default=2, help="timed steps of a turn, after one that is not")
    add("--device", default="auto")
    add(
        "--gpu-students",
        nargs="+",
        default=[f"deit_{size}_distilled_patch16_224" for size in ("tiny", "small", "base")],
        help="on a GPU, taught by the first --teacher",
    )
    add("--gpu-batch-size", nargs="+", type=int, default=[1024, 512, 256], help="one for each")
    add("--gpu-steps", type=int, default=200, help="timed steps of a turn")
    add("--prepared-path", default="", help="on a GPU: prepared images; default: made-up ones")
    add("--data-path", default="", help="on a GPU: images for the whole pipeline")
    add("--data-set", default="IMNET", help="what they are, as of main.py")
    add("--num-workers", type=int, help="on a GPU: of each loader, as of main.py")
    add("--agreement-teacher", default="resnet_pico")
    add("--agreement-path", default=str(SHIPPED), help="its trained weights")
    add("--agreement-data", default="", help="folder with val/; default: the embedded digits")
    add("--loader-data", default="", help="folder with val/; default: made-up images")
    add("--loader-images", type=int, default=150, help="of a round")
    add("--growth-steps", type=int, default=2000)
    add("--growth-batches", type=int, nargs="+", default=[16, 32, 64, 128, 256])
    add("--json", type=Path, metavar="FILE", help="all seconds, for machines")
    return made


def main() -> int:
    args = _parser().parse_args()
    if len(args.teacher) != len(args.batch_size):
        raise SystemExit("give one --batch-size for each --teacher")
    if len(args.gpu_students) != len(args.gpu_batch_size):
        raise SystemExit("give one --gpu-batch-size for each of --gpu-students")
    if args.rounds < 2 or args.steps < 1 or args.gpu_steps < 1 or args.growth_steps < 10:
        raise SystemExit(
            "--rounds must be at least 2, --steps and --gpu-steps 1, --growth-steps 10"
        )
    warnings.filterwarnings("ignore")
    if args.torchcompile:
        torch._dynamo.config.recompile_limit = 64  # beyond 8 networks of a kind it gives up
        os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")  # no pool for each contestant
    device = distributed.pick_device(args.device, 0)
    found: dict[str, Any] = {"about": about(device)}
    keep(args.json, found)
    if "step" in args.parts:
        student = models.create_model(args.student, num_classes=1)
        if not models.has_distillation_head(student):
            raise UserError(
                f"--student {args.student}: has no distillation head, which the steps "
                "of part `step` need; take a deit_..._distilled_... one"
            )
    print("\n".join(found["about"]), flush=True)
    with tempfile.TemporaryDirectory() as folder:
        jobs = {}
        for teacher, batch in zip(args.teacher, args.batch_size):

            def case(teacher=teacher, batch=batch) -> Case:
                return Case(args.student, teacher, args.img_size, batch, device, Path(folder))

            jobs[f"step {teacher}"] = lambda case=case: measure_step(case(), args)
        jobs |= {
            "optimizer": lambda: measure_optimizer(case(), args),
            "agreement": lambda: measure_agreement(args, device),
            "loader": lambda: measure_loader(args),
            "gpu": lambda: measure_gpu(args, device, Path(folder)),
            "growth": lambda: measure_growth(args, device, Path(folder)),
        }
        for name, measure in jobs.items():
            if name.split()[0] in args.parts:
                found[name] = measure()
                print("\n" + "\n".join(found[name]["lines"]), flush=True)
                keep(args.json, found)
                gc.collect()
    return 0


def keep(path: Path | None, found: dict[str, Any]) -> None:
    """Write what was found until now. Raises UserError where that cannot be."""
    try:
        if path is not None:
            path.write_text(json.dumps(found, indent=1) + "\n")
    except OSError as error:
        raise UserError(f"--json {path}: {error.strerror}") from error


def about(device: torch.device) -> list[str]:
    """Return in words what was measured on what, and the command."""
    if device.type == "cuda":
        machine = torch.cuda.get_device_name(device)
    else:
        units = ", ".join(u for u in ("avx2", "avx512_bf16", "amx_bf16") if capable(u))
        threads = torch.get_num_threads()
        machine = f"{platform.machine()} CPU ({units}), {threads} thread{'s' * (threads > 1)}"
    commit = subprocess.run(
        ["git", "describe", "--always", "--dirty"], cwd=ROOT, capture_output=True, text=True
    ).stdout.strip()
    versions = f"torch {torch.__version__.split('+')[0]}, timm {timm.__version__}"
    return [
        "```",
        shlex.join(["python", "experiments/benchmark.py", *sys.argv[1:]]),
        "```",
        "",
        f"{machine}; {versions}; commit {commit or 'unknown'}.",
    ]


def capable(unit: str) -> bool:
    return bool(getattr(torch.cpu, "get_capabilities", dict)().get(unit))


if __name__ == "__main__":
    try:
        sys.exit(main())
    except UserError as error:
        print(f"error: {error.line()}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("\nstopped", file=sys.stderr)
        sys.exit(130)
