"""A run's checkpoints: saved in the background by all processes, committed by a marker, resumed.

`checkpoints/<step>/` holds `params/`, `ema/` and `opt_state/` (an Orbax folder each), `run.json`,
`checksums.json` and, written last by the first process, the marker. What has no marker does not
count. Beside `checkpoint.py` because that file reads models and is used by all commands, and this
one is training's only.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import os
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax
from etils import epath
from orbax.checkpoint import v1 as ocp

from janusflow_jax.checkpoints import checksums, model_folder
from janusflow_jax.checkpoints.checksums import MARKER
from janusflow_jax.config.errors import CheckpointError
from janusflow_jax.parallel import processes, trees
from janusflow_jax.parallel.sharding import path_name
from janusflow_jax.parallel.trees import flat

DAMAGED = "DAMAGED"
"""Stands in the marker's place where a checkpoint was found damaged and passed over."""
BARRIER_S = 1200
"""So long the processes wait for one another at the end of a save."""


def _is_news(record: logging.LogRecord) -> bool:
    """Orbax prints the stacks of errors in its threads that it then also raises, for us to tell."""
    return "_SignalingThread.run() raised" not in record.getMessage()


logging.getLogger("absl").addFilter(_is_news)


class RunCheckpoints:
    """Saves and restores a run's state; all processes of a job call all methods alike."""

    def __init__(
        self,
        workdir: Any,
        keep: int = 2,
        keep_every_steps: int = 0,
        before_commit: Callable[[], None] = lambda: None,
        writes: bool = True,
    ):
        """
        Args:
          keep: so many of the newest stay.
          keep_every_steps: those of multiples of it stay too; 0: none.
          before_commit: called before a marker is written; raises where this run may not.
          writes: False: nothing in the folder is changed, not even what is damaged.
        """
        self.folder = epath.Path(workdir).resolve() / "checkpoints"
        self.keep, self.keep_every_steps = max(keep, 1), keep_every_steps
        self._before_commit, self._writes = before_commit, writes
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None
        self._count = 0  # names of barriers must be new

    @property
    def failed(self) -> bool:
        """Whether a save has failed here; `wait` raises it."""
        return self._error is not None

    def steps(self) -> list[int]:
        """Steps with a finished checkpoint, ascending."""
        return model_folder.committed_steps(self.folder.parent)

    def save(self, step: int, *, params: Any, ema: Any, opt_state: Any, run: Any) -> None:
        """Starts saving; returns when the arrays may be donated. Waits for the save before.

        Where that one failed on any process nothing is started: `failed` and `wait` tell.

        Args: run: JSON values; `time` is added.
        """
        self._join()
        if any(processes.gather("!" if self.failed else "")):
            return
        self._count += 1
        folder = self.folder / str(step)
        given = {"params": params, "ema": ema, "opt_state": flat(opt_state)}
        given = {name: tree for name, tree in given.items() if tree}
        try:
            if processes.is_main():
                if folder.exists():
                    _remove(folder)
                folder.mkdir(parents=True)
            under_way = [_start(folder / name, tree) for name, tree in given.items()]
        except OSError as error:
            self._error = error
            return
        run = {**run, "time": round(time.time(), 3)}

        def finish() -> None:
            with self._noting():
                for response in under_way:
                    response.result()
            self._commit(folder, run, list(given))

        self._thread = threading.Thread(target=finish, name=f"save-{step}", daemon=True)
        self._thread.start()

    def _commit(self, folder: epath.Path, run: Any, names: list[str]) -> None:
        """Checksums, by every process of what it wrote; then the marker, by the first.

        A process whose part has failed comes to the barriers too, so that nobody waits for it; the
        first one then finds that its sums are missing.
        """
        with self._noting():
            if not self.failed:
                if processes.is_main():
                    for name in names:
                        model_folder.tidy(folder / name)
                    (folder / "run.json").write_text(json.dumps(run, indent=1))
                checksums.write_share(folder, processes.index())
        with self._noting():
            _barrier(f"save {self._count} summed")
        with self._noting():
            if processes.is_main() and not self.failed:
                checksums.merge_shares(folder, processes.count())
                self._before_commit()
                (folder / MARKER).write_text(f"{folder.name}\n")
                self._prune()
        with self._noting():
            _barrier(f"save {self._count} committed")

    @contextlib.contextmanager
    def _noting(self) -> Iterator[None]:
        """In the thread: keeps the first error, which `wait` raises."""
        try:
            yield
        except BaseException as error:  # noqa: BLE001
            self._error = self._error or error

    def wait(self) -> None:
        """Returns when the last save is committed; raises CheckpointError if it was not."""
        self._join()
        if self._error is not None:
            error, self._error = self._error, None
            good = self.steps()
            raise CheckpointError(
                f"{self.folder}: a checkpoint was not saved: {error}\nWhole and safe: steps "
                f"{good or 'none yet'}. Mend the cause (is the disk full?), then run the same "
                "command again: it goes on from the newest of them"
            ) from error

    def _join(self) -> None:
        if self._thread is not None:
            self._thread.join()
            self._thread = None

    def restore_newest(self, abstract: dict[str, Any]) -> tuple[dict[str, Any], Any] | None:
        """The newest checkpoint that is whole; None where there is none at all.

        A damaged one is named loudly and passed over: the one before it is taken.

        Args: abstract: as in `restore`.
        Raises:
          CheckpointError: there are checkpoints, and all of them are damaged.
          CheckpointError: arrays that do not fit (all listed).
        """
        if processes.is_main() and self._writes:
            self._clean()
        steps = json.loads(processes.from_main(json.dumps(self.steps())))
        for step in reversed(steps):
            damage = self._damage(step)
            if not damage:
                return self.restore(step, abstract)
            said = f"{self.folder / str(step)}: damaged: {damage}"
            if step == steps[0]:
                raise CheckpointError(
                    f"{said}\nNo older checkpoint is left to go back to. Restore the folder from "
                    "a copy, or begin anew in another --config.workdir"
                )
            processes.log(f"WARNING: {said}\nWARNING: going back to the checkpoint before it")
            if processes.is_main() and self._writes:
                (self.folder / str(step) / MARKER).rename(self.folder / str(step) / DAMAGED)
        return None

    def _damage(self, step: int) -> str:
        """What all processes together find wrong with the files, each reading its share."""
        share = (processes.index(), processes.count())
        found = processes.gather(checksums.damage(self.folder / str(step), share=share))
        return "; ".join(dict.fromkeys(filter(None, found)))

    def restore(self, step: int, abstract: dict[str, Any]) -> tuple[dict[str, Any], Any]:
        """Reads a step into ShapeDtypeStructs with shardings; files are not verified here.

        Args: abstract: {'params', 'ema', 'opt_state'}.
        Returns: trees of the same structure, and what was saved as `run`.
        Raises:
          CheckpointError: arrays that do not fit (all listed).
        """
        folder, out, problems = self.folder / str(step), {}, []
        for name, want in abstract.items():
            if not jax.tree.leaves(want):
                out[name] = want
                continue
            target = flat(want)
            saved = flat(ocp.metadata(folder / name).metadata)
            problems += model_folder.compare_trees(target, saved, name)
            if problems:
                continue
            as_saved = target if name == "opt_state" else trees.nested(target)
            got = flat(ocp.load(folder / name, as_saved))
            paths = jax.tree_util.tree_flatten_with_path(want)[0]
            leaves = [got[path_name(p)] for p, _ in paths]
            out[name] = jax.tree.unflatten(jax.tree.structure(want), leaves)
        if problems:
            listed = "\n".join(f"  - {p}" for p in problems)
            raise CheckpointError(f"{folder}: is not of this config:\n{listed}")
        return out, checksums.read_json(folder / "run.json")

    def _prune(self) -> None:
        """Removes what is neither among the newest nor kept for good."""
        every = self.keep_every_steps
        for step in self.steps()[: -self.keep]:
            if not every or step % every:
                (self.folder / str(step) / MARKER).unlink()  # first: a half-removed one is none
                _remove(self.folder / str(step))

    def _clean(self) -> None:
        """Removes saves that a kill cut short: nothing else writes here while this run does."""
        for entry in self.folder.iterdir() if self.folder.exists() else ():
            if entry.name.isdigit() and not any((entry / m).exists() for m in (MARKER, DAMAGED)):
                processes.log(f"{entry}: was never finished; removed")
                _remove(entry)


def _start(path: epath.Path, tree: Any) -> Any:
    with model_folder.saving(tree):
        return ocp.save_async(path, tree)


def _barrier(key: str) -> None:
    """Waits for all processes, from a thread: over the network and not on the devices, which the
    training step is using."""
    asyncio.run(
        ocp.multihost.sync_global_processes(key, operation_id="janusflow", timeout=BARRIER_S)
    )


def _remove(folder: epath.Path) -> None:
    shutil.rmtree(folder) if os.path.isdir(folder) else folder.rmtree()
