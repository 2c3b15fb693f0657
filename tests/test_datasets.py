"""Every data set by name, every way in which one can be wrong, and the loaders around them."""

import hashlib
import importlib.util
import io
import json
import logging
import os
import pickle
import random
import shutil
import sys
import tarfile
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor
from torchvision.datasets import CIFAR10, CIFAR100

import datasets
from base import distributed, flag_table
from base.distributed import Processes
from base.errors import UserError
from data import image_ops, image_source
from data import sources as data_sources
from data.packed import Prepared, Writer
from data.transforms import InputConfig
from datasets import Loaders, auto_workers, build_dataset, build_loaders
from options import get_args_parser
from tools import prepare_data

INPUTS = InputConfig((8, 8), mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5))
PLAIN = ["--aa", "", "--color-jitter", "0", "--reprob", "0"]


def settings(data_set: str, data_path: object = "", *flags: str) -> Namespace:
    return get_args_parser().parse_args(
        ["--data-set", data_set, "--data-path", str(data_path), "--num-workers", "0", *flags]
    )


def processes(rank: int = 0, world_size: int = 1) -> Processes:
    return Processes(rank, rank, world_size, torch.device("cpu"), "single")


def loaders(data_set: str, data_path: object, *flags: str, rank: int = 0, world: int = 1):
    return build_loaders(settings(data_set, data_path, *flags), INPUTS, processes(rank, world))


def grey(path: Path, value: int) -> Path:
    """Save an image of one grey value, by which the tests recognise it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (8, 8), (value,) * 3).save(path)
    return path


def greys(images: Tensor) -> list[int]:
    """Return the grey value of each image, whatever black border a crop has added."""
    return [round(value) for value in ((images.amax(dim=(1, 2, 3)) + 1) * 127.5).tolist()]


def make_folders(root: Path, train: str = "train", val: str = "val", classes: int = 2) -> Path:
    """Four train and two val images a class; image n has the grey value n."""
    number = 0
    for split, count in ((train, 4), (val, 2)):
        for label in range(classes):
            for image in range(count):
                grey(root / split / f"class{label}" / f"{image}.png", number)
                number += 1
    return root


@pytest.fixture
def folders(tmp_path: Path) -> Path:
    return make_folders(tmp_path / "images")


def spoil(path: Path) -> Path:
    path.write_bytes(b"no image at all")
    return path


def message(error: pytest.ExceptionInfo) -> str:
    """Return the one line the user sees."""
    line = error.value.line()
    assert "\n" not in line and len(line) < 400
    return line


# ---- every name ----


def test_the_digits_are_split_by_writers_and_keep_their_faces() -> None:
    sizes = {}
    for split in ("train", "dev", "test"):
        flags = [] if split == "train" else ["--val-split", split]
        data, classes = build_dataset(split == "train", settings("DIGITS", "", *flags), INPUTS)
        sizes[split] = len(data)
        assert classes == 10 and data.classes == list("0123456789")
    assert sizes == {"train": 897, "dev": 300, "test": 600}
    assert data.description == "600 digits (test), 10 classes"
    from sklearn.datasets import load_digits

    image, label = data[5]
    expected = torch.tensor(load_digits().images[1197 + 5] / 16 * 2 - 1)
    assert image.shape == (3, 8, 8) and image.dtype == torch.float32
    assert (image - expected).abs().max() < 0.005
    assert label == load_digits().target[1197 + 5] and type(label) is int


def test_digits_are_never_mirrored(folders: Path) -> None:
    for flags in (PLAIN, ["--ThreeAugment"]):
        digits, _ = build_dataset(True, settings("DIGITS", "", *flags), INPUTS)
        others, _ = build_dataset(True, settings("IMNET", folders, *flags), INPUTS)
        flips = [
            sum(getattr(step, "p", 0) for step in data.transform.transforms if "Flip" in str(step))
            for data in (digits, others)
        ]
        assert flips == [0, 0.5]


@pytest.mark.parametrize("name", ["IMNET", "folder", "folder/", "image_folder", "torch/folder"])
def test_folders_are_read_alike_under_every_name(name: str, folders: Path) -> None:
    train, classes = build_dataset(True, settings(name, folders, *PLAIN), INPUTS)
    val, _ = build_dataset(False, settings(name, folders), INPUTS)
    assert (len(train), len(val), classes) == (8, 4, 2)
    assert train.classes == val.classes == ["class0", "class1"]
    images, labels = zip(*(val[i] for i in range(4)))
    assert greys(torch.stack(images)) == [8, 9, 10, 11]
    assert labels == (0, 0, 1, 1)
    assert train[7][1] == 1


def test_relative_paths_hidden_files_and_nested_folders_are_understood(
    folders: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    grey(folders / "val" / "class1" / "nested" / "LAST.PNG", 99)
    (folders / "val" / "class1" / "._0.png").write_bytes(b"a Mac's shadow")
    (folders / "val" / "class1" / "notes.txt").write_text("no image")
    (folders / "val" / ".cache").mkdir()
    monkeypatch.chdir(folders.parent)
    data, classes = build_dataset(False, settings("IMNET", folders.name), INPUTS)
    assert classes == 2 and greys(data[4][0][None]) == [99]
    assert data.description == "5 images in images/val, 2 classes"
    data, _ = build_dataset(True, settings("folder", folders.name), INPUTS)
    assert data.description == "8 images of folder (train of images), 2 classes"
    assert data[0][1] == 0


def write_cifar(root: Path, reader: type, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Write CIFAR's own files with two images each, and let torchvision expect their sums."""
    folder = root / reader.base_folder
    folder.mkdir(parents=True)

    def dump(name: str, content: dict) -> list[str]:
        data = pickle.dumps(content)
        (folder / name).write_bytes(data)
        return [name, hashlib.md5(data).hexdigest()]

    count, key = (10, "labels") if reader is CIFAR10 else (100, "fine_labels")
    for kind, first in (("train_list", 0), ("test_list", 100)):
        listed = []
        for number, (name, _) in enumerate(getattr(reader, kind)):
            images = np.full((2, 3072), first + number, dtype=np.uint8)
            listed.append(dump(name, {"data": images, key: [number, count - 1]}))
        monkeypatch.setattr(reader, kind, listed)
    names = {reader.meta["key"]: [f"class{label:02d}" for label in range(count)]}
    meta = dict(zip(("filename", "md5"), dump(reader.meta["filename"], names)))
    monkeypatch.setattr(reader, "meta", reader.meta | meta)
    return folder


@pytest.mark.parametrize(("name", "reader"), [("CIFAR10", CIFAR10), ("CIFAR", CIFAR100)])
def test_cifar_is_read_as_unpacked_from_its_archive(
    name: str, reader: type, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = write_cifar(tmp_path, reader, monkeypatch)
    count = 10 if reader is CIFAR10 else 100
    for root in (tmp_path, folder):
        train, classes = build_dataset(True, settings(name, root, *PLAIN), INPUTS)
        val, _ = build_dataset(False, settings(name, root), INPUTS)
        assert classes == count == len(val.classes)
        assert (len(train), len(val)) == (2 * len(reader.train_list), 2)
        assert greys(val[1][0][None]) == [100] and val[1][1] == count - 1
    torch_name = f"torch/{'cifar10' if count == 10 else 'cifar100'}"
    val, classes = build_dataset(False, settings(torch_name, tmp_path), INPUTS)
    assert classes == count and greys(val[1][0][None]) == [100] and val[1][1] == count - 1

    (folder / reader.test_list[0][0]).write_bytes(b"half a download")
    with pytest.raises(UserError, match="incomplete or damaged; unpack https://") as error:
        build_dataset(False, settings(name, tmp_path), INPUTS)
    assert str(folder) in message(error)


@pytest.mark.parametrize("val", ["test", "val"])
def test_cifar_is_read_as_folders_of_images(val: str, tmp_path: Path) -> None:
    root = make_folders(tmp_path, val=val, classes=10)
    data, classes = build_dataset(False, settings("CIFAR10", root), INPUTS)
    assert (len(data), classes) == (20, 10)
    with pytest.raises(UserError, match="10 classes, CIFAR-100 has 100"):
        build_dataset(False, settings("CIFAR", root), INPUTS)


def test_where_no_cifar_is_the_user_is_told_what_to_fetch(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="fetch https://.*cifar-10-python.tar.gz") as error:
        build_dataset(True, settings("CIFAR10", tmp_path), INPUTS)
    message(error)


def test_real_cifar_and_imagenet_images_are_read(
    cifar10_images: Path, imagenet_sample: Path
) -> None:
    train, classes = build_dataset(True, settings("CIFAR10", cifar10_images), INPUTS)
    val, _ = build_dataset(False, settings("CIFAR10", cifar10_images), INPUTS)
    assert (len(train), len(val), classes) == (5000, 1000, 10)
    val, classes = build_dataset(False, settings("IMNET", imagenet_sample), INPUTS)
    assert (len(val), classes) == (1000, 1000)
    assert val[0][0].shape == (3, 8, 8) and val[999][1] == 999


def make_inat(root: Path, year: int, short: bool) -> Path:
    """iNaturalist with gaps in its category ids, listed in another order than their ids."""
    root.mkdir(parents=True, exist_ok=True)
    categories = [
        {"id": 7, "name": "Corvus corax", "genus": "Corvus", "supercategory": "Aves"},
        {"id": 2, "name": "Bufo bufo", "genus": "Bufo", "supercategory": "Amphibia"},
        {"id": 9, "name": "Corvus corone", "genus": "Corvus", "supercategory": "Aves"},
    ]
    (root / "categories.json").write_text(json.dumps(categories))
    shown = {"train": [(9, 90), (2, 20), (7, 70), (2, 21)], "val": [(7, 71), (9, 91)]}
    for split, rows in shown.items():
        images, annotations = [], []
        for category, value in rows:
            area = f"train_val{year}"
            group = next(c["supercategory"] for c in categories if c["id"] == category)
            full = f"{area}/{group}/{category}/{value}.png"
            grey(root / (f"{area}/{category}/{value}.png" if short else full), value)
            images.append({"id": 1000 + value, "file_name": full})
            annotations.insert(0, {"image_id": 1000 + value, "category_id": category})
        listing = {"images": images, "annotations": annotations}
        (root / f"{split}{year}.json").write_text(json.dumps(listing))
    return root


@pytest.mark.parametrize("short", [True, False], ids=["DeiT's folders", "the archive's folders"])
@pytest.mark.parametrize(("name", "year"), [("INAT", 2018), ("INAT19", 2019)])
def test_inaturalist_labels_follow_the_category_ids(
    name: str, year: int, short: bool, tmp_path: Path
) -> None:
    root = make_inat(tmp_path, year, short)

    def labels(is_train: bool, category: str) -> dict[int, str]:
        data, count = build_dataset(
            is_train, settings(name, root, "--inat-category", category, *PLAIN), INPUTS
        )
        assert count == len(data.classes)
        files = (Path(data.source.name(i)).stem for i in range(len(data)))
        return {int(file): data.classes[data[i][1]] for i, file in enumerate(files)}

    species = {2: "Bufo bufo", 7: "Corvus corax", 9: "Corvus corone"}
    assert labels(True, "name") == {v: species[v // 10] for v in (90, 20, 70, 21)}
    assert labels(False, "name") == {71: "Corvus corax", 91: "Corvus corone"}
    assert labels(False, "genus") == {71: "Corvus", 91: "Corvus"}
    val, count = build_dataset(False, settings(name, root), INPUTS)
    assert val.classes == ["Bufo bufo", "Corvus corax", "Corvus corone"] and count == 3
    assert greys(val[1][0][None]) == [91] and val[1][1] == 2


def test_what_is_wrong_with_inaturalist_is_told_in_one_line(tmp_path: Path) -> None:
    root = make_inat(tmp_path, 2018, short=True)

    def told(name: str = "INAT", *flags: str) -> str:
        with pytest.raises(UserError) as error:
            build_dataset(True, settings(name, root, *flags), INPUTS)
        return message(error)

    assert "train2019.json: No such file" in told("INAT19")
    assert "--inat-category kingdom" in told("INAT", "--inat-category", "kingdom")
    listing = json.loads((root / "train2018.json").read_text())
    shutil.rmtree(root / "train_val2018")
    assert "Aves/9/90.png: not there; unpack the images" in told()
    (root / "train2018.json").write_text(json.dumps(listing | {"annotations": []}))
    assert "do not fit" in told()
    (root / "train2018.json").write_text(json.dumps(listing | {"images": []}))
    assert "names no image" in told()
    (root / "train2018.json").write_text("[1, 2")
    assert "train2018.json: not readable as JSON" in told()


# ---- which data it is ----


def named(name: str, root: Path, *flags: str) -> str:
    return loaders(name, root, "--batch-size", "2", *flags).fingerprint()


@pytest.mark.parametrize("name", ["IMNET", "folder"])
def test_a_copied_folder_is_the_same_data_and_other_images_of_its_names_are_not(
    name: str, folders: Path, tmp_path: Path
) -> None:
    known = named(name, folders)
    copy = shutil.copytree(folders, tmp_path / "elsewhere")
    assert named(name, copy) == known
    image = copy / "train" / "class1" / "2.png"
    Image.open(image).resize((6, 6)).save(image)
    assert named(name, copy) != known, "resized"
    data = bytearray((folders / "train" / "class1" / "2.png").read_bytes())
    data[-20] ^= 1
    image.write_bytes(data)
    assert named(name, copy) != known, "as many bytes, but others"
    image.unlink()
    image.with_name("5.png").write_bytes(data)
    assert named(name, copy) != known, "renamed"


def test_of_many_images_those_looked_at_lie_all_over_the_list(monkeypatch) -> None:
    assert image_source.spread(3, 10) == [0, 1, 2]
    assert image_source.spread(1_281_167, 4) == [0, 320291, 640583, 960875]
    seen: list[str] = []
    monkeypatch.setattr(image_source, "_size", lambda path: seen.append(path) or len(path))
    names = [f"{number % 7}/{number}.png" for number in range(5000)]
    image_source.Files("nowhere", names, [number % 7 for number in range(5000)], None).identity()
    assert len(seen) == image_source.SIZES + image_source.CONTENTS, (
        "not a look at each of a million files"
    )
    assert {path.split("/")[1] for path in seen} == set("0123456")


@pytest.mark.parametrize("part", ["pixel", "label", "size"])
def test_images_without_files_are_known_by_pixels_and_labels(part: str) -> None:
    def pairs() -> list:
        return [(Image.new("RGB", (4, 6), (number,) * 3), number % 3) for number in range(20)]

    known = image_source.Pairs(pairs(), None, "greys").identity()
    assert image_source.Pairs(pairs(), None, "greys").identity() == known
    other = pairs()
    if part == "pixel":
        other[13][0].putpixel((3, 2), (1, 2, 3))
    else:
        shape = (6, 4) if part == "size" else (4, 6)
        other[13] = (Image.new("RGB", shape, (13,) * 3), 13 % 3 + (part == "label"))
    assert image_source.Pairs(other, None, "greys").identity() != known


def test_the_train_data_are_known_apart() -> None:
    both = [loaders("DIGITS", "", "--val-split", split) for split in ("test", "dev")]
    assert both[0].fingerprint() != both[1].fingerprint()
    assert both[0].fingerprint(of_train=True) == both[1].fingerprint(of_train=True)


# ---- shards ----


def write_shards(root: Path, *, bad_label: bool = False) -> Path:
    """Two train shards and one val shard of WebDataset, with timm's table of contents."""
    root.mkdir()
    splits, number = {}, 0
    for split, shards in (("train", 2), ("validation", 1)):
        files = [f"{split}-{shard}.tar" for shard in range(shards)]
        for file in files:
            with tarfile.open(root / file, "w") as tar:
                for _ in range(4):
                    image = io.BytesIO()
                    Image.new("RGB", (8, 8), (number,) * 3).save(image, "png")
                    label = 9 if bad_label else number % 2
                    for ending, data in (("png", image.getvalue()), ("cls", b"%d" % label)):
                        member = tarfile.TarInfo(f"{number:03d}.{ending}")
                        member.size = len(data)
                        tar.addfile(member, io.BytesIO(data))
                    number += 1
        splits[split] = {
            "name": split,
            "filenames": files,
            "shard_lengths": [4] * shards,
            "num_samples": 4 * shards,
        }
    (root / "_info.json").write_text(json.dumps({"splits": splits}))
    return root


has_webdataset = importlib.util.find_spec("webdataset") is not None


@pytest.mark.skipif(not has_webdataset, reason="the package webdataset is not installed")
@pytest.mark.parametrize("workers", ["0", "2"])
def test_shards_are_streamed_and_evaluation_counts_what_comes(tmp_path: Path, workers: str) -> None:
    root = write_shards(tmp_path / "shards")
    flags = ["--nb-classes", "2", "--batch-size", "2", "--num-workers", workers, *PLAIN]
    with pytest.raises(UserError, match="--nb-classes"):
        loaders("wds/digits", root)
    data = loaders("wds/digits", root, *flags)
    assert data.train_sampler is None and data.num_classes == 2
    assert "8 images streamed from wds/digits (train of" in data.describe()
    for _ in range(2):
        seen = torch.cat([images for images, _ in data.val])
        assert sorted(greys(seen)) == [8, 9, 10, 11]
    epochs = []
    for epoch in (0, 1):
        data.set_epoch(epoch)
        batches = list(data.train)
        assert len(batches) == len(data.train) == 4
        epochs.append(greys(torch.cat([images for images, _ in batches])))
        for images, labels in batches:
            assert [value % 2 for value in greys(images)] == labels.tolist()
        assert set(epochs[-1]) <= set(range(8))
    assert epochs[0] != epochs[1]
    assert data.skipped() == 0


@pytest.mark.skipif(not has_webdataset, reason="the package webdataset is not installed")
def test_shards_are_known_by_their_sizes(tmp_path: Path) -> None:
    root = write_shards(tmp_path / "shards")
    flags = ["--nb-classes", "2"]
    known = named("wds/digits", root, *flags)
    assert named("wds/digits", shutil.copytree(root, tmp_path / "copy"), *flags) == known
    with open(root / "train-1.tar", "ab") as file:
        file.write(bytes(10240))
    assert named("wds/digits", root, *flags) != known


@pytest.mark.skipif(not has_webdataset, reason="the package webdataset is not installed")
def test_shards_are_prepared_in_their_order_however_often_it_was_stopped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    root, made = write_shards(tmp_path / "shards"), tmp_path / "made"
    command = [str(root), str(made), "--data-set", "wds/digits"]
    append = Writer.append

    def full(writer: Writer, *entry: object) -> None:
        if writer.rows in stops:
            stops.remove(writer.rows)
            raise OSError("no space left")
        append(writer, *entry)

    stops = [2, 7]
    monkeypatch.setattr(Writer, "append", full)
    assert [prepare_data.main(command) for _ in range(3)] == [2, 2, 0]
    assert "train: goes on after 7 of 8" in capsys.readouterr().out
    for split, first, count in (("train", 0, 8), ("val", 8, 4)):
        source = Prepared(made, split)
        images = [source.load(index) for index in range(len(source))]
        assert [int(image.max()) for image, _ in images] == list(range(first, first + count))
        assert [label for _, label in images] == [number % 2 for number in range(count)]
    with open(root / "train-1.tar", "ab") as file:
        file.write(bytes(10240))
    assert prepare_data.main(command) == 2, "other shards"
    assert "pictures train was" in capsys.readouterr().err


@pytest.mark.skipif(not has_webdataset, reason="the package webdataset is not installed")
def test_shards_are_not_evaluated_in_several_processes_without_a_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    root = write_shards(tmp_path / "shards")
    for world in (1, 2):
        assert "may count an image twice" not in caplog.text
        loaders("wds/digits", root, "--nb-classes", "2", "--batch-size", "2", world=world)
    assert "evaluation on shards in 2 processes may count an image twice" in caplog.text


@pytest.mark.skipif(not has_webdataset, reason="the package webdataset is not installed")
def test_a_label_beyond_the_classes_is_told_before_it_breaks_the_loss(tmp_path: Path) -> None:
    root = write_shards(tmp_path / "shards", bad_label=True)
    data = loaders("wds/digits", root, "--nb-classes", "2", "--batch-size", "2")
    with pytest.raises(UserError, match="label 9: must be a class number from 0 to 1"):
        next(iter(data.val))


@pytest.mark.parametrize("name", ["wds/none", "tfds/none", "torch/cifar10", "torch/none"])
def test_what_timm_cannot_open_is_told_in_one_line(name: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=f"--data-set {name}: timm cannot open its train") as error:
        build_dataset(True, settings(name, tmp_path, "--nb-classes", "2"), INPUTS)
    message(error)


# ---- names and folders that are wrong ----


@pytest.mark.parametrize("name", ["hfds/cifar10", "HFIDS/owner/name"])
def test_hugging_face_data_sets_are_refused_with_a_way_out(name: str) -> None:
    with pytest.raises(UserError, match="save their images as train/<class>/") as error:
        build_dataset(True, settings(name), INPUTS)
    message(error)


@pytest.mark.parametrize(
    ("name", "meant"),
    [
        ("IMAGENET", "IMNET"),
        ("imnet", "IMNET"),
        ("cifar-10", "CIFAR10"),
        ("wds", "wds/NAME"),
        ("fodler", "folder"),
        ("DIGIT", "DIGITS"),
        ("x/y", None),
    ],
)
def test_an_unknown_name_lists_the_known_ones(name: str, meant: str | None) -> None:
    with pytest.raises(UserError, match=f"--data-set {name}: unknown") as error:
        build_dataset(True, settings(name, "."), INPUTS)
    assert "known are DIGITS, CIFAR10, CIFAR, IMNET, INAT, INAT19" in message(error)
    assert ("did you mean" in message(error)) == (meant is not None)
    assert meant is None or f"did you mean {meant}?" in message(error)


@pytest.mark.parametrize("name", ["CIFAR10", "CIFAR", "IMNET", "INAT", "INAT19", "folder"])
def test_a_missing_folder_is_named(name: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="--data-path .*nowhere: not there") as error:
        loaders(name, tmp_path / "nowhere")
    message(error)
    with pytest.raises(UserError, match="a_file: not a folder"):
        (tmp_path / "a_file").touch()
        loaders(name, tmp_path / "a_file")
    with pytest.raises(UserError, match="--data-path"):
        loaders(name, "")


@pytest.mark.parametrize("name", ["IMNET", "folder"])
def test_a_folder_without_its_parts_is_refused(name: str, folders: Path) -> None:
    (folders / "val").rename(folders / "extra")
    if name == "folder":  # IMNET holds out a part of train/
        with pytest.raises(UserError, match="needs train/ and val/, .* has extra/, train/"):
            loaders(name, folders)
    shutil.rmtree(folders / "train")
    (folders / "extra").rename(folders / "train")
    for label in ("class0", "class1"):
        shutil.rmtree(folders / "train" / label)
    with pytest.raises(UserError) as error:
        loaders(name, folders)
    assert str(folders / "train") in message(error)


@pytest.mark.parametrize("name", ["IMNET", "folder"])
def test_empty_class_folders_are_skipped_and_named(name: str, folders: Path, caplog) -> None:
    (folders / "val" / "empty1").mkdir()
    (folders / "val" / "class3" / "nested").mkdir(parents=True)
    data = loaders(name, folders, "--batch-size", "4")
    assert data.classes == ["class0", "class1"] and len(data.data[1]) == 4
    assert "skipped class folders without images: 2 (class3, ...)" in caplog.text


@pytest.mark.parametrize("name", ["IMNET", "folder"])
def test_a_class_folder_in_which_no_file_is_an_image_is_refused(name: str, folders: Path) -> None:
    (folders / "val" / "class2").mkdir()
    (folders / "val" / "class2" / "0.heic").touch()
    with pytest.raises(
        UserError, match=r"no file in class2 is an image \(files with suffix .heic: 1"
    ):
        loaders(name, folders)


@pytest.mark.parametrize("name", ["IMNET", "folder"])
def test_a_single_class_is_refused(name: str, folders: Path) -> None:
    for split in ("train", "val"):
        shutil.rmtree(folders / split / "class1")
    with pytest.raises(UserError, match=r"all images are of one class \(class0\), so there is"):
        loaders(name, folders, "--batch-size", "2")


@pytest.mark.parametrize("name", ["IMNET", "folder"])
def test_a_validation_class_that_is_not_trained_is_named(name: str, folders: Path) -> None:
    (folders / "val" / "class1").rename(folders / "val" / "klass1")
    grey(folders / "val" / "other" / "0.png", 1)
    with pytest.raises(UserError, match="not a class of the training data: klass1, other "):
        loaders(name, folders, "--batch-size", "2")


@pytest.mark.parametrize("name", ["IMNET", "folder"])
def test_validation_folders_may_lack_a_class(name: str, folders: Path, caplog) -> None:
    for image in range(4):
        grey(folders / "train" / "class05" / f"{image}.png", 200)
    shutil.rmtree(folders / "val" / "class0")
    data = loaders(name, folders, "--batch-size", "2")
    assert data.num_classes == 3 and len(data.classes) == 3
    label = data.classes.index("class1")
    assert torch.cat([labels for _, labels in data.val]).tolist() == [label] * 2
    assert data.present == [label]
    assert "no images of 2 of the model's 3 classes (class0, class05)" in caplog.text


def test_too_few_classes_are_refused_and_more_are_allowed(folders: Path) -> None:
    with pytest.raises(UserError, match="--nb-classes 1: .* have 2 classes"):
        loaders("IMNET", folders, "--nb-classes", "1")
    data = loaders("IMNET", folders, "--nb-classes", "1000", "--batch-size", "2")
    assert data.num_classes == 1000


@pytest.mark.parametrize(("world", "fits"), [(1, 8), (3, 2)])
def test_a_batch_larger_than_the_data_is_refused(world: int, fits: int, folders: Path) -> None:
    with pytest.raises(UserError, match=f"use --batch-size {fits} or less") as error:
        loaders("IMNET", folders, "--batch-size", str(fits + 1), world=world)
    message(error)
    assert len(loaders("IMNET", folders, "--batch-size", str(fits), world=world).train) == 1


def test_evaluation_alone_needs_no_train_data(folders: Path) -> None:
    shutil.rmtree(folders / "train")
    data = loaders("IMNET", folders, "--eval")
    assert data.train is None and data.train_sampler is None
    assert data.describe() == f"evaluate on 4 images in {folders}/val, 2 classes; no workers"
    data.set_epoch(1)
    assert sum(len(labels) for _, labels in data.val) == 4


# ---- images that are wrong ----


def cut(path: Path) -> Path:
    """Cut an image in half: Pillow opens it, and fails when it decodes."""
    Image.effect_noise((64, 64), 90).save(path)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    return path


@pytest.mark.parametrize(
    ("name", "damage", "workers"),
    [
        (name, damage, "0")
        for name in ("IMNET", "folder", "torch/folder")
        for damage in (spoil, cut, Path.unlink)
    ]
    + [("IMNET", cut, "2")],
)
def test_an_unreadable_image_stops_the_run_and_is_named(
    name: str, damage: Callable[[Path], object], workers: str, folders: Path
) -> None:
    bad = folders / "val" / "class1" / "0.png"
    data = loaders(name, folders, "--batch-size", "2", "--num-workers", workers)
    damage(bad)
    line = ""
    try:
        list(data.val)
    except UserError as error:
        line = error.line()
        error.with_traceback(None)  # it would hold the workers until some later test
    assert line.startswith(f"image {bad} cannot be read: ")
    assert line.endswith("repair or remove it, or use --on-bad-image skip")


@pytest.mark.parametrize("workers", ["0", "2"])
def test_skipped_images_are_replaced_in_training_left_out_of_evaluation_and_counted(
    workers: str, folders: Path, capfd: pytest.CaptureFixture, caplog: pytest.LogCaptureFixture
) -> None:
    spoil(folders / "train" / "class0" / "3.png")
    for image in ("0.png", "1.png"):
        spoil(folders / "val" / "class0" / image)
    logging.getLogger().addHandler(handler := logging.StreamHandler())
    try:
        data = loaders(
            "IMNET",
            folders,
            "--on-bad-image",
            "skip",
            "--batch-size",
            "1",
            "--no-repeated-aug",
            "--num-workers",
            workers,
            *PLAIN,
        )
        assert data.skipped() == 0
        for epoch in range(2):
            data.set_epoch(epoch)
            seen = [(greys(images)[0], int(labels)) for images, labels in data.train]
        val = [greys(images) for images, _ in data.val]
    finally:
        logging.getLogger().removeHandler(handler)
    assert sorted(seen) == [(0, 0), (1, 0), (2, 0), (4, 1), (4, 1), (5, 1), (6, 1), (7, 1)]
    assert val == [[10], [11]], "nothing in evaluation counts twice"
    assert data.skipped() == 3, "each once, however often it was met"
    told = capfd.readouterr().err
    assert told.count("class0/3.png cannot be read: not an image; skipped") >= 1


@pytest.mark.parametrize("world", [1, 2])
def test_views_of_a_image_that_come_in_a_row_are_decoded_once(
    folders: Path, monkeypatch: pytest.MonkeyPatch, world: int
) -> None:
    decoded = []
    decode = image_source.decode
    monkeypatch.setattr(image_source, "decode", lambda data: decoded.append(1) or decode(data))
    for rank in range(world):
        data = loaders("IMNET", folders, "--batch-size", "4", rank=rank, world=world)
        keys = list(data.train_sampler)
        images = 1 + sum(one[0] != other[0] for one, other in zip(keys, keys[1:]))
        decoded.clear()
        assert sum(len(labels) for _, labels in data.train) == len(keys) == 8 // world
        assert len(decoded) == images < len(keys)


def test_a_replacement_is_the_next_readable_image(folders: Path) -> None:
    for image in ("2.png", "3.png"):
        spoil(folders / "train" / "class0" / image)
    args = settings("IMNET", folders, "--on-bad-image", "skip", *PLAIN)
    data, _ = build_dataset(True, args, INPUTS)
    data.transform = datasets.build_transform(False, args, INPUTS)
    assert [(greys(data[i][0][None])[0], data[i][1]) for i in (1, 2, 3, 4)] == [
        (1, 0),
        (4, 1),
        (4, 1),
        (4, 1),
    ]
    assert data.skipped() == 2


def test_the_first_image_follows_the_last_and_a_lost_disk_is_no_bad_image(
    folders: Path,
) -> None:
    args = settings("IMNET", folders, "--on-bad-image", "skip", *PLAIN)
    data, _ = build_dataset(True, args, INPUTS)
    spoil(folders / "train" / "class1" / "3.png")
    assert data[7][1] == 0
    data, _ = build_dataset(True, args, INPUTS)
    shutil.rmtree(folders / "train")
    with pytest.raises(UserError, match="8 images in a row cannot be read, .*check the disk"):
        data[2]


def test_grey_and_transparent_images_become_rgb(folders: Path) -> None:
    for number, mode in enumerate(("L", "RGBA", "P", "1")):
        path = folders / "val" / f"class{number // 2}" / f"{number % 2}.png"
        Image.new(mode, (20, 30)).save(path)
    data = loaders("IMNET", folders, "--eval")
    ((images, _),) = list(data.val)
    assert images.shape == (4, 3, 8, 8)


# ---- loaders ----


def epoch_of(data: Loaders, epoch: int) -> tuple[Tensor, Tensor]:
    data.set_epoch(epoch)
    images, labels = zip(*data.train)
    return torch.cat(images), torch.cat(labels)


def test_neither_workers_nor_history_change_a_pixel() -> None:
    flags = ["--batch-size", "100", "--ThreeAugment", "--no-repeated-aug"]
    alone = loaders("DIGITS", "", *flags)
    first, labels = epoch_of(alone, 1)
    with_workers = loaders("DIGITS", "", *flags, "--num-workers", "2")
    _ = epoch_of(with_workers, 0), random.random(), torch.rand(3)
    others, other_labels = epoch_of(with_workers, 1)
    assert first.equal(others) and labels.equal(other_labels)
    assert not first.equal(epoch_of(alone, 2)[0])
    assert not first.equal(epoch_of(loaders("DIGITS", "", *flags, "--seed", "1"), 1)[0])


def test_loading_in_the_main_process_leaves_its_generators_alone() -> None:
    data = loaders("DIGITS", "", "--batch-size", "8")
    random.seed(3), np.random.seed(3), torch.manual_seed(3)
    before = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()
    next(iter(data.train)), next(iter(data.val))
    after = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()
    assert after == before


@pytest.mark.parametrize("flags", [[], ["--no-repeated-aug"]], ids=["repeated", "plain"])
def test_the_batches_of_two_processes_are_together_the_batch_of_one(flags: list[str]) -> None:
    flags = [*flags, "--reprob", "0"]
    one = loaders("DIGITS", "", "--batch-size", "64", *flags)
    two = [loaders("DIGITS", "", "--batch-size", "32", *flags, rank=r, world=2) for r in (0, 1)]
    assert len({len(data.train) for data in two}) == 1
    batches = [iter(data.train) for data in two]
    for images, labels in list(one.train)[:3]:
        parts = [next(batch) for batch in batches]
        union = torch.stack([part[0] for part in parts], 1).flatten(0, 1)
        assert union.equal(images)
        assert torch.stack([part[1] for part in parts], 1).flatten().equal(labels)


def test_repeated_augmentation_is_on_in_one_process_too() -> None:
    data = loaders("DIGITS", "", "--batch-size", "96")
    assert (len(data.train_sampler), len(data.train)) == (768, 8)
    assert "(an epoch: 768 views, 3 of an image)" in data.describe()
    _, labels = epoch_of(data, 0)
    assert labels[0::3].equal(labels[1::3]) and labels[0::3].equal(labels[2::3])


def test_an_epoch_can_go_on_in_its_middle() -> None:
    flags = ["--batch-size", "128", *PLAIN]
    images, _ = epoch_of(loaders("DIGITS", "", *flags), 2)
    resumed = loaders("DIGITS", "", *flags)
    resumed.set_epoch(2)
    resumed.train_sampler.set_start(256)
    rest = torch.cat([images for images, _ in resumed.train])
    assert rest.equal(images[256:])


@pytest.mark.parametrize("world", [1, 3, 5])
def test_evaluation_sees_every_image_exactly_once(world: int, folders: Path) -> None:
    seen = []
    for rank in range(world):
        data = loaders("IMNET", folders, "--eval", "--batch-size", "1", rank=rank, world=world)
        seen += [value for images, _ in data.val for value in greys(images)]
    assert sorted(seen) == [8, 9, 10, 11], "also where a process has nothing to do"


def test_batches_have_the_asked_sizes_and_the_last_one_of_an_epoch_is_dropped() -> None:
    data = loaders("DIGITS", "", "--batch-size", "100", "--no-repeated-aug", *PLAIN)
    assert [len(labels) for _, labels in data.train] == [100] * 8
    assert [len(labels) for _, labels in data.val] == [150] * 4
    images, labels = next(iter(data.val))
    assert images.dtype == torch.float32 and labels.dtype == torch.int64


def test_what_is_loaded_is_told_in_one_line() -> None:
    data = loaders("DIGITS", "", "--no-repeated-aug", "--num-workers", "2")
    assert data.describe() == (
        "train on 897 digits (train), 10 classes; evaluate on 600 digits (test), 10 classes; "
        "2 workers"
    )


def test_data_travel_to_workers_that_do_not_fork(folders: Path) -> None:
    flags = ["--on-bad-image", "skip", "--batch-size", "4"]
    for name in ("IMNET", "folder"):
        data = loaders(name, folders, *flags).train.dataset
        copy = pickle.loads(pickle.dumps(data))
        assert copy[3, 1][0].equal(data[3, 1][0])


@pytest.mark.parametrize(
    ("launcher", "environ", "cores", "workers"),
    [
        ("single", {}, 4, 4),
        ("single", {}, 16, 16),
        ("single", {}, 192, 32),
        ("single", {"SLURM_TASKS_PER_NODE": "8", "SLURM_CPUS_PER_TASK": "1"}, 4, 4),
        ("torchrun", {"LOCAL_WORLD_SIZE": "8"}, 64, 8),
        ("torchrun", {"LOCAL_WORLD_SIZE": "8"}, 4, 0),
        ("slurm", {"SLURM_TASKS_PER_NODE": "4(x2),2"}, 32, 8),
        ("slurm", {"SLURM_TASKS_PER_NODE": "4", "SLURM_CPUS_PER_TASK": "6"}, 32, 6),
    ],
)
def test_the_cores_of_a_node_are_shared_by_its_processes(
    launcher: str, environ: dict, cores: int, workers: int
) -> None:
    assert auto_workers(launcher, environ, cores) == workers


def test_images_of_sixteen_bits_are_scaled_and_not_clipped() -> None:
    values = np.array([[0, 256, 32768, 65535]], dtype=np.uint16)
    assert np.asarray(image_ops.to_rgb(Image.fromarray(values)))[0, :, 0].tolist() == [
        0,
        1,
        128,
        255,
    ]
    with pytest.raises(ValueError, match="mode F"):
        image_ops.to_rgb(Image.fromarray(values.astype(np.float32)))


@pytest.mark.parametrize(("most", "warned"), [(4095, True), (65535, False)])
def test_12_bit_data_in_16_bit_files_are_warned_of(
    folders: Path, caplog, most: int, warned: bool
) -> None:
    for path in folders.glob("*/*/*.png"):
        values = np.linspace(0, most, 64).reshape(8, 8).astype(np.uint16)
        Image.fromarray(values).save(path)
    loaders("IMNET", folders, "--batch-size", "2")
    assert ("the values of 16-bit images reach 4095 of 65535" in caplog.text) == warned
    assert ("multiplied by 16" in caplog.text) == warned


def test_the_help_lists_every_data_set() -> None:
    assert set(flag_table.DATA_SETS) == set(data_sources.DATA_SETS)


KILL_AT_FORK: list[int] = []  # signals that a process sends to itself as soon as it is forked
os.register_at_fork(
    after_in_child=lambda: [os.kill(os.getpid(), number) for number in KILL_AT_FORK] and None
)


def test_a_stop_signal_does_not_end_a_worker_that_is_starting(
    folders: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = loaders("IMNET", folders, "--batch-size", "2", "--num-workers", "2")
    for number in distributed.STOP_SIGNALS:
        monkeypatch.setattr(sys.modules[__name__], "KILL_AT_FORK", [number])
        for loader in (data.train, data.val):
            assert len(list(loader)) == len(loader)
            loader._iterator = None  # ends the workers, so that the next signal meets new ones
