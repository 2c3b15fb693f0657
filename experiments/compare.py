"""Run several recipes over several seeds and write the table of mean ± standard deviation.

    python experiments/compare.py --seeds 0 1 2 3 4 --write results/quickstart.md \\
        --row "none: --distillation-type none" --row "hard: --distillation-type hard" \\
        -- --epochs 30

Each row is `NAME: FLAGS` of main.py; what follows `--` goes to every run. The number in the table
is the accuracy after the last epoch, never the best one seen on the way. Runs that are already
complete under --runs are read, not repeated. One thread per run; --jobs of them at a time.
"""

import argparse
import json
import os
import platform
import shlex
import statistics
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--row", action="append", required=True, metavar="'NAME: FLAGS'")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads of each run")
    parser.add_argument("--runs", type=Path, default=ROOT / "runs" / "compare")
    parser.add_argument("--write", type=Path, help="Markdown file for the table")
    parser.add_argument("common", nargs="*", help="flags for every run, after --")
    args = parser.parse_args()

    rows = [
        (name.strip(), shlex.split(flags))
        for name, _, flags in (row.partition(":") for row in args.row)
    ]
    jobs = [(name, seed, flags) for seed in args.seeds for name, flags in rows]
    with ThreadPoolExecutor(args.jobs) as pool:
        logs = list(
            pool.map(
                lambda job: one_run(
                    args.runs / job[0] / f"seed{job[1]}", job[1], args.common + job[2], args.threads
                ),
                jobs,
            )
        )
    found: dict[str, list[dict]] = {name: [] for name, _ in rows}
    for (name, _, _), log in zip(jobs, logs):
        found[name].append(log)
    text = table(rows, found, args)
    print(text)
    if args.write:
        args.write.parent.mkdir(parents=True, exist_ok=True)
        args.write.write_text(text)
    return 0


def one_run(folder: Path, seed: int, flags: list[str], threads: int) -> dict:
    """Run main.py once; return the last line of its log.txt."""
    command = [
        sys.executable,
        str(ROOT / "main.py"),
        *flags,
        "--seed",
        str(seed),
        "--output_dir",
        str(folder),
    ]
    if run_once(folder, command, threads):
        print(f"{folder.parent.name} seed {seed}: done", file=sys.stderr, flush=True)
    return json.loads((folder / "log.txt").read_text().splitlines()[-1])


def run_once(folder: Path, command: list[str], threads: int) -> bool:
    """Run a Python program, unless `folder` has it complete already; return whether it ran."""
    done, words = folder / "command.txt", shlex.join(command[2:])
    if done.exists() and done.read_text() == words:
        return False
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "stdout.txt").open("w") as out:
        result = subprocess.run(
            command,
            stdout=out,
            stderr=subprocess.STDOUT,
            env=os.environ | {"OMP_NUM_THREADS": str(threads)},
        )
    if result.returncode:
        raise SystemExit(f"failed: {shlex.join(command)}\nsee {folder / 'stdout.txt'}")
    done.write_text(words)
    return True


def table(rows: list, found: dict[str, list[dict]], args: argparse.Namespace) -> str:
    import timm
    import torch

    lines = ["| run | top-1, % | EMA top-1, % | train loss | flags |", "|---|---|---|---|---|"]
    for name, flags in rows:
        cells = [
            spread([log.get(key) for log in found[name]])
            for key in ("test_acc1", "ema_acc1", "train_loss")
        ]
        lines.append(f"| {name} | " + " | ".join(cells) + f" | `{shlex.join(flags)}` |")
    rows_again = " ".join(f'--row "{name}: {shlex.join(flags)}"' for name, flags in rows)
    command = f"python experiments/compare.py --seeds {' '.join(map(str, args.seeds))} {rows_again}"
    command += f" -- {shlex.join(args.common)}" if args.common else ""
    return "\n".join(
        [
            *lines,
            "",
            f"Mean ± sample standard deviation over {len(args.seeds)} seeds, after the last epoch.",
            "",
            "```",
            command,
            "```",
            "",
            f"Commit {commit()}, torch {torch.__version__.split('+')[0]}, timm {timm.__version__}, "
            f"{platform.machine()}, {args.threads} CPU thread(s) per run.",
            "",
        ]
    )


def spread(values: list[float | None]) -> str:
    known = [value for value in values if value is not None]
    if not known:
        return "–"
    deviation = statistics.stdev(known) if len(known) > 1 else 0.0
    return f"{statistics.mean(known):.2f} ± {deviation:.2f}"


def commit() -> str:
    answer = subprocess.run(
        ["git", "describe", "--always", "--dirty"], cwd=ROOT, capture_output=True, text=True
    )
    return answer.stdout.strip() or "unknown"


if __name__ == "__main__":
    sys.exit(main())
