"""What the commands share: how errors end them, and the options that choose a model.

Imports neither JAX nor the pipeline until they are needed: tools that prepare data use `run` too.
"""

from __future__ import annotations

import argparse
import logging
import re
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NoReturn

from etils import epath

from janusflow_jax.config import files
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
    # After the first error of a save, Orbax leaves those of its other writes to asyncio.
    logging.getLogger("asyncio").setLevel(logging.CRITICAL)
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        if rerun:
            log(f"\nstopped; {rerun}")
        sys.exit(130)
    except Exception as error:
        message, in_a_job = explain(error, out_of_memory), False
        if type(error).__name__ == "JaxRuntimeError":
            from janusflow_jax.parallel import processes

            in_a_job = processes.count() > 1
            message = message or (processes.lost_peer(error) if in_a_job else "")
        if not message:
            raise
        log(f"error: {message}" + (f"; {rerun}" if rerun and isinstance(error, OSError) else ""))
        if in_a_job:
            processes.exit_without_peers()
        sys.exit(error_code)


_FOREIGN: tuple[tuple[type[Exception], str, str], ...] = (
    (MemoryError, "", "this machine has too little memory: use fewer or smaller inputs"),
    (Exception, "No space left on device|Disk quota exceeded", "the disk is full: free some space"),
    (RuntimeError, "RESOURCE_EXHAUSTED|[Oo]ut of memory", "out of memory on the device: {advice}"),
    (ValueError, "did not converge|Singular matrix", "numbers that are not finite, or too large"),
    (
        ValueError,  # TensorStore's, which reads and writes arrays
        "^(ABORTED|DATA_LOSS|DEADLINE_EXCEEDED|FAILED_PRECONDITION|INTERNAL|NOT_FOUND|OUT_OF_RANGE|"
        "PERMISSION_DENIED|RESOURCE_EXHAUSTED|UNAUTHENTICATED|UNAVAILABLE|UNKNOWN): ",
        "a file cannot be read or written: check the disk, the network and your permissions",
    ),
)
"""Errors of other libraries that users can fix: type, pattern in the message, what it means."""


def explain(error: Exception, out_of_memory: str) -> str:
    """The message for an error that users can fix; '' for any other."""
    if isinstance(error, (JanusFlowError, ImportError)):
        return str(error)
    for kind, pattern, meaning in _FOREIGN:
        if isinstance(error, kind) and re.search(pattern, str(error)):
            first_line = (str(error).splitlines() or [""])[0][:400]
            return f"{meaning.format(advice=out_of_memory)}\n{first_line}".rstrip()
    return str(error) if isinstance(error, OSError) else ""


def log(text: str) -> None:
    """Progress and remarks go to stderr, so that stdout holds results only."""
    print(text, file=sys.stderr, flush=True)


def parser(
    module: str, description: str, epilog: str, needs_model: bool = True
) -> argparse.ArgumentParser:
    """A parser with the options that choose a model; prints its texts unchanged."""
    from janusflow_jax import pipeline

    p = argparse.ArgumentParser(
        prog=f"python -m janusflow_jax.{module}",
        description=description,
        epilog=epilog,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    p.add_argument(
        "--model",
        required=needs_model,
        help="a model folder, a training run's folder, or one checkpoint",
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


def add_solver_options(p: Any) -> None:
    """Adds the options of how images are generated, which `solver_options` reads, to a parser or
    a group of one."""
    p.add_argument("--steps", type=int, help="of the solver; default 30, of a student its own")
    p.add_argument(
        "--order",
        type=int,
        default=1,
        help="1: Euler's method; 2: Adams-Bashforth, more accurate at the same cost; default 1",
    )
    p.add_argument(
        "--shift", type=float, default=1.0, metavar="S", help="above 1: more steps near noise"
    )
    p.add_argument(
        "--guidance-interval",
        type=float,
        nargs=2,
        default=[0.0, 1.0],
        metavar=("FROM", "UNTIL"),
        help="the times with guidance, from 0 (noise) to 1 (image); default all. Others may count "
        "from the image: their 0.4 to 1 is 0 to 0.6 here",
    )


def solver_options(args: argparse.Namespace) -> dict[str, Any]:
    """The arguments of `Pipeline.generate` that `add_solver_options` adds."""
    return {
        "num_steps": args.steps,
        "order": args.order,
        "shift": args.shift,
        "guidance_interval": tuple(args.guidance_interval),
    }


def load(args: argparse.Namespace) -> pipeline.Pipeline:
    """Loads the model of the options; logs its name, image size, device and dtype."""
    from janusflow_jax import pipeline

    if args.adapter:
        files.resolve(args.adapter)  # a bucket that cannot be opened ends the command here
    model = pipeline.load(
        args.model, dtype=args.dtype, weights=args.weights, int8=args.int8, adapter=args.adapter
    )
    size = model.cfg.image_size
    log(f"{args.model}: {model.cfg.name}, {size} x {size} px, on {accelerator()} in {model.dtype}")
    return model


def check_writable(path: str, option: str) -> epath.Path:
    """The file that an option names, its folder created. Call it before the work, not after.

    Raises:
      JanusFlowError: it is a folder, or cannot be written.
    """
    file = files.resolve(path)
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        if file.exists():
            if not files.is_remote(file):  # a bucket cannot append
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
