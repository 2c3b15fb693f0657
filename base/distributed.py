"""Distributed setup and collectives.

A run is started by torchrun, by Slurm (srun, one task per process) or as a single process. The
backend is nccl on GPUs and gloo on CPUs. All functions but `init_processes` also work without a
process group: then there is one process.
"""

import contextlib
import dataclasses
import datetime
import logging
import math
import multiprocessing
import os
import queue
import re
import reprlib
import signal
import threading
import time
import uuid
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from base import terminal
from base.errors import PeerLost, UserError
from base.text import printable

_logger = logging.getLogger(__name__)
REPORTED = "an error was reported"
REPORT_S = 3  # how long a process that ends waits for the store, and for another's report
HOST_S = 1.0  # how long the process with the store waits for the reports of the others
WORKER_END_S = 1  # until a killed worker has ended
GRACE_S = 3  # after --dist-timeout, for torch's own message
SLOW_UPDATE_S = 1.0
LAG = 2  # updates
T = TypeVar("T")


@dataclass(frozen=True)
class Processes:
    """This process among the others. `launcher` is "torchrun", "slurm" or "single"."""

    rank: int
    local_rank: int
    world_size: int
    device: torch.device
    launcher: str

    def describe(self) -> str:
        if self.device.type == "cuda":
            where = torch.cuda.get_device_name(self.device)
        else:
            threads = torch.get_num_threads()
            where = f"{threads} CPU thread{'s' * (threads > 1)}{' each' * (self.world_size > 1)}"
        noun = "process" if self.world_size == 1 else "processes"
        return f"{self.world_size} {noun} ({self.launcher}), {where}"


def find_launcher(environ: Mapping[str, str]) -> tuple[str, int, int, int]:
    """Return (launcher, rank, local_rank, world_size) from environment variables.

    A stray SLURM_PROCID (an interactive shell inside an allocation) does not count: Slurm is the
    launcher only in a job step of more than one task.
    Raises UserError for a value that is not possible.
    """
    if "RANK" in environ or _number(environ, "WORLD_SIZE", 1, least=1) > 1:
        for name, other in (("RANK", "WORLD_SIZE"), ("WORLD_SIZE", "RANK")):
            if name not in environ:
                raise UserError(
                    f"{other}={reprlib.repr(environ[other])} is set in the environment and {name} "
                    "is not; unset it for a single process, or start with torchrun"
                )
        launcher, rank_, local, tasks = "torchrun", "RANK", "LOCAL_RANK", "WORLD_SIZE"
    else:
        launcher, rank_, local, tasks = "slurm", "SLURM_PROCID", "SLURM_LOCALID", "SLURM_NTASKS"
        if "SLURM_STEP_NUM_TASKS" in environ:
            tasks = "SLURM_STEP_NUM_TASKS"
    world = _number(environ, tasks, 1, least=1)
    in_step = environ.get("SLURM_STEP_ID", "").isdigit() and "SLURM_PROCID" in environ
    if launcher == "slurm" and not (in_step and world > 1):
        return "single", 0, 0, 1
    number = _number(environ, rank_, 0)
    if number >= world:
        raise UserError(
            f"{rank_}={number} is set in the environment with {tasks}={world}; ranks are 0 to "
            f"{world - 1}"
        )
    return launcher, number, _number(environ, local, 0), world


def _number(environ: Mapping[str, str], name: str, default: int, *, least: int = 0) -> int:
    text = environ.get(name, str(default))
    if not (text.isascii() and text.isdigit() and len(text) < 10 and int(text) >= least):
        raise UserError(
            f"{name}={reprlib.repr(text)} is set in the environment and must be a whole number of "
            f"at least {least}; unset it, or start with torchrun"
        )
    return int(text)


def pick_device(
    wanted: str, local_rank: int, neighbours: int = 1, *, one_visible: bool = False
) -> torch.device:
    """Return this process's device for `auto`, `cpu`, `cuda` or `cuda:N`.

    neighbours: processes on this node, so that all of them report too few GPUs.
    one_visible: only this process's GPU may be visible, as with `srun --gpus-per-task=1`.
    """
    if wanted == "auto":
        wanted = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(wanted)
    except RuntimeError as error:
        raise UserError(f"--device {wanted}: not a device; use auto, cpu or cuda") from error
    if device.type not in ("cpu", "cuda"):
        raise UserError(f"--device {wanted}: is not supported; use auto, cpu or cuda")
    if device.type == "cpu":
        return device
    if not torch.cuda.is_available():
        raise UserError(f"--device {wanted}: no GPU is visible; use --device cpu or auto")
    count = torch.cuda.device_count()
    if device.index is None and one_visible and count == 1:
        return torch.device("cuda", 0)
    index = device.index if device.index is not None else local_rank
    if index >= count or (device.index is None and neighbours > count):
        raise UserError(
            f"{max(neighbours, index + 1)} processes on this node need a GPU each, only {count} "
            "are visible; start fewer processes per node, or use --device cpu"
        )
    return torch.device("cuda", index)


def init_processes(
    device: str = "auto", *, dist_url: str = "env://", timeout_min: float = 30
) -> Processes:
    """Join the process group, if there is one, and return what this process is in it.

    device: `auto`, `cpu`, `cuda` or `cuda:N`. timeout_min: minutes that the other processes may
        take to start, and later to reach any collective.
    Raises UserError if the device is not there, PeerLost if the others do not start.
    """
    launcher, rank_, local_rank_, world = find_launcher(os.environ)
    neighbours = _number(os.environ, "LOCAL_WORLD_SIZE", 1)
    chosen = pick_device(device, local_rank_, neighbours, one_visible=launcher == "slurm")
    if chosen.type == "cuda":
        torch.cuda.set_device(chosen)
    elif world > 1 and "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(max(1, (os.cpu_count() or 1) // world))
    if launcher == "slurm" and dist_url == "env://" and "MASTER_ADDR" not in os.environ:
        raise UserError(
            "srun does not set the address of the first process: use run_with_submitit.py, set "
            "MASTER_ADDR and MASTER_PORT, or give --dist-url file://FOLDER_OF_ALL_NODES/NEW_FILE"
        )
    if world > 1 and not dist.is_initialized():
        seconds = 60 * timeout_min
        try:
            within(
                seconds + GRACE_S,
                lambda: _join(chosen, dist_url, rank_, world, datetime.timedelta(seconds=seconds)),
            )
        except ValueError as error:
            raise UserError(f"--dist-url {dist_url}: {error}") from error
        except (RuntimeError, TimeoutError) as error:
            raise PeerLost(
                f"process {rank_} of {world} did not find the others: "
                f"{peer_lost_reason(error) or error}"
            ) from error
    return Processes(rank_, local_rank_, world, chosen, launcher)


def _join(
    device: torch.device, dist_url: str, rank: int, world: int, timeout: datetime.timedelta
) -> None:
    on_gpu = device.type == "cuda"
    if on_gpu:
        torch.cuda.set_device(device)  # of this thread
    store = next(dist.rendezvous(dist_url, rank, world, timeout=timeout))[0]
    store.set_timeout(timeout)
    dist.init_process_group(
        backend="nccl" if on_gpu else "gloo",
        store=_meet(store, rank, world),
        rank=rank,
        world_size=world,
        timeout=timeout,
        device_id=device if on_gpu else None,
    )


def within(seconds: float, function: Callable[[], T]) -> T:
    """Return `function()`, or raise TimeoutError after `seconds`.

    It runs in a thread, because torch's store waits without a limit for a frozen process.
    """
    results: queue.Queue[tuple[Any, BaseException | None]] = queue.Queue()

    def call() -> None:
        try:
            results.put((function(), None))
        except BaseException as error:
            results.put((None, error))

    threading.Thread(target=call, daemon=True).start()
    try:
        result, error = results.get(timeout=seconds)
    except queue.Empty:
        raise TimeoutError(f"no response in {seconds:.0f} s") from None
    if error is not None:
        raise error
    return result


def data_parallel(module: nn.Module, example: Tensor) -> nn.Module:
    """Wrap `module` in DDP, with the final layout of the gradients.

    DDP changes the layout after the first backward pass. The layout decides in which order three
    or more processes add up a number. So one pass over `example` is made here, in evaluation mode,
    which changes no weights. A resumed run then computes the same bits as an uninterrupted one.
    """
    device_ids = [example.device.index] if example.is_cuda else None
    wrapped = nn.parallel.DistributedDataParallel(module, device_ids=device_ids)
    was_training = module.training
    module.eval()
    sum(output.float().sum() for output in _tensors_in(wrapped(example))).backward()
    module.zero_grad(set_to_none=True)
    module.train(was_training)
    return wrapped


def _tensors_in(output: Any) -> list[Tensor]:
    """Return the tensors with a gradient in what a module returned, nested as it may be."""
    if isinstance(output, Tensor):
        return [output] if output.requires_grad else []
    if dataclasses.is_dataclass(output):
        output = list(vars(output).values())
    elif isinstance(output, Mapping):
        output = list(output.values())
    if not isinstance(output, list | tuple):
        return []
    return [tensor for part in output for tensor in _tensors_in(part)]


def shutdown() -> None:
    """Leave the process group, if one was joined."""
    if dist.is_initialized():
        dist.destroy_process_group()


def _meet(store: dist.Store, rank: int, world: int) -> dist.Store:
    """Return a part of `store` that only the processes of this start use.

    torchrun keeps one store through all restarts, with the addresses of processes that have died;
    a process that reads an old address waits for it. No environment variable numbers the starts:
    on several nodes each counts its own restarts. So each process writes a random token to the
    store. The first process replies to each token with the name of this start. All use the part of
    that name.
    """
    name = uuid.uuid4().hex
    if rank > 0:
        store.set(f"token/{rank}", name)
        start = store.get(f"start/{name}").decode()
        store.set(f"{start}/{rank}", "here")
        return dist.PrefixStore(start, store)
    missing = list(range(1, world))
    end = time.monotonic() + store.timeout.total_seconds()
    while missing := [other for other in missing if not store.check([f"{name}/{other}"])]:
        for other in missing:
            if store.check([f"token/{other}"]):  # the token of a dead process does no harm
                store.set(f"start/{store.get(f'token/{other}').decode()}", name)
        if time.monotonic() > end:
            raise PeerLost(f"{len(missing)} did not start, process {missing[0]} among them")
        time.sleep(0.02)
    return dist.PrefixStore(name, store)


def peer_lost_reason(error: Exception) -> str:
    """Return the reason why a process failed, or "" if `error` is no error of another process."""
    if isinstance(error, PeerLost | dist.DistError) or "gloo/" in str(error):
        line = re.sub(r"^\[\S+\] ", "", str(error)).partition("\n")[0]  # gloo begins with its file
        return line.partition(". This is typically")[0]
    return ""


STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2, signal.SIGINT)


@contextlib.contextmanager
def stop_signals_blocked() -> Iterator[None]:
    """Block the stop signals in the block, and in every process that starts in it.

    A DataLoader worker inherits the mask, so a stop signal cannot end it before
    `leave_signals_to_parent` has run. This process handles a signal after the block. The mask alone
    does not delay it: another thread may receive the signal, and Python calls the handler in the
    main thread. A handler that raises an error would then leave a worker that is not in the list of
    children.
    """
    if not hasattr(signal, "pthread_sigmask"):
        yield
        return
    received: list[int] = []
    is_main_thread = threading.current_thread() is threading.main_thread()
    before = signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
    handlers = {
        number: signal.signal(number, lambda number, frame: received.append(number))
        for number in (STOP_SIGNALS if is_main_thread else ())
    }
    try:
        yield
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler or signal.SIG_DFL)  # None: set outside of Python
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
        for number in dict.fromkeys(received):
            signal.raise_signal(number)


def leave_signals_to_parent(worker: int) -> None:
    """Make a DataLoader worker ignore the stop signals of a run.

    Slurm and terminals send them to every process, and the run still needs its workers to finish
    the step. A SIGTERM from the parent itself still ends the worker.
    """
    for number in (signal.SIGUSR1, signal.SIGUSR2, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)
    if not hasattr(signal, "sigwaitinfo"):
        return
    signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM])

    def wait() -> None:
        while signal.sigwaitinfo([signal.SIGTERM]).si_pid != os.getppid():
            pass
        os._exit(0)

    threading.Thread(target=wait, daemon=True).start()


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def is_main() -> bool:
    return rank() == 0


def print_once(subject: str | None, line: str) -> None:
    """Print a line in the first process alone, after "subject: " if there is one.

    In a training run on a terminal it goes to the log file; see `base/terminal.py`.
    """
    if is_main():
        text = f"{subject}: {line}" if subject else line
        terminal.detail(printable(text, keep="\n\t"))


def print_important(line: str) -> None:
    """Print a line in the first process alone, on a terminal above the table of the run."""
    if is_main():
        terminal.important(printable(line, keep="\n\t"))


def barrier() -> None:
    """Wait for all processes."""
    if dist.is_initialized():
        dist.barrier()


def all_reduce_sum(tensor: Tensor) -> Tensor:
    """Return the sum over all processes of a detached tensor, same shape; one process: itself."""
    if not dist.is_initialized():
        return tensor
    total = tensor.detach().clone()
    dist.all_reduce(total)
    return total


class _AllGather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tensor: Tensor) -> Tensor:
        parts = [torch.empty_like(tensor) for _ in range(world_size())]
        dist.all_gather(parts, tensor.contiguous())
        return torch.cat(parts)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return all_reduce_sum(gradient.contiguous()).chunk(world_size())[rank()]


def gather_rows(tensor: Tensor) -> Tensor:
    """Return the rows of all processes, (B, ...) each, in the order of ranks; gradients are kept.

    A row's gradient is the sum over all processes. One process: the tensor itself.
    """
    return _AllGather.apply(tensor) if dist.is_initialized() else tensor


def any_rank(flag: Tensor) -> Tensor:
    """Return, on the device, whether `flag` (bool, any shape) is true in any process."""
    if not dist.is_initialized():
        return flag
    agreed = flag.to(torch.uint8)
    dist.all_reduce(agreed, op=dist.ReduceOp.MAX)
    return agreed.bool()


def broadcast(tensor: Tensor) -> Tensor:
    """Return the first process's `tensor`, of one shape, in all of them; it may be overwritten."""
    if dist.is_initialized():
        dist.broadcast(tensor, src=0)
    return tensor


def all_gather(tensor: Tensor) -> Tensor:
    """Return the tensors of all processes, of the same shape, stacked in a new first axis."""
    if not dist.is_initialized():
        return tensor[None]
    parts = [torch.empty_like(tensor) for _ in range(world_size())]
    dist.all_gather(parts, tensor.contiguous())
    return torch.stack(parts)


def broadcast_object(value: Any, source: int = 0) -> Any:
    """Return the `value` (picklable) of the process `source` in every process."""
    if not dist.is_initialized():
        return value
    box = [value]
    dist.broadcast_object_list(box, src=source)
    return box[0]


def on_main(function: Callable[[], T]) -> T:
    """Run `function` in the first process; all return its result or raise its UserError."""
    result: Any = None
    if is_main():
        try:
            result = function()
        except UserError as error:
            result = error
    result = broadcast_object(result)
    if isinstance(result, UserError):
        raise result
    return result


class Agreement:
    """All-reduce (max) of a small integer, without blocking the device.

    On a GPU the result is that of `LAG` calls ago, so that the host does not wait for work that
    was only just queued. While updates are slow (`SLOW_UPDATE_S`), and at first, there is no lag.
    """

    def __init__(self, device: torch.device) -> None:
        self._queue: deque[tuple[Tensor, torch.cuda.Event]] = deque()
        self.device, self.lag = device, 0
        self._called_at = -math.inf

    def __call__(self, number: int) -> int:
        if world_size() == 1:
            return number
        now = time.monotonic()
        slow, self._called_at = now - self._called_at > SLOW_UPDATE_S, now
        numbers = torch.tensor([number, slow], dtype=torch.int32)
        if self.device.type != "cuda":
            dist.all_reduce(numbers, op=dist.ReduceOp.MAX)
            return int(numbers[0])
        self._queue.append(self._start(numbers))
        largest = 0
        while len(self._queue) > self.lag:
            on_host, ready = self._queue.popleft()
            ready.synchronize()
            largest = max(largest, int(on_host[0]))
            self.lag = 0 if on_host[1] else LAG
        return largest

    def _start(self, numbers: Tensor) -> tuple[Tensor, torch.cuda.Event]:
        """Return the result in pinned memory, and the event after which it is there."""
        numbers = numbers.pin_memory().to(self.device, non_blocking=True)
        dist.all_reduce(numbers, op=dist.ReduceOp.MAX)
        on_host = torch.empty(2, dtype=torch.int32, pin_memory=True)
        on_host.copy_(numbers, non_blocking=True)
        ready = torch.cuda.Event()
        ready.record()
        return on_host, ready


@contextlib.contextmanager
def main_first() -> Iterator[None]:
    """Run the block first in rank 0 and then in the others: for downloads into a cache."""
    if not is_main():
        barrier()
    try:
        yield
    finally:
        if is_main():
            barrier()


def first_to_report(message: str, code: int) -> bool:
    """Return whether this process is the first with `message`, so that it is printed once.

    code: its exit code. If the store does not respond the message is printed in any case.
    """
    if not dist.is_initialized():
        try:
            return find_launcher(os.environ)[1] == 0
        except UserError:
            return True

    def report() -> bool:
        store = dist.distributed_c10d._get_default_store()
        first = store.add(f"reported/{message}", 1) == 1
        store.set(REPORTED, str(code))
        if rank() == 0 and "TORCHELASTIC_RUN_ID" not in os.environ:  # it has the store
            time.sleep(HOST_S)
        return first

    return _from_store(report, True)


def reported_code() -> int:
    """Return the exit code of another process that has reported an error, or 0.

    Its connection may break before its report arrives, so this waits for `REPORT_S`.
    """
    if not dist.is_initialized():
        return 0

    def look() -> int:
        store, end = dist.distributed_c10d._get_default_store(), time.monotonic() + REPORT_S - 0.5
        while time.monotonic() < end:
            if store.check([REPORTED]):
                return int(store.get(REPORTED))
            time.sleep(0.1)
        return 0

    return _from_store(look, 0)


def _from_store(read: Callable[[], T], default: T) -> T:
    """Return the result of `read`, or `default` if the store does not respond."""
    try:
        return within(REPORT_S, read)
    except (RuntimeError, ValueError, AttributeError, TimeoutError):
        return default


def kill_workers() -> None:
    """Kill this process's DataLoader workers, because the exit waits for a stopped one."""
    workers = multiprocessing.active_children()
    with worker_errors_blocked():
        for worker in workers:
            worker.kill()
        for worker in workers:
            worker.join(WORKER_END_S)


@contextlib.contextmanager
def worker_errors_blocked() -> Iterator[None]:
    """Block the error that torch's signal handler raises when a DataLoader worker has died."""
    if threading.current_thread() is not threading.main_thread():  # the handler runs there
        yield
        return
    before = signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    try:
        yield
    finally:
        signal.signal(signal.SIGCHLD, before or signal.SIG_DFL)
