"""The part of experiments/benchmark.py about what grows: time, memory, a cache's size."""

import argparse
import contextlib
import gc
import io
import re
import statistics
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

import engine
import main
from distill import cache_store
from experiments.bench_race import race
from experiments.bench_steps import Case, Ours
from training.step_config import Hooks

SMALL = ("deit_pico_distilled_patch4_32", "resnet_pico", 32)
# A run on the embedded digits, in one process with two workers
RUN = [
    "--distillation-type",
    "hard",
    "--model",
    "deit_pico_distilled_patch8_32",
    "--batch-size",
    "16",
    "--num-workers",
    "2",
    "--no-teacher-check",
    "--output_dir",
    "",
]
DIGITS = 10  # classes


def measure_growth(args: argparse.Namespace, device: torch.device, folder: Path) -> dict[str, Any]:
    """Measure what grows: time with the batch, memory with the steps, the cache with its rows."""
    seconds = time_by_batch(args, device, folder)
    lines = [
        "### Growth",
        "",
        f"{SMALL[0]}, fp32, no teacher:",
        "",
        "| batch | ms a step | ms a step and image |",
        "|---|---|---|",
    ]
    for batch in args.growth_batches:
        each = 1e3 * statistics.median(seconds[str(batch)])
        lines.append(f"| {batch} | {each:.1f} | {each / batch:.3f} |")
    at = [args.growth_steps // 10, args.growth_steps]
    memory = {
        f"a step from a cache ({device.type})": memory_of_steps(at, device, folder),
        "`main.py` with two workers, all their own": memory_of_a_run(at, device),
    }
    lines += ["", f"| memory, MiB, after | {at[0]} steps | {at[1]} | growth |", "|---|---|---|---|"]
    for name, seen in memory.items():
        first, last = (each / 2**20 for each in seen)
        lines.append(f"| {name} | {first:.1f} | {last:.1f} | {last - first:+.1f} |")
    sizes = {keep: cache_size(keep, folder / f"growth_{keep}") for keep in ("all", "3", "hard")}
    lines += [
        "",
        "| cache of the digits, two views | `main.py --dry-run`, bytes | on disk |",
        "|---|---|---|",
    ]
    lines += [f"| {keep} | {told:,} | {there:,} |" for keep, (told, there) in sizes.items()]
    return {"seconds": seconds, "memory": memory, "steps": at, "cache": sizes, "lines": lines}


def time_by_batch(
    args: argparse.Namespace, device: torch.device, folder: Path
) -> dict[str, list[float]]:
    """Race batches of all sizes; return the seconds a step."""
    return race(
        {
            str(batch): Ours(Case(*SMALL, batch, device, folder), None, "none")
            for batch in args.growth_batches
        },
        args.rounds,
        args.steps,
    )


def memory_of_steps(at: Sequence[int], device: torch.device, folder: Path) -> list[int]:
    """Return the bytes held after so many steps from a cache, in this process."""
    run, seen = Ours(Case(*SMALL, 16, device, folder), None, "cached", steps=at[-1]), []
    with contextlib.redirect_stdout(io.StringIO()):
        engine.train_one_epoch(
            **run.engine,
            data_loader=run.loader(at[-1] + 1),
            config=replace(run.config, log_interval=50),
            hooks=Hooks(on_update=lambda step: step in at and seen.append(held(device))),
        )
    return seen


def memory_of_a_run(at: Sequence[int], device: torch.device) -> list[int]:
    """Return the bytes of their own that main.py and its workers hold after so many steps."""
    command = [
        sys.executable,
        main.__file__,
        *RUN,
        "--device",
        str(device),
        "--epochs",
        str(at[-1]),
        "--log-interval",
        "1",
    ]
    seen: list[int] = []
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as run:
        for line in run.stdout:
            found = re.match(r"Epoch: \[(\d+)/\d+\] \[(\d+)/(\d+)\]", line)
            if found is None:
                continue
            epoch, step, steps = map(int, found.groups())
            if (epoch - 1) * steps + step >= at[len(seen)]:
                seen.append(own_memory(run.pid))
            if len(seen) == len(at):
                run.kill()  # its workers see that it is gone
                break
    if len(seen) < len(at):
        raise SystemExit(f"main.py ended before step {at[len(seen)]} (code {run.returncode})")
    return seen


def own_memory(pid: int) -> int:
    """Return the bytes of a process and its children that no file backs; what processes share
    counts once."""
    total, place = 0, Path("/proc") / str(pid)
    with contextlib.suppress(OSError):  # it may just have ended
        text = (place / "smaps_rollup").read_text()
        total = 1024 * int(text.partition("Pss_Anon:")[2].split()[0])
        for children in place.glob("task/*/children"):
            total += sum(own_memory(int(child)) for child in children.read_text().split())
    return total


def cache_size(keep: str, folder: Path) -> tuple[int, int]:
    """Return the bytes of a cache as main.py tells them before it writes, and as they are."""
    flags = [
        *RUN,
        "--num-workers",
        "0",
        "--repeated-aug",
        "--device",
        "cpu",
        "--teacher-cache-topk",
        keep,
        "--teacher-cache-views",
        "2",
        "--teacher-cache",
        str(folder),
    ]
    answers = re.search(r"^cache: .*?(\d+) answers", said([*flags, "--dry-run"]), re.M)
    said([*flags, "--teacher-cache-mode", "write"])
    row = cache_store.row_bytes(cache_store.read_topk(keep, DIGITS), DIGITS)
    there = sum(p.stat().st_size for p in folder.iterdir() if p.name != cache_store.MANIFEST)
    return int(answers[1]) * row, there


def said(flags: Sequence[str]) -> str:
    """Run main.py in this process; return what it printed."""
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        code = main.run(flags)
    if code:
        raise SystemExit(code)
    return out.getvalue()


def held(device: torch.device) -> int:
    """Return the bytes held now: of tensors on the GPU, or of the process without the pages of
    mapped files, such as a cache's, which the system takes back when it needs them."""
    gc.collect()
    if device.type == "cuda":
        return torch.cuda.memory_allocated(device)
    status = Path("/proc/self/status").read_text()
    return 1024 * int(status.partition("RssAnon:")[2].split()[0])
