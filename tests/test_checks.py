"""Before a run: sizes and costs without training, and what --check finds."""

from argparse import Namespace
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import models
import options
from base import distributed
from base.errors import UserError
from checks import dry_run
from checks.diagnose import teacher_problems
from checks.dry_run import network_size
from training import optim


def test_sizes_by_hand() -> None:
    size = network_size(
        lambda: torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(48, 7)), 4, 4
    )
    assert size.parameters == 48 * 7 + 7
    assert size.flops == 2 * 48 * 7 and size.kept_bytes == 48 * 4
    assert "0.00 M parameters" in size.describe()


def test_deit_small_has_the_papers_multiply_adds() -> None:
    size = network_size(lambda: models.create_model("deit_small_patch16_224"), 224, 224)
    assert size.flops / 2e9 == pytest.approx(4.6, abs=0.05)
    assert size.describe() == "22.05 M parameters, 4.60 GMACs an image"


def test_a_good_teacher_has_no_problem() -> None:
    labels = torch.arange(10).repeat(6)
    assert teacher_problems(torch.eye(10)[labels], labels, None) == []
    coin = teacher_problems(torch.eye(2)[torch.zeros(60, dtype=torch.long)], labels % 2, None)
    assert "Acc@1 is 50 % on 60" in coin[0] and "at least 75 %" in coin[0]


def test_another_label_order_is_distinguished_from_a_bad_teacher() -> None:
    labels = torch.arange(10).repeat(6)
    shifted = teacher_problems(torch.eye(10)[(labels + 1) % 10], labels, None)
    assert len(shifted) == 1 and "label order" in shifted[0]
    constant = teacher_problems(torch.eye(10)[torch.zeros(60, dtype=torch.long)], labels, None)
    assert "at least 30 %" in constant[0]
    few = teacher_problems(torch.eye(1000)[labels + 1], labels, 80.0)
    assert "at least 65 %" in few[0]


def planned(*flags: str) -> dict[str, str]:
    """Return the lines of a plan, behind their settings, by their first word."""
    args = options.parse_args(["--num_workers", "0", *flags]).args
    processes = distributed.init_processes("cpu")
    lines = dry_run.build_plan(args, processes, models.build_input_config(args), None)
    return dict(line.partition(": ")[::2] for line in lines if ": " in line)


def test_a_plan_begins_with_what_differs_from_the_defaults() -> None:
    args = options.parse_args(["--num_workers", "0", "--epochs", "7"]).args
    inputs = models.build_input_config(args)
    lines = dry_run.build_plan(args, distributed.init_processes("cpu"), inputs, None)
    head = lines[: next(i for i, line in enumerate(lines) if line.startswith("data: "))]
    assert head[0].startswith("settings that differ from the defaults")
    assert "  epochs: 7" in head and "  num_workers: 0" in head
    assert not any(line.startswith(("  momentum", "  seed")) for line in head)


def test_a_dry_run_shows_the_line_of_the_run_itself(run_inside) -> None:
    flags = [
        "--batch-size",
        "448",
        "--epochs",
        "1",
        "--warmup-epochs",
        "0",
        "--lr",
        "0.01",
        "--no-unscale-lr",
        "--output_dir",
        "",
    ]
    said = [line for line in run_inside(*flags).stdout.splitlines() if line.startswith("recipe: ")]
    found = planned(*flags)["recipe"]
    assert said == [f"recipe: {found}"]
    assert found == "1 epoch of 2 updates, effective batch 448, learning rate 0.00875"


def test_a_plan_warns_where_the_scaled_rate_is_below_the_lowest() -> None:
    flags = ["--batch-size", "64", "--no-unscale-lr", "--epochs", "9"]
    assert "1e-06 is below --min-lr 1e-05" in planned(*flags, "--lr", "8e-6")["WARNING"]
    assert "WARNING" not in planned(*flags, "--lr", "8e-5")  # just as low


@pytest.mark.parametrize(
    ("data", "words", "updates"),
    [
        ("IMNET", "ImageNet's 1281167 images and 1000 classes assumed", 1281024 // 64),
        ("CIFAR10", "CIFAR-10's 50000 images and 10 classes", 49920 // 64),
        ("CIFAR", "CIFAR-100's 50000 images and 100 classes", 49920 // 64),
        ("INAT", "iNaturalist 2018's 437513 images and 8142 classes", 437504 // 64),
        ("INAT19", "iNaturalist 2019's 265240 images and 1010 classes", 265216 // 64),
        ("PREPARED", "of unknown size, ImageNet's 1281167", 1281024 // 64),
    ],
)
def test_data_that_is_not_there_is_counted_by_its_published_size(
    data: str, words: str, updates: int
) -> None:
    found = planned("--data-set", data, "--data-path", "gone", "--model", "deit_pico_patch8_32")
    assert words in found["data"] and "gone" in found["data"]
    assert f" of {updates} updates," in found["recipe"]


def test_data_that_is_there_and_cannot_be_used_ends_a_plan_as_it_would_the_run(tmp_path) -> None:
    (tmp_path / "train" / "empty").mkdir(parents=True)
    with pytest.raises(UserError, match="without images"):
        planned("--data-path", str(tmp_path), "--model", "deit_pico_patch8_32")
    with pytest.raises(UserError, match="larger than the 897"):
        planned("--batch-size", "1000")


def test_the_planned_memory_is_that_of_the_student_as_it_trains() -> None:
    args = options.parse_args(["--model", "deit_tiny_patch16_224", "--drop-path", "0.1"]).args
    inputs = models.build_input_config(args)

    def student(**flags: bool) -> dry_run.PlannedNetwork:
        return dry_run._build_planned_student(Namespace(**vars(args) | flags), 10, inputs)

    plain, spared = student(), student(grad_checkpointing=True)
    frozen = student(attn_only=True)
    assert spared.size.kept_bytes < plain.size.kept_bytes / 5
    assert spared.size.kept_bytes > plain.size.kept_bytes / 12  # a block, and all inputs
    assert frozen.size.trained < frozen.size.parameters == plain.size.trained
    assert frozen.size.kept_bytes < plain.size.kept_bytes
    words = dry_run._build_memory(args, plain, [], None)
    assert f"{dry_run.amount(plain.size.kept_bytes * args.batch_size)} for the 64" in words
    assert plain.size.kept_bytes > 12 * 197 * 192 * 4 * 10  # q, k, v, MLP and more, each block


def test_a_plan_counts_the_views_of_a_cache_in_units_that_show_something() -> None:
    flags = ["--distillation-type", "hard", "--teacher-cache-views", "2", "--teacher-cache-topk"]
    found = planned(*flags, "hard")["cache"]
    assert (
        found == "77.1 KiB with all, 5.3 KiB with hard (--teacher-cache-topk); 1794 rows, 2 views"
    )
    assert "with all, 28.0 KiB with 3, " in planned(*flags, "3")["cache"]
    assert dry_run.amount(3 * 2**40) == "3.0 TiB" and dry_run.amount(5) == "5.0 bytes"


def test_a_plan_sees_every_teacher_at_the_size_it_was_trained_at(tmp_path: Path) -> None:
    settings = {"model": "resnet_pico", "input_size": [40]}
    torch.save({"model": {}, "args": settings}, tmp_path / "t.pth")
    args = options.parse_args(
        [
            "--distillation-type",
            "soft",
            "--teacher-model",
            "resnet_pico",
            "--teacher-path",
            str(tmp_path / "t.pth"),
            "--teacher-model",
            "deit_pico_patch8_32",
            "--teacher-path",
            "x",
        ]
    ).args
    found = dry_run._build_planned_teachers(args, 10)
    assert [teacher.side for teacher in found] == [(40, 40), (32, 32)]
    assert dry_run._build_planned_teachers(options.parse_args([]).args, 10) == []


@pytest.mark.slow
def test_a_dry_run_says_what_it_would_cost_and_writes_nothing(run_inside, tmp_path: Path) -> None:
    out = tmp_path / "out"
    result = run_inside("--dry-run", "--distillation-type", "hard", "--output_dir", str(out))
    assert result.returncode == 0, result.stderr
    for word in (
        "  model: deit_pico",
        "student: ",
        "teacher: resnet_pico",
        "GMACs",
        "memory: about",
        "cache: 1.1 MiB with all",
        "26910 rows",
        "images/s",
        "from a full cache of the teacher",
        "30 epochs",
    ):
        assert word in result.stdout, word
    assert not out.exists()


@pytest.mark.slow
def test_a_dry_run_of_a_recipe_needs_no_data_and_no_weights(run_inside) -> None:
    result = run_inside(
        "--recipe",
        "deit_base_384",
        "--data-path",
        "nowhere",
        "--dry-run",
        "--batch-size",
        "8",
        "--model",
        "deit_pico_patch8_32",
        "--input-size",
        "32",
        "--finetune",
        "https://nowhere.invalid/x.pth",
    )
    assert result.returncode == 0, result.stderr
    assert "--model deit_pico_patch8_32 instead of deit_base_patch16_384" in result.stdout
    assert "recipe deit_base_384: 83.1 ± 0.3% expected (DeiT" in result.stdout
    assert "learning rate 5e-06" in result.stdout and "WARNING" not in result.stdout


@pytest.mark.slow
def test_check_finds_few_patches_and_a_teacher_with_another_order_is_matched(
    run_inside, image_folder: Path, tmp_path: Path
) -> None:
    result = run_inside("--check", "--distillation-type", "hard", "--input-size", "24")
    assert result.returncode == 0, result.stderr
    assert "into 9 patches only" in result.stdout
    teacher = models.create_model("resnet_pico", num_classes=2)
    torch.save({"model": teacher.state_dict(), "classes": ["two", "one"]}, tmp_path / "t.pth")
    result = run_inside(
        "--check",
        "--distillation-type",
        "hard",
        "--data-path",
        str(image_folder),
        "--model",
        "deit_pico_distilled_patch4_32",
        "--teacher-model",
        "resnet_pico",
        "--teacher-path",
        str(tmp_path / "t.pth"),
        "--batch-size",
        "4",
        "--num_workers",
        "0",
    )
    assert result.returncode == 0, result.stderr
    assert "2 of its 2 outputs, in the order of the data's classes" in result.stdout
    assert "patches only" not in result.stdout


@pytest.mark.slow
def test_check_prints_the_accuracy_and_the_problems_of_every_teacher(
    run_inside, tmp_path: Path
) -> None:
    flags = [
        "--check",
        "--distillation-type",
        "soft",
        "--teacher-model",
        "resnet_pico",
        "--teacher-path",
        str(
            options.QUICK_START.parents[1] / "models" / "weights" / "resnet_pico_digits.safetensors"
        ),
    ]
    other = models.create_model("deit_pico_patch8_32", num_classes=10, img_size=(32, 32))
    torch.save({"model": other.state_dict()}, tmp_path / "t.pth")
    flags += ["--teacher-model", "deit_pico_patch8_32", "--teacher-path", str(tmp_path / "t.pth")]
    result = run_inside(*flags)
    assert result.returncode == 0, result.stderr
    found = [line for line in result.stdout.splitlines() if line.startswith("check: ")]
    assert len(found) == 3 and all("128 images, input 32x32" in line for line in found[:2])
    assert found[0].startswith("check: teacher resnet_pico: Acc@1 100.0 on a sample")
    assert found[2].startswith("check: teacher deit_pico_patch8_32: Acc@1 is ")
    match = "feature=hidden,loss=cos,layer_S=1,layer_T=1,tokens=patch,teacher=1"
    shares = ["--teacher-weight", "1", "--teacher-weight", "0"]
    looked = run_inside(*flags, *shares, "--match", match)
    assert "no problem found in the student and the teacher" in looked.stdout, (
        looked.stdout + looked.stderr
    )


@pytest.mark.slow
def test_check_says_why_it_has_not_checked_the_teacher(run_inside, tmp_path: Path) -> None:
    alone = run_inside("--check")
    assert "check: no problem found in the student; there is no teacher" in alone.stdout, (
        alone.stderr
    )
    flags = [
        "--distillation-type",
        "hard",
        "--epochs",
        "1",
        "--warmup-epochs",
        "0",
        "--output_dir",
        "",
        "--teacher-cache",
        str(tmp_path / "cache"),
    ]
    wrong = tmp_path / "wrong.pth"
    torch.save({"model": models.create_model("resnet_pico", num_classes=10).state_dict()}, wrong)
    asked = run_inside("--check", *flags, "--teacher-path", str(wrong))
    assert "check: teacher: " in asked.stdout, asked.stdout + asked.stderr
    assert (
        "teacher: accuracy on the evaluation set, input 32x32"
        in run_inside(*flags, "--teacher-path", str(wrong)).stdout
    )
    again = run_inside("--check", *flags, "--teacher-path", str(wrong))
    assert "the teacher is not checked, because all its logits are in the cache" in again.stdout


def test_a_plan_uses_the_given_input_size_of_the_teacher() -> None:
    flags = ("--distillation-type", "hard", "--teacher-input-size")
    assert planned(*flags, "64")["teacher"].endswith("of 64x64")
    with pytest.raises(UserError, match="give one value for each of 1 teachers"):
        planned(*flags, "64", "32")


def test_a_plan_warns_about_few_updates_at_a_low_learning_rate() -> None:
    """480 images, 300 epochs and DeiT's learning rate for a batch of 64: 2,100 updates at 6e-5."""
    args = options.parse_args(["--epochs", "300"]).args
    low = optim.BatchPlan(epochs=300, updates=7, batch=64, lr=6.25e-5)
    assert (
        "2100 updates at a learning rate of 6.25e-05 are too few"
        in optim.build_findings(args, low)[0]
    )
    assert optim.build_findings(args, replace(low, lr=1e-3)) == []
    assert "--lr" in planned("--epochs", "1", "--lr", "1e-5")["check"]
    args = options.parse_args(["--epochs", "300", "--finetune", "weights.pth"]).args
    assert optim.build_findings(args, low) == [], "trained weights may need few updates"
