"""Compare the objectives on one image folder: a row each, several seeds, one budget.

    python experiments/compare_objectives.py --data CIFAR --write results/objectives_cifar10.md

Trains the CNN teacher once (resnet_pico, on the same images), then the students through compare.py,
which writes the table with the command of every row. Complete runs under --runs are not repeated.
Flags after `--` are passed to every student's run.
"""

import argparse
import shlex
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
STUDENT, TEACHER = "deit_pico_distilled_patch8_32", "resnet_pico"
# Few images and few updates: crops and mirrors alone, and a learning rate for small models.
RECIPE = (
    "--unscale-lr --lr 2e-3 --warmup-epochs 2 --no-repeated-aug --aa none --color-jitter 0 "
    "--reprob 0 --mixup 0 --cutmix 0 --drop-path 0 --num-workers 0"
)
HARD = "--distillation-type hard"
SOFT = "--distillation-type soft --distillation-tau 3"
ROWS = {
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
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--data", required=True, help="image folder")
    parser.add_argument("--data-set", default="CIFAR10", help="CIFAR10: with train/ and test/")
    parser.add_argument("--epochs", type=int, default=20, help="of the students")
    parser.add_argument("--teacher-epochs", type=int, default=30)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time")
    parser.add_argument("--runs", type=Path, default=ROOT / "runs" / "objectives")
    parser.add_argument("--write", type=Path, help="Markdown file for the table")
    parser.add_argument("common", nargs="*", help="flags for every student, after --")
    args = parser.parse_args()

    recipe = ["--data-set", args.data_set, "--data-path", args.data, *shlex.split(RECIPE)]
    recipe += ["--batch-size", str(args.batch_size)]
    teacher = args.runs / "teacher" / "checkpoint.pth"
    if not teacher.exists():
        subprocess.run(
            [
                sys.executable,
                str(ROOT / "main.py"),
                "--model",
                TEACHER,
                *recipe,
                "--epochs",
                str(args.teacher_epochs),
                "--output_dir",
                str(teacher.parent),
            ],
            check=True,
        )
    rows = [word for name, flags in ROWS.items() for word in ("--row", f"{name}: {flags}")]
    write = ["--write", str(args.write)] if args.write else []
    common = ["--model", STUDENT, "--teacher-model", TEACHER, "--teacher-path", str(teacher)]
    common += ["--no-teacher-check", *recipe, "--epochs", str(args.epochs), *args.common]
    return subprocess.run(
        [
            sys.executable,
            str(ROOT / "tools" / "compare.py"),
            "--jobs",
            str(args.jobs),
            "--runs",
            str(args.runs),
            *write,
            *rows,
            "--seeds",
            *map(str, args.seeds),
            "--",
            *common,
        ]
    ).returncode


if __name__ == "__main__":
    sys.exit(main())
