"""Matches between student and teacher, as flags and files state them.

Suffix _S student, _T teacher. A match names one layer of each network (or two, for `fsp` and
`nst`), a loss of `losses.MATCH_LOSS_MAP` and, where the widths differ, a projection of the
student. `distill/match_builder.py` makes a term of the loss of it.
"""

import math
from argparse import Namespace
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

import msgspec
import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import register_parametrization

import losses
from base import structured
from base.errors import UserError, shorten
from data.transforms import is_mixing
from models.features import ADAPTOR_KEYS, ADAPTORS, ATTENTION_KINDS, FEATURES, Tap
from schedules import TEMPERATURE_SCHEDULER, WEIGHT_SCHEDULER, pick

__all__ = ["ADAPTORS", "ADAPTOR_KEYS", "PROJ_MAP", "DistillationConfig", "IntermediateMatch"]
BUILT_IN = frozenset(losses.MATCH_LOSS_MAP)  # a plugin's losses may take any layers and features
TWO_LAYERS = ("fsp", "gram", "nst", "mmd")
TOKENS = ("all", "patch", "cls", "dist")
RESIZES = ("bilinear", "avg")


# --- projections ----------------------------------------------------------------------------


def linear_projection(dim_S: int, dim_T: int) -> nn.Linear:
    """Return a linear map (..., dim_S) -> (..., dim_T), weights N(0, 0.02), bias 0 (TextBrewer)."""
    linear = nn.Linear(dim_S, dim_T)
    nn.init.normal_(linear.weight, std=0.02)
    nn.init.zeros_(linear.bias)
    return linear


class Orthonormal(nn.Module):
    """A parametrization: of any weights, the orthonormal ones that QR finds in them.

    Not torch's `orthogonal`: its Householder form becomes all zero under weight decay.
    """

    def forward(self, weight: Tensor) -> Tensor:
        """weight: (dim_T, dim_S). Returns orthonormal columns, or rows if those are fewer."""
        wide = weight.shape[0] < weight.shape[1]
        basis, triangle = torch.linalg.qr(weight.mT if wide else weight)
        basis = basis * torch.where(triangle.diagonal() < 0, -1.0, 1.0)  # orthonormal: unchanged
        return basis.mT if wide else basis


def orthogonal_projection(dim_S: int, dim_T: int) -> nn.Module:
    """Return a linear map that stays orthogonal in training (VkD, arXiv 2403.06213)."""
    linear = nn.Linear(dim_S, dim_T, bias=False)
    nn.init.orthogonal_(linear.weight)
    return register_parametrization(linear, "weight", Orthonormal())


PROJ_MAP: dict[str, Callable[[int, int], nn.Module]] = {
    "linear": linear_projection,
    "relu": lambda dim_S, dim_T: nn.Sequential(linear_projection(dim_S, dim_T), nn.ReLU()),
    "tanh": lambda dim_S, dim_T: nn.Sequential(linear_projection(dim_S, dim_T), nn.Tanh()),
    "orthogonal": orthogonal_projection,
}
NO_DECAY = ("orthogonal",)  # only the direction of its weights counts


# --- one match ------------------------------------------------------------------------------


@dataclass(frozen=True)
class IntermediateMatch:
    """One line of `intermediate_matches`, TextBrewer's keys first, then ours.

    layer_T, layer_S: as `models/features.py` numbers them; two each for fsp and nst. proj: (name,
    dim_S, dim_T, {optimizer options}), where a width may be "auto". tokens: all, patch, cls or
    dist. attention: scores or probabilities. resize: bilinear or avg, of the teacher's patch grid
    to the student's. teacher: which of several, by number or name. textbrewer_clip: let its -1e-3
    rule cut attention scores.
    Raises UserError for what no network could satisfy.
    """

    layer_T: int | tuple[int, int] = 0
    layer_S: int | tuple[int, int] = 0
    feature: str = "hidden"
    loss: str = ""
    weight: float = 1.0
    proj: tuple | None = None
    tokens: str = "all"
    attention: str = "scores"
    resize: str | None = None
    teacher: int | str = 0
    textbrewer_clip: bool = False

    def __post_init__(self) -> None:
        where = f"match {shorten(self.name, quote=False)}"
        for what, value, known in (
            ("feature", self.feature, FEATURES),
            ("loss", self.loss, losses.MATCH_LOSS_MAP),
            ("tokens", self.tokens, TOKENS),
            ("attention", self.attention, ATTENTION_KINDS),
            ("resize", self.resize, (None, *RESIZES)),
        ):
            pick(dict.fromkeys(map(str, known)), str(value), f"{where}: {what}")
        if not 0 <= self.weight < math.inf:
            raise UserError(f"{where}: weight {self.weight}; it must be a number, not below 0")
        if self.loss.startswith("attention_ce") and self.attention != "scores":
            raise UserError(f"{where}: {self.loss} takes scores, of which it makes probabilities")
        pairs = [isinstance(layer, tuple) for layer in (self.layer_S, self.layer_T)]
        built_in = self.loss in BUILT_IN
        if pairs[0] != pairs[1] or (built_in and pairs[0] != (self.loss in TWO_LAYERS)):
            wanted = (
                "two layers of each side (0+4)" if self.loss in TWO_LAYERS else "one layer each"
            )
            raise UserError(
                f"{where}: layer_S={self.layer_S}, layer_T={self.layer_T}; the loss needs {wanted}"
            )
        about_attention = self.feature == "attention"
        if built_in and about_attention != self.loss.startswith("attention_"):
            raise UserError(f"{where}: the loss {self.loss} is not for the feature {self.feature}")
        if about_attention and (self.proj or self.resize or self.tokens in ("cls", "dist")):
            raise UserError(f"{where}: attention takes no proj, no resize, and tokens all or patch")
        if self.resize and (self.tokens != "patch" or self.feature != "hidden"):
            raise UserError(f"{where}: resize is for feature=hidden with tokens=patch")
        if self.proj:
            name, *widths = self.proj[:3]
            pick(PROJ_MAP, name, f"{where}: proj")
            if len(self.proj) > 4 or any(w != "auto" and type(w) is not int for w in widths):
                raise UserError(
                    f"{where}: proj {shorten(list(self.proj))}; give [name, width_S, width_T, "
                    "{optimizer options}], where a width is a number or auto"
                )

    @property
    def name(self) -> str:
        """feature_loss_S_T, as TextBrewer logs it."""
        layers = ("-".join(map(str, several(x))) for x in (self.layer_S, self.layer_T))
        return "_".join([self.feature, self.loss, *layers])

    def taps(self, layers: int | tuple[int, int]) -> list[Tap]:
        kind = self.attention if self.feature == "attention" else "scores"
        return [Tap(self.feature, layer, kind) for layer in several(layers)]


def several(layers: int | tuple[int, int]) -> tuple[int, ...]:
    """Return the layers of one side of a match, one or two."""
    return layers if isinstance(layers, tuple) else (layers,)


class MatchFile(msgspec.Struct, forbid_unknown_fields=True):
    """A match as a file or a string has it, before it is checked."""

    loss: str
    feature: str
    layer_S: int | str | list[int] | None = None
    layer_T: int | str | list[int] | None = None
    weight: float = 1.0
    proj: str | list[str | int | None | dict[str, float]] | None = None
    tokens: str = "all"
    attention: str = "scores"
    resize: str | None = None
    teacher: int | str = 0
    textbrewer_clip: bool = False


def read_match(source: str | Mapping[str, Any]) -> IntermediateMatch:
    """Return the match of a `key=value,...` string, of JSON in braces, or of a file's mapping.

    In a string, two layers are `0+4`, and a projection is `linear:192:768:lr=0.001`.
    Raises UserError for unknown keys and values that cannot be read.
    """
    where = f"match {shorten(source, 120)}"
    given: Any = source
    if isinstance(source, str) and source.lstrip().startswith("{"):
        given = structured.parse(source, "--match")
    elif isinstance(source, str):
        parts = [part.partition("=") for part in source.split(",") if part.strip()]
        given = {key.strip(): _plain_value(key.strip(), value.strip()) for key, _, value in parts}
        if len(given) < len(parts):
            raise UserError(f"{where}: a key comes twice; two layers are written 0+4")
    if not isinstance(given, Mapping):
        raise UserError(f"{where}: give key=value,key=value, or a mapping")
    _check_keys(given, IntermediateMatch, where)
    if missing := {"loss", "feature"} - set(given):
        raise UserError(f"{where}: lacks {', '.join(sorted(missing))}")
    found = structured.convert(given, MatchFile, where)
    values = {name: getattr(found, name) for name in given}
    for name, reader in READERS.items():
        try:
            if name in values:
                values[name] = reader(values[name])
        except (TypeError, ValueError) as error:
            raise UserError(f"{where}: {name}={shorten(values[name])} cannot be read") from error
    missing_layers = sorted({"layer_S", "layer_T"} - set(given))
    if missing_layers and found.feature != "pooled" and found.loss in TWO_LAYERS:
        values |= dict.fromkeys(missing_layers, (0, 1))  # so that other errors come first
    match = IntermediateMatch(**values)
    if missing_layers and match.feature != "pooled":
        raise UserError(f"{where}: lacks {', '.join(missing_layers)}")
    return match


def _plain_value(key: str, text: str) -> Any:
    """Return the text of a `key=value` string as the number or switch it is."""
    try:
        if key == "weight":
            return float(text)
        if key == "textbrewer_clip":
            return {"true": True, "1": True, "false": False, "0": False}[text.lower()]
    except (KeyError, ValueError):
        return text
    return text


def _layers(value: Any) -> int | tuple[int, ...]:
    if isinstance(value, str):
        value = [int(part) for part in value.split("+")]
    if isinstance(value, int) and not isinstance(value, bool):
        return value
    layers = tuple(value)
    if len(layers) not in (1, 2) or any(type(layer) is not int for layer in layers):
        raise ValueError
    return layers if len(layers) == 2 else layers[0]


def _proj(value: Any) -> tuple | None:
    if isinstance(value, str):
        name, *rest = value.split(":")
        options = dict(part.split("=") for part in rest if "=" in part)
        widths = [part if part == "auto" else int(part) for part in rest if "=" not in part]
        value = [name, *widths, {key: float(number) for key, number in options.items()}]
    if not value:
        return None
    value = list(value)
    options = value.pop() if isinstance(value[-1], Mapping) else {}
    return (*value, *["auto"] * (3 - len(value)), dict(options))


def _number_or_name(value: Any) -> int | str:
    return int(value) if str(value).isdigit() else value


READERS = {"layer_S": _layers, "layer_T": _layers, "proj": _proj, "teacher": _number_or_name}


def _check_keys(given: Mapping[str, Any], kind: type, where: str) -> None:
    known = [each.name for each in fields(kind)]
    if unknown := [str(key) for key in given if key not in known]:
        names = shorten(", ".join(unknown), quote=False)
        raise UserError(f"{where}: unknown {names}; the keys are {', '.join(known)}")


# --- the file ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class DistillationConfig:
    """TextBrewer's keys and defaults. The weights of both terms stand alone: there is no alpha."""

    temperature: float = 4
    temperature_scheduler: str | list[str | float | dict[str, float]] = "none"
    hard_label_weight: float = 0
    hard_label_weight_scheduler: str = "none"
    kd_loss_type: str = "ce"
    kd_loss_weight: float = 1
    kd_loss_weight_scheduler: str = "none"
    probability_shift: bool = False
    intermediate_matches: Sequence[str | dict[str, Any]] | None = ()
    is_caching_logits: bool = False

    def flags(self) -> dict[str, Any]:
        """Return the settings as flags of the command line, by destination."""
        names = {"temperature": "distillation_tau", "intermediate_matches": "match"}
        values = {each.name: getattr(self, each.name) for each in fields(self)}
        flags = {names.get(name, name): value for name, value in values.items()}
        del flags["is_caching_logits"]  # the teacher cache replaces it; the run prints that
        flags["match"] = list(self.intermediate_matches or ())
        distils = self.kd_loss_weight or self.kd_loss_weight_scheduler != "none"
        return flags | {"distillation_type": "soft" if distils else "none"}


def read_config(path: str) -> tuple[DistillationConfig, set[str]]:
    """Return the distillation config of a .json or .yaml file, and the flags that it states."""
    content = structured.read(path, dict[str, Any])
    _check_keys(content, DistillationConfig, path)
    config = structured.convert(content, DistillationConfig, path)
    for name in ("hard_label_weight", "kd_loss_weight"):
        if not 0 <= getattr(config, name) < math.inf:
            raise UserError(f"{path}: {name} {getattr(config, name):g}: must be at least 0")
    if not 0 < config.temperature < math.inf:
        raise UserError(f"{path}: temperature {config.temperature:g}: must be above 0")
    defaults = DistillationConfig().flags()
    stated = {name for name, value in config.flags().items() if value != defaults[name]}
    names = {"temperature": "distillation_tau", "intermediate_matches": "match"}
    return config, stated | {names.get(key, key) for key in content} | {"distillation_type"}


def check_objective(args: Namespace) -> None:
    """Raise UserError for settings of the objective that contradict each other."""
    for match in args.match:
        read_match(match)
    for name in (args.kd_loss_weight_scheduler, args.hard_label_weight_scheduler):
        if name != "none":
            pick(WEIGHT_SCHEDULER, name, "weight schedule")
    if args.temperature_scheduler != "none":
        TEMPERATURE_SCHEDULER[args.temperature_scheduler]
    if args.kd_loss_type:
        pick(losses.KD_LOSS_MAP, args.kd_loss_type, "kd loss")
    for name in filter(None, (args.student_adaptor, args.teacher_adaptor)):
        pick(ADAPTORS, name, "adaptor")
    check_contradictions(args)


def check_contradictions(args: Namespace) -> None:
    """Raise UserError for two settings of the objective that exclude each other."""
    scheduled, kd_loss = args.temperature_scheduler != "none", args.kd_loss_type
    soft = args.distillation_type == "soft"
    if kd_loss and not soft and not args.distill_config:
        raise UserError(f"--kd-loss-type {kd_loss} belongs to --distillation-type soft")
    if args.logit_standardization and not soft:
        raise UserError("--logit-standardization belongs to --distillation-type soft")
    if scheduled and not kd_loss:
        raise UserError(
            "--temperature-scheduler needs --kd-loss-type ce or mse: DeiT's loss has one "
            "temperature"
        )
    if scheduled and kd_loss == "dist":
        raise UserError(
            "--kd-loss-type dist takes one temperature: leave out --temperature-scheduler"
        )
    if kd_loss == "dist" and args.batch_size < 2:
        raise UserError(
            f"--batch-size {args.batch_size}: --kd-loss-type dist compares the images of a batch; "
            "give at least 2"
        )
    if args.probability_shift and is_mixing(args.mixup, args.cutmix, args.cutmix_minmax):
        raise UserError("probability_shift needs one true class an image: set --mixup 0 --cutmix 0")
    if args.probability_shift and args.distillation_type == "none":
        raise UserError("probability_shift needs a teacher's logits: set --distillation-type soft")
    if args.ranking_kl_weight and args.batch_size < 3:
        raise UserError(
            f"--batch-size {args.batch_size}: ranking needs 3 images a batch, so that each has two "
            "others to choose from"
        )
    weighted = args.hard_label_weight is not None or args.hard_label_weight_scheduler != "none"
    matched = args.match or args.ranking_kl_weight or args.distill_config or args.student_adaptor
    if args.cosub and (matched or weighted):
        raise UserError(
            "--cosub has no teacher to match, and no weights; leave out --cosub, or the flags of "
            "the distillation"
        )
