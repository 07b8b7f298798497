"""Typed configuration: frozen dataclasses read from YAML, JSON or command-line overrides, and written back.

A key that does not exist, or a value of the wrong type, is an error that names the file, the key and the nearest
valid key.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import math
import types
import typing
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import yaml

from imagewam_cli.errors import ConfigError, nearest

T = TypeVar("T")

Source = str | Callable[[str], str]
"""Origin of the values, for errors: the name of a file, or a function from a dotted key to what the user typed, such as
an option of the command line."""


def load_yaml(path: Path, into: type[T]) -> T:
    """Read a YAML file into the dataclass `into`.

    Raises:
        ConfigError: the file does not exist or is not a mapping, a key is unknown, or a value has the wrong type.
    """
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError(f"no such file: {path}") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: not valid YAML ({str(error).splitlines()[0]})") from None
    return from_dict(into, values if values is not None else {}, source=str(path))


def size_in_bytes(text: str, source: str) -> float:
    """Parse a size such as "50GB", "800 MB" or "1e9". source: the option or variable that an error names.

    Raises:
        ConfigError: the text is not a size, or the size is not above 0.
    """
    units = {"KB": 1e3, "MB": 1e6, "GB": 1e9, "TB": 1e12, "B": 1.0, "": 1.0}
    number = text.strip().upper().rstrip("KMGTB").strip()
    unit = text.strip().upper()[len(number) :].strip()
    try:
        size = float(number) * units[unit]
    except (ValueError, KeyError):
        raise ConfigError(
            f"{source} must look like 50GB, got {text!r}", "write a number, then KB, MB, GB or TB"
        ) from None
    if not 0 < size < math.inf:
        raise ConfigError(f"{source} must be more than 0, got {text!r}", f"for no limit, omit {source}")
    return size


def option_of(key: str) -> str:
    """Return the option that sets a key: "--segments" for "segments[0]"."""
    return "--" + key.partition("[")[0].replace("_", "-")


def _named(source: Source, key: str) -> str:
    return f"{source}: {key}" if isinstance(source, str) else source(key)


def _sourced(source: Source, problem: object) -> str:
    return f"{source}: {problem}" if isinstance(source, str) else str(problem)


def from_dict(into: type[T], values: Any, *, source: Source = "config", path: str = "") -> T:
    """Build the (nested) dataclass `into` from a plain mapping, strictly.

    Raises:
        ConfigError: a key is unknown or missing, or a value is wrong; the message names `source` and the dotted key.
    """
    if not isinstance(values, Mapping):
        raise ConfigError(f"{_named(source, path or 'the top level')} must be a mapping, got {type(values).__name__}")
    hints = _type_hints(into)  # type: ignore[arg-type]
    names = [f.name for f in dataclasses.fields(into) if f.init]  # type: ignore[arg-type]
    arguments = {}
    for key, value in values.items():
        dotted = f"{path}.{key}" if path else str(key)
        if key not in names:
            raise ConfigError(_sourced(source, f"unknown key {dotted!r}"), nearest(str(key), names))
        arguments[key] = _coerce(hints[key], value, source, dotted)
    try:
        return into(**arguments)
    except TypeError as error:
        missing = [n for n in names if n not in arguments and _required(into, n)]
        if missing:
            where = f"{path}." if path else ""
            raise ConfigError(_sourced(source, f"key {where + missing[0]!r} is missing")) from None
        raise ConfigError(_sourced(source, error)) from None
    except ValueError as error:
        key, _, rest = str(error).partition(" ")
        if not isinstance(source, str) and key.partition(".")[0] in names:  # "pool must be at least 1"
            raise ConfigError(f"{source(f'{path}.{key}' if path else key)} {rest}") from None
        raise ConfigError(_sourced(source, error)) from None


def to_dict(config: Any) -> dict[str, Any]:
    """Return the dataclass as plain values for JSON; `from_dict` reads them back."""
    return typing.cast(dict[str, Any], _plain(config))


def dump_yaml(config: Any) -> str:
    """Return the configuration as YAML; `load_yaml` reads it back."""
    return yaml.safe_dump(to_dict(config), sort_keys=False)


def dump_json(values: Any) -> str:
    """Return indented JSON ending in a newline; keys keep their order."""
    return json.dumps(_plain(values), indent=2, sort_keys=False, allow_nan=False) + "\n"


def _plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {f.name: _plain(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {str(k): _plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(v) for v in value]
    return str(value) if isinstance(value, Path) else value


@functools.cache
def _type_hints(into: type) -> dict[str, Any]:
    """Return the resolved type hints of a dataclass. Cached: a manifest has thousands of values of one type."""
    return typing.get_type_hints(into)


def _required(into: Any, name: str) -> bool:
    field = next(f for f in dataclasses.fields(into) if f.name == name)
    return field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING


def _coerce(hint: Any, value: Any, source: Source, key: str) -> Any:
    """Convert `value` to the type `hint`. Only int to float, list to tuple and text to Path are converted."""
    origin, parameters = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        return _coerce_union(parameters, value, source, key)
    if origin is typing.Literal:
        if value in parameters:
            return value
        choices = [str(p) for p in parameters]
        raise ConfigError(f"{_named(source, key)} is {value!r}", nearest(str(value), choices))
    if dataclasses.is_dataclass(hint) and isinstance(hint, type):
        return from_dict(hint, value, source=source, path=key)
    if origin is tuple and isinstance(value, Sequence) and not isinstance(value, str):
        is_homogeneous = len(parameters) == 2 and parameters[1] is Ellipsis
        kinds = [parameters[0]] * len(value) if is_homogeneous else list(parameters)
        if len(kinds) != len(value):
            raise ConfigError(f"{_named(source, key)} needs {len(kinds)} values, got {len(value)}")
        return tuple(_coerce(k, v, source, f"{key}[{i}]") for i, (k, v) in enumerate(zip(kinds, value, strict=True)))
    if origin in (dict, Mapping) or getattr(origin, "__name__", "") == "Mapping":
        if isinstance(value, Mapping):
            return {str(k): _coerce(parameters[1], v, source, f"{key}.{k}") for k, v in value.items()}
    elif hint is float and isinstance(value, int | float) and not isinstance(value, bool):
        return float(value)
    elif hint is Path and isinstance(value, str | Path):
        return Path(value)
    elif hint in (Any, object) or (
        isinstance(hint, type) and isinstance(value, hint) and (hint is bool or not isinstance(value, bool))
    ):
        return value
    expected = getattr(hint, "__name__", str(hint))
    raise ConfigError(f"{_named(source, key)} must be {expected}, got {value!r}")


def _coerce_union(choices: tuple[Any, ...], value: Any, source: Source, key: str) -> Any:
    if value is None and type(None) in choices:
        return None
    # The first type that fits wins; an error comes from the last one.
    others = [c for c in choices if c is not type(None)]
    for choice in others[:-1]:
        try:
            return _coerce(choice, value, source, key)
        except ConfigError:
            continue
    return _coerce(others[-1], value, source, key)
