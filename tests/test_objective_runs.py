"""Whole runs with matches: two processes, a kill and a resume, and one line for bad input."""

import time
from pathlib import Path

import pytest
import torch
from programs import start

import matching

ROOT = Path(__file__).resolve().parents[1]
QUICK = [
    "--model",
    "deit_pico_distilled_patch4_32",
    "--batch-size",
    "64",
    "--no-teacher-check",
    "--warmup-epochs",
    "0",
    "--num-workers",
    "0",
]
VIT_MATCHES = [
    "layer_S=2,layer_T=3,feature=hidden,loss=hidden_mse,proj=dumped,tokens=patch",
    "layer_S=1,layer_T=2,feature=hidden,loss=cos,proj=dumped,tokens=patch",
    "layer_S=-1,layer_T=-1,feature=hidden,loss=pkd,proj=dumped",
    "layer_S=0+2,layer_T=0+3,feature=hidden,loss=fsp,proj=dumped,tokens=patch",
    "layer_S=0+2,layer_T=0+3,feature=hidden,loss=nst,tokens=patch",
    "layer_S=1,layer_T=2,feature=attention,loss=attention_mse,tokens=patch",
]
CNN_MATCHES = [
    "layer_S=4,layer_T=-1,feature=hidden,loss=hidden_mse,proj=dumped,tokens=patch,resize=avg",
    "layer_S=0+4,layer_T=0+1,feature=hidden,loss=fsp,proj=dumped",
    "feature=pooled,loss=vkd,proj=orthogonal",
]
# Every process writes its projections when it ends.
PLUGIN = """
import atexit, os, pathlib, torch
from matching import PROJ_MAP

made = []
def dump():
    path = pathlib.Path(__file__).with_name(f"rank{os.environ['RANK']}.pt")
    torch.save([module.state_dict() for module in made], path)
def dumped(dim_S, dim_T):
    made.append(PROJ_MAP["linear"](dim_S, dim_T))
    return made[-1]
PROJ_MAP["dumped"] = dumped
atexit.register(dump)
"""

pytestmark = pytest.mark.slow


def matches(texts: list[str]) -> list[str]:
    return [word for text in texts for word in ("--match", text)]


@pytest.fixture(scope="module")
def vit_teacher(run_main, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    folder = tmp_path_factory.mktemp("teacher")
    made = run_main(
        *QUICK, "--model", "deit_pico_patch4_32", "--epochs", "1", "--output_dir", str(folder)
    )
    assert made.returncode == 0, made.stderr
    return [
        "--teacher-model",
        "deit_pico_patch4_32",
        "--teacher-path",
        str(folder / "checkpoint.pth"),
    ]


@pytest.mark.parametrize("kind", ["vit", "cnn"])
def test_two_processes_keep_the_same_projections(
    kind: str, run_main, vit_teacher: list[str], tmp_path: Path
) -> None:
    (tmp_path / "plugin.py").write_text(PLUGIN)
    flags = [
        "--plugin",
        str(tmp_path / "plugin.py"),
        "--distillation-type",
        "hard",
        "--ranking-kl-weight",
        "1",
        "--ranking-gather",
        "--clip-grad",
        "1",
        "--epochs",
        "1",
        "--output_dir",
        str(tmp_path / "out"),
    ]
    flags += [*vit_teacher, *matches(VIT_MATCHES)] if kind == "vit" else matches(CNN_MATCHES)
    result = run_main(*QUICK, *flags, processes=2)
    assert result.returncode == 0, result.stderr
    ranks = [torch.load(tmp_path / f"rank{rank}.pt") for rank in (0, 1)]
    saved = torch.load(tmp_path / "out" / "checkpoint.pth", weights_only=True)
    assert len(ranks[0]) == (4 if kind == "vit" else 2)
    for first, second in zip(*ranks):
        assert first["weight"].norm() > 0 and torch.equal(first["weight"], second["weight"])
    raw = [value for name, value in saved["projections"].items() if "original" in name]
    assert len(saved["projections"]) == 2 * len(ranks[0]) + len(raw)
    assert len(raw) == (kind == "cnn")
    for weight in raw:  # of VkD: orthogonal in every forward, whatever the optimizer made of it
        projection = matching.PROJ_MAP["orthogonal"](weight.shape[1], weight.shape[0])
        projection.parametrizations.weight.original.data.copy_(weight)
        gram = projection.weight.mT @ projection.weight
        assert (gram - torch.eye(len(gram))).abs().max() < 1e-5
    assert not any("_hidden_" in name for name in (*saved["model"], *saved["model_ema"]))


def test_a_killed_and_resumed_run_has_the_projections_of_one_that_was_not(
    run_main, vit_teacher: list[str], tmp_path: Path
) -> None:
    texts = [text.replace("dumped", "linear") for text in VIT_MATCHES]
    texts.append("feature=pooled,loss=vkd,proj=orthogonal")
    flags = [
        *QUICK,
        *vit_teacher,
        *matches(texts),
        "--distillation-type",
        "soft",
        "--kd-loss-type",
        "ce",
        "--kd-loss-weight-scheduler",
        "linear_decay",
        "--epochs",
        "2",
    ]
    whole = run_main(*flags, "--output_dir", str(tmp_path / "whole"))
    assert whole.returncode == 0, whole.stderr
    half = tmp_path / "parts" / "checkpoint.pth"
    run = start(flags, half.parent)
    while run.poll() is None and not half.exists():
        time.sleep(0.05)
    run.kill()
    assert torch.load(half, weights_only=True)["epoch"] == 0
    again = run_main(*flags, "--output_dir", str(half.parent), "--resume", str(half))
    assert again.returncode == 0, again.stderr
    first, second = (
        torch.load(tmp_path / name / "checkpoint.pth", weights_only=True)
        for name in ("whole", "parts")
    )
    for key in ("projections", "model"):
        for name, value in first[key].items():
            assert torch.equal(value, second[key][name]), name
    weight = second["projections"]["pooled_vkd_0_0.parametrizations.weight.original"]
    assert weight.shape == (64, 64)
    other = run_main(*flags[:-2], "--epochs", "3", "--match", texts[0], "--resume", str(half))
    assert other.returncode == 2 and "--resume" in other.stderr


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ("--match layer_S=9,layer_T=0,feature=hidden,loss=cos", "0 to 4"),
        ("--match layer_S=0,layer_T=0,feature=attention,loss=attention_mse", "is a CNN"),
        ("--match layer_S=0,layer_T=0,feature=hidden,loss=coss", "cos, fsp"),
        ("--match layer_S=4,layer_T=4,feature=hidden,loss=cos,proj=linear,tokens=patch", "grid"),
        (
            "--match layer_S=4,layer_T=4,feature=hidden,loss=cos,proj=linear:1:2,tokens=patch",
            "width 1",
        ),
        ("--distillation-type soft --kd-loss-type ce --probability-shift --mixup 0.8", "--mixup 0"),
        ("--distillation-type soft --distillation-tau -1", "above 0"),
        ("--plugin nowhere.py", "nowhere.py"),
        (
            "--match layer_S=4,layer_T=-1,feature=hidden,loss=pkd,tokens=patch,proj=linear",
            "class tokens",
        ),
        (
            "--match layer_S=4,layer_T=-1,feature=hidden,loss=hidden_mse,tokens=patch,resize=avg,"
            "proj=linear:auto:auto:lr=-1",
            "rates",
        ),
        (
            "--teacher-model resnet_pico --teacher-model resnet_pico --match "
            "feature=pooled,loss=cos,teacher=resnet_pico",
            "several teachers",
        ),
        (
            "--input-size 16 64 --teacher-model deit_pico_patch4_32 --teacher-path VIT --match "
            "layer_S=4,layer_T=4,feature=hidden,loss=cos,tokens=patch",
            "patch grid is 4x16",
        ),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(
    flags: str, words: str, run_inside, vit_teacher: list[str]
) -> None:
    shipped = str(ROOT / "models" / "weights" / "resnet_pico_digits.safetensors")
    if flags.count("--teacher-model") == 2:
        flags += f" --teacher-path {shipped}" * 2
    flags = flags.replace("VIT", vit_teacher[-1])
    result = run_inside(*QUICK, "--epochs", "1", *flags.split())
    assert result.returncode == 2 and "Traceback" not in result.stderr, result.stderr
    errors = [line for line in result.stderr.splitlines() if line.startswith("error:")]
    assert len(errors) == 1 and words in errors[0], result.stderr
    assert "Epoch:" not in result.stdout
