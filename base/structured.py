"""Safe reading of YAML and JSON files into typed values. Errors are one line.

Nothing in a file is executed. Its size, its nesting and what its aliases expand to are limited
before any value is built. `convert` checks the values against a type (msgspec).
"""

import json
import re
from collections.abc import Hashable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import msgspec
import yaml

from base.errors import UserError, shorten

T = TypeVar("T")
MAX_DEPTH = 50  # levels of lists and mappings
MAX_VALUES = 200_000  # of a YAML file, with every alias written out
MAX_INTEGER = 2**63
MAX_BYTES = {"YAML": 2**20, "JSON": 2**28}  # iNaturalist's listings have 150 MB
CONTAINERS = {"[": "JSON", "{": "JSON"}
ENCODINGS = {b"\xff\xfe": "utf-16", b"\xfe\xff": "utf-16", b"\xef\xbb\xbf": "utf-8-sig"}
# PyYAML raises these for scalars that do not fit their tag, such as `!!int x` or month 13.
BAD_SCALAR = (yaml.YAMLError, ValueError, KeyError, IndexError, AttributeError, TypeError)
WORDS = {
    "int": "a whole number",
    "float": "a number",
    "str": "text",
    "bool": "true or false",
    "array": "a list",
    "object": "names with values",
    "null": "nothing",
}


class _Loader(getattr(yaml, "CSafeLoader", yaml.SafeLoader)):  # type: ignore[misc]
    """PyYAML's safe loader, which also reads 1e-3 as a number, as YAML 1.2 does."""


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"[-+]?[0-9][0-9_]*[eE][-+]?[0-9]+$"),
    list("-+0123456789"),
)


class Malformed(ValueError):
    """Text that is not YAML or JSON, or that is too large to read."""


def read(path: str | Path, kind: type[T], *, what: str = "") -> T:
    """Return the content of a YAML or JSON file as a `kind`.

    what: the flag that names the file, for the message. Raises UserError.
    """
    where = f"{what} {path}".strip()
    return convert(parse(read_text(path, where), where, Path(path).suffix == ".json"), kind, where)


def read_text(path: str | Path, where: str = "") -> str:
    """Return the text of a file of UTF-8, or of UTF-16 with its mark. Raises UserError."""
    path, where = Path(path), where or str(path)
    try:
        if path.exists() and not path.is_file():
            raise UserError(f"{where}: is not a file")
        data = path.read_bytes() if path.stat().st_size <= max(MAX_BYTES.values()) else None
    except (OSError, ValueError) as error:  # ValueError: a name with a null character
        reason = error.strerror if isinstance(error, OSError) else error
        raise UserError(f"{where}: cannot be read ({reason})") from error
    if data is None:
        raise UserError(f"{where}: larger than {max(MAX_BYTES.values()) // 2**20} MiB")
    encoding = next((name for mark, name in ENCODINGS.items() if data.startswith(mark)), "utf-8")
    try:
        return data.decode(encoding)
    except UnicodeDecodeError as error:
        raise UserError(
            f"{where}: is not {encoding.upper()} text (byte {error.start}: {error.reason})"
        ) from error


def parse(text: str, where: str, is_json: bool = False) -> Any:
    """Return the plain value of JSON or YAML text. Raises UserError.

    Text that begins with a bracket is read as JSON; if it is not, and `is_json` is false, as YAML.
    """
    try:
        if text.lstrip()[:1] in CONTAINERS:
            try:
                return _parse_json(text)
            except json.JSONDecodeError:
                if is_json:
                    raise
        return _parse_yaml(text)
    except RecursionError as error:
        raise UserError(f"{where}: nested deeper than {MAX_DEPTH} levels") from error
    except BAD_SCALAR as error:
        format = "JSON" if isinstance(error, json.JSONDecodeError) else "YAML"
        known = isinstance(error, Malformed)
        reason = " ".join(str(error).split())[:160]
        message = reason if known else f"not readable as {format} ({reason})"
        raise UserError(f"{where}: {message}") from error


def _parse_json(text: str) -> Any:
    _check_size(text, "JSON")
    value = json.loads(text, object_pairs_hook=_unique, parse_int=_integer)
    _check_plain(value)
    return value


def _integer(digits: str) -> int:
    if len(digits) > 20:
        raise Malformed(f"a number of {len(digits)} digits is too large")
    return int(digits)


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in pairs:
        if key in found:
            raise Malformed(f"the key {shorten(key)} comes twice")
        found[key] = value
    return found


def _parse_yaml(text: str) -> Any:
    _check_size(text, "YAML")
    depth = 0  # checked before the nodes are built, which is recursive
    for count, event in enumerate(yaml.parse(text, Loader=_Loader)):
        depth += isinstance(event, yaml.CollectionStartEvent)
        depth -= isinstance(event, yaml.CollectionEndEvent)
        if depth > MAX_DEPTH:
            raise Malformed(f"nested deeper than {MAX_DEPTH} levels")
        if count > 2 * MAX_VALUES:
            raise Malformed(f"more than {MAX_VALUES} values")
    loader = _Loader(text)
    try:
        node = loader.get_single_node()
        if node is None:
            return None
        if _count_values(node, {}, set()) > MAX_VALUES:
            raise Malformed(f"its aliases expand to more than {MAX_VALUES} values")
        value = loader.construct_document(node)
    finally:
        loader.dispose()
    _check_plain(value)
    return value


def _check_size(text: str, format: str) -> None:
    if len(text) > MAX_BYTES[format]:
        raise Malformed(f"larger than {MAX_BYTES[format] // 2**20} MiB, the limit of {format}")


def _count_values(node: yaml.Node, sizes: dict[int, int], open_nodes: set[int]) -> int:
    """Return how many values a node has with its aliases written out; check its keys.

    Raises Malformed for a node that contains itself, a duplicate key, or a key that is not
    text.
    """
    number = id(node)
    if number in open_nodes:
        raise Malformed(f"line {node.start_mark.line + 1}: a value contains itself")
    if number not in sizes:
        open_nodes.add(number)
        if isinstance(node, yaml.MappingNode):
            _check_keys(node)
        children = node.value if isinstance(node, yaml.CollectionNode) else []
        if isinstance(node, yaml.MappingNode):
            children = [child for pair in children for child in pair]
        sizes[number] = 1 + sum(_count_values(child, sizes, open_nodes) for child in children)
        open_nodes.remove(number)
    return sizes[number]


def _check_keys(node: yaml.MappingNode) -> None:
    seen = set()
    for key, _ in node.value:
        line = key.start_mark.line + 1
        if not isinstance(key, yaml.ScalarNode):
            raise Malformed(f"line {line}: a key is a list or a mapping, not text")
        if key.tag not in ("tag:yaml.org,2002:str", "tag:yaml.org,2002:merge"):
            raise Malformed(f"line {line}: the key {shorten(key.value)} is not text; quote it")
        if key.value in seen:
            raise Malformed(f"line {line}: the key {shorten(key.value)} comes twice")
        seen.add(key.value)


def _check_plain(value: Any, path: str = "", depth: int = 0) -> None:
    """Raise Malformed for what is not null, true, a number, text, a list or a mapping of these."""
    at = f"{path}: " if path else ""
    if depth > MAX_DEPTH:
        raise Malformed(f"nested deeper than {MAX_DEPTH} levels")
    if isinstance(value, dict):
        for key, item in value.items():
            _check_plain(item, f"{path}.{shorten(key, quote=False)}".lstrip("."), depth + 1)
    elif isinstance(value, list):
        for index, item in enumerate(value):
            _check_plain(item, f"{path}[{index}]" if depth < 4 else path, depth + 1)
    elif isinstance(value, int) and abs(value) >= MAX_INTEGER:
        raise Malformed(f"{at}a number of {value.bit_length()} bits is too large")
    elif not isinstance(value, str | int | float | None):
        raise Malformed(f"{at}a {type(value).__name__} is not allowed; quote it to make it text")


def convert(value: Any, kind: type[T], where: str) -> T:
    """Return a plain value as a `kind`: a msgspec Struct, a dataclass, dict, list[str], ...

    Raises UserError with the key, what was found there and what is expected.
    """
    try:
        return msgspec.convert(value, kind)
    except msgspec.ValidationError as error:
        raise UserError(f"{where}: {_explain(str(error), value, kind)}") from error
    except UnicodeEncodeError as error:  # "\\ud800" in JSON
        raise UserError(f"{where}: a key or text is not valid Unicode ({error.reason})") from error


def _explain(message: str, value: Any, kind: Any) -> str:
    """Return msgspec's message in plain words, with the key and a short form of the value."""
    text, _, path = message.partition(" - at `$")
    path = path.rstrip("`").lstrip(".")
    at = f"{path}: " if path else ""
    unknown = re.fullmatch(r"Object contains unknown field `(.*)`", text, re.DOTALL)
    if unknown:
        return f"{at}unknown key {shorten(unknown[1])}{_known_keys(kind) if not path else ''}"
    missing = re.fullmatch(r"Object missing required field `(.*)`", text)
    if missing:
        return f"{at}lacks `{missing[1]}:`"
    expected = re.match(r"Expected `([^`]*)`(.*?)(, got `.*`)?$", text, re.DOTALL)
    found = shorten(_value_at(value, path))
    if not expected:
        return f"{at}found {found} ({text.split(' ')[0].lower()} value)"
    kinds = [WORDS.get(word, word) for word in expected[1].split(" | ")]
    wanted = " or ".join(kinds) + expected[2]
    return f"{at}found {found}, expected {wanted}"


def _known_keys(kind: Any) -> str:
    try:
        names = [field.encode_name for field in msgspec.structs.fields(kind)]
    except TypeError:
        return ""
    return f"; the keys are {', '.join(names)}"


def _value_at(value: Any, path: str) -> Any:
    """Return the value at a path of msgspec, `a.b[0]`, or as near to it as it leads."""
    for name, index in re.findall(r"([^.\[\]]+)|\[(\d+|\.\.\.)\]", path):
        if isinstance(value, Mapping) and isinstance(name, Hashable) and name in value:
            value = value[name]
        elif isinstance(value, list) and index.isdigit():
            value = value[int(index)]
        else:
            break
    return value
