"""A prepared data set: the same images in a few files, however often its making was stopped."""

import contextlib
import errno
import fcntl
import io
import json
import multiprocessing
import os
import pickle
import shutil
import signal
import sys
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import datasets
from base.distributed import Processes
from base.errors import UserError
from data import image_ops, image_source, packed
from data.image_ops import size_of
from data.packed import Prepared
from data.transforms import InputConfig
from datasets import build_dataset, build_loaders
from options import get_args_parser
from tools import prepare_data as tool

INPUTS = InputConfig((40, 40), mean=(0.5, 0.5, 0.5), std=(0.25, 0.25, 0.25))
FORMS = ("raw", "jpeg")


def settings(folder: object, *flags: str, name: str = "PREPARED"):
    return get_args_parser().parse_args(
        [
            "--data-set",
            name,
            "--data-path",
            str(folder),
            "--num-workers",
            "0",
            "--batch-size",
            "7",
            *flags,
        ]
    )


def load(folder: object, *flags: str, name: str = "PREPARED", rank: int = 0, world: int = 1):
    place = Processes(rank, rank, world, torch.device("cpu"), "single")
    return build_loaders(settings(folder, *flags, name=name), INPUTS, place)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Images of several shapes and formats: two classes, 7 to train and 3 to evaluate."""
    root = tmp_path_factory.mktemp("source")
    rng = np.random.default_rng(0)
    shapes = [(50, 70), (70, 50), (64, 64), (31, 90), (45, 45)]
    for split, count in (("train", 7), ("val", 3)):
        for number in range(count):
            coarse = rng.integers(0, 256, (6, 5, 3), dtype=np.uint8)
            shape = shapes[number % len(shapes)]
            image = Image.fromarray(coarse).resize(shape[::-1], Image.Resampling.BICUBIC)
            path = (
                root / split / f"class{number % 2}" / f"{number}.{('jpg', 'png')[number % 3 == 2]}"
            )
            path.parent.mkdir(parents=True, exist_ok=True)
            image.save(path)
    return root


def prepare(source: object, target: Path, *flags: str) -> Path:
    assert (
        tool.main([str(source), str(target), "--short-side", "45", "--num-workers", "0", *flags])
        == 0
    )
    return target


@pytest.fixture(scope="module", params=FORMS)
def made(request: pytest.FixtureRequest, folder: Path, tmp_path_factory) -> Path:
    return prepare(folder, tmp_path_factory.mktemp("made") / "out", "--format", request.param)


def content(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def test_images_keep_class_order_and_shape_and_are_never_enlarged(folder: Path, made: Path) -> None:
    assert len(list(made.iterdir())) == 5
    for is_train in (True, False):
        data, classes = build_dataset(is_train, settings(made), INPUTS)
        plain, _ = build_dataset(is_train, settings(folder, name="IMNET"), INPUTS)
        assert classes == 2 and data.classes == ["class0", "class1"]
        assert len(data) == len(plain)
        for index in range(len(data)):
            ours, label = data.source.load(index)
            theirs, wanted = plain.source.load(index)
            height, width = size_of(theirs)
            scale = min(1.0, 45 / min(height, width))
            assert size_of(ours) == (round(height * scale), round(width * scale))
            assert label == wanted
    assert f"train on 7 images prepared in {made} (train), 2 classes" in load(made).describe()


def test_raw_pixels_are_pillows(folder: Path, tmp_path: Path) -> None:
    source = Prepared(prepare(folder, tmp_path / "out"), "val")
    for index, path in enumerate(sorted((folder / "val").glob("*/*"))):
        image = Image.open(path).convert("RGB")
        ours = source.load(index)[0]
        theirs = image.resize(ours.shape[1::-1], Image.Resampling.BICUBIC)
        assert np.array_equal(ours, np.asarray(theirs))


def test_jpeg_files_that_fit_stay_as_they_are(folder: Path, tmp_path: Path) -> None:
    made = prepare(folder, tmp_path / "out", "--format", "jpeg", "--short-side", "80")
    kept = (made / "train.bin").read_bytes()
    files = [path.read_bytes() for path in (folder / "train").glob("*/*.jpg")]
    assert files and all(data in kept for data in files)


def test_training_on_what_was_not_shrunk_is_training_on_the_files(
    folder: Path, tmp_path: Path
) -> None:
    made = prepare(folder, tmp_path / "out", "--short-side", "100")
    one, two = load(made, "--batch-size", "3"), load(folder, "--batch-size", "3", name="IMNET")
    for epoch in range(2):
        one.set_epoch(epoch), two.set_epoch(epoch)
        for ours, theirs in zip(one.train, two.train):
            assert ours[0].equal(theirs[0]) and ours[1].equal(theirs[1])
    (ours, _), (theirs, _) = next(iter(one.val)), next(iter(two.val))
    assert ours.equal(theirs)


def test_neither_workers_nor_processes_change_a_pixel(made: Path) -> None:
    flags = ["--batch-size", "2", "--no-repeated-aug"]
    alone = [images for images, _ in load(made, *flags).train]
    workers = [images for images, _ in load(made, *flags, "--num-workers", "2").train]
    assert all(one.equal(other) for one, other in zip(alone, workers))
    ranks = [
        load(made, "--batch-size", "1", "--no-repeated-aug", rank=r, world=2).train for r in (0, 1)
    ]
    parts = [torch.cat(pair) for pair in zip(*([images for images, _ in rank] for rank in ranks))]
    assert len(parts) == 3 and all(one.equal(other) for one, other in zip(alone, parts))


@pytest.mark.parametrize("form", FORMS)
def test_a_killed_preparation_goes_on_to_the_same_bits(
    form: str, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(packed, "SYNC_ROWS", 2)
    whole = content(prepare(folder, tmp_path / "whole", "--format", form))
    row = packed.ROW.itemsize
    rows = np.frombuffer(whole["train.table"], packed.ROW)
    size = len(whole["train.bin"])
    for number, (table, images) in enumerate(
        [
            (0, 0),
            (0, 17),
            (2 * row, int(rows["offset"][2])),
            (2 * row, int(rows["offset"][3]) + 5),
            (2 * row + 9, size),
            (4 * row, int(rows["offset"][4]) - 1),
            (7 * row, size),
        ]
    ):
        target = tmp_path / f"killed{number}"
        target.mkdir()
        plan = json.loads(whole[packed.MANIFEST])["plan"]
        (target / packed.PLAN).write_text(json.dumps({"plan": plan}))
        (target / "train.table").write_bytes(whole["train.table"][:table])
        (target / "train.bin").write_bytes(whole["train.bin"][:images])
        with pytest.raises(UserError, match="not complete; start"):
            Prepared(target, "train")
        assert content(prepare(folder, target, "--format", form)) == whole


def _prepare_and_die(folder: Path, target: Path) -> None:
    append = packed.Writer.append

    def last(writer: packed.Writer, *entry: object) -> None:
        if writer.rows == 3:
            os.kill(os.getpid(), signal.SIGKILL)
        append(writer, *entry)

    packed.Writer.append = last
    prepare(folder, target, "--num-workers", "2")


def test_after_a_kill_no_whole_image_is_lost_and_no_worker_holds_the_files(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    whole = content(prepare(folder, tmp_path / "whole"))
    fork = multiprocessing.get_context("fork")
    killed = fork.Process(target=_prepare_and_die, args=(folder, tmp_path / "out"))
    killed.start()
    killed.join()
    assert killed.exitcode == -signal.SIGKILL
    assert content(prepare(folder, tmp_path / "out")) == whole, "at once, beside orphaned workers"
    assert "train: goes on after 3 of 7" in capsys.readouterr().out


def test_two_processes_do_not_write_the_same_files(folder: Path, tmp_path: Path) -> None:
    made = prepare(folder, tmp_path / "out")
    plan = json.loads((made / packed.MANIFEST).read_text())["plan"]
    (made / packed.MANIFEST).unlink()
    (made / packed.PLAN).write_text(json.dumps({"plan": plan}))
    with open(made / "train.table", "r+b") as table:
        fcntl.lockf(table, fcntl.LOCK_EX)
        fork = multiprocessing.get_context("fork")
        other = fork.Process(target=lambda: sys.exit(_refused(folder, made)))
        other.start()
        other.join()
    assert other.exitcode == 0
    prepare(folder, made)


def _refused(folder: Path, made: Path) -> int:
    err = io.StringIO()
    with contextlib.redirect_stderr(err):
        code = tool.main([str(folder), str(made), "--short-side", "45", "--num-workers", "0"])
    return 0 if code == 2 and "another process is writing there" in err.getvalue() else 1


@pytest.mark.parametrize("form", FORMS)
def test_a_image_is_decoded_once(
    form: str, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen, decode = [], image_ops.decode
    for room in (image_ops, image_source):
        monkeypatch.setattr(room, "decode", lambda data: seen.append(data) or decode(data))
    prepare(folder, tmp_path / "out", "--format", form)
    assert len(seen) == 10


def test_what_was_damaged_while_it_was_off_is_made_again(folder: Path, tmp_path: Path) -> None:
    whole = content(prepare(folder, tmp_path / "out"))
    manifest = json.loads((tmp_path / "out" / packed.MANIFEST).read_text())
    (tmp_path / "out" / packed.MANIFEST).unlink()
    (tmp_path / "out" / packed.PLAN).write_text(json.dumps({"plan": manifest["plan"]}))
    flip_a_bit(tmp_path / "out" / "train.bin", 5000)
    assert content(prepare(folder, tmp_path / "out")) == whole


def flip_a_bit(path: Path, place: int) -> None:
    data = bytearray(path.read_bytes())
    data[place] ^= 4
    path.write_bytes(data)


def test_other_settings_and_foreign_folders_are_refused(
    folder: Path, made: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    form = json.loads((made / packed.MANIFEST).read_text())["kind"]
    assert tool.main([str(folder), str(made), "--short-side", "44", "--format", form]) == 2
    assert "begun with other settings: short side was 45 and is 44" in capsys.readouterr().err
    prepare(folder, made, "--format", form)
    assert "complete already" in capsys.readouterr().out
    (tmp_path / "letter.txt").write_text("dear")
    assert tool.main([str(folder), str(tmp_path)]) == 2
    assert "holds other files" in capsys.readouterr().err
    for flags in (["--quality", "0"], ["--short-side", "0"], ["--num-workers", "-1"]):
        assert tool.main([str(folder), str(tmp_path / "new"), *flags]) == 2


@pytest.mark.parametrize("name", ["train.bin", "train.table"])
def test_truncated_files_are_refused_at_opening(made: Path, tmp_path: Path, name: str) -> None:
    target = shutil.copytree(made, tmp_path / "copy")
    data = (target / name).read_bytes()
    for part in (data[:-1], data + b"x", b""):
        (target / name).write_bytes(part)
        with pytest.raises(UserError, match=f"{name}: {len(part)} bytes, {len(data)} expected"):
            load(target)
    (target / name).unlink()
    with pytest.raises(UserError, match="0 bytes"):
        load(target)


def test_damage_is_found(made: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    assert tool.main([str(made), "--verify"]) == 0
    target = shutil.copytree(made, tmp_path / "copy")
    source = Prepared(target, "train")
    flip_a_bit(target / "train.bin", int(source._rows["offset"][4]) + 30)
    assert tool.main([str(target), "--verify"]) == 2
    assert f"1 images are damaged (4 (train) of {target})" in capsys.readouterr().err
    if source.kind == packed.JPEG:
        data, _ = build_dataset(True, settings(target), INPUTS)
        with pytest.raises(UserError, match="cannot be read: damaged"):
            data[4]
    flip_a_bit(target / "train.table", 12)
    with pytest.raises(UserError, match="train.table: damaged"):
        load(target)


def test_what_is_no_prepared_data_set_is_told(made: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no prepared data set there"):
        load(tmp_path)
    target = shutil.copytree(made, tmp_path / "copy")
    manifest = json.loads((target / packed.MANIFEST).read_text())
    for change, wanted in (
        ({"format": 9}, "format 9, this program reads 1"),
        ({"splits": {"val": manifest["splits"]["val"]}}, "has no train part"),
    ):
        (target / packed.MANIFEST).write_text(json.dumps(manifest | change))
        with pytest.raises(UserError, match=wanted):
            load(target)
    (target / packed.MANIFEST).write_text("{")
    with pytest.raises(UserError, match="not readable"):
        load(target)


def test_the_fingerprint_knows_every_bit_but_not_the_place(made: Path, tmp_path: Path) -> None:
    target = shutil.copytree(made, tmp_path / "copy")
    assert load(target).fingerprint() == load(made).fingerprint()
    rows = np.fromfile(target / "train.table", packed.ROW)
    rows["crc"][2] ^= 1
    rows.tofile(target / "train.table")
    manifest = json.loads((target / packed.MANIFEST).read_text())
    digest = packed.hashlib.sha256(rows.tobytes()).hexdigest()
    manifest["splits"]["train"]["table"] = digest
    (target / packed.MANIFEST).write_text(json.dumps(manifest))
    assert load(target).fingerprint() != load(made).fingerprint()


def test_bad_images_end_the_preparation_or_are_left_out(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    source = shutil.copytree(folder, tmp_path / "source")
    bad = sorted((source / "train").glob("*/*"))[3]
    bad.write_bytes(b"no image")
    assert tool.main([str(source), str(tmp_path / "out"), "--num-workers", "0"]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert [str(bad) in line for line in lines if line.startswith("error: ")] == [True]
    made = prepare(source, tmp_path / "skip", "--on-bad-image", "skip")
    rows = np.fromfile(made / "train.table", packed.ROW)
    assert rows["place"].tolist() == [0, 1, 2, 4, 5, 6]
    assert rows["label"].tolist() == [0, 0, 0, 1, 1, 1]


def test_labels_of_every_split_number_the_classes_of_the_first(
    folder: Path, tmp_path: Path
) -> None:
    source = shutil.copytree(folder, tmp_path / "source")
    classes = sorted(path.name for path in (source / "train").iterdir())
    shutil.rmtree(source / "val" / classes[0])
    made = prepare(source, tmp_path / "made")
    val = Prepared(made, "val")
    assert val.classes == classes and set(val.used_classes()) == set(range(1, len(classes)))


def test_a_target_that_cannot_be_written_is_one_line_and_leaves_nothing(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    (tmp_path / "file").write_text("mine")
    for target in (tmp_path / "file", tmp_path / "file" / "below"):
        assert tool.main([str(folder), str(target), "--num-workers", "0"]) == 2
        message = capsys.readouterr().err
        assert message.startswith("error: ") and message.count("\n") == 1, message
        assert "give another folder" in message or "holds other files" in message, message
    assert (tmp_path / "file").read_text() == "mine"

    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(packed.os, "fsync", full)
    assert tool.main([str(folder), str(tmp_path / "new"), "--num-workers", "0"]) == 2
    message = capsys.readouterr().err
    assert "new: cannot be written (No space left on device)" in message
    assert not (tmp_path / "new").exists()


def test_digits_keep_their_splits_and_are_never_mirrored(tmp_path: Path) -> None:
    made = prepare("", tmp_path / "out", "--data-set", "DIGITS", "--splits", "train")
    small = InputConfig((8, 8), INPUTS.mean, INPUTS.std)
    data, classes = build_dataset(True, settings(made), small)
    digits, _ = build_dataset(True, settings("", name="DIGITS"), small)
    assert classes == 10 and len(data) == 897
    assert not any("Flip" in type(step).__name__ for step in data.transform.transforms)
    key = 3, 1
    ours, theirs = (datasets.SeededViews(source, 0)[key] for source in (data, digits))
    assert ours[0].equal(theirs[0]) and ours[1] == theirs[1]


def test_workers_that_do_not_fork_open_the_files_again(made: Path) -> None:
    source = Prepared(made, "train")
    data = pickle.dumps(source)
    assert len(data) < 1000
    assert np.array_equal(np.asarray(pickle.loads(data).load(5)[0]), np.asarray(source.load(5)[0]))


def test_every_checksum_is_of_its_images_bytes(made: Path) -> None:
    rows = np.fromfile(made / "val.table", packed.ROW)
    data = (made / "val.bin").read_bytes()
    for row in rows:
        start = int(row["offset"])
        assert zlib.crc32(data[start : start + int(row["size"])]) == row["crc"]


def test_labels_beyond_the_class_names_are_refused(made: Path, tmp_path: Path) -> None:
    target = shutil.copytree(made, tmp_path / "copy")
    manifest = json.loads((target / packed.MANIFEST).read_text())
    manifest["classes"] = manifest["classes"][:1]
    (target / packed.MANIFEST).write_text(json.dumps(manifest))
    with pytest.raises(UserError, match="names 1 classes, and an image of train has label 1; "):
        load(target)


def test_a_manifest_that_lacks_a_word_is_refused(tmp_path: Path) -> None:
    (tmp_path / packed.MANIFEST).write_text(json.dumps({"format": 1, "splits": {}, "flips": True}))
    with pytest.raises(UserError, match="lacks `kind:`; "):
        packed.read_manifest(tmp_path)
