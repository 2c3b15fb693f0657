"""Text that is safe to print: names come from files and folders of any origin."""


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
