"""The output folder of a run without --output-dir: `runs/<data>-<model>-<date>`."""

import contextlib
import re
import time
from argparse import Namespace
from collections.abc import Iterator
from pathlib import Path

from base import distributed, files
from base.distributed import print_important
from base.errors import UserError
from data.folder_parts import TRAIN
from training.checkpointer import is_auto

AUTO = "auto"  # the value of --output-dir if it is not given
FOLDER = Path("runs")
MAX_PART = 40  # characters of the data's and of the model's name


def build_is_run(args: Namespace) -> bool:
    """Return whether a run trains and has a folder; others evaluate, check or fill a cache."""
    fills_cache = args.teacher_cache and args.teacher_cache_mode in ("write", "verify")
    return not (args.eval or args.check or args.dry_run or fills_cache)


@contextlib.contextmanager
def build_settings(args: Namespace) -> Iterator[Namespace]:
    """Yield the settings with the output folder; print it at the start and at the end.

    Without --output-dir the first process makes a new folder, and all processes use it. With
    --resume auto it is the newest run of the same data and model. The new folder is removed if
    the run ends early and has saved nothing. A run that only evaluates, checks or fills a cache
    gets no folder.
    """
    if not build_is_run(args):
        unused = "" if args.output_dir == AUTO else args.output_dir
        yield Namespace(**{**vars(args), "output_dir": unused})
        return
    folder, nothing = args.output_dir, "nothing is saved, because --output_dir is empty"
    if folder == AUTO:
        name = f"{data_name(args.data_path, args.data_set)}-{_plain(args.model)}"
        folder = distributed.on_main(lambda: _choose(name, resumes=is_auto(args.resume)))
    print_important(f"output: {folder or nothing}")
    try:
        yield Namespace(**{**vars(args), "output_dir": folder})
    except BaseException:
        if args.output_dir == AUTO and distributed.is_main():
            _remove_if_unused(Path(folder))
        raise
    print_important(f"output: {folder or nothing}")


def data_name(path: str, data_set: str) -> str:
    """Return a name for the data: of its folder, or above a folder `train`, or of the data set."""
    if not path:
        return _plain(data_set.lower())
    folder = Path(path).resolve()
    return _plain(folder.parent.name if folder.name == TRAIN else folder.name)


def _plain(name: str) -> str:
    """Return the end of a name, with - in place of characters that are awkward in a path."""
    last = name.rstrip("/").rpartition("/")[2].rpartition(":")[2]
    return re.sub(r"[^A-Za-z0-9._]+", "-", last).strip("-.")[:MAX_PART] or "run"


def _choose(name: str, *, resumes: bool) -> str:
    """Make and return the folder of a run. resumes: take the newest one if there is one."""
    dated = re.compile(re.escape(name) + r"-\d{8}-\d{6}(-\d+)?")
    if resumes:
        found = [path for path in FOLDER.glob("*") if dated.fullmatch(path.name) and path.is_dir()]
        if found:
            return str(max(found, key=lambda path: (path.stat().st_mtime, path.name)))
    start, number = f"{name}-{time.strftime('%Y%m%d-%H%M%S')}", 1
    while True:
        folder = FOLDER / (start if number == 1 else f"{start}-{number}")
        try:
            folder.mkdir(parents=True)
        except FileExistsError:  # of another run that began in this second
            if not FOLDER.is_dir():
                files.make_folder(folder)  # raises: `runs` is a file
            number += 1
            continue
        except OSError as error:
            raise UserError(
                f"--output_dir {folder}: cannot be made ({error.strerror}); choose another, or "
                "--output_dir '' to save nothing"
            ) from error
        return str(folder)


def _remove_if_unused(folder: Path) -> None:
    with contextlib.suppress(OSError):  # the error that ended the run is more to the point
        if {entry.name for entry in folder.iterdir()} <= {files.LOCK}:
            (folder / files.LOCK).unlink(missing_ok=True)
            folder.rmdir()
