"""Every objective against its formula, written out again here image by image in float64.

B images, N tokens, D width, H heads, C classes, K candidates; a mask of 1 keeps a token.
"""

import copy
import math
from argparse import Namespace
from collections.abc import Callable, Sequence

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import losses
from base.errors import UserError
from matching import TWO_LAYERS

B, N, D, H, C, K = 3, 5, 7, 2, 11, 4
RAGGED = [[1, 1, 1, 1, 1], [1, 0, 1, 1, 0], [0, 0, 0, 1, 0]]
MASKS = {
    "no mask": None,
    "all ones": torch.ones(B, N),
    "bool": torch.tensor(RAGGED, dtype=torch.bool),
    "0/1": torch.tensor(RAGGED),
    "half": torch.tensor(RAGGED, dtype=torch.float16),
}
masks = pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS.keys())


def draw(*shape: int, seed: int = 0, grad: bool = False, dtype: torch.dtype = torch.float64):
    values = torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return values.to(dtype).requires_grad_(grad)


def pair(shape_S: tuple[int, ...], shape_T: tuple[int, ...] | None = None, seed: int = 0):
    """A student's tensor, which asks for a gradient, and a teacher's that does too."""
    return draw(*shape_S, seed=seed, grad=True), draw(*(shape_T or shape_S), seed=99, grad=True)


def two_layers(shapes_S: list[tuple[int, ...]], shapes_T: list[tuple[int, ...]]):
    """Two layers of each network."""
    state_S = [draw(*shape, seed=i, grad=True) for i, shape in enumerate(shapes_S)]
    return state_S, [draw(*shape, seed=90 + i, grad=True) for i, shape in enumerate(shapes_T)]


def near(one: Tensor, other: Tensor, tolerance: float = 1e-10) -> None:
    torch.testing.assert_close(one, other, rtol=tolerance, atol=tolerance)


def gradients(value: Tensor, state: Tensor | list[Tensor]) -> tuple[Tensor, ...]:
    return torch.autograd.grad(value, state, retain_graph=True)


def check(value: Tensor, formula: Tensor, state_S: Tensor | list, state_T: Tensor | list) -> None:
    """Same value, same gradient of the student, none of the teacher."""
    assert value.dtype == torch.float64 and value.dim() == 0
    near(value, formula)
    for ours, theirs in zip(gradients(value, state_S), gradients(formula, state_S)):
        assert ours.abs().sum() > 0
        near(ours, theirs)
    for each in [state_T] if isinstance(state_T, Tensor) else state_T:
        assert torch.autograd.grad(value, each, allow_unused=True, retain_graph=True) == (None,)


def strided(values: Tensor) -> Tensor:
    """The same numbers, lying in memory in another order."""
    other = values.transpose(0, -1).contiguous().transpose(0, -1)
    assert not other.is_contiguous() and torch.equal(other, values)
    return other


def map_states(function: Callable, states: Sequence) -> list:
    """The function of every tensor, of one or two layers of each network."""
    return [
        [function(layer) for layer in side] if isinstance(side, list) else function(side)
        for side in states
    ]


def refuses(
    shapes: list, function: Callable[..., object], *values: object, **named: object
) -> None:
    """`function(*values, **named)` is a ValueError whose message names the shapes."""
    with pytest.raises(ValueError) as error:
        function(*values, **named)
    for shape in shapes:
        assert str(tuple(shape)) in str(error.value)


# --- the formulas, one image at a time ----------------------------------------------------


def kept(mask: Tensor | None) -> list[Tensor]:
    """The numbers of the kept tokens of each image."""
    return [torch.arange(N) if mask is None else row.nonzero()[:, 0] for row in mask.bool()]


def clip(values: Tensor) -> Tensor:
    return torch.where(values > -1e-3, values, torch.zeros_like(values))


def formula_attention_mse(S: Tensor, T: Tensor, mask: Tensor | None) -> Tensor:
    """(B,H,N,N), mean over heads and pairs of kept tokens."""
    if mask is None:
        return torch.stack([((clip(s) - clip(t)) ** 2).mean() for s, t in zip(S, T)]).mean()
    total, count = 0.0, 0
    for s, t, keep in zip(S, T, kept(mask)):
        for s_head, t_head in zip(s, t):
            total = total + ((s_head - t_head) ** 2)[keep][:, keep].sum()
            count += len(keep) ** 2
    return total / count


def formula_attention_ce(S: Tensor, T: Tensor, mask: Tensor | None) -> Tensor:
    """(B,H,N,N), mean over heads and kept queries; softmax over all keys."""
    total, count = 0.0, 0
    for b in range(len(S)):
        keep = range(N) if mask is None else mask[b].nonzero()[:, 0].tolist()
        for h in range(S.shape[1]):
            for query in keep:
                scores_S, scores_T = S[b, h, query], T[b, h, query]
                log_q = scores_S - scores_S.exp().sum().log()
                probs = scores_T.exp() / scores_T.exp().sum()
                keys = [k for k in keep if mask is not None or scores_T[k] > -1e-3]
                total = total - sum(probs[k] * log_q[k] for k in keys)
                count += 1
    return total / count


def one_head(loss: Callable[..., Tensor], merge: Callable[[Tensor], Tensor]):
    def formula(S: Tensor, T: Tensor, mask: Tensor | None) -> Tensor:
        S, T = (x if x.dim() == 3 else merge(x) for x in (S, T))
        return loss(S[:, None], T[:, None], mask)

    return formula


def rows(S: Tensor, T: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
    """The kept tokens of all images below each other, (rows, D)."""
    if mask is None:
        return S.reshape(-1, S.shape[-1]), T.reshape(-1, T.shape[-1])
    keep = kept(mask)
    return torch.cat([s[k] for s, k in zip(S, keep)]), torch.cat([t[k] for t, k in zip(T, keep)])


def formula_hidden_mse(S: Tensor, T: Tensor, mask: Tensor | None) -> Tensor:
    rows_S, rows_T = rows(S, T, mask)
    return ((rows_S - rows_T) ** 2).sum() / rows_S.numel()


def formula_cos(S: Tensor, T: Tensor, mask: Tensor | None) -> Tensor:
    each = [
        1 - s @ t / ((s @ s + 1e-12) * (t @ t + 1e-12)).sqrt() for s, t in zip(*rows(S, T, mask))
    ]
    return sum(each) / len(each)


def formula_pkd(S: Tensor, T: Tensor, mask: Tensor | None = None) -> Tensor:
    S, T = (x[:, 0] if x.dim() == 3 else x for x in (S, T))
    return sum(2 - 2 * s @ t / (s @ s).sqrt() / (t @ t).sqrt() for s, t in zip(S, T)) / len(S)


def formula_fsp(S: list[Tensor], T: list[Tensor], mask: Tensor | None) -> Tensor:
    flows = []
    for first, second in (S, T):
        keep = kept(mask) if mask is not None else [torch.arange(first.shape[1])] * len(first)
        flows.append(
            [
                sum(torch.outer(first[b, i], second[b, i]) for i in k) / len(k)
                for b, k in enumerate(keep)
            ]
        )
    return torch.stack([((s - t) ** 2).mean() for s, t in zip(*flows)]).mean()


def formula_mmd(S: list[Tensor], T: list[Tensor], mask: Tensor | None) -> Tensor:
    total, count = 0.0, 0
    for b in range(B):
        keep = range(N) if mask is None else mask[b].nonzero()[:, 0].tolist()
        for i in keep:
            for j in keep:
                s, t = (x[0][b, i] @ x[1][b, j] / x[0].shape[2] for x in (S, T))
                total, count = total + (s - t) ** 2, count + 1
    return total / count


def formula_vkd(S: Tensor, T: Tensor, mask: Tensor | None) -> Tensor:
    rows_S, rows_T = rows(S, T, mask)
    mean, variance = rows_T.mean(1, keepdim=True), rows_T.var(1, keepdim=True, unbiased=False)
    gap = (rows_S - (rows_T - mean) / (variance + 1e-5).sqrt()).abs()
    return torch.where(gap < 1, gap**2 / 2, gap - 0.5).mean()


formula_mse_sum = one_head(formula_attention_mse, lambda x: x[:, 0] + x[:, 1:].sum(1))
formula_ce_mean = one_head(formula_attention_ce, lambda x: x.sum(1) / x.shape[1])

SCORES = (B, H, N, N)
MATCHES = {
    "attention_mse": (formula_attention_mse, SCORES, SCORES),
    "attention_mse_sum": (formula_mse_sum, SCORES, (B, 2 * H, N, N)),
    "attention_mse_sum of one map": (formula_mse_sum, (B, N, N), (B, N, N)),
    "attention_ce": (formula_attention_ce, SCORES, SCORES),
    "attention_ce_mean": (formula_ce_mean, SCORES, (B, 2 * H, N, N)),
    "attention_ce_mean of one map": (formula_ce_mean, (B, N, N), (B, N, N)),
    "hidden_mse": (formula_hidden_mse, (B, N, D), (B, N, D)),
    "cos": (formula_cos, (B, N, D), (B, N, D)),
    "pkd": (formula_pkd, (B, N, D), (B, N, D)),
    "vkd": (formula_vkd, (B, N, D), (B, N, D)),
}
SAME_D, OTHER_D = [(B, N, D)] * 2, [(B, N, D + 2)] * 2
PAIR_MATCHES = {
    "fsp": (formula_fsp, SAME_D, SAME_D),
    "gram": (formula_fsp, [(B, N, D), (B, N, D + 2)], [(B, N, D), (B, N, D + 2)]),
    "nst": (formula_mmd, SAME_D, SAME_D),
    "mmd": (formula_mmd, SAME_D, OTHER_D),
}
REGISTERED = dict(losses.MATCH_LOSS_MAP)  # before a test adds an entry
EVERY = list(dict.fromkeys([*MATCHES, *PAIR_MATCHES, *REGISTERED]))
matches = pytest.mark.parametrize("name", MATCHES)
pair_matches = pytest.mark.parametrize("name", PAIR_MATCHES)
every_match = pytest.mark.parametrize("name", EVERY)


def match_loss(name: str) -> Callable[..., Tensor]:
    return REGISTERED[name.split()[0]]


def random_states(name: str) -> tuple:
    """The states of both networks that a loss takes; a new loss gets those of its kind."""
    if name in PAIR_MATCHES or name in TWO_LAYERS:
        return two_layers(*PAIR_MATCHES.get(name, (None, SAME_D, SAME_D))[1:])
    shape = SCORES if name.startswith("attention_") else (B, N, D)
    return pair(*MATCHES.get(name, (None, shape, shape))[1:])


def test_every_loss_of_the_registry_has_a_formula_and_a_value_worked_by_hand() -> None:
    formulas = {match_loss(name) for name in [*MATCHES, *PAIR_MATCHES]}
    by_hand = {match_loss(name) for name in BY_HAND}
    assert formulas == by_hand == set(REGISTERED.values())


# --- matching losses ------------------------------------------------------------------------


@masks
@matches
def test_a_match_has_the_value_and_the_gradient_of_its_formula(name: str, mask: Tensor) -> None:
    formula, shape_S, shape_T = MATCHES[name]
    state_S, state_T = pair(shape_S, shape_T)
    value = match_loss(name)(state_S, state_T, mask)
    check(value, formula(state_S, state_T, mask), state_S, state_T)


@masks
@pair_matches
def test_a_match_of_two_layers_has_the_value_and_the_gradient_of_its_formula(
    name: str, mask: Tensor
) -> None:
    formula, shapes_S, shapes_T = PAIR_MATCHES[name]
    state_S, state_T = two_layers(shapes_S, shapes_T)
    value = match_loss(name)(state_S, state_T, mask)
    check(value, formula(state_S, state_T, mask), state_S, state_T)


def test_fsp_needs_not_the_same_tokens_without_a_mask() -> None:
    state_S, state_T = two_layers(SAME_D, [(B, N + 4, D)] * 2)
    check(losses.fsp_loss(state_S, state_T), formula_fsp(state_S, state_T, None), state_S, state_T)
    refuses([(B, N, D), (B, N + 4, D)], losses.fsp_loss, state_S, state_T, torch.ones(B, N))


@pytest.mark.parametrize("name", ["hidden_mse", "cos", "vkd"])
@pytest.mark.parametrize("shape", [(D,), (B, D), (B, N, D), (B, H, N, D)], ids=str)
def test_a_hidden_loss_takes_any_rank_without_a_mask(name: str, shape: tuple) -> None:
    state_S, state_T = pair(shape)
    value = match_loss(name)(state_S, state_T)
    check(value, MATCHES[name][0](state_S, state_T, None), state_S, state_T)


@pytest.mark.parametrize("shape_S", [(B, N, D), (B, D)], ids=str)
@pytest.mark.parametrize("shape_T", [(B, N + 4, D), (B, D)], ids=str)
def test_pkd_decides_for_each_side_where_the_class_token_is(shape_S: tuple, shape_T: tuple) -> None:
    state_S, state_T = pair(shape_S, shape_T)
    check(losses.pkd_loss(state_S, state_T), formula_pkd(state_S, state_T), state_S, state_T)


@matches
def test_an_all_ones_mask_is_the_plain_mean_without_the_clip(name: str) -> None:
    _, shape_S, shape_T = MATCHES[name]
    state_S, state_T = pair(shape_S, shape_T)
    ones = match_loss(name)(state_S, state_T, torch.ones(B, N))
    none = match_loss(name)(state_S, state_T)
    assert torch.isclose(ones, none) == (not name.startswith("attention"))
    if name.startswith("attention_mse"):
        near(
            match_loss(name)(state_S.abs(), state_T.abs(), torch.ones(B, N)),
            match_loss(name)(state_S.abs(), state_T.abs()),
        )


def test_the_clip_worked_by_hand() -> None:
    scores_S = torch.tensor([[[[2.0, -5.0], [-5e-4, -1e-3]]]])
    scores_T = torch.tensor([[[[1.0, 3.0], [0.0, 1.0]]]])
    # differences: 2-1, 0-3, -5e-4-0, 0-1
    near(losses.att_mse_loss(scores_S, scores_T), torch.tensor((1 + 9 + 25e-8 + 1) / 4), 1e-6)
    half = torch.tensor([[[[0.0, 0.0], [0.0, -1.0]]]])
    first, second = math.log(2), math.log(2) / (1 + math.exp(-1))
    near(
        losses.att_ce_loss(torch.zeros(1, 1, 2, 2), half), torch.tensor((first + second) / 2), 1e-6
    )


@pytest.mark.parametrize("mask", [None, MASKS["bool"]], ids=["no mask", "mask"])
@pytest.mark.parametrize("name", [*MATCHES, *PAIR_MATCHES])
def test_a_match_is_zero_where_student_equals_teacher(name: str, mask: Tensor) -> None:
    if name in PAIR_MATCHES:
        state, _ = two_layers(PAIR_MATCHES[name][1], PAIR_MATCHES[name][1])
        states = (state, state)
    else:
        state = draw(*MATCHES[name][1])
        states = (state, state)
    value = match_loss(name)(*states, mask)
    if name == "vkd":
        value = losses.vkd_loss(F.layer_norm(state, (D,)), state, mask)
    if "ce" in name:  # a cross entropy reaches its least, the entropy
        assert all(
            match_loss(name)(state + draw(*state.shape, seed=s), state, MASKS["all ones"])
            > match_loss(name)(state, state, MASKS["all ones"])
            for s in (1, 2)
        )
    else:
        near(value, torch.zeros_like(value))


@every_match
def test_memory_order_changes_nothing(name: str) -> None:
    for mask in (None, MASKS["0/1"]):
        states = random_states(name)
        others = map_states(strided, states)
        other_mask = mask if mask is None else strided(mask)
        near(match_loss(name)(*others, other_mask), match_loss(name)(*states, mask))


def test_cos_takes_a_map_of_a_convolution_network() -> None:
    state_S, state_T = (x.reshape(B, D, N).transpose(1, 2) for x in pair((B, D, N, 1)))
    near(losses.cos_loss(state_S, state_T), formula_cos(state_S, state_T, None))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@every_match
def test_half_precision_is_raised_to_float32(name: str, dtype: torch.dtype) -> None:
    """Large values: their squares alone would overflow float16."""
    low = map_states(lambda state: (300 * state.detach()).to(dtype), random_states(name))
    full = map_states(Tensor.float, low)
    for mask in (None, MASKS["bool"]):
        expected = match_loss(name)(*full, mask)
        assert expected.dtype == torch.float32 and expected.isfinite()
        assert torch.equal(match_loss(name)(*low, mask), expected)
        with torch.autocast("cpu", torch.bfloat16):
            assert torch.equal(match_loss(name)(*low, mask), expected)
            assert torch.equal(match_loss(name)(*full, mask), expected)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_a_long_mask_in_half_precision_does_not_overflow(dtype: torch.dtype) -> None:
    scores = torch.zeros(1, 2, 300, 300, dtype=dtype)  # 90,000 pairs are above float16's 65,504
    value = losses.att_mse_loss(scores, scores + 1, torch.ones(1, 300, dtype=dtype))
    assert value == 1


def test_the_gradient_of_a_half_precision_student_is_in_its_own_type() -> None:
    state_S = draw(B, N, D, grad=True, dtype=torch.bfloat16)
    losses.hid_mse_loss(state_S, draw(B, N, D, seed=1)).backward()
    assert state_S.grad.dtype == torch.bfloat16 and state_S.grad.abs().sum() > 0


def test_a_teacher_that_ran_in_inference_mode_is_accepted() -> None:
    with torch.inference_mode():
        state_T, scores_T = draw(B, N, D, seed=1) * 1, draw(B, C, seed=1) * 1
    state_S, scores_S = draw(B, N, D, grad=True), draw(B, C, grad=True)
    for name in ("hidden_mse", "cos", "pkd", "vkd"):
        match_loss(name)(state_S, state_T, MASKS["bool"]).backward()
    for kd in losses.KD_LOSS_MAP.values():
        kd(scores_S, scores_T).backward()
    losses.fsp_loss([state_S] * 2, [state_T] * 2).backward()
    assert state_S.grad.isfinite().all() and scores_S.grad.isfinite().all()


BROADCASTS = [
    ("attention_mse", SCORES, (B, 1, N, N)),
    ("attention_mse", SCORES, (1, H, N, N)),
    ("attention_mse", SCORES, (B, 2 * H, N, N)),
    ("attention_mse", (B, N, N), (B, N, N)),
    ("attention_ce", SCORES, (B, 1, N, N)),
    ("attention_ce", SCORES, (B, H, N, 1)),
    ("attention_ce", (B, N, N), (B, N, N)),
    ("attention_mse_sum", (1, H, N, N), (1, N, N)),
    ("attention_mse_sum", SCORES, (1, H, N, N)),
    ("attention_mse_sum", SCORES, (B, H, N + 1, N + 1)),
    ("attention_mse_sum", (B, N), (B, N)),
    ("attention_ce_mean", (B, N, N), SCORES),
    ("attention_ce_mean", (B, N, N), (B, 1, N)),
    ("hidden_mse", (B, N, D), (B, N, 1)),
    ("hidden_mse", (B, N, D), (B, 1, D)),
    ("hidden_mse", (B, N, D), (N, D)),
    ("hidden_mse", (B, N, D), (B, N, D + 2)),
    ("hidden_mse", (B, N, D), (B, N + 4, D)),
    ("cos", (B, N, D), (B, N, 1)),
    ("cos", (B, N, D), (1, N, D)),
    ("vkd", (B, N, D), (B, 1, D)),
    ("vkd", (B, N, D), (B, N, D + 2)),
]


@pytest.mark.parametrize("name, shape_S, shape_T", BROADCASTS, ids=str)
def test_a_match_of_other_shapes_is_refused_with_both(
    name: str, shape_S: tuple, shape_T: tuple
) -> None:
    for mask in (None, torch.ones(shape_S[0], N)):
        refuses([shape_S, shape_T], match_loss(name), *pair(shape_S, shape_T), mask)


@pytest.mark.parametrize("shape_T", [(B, N, D + 2), (B, N, 1), (1, N, D), (B, H, N, D)], ids=str)
def test_pkd_of_other_widths_or_batches_is_refused(shape_T: tuple) -> None:
    with pytest.raises(ValueError, match="pkd: student .*, teacher"):
        losses.pkd_loss(*pair((B, N, D), shape_T))


PAIR_BROADCASTS = [
    ("fsp", SAME_D, OTHER_D),
    ("fsp", SAME_D, [(B, N, 1)] * 2),
    ("fsp", SAME_D, [(1, N, D)] * 2),
    ("nst", SAME_D, [(B, 1, D)] * 2),
    ("nst", SAME_D, [(1, N, D)] * 2),
    ("nst", SAME_D, [(B, N + 4, D)] * 2),
]


@pytest.mark.parametrize("name, shapes_S, shapes_T", PAIR_BROADCASTS, ids=str)
def test_a_match_of_two_layers_of_other_shapes_is_refused_with_both(
    name: str, shapes_S: list, shapes_T: list
) -> None:
    refuses([shapes_S[0], shapes_T[0]], match_loss(name), *two_layers(shapes_S, shapes_T))


@pytest.mark.parametrize("name", ["fsp", "nst"])
@pytest.mark.parametrize(
    "shapes",
    [[(B, N, D)], [(B, N, D)] * 3, [(B, N, D), (B, 1, D)], [(B, N, D), (1, N, D)], [(B, D)] * 2],
    ids=str,
)
def test_two_layers_that_do_not_fit_each_other_are_refused(name: str, shapes: list) -> None:
    refuses(shapes, match_loss(name), *two_layers(shapes, SAME_D))
    refuses(shapes, match_loss(name), *two_layers(SAME_D, shapes))


def test_one_tensor_is_not_two_layers() -> None:
    for loss in (losses.fsp_loss, losses.mmd_loss):
        with pytest.raises(ValueError, match="two layers"):
            loss(draw(2, N, D), draw(2, N, D))


def test_nst_of_two_widths_in_one_network_is_refused() -> None:
    shapes = [(B, N, D), (B, N, D + 2)]
    refuses(shapes, losses.mmd_loss, *two_layers(shapes, SAME_D))


MASKED = [name for name in EVERY if name != "pkd"]


@pytest.mark.parametrize("name", MASKED)
def test_a_mask_of_another_shape_is_refused(name: str) -> None:
    for shape in ((B, 1), (1, N), (N,), (B, N, 1), (B, N + 4)):
        refuses([shape, (B, N)], match_loss(name), *random_states(name), torch.ones(shape))


@pytest.mark.parametrize("name", MASKED)
def test_an_all_zero_mask_is_refused(name: str) -> None:
    with pytest.raises(ValueError, match="zero"):
        match_loss(name)(*random_states(name), torch.zeros(B, N, dtype=torch.bool))


def test_fsp_refuses_a_image_without_tokens() -> None:
    mask = torch.tensor([[1] * N, [0] * N, [1] * N])
    with pytest.raises(ValueError, match="all zero"):
        losses.fsp_loss(*two_layers(SAME_D, SAME_D), mask)


def test_pkd_does_not_read_the_mask() -> None:
    state_S, state_T = pair((B, N, D))
    near(losses.pkd_loss(state_S, state_T, torch.zeros(B, N)), losses.pkd_loss(state_S, state_T))


def test_a_mask_needs_tokens() -> None:
    for name in ("hidden_mse", "cos", "vkd"):
        with pytest.raises(ValueError, match=r"\(B,N,D\)"):
            match_loss(name)(*pair((B, D)), torch.ones(B, D))


def test_a_mask_needs_square_attention() -> None:
    for name in ("attention_mse", "attention_ce"):
        refuses([(B, H, N, D)], match_loss(name), *pair((B, H, N, D)), torch.ones(B, N))


def test_unequal_heads_name_the_loss_that_takes_them() -> None:
    for name, way_out in (("attention_mse", "_mse_sum"), ("attention_ce", "_ce_mean")):
        with pytest.raises(ValueError, match=f"2 .*4.*attention{way_out}"):
            match_loss(name)(*pair(SCORES, (B, 4, N, N)))


def test_a_zero_vector_is_orthogonal_to_everything_for_cos() -> None:
    assert losses.cos_loss(torch.zeros(B, D), draw(B, D)) == 1


def test_the_map_of_matches_has_textbrewers_names() -> None:
    assert set(losses.MATCH_LOSS_MAP) >= {
        "attention_mse_sum",
        "attention_mse",
        "attention_ce_mean",
        "attention_ce",
        "hidden_mse",
        "cos",
        "pkd",
        "gram",
        "fsp",
        "mmd",
        "nst",
    }
    assert losses.MATCH_LOSS_MAP["gram"] is losses.MATCH_LOSS_MAP["fsp"] is losses.fsp_loss
    assert losses.MATCH_LOSS_MAP["mmd"] is losses.MATCH_LOSS_MAP["nst"] is losses.mmd_loss


# --- logits ---------------------------------------------------------------------------------


def softmax(row: Tensor) -> Tensor:
    return row.exp() / row.exp().sum()


def formula_kd(name: str, S: Tensor, T: Tensor, tau: Tensor) -> Tensor:
    """Row by row; tau holds one number a row."""
    each = []
    for s, t, temperature in zip(S.reshape(-1, C), T.reshape(-1, C), tau.reshape(-1)):
        s, t = s / temperature, t / temperature
        each.append(((s - t) ** 2).mean() if name == "mse" else -softmax(t) @ softmax(s).log())
    return sum(each) / len(each)


@pytest.mark.parametrize("name", ["ce", "mse"])
@pytest.mark.parametrize("shape", [(B, C), (B, N, C)], ids=str)
@pytest.mark.parametrize("kind", ["default", "number", "0-dim", "a row"])
def test_a_kd_loss_has_the_value_and_the_gradient_of_its_formula(
    name: str, shape: tuple, kind: str
) -> None:
    logits_S, logits_T = pair(shape)
    per_row = draw(*shape[:-1], seed=5).abs() + 0.5
    given = {"default": [], "number": [4], "0-dim": [torch.tensor(2.5)], "a row": [per_row]}[kind]
    each = torch.as_tensor(*given or [1], dtype=torch.float64).expand(shape[:-1])
    value = losses.KD_LOSS_MAP[name](logits_S, logits_T, *given)
    check(value, formula_kd(name, logits_S, logits_T, each), logits_S, logits_T)


def test_no_gradient_reaches_the_temperature() -> None:
    tau = torch.full((B,), 2.0, requires_grad=True)
    for kd in (losses.kd_ce_loss, losses.kd_mse_loss):
        value = kd(*pair((B, C)), tau)
        assert torch.autograd.grad(value, tau, allow_unused=True) == (None,)


def test_kd_ce_is_least_and_kd_mse_zero_where_student_equals_teacher() -> None:
    logits = draw(B, C, grad=True)
    (gradient,) = gradients(losses.kd_ce_loss(logits, logits.detach(), 3), logits)
    near(gradient, torch.zeros_like(gradient))
    assert losses.kd_mse_loss(logits, logits, 3) == 0


def pearson(one: Tensor, other: Tensor) -> Tensor:
    one, other = one - one.mean(), other - other.mean()
    return one @ other / ((one @ one).sqrt() * (other @ other).sqrt() + 1e-8)


@pytest.mark.parametrize("tau", [1, 4.0, torch.tensor(2.5)], ids=str)
@pytest.mark.parametrize("weights", [{}, {"beta": 2.0, "gamma": 0.5}], ids=str)
def test_dist_is_one_minus_the_correlations(tau: float, weights: dict) -> None:
    logits_S, logits_T = pair((B, C))
    probs_S = torch.stack([softmax(row / tau) for row in logits_S])
    probs_T = torch.stack([softmax(row / tau) for row in logits_T])
    in_image = 1 - sum(pearson(s, t) for s, t in zip(probs_S, probs_T)) / B
    in_class = 1 - sum(pearson(s, t) for s, t in zip(probs_S.T, probs_T.T)) / C
    total = weights.get("beta", 1) * in_image + weights.get("gamma", 1) * in_class
    value = losses.dist_loss(logits_S, logits_T, tau, **weights)
    check(value, tau**2 * total, logits_S, logits_T)
    assert losses.dist_loss(logits_T, logits_T, tau) < 1e-3 * value  # their 1e-8 is what is left


def test_dist_refuses_what_has_no_correlation() -> None:
    for shape in ((1, C), (B, 1), (B, N, C)):
        refuses([shape], losses.dist_loss, *pair(shape))
    refuses([(B,)], losses.dist_loss, *pair((B, C)), torch.ones(B))


@pytest.mark.parametrize("name", losses.KD_LOSS_MAP)
def test_a_kd_loss_refuses_what_would_be_broadcast(name: str) -> None:
    kd = losses.KD_LOSS_MAP[name]
    for shape_T in ((B, 1), (1, C), (C,), (B, C + 1)):
        refuses([(B, C), shape_T], kd, *pair((B, C), shape_T))
    if name != "dist":
        for tau in (torch.ones(B, 1), torch.ones(1), torch.ones(C)):
            refuses([(B, C), tau.shape], kd, *pair((B, C)), tau)
    for tau in (0, -1.0, math.nan):
        with pytest.raises(ValueError, match="above 0"):
            kd(*pair((B, C)), tau)


@pytest.mark.parametrize("name", losses.KD_LOSS_MAP)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_a_kd_loss_raises_half_precision(name: str, dtype: torch.dtype) -> None:
    low = [300 * draw(B, C, seed=i).to(dtype) for i in range(2)]
    expected = losses.KD_LOSS_MAP[name](*[x.float() for x in low], 2.0)
    with torch.autocast("cpu", torch.bfloat16):
        value = losses.KD_LOSS_MAP[name](*low, 2.0)
    assert value.dtype == torch.float32 and value.isfinite() and torch.equal(value, expected)


def test_logits_are_standardized_row_by_row() -> None:
    logits = 3 + 20 * draw(B, N, C)
    rows_of = losses.standardize_logits(logits)
    near(rows_of.mean(-1), torch.zeros(B, N, dtype=torch.float64))
    near(rows_of.std(-1), torch.ones(B, N, dtype=torch.float64), 1e-6)
    row = logits[1, 2]
    deviation = (((row - row.mean()) ** 2).sum() / (C - 1)).sqrt()
    near(rows_of[1, 2], (row - row.mean()) / (deviation + 1e-7))
    refuses([(B, 1)], losses.standardize_logits, torch.ones(B, 1))


# --- the objective of DeiT ------------------------------------------------------------------


ALPHA, TAU = 0.3, 3.0
SHARES = torch.stack([softmax(row) for row in draw(B, C, seed=7)])
NUMBERS = torch.tensor([4, 0, 10])


def formula_ce(logits: Tensor, labels: Tensor, smoothing: float = 0.0) -> Tensor:
    shares = labels if labels.dim() == 2 else torch.eye(C, dtype=torch.float64)[labels]
    shares = (1 - smoothing) * shares + smoothing / C
    return sum(-share @ softmax(row).log() for row, share in zip(logits, shares)) / B


def formula_bce(logits: Tensor, present: Tensor) -> Tensor:
    probs = 1 / (1 + (-logits).exp())
    return -(present * probs.log() + (1 - present) * (1 - probs).log()).mean()


BASES = {
    "cross entropy": (nn.CrossEntropyLoss(), NUMBERS, formula_ce),
    "label smoothing": (
        losses.build_base_criterion(mixing=False, smoothing=0.1, bce=False),
        NUMBERS,
        lambda logits, labels: formula_ce(logits, labels, 0.1),
    ),
    "soft targets": (
        losses.build_base_criterion(mixing=True, smoothing=0.1, bce=False),
        SHARES,
        formula_ce,
    ),
    "binary": (
        losses.build_base_criterion(mixing=False, smoothing=0.0, bce=True),
        NUMBERS,
        lambda logits, labels: formula_bce(logits, torch.eye(C, dtype=torch.float64)[labels]),
    ),
    "a function": (lambda logits, labels: formula_ce(logits, labels), SHARES, formula_ce),
}
bases = pytest.mark.parametrize("base", BASES)


def soft_kl(S: Tensor, T: Tensor, tau: float = TAU) -> Tensor:
    """tau^2 * KL(teacher || student), summed over images and classes."""
    total = 0.0
    for s, t in zip(S, T):
        p, q = softmax(t / tau), softmax(s / tau)
        total = total + (p * (p / q).log()).sum()
    return tau**2 * total


class Teacher(nn.Module):
    """Logits from the images; counts its calls."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(D, C, dtype=torch.float64)
        self.calls = 0

    def forward(self, images: Tensor) -> Tensor:
        self.calls += 1
        return self.head(images)


@bases
@pytest.mark.parametrize("tuple_out", [False, True], ids=["tensor", "tuple"])
def test_none_is_the_base_loss(base: str, tuple_out: bool) -> None:
    criterion, labels, formula = BASES[base]
    logits, other = pair((B, C))
    teacher = Teacher()
    loss = losses.DistillationLoss(criterion, teacher, "none", ALPHA, TAU)
    value = loss(draw(B, D), (logits, other) if tuple_out else logits, labels)
    check(value, formula(logits, labels), logits, other)
    near(value, criterion(logits, labels))
    assert teacher.calls == 0 and set(loss.terms) == {"base"}


@bases
@pytest.mark.parametrize("reduction", ["numel", "batchmean"])
@pytest.mark.parametrize("head", ["dist", "cls"])
def test_soft_is_deits_sum_of_two_terms(base: str, reduction: str, head: str) -> None:
    criterion, labels, formula = BASES[base]
    outputs = pair((B, C))
    teacher, images = Teacher(), draw(B, D, seed=3)
    loss = losses.DistillationLoss(
        criterion, teacher, "soft", ALPHA, TAU, reduction=reduction, head=head
    )
    value = loss(images, outputs, labels)
    distilled = outputs[1] if head == "dist" else outputs[0]
    logits_T = teacher(images).detach()
    kd = soft_kl(distilled, logits_T) / (B * C if reduction == "numel" else B)
    expected = (1 - ALPHA) * formula(outputs[0], labels) + ALPHA * kd
    near(value, expected)
    for ours, theirs in zip(
        torch.autograd.grad(value, outputs, allow_unused=True, retain_graph=True),
        torch.autograd.grad(expected, outputs, allow_unused=True),
    ):
        assert (ours is None) == (theirs is None)
        if ours is not None:
            near(ours, theirs)
    assert torch.autograd.grad(value, teacher.head.weight, allow_unused=True) == (None,)
    near(loss.terms["base"], formula(outputs[0], labels).detach())
    near(loss.terms["distillation"], kd.detach())
    assert not any(term.requires_grad for term in loss.terms.values())


@bases
def test_hard_is_cross_entropy_with_the_teachers_choice(base: str) -> None:
    criterion, labels, formula = BASES[base]
    outputs = pair((B, C))
    teacher, images = Teacher(), draw(B, D, seed=3)
    loss = losses.DistillationLoss(criterion, teacher, "hard", ALPHA, TAU)
    value = loss(images, outputs, labels)
    kd = formula_ce(outputs[1], teacher(images).argmax(1))
    expected = (1 - ALPHA) * formula(outputs[0], labels) + ALPHA * kd
    near(value, expected)
    for ours, theirs in zip(gradients(value, outputs), gradients(expected, outputs)):
        near(ours, theirs)
    other_tau = losses.DistillationLoss(criterion, teacher, "hard", ALPHA, 0)
    near(other_tau(images, outputs, labels), value)


def make(kind: str = "soft", teacher: object = None, **named: object) -> losses.DistillationLoss:
    return losses.DistillationLoss(nn.CrossEntropyLoss(), teacher, kind, ALPHA, TAU, **named)


def test_batchmean_is_numel_times_the_classes() -> None:
    outputs, logits_T = pair((B, C)), draw(B, C, seed=4)
    kd = {}
    for reduction in ("numel", "batchmean"):
        loss = make(reduction=reduction)
        loss(None, outputs, NUMBERS, teacher_outputs=logits_T)
        kd[reduction] = loss.terms["distillation"]
    near(kd["batchmean"], C * kd["numel"])


def test_soft_is_zero_where_student_equals_teacher() -> None:
    logits = draw(B, C)
    loss = make()
    loss(None, (draw(B, C, seed=1), logits), NUMBERS, teacher_outputs=logits)
    assert loss.terms["distillation"].abs() < 1e-15


def test_one_tensor_can_be_distilled_on_the_class_head() -> None:
    logits, logits_T = pair((B, C))
    value = make(head="cls", reduction="batchmean")(None, logits, NUMBERS, teacher_outputs=logits_T)
    kd = soft_kl(logits, logits_T) / B
    check(value, (1 - ALPHA) * formula_ce(logits, NUMBERS) + ALPHA * kd, logits, logits_T)


@pytest.mark.parametrize("kind", ["soft", "hard"])
def test_one_tensor_without_a_distillation_head_is_refused(kind: str) -> None:
    with pytest.raises(ValueError, match=rf"{kind}.*\({B}, {C}\).*distilled"):
        make(kind, Teacher())(draw(B, D), draw(B, C), NUMBERS)


def test_outputs_that_are_no_pair_are_refused() -> None:
    for outputs in ((draw(B, C),), (draw(B, C),) * 3, {"logits": draw(B, C)}):
        with pytest.raises(ValueError, match="pair"):
            make("none")(None, outputs, NUMBERS)


def test_the_teacher_is_no_part_of_the_loss() -> None:
    teacher = Teacher().eval()
    loss = make("soft", teacher)
    assert loss.teacher_model is teacher
    assert not loss.state_dict() and not list(loss.parameters())
    loss.train().float()
    assert not teacher.training and teacher.head.weight.dtype == torch.float64
    assert copy.deepcopy(loss).teacher_model is not teacher


def test_given_logits_stand_for_the_teacher() -> None:
    teacher, images, outputs = Teacher(), draw(B, D, seed=3), pair((B, C))
    live = make("soft", teacher)(images, outputs, NUMBERS)
    logits_T = teacher(images)
    calls = teacher.calls
    near(make("soft", teacher)(None, outputs, NUMBERS, teacher_outputs=logits_T), live)
    near(make("soft")(None, outputs, NUMBERS, teacher_outputs=logits_T), live)
    assert teacher.calls == calls
    with pytest.raises(ValueError, match="teacher_model, or teacher_outputs"):
        make("soft")(images, outputs, NUMBERS)


def test_a_teacher_of_other_shapes_is_refused() -> None:
    for shape in ((1, C), (B, N, C), (C,)):
        logits_T = draw(*shape)
        refuses([(B, C), shape], make(), None, pair((B, C)), NUMBERS, teacher_outputs=logits_T)
    for classes in (1, C + 1):
        with pytest.raises(UserError, match=f"{C} classes.* {classes};"):
            make()(None, pair((B, C)), NUMBERS, teacher_outputs=draw(B, classes))
    with pytest.raises(ValueError, match="evaluation mode"):
        make("soft", lambda images: (images, images))(None, pair((B, C)), NUMBERS)


def test_settings_that_mean_nothing_are_refused() -> None:
    base = nn.CrossEntropyLoss()
    for bad in (("loud", 0.5, 1.0), ("soft", 1.5, 1.0), ("soft", -0.1, 1.0), ("soft", 0.5, 0.0)):
        with pytest.raises(ValueError):
            losses.DistillationLoss(base, None, *bad)
    for named in ({"reduction": "sum"}, {"head": "both"}):
        with pytest.raises(ValueError, match="choose one of"):
            make(**named)
    with pytest.raises(ValueError, match="hard"):
        make("hard", logit_standardization=True)
    losses.DistillationLoss(base, None, "none", 0, 0)  # what none does not read is not judged


def test_soft_can_standardize_both_sides() -> None:
    outputs, logits_T = pair((B, C)), draw(B, C, seed=4)
    loss = make(logit_standardization=True)
    loss(None, outputs, NUMBERS, teacher_outputs=logits_T)
    unit = [
        (x - x.mean(1, keepdim=True)) / (x.std(1, keepdim=True) + 1e-7)
        for x in (outputs[1], logits_T)
    ]
    near(loss.terms["distillation"], (soft_kl(*unit) / (B * C)).detach())
    loss(None, outputs, NUMBERS, teacher_outputs=5 + 9 * outputs[1])
    assert loss.terms["distillation"] < 1e-12


@pytest.mark.parametrize("kind", ["none", "soft", "hard"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_the_objective_is_float32_under_autocast(kind: str, dtype: torch.dtype) -> None:
    outputs = tuple(100 * draw(B, C, seed=i).to(dtype) for i in range(2))
    logits_T = draw(B, C, seed=4).to(dtype)
    full = [tuple(x.float() for x in outputs), NUMBERS]
    expected = make(kind)(None, *full, teacher_outputs=logits_T.float())
    with torch.autocast("cpu", torch.bfloat16):
        value = make(kind)(None, outputs, NUMBERS, teacher_outputs=logits_T)
        for labels in (SHARES, SHARES.to(dtype)):
            shares = make(kind)(None, outputs, labels, teacher_outputs=logits_T)
            assert shares.dtype == torch.float32 and shares.isfinite()
    assert value.dtype == torch.float32 and torch.equal(value, expected)


# --- base criteria --------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_binary_targets_of_mixed_shares_are_the_classes_in_the_image(
    smoothing: float, dtype: torch.dtype
) -> None:
    logits = draw(B, C)
    hot = torch.eye(C, dtype=torch.float64) * (1 - smoothing) + smoothing / C
    shares = (0.3 * hot[NUMBERS].to(dtype) + 0.7 * hot[NUMBERS.flip(0)].to(dtype)).to(dtype)
    present = torch.zeros(B, C, dtype=torch.float64)
    for row, numbers in enumerate(zip(NUMBERS, NUMBERS.flip(0))):
        present[row, list(numbers)] = 1
    loss = losses.BinaryCrossEntropyTargets(smoothing)
    near(loss(logits, shares), formula_bce(logits, present))
    near(make_with(loss)(None, logits, shares), formula_bce(logits, present))


def make_with(base: nn.Module) -> losses.DistillationLoss:
    return losses.DistillationLoss(base, None, "none", 0.0, 1.0)


def test_binary_targets_refuse_other_labels() -> None:
    loss = losses.BinaryCrossEntropyTargets()
    for labels in (torch.ones(B), torch.ones(B, 1), torch.zeros(B + 1, dtype=torch.long)):
        refuses([(B, C), labels.shape], loss, draw(B, C), labels)
    for smoothing in (-0.1, 1.0):
        with pytest.raises(ValueError, match="smoothing"):
            losses.build_base_criterion(mixing=False, smoothing=smoothing, bce=True)


def test_the_base_criterion_smooths_only_what_mixing_has_not() -> None:
    assert losses.build_base_criterion(mixing=True, smoothing=0.1, bce=False).label_smoothing == 0
    smooth = losses.build_base_criterion(mixing=False, smoothing=0.1, bce=False)
    assert smooth.label_smoothing == 0.1


# --- cosub ----------------------------------------------------------------------------------


@pytest.mark.parametrize("labels", [NUMBERS, SHARES], ids=["class numbers", "shares"])
def test_cosub_is_a_quarter_of_four_binary_cross_entropies(labels: Tensor) -> None:
    one, other = pair((B, C))
    shares = labels if labels.dim() == 2 else torch.eye(C, dtype=torch.float64)[labels]
    parts = [formula_bce(one, shares), formula_bce(other, shares)]
    parts += [formula_bce(one, 1 / (1 + (-other.detach()).exp()))]
    parts += [formula_bce(other, 1 / (1 + (-one.detach()).exp()))]
    value, expected = losses.cosub_loss(one, other, labels), sum(parts) / 4
    near(value, expected)
    for ours, theirs in zip(gradients(value, [one, other]), gradients(expected, [one, other])):
        near(ours, theirs)
    loss = losses.CosubLoss()
    near(loss(None, torch.cat([one, other]), labels), value)
    near(loss.terms["base"], value.detach())


def test_cosub_refuses_what_is_not_two_runs() -> None:
    refuses([(B, C), (1, C)], losses.cosub_loss, draw(B, C), draw(1, C), NUMBERS)
    refuses([(B, C)], losses.CosubLoss(), None, draw(B, C), NUMBERS)
    with pytest.raises(ValueError, match="heads"):
        losses.CosubLoss()(None, (draw(B, C), draw(B, C)), NUMBERS)


# --- embeddings -----------------------------------------------------------------------------


def formula_ranking(scores_S: Tensor, scores_T: Tensor, tau: float) -> Tensor:
    return soft_kl(scores_S, scores_T, tau) / len(scores_S)


def cosine(one: Tensor, other: Tensor) -> Tensor:
    return one @ other / (one @ one).sqrt() / (other @ other).sqrt()


def dot(one: Tensor, other: Tensor) -> Tensor:
    return one @ other


def table(similarity: Callable, one: Tensor, other: Tensor) -> Tensor:
    return torch.stack([torch.stack([similarity(a, b) for b in other]) for a in one])


def test_similarities_are_of_rows_with_rows_or_of_all_with_all() -> None:
    one, other, many = draw(B, D), draw(B, D, seed=1), draw(N, D, seed=2)
    near(losses.pairwise_dot_score(one, other), table(dot, one, other).diagonal())
    near(losses.pairwise_cos_sim(one, other), table(cosine, one, other).diagonal())
    near(losses.dot_score(one, many), table(dot, one, many))
    near(losses.cos_sim(one, many), table(cosine, one, many))
    for similarity in (losses.pairwise_dot_score, losses.pairwise_cos_sim):
        refuses([(B, D), (1, D)], similarity, one, one[:1])
    for similarity in (losses.dot_score, losses.cos_sim):
        refuses([(B, D), (N, 1)], similarity, one, draw(N, 1))


@pytest.mark.parametrize("tau", [1.0, 0.2, 3])
@pytest.mark.parametrize("name", ["dot", "cosine"])
def test_explicit_candidates_are_ranked_as_the_teacher_does(name: str, tau: float) -> None:
    similarity = {"dot": losses.pairwise_dot_score, "cosine": losses.pairwise_cos_sim}[name]
    embeddings = [draw(B, D, seed=i, grad=True) for i in range(1 + K)]
    labels = draw(B, K, seed=9, grad=True)
    by_hand = {"dot": dot, "cosine": cosine}[name]
    scores = torch.stack(
        [
            torch.stack([by_hand(embeddings[0][b], other[b]) for other in embeddings[1:]])
            for b in range(B)
        ]
    )
    loss = losses.DistillKLDivLoss(None, similarity, tau)
    value = loss.compute_loss_from_embeddings(embeddings, labels)
    check(value, formula_ranking(scores, labels, tau), embeddings, labels)


def test_images_are_embedded_by_the_model_which_stays_its_owners() -> None:
    model = nn.Sequential(nn.Flatten(), nn.Linear(3 * 2 * 2, D)).double()
    images = [draw(B, 3, 2, 2, seed=i) for i in range(1 + K)]
    labels = draw(B, K, seed=9)
    loss = losses.DistillKLDivLoss(model)
    value = loss(images, labels)
    near(value, loss.compute_loss_from_embeddings([model(p) for p in images], labels))
    value.backward()
    assert all(p.grad.abs().sum() > 0 for p in model.parameters())
    assert loss.temperature == 1 and loss.similarity_fct is losses.pairwise_dot_score
    assert not loss.state_dict() and loss.model is model


def test_a_ranking_that_is_the_teachers_own_costs_nothing() -> None:
    embeddings = [draw(B, D, seed=i) for i in range(1 + K)]
    scores = torch.stack([(embeddings[0] * other).sum(1) for other in embeddings[1:]], 1)
    loss = losses.DistillKLDivLoss(None, temperature=0.5)
    assert loss.compute_loss_from_embeddings(embeddings, scores + 3).abs() < 1e-12


def test_a_candidate_the_teacher_rules_out_has_probability_zero() -> None:
    scores_S, scores_T = pair((B, K))
    with torch.no_grad():
        scores_T[1, 2] = -math.inf
    value = losses.score_kl_loss(scores_S, scores_T)
    value.backward()
    assert value.isfinite() and scores_S.grad.isfinite().all()


def test_rankings_of_other_shapes_are_refused() -> None:
    loss = losses.DistillKLDivLoss(None)
    embeddings = [draw(B, D, seed=i) for i in range(1 + K)]
    for shape in ((B, 1), (1, K), (K,), (B, K + 1)):
        refuses([shape, (B, K)], loss.compute_loss_from_embeddings, embeddings, draw(*shape))
        refuses([shape, (B, K)], losses.score_kl_loss, draw(B, K), draw(*shape))
    refuses(
        [(B, D), (1, D)], loss.compute_loss_from_embeddings, [embeddings[0], draw(1, D)], draw(B, 1)
    )
    with pytest.raises(ValueError, match="one or more others"):
        loss.compute_loss_from_embeddings(embeddings[:1], draw(B, K))
    for tau in (0.0, -1.0):
        with pytest.raises(ValueError, match="above 0"):
            losses.DistillKLDivLoss(None, temperature=tau)


def test_one_candidate_warns_that_there_is_nothing_to_rank() -> None:
    loss = losses.DistillKLDivLoss(None)
    with pytest.warns(UserWarning, match="always 0"):
        assert loss.compute_loss_from_embeddings([draw(B, D), draw(B, D)], draw(B, 1)) == 0


@pytest.mark.parametrize("tau", [1.0, 0.2])
@pytest.mark.parametrize("name", ["dot", "cosine"])
def test_in_batch_candidates_are_the_other_images(name: str, tau: float) -> None:
    embeddings_S, embeddings_T = pair((N, D), (N, D + 2))
    by_hand, similarity, in_pairs = {
        "dot": (dot, losses.dot_score, losses.pairwise_dot_score),
        "cosine": (cosine, losses.cos_sim, losses.pairwise_cos_sim),
    }[name]
    off = ~torch.eye(N, dtype=torch.bool)
    scores_S, scores_T = (
        table(by_hand, x, x)[off].view(N, N - 1) for x in (embeddings_S, embeddings_T)
    )
    value = losses.in_batch_similarity_loss(embeddings_S, embeddings_T, tau, similarity=similarity)
    check(value, formula_ranking(scores_S, scores_T, tau), embeddings_S, embeddings_T)

    rolled = [embeddings_S.roll(-k, 0) for k in range(N)]
    labels = torch.stack([in_pairs(embeddings_T, embeddings_T.roll(-k, 0)) for k in range(1, N)], 1)
    explicit = losses.DistillKLDivLoss(None, in_pairs, tau)
    near(explicit.compute_loss_from_embeddings(rolled, labels), value)


@pytest.mark.parametrize("tau", [1.0, 0.2])
def test_gallery_candidates_are_the_gallerys_images(tau: float) -> None:
    embeddings_S, embeddings_T = pair((B, D), (B, D + 2))
    gallery_S, gallery_T = draw(N, D, seed=5, grad=True), draw(N, D + 2, seed=6, grad=True)
    value = losses.gallery_similarity_loss(embeddings_S, embeddings_T, gallery_S, gallery_T, tau)
    scores_S = table(cosine, embeddings_S, gallery_S)
    scores_T = table(cosine, embeddings_T, gallery_T)
    expected = formula_ranking(scores_S, scores_T, tau)
    check(value, expected, embeddings_S, [embeddings_T, gallery_S, gallery_T])


def test_too_few_or_other_candidates_are_refused() -> None:
    in_batch, gallery = losses.in_batch_similarity_loss, losses.gallery_similarity_loss
    refuses([(B, D), (1, D)], in_batch, draw(B, D), draw(1, D))
    refuses([(B, N, D)], in_batch, draw(B, N, D), draw(B, N, D))
    with pytest.raises(ValueError, match="2 images"):
        in_batch(draw(2, D), draw(2, D))
    one, many = draw(B, D), draw(N, D)
    refuses([(B, D), (1, D)], gallery, one, draw(1, D), many, many)
    refuses([(N, D), (1, D)], gallery, one, one, many, draw(1, D))
    refuses([(B, D), (N, 1)], gallery, one, one, draw(N, 1), many)
    with pytest.raises(ValueError, match="1 images"):
        gallery(one, one, draw(1, D), draw(1, D))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_embedding_losses_raise_half_precision(dtype: torch.dtype) -> None:
    low = [100 * draw(N, D, seed=i).to(dtype) for i in range(4)]
    full = [x.float() for x in low]
    calls = [
        lambda x: losses.in_batch_similarity_loss(x[0], x[1], 0.1, similarity=losses.dot_score),
        lambda x: losses.gallery_similarity_loss(*x, 0.1),
        lambda x: losses.DistillKLDivLoss(None).compute_loss_from_embeddings(x[:3], x[3][:, :2]),
        lambda x: losses.cosub_loss(x[0], x[1], NUMBERS.repeat(2)[:N] % D),
    ]
    for call in calls:
        with torch.autocast("cpu", torch.bfloat16):
            value = call(low)
        assert value.dtype == torch.float32 and value.isfinite()
        assert torch.equal(value, call(full))


# --- from the command line ------------------------------------------------------------------


def test_the_command_line_chooses_the_objective() -> None:
    args = Namespace(
        cosub=False,
        smoothing=0.1,
        bce_loss=False,
        distillation_type="soft",
        distillation_alpha=0.7,
        distillation_tau=2.0,
        distillation_reduction="batchmean",
        logit_standardization=False,
    )
    loss = losses.build_criterion(args, mixing=False, head="cls")
    assert isinstance(loss, losses.DistillationLoss)
    found = (loss.distillation_type, loss.alpha, loss.tau, loss.reduction, loss.head)
    assert found == ("soft", 0.7, 2.0, "batchmean", "cls")
    args.bce_loss = True
    loss = losses.build_criterion(args, mixing=True)
    assert loss.head == "dist"
    assert isinstance(loss.base_criterion, losses.BinaryCrossEntropyTargets)
    args.cosub = True
    assert isinstance(losses.build_criterion(args, mixing=True), losses.CosubLoss)


TOKENS_S = torch.tensor([[[1.0, 0.0], [0.0, 2.0]]])
TOKENS_T = torch.tensor([[[0.0, 3.0], [1.0, 0.0]]])
MAP = torch.tensor([[[[1.0, 0.0], [0.0, 1.0]]]])
LOG_2 = 0.8132616875  # -(log softmax([1, 0]) . [1/2, 1/2]): the teacher's zeros are uniform
BY_HAND = {
    "attention_mse": (MAP, 0.5),  # two of four differ by 1
    "attention_mse_sum": (MAP, 0.5),
    "attention_ce": (MAP, LOG_2),
    "attention_ce_mean": (MAP, LOG_2),
    "hidden_mse": (TOKENS_S, 3.75),  # (1 + 9 + 1 + 4) / 4
    "cos": (TOKENS_S, 1.0),  # both pairs at right angles
    "pkd": (TOKENS_S, 2.0),  # [1, 0] against [0, 1], summed over the width
    "fsp": (TOKENS_S, 1.5625),  # [[1, 0], [0, 4]] / 2 against [[1, 0], [0, 9]] / 2: 2.5^2 / 4
    "nst": (TOKENS_S, 4.5625),  # [[1, 0], [0, 4]] / 2 against [[9, 0], [0, 1]] / 2: (16 + 2.25) / 4
    "vkd": (TOKENS_S, 1.25),  # the teacher's rows become [-1, 1] and [1, -1]: (1.5+0.5+0.5+2.5) / 4
}


@pytest.mark.parametrize("name", BY_HAND)
def test_a_match_worked_by_hand(name: str) -> None:
    state, wanted = BY_HAND[name]
    other = torch.zeros_like(MAP) if state is MAP else TOKENS_T
    pair = name in ("fsp", "nst")
    found = losses.MATCH_LOSS_MAP[name](*([x, x] if pair else x for x in (state, other)))
    assert found.item() == pytest.approx(wanted, abs=1e-4)


def test_kd_losses_worked_by_hand() -> None:
    logits_S, logits_T = torch.tensor([[0.0, 2.0]]), torch.zeros(1, 2)  # at temperature 2: [0, 1]
    assert losses.KD_LOSS_MAP["ce"](logits_S, logits_T, 2.0).item() == pytest.approx(LOG_2)
    assert losses.KD_LOSS_MAP["mse"](logits_S, logits_T, 2.0).item() == pytest.approx(0.5)


@pytest.mark.parametrize("loss", losses.CLIPPED)
def test_attention_without_clip_equals_a_mask_of_ones_bit_for_bit(loss) -> None:
    generator = torch.Generator().manual_seed(3)
    state_S, state_T = (torch.randn(3, 2, 7, 7, generator=generator) for _ in range(2))
    masked = loss(state_S, state_T, torch.ones(3, 7))
    assert torch.equal(loss(state_S, state_T, clip=False), masked)
    assert not torch.isclose(loss(state_S, state_T), masked)
