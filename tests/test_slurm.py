"""On a real Slurm: jobs that are preempted, time out or get a signal end as if nothing was.

`../shared/slurm/slurm_up.sh` beside the checkout brings up Slurm on this machine, as root. These
tests take four minutes and install packages, so they run when REQUIRE_SLURM is 1, as `.ci/run`
sets it, and then fail where Slurm cannot be brought up.
"""

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

import run_with_submitit
from errors import UserError
from tools.kill_sweep import compare_runs

ROOT = Path(__file__).resolve().parents[1]
SCRIPTS = ROOT.parent / "shared" / "slurm"
REQUEST = ["--nodes", "2", "--ngpus", "0", "--tasks-per-node", "2", "--cpus-per-task", "1",
           "--mem-per-gpu", "1", "--timeout", "10"]  # fmt: skip
RUN = ["--model", "deit_pico_distilled_patch4_32", "--batch-size", "8", "--epochs", "3",
       "--num_workers", "1", "--log-interval", "1", "--drop-path", "0.2"]  # fmt: skip


# ---- without Slurm


def parameters(*flags: str) -> dict:
    request, _ = run_with_submitit.get_submitit_parser().parse_known_args(flags)
    return run_with_submitit.slurm_parameters(request)


def test_deits_request_asks_for_what_deits_did() -> None:
    asked = parameters("--use_volta32", "--comment", "soon")
    assert asked["nodes"] == 2 and asked["gpus_per_node"] == asked["tasks_per_node"] == 8
    assert asked["mem_gb"] == 320 and asked["cpus_per_task"] == 10 and asked["timeout_min"] == 2800
    assert asked["slurm_partition"] == "learnfair" and asked["slurm_signal_delay_s"] == 120
    assert asked["slurm_constraint"] == "volta32gb" and asked["slurm_comment"] == "soon"


def test_a_request_without_gpus_and_with_any_parameter_of_sbatch() -> None:
    flags = "--ngpus 0 --tasks-per-node 3 --mem-per-gpu 0 --qos low"
    asked = parameters(*flags.split(), "--slurm", "exclusive", "--slurm", "gres-flags=x")
    assert "gpus_per_node" not in asked and "mem_gb" not in asked and asked["tasks_per_node"] == 3
    assert asked["slurm_additional_parameters"] == {"exclusive": True, "gres_flags": "x"}
    assert asked["slurm_qos"] == "low"


def test_every_start_of_a_job_has_a_meeting_file_of_its_own(tmp_path: Path) -> None:
    trainer = run_with_submitit.Trainer(["--lr", "1"], "/out/%j", f"{tmp_path}/%j", "auto")
    first, second = trainer.command("7", "0"), trainer.command("7", "1")
    assert first[:6] == ["--lr", "1", "--output-dir", "/out/7", "--resume", "auto"]
    assert first[-1] != second[-1] and first[-1].startswith(f"file://{tmp_path}/7/")


def test_bad_flags_of_main_are_refused_before_anything_is_submitted(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="--epohcs"):
        run_with_submitit.submit(["--job_dir", str(tmp_path), "--epohcs", "3"])


@pytest.mark.skipif(shutil.which("sbatch") is not None, reason="there is a Slurm")
def test_without_slurm_the_error_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="Slurm did not take the job"):
        run_with_submitit.submit(["--job_dir", str(tmp_path)])


# ---- on a real one


def shell(*command: str) -> str:
    result = subprocess.run(command, capture_output=True, text=True, timeout=60)
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
    if os.environ.get("REQUIRE_SLURM") != "1":
        pytest.skip(f"no real Slurm: {reason or 'set REQUIRE_SLURM=1 to run these four minutes'}")
    if reason:
        pytest.fail(f"{reason}, and REQUIRE_SLURM is 1")
    up = shutil.which("sinfo") and not subprocess.run(["sinfo"], capture_output=True).returncode
    subprocess.run([str(SCRIPTS / "slurm_up.sh")], check=True, capture_output=True, timeout=300)
    yield
    subprocess.run(["scancel", *Job.submitted], capture_output=True)
    if not up:
        subprocess.run([str(SCRIPTS / "slurm_down.sh")], capture_output=True, timeout=120)


class Job:
    """A run submitted through `run_with_submitit.py`."""

    submitted: list[str] = []

    def __init__(self, folder: Path, *flags: str) -> None:
        environ = os.environ | {"OMP_NUM_THREADS": "1"}
        program = str(ROOT / "run_with_submitit.py")
        result = subprocess.run(
            [sys.executable, program, "--job_dir", f"{folder}/%j", *flags],
            env=environ, cwd=folder, capture_output=True, text=True, timeout=120,
        )  # fmt: skip
        assert result.returncode == 0, result.stderr
        self.number = result.stdout.split()[-1]
        self.folder = folder / self.number
        self.submitted.append(self.number)

    def said(self) -> str:
        files = sorted(self.folder.glob("*_log.*"))
        return "".join(file.read_text() for file in files)

    def tasks(self) -> list[int]:
        """Return the processes of the run, without their workers."""
        mine = f"SLURM_JOB_ID={self.number}\0".encode()
        found = {}
        for process in filter(lambda path: path.name.isdigit(), Path("/proc").iterdir()):
            with contextlib.suppress(OSError):
                if mine in (process / "environ").read_bytes():
                    words = (process / "cmdline").read_text().split("\0")
                    if "python" in words[0] and "submitit.core._submit" in words:
                        parent = (process / "stat").read_text().rsplit(")", 1)[1].split()[1]
                        found[int(process.name)] = int(parent)
        assert found
        return [task for task, parent in found.items() if parent not in found]

    def shown(self, name: str) -> str:
        return shell("scontrol", "show", "job", self.number).split(f"{name}=")[1].split()[0]

    def state(self) -> str:
        return self.shown("JobState")

    def wait(self, done: Callable[[], bool], timeout: float = 240) -> None:
        end = time.monotonic() + timeout
        while not done():
            late = time.monotonic() > end
            over = self.state() in ("FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL")
            if late or over:
                state, said = self.state(), self.said()
                subprocess.run(["scancel", self.number])
                pytest.fail(f"job {self.number} is {state}:\n{said}")
            checkpoint = self.folder / "checkpoint.pth"
            if checkpoint.exists():  # never torn
                torch.load(checkpoint, weights_only=True)
            time.sleep(0.3)

    def wait_for(self, words: str, times: int = 1) -> None:
        self.wait(lambda: self.said().count(words) >= times)

    def wait_for_end(self) -> None:
        self.wait(lambda: self.state() == "COMPLETED")


@pytest.fixture(scope="module")
def run_flags(picture_folder: Path) -> list[str]:
    return [*REQUEST, *RUN, "--batch-size", "2", "--data-path", str(picture_folder)]


@pytest.fixture(scope="module")
def whole(slurm: None, run_flags: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the run that nothing disturbs, of 2 nodes x 2 tasks."""
    job = Job(tmp_path_factory.mktemp("whole"), *run_flags)
    job.wait_for_end()
    assert "4 processes (slurm)" in job.said()
    return job.folder


@pytest.mark.slow
def test_a_signal_saves_requeues_and_the_run_goes_on(
    whole: Path, run_flags: list[str], tmp_path: Path
) -> None:
    job = Job(tmp_path, *run_flags)
    job.wait_for("[2/3] [1/")
    shell("scancel", "--signal=USR1", job.number)
    job.wait_for("Stopped by SIGUSR1")
    job.wait_for_end()
    assert "checkpoint.pth, epoch" in job.said()
    assert not compare_runs(whole, job.folder)


@pytest.mark.slow
def test_a_preempted_job_goes_on_by_itself(
    whole: Path, run_flags: list[str], tmp_path: Path
) -> None:
    job = Job(tmp_path, *run_flags)
    job.wait_for("[1/3] [2/")
    urgent = shell("sbatch", "--parsable", "-p", "urgent", "-N", "2", "--exclusive", "-o",
                   "/dev/null", "--wrap", "sleep 1").strip()  # fmt: skip
    job.wait_for("Stopped by SIGTERM")
    job.wait_for_end()
    assert urgent != job.number and "checkpoint.pth, epoch" in job.said()
    assert not compare_runs(whole, job.folder)


@pytest.mark.slow
def test_a_job_whose_time_is_over_goes_on(
    whole: Path, run_flags: list[str], tmp_path: Path
) -> None:
    job = Job(tmp_path, *run_flags)
    job.wait_for("[1/3] [1/")
    for task in job.tasks():  # so that the run is not over before Slurm looks, twice a minute;
        os.kill(task, signal.SIGSTOP)  # its signal comes with SIGCONT
    hours, minutes, _ = map(int, job.shown("RunTime").split(":"))
    limit = 60 * hours + minutes + 2  # less than the two minutes of --signal-delay are left
    shell("scontrol", "update", f"JobId={job.number}", f"TimeLimit={limit}")
    job.wait_for("Stopped by SIGUSR2")
    shell("scontrol", "update", f"JobId={job.number}", "TimeLimit=10")
    job.wait_for_end()
    assert "Job has timed out" in job.said() and "checkpoint.pth, epoch" in job.said()
    assert not compare_runs(whole, job.folder)


@pytest.mark.slow
def test_a_cancelled_job_stops_in_order_and_is_not_requeued(
    slurm: None, run_flags: list[str], tmp_path: Path
) -> None:
    job = Job(tmp_path, *run_flags)
    job.wait_for("[1/3] [1/")
    shell("scancel", job.number)
    end = time.monotonic() + 60
    while job.state() != "CANCELLED":
        assert time.monotonic() < end, job.state()
        time.sleep(0.3)
    torch.load(job.folder / "checkpoint.pth", weights_only=True)
