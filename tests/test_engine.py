"""One pass over a loader: exact evaluation, accumulation, non-finite losses, the teacher's door."""

import math
from functools import partial

import pytest
import timm
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import engine
import models
from base import distributed
from base.errors import UserError
from losses import DistillationLoss
from training import optim
from training.state import EpochState
from training.step_config import Hooks, StepConfig

CPU = torch.device("cpu")


class TwoHeads(nn.Module):
    """A student of one linear layer a head; `.network` as the module that trains has it."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.network = self
        self.cls, self.dist = nn.Linear(12, 4), nn.Linear(12, 4)

    def forward(self, images: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        flat = images.flatten(1)
        if self.training:
            return self.cls(flat), self.dist(flat)
        return (self.cls(flat) + self.dist(flat)) / 2

    def __setattr__(self, name: str, value: object) -> None:
        if name == "network":
            object.__setattr__(self, name, value)
        else:
            super().__setattr__(name, value)


class Loader(list):
    """Batches in a list."""


def batches(sizes: tuple[int, ...], seed: int = 0) -> Loader:
    generator = torch.Generator().manual_seed(seed)
    return Loader(
        (torch.randn(n, 3, 2, 2, generator=generator), torch.arange(n) % 4) for n in sizes
    )


def plain() -> DistillationLoss:
    return DistillationLoss(nn.CrossEntropyLoss(), None, "none", 0.5, 1.0)


def train(
    model: nn.Module,
    loader: Loader,
    *,
    criterion: nn.Module | None = None,
    teacher: object = None,
    state: EpochState | None = None,
    **settings: object,
) -> dict[str, float]:
    """Train one epoch by SGD. settings: of `StepConfig`."""
    return engine.train_one_epoch(
        model,
        criterion or plain(),
        loader,
        torch.optim.SGD(model.parameters(), lr=0.1),
        CPU,
        0,
        teacher=teacher,
        config=StepConfig(**settings),
        state=state,
    )


def test_evaluation_weighs_images_and_not_batches() -> None:
    model = TwoHeads().eval()
    loader = batches((5, 2, 1))
    stats = engine.evaluate(loader, model, torch.device("cpu"))
    images = torch.cat([images for images, _ in loader])
    labels = torch.cat([labels for _, labels in loader])
    logits = model(images)
    assert stats["count"] == 8
    assert stats["loss"] == pytest.approx(nn.functional.cross_entropy(logits, labels).item())
    assert stats["acc1"] == pytest.approx(100 * (logits.argmax(1) == labels).float().mean().item())
    assert stats["acc5"] == 100  # four classes: all of them are among the first five


def test_evaluation_leaves_the_models_mode_as_it_was() -> None:
    model = TwoHeads().train()
    engine.evaluate(batches((2,)), model, torch.device("cpu"))
    assert model.training


def test_an_empty_evaluation_set_is_one_line() -> None:
    with pytest.raises(UserError, match="empty"):
        engine.evaluate(Loader(), TwoHeads(), torch.device("cpu"))


def test_two_micro_steps_of_three_equal_one_step_of_six() -> None:
    together, apart = TwoHeads(), TwoHeads()
    (images, labels) = batches((6,))[0]
    train(together, Loader([(images, labels)]))
    train(apart, Loader([(images[:3], labels[:3]), (images[3:], labels[3:])]), accum_steps=2)
    for a, b in zip(together.parameters(), apart.parameters()):
        torch.testing.assert_close(a, b)


def test_a_last_group_of_fewer_micro_steps_is_averaged_over_what_is_there() -> None:
    model, by_hand = TwoHeads(), TwoHeads()
    loader = batches((2, 2, 2))
    train(model, loader, accum_steps=2)
    first = Loader(
        [(torch.cat([loader[0][0], loader[1][0]]), torch.cat([loader[0][1], loader[1][1]]))]
    )
    train(by_hand, first)
    train(by_hand, Loader([loader[2]]))
    torch.testing.assert_close(model.cls.weight, by_hand.cls.weight)


def test_a_bad_update_is_skipped_and_counted_and_the_next_one_counts_from_zero() -> None:
    model = TwoHeads()
    loader = batches((3, 3, 3))
    loader[1][0][0, 0, 0, 0] = math.nan
    stats = train(model, loader, max_bad_steps=2)
    assert stats["skipped_updates"] == 1
    assert all(torch.isfinite(p).all() for p in model.parameters())


def test_a_skipped_update_leaves_the_weights_alone() -> None:
    model = TwoHeads()
    before = [p.clone() for p in model.parameters()]
    loader = batches((3,))
    loader[0][0][0, 0, 0, 0] = math.inf
    train(model, loader, max_bad_steps=5)
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters()))


def test_too_many_bad_updates_in_a_row_end_the_run_in_one_line() -> None:
    loader = batches((3, 3, 3))
    for images, _ in loader:
        images[0] = math.nan
    with pytest.raises(UserError, match="3 updates in a row"):
        train(TwoHeads(), loader, max_bad_steps=3)


def test_the_teachers_logits_reach_the_loss_and_no_gradient_reaches_the_teacher() -> None:
    teacher = nn.Linear(12, 4)
    criterion = DistillationLoss(nn.CrossEntropyLoss(), None, "hard", 1.0, 1.0)
    model = TwoHeads()
    before = model.cls.weight.clone()
    train(model, batches((4,)), criterion=criterion, teacher=lambda x, key: teacher(x.flatten(1)))
    assert teacher.weight.grad is None
    assert torch.equal(model.cls.weight, before), "alpha 1 leaves the class head alone"
    assert set(criterion.terms) == {"base", "distillation"}


def test_a_plain_timm_model_learns_from_a_loss_that_owns_its_teacher() -> None:
    student = timm.create_model("resnet10t", num_classes=4)
    teacher = timm.create_model("resnet10t", num_classes=4).eval()
    criterion = DistillationLoss(nn.CrossEntropyLoss(), teacher, "soft", 0.5, 3.0, head="cls")
    optimizer = torch.optim.AdamW(student.parameters())
    loader = Loader((torch.randn(2, 3, 32, 32), torch.tensor([0, 3])) for _ in range(2))
    before = {name: value.clone() for name, value in teacher.state_dict().items()}
    stats = engine.train_one_epoch(student, criterion, loader, optimizer, CPU, 0)
    assert {"loss", "base", "distillation", "grad_norm", "lr"} <= set(stats)
    assert all(torch.equal(value, before[name]) for name, value in teacher.state_dict().items())
    assert engine.evaluate(loader, student, CPU)["count"] == 4


def test_the_randomness_of_a_step_is_a_function_of_its_place() -> None:
    engine.seed_step(0, "step", 1, 2, 0)
    first = torch.rand(3)
    torch.rand(7)
    engine.seed_step(0, "step", 1, 2, 0)
    assert torch.equal(first, torch.rand(3))
    engine.seed_step(0, "step", 1, 2, 1)
    assert not torch.equal(first, torch.rand(3))


def test_clipping_bounds_the_norm_of_the_whole_update() -> None:
    model, free = TwoHeads(), TwoHeads()
    before = torch.cat([p.detach().flatten() for p in model.parameters()])
    loader = batches((4,))
    loader[0][0].mul_(100)
    train(model, loader, max_norm=0.5)
    train(free, loader)
    moved = torch.cat([p.detach().flatten() for p in model.parameters()]) - before
    assert moved.norm() == pytest.approx(0.1 * 0.5, rel=1e-4)
    assert (torch.cat([p.detach().flatten() for p in free.parameters()]) - before).norm() > 1


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_trains_on_a_cpu(dtype: torch.dtype) -> None:
    model = TwoHeads()
    scaler = torch.amp.GradScaler("cpu", init_scale=16.0) if dtype == torch.float16 else None
    before = model.cls.weight.clone()
    stats = train(model, batches((4, 4)), amp_dtype=dtype, loss_scaler=scaler)
    assert math.isfinite(stats["loss"]) and not torch.equal(before, model.cls.weight)
    assert model.cls.weight.dtype == torch.float32


def test_bad_updates_are_counted_in_a_row_over_short_epochs_too() -> None:
    loader = batches((3, 3))
    for images, _ in loader:
        images[0] = math.nan
    state, model = EpochState(CPU), TwoHeads()
    assert train(model, loader, max_bad_steps=3, state=state)["skipped_updates"] == 2
    state.reset()
    with pytest.raises(UserError, match="3 updates in a row"):
        train(model, loader, max_bad_steps=3, state=state)


class WithStatistics(TwoHeads):
    """The same behind a BatchNorm, whose statistics every forward pass changes."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(3)

    def forward(self, images: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        return super().forward(self.norm(images))


@pytest.mark.parametrize("accum_steps", [1, 2])
def test_a_skipped_update_leaves_no_trace_in_batch_norms_statistics(accum_steps: int) -> None:
    good, bad = batches((4, 4, 4, 4)), batches((4, 4), seed=1)[:accum_steps]
    bad[0][0][1, 0, 0, 0] = math.nan  # of two micro-steps in the first alone
    one, other = WithStatistics(), WithStatistics()
    ema = optim.Ema(other, decay=0.5, warmup=False)
    loader = Loader([*good[:2], *bad, *good[2:]])
    stats = train(other, loader, accum_steps=accum_steps, update_ema=partial(ema.update, other))
    train(one, good, accum_steps=accum_steps)
    assert stats["skipped_updates"] == 1
    assert one.norm.num_batches_tracked == 4
    for name, value in one.state_dict().items():
        assert torch.equal(value, other.state_dict()[name]), name
    assert all(value.isfinite().all() for value in ema.state_dict().values())


class Steep(nn.Module):
    """A loss that is finite, and infinitely steep where the first number of a batch is over 50."""

    terms: dict[str, Tensor] = {}

    def forward(self, images: Tensor, outputs: tuple, labels: Tensor, **_: object) -> Tensor:
        zero = (outputs[0] * 0).sum()
        loss = nn.functional.cross_entropy(sum(outputs), labels)
        return loss + zero.sqrt() if images[0, 0, 0, 0] > 50 else loss


def test_a_finite_loss_with_a_bad_gradient_is_skipped_counted_and_told_apart() -> None:
    model, loader = TwoHeads(), batches((3, 3, 3, 3))
    loader[1][0][0, 0, 0, 0] = 99.0
    loader[3][0][0, 0, 0, 0] = 99.0
    stats = train(model, loader, criterion=Steep(), max_bad_steps=2)
    assert stats["skipped_updates"] == 2 and math.isfinite(stats["loss"])
    assert all(p.isfinite().all() for p in model.parameters())
    with pytest.raises(UserError, match="the loss was finite and its gradient was not.*step 1"):
        train(model, loader, criterion=Steep(), max_bad_steps=1, accum_steps=4)


class Endless(Steep):
    """A loss that is infinite there, and no steeper than elsewhere."""

    def forward(self, images: Tensor, outputs: tuple, labels: Tensor, **_: object) -> Tensor:
        loss = nn.functional.cross_entropy(sum(outputs), labels)
        return loss + math.inf if images[0, 0, 0, 0] > 50 else loss


@pytest.mark.parametrize(
    ("scale", "criterion", "counted", "after"),
    [
        (2.0**127, Steep(), 0, 2.0**126),  # overflows because of the scale: the scaler's business
        (1.0, Steep(), 1, 0.5),
        (1.0, Endless(), 1, 0.5),
    ],
)
def test_under_a_loss_scale_an_overflow_is_no_bad_update_and_a_bad_one_is_skipped(
    scale: float, criterion: nn.Module, counted: int, after: float
) -> None:
    model, loader = TwoHeads(), batches((3,))
    before = model.cls.weight.clone()
    loader[0][0][0, 0, 0, 0] = 99.0
    scaler = torch.amp.GradScaler("cpu", init_scale=scale)
    stats = train(model, loader, criterion=criterion, loss_scaler=scaler)
    assert stats["skipped_updates"] == counted and scaler.get_scale() == after
    assert torch.equal(model.cls.weight, before)


class Reads(TorchDispatchMode):
    """Counts how often the host asks the device for a number."""

    counts = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.overloadpacket.__name__
        self.counts += name in ("_local_scalar_dense", "is_nonzero", "nonzero", "equal")
        return function(*args, **(kwargs or {}))


def test_the_host_asks_for_no_number_between_two_printed_lines(monkeypatch) -> None:
    monkeypatch.setattr(Tensor, "is_cuda", property(lambda _: True))  # of a GPU's path
    monkeypatch.setattr(Tensor, "pin_memory", lambda self: self)
    model = WithStatistics()
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    ema = optim.Ema(model, decay=0.9, warmup=True)
    criterion = DistillationLoss(nn.CrossEntropyLoss(), None, "hard", 0.5, 1.0)
    asked, reads = [], Reads()
    with reads:
        engine.train_one_epoch(
            model,
            criterion,
            batches((3,) * 9),
            optimizer,
            torch.device("cpu"),
            0,
            teacher=lambda images, key: images.flatten(1)[:, :4],
            config=StepConfig(max_norm=1.0, update_ema=partial(ema.update, model), log_interval=3),
            hooks=Hooks(on_update=lambda _: asked.append(reads.counts)),
        )
    grew = [later - earlier for earlier, later in zip([0, *asked], asked)]
    assert [bool(count) for count in grew] == [False, False, True] * 3, grew


@pytest.fixture
def alone_in_a_group(tmp_path):
    """A process group of one, in this process."""
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1
    )
    yield
    torch.distributed.destroy_process_group()


def test_gradients_travel_with_the_last_micro_step_of_an_update_alone(alone_in_a_group) -> None:
    model = nn.parallel.DistributedDataParallel(TwoHeads())
    sent = []

    def count(_, bucket):
        sent.append(bucket.index())
        future = torch.futures.Future()
        future.set_result(bucket.buffer())
        return future

    model.register_comm_hook(None, count)
    criterion = DistillationLoss(nn.CrossEntropyLoss(), None, "soft", 0.5, 1.0)
    taught = {"criterion": criterion, "teacher": lambda images, key: images.flatten(1)[:, :4]}
    train(model, batches((2,) * 5), accum_steps=2, **taught)
    assert sent == [0, 0, 0], "of two, two, and one left"
    sent.clear()
    train(model, batches((2,) * 5), **taught)
    assert sent == [0] * 5


@pytest.mark.parametrize("parallel", [False, True])
def test_a_compiled_student_learns_the_same_and_keeps_its_names(
    parallel: bool, alone_in_a_group
) -> None:
    found, names, graphs = [], [], []

    def backend(graph, _):
        graphs.append(graph)
        return graph.forward

    torch.compiler.reset()
    for compiled in (False, True):
        torch.manual_seed(0)
        network = models.create_model(
            "deit_pico_distilled_patch4_32", num_classes=4, drop_path_rate=0.5
        )
        student = models.Student(network, heads="both")
        model = student
        if parallel:
            model = distributed.data_parallel(student, torch.zeros(2, 3, 32, 32))
        ema = optim.Ema(network, decay=0.9, warmup=False)
        if compiled:
            student.compile(backend=backend, dynamic=False)
        loader = Loader((torch.ones(3, 3, 32, 32) * i, torch.arange(3)) for i in range(4))
        criterion = DistillationLoss(nn.CrossEntropyLoss(), None, "soft", 0.5, 1.0)
        stats = train(
            model,
            loader,
            criterion=criterion,
            accum_steps=2,
            update_ema=partial(ema.update, network),
            teacher=lambda images, key: images.flatten(1)[:, :4],
        )
        found.append((stats, network.state_dict(), ema.state_dict()))
        names.append(list(network.state_dict()))
    assert graphs, "nothing was compiled"
    assert names[0] == names[1] and not any("_orig_mod" in name for name in names[1])
    assert found[0][0] == found[1][0]
    for without, compiled in zip(found[0][1:], found[1][1:]):
        assert all(torch.equal(without[name], compiled[name]) for name in names[0])


def test_the_next_batch_is_copied_before_the_host_waits_to_print_a_line() -> None:
    fetched, fetched_at_line = [], []

    class Counting(Loader):
        def __iter__(self):
            for batch in super().__iter__():
                fetched.append(batch)
                yield batch

    model = TwoHeads()
    engine.train_one_epoch(
        model,
        plain(),
        Counting(batches((2, 2, 2))),
        torch.optim.SGD(model.parameters(), lr=0.1),
        CPU,
        0,
        config=StepConfig(log_interval=1),
        hooks=Hooks(on_log=lambda *_: fetched_at_line.append(len(fetched))),
    )
    assert fetched_at_line == [2, 3, 3]
