"""One run by several processes: the same losses, one decision, and nothing lost with a process."""

from __future__ import annotations

import re
import signal
import threading
import time

import numpy as np
import pytest
from helpers import jobs
from helpers.runs import read_metrics

from janusflow_jax import config as c
from janusflow_jax.checkpoints import checksums, model_folder
from janusflow_jax.config.errors import DataError
from janusflow_jax.data import loader
from janusflow_jax.parallel import processes as distributed, trees
from tools import crash_test

BOUND_S = 120
"""A survivor ends within it (in seconds when alone on the machine)."""


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    out = tmp_path_factory.mktemp("squares") / "data"
    crash_test.make_data(out)
    return out


@pytest.fixture(scope="module")
def alone(data, tmp_path_factory):
    """The same run by one process on one device."""
    workdir = tmp_path_factory.mktemp("alone") / "run"
    jobs.run(data, workdir, "num_steps=6")
    return workdir


def same_losses(one, two, steps) -> None:
    a, b = read_metrics(one)[: len(steps)], read_metrics(two)
    assert [x["step"] for x in b] == list(steps)
    for name in ("loss", "loss_ar", "loss_rf", "loss_repa", "grad_norm"):
        x, y = ([line[name] for line in lines] for lines in (a, b))
        np.testing.assert_allclose(x, y, rtol=2e-5, atol=2e-5, err_msg=name)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("processes", "devices", "mesh"),
    [(1, 8, (2, 2, 2)), (2, 2, (1, 2, 2)), (4, 1, (2, 1, 2))],
    ids=["8 devices", "2 processes", "4 processes, tensor across them"],
)
def test_same_losses(data, alone, tmp_path, processes, devices, mesh):
    flags = [f"mesh.{n}={s}" for n, s in zip(("data", "fsdp", "tensor"), mesh, strict=True)]
    output = jobs.run(
        data, tmp_path / "run", "num_steps=3", *flags, processes=processes, devices=devices
    )
    same_losses(alone, tmp_path / "run", range(1, 4))
    assert len(re.findall("^step ", output, re.MULTILINE)) == 3
    step = tmp_path / "run" / "checkpoints" / "3"
    written = {checksums.writer_of(str(p.relative_to(step))) for p in step.rglob("*")}
    assert written == set(range(processes))
    assert model_folder.load_model(tmp_path / "run").meta["step"] == 3
    if processes != 2:
        return
    # The run resumes on one device, then on two processes again.
    jobs.run(data, tmp_path / "run", "num_steps=4", "mesh.data=1")
    jobs.run(data, tmp_path / "run", "num_steps=6", "mesh.fsdp=2", processes=2)
    same_losses(alone, tmp_path / "run", range(1, 7))


@pytest.mark.slow
def test_adapters_train_and_resume_over_processes(data, alone, tmp_path):
    """Their start is in `base/`, written and read by all processes."""
    flags = (f"start={alone}", "allow_fresh=False", "lora.rank=4", "train_parts=()")
    jobs.run(data, tmp_path / "one", "num_steps=3", *flags)
    shared = (*flags, "mesh.data=1", "mesh.fsdp=2")
    jobs.run(data, tmp_path / "two", "num_steps=2", *shared, processes=2)
    jobs.run(data, tmp_path / "two", "num_steps=3", *shared, processes=2)
    same_losses(tmp_path / "one", tmp_path / "two", range(1, 4))
    one, two = (model_folder.load_model(tmp_path / n, merged=False).params for n in ("one", "two"))
    a, b = (trees.flatten(x) for x in (one, two))
    assert a.keys() == b.keys() and any("lora_a" in n for n in a)
    for name in a:
        np.testing.assert_allclose(b[name], a[name], rtol=0, atol=2e-5, err_msg=name)


EVALUATED = """
import dataclasses
from janusflow_jax import config as c
plain = train.train
def evaluated(cfg, *args):
    held = tuple(dataclasses.replace(s, name=f"held_{s.task}") for s in cfg.data.sources)
    cfg.evaluate = c.EvalConfig(sources=held, rows=3, every_steps=1)
    return plain(cfg, *args)
train.train = evaluated
"""


@pytest.mark.slow
def test_held_out_losses_and_previews_of_two_processes(data, tmp_path):
    """Three rows on two processes: the first has two, the second one and an empty one. The first
    process draws the previews with the weights of both."""
    jobs.run(data, tmp_path / "one", "num_steps=1", patch=EVALUATED)
    flags = ("num_steps=1", "mesh.data=1", "mesh.fsdp=2", "sheet_num_steps=1")
    flags = (*flags, "prompts=('a red fox',)")
    output = jobs.run(data, tmp_path / "two", *flags, processes=2, patch=EVALUATED)
    assert (tmp_path / "two" / "samples" / "sheet_000001.png").stat().st_size > 1000
    assert output.count("images for 1 prompts") == 1
    held = [
        [x for x in read_metrics(tmp_path / n) if "eval/held_generate/loss_rf" in x]
        for n in ("one", "two")
    ]
    assert [[x["step"] for x in lines] for lines in held] == [[0, 1], [0, 1]]
    for one, two in zip(*held, strict=True):
        names = {n for n in one if n.startswith("eval")}
        assert names == {n for n in two if n.startswith("eval")}
        assert {"eval/held_understand/loss_ar", "eval_ema/held_generate/loss_rf"} <= names
        for name in names:
            np.testing.assert_allclose(two[name], one[name], rtol=2e-5, err_msg=name)


SLOW = """
import time
from janusflow_jax.parallel import processes
plain = train.loader.Ahead.__next__
def slow(self):
    time.sleep(0.8 * processes.index())
    return plain(self)
train.loader.Ahead.__next__ = slow
"""


@pytest.mark.slow
def test_a_job_names_its_slow_process(data, tmp_path):
    flags = ("num_steps=5", "log_every_steps=1", "mesh.data=1", "mesh.fsdp=2")
    output = jobs.run(data, tmp_path / "run", *flags, processes=2, patch=SLOW)
    lines = read_metrics(tmp_path / "run")[2:]  # its first step has compiled before
    assert [x["slowest_process"] for x in lines] == [1, 1, 1]
    assert [x["slowest_waits_for_data"] for x in lines] == [1, 1, 1]
    assert all(0.8 <= x["slowest_s"] < 16 for x in lines)
    assert "slowest: process 1 (data)" in output


def test_the_slowest_process_has_the_largest_number(monkeypatch):
    numbers = []
    for process, (data, host) in enumerate([(0.01, 0.02), (0.0, 3.25), (3.0, 0.0), (0.0, 0.0)]):
        monkeypatch.setattr(distributed, "index", lambda process=process: process)
        numbers.append(distributed.encode_work(data, host))
    assert distributed.decode_work(max(numbers)) == (1, 3.25, "host")
    assert distributed.decode_work(numbers[2]) == (2, 3.0, "data")
    assert distributed.decode_work(distributed.encode_work(99.0, 0.0))[1] == distributed.MAX_SECONDS
    assert max(numbers) < 2**31 and distributed.encode_work(99.0, 99.0) < 2**31


def started(data, workdir, **kwargs):
    """A job of two processes that has saved step 3 and has many left."""
    flags = ("num_steps=1000", "mesh.data=1", "mesh.fsdp=2", "log_every_steps=1")
    job = jobs.start(data, workdir, *flags, processes=2, **kwargs)
    end = time.monotonic() + jobs.TIMEOUT_S
    while not (workdir / "checkpoints" / "3" / "COMMITTED").exists():
        assert all(p.poll() is None for p in job) and time.monotonic() < end, jobs.finish(job)
        time.sleep(0.1)
    return job


@pytest.mark.slow
def test_a_stop_signal_to_one_process_saves_the_same_step_on_all(data, alone, tmp_path):
    workdir = tmp_path / "run"
    job = started(data, workdir)
    job[1].send_signal(signal.SIGUSR1)  # prints its stacks and goes on
    time.sleep(0.2)  # signals that come together are not handled in their order
    job[1].send_signal(signal.SIGTERM)
    (status, output), (other, stacks) = jobs.finish(job)
    assert (status, other) == (0, 0), output
    assert "Current thread" in stacks and "janusflow_jax/train.py" in stacks
    step = model_folder.committed_steps(workdir)[-1]
    assert step == read_metrics(workdir)[-1]["step"] and f"stopped at step {step}" in output
    if step < 6:
        same_losses(alone, workdir, range(1, step + 1))


@pytest.mark.slow
def test_a_killed_process_ends_the_job_soon_and_the_run_resumes(data, tmp_path):
    workdir = tmp_path / "run"
    job = started(data, workdir)
    job[1].kill()
    began = time.monotonic()
    (status, output), _ = jobs.finish(job)
    assert time.monotonic() - began < BOUND_S
    assert status not in (0, None)
    assert re.search("one of them has died|another task died|distributed service", output), output
    begun = model_folder.committed_steps(workdir)[-1]
    output = jobs.run(data, workdir, f"num_steps={begun + 1}", "mesh.fsdp=2", processes=2)
    assert f"resumed from step {begun}" in output
    assert model_folder.committed_steps(workdir)[-1] == begun + 1


NO_DATA = """
from janusflow_jax.config.errors import DataError
from janusflow_jax.data import loader
import jax
real = loader.Loader.batches
def batches(self, *args):
    for number, batch in enumerate(real(self, *args)):
        if number == 5 and jax.process_index() == 1:
            raise DataError("the records of process 1 are bad")
        yield batch
loader.Loader.batches = batches
"""
NO_DISK = """
from janusflow_jax.checkpoints import checksums
import errno, jax
real = checksums.write_share
def write_share(folder, process):
    if process == 1 and folder.name == "6":
        raise OSError(errno.ENOSPC, "No space left on device")
    real(folder, process)
checksums.write_share = write_share
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("patch", "why", "message", "last"),
    [
        (NO_DATA, "are bad", "stopped: process 1 of 2: the records of process 1 are bad", 5),
        (NO_DISK, "No space left", "processes [1] did not write their part", 3),
    ],
)
def test_an_error_of_one_process_ends_all_at_the_same_step(
    data, tmp_path, patch, why, message, last
):
    flags = ("num_steps=1000", "mesh.data=1", "mesh.fsdp=2")
    job = jobs.start(data, tmp_path / "run", *flags, processes=2, patch=patch)
    (status, output), (other, own) = jobs.finish(job)
    assert model_folder.committed_steps(tmp_path / "run")[-1] == last
    assert model_folder.load_model(tmp_path / "run").meta["step"] == last
    assert (status, other) == (1, 1)
    assert "error: " in output and message in output, output
    assert re.search(rf"^error: .*{why}", own, re.MULTILINE | re.DOTALL), own


FAILS_ALONE = """
from janusflow_jax.parallel import processes
from janusflow_jax.training import flops
processes.SHUTDOWN_LIMIT_S = 5
real, calls = flops.count, []
def count(*args):
    calls.append(args)
    if len(calls) == 8 and processes.index() == 1:
        raise KeyError("image")
    return real(*args)
flops.count = count
"""


@pytest.mark.slow
def test_an_error_that_only_one_process_knows_of_ends_the_job_soon(data, tmp_path):
    job = started(data, tmp_path / "run", patch=FAILS_ALONE)
    began = time.monotonic()
    (status, _), (other, own) = jobs.finish(job)
    assert status != 0 and other != 0 and "KeyError: 'image'" in own
    assert time.monotonic() - began < BOUND_S


BY_HAND = dict(zip(distributed.VARIABLES, ("a:1", "2", "0"), strict=True))
SLURM = {"SLURM_PROCID": "0", "SLURM_STEP_NODELIST": "n[1-2]", "SLURM_NTASKS": "2"}


@pytest.mark.parametrize(
    ("env", "kind"),
    [
        ({}, ""),
        (BY_HAND, "environment"),
        ({**BY_HAND, **SLURM}, "environment"),
        (SLURM, "Slurm"),
        ({**SLURM, "SLURM_NTASKS": "1"}, ""),
        ({"TPU_WORKER_HOSTNAMES": "a,b"}, "GKE or several slices"),
        ({"TPU_WORKER_HOSTNAMES": "localhost"}, ""),
        ({"TPU_WORKER_HOSTNAMES": "a,b", "JAX_PLATFORMS": "cpu"}, ""),
        ({"MEGASCALE_COORDINATOR_ADDRESS": "a"}, "GKE or several slices"),
    ],
)
def test_clusters_are_detected(env, kind):
    assert distributed.cluster(env) == kind


@pytest.mark.parametrize("env", [{}, {"SLURM_PROCID": "0"}, {"SLURM_STEP_ID": "4294967290"}])
@pytest.mark.parametrize("tasks", ["1", "4"])
def test_in_a_job_of_slurm_that_srun_did_not_start_a_process_is_alone(env, tasks, capsys):
    """`ssh` to a node of the job (job variables only), and sbatch's script without srun."""
    env = {**env, "SLURM_JOB_ID": "77", "SLURM_JOB_NODELIST": "n1", "SLURM_NTASKS": tasks}
    distributed.initialize("auto", env)
    assert ("srun" in capsys.readouterr().err) == (tasks == "4")
    with pytest.raises(c.ConfigError, match="expected a cluster"):
        distributed.initialize("on", env)


def test_clusters_that_cannot_be_joined():
    distributed.initialize("off", {**BY_HAND})
    distributed.initialize("auto", {})
    with pytest.raises(c.ConfigError, match="--distributed=on: expected a cluster"):
        distributed.initialize("on", {})
    with pytest.raises(c.ConfigError, match="expected all of JAX_COORDINATOR_ADDRESS, JAX_NUM"):
        distributed.initialize("auto", {"JAX_PROCESS_ID": "1"})
    with pytest.raises(c.ConfigError, match="expected whole numbers"):
        distributed.initialize("auto", {**BY_HAND, "JAX_NUM_PROCESSES": "two"})
    with pytest.raises(c.ConfigError, match="expected one of auto, on, off; got 'yes'"):
        distributed.initialize("yes", {})


@pytest.mark.parametrize("env", [BY_HAND, SLURM])
@pytest.mark.parametrize("others_come", [True, False])
def test_a_process_says_for_whom_it_waits_and_not_for_ever(env, others_come, monkeypatch, capfd):
    ended = threading.Event()

    def initialize(**options):
        assert options["initialization_timeout"] > distributed.WAIT_LIMIT_S  # ours comes first
        ended.wait(0.25 if others_come else 30)
        raise RuntimeError("joined, or JAX's own limit")

    monkeypatch.setattr(distributed.os, "_exit", lambda _: ended.set())
    monkeypatch.setattr(distributed.jax.distributed, "initialize", initialize)
    monkeypatch.setattr(distributed, "WAIT_REPORT_S", 0.1)
    monkeypatch.setattr(distributed, "WAIT_LIMIT_S", 20 if others_come else 0.35)
    with pytest.raises(c.ConfigError):
        distributed.initialize("auto", env)
    time.sleep(0.2)
    said = capfd.readouterr().err
    assert ended.is_set() != others_come and ("did not come" in said) != others_come
    assert said.count("waits for the others") > 1
    assert ("srun" in said) == (env is SLURM)


@pytest.mark.slow
def test_a_process_whose_peers_never_come_ends_by_itself(data, tmp_path):
    patch = (
        "from janusflow_jax.parallel import processes as p; p.WAIT_REPORT_S, p.WAIT_LIMIT_S = 1, 3"
    )
    job = jobs.start(data, tmp_path / "run", "num_steps=1", processes=2, patch=patch)
    job[1].kill()
    (status, said), _ = jobs.finish(job)
    assert status == 1 and "process 0 of 2 waits for the others at 127.0.0.1:" in said, said
    assert "did not come" in said and "Traceback" not in said and "stack" not in said, said


def test_an_error_waits_until_all_know():
    def batches():
        for row in (0, 8):
            yield {"row": np.arange(row, row + 8)}, loader.Report(row, row + 8, [])
        raise DataError("no third")

    feed = loader.Ahead(batches())
    assert next(feed)[1].first_row == 0 and feed.error is None
    assert next(feed)[1].first_row == 8 and str(feed.error) == "no third"
    with pytest.raises(ValueError, match="mine"), distributed.together("opening"):
        raise ValueError("mine")
    assert distributed.gather("a") == ["a"] and distributed.from_main("b") == "b"
