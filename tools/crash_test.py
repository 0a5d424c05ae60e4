"""Kills a training run many times and checks that nothing is lost.

    python tools/crash_test.py --kills 50

A tiny run is trained once without interruption. Then the same run is started, killed with SIGKILL
at a random moment and restarted until it is done. Its parameters, optimizer state, EMA, `run.json`
and metrics must equal those of the uninterrupted run bit for bit, except for times. This repeats
until N kills were made. Kinds of moments take turns:

    step    while the devices compute a step
    save    while a checkpoint is written in the background
    marker  after its arrays are written, before it is committed
    data    while a row is made, ahead of its step

The process reports its events through a pipe, and a kill counts for its kind only if that was in
progress when the process died. `step` and `save` run at full speed; for `marker` and `data`, which
last milliseconds, the thread at that place is held while all others continue. The last line and the
exit status give the result.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import dataclasses
import io
import json
import os
import pathlib
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from typing import Any, ClassVar

from janusflow_jax.parallel import trees

ROOT = pathlib.Path(__file__).resolve().parents[1]
KINDS = ("marker", "data", "save", "step")
CLOCKS = ("time", "goodput", "mfu", "data_wait", "slowest_s", "slowest_process")
"""Metrics that depend on time; so do those that end in _per_s or begin with time/."""
BATCH_ROWS, NUM_STEPS, SAVE_EVERY = 8, 20, 3
COLORS = {"red": (220, 30, 30), "blue": (30, 60, 220), "green": (30, 180, 40)}


def tiny_config(data: str, workdir: str) -> Any:
    """A run of seconds with every part, both tasks and 60,000 parameters."""
    from janusflow_jax import config as c

    model = c.model_config("test")
    change, sizes = dataclasses.replace, {"num_heads": 2, "mlp_width": 32, "width": 16}
    model.llm = change(model.llm, **sizes, num_kv_heads=2, head_dim=8, num_layers=2)
    model.und = change(model.und, **sizes, num_layers=1)
    model.gen = change(model.gen, width=8)
    model.vae = change(model.vae, channels=(4, 4, 4, 4), layers_per_block=1, norm_groups=2)
    model.repa = change(model.repa, layer=1, width=16)
    sources = tuple(
        c.SourceConfig(name=task, path=data, task=task, format="chat", weight=0.5)
        for task in ("understand", "generate")
    )
    return c.TrainConfig(
        name="crash-test",
        workdir=workdir,
        model=model,
        data=c.DataConfig(sources=sources, row_len=160, gen_slots=5, und_slots=2),
        optim=c.OptimConfig(lr=1e-3, warmup_steps=2, ema=0.995),
        loss=c.LossConfig(time_shift=3.0),
        allow_fresh=True,
        train_parts=tuple(p for p in c.MODEL_PARTS if p != "und_encoder"),
        tokenizer=str(ROOT / "starts" / "emoji_llm" / "hub"),
        batch_rows=BATCH_ROWS,
        num_steps=NUM_STEPS,
        seed=1,
        remat="none",
        log_every_steps=1,
        save_every_steps=SAVE_EVERY,
    )


def get_config(data: str) -> Any:
    """As a config file: `--config=tools/crash_test.py:DATA --config.workdir=...`."""
    return tiny_config(data, "")


def record(i: int) -> dict[str, Any]:
    """An image of a colored rectangle, and its caption."""
    import numpy as np
    from PIL import Image

    color = list(COLORS)[i % 3]
    pixels = np.full((64, 64, 3), 255, np.uint8)
    pixels[8 : 40 + i % 8, 16:48] = COLORS[color]
    data = io.BytesIO()
    Image.fromarray(pixels).save(data, "PNG")
    return {"id": str(i), "image": data.getvalue(), "captions": [f"a {color} fox"]}


def make_data(out: pathlib.Path, count: int = 30) -> None:
    """Prepares a data set of squares as tfds does, in array_record files."""
    import tensorflow_datasets as tfds

    class Squares(tfds.core.GeneratorBasedBuilder, skip_registration=True):
        """Colored squares."""

        VERSION = tfds.core.Version("1.0.0")
        url_infos: ClassVar = {}  # pyright: ignore[reportIncompatibleVariableOverride]

        def _info(self) -> Any:
            features = {
                "id": tfds.features.Text(),
                "image": tfds.features.Image(shape=(64, 64, 3), encoding_format="png"),
                "captions": tfds.features.Sequence(tfds.features.Text()),
            }
            return tfds.core.DatasetInfo(
                builder=self, features=tfds.features.FeaturesDict(features)
            )

        def _split_generators(self, dl_manager: Any) -> dict[str, Any]:
            del dl_manager
            return {"train": self._generate_examples()}

        def _generate_examples(self) -> Any:
            for r in map(record, range(count)):
                yield r["id"], {**r, "image": io.BytesIO(r["image"])}

    tfds.disable_progress_bar()
    with tempfile.TemporaryDirectory() as work:
        builder = Squares(data_dir=work, file_format="array_record")
        with contextlib.redirect_stdout(io.StringIO()):
            builder.download_and_prepare()
        shutil.copytree(str(builder.data_dir), out)


def child(data: str, workdir: str, events: int, hold: str) -> None:
    """Trains, and reports what begins (+) and ends (-) through the file descriptor `events`, as
    lines of '<name> <number> <time>'. `hold`: '<name>:<number>' of an event that never returns."""
    import jax

    from janusflow_jax import train
    from janusflow_jax.checkpoints import run as run_checkpoints
    from janusflow_jax.data import rows
    from janusflow_jax.training import step as train_step

    def report(name: str, number: int) -> None:
        os.write(events, f"{name} {number} {time.monotonic()}\n".encode())
        if f"{name}:{number}" == hold:
            time.sleep(600)

    jit = train_step.jit_train_step

    def reporting_jit(*args: Any) -> Any:
        compiled, done = jit(*args), [int(args[2]["step"])]

        def step(state: Any, batch: Any) -> Any:
            done[0] += 1
            number = done[0]
            report("step+", number)
            state, out = compiled(state, batch)

            def wait() -> None:
                jax.block_until_ready(out["loss"])
                report("step-", number)

            threading.Thread(target=wait, daemon=True).start()
            return state, out

        return step

    saver = run_checkpoints.RunCheckpoints
    train_step.jit_train_step = reporting_jit
    save, commit, make_row = saver.save, saver._commit, rows.Rows.row

    def reporting_save(self: Any, step: int, **trees: Any) -> None:
        self.join()  # as `save` does first: the save before it is not this one
        report("save+", step)
        save(self, step, **trees)

    def reporting_commit(self: Any, folder: Any, run: Any, names: list[str]) -> None:
        step = int(folder.name)
        report("save-", step)
        report("marker+", step)
        commit(self, folder, run, names)
        report("marker-", step)

    def reporting_row(self: Any, row: int) -> Any:
        report("data+", int(row))
        made = make_row(self, row)
        report("data-", int(row))
        return made

    saver.save, saver._commit, rows.Rows.row = (
        reporting_save,
        reporting_commit,
        reporting_row,
    )
    train.train(tiny_config(data, workdir))


class Child:
    """A training process and its events."""

    def __init__(self, data: str, workdir: str, log: pathlib.Path, hold: str = ""):
        out, into = os.pipe()
        command = [sys.executable, __file__, "--child", workdir, "--data", data]
        command += ["--events", str(into), "--hold", hold]
        with log.open("ab") as file:
            self.process = subprocess.Popen(command, stdout=file, stderr=file, pass_fds=[into])
        os.close(into)
        self.events: list[tuple[str, int, float]] = []
        self._new_event = threading.Condition()
        self._reader = threading.Thread(target=self._read, args=(out,), daemon=True)
        self._reader.start()

    def _read(self, descriptor: int) -> None:
        with open(descriptor) as pipe:
            for line in pipe:
                name, number, clock = line.split()
                with self._new_event:
                    self.events.append((name, int(number), float(clock)))
                    self._new_event.notify_all()
        with self._new_event:
            self.events.append(("end", 0, 0.0))
            self._new_event.notify_all()

    def wait_for(self, name: str, number: int) -> bool:
        """Waits for an event; False when the process ends without it."""
        seen = lambda: {(n, k) for n, k, _ in self.events} & {(name, number), ("end", 0)}  # noqa: E731
        with self._new_event:
            self._new_event.wait_for(seen)
            return (name, number) in seen()

    def kill(self) -> None:
        self.process.send_signal(signal.SIGKILL)

    def finish(self) -> int:
        """Its exit status, after all its events were read."""
        self._reader.join()
        return self.process.wait()

    def in_progress(self) -> list[str]:
        """The kinds that had begun and not ended."""
        events = {(name, number) for name, number, _ in self.events}
        begun = [(n[:-1], k) for n, k in events if n.endswith("+")]
        return sorted({kind for kind, k in begun if (f"{kind}-", k) not in events})

    def durations(self, kind: str) -> list[float]:
        times = {(name, number): clock for name, number, clock in self.events}
        ends = [(k, t) for (name, k), t in times.items() if name == f"{kind}-"]
        return sorted(t - times[f"{kind}+", k] for k, t in ends if (f"{kind}+", k) in times)


def newest(workdir: pathlib.Path) -> int:
    """The newest committed step; 0 without one."""
    markers = workdir.glob("checkpoints/*/COMMITTED")
    return max((int(p.parent.name) for p in markers), default=0)


def metrics_lines(workdir: pathlib.Path) -> list[dict[str, Any]]:
    """The run's metrics, without those that depend on time."""
    lines = [json.loads(x) for x in (workdir / "metrics.jsonl").read_text().splitlines()]
    timed = lambda n: n in CLOCKS or n.endswith("_per_s") or n.startswith("time/")  # noqa: E731
    return [{n: v for n, v in line.items() if not timed(n)} for line in lines]


def differences(one: pathlib.Path, two: pathlib.Path) -> list[str]:
    """Differences of two finished runs in arrays, `run.json` and metrics, bit for bit."""
    import numpy as np

    from janusflow_jax.checkpoints import checksums, model_folder

    steps = newest(one), newest(two)
    if len(set(steps)) > 1 or not all(steps):
        return [f"last checkpoints: {steps}"]
    folders = [model_folder.epath.Path(w / "checkpoints" / str(steps[0])) for w in (one, two)]
    out = [f"{f}: {d}" for f in folders if (d := checksums.damage(f))]
    for name in ("params", "ema", "opt_state"):
        a, b = (trees.flatten(model_folder.load_tree(f / name)) for f in folders)
        out += [f"{name}: {sorted(a.keys() ^ b.keys())}"] if a.keys() != b.keys() else []
        same = lambda x, y: np.asarray(x).tobytes() == np.asarray(y).tobytes()  # noqa: E731
        out += [f"{name}/{n}" for n in a.keys() & b.keys() if not same(a[n], b[n])]
    a, b = (json.loads((f / "run.json").read_text()) for f in folders)
    for run in (a, b):
        del run["time"], run["config"]["workdir"]
    out += [] if a == b else [f"run.json: {a} and {b}"]
    a, b = metrics_lines(one), metrics_lines(two)
    if [x["step"] for x in a] != [x["step"] for x in b]:
        out.append(f"metrics: steps {[x['step'] for x in a]} and {[x['step'] for x in b]}")
    out += [f"metrics of step {x['step']}" for x, y in zip(a, b, strict=False) if x != y]
    return out


class CrashTest:
    """Kills runs one after another and counts what was in progress."""

    def __init__(self, work: pathlib.Path, seed: int):
        self.work, self.random = work, random.Random(seed)
        self.data, self.log = str(work / "data"), work / "log.txt"
        self.hits: collections.Counter[str] = collections.Counter()
        self.kills, self.missed = 0, 0
        self.typical: dict[str, float] = {}

    def whole(self) -> pathlib.Path:
        """Trains without interruption, and measures how long steps and saves take."""
        child = Child(self.data, str(self.work / "whole"), self.log)
        if child.finish() != 0:
            raise SystemExit(f"the uninterrupted run failed:\n{self.log.read_text()[-3000:]}")
        for kind in ("step", "save"):
            durations = child.durations(kind)
            self.typical[kind] = durations[len(durations) // 2]
        return self.work / "whole"

    def kill_once(self, workdir: pathlib.Path) -> bool:
        """Starts the run and kills it; False when it ended before the chosen moment."""
        begun = newest(workdir)
        kind = min(KINDS, key=lambda k: (self.hits[k], KINDS.index(k)))
        step = begun + self.random.randint(1, 2 * SAVE_EVERY)
        number, delay = step, self.random.uniform(0, 0.8) * self.typical.get(kind, 0.0)
        if kind in ("save", "marker"):
            number = -(-step // SAVE_EVERY) * SAVE_EVERY
        if kind == "data":
            number = (step - 1) * BATCH_ROWS + self.random.randrange(BATCH_ROWS)
        held = kind in ("marker", "data")
        if held:
            delay = self.random.uniform(0, 2) * self.typical["step"]
        event = f"{kind}+:{number}"
        child = Child(self.data, str(workdir), self.log, event if held else "")
        if child.wait_for(f"{kind}+", number):
            time.sleep(delay)
            child.kill()
        status = child.finish()
        if status == 0:
            return False
        if status != -signal.SIGKILL:
            raise SystemExit(f"the run failed by itself:\n{self.log.read_text()[-3000:]}")
        in_progress = child.in_progress()
        self.kills += 1
        self.hits[kind] += kind in in_progress
        self.missed += kind not in in_progress
        print(
            f"| {self.kills} | {workdir.name} | {kind} {number} + {1000 * delay:.0f} ms | "
            f"{', '.join(in_progress) or 'nothing'} | {begun} | {newest(workdir)} |",
            flush=True,
        )
        return True


def run(kills: int, seed: int, work: pathlib.Path) -> list[str]:
    """Makes all kills; returns the problems."""
    test = CrashTest(work, seed)
    make_data(work / "data")
    whole, problems, rounds = test.whole(), [], 0
    print("| kill | run | aimed at | in progress | first step | newest checkpoint |")
    print("| --- | --- | --- | --- | --- | --- |")
    while test.kills < kills:
        rounds += 1
        workdir = work / f"run{rounds}"
        while test.kills < kills and test.kill_once(workdir):
            pass
        if newest(workdir) < NUM_STEPS:
            status = Child(test.data, str(workdir), test.log).finish()
            if status != 0:
                raise SystemExit(f"the run failed by itself:\n{test.log.read_text()[-3000:]}")
        different = differences(whole, workdir)
        print(f"{workdir.name}: {'DIFFERS' if different else 'equal'}", flush=True)
        problems += [f"{workdir.name}: {d}" for d in different]
    problems += [f"no kill during: {k}" for k in KINDS if kills >= len(KINDS) and not test.hits[k]]
    hits = ", ".join(f"{k} {test.hits[k]}" for k in KINDS)
    print(f"{test.kills} kills (seed {seed}): {hits}, missed {test.missed}; {rounds} runs")
    return problems


def main(argv: list[str] | None = None) -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    p.add_argument("--kills", type=int, default=5)
    p.add_argument("--seed", type=int, default=0)
    p.add_argument("--work", help="a folder that does not exist, kept; default: a temporary one")
    for name in ("--child", "--data", "--hold"):
        p.add_argument(name, default="", help=argparse.SUPPRESS)
    p.add_argument("--events", type=int, default=1, help=argparse.SUPPRESS)
    args = p.parse_args(argv)
    if args.child:
        child(args.data, args.child, args.events, args.hold)
        return
    with contextlib.ExitStack() as ends:
        if args.work:
            work = pathlib.Path(args.work).resolve()
            work.mkdir(parents=True)
        else:
            work = pathlib.Path(ends.enter_context(tempfile.TemporaryDirectory(prefix="crash-")))
        os.environ.setdefault("JAX_PLATFORMS", "cpu")
        os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(work / "cache"))
        os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.1")
        began = time.time()
        problems = run(args.kills, args.seed, work)
    for problem in problems:
        print(f"  - {problem}")
    print(f"{time.time() - began:.0f} s")
    print("FAILED: see above" if problems else "PASSED: every run equals the uninterrupted one")
    sys.exit(1 if problems else 0)


if __name__ == "__main__":
    main()
