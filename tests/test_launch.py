"""The scripts of launch/ print the commands that they would run, and report missing options."""

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


def launch(script: str, *args: str, **env: str) -> subprocess.CompletedProcess:
    env = {"PATH": os.environ["PATH"], "HOME": "/nowhere", **env}
    command = ["bash", f"launch/{script}.sh", *args]
    return subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)


def commands(script: str, *args: str, **env: str) -> list[list[str]]:
    done = launch(script, *SCRIPTS[script], *JOB, "--dry-run", *args, **env)
    assert done.returncode == 0, done.stderr
    return [shlex.split(line) for line in done.stdout.splitlines()]


def options(command: list[str]) -> dict[str, str]:
    """--name=value arguments of a command; '' for plain flags."""
    pairs = (a[2:].partition("=") for a in command if a.startswith("--"))
    return {name: value for name, _, value in pairs}


def assert_options(command: list[str], /, **expected: str) -> None:
    actual = options(command)
    assert {n: actual.get(n.replace("_", "-")) for n in expected} == expected


def test_tpu_vm():
    create, setup, start = commands("tpu_vm")
    assert create[:6] == "gcloud compute tpus queued-resources create jf".split()
    assert_options(
        create,
        zone="us-west4-a",
        accelerator_type="v5litepod-256",
        runtime_version="v2-alpha-tpuv5-lite",
        node_id="jf",
    )
    assert "spot" not in options(create)
    for command in (setup, start):
        assert command[:6] == "gcloud compute tpus tpu-vm ssh jf".split()
        assert_options(command, zone="us-west4-a", worker="all")
    install = options(setup)["command"]
    assert "https://host/jf.git" in install and "checkout -q abc1" in install
    assert options(start)["command"].endswith(f"python {TRAIN}")


def test_tpu_vm_with_slices():
    create, *rest = commands("tpu_vm", "--slices=2", "--spot=1", "--", "--config.mesh.fsdp=16")
    assert_options(create, node_prefix="jf", node_count="2", spot="")
    assert [r[5] for r in rest] == ["jf-0", "jf-1"] * 2
    assert options(rest[-1])["command"].endswith(f"{TRAIN} --config.mesh.fsdp=16")
    (stop,) = commands("tpu_vm", "--stop=1")
    assert stop[:6] == "gcloud compute tpus queued-resources delete jf".split()


def test_gke():
    (create,) = commands("gke_xpk")
    assert create[:3] == ["xpk", "workload", "create"]
    assert_options(
        create,
        cluster="c",
        zone="us-west4-a",
        workload="jf",
        tpu_type="v5litepod-256",
        num_slices="1",
        docker_image="host/jf:1",
        max_restarts="100",
        command=f"python {TRAIN}",
    )
    cluster, build, push, create = commands("gke_xpk", "--create=1", "--build=1", "--slices=2")
    assert cluster[:3] == ["xpk", "cluster", "create"]
    assert_options(cluster, num_slices="2", tpu_type="v5litepod-256")
    assert build[:2] == ["docker", "build"] and push == ["docker", "push", "host/jf:1"]
    file = ROOT / options(build)["file"]
    for source in re.findall(r"^COPY (.*) \S+$", file.read_text(), re.MULTILINE):
        assert all((ROOT / name).exists() for name in source.split())


@pytest.mark.parametrize("gpus", ["--gpus=4", "--cards=4"])
def test_slurm(gpus):
    (submit,) = commands("slurm", gpus, "--partition=gpu", "--hours=2", "--python=/env/bin/python")
    assert submit[0] == "sbatch"
    assert_options(
        submit,
        job_name="jf",
        nodes="8",
        ntasks_per_node="4",
        gpus_per_node="4",
        time="120",
        signal="TERM@120",
        partition="gpu",
        requeue="",
    )
    wrap = options(submit)["wrap"]
    assert wrap.endswith(f"/env/bin/python {TRAIN}") and "srun --kill-on-bad-exit=1" in wrap
    assert "XLA_PYTHON_CLIENT_MEM_FRACTION=0.92" in wrap


@pytest.mark.parametrize("script", SCRIPTS)
def test_wrong_options_are_reported(script):
    done = launch(script, "--dry-run")
    assert done.returncode == 1 and "--name" in done.stderr and not done.stdout
    done = launch(script, "--dry-run", "--nmae=x")
    assert done.returncode == 1 and "--nmae" in done.stderr
    assert "--name=value" in launch(script, "name=x").stderr
    assert "--dry-run" in launch(script, "--help").stdout


@pytest.mark.parametrize("script", SCRIPTS)
def test_the_folder_of_compiled_programs_reaches_every_process(script):
    last = options(commands(script, JANUSFLOW_COMPILATION_CACHE="gs://b/cache")[-1])
    if script == "slurm":  # it passes the environment on by itself
        assert "gs://b/cache" not in last["wrap"]
    else:
        assert "JANUSFLOW_COMPILATION_CACHE=gs://b/cache python -m" in last["command"]


@pytest.mark.parametrize("script", SCRIPTS)
def test_arguments_with_spaces_stay_whole(script):
    train = "--config.name=my run; rm -rf x"
    last = commands(script, "--", train)[-1]
    inner = options(last)["wrap" if script == "slurm" else "command"]
    assert shlex.split(inner)[-1] == train


def test_scripts_are_executable():
    for script in SCRIPTS:
        assert os.access(ROOT / "launch" / f"{script}.sh", os.X_OK)
