"""Run main.py and the tools with mutated inputs, and list those that end in an unplanned way.

    python experiments/fuzz.py --count 500 --programs 20 --keep failures/

An input fails if it prints a traceback, runs longer than the limit, or creates the file `canary`,
which shows that code in the input was executed. Its exit code must be 0, 1 (with a line), 2 (with
one line) or 130. Of each kind, `--count` inputs run in a fork of this process, which calls
`main.run(argv)`, and `--programs` more run as programs. An input depends on --seed, its kind and
its number alone. A run that still trains at the limit is stopped by Ctrl-C and must end with 130.
"""

import argparse
import os
import random
import resource
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable
from pathlib import Path

os.environ.update(OMP_NUM_THREADS="1", HF_HUB_OFFLINE="1")
ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402
from PIL import Image  # noqa: E402
from sklearn.datasets import load_digits  # noqa: E402

import main  # noqa: E402
from experiments.fuzz_inputs import CANARY, DISTIL, KINDS, PACK, TRAIN, Input  # noqa: E402
from tools import export, prepare_data, replay, report  # noqa: E402

PROGRAMS: dict[str, Callable[[list[str]], int]] = {
    "main.py": main.run,
    "tools/export.py": export.main,
    "tools/prepare_data.py": prepare_data.main,
    "tools/replay.py": replay.main,
    "tools/report.py": report.main,
}
MEMORY = 12 * 2**30  # bytes of writable memory of an input
IMPORT_S = 20  # seconds that a program may take besides the limit, for its imports
STOP_S = 10  # seconds until a run that trains must have ended after Ctrl-C
UNCAUGHT = 99  # exit code of a fork that an exception has ended


def write_seeds(folder: Path) -> None:
    """Write what is mutated: images, packed images, a run, a cache, and a bad batch."""
    digits = load_digits()
    for label, name in ((1, "one"), (2, "two")):
        rows = digits.images[digits.target == label]
        for split, count in (("train", 4), ("val", 2)):
            (folder / "images" / split / name).mkdir(parents=True)
            for number, row in enumerate(rows[:count]):
                image = Image.fromarray((row * 15.9).astype("uint8")).convert("RGB")
                ending = "jpg" if number % 2 else "png"
                image.resize((32, 32)).save(folder / "images" / split / name / f"{number}.{ending}")
    flags = [*TRAIN, "--data-path", str(folder / "images")]
    teacher = [*DISTIL, "run/checkpoint.pth", "--teacher-cache", "cache"]
    for request in (
        Input([*flags, "--output_dir", "run"]),
        Input([*flags, *teacher, "--teacher-cache-mode", "write"]),
        Input(PACK, program="tools/prepare_data.py"),
    ):
        if problem := run_input(request, folder, limit_s=120, as_program=False)[0]:
            raise SystemExit(f"the unchanged input failed: {problem}\n{output_of(folder)}")
    bad = ["--lr", "1e38", "--unscale-lr", "--max-bad-steps", "1", "--output_dir", "bad"]
    run_input(
        Input([*flags, *DISTIL, "run/checkpoint.pth", *bad]), folder, limit_s=120, as_program=False
    )
    if not (folder / "bad/bad_batch.pth").is_file():
        raise SystemExit(f"no bad batch was written\n{output_of(folder)}")


def start(request: Input, folder: Path, as_program: bool) -> int:
    """Start an input in a process group of its own, with its output in `folder`; return its id."""
    sys.stdout.flush()
    process = os.fork()
    if process:
        return process
    try:
        os.setsid()
        os.chdir(folder)
        for number, name in ((1, "stdout"), (2, "stderr")):
            os.dup2(os.open(name, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
            setattr(sys, name, os.fdopen(number, "w", buffering=1, errors="replace"))
        resource.setrlimit(resource.RLIMIT_DATA, (MEMORY, MEMORY))
        os.environ.update(request.environ)
        if request.processes > 1:
            _fork_others(request.processes)
        if as_program:
            os.execv(sys.executable, [sys.executable, ROOT / request.program, *request.argv])
        code = PROGRAMS[request.program](request.argv)
        sys.stdout.flush()
        os._exit(code)
    except SystemExit as error:
        os._exit(error.code if isinstance(error.code, int) else 1)
    except BaseException:
        traceback.print_exc()
        sys.stderr.flush()
    finally:
        os._exit(UNCAUGHT)


def _fork_others(processes: int) -> None:
    """Fork the other processes of a run. They are in the group of this one, which has rank 0."""
    os.environ.update(WORLD_SIZE=str(processes), RANK="0", LOCAL_RANK="0")
    for rank in range(1, processes):
        if not os.fork():
            os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank))
            return


def waited_s(process: int) -> float:
    """Return the seconds in which a process was ready and had no CPU (Linux)."""
    return int(Path(f"/proc/{process}/schedstat").read_text().split()[1]) / 1e9


def wait(process: int, seconds: float) -> int | None:
    """Return the exit code of a process, or None after `seconds` in which it had a CPU."""
    began = time.monotonic()
    while time.monotonic() - began - waited_s(process) < seconds:
        found, status = os.waitpid(process, os.WNOHANG)
        if found:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.02)
    return None


def ended(group: int, seconds: float) -> bool:
    """Return whether all processes of a group have ended after at most `seconds` (Linux)."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        found = subprocess.run(["ps", "-eo", "pgid=,state="], capture_output=True, text=True)
        lines = [line.split() for line in found.stdout.splitlines()]
        if not any(int(own) == group and state[0] != "Z" for own, state in lines):
            return True
        time.sleep(0.2)
    return False


def run_input(request: Input, folder: Path, *, limit_s: float, as_program: bool) -> tuple[str, str]:
    """Run an input; return what is wrong with its end, or "", and how it ended."""
    process = start(request, folder, as_program)
    code = wait(process, limit_s * request.processes + IMPORT_S * as_program)
    end = f"exit code {code}"
    if code is None and "Epoch: [" in (folder / "stdout").read_text(errors="replace"):
        end = "still training"
        os.kill(process, signal.SIGINT)
        code = wait(process, STOP_S)
    if code is None:
        os.killpg(process, signal.SIGKILL)
        os.waitpid(process, 0)
    elif request.processes > 1 and not ended(process, STOP_S):
        os.killpg(process, signal.SIGKILL)
        code, end = None, "another process did not end"
    text = output_of(folder)
    lines = [line for line in text.splitlines() if line.startswith("error: ")]
    if (folder / CANARY).exists():
        return "code in the input was executed", end
    if code is None:
        return f"ran longer than {limit_s:g} s", "limit" if end == "exit code None" else end
    if "Traceback (most recent call last)" in text:
        return "a traceback", end
    if code not in (0, 1, 2, 130) or (end == "still training" and code != 130):
        return f"exit code {code}", end
    if code in (1, 2) and len(lines) != 1 and "usage: " not in text:
        return f"exit code {code} with {len(lines)} error lines", end
    return "", end


def output_of(folder: Path) -> str:
    return "\n".join((folder / name).read_text(errors="replace") for name in ("stdout", "stderr"))


def run_kind(kind: str, args: argparse.Namespace, seeds: Path) -> tuple[Counter[str], int]:
    """Run the inputs of a kind; return how often each end occurred, and the failures."""
    ends: Counter[str] = Counter()
    failures = 0
    for number in range(args.first, args.first + args.count + args.programs):
        as_program = number >= args.first + args.count
        folder = Path(tempfile.mkdtemp(prefix=f"fuzz-{kind}-"))
        request = KINDS[kind](random.Random(f"{args.seed} {kind} {number}"), seeds, folder)
        problem, end = run_input(request, folder, limit_s=args.limit, as_program=as_program)
        ends[end] += 1
        if problem:
            failures += 1
            variables = [f"{name}={value}" for name, value in request.environ.items()]
            command = shlex.join([*variables, "python", request.program, *request.argv])
            last = [line for line in output_of(folder).splitlines() if line.strip()][-3:]
            print(f"{kind} {number}: {problem}\n  {command!r:.1500}", flush=True)
            print("".join(f"  | {line!r:.300}\n" for line in last), end="", flush=True)
            if args.keep:
                kept = args.keep / f"{kind}-{number}"
                shutil.rmtree(kept, ignore_errors=True)
                shutil.move(folder, kept)
        shutil.rmtree(folder, ignore_errors=True)
    return ends, failures


def run(args: argparse.Namespace) -> int:
    torch.set_num_threads(1)
    if args.keep:
        args.keep.mkdir(parents=True, exist_ok=True)
    seeds = Path(tempfile.mkdtemp(prefix="fuzz-seeds-"))
    write_seeds(seeds)
    rows, failures = [], 0
    for kind in args.kind or KINDS:
        began = time.monotonic()
        ends, failed = run_kind(kind, args, seeds)
        found = ", ".join(f"{end}: {count}" for end, count in sorted(ends.items()))
        seconds = time.monotonic() - began
        rows.append(f"| {kind} | {args.count} | {args.programs} | {found} | {failed} |")
        print(f"{rows[-1]} {seconds:.0f} s", flush=True)
        failures += failed
    print("\n| kind | in process | as programs | ends | failures |\n|---|---|---|---|---|")
    print("\n".join(rows))
    shutil.rmtree(seeds)
    return int(failures > 0)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("--count", type=int, default=500, help="inputs of a kind, in a fork of this process")
    add("--programs", type=int, default=20, help="inputs of a kind, as programs")
    add("--kind", action="append", choices=list(KINDS), help="default: all; repeatable")
    add("--seed", type=int, default=0)
    add("--first", type=int, default=0, help="number of the first input")
    add("--limit", type=float, default=10, help="seconds of an input")
    add("--keep", type=Path, help="folder for the files and the output of inputs that fail")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(run(parse()))
