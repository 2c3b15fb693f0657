"""Classes are matched by name: for every entry point, the accuracy worked out by hand."""

import json
import shutil
from pathlib import Path

import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import save_file
from timm.data import ImageNetInfo

import models
import options
from base.errors import UserError
from data.labels import ModelClasses, imagenet_names, map_labels
from data.transforms import InputConfig, eval_transform
from distill.teacher import build_teacher
from distill.teacher_classes import classes_of_teacher, match_outputs
from models.class_names import classes_of_file, classes_of_published, outputs_to_keep
from tools import report
from tools.export_card import history
from tools.report_page import headline

MODEL = "resnet_pico"
ABC = ModelClasses(3, ("a", "b", "c"), "m.pth")
SYNSETS = ImageNetInfo().label_names()


def outputs(names: list[str] | None, model: ModelClasses, given: int | None = None) -> tuple:
    count = len(names) if names else model.count
    return map_labels(names, count, "the data", model, given=given).outputs


def test_names_are_matched_whatever_their_order_and_number() -> None:
    assert outputs(["a", "b", "c"], ABC) == (0, 1, 2)
    assert outputs(["c", "a"], ABC) == (2, 0)
    assert map_labels(["c"], 1, "the data", ABC, given=None).note == ""


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["a", "zbird"], "the data: not a class of m.pth: zbird; it has 3 classes"),
        (["A", "b"], r"not a class of m.pth: A \(did you mean a\?\)"),
        (["x\x1b[1m", "y"], r"not a class of m.pth: x\\x1b\[1m, y"),
    ],
)
def test_names_that_the_model_does_not_have_are_named(names: list[str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        outputs(names, ABC)


def test_without_names_on_one_side_positions_count_and_a_line_says_so() -> None:
    nameless = ModelClasses(3, None, "m.pth")
    found = map_labels(["x", "y", "z"], 3, "the data", nameless, given=None)
    assert found.outputs == (0, 1, 2)
    assert "m.pth: stores no class names" in found.note and "(x, y, z)" in found.note
    found = map_labels(None, 3, "the data", ABC, given=None)
    assert found.outputs == (0, 1, 2) and "the data: has no class names" in found.note
    twice = ["crane", "crane", "x"]  # names that tell nothing apart
    assert "no class names" in map_labels(twice, 3, "the data", ABC, given=None).note


def test_without_names_the_numbers_of_classes_must_be_the_same() -> None:
    nameless = ModelClasses(3, None, "m.pth")
    with pytest.raises(UserError, match="2 classes, m.pth has 3, .* give --nb-classes 3"):
        outputs(["x", "y"], nameless)
    assert outputs(["x", "y"], nameless, given=3) == (0, 1)
    with pytest.raises(UserError, match="4 classes, m.pth has 3"):
        outputs(["w", "x", "y", "z"], nameless)


def test_imagenet_weights_know_synsets_and_folders_named_by_number() -> None:
    published = classes_of_published("deit_tiny_patch16_224", 1000)
    assert published.names == tuple(SYNSETS) and published.numbered
    assert outputs([SYNSETS[7], SYNSETS[999], SYNSETS[3]], published) == (7, 999, 3)
    assert outputs(["1", "10", "2"], published) == (1, 10, 2)
    with pytest.raises(UserError, match="cat"):
        outputs(["cat", "dog"], published)


def test_folder_names_are_no_numbers_for_other_models() -> None:
    ours = ModelClasses(3, ("1", "10", "2"), "m.pth")
    assert outputs(["1", "2", "10"], ours) == (0, 2, 1)
    nameless = ModelClasses(1000, None, "m.pth")
    assert outputs(["1", "2", "10"], nameless, given=1000) == (0, 1, 2)


def test_a_file_without_names_and_with_imagenets_outputs_is_matched_by_synset() -> None:
    found = map_labels(SYNSETS[5:7], 2, "the data", ModelClasses(1000, None, "m"), given=None)
    assert found.outputs == (5, 6) and "taken as ImageNet's" in found.note
    assert found.names == tuple(SYNSETS)


def test_other_sets_of_published_weights_have_their_names() -> None:
    assert len(imagenet_names(21843)) == 21843 and imagenet_names(17) is None
    assert classes_of_published("vit_base_patch16_224.augreg_in21k", 21843).names[0] == "n00004475"


# ---- programs ----


def network(count: int) -> torch.nn.Module:
    torch.manual_seed(0)
    return timm.create_model(MODEL, num_classes=count).eval()


def logits_of(folder: Path, model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Return the logits of the images of each class folder, worked out without our loaders."""
    config = models.data_config(MODEL)
    inputs = InputConfig((32, 32), config["mean"], config["std"], config["interpolation"])
    prepare = eval_transform(inputs)
    found = {}
    for place in sorted(folder.iterdir()):
        images = [prepare(Image.open(path).convert("RGB")) for path in sorted(place.iterdir())]
        with torch.no_grad():
            found[place.name] = model(torch.stack(images))
    return found


@pytest.fixture(scope="module")
def case(image_folder: Path, tmp_path_factory) -> tuple[Path, Path, float, float]:
    """A checkpoint of the classes two, zero, one; data of one and two; both accuracies in %."""
    folder = tmp_path_factory.mktemp("labels")
    names, model = ["two", "zero", "one"], network(3)
    logits = logits_of(image_folder / "val", model)
    with torch.no_grad():  # so that all three classes are predicted
        model.get_classifier().bias -= torch.cat(list(logits.values())).mean(0)
    logits = logits_of(image_folder / "val", model)
    right = right_among = count = 0
    for name, values in logits.items():
        right += int((values.argmax(1) == names.index(name)).sum())
        right_among += int((values[:, [0, 2]].argmax(1) == ["two", "one"].index(name)).sum())
        count += len(values)
    torch.save({"model": model.state_dict(), "classes": names}, folder / "named.pth")
    torch.save({"model": model.state_dict()}, folder / "nameless.pth")
    export = folder / "export"
    export.mkdir()
    save_file(model.state_dict(), export / "model.safetensors")
    (export / "config.json").write_text(json.dumps({"label_names": names, "num_classes": 3}))
    return image_folder, folder, 100 * right / count, 100 * right_among / count


@pytest.mark.parametrize("file", ["named.pth", "export/model.safetensors"])
@pytest.mark.parametrize("reader", ["IMNET", "folder/"])
@pytest.mark.parametrize("flag", ["--resume", "--finetune"])
def test_eval_matches_the_names_of_a_file(case, run_inside, flag, reader, file) -> None:
    data, folder, acc1, among = case
    flags = ["--data-path", str(data), "--data-set", reader, "--num-workers", "0"]
    found = run_inside("--eval", "--model", MODEL, flag, str(folder / file), *flags)
    assert found.returncode == 0, found.stderr
    assert f"* Acc@1 {acc1:.3f}" in found.stdout
    assert f"Accuracy among the classes that have images: {among:.1f}%" in found.stdout
    assert 0 < acc1 < 100 and acc1 != among


def test_eval_refuses_a_class_that_the_file_does_not_have(case, run_inside, tmp_path) -> None:
    data, folder, *_ = case
    root = shutil.copytree(data, tmp_path / "root")
    (root / "val" / "one").rename(root / "val" / "zone")
    file = str(folder / "named.pth")
    found = run_inside("--eval", "--model", MODEL, "--resume", file, "--data-path", str(root))
    assert found.returncode == 2
    assert "not a class of" in found.stderr and "zone (did you mean one?)" in found.stderr


def test_eval_of_a_file_without_names_says_that_positions_count(case, run_inside, caplog) -> None:
    data, folder, *_ = case
    file = ["--resume", str(folder / "nameless.pth"), "--num-workers", "0"]
    flags = ["--eval", "--model", MODEL, "--data-path", str(data), *file]
    refused = run_inside(*flags)
    assert refused.returncode == 2 and "give --nb-classes 3" in refused.stderr
    found = run_inside(*flags, "--nb-classes", "3")
    assert found.returncode == 0, found.stderr
    assert "stores no class names; its outputs are taken in the order" in found.stderr


def test_a_file_names_its_classes_and_an_unreadable_config_is_one_line(case) -> None:
    _, folder, *_ = case
    path = str(folder / "named.pth")
    assert classes_of_file(path, MODEL) == ModelClasses(3, ("two", "zero", "one"), path)
    bad = shutil.copytree(folder / "export", folder / "bad")
    (bad / "config.json").write_bytes(b"\xff{")
    with pytest.raises(UserError, match="config.json: not readable as JSON"):
        classes_of_file(str(bad / "model.safetensors"), MODEL)


# ---- teachers and fine-tuning ----


def test_a_teachers_outputs_are_put_in_the_students_order(case) -> None:
    data, folder, *_ = case
    args = options.parse_args(
        [
            *("--data-path", str(data), "--distillation-type", "hard"),
            *("--teacher-model", MODEL, "--teacher-path", str(folder / "named.pth")),
        ]
    ).args
    config = models.data_config(MODEL)
    inputs = InputConfig((32, 32), config["mean"], config["std"])
    images = torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    model = network(3)
    model.load_state_dict(torch.load(folder / "named.pth", weights_only=True)["model"])
    for classes in (["one", "two"], ["zero", "two", "one"]):
        teacher = build_teacher(args, len(classes), inputs, torch.device("cpu"), classes=classes)
        with torch.no_grad():
            wanted = model(images)[:, [["two", "zero", "one"].index(name) for name in classes]]
        torch.testing.assert_close(teacher(images), wanted)
    with pytest.raises(UserError, match="teacher resnet_pico: .* not a class of .*: four"):
        build_teacher(args, 3, inputs, torch.device("cpu"), classes=["one", "two", "four"])
    with pytest.raises(UserError, match="has 3 classes, the data has 4; train a teacher on them"):
        build_teacher(args, 4, inputs, torch.device("cpu"), classes=["one", "two", "x", "y"])


def test_a_published_teacher_takes_no_small_numbers_for_imagenets_classes() -> None:
    name = "deit_tiny_patch16_224"
    known = classes_of_teacher(name, "")
    with pytest.raises(UserError, match="has 1000 classes, the data has 2"):
        match_outputs(name, known, 2, ["0", "1"])
    assert match_outputs(name, known, 2, [SYNSETS[9], SYNSETS[4]]).chosen == (9, 4)
    assert match_outputs(name, known, 1000, SYNSETS).chosen is None


def test_fine_tuning_takes_the_head_by_name(case) -> None:
    _, folder, *_ = case
    path = str(folder / "named.pth")
    old = torch.load(path, weights_only=True)["model"]
    head = models.head_names(network(3))[0]
    for classes, rows in ((["one", "two"], [2, 0]), (["one", "two", "four"], [])):
        outputs, note = outputs_to_keep(path, MODEL, classes)
        assert outputs == rows
        assert ("no class four" in note) == (not rows)
        new = timm.create_model(MODEL, num_classes=len(classes))
        new_head = torch.zeros_like(new.state_dict()[f"{head}.weight"])  # a new head starts at zero
        models.finetune(new, path, outputs=outputs)
        wanted = old[f"{head}.weight"][rows] if rows else new_head
        torch.testing.assert_close(new.state_dict()[f"{head}.weight"], wanted)
    assert outputs_to_keep(path, MODEL, ["two", "zero", "one"]) == (None, "")
    nameless = str(folder / "nameless.pth")
    assert "no class names in the file" in outputs_to_keep(nameless, MODEL, ["a", "b", "c"])[1]


# ---- a class without evaluation images, in all places that print an accuracy ----


@pytest.fixture(scope="module")
def lacks_a_class(image_folder: Path, run_inside, tmp_path_factory) -> tuple[Path, str, float]:
    """A run with a teacher on three classes, one without evaluation images; its output; and its
    accuracy in % among the two others, worked out without our loaders."""
    folder = tmp_path_factory.mktemp("lacks")
    data = Path(shutil.copytree(image_folder, folder / "data"))
    shutil.copytree(data / "train/one", data / "train/zero")
    torch.save({"model": network(3).state_dict()}, folder / "teacher.pth")
    flags = ["--data-path", str(data), "--num-workers", "0", "--model", MODEL]
    flags += ["--batch-size", "8", "--warmup-epochs", "0", "--lr", "0.01", "--unscale-lr"]
    flags += ["--teacher-model", MODEL, "--teacher-path", str(folder / "teacher.pth")]
    flags += ["--distillation-type", "soft", "--distillation-head", "cls", "--epochs", "1"]
    found = run_inside(*flags, "--output_dir", str(folder / "run"))
    assert found.returncode == 0, found.stderr
    model = network(3)
    model.load_state_dict(torch.load(folder / "run/checkpoint.pth", weights_only=True)["model"])
    logits = logits_of(data / "val", model)
    outputs = {"one": 0, "two": 1}  # zero is the third
    right = [(values[:, :2].argmax(1) == outputs[name]).float() for name, values in logits.items()]
    return folder, found.stdout, 100 * float(torch.cat(right).mean())


def test_training_prints_and_logs_the_accuracy_among_the_classes_present(lacks_a_class) -> None:
    folder, out, among = lacks_a_class
    lines = [line for line in out.splitlines() if "among the classes that have images" in line]
    assert len(lines) == 2, "the teacher and the student"
    assert lines[1].endswith(f"{among:.1f}%")
    (line,) = (folder / "run/log.txt").read_text().splitlines()
    assert json.loads(line)["test_acc1_present"] == pytest.approx(among)
    assert "ema_acc1_present" in json.loads(line)


def test_the_report_has_the_accuracy_among_the_classes_present(lacks_a_class, capsys) -> None:
    folder, _, among = lacks_a_class
    argv = [str(folder / "run"), "--out", str(folder / "report.html")]
    assert report.main([*argv, "--checkpoint", "checkpoint.pth"]) == 0
    shown = f"top-1 among the classes with images {among:.2f}%"
    assert shown in capsys.readouterr().out
    (run,) = json.loads((folder / "report.json").read_text())["runs"]
    assert run["accuracy"]["student"]["acc1_present"] == pytest.approx(among)
    assert "acc1_present" in run["accuracy"]["teacher"]
    assert "among the classes with images" in (folder / "report.html").read_text()


def test_the_card_has_the_accuracy_among_the_classes_present(lacks_a_class) -> None:
    folder, _, among = lacks_a_class
    path = folder / "run/checkpoint.pth"
    rows = dict(history(path, torch.load(path, weights_only=True), "model"))
    assert rows["top-1 among the classes with images"] == f"{among:.2f}% after epoch 1"


def test_runs_with_and_without_a_missing_class_share_one_table() -> None:
    whole = {"student": {"acc1": 50.0, "acc5": 100.0, "acc1_interval": [9.5, 90.5]}}
    part = {"student": whole["student"] | {"acc1_present": 75.0}}
    cost = dict.fromkeys(("parameters", "gmacs", "size_mb", "latency_ms", "images_per_s"), 1)
    common = {"trained_with": "labels only", "teacher_of": "", "input": "32", "cost": {}}
    common |= {"agreement": {"names": ["label", "student"], "matrix": [[1, 1], [1, 1]]}}
    common |= {"calibration": {"student": {"ece": 0.1, "bins": []}}, "cost": {"student": cost}}
    runs = [common | {"run": name, "accuracy": one} for name, one in (("a", whole), ("b", part))]
    first = {"student": "a", "baseline": "", "teacher": ""}
    columns = headline({"runs": runs, "headline": first, "comparisons": []})
    row = [column.get("top-1 among the classes with images") for column in columns.values()]
    assert row == [None, "75.00%"]
