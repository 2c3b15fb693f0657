"""The command line: every flag, its default, and which of them cannot go together.

The flags of DeiT's main.py keep their names, defaults and meanings, in `-` and `_` spellings, and
prefixes (`--batch`) work. New flags have timm's names where timm's train.py has them.
Only `parse_args` decides a value; no module writes to its result.
"""

import argparse
import difflib
import os
import textwrap
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from base import flag_table, structured
from base.distributed import find_launcher
from base.errors import UserError, shorten
from base.flags import COMMON, idle_notes
from models import plugins
from training import auto_recipe, recipe, run_folder
from training.checkpointer import is_auto
from training.trackers import check_trackers

QUICK_START = recipe.FOLDER / "quickstart.yaml"


class Parser(argparse.ArgumentParser):
    """argparse in which `--num_workers` and `--num-workers` are one flag."""

    def parse_known_args(self, args=None, namespace=None):  # type: ignore[no-untyped-def]
        if args is None:
            import sys

            args = sys.argv[1:]
        return super().parse_known_args([_dashed(word) for word in args], namespace)

    def error(self, message: str) -> None:  # type: ignore[override]
        unknown = message.removeprefix("unrecognized arguments: ").split()
        if message.startswith("unrecognized") and unknown and unknown[0].startswith("-"):
            known = [name for action in self._actions for name in action.option_strings]
            message += did_you_mean(unknown[0].split("=")[0], known)
        raise UserError(message if unknown else "an empty word is no flag; leave it out")


def _dashed(word: str) -> str:
    if not word.startswith("--"):
        return word
    name, equals, value = word.partition("=")
    return name.replace("_", "-") + equals + value


@dataclass(frozen=True)
class Options:
    """The result of `parse_args`.

    explicit: settings given on the command line. notes: warnings. about: lines about a recipe.
    """

    args: argparse.Namespace
    explicit: frozenset[str]
    notes: tuple[str, ...]
    about: tuple[str, ...] = ()


def get_args_parser() -> argparse.ArgumentParser:
    """Return DeiT's parser, plus ours. Sizes in pixels, times in epochs unless the name says."""
    parser = Parser("Train, distil and evaluate vision transformers", add_help=False)
    for title, flags in flag_table.GROUPS.items():
        group = parser.add_argument_group(title)
        for flag in flags:
            flag.add_to(group)
    return parser


def parse_args(argv: Sequence[str] | None = None) -> Options:
    """Return the settings of a run: flags over the quick start's values over the defaults.

    Without a data path, settings that are not given come from the quick start's recipe, except
    --distillation-type. For a small training set they come from `auto_recipe`.
    Raises UserError for unknown flags, values out of range, and combinations that cannot work.
    """
    given = vars(_parse(argv, suppress=True))
    explicit = frozenset(given)
    for plugin in given.get("plugin", ()):
        plugins.load_plugin(plugin)
    defaults, notes = read_distill_config(given)
    args = _parse(argv, defaults=defaults)
    about: list[str] = []
    if args.recipe not in recipe.UNPUBLISHED:
        args, about, warnings = _with_recipe(argv, args.recipe, given, defaults)
        notes = [*warnings, *notes]
    elif args.recipe == recipe.AUTO:
        if uses_quick_start(args):
            flags = read_recipe(QUICK_START) | {"recipe": recipe.NONE}
            del flags["distillation_type"]
        else:
            flags, about = auto_recipe.build_auto_recipe(args, explicit)
        args = _parse(argv, defaults=flags | defaults)
        applied = flags.get("recipe", recipe.AUTO)
        args = argparse.Namespace(**vars(args) | {"recipe": applied})
    if args.data_set is None:
        args.data_set = "IMNET" if args.data_path else "DIGITS"
    check_ranges(args)
    check_combinations(args, explicit)
    return Options(
        args, explicit, (*notes, *idle_notes(flag_table.FLAGS, args, explicit)), tuple(about)
    )


def read_distill_config(given: dict[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """Return the flags of --distill-config by destination name, and notes.

    given: the flags of the command line. Raises UserError for one that disagrees with the file.
    """
    path = given.get("distill_config")
    if not path:
        return {}, []
    import matching  # most runs have no such file

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
    """Return the settings of a recipe with the given flags, lines about them, and warnings.

    over: settings of --distill-config, which replace the recipe's.
    """
    found = recipe.find(name)
    flags = read_recipe(recipe.FOLDER / f"{name}.yaml" if name == found.name else Path(name))
    flags |= over
    if not given.get("plugin"):
        plugins.load_given_plugins([], found.plugins, f"--recipe {name}")
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
    if not suppress:
        parser.set_defaults(output_dir=run_folder.AUTO)
    parser.set_defaults(**(defaults or {}))
    return parser.parse_args(argv)


EXAMPLES = """examples:
  torchrun main.py --distillation-type hard        # the embedded digits
  torchrun --nproc_per_node=8 main.py --data-path DIR --output-dir RUN
  python main.py --eval --resume RUN/best_checkpoint.pth --data-path DIR
"""


class ShortHelp(argparse.Action):
    """--help: the common flags and three examples, on one screen."""

    def __call__(self, parser, namespace, values, option_string=None):  # type: ignore[no-untyped-def]
        common = [flag for flag in flag_table.FLAGS if COMMON in flag.facts]
        print("usage: main.py [flags]   common flags (all with defaults: --help-all)\n")
        for flag in common:
            line = f"  {flag.name:<20}  {flag.text}"
            print(textwrap.fill(line, 79, subsequent_indent=" " * 24, replace_whitespace=False))
        print(f"\n{EXAMPLES}", end="")
        parser.exit()


class PrintCompletion(argparse.Action):
    """--print-completion: the script that completes flags of the installed command in a shell."""

    def __call__(self, parser, namespace, values, option_string=None):  # type: ignore[no-untyped-def]
        try:
            import shtab
        except ImportError as error:
            raise UserError(f"{option_string} needs shtab: pip install shtab") from error
        parser.prog = "vit-distillation"
        print(shtab.complete(parser, values))
        parser.exit()


def argparse_with_help() -> argparse.ArgumentParser:
    about = "Train, distil and evaluate ViTs."
    parser = Parser("main.py", parents=[get_args_parser()], description=about, add_help=False)
    no_setting: dict[str, Any] = {"default": argparse.SUPPRESS}
    parser.add_argument(
        "-h", "--help", action=ShortHelp, nargs=0, help="common flags", **no_setting
    )
    parser.add_argument("--help-all", action="help", help="all flags, by group")
    parser.add_argument(
        "--print-completion",
        action=PrintCompletion,
        choices=("bash", "zsh", "tcsh"),
        **no_setting,
        help="print the shell completion of the installed command; needs shtab",
    )
    return parser


def read_recipe(path: Path) -> dict[str, Any]:
    """Return the flags of a recipe file by destination name.

    Raises UserError for unknown ones, and for values that they cannot have.
    """
    flags = read_flags(recipe.find(str(path)).flags, f"recipe {path.name}")
    if flags.get("teacher_path") and path.parent == recipe.FOLDER:  # wherever the run was started
        flags["teacher_path"] = str(recipe.FOLDER.parent / flags["teacher_path"])
    return flags


def read_flags(values: Mapping[str, Any], where: str) -> dict[str, Any]:
    """Return the values of a file as those of flags, by destination name.

    Raises UserError for an unknown flag, and for a value of another type or out of range.
    """
    known = {flag.dest: flag for flag in flag_table.FLAGS}
    if unknown := sorted(set(values) - set(known)):
        close = did_you_mean(unknown[0], known)
        raise UserError(f"{where}: unknown flags {shorten(', '.join(unknown), quote=False)}{close}")
    found = {}
    for name, value in values.items():
        flag = known[name]
        if value is False and "off" in flag.choices:  # YAML's `off`
            value = "off"
        value = structured.convert(value, flag.value_type(), f"{where}: {name}")
        if flag.choices and value not in flag.choices:
            raise UserError(f"{where}: {name}: {shorten(value)}; give {', '.join(flag.choices)}")
        flag.check(value)
        if (
            "nargs" in flag.options
            and isinstance(value, int | float | str)
            and flag.kind is not str
        ):
            value = [value]
        found[name] = value
    return found


def settings_of_run(values: Mapping[str, Any], where: str) -> dict[str, Any]:
    """Return all settings of a run from those that it saved, with today's defaults for new flags.

    Raises UserError for a value that its flag cannot have. Settings without a flag are kept.
    """
    known = {flag.dest for flag in flag_table.FLAGS}
    defaults = vars(argparse_with_help().parse_args([]))
    found = read_flags({name: values[name] for name in values if name in known}, where)
    return defaults | dict(values) | found


def check_unlabelled(args: argparse.Namespace) -> None:
    """Raise UserError for unlabelled images in a run that cannot use them."""
    if not args.unlabelled_path or args.eval:
        return
    if args.cosub:
        raise UserError(
            "--unlabelled-path cannot go with --cosub, which has no teacher; leave out one"
        )
    if not flag_table.has_teacher(args):
        raise UserError(
            "--unlabelled-path: only a teacher can use images without labels; set "
            "--distillation-type soft or hard, or leave it out"
        )


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """Return a hint with the words that are close to a misspelt one, or ""."""
    bare = {name.lstrip("-"): name for name in known}  # dashes would make any two flags alike
    close = [bare[name] for name in difflib.get_close_matches(word.lstrip("-"), bare, 3, 0.75)]
    return f"; did you mean {' or '.join(close)}?" if close else ""


def check_ranges(args: argparse.Namespace) -> None:
    """Raise UserError for a number that no run can use."""
    for flag in flag_table.FLAGS:
        flag.check(getattr(args, flag.dest))
    if args.input_size is not None and len(args.input_size) > 2:
        raise UserError(f"--input-size {args.input_size}: give one side, or height and width")


def check_combinations(args: argparse.Namespace, explicit: frozenset[str]) -> None:
    """Raise UserError for flags that cannot go together, before any work is done."""
    if any(getattr(args, flag.dest) != flag.default for flag in flag_table.OBJECTIVE):
        import matching  # most runs have no setting of this group

        matching.check_objective(args)
    check_trackers(args)
    distils = args.distillation_type != "none"
    if args.data_set == "DIGITS" and args.data_path:
        raise UserError("--data-set DIGITS is embedded; leave out --data-path")
    if args.data_set != "DIGITS" and not args.data_path and "/" not in str(args.data_set):
        raise UserError(f"--data-set {args.data_set}: give its folder with --data-path")
    if args.val_labels and args.data_set != "IMNET":
        raise UserError(
            f"--val-labels {args.val_labels}: only a folder of images (--data-set IMNET) takes it; "
            f"--data-set {args.data_set} has its own labels"
        )
    check_unlabelled(args)
    if args.cosub and distils:
        raise UserError(
            "--cosub has no teacher: it cannot go with "
            f"--distillation-type {args.distillation_type}; leave out one of them"
        )
    if args.distillation_head == "cls" and args.cosub:
        raise UserError("--cosub and --distillation-head cls cannot go together; leave out one")
    if args.teacher_cache and (args.match or args.ranking_kl_weight or args.teacher_adaptor):
        raise UserError(
            "--teacher-cache keeps logits alone: it cannot go with --match, --ranking-kl-weight or "
            "--teacher-adaptor; leave out one"
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
    if args.minutes and "epochs" in explicit:
        raise UserError("--minutes and --epochs both set the length of the run; leave out one")
    if args.minutes and args.teacher_cache and not args.teacher_cache_views:
        raise UserError("--minutes with --teacher-cache: give --teacher-cache-views")
    if args.sched == "plateau" and args.val_interval > 1:
        raise UserError("--sched plateau needs the accuracy of every epoch: use --val-interval 1")
    if args.pretrained and args.finetune:
        raise UserError("--pretrained and --finetune both give the first weights; leave out one")
    in_no_folder = not args.output_dir or (args.eval and args.output_dir == run_folder.AUTO)
    if is_auto(args.resume) and in_no_folder:
        raise UserError("--resume auto looks in --output_dir: give the folder of the run")
    if args.sched == "plateau" and args.sched_on_updates and "sched_on_updates" in explicit:
        raise UserError("--sched plateau looks at epochs: use --no-sched-on-updates")
    if args.opt_betas is not None and len(args.opt_betas) < 2:
        raise UserError(f"--opt-betas {args.opt_betas}: give two numbers")
