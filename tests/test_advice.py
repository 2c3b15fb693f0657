"""The advice in error messages works: whoever follows it does not get another error."""

import shlex
from pathlib import Path

import pytest

import options
from base.errors import UserError

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
