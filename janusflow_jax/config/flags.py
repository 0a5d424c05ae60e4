"""Configs from the command line: `--config=FILE[:ARG]` and `--config.FIELD=VALUE`.

absl and ml_collections are imported where they are used, so that config files load fast.
"""

from __future__ import annotations

import dataclasses
import difflib
import os
import sys
import traceback
from collections.abc import Sequence
from typing import Any

from janusflow_jax.config.checks import train_problems
from janusflow_jax.config.errors import ConfigError
from janusflow_jax.config.fields import raise_problems
from janusflow_jax.config.run import SourceConfig, TrainConfig


def parse(argv: list[str], values: Any = None) -> list[str]:
    """absl's parser, for `app.run(flags_parser=...)`, with one message for all that can be wrong.

    Exits with status 0 after a flag such as --help, where absl's own parser exits with 1.

    Args: values: absl `FlagValues` with a flag `config`; default: the program's own.
    Raises:
      ConfigError: an unknown flag or field, or a value or config file that cannot be used.
    """
    from absl import flags

    values = flags.FLAGS if values is None else values
    for arg in argv[1:]:
        if arg.startswith("--config."):
            check_field(arg.removeprefix("--config.").split("=")[0])
    # ml_collections loads every file as this module, in which the names of the last one remain.
    sys.modules.pop("config_config", None)
    try:
        rest = values(argv)
        cfg = values["config"].value
        getattr(cfg, "name", None)  # raises if the file does not exist
    except (Exception, SystemExit) as error:  # anything: a config file is the user's own program
        if isinstance(error, SystemExit) and any(arg.startswith(("-h", "--h")) for arg in argv):
            sys.exit(0)
        raise ConfigError(_explain(error, argv)) from error
    if not isinstance(cfg, TrainConfig):
        raise ConfigError(_other_config(argv, cfg))
    return rest


def _file(argv: Sequence[str]) -> str:
    """The file in --config=FILE[:ARG] or --config FILE[:ARG]; '' if there is none."""
    file = ""
    for arg, value in zip(argv, [*argv[1:], ""], strict=True):
        name, is_one, inside = arg.lstrip("-").partition("=")
        if name == "config":
            file = (inside if is_one else value).partition(":")[0]
    return file


def _other_config(argv: Sequence[str], cfg: Any) -> str:
    kind = type(cfg).__name__
    return f"--config: {_file(argv)}: expected get_config to return a TrainConfig; got {kind}"


def _explain(error: BaseException, argv: Sequence[str]) -> str:
    """The message for an error of `parse`; names the line of the config file that raised it."""
    from absl import flags

    file, line, ours = _file(argv), "", ""
    cause: BaseException | None = error
    while cause is not None:  # the innermost counts: ml_collections adds tracebacks to the others
        if isinstance(cause, ConfigError):
            ours = str(cause)
        for frame in traceback.extract_tb(cause.__traceback__):
            if os.path.abspath(frame.filename) == os.path.abspath(file):
                error, line = cause, f"line {frame.lineno}: "
        cause = cause.__cause__ or cause.__context__
    if ours:
        return ours
    if isinstance(error, flags.IllegalFlagValueError) and "config=None" in str(error) and file:
        return _other_config(argv, None)
    if isinstance(error, flags.Error):
        return f"{error}\n--helpshort lists the flags"
    if isinstance(error, IndexError) and not line:
        elements = ", ".join(arg for arg in argv if arg.startswith("--config.") and "[" in arg)
        return f"expected elements that the config has; got {elements}: {error}"
    reason = (str(error).strip().splitlines() or ["no message"])[-1].strip()
    reason = f"{line}{type(error).__name__}: {reason}"
    if "has no attribute 'get_config'" in reason:
        reason = "it has no function get_config"
    return f"--config: expected a file such as configs/emoji.py:F; got {file!r} ({reason})"


def read_config(path: str) -> TrainConfig:
    """The config of 'configs/emoji.py:F', as training reads it.

    Raises:
      ConfigError: as in `parse`, or a config that cannot work.
    """
    from absl import flags
    from ml_collections import config_flags

    values, argv = flags.FlagValues(), ["", f"--config={path}"]
    config_flags.DEFINE_config_file("config", flag_values=values, sys_argv=argv)
    parse(argv, values)
    cfg: TrainConfig = values["config"].value
    raise_problems(f"config {cfg.name!r}", train_problems(cfg))
    return cfg


def check_field(path: str) -> None:
    """Raises ConfigError when 'optim.lr' or 'data.sources[0].path' is no field of a TrainConfig."""
    node: Any = TrainConfig()
    for depth, part in enumerate(path.split(".")):
        name, _, index = part.partition("[")
        known = [f.name for f in dataclasses.fields(node)] if dataclasses.is_dataclass(node) else []
        if name not in known:
            where = ".".join(["config", *path.split(".")[:depth]])
            close = difflib.get_close_matches(name, known, n=1)
            hint = f"; did you mean {close[0]!r}?" if close else ""
            raise ConfigError(f"{where}: expected one of {', '.join(known)}; got {name!r}{hint}")
        node = getattr(node, name)
        if index and name in ("sources", "heldout"):
            node = SourceConfig()


def parse_folders(arg: str | None, names: Sequence[str]) -> tuple[list[str], dict[str, str]]:
    """Splits `a,b,mine=DIR` into the words a and b, and {mine: DIR}.

    Args: names: of the folders that the argument may have.
    Raises:
      ConfigError: another name, no folder behind it, or one name twice.
    """
    words = [word.strip() for word in (arg or "").split(",")]
    pairs = [word.split("=", 1) for word in words if "=" in word]
    folders = dict(pairs)
    wrong = [n for n, folder in pairs if n not in names or not folder]
    if wrong or len(folders) < len(pairs):
        expected = " or ".join(f"{name}=DIR" for name in names)
        raise ConfigError(f"config argument: expected {expected}, each once; got {arg!r}")
    return [word for word in words if word and "=" not in word], folders


def parse_arg(arg: str | None, known: dict[str, str]) -> set[str]:
    """Splits the part of `--config=file.py:a,b` after the colon.

    Args:
      arg: comma-separated names, or None.
      known: name -> what it does.
    Raises:
      ConfigError: an unknown name (lists the known ones).
    """
    names = {n.strip() for n in (arg or "").split(",") if n.strip()}
    if unknown := sorted(names - known.keys()):
        listed = ", ".join(f"{n} ({what})" for n, what in known.items()) or "none"
        raise ConfigError(f"config argument: unknown {unknown}; known are: {listed}")
    return names
