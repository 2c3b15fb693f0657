"""Cached teacher logits: what is read equals what was written; anything else is refused."""

import json
import os
import time
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch

import datasets
import models
from base.distributed import Processes
from base.errors import UserError, differences
from data import image_ops, sources
from data.samplers import BatchKey
from distill import cache_store, cached_teacher
from distill import teacher as teacher_module
from distill.cached_teacher import CYCLE, _cycle_epochs, build_cache_fingerprint
from experiments import kill_sweep
from options import QUICK_START, get_args_parser, read_recipe
from tools import prepare_data

FACTS = {"teacher": "resnet_pico", "seed": 0, "mixing": {"mixup": 0.8}}


def store(
    folder: Path, keep: str | int = "all", may_create: bool = True, **facts
) -> cache_store.Store:
    return cache_store.Store(
        folder, rows=12, num_classes=5, keep=keep, fingerprint=FACTS | facts, may_create=may_create
    )


def test_all_logits_come_back_bit_for_bit_and_only_what_was_written_is_done(tmp_path: Path) -> None:
    logits = torch.randn(3, 5)
    rows = np.array([7, 2, 11])
    written = store(tmp_path)
    written.write(rows, logits)
    again = store(tmp_path, may_create=False)
    assert torch.equal(again.read(rows), logits)
    assert again.done(np.arange(12)).nonzero()[0].tolist() == [2, 7, 11]
    assert again.missing() == 9
    assert again.missing(2, 3) == 4, "of the rows 0 to 2 and 6 to 8, 2 and 7 are there"


def test_a_damaged_row_is_not_done(tmp_path: Path) -> None:
    kept = store(tmp_path, keep=2)
    kept.write(np.arange(4), torch.randn(4, 5))
    path = tmp_path / "log_probabilities.f16"
    data = bytearray(path.read_bytes())
    data[2 * 2 * 2] ^= 1  # of row 2
    path.write_bytes(data)
    assert store(tmp_path, keep=2).done(np.arange(5)).tolist() == [True, True, False, True, False]


def test_top_k_stores_the_most_likely_classes_and_spreads_the_rest(tmp_path: Path) -> None:
    logits = torch.tensor([[3.0, 1.0, 2.0, -1.0, 0.0]])
    kept = store(tmp_path, keep=2)
    kept.write(np.array([0]), logits)
    read = kept.read(np.array([0])).exp()
    wanted = logits.softmax(1)
    assert read.sum().item() == pytest.approx(1, abs=1e-3)
    torch.testing.assert_close(read[0, [0, 2]], wanted[0, [0, 2]], rtol=2e-3, atol=1e-4)
    rest = (1 - wanted[0, [0, 2]].sum()) / 3
    torch.testing.assert_close(read[0, [1, 3, 4]], rest.expand(3), rtol=2e-2, atol=1e-3)


def test_hard_labels_take_two_bytes(tmp_path: Path) -> None:
    kept = store(tmp_path, keep="hard")
    logits = torch.randn(4, 5)
    kept.write(np.arange(4), logits)
    assert torch.equal(kept.read(np.arange(4)).argmax(1), logits.argmax(1))
    assert (tmp_path / "classes.u16").stat().st_size == 12 * 2


@pytest.mark.parametrize("keep", ["all", 3, "hard"])
def test_the_stated_size_is_exact(keep: str | int, tmp_path: Path) -> None:
    kept = store(tmp_path, keep=keep)
    files = [path for path in tmp_path.iterdir() if path.name != "manifest.json"]
    assert sum(path.stat().st_size for path in files) == kept.size()


def test_another_fingerprint_is_refused_naming_each_entry_with_both_values(tmp_path: Path) -> None:
    store(tmp_path)
    with pytest.raises(UserError, match="seed was 0 and is 1") as caught:
        store(tmp_path, seed=1, mixing={"mixup": 0.5})
    assert "mixing mixup was 0.8 and is 0.5" in str(caught.value)
    assert "teacher" not in str(caught.value).split("refused")[1]


def test_a_folder_without_a_cache_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no cache there"):
        store(tmp_path, may_create=False)
    (tmp_path / "holiday.jpg").touch()
    with pytest.raises(UserError, match="other files"):
        store(tmp_path)
    whole = tmp_path / "whole"
    store(whole)
    (whole / "logits.f32").write_bytes(b"short")
    with pytest.raises(UserError, match="5 bytes, 240 expected"):
        store(whole)
    (whole / "manifest.json").write_text("{")
    with pytest.raises(UserError, match="not readable"):
        store(whole)
    (whole / "manifest.json").write_text('{"format": 2}')
    with pytest.raises(UserError, match="of format 2, this program reads 3 and 4"):
        store(whole)


def test_a_cache_whose_creation_was_interrupted_is_created_again(tmp_path: Path) -> None:
    (tmp_path / "logits.f32").write_bytes(b"half")
    assert store(tmp_path).missing() == 12


@pytest.mark.parametrize("text", ["0", "5", "-1", "some", "2.5", "²"])
def test_a_number_of_classes_that_cannot_be_kept_is_refused(text: str) -> None:
    with pytest.raises(UserError, match="all, hard, or a number from 1 to 4"):
        cache_store.read_topk(text, 5)


SAID = torch.tensor([[3.0, 1.0, 2.0, -1.0, 0.0], [0.5, 0.0, 4.0, 1.0, 4.0004]])


@pytest.mark.parametrize(
    ("keep", "changes", "agrees"),
    [
        ("all", {(0, 3): -1.1}, [False, True]),
        (2, {(0, 3): 0.5}, [False, True]),  # the order is the same, the probabilities are not
        (2, {(0, 3): -1.01}, [True, True]),
        (2, {(0, 1): 2.5}, [False, True]),  # another one is the second
        (2, {(1, 4): 3.9996}, [True, True]),  # near enough to a tie
        ("hard", {(0, 2): 2.9, (0, 3): 1.0}, [True, True]),
        ("hard", {(0, 2): 3.1}, [False, True]),
        ("hard", {(1, 2): 4.001}, [True, True]),
        ("hard", {(1, 2): 4.1}, [True, False]),
    ],
)
def test_verify_compares_everything_that_is_stored(
    keep: str | int, changes: dict, agrees: list[bool], tmp_path: Path
) -> None:
    kept, rows, now = store(tmp_path, keep=keep), np.array([3, 8]), SAID.clone()
    kept.write(rows, SAID)
    assert kept.agrees(rows, SAID, torch.float32).tolist() == [True, True]
    for place, value in changes.items():
        now[place] = value
    assert kept.agrees(rows, now, torch.float32).tolist() == agrees


@pytest.mark.parametrize("keep", ["all", 2, "hard"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_logits_one_unit_in_the_last_place_apart_agree_in_their_own_type(
    dtype: torch.dtype, keep: str | int, tmp_path: Path
) -> None:
    rows, logits = np.array([3, 8]), (9 * SAID).to(dtype)
    apart = (logits.view(torch.int16) + 1).view(dtype)
    kept = store(tmp_path, keep=keep)
    kept.write(rows, logits)
    assert not torch.equal(apart, logits)
    assert kept.agrees(rows, apart, dtype).tolist() == [True, True]
    wrong = apart.clone()
    wrong[0, 2] += 0.1 * wrong[0].abs().max()  # no longer the second of its row
    assert kept.agrees(rows, wrong, dtype).tolist() == [keep == "hard", True]
    if keep == "all" and dtype == torch.bfloat16:
        assert not kept.agrees(rows, apart, torch.float32).any()


def test_a_manifest_records_where_it_was_written_and_is_read_anywhere(tmp_path: Path) -> None:
    def opened(device: str) -> cache_store.Store:
        return cache_store.Store(
            tmp_path,
            rows=12,
            num_classes=5,
            keep="all",
            fingerprint=FACTS,
            may_create=True,
            written_on={"device": device, "dtype": "bfloat16"},
        )

    opened("NVIDIA H100")
    recorded = json.loads((tmp_path / "manifest.json").read_text())["written on"]
    assert recorded == {"device": "NVIDIA H100", "dtype": "bfloat16"}
    assert opened("Tesla T4").written_on == "NVIDIA H100 in bfloat16"


@pytest.mark.parametrize("suffix", ["", " by oneDNN"])
def test_a_cache_of_format_3_still_opens(suffix: str, tmp_path: Path) -> None:
    """The manifest as it was written before devices were recorded, with its CPU's kernels."""
    precision = {"teacher precision": "float32 on cpu"}
    store(tmp_path, **precision).write(np.array([2]), SAID[:1])
    path = tmp_path / "manifest.json"
    manifest = json.loads(path.read_text()) | {"format": 3}
    del manifest["written on"]
    manifest["teacher precision"] += suffix
    path.write_text(json.dumps(manifest, indent=1, sort_keys=True) + "\n")
    again = store(tmp_path, **precision)
    assert again.read(np.array([2])).equal(SAID[:1]) and "unrecorded" in again.written_on
    with pytest.raises(UserError, match="teacher precision was 'float32 on cpu' and is 'torch"):
        store(tmp_path, **{"teacher precision": "torch.bfloat16 on cpu"})


class Network:
    """A network of a cached teacher: returns stated logits, and counts its calls."""

    precision = torch.float32

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self, images: torch.Tensor, key: BatchKey) -> torch.Tensor:
        self.calls += 1
        return SAID


def cached(folder: Path, **options) -> cached_teacher.CachedTeacher:
    sizes = {"epoch_rows": 4, "needed": 4, "batch_size": 2, "rank": 0, "world_size": 1}
    return cached_teacher.CachedTeacher(store(folder), **sizes, **options)


def test_a_damaged_row_of_a_complete_cache_is_recomputed_or_named(tmp_path: Path) -> None:
    images, network = torch.zeros(2, 3, 4, 4), Network()
    for row in range(0, 12, 2):
        store(tmp_path).write(np.array([row, row + 1]), SAID)
    logits = np.memmap(tmp_path / "logits.f32", dtype="<f4", mode="r+", shape=(12, 5))
    logits[7] += 1  # epoch 1, batch 1, second image
    key = BatchKey(1, 1)
    words = "cache.*: 1 damaged in batch 1 of epoch 1; compute them with .*-mode write"
    for options in ({"network": None}, {"network": network, "verify": True}):
        with pytest.raises(UserError, match=words):
            cached(tmp_path, **options)(images, key)
    teacher = cached(tmp_path, network=None, build_network=lambda: network)
    assert teacher(images, BatchKey(1, 0)).equal(SAID) and network.calls == 0
    assert teacher(images, key).equal(SAID) and network.calls == 1
    assert cached(tmp_path, network=None)(images, key).equal(SAID), "the row is on disk again"


def test_cached_logits_without_the_key_of_a_batch_are_an_error(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="BatchKey"):
        cached(tmp_path, network=None)(torch.zeros(2, 3, 4, 4))


def test_logits_that_are_not_finite_are_not_written(tmp_path: Path) -> None:
    kept, logits = store(tmp_path, keep="hard"), torch.randn(2, 5)
    logits[1, 3] = float("nan")
    with pytest.raises(UserError, match="not finite"):
        kept.write(np.array([0, 1]), logits)
    assert kept.missing() == 12


def test_read_only_files_can_be_read(tmp_path: Path, monkeypatch) -> None:
    store(tmp_path).write(np.array([2]), SAID[:1])
    monkeypatch.setattr(os, "access", lambda path, mode: mode != os.W_OK)
    kept = store(tmp_path)
    assert kept.read(np.array([2])).equal(SAID[:1])
    with pytest.raises(UserError, match="missing or damaged, and the files cannot be written"):
        kept.write(np.array([0, 1]), SAID)


def _make_and_write(folder: Path, row: int) -> None:
    fill = cache_store.Store._fill
    cache_store.Store._fill = lambda *args: time.sleep(0.2 + row / 10) or fill(*args)
    store(folder).write(np.array([row]), SAID[:1])


def test_runs_that_start_together_create_one_cache_and_lose_no_row(tmp_path: Path) -> None:
    fork = torch.multiprocessing.get_context("fork")
    runs = [fork.Process(target=_make_and_write, args=(tmp_path / "new", row)) for row in range(4)]
    for run in runs:
        run.start()
    for run in runs:
        run.join()
    assert [run.exitcode for run in runs] == [0] * 4
    assert store(tmp_path / "new").done(np.arange(12)).sum() == 4


RUN = [
    "--distillation-type",
    "hard",
    "--mixup",
    "0.8",
    "--cutmix",
    "1",
    "--reprob",
    "0.25",
    "--drop-path",
    "0.1",
    "--epochs",
    "2",
    "--warmup-epochs",
    "0",
    "--batch-size",
    "32",
    "--repeated-aug",
    "--no-teacher-check",
]


ROWS = 192  # of an epoch


@pytest.fixture
def few_digits(monkeypatch: pytest.MonkeyPatch) -> None:
    """192 digits to train on and 32 to evaluate on, for speed."""
    monkeypatch.setattr(sources, "DIGITS_ROWS", {"train": (0, ROWS), "test": (1197, 1229)})


def log(folder: Path) -> list[dict]:
    return kill_sweep.read_log(folder)  # without times


@pytest.mark.slow
def test_live_written_and_read_runs_are_the_same_bit_for_bit(
    run_inside, few_digits, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:

    def run(name: str, *flags: str):
        result = run_inside(*RUN, "--output_dir", str(tmp_path / name), *flags)
        assert result.returncode == 0, result.stderr
        return result.stdout

    run("live")
    kept = ["--teacher-cache", str(tmp_path / "cache"), "--teacher-cache-views", "2"]
    assert "still to write" in run("first", *kept)
    build_teacher = teacher_module.build_teacher
    monkeypatch.setattr(teacher_module, "build_teacher", None)  # reading needs no network
    assert "no network is loaded" in run("second", *kept, "--num-workers", "2")
    run("third", *kept, "--teacher-cache-mode", "read")
    assert log(tmp_path / "live") == log(tmp_path / "first") == log(tmp_path / "second")
    assert log(tmp_path / "live") == log(tmp_path / "third")
    shorter = run("fourth", *kept[:2], "--epochs", "1")
    assert "a cycle of 2 epochs" in shorter, "as many as there are, whatever the run has"
    run("fifth", *kept[:2], "--epochs", "3", "--teacher-cache-mode", "read")
    monkeypatch.setattr(teacher_module, "build_teacher", build_teacher)
    longer = [*RUN, "--epochs", "3", "--output_dir", str(tmp_path / "fifth"), "--resume", "auto"]
    assert "views that come again: was 2 and is 0" in run_inside(*longer).stderr


@pytest.mark.parametrize("mode", ["auto", "write", "read", "verify"])
def test_a_cache_with_another_number_of_epochs_is_accepted_or_refused_with_advice(
    mode: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    assert _cycle_epochs(tmp_path / "new", mode, epochs=7) == 7
    store(tmp_path, **{CYCLE: 4})
    caplog.set_level("INFO")
    assert _cycle_epochs(tmp_path, mode, epochs=3) == 4 and not caplog.text
    if mode in ("auto", "write"):
        with pytest.raises(UserError, match="holds 4 .* --epochs is 5; .*--teacher-cache-views 4"):
            _cycle_epochs(tmp_path, mode, epochs=5)
    else:
        assert _cycle_epochs(tmp_path, mode, epochs=5) == 4
        assert ("repeat in the 5 epochs" in caplog.text) == (mode == "read")


# Every flag of data, augmentation and input: a value by which the facts must differ, or why it
# cannot reach a training image.
REACH = {
    "color_jitter": ["0.5"],
    "aa": ["original"],
    "augment_on": ["device"],
    "train_interpolation": ["bilinear"],
    "repeated_aug": False,
    "ThreeAugment": [],
    "src": [],
    "reprob": ["0.1"],
    "remode": ["const"],
    "recount": ["2"],
    "mixup": ["0.5"],
    "cutmix": ["0.5"],
    "cutmix_minmax": ["0.2", "0.4"],
    "mixup_prob": ["0.5"],
    "mixup_switch_prob": ["0.1"],
    "mixup_mode": ["elem"],
    "data_path": ["FOLDER"],
    "data_set": ["IMNET", "--data-path", "FOLDER"],
    "unlabelled_path": ["FOLDER"],
    "unlabelled_ratio": ["2", "--unlabelled-path", "FOLDER"],
    "labels_per_class": ["10"],
    "inat_category": None,
    "val_fraction": None,
    "on_bad_image": ["skip"],
    "model": ["deit_tiny_patch16_224"],
    "nb_classes": ["12"],
    "input_size": ["40"],
    "mean": ["0.5", "0.5", "0.50001"],
    "std": ["0.5", "0.5", "0.50001"],
    "interpolation": ["bilinear"],
    "seed": ["1"],
    "batch_size": ["32"],
    "teacher_model": ["resnet18"],
    "teacher_path": ["FILE"],
    "teacher_weight": ["0.5"],
    "torchcompile": ["eager"],
}
CANNOT = {
    "smoothing": "labels",
    "bce_loss": "loss",
    "resplit": "no effect",
    "val_split": "evaluation",
    "val_labels": "evaluation",
    "eval_crop_ratio": "evaluation",
    "num_workers": "speed",
    "loader_timeout": "speed",
    "pin_mem": "speed",
    "drop": "student",
    "drop_path": "student",
    "pretrained": "student",
    "finetune": "student",
    "attn_only": "student",
    "grad_checkpointing": "student",
    "train_mode": "student",
}
FREE = [
    ["--val-split", "dev"],
    ["--eval-crop-ratio", "0.9"],
    ["--num-workers", "2"],
    ["--smoothing", "0"],
    ["--drop-path", "0.3"],
    ["--epochs", "7"],
]


def facts(*flags: str) -> dict:
    parser = get_args_parser()
    pico = {
        name: read_recipe(QUICK_START)[name]
        for name in ("model", "teacher_model", "teacher_path", "data_set")
    }
    parser.set_defaults(**pico, distillation_type="hard", num_workers=0, batch_size=4)
    args = parser.parse_args(flags)
    inputs = models.build_input_config(args)
    place = Processes(0, 0, 1, torch.device("cpu"), "single")
    loaders = datasets.build_loaders(args, inputs, place)
    return build_cache_fingerprint(args, loaders, inputs, place, None)


def test_every_flag_that_changes_training_images_is_in_the_fingerprint(
    image_folder: Path, tmp_path: Path
) -> None:
    groups = {group.title: group for group in get_args_parser()._action_groups}
    asked = {
        action.dest: action
        for title in ("augmentation and mixing", "data", "student")
        for action in groups[title]._group_actions
    }
    assert not set(asked) - set(REACH) - set(CANNOT), "a new flag: does it reach the pixels?"
    assert not set(REACH) & set(CANNOT)
    torch.save({"model": {}}, tmp_path / "file.pth")
    words = {"FOLDER": str(image_folder), "FILE": str(tmp_path / "file.pth")}
    ours = facts()
    for name, value in REACH.items():
        if value is None:  # it chooses labels or images, and they are among the data
            continue
        flag = "--" + ("no-" if value is False else "") + name.replace("_", "-")
        more = ["--data-set", "IMNET"] if name == "data_path" else []
        assert facts(flag, *(words.get(word, word) for word in value or []), *more) != ours, flag
    for flags in FREE:
        assert facts(*flags) == ours, flags


@pytest.mark.parametrize(
    ("change", "flags"),
    [
        ((image_ops, "VERSION", 0), []),
        ((image_ops, "DEVICE_VERSION", 0), ["--augment-on", "device"]),
        ((cached_teacher, "version", lambda name: 9), []),
    ],
)
def test_another_version_changes_the_fingerprint(
    change: tuple, flags: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    ours = facts(*flags)
    monkeypatch.setattr(*change)
    assert facts(*flags) != ours


def test_the_fingerprint_holds_mirroring_and_the_form_of_the_data(
    image_folder: Path, tmp_path: Path
) -> None:
    target = str(tmp_path / "prepared")
    assert prepare_data.main([str(image_folder), target, "--num-workers", "0"]) == 0
    kept = facts("--data-set", "PREPARED", "--data-path", target)
    plain = facts("--data-set", "IMNET", "--data-path", str(image_folder))
    assert kept["form of the data"] == "prepared raw, short side 288"
    assert kept["data"] != plain["data"] and kept["mirrored"] and not facts()["mirrored"]
    manifest = json.loads((tmp_path / "prepared" / "manifest.json").read_text())
    (tmp_path / "prepared" / "manifest.json").write_text(json.dumps(manifest | {"flips": False}))
    again = facts("--data-set", "PREPARED", "--data-path", target)
    assert list(differences(kept, again)) == ["mirrored was True and is False"]


def test_a_teacher_in_a_folder_is_identified_by_its_files(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(b"one")
    ours = facts("--teacher-model", f"local-dir:{tmp_path}", "--teacher-path", "")
    (tmp_path / "model.safetensors").write_bytes(b"two")
    other = facts("--teacher-model", f"local-dir:{tmp_path}", "--teacher-path", "")
    assert [line.split()[1] for line in differences(ours, other)] == ["weights"]
    with pytest.raises(UserError, match="no such folder"):
        facts("--teacher-model", f"local-dir:{tmp_path}/none", "--teacher-path", "")


def test_a_cache_is_refused_with_separate_logits_of_several_teachers(
    run_inside, tmp_path: Path
) -> None:
    two = ["--teacher-model", "resnet_pico", "--teacher-path", ""] * 2
    result = run_inside(*RUN, *two, "--teacher-logits", "apart", "--teacher-cache", str(tmp_path))
    assert result.returncode == 2 and "stores the mean of several teachers" in result.stderr


def _no_network(*_, **__) -> None:
    raise AssertionError("a complete cache needs no network")


def _live_written_and_read(rank: int, folder: str) -> None:
    import main

    torch.set_num_threads(1)
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2"}
    kept = ["--teacher-cache", f"{folder}/cache", "--teacher-cache-mode"]
    for name, flags in {
        "live": ["--num-workers", "0"],
        "written": [*kept, "auto", "--num-workers", "2"],
        "read": [*kept, "read", "--num-workers", "0"],
    }.items():
        if name == "read":  # needs no network
            cached_teacher.build_teacher = _no_network
        where = ["--output_dir", f"{folder}/{name}", "--dist-url", f"file://{folder}/store_{name}"]
        if code := main.run([*RUN, *where, *flags]):
            raise SystemExit(code)


@pytest.mark.slow
def test_two_processes_live_and_from_the_cache_are_the_same_bit_for_bit(
    few_digits, tmp_path: Path
) -> None:
    torch.multiprocessing.start_processes(
        _live_written_and_read, (str(tmp_path),), nprocs=2, start_method="fork"
    )
    assert log(tmp_path / "live") == log(tmp_path / "written") == log(tmp_path / "read")


@pytest.mark.slow
def test_a_cache_is_filled_in_parts_and_verify_finds_wrong_rows(
    run_inside, few_digits, tmp_path: Path
) -> None:
    kept = [*RUN, "--output_dir", "", "--teacher-cache", str(tmp_path / "cache")]
    incomplete = run_inside(*kept, "--teacher-cache-mode", "write", "--on-bad-image", "skip")
    assert incomplete.returncode == 0, incomplete.stderr
    kept += ["--on-bad-image", "skip"]
    done = tmp_path / "cache" / "marks"
    marks = np.memmap(done, dtype="<u4", mode="r+")
    marks[100:300] = 0  # as if the writing had been killed there
    missing = run_inside(*kept, "--teacher-cache-mode", "read")
    assert missing.returncode == 2 and f"200 of {2 * ROWS} rows are missing" in missing.stderr
    again = run_inside(*kept, "--teacher-cache-mode", "write")
    assert f"complete ({2 * ROWS})" in again.stdout, again.stdout + again.stderr
    assert run_inside(*kept, "--teacher-cache-mode", "verify").returncode == 0
    logits = np.memmap(
        tmp_path / "cache" / "logits.f32", dtype="<f4", mode="r+", shape=(2 * ROWS, 10)
    )
    logits[170] += 1
    torn = run_inside(*kept, "--teacher-cache-mode", "verify")
    assert (
        torn.returncode == 2
        and "cache: 1 damaged in batch 5 of epoch 0; compute them" in torn.stderr
    )
    assert run_inside(*kept, "--teacher-cache-mode", "write").returncode == 0
    assert run_inside(*kept, "--teacher-cache-mode", "verify").returncode == 0, "mended"
    logits[170] += 1
    trained = run_inside(*kept, "--teacher-cache-mode", "auto")
    assert trained.returncode == 0 and "damaged rows in batch 5 of epoch 0" in trained.stderr
    logits[170] += 1
    marks = np.memmap(done, dtype="<u4", mode="r+")
    marks[170] = zlib.crc32(logits[170]) % (2**32 - 1) + 1
    wrong = run_inside(*kept, "--teacher-cache-mode", "verify")
    assert wrong.returncode == 2 and "differ from the teacher's logits" in wrong.stderr


@pytest.mark.slow
@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--reprob", "0.5"], "reprob was 0.25 and is 0.5"),
        (["--batch-size", "64"], "mixing batch_size was 32 and is 64"),
        (["--seed", "1"], "seed"),
        (["--input-size", "40"], "input"),
        (["--teacher-amp", "bf16"], "teacher precision was 'float32 on cpu"),
        (["--torchcompile", "eager"], "teacher compiled was 'no'"),
    ],
)
def test_another_recipe_is_refused(flags, words, run_inside, few_digits, tmp_path) -> None:
    kept = [
        *RUN,
        "--output_dir",
        "",
        "--teacher-cache",
        str(tmp_path / "cache"),
        "--teacher-cache-views",
        "1",
    ]
    assert run_inside(*kept, "--teacher-cache-mode", "write").returncode == 0
    result = run_inside(*kept, *flags)
    assert result.returncode == 2 and words in result.stderr, result.stderr
    path = tmp_path / "cache" / "manifest.json"
    manifest = json.loads(path.read_text())
    path.write_text(json.dumps(manifest | {"version of timm": "0.3.2"}))
    assert "0.3.2" in run_inside(*kept).stderr


@pytest.mark.slow
def test_a_flipped_weight_of_the_teacher_is_refused(run_inside, few_digits, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    weights = load_file(Path(__file__).parents[1] / "models/weights/resnet_pico_digits.safetensors")
    path = tmp_path / "teacher.safetensors"
    save_file(weights, path)
    kept = [
        *RUN,
        "--output_dir",
        "",
        "--teacher-path",
        str(path),
        "--teacher-cache",
        str(tmp_path / "cache"),
        "--teacher-cache-mode",
    ]
    assert run_inside(*kept, "write").returncode == 0
    weights["fc.bias"][0] *= -1
    save_file(weights, path)
    assert "teacher weights" in run_inside(*kept, "auto").stderr
