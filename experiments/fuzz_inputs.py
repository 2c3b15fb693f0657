"""Mutated inputs of main.py and the tools, for `fuzz.py`: files, folders, variables and flags."""

import copy
import io
import json
import os
import random
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import yaml
from PIL import Image

from base import flag_table

MODEL = "deit_pico_distilled_patch8_32"
SMALL = {"model": MODEL, "epochs": 1, "warmup-epochs": 0, "batch-size": 4, "aa": "none"}
SMALL |= {"repeated-aug": False, "model-ema": False, "num-workers": 0, "teacher-check": False}
CONFIG = {"temperature": 4, "kd_loss_type": "ce", "hard_label_weight": 1, "kd_loss_weight": 0.5}
MATCH = {"layer_T": 2, "layer_S": 1, "feature": "hidden", "loss": "hidden_mse", "weight": 1}
MATCH |= {"proj": ["linear", 64, 64]}
CONFIG |= {"intermediate_matches": [MATCH], "is_caching_logits": False}
CANARY = "canary"
COMMAND = f"touch {CANARY}"
WORDS = ["", "0", "-1", "2", "0.5", "1e999", "nan", "-inf", "9" * 400, "true", "null", "[1, 2]"]
WORDS += ["{a: 1}", "é", "\x1b[31m", "\u202e", "\udcff", "x" * 5000, "../..", "/", "/dev/zero"]
WORDS += ["/dev/null", "%s%n", "{0}", "&a [*a]", "auto", "none", "all", "linear", "a=b", "a,b"]
WORDS += [f"$({COMMAND})", f"`{COMMAND}`", f"!!python/object/apply:os.system ['{COMMAND}']"]
NUMBERS = ("0", "1", "2", "3", "7", "0.5", "0.9", "1e-9", "1e9", "1000000", "-1")
VALUES = [None, True, 0, -1, 3, 0.5, 1e308, 2**63, float("nan"), float("-inf"), [], {}, [1, "a"]]
VALUES += [{"a": {"b": [1]}}, [[[[]]]], *WORDS]
VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
VARIABLES += ("SLURM_PROCID", "SLURM_NTASKS", "SLURM_LOCALID", "SLURM_STEP_ID", "SLURM_JOB_ID")
VARIABLES += ("SLURM_STEP_NUM_TASKS", "SLURM_CPUS_PER_TASK", "SLURM_TASKS_PER_NODE")


@dataclass(frozen=True)
class Input:
    """A command line of a program, environment variables, and in how many processes it runs."""

    argv: list[str]
    environ: dict[str, str] = field(default_factory=dict)
    program: str = "main.py"
    processes: int = 1


class Execute:
    """An object that runs a command when it is unpickled."""

    def __reduce__(self) -> tuple:
        return os.system, (COMMAND,)


def flags(values: dict[str, Any]) -> list[str]:
    """Return settings as words of a command line."""
    words: list[str] = []
    for name, value in values.items():
        is_switch = isinstance(value, bool)
        words += [f"--{'' if value else 'no-'}{name}"] if is_switch else [f"--{name}", str(value)]
    return words


TRAIN = flags(SMALL)
PACK = ["images", "packed", "--num-workers", "0"]
MODES: tuple[list[str], ...] = ([], ["--dry-run"], ["--check"])
# A compiler takes longer than the limit. A plugin is executed on purpose.
LONG = ("torchcompile", "plugin")
DISTIL = ["--distillation-type", "soft", "--teacher-model", MODEL, "--teacher-path"]


# --- mutations --------------------------------------------------------------------------------


def mutate_bytes(rng: random.Random, data: bytes) -> bytes:
    """Return the bytes with one to four changes: bits, pieces cut, doubled or replaced, words."""
    for _ in range(rng.choice((1, 1, 1, 2, 4))):
        start = rng.randrange(len(data) + 1)
        end = min(len(data), start + rng.choice((1, 4, 64, len(data))))
        word = rng.choice(WORDS).encode("utf-8", "surrogateescape")
        flipped = bytes([rng.randrange(256)])
        same_size = rng.randbytes(end - start)
        middle = rng.choice((b"", data[start:end] * 2, word, flipped, same_size, same_size))
        data = data[:start] + middle + data[end:]
    return data


def mutate_plain(rng: random.Random, value: Any, leaves: list[Any]) -> Any:
    """Return plain data with one entry removed, renamed or replaced."""
    if isinstance(value, dict | list) and value and rng.random() < 0.9:
        changed = copy.copy(value)
        key = rng.choice(list(value)) if isinstance(value, dict) else rng.randrange(len(value))
        action = rng.randrange(6)
        if action == 0:
            del changed[key]
        elif action == 1 and isinstance(value, dict):
            changed[rng.choice([3, *WORDS])] = changed.pop(key)
        else:
            changed[key] = mutate_plain(rng, value[key], leaves)
        return changed
    return rng.choice(leaves)


def mutate_text(rng: random.Random, value: Any, path: Path) -> None:
    """Write plain data as YAML or JSON, mutated as data or as text."""
    as_text = rng.random() < 0.4
    value = value if as_text else mutate_plain(rng, value, VALUES)
    text = json.dumps(value) if path.suffix == ".json" else yaml.dump(value, allow_unicode=True)
    data = text.encode("utf-8", "surrogateescape")
    path.write_bytes(mutate_bytes(rng, data) if as_text else data)


def mutate_file(rng: random.Random, path: Path) -> None:
    """Mutate a file in place; one of JSON also as data."""
    if path.suffix == ".json":
        mutate_text(rng, json.loads(path.read_text()), path)
    else:
        path.write_bytes(mutate_bytes(rng, path.read_bytes()))


def mutate_checkpoint(rng: random.Random, path: Path) -> None:
    """Mutate a checkpoint in place, as data or as bytes."""
    if rng.random() < 0.3:
        return path.write_bytes(mutate_bytes(rng, path.read_bytes()))
    tensors = [torch.zeros(0), torch.full((2, 3), torch.nan), torch.ones(5, dtype=torch.int64)]
    tensors += [torch.zeros(1).expand(10**7), torch.eye(2).to_sparse(), torch.zeros(4) + 1j]
    leaves = [*VALUES, *tensors, Execute()]
    value = torch.load(path, weights_only=True)
    for _ in range(rng.randint(1, 3)):
        value = mutate_plain(rng, value, leaves)
    torch.save(value, path)


# --- kinds of inputs: each writes its files to `folder`, from the unchanged ones in `seeds` ---


def use_images(rng: random.Random, seeds: Path, *words: str) -> Input:
    """Return a command that trains or evaluates on images, or that packs them."""
    if rng.random() < 0.2:
        return Input(PACK, program="tools/prepare_data.py")
    evaluation = ["--eval", "--resume", str(seeds / "run/checkpoint.pth")]
    words = (*words, "--on-bad-image", rng.choice(("fail", "skip")))
    return Input([*TRAIN, *rng.choice(([], evaluation)), *words])


def recipe(rng: random.Random, seeds: Path, folder: Path) -> Input:
    value = {"source": "a", "expected": {"acc1": 50.0, "tolerance": 2}, "effective-batch": 4}
    value |= {"needs": {"data-path": "a folder"}, "flags": SMALL}
    mutate_text(rng, value, folder / "recipe.yaml")
    words = ["--recipe", "recipe.yaml", "--data-path", str(seeds / "images")]
    return Input(words + rng.choice(MODES))


def config(rng: random.Random, seeds: Path, folder: Path) -> Input:
    name = rng.choice(("config.json", "config.yaml"))
    mutate_text(rng, CONFIG, folder / name)
    words = [*TRAIN, *DISTIL, str(seeds / "run/checkpoint.pth"), "--distill-config", name]
    words += ["--data-path", str(seeds / "images")]
    return Input(words + rng.choice(MODES))


def cache(rng: random.Random, seeds: Path, folder: Path) -> Input:
    shutil.copytree(seeds / "cache", folder / "cache")
    others = sorted(path.name for path in (folder / "cache").iterdir())
    mutate_file(rng, folder / "cache" / rng.choice([*others, "manifest.json", "manifest.json"]))
    words = [*TRAIN, *DISTIL, str(seeds / "run/checkpoint.pth"), "--teacher-cache", "cache"]
    words += ["--teacher-cache-mode", rng.choice(("auto", "read", "verify", "write"))]
    return Input([*words, "--data-path", str(seeds / "images")])


def data(rng: random.Random, seeds: Path, folder: Path) -> Input:
    shutil.copytree(seeds / "packed", folder / "packed")
    others = sorted(path.name for path in (folder / "packed").iterdir())
    mutate_file(rng, folder / "packed" / rng.choice([*others, "manifest.json", "manifest.json"]))
    (folder / "images").symlink_to(seeds / "images")
    return use_images(rng, seeds, "--data-set", "PREPARED", "--data-path", "packed")


def log(rng: random.Random, seeds: Path, folder: Path) -> Input:
    shutil.copytree(seeds / "run", folder / "run")
    mutate_file(rng, folder / "run" / rng.choice(("log.txt", "log.txt", "config.yaml")))
    if rng.random() < 0.5:
        return Input(["run", "--out", "report.html"], program="tools/report.py")
    words = [*TRAIN, "--epochs", "2", "--resume", "auto", "--output_dir", "run"]
    return Input([*words, "--data-path", str(seeds / "images")])


def checkpoint(rng: random.Random, seeds: Path, folder: Path) -> Input:
    shutil.copytree(seeds / "run", folder / "run")
    path = "run/checkpoint.pth"
    mutate_checkpoint(rng, folder / path)
    match rng.randrange(7):
        case 0:
            (folder / "run/best_checkpoint.pth").unlink(missing_ok=True)
            return Input(["run", "--out", "a.html"], program="tools/report.py")
        case 1:
            return Input([path, "export", "--formats", "safetensors"], program="tools/export.py")
        case 2:
            words = ["--epochs", "2", "--resume", "auto", "--output_dir", "run"]
        case 3:
            words = ["--eval", "--resume", path]
        case 4:
            words = ["--finetune", path]
        case 5:
            words = [*DISTIL, path]
        case _:
            words = ["--epochs", "2", "--resume", path]
    return Input([*TRAIN, *words, "--data-path", str(seeds / "images")])


def image(rng: random.Random, seeds: Path, folder: Path) -> Input:
    shutil.copytree(seeds / "images", folder / "images")
    path = rng.choice(sorted((folder / "images").glob("*/*/*")))
    if rng.random() < 0.5:
        kind = rng.choice(("JPEG", "PNG", "GIF", "TIFF", "WEBP", "BMP", "PPM"))
        mode = "RGB" if kind in ("JPEG", "PPM") else rng.choice(("1", "L", "P", "RGB", "RGBA"))
        buffer = io.BytesIO()
        Image.new(mode, (rng.choice((1, 9, 3000)), rng.choice((1, 9, 300)))).save(buffer, kind)
        path.write_bytes(buffer.getvalue())
    if rng.random() < 0.8:
        mutate_file(rng, path)
    return use_images(rng, seeds, "--data-path", "images")


def folders(rng: random.Random, seeds: Path, folder: Path) -> Input:
    root = shutil.copytree(seeds / "images", folder / "images")
    for _ in range(rng.randint(1, 4)):
        inside = [path for path in sorted(root.rglob("*")) if not path.is_symlink()]
        path = rng.choice(inside or [root])
        name = path.parent / (rng.choice(WORDS).replace("/", "")[:200] or ".ipynb_checkpoints")
        match rng.randrange(7):
            case 0:
                shutil.rmtree(path) if path.is_dir() else path.unlink()
            case 1 if not name.exists():
                path.rename(name)
            case 2 if not name.exists() and not name.is_symlink():
                name.symlink_to(rng.choice((".", "..", "/dev/zero", "missing", path.name)))
            case 3 if not name.exists():
                os.mkfifo(name)
            case 4 if path.is_dir():
                path.rename(path.with_name("moved"))
                path.touch()
            case 5:
                name.mkdir(exist_ok=True)
            case _ if path.is_file():
                path.write_bytes(b"")
    reader = rng.choice(("IMNET", "IMNET", "folder/"))
    return use_images(rng, seeds, "--data-path", "images", "--data-set", reader)


def environment(rng: random.Random, seeds: Path, folder: Path) -> Input:
    words = ["0", "1", "2", "3", "127.0.0.1", "localhost", "1x", "2(x2)", "70000", *WORDS]
    names = rng.sample(VARIABLES, rng.randint(1, 5))
    environ = {name: rng.choice(words) for name in names}
    argv = [*TRAIN, "--dist-timeout", "0.02", "--data-path", str(seeds / "images")]
    return Input(argv + rng.choice(MODES), environ)


def flag(rng: random.Random, seeds: Path, folder: Path) -> Input:
    argv = [*TRAIN, "--data-path", str(seeds / "images")]
    argv += rng.choice(([], ["--dry-run"], [*DISTIL, str(seeds / "run/checkpoint.pth")]))
    known = [flag for flag in flag_table.FLAGS if flag.dest not in LONG]
    for flag in rng.sample(known, rng.randint(1, 3)):
        default = MODEL if "model" in flag.dest else str(flag.default)  # a large one takes long
        words = [rng.choice((*WORDS, *flag.choices * 8, default))]
        if flag.kind in (int, float) and rng.random() < 0.7:
            words = [rng.choice(NUMBERS) for _ in range(rng.choice((1, 1, 1, 2, 3)))]
        argv += [flag.name] if flag.kind is bool else [flag.name, *words]
    if rng.random() < 0.1:
        argv.insert(rng.randrange(len(argv)), rng.choice(WORDS))
    return Input(argv)


def replayed(rng: random.Random, seeds: Path, folder: Path) -> Input:
    shutil.copytree(seeds / "bad", folder / "bad")
    path = folder / "bad/bad_batch.pth"
    if rng.random() < 0.4:
        mutate_checkpoint(rng, path)
    else:  # one value, below the keys that every file has
        value = torch.load(path, weights_only=True)
        key = rng.choice(("args", "args", "terms", "teacher_outputs", *value))
        leaves = [*VALUES, torch.zeros(0), torch.ones(2, 3), torch.zeros(4) + 1j]
        value[key] = mutate_plain(rng, value[key], leaves)
        torch.save(value, path)
    words = rng.choice(([], [], ["--amp", rng.choice(("off", "bf16", "fp16", rng.choice(WORDS)))]))
    return Input(["bad/bad_batch.pth", *words], program="tools/replay.py")


PLUGIN = """from losses import KD_LOSS_MAP, MATCH_LOSS_MAP
from schedules import WEIGHT_SCHEDULER

MATCH_LOSS_MAP["mine"] = lambda state_S, state_T, mask=None: (state_S - state_T).abs().mean()
KD_LOSS_MAP["mine"] = lambda logits_S, logits_T, temperature=1: (logits_S - logits_T).abs().mean()
WEIGHT_SCHEDULER["mine"] = lambda progress: 1 - progress
"""


def plugin(rng: random.Random, seeds: Path, folder: Path) -> Input:
    """A plugin's own errors are one line; what a whole plugin does is its author's matter."""
    data = PLUGIN.encode()
    for _ in range(rng.choice((0, 1, 1, 2))):
        start = rng.randrange(len(data))
        data = data[:start] + rng.choice((b"", b"\x00", b"(", b"0", b"\xff")) + data[start + 1 :]
    (folder / "mine.py").write_bytes(data)
    match = "feature=hidden,layer_S=1,layer_T=2,loss=mine,proj=linear"
    words = rng.choice((["--match", match], ["--kd-loss-type", "mine"]))
    words = [*words, "--kd-loss-weight-scheduler", rng.choice(("none", "mine"))]
    words += [*DISTIL, str(seeds / "run/checkpoint.pth")]
    path = rng.choice(("mine.py",) * 8 + (".", "missing.py", rng.choice(WORDS)))
    argv = [*TRAIN, *words, "--plugin", path, "--data-path", str(seeds / "images")]
    return Input(argv + rng.choice(MODES))


def two(rng: random.Random, seeds: Path, folder: Path) -> Input:
    """An input of another kind in two processes, which meet in a file (gloo)."""
    kind = rng.choice((recipe, config, cache, data, checkpoint, image, folders, flag))
    request = kind(rng, seeds, folder)
    while request.program != "main.py":
        shutil.rmtree(folder)
        folder.mkdir()
        request = kind(rng, seeds, folder)
    address = ["--dist-url", f"file://{folder / 'meeting'}", "--dist-timeout", "0.1"]
    return Input([*request.argv, *address, "--device", "cpu"], request.environ, processes=2)


Kind = Callable[[random.Random, Path, Path], Input]
KINDS: dict[str, Kind] = {"recipes": recipe, "configs": config, "caches": cache, "data": data}
KINDS |= {"logs": log, "checkpoints": checkpoint, "images": image, "folders": folders}
KINDS |= {"environment": environment, "flags": flag, "replays": replayed, "plugins": plugin}
KINDS |= {"two processes": two}
