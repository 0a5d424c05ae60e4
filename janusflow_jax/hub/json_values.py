"""Values of JSON files of published folders, checked."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from janusflow_jax.config.errors import ConvertError
from janusflow_jax.hub.tensors import raise_problems


def present(values: Mapping[str, Any]) -> dict[str, Any]:
    """The values of a JSON object; a null counts as missing."""
    return {key: value for key, value in values.items() if value is not None}


def json_object(where: str, values: Mapping[str, Any], key: str, default: Any = None) -> Any:
    """The JSON object under a key, or the default where there is none.

    Raises:
      ConvertError: another value, or none without a default.
    """
    value = values.get(key, default)
    if not isinstance(value, dict):
        raise ConvertError(f"{where}: {key}: expected a JSON object; got {value!r}")
    return value


def numbers(where: str, values: Mapping[str, Any], defaults: Mapping[str, Any]) -> dict[str, Any]:
    """The values of the keys of `defaults`; a missing one is its default.

    Each is above 0 and, as its default, an integer, a number or a list of them.

    Raises:
      ConvertError: lists the values that are not.
    """
    out = {key: values.get(key, default) for key, default in defaults.items()}

    def fits(value: Any, default: Any, most: int) -> bool:
        if isinstance(default, list | tuple):
            items = value if isinstance(value, list | tuple) else []
            return bool(items) and all(fits(x, default[0], most) for x in items)
        kinds = int if isinstance(default, int) else (int, float)
        return isinstance(value, kinds) and not isinstance(value, bool) and 0 < value < most

    problems = []
    for key, default in defaults.items():
        most = 1001 if "layers" in key else 2**31  # more layers would take hours to compare
        if not fits(out[key], default, most):
            kind = "whole numbers" if isinstance(default, int) else "numbers"
            problems.append(f"{key}: expected {kind} above 0 and below {most}; got {out[key]!r}")
    raise_problems(f"{where}: values that no model has", problems)
    return out


def check_values(
    where: str,
    values: Mapping[str, Any],
    required: Mapping[str, Any],
    defaults: Mapping[str, Any] | None = None,
) -> None:
    """Raises ConvertError for every value that is not implemented.

    Args:
      required: key -> the only value that is implemented.
      defaults: the published module's for missing keys, where it is not the required value.
    """
    actual = {**required, **(defaults or {}), **values}
    raise_problems(
        f"{where}: unsupported values",
        [f"{k}: expected {x!r}; got {actual[k]!r}" for k, x in required.items() if actual[k] != x],
    )
