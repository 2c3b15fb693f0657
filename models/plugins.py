"""Plugins: files with the user's own code that add entries to the registries."""

import importlib.util
import sys
import traceback
import zlib
from collections.abc import Sequence
from pathlib import Path

import timm

from base.errors import UserError

PREFIX = "plugin_"  # of the names of their modules
TIMMS_AND_OURS = ("timm", "models")


def load_plugin(path: str) -> None:
    """Run a file that adds entries to the registries, timm's of models included.

    Raises UserError naming what went wrong.
    """
    file = Path(path).absolute()
    if file.suffix != ".py":
        raise UserError(f"--plugin {path}: not a .py file")
    name = f"{PREFIX}{file.stem}_{zlib.crc32(bytes(file)):08x}"  # unique for files of the same name
    try:
        spec = importlib.util.spec_from_file_location(name, file)
        module = importlib.util.module_from_spec(spec)  # type: ignore[arg-type]
        sys.modules[name] = module  # timm's register_model needs it there
        spec.loader.exec_module(module)  # type: ignore[union-attr]
    except Exception as error:  # whatever the user's own code raises
        sys.modules.pop(name, None)
        raise UserError(f"--plugin {path}: {type(error).__name__}: {error}") from error


def line_of(error: BaseException) -> str:
    """Return an error that a plugin's own code has raised, with its line; "" for all others."""
    files = {
        str(module.__file__) for name, module in sys.modules.items() if name.startswith(PREFIX)
    }
    frames = traceback.extract_tb(error.__traceback__)
    if not frames or frames[-1].filename not in files:
        return ""
    where = f"--plugin {frames[-1].filename}, line {frames[-1].lineno}"
    return f"{where}: {type(error).__name__}: {error}"


def source_of(architecture: str) -> str:
    """Return the file with the code of a registered network, "" for timm's and this repository's.

    What that file imports is not included.
    """
    if not timm.is_model(architecture):
        return ""
    name = timm.model_entrypoint(architecture).__module__
    module = sys.modules.get(name)
    foreign = module is not None and name.partition(".")[0] not in TIMMS_AND_OURS
    return str(getattr(module, "__file__", None) or "") if foreign else ""


def load_given_plugins(given: Sequence[str], named: Sequence[str], source: object) -> None:
    """Run the plugins of the command line. Those that a file names are never run by themselves.

    Raises UserError where the file `source` names some and none is given.
    """
    if named and not given:
        raise UserError(
            f"{source}: its run had --plugin {' '.join(map(str, named))}; give --plugin FILE.py "
            "with code that you trust, for what a file names is not run"
        )
    for path in given:
        load_plugin(path)
