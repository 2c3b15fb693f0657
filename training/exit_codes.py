"""Exit codes of a run, and the one line that an error prints.

0 done; 1 a fault (a process or a DataLoader worker died, or the GPU is out of memory); 2 a user
error; 75 stopped by a signal after saving; 130 Ctrl-C.
"""

import sys
from collections.abc import Callable
from signal import Signals

from base import distributed
from base.distributed import print_once
from base.errors import EXIT_FAULT, EXIT_STOPPED, PeerLost, Stopped, UserError

EXIT_USER_ERROR = 2
EXIT_CTRL_C = 128 + Signals.SIGINT


def exit_code_of(run: Callable[[], object], on_stop: Callable[[int], None]) -> int:
    """Call `run` and return its exit code, after the line of its error if it has one.

    on_stop: called with the number of the signal that stopped the run.
    Raises errors that are none of the above.
    """
    try:
        run()
    except KeyboardInterrupt:
        print_once(None, "Interrupted; --resume auto goes on from the last checkpoint")
        return EXIT_CTRL_C
    except UserError as error:
        if distributed.first_to_say(error.line(), code=EXIT_USER_ERROR):
            print(f"error: {error.line()}", file=sys.stderr, flush=True)
        return EXIT_USER_ERROR  # without shutdown: another process may wait in a collective
    except Stopped as stop:
        name = Signals(stop.signal_number).name
        print_once(None, f"Stopped by {name}; --resume auto goes on from here")
        distributed.shutdown()
        on_stop(stop.signal_number)
        return EXIT_STOPPED
    except (RuntimeError, ConnectionError, EOFError) as error:
        if code := distributed.said_by_another():  # it has left, so a collective failed here
            return code
        what, line = describe_fault(error)
        if isinstance(error, PeerLost) or distributed.first_to_say(what, code=EXIT_FAULT):
            print(f"error: {line}", file=sys.stderr, flush=True)
        return EXIT_FAULT
    distributed.shutdown()
    return 0


def describe_fault(error: Exception) -> tuple[str, str]:
    """Return what happened, the same words in all processes, and the whole line with advice.

    Raises `error` itself if it is none of the known faults.
    """
    reason = " ".join(str(error).split())
    if lost := distributed.peer_lost_reason(error):
        what, reason = "a process of this run has died or does not answer", lost
        advice = "--resume auto goes on; if one is only slow, raise --dist-timeout"
    elif "DataLoader timed out" in reason:
        what = "a DataLoader worker brings nothing"
        advice = "does its disk still answer? --resume auto goes on; see --loader-timeout"
    elif "DataLoader worker" in reason or not isinstance(error, RuntimeError):
        what = "a DataLoader worker is gone"
        advice = "was the memory full? Use fewer --num-workers; --resume auto goes on"
    else:
        raise error
    return what, f"{what} ({reason}); {advice}"
