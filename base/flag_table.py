"""The table of all flags of main.py. A new flag is one row in its group.

The flags of DeiT's main.py keep their names, defaults and meanings. What is new has timm's name
where timm's train.py has one. Sizes are in pixels, times in epochs, unless the name says otherwise.
"""

import os
from argparse import ArgumentTypeError, Namespace
from typing import Any

import yaml

from base.distributed import find_launcher
from base.flags import (
    COMMON,
    COMPARED,
    FROM_0,
    FROM_1,
    MAY_CHANGE,
    MIXING,
    POSITIVE,
    SHARE,
    TRANSFORM,
    Flag,
    Idle,
    Range,
)

DATA_SETS = ("DIGITS", "CIFAR10", "CIFAR", "IMNET", "INAT", "INAT19", "PREPARED")
INAT_CATEGORIES = tuple(
    ["kingdom", "phylum", "class", "order", "supercategory", "family", "genus", "name"]
)
AMP = ("auto", "off", "bf16", "fp16")
TYPES = ("none", "soft", "hard")
CACHE_MODES = ("auto", "write", "read", "verify")
REDUCTIONS = ("numel", "batchmean")
CROPS = ("random", "bilinear", "bicubic")


# --- when a flag has no effect ----------------------------------------------------------------


def _distils(s: Namespace) -> bool:
    return s.distillation_type != "none"


def has_teacher(s: Namespace) -> bool:
    return _distils(s) or bool(s.match) or s.ranking_kl_weight > 0


def _has_several_teachers(s: Namespace) -> bool:
    return isinstance(s.teacher_model, list)


def _mixes(s: Namespace) -> bool:
    return s.mixup > 0 or s.cutmix > 0 or s.cutmix_minmax is not None


def _uses_randaugment(s: Namespace) -> bool:
    return s.aa not in ("", "none", None)


def no_effect(name: str, kind: Any, default: Any, why: str) -> Flag:
    """Return a flag of DeiT that is accepted and has no effect."""
    return Flag(name, kind, default, Idle(lambda s: True, why), MAY_CHANGE).help(
        f"no effect: {why}"
    )


NOT_SAVED = Idle(lambda s: not s.output_dir, "nothing is saved, because --output_dir is empty")
NO_TEACHER = Idle(lambda s: not has_teacher(s), "--distillation-type is none")
NO_DISTILLATION = Idle(lambda s: not _distils(s), "--distillation-type is none")
NO_CACHE = Idle(lambda s: not s.teacher_cache, "it belongs to --teacher-cache")
NO_RANKING = Idle(lambda s: not s.ranking_kl_weight, "--ranking-kl-weight is 0")
NO_MIXING = Idle(lambda s: not _mixes(s), "nothing is mixed")
NO_ERASING = Idle(lambda s: s.ThreeAugment or s.reprob == 0, "nothing is erased")
NO_AVERAGE = Idle(lambda s: not s.model_ema, "there is no average")
NOT_COMPILED = Idle(lambda s: s.eval, "evaluation is not compiled")
NO_RESUME = Idle(lambda s: not s.resume, "it belongs to --resume")
RESUMES = Idle(lambda s: s.resume, "the checkpoint has its epoch")
ONE_PROCESS = Idle(lambda s: find_launcher(os.environ)[3] == 1, "there is one process")
WEIGHTS_RESUMED = Idle(lambda s: s.resume, "--resume brings its own weights")
NO_BACKWARD = Idle(lambda s: s.eval, "evaluation keeps nothing for a backward pass")
ONE_TEACHER = Idle(lambda s: not _has_several_teachers(s), "there is one teacher")
ONE_TERM = Idle(lambda s: not (_has_several_teachers(s) and _distils(s)), "one teacher's logits")
NO_TEMPERATURE = Idle(lambda s: s.distillation_type != "soft", "only soft has a temperature")
NO_REDUCTION = Idle(lambda s: s.distillation_type != "soft" or s.kd_loss_type, "only soft has it")
NO_SCHEDULE = Idle(lambda s: s.temperature_scheduler == "none", "no temperature is scheduled")
NO_PLATEAU = Idle(lambda s: s.sched != "plateau", "it belongs to --sched plateau")
AA = Idle(lambda s: _uses_randaugment(s) and not s.ThreeAugment, "timm omits it if --aa is set")
THREE_AUGMENT = Idle(lambda s: s.ThreeAugment, "--ThreeAugment replaces it")
ONLY_EVALUATES = Idle(lambda s: s.eval, "nothing trains")
HARD_TARGETS = Idle(lambda s: s.cosub and not _mixes(s), "--cosub uses hard targets")
NO_THREE_AUGMENT = Idle(lambda s: s.src and not s.ThreeAugment, "it belongs to --ThreeAugment")
ONE_MIXING = Idle(lambda s: not (s.mixup > 0 and s.cutmix > 0), "only one kind of mixing")
COSUB_IS_BCE = Idle(lambda s: s.cosub, "--cosub always is binary cross entropy")
NOT_DIGITS = Idle(lambda s: s.data_set != "DIGITS", "only for the embedded digits")
NOT_INAT = Idle(lambda s: s.data_set not in ("INAT", "INAT19"), "only for INAT and INAT19")
NOT_IMNET = Idle(lambda s: s.data_set != "IMNET", "only for folders of images (IMNET)")
NO_UNLABELLED = Idle(
    lambda s: s.eval or not (s.unlabelled_path or s.labels_per_class), "all images have labels"
)
NO_WORKERS = Idle(lambda s: s.num_workers == 0, "there are no workers")


# --- types of values --------------------------------------------------------------------------


def key_value(word: str) -> tuple[str, Any]:
    """Return a KEY=VALUE word as a pair, the value as a plain one (YAML)."""
    key, equals, value = word.partition("=")
    if not (key and equals):
        raise ArgumentTypeError(f"{word}: give KEY=VALUE")
    return key, yaml.safe_load(value)


def schedule(text: str) -> str | list[Any]:
    """Return `name` as it is, and `name:1:2` as ["name", 1.0, 2.0], which the registries take."""
    name, *values = text.split(":")
    return [name, *map(float, values)] if values else name


# --- the table --------------------------------------------------------------------------------

RUN = (
    Flag("--recipe", str, "auto", MAY_CHANGE, COMMON, metavar="NAME").help(
        "auto: suits small data; none: DeiT's defaults; a published run or YAML file (recipes/)"
    ),
    Flag("--dry-run", bool, False, MAY_CHANGE, COMMON).help("print settings, sizes and time; exit"),
    Flag("--check", bool, False, MAY_CHANGE, COMMON).help("check the run and exit"),
    Flag("--batch-size", int, 64, FROM_1, MIXING, COMPARED, COMMON).help(
        "images per process and micro-step"
    ),
    Flag("--epochs", int, 300, FROM_0, MAY_CHANGE, COMPARED, COMMON).help("epochs to train"),
    Flag("--minutes", float, None, POSITIVE, MAY_CHANGE, COMMON, metavar="M").help(
        "instead of --epochs: minutes from the start to the last checkpoint"
    ),
    Flag("--val-interval", int, 1, FROM_1, MAY_CHANGE).help(
        "epochs between two evaluations, each with a checkpoint; the last epoch has one"
    ),
    Flag("--grad-accum-steps", int, 1, FROM_1, COMPARED).help("micro-steps per update"),
    Flag("--amp", str, "auto", choices=AMP).help("mixed precision; auto: on a GPU"),
    Flag(
        "--torchcompile", str, "", NOT_COMPILED, nargs="?", const="inductor", metavar="BACKEND"
    ).help("compile student and teacher in training; inductor if no backend"),
    Flag("--cudnn-benchmark", bool, True, MAY_CHANGE).help(
        "on a GPU: fastest kernels, and TF32", off="on a GPU: repeatable, slower"
    ),
    Flag("--device", str, "auto", MAY_CHANGE).help("auto, cpu or cuda"),
    Flag("--seed", int, 0, COMPARED).help("seed of all random numbers"),
    Flag("--output-dir", str, "", MAY_CHANGE, COMMON).help(
        "folder of the run; default: runs/<data>-<model>-<date>; '': nothing is saved"
    ),
    Flag("--resume", str, "", MAY_CHANGE, COMMON).help("checkpoint: file, URL, auto or auto:FILE"),
    Flag("--resume-anyway", bool, False, NO_RESUME, MAY_CHANGE).help("ignore changed settings"),
    Flag("--checkpoint-steps", int, 0, FROM_0, NOT_SAVED, MAY_CHANGE).help(
        "updates between two checkpoints; 0: off"
    ),
    Flag("--checkpoint-minutes", float, 30.0, FROM_0, NOT_SAVED, MAY_CHANGE).help(
        "minutes between two checkpoints, besides the one of every epoch; 0: off"
    ),
    Flag("--keep-checkpoints", int, 2, FROM_1, NOT_SAVED, MAY_CHANGE).help(
        "number of newest checkpoints to keep; the best is kept too"
    ),
    Flag("--start-epoch", int, 0, FROM_0, RESUMES, MAY_CHANGE).help(
        "first epoch; a resumed run continues from its checkpoint"
    ),
    Flag("--eval", bool, False, MAY_CHANGE, COMMON).help("evaluate and exit"),
    Flag(
        "--list-models", str, None, MAY_CHANGE, COMMON, nargs="?", const="*", metavar="PATTERN"
    ).help("print matching released checkpoints; exit"),
    Flag("--log-interval", int, 10, FROM_1, MAY_CHANGE).help("steps between two printed lines"),
    Flag("--log-wandb", bool, False, NOT_SAVED, MAY_CHANGE).help(
        "also log to Weights & Biases (pip install wandb)"
    ),
    Flag("--log-mlflow", bool, False, NOT_SAVED, MAY_CHANGE).help(
        "also log to MLflow (pip install mlflow-skinny sqlalchemy alembic)"
    ),
    Flag("--max-bad-steps", int, 10, FROM_1, MAY_CHANGE).help("most non-finite updates in a row"),
    no_effect("--dist-eval", bool, False, "evaluation is always sharded and exact"),
    no_effect("--world-size", int, 1, "the launcher decides"),
    Flag("--dist-url", str, "env://", MAY_CHANGE).help("address at which the processes connect"),
    Flag(
        "--dist-timeout", float, 30.0, Range(0.01, 1e5), ONE_PROCESS, MAY_CHANGE, metavar="MIN"
    ).help("minutes that the processes wait for one another before the run ends"),
    Flag("--local-rank", int, None, MAY_CHANGE).help("no effect: a launcher passes it"),
    no_effect("--distributed", bool, False, "the launcher decides"),
)

STUDENT = (
    Flag("--model", str, "deit_base_patch16_224", COMPARED, COMMON).help(
        "student: a model name of timm or of this repository"
    ),
    Flag("--nb-classes", int, None, FROM_1).help("classes; default: counted"),
    Flag("--input-size", int, None, FROM_1, COMPARED, COMMON, nargs="+", metavar="PX").help(
        "side, or height and width; default: the model's"
    ),
    Flag("--pretrained", bool, False, MAY_CHANGE, COMMON).help("start from the published weights"),
    Flag("--finetune", str, "", WEIGHTS_RESUMED, MAY_CHANGE, COMMON).help(
        "initial weights: file or URL; the head may differ"
    ),
    Flag("--attn-only", bool, False).help("train attention, heads and position embedding only"),
    Flag("--mean", float, None, nargs=3).help("mean per channel; default: the model's"),
    Flag("--std", float, None, nargs=3).help("deviation per channel; default: the model's"),
    Flag("--interpolation", str, None).help("of the evaluation resize; default: the model's"),
    Flag("--grad-checkpointing", bool, False, NO_BACKWARD).help(
        "recompute blocks in the backward pass: less memory, a third more work"
    ),
    Flag("--train-mode", bool, True).help(
        "train in training mode",
        off="no dropout or stochastic depth in training, as DeiT's fine-tuning",
    ),
)

REGULARIZATION = (
    Flag("--drop", float, 0.0, SHARE).help("dropout probability"),
    Flag("--drop-path", float, 0.1, SHARE, COMPARED).help("stochastic depth probability"),
)

DISTILLATION = (
    Flag(
        "--teacher-model", str, "regnety_160", NO_TEACHER, COMPARED, COMMON, repeat="several"
    ).help("timm name, hf-hub: or local-dir:; repeatable"),
    Flag("--teacher-path", str, "", NO_TEACHER, MAY_CHANGE, COMMON, repeat="several").help(
        "its weights: file or URL; empty: timm's pretrained"
    ),
    Flag("--teacher-input-size", int, None, FROM_1, NO_TEACHER, TRANSFORM, nargs="+").help(
        "sides of the teachers' images; default: their files' own"
    ),
    Flag("--teacher-weight", float, None, ONE_TEACHER, repeat="list").help(
        "share of a teacher among several; 0: it is only matched; default: equal"
    ),
    Flag("--teacher-amp", str, "auto", NO_TEACHER, choices=AMP).help(
        "precision of the teacher; auto: as --amp; half precision also folds BatchNorm"
    ),
    Flag("--teacher-logits", str, "mean", ONE_TERM, choices=("mean", "apart")).help(
        "of several teachers: one term of the mean, or a term each"
    ),
    Flag("--distillation-type", str, "none", COMPARED, COMMON, choices=TYPES).help(
        "loss of the teacher's logits"
    ),
    Flag("--distillation-alpha", float, 0.5, SHARE, NO_DISTILLATION, COMPARED, COMMON).help(
        "weight: (1 - alpha) * base + alpha * distillation"
    ),
    Flag("--distillation-tau", float, 1.0, POSITIVE, NO_TEMPERATURE, COMPARED, COMMON).help(
        "temperature of soft distillation"
    ),
    Flag("--distillation-head", str, "auto", NO_DISTILLATION, choices=("auto", "dist", "cls")).help(
        "distilled head; auto: the distillation head if there is one"
    ),
    Flag("--distillation-reduction", str, "numel", NO_REDUCTION, COMPARED, choices=REDUCTIONS).help(
        "soft: numel is DeiT's mean over B*C, batchmean Hinton's over B"
    ),
    Flag("--teacher-check", bool, True, NO_DISTILLATION, MAY_CHANGE).help(
        "print the teacher's accuracy at the start", off="do not print the teacher's accuracy"
    ),
    Flag("--teacher-cache", str, "", MAY_CHANGE, COMMON, metavar="DIR").help(
        "folder of cached teacher logits"
    ),
    Flag("--teacher-cache-mode", str, "auto", NO_CACHE, MAY_CHANGE, choices=CACHE_MODES).help(
        "auto: read and complete; write: fill, stop; read: no teacher; verify: compare, stop"
    ),
    Flag("--teacher-cache-views", int, 0, FROM_0, NO_CACHE, metavar="V").help(
        "epochs after which augmentation and mixing repeat; 0: the cache's own, or --epochs"
    ),
    Flag("--teacher-cache-topk", str, "all", NO_CACHE).help(
        "all logits, the K largest probabilities, or hard: the most probable class"
    ),
    Flag("--cosub", bool, False).help("co-train two submodels instead of a teacher"),
)

OBJECTIVE = (
    Flag("--match", str, [], COMPARED, repeat="list", metavar="KEY=VALUE,...").help(
        "feature match: layer_S=6,layer_T=12,feature=hidden,loss=cos,proj=linear; repeatable"
    ),
    Flag("--distill-config", str, "").help("TextBrewer's DistillationConfig, .json or .yaml"),
    Flag("--plugin", str, [], repeat="list", metavar="FILE.py").help(
        "Python file that adds losses, projections, schedules or adaptors by name; repeatable"
    ),
    Flag("--student-adaptor", str, "").help("adaptor of a student without known taps"),
    Flag("--teacher-adaptor", str, "").help("adaptor of a teacher without known taps"),
    Flag("--kd-loss-type", str, "").help("soft: ce, mse or dist instead of DeiT's divergence"),
    Flag("--kd-loss-weight", float, None, FROM_0, NO_DISTILLATION).help(
        "weight of the distillation term; default: --distillation-alpha"
    ),
    Flag("--hard-label-weight", float, None, FROM_0).help(
        "weight of the labels' term; default: 1 - --distillation-alpha"
    ),
    Flag("--kd-loss-weight-scheduler", str, "none").help("linear_decay or linear_growth"),
    Flag("--hard-label-weight-scheduler", str, "none").help("linear_decay or linear_growth"),
    Flag("--temperature-scheduler", schedule, "none").help(
        "constant, flsw:BETA:GAMMA or cwsm:BETA, with --kd-loss-type"
    ),
    Flag("--temperature-min", float, 0.1, POSITIVE, NO_SCHEDULE).help("smallest temperature"),
    Flag("--probability-shift", bool, False).help(
        "swap the teacher's largest logit with the label's", off="do not swap logits"
    ),
    Flag("--logit-standardization", bool, False).help(
        "soft: z-score of the logits of both networks", off="use the logits as they are"
    ),
    Flag("--ranking-kl-weight", float, 0.0, FROM_0).help("weight of the ranking term"),
    Flag("--ranking-similarity", str, "cos", NO_RANKING, choices=("cos", "dot")).help(
        "similarity of two images"
    ),
    Flag("--ranking-tau", float, 1.0, POSITIVE, NO_RANKING).help("temperature of the similarities"),
    Flag("--ranking-gather", bool, False, NO_RANKING).help(
        "compare the images of all processes", off="compare the images of one process"
    ),
)

OPTIMIZER = (
    Flag("--opt", str, "adamw", COMPARED).help("timm's name of the optimizer"),
    Flag("--opt-eps", float, 1e-8).help("epsilon of the optimizer"),
    Flag("--opt-betas", float, None, nargs="+").help("betas; default: the optimizer's own"),
    Flag("--opt-kwargs", key_value, {}, nargs="+", repeat="merge", metavar="KEY=VALUE").help(
        "more options of the optimizer, such as fused=False"
    ),
    Flag("--clip-grad", float, None).help("largest gradient norm; 0 or less: off"),
    Flag("--momentum", float, 0.9, SHARE).help("momentum of SGD and similar optimizers"),
    Flag("--weight-decay", float, 0.05, FROM_0, COMPARED).help("weight decay"),
    Flag("--layer-decay", float, None, SHARE).help("learning rate factor per layer down"),
    Flag("--sched", str, "cosine").help("timm's name of the learning-rate schedule"),
    Flag("--lr", float, 5e-4, FROM_0, COMPARED, COMMON).help("learning rate at batch 512"),
    Flag("--unscale-lr", bool, False).help(
        "use --lr as it is, whatever the batch", off="scale --lr by effective batch / 512"
    ),
    Flag("--lr-noise", float, None, nargs="+").help("epochs (as fractions) with lr noise"),
    Flag("--lr-noise-pct", float, 0.67).help("largest noise, as a share of the learning rate"),
    Flag("--lr-noise-std", float, 1.0).help("standard deviation of the noise"),
    Flag("--warmup-lr", float, 1e-6).help("learning rate at the start; not scaled with the batch"),
    Flag("--min-lr", float, 1e-5).help("learning rate at the end; not scaled with the batch"),
    Flag("--decay-epochs", float, 30).help("epochs between two steps of the step schedule"),
    Flag("--warmup-epochs", int, 5, FROM_0).help("epochs of linear warm-up"),
    no_effect("--cooldown-epochs", int, 10, "the schedule ends with --epochs"),
    Flag("--patience-epochs", int, 10, NO_PLATEAU).help("plateau: epochs without gain"),
    Flag("--decay-rate", float, 0.1, aliases=("--dr",)).help("factor of one decay"),
    Flag("--sched-on-updates", bool, True).help(
        "change the learning rate per update", off="change the learning rate per epoch, as DeiT"
    ),
    Flag("--model-ema", bool, True).help("average the weights (EMA)", off="keep no average"),
    Flag("--model-ema-decay", float, 0.99996, SHARE, NO_AVERAGE).help("decay per update"),
    Flag("--model-ema-force-cpu", bool, False, NO_AVERAGE).help("keep the average on the CPU"),
    Flag("--model-ema-warmup", bool, True, NO_AVERAGE).help(
        "shorter average at the start", off="constant decay, as DeiT"
    ),
)

AUGMENTATION = (
    Flag("--color-jitter", float, 0.3, FROM_0, AA, TRANSFORM).help("strength of colour jitter"),
    Flag("--aa", str, "rand-m9-mstd0.5-inc1", THREE_AUGMENT, TRANSFORM, COMPARED).help(
        "AutoAugment policy; '' or none: off"
    ),
    Flag(
        "--augment-on", str, "worker", ONLY_EVALUATES, TRANSFORM, choices=("worker", "device")
    ).help("where images are augmented after crop and flip"),
    Flag("--smoothing", float, 0.1, SHARE, HARD_TARGETS, COMPARED).help("label smoothing"),
    Flag("--train-interpolation", str, "bicubic", THREE_AUGMENT, TRANSFORM, choices=CROPS).help(
        "interpolation of the training crop"
    ),
    Flag("--repeated-aug", bool, True).help(
        "three views of an image in an epoch", off="one view of an image in an epoch"
    ),
    Flag("--ThreeAugment", bool, False, TRANSFORM).help("DeiT III's augmentation", off="use --aa"),
    Flag("--src", bool, False, NO_THREE_AUGMENT, TRANSFORM).help(
        "simple random crop, with --ThreeAugment", off="random resized crop"
    ),
    Flag("--reprob", float, 0.25, SHARE, THREE_AUGMENT, TRANSFORM, COMPARED).help(
        "random erasing probability"
    ),
    Flag("--remode", str, "pixel", NO_ERASING, TRANSFORM, choices=("pixel", "rand", "const")).help(
        "fill of erased areas"
    ),
    Flag("--recount", int, 1, NO_ERASING, TRANSFORM).help("erased areas per image"),
    no_effect("--resplit", bool, False, "DeiT never used it either"),
    Flag("--mixup", float, 0.8, FROM_0, MIXING, COMPARED).help("mixup alpha; 0: off"),
    Flag("--cutmix", float, 1.0, FROM_0, MIXING, COMPARED).help("CutMix alpha; 0: off"),
    Flag("--cutmix-minmax", float, None, MIXING, nargs="+").help(
        "smallest and largest side of a CutMix box, as shares of the image"
    ),
    Flag("--mixup-prob", float, 1.0, SHARE, NO_MIXING, MIXING).help("share of mixed batches"),
    Flag("--mixup-switch-prob", float, 0.5, SHARE, ONE_MIXING, MIXING).help("share of CutMix"),
    Flag("--mixup-mode", str, "batch", NO_MIXING, MIXING, choices=("batch", "pair", "elem")).help(
        "one mixing for a batch, a pair or each image"
    ),
    Flag("--bce-loss", bool, False, COSUB_IS_BCE).help("binary, as DeiT III", off="cross entropy"),
)

DATA = (
    Flag("--data-path", str, "", MAY_CHANGE, COMMON).help("image folder; empty: digits"),
    Flag("--data-set", str, None, COMMON).help(
        f"{', '.join(DATA_SETS)}, or a name of timm; default: IMNET, or DIGITS without --data-path"
    ),
    Flag(
        "--unlabelled-path", str, [], ONLY_EVALUATES, MAY_CHANGE, repeat="list", metavar="PATH"
    ).help("images for the teacher alone: folder, tar files or text file of paths; repeatable"),
    Flag("--unlabelled-ratio", float, None, POSITIVE, NO_UNLABELLED, metavar="R").help(
        "unlabelled images for each labelled one in an epoch; default: every image once"
    ),
    Flag("--labels-per-class", int, 0, FROM_0, ONLY_EVALUATES, metavar="N").help(
        "labels to use of each class, the other images are unlabelled; 0: all"
    ),
    Flag("--val-split", str, "test", NOT_DIGITS, choices=("test", "dev")).help(
        "of the embedded digits: the split to evaluate; tune on dev"
    ),
    Flag("--val-fraction", float, None, Range(0, 1, above=True), NOT_IMNET, metavar="SHARE").help(
        "share of each class to hold out if there is no validation folder; default: 0.2; --eval: "
        "that of the run"
    ),
    Flag("--val-labels", str, "", NOT_IMNET, MAY_CHANGE, metavar="FILE").help(
        "classes of a validation folder without class folders: CSV name,class, Kaggle's "
        "LOC_val_solution.csv, or the ground truth of ImageNet's development kit"
    ),
    Flag("--inat-category", str, "name", NOT_INAT, choices=INAT_CATEGORIES).help("labels of INAT"),
    Flag("--eval-crop-ratio", float, None, FROM_0, aliases=("--crop-pct",)).help(
        "crop of the evaluation; default: the model's own, 0.875 for DeiT's"
    ),
    Flag("--num-workers", int, None, FROM_0, MAY_CHANGE).help(
        "workers; default: by the number of cores"
    ),
    Flag("--loader-timeout", float, 20.0, FROM_0, NO_WORKERS, MAY_CHANGE, metavar="MIN").help(
        "minutes that a worker may take for a batch before the run ends; 0: no limit"
    ),
    Flag("--on-bad-image", str, "fail", TRANSFORM, choices=("fail", "skip")).help(
        "what to do with an unreadable image"
    ),
    Flag("--pin-mem", bool, True, MAY_CHANGE).help("page-locked batches", off="pageable batches"),
)

GROUPS: dict[str, tuple[Flag, ...]] = {
    "run": RUN,
    "student": STUDENT,
    "regularization": REGULARIZATION,
    "distillation": DISTILLATION,
    "what to match beside the labels": OBJECTIVE,
    "optimizer, schedule and EMA": OPTIMIZER,
    "augmentation and mixing": AUGMENTATION,
    "data": DATA,
}
FLAGS = tuple(flag for flags in GROUPS.values() for flag in flags)
BY_DEST = {flag.dest: flag for flag in FLAGS}


def with_fact(fact: str) -> tuple[str, ...]:
    """Return the settings, by destination name, of the flags with a fact such as MAY_CHANGE."""
    return tuple(flag.dest for flag in FLAGS if fact in flag.facts)
