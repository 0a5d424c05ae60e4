"""Whatever ends a run, it says why and goes on later: kills, signals, disks, a second run."""

from __future__ import annotations

import dataclasses
import errno
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from etils import epath
from helpers import jobs, runs
from helpers.runs import read_metrics

from janusflow_jax import train
from janusflow_jax.checkpoints import checksums, model_folder, workdir
from janusflow_jax.config import lock, to_dict
from janusflow_jax.config.errors import CheckpointError, JanusFlowError
from janusflow_jax.training import flops, health, metrics, optim, run
from tools import crash_test

SHORT = ("num_steps=1000", "save_every_steps=3")


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    out = tmp_path_factory.mktemp("squares") / "data"
    crash_test.make_data(out)
    return out


def wait_for(there, job) -> None:
    end = time.monotonic() + jobs.TIMEOUT_S
    while not there():
        assert job[0].poll() is None and time.monotonic() < end, jobs.finish(job)
        time.sleep(0.1)


def saved(folder, step):
    return lambda: (Path(folder) / "checkpoints" / str(step) / "COMMITTED").exists()


@pytest.mark.slow
def test_kills_leave_no_trace(tmp_path):
    command = [sys.executable, "tools/crash_test.py", "--kills", "2", "--work", str(tmp_path / "w")]
    env = jobs.environment(1, 0, 1, 0)
    done = subprocess.run(
        command, cwd=jobs.ROOT, env=env, capture_output=True, text=True, timeout=1800
    )
    assert done.returncode == 0, done.stdout + done.stderr[-3000:]
    assert done.stdout.splitlines()[-1].startswith("PASSED")
    # and it can fail: one number of one array, one line of the metrics
    whole, other = tmp_path / "w" / "whole", tmp_path / "w" / "run1"
    lines = (other / "metrics.jsonl").read_text().splitlines()
    (other / "metrics.jsonl").write_text("\n".join(lines[:3] + lines[4:]))
    assert "metrics: steps" in crash_test.differences(whole, other)[0]
    (other / "metrics.jsonl").write_text("\n".join(lines).replace('"lr": ', '"lr": 1'))
    assert "metrics of step 1" in crash_test.differences(whole, other)


@pytest.mark.slow
def test_sigterm_saves_and_the_run_goes_on(data, tmp_path):
    job = jobs.start(data, tmp_path / "run", *SHORT)
    wait_for(lambda: (tmp_path / "run" / "metrics.jsonl").exists(), job)
    wait_for(lambda: len(read_metrics(tmp_path / "run")) >= 4, job)
    job[0].send_signal(signal.SIGTERM)
    ((status, said),) = jobs.finish(job)
    step = model_folder.committed_steps(tmp_path / "run")[-1]
    assert status == 0 and f"stopped at step {step}" in said and "time: " in said
    assert [x["step"] for x in read_metrics(tmp_path / "run")] == list(range(1, step + 1))
    again = jobs.run(data, tmp_path / "run", f"num_steps={step + 1}")
    assert f"resumed from step {step}" in again and "in 2 attempts" in again


CONFIG = """
from tools import crash_test
def get_config():
    cfg = crash_test.tiny_config({data!r}, "")
    cfg.evaluate.sources = cfg.data.sources
    return cfg
"""


@pytest.fixture(scope="module")
def commands(data, tmp_path_factory, golden_folder):
    """Name -> arguments; {} is a new folder."""
    # A shell starts background jobs with SIGINT ignored, which children would inherit.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    folder = tmp_path_factory.mktemp("commands")
    (folder / "config.py").write_text(CONFIG.format(data=str(data)))
    jobs.run(data, folder / "run", "num_steps=1")
    model = ["--model", str(golden_folder)]
    evaluated = ["--model", str(folder / "run"), "--suite", "losses"]
    evaluated += ["--config", str(folder / "config.py")]
    trained = [f"--config={folder / 'config.py'}", "--config.workdir={}/run"]
    return {
        "train": ["-m", "janusflow_jax.train", *trained],
        "evaluate": ["-m", "janusflow_jax.evaluate", *evaluated, "--out", "{}/eval.json"],
        "generate": ["-m", "janusflow_jax.generate", *model, "--prompt", "a", "--out", "{}/a.png"],
        "export": ["tools/export_checkpoint.py", *model, "--out", "{}/export"],
        "prepare": ["tools/prepare_data.py", "text", "README.md", "--out", "{}/text"],
    }


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "moment", "number"),
    [
        ("train", " jaxlib\n", signal.SIGINT),
        ("train", "Compiling jit(init)", signal.SIGINT),
        ("train", "fresh\n", signal.SIGTERM),
        ("train", "Compiling jit(create_state)", signal.SIGINT),
        ("train", "Compiling jit(step)", signal.SIGINT),
        ("evaluate", "Compiling jit", signal.SIGINT),
        ("generate", "Compiling jit", signal.SIGTERM),
        ("export", " orbax.checkpoint\n", signal.SIGTERM),
        ("prepare", " numpy\n", signal.SIGTERM),
    ],
)
def test_a_signal_before_the_first_step_ends_a_command_cleanly(
    commands, tmp_path, name, moment, number
):
    """Wherever it comes: while JAX is imported, a model is read or a program is compiled."""
    arguments = [x.format(tmp_path) for x in commands[name]]
    env = {**jobs.environment(1, 0, 1, 0), "JAX_LOG_COMPILES": "1"}
    job = [jobs.Process([sys.executable, "-u", "-X", "importtime", *arguments], env)]
    wait_for(lambda: moment in job[0].output(), job)
    job[0].send_signal(number)
    ((status, said),) = jobs.finish(job)
    own = [x for x in said.splitlines() if not x.startswith("import time:")]
    assert status == 128 + number, own
    assert own[-1] == f"stopped by {number.name}" or name == "prepare", own
    assert "Traceback" not in said and "ignored" not in said, own
    assert not [p for p in tmp_path.rglob("*") if ".partial-" in p.name or p.suffix == ".png"]


BUSY = {
    "in Python": "while True: pass",
    "in a library": "hashlib.pbkdf2_hmac('sha256', b'', b'', 10**9)",
    "in a callback that swallows exceptions": "Swallows()",
    "while a folder is written": "new = files.replacing(pathlib.Path(sys.argv[1])); "
    "new.__enter__().mkdir(); time.sleep(60)",
    "without a terminal": "os.close(2); time.sleep(60)",
    "with a worker": "multiprocessing.get_context('spawn').Process(target=time.sleep, args=(60,))"
    ".start(); time.sleep(60)",
}
SCRIPT = """
import hashlib, multiprocessing, os, pathlib, sys, threading, time
from janusflow_jax.config import files, signals
signals._BUSY_S = 0.2
class Swallows:
    def __del__(self):
        time.sleep(60)
if __name__ == "__main__":
    signals.end_on_signals("the same command resumes")
    print("ready", end=" ", flush=True)
    print("result", end="")
    {busy}
    print("not ended")
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("busy", BUSY)
def test_a_signal_ends_a_process_whatever_it_does(tmp_path, busy, number):
    (tmp_path / "script.py").write_text(SCRIPT.format(busy=BUSY[busy]))
    command = [sys.executable, str(tmp_path / "script.py"), str(tmp_path / "out")]
    job = [jobs.Process(command, jobs.environment(1, 0, 1, 0))]
    wait_for(lambda: "ready" in job[0].output(), job)
    time.sleep(0.3)
    job[0].send_signal(number)
    ((status, said),) = jobs.finish(job)
    assert status == 128 + number
    line = f"stopped by {number.name}; the same command resumes\n"
    assert line in said or busy == "without a terminal"
    assert "result" in said and "not ended" not in said and "Traceback" not in said
    assert [p.name for p in tmp_path.iterdir()] == ["script.py"]


@pytest.mark.slow
def test_a_second_run_refuses_and_a_killed_one_frees_the_folder(data, tmp_path):
    job = jobs.start(data, tmp_path / "run", *SHORT)
    wait_for(saved(tmp_path / "run", 3), job)
    ((status, said),) = jobs.finish(jobs.start(data, tmp_path / "run", *SHORT))
    assert status == 1 and "Traceback" not in said
    assert f"another process is writing here: process {job[0].pid} on " in said
    job[0].kill()
    job[0].wait()
    step = model_folder.committed_steps(tmp_path / "run")[-1]
    said = jobs.run(data, tmp_path / "run", f"num_steps={step + 1}")
    lost = json.loads((tmp_path / "run" / "attempts.json").read_text())[0]
    assert lost["lost"] > 0 and not lost["ended"] and "in 2 attempts" in said
    assert read_metrics(tmp_path / "run")[-1]["time/lost"] == pytest.approx(lost["lost"])


def in_a_mount_namespace(script: str) -> str:
    """Runs shell commands that may mount; everything is undone with the shell."""
    if os.geteuid() or subprocess.run(["unshare", "-m", "true"], capture_output=True).returncode:
        pytest.skip("needs root and `unshare -m`")
    done = subprocess.run(
        ["unshare", "-m", "bash", "-c", script],
        cwd=jobs.ROOT,
        env=jobs.environment(1, 0, 1, 0),
        capture_output=True,
        text=True,
        timeout=jobs.TIMEOUT_S,
    )
    return done.stdout + done.stderr


def train_command(data, folder, *flags) -> str:
    import shlex

    return shlex.join(jobs.command(data, folder, *flags))


LOAD = (
    "import sys; from janusflow_jax.checkpoints import model_folder; "
    "print('LOADED', model_folder.load_model(sys.argv[1]).meta['step'])"
)


@pytest.mark.slow
def test_a_full_disk_is_named_and_the_last_good_checkpoint_loads(data, tmp_path):
    disk = tmp_path / "disk"
    disk.mkdir()
    said = in_a_mount_namespace(
        f"mount -t tmpfs -o size=2200k tmpfs {disk}\n"
        f"{train_command(data, disk / 'run', *SHORT)}; echo STATUS $?; ls {disk}/run/checkpoints\n"
        f"{sys.executable} -c {LOAD!r} {disk}/run"
    )
    # Threads of TensorStore may print tracebacks of their own; none of ours may be among them.
    assert "STATUS 1" in said and "janusflow_jax/train.py" not in said, said
    error = re.search(r"^error: .*No space left on device.*\n?.*$", said, re.MULTILINE)
    assert error and "finished checkpoints: [" in error[0], said
    assert re.search(r"^LOADED [1-9]", said, re.MULTILINE), said


@pytest.mark.slow
def test_a_read_only_workdir_is_named_at_once_and_still_loads(data, tmp_path):
    jobs.run(data, tmp_path / "run", "num_steps=1")
    mount = f"mount --bind {tmp_path} {tmp_path} && mount -o remount,ro,bind {tmp_path}"
    said = in_a_mount_namespace(
        f"{mount}\n{train_command(data, tmp_path / 'run', *SHORT)}; echo STATUS $?\n"
        f"{sys.executable} -c {LOAD!r} {tmp_path}/run"
    )
    assert "STATUS 1" in said and "Traceback" not in said, said
    assert "cannot be written: Read-only file system: it is mounted read-only" in said, said
    assert "step " not in said and re.search("^LOADED 1", said, re.MULTILINE), said


@pytest.mark.slow
def test_damaged_data_are_named(data, tmp_path):
    """A flipped byte inside a record, and a file that is gone."""
    for harm in ("flip", "missing"):
        spoiled = Path(shutil.copytree(data, tmp_path / harm))
        (file,) = spoiled.glob("*.array_record*")
        if harm == "flip":
            content = bytearray(file.read_bytes())
            used = [i for i, byte in enumerate(content) if byte]  # blocks are padded with zeros
            content[used[len(used) // 2]] ^= 1
            file.write_bytes(bytes(content))
        else:
            file.unlink()
        ((status, said),) = jobs.finish(
            jobs.start(spoiled, tmp_path / f"run-{harm}", "num_steps=20")
        )
        assert status == 1 and "Traceback" not in said, said
        assert re.search(rf"^error: (.|\n)*{spoiled}", said, re.MULTILINE), said


HANG = """
from janusflow_jax.data import rows
import time
real = rows.Rows.row
def row(self, number):
    time.sleep(600 if number >= 80 else 0)
    return real(self, number)
rows.Rows.row = row
"""


@pytest.mark.slow
def test_the_watchdog_prints_where_a_run_hangs_and_ends_it(data, tmp_path):
    flags = (*SHORT, "watchdog_s=5", "watchdog_exit=True")
    ((status, said),) = jobs.finish(jobs.start(data, tmp_path / "run", *flags, patch=HANG))
    assert status == 1
    assert "Timeout" in said and "in _fetch" in said and "in train_steps" in said


def spoil(file: Path, content: bytes | None) -> None:
    """Writes bytes; None: puts a folder there."""
    file.unlink(missing_ok=True)
    file.mkdir() if content is None else file.write_bytes(content)


ATTEMPT = {"began": 1.0, "alive": 9.0, "ended": False, "lost": 0.0, "seconds": {"step": 8.0}}


@pytest.mark.parametrize(
    "content",
    [b"", b"\0\0", b"\x89PNG\r\n", None, b"[{}]", b"null", b"[1]", b"3", b"[" * 5000]
    + [json.dumps([ATTEMPT | x]).encode() for x in ({"began": "x"}, {"seconds": [3]})],
)
def test_statistics_that_cannot_be_read_never_stop_a_resume(tmp_path, capsys, content):
    file = tmp_path / health.ATTEMPTS_FILE
    spoil(file, content)
    record = health.Attempts(tmp_path, health.Clock(), 3, 5.0)
    assert "1 attempts" not in record.summary()
    assert [x["first_step"] for x in json.loads(file.read_text())] == [3]
    assert (tmp_path / "attempts.json.unreadable").exists()
    assert capsys.readouterr().out.count("WARNING") == 1


def test_statistics_that_can_be_read_stay(tmp_path, capsys):
    (tmp_path / health.ATTEMPTS_FILE).write_text(json.dumps([ATTEMPT]))
    assert health.Attempts(tmp_path, health.Clock(), 3, 5.0).totals()["lost"] == 4.0
    assert not capsys.readouterr().out and len(list(tmp_path.iterdir())) == 1


@pytest.mark.parametrize("name", ["metrics.jsonl", "bad_steps.jsonl"])
@pytest.mark.parametrize(
    "line", [b'{"st\xffep": 2}', b"\0" * 9, b'{"step": 2', b"null", b"[2]", b'{"step": "2"}', None]
)
def test_lines_that_no_step_wrote_never_stop_a_resume(tmp_path, capsys, name, line):
    file, good = tmp_path / name, [b'{"step": 1, "x": "a"}', b'{"step": 2}']
    spoil(file, line if line is None else b"\n".join([good[0], line, good[1], b'{"step": 3}']))
    if name == "metrics.jsonl":
        metrics.Writer(tmp_path, resume_step=2).close()
    else:
        health.BadSteps(tmp_path, 1, resume_step=2)
    assert file.read_bytes().splitlines() == ([] if line is None else good)
    assert capsys.readouterr().out.count("WARNING") == 1


@pytest.mark.parametrize("content", [b"", b'{"name": "x', b"\xff", b"null", b"[]", None])
@pytest.mark.parametrize("saved", [True, False])
def test_a_config_that_cannot_be_read_has_a_copy_in_every_checkpoint(
    tmp_path, capsys, content, saved
):
    folder, cfg = epath.Path(tmp_path), crash_test.tiny_config("data", str(tmp_path))
    other = dataclasses.replace(cfg, seed=7)
    spoil(tmp_path / "config.json", content)
    if not saved:
        with pytest.raises(CheckpointError, match="config.json.* remove"):
            workdir.check(folder, cfg)
        return
    for step in ("1", "2"):
        checkpoint = folder / "checkpoints" / step
        checkpoint.mkdir(parents=True)
        (checkpoint / "run.json").write_text(json.dumps({"config": to_dict(cfg)}))
        checksums.write_sums(checkpoint)
        (checkpoint / "COMMITTED").touch()
    (checkpoint / "run.json").write_text(json.dumps({"config": to_dict(other)}))  # damaged
    workdir.check(folder, cfg)
    assert capsys.readouterr().out.count("WARNING") == 1
    with pytest.raises(CheckpointError, match="seed: 1 then, 7 now"):
        workdir.check(folder, other)


@pytest.mark.parametrize(
    ("old", "step", "now", "change"),  # steps, decay_steps; the change of the rate, in its lr
    [
        ((6, 4), 6, (12, 4), 1 - 1 / 4),  # over: compared with the last step's
        ((6, 4), 4, (12, 4), 1 - 2 / 4),  # in the middle
        ((6, 4), 4, (7, 4), 3 / 4 - 2 / 4),
        ((6, 4), 2, (12, 4), 0),  # the decay had not begun
        ((6, 0), 6, (12, 0), 0),
        ((6, 4), 4, (6, 4), 0),
        ((12, 4), 9, (10, 4), -2 / 4),  # fewer steps: lower, which needs no warning
    ],
)
def test_a_rate_that_rises_on_resume_is_said_with_the_flags_that_continue(
    capsys, old, step, now, change
):
    def cfg(num_steps, decay, lr=1e-3):
        out = crash_test.tiny_config("data", "run")
        out.num_steps = num_steps
        out.optim = dataclasses.replace(out.optim, decay_steps=decay, lr=lr, warmup_steps=1)
        return out

    saved = {"step": step, "config": to_dict(cfg(*old))}
    then, rate = optim.rates_at_resume(saved, cfg(*now).optim, now[0])
    assert rate - then == pytest.approx(change * 1e-3, abs=1e-9)
    run._warn_of_higher_rate(cfg(*now), saved, [1, 2, step])
    said = capsys.readouterr().out
    assert bool(said) == (change > 0)
    if said:
        assert "checkpoints after 2" in said
        lr, decay = re.search(r"lr=(\S+) --config.optim.decay_steps=(\d+)", said).groups()
        offered = cfg(now[0], int(decay), float(lr))
        assert run._rate_change(saved, offered) == 0
        schedule = optim.schedule(offered.optim, offered.num_steps)
        rates = [float(schedule(s)) for s in range(step, now[0] + 1)]
        assert rates[0] == pytest.approx(then) and rates[-1] == 0
        assert rates == sorted(rates, reverse=True)


@pytest.mark.parametrize("values", [{"lr": 2e-3}, {"decay_steps": 2}, {"warmup_steps": 0}])
def test_a_rate_that_a_branch_chose_needs_no_warning(capsys, values):
    cfg = crash_test.tiny_config("data", "run")
    cfg.optim = dataclasses.replace(cfg.optim, lr=1e-3, warmup_steps=9, decay_steps=4)
    saved = {"step": 7, "config": to_dict(cfg) | {"num_steps": 12}}
    cfg.num_steps = 12 if "warmup_steps" in values else 20
    cfg.optim = dataclasses.replace(cfg.optim, **values)
    assert run._rate_change(saved, cfg) > 0 or "decay_steps" in values
    run._warn_of_higher_rate(cfg, saved, [7])
    assert not capsys.readouterr().out


def test_what_stands_in_the_way_of_a_workdir_is_named(tmp_path):
    """Each is one sentence with the file's name: a file as workdir, a folder as its lock."""
    (tmp_path / "file").touch()
    (tmp_path / "run" / "lock").mkdir(parents=True)
    (tmp_path / "checkpoints").touch()
    for name, path in (("file", "file"), ("file/run", "file"), ("run", "run/lock")):
        with pytest.raises(CheckpointError, match=f"{path}.*in the way"):
            workdir.reserve(epath.Path(tmp_path / name))
    with pytest.raises(CheckpointError, match="checkpoints: expected a folder"):
        model_folder.committed_steps(tmp_path)


def test_the_lock_is_one_runs_and_ends_with_it(tmp_path):
    with workdir.reserve(epath.Path(tmp_path)):
        with pytest.raises(JanusFlowError, match=f"process {os.getpid()} on .*--config.workd"):
            workdir.reserve(epath.Path(tmp_path))
    workdir.reserve(epath.Path(tmp_path)).release()


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.ENOTSUP, errno.EINVAL, errno.EIO, 13, 9])
def test_without_locks_the_last_to_start_holds_the_folder(tmp_path, monkeypatch, capsys, number):
    def none(*_):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(lock.fcntl, "flock", none)
    first = workdir.reserve(epath.Path(tmp_path))
    assert capsys.readouterr().out.count("WARNING") == 1
    first.check()
    second = workdir.reserve(epath.Path(tmp_path))
    second.check()
    with pytest.raises(JanusFlowError, match="taken over by process"):
        first.check()


@pytest.mark.parametrize("content", [b"", b"\0", b"[]", b'{"pid": 1}', b"\xff"])
def test_a_lock_file_that_cannot_be_read_takes_nothing_over(tmp_path, content):
    held = workdir.reserve(epath.Path(tmp_path))
    (tmp_path / "lock").write_bytes(content)
    held.check()
    with pytest.raises(JanusFlowError, match="not written its name"):
        workdir.reserve(epath.Path(tmp_path))


def test_what_a_full_or_closed_disk_is_called(tmp_path):
    for number, advice in ((28, "free some space"), (30, "mounted read-only"), (13, "writable")):
        text = workdir.explain(OSError(number, os.strerror(number)), tmp_path)
        assert os.strerror(number) in text and advice in text
    with (
        pytest.raises(CheckpointError, match="free some space"),
        workdir.explained(epath.Path(tmp_path)),
    ):
        raise OSError(28, "full")


def test_time_is_split_and_what_a_kill_lost_is_counted(tmp_path, monkeypatch):
    now = [1000.0]
    monkeypatch.setattr(health.time, "perf_counter", lambda: now[0])
    monkeypatch.setattr(health.time, "time", lambda: now[0])

    def attempt(step, saved_at, *phases):
        clock = health.Clock()
        record = None
        for phase, seconds in phases:
            with clock(phase):
                now[0] += seconds
            if record is None:
                record = health.Attempts(tmp_path, clock, step, saved_at)
                clock.switch("step")
        record.write(step)
        return record

    # killed 30 s after its checkpoint of 1060
    first = attempt(0, None, ("start", 10), ("compile", 20), ("step", 60))
    assert first.totals() == {
        "start": 10,
        "compile": 20,
        "step": 60,
        "data": 0,
        "checkpoint": 0,
        "samples": 0,
        "evaluation": 0,
        "lost": 0,
    }
    assert first.values()["goodput"] == pytest.approx(60 / 90)
    now[0] += 500  # nobody's time
    second = attempt(5, 1060.0, ("start", 10), ("checkpoint", 2), ("step", 28))
    totals = second.totals()
    assert totals["lost"] == 30 and totals["step"] == 60 + 28 - 30 and totals["start"] == 20
    assert sum(totals.values()) == pytest.approx(90 + 40)
    assert "in 2 attempts" in second.summary() and "lost 23.1%" in second.summary()
    now[0] += 50  # the second had no checkpoint: all of it is lost, the first's 30 s once
    third = attempt(5, 1060.0, ("start", 10))
    assert third.totals()["lost"] == 30 + 40
    third.write(5, ended=True)
    now[0] += 50
    assert attempt(5, 1060.0, ("start", 1)).totals()["lost"] == 30 + 40


def test_the_watchdog_dumps_stacks_only_when_no_step_ends():
    code = """
import sys, time
from janusflow_jax.training import health
dog = health.Watchdog(0.5, exit=True)
time.sleep(0.8)  # compiling: the first step has not ended
for _ in range(4):
    dog.restart()
    time.sleep(0.2)
with dog.paused():
    time.sleep(0.8)
try:
    with dog:
        raise ValueError
except ValueError:
    time.sleep(0.8)
print("alive", flush=True)
dog.restart()
def hang(): time.sleep(60)
hang()
"""
    out = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=jobs.ROOT
    )
    assert out.stdout == "alive\n" and out.returncode == 1, out.stderr
    assert out.stderr.count("Timeout") == 1 and "in hang" in out.stderr


@pytest.mark.slow
def test_an_error_does_not_cost_the_checkpoint_that_is_being_written(store, monkeypatch):
    strip, count, calls = model_folder.strip_local_paths, flops.count, []

    def slowly(folder):
        time.sleep(1)
        strip(folder)

    def fail_at_the_third(*args):
        calls.append(args)
        if len(calls) == 3:
            raise KeyError("image")
        return count(*args)

    monkeypatch.setattr(model_folder, "strip_local_paths", slowly)
    monkeypatch.setattr(flops, "count", fail_at_the_third)
    with pytest.raises(KeyError, match="image"):
        train.train(runs.tiny_config("run", num_steps=4, save_every_steps=2))
    assert model_folder.committed_steps("run") == [2]
