"""The released checkpoints: every name builds, and the original files give timm's logits."""

import functools
import re
import subprocess
import sys
from pathlib import Path

import pytest
import timm
import torch
from timm.models.deit import VisionTransformerDistilled
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

import models
from base import safe_load
from base.errors import UserError
from models import released
from models.deit import VITS
from models.released import NETWORKS, RELEASED

# Of each class: the small networks, another resolution, and more classes.
FILES = [
    "deit_small_patch16_LS.224_1k",
    "deit_small_patch16_LS.384_1k",
    "deit_small_patch16_LS.224_21k",
    "cait_XXS24_224.dist",
    "cait_XXS24.dist",
    "resmlp_12.dist",
    "resmlp_12.no_dist",
]


@functools.cache
def on_meta(name: str) -> nn.Module:
    with torch.device("meta"):
        return timm.create_model(name)


@pytest.mark.parametrize("name", RELEASED)
def test_every_released_name_builds_with_its_resolution(name: str) -> None:
    network, same = on_meta(name), on_meta(RELEASED[name].timm)
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


@pytest.mark.parametrize("name", FILES)
@torch.no_grad()
def test_an_original_file_gives_timms_logits(name: str, tmp_path: Path) -> None:
    same, network = shallow(RELEASED[name].timm), shallow(name)
    for number, value in enumerate(same.state_dict().values()):
        torch.manual_seed(number)
        value.copy_(0.05 * torch.randn_like(value) + (value.dim() == 1))
    torch.save(original(same), tmp_path / "file.pth")
    models.load_weights(network, str(tmp_path / "file.pth"))
    images = torch.randn(1, 3, *network.pretrained_cfg["input_size"][1:])
    torch.testing.assert_close(network(images), same(images), rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", [name for name, vit in VITS.items() if vit.file])
@torch.no_grad()
def test_an_original_deit_file_gives_the_logits_of_timms_class(name: str, tmp_path: Path) -> None:
    """DeiT's eight names are timm's too, so timm's classes are taken themselves."""
    theirs = VisionTransformerDistilled if "distilled" in name else VisionTransformer
    vit, network = VITS[name], shallow(name)
    same = theirs(
        img_size=vit.pixels, embed_dim=vit.width, depth=2, num_heads=vit.heads, num_classes=7
    ).eval()
    torch.save(original(same), tmp_path / "file.pth")
    models.load_weights(network, str(tmp_path / "file.pth"))
    images = torch.randn(1, 3, vit.pixels, vit.pixels)
    torch.testing.assert_close(network(images), same(images), rtol=0, atol=1e-5)


def test_a_wrong_file_is_refused_with_what_it_seems_to_be(tmp_path: Path) -> None:
    cait = timm.create_model("cait_XXS24_224", depth=1)
    torch.save(original(cait), tmp_path / "cait.pth")
    with pytest.raises(UserError, match="it looks like a CaiT of width 192, depth 1, patch 16"):
        models.load_weights(
            timm.create_model("deit_small_patch16_LS", depth=1), str(tmp_path / "cait.pth")
        )


@pytest.mark.parametrize("name", [*NETWORKS, *(name for name, vit in VITS.items() if vit.file)])
def test_every_family_is_known_by_its_files_of_old_and_new_names(name: str) -> None:
    network = on_meta(name)
    old = original(network)
    old = {key.removeprefix("module."): value for key, value in old.get("model", old).items()}
    for weights in (network.state_dict(), old):
        found = models.file_layouts.seems_to_be(weights).partition(" (")[0]
        assert found.removesuffix("_224").removesuffix("_384") == (
            name.removesuffix("_224").removesuffix("_384")
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

    monkeypatch.setattr(safe_load, "fetch", fetch)
    network = models.create_model("deit_small_patch16_LS", pretrained=True)
    assert torch.equal(network.head.weight, source.head.weight)
    other = models.create_model(
        "deit_small_patch16_LS.224_1k", pretrained=True, num_classes=7, img_size=(64, 64)
    )
    assert other.head.weight.shape[0] == 7 and other.pos_embed.shape[1] == 16
    assert torch.equal(other.blocks[3].mlp.fc1.weight, source.blocks[3].mlp.fc1.weight)
    assert set(asked) == {RELEASED["deit_small_patch16_LS.224_1k"].url}


def test_a_file_without_published_hash_is_held_to_its_first_download(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    monkeypatch.setattr(
        torch.hub, "download_url_to_file", lambda url, place, **_: Path(place).write_bytes(b"first")
    )
    url = RELEASED["cait_XS24.dist"].url
    with pytest.raises(UserError, match="has no hash"):
        safe_load.fetch(url.partition("#")[0])
    place = safe_load.fetch(url)
    assert safe_load.fetch(url) == place
    place.write_bytes(b"second")
    with pytest.raises(UserError, match="was asked; delete it"):
        safe_load.fetch(url)


def test_the_documentation_counts_the_files_without_hash() -> None:
    without = [found for found in RELEASED.values() if found.url.endswith("#unverified")]
    text = (Path(__file__).parents[1] / "docs" / "training.md").read_text()
    assert f"No hash is published for {len(without)} other files" in " ".join(text.split())


def test_the_published_number_stands_beside_one_of_the_full_set_only() -> None:
    found = released.published("x", "/disk/deit_small_patch16_224-cd65a155.pth")
    assert "79.854%" in found.beside(79.8, 50_000) and "-0.054" in found.beside(79.8, 50_000)
    assert found.beside(79.8, 1000) == ""
    assert released.published("deit_small_patch16_224", "own.pth") is None
    assert released.find("regnety_160") is RELEASED["regnety_160.deit_in1k"]
    assert released.find("regnety_160.sw_in12k") is None


@pytest.mark.parametrize(
    ("pattern", "count"),
    [
        ("deit_small_patch16_LS", 4),
        ("SMALL_patch16_ls", 4),
        ("384_21k", 3),
        ("cait_*", 10),
        ("resmlp_?2", 3),
        ("*", len(RELEASED)),
        ("deit_base_patch16_384", 1),
    ],
)
def test_the_table_lists_what_matches_a_part_or_a_wildcard(pattern: str, count: int) -> None:
    lines = [line.split()[0] for line in released.table(pattern).splitlines()]
    assert lines[0] == "name" and len([line for line in lines if line in RELEASED]) == count


def test_the_table_has_a_hash_where_one_is_published() -> None:
    rows = [line.split() for line in released.table().splitlines() if line.split()[0] in RELEASED]
    assert {row[4] for row in rows if "deit_tiny_patch16" in row[0]} == {"a1311bcf"}
    assert sum(row[4] == "-" for row in rows) == sum(
        file.url.endswith("#unverified") for file in RELEASED.values()
    )
    assert "PatchConv" in (released.__doc__ or "")
    assert "timm also" not in released.table() and "timm also" in released.table("cait_*")


def test_a_pattern_that_nothing_matches_ends_in_one_line_and_code_2(run_inside) -> None:
    result = run_inside("--list-models", "deit_smal_patch16_224")
    assert result.returncode == 2 and not result.stdout
    assert "no released checkpoint; did you mean deit_small_patch16_224 or" in result.stderr
    assert "timm has resnet50" in run_inside("--list-models", "resnet50").stderr
    assert "timm has no PatchConvNet" in run_inside("--list-models", "patchconv*").stderr
    assert "--list-models alone" in run_inside("--list-models", "???").stderr
    assert run_inside("--list-models", "resmlp_12").returncode == 0


def test_torch_hub_serves_the_same_names_with_what_it_says_it_needs() -> None:
    code = """if True:
        import sys
        import torch
        sys.modules |= dict.fromkeys(["sklearn", "submitit", "simplejpeg", "tensorboard"])
        sys.path.insert(0, sys.argv[1])
        import hubconf  # whose public callables are what torch.hub.list shows
        names = [name for name in dir(hubconf)
                 if callable(getattr(hubconf, name)) and name[0] != "_"]
        with torch.device("meta"):
            network = torch.hub.load(sys.argv[1], "deit_small_patch16_LS", source="local",
                                     tag="384_1k", num_classes=7)
        print(*names, *network.pos_embed.shape, *network.head.weight.shape)
    """
    root = Path(__file__).parents[1]
    said = subprocess.run(
        [sys.executable, "-c", code, str(root)],
        capture_output=True,
        text=True,
        timeout=300,
        cwd=root.parent,
    )
    assert said.returncode == 0, said.stderr
    *names, _, tokens, width, classes, _ = said.stdout.split()
    assert set(names) == {key.partition(".")[0] for key in RELEASED}
    assert (tokens, width, classes) == ("576", "384", "7")


@pytest.mark.slow
def test_an_evaluation_of_all_images_prints_the_published_number(
    run_inside, image_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = "deit_pico_patch8_32"
    path = tmp_path / "deit_tiny_patch16_224-a1311bcf.pth"
    torch.save({"model": models.create_model(name, num_classes=2).state_dict()}, path)
    flags = [
        "--eval",
        "--model",
        name,
        "--data-path",
        str(image_folder),
        "--num_workers",
        "0",
        "--resume",
        str(path),
    ]
    assert "published:" not in run_inside(*flags).stdout
    monkeypatch.setattr(released, "FULL_VALIDATION_SET", 12)
    assert "published: 72.202% for deit_tiny_patch16_224-a1311bcf.pth" in run_inside(*flags).stdout
