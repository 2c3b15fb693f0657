"""On a real Slurm: jobs that are preempted, time out or get a signal end as if nothing was.

`../shared/slurm/slurm_up.sh` beside the checkout brings up Slurm on this machine, as root. These
tests take three minutes and install packages. Where they cannot run they are skipped with the
reason; with REQUIRE_SLURM=1 that is a failure; 0 leaves them out.
"""

import contextlib
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from base.errors import UserError
from experiments.kill_sweep import compare_runs
from training.checkpointer import load_run

ROOT = Path(__file__).resolve().parents[2]
SCRIPTS = ROOT.parent / "shared" / "slurm"
REQUEST = "--nodes 2 --ngpus 0 --tasks-per-node 2 --cpus-per-task 1 --mem-per-gpu 1 --timeout 10"
REQUEST = REQUEST.split()
RUN = "--model deit_pico_distilled_patch4_32 --batch-size 2 --epochs 6 --num_workers 1"
RUN = f"{RUN} --log-interval 1 --drop-path 0.2".split()


# ---- on a real one


def shell(*command: str) -> str:
    result = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


@pytest.fixture(scope="module")
def slurm() -> Iterator[None]:
    """A Slurm of two nodes on this machine, for as long as this file's tests run."""
    reason = ""
    if os.geteuid() != 0:
        reason = "not root"
    elif shutil.which("apt-get") is None:
        reason = "no apt"
    elif not (SCRIPTS / "slurm_up.sh").exists():
        reason = "the Slurm scripts beside the checkout (../shared/slurm) are not there"
    required = os.environ.get("REQUIRE_SLURM")
    if required == "1" and reason:
        pytest.fail(f"{reason}, and REQUIRE_SLURM is 1")
    if required == "0" or reason:
        pytest.skip(f"no real Slurm: {reason or 'REQUIRE_SLURM is 0'}")
    up = shutil.which("sinfo") and not subprocess.run(["sinfo"], capture_output=True).returncode
    subprocess.run([str(SCRIPTS / "slurm_up.sh")], check=True, capture_output=True, timeout=300)
    settings = Path("/etc/slurm/slurm.conf")  # its seconds before SIGKILL are few on a busy machine
    settings.write_text(re.sub(r"(?m)^KillWait=.*$", "KillWait=30", settings.read_text()))
    shell("scontrol", "reconfigure")
    yield
    subprocess.run(["scancel", *(job.number for job in Job.submitted)], capture_output=True)
    for job in Job.submitted:
        job.stop_reading()
    if not up:
        subprocess.run([str(SCRIPTS / "slurm_down.sh")], capture_output=True, timeout=120)


class Job:
    """A run submitted through `run_with_submitit.py`, whose checkpoint is read all the while."""

    submitted: list["Job"] = []

    def __init__(self, folder: Path, *flags: str) -> None:
        environ = os.environ | {"OMP_NUM_THREADS": "1"}
        program = str(ROOT / "run_with_submitit.py")
        result = subprocess.run(
            [sys.executable, program, "--job_dir", f"{folder}/%j", *flags],
            env=environ,
            cwd=folder,
            capture_output=True,
            text=True,
            timeout=300,
        )
        assert result.returncode == 0, result.stderr
        self.number = result.stdout.split()[-1]
        self.submitted.append(self)
        self.logs = folder / self.number
        self.folder = folder / "out" if "--output-dir" in flags else self.logs
        self.whole, self.torn, self.over = 0, "", threading.Event()
        self.reader = threading.Thread(target=self._read, daemon=True)
        self.reader.start()

    def _read(self) -> None:
        """Read the checkpoint with its checksums, again and again, from when it is first there."""
        path = self.folder / "checkpoint.pth"
        while not self.over.wait(0.05) and not self.torn:
            try:
                if self.whole or path.exists():
                    load_run(path)
                    self.whole += 1
            except UserError as error:
                self.torn = error.line()

    def stop_reading(self) -> None:
        self.over.set()
        self.reader.join()

    def said(self) -> str:
        return "".join(file.read_text() for file in sorted(self.logs.glob("*_log.*")))

    def freeze(self) -> None:
        """Stop the processes of the run, though not their workers, until a SIGCONT comes."""
        mine = f"SLURM_JOB_ID={self.number}\0".encode()
        found = {}
        for process in filter(lambda path: path.name.isdigit(), Path("/proc").iterdir()):
            with contextlib.suppress(OSError):
                if mine in (process / "environ").read_bytes():
                    words = (process / "cmdline").read_text().split("\0")
                    if "python" in words[0] and "submitit.core._submit" in words:
                        parent = (process / "stat").read_text().rsplit(")", 1)[1].split()[1]
                        found[int(process.name)] = int(parent)
        tasks = [task for task, parent in found.items() if parent not in found]
        assert len(tasks) == 4
        for task in tasks:
            os.kill(task, signal.SIGSTOP)

    def shown(self, name: str) -> str:
        return shell("scontrol", "show", "job", self.number).split(f"{name}=")[1].split()[0]

    def state(self) -> str:
        return self.shown("JobState")

    def wait(self, done: Callable[[], bool], timeout: float = 600) -> None:
        end = time.monotonic() + timeout
        while not done():
            late = time.monotonic() > end
            over = self.state() in ("FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL")
            if (late or over) and not done():
                state, said = self.state(), self.said()
                subprocess.run(["scancel", self.number])
                pytest.fail(f"job {self.number} is {state}:\n{said}")
            time.sleep(0.3)

    def wait_for(self, words: str) -> None:
        self.wait(lambda: words in self.said())

    def wait_for_a_step(self, starts: int) -> None:
        """Wait for the first step that the job prints after it was started so many times."""
        begins = "processes: 4 processes (slurm)"  # on 2 nodes
        self.wait(
            lambda: (
                self.said().count(begins) == starts
                and "Epoch: [" in self.said().rpartition(begins)[2]
            )
        )

    def wait_for_end(self) -> None:
        self.wait(lambda: self.state() == "COMPLETED")
        self.stop_reading()
        assert not self.torn and self.whole > 3


@pytest.fixture(scope="module")
def run_flags(image_folder: Path) -> list[str]:
    return [*REQUEST, *RUN, "--data-path", str(image_folder)]


@pytest.fixture(scope="module")
def whole(slurm: None, run_flags: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the run that nothing disturbs, of 2 nodes x 2 tasks."""
    job = Job(tmp_path_factory.mktemp("whole"), *run_flags)
    job.wait_for_a_step(1)
    assert job.shown("NumNodes") == "2" and job.shown("NumTasks") == "4"
    job.wait_for_end()
    return job.folder


def signalled(job: Job) -> None:
    shell("scancel", "--signal=USR1", job.number)
    shell("scancel", "--signal=CONT", job.number)


def preempted(job: Job) -> None:
    shell("sbatch", "-p", "urgent", "-N", "2", "--exclusive", "-o", "/dev/null", "--wrap", "true")


def out_of_time(job: Job) -> None:
    hours, minutes, _ = map(int, job.shown("RunTime").split(":"))
    limit = 60 * hours + minutes + 2  # less than the two minutes of --signal-delay are left
    shell("scontrol", "update", f"JobId={job.number}", f"TimeLimit={limit}")
    job.wait_for("Stopped by SIGUSR2")  # and give the next start more time, unless it is done
    subprocess.run(["scontrol", "update", f"JobId={job.number}", "TimeLimit=10"])


@pytest.mark.slow
def test_a_job_that_is_signalled_preempted_and_out_of_time_goes_on_by_itself(
    whole: Path, run_flags: list[str], tmp_path: Path
) -> None:
    job = Job(tmp_path, *run_flags)
    for starts, (happens, name) in enumerate(
        ((signalled, "SIGUSR1"), (preempted, "SIGTERM"), (out_of_time, "SIGUSR2")), 1
    ):
        job.wait_for_a_step(starts)
        job.freeze()  # Slurm looks for what to do twice a minute; its signal comes with SIGCONT
        happens(job)
        job.wait_for(f"Stopped by {name}")
    job.wait_for_end()
    assert job.shown("Restarts") == "3" and job.said().count("checkpoint.pth, epoch") == 3
    assert "Job has timed out" in job.said()
    assert not compare_runs(whole, job.folder)


@pytest.mark.slow
def test_a_cancelled_job_is_not_requeued_and_a_new_one_goes_on(
    whole: Path, run_flags: list[str], tmp_path: Path
) -> None:
    flags = [*run_flags, "--output-dir", str(tmp_path / "out")]
    job = Job(tmp_path, *flags)
    job.wait_for_a_step(1)
    shell("scancel", job.number)
    job.wait(lambda: job.state() == "CANCELLED")
    assert "Stopped by SIGTERM" in job.said() and job.shown("Restarts") == "0" and not job.torn
    job = Job(tmp_path, *flags)
    job.wait_for_end()
    assert job.said().count("checkpoint.pth, epoch") == 1
    assert not compare_runs(whole, job.folder)
