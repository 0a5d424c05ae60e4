"""What all config types share: fields with limits, plain JSON values, differences."""

import dataclasses
import json
import typing
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from janusflow_jax.config.errors import ConfigError


def dataclass(cls: type) -> Any:
    """A config type: keyword arguments only, no other attributes, and a hash for `jax.jit`."""
    return dataclasses.dataclass(kw_only=True, slots=True, unsafe_hash=True)(cls)


def limited(default: Any, allowed: Callable[[Any], Any], expected: str) -> Any:
    """A field that `problems_of_fields` checks; `expected` describes the values it may have."""
    return dataclasses.field(default=default, metadata={"allowed": allowed, "expected": expected})


def choice(default: str, *others: str) -> Any:
    """A field that is one of several names; '' among them means none."""
    names = (default, *others)
    return limited(default, lambda value: value in names, f"one of {', '.join(names)}")


def positive(default: float | int) -> Any:
    return limited(default, lambda value: value > 0, "> 0")


def zero_or_more(default: float | int) -> Any:
    return limited(default, lambda value: value >= 0, "0 (off) or more")


def share(default: float | int) -> Any:
    return limited(default, lambda value: 0 <= value < 1, "0 (off) or more, below 1")


def between(default: float | int, low: int, high: int) -> Any:
    return limited(default, lambda value: low <= value <= high, f"{low} to {high}")


def depth(default: int) -> Any:
    """The number of layers or blocks of a model; more than this would take hours to build."""
    return between(default, 1, 1000)


def seed() -> Any:
    return between(0, 0, 2**32 - 1)


def _expected_type(value: Any, kind: Any) -> str:
    """What was expected instead of `value`; '' if it is of type `kind` and fits 32 bits."""
    if typing.get_origin(kind) is tuple:
        kinds = typing.get_args(kind)
        if not isinstance(value, tuple):
            return "a tuple"
        kinds = kinds[:1] * len(value) if kinds[-1] is Ellipsis else kinds
        if len(kinds) != len(value):
            return f"a group of {len(kinds)} values"
        wrong = (
            _expected_type(item, item_kind) for item, item_kind in zip(value, kinds, strict=True)
        )
        return next((f"a tuple, each {expected}" for expected in wrong if expected), "")
    if kind is float and isinstance(value, int | float) and not isinstance(value, bool):
        in_range = value == 0 or 1e-37 < abs(value) < 1e37
        return "" if in_range else "a finite number, 0 or of size 1e-37 to 1e37"
    if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
        names = {int: "a whole number", float: "a number", bool: "True or False", str: "text"}
        return names.get(kind, kind.__name__)
    return "a whole number below 2^32" if kind is int and abs(value) >= 2**32 else ""


def _walk(cfg: Any, where: str) -> Iterator[tuple[str, Any, Any, Any]]:
    """(name, value, type, limits) of each field, nested configs included."""
    types = typing.get_type_hints(type(cfg))
    for field in dataclasses.fields(cfg):
        name, value = f"{where}{field.name}", getattr(cfg, field.name)
        yield name, value, types[field.name], field.metadata
        if dataclasses.is_dataclass(value):
            yield from _walk(value, f"{name}.")
        for i, item in enumerate(value if isinstance(value, tuple) else ()):
            if dataclasses.is_dataclass(item):
                yield from _walk(item, f"{name}[{i}].")


def type_problems(cfg: Any, where: str = "") -> list[str]:
    """One line for each value that has another type than its field, or is too large for it."""
    return [
        f"{name}: expected {expected}; got {value!r}"
        for name, value, kind, _ in _walk(cfg, where)
        if (expected := _expected_type(value, kind))
    ]


def problems_of_fields(cfg: Any, where: str = "") -> list[str]:
    """One line for each value of the right type that its field does not allow."""
    return [
        f"{name}: expected {limits['expected']}; got {value!r}"
        for name, value, _, limits in _walk(cfg, where)
        if limits and not limits["allowed"](value)
    ]


def raise_problems(what: str, problems: Sequence[str]) -> None:
    """Raises one ConfigError that lists every problem; does nothing when there is none."""
    if problems:
        raise ConfigError(f"{what} cannot work:\n" + "\n".join(f"  - {p}" for p in problems))


def to_dict(cfg: Any) -> dict[str, Any]:
    """A config as plain JSON values."""
    return json.loads(json.dumps(dataclasses.asdict(cfg)))


def from_dict(cls: Any, values: dict[str, Any], where: str = "") -> Any:
    """The inverse of `to_dict`. Unknown keys are an error; missing ones take the default."""
    types = typing.get_type_hints(cls)
    if unknown := sorted(values.keys() - types):
        raise ConfigError(
            f"{where or cls.__name__}: unknown keys {unknown}; known are {sorted(types)}"
        )
    made = cls()
    for name, value in values.items():
        setattr(made, name, _from_json(types[name], value, f"{where}{name}"))
    return made


def _from_json(kind: Any, value: Any, where: str) -> Any:
    if dataclasses.is_dataclass(kind):
        return from_dict(kind, value, f"{where}.")
    if isinstance(value, list):
        item = typing.get_args(kind)[0]
        return tuple(_from_json(item, v, f"{where}[{i}]") for i, v in enumerate(value))
    return value


def differences(
    then: dict[str, Any], now: dict[str, Any], ignored: Sequence[str] = (), where: str = ""
) -> list[str]:
    """One line for each value in which two nested dicts differ: 'optim.lr: 0.1 then, 0.2 now'.

    Args: ignored: dotted names that may differ, with all values below them.
    """
    lines = []
    for name in sorted({*then, *now}):
        path, old, new = f"{where}{name}", then.get(name), now.get(name)
        if path in ignored or old == new:
            continue
        if isinstance(old, dict) and isinstance(new, dict):
            lines += differences(old, new, ignored, f"{path}.")
        else:
            lines.append(f"{path}: {old!r} then, {new!r} now")
    return lines
