"""--recipe auto: when it applies, what it chooses, and what it prints."""

from argparse import Namespace
from pathlib import Path

import pytest

import options
from base import flag_table
from models import hub
from training import auto_recipe
from training.auto_recipe import TrainingSet

DEIT = {"lr": 5e-4, "aa": "rand-m9-mstd0.5-inc1", "mixup": 0.8, "model_ema": True}
SMALL = "--model deit_pico_distilled_patch4_32"


def parse(folder: Path, flags: str) -> options.Options:
    return options.parse_args(["--data-path", str(folder), *flags.split()])


def uses_defaults(found: options.Options) -> bool:
    return all(getattr(found.args, name) == value for name, value in DEIT.items())


@pytest.fixture
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hub, "unreachable_reason", lambda url: "no network")


@pytest.mark.parametrize(
    "flags",
    [
        "",
        "--epochs 3",
        "--minutes 2",
        "--batch-size 8 --grad-accum-steps 2",
        "--distillation-type hard --distillation-alpha 0.3",
        "--output-dir there --seed 4",
    ],
)
def test_small_data_without_training_flags_gets_the_recipe(image_folder: Path, flags: str) -> None:
    found = parse(image_folder, f"{SMALL} {flags}")
    assert found.about[0].startswith("recipe auto: 24 images: ")
    assert found.args.recipe == "auto"
    assert not uses_defaults(found)
    assert found.args.unscale_lr


@pytest.mark.parametrize("name", sorted(auto_recipe.TRAINING_FLAGS))
def test_each_training_flag_keeps_the_defaults(image_folder: Path, name: str) -> None:
    flag = flag_table.BY_DEST[name]
    value = "" if flag.kind is bool else str(flag.choices[0] if flag.choices else flag.default)
    value = {"opt_kwargs": "fused=False", "opt_betas": "0.9 0.99"}.get(
        name, value if value not in ("None", "[]") else "0.9"
    )
    about = parse(image_folder, f"{SMALL} {flag.name} {value}").about
    assert about == (f"recipe: DeiT's defaults beside {flag.name}",)


def test_few_epochs_have_no_mixing_and_less_warm_up(image_folder: Path) -> None:
    many, few = (parse(image_folder, f"{SMALL} --epochs {epochs}").args for epochs in (300, 4))
    assert (many.mixup, many.cutmix, many.warmup_epochs) == (0.8, 1.0, 2)
    assert (few.mixup, few.cutmix, few.warmup_epochs) == (0.0, 0.0, 2)


@pytest.mark.parametrize(
    ("flags", "size"),
    [
        ("--model tf_efficientnet_lite0 --pretrained", [112]),  # the images have 32 pixels
        ("--model tf_efficientnet_lite0 --finetune weights.pth", [112]),
        ("--model tf_efficientnet_lite0 --pretrained --input-size 224", [224]),
        ("--model tf_efficientnet_lite0", None),  # from scratch: the model's own
        ("--model deit_tiny_distilled_patch16_224 --pretrained", None),
        ("--model resnet_pico --finetune weights.pth", None),  # its own is 32
    ],
)
def test_a_trained_cnn_gets_a_smaller_input_for_small_images(
    image_folder: Path, flags: str, size: list | None
) -> None:
    found = parse(image_folder, flags)
    assert found.args.input_size == size
    line = "input: 112 pixels, because the images have 32"
    assert (line in found.about) == (size == [112])


def test_a_trained_cnn_keeps_its_input_for_large_images() -> None:
    args = Namespace(model="tf_efficientnet_lite0", input_size=None, finetune="", pretrained=True)
    assert auto_recipe.build_input_flags(args, TrainingSet(480, 65)) == {}
    assert auto_recipe.build_input_flags(args, TrainingSet(480, 64)) == {"input_size": [112]}


@pytest.mark.parametrize("flags", ["--lr 1e-3", "--recipe auto --lr 1e-3"])
def test_the_saved_recipe_is_the_one_that_applies(image_folder: Path, flags: str) -> None:
    assert parse(image_folder, SMALL).args.recipe == "auto"
    assert parse(image_folder, f"{SMALL} {flags}").args.recipe == "none"
    assert options.parse_args([]).args.recipe == "none"  # the quick start has its own settings


def test_the_groups_hold_what_they_say() -> None:
    assert {"lr", "opt", "sched", "aa", "mixup", "drop_path", "smoothing"} <= (
        auto_recipe.TRAINING_FLAGS
    )
    others = {"model", "finetune", "epochs", "minutes", "batch_size", "teacher_model", "data_path"}
    assert not others & auto_recipe.TRAINING_FLAGS


@pytest.mark.parametrize("flags", ["--recipe none", "--eval"])
def test_the_recipe_can_be_turned_off(image_folder: Path, flags: str) -> None:
    found = parse(image_folder, f"{SMALL} {flags}")
    assert uses_defaults(found)
    assert not found.about


def test_published_recipes_and_the_quick_start_stay(image_folder: Path) -> None:
    assert parse(image_folder, "--recipe deit_tiny_none").args.aa == DEIT["aa"]
    assert options.parse_args(["--distillation-type", "hard"]).args.lr == 0.002


def test_large_data_keep_the_defaults(image_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(auto_recipe, "MOST_IMAGES", 24)
    found = parse(image_folder, SMALL)
    assert uses_defaults(found)
    assert found.about == ("recipe: DeiT's defaults, for 24 images or more",)


def test_missing_data_are_left_to_the_loaders(tmp_path: Path) -> None:
    assert uses_defaults(parse(tmp_path / "nowhere", SMALL))


@pytest.mark.usefixtures("no_network")
def test_a_small_student_is_chosen_without_network(image_folder: Path) -> None:
    found = parse(image_folder, "")
    assert found.args.model == "deit_pico_distilled_patch4_32"
    assert not found.args.pretrained
    assert "no network" in found.about[1]
    assert auto_recipe.choose_student(TrainingSet(200, 256), 2)[0] == {
        "model": "deit_pico_distilled_patch8_32",
        "input_size": [64],
    }


def test_published_weights_are_chosen_with_a_network(
    image_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hub, "unreachable_reason", lambda url: "")
    found = parse(image_folder, "--minutes 2 --input-size 96")
    assert found.args.model == auto_recipe.PUBLISHED
    assert found.args.pretrained
    assert found.args.input_size == [96]
    assert found.args.lr == 2e-4


def test_cnns_and_transformers_are_told_apart() -> None:
    assert auto_recipe.is_transformer("deit_tiny_patch16_224")
    assert auto_recipe.is_transformer("deit_pico_distilled_patch4_32")
    assert not auto_recipe.is_transformer("tf_efficientnet_lite0")


@pytest.mark.parametrize(
    ("model", "starts_trained", "lr"),
    [
        ("deit_pico_distilled_patch4_32", False, 2e-3),
        ("deit_tiny_patch16_224", False, 6.7e-4),  # 2e-3 * 64 / 192
        ("deit_base_patch16_224.fb_in1k", False, 2e-4),  # 2e-3 * 64 / 768 is less
        ("vit_small_patch16_224", False, 5e-4),
        ("deit_tiny_patch16_224", True, 2e-4),
        ("resnet_pico", False, 1e-3),
        ("tf_efficientnet_lite0", True, 1e-3),
    ],
)
def test_the_learning_rate_suits_the_model(model: str, starts_trained: bool, lr: float) -> None:
    assert auto_recipe.choose_lr(model, starts_trained=starts_trained) == pytest.approx(lr)
