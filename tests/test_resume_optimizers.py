"""Every optimizer and schedule resumes bit-equal; steps that the device skips change nothing."""

import copy
import io
import itertools
import warnings
from types import SimpleNamespace
from typing import Any

import pytest
import timm.optim
import torch
from test_optim import make
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from base.errors import UserError
from training import optim, optimizer_step

CPU, GPU = torch.device("cpu"), torch.device("cuda")
NAMES = timm.optim.list_optimizers(exclude_filters=["bnb*", "fused*", "adahessian", "kron*"])
MULTI_TENSOR = [name for name in NAMES if "foreach" in optim.default_options(name, GPU, 0.9)]


class Net(nn.Module):
    """Has a convolution, a matrix that Adafactor factors, a norm, and a token."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv, self.embed = nn.Conv2d(3, 4, 2), nn.Linear(4, 130)
        self.wide, self.norm = nn.Linear(130, 129), nn.LayerNorm(129)
        self.head, self.token = nn.Linear(129, 2), nn.Parameter(torch.randn(1, 1, 129))

    def forward(self, images: Tensor) -> Tensor:
        hidden = self.wide(self.embed(self.conv(images).mean((2, 3))))
        return self.head(self.norm(hidden) + self.token[0])


def create(name: str, **options: Any) -> tuple[Net, torch.optim.Optimizer]:
    net = Net()
    options = optim.default_options(name, CPU, 0.9) | options
    optimizer = timm.optim.create_optimizer_v2(
        net, opt=name, lr=0.01, weight_decay=0.05, momentum=0.9, **options
    )
    return net, optimizer


def set_gradients(net: nn.Module, number: int) -> None:
    generator = torch.Generator().manual_seed(number)
    net.zero_grad()
    net(torch.randn(5, 3, 4, 4, generator=generator)).square().mean().backward()


def train(net: nn.Module, optimizer: torch.optim.Optimizer, numbers: range) -> None:
    for number in numbers:
        set_gradients(net, number)
        torch.manual_seed(number)
        optimizer.step()


def through_a_file(content: Any) -> Any:
    file = io.BytesIO()
    torch.save(content, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def equal(one: nn.Module, other: nn.Module) -> bool:
    return all(torch.equal(*pair) for pair in zip(one.parameters(), other.parameters()))


@pytest.mark.parametrize("name", [*NAMES, "lookahead_adamw", "lookahead_lamb"])
def test_an_optimizer_resumes_bit_equal(name: str) -> None:
    whole, optimizer = create(name)
    train(whole, optimizer, range(3))
    saved = through_a_file([whole.state_dict(), optimizer.state_dict()])
    train(whole, optimizer, range(3, 6))
    resumed, again = create(name)
    resumed.load_state_dict(saved[0])
    optim.load_optimizer_state(again, saved[1])
    train(resumed, again, range(3, 6))
    assert equal(whole, resumed)


def test_an_optimizer_of_second_order_is_refused_with_the_reason() -> None:
    with pytest.raises(UserError, match="needs second derivatives"):
        make("--opt", "adahessian")


@pytest.mark.parametrize("name", ["sgd", "sgdw", "momentum", "nesterov"])
def test_sgd_without_momentum_trains(name: str) -> None:
    _, student, optimizer, _ = make("--opt", name, "--momentum", "0")
    student.network.head.weight.grad = torch.ones_like(student.network.head.weight)
    optimizer.step()
    assert optimizer.defaults["momentum"] == 0


# ---- the implementation comes from this run

KERNELS: list[dict[str, Any]] = [
    {"fused": None, "foreach": None},
    {"fused": True, "foreach": None},
    {"fused": False, "foreach": True},
    {"fused": False, "foreach": False, "differentiable": False, "capturable": False},
]


@pytest.mark.parametrize("scaler", [False, True])
@pytest.mark.parametrize(("before", "now"), list(itertools.product(KERNELS, KERNELS)))
def test_adamw_resumes_from_a_state_of_any_implementation(
    before: dict, now: dict, scaler: bool
) -> None:
    net, optimizer = create("adamw", **before)
    train(net, optimizer, range(3))
    saved = through_a_file([net.state_dict(), optimizer.state_dict()])
    resumed, again = create("adamw", **now)
    resumed.load_state_dict(saved[0])
    optim.load_optimizer_state(again, saved[1])
    for group in again.param_groups:
        assert group["fused"] == now["fused"] and group["foreach"] == now["foreach"]
    set_gradients(net, 3)
    set_gradients(resumed, 3)
    optimizer.step()
    if scaler:
        scale = torch.amp.GradScaler("cpu", init_scale=4.0)
        scale.scale(torch.ones(()))
        for parameter in resumed.parameters():
            parameter.grad *= 4
        scale.unscale_(again)
        scale.step(again)
        scale.update()
    else:
        again.step()
    for one, other in zip(net.parameters(), resumed.parameters()):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)
    assert {float(state["step"]) for state in again.state.values()} == {4.0}


def test_deits_file_with_whole_numbers_as_steps_resumes_fused() -> None:
    """torch of DeiT's time wrote `step` as an int, and no implementation."""
    net, optimizer = create("adamw", fused=False)
    train(net, optimizer, range(2))
    saved = copy.deepcopy(optimizer.state_dict())
    for state in saved["state"].values():
        state["step"] = int(state["step"])
    for group in saved["param_groups"]:
        for key in (*optim.IMPLEMENTATION, "maximize", "decoupled_weight_decay"):
            group.pop(key, None)
    resumed, again = create("adamw")
    resumed.load_state_dict(net.state_dict())
    optim.load_optimizer_state(again, through_a_file(saved))
    train(net, optimizer, range(2, 4))
    train(resumed, again, range(2, 4))
    for one, other in zip(net.parameters(), resumed.parameters()):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda s: s["state"][0].pop("exp_avg"), "exp_avg of parameter 0 is missing"),
        (lambda s: s["state"][0].update(exp_avg=torch.zeros(3)), r"a tensor of shape \(3,\), not"),
        (lambda s: s["state"][0].update(colour=1), "colour of parameter 0 is a number"),
        (lambda s: s["state"][0]["exp_avg_sq"].fill_(torch.nan), "contains NaN"),
        (lambda s: s["state"].update({99: {"step": 1}}), "state of parameter 99"),
        (lambda s: s["param_groups"][0].update(lr="fast"), "lr of a parameter group is 'fast'"),
    ],
)
def test_a_state_that_is_not_this_optimizers_is_refused_with_the_reason(
    change: Any, words: str
) -> None:
    net, optimizer = create("adamw")
    train(net, optimizer, range(2))
    saved = copy.deepcopy(optimizer.state_dict())
    change(saved)
    with pytest.raises(ValueError, match=words):
        optim.load_optimizer_state(create("adamw")[1], saved)


# ---- schedules

SCHEDULES = [
    [flag, *noise]
    for flag in (
        "--sched=cosine", "--sched=tanh", "--sched=step", "--sched=constant", "--sched=multistep",
        "--sched=poly", "--sched=wsd", "--sched=rsqrt", "--sched=plateau",
    )
    for noise in ([], ["--lr-noise", "0.1"], ["--lr-noise", "0.2", "0.6"])
]  # fmt: skip


@pytest.mark.parametrize("flags", SCHEDULES, ids=" ".join)
@pytest.mark.parametrize("per_update", [True, False])
def test_a_schedule_resumes_with_the_same_rates(flags: list[str], per_update: bool) -> None:
    flags = [*flags, "--decay-epochs", "2", "--patience-epochs", "1", "--warmup-epochs", "1"]
    flags.append(
        "--sched-on-updates"
        if per_update and "plateau" not in flags[0]
        else "--no-sched-on-updates"
    )

    def epoch(schedule: optim.Schedule, number: int) -> list[float]:
        rates = []
        for update in range(3):
            schedule.step(3 * number + update, number)
            rates.append([group["lr"] for group in schedule.scheduler.optimizer.param_groups])
        schedule.end_epoch(number, 50.0)
        return rates

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        args, _, optimizer, _ = make(*flags)
        schedule = optim.build_schedule(args, optimizer, 3)
        for number in range(6):
            epoch(schedule, number)
        saved = through_a_file([optimizer.state_dict(), schedule.state_dict()])
        args, _, again, _ = make(*flags)
        resumed = optim.build_schedule(args, again, 3)
    optim.load_optimizer_state(again, saved[0])
    resumed.load_state_dict(saved[1])
    for number in range(6, 10):
        assert epoch(schedule, number) == epoch(resumed, number), number


# ---- skipped on the device


class Counted(TorchDispatchMode):
    """Counts operators by name, and reads of device values by the host."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []
        self.reads = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = str(func.overloadpacket).partition(".")[2]
        self.names.append(name)
        on_device = any(isinstance(a, Tensor) and a.device.type == "cuda" for a in args)
        self.reads += name in ("_local_scalar_dense", "nonzero", "equal") and on_device
        return func(*args, **(kwargs or {}))


@pytest.fixture
def host_copy(monkeypatch: pytest.MonkeyPatch) -> None:
    """Replaces the copy to pinned memory, which needs a GPU."""

    class Copy:
        def __init__(self, value: Tensor) -> None:
            self.flag = value.clone()

        def value(self) -> bool:
            return bool(self.flag)

    monkeypatch.setattr(optimizer_step, "HostCopy", Copy)


def snapshot(net: nn.Module, optimizer: torch.optim.Optimizer) -> Any:
    saved = copy.deepcopy(optimizer.state_dict())
    saved["state"] = {index: state for index, state in saved["state"].items() if state}
    return copy.deepcopy(net.state_dict()), saved


def assert_same(one: Any, other: Any) -> None:
    if isinstance(one, Tensor):
        assert torch.equal(one, other)
    elif isinstance(one, dict):
        assert one.keys() == other.keys()
        for key in one:
            assert_same(one[key], other[key])
    elif isinstance(one, list | tuple):
        assert len(one) == len(other)
        for pair in zip(one, other):
            assert_same(*pair)
    else:
        assert one == other


@pytest.mark.parametrize("name", MULTI_TENSOR)
def test_a_step_skipped_on_the_device_changes_nothing(name: str, host_copy: None) -> None:
    net, optimizer = create(name, foreach=True)
    plain, reference = create(name, foreach=True)
    optimizer_step.SkipOnDevice(optimizer)

    def step(number: int, skip: bool) -> None:
        set_gradients(net, number)
        if skip:
            next(net.parameters()).grad[0] = torch.nan
            list(net.parameters())[1].grad[0] = torch.inf
        optimizer.found_inf = torch.tensor(float(skip))
        optimizer.step()
        del optimizer.found_inf

    numbers = [(0, True), (1, False), (2, True), (3, True), (4, False), (5, False), (6, True)]
    for number, skip in numbers:
        before = snapshot(net, optimizer)
        for group in optimizer.param_groups:
            group["lr"] = 0.01 / (number + 1)  # as a schedule does: it is not restored
        step(number, skip)
        if skip:
            after = snapshot(net, optimizer)
            for group in before[1]["param_groups"]:
                group["lr"] = 0.01 / (number + 1)
            assert_same(before, after)
        else:
            for group in reference.param_groups:
                group["lr"] = 0.01 / (number + 1)
            set_gradients(plain, number)
            reference.step()
            assert equal(net, plain)


@pytest.mark.parametrize("name", ["lamb", "sgd", "lion"])
def test_a_multi_tensor_step_on_a_gpu_reads_nothing_back(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    class NoCopy:
        def __init__(self, value: Tensor) -> None:
            pass

        def value(self) -> bool:
            return False

    monkeypatch.setattr(optimizer_step, "HostCopy", NoCopy)
    card = SimpleNamespace(L2_cache_size=50 * 2**20, total_memory=80 * 2**30)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda *_: card)
    counts = []
    with FakeTensorMode(allow_non_fake_inputs=True):
        for width in (4, 40):
            layers = [nn.Parameter(torch.empty(5, 7, device="cuda")) for _ in range(width)]
            options = optim.default_options(name, torch.device("cuda"), 0.9)
            assert options["foreach"]
            optimizer = timm.optim.create_optimizer_v2(
                layers, opt=name, lr=0.1, weight_decay=0.1, momentum=0.9, **options
            )
            optimizer_step.SkipOnDevice(optimizer)
            for layer in layers:
                layer.grad = torch.empty_like(layer)
            optimizer.step()  # creates the state
            optimizer.found_inf = torch.zeros((), device="cuda")
            with Counted() as counted:
                optimizer.step()
            assert counted.reads == 0
            counts.append([n for n in counted.names if n.startswith("_foreach")])
    assert counts[0] == counts[1], "as many kernels for ten times the parameters"


def test_lamb_on_several_tensors_has_timms_update_rule() -> None:
    plain, reference = create("lamb", foreach=False)
    several, optimizer = create("lamb", foreach=True)
    train(plain, reference, range(5))
    train(several, optimizer, range(5))
    for one, other in zip(plain.parameters(), several.parameters()):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-6)
