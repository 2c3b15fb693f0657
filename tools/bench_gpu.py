"""The part of tools/benchmark.py that needs a GPU: images a second, and the share of the peak."""

import argparse
import statistics
import time
from dataclasses import dataclass
from typing import Any

import torch

import datasets
import distributed
import models
import options
import preflight
from tools.bench_race import race
from tools.bench_steps import CLASSES, PRECISIONS, Case, Ours


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
