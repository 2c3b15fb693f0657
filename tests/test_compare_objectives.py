"""The comparison of the objectives: every row runs."""

import importlib.util
import shlex
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
_spec = importlib.util.spec_from_file_location(
    "compare", ROOT / "experiments" / "compare_objectives.py"
)
comparison = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(comparison)


@pytest.mark.slow
@pytest.mark.parametrize("name", comparison.ROWS)
def test_every_row_of_the_comparison_runs(name: str, run_inside) -> None:
    flags = shlex.split(f"{comparison.RECIPE} {comparison.ROWS[name]} --epochs 1 --batch-size 300")
    result = run_inside(
        *flags, "--model", comparison.STUDENT, "--output_dir", "", "--no-teacher-check"
    )
    assert result.returncode == 0, result.stderr
    assert "* Acc@1" in result.stdout
