"""A run that is killed ends as if nothing had happened; a damaged or foreign file does no harm."""

import copy
import math
import os
import pickle
import random
import re
import shlex
import shutil
import signal
import struct
import subprocess
import time
import zipfile
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from programs import Program, finish, start
from torch import Tensor, nn

import engine
from base import distributed, files, safe_load
from base.errors import EXIT_STOPPED, Stopped, UserError
from experiments import kill_sweep
from experiments.kill_sweep import children, compare_runs, differences
from losses import DistillationLoss
from models.features import Tap, TappedOutput
from training.checkpointer import Checkpointer, is_auto
from training.optim import compatible
from training.state import EpochState
from training.step_config import Hooks, StepConfig

CPU = torch.device("cpu")


# ---- whole runs


def assert_same_run(one: Path, other: Path) -> None:
    """Weights, average, optimizer, counters and log are those of the other run, bit for bit."""
    assert not compare_runs(one, other)


def wait_for(
    words: str, log: Path, process: Program | subprocess.Popen, timeout: float = 120
) -> None:
    """Wait until the run has printed `words`."""
    end = time.monotonic() + timeout
    while words not in log.read_text():
        assert process.poll() is None and time.monotonic() < end, log.read_text()
        time.sleep(0.01)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("workers", "accumulation", "processes", "cached", "words"),
    [
        (0, 1, 1, True, "Epoch: [2/2] [2/"),
        (2, 2, 1, False, "Test EMA: ["),
        (0, 2, 2, False, "Epoch: [1/2] [2/"),
    ],
)
def test_a_run_killed_at_any_moment_ends_as_if_nothing_had_happened(
    workers: int,
    accumulation: int,
    processes: int,
    cached: bool,
    words: str,
    folder_flags: list[str],
    small_teacher: Path,
    tmp_path: Path,
) -> None:
    flags = [
        *folder_flags,
        "--num_workers",
        str(workers),
        "--grad-accum-steps",
        str(accumulation),
        "--batch-size",
        str(4 // processes),
    ]
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    own: dict[Path, list[str]] = {whole: [], killed: []}
    if cached:  # each fills a cache of its own
        flags += [
            "--distillation-type",
            "hard",
            "--teacher-model",
            "resnet_pico",
            "--teacher-path",
            str(small_teacher),
        ]
        own = {out: ["--teacher-cache", f"{out}-cache"] for out in own}
    finish(flags + own[whole], whole, processes)
    process = start(flags + own[killed], killed, processes)
    wait_for(words, Path(f"{killed}.log"), process)
    process.kill()
    flags += ["--num_workers", "0", "--log-interval", "2", *own[killed]]
    text = finish(flags, killed, processes)
    assert "resume: " in text and "starting from the beginning" in text
    assert_same_run(whole, killed)
    for file in Path(f"{whole}-cache").glob("*"):
        assert file.read_bytes() == Path(f"{killed}-cache", file.name).read_bytes(), file


@pytest.mark.slow
@pytest.mark.parametrize("name", ["SIGTERM", "SIGUSR1", "SIGUSR2", "SIGINT"])
def test_a_signal_ends_the_step_saves_and_has_a_code_of_its_own(
    name: str, folder_flags: list[str], tmp_path: Path
) -> None:
    flags = [*folder_flags, "--checkpoint-steps", "0", "--num_workers", "1"]
    process = start(flags, tmp_path / "out")
    wait_for("[1/2] [2/", tmp_path / "out.log", process)
    os.killpg(process.pid, getattr(signal, name))  # as Slurm: workers hear it too
    assert process.wait(60) == (130 if name == "SIGINT" else EXIT_STOPPED)
    text = (tmp_path / "out.log").read_text()
    assert f"Stopped by {name}" in text and "Traceback" not in text and "killed" not in text
    assert safe_load.read_weights_file(tmp_path / "out" / "checkpoint.pth")["global_step"] >= 2
    command = text.partition("to continue: python main.py ")[2].partition("\n")[0]
    flags = shlex.split(command)
    assert flags[-2:] == ["--resume", "auto"] and flags.count("--resume") == 1
    assert "resume: " in finish(flags, tmp_path / "out")


@pytest.fixture(scope="module")
def two_processes(folder_flags: list[str], tmp_path_factory) -> tuple[list[str], Path]:
    """The flags of runs of two processes, and the folder of one that was not interrupted."""
    flags = [*folder_flags, "--batch-size", "2", "--num_workers", "0"]
    whole = tmp_path_factory.mktemp("two") / "whole"
    finish(flags, whole, 2)
    return flags, whole


@pytest.mark.slow
def test_a_signal_to_one_of_two_processes_stops_both_at_the_same_step(
    two_processes: tuple[list[str], Path], tmp_path: Path
) -> None:
    flags, whole = two_processes
    out = tmp_path / "out"
    process = start(flags, out, 2)
    wait_for("[1/2] [2/", Path(f"{out}.log"), process)
    os.kill(process.parts[1].pid, signal.SIGUSR1)
    process.wait(120)
    assert [part.exitcode for part in process.parts] == [EXIT_STOPPED] * 2
    assert Path(f"{out}.log").read_text().count("Stopped by SIGUSR1") == 1
    finish(flags, out, 2)
    assert_same_run(whole, out)


@pytest.mark.slow
def test_a_killed_process_is_restarted_by_torchrun_and_the_run_ends_the_same(
    two_processes: tuple[list[str], Path], tmp_path: Path
) -> None:
    flags, whole = two_processes
    out = tmp_path / "out"
    process = kill_sweep.start(flags, out, 2, ["--standalone", "--max-restarts=2"])
    log = Path(f"{out}.log")
    wait_for("[2/2] [1/", log, process)
    os.kill(children(process.pid)[-1], signal.SIGKILL)
    assert process.wait(300) == 0, log.read_text()
    assert_same_run(whole, out)


@pytest.mark.slow
def test_a_killed_worker_ends_the_run_in_one_line_and_it_can_go_on(
    folder_flags: list[str], tmp_path: Path
) -> None:
    flags = [*folder_flags, "--num_workers", "1"]
    process = start(flags, tmp_path / "out")
    wait_for("[1/2] [1/", tmp_path / "out.log", process)
    os.kill(children(process.pid)[0], signal.SIGKILL)
    assert process.wait(60) == 1
    said = (tmp_path / "out.log").read_text()
    assert said.count("error: a DataLoader worker has died") == 1 and "Traceback" not in said
    assert "resume: " in finish(flags, tmp_path / "out")


@pytest.mark.slow
def test_a_run_of_bad_losses_ends_in_one_line(folder_flags: list[str], tmp_path: Path) -> None:
    flags = [
        *folder_flags,
        "--lr",
        "1e30",
        "--unscale-lr",
        "--max-bad-steps",
        "2",
        "--no-sched-on-updates",
        "--warmup-lr",
        "1e30",
    ]
    process = start(flags, tmp_path / "out")
    assert process.wait(60) == 2
    said = (tmp_path / "out.log").read_text()
    assert "2 updates in a row" in said and "bad_batch.pth" in said and "Traceback" not in said
    assert (tmp_path / "out" / "bad_batch.pth").exists()


# ---- a run in this process: a network of two numbers


class Tiny(nn.Module):
    def __init__(self, width: int = 3) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layer = nn.Linear(width, 2)


def checkpointer(folder: Path | str, width: int = 3, **changes: Any) -> Checkpointer:
    """A keeper of a tiny run that has made one update; `changes` to its settings or facts."""
    network = Tiny(width)
    optimizer = torch.optim.AdamW(network.parameters(), lr=0.1)
    network.layer(torch.ones(1, width)).sum().backward()
    optimizer.step()
    settings = {"lr": 0.1, "seed": 0, "batch_size": 4, "grad_accum_steps": 1, "num_workers": 0}
    facts = {"processes": 1, "data": "24 + 12 images"}
    settings |= {k: v for k, v in changes.items() if k not in facts}
    facts |= {k: v for k, v in changes.items() if k in facts}
    made = Checkpointer(
        str(folder),
        {"model": network, "optimizer": optimizer},
        EpochState(CPU),
        settings=settings,
        facts=facts,
        steps=6,
        device=CPU,
        keep=3,
    )
    made.global_step = 1
    return made


def test_auto_without_a_checkpoint_begins_and_with_one_goes_on(tmp_path: Path) -> None:
    assert "from the beginning" in checkpointer(tmp_path).resume("auto")
    first = checkpointer(tmp_path)
    first.end_epoch(12.5)
    again = checkpointer(tmp_path)
    assert "epoch 1, step 0" in again.resume("auto")
    assert (again.epoch, again.best, again.global_step) == (1, 12.5, 1)


def test_a_url_is_fetched_by_all_processes_together(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpointer(tmp_path).end_epoch(1.0)
    alone: list[bool] = []

    def on_main(function: Callable) -> Any:
        alone.append(True)
        answer = function()
        alone.clear()
        return answer

    def fetch(url: str) -> Path:
        assert not alone, "the others do not come to its barrier"
        return tmp_path / "checkpoint.pth"

    monkeypatch.setattr(distributed, "on_main", on_main)
    monkeypatch.setattr(safe_load, "fetch", fetch)
    for source in ("https://host/run-12345678.pth", "auto:https://host/run-12345678.pth"):
        assert "epoch 1" in checkpointer(tmp_path / "empty").resume(source)


def test_auto_falls_back_over_damaged_files_and_says_so(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    first = checkpointer(tmp_path)
    for acc1 in (3.0, 2.0, 1.0):
        first.end_epoch(acc1)
    newest = tmp_path / "checkpoint.pth"
    newest.write_bytes(newest.read_bytes()[:-100])
    assert "checkpoint-1.pth, epoch 2" in checkpointer(tmp_path).resume("auto")
    assert "checkpoint.pth" in caplog.text and "taking the one before" in caplog.text
    assert (tmp_path / "checkpoint.pth.damaged").exists() and not newest.exists()
    for name in ("checkpoint-1.pth", "checkpoint-2.pth"):
        (tmp_path / name).unlink()  # the best may be another name of the same file
        (tmp_path / name).touch()
    assert "best_checkpoint.pth, epoch 1" in checkpointer(tmp_path).resume("auto")


@pytest.mark.parametrize("kind", ["link to nothing", "tensor", "safetensors"])
def test_auto_falls_back_over_what_took_the_place_of_a_checkpoint(
    tmp_path: Path, kind: str
) -> None:
    first = checkpointer(tmp_path)
    first.end_epoch(2.0)
    first.end_epoch(1.0)
    newest = tmp_path / "checkpoint.pth"
    newest.unlink()
    if kind == "link to nothing":
        newest.symlink_to(tmp_path / "gone")
    elif kind == "tensor":
        torch.save(torch.zeros(2), newest)
    else:
        target = tmp_path / "x.safetensors"
        target.write_bytes(b"nothing of the kind")
        newest.symlink_to(target)
    assert "checkpoint-1.pth, epoch 1" in checkpointer(tmp_path).resume("auto")
    assert os.path.lexists(tmp_path / "checkpoint.pth.damaged")


def test_auto_does_not_begin_again_over_damaged_files(tmp_path: Path) -> None:
    (tmp_path / "checkpoint.pth").write_bytes(b"PK\x03\x04, once upon a time")
    with pytest.raises(UserError, match="no checkpoint in .* can be read"):
        checkpointer(tmp_path).resume("auto")


def test_what_is_not_damaged_is_not_put_aside(tmp_path: Path) -> None:
    first = checkpointer(tmp_path)
    first.end_epoch(1.0)
    first.end_epoch(2.0)
    rewrite(tmp_path / "checkpoint.pth", lambda content: content.update(format=2))
    with pytest.raises(UserError, match="has format 2"):
        checkpointer(tmp_path).resume("auto")
    assert not list(tmp_path.glob("*.damaged*"))
    (tmp_path / "checkpoint.pth").write_bytes(b"torn")
    assert "checkpoint-1.pth" in checkpointer(tmp_path, check=True).resume("auto")
    assert (tmp_path / "checkpoint.pth").exists(), "a check moves nothing"
    (tmp_path / "checkpoint.pth.damaged").mkdir()
    assert "checkpoint-1.pth" in checkpointer(tmp_path).resume("auto")
    assert (tmp_path / "checkpoint.pth.damaged-2").read_bytes() == b"torn"


def test_going_on_from_a_file_elsewhere_moves_the_folders_own_run_aside(tmp_path: Path) -> None:
    checkpointer(tmp_path / "from").end_epoch(1.0)
    out = tmp_path / "out"
    checkpointer(out).end_epoch(9.0)
    kept = (out / "checkpoint.pth").read_bytes()
    for own in ("auto", str(out / "checkpoint.pth"), "auto:elsewhere.pth"):
        checkpointer(out).clear(own)
    assert not (out / "previous-1").exists()
    checkpointer(out).clear(str(tmp_path / "from" / "checkpoint.pth"))
    assert (out / "previous-1" / "checkpoint.pth").read_bytes() == kept
    assert (out / "previous-1" / "best_checkpoint.pth").exists()
    assert [path.name for path in out.iterdir()] == ["previous-1"]


@pytest.mark.slow
def test_the_program_keeps_a_run_in_whose_folder_another_one_goes_on(
    run_inside, small_run, tmp_path: Path
) -> None:
    folder, flags = small_run
    out = shutil.copytree(folder, tmp_path / "out")
    flags = [*flags, "--epochs", "1", "--output_dir", str(out), "--resume"]
    result = run_inside(*flags, str(tmp_path / "gone.pth"))
    assert result.returncode == 2 and not (out / "previous-1").exists(), "refused: nothing moves"
    result = run_inside(*flags, str(folder / "checkpoint.pth"))
    assert result.returncode == 0 and "holds an earlier run: moved" in result.stderr
    assert {"checkpoint.pth", "log.txt"} <= {path.name for path in (out / "previous-1").iterdir()}


@pytest.mark.parametrize("name", [".lock", ".checkpoint.pth.7.tmp"])
def test_what_is_in_the_way_of_moving_in_is_one_line(name: str, tmp_path: Path) -> None:
    (tmp_path / name).mkdir()
    with pytest.raises(UserError, match=f"{name}: Is a directory"):
        checkpointer(tmp_path).take_folder()


def test_a_file_whose_name_begins_with_auto_is_a_file() -> None:
    assert is_auto("auto") and is_auto("auto:run.pth")
    assert not is_auto("autosaved/run.pth") and not is_auto("")


@pytest.mark.parametrize(
    ("found", "ours", "fits"),
    [
        (0.1, 0.2, True),
        (math.nan, 0.2, False),
        ("0.1", 0.2, False),
        (None, 0.2, False),
        ([0.9, 0.99], (0.9, 0.999), True),
        ("xy", (0.9, 0.999), False),
        ((0.9,), (0.9, 0.9), False),
        (None, True, True),
        (1.0, None, False),
    ],
)
def test_a_setting_of_an_optimizer_is_of_our_kind(found: Any, ours: Any, fits: bool) -> None:
    assert compatible(found, ours) == fits


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"lr": 0.2}, "--lr was 0.1 and is 0.2"),
        ({"seed": 7}, "--seed was 0 and is 7"),
        ({"batch_size": 8}, "--batch-size was 4 and is 8"),
        ({"processes": 2}, "processes: was 1 and is 2"),
        ({"data": "25 + 12 images"}, r"data: was '24 \+ 12 images' and is '25"),
    ],
)
def test_what_must_not_change_is_refused_with_both_values_unless_anyway(
    change: dict, words: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    checkpointer(tmp_path).end_epoch(1.0)
    with pytest.raises(UserError, match=words):
        checkpointer(tmp_path, **change).resume("auto")
    assert "epoch 1" in checkpointer(tmp_path, **change).resume("auto", anyway=True)
    assert "resumed anyway" in caplog.text


@pytest.mark.parametrize(
    ("flags", "options"),
    [
        (["--weight-decay", "0.2"], {"weight_decay": {0.0, 0.2}}),
        (["--opt-betas", "0.8", "0.9"], {"betas": {(0.8, 0.9)}}),
        (["--opt-eps", "1e-6"], {"eps": {1e-6}}),
        (["--opt-kwargs", "amsgrad=False"], {"amsgrad": {False}}),
    ],
)
def test_resume_anyway_uses_the_new_options_of_the_optimizer(
    flags: list[str], options: dict, small_run, run_inside, tmp_path: Path
) -> None:
    folder, command = small_run
    shutil.copytree(folder, tmp_path / "run")
    words = [*command, "--output_dir", str(tmp_path / "run"), "--resume-anyway", *flags]
    found = run_inside(*words)
    assert found.returncode == 0, found.stderr
    assert f"resumed anyway: {flags[0]} was" in found.stderr
    saved = torch.load(tmp_path / "run/checkpoint.pth", weights_only=True)
    for name, values in options.items():
        groups = saved["optimizer"]["param_groups"]
        found = {tuple(x) if isinstance(x, list) else x for x in (g[name] for g in groups)}
        assert found == values


def test_what_does_not_reach_the_weights_may_change(tmp_path: Path) -> None:
    checkpointer(tmp_path).end_epoch(1.0)
    assert "epoch 1" in checkpointer(tmp_path, num_workers=3, output_dir="b").resume("auto")


def test_with_another_batch_the_place_is_that_of_as_many_images(tmp_path: Path) -> None:
    first = checkpointer(tmp_path)
    first.state.micro_step = 5  # of 4 images
    first.state.add({"loss": torch.tensor(2.0)})
    first.save()
    again = checkpointer(tmp_path, batch_size=8, grad_accum_steps=2)
    again.resume("auto", anyway=True)
    assert again.state.micro_step == 2, "two and a half of 8 images, whole updates of two"
    assert again.state.meters["loss"].average() == 2.0


def test_an_average_begins_with_the_weights_where_a_file_has_none(tmp_path: Path) -> None:
    checkpointer(tmp_path).end_epoch(1.0)
    again = checkpointer(tmp_path)

    class Average(Tiny):
        def refresh(self, network: nn.Module) -> None:
            self.load_state_dict(network.state_dict())

    again.parts["model_ema"] = Average()
    again.resume("auto")
    assert torch.equal(again.parts["model_ema"].layer.weight, again.parts["model"].layer.weight)
    again.parts["projections"] = nn.Linear(1, 1)
    with pytest.raises(UserError, match="no projections"):
        again.resume(str(tmp_path / "checkpoint.pth"))


def test_a_second_signal_ends_the_process_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    codes: list[int] = []
    monkeypatch.setattr(os, "_exit", codes.append)
    kept = checkpointer(tmp_path)
    for _ in kept.epochs(1):
        signal.raise_signal(signal.SIGTERM)
        signal.raise_signal(signal.SIGTERM)  # torchrun's copy of the same
        assert kept.stop_signal == signal.SIGTERM and not codes
        signal.raise_signal(signal.SIGUSR1)
        assert codes == [128 + signal.SIGUSR1]
        with pytest.raises(Stopped):
            kept.after_update(9)
    assert safe_load.read_weights_file(tmp_path / "checkpoint.pth")["global_step"] == 9
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


def test_steps_and_minutes_save(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kept = checkpointer(tmp_path)
    saved: list[int] = []
    monkeypatch.setattr(kept, "_write", lambda *_: saved.append(kept.global_step))
    kept.every_steps = 3
    for step in range(1, 8):
        kept.after_update(step)
    assert saved == [3, 6]
    kept.every_steps, kept.every_minutes = 0, 1.0
    now = time.monotonic()
    monkeypatch.setattr(time, "monotonic", lambda: now + 61)
    kept.after_update(8)
    kept.after_update(9)
    assert saved == [3, 6, 8]


# ---- bad files


class Hostile:
    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self):
        return (os.system, (f"touch {self.marker}",))


def damage(path: Path, kind: str, dice: random.Random, marker: Path) -> None:
    """Damage the checkpoint at `path` in one of many ways."""
    if kind in BYTES:
        path.write_bytes(BYTES[kind](path.read_bytes(), dice))
    elif kind in CONTENTS:
        content = torch.load(path, weights_only=True)
        CONTENTS[kind](content, dice)
        torch.save(content, path)
    elif kind == "hostile":
        content = torch.load(path, weights_only=True)
        content[dice.choice(["model", "args", "x"])] = Hostile(marker)
        torch.save(content, path, _use_new_zipfile_serialization=dice.random() < 0.5)
    elif kind == "pickle":
        path.write_bytes(pickle.dumps(Hostile(marker), protocol=dice.randrange(6)))
    elif kind == "bomb":
        content = torch.load(path, weights_only=True)
        dice.choice([compressed, lying, overlapping, swelling])(path, content)
    else:
        path.unlink()
        path.mkdir() if kind == "folder" else path.symlink_to(path)


def flip(whole: bytes, dice: random.Random) -> bytes:
    at = dice.randrange(len(whole))
    return whole[:at] + bytes([whole[at] ^ 1 << dice.randrange(8)]) + whole[at + 1 :]


def overwrite(whole: bytes, dice: random.Random) -> bytes:
    at, length = dice.randrange(len(whole)), dice.randrange(1, 64)
    return whole[:at] + dice.randbytes(length) + whole[at + length :]


def remove_key(content: dict, dice: random.Random) -> None:
    optimizer = content["optimizer"]
    target = dice.choice(
        [content]
        + [content[key] for key in ("model", "optimizer", "facts", "tally", "args")]
        + [optimizer["param_groups"][0], optimizer["state"], optimizer["state"][0]]
    )
    target.pop(dice.choice(list(target)))


def change_shape(content: dict, dice: random.Random) -> None:
    target = dice.choice([content["model"], content["optimizer"]["state"][0]])
    key = dice.choice([key for key in target if target[key].dim() > 0])
    target[key] = torch.zeros(dice.randrange(9, 20))


def change_type(content: dict, dice: random.Random) -> None:
    key = dice.choice([key for key in content if key != "classes"])
    content[key] = dice.choice(["words", [1, 2], None, b"bytes", torch.zeros(2)])


def change_dtype(content: dict, dice: random.Random) -> None:
    name = dice.choice(list(content["model"]))
    content["model"][name] = content["model"][name].to(dice.choice([torch.int8, torch.half]))


def write_nan(content: dict, dice: random.Random) -> None:
    """Torch's checksums are right again."""
    target = dice.choice([content["model"], content["optimizer"]["state"][0]])
    dice.choice([value for value in target.values() if value.dim() > 0])[0] = torch.nan


BYTES: dict[str, Callable[[bytes, random.Random], bytes]] = {
    "cut": lambda whole, dice: whole[: dice.randrange(len(whole))],
    "flip": flip,
    "overwrite": overwrite,
    "noise": lambda whole, dice: dice.randbytes(dice.randrange(2000)),
    "empty": lambda whole, dice: b"",
}
CONTENTS = {
    "key": remove_key,
    "shape": change_shape,
    "type": change_type,
    "dtype": change_dtype,
    "number": write_nan,
}


def compressed(path: Path, content: dict) -> None:
    """A few bytes that unpack to 32 MiB of zeros."""
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data.pkl", bytes(1 << 25))


def lying(path: Path, content: dict) -> None:
    """The first entry says that it holds 3 GiB, not compressed."""
    whole = bytearray(path.read_bytes())
    place = whole.index(b"PK\x01\x02")
    whole[place + 20 : place + 28] = struct.pack("<II", 3 << 30, 3 << 30)
    path.write_bytes(whole)


def overlapping(path: Path, content: dict) -> None:
    """A thousand names for the same 100 kB."""
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/data.pkl", bytes(100_000))
        for number in range(1000):
            again = copy.copy(archive.filelist[0])
            again.filename = f"archive/{number}"
            archive.filelist.append(again)


def swelling(path: Path, content: dict) -> None:
    """A list of ten lists of ten lists of ..., which are one list each."""
    nested: list = ["ha"]
    for _ in range(12):
        nested = [nested] * 10
    torch.save(content | {"args": nested}, path)


KINDS = [*BYTES, *CONTENTS, "hostile", "pickle", "folder", "loop", "bomb"]


def state_of(run: Checkpointer) -> dict[str, Any]:
    """All that a run is, in plain values."""
    parts = {name: part.state_dict() for name, part in run.parts.items()}
    return parts | {
        "tally": run.state.state_dict(),
        "epoch": run.epoch,
        "best": run.best,
        "global_step": run.global_step,
    }


@pytest.mark.parametrize("kind", KINDS)
def test_of_300_damaged_checkpoints_none_loads_wrong_runs_code_or_ends_in_a_traceback(
    kind: str, tmp_path: Path
) -> None:
    good = checkpointer(tmp_path / "good")
    good.best = 12.5
    good.state.micro_step = 2
    good.state.add({"loss": torch.tensor(2.0)})
    good.save()
    refused = 0
    for number in range(300 // len(KINDS)):
        path = tmp_path / str(number) / "checkpoint.pth"
        shutil.copytree(tmp_path / "good", path.parent)
        damage(path, kind, random.Random(f"{kind}{number}"), tmp_path / "ran")
        fresh = checkpointer(tmp_path)
        try:
            fresh.resume(str(path))
        except UserError as error:
            refused += 1
            assert "\n" not in error.line() and str(path) in error.line()
        else:  # padding and dates of an archive may change, what it says may not
            assert not list(differences(state_of(good), state_of(fresh))), (kind, number)
    assert not (tmp_path / "ran").exists()
    assert refused == 20 or kind in ("flip", "overwrite"), refused


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_a_damaged_checkpoint_ends_the_program_in_one_line(
    kind: str, run_inside, small_run, tmp_path: Path
) -> None:
    folder, flags = small_run
    path = Path(shutil.copy(folder / "checkpoint.pth", tmp_path))
    damage(path, kind, random.Random(1), tmp_path / "ran")
    out = ["--epochs", "1", "--output_dir", str(tmp_path / "new")]
    result = run_inside(*flags, *out, "--resume", str(path))
    assert result.returncode == 2, result.stderr
    assert re.fullmatch(rf"error: .*{re.escape(str(path))}.*\n", result.stderr), result.stderr
    assert not (tmp_path / "ran").exists()


@pytest.mark.slow
def test_the_program_goes_on_from_the_one_before_where_something_is_missing_in_the_newest(
    run_inside, small_run, tmp_path: Path
) -> None:
    folder, flags = small_run
    out = shutil.copytree(folder, tmp_path / "out")
    for key in ("model_ema", "tally"):
        content = torch.load(out / "checkpoint.pth", weights_only=True)
        del content[key]
        torch.save(content, out / "checkpoint.pth")
    result = run_inside(*flags, "--output_dir", str(out))
    assert result.returncode == 0 and "taking the one before" in result.stderr
    assert "checkpoint-1.pth, epoch 0, step" in result.stderr
    assert (out / "checkpoint.pth.damaged").exists()


def rewrite(path: Path, change: Callable[[dict], Any]) -> None:
    """Change what a checkpoint holds as if it had been written so."""
    content = torch.load(path, weights_only=True)
    change(content)
    del content["outline"]
    torch.save(content | {"outline": files.outline(content)}, path)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda c: c["model"]["layer.bias"].fill_(torch.inf), "layer.bias holds values that are"),
        (lambda c: c["optimizer"]["state"][0]["exp_avg"].fill_(torch.nan), "exp_avg of parameter"),
        (lambda c: c["tally"].update(micro_steps=7), "step 7 of 6"),
        (lambda c: c["tally"].pop("bad"), "bad"),
        (lambda c: c["model"].pop("layer.bias"), "Missing key"),
    ],
)
def test_what_shows_only_when_it_is_taken_up_falls_back_too(
    change: Callable[[dict], Any], words: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    first = checkpointer(tmp_path)
    first.end_epoch(2.0)
    first.end_epoch(1.0)
    rewrite(tmp_path / "checkpoint.pth", change)
    again = checkpointer(tmp_path)
    assert "checkpoint-1.pth, epoch 1" in again.resume("auto")
    assert words in caplog.text and again.epoch == 1
    first.epoch = 1
    assert not list(differences(state_of(first) | {"best": 2.0}, state_of(again)))


def test_weights_that_are_not_finite_are_never_written(tmp_path: Path) -> None:
    kept = checkpointer(tmp_path)
    kept.save()
    kept.parts["model"].layer.bias.data[1] = torch.inf
    with pytest.raises(UserError, match="after update 1 the weights are not finite"):
        kept.save()
    assert "step 0 of 6" in checkpointer(tmp_path).resume("auto")


def test_deits_own_file_goes_on_with_what_it_has(tmp_path: Path) -> None:
    first = checkpointer(tmp_path)
    parts = {name: part.state_dict() for name, part in first.parts.items()}
    args = Namespace(lr=1.0, seed=9, output_dir=Path("x"))
    torch.save(parts | {"epoch": 4, "args": args, "lr_scheduler": {}}, tmp_path / "deit.pth")
    again = checkpointer(tmp_path)
    assert "epoch 5, step 0" in again.resume(str(tmp_path / "deit.pth"))
    found = {name: part.state_dict() for name, part in again.parts.items()}
    assert not list(differences(parts, found))
    parts["model"]["layer.bias"][0] = torch.nan
    torch.save(parts | {"epoch": 4, "args": args}, tmp_path / "deit.pth")
    with pytest.raises(UserError, match="not finite"):
        checkpointer(tmp_path).resume(str(tmp_path / "deit.pth"))


def test_a_streak_of_bad_updates_is_taken_up_at_the_end_of_an_epoch_too(tmp_path: Path) -> None:
    first = checkpointer(tmp_path)
    first.state.bad.counts = torch.tensor([3, 4])
    first.end_epoch(1.0)
    again = checkpointer(tmp_path)
    again.resume("auto")
    assert again.state.bad.counts.tolist() == [3, 0]


# ---- losses that are not finite


class OneHead(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layer, self.drop, self.norm = nn.Linear(12, 4), nn.Dropout(0.5), nn.Identity()

    @property
    def network(self) -> nn.Module:
        return self

    def forward(self, images: Tensor) -> Tensor:
        return self.layer(self.drop(self.norm(images).flatten(1)))


def test_a_run_of_bad_losses_leaves_a_file_that_reproduces_the_batch(tmp_path: Path) -> None:
    model, kept = OneHead(), checkpointer(tmp_path)
    criterion = DistillationLoss(nn.CrossEntropyLoss(), None, "none", 0.5, 1.0)
    loader = [(torch.randn(3, 3, 2, 2), torch.arange(3)) for _ in range(4)]
    for images, _ in loader[1:]:
        images[1] = 1e38 * images[1]  # overflows in the forward pass
        images[2] = torch.inf

    def save(batch: dict) -> str:
        return kept.save_bad_batch({**batch, "model": model.state_dict()})

    with pytest.raises(UserError) as caught:
        engine.train_one_epoch(
            model,
            criterion,
            loader,
            torch.optim.SGD(model.parameters(), lr=0.1),
            CPU,
            5,
            config=StepConfig(seed=3, max_bad_steps=2, log_interval=100),
            hooks=Hooks(save_bad_batch=save),
        )
    for words in ("2 updates in a row", "epoch 5, step 2", "loss nan", "bad_batch.pth"):
        assert words in str(caught.value)
    saved = safe_load.read_weights_file(tmp_path / "bad_batch.pth")
    again = OneHead()
    again.load_state_dict(saved["model"])
    engine.seed_step(saved["seed"], "step", saved["epoch"], saved["micro_step"], saved["rank"])
    loss = nn.functional.cross_entropy(again(saved["images"]), saved["labels"])
    assert not torch.isfinite(loss) and not torch.isfinite(saved["terms"]["loss"])


def test_the_file_of_a_bad_batch_is_read_again_also_with_what_a_teacher_saw(tmp_path: Path) -> None:
    seen = TappedOutput(torch.ones(2, 3), {(0, Tap("hidden", 1)): torch.full((2, 5, 4), torch.inf)})
    path = checkpointer(tmp_path).save_bad_batch({"teacher_outputs": seen, "epoch": 1})
    saved = safe_load.read_weights_file(path)["teacher_outputs"]
    assert torch.equal(saved["logits"], seen.logits)
    assert [torch.equal(x, y) for x, y in zip(saved["states"].values(), seen.states.values())]


def one_of_two(rank: int, folder: str) -> None:
    """Train in two processes, of which the second gets an image that is not finite."""
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": "2"}
    distributed.init_processes("cpu", dist_url=f"file://{folder}/meeting")
    model = OneHead()
    model.norm = nn.BatchNorm2d(3)
    model = distributed.data_parallel(model, torch.zeros(2, 3, 2, 2))
    images = torch.randn(3, 3, 3, 2, 2)
    images[1, 0] = torch.nan if rank == 1 else 0.0
    criterion = DistillationLoss(nn.CrossEntropyLoss(), None, "none", 0.5, 1.0)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for limit in (2, 1):
        try:
            stats = engine.train_one_epoch(
                model,
                criterion,
                [(batch, torch.arange(3)) for batch in images],
                optimizer,
                CPU,
                0,
                config=StepConfig(max_bad_steps=limit),
                hooks=Hooks(save_bad_batch=lambda batch: f"the file of {batch['rank']}"),
            )
            said = str(stats["skipped_updates"])
        except UserError as error:
            said = error.line()
        torch.save(
            {"said": said, "model": model.module.state_dict()}, f"{folder}/{rank}-{limit}.pth"
        )
    distributed.shutdown()


def test_a_bad_loss_in_one_process_is_skipped_and_told_by_both(tmp_path: Path) -> None:
    torch.multiprocessing.start_processes(
        one_of_two, (str(tmp_path),), nprocs=2, start_method="fork"
    )
    for limit, words in ((2, "1"), (1, "step 1, process 1: loss nan, base nan; the batch is in")):
        one, two = (torch.load(tmp_path / f"{rank}-{limit}.pth") for rank in (0, 1))
        assert one["said"] == two["said"] and words in one["said"]
        assert not list(differences(one["model"], two["model"])), "BatchNorm's statistics included"
        assert all(value.isfinite().all() for value in one["model"].values())


def test_an_epoch_taken_up_again_has_the_means_of_the_whole(tmp_path: Path) -> None:
    loader = [(torch.randn(3, 3, 2, 2), torch.arange(3)) for _ in range(4)]
    criterion = DistillationLoss(nn.CrossEntropyLoss(), None, "none", 0.5, 1.0)

    class Rest(list):
        def __len__(self) -> int:
            return 4

    class Enough(Exception):
        pass

    def after_two(done: int) -> None:
        if done == 2:
            raise Enough

    stats, weights = [], []
    for parts in (1, 2):
        model, state = OneHead(), EpochState(CPU)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        if parts == 2:
            with pytest.raises(Enough):
                engine.train_one_epoch(
                    model,
                    criterion,
                    loader,
                    optimizer,
                    CPU,
                    0,
                    state=state,
                    hooks=Hooks(on_update=after_two),
                )
            saved, state = state.state_dict(), EpochState(CPU)
            state.load_state_dict(saved)
        rest = Rest(loader[state.micro_step :])
        stats.append(engine.train_one_epoch(model, criterion, rest, optimizer, CPU, 0, state=state))
        weights.append(model.layer.weight)
    assert stats[0] == stats[1] and torch.equal(*weights)
