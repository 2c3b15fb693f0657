"""The programs as a user starts them: whole runs on the embedded and on small real images."""

import json
import re
import shutil
from pathlib import Path

import pytest
import torch

import main
import models

ROOT = Path(__file__).resolve().parents[1]
TINY = [
    "--model",
    "deit_pico_distilled_patch4_32",
    "--batch-size",
    "4",
    "--epochs",
    "2",
    "--num_workers",
    "0",
    "--warmup-epochs",
    "0",
    "--log-interval",
    "1",
]

pytestmark = pytest.mark.slow


def lines(text: str) -> list[str]:
    return [line for line in text.splitlines() if line.strip()]


def assert_one_line(result, *words: str) -> None:
    """Exit code 2, one line on stderr, no traceback, and the words that help."""
    assert result.returncode == 2, result.stdout + result.stderr
    assert "Traceback" not in result.stderr + result.stdout
    errors = [line for line in lines(result.stderr) if line.startswith("error:")]
    assert len(errors) == 1, result.stderr
    for word in words:
        assert word in errors[0], errors[0]


def test_the_quick_start_distils_on_embedded_images(run_main, tmp_path: Path) -> None:
    result = run_main(
        "--distillation-type", "hard", "--epochs", "1", "--output_dir", str(tmp_path / "out")
    )
    assert result.returncode == 0, result.stderr
    first = lines(result.stdout)[1:4]
    assert first[0].startswith("data: ") and "digits" in first[0]
    assert first[1].startswith("student: deit_pico") and first[2].startswith("teacher: resnet_pico")
    assert "eta" in result.stdout.lower() and "* Acc@1" in result.stdout
    assert re.search(r"Accuracy of the network on the 600 test images: [\d.]+%", result.stdout)
    assert "Max accuracy:" in result.stdout
    record = json.loads((tmp_path / "out" / "log.txt").read_text())
    assert {
        "train_lr",
        "train_loss",
        "test_loss",
        "test_acc1",
        "test_acc5",
        "epoch",
        "n_parameters",
    } <= set(record)
    saved = torch.load(tmp_path / "out" / "checkpoint.pth", weights_only=True)
    assert {"model", "optimizer", "lr_scheduler", "epoch", "model_ema", "args"} <= set(saved)
    assert not any("teacher" in key for key in saved["model"])
    assert (tmp_path / "out" / "best_checkpoint.pth").exists()


@pytest.mark.parametrize("kind", ["none", "soft", "hard"])
def test_a_folder_of_images_trains_resumes_and_evaluates(
    kind: str, run_inside, image_folder: Path, tmp_path: Path
) -> None:
    teacher = ["--model", "resnet_pico", "--epochs", "1", "--output_dir", str(tmp_path / "teacher")]
    base = [*TINY, "--data-path", str(image_folder), "--output_dir", str(tmp_path / "out")]
    if kind != "none":
        made = run_inside(*base, *teacher)
        assert made.returncode == 0, made.stderr
        base += [
            "--distillation-type",
            kind,
            "--teacher-model",
            "resnet_pico",
            "--teacher-path",
            str(tmp_path / "teacher" / "checkpoint.pth"),
        ]
    once = run_inside(*base, "--epochs", "1")
    assert once.returncode == 0, once.stderr
    again = run_inside(*base, "--resume", str(tmp_path / "out" / "checkpoint.pth"))
    assert again.returncode == 0, again.stderr
    epochs = [json.loads(line)["epoch"] for line in (tmp_path / "out" / "log.txt").open()]
    assert epochs == [0, 1]
    evaluated = run_inside("--eval", *base, "--resume", str(tmp_path / "out" / "checkpoint.pth"))
    assert evaluated.returncode == 0, evaluated.stderr
    assert "weights:" in evaluated.stdout and "model_ema" in evaluated.stdout
    assert "Accuracy of the network on the 12 test images" in evaluated.stdout


def test_the_same_seed_gives_the_same_weights_whatever_the_workers(
    run_inside, image_folder: Path, tmp_path: Path
) -> None:
    base = [*TINY, "--data-path", str(image_folder), "--drop-path", "0.2"]
    saved = []
    for workers in ("0", "2"):
        folder = tmp_path / workers
        assert (
            run_inside(*base, "--output_dir", str(folder), "--num_workers", workers).returncode == 0
        )
        saved.append(torch.load(folder / "checkpoint.pth", weights_only=True))
    for key in ("model", "model_ema"):
        for name, value in saved[0][key].items():
            assert torch.equal(value, saved[1][key][name]), name


def test_evaluation_of_a_checkpoint_that_is_not_there_is_one_line(
    run_inside, image_folder: Path, tmp_path: Path
) -> None:
    flags = ["--eval", *TINY, "--data-path", str(image_folder), "--output_dir", str(tmp_path)]
    assert_one_line(run_inside(*flags, "--resume", "auto"), "no checkpoint to evaluate")


def test_evaluation_needs_no_train_folder(run_inside, image_folder: Path, tmp_path: Path) -> None:
    shutil.copytree(image_folder / "val", tmp_path / "data" / "val")
    result = run_inside("--eval", *TINY, "--data-path", str(tmp_path / "data"))
    assert result.returncode == 0, result.stderr
    assert "random weights" in result.stdout and "crop" in result.stdout


def test_finetuning_takes_another_class_count_resolution_and_a_teacher(
    run_inside, image_folder: Path, tmp_path: Path
) -> None:
    digits = models.create_model("deit_pico_distilled_patch4_32", num_classes=10)
    torch.save({"model": digits.state_dict()}, tmp_path / "digits.pth")
    result = run_inside(
        *TINY,
        "--data-path",
        str(image_folder),
        "--epochs",
        "1",
        "--input-size",
        "32",
        "48",
        "--finetune",
        str(tmp_path / "digits.pth"),
        "--lr",
        "1e-4",
        "--attn-only",
    )
    assert result.returncode == 0, result.stderr
    assert "1 resampled (pos_embed)" in result.stdout and "of them train" in result.stdout


def test_cosub_bce_and_three_augment_train(run_inside, image_folder: Path) -> None:
    base = [*TINY, "--data-path", str(image_folder), "--epochs", "1"]
    for flags in (
        ["--cosub", "--model", "deit_pico_patch4_32"],
        ["--bce-loss", "--ThreeAugment", "--src", "--smoothing", "0"],
        ["--bce-loss", "--mixup", "0", "--cutmix", "0"],
        [
            "--no-train-mode",
            "--no-model-ema",
            "--layer-decay",
            "0.7",
            "--no-sched-on-updates",
            "--no-repeated-aug",
            "--amp",
            "bf16",
            "--grad-accum-steps",
            "2",
            "--clip-grad",
            "0",
        ],
    ):
        result = run_inside(*base, *flags)
        assert result.returncode == 0, (flags, result.stderr)


def bad_image(folder: Path) -> Path:
    path = folder / "train" / "one" / "05.png"
    path.write_bytes(b"not an image")
    return path


@pytest.mark.parametrize(
    ("case", "words"),
    [
        ("missing folder", ["not there"]),
        ("empty folder", ["data"]),
        ("class without images", ["three"]),
        ("lists differ", ["three"]),
        ("unknown model", ["deit_pico_distilled_patch4_32"]),
        ("batch too large", ["batch", "24"]),
        ("unreadable checkpoint", ["bad.pth"]),
        ("missing teacher", ["nowhere.pth"]),
        ("bad image", ["05.png"]),
        ("teacher of other classes", ["10", "2"]),
        ("teacher of other architecture", ["resnet_pico"]),
        ("soft on one head", ["distilled"]),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(
    case: str, words: list[str], run_inside, image_folder: Path, tmp_path: Path
) -> None:
    data = tmp_path / "data"
    shutil.copytree(image_folder, data)
    flags = [*TINY, "--data-path", str(data)]
    shipped = str(ROOT / "models" / "weights" / "resnet_pico_digits.safetensors")
    if case == "missing folder":
        flags += ["--data-path", str(tmp_path / "nowhere")]
    elif case == "empty folder":
        shutil.rmtree(data)
        (data / "train").mkdir(parents=True)
        (data / "val").mkdir()
    elif case == "class without images":
        for split in ("train", "val"):
            (data / split / "three").mkdir()
            (data / split / "three" / "notes.txt").write_text("no image")
    elif case == "lists differ":
        shutil.copytree(data / "val" / "two", data / "val" / "three")
    elif case == "unknown model":
        flags += ["--model", "deit_pico_destilled_patch4_32"]
    elif case == "batch too large":
        flags += ["--batch-size", "500"]
    elif case == "unreadable checkpoint":
        (tmp_path / "bad.pth").write_bytes(b"\x80\x02nonsense")
        flags += ["--resume", str(tmp_path / "bad.pth")]
    elif case == "missing teacher":
        flags += ["--distillation-type", "hard", "--teacher-path", str(tmp_path / "nowhere.pth")]
    elif case == "bad image":
        bad_image(data)
        flags += ["--no-repeated-aug"]  # so that every image comes in the first epoch
    elif case == "teacher of other classes":
        flags += [
            "--distillation-type",
            "hard",
            "--teacher-model",
            "resnet_pico",
            "--teacher-path",
            shipped,
        ]
    elif case == "teacher of other architecture":
        flags += [
            "--distillation-type",
            "hard",
            "--teacher-model",
            "resnet18",
            "--teacher-path",
            shipped,
        ]
    elif case == "soft on one head":
        flags += [
            "--distillation-type",
            "soft",
            "--model",
            "deit_pico_patch4_32",
            "--distillation-head",
            "dist",
        ]
    assert_one_line(run_inside(*flags), *words)


def test_a_bad_image_can_be_skipped_and_is_counted(
    run_inside, image_folder: Path, tmp_path: Path
) -> None:
    data = tmp_path / "data"
    shutil.copytree(image_folder, data)
    bad_image(data)
    result = run_inside(
        *TINY,
        "--data-path",
        str(data),
        "--on-bad-image",
        "skip",
        "--num_workers",
        "1",
        "--epochs",
        "1",
        "--no-repeated-aug",
    )
    assert result.returncode == 0, result.stderr
    assert re.search(r"\d+ unreadable images? ", result.stdout)


def test_an_odd_batch_mixes(run_inside, image_folder: Path) -> None:
    result = run_inside(*TINY, "--data-path", str(image_folder), "--batch-size", "5")
    assert result.returncode == 0, result.stderr


def test_two_processes_of_batch_b_lose_what_one_of_batch_2b_loses(run_main, tmp_path: Path) -> None:
    base = [
        "--distillation-type",
        "hard",
        "--epochs",
        "2",
        "--mixup",
        "0",
        "--cutmix",
        "0",
        "--drop-path",
        "0",
        "--log-interval",
        "1",
        "--no-teacher-check",
    ]
    one = run_main(*base, "--batch-size", "64", "--output_dir", str(tmp_path / "one"))
    two = run_main(*base, "--batch-size", "32", "--output_dir", str(tmp_path / "two"), processes=2)
    assert one.returncode == 0, one.stderr
    assert two.returncode == 0, two.stderr
    each = [
        [float(loss) for loss in re.findall(r"Epoch: .* loss ([\d.]+) .* images/s", run.stdout)]
        for run in (one, two)
    ]
    assert len(each[0]) >= 20 and each[0] == pytest.approx(each[1], abs=2e-4)
    for name in ("train_loss", "test_loss", "test_acc1"):
        values = [
            [json.loads(line)[name] for line in (tmp_path / which / "log.txt").open()]
            for which in ("one", "two")
        ]
        assert values[0] == pytest.approx(values[1], rel=1e-4), name


def test_an_error_that_one_of_two_processes_meets_is_one_line(
    run_torchrun, image_folder: Path, tmp_path: Path
) -> None:
    shutil.copytree(image_folder, tmp_path / "data")
    bad_image(tmp_path / "data")
    result = run_torchrun(2, *TINY, "--data-path", str(tmp_path / "data"), "--no-repeated-aug")
    assert result.returncode != 0
    said, _, launcher = result.stderr.partition("torch/distributed/elastic")
    assert len([x for x in lines(result.stderr) if x.startswith("error:")]) == 1, result.stderr
    assert "Traceback" not in said and 'main.py", line' not in launcher, result.stderr


def test_the_published_cnn_scores_its_number_in_two_processes(
    run_main, imagenet_sample: Path, shared_data: Path
) -> None:
    """tests/system has the same in one process."""
    flags = [
        "--eval",
        "--model",
        "tf_efficientnet_lite0",
        "--data-path",
        str(imagenet_sample),
        "--resume",
        str(shared_data / "tf_efficientnet_lite0_in1k.safetensors"),
        "--num_workers",
        "1",
    ]
    result = run_main(*flags, processes=2)
    assert result.returncode == 0, result.stderr
    assert "* Acc@1 87.300 Acc@5 96.900" in result.stdout
    assert "on the 1000 test images: 87.3%" in result.stdout


def test_a_run_in_the_folder_of_another_moves_that_aside(
    run_inside, image_folder: Path, tmp_path: Path
) -> None:
    base = [*TINY, "--data-path", str(image_folder), "--epochs", "1", "--output_dir"]
    for _ in range(2):
        result = run_inside(*base, str(tmp_path / "out"))
        assert result.returncode == 0, result.stderr
    assert "previous-1" in result.stderr
    assert (tmp_path / "out" / "previous-1" / "checkpoint.pth").exists()
    assert (tmp_path / "out" / "checkpoint.pth").exists()


def test_an_output_folder_that_cannot_be_made_is_found_first(run_inside, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    result = run_inside(*TINY, "--output_dir", str(tmp_path / "file" / "out"))
    assert_one_line(result, "--output_dir", "cannot be written")
    assert not result.stdout


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (
            "[/a/gloo/transport/tcp/pair.cc:561] Connection closed by peer. This is typically "
            "caused by a crash",
            "error: a process of this run has died or does not respond (Connection closed by "
            "peer); continue with --resume auto; if one is only slow, raise --dist-timeout\n",
        ),
        (
            "DataLoader worker (pid 7) is killed",
            "error: a DataLoader worker has died (DataLoader worker (pid 7) is killed); was the "
            "memory full? Use fewer --num-workers; continue with --resume auto\n",
        ),
    ],
)
def test_a_process_that_is_gone_is_one_line(
    words: str, line: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    def fail(*_: object) -> None:
        raise RuntimeError(words)

    monkeypatch.setattr(main, "main", fail)
    assert main.run([]) == 1
    assert capsys.readouterr().err == line


def test_other_faults_keep_their_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(main, "main", lambda *_: torch.ones(2) @ torch.ones(3))
    with pytest.raises(RuntimeError, match="size"):
        main.run([])
