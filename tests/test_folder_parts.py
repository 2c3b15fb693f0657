"""The training and the validation part of a folder of images."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from scipy.io import savemat

import options
from base.errors import UserError
from data.folder_parts import held_out, open_part
from data.image_source import Files
from data.transforms import InputConfig
from datasets import build_loaders
from training.trained_classes import build_val_fraction

CLASSES = ("bird", "cat", "dog")


def images(folder: Path, count: int, start: int = 0) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for number in range(start, start + count):
        Image.new("RGB", (8, 8), (number, 9, 9)).save(folder / f"{number:03d}.jpg")


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Class folders with 10, 5 and 3 images, without train/ and val/."""
    for name, count in zip(CLASSES, (10, 5, 3)):
        images(tmp_path / "data" / name, count)
    return tmp_path / "data"


def both(root: Path, **options: object) -> tuple[Files, Files]:
    return (
        open_part(str(root), is_train=True, **options),  # type: ignore[arg-type]
        open_part(str(root), is_train=False, **options),  # type: ignore[arg-type]
    )


def paths(source: Files) -> list[str]:
    return [source.path(index) for index in range(len(source))]


def one_line(error: pytest.ExceptionInfo) -> str:
    line = error.value.line()
    assert "\n" not in line and len(line) < 500
    return line


# ---- the split


def test_a_fifth_of_each_class_is_held_out_and_both_parts_together_are_all_images(root) -> None:
    train, val = both(root)
    assert np.bincount(val.labels).tolist() == [2, 1, 1]
    assert np.bincount(train.labels).tolist() == [8, 4, 2]
    assert train.classes == val.classes == list(CLASSES)
    assert sorted(paths(train) + paths(val)) == sorted(map(str, root.glob("*/*.jpg")))
    assert "(4 of 18 are held out)" in train.what and "20 % of each class" in val.what


def test_train_below_the_root_is_split_as_the_root_is(root: Path, tmp_path: Path) -> None:
    held = both(root)[1].names.tolist()
    root.rename(tmp_path / "train")
    assert both(tmp_path)[1].names.tolist() == held


def test_a_larger_share_contains_a_smaller_one_and_other_images_change_nothing() -> None:
    names = [f"cat/{number}.jpg" for number in range(50)]
    small = held_out(names, [0] * 50, 0.2)
    large = held_out(names, [0] * 50, 0.4)
    assert (small.sum(), large.sum()) == (10, 20) and not (small & ~large).any()
    more = held_out([*names, "dog/1.jpg", "dog/2.jpg"], [0] * 50 + [1, 1], 0.2)
    assert (more[:50] == small).all() and more[50:].sum() == 1


def test_the_split_never_changes() -> None:
    """Checkpoints, caches and reports of older versions depend on it."""
    names = [f"{name}/{number}.jpg" for name in CLASSES for number in range(5)]
    mask = held_out(names, [0] * 5 + [1] * 5 + [2] * 5, 0.2)
    assert [name for name, is_held in zip(names, mask) if is_held] == FIXED


FIXED = ["bird/2.jpg", "cat/3.jpg", "dog/2.jpg"]


@pytest.mark.parametrize(
    ("count", "share", "held"),
    [(1, 0.2, 0), (2, 0.2, 1), (2, 0.9, 1), (3, 0.01, 1), (4, 1, 4), (4, 0, 0), (10, 0.25, 2)],
)
def test_at_least_one_image_of_a_class_stays_on_each_side(count, share, held) -> None:
    assert held_out([f"{n}.jpg" for n in range(count)], [0] * count, share).sum() == held


# ---- folders


@pytest.mark.parametrize("name", ["val", "valid", "validation", "test"])
def test_a_validation_folder_of_any_usual_name_is_used(root: Path, tmp_path: Path, name) -> None:
    root.rename(tmp_path / "train")
    images(tmp_path / name / "cat", 2)
    train, val = both(tmp_path)
    assert len(train) == 18 and val.root == str(tmp_path / name) and len(val) == 2


def test_val_is_used_beside_test_and_two_other_names_are_refused(root, tmp_path) -> None:
    root.rename(tmp_path / "train")
    for name in ("test", "valid"):
        images(tmp_path / name / "cat", 2)
    with pytest.raises(UserError, match="has valid/ and test/; rename the one") as error:
        both(tmp_path)
    one_line(error)
    (tmp_path / "valid").rename(tmp_path / "val")
    assert both(tmp_path)[1].root == str(tmp_path / "val")


def settings(root: Path, *flags: str) -> options.argparse.Namespace:
    words = ["--data-path", str(root), "--num-workers", "0", "--batch-size", "2"]
    return options.parse_args([*words, *flags]).args


def load(root: Path, *flags: str, val_fraction: float | None = None):
    from base.distributed import init_processes

    args = settings(root, *flags)
    processes = init_processes("cpu")
    return build_loaders(
        args, InputConfig((8, 8), (0.5,) * 3, (0.5,) * 3), processes, None, val_fraction
    )


def test_val_fraction_changes_the_share_and_the_fingerprint(root: Path) -> None:
    default, half = load(root), load(root, "--val-fraction", "0.5")
    assert (len(default.data[1]), len(half.data[1])) == (4, 9)
    assert default.fingerprint() != half.fingerprint()
    assert "train on 9 images" in half.describe() and "50 % of each class" in half.describe()


def test_val_fraction_beside_a_validation_folder_is_refused(root: Path, tmp_path: Path) -> None:
    root.rename(tmp_path / "train")
    images(tmp_path / "val" / "cat", 2)
    with pytest.raises(UserError, match="--val-fraction 0.5: nothing is held out"):
        load(tmp_path, "--val-fraction", "0.5")


def test_val_fraction_1_evaluates_all_images_and_trains_on_none(root: Path) -> None:
    assert len(load(root, "--eval", "--val-fraction", "1").data[0]) == 18
    with pytest.raises(UserError, match="no image is left to train on"):
        load(root, "--val-fraction", "1")
    with pytest.raises(UserError, match="--val-fraction 0.0: must be above 0, at most 1"):
        settings(root, "--val-fraction", "0")


def test_an_evaluation_holds_out_what_its_run_held_out(root: Path, run_inside, tmp_path) -> None:
    model = ["--model", "resnet_pico", "--input-size", "16", "--data-path", str(root)]
    model += ["--num-workers", "0", "--batch-size", "2"]
    folder = str(tmp_path / "run")
    flags = ["--val-fraction", "0.4", "--epochs", "1", "--output_dir", folder]
    assert run_inside(*model, *flags).returncode == 0
    checkpoint = ["--eval", "--resume", f"{folder}/checkpoint.pth"]
    found = run_inside(*model, *checkpoint)
    assert "evaluate on 7 images" in found.stdout and "40 % of each class" in found.stdout
    other = run_inside(*model, *checkpoint, "--val-fraction", "0.2")
    assert "evaluate on 4 images" in other.stdout
    resumed = run_inside(*model, "--resume", "auto", "--output_dir", folder, "--epochs", "2")
    assert resumed.returncode == 2 and "--val-fraction was 0.4 and is None" in resumed.stderr


def test_the_share_of_a_run_is_not_read_for_training_or_a_validation_folder(root: Path) -> None:
    assert build_val_fraction(settings(root, "--finetune", "missing.pth")) is None
    images(root / "val" / "cat", 1)
    assert build_val_fraction(settings(root, "--eval", "--resume", "missing.pth")) is None


@pytest.mark.parametrize("flag", [["--val-fraction", "0.3"], ["--val-labels", "x.csv"]])
def test_packed_data_have_their_own_validation_part(flag: Sequence[str], tmp_path: Path) -> None:
    words = ["--data-set", "PREPARED", "--data-path", str(tmp_path), *flag]
    if flag[0] == "--val-labels":
        with pytest.raises(UserError, match="--data-set PREPARED has its own labels"):
            options.parse_args(words)
    else:
        notes = options.parse_args(words).notes
        assert any("--val-fraction has no effect here" in note for note in notes)


def test_packing_a_folder_without_a_validation_folder_packs_both_parts(root, tmp_path) -> None:
    from tools import prepare_data

    argv = [str(root), str(tmp_path / "packed"), "--num-workers", "0"]
    assert prepare_data.main(argv) == 0
    packed = load(tmp_path / "packed", "--data-set", "PREPARED")
    assert [len(part) for part in packed.data] == [14, 4]
    assert (
        prepare_data.main([str(root), str(tmp_path / "one"), *argv[2:], "--splits", "train"]) == 0
    )
    with pytest.raises(UserError) as error:
        load(tmp_path / "one", "--data-set", "PREPARED")
    assert "val" in one_line(error)


# ---- labels of a flat validation folder


@pytest.fixture
def flat(root: Path, tmp_path: Path) -> Path:
    """train/ with three classes and a flat val/ with 000.jpg, 001.jpg and 002.jpg."""
    folder = tmp_path / "flat"
    root.rename(tmp_path / "classes")
    folder.mkdir()
    (tmp_path / "classes").rename(folder / "train")
    images(folder / "val", 3)
    return folder


def write(folder: Path, text: str | bytes, name: str = "labels.csv") -> str:
    path = folder.parent / name
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return str(path)


@pytest.mark.parametrize(
    "text",
    [
        "name,class\n002.jpg,cat\n000.jpg,dog\n001.jpg,cat\n",
        "000,dog\r\n001,cat\r\n002,cat\r\n",
        "\ufeffimage\tlabel\tx0\n000.jpg\tdog\t0\n001.jpg\tcat\t1\n002.jpg\tcat\t1\n",
        '"000.jpg","dog"\n\n001.jpg, cat\n002.jpg,cat\n',
    ],
)
def test_a_table_gives_each_image_its_class(flat: Path, text: str) -> None:
    val = load(flat, "--val-labels", write(flat, text)).data[1]
    assert [Path(path).stem for path in paths(val.source)] == ["000", "001", "002"]
    assert [val[index][1] for index in range(3)] == [2, 1, 1]  # as the training data number them


def imagenet(tmp_path: Path) -> Path:
    for name in ("n01440764", "n02084071"):
        images(tmp_path / "imagenet/train" / name, 3)
    images(tmp_path / "imagenet/val", 0)
    for number in (1, 2, 3):
        path = tmp_path / "imagenet/val" / f"ILSVRC2012_val_{number:08d}.JPEG"
        Image.new("RGB", (8, 8)).save(path)
    return tmp_path / "imagenet"


def test_kaggles_solution_of_imagenet_is_read(tmp_path: Path) -> None:
    folder = imagenet(tmp_path)
    text = (
        "ImageId,PredictionString\n"
        "ILSVRC2012_val_00000003,n01440764 85 1 499 272 \n"
        "ILSVRC2012_val_00000001,n02084071 131 0 499 254 n02084071 1 2 3 4 \n"
        "ILSVRC2012_val_00000002,n01440764 0 0 9 9\n"
    )
    val = load(folder, "--val-labels", write(folder, text)).data[1]
    assert [val[index][1] for index in range(3)] == [1, 0, 0]


def test_the_ground_truth_of_the_development_kit_is_read(tmp_path: Path) -> None:
    folder = imagenet(tmp_path)
    file = write(folder, "7\n2\n7\n", "ILSVRC2012_validation_ground_truth.txt")
    arguments = ["--val-labels", file]
    with pytest.raises(UserError, match="meta.mat") as error:
        load(folder, *arguments)
    one_line(error)
    kinds = [("ILSVRC2012_ID", "O"), ("WNID", "O"), ("num_children", "O")]
    synsets = np.array([(2, "n02084071", 0), (7, "n01440764", 0)], dtype=kinds)
    savemat(Path(file).with_name("meta.mat"), {"synsets": synsets})
    val = load(folder, *arguments).data[1]
    assert [val[index][1] for index in range(3)] == [0, 1, 0]
    write(folder, "7\n2\n", Path(file).name)
    with pytest.raises(UserError, match="2 lines for 3 images"):
        load(folder, *arguments)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "is empty"),
        (b"\xff\xfe\x00\x01", "cannot be read (no text table)"),
        ("000.jpg\n001.jpg,cat\n002.jpg,cat\n", "no class for 000.jpg"),
        ("000.jpg,cat\n001.jpg,cat\n", "no line for 1 of 3 images"),
        ("000,cat\n001,cat\n002,cat\n003,cat\n", "1 of 4 images are not in"),
        ("000,cat\n000,dog\n001,cat\n002,cat\n", "two classes for 000"),
        ("000,cat\n001,catt\n002,cat\n", "did you mean cat"),
    ],
)
def test_a_table_that_does_not_fit_is_one_line(flat: Path, text, words) -> None:
    with pytest.raises(UserError) as error:
        load(flat, "--val-labels", write(flat, text))
    assert words in one_line(error)


def test_a_missing_table_and_a_missing_folder_are_one_line(flat: Path) -> None:
    with pytest.raises(UserError, match="cannot be read \\(No such file"):
        load(flat, "--val-labels", "missing.csv")
    with pytest.raises(UserError, match="no class folders in it; .* --val-labels FILE"):
        load(flat)
    (flat / "val").rename(flat / "other")
    with pytest.raises(UserError, match="has no validation folder"):
        load(flat, "--val-labels", "missing.csv")
