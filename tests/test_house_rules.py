"""The four house rules, held against the source."""

import ast
import functools
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
LEVELS = {
    0: {"errors", "distributed", "schedules", "pixels", "transfer"},
    1: {
        "losses",
        "checkpoint",
        "metrics",
        "datasets",
        "sources",
        "prepared",
        "augment",
        "device_augment",
        "samplers",
        "cache",
    },
    2: {"models", "resume"},
    3: {"teachers", "matching", "optim", "recipe"},
    4: {"engine", "options", "objective", "preflight", "pictures"},
    5: {"main"},
    6: {"run_with_submitit", "hubconf"},
}
LEVEL_OF = {room: level for level, rooms in LEVELS.items() for room in rooms}
BESIDE = {  # rooms of one level, of which the first may import the others
    "datasets": {"samplers", "augment", "device_augment", "sources"},
    "sources": {"prepared"},
    "device_augment": {"augment"},
}
SEES_ARGS = {"main", "options", "run_with_submitit"}
FILES = sorted(ROOT.glob("*.py")) + sorted((ROOT / "models").glob("*.py"))


@functools.cache
def tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text())


def room_of(path: Path) -> str:
    return "models" if path.parent.name == "models" else path.stem


def imported_rooms(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and node.level == 0:
            found.add(node.module.split(".")[0])
    return found & set(LEVEL_OF)


@pytest.mark.parametrize("path", FILES, ids=lambda p: p.stem)
def test_every_file_is_a_room_with_a_level(path: Path) -> None:
    assert room_of(path) in LEVEL_OF


@pytest.mark.parametrize("path", FILES, ids=lambda p: p.stem)
def test_imports_go_down_only(path: Path) -> None:
    room = room_of(path)
    upward = {
        other
        for other in imported_rooms(path) - {room} - BESIDE.get(room, set())
        if LEVEL_OF[other] >= LEVEL_OF[room] and not (other == "errors" and LEVEL_OF[room] == 0)
    }
    assert not upward, f"{path.name} imports {sorted(upward)}, which are not below it"


@pytest.mark.parametrize("path", FILES, ids=lambda p: p.stem)
def test_args_stops_at_the_builders(path: Path) -> None:
    if room_of(path) in SEES_ARGS:
        pytest.skip("this room reads the command line")
    for node in ast.walk(tree(path)):
        if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            continue
        names = {a.arg for a in node.args.args + node.args.kwonlyargs}
        if "args" in names:
            allowed = node.name.startswith(("build_", "_build_", "check_"))
            assert allowed, f"{path.name}: {node.name} takes args, and is no builder"


@pytest.mark.parametrize("path", FILES, ids=lambda p: p.stem)
def test_nobody_writes_to_args_after_parsing(path: Path) -> None:
    writes = [
        node.lineno
        for node in ast.walk(tree(path))
        if isinstance(node, ast.Attribute)
        and isinstance(node.ctx, ast.Store)
        and isinstance(node.value, ast.Name)
        and node.value.id == "args"
    ]
    if path.stem == "options":
        assert len(writes) <= 1, "only parse_args decides a value"
    else:
        assert not writes, f"{path.name} writes to args in lines {writes}"


def test_the_engine_knows_no_teacher_network() -> None:
    assert not imported_rooms(ROOT / "engine.py") & {"teachers", "models"}


@pytest.mark.parametrize("path", FILES, ids=lambda p: p.stem)
def test_no_bare_except_and_no_assert_for_users(path: Path) -> None:
    for node in ast.walk(tree(path)):
        assert not (isinstance(node, ast.ExceptHandler) and node.type is None), node.lineno
        assert not isinstance(node, ast.Assert), f"{path.name}:{node.lineno}: assert"
