"""How the threads of OpenMP wait, on an idle and on a busy machine."""

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
TICKS = os.sysconf("SC_CLK_TCK")


@pytest.fixture()
def wait_policy(monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")  # nothing is chosen by the import
    from base import wait_policy

    for name in (*wait_policy.NAMES, "OMP_NUM_THREADS"):
        monkeypatch.delenv(name, raising=False)
    return wait_policy


@pytest.mark.parametrize(
    ("given", "busy", "chosen"),
    [
        ({}, 0.1, {"GOMP_SPINCOUNT": "10000"}),
        ({}, 1.0, {"OMP_WAIT_POLICY": "passive"}),
        ({}, float("inf"), {"OMP_WAIT_POLICY": "passive"}),
        ({"OMP_WAIT_POLICY": "active"}, 0.1, {}),
        ({"GOMP_SPINCOUNT": "100"}, 0.1, {}),
        ({"KMP_BLOCKTIME": "200"}, 1.0, {}),
        ({"OMP_NUM_THREADS": "1"}, 0.1, {}),
    ],
)
def test_threads_spin_on_an_idle_machine_unless_the_user_has_chosen(
    wait_policy, monkeypatch, given: dict, busy: float, chosen: dict
) -> None:
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    before = dict(os.environ)
    monkeypatch.setattr(wait_policy, "busy_cores", lambda: busy)
    wait_policy._choose()
    assert dict(os.environ) == before | chosen


@pytest.mark.parametrize("busy", [0, 1, 2])
def test_busy_cores_are_those_without_idle_time(
    wait_policy, monkeypatch, tmp_path: Path, busy: int
) -> None:
    """Of two cores, over half a second of a clock that the test sets."""
    stat, now = tmp_path / "stat", [10.0]

    def write(idle: int, wait: int) -> None:
        stat.write_text(f"cpu  7 0 9 {idle} {wait} 0 0\ncpu0 1\ncpu1 1\nintr 1\n")

    def sleep(seconds: float) -> None:
        now[0] += seconds
        ticks = round((2 - busy) * seconds * TICKS)
        write(1000 + ticks // 2, 50 + ticks - ticks // 2)

    monkeypatch.setattr(wait_policy.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(wait_policy.time, "sleep", sleep)
    write(1000, 50)
    assert wait_policy.busy_cores(0.5, stat) == pytest.approx(busy)


def test_without_a_readable_file_the_machine_counts_as_busy(wait_policy, tmp_path: Path) -> None:
    assert wait_policy.busy_cores(0, tmp_path / "absent") == float("inf")
    (tmp_path / "stat").write_text("")
    assert wait_policy.busy_cores(0, tmp_path / "stat") == float("inf")


def test_the_module_does_not_import_torch() -> None:
    code = "import sys, base.wait_policy; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


@pytest.mark.parametrize("program", ["main.py", "tools/report.py", "tools/predict.py"])
def test_programs_import_it_before_every_module_that_may_import_torch(program: str) -> None:
    modules = []
    for node in ast.parse((ROOT / program).read_text()).body:
        if isinstance(node, ast.Import):
            modules += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            modules.append(node.module)
    others = [name for name in modules if name.split(".")[0] not in sys.stdlib_module_names]
    assert others[0] == "base.wait_policy"
