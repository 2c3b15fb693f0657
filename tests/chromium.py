"""A headless Chromium, asked over the pipe of its remote debugging protocol what a page shows.

Its commands are those of https://chromedevtools.github.io/devtools-protocol/; each message is JSON,
ended by a zero byte. Nothing but the standard library is needed.
"""

import base64
import contextlib
import itertools
import json
import os
import select
import shutil
import subprocess
import time
from pathlib import Path
from typing import Any

PROGRAMS = ("chromium", "chromium-browser", "google-chrome")
PATIENCE_S = 180.0  # generous: the machine may be busy

# All elements of a page, those in shadow roots too, which no selector reaches: deep(selector).
DEEP = """
function deep(selector, root = document) {
  const found = [...root.querySelectorAll(selector)];
  for (const element of root.querySelectorAll('*'))
    if (element.shadowRoot) found.push(...deep(selector, element.shadowRoot));
  return found;
}
"""


def find() -> str | None:
    """Return the Chromium of this machine, or None."""
    return next(filter(None, map(shutil.which, PROGRAMS)), None)


class Chromium:
    """One page of a browser. Use as a context manager; whatever fails raises RuntimeError."""

    def __init__(self, program: str, profile: Path) -> None:
        read, self._write = os.pipe()
        self._read, write = os.pipe()
        # The protocol is spoken on descriptors 3 (to the browser) and 4 (from it).
        speaks = f'exec "$0" "$@" 3<&{read} 4>&{write} >/dev/null 2>&1'
        flags = [
            "--headless",
            "--no-sandbox",
            "--disable-gpu",
            "--hide-scrollbars",
            "--blink-settings=preferredColorScheme=1",
            "--remote-debugging-pipe",
            f"--user-data-dir={profile}",
        ]
        self._process = subprocess.Popen(
            ["bash", "-c", speaks, program, *flags], pass_fds=(read, write)
        )
        os.close(read)
        os.close(write)
        self._numbers, self._rest, self._session = itertools.count(1), b"", ""
        target = self.ask("Target.createTarget", url="about:blank")["targetId"]
        attached = self.ask("Target.attachToTarget", targetId=target, flatten=True)
        self._session = attached["sessionId"]

    def __enter__(self) -> "Chromium":
        return self

    def __exit__(self, *_: Any) -> None:
        self._session = ""
        with contextlib.suppress(RuntimeError, OSError):
            self.ask("Browser.close")
        try:
            self._process.wait(30)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        os.close(self._read)
        os.close(self._write)

    def ask(self, method: str, **params: Any) -> dict[str, Any]:
        """Send a command of the protocol and return its result."""
        message: dict[str, Any] = {"id": next(self._numbers), "method": method, "params": params}
        if self._session:
            message["sessionId"] = self._session
        os.write(self._write, json.dumps(message).encode() + b"\0")
        end = time.monotonic() + PATIENCE_S
        while True:
            answer = self._next(end, method)
            if answer.get("id") == message["id"]:
                if "error" in answer:
                    raise RuntimeError(f"{method}: {answer['error']['message']}")
                return answer["result"]

    def _next(self, end: float, method: str) -> dict[str, Any]:
        while b"\0" not in self._rest:
            ready, _, _ = select.select([self._read], [], [], max(0.0, end - time.monotonic()))
            block = os.read(self._read, 1 << 20) if ready else b""
            if not block:
                raise RuntimeError(f"{method}: Chromium {'ended' if ready else 'does not answer'}")
            self._rest += block
        message, _, self._rest = self._rest.partition(b"\0")
        return json.loads(message)

    def open(self, address: str, width: int, height: int = 1000) -> None:
        """Show an address in a window of `width` pixels, as a phone or a desktop would."""
        screen = {"width": width, "height": height, "screenWidth": width, "screenHeight": height}
        self.ask(
            "Emulation.setDeviceMetricsOverride", **screen, deviceScaleFactor=1, mobile=width < 600
        )
        self.ask("Page.navigate", url="about:blank")  # another #fragment alone would load nothing
        failed = self.ask("Page.navigate", url=address).get("errorText")
        if failed:
            raise RuntimeError(f"{address}: {failed}")
        self.wait("document.readyState === 'complete'")

    def value(self, script: str) -> Any:
        """Return the value of a JavaScript expression on the page; it may call `deep`."""
        found = self.ask(
            "Runtime.evaluate",
            expression=f"(() => {{{DEEP} return {script};}})()",
            returnByValue=True,
            awaitPromise=True,
        )
        if "exceptionDetails" in found:
            raise RuntimeError(f"{script}: {found['exceptionDetails']}")
        return found["result"].get("value")

    def wait(self, script: str, what: str = "") -> Any:
        """Return the value of an expression once it is true; AssertionError if it never is."""
        end = time.monotonic() + PATIENCE_S
        while time.monotonic() < end:
            if found := self.value(script):
                return found
            time.sleep(0.2)
        raise AssertionError(f"the page never shows {what or script}")

    def screenshot(self, file: Path) -> None:
        """Write the whole page, not only the window, as a PNG file."""
        shot = self.ask("Page.captureScreenshot", captureBeyondViewport=True)
        file.write_bytes(base64.b64decode(shot["data"]))

    def pdf(self, file: Path) -> None:
        """Write the page as it would be printed on A4."""
        printed = self.ask(
            "Page.printToPDF", paperWidth=8.27, paperHeight=11.69, preferCSSPageSize=True
        )
        file.write_bytes(base64.b64decode(printed["data"]))
