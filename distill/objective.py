"""The training objective: the sum of DeiT's loss, matches and ranking, with scheduled weights.

Shapes: B batch, C classes; suffix _S student, _T teacher.
"""

import logging
from argparse import Namespace
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

import losses
from base.errors import UserError
from distill.teacher import AnyTeacher, build_sources
from models import Student
from models.features import ADAPTORS, TappedOutput
from schedules import TEMPERATURE_SCHEDULER, WEIGHT_SCHEDULER, clamp_temperature

# Matching is imported where an objective has a match, a ranking or an adaptor.
if TYPE_CHECKING:
    from distill.match_builder import Term
    from matching import IntermediateMatch

_logger = logging.getLogger(__name__)
SMALL = 0.01  # a term below this share of the other one hardly changes the student


class ScheduledTemperature:
    """A kd loss at temperatures that depend on the logits, clamped at a floor above 0.

    After a call `clamped` holds the share of the rows that the floor changed.
    """

    def __init__(self, kd_loss: Callable[..., Tensor], schedule: Callable, floor: float) -> None:
        self.kd_loss, self.schedule, self.floor = kd_loss, schedule, floor
        self.clamped: Tensor | None = None

    def __call__(self, logits_S: Tensor, logits_T: Tensor, base: float) -> Tensor:
        temperature = self.schedule(logits_S, logits_T, base)
        if not isinstance(temperature, Tensor):  # made on the device: a copy would wait
            temperature = logits_S.new_full((), temperature)
        temperature, clamped = clamp_temperature(temperature, self.floor)
        self.clamped = clamped / temperature.numel()
        return self.kd_loss(logits_S, logits_T, temperature)


def shift_probability(logits_T: Tensor, labels: Tensor) -> Tensor:
    """Return teacher logits (B,C) with the largest and the true class's swapped (TextBrewer).

    labels: (B,) class numbers; the logits of an image without one stay as they are.
    Raises ValueError for shares, as mixup gives them.
    """
    if labels.is_floating_point() or labels.dim() != 1:
        raise ValueError("probability_shift needs one true class an image, not shares")
    largest, index = logits_T.max(1, keepdim=True)
    true = torch.where(labels[:, None] == losses.UNLABELLED, index, labels[:, None])
    return logits_T.scatter(1, index, logits_T.gather(1, true)).scatter(1, true, largest)


class Objective(nn.Module):
    """DeiT's objective with scheduled weights and terms on features. Call as `DistillationLoss`.

    criterion: `losses.DistillationLoss`. extra: the other terms by name. weights: of (base,
    distillation), by default those of `criterion`. schedules: of these weights, functions of
    progress, None for constant. The first update uses `weights`, the later ones the schedule, as
    in TextBrewer.
    After a call `terms` holds every term, detached and unweighted.
    """

    def __init__(
        self,
        criterion: losses.DistillationLoss,
        extra: "Mapping[str, Term]",
        *,
        weights: tuple[float, float] | None = None,
        schedules: Sequence[Callable[[float], float] | None] = (None, None),
        total_updates: int = 1,
        probability_shift: bool = False,
    ) -> None:
        super().__init__()
        self.criterion, self.extra = criterion, dict(extra)
        self.weights = criterion.weights if weights is None else weights
        self.schedules, self.total_updates = schedules, total_updates
        self.probability_shift = probability_shift
        self.terms: dict[str, Tensor] = {}
        self.at_update(0)

    @property
    def term_weights(self) -> dict[str, float]:
        """The weight of each of `terms`: the sum of their products is the loss."""
        base = self.criterion.weights[0]
        extra = {name: term.weight for name, term in self.extra.items()}
        return self.criterion.term_weights | {"base": base, "own": base} | extra

    def at_update(self, update: int) -> None:
        """Set the weights for an update, counted from 0 over the whole run."""
        self.criterion.at_update(update)
        progress = update / self.total_updates
        self.criterion.weights = tuple(
            weight if schedule is None or update == 0 else schedule(progress)
            for weight, schedule in zip(self.weights, self.schedules)
        )

    def forward(
        self, images: Tensor | None, outputs: Any, labels: Tensor, *, teacher_outputs: Any = None
    ) -> Tensor:
        """Return the loss. outputs, teacher_outputs: logits as there, or `TappedOutput`."""
        student, teacher = _observed(outputs), _observed(teacher_outputs)
        logits_T = teacher.logits
        if self.probability_shift:
            is_list = isinstance(logits_T, list)
            shifted = [shift_probability(x, labels) for x in (logits_T if is_list else [logits_T])]
            logits_T = shifted if is_list else shifted[0]
        loss = self.criterion(images, student.logits, labels, teacher_outputs=logits_T)
        if self.criterion.distillation_type == "none":
            loss = self.criterion.weights[0] * loss
        self.terms = dict(self.criterion.terms)
        kd_loss = self.criterion.kd_loss
        if isinstance(kd_loss, ScheduledTemperature) and kd_loss.clamped is not None:
            self.terms["temperature_clamped"] = kd_loss.clamped
        if student.losses:
            own = sum(value.float().mean() for value in student.losses)
            self.terms["own"], loss = own.detach(), loss + self.criterion.weights[0] * own
        for name, term in self.extra.items():
            value = term(student.states[name], teacher.states, student.mask)
            self.terms[name], loss = value.detach(), loss + term.weight * value
        return loss

    def describe(self) -> str:
        """Return the resolved weights, and a table of the matches."""
        kind = self.criterion.distillation_type
        parts = []
        for name, weight, schedule in zip(("base", kind), self.weights, self.schedules):
            later = getattr(schedule, "__name__", "scheduled")
            after = "" if schedule is None else f", then {later}"
            tau = f" (tau {self.criterion.tau:g})" if name == "soft" else ""
            parts += [f"{weight:g} {name}{after}{tau}"] * (name != "none")
        parts += [f"{term.weight:g} {name}" for name, term in self.extra.items()]
        rows = [term.row for term in self.extra.values() if term.row]
        if rows:
            rows.insert(0, ("match", "layers S, T", "student", "teacher", "projection", "weight"))
        widths = [max(map(len, column)) for column in zip(*rows)]
        table = ["  " + "  ".join(x.ljust(w) for x, w in zip(row, widths)).rstrip() for row in rows]
        return "\n".join([" + ".join(parts), *table])


def _observed(outputs: Any) -> TappedOutput:
    return outputs if isinstance(outputs, TappedOutput) else TappedOutput(outputs, {})


def build_objective(
    args: Namespace,
    student: Student,
    teacher: AnyTeacher | None,
    *,
    mixing: bool,
    input_size: tuple[int, int],
    total_updates: int,
    mean_labelled: Callable[[int], float] | None = None,
) -> nn.Module:
    """Return the loss of the run: `losses.DistillationLoss` if there are no other settings.

    It puts taps and projections into `student` and taps on `teacher`. To check every match it runs
    both on two images of `input_size` (height, width), with losses of --batch-size images.
    mean_labelled: of `losses.LabelledMean`, if some images have no label.
    Raises UserError, in one line, for a match that these two networks cannot satisfy.
    """
    members = teacher.members if teacher is not None else ()
    shares = teacher.weights if teacher is not None else ()
    criterion = _build_criterion(args, student, shares, mixing=mixing, mean_labelled=mean_labelled)
    matches = _build_matches(args)
    of_teacher = _teachers_of(matches, [source.name for source in build_sources(args)], shares)
    if not _build_is_extended(args):
        return criterion
    extra: dict[str, Term] = {}
    if matches or args.ranking_kl_weight or args.student_adaptor:
        from distill.match_builder import Ranking, build_terms

        similarity = args.ranking_similarity, args.ranking_tau, args.ranking_gather
        weight = args.ranking_kl_weight
        extra = build_terms(
            student,
            members,
            matches,
            input_size=input_size,
            batch_size=args.batch_size,
            ranking=Ranking(weight, *similarity) if weight else None,
            of_teacher=of_teacher,
            adaptors=(ADAPTORS.get(args.student_adaptor), ADAPTORS.get(args.teacher_adaptor)),
        )
    alpha = args.distillation_alpha if args.distillation_type != "none" else 0.0
    weights = (args.hard_label_weight, args.kd_loss_weight)
    schedulers = (args.hard_label_weight_scheduler, args.kd_loss_weight_scheduler)
    return Objective(
        criterion,
        extra,
        weights=tuple(d if w is None else w for w, d in zip(weights, (1 - alpha, alpha))),
        schedules=[None if name == "none" else WEIGHT_SCHEDULER[name] for name in schedulers],
        total_updates=max(1, total_updates),
        probability_shift=args.probability_shift,
    )


def _build_matches(args: Namespace) -> "list[IntermediateMatch]":
    """Return the matches of --match."""
    if not args.match:
        return []
    from matching import read_match

    return [read_match(match) for match in args.match]


def _build_criterion(
    args: Namespace,
    student: Student,
    shares: Sequence[float],
    *,
    mixing: bool,
    mean_labelled: Callable[[int], float] | None,
) -> nn.Module:
    """Return the loss of the logits. shares: of the teachers, a term each if those are apart."""
    kd_loss: Any = losses.KD_LOSS_MAP[args.kd_loss_type] if args.kd_loss_type else None
    if args.temperature_scheduler != "none":
        schedule = TEMPERATURE_SCHEDULER[args.temperature_scheduler]
        kd_loss = ScheduledTemperature(kd_loss, schedule, args.temperature_min)
    options: dict[str, Any] = {"kd_loss": kd_loss, "head": student.distillation_head}
    if args.teacher_logits == "apart" and len(shares) > 1:
        options["teacher_weights"] = [share for share in shares if share > 0]
    return losses.build_criterion(args, mixing=mixing, mean_labelled=mean_labelled, **options)


def _build_is_extended(args: Namespace) -> bool:
    """Return whether any setting goes beyond `losses.DistillationLoss`."""
    schedulers = {args.hard_label_weight_scheduler, args.kd_loss_weight_scheduler}
    extensions = (
        args.match,
        args.ranking_kl_weight,
        args.distill_config,
        args.probability_shift,
        args.student_adaptor,
        args.temperature_scheduler != "none",
        schedulers - {"none"},
        (args.hard_label_weight, args.kd_loss_weight) != (None, None),
    )
    return any(extensions)


def _teachers_of(
    matches: "Sequence[IntermediateMatch]", names: Sequence[str], shares: Sequence[float]
) -> list[int]:
    """Return which teacher each match uses. Raises UserError for a teacher without any use."""
    found = [_index_of_teacher(match, names) for match in matches]
    for index, share in enumerate(shares):
        if share == 0 and index not in found:
            raise UserError(
                f"teacher {names[index]} has --teacher-weight 0 and no --match has "
                f"teacher={index}: it would do nothing; leave it out"
            )
    return found


def _index_of_teacher(match: "IntermediateMatch", names: Sequence[str]) -> int:
    """Return the index of the teacher that a match names."""
    if list(names).count(match.teacher) > 1:
        raise UserError(
            f"match {match.name}: {match.teacher} is the name of several teachers; "
            f"give its number, 0 to {len(names) - 1}"
        )
    if match.teacher in names:
        return list(names).index(match.teacher)
    if match.teacher in range(len(names)):
        return int(match.teacher)
    known = ", ".join(f"{i} ({name})" for i, name in enumerate(names))
    raise UserError(f"match {match.name}: no teacher {match.teacher!r}; there are {known}")


def warn_about_small_terms(averages: Mapping[str, float]) -> None:
    """Warn if the labels' or the teacher's unweighted term is under 1 % of the other."""
    base, distillation = averages.get("base"), averages.get("distillation")
    if base is None or distillation is None:
        return
    small, large = sorted((("base", base), ("distillation", distillation)), key=lambda x: x[1])
    if small[1] < SMALL * large[1]:
        hint = "; --distillation-reduction batchmean" if small[0] == "distillation" else ""
        _logger.warning(
            "the term %s (%.3g) is under 1 %% of %s (%.3g): see docs/objectives.md%s",
            small[0],
            small[1],
            large[0],
            large[1],
            hint,
        )
