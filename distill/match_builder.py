"""From matches to terms of the loss: taps, projections, and a check of every match.

Shapes: B batch, N tokens, D width, H heads; suffix _S student, _T teacher.
Both networks return their features beside their logits (`TappedOutput`), and the engine passes them
to the objective. Projections are part of the student, which DDP wraps.
"""

import copy
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import losses
from base import distributed
from base.errors import UserError, describe
from distill.teacher import Teacher
from matching import NO_DECAY, PROJ_MAP, IntermediateMatch, several
from models import Student
from models.features import Tap, TappedOutput, taps_on

_logger = logging.getLogger(__name__)
SIMILARITIES = {"cos": losses.cos_sim, "dot": losses.dot_score}
FEW_IMAGES = 8  # with a smaller batch, a loss that fails is tried with so many
RANKING, POOLED = "ranking", Tap("pooled", 0)


def select_tokens(state: Tensor, tokens: str, prefix: Sequence[str], where: str = "") -> Tensor:
    """Return the chosen tokens of states (B,N,D), or of attention (B,H,N,N) on both its sides.

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
    """Return patch tokens (B,N,D) of the grid `old`, (height, width), on the grid `new`.

    Half precision becomes float32: a CPU cannot interpolate it.
    """
    if old == new:
        return state
    state = state.to(torch.promote_types(state.dtype, torch.float32))
    image = state.mT.reshape(len(state), -1, *old)  # (B,D,height,width)
    if how == "avg":
        image = F.adaptive_avg_pool2d(image, new)
    else:
        image = F.interpolate(image, new, mode="bilinear", antialias=True)
    return image.flatten(2).mT  # (B,N,D)


class Projections(nn.ModuleDict):
    """Maps the student's tapped states to those that the losses compare, by term.

    selections: which states a term takes, by the name of the term.
    """

    def __init__(self) -> None:
        super().__init__()
        self.selections: dict[str, Callable[[Mapping[Tap, Tensor]], list[Tensor]]] = {}

    def forward(self, states: Mapping[Tap, Tensor]) -> dict[str, list[Tensor]]:
        found = {name: select(states) for name, select in self.selections.items()}
        for name, projection in self.items():  # both layers of a match share one
            found[name] = [projection(state) for state in found[name]]
        return found


@dataclass
class Term:
    """A term of the loss on features: its weight, the teacher's states, and the comparison.

    row: the term's line of the printed table.
    """

    weight: float
    target: Callable[[Mapping[Any, Tensor]], list[Tensor]]
    compare: Callable[[list[Tensor], list[Tensor], Tensor | None], Tensor]
    row: tuple[str, ...] = ()

    def __call__(self, states_S: list[Tensor], states_T: Mapping, mask: Tensor | None) -> Tensor:
        return self.compare(states_S, self.target(states_T), mask)


@dataclass(frozen=True)
class Ranking:
    """Settings of `losses.in_batch_similarity_loss` on the pooled features.

    similarity: a key of `SIMILARITIES`. gather: rank the images of all processes.
    """

    weight: float
    similarity: str = "cos"
    tau: float = 1.0
    gather: bool = False


def build_terms(
    student: Student,
    teachers: Sequence[Teacher],
    matches: Sequence[IntermediateMatch] = (),
    *,
    input_size: tuple[int, int],
    batch_size: int = 2,
    ranking: Ranking | None = None,
    of_teacher: Sequence[int] | None = None,
    adaptors: tuple[Any, Any] = (None, None),
) -> dict[str, Term]:
    """Tap student and teachers, and return a checked term for every match and the ranking.

    Both run once on two random images of `input_size` (height, width) to check every match. For
    the losses, the features of the two are repeated to `batch_size` images.
    of_teacher: which of `teachers` each match uses, the first by default. adaptors: of the
        student and of the teachers, entries of `ADAPTORS` or None.
    Raises UserError, in one line, for a match that these networks cannot satisfy.
    """
    of_teacher = of_teacher if of_teacher is not None else [0] * len(matches)
    pooled = [POOLED] if ranking is not None else []
    taps_S, taps_T = list(pooled), [list(pooled) if i == 0 else [] for i in range(len(teachers))]
    for match, index in zip(matches, of_teacher):
        taps_S += match.taps(match.layer_S)
        taps_T[index] += match.taps(match.layer_T)
    projections = Projections()
    student.observe(taps_on(student.network, taps_S, adaptors[0]), projections)
    for index, (teacher, taps) in enumerate(zip(teachers, taps_T)):
        if taps:
            teacher.observe(taps_on(teacher.network, taps, adaptors[1]), index)
    device = next(student.parameters()).device
    images = torch.randn(2, 3, *input_size, generator=torch.Generator().manual_seed(0)).to(device)
    states_S = _student_states(student, images, in_training=adaptors[0] is not None)
    states_T = _teacher_states(teachers, images)
    terms: dict[str, Term] = {}
    for match, index in zip(matches, of_teacher):
        same = sum(name.partition("#")[0] == match.name for name in terms)
        name = f"{match.name}#{same + 1}" if same else match.name
        builder = _MatchBuilder(
            match, name, index, student.taps, teachers[index].taps, batch_size=batch_size
        )
        try:
            terms[name] = builder.build(projections, states_S, states_T, device)
        except UserError:
            raise
        except Exception as error:  # whatever a plugin's own loss or projection raises
            raise UserError(f"match {name}: {describe(error)}") from error
    if ranking is not None:
        projections.selections[RANKING] = lambda states: [states[POOLED]]
        target = lambda states: [states[0, POOLED]]  # noqa: E731
        terms[RANKING] = Term(ranking.weight, target, partial(_ranking_loss, ranking))
    return terms


@torch.no_grad()
def _student_states(student: Student, images: Tensor, *, in_training: bool) -> Mapping[Tap, Tensor]:
    """Return the student's tapped states for two images; nothing that trains changes.

    in_training: an adaptor may find its states in training mode alone, so a copy of the student
    runs in that mode.
    """
    if in_training:
        return copy.deepcopy(student).train().tapped(images).states
    was_training = student.training
    states = student.eval().tapped(images).states
    student.train(was_training)
    return states


def _teacher_states(teachers: Sequence[Teacher], images: Tensor) -> dict[Any, Tensor]:
    outputs = [teacher(images) for teacher in teachers]
    observed = [output for output in outputs if isinstance(output, TappedOutput)]
    return {tap: state for each in observed for tap, state in each.states.items()}


def _ranking_loss(
    ranking: Ranking, states_S: list[Tensor], states_T: list[Tensor], _: Any
) -> Tensor:
    """Return the loss of pooled embeddings (B,D_S), (B,D_T), of this or of all processes."""
    embeddings = states_S[0], states_T[0]
    if ranking.gather:
        embeddings = distributed.gather_rows(embeddings[0]), distributed.gather_rows(embeddings[1])
    similarity = SIMILARITIES[ranking.similarity]
    return losses.in_batch_similarity_loss(*embeddings, ranking.tau, similarity=similarity)


def _comparison(match: IntermediateMatch) -> Callable[..., Tensor]:
    """Return the loss of a match. Images have no padding, so every token counts."""
    loss = losses.MATCH_LOSS_MAP[match.loss]
    options: dict[str, Any] = {}
    if loss in losses.CLIPPED and not match.textbrewer_clip:
        options["clip"] = False

    def compare(states_S: list[Tensor], states_T: list[Tensor], mask: Tensor | None) -> Tensor:
        is_own = match.feature == "attention" and loss not in losses.CLIPPED
        if mask is None and is_own and not match.textbrewer_clip:
            mask = states_S[0].new_ones(len(states_S[0]), states_S[0].shape[-1])
        if isinstance(match.layer_S, tuple):
            return loss(states_S, states_T, mask, **options)
        return loss(states_S[0], states_T[0], mask, **options)

    return compare


class _MatchBuilder:
    """Builds the term of one match from the taps of two networks."""

    def __init__(
        self,
        match: IntermediateMatch,
        name: str,
        index: int,
        taps_S: Any,
        taps_T: Any,
        *,
        batch_size: int,
    ) -> None:
        self.match, self.name, self.index, self.batch_size = match, name, index, batch_size
        self.taps_S, self.taps_T = taps_S, taps_T

    def build(
        self, projections: Projections, states_S: Mapping, states_T: Mapping, device: torch.device
    ) -> Term:
        """Return the term, and put its selection and its projection into `projections`."""
        match, where = self.match, f"match {self.name}"
        prefixes = self.taps_S.layout.prefix, self.taps_T.layout.prefix
        self._check_prefixes(*prefixes)
        select = partial(_select, match, prefixes[0], where)
        lengths = len(prefixes[0]), len(prefixes[1])
        grids = None
        if match.resize:
            grids = self._grids(states_S, states_T, *lengths)
        else:
            self._check_grids(states_S, states_T, *lengths)
        target = self._target(prefixes[1], grids)
        found_S, found_T = select(states_S), target(states_T)
        shapes = ["x".join(map(str, each[0].shape[1:])) for each in (found_S, found_T)]
        projections.selections[self.name] = select
        projected = "-"
        if match.proj:
            projection = self._projection(found_S, found_T).to(device)
            projections[self.name] = projection
            projected = f"{match.proj[0]} {found_S[0].shape[-1]} to {found_T[0].shape[-1]}"
            found_S = [projection(state) for state in found_S]
        layers = ", ".join("+".join(map(str, several(x))) for x in (match.layer_S, match.layer_T))
        row = (self.name, layers, *shapes, projected, f"{match.weight:g}")
        term = Term(match.weight, target, _comparison(match), row)
        self._try(term, found_S, found_T)
        self._warn_about_heads(found_S[0], found_T[0])
        return term

    @torch.no_grad()
    def _try(self, term: Term, states_S: list[Tensor], states_T: list[Tensor]) -> None:
        """Raise what the first step would raise."""

        def loss_of(count: int) -> Any:
            rows = torch.arange(count, device=states_S[0].device) % len(states_S[0])
            return term.compare([x[rows] for x in states_S], [x[rows] for x in states_T], None)

        try:
            loss = loss_of(self.batch_size)
        except Exception as error:  # whatever a plugin's own loss raises
            if self.batch_size < FEW_IMAGES:
                loss_of(FEW_IMAGES)
                raise UserError(
                    f"match {self.name}: {error}; it fails with --batch-size {self.batch_size}, "
                    f"not with {FEW_IMAGES}"
                ) from error
            raise
        if not isinstance(loss, Tensor) or loss.dim():
            found = tuple(loss.shape) if isinstance(loss, Tensor) else type(loss).__name__
            raise UserError(
                f"match {self.name}: the loss returned {found}, not one number; take its mean"
            )

    def _target(
        self, prefix: Sequence[str], grids: Sequence[tuple] | None
    ) -> Callable[[Mapping[Any, Tensor]], list[Tensor]]:
        """Return what selects the teacher's states, and resizes them from grid to grid."""
        match, where = self.match, f"match {self.name}"
        taps = [(self.index, tap) for tap in match.taps(match.layer_T)]

        def target(states: Mapping[Any, Tensor]) -> list[Tensor]:
            found = [select_tokens(states[tap], match.tokens, prefix, where) for tap in taps]
            if grids is None:
                return found
            resized = zip(found, grids)
            return [resize_tokens(x, *grid, str(match.resize)) for x, grid in resized]

        return target

    def _warn_about_heads(self, state_S: Tensor, state_T: Tensor) -> None:
        heads = state_S.shape[1], state_T.shape[1]
        if self.match.loss == "attention_mse_sum" and heads[0] != heads[1]:
            _logger.warning(
                "match %s: sums of %d and of %d heads differ in size; the loss does not scale them",
                self.name,
                *heads,
            )

    def _check_prefixes(self, prefix_S: Sequence[str], prefix_T: Sequence[str]) -> None:
        match = self.match
        if match.loss == "pkd" and match.tokens == "patch":
            raise UserError(
                f"match {self.name}: pkd compares class tokens, which tokens=patch leaves out; "
                "use tokens=all, or feature=pooled"
            )
        if match.tokens != "all" or match.feature == "pooled" or match.loss in ("fsp", "gram"):
            return
        if match.loss == "pkd":
            if "cls" not in prefix_S or "cls" not in prefix_T:
                raise UserError(
                    f"match {self.name}: pkd compares class tokens, and one side has none; use "
                    "feature=pooled"
                )
        elif len(prefix_S) != len(prefix_T):
            raise UserError(
                f"match {self.name}: the student's prefix tokens are {list(prefix_S)}, the "
                f"teacher's {list(prefix_T)}; match the patches alone with tokens=patch"
            )

    def _check_grids(
        self, states_S: Mapping, states_T: Mapping, prefix_S: int, prefix_T: int
    ) -> None:
        """Raise UserError if both sides have as many patches in different grids."""
        match = self.match
        compares = match.feature in ("attention", "hidden")
        if not compares or match.tokens in ("cls", "dist") or match.loss in ("fsp", "gram", "pkd"):
            return
        try:
            grids = self._grids(states_S, states_T, prefix_S, prefix_T)
        except UserError:  # the grid of one side is unknown, so there is nothing to compare
            return
        for grid_T, grid_S in grids:
            same_count = grid_S[0] * grid_S[1] == grid_T[0] * grid_T[1]
            if same_count and grid_S != grid_T:
                raise UserError(
                    f"match {self.name}: the student's patch grid is {grid_S[0]}x{grid_S[1]}, the "
                    f"teacher's {grid_T[0]}x{grid_T[1]}; give resize=bilinear with tokens=patch"
                )

    def _grids(
        self, states_S: Mapping, states_T: Mapping, prefix_S: int, prefix_T: int
    ) -> list[tuple]:
        """Return (teacher's grid, student's grid) of every layer."""
        match, grids = self.match, []
        axis = -1 if match.feature == "attention" else 1  # the axis of the tokens
        for tap_S, tap_T in zip(match.taps(match.layer_S), match.taps(match.layer_T)):
            old = self.taps_T.grid(tap_T, states_T[self.index, tap_T].shape[axis] - prefix_T)
            new = self.taps_S.grid(tap_S, states_S[tap_S].shape[axis] - prefix_S)
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
                    f"match {self.name}: proj has width {width} for the {side}, its states have "
                    f"{found[0]}; write auto to use that"
                )
        projection = PROJ_MAP[name](states_S[0].shape[-1], states_T[0].shape[-1])
        decay = {"weight_decay": 0.0} if name in NO_DECAY else {}
        projection.optimizer_options = decay | options  # type: ignore[assignment]
        return projection


def _select(
    match: IntermediateMatch, prefix: Sequence[str], where: str, states: Mapping[Tap, Tensor]
) -> list[Tensor]:
    taps = match.taps(match.layer_S)
    return [select_tokens(states[tap], match.tokens, prefix, where) for tap in taps]
