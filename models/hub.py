"""The Hugging Face Hub, from which timm downloads weights."""

import contextlib
import socket
import urllib.request
from collections.abc import Iterator
from urllib.parse import urlparse

from huggingface_hub import constants

TIMEOUT_S = 5.0


def unreachable_reason(url: str = "") -> str:
    """Return why a host cannot be reached, in a few words, or "" if it can.

    url: of any file there; by default the Hub's. Returns "" behind a proxy, because a direct
    connection proves nothing there.
    """
    if constants.HF_HUB_OFFLINE:
        return "HF_HUB_OFFLINE is set"
    address = urlparse(url or constants.ENDPOINT)
    if urllib.request.getproxies().keys() & {"all", address.scheme}:
        return ""
    port = address.port or {"http": 80}.get(address.scheme, 443)
    try:
        socket.create_connection((address.hostname, port), TIMEOUT_S).close()
    except OSError as error:
        return f"{address.hostname} cannot be reached: {error.strerror or error}"
    return ""


@contextlib.contextmanager
def cached_files_only(wanted: bool) -> Iterator[None]:
    """Let the Hub's library use files that it has downloaded before, and fail at once otherwise.

    By default it retries every file five times, for a minute, and prints long warnings.
    """
    before = constants.HF_HUB_OFFLINE
    constants.HF_HUB_OFFLINE = before or wanted
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE = before
