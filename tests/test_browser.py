"""TensorBoard as people see it: a real browser shows the curves, the pictures and the settings."""

import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest

import sources

pytestmark = pytest.mark.slow
LINE = (255, 112, 67)  # TensorBoard's colour of the first run
INK = (0, 0, 0)  # around the digits of our pictures; TensorBoard's own letters are greyer


@pytest.fixture
def board(tmp_path: Path, screenshot, run_inside, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The address of a TensorBoard that shows the quick start, on few of its pictures."""
    monkeypatch.setattr(sources, "DIGITS_ROWS", {"train": (0, 64), "test": (1197, 1229)})
    run = run_inside("--distillation-type", "hard", "--epochs", "4", "--batch-size", "16",
                     "--log-interval", "1", "--output_dir", str(tmp_path))  # fmt: skip
    assert run.returncode == 0, run.stderr
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "tensorboard.main", "--logdir", str(tmp_path), "--port",
               str(port), "--load_fast", "false"]  # fmt: skip
    server = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    address = f"http://127.0.0.1:{port}/"
    try:
        for _ in range(120):
            try:
                urllib.request.urlopen(address + "data/runs", timeout=5).read()
                break
            except OSError:
                time.sleep(0.5)
        yield address
    finally:
        server.terminate()
        server.wait(10)


def test_a_browser_shows_curves_pictures_and_settings(board: str, screenshot, tmp_path) -> None:
    pages = {name: screenshot(f"{board}#{name}", 1300, tmp_path / f"{name}.png")
             for name in ("scalars", "images", "text")}  # fmt: skip
    assert pages["scalars"][LINE] > 300, "no curves"
    assert pages["images"][INK] > 5000, "no pictures"
    assert pages["images"][INK] > 10 * pages["text"][INK]
    assert len(pages["text"]) > 20 and pages["text"] != pages["scalars"], "no settings"
