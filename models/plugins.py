"""Files of the user's own code, which add to the registries."""

import importlib.util
import sys
from collections.abc import Sequence
from pathlib import Path

from errors import UserError

PLUGIN = "plugin_"  # before its file's name in Python's table of modules


def load_plugin(path: str) -> None:
    """Run a file that adds entries to the registries, timm's of models included.

    Raises UserError naming what went wrong.
    """
    name = f"{PLUGIN}{Path(path).stem}"
    try:
        spec = importlib.util.spec_from_file_location(name, path)
        module = importlib.util.module_from_spec(spec)  # type: ignore[arg-type]
        sys.modules[name] = module  # where timm's register_model looks for it
        spec.loader.exec_module(module)  # type: ignore[union-attr]
    except Exception as error:  # whatever the user's own code raises
        sys.modules.pop(name, None)
        raise UserError(f"--plugin {path}: {type(error).__name__}: {error}") from error


def plugin_of(made: object) -> str:
    """Return the file of the plugin that a function or class comes from, "" where none does."""
    name = getattr(made, "__module__", None) or ""
    return str(sys.modules[name].__file__) if name.startswith(PLUGIN) else ""


def load_given_plugins(given: Sequence[str], named: Sequence[str], source: object) -> None:
    """Run the plugins that the user gives. Those that a file names are code of whoever wrote it.

    Raises UserError where the file `source` names some and none is given.
    """
    if named and not given:
        raise UserError(
            f"{source}: its run had --plugin {' '.join(map(str, named))}; give --plugin FILE.py "
            "with code that you trust, for what a file names is not run"
        )
    for path in given:
        load_plugin(path)
