"""Flags of commands that take `--config=FILE[:ARG]` and `--config.FIELD=VALUE`: one line for what
cannot be taken."""

from __future__ import annotations

from absl import app

from janusflow_jax import config as config_lib


def parse(argv: list[str]) -> list[str]:
    """absl's parser, for `app.run(flags_parser=...)`.

    Raises:
      ConfigError: a field that does not exist, a value or a config file that cannot be taken.
    """
    for arg in argv[1:]:
        if arg.startswith("--config."):
            config_lib.check_field(arg.removeprefix("--config.").split("=")[0])
    try:
        return app.parse_flags_with_usage(argv)
    except (OSError, ValueError, TypeError, IndexError) as error:
        raise config_lib.ConfigError(f"--config: {error}") from error
