"""Recipes: each parses, resolves to the paper's batch and learning rate, and keeps its batch."""

import pytest

import models
import optim
import options
import recipe
from errors import UserError

# From the papers and READMEs: effective batch, learning rate at it, epochs, Acc@1.
PUBLISHED = {
    "deit_tiny_none": (1024, 1e-3, 300, 72.2),
    "deit_tiny_soft": (1024, 1e-3, 300, 72.2),
    "deit_tiny_hard": (1024, 1e-3, 300, 74.3),
    "deit_tiny_token": (1024, 1e-3, 300, 74.5),
    "deit_small_none": (1024, 1e-3, 300, 79.8),
    "deit_small_soft": (1024, 1e-3, 300, 79.8),
    "deit_small_hard": (1024, 1e-3, 300, 80.9),
    "deit_small_token": (1024, 1e-3, 300, 81.2),
    "deit_base_none": (1024, 1e-3, 300, 81.8),
    "deit_base_soft": (1024, 1e-3, 300, 81.8),
    "deit_base_hard": (1024, 1e-3, 300, 83.0),
    "deit_base_token": (1024, 1e-3, 300, 83.4),
    "deit_base_384": (512, 5e-6, 30, 83.1),
    "deit_base_token_384": (512, 5e-6, 30, 84.5),
    "cifar10_deit_base": (768, 1e-2, 1000, 99.1),
    "cifar10_deit_base_token": (768, 1e-2, 1000, 99.1),
    "cifar100_deit_base": (768, 1e-2, 1000, 90.8),
    "cifar100_deit_base_token": (768, 1e-2, 1000, 91.3),
    "deit3_small": (2048, 4e-3, 800, 81.4),
    "deit3_base": (2048, 3e-3, 800, 83.8),
    "deit3_large": (2048, 3e-3, 800, 84.9),
    "deit3_huge": (2048, 3e-3, 800, 85.2),
    "deit3_base_224": (512, 1e-5, 20, 83.8),
    "deit3_large_224": (512, 1e-5, 20, 84.9),
    "deit3_huge_224": (512, 1e-5, 20, 85.2),
    "deit3_small_384": (512, 1e-5, 20, 83.4),
}


def parse(name: str, *flags: str) -> options.Options:
    given = ["--finetune", "x.pth"] if recipe.find(name).needs else []
    return options.parse_args(["--recipe", name, "--data-path", "x", *given, *flags])


def world(monkeypatch: pytest.MonkeyPatch, size: int) -> None:
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", str(size))


def test_every_published_recipe_has_a_row_here() -> None:
    assert set(recipe.names()) == set(PUBLISHED) | {"quickstart"}


@pytest.mark.parametrize("processes", [1, 8])
@pytest.mark.parametrize("name", PUBLISHED)
def test_a_recipe_resolves_to_the_papers_batch_and_rate(
    name: str, processes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    world(monkeypatch, processes)
    batch, lr, epochs, acc1 = PUBLISHED[name]
    settings = parse(name)
    args = settings.args
    assert args.batch_size * processes * args.grad_accum_steps == batch
    student = models.Student(models.create_model("deit_pico_patch8_32"))
    assert optim.build_optimizer(args, student, processes)[1] == pytest.approx(lr)
    assert (args.epochs, recipe.find(name).acc1) == (epochs, acc1)
    assert all("keeps the effective batch" in note for note in settings.notes)
    models.data_config(args.model)  # raises for a name nobody knows
    if args.distillation_type != "none":
        assert models.released.find(args.teacher_model).file == "regnety_160-a5fe301d.pth"


def test_what_the_command_line_says_wins_and_is_shown() -> None:
    settings = parse("deit_tiny_soft", "--epochs", "5", "--distillation-tau", "1", "--seed", "3")
    assert (settings.args.epochs, settings.args.distillation_tau) == (5, 1)
    assert settings.args.distillation_alpha == 0.1 and "of 1024" in settings.notes[-1]
    assert "--distillation-tau 1.0 instead of 3.0" in settings.notes[0]


@pytest.mark.parametrize(
    ("processes", "flags", "batch", "accum"),
    [
        (4, "", 256, 1),
        (1, "", 256, 4),
        (16, "", 64, 1),  # too many processes for 256 each
        (2, "--batch-size 64", 64, 8),
        (1, "--batch-size 100", 100, 1),  # no whole number: told, not changed
        (3, "", 256, 1),
        (1, "--grad-accum-steps 2", 256, 2),
    ],
)
def test_the_effective_batch_is_kept_or_its_change_is_told(
    processes: int, flags: str, batch: int, accum: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    world(monkeypatch, processes)
    settings = parse("deit_tiny_none", *flags.split())
    assert (settings.args.batch_size, settings.args.grad_accum_steps) == (batch, accum)
    told = [note for note in settings.notes if "instead of 1024" in note]
    assert bool(told) == (batch * accum * processes != 1024)


def test_an_unknown_recipe_names_the_known_and_a_missing_start_is_asked_for() -> None:
    with pytest.raises(UserError, match="deit_tiny_token"):
        options.parse_args(["--recipe", "deit_tiny_tokens"])
    with pytest.raises(UserError, match="the checkpoint of deit3_base"):
        options.parse_args(["--recipe", "deit3_base_224", "--data-path", "x"])


def test_a_recipe_of_ones_own_is_a_file(tmp_path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text("flags: {model: resnet18, epochs: 7, data-set: DIGITS}")
    args = options.parse_args(["--recipe", str(path)]).args
    assert (args.model, args.epochs) == ("resnet18", 7)
    path.write_text("flags: {modle: resnet18}")
    with pytest.raises(UserError, match="modle"):
        options.parse_args(["--recipe", str(path)])


def test_the_expected_accuracy_stands_beside_the_one_reached() -> None:
    found = recipe.find("deit_tiny_token")
    assert "within" in found.beside(74.2) and "outside" in found.beside(70)
    assert recipe.find("quickstart").beside(90) == ""
