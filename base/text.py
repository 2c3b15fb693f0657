"""Text that is safe to print, for names of files, folders and classes."""

from collections.abc import Sequence


def class_name(classes: Sequence[str] | None, index: int) -> str:
    """Return the name of a class, or its number where the data has no name for it.

    A model may have more classes than the data (--nb-classes).
    """
    return classes[index] if classes and index < len(classes) else str(index)


def printable(text: str, *, keep: str = "") -> str:
    r"""Return `text` with control characters, terminal escapes and invalid UTF-8 as \x1b, \udc80.

    keep: control characters that stay, such as a newline.
    """
    if text.isprintable():
        return text
    return "".join(
        c if c.isprintable() or c in keep else c.encode("unicode_escape").decode("ascii")
        for c in text
    )
