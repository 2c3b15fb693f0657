"""TensorBoard as people see it: a real browser shows the curves, the images and the settings."""

import json
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest
from chromium import Chromium

from data import sources

pytestmark = pytest.mark.slow
CURVES = {
    *(
        f"train/{name}"
        for name in ("loss", "base", "distillation", "lr", "grad_norm", "images_per_s", "data_wait")
    ),
    *(f"train_weighted/{name}" for name in ("base", "distillation")),
    *(f"{kind}/acc1" for kind in ("val", "val_ema", "val_teacher")),
}
# Of every chart its tag, and how many of its lines join points.
CHARTS = """deep('tf-scalar-card').map(card => [card.tag,
    deep('path.line', card.shadowRoot).filter(line => /L/.test(line.getAttribute('d'))).length])"""
IMAGES = """deep('tf-image-loader').map(card => [card.tag, card.shadowRoot.textContent,
    ...deep('img', card.shadowRoot).map(img => [img.naturalWidth, img.naturalHeight])])"""
OPEN_ALL = """deep('tf-category-paginated-view').filter(group => !group.opened)
    .map(group => deep('button', group.shadowRoot)[0].click()).length"""


@pytest.fixture(scope="module")
def board(browser, run_inside, tmp_path_factory) -> Iterator[tuple[str, Path]]:
    """The address of a TensorBoard that shows the quick start on few of its images; its run."""
    folder = tmp_path_factory.mktemp("board")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sources, "DIGITS_ROWS", {"train": (0, 64), "test": (1197, 1229)})
        run = run_inside(
            "--distillation-type",
            "hard",
            "--epochs",
            "4",
            "--batch-size",
            "16",
            "--log-interval",
            "1",
            "--output_dir",
            str(folder),
        )
    assert run.returncode == 0, run.stderr
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [
        sys.executable,
        "-m",
        "tensorboard.main",
        "--logdir",
        str(folder),
        "--port",
        str(port),
        "--load_fast",
        "false",
    ]
    said = folder / "tensorboard.log"
    with said.open("w") as output:
        server = subprocess.Popen(command, stdout=output, stderr=output)
    address = f"http://127.0.0.1:{port}/"
    try:
        for _ in range(240):
            try:
                if urllib.request.urlopen(address + "data/runs", timeout=5).read() != b"[]\n":
                    break
            except OSError:
                assert server.poll() is None, f"TensorBoard ended: {said.read_text()[-2000:]}"
            time.sleep(0.5)
        else:
            pytest.fail(f"TensorBoard shows no run: {said.read_text()[-2000:]}")
        yield address, folder
    finally:
        server.terminate()
        server.wait(30)


def show(browser: Chromium, board: tuple[str, Path], page: str) -> None:
    browser.open(f"{board[0]}#{page}", 1300, 4000)  # tall: charts outside of it are not drawn


def test_every_term_of_the_loss_and_every_accuracy_has_a_curve(browser, board, shots) -> None:
    show(browser, board, "scalars")
    browser.wait("deep('tf-scalar-card').length", "a chart")
    browser.value(OPEN_ALL)
    tags = json.dumps(sorted(CURVES))
    drawn = f"{CHARTS}.filter(([tag, lines]) => lines && {tags}.includes(tag)).length"
    try:
        browser.wait(f"{drawn} === {len(CURVES)}")
    except AssertionError:
        shown = {tag for tag, lines in browser.value(CHARTS) if lines}
        pytest.fail(f"no curve of {sorted(CURVES - shown)}; curves of {sorted(shown)}")
    finally:
        browser.screenshot(shots / "scalars.png")


def test_the_augmented_batch_and_attention_are_images_at_a_number_of_images(
    browser, board, shots
) -> None:
    show(browser, board, "images")
    browser.wait(f"{IMAGES}.filter(([,, size]) => size && size[0]).length >= 2", "two images")
    browser.screenshot(shots / "images.png")
    found = {tag: (words, size) for tag, words, size in browser.value(IMAGES)}
    assert set(found) == {"train/batch", "val/attention"}
    assert all(wide > 300 and high > 200 for _, (wide, high) in found.values())
    assert "256" in found["val/attention"][0], "4 epochs of 64 images"


def test_the_configuration_is_there_as_text(browser, board, shots) -> None:
    show(browser, board, "text")
    config = "deep('tf-markdown-view').map(view => view.shadowRoot.textContent).join(' ')"
    browser.wait(f"{config}.includes('teacher_model')", "the settings")
    browser.screenshot(shots / "text.png")
    text = browser.value(config)
    assert "distillation_type: hard" in text and "batch_size: 16" in text


def test_hyper_parameters_stand_beside_the_accuracy(browser, board, shots) -> None:
    show(browser, board, "hparams")
    cells = "deep('vaadin-grid-cell-content').map(cell => cell.textContent.trim())"
    browser.wait(f"{cells}.includes('batch_size') && {cells}.includes('16.000')", "the table")
    browser.screenshot(shots / "hparams.png")
    last = json.loads((board[1] / "log.txt").read_text().splitlines()[-1])
    found = browser.value(cells)
    assert {"val/acc1", "val_ema/acc1", "distillation_alpha"} <= set(found)
    for acc1 in (last["test_acc1"], last["ema_acc1"]):
        assert f"{acc1:.5g}" in {cell.rstrip("0").rstrip(".") for cell in found if "." in cell}
