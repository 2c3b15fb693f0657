"""The report: its numbers on hand-made logits, and the page of real runs."""

import html
import json
import math
import re
from pathlib import Path

import pytest
import torch
from torch import Tensor

import models
from base.errors import UserError
from tools import comparison, report, report_charts, report_page, result_table
from tools.comparison import BASELINE, Run, compare
from tools.fidelity import (
    CLS,
    DIST,
    STUDENT,
    TEACHER,
    Outputs,
    agreement,
    calibration,
    class_gaps,
    collect,
    confusion,
    divergence,
    numbers,
    top,
)


def logits_of(*rows: list[float]) -> Tensor:
    """Return logits whose softmax are these probabilities."""
    return torch.tensor(rows, dtype=torch.float64).log()


def test_a_student_that_is_its_teacher_agrees_always_and_has_no_divergence() -> None:
    logits, labels = torch.randn(11, 7), torch.arange(11) % 7
    found = numbers(Outputs(labels, {STUDENT: logits, TEACHER: logits}), list("abcdefg"))
    names = found["agreement"]["names"]
    assert found["agreement"]["matrix"][names.index(STUDENT)][names.index(TEACHER)] == 1
    assert found["kl_nats"][STUDENT] == 0
    assert {row["gap"] for row in found["class_gaps"]} == {0}


def test_divergence_by_hand() -> None:
    teacher, student = logits_of([0.5, 0.5]), logits_of([0.25, 0.75])
    expected = 0.5 * math.log(0.5 / 0.25) + 0.5 * math.log(0.5 / 0.75)
    assert divergence(teacher, student).tolist() == [pytest.approx(expected)]


def test_calibration_error_by_hand() -> None:
    logits = logits_of([0.9, 0.1], [0.9, 0.1], [0.4, 0.6], [0.3, 0.7])
    found = calibration(logits, torch.tensor([0, 1, 1, 1]), bins=10)
    # (0.5,0.6]: 1 right of 1 at 0.6; (0.6,0.7]: 1 of 1 at 0.7; (0.8,0.9]: 1 of 2 at 0.9
    assert [one["count"] for one in found["bins"]] == [1, 1, 2]
    assert found["ece"] == pytest.approx(0.25 * 0.4 + 0.25 * 0.3 + 0.5 * 0.4)


def test_a_sure_and_right_network_is_calibrated() -> None:
    logits = torch.tensor([[100.0, 0.0], [0.0, 100.0]])
    assert calibration(logits, torch.tensor([0, 1]))["ece"] == pytest.approx(0)


def test_the_agreement_matrix_is_symmetric_and_counts() -> None:
    matrix = agreement(
        {
            "a": torch.tensor([0, 1, 2, 3]),
            "b": torch.tensor([0, 1, 2, 0]),
            "c": torch.tensor([1, 1, 0, 0]),
        }
    )
    assert matrix == [[1, 0.75, 0.25], [0.75, 1, 0.5], [0.25, 0.5, 1]]


def test_accuracy_and_gaps_by_hand() -> None:
    labels = torch.tensor([0, 0, 1, 1])
    found = top(torch.eye(3)[[0, 1, 1, 2]], labels)
    low, high = found.pop("acc1_interval")
    assert found == {"acc1": 50, "acc5": 100}
    assert (low, high) == pytest.approx((15.00, 85.00), abs=0.01), "Wilson's, for 2 of 4"
    networks = {STUDENT: torch.tensor([0, 1, 1, 1]), TEACHER: torch.tensor([0, 0, 1, 0])}
    rows = class_gaps(networks, labels, ["x", "y"])
    assert [(row["class"], row["gap"]) for row in rows] == [("x", -50), ("y", 50)]
    (x, y) = class_gaps({STUDENT: networks[STUDENT]}, labels, ["x", "y"])
    assert x == {"class": "x", "count": 2, STUDENT: 50} and y[STUDENT] == 100


def test_a_confusion_matrix_by_hand() -> None:
    labels, predicted = torch.tensor([0, 0, 2, 2, 2]), torch.tensor([0, 2, 2, 2, 3])
    found = confusion(predicted, labels, ["a", "b", "c"])
    assert found["classes"] == ["a", "c", "3"], "class b is not used, class 3 has no name"
    assert found["counts"] == [[1, 1, 0], [0, 2, 1], [0, 0, 0]]


def test_of_many_classes_those_with_most_errors_are_in_the_matrix() -> None:
    labels = torch.arange(50).repeat(2)
    predicted = labels.clone()
    predicted[50:] = torch.where(labels[50:] % 2 == 1, (labels[50:] + 2) % 50, labels[50:])
    found = confusion(predicted, labels, [str(i) for i in range(50)])
    assert len(found["classes"]) == 20 and all(int(name) % 2 for name in found["classes"])


def test_both_heads_and_their_mean_are_collected() -> None:
    torch.manual_seed(0)
    network = models.create_model("deit_pico_distilled_patch8_32", num_classes=7)
    teacher = models.create_model("resnet_pico", num_classes=7).eval()
    batches = [(torch.randn(3, 3, 32, 32), torch.tensor([0, 1, 2])) for _ in range(3)]
    outputs = collect(network, teacher, batches, torch.device("cpu"), limit=7)
    heads = (outputs.logits[CLS] + outputs.logits[DIST]) / 2
    torch.testing.assert_close(outputs.logits[STUDENT], heads)
    assert len(outputs.labels) == 7 and len(outputs.token_cosine) == 5
    images = batches[0][0]
    with torch.no_grad():
        cls, dist = models.both_logits(network.eval(), images)
    torch.testing.assert_close(outputs.logits[DIST][:3], dist)
    assert not network.head._forward_hooks


def test_the_teacher_comes_first_in_every_table() -> None:
    outputs = Outputs(
        torch.arange(5), {name: torch.randn(5, 7) for name in (STUDENT, CLS, TEACHER)}
    )
    found = numbers(outputs, list("abcdefg"))
    assert found["agreement"]["names"] == ["label", TEACHER, STUDENT, CLS]
    assert list(found["accuracy"]) == list(found["calibration"]) == [TEACHER, STUDENT, CLS]


def test_the_cosine_of_the_tokens_by_hand() -> None:
    network = models.create_model("deit_pico_distilled_patch8_32", num_classes=7).eval()
    images = [(torch.randn(3, 3, 32, 32), torch.tensor([0, 1, 2]))] * 2

    def cosines() -> list[float]:
        return collect(network, None, images, torch.device("cpu")).token_cosine

    with torch.no_grad():
        network.pos_embed[:, :2] = 0
        network.cls_token.copy_(torch.eye(network.embed_dim)[0])
        network.dist_token.copy_(network.cls_token)
        assert cosines() == pytest.approx([1] * 5), "two tokens that are one"
        network.dist_token.copy_(torch.eye(network.embed_dim)[1] - network.cls_token)
        assert cosines()[0] == pytest.approx(-(0.5**0.5))


OWN = {
    "distillation_type": "hard",
    "match": [],
    "ranking_kl_weight": 0.0,
    "teacher_adaptor": "",
    "teacher_model": "cnn",
    "teacher_path": "cnn.pth",
    "teacher_weight": None,
}
LENDER = Run("hard", OWN, {}, {}, {}, [], "")


@pytest.mark.parametrize(
    ("changes", "lender", "given", "expected"),
    [
        ({}, LENDER, ("", ""), ("cnn", "cnn.pth", "own")),
        ({}, None, ("", "moved.pth"), ("cnn", "moved.pth", "own")),
        ({}, None, ("cnn", ""), ("cnn", "cnn.pth", "own")),
        ({}, None, ("vit", ""), ("vit", "", "given")),
        (
            {"distillation_type": "none", "teacher_path": "idle.pth"},
            LENDER,
            ("", ""),
            ("cnn", "cnn.pth", "lent"),
        ),
        ({"distillation_type": "none"}, None, ("cnn", ""), ("cnn", "cnn.pth", "given")),
        ({"distillation_type": "none"}, LENDER, ("vit", "vit.pth"), ("vit", "vit.pth", "given")),
        (
            {"distillation_type": "none", "match": ["8:8:hidden:hidden_mse:1"]},
            LENDER,
            ("", ""),
            ("cnn", "cnn.pth", "own"),
        ),
        ({"distillation_type": "none"}, None, ("", ""), (None, None, "")),
    ],
)
def test_whose_teacher_a_run_is_measured_against(changes, lender, given, expected) -> None:
    flags, origin = report.teacher_of(OWN | changes, lender, *given)
    assert (flags.get("teacher_model"), flags.get("teacher_path"), origin) == expected


def test_a_teachers_file_of_nobody_is_refused() -> None:
    with pytest.raises(UserError, match="--teacher-model too"):
        report.teacher_of(OWN | {"distillation_type": "none"}, None, "", "file.pth")


def measured(
    name: str,
    *,
    taught: bool = True,
    epochs: int = 3,
    data: str = "digits",
    seed: int = 0,
    student: Tensor | None = None,
) -> Run:
    """A run with made-up outputs, and names of classes as long as ImageNet's.

    student: its predictions for the 90 images with labels 0, 1, ... 29, 0, ...; default: random.
    """
    generator = torch.Generator().manual_seed(len(name))
    names = (STUDENT, CLS, DIST, TEACHER)[: 4 if taught else 3]
    logits = {one: torch.randn(90, 30, generator=generator) for one in names}
    if student is not None:
        logits[STUDENT] = torch.eye(30)[student]
    classes = [f"{i} sulphur-crested <i>cockatoo</i>, Kakatoe galerita" for i in range(30)]
    outputs = Outputs(torch.arange(90) % 30, logits, [-0.05288, 0.5, 0.979])
    curve = [
        {"epoch": i, "test_acc1": 71.234 + i, "train_loss": None if i == 1 else 1234.5 * i}
        for i in range(epochs)
    ]
    teacher = "cnn from /a/very/long/path/" + "without/any/space/" * 9 if taught else ""
    cost = {"parameters": 210_000, "gmacs": 0.00394, "size_mb": 0.85, "latency_ms": 11.93}
    cost |= {"images_per_s": 1234.5, "batch": 8, "device": "CPU, 1 thread"}
    settings = OWN | {"distillation_type": "hard" if taught else "none", "seed": seed}
    found = {
        "run": name,
        "folder": name,
        "student": "deit",
        "input": "224x224",
        "teacher": teacher,
        "teacher_of": name if taught else "",
        "teacher_input": "32x32" if taught else "",
        "teacher_note": "",
        "distillation": settings["distillation_type"],
        "trained_with": comparison.trained_with(settings),
        "weights": "best",
        "data": data,
        **numbers(outputs, classes),
        "cost": {one: cost for one in (STUDENT, TEACHER)[: 1 + taught]},
        "curves": curve,
    }
    shares = outputs.confidence()
    return Run(name, settings, found, outputs.predictions(), shares, classes, data)


def page_of(*runs: Run) -> str:
    found = compare(runs)
    image = report.data_uri(torch.zeros(3, 8, 8, dtype=torch.uint8))
    maps = {"head": ["image", "student, class token"], "rows": [[image, image]]}
    shown = {"disputed": [image] * len(found["disputed"]["images"]), "attention": maps}
    return report_page.page(found, shown)


def test_runs_are_compared_with_each_other() -> None:
    one, two = measured("one"), measured("two", taught=False)
    found = comparison.between([one, two])
    assert found["names"] == ["label", "teacher", "one", "two"]
    assert [row[i] for i, row in enumerate(found["matrix"])] == [1] * 4
    share = float((one.predictions[STUDENT] == two.predictions[STUDENT]).double().mean())
    assert found["matrix"][2][3] == found["matrix"][3][2] == share
    other = comparison.between([one, measured("three")])
    assert other["names"] == ["label", "teacher of one", "teacher of three", "one", "three"]
    assert comparison.between([one]) is None
    called = comparison.between([measured("teacher", taught=False), one])
    assert called["names"] == ["label", "teacher", "run teacher", "one"]


def test_different_images_are_said_and_not_compared() -> None:
    runs = measured("one"), measured("two", data="<flowers>"), measured("three")
    assert comparison.between(runs) is None
    page = page_of(*runs)
    assert "different\nimages" in page
    assert "one, three on 90 of digits; two on 90 of &lt;flowers&gt;." in page
    assert "different\nimages" not in page_of(measured("one"), measured("two"))


def right_on(count: int) -> Tensor:
    """Predictions that are right on the first `count` of 90 images, and wrong on the others."""
    return (torch.arange(90) + (torch.arange(90) >= count)) % 30


@pytest.mark.parametrize(
    ("hard", "none", "line"),
    [
        (60, 50, "hard: 11.1 points better than none (labels only), p = 0.002"),
        (50, 60, "hard: 11.1 points worse than none (labels only), p = 0.002"),
        (90, 1, "hard: 98.9 points better than none (labels only), p < 0.001"),
        (
            52,
            50,
            "hard: no measurable gain on 90 images, +2.2 points over none (labels only), p = 0.5",
        ),
    ],
)
def test_the_gain_over_labels_only_is_stated_in_words(hard: int, none: int, line: str) -> None:
    runs = (
        measured("hard", student=right_on(hard)),
        measured("none", taught=False, student=right_on(none)),
    )
    found = compare(runs)
    assert found["verdicts"][0] == line and f"{html.escape(line)}." in page_of(*runs)
    (baseline, _) = found["comparisons"]
    assert baseline["only_run"] - baseline["only_other"] == hard - none
    assert baseline["points"] == pytest.approx(100 * (hard - none) / 90)


def test_the_baseline_has_the_same_student_and_images() -> None:
    hard, none = measured("hard"), measured("none", taught=False)
    other, larger = (measured(name, taught=False) for name in ("other", "larger"))
    other = Run(**{**vars(other), "data": "flowers"})
    larger.numbers["student"] = "deit_base"
    assert comparison.baseline_of(hard, [other, larger, hard, none]) is none
    assert comparison.baseline_of(none, [hard, none]) is None
    assert "The gain of distillation is unknown" in compare([other, hard])["verdicts"][-1]


def test_a_student_above_its_teacher_is_stated() -> None:
    hard = measured("hard", student=torch.arange(90) % 30)
    teacher = hard.numbers["accuracy"][TEACHER]["acc1"]
    above = f"hard: the student (100.00%) is above the teacher ({teacher:.2f}%), p < 0.001"
    assert above in compare([hard])["verdicts"]


def test_the_first_columns_are_student_baseline_and_teacher() -> None:
    runs = [
        measured("none", taught=False),
        measured("soft"),
        measured("hardest", student=right_on(45)),
    ]
    columns = report_page.headline(compare(runs))
    assert list(columns) == ["soft", "none", "teacher of soft", "teacher of hardest", "hardest"]
    hard = columns["hardest"]
    assert (hard["top-1"], hard["95 % interval"]) == ("50.00%", "39.9 to 60.1%")
    assert (hard["parameters"], hard["GMACs"], hard["size"]) == ("0.21 M", "0.00394", "0.8 MB")
    assert (hard["latency"], hard["throughput"]) == ("11.9 ms", "1,234 images/s")
    assert columns["teacher of hardest"]["input"] == "32x32", "the teacher has another size"
    alone = report_page.headline(compare([measured("teacher")]))
    assert list(alone) == ["teacher", "teacher (network)"]


def test_the_table_fits_in_80_columns_and_has_the_numbers_of_the_json_file() -> None:
    runs = [measured("soft", student=right_on(45)), measured("none" + "x" * 60, taught=False)]
    runs[0].numbers["weights"] = "best_checkpoint.pth, model"
    found = json.loads(json.dumps(compare(runs)))
    head, *rows = result_table.lines(found, ["none" + "x" * 60, "soft"])
    assert head.split() == ["network", "weights", "top-1", "95", "%", "interval", "latency", "size"]
    assert rows[0].startswith("nonexxx") and rows[1].split() == (
        ["soft", "best", "epoch", "50.00%", "39.9", "to", "60.1%", "11.9", "ms", "0.8", "MB"]
    )
    assert "90 images; latency of one image on CPU, 1 thread" in rows[2]
    assert all(
        len(line) < 80 for row in [head, *rows] for line in row.splitlines() if "x" not in row
    )
    assert len(rows[0]) < 80
    assert [row.split()[0] for row in result_table.lines(found)[1:4]] == [
        "soft",
        rows[0].split()[0],
        "teacher",
    ]


def test_a_run_that_is_the_teacher_is_one_network() -> None:
    hard, none, teacher = (
        measured(name, taught=name == "hard") for name in ("hard", "none", "cnn")
    )
    teacher.numbers["teacher_to"] = ["hard"]
    found = compare([hard, none, teacher])
    assert list(result_table.networks(found)) == ["hard", "none", "cnn"]
    assert found["agreement"]["names"] == ["label", "teacher", "hard", "none"]


@pytest.mark.slow
def test_a_teachers_run_is_evaluated_at_the_checkpoint_of_the_teacher(made: Path, capsys) -> None:
    root, flags = made.parent, ["--out", str(made.parent / "three.html"), "--limit", "5"]
    assert report.main([str(root / "hard"), str(root / "teacher"), *flags]) == 0
    printed = capsys.readouterr().out
    assert "teacher: it is the teacher of hard" in printed
    hard, teacher = json.loads((root / "three.json").read_text())["runs"]
    assert teacher["weights"] == "checkpoint.pth, model" and teacher["teacher_to"] == ["hard"]
    assert teacher["accuracy"]["student"] == hard["accuracy"]["teacher"]
    assert [line.split()[0] for line in printed.splitlines()[1:3]] == ["hard", "teacher"]
    assert report.main([str(root / "hard"), *flags, "--quiet"]) == 0
    assert capsys.readouterr().out.splitlines() == [f"{root}/three.html and three.json"]


def test_a_teacher_of_several_runs_is_one_point_of_the_chart() -> None:
    runs = measured("none", taught=False), measured("soft"), measured("hard")
    points = values_of(charts_of(page_of(*runs))["Accuracy and throughput"])
    assert [row["network"] for row in points] == ["soft", "none", "teacher", "hard"]


def test_disputed_images_are_those_with_different_predictions() -> None:
    labels = torch.arange(90) % 30
    hard = measured("hard", student=right_on(88))
    hard.predictions[TEACHER][:] = labels
    none = measured("none", taught=False, student=labels)
    none.predictions[STUDENT][3] = 7
    found = comparison.disputed(hard, none)
    assert found["between"] == [STUDENT, BASELINE, TEACHER] and found["count"] == 3
    assert {row["index"] for row in found["images"]} == {3, 88, 89}
    nats = [row["nats"] for row in found["images"]]
    assert nats == sorted(nats, reverse=True)
    (row,) = (row for row in found["images"] if row["index"] == 3)
    assert row["label"].startswith("3 ") and row[STUDENT].endswith("% ✓")
    assert row[BASELINE].startswith("7 ") and not row[BASELINE].endswith("✓")


def test_runs_that_differ_in_the_seed_alone_have_a_mean() -> None:
    runs = [measured(f"hard{i}", seed=i, student=right_on(9 * i)) for i in (1, 2, 3)]
    (group,) = comparison.seeds([*runs, measured("none", taught=False)])
    assert group["runs"] == ["hard1", "hard2", "hard3"]
    assert group["acc1"] == pytest.approx([10, 20, 30])
    assert group["mean"] == pytest.approx(20) and group["std"] == pytest.approx(10)
    assert "Spread over seeds" in page_of(*runs)
    assert comparison.seeds([measured("a"), measured("b")]) == [], "one seed"


def charts_of(page: str) -> dict[str, dict]:
    """Return what each chart of a page is drawn from, by its description."""
    found = re.findall(r'data-chart="([^"]*)"', page)
    return {one["description"]: one for one in map(json.loads, map(html.unescape, found))}


def values_of(chart: dict) -> list[dict]:
    """Return the rows of the data of a chart."""
    return (chart.get("data") or chart["layer"][0]["data"])["values"]


def test_a_curve_of_one_epoch_or_with_a_hole_is_drawn() -> None:
    charts = charts_of(page_of(measured("one", epochs=1)))
    assert values_of(charts["Training loss by epoch"]) == [
        {"run": "one", "epoch": 0, "training loss": 0}
    ]
    charts = charts_of(page_of(measured("one", epochs=3)))
    assert [row["epoch"] for row in values_of(charts["Training loss by epoch"])] == [0, 2]
    assert len(values_of(charts["Top-1 by epoch"])) == 3
    assert "Top-1 of the moving average by epoch" not in charts


def test_a_run_has_one_colour_in_all_charts() -> None:
    plain = measured("plain")
    plain.numbers["token_cosine"] = []
    charts = charts_of(page_of(plain, measured("two")))
    names = "Top-1 by epoch", "Class and distillation token"
    scales = [charts[name]["encoding"]["color"]["scale"] for name in names]
    assert scales[0] == scales[1] and scales[0]["domain"] == ["plain", "two"]


def test_names_are_escaped_everywhere() -> None:
    name = "</script><img src=x onerror=alert(1)>'\"&"
    page = page_of(measured(name), measured("none", taught=False))
    assert "<img src=x" not in page and "<i>cockatoo" not in page
    assert page.count("</script>") == 2, "the two that the template ends"


def test_without_the_package_for_charts_the_page_has_tables(monkeypatch) -> None:
    monkeypatch.setattr(report_charts, "alt", None)
    page = page_of(measured("one"), measured("two", taught=False))
    assert "data-chart" not in page and "<script" not in page
    assert page.count("<details open>") == page.count("<details")
    assert "pip install altair vl-convert-python" in page


@pytest.fixture(scope="module")
def made(run_inside, image_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The report of two runs of two epochs, one of them without a teacher of its own."""
    root = tmp_path_factory.mktemp("runs")
    base = [
        "--model",
        "deit_pico_distilled_patch8_32",
        "--data-path",
        str(image_folder),
        "--epochs",
        "2",
        "--batch-size",
        "4",
        "--num_workers",
        "0",
        "--warmup-epochs",
        "0",
    ]
    teacher = [
        "--teacher-model",
        "resnet_pico",
        "--teacher-path",
        str(root / "teacher" / "checkpoint.pth"),
    ]
    for name, flags in (
        ("teacher", ["--model", "resnet_pico"]),
        ("none", []),
        ("hard", ["--distillation-type", "hard", *teacher]),
    ):
        run = run_inside(*base, *flags, "--output_dir", str(root / name))
        assert run.returncode == 0, run.stderr
    out = root / "report.html"
    assert report.main([str(root / "none"), str(root / "hard"), "--out", str(out)]) == 0
    return out


@pytest.mark.slow
def test_two_runs_make_one_page_that_loads_nothing(made: Path) -> None:
    page = made.read_text()
    own = re.sub(r"<script type=module>.*?</script>", "", page, flags=re.S)
    assert not re.search(r"""(?:src|href)=['"]?(?!data:)\w""", own)
    assert "default-src 'none'" in page, "the browser refuses to load anything"
    assert "data:image/jpeg;base64," in page and len(page) < 6e6


@pytest.mark.slow
def test_a_run_without_a_teacher_is_measured_against_that_of_another(made: Path) -> None:
    none, hard = json.loads(made.with_suffix(".json").read_text())["runs"]
    assert (none["distillation"], hard["distillation"]) == ("none", "hard") and none["curves"]
    assert none["teacher"] == hard["teacher"] and none["teacher_of"] == hard["teacher_of"] == "hard"
    assert none["accuracy"]["teacher"] == hard["accuracy"]["teacher"]
    assert none["kl_nats"][STUDENT] > 0 and not hard["teacher_note"]
    assert "none: it had no teacher; compared with that of hard." in made.read_text()


@pytest.mark.slow
def test_another_file_than_the_one_a_run_learnt_from_is_said(made: Path, capsys) -> None:
    other = made.parent / "other.pth"
    torch.save({"model": models.create_model("resnet_pico", num_classes=2).state_dict()}, other)
    flags = ["--teacher-path", str(other), "--out", str(made.parent / "other.html"), "--limit", "5"]
    assert report.main([str(made.parent / "hard"), *flags]) == 0
    assert "hard: not the teacher of its training: sha256 " in capsys.readouterr().out
    (run,) = json.loads((made.parent / "other.json").read_text())["runs"]
    assert run["images"] == 5
    assert {row["class"] for row in run["class_gaps"]} == {"one", "two"}, "from all over the data"


@pytest.mark.slow
def test_a_student_may_have_more_classes_than_the_data(
    run_inside, image_folder: Path, tmp_path: Path
) -> None:
    run = run_inside(
        "--model",
        "resnet_pico",
        "--data-path",
        str(image_folder),
        "--nb-classes",
        "9",
        "--epochs",
        "1",
        "--batch-size",
        "4",
        "--num_workers",
        "0",
        "--warmup-epochs",
        "0",
        "--output_dir",
        str(tmp_path),
    )
    assert run.returncode == 0, run.stderr
    weights = torch.load(tmp_path / "checkpoint.pth", weights_only=True)
    weights["model"]["fc.bias"][8] = 99
    torch.save(weights, tmp_path / "sure.pth")
    flags = ["--teacher-model", "resnet_pico", "--teacher-path", str(tmp_path / "sure.pth")]
    out = tmp_path / "report.html"
    assert report.main([str(tmp_path), *flags, "--out", str(out)]) == 0
    assert "teacher: 8 100%" in out.read_text()


def test_a_folder_that_is_no_run_is_refused(tmp_path: Path, capsys) -> None:
    assert report.main([str(tmp_path)]) == 2
    assert "config.yaml" in capsys.readouterr().err


# What is wider than its box: the page (a phone's window grows with it, its screen does not), an
# element outside of a box that scrolls, a label of a chart
CUT = """[
    document.documentElement.scrollWidth > screen.width && 'the page',
    ...deep('body *').filter(one => !one.closest('.scroll table') && !one.closest('svg')
        && one.getBoundingClientRect().right > screen.width + 1).map(one => one.outerHTML),
    ...deep('svg text').filter(one => {
        const [a, b] = [one, one.closest('svg')].map(each => each.getBoundingClientRect());
        return a.left < b.left || a.right > b.right + 1 || a.top < b.top || a.bottom > b.bottom;
    }).map(one => one.textContent)].filter(Boolean)"""
LETTERS = "Math.min(...deep('svg text').map(one => one.getBoundingClientRect().height))"
DRAWN = (
    "deep('[data-chart]').length > 0 && deep('[data-chart]').every(one => one.querySelector('svg'))"
)
# How far right the teacher's column ends of the box in which its table scrolls
TEACHER_SEEN = """deep('section > .scroll thead th').filter(one => one.textContent === 'teacher')
    .map(one => one.closest('.scroll').getBoundingClientRect().right
        - one.getBoundingClientRect().right)"""
STICKS = """deep('.scroll').filter(box => !box.closest('details')).map(box => {
    const first = box.querySelector('tr th'), before = first.getBoundingClientRect().left;
    box.scrollLeft = 1000;
    const after = first.getBoundingClientRect().left;
    box.scrollLeft = 0;
    return after - before;
})"""


@pytest.mark.slow
@pytest.mark.parametrize("width", [390, 1280])
def test_a_browser_shows_the_whole_page(width: int, made: Path, browser, shots: Path) -> None:
    browser.open(made.as_uri(), width)
    browser.wait(DRAWN)
    browser.screenshot(shots / f"report-{width}.png")
    lines = browser.value("deep('.mark-line path').map(one => one.getTotalLength())")
    assert sum(length > 0 for length in lines) >= 8, "no curves"
    images = browser.value("deep('img').map(one => [one.naturalWidth, one.clientWidth])")
    assert images and all(wide == 96 and shown > 60 for wide, shown in images)
    assert browser.value("performance.getEntriesByType('resource').map(one => one.name)") == []
    assert browser.value("screen.width") == width and browser.value(CUT) == []
    wide = "deep('section > .scroll').map(box => box.scrollWidth - box.clientWidth)"
    assert set(browser.value(wide)) == {0}, "two runs need no scrolling"


@pytest.mark.slow
@pytest.mark.parametrize("width", [390, 1280])
def test_long_names_and_many_runs_are_cut_nowhere(
    width: int, browser, tmp_path: Path, shots: Path
) -> None:
    names = ["a", "short", "deit_tiny_distilled_patch16_224_seed_0", "x" * 60, "e", "f", "g"]
    path = tmp_path / "page.html"
    path.write_text(
        page_of(*(measured(name, taught=name != "g", seed=i) for i, name in enumerate(names)))
    )
    browser.open(path.as_uri(), width)
    browser.wait(DRAWN)
    browser.screenshot(shots / f"report-many-{width}.png")
    assert browser.value(CUT) == []
    assert browser.value(LETTERS) >= 11, "labels too small to read"
    assert min(browser.value(TEACHER_SEEN)) >= 0
    assert max(map(abs, browser.value(STICKS))) < 1, "the first column scrolls away"


@pytest.mark.slow
@pytest.mark.parametrize("speeds", [[2130, 15000], [8620, 14500, 136000]])
def test_a_tick_at_the_end_of_the_axis_is_not_cut(speeds: list, browser, tmp_path: Path) -> None:
    rows = [
        {"network": str(i), "images/s": float(speed), "top-1, %": 40, "from": 38, "to": 42}
        for i, speed in enumerate(speeds)
    ]
    names = [row["network"] for row in rows]
    chart = report_charts.scatter(rows, "images/s", "top-1, %", ("from", "to"), "network", names)
    drawn = json.dumps(report_charts.specification(chart, "throughput"))
    path = tmp_path / "page.html"
    path.write_text(
        "<meta name=viewport content='width=device-width'>"
        f"<div id=chart style='width: 300px'></div><script>{report_charts.program()}</script>"
        f"<script>vegaEmbed('#chart', {drawn}, {{renderer: 'svg', actions: false}})</script>"
    )
    browser.open(path.as_uri(), 390)
    browser.wait("document.querySelector('svg') !== null")
    assert browser.value("deep('svg text').length") > len(speeds)
    assert browser.value(CUT) == []


@pytest.mark.slow
def test_nothing_is_cut_in_print(made: Path, browser, shots: Path) -> None:
    browser.open(made.as_uri(), 688)  # A4 without margins of 14 mm
    browser.wait(DRAWN)
    try:
        browser.ask("Emulation.setEmulatedMedia", media="print")
        assert browser.value(CUT) == [] and browser.value(LETTERS) >= 11
        tables = """deep('section > .scroll table').filter(
            one => one.getBoundingClientRect().right > screen.width)"""
        assert browser.value(f"{tables}.length") == 0
    finally:
        browser.ask("Emulation.setEmulatedMedia", media="")
    browser.pdf(shots / "report.pdf")


@pytest.mark.slow
def test_numbers_are_shown_under_the_pointer(made: Path, browser) -> None:
    browser.open(made.as_uri(), 1280)
    browser.wait(DRAWN)
    browser.value("deep('.mark-symbol path')[0].scrollIntoView({block: 'center'})")
    box = browser.value("deep('.mark-symbol path')[0].getBoundingClientRect().toJSON()")
    x, y = box["x"] + box["width"] / 2, box["y"] + box["height"] / 2
    browser.ask("Input.dispatchMouseEvent", type="mouseMoved", x=x, y=y)
    shown = "document.querySelector('#vg-tooltip-element.visible')?.innerText"
    text = browser.wait(shown, "numbers beside the pointer")
    assert "epoch" in text and "run" in text


@pytest.mark.slow
def test_a_screen_reader_and_a_keyboard_reach_everything(made: Path, browser) -> None:
    browser.open(made.as_uri(), 1280)
    browser.wait(DRAWN)
    headings = browser.value("deep('h1, h2, h3').map(one => [one.tagName, one.textContent])")
    assert headings[0][0] == "H1" and ["H2", "Disputed images"] in headings
    nodes = browser.ask("Accessibility.getFullAXTree")["nodes"]
    names = {node["name"]["value"] for node in nodes if node.get("name", {}).get("value")}
    assert {"Top-1 by epoch", "Confusion matrix", "Accuracy and cost"} <= names
    assert any(name.startswith("epoch: 0; top-1, %: ") for name in names), "each point"
    assert browser.value("deep('img').every(one => one.alt)")
    assert browser.value("deep('.scroll').every(one => one.tabIndex === 0 && one.ariaLabel)")
    assert browser.value("deep('[data-chart]').every(one => one.parentNode.querySelector('table'))")
    for key in ("keyDown", "keyUp"):
        browser.value("deep('summary')[0].focus()")
        browser.ask(
            "Input.dispatchKeyEvent",
            type=key,
            key="Enter",
            code="Enter",
            text="\r",
            windowsVirtualKeyCode=13,
        )
    assert browser.value("deep('details')[0].open"), "Enter opens a table"


@pytest.mark.slow
def test_charts_follow_dark_mode(made: Path, browser, shots: Path) -> None:
    browser.open(made.as_uri(), 1280)
    browser.wait(DRAWN)
    found = {}
    for scheme in ("light", "dark"):
        features = [{"name": "prefers-color-scheme", "value": scheme}]
        browser.ask("Emulation.setEmulatedMedia", media="", features=features)
        browser.screenshot(shots / f"report-{scheme}.png")
        fill, ink = browser.value(
            "[getComputedStyle(deep('svg text')[0]).fill, getComputedStyle(document.body).color]"
        )
        assert fill == ink
        line = browser.value("getComputedStyle(deep('.mark-line path')[0]).stroke")
        found[scheme] = (ink, line)
    browser.ask("Emulation.setEmulatedMedia", media="", features=[])
    assert found["light"][0] != found["dark"][0] and found["light"][1] != found["dark"][1]


def test_a_runs_settings_run_no_code_and_must_be_settings(tmp_path: Path) -> None:
    (tmp_path / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    for text, words in (
        (f"plugin: [{tmp_path / 'evil.py'}]", "what a file names is not run"),
        ("- a\n- list", "config.yaml: found .*, expected names with values"),
        ("{", "config.yaml: not readable as YAML"),
        ("epochs: [1]", "config.yaml: epochs: found .1., expected a whole number"),
    ):
        (tmp_path / "config.yaml").write_text(text)
        with pytest.raises(UserError, match=words):
            report.build_runs(report._parser().parse_args([str(tmp_path)]))
    assert not (tmp_path / "ran").exists()
