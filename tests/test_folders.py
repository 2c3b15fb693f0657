"""Which files of a folder are images, in which order, and what is said about the others."""

import os
import shutil
from pathlib import Path

import pytest
from PIL import Image

from base.errors import UserError
from base.text import printable
from data import packed
from data.folders import list_images
from tools import prepare_data


def save(path: Path, suffix: str = ".png", kind: str = "PNG") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (4, 4), (9, 9, 9)).save(path.with_suffix(suffix), kind)
    return path.with_suffix(suffix)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two images in each of the classes 1, 2 and 10."""
    for name in ("1", "2", "10"):
        for number in range(2):
            save(tmp_path / "data" / name / f"{number}.png")
    return tmp_path / "data"


def add_junk(folder: Path) -> None:
    first = folder / "10" / "0.png"
    for name in ("__MACOSX", ".ipynb_checkpoints"):
        (folder / name).mkdir()
    shutil.copy(first, folder / "loose.png")
    (folder / "10" / ".ipynb_checkpoints").mkdir()
    shutil.copy(first, folder / "10" / ".ipynb_checkpoints" / "0.png")
    (folder / "10" / "Thumbs.db").write_bytes(b"\0" * 10)
    (folder / "10" / "gone.png").symlink_to("nowhere.png")
    os.mkfifo(folder / "10" / "pipe.jpg")
    (folder / "2" / "loop").symlink_to("..")
    (folder / "again").symlink_to("1")


@pytest.mark.parametrize("natural_order", [False, True])
def test_what_is_no_image_is_skipped_and_counted(folder: Path, natural_order: bool) -> None:
    before = list_images(folder, natural_order=natural_order)
    assert before.skipped.describe() == ""
    add_junk(folder)
    found = list_images(folder, natural_order=natural_order)
    assert (found.paths, found.labels, found.classes) == (
        before.paths,
        before.labels,
        before.classes,
    )
    assert found.skipped.counts == {
        "hidden files or folders": 2,
        "images outside class folders": 1,
        "links to folders that are read already": 2,
        "files with suffix .db": 1,
        "broken links": 1,
        "pipes or devices": 1,
        "class folders without images": 1,
    }
    assert "pipes or devices: 1 (10/pipe.jpg)" in found.skipped.describe()


def test_strings_and_numbers_are_sorted_as_the_two_readers_do(folder: Path) -> None:
    assert list_images(folder).classes == ["1", "10", "2"]
    assert list_images(folder, natural_order=True).classes == ["1", "2", "10"]


def test_natural_order_is_timms_for_images_and_classes(folder: Path) -> None:
    from timm.data.readers.reader_image_folder import find_images_and_targets

    for name in ("10.png", "9.png", "B.png", "a.png"):
        save(folder / "2" / name)
    save(folder / "2" / "nested" / "0.png")  # timm's class is the name of the inner folder
    timms, numbers = find_images_and_targets(str(folder))
    found = list_images(folder, natural_order=True)
    assert [os.path.join(folder, path) for path in found.paths] == [path for path, _ in timms]
    assert found.labels == [label for _, label in timms]
    assert found.classes == sorted(numbers, key=numbers.__getitem__)


def test_linked_class_folders_and_images_are_read(folder: Path, tmp_path: Path) -> None:
    links = tmp_path / "links"
    links.mkdir()
    (links / "cat").symlink_to(folder / "1")
    (links / "dog").mkdir()
    (links / "dog" / "x.png").symlink_to(folder / "2" / "0.png")
    assert list_images(links).paths == ["cat/0.png", "cat/1.png", "dog/x.png"]


def test_images_without_a_known_suffix_are_recognised_by_their_first_bytes(folder: Path) -> None:
    for number, kind in enumerate(("JPEG", "PNG", "BMP", "TIFF", "WEBP", "GIF")):
        save(folder / "3" / str(number), "", kind)
    save(folder / "3" / "photo.jfif", ".jfif", "JPEG")
    (folder / "3" / "README").write_text("no image")
    found = list_images(folder)
    assert found.labels.count(3) == 7
    assert found.skipped.describe() == "files without suffix: 1 (3/README)"


def test_a_folder_of_other_files_alone_is_refused_and_an_empty_one_skipped(folder: Path) -> None:
    (folder / "empty").mkdir()
    assert list_images(folder).skipped.examples == {"class folders without images": "empty"}
    (folder / "empty" / "photo.heic").touch()
    with pytest.raises(
        UserError, match=r"no file in empty is an image \(files with suffix .heic: 1"
    ):
        list_images(folder)


def test_prepared_data_have_the_same_images(folder: Path, tmp_path: Path, capsys) -> None:
    root = tmp_path / "root"
    root.mkdir()
    folder.rename(root / "train")
    shutil.copytree(root / "train", root / "val")
    add_junk(root / "train")
    made = tmp_path / "made"
    assert prepare_data.main([str(root), str(made), "--num-workers", "0"]) == 0
    assert "train: skipped hidden files or folders: 2" in capsys.readouterr().out
    assert len(packed.Prepared(made, "train")) == len(packed.Prepared(made, "val")) == 6


def test_names_are_printed_without_control_characters(folder: Path) -> None:
    name = "a\x1b[31m\n\u202eb\udcff ü"
    assert printable(name) == "a\\x1b[31m\\n\\u202eb\\udcff ü"
    (folder / "1" / "a\x1b[31m\n.xyz").touch()
    assert list_images(folder).skipped.describe() == (
        "files with suffix .xyz: 1 (1/a\\x1b[31m\\n.xyz)"
    )
