"""Files of other projects and layouts: mapped with the same logits, or refused for the true reason.

A file's network has width 12, 2 blocks, 3 heads and 2x2 patches of 4 pixels unless stated.
"""

import json
import logging
import math
import re
from argparse import Namespace
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

import models
from base.errors import UserError
from distill.teacher import input_of
from models.positions import Layout, layout_of_file

SHAPE = {"img_size": 8, "patch_size": 4, "embed_dim": 12, "depth": 2, "num_heads": 3}
PLAIN, DISTILLED = "deit_tiny_patch16_224", "deit_tiny_distilled_patch16_224"


def network_of(name: str = PLAIN, seed: int = 0, **options) -> nn.Module:
    """Return a small network with random values in every tensor."""
    network = timm.create_model(name, **(SHAPE | {"num_classes": 5} | options)).eval()
    torch.manual_seed(seed)
    for value in network.state_dict().values():
        value.copy_(0.3 * torch.randn_like(value))
    return network


def logits(network: nn.Module, size: tuple[int, int] = (8, 8)) -> Tensor:
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        return network.eval()(torch.randn(3, 3, *size, generator=generator))


def save(path: Path, content: object) -> str:
    torch.save(content, path)
    return str(path)


def hugging_face(weights: dict[str, Tensor], root: str, distilled: bool) -> dict[str, Tensor]:
    """Return weights under the names of `transformers`' ViT or DeiT."""
    names = {
        "cls_token": f"{root}embeddings.cls_token",
        "dist_token": f"{root}embeddings.distillation_token",
        "pos_embed": f"{root}embeddings.position_embeddings",
    }
    patterns = [
        (r"^patch_embed\.proj", f"{root}embeddings.patch_embeddings.projection"),
        (r"\.norm1\.", ".layernorm_before."),
        (r"\.norm2\.", ".layernorm_after."),
        (r"\.attn\.proj\.", ".attention.output.dense."),
        (r"\.mlp\.fc1\.", ".intermediate.dense."),
        (r"\.mlp\.fc2\.", ".output.dense."),
        (r"^blocks\.", f"{root}encoder.layer."),
        (r"^norm\.", f"{root}layernorm."),
        (r"^head\.", "cls_classifier." if distilled else "classifier."),
        (r"^head_dist\.", "distillation_classifier."),
    ]
    found = {}
    for name, value in weights.items():
        new = names.get(name, name)
        for pattern, replacement in patterns:
            new = re.sub(pattern, replacement, new)
        if ".attn.qkv." in new:
            for part, each in zip(("query", "key", "value"), value.chunk(3)):
                found[new.replace(".attn.qkv.", f".attention.attention.{part}.")] = each
        else:
            found[new] = value
    return found | {f"{root}pooler.dense.weight": torch.ones(2, 2)} if root else found


def dino(weights: dict[str, Tensor]) -> dict[str, object]:
    """Return a checkpoint of DINO's training: both networks, each with a projection head."""
    head = {"module.head.mlp.0.weight": torch.ones(3, 12)}
    teacher = {f"module.backbone.{name}": value for name, value in weights.items()} | head
    student = {name: value + 1 for name, value in teacher.items()}
    return {"student": student, "teacher": teacher, "epoch": 3, "dino_loss": {"center": head}}


def prefixed(prefix: str, **more: Tensor) -> Callable:
    return lambda weights: {
        "state_dict": {f"{prefix}{name}": value for name, value in weights.items()} | more,
        "epoch": 1,
    }


FORMATS: dict[str, Callable] = {
    "lightning": prefixed("model."),
    "lightning with a loss": prefixed("model.", **{"criterion.weight": torch.ones(5)}),
    "backbone": prefixed("backbone."),
    "network in a student": prefixed("student.network."),
    "dino": dino,
}


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("name", [PLAIN, DISTILLED])
def test_prefixed_files_load_with_the_same_logits(form: str, name: str, tmp_path: Path) -> None:
    source, target = network_of(name), network_of(name, seed=1)
    path = save(tmp_path / "x.pth", FORMATS[form](source.state_dict()))
    models.load_weights(target, path)
    torch.testing.assert_close(logits(target), logits(source), rtol=0, atol=0)
    tuned = network_of(name, seed=2, num_classes=7)
    assert models.finetune(tuned, path).share > 0.9


@pytest.mark.parametrize(("name", "root"), [(PLAIN, "vit."), (PLAIN, ""), (DISTILLED, "deit.")])
def test_hugging_face_files_load_with_the_same_logits(name: str, root: str, tmp_path: Path) -> None:
    source, target = network_of(name), network_of(name, seed=1)
    weights = hugging_face(source.state_dict(), root, name == DISTILLED)
    assert not set(weights) & set(source.state_dict())
    path = save(tmp_path / "pytorch_model.bin", weights)
    models.load_weights(target, path)
    torch.testing.assert_close(logits(target), logits(source), rtol=0, atol=0)
    other = timm.create_model(PLAIN, **(SHAPE | {"embed_dim": 24}))
    with pytest.raises(UserError, match="a ViT of width 12, depth 2, patch 4"):
        models.load_weights(other, path)


def test_two_networks_of_one_file_are_told_apart_or_refused(tmp_path: Path) -> None:
    source, target = network_of(), network_of(seed=1)
    weights = source.state_dict()
    both = {f"student_backbone.{name}": value + 1 for name, value in weights.items()}
    both |= {f"teacher_backbone.{name}": value for name, value in weights.items()}
    models.load_weights(target, save(tmp_path / "x.pth", {"state_dict": both}))
    torch.testing.assert_close(logits(target), logits(source))
    both = {name.replace("teacher", "other"): value for name, value in both.items()}
    with pytest.raises(UserError, match="2 networks.*student_backbone"):
        models.load_weights(target, save(tmp_path / "x.pth", both))


@pytest.mark.parametrize("load", [models.load_weights, models.finetune])
@pytest.mark.parametrize(("name", "in_file"), [(PLAIN, True), (PLAIN, False), (DISTILLED, False)])
def test_entries_of_tokens_in_the_position_embedding_move_without_a_change_of_logits(
    load: Callable, name: str, in_file: bool, tmp_path: Path
) -> None:
    class_entries = {"no_embed_class": False}
    patches_only = {"no_embed_class": True}
    if name == DISTILLED:
        source, target = network_of(name), network_of(name, seed=1)
        with torch.no_grad():
            source.pos_embed[:, :2] = 0
        weights = source.state_dict()
        weights["pos_embed"] = weights["pos_embed"][:, 2:]
    else:
        source = network_of(name, **(class_entries if in_file else patches_only))
        target = network_of(name, seed=1, **(patches_only if in_file else class_entries))
        weights = source.state_dict()
    load(target, save(tmp_path / "x.pth", weights))
    torch.testing.assert_close(logits(target), logits(source))


def test_deit_3_files_fine_tune_at_another_resolution_with_their_layer_scale(
    tmp_path: Path,
) -> None:
    layers = {"no_embed_class": True, "init_values": 0.1}
    source = network_of(**layers)
    renamed = {
        re.sub(r"\.ls(\d)\.gamma", r".gamma_\1", name): value
        for name, value in source.state_dict().items()
    }
    path = save(tmp_path / "deit_3.pth", {"model": renamed})
    larger = network_of(seed=1, img_size=16, **layers)
    report = models.finetune(larger, path)
    assert report.resampled == ["pos_embed"] and not report.missing and not report.dropped
    assert torch.equal(larger.blocks[1].ls2.gamma, source.blocks[1].ls2.gamma)
    with pytest.raises(UserError) as caught:
        models.load_weights(larger, path)
    assert "2x2 patches, the model's 4x4 patches" in str(caught.value)
    assert "set --input-size 8," in str(caught.value)
    models.load_weights(network_of(seed=1, img_size=8, **layers), path)  # the advice


def test_a_patch_embedding_of_another_size_is_not_resampled_silently(tmp_path: Path) -> None:
    source = network_of(init_values=0.1)
    renamed = {
        re.sub(r"\.ls(\d)\.gamma", r".gamma_\1", name): value
        for name, value in source.state_dict().items()
    }
    path = save(tmp_path / "x.pth", renamed)
    with pytest.raises(UserError, match=r"\(12, 3, 4, 4\), model \(12, 3, 2, 2\)"):
        models.load_weights(network_of(init_values=0.1, patch_size=2, img_size=4), path)


@pytest.mark.parametrize("load", [models.load_weights, models.finetune])
def test_as_many_patches_in_another_stated_grid_are_another_resolution(
    load: Callable, tmp_path: Path
) -> None:
    source = network_of(img_size=(8, 32))  # 2x8 patches
    target = network_of(seed=1, img_size=(16, 16))
    with torch.no_grad():
        ramp = torch.linspace(0, 1, 8).repeat(2)  # grows to the right
        source.pos_embed[0, 1:] = ramp[:, None]
    settings = {"model": PLAIN, "input_size": [8, 32]}
    path = save(tmp_path / "x.pth", {"model": source.state_dict(), "args": settings})
    if load is models.load_weights:
        with pytest.raises(UserError, match=r"2x8 patches.*4x4 patches.*--input-size 8 32"):
            load(target, path)
    else:
        assert load(target, path).resampled == ["pos_embed"]
        rows = target.pos_embed[0, 1:, 0].reshape(4, 4)
        assert (rows.diff(dim=1) > 0).all() and rows.diff(dim=0).abs().max() < 1e-6
    bare = save(tmp_path / "bare.pth", source.state_dict())
    models.load_weights(network_of(seed=1, img_size=(8, 32)), bare)  # no grid is stated


def test_the_layout_of_a_file_is_read_from_its_number_of_entries() -> None:
    own = Layout(("cls_token",), (14, 14))

    def layout(entries: int, *tokens: str, stated: tuple[int, int] | None = None) -> Layout:
        weights = {name: torch.zeros(1, 1, 3) for name in tokens}
        weights["pos_embed"] = torch.zeros(1, entries, 3)
        return layout_of_file(weights, own, stated)

    assert layout(197, "cls_token") == Layout(("cls_token",), (14, 14))
    assert layout(196, "cls_token") == Layout((), (14, 14))  # DeiT III
    assert layout(198, "cls_token", "dist_token") == Layout(("cls_token", "dist_token"), (14, 14))
    assert layout(577, "cls_token") == Layout(("cls_token",), (24, 24))
    assert layout(17, "cls_token", stated=(2, 8)) == Layout(("cls_token",), (2, 8))
    with pytest.raises(UserError, match="200 entries"):
        layout(200, "cls_token")


def test_a_file_of_an_architecture_with_other_attention_heads_is_refused(tmp_path: Path) -> None:
    source = models.create_model("deit_pico_patch8_32")  # 4 heads
    target = timm.create_model(
        "vit_tiny_patch16_224",
        img_size=32,
        patch_size=8,
        embed_dim=64,
        depth=4,
        num_heads=2,
        num_classes=10,
    )
    settings = {"model": "deit_pico_patch8_32"}
    path = save(tmp_path / "x.pth", {"model": source.state_dict(), "args": settings})
    for load in (models.load_weights, models.finetune):
        with pytest.raises(UserError, match="deit_pico_patch8_32, which has 4 attention heads"):
            load(target, path)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda w: {k: v for k, v in w.items() if "head" not in k}, "has no classifier"),
        (lambda w: w | {"reg_token": torch.zeros(1, 4, 12)}, "4 register tokens"),
        (lambda w: w | {"decoder_embed.weight": torch.zeros(2, 2)}, "decoder_embed"),
    ],
)
def test_the_reason_of_a_refusal_is_the_true_one(change, words: str, tmp_path: Path) -> None:
    path = save(tmp_path / "x.pth", {"model": change(network_of().state_dict())})
    with pytest.raises(UserError) as caught:
        models.load_weights(network_of(seed=1), path)
    assert words in str(caught.value)
    assert "CNN" not in str(caught.value) and "square" not in str(caught.value)
    report = models.finetune(network_of(seed=1), path)
    assert report.share > 0.9


@pytest.mark.parametrize("name", [PLAIN, DISTILLED])
def test_a_new_head_starts_at_zero_and_the_first_loss_is_the_logarithm_of_the_classes(
    name: str, tmp_path: Path
) -> None:
    path = save(tmp_path / "x.pth", network_of(name).state_dict())
    network = network_of(name, seed=1, num_classes=7)
    report = models.finetune(network, path)
    heads = ["head", "head_dist"] if name == DISTILLED else ["head"]
    assert report.new_heads == heads
    assert f"new head at zero ({', '.join(heads)})" in report.describe()
    loss = nn.functional.cross_entropy(logits(network), torch.tensor([0, 3, 6]))
    assert loss.item() == pytest.approx(math.log(7), abs=1e-6)
    same = network_of(name, seed=1)
    assert models.finetune(same, path).new_heads == [] and logits(same).abs().max() > 0


def test_register_tokens_that_fine_tuning_drops_are_a_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    weights = network_of().state_dict() | {"reg_token": torch.zeros(1, 4, 12)}
    with caplog.at_level(logging.WARNING):
        models.finetune(network_of(seed=1), save(tmp_path / "x.pth", weights))
    assert "register tokens are dropped" in caplog.text


@pytest.mark.parametrize("classes", [0, 7])
def test_a_published_head_that_is_replaced_is_reported_and_the_new_one_starts_at_zero(
    classes: int, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    source = timm.create_model("vit_base_patch16_clip_224", **(SHAPE | {"num_classes": 64}))
    save_file(source.state_dict(), tmp_path / "model.safetensors")
    config = {
        "architecture": "vit_base_patch16_clip_224",
        "num_classes": 64,
        "model_args": SHAPE,
        "pretrained_cfg": {"input_size": [3, 8, 8], "num_classes": 64, "classifier": "head"},
    }
    (tmp_path / "config.json").write_text(json.dumps(config))
    name = f"local-dir:{tmp_path}"
    with caplog.at_level(logging.INFO):
        network = models.create_model(name, num_classes=classes, pretrained=True)
    assert "the published projection to 64 dimensions is dropped" in caplog.text
    assert ("new head of 7 classes starts at zero" in caplog.text) == (classes == 7)
    assert logits(network).shape == (3, classes or 12)
    assert (logits(network).abs().max() == 0) == (classes == 7)
    assert torch.equal(network.blocks[1].mlp.fc1.weight, source.blocks[1].mlp.fc1.weight)
    caplog.clear()
    models.create_model(name, num_classes=64, pretrained=True)
    assert not caplog.text


def test_another_input_than_in_training_is_put_in_words(tmp_path: Path) -> None:
    settings = {"model": "deit_pico_patch8_32", "input_size": [64], "mean": None, "std": None}
    settings |= {"interpolation": None, "eval_crop_ratio": 0.9}
    path = save(tmp_path / "x.pth", {"model": network_of().state_dict(), "args": settings})
    trained = models.build_input_config(Namespace(**settings))
    assert models.input_differences(path, "", trained) == []
    other = replace(trained, crop_ratio=1.0, mean=(0.0, 0.0, 0.0))
    assert models.input_differences(path, "", other) == [
        "crop_ratio was 0.9 and is 1.0",
        "mean was (0.5, 0.5, 0.5) and is (0.0, 0.0, 0.0)",
    ]
    bare = save(tmp_path / "bare.pth", network_of().state_dict())
    assert models.input_differences(bare, "", other) == []


def clip(network: nn.Module) -> dict[str, Tensor]:
    """Return the weights of a CLIP network of timm under OpenAI's names, with a text part."""
    found = {"positional_embedding": torch.ones(77, 12), "text_projection": torch.ones(12, 12)}
    names = [
        (r"^patch_embed\.proj\.", "conv1."),
        (r"^blocks\.", "transformer.resblocks."),
        (r"^norm_pre\.", "ln_pre."),
        (r"^norm\.", "ln_post."),
        (r"\.norm(\d)\.", r".ln_\1."),
        (r"\.attn\.qkv\.", ".attn.in_proj_"),
        (r"\.attn\.proj\.", ".attn.out_proj."),
        (r"\.mlp\.fc1\.", ".mlp.c_fc."),
        (r"\.mlp\.fc2\.", ".mlp.c_proj."),
    ]
    for name, value in network.state_dict().items():
        if name == "cls_token":
            name, value = "class_embedding", value[0, 0]
        elif name == "pos_embed":
            name, value = "positional_embedding", value[0]
        elif name == "head.weight":
            name, value = "proj", value.T
        elif name == "head.bias":
            continue
        for pattern, new in names:
            name = re.sub(pattern, new, name)
        found[f"visual.{name}"] = value
    return found


def test_positions_of_a_clip_file_are_resampled_by_fine_tuning_alone(tmp_path: Path) -> None:
    name = "vit_base_patch16_clip_224"
    source = network_of(name)
    source.head.bias.data.zero_()  # CLIP's projection has none
    path = save(tmp_path / "clip.pt", clip(source))
    same = network_of(name, seed=1)
    models.load_weights(same, path)
    torch.testing.assert_close(logits(same), logits(source))
    larger = network_of(name, seed=1, img_size=16)
    with pytest.raises(UserError, match="2x2 patches .* the model's 4x4 .*: another resolution"):
        models.load_weights(larger, path)
    report = models.finetune(larger, path)
    assert report.resampled == ["pos_embed"]
    old, new = source.pos_embed, larger.pos_embed
    torch.testing.assert_close(new[:, :1], old[:, :1])
    patches = old[:, 1:].unflatten(1, (2, 2)).permute(0, 3, 1, 2)
    wanted = nn.functional.interpolate(patches, (4, 4), mode="bicubic", antialias=True)
    torch.testing.assert_close(new[:, 1:], wanted.flatten(2).mT)


def test_a_table_of_relative_positions_of_another_size_is_not_resampled(tmp_path: Path) -> None:
    def swin(size: int) -> nn.Module:
        options = {"img_size": size, "window_size": size // 8, "embed_dim": 12, "depths": (1, 1)}
        return timm.create_model("swin_tiny_patch4_window7_224", num_heads=(2, 2), **options)

    weights = swin(32).state_dict() | {"layers.0.blocks.0.attn_mask": torch.ones(1)}
    path = save(tmp_path / "swin.pth", {"model": weights})
    with pytest.raises(UserError, match="relative_position_bias_table"):
        models.load_weights(swin(64), path)


def export_of(network: nn.Module, folder: Path, **config) -> str:
    """Write an export as timm reads it, and return the path of its weights."""
    save_file(network.state_dict(), folder / "model.safetensors")
    own = {"input_size": [3, 8, 8], "num_classes": 5} | config
    content = {"architecture": PLAIN, "num_classes": 5, "model_args": SHAPE, "pretrained_cfg": own}
    (folder / "config.json").write_text(json.dumps(content))
    return str(folder / "model.safetensors")


def test_another_input_than_an_exports_or_a_released_files_is_put_in_words(tmp_path: Path) -> None:
    path = export_of(network_of(), tmp_path, mean=[0.1, 0.2, 0.3], crop_pct=0.95)
    inputs = models.build_input_config(Namespace(model=PLAIN, **dict.fromkeys(models.INPUT_FLAGS)))
    assert models.input_differences(path, PLAIN, inputs) == [
        "crop_ratio was 0.95 and is 0.875",
        "input_size was (8, 8) and is (224, 224)",
        f"mean was (0.1, 0.2, 0.3) and is {inputs.mean}",
    ]
    name = "deit_small_patch16_LS"  # by default the file of 224 pixels
    given = Namespace(**dict.fromkeys(models.INPUT_FLAGS) | {"model": name})
    inputs = models.build_input_config(given)
    assert models.input_differences("", name, inputs) == []
    assert models.input_differences("", name, replace(inputs, crop_ratio=0.5)) == [
        "crop_ratio was 0.9 and is 0.5"
    ]
    released = save(tmp_path / "deit_3_small_384_1k.pth", {"model": network_of().state_dict()})
    assert models.input_differences(released, name, inputs) == [
        "crop_ratio was 1.0 and is 0.9",
        "input_size was (384, 384) and is (224, 224)",
    ]


def test_small_images_have_no_crop_to_differ_in(tmp_path: Path) -> None:
    path = export_of(network_of(), tmp_path, crop_pct=0.95)
    inputs = models.build_input_config(
        Namespace(model=f"local-dir:{tmp_path}", **dict.fromkeys(models.INPUT_FLAGS))
    )
    assert models.input_differences(path, PLAIN, replace(inputs, crop_ratio=0.5)) == []


@pytest.mark.parametrize(
    "config", [{"mean": "abc"}, {"std": [0, 0, 0]}, {"input_size": "abc"}, {"crop_pct": "x"}]
)
def test_a_damaged_config_of_an_export_is_one_line(config: dict, tmp_path: Path) -> None:
    path = export_of(network_of(), tmp_path, **config)
    with pytest.raises(UserError, match="pretrained_cfg in its config.json is damaged"):
        models.stated_input(path)


def test_published_positions_that_timm_resamples_are_a_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    export_of(network_of(), tmp_path)
    name = f"local-dir:{tmp_path}"
    models.create_model(name, pretrained=True, img_size=(8, 8))
    assert not caplog.text
    models.create_model(name, pretrained=True, img_size=(16, 16))
    assert "published for 8x8 pixels; resampled for 16x16: pos_embed" in caplog.text


def test_eval_prints_how_the_input_differs_from_an_exports(
    tmp_path: Path, image_folder: Path, run_inside
) -> None:
    network = timm.create_model("deit_pico_patch8_32", num_classes=2)
    save_file(network.state_dict(), tmp_path / "model.safetensors")
    config = {"input_size": [3, 32, 32], "mean": [0.1, 0.2, 0.3], "std": [0.5, 0.5, 0.5]}
    content = {"num_classes": 2, "label_names": ["one", "two"], "pretrained_cfg": config}
    (tmp_path / "config.json").write_text(json.dumps(content))
    flags = ["--eval", "--model", "deit_pico_patch8_32", "--data-path", str(image_folder)]
    flags += ["--resume", str(tmp_path / "model.safetensors"), "--num-workers", "0"]
    found = run_inside(*flags)
    assert found.returncode == 0, found.stderr
    assert "the input differs from that of the weights: mean was (0.1, 0.2, 0.3)" in found.stdout
    found = run_inside(*flags, "--mean", "0.1", "0.2", "0.3")
    assert "the input differs" not in found.stdout


def test_a_teacher_from_an_export_gets_the_exports_mean_and_std(tmp_path: Path) -> None:
    path = export_of(network_of(), tmp_path, mean=[0.1, 0.2, 0.3], std=[0.4, 0.5, 0.6])
    inputs = input_of(PLAIN, path)
    assert (inputs.input_size, inputs.mean) == ((8, 8), (0.1, 0.2, 0.3))
    assert inputs.std == (0.4, 0.5, 0.6)
