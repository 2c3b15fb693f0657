"""The advice in error messages works: a command that follows it is accepted."""

import ast
import os
import re
import shlex
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import timm
import torch

import options
from base.distributed import find_launcher
from base.errors import UserError
from tools import export, predict, prepare_data

Row = tuple[str, str, tuple[str, ...]]  # words of the advice; flags before; flags after, each way


def rows(table: str) -> list[Row]:
    """Return the rows of a table: the advice, and below it the indented flags before and after."""
    entries: list[list[str]] = []
    for line in table.strip().splitlines():
        if line.startswith("  "):
            entries[-1].append(line.strip())
        else:
            entries.append([line])
    return [(advice, before, tuple(after)) for advice, before, *after in entries]


def ids(table: str) -> list[str]:
    return [before for _, before, _ in rows(table)]


# --- errors about flags, which need no data ---------------------------------------------------

FILES = {
    "soft.yaml": "{kd_loss_weight: 0.5, temperature: 2}",
    "scheduled.yaml": "{temperature_scheduler: [flsw, 1, 2]}",
    "unknown.yaml": "flags: {epoch: 1}",
    "known.yaml": "flags: {epochs: 1}",
    "choice.yaml": "flags: {amp: bf32}",
    "chosen.yaml": "flags: {amp: bf16}",
    "needs.yaml": "{flags: {epochs: 1}, needs: {data-path: a folder}}",
}
SHORT = {"$SOFT": "--distillation-type soft"}
SHORT["$HIDDEN"] = "--distillation-type soft --match feature=hidden,layer_S=1,layer_T=2"
FLAGS = """
leave out --data-path
  --data-set DIGITS --data-path x
  --data-set DIGITS
give its folder with --data-path
  --data-set IMNET
  --data-set IMNET --data-path x
(--data-set IMNET) takes it
  --val-labels x --data-set INAT --data-path x
  --val-labels x --data-set IMNET --data-path x
set --distillation-type soft or hard, or leave it out
  --unlabelled-path x
  --unlabelled-path x $SOFT
  --unlabelled-path x --distillation-type hard
  --epochs 1
--unlabelled-path cannot go with --cosub
  --unlabelled-path x --cosub
  --cosub
leave out one of them
  --cosub $SOFT
  --cosub
  $SOFT
--cosub and --distillation-head cls
  --cosub --distillation-head cls
  --cosub
  --distillation-head cls
--cosub has no teacher to match
  --cosub --hard-label-weight 1
  --cosub
--cosub has no teacher to match
  --cosub --ranking-kl-weight 1
  --ranking-kl-weight 1
--teacher-cache keeps logits alone
  $SOFT --teacher-cache x --ranking-kl-weight 1
  $SOFT --teacher-cache x
  $SOFT --ranking-kl-weight 1
--teacher-cache needs a teacher
  --teacher-cache x
  --teacher-cache x $SOFT
keeps one class an image: use --distillation-type hard
  --teacher-cache x $SOFT --teacher-cache-topk hard
  --teacher-cache x --distillation-type hard --teacher-cache-topk hard
unknown to torch; known
  --torchcompile fast
  --torchcompile inductor
leave out one
  --minutes 2 --epochs 3
  --minutes 2
  --epochs 3
give --teacher-cache-views
  --minutes 2 --teacher-cache x $SOFT
  --minutes 2 --teacher-cache x $SOFT --teacher-cache-views 2
use --val-interval 1
  --sched plateau --val-interval 2
  --sched plateau --val-interval 1
use --no-sched-on-updates
  --sched plateau --sched-on-updates
  --sched plateau --no-sched-on-updates
both give the first weights; leave out one
  --pretrained --finetune x
  --finetune x
  --pretrained
give the folder of the run
  --resume auto --output-dir ''
  --resume auto --output-dir x
give the folder of the run
  --resume auto --eval --data-path x
  --resume auto --eval --data-path x --output-dir x
give two numbers
  --opt-betas 0.9
  --opt-betas 0.9 0.99
give one side, or height and width
  --input-size 32 32 3
  --input-size 32 32
  --input-size 32
give it in one place
  --distill-config soft.yaml --distillation-tau 3
  --distill-config soft.yaml
; did you mean
  --recipe unknown.yaml
  --recipe known.yaml
; did you mean
  --batchsize 4
  --batch-size 4
; did you mean
  --teacher_mode x --epocs 1
  --teacher-model x --epochs 1
give auto, off
  --recipe choice.yaml
  --recipe chosen.yaml
give --data-path, a folder
  --recipe needs.yaml
  --recipe needs.yaml --data-path x
give a YAML file or a recipe's name
  --recipe absent.yaml
  --recipe known.yaml
did you mean
  --recipe deit_tiny_har --data-path x
  --recipe deit_tiny_hard --data-path x
must be at least 1
  --batch-size 0
  --batch-size 1
must be above 0
  --distillation-tau 0
  --distillation-tau 0.1
belongs to --distillation-type soft
  --kd-loss-type ce
  --kd-loss-type ce $SOFT
belongs to --distillation-type soft
  --logit-standardization
  --logit-standardization $SOFT
needs --kd-loss-type ce or mse
  $SOFT --temperature-scheduler flsw:1:2
  $SOFT --temperature-scheduler flsw:1:2 --kd-loss-type ce
  $SOFT --temperature-scheduler flsw:1:2 --kd-loss-type mse
leave out --temperature-scheduler
  $SOFT --temperature-scheduler flsw:1:2 --kd-loss-type dist
  $SOFT --kd-loss-type dist
give at least 2
  $SOFT --kd-loss-type dist --batch-size 1
  $SOFT --kd-loss-type dist --batch-size 2
set --mixup 0 --cutmix 0
  $SOFT --data-path x --probability-shift --mixup 0.8 --cutmix 1
  $SOFT --data-path x --probability-shift --mixup 0 --cutmix 0
set --mixup 0 --cutmix 0
  $SOFT --data-path x --probability-shift --cutmix-minmax 0.2 0.8
  $SOFT --data-path x --probability-shift --mixup 0 --cutmix 0
set --distillation-type soft
  --data-path x --probability-shift --mixup 0 --cutmix 0
  --data-path x --probability-shift --mixup 0 --cutmix 0 $SOFT
ranking needs 3 images a batch
  --ranking-kl-weight 1 --batch-size 2
  --ranking-kl-weight 1 --batch-size 3
lacks feature
  $SOFT --match loss=gram,layer_S=1,layer_T=1
  $SOFT --match feature=hidden,loss=gram,layer_S=0+1,layer_T=0+1
lacks layer_S, layer_T
  $SOFT --match loss=gram,feature=hidden
  $SOFT --match feature=hidden,loss=gram,layer_S=0+1,layer_T=0+1
the keys are
  $HIDDEN,loss=cos,wight=1
  $HIDDEN,loss=cos
two layers are written 0+4
  $HIDDEN,loss=fsp,layer_S=2
  $SOFT --match feature=hidden,loss=fsp,layer_S=1+2,layer_T=1+2
the loss needs two layers of each side (0+4)
  $HIDDEN,loss=fsp
  $SOFT --match feature=hidden,loss=fsp,layer_S=0+4,layer_T=0+4
the loss needs one layer each
  $SOFT --match feature=hidden,loss=cos,layer_S=0+1,layer_T=0+1
  $HIDDEN,loss=cos
is not for the feature
  $HIDDEN,loss=attention_mse
  $SOFT --match feature=attention,loss=attention_mse,layer_S=1,layer_T=2
takes scores
  $SOFT --match feature=attention,loss=attention_ce,attention=probabilities,layer_S=1,layer_T=2
  $SOFT --match feature=attention,loss=attention_ce,attention=scores,layer_S=1,layer_T=2
resize is for feature=hidden with tokens=patch
  $HIDDEN,loss=hidden_mse,resize=bilinear
  $HIDDEN,loss=hidden_mse,resize=bilinear,tokens=patch
where a width is a number or auto
  $HIDDEN,loss=hidden_mse,proj=linear:1:2:3:4
  $HIDDEN,loss=hidden_mse,proj=linear:auto:auto
choose one of
  $HIDDEN,loss=hiden_mse
  $HIDDEN,loss=hidden_mse
choose one of
  $SOFT --kd-loss-type cd
  $SOFT --kd-loss-type ce
is not known; choose one of
  $SOFT --kd-loss-weight-scheduler linear
  $SOFT --kd-loss-weight-scheduler linear_decay
for example flsw:1:2, in a file [flsw, 1, 2]
  $SOFT --kd-loss-type ce --temperature-scheduler flsw
  $SOFT --kd-loss-type ce --temperature-scheduler flsw:1:2
  --distill-config scheduled.yaml
for example cwsm:1, in a file [cwsm, 1]
  $SOFT --kd-loss-type ce --temperature-scheduler cwsm:1:2
  $SOFT --kd-loss-type ce --temperature-scheduler cwsm:1
an empty word is no flag; leave it out
  --epochs 1 ''
  --epochs 1
give KEY=VALUE
  --opt-kwargs eps
  --opt-kwargs eps=1
"""


def words(flags: str) -> list[str]:
    """Return the words of a command line of a table."""
    for name, text in SHORT.items():
        flags = flags.replace(name, text)
    return shlex.split(flags)


@pytest.fixture
def files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The files of the table are in the current folder."""
    monkeypatch.chdir(tmp_path)
    for name, text in FILES.items():
        Path(name).write_text(text)


@pytest.mark.parametrize(("advice", "before", "after"), rows(FLAGS), ids=ids(FLAGS))
def test_flags_are_accepted_once_the_advice_is_followed(advice, before, after, files) -> None:
    with pytest.raises(UserError) as error:
        options.parse_args(words(before))
    assert advice in error.value.line() and after
    for flags in after:
        options.parse_args(words(flags))


# --- errors about data, weights and teachers, in runs that train no step -----------------------

RUNS = """
leave it out, or give at least as many
  --data-path $DATA --nb-classes 1
  --data-path $DATA
  --data-path $DATA --nb-classes 2
use --batch-size 24 or less
  --data-path $DATA --batch-size 64
  --data-path $DATA --batch-size 24
add a folder of images for every other class
  --data-path one_class
  --data-path $DATA
leave out the flag, or move the folder away
  --data-path $DATA --val-fraction 0.5
  --data-path $DATA
  --data-path train_alone --val-fraction 0.5
give a smaller share
  --data-path train_alone --val-fraction 1
  --data-path train_alone --val-fraction 0.5
give the data's folder
  --data-path absent
  --data-path $DATA
rename the one to evaluate on to val/
  --data-path two_named
  --data-path renamed
needs train/ and val/, or one folder per class
  --data-path val_alone
  --data-path $DATA
make them, or give the class of each image with --val-labels FILE
  --data-path flat
  --data-path $DATA
  --data-path flat --val-labels flat/val.csv
convert them or remove the folder
  --data-path no_image
  --data-path no_image_removed
rename it to one of these, or remove it
  --data-path other_name
  --data-path $DATA
  --data-path removed
make val/ with its images
  --data-path train_alone --val-labels flat/val.csv
  --data-path flat --val-labels flat/val.csv
give a line name,class for each image
  --data-path flat --val-labels empty.csv
  --data-path flat --val-labels flat/val.csv
add them, or remove their lines
  --data-path flat --val-labels more.csv
  --data-path flat --val-labels flat/val.csv
add them, or remove these images
  --data-path flat --val-labels fewer.csv
  --data-path flat --val-labels flat/val.csv
give name,class on a line
  --data-path flat --val-labels bare.csv
  --data-path flat --val-labels flat/val.csv
give a folder, a tar file or a text file of paths
  --data-path $DATA $TEACHER two.pth --unlabelled-path absent
  --data-path $DATA $TEACHER two.pth --unlabelled-path flat/val
  --data-path $DATA $TEACHER two.pth --unlabelled-path paths.txt
give another folder or file
  --data-path $DATA $TEACHER two.pth --unlabelled-path no_image/train/three
  --data-path $DATA $TEACHER two.pth --unlabelled-path flat/val
write the path of one image in each line
  --data-path $DATA $TEACHER two.pth --unlabelled-path more.csv
  --data-path $DATA $TEACHER two.pth --unlabelled-path paths.txt
leave out --teacher-logits apart, or the cache
  --data-path $DATA $TEACHER two.pth $SECOND two.pth --teacher-logits apart --teacher-cache new3
  --data-path $DATA $TEACHER two.pth $SECOND two.pth --teacher-cache new3
  --data-path $DATA $TEACHER two.pth $SECOND two.pth --teacher-logits apart
choose layers of the same width
  --data-path $DATA $CNN cnn.pth --match feature=hidden,loss=fsp,layer_S=1+2,layer_T=1+2,proj=linear
  --data-path $DATA $CNN cnn.pth --match feature=hidden,loss=fsp,layer_S=1+2,layer_T=2+2,proj=linear
use feature=pooled
  --data-path $DATA $CNN cnn.pth $MATCH,loss=pkd
  --data-path $DATA $CNN cnn.pth --match feature=pooled,loss=pkd,proj=linear
give its number, 0 to 1
  --data-path $DATA $TEACHER two.pth $SECOND two.pth $MATCH,loss=hidden_mse,teacher=$MODEL
  --data-path $DATA $TEACHER two.pth $SECOND two.pth $MATCH,loss=hidden_mse,teacher=1
it would do nothing; leave it out
  --data-path $DATA $TEACHER two.pth $SECOND two.pth --teacher-weight 1 --teacher-weight 0
  --data-path $DATA $TEACHER two.pth
use --sched cosine
  --data-path $DATA --sched nosuch
  --data-path $DATA --sched cosine
give its folder with --data-path
  --data-set folder/
  --data-set folder/ --data-path $DATA
known are
  --data-set IMAGENETTE --data-path $DATA
  --data-set IMNET --data-path $DATA
give two shares, 0 <= smallest < largest <= 1
  --data-path $DATA --cutmix-minmax 0.8 0.2
  --data-path $DATA --cutmix-minmax 0.2 0.8
for example rand-m9-mstd0.5-inc1, original, augmix-m3-w3, or none
  --data-path $DATA --aa randm9
  --data-path $DATA --aa rand-m9-mstd0.5-inc1
  --data-path $DATA --aa original
  --data-path $DATA --aa augmix-m3-w3
  --data-path $DATA --aa none
give three of each, std above 0 (RGB)
  --data-path $DATA --std 0 0.5 0.5
  --data-path $DATA --std 0.5 0.5 0.5
give multiples of 8 and 8
  --data-path $DATA --input-size 30
  --data-path $DATA --input-size 24
use --augment-on worker
  --data-path $DATA --augment-on device --aa augmix-m3-w3
  --data-path $DATA --augment-on worker --aa augmix-m3-w3
set --grad-accum-steps 6 or less, or a smaller --batch-size
  --data-path $DATA --grad-accum-steps 8
  --data-path $DATA --grad-accum-steps 6
  --data-path $DATA --grad-accum-steps 8 --batch-size 3
use --opt adamw or lamb
  --data-path $DATA --opt adahessian
  --data-path $DATA --opt adamw
  --data-path $DATA --opt lamb
use --device cpu or auto
  --data-path $DATA --device cuda
  --data-path $DATA --device cpu
  --data-path $DATA --device auto
use auto, cpu or cuda
  --data-path $DATA --device mps
  --data-path $DATA --device cpu
did you mean resnet_pico
  --data-path $DATA --model resnet_pic
  --data-path $DATA --model resnet_pico
timm has no published weights for it; give a file
  --data-path $DATA --pretrained
  --data-path $DATA --finetune two.pth
leave the flag out, or use a plain student
  --data-path $DATA $TEACHER two.pth --distillation-head cls
  --data-path $DATA $TEACHER two.pth
  --data-path $DATA $TEACHER two.pth --distillation-head cls --model $PLAIN
use a student with one, such as deit_tiny_distilled_patch16_224, or --distillation-head cls
  --data-path $DATA $TEACHER two.pth --distillation-head dist --model $PLAIN
  --data-path $DATA $TEACHER two.pth --distillation-head dist
  --data-path $DATA $TEACHER two.pth --distillation-head cls --model $PLAIN
leave the flag out
  --data-path $DATA --grad-checkpointing --model resnet_pico
  --data-path $DATA --model resnet_pico
leave the flag out
  --data-path $DATA --attn-only --model resnet_pico
  --data-path $DATA --model resnet_pico
give one value for each of 1 teachers
  --data-path $DATA $TEACHER two.pth --teacher-input-size 32 32
  --data-path $DATA $TEACHER two.pth --teacher-input-size 32
give one of each for every teacher
  --data-path $DATA $TEACHER two.pth --teacher-weight 1 --teacher-weight 1
  --data-path $DATA $TEACHER two.pth --teacher-weight 1
  --data-path $DATA $TEACHER two.pth $SECOND two.pth --teacher-weight 1 --teacher-weight 1
set --teacher-input-size 48
  --data-path $DATA $TEACHER two_48.pth
  --data-path $DATA $TEACHER two_48.pth --teacher-input-size 48
train a teacher on them first
  --data-path $DATA $TEACHER other_names.pth
  --data-path $DATA $TEACHER two.pth
leave out --nb-classes
  --data-path $DATA $TEACHER named.pth --nb-classes 5
  --data-path $DATA $TEACHER named.pth
with --teacher-cache-mode write
  --data-path $DATA $TEACHER two.pth --teacher-cache none --teacher-cache-mode read
  --data-path $DATA $TEACHER two.pth --teacher-cache none --teacher-cache-mode write --epochs 1
holds other files; give a new folder
  --data-path $DATA $TEACHER two.pth --teacher-cache flat
  --data-path $DATA $TEACHER two.pth --teacher-cache new
give all, hard, or a number from 1 to 1
  --data-path $DATA $TEACHER two.pth --teacher-cache new2 --teacher-cache-topk 2
  --data-path $DATA $TEACHER two.pth --teacher-cache new2 --teacher-cache-topk 1
match the patches alone with tokens=patch
  --data-path $DATA $ONE_HEAD $TEACHER two.pth $MATCH,loss=hidden_mse
  --data-path $DATA $ONE_HEAD $TEACHER two.pth $MATCH,loss=hidden_mse,tokens=patch
use tokens=all, or feature=pooled
  --data-path $DATA $TEACHER two.pth $MATCH,loss=pkd,tokens=patch
  --data-path $DATA $TEACHER two.pth $MATCH,loss=pkd,tokens=all
match hidden instead
  --data-path $DATA $CNN cnn.pth --match feature=attention,loss=attention_mse,layer_S=1,layer_T=1
  --data-path $DATA $CNN cnn.pth $MATCH,loss=hidden_mse,tokens=patch,resize=bilinear,proj=linear
write auto to use that
  --data-path $DATA $TEACHER two.pth $MATCH,loss=hidden_mse,proj=linear:64:32
  --data-path $DATA $TEACHER two.pth $MATCH,loss=hidden_mse,proj=linear:64:auto
its layers are 0 to 4
  --data-path $DATA $TEACHER two.pth --match feature=hidden,loss=hidden_mse,layer_S=9,layer_T=1
  --data-path $DATA $TEACHER two.pth --match feature=hidden,loss=hidden_mse,layer_S=4,layer_T=1
there are 0 (
  --data-path $DATA $TEACHER two.pth $MATCH,loss=hidden_mse,teacher=2
  --data-path $DATA $TEACHER two.pth $MATCH,loss=hidden_mse,teacher=0
to start from its weights use --finetune
  --data-path $DATA --resume two.pth
  --data-path $DATA --finetune two.pth
if these are the first of them in this order, give --nb-classes 3
  --data-path $DATA --eval --resume three.pth
  --data-path $DATA --eval --resume three.pth --nb-classes 3
train a new head for the data with --finetune, without --eval
  --data-path $DATA --eval --resume one.pth
  --data-path $DATA --finetune one.pth
leave it out
  --data-path $DATA --eval --resume named.pth --nb-classes 5
  --data-path $DATA --eval --resume named.pth
set --input-size 48, or train at another size with --finetune
  --data-path $DATA --eval --resume two_48.pth
  --data-path $DATA --eval --resume two_48.pth --input-size 48
  --data-path $DATA --finetune two_48.pth
train a head with --finetune, without --eval
  --data-path $DATA --eval --resume headless.pth --model $PLAIN
  --data-path $DATA --finetune headless.pth --model $PLAIN
"""
MODEL, PLAIN = "deit_pico_distilled_patch8_32", "deit_pico_patch8_32"
SHORT |= {"$MODEL": MODEL, "$PLAIN": PLAIN}
SHORT["$ONE_HEAD"] = f"--model {PLAIN} --distillation-head cls"
SHORT["$CNN"] = "--distillation-type hard --teacher-model resnet_pico --teacher-path"
SHORT["$TEACHER"] = f"--distillation-type hard --teacher-model {MODEL} --teacher-path"
SHORT["$SECOND"] = f"--teacher-model {MODEL} --teacher-path"
SHORT["$MATCH"] = "--match feature=hidden,layer_S=1,layer_T=1"
SMALL = shlex.split(
    f"--model {MODEL} --batch-size 4 --epochs 1 --warmup-epochs 0 --num-workers 0 --no-model-ema "
    "--no-repeated-aug --aa none --mixup 0 --cutmix 0 --no-teacher-check --check"
)
FOLDERS = {  # which class folders of the images a folder has, and under which names
    "one_class": {"train/one": "train/one", "val/one": "val/one"},
    "train_alone": {"train/one": "train/one", "train/two": "train/two"},
    "two_named": {"train": "train", "valid": "val", "test": "val"},
    "renamed": {"train": "train", "valid": "val", "val": "val"},
    "val_alone": {"val": "val"},
    "flat": {"train": "train", "val": "val/one"},
    "no_image": {"train/one": "train/one", "train/two": "train/two", "val": "val"},
    "no_image_removed": {"train/one": "train/one", "train/two": "train/two", "val": "val"},
    "other_name": {"train": "train", "val/one": "val/one", "val/three": "val/two"},
    "removed": {"train": "train", "val/one": "val/one"},
}


def save(name: str, classes: int, *, model: str = MODEL, names: str = "", **options) -> None:
    """Write the random weights of a model, with the names of its classes if there are any."""
    content = {"model": timm.create_model(model, num_classes=classes, **options).state_dict()}
    torch.save(content | ({"classes": names.split()} if names else {}), name)


@pytest.fixture(scope="module")
def inputs(image_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """The folders and weights of the table are in the current folder."""
    before, folder = Path.cwd(), tmp_path_factory.mktemp("advice")
    for name, parts in FOLDERS.items():
        for part, target in parts.items():
            (folder / name / part).parent.mkdir(parents=True, exist_ok=True)
            (folder / name / part).symlink_to(image_folder / target)
    (folder / "flat/val").unlink()
    shutil.copytree(image_folder / "val/one", folder / "flat/val")
    rows = [f"{path.name},one" for path in sorted((folder / "flat/val").iterdir())]
    (folder / "flat/val.csv").write_text("\n".join(rows))
    (folder / "empty.csv").touch()
    (folder / "more.csv").write_text("\n".join([*rows, "absent.png,two"]))
    (folder / "fewer.csv").write_text("\n".join(rows[1:]))
    (folder / "bare.csv").write_text("\n".join(row.removesuffix(",one") for row in rows))
    (folder / "paths.txt").write_text("\n".join(f"flat/val/{row[:6]}" for row in rows))
    (folder / "no_image/train/three").mkdir()
    (folder / "no_image/train/three/notes.txt").write_text("no image")
    os.chdir(folder)
    torch.manual_seed(0)
    save("one.pth", 1)
    save("two.pth", 2)
    save("three.pth", 3)
    save("two_48.pth", 2, img_size=48)
    save("headless.pth", 0, model=PLAIN)
    save("named.pth", 2, names="one two")
    save("other_names.pth", 2, names="cat dog")
    save("cnn.pth", 2, model="resnet_pico")
    yield
    os.chdir(before)


@pytest.mark.parametrize(("advice", "before", "after"), rows(RUNS), ids=ids(RUNS))
def test_runs_are_accepted_once_the_advice_is_followed(
    advice, before, after, inputs, image_folder: Path, run_inside
) -> None:
    def run(flags: str) -> tuple[int, str]:
        own = words(flags.replace("$DATA", str(image_folder)))
        evaluates = [flag for flag in SMALL if flag != "--check" or "--eval" not in own]
        found = run_inside(*evaluates, *own)
        return found.returncode, found.stderr

    code, error = run(before)
    assert code == 2 and advice in error and after, error
    for flags in after:
        code, error = run(flags)
        assert code == 0, (flags, error)


# --- errors about the environment of processes -------------------------------------------------

ENVIRONMENTS = [
    ("unset it for a single process, or start with torchrun", {"RANK": "0"}),
    ("unset it for a single process, or start with torchrun", {"WORLD_SIZE": "2"}),
    ("unset it, or start with torchrun", {"RANK": "abc", "WORLD_SIZE": "2"}),
    ("unset it, or start with torchrun", {"SLURM_NTASKS": "x", "SLURM_STEP_ID": "0"}),
]
BY_TORCHRUN = {"RANK": "1", "LOCAL_RANK": "1", "WORLD_SIZE": "2"}


@pytest.mark.parametrize(("advice", "environ"), ENVIRONMENTS)
def test_an_environment_is_accepted_once_the_advice_is_followed(advice, environ) -> None:
    with pytest.raises(UserError) as error:
        find_launcher(environ)
    assert advice in error.value.line()
    assert find_launcher({}) == ("single", 0, 0, 1)  # all of them are unset
    assert find_launcher(environ | BY_TORCHRUN) == ("torchrun", 1, 1, 2)


# --- errors of the tools ------------------------------------------------------------------------

TOOLS = """
give --model
  export two.pth out
  export two.pth out --model $MODEL --formats safetensors
give the --output_dir of a run, or a file
  export flat out
  export two.pth out2 --model $MODEL --formats safetensors
give image files, folders or patterns
  predict two.pth nothing.png --model $MODEL
  predict two.pth flat/val/00.png --model $MODEL
  predict two.pth flat/val --model $MODEL
  predict two.pth flat/val/*.png --model $MODEL
give a whole number of at least 1
  predict two.pth flat/val/00.png --model $MODEL --batch-size 0
  predict two.pth flat/val/00.png --model $MODEL --batch-size 1
give a new folder
  prepare_data $DATA one_class --num-workers 0
  prepare_data $DATA packed --num-workers 0
"""
PROGRAMS = {"export": export.main, "predict": predict.main, "prepare_data": prepare_data.main}


@pytest.mark.parametrize(("advice", "before", "after"), rows(TOOLS), ids=ids(TOOLS))
def test_tools_accept_what_their_advice_asks_for(
    advice, before, after, inputs, image_folder: Path, capsys
) -> None:
    def run(flags: str) -> tuple[int, str]:
        name, *own = words(flags.replace("$DATA", str(image_folder)))
        try:
            code = PROGRAMS[name](own)
        except SystemExit as error:  # of argparse
            code = error.code
        return code, capsys.readouterr().err

    code, error = run(before)
    assert code == 2 and advice in error and after, error
    for flags in after:
        code, error = run(flags)
        assert code == 0, (flags, error)


# --- completeness ---------------------------------------------------------------------------------

ROOT = Path(__file__).resolve().parents[1]
PLACES = ("base", "checks", "data", "distill", "models", "tools", "training")
ADVICE = re.compile(
    r"(?:[;:,.] |or )(?:give|set|use|add|remove|choose|rename|leave|delete|unset|write|make|lower|"
    r"raise|train|try|change|compute|repeat|move|start|convert|match|take)\b[^;]*$"
)


def text_of(node: ast.AST) -> str:
    """Return the text of a message, with {} for each value in it."""
    if isinstance(node, ast.Constant):
        return str(node.value)
    if isinstance(node, ast.JoinedStr):
        return "".join(text_of(part) for part in node.values)
    return "{}"


def advice_of_messages() -> Iterator[tuple[str, str]]:
    """Yield file and advice of each message that tells the user to do something."""
    paths = [*ROOT.glob("*.py"), *(path for name in PLACES for path in (ROOT / name).glob("*.py"))]
    for path in sorted(paths):
        for node in ast.walk(ast.parse(path.read_text())):
            if not isinstance(node, ast.Call) or not node.args:
                continue
            if ast.unparse(node.func) not in ("UserError", "CorruptFile", "ArgumentTypeError"):
                continue
            if found := ADVICE.search(text_of(node.args[0])):
                yield str(path.relative_to(ROOT)), found[0]


def is_followed(advice: str) -> bool:
    """Return whether a row follows this advice, in which {} stands for any value."""
    followed = [row[0] for table in (FLAGS, RUNS, TOOLS) for row in rows(table)]
    followed += [words for words, _ in ENVIRONMENTS]
    pattern = ".*".join(map(re.escape, advice.lstrip(";:,. ").split("{}")))
    return any(each in advice or re.search(pattern, each) for each in followed)


# Messages about disks, GPUs, damaged files and Python calls, or that tests of their module follow
OTHERS = 55


def test_a_new_message_with_advice_needs_a_row() -> None:
    others = [found for found in advice_of_messages() if not is_followed(found[1])]
    assert len(others) <= OTHERS, others
