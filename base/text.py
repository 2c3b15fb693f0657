"""Text that is safe to print."""


def printable(text: str) -> str:
    """Return `text` with control characters, terminal escapes and invalid UTF-8 written as `\\x..`.

    For names that come from files or folders, wherever they are printed or logged.
    """
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)
