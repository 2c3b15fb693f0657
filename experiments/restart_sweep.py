"""Kill one of two processes under `torchrun --max-restarts`, and compare with a run left alone.

    python experiments/restart_sweep.py --points 10 5 --write results/restart_sweep.md

The process, the moment (start-up, the start and the middle of an epoch, evaluation, the writing of
a checkpoint) and the second within it are drawn. Nobody starts the run again: torchrun must, and
weights, average, optimizer and log.txt must be the same to the bit. All this on one node, then on
two, which are two torchruns on this machine. Ends with exit code 1 if any run is not the same.
"""

import argparse
import contextlib
import os
import random
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from experiments import kill_sweep  # noqa: E402

FLAGS = [*kill_sweep.PLAIN, "--distillation-type", "none", "--dist-timeout", "2"]
NODES = {
    1: ["--max-restarts=3"],
    2: [
        "--max-restarts=3",
        "--nnodes=2",
        "--rdzv-backend=c10d",
        "--rdzv-id=run",
        "--rdzv-endpoint=localhost:{port}",
    ],
}
START_UP = "start-up"
START_UP_S = 12  # about as long as two processes need to their first step
HANGS_S = 600
kill_sweep.MOMENTS[START_UP] = lambda out, said, dice: True


def restart(point: int, nodes: int, flags: list[str], whole: Path, out: Path) -> list[object]:
    """Kill a process of a run; return what was killed, when, how often it started, the result.

    A kill for which the run was too fast is drawn again: torchrun must have seen its process die.
    """
    moment = [START_UP, *list(kill_sweep.MOMENTS)[:-1]][point % 5]
    dice = random.Random(f"{point} of {nodes}")
    while True:
        number, last, result = kill_one(moment, nodes, flags, whole, out, dice)
        said = Path(f"{out}.log").read_text()
        if "exitcode: -9" in said or result != "identical":
            return [number + 1, moment, last, said.count("processes: 2 processes"), result]
        shutil.rmtree(out)
        Path(f"{out}.log").unlink()


def kill_one(
    moment: str, nodes: int, flags: list[str], whole: Path, out: Path, dice: random.Random
) -> tuple[int, str, str]:
    """Run once with a kill; return which process, the last line before it, and the result."""
    launch = [word.format(port=dice.randrange(29600, 30600)) for word in NODES[nodes]]
    agents = [kill_sweep.start(flags, out, 2 // nodes, launch) for _ in range(nodes)]
    number, last = dice.randrange(2), ""
    while len(ranks := [pid for agent in agents for pid in kill_sweep.children(agent.pid)]) < 2:
        time.sleep(0.01)
        if any(agent.poll() is not None for agent in agents):
            break
    else:
        kill_sweep.wait_for(moment, agents[0], out, dice, START_UP_S if moment == START_UP else 0.1)
        with contextlib.suppress(ProcessLookupError):
            os.kill(ranks[number], signal.SIGKILL)
        last = kill_sweep.last_line(out)
    try:
        codes = {agent.wait(HANGS_S) for agent in agents}
        result = f"exit codes {codes}" if codes != {0} else kill_sweep.verdict(whole, out)
    except subprocess.TimeoutExpired:
        result = f"hangs for {HANGS_S} s"
    for agent in agents:
        kill_sweep.kill(agent)
    return number, last, result


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument(
        "--points", type=int, nargs=2, default=(10, 5), help="kills, on one node and on two"
    )
    parser.add_argument("--write", type=Path, help="Markdown file for the table")
    request = parser.parse_args()
    rows = []
    with tempfile.TemporaryDirectory() as place:
        wholes = {workers: Path(place, f"whole{workers}") for workers in (0, 2)}
        for workers, whole in wholes.items():
            kill_sweep.finish([*FLAGS, "--num_workers", str(workers)], whole, 2)
        for nodes, points in zip(NODES, request.points):
            for point in range(points):
                workers = (0, 2)[point // 5 % 2]
                found = restart(
                    point,
                    nodes,
                    [*FLAGS, "--num_workers", str(workers)],
                    wholes[workers],
                    Path(place, f"killed{nodes}-{point}"),
                )
                rows.append([nodes, point + 1, workers, *found])
                print(*rows[-1], sep=" | ", flush=True)
                if request.write:  # each time, should somebody not wait for the rest
                    request.write.write_text(report(rows, sum(request.points)))
    print(report(rows, sum(request.points)).splitlines()[2])
    return int(any(row[-1] != "identical" for row in rows))


def report(rows: list[list[object]], points: int) -> str:
    """Return the Markdown page of the sweep, of which `points` kills were asked for."""
    good = sum(row[-1] == "identical" for row in rows)
    return "\n".join(
        [
            "# One of two processes killed under torchrun",
            "",
            f"{good} of {len(rows)} runs went on by themselves and are identical to the "
            "uninterrupted one: weights, average, optimizer, counters and log.txt, to the bit."
            + f" ({points} were asked for.)"
            * (len(rows) < points),
            "",
            kill_sweep.provenance(),
            "Two nodes are two torchruns on this machine. torchrun's flags:",
            "",
            *(
                f"- {nodes}: `torchrun --nproc_per_node={2 // nodes} {shlex.join(launch)}`"
                for nodes, launch in NODES.items()
            ),
            "",
            f"Flags of the runs: `{shlex.join(FLAGS)}`.",
            "",
            "| nodes | point | workers | killed process | in | last line | starts | result |",
            "|---|---|---|---|---|---|---|---|",
            *(f"| {' | '.join(map(str, row))} |" for row in rows),
            "",
        ]
    )


if __name__ == "__main__":
    sys.exit(main())
