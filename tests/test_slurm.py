"""On a real Slurm: jobs that are preempted, time out or get a signal end as if nothing was.

`../shared/slurm/slurm_up.sh` beside the checkout brings up Slurm on this machine, as root. These
tests take three minutes and install packages. Where they cannot run they are skipped with the
reason; with REQUIRE_SLURM=1, as `.ci/run` sets it, that is a failure, and 0 leaves them out.
"""

import contextlib
import os
import pickle
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

import run_with_submitit
from base.errors import UserError
from experiments.kill_sweep import compare_runs
from training.checkpointer import load_run

ROOT = Path(__file__).resolve().parents[1]
SCRIPTS = ROOT.parent / "shared" / "slurm"
REQUEST = [
    "--nodes",
    "2",
    "--ngpus",
    "0",
    "--tasks-per-node",
    "2",
    "--cpus-per-task",
    "1",
    "--mem-per-gpu",
    "1",
    "--timeout",
    "10",
]
RUN = [
    "--model",
    "deit_pico_distilled_patch4_32",
    "--batch-size",
    "2",
    "--epochs",
    "6",
    "--num_workers",
    "1",
    "--log-interval",
    "1",
    "--drop-path",
    "0.2",
]


# ---- without Slurm


@pytest.fixture
def asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., set[str]]:
    """Submit with flags to an sbatch that only keeps what it was handed; return its parameters."""
    script = tmp_path / "bin" / "sbatch"
    script.parent.mkdir()
    script.write_text(f'#!/bin/sh\ncp "$1" {tmp_path}/asked\necho Submitted batch job 7\n')
    script.with_name("srun").write_text("#!/bin/sh\n")
    for file in script.parent.iterdir():
        file.chmod(0o755)
    monkeypatch.setenv("PATH", f"{script.parent}:{os.environ['PATH']}")

    def submit(*flags: str) -> set[str]:
        assert run_with_submitit.submit(["--job_dir", f"{tmp_path}/%j", *flags]) == "7"
        lines = (tmp_path / "asked").read_text().splitlines()
        return {line.removeprefix("#SBATCH --") for line in lines if line.startswith("#SBATCH")}

    return submit


def test_deits_request_asks_slurm_for_what_deits_did(asked: Callable[..., set[str]]) -> None:
    found = asked("--use_volta32", "--comment", "soon", "--epochs", "3")
    assert found >= {
        "job-name=deit",
        "nodes=2",
        "ntasks-per-node=8",
        "gpus-per-node=8",
        "mem=320GB",
        "cpus-per-task=10",
        "time=2800",
        "partition=learnfair",
        "signal=USR2@120",
        "constraint=volta32gb",
        "comment=soon",
    }


def test_every_flag_of_the_request_reaches_slurm(asked: Callable[..., set[str]]) -> None:
    found = asked(
        "--nodes",
        "3",
        "--ngpus",
        "0",
        "--tasks-per-node",
        "5",
        "--mem-per-gpu",
        "0",
        "--timeout",
        "7",
        "--signal-delay",
        "60",
        "--cpus-per-task",
        "4",
        "--partition",
        "p",
        "--constraint",
        "c",
        "--account",
        "a",
        "--qos",
        "q",
        "--slurm",
        "exclusive",
        "--slurm",
        "gres-flags=x",
    )
    assert found >= {
        "nodes=3",
        "ntasks-per-node=5",
        "time=7",
        "signal=USR2@60",
        "cpus-per-task=4",
        "partition=p",
        "constraint=c",
        "account=a",
        "qos=q",
        "exclusive",
        "gres-flags=x",
    }
    assert not [line for line in found if line.startswith(("gpus", "mem"))]


def test_a_shared_folder_is_where_the_processes_meet(
    asked: Callable[..., set[str]], tmp_path: Path
) -> None:
    for flags, folder in (([], tmp_path / "7"), (["--shared-dir", f"{tmp_path}/all"], "all")):
        asked(*flags, "--max-timeouts", "4")
        job = pickle.loads(next((tmp_path / "7").glob("*_submitted.pkl")).read_bytes())
        assert job.function.command("7", "0")[-1] == f"file://{tmp_path / folder}/.meeting-7-0"
        assert job._timeout_countdown == 4


def test_every_start_of_a_job_has_a_meeting_file_of_its_own(tmp_path: Path) -> None:
    trainer = run_with_submitit.Trainer(["--lr", "1"], "/out/%j", f"{tmp_path}/%j", "auto")
    first, second = trainer.command("7", "0"), trainer.command("7", "1")
    assert first[:6] == ["--lr", "1", "--output-dir", "/out/7", "--resume", "auto"]
    assert first[-1] != second[-1] and first[-1].startswith(f"file://{tmp_path}/7/")


def test_the_meeting_files_of_earlier_starts_go(tmp_path: Path) -> None:
    for name in (".meeting-7-0", ".meeting-7-1", ".meeting-7-2", ".meeting-71-0"):
        (tmp_path / name).touch()
    run_with_submitit.forget_meetings(tmp_path / ".meeting-7-2")
    assert {path.name for path in tmp_path.iterdir()} == {".meeting-7-2", ".meeting-71-0"}


def test_bad_flags_of_main_are_refused_before_anything_is_submitted(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="--epohcs"):
        run_with_submitit.submit(["--job_dir", str(tmp_path), "--epohcs", "3"])


@pytest.mark.skipif(shutil.which("sbatch") is not None, reason="there is a Slurm")
def test_without_slurm_the_error_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="Slurm did not take the job"):
        run_with_submitit.submit(["--job_dir", str(tmp_path)])


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
        begins = "4 processes (slurm)"  # on 2 nodes
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
