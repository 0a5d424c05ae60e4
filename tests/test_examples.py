"""examples/, launch/ray_serve.py and launch/space/: run against a real server without a model, or
read as their programs would read them."""

import asyncio
import configparser
import importlib.util
import json
import os
import pathlib
import re
import shutil
import subprocess
import sys
import types

import pytest
from helpers.fake_engine import FakeEngine, serving
from PIL import Image

ROOT = pathlib.Path(__file__).resolve().parents[1]
EXAMPLES, LAUNCH = ROOT / "examples", ROOT / "launch"


def run(command, folder, **env):
    env = {**os.environ, "JANUSFLOW_API_KEY": "secret", **env}
    done = subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.skipif(shutil.which("curl") is None, reason="needs curl")
def test_curl(tmp_path):
    with serving(FakeEngine(), keys=["secret"]) as url:
        out = run(["bash", str(EXAMPLES / "curl.sh"), url], tmp_path, PATH=_path())
    assert out.count("event: image_generation.partial_image") == 2
    assert out.count("event: image_generation.completed") == 1
    assert out.count("seed 1\n") >= 1 and "Describe the picture. [1 images]" in out
    assert out.endswith("okready\n")
    assert Image.open(tmp_path / "apple.png").size == Image.open(tmp_path / "blue.png").size
    assert {p.name for p in tmp_path.iterdir()} == {"apple.png", "blue.png"}


def _path():
    """`python3` is this one."""
    return f"{pathlib.Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"


def test_openai_client(tmp_path):
    pytest.importorskip("openai")
    engine = FakeEngine()
    with serving(engine, keys=["secret"]) as url:
        out = run([sys.executable, str(EXAMPLES / "openai_client.py"), url], tmp_path)
    assert "answer: Describe them. [2 images]" in out and "Which one is red? [2 images]" in out
    assert "\n5 tokens" in out
    names = {"apple.png", "preview_0.png", "preview_1.png", "blue.png"}
    assert {p.name for p in tmp_path.iterdir()} == names
    assert engine.seen[2].strength == 0.5 and engine.seen[2].image is not None


def test_lmms_eval_gets_the_arguments_that_it_knows(tmp_path):
    """The command, with a stand-in for `python3 -m lmms_eval` that prints it."""
    stub = tmp_path / "python3"
    stub.write_text(
        f'#!/bin/sh\nif [ "$2" = lmms_eval ]; then echo "$@"; else exec {sys.executable} "$@"; fi\n'
    )
    stub.chmod(0o755)
    path = f"{tmp_path}{os.pathsep}{os.environ['PATH']}"
    with serving(FakeEngine(), keys=["secret"]) as url:
        out = run(["bash", str(EXAMPLES / "lmms_eval.sh"), url, "pope"], tmp_path, PATH=path)
    words = out.split()
    assert words[words.index("--tasks") + 1] == "pope"
    options = dict(x.split("=", 1) for x in words[words.index("--model_args") + 1].split(","))
    assert options == {
        "model": "fake",
        "base_url": f"{url}/v1",
        "api_key": "secret",
        "timeout": "600",
        "num_concurrent": "16",
    }


def test_files_of_other_programs_are_read():
    config = json.loads((EXAMPLES / "vlmevalkit.json").read_text())
    assert config["model"]["janusflow"]["api_base"].endswith("/v1/chat/completions")

    service = configparser.ConfigParser(interpolation=None, strict=False)
    service.optionxform = str
    service.read(LAUNCH / "janusflow.service")
    start = service["Service"]["ExecStart"].split()
    assert start[1:3] == ["-m", "janusflow_jax.serve"]
    _parsed(start[3:])
    drain = float(start[start.index("--drain") + 1])
    assert float(service["Service"]["TimeoutStopSec"]) > drain


def test_kubernetes():
    yaml = pytest.importorskip("yaml")
    deployment, service = yaml.safe_load_all((LAUNCH / "kubernetes.yaml").read_text())
    pod = deployment["spec"]["template"]
    assert service["spec"]["selector"].items() <= pod["metadata"]["labels"].items()
    (container,) = pod["spec"]["containers"]
    args = _parsed(container["args"])
    assert pod["spec"]["terminationGracePeriodSeconds"] > args.drain
    probes = [container[f"{x}Probe"] for x in ("readiness", "liveness", "startup")]
    assert [x["httpGet"]["path"] for x in probes] == ["/ready", "/health", "/health"]
    assert probes[2]["periodSeconds"] * probes[2]["failureThreshold"] == 1800
    # /metrics asks for the key, which only the monitor in the comment at the end has.
    assert "annotations" not in pod["metadata"]
    comment = (LAUNCH / "kubernetes.yaml").read_text().split("# ---\n")[1]
    monitor = yaml.safe_load(re.sub("^# ", "", comment, flags=re.MULTILINE))["spec"]
    assert monitor["selector"]["matchLabels"] == service["metadata"]["labels"]
    (endpoint,), (port,) = monitor["endpoints"], service["spec"]["ports"]
    assert endpoint["port"] == port["name"]
    (key,) = [x["valueFrom"]["secretKeyRef"] for x in container["env"]]
    assert endpoint["authorization"]["credentials"] == key
    volumes = {x["name"] for x in pod["spec"]["volumes"]}
    assert {x["name"] for x in container["volumeMounts"]} == volumes


@pytest.mark.parametrize("name", ["serve.Dockerfile", "space/Dockerfile"])
def test_dockerfiles(name):
    lines = (LAUNCH / name).read_text().replace("\\\n", "").splitlines()
    words = [line.split(maxsplit=1) for line in lines if line and not line.startswith("#")]
    (entry,) = [json.loads(x) for kind, x in words if kind in ("ENTRYPOINT", "CMD")]
    assert entry[:3] == ["python", "-m", "janusflow_jax.serve"]
    model = [] if "--model" in entry else ["--model", "m"]
    _parsed(entry[3:] + model)
    if name == "serve.Dockerfile":
        copied = [x.split()[:-1] for kind, x in words if kind == "COPY"]
        assert all((ROOT / source).exists() for sources in copied for source in sources)


def _parsed(args):
    """The arguments of the server, checked."""
    from janusflow_jax.serve import command

    parsed = command.parse(args)
    os.environ["JANUSFLOW_API_KEY"] = "" if parsed.no_auth else "secret"
    try:
        command.check(parsed)
    finally:
        del os.environ["JANUSFLOW_API_KEY"]
    return parsed


@pytest.mark.slow
def test_the_files_of_a_space_serve(golden_folder, tmp_path):
    """The folder has all that its Dockerfile copies, and its model loads from there."""
    out = tmp_path / "space"
    script = str(LAUNCH / "space" / "build.py")
    command = [sys.executable, script, "--model", str(golden_folder), "--out", str(out)]
    run(command, tmp_path, PYTHONPATH=str(ROOT))
    assert {p.name for p in out.iterdir()} == {"project", "model", "Dockerfile", "README.md"}
    code = (
        "import janusflow_jax, pathlib; assert pathlib.Path(janusflow_jax.__file__).is_relative_to("
        "pathlib.Path('project').resolve()); from janusflow_jax.serve import page; page.FILES; "
        "print(janusflow_jax.load('model').generate('a red fox', num_steps=1)[0].size)"
    )
    assert run([sys.executable, "-c", code], out, PYTHONPATH="project").startswith("(")


def test_ray_dry_run(tmp_path):
    command = [sys.executable, str(LAUNCH / "ray_serve.py"), "--dry-run"]
    options = ["--replicas", "2", "--max-replicas", "8", "--resources", '{"TPU": 1, "CPU": 4}']
    out = json.loads(
        run([*command, *options, "--", "--model", "m"], tmp_path, PYTHONPATH=str(ROOT))
    )
    deployment = out["deployment"]
    assert deployment["autoscaling_config"]["max_replicas"] == 8 and "secret" not in str(out)
    actor = {"num_cpus": 4, "num_gpus": 0, "resources": {"TPU": 1}}
    assert deployment["ray_actor_options"] == actor
    assert out["serve"] == ["--model", "m", "--host=127.0.0.1"]
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, capture_output=True, text=True, env=env)
    assert done.returncode == 2 and "-- --model MODEL" in done.stderr


@pytest.mark.parametrize("dry_run", [[], ["--dry-run"]])
def test_ray_needs_a_key_on_another_host(dry_run, monkeypatch, capsys):
    """Whatever --host is after --: Ray listens, and not the server of a replica."""
    from janusflow_jax.config.errors import JanusFlowError

    monkeypatch.delenv("JANUSFLOW_API_KEY", raising=False)
    monkeypatch.setitem(sys.modules, "ray", None)  # nothing is deployed
    served = ["--", "--model", "m", "--allowed-hosts", "x", "--host", "127.0.0.1"]
    options = [*dry_run, "--host", "0.0.0.0"]
    with pytest.raises(JanusFlowError, match="--host 0.0.0.0: expected JANUSFLOW_API_KEY"):
        _ray_serve().main([*options, *served])
    if dry_run:
        _ray_serve().main([*options, *served, "--no-auth"])
        assert "--no-auth" in capsys.readouterr().out


def _ray_serve():
    spec = importlib.util.spec_from_file_location("ray_serve", LAUNCH / "ray_serve.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_a_replica_of_ray_starts_when_its_engine_is_ready(monkeypatch):
    launcher = _ray_serve()
    serve = types.SimpleNamespace(
        deployment=lambda **options: lambda cls: types.SimpleNamespace(bind=cls),
        ingress=lambda: lambda cls: cls,
    )
    monkeypatch.setitem(sys.modules, "ray", types.SimpleNamespace(serve=serve))
    starting = types.SimpleNamespace(alive=True, ready=False, draining=False, error="")
    ready = types.SimpleNamespace(**{**vars(starting), "ready": True})
    dead = types.SimpleNamespace(**{**vars(starting), "alive": False, "error": "no memory"})
    ending = types.SimpleNamespace(**{**vars(starting), "draining": True})

    def check(*states, seconds=60):
        """The states that are left after Ray's check."""
        left = list(states)
        engine = types.SimpleNamespace(status=lambda: left.pop(0))
        built = types.SimpleNamespace(engine=engine, app=None)
        monkeypatch.setattr(launcher, "READY_SECONDS", seconds)
        monkeypatch.setattr("janusflow_jax.serve.command.build", lambda args: built)
        replica = launcher.application({}, ["--model", "m"])
        replica.__serve_build_asgi_app__()
        asyncio.run(replica.check_health())
        return left

    assert check(starting, starting, ready, dead) == [dead]
    assert check(ending, dead) == [dead]
    with pytest.raises(RuntimeError, match="the engine is dead: no memory"):
        check(starting, dead)
    with pytest.raises(RuntimeError, match="ready in -1 s"):
        check(starting, seconds=-1)


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="needs the extra `ray`")
def test_two_replicas_of_ray(golden_folder, tmp_path):
    """A local Ray: both replicas answer, an image is that of `generate`."""
    script = str(ROOT / "tests" / "helpers" / "ray_check.py")
    home = {"HOME": str(tmp_path), "PYTHONPATH": str(ROOT), "JANUSFLOW_API_KEY": ""}
    run([sys.executable, script, str(golden_folder)], tmp_path, **home)
