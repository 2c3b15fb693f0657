"""Start `main.py` as a Slurm job, and continue it after a preemption or the time limit.

    python run_with_submitit.py --job_dir DIR --nodes 2 --ngpus 8 --data-path IMAGENET ...

Flags of main.py are passed on. `%j` in --job_dir becomes the job's number. The
checkpoints go to --output_dir, or to --job_dir without it. See docs/cluster.md.
"""

import argparse
import os
import signal
import sys
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import options
from base.errors import UserError
from training.checkpointer import is_auto

ROOT = Path(__file__).resolve().parent
REQUEUE_WAIT_S = 60  # the other tasks wait until the first one has requeued the job


def get_submitit_parser() -> argparse.ArgumentParser:
    """Return the parser of the flags for Slurm; the flags of main.py are not in it."""
    parser = options.Parser(
        "run_with_submitit.py",
        description=__doc__.split("\n")[0],
        allow_abbrev=False,
        epilog="All other flags go to main.py; see python main.py --help.",
    )
    add, add_int = parser.add_argument, partial(parser.add_argument, type=int)
    add_int("--ngpus", default=8, help="GPUs, and tasks, per node; 0: CPU tasks")
    add_int("--tasks-per-node", help="default: --ngpus, or 1 without GPUs")
    add_int("--nodes", default=2)
    add_int("--timeout", default=2800, metavar="MIN", help="time limit in minutes")
    add("--job-dir", default="", help="Slurm's and our output; %%j: the job's number")
    add("--shared-dir", default="", help="folder that all nodes see; default: --job-dir, or ./runs")
    add("--partition", default="learnfair")
    add("--use-volta32", action="store_true", help="--constraint volta32gb")
    for name in ("--constraint", "--comment", "--account", "--qos"):
        add(name, default="", help="passed to sbatch")
    add_int("--cpus-per-task", default=10)
    add_int("--mem-per-gpu", default=40, metavar="GB", help="for each task; 0: do not ask")
    add_int(
        "--signal-delay", default=120, metavar="S", help="from the stop signal to the time limit"
    )
    add_int("--max-timeouts", default=30, help="how often a timed-out job is requeued")
    slurm = "any sbatch parameter, as in --slurm exclusive --slurm nice=100"
    add("--slurm", action="append", default=[], metavar="KEY[=VALUE]", help=slurm)
    return parser


class Trainer:
    """The callable that Slurm runs: a command line of main.py.

    After a preemption Slurm starts the same object again without a call of `checkpoint`. So every
    start resumes from the newest checkpoint.
    """

    def __init__(self, argv: Sequence[str], output_dir: str, shared_dir: str, resume: str) -> None:
        self.argv, self.resume = tuple(argv), resume
        self.output_dir, self.shared_dir = output_dir, shared_dir

    def __call__(self) -> None:
        import submitit

        import main
        from base.errors import EXIT_STOPPED

        job = submitit.JobEnvironment()
        usual = signal.Signals[f"SIG{job.USR_SIG}"]
        requeue = signal.getsignal(usual)  # submitit's handler, which main.py replaces
        received: list[int] = []
        restarts = os.environ.get("SLURM_RESTART_COUNT", "0")
        command = self.command(job.job_id, restarts)
        if job.global_rank == 0:
            remove_old_stores(Path(command[-1].removeprefix("file://")))
        code = main.run(command, on_stop=received.append)
        # SIGTERM is a preemption, after which Slurm requeues by itself, or the user's scancel
        if code == EXIT_STOPPED and received[0] != signal.SIGTERM:
            requeue(usual, None)  # type: ignore[operator, misc]
            time.sleep(REQUEUE_WAIT_S)  # in the other tasks, where an exit counts as a failure
        if code:
            raise SystemExit(code)

    def checkpoint(self) -> object:
        """Return what submitit requeues after a signal: the same run."""
        import submitit

        return submitit.helpers.DelayedSubmission(self)

    def command(self, job_id: str, restarts: str) -> list[str]:
        """Return main.py's command line in this start of the job.

        Every start has its own file of addresses, because that of an earlier start has the
        addresses of ended processes.
        """
        output_dir, shared_dir = (
            Path(folder.replace("%j", job_id)) for folder in (self.output_dir, self.shared_dir)
        )
        shared_dir.mkdir(parents=True, exist_ok=True)
        store = shared_dir / f".meeting-{job_id}-{restarts}"
        own = {"output-dir": output_dir, "resume": self.resume, "dist-url": f"file://{store}"}
        return [*self.argv, *(word for k, v in own.items() for word in (f"--{k}", str(v)))]


def remove_old_stores(current: Path) -> None:
    """Remove the files of addresses of a job's earlier starts."""
    job, _, restarts = current.name.rpartition("-")
    for number in range(int(restarts)):
        current.with_name(f"{job}-{number}").unlink(missing_ok=True)


def slurm_parameters(request: argparse.Namespace) -> dict[str, object]:
    """Return submitit's parameters for a request."""
    tasks = request.tasks_per_node or max(request.ngpus, 1)
    parameters: dict[str, object] = {
        "name": "deit",
        "nodes": request.nodes,
        "tasks_per_node": tasks,
        "cpus_per_task": request.cpus_per_task,
        "timeout_min": request.timeout,
        "slurm_partition": request.partition,
        "slurm_signal_delay_s": request.signal_delay,
        "slurm_setup": [f"export PYTHONPATH={ROOT}:$PYTHONPATH"],
    }
    if request.ngpus:
        parameters["gpus_per_node"] = request.ngpus
    if request.mem_per_gpu:
        parameters["mem_gb"] = request.mem_per_gpu * tasks
    constraint = request.constraint or ("volta32gb" if request.use_volta32 else "")
    strings = {"constraint": constraint, "comment": request.comment}
    strings |= {"account": request.account, "qos": request.qos}
    for name, value in strings.items():
        if value:
            parameters[f"slurm_{name}"] = value
    pairs = (pair.partition("=") for pair in request.slurm)
    extra = {key.replace("-", "_"): value if equals else True for key, equals, value in pairs}
    if extra:
        parameters["slurm_additional_parameters"] = extra
    return parameters


def submit(argv: Sequence[str] | None = None) -> str:
    """Submit the run and return the job's number. Raises UserError for bad flags of main.py too."""
    request, rest = get_submitit_parser().parse_known_args(argv)
    shared = Path(request.shared_dir or "runs").expanduser().absolute()
    job_dir = Path(request.job_dir).expanduser().absolute() if request.job_dir else shared / "%j"
    settings = options.parse_args(rest)
    output_dir = job_dir
    if "output_dir" in settings.explicit:
        output_dir = Path(settings.args.output_dir).expanduser().absolute()
    resume = settings.args.resume
    if not settings.args.eval and not is_auto(resume):
        resume = f"auto:{resume}" if resume else "auto"

    import submitit

    try:
        executor = submitit.AutoExecutor(
            folder=str(job_dir), cluster="slurm", slurm_max_num_timeout=request.max_timeouts
        )
        executor.update_parameters(**slurm_parameters(request))
        trainer = Trainer(
            rest, str(output_dir), str(shared if request.shared_dir else job_dir), resume
        )
        return executor.submit(trainer).job_id
    except (OSError, RuntimeError, submitit.core.utils.FailedJobError) as error:
        reason = " ".join(str(error).split())
        raise UserError(f"Slurm refused the job: {reason}") from error


def main() -> int:
    try:
        print(f"Submitted job {submit()}")
    except UserError as error:
        print(f"error: {error.line()}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
