"""The fidelity report: its numbers on hand-made logits, and the page of real runs."""

import json
import math
import re
from pathlib import Path

import pytest
import torch
from torch import Tensor

import models
from base.errors import UserError
from tools import report
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
    assert top(torch.eye(3)[[0, 1, 1, 2]], labels) == {"acc1": 50, "acc5": 100}
    rows = class_gaps(torch.tensor([0, 0, 1, 0]), torch.tensor([0, 1, 1, 1]), labels, ["x", "y"])
    assert [(row["class"], row["gap"]) for row in rows] == [("x", -50), ("y", 50)]


def test_both_heads_and_their_mean_are_collected() -> None:
    torch.manual_seed(0)
    network = models.create_model("deit_pico_distilled_patch8_32", num_classes=7)
    teacher = models.create_model("resnet_pico", num_classes=7).eval()
    batches = [(torch.randn(3, 3, 32, 32), torch.tensor([0, 1, 2])) for _ in range(3)]
    outputs = collect(network, teacher, batches, torch.device("cpu"), limit=7, keep=2)
    heads = (outputs.logits[CLS] + outputs.logits[DIST]) / 2
    torch.testing.assert_close(outputs.logits[STUDENT], heads)
    assert len(outputs.labels) == 7 and len(outputs.token_cosine) == 5
    assert len(outputs.farthest) == 2 and outputs.farthest[0][0] >= outputs.farthest[1][0]
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
LENDER = report.Run("hard", OWN, {}, {}, [], [], "")


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
    name: str, *, taught: bool = True, epochs: int = 3, data: str = "digits"
) -> report.Run:
    """A run with made-up outputs, and names of classes as long as ImageNet's."""
    generator = torch.Generator().manual_seed(len(name))
    names = (STUDENT, CLS, DIST, TEACHER)[: 4 if taught else 3]
    logits = {one: torch.randn(90, 30, generator=generator) for one in names}
    classes = [f"{i} sulphur-crested cockatoo, Kakatoe galerita, Cacatua" for i in range(30)]
    outputs = Outputs(
        torch.arange(90) % 30,
        logits,
        [-0.05288, 0.5, 0.979],
        [(2.5, torch.zeros(3, 8, 8), i) for i in range(5)],
    )
    curve = [
        {"epoch": i, "test_acc1": 71.234 + i, "train_loss": None if i == 1 else 1234.5 * i}
        for i in range(epochs)
    ]
    teacher = "cnn from /a/very/long/path/" + "without/any/space/" * 9 if taught else ""
    found = {
        "run": name,
        "folder": name,
        "student": "deit",
        "input": "224x224",
        "teacher": teacher,
        "teacher_of": name if taught else "",
        "teacher_input": "32x32" if taught else "",
        "teacher_note": "",
        "distillation": "hard",
        "weights": "best",
        "data": data,
        **numbers(outputs, classes),
        "curves": curve,
    }
    farthest = report.farthest(outputs, classes, (0.5,) * 3, (0.5,) * 3) if taught else []
    return report.Run(name, {}, found, outputs.predictions(), farthest, classes, data)


def page_of(*runs: report.Run) -> str:
    numbers = [run.numbers for run in runs]
    verdicts = report.verdicts(numbers)
    found = {"runs": numbers, "agreement": report.between(runs), "verdicts": verdicts}
    return report.page(found, [run.farthest for run in runs])


def test_runs_are_compared_with_each_other() -> None:
    one, two = measured("one"), measured("two", taught=False)
    found = report.between([one, two])
    assert found["names"] == ["label", "teacher", "one", "two"]
    assert [row[i] for i, row in enumerate(found["matrix"])] == [1] * 4
    share = float((one.predictions[STUDENT] == two.predictions[STUDENT]).double().mean())
    assert found["matrix"][2][3] == found["matrix"][3][2] == share
    other = report.between([one, measured("three")])
    assert other["names"] == ["label", "teacher of one", "teacher of three", "one", "three"]
    assert report.between([one]) is None
    called = report.between([measured("teacher", taught=False), one])
    assert called["names"] == ["label", "teacher", "run teacher", "one"]


def test_different_images_are_said_and_not_compared() -> None:
    runs = measured("one"), measured("two", data="<flowers>"), measured("three")
    assert report.between(runs) is None
    page = page_of(*runs)
    assert "different images" in page
    assert "one, three on 90 of digits; two on 90 of &lt;flowers&gt;." in page
    assert "different images" not in page_of(measured("one"), measured("two"))


def test_a_student_above_its_teacher_or_below_the_baseline_is_stated() -> None:
    hard, none, other = measured("hard"), measured("none", taught=False), measured("other")
    none.numbers["distillation"] = "none"
    other.numbers["data"] = "flowers"
    for run, acc1 in ((hard, 61.0), (none, 62.5), (other, 3.0)):
        run.numbers["accuracy"][STUDENT]["acc1"] = acc1
    hard.numbers["accuracy"][TEACHER]["acc1"] = 60.25
    other.numbers["accuracy"][TEACHER]["acc1"] = 3.0
    assert report.verdicts([run.numbers for run in (hard, none, other)]) == [
        "hard: the student (61.00%) is above the teacher (60.25%)",
        "hard: the student (61.00%) is below none, which was trained without distillation (62.50%)",
    ]
    page = page_of(hard, none)
    assert "is above the teacher (60.25%)." in page and "is below none" in page
    assert "60.25% at 32x32" in page, "the input size of the teacher"


def test_a_curve_of_one_epoch_or_with_a_hole_is_drawn() -> None:
    assert page_of(measured("one", epochs=1)).count("<circle") == 3  # accuracy, loss, cosine
    assert "nan" not in page_of(measured("one", epochs=2)).lower().split("</style>")[1]


def test_a_run_has_one_colour_in_all_charts() -> None:
    plain = measured("plain")
    plain.numbers["token_cosine"] = []
    page = page_of(plain, measured("two"))
    assert set(re.findall(r"<span class=(c\d)>two<", page)) == {"c1"}
    assert page.count("<span class=c0>plain<") == 2, "accuracy and loss"


def test_the_images_they_disagree_about_most_are_those_of_the_largest_divergence() -> None:
    torch.manual_seed(0)
    network = models.create_model("deit_pico_patch8_32", num_classes=7)
    teacher = models.create_model("resnet_pico", num_classes=7).eval()
    batches = [(torch.randn(3, 3, 32, 32), torch.tensor([0, 1, 2])) for _ in range(3)]
    outputs = collect(network, teacher, batches, torch.device("cpu"), keep=4)
    nats = divergence(outputs.logits[TEACHER], outputs.logits[STUDENT])
    assert [index for *_, index in outputs.farthest] == nats.argsort(descending=True)[:4].tolist()


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
    assert not re.search(r"""(?:src|href)=['"]?(?!data:)\w""", page) and "http" not in page
    assert page.count("<svg") >= 8 and "data:image/jpeg;base64," in page
    assert "viewport" in page and "@media print" in page


@pytest.mark.slow
def test_a_run_without_a_teacher_is_measured_against_that_of_another(made: Path) -> None:
    none, hard = json.loads(made.with_suffix(".json").read_text())["runs"]
    assert (none["distillation"], hard["distillation"]) == ("none", "hard") and none["curves"]
    assert none["teacher"] == hard["teacher"] and none["teacher_of"] == hard["teacher_of"] == "hard"
    assert none["accuracy"]["teacher"] == hard["accuracy"]["teacher"]
    assert none["kl_nats"][STUDENT] > 0 and not hard["teacher_note"]
    assert "<b>none</b>: it had no teacher; compared with that of hard." in (made.read_text())


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
    assert "teacher 8 100%" in out.read_text()


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
# How far right the teacher's column ends of the box in which its table scrolls
TEACHER_SEEN = """deep('thead th').filter(one => one.textContent === 'teacher').map(one =>
    one.closest('.scroll').getBoundingClientRect().right - one.getBoundingClientRect().right)"""
STICKS = """deep('.scroll').map(box => {
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
    browser.screenshot(shots / f"report-{width}.png")
    lines = browser.value("deep('polyline').map(one => one.getTotalLength())")
    assert len(lines) == 8 and all(length > 0 for length in lines), "no curves"
    images = browser.value("deep('img').map(one => [one.naturalWidth, one.clientWidth])")
    assert len(images) == 24 and all(wide == 160 and shown > 90 for wide, shown in images)
    assert browser.value("screen.width") == width and browser.value(CUT) == []
    wide = "deep('.scroll').map(box => box.scrollWidth - box.clientWidth)"
    assert set(browser.value(wide)) == {0}, "two runs need no scrolling"


@pytest.mark.slow
@pytest.mark.parametrize("width", [390, 1280])
def test_long_names_and_many_runs_are_cut_nowhere(
    width: int, browser, tmp_path: Path, shots: Path
) -> None:
    names = ["a", "short", "deit_tiny_distilled_patch16_224_seed_0", "x" * 60, "e", "f", "g"]
    path = tmp_path / "page.html"
    path.write_text(page_of(*(measured(name, taught=name != "g") for name in names)))
    browser.open(path.as_uri(), width)
    browser.screenshot(shots / f"report-many-{width}.png")
    assert browser.value(CUT) == []
    assert browser.value(LETTERS) >= 11, "labels too small to read"
    assert min(browser.value(TEACHER_SEEN)) >= 0
    assert max(map(abs, browser.value(STICKS))) < 1, "the first column scrolls away"


@pytest.mark.slow
def test_nothing_is_cut_in_print(made: Path, browser, shots: Path) -> None:
    browser.open(made.as_uri(), 688)  # A4 without margins of 14 mm
    try:
        browser.ask("Emulation.setEmulatedMedia", media="print")
        assert browser.value(CUT) == [] and browser.value(LETTERS) >= 11
        tables = "deep('table').filter(one => one.getBoundingClientRect().right > screen.width)"
        assert browser.value(f"{tables}.length") == 0
    finally:
        browser.ask("Emulation.setEmulatedMedia", media="")
    browser.pdf(shots / "report.pdf")


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
