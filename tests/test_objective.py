"""The sum of all terms: its value, who gets a gradient, and what two networks cannot match."""

import json
import weakref
from functools import partial
from pathlib import Path

import pytest
import timm
import torch
import torch.nn.functional as F
from torch import nn

import losses
import models
import options
from base.errors import UserError
from data.transforms import InputConfig
from distill import match_builder, objective
from distill.teacher import InputAdapter, Teacher, Teachers
from engine import train_one_epoch
from matching import ADAPTORS, PROJ_MAP
from models.features import AdaptorTaps, Tap, TappedOutput
from training import optim
from training.step_config import StepConfig

INPUTS = InputConfig((8, 8), (0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
IMAGES = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(1))
LABELS = torch.tensor([0, 2, 1, 4])
PLAIN = [
    "--mixup",
    "0",
    "--cutmix",
    "0",
    "--smoothing",
    "0",
    "--teacher-model",
    "a",
    "--teacher-path",
    "",
]
MATCH_ALL = [
    "layer_S=2,layer_T=3,feature=hidden,loss=hidden_mse,proj=linear,tokens=patch",
    "layer_S=1,layer_T=2,feature=hidden,loss=cos,proj=tanh:12:18,tokens=patch",
    "layer_S=-1,layer_T=-1,feature=hidden,loss=pkd,proj=relu",
    "layer_S=0+2,layer_T=0+3,feature=hidden,loss=fsp,proj=linear",
    "layer_S=0+2,layer_T=0+3,feature=hidden,loss=nst,tokens=patch",
    "layer_S=1,layer_T=2,feature=attention,loss=attention_ce_mean,tokens=patch",
    "feature=pooled,loss=vkd,proj=orthogonal",
]


def vit(width: int, depth: int, heads: int, *, distilled: bool = False, seed: int = 0, **options):
    torch.manual_seed(seed)
    name = "deit_tiny_distilled_patch16_224" if distilled else "vit_tiny_patch16_224"
    shape = {
        "img_size": 8,
        "patch_size": 4,
        "embed_dim": width,
        "depth": depth,
        "num_heads": heads,
        "num_classes": 5,
    }
    return timm.create_model(name, **(shape | options))


def student_of(args, network: nn.Module | None = None) -> models.Student:
    network = network or vit(12, 2, 2, distilled=True)
    two = models.has_distillation_head(network) and args.distillation_type != "none"
    return models.Student(network, heads="both" if two else "one")


def vit_teacher(**options) -> Teacher:
    return Teacher(vit(18, 3, 3, seed=1, **options), InputAdapter(INPUTS, INPUTS), name="a")


def cnn_teacher() -> Teacher:
    network = models.create_model("resnet_pico", num_classes=5)
    return Teacher(network, InputAdapter(INPUTS, INPUTS), name="a")


def build(*flags: str, student=None, teacher=None, total: int = 4):
    """Return (student, teacher, objective, args) of a command line."""
    args = options.parse_args([*PLAIN, *flags]).args
    student, teacher = student_of(args, student), teacher or vit_teacher()
    return (
        student,
        teacher,
        objective.build_objective(
            args, student, teacher, mixing=False, input_size=(8, 8), total_updates=total
        ),
        args,
    )


def matches(*texts: str) -> list[str]:
    return [word for text in texts for word in ("--match", text)]


def loss_of(student, teacher, criterion) -> torch.Tensor:
    return criterion(IMAGES, student(IMAGES), LABELS, teacher_outputs=teacher(IMAGES))


def config(tmp_path: Path, **keys) -> list[str]:
    path = tmp_path / "distill.json"
    path.write_text(json.dumps(keys))
    return ["--distill-config", str(path)]


def test_without_a_match_nothing_changes() -> None:
    student, teacher, criterion, _ = build("--distillation-type", "soft")
    assert type(criterion) is losses.DistillationLoss
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in student.modules())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in teacher.modules())
    assert not list(student.projections.parameters()) and student.taps is None
    cls, dist = student(IMAGES)
    kl = (
        F.kl_div(
            dist.log_softmax(1), teacher(IMAGES).log_softmax(1), log_target=True, reduction="sum"
        )
        / dist.numel()
    )
    assert torch.equal(
        loss_of(student, teacher, criterion), 0.5 * F.cross_entropy(cls, LABELS) + 0.5 * kl
    )


def test_the_loss_is_the_sum_of_weighted_terms() -> None:
    texts = [f"{text},weight={0.1 * (i + 1)}" for i, text in enumerate(MATCH_ALL)]
    student, teacher, criterion, _ = build(
        "--distillation-type", "hard", "--distillation-alpha", "0.3", *matches(*texts)
    )
    loss, terms = loss_of(student, teacher, criterion), criterion.terms
    assert list(terms) == [
        "base",
        "distillation",
        "hidden_hidden_mse_2_3",
        "hidden_cos_1_2",
        "hidden_pkd_-1_-1",
        "hidden_fsp_0-2_0-3",
        "hidden_nst_0-2_0-3",
        "attention_attention_ce_mean_1_2",
        "pooled_vkd_0_0",
    ]
    values = list(terms.values())
    total = 0.7 * values[0] + 0.3 * values[1]
    total = total + sum(0.1 * (i + 1) * value for i, value in enumerate(values[2:]))
    torch.testing.assert_close(loss.detach(), total)
    table = criterion.describe()
    assert "0.7 base + 0.3 hard" in table and "tanh 12 to 18" in table and "0+2, 0+3" in table


@pytest.mark.parametrize(
    "flags",
    [
        [],
        ["--distillation-type", "soft", "--distillation-alpha", "0.2"],
        ["--hard-label-weight", "0.4"],
        ["--distillation-type", "hard", "--kd-loss-weight", "2", *matches(*MATCH_ALL)],
    ],
)
def test_the_terms_times_their_weights_add_up_to_the_loss(flags: list[str]) -> None:
    student, teacher, criterion, _ = build(*flags)
    loss = loss_of(student, teacher, criterion)
    parts = [criterion.term_weights[name] * value for name, value in criterion.terms.items()]
    torch.testing.assert_close(loss.detach(), sum(parts))


def test_gradients_reach_the_student_and_projections_and_not_the_teacher() -> None:
    student, teacher, criterion, _ = build(*matches(*MATCH_ALL), "--distillation-type", "hard")
    student.train()
    loss_of(student, teacher, criterion).backward()
    for name, parameter in student.named_parameters():
        assert parameter.grad is not None, name
    assert all(p.grad is None for p in teacher.parameters())
    assert not any("projection" in name for name in student.network.state_dict())


@pytest.mark.parametrize("kind", ["hidden", "attention"])
def test_a_student_like_its_teacher_loses_nothing(kind: str) -> None:
    loss = {"hidden": "hidden_mse", "attention": "attention_mse"}[kind]
    student, teacher, criterion, _ = build(
        *matches(f"layer_S=1,layer_T=1,feature={kind},loss={loss}"), student=vit(18, 3, 3, seed=1)
    )
    loss_of(student.eval(), teacher, criterion)
    assert criterion.terms[f"{kind}_{loss}_1_1"].item() == pytest.approx(0, abs=1e-10)


def test_a_negative_layer_is_counted_from_the_end_and_names_are_unique() -> None:
    text = "layer_S={},layer_T=3,feature=hidden,loss=cos,proj=linear,tokens=patch"
    student, teacher, criterion, _ = build(*matches(text.format(-1), text.format(-1)))
    student.projections["hidden_cos_-1_3#2"].load_state_dict(
        student.projections["hidden_cos_-1_3"].state_dict()
    )
    loss_of(student.eval(), teacher, criterion)
    assert torch.equal(criterion.terms["hidden_cos_-1_3"], criterion.terms["hidden_cos_-1_3#2"])


def test_attention_is_not_clipped_unless_asked() -> None:
    text = "layer_S=0,layer_T=0,feature=attention,loss=attention_mse_sum,tokens=patch"
    student, teacher, criterion, _ = build(*matches(text, f"{text},textbrewer_clip=true"))
    found = loss_of(student.eval(), teacher, criterion) and list(criterion.terms.values())
    states = student.taps.forward(student.network, IMAGES).states
    state_S = next(iter(states.values()))[..., 2:, 2:]
    state_T = next(iter(teacher(IMAGES).states.values()))[..., 1:, 1:]
    torch.testing.assert_close(found[1], F.mse_loss(state_S.sum(1), state_T.sum(1)))
    torch.testing.assert_close(found[2], losses.att_mse_sum_loss(state_S, state_T))


def test_a_cnn_teaches_hidden_states_fsp_and_pooled_features() -> None:
    student, teacher, criterion, _ = build(
        *matches(
            "layer_S=2,layer_T=-1,feature=hidden,loss=hidden_mse,tokens=patch,resize=bilinear,"
            "proj=linear",
            "layer_S=0+2,layer_T=0+1,feature=hidden,loss=fsp,proj=linear",
            "feature=pooled,loss=pkd,proj=linear",
        ),
        teacher=cnn_teacher(),
    )
    loss_of(student, teacher, criterion).backward()
    assert student.projections["hidden_hidden_mse_2_-1"].weight.grad.abs().sum() > 0


@pytest.mark.parametrize("how", ["bilinear", "avg"])
def test_resize_brings_the_teachers_grid_to_the_students(how: str) -> None:
    tokens = torch.arange(24.0).reshape(1, 2 * 4 * 3, 1)[:, :8].repeat(2, 1, 3)
    out = match_builder.resize_tokens(tokens, (2, 4), (1, 2), how)
    assert out.shape == (2, 2, 3)
    if how == "avg":
        torch.testing.assert_close(out[0, :, 0], torch.tensor([2.5, 4.5]))
    assert torch.equal(match_builder.resize_tokens(tokens, (2, 4), (2, 4), how), tokens)


def test_a_teacher_without_a_classifier_serves_matches_and_ranking() -> None:
    teacher = Teacher(
        vit(18, 3, 3, seed=1, img_size=14, patch_size=2, num_classes=0),
        InputAdapter(INPUTS, InputConfig((14, 14), (0.5,) * 3, (0.5,) * 3)),
    )
    student, teacher, criterion, _ = build(
        *matches("layer_S=2,layer_T=3,feature=hidden,loss=cos,tokens=patch,resize=avg,proj=linear"),
        "--ranking-kl-weight",
        "2",
        "--ranking-tau",
        "0.5",
        teacher=teacher,
    )
    loss = loss_of(student.eval(), teacher, criterion)
    assert list(criterion.terms) == ["base", "hidden_cos_2_3", "ranking"]
    pooled_S, pooled_T = student(IMAGES).states["ranking"][0], teacher(IMAGES).logits
    expected = losses.in_batch_similarity_loss(pooled_S, pooled_T, 0.5)
    torch.testing.assert_close(criterion.terms["ranking"], expected.detach())
    values = list(criterion.terms.values())
    torch.testing.assert_close(loss.detach(), values[0] + values[1] + 2 * values[2])


@pytest.mark.parametrize(
    ("match", "teacher", "words"),
    [
        ("layer_S=3,layer_T=3,feature=hidden,loss=cos", vit_teacher, "layer 3 .*range.*0 to 2"),
        ("layer_S=0,layer_T=4,feature=hidden,loss=cos", vit_teacher, "layer 4 .*range.*0 to 3"),
        ("layer_S=0,layer_T=0,feature=hidden,loss=cos,tokens=cls", vit_teacher, r"12.*18.*proj"),
        (
            "layer_S=0,layer_T=0,feature=hidden,loss=cos,tokens=patch,proj=linear:13:18",
            vit_teacher,
            "width 13 for the student.*12",
        ),
        (
            "layer_S=0,layer_T=0,feature=hidden,loss=cos,tokens=patch,proj=linear:12:19",
            vit_teacher,
            "width 19 for the teacher.*18",
        ),
        (
            "layer_S=0,layer_T=0,feature=attention,loss=attention_mse,tokens=patch",
            vit_teacher,
            "2 heads against 3: use attention_mse_sum",
        ),
        (
            "layer_S=0,layer_T=0,feature=attention,loss=attention_ce,tokens=patch",
            vit_teacher,
            "attention_ce_mean",
        ),
        (
            "layer_S=0,layer_T=0,feature=attention,loss=attention_ce_mean,tokens=patch",
            cnn_teacher,
            "no attention",
        ),
        ("layer_S=0,layer_T=0,feature=hidden,loss=cos,proj=linear", vit_teacher, "tokens=patch"),
        (
            "layer_S=0,layer_T=0,feature=hidden,loss=cos,proj=linear,tokens=dist",
            vit_teacher,
            "no dist token",
        ),
        (
            "layer_S=0,layer_T=1,feature=hidden,loss=cos,proj=linear,tokens=patch",
            cnn_teacher,
            "same patch grid",
        ),
        ("layer_S=0,layer_T=1,feature=hidden,loss=pkd,proj=linear", cnn_teacher, "feature=pooled"),
        (
            "layer_S=0+1,layer_T=1+2,feature=hidden,loss=fsp,proj=linear",
            cnn_teacher,
            r"widths \[16, 32\]",
        ),
        ("layer_S=0+1,layer_T=0+1,feature=hidden,loss=fsp", cnn_teacher, "project the student"),
        ("layer_S=0,layer_T=0,feature=hidden,loss=cos,teacher=b", vit_teacher, r"no teacher 'b'"),
    ],
)
def test_what_two_networks_cannot_match_is_one_error(match: str, teacher, words: str) -> None:
    with pytest.raises(UserError, match=words):
        build(*matches(match), teacher=teacher())


def test_a_file_drops_the_label_loss_as_textbrewer_does(tmp_path: Path) -> None:
    student, teacher, criterion, _ = build(*config(tmp_path, temperature=2))
    loss = loss_of(student, teacher, criterion)
    expected = losses.kd_ce_loss(student(IMAGES)[1], teacher(IMAGES), 2)
    torch.testing.assert_close(loss, expected)
    assert criterion.describe() == "0 base + 1 soft (tau 2)"


def test_scheduled_weights_replace_the_configured_ones_after_the_first_update(
    tmp_path: Path,
) -> None:
    _, _, criterion, args = build(
        *config(
            tmp_path,
            kd_loss_weight=0.7,
            hard_label_weight=0.3,
            kd_loss_weight_scheduler="linear_decay",
            hard_label_weight_scheduler="linear_growth",
        ),
        total=4,
    )
    optimizer = torch.optim.SGD([nn.Parameter(torch.ones(1))], lr=0.1)
    schedule = optim.build_schedule(args, optimizer, 4, criterion.at_update)
    found = []
    for update in range(4):
        schedule.step(update, 0)
        found.append(criterion.criterion.weights)
    assert found == [(0.3, 0.7), (0.25, 0.75), (0.5, 0.5), (0.75, 0.25)]


def test_scheduled_temperatures_are_clamped_and_counted(tmp_path: Path) -> None:
    _, _, criterion, _ = build(
        *config(tmp_path, temperature=1, temperature_scheduler=["cwsm", 2]),
        "--temperature-min",
        "0.5",
    )
    logits = torch.tensor([[9.0, 0, 0, 0, 0], [0, 0, 0, 0, 0], [1, 0, 0, 0, 0], [2, 0, 0, 0, 0]])
    loss = criterion(IMAGES, (logits, logits), LABELS, teacher_outputs=logits.flip(0))
    # 1 / confidence is 1.0, 5.0, 2.5 and 1.5, mean 2.5: the second row gets 1 + 2 * (2.5 - 5) < 0.
    assert torch.isfinite(loss) and criterion.terms["temperature_clamped"] == 0.25


def test_probability_shift_swaps_the_top_class_with_the_true_one(tmp_path: Path) -> None:
    logits = torch.tensor([[3.0, 1.0, 2.0], [0.0, 5.0, 1.0]])
    before = logits.clone()
    shifted = objective.shift_probability(logits, torch.tensor([2, 1]))
    assert shifted.tolist() == [[2.0, 1.0, 3.0], [0.0, 5.0, 1.0]]
    assert torch.equal(logits, before)
    student, teacher, criterion, _ = build(*config(tmp_path, probability_shift=True))
    loss = loss_of(student, teacher, criterion)
    shifted = objective.shift_probability(teacher(IMAGES), LABELS)
    torch.testing.assert_close(loss, losses.kd_ce_loss(student(IMAGES)[1], shifted, 4))
    with pytest.raises(ValueError, match="shares"):
        objective.shift_probability(logits, F.one_hot(torch.tensor([2, 1])).float())


@pytest.mark.parametrize("flags", [["--cosub", "--distillation-type", "none"], []])
def test_every_objective_is_told_the_number_of_the_update(flags: list[str]) -> None:
    _, _, criterion, _ = build(*flags)
    criterion.at_update(3)


def test_features_are_freed_after_their_loss() -> None:
    student, teacher, criterion, _ = build("--distillation-type", "soft", *matches(*MATCH_ALL))
    outputs, outputs_T = student(IMAGES), teacher(IMAGES)
    features = [weakref.ref(state) for state in outputs_T.states.values()]
    loss = criterion(IMAGES, outputs, LABELS, teacher_outputs=outputs_T)
    loss.backward()
    del outputs, outputs_T
    assert features and not any(feature() is not None for feature in features)


@pytest.mark.parametrize("standardize", [False, True])
def test_dist_and_standardised_logits_are_asked_for_by_flags(standardize: bool) -> None:
    flags = ["--distillation-type", "soft", "--kd-loss-type", "dist", "--distillation-tau", "2"]
    student, teacher, criterion, _ = build(*flags, *["--logit-standardization"] * standardize)
    assert type(criterion) is losses.DistillationLoss
    loss_of(student.eval(), teacher, criterion)
    logits = student(IMAGES)[1], teacher(IMAGES)
    logits = [losses.standardize_logits(x) if standardize else x for x in logits]
    torch.testing.assert_close(criterion.terms["distillation"], losses.dist_loss(*logits, 2).data)


def several(*weights: float, seeds=(1, 1), separate: bool = False) -> Teachers:
    adapter = InputAdapter(INPUTS, INPUTS)
    members = [Teacher(vit(18, 3, 3, seed=seed), adapter, name="a") for seed in seeds]
    return Teachers(members, weights, separate=separate)


def test_two_equal_teachers_are_one_and_weights_choose() -> None:
    one = vit_teacher()(IMAGES)
    torch.testing.assert_close(several(1, 1)(IMAGES), one)
    torch.testing.assert_close(several(3, 1e-9, seeds=(1, 2))(IMAGES), one)


def test_teachers_apart_have_a_term_each_and_matches_name_theirs() -> None:
    teacher = several(3, 1, seeds=(1, 2), separate=True)
    two = ["--teacher-model", "b", "--teacher-logits", "apart", "--distillation-type", "hard"]
    pairs = "layer_S=0+2,layer_T=0+3,feature=hidden,loss=nst,tokens=patch,teacher="
    student, _, criterion, _ = build(*two, *matches(pairs + "0", pairs + "b"), teacher=teacher)
    loss_of(student.eval(), teacher, criterion)
    each = [
        F.cross_entropy(student(IMAGES).logits[1], logits.argmax(1))
        for logits in teacher(IMAGES).logits
    ]
    torch.testing.assert_close(
        criterion.terms["distillation"], (0.75 * each[0] + 0.25 * each[1]).detach()
    )
    name = "hidden_nst_0-2_0-3"
    assert criterion.terms[name] != criterion.terms[f"{name}#2"]


def test_a_teacher_of_share_0_is_only_matched_and_needs_no_classifier() -> None:
    adapter = InputAdapter(INPUTS, INPUTS)
    networks = [vit(18, 3, 3, seed=1), vit(18, 3, 3, seed=2)]
    networks[1].reset_classifier(0)
    teacher = Teachers([Teacher(network, adapter, name="a") for network in networks], (1, 0))
    flags = ["--teacher-model", "b", "--distillation-type", "hard"]
    with pytest.raises(UserError, match="weight 0 and no --match has teacher=1"):
        build(*flags, teacher=teacher)
    match = "layer_S=0+2,layer_T=0+3,feature=hidden,loss=nst,tokens=patch,teacher="
    student, _, criterion, _ = build(*flags, *matches(match + "1"), teacher=teacher)
    loss_of(student.eval(), teacher, criterion)
    alone = F.cross_entropy(student(IMAGES).logits[1], networks[0](IMAGES).argmax(1))
    torch.testing.assert_close(criterion.terms["distillation"], alone.detach())
    assert criterion.terms["hidden_nst_0-2_0-3"] > 0


class Strange(nn.Module):
    """A network whose output is more than logits."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.body, self.head = nn.Linear(3, width), nn.Linear(width, 5)

    def forward(self, images: torch.Tensor):
        hidden = self.body(images.flatten(2).mT)  # (B, 64, width)
        logits = self.head(hidden.mean(1))
        return (logits, [hidden, 2 * hidden]) if self.training or self.body.in_features else logits


def test_an_adaptor_hands_over_what_the_taps_do_not_know(monkeypatch) -> None:
    adaptor = lambda images, output: {  # noqa: E731
        "logits": [output[0]],
        "hidden": output[1],
        "losses": [output[0].new_tensor(0.25)],
        "inputs_mask": torch.ones(len(images), 64),
    }
    monkeypatch.setitem(ADAPTORS, "strange", adaptor)
    teacher = Teacher(Strange(9), InputAdapter(INPUTS, INPUTS), adaptor=adaptor)
    assert teacher(IMAGES).shape == (4, 5)
    student, teacher, criterion, _ = build(
        "--student-adaptor",
        "strange",
        "--teacher-adaptor",
        "strange",
        *matches("layer_S=1,layer_T=0,feature=hidden,loss=cos,proj=linear"),
        student=Strange(7),
        teacher=teacher,
    )
    loss = loss_of(student, teacher, criterion)
    base, own, match = criterion.terms.values()
    torch.testing.assert_close(loss.detach(), base + own + match)
    assert own == 0.25
    monkeypatch.setitem(ADAPTORS, "strange", lambda images, output: {"logit": output[0]})
    with pytest.raises(UserError, match="adaptor: returned .*logit.*hidden"):
        build("--student-adaptor", "strange", student=Strange(7))


def test_every_projection_is_an_optimizer_group_of_its_own() -> None:
    student, _, _, args = build(
        *matches(
            "layer_S=1,layer_T=1,feature=hidden,loss=cos,tokens=patch,proj=linear:auto:auto:lr=0.02",
            "feature=pooled,loss=vkd,proj=orthogonal",
        )
    )
    optimizer, _ = optim.build_optimizer(args, student, 1)
    linear, orthogonal = optimizer.param_groups[-2:]
    assert (linear["lr"], linear["weight_decay"]) == (0.02, args.weight_decay)
    assert orthogonal["weight_decay"] == 0
    covered = {id(p) for group in optimizer.param_groups for p in group["params"]}
    assert covered == {id(p) for p in student.parameters()}
    student.projections["hidden_cos_1_1"].optimizer_options = {"rate": 1.0}
    with pytest.raises(UserError, match="rate"):
        optim.build_optimizer(args, student, 1)


def test_the_engine_trains_projections_and_clips_them_and_the_average_has_none() -> None:
    student, teacher, criterion, args = build(
        *matches("feature=pooled,loss=vkd,proj=orthogonal,weight=3", MATCH_ALL[0]),
        "--distillation-type",
        "hard",
        "--lr",
        "1",
    )
    ema = optim.build_ema(args, student.network)
    optimizer, _ = optim.build_optimizer(args, student, 1)
    before = student.projections["pooled_vkd_0_0"].weight.detach().clone()
    stats = train_one_epoch(
        student,
        criterion,
        [(IMAGES, LABELS)] * 3,
        optimizer,
        torch.device("cpu"),
        0,
        teacher=teacher,
        config=StepConfig(max_norm=1e-3, update_ema=partial(ema.update, student.network)),
    )
    projected = student.projections["pooled_vkd_0_0"].weight
    assert not torch.equal(projected, before)
    assert (projected.mT @ projected - torch.eye(12)).norm() < 1e-5
    assert {"pooled_vkd_0_0", "hidden_hidden_mse_2_3"} <= set(stats)
    assert set(ema.state_dict()) == set(student.network.state_dict())


@pytest.mark.parametrize(("distillation", "warns"), [(0.001, True), (0.5, False)])
def test_a_term_lost_beside_the_other_is_warned_of(distillation: float, warns: bool, caplog):
    objective.warn_about_small_terms({"base": 2.0, "distillation": distillation})
    assert ("batchmean" in caplog.text) == warns


def test_observed_outputs_pass_through_untouched_projections() -> None:
    student, *_ = build(*matches("feature=pooled,loss=vkd,proj=orthogonal"))
    observed = student(IMAGES)
    assert isinstance(observed, TappedOutput) and list(observed.states) == ["pooled_vkd_0_0"]
    assert "orthogonal" in PROJ_MAP and observed.states["pooled_vkd_0_0"][0].shape == (4, 18)


RESIZED = [
    f"layer_S=2,layer_T=3,feature=hidden,loss={loss},tokens=patch,resize={how}"
    for loss in ("hidden_mse,proj=linear", "cos,proj=orthogonal", "vkd,proj=tanh")
    for how in ("bilinear", "avg")
]
ATTENTION = [
    f"layer_S=1,layer_T=2,feature=attention,loss={loss}"
    for loss in ("attention_mse_sum,tokens=patch", "attention_ce_mean,tokens=patch")
]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("text", [*MATCH_ALL, *RESIZED, *ATTENTION])
def test_every_match_works_in_half_precision(text: str, dtype: torch.dtype) -> None:
    losses_of = {}
    patch = {"patch_size": 2} if "resize" in text else {}
    for amp_dtype in (torch.float32, dtype):
        teacher = vit_teacher(**patch)
        teacher.amp_dtype = None if amp_dtype == torch.float32 else amp_dtype
        torch.manual_seed(0)
        student, _, criterion, _ = build(
            "--distillation-type", "soft", *matches(text), teacher=teacher
        )
        with torch.autocast("cpu", amp_dtype, enabled=amp_dtype != torch.float32):
            outputs = student(IMAGES)
        loss = criterion(IMAGES, outputs, LABELS, teacher_outputs=teacher(IMAGES))
        assert loss.dtype == torch.float32
        loss.backward()
        trained = [p.grad for p in student.projections.parameters()]
        assert all(torch.isfinite(gradient).all() for gradient in trained)
        losses_of[amp_dtype] = float(loss.detach())
    assert losses_of[dtype] == pytest.approx(losses_of[torch.float32], rel=0.05)


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_matches_of_a_compiled_student_have_the_same_loss_and_gradient(backend: str) -> None:
    found = []
    for is_compiled in (False, True):
        torch.manual_seed(0)
        student, teacher, criterion, _ = build(
            "--distillation-type", "soft", "--ranking-kl-weight", "1", *matches(*MATCH_ALL)
        )
        if is_compiled:
            student.compile(backend=backend, dynamic=False)
        loss = loss_of(student.train(), teacher, criterion)
        loss.backward()
        found.append((loss.detach(), [p.grad for p in student.parameters()]))
    torch.testing.assert_close(found[0], found[1])


def test_an_adaptors_states_are_resized_from_and_to_a_square_grid() -> None:
    adaptor = AdaptorTaps(lambda images, output: {"logits": output, "hidden": []})
    tap = Tap("hidden", 0)
    assert adaptor.grid(tap, 16) == (4, 4)
    with pytest.raises(UserError, match="17 tokens have no square grid"):
        adaptor.grid(tap, 17)
