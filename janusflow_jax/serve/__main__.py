"""Serves a model: `python -m janusflow_jax.serve --model runs/emoji`."""

from __future__ import annotations

if __name__ == "__main__":  # before the imports, which take seconds
    from janusflow_jax.config import signals

    signals.end_on_signals()

from janusflow_jax import cli
from janusflow_jax.serve import command

if __name__ == "__main__":
    cli.run(
        command.main,
        out_of_memory="use fewer --rows or --lanes, a smaller --context, or --dtype bfloat16",
    )
