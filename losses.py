"""The losses of every objective: tensors in, a scalar out.

B batch, N tokens, D width, H heads, C classes; suffix _S student, _T teacher. In a mask, 1 (True)
keeps a token and 0 leaves it out. This module has no trainable parameter and reads no file.

All losses compute in at least float32, under autocast too: half precision becomes float32,
float64 stays. The teacher's tensors never receive a gradient. Shapes must be equal where a formula
compares two tensors: nothing is broadcast. To add a loss, write a function and add a line to its
map.
"""

import contextlib
import functools
import math
import warnings
from argparse import Namespace
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from base.errors import UserError

Mask = Tensor | None
Pair = Sequence[Tensor]  # two layers of one network

# TextBrewer's: scores of padded keys carry an additive -10000, so whatever lies this far below
# zero is taken for padding. Applied only where no mask is given.
PADDING_SCORE = -1e-3
UNLABELLED = -1  # the class number of an image without a label


# --- precision ------------------------------------------------------------------------------


def _autocast_off(tensor: object) -> contextlib.AbstractContextManager:
    device = tensor.device.type if isinstance(tensor, Tensor) else "none"
    if device == "none" or not torch.amp.is_autocast_available(device):
        return contextlib.nullcontext()
    return torch.autocast(device, enabled=False)


def _full_precision(loss: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Switch autocast off inside `loss`: a matrix product would otherwise go back to half."""

    @functools.wraps(loss)
    def wrapped(*values, **named) -> Tensor:
        first = next(iter((*values, *named.values())), None)
        while isinstance(first, list | tuple) and first:
            first = first[0]
        with _autocast_off(first):
            return loss(*values, **named)

    return wrapped


def _raised(*tensors: Tensor) -> tuple[Tensor, ...]:
    """Return the tensors in one type: float64 if any has it, else float32."""
    dtype = torch.float32
    for tensor in tensors:
        dtype = torch.promote_types(dtype, tensor.dtype)
    return tuple(tensor.to(dtype) for tensor in tensors)


def _from_teacher(tensor: Tensor) -> Tensor:
    """Return `tensor` without gradient, and as one that autograd may keep."""
    return tensor.clone() if tensor.is_inference() else tensor.detach()


def _shape(tensor: Tensor) -> str:
    return str(tuple(tensor.shape))


# --- DeiT's objective -----------------------------------------------------------------------


class DistillationLoss(nn.Module):
    """DeiT's objective: (1 - alpha) * base(class logits, labels) + alpha * distillation.

    base_criterion: (logits (B,C), labels) -> scalar.
    teacher_model: images -> logits (B,C), frozen and in evaluation mode, or None if every call
        passes `teacher_outputs`. It is not a submodule: absent from `state_dict`, and untouched
        by `.train()` and `.to()`.
    distillation_type: "none"; "soft", tau^2 * KL(teacher || student) at temperature tau; or
        "hard", cross entropy with the teacher's most likely class (tau unused, no smoothing).
    alpha: weight of the distillation, 0 to 1. tau: temperature of "soft", above 0.
    reduction: of "soft": "numel" divides by B*C as DeiT does, "batchmean" by B as Hinton did
        (C times as large).
    head: "dist" distils the second of `(class, distillation)` logits, which the student must
        then return; "cls" the class logits, and a single Tensor will do.
    logit_standardization: of "soft": each row of both sides goes through `standardize_logits`.
    kd_loss: instead of "soft"'s KL, (logits_S, logits_T, temperature) -> scalar, such as an entry
        of `KD_LOSS_MAP`; `reduction` and tau^2 are then its own.
    teacher_weights: shares of several teachers, whose logits then come as a list, a term each.

    `weights` are those of the two terms, (1 - alpha, alpha) unless they are set. After a
    call `terms` holds {"base", "distillation"} (with "none": only "base"): detached scalars before
    the weights, on the device.
    Raises ValueError for settings that are not the above.
    Source: Touvron et al. 2021 (arXiv 2012.12877) and DeiT's code; "cls" with "batchmean" is
    Hinton's, and Hugging Face's with 1 - alpha for their alpha.
    """

    teacher_model: Callable[..., Any] | None

    def __init__(
        self,
        base_criterion: Callable[[Tensor, Tensor], Tensor],
        teacher_model: Callable[[Tensor], Tensor] | None,
        distillation_type: str,
        alpha: float,
        tau: float,
        *,
        reduction: str = "numel",
        head: str = "dist",
        logit_standardization: bool = False,
        kd_loss: Callable[[Tensor, Tensor, float], Tensor] | None = None,
        teacher_weights: Sequence[float] = (1.0,),
    ) -> None:
        super().__init__()
        _check_choice("distillation type", distillation_type, ("none", "soft", "hard"))
        _check_choice("distillation reduction", reduction, ("numel", "batchmean"))
        _check_choice("distillation head", head, ("dist", "cls"))
        if not 0 <= alpha <= 1:
            raise UserError(f"distillation alpha {alpha}: must be between 0 and 1")
        if distillation_type == "soft" and not tau > 0:
            raise UserError(f"distillation tau {tau}: must be above 0")
        if logit_standardization and distillation_type == "hard":
            raise UserError("logit standardization changes nothing in hard distillation; use soft")
        self.base_criterion = base_criterion
        object.__setattr__(self, "teacher_model", teacher_model)  # past nn.Module's registration
        self.distillation_type = distillation_type
        self.alpha = alpha
        self.weights = (1 - alpha, alpha)
        self.kd_loss, self.teacher_weights = kd_loss, tuple(teacher_weights)
        self.tau = tau
        self.reduction = reduction
        self.head = head
        self.logit_standardization = logit_standardization
        self.terms: dict[str, Tensor] = {}

    @property
    def term_weights(self) -> dict[str, float]:
        """The weight of each of `terms`: the sum of their products is the loss."""
        if self.distillation_type == "none":
            return {"base": 1.0}
        return dict(zip(("base", "distillation"), self.weights))

    def at_update(self, update: int) -> None:
        """Prepare for an update, counted from 0. The weights are constant."""
        if isinstance(self.base_criterion, LabelledMean):
            self.base_criterion.at_update(update)

    def forward(
        self,
        inputs: Tensor | None,
        outputs: Tensor | tuple[Tensor, Tensor],
        labels: Tensor,
        *,
        teacher_outputs: Tensor | Sequence[Tensor] | None = None,
    ) -> Tensor:
        """Return the loss, a scalar.

        inputs: (B,3,H,W), the teacher's images; unused if `teacher_outputs` (B,C) is given.
        outputs: (B,C), or (class, distillation) logits, (B,C) each. "none" reads the class
        logits alone.
        labels: as `base_criterion` takes them, (B,) class numbers or (B,C) shares.
        Raises ValueError if the outputs do not fit the head, if there is no teacher, or if the
        teacher's logits have another shape than the student's.
        """
        logits, logits_S = self._read_outputs(outputs)
        with _autocast_off(logits):
            (logits,) = _raised(logits)
            if labels.is_floating_point():
                labels = labels.to(logits.dtype)
            base = self.base_criterion(logits, labels)
        self.terms = {"base": base.detach()}
        if isinstance(self.base_criterion, LabelledMean):
            self.terms |= self.base_criterion.shares
        if self.distillation_type == "none":
            return base
        if isinstance(teacher_outputs, list | tuple):
            pairs = zip(self.teacher_weights, teacher_outputs, strict=True)
            terms = [w * self._distill(logits_S, _from_teacher(t)) for w, t in pairs]
            distillation = torch.as_tensor(sum(terms))
        else:
            distillation = self._distill(logits_S, self._teacher_logits(inputs, teacher_outputs))
        self.terms["distillation"] = distillation.detach()
        return self.weights[0] * base + self.weights[1] * distillation

    def _read_outputs(self, outputs: Tensor | tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        """Return the logits for the labels and the logits for the teacher."""
        if isinstance(outputs, Tensor):
            if self.distillation_type != "none" and self.head == "dist":
                raise UserError(
                    f"{self.distillation_type} distillation needs (class, distillation) logits, "
                    f"the student returned one Tensor {_shape(outputs)}; use a student with a "
                    "distillation head in training mode, such as deit_tiny_distilled_patch16_224, "
                    "or distil its class head: --distillation-head cls (head='cls')"
                )
            return outputs, outputs
        if not isinstance(outputs, tuple | list) or len(outputs) != 2:
            what = f"{len(outputs)}" if isinstance(outputs, tuple | list) else type(outputs)
            raise ValueError(
                "the student must return one Tensor or a pair of (class, distillation) logits, "
                f"not {what}"
            )
        return outputs[0], outputs[0 if self.head == "cls" else 1]

    def _teacher_logits(self, inputs: Tensor | None, teacher_outputs: Any) -> Tensor:
        if teacher_outputs is None:
            if self.teacher_model is None:
                raise ValueError(
                    f"{self.distillation_type} distillation has no teacher: give teacher_model, "
                    "or teacher_outputs with every call"
                )
            with torch.no_grad():
                teacher_outputs = self.teacher_model(inputs)
        if not isinstance(teacher_outputs, Tensor):
            raise ValueError(
                f"the teacher returned a {type(teacher_outputs).__name__} instead of logits (B,C); "
                "put it in evaluation mode"
            )
        return _from_teacher(teacher_outputs)

    def _distill(self, logits_S: Tensor, logits_T: Tensor) -> Tensor:
        _check_class_counts(logits_S, logits_T)
        with _autocast_off(logits_S):
            logits_S, logits_T = _raised(logits_S, logits_T)
            if self.distillation_type == "hard":
                return F.cross_entropy(logits_S, logits_T.argmax(dim=1))
            if self.logit_standardization:
                logits_S, logits_T = standardize_logits(logits_S), standardize_logits(logits_T)
            if self.kd_loss is not None:
                return self.kd_loss(logits_S, logits_T, self.tau)
            total = self.tau**2 * F.kl_div(
                F.log_softmax(logits_S / self.tau, dim=1),
                F.log_softmax(logits_T / self.tau, dim=1),
                reduction="sum",
                log_target=True,
            )
        return total / (logits_S.numel() if self.reduction == "numel" else logits_S.shape[0])


def _check_choice(what: str, name: str, known: Sequence[str]) -> None:
    if name not in known:
        raise UserError(f"{what} {name!r} is not known; choose one of: {', '.join(known)}")


def _check_class_counts(logits_S: Tensor, logits_T: Tensor) -> None:
    if logits_S.dim() != 2 or logits_T.dim() != 2 or len(logits_S) != len(logits_T):
        raise ValueError(
            f"student logits {_shape(logits_S)}, teacher logits {_shape(logits_T)}; both must be "
            "(B,C) for the same B images"
        )
    if logits_S.shape[1] != logits_T.shape[1]:
        raise UserError(
            f"the student has {logits_S.shape[1]} classes, the teacher {logits_T.shape[1]}; "
            "the teacher must be trained on the student's classes, in the same order"
        )


class BinaryCrossEntropyTargets(nn.Module):
    """Binary cross entropy, one yes-or-no question a class: 1 for every class in the image.

    Called as (logits (B,C), labels): class numbers (B,), or shares (B,C) from mixing, of which
    each above the off-value becomes 1; mean over B*C.
    smoothing: the label smoothing inside the shares: their off-value is smoothing / C. The
        targets are 0 and 1 whatever it is.
    Source: DeiT's --bce-loss (Wightman et al. 2021, arXiv 2110.00476). It differs in that class
    numbers work, and that smoothed shares do not all count as present.
    """

    def __init__(self, smoothing: float = 0.0) -> None:
        super().__init__()
        self.smoothing = smoothing

    def forward(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Return the loss; raises ValueError if `labels` is neither (B,) integers nor (B,C)."""
        return self.of_entries(logits, labels).mean()

    def of_entries(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Return the loss of every image and class, (B,C)."""
        with _autocast_off(logits):
            (logits,) = _raised(logits)
            targets = _as_targets(logits, labels)
            # A hundredth above: mixing adds lam * off and (1 - lam) * off, and in half precision
            # their sum may round to above off.
            off_value = 1.01 * self.smoothing / logits.shape[1]
            targets = (targets > off_value).to(logits.dtype)
            return F.binary_cross_entropy_with_logits(logits, targets, reduction="none")


class LabelledMean(nn.Module):
    """A base criterion for batches in which images have no label: its mean over the others.

    Called as (logits (B,C), labels): class numbers (B,), `UNLABELLED` for an image without one; or
    shares (B,C) from mixing, in which each unlabelled part of an image is missing, so that a row
    adds up to the image's labelled part w. An image counts w times: the loss is the sum of w times
    the loss of each image, divided by the number of labelled images, and 0 if there are none.
    mean_labelled: the labelled images of a micro-step in one process, as an average over all
        micro-steps and processes of an update, by the number of the update. The loss of an update
        is then the exact mean over its labelled images. None: divide by those of the batch.
    bce, smoothing: as in `build_base_criterion`.

    After a call `shares` holds the shares of images in the batch with and without a label.
    """

    def __init__(
        self,
        *,
        bce: bool = False,
        smoothing: float = 0.0,
        mean_labelled: Callable[[int], float] | None = None,
    ) -> None:
        super().__init__()
        self.bce = BinaryCrossEntropyTargets(smoothing) if bce else None
        self.smoothing, self.mean_labelled = smoothing, mean_labelled
        self.count: float | None = None
        self.shares: dict[str, Tensor] = {}

    def at_update(self, update: int) -> None:
        """Set the number of labelled images to divide by in an update, counted from 0."""
        if self.mean_labelled is not None:
            self.count = self.mean_labelled(update)

    def forward(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Return the loss, a scalar."""
        is_mixed = labels.is_floating_point()
        parts = (labels.sum(1) if is_mixed else labels != UNLABELLED).to(logits.dtype)  # (B,)
        if self.bce is not None:
            known = labels if is_mixed else labels.clamp(min=0)
            total = (self.bce.of_entries(logits, known).mean(1) * parts).sum()
        else:
            smoothing = 0.0 if is_mixed else self.smoothing
            total = F.cross_entropy(
                logits, labels, reduction="sum", ignore_index=UNLABELLED, label_smoothing=smoothing
            )
        labelled = parts.mean().detach()
        self.shares = {"labelled": labelled, "unlabelled": 1 - labelled}
        count = parts.sum() if self.count is None else self.count
        return total / torch.as_tensor(count, dtype=total.dtype).clamp(min=1e-6)


def _as_targets(logits: Tensor, labels: Tensor) -> Tensor:
    """Return labels as floating-point shares (B,C): class numbers (B,) become one-hot rows."""
    if labels.dim() == 1 and len(labels) == len(logits) and not labels.is_floating_point():
        return F.one_hot(labels.long(), logits.shape[1]).to(logits.dtype)
    if labels.shape != logits.shape:
        raise ValueError(
            f"labels {_shape(labels)} of type {labels.dtype} for logits {_shape(logits)}; give "
            "class numbers (B,), or shares with the shape of the logits"
        )
    return labels if labels.is_floating_point() else labels.to(logits.dtype)


def build_base_criterion(
    *,
    mixing: bool,
    smoothing: float,
    bce: bool,
    mean_labelled: Callable[[int], float] | None = None,
) -> nn.Module:
    """Return the loss of the class logits (B,C) against the labels, as DeiT chooses it.

    mixing: labels are shares (B,C), which mixup or cutmix has already smoothed.
    smoothing: label smoothing, at least 0 and below 1. bce: binary cross entropy instead.
    mean_labelled: of `LabelledMean`, if some images have no label; None: all have one.
    """
    if not 0 <= smoothing < 1:
        raise UserError(f"--smoothing {smoothing}: must be at least 0 and below 1")
    if mean_labelled is not None:
        return LabelledMean(bce=bce, smoothing=smoothing, mean_labelled=mean_labelled)
    if bce:
        return BinaryCrossEntropyTargets(smoothing)
    return nn.CrossEntropyLoss(label_smoothing=0.0 if mixing else smoothing)


def build_criterion(
    args: Namespace,
    *,
    mixing: bool,
    head: str = "dist",
    mean_labelled: Callable[[int], float] | None = None,
    **extensions: Any,
) -> nn.Module:
    """Return the objective of the command line; its calls get the teacher's logits.

    mean_labelled: of `LabelledMean`, if some images have no label; None: all have one.
    extensions: `kd_loss` and `teacher_weights` of DistillationLoss.
    """
    if args.cosub:
        return CosubLoss()
    return DistillationLoss(
        build_base_criterion(
            mixing=mixing,
            smoothing=args.smoothing,
            bce=args.bce_loss,
            mean_labelled=mean_labelled,
        ),
        None,
        args.distillation_type,
        args.distillation_alpha,
        args.distillation_tau,
        reduction=args.distillation_reduction,
        head=head,
        logit_standardization=args.logit_standardization,
        **extensions,
    )


@_full_precision
def cosub_loss(outputs_1: Tensor, outputs_2: Tensor, targets: Tensor) -> Tensor:
    """Co-training of two submodels: each learns from the labels and from the other.

    outputs_1, outputs_2: logits (B,C) of the same images under two draws of stochastic depth.
    targets: class numbers (B,), or shares (B,C), taken as they are (smoothing included).
    Returns a quarter of the sum of four binary cross entropies: each side with the targets, and
    each with the other's probabilities, which receive no gradient.
    Raises ValueError if the shapes differ.
    Source: Touvron et al. 2022 (arXiv 2212.04884) as in DeiT's engine; class numbers are ours.
    """
    _check_same_shape("cosub", outputs_1, outputs_2, sides=("first submodel", "second"))
    outputs_1, outputs_2 = _raised(outputs_1, outputs_2)
    targets = _as_targets(outputs_1, targets).to(outputs_1.dtype)
    bce = F.binary_cross_entropy_with_logits
    from_labels = bce(outputs_1, targets) + bce(outputs_2, targets)
    from_the_other = bce(outputs_1, outputs_2.detach().sigmoid())
    from_the_other = from_the_other + bce(outputs_2, outputs_1.detach().sigmoid())
    return 0.25 * (from_labels + from_the_other)


class CosubLoss(nn.Module):
    """`cosub_loss` behind the call of `DistillationLoss`, for a student that ran twice.

    outputs: (2B,C), the batch and then the batch again, each with its own stochastic depth.
    labels: (B,) or (B,C). After a call `terms` holds {"base"}.
    """

    term_weights = {"base": 1.0}

    def __init__(self) -> None:
        super().__init__()
        self.terms: dict[str, Tensor] = {}

    def at_update(self, update: int) -> None:
        """As of `DistillationLoss`: nothing changes."""

    def forward(
        self,
        inputs: Tensor | None,
        outputs: Tensor,
        labels: Tensor,
        *,
        teacher_outputs: Tensor | None = None,
    ) -> Tensor:
        """Return the loss; raises ValueError unless there are two outputs for every label."""
        if not isinstance(outputs, Tensor) or len(outputs) != 2 * len(labels):
            what = _shape(outputs) if isinstance(outputs, Tensor) else "several heads"
            raise ValueError(
                f"cosub: the student returned {what} for {len(labels)} labels; it must run one "
                "head on the batch twice and return (2B,C)"
            )
        loss = cosub_loss(*outputs.chunk(2), labels)
        self.terms = {"base": loss.detach()}
        return loss


# --- logits ---------------------------------------------------------------------------------


def _check_same_shape(
    name: str,
    one: Tensor,
    other: Tensor,
    way_out: str = "the shapes must be equal",
    sides: tuple[str, str] = ("student", "teacher"),
) -> None:
    if one.shape != other.shape:
        raise ValueError(f"{name}: {sides[0]} {_shape(one)}, {sides[1]} {_shape(other)}; {way_out}")


def _divided(logits: Tensor, temperature: float | Tensor) -> Tensor:
    """Return logits (..., C) / temperature: a number, a 0-dim tensor, or one of shape (...)."""
    if not isinstance(temperature, Tensor):
        if not temperature > 0:
            raise ValueError(f"temperature {temperature}: must be above 0")
        return logits / temperature
    temperature = temperature.detach().to(logits)
    if temperature.dim() == 0:
        return logits / temperature
    if temperature.shape != logits.shape[:-1]:
        raise ValueError(
            f"temperature {_shape(temperature)} for logits {_shape(logits)}; give one number, or "
            f"one a row: {tuple(logits.shape[:-1])}"
        )
    return logits / temperature[..., None]


def _logit_pair(
    name: str, logits_S: Tensor, logits_T: Tensor, temperature: float | Tensor
) -> tuple[Tensor, Tensor]:
    """Return both logits over temperature, in one precision, the teacher's without gradient."""
    _check_same_shape(name, logits_S, logits_T, "both need the same images and classes")
    logits_S, logits_T = _raised(logits_S, _from_teacher(logits_T))
    return _divided(logits_S, temperature), _divided(logits_T, temperature)


@_full_precision
def kd_ce_loss(logits_S: Tensor, logits_T: Tensor, temperature: float | Tensor = 1) -> Tensor:
    """Cross entropy of the student's softmax with the teacher's, at `temperature`.

    logits_S, logits_T: (B,C) or (B,N,C). temperature: a number above 0, a 0-dim tensor, or one a
    row, (B,) or (B,N). Summed over C, mean over the rows, in nats; no tau^2. It is the KL
    divergence plus the teacher's entropy, so it does not reach 0.
    Raises ValueError if shapes differ. Source: TextBrewer's `ce`.
    """
    logits_S, logits_T = _logit_pair("kd ce", logits_S, logits_T, temperature)
    return -(logits_T.softmax(-1) * logits_S.log_softmax(-1)).sum(-1).mean()


@_full_precision
def kd_mse_loss(logits_S: Tensor, logits_T: Tensor, temperature: float | Tensor = 1) -> Tensor:
    """Mean squared difference of the logits, both divided by `temperature`.

    Shapes, temperature and errors as `kd_ce_loss`; mean over all elements. Source: TextBrewer's
    `mse`.
    """
    logits_S, logits_T = _logit_pair("kd mse", logits_S, logits_T, temperature)
    return F.mse_loss(logits_S, logits_T)


@_full_precision
def dist_loss(
    logits_S: Tensor,
    logits_T: Tensor,
    temperature: float = 1,
    *,
    beta: float = 1.0,
    gamma: float = 1.0,
) -> Tensor:
    """Match correlations, not values: of the classes in an image, of the images in a class.

    logits_S, logits_T: (B,C), B and C at least 2. temperature: one number, above 0.
    Returns tau^2 * (beta * (1 - mean_b r_b) + gamma * (1 - mean_c r_c)), r Pearson's correlation of
    the probabilities' rows and columns. B is the batch of this process.
    Raises ValueError for other shapes, or a temperature a row.
    Source: Huang et al. 2022 (arXiv 2205.10536), with their 1e-8 beside the norms, which leaves
    a little above 0 at equality.
    """
    if isinstance(temperature, Tensor) and temperature.dim() > 0:
        raise ValueError(
            f"dist: temperature {_shape(temperature)}; it takes one number, not a schedule a row"
        )
    logits_S, logits_T = _logit_pair("dist", logits_S, logits_T, temperature)
    if logits_S.dim() != 2 or min(logits_S.shape) < 2:
        raise ValueError(
            f"dist: logits {_shape(logits_S)}; it needs (B,C) with two images and two classes "
            "at the least, for a correlation"
        )
    probs_S, probs_T = logits_S.softmax(1), logits_T.softmax(1)
    in_image = 1 - _correlation(probs_S, probs_T, dim=1).mean()
    in_class = 1 - _correlation(probs_S, probs_T, dim=0).mean()
    return temperature**2 * (beta * in_image + gamma * in_class)


def _correlation(one: Tensor, other: Tensor, dim: int, eps: float = 1e-8) -> Tensor:
    one = one - one.mean(dim, keepdim=True)
    other = other - other.mean(dim, keepdim=True)
    return (one * other).sum(dim) / (one.norm(dim=dim) * other.norm(dim=dim) + eps)


@_full_precision
def standardize_logits(logits: Tensor) -> Tensor:
    """Return each row of logits (..., C) with mean 0 and standard deviation 1.

    (z - mean) / (std + 1e-7), std over C - 1. The student then has to learn the order and the
    relations of the teacher's logits, not their size.
    Raises ValueError for fewer than two classes. Source: Sun et al. 2024 (arXiv 2403.01427).
    """
    if logits.shape[-1] < 2:
        raise ValueError(f"standardize: logits {_shape(logits)}; it needs two classes or more")
    (logits,) = _raised(logits)
    mean, std = logits.mean(-1, keepdim=True), logits.std(-1, keepdim=True)
    return (logits - mean) / (std + 1e-7)


# --- features --------------------------------------------------------------------------------


def _read_mask(
    name: str, mask: Tensor, like: Tensor, tokens: int, *, every_row: bool = False
) -> Tensor:
    """Return mask (B,N) in the type and on the device of `like`.

    Raises ValueError for another shape, or if it (every_row: a row of it) keeps no token. On an
    accelerator the second check would wait for the device: there the loss becomes NaN instead.
    """
    wanted = (like.shape[0], tokens)
    if mask.shape != wanted:
        raise ValueError(f"{name}: mask {_shape(mask)}; it must be (B,N) = {wanted}")
    kept = mask.any(1)
    if mask.device.type == "cpu" and not bool(kept.all() if every_row else kept.any()):
        what = "a row of the mask" if every_row else "the mask"
        raise ValueError(f"{name}: {what} {_shape(mask)} is all zero, it keeps no token")
    return mask.to(device=like.device, dtype=like.dtype, non_blocking=True)


def _attention_pair(
    name: str, state_S: Tensor, state_T: Tensor, merge: Callable[..., Tensor] | None = None
) -> tuple[Tensor, Tensor]:
    """Return both attentions (B,H,N,N), heads merged to one if asked; the rest must be equal."""
    shapes = f"{name}: student {_shape(state_S)}, teacher {_shape(state_T)}"
    if state_S.dim() != state_T.dim() or state_S.dim() not in ((3, 4) if merge else (4,)):
        wanted = "(B,H,N,N) or (B,N,N)" if merge else "(B,H,N,N)"
        raise ValueError(f"{shapes}; both must be {wanted}")
    state_S, state_T = _raised(state_S, _from_teacher(state_T))
    if state_S.dim() == 3:
        state_S, state_T = state_S[:, None], state_T[:, None]  # (B,1,N,N)
    elif merge:
        state_S, state_T = merge(state_S, 1, keepdim=True), merge(state_T, 1, keepdim=True)
    if state_S.shape[1] != state_T.shape[1]:
        other = "attention_mse_sum" if "mse" in name else "attention_ce_mean"
        raise ValueError(
            f"{shapes}; {state_S.shape[1]} heads against {state_T.shape[1]}: use {other}"
        )
    if state_S.shape != state_T.shape:
        raise ValueError(f"{shapes}; use a teacher with the same tokens")
    return state_S, state_T


def _read_pair_mask(name: str, mask: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
    """Return mask (B,N) and its outer product with itself, to multiply with state (B,H,N,N)."""
    if state.shape[2] != state.shape[3]:
        raise ValueError(f"{name}: a mask needs square attention, not {_shape(state)}")
    mask = _read_mask(name, mask, state, state.shape[3])
    return mask, mask[:, None, :, None] * mask[:, None, None, :]  # (B,N), (B,1,N,N)


def _masked_attention_mse(name: str, state_S: Tensor, state_T: Tensor, mask: Tensor) -> Tensor:
    _, weights = _read_pair_mask(name, mask, state_S)
    return ((state_S - state_T) ** 2 * weights).sum() / (state_S.shape[1] * weights.sum())


def _attention_mse(name: str, state_S: Tensor, state_T: Tensor, mask: Mask, clip: bool) -> Tensor:
    if mask is not None:
        return _masked_attention_mse(name, state_S, state_T, mask)
    if not clip:
        return ((state_S - state_T) ** 2).sum() / state_S.numel()
    state_S = state_S.masked_fill(state_S <= PADDING_SCORE, 0)
    return F.mse_loss(state_S, state_T.masked_fill(state_T <= PADDING_SCORE, 0))


def _attention_ce(name: str, state_S: Tensor, state_T: Tensor, mask: Mask, clip: bool) -> Tensor:
    probs_T, log_probs_S = state_T.softmax(-1), state_S.log_softmax(-1)
    if mask is None and not clip:
        return -(probs_T * log_probs_S).sum() / math.prod(state_S.shape[:3])
    if mask is None:
        probs_T = probs_T.masked_fill(state_T <= PADDING_SCORE, 0)
        return -(probs_T * log_probs_S).sum(-1).mean()
    mask, weights = _read_pair_mask(name, mask, state_S)
    return -(probs_T * log_probs_S * weights).sum() / (state_S.shape[1] * mask.sum())


@_full_precision
def att_mse_loss(
    state_S: Tensor, state_T: Tensor, mask: Mask = None, *, clip: bool = True
) -> Tensor:
    """Mean squared difference of two attentions (B,H,N,N), head by head.

    mask: (B,N), 1 keeps a token; pairs of kept tokens count, and H * sum of their numbers is the
    divisor. Without a mask every score <= -1e-3 counts as 0 on both sides, which drops about half
    of a vision transformer's scores. clip: False without a mask counts all of them, as an all-ones
    mask does.
    Raises ValueError if shapes differ or the mask is all zero. Source: TextBrewer.
    """
    name = "attention_mse"
    return _attention_mse(name, *_attention_pair(name, state_S, state_T), mask, clip)


@_full_precision
def att_mse_sum_loss(
    state_S: Tensor, state_T: Tensor, mask: Mask = None, *, clip: bool = True
) -> Tensor:
    """As `att_mse_loss`, after summing each side over its heads, whose numbers may differ.

    state_S, state_T: (B,H,N,N), or (B,N,N) already summed. Without a mask the scores are set to
    0 after the sum. Sums of 3 and of 12 heads have different sizes: the loss is not scaled.
    Source: TextBrewer.
    """
    name = "attention_mse_sum"
    return _attention_mse(name, *_attention_pair(name, state_S, state_T, torch.sum), mask, clip)


@_full_precision
def att_ce_loss(
    state_S: Tensor, state_T: Tensor, mask: Mask = None, *, clip: bool = True
) -> Tensor:
    """Cross entropy of two attentions' softmax over the keys, from scores (B,H,N,N).

    mask: (B,N), 1 keeps a token; queries and keys are left out after both softmaxes, which run
    over all keys. In nats a query and head. Without a mask the keys that the teacher scores
    <= -1e-3 are left out, and its probabilities do not then sum to 1 (clip: see `att_mse_loss`).
    Raises ValueError if shapes differ or the mask is all zero. Source: TextBrewer.
    """
    name = "attention_ce"
    return _attention_ce(name, *_attention_pair(name, state_S, state_T), mask, clip)


@_full_precision
def att_ce_mean_loss(
    state_S: Tensor, state_T: Tensor, mask: Mask = None, *, clip: bool = True
) -> Tensor:
    """As `att_ce_loss`, after averaging each side's scores over its heads; numbers may differ.

    state_S, state_T: (B,H,N,N), or (B,N,N) already averaged. Source: TextBrewer.
    """
    name = "attention_ce_mean"
    return _attention_ce(name, *_attention_pair(name, state_S, state_T, torch.mean), mask, clip)


def _hidden_pair(name: str, state_S: Tensor, state_T: Tensor) -> tuple[Tensor, Tensor]:
    """Return both states; raises ValueError naming both shapes unless they are equal."""
    way_out = "the shapes must be equal"
    if state_S.dim() == state_T.dim() and state_S.shape[-1:] != state_T.shape[-1:]:
        way_out = "widths differ: project the student (proj), or compare with nst"
    elif state_S.dim() == state_T.dim() == 3 and state_S.shape[1] != state_T.shape[1]:
        way_out = "tokens differ: use a teacher with the same patch grid, or compare with fsp"
    _check_same_shape(name, state_S, state_T, way_out)
    state_S, state_T = _raised(state_S, _from_teacher(state_T))
    return state_S, state_T


def _mean_of_kept(name: str, values: Tensor, mask: Mask) -> Tensor:
    """Mean of values (B,N,D) over the kept tokens, or of any shape over everything."""
    if mask is None:
        return values.mean()
    if values.dim() != 3:
        raise ValueError(f"{name}: a mask needs states (B,N,D), not {_shape(values)}")
    mask = _read_mask(name, mask, values, values.shape[1])
    return (values * mask[:, :, None]).sum() / (mask.sum() * values.shape[2])


@_full_precision
def hid_mse_loss(state_S: Tensor, state_T: Tensor, mask: Mask = None) -> Tensor:
    """Mean squared difference of two hidden states.

    state_S, state_T: any equal shapes; (B,N,D) with a mask (B,N), of which 1 keeps a token.
    Raises ValueError if shapes differ or the mask is all zero. Source: TextBrewer.
    """
    state_S, state_T = _hidden_pair("hidden_mse", state_S, state_T)
    return _mean_of_kept("hidden_mse", (state_S - state_T) ** 2, mask)


@_full_precision
def cos_loss(state_S: Tensor, state_T: Tensor, mask: Mask = None) -> Tensor:
    """1 - cosine of two hidden states, token by token; mean over the tokens.

    state_S, state_T: (..., D), of equal shapes; (B,N,D) with a mask (B,N), of which 1 keeps a
    token. A zero vector counts as orthogonal. Raises ValueError if shapes differ or the mask is
    all zero. Source: TextBrewer, that is `torch.nn.CosineEmbeddingLoss` with target 1.
    """
    state_S, state_T = _hidden_pair("cos", state_S, state_T)
    # 1e-12 is CosineEmbeddingLoss's; F.cosine_similarity clamps the lengths instead.
    squares_S, squares_T = ((x**2).sum(-1, keepdim=True) + 1e-12 for x in (state_S, state_T))
    dots = (state_S * state_T).sum(-1, keepdim=True)
    return _mean_of_kept("cos", 1 - dots / (squares_S * squares_T).sqrt(), mask)  # (...,1)


@_full_precision
def pkd_loss(state_S: Tensor, state_T: Tensor, mask: Mask = None) -> Tensor:
    """Squared distance of the two class tokens after scaling both to length 1; mean over B.

    state_S, state_T: (B,N,D), of which token 0 is taken, or (B,D); each side may be either. The
    mask is not used. A zero vector has no direction: the result is NaN.
    Raises ValueError if B or D differ. Source: Sun et al. 2019 (arXiv 1908.09355), TextBrewer.
    """
    if not {state_S.dim(), state_T.dim()} <= {2, 3}:
        shapes = f"student {_shape(state_S)}, teacher {_shape(state_T)}"
        raise ValueError(f"pkd: {shapes}; each must be (B,N,D) or (B,D)")
    token_S, token_T = (x[:, 0] if x.dim() == 3 else x for x in (state_S, state_T))  # (B,D)
    token_S, token_T = _hidden_pair("pkd", token_S, token_T)
    unit_S, unit_T = (x / x.norm(dim=1, keepdim=True) for x in (token_S, token_T))
    return ((unit_S - unit_T) ** 2).sum(1).mean()


def _two_layers(
    name: str, state_S: Pair, state_T: Pair, *, same_width: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return S0, S1, T0, T1, each (B,N,D); raises ValueError unless a side fits within itself."""
    for side, state in (("student", state_S), ("teacher", state_T)):
        shapes = [tuple(layer.shape) for layer in state]
        fits = len(shapes) == 2 and all(len(shape) == 3 for shape in shapes)
        fits = fits and shapes[0][:2] == shapes[1][:2]
        if not fits or (same_width and shapes[0] != shapes[1]):
            wanted = "(B,N,D) twice" if same_width else "(B,N,D0) and (B,N,D1)"
            raise ValueError(f"{name}: the {side}'s two layers must be {wanted}, not {shapes}")
    (S0, S1), (T0, T1) = state_S, state_T
    return _raised(S0, S1, _from_teacher(T0), _from_teacher(T1))  # type: ignore[return-value]


def _both(state_S: Pair, state_T: Pair) -> str:
    shapes_S, shapes_T = ([tuple(layer.shape) for layer in side] for side in (state_S, state_T))
    return f"student {shapes_S}, teacher {shapes_T}"


@_full_precision
def fsp_loss(state_S: Pair, state_T: Pair, mask: Mask = None) -> Tensor:
    """Mean squared difference of the two networks' flow between two layers (Gram matrices).

    state_S, state_T: two layers each, (B,N,D0) and (B,N,D1); G = X0^t X1 / N, (B,D0,D1). The
    widths must agree between the networks; N only with a mask (B,N), 1 keeps a token, which
    divides by the kept tokens of each image instead.
    Raises ValueError if shapes do not fit or a row of the mask is all zero.
    Source: Yim et al. 2017, as TextBrewer has it (`fsp`, `gram`).
    """
    S0, S1, T0, T1 = _two_layers("fsp", state_S, state_T, same_width=False)
    if any(a.shape[::2] != b.shape[::2] for a, b in ((S0, T0), (S1, T1))):
        raise ValueError(
            f"fsp: {_both(state_S, state_T)}; batches and widths must agree, layer by layer: "
            "project the student (proj)"
        )
    if mask is None:
        flow_S, flow_T = S0.mT @ S1 / S1.shape[1], T0.mT @ T1 / T1.shape[1]  # (B,D0,D1)
        return F.mse_loss(flow_S, flow_T)
    if S0.shape[1] != T0.shape[1]:
        raise ValueError(f"fsp: {_both(state_S, state_T)}; one mask needs the same tokens")
    kept = _read_mask("fsp", mask, S0, S0.shape[1], every_row=True)[:, :, None]  # (B,N,1)
    flows = (S0 * kept).mT @ (S1 * kept) - (T0 * kept).mT @ (T1 * kept)
    return ((flows / kept.sum(1, keepdim=True)) ** 2).mean()


@_full_precision
def mmd_loss(state_S: Pair, state_T: Pair, mask: Mask = None) -> Tensor:
    """Mean squared difference of the two networks' token similarities between two layers.

    state_S, state_T: two layers each, (B,N,D_S) and (B,N,D_T); G = X0 X1^t / D, (B,N,N). Only
    B and N must agree between the networks, so no projection is needed.
    mask: (B,N), 1 keeps a token; pairs of kept tokens count.
    Raises ValueError if shapes do not fit or the mask is all zero.
    Source: Huang and Wang 2017 (arXiv 1707.01219), as TextBrewer has it (`nst`, `mmd`).
    """
    S0, S1, T0, T1 = _two_layers("nst", state_S, state_T, same_width=True)
    if S0.shape[:2] != T0.shape[:2]:
        raise ValueError(
            f"nst: {_both(state_S, state_T)}; batches and tokens must agree: use a teacher with "
            "the same patch grid, or compare with fsp"
        )
    similarity_S, similarity_T = S0 @ S1.mT / S1.shape[2], T0 @ T1.mT / T1.shape[2]  # (B,N,N)
    if mask is None:
        return F.mse_loss(similarity_S, similarity_T)
    return _masked_attention_mse("nst", similarity_S[:, None], similarity_T[:, None], mask)


@_full_precision
def vkd_loss(projected_S: Tensor, state_T: Tensor, mask: Mask = None) -> Tensor:
    """Smooth L1 distance of projected student features to layer-normalised teacher features.

    projected_S: (..., D), the student's after its orthogonal projection to the teacher's width;
    state_T: the same shape, normalised here over D without scale or shift. mask: (B,N) for
    (B,N,D), 1 keeps a token. Mean over the elements.
    Raises ValueError if shapes differ or the mask is all zero.
    Source: Miles et al. 2024 (arXiv 2403.06213).
    """
    projected_S, state_T = _hidden_pair("vkd", projected_S, state_T)
    state_T = F.layer_norm(state_T, state_T.shape[-1:])
    return _mean_of_kept("vkd", F.smooth_l1_loss(projected_S, state_T, reduction="none"), mask)


KD_LOSS_MAP: dict[str, Callable[..., Tensor]] = {
    "ce": kd_ce_loss,
    "mse": kd_mse_loss,
    "dist": dist_loss,
}

CLIPPED = (att_mse_sum_loss, att_mse_loss, att_ce_mean_loss, att_ce_loss)  # they take `clip`
MATCH_LOSS_MAP: dict[str, Callable[..., Tensor]] = {
    "attention_mse_sum": att_mse_sum_loss,
    "attention_mse": att_mse_loss,
    "attention_ce_mean": att_ce_mean_loss,
    "attention_ce": att_ce_loss,
    "hidden_mse": hid_mse_loss,
    "cos": cos_loss,
    "pkd": pkd_loss,
    "gram": fsp_loss,
    "fsp": fsp_loss,
    "mmd": mmd_loss,
    "nst": mmd_loss,
    "vkd": vkd_loss,
}


# --- embeddings -----------------------------------------------------------------------------


def _embedding_pair(one: Tensor, other: Tensor, wanted: str) -> tuple[Tensor, Tensor]:
    """Return both in one precision. Raises ValueError unless their widths are equal."""
    if not one.dim() == other.dim() == 2 or one.shape[1] != other.shape[1]:
        raise ValueError(f"embeddings {_shape(one)} and {_shape(other)}; give {wanted}")
    one, other = _raised(one, other)
    return one, other


def _unit(embeddings: Tensor) -> Tensor:
    (embeddings,) = _raised(embeddings)
    return F.normalize(embeddings, dim=-1)


@_full_precision
def pairwise_dot_score(one: Tensor, other: Tensor) -> Tensor:
    """Return the dot product of each row of `one` (B,D) with the same row of `other`, (B,)."""
    one, other = _embedding_pair(one, other, "(B,D) twice")
    _check_same_shape("embeddings", one, other, sides=("one", "other"))
    return (one * other).sum(-1)


@_full_precision
def pairwise_cos_sim(one: Tensor, other: Tensor) -> Tensor:
    """Return the cosine of each row of `one` (B,D) with the same row of `other`, (B,)."""
    return pairwise_dot_score(_unit(one), _unit(other))


@_full_precision
def dot_score(one: Tensor, other: Tensor) -> Tensor:
    """Return the dot products of all rows of `one` (B,D) with all of `other` (N,D), (B,N)."""
    one, other = _embedding_pair(one, other, "(B,D) and (N,D)")
    return one @ other.T


@_full_precision
def cos_sim(one: Tensor, other: Tensor) -> Tensor:
    """Return the cosines of all rows of `one` (B,D) with all of `other` (N,D), (B,N)."""
    return dot_score(_unit(one), _unit(other))


@_full_precision
def score_kl_loss(scores_S: Tensor, scores_T: Tensor, temperature: float = 1.0) -> Tensor:
    """tau^2 * KL(teacher || student) of the softmax over candidates; mean over B, in nats.

    scores_S, scores_T: (B,N), raw similarities of an image to the same N candidates; the
    teacher's -inf excludes a candidate.
    Raises ValueError if the shapes differ. Source: DistillKLDivLoss of sentence-transformers.
    """
    if scores_S.dim() != 2:
        raise ValueError(f"scores {_shape(scores_S)}: must be (B,N)")
    scores_S, scores_T = _logit_pair("scores", scores_S, scores_T, temperature)
    divergence = F.kl_div(scores_S.log_softmax(1), scores_T.softmax(1), reduction="batchmean")
    return temperature**2 * divergence


Similarity = Callable[[Tensor, Tensor], Tensor]


@_full_precision
def in_batch_similarity_loss(
    embeddings_S: Tensor,
    embeddings_T: Tensor,
    temperature: float = 1.0,
    *,
    similarity: Similarity = cos_sim,
) -> Tensor:
    """Match how similar each image is to the others of the batch: `score_kl_loss` of those.

    embeddings_S: (B,D_S), embeddings_T: (B,D_T) of the same images; the widths may differ.
    similarity: of all rows with all rows, `cos_sim` or `dot_score`, used on both sides. An image
    is no candidate of itself: its cosine of 1 would dominate the softmax.
    The batch is this process's. Raises ValueError if the batches differ or B < 3.
    """
    _check_same_images("in-batch similarity", embeddings_S, embeddings_T)
    if len(embeddings_S) < 3:
        raise ValueError(
            f"in-batch similarity: {len(embeddings_S)} images; with fewer than 3 an image has "
            "no two others to choose from, and the loss is constant"
        )
    embeddings_T = _from_teacher(embeddings_T)
    scores_S = _without_diagonal(similarity(embeddings_S, embeddings_S))
    scores_T = _without_diagonal(similarity(embeddings_T, embeddings_T))
    return score_kl_loss(scores_S, scores_T, temperature)


@_full_precision
def gallery_similarity_loss(
    embeddings_S: Tensor,
    embeddings_T: Tensor,
    gallery_S: Tensor,
    gallery_T: Tensor,
    temperature: float = 1.0,
    *,
    similarity: Similarity = cos_sim,
) -> Tensor:
    """Match how similar each image is to those of a gallery: `score_kl_loss` of those.

    embeddings_S: (B,D_S), embeddings_T: (B,D_T) of the same images; gallery_S: (N,D_S),
    gallery_T: (N,D_T) of the same other images in the same order, by each network. Only
    embeddings_S receives a gradient. similarity: as for `in_batch_similarity_loss`.
    Raises ValueError if B, N or a side's width differ, or N < 2.
    """
    _check_same_images("gallery similarity", embeddings_S, embeddings_T)
    _check_same_images("gallery", gallery_S, gallery_T)
    if len(gallery_S) < 2:
        raise ValueError(f"gallery similarity: {len(gallery_S)} images; give 2 or more")
    embeddings_T, gallery_T = _from_teacher(embeddings_T), _from_teacher(gallery_T)
    scores_S = similarity(embeddings_S, _from_teacher(gallery_S))
    return score_kl_loss(scores_S, similarity(embeddings_T, gallery_T), temperature)


def _check_same_images(name: str, embeddings_S: Tensor, embeddings_T: Tensor) -> None:
    if not embeddings_S.dim() == embeddings_T.dim() == 2 or len(embeddings_S) != len(embeddings_T):
        raise ValueError(
            f"{name}: student {_shape(embeddings_S)}, teacher {_shape(embeddings_T)}; both must "
            "be (B,D) for the same B images"
        )


def _without_diagonal(square: Tensor) -> Tensor:
    """Return (B,B) without its diagonal, (B,B-1), without waiting for the accelerator."""
    size = len(square)
    return square.flatten()[1:].view(size - 1, size + 1)[:, :-1].reshape(size, size - 1)


class DistillKLDivLoss(nn.Module):
    """Make a student rank images as its teacher does: `score_kl_loss` of explicit candidates.

    model: images -> embeddings (B,D). It is not a submodule: train, move and save it yourself.
    similarity_fct: of rows with the same rows, (B,D), (B,D) -> (B,); the student's side only.
    temperature: of both softmaxes, above 0.
    Source: DistillKLDivLoss of sentence-transformers, with images for sentences.
    """

    model: Callable[[Tensor], Tensor]

    def __init__(
        self,
        model: Callable[[Tensor], Tensor],
        similarity_fct: Similarity = pairwise_dot_score,
        temperature: float = 1.0,
    ) -> None:
        super().__init__()
        if not temperature > 0:
            raise ValueError(f"temperature {temperature}: must be above 0")
        object.__setattr__(self, "model", model)  # past nn.Module's registration
        self.similarity_fct = similarity_fct
        self.temperature = temperature

    def forward(self, inputs: Sequence[Tensor], labels: Tensor) -> Tensor:
        """Return the loss, a scalar.

        inputs: [query, positive, negative, ...], image batches (B,3,H,W); labels: (B,n), the
        teacher's raw score of the query with each of the n others.
        Raises ValueError as `compute_loss_from_embeddings` does.
        """
        return self.compute_loss_from_embeddings([self.model(batch) for batch in inputs], labels)

    def compute_loss_from_embeddings(self, embeddings: Sequence[Tensor], labels: Tensor) -> Tensor:
        """Return the loss of [query, other, ...] embeddings, (B,D) each, and labels (B,n).

        Raises ValueError if there is no other, or shapes do not fit. With n = 1 there is nothing
        to rank: the loss is 0, with a warning.
        """
        if len(embeddings) < 2 or not all(isinstance(each, Tensor) for each in embeddings):
            kinds = [type(each).__name__ for each in embeddings]
            raise ValueError(
                f"give the embeddings of a query and of one or more others, (B,D) each, not {kinds}"
            )
        query, *others = embeddings
        for other in others:
            _check_same_shape("embeddings", query, other, sides=("query", "candidate"))
        if labels.shape != (len(query), len(others)):
            raise ValueError(
                f"teacher's scores {_shape(labels)} for {len(query)} queries and {len(others)} "
                f"candidates; they must be {(len(query), len(others))}"
            )
        if len(others) == 1:
            warnings.warn("one candidate leaves nothing to rank: the loss is always 0")
        scores = [self.similarity_fct(query, other) for other in others]  # n times (B,)
        return score_kl_loss(torch.stack(scores, dim=1), labels, self.temperature)
