"""Teachers: frozen networks with their own input adapters.

Shapes: B batch, C classes. A teacher maps the student's images to logits. `AnyTeacher` is the
interface of all of them; `cached_teacher.CachedTeacher` has it too. A teacher with matched features
returns `TappedOutput`: logits and features.
"""

import logging
from argparse import Namespace
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Protocol

import msgspec
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import models
from base import safe_load, structured
from base.distributed import print_once
from base.errors import UserError
from data.samplers import BatchKey
from data.transforms import InputConfig
from distill.teacher_classes import classes_of_teacher, match_outputs, teacher_command
from models.features import ADAPTORS, AdaptorTaps, TappedOutput
from models.loading import TEACHER_ADVICE
from schedules import pick

_logger = logging.getLogger(__name__)
MOST_PIXELS = 4096  # on a side; more than any classifier takes
Side = Annotated[int, msgspec.Meta(ge=1, le=MOST_PIXELS)]
Sides = Annotated[list[Side], msgspec.Meta(min_length=1, max_length=2)]
Mean = Annotated[float, msgspec.Meta(ge=-1e6, le=1e6)]
Std = Annotated[float, msgspec.Meta(ge=1e-6, le=1e6)]
# Settings of a run that describe the input of its network
INPUTS: dict[str, Any] = {
    "input_size": Sides | None,
    "mean": tuple[Mean, Mean, Mean] | None,
    "std": tuple[Std, Std, Std] | None,
}


class AnyTeacher(Protocol):
    """What every teacher offers, a network or a cache of logits.

    members: the networks with features that can be matched; none for a cache.
    weights: the share of each of `members` in the logits; they sum to 1.
    cycle_epochs: after how many epochs the teacher's batches repeat, 0 for never.
    """

    @property
    def members(self) -> "Sequence[Teacher]": ...

    @property
    def weights(self) -> Sequence[float]: ...

    @property
    def cycle_epochs(self) -> int: ...

    def __call__(self, images: Tensor, key: BatchKey | None = None) -> Any:
        """images: (B, 3, height, width), normalised for the student. key: the batch, in training.

        Returns logits (B, C); a list of them with a separate term for each teacher; `TappedOutput`
        with features.
        """

    def logits_only(self) -> "LogitsOnly | None":
        """Return the network as a map from images to logits, or None if there is none."""

    def missing_shares(self) -> Sequence[float]:
        """Return which share of its rows a cache lacks, by epoch of its cycle; () without one."""

    def describe(self) -> str:
        """Return a description of the teacher in one line."""


class InputAdapter(nn.Module):
    """Converts the student's images to the teacher's normalisation and size.

    It undoes the student's normalisation, applies the teacher's, and resizes (bicubic,
    antialiased) where the sizes differ. It is affine in the image, so it commutes with mixing. A
    teacher of any size gets images with another aspect ratio at the student's size.
    """

    def __init__(
        self, student: InputConfig, teacher: InputConfig, *, any_size: bool = True
    ) -> None:
        super().__init__()
        std_S, std_T = torch.tensor(student.std), torch.tensor(teacher.std)
        shift = (torch.tensor(student.mean) - torch.tensor(teacher.mean)) / std_T
        self.register_buffer("scale", (std_S / std_T)[None, :, None, None], persistent=False)
        self.register_buffer("shift", shift[None, :, None, None], persistent=False)
        (height, width), (height_T, width_T) = student.input_size, teacher.input_size
        keeps = any_size and height * width_T != width * height_T
        self.size = (height, width) if keeps else (height_T, width_T)
        self.renormalises = student.mean != teacher.mean or student.std != teacher.std

    def forward(self, images: Tensor) -> Tensor:
        """images: (B, 3, height, width), normalised for the student. Returns the teacher's."""
        if self.renormalises:
            images = images * self.scale + self.shift
        if tuple(images.shape[-2:]) != self.size:
            images = F.interpolate(images, self.size, mode="bicubic", antialias=True)
        return images

    def describe(self) -> str:
        own = "own mean and std" if self.renormalises else "the student's mean and std"
        return f"input {self.size[0]}x{self.size[1]}, {own}"


class Teacher(nn.Module):
    """A frozen network, always in evaluation mode, without gradients.

    amp_dtype: autocast type of its forward, or None. adaptor: reads the output of a network that
        returns more than logits. lean: describes how the network was optimized for inference; it
        then takes channels-last images. backend: torch.compile's, used in training alone, where
        all batches have one size. classifies: False for a network without a classifier.
    """

    cycle_epochs = 0
    weights = (1.0,)

    def __init__(
        self,
        network: nn.Module,
        adapter: InputAdapter,
        *,
        name: str = "",
        amp_dtype: torch.dtype | None = None,
        adaptor: Any = None,
        lean: str = "",
        backend: str = "",
        classifies: bool = True,
    ) -> None:
        super().__init__()
        self.classifies = classifies
        self.network = network.requires_grad_(False)
        self.lean, self.backend = lean, backend
        self._in_training = _compiled(self._logits, backend) if backend else self._logits
        self.taps: Any = AdaptorTaps(adaptor) if adaptor is not None else None
        self.index: int | None = None
        self.adapter, self.name, self.amp_dtype = adapter, name, amp_dtype
        self.eval()

    def train(self, mode: bool = True) -> "Teacher":
        """Stay in evaluation mode."""
        return super().train(False)

    def observe(self, taps: Any, index: int = 0) -> None:
        """Return `TappedOutput` from now on, with states by (index, tap). taps: as of `Student`."""
        self.taps, self.index = taps, index

    @torch.no_grad()
    def forward(self, images: Tensor, key: BatchKey | None = None) -> Tensor | TappedOutput:
        """images: (B, 3, height, width), normalised for the student. key: None in evaluation.

        Returns logits (B, C), or `TappedOutput`.
        """
        device = images.device.type
        with torch.autocast(device, dtype=self.amp_dtype, enabled=self.amp_dtype is not None):
            if self.taps is None:
                return (self._logits if key is None else self._in_training)(images).float()
            output = self.taps.forward(self.network, self._adapted(images))
        logits = output.logits.float() if isinstance(output.logits, Tensor) else output.logits
        if self.index is None:
            return logits
        states = {(self.index, tap): state for tap, state in output.states.items()}
        return replace(output, logits=logits, states=states)

    def _adapted(self, images: Tensor) -> Tensor:
        images = self.adapter(images)
        return images.contiguous(memory_format=torch.channels_last) if self.lean else images

    def _logits(self, images: Tensor) -> Any:
        return self.network(self._adapted(images))

    def describe(self) -> str:
        count = sum(p.numel() for p in self.network.parameters())
        parts = [
            self.name,
            f"{count / 1e6:.2f} M parameters",
            self.adapter.describe(),
            self.lean,
            self.backend and f"compiled by {self.backend}",
        ]
        return ", ".join(filter(None, parts))

    @property
    def members(self) -> "tuple[Teacher]":
        return (self,)

    @property
    def precision(self) -> torch.dtype:
        """The type in which the network computes."""
        return self.amp_dtype or torch.float32

    def logits_only(self) -> "LogitsOnly | None":
        return LogitsOnly(self) if self.classifies else None

    def missing_shares(self) -> Sequence[float]:
        return ()


def _compiled(function: Callable, backend: str) -> Callable:
    """Return `function` compiled for one batch size, with inductor's freezing of weights."""
    freezing = {"options": {"freezing": True}} if backend == "inductor" else {}
    return torch.compile(function, backend=backend, dynamic=False, **freezing)


class Teachers(nn.Module):
    """Several teachers as one: the weighted mean of their logits, or all of them.

    weights: their shares, scaled to sum 1. Of a teacher with share 0 only the features are used.
    separate: return a list of logits, one of each teacher with a share, for a term each.
    """

    cycle_epochs = 0

    def __init__(
        self, members: Sequence[Teacher], weights: Sequence[float], *, separate: bool = False
    ) -> None:
        super().__init__()
        self.members = nn.ModuleList(members)
        self.weights = tuple(weight / sum(weights) for weight in weights)
        self.separate = separate

    @torch.no_grad()
    def forward(
        self, images: Tensor, key: BatchKey | None = None
    ) -> Tensor | list[Tensor] | TappedOutput:
        """images, key: as of `Teacher`. Returns logits (B, C), a list, or `TappedOutput`."""
        outputs = [member(images, key) for member in self.members]
        observed = [output for output in outputs if isinstance(output, TappedOutput)]
        used = [(w, _logits_of(x)) for w, x in zip(self.weights, outputs) if w > 0]
        logits: Any = [x for _, x in used]
        if not self.separate and len({x.shape for x in logits}) == 1:
            logits = sum(w * x for w, x in used)
        states = {tap: state for each in observed for tap, state in each.states.items()}
        return TappedOutput(logits, states) if observed else logits

    def describe(self) -> str:
        shares = zip(self.members, self.weights)
        return "; ".join(f"{member.describe()}, share {share:.2f}" for member, share in shares)

    @property
    def precision(self) -> torch.dtype:
        """The type in which the networks compute."""
        return self.members[0].precision

    def logits_only(self) -> "LogitsOnly | None":
        return LogitsOnly(self) if any(member.classifies for member in self.members) else None

    def missing_shares(self) -> Sequence[float]:
        return ()


def _logits_of(output: Any) -> Any:
    return output.logits if isinstance(output, TappedOutput) else output


class LogitsOnly(nn.Module):
    """A teacher without its features: a map from images to logits, to evaluate its accuracy."""

    def __init__(self, teacher: Teacher | Teachers) -> None:
        super().__init__()
        self.teacher = teacher

    def forward(self, images: Tensor) -> Tensor:
        """images: as of `Teacher`. Returns logits (B, C), the mean of several teachers'."""
        logits = _logits_of(self.teacher(images))
        return sum(logits) / len(logits) if isinstance(logits, list) else logits


@dataclass(frozen=True)
class Source:
    """One teacher of the command line.

    path: of its file, "" for published weights. share: of its logits among those of several
    teachers. side: --teacher-input-size, None for the teacher's own. classifies: whether its logits
    are used; else its features alone are.
    """

    name: str
    path: str
    share: float
    side: int | None
    classifies: bool


def build_sources(args: Namespace) -> list[Source]:
    """Return the teachers of the command line; [] if the run needs none.

    Raises UserError unless every flag is given once for each teacher.
    """
    distils = args.distillation_type != "none"
    if not (distils or args.match or args.ranking_kl_weight):
        return []
    names, paths = (
        [x] if isinstance(x, str) else x for x in (args.teacher_model, args.teacher_path)
    )
    count = len(names)
    paths, shares = paths if any(paths) else [""] * count, args.teacher_weight or [1.0] * count
    sides = args.teacher_input_size or [None] * count
    if len(sides) != count:
        raise UserError(
            f"--teacher-input-size {sides}: give one value for each of {count} teachers"
        )
    if not count == len(paths) == len(shares) or min(shares) < 0 or not any(shares):
        raise UserError(
            f"{count} --teacher-model, {len(paths)} --teacher-path, --teacher-weight {shares}; "
            "give one of each for every teacher, a weight above 0, or 0 to one that is only matched"
        )
    return [
        Source(name, path, share, side, classifies=distils and share > 0)
        for name, path, share, side in zip(names, paths, shares, sides)
    ]


def build_identity(args: Namespace) -> list[str]:
    """Return the identity of each teacher's weights; [] without a teacher.

    It is the hash of the file, or of the files in the folder of `local-dir:`. Published weights are
    identified by their URL, or as those of timm's version. The network of a plugin is identified by
    the hash of the plugin's file as well.
    Raises UserError for a missing file.
    """
    return [
        (safe_load.fingerprint(each.path) if each.path else _published(each.name))
        + _code(each.name)
        for each in build_sources(args)
    ]


def _code(name: str) -> str:
    """Return the hash of the plugin that registered a network; "" for timm's and ours."""
    file = models.plugins.source_of(name)
    return f", network by {safe_load.fingerprint(file)}" if file else ""


def _published(name: str) -> str:
    """Return the identity of the weights of a teacher without a file, without loading them."""
    prefix, _, folder = name.partition("local-dir:")
    if folder and not prefix:
        if not Path(folder).is_dir():
            raise UserError(f"teacher {name}: no such folder")
        files = sorted(path for path in Path(folder).iterdir() if path.is_file())
        return ", ".join(f"{path.name} {safe_load.fingerprint(str(path))}" for path in files)
    if models.plugins.source_of(name):
        return "its plugin's"
    file = models.released.find(name)
    return file.url if file else "timm's"


def build_teacher(
    args: Namespace,
    num_classes: int,
    student_inputs: InputConfig,
    device: torch.device,
    amp_dtype: torch.dtype | None = None,
    *,
    classes: Sequence[str] | None = None,
) -> Teacher | Teachers | None:
    """Return the teacher of the command line on `device`, or None if the run needs none.

    classes: names of the student's outputs, with which the teacher's are matched.
    Without distillation of logits, or with a share of 0 among several, only its features are used
    and it needs no classifier.
    Raises UserError for an unknown model, a file that is missing or of another architecture, and
    another number of classes than the student's.
    """
    sources = build_sources(args)
    if not sources:
        return None
    adaptor = pick(ADAPTORS, args.teacher_adaptor, "adaptor") if args.teacher_adaptor else None
    is_tapped = args.match or args.ranking_kl_weight or adaptor is not None
    backend = "" if is_tapped else args.torchcompile  # taps are not compiled
    members = []
    for each in sources:
        name, path = each.name, each.path
        own, teacher_inputs = models.data_config(name), input_of(name, path, each.side)
        size = teacher_inputs.input_size
        img_size = None if size == tuple(own["input_size"][1:]) else size
        network = _network(each, num_classes, img_size=img_size, classes=classes)
        takes_any = not own["fixed_input_size"] and not hasattr(network, "pos_embed")
        models.select_kernels(network.eval(), device.type, amp_dtype)
        lean = ""
        if amp_dtype is not None:
            network = network.to(memory_format=torch.channels_last)
            lean = f"{str(amp_dtype).removeprefix('torch.')}, channels last"
        members.append(
            Teacher(
                network,
                InputAdapter(student_inputs, teacher_inputs, any_size=takes_any),
                name=f"{name} from {path or _weights_source(name)}",
                amp_dtype=amp_dtype,
                adaptor=adaptor,
                lean=lean,
                backend=backend,
                classifies=each.classifies,
            )
        )
    if len(members) == 1:
        return members[0].to(device)
    shares = [each.share for each in sources]
    return Teachers(members, shares, separate=args.teacher_logits == "apart").to(device)


def input_of(name: str, path: str, side: int | None = None) -> InputConfig:
    """Return the input that a teacher was trained on.

    A file that a run of this repository wrote states it, as do an export and a released file;
    else it is that of the model name.
    side: --teacher-input-size, which replaces the size.
    """
    own, trained = models.data_config(name), _trained_with(name, path)
    if path and not trained:
        own = models.stated_input(path) or own
    given = {key: trained.get(key) for key in INPUTS}
    return models.to_inputs(own, **given | ({"input_size": [side]} if side else {}))


def _trained_with(name: str, path: str) -> dict[str, Any]:
    """Return the settings of the run of this repository that wrote the file, else {}.

    Raises UserError for an input size, mean or std that is not one.
    """
    settings = safe_load.read_weights_file(path).get("args") if path else None
    if not isinstance(settings, dict) or settings.get("model") != name:
        return {}
    for key, kind in INPUTS.items():
        structured.convert(
            settings.get(key), kind, f"--teacher-path {path}: its settings have {key}"
        )
    return settings


def _network(
    source: Source,
    num_classes: int,
    *,
    img_size: tuple[int, int] | None = None,
    classes: Sequence[str] | None = None,
) -> nn.Module:
    """Return a teacher's network with its weights; its outputs are in the student's order."""
    name, path, classifies = source.name, source.path, source.classifies
    known = classes_of_teacher(name, path) if classifies else None
    if not path:  # before weights are fetched
        outputs = match_outputs(name, known, num_classes, classes)
    count = known.count if known is not None else num_classes * classifies
    network = models.create_model(name, num_classes=count, pretrained=not path, img_size=img_size)
    if path:
        try:
            models.load_weights(network, path, without_head=not classifies, advice=TEACHER_ADVICE)
        except UserError as error:
            raise UserError(
                f"teacher {name}: {error}. To train a teacher on your classes: "
                f"{teacher_command(name)}"
            ) from error
        outputs = match_outputs(name, known, num_classes, classes)
    if outputs.chosen is not None:
        models.select_outputs(network, outputs.chosen)
    if outputs.note:
        print_once("teacher", outputs.note)
    return network


def _weights_source(name: str) -> str:
    """Return in words where the weights of a teacher without a file come from."""
    if plugin := models.plugins.source_of(name):
        return Path(plugin).name
    file = models.released.find(name)
    return f"{file.file} of DeiT's" if file else "timm"
