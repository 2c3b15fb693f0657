"""What the documents say: every command in them parses."""

import re
import shlex
from pathlib import Path

import pytest
import torch.distributed.run

import options
import run_with_submitit
from experiments import benchmark, compare, gpu_plan
from tools import distil, export, predict, prepare_data, report

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
ELSEWHERE = {"objectives.md"}  # its commands name files that tests/test_docs.py writes
PROGRAM = re.compile(
    r"\b(main|run_with_submitit|report|export|predict|distil|prepare_data|benchmark|compare|gpu_plan)\.py\b"
)
TOOLS = {
    "distil.py": distil,
    "report.py": report,
    "export.py": export,
    "prepare_data.py": prepare_data,
    "predict.py": predict,
    "benchmark.py": benchmark,
    "compare.py": compare,
    "gpu_plan.py": gpu_plan,
}


def commands(page: Path) -> list[str]:
    """Return the commands in a page's code blocks, continued lines joined."""
    found = []
    for block in re.findall(
        r"^```(?!yaml)\w*\n(.*?)^```", page.read_text(), re.MULTILINE | re.DOTALL
    ):
        lines = block.replace("\\\n", " ").splitlines()
        found += [line for line in lines if PROGRAM.search(line)]
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
    tool = TOOLS.get(Path(words[program]).name)
    if tool is not None:
        tool._parser().parse_args(rest)
        return
    if words[program].endswith("run_with_submitit.py"):
        rest = run_with_submitit.get_submitit_parser().parse_known_args(rest)[1]
    notes = options.parse_args(rest).notes
    assert not notes, f"{page}: {notes}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_a_link_between_the_documents_leads_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\((?!http)([^)#]+)", page.read_text()):
        assert (page.parent / target).exists(), target


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_a_flag_that_a_document_names_exists(page: Path) -> None:
    """Every `--flag` of the prose, but timm's in the column of timm's flags."""
    text = re.sub(r"^```.*?^```", "", page.read_text(), flags=re.MULTILINE | re.DOTALL)
    if page.name == "coming-from-timm.md":
        text = re.sub(r"^\|[^|]*\|", "", text, flags=re.MULTILINE)
    known = [
        options.argparse_with_help(),
        run_with_submitit.get_submitit_parser(),
        *(tool._parser() for tool in TOOLS.values()),
    ]
    known.append(torch.distributed.run.get_args_parser())
    names = {
        name for parser in known for action in parser._actions for name in action.option_strings
    }
    for flag in re.findall(r"`(--[\w-]+)", text):
        known_by = [name for name in names if name.startswith(options._dashed(flag))]
        assert known_by, flag


def test_the_readme_names_every_room() -> None:
    text = (ROOT / "README.md").read_text()
    assert [path.name for path in ROOT.glob("*.py") if f"`{path.name}`" not in text] == []


def test_the_readme_tells_the_same_story_of_own_images_as_their_page() -> None:
    readme, page = (
        [shlex.join(shlex.split(command)) for command in commands(path) if "my_images" in command]
        for path in (ROOT / "README.md", ROOT / "docs" / "own-data.md")
    )
    assert len(readme) >= 2 and set(readme) <= set(page)


def test_the_readme_has_commands() -> None:
    assert sum(page == "README.md" for page, _ in CASES) >= 5
