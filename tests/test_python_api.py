"""The snippets of docs/python-api.md and the cells of the notebooks run, in their order."""

import json
import re
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
PAGE = (ROOT / "docs" / "python-api.md").read_text()
SNIPPETS = re.findall(r"^```python\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL)
NOTEBOOKS = sorted((ROOT / "examples").glob("*.ipynb"))


@pytest.mark.slow
def test_the_snippets_of_the_python_api_run_and_distil(capsys: pytest.CaptureFixture) -> None:
    names: dict = {}
    for snippet in SNIPPETS:
        exec(compile(snippet, "docs/python-api.md", "exec"), names)
    assert len(SNIPPETS) == 4
    printed = capsys.readouterr().out
    assert "complete (1200)" in printed and "hidden_hidden_mse_3_3" in printed
    assert names["cached"].missing() == 0
    terms = names["objective"].terms
    assert set(terms) == {"base", "distillation", "hidden_hidden_mse_3_3"}
    assert all(torch.isfinite(value) for value in terms.values())
    stats = names["evaluate"](names["val"], names["module"].network, names["device"])
    assert stats["count"] == 597 and stats["acc1"] > 20, "chance is 10 %"


@pytest.mark.slow
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_runs_from_top_to_bottom(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("matplotlib").use("Agg")
    monkeypatch.chdir(path.parent)
    monkeypatch.syspath_prepend(str(ROOT))
    cells = json.loads(path.read_text())["cells"]
    assert all(not cell.get("outputs") for cell in cells), "outputs are not committed"
    names: dict = {}
    for number, cell in enumerate(cells):
        if cell["cell_type"] == "code":
            source = "".join(cell["source"])
            exec(compile(source, f"{path.name}, cell {number}", "exec"), names)
    assert names["curves"]["hard, teacher"][-1] > names["curves"]["labels alone"][-1] - 10
