"""Measures what each CPU optimisation of commit 7aa4b54 gains in a training step.

    git worktree add ../before 7aa4b54
    OMP_NUM_THREADS=1 PYTHONPATH=../before taskset -c 1 \
        python experiments/cpu_optimisations.py --case large --precision fp32

The modules come from that checkout, because they changed later. Every row runs in its own process.
In every round each row runs one turn, in an order that rotates. A ratio divides the time of a row
by the time of the first row in the same round. The table also compares CPU seconds, which do not
include the time that other programs used the core.
"""

import argparse
import contextlib
import io
import shlex
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

# isort: off
import engine
import optim
import teachers
from models import fast
from tools import bench_steps
from tools.bench_race import Apart, ratio
from tools.bench_steps import PRECISIONS, Case, Ours
# isort: on

MADV_NOHUGEPAGE = 15  # mman.h
SHAPES = {  # student, teacher, pixels, classes
    "tiny": ("deit_pico_distilled_patch8_32", "resnet_pico", 32, 10),
    "large": ("deit_tiny_distilled_patch16_224", "regnety_016", 224, 1000),
    "largest": ("deit_tiny_distilled_patch16_224", "regnety_160", 224, 1000),
}
REAL = {
    "lighten": fast.lighten,
    "create_optimizer_v2": optim.create_optimizer_v2,
    "seed_step": engine.seed_step,
}
Times = dict[str, list[tuple[float, float]]]  # row -> (seconds, CPU seconds) of a step by round


# --- how to switch each optimisation off in this process ------------------------------------------


def _contiguous_lighten(*arguments: Any) -> tuple[nn.Module, int]:
    network, count = REAL["lighten"](*arguments)
    return network.to(memory_format=torch.contiguous_format), count


def _no_channels_last() -> None:
    fast.lighten = _contiguous_lighten
    teachers.Teacher._adapted = lambda self, images: self.adapter(images)


def _seed_all_devices(*parts: int | str) -> None:
    REAL["seed_step"](*parts)
    torch.manual_seed(engine.derive_seed(*parts))


def _plain_adamw(*arguments: Any, fused: bool = False, **named: Any) -> torch.optim.Optimizer:
    return REAL["create_optimizer_v2"](*arguments, **named)


def _timm_ema(ema: optim.Ema, network: nn.Module, global_step: int) -> None:
    ema._ema.update(network, step=global_step)


SWITCH_OFF: dict[str, Callable[[], None]] = {
    "kept memory": lambda: setattr(fast, "keep_memory", lambda: False),
    "huge pages": lambda: setattr(fast, "MADV_HUGEPAGE", MADV_NOHUGEPAGE),
    "oneDNN": lambda: setattr(fast, "prefers_onednn", lambda: False),
    "fused AdamW": lambda: setattr(optim, "create_optimizer_v2", _plain_adamw),
    "EMA pairs": lambda: setattr(optim.Ema, "update", _timm_ema),
    "CPU seeding": lambda: setattr(engine, "seed_step", _seed_all_devices),
    "plain attention": lambda: setattr(fast, "prefers_fused_attention", lambda *_: True),
    "patch products": lambda: setattr(fast, "use_patch_products", lambda network: None),
    "folding": lambda: setattr(fast, "fold_batch_norms", lambda network, size: (network, 0)),
    "channels last": _no_channels_last,
    "cast once": lambda: setattr(fast, "CAST_BY_AUTOCAST", ()),
}
BF16_ONLY = ("plain attention", "patch products", "folding", "channels last", "cast once")


# --- one row --------------------------------------------------------------------------------------


class TinyCase(Case):
    """The step of the quick start: its flags, 10 classes, random images."""

    def __post_init__(self) -> None:
        bench_steps.CLASSES = SHAPES["tiny"][3]
        super().__post_init__()

    def __reduce__(self) -> tuple[Any, ...]:
        return TinyCase, super().__reduce__()[1]

    def args(self, *flags: str) -> argparse.Namespace:
        own = ["--drop-path", "0", "--mixup", "0", "--cutmix", "0", "--reprob", "0"]
        return super().args(*own, *flags)


class Step(Ours):
    """A training step. off: the optimisations that are switched off. force_onednn: use oneDNN's
    float32 products on every kind of CPU."""

    def __init__(
        self,
        case: Case,
        args: argparse.Namespace,
        teacher: str,
        off: tuple[str, ...],
        *,
        force_onednn: bool = False,
    ) -> None:
        for name in off:
            SWITCH_OFF[name]()
        if force_onednn:
            fast.prefers_onednn = lambda: True
        super().__init__(case, PRECISIONS[args.precision], teacher, steps=args.steps)

    def __call__(self, steps: int) -> tuple[float, float]:
        """Return the mean seconds and CPU seconds of a step."""
        wall, cpu = time.perf_counter(), time.process_time()
        with contextlib.redirect_stdout(io.StringIO()):
            batches = self.loader(steps)
            engine.train_one_epoch(**self.engine, data_loader=batches, log_interval=10**9)
        return (time.perf_counter() - wall) / steps, (time.process_time() - cpu) / steps


def build_rows(case: Case, args: argparse.Namespace) -> dict[str, Apart]:
    """Return the rows by name."""
    off: dict[str, tuple[str, ...]] = {"all on": (), "all on, again": ()}
    if args.each:
        active = [name for name in SWITCH_OFF if args.precision == "bf16" or name not in BF16_ONLY]
        onednn = fast.prefers_onednn() and args.precision == "fp32"
        off |= {f"without {name}": (name,) for name in active if name != "oneDNN" or onednn}
    off["all off"] = tuple(SWITCH_OFF)
    for kept in args.keep:
        off[f"only {kept}"] = tuple(name for name in SWITCH_OFF if name not in kept.split(","))
    rows = {}
    for teacher in args.teacher:
        for name, switched in off.items():
            label = name if args.teacher == ["live"] else f"{teacher}, {name}"
            rows[label] = Apart(Step, case, args, teacher, switched)
    if args.precision == "fp32" and args.each and not fast.prefers_onednn():
        rows["all on, and oneDNN"] = Apart(Step, case, args, args.teacher[0], (), force_onednn=True)
    return rows


# --- the race -------------------------------------------------------------------------------------


def race(rows: dict[str, Apart], rounds: int, steps: int) -> Times:
    """Run all rows in every round, after one round of warm-up."""
    names, found = list(rows), {name: [] for name in rows}
    for number in range(-1, rounds):
        first = number % len(names)
        for name in names[first:] + names[:first]:
            took = rows[name](steps)
            if number >= 0:
                found[name].append(took)
    return found


def table(found: Times) -> list[str]:
    """Return the lines of a Markdown table. Brackets hold the quartiles over the rounds."""
    lines = [
        "| | time / time of the first row | the same in CPU seconds | least CPU ms a step |",
        "|---|---|---|---|",
    ]
    kinds = [{name: list(zip(*pairs))[i] for name, pairs in found.items()} for i in (0, 1)]

    def compare(ours: str, theirs: str) -> list[str]:
        ratios = [ratio(seconds[ours], seconds[theirs]) for seconds in kinds]
        return ["{:.2f} ({:.2f}-{:.2f})".format(*each) for each in ratios]

    for name in found:
        wall, cpu = compare(next(iter(found)), name)
        lines.append(f"| {name} | {wall} | {cpu} | {1e3 * min(kinds[1][name]):.0f} |")
    lines.append("")
    for name in found:
        teacher, _, switched = name.partition(", ")
        if teacher == "cached":
            wall, cpu = compare(name, f"none, {switched}")
            lines.append(f"- Speed of cached / none, {switched}: {wall}; in CPU seconds {cpu}")
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("--case", choices=SHAPES, default="large")
    add("--precision", choices=("fp32", "bf16"), default="fp32")
    add("--teacher", nargs="+", choices=("live", "cached", "none"), default=["live"])
    add("--batch-size", type=int, default=4)
    add("--rounds", type=int, default=7)
    add("--steps", type=int, default=2, help="of a turn")
    add("--no-each", dest="each", action="store_false", help="no rows with one switched off")
    add("--keep", nargs="*", default=[], metavar="NAME,NAME", help="a row with only these on")
    args = parser.parse_args()
    if unknown := {name for kept in args.keep for name in kept.split(",")} - set(SWITCH_OFF):
        parser.error(f"--keep {sorted(unknown)}: not among {list(SWITCH_OFF)}")
    warnings.filterwarnings("ignore")
    start, (student, teacher, size, _) = time.perf_counter(), SHAPES[args.case]
    make = TinyCase if args.case == "tiny" else Case
    with tempfile.TemporaryDirectory() as folder:
        case = make(student, teacher, size, args.batch_size, torch.device("cpu"), Path(folder))
        found = race(build_rows(case, args), args.rounds, args.steps)
    command = shlex.join(["python", "experiments/cpu_optimisations.py", *sys.argv[1:]])
    print(f"### {student} from {teacher}, {size} px, B={args.batch_size}, {args.precision}")
    print("", *table(found), "", f"`{command}` ({time.perf_counter() - start:.0f} s)", "", sep="\n")


if __name__ == "__main__":
    main()
