"""How the threads of OpenMP wait for each other. Import this module before torch.

By default they spin for milliseconds. If another program uses a core, a step is then several times
slower. If they sleep at once, a small network on an idle machine takes up to twice as long
(`docs/performance.md`). So they spin briefly on an idle machine and sleep at once on a busy one.
OpenMP reads the variables once, when torch is imported. They do not change results.
"""

import os
import time
from pathlib import Path

NAMES = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME")  # settings of the user stay
SPINS = "10000"  # of libgomp, some 30 us
IDLE_CORES = 0.5  # other programs use fewer cores than this on an idle machine


def busy_cores(seconds: float = 0.1, stat: Path = Path("/proc/stat")) -> float:
    """Return how many cores other programs use. Waits `seconds`. Infinite where unknown."""

    def idle() -> tuple[int, int]:
        lines = stat.read_text().splitlines()
        cores = sum(line.startswith("cpu") for line in lines) - 1
        times = lines[0].split()  # cpu, user, nice, system, idle, iowait: ticks of all cores
        return int(times[4]) + int(times[5]), cores

    try:
        (before, cores), start = idle(), time.monotonic()
        time.sleep(seconds)
        ticks, elapsed = idle()[0] - before, time.monotonic() - start
        return cores - ticks / os.sysconf("SC_CLK_TCK") / elapsed
    except (OSError, ValueError, IndexError):  # not Linux
        return float("inf")


def _choose() -> None:
    if os.environ.get("OMP_NUM_THREADS") == "1" or any(name in os.environ for name in NAMES):
        return
    if busy_cores() < IDLE_CORES:
        os.environ["GOMP_SPINCOUNT"] = SPINS
    else:
        os.environ["OMP_WAIT_POLICY"] = "passive"


_choose()
