"""The Hugging Face hub, from which timm fetches weights: whether it answers, asked once."""

import contextlib
import socket
import urllib.request
from collections.abc import Iterator
from urllib.parse import urlparse

from huggingface_hub import constants

TIMEOUT_S = 5.0


def silence() -> str:
    """Return why the hub will not answer, in a few words, or "" if it does.

    Behind a proxy nobody can tell but the proxy, and "" is returned.
    """
    if constants.HF_HUB_OFFLINE:
        return "HF_HUB_OFFLINE is set"
    address = urlparse(constants.ENDPOINT)
    if urllib.request.getproxies().keys() & {"all", address.scheme}:
        return ""
    port = address.port or {"http": 80}.get(address.scheme, 443)
    try:
        socket.create_connection((address.hostname, port), TIMEOUT_S).close()
    except OSError as error:
        return f"{address.hostname} does not answer: {error.strerror or error}"
    return ""


@contextlib.contextmanager
def kept_files_only(wanted: bool) -> Iterator[None]:
    """Let the hub's library take what it has fetched before, and else fail at once.

    Left alone it tries every file five times, for a minute, and prints a page about it.
    """
    before = constants.HF_HUB_OFFLINE
    constants.HF_HUB_OFFLINE = before or wanted
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE = before
