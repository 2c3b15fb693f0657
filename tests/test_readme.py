"""What the documents say: every command in them parses."""

import re
import shlex
from pathlib import Path

import pytest

import options
import run_with_submitit

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
ELSEWHERE = {"objectives.md"}  # its commands name files that tests/test_docs.py writes


def commands(page: Path) -> list[str]:
    """Return the commands in a page's code blocks, continued lines joined."""
    found = []
    for block in re.findall(r"^```\w*\n(.*?)^```", page.read_text(), re.MULTILINE | re.DOTALL):
        lines = block.replace("\\\n", " ").splitlines()
        found += [line for line in lines if re.search(r"\b(main|run_with_submitit)\.py\b", line)]
    return found


CASES = [
    (page.name, command)
    for page in PAGES
    if page.name not in ELSEWHERE
    for command in commands(page)
]


@pytest.mark.parametrize(("page", "command"), CASES)
def test_a_documented_command_parses(page: str, command: str) -> None:
    words = shlex.split(command, comments=True)
    program = next(i for i, word in enumerate(words) if word.endswith(".py"))
    rest = words[program + 1 :]
    if words[program].endswith("run_with_submitit.py"):
        rest = run_with_submitit.get_submitit_parser().parse_known_args(rest)[1]
    settings = options.parse_args(rest)
    assert not settings.notes, f"{page}: {settings.notes}"


def test_the_readme_has_commands() -> None:
    assert sum(page == "README.md" for page, _ in CASES) >= 5
