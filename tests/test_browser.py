"""TensorBoard as people see it: a real browser shows the curves, the pictures and the settings."""

import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import metrics

pytestmark = pytest.mark.slow
LINE = (255, 112, 67)  # TensorBoard's colour of the first run
MARK = (1, 200, 3)  # of our picture, found nowhere else


@pytest.fixture
def board(tmp_path: Path, screenshot) -> Iterator[str]:
    """The address of a TensorBoard that shows a short log."""
    log = metrics.RunLog(str(tmp_path))
    log.config({"model": "deit_pico", "epochs": 3})
    log.picture("train/batch", torch.tensor(MARK).byte()[:, None, None].expand(3, 64, 64), 0)
    for step in range(10):
        log.scalars("train", {"loss": 2.0 - step / 7}, step * 64)
    log.close()
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
    assert pages["scalars"][LINE] > 50, "no curve"
    assert pages["images"][MARK] > 1000, "no picture"
    assert pages["images"][MARK] > 10 * pages["text"][MARK]
    assert len(pages["text"]) > 20 and pages["text"] != pages["scalars"], "no settings"
