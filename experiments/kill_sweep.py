"""Kill runs with SIGKILL at many moments, and compare them with runs that were not interrupted.

    python experiments/kill_sweep.py --points 20 --write results/kill_sweep.md [-- FLAGS of main.py]
    python experiments/kill_sweep.py --points 10 --torchrun-nodes 1

Without --torchrun-nodes the whole run is killed and started again, with 1 and 2 processes, 0 and 2
workers, and accumulation 1 and 2. With it, one of two processes is killed and torchrun starts the
run again, on one node or on two (two torchruns on this machine). Weights, averages, optimizer and
log.txt must be equal to the bit. The exit code is 1 if any differ.
"""

import argparse
import contextlib
import itertools
import json
import os
import random
import re
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

from experiments.about import about  # noqa: E402
from training.checkpointer import MAY_CHANGE  # noqa: E402

FLAGS = (
    "--epochs 2 --batch-size 64 --drop-path 0.2 --warmup-epochs 0 --log-interval 1 --resume auto "
    "--checkpoint-steps 1 --mixup 0.8 --cutmix 1 --reprob 0.25 --repeated-aug"
)
MATCH = (
    "--distillation-type hard --no-teacher-check --match layer_S=4,layer_T=-1,feature=hidden,"
    "loss=hidden_mse,tokens=patch,resize=bilinear,proj=linear"
)
RESTARTED = "--distillation-type none --dist-timeout 2"
SETTINGS = list(itertools.product((0, 2), (1, 2), (1, 2)))  # workers, accumulation, processes
MEASURED = ("time_s", "images_per_s")
START_UP = "start-up"
PAUSE_S = {START_UP: 12.0, "writing": 0.0}  # longest random wait after the moment; 0.1 otherwise
TIMEOUT_S = 600
Reached = Callable[[Path, str, random.Random], bool]  # output folder, printed text, random numbers
MOMENTS: dict[str, Reached] = {
    "start of an epoch": lambda out, text, draw: (
        "Epoch: [2/2] [" in text or (draw.random() < 0.5 and "Epoch: [1/2] [" in text)
    ),
    "middle of an epoch": lambda out, text, draw: f"[{draw.randrange(1, 3)}/2] [4/" in text,
    "evaluation": lambda out, text, draw: text.count("Test") > draw.randrange(0, 12),
    "writing": lambda out, text, draw: (
        text.count("grad_norm") > draw.randrange(0, 8) and any(out.glob(".checkpoint.pth.*.tmp"))
    ),
    START_UP: lambda out, text, draw: True,
}


def start(
    flags: list[str], out: Path, processes: int = 1, launch: Sequence[str] = ()
) -> subprocess.Popen:
    """Start a run into `out`, in a process group of its own; its output goes to `out`.log.

    launch: torchrun's flags; without any, it starts several processes, and no single one.
    """
    launcher = [sys.executable]
    if processes > 1 or launch:
        launcher += ["-m", "torch.distributed.run", f"--nproc_per_node={processes}"]
        launcher += launch or ["--standalone"]
    environ = {k: v for k, v in os.environ.items() if not k.startswith(("SLURM_", "MASTER_"))}
    with open(f"{out}.log", "a") as log:
        return subprocess.Popen(
            [*launcher, str(ROOT / "main.py"), *flags, "--output_dir", str(out)],
            env=environ | {"OMP_NUM_THREADS": "1"},
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )


def finish(flags: list[str], out: Path, processes: int = 1) -> str:
    """Run to the end; return what all runs into `out` have printed. Raises RuntimeError."""
    code = start(flags, out, processes).wait(TIMEOUT_S)
    text = Path(f"{out}.log").read_text()
    if code:
        raise RuntimeError(f"exit code {code}: {text}")
    return text


def children(parent: int) -> list[int]:
    """Return the processes that `parent` has started, the first one first."""
    found = subprocess.run(["pgrep", "-P", str(parent)], capture_output=True, text=True)
    return sorted(map(int, found.stdout.split()))


def kill(process: subprocess.Popen) -> None:
    """Kill a run and all its processes; torchrun's are in sessions of their own."""
    ids = [process.pid]
    for parent in ids:
        ids += children(parent)
    for number in ids:
        with contextlib.suppress(ProcessLookupError):
            os.kill(number, signal.SIGKILL)
    process.wait()


def differences(a: Any, b: Any, place: str = "") -> Iterator[str]:
    """Yield the keys at which two checkpoints differ, to the bit."""
    if isinstance(a, dict) and isinstance(b, dict) and a.keys() == b.keys():
        for key in a:
            yield from differences(a[key], b[key], f"{place}.{key}")
    elif isinstance(a, list | tuple) and isinstance(b, list | tuple) and len(a) == len(b):
        for i, (x, y) in enumerate(zip(a, b)):
            yield from differences(x, y, f"{place}.{i}")
    elif not (torch.equal(a, b) if isinstance(a, Tensor) else a == b):
        yield place


def compare_runs(one: Path, other: Path) -> list[str]:
    """Return where checkpoint and log of two runs differ, except settings that may change."""
    saved = [torch.load(folder / "checkpoint.pth", weights_only=True) for folder in (one, other)]
    free = {f".args.{name}" for name in MAY_CHANGE} | {".outline"}
    found = [place for place in differences(*saved) if place not in free]
    return found + ["log.txt"] * (read_log(one) != read_log(other))


def read_log(folder: Path) -> list[dict[str, Any]]:
    """Return the epochs in log.txt, without what is measured with a clock."""
    epochs = [json.loads(line) for line in (folder / "log.txt").open()]
    return [{key: epoch[key] for key in epoch if key not in MEASURED} for epoch in epochs]


def verdict(whole: Path, out: Path) -> str:
    """Return "identical", or where the run in `out` differs from the uninterrupted one."""
    found = compare_runs(whole, out)
    epochs = [json.loads(line)["epoch"] for line in (out / "log.txt").open()]
    found += ["an epoch is logged twice"] * (len(set(epochs)) != len(epochs))
    return ", ".join(found[:3]) or "identical"


def wait_for(moment: str, process: subprocess.Popen, out: Path, draw: random.Random) -> None:
    """Wait until the run has reached the moment, then for a random pause."""
    seed = draw.random()
    while not MOMENTS[moment](out, Path(f"{out}.log").read_text(), random.Random(seed)):
        if process.poll() is not None:
            break
        time.sleep(0 if moment == "writing" else 0.005)
    time.sleep(PAUSE_S.get(moment, 0.1) * draw.random())


def last_line(out: Path) -> str:
    """Return the last step that a run has printed."""
    lines = [x for x in Path(f"{out}.log").read_text().splitlines() if x[:5] in ("Epoch", "Test:")]
    return " ".join(lines[-1].split("  ")[0].split()) if lines else "before the first step"


class Sweep:
    """The runs of a sweep, in one folder; uninterrupted ones run once for each setting."""

    def __init__(self, folder: Path, more: list[str]) -> None:
        self.folder, self.more, self.wholes = folder, more, {}

    def whole(self, flags: list[str], processes: int) -> Path:
        """Return the folder of the uninterrupted run."""
        key = shlex.join([str(processes), *flags])
        if key not in self.wholes:
            self.wholes[key] = self.folder / f"whole{len(self.wholes)}"
            finish(flags, self.wholes[key], processes)
        return self.wholes[key]

    def killed(self, point: int) -> list[object]:
        """Kill a whole run and start it again; return the row of the table."""
        workers, accumulation, processes = SETTINGS[(point + point // 8) % 8]  # shifts: all pairs
        moment, out = list(MOMENTS)[point % 4], self.folder / f"killed{point}"
        text = f"{FLAGS} {MATCH} --num_workers {workers} --grad-accum-steps {accumulation}"
        flags = [*text.split(), "--batch-size", str(64 // processes), *self.more]
        whole, draw = self.whole(flags, processes), random.Random(point)
        while True:
            process = start(flags, out, processes)
            wait_for(moment, process, out, draw)
            kill(process)
            last = last_line(out)
            resumed = finish(flags, out, processes).rsplit("resume: ", 1)[1].splitlines()[0]
            resumed = resumed.split(".pth, ")[-1]
            if not resumed.startswith("epoch 2, step 0"):
                setting = f"{workers} workers, accumulation {accumulation}, {processes} processes"
                return [setting, moment, f"{last}; {resumed}", verdict(whole, out)]
            remove(out)  # it had already finished: kill another one

    def restarted(self, point: int, nodes: int) -> list[object]:
        """Kill one of two processes until torchrun has noticed it; return the row of the table."""
        moment = [START_UP, *list(MOMENTS)[:-1]][point % 5]
        workers, out = (0, 2)[point // 5 % 2], self.folder / f"restarted{point}"
        flags = [*f"{FLAGS} {RESTARTED} --num_workers {workers}".split(), *self.more]
        whole, draw = self.whole(flags, 2), random.Random(f"{point} of {nodes}")
        while True:
            last, result = self.kill_one(flags, out, nodes, moment, draw)
            result = result or verdict(whole, out)
            text = Path(f"{out}.log").read_text()
            if "exitcode: -9" in text or result != "identical":
                starts = text.count("processes: 2 processes")
                return [f"{workers} workers", moment, f"{last}; {starts} starts", result]
            remove(out)

    def kill_one(
        self, flags: list[str], out: Path, nodes: int, moment: str, draw: random.Random
    ) -> tuple[str, str]:
        """Kill one process; return the last line before it, and what failed or ""."""
        launch = ["--max-restarts=3"]
        if nodes > 1:
            port = draw.randrange(29600, 30600)
            launch += ["--nnodes=2", "--rdzv-backend=c10d", "--rdzv-id=run"]
            launch += [f"--rdzv-endpoint=localhost:{port}"]
        agents = [start(flags, out, 2 // nodes, launch) for _ in range(nodes)]
        ranks: list[int] = []
        while len(ranks) < 2 and all(agent.poll() is None for agent in agents):
            ranks = [pid for agent in agents for pid in children(agent.pid)]
            time.sleep(0.01)
        wait_for(moment, agents[0], out, draw)
        with contextlib.suppress(ProcessLookupError, IndexError):
            os.kill(ranks[draw.randrange(2)], signal.SIGKILL)
        last = last_line(out)
        try:
            codes = {agent.wait(TIMEOUT_S) for agent in agents}
            failure = f"exit codes {codes}" if codes != {0} else ""
        except subprocess.TimeoutExpired:
            failure = f"hangs for {TIMEOUT_S} s"
        for agent in agents:
            kill(agent)
        return last, failure


def remove(out: Path) -> None:
    """Remove the folder and the log of a run."""
    shutil.rmtree(out)
    Path(f"{out}.log").unlink()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--points", type=int, default=20)
    parser.add_argument("--torchrun-nodes", type=int, choices=(1, 2), help="restarted by torchrun")
    parser.add_argument("--write", type=Path, help="Markdown file for the table")
    parser.add_argument("more", nargs="*", metavar="FLAGS", help="of every run, after --")
    args = parser.parse_args()
    rows: list[list[object]] = []
    with tempfile.TemporaryDirectory() as folder:
        sweep = Sweep(Path(folder), args.more)
        for point in range(args.points):
            nodes = args.torchrun_nodes
            row = sweep.restarted(point, nodes) if nodes else sweep.killed(point)
            rows.append([point + 1, *row])
            print(*rows[-1], sep=" | ", flush=True)
            if args.write:  # after each point, so that an interrupted sweep leaves its rows
                args.write.write_text(report(rows))
    print(report(rows).splitlines()[2])
    return int(any(row[-1] != "identical" for row in rows))


def report(rows: list[list[object]]) -> str:
    """Return the Markdown page of the sweep."""
    good = sum(row[-1] == "identical" for row in rows)
    lines = [
        "# Runs killed at many moments and resumed",
        "",
        f"{good} of {len(rows)} killed runs are identical to the uninterrupted one: weights, "
        "averages, optimizer, counters and log.txt, to the bit.",
        "",
        *about(),
        "",
        "| point | setting | killed in | last line; continued from | result |",
        "|---|---|---|---|---|",
        *(f"| {' | '.join(map(_cell, row))} |" for row in rows),
        "",
    ]
    return "\n".join(lines)


def _cell(value: object) -> str:
    """Return a cell of the table; in a code span, `[1/2] [2/12]` is not a link."""
    return re.sub(r"\[\d+/\d+\] \[\d+/\d+\]", r"`\g<0>`", str(value))


if __name__ == "__main__":
    sys.exit(main())
