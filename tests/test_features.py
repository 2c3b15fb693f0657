"""What was seen inside: the right tensors, under every way a network is run."""

import copy

import pytest
import timm
import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import models
from base.errors import UserError
from models.features import FeatureTaps, Tap, layout_of

VIT = {"img_size": 8, "patch_size": 4, "embed_dim": 12, "depth": 3, "num_heads": 2}
IMAGES = torch.randn(3, 3, 8, 8, generator=torch.Generator().manual_seed(0))


def vit(name: str = "vit_tiny_patch16_224", **options) -> nn.Module:
    torch.manual_seed(0)
    return timm.create_model(name, num_classes=5, **(VIT | options)).eval()


def cnn() -> nn.Module:
    return models.create_model("resnet_pico", num_classes=5).eval()


def seen(network: nn.Module, *taps: Tap, images: torch.Tensor = IMAGES) -> list[torch.Tensor]:
    observed = FeatureTaps(network, taps).forward(network, images)
    assert set(observed.states) == set(taps)
    return [observed.states[tap] for tap in taps]


@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "deit_tiny_distilled_patch16_224"])
def test_hidden_0_is_the_embedding_and_hidden_i_the_output_of_block_i(name: str) -> None:
    network = vit(name)
    tokens = network._pos_embed(network.patch_embed(IMAGES))
    states = seen(network, *(Tap("hidden", layer) for layer in range(4)), Tap("hidden", -1))
    for layer, state in enumerate(states[:4]):
        torch.testing.assert_close(state, tokens)
        tokens = network.blocks[layer](tokens) if layer < 3 else tokens
    assert torch.equal(states[4], states[3])


@pytest.mark.parametrize("qk_norm", [False, True])
@pytest.mark.parametrize("fused", [False, True])
def test_attention_is_what_the_plain_kernel_computes(fused: bool, qk_norm: bool) -> None:
    network = vit(qk_norm=qk_norm)
    expected: list[torch.Tensor] = []
    for block in network.blocks:
        block.attn.fused_attn = False
        block.attn.attn_drop.register_forward_pre_hook(lambda _, x: expected.append(x[0]))
    network(IMAGES)
    plain = list(expected)
    for block in network.blocks:
        block.attn.fused_attn = fused
    taps = [Tap("attention", layer, "probabilities") for layer in (0, 2)]
    for found, layer in zip(seen(network, *taps), (0, 2)):
        assert found.shape == (3, 2, 5, 5)
        torch.testing.assert_close(found, plain[layer])
    (scores,) = seen(network, Tap("attention", -1))
    torch.testing.assert_close(scores.softmax(-1), plain[2])


def test_pooled_is_what_the_classifier_sees() -> None:
    for network in (vit(), cnn()):
        (pooled,) = seen(network, Tap("pooled", 0))
        features = network.forward_head(network.forward_features(IMAGES), pre_logits=True)
        torch.testing.assert_close(pooled, features)
    network = vit("deit_tiny_distilled_patch16_224")
    (pooled,) = seen(network, Tap("pooled", 0))
    torch.testing.assert_close(network.head(pooled), models.both_logits(network, IMAGES)[0])


def test_a_cnns_stage_maps_are_tokens_row_by_row() -> None:
    network, images = cnn(), torch.randn(3, 3, 32, 64)
    taps = FeatureTaps(network, [Tap("hidden", -1), Tap("hidden", 1)])
    states = taps.forward(network, images).states
    image_map = network.forward_features(images)  # (3, 64, 2, 4)
    tokens = states[Tap("hidden", -1)]
    assert tokens.shape == (3, 2 * 4, 64) and taps.grid(Tap("hidden", -1), 8) == (2, 4)
    torch.testing.assert_close(tokens[:, 5], image_map[:, :, 1, 1])


def test_gradients_go_through_a_tap() -> None:
    network = vit().train()
    for tap in (Tap("hidden", 2), Tap("attention", 1)):
        network.zero_grad()
        seen(network, tap)[0].square().sum().backward()
        assert network.blocks[0].attn.qkv.weight.grad.abs().sum() > 0


def test_attention_is_float32_under_autocast() -> None:
    network = vit()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        (scores,) = seen(network, Tap("attention", 0))
    assert scores.dtype == torch.float32
    torch.testing.assert_close(scores, seen(network, Tap("attention", 0))[0], atol=0.05, rtol=0.05)


class Watched(nn.Module):
    def __init__(self, network: nn.Module, *taps: Tap) -> None:
        super().__init__()
        self.network, self.taps = network, FeatureTaps(network, taps)

    def forward(self, images: torch.Tensor) -> tuple:
        observed = self.taps.forward(self.network, images)
        return observed.logits, list(observed.states.values())


TAPS = Tap("hidden", 0), Tap("hidden", 2), Tap("attention", 1)


def test_a_compiled_network_shows_the_same() -> None:
    watched = Watched(vit(), *TAPS)
    logits, states = watched(IMAGES)
    compiled = torch.compile(watched, backend="eager")
    for _ in range(2):
        logits_compiled, states_compiled = compiled(IMAGES)
        torch.testing.assert_close(logits_compiled, logits)
        torch.testing.assert_close(states_compiled, states)


def test_ddp_trains_on_what_a_tap_returns(tmp_path) -> None:
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1
    )
    try:
        wrapped = DistributedDataParallel(Watched(vit(), *TAPS))
        for _ in range(2):  # a second step fails if the first left a parameter unaccounted for
            logits, states = wrapped(IMAGES)
            (logits.sum() + sum(state.sum() for state in states)).backward()
    finally:
        torch.distributed.destroy_process_group()


def test_taps_record_in_their_own_forward_only_and_a_copy_is_idle() -> None:
    network = vit()
    taps = FeatureTaps(network, TAPS)
    average = copy.deepcopy(network)
    network(IMAGES), average(IMAGES)
    assert not taps._record.states
    assert set(taps.forward(average, IMAGES).states) == set(TAPS)  # the hooks are the copy's too
    assert torch.equal(average(IMAGES), network(IMAGES))


def test_a_network_without_taps_has_no_hooks() -> None:
    network = vit()
    FeatureTaps(network, [])
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in network.modules())


def test_a_layout_names_layers_prefix_tokens_and_grid() -> None:
    layout = layout_of(vit("deit_tiny_distilled_patch16_224"))
    assert (layout.hidden, layout.attention, layout.grid) == (4, 3, (2, 2))
    assert layout.prefix == ("cls", "dist")
    assert layout_of(vit("vit_small_patch14_reg4_dinov2")).prefix == ("cls", *["register"] * 4)
    assert layout_of(timm.create_model("cait_xxs24_224", **VIT)).prefix == (), "it joins later"
    assert layout_of(cnn()).hidden == 5 and layout_of(cnn()).attention == 0


@pytest.mark.parametrize(
    ("network", "tap", "words"),
    [
        (vit, Tap("hidden", 4), "hidden layer 4 of VisionTransformer is out of range.*0 to 3"),
        (vit, Tap("attention", -4), "attention layer -4 .* 0 to 2"),
        (cnn, Tap("hidden", 5), "0 to 4"),
        (cnn, Tap("attention", 0), "no attention"),
        (vit, Tap("hiden", 0), "hidden, attention, pooled"),
        (lambda: nn.Linear(2, 2), Tap("hidden", 0), "adaptor"),
        (
            lambda: timm.create_model("beit_base_patch16_224", **VIT),
            Tap("attention", 0),
            "only timm's plain Attention",
        ),
    ],
)
def test_what_cannot_be_tapped_is_an_error(network, tap: Tap, words: str) -> None:
    with pytest.raises(UserError, match=words):
        FeatureTaps(network(), [tap])


READABLE = {  # a small network of a family, and the number of its hidden layers
    "deit_tiny_distilled_patch16_224": 13,
    "deit3_small_patch16_224": 13,
    "cait_xxs24_224": 25,
    "xcit_nano_12_p16_224": 13,
    "beit_base_patch16_224": 13,
    "eva02_tiny_patch14_224": 13,
    "swin_tiny_patch4_window7_224": 4,
    "convnext_atto": 4,
    "resnet18": 5,
    "regnety_002": 5,
    "efficientnet_b0": 5,
}
UNREADABLE = [
    "volo_d1_224",
    "mvitv2_tiny",
    "twins_pcpvt_small",
    "twins_svt_small",
    "crossvit_tiny_240",
    "tnt_s_patch16_224",
    "coat_tiny",
    "coat_lite_tiny",
    "convit_tiny",
    "hiera_tiny_224",
]


def on_meta(name: str) -> tuple[nn.Module, torch.Tensor]:
    """Return a network and images that have shapes alone."""
    with torch.device("meta"):
        network = timm.create_model(name)
        return network.eval(), torch.empty(2, 3, *network.default_cfg["input_size"][-2:])


@pytest.mark.parametrize("name", READABLE)
def test_hidden_states_have_the_shapes_of_timms_intermediates(name: str) -> None:
    network, images = on_meta(name)
    count = layout_of(network).hidden
    assert count == READABLE[name]
    maps = network.forward_intermediates(images, intermediates_only=True, norm=False)
    taps = [Tap("hidden", layer) for layer in range(count - len(maps), count)]
    prefix = len(layout_of(network).prefix)
    for state, expected in zip(seen(network, *taps, images=images), maps, strict=True):
        assert state.shape[1:] == (prefix + expected[0, 0].numel(), expected.shape[1])


@pytest.mark.parametrize("name", UNREADABLE)
def test_a_network_that_cannot_be_tapped_is_refused_by_name(name: str) -> None:
    network, images = on_meta(name)
    with pytest.raises(UserError, match=f"{type(network).__name__} .*tapped.*adaptor"):
        seen(network, *(Tap("hidden", layer) for layer in range(3)), images=images)


def test_attention_has_the_same_gradient_with_gradient_checkpointing() -> None:
    gradients = []
    for is_checkpointed in (False, True):
        network = vit().train()
        network.set_grad_checkpointing(is_checkpointed)
        (state,) = seen(network, Tap("attention", 1))
        (state**2).sum().backward()
        gradients.append([p.grad for p in network.parameters() if p.grad is not None])
    assert len(gradients[0]) == len(gradients[1]) > 5
    for plain, checkpointed in zip(*gradients):
        torch.testing.assert_close(plain, checkpointed)
