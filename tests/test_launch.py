"""The scripts of launch/ print exactly what they would run, and say what is missing."""

import os
import pathlib
import re
import shlex
import subprocess

import pytest

ROOT = pathlib.Path(__file__).resolve().parents[1]
JOB = ["--name=jf", "--config=configs/pretrain.py", "--workdir=gs://bucket/runs/pretrain"]
TRAIN = (
    "-m janusflow_jax.train --config=configs/pretrain.py --config.workdir=gs://bucket/runs/pretrain"
)
SCRIPTS = {
    "tpu_vm": ["--zone=us-west4-a", "--type=v5litepod-256", "--source=https://host/jf.git@abc1"],
    "gke_xpk": ["--cluster=c", "--zone=us-west4-a", "--type=v5litepod-256", "--image=host/jf:1"],
    "slurm": ["--nodes=8"],
}


def launch(script: str, *args: str) -> subprocess.CompletedProcess:
    env = {"PATH": os.environ["PATH"], "HOME": "/nowhere"}
    command = ["bash", f"launch/{script}.sh", *args]
    return subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)


def commands(script: str, *args: str) -> list[list[str]]:
    done = launch(script, *SCRIPTS[script], *JOB, "--dry-run", *args)
    assert done.returncode == 0, done.stderr
    return [shlex.split(line) for line in done.stdout.splitlines()]


def option(command: list[str], name: str) -> str:
    (value,) = (a.split("=", 1)[1] for a in command if a.startswith(f"--{name}="))
    return value


def test_tpu_vm():
    create, setup, start = commands("tpu_vm")
    assert create == shlex.split(
        "gcloud compute tpus queued-resources create jf --zone=us-west4-a "
        "--accelerator-type=v5litepod-256 --runtime-version=v2-alpha-tpuv5-lite --node-id=jf"
    )
    on_all = shlex.split("gcloud compute tpus tpu-vm ssh jf --zone=us-west4-a --worker=all")
    assert setup[:-1] == start[:-1] == on_all
    assert "git clone -q https://host/jf.git ~/src" in option(setup, "command")
    assert "checkout -q abc1 &&" in option(setup, "command")
    assert option(start, "command") == f"cd ~/src && source ~/jf/bin/activate && python {TRAIN}"


def test_tpu_vm_with_slices():
    create, *rest = commands("tpu_vm", "--slices=2", "--spot=1", "--", "--config.mesh.fsdp=16")
    assert create[-3:] == ["--node-prefix=jf", "--node-count=2", "--spot"]
    assert [r[5] for r in rest] == ["jf-0", "jf-1"] * 2
    assert option(rest[-1], "command").endswith(f"{TRAIN} --config.mesh.fsdp=16")
    (stop,) = commands("tpu_vm", "--stop=1")
    assert stop[:6] == "gcloud compute tpus queued-resources delete jf".split()


def test_gke():
    (create,) = commands("gke_xpk")
    assert create == [
        *"xpk workload create --cluster=c --zone=us-west4-a --workload=jf".split(),
        *"--tpu-type=v5litepod-256 --num-slices=1 --docker-image=host/jf:1".split(),
        "--max-restarts=100",
        f"--command=python {TRAIN}",
    ]
    cluster, build, push, create = commands("gke_xpk", "--create=1", "--build=1", "--slices=2")
    assert cluster[:3] == ["xpk", "cluster", "create"] and "--num-slices=2" in cluster
    assert build[:2] == ["docker", "build"] and push == ["docker", "push", "host/jf:1"]
    file = ROOT / option(build, "file")
    for source in re.findall(r"^COPY (.*) \S+$", file.read_text(), re.MULTILINE):
        assert all((ROOT / name).exists() for name in source.split())


def test_slurm():
    (submit,) = commands("slurm", "--partition=gpu", "--hours=2", "--python=/env/bin/python")
    assert submit[:6] == [
        *"sbatch --job-name=jf --nodes=8 --ntasks-per-node=8 --gpus-per-node=8 --exclusive".split()
    ]
    assert (option(submit, "time"), option(submit, "signal")) == ("120", "TERM@120")
    assert option(submit, "partition") == "gpu" and "--requeue" in submit
    assert option(submit, "wrap") == (
        f"XLA_PYTHON_CLIENT_MEM_FRACTION=0.92 srun --kill-on-bad-exit=1 /env/bin/python {TRAIN}"
    )


@pytest.mark.parametrize("script", SCRIPTS)
def test_what_is_wrong_is_said(script):
    done = launch(script, "--dry-run")
    assert done.returncode == 1 and "error: missing --name" in done.stderr and not done.stdout
    done = launch(script, "--dry-run", "--nmae=x")
    assert "error: unknown option --nmae; known are: name" in done.stderr
    assert "expected --name=value" in launch(script, "name=x").stderr
    words = launch(script, "--help").stdout
    assert f"launch/{script}.sh --name=jf" in words and "--dry-run" in words


@pytest.mark.parametrize("script", SCRIPTS)
def test_arguments_with_spaces_arrive_whole(script):
    train = "--config.name=my run; rm -rf x"
    last = commands(script, "--", train)[-1]
    inner = option(last, "wrap" if script == "slurm" else "command")
    assert shlex.split(inner)[-1] == train


def test_they_can_be_run():
    for script in SCRIPTS:
        assert os.access(ROOT / "launch" / f"{script}.sh", os.X_OK)
