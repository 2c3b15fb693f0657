"""Schedules of training: weights of the loss terms, temperatures of the softmax.

B batch, L positions, C classes. A weight schedule is a function of progress; a temperature
schedule is a function `(logits_S, logits_T, base_temperature)`. None of them has state, so a
checkpoint stores none. The registries are open: assign an entry, then name it.
"""

import inspect
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from base.errors import UserError, shorten

Temperature = float | Tensor
TemperatureSchedule = Callable[[Tensor, Tensor, Temperature], Temperature]


def pick(registry: Mapping[str, Any], name: str, what: str) -> Any:
    """Return `registry[name]`; raises UserError listing the known names.

    what: the kind of entry, for the message ("match loss").
    """
    if not isinstance(name, str) or name not in registry:
        known = ", ".join(sorted(registry))
        raise UserError(f"{what} {shorten(name)} is not known; choose one of: {known}")
    return registry.get(name)  # get, since ScheduleRegistry subscripts through this function


def takes_parameters(builder: Callable[..., Callable]) -> Callable[..., Callable]:
    """Mark a registry entry as a builder that needs parameters, `[name, *values]`.

    With the mark, missing parameters raise a clear error. Without it, the builder itself would be
    called as the schedule.
    """
    builder.takes_parameters = True  # type: ignore[attr-defined]
    return builder


class ScheduleRegistry(dict):
    """A dict of schedules whose key may carry parameters.

    `registry["name"]` is the entry itself; `registry["name", 1, 2]`, `registry[["name", 1, 2]]`
    and `registry[["name", {"beta": 1}]]` call the entry with the parameters and return what it
    builds. Raises UserError for an unknown name (listing the known ones) and for parameters that
    are missing or do not fit.
    """

    def __init__(self, what: str, entries: Mapping[str, Callable]) -> None:
        super().__init__(entries)
        self.what = what

    def __getitem__(self, key: Any) -> Callable:
        name, values, named = self._read(key)
        entry = pick(self, name, self.what)
        if not values and not named and not getattr(entry, "takes_parameters", False):
            return entry
        signature = inspect.signature(entry)
        try:
            signature.bind(*values, **named)
        except TypeError as error:
            needed = [each for each in signature.parameters.values() if each.default is each.empty]
            example = [str(name), *(f"{1 + index}" for index in range(len(needed)))]
            raise UserError(
                f"{self.what} {name!r} with the parameters {[*values, *named.items()]}: {error}; "
                f"give {', '.join(each.name for each in needed)}: for example "
                f"{':'.join(example)}, in a file [{', '.join(example)}]"
            ) from None
        schedule = entry(*values, **named)
        if not callable(schedule):
            raise UserError(
                f"{self.what} {name!r} takes no parameters: called with them it returns "
                f"{type(schedule).__name__}, not a schedule"
            )
        return schedule

    def _read(self, key: Any) -> tuple[Any, list[Any], dict[str, Any]]:
        if not isinstance(key, list | tuple):
            return key, [], {}
        if not key:
            raise UserError(f"{self.what} []: give a name, or [name, parameter, ...]")
        name, *values = key
        if len(values) == 1 and isinstance(values[0], Mapping):
            return name, [], dict(values[0])
        return name, values, {}


def linear_decay(progress: float) -> float:
    """Return 1 - progress. progress: share of the updates done, from 0 to 1."""
    return 1 - progress


def linear_growth(progress: float) -> float:
    """Return progress. progress: share of the updates done, from 0 to 1."""
    return progress


def constant_temperature(
    logits_S: Tensor, logits_T: Tensor, base_temperature: Temperature
) -> Temperature:
    """Return `base_temperature` as it is."""
    return base_temperature


@takes_parameters
def flsw_temperature(beta: float, gamma: float, eps: float = 1e-4) -> TemperatureSchedule:
    """Build focal-like sample weighting: a higher temperature where S and T already agree.

    The schedule takes logits (B,C) or (B,L,C) and returns temperatures (B,) or (B,L):
    base + beta * (mean(w) - w), where w = (1 - v.t)^gamma and v, t are the logits divided by
    their length + eps. No gradient. The mean is over the given tensor, which is one process's
    batch. Temperatures can be <= 0: see `clamp_temperature`.
    Source: TextBrewer's `flsw`, whose numbers these are.
    """

    @torch.no_grad()
    def schedule(logits_S: Tensor, logits_T: Tensor, base_temperature: Temperature) -> Tensor:
        if logits_S.shape != logits_T.shape:
            raise ValueError(
                f"temperature schedule flsw: student logits {tuple(logits_S.shape)}, teacher "
                f"logits {tuple(logits_T.shape)}; the shapes must be equal"
            )
        logits_S, logits_T = _at_least_float32(logits_S), _at_least_float32(logits_T)
        unit_S = logits_S / (logits_S.norm(dim=-1, keepdim=True) + eps)
        unit_T = logits_T / (logits_T.norm(dim=-1, keepdim=True) + eps)
        # Rounding may push the cosine past 1, where a fractional power would be NaN.
        disagreement = (1 - (unit_S * unit_T).sum(-1)).clamp_min(0) ** gamma
        return base_temperature + beta * (disagreement.mean() - disagreement)

    return schedule


@takes_parameters
def cwsm_temperature(beta: float) -> TemperatureSchedule:
    """Build confidence-weighted sample mining: a higher temperature where S is confident.

    The schedule takes logits (B,C) or (B,L,C) and returns temperatures (B,) or (B,L):
    base + beta * (mean(w) - w), where w = 1 / (max_c softmax(S) + 1e-3); the teacher is not
    used. No gradient, and the mean is over the given tensor. With a thousand classes w is in
    the hundreds, so temperatures are often <= 0: see `clamp_temperature`.
    Source: TextBrewer's `cwsm`, whose numbers these are.
    """

    @torch.no_grad()
    def schedule(logits_S: Tensor, logits_T: Tensor, base_temperature: Temperature) -> Tensor:
        confidence = _at_least_float32(logits_S).softmax(-1).amax(-1)
        doubt = 1 / (confidence + 1e-3)
        return base_temperature + beta * (doubt.mean() - doubt)

    return schedule


def clamp_temperature(temperature: Temperature, floor: float) -> tuple[Tensor, Tensor]:
    """Return `temperature` raised to at least `floor`, and how many entries that changed.

    temperature: a number or a tensor of any shape; the result has its shape. The count is a
    0-dim integer tensor on the same device, so that reading it is the caller's choice.
    Raises ValueError unless floor > 0.
    """
    if not floor > 0:
        raise ValueError(f"temperature floor {floor}: must be above 0")
    temperature = torch.as_tensor(temperature)
    if not temperature.is_floating_point():
        temperature = temperature.to(torch.float32)
    return temperature.clamp_min(floor), (temperature < floor).sum()


def _at_least_float32(logits: Tensor) -> Tensor:
    return logits.to(torch.promote_types(logits.dtype, torch.float32))


WEIGHT_SCHEDULER = ScheduleRegistry(
    "weight schedule", {"linear_decay": linear_decay, "linear_growth": linear_growth}
)
TEMPERATURE_SCHEDULER = ScheduleRegistry(
    "temperature schedule",
    {"constant": constant_temperature, "flsw": flsw_temperature, "cwsm": cwsm_temperature},
)
