"""What run_with_submitit.py asks Slurm for, without a Slurm."""

import os
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

import run_with_submitit
from base.errors import UserError


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
    flags = (
        "--nodes 3 --ngpus 0 --tasks-per-node 5 --mem-per-gpu 0 --timeout 7 --signal-delay 60 "
        "--cpus-per-task 4 --partition p --constraint c --account a --qos q --slurm exclusive "
        "--slurm gres-flags=x"
    )
    found = asked(*flags.split())
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
    run_with_submitit.remove_old_stores(tmp_path / ".meeting-7-2")
    assert {path.name for path in tmp_path.iterdir()} == {".meeting-7-2", ".meeting-71-0"}


def test_bad_flags_of_main_are_refused_before_anything_is_submitted(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="--epohcs"):
        run_with_submitit.submit(["--job_dir", str(tmp_path), "--epohcs", "3"])


@pytest.mark.skipif(shutil.which("sbatch") is not None, reason="there is a Slurm")
def test_without_slurm_the_error_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="Slurm refused the job"):
        run_with_submitit.submit(["--job_dir", str(tmp_path)])
