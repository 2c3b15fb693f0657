"""The code rules of the design, checked against the source."""

import ast
import functools
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
LEVELS = (  # imports go from the right to the left only
    {"base"},
    {"losses", "schedules"},
    {"data"},
    {"models", "datasets"},
    {"matching"},
    {"distill"},
    {"training"},
    {"engine"},
    {"options", "checks"},
    {"main"},
    {"run_with_submitit", "hubconf", "console"},
)
LEVEL_OF = {module: level for level, modules in enumerate(LEVELS) for module in modules}
PACKAGES = ("base", "data", "models", "distill", "training", "checks")
READS_SETTINGS = {"main", "options", "run_with_submitit", "training/setup", "checks/evaluation"}
FILES = sorted(ROOT.glob("*.py")) + [
    path for package in PACKAGES for path in sorted((ROOT / package).glob("*.py"))
]


def name_of(path: Path) -> str:
    return str(path.relative_to(ROOT).with_suffix(""))


every_file = pytest.mark.parametrize("path", FILES, ids=name_of)


@functools.cache
def tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text())


def module_of(path: Path) -> str:
    return path.relative_to(ROOT).with_suffix("").parts[0]


def imported_modules(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and node.level == 0:
            found.add(node.module.split(".")[0])
    return found & set(LEVEL_OF)


@every_file
def test_every_file_has_a_level(path: Path) -> None:
    assert module_of(path) in LEVEL_OF


@every_file
def test_imports_go_down_only(path: Path) -> None:
    own = module_of(path)
    upward = {other for other in imported_modules(path) - {own} if LEVEL_OF[other] >= LEVEL_OF[own]}
    assert not upward, f"{name_of(path)} imports {sorted(upward)}, which are not below it"


@every_file
def test_settings_stop_at_the_builders(path: Path) -> None:
    if name_of(path) in READS_SETTINGS:
        pytest.skip("this module reads the settings")
    for node in ast.walk(tree(path)):
        if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            continue
        names = {a.arg for a in node.args.args + node.args.kwonlyargs}
        if "args" in names:
            allowed = node.name.startswith(("build_", "_build_", "check_"))
            assert allowed, f"{path.name}: {node.name} takes args, and is no builder"


@every_file
def test_settings_are_not_written_after_parsing(path: Path) -> None:
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


def test_the_engine_imports_no_teacher_or_model() -> None:
    assert not imported_modules(ROOT / "engine.py") & {"distill", "models"}


@every_file
def test_teachers_have_one_interface(path: Path) -> None:
    """No module asks what kind of teacher an object is."""
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.args:
            subject = ast.unparse(node.args[0]).split(".")[-1]
            asks = node.func.id in ("isinstance", "getattr", "hasattr")
            is_teacher = subject in ("teacher", "member") or subject.endswith("_teacher")
            assert not (asks and is_teacher), f"{path.name}:{node.lineno}: {ast.unparse(node)}"


@every_file
def test_no_bare_except_and_no_assert_for_users(path: Path) -> None:
    for node in ast.walk(tree(path)):
        assert not (isinstance(node, ast.ExceptHandler) and node.type is None), node.lineno
        assert not isinstance(node, ast.Assert), f"{path.name}:{node.lineno}: assert"


def test_no_function_is_longer_than_60_lines() -> None:
    programs = [path for name in ("tools", "experiments") for path in (ROOT / name).glob("*.py")]
    for path in FILES + programs:
        for node in ast.walk(tree(path)):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                lines = (node.end_lineno or 0) - node.lineno + 1
                assert lines <= 60, f"{name_of(path)}: {node.name} has {lines} lines"
