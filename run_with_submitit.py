"""Slurm: ask for nodes, start `main.py` on them, requeue when time runs out.

    python run_with_submitit.py --job_dir DIR --nodes 2 --ngpus 8 --data-path IMAGENET ...

takes every flag of main.py besides its own. `%j` in --job_dir becomes the job's number. The
checkpoints go to --output_dir, or to --job_dir when none is given.
"""

import argparse
import os
import sys
import uuid
from collections.abc import Sequence
from pathlib import Path

import options
from errors import UserError


def get_submitit_parser() -> argparse.ArgumentParser:
    """Return the parser of the request to Slurm; main.py's own flags are left over by it."""
    parser = options.Parser("run_with_submitit.py", description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("--ngpus", default=8, type=int, help="GPUs, and tasks, per node; 0: CPU tasks")
    add("--tasks-per-node", default=None, type=int, help="default: --ngpus, or 1 without GPUs")
    add("--nodes", default=2, type=int)
    add("--timeout", default=2800, type=int, metavar="MIN", help="time limit in minutes")
    add("--job-dir", default="", help="Slurm's and our output; %%j: the job's number")
    add("--shared-dir", default="", help="a folder all nodes see; default: under --job_dir")
    add("--partition", default="learnfair")
    add("--use-volta32", action="store_true", help="--constraint volta32gb")
    add("--constraint", default="")
    add("--comment", default="", help="comment of the job")
    add("--account", default="")
    add("--qos", default="")
    add("--cpus-per-task", default=10, type=int)
    add("--mem-per-gpu", default=40, type=int, metavar="GB", help="memory for each task")
    add("--signal-delay", default=120, type=int, metavar="S",
        help="seconds before the time limit at which the job is told to stop")  # fmt: skip
    add("--max-timeouts", default=30, type=int, help="how often a timed-out job is requeued")
    add("--slurm", action="append", default=[], metavar="KEY=VALUE", help="any sbatch parameter")
    return parser


class Trainer:
    """The callable that Slurm runs. It holds the command line, never anything a run has changed.

    On preemption Slurm starts this very object again, so the run looks for its checkpoint itself.
    """

    def __init__(self, argv: Sequence[str], output_dir: str) -> None:
        self.argv = tuple(argv)
        self.output_dir = output_dir

    def __call__(self) -> None:
        import submitit

        import main

        job = submitit.JobEnvironment()
        os.environ.update(
            RANK=str(job.global_rank), LOCAL_RANK=str(job.local_rank),
            WORLD_SIZE=str(job.num_tasks), MASTER_ADDR=job.hostnames[0],
            MASTER_PORT=str(10_000 + int(job.job_id.split("_")[0]) % 50_000),
        )  # fmt: skip
        code = main.run(self.command(job.job_id))
        if code:
            raise SystemExit(code)

    def checkpoint(self) -> object:
        """What submitit submits again when the time limit is near: the same run."""
        import submitit

        return submitit.helpers.DelayedSubmission(Trainer(self.argv, self.output_dir))

    def command(self, job_id: str) -> list[str]:
        """Return main.py's command line, with the output folder and the newest checkpoint."""
        folder = Path(self.output_dir.replace("%j", job_id))
        words = [*self.argv, "--output_dir", str(folder)]
        if (folder / "checkpoint.pth").exists():
            words += ["--resume", str(folder / "checkpoint.pth")]
        return words


def slurm_parameters(request: argparse.Namespace) -> dict[str, object]:
    """Return submitit's parameters for a request. Raises UserError for a bad --slurm pair."""
    tasks = request.tasks_per_node or max(request.ngpus, 1)
    parameters: dict[str, object] = {
        "name": "deit",
        "nodes": request.nodes,
        "tasks_per_node": tasks,
        "cpus_per_task": request.cpus_per_task,
        "mem_gb": request.mem_per_gpu * tasks,
        "timeout_min": request.timeout,
        "slurm_partition": request.partition,
        "slurm_signal_delay_s": request.signal_delay,
    }
    if request.ngpus:
        parameters["gpus_per_node"] = request.ngpus
    constraint = request.constraint or ("volta32gb" if request.use_volta32 else "")
    for name, value in (("constraint", constraint), ("comment", request.comment),
                        ("account", request.account), ("qos", request.qos)):  # fmt: skip
        if value:
            parameters[f"slurm_{name}"] = value
    extra = {}
    for pair in request.slurm:
        key, equals, value = pair.partition("=")
        if not equals:
            raise UserError(f"--slurm {pair}: write KEY=VALUE, as in --slurm exclusive=1")
        extra[key.replace("-", "_")] = value
    if extra:
        parameters["slurm_additional_parameters"] = extra
    return parameters


def submit(argv: Sequence[str] | None = None) -> str:
    """Submit the run and return the job's number. Bad flags of main.py are refused here."""
    request, rest = get_submitit_parser().parse_known_args(argv)
    settings = options.parse_args(rest)
    job_dir = Path(request.job_dir or Path.home() / "experiments" / "%j").expanduser().absolute()
    output_dir = settings.args.output_dir if "output_dir" in settings.explicit else str(job_dir)
    plain = Path(str(job_dir).replace("%j", f"pending-{uuid.uuid4().hex[:8]}"))
    folder = Path(request.shared_dir).expanduser().absolute() if request.shared_dir else job_dir

    import submitit

    try:
        executor = submitit.AutoExecutor(
            folder=str(folder), slurm_max_num_timeout=request.max_timeouts
        )
        executor.update_parameters(**slurm_parameters(request))
        job = executor.submit(Trainer(rest, str(Path(output_dir).absolute())))
    except (OSError, RuntimeError, submitit.core.utils.FailedJobError) as error:
        raise UserError(f"Slurm did not take the job ({plain.parent}): {error}") from error
    return job.job_id


def main() -> int:
    try:
        print(f"Submitted job {submit()}")
    except UserError as error:
        print(f"error: {error.line()}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
