"""Structured files: each is read correctly, or ends in one line with exit code 2."""

import datetime
import json
import random
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
import yaml

import main
import options
from base import errors, structured
from base.errors import UserError
from data import packed
from distill import cache_store

ROOT = Path(__file__).resolve().parents[1]
MAKE_CASES = ROOT.parent / "shared" / "cases" / "make_cases.py"
ANY = dict[str, Any]


def aliases(levels: int, name: str = "a") -> str:
    """Return a list of lists of YAML aliases, 10 ** levels values when written out."""
    first = f"&{name}0 [{','.join('x' * 10)}]"
    rest = (f"&{name}{i} [{','.join([f'*{name}{i - 1}'] * 10)}]" for i in range(1, levels))
    return f"[{', '.join([first, *rest])}]"


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("a: 1\nb: [x, 2.5, true, null]", {"a": 1, "b": ["x", 2.5, True, None]}),
        ("lr: 1e-3\nother: -2E+4", {"lr": 1e-3, "other": -2e4}),
        ("a: &x {b: 1}\nc: {<<: *x, d: 2}", {"a": {"b": 1}, "c": {"b": 1, "d": 2}}),
        ('{"a": 1e-3, "b": [1]}', {"a": 1e-3, "b": [1]}),
        ('{"a":\t1}', {"a": 1}),
        ("{a: 1}", {"a": 1}),
        ("'1': one", {"1": "one"}),
    ],
)
def test_what_yaml_and_json_mean(text: str, value: Any) -> None:
    assert structured.parse(text, "file") == value


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("a: " + aliases(8), "expand to more than 200000 values"),
        ("a: &a [*a]", "line 1: a value contains itself"),
        ("a: &a {b: *a}", "contains itself"),
        ("a: " + "[" * 200_000, "nested deeper than 50 levels|nesting depth"),
        ('{"a": ' + "[" * 200_000 + "]" * 200_000 + "}", "nested deeper than 50 levels"),
        ('{"a": ' + "[" * 60 + "]" * 60 + "}", "nested deeper than 50 levels"),
        ("a: " + "9" * 5000, "not readable as YAML|too large"),
        ('{"a": ' + "9" * 5000 + "}", "5000 digits is too large"),
        ("a: 0x" + "f" * 17, "a: a number of 68 bits is too large"),
        ("a: 1\nb: 2\na: 3", "line 3: the key 'a' comes twice"),
        ('{"b": {"a": 1, "a": 2}}', "the key 'a' comes twice"),
        ("1: one", "line 1: the key '1' is not text; quote it"),
        ("{[1]: one}", "a key is a list or a mapping"),
        ("a: 2020-01-01", "a: a date is not allowed; quote it"),
        ("a: 2020-13-41", "not readable as YAML"),
        ("a: !!set {x, y}", "a: a set is not allowed"),
        ("a: !!python/object/apply:os.system [id]", "not readable as YAML"),
        ("a: !!bool perhaps", "not readable as YAML"),
        ("a: 1\n---\nb: 2", "not readable as YAML"),
        ("a: *nowhere", "not readable as YAML"),
        ("a: \0", "not readable as YAML"),
        ("a: " + "x" * 2**20, "larger than 1 MiB"),
    ],
    ids=lambda value: value[:24],
)
def test_text_that_is_refused(text: str, words: str) -> None:
    started = time.monotonic()
    with pytest.raises(UserError, match=words) as caught:
        structured.parse(text, "file")
    assert len(caught.value.line()) < 300 and time.monotonic() - started < 10


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b'{"a": "\xe9"}', r"is not UTF-8 text \(byte 7"),
        (b"\xff\xfea", "is not UTF-16 text"),
        (None, "cannot be read"),
        ("folder", "is not a file"),
    ],
)
def test_a_file_that_is_no_text_is_refused(data: Any, words: str, tmp_path: Path) -> None:
    path = tmp_path / "file.json"
    if data == "folder":
        path.mkdir()
    elif data is not None:
        path.write_bytes(data)
    with pytest.raises(UserError, match=f"--flag .*file.json: .*{words}"):
        structured.read(path, ANY, what="--flag")


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
def test_marked_encodings_are_read(encoding: str, tmp_path: Path) -> None:
    (tmp_path / "file.yaml").write_bytes("name: größe\n".encode(encoding))
    assert structured.read(tmp_path / "file.yaml", ANY) == {"name": "größe"}


class Inner(msgspec.Struct, forbid_unknown_fields=True):
    number: float = 0.0
    share: float | None = None


class Outer(msgspec.Struct, forbid_unknown_fields=True):
    inner: Inner
    names: list[str] = []


@pytest.mark.parametrize(
    ("value", "words"),
    [
        ({"inner": {"number": "x"}}, "file: inner.number: found 'x', expected a number"),
        ({"inner": {"number": True}}, "inner.number: found True, expected a number"),
        ({"inner": {}, "names": ["a", 7]}, r"names\[1\]: found 7, expected text"),
        ({"inner": {"nmber": 1}}, "inner: unknown key 'nmber'"),
        ({"iner": {}}, "unknown key 'iner'; the keys are inner, names"),
        ({}, "file: lacks `inner:`"),
        ([1], r"file: found \[1\], expected names with values"),
        ({"inner": {"number": ["x" * 999] * 99}}, "found .{1,80}, expected a number"),
    ],
)
def test_the_message_names_key_found_and_expected(value: Any, words: str) -> None:
    with pytest.raises(UserError, match=words) as caught:
        structured.convert(value, Outer, "file")
    assert len(caught.value.line()) < 200


def test_a_message_shows_a_short_form_of_any_value() -> None:
    circle: list = []
    circle.append(circle)
    for value in (circle, "x" * 1000, [[[["x"] * 99] * 99] * 99] * 99, {i: i for i in range(999)}):
        assert len(errors.shorten(value)) <= 80
    assert errors.shorten(datetime.date(2020, 1, 1)) == "datetime.date(2020, 1, 1)"


# --- every file that the program reads: mutations ---------------------------------------------

RECIPE = {
    "source": "a test",
    "expected": {"acc1": 70.0, "tolerance": 1.0},
    "effective-batch": 64,
    "needs": {"finetune": "a file"},
    "flags": {
        "data-set": "DIGITS",
        "model": "resnet_pico",
        "epochs": 2,
        "lr": 0.001,
        "input-size": [8],
        "repeated-aug": False,
        "match": [],
        "teacher-model": ["resnet_pico", "resnet_pico"],
        "finetune": "x.pth",
        "opt-kwargs": {"fused": False},
    },
}
CONFIG = {
    "temperature": 8,
    "temperature_scheduler": ["flsw", 1, 2],
    "hard_label_weight": 0.5,
    "kd_loss_type": "ce",
    "kd_loss_weight": 1,
    "kd_loss_weight_scheduler": "linear_decay",
    "probability_shift": False,
    "is_caching_logits": False,
    "intermediate_matches": [
        {"layer_T": 0, "layer_S": 0, "feature": "hidden", "loss": "hidden_mse", "weight": 1},
        {
            "layer_T": [0, 12],
            "layer_S": [0, 3],
            "feature": "hidden",
            "loss": "nst",
            "proj": ["linear", 96, 192, {"lr": 0.01}],
        },
    ],
}
CACHE = {"format": 3, "rows": 8, "classes": 10, "keep": "all", "seed": 0, "input": {"size": [8, 8]}}
PACKED = {
    "format": 1,
    "kind": "raw",
    "classes": ["a", "b"],
    "flips": True,
    "plan": {"short side": 8},
    "splits": {"train": {"pictures": 0, "bytes": 0, "table": "00"}},
}
STRANGE: list[Any] = [
    *(None, True, -1, 0, 10**30, 1.5, float("nan"), float("inf")),
    *("", "x", "é", "\x1b[31m", "x" * 5000),
    *([], [1], [[]], {}, {"a": 1}, [{"a": []}]),
]


def paths(value: Any, path: tuple = ()) -> Iterator[tuple]:
    """Yield the path of every value inside a plain one, and of the value itself."""
    yield path
    items: Any = value.items() if isinstance(value, dict) else ()
    for key, inner in enumerate(value) if isinstance(value, list) else items:
        yield from paths(inner, (*path, key))


def mutate(value: Any, chance: random.Random) -> Any:
    """Return a copy with one value replaced, dropped or renamed."""
    value = json.loads(json.dumps(value))
    path = chance.choice(list(paths(value)))
    if not path:
        return chance.choice(STRANGE)
    parent = value
    for key in path[:-1]:
        parent = parent[key]
    action = chance.randrange(6)
    if action == 0 and isinstance(parent, dict):
        parent[chance.choice(["", "nosuchkey", "é", "0"])] = parent.pop(path[-1])
    elif action == 1:
        del parent[path[-1]]
    else:
        parent[path[-1]] = chance.choice(STRANGE)
    return value


def damage(text: bytes, chance: random.Random) -> bytes:
    """Return the bytes of a file with a few of them replaced, dropped or repeated."""
    for _ in range(chance.randint(1, 3)):
        start = chance.randrange(len(text))
        end = min(len(text), start + chance.randint(1, 8))
        middle = chance.choice([b"", b"\0", b"\xe9", b"[", b"}", b"&a *a", b"!!int x", b"- "])
        text = text[:start] + chance.choice([middle, 3 * text[start:end]]) + text[end:]
    return text


def files(value: Any, suffix: str, count: int) -> Iterator[bytes]:
    """Yield the bytes of mutated files: other values, then other bytes. Always the same ones."""
    chance = random.Random(f"{sorted(map(str, value))} {suffix}")
    for number in range(count):
        changed = mutate(value, chance) if number % 2 else value
        json_text = json.dumps(changed)
        text = json_text if suffix == "json" else yaml.safe_dump(changed, allow_unicode=True)
        yield text.encode() if number % 2 else damage(text.encode(), chance)


def read_recipe(path: Path) -> None:
    options.parse_args(["--recipe", str(path), "--resume", "x.pth"])


def read_config(path: Path) -> None:
    options.parse_args(["--distill-config", str(path)])


def read_cache(path: Path) -> None:
    path.rename(path.with_name(cache_store.MANIFEST))
    cache_store.read_manifest(path.parent)


def read_packed(path: Path) -> None:
    path.rename(path.with_name(packed.MANIFEST))
    packed.Prepared(path.parent, "train")


KINDS = {
    "recipe": (RECIPE, "yaml", read_recipe),
    "config": (CONFIG, "yaml", read_config),
    "config in JSON": (CONFIG, "json", read_config),
    "cache manifest": (CACHE, "json", read_cache),
    "packed manifest": (PACKED, "json", read_packed),
}


@pytest.mark.parametrize("kind", KINDS)
def test_a_mutated_file_is_read_or_ends_in_one_line(kind: str, tmp_path: Path) -> None:
    value, suffix, reader = KINDS[kind]
    refused = 0
    for number, data in enumerate(files(value, suffix, 60)):
        path = tmp_path / str(number) / f"file.{suffix}"
        path.parent.mkdir()
        path.write_bytes(data)
        try:
            reader(path)
        except UserError as error:
            refused += 1
            assert len(error.line()) < 450, data
        except Exception as error:
            pytest.fail(f"{type(error).__name__}: {error}: {data[:2000]!r}")
    assert refused > 10


def test_the_files_that_are_mutated_are_read(tmp_path: Path) -> None:
    for number, (value, suffix, reader) in enumerate(KINDS.values()):
        path = tmp_path / str(number) / f"file.{suffix}"
        path.parent.mkdir()
        path.write_text(json.dumps(value))
        if reader is read_packed:
            packed.read_manifest(path.rename(path.with_name(packed.MANIFEST)).parent)
        else:
            reader(path)


@pytest.mark.skipif(not MAKE_CASES.is_file(), reason="the shared input cases are not there")
def test_the_shared_cases_are_read_or_end_in_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    code = (
        f"import sys; sys.path.insert(0, {str(MAKE_CASES.parent)!r}); import make_cases, pathlib;"
        f"make_cases.structured(make_cases.Cases(pathlib.Path({str(tmp_path)!r}), None))"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
    found = sorted((tmp_path / "structured").iterdir())
    assert len(found) >= 10
    for path in found:
        flag = "--recipe" if path.name.startswith("r_") else "--distill-config"
        started = time.monotonic()
        if path.name == "utf16_with_bom.yaml":
            assert options.parse_args([flag, str(path)]).args.distillation_tau == 4
            lines = []
        else:
            code = main.run([flag, str(path), "--list-models"])  # trains nothing if it is read
            lines = capsys.readouterr().err.splitlines()
            assert code == 2 and len(lines) == 1 and path.stem in lines[0], path.name
        assert time.monotonic() - started < 10 and max(map(len, lines), default=0) < 400


@pytest.mark.parametrize("text", ['{"\\udcff": 1}', '{"a": "\\udcff"}'])
def test_half_a_character_is_read_as_text_or_refused(text: str) -> None:
    value = structured.parse(text, "file", True)
    try:
        assert structured.convert(value, dict[str, Any], "file") == value
    except UserError as error:
        assert "not valid Unicode" in error.line()
    with pytest.raises(UserError, match="not valid Unicode|unknown key|lacks"):
        structured.convert(value, cache_store.Manifest, "file")
