"""What the user writes about matches: strings, files and plugins, and every way to get it wrong."""

import json
from pathlib import Path

import pytest
import torch

import losses
import matching
import options
from base.errors import UserError
from matching import PROJ_MAP, IntermediateMatch, read_config, read_match
from schedules import WEIGHT_SCHEDULER

HIDDEN = "layer_S=2,layer_T=4,feature=hidden,loss=hidden_mse"
# As TextBrewer's documentation gives it.
TEXTBREWER = {
    "temperature": 8,
    "temperature_scheduler": ["flsw", 1, 2],
    "hard_label_weight": 0.5,
    "kd_loss_type": "ce",
    "kd_loss_weight_scheduler": "linear_decay",
    "intermediate_matches": [
        {
            "layer_T": 0,
            "layer_S": 0,
            "feature": "hidden",
            "loss": "hidden_mse",
            "weight": 1,
            "proj": ["linear", 384, 768],
        },
        {"layer_T": [0, 12], "layer_S": [0, 3], "feature": "hidden", "loss": "nst", "weight": 2},
    ],
}


def test_a_match_reads_the_same_from_a_string_json_and_a_mapping() -> None:
    mapping = {
        "layer_T": 12,
        "layer_S": -1,
        "feature": "hidden",
        "loss": "cos",
        "weight": 0.5,
        "proj": ["linear", "auto", 96, {"lr": 0.001}],
    }
    text = "layer_T=12, layer_S=-1,feature=hidden,loss=cos,weight=0.5,proj=linear:auto:96:lr=0.001"
    expected = IntermediateMatch(
        12, -1, "hidden", "cos", 0.5, ("linear", "auto", 96, {"lr": 0.001})
    )
    for source in (mapping, text, json.dumps(mapping)):
        assert read_match(source) == expected


def test_two_layers_a_bare_projection_and_our_own_keys() -> None:
    match = read_match("layer_T=0+12,layer_S=0+3,feature=hidden,loss=fsp,proj=tanh")
    assert (match.layer_T, match.layer_S) == ((0, 12), (0, 3))
    assert match.proj == ("tanh", "auto", "auto", {}) and match.weight == 1
    assert match.name == "hidden_fsp_0-3_0-12"
    match = read_match(
        "layer_T=1,layer_S=0,feature=attention,loss=attention_mse,teacher=1,"
        "textbrewer_clip=true,attention=probabilities,tokens=patch"
    )
    assert match.textbrewer_clip and match.teacher == 1 and match.taps(0)[0].kind[0] == "p"


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (f"{HIDDEN},lyer=1", "unknown lyer; the keys are layer_T, layer_S, feature"),
        ("feature=hidden,loss=hiden_mse", "hiden_mse.*not known.*attention_ce.*hidden_mse"),
        ("feature=hiden,loss=cos", "hiden.*attention, hidden, pooled"),
        (f"{HIDDEN},proj=quadratic", "quadratic.*linear, orthogonal, relu, tanh"),
        (f"{HIDDEN},proj=linear:wide:3", "proj=.*cannot be read"),
        (f"{HIDDEN},proj=linear:1:2:3", "proj"),
        (f"{HIDDEN},tokens=class", "all, cls, dist, patch"),
        (f"{HIDDEN},resize=bilinear", "tokens=patch"),
        (f"{HIDDEN},weight=heavy", "weight: found 'heavy', expected a number"),
        ("layer_S=1,layer_T=x,feature=hidden,loss=cos", "layer_T='x'"),
        ("layer_S=1,layer_T=1,feature=hidden,loss=fsp", "two layers of each side"),
        ("layer_S=0+1,layer_T=0+1,feature=hidden,loss=cos", "one layer each"),
        ("layer_S=0+1,layer_T=1,feature=hidden,loss=fsp", "two layers"),
        ("layer_S=1,layer_T=1,feature=hidden,loss=attention_mse", "not for the feature hidden"),
        ("feature=attention,loss=attention_mse,proj=linear", "attention takes no proj"),
        ("feature=hidden", "lacks loss"),
        ("[1]", "unknown"),
        ('{"layer_S": ', "--match: not readable as YAML"),
    ],
)
def test_a_match_that_no_network_can_satisfy_is_refused(text: str, words: str) -> None:
    with pytest.raises(UserError, match=words):
        read_match(text)


@pytest.mark.parametrize("suffix", ["json", "yaml"])
def test_textbrewers_file_loads_verbatim(suffix: str, tmp_path: Path) -> None:
    path = tmp_path / f"distill.{suffix}"
    path.write_text(json.dumps(TEXTBREWER))  # JSON is YAML too
    args = options.parse_args(["--distill-config", str(path)]).args
    assert args.distillation_type == "soft" and args.distillation_tau == 8
    assert args.temperature_scheduler == ["flsw", 1, 2] and args.kd_loss_type == "ce"
    assert (args.hard_label_weight, args.kd_loss_weight) == (0.5, 1)
    assert args.kd_loss_weight_scheduler == "linear_decay"
    matches = [read_match(match) for match in args.match]
    assert [match.name for match in matches] == ["hidden_hidden_mse_0_0", "hidden_nst_0-3_0-12"]


def test_missing_keys_take_textbrewers_defaults(tmp_path: Path) -> None:
    path = tmp_path / "empty.json"
    path.write_text("{}")
    args = options.parse_args(["--distill-config", str(path)]).args
    assert (args.distillation_tau, args.kd_loss_type) == (4, "ce")
    assert (args.hard_label_weight, args.kd_loss_weight) == (0, 1), "the label loss is dropped"


def test_without_a_kd_loss_nothing_is_asked_of_the_teachers_logits(tmp_path: Path) -> None:
    path = tmp_path / "distill.yaml"
    path.write_text("kd_loss_weight: 0\nhard_label_weight: 1\n")
    args = options.parse_args(["--distill-config", str(path), "--match", HIDDEN]).args
    assert args.distillation_type == "none" and args.match == [HIDDEN]


@pytest.mark.parametrize(
    ("content", "flags", "words"),
    [
        ("temperature: 3", "--distillation-tau 4", "distillation-tau 4.0 disagrees.*says 3"),
        ("kd_loss_weight: 1", "--distillation-type hard", "hard disagrees.*soft"),
        ("kd_loss_weight: 1", "--distillation-alpha 0.5", "alpha 0.5 disagrees"),
        ("intermediate_matches: []", f"--match {HIDDEN}", "match .*disagrees"),
        ("temprature: 3", "", "unknown temprature; the keys are temperature, "),
        ("temperature: 0", "", "temperature 0: must be above 0"),
        ("temperature: hot", "", "temperature: found 'hot', expected a number"),
        ("kd_loss_type: kl", "", "'kl' is not known.*ce, dist, mse"),
        ("kd_loss_weight_scheduler: linear", "", "linear_decay, linear_growth"),
        ("temperature_scheduler: flsw", "", "flsw"),
        ("probability_shift: true", "--mixup 0.8", "--mixup 0 --cutmix 0"),
        ("- 1", "", r"found \[1\], expected names with values"),
        ("a: [", "", "not readable as YAML"),
    ],
)
def test_a_file_that_cannot_be_followed_is_refused(
    content: str, flags: str, words: str, tmp_path: Path
) -> None:
    path = tmp_path / "distill.yaml"
    path.write_text(content)
    with pytest.raises(UserError, match=words):
        options.parse_args(["--distill-config", str(path), *flags.split()])


def test_a_flag_may_repeat_the_file_or_fill_in_what_it_leaves_out(tmp_path: Path) -> None:
    path = tmp_path / "distill.yaml"
    path.write_text("kd_loss_weight: 0.5\nis_caching_logits: true")
    settings = options.parse_args(
        ["--distill-config", str(path), "--kd-loss-weight", "0.5", "--distillation-tau", "2"]
    )
    assert settings.args.distillation_tau == 2
    assert any("is_caching_logits" in note for note in settings.notes)
    with pytest.raises(UserError, match="nowhere.yaml"):
        read_config(str(tmp_path / "nowhere.yaml"))


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ("--kd-loss-type dist", "belongs to --distillation-type soft"),
        ("--logit-standardization --distillation-type hard", "belongs to"),
        ("--distillation-type soft --temperature-scheduler cwsm:1", "--kd-loss-type"),
        ("--distillation-type soft --kd-loss-type dist --temperature-scheduler cwsm:1", "dist"),
        ("--distillation-type soft --kd-loss-type ce --temperature-scheduler cvsm:1", "cwsm"),
        ("--distillation-type soft --distillation-tau 0", "above 0"),
        ("--ranking-kl-weight 1 --batch-size 2", "3 images"),
        ("--ranking-kl-weight 1 --ranking-tau 0", "ranking-tau"),
        ("--student-adaptor mine", "mine"),
        (f"--cosub --match {HIDDEN}", "cosub"),
        ("--cosub --hard-label-weight 0.5", "cosub"),
    ],
)
def test_flags_of_an_objective_that_cannot_be_are_refused(flags: str, words: str) -> None:
    with pytest.raises(UserError, match=words):
        options.parse_args(flags.split())


def test_one_teacher_is_a_name_and_several_are_a_list() -> None:
    parser = options.get_args_parser()
    assert parser.parse_args(["--teacher-model", "a"]).teacher_model == "a"
    args = parser.parse_args(
        ["--teacher-model", "a", "--teacher_model", "b", "--teacher-weight", "2"]
    )
    assert args.teacher_model == ["a", "b"] and args.teacher_weight == [2.0]
    assert parser.parse_args(["--teacher-model", "c"]).teacher_model == "c"


def test_projections_have_textbrewers_first_weights() -> None:
    torch.manual_seed(0)
    projection = PROJ_MAP["linear"](70, 110)
    assert projection.weight.shape == (110, 70) and not projection.bias.any()
    assert projection.weight.std().item() == pytest.approx(0.02, rel=0.05)
    states = torch.randn(3, 5, 70)
    for name, low in (("relu", 0), ("tanh", -1)):
        out = PROJ_MAP[name](70, 110)(states)
        assert out.shape == (3, 5, 110) and low <= out.min() and (name == "relu" or out.max() <= 1)


@pytest.mark.parametrize(("dim_S", "dim_T"), [(5, 9), (9, 5), (7, 7)])
def test_the_orthogonal_projection_stays_orthogonal_while_it_trains(dim_S: int, dim_T: int) -> None:
    projection = PROJ_MAP["orthogonal"](dim_S, dim_T)
    first = projection.weight.detach().clone()
    optimizer = torch.optim.AdamW(projection.parameters(), lr=0.1)
    for _ in range(20):
        optimizer.zero_grad()
        projection(torch.randn(8, dim_S)).pow(3).sum().backward()
        optimizer.step()
    assert (projection.weight - first).abs().max() > 0.1
    narrow = projection.weight if dim_T >= dim_S else projection.weight.mT  # P of P^t P
    assert (narrow.mT @ narrow - torch.eye(min(dim_S, dim_T))).norm() < 1e-5
    copy = PROJ_MAP["orthogonal"](dim_S, dim_T)
    copy.load_state_dict(projection.state_dict())
    assert torch.equal(copy.weight, projection.weight)


PLUGIN = """
import torch
from losses import KD_LOSS_MAP, MATCH_LOSS_MAP
from matching import ADAPTORS, PROJ_MAP
from schedules import WEIGHT_SCHEDULER

MATCH_LOSS_MAP["hidden_l1"] = lambda state_S, state_T, mask=None: (state_S - state_T).abs().mean()
PROJ_MAP["cubic"] = lambda dim_S, dim_T: torch.nn.Linear(dim_S, dim_T)
WEIGHT_SCHEDULER["late"] = lambda progress: float(progress > 0.5)
ADAPTORS["second"] = lambda images, output: {"logits": output[0], "hidden": output[1]}
"""


def test_a_plugins_entries_are_used_by_name(tmp_path: Path, monkeypatch) -> None:
    for registry in (losses.MATCH_LOSS_MAP, PROJ_MAP, WEIGHT_SCHEDULER, matching.ADAPTORS):
        for name in ("hidden_l1", "cubic", "late", "second"):
            monkeypatch.delitem(registry, name, raising=False)
    path = tmp_path / "mine.py"
    path.write_text(PLUGIN)
    match = "layer_S=1,layer_T=1,feature=hidden,loss=hidden_l1,proj=cubic"
    with pytest.raises(UserError, match="hidden_l1"):
        options.parse_args(["--match", match])
    flags = [
        "--plugin",
        str(path),
        "--match",
        match,
        "--hard-label-weight-scheduler",
        "late",
        "--student-adaptor",
        "second",
    ]
    args = options.parse_args(flags).args
    assert read_match(args.match[0]).proj[0] == "cubic"
    for registry in (losses.MATCH_LOSS_MAP, PROJ_MAP, WEIGHT_SCHEDULER, matching.ADAPTORS):
        for name in ("hidden_l1", "cubic", "late", "second"):
            registry.pop(name, None)


@pytest.mark.parametrize("content", [None, "1 / 0", "def"])
def test_a_plugin_that_fails_is_one_line(content: str | None, tmp_path: Path) -> None:
    path = tmp_path / "mine.py"
    if content:
        path.write_text(content)
    with pytest.raises(UserError, match="--plugin .*mine.py"):
        options.parse_args(["--plugin", str(path)])


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("feature=hidden,loss=cos", "lacks layer_S, layer_T"),
        ("layer_S=0,layer_S=4,layer_T=1,feature=hidden,loss=cos", "a key comes twice.*0\\+4"),
        ("layer_S=1,layer_T=1,feature=hidden,loss=cos,weight=nan", "weight nan"),
        ("layer_S=1,layer_T=1,feature=hidden,loss=cos,weight=-1", "weight -1"),
        (
            "layer_S=1,layer_T=1,feature=attention,loss=attention_ce,attention=probabilities",
            "takes scores",
        ),
    ],
)
def test_a_match_that_says_too_little_or_too_much_is_refused(text: str, words: str) -> None:
    with pytest.raises(UserError, match=words):
        options.parse_args(["--match", text])


@pytest.mark.parametrize(
    "flags",
    [
        "--kd-loss-weight -1",
        "--hard-label-weight nan",
        "--ranking-kl-weight nan",
        "--ranking-tau inf",
        "--distillation-tau inf",
    ],
)
def test_weights_and_temperatures_are_finite_and_not_below_zero(flags: str) -> None:
    with pytest.raises(UserError, match="must be"):
        options.parse_args(["--distillation-type", "soft", *flags.split()])


def test_a_files_switch_is_true_or_false(tmp_path: Path) -> None:
    (tmp_path / "d.yaml").write_text("probability_shift: 'no'")
    with pytest.raises(UserError, match="found 'no', expected true or false"):
        options.parse_args(["--distill-config", str(tmp_path / "d.yaml")])
