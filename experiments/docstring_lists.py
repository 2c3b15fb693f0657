"""Show the arguments in docstrings as a list in the Python reference (mkdocs.yml, griffe).

Our docstrings describe arguments as `name: text`, several on a line or one over several lines. Only
names of the signature, and of the fields of a class, become entries of the list.
"""

import re
from collections.abc import Collection
from typing import Any

import griffe


def as_list(text: str, names: Collection[str]) -> str:
    """Return a docstring as Markdown, with an entry for each `name: text` or `name, name: text`."""
    if not names:
        return text
    name = "|".join(map(re.escape, sorted(names, key=len, reverse=True)))
    start = re.compile(rf"(?:^|(?<=[.;] ))((?:{name})(?:, (?:{name}))*): ", re.MULTILINE)
    paragraphs = []
    for paragraph in text.split("\n\n"):
        paragraph = re.sub(
            r"^(Returns?|Raises?|Source|Yields?) ", r"\n\n\1 ", paragraph, flags=re.M
        )
        for part in paragraph.split("\n\n"):
            before, *found = start.split(part)
            entries = [
                f"- **{title}**: {' '.join(words.split())}"
                for title, words in zip(found[::2], found[1::2])
            ]
            paragraphs += [before.strip(), "\n".join(entries)]
    return "\n\n".join(part for part in paragraphs if part)


class DocstringLists(griffe.Extension):
    """Rewrite the docstring of each class and function that griffe has read."""

    def on_function(self, *, func: griffe.Function, **kwargs: Any) -> None:
        if func.docstring:
            names = {parameter.name for parameter in func.parameters} - {"self"}
            func.docstring.value = as_list(func.docstring.value, names)

    def on_class(self, *, cls: griffe.Class, **kwargs: Any) -> None:
        if cls.docstring:
            names = {name for name, member in cls.members.items() if member.is_attribute}
            if isinstance(start := cls.members.get("__init__"), griffe.Function):
                names |= {parameter.name for parameter in start.parameters}
            cls.docstring.value = as_list(cls.docstring.value, names - {"self"})
