"""The metadata of the package that `pip install .` builds."""

from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
tomllib = pytest.importorskip("tomllib", reason="tomllib needs Python 3.11")


@pytest.fixture(scope="module")
def metadata() -> dict:
    return tomllib.loads((ROOT / "pyproject.toml").read_text())


def test_every_folder_with_code_is_in_the_package(metadata: dict) -> None:
    folders = {
        path.parent.relative_to(ROOT)
        for path in ROOT.rglob("*.py")
        if not {"tests", "experiments", "examples", ".venv", "build"} & set(path.parts)
    }
    expected = {".".join(("vit_distillation", *folder.parts)) for folder in folders}
    assert expected <= set(metadata["tool"]["setuptools"]["packages"])


def test_the_console_command_exists(metadata: dict) -> None:
    module, _, function = metadata["project"]["scripts"]["vit-distillation"].partition(":")
    file = ROOT / f"{module.removeprefix('vit_distillation.')}.py"
    assert f"def {function}(" in file.read_text()


def test_the_licence_is_apache(metadata: dict) -> None:
    assert metadata["project"]["license"] == "Apache-2.0"
    assert "Apache License" in (ROOT / "LICENSE").read_text()
