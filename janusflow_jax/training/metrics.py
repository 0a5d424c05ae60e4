"""A run's metrics: `metrics.jsonl`, the console, TensorBoard, and Weights & Biases.

`metrics.jsonl` has a line for each logged step: `{"step": 20, "time": 1.8e9, "loss": 0.5}`. JSON
has no NaN: `{"loss": null, "non_finite": {"loss": "nan"}}`.
"""

from __future__ import annotations

import collections
import importlib
import json
import math
import os
import tempfile
import time
import uuid
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from etils import epath
from PIL import Image

from janusflow_jax.config import files
from janusflow_jax.config.errors import ConfigError

FILE = "metrics.jsonl"
WANDB_ID = "wandb_id"
"""A file in the workdir: the run's identifier at Weights & Biases."""
_CONSOLE = (("loss", "loss"), ("ar", "loss_ar"), ("rf", "loss_rf"), ("repa", "loss_repa"))


class Writer:
    """Appends metrics to the workdir; on process 0 only.

    A resumed run removes the lines after the restored step, because those steps come again. A store
    that cannot append (`gs://`) gets the whole file at each `sync` and at `close`.
    """

    def __init__(
        self,
        workdir: epath.PathLike,
        resume_step: int = 0,
        tensorboard: bool = False,
        wandb: Mapping[str, Any] | None = None,
    ) -> None:
        """Opens `workdir/metrics.jsonl`.

        Args:
          workdir: folder of the run; created where it does not exist.
          resume_step: the last step whose lines stay; -1: none.
          tensorboard: also write event files into `workdir/tensorboard`.
          wandb: arguments of `wandb.init`, such as project, name and config; None: off.
        Raises:
          ImportError: `tensorboard` or `wandb` without their packages tensorboardX and wandb.
          ConfigError: Weights & Biases cannot be reached or knows no user.
        """
        self._file = self._board = self._wandb = self._wandb_run = self._remote = None
        if jax.process_index() != 0:
            return
        # Before anything is written: a missing package must not cost the existing lines.
        board = _package("tensorboardX", "tensorboard") if tensorboard else None
        self._wandb = _package("wandb", "wandb") if wandb else None
        target = self._local = epath.Path(workdir) / FILE
        target.parent.mkdir(parents=True, exist_ok=True)
        lines = lines_up_to(target, resume_step)
        if "://" in str(workdir):
            self._local = epath.Path(tempfile.mkdtemp(prefix="metrics-")) / FILE
            self._remote = target
        with files.replacing(self._local, "tmp") as part:
            part.write_text(lines)
        self._file = self._local.open("a")
        if board is not None:
            folder = os.fspath(epath.Path(workdir) / "tensorboard")
            self._board = board.SummaryWriter(folder, purge_step=resume_step + 1)
        if self._wandb is not None:
            identifier = target.parent / WANDB_ID  # the same run there after a restart
            if not identifier.exists():
                identifier.write_text(uuid.uuid4().hex)
            options = {**(wandb or {}), "id": identifier.read_text(), "resume": "allow"}
            try:
                self._wandb_run = self._wandb.init(**options, dir=os.fspath(self._local.parent))
            except Exception as error:  # its errors have no common class
                raise ConfigError(
                    f"wandb: expected to begin a run there; got {error}: log in (`wandb login`), "
                    "set WANDB_MODE=offline, or switch wandb off in the config"
                ) from error

    def write(self, step: int, values: Mapping[str, Any]) -> None:
        """Writes one step's scalars (numbers, or arrays of one number)."""
        if self._file is None:
            return
        numbers = {name: float(value) for name, value in values.items()}
        self._file.write(json_line(step, numbers, time.time()))
        self._file.flush()
        if self._board is not None:
            for name, number in numbers.items():
                self._board.add_scalar(name, number, step)
        if self._wandb_run is not None:
            self._wandb_run.log(numbers, step=step)

    def image(self, step: int, name: str, image: Image.Image) -> None:
        """Adds an image to TensorBoard and Weights & Biases, where enabled."""
        if self._board is not None:
            pixels = np.asarray(image.convert("RGB"))
            self._board.add_image(name, pixels, step, dataformats="HWC")
        if self._wandb is not None and self._wandb_run is not None:
            self._wandb_run.log({name: self._wandb.Image(image)}, step=step)

    def sync(self) -> None:
        """Copies the file to a store that cannot append. Call it with each checkpoint."""
        if self._remote is not None:
            self._remote.write_text(self._local.read_text())

    def close(self) -> None:
        if self._file is None:
            return
        self._file.close()
        self._file = None
        self.sync()
        if self._board is not None:
            self._board.close()
        if self._wandb_run is not None:
            self._wandb_run.finish()


class Progress:
    """Speed and time left. The first `count` starts the clock, so that compilation is left out."""

    def __init__(self, num_steps: int, first_step: int = 0, peak_tflops: float = 0.0):
        """Args: peak_tflops: of all devices together; 0: unknown, and no utilization."""
        self._num_steps, self._peak = num_steps, peak_tflops
        self._step = self._clock_step = first_step
        self._began = self._window_began = 0.0
        self._window: collections.Counter[str] = collections.Counter()

    def count(self, wait: float, **sums: float | int) -> None:
        """Counts a step.

        Args:
          wait: seconds waited for its data.
          sums: positions, images and useful tflops of its batch.
        """
        self._step += 1
        if self._began:
            self._window.update({"steps": 1, "wait": wait, **sums})  # a Counter adds
        else:
            self._began = self._window_began = time.perf_counter()
            self._clock_step = self._step

    def rates(self) -> dict[str, float]:
        """Speed since the last call; {} where no step was counted since."""
        if not self._window:
            return {}
        now = time.perf_counter()
        seconds = now - self._window_began
        out = {f"{name}_per_s": x / seconds for name, x in self._window.items()}
        out["data_wait"] = min(1.0, out.pop("wait_per_s"))
        if self._peak:
            out["mfu"] = out["tflops_per_s"] / self._peak
        self._window_began = now
        self._window.clear()
        return out

    def seconds_left(self) -> float | None:
        """By the mean speed so far, including pauses; None: not known yet."""
        done = self._step - self._clock_step
        if done < 1:
            return None
        return (time.perf_counter() - self._began) / done * (self._num_steps - self._step)

    def line(self, step: int, values: Mapping[str, Any]) -> str:
        """The line on the console: step, losses, images/s, time left."""
        width = len(str(self._num_steps))
        parts = [f"step {step:{width}}/{self._num_steps}"]
        parts += [f"{short} {values[name]:.4f}" for short, name in _CONSOLE if name in values]
        if "images_per_s" in values:
            parts.append(f"{values['images_per_s']:.1f} images/s")
        if "mfu" in values:
            parts.append(f"{values['mfu']:.0%} MFU")
        left = self.seconds_left()
        if left is not None and step < self._num_steps:
            parts.append(f"{duration(left)} left")
        return "  ".join(parts)


def json_line(step: int, values: Mapping[str, float], now: float) -> str:
    """One line of `metrics.jsonl`."""
    finite = {name: v if math.isfinite(v) else None for name, v in values.items()}
    line: dict[str, Any] = {"step": step, "time": round(now, 3), **finite}
    non_finite = {name: str(v) for name, v in values.items() if not math.isfinite(v)}
    if non_finite:
        line["non_finite"] = non_finite
    return json.dumps(line, allow_nan=False) + "\n"


def lines_up_to(file: epath.Path, last_step: int) -> str:
    """The lines of a file of JSON lines up to `last_step`.

    Lines that a crash damaged are left out, and a file that cannot be read is set aside, with a
    warning: neither may stop a run from resuming.
    """
    if not file.exists():
        return ""
    try:
        content = file.read_bytes().splitlines()
    except OSError as error:
        files.set_aside(file, error)
        return ""
    lines, damaged = [], 0
    for line in content:
        try:
            text = line.decode()
            if json.loads(text)["step"] <= last_step:
                lines.append(text + "\n")
        except (ValueError, TypeError, KeyError, RecursionError):
            damaged += 1
    if damaged:
        print(f"WARNING: {file}: damaged lines removed: {damaged}", flush=True)
    return "".join(lines)


def duration(seconds: float) -> str:
    """Seconds as '45 s', '12 min' or '3 h 05 min'."""
    if seconds < 90:
        return f"{max(0, round(seconds))} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 90 else f"{minutes // 60} h {minutes % 60:02} min"


def _package(name: str, extra: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise ImportError(
            f"{extra}: expected the package {name}; it is not installed: run pip install "
            f"'janusflow_jax[{extra}]', or switch {extra} off in the config"
        ) from error
