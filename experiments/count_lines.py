"""Count the lines of Python code of checkouts, by folder and in the modules that a run imports.

    python experiments/count_lines.py OLD_CHECKOUT NEW_CHECKOUT

A line counts if it has code: blank lines, lines with only a comment, and docstrings do not count.
Lines are counted in a copy that ruff has formatted (100 columns) without `# fmt: skip` and
`# fmt: off`. "Product" is all but tests/, models/ and losses.py. The imported modules are those of
a short run on the digits. tests/test_code_rules.py checks the length of functions.
"""

import argparse
import ast
import io
import os
import re
import subprocess
import sys
import tempfile
import tokenize
from collections import Counter
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from experiments.about import commit

RUN = "--distillation-type hard --epochs 1"
NOT_CODE = ("COMMENT", "NL", "NEWLINE", "INDENT", "DEDENT", "ENCODING", "ENDMARKER")
WITH_DOCSTRING = ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef
# Runs main.py and writes the files of the imported modules, one a line, to argv[1] at the end.
DUMP = """
import atexit, runpy, sys
target, main, sys.path[0] = sys.argv.pop(1), sys.argv[1], sys.argv[1].rpartition("/")[0]
def dump():
    files = [getattr(module, "__file__", None) for module in list(sys.modules.values())]
    open(target, "w").write("\\n".join([main, *filter(None, files)]))
atexit.register(dump)
del sys.argv[0]
runpy.run_path(main, run_name="__main__")
"""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("checkouts", nargs="+", type=Path)
    args = parser.parse_args()
    for checkout in args.checkouts:
        root = checkout.resolve()
        print(f"{checkout} ({commit(root)})")
        sources = format_sources(root)
        counts = {path: len(code_lines(text)) for path, text in sources.items()}
        print_counts(counts, imported_files(root))
    return 0


def format_sources(root: Path) -> dict[str, str]:
    """Return the formatted text of every Python file that git does not ignore, by its path."""
    command = ["git", "-C", str(root), "ls-files", "--cached", "--others", "--exclude-standard"]
    files = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split("\n")
    names = [name for name in files if name.endswith(".py") and (root / name).is_file()]
    with tempfile.TemporaryDirectory() as temporary:
        for name in names:
            copy = Path(temporary, name)
            copy.parent.mkdir(parents=True, exist_ok=True)
            copy.write_text(without_skips((root / name).read_text()))
        ruff = [sys.executable, "-m", "ruff", "format", "--isolated", "--line-length=100"]
        subprocess.run([*ruff, "--quiet", "."], cwd=temporary, check=True)
        return {name: Path(temporary, name).read_text() for name in names}


def without_skips(text: str) -> str:
    """Return `text` without the comments that keep the formatter away."""
    return re.sub(r"#\s*fmt:\s*(skip|off|on)\b", "#", text)


def code_lines(text: str) -> set[int]:
    """Return the numbers of the lines of code: no blank ones, comments or docstrings."""
    filled = {number for number, line in enumerate(text.splitlines(), 1) if line.strip()}
    lines = set()
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if tokenize.tok_name[token.type] not in NOT_CODE:
            lines.update(range(token.start[0], token.end[0] + 1))
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, WITH_DOCSTRING) and ast.get_docstring(node, clean=False) is not None:
            lines -= set(range(node.body[0].lineno, (node.body[0].end_lineno or 0) + 1))
    return lines & filled


def is_product(path: str) -> bool:
    return not path.startswith(("tests/", "models/")) and path != "losses.py"


def imported_files(root: Path) -> set[str]:
    """Return the files in `root` that a short run of main.py imports, main.py included."""
    with tempfile.TemporaryDirectory() as temporary:
        dump = Path(temporary, "files.txt")
        command = [sys.executable, "-c", DUMP, str(dump), str(root / "main.py"), *RUN.split()]
        done = subprocess.run(
            [*command, "--output-dir", temporary],
            cwd=root,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
            capture_output=True,
            text=True,
        )
        if done.returncode:
            raise SystemExit(f"{root}: main.py {RUN} failed:\n{done.stderr}")
        files = [Path(line).resolve() for line in dump.read_text().splitlines()]
    return {str(path.relative_to(root)) for path in files if path.is_relative_to(root)}


def group_of(path: str) -> str:
    """Return the folder at the top, or losses.py, or a word for the other files at the top."""
    if "/" in path:
        return path.split("/")[0] + "/"
    return path if path == "losses.py" else "(top level)"


def print_counts(counts: dict[str, int], imported: set[str]) -> None:
    """Print the lines of each group, of the product, and of the imported modules."""
    groups: Counter[str] = Counter()
    for path, lines in counts.items():
        groups[group_of(path)] += lines
    for group, lines in sorted(groups.items()):
        print(f"  {lines:6} {group}")
    product = {path: lines for path, lines in counts.items() if is_product(path)}
    print(f"  {sum(product.values()):6} product: all but tests/, models/ and losses.py")
    entered = [path for path in sorted(counts) if path in imported]
    total, of_product = (sum(part.get(path, 0) for path in entered) for part in (counts, product))
    print(f"  {total:6} in {len(entered)} modules imported by main.py {RUN}, {of_product} product")
    print("         " + ", ".join(f"{path} {counts[path]}" for path in entered))


if __name__ == "__main__":
    sys.exit(main())
