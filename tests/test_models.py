"""The networks: names, keys, both heads, strict loading, fine-tuning from another shape."""

import subprocess
import sys
from pathlib import Path

import pytest
import timm
import torch
from torch import nn

import models
import options
from base.errors import UserError
from models import hub
from models.deit import VITS, DistilledVisionTransformer

ROOT = Path(__file__).resolve().parents[1]
PLAIN, DISTILLED = "deit_pico_patch4_32", "deit_pico_distilled_patch4_32"
# Parameter counts measured on the reference's own code.
PARAMETERS = {
    "deit_tiny_patch16_224": 5_717_416,
    "deit_small_patch16_224": 22_050_664,
    "deit_base_patch16_224": 86_567_656,
    "deit_tiny_distilled_patch16_224": 5_910_800,
    "deit_small_distilled_patch16_224": 22_436_432,
    "deit_base_distilled_patch16_224": 87_338_192,
    "deit_base_patch16_384": 86_859_496,
    "deit_base_distilled_patch16_384": 87_630_032,
}


@pytest.mark.parametrize("name", PARAMETERS)
def test_a_deit_model_has_the_released_files_keys_and_size(name: str) -> None:
    with torch.device("meta"):
        network = timm.create_model(name)
    assert sum(p.numel() for p in network.parameters()) == PARAMETERS[name]
    block = [
        "norm1.weight",
        "norm1.bias",
        "attn.qkv.weight",
        "attn.qkv.bias",
        "attn.proj.weight",
        "attn.proj.bias",
        "norm2.weight",
        "norm2.bias",
        "mlp.fc1.weight",
        "mlp.fc1.bias",
        "mlp.fc2.weight",
        "mlp.fc2.bias",
    ]
    keys = {f"blocks.{i}.{rest}" for i in range(12) for rest in block}
    keys |= {
        "cls_token",
        "pos_embed",
        "patch_embed.proj.weight",
        "patch_embed.proj.bias",
        "norm.weight",
        "norm.bias",
        "head.weight",
        "head.bias",
    }
    if "distilled" in name:
        keys |= {"dist_token", "head_dist.weight", "head_dist.bias"}
    assert set(network.state_dict()) == keys
    assert network.pretrained_cfg["crop_pct"] == 0.875
    assert VITS[name].file in network.pretrained_cfg["url"]


def test_registering_our_names_over_timms_warns_nobody() -> None:
    program = (
        "import timm, models.deit as d; "
        "assert timm.model_entrypoint('deit_tiny_patch16_224').__module__ == d.__name__"
    )
    command = [sys.executable, "-W", "error", "-c", program]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0 and not result.stderr, result.stderr


def test_a_distilled_vit_returns_both_heads_in_training_and_their_mean_in_evaluation() -> None:
    network = timm.create_model(DISTILLED, num_classes=7)
    images = torch.randn(3, 3, 32, 32)
    cls, dist = network.train()(images)
    assert cls.shape == dist.shape == (3, 7)
    mean = network.eval()(images)
    torch.testing.assert_close(mean, (cls + dist) / 2)
    torch.testing.assert_close(models.both_logits(network, images)[1], dist)


def test_the_two_tokens_do_not_share_a_head_or_an_embedding() -> None:
    network = timm.create_model(DISTILLED, num_classes=7)
    tokens = torch.randn(2, 66, 64)
    cls, dist = network.train().forward_head(tokens)
    torch.testing.assert_close(cls, network.head(tokens[:, 0]))
    torch.testing.assert_close(dist, network.head_dist(tokens[:, 1]))


def test_a_distilled_vit_works_with_timms_tools() -> None:
    network = timm.create_model(DISTILLED, img_size=(32, 48), num_classes=5, drop_path_rate=0.1)
    assert network.pos_embed.shape == (1, 2 + 8 * 12, 64)
    images = torch.randn(2, 3, 32, 48)
    assert network.eval()(images).shape == (2, 5)
    assert network.forward_head(network.forward_features(images), pre_logits=True).shape == (2, 64)
    assert {"cls_token", "dist_token", "pos_embed"} <= set(network.no_weight_decay())
    final, maps = network.forward_intermediates(images, indices=[1])
    assert final.shape == (2, 98, 64) and maps[0].shape == (2, 64, 8, 12)
    network.reset_classifier(3)
    assert network(images).shape == (2, 3)
    network.set_grad_checkpointing()
    cls, dist = network.train()(images)
    (cls.sum() + dist.sum()).backward()
    assert network.dist_token.grad is not None


def test_an_unknown_option_is_refused() -> None:
    with pytest.raises(TypeError, match="embed_width"):
        timm.create_model(DISTILLED, embed_width=3)


def test_dropout_reaches_tokens_projections_and_mlp_as_in_deit() -> None:
    network = models.create_model(PLAIN, drop_rate=0.3)
    block = network.blocks[0]
    assert network.pos_drop.p == block.attn.proj_drop.p == block.mlp.drop1.p == 0.3


def test_an_unknown_model_is_one_line_with_the_closest_names() -> None:
    with pytest.raises(UserError, match="deit_tiny_distilled_patch16_224"):
        models.create_model("deit_tiny_destilled_patch16_224")
    with pytest.raises(UserError, match="published weights"):
        models.create_model(PLAIN, pretrained=True)


def test_img_size_reaches_vits_and_is_kept_from_cnns() -> None:
    assert models.create_model(PLAIN, img_size=(16, 16)).pos_embed.shape[1] == 17
    assert models.create_model("resnet_pico", img_size=(64, 64), num_classes=3).num_classes == 3


def test_the_input_is_the_models_own_configuration_under_the_flags() -> None:
    def inputs(*flags: str):
        args = options.parse_args(["--data-path", "x", *flags]).args
        return models.build_input_config(args)

    lite = inputs("--model", "tf_efficientnet_lite0")
    assert lite.mean == lite.std == (0.5, 0.5, 0.5) and lite.crop_ratio == 0.875
    ours = inputs("--model", "deit_base_distilled_patch16_384", "--input-size", "96", "128")
    assert ours.input_size == (96, 128) and ours.mean[0] == pytest.approx(0.485)
    assert inputs("--eval-crop-ratio", "0.9", "--mean", "0", "0", "0").crop_ratio == 0.9


def save(path: Path, content: object) -> str:
    torch.save(content, path)
    return str(path)


@pytest.mark.parametrize("wrap", ["bare", "model", "state_dict", "module.", "safetensors", "half"])
def test_every_released_format_loads(wrap: str, tmp_path: Path) -> None:
    source, target = models.create_model(DISTILLED), models.create_model(DISTILLED)
    weights = source.state_dict()
    path = tmp_path / "x.pth"
    if wrap == "safetensors":
        from safetensors.torch import save_file

        path = tmp_path / "x.safetensors"
        save_file(weights, path)
    elif wrap == "module.":
        save(path, {"model": {f"module.{k}": v for k, v in weights.items()}})
    elif wrap == "half":
        weights = {k: v.half() for k, v in weights.items()}
        save(path, weights)
    else:
        save(path, weights if wrap == "bare" else {wrap: weights, "epoch": 3})
    models.load_weights(target, str(path))
    for name, value in target.state_dict().items():
        assert torch.equal(value, weights[name].float()), name


def test_the_average_is_loaded_when_it_is_asked_for(tmp_path: Path) -> None:
    raw, ema = models.create_model(PLAIN).state_dict(), models.create_model(PLAIN).state_dict()
    path = save(tmp_path / "x.pth", {"model": raw, "model_ema": ema})
    target = models.create_model(PLAIN)
    models.load_weights(target, path, key="model_ema")
    assert torch.equal(target.head.weight, ema["head.weight"])
    assert models.weight_keys(path) == ["model", "model_ema"]
    with pytest.raises(UserError, match="state_dict"):
        models.load_weights(target, path, key="state_dict")


@pytest.mark.parametrize("key", ["model", "model_ema"])
def test_what_is_no_weights_is_not_passed_over_for_the_other(key: str, tmp_path: Path) -> None:
    held = {"model": {"w": torch.ones(1)}, "model_ema": {"w": torch.ones(1)}}
    torch.save(held | {key: "words"}, tmp_path / "x.pth")
    with pytest.raises(UserError, match=f"{key} is a str without weights"):
        models.weight_keys(str(tmp_path / "x.pth"))
    torch.save(held | {key: None}, tmp_path / "x.pth")
    assert len(models.weight_keys(str(tmp_path / "x.pth"))) == 1


def test_deit_3_names_load_into_timms_model(tmp_path: Path) -> None:
    target = timm.create_model("deit3_small_patch16_224", depth=2)
    weights = {
        name.replace("ls1.gamma", "gamma_1").replace("ls2.gamma", "gamma_2"): torch.randn_like(v)
        for name, v in target.state_dict().items()
    }
    models.load_weights(target, save(tmp_path / "x.pth", {"model": weights}))
    assert torch.equal(target.blocks[1].ls2.gamma, weights["blocks.1.gamma_2"])


@pytest.mark.parametrize(
    ("name", "options", "words"),
    [
        (DISTILLED, {"num_classes": 7}, ["10 classes", "has 7", "set --nb-classes 10 ", "--eval"]),
        (
            DISTILLED,
            {"img_size": (48, 48)},
            ["8x8 patches", "12x12 patches", "set --input-size 32,"],
        ),
        (
            PLAIN,
            {},
            ["looks like deit_pico_distilled_patch4_32", "are not in the model", "dist_token"],
        ),
        ("deit_tiny_distilled_patch16_224", {}, ["width 64", "width 192"]),
        ("resnet_pico", {}, ["looks like deit_pico_distilled", "a CNN"]),
    ],
)
def test_a_file_for_another_network_says_what_it_seems_to_be(
    name: str, options: dict, words: list[str], tmp_path: Path
) -> None:
    path = save(tmp_path / "x.pth", models.create_model(DISTILLED).state_dict())
    with pytest.raises(UserError) as caught:
        models.load_weights(models.create_model(name, **options), path)
    for word in ("x.pth", *words):
        assert word in str(caught.value)


@pytest.mark.parametrize(
    ("source", "target"), [(PLAIN, DISTILLED), (DISTILLED, PLAIN), (DISTILLED, DISTILLED)]
)
def test_finetuning_brings_another_head_resolution_and_token_count(
    source: str, target: str, tmp_path: Path
) -> None:
    old, new = (
        models.create_model(source),
        models.create_model(target, num_classes=3, img_size=(24, 40)),
    )
    path = save(tmp_path / "x.pth", {"model": old.state_dict()})
    report = models.finetune(new, path)
    assert report.resampled == ["pos_embed"] and report.share > 0.9
    assert "head.weight" in report.dropped and "head.weight" in report.missing
    assert ("dist_token" in report.missing) == (source == PLAIN and target == DISTILLED)
    assert ("dist_token" in report.dropped) == (source == DISTILLED and target == PLAIN)
    assert torch.equal(new.pos_embed[:, 0], old.pos_embed[:, 0]), "the class token's place"
    assert torch.equal(new.blocks[2].mlp.fc1.weight, old.blocks[2].mlp.fc1.weight)
    assert new.eval()(torch.randn(2, 3, 24, 40)).shape == (2, 3)


def test_resampling_to_the_same_grid_changes_nothing(tmp_path: Path) -> None:
    old, new = models.create_model(PLAIN), models.create_model(DISTILLED)
    models.finetune(new, save(tmp_path / "x.pth", old.state_dict()))
    torch.testing.assert_close(new.pos_embed[:, 2:], old.pos_embed[:, 1:])


def test_resampling_keeps_a_gradient_across_the_image(tmp_path: Path) -> None:
    old = models.create_model(PLAIN)
    ramp = torch.linspace(0, 1, 8)[:, None].expand(8, 8).reshape(1, 64, 1)  # rows go down
    with torch.no_grad():
        old.pos_embed[:, 1:] = ramp
    new = models.create_model(PLAIN, img_size=(64, 32))
    models.finetune(new, save(tmp_path / "x.pth", old.state_dict()))
    rows = new.pos_embed[0, 1:, 0].reshape(16, 8)
    assert (rows.diff(dim=0) > 0).all() and rows.diff(dim=1).abs().max() < 1e-6


def test_finetuning_from_another_architecture_is_refused(tmp_path: Path) -> None:
    path = save(tmp_path / "x.pth", models.create_model("resnet_pico").state_dict())
    with pytest.raises(UserError, match="0% of the parameters"):
        models.finetune(models.create_model(PLAIN), path)


def test_a_model_without_position_embedding_can_be_finetuned(tmp_path: Path) -> None:
    path = save(tmp_path / "x.pth", models.create_model("resnet_pico").state_dict())
    report = models.finetune(models.create_model("resnet_pico", num_classes=4), path)
    assert report.dropped == ["fc.weight", "fc.bias"] and not report.resampled


def test_a_hub_that_cannot_be_reached_is_one_line_at_once(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(hub.constants, "ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr(hub.urllib.request, "getproxies", dict)
    with pytest.raises(
        UserError, match="127.0.0.1 cannot be reached: Connection refused.*finetune"
    ):
        models.create_model("resnet10t", pretrained=True)
    assert not [r for r in caplog.records if "etry" in r.getMessage()]
    assert hub.constants.HF_HUB_OFFLINE is False  # for who asks next


def test_a_hub_behind_a_proxy_is_left_to_its_library(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(hub.constants, "ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr(hub.urllib.request, "getproxies", lambda: {"http": "http://proxy:1"})
    assert hub.unreachable_reason() == ""


def test_attention_only_is_chosen_by_module_type() -> None:
    network = models.create_model(DISTILLED)
    models.freeze_all_but_attention(network)
    trains = {name for name, p in network.named_parameters() if p.requires_grad}
    assert {"head.weight", "head_dist.weight", "pos_embed", "blocks.0.attn.qkv.weight"} <= trains
    assert not any(".mlp." in name or "patch_embed" in name for name in trains)
    with pytest.raises(UserError, match="no attention"):
        models.freeze_all_but_attention(models.create_model("resnet_pico"))


def student(*flags: str) -> models.Student:
    base = ["--data-path", "x", "--model", DISTILLED, "--nb-classes", "5"]
    args = options.parse_args([*base, *flags]).args
    return models.build_student(args, 5, models.build_input_config(args))


def test_without_distillation_both_heads_learn_from_the_labels() -> None:
    module = student().train()
    output = module(torch.randn(3, 3, 32, 32))
    assert output.shape == (3, 5)
    output.sum().backward()
    assert all(p.grad is not None for p in module.parameters()), "DDP wants no idle parameter"


def test_distillation_hands_over_both_heads_also_with_training_mode_off() -> None:
    module = student("--distillation-type", "hard", "--no-train-mode").eval()
    cls, dist = module(torch.randn(3, 3, 32, 32))
    assert cls.shape == dist.shape == (3, 5)
    assert isinstance(module.network(torch.randn(3, 3, 32, 32)), torch.Tensor)


def test_a_plain_student_is_distilled_on_its_class_head_or_told_which_to_take() -> None:
    assert student("--distillation-type", "soft", "--model", PLAIN).distillation_head == "cls"
    with pytest.raises(UserError, match="deit_tiny_distilled_patch16_224"):
        student("--distillation-type", "soft", "--model", PLAIN, "--distillation-head", "dist")
    with pytest.raises(UserError, match="untrained"):
        student("--distillation-type", "soft", "--distillation-head", "cls")


def test_cosub_shows_a_batch_to_two_submodels() -> None:
    module = student("--cosub", "--drop-path", "0.5").train()
    first, second = module(torch.randn(3, 3, 32, 32)).chunk(2)
    assert first.shape == second.shape == (3, 5) and not torch.equal(first, second)


def test_what_is_exported_has_no_wrapper_in_its_names() -> None:
    assert isinstance(student().network, DistilledVisionTransformer | nn.Module)
    assert "cls_token" in student().network.state_dict()


def test_a_distilled_network_of_timm_hands_over_both_heads_too() -> None:
    network = timm.create_model("levit_128s", num_classes=5)
    module = models.Student(network, heads="both").train()
    cls, dist = module(torch.randn(2, 3, 224, 224))
    assert cls.shape == dist.shape == (2, 5)
    assert models.Student(network).train()(torch.randn(2, 3, 224, 224)).shape == (2, 5)


def positions(value: torch.Tensor):
    return lambda weights: weights | {"pos_embed": value}


STRANGE = {
    "numbers for names": lambda weights: {1: torch.ones(1)},
    "a number among names": lambda weights: weights | {1: torch.ones(1)},
    "flat positions": positions(torch.zeros(5)),
    "no positions": positions(torch.zeros(1, 0, 8)),
    "positions without numbers": positions(torch.empty(1, 17, 8, device="meta")),
    "sparse positions": positions(torch.ones(1, 17, 8).to_sparse()),
    "positions of terabytes": positions(torch.zeros(1, 1, 1).expand(1, 10**10 + 1, 8)),
    "no numbers": positions(torch.full((1, 17, 8), torch.nan)),
    "small integers": lambda weights: {k: (100 * v).to(torch.int8) for k, v in weights.items()},
    "other complex numbers": positions(torch.zeros(1, 10, 8, dtype=torch.complex64)),
    "complex numbers": positions(torch.zeros(1, 17, 8, dtype=torch.complex64)),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", STRANGE)
@pytest.mark.parametrize("door", [models.load_weights, models.finetune])
def test_strange_weights_are_one_line_and_change_nothing(door, kind: str, tmp_path: Path) -> None:
    network = timm.create_model(
        "vit_tiny_patch16_224", img_size=64, embed_dim=8, depth=1, num_heads=2, num_classes=3
    )
    before = {name: value.clone() for name, value in network.state_dict().items()}
    path = save(tmp_path / "weights.pth", {"model": STRANGE[kind](dict(before))})
    with pytest.raises(UserError, match="weights.pth|position embedding"):
        door(network, path)
    for name, value in network.state_dict().items():
        assert torch.equal(value, before[name]), name


@pytest.mark.parametrize(("size", "follows"), [("4", "8"), ("30", "32"), ("8 4", "8 8")])
def test_an_input_without_whole_patches_is_refused(size: str, follows: str) -> None:
    def student(size: str) -> models.Student:
        flags = ["--model", "deit_pico_patch8_32", "--input-size", *size.split()]
        args = options.parse_args(flags).args
        return models.build_student(args, 10, models.build_input_config(args))

    with pytest.raises(UserError, match="patches of 8 x 8 pixels; give multiples of 8"):
        student(size)
    side = student(follows)
    height, width = (*follows.split(), *follows.split())[:2]
    assert side(torch.zeros(2, 3, int(height), int(width))).shape == (2, 10)
