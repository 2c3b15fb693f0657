"""What timm's own model tests ask, of every name that this repository registers.

Configurations and shapes are checked on the meta device, on three blocks at the width and
resolution of the name. Structure is checked for each class and patch size. What needs numbers is
checked on one name of each class, on two blocks.
"""

import math
from typing import Any

import pytest
import timm
import torch
from timm.layers import set_scriptable
from timm.models import FeatureInfo
from timm.models._manipulate import group_parameters
from timm.models.deit import VisionTransformerDistilled
from torch import nn
from torchvision.models.feature_extraction import create_feature_extractor

from models.deit import CNN, VITS
from models.released import NETWORKS

NAMES = [*VITS, CNN, *NETWORKS]
every_name = pytest.mark.parametrize("name", NAMES)
# One name of each class: the others differ in width, depth, patch size and resolution.
KINDS = {
    "deit_pico_patch8_32": {"depth": 2},
    "deit_pico_distilled_patch8_32": {"depth": 2},
    CNN: {},
    "deit_small_patch16_LS": {"depth": 2, "img_size": 64},
    "cait_XXS24_224": {"depth": 2, "img_size": 64},
    "resmlp_12": {"num_blocks": 2, "img_size": 64},
}
every_kind = pytest.mark.parametrize("name", KINDS)
OTHER_PATCHES = ["deit_pico_patch4_32", "deit_tiny_distilled_patch16_224", "deit_huge_patch14_LS"]
every_structure = pytest.mark.parametrize("name", [*KINDS, *OTHER_PATCHES, "resmlpB_24"])


def make(name: str) -> nn.Module:
    """Return a network of `KINDS`."""
    torch.manual_seed(0)
    return timm.create_model(name, **KINDS[name])


def on_meta(name: str, **options: Any) -> nn.Module:
    depth = {} if name == CNN else {"num_blocks" if "resmlp" in name else "depth": 3}
    return timm.create_model(name, device="meta", dtype=torch.float32, **(depth | options))


def images_for(network: nn.Module, count: int = 2, device: str = "cpu") -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    size = network.default_cfg["input_size"]
    if device == "cpu":  # 64 pixels for speed
        size = [min(side, 64) for side in size]
    if device == "meta":
        return torch.empty(count, *size, device=device)
    return torch.randn(count, *size, generator=generator)


def heads_of(network: nn.Module) -> list[nn.Module]:
    classifier = network.get_classifier()
    return list(classifier) if isinstance(classifier, tuple) else [classifier]


@every_name
def test_configuration_and_widths_agree(name: str) -> None:
    network = on_meta(name).eval()
    config, weights = network.default_cfg, network.state_dict()
    assert network.num_classes == config["num_classes"] and network.in_chans == 3
    classifiers = config["classifier"]
    for part in [
        config["first_conv"],
        *([classifiers] if type(classifiers) is str else classifiers),
    ]:
        assert f"{part}.weight" in weights
    images = images_for(network, 1, "meta")
    features = network.forward_features(images)
    pooled = network.forward_head(features, pre_logits=True)
    axis = 1 if features.dim() == 4 else -1
    assert features.shape[axis] == network.num_features
    assert pooled.shape == (1, network.head_hidden_size)
    if config["pool_size"]:
        assert features.shape[2:] == config["pool_size"]
    groups = group_parameters(network, network.group_matcher(coarse=False), reverse=True)
    assert len(set(groups.values())) > 1
    if name != CNN and "resmlp" not in name:  # a token that this network lacks may be listed
        own = dict(network.named_parameters())
        listed = network.no_weight_decay()
        assert "cls_token" not in own or "cls_token" in listed
        assert all(key in own or getattr(network, key, None) is None for key in listed)
    with pytest.raises(TypeError):
        on_meta(name, not_a_model_arg=1)


@every_structure
def test_the_classifier_can_be_left_out_and_replaced(name: str) -> None:
    network = on_meta(name).eval()
    images = images_for(network, 1, "meta")
    unpooled = network.forward_features(images).shape
    width = network.head_hidden_size
    network.reset_classifier(0)
    assert network.num_classes == 0 and network(images).shape == (1, width)
    assert on_meta(name, num_classes=0).eval()(images).shape == (1, width)
    if "cait" not in name:  # timm's CaiT asserts a pooling
        assert on_meta(name, num_classes=0, global_pool="").eval()(images).shape == unpooled
    network.to(torch.float64).train().reset_classifier(3)
    for head in heads_of(network):
        assert head.weight.shape[0] == 3 and head.weight.dtype == torch.float64
        assert head.weight.device.type == "meta" and head.training


@every_structure
def test_frozen_weights_stay_frozen_when_size_or_classifier_change(name: str) -> None:
    network = on_meta(name).requires_grad_(False)
    network.reset_classifier(0)
    if hasattr(network, "set_input_size"):
        network.set_input_size(img_size=tuple(2 * s for s in network.default_cfg["input_size"][1:]))
    assert not any(p.requires_grad for p in network.parameters())


@every_structure
def test_features_have_the_channels_and_reductions_that_are_stated(name: str) -> None:
    network = on_meta(name, features_only=True).eval()
    images = images_for(network, 1, "meta")
    maps = network(images)
    info = network.feature_info
    assert len(maps) == len(info.channels()) >= 3
    for channels, reduction, one in zip(info.channels(), info.reduction(), maps):
        assert one.shape[1] == channels
        assert one.shape[2:] == tuple(side // reduction for side in images.shape[2:])


@every_structure
def test_every_parameter_gets_a_gradient(name: str) -> None:
    network = on_meta(name, num_classes=5).train()
    outputs = network(images_for(network, 2, "meta"))
    assert isinstance(outputs, tuple) == isinstance(network, VisionTransformerDistilled)
    outputs = torch.cat(outputs) if isinstance(outputs, tuple) else outputs
    assert outputs.shape[-1] == 5
    outputs.mean().backward()
    assert all(p.grad is not None for p in network.parameters())


@every_kind
def test_intermediates_are_the_features_and_checkpointing_changes_nothing(name: str) -> None:
    network = make(name).eval()
    images = images_for(network)
    with torch.no_grad():
        logits = network(images)
        final, maps = network.forward_intermediates(images)
        torch.testing.assert_close(final, network.forward_features(images))
        info = FeatureInfo(network.feature_info, len(network.feature_info))
        for channels, reduction, one in zip(info.channels(), info.reduction(), maps):
            size = [math.ceil(side / reduction) for side in images.shape[2:]]
            assert one.shape == (2, channels, *size) and one.isfinite().all()
        network.set_grad_checkpointing()
        torch.testing.assert_close(network(images), logits)


@every_kind
@torch.no_grad()
def test_traced_scripted_and_exported_networks_return_the_same_logits(name: str) -> None:
    with set_scriptable(True):
        network = make(name).eval()
    images = images_for(network)
    logits = network(images)
    torch.testing.assert_close(torch.fx.symbolic_trace(network)(images), logits)
    torch.testing.assert_close(torch.jit.script(network)(images), logits)
    torch.testing.assert_close(torch.export.export(network, (images,)).module()(images), logits)
    feature = create_feature_extractor(network, ["head" if name != CNN else "fc"])
    assert [found.shape for found in feature(images).values()] == [(2, network.num_classes)]


@pytest.mark.parametrize("name", [name for name in KINDS if "distilled" in name])
def test_both_logits_come_from_a_traced_and_an_exported_network_in_training_too(name: str) -> None:
    network = make(name).train()
    images = images_for(network)
    wanted = network(images)
    for found in (
        torch.fx.symbolic_trace(network)(images),
        torch.export.export(network, (images,)).module()(images),
    ):
        torch.testing.assert_close(found, wanted)
    assert torch.jit.script(network)(images).shape == wanted[0].shape  # timm's: the mean
    network.set_distilled_training(False)
    torch.testing.assert_close(network(images), (wanted[0] + wanted[1]) / 2)


@every_kind
def test_a_prediction_is_in_the_type_of_the_weights(name: str) -> None:
    network = make(name).eval()
    images = images_for(network)
    network(images)
    assert network.bfloat16()(images.bfloat16()).dtype == torch.bfloat16
