"""Kill runs with SIGKILL at many moments, resume them, and compare with runs left alone.

    python experiments/kill_sweep.py --points 20 --write results/kill_sweep.md [-- FLAGS of main.py]

Each point takes the next of eight settings (workers 0 and 2, accumulation 1 and 2, 1 and 2
processes) and the next of four moments: the start of an epoch, its middle, evaluation, and the
writing of a checkpoint. Weights, average, optimizer and log.txt must be the same to the bit. Ends
with exit code 1 if any is not. Mixing, erasing, stochastic depth, repeated augmentation, the
average and a projection are on; FLAGS may add more.
"""

import argparse
import contextlib
import itertools
import json
import os
import platform
import random
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from training.checkpointer import MAY_CHANGE  # noqa: E402

PLAIN = [
    "--epochs",
    "2",
    "--batch-size",
    "64",
    "--drop-path",
    "0.2",
    "--warmup-epochs",
    "0",
    "--log-interval",
    "1",
    "--resume",
    "auto",
    "--checkpoint-steps",
    "1",
    "--mixup",
    "0.8",
    "--cutmix",
    "1",
    "--reprob",
    "0.25",
    "--repeated-aug",
]
FLAGS = [
    *PLAIN,
    "--distillation-type",
    "hard",
    "--no-teacher-check",
    "--match",
    "layer_S=4,layer_T=-1,feature=hidden,loss=hidden_mse,tokens=patch,resize=bilinear,proj=linear",
]
SETTINGS = list(itertools.product((0, 2), (1, 2), (1, 2)))  # workers, accumulation, processes
MOMENTS: dict[str, Callable[[Path, str, random.Random], bool]] = {
    "start of an epoch": lambda out, said, dice: (
        "Epoch: [2/2] [" in said or (dice.random() < 0.5 and "Epoch: [1/2] [" in said)
    ),
    "middle of an epoch": lambda out, said, dice: f"[{dice.randrange(1, 3)}/2] [4/" in said,
    "evaluation": lambda out, said, dice: said.count("Test") > dice.randrange(0, 12),
    "writing": lambda out, said, dice: (
        said.count("grad_norm") > dice.randrange(0, 8) and any(out.glob(".checkpoint.pth.*.tmp"))
    ),
}


def start(
    flags: list[str], out: Path, processes: int = 1, launch: Sequence[str] = ()
) -> subprocess.Popen:
    """Start a run into `out`, in a process group of its own; what it says goes to `out`.log.

    launch: torchrun's flags; without any, it starts several processes, and no single one.
    """
    launcher = [sys.executable]
    if processes > 1 or launch:
        launcher += [
            "-m",
            "torch.distributed.run",
            f"--nproc_per_node={processes}",
            *(launch or ["--standalone"]),
        ]
    environ = {k: v for k, v in os.environ.items() if not k.startswith(("SLURM_", "MASTER_"))}
    environ["OMP_NUM_THREADS"] = "1"
    with open(f"{out}.log", "a") as log:
        return subprocess.Popen(
            [*launcher, str(ROOT / "main.py"), *flags, "--output_dir", str(out)],
            env=environ,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )


def finish(flags: list[str], out: Path, processes: int = 1) -> str:
    """Run to the end; return what all starts into `out` have said. Raises RuntimeError."""
    code = start(flags, out, processes).wait(600)
    said = Path(f"{out}.log").read_text()
    if code:
        raise RuntimeError(f"exit code {code}: {said}")
    return said


def children(parent: int) -> list[int]:
    """Return the processes that `parent` has started, the first one first."""
    found = subprocess.run(["pgrep", "-P", str(parent)], capture_output=True, text=True)
    return sorted(map(int, found.stdout.split()))


def kill(process: subprocess.Popen) -> None:
    """Kill a run and all that it started; torchrun's processes are in sessions of their own."""
    ids = [process.pid]
    for parent in ids:
        ids += children(parent)
    for number in ids:
        with contextlib.suppress(ProcessLookupError):
            os.kill(number, signal.SIGKILL)
    process.wait()


def differences(a: Any, b: Any, place: str = "") -> Iterator[str]:
    """Yield where two checkpoints differ, to the bit."""
    if isinstance(a, dict) and isinstance(b, dict) and a.keys() == b.keys():
        for key in a:
            yield from differences(a[key], b[key], f"{place}.{key}")
    elif isinstance(a, list | tuple) and isinstance(b, list | tuple) and len(a) == len(b):
        for i, (x, y) in enumerate(zip(a, b)):
            yield from differences(x, y, f"{place}.{i}")
    elif not (torch.equal(a, b) if isinstance(a, Tensor) else a == b):
        yield place


def compare_runs(one: Path, other: Path) -> list[str]:
    """Return where two runs differ in checkpoint and log, but for settings that may change."""
    saved = [torch.load(folder / "checkpoint.pth", weights_only=True) for folder in (one, other)]
    free = {f".args.{name}" for name in MAY_CHANGE} | {".outline"}  # which knows them too
    found = [place for place in differences(*saved) if place not in free]
    return found + ["log.txt"] * ((one / "log.txt").read_text() != (other / "log.txt").read_text())


def verdict(whole: Path, out: Path) -> str:
    """Return "identical", or in what the run in `out` differs from the one left alone."""
    found = compare_runs(whole, out)
    epochs = [json.loads(line)["epoch"] for line in (out / "log.txt").open()]
    found += ["an epoch comes twice"] * (len(set(epochs)) != len(epochs))
    return ", ".join(found[:3]) or "identical"


def wait_for(
    moment: str, process: subprocess.Popen, out: Path, dice: random.Random, pause_s: float = 0.1
) -> None:
    """Wait until the run has come to the moment, and a random part of a pause longer."""
    reached, seed = MOMENTS[moment], dice.random()
    log = Path(f"{out}.log")
    while not reached(out, log.read_text(), random.Random(seed)):
        if process.poll() is not None:
            break
        time.sleep(0 if moment == "writing" else 0.005)
    if moment != "writing":
        time.sleep(pause_s * dice.random())


def last_line(out: Path) -> str:
    """Return the last step that a run has printed."""
    said = Path(f"{out}.log").read_text().splitlines()
    lines = [line for line in said if line[:5] in ("Epoch", "Test:", "Test ")]
    return " ".join(lines[-1].split("  ")[0].split()) if lines else "before the first step"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--points", type=int, default=20)
    parser.add_argument("--write", type=Path, help="Markdown file for the table")
    own = sys.argv[1 : sys.argv.index("--")] if "--" in sys.argv else sys.argv[1:]
    request = parser.parse_args(own)
    more = sys.argv[len(own) + 2 :]
    rows, bad = [], 0
    with tempfile.TemporaryDirectory() as place:
        wholes: dict[tuple[int, int, int], Path] = {}
        for point in range(request.points):
            # 8 settings and 4 moments: shift by one each round, so that all pairs come
            setting = SETTINGS[(point + point // 8) % 8]
            moment = list(MOMENTS)[point % 4]
            workers, accumulation, processes = setting
            flags = [
                *FLAGS,
                "--num_workers",
                str(workers),
                "--grad-accum-steps",
                str(accumulation),
                "--batch-size",
                str(64 // processes),
                *more,
            ]
            if setting not in wholes:
                wholes[setting] = Path(place, f"whole{len(wholes)}")
                finish(flags, wholes[setting], processes)
            out = Path(place, f"killed{point}")
            dice = random.Random(point)
            while True:
                process = start(flags, out, processes)
                wait_for(moment, process, out, dice)
                kill(process)
                last = last_line(out)
                said = finish(flags, out, processes)
                resumed = said.rsplit("resume: ", 1)[1].splitlines()[0].split(".pth, ")[-1]
                if not resumed.startswith("epoch 2, step 0"):
                    break
                shutil.rmtree(out)  # nothing was left to do: draw again
                Path(f"{out}.log").unlink()
            result = verdict(wholes[setting], out)
            bad += result != "identical"
            row = [point + 1, *setting, moment, last, resumed, result]
            rows.append(f"| {' | '.join(map(str, row))} |")
            print(rows[-1], flush=True)
    text = report(rows, bad, more)
    if request.write:
        request.write.write_text(text)
    print(text.splitlines()[2])
    return int(bad > 0)


def report(rows: list[str], bad: int, more: list[str]) -> str:
    """Return the Markdown page of the sweep."""
    return "\n".join(
        [
            "# Runs killed at many moments and resumed",
            "",
            f"{len(rows) - bad} of {len(rows)} killed and resumed runs are identical to the "
            "uninterrupted one: weights, average, optimizer, counters and log.txt, to the bit.",
            "",
            provenance(),
            f"Flags of the runs: `{shlex.join([*FLAGS, *more])}`.",
            "",
            "| point | workers | accumulation | processes | killed in | last line | went on from | "
            "result |",
            "|---|---|---|---|---|---|---|---|",
            *rows,
            "",
        ]
    )


def provenance() -> str:
    """Return the command of this program, the commit and the kind of machine."""
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True
    ).stdout.strip()
    program = Path(sys.argv[0]).resolve().relative_to(ROOT)
    command = shlex.join(["python", str(program), *sys.argv[1:]])
    return (
        f"Command: `{command}`; commit {commit}; {os.cpu_count()} CPU cores "
        f"({platform.machine()}), Python {platform.python_version()}, torch "
        f"{torch.__version__}."
    )


if __name__ == "__main__":
    sys.exit(main())
