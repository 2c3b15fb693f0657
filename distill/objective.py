"""The sum of all terms: the logits' objective, scheduled weights, matches and ranking.

Shapes: B batch, N tokens, D width, H heads, C classes; suffix _S student, _T teacher.
Student and teacher return what was seen inside them beside their logits, so that the engine passes
on what it does not know. Projections train with the student, inside the module that DDP wraps.
"""

import copy
import logging
from argparse import Namespace
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import losses
from base import distributed
from base.errors import UserError
from distill.teacher import AnyTeacher, Teacher, build_sources
from matching import NO_DECAY, PROJ_MAP, IntermediateMatch, read_match, several
from models import Student
from models.features import ADAPTORS, Observed, Tap, taps_on
from schedules import TEMPERATURE_SCHEDULER, WEIGHT_SCHEDULER, clamp_temperature

_logger = logging.getLogger(__name__)
SIMILARITIES = {"cos": losses.cos_sim, "dot": losses.dot_score}
RANKING, POOLED = "ranking", Tap("pooled", 0)
LOST = 0.01  # a term under this share of the other hardly moves the student


def select_tokens(state: Tensor, tokens: str, prefix: Sequence[str], where: str = "") -> Tensor:
    """Return the wanted tokens of states (B,N,D), or of attention (B,H,N,N) on both its sides.

    prefix: the names of the first tokens, in their order.
    Raises UserError if the network has no such token.
    """
    if tokens == "all" or state.dim() == 2:
        return state
    if tokens == "patch":
        first = len(prefix)
        return state[:, first:] if state.dim() == 3 else state[..., first:, first:]
    if tokens not in prefix:
        raise UserError(f"{where}: no {tokens} token here, its prefix tokens are {list(prefix)}")
    index = list(prefix).index(tokens)
    return state[:, index : index + 1]


def resize_tokens(state: Tensor, old: tuple[int, int], new: tuple[int, int], how: str) -> Tensor:
    """Return patch tokens (B,N,D) of the grid `old`, (height, width), on the grid `new`."""
    if old == new:
        return state
    image = state.mT.reshape(len(state), -1, *old)  # (B,D,height,width)
    if how == "avg":
        image = F.adaptive_avg_pool2d(image, new)
    else:
        image = F.interpolate(image, new, mode="bilinear", antialias=True)
    return image.flatten(2).mT  # (B,N,D)


class Projections(nn.ModuleDict):
    """From the student's tapped states to what the loss compares, by the name of the term."""

    def __init__(self) -> None:
        super().__init__()
        self.views: dict[str, Callable[[Mapping[Tap, Tensor]], list[Tensor]]] = {}

    def forward(self, states: Mapping[Tap, Tensor]) -> dict[str, list[Tensor]]:
        found = {name: view(states) for name, view in self.views.items()}
        for name, projection in self.items():  # both layers of a match share one
            found[name] = [projection(state) for state in found[name]]
        return found


@dataclass
class Term:
    """One addend of the loss beside the logits': its weight, the teacher's side, the comparison."""

    weight: float
    target: Callable[[Mapping[Any, Tensor]], list[Tensor]]
    compare: Callable[[list[Tensor], list[Tensor], Tensor | None], Tensor]
    row: tuple[str, ...] = ()  # of the table

    def __call__(self, states_S: list[Tensor], seen_T: Mapping, mask: Tensor | None) -> Tensor:
        return self.compare(states_S, self.target(seen_T), mask)


def _comparison(match: IntermediateMatch) -> Callable[..., Tensor]:
    loss = losses.MATCH_LOSS_MAP[match.loss]

    def compare(states_S: list[Tensor], states_T: list[Tensor], mask: Tensor | None) -> Tensor:
        if mask is None and match.feature == "attention" and not match.textbrewer_clip:
            # All ones, on the CPU: images have no padding that TextBrewer's clip could mean.
            mask = torch.ones(len(states_S[0]), states_S[0].shape[-1])
        if isinstance(match.layer_S, tuple):
            return loss(states_S, states_T, mask)
        return loss(states_S[0], states_T[0], mask)

    return compare


class ScheduledTemperature:
    """A kd loss at temperatures that follow the logits, clamped at a floor above 0."""

    def __init__(self, kd_loss: Callable[..., Tensor], schedule: Callable, floor: float) -> None:
        self.kd_loss, self.schedule, self.floor = kd_loss, schedule, floor
        self.clamped: Tensor | None = None  # share of the rows, at the last call

    def __call__(self, logits_S: Tensor, logits_T: Tensor, base: float) -> Tensor:
        temperature = self.schedule(logits_S, logits_T, base)
        temperature, clamped = clamp_temperature(temperature, self.floor)
        self.clamped = clamped / temperature.numel()
        return self.kd_loss(logits_S, logits_T, temperature)


def shift_probability(logits_T: Tensor, labels: Tensor) -> Tensor:
    """Return teacher logits (B,C) with the largest and the true class's swapped (TextBrewer).

    labels: (B,) class numbers. Raises ValueError for shares, as mixup gives them.
    """
    if labels.is_floating_point() or labels.dim() != 1:
        raise ValueError("probability_shift needs one true class an image, not shares")
    largest, place = logits_T.max(1, keepdim=True)
    true = labels[:, None]
    return logits_T.scatter(1, place, logits_T.gather(1, true)).scatter(1, true, largest)


# --- the sum ----------------------------------------------------------------------------------


class Objective(nn.Module):
    """DeiT's objective with scheduled weights, and the matches beside it; called as it is.

    criterion: `losses.DistillationLoss`. extra: the other terms by name. schedules: of the weights
    of (base, distillation), functions of progress, None for constant; the configured weights are
    used for the first update, and the schedule replaces them afterwards, as in TextBrewer.
    After a call `terms` holds every term, detached and unweighted.
    """

    def __init__(
        self,
        criterion: losses.DistillationLoss,
        extra: Mapping[str, Term],
        *,
        weights: tuple[float, float],
        schedules: Sequence[Callable[[float], float] | None] = (None, None),
        total_updates: int = 1,
        probability_shift: bool = False,
    ) -> None:
        super().__init__()
        self.criterion, self.extra = criterion, dict(extra)
        self.weights, self.schedules, self.total_updates = weights, schedules, total_updates
        self.probability_shift = probability_shift
        self.terms: dict[str, Tensor] = {}
        self.at_update(0)

    @property
    def term_weights(self) -> dict[str, float]:
        """What each of `terms` counts in the loss: their products with `terms` add up to it."""
        base = self.criterion.weights[0]
        extra = {name: term.weight for name, term in self.extra.items()}
        return self.criterion.term_weights | {"base": base, "own": base} | extra

    def at_update(self, update: int) -> None:
        """Set the weights for an update, counted from 0 over the whole run."""
        progress = update / self.total_updates
        self.criterion.weights = tuple(
            weight if schedule is None or update == 0 else schedule(progress)
            for weight, schedule in zip(self.weights, self.schedules)
        )

    def forward(
        self, images: Tensor | None, outputs: Any, labels: Tensor, *, teacher_outputs: Any = None
    ) -> Tensor:
        """Return the loss. outputs, teacher_outputs: logits as there, or `Observed`."""
        seen_S, seen_T = (
            x if isinstance(x, Observed) else Observed(x, {}) for x in (outputs, teacher_outputs)
        )
        logits_T = seen_T.logits
        if self.probability_shift:
            several = isinstance(logits_T, list)
            shifted = [shift_probability(x, labels) for x in (logits_T if several else [logits_T])]
            logits_T = shifted if several else shifted[0]
        loss = self.criterion(images, seen_S.logits, labels, teacher_outputs=logits_T)
        if self.criterion.distillation_type == "none":
            loss = self.criterion.weights[0] * loss
        self.terms = dict(self.criterion.terms)
        clamped = getattr(self.criterion.kd_loss, "clamped", None)
        if clamped is not None:
            self.terms["temperature_clamped"] = clamped
        if seen_S.losses:
            own = sum(value.float().mean() for value in seen_S.losses)
            self.terms["own"], loss = own.detach(), loss + self.criterion.weights[0] * own
        for name, term in self.extra.items():
            value = term(seen_S.states[name], seen_T.states, seen_S.mask)
            self.terms[name], loss = value.detach(), loss + term.weight * value
        return loss

    def describe(self) -> str:
        """Return the resolved weights, and a table of the matches."""
        of, kind = self.criterion, self.criterion.distillation_type
        parts = []
        for name, weight, schedule in zip(("base", kind), self.weights, self.schedules):
            after = (
                "" if schedule is None else f", then {getattr(schedule, '__name__', 'scheduled')}"
            )
            parts += [f"{weight:g} {name}{after}"] if name != "none" else []
        parts[1:] = [f"{part} (tau {of.tau:g})" if kind == "soft" else part for part in parts[1:]]
        parts += [f"{term.weight:g} {name}" for name, term in self.extra.items()]
        rows = [term.row for term in self.extra.values() if term.row]
        if rows:
            rows.insert(0, ("match", "layers S, T", "student", "teacher", "projection", "weight"))
        widths = [max(map(len, column)) for column in zip(*rows)]
        table = ["  " + "  ".join(x.ljust(w) for x, w in zip(row, widths)).rstrip() for row in rows]
        return "\n".join([" + ".join(parts), *table])


def build_objective(
    args: Namespace,
    student: Student,
    teacher: AnyTeacher | None,
    *,
    mixing: bool,
    input_size: tuple[int, int],
    total_updates: int,
) -> nn.Module:
    """Return the loss of the run, `losses.DistillationLoss` itself where nothing more is asked.

    It puts taps and projections into `student` and taps on `teacher`, and shows both two images
    of `input_size` (height, width) to check every match.
    Raises UserError, in one line, for a match that these two networks cannot satisfy.
    """
    kd_loss: Any = losses.KD_LOSS_MAP[args.kd_loss_type] if args.kd_loss_type else None
    if args.temperature_scheduler != "none":
        schedule = TEMPERATURE_SCHEDULER[args.temperature_scheduler]
        kd_loss = ScheduledTemperature(kd_loss, schedule, args.temperature_min)
    members = teacher.members if teacher is not None else ()
    shares = teacher.weights if teacher is not None else ()
    options: dict[str, Any] = {"kd_loss": kd_loss}
    if args.teacher_logits == "apart" and len(members) > 1:
        options["teacher_weights"] = [w for w in shares if w > 0]
    criterion = losses.build_criterion(
        args, mixing=mixing, head=student.distillation_head, **options
    )
    matches = [read_match(match) for match in args.match]
    schedulers = (args.hard_label_weight_scheduler, args.kd_loss_weight_scheduler)
    weights = (args.hard_label_weight, args.kd_loss_weight)
    asked = (
        matches,
        args.ranking_kl_weight,
        args.distill_config,
        args.probability_shift,
        args.student_adaptor,
        args.temperature_scheduler != "none",
        set(schedulers) - {"none"},
        weights != (None, None),
    )
    names, _ = build_sources(args)
    of_teacher = [_number(match, names) for match in matches]
    for index, share in enumerate(shares):
        if share == 0 and index not in of_teacher:
            raise UserError(
                f"teacher {names[index]} has --teacher-weight 0 and no --match says "
                f"teacher={index}: it would do nothing; leave it out"
            )
    if not any(asked):
        return criterion
    alpha = args.distillation_alpha if args.distillation_type != "none" else 0.0
    extra: dict[str, Term] = {}
    if matches or args.ranking_kl_weight or args.student_adaptor:
        extra = _build_terms(args, matches, of_teacher, student, members, input_size)
    return Objective(
        criterion,
        extra,
        weights=tuple(d if w is None else w for w, d in zip(weights, (1 - alpha, alpha))),
        schedules=[None if name == "none" else WEIGHT_SCHEDULER[name] for name in schedulers],
        total_updates=max(1, total_updates),
        probability_shift=args.probability_shift,
    )


def _build_terms(
    args: Namespace,
    matches: Sequence[IntermediateMatch],
    of_teacher: Sequence[int],
    student: Student,
    members: Sequence[Teacher],
    input_size: tuple[int, int],
) -> dict[str, Term]:
    """Tap both sides, show them two images, and return a checked term for every match.

    of_teacher: which of `members` each of `matches` looks into.
    """
    wanted: list[list[Tap]] = [[] for _ in members]
    if args.ranking_kl_weight:
        wanted[0].append(POOLED)
    taps_S = list(wanted[0]) if members else []
    for match, index in zip(matches, of_teacher):
        wanted[index] += match.taps(match.layer_T)
        taps_S += match.taps(match.layer_S)
    adaptor_S, adaptor_T = map(ADAPTORS.get, (args.student_adaptor, args.teacher_adaptor))
    projections = Projections()
    student.observe(taps_on(student.network, taps_S, adaptor_S), projections)
    for index, (member, taps) in enumerate(zip(members, wanted)):
        if taps:
            member.observe(taps_on(member.network, taps, adaptor_T), index)
    device = next(student.parameters()).device
    images = torch.randn(2, 3, *input_size, generator=torch.Generator().manual_seed(0))
    seen_S, seen_T = _show(student, members, images.to(device), trains=adaptor_S is not None)
    terms: dict[str, Term] = {}
    for match, index in zip(matches, of_teacher):
        same = sum(name.partition("#")[0] == match.name for name in terms)
        name = f"{match.name}#{same + 1}" if same else match.name
        build = _MatchBuilder(match, name, index, student.taps, members[index].taps)
        try:
            terms[name] = build(projections, seen_S, seen_T, device)
        except UserError:
            raise
        except (ValueError, RuntimeError) as error:  # RuntimeError: of a plugin's own arithmetic
            raise UserError(f"match {name}: {error}") from error
    if args.ranking_kl_weight:
        projections.views[RANKING] = lambda states: [states[POOLED]]
        settings = SIMILARITIES[args.ranking_similarity], args.ranking_tau, args.ranking_gather
        target = lambda states: [states[0, POOLED]]  # noqa: E731
        terms[RANKING] = Term(args.ranking_kl_weight, target, partial(_rank, settings))
    return terms


def _number(match: IntermediateMatch, names: Sequence[str]) -> int:
    """Return which of the teachers a match names."""
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


@torch.no_grad()
def _show(student: Student, members: Sequence[Teacher], images: Tensor, *, trains: bool) -> tuple:
    """Return the tapped states of both sides for two images; nothing that trains changes.

    trains: the student shows its inside in training mode alone, so a copy of it is asked.
    """
    seen_T: dict[Any, Tensor] = {}
    for member in members:
        if isinstance(answer := member(images), Observed):
            seen_T |= answer.states
    if trains:
        return copy.deepcopy(student).train().look(images).states, seen_T
    was_training = student.training
    seen_S = student.eval().look(images).states
    student.train(was_training)
    return seen_S, seen_T


class _MatchBuilder:
    """One match, between two networks' taps."""

    def __init__(
        self, match: IntermediateMatch, name: str, index: int, taps_S: Any, taps_T: Any
    ) -> None:
        self.match, self.name, self.index = match, name, index
        self.taps_S, self.taps_T = taps_S, taps_T

    def __call__(
        self, projections: Projections, seen_S: Mapping, seen_T: Mapping, device: torch.device
    ) -> Term:
        match = self.match
        prefixes = self.taps_S.layout.prefix, self.taps_T.layout.prefix
        self._check_prefixes(*prefixes)
        where = f"match {self.name}"

        def view(states: Mapping[Tap, Tensor]) -> list[Tensor]:
            taps = match.taps(match.layer_S)
            return [select_tokens(states[tap], match.tokens, prefixes[0], where) for tap in taps]

        grids = None
        if match.resize:
            grids = self._grids(seen_S, seen_T, *map(len, prefixes))
        else:
            self._check_grids(seen_S, seen_T, *map(len, prefixes))

        def target(states: Mapping[Any, Tensor]) -> list[Tensor]:
            taps = [(self.index, tap) for tap in match.taps(match.layer_T)]
            found = [select_tokens(states[t], match.tokens, prefixes[1], where) for t in taps]
            if grids is None:
                return found
            return [resize_tokens(x, *grid, match.resize) for x, grid in zip(found, grids)]  # type: ignore[arg-type]

        states_S, states_T = view(seen_S), target(seen_T)
        shapes = ["x".join(map(str, each[0].shape[1:])) for each in (states_S, states_T)]
        projections.views[self.name] = view
        projected = "-"
        if match.proj:
            projection = self._projection(states_S, states_T).to(device)
            projections[self.name] = projection
            projected = f"{match.proj[0]} {states_S[0].shape[-1]} to {states_T[0].shape[-1]}"
            states_S = [projection(state) for state in states_S]
        term = Term(match.weight, target, _comparison(match))
        with torch.no_grad():
            term.compare(states_S, states_T, None)  # raises what would stop the first step
        if match.loss == "attention_mse_sum" and states_S[0].shape[1] != states_T[0].shape[1]:
            _logger.warning(
                "%s: sums of %d and of %d heads differ in size; the loss does not scale them",
                where,
                states_S[0].shape[1],
                states_T[0].shape[1],
            )
        layers = ", ".join("+".join(map(str, several(x))) for x in (match.layer_S, match.layer_T))
        term.row = (self.name, layers, *shapes, projected, f"{match.weight:g}")
        return term

    def _check_prefixes(self, prefix_S: Sequence[str], prefix_T: Sequence[str]) -> None:
        match = self.match
        if match.loss == "pkd" and match.tokens == "patch":
            raise UserError(
                f"match {self.name}: pkd compares class tokens, which tokens=patch "
                "leaves out; use tokens=all, or feature=pooled"
            )
        if match.tokens != "all" or match.feature == "pooled" or match.loss in ("fsp", "gram"):
            return
        if match.loss == "pkd":
            if "cls" not in prefix_S or "cls" not in prefix_T:
                raise UserError(
                    f"match {self.name}: pkd compares class tokens, and one side has "
                    "none; use feature=pooled"
                )
        elif len(prefix_S) != len(prefix_T):
            raise UserError(
                f"match {self.name}: the student's prefix tokens are {list(prefix_S)}, the "
                f"teacher's {list(prefix_T)}; match the patches alone with tokens=patch"
            )

    def _check_grids(self, seen_S: Mapping, seen_T: Mapping, skip_S: int, skip_T: int) -> None:
        """Raise UserError if as many patches lie in another grid, so that places would not fit."""
        match = self.match
        compares = match.feature == "attention" or match.feature == "hidden"
        if not compares or match.tokens in ("cls", "dist") or match.loss in ("fsp", "gram", "pkd"):
            return
        try:
            grids = self._grids(seen_S, seen_T, skip_S, skip_T)
        except UserError:  # nothing tells the grid of one side: then there is nothing to compare
            return
        for grid_T, grid_S in grids:
            same_count = grid_S[0] * grid_S[1] == grid_T[0] * grid_T[1]
            if same_count and grid_S != grid_T:
                raise UserError(
                    f"match {self.name}: the student's patches lie {grid_S[0]}x{grid_S[1]}, the "
                    f"teacher's {grid_T[0]}x{grid_T[1]}; give resize=bilinear with tokens=patch"
                )

    def _grids(self, seen_S: Mapping, seen_T: Mapping, skip_S: int, skip_T: int) -> list[tuple]:
        """Return (teacher's grid, student's grid) for every layer."""
        match, grids = self.match, []
        for tap_S, tap_T in zip(match.taps(match.layer_S), match.taps(match.layer_T)):
            tokens = -1 if match.feature == "attention" else 1  # the axis that counts them
            old = self.taps_T.grid(tap_T, seen_T[self.index, tap_T].shape[tokens] - skip_T)
            new = self.taps_S.grid(tap_S, seen_S[tap_S].shape[tokens] - skip_S)
            grids.append((tuple(old), tuple(new)))
        return grids

    def _projection(self, states_S: list[Tensor], states_T: list[Tensor]) -> nn.Module:
        """Return a new projection. Raises UserError if its widths are not those of the states."""
        name, *widths, options = self.match.proj  # type: ignore[misc]
        for side, width, states in zip(("student", "teacher"), widths, (states_S, states_T)):
            found = [state.shape[-1] for state in states]
            if len(set(found)) > 1:
                raise UserError(
                    f"match {self.name}: the {side}'s two layers have widths {found}, and one proj "
                    "serves both; choose layers of the same width"
                )
            if width not in ("auto", found[0]):
                raise UserError(
                    f"match {self.name}: proj says width {width} for the {side}, whose states have "
                    f"{found[0]}; write auto for the state's own"
                )
        projection = PROJ_MAP[name](states_S[0].shape[-1], states_T[0].shape[-1])
        decay = {"weight_decay": 0.0} if name in NO_DECAY else {}
        projection.optimizer_options = decay | options  # type: ignore[assignment]
        return projection


def _rank(
    settings: tuple[Callable, float, bool], one: list[Tensor], other: list[Tensor], _: Any
) -> Tensor:
    """Return the loss of pooled embeddings (B,D_S), (B,D_T), over this process's batch or all's."""
    similarity, tau, gather = settings
    embeddings_S, embeddings_T = one[0], other[0]
    if gather:
        embeddings_S, embeddings_T = map(distributed.gather_rows, (embeddings_S, embeddings_T))
    return losses.in_batch_similarity_loss(embeddings_S, embeddings_T, tau, similarity=similarity)


def warn_about_small_terms(averages: Mapping[str, float]) -> None:
    """Warn if the labels' or the teacher's unweighted term is under 1 % of the other."""
    base, distillation = averages.get("base"), averages.get("distillation")
    if base is None or distillation is None:
        return
    small, large = sorted((("base", base), ("distillation", distillation)), key=lambda x: x[1])
    if small[1] < LOST * large[1]:
        hint = "; --distillation-reduction batchmean" if small[0] == "distillation" else ""
        _logger.warning(
            "the term %s (%.3g) is under 1 %% of %s (%.3g): see docs/objectives.md%s",
            small[0],
            small[1],
            large[0],
            large[1],
            hint,
        )
