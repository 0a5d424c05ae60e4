"""A run's checkpoints: all processes save in the background, a marker commits.

`checkpoints/<step>/` holds `params/`, `ema/` and `opt_state/` (an Orbax folder each), `run.json`,
`checksums.json` and the marker, which the first process writes last. A folder without a marker
does not count.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax
from etils import epath
from orbax.checkpoint import v1 as ocp

from janusflow_jax.checkpoints import checksums, model_folder, workdir as workdir_lib
from janusflow_jax.checkpoints.checksums import MARKER
from janusflow_jax.config import files
from janusflow_jax.config.errors import CheckpointError
from janusflow_jax.parallel import processes, trees

DAMAGED = "DAMAGED"
"""Replaces the marker of a damaged checkpoint."""
BARRIER_S = 1200
"""Timeout of a barrier at the end of a save, in seconds."""


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
          keep: number of checkpoints to keep, the newest.
          keep_every_steps: checkpoints of its multiples stay too; 0: none.
          before_commit: called before a marker is written; raises if this run may not write.
          writes: False: change nothing in the folder.
        """
        self.folder = model_folder.resolve(workdir) / "checkpoints"
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
        """Starts saving; returns when the arrays may be donated. Waits for the previous save.

        If that one failed on any process, nothing starts: see `failed` and `wait`.

        Args: run: JSON values; `time` is added.
        """
        self.join()
        if any(processes.gather("!" if self.failed else "")):
            return
        self._count += 1
        folder = self.folder / str(step)
        saved = {"params": params, "ema": ema, "opt_state": trees.flatten(opt_state)}
        saved = {name: tree for name, tree in saved.items() if tree}
        try:
            if processes.is_main():
                if folder.exists():
                    files.remove(folder)
                folder.mkdir(parents=True)
            pending = [_start(folder / name, tree) for name, tree in saved.items()]
        except Exception as error:
            if not workdir_lib.is_of_store(error, self.folder):
                raise
            self._error = error
            return
        run = {**run, "time": round(time.time(), 3)}

        def finish() -> None:
            with self._recording():
                for response in pending:
                    response.result()
            self._commit(folder, run, list(saved))

        self._thread = threading.Thread(target=finish, name=f"save-{step}", daemon=True)
        self._thread.start()

    def _commit(self, folder: epath.Path, run: Any, names: list[str]) -> None:
        """Every process writes checksums of its own files; then the first writes the marker.

        A process that failed joins the barriers too, so that no process waits for it. The first
        process then misses its checksums.
        """

        def write_sums() -> None:
            if processes.is_main():
                for name in names:
                    model_folder.strip_local_paths(folder / name)
                (folder / "run.json").write_text(json.dumps(run, indent=1))
            checksums.write_share(folder, processes.index())

        def commit() -> None:
            if processes.is_main():
                checksums.merge_shares(folder, processes.count())
                self._before_commit()
                (folder / MARKER).write_text(f"{folder.name}\n")
                self._prune()

        for phase, work in (("summed", write_sums), ("committed", commit)):
            with self._recording():
                if not self.failed:
                    work()
            with self._recording():
                _barrier(f"save {self._count} {phase}")

    @contextlib.contextmanager
    def _recording(self) -> Iterator[None]:
        """In the thread: records the first error, which `wait` raises."""
        try:
            yield
        except BaseException as error:  # noqa: BLE001
            self._error = self._error or error

    def wait(self) -> None:
        """Returns when the last save is committed; raises CheckpointError if it was not."""
        self.join()
        if self._error is not None:
            error, self._error = self._error, None
            good = self.steps()
            raise CheckpointError(
                f"{self.folder}: a checkpoint was not saved: {error}\nfinished checkpoints: "
                f"{good or 'none yet'}. Fix the cause (is the disk full?), then run the same "
                "command again: it resumes from the newest of them"
            ) from error

    def join(self) -> None:
        """Returns when no save is running."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None

    def restore_newest(self, abstract: dict[str, Any]) -> tuple[dict[str, Any], Any] | None:
        """The newest undamaged checkpoint; None if there is no checkpoint.

        Logs a warning for each damaged one.

        Args: abstract: as in `restore`.
        Raises:
          CheckpointError: there are checkpoints, and all of them are damaged.
          CheckpointError: arrays that do not fit (all listed).
        """
        if processes.is_main() and self._writes:
            self._clean()
        newest = self.steps()[-100:]  # all may be too long for a message between processes
        steps = json.loads(processes.from_main(json.dumps(newest)))
        for step in reversed(steps):
            damage = self._damage(step)
            if not damage:
                return self.restore(step, abstract)
            message = f"{self.folder / str(step)}: damaged: {damage}"
            if step == steps[0]:
                raise CheckpointError(
                    f"{message}\nThere is no older checkpoint. Restore the folder from a copy, "
                    "or start a new run in another --config.workdir"
                )
            processes.log(f"WARNING: {message}\nWARNING: trying the checkpoint before it")
            if processes.is_main() and self._writes:
                with contextlib.suppress(OSError):  # a disk that fails: the next start warns again
                    (self.folder / str(step) / MARKER).rename(self.folder / str(step) / DAMAGED)
        return None

    def _damage(self, step: int) -> str:
        """What is wrong with the files; each process verifies a share."""
        share = (processes.index(), processes.count())
        reports = processes.gather(checksums.damage(self.folder / str(step), share=share))
        return "; ".join(dict.fromkeys(filter(None, reports)))

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
            target = trees.flatten(want)
            saved = ocp.metadata(folder / name).metadata
            problems += trees.mismatches(target, saved, name)
            if problems:
                continue
            as_saved = target if name == "opt_state" else trees.unflatten(target)
            got = trees.flatten(ocp.load(folder / name, as_saved))
            out[name] = jax.tree.unflatten(jax.tree.structure(want), [got[n] for n in target])
        if problems:
            listed = "\n".join(f"  - {p}" for p in problems)
            raise CheckpointError(f"{folder}: is not of this config:\n{listed}")
        return out, checksums.read_json(folder / "run.json")

    def _prune(self) -> None:
        """Removes checkpoints that are neither among the newest nor multiples to keep."""
        every = self.keep_every_steps
        for step in self.steps()[: -self.keep]:
            if not every or step % every:
                (self.folder / str(step) / MARKER).unlink()  # first
                files.remove(self.folder / str(step))

    def _clean(self) -> None:
        """Removes unfinished saves: no other run writes here."""
        for entry in self.folder.iterdir() if self.folder.exists() else ():
            if entry.name.isdigit() and not any((entry / m).exists() for m in (MARKER, DAMAGED)):
                processes.log(f"{entry}: unfinished; removed")
                files.remove(entry)


def _start(path: epath.Path, tree: Any) -> Any:
    with model_folder.saving(tree):
        return ocp.save_async(path, tree)


def _barrier(key: str) -> None:
    """Waits for all processes, over the network: the devices are busy with training steps."""
    asyncio.run(
        ocp.multihost.sync_global_processes(key, operation_id="janusflow", timeout=BARRIER_S)
    )
