"""Inputs that once failed (../shared/cases): each ends as its line in cases.txt says."""

import contextlib
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import timm
import torch
from PIL import Image

import models
import options
from data.transforms import InputConfig, eval_transform
from tools import prepare_data

ROOT = Path(__file__).resolve().parents[1]
MAKE_CASES = ROOT.parent / "shared" / "cases" / "make_cases.py"
pytestmark = pytest.mark.skipif(
    not MAKE_CASES.is_file(), reason="../shared/cases/make_cases.py is not there"
)

MODEL = "resnet_pico"
SMALL = ["--model", MODEL, "--num-workers", "0", "--batch-size", "16", "--warmup-epochs", "0"]
SMALL += ["--epochs", "1", "--lr", "0.002", "--unscale-lr", "--no-repeated-aug", "--no-model-ema"]
SMALL += ["--aa", "none", "--mixup", "0", "--cutmix", "0"]
COVERED = {"own_folder", "three", "three_renamed", "two_of_three", "three_other_case", "numbered"}
COVERED |= {"val_lacks_a_class", "junk", "suffixes", "photos", "structured", "flat_val"}
COVERED |= {"own_folder_unlabelled"}
COVERED |= {"no_split", "val_is_called_valid", "val_is_called_validation", "val_is_called_test"}
STRUCTURED = {  # the words of the line, or "" for a file that is read
    "aliases.yaml": "aliases expand to more than",
    "self_reference.yaml": "a value contains itself",
    "deep.json": "nested deeper than 50 levels",
    "huge_integer.json": "5000 digits is too large",
    "utf16_with_bom.yaml": "",
    "latin1.json": "is not UTF-8 text",
    "list_for_number.yaml": "temperature: found [1, 2], expected",
    "r_list_for_number.yaml": "epochs: found [1], expected",
    "r_unknown_need.yaml": "nosuchflag",
    "r_word_for_number.yaml": "acc1: found 'abc', expected a number",
}
Run = Callable[..., subprocess.CompletedProcess]


@contextlib.contextmanager
def time_limit(seconds: float) -> Iterator[None]:
    """Raise TimeoutError in the block after `seconds`."""

    def stop(number: int, frame: object) -> None:
        raise TimeoutError(f"longer than {seconds} s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


@pytest.fixture(scope="module")
def cases(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of all cases."""
    folder = tmp_path_factory.mktemp("cases")
    subprocess.run([sys.executable, str(MAKE_CASES), str(folder)], check=True, timeout=240)
    return folder


@pytest.fixture(scope="module")
def run(run_inside: Run) -> Run:
    """Run a command line in this process, with a time limit."""

    def run_limited(*flags: str, limit_s: float = 60) -> subprocess.CompletedProcess:
        with time_limit(limit_s):
            return run_inside(*flags)

    return run_limited


def train(run: Run, data: Path, *flags: str) -> subprocess.CompletedProcess:
    found = run(*SMALL, "--data-path", str(data), *flags)
    assert found.returncode == 0, found.stderr
    return found


def one_line(found: subprocess.CompletedProcess) -> str:
    """Return the error line of a run, which must be the only one."""
    lines = [line for line in found.stderr.splitlines() if line.startswith("error: ")]
    assert found.returncode == 2 and len(lines) == 1, found.stderr
    assert "Traceback" not in found.stderr
    return lines[0]


@pytest.fixture(scope="module")
def trained(cases: Path, run: Run, tmp_path_factory) -> Path:
    """A checkpoint of a model that was trained on `three`."""
    folder = tmp_path_factory.mktemp("trained")
    train(run, cases / "three", "--epochs", "8", "--output_dir", str(folder))
    return folder / "checkpoint.pth"


def accuracy(checkpoint: Path, val: Path, names: list[str]) -> float:
    """Return the accuracy of a checkpoint in %, worked out without our loaders.

    names: the name of each output of the model. All outputs compete.
    """
    content = torch.load(checkpoint, weights_only=True)
    model = timm.create_model(MODEL, num_classes=len(names)).eval()
    model.load_state_dict(content["model"])
    config = models.data_config(MODEL)
    inputs = InputConfig((32, 32), config["mean"], config["std"], config["interpolation"])
    prepare = eval_transform(inputs)
    right = []
    for folder in sorted(val.iterdir()):
        images = [prepare(Image.open(path).convert("RGB")) for path in sorted(folder.iterdir())]
        with torch.no_grad():
            classes = model(torch.stack(images)).argmax(1)
        right += (classes == names.index(folder.name)).tolist()
    return 100 * sum(right) / len(right)


def evaluate(run: Run, checkpoint: Path, data: Path, *flags: str) -> subprocess.CompletedProcess:
    words = ["--eval", "--model", MODEL, "--num-workers", "0", "--resume", str(checkpoint)]
    return run(*words, "--data-path", str(data), *flags)


def test_every_case_is_covered(cases: Path) -> None:
    names = {line.split(":")[0] for line in (cases / "cases.txt").read_text().splitlines()}
    assert names == COVERED


def test_a_folder_without_parts_is_split(cases: Path, run: Run) -> None:
    out = train(run, cases / "no_split").stdout
    assert "train on 96 images" in out and "(24 of 120 are held out)" in out
    assert "evaluate on 24 images" in out and "20 % of each class" in out


@pytest.mark.parametrize("name", ["valid", "validation", "test"])
def test_other_names_of_the_validation_folder_are_used_and_printed(cases, run, name) -> None:
    folder = cases / f"val_is_called_{name}"
    assert f"evaluate on 30 images in {folder / name}" in train(run, folder).stdout


def test_a_flat_validation_folder_is_evaluated_by_its_table(cases: Path, run: Run) -> None:
    line = one_line(run(*SMALL, "--data-path", str(cases / "flat_val")))
    assert "no class folders" in line and "--val-labels FILE" in line
    out = train(run, cases / "flat_val", "--val-labels", str(cases / "flat_val/val.csv")).stdout
    assert f"evaluate on 30 images in {cases / 'flat_val/val'}, 3 classes" in out


def test_unlabelled_images_are_no_data_set_of_their_own(cases: Path, run: Run) -> None:
    folder = str(cases / "own_folder_unlabelled")
    assert "needs train/ and val/" in one_line(run(*SMALL, "--data-path", folder))


def test_own_folder_trains(cases: Path, run: Run) -> None:
    out = train(run, cases / "own_folder").stdout
    assert "train on 480 images" in out and "evaluate on 600 images" in out
    assert "6 classes" in out


def test_images_without_labels_join_own_folder(cases: Path, run: Run, tmp_path: Path) -> None:
    distils = ["--distillation-type", "hard", "--teacher-model", MODEL, "--no-teacher-check"]
    teacher = train(run, cases / "own_folder", "--output_dir", str(tmp_path)).stdout
    assert "480 images" in teacher
    distils += ["--teacher-path", str(tmp_path / "checkpoint.pth")]
    distils += ["--unlabelled-path", str(cases / "own_folder_unlabelled")]
    out = train(run, cases / "own_folder", *distils).stdout
    assert "train on 1980 images: 480 labelled images in" in out
    assert "1500 unlabelled images in" in out


def test_the_accuracy_on_three_is_that_of_its_model(cases: Path, run: Run, trained: Path) -> None:
    acc1 = accuracy(trained, cases / "three/val", ["bird", "cat", "dog"])
    assert acc1 != accuracy(trained, cases / "three/val", ["cat", "dog", "bird"])
    found = evaluate(run, trained, cases / "three")
    assert found.returncode == 0 and f"* Acc@1 {acc1:.3f}" in found.stdout


def test_a_renamed_class_is_refused_by_name(cases: Path, run: Run, trained: Path) -> None:
    assert "zbird" in one_line(evaluate(run, trained, cases / "three_renamed"))


def test_another_case_of_a_letter_is_refused_by_name(cases: Path, run: Run, trained: Path) -> None:
    line = one_line(evaluate(run, trained, cases / "three_other_case"))
    assert "Dog" in line and "did you mean dog" in line


@pytest.mark.parametrize("flags", [[], ["--nb-classes", "3"]])
def test_two_of_three_classes_are_evaluated_by_name(cases, run, trained, flags) -> None:
    acc1 = accuracy(trained, cases / "two_of_three/val", ["bird", "cat", "dog"])
    wrong = accuracy(trained, cases / "two_of_three/val", ["cat", "dog", "bird"])
    found = evaluate(run, trained, cases / "two_of_three", *flags)
    assert found.returncode == 0 and f"* Acc@1 {acc1:.3f}" in found.stdout
    assert acc1 != wrong


def test_a_validation_folder_that_lacks_a_class_is_evaluated(cases: Path, run: Run) -> None:
    found = train(run, cases / "val_lacks_a_class")
    assert "evaluate on 40 images" in found.stdout
    assert "no images of 1 of the model's 3 classes (cat)" in found.stderr


def test_both_readers_give_numbered_classes_the_same_accuracy(cases, run, tmp_path) -> None:
    train(run, cases / "numbered", "--epochs", "4", "--output_dir", str(tmp_path))
    checkpoint = tmp_path / "checkpoint.pth"
    acc1 = accuracy(checkpoint, cases / "numbered/val", ["1", "10", "2"])
    assert acc1 != accuracy(checkpoint, cases / "numbered/val", ["1", "2", "10"])
    for reader in ("IMNET", "folder/"):
        found = evaluate(run, checkpoint, cases / "numbered", "--data-set", reader)
        assert found.returncode == 0 and f"* Acc@1 {acc1:.3f}" in found.stdout, reader


@pytest.mark.parametrize("reader", ["IMNET", "folder/"])
def test_junk_is_skipped_and_listed(cases: Path, run: Run, reader: str) -> None:
    found = train(run, cases / "junk", "--data-set", reader)
    assert "train on 30 images" in found.stdout and "3 classes" in found.stdout
    check_junk_is_listed(found.stderr)


def check_junk_is_listed(text: str) -> None:
    line = next(line for line in text.splitlines() if "skipped" in line)
    for words in (
        "hidden files or folders: 2",
        "images outside class folders: 1 (loose.jpg)",
        "files with suffix .db: 1 (dog/Thumbs.db)",
        "pipes or devices: 1 (dog/pipe.jpg)",
        "links to folders that are read already: 1 (cat/loop)",
        "class folders without images: 1 (__MACOSX)",
    ):
        assert words in line, line


def test_prepared_data_skip_the_same_junk(cases: Path, tmp_path: Path, capsys) -> None:
    argv = [str(cases / "junk"), str(tmp_path / "packed"), "--num-workers", "0"]
    with time_limit(60):
        assert prepare_data.main(argv) == 0
    check_junk_is_listed(capsys.readouterr().out)


def test_images_with_other_suffixes_or_none_are_used(cases: Path, run: Run) -> None:
    found = train(run, cases / "suffixes")
    assert "train on 30 images" in found.stdout and "3 classes" in found.stdout


def test_photos_of_unequal_classes_train(cases: Path, run: Run) -> None:
    out = train(run, cases / "photos").stdout
    count = len(list((cases / "photos/train").glob("*/*")))
    assert f"train on {count} images" in out and "5 classes" in out


@pytest.mark.parametrize("name", STRUCTURED)
def test_structured_files_are_read_or_refused_in_one_line(cases, run, name) -> None:
    path, words = str(cases / "structured" / name), STRUCTURED[name]
    flag = "--recipe" if name.startswith("r_") else "--distill-config"
    argv = [*SMALL, "--teacher-model", MODEL, flag, path]
    argv += ["--data-path", str(cases / "three"), "--dry-run"]
    if not words:
        assert options.parse_args(argv).args.distillation_tau == 4
    found = run(*argv, limit_s=10)
    assert found.returncode == 0 if not words else words in one_line(found), found.stderr


def test_every_structured_file_has_a_row_here(cases: Path) -> None:
    assert {path.name for path in (cases / "structured").iterdir()} == set(STRUCTURED)
