"""Train several recipes with several seeds; write the table of mean ± standard deviation.

    python experiments/compare.py --seeds 0 1 2 --write results/quickstart.md \\
        --row "none: --distillation-type none" --row "hard: --distillation-type hard" \\
        -- --epochs 30
    python experiments/compare.py --rows objectives -- --data-set CIFAR10 --data-path CIFAR

Each row is `NAME: FLAGS` of main.py; flags after `--` go to every run. --rows takes the rows from
`SETS` below; the teacher of a set is trained first. In flags, {runs} is the folder of --runs and
{seed} the seed. The accuracy is that after the last epoch, never the best one. Complete runs in
--runs are read, not repeated. Each run uses one thread; --jobs of them run at a time.
"""

import argparse
import json
import os
import shlex
import statistics
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from experiments.about import about  # noqa: E402

# For few images and few updates: crops and mirrors alone, and a learning rate for small models
RECIPE = (
    "--unscale-lr --lr 2e-3 --warmup-epochs 2 --no-repeated-aug --aa none --color-jitter 0 "
    "--reprob 0 --mixup 0 --cutmix 0 --drop-path 0 --num-workers 0 --batch-size 64"
)
TEACHER = f"--model resnet_pico {RECIPE} --epochs 30"
STUDENT = (
    f"--model deit_pico_distilled_patch8_32 {RECIPE} --epochs 20 --teacher-model resnet_pico "
    "--teacher-path {runs}/teacher/seed0/checkpoint.pth --no-teacher-check"
)
HARD = "--distillation-type hard"
SOFT = "--distillation-type soft --distillation-tau 3"
CACHE = HARD + " --teacher-cache {{runs}}/logits{0}_{{seed}} --teacher-cache-views {0}"
SETS = {
    "objectives": {
        "none": "--distillation-type none",
        "soft numel": SOFT,
        "soft batchmean": f"{SOFT} --distillation-reduction batchmean",
        "hard": HARD,
        "hard + hidden": f"{HARD} --match layer_S=4,layer_T=-1,feature=hidden,loss=hidden_mse,"
        "tokens=patch,resize=bilinear,proj=linear",
        "hard + ranking": f"{HARD} --ranking-kl-weight 1 --ranking-tau 0.1",
        "hard + VkD": f"{HARD} --match feature=pooled,loss=vkd,proj=orthogonal",
        "DIST": "--distillation-type soft --kd-loss-type dist",
        "soft batchmean standardised": f"{SOFT} --distillation-reduction batchmean "
        "--logit-standardization",
    },
    "views": {  # give each row the epochs that fit into the time of the live run
        "live": HARD,
        "none": "--distillation-type none",
        **{f"{views} views": CACHE.format(views) for views in (1, 4, 16)},
    },
}


def main() -> int:
    args = _parser().parse_args()
    rows = dict(SETS.get(args.rows, {}))
    for row in args.row:
        name, _, flags = row.partition(":")
        rows[name.strip()] = flags.strip()
    if not rows:
        raise SystemExit("give --rows, or --row for each row")
    common = [*STUDENT.split(), *args.common] if args.rows else args.common
    if args.rows:
        one_run(args, "teacher", 0, [*TEACHER.split(), *args.common])
    jobs = [(name, seed) for seed in args.seeds for name in rows]
    with ThreadPoolExecutor(args.jobs) as pool:
        logs = list(
            pool.map(lambda job: one_run(args, *job, common + shlex.split(rows[job[0]])), jobs)
        )
    found = {name: [log for (own, _), log in zip(jobs, logs) if own == name] for name in rows}
    seeds = f"Mean ± sample standard deviation over {len(args.seeds)} seeds, after the last epoch."
    text = "\n".join([*table(rows, found), "", seeds, "", *about(), ""])
    print(text)
    if args.write:
        args.write.parent.mkdir(parents=True, exist_ok=True)
        args.write.write_text(text)
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("--row", action="append", default=[], metavar="'NAME: FLAGS'")
    add("--rows", choices=SETS, help="rows of `SETS`")
    add("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    add("--jobs", type=int, default=2, help="runs at a time")
    add("--runs", type=Path, default=ROOT / "runs" / "compare")
    add("--write", type=Path, help="Markdown file for the table")
    add("common", nargs="*", help="flags for every run, after --")
    return parser


def one_run(args: argparse.Namespace, name: str, seed: int, flags: list[str]) -> dict:
    """Run main.py, unless it is complete in its folder; return the last line of its log.txt."""
    folder = args.runs / name / f"seed{seed}"
    for name_, value in {"{runs}": args.runs, "{seed}": seed}.items():
        flags = [word.replace(name_, str(value)) for word in flags]
    command = [str(ROOT / "main.py"), *flags, "--seed", str(seed), "--output_dir", str(folder)]
    done, words = folder / "command.txt", shlex.join(command[1:])
    if not done.exists() or done.read_text() != words:
        folder.mkdir(parents=True, exist_ok=True)
        with (folder / "stdout.txt").open("w") as out:
            result = subprocess.run(
                [sys.executable, *command],
                stdout=out,
                stderr=subprocess.STDOUT,
                env=os.environ | {"OMP_NUM_THREADS": "1"},
            )
        if result.returncode:
            raise SystemExit(f"failed: {words}\nsee {folder / 'stdout.txt'}")
        done.write_text(words)
        print(f"{name} seed {seed}: done", file=sys.stderr, flush=True)
    return json.loads((folder / "log.txt").read_text().splitlines()[-1])


def table(rows: dict[str, str], found: dict[str, list[dict]]) -> list[str]:
    """Return the lines of the table. found: the last lines of the logs, by row."""
    lines = ["| run | top-1, % | EMA top-1, % | train loss | flags |", "|---|---|---|---|---|"]
    for name, flags in rows.items():
        cells = [
            spread([log.get(key) for log in found[name]])
            for key in ("test_acc1", "ema_acc1", "train_loss")
        ]
        lines.append(f"| {name} | " + " | ".join(cells) + f" | `{flags}` |")
    return lines


def spread(values: list[float | None]) -> str:
    """Return the mean and the deviation of the values that are known, or a dash."""
    known = [value for value in values if value is not None]
    if not known:
        return "–"
    deviation = statistics.stdev(known) if len(known) > 1 else 0.0
    return f"{statistics.mean(known):.2f} ± {deviation:.2f}"


if __name__ == "__main__":
    sys.exit(main())
