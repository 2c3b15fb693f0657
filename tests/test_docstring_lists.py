"""The Python reference: arguments in docstrings become a list."""

import pytest

pytest.importorskip("griffe")

from experiments.docstring_lists import as_list

TEXT = """Return a loss.

first: of (B, C), which
goes on. second, third: two
weights; note: no argument.
Raises ValueError for others.
"""


def test_arguments_are_entries_and_other_text_is_kept() -> None:
    assert as_list(TEXT, {"first", "second", "third"}) == (
        "Return a loss.\n\n"
        "- **first**: of (B, C), which goes on.\n"
        "- **second, third**: two weights; note: no argument.\n\n"
        "Raises ValueError for others."
    )


def test_a_docstring_without_arguments_is_not_changed() -> None:
    assert as_list(TEXT, set()) == TEXT
