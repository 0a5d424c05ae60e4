"""What `generate`, `chat` and `evaluate` share: their model's options, and how they end."""

from __future__ import annotations

import argparse
import pathlib
import sys
import tempfile
from collections.abc import Callable
from typing import Any

import jax

from janusflow_jax import pipeline
from janusflow_jax.config.errors import CheckpointError


def parser(module: str, description: str, epilog: str) -> argparse.ArgumentParser:
    """A parser that prints its texts as they stand, with the options that choose a model."""
    p = argparse.ArgumentParser(
        prog=f"python -m janusflow_jax.{module}",
        description=description,
        epilog=epilog,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    p.add_argument(
        "--model", required=True, help="a model folder, a training run's folder, or one checkpoint"
    )
    p.add_argument(
        "--dtype",
        choices=pipeline.DTYPES,
        help="default: float32 on CPU, bfloat16 on TPU and GPU (older GPUs, such as the T4, have "
        "no bfloat16: take float32 there)",
    )
    p.add_argument(
        "--weights", choices=("ema", "params"), default="ema", help="of a training run; default ema"
    )
    p.add_argument(
        "--int8",
        action="store_true",
        help="the language model in a byte a weight: less memory (needs the extra int8)",
    )
    p.add_argument(
        "--adapter",
        default="",
        help="a folder of tools/export_checkpoint.py --adapter-only, added to the language model",
    )
    return p


def load(args: argparse.Namespace) -> pipeline.JanusFlowPipeline:
    """Loads the model of the options, and says on stderr what it is and where it runs."""
    model = pipeline.load(
        args.model, dtype=args.dtype, weights=args.weights, int8=args.int8, adapter=args.adapter
    )
    size = model.cfg.image_size
    note(f"{args.model}: {model.cfg.name}, {size} x {size} px, on {accelerator()} in {model.dtype}")
    return model


def check_file(path: str, option: str) -> pathlib.Path:
    """The file that an option names, its folder made: asked before the work that it is to hold.

    Raises:
      ValueError: it is a folder, or cannot be written.
    """
    file = pathlib.Path(path)
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        if file.exists():
            file.open("ab").close()
        else:
            tempfile.TemporaryFile(dir=file.parent).close()
    except OSError as error:
        raise ValueError(
            f"{option}: expected a file that can be written; got {path!r} "
            f"({error.strerror or error}): choose another"
        ) from error
    return file


def accelerator() -> str:
    """What JAX runs on, in words: 'cpu', '2 x NVIDIA H100'."""
    devices = jax.devices()
    kind = devices[0].device_kind
    return kind if len(devices) == 1 else f"{len(devices)} x {kind}"


def note(text: str) -> None:
    """Progress and remarks: on stderr, so that stdout holds results only."""
    print(text, file=sys.stderr, flush=True)


def run(main: Callable[[], Any]) -> None:
    """Runs a command; errors that the user can mend are one message, not a stack."""
    try:
        main()
    except KeyboardInterrupt:
        sys.exit(130)
    except (CheckpointError, ValueError, OSError, ImportError) as error:
        sys.exit(f"error: {error}")
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        sys.exit(
            "error: out of memory on the device: ask for fewer pictures at a time, take "
            f"--dtype bfloat16, or a smaller model\n{str(error).splitlines()[0]}"
        )
