"""What the commands share: how errors end them, and the options that choose a model.

Imports neither JAX nor the pipeline until they are needed: tools that prepare data use `run` too.
"""

from __future__ import annotations

import argparse
import pathlib
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NoReturn

from janusflow_jax.config.errors import JanusFlowError

if TYPE_CHECKING:
    from janusflow_jax import pipeline


PROBE_BYTES = 1 << 16
"""A full disk still has room for an empty file."""


def run(
    main: Callable[[], Any],
    *,
    out_of_memory: str = "use fewer images at a time, --dtype bfloat16, or a smaller model",
    rerun: str = "",
    error_code: int = 1,
) -> NoReturn:
    """Runs a command and exits with what it returns.

    An error that the user can fix is one message without a traceback.

    Args:
      out_of_memory: what to do when a device has too little memory.
      rerun: what a second run of the same command does after an OSError or Ctrl-C; '': nothing
        worth a message.
      error_code: exit status after an error.
    """
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        if rerun:
            log(f"\nstopped; {rerun}")
        sys.exit(130)
    except (JanusFlowError, OSError, ImportError) as error:
        log(f"error: {error}" + (f"; {rerun}" if rerun and isinstance(error, OSError) else ""))
        sys.exit(error_code)
    except RuntimeError as error:
        import jax

        from janusflow_jax.parallel import processes

        if not isinstance(error, jax.errors.JaxRuntimeError):
            raise
        several = processes.count() > 1
        if "RESOURCE_EXHAUSTED" in str(error):
            message = f"error: out of memory on the device: {out_of_memory}\n{_first_line(error)}"
        elif several:
            message = processes.lost_peer(error)
        else:
            raise
        log(message)
        if several:
            processes.exit_without_peers()
        sys.exit(error_code)


def _first_line(error: Exception) -> str:
    return str(error).splitlines()[0]


def log(text: str) -> None:
    """Progress and remarks go to stderr, so that stdout holds results only."""
    print(text, file=sys.stderr, flush=True)


def parser(module: str, description: str, epilog: str) -> argparse.ArgumentParser:
    """A parser with the options that choose a model; prints its texts unchanged."""
    from janusflow_jax import pipeline

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


def load(args: argparse.Namespace) -> pipeline.Pipeline:
    """Loads the model of the options; logs its name, image size, device and dtype."""
    from janusflow_jax import pipeline

    model = pipeline.load(
        args.model, dtype=args.dtype, weights=args.weights, int8=args.int8, adapter=args.adapter
    )
    size = model.cfg.image_size
    log(f"{args.model}: {model.cfg.name}, {size} x {size} px, on {accelerator()} in {model.dtype}")
    return model


def check_writable(path: str, option: str) -> pathlib.Path:
    """The file that an option names, its folder created. Call it before the work, not after.

    Raises:
      JanusFlowError: it is a folder, or cannot be written.
    """
    file = pathlib.Path(path)
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        if file.exists():
            file.open("ab").close()
            return file
        try:
            file.write_bytes(bytes(PROBE_BYTES))
        finally:
            file.unlink(missing_ok=True)
    except OSError as error:
        raise JanusFlowError(
            f"{option}: expected a file that can be written; got {path!r} "
            f"({error.strerror or error}): choose another"
        ) from error
    return file


def accelerator() -> str:
    """What JAX runs on: 'cpu', '2 x NVIDIA H100'."""
    import jax

    devices = jax.devices()
    kind = devices[0].device_kind
    return kind if len(devices) == 1 else f"{len(devices)} x {kind}"
