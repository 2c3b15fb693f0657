"""The command line: DeiT's flags in both spellings, the quick start, what cannot go together."""

import shlex
import shutil
import subprocess

import pytest

import options
from base import flag_table, flags
from base.errors import UserError

DEIT_COMMANDS = [
    "--eval --resume https://dl.fbaipublicfiles.com/deit/deit_base_patch16_224-b5f2ef4d.pth "
    "--data-path /path/to/imagenet",
    "--eval --resume X.pth --model deit_base_distilled_patch16_384 --input-size 384 "
    "--data-path /path/to/imagenet",
    "--model deit_small_patch16_224 --batch-size 256 --data-path /p --output_dir /o",
    "--model deit_base_distilled_patch16_224 --distillation-type hard --teacher-model regnety_160 "
    "--teacher-path https://dl.fbaipublicfiles.com/deit/regnety_160-a5fe301d.pth "
    "--data-path /p --output_dir /o",
    "--model deit_base_patch16_384 --batch-size 32 --finetune X.pth --input-size 384 --use_env "
    "--nodes 2 --lr 5e-6 --weight-decay 1e-8 --epochs 30 --min-lr 5e-6 --data-path /p",
    "--model deit_small_patch16_LS --data-path /p --output_dir /o --batch 256 --lr 4e-3 "
    "--epochs 800 --weight-decay 0.05 --sched cosine --input-size 224 --eval-crop-ratio 1.0 "
    "--reprob 0.0 --nodes 2 --smoothing 0.0 --warmup-epochs 5 --drop 0.0 --nb-classes 1000 "
    "--seed 0 --opt fusedlamb --warmup-lr 1e-6 --mixup .8 --drop-path 0.05 --cutmix 1.0 "
    "--unscale-lr --repeated-aug --bce-loss --color-jitter 0.3 --ThreeAugment",
    "--model deit_base_patch16_LS --finetune X.pth --data-path /p --no-repeated-aug --src "
    "--cosub --no-model-ema --epochs 20 --train-mode --dist-eval --num_workers 10 --pin-mem",
]


def parse(line: str) -> options.Options:
    return options.parse_args(line.split())


@pytest.mark.parametrize("command", DEIT_COMMANDS)
def test_deits_own_command_lines_parse(command: str) -> None:
    known = command.replace("--use_env", "").replace("--nodes 2", "")  # the launchers' own flags
    assert parse(known).args.data_set == "IMNET"


def test_both_spellings_and_prefixes_are_one_flag() -> None:
    for line in ("--num_workers 3", "--num-workers 3", "--num_workers=3", "--num-w 3"):
        assert parse(line).args.num_workers == 3
    assert parse("--batch 7").args.batch_size == 7
    assert parse("--output-dir a").args.output_dir == parse("--output_dir a").args.output_dir


# DeiT's flags and their defaults
REFERENCE = dict(
    batch_size=64,
    epochs=300,
    bce_loss=False,
    unscale_lr=False,
    model="deit_base_patch16_224",
    drop=0.0,
    drop_path=0.1,
    model_ema=True,
    model_ema_decay=0.99996,
    model_ema_force_cpu=False,
    opt="adamw",
    opt_eps=1e-8,
    opt_betas=None,
    clip_grad=None,
    momentum=0.9,
    weight_decay=0.05,
    sched="cosine",
    lr=5e-4,
    lr_noise=None,
    lr_noise_pct=0.67,
    lr_noise_std=1.0,
    warmup_lr=1e-6,
    min_lr=1e-5,
    decay_epochs=30,
    warmup_epochs=5,
    cooldown_epochs=10,
    patience_epochs=10,
    decay_rate=0.1,
    color_jitter=0.3,
    aa="rand-m9-mstd0.5-inc1",
    smoothing=0.1,
    train_interpolation="bicubic",
    repeated_aug=True,
    train_mode=True,
    ThreeAugment=False,
    src=False,
    reprob=0.25,
    remode="pixel",
    recount=1,
    resplit=False,
    mixup=0.8,
    cutmix=1.0,
    cutmix_minmax=None,
    mixup_prob=1.0,
    mixup_switch_prob=0.5,
    mixup_mode="batch",
    teacher_model="regnety_160",
    teacher_path="",
    distillation_type="none",
    distillation_alpha=0.5,
    distillation_tau=1.0,
    cosub=False,
    finetune="",
    attn_only=False,
    inat_category="name",
    output_dir="",
    seed=0,
    resume="",
    start_epoch=0,
    eval=False,
    dist_eval=False,
    pin_mem=True,
    distributed=False,
    world_size=1,
    dist_url="env://",
)


def test_every_flag_of_the_reference_has_its_default() -> None:
    args = options.get_args_parser().parse_args([])
    assert {name: getattr(args, name) for name in REFERENCE} == REFERENCE


def test_without_data_the_quick_starts_recipe_fills_in_what_no_flag_gives() -> None:
    args = parse("--epochs 2").args
    recipe = options.read_recipe(options.QUICK_START)
    assert args.data_set == "DIGITS" and args.model == recipe["model"] and args.epochs == 2


def test_with_data_the_defaults_are_deits() -> None:
    args = parse("--data-path somewhere").args
    assert (args.data_set, args.model, args.epochs) == ("IMNET", "deit_base_patch16_224", 300)


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("--batch-size 0", "at least 1"),
        ("--distillation-alpha 1.5", "between 0 and 1"),
        ("--distillation-tau 0", "above 0"),
        ("--cosub --distillation-type hard", "cosub"),
        ("--data-set IMNET", "--data-path"),
        ("--distilation-type hard", "did you mean --distillation-type"),
        ("--distillation-type medium", "invalid choice"),
        ("--pretrained --finetune x.pth", "leave out one"),
        ("--input-size 0", "input-size"),
        ("--torchcompile tensorrt9", "tensorrt9: unknown to torch; known: .*inductor"),
        ("--opt-kwargs fused", "KEY=VALUE"),
        ("--max-bad-steps " + "9" * 400, "--max-bad-steps 9+[.]+9+: is too large"),
        ("--seed -" + "9" * 20, "--seed -9+: is too large"),
    ],
)
def test_what_cannot_work_is_refused_in_one_line(line: str, words: str) -> None:
    with pytest.raises(UserError, match=words) as caught:
        parse(line)
    assert "\n" not in caught.value.line()


@pytest.mark.parametrize(
    "line",
    [
        "--src",
        "--resplit",
        "--world_size 4",
        "--distillation-tau 2",
        "--teacher-path x",
        "--cooldown-epochs 3",
        "--patience-epochs 3",
        "--color-jitter 0.4",
        "--teacher-amp bf16",
    ],
)
def test_a_flag_that_does_nothing_says_so(line: str) -> None:
    notes = parse(f"--data-path x {line}").notes
    assert len(notes) == 1 and line.split()[0].replace("_", "-") in notes[0]


def test_options_of_the_optimizer_are_plain_values() -> None:
    args = parse("--opt-kwargs fused=False nesterov=true alpha=0.9 --epochs 2").args
    assert args.opt_kwargs == {"fused": False, "nesterov": True, "alpha": 0.9}
    assert parse("").args.opt_kwargs == {} and parse("--torchcompile").args.torchcompile


def test_defaults_raise_no_notes() -> None:
    assert parse("").notes == () and parse("--distillation-type hard").notes == ()


def test_every_flag_of_the_parser_has_a_row_with_a_help_text() -> None:
    actions = [action for action in options.get_args_parser()._actions if action.dest != "help"]
    assert {action.dest for action in actions} == {flag.dest for flag in flag_table.FLAGS}
    assert len({flag.name for flag in flag_table.FLAGS}) == len(flag_table.FLAGS)
    for action in actions:
        assert action.help, action.option_strings
    for flag in flag_table.FLAGS:
        assert flag.text and "default:" in flag.help_text(), flag.name
        flag.check(flag.default)


def test_a_new_flag_needs_one_row(monkeypatch: pytest.MonkeyPatch) -> None:
    unused = flags.Idle(lambda s: s.epochs == 0, "nothing trains")
    facts = (flags.Range(2), unused, flags.MAY_CHANGE, flags.COMPARED, flags.TRANSFORM)
    row = flags.Flag("--grain-size", int, 3, *facts).help("size of the grain")
    monkeypatch.setitem(flag_table.GROUPS, "data", (*flag_table.DATA, row))
    monkeypatch.setattr(flag_table, "FLAGS", (*flag_table.FLAGS, row))
    assert "size of the grain (default: 3)" in options.get_args_parser().format_help()
    assert parse("--grain_size 4").args.grain_size == 4
    with pytest.raises(UserError, match="--grain-size 1: must be at least 2"):
        parse("--grain-size 1")
    assert parse("--grain-size 4 --epochs 0").notes == (
        "--grain-size has no effect here: nothing trains",
    )
    for fact in (flags.MAY_CHANGE, flags.COMPARED, flags.TRANSFORM):
        assert "grain_size" in flag_table.with_fact(fact)


@pytest.mark.parametrize("line", ["--lr nan", "--weight-decay inf", "--cutmix-minmax nan 1"])
def test_a_value_that_is_no_finite_number_is_refused(line: str) -> None:
    with pytest.raises(UserError, match="must be a finite number"):
        parse(line)


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("--wandb", r"unrecognized arguments: --wandb$"),
        ("--mixupp 1", "did you mean --mixup"),
        ("--epoch-count 3", "unrecognized arguments: --epoch-count 3$"),
        ("--warmup-epoch 3 --lerning-rat 2", "unrecognized"),
    ],
)
def test_only_close_names_are_suggested(line: str, words: str) -> None:
    with pytest.raises(UserError, match=words):
        parse(line)


@pytest.mark.parametrize("line", ["--local-rank 1", "--local_rank=1"])
def test_the_rank_that_a_launcher_passes_is_accepted(line: str) -> None:
    assert parse(line).notes == ()
    assert parse(line).args.local_rank == 1


def test_a_suggestion_works_when_followed() -> None:
    for wrong in ("--distilation-type hard", "--mixupp 1", "--batchsize 3"):
        with pytest.raises(UserError) as caught:
            parse(wrong)
        name = caught.value.line().rpartition("did you mean ")[2].split(" ")[0].rstrip("?")
        parse(f"{name} {wrong.split()[1]}")


def test_the_short_help_fits_one_screen(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        parse("--help")
    lines = capsys.readouterr().out.splitlines()
    assert ended.value.code == 0
    assert len(lines) <= 40 and max(map(len, lines)) < 80
    assert 15 <= sum(line.startswith("  --") for line in lines) <= 25
    assert sum("main.py" in line for line in lines[-3:]) == 3, "three examples"


@pytest.mark.parametrize("words", [["--distillation-t"], ["--distillation-type", ""]])
def test_the_shell_completes_flags_and_their_choices(
    words: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("shtab")
    if not shutil.which("bash"):
        pytest.skip("no bash")
    with pytest.raises(SystemExit):
        parse("--print-completion bash")
    script = capsys.readouterr().out + (
        f"COMP_WORDS=(vit-distillation {shlex.join(words)}); COMP_CWORD={len(words)}\n"
        "$(complete -p vit-distillation | sed 's/.*-F \\([^ ]*\\).*/\\1/')\n"
        'echo "${COMPREPLY[@]}"\n'
    )
    found = subprocess.run(["bash", "-c", script], capture_output=True, text=True, check=True)
    expected = "none soft hard" if words[-1] == "" else "--distillation-type --distillation-tau"
    assert found.stdout.split() == expected.split()


def test_the_long_help_has_every_flag_with_its_default(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parse("--help-all")
    words = capsys.readouterr().out
    assert all(flag.name in words for flag in flag_table.FLAGS)
    assert all(title in words for title in flag_table.GROUPS)
    assert words.count("default:") == len(flag_table.FLAGS)
