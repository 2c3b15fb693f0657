"""The same network, faster: what changes, by how much, and what is refused."""

import copy
import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

import models
from base.errors import UserError
from models import fast
from models.features import FeatureTaps, Tap

ROOT = Path(__file__).resolve().parents[1]
SHIPPED = ROOT / "models/weights/resnet_pico_digits.safetensors"
CPU, SIZE = "cpu", (32, 32)


def vit(drop_path: float = 0.0) -> nn.Module:
    torch.manual_seed(0)
    name = "deit_pico_distilled_patch4_32"
    return models.create_model(name, num_classes=5, drop_path_rate=drop_path)


def test_both_kinds_of_attention_give_the_same_logits_and_gradients() -> None:
    images, found = torch.randn(3, 3, 32, 32), []
    for fused in (False, True):
        network = vit().train()
        models.set_attention(network, fused=fused)
        assert [block.attn.fused_attn for block in network.blocks] == [fused] * 4
        sum(logits.square().sum() for logits in network(images)).backward()
        found.append((network(images)[0], network.blocks[0].attn.qkv.weight.grad))
    torch.testing.assert_close(found[0], found[1], rtol=1e-4, atol=1e-5)


def test_attention_is_plain_on_a_cpu_in_half_precision_and_fused_elsewhere() -> None:
    assert not models.prefers_fused_attention("cpu", torch.bfloat16)
    assert models.prefers_fused_attention("cpu", None)
    assert models.prefers_fused_attention("cuda", torch.bfloat16)


def big_linear(bias: bool = True) -> tuple[nn.Linear, nn.Linear]:
    """A linear layer and its twin that multiplies by oneDNN."""
    torch.manual_seed(0)
    plain = nn.Linear(160, 130, bias=bias)
    twin = copy.deepcopy(plain)
    fast.use_onednn(twin)
    assert type(twin) is fast.OneDnnLinear and isinstance(twin, nn.Linear)
    return plain, twin


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("compiled", [False, True])
def test_onednns_products_and_gradients_are_torchs_to_the_last_digits(
    bias: bool, compiled: bool
) -> None:
    found = []
    for layer in big_linear(bias):
        torch.manual_seed(1)
        images = torch.randn(3, 7, 160).transpose(0, 1).requires_grad_()  # not contiguous
        call = torch.compile(layer, backend="aot_eager", fullgraph=True) if compiled else layer
        output = call(images)
        output.sum(1).square().sum().backward()  # whose gradient is spread by strides of 0
        found.append([output, images.grad, *(p.grad for p in layer.parameters())])
    for theirs, ours in zip(*found):
        assert theirs.shape == ours.shape
        assert (theirs - ours).abs().max() < 1e-5 * theirs.abs().max()


def test_onednns_layers_leave_alone_what_is_not_theirs() -> None:
    plain, twin = big_linear()
    assert list(plain.state_dict()) == list(twin.state_dict())
    assert type(copy.deepcopy(twin)) is fast.OneDnnLinear
    assert twin(torch.empty(0, 160)).shape == (0, 130)
    with torch.autocast(CPU, torch.bfloat16):
        assert twin(torch.randn(2, 160)).dtype == torch.bfloat16
    assert twin.double()(torch.randn(2, 160).double()).dtype == torch.float64
    twin.float().requires_grad_(False)
    images = torch.randn(2, 160, requires_grad=True)
    twin(images).sum().backward()
    assert images.grad is not None and twin.weight.grad is None
    network = vit()  # of 64 features
    fast.use_onednn(network)
    assert not any(isinstance(module, fast.OneDnnLinear) for module in network.modules())


@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_a_cpu_gets_its_products_in_float32_alone(dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fast, "prefers_onednn", lambda: True)
    for device in (CPU, "cuda"):
        layer = nn.Linear(128, 128)
        models.select_kernels(layer, device, dtype)
        theirs = device == CPU and dtype is None
        assert type(layer) is (fast.OneDnnLinear if theirs else nn.Linear)


FAULTS = """
import resource, torch
from models import fast
kept = fast.keep_memory()
def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(20):
        blocks = [torch.zeros(2**18) for _ in range(20)]  # 20 MiB
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
faults()
print(kept, faults())
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="keeping memory is glibc's")
@pytest.mark.parametrize("told", ["", "MALLOC_TRIM_THRESHOLD_", "GLIBC_TUNABLES"])
def test_freed_memory_is_kept_for_the_next_step(told: str) -> None:
    value = "glibc.malloc.trim_threshold=131072" if "TUNABLES" in told else "131072"
    own = {told: value} if told else {}
    clean = {name: each for name, each in os.environ.items() if "MALLOC" not in name.upper()}
    done = subprocess.run(
        [sys.executable, "-c", FAULTS], cwd=ROOT, env=clean | own, capture_output=True, text=True
    )
    kept, faults = done.stdout.split()
    assert (kept == "True") == (not told), done.stderr
    assert int(faults) < 100 if not told else int(faults) > 1000


def test_checkpointed_blocks_give_the_same_loss_and_gradients_bit_for_bit() -> None:
    images, found = torch.randn(3, 3, 32, 32), []
    for checkpointed in (False, True):
        network, calls = vit(drop_path=0.5).train(), []
        if checkpointed:
            models.checkpoint_blocks(network)
        network.blocks[1].register_forward_pre_hook(lambda *_, calls=calls: calls.append(1))
        torch.manual_seed(1)
        seen = FeatureTaps(network, [Tap("hidden", 2)]).forward(network, images)
        loss = sum(logits.square().mean() for logits in seen.logits)
        loss = loss + seen.states[Tap("hidden", 2)].square().mean()
        loss.backward()
        assert len(calls) == 1 + checkpointed, "computed again in the backward pass"
        found.append([loss.detach(), *(p.grad for p in network.parameters())])
    for without, checkpointed in zip(*found):
        assert torch.equal(without, checkpointed)


@pytest.mark.parametrize(
    ("network", "words"), [("resnet_pico", "BatchNorm"), ("linear", "Linear does not support")]
)
def test_a_network_that_cannot_be_checkpointed_is_one_line(network: str, words: str) -> None:
    made = nn.Linear(2, 2) if network == "linear" else models.create_model(network)
    with pytest.raises(UserError, match=words):
        models.checkpoint_blocks(made)
