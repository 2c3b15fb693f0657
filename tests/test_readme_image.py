"""The image of the README shows the committed table."""

from pathlib import Path

import pytest

pytest.importorskip("altair")
pytest.importorskip("vl_convert")

from experiments import readme_image

ROOT = Path(__file__).resolve().parents[1]


def test_the_image_has_the_numbers_of_the_table_and_is_small() -> None:
    rows = readme_image.read_rows((ROOT / "results" / "quickstart.md").read_text())
    image = ROOT / "docs" / "images" / "quickstart.svg"
    assert [row["run"] for row in rows] == list(readme_image.TITLES.values())
    assert all(str(row["text"]) in image.read_text() for row in rows)
    assert image.stat().st_size < 100_000
    assert "docs/images/quickstart.svg" in (ROOT / "README.md").read_text()


def test_a_row_is_the_mean_and_its_deviation() -> None:
    table = "| none | 70.00 ± 6.00 | 1 ± 1 | 1 ± 1 | `--a` |\n"
    table += "".join(f"| {name} | 99.00 ± 2.00 | 1 | 1 | `--a` |\n" for name in ("hard", "soft"))
    table += "| teacher | 99.50 ± 0.40 | 1 | 1 | `--a` |\n"
    labels_only, hard, *_ = readme_image.read_rows(table)
    assert (labels_only["low"], labels_only["high"]) == (64, 76)
    assert hard["high"] == 100 and hard["text"] == "99.0 ± 2.0"
