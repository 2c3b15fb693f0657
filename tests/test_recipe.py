"""Recipes: each parses, resolves to the paper's batch and learning rate, and keeps its batch."""

import pytest

import models
import options
from base.errors import UserError
from training import optim, recipe

# What the sources say, written down from them and not from the files that are tested.
TABLE_9 = """--opt adamw --sched cosine --lr 5e-4 --weight-decay 0.05 --epochs 300 --warmup-epochs 5
    --smoothing 0.1 --drop 0 --drop-path 0.1 --repeated-aug --aa rand-m9-mstd0.5-inc1 --mixup 0.8
    --cutmix 1 --reprob 0.25"""  # of arXiv 2012.12877
TEACHER = " --teacher-model regnety_160.deit_in1k --distillation-type "  # RegNetY-16GF
SOFT = TEACHER + "soft --distillation-tau 3 --distillation-alpha 0.1"  # section 6, lambda
FINE_384 = (
    TABLE_9
    + """ --input-size 384 --lr 5e-6 --min-lr 5e-6 --weight-decay 1e-8 --epochs 30
    --no-train-mode"""
)  # README_deit.md
ISSUE_45 = (
    TABLE_9
    + """ --opt sgd --lr 0.01 --unscale-lr --weight-decay 1e-4 --epochs 1000
    --reprob 0 --drop-path 0"""
)  # facebookresearch/deit
REVENGE = """--sched cosine --unscale-lr --warmup-epochs 5 --warmup-lr 1e-6 --drop 0 --reprob 0
    --cutmix 1"""  # README_revenge.md, whose four groups of commands follow
PRE_1K = (
    REVENGE
    + """ --opt lamb --weight-decay 0.05 --epochs 800 --smoothing 0 --mixup 0.8
    --repeated-aug --bce-loss --color-jitter 0.3 --ThreeAugment"""
)
FINE_1K = (
    REVENGE
    + """ --opt adamw --lr 1e-5 --weight-decay 0.1 --epochs 20 --smoothing 0.1
    --mixup 0.8 --no-repeated-aug --aa rand-m9-mstd0.5-inc1"""
)
PRE_21K = (
    REVENGE
    + """ --opt lamb --lr 1e-3 --weight-decay 0.02 --epochs 240 --smoothing 0.1
    --mixup 0 --no-repeated-aug --color-jitter 0.3 --ThreeAugment --src"""
)
FINE_21K = PRE_21K + " --input-size 224 --lr 3e-4 --epochs 50"

# name: (images an update, learning rate at it, Acc@1 or None, model, flags). Accuracies: Tables
# 3, 5 and 7 of arXiv 2012.12877, and README_revenge.md. Images: Table 9, issue 45, and processes
# times --batch of the READMEs' commands.
PUBLISHED = {
    f"deit_{size}_{kind}": (1024, 1e-3, acc1, f"deit_{size}_{model}", TABLE_9 + flags)
    for size, found in (
        ("tiny", (72.2, 72.2, 74.3, 74.5, 76.6)),
        ("small", (79.8, 79.8, 80.9, 81.2, 82.6)),
        ("base", (81.8, 81.8, 83.0, 83.4, 84.2)),
    )
    for acc1, (kind, model, flags) in zip(
        found,
        (
            ("none", "patch16_224", ""),
            ("soft", "patch16_224", SOFT),
            ("hard", "patch16_224", TEACHER + "hard"),
            ("token", "distilled_patch16_224", TEACHER + "hard"),
            ("token_1000", "distilled_patch16_224", TEACHER + "hard --epochs 1000"),
        ),
    )
}
for _name, _acc1, _model, _flags in (
    ("384", 83.1, "patch16_384", ""),
    ("soft_384", 83.2, "patch16_384", SOFT),
    ("hard_384", 84.0, "patch16_384", TEACHER + "hard"),
    ("token_384", 84.5, "distilled_patch16_384", TEACHER + "hard"),
    ("token_1000_384", 85.2, "distilled_patch16_384", TEACHER + "hard"),
):
    PUBLISHED[f"deit_base_{_name}"] = (512, 5e-6, _acc1, f"deit_base_{_model}", FINE_384 + _flags)
for _data, _set, _accuracies in (("10", "CIFAR10", (99.1, 99.1)), ("100", "CIFAR", (90.8, 91.3))):
    for _acc1, _token, _model in zip(_accuracies, ("", "_token"), ("", "distilled_")):
        PUBLISHED[f"cifar{_data}_deit_base{_token}"] = (
            768,
            0.01,
            _acc1,
            f"deit_base_{_model}patch16_224",
            f"{ISSUE_45} --data-set {_set}",
        )
for _name, _batch, _lr, _acc1, _model, _flags in (
    ("small", 8 * 256, 4e-3, 81.4, "small_patch16", f"{PRE_1K} --input-size 224 --drop-path 0.05"),
    ("base", 8 * 256, 3e-3, None, "base_patch16", f"{PRE_1K} --input-size 192 --drop-path 0.2"),
    ("large", 32 * 64, 3e-3, None, "large_patch16", f"{PRE_1K} --input-size 192 --drop-path 0.45"),
    ("huge", 32 * 64, 3e-3, None, "huge_patch14", f"{PRE_1K} --input-size 160 --drop-path 0.6"),
    ("base_224", 8 * 64, 1e-5, 83.8, "base_patch16", f"{FINE_1K} --input-size 224 --drop-path 0.2"),
    (
        "large_224",
        8 * 64,
        1e-5,
        84.9,
        "large_patch16",
        f"{FINE_1K} --input-size 224 --drop-path 0.45",
    ),
    (
        "huge_224",
        16 * 32,
        1e-5,
        85.2,
        "huge_patch14",
        f"{FINE_1K} --input-size 224 --drop-path 0.55",
    ),
    ("small_384", 8 * 64, 1e-5, 83.4, "small_patch16", f"{FINE_1K} --input-size 384 --drop-path 0"),
    (
        "small_21k",
        16 * 128,
        1e-3,
        None,
        "small_patch16",
        f"{PRE_21K} --input-size 224 --drop-path 0.05",
    ),
    (
        "base_21k",
        32 * 64,
        1e-3,
        None,
        "base_patch16",
        f"{PRE_21K} --input-size 224 --drop-path 0.1",
    ),
    (
        "large_21k",
        32 * 64,
        1e-3,
        None,
        "large_patch16",
        f"{PRE_21K} --input-size 224 --drop-path 0.3",
    ),
    (
        "huge_21k",
        32 * 64,
        1e-3,
        None,
        "huge_patch14",
        f"{PRE_21K} --input-size 128 --drop-path 0.5 --epochs 90",
    ),
    ("small_21k_1k", 16 * 128, 3e-4, 83.1, "small_patch16", f"{FINE_21K} --drop-path 0.05"),
    ("base_21k_1k", 32 * 64, 3e-4, 85.7, "base_patch16", f"{FINE_21K} --drop-path 0.15"),
    ("large_21k_1k", 32 * 64, 3e-4, 87.0, "large_patch16", f"{FINE_21K} --drop-path 0.4"),
    ("huge_21k_1k", 32 * 64, 3e-4, 87.2, "huge_patch14", f"{FINE_21K} --drop-path 0.45"),
):
    PUBLISHED[f"deit3_{_name}"] = (_batch, _lr, _acc1, f"deit_{_model}_LS", f"{_flags} --lr {_lr}")
MACHINE = {"recipe", "batch_size", "grad_accum_steps", "finetune"}  # not the source's business


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
    batch, lr, acc1, model, _ = PUBLISHED[name]
    settings = parse(name)
    args = settings.args
    assert args.batch_size * processes * args.grad_accum_steps == batch
    student = models.Student(models.create_model("deit_pico_patch8_32"))
    assert optim.build_optimizer(args, student, processes)[1] == pytest.approx(lr)
    assert (args.model, recipe.find(name).acc1) == (model, acc1)
    assert settings.notes == () and recipe.find(name).expects() in settings.about[0]
    models.data_config(args.model)  # raises for a name nobody knows
    if args.distillation_type != "none":
        assert models.released.find(args.teacher_model).file == "regnety_160-a5fe301d.pth"


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_recipe_has_the_flags_of_its_source_and_no_other(name: str) -> None:
    _, _, _, model, flags = PUBLISHED[name]
    wanted = vars(options.parse_args(["--data-path", "x", "--model", model, *flags.split()]).args)
    found = vars(parse(name).args)
    differ = {flag: (found[flag], wanted[flag]) for flag in wanted if found[flag] != wanted[flag]}
    assert set(differ) <= MACHINE, differ


def test_what_the_command_line_says_wins_and_is_shown() -> None:
    settings = parse("deit_tiny_soft", "--epochs", "5", "--distillation-tau", "1", "--seed", "3")
    assert (settings.args.epochs, settings.args.distillation_tau) == (5, 1)
    assert settings.args.distillation_alpha == 0.1
    expected, tau, batch = settings.about
    assert expected.startswith("recipe deit_tiny_soft: 72.2 ± 0.4% expected (DeiT (arXiv")
    assert "--distillation-tau 1.0 instead of 3.0" in tau
    assert "--grad-accum-steps 4 keeps the effective batch of 1024" in batch


def test_what_a_recipe_switches_on_the_command_line_can_switch_off() -> None:
    known = options.get_args_parser()._option_string_actions
    for name in recipe.names():
        for flag, value in recipe.find(name).flags.items():
            if isinstance(value, bool):
                assert f"--no-{flag.replace('_', '-')}" in known, flag
    settings = parse("deit3_small_21k", "--no-src", "--no-unscale-lr")
    assert not settings.args.src and not settings.args.unscale_lr and settings.notes == ()


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
    with pytest.raises(
        UserError, match="unknown; did you mean deit_tiny_token or .*known: auto, none, c"
    ):
        options.parse_args(["--recipe", "deit_tiny_tokens"])
    with pytest.raises(UserError, match="mine.yaml: not there"):
        options.parse_args(["--recipe", "mine.yaml"])
    with pytest.raises(UserError, match="the checkpoint of deit3_base"):
        options.parse_args(["--recipe", "deit3_base_224", "--data-path", "x"])


def test_a_recipe_of_ones_own_is_a_file(tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text("flags: {model: resnet18, epochs: 7, data-set: DIGITS}")
    args = options.parse_args(["--recipe", str(path)]).args
    assert (args.model, args.epochs) == ("resnet18", 7)
    path.write_text("flags: {data-set: DIGITS, input-size: 40, teacher-path: here.pth}")
    monkeypatch.chdir(tmp_path)
    args = options.parse_args(["--recipe", "mine.yaml"]).args
    assert (args.input_size, args.teacher_path) == ([40], "here.pth")  # not the repository's


def test_a_recipe_without_a_data_set_reads_folders_or_the_digits(tmp_path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text("flags: {model: resnet18}")
    for words, data_set in ((["--data-path", "x"], "IMNET"), ([], "DIGITS")):
        assert options.parse_args(["--recipe", str(path), *words]).args.data_set == data_set


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("flags: {modle: resnet18}", "modle"),
        ("flags: {distillation-type: medium}", "'medium'; give none, soft, hard"),
        ("flags: {epochs: many}", "epochs: found 'many', expected a whole number"),
        ("flags: {epochs: [1]}", r"epochs: found \[1\], expected a whole number"),
        ("flags: {epochs: -1}", "--epochs -1: must be at least 0"),
        ("flags: {}\nneeds: {nosuchflag: x}", "needs: unknown flag 'nosuchflag'"),
        ("flags: {}\nexpected: {acc1: abc}", "expected.acc1: found 'abc', expected a number"),
        ("flags: {}\nexpected: {acc: 1}", "expected: unknown key 'acc'"),
        ("flags: [epochs", "not readable as YAML"),
        ("epochs: 3", "lacks `flags:`"),
        ("flags: {epochs: 3}\nexpected: 70", "expected: found 70, expected names with values"),
    ],
)
def test_a_faulty_recipe_of_ones_own_is_one_line(text: str, words: str, tmp_path) -> None:
    (tmp_path / "mine.yaml").write_text(text)
    with pytest.raises(UserError, match=words) as caught:
        options.parse_args(["--recipe", str(tmp_path / "mine.yaml")])
    assert "\n" not in caught.value.line()


def test_the_expected_accuracy_stands_beside_the_one_reached() -> None:
    found = recipe.find("deit_tiny_token")
    assert "within" in found.beside(74.2) and "outside" in found.beside(70)
    assert recipe.find("deit3_base").beside(90) == ""
    assert "no published accuracy (README_revenge" in recipe.find("deit3_base").expects()


def test_the_quick_start_distils_to_what_its_table_says() -> None:
    found = recipe.find("quickstart")
    settings = options.parse_args(["--recipe", "quickstart"])
    kind = settings.args.distillation_type
    rows = (recipe.FOLDER.parent / "results" / "quickstart.md").read_text().splitlines()
    row = next(row for row in rows if row.endswith(f"`--distillation-type {kind}` |"))
    mean, deviation = map(float, row.split("|")[2].split("±"))
    assert kind == "hard" and settings.notes == ()
    assert (found.acc1, found.tolerance) == (round(mean, 1), round(2 * deviation))
    # The rows of the table are runs without --recipe: the same flags, but for who teaches.
    for flags in ([], ["--distillation-type", "none"], ["--distillation-type", kind]):
        args = options.parse_args(flags).args
        differ = {
            flag for flag, value in vars(args).items() if value != getattr(settings.args, flag)
        }
        assert differ == {"recipe"} | ({"distillation_type"} if kind not in flags else set())
    assert options.parse_args([]).args.distillation_type == "none"
