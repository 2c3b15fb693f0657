"""Take the weights out of a run's checkpoint, as a safetensors file anyone can load.

    python tools/export.py runs/teacher/checkpoint.pth teacher.safetensors --half

`--key model_ema` takes the moving average. The file loads with --resume (--eval), --finetune and
--teacher-path.
"""

import argparse
import sys
from pathlib import Path

from safetensors.torch import save_file

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from errors import UserError  # noqa: E402
from models.loading import read_weights  # noqa: E402


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("checkpoint")
    parser.add_argument("out", type=Path)
    parser.add_argument("--key", help="model (default) or model_ema")
    parser.add_argument("--half", action="store_true", help="store float32 as float16")
    args = parser.parse_args()
    try:
        weights = read_weights(args.checkpoint, args.key)
    except UserError as error:
        print(f"error: {error.line()}", file=sys.stderr)
        return 2
    if args.half:
        weights = {k: v.half() if v.is_floating_point() else v for k, v in weights.items()}
    args.out.parent.mkdir(parents=True, exist_ok=True)
    save_file({name: value.contiguous() for name, value in weights.items()}, args.out)
    print(f"{args.out}: {len(weights)} tensors, {args.out.stat().st_size / 1024:.0f} KiB")
    return 0


if __name__ == "__main__":
    sys.exit(main())
