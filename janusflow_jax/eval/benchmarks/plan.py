"""What a benchmark run computes in which batch, and which batches are done.

A unit is an image to generate or a question to answer. The plan is a pure function of the units and
the batch size, and knows nothing of processes or of what was done before. So the same rows always
share a batch: on one kind of device a unit gets the same bits with any number of processes and
after any interruption.

A process computes its own batches, alone. After each batch it writes a mark, by a rename, when
everything else of the batch is on disk. To resume is to compute the batches without a mark.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import re
from collections.abc import Mapping, Sequence
from typing import Any

from etils import epath

from janusflow_jax.checkpoints import checksums
from janusflow_jax.config import files
from janusflow_jax.config.errors import ConfigError, DataError
from janusflow_jax.config.fields import differences
from janusflow_jax.parallel import processes

SETTINGS = "settings.json"
_SHARD = re.compile(r"(\d+)/(\d+)")
_SLURM = ("SLURM_NTASKS", "SLURM_PROCID")


@dataclasses.dataclass(frozen=True)
class Batch:
    """Rows that one call computes."""

    index: int  # in the plan
    rows: tuple[int, ...]  # indices of units; as many as the batch size
    count: int  # number of units; the rows after them repeat the last one

    @property
    def units(self) -> tuple[int, ...]:
        return self.rows[: self.count]


def batches(shapes: Sequence[Any], size: int) -> list[Batch]:
    """Cuts units into batches of exactly `size` rows of one shape.

    Args:
      shapes: what the shape of each unit's arrays depends on, such as the bucket of its prompt's
        length; values that can be sorted. Units of one shape stay in their order.
      size: rows of a batch. The last batch of a shape repeats its last unit.
    """
    members: dict[Any, list[int]] = {}
    for unit, shape in enumerate(shapes):
        members.setdefault(shape, []).append(unit)
    out: list[Batch] = []
    for shape in sorted(members):
        units = members[shape]
        for begin in range(0, len(units), size):
            part = units[begin : begin + size]
            rows = part + part[-1:] * (size - len(part))
            out.append(Batch(len(out), tuple(rows), len(part)))
    return out


def shard(text: str = "", env: Mapping[str, str] = os.environ) -> tuple[int, int]:
    """The number of this process, from 0, and the number of processes. Batch k of the plan belongs
    to process k mod n.

    Args:
      text: 'k/n', counted from 0; '': from JAX_PROCESS_ID and JAX_NUM_PROCESSES, or from Slurm's
        variables, or 0 of 1.
    Raises:
      ConfigError: not such a pair of numbers.
    """
    names = processes.VARIABLES[1:]
    if not text and any(env.get(n) for n in names):
        text, source = f"{env.get(names[1], '')}/{env.get(names[0], '')}", " and ".join(names)
    elif not text and all(env.get(n) for n in _SLURM):
        text, source = f"{env[_SLURM[1]]}/{env[_SLURM[0]]}", " and ".join(_SLURM)
    elif not text:
        return 0, 1
    else:
        source = "--shard"
    match = _SHARD.fullmatch(text)
    if match is None or int(match[1]) >= int(match[2]):
        raise ConfigError(
            f"{source}: expected k/n with 0 <= k < n, as 0/4 to 3/4; got {text!r}: correct it"
        )
    return int(match[1]), int(match[2])


class Manifest:
    """The folder with the settings of a run and the marks of its batches."""

    def __init__(self, folder: Any, settings: dict[str, Any]):
        """Opens the folder of a run, or starts one.

        Args:
          settings: plain JSON values: everything that the results depend on.
        Raises:
          ConfigError: the folder belongs to a run with other settings.
        """
        self.folder, self.settings = files.resolve(folder), json.loads(json.dumps(settings))
        self._digest = digest(self.settings)
        file = self.folder / SETTINGS
        if not file.exists():
            with files.replacing(file) as part:
                text = json.dumps(settings, indent=1, ensure_ascii=False)
                part.write_text(text + "\n", encoding="utf-8")
        # Another process may have written the file meanwhile.
        if different := differences(read_settings(self.folder), self.settings):
            raise ConfigError(
                f"{self.folder}: expected the settings of the run that began here; got other ones: "
                f"{'; '.join(different)}: use them, or choose another --out"
            )

    def commit(self, index: int, record: dict[str, Any]) -> None:
        """Marks a batch as done. Write everything else of the batch before.

        Args: record: the results, or what describes them; plain JSON values.
        """
        text = json.dumps({"settings": self._digest, **record}, ensure_ascii=False)
        # A suffix: to look for what killed processes left, it would list all marks each time.
        with files.replacing(mark_file(self.folder, index), suffix="mark") as part:
            part.write_text(text + "\n", encoding="utf-8")

    def marks(self) -> dict[int, dict[str, Any]]:
        """The records of the batches that are done."""
        return read_marks(self.folder, self._digest)


def mark_file(folder: epath.Path, index: int) -> epath.Path:
    """The mark of a batch."""
    return folder / f"{index:06d}.json"


def read_settings(folder: Any) -> dict[str, Any]:
    """The settings of the run in a folder.

    Raises:
      DataError: no run.
      CheckpointError: a file that is not JSON.
    """
    file = files.resolve(folder) / SETTINGS
    if not file.exists():
        raise DataError(f"{file}: expected the settings of a run; got no such file: run it first")
    return checksums.read_json(file)


def read_marks(folder: Any, settings_digest: str = "") -> dict[int, dict[str, Any]]:
    """The records of the batches of a run that are done, in the order of the plan.

    Args: settings_digest: of the run's settings; '': read them.
    Raises:
      DataError: a mark of another run.
      CheckpointError: a file that is not JSON.
    """
    folder = files.resolve(folder)
    settings_digest = settings_digest or digest(read_settings(folder))
    out = {}
    for file in sorted(folder.glob("[0-9]*.json"), key=lambda x: x.name):
        record = checksums.read_json(file)
        if record.pop("settings", None) != settings_digest:
            raise DataError(
                f"{file}: expected a mark of the run in {SETTINGS}; got one of other settings: "
                "move it away and run again"
            )
        out[int(file.stem)] = record
    return out


def digest(settings: dict[str, Any]) -> str:
    """SHA-256 of settings."""
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()
