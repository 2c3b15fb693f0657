"""What all tests share: one thread, no network, the repository's programs, real data if there."""

import contextlib
import io
import os
import signal
import subprocess
import sys
import tarfile
from collections.abc import Callable, Iterator
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import chromium
import programs
import pytest
import torch

torch.set_num_threads(1)
signal.signal(signal.SIGINT, signal.default_int_handler)  # a job in the background ignores it

ROOT = Path(__file__).resolve().parents[1]
SHARED = ROOT.parent / "shared" / "data"


def pytest_configure(config: pytest.Config) -> None:
    """Hide the GPU, because tests mean the CPU. `-m gpu` selects those that mean a GPU."""
    if config.getoption("markexpr") != "gpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip the tests with the marker `gpu` if there is no GPU."""
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="needs a GPU; none was found"))


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder with real ImageNet and CIFAR-10 images beside the checkout."""
    if not SHARED.is_dir():
        pytest.skip("the real images beside the checkout (../shared/data) are not there")
    return SHARED


def _unpack(archive: Path, folder: Path) -> Path:
    with tarfile.open(archive) as tar:
        if sys.version_info >= (3, 12):
            tar.extractall(folder, filter="data")
        else:
            tar.extractall(folder)
    return folder / archive.stem


@pytest.fixture(scope="session")
def imagenet_sample(shared_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """1000 ImageNet images, one a class, under val/; their folder."""
    folder = tmp_path_factory.mktemp("imagenet")
    return _unpack(shared_data / "imagenet_sample_256.tar", folder).with_name("imagenet_sample_256")


@pytest.fixture(scope="session")
def cifar10_images(shared_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """5,000 train and 1,000 test CIFAR-10 images as an image folder."""
    return _unpack(shared_data / "cifar10_jpeg.tar", tmp_path_factory.mktemp("cifar10"))


@pytest.fixture(scope="session")
def image_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An image folder of real digits: train/ and val/ of classes "one", "two"; 12 + 6 images."""
    from PIL import Image
    from sklearn.datasets import load_digits

    root = tmp_path_factory.mktemp("images")
    digits = load_digits()
    for label, name in ((1, "one"), (2, "two")):
        rows = digits.images[digits.target == label]
        for split, chosen in (("train", rows[:12]), ("val", rows[12:18])):
            folder = root / split / name
            folder.mkdir(parents=True)
            for number, row in enumerate(chosen):
                image = Image.fromarray((row * 15.9).astype("uint8")).convert("RGB")
                image.resize((32, 32)).save(folder / f"{number:02d}.png")
    return root


@pytest.fixture(scope="session")
def folder_flags(image_folder: Path) -> list[str]:
    """The flags of a small run that saves every step; mixing, erasing, views and EMA are on."""
    return [
        "--model",
        "deit_pico_distilled_patch4_32",
        "--batch-size",
        "4",
        "--epochs",
        "2",
        "--warmup-epochs",
        "0",
        "--log-interval",
        "1",
        "--drop-path",
        "0.2",
        "--checkpoint-steps",
        "1",
        "--resume",
        "auto",
        "--data-path",
        str(image_folder),
    ]


@pytest.fixture(scope="session")
def small_run(run_inside, folder_flags: list[str], tmp_path_factory) -> tuple[Path, list[str]]:
    """The folder and the flags of such a run that has done one epoch, with two checkpoints."""
    folder = tmp_path_factory.mktemp("run") / "out"
    flags = [*folder_flags, "--num_workers", "0", "--unscale-lr", "--output_dir", str(folder)]
    result = run_inside(*flags, "--epochs", "1")
    assert result.returncode == 0, result.stderr
    return folder, flags


@pytest.fixture(scope="session")
def small_teacher(run_inside, folder_flags: list[str], tmp_path_factory) -> Path:
    """The checkpoint of a CNN that knows the two classes."""
    folder = tmp_path_factory.mktemp("teacher")
    result = run_inside(
        *folder_flags,
        "--model",
        "resnet_pico",
        "--epochs",
        "1",
        "--output_dir",
        str(folder),
        "--num_workers",
        "0",
    )
    assert result.returncode == 0, result.stderr
    return folder / "checkpoint.pth"


Run = Callable[..., subprocess.CompletedProcess]


def _saves_nothing(flags: tuple[str, ...]) -> list[str]:
    """Return the flags with an empty output folder if they name none, so that no test leaves one
    in the checkout."""
    names_folder = any(flag.startswith("--out") for flag in flags)
    return [*flags] if names_folder else ["--output-dir", "", *flags]


def _run(command: list[str], cwd: Path, timeout: float, **env: str) -> subprocess.CompletedProcess:
    environ = {k: v for k, v in os.environ.items() if not k.startswith(("SLURM_", "MASTER_"))}
    environ |= {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), **env}
    return subprocess.run(
        command, cwd=cwd, env=environ, capture_output=True, text=True, timeout=timeout
    )


@pytest.fixture(scope="session")
def run_main() -> Run:
    """`python main.py FLAGS` in a forked process; with `processes`, in several."""
    return programs.run


@pytest.fixture(scope="session")
def run_inside() -> Run:
    """The same in this process: without the seconds that a new one takes to import torch."""

    def run(*flags: str) -> subprocess.CompletedProcess:
        import main

        out, err = io.StringIO(), io.StringIO()
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            code = main.run(_saves_nothing(flags))
        return subprocess.CompletedProcess(flags, code, out.getvalue(), err.getvalue())

    return run


@pytest.fixture(scope="session")
def run_torchrun() -> Run:
    """`torchrun --nproc_per_node=N main.py FLAGS` in processes of their own."""

    def run(processes: int, *flags: str, cwd: Path = ROOT, timeout: float = 300, **env: str):
        launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
        words = _saves_nothing(flags) if cwd == ROOT else flags
        command = [*launcher, f"--nproc_per_node={processes}", str(ROOT / "main.py"), *words]
        return _run(command, cwd, timeout, **env)

    return run


@pytest.fixture(scope="session")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[chromium.Chromium]:
    """A real browser. Tests that use it are skipped if there is none."""
    program = chromium.find()
    if program is None:
        pytest.skip("no chromium to look at the page with; apt-get install it")
    with chromium.Chromium(program, tmp_path_factory.mktemp("chromium")) as page:
        yield page


@pytest.fixture
def shots(tmp_path: Path) -> Path:
    """The folder for screenshots: that of the variable SCREENSHOTS, to keep them."""
    folder = Path(os.environ.get("SCREENSHOTS", tmp_path))
    folder.mkdir(parents=True, exist_ok=True)
    return folder
