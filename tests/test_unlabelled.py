"""Training images without labels: sources, the mean over labelled images, and whole runs."""

import io
import json
import os
import shutil
import tarfile
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from test_checkpointer import assert_same_run, wait_for

import losses
from base.errors import UserError
from data.image_dataset import ImageDataset
from data.image_source import Files, Pairs
from data.samplers import TrainSampler
from data.transforms import AnyBatchMixup
from data.unlabelled import WithUnlabelled, keep_labels, open_unlabelled, repeated
from distill.objective import shift_probability
from experiments.kill_sweep import finish, kill, read_log, start

C, NONE = 5, losses.UNLABELLED
LABELS = torch.tensor([2, NONE, 0, NONE, NONE, 4, NONE])


def logits(rows: int = len(LABELS), seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(rows, C, generator=generator, dtype=torch.float64).requires_grad_()


def write_images(folder: Path, *names: str) -> Path:
    for value, name in enumerate(names):
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (4, 4), (value, value, value)).save(path, format="png")
    return folder


def greys(source) -> list[int]:
    """Return the grey value of every image, which is its number in `write_images`."""
    return [int(np.asarray(source.load(index)[0])[0, 0, 0]) for index in range(len(source))]


def write_tar(path: Path, folder: Path, mode: str = "w") -> Path:
    with tarfile.open(path, mode) as tar:
        for image in sorted(folder.rglob("*.png")):
            tar.add(image, image.relative_to(folder))
        tar.addfile(tarfile.TarInfo("0.cls"), io.BytesIO(b""))
    return path


# --- sources ----------------------------------------------------------------------------------


def test_a_folder_of_any_depth_is_read(tmp_path: Path) -> None:
    write_images(tmp_path, "a.png", "b/c.png", "b/d/e/f.png")
    (tmp_path / "notes.txt").write_text("no image")
    source = open_unlabelled(str(tmp_path))
    assert greys(source) == [0, 1, 2]
    assert {source.load(index)[1] for index in range(3)} == {NONE}
    assert "files with suffix .txt: 1" in source.notes()[0]


def test_a_text_file_of_relative_and_absolute_paths_is_read(tmp_path: Path) -> None:
    folder = write_images(tmp_path / "images", "a.png", "b.png")
    text = tmp_path / "list.txt"
    text.write_text(f"images/b.png\n\n{folder / 'a.png'}\n")
    assert greys(open_unlabelled(str(text))) == [1, 0]
    text.write_text("images/b.png\nimages/lost.png\n")
    with pytest.raises(UserError, match="'images/lost.png' is no file"):
        open_unlabelled(str(text))


@pytest.mark.parametrize("given", ["one file", "a folder"])
def test_tar_shards_are_read_by_index(given: str, tmp_path: Path) -> None:
    images = write_images(tmp_path / "images", "a.png", "b/c.png", "d.png")
    shards = tmp_path / "shards"
    shards.mkdir()
    one = write_tar(shards / "0.tar", images)
    source = open_unlabelled(str(one if given == "one file" else shards))
    assert [greys(source)[index] for index in (2, 0, 1)] == [2, 0, 1]
    assert "members that are no images: 1" in source.notes()[0]
    before = source.identity()
    write_images(images, "e.png")
    write_tar(one, images)
    assert open_unlabelled(str(one)).identity() != before


def test_what_is_no_unlabelled_data_is_refused_in_one_line(tmp_path: Path) -> None:
    images = write_images(tmp_path / "images", "a.png")
    packed = write_tar(tmp_path / "packed.tar", images, "w:gz")
    mixed = write_images(tmp_path / "mixed", "a.png")
    write_tar(mixed / "0.tar", images)
    (tmp_path / "empty").mkdir()
    for path, words in {
        tmp_path / "lost": "not there",
        tmp_path / "empty": "no image in it",
        packed: "not a whole, uncompressed tar file",
        mixed: "give each a folder of its own",
        images / "a.png": "is no file; write the path of one image in each line",
    }.items():
        with pytest.raises(UserError, match=words) as caught:
            open_unlabelled(str(path))
        assert len(caught.value.line().splitlines()) == 1


def pairs(labels: list[int], first: int = 0, what: str = "digits") -> Pairs:
    images = [Image.new("RGB", (2, 2), (first + n,) * 3) for n in range(len(labels))]
    return Pairs(list(zip(images, labels)), ["a", "b", "c"], what)


def test_without_a_ratio_every_image_comes_once_and_the_labelled_ones_are_first() -> None:
    joined = WithUnlabelled(pairs([0, 1, 2]), [pairs([NONE] * 2, 10), pairs([NONE] * 3, 20)])
    assert greys(joined) == [0, 1, 2, 10, 11, 20, 21, 22]
    assert [joined.load(index)[1] for index in range(8)] == [0, 1, 2, *[NONE] * 5]
    assert joined.labelled == 3 and joined.used_classes() is None


@pytest.mark.parametrize(
    ("ratio", "labelled", "unlabelled"), [(0.5, 20, 10), (2, 5, 10), (2.5, 4, 10), (5, 4, 20)]
)
def test_a_ratio_repeats_the_side_that_is_too_small(
    ratio: float, labelled: int, unlabelled: int
) -> None:
    joined = WithUnlabelled(pairs([0, 0, 1, 2]), [pairs([NONE] * 10, 100)], ratio)
    found = greys(joined)
    assert (joined.labelled, joined.unlabelled) == (labelled, unlabelled)
    counts = np.bincount(found, minlength=110)
    for part, total in ((counts[:4], labelled), (counts[100:], unlabelled)):
        assert part.sum() == total and part.max() - part.min() <= 1
    assert len({joined.original(index) for index in range(len(joined))}) == 14


def test_the_images_of_an_incomplete_round_are_spread_over_all() -> None:
    assert [repeated(index, 13, 9) for index in range(9, 13)] == [0, 2, 4, 6]


def test_labels_are_kept_of_as_many_images_of_each_class() -> None:
    source = pairs([0, 0, 0, 0, 1, 1, 2])
    kept, others = keep_labels(source, 2, keep_others=True)
    assert greys(kept) == [0, 2, 4, 5, 6] and kept.class_numbers().tolist() == [0, 0, 1, 1, 2]
    assert greys(others[0]) == [1, 3] and others[0].load(0)[1] == NONE
    assert keep_labels(source, 2, keep_others=False)[1] == []
    assert keep_labels(source, 4, keep_others=True) == (source, []), "no class has more images"


def test_a_repeated_bad_image_is_counted_once(tmp_path: Path) -> None:
    write_images(tmp_path, "a.png", "b.png")
    (tmp_path / "b.png").write_text("no image")
    labelled = Files(str(tmp_path), ["a.png", "b.png"], [0, 1], ["a", "b"])
    other = write_images(tmp_path / "other", *(f"{number}.png" for number in range(8)))
    joined = WithUnlabelled(labelled, [open_unlabelled(str(other))], 1.0)
    data = ImageDataset(joined, lambda image: torch.zeros(1), 2, "replace")
    assert len([data[index] for index in range(16)]) == 16 and data.skipped() == 1


# --- the mean over labelled images --------------------------------------------------------------


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_the_mean_is_over_labelled_images_alone(smoothing: float) -> None:
    x, mean = logits(), losses.LabelledMean(smoothing=smoothing)
    value = mean(x, LABELS)
    has = LABELS != NONE
    wanted = F.cross_entropy(x[has], LABELS[has], label_smoothing=smoothing)
    torch.testing.assert_close(value, wanted)
    assert float(mean.shares["labelled"]) == pytest.approx(3 / 7)
    assert float(mean.shares["unlabelled"]) == pytest.approx(4 / 7)
    value.backward()
    assert (x.grad[~has] == 0).all() and (x.grad[has] != 0).all()


def test_binary_cross_entropy_is_averaged_over_labelled_images() -> None:
    x, has = logits(), LABELS != NONE
    value = losses.LabelledMean(bce=True)(x, LABELS)
    wanted = losses.BinaryCrossEntropyTargets()(x[has], LABELS[has])
    torch.testing.assert_close(value, wanted)


@pytest.mark.parametrize("bce", [False, True])
def test_a_batch_without_a_label_has_the_loss_0_and_no_gradient(bce: bool) -> None:
    for labels in (torch.full((7,), NONE), torch.zeros(7, C, dtype=torch.float64)):
        x = logits()
        value = losses.LabelledMean(bce=bce, smoothing=0.1)(x, labels)
        value.backward()
        assert value.item() == 0 and (x.grad == 0).all()


def test_of_labels_alone_it_is_the_criterion_of_a_labelled_run() -> None:
    x, labels = logits(), torch.arange(7) % C
    plain = losses.build_base_criterion(mixing=False, smoothing=0.1, bce=False)
    torch.testing.assert_close(losses.LabelledMean(smoothing=0.1)(x, labels), plain(x, labels))


def test_deits_loss_masks_the_labels_and_distils_every_image() -> None:
    x, y, teacher = logits(), logits(seed=1), logits(seed=2).detach()
    loss = losses.DistillationLoss(losses.LabelledMean(), None, "hard", 0.3, 1.0)
    value = loss(None, (x, y), LABELS, teacher_outputs=teacher)
    has = LABELS != NONE
    base, distilled = F.cross_entropy(x[has], LABELS[has]), F.cross_entropy(y, teacher.argmax(1))
    torch.testing.assert_close(value, 0.7 * base + 0.3 * distilled)
    assert set(loss.terms) == {"base", "labelled", "unlabelled", "distillation"}
    assert set(loss.term_weights) == {"base", "distillation"}


@pytest.mark.parametrize("mode", ["batch", "pair", "elem"])
@pytest.mark.parametrize("size", [7, 8])
def test_a_mixed_target_holds_the_labelled_part_of_an_image(mode: str, size: int) -> None:
    np.random.seed(0)
    mixup = AnyBatchMixup(0.8, 1.0, label_smoothing=0.1, num_classes=C, mode=mode)
    labels = torch.arange(size) % C
    labels[1::2] = NONE
    images = (labels != NONE).float()[:, None, None, None].repeat(1, 3, 8, 8)  # 1 if labelled
    mixed, targets = mixup(images, labels)
    torch.testing.assert_close(targets.sum(1), mixed.mean((1, 2, 3)))
    x = logits(size)
    value = losses.LabelledMean()(x, targets.double())
    wanted = -(targets * x.log_softmax(1)).sum() / targets.sum()
    torch.testing.assert_close(value, wanted)


def test_probability_shift_leaves_images_without_a_label() -> None:
    teacher = torch.tensor([[1.0, 3.0, 2.0], [1.0, 3.0, 2.0]])
    shifted = shift_probability(teacher, torch.tensor([0, NONE]))
    assert shifted.tolist() == [[3.0, 1.0, 2.0], [1.0, 3.0, 2.0]]


@pytest.mark.parametrize(("processes", "accumulation"), [(1, 1), (2, 1), (1, 3), (2, 2)])
@pytest.mark.parametrize("repeats", [1, 3])
def test_the_gradient_of_an_update_is_that_of_the_mean_over_its_labelled_images(
    processes: int, accumulation: int, repeats: int
) -> None:
    """Each micro-step of each process by itself, averaged as DDP and accumulation do it."""
    batch, labelled, total = 3, 11, 40
    labels = torch.full((total,), NONE)
    labels[:labelled] = torch.arange(labelled) % C
    x = logits(total)
    samplers = [
        TrainSampler(total, num_replicas=processes, rank=rank, seed=1, repeats=repeats)
        for rank in range(processes)
    ]
    drawn = [[index for index, _ in sampler] for sampler in samplers]
    counts = samplers[0].count_below(labelled, 0, batch * processes)
    for update in range(len(drawn[0]) // batch // accumulation):
        steps = range(update * accumulation, (update + 1) * accumulation)
        expected = float(sum(counts[step] for step in steps)) / accumulation / processes
        mean = losses.LabelledMean(mean_labelled=lambda _, n=expected: n)
        mean.at_update(update)
        parts = [own[step * batch : (step + 1) * batch] for step in steps for own in drawn]
        value = sum(mean(x[part], labels[part]) for part in parts) / len(parts)
        every = [index for part in parts for index in part if labels[index] != NONE]
        wanted = F.cross_entropy(x[every], labels[every]) if every else x.sum() * 0
        torch.testing.assert_close(value, wanted)


# --- runs --------------------------------------------------------------------------------------

RUN = ["--labels-per-class", "10", "--epochs", "2", "--warmup-epochs", "0", "--no-teacher-check"]
RUN += ["--no-model-ema", "--num-workers", "0", "--drop-path", "0.1"]
MIXES = ["--mixup", "0.8", "--cutmix", "1", "--mixup-mode", "elem", "--repeated-aug"]
HARD = ["--distillation-type", "hard"]


def log(folder: Path) -> list[dict]:
    return read_log(folder)  # without times


def test_images_without_labels_need_a_teacher(run_inside, image_folder: Path) -> None:
    folder = ["--unlabelled-path", str(image_folder)]
    for flags, words in {
        (): "only a teacher can use images without labels",
        ("--cosub",): "cannot go with --cosub",
        (*HARD, "--labels-per-class", "10", "--unlabelled-path", "/lost"): "not there",
    }.items():
        found = run_inside(*folder, *flags)
        assert found.returncode == 2 and found.stderr.count("\n") == 1, found.stderr
        assert words in found.stderr


def test_streamed_data_cannot_be_joined(run_inside, image_folder: Path, tmp_path: Path) -> None:
    from test_datasets import write_shards

    where = ["--data-set", "wds/x", "--data-path", str(write_shards(tmp_path / "shards"))]
    found = run_inside(*where, *HARD, "--unlabelled-path", str(image_folder), "--nb-classes", "10")
    assert found.returncode == 2 and "prepare it with tools/prepare_data.py" in found.stderr


def test_a_run_without_a_teacher_leaves_images_without_labels_out(run_inside, tmp_path) -> None:
    result = run_inside(*RUN, "--epochs", "1", "--output_dir", str(tmp_path / "run"))
    assert "train on 100 digits (train), 10 of each class, 797 left out" in result.stdout
    assert "train_labelled" not in log(tmp_path / "run")[0]


@pytest.mark.parametrize(
    "flags",
    [
        [*HARD, *MIXES],
        ["--distillation-type", "soft", "--bce-loss"],
        ["--match", "layer_S=0,layer_T=0,feature=pooled,loss=cos,proj=linear"],
        ["--ranking-kl-weight", "1"],
        [*HARD, "--kd-loss-type", "ce", "--probability-shift", "--distillation-type", "soft"],
    ],
    ids=["mixed", "soft and bce", "match", "ranking without logits", "probability shift"],
)
def test_every_objective_trains_with_images_without_labels(
    flags: list[str], run_inside, tmp_path: Path
) -> None:
    result = run_inside(*RUN, *flags, "--epochs", "1", "--output_dir", str(tmp_path / "run"))
    assert result.returncode == 0, result.stderr
    (line,) = log(tmp_path / "run")
    assert line["train_skipped_updates"] == 0 and line["train_base"] > 0
    assert line["train_labelled"] == pytest.approx(100 / 897, abs=0.05)
    assert line["train_labelled"] + line["train_unlabelled"] == pytest.approx(1)
    assert "100 labelled digits (train), 10 of each class, 797 unlabelled" in result.stdout


def test_cached_logits_give_the_same_run_and_name_the_images(run_inside, tmp_path: Path) -> None:
    def run(name: str, *flags: str):
        where = ["--output_dir", str(tmp_path / name), *flags]
        return run_inside(*RUN, *HARD, *MIXES, *where)

    kept = ["--teacher-cache", str(tmp_path / "cache")]
    assert run("live").returncode == run("first", *kept).returncode == 0
    assert run("second", *kept, "--teacher-cache-mode", "read").returncode == 0
    assert log(tmp_path / "live") == log(tmp_path / "first") == log(tmp_path / "second")
    manifest = json.loads((tmp_path / "cache" / "manifest.json").read_text())
    assert manifest["unlabelled data"].startswith("797 images, ")
    refused = run("third", *kept, "--labels-per-class", "11")
    assert refused.returncode == 2 and "unlabelled data was" in refused.stderr


def _train(rank: int, world: int, folder: str, flags: tuple[str, ...]) -> None:
    import main

    torch.set_num_threads(1)
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world)}
    where = ["--output_dir", f"{folder}/{world}", "--dist-url", f"file://{folder}/store"]
    if code := main.run([*RUN, *HARD, *where, *flags]):
        raise SystemExit(code)


@pytest.mark.slow
def test_two_processes_and_accumulation_train_as_one_process(run_inside, tmp_path: Path) -> None:
    """The same images in an update give the same weights, up to rounding."""
    few = ("--epochs", "1", "--drop-path", "0", "--opt", "sgd", "--lr", "0.01", "--unscale-lr")
    spawn = partial(torch.multiprocessing.spawn, _train, nprocs=2)
    spawn((2, str(tmp_path), (*few, "--batch-size", "16", "--grad-accum-steps", "2")))
    out = tmp_path / "1"
    run_inside(*RUN, *HARD, *few, "--batch-size", "64", "--output_dir", str(out))
    one, two = (
        torch.load(folder / "checkpoint.pth", weights_only=True)["model"]
        for folder in (out, tmp_path / "2")
    )
    for name, value in one.items():
        torch.testing.assert_close(value, two[name], rtol=1e-3, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("cached", [False, True])
def test_a_killed_run_goes_on_within_the_epoch(
    cached: bool, folder_flags: list[str], small_teacher: Path, image_folder: Path, tmp_path: Path
) -> None:
    flags = [*folder_flags, "--num_workers", "0", "--grad-accum-steps", "2", *HARD]
    flags += ["--teacher-model", "resnet_pico", "--teacher-path", str(small_teacher)]
    flags += ["--unlabelled-path", str(image_folder / "val"), "--unlabelled-ratio", "2"]
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    own = {out: ["--teacher-cache", f"{out}-cache"] if cached else [] for out in (whole, killed)}
    finish(flags + own[whole], whole, 1)
    process = start(flags + own[killed], killed, 1)
    wait_for("Epoch: [2/2] [2/", Path(f"{killed}.log"), process)
    kill(process)
    assert "resume: " in finish(flags + own[killed], killed, 1)
    assert_same_run(whole, killed)


def test_other_images_without_labels_are_refused_on_resume(
    run_inside, folder_flags: list[str], small_teacher: Path, image_folder: Path, tmp_path: Path
) -> None:
    other = tmp_path / "other"
    shutil.copytree(image_folder / "val", other)
    flags = [*folder_flags, "--num_workers", "0", *HARD, "--output_dir", str(tmp_path / "run")]
    flags += ["--teacher-model", "resnet_pico", "--teacher-path", str(small_teacher)]
    run: Callable = partial(run_inside, *flags, "--unlabelled-path")
    assert run(str(image_folder / "val"), "--epochs", "1").returncode == 0
    assert run(str(other), "--epochs", "1").returncode == 0, "a copy is the same data"
    next(other.rglob("*.png")).unlink()
    refused = run(str(other))
    assert refused.returncode == 2 and "data: was" in refused.stderr


def test_bad_batches_are_recomputed_with_the_labelled_mean_of_their_update(
    run_inside, tmp_path: Path
) -> None:
    import tools.replay as replay

    flags = [*RUN, *HARD, "--max-bad-steps", "1", "--lr", "1e30", "--unscale-lr"]
    flags += ["--opt", "sgd", "--clip-grad", "0", "--output_dir", str(tmp_path)]
    assert run_inside(*flags).returncode == 2
    saved, found = replay.replay(tmp_path / "bad_batch.pth")
    assert saved["mean_labelled"] > 0
    for name, value in saved["terms"].items():
        torch.testing.assert_close(found[name].double(), value.double(), equal_nan=True)
