"""Exit codes of a run, and the one line that an error prints.

0 done; 1 a fault (a process or a DataLoader worker died); 2 a user error, also too little memory
for the batch; 75 stopped by a signal, after saving if there was anything to save; 130 Ctrl-C.
"""

import contextlib
import io
import os
import shlex
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from signal import Signals

import torch

from base import distributed
from base.distributed import print_once
from base.errors import EXIT_FAULT, EXIT_STOPPED, PeerLost, Stopped, UserError
from models import plugins
from training import signals

EXIT_USER_ERROR = 2
EXIT_CTRL_C = 128 + Signals.SIGINT
# Errors of a stop before training. Their frames may own a loader and a lock that it would wait for
# when it is freed.
_kept_errors: list[BaseException] = []


def exit_code_of(
    run: Callable[[], object], on_stop: Callable[[int], None], argv: Sequence[str] | None = None
) -> int:
    """Call `run` and return its exit code, after the line of its error if it has one.

    on_stop: called with the number of the signal that stopped the run. argv: the command line,
    None for that of this process. Raises all other errors.
    """
    with signals.raised(lambda number: os._exit(_stop_early(number))) as early:
        try:
            run()
        except (Exception, KeyboardInterrupt) as error:
            with distributed.worker_errors_blocked():  # a dead worker may be noticed twice
                number = early.number or Signals.SIGINT * isinstance(error, KeyboardInterrupt)
                if number:
                    _kept_errors.append(error)
                    code = _stop_early(number)
                    on_stop(number)
                    return code
                return _code_of_error(error, on_stop, argv)
    distributed.shutdown()
    return 0


def _stop_early(number: int) -> int:
    """Print that a signal has stopped the run outside of training; return the exit code."""
    distributed.kill_workers()
    line = f"Stopped by {Signals(number).name} before there was anything to save"
    code = EXIT_CTRL_C if number == Signals.SIGINT else EXIT_STOPPED
    if distributed.first_to_report(line, code=code):
        print(f"{line}; start the same command again", flush=True)
    return code  # without shutdown: another process may wait in a collective


def _code_of_error(
    error: BaseException, on_stop: Callable[[int], None], argv: Sequence[str] | None
) -> int:
    """Print the line of an error and return its exit code. Raises an unknown error again."""
    if line := plugins.line_of(error):
        error = UserError(line)
    if isinstance(error, UserError):
        if distributed.first_to_report(error.line(), code=EXIT_USER_ERROR):
            print(f"error: {error.line()}", file=sys.stderr, flush=True)
        return EXIT_USER_ERROR  # without shutdown: another process may wait in a collective
    if isinstance(error, Stopped):
        name = Signals(error.signal_number).name
        how = f"saved; to continue: {resume_command(argv, error.folder)}"
        if not error.folder:
            how = "nothing was saved, because --output_dir is empty"
        print_once(None, f"Stopped by {name}; {how}")
        distributed.shutdown()
        on_stop(error.signal_number)
        return EXIT_CTRL_C if error.signal_number == Signals.SIGINT else EXIT_STOPPED
    distributed.kill_workers()
    if code := distributed.reported_code():  # it has ended, so a collective failed here
        return code
    what, line = describe_fault(error)
    if isinstance(error, PeerLost) or distributed.first_to_report(what, code=EXIT_FAULT):
        print(f"error: {line}", file=sys.stderr, flush=True)
    return EXIT_FAULT


def end_program(code: int) -> None:
    """End this process with an exit code, at once if it is not 0."""
    sys.stdout.flush()
    sys.stderr.flush()
    if code:  # without waiting for a worker or a thread that does not respond
        os._exit(code)


def resume_command(argv: Sequence[str] | None, folder: str) -> str:
    """Return the command that continues the run of a command line in `folder`."""
    flags = list(sys.argv[1:] if argv is None else argv)
    kept = []
    while flags:
        flag = flags.pop(0)
        if flag == "--resume":
            flags = flags[1:]
        elif not flag.startswith("--resume="):
            kept.append(flag)
    if not any(word.startswith("--out") for word in kept):
        kept += ["--output-dir", folder]
    program = ["python", "main.py"]
    if "LOCAL_WORLD_SIZE" in os.environ:  # set by torchrun
        program = ["torchrun", f"--nproc_per_node={os.environ['LOCAL_WORLD_SIZE']}", "main.py"]
    return shlex.join([*program, *kept, "--resume", "auto"])


@contextlib.contextmanager
def user_errors_about_batch_size(batch_size: int) -> Iterator[None]:
    """Turn a batch of `batch_size` that is too large or too small into a UserError with advice."""
    try:
        yield
    except ValueError as error:
        if "Expected more than 1 value per channel" not in str(error):
            raise
        raise UserError(
            f"--batch-size {batch_size}: BatchNorm in the model needs more than one value per "
            "channel in training; use --batch-size 2 or more, or a larger --input-size"
        ) from error
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        reason = " ".join(str(error).split("Original Traceback")[-1].split())
        raise UserError(
            f"--batch-size {batch_size}: does not fit into memory ({reason[:200]}); use a smaller "
            "one with more --grad-accum-steps, or --grad-checkpointing; see --dry-run"
        ) from error


def is_out_of_memory(error: RuntimeError) -> bool:
    """Return whether a GPU, pinned memory or a CPU had too little memory."""
    if isinstance(error, torch.OutOfMemoryError):
        return True
    return any(
        words in str(error) for words in ("CUDA error: out of memory", "DefaultCPUAllocator")
    )


class StopWhenClosed(io.TextIOWrapper):
    """Standard output that ends the program when its reader has closed it.

    During training the run is saved and ends as on SIGTERM. Otherwise the program ends at once.
    """

    def write(self, text: str) -> int:
        try:
            return super().write(text)
        except BrokenPipeError:
            self._stop()
            return len(text)

    def flush(self) -> None:
        try:
            super().flush()
        except BrokenPipeError:
            self._stop()

    def _stop(self) -> None:
        os.dup2(os.open(os.devnull, os.O_WRONLY), self.fileno())
        handler = signal.getsignal(signal.SIGTERM)
        if handler is signal.SIG_DFL or isinstance(handler, signals.RaiseStop):
            os._exit(0)
        signal.raise_signal(signal.SIGTERM)

    @classmethod
    def install(cls) -> None:
        """Replace sys.stdout."""
        old = sys.stdout
        options = {"encoding": old.encoding, "errors": old.errors}
        sys.stdout = cls(old.detach(), line_buffering=old.line_buffering, **options)


def describe_fault(error: Exception) -> tuple[str, str]:
    """Return what happened, the same words in all processes, and the whole line with advice.

    The death of a worker is raised in the middle of other code, for example while a file is
    written. Closing that file can raise another error, so the errors in `__context__` are examined
    too. Raises `error` itself if none of them is a known fault.
    """
    raised: BaseException | None = error
    while raised is not None:
        if isinstance(raised, RuntimeError | ConnectionError | EOFError) and (
            fault := _known_fault(raised)
        ):
            return fault
        raised = raised.__cause__ or raised.__context__
    raise error


def _known_fault(error: RuntimeError | ConnectionError | EOFError) -> tuple[str, str] | None:
    reason = " ".join(str(error).split())
    if failed := distributed.peer_lost_reason(error):
        what, reason = "a process of this run has died or does not respond", failed
        advice = "continue with --resume auto; if one is only slow, raise --dist-timeout"
    elif "DataLoader timed out" in reason:
        what = "a DataLoader worker returns no batch"
        advice = "is its disk available? Continue with --resume auto; see --loader-timeout"
    elif "DataLoader worker" in reason or not isinstance(error, RuntimeError):
        what = "a DataLoader worker has died"
        advice = "was the memory full? Use fewer --num-workers; continue with --resume auto"
    else:
        return None
    return what, f"{what} ({reason}); {advice}"
