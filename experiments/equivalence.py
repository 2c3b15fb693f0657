"""Compare the numbers of two checkouts: run `main.py` of both on the digits, for about 20 updates.

    python experiments/equivalence.py OLD_CHECKOUT NEW_CHECKOUT
    python experiments/equivalence.py OLD_CHECKOUT NEW_CHECKOUT --cases none,soft --keep runs/equal

Four things are compared for every case. The printed lines with a loss or an accuracy. The values of
every update in TensorBoard (float32). The epochs of log.txt (float64). Every tensor of
checkpoint.pth and every data file of a teacher cache. A cell shows how many values were compared,
or `-` for none. Times and memory are not compared. Further cases resume a checkpoint of the old
checkout and read its teacher cache. The exit code is 1 if anything differs.

Only the command line and the file formats are used, so the modules may have any names. Every run is
forked from this process, which has already imported the libraries; torchrun starts two processes.
"""

import argparse
import hashlib
import json
import multiprocessing
import os
import re
import runpy
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import sklearn.datasets  # noqa: F401  (this and timm: imported once for all forked runs)
import timm  # noqa: F401
import torch
import torch.utils.tensorboard
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from experiments.about import commit

COMMON = (
    "--data-set DIGITS --model deit_pico_distilled_patch8_32 --batch-size 89 --epochs 2 "
    "--warmup-epochs 1 --lr 0.002 --unscale-lr --drop-path 0.1 --aa none --color-jitter 0 "
    "--reprob 0 --mixup 0 --cutmix 0 --no-repeated-aug --num-workers 0 --log-interval 1 "
    "--no-teacher-check --device cpu"
)
HARD = "--distillation-type hard"
CACHE = f"{HARD} --reprob 0.25 --mixup 0.8 --cutmix 1 --teacher-cache"
ACCUMULATE = (
    f"{HARD} --batch-size 44 --grad-accum-steps 2 --clip-grad 1 --mixup 0.8 --cutmix 1 "
    "--reprob 0.25 --aa rand-m9-mstd0.5-inc1 --color-jitter 0.3 --repeated-aug --model-ema "
    "--num-workers 1 --checkpoint-steps 4 --keep-checkpoints 9"
)
MATCH = (
    f"{HARD} --teacher-model deit_pico_patch8_32 --teacher-path {{old}}/vit_teacher/checkpoint.pth "
    "--match layer_S=4,layer_T=4,feature=hidden,loss=hidden_mse,tokens=patch,proj=linear "
    "--match layer_S=3,layer_T=3,feature=attention,loss=attention_mse,tokens=patch "
    "--match feature=pooled,loss=vkd,proj=orthogonal"
)
OBJECTIVE = (
    "--distillation-type soft --kd-loss-type ce --distillation-tau 4 --probability-shift "
    "--temperature-scheduler cwsm:0.1 --kd-loss-weight-scheduler linear_growth "
    "--ranking-kl-weight 0.5 --match layer_S=0+4,layer_T=0+1,feature=hidden,loss=fsp,proj=linear"
)


@dataclass(frozen=True)
class Case:
    """A run of main.py. {old}: the folder of the old checkout's runs; {own}: of its own.

    needs: cases that run before. like: only the new checkout runs; compare its numbers with those
    of this case of the old one, as far as it goes. resume_at: start from the checkpoint that the
    old run of `like` wrote after so many updates.
    """

    flags: str
    processes: int = 1
    needs: tuple[str, ...] = ()
    like: str = ""
    resume_at: int = 0


CASES = {
    "none": Case("--distillation-type none"),
    "soft": Case("--distillation-type soft --distillation-tau 3"),
    "hard": Case(f"{HARD} --teacher-check"),
    "cache_write": Case(f"{CACHE} {{own}}/cache_write/cache --teacher-cache-mode write"),
    "cache_read": Case(
        f"{CACHE} {{own}}/cache_write/cache --teacher-cache-mode read", needs=("cache_write",)
    ),
    "vit_teacher": Case("--model deit_pico_patch8_32 --epochs 1"),
    "match": Case(MATCH, needs=("vit_teacher",)),
    "objective": Case(OBJECTIVE),
    "cosub": Case("--cosub"),
    "accumulate": Case(ACCUMULATE),
    "device_augment": Case(f"{HARD} --augment-on device --ThreeAugment --bce-loss --mixup 0.8"),
    "bf16": Case(f"{HARD} --amp bf16 --input-size 16 --no-model-ema"),
    "lamb": Case(f"{HARD} --opt lamb"),
    "two_processes": Case(f"{HARD} --batch-size 44", processes=2),
    "old_checkpoint": Case(
        "--eval --resume {old}/accumulate/checkpoint.pth", needs=("accumulate",)
    ),
    "resume_epoch": Case(ACCUMULATE, needs=("accumulate",), like="accumulate", resume_at=9),
    "resume_step": Case(ACCUMULATE, needs=("accumulate",), like="accumulate", resume_at=12),
    "old_cache_read": Case(
        f"{CACHE} {{old}}/cache_write/cache --teacher-cache-mode read",
        needs=("cache_read",),
        like="cache_read",
    ),
    "old_cache_verify": Case(
        f"{CACHE} {{old}}/cache_write/cache --teacher-cache-mode verify", needs=("cache_write",)
    ),
}
COLUMNS = ("printed lines", "every update", "log.txt", "files")
CHECKPOINT_KEYS = ("model", "model_ema", "optimizer", "projections")
NOT_COMPARED = re.compile(r"(eta|data wait|memory) .*|.* images/s")  # in printed lines
RATES = ("images_per_s", "data_wait", "memory_mib", "time_s")  # in TensorBoard and log.txt


@dataclass
class Result:
    """What a run has printed and written. failure: empty if it ended with exit code 0.

    values: for each column of the table, named values. Lines are numbered from the last, -1.
    """

    failure: str = ""
    values: dict[str, dict[Any, Any]] = field(default_factory=dict)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("old", type=Path, help="checkout with the numbers to keep")
    parser.add_argument("new", type=Path, help="checkout to compare")
    parser.add_argument("--cases", default=",".join(CASES), help="default: %(default)s")
    parser.add_argument("--keep", type=Path, help="keep the runs here; reuse the old checkout's")
    args = parser.parse_args()
    if unknown := set(args.cases.split(",")) - set(CASES):
        parser.error(f"no case {', '.join(sorted(unknown))}; there are {', '.join(CASES)}")

    os.environ["OMP_NUM_THREADS"] = "1"
    torch.set_num_threads(1)  # for forked runs; the variable is for new interpreters
    different = []
    with tempfile.TemporaryDirectory() as temporary:
        work = (args.keep or Path(temporary)).resolve()
        old = Checkout(args.old, work / "old", work / "old", reuse=bool(args.keep))
        new = Checkout(args.new, work / "new", work / "old", reuse=False)
        print_row("case", *COLUMNS, "seconds")
        for name in with_needs(args.cases.split(",")):
            start = time.perf_counter()
            case = CASES[name]
            results = old.run(case.like or name), new.run(name)
            cells, details = compare(*results, part=bool(case.like))
            print_row(name, *cells, f"{time.perf_counter() - start:.0f}")
            print(*(f"  {line}\n" for line in details), sep="", end="", flush=True)
            different += [name] if details else []
    print(f"different: {', '.join(different)}" if different else "all cases are equal")
    return int(bool(different))


def print_row(*cells: str) -> None:
    print("  ".join([f"{cells[0]:16}", *(f"{cell:20}" for cell in cells[1:])]), flush=True)


def with_needs(names: list[str]) -> list[str]:
    """Return `names` and the cases they need, in the order of CASES."""
    wanted, queue = set(names), list(names)
    while queue:
        needs = CASES[queue.pop()].needs
        wanted.update(needs)
        queue += needs
    return [name for name in CASES if name in wanted]


def compare(old: Result, new: Result, *, part: bool = False) -> tuple[list[str], list[str]]:
    """Return a cell for each column, and a line for each difference.

    part: `new` has only the last part of the lines, updates and epochs of `old`.
    """
    if old.failure or new.failure:
        failures = f"old: {old.failure or 'done'}; new: {new.failure or 'done'}"
        return ["FAILED"] * len(COLUMNS), [failures]
    cells, details = [], []
    for column in COLUMNS:
        one, other = old.values[column], new.values[column]
        if part and other and column != "files":
            one = {key: value for key, value in one.items() if key in other}
        names = list(one | other)
        unlike = [key for key in names if repr(one.get(key)) != repr(other.get(key))]
        cells.append(f"equal {len(names)}" if names else "-")
        if unlike:
            cells[-1] = f"DIFFERENT {len(unlike)}/{len(names)}"
            first = f"{unlike[0]}: {one.get(unlike[0])} and {other.get(unlike[0])}"
            details.append(f"{column}: {first}{largest_difference(one, other)}")
    return cells, details


def largest_difference(old: dict[Any, Any], new: dict[Any, Any]) -> str:
    """Return the largest relative difference of two sets of numbers in words, or nothing."""
    numbers = [
        (old[key], new[key])
        for key in old
        if isinstance(old[key], int | float) and isinstance(new.get(key), int | float)
    ]
    found = [abs(one - other) / max(abs(one), abs(other), 1e-12) for one, other in numbers]
    return f" (largest relative difference {max(found):.1e})" if found else ""


class Checkout:
    """Runs the cases of one checkout, each once, in a folder below `runs`."""

    def __init__(self, root: Path, runs: Path, old_runs: Path, reuse: bool):
        self.root, self.runs, self.old_runs = root.resolve(), runs, old_runs
        self.reuse = reuse
        self.results: dict[str, Result] = {}

    def run(self, name: str) -> Result:
        """Return the result of a case. A finished run that is found is read if `reuse` is set."""
        if name not in self.results:
            folder, done = self.runs / name, self.runs / name / "done.json"
            flags = self.flags(CASES[name], folder)
            identity = {
                "flags": flags,
                "commit": commit(self.root, "--abbrev=40"),
                "torch": torch.__version__,
            }
            if not (self.reuse and done.is_file() and json.loads(done.read_text()) == identity):
                shutil.rmtree(folder, ignore_errors=True)
                folder.mkdir(parents=True)
                if code := self.start(flags, CASES[name].processes, folder / "output.txt"):
                    last = (folder / "output.txt").read_text().strip().splitlines()[-1:]
                    return self.results.setdefault(name, Result(f"exit code {code}: {last}"))
                done.write_text(json.dumps(identity))
            self.results[name] = read_result(folder)
        return self.results[name]

    def flags(self, case: Case, folder: Path) -> list[str]:
        text = f"{COMMON} {case.flags} --output-dir {folder}"
        if case.resume_at:
            text += f" --resume {find_checkpoint(self.old_runs / case.like, case.resume_at)}"
        return shlex.split(text.format(old=self.old_runs, own=self.runs))

    def start(self, flags: list[str], processes: int, output: Path) -> int:
        """Run main.py with its output in a file and return the exit code."""
        if processes == 1:
            fork = multiprocessing.get_context("fork")
            child = fork.Process(target=run_main, args=(self.root, flags, output))
            child.start()
            child.join()
            return child.exitcode or 0
        launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
        command = [sys.executable, *launcher, "main.py", *flags]
        with output.open("w") as file:
            return subprocess.run(
                command, cwd=self.root, stdout=file, stderr=subprocess.STDOUT
            ).returncode


def run_main(root: Path, flags: list[str], output: Path) -> None:
    """Run `main.py` in a forked process as `python main.py FLAGS` would; print to a file."""
    file = os.open(output, os.O_WRONLY | os.O_CREAT)
    os.dup2(file, 1)
    os.dup2(file, 2)
    os.chdir(root)
    sys.path[0], sys.argv = str(root), ["main.py", *flags]
    runpy.run_path(str(root / "main.py"), run_name="__main__")


def find_checkpoint(folder: Path, updates: int) -> Path:
    """Return the checkpoint in `folder` that was written after so many updates."""
    for path in sorted(folder.glob("checkpoint*.pth")):
        if torch.load(path, map_location="cpu", weights_only=True)["global_step"] == updates:
            return path
    raise SystemExit(f"{folder}: has no checkpoint after {updates} updates")


def read_result(folder: Path) -> Result:
    """Return what a finished run has left in `folder`."""
    lines = select_lines((folder / "output.txt").read_text())
    log, checkpoint = folder / "log.txt", folder / "checkpoint.pth"
    epochs = [json.loads(line) for line in log.read_text().splitlines()] if log.exists() else []
    files = {}
    if checkpoint.is_file():
        content = torch.load(checkpoint, map_location="cpu", weights_only=True)
        files = hash_tensors({key: content[key] for key in CHECKPOINT_KEYS if key in content})
    for path in sorted(folder.glob("cache/*")):
        if path.is_file() and path.suffix not in (".json", ".lock"):
            files[path.name] = hashlib.sha256(path.read_bytes()).hexdigest()
    return Result(
        values={
            "printed lines": {number - len(lines): line for number, line in enumerate(lines)},
            "every update": read_scalars(folder / "tensorboard"),
            "log.txt": {
                (e["epoch"], key): value
                for e in epochs
                for key, value in e.items()
                if not key.endswith(RATES)
            },
            "files": files,
        }
    )


def select_lines(output: str) -> list[str]:
    """Return the lines with a loss or an accuracy, without times and memory."""
    kept = []
    for line in output.splitlines():
        step = re.match(r".*\[\d+/\d+\]  ", line)
        if step:
            parts = line[step.end() :].split("  ")
            parts = [part.strip() for part in parts if not NOT_COMPARED.fullmatch(part.strip())]
            kept += ["  ".join([step[0].strip(), *parts])] if parts else []
        elif line.startswith(("* Acc@1", "Accuracy of the network", "Max accuracy")):
            kept.append(line)
    return kept


def read_scalars(folder: Path) -> dict[tuple[str, int], float]:
    """Return the scalars of TensorBoard by tag and number of images seen."""
    if not folder.is_dir():
        return {}
    events = EventAccumulator(str(folder), size_guidance={"scalars": 0})
    events.Reload()
    tags = [tag for tag in events.Tags()["scalars"] if not tag.endswith(RATES)]
    return {(tag, event.step): event.value for tag in tags for event in events.Scalars(tag)}


def hash_tensors(value: Any, name: str = "") -> dict[str, str]:
    """Return the sha256 of type, shape and bytes of every tensor in nested dicts and lists."""
    if isinstance(value, torch.Tensor):
        tensor = value.detach().contiguous().reshape(-1).view(torch.uint8)
        about = f"{value.dtype} {tuple(value.shape)} ".encode()
        return {name: hashlib.sha256(about + tensor.numpy().tobytes()).hexdigest()}
    if isinstance(value, list | tuple):
        value = dict(enumerate(value))
    found: dict[str, str] = {}
    for key, part in value.items() if isinstance(value, dict) else ():
        found |= hash_tensors(part, f"{name}.{key}" if name else str(key))
    return found


if __name__ == "__main__":
    sys.exit(main())
