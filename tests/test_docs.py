"""The commands that the documentation shows: every one is understood."""

import re
import shlex
from pathlib import Path

import pytest

import losses
import matching
import options
import schedules

ROOT = Path(__file__).resolve().parents[1]
TEXT = (ROOT / "docs" / "objectives.md").read_text()
COMMANDS = re.findall(r"^(?:python|torchrun .*?) ?main\.py (.*)$", TEXT, re.MULTILINE)
REGISTRIES = (losses.MATCH_LOSS_MAP, matching.PROJ_MAP, matching.ADAPTORS,
              schedules.WEIGHT_SCHEDULER, schedules.TEMPERATURE_SCHEDULER)  # fmt: skip


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


def test_every_objective_has_a_command() -> None:
    text = " ".join(COMMANDS)
    for name in losses.MATCH_LOSS_MAP:
        assert f"loss={name}," in text or name in ("gram", "mmd"), name
    for name in (*matching.PROJ_MAP, *losses.KD_LOSS_MAP):
        assert name in TEXT
    for flag in ("ranking-gather", "logit-standardization", "probability-shift", "teacher-weight",
                 "distill-config", "teacher-adaptor"):  # fmt: skip
        assert f"--{flag}" in text
