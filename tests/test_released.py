"""The released checkpoints: every name builds, and the original files give timm's logits."""

import re
from pathlib import Path

import pytest
import timm
import torch
from torch import Tensor, nn

import checkpoint
import models
from errors import UserError
from models import released
from models.released import NETWORKS, RELEASED

FIRST = {name: next(key for key in RELEASED if key.startswith(f"{name}.")) for name in NETWORKS}


@pytest.mark.parametrize("name", RELEASED)
def test_every_released_name_builds_with_its_resolution(name: str) -> None:
    with torch.device("meta"):
        network = timm.create_model(name)
        same = timm.create_model(RELEASED[name].timm)
    shapes = [{k: v.shape for k, v in n.state_dict().items()} for n in (network, same)]
    assert shapes[0] == shapes[1]
    assert network.pretrained_cfg["input_size"][1:] == (RELEASED[name].pixels,) * 2
    assert network.pretrained_cfg["mean"] == same.pretrained_cfg["mean"]


@pytest.mark.parametrize("name", RELEASED)
def test_a_file_is_where_timm_looks_for_it(name: str) -> None:
    url = timm.models.get_pretrained_cfg(RELEASED[name].timm).url
    assert url == RELEASED[name].url.removesuffix("#unverified")


def original(network: nn.Module) -> dict[str, Tensor | dict]:
    """Return the weights of a timm network as DeiT's code would have written the file."""
    weights = network.state_dict()
    if type(network).__name__ == "Cait":
        return {"model": {f"module.{name}": value for name, value in weights.items()}}
    if type(network).__name__ == "MlpMixer":
        old = {}
        for name, value in weights.items():
            name = name.replace("stem.", "patch_embed.").replace("linear_tokens.", "attn.")
            name = re.sub(r"\.ls(\d)", r".gamma_\1", name.replace("mlp_channels.", "mlp."))
            old[name] = value.flatten() if name.endswith(("alpha", "beta")) else value
        return old
    rename = deit3_name if any(".ls1." in name for name in weights) else str
    return {"model": {rename(name): value for name, value in weights.items()}}


def deit3_name(name: str) -> str:
    return re.sub(r"\.ls(\d)\.gamma", r".gamma_\1", name)


def shallow(name: str) -> nn.Module:
    """Return a network of two blocks and seven classes, for speed."""
    if "resmlp" not in name:
        return timm.create_model(name, depth=2, num_classes=7).eval()
    network = timm.create_model(name, num_classes=7)  # timm fixes num_blocks
    network.blocks = network.blocks[:2]
    return network.eval()


@pytest.mark.parametrize("name", NETWORKS)
@torch.no_grad()
def test_an_original_file_gives_timms_logits(name: str, tmp_path: Path) -> None:
    same, network = shallow(RELEASED[FIRST[name]].timm), shallow(name)
    for number, value in enumerate(same.state_dict().values()):
        torch.manual_seed(number)
        value.copy_(0.05 * torch.randn_like(value) + (value.dim() == 1))
    torch.save(original(same), tmp_path / "file.pth")
    models.load_weights(network, str(tmp_path / "file.pth"))
    images = torch.randn(1, 3, *network.pretrained_cfg["input_size"][1:])
    torch.testing.assert_close(network(images), same(images), rtol=0, atol=1e-5)


def test_a_wrong_file_is_refused_with_what_it_seems_to_be(tmp_path: Path) -> None:
    cait = timm.create_model("cait_XXS24_224", depth=1)
    torch.save(original(cait), tmp_path / "cait.pth")
    with pytest.raises(UserError, match="it looks like a ViT of width 192, depth 1, patch 16"):
        models.load_weights(
            timm.create_model("deit_small_patch16_LS", depth=1), str(tmp_path / "cait.pth")
        )


def test_training_from_scratch_follows_deit_not_timm() -> None:
    vit = timm.create_model("deit_small_patch16_LS", depth=3, drop_path_rate=0.2)
    assert {block.drop_path1.drop_prob for block in vit.blocks} == {0.2}
    assert {round(block.ls1.gamma[0].item(), 8) for block in vit.blocks} == {1e-4}
    mlp = timm.create_model("resmlp_12", num_blocks=2, drop_path_rate=0.2)
    assert {round(block.ls1[0].item(), 6) for block in mlp.blocks} == {0.1}
    assert {block.drop_path.drop_prob for block in mlp.blocks} == {0.2}


def test_pretrained_loads_the_released_file_strictly_or_for_another_task(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = timm.create_model("deit3_small_patch16_224")
    asked = []
    torch.save(original(source), tmp_path / "file.pth")

    def fetch(url: str) -> Path:
        asked.append(url)
        return tmp_path / "file.pth"

    monkeypatch.setattr(checkpoint, "fetch", fetch)
    network = models.create_model("deit_small_patch16_LS", pretrained=True)
    assert torch.equal(network.head.weight, source.head.weight)
    other = models.create_model("deit_small_patch16_LS.224_1k", pretrained=True, num_classes=7,
                                img_size=(64, 64))  # fmt: skip
    assert other.head.weight.shape[0] == 7 and other.pos_embed.shape[1] == 16
    assert torch.equal(other.blocks[3].mlp.fc1.weight, source.blocks[3].mlp.fc1.weight)
    assert set(asked) == {RELEASED["deit_small_patch16_LS.224_1k"].url}


def test_a_file_without_published_hash_is_held_to_its_first_download(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    monkeypatch.setattr(torch.hub, "download_url_to_file",
                        lambda url, place, **_: Path(place).write_bytes(b"first"))  # fmt: skip
    url = RELEASED["cait_XS24.dist"].url
    with pytest.raises(UserError, match="tells no hash"):
        checkpoint.fetch(url.partition("#")[0])
    place = checkpoint.fetch(url)
    assert checkpoint.fetch(url) == place
    place.write_bytes(b"second")
    with pytest.raises(UserError, match="was asked; delete it"):
        checkpoint.fetch(url)


def test_the_readme_counts_the_files_without_hash() -> None:
    without = [found for found in RELEASED.values() if found.url.endswith("#unverified")]
    text = (Path(__file__).parents[1] / "README.md").read_text()
    assert f"for the {len(without)} others none is published" in " ".join(text.split())


def test_the_published_number_stands_beside_one_of_the_full_set_only() -> None:
    found = released.published("x", "/disk/deit_small_patch16_224-cd65a155.pth")
    assert "79.854%" in found.beside(79.8, 50_000) and "-0.054" in found.beside(79.8, 50_000)
    assert found.beside(79.8, 1000) == ""
    assert released.published("deit_small_patch16_224", "own.pth") is None
    assert released.find("regnety_160") is RELEASED["regnety_160.deit_in1k"]
    assert released.find("regnety_160.sw_in12k") is None


def test_the_table_lists_what_matches() -> None:
    lines = released.table("deit_small_patch16_LS").splitlines()
    assert len(lines) == 5 and "deit_3_small_384_21k.pth" in lines[4]
    assert "PatchConv" in (released.__doc__ or "")


def test_hub_serves_the_same_names() -> None:
    import hubconf

    assert {key.partition(".")[0] for key in RELEASED} <= set(vars(hubconf))
    with torch.device("meta"):
        network = hubconf.deit_small_patch16_LS(tag="384_1k")
    assert network.pos_embed.shape == (1, 24 * 24, 384)


@pytest.mark.slow
def test_an_evaluation_of_all_pictures_prints_the_published_number(
    run_inside, picture_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = "deit_pico_patch8_32"
    path = tmp_path / "deit_tiny_patch16_224-a1311bcf.pth"
    torch.save({"model": models.create_model(name, num_classes=2).state_dict()}, path)
    flags = ["--eval", "--model", name, "--data-path", str(picture_folder), "--num_workers", "0",
             "--resume", str(path)]  # fmt: skip
    assert "published:" not in run_inside(*flags).stdout
    monkeypatch.setattr(released, "FULL_VALIDATION_SET", 12)
    assert "published: 72.202% for deit_tiny_patch16_224-a1311bcf.pth" in run_inside(*flags).stdout
