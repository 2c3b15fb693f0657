"""How fast a distillation step is, beside the steps it is meant to beat; tables in Markdown.

    OMP_NUM_THREADS=1 taskset -c 0 python tools/benchmark.py
    python tools/benchmark.py --parts step --teacher regnety_016 --batch-size 8 --torchcompile

Every part is one race: all contestants in turn, in an order that rotates from round to round, after
two rounds to warm up. A ratio is the median over the rounds of (their time / ours) within a round,
with its quartiles; one contestant runs twice under two names, which says what a ratio of nothing
looks like here. Our step is `engine.train_one_epoch` itself, with what the command line builds.
Shapes: B batch, C classes.
"""

import argparse
import contextlib
import gc
import io
import json
import math
import platform
import shlex
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import timm  # noqa: E402
import torch  # noqa: E402
import torch.nn.functional as F  # noqa: E402
from timm.loss import SoftTargetCrossEntropy  # noqa: E402
from timm.optim import create_optimizer_v2  # noqa: E402
from timm.task import TokenDistillationTask  # noqa: E402
from timm.utils import ModelEma, ModelEmaV3  # noqa: E402
from torch import Tensor, nn  # noqa: E402

import augment  # noqa: E402
import cache  # noqa: E402
import datasets  # noqa: E402
import distributed  # noqa: E402
import engine  # noqa: E402
import models  # noqa: E402
import objective  # noqa: E402
import optim  # noqa: E402
import options  # noqa: E402
import preflight  # noqa: E402
import teachers  # noqa: E402

PARTS = ("step", "optimizer", "agreement", "loader", "gpu", "growth")
CLASSES, WARM_UPS = 1000, 2
PRECISIONS = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}
SHIPPED = ROOT / "models" / "weights" / "resnet_pico_digits.safetensors"
Turn = Callable[[int], float]  # steps -> seconds a step


# --- races ------------------------------------------------------------------------------------


def race(contestants: Mapping[str, Turn], rounds: int, steps: int) -> dict[str, list[float]]:
    """Return the seconds a step of every contestant in every round."""
    names, seconds = list(contestants), {name: [] for name in contestants}
    for number in range(-WARM_UPS, rounds):
        print(f"\rround {number + 1}/{rounds} ", end="", file=sys.stderr, flush=True)
        first = number % len(names)
        for name in names[first:] + names[:first]:
            took = contestants[name](steps)
            if number >= 0:
                seconds[name].append(took)
    print("\r\033[K", end="", file=sys.stderr)
    return seconds


class Stopwatch:
    """Seconds a step from the first mark to the last; the device has then done its work."""

    def __init__(self, device: torch.device, steps: int) -> None:
        self.device, self.steps, self.marks = device, steps, []

    def mark(self, *_: Any) -> None:
        if self.device.type == "cuda" and len(self.marks) in (0, self.steps):
            torch.cuda.synchronize(self.device)
        self.marks.append(time.perf_counter())

    def per_step(self) -> float:
        return (self.marks[self.steps] - self.marks[0]) / self.steps


def ratio(ours: Sequence[float], theirs: Sequence[float]) -> tuple[float, float, float]:
    """Return median and quartiles of their time over ours, round by round."""
    each = [their / our for our, their in zip(ours, theirs)]
    low, middle, high = statistics.quantiles(each, n=4, method="inclusive")
    return middle, low, high


def table(
    seconds: Mapping[str, list[float]], columns: Mapping[str, Callable[[str], str]]
) -> list[str]:
    """Return a race as a table: how many times as fast as others each row is, then milliseconds.

    columns: from the name of a row to the row that it is compared with; one that did not run
    leaves the cell empty.
    """
    lines = ["| | " + " | ".join(columns) + " | ms a step |", "|" + "---|" * (len(columns) + 2)]
    for name, ours in seconds.items():
        bases = [column(name) for column in columns.values()]
        cells = [
            "{:.2f} ({:.2f}-{:.2f})".format(*ratio(ours, seconds[base]))
            if base in seconds and base != name
            else "1" * (base == name)
            for base in bases
        ]
        spread = (
            f"{1e3 * statistics.median(ours):.2f} ({1e3 * min(ours):.2f}-{1e3 * max(ours):.2f})"
        )
        lines.append(f"| {name} | " + " | ".join([*cells, spread]) + " |")
    return lines


# --- a case: one student, one teacher, one batch ------------------------------------------------


@dataclass
class Case:
    """What all contestants share: names, sizes, the batch on the host, the teacher's weights."""

    student: str
    teacher: str
    size: int
    batch: int
    device: torch.device
    folder: Path

    def __post_init__(self) -> None:
        torch.manual_seed(0)
        self.network_T = models.create_model(self.teacher, num_classes=CLASSES)
        settle(self.network_T)
        self.weights = self.folder / f"{self.teacher}.pth"
        torch.save(self.network_T.state_dict(), self.weights)
        self.network_T.to(self.device).eval().requires_grad_(False)
        images = torch.randn(self.batch, 3, self.size, self.size)
        labels = torch.randint(CLASSES, (self.batch,))
        pinned = self.device.type == "cuda"
        self.data = tuple(x.pin_memory() if pinned else x for x in (images, labels))

    def args(self, *flags: str) -> argparse.Namespace:
        return options.parse_args([
            "--data-path", "none", "--model", self.student, "--input-size", str(self.size),
            "--batch-size", str(self.batch), "--teacher-model", self.teacher, "--teacher-path",
            str(self.weights), "--device", str(self.device), "--warmup-epochs", "0",
            "--min-lr", "0", *flags,
        ]).args  # fmt: skip


def settle(network: nn.Module) -> None:
    """Give BatchNorm statistics as of training, so that no layer of a random network dies."""
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_(0, 0.1)
            module.running_var.uniform_(0.5, 1.5)


class Reference:
    """DeiT's step (facebookresearch/deit 7e160fe, engine.py and losses.py) on today's libraries.

    Teacher in float32 weights under the student's autocast, plain attention, the default AdamW,
    timm's first EMA, and the host waits for the loss in every step.
    """

    def __init__(self, case: Case, amp_dtype: torch.dtype | None) -> None:
        self.case, self.amp_dtype = case, amp_dtype
        network = models.create_model(
            case.student, num_classes=CLASSES, img_size=(case.size,) * 2, drop_path_rate=0.1
        )
        models.fast.set_attention(network, fused=False)
        self.network = network.to(case.device).train()
        self.optimizer = create_optimizer_v2(self.network, opt="adamw", lr=1e-4, weight_decay=0.05)
        self.ema = ModelEma(self.network, decay=0.99996)
        self.mixup = augment.build_mixup(case.args(), CLASSES)
        self.base = SoftTargetCrossEntropy()

    def loss(self, images: Tensor, outputs: tuple[Tensor, Tensor], labels: Tensor) -> Tensor:
        with torch.no_grad():
            logits_T = self.case.network_T(images)
        hard = F.cross_entropy(outputs[1], logits_T.argmax(dim=1))
        return self.base(outputs[0], labels) * 0.5 + hard * 0.5

    def step(self) -> None:
        images, labels = (x.to(self.case.device, non_blocking=True) for x in self.case.data)
        images, labels = self.mixup(images, labels)
        with engine.autocast(self.case.device, self.amp_dtype):
            loss = self.loss(images, self.network(images), labels)
        if not math.isfinite(loss.item()):
            raise SystemExit("the reference's loss is not finite")
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        if self.case.device.type == "cuda":
            torch.cuda.synchronize()
        self.ema.update(self.network)

    def __call__(self, steps: int) -> float:
        watch = Stopwatch(self.case.device, steps)
        for _ in range(steps + 1):
            self.step()
            watch.mark()
        return watch.per_step()


class Timm(Reference):
    """timm's TokenDistillationTask in the step of its train.py, with its EMA of today."""

    def __init__(self, case: Case, amp_dtype: torch.dtype | None, backend: str = "") -> None:
        self.case, self.amp_dtype = case, amp_dtype
        factory = getattr(timm.models.deit, case.student)  # the registry has ours by that name
        network = factory(num_classes=CLASSES, img_size=case.size, drop_path_rate=0.1)
        network = network.to(case.device).train()
        self.task = TokenDistillationTask(
            network, self.case.network_T, SoftTargetCrossEntropy(), distill_type="hard",
            task_loss_weight=0.5, device=case.device, verbose=False,
        ).train()  # fmt: skip
        if backend:
            self.task.compile(backend=backend)
        self.optimizer = create_optimizer_v2(network, opt="adamw", lr=1e-4, weight_decay=0.05)
        self.network, self.updates = network, 0
        self.ema = ModelEmaV3(network, decay=0.99996, use_warmup=True)
        self.mixup = augment.build_mixup(case.args(), CLASSES)

    def step(self) -> None:
        images, labels = (x.to(self.case.device, non_blocking=True) for x in self.case.data)
        images, labels = self.mixup(images, labels)
        with engine.autocast(self.case.device, self.amp_dtype):
            loss = self.task(images, labels)["loss"]
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.updates += 1
        self.ema.update(self.network, step=self.updates)


class Ours:
    """The engine's step, with what `main.py` would build from the flags.

    teacher: "live", "none" (labels alone), or "cached": its answers, once written into a folder,
    are read again in every step. The seconds a picture that the writing took are in `write_s`.
    """

    def __init__(
        self, case: Case, amp_dtype: torch.dtype | None, teacher: str, *, backend: str = "",
        steps: int = 0,
    ) -> None:  # fmt: skip
        kind = "none" if teacher == "none" else "hard"
        compiled = ["--torchcompile", backend] if backend else []
        args = case.args("--distillation-type", kind, *compiled)
        inputs = models.build_input_config(args)
        student = models.build_student(args, CLASSES, inputs).to(case.device)
        fused = models.fast.prefers_fused_attention(case.device.type, amp_dtype)
        models.fast.set_attention(student.network, fused=fused)
        self.case, self.student, self.backend = case, student, backend
        live = teachers.build_teacher(args, CLASSES, inputs, case.device, amp_dtype)
        self.mixup_fn = augment.build_mixup(args, CLASSES)
        criterion = objective.build_objective(
            args, student, live, mixing=True, input_size=inputs.input_size, total_updates=10**6
        )
        optimizer, _ = optim.build_optimizer(args, student, 1)
        self.views, self.teacher = 0, live
        if teacher == "cached":
            self.views, self.teacher = 1, self.written(live, amp_dtype, steps + 1)
        if backend:
            student.compile(backend=backend, dynamic=False)
        self.engine: dict[str, Any] = {
            "model": student, "criterion": criterion, "optimizer": optimizer,
            "device": case.device, "epoch": 0, "teacher": self.teacher, "amp_dtype": amp_dtype,
            "schedule": optim.build_schedule(args, optimizer, 10**6), "mixup_fn": self.mixup_fn,
            "model_ema": optim.build_ema(args, student.network), "views": self.views,
        }  # fmt: skip

    def loader(self, steps: int) -> list[tuple[Tensor, ...]]:
        return [self.case.data] * steps

    def written(
        self, live: teachers.Teacher, amp_dtype: torch.dtype | None, batches: int
    ) -> teachers.CachedTeacher:
        """Write the answers to `batches` batches, and return a teacher that has nothing else."""
        rows, folder = batches * self.case.batch, tempfile.mkdtemp(dir=self.case.folder)
        facts = {"rows": rows, "classes": CLASSES, "precision": str(amp_dtype)}

        def cached(network: teachers.Teacher | None, may_create: bool) -> teachers.CachedTeacher:
            store = cache.Store(folder, rows=rows, num_classes=CLASSES, keep="all", facts=facts,
                                may_create=may_create)  # fmt: skip
            return teachers.CachedTeacher(
                store, network, epoch_rows=rows, needed=rows, batch_size=self.case.batch, rank=0,
                world_size=1,
            )  # fmt: skip

        ask = {"mixup_fn": self.mixup_fn, "seed": 0, "header": "Write:"}
        with contextlib.redirect_stdout(io.StringIO()):
            for _ in range(2):  # the first pass warms up, the second is timed
                writer = cached(live, True)
                writer.store._files[cache.MARKS][:] = 0
                start = time.perf_counter()
                engine.ask_teacher(self.loader(batches), writer, self.case.device, 0, **ask)
                writer.store.flush()
                self.write_s = (time.perf_counter() - start) / rows
        return cached(None, False)

    def reading_s(self, batches: int) -> float:
        """Return the seconds that a cache's answers to one batch take."""
        start = time.perf_counter()
        for micro in range(batches):
            self.teacher(self.case.data[0], (0, micro))
        return (time.perf_counter() - start) / batches

    def __call__(self, steps: int) -> float:
        watch = Stopwatch(self.case.device, steps)
        with contextlib.redirect_stdout(io.StringIO()):
            engine.train_one_epoch(
                **self.engine, data_loader=self.loader(steps + 1), log_interval=10**9,
                on_update=watch.mark,
            )  # fmt: skip
        return watch.per_step()


# --- parts --------------------------------------------------------------------------------------


def measure_step(case: Case, args: argparse.Namespace) -> dict[str, Any]:
    """Race the whole step, live, cached and without a teacher, against the reference's and timm's.

    Returns the seconds by contestant; the lines of the tables are under "lines".
    """
    entries: dict[str, Any] = {}
    write_s: dict[str, float] = {}
    backends = {"": "", " compiled": args.torchcompile} if args.torchcompile else {"": ""}
    for precision in args.precision:
        dtype = PRECISIONS[precision]
        entries[f"reference, {precision}"] = Reference(case, dtype)
        for suffix, backend in backends.items():
            kind = precision + suffix
            if hasattr(timm.models.deit, case.student):
                entries[f"timm, {kind}"] = Timm(case, dtype, backend)
            entries[f"live, {kind}"] = Ours(case, dtype, "live", backend=backend)
            entries[f"no teacher, {kind}"] = Ours(case, dtype, "none", backend=backend)
            cached = Ours(case, dtype, "cached", backend=backend, steps=args.steps)
            entries[f"cached, {kind}"] = cached
            write_s.setdefault(precision, cached.write_s)
    last = args.precision[-1]
    entries[f"no teacher, {last} again"] = Ours(case, PRECISIONS[last], "none")  # the A/A control
    seconds = race(entries, args.rounds, args.steps)

    flops = preflight.measure(
        lambda: models.create_model(case.student, num_classes=CLASSES, img_size=(case.size,) * 2),
        case.size, case.size,
    ).flops  # fmt: skip
    lines = [f"### {case.student} from {case.teacher}, {case.size} px, B={case.batch}", ""]

    def precision_of(name: str) -> str:
        return name.partition(", ")[2].split()[0]

    lines += table(seconds, {
        "x reference, same precision": lambda name: f"reference, {precision_of(name)}",
        "x timm, same precision": lambda name: f"timm, {precision_of(name)}",
        "x reference, fp32": lambda name: "reference, fp32",
        "x no teacher, same precision": lambda name: "no teacher, "
        + name.partition(", ")[2].removesuffix(" again"),
    })  # fmt: skip
    if not any(name.startswith("timm") for name in seconds):
        lines += ["", "Not measured: timm's task, which has no distilled student of that name."]
    lines += ["", f"The student's step is 3 x {flops / 1e9:.2f} GFLOP a picture."]
    for precision in args.precision:
        live, cached = (
            statistics.median(seconds[f"{kind}, {precision}"]) / case.batch
            for kind in ("live", "cached")
        )
        reading = entries[f"cached, {precision}"].reading_s(args.steps + 1)
        lines += ["", f"Cache, {precision}: {break_even(write_s[precision], live, cached)} Reading "
                  f"the answers to a batch takes {1e3 * reading:.3f} ms of a step."]  # fmt: skip
    return {"case": f"{case.student} {case.teacher} {case.size} {case.batch}", "seconds": seconds,
            "write_s": write_s, "lines": lines}  # fmt: skip


def break_even(write_s: float, live_s: float, cached_s: float) -> str:
    """Return in words when a cache has paid for itself; seconds a picture of each."""
    text = f"writing takes {1e3 * write_s:.1f} ms a picture and view; "
    saved = live_s - cached_s
    if saved <= 0:
        return text + "reading saves nothing, this teacher is as fast as the disk."
    runs = write_s / saved
    return (
        f"{text}reading instead of asking saves {1e3 * saved:.1f} ms a picture and epoch. With a "
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

    names = {"default AdamW, timm's ModelEma": first, "fused AdamW, ModelEmaV3": third,
             "ours": ours, "ours again": ours}  # fmt: skip
    seconds = race({name: entry(make) for name, make in names.items()}, 3 * args.rounds, 10)
    columns = {f"x {base}": lambda _, base=base: base for base in list(names)[:3]}
    lines = ["### Optimizer and EMA", "", *table(seconds, columns)]
    return {"seconds": seconds, "lines": lines}


@torch.no_grad()
def measure_agreement(args: argparse.Namespace, device: torch.device) -> dict[str, Any]:
    """Compare the labels of a trained teacher in bf16 with those in float32, on real pictures."""
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
        name: teachers.build_teacher(settings, loaders.num_classes, inputs, device, dtype)
        for name, dtype in (("fp32", None), ("bf16, folded, channels-last", torch.bfloat16))
    }
    asked["bf16, autocast alone"] = teachers.Teacher(
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
    lines = [f"### Labels of {args.agreement_teacher}, trained, on {len(labels)} real pictures",
             "", "| | same label as fp32, % | same, where fp32 is over 50 % sure | top-1, % | "
             "mean KL from fp32, nats |", "|---|---|---|---|---|"]  # fmt: skip
    shares = {}
    sure = exact.softmax(1).amax(1) > 0.5
    for name, logits in found.items():
        same = logits.argmax(1) == exact.argmax(1)
        top = 100 * (logits.argmax(1) == labels).double().mean()
        kl = F.kl_div(logits.double().log_softmax(1), exact.double().log_softmax(1),
                      reduction="batchmean", log_target=True)  # fmt: skip
        shares[name] = float(same.double().mean())
        lines.append(
            f"| {name} | {100 * shares[name]:.2f} | "
            f"{100 * float(same[sure].double().mean()):.2f} | {top:.2f} | {kl:.1e} |"
        )
    return {"same": shares, "pictures": len(labels), "lines": lines}


def measure_loader(args: argparse.Namespace) -> dict[str, Any]:
    """Run tools/bench_loader.py, which measures the input pipeline."""
    command = [sys.executable, str(ROOT / "tools" / "bench_loader.py"), "--data", args.loader_data,
               "--rounds", str(args.rounds)]  # fmt: skip
    answer = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    return {"lines": ["### Loader", "", "```", answer.stdout.strip(), "```"]}


def measure_gpu(case: Case, args: argparse.Namespace) -> dict[str, Any]:
    """Return images a second of the step alone and the share of the matrix product's rate (MFU)."""
    if case.device.type != "cuda":
        return {"lines": ["### GPU", "", "Not measured: no GPU is visible. MFU, images/s end to "
                          "end and the accuracy at equal wall-clock need one."]}  # fmt: skip
    peak, side = 0.0, 8192
    a = torch.randn(side, side, device=case.device, dtype=torch.bfloat16)
    for _ in range(10):
        torch.cuda.synchronize()
        start = time.perf_counter()
        for _ in range(10):
            a @ a
        torch.cuda.synchronize()
        peak = max(peak, 10 * 2 * side**3 / (time.perf_counter() - start))
    dtype, backend = PRECISIONS["bf16"], args.torchcompile
    entries = {"no teacher": Ours(case, dtype, "none", backend=backend),
               "cached": Ours(case, dtype, "cached", backend=backend, steps=args.steps),
               "live": Ours(case, dtype, "live", backend=backend)}  # fmt: skip
    if args.data_path:
        entries["no teacher, real loader"] = Loaded(case, dtype, args)
    seconds = race(entries, args.rounds, args.steps)
    flops = 3 * preflight.measure(
        lambda: models.create_model(case.student, num_classes=CLASSES, img_size=(case.size,) * 2),
        case.size, case.size,
    ).flops  # fmt: skip
    lines = [f"### GPU: {torch.cuda.get_device_name(case.device)}, B={case.batch}, bf16", "",
             "| | images/s | MFU, % |", "|---|---|---|"]  # fmt: skip
    for name, each in seconds.items():
        rate = case.batch / statistics.median(each)
        lines.append(f"| {name} | {rate:.0f} | {100 * rate * flops / peak:.1f} |")
    lines += ["", f"MFU counts the student's 3 x {flops / 3e9:.2f} GFLOP a picture alone, against "
              f"{peak / 1e12:.0f} TFLOP/s, the rate of a bf16 product of {side} x {side} matrices "
              "measured here.", *([] if args.data_path else
              ["", "Not measured: the real loader; give --data-path."])]  # fmt: skip
    return {"seconds": seconds, "flops": flops, "peak": peak, "lines": lines}


class Loaded(Ours):
    """Our step without a teacher, on what the loader of --data-path brings."""

    def __init__(self, case: Case, amp_dtype: torch.dtype | None, args: argparse.Namespace) -> None:
        super().__init__(case, amp_dtype, "none", backend=args.torchcompile)
        settings = options.parse_args([
            "--data-path", args.data_path, "--data-set", args.data_set, "--model", case.student,
            "--input-size", str(case.size),
            "--batch-size", str(case.batch), "--device", str(case.device),
        ]).args  # fmt: skip
        inputs = models.build_input_config(settings)
        processes = distributed.Processes(0, 0, 1, case.device, "single")
        loaders = datasets.build_loaders(settings, inputs, processes)
        self.batches = endless(loaders)

    def loader(self, steps: int) -> "Some":
        return Some(self.batches, steps)


@dataclass
class Some:
    """The next `count` batches."""

    batches: Any
    count: int

    def __len__(self) -> int:
        return self.count

    def __iter__(self) -> Any:
        return (next(self.batches) for _ in range(self.count))


def endless(loaders: datasets.Loaders) -> Any:
    epoch = 0
    while True:
        loaders.set_epoch(epoch)
        yield from loaders.train
        epoch += 1


def measure_growth(args: argparse.Namespace, device: torch.device, folder: Path) -> dict[str, Any]:
    """Measure what grows: time with the batch, memory with the steps, the cache with its rows."""
    small = ("deit_pico_distilled_patch4_32", "resnet_pico", 32)
    entries, sizes = {}, args.growth_batches
    for batch in sizes:
        case = Case(*small, batch, device, folder)
        entries[str(batch)] = Ours(case, None, "none")
    seconds = race(entries, args.rounds, args.steps)
    lines = ["### Growth", "", f"{small[0]}, fp32, no teacher:", "",
             "| batch | ms a step | ms a step and picture |", "|---|---|---|"]  # fmt: skip
    for batch in sizes:
        each = 1e3 * statistics.median(seconds[str(batch)])
        lines.append(f"| {batch} | {each:.1f} | {each / batch:.3f} |")
    case = Case(*small, 16, device, folder)
    run, seen = Ours(case, None, "cached", steps=args.growth_steps), []
    at = [args.growth_steps // 10, args.growth_steps]
    note = run.engine | {"data_loader": run.loader(args.growth_steps + 1)}
    with contextlib.redirect_stdout(io.StringIO()):
        engine.train_one_epoch(
            **note, log_interval=50, on_update=lambda n: n in at and seen.append(held(device))
        )
    grown = (seen[1] - seen[0]) / 2**20
    lines += ["", f"Memory after {at[0]} cached steps {seen[0] / 2**20:.1f} MiB, after {at[1]} "
              f"{seen[1] / 2**20:.1f} MiB: {grown:+.1f} MiB.", "",
              "| cache of 10,000 rows, 1000 classes | predicted, bytes | on disk |",
              "|---|---|---|"]  # fmt: skip
    caches = {}
    for keep in ("all", 10, "hard"):
        where = folder / f"growth_{keep}"
        store = cache.Store(where, rows=10_000, num_classes=CLASSES, keep=keep, facts={},
                            may_create=True)  # fmt: skip
        there = sum(p.stat().st_size for p in where.iterdir() if p.name != cache.MANIFEST)
        caches[str(keep)] = (store.size(), there)
        lines.append(f"| {keep} | {store.size():,} | {there:,} |")
    return {"seconds": seconds, "memory": dict(zip(at, seen)), "cache": caches, "lines": lines}


def held(device: torch.device) -> int:
    """Return the bytes held now: of tensors on the GPU, or of the process without the pages of
    mapped files, such as a cache's, which the system takes back when it needs them."""
    gc.collect()
    if device.type == "cuda":
        return torch.cuda.memory_allocated(device)
    status = Path("/proc/self/status").read_text()
    return 1024 * int(status.partition("RssAnon:")[2].split()[0])


# --- the program --------------------------------------------------------------------------------


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    add("--student", default="deit_tiny_distilled_patch16_224")
    add("--teacher", nargs="+", default=["regnety_160", "regnety_016"])
    add("--batch-size", nargs="+", type=int, default=[4, 8], help="one for each teacher")
    add("--img-size", type=int, default=224, help="pixels")
    add("--precision", nargs="+", choices=PRECISIONS, default=["fp32", "bf16"])
    add("--torchcompile", nargs="?", const="inductor", default="", metavar="BACKEND",
        help="race compiled steps too")  # fmt: skip
    add("--rounds", type=int, default=7)
    add("--steps", type=int, default=2, help="timed steps of a turn, after one that is not")
    add("--device", default="auto")
    add("--data-path", default="", help="on a GPU: pictures for the whole pipeline")
    add("--data-set", default="IMNET", help="what they are, as of main.py")
    add("--agreement-teacher", default="resnet_pico")
    add("--agreement-path", default=str(SHIPPED), help="its trained weights")
    add("--agreement-data", default="", help="folder with val/; default: the embedded digits")
    add("--loader-data", default="", help="folder with val/; default: made-up pictures")
    add("--growth-steps", type=int, default=2000)
    add("--growth-batches", type=int, nargs="+", default=[16, 32, 64, 128, 256])
    add("--json", type=Path, metavar="FILE", help="all seconds, for machines")
    return parser


def main() -> int:
    args = _parser().parse_args()
    if len(args.teacher) != len(args.batch_size):
        raise SystemExit("give one --batch-size for each --teacher")
    warnings.filterwarnings("ignore")
    device = distributed.pick_device(args.device, 0)
    found: dict[str, Any] = {"about": about(device)}
    print("\n".join(found["about"]), flush=True)
    with tempfile.TemporaryDirectory() as folder:
        jobs = {}
        for teacher, batch in zip(args.teacher, args.batch_size):

            def case(teacher=teacher, batch=batch) -> Case:  # fmt: skip
                return Case(args.student, teacher, args.img_size, batch, device, Path(folder))

            jobs[f"step {teacher}"] = lambda case=case: measure_step(case(), args)
        jobs |= {
            "optimizer": lambda: measure_optimizer(case(), args),
            "agreement": lambda: measure_agreement(args, device),
            "loader": lambda: measure_loader(args),
            "gpu": lambda: measure_gpu(case(), args),
            "growth": lambda: measure_growth(args, device, Path(folder)),
        }
        for name, measure in jobs.items():
            if name.split()[0] in args.parts:
                found[name] = measure()
                print("\n" + "\n".join(found[name]["lines"]), flush=True)
                gc.collect()
    if args.json:
        args.json.write_text(json.dumps(found, indent=1) + "\n")
    return 0


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
    return ["```", shlex.join(["python", "tools/benchmark.py", *sys.argv[1:]]), "```", "",
            f"{machine}; {versions}; commit {commit or 'unknown'}."]  # fmt: skip


def capable(unit: str) -> bool:
    return bool(getattr(torch.cpu, "get_capabilities", dict)().get(unit))


if __name__ == "__main__":
    sys.exit(main())
