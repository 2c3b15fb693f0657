"""The same network, faster: what changes, by how much, and what is refused."""

import copy
import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from sklearn.datasets import load_digits
from timm.layers import PatchEmbed
from torch import Tensor, nn

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


@pytest.fixture(scope="module")
def trained() -> nn.Module:
    network = models.create_model("resnet_pico", num_classes=10)
    models.load_weights(network, str(SHIPPED))
    return network.eval()


@pytest.fixture(scope="module")
def digits() -> Tensor:
    """512 handwritten digits, (512, 3, 32, 32), as the shipped CNN was shown them."""
    images = torch.from_numpy(load_digits().images[:512]).float()[:, None]
    images = nn.functional.interpolate(images / 16, SIZE, mode="bilinear")
    return images.expand(-1, 3, -1, -1) * 2 - 1


def test_both_kinds_of_attention_give_the_same_logits_and_gradients() -> None:
    images, found = torch.randn(3, 3, 32, 32), []
    for fused in (False, True):
        network = vit().train()
        fast.set_attention(network, fused=fused)
        assert [block.attn.fused_attn for block in network.blocks] == [fused] * 4
        sum(logits.square().sum() for logits in network(images)).backward()
        found.append((network(images)[0], network.blocks[0].attn.qkv.weight.grad))
    torch.testing.assert_close(found[0], found[1], rtol=1e-4, atol=1e-5)


def test_attention_is_plain_on_a_cpu_in_half_precision_and_fused_elsewhere() -> None:
    assert not fast.prefers_fused_attention("cpu", torch.bfloat16)
    assert fast.prefers_fused_attention("cpu", None)
    assert fast.prefers_fused_attention("cuda", torch.bfloat16)


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
        fast.select_kernels(layer, device, dtype)
        theirs = device == CPU and dtype is None
        assert type(layer) is (fast.OneDnnLinear if theirs else nn.Linear)


def test_patches_are_embedded_by_a_product_that_is_the_convolution() -> None:
    images, found = torch.randn(3, 3, 32, 32), []
    for product in (False, True):
        network = vit().train()
        if product:
            fast.use_patch_products(network)
        layer = network.patch_embed.proj
        assert type(layer) is (fast.PatchProduct if product else nn.Conv2d)
        assert torch.equal(layer(images), nn.functional.conv2d(images, *layer.parameters(), 4))
        with torch.autocast(CPU, torch.bfloat16):
            maps, tokens = layer(images), network.patch_embed(images)
        assert maps.shape == (3, 64, 8, 8) and maps.dtype == tokens.dtype == torch.bfloat16
        tokens.float().square().sum().backward()
        found.append([maps, tokens, layer.weight.grad, layer.bias.grad])
    for theirs, ours in zip(*found):
        assert theirs.shape == ours.shape and theirs.dtype == ours.dtype
        assert (theirs - ours).abs().max() < 0.01 * theirs.abs().max()
    with torch.autocast(CPU, torch.bfloat16):  # a convolution leaves out what fills no patch
        assert layer(torch.randn(1, 3, 34, 33)).shape == (1, 64, 8, 8)


def test_only_patches_that_do_not_overlap_are_multiplied() -> None:
    network = nn.Sequential(nn.Conv2d(3, 8, 4, 4), PatchEmbed(32, 4, embed_dim=8))
    network[1].proj.stride = (2, 2)
    fast.use_patch_products(network)
    assert [type(m) for m in network.modules() if isinstance(m, nn.Conv2d)] == [nn.Conv2d] * 2


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


@torch.no_grad()
def test_folding_moves_a_trained_networks_logits_by_a_millionth(trained, digits) -> None:
    before = trained(digits)
    folded, count = fast.fold_batch_norms(trained, SIZE)
    assert count == 14 == sum(isinstance(m, nn.BatchNorm2d) for m in trained.modules())
    assert not any(isinstance(m, nn.BatchNorm2d) for m in folded.modules())
    after = folded(digits)
    assert not torch.equal(before, after), "nothing was folded"
    assert (after - before).abs().max() < 5e-6 * before.abs().max()
    assert torch.equal(trained(digits), before), "the network itself is as it was"


@torch.no_grad()
def test_a_light_teacher_in_bf16_names_the_same_digits(trained, digits) -> None:
    light, _ = fast.optimize_for_inference(copy.deepcopy(trained), torch.bfloat16, SIZE, CPU)
    assert light.fc.weight.dtype == torch.bfloat16
    with torch.autocast(CPU, torch.bfloat16):
        said = light(digits.contiguous(memory_format=torch.channels_last)).float()
    exact = trained(digits)
    assert (said.argmax(1) == exact.argmax(1)).float().mean() > 0.99
    assert (said - exact).abs().max() < 0.05 * exact.abs().max()


class UsedTwice(nn.Module):
    """A network in which BatchNorm is not the only one to see its convolution's output."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)
        nn.init.constant_(self.norm.bias, 1.0)

    def forward(self, images: Tensor) -> Tensor:
        seen = self.conv(images)
        return (self.norm(seen) * seen).mean((2, 3))


def test_what_folding_would_change_is_left_as_it_was() -> None:
    network = UsedTwice().eval()
    assert fast.fold_batch_norms(network, (8, 8)) == (network, 0)


def test_checkpointed_blocks_give_the_same_loss_and_gradients_bit_for_bit() -> None:
    images, found = torch.randn(3, 3, 32, 32), []
    for checkpointed in (False, True):
        network, calls = vit(drop_path=0.5).train(), []
        if checkpointed:
            fast.checkpoint_blocks(network)
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
    ("network", "words"), [("resnet_pico", "BatchNorm"), ("linear", "Linear cannot")]
)
def test_a_network_that_cannot_be_checkpointed_is_one_line(network: str, words: str) -> None:
    made = nn.Linear(2, 2) if network == "linear" else models.create_model(network)
    with pytest.raises(UserError, match=words):
        fast.checkpoint_blocks(made)
