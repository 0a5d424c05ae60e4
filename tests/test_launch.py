"""The scripts of launch/ print the commands that they would run, and report missing options."""

import os
import pathlib
import re
import shlex
import shutil
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


def launch(script: str, *args: str, root=ROOT, **env: str) -> subprocess.CompletedProcess:
    env = {"PATH": os.environ["PATH"], "HOME": "/nowhere", **env}
    command = ["bash", f"launch/{script}.sh", *args]
    return subprocess.run(command, cwd=root, env=env, capture_output=True, text=True)


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


def test_an_old_training_is_ended_before_its_code_is_deleted():
    _, setup, start = (options(x).get("command", "") for x in commands("tpu_vm"))
    end, _, install = setup.partition("rm -rf ~/src")
    assert end.startswith("if pkill ") and "pkill -KILL " in end and "git clone" in install
    (pattern,) = set(re.findall("-f '(.*?)'", end))
    process = start[start.index("python -m") :]
    assert re.search(pattern, process) and re.search(pattern, f"/usr/bin/{process}")
    for shell in (setup, start):  # it does not end itself
        assert not re.search(pattern, f"bash -c {shell}")
    assert subprocess.run(["bash", "-n", "-c", setup]).returncode == 0


@pytest.mark.parametrize("dry_run", [[], ["--dry-run"]])
def test_only_what_the_machines_can_clone_is_trained(tmp_path, dry_run):
    def git(*args):
        names = ["-c", "user.name=x", "-c", "user.email=x@host"]
        done = subprocess.run(["git", *names, *args], cwd=clone, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return done.stdout.strip()

    origin, clone = tmp_path / "origin.git", tmp_path / "clone"
    shutil.copytree(ROOT / "launch", clone / "launch")
    (tmp_path / "gcloud").write_text("#!/bin/sh\necho ACTIVE\n")
    (tmp_path / "gcloud").chmod(0o755)
    git("init", "--quiet", "--initial-branch=main")
    git("init", "--quiet", "--bare", str(origin))
    git("remote", "add", "origin", str(origin))
    git("add", "launch")
    git("commit", "--quiet", "--message=x")

    def run(*more):
        path = f"{tmp_path}{os.pathsep}{os.environ['PATH']}"
        args = [*SCRIPTS["tpu_vm"][:-1], *JOB, *more, *dry_run]
        return launch("tpu_vm", *args, root=clone, PATH=path)

    def refused(reason):
        done = run()
        assert done.returncode == 1 and not done.stdout
        assert reason in done.stderr and "--source=GIT_URL@COMMIT" in done.stderr

    commit = git("rev-parse", "HEAD")
    refused(f"got {commit}: push it")
    git("push", "--quiet", "origin", "HEAD:refs/heads/work")
    (clone / "untracked").touch()
    done = run()
    assert done.returncode == 0, done.stderr
    assert str(origin) in done.stdout and commit in done.stdout
    (clone / "launch" / "Dockerfile").write_text("changed")
    refused("commit and push them")
    done = run("--source=https://host/jf.git@abc1")
    assert done.returncode == 0 and "https://host/jf.git" in done.stdout


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
def test_help_from_another_folder(script, tmp_path):
    here = ROOT / "launch"
    link = tmp_path / "link.sh"
    link.symlink_to(here / f"{script}.sh")
    for folder, path in ((here, f"{script}.sh"), (here, f"./{script}.sh"), (tmp_path, "link.sh")):
        done = subprocess.run(["bash", path, "--help"], cwd=folder, capture_output=True, text=True)
        assert done.returncode == 0 and f"launch/{script}.sh" in done.stdout, done.stderr


@pytest.mark.parametrize("script", SCRIPTS)
def test_environment_variables_are_no_options(script):
    names = "PROJECT HOURS SPOT BUILD CREATE STOP SLICES GPUS CARDS PYTHON PARTITION RUNTIME"
    env = dict.fromkeys(names.split(), "7")
    assert commands(script, **env) == commands(script)
    done = launch(script, "--dry-run", NAME="x", ZONE="z", CLUSTER="c", SOURCE="u@c")
    assert done.returncode == 1 and "missing --name" in done.stderr


@pytest.mark.parametrize("value", ["0.5", "0", "010", "two", "1;2"])
@pytest.mark.parametrize("script, name", [("slurm", "hours"), ("tpu_vm", "slices")])
def test_whole_numbers(script, name, value):
    done = launch(script, *SCRIPTS[script], *JOB, "--dry-run", f"--{name}={value}")
    assert done.returncode == 1 and not done.stdout
    assert done.stderr == f"error: --{name}: expected a whole number from 1; got {value}\n"


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
