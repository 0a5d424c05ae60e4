"""Flags of commands that take `--config=FILE[:ARG]` and `--config.FIELD=VALUE`: one message for
what cannot be taken."""

from __future__ import annotations

from absl import flags

from janusflow_jax import config as config_lib
from janusflow_jax.config.errors import ConfigError


def parse(argv: list[str]) -> list[str]:
    """absl's parser, for `app.run(flags_parser=...)`.

    Raises:
      ConfigError: an unknown flag or field, a value or a config file that cannot be taken; what a
        config file says itself stands alone, without the stack that led there.
    """
    for arg in argv[1:]:
        if arg.startswith("--config."):
            config_lib.check_field(arg.removeprefix("--config.").split("=")[0])
    try:
        left = flags.FLAGS(argv)
        getattr(flags.FLAGS["config"].value, "name", None)  # a file that is not there says so here
        return left
    except OSError as error:
        why = str(error).strip().splitlines()[-1].strip()
        raise ConfigError(
            f"--config: expected a config file such as configs/emoji.py:F; got none: {why}"
        ) from error
    except flags.Error as error:
        own = [e for e in _chain(error) if isinstance(e, ConfigError)]
        said = str(own[-1]) if own else f"{error}\n--helpshort lists the flags"
        raise ConfigError(said) from error
    except (ValueError, TypeError, IndexError) as error:
        raise ConfigError(f"--config: {error}") from error


def _chain(error: BaseException | None) -> list[BaseException]:
    """An exception and those that it came from, the first of all last."""
    out = []
    while error is not None:
        out.append(error)
        error = error.__cause__ or error.__context__
    return out
