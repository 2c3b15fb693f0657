"""Groups, learning rate, schedule, average."""

import pytest
import torch
from timm.utils import ModelEmaV3

import models
import options
from base.errors import UserError
from training import optim


def make(*flags: str, world: int = 1):
    base = [
        "--data-path",
        "x",
        "--model",
        "deit_pico_distilled_patch4_32",
        "--epochs",
        "10",
        "--warmup-epochs",
        "2",
    ]
    args = options.parse_args([*base, *flags]).args
    student = models.build_student(args, 5, models.build_input_config(args))
    optimizer, lr = optim.build_optimizer(args, student, world)
    return args, student, optimizer, lr


def test_the_learning_rate_follows_the_effective_batch_and_args_stay_as_they_were() -> None:
    flags = ["--batch-size", "16", "--grad-accum-steps", "4", "--lr", "1e-3"]
    args, _, optimizer, lr = make(*flags, world=8)
    assert lr == pytest.approx(1e-3 * 16 * 4 * 8 / 512)
    assert args.lr == 1e-3
    assert make(*flags, "--unscale-lr", world=8)[3] == 1e-3


def test_nothing_one_dimensional_and_no_token_decays() -> None:
    _, student, optimizer, _ = make()
    names = {id(p): name for name, p in student.network.named_parameters()}
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            name = names.pop(id(parameter))
            free = parameter.dim() < 2 or name in ("cls_token", "dist_token", "pos_embed")
            assert (group["weight_decay"] == 0) == free, name
    assert not names, "every parameter is in one group"


def test_layer_decay_slows_the_first_layers() -> None:
    _, student, optimizer, _ = make("--layer-decay", "0.5")
    scale = {id(p): group["lr_scale"] for group in optimizer.param_groups for p in group["params"]}
    network = student.network
    first, last = network.blocks[0].attn.qkv.weight, network.blocks[3].attn.qkv.weight
    assert scale[id(first)] == pytest.approx(scale[id(last)] / 8)
    assert scale[id(network.dist_token)] == scale[id(network.patch_embed.proj.weight)]


def test_frozen_parameters_are_not_optimized() -> None:
    _, student, optimizer, _ = make("--attn-only")
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    assert id(student.network.blocks[0].mlp.fc1.weight) not in held


def test_apexs_names_become_timms_and_unknown_ones_are_one_line() -> None:
    assert type(make("--opt", "fusedlamb")[2]).__name__.lower() == "lamb"
    with pytest.raises(UserError, match="adamw99"):
        make("--opt", "adamw99")


def rates(*flags: str, updates: int = 3) -> list[float]:
    args, _, optimizer, _ = make("--unscale-lr", "--lr", "1", "--min-lr", "0.01", *flags)
    schedule = optim.build_schedule(args, optimizer, updates)
    found = []
    for step in range(10 * updates):
        schedule.step(step, step // updates)
        found.append(optimizer.param_groups[0]["lr"])
    return found


def test_the_schedule_warms_up_per_update_and_ends_at_the_lowest_rate() -> None:
    found = rates("--warmup-lr", "0")
    assert found[0] == 0 and found[3] == pytest.approx(0.5)
    assert max(found) == found[6] and found[6] > 0.9
    assert 0.01 <= found[-1] < 0.03 and found[6:] == sorted(found[6:], reverse=True)


def test_per_epoch_the_rate_is_one_value_an_epoch() -> None:
    found = rates("--no-sched-on-updates")
    assert all(len(set(found[i : i + 3])) == 1 for i in range(0, 30, 3))


@pytest.mark.parametrize("flags", [[], ["--lr-noise", "0.2", "0.8"], ["--sched", "step"]])
def test_the_rate_is_a_function_of_the_step_whatever_came_before(flags: list[str]) -> None:
    args, _, optimizer, _ = make(*flags)
    schedule = optim.build_schedule(args, optimizer, 3)
    there = []
    for step in (17, 2, 17):
        schedule.step(step, step // 3)
        there.append(optimizer.param_groups[0]["lr"])
    assert there[0] == there[2] != there[1]


def test_a_plateau_lowers_the_rate_and_its_memory_can_be_saved() -> None:
    args, _, optimizer, _ = make(
        "--sched",
        "plateau",
        "--patience-epochs",
        "1",
        "--unscale-lr",
        "--lr",
        "1",
        "--warmup-epochs",
        "0",
    )
    schedule = optim.build_schedule(args, optimizer, 3)
    for epoch in range(3):
        schedule.end_epoch(epoch, 50.0)
    state = schedule.state_dict()
    other = optim.build_schedule(args, optimizer, 3)
    other.load_state_dict(state)
    for epoch in range(3, 5):
        other.end_epoch(epoch, 50.0)
    assert optimizer.param_groups[0]["lr"] == pytest.approx(0.1)


def test_an_unknown_schedule_is_one_line() -> None:
    with pytest.raises(UserError, match="cosinus"):
        rates("--sched", "cosinus")


def test_the_average_starts_short_and_follows_a_network_of_its_own() -> None:
    network = models.create_model("deit_pico_patch4_32")
    ema = optim.Ema(network, decay=0.9999, warmup=True)
    before = ema.module.head.bias.clone()
    with torch.no_grad():
        network.head.bias.add_(1.0)
    ema.update(network, 8)  # decay 1 - 8^(-2/3) = 0.75
    torch.testing.assert_close(ema.module.head.bias, before + 0.25)
    slow = optim.Ema(network, decay=0.9, warmup=False)
    with torch.no_grad():
        network.head.bias.add_(1.0)
    slow.update(network, 5)
    torch.testing.assert_close(slow.module.head.bias, network.head.bias - 0.9)


def test_no_average_without_the_flag() -> None:
    args, student, _, _ = make("--no-model-ema")
    assert optim.build_ema(args, student.network) is None


def test_the_fused_optimizer_is_the_default_and_moves_weights_as_the_plain_one() -> None:
    found = []
    for flags in ([], ["--opt-kwargs", "fused=False"]):
        torch.manual_seed(0)
        _, student, optimizer, _ = make("--unscale-lr", "--lr", "0.01", *flags)
        assert bool(optimizer.defaults["fused"]) is not bool(flags)
        for step in range(3):
            for i, parameter in enumerate(student.parameters()):
                parameter.grad = torch.full_like(parameter, 0.1 * (i - 50 + step))
            optimizer.step()
        found.append(list(student.parameters()))
    for fused, plain in zip(*found):
        torch.testing.assert_close(fused, plain, rtol=1e-5, atol=1e-6)
    with pytest.raises(UserError, match="colour"):
        make("--opt-kwargs", "colour=red")


def test_the_average_is_timms_own_with_batch_norm_and_its_counters_too() -> None:
    torch.manual_seed(0)
    network = models.create_model("resnet_pico")
    ema, timms = (
        optim.Ema(network, decay=0.9, warmup=True),
        ModelEmaV3(network, 0.9, use_warmup=True),
    )
    network.load_state_dict({k: v + 1 for k, v in network.state_dict().items()})
    for step in (2, 9, 50):
        ema.update(network, step)
        timms.update(network, step=step)
    for name, value in timms.module.state_dict().items():
        assert torch.equal(ema.state_dict()[name], value), name


def test_an_update_longer_than_an_epoch_is_refused_with_advice_that_works() -> None:
    args = options.parse_args(["--grad-accum-steps", "100"]).args
    with pytest.raises(UserError, match="an epoch has 14 micro-steps.*steps 14 or less"):
        optim.build_batch_plan(args, 14, 1)
    args = options.parse_args(["--grad-accum-steps", "14"]).args
    plan = optim.build_batch_plan(args, 14, 1)
    assert (plan.updates, plan.batch) == (1, 14 * 64)
    assert plan.describe().startswith("30 epochs of 1 update, effective batch 896")
