"""Start programs in forked processes, which have imported torch and timm already.

A fork imports the modules of this repository again, so that nothing of earlier tests is in them.
"""

import atexit
import contextlib
import multiprocessing
import multiprocessing.util
import os
import runpy
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


class Program:
    """main.py, or another script, in `processes` forks, each in a session of its own.

    Their output goes to files. Several processes meet as those of torchrun do.
    """

    def __init__(
        self,
        flags: Sequence[str],
        out: Path,
        err: Path | None = None,
        *,
        processes: int = 1,
        environ: Mapping[str, str] = {},
        cwd: Path = ROOT,
        script: Path = ROOT / "main.py",
    ) -> None:
        fork, more = multiprocessing.get_context("fork"), dict(environ)
        if processes > 1:
            more |= {"WORLD_SIZE": str(processes), "LOCAL_WORLD_SIZE": str(processes)}
            more |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
        self.parts = []
        for rank in range(processes):
            own = {"RANK": str(rank), "LOCAL_RANK": str(rank)} if processes > 1 else {}
            arguments = (list(flags), out, err or out, more | own, cwd, script)
            self.parts.append(fork.Process(target=_run, args=arguments))
            self.parts[-1].start()
        self.pid = self.parts[0].pid

    def poll(self) -> int | None:
        """Return the first exit code that is not 0, or else 0; None while a process runs."""
        codes = [part.exitcode for part in self.parts]
        return None if None in codes else next(filter(None, codes), 0)

    def wait(self, timeout: float = 240) -> int:
        end = time.monotonic() + timeout
        for part in self.parts:
            part.join(max(0, end - time.monotonic()))
        code = self.poll()
        if code is None:
            self.kill()
            raise subprocess.TimeoutExpired("main.py", timeout)
        return code

    def kill(self) -> None:
        """Kill all processes and their workers."""
        for part in self.parts:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(part.pid, signal.SIGKILL)
            part.join()


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


def _run(
    flags: list[str], out: Path, err: Path, environ: dict[str, str], cwd: Path, script: Path
) -> None:
    """Run a script in this process as `python SCRIPT FLAGS` would."""
    os.setsid()
    atexit._clear()
    signal.signal(signal.SIGINT, signal.default_int_handler)
    for name, number, path in (("stdout", 1, out), ("stderr", 2, err)):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND), number)
        setattr(sys, name, os.fdopen(number, "w", buffering=1, errors="backslashreplace"))
    for name in [name for name in os.environ if name.startswith(("SLURM_", "MASTER_"))]:
        del os.environ[name]
    os.environ |= {"OMP_NUM_THREADS": "1", **environ}
    os.chdir(cwd)
    for name, module in list(sys.modules.items()):
        file = getattr(module, "__file__", None)
        if file and Path(file).is_relative_to(ROOT) and ".venv" not in file:
            del sys.modules[name]
    sys.argv, sys.path[:0] = [script.name, *flags], [str(ROOT)]
    try:
        runpy.run_path(str(script), run_name="__main__")
    finally:
        atexit._run_exitfuncs()
    multiprocessing.util._exit_function()  # ends the workers
    sys.stdout.flush()
    os._exit(0)  # at once, also where a thread has started this process


def run(
    *flags: str,
    processes: int = 1,
    timeout: float = 240,
    cwd: Path = ROOT,
    script: Path = ROOT / "main.py",
    **environ: str,
) -> subprocess.CompletedProcess:
    """Run a program to its end, and return its exit code and what it has printed."""
    folder = Path(tempfile.mkdtemp())
    out, err = folder / "out", folder / "err"
    program = Program(flags, out, err, processes=processes, environ=environ, cwd=cwd, script=script)
    code = program.wait(timeout)
    done = subprocess.CompletedProcess(flags, code, out.read_text(), err.read_text())
    shutil.rmtree(folder)
    return done


def start(flags: Sequence[str], folder: Path, processes: int = 1) -> Program:
    """Start a run into `folder`, with its output in `folder`.log."""
    Path(f"{folder}.log").touch()
    return Program(
        [*flags, "--output_dir", str(folder)], Path(f"{folder}.log"), processes=processes
    )


def finish(flags: Sequence[str], folder: Path, processes: int = 1) -> str:
    """Run to the end; return what all runs into `folder` have printed. Raises RuntimeError."""
    code = start(flags, folder, processes).wait(600)
    text = Path(f"{folder}.log").read_text()
    if code:
        raise RuntimeError(f"exit code {code}: {text}")
    return text
