"""The part of tools/benchmark.py about what grows: time, memory, a cache's size."""

import argparse
import contextlib
import gc
import io
import statistics
from pathlib import Path
from typing import Any

import torch

import cache
import engine
from tools.bench_race import race
from tools.bench_steps import CLASSES, Case, Ours


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
