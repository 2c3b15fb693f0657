"""Weights and temperatures while training goes on, against their formulas row by row."""

import math

import pytest
import torch
from torch import Tensor

from base.errors import UserError
from schedules import TEMPERATURE_SCHEDULER, WEIGHT_SCHEDULER, clamp_temperature, pick

B, N, C = 3, 5, 11
BASE = 4.0


def draw(*shape: int, seed: int = 0, grad: bool = False) -> Tensor:
    values = torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return values.requires_grad_(grad)


def near(one: Tensor, other: Tensor, tolerance: float = 1e-10) -> None:
    torch.testing.assert_close(one, other, rtol=tolerance, atol=tolerance)


def around_the_base(weights: list[Tensor], beta: float, shape: tuple[int, ...]) -> Tensor:
    """base + beta * (mean(w) - w)."""
    mean = sum(weights) / len(weights)
    return torch.stack([BASE + beta * (mean - w) for w in weights]).reshape(shape)


def formula_flsw(S: Tensor, T: Tensor, beta: float, gamma: float, eps: float = 1e-4) -> Tensor:
    weights = []
    for s, t in zip(S.reshape(-1, C), T.reshape(-1, C)):
        cosine = s @ t / ((s @ s).sqrt() + eps) / ((t @ t).sqrt() + eps)
        weights.append((1 - cosine) ** gamma)
    return around_the_base(weights, beta, S.shape[:-1])


def formula_cwsm(S: Tensor, beta: float) -> Tensor:
    weights = [1 / ((s.exp() / s.exp().sum()).max() + 1e-3) for s in S.reshape(-1, C)]
    return around_the_base(weights, beta, S.shape[:-1])


shapes = pytest.mark.parametrize("shape", [(B, C), (B, N, C)], ids=str)


@shapes
@pytest.mark.parametrize("values", [(1, 2), (0.5, 1.5), (2, 1, 0.1)], ids=str)
def test_flsw_is_hot_where_the_networks_agree(shape: tuple, values: tuple) -> None:
    logits_S, logits_T = draw(*shape), draw(*shape, seed=1)
    found = TEMPERATURE_SCHEDULER[["flsw", *values]](logits_S, logits_T, BASE)
    near(found, formula_flsw(logits_S, logits_T, *values))
    logits_T.view(-1, C)[2] = 3 * logits_S.view(-1, C)[2]
    agreed = TEMPERATURE_SCHEDULER[["flsw", *values]](logits_S, logits_T, BASE)
    assert agreed.argmax() == 2


@shapes
def test_cwsm_is_hot_where_the_student_is_sure(shape: tuple) -> None:
    logits_S = draw(*shape)
    logits_S.view(-1, C)[1] *= 9
    found = TEMPERATURE_SCHEDULER[["cwsm", 0.3]](logits_S, torch.full(shape, math.nan), BASE)
    near(found, formula_cwsm(logits_S, 0.3))
    assert found.argmax() == 1


def test_cwsm_worked_by_hand() -> None:
    logits = torch.tensor([[0.0, 0.0], [0.0, math.log(3)]], dtype=torch.float64)
    first, second = 1 / 0.501, 1 / 0.751
    half = (first - second) / 2
    found = TEMPERATURE_SCHEDULER["cwsm", 2](logits, logits, 1.0)
    near(found, torch.tensor([1 - 2 * half, 1 + 2 * half], dtype=torch.float64))


def test_constant_is_the_base() -> None:
    for key in ("constant", ["constant"], ("constant",), ["constant", {}]):
        assert TEMPERATURE_SCHEDULER[key](draw(B, C), draw(B, C), BASE) == BASE


def test_the_parameters_may_be_a_list_a_tuple_or_named() -> None:
    logits_S, logits_T = draw(B, C), draw(B, C, seed=1)
    expected = formula_flsw(logits_S, logits_T, 1, 2)
    for key in (["flsw", 1, 2], ("flsw", 1, 2), ["flsw", {"beta": 1, "gamma": 2}]):
        near(TEMPERATURE_SCHEDULER[key](logits_S, logits_T, BASE), expected)
    near(TEMPERATURE_SCHEDULER["flsw", 1, 2](logits_S, logits_T, BASE), expected)


def test_the_mean_temperature_is_the_base_and_beta_zero_changes_nothing() -> None:
    logits_S, logits_T = draw(B, C), draw(B, C, seed=1)
    for key in (["flsw", 0.7, 2], ["cwsm", 0.7]):
        found = TEMPERATURE_SCHEDULER[key](logits_S, logits_T, BASE)
        near(found.mean(), torch.tensor(BASE, dtype=torch.float64))
        flat = TEMPERATURE_SCHEDULER[[key[0], 0, *key[2:]]](logits_S, logits_T, BASE)
        near(flat, torch.full((B,), BASE, dtype=torch.float64))


def test_no_gradient_passes_through_a_temperature() -> None:
    logits_S, logits_T = draw(B, C, grad=True), draw(B, C, seed=1, grad=True)
    for key in (["flsw", 1, 2], ["cwsm", 1]):
        assert not TEMPERATURE_SCHEDULER[key](logits_S, logits_T, BASE).requires_grad


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_temperatures_of_half_precision_are_float32(dtype: torch.dtype) -> None:
    logits_S, logits_T = (300 * draw(B, C)).to(dtype), (300 * draw(B, C, seed=1)).to(dtype)
    for key in (["flsw", 1, 0.5], ["cwsm", 1]):
        low = TEMPERATURE_SCHEDULER[key](logits_S, logits_T, BASE)
        full = TEMPERATURE_SCHEDULER[key](logits_S.float(), logits_T.float(), BASE)
        assert low.dtype == torch.float32 and low.isfinite().all() and torch.equal(low, full)


def test_flsw_with_a_fractional_power_is_finite_where_the_networks_are_equal() -> None:
    logits = 1e6 * draw(B, C).float()
    for scale in (1, 3, 1e3):
        found = TEMPERATURE_SCHEDULER["flsw", 1, 0.5, 0.0](logits, scale * logits, BASE)
        assert found.isfinite().all()


def test_flsw_refuses_other_shapes() -> None:
    schedule = TEMPERATURE_SCHEDULER["flsw", 1, 2]
    for shape in ((1, C), (B, 1), (B, C + 1)):
        with pytest.raises(ValueError) as error:
            schedule(draw(B, C), draw(*shape), BASE)
        assert str((B, C)) in str(error.value) and str(shape) in str(error.value)


def test_a_clamp_says_how_many_rows_it_changed() -> None:
    raised, count = clamp_temperature(torch.tensor([-46.6, 0.0, 0.1, 0.2, 85.3]), 0.1)
    near(raised, torch.tensor([0.1, 0.1, 0.1, 0.2, 85.3]))
    assert count == 2 and count.dim() == 0
    for number in (4, 4.0, torch.tensor(4.0)):
        raised, count = clamp_temperature(number, 0.1)
        assert raised == 4 and raised.is_floating_point() and count == 0
    assert clamp_temperature(draw(B, N), 0.1)[0].shape == (B, N)
    for floor in (0, -1.0, math.nan):
        with pytest.raises(ValueError, match="above 0"):
            clamp_temperature(1.0, floor)


def test_a_thousand_classes_make_cwsm_negative_and_the_clamp_mends_it() -> None:
    logits = 0.5 * torch.randn(64, 1000, generator=torch.Generator().manual_seed(0))
    tau = TEMPERATURE_SCHEDULER["cwsm", 1](logits, logits, BASE)
    mended, count = clamp_temperature(tau, 0.5)
    assert tau.min() < 0 < count < 64 and mended.min() == 0.5


def test_a_weight_falls_or_grows_with_the_share_of_updates_done() -> None:
    assert [WEIGHT_SCHEDULER["linear_decay"](x) for x in (0, 0.25, 1)] == [1, 0.75, 0]
    assert [WEIGHT_SCHEDULER["linear_growth"](x) for x in (0, 0.25, 1)] == [0, 0.25, 1]


def test_the_registries_have_textbrewers_names() -> None:
    assert set(WEIGHT_SCHEDULER) == {"linear_decay", "linear_growth"}
    assert set(TEMPERATURE_SCHEDULER) == {"constant", "flsw", "cwsm"}
    assert "cwsm" in TEMPERATURE_SCHEDULER and "none" not in TEMPERATURE_SCHEDULER


def test_an_unknown_name_is_answered_with_the_known_ones() -> None:
    for key in ("flws", ["flws", 1, 2], ["flws"], 3, None):
        with pytest.raises(UserError, match="constant, cwsm, flsw"):
            TEMPERATURE_SCHEDULER[key]
    with pytest.raises(UserError, match="weight.*linear_decay, linear_growth"):
        WEIGHT_SCHEDULER["cosine"]
    with pytest.raises(UserError, match="fruit 'pear'.*apple, plum"):
        pick({"plum": 1, "apple": 2}, "pear", "fruit")
    assert pick({"plum": 1, "apple": 2}, "plum", "fruit") == 1


@pytest.mark.parametrize(
    "key",
    [
        "flsw",
        ["flsw"],
        ["flsw", 1],
        ["flsw", 1, 2, 3, 4],
        ["flsw", {"beta": 1}],
        "cwsm",
        ["cwsm", {"gamma": 1}],
        ["constant", 1],
        [],
    ],
    ids=str,
)
def test_parameters_that_do_not_fit_are_refused_when_named(key: object) -> None:
    with pytest.raises(UserError, match="temperature schedule"):
        TEMPERATURE_SCHEDULER[key]


def test_a_user_adds_a_schedule_by_assignment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(WEIGHT_SCHEDULER, "square", lambda progress: progress**2)
    assert WEIGHT_SCHEDULER["square"](0.5) == 0.25
    monkeypatch.setitem(WEIGHT_SCHEDULER, "power", lambda n: lambda progress: progress**n)
    assert WEIGHT_SCHEDULER["power", 3](0.5) == 0.125
    monkeypatch.setitem(TEMPERATURE_SCHEDULER, "double", lambda S, T, base: 2 * base)
    assert TEMPERATURE_SCHEDULER["double"](draw(B, C), draw(B, C), BASE) == 2 * BASE
    monkeypatch.setitem(TEMPERATURE_SCHEDULER, "times", lambda k: lambda S, T, base: k * base)
    for key in (["times", 3], ["times", {"k": 3}]):
        assert TEMPERATURE_SCHEDULER[key](draw(B, C), draw(B, C), BASE) == 3 * BASE
