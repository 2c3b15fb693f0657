"""The commands that the documentation shows: every one is understood, and those on digits run."""

import re
import shlex
from pathlib import Path

import pytest
import torch

import losses
import matching
import models
import options
import schedules
from data import sources

ROOT = Path(__file__).resolve().parents[1]
TEXT = (ROOT / "docs" / "objectives.md").read_text()
COMMANDS = re.findall(r"^(?:python|torchrun .*?) ?main\.py (.*)$", TEXT, re.MULTILINE)
ON_DIGITS = re.findall(r"^python main.py (.*)$", TEXT, re.MULTILINE)
TEACHERS = {
    "TEACHER.pth": "deit_pico_patch8_32",
    "A.pth": "resnet_pico",
    "B.pth": "deit_pico_patch4_32",
}
REGISTRIES = (
    losses.MATCH_LOSS_MAP,
    matching.PROJ_MAP,
    matching.ADAPTORS,
    schedules.WEIGHT_SCHEDULER,
    schedules.TEMPERATURE_SCHEDULER,
)


def block(language: str) -> str:
    return re.search(rf"^```{language}\n(.*?)^```", TEXT, re.MULTILINE | re.DOTALL).group(1)


@pytest.fixture
def as_a_reader(tmp_path: Path, monkeypatch) -> None:
    """In a folder with the files that the page shows; what they register is taken back."""
    monkeypatch.chdir(tmp_path)
    Path("mine.py").write_text(block("python"))
    Path("DISTILL.yaml").write_text(block("yaml"))
    before = [set(registry) for registry in REGISTRIES]
    yield
    for registry, names in zip(REGISTRIES, before):
        for name in set(registry) - names:
            del registry[name]


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_of_the_objectives_parses(command: str, as_a_reader) -> None:
    notes = options.parse_args(shlex.split(command)).notes
    assert not notes, "a flag of the command has no effect"


@pytest.mark.slow
@pytest.mark.parametrize("command", [c for c in ON_DIGITS if "--data-path" not in c])
def test_every_command_on_the_embedded_digits_runs(
    command: str, as_a_reader, run_inside, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sources, "DIGITS_ROWS", {"train": (0, 32), "test": (1197, 1213)})
    for name, model in TEACHERS.items():
        if name in command:
            torch.save({"model": models.create_model(model).state_dict()}, name)
    small = "--epochs 1 --warmup-epochs 0 --batch-size 16 --no-teacher-check --no-model-ema"
    result = run_inside(*shlex.split(command), *small.split(), "--output_dir", "")
    assert result.returncode == 0, result.stderr
    assert "1 epoch of 2 updates" in result.stdout and "Training time" in result.stdout


def test_every_objective_has_a_command() -> None:
    text = " ".join(COMMANDS)
    for name in losses.MATCH_LOSS_MAP:
        assert re.search(rf"loss={name}\b", text) or name in ("gram", "mmd"), (
            f"docs/objectives.md has no command with loss={name}"
        )
    for name in (*matching.PROJ_MAP, *losses.KD_LOSS_MAP):
        assert name in TEXT
    for flag in (
        "ranking-gather",
        "logit-standardization",
        "probability-shift",
        "teacher-weight",
        "distill-config",
        "teacher-adaptor",
    ):
        assert f"--{flag}" in text
