"""The GPU part of the benchmark: images per second and the share of the peak.

A turn is one long stretch of training. Where a loader brings the batches its workers start with the
turn and end with it, so that none works for another's, and as many batches as they may have ready
are trained on before the watch is started: what is timed was loaded in that time.
"""

import argparse
import contextlib
import gc
import io
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import datasets
import models
import options
from base import distributed
from checks import dry_run
from experiments import bench_loader
from experiments.bench_race import middle, race, ratio
from experiments.bench_steps import CLASSES, PRECISIONS, Case, Ours
from tools import prepare_data

IMAGES = 1000  # made up, where no prepared ones are given
SPARE_BATCHES = 64  # more than workers have ready
HERE = "batch on the device"


def measure_gpu(args: argparse.Namespace, device: torch.device, folder: Path) -> dict[str, Any]:
    """Race whole steps of every student on a GPU, on batches in memory and from loaders."""
    if device.type != "cuda":
        return {
            "lines": [
                "### GPU",
                "",
                "Not measured: no GPU is visible. MFU and images/s end to end need one.",
            ]
        }
    side = 8192
    peak = matmul_rate(device, side)
    found: dict[str, Any] = {
        "peak": peak,
        "students": {},
        "lines": [
            f"### GPU: {torch.cuda.get_device_name(device)}",
            "",
            "MFU counts the student's three "
            f"passes alone, against {peak / 1e12:.0f} TFLOP/s, the rate of a bf16 product of "
            f"{side} x {side} matrices measured here.",
        ],
    }
    sources = images(args, folder)
    for student, batch in zip(args.gpu_students, args.gpu_batch_size):
        case = Case(student, args.teacher[0], args.img_size, batch, device, folder)
        each = measure_student(case, args, sources, peak)
        found["students"][student] = each
        found["lines"] += ["", *each["lines"]]
        gc.collect()
    return found


def matmul_rate(device: torch.device, side: int) -> float:
    """Return the FLOP/s of a product of two square bf16 matrices, the best of ten."""
    a, best = torch.randn(side, side, device=device, dtype=torch.bfloat16), 0.0
    for _ in range(10):
        _wait(device)
        start = time.perf_counter()
        for _ in range(10):
            a @ a
        _wait(device)
        best = max(best, 10 * 2 * side**3 / (time.perf_counter() - start))
    return best


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def images(args: argparse.Namespace, folder: Path) -> dict[str, list[str]]:
    """Return, by name, the flags of every data set whose loader is measured."""
    sources = {"prepared": ["--data-set", "PREPARED", "--data-path", args.prepared_path]}
    if not args.prepared_path:
        made, few = folder / "made", folder / "few"
        with contextlib.redirect_stdout(io.StringIO()):
            bench_loader.make_up(made, IMAGES)
            if prepare_data.main([str(made), str(few), "--splits", "val", "--format", "raw"]):
                raise SystemExit(2)
        entries = (args.gpu_steps + SPARE_BATCHES) * max(args.gpu_batch_size)
        sources["prepared"][-1] = str(bench_loader.grow(few, folder, entries))
    if args.data_path:
        sources["files"] = ["--data-set", args.data_set, "--data-path", args.data_path]
    return sources


def measure_student(
    case: Case, args: argparse.Namespace, sources: Mapping[str, Sequence[str]], peak: float
) -> dict[str, Any]:
    """Race one student's steps; return seconds, FLOPs of a forward pass and a table's lines."""
    entries = {name: Stretch(case, name, args) for name in ("no teacher", "cached", "live")}
    entries["no teacher again"] = Stretch(case, "no teacher", args)  # the A/A control
    entries[f"no teacher, {HERE}"] = Stretch(case, "no teacher", args, here=True)
    for source, flags in sources.items():
        for where in ("device", "worker"):
            name = f"{source}, --augment-on {where}"
            from_loader = [*flags, "--augment-on", where]
            entries[f"no teacher, {name}"] = Stretch(case, "no teacher", args, from_loader)
            if where == "device":
                entries[f"cached, {name}"] = Stretch(case, "cached", args, from_loader)
    seconds = race(entries, args.rounds, args.gpu_steps)
    flops = dry_run.network_size(
        lambda: models.create_model(case.student, num_classes=CLASSES, img_size=(case.size,) * 2),
        case.size,
        case.size,
    ).flops
    compiled = f", compiled by {args.torchcompile}" if args.torchcompile else ""
    lines = [
        f"#### {case.student} from {case.teacher}, {case.size} px, B={case.batch}, bf16{compiled}",
        "",
        f"3 x {flops / 1e9:.2f} GFLOP an image; stretches of {args.gpu_steps} steps.",
        "",
        "| | images/s | x the same teacher, batches in memory | MFU, % |",
        "|---|---|---|---|",
    ]
    for name, each in seconds.items():
        rate, most, least = (case.batch / one for one in middle(each))
        base = name.split(",")[0].removesuffix(" again")
        beside = (
            "1" if name == base else "{:.2f} ({:.2f}-{:.2f})".format(*ratio(each, seconds[base]))
        )
        share = 100 * rate * 3 * flops / peak
        lines.append(f"| {name} | {rate:.0f} ({least:.0f}-{most:.0f}) | {beside} | {share:.1f} |")
    return {"seconds": seconds, "forward_flops": flops, "lines": lines}


class Stretch(Ours):
    """Our step in bf16, on a batch in memory or on what a loader brings.

    teacher: "no teacher", "cached" or "live". flags: of the loader, none for a batch in the host's
    memory, or the device's (`here`).
    """

    def __init__(
        self,
        case: Case,
        teacher: str,
        args: argparse.Namespace,
        flags: Sequence[str] = (),
        here: bool = False,
    ) -> None:
        self.flags, self.lead, self.here = [*flags], 0, here
        if flags:
            if args.num_workers is not None:
                self.flags += ["--num-workers", str(args.num_workers)]
            train = self.loaders_of(case).train
            self.lead = train.num_workers * (train.prefetch_factor or 0)
        super().__init__(
            case,
            PRECISIONS["bf16"],
            "none" if teacher == "no teacher" else teacher,
            backend=args.torchcompile,
            steps=self.lead + args.gpu_steps,
        )

    def loaders_of(self, case: Case) -> datasets.Loaders:
        settings = options.parse_args(
            [
                *self.flags,
                "--model",
                case.student,
                "--input-size",
                str(case.size),
                "--batch-size",
                str(case.batch),
                "--device",
                str(case.device),
            ]
        ).args
        processes = distributed.Processes(0, 0, 1, case.device, "single")
        return datasets.build_loaders(settings, models.build_input_config(settings), processes)

    def loader(self, steps: int) -> list[tuple[Tensor, ...]]:
        data = self.case.data
        return [tuple(x.to(self.case.device) for x in data) if self.here else data] * steps

    def __call__(self, steps: int) -> float:
        if not self.flags:
            return super().__call__(steps)
        batches = endless(self.loaders_of(self.case))
        try:
            return self.turn(Some(batches, self.lead + steps + 1), steps, self.lead)
        finally:
            batches.close()
            gc.collect()  # the workers end


@dataclass
class Some:
    """The next `count` batches."""

    batches: Any
    count: int

    def __len__(self) -> int:
        return self.count

    def __iter__(self) -> Any:
        return (next(self.batches) for _ in range(self.count))


def endless(loaders: datasets.Loaders) -> Iterator[Any]:
    """Yield the batches of epoch after epoch."""
    epoch = 0
    while True:
        loaders.set_epoch(epoch)
        yield from loaders.train
        epoch += 1
