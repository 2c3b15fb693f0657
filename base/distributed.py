"""Processes: how they find each other, who is first, and what they tell one another.

Started by torchrun, by Slurm (srun, one task per process) or alone. nccl on GPUs, gloo on CPUs.
All functions but `init_processes` also work when nothing was initialised: then the world is one.
"""

import contextlib
import dataclasses
import datetime
import logging
import os
import re
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

from base.errors import PeerLost, UserError

_logger = logging.getLogger(__name__)
SAID = "somebody has said it"
LAST_WORDS_S = 3  # how long a dying process waits for another's words, and for the store
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
            where = f"{torch.get_num_threads()} CPU threads each"
        noun = "process" if self.world_size == 1 else "processes"
        return f"{self.world_size} {noun} ({self.launcher}), {where}"


def find_launcher(environ: Mapping[str, str]) -> tuple[str, int, int, int]:
    """Return (launcher, rank, local_rank, world_size) as the environment tells them.

    A stray SLURM_PROCID (an interactive shell inside an allocation) is not a launch: Slurm counts
    only when a job step of more than one task is running.
    """
    if "RANK" in environ and "WORLD_SIZE" in environ:
        return (
            "torchrun",
            int(environ["RANK"]),
            int(environ.get("LOCAL_RANK", 0)),
            int(environ["WORLD_SIZE"]),
        )
    tasks = int(environ.get("SLURM_STEP_NUM_TASKS", environ.get("SLURM_NTASKS", 1)))
    in_step = environ.get("SLURM_STEP_ID", "").isdigit()
    if "SLURM_PROCID" in environ and in_step and tasks > 1:
        return "slurm", int(environ["SLURM_PROCID"]), int(environ.get("SLURM_LOCALID", 0)), tasks
    return "single", 0, 0, 1


def pick_device(wanted: str, local_rank: int, neighbours: int = 1) -> torch.device:
    """Turn `auto`, `cpu`, `cuda` or `cuda:N` into this process's device.

    neighbours: processes on this node, so that all of them see that the GPUs are too few.
    """
    if wanted == "auto":
        wanted = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(wanted)
    except RuntimeError as error:
        raise UserError(f"--device {wanted}: not a device; use auto, cpu or cuda") from error
    if device.type != "cuda":
        return device
    if not torch.cuda.is_available():
        raise UserError(f"--device {wanted}: no GPU is visible; use --device cpu or auto")
    index = device.index if device.index is not None else local_rank
    count = torch.cuda.device_count()
    if index >= count or (device.index is None and neighbours > count):
        raise UserError(
            f"{max(neighbours, index + 1)} processes on this node want a GPU each, only {count} "
            "are visible; start fewer processes per node, or use --device cpu"
        )
    return torch.device("cuda", index)


def init_processes(
    device: str = "auto", *, dist_url: str = "env://", timeout_min: float = 30
) -> Processes:
    """Join the process group, if there is one, and return this process's place in it.

    device: `auto`, `cpu`, `cuda` or `cuda:N`. timeout_min: minutes that the others may take to
        come, and then to any collective.
    Raises UserError if the device is not there, Lost if the others do not come.
    """
    launcher, rank_, local_rank_, world = find_launcher(os.environ)
    place = pick_device(device, local_rank_, int(os.environ.get("LOCAL_WORLD_SIZE", 1)))
    if place.type == "cuda":
        torch.cuda.set_device(place)
    elif world > 1 and "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(max(1, (os.cpu_count() or 1) // world))
    if launcher == "slurm" and dist_url == "env://" and "MASTER_ADDR" not in os.environ:
        raise UserError(
            "srun does not tell where the first process is: use run_with_submitit.py, set "
            "MASTER_ADDR and MASTER_PORT, or give --dist-url file://FOLDER_OF_ALL_NODES/NEW_FILE"
        )
    if world > 1 and not dist.is_initialized():
        timeout = datetime.timedelta(minutes=timeout_min)
        try:
            store = next(dist.rendezvous(dist_url, rank_, world, timeout=timeout))[0]
            store.set_timeout(timeout)
            dist.init_process_group(
                backend="nccl" if place.type == "cuda" else "gloo",
                store=_meet(store, rank_, world),
                rank=rank_,
                world_size=world,
                timeout=timeout,
                device_id=place if place.type == "cuda" else None,
            )
        except ValueError as error:
            raise UserError(f"--dist-url {dist_url}: {error}") from error
        except RuntimeError as error:
            raise PeerLost(
                f"process {rank_} of {world} did not find the others: "
                f"{peer_lost_reason(error) or error}"
            ) from error
    return Processes(rank_, local_rank_, world, place, launcher)


def data_parallel(module: nn.Module, example: Tensor) -> nn.Module:
    """Wrap `module` in DDP, with the gradients already in the order that they will keep.

    DDP lays out its gradients anew after the first backward pass, and the place of a number
    decides in which order three or more processes add it up. A pass over `example` beforehand
    (in evaluation mode, which changes nothing) gives a resumed run the layout of one that was not
    stopped, and so the same bits.
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
    """Return a part of `store` that only the processes of this start know.

    torchrun lends its processes one store for all restarts, in which the addresses of those that
    died are still to be found; who takes an old one waits for the dead. No variable tells the
    starts apart: on several nodes each counts its own restarts. So everyone greets with a word
    that is new, the first process answers each greeting with the name of this start, and goes on
    when all have come to that name.
    """
    name = uuid.uuid4().hex
    if rank > 0:
        store.set(f"greeting/{rank}", name)
        start = store.get(f"answer/{name}").decode()
        store.set(f"{start}/{rank}", "here")
        return dist.PrefixStore(start, store)
    missing = list(range(1, world))
    end = time.monotonic() + store.timeout.total_seconds()
    while missing := [other for other in missing if not store.check([f"{name}/{other}"])]:
        for other in missing:
            if store.check([f"greeting/{other}"]):  # perhaps that of a dead one: harmless
                store.set(f"answer/{store.get(f'greeting/{other}').decode()}", name)
        if time.monotonic() > end:
            raise PeerLost(f"{len(missing)} have not come, number {missing[0]} among them")
        time.sleep(0.02)
    return dist.PrefixStore(name, store)


def peer_lost_reason(error: Exception) -> str:
    """Return in few words how another process was lost, or "" where `error` says no such thing."""
    if isinstance(error, PeerLost | dist.DistError) or "gloo/" in str(error):
        line = re.sub(r"^\[\S+\] ", "", str(error)).partition("\n")[0]  # gloo begins with its file
        return line.partition(". This is typically")[0]
    return ""


def leave_signals_to_parent(worker: int) -> None:
    """Let a DataLoader's worker live through the signals that ask a run to stop.

    Slurm and terminals send them to every process; a worker that obeyed would end the step that
    the run wants to finish. A SIGTERM from the parent itself still ends it.
    """
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    signal.signal(signal.SIGUSR2, signal.SIG_IGN)
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
    """Print a line in the first process alone, after "subject: " if there is one."""
    if is_main():
        print(f"{subject}: {line}" if subject else line, flush=True)


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
    """Run `function` in the first process alone; all return its answer or raise its UserError."""
    answer: Any = None
    if is_main():
        try:
            answer = function()
        except UserError as error:
            answer = error
    answer = broadcast_object(answer)
    if isinstance(answer, UserError):
        raise answer
    return answer


class Agreement:
    """The largest wish of all processes, the same answer in all of them at the same call.

    On a GPU the answer is that to the wishes of `LAG` calls ago, so that nobody waits for work
    that was only just queued. One process alone has its wish at once, without any work.
    """

    LAG = 2

    def __init__(self, device: torch.device) -> None:
        self._asked: deque[tuple[Tensor, torch.cuda.Event]] = deque()
        self.device = device

    def __call__(self, wish: int) -> int:
        if world_size() == 1:
            return wish
        wishes = torch.full((), wish, dtype=torch.int32, device=self.device)
        dist.all_reduce(wishes, op=dist.ReduceOp.MAX)
        if self.device.type != "cuda":
            return int(wishes)
        answer = torch.empty((), dtype=torch.int32, pin_memory=True)
        answer.copy_(wishes, non_blocking=True)
        ready = torch.cuda.Event()
        ready.record()
        self._asked.append((answer, ready))
        if len(self._asked) <= self.LAG:
            return 0
        answer, ready = self._asked.popleft()
        ready.synchronize()
        return int(answer)


@contextlib.contextmanager
def main_first() -> Iterator[None]:
    """Let rank 0 run the block first and the others after it: for downloads into a cache."""
    if not is_main():
        barrier()
    try:
        yield
    finally:
        if is_main():
            barrier()


def first_to_say(message: str, code: int) -> bool:
    """Return whether this process is the first to bring `message`, so that it is printed once.

    code: the exit code that belongs to it. When nobody can be asked, the answer is yes: a line
    printed twice is better than none.
    """
    if not dist.is_initialized():
        return find_launcher(os.environ)[1] == 0
    try:
        store = _last_words()
        first = store.add(f"said/{message}", 1) == 1
        store.set(SAID, str(code))
        return first
    except (RuntimeError, ValueError, AttributeError):
        time.sleep(rank() * 0.01)
        return True


def said_by_another() -> int:
    """Return the exit code of another process that has brought an error to the user, or 0."""
    if not dist.is_initialized():
        return 0
    end = time.monotonic() + LAST_WORDS_S  # its connection may break before its words arrive
    while time.monotonic() < end:
        try:
            store = _last_words()
            if store.check([SAID]):
                return int(store.get(SAID))
        except (RuntimeError, ValueError, AttributeError):
            return 0
        time.sleep(0.1)
    return 0


def _last_words() -> dist.Store:
    """Return the group's store, in which nobody waits long any more."""
    store = dist.distributed_c10d._get_default_store()
    store.set_timeout(datetime.timedelta(seconds=LAST_WORDS_S))
    return store
