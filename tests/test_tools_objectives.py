"""The comparison of the objectives: every row runs."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


@pytest.mark.slow
def test_every_row_of_the_comparison_runs(picture_folder: Path, tmp_path: Path) -> None:
    table = tmp_path / "table.md"
    script = str(ROOT / "tools" / "compare_objectives.py")
    data = ["--data", str(picture_folder), "--data-set", "IMNET"]
    budget = ["--epochs", "1", "--seeds", "0", "--batch-size", "8"]
    result = subprocess.run(
        [sys.executable, script, *data, *budget, "--runs", str(tmp_path), "--write", str(table)],
        capture_output=True, text=True,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    rows = [line for line in table.read_text().splitlines() if line.startswith("|")]
    assert len(rows) == 2 + 9, table.read_text()
