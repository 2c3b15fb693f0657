"""Distributed setup: launchers, devices, time limits, collectives."""

import contextlib
import os
import signal
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from base import distributed
from base.errors import PeerLost, UserError


def test_torchruns_variables_make_a_group() -> None:
    found = distributed.find_launcher({"RANK": "3", "WORLD_SIZE": "8", "LOCAL_RANK": "1"})
    assert found == ("torchrun", 3, 1, 8)


def test_a_stray_slurm_procid_does_not_make_a_group() -> None:
    assert distributed.find_launcher({"SLURM_PROCID": "0"})[0] == "single"
    interactive = {"SLURM_PROCID": "0", "SLURM_NTASKS": "4", "SLURM_JOB_ID": "7"}
    assert distributed.find_launcher(interactive)[0] == "single"
    shell_of_salloc = interactive | {"SLURM_STEP_ID": "4294967290", "SLURM_STEP_NUM_TASKS": "1"}
    assert distributed.find_launcher(shell_of_salloc)[0] == "single"


def test_a_slurm_step_of_two_tasks_makes_a_group() -> None:
    step = {"SLURM_PROCID": "1", "SLURM_NTASKS": "2", "SLURM_STEP_ID": "0", "SLURM_LOCALID": "1"}
    assert distributed.find_launcher(step) == ("slurm", 1, 1, 2)


@pytest.mark.parametrize(
    ("environ", "words"),
    [
        ({"RANK": "abc", "WORLD_SIZE": "2"}, "RANK='abc'"),
        ({"RANK": "-1", "WORLD_SIZE": "2"}, "RANK='-1'"),
        ({"RANK": "2", "WORLD_SIZE": "2"}, "ranks are 0 to 1"),
        ({"RANK": "0", "WORLD_SIZE": "0"}, "WORLD_SIZE='0'"),
        ({"WORLD_SIZE": "0"}, "WORLD_SIZE='0'"),
        ({"WORLD_SIZE": "2"}, "RANK is not"),
        ({"RANK": "1"}, "WORLD_SIZE is not"),
        ({"RANK": "0", "WORLD_SIZE": "1" * 5000}, "WORLD_SIZE='1111"),
        ({"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": ""}, "LOCAL_RANK=''"),
        ({"SLURM_NTASKS": "abc"}, "SLURM_NTASKS='abc'"),
        ({"SLURM_PROCID": "x", "SLURM_NTASKS": "2", "SLURM_STEP_ID": "0"}, "SLURM_PROCID='x'"),
        ({"SLURM_PROCID": "7", "SLURM_NTASKS": "2", "SLURM_STEP_ID": "0"}, "SLURM_PROCID=7"),
    ],
)
def test_an_impossible_environment_is_one_line(
    environ: dict, words: str, run_inside, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(UserError, match=words) as caught:
        distributed.find_launcher(environ)
    assert len(caught.value.line()) < 250
    for name, value in environ.items():
        monkeypatch.setenv(name, value)
    result = run_inside("--epochs", "0")
    assert result.returncode == 2 and result.stderr.count("\n") == 1, result.stderr
    assert result.stderr.startswith("error: ")


def test_a_slurm_task_that_sees_one_gpu_alone_uses_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """`srun --gpus-per-task=1`: local rank 1 sees one GPU, which is number 0."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    one = distributed.pick_device("auto", 1, one_visible=True)
    assert one == torch.device("cuda", 0)
    with pytest.raises(UserError, match="2 processes on this node need a GPU each, only 1"):
        distributed.pick_device("auto", 1, 2)


@pytest.mark.parametrize("name", ["mps", "xpu", "meta"])
def test_a_device_without_support_is_one_line(name: str) -> None:
    with pytest.raises(UserError, match="is not supported; use auto, cpu or cuda"):
        distributed.pick_device(name, 0)


def test_a_device_that_is_not_there_is_one_line() -> None:
    with pytest.raises(UserError, match="not a device"):
        distributed.pick_device("gpu", 0)
    if not torch.cuda.is_available():
        with pytest.raises(UserError, match="no GPU"):
            distributed.pick_device("cuda", 0)


def test_alone_the_world_is_one() -> None:
    value = torch.ones(2)
    assert distributed.world_size() == 1 and distributed.is_main()
    assert distributed.all_reduce_sum(value) is value
    assert distributed.broadcast_object({"a": 1}) == {"a": 1}
    with distributed.main_first():
        pass


def test_a_users_error_keeps_its_line_through_a_worker() -> None:
    wrapped = UserError(
        "Caught UserError in DataLoader worker process 0.\nOriginal Traceback (most recent call "
        'last):\n  File "x.py", line 1\nerrors.UserError: a.png: not an image\n'
    )
    assert wrapped.line() == "a.png: not an image"


def _gathered_gradients(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2
    )
    rows = torch.arange(12.0).reshape(2, 3, 2)[rank].requires_grad_()
    every = distributed.gather_rows(rows)  # (6, 2)
    ((rank + 1) * (every @ every.T).square().sum()).backward()
    torch.save((every.detach(), rows.grad), f"{folder}/rank{rank}.pt")
    torch.distributed.destroy_process_group()


def test_gathered_rows_keep_the_gradients_of_every_process(tmp_path) -> None:
    torch.multiprocessing.start_processes(
        _gathered_gradients, (str(tmp_path),), nprocs=2, start_method="fork"
    )
    every = torch.arange(12.0).reshape(6, 2).requires_grad_()
    (3 * (every @ every.T).square().sum()).backward()  # 1 of rank 0 and 2 of rank 1
    for rank in (0, 1):
        rows, gradient = torch.load(tmp_path / f"rank{rank}.pt")
        assert torch.equal(rows, every.detach())
        torch.testing.assert_close(gradient, every.grad[3 * rank : 3 * rank + 3])


def test_alone_gathering_is_the_tensor_itself() -> None:
    rows = torch.zeros(2, 3)
    assert distributed.gather_rows(rows) is rows


@pytest.mark.parametrize("rank", [0, 1])
def test_who_waits_for_a_process_that_never_comes_waits_so_long_and_no_longer(
    rank: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RANK", str(rank))
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(PeerLost, match=f"process {rank} of 2 did not find the others"):
        distributed.init_processes("cpu", dist_url=f"file://{tmp_path}/meeting", timeout_min=0.01)


@pytest.mark.parametrize("rank", [0, 1])
def test_an_occupied_port_ends_within_the_time_limit(
    rank: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A program that accepts connections and sends nothing listens at the port."""
    with socket.create_server(("127.0.0.1", 0)) as other:
        monkeypatch.setenv("RANK", str(rank))
        monkeypatch.setenv("WORLD_SIZE", "2")
        monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
        monkeypatch.setenv("MASTER_PORT", str(other.getsockname()[1]))
        began = time.monotonic()
        with pytest.raises(PeerLost, match=f"process {rank} of 2 did not find the others"):
            distributed.init_processes("cpu", timeout_min=0.05)
        assert time.monotonic() - began < 3 + distributed.GRACE_S + 5


def _first_freezes(rank: int, folder: str, port: int) -> None:
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": "2"}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    distributed.init_processes("cpu", timeout_min=0.1)
    if rank == 1:
        Path(folder, "ready").touch()
    if rank == 0:  # the store is in this process
        wait_for(Path(folder, "ready"))
        Path(folder, "pid").write_text(str(os.getpid()))
        os.kill(os.getpid(), signal.SIGSTOP)
        return
    wait_for(Path(folder, "pid"))
    began = time.monotonic()
    with pytest.raises(RuntimeError):
        distributed.barrier()
    assert distributed.reported_code() == 0
    assert distributed.first_to_report("words", 1)
    assert time.monotonic() - began < 6 + 2 * distributed.REPORT_S + 5
    Path(folder, "told").touch()
    os.kill(int(Path(folder, "pid").read_text()), signal.SIGKILL)
    os._exit(0)


def test_nobody_waits_for_the_store_of_a_frozen_process(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    with contextlib.suppress(torch.multiprocessing.ProcessExitedException):
        torch.multiprocessing.start_processes(
            _first_freezes, (str(tmp_path), port), nprocs=2, start_method="fork"
        )
    assert (tmp_path / "told").exists()


def _one_falls_asleep(rank: int, folder: str) -> None:
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": "2"}
    awake, told = Path(folder, f"awake{rank}"), Path(folder, "told")
    awake.touch()  # both have torch in memory before the time of one of them runs
    wait_for(Path(folder, f"awake{1 - rank}"))
    distributed.init_processes("cpu", dist_url=f"file://{folder}/meeting", timeout_min=0.1)
    if rank == 1:
        return wait_for(told)
    try:
        distributed.barrier()
    except RuntimeError as error:
        assert distributed.peer_lost_reason(error).startswith("Timed out waiting 6000ms"), error
        told.touch()


def wait_for(file: Path, timeout: float = 120) -> None:
    end = time.monotonic() + timeout
    while not file.exists():
        assert time.monotonic() < end, f"no {file}"
        time.sleep(0.01)


def test_a_collective_in_which_a_process_sleeps_ends_in_an_error(tmp_path: Path) -> None:
    torch.multiprocessing.start_processes(
        _one_falls_asleep, (str(tmp_path),), nprocs=2, start_method="fork"
    )
    assert (tmp_path / "told").exists()


def test_processes_meet_in_a_store_with_tokens_of_dead_processes() -> None:
    store = torch.distributed.HashStore()
    for word in ("token/1", "token/2"):
        store.set(word, "of the dead")
    for _ in range(2):
        with ThreadPoolExecutor(3) as pool:
            met = list(pool.map(lambda rank: distributed._meet(store, rank, 3), range(3)))
        assert not met[0].check(["address"]), "that of the start before"
        met[0].set("address", "127.0.0.1")
        assert met[1].get("address") == met[2].get("address") == b"127.0.0.1"


@pytest.mark.parametrize(
    ("seconds", "late"), [([10] * 8, 0), ([0.1] * 8, 2), ([0.1] * 3 + [30] + [0.1] * 8, 2)]
)
def test_a_stop_signal_acts_at_once_where_updates_are_slow(
    seconds: list[float], late: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On several GPUs; a single slow update, as between two epochs, does not change the lag."""
    now = [0.0]
    monkeypatch.setattr(distributed.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(distributed, "world_size", lambda: 2)
    agree = distributed.Agreement(torch.device("cuda"))
    agree._start = lambda numbers: (numbers, SimpleNamespace(synchronize=int))
    signalled = len(seconds) - 3
    found = []
    for number, passed in enumerate(seconds):
        now[0] += passed
        found.append(agree(15 if number == signalled else 0))
    assert found.index(15) - signalled == late and agree.lag == late


def test_a_stop_signal_waits_for_the_start_of_workers_though_another_thread_receives_it() -> None:
    class Stop(Exception):
        pass

    def stop(number: int, frame: object) -> None:
        raise Stop

    over, is_whole = threading.Event(), False
    other = threading.Thread(target=over.wait)  # does not block the signal
    other.start()
    before = signal.signal(signal.SIGUSR1, stop)
    try:
        with pytest.raises(Stop), distributed.stop_signals_blocked():
            os.kill(os.getpid(), signal.SIGUSR1)
            time.sleep(0.1)
            is_whole = True
        assert is_whole and signal.getsignal(signal.SIGUSR1) is stop
    finally:
        signal.signal(signal.SIGUSR1, before)
        over.set()
        other.join()
