"""The command line: every flag, its default, and which of them cannot go together.

The flags of DeiT's main.py keep their names, defaults and meanings, in `-` and `_` spellings, and
prefixes (`--batch`) work. What is new takes timm's name where timm's train.py has one.
`parse_args` is the only place that decides a value; nobody writes to its result.
"""

import argparse
import difflib
import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml

import matching
from base.distributed import find_launcher
from base.errors import UserError
from data.transforms import is_mixing
from models import plugins
from training import recipe
from training.checkpointer import is_auto

QUICK_START = recipe.FOLDER / "quickstart.yaml"
DATA_SETS = ("DIGITS", "CIFAR10", "CIFAR", "IMNET", "INAT", "INAT19", "PREPARED")
INAT_CATEGORIES = [
    "kingdom",
    "phylum",
    "class",
    "order",
    "supercategory",
    "family",
    "genus",
    "name",
]


class Parser(argparse.ArgumentParser):
    """argparse in which `--num_workers` and `--num-workers` are one flag."""

    def parse_known_args(self, args=None, namespace=None):  # type: ignore[no-untyped-def]
        if args is None:
            import sys

            args = sys.argv[1:]
        return super().parse_known_args([_dashed(word) for word in args], namespace)

    def error(self, message: str) -> None:  # type: ignore[override]
        unknown = message.removeprefix("unrecognized arguments: ").split()
        if message.startswith("unrecognized") and unknown[0].startswith("-"):
            known = [name for action in self._actions for name in action.option_strings]
            close = difflib.get_close_matches(unknown[0].split("=")[0], known, n=3)
            if close:
                message = f"{message}; did you mean {' or '.join(close)}?"
        raise UserError(message)


class Repeatable(argparse.Action):
    """A flag whose single value stays as it is, and whose repetitions make a list."""

    def __call__(self, parser, namespace, value, option_string=None):  # type: ignore[no-untyped-def]
        owner, given = getattr(self, "_given", (None, []))
        given = [*given, value] if owner is namespace else [value]
        self._given = (namespace, given)
        setattr(namespace, self.dest, value if len(given) == 1 else given)


class Settings(argparse.Action):
    """A flag of KEY=VALUE words, which become a dictionary."""

    def __call__(self, parser, namespace, values, option_string=None):  # type: ignore[no-untyped-def]
        setattr(namespace, self.dest, getattr(namespace, self.dest, {}) | dict(values))


def _setting(word: str) -> tuple[str, Any]:
    """Return a KEY=VALUE word as a pair, the value as a plain one (yaml)."""
    key, equals, value = word.partition("=")
    if not (key and equals):
        raise argparse.ArgumentTypeError(f"{word}: give KEY=VALUE")
    return key, yaml.safe_load(value)


def _dashed(word: str) -> str:
    if not word.startswith("--"):
        return word
    name, equals, value = word.partition("=")
    return name.replace("_", "-") + equals + value


@dataclass(frozen=True)
class Options:
    """What `parse_args` found: the settings, where they came from, and what to tell the user.

    notes: what may not be what the user wants; about: what a recipe brings along.
    """

    args: argparse.Namespace
    explicit: frozenset[str]
    notes: tuple[str, ...]
    about: tuple[str, ...] = ()


def get_args_parser() -> argparse.ArgumentParser:
    """Return DeiT's parser, plus ours. Sizes in pixels, times in epochs unless the name says."""
    parser = Parser("Train, distil and evaluate vision transformers", add_help=False)
    _add_run_flags(parser.add_argument_group("run"))
    _add_model_flags(parser.add_argument_group("student"))
    _add_distillation_flags(parser.add_argument_group("distillation"))
    _add_objective_flags(parser.add_argument_group("what to match beside the labels"))
    _add_optimizer_flags(parser.add_argument_group("optimizer, schedule and EMA"))
    _add_augmentation_flags(parser.add_argument_group("augmentation and mixing"))
    _add_data_flags(parser.add_argument_group("data"))
    return parser


def _switch(group: Any, name: str, default: bool, help_on: str, help_off: str = "") -> None:
    dest = name.replace("-", "_")
    group.add_argument(f"--{name}", action="store_true", dest=dest, help=help_on)
    group.add_argument(f"--no-{name}", action="store_false", dest=dest, help=help_off or "off")
    group.set_defaults(**{dest: default})


def _add_run_flags(group: Any) -> None:
    add = group.add_argument
    add(
        "--recipe",
        default="",
        metavar="NAME",
        help=f"a published run or a YAML file, under the flags: {', '.join(recipe.names())}",
    )
    add(
        "--dry-run",
        action="store_true",
        help="print what a run would be: settings, sizes, memory, time; train nothing",
    )
    add("--check", action="store_true", help="examine student and teacher, and exit")
    add("--batch-size", default=64, type=int, help="images per process and micro-step")
    add("--epochs", default=300, type=int)
    add("--grad-accum-steps", default=1, type=int, help="micro-steps per optimizer update")
    add(
        "--amp",
        default="auto",
        choices=("auto", "off", "bf16", "fp16"),
        help="auto: bf16 (else fp16) on a GPU, off on a CPU",
    )
    add(
        "--torchcompile",
        nargs="?",
        const="inductor",
        default="",
        metavar="BACKEND",
        help="compile student and teacher in training; inductor if no backend",
    )
    add("--device", default="auto", help="auto, cpu or cuda")
    add("--seed", default=0, type=int)
    add("--output-dir", default="", help="checkpoints, log.txt, TensorBoard; empty: save nothing")
    add(
        "--resume",
        default="",
        help="checkpoint to go on from, or to evaluate: file, URL, or "
        "auto: the newest good one in --output_dir, auto:FILE: or else that file",
    )
    add("--resume-anyway", action="store_true", help="go on although settings have changed")
    add("--checkpoint-steps", default=0, type=int, help="updates between two checkpoints; 0: off")
    add(
        "--checkpoint-minutes",
        default=30.0,
        type=float,
        help="minutes between two checkpoints, besides the one of every epoch; 0: off",
    )
    add("--keep-checkpoints", default=2, type=int, help="the last so many; the best besides")
    add("--start-epoch", default=0, type=int, help="first epoch; a resumed run knows its own")
    add("--eval", action="store_true", help="evaluate and exit")
    add(
        "--list-models",
        nargs="?",
        const="*",
        metavar="PATTERN",
        help="print the released checkpoints and exit: a part of the name, or *, ?",
    )
    add("--log-interval", default=10, type=int, help="steps between two printed lines")
    add(
        "--max-bad-steps",
        default=10,
        type=int,
        help="updates in a row with a non-finite loss before the run stops",
    )
    add("--dist-eval", action="store_true", help="always on: evaluation is sharded and exact")
    add("--world-size", default=1, type=int, help="no effect: the launcher says")
    add("--dist-url", default="env://", help="how the processes find each other")
    add(
        "--dist-timeout",
        default=30.0,
        type=float,
        metavar="MIN",
        help="minutes that the processes wait for one another before the run ends",
    )
    add("--distributed", action="store_true", help="no effect: the launcher says")


def _add_model_flags(group: Any) -> None:
    add = group.add_argument
    add("--model", default="deit_base_patch16_224", help="any name timm knows, ours included")
    add("--nb-classes", default=None, type=int, help="default: counted in the data")
    add(
        "--input-size",
        default=None,
        type=int,
        nargs="+",
        metavar="PX",
        help="one side, or height and width; default: the model's own",
    )
    add("--drop", default=0.0, type=float, help="dropout")
    add("--drop-path", default=0.1, type=float, help="stochastic depth")
    add("--pretrained", action="store_true", help="start from the published weights")
    add("--finetune", default="", help="start from this file or URL; head and grid may differ")
    add(
        "--attn-only",
        action="store_true",
        help="train attention, heads and position embedding only",
    )
    add("--mean", default=None, type=float, nargs=3, help="of the input; default: the model's")
    add("--std", default=None, type=float, nargs=3, help="of the input; default: the model's")
    add("--interpolation", default=None, help="of the evaluation resize; default: the model's")
    add(
        "--grad-checkpointing",
        action="store_true",
        help="compute blocks twice: less memory, a third more work",
    )
    _switch(
        group,
        "train-mode",
        True,
        "train in training mode",
        "freeze dropout and stochastic depth, as DeiT's fine-tuning did",
    )


def _add_distillation_flags(group: Any) -> None:
    add = group.add_argument
    add(
        "--teacher-model",
        default="regnety_160",
        action=Repeatable,
        help="timm name, hf-hub: or local-dir: source; repeat for several",
    )
    add(
        "--teacher-path",
        default="",
        action=Repeatable,
        help="its weights: file or URL; empty: timm's pretrained",
    )
    add(
        "--teacher-weight",
        default=None,
        type=float,
        action="append",
        help="share of a teacher among several; 0: it is only matched; default: equal",
    )
    add(
        "--teacher-amp",
        default="auto",
        choices=("auto", "off", "bf16", "fp16"),
        help="auto: as --amp; half precision also folds BatchNorm",
    )
    add(
        "--teacher-logits",
        default="mean",
        choices=("mean", "apart"),
        help="of several: one term of the mean, or a term each",
    )
    add("--distillation-type", default="none", choices=("none", "soft", "hard"))
    add(
        "--distillation-alpha",
        default=0.5,
        type=float,
        help="loss = (1 - alpha) * base + alpha * distillation",
    )
    add("--distillation-tau", default=1.0, type=float, help="temperature of soft distillation")
    add(
        "--distillation-head",
        default="auto",
        choices=("auto", "dist", "cls"),
        help="auto: the distillation head where there is one",
    )
    add(
        "--distillation-reduction",
        default="numel",
        choices=("numel", "batchmean"),
        help="soft: numel is DeiT's (over B*C), batchmean Hinton's (over B)",
    )
    _switch(group, "teacher-check", True, "print the teacher's accuracy at the start", "skip it")
    add(
        "--teacher-cache",
        default="",
        metavar="DIR",
        help="keep the teacher's answers there, and read them in later runs",
    )
    add(
        "--teacher-cache-mode",
        default="auto",
        choices=("auto", "write", "read", "verify"),
        help="auto: read what is there, write what is not; write: fill it and stop; read: "
        "no teacher is loaded; verify: compare it with the teacher and stop",
    )
    add(
        "--teacher-cache-views",
        default=0,
        type=int,
        metavar="V",
        help="epochs after which augmentation and mixing come again; 0: the cache's, or --epochs",
    )
    add(
        "--teacher-cache-topk",
        default="all",
        help="all logits, the K largest probabilities, or hard: the likeliest class",
    )
    add("--cosub", action="store_true", help="co-train two submodels instead of a teacher")


def _add_objective_flags(group: Any) -> None:
    add = group.add_argument
    add(
        "--match",
        default=[],
        action="append",
        metavar="KEY=VALUE,...",
        help="layer_S=6,layer_T=12,feature=hidden,loss=cos,proj=linear; repeatable",
    )
    add("--distill-config", default="", help="TextBrewer's DistillationConfig, .json or .yaml")
    add(
        "--plugin",
        default=[],
        action="append",
        metavar="FILE.py",
        help="adds losses, projections, schedules or adaptors by name; repeatable",
    )
    add("--student-adaptor", default="", help="reads the output of a student the taps do not know")
    add("--teacher-adaptor", default="", help="reads the output of such a teacher")
    add("--kd-loss-type", default="", help="soft: ce, mse or dist instead of DeiT's divergence")
    add("--kd-loss-weight", default=None, type=float, help="default: --distillation-alpha")
    add("--hard-label-weight", default=None, type=float, help="default: 1 - --distillation-alpha")
    for name in ("kd-loss-weight", "hard-label-weight"):
        add(f"--{name}-scheduler", default="none", help="linear_decay or linear_growth replaces it")
    add(
        "--temperature-scheduler",
        default="none",
        type=matching.read_schedule,
        help="constant, flsw:BETA:GAMMA or cwsm:BETA, with --kd-loss-type",
    )
    add("--temperature-min", default=0.1, type=float, help="floor of scheduled temperatures")
    _switch(group, "probability-shift", False, "swap the teacher's top logit with the label's")
    _switch(group, "logit-standardization", False, "soft: z-score both sides' logits")
    add("--ranking-kl-weight", default=0.0, type=float, help="of the images' similarities")
    add("--ranking-similarity", default="cos", choices=("cos", "dot"))
    add("--ranking-tau", default=1.0, type=float, help="temperature of the similarities")
    _switch(group, "ranking-gather", False, "rank among the images of all processes")


def _add_optimizer_flags(group: Any) -> None:
    add = group.add_argument
    add("--opt", default="adamw", help="timm's name of the optimizer")
    add("--opt-eps", default=1e-8, type=float)
    add("--opt-betas", default=None, type=float, nargs="+")
    add(
        "--opt-kwargs",
        default={},
        type=_setting,
        nargs="+",
        action=Settings,
        metavar="KEY=VALUE",
        help="more options of the optimizer, such as fused=False",
    )
    add("--clip-grad", default=None, type=float, help="largest gradient norm; 0 or less: off")
    add("--momentum", default=0.9, type=float)
    add("--weight-decay", default=0.05, type=float)
    add("--layer-decay", default=None, type=float, help="learning rate factor per layer down")
    add("--sched", default="cosine", help="timm's name of the schedule")
    add("--lr", default=5e-4, type=float, help="for an effective batch of 512")
    _switch(group, "unscale-lr", False, "take --lr as it is, whatever the batch", "scale it")
    add("--lr-noise", default=None, type=float, nargs="+", help="epochs (as fractions) of noise")
    add("--lr-noise-pct", default=0.67, type=float)
    add("--lr-noise-std", default=1.0, type=float)
    add("--warmup-lr", default=1e-6, type=float, help="not scaled with the batch")
    add("--min-lr", default=1e-5, type=float, help="not scaled with the batch")
    add("--decay-epochs", default=30, type=float)
    add("--warmup-epochs", default=5, type=int)
    add("--cooldown-epochs", default=10, type=int, help="no effect, as in DeiT: --epochs is all")
    add("--patience-epochs", default=10, type=int, help="plateau schedule")
    add("--decay-rate", "--dr", default=0.1, type=float)
    _switch(group, "sched-on-updates", True, "learning rate per update", "per epoch, as DeiT")
    _switch(group, "model-ema", True, "keep a moving average of the weights")
    add("--model-ema-decay", default=0.99996, type=float)
    add("--model-ema-force-cpu", action="store_true", help="keep it on the CPU")
    _switch(
        group, "model-ema-warmup", True, "shorter average at the start", "constant decay, as DeiT"
    )


def _add_augmentation_flags(group: Any) -> None:
    add = group.add_argument
    add("--color-jitter", default=0.3, type=float)
    add("--aa", default="rand-m9-mstd0.5-inc1", help="AutoAugment policy; '' or none: off")
    add(
        "--augment-on",
        default="worker",
        choices=("worker", "device"),
        help="where images are augmented after crop and flip",
    )
    add("--smoothing", default=0.1, type=float, help="label smoothing")
    add("--train-interpolation", default="bicubic", choices=("random", "bilinear", "bicubic"))
    _switch(group, "repeated-aug", True, "three views of an image in an epoch")
    _switch(group, "ThreeAugment", False, "DeiT III's augmentation")
    _switch(group, "src", False, "simple random crop, with --ThreeAugment")
    add("--reprob", default=0.25, type=float, help="random erasing probability")
    add("--remode", default="pixel", choices=("pixel", "rand", "const"))
    add("--recount", default=1, type=int)
    add("--resplit", action="store_true", help="no effect, as in DeiT")
    add("--mixup", default=0.8, type=float, help="alpha; 0: off")
    add("--cutmix", default=1.0, type=float, help="alpha; 0: off")
    add("--cutmix-minmax", default=None, type=float, nargs="+")
    add("--mixup-prob", default=1.0, type=float)
    add("--mixup-switch-prob", default=0.5, type=float)
    add("--mixup-mode", default="batch", choices=("batch", "pair", "elem"))
    _switch(group, "bce-loss", False, "binary cross entropy, as DeiT III")


def _add_data_flags(group: Any) -> None:
    add = group.add_argument
    add("--data-path", default="", help="folder of images; empty: the embedded digits")
    add(
        "--data-set",
        default=None,
        help=f"{', '.join(DATA_SETS)}, or what timm's create_dataset opens (wds/...)",
    )
    add(
        "--val-split",
        default="test",
        choices=("test", "dev"),
        help="of the embedded digits: what to evaluate on; tune on dev",
    )
    add("--inat-category", default="name", choices=INAT_CATEGORIES)
    add(
        "--eval-crop-ratio",
        "--crop-pct",
        default=None,
        type=float,
        help="default: the model's own, 0.875 for DeiT's",
    )
    add("--num-workers", default=None, type=int, help="per process; default: what the cores allow")
    add(
        "--loader-timeout",
        default=20.0,
        type=float,
        metavar="MIN",
        help="minutes a worker may take for a batch, before the run ends; 0: for ever",
    )
    add("--on-bad-image", default="fail", choices=("fail", "skip"))
    _switch(group, "pin-mem", True, "page-locked batches for a GPU")


def parse_args(argv: Sequence[str] | None = None) -> Options:
    """Return the settings of a run: flags over the quick start's values over the defaults.

    Without a data path the quick start's recipe fills in what no flag gives, but for the teacher's
    part: whether it distils is said by --distillation-type, as with any data, or --recipe.
    Raises UserError for unknown flags, values out of range, and combinations that cannot work.
    """
    given = vars(_parse(argv, suppress=True))
    explicit = frozenset(given)
    for plugin in given.get("plugin", ()):
        plugins.load_plugin(plugin)
    defaults, notes = read_distill_config(given)
    args = _parse(argv, defaults=defaults)
    about: list[str] = []
    if args.recipe:
        args, about, warnings = _with_recipe(argv, args.recipe, given, defaults)
        notes = [*warnings, *notes]
    elif uses_quick_start(args):
        flags = read_recipe(QUICK_START)
        del flags["distillation_type"]
        args = _parse(argv, defaults=flags | defaults)
    elif args.data_set is None:
        args.data_set = "IMNET"
    check_ranges(args)
    check_combinations(args, explicit)
    return Options(args, explicit, (*notes, *flags_without_effect(args, explicit)), tuple(about))


def read_distill_config(given: dict[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """Return the flags of --distill-config by destination name, and notes.

    given: the flags of the command line. Raises UserError for one that disagrees with the file.
    """
    path = given.get("distill_config")
    if not path:
        return {}, []
    config, stated = matching.read_config(path)
    flags = config.flags()
    stated |= {"distillation_alpha"}
    flags["distillation_alpha"] = config.kd_loss_weight
    for name in sorted(stated & set(given)):
        if given[name] != flags[name]:
            raise UserError(
                f"--{name.replace('_', '-')} {given[name]} disagrees with {path}, which says "
                f"{flags[name]}; give it in one place"
            )
    del flags["distillation_alpha"]  # both weights are the file's
    if not config.is_caching_logits:
        return flags, []
    return flags, ["is_caching_logits has no effect: a teacher cache keeps the augmentation too"]


def _with_recipe(
    argv: Sequence[str] | None, name: str, given: dict[str, Any], over: dict[str, Any]
) -> tuple[argparse.Namespace, list[str], list[str]]:
    """Return the settings of a recipe under the flags given, what to say of them, and warnings.

    over: settings of a file named on the command line, which win over the recipe's.
    """
    found = recipe.find(name)
    flags = read_recipe(recipe.FOLDER / f"{name}.yaml" if name == found.name else Path(name))
    flags |= over
    args = _parse(argv, defaults=flags)
    recipe.check_needs(found, args)
    world = find_launcher(os.environ)[3]
    fitted = recipe.fit_batch(
        found, args.batch_size, args.grad_accum_steps, world, frozenset(given)
    )
    args = _parse(argv, defaults=flags | fitted)
    changed = {
        flag: value
        for flag, value in given.items()
        if flag in found.flags and value != found.flags[flag]
    }
    effective = args.batch_size * args.grad_accum_steps * world
    about = recipe.describe(found, changed, fitted)
    return args, about, recipe.batch_warnings(found, effective)


def uses_quick_start(args: argparse.Namespace) -> bool:
    return not args.data_path and args.data_set in (None, "DIGITS")


def _parse(
    argv: Sequence[str] | None, *, suppress: bool = False, defaults: dict[str, Any] | None = None
) -> argparse.Namespace:
    parser = argparse_with_help()
    if suppress:
        parser._defaults.clear()
        for action in parser._actions:
            action.default = argparse.SUPPRESS
    parser.set_defaults(**(defaults or {}))
    return parser.parse_args(argv)


def argparse_with_help() -> argparse.ArgumentParser:
    return Parser(
        "main.py", parents=[get_args_parser()], description="Train, distil and evaluate ViTs."
    )


def read_recipe(path: Path) -> dict[str, Any]:
    """Return the flags of a recipe file by destination name.

    Raises UserError for unknown ones, and for values that they cannot have.
    """
    flags = dict(recipe.find(str(path)).flags)
    known = {action.dest: action for action in get_args_parser()._actions}
    if unknown := sorted(set(flags) - set(known)):
        raise UserError(f"recipe {path.name}: unknown flags {', '.join(unknown)}")
    for flag, value in flags.items():  # argparse takes defaults as they are
        if known[flag].choices and value not in known[flag].choices:
            raise UserError(
                f"recipe {path.name}: {flag}: {value}; give {', '.join(known[flag].choices)}"
            )
        if known[flag].nargs == "+" and not isinstance(value, list):
            flags[flag] = [value]
    if flags.get("teacher_path") and path.parent == recipe.FOLDER:  # wherever the run was started
        flags["teacher_path"] = str(recipe.FOLDER.parent / flags["teacher_path"])
    return flags


def check_ranges(args: argparse.Namespace) -> None:
    """Raise UserError for a number that no run can use."""
    for name, low, high in (
        ("batch_size", 1, None),
        ("epochs", 0, None),
        ("grad_accum_steps", 1, None),
        ("log_interval", 1, None),
        ("max_bad_steps", 1, None),
        ("num_workers", 0, None),
        ("loader_timeout", 0, None),
        ("nb_classes", 1, None),
        ("start_epoch", 0, None),
        ("teacher_cache_views", 0, None),
        ("checkpoint_steps", 0, None),
        ("checkpoint_minutes", 0, None),
        ("keep_checkpoints", 1, None),
        ("distillation_alpha", 0, 1),
        ("smoothing", 0, 1),
        ("drop", 0, 1),
        ("drop_path", 0, 1),
        ("reprob", 0, 1),
        ("mixup", 0, None),
        ("cutmix", 0, None),
        ("mixup_prob", 0, 1),
        ("mixup_switch_prob", 0, 1),
        ("model_ema_decay", 0, 1),
        ("lr", 0, None),
        ("dist_timeout", 0.01, 1e5),
        ("weight_decay", 0, None),
        ("warmup_epochs", 0, None),
        ("color_jitter", 0, None),
        ("momentum", 0, 1),
        ("eval_crop_ratio", 0, None),
        ("layer_decay", 0, 1),
    ):
        value = getattr(args, name)
        if value is None:
            continue
        if math.isnan(value):
            raise UserError(f"--{name.replace('_', '-')} {value}: must be a number")
        if value < low or (high is not None and value > high):
            allowed = f"between {low} and {high}" if high is not None else f"at least {low}"
            raise UserError(f"--{name.replace('_', '-')} {value}: must be {allowed}")
    if not args.distillation_tau > 0:
        raise UserError(f"--distillation-tau {args.distillation_tau}: must be above 0")
    if args.input_size is not None and (len(args.input_size) > 2 or min(args.input_size) < 1):
        raise UserError(f"--input-size {args.input_size}: give one side, or height and width")


def check_combinations(args: argparse.Namespace, explicit: frozenset[str]) -> None:
    """Raise UserError for flags that cannot go together, before any work is done."""
    matching.check_objective(args)
    distils = args.distillation_type != "none"
    if args.data_set == "DIGITS" and args.data_path:
        raise UserError("--data-set DIGITS is embedded; leave out --data-path")
    if args.data_set != "DIGITS" and not args.data_path and "/" not in str(args.data_set):
        raise UserError(f"--data-set {args.data_set}: give its folder with --data-path")
    if args.cosub and distils:
        raise UserError(
            "--cosub has no teacher: it cannot go with "
            f"--distillation-type {args.distillation_type}; leave out one of them"
        )
    if args.distillation_head == "cls" and args.cosub:
        raise UserError("--cosub and --distillation-head cls cannot go together")
    if args.teacher_cache and (args.match or args.ranking_kl_weight or args.teacher_adaptor):
        raise UserError(
            "--teacher-cache keeps logits alone: it cannot go with --match, --ranking-kl-weight or "
            "--teacher-adaptor"
        )
    if args.teacher_cache and not distils:
        raise UserError("--teacher-cache needs a teacher: set --distillation-type soft or hard")
    if (
        args.teacher_cache
        and args.teacher_cache_topk == "hard"
        and args.distillation_type != "hard"
    ):
        raise UserError(
            "--teacher-cache-topk hard keeps one class an image: use --distillation-type hard"
        )
    if args.torchcompile and args.torchcompile not in torch.compiler.list_backends(()):
        known = ", ".join(torch.compiler.list_backends(()))
        raise UserError(f"--torchcompile {args.torchcompile}: unknown to torch; known: {known}")
    sees_inside = args.match or args.ranking_kl_weight or args.student_adaptor
    if args.torchcompile and (sees_inside or args.teacher_adaptor):
        raise UserError(
            "--torchcompile sees logits alone: it cannot go with --match, --ranking-kl-weight, "
            "--student-adaptor or --teacher-adaptor"
        )
    features = {matching.read_match(match).feature for match in args.match}
    if args.grad_checkpointing and "attention" in features:
        raise UserError(
            "--grad-checkpointing cannot go with a --match of attention, whose maps would be "
            "computed in the forward pass alone; leave out one of them"
        )
    if args.pretrained and args.finetune:
        raise UserError("--pretrained and --finetune both give the first weights; leave out one")
    if is_auto(args.resume) and not args.output_dir:
        raise UserError("--resume auto looks in --output_dir, which is not given")
    if args.sched == "plateau" and args.sched_on_updates and "sched_on_updates" in explicit:
        raise UserError("--sched plateau looks at epochs: use --no-sched-on-updates")
    if args.opt_betas is not None and len(args.opt_betas) < 2:
        raise UserError(f"--opt-betas {args.opt_betas}: give two numbers")


def flags_without_effect(args: argparse.Namespace, explicit: frozenset[str]) -> list[str]:
    """Return one line for every flag that was given and does nothing in this run."""
    distils = args.distillation_type != "none"
    teaches = distils or bool(args.match) or args.ranking_kl_weight > 0
    several = isinstance(args.teacher_model, list)
    mixes = is_mixing(args.mixup, args.cutmix, args.cutmix_minmax)
    three = args.ThreeAugment
    randaugment = args.aa not in ("", "none", None)
    cases = {
        "src": (args.src and not three, "it belongs to --ThreeAugment"),
        "resplit": (True, "DeiT never used it either"),
        "distributed": (True, "the launcher decides"),
        "world_size": (True, "the launcher decides"),
        "dist_eval": (True, "evaluation is always sharded and exact"),
        "dist_timeout": (find_launcher(os.environ)[3] == 1, "there is one process"),
        "cooldown_epochs": (True, "the schedule ends with --epochs"),
        "patience_epochs": (args.sched != "plateau", "it belongs to --sched plateau"),
        "aa": (three, "--ThreeAugment replaces it"),
        "reprob": (three, "--ThreeAugment has no erasing"),
        "remode": (three or args.reprob == 0, "nothing is erased"),
        "recount": (three or args.reprob == 0, "nothing is erased"),
        "augment_on": (args.eval, "nothing trains"),
        "train_interpolation": (three, "--ThreeAugment is bicubic"),
        "color_jitter": (randaugment and not three, "timm leaves it out while --aa is set"),
        "mixup_prob": (not mixes, "nothing is mixed"),
        "mixup_switch_prob": (not (args.mixup > 0 and args.cutmix > 0), "only one kind of mixing"),
        "mixup_mode": (not mixes, "nothing is mixed"),
        "smoothing": (args.cosub and not mixes, "--cosub uses hard targets"),
        "bce_loss": (args.cosub, "--cosub always is binary cross entropy"),
        "val_split": (args.data_set != "DIGITS", "only for the embedded digits"),
        "inat_category": (args.data_set not in ("INAT", "INAT19"), "only for INAT and INAT19"),
        "model_ema_decay": (not args.model_ema, "there is no average"),
        "model_ema_force_cpu": (not args.model_ema, "there is no average"),
        "model_ema_warmup": (not args.model_ema, "there is no average"),
        "teacher_model": (not teaches, "--distillation-type is none"),
        "teacher_path": (not teaches, "--distillation-type is none"),
        "teacher_weight": (not several, "there is one teacher"),
        "teacher_logits": (not several or not distils, "no logits of several teachers"),
        "teacher_check": (not distils, "--distillation-type is none"),
        "distillation_alpha": (not distils, "--distillation-type is none"),
        "distillation_head": (not distils, "--distillation-type is none"),
        "distillation_tau": (args.distillation_type != "soft", "only soft has a temperature"),
        "distillation_reduction": (
            args.distillation_type != "soft" or bool(args.kd_loss_type),
            "only soft is reduced so",
        ),
        "temperature_min": (args.temperature_scheduler == "none", "no temperature is scheduled"),
        "kd_loss_weight": (not distils, "--distillation-type is none"),
        "ranking_similarity": (not args.ranking_kl_weight, "--ranking-kl-weight is 0"),
        "ranking_tau": (not args.ranking_kl_weight, "--ranking-kl-weight is 0"),
        "ranking_gather": (not args.ranking_kl_weight, "--ranking-kl-weight is 0"),
        "finetune": (bool(args.resume), "--resume brings its own weights"),
        "resume_anyway": (not args.resume, "it belongs to --resume"),
        "checkpoint_steps": (not args.output_dir, "nothing is saved without --output_dir"),
        "checkpoint_minutes": (not args.output_dir, "nothing is saved without --output_dir"),
        "keep_checkpoints": (not args.output_dir, "nothing is saved without --output_dir"),
        "loader_timeout": (args.num_workers == 0, "there are no workers"),
        "start_epoch": (bool(args.resume), "--resume knows its epoch"),
        "torchcompile": (args.eval, "evaluation is not compiled"),
        "grad_checkpointing": (args.eval, "evaluation keeps nothing for a backward pass"),
        "teacher_amp": (not teaches, "--distillation-type is none"),
    }
    cases |= {
        name: (not args.teacher_cache, "it belongs to --teacher-cache")
        for name in ("teacher_cache_mode", "teacher_cache_views", "teacher_cache_topk")
    }
    return [
        f"--{name.replace('_', '-')} has no effect here: {why}"
        for name, (idle, why) in cases.items()
        if idle and name in explicit
    ]
