"""No step and no evaluated batch makes the host wait for the device.

The step runs on fake CUDA tensors, without a GPU: forward pass, loss and update. The backward pass
is not supported there, so gradients are made up.
"""

import traceback
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import yaml
from PIL import Image
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode
from torch._subclasses.fake_tensor import DynamicOutputShapeException
from torch.utils._python_dispatch import TorchDispatchMode

import engine
import losses
import models
import options
from base.device import to_device
from data.byte_batches import DeferNormalize, PendingImages, collate_bytes
from data.device_augment import constant
from data.samplers import BatchKey
from data.transforms import InputConfig, build_mixup, eval_transform
from distill import objective
from distill.teacher import InputAdapter, Teacher
from matching import PROJ_MAP, TWO_LAYERS
from training import optim, optimizer_step
from training.state import EpochState
from training.step_config import StepConfig
from training.updater import Updater

ROOT = Path(__file__).resolve().parents[1]
CUDA, CLASSES, VIT = torch.device("cuda"), 10, "deit_pico_distilled_patch4_32"
# Operators that return a number or a size to the host
READS = {
    "_local_scalar_dense",
    "_unique2",
    "equal",
    "is_nonzero",
    "masked_select",
    "nonzero",
    "repeat_interleave",
    "unique_consecutive",
    "unique_dim",
}


class HostWaits(TorchDispatchMode):
    """Collects the operators for which the host waits for the device."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None):
        kwargs = kwargs or {}
        name = function.overloadpacket.__name__
        tensors = [x for x in torch.utils._pytree.tree_leaves((args, kwargs)) if is_on_cuda(x)]
        if name in READS and tensors:
            self.add(name)
        if name == "_local_scalar_dense" and tensors:  # a fake tensor has no value to return
            return 0.0 if args[0].is_floating_point() else 0
        output = function(*args, **kwargs)
        if name == "_to_copy":
            self.check_copy(name, args[0], output, kwargs.get("non_blocking", False))
        elif name == "copy_":
            non_blocking = kwargs.get("non_blocking", len(args) > 2 and args[2])
            self.check_copy(name, args[1], args[0], non_blocking)
        return output

    def check_copy(self, name: str, source: Tensor, target: Tensor, non_blocking: bool) -> None:
        if source.device.type != target.device.type and not non_blocking:
            self.add(f"{name} from {source.device.type} to {target.device.type}")

    def add(self, what: str) -> None:
        """Note an operator, with the last line of the repository that leads to it."""
        frames = [frame for frame in traceback.extract_stack() if frame.filename != __file__]
        ours = [f for f in frames if ROOT in Path(f.filename).parents and ".venv" not in f.filename]
        where = f", {Path(ours[-1].filename).name}:{ours[-1].lineno}" if ours else ""
        self.found.append(what + where)


def is_on_cuda(value: Any) -> bool:
    return isinstance(value, Tensor) and value.device.type == "cuda"


def to_fake_cuda(module: nn.Module) -> nn.Module:
    """Replace parameters and buffers by fake ones on a GPU. Call it under a FakeTensorMode."""
    for part in module.modules():
        for name, value in part._parameters.items():
            if value is not None:
                new = torch.empty(value.shape, dtype=value.dtype, device=CUDA)
                part._parameters[name] = nn.Parameter(new, requires_grad=value.requires_grad)
        for name, value in part._buffers.items():
            if value is not None:
                part._buffers[name] = torch.empty(value.shape, dtype=value.dtype, device=CUDA)
    return module


@contextmanager
def fake_run(*flags: str) -> Iterator[tuple[models.Student, nn.Module, Teacher, StepConfig, Any]]:
    """Yield (student, criterion, teacher, step config, optimizer) of a command on a fake GPU."""
    args = options.parse_args(["--model", VIT, *flags]).args
    inputs = models.build_input_config(args)
    student = models.build_student(args, CLASSES, inputs)
    network_T = models.create_model(VIT, num_classes=CLASSES)
    teacher = Teacher(network_T, InputAdapter(inputs, inputs))
    criterion = objective.build_objective(
        args, student, teacher, mixing=True, input_size=inputs.input_size, total_updates=9
    )
    ema = optim.build_ema(args, student.network)
    with FakeTensorMode(allow_non_fake_inputs=True):
        for module in (student, teacher, ema.module):
            to_fake_cuda(module)
        optimizer, _ = optim.build_optimizer(args, student, 1)
        config = StepConfig(
            mixup_fn=build_mixup(args, CLASSES),
            schedule=optim.build_schedule(args, optimizer, 3, criterion.at_update),
            update_ema=partial(ema.update, student.network),
            max_norm=1.0,
        )
        yield student, criterion, teacher, config, optimizer


class Unused:
    """Stands for a copy to pinned memory, whose event needs a GPU. No update is skipped here."""

    def __init__(self, value: Tensor) -> None:
        pass

    def value(self) -> bool:
        return False


def waits_of_a_step(*flags: str) -> list[str]:
    """Return the host waits of the second step; the first one creates optimizer state."""
    with fake_run(*flags) as (student, criterion, teacher, config, optimizer):
        state, waits = EpochState(CUDA), HostWaits()
        updater = Updater(student, optimizer, config, state.bad, epoch=0, micro_steps=2)
        student.train()
        for step in range(2):
            waits.found.clear()
            key = BatchKey(0, step)
            images, labels = torch.randn(4, 3, 32, 32), torch.zeros(4, dtype=torch.long)
            with waits:
                images, labels = to_device(images, CUDA), to_device(labels, CUDA)
                *batch, outputs_T = engine.mix_and_query(images, labels, key, teacher, config)
                with updater.micro_step(step):
                    loss = engine.compute_loss(student, criterion, (*batch, outputs_T), key, config)
                state.bad.add_loss(loss)
                state.add({"loss": loss.detach(), **criterion.terms})
            for parameter in student.parameters():
                parameter.grad = torch.zeros_like(parameter)
            with waits:
                state.end_update(step, updater.step(step))
    return waits.found


def match_of(loss: str) -> str:
    """Return a --match with a loss of the registry."""
    if loss.startswith("attention_"):
        return f"layer_S=1,layer_T=2,feature=attention,loss={loss}"
    layers = "layer_S=1+2,layer_T=1+3" if loss in TWO_LAYERS else "layer_S=2,layer_T=3"
    return f"{layers},feature=hidden,loss={loss}"


NO_LOGITS, SOFT = "--distillation-type none", "--distillation-type soft"
HIDDEN = f"{NO_LOGITS} --match {match_of('hidden_mse')},tokens=patch,proj="
OBJECTIVES = {
    "none": NO_LOGITS,
    "bce": f"{NO_LOGITS} --bce-loss",
    "soft": SOFT,
    "hard": "--distillation-type hard",
    "ranking": f"{NO_LOGITS} --ranking-kl-weight 1",
    "pooled": f"{SOFT} --match layer_S=0,layer_T=0,feature=pooled,loss=vkd",
    "weight schedule": f"{SOFT} --kd-loss-weight-scheduler linear_decay",
    **{loss: f"{NO_LOGITS} --match {match_of(loss)}" for loss in losses.MATCH_LOSS_MAP},
    **{f"kd {loss}": f"{SOFT} --kd-loss-type {loss}" for loss in losses.KD_LOSS_MAP},
    **{f"proj {name}": HIDDEN + name for name in PROJ_MAP if name != "orthogonal"},
}


@pytest.mark.parametrize("flags", OBJECTIVES.values(), ids=OBJECTIVES)
def test_a_step_makes_the_host_wait_for_nothing(flags: str) -> None:
    assert waits_of_a_step(*flags.split()) == []


@pytest.mark.parametrize("scheduler", ["flsw", "cwsm"])
def test_temperature_schedules_make_the_host_wait_for_nothing(scheduler: str, tmp_path) -> None:
    parameters = {"flsw": ["flsw", 1.0, 1.0], "cwsm": ["cwsm", 1.0]}[scheduler]
    config = tmp_path / "distill.yaml"
    config.write_text(f"kd_loss_type: ce\ntemperature_scheduler: {parameters}\n")
    found = waits_of_a_step("--distillation-type", "soft", "--distill-config", str(config))
    assert found == []


RECIPES = [yaml.safe_load(path.read_text()) for path in (ROOT / "recipes").glob("*.yaml")]
OPTIMIZERS = sorted({recipe["flags"].get("opt", "adamw") for recipe in RECIPES})


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_an_update_makes_the_host_wait_for_nothing(optimizer: str, monkeypatch) -> None:
    monkeypatch.setattr(optimizer_step, "HostCopy", Unused)
    gpu = SimpleNamespace(L2_cache_size=50 * 2**20, total_memory=80 * 2**30, major=9, minor=0)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device=None: gpu)
    assert waits_of_a_step("--distillation-type", "none", "--opt", optimizer) == []


def test_an_evaluated_batch_makes_the_host_wait_for_nothing() -> None:
    deferred = DeferNormalize(eval_transform(InputConfig((32, 32), (0.5,) * 3, (0.2,) * 3)))
    image = Image.new("RGB", (32, 32))
    batch = PendingImages(collate_bytes([(deferred(image), 0)] * 4), deferred)
    with fake_run("--distillation-type", "none") as (student, *_):
        present = torch.arange(2).to(CUDA)
        batch.to(CUDA)  # mean and std go there once
        with HostWaits() as waits:
            labels = to_device(batch.batch.labels, CUDA)
            engine.batch_scores(student.network.eval()(batch.to(CUDA)), labels, present)
    constant.cache_clear()  # of fake tensors
    assert waits.found == []


@pytest.mark.parametrize(
    "wait",
    [
        lambda x: x.sum().item(),
        lambda x: x.nonzero(),
        lambda x: x.cpu(),
        lambda x: torch.tensor([1.0], device=CUDA),
        lambda x: x.copy_(torch.zeros(2)),
        lambda x: bool((x > 0).any()),
        lambda x: x.new_tensor(1),
    ],
)
def test_every_kind_of_wait_is_found(wait: Any) -> None:
    with FakeTensorMode(allow_non_fake_inputs=True):
        values = torch.zeros(2, device=CUDA)
        with suppress(DynamicOutputShapeException), HostWaits() as waits:
            wait(values)
    assert waits.found
