"""Optimizer steps that the device itself can skip, so that the host does not wait for it."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

INTEGER_OF_SIZE = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
Entry = tuple[Any, Any, Any]  # owner (a parameter group, a state, a list), key, value


class SkipOnDevice:
    """Gives a multi-tensor optimizer torch's protocol of fused ones.

    If `optimizer.found_inf` (0-dim, on the device) is set and not zero, `optimizer.step()` changes
    no weight, no optimizer state and no step counter. GradScaler uses the same attribute.

    The step runs, and the old values are selected afterwards on the device. Counters that the
    optimizer keeps on the host are restored before the next step or `state_dict()`; the flag has
    been computed by then. Only a step that creates optimizer state waits for the flag.
    """

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self.optimizer = optimizer
        self._found_inf: Tensor | None = None
        self._old: list[Entry] = []  # copies of what is on the device
        self._counters: list[Entry] = []  # and on the host
        self._keys: set[tuple[int, Any]] = set()
        self._pending: tuple[HostCopy, list[Entry]] | None = None
        optimizer.register_step_pre_hook(lambda *_: self._before())
        optimizer.register_step_post_hook(lambda *_: self._after())
        optimizer.register_state_dict_pre_hook(lambda _: self.settle())
        optimizer._step_supports_amp_scaling = True  # type: ignore[attr-defined]

    @torch.no_grad()
    def _before(self) -> None:
        self.settle()
        # torch's own optimizers refuse the attributes if they are not fused
        self._found_inf = vars(self.optimizer).pop("found_inf", None)
        if vars(self.optimizer).pop("grad_scale", None) is not None:
            raise RuntimeError("call GradScaler.unscale_() before the step")
        if self._found_inf is None:
            return
        entries = list(self._device_entries())
        values = [value for _, _, value in entries]
        copies = [torch.empty_like(value) for value in values]
        for to, from_ in _by_dtype(copies, values):
            torch._foreach_copy_(to, from_)
        self._old = [(owner, key, old) for (owner, key, _), old in zip(entries, copies)]
        self._counters = [(owner, key, _copy(value)) for owner, key, value in self._host_entries()]
        self._keys = {(id(owner), key) for owner in self._owners() for key in owner}

    @torch.no_grad()
    def _after(self) -> None:
        if self._found_inf is None:
            return
        skip = self._found_inf > 0
        # Bit patterns are selected, as integers: this is exact, and NaN does not spread.
        new = [owner[key] for owner, key, _ in self._old]  # the step may have replaced tensors
        for new_bits, old_bits in _by_dtype(_bits(new), _bits([old for _, _, old in self._old])):
            torch._foreach_sub_(new_bits, old_bits)
            torch._foreach_mul_(new_bits, (~skip).to(new_bits[0].dtype))
            torch._foreach_add_(new_bits, old_bits)
        changed = [entry for entry in self._counters if _differs(entry[0][entry[1]], entry[2])]
        created = [
            (owner, key)
            for owner in self._owners()
            for key in owner
            if (id(owner), key) not in self._keys
        ]
        if created and skip.item():
            for owner, key in created:
                del owner[key]
            _restore(changed)
        elif changed and not created:
            self._pending = HostCopy(skip), changed
        self.optimizer.found_inf, self.optimizer.grad_scale = self._found_inf, None  # type: ignore[attr-defined]
        self._old, self._counters, self._found_inf = [], [], None

    def settle(self) -> None:
        """Restore the counters on the host if the last step was skipped."""
        if self._pending is None:
            return
        flag, counters = self._pending
        self._pending = None
        if flag.value():
            _restore(counters)

    def _owners(self) -> Iterator[dict]:
        """Yield every parameter group, and the state of every parameter that has a gradient."""
        for group in self.optimizer.param_groups:
            yield group
            for parameter in group["params"]:
                if parameter.grad is not None and parameter in self.optimizer.state:
                    yield self.optimizer.state[parameter]

    def _device_entries(self) -> Iterator[Entry]:
        for group in self.optimizer.param_groups:
            parameters = [p for p in group["params"] if p.grad is not None]
            for i, parameter in enumerate(parameters):
                yield parameters, i, parameter
                state = self.optimizer.state.get(parameter, {})
                for key, value in state.items():
                    if isinstance(value, Tensor) and value.device == parameter.device:
                        yield state, key, value

    def _host_entries(self) -> Iterator[Entry]:
        device = self.optimizer.param_groups[0]["params"][0].device
        for owner in self._owners():
            for key, value in owner.items():
                if isinstance(value, Tensor):
                    if value.device != device or "params" in owner:
                        yield owner, key, value
                elif isinstance(value, int | float):
                    yield owner, key, value


class HostCopy:
    """A copy of one value in the host's memory, made without waiting for the device."""

    def __init__(self, value: Tensor) -> None:
        self._copy = torch.empty((), dtype=value.dtype, pin_memory=True)
        self._copy.copy_(value, non_blocking=True)
        self._ready = torch.cuda.Event()
        self._ready.record()

    def value(self) -> Any:
        """Return the value; wait for it if it is not there yet."""
        self._ready.synchronize()
        return self._copy.item()


def _restore(entries: list[Entry]) -> None:
    for owner, key, value in entries:
        owner[key] = value


def _bits(tensors: list[Tensor]) -> list[Tensor]:
    return [tensor.detach().view(INTEGER_OF_SIZE[tensor.element_size()]) for tensor in tensors]


def _by_dtype(one: list[Tensor], other: list[Tensor]) -> Iterator[tuple[list, list]]:
    """Yield both lists in groups of one dtype, as multi-tensor kernels need them."""
    groups: dict[torch.dtype, tuple[list, list]] = {}
    for first, second in zip(one, other):
        pair = groups.setdefault(first.dtype, ([], []))
        pair[0].append(first)
        pair[1].append(second)
    yield from groups.values()


def _copy(value: Any) -> Any:
    return value.clone() if isinstance(value, Tensor) else value


def _differs(new: Any, old: Any) -> bool:
    return not torch.equal(new, old) if isinstance(new, Tensor) else new != old
