"""The teacher: frozen, fed what it was trained on, refused when it cannot teach."""

import re
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from torch import nn

import models
import options
from base import safe_load
from base.errors import UserError
from data.transforms import InputConfig
from distill.teacher import InputAdapter, Teacher, _weights_source, build_identity, build_teacher
from models.class_names import classes_of_file

SHIPPED = Path(__file__).resolve().parents[1] / "models/weights/resnet_pico_digits.safetensors"
HALF = InputConfig((32, 32), (0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
IMAGENET = InputConfig((48, 48), (0.485, 0.456, 0.406), (0.229, 0.224, 0.225))


def normalised(image: torch.Tensor, inputs: InputConfig) -> torch.Tensor:
    mean, std = torch.tensor(inputs.mean), torch.tensor(inputs.std)
    return (image - mean[:, None, None]) / std[:, None, None]


def test_the_adapter_turns_the_students_tensor_into_the_teachers() -> None:
    image = torch.rand(2, 3, 32, 32)
    small = InputConfig((32, 32), IMAGENET.mean, IMAGENET.std)
    adapted = InputAdapter(HALF, small)(normalised(image, HALF))
    torch.testing.assert_close(adapted, normalised(image, small))


def test_the_adapter_resizes_to_the_teachers_size() -> None:
    adapter = InputAdapter(HALF, IMAGENET)
    assert adapter(torch.randn(2, 3, 32, 32)).shape == (2, 3, 48, 48)
    assert "48x48" in adapter.describe()


def test_another_aspect_ratio_is_kept_where_the_teacher_takes_any_size() -> None:
    wide = InputConfig((32, 64), HALF.mean, HALF.std)
    images = torch.randn(1, 3, 32, 64)
    assert InputAdapter(wide, IMAGENET)(images).shape == (1, 3, 32, 64)
    assert InputAdapter(wide, IMAGENET, any_size=False)(images).shape == (1, 3, 48, 48)


def test_the_adapter_commutes_with_mixing() -> None:
    adapter = InputAdapter(HALF, IMAGENET)
    a, b = torch.randn(2, 1, 3, 32, 32)
    torch.testing.assert_close(
        adapter(0.3 * a + 0.7 * b), 0.3 * adapter(a) + 0.7 * adapter(b), atol=1e-5, rtol=1e-5
    )


class Noisy(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.head, self.drop = nn.BatchNorm2d(3), nn.Linear(3, 4), nn.Dropout(0.5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.drop(self.norm(x).mean((2, 3))))


def test_a_teacher_is_frozen_in_evaluation_mode_and_without_gradient() -> None:
    teacher = Teacher(Noisy(), InputAdapter(HALF, HALF)).train()
    images = torch.randn(5, 3, 32, 32, requires_grad=True)
    logits = teacher(images)
    assert not logits.requires_grad and not any(p.requires_grad for p in teacher.parameters())
    assert torch.equal(logits, teacher(images)), "no dropout"
    assert torch.equal(teacher.network.norm.running_mean, torch.zeros(3)), "no running statistics"


def test_a_teacher_under_autocast_still_gives_float32() -> None:
    adapter = InputAdapter(HALF, HALF)
    teacher = Teacher(Noisy(), adapter, amp_dtype=torch.bfloat16)
    assert teacher(torch.randn(2, 3, 32, 32)).dtype == torch.float32


def build(num_classes: int, *flags: str, kind: str = "hard") -> Teacher | None:
    args = options.parse_args(["--data-path", "x", "--distillation-type", kind, *flags]).args
    return build_teacher(args, num_classes, HALF, torch.device("cpu"))


def test_a_half_precision_teacher_is_channels_last_and_a_float32_one_is_unchanged() -> None:
    flags = [
        "--distillation-type",
        "hard",
        "--data-path",
        "x",
        "--teacher-model",
        "resnet_pico",
        "--teacher-path",
        str(SHIPPED),
    ]
    args = options.parse_args(flags).args
    images, cpu = torch.randn(64, 3, 32, 32), torch.device("cpu")
    exact = build_teacher(args, 10, HALF, cpu)
    light = build_teacher(args, 10, HALF, cpu, torch.bfloat16)
    network = models.create_model("resnet_pico", num_classes=10).eval()
    models.load_weights(network, str(SHIPPED))
    with torch.no_grad():
        assert torch.equal(exact(images), network(images))
    assert "bfloat16, channels last" in light.describe()
    assert light(images).dtype == torch.float32
    assert (light(images).argmax(1) == exact(images).argmax(1)).float().mean() > 0.9


@pytest.mark.parametrize("name", ["resnet_pico", "deit_pico_patch4_32"])
def test_a_teacher_of_ours_sees_what_it_was_trained_with(name: str, tmp_path: Path) -> None:
    network = models.create_model(name, num_classes=3, img_size=(64, 64))
    settings = {"model": name, "input_size": [64], "mean": [0.5, 0.5, 0.5], "std": [0.5, 0.5, 0.5]}
    torch.save({"model": network.state_dict(), "args": settings}, tmp_path / "teacher.pth")
    flags = ["--teacher-model", name, "--teacher-path", str(tmp_path / "teacher.pth")]
    teacher = build(3, *flags)
    assert teacher.adapter.size == (64, 64) and not teacher.adapter.renormalises  # HALF's too
    assert teacher(torch.randn(2, 3, 32, 32)).shape == (2, 3)


@pytest.mark.parametrize(
    "key, value",
    [
        ("input_size", "wide"),
        ("input_size", [0]),
        ("input_size", [True]),
        ("input_size", [10**9]),
        ("mean", [0.5]),
        ("mean", [0.5, 0.5, float("nan")]),
        ("std", [0.5, 0.0, 0.5]),
        ("std", torch.ones(3)),
    ],
)
def test_settings_that_are_none_are_refused_in_one_line(
    key: str, value: Any, tmp_path: Path
) -> None:
    network = models.create_model("resnet_pico", num_classes=3)
    settings = {"model": "resnet_pico", key: value}
    torch.save({"model": network.state_dict(), "args": settings}, tmp_path / "teacher.pth")
    with pytest.raises(UserError, match=f"its settings have {key}"):
        build(3, "--teacher-model", "resnet_pico", "--teacher-path", str(tmp_path / "teacher.pth"))


def test_a_compiled_teacher_is_so_in_training_alone_and_says_the_same() -> None:
    plain = Teacher(Noisy(), InputAdapter(HALF, IMAGENET))
    compiled = Teacher(plain.network, plain.adapter, backend="eager")
    images = torch.randn(2, 3, 32, 32)
    with torch.compiler.set_stance("fail_on_recompile"):
        assert torch.equal(compiled(images), plain(images))
        with pytest.raises(RuntimeError):
            compiled(images, (0, 0))
    assert torch.equal(compiled(images, (0, 0)), plain(images))
    assert list(compiled.state_dict()) == list(plain.state_dict())


def test_without_distillation_there_is_no_teacher() -> None:
    assert build(10, kind="none") is None


def test_the_shipped_teacher_loads_and_teaches() -> None:
    teacher = build(10, "--teacher-model", "resnet_pico", "--teacher-path", str(SHIPPED))
    assert teacher(torch.randn(2, 3, 32, 32)).shape == (2, 10)
    assert "resnet_pico" in teacher.describe()
    known = classes_of_file(str(SHIPPED), "resnet_pico")
    assert known is not None and known.names == tuple("0123456789")
    assert SHIPPED.stat().st_size < 400_000


@pytest.mark.parametrize("form", ["model", "bare"])
def test_a_vit_teacher_of_another_resolution_is_fed_at_its_own(form: str, tmp_path: Path) -> None:
    network = models.create_model("deit_pico_patch4_32", num_classes=3)
    weights = network.state_dict()
    torch.save({"model": weights} if form == "model" else weights, tmp_path / "t.pth")
    args = options.parse_args(
        [
            "--data-path",
            "x",
            "--distillation-type",
            "soft",
            "--teacher-model",
            "deit_pico_patch4_32",
            "--teacher-path",
            str(tmp_path / "t.pth"),
        ]
    ).args
    student = InputConfig((48, 64), IMAGENET.mean, IMAGENET.std)
    teacher = build_teacher(args, 3, student, torch.device("cpu"))
    assert teacher(torch.randn(2, 3, 48, 64)).shape == (2, 3)


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--teacher-path", "nowhere.pth"], ["nowhere.pth", "not there"]),
        (["--teacher-path", str(SHIPPED), "--teacher-model", "resnet_pica"], ["resnet_pico"]),
        (
            ["--teacher-path", str(SHIPPED), "--teacher-model", "resnet18"],
            ["looks like", "resnet18"],
        ),
        (
            ["--teacher-path", str(SHIPPED), "--teacher-model", "resnet_pico"],
            ["10 classes", "has 4", "train a teacher"],
        ),
        (["--teacher-model", "regnety_160"], ["1000 classes", "has 4", "train a teacher"]),
        (["--teacher-model", "resnet_pico"], ["10 classes"]),
    ],
)
def test_a_teacher_that_cannot_teach_is_one_line(flags: list[str], words: list[str]) -> None:
    with pytest.raises(UserError) as caught:
        build(4, *flags)
    for word in words:
        assert word in str(caught.value), str(caught.value)


def test_a_teacher_comes_from_a_timm_folder(tmp_path: Path) -> None:
    import json

    from safetensors.torch import load_file, save_file

    weights = {name: v.float() for name, v in load_file(SHIPPED).items()}
    save_file(weights, tmp_path / "model.safetensors")
    config = {
        "architecture": "resnet_pico",
        "num_classes": 10,
        "pretrained_cfg": {
            "input_size": [3, 48, 48],
            "mean": [0.1, 0.2, 0.3],
            "std": [1, 1, 1],
            "num_classes": 10,
            "classifier": "fc",
            "first_conv": "conv1.0",
        },
    }
    (tmp_path / "config.json").write_text(json.dumps(config))
    teacher = build(10, "--teacher-model", f"local-dir:{tmp_path}")
    assert teacher.adapter.size == (48, 48) and teacher.adapter.renormalises
    assert torch.equal(teacher.network.fc.bias, weights["fc.bias"])
    with pytest.raises(UserError, match="10 classes"):
        build(4, "--teacher-model", f"local-dir:{tmp_path}")


def test_deits_own_teacher_is_not_said_to_be_timms() -> None:
    assert _weights_source("regnety_160") == "regnety_160-a5fe301d.pth of DeiT's"
    assert _weights_source("resnet50") == "timm"


OWN_NETWORK = """
import torch
from timm.models import register_model


@register_model
def my_own_cnn(num_classes=10, **kwargs):
    layers = torch.nn.Conv2d(3, 8, 3), torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten()
    return torch.nn.Sequential(*layers, torch.nn.Linear(8, num_classes))
"""


OWN_WEIGHTS = """
import torch
from timm.models import register_model

@register_model
def cnn_with_weights(pretrained=False, num_classes=10, **options):
    network = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(3 * 32 * 32, num_classes))
    torch.nn.init.constant_(network[1].weight, 0.25 if pretrained else 0.0)
    network.num_classes = num_classes
    return network
"""


def test_a_registered_teacher_may_load_its_own_weights(tmp_path: Path) -> None:
    plugin = tmp_path / "weights.py"
    plugin.write_text(OWN_WEIGHTS)
    flags = ["--teacher-model", "cnn_with_weights", "--teacher-path", "", "--plugin", str(plugin)]
    args = options.parse_args(["--distillation-type", "hard", *flags]).args
    teacher = build_teacher(args, 10, HALF, torch.device("cpu"))
    assert (teacher.network[1].weight == 0.25).all() and "from weights.py" in teacher.describe()
    expected = f"its plugin's, network by {safe_load.fingerprint(str(plugin))}"
    assert build_identity(args) == [expected]


def test_a_plugin_brings_a_network_whose_code_is_remembered(tmp_path: Path) -> None:
    plugin, weights, other = tmp_path / "nets.py", tmp_path / "cnn.pth", tmp_path / "b/nets.py"
    other.parent.mkdir()
    other.write_text("")  # of the same name
    flags = [
        "--distillation-type",
        "hard",
        "--teacher-model",
        "my_own_cnn",
        "--teacher-path",
        str(weights),
        "--plugin",
        str(plugin),
        "--plugin",
        str(other),
    ]
    identities = []
    for code in (OWN_NETWORK, OWN_NETWORK, OWN_NETWORK + "# changed\n"):
        plugin.write_text(code)
        args = options.parse_args(flags).args
        torch.manual_seed(0)
        torch.save(timm.create_model("my_own_cnn").state_dict(), weights)
        teacher = build_teacher(args, 10, HALF, torch.device("cpu"))
        assert teacher(torch.randn(2, 3, 32, 32)).shape == (2, 10)
        identities += build_identity(args)
    assert identities[0] == identities[1] != identities[2]
    assert identities[0].startswith(safe_load.fingerprint(str(weights)))
    assert identities[2].endswith("network by " + safe_load.fingerprint(str(plugin)))
    assert models.plugins.source_of("resnet18") == models.plugins.source_of("resnet_pico") == ""


def test_a_teacher_of_another_size_is_read_with_teacher_input_size(tmp_path: Path) -> None:
    network = models.create_model("deit_pico_patch4_32", num_classes=10, img_size=(48, 48))
    path = tmp_path / "teacher.pth"
    torch.save({"model": network.state_dict()}, path)
    flags = ["--data-path", "x", "--distillation-type", "hard", "--teacher-path", str(path)]
    flags += ["--teacher-model", "deit_pico_patch4_32"]
    inputs = InputConfig((32, 32), (0.5,) * 3, (0.5,) * 3)
    cpu = torch.device("cpu")
    with pytest.raises(UserError) as caught:
        build_teacher(options.parse_args(flags).args, 10, inputs, cpu)
    advice = re.findall(r"set (--teacher-input-size) (\d+)", str(caught.value))
    assert " --input-size" not in str(caught.value)
    args = options.parse_args([*flags, *advice[0]]).args
    teacher = build_teacher(args, 10, inputs, cpu)
    assert teacher.adapter.size == (48, 48)
    assert teacher(torch.zeros(2, 3, 32, 32)).shape == (2, 10)
    args = options.parse_args([*flags, "--teacher-input-size", "48", "32"]).args
    with pytest.raises(UserError, match="one value for each of 1 teachers"):
        build_teacher(args, 10, inputs, cpu)


def test_a_teacher_file_without_classifier_gets_one_by_the_printed_advice(tmp_path: Path) -> None:
    weights = models.create_model("deit_pico_patch4_32", num_classes=0).state_dict()
    path = tmp_path / "teacher.pth"
    torch.save(weights, path)
    flags = ["--teacher-model", "deit_pico_patch4_32", "--teacher-path", str(path)]
    with pytest.raises(UserError, match="training it with --finetune") as caught:
        build(10, *flags)
    command = str(caught.value).partition("main.py ")[2].replace("...", "x").split()
    args = options.parse_args([*command, "--finetune", str(path)]).args
    student = models.build_student(args, 10, HALF)
    torch.save({"model": student.network.state_dict()}, path)
    assert build(10, *flags)(torch.zeros(2, 3, 32, 32)).shape == (2, 10)


def test_the_printed_teacher_command_parses_and_starts_from_published_weights() -> None:
    inputs = InputConfig((32, 32), (0.5,) * 3, (0.5,) * 3)
    args = options.parse_args(
        ["--data-path", "x", "--distillation-type", "hard", "--teacher-model", "resnet18"]
    ).args
    with pytest.raises(UserError, match="main.py --model resnet18 --pretrained") as caught:
        build_teacher(args, 10, inputs, torch.device("cpu"))
    command = caught.value.line().partition("main.py ")[2]
    assert options.parse_args(command.split()).args.pretrained
