"""Every command with its paths in a bucket, and what cannot be opened."""

import importlib.util
import json
import os
import pathlib
import shutil
import zlib

import jax
import numpy as np
import pytest
from etils import epath
from etils.epath import backend
from fsspec.registry import _registry
from helpers import bucket as fake, golden, records, runs
from PIL import Image
from safetensors.numpy import save_file

from janusflow_jax import chat, evaluate, generate, pipeline, train
from janusflow_jax.checkpoints import model_folder, workdir
from janusflow_jax.config import LORA_TARGETS, files
from janusflow_jax.config.errors import CheckpointError, ConfigError
from janusflow_jax.data import cache as latent_cache, chat_format, packing, sources
from janusflow_jax.data.prepare import build, engines
from janusflow_jax.eval import losses as losses_lib
from janusflow_jax.hub import adapters
from janusflow_jax.parallel import compile_cache
from tools import cache_latents, convert_checkpoint, export_checkpoint, prepare_data


@pytest.fixture
def bucket(monkeypatch, tmp_path):
    """The folder behind gs://bucket. Nothing may make a local folder of a URL."""
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    yield fake.install(monkeypatch, tmp_path / "remote")
    assert not list((tmp_path / "here").rglob("gs*"))
    backend.fsspec_backend._get_filesystem.cache_clear()
    files._check_opens.cache_clear()


@pytest.fixture
def model(bucket, golden_folder):
    shutil.copytree(golden_folder, bucket / "model")
    return f"{fake.URL}/model"


@pytest.mark.parametrize(
    ("path", "expected"),
    [
        ("a/../b", "{cwd}/b"),
        ("~/x", "{home}/x"),
        ("/x/y/", "/x/y"),
        ("gs://bucket/run/", "gs://bucket/run"),
        ("gs:/bucket/run", "gs://bucket/run"),  # what pathlib makes of a URL
        ("gs://bucket", "gs://bucket"),
    ],
)
def test_a_path_becomes_absolute_and_a_url_stays_a_url(path, expected, bucket):
    want = expected.format(cwd=os.getcwd(), home=os.path.expanduser("~"))
    assert str(files.resolve(path)) == want
    assert files.resolve(files.resolve(path)) == epath.Path(want)


def test_listings_are_never_cached(bucket):
    """TensorStore and other processes write files that a cached listing would lack."""
    files.resolve(f"{fake.URL}/x").exists()
    assert fake.Gcs.options["use_listings_cache"] is False


@pytest.mark.parametrize("path", ["http://host/x", "hdfs://host/x", "memory://x", "C:/data"])
def test_other_urls_are_refused(path):
    with pytest.raises(ConfigError):
        files.resolve(path)


@pytest.mark.parametrize("url", ["s3://bucket/model", "az://bucket/model"])
def test_orbax_opens_no_other_store(url, monkeypatch):
    monkeypatch.setattr(files, "_check_opens", lambda *_: None)
    for use in (
        lambda: model_folder.load_model(url),
        lambda: runs.tiny_config(url) and train.train(runs.tiny_config(url)),
        lambda: convert_checkpoint.main(convert_args(url)),
    ):
        with pytest.raises(CheckpointError):
            use()


def convert_args(out: str) -> list[str]:
    tiny = golden.TINY
    return ["--janusflow", f"{tiny}/janusflow", "--vae", f"{tiny}/vae", "--out", out]


UNOPENED = {
    "train": lambda url: train.train(runs.tiny_config(f"{url}/run")),
    "generate": lambda url: generate.main(["--model", f"{url}/m", "--prompt", "x"]),
    "generate, out": lambda url: generate.main(["--model=m", "--prompt=x", f"--out={url}/x.png"]),
    "chat": lambda url: chat.main(["--model", f"{url}/m", "--prompt", "x"]),
    "chat, image": lambda url: chat.main(["--model=m", "--prompt=x", f"--image={url}/x.png"]),
    "evaluate": lambda url: evaluate.main(["--model", f"{url}/m"]),
    "evaluate, out": lambda url: evaluate.main(["--model=m", f"--out={url}/eval.json"]),
    "export": lambda url: export_checkpoint.main(["--model=m", "--out", f"{url}/x"]),
    "convert": lambda url: convert_checkpoint.main(convert_args(f"{url}/x")),
    "prepare": lambda url: prepare_data.options_of(
        prepare_data.parser().parse_args(["text", f"{url}/*.txt", "--out", "x"])
    ),
    "adapter": lambda url: generate.main(["--model=m", "--prompt=x", f"--adapter={url}/a"]),
    "evaluate, data": lambda url: evaluate.main(
        ["--model=m", "--suite=emoji", "--judge=", f"--data={url}/d"]
    ),
    "cache, out": lambda url: cache_latents.main(["--data=d", "--model=m", "--out", f"{url}/d"]),
    "cache": lambda url: cache_latents.main(["--data", f"{url}/d", "--model=m", "--out", "x"]),
}


@pytest.mark.parametrize("command", UNOPENED)
def test_a_bucket_that_cannot_be_opened_is_one_error_before_the_work(
    command, monkeypatch, tmp_path
):
    def no_credentials(*_, **__):
        raise RuntimeError("no credentials")  # each package has errors of its own

    monkeypatch.setattr(backend.fsspec_backend, "_get_filesystem", no_credentials)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match="gs://closed"):
        UNOPENED[command]("gs://closed")


@pytest.mark.skipif(bool(importlib.util.find_spec("s3fs")), reason="s3fs is here")
def test_the_missing_package_is_named(monkeypatch):
    backend.fsspec_backend._get_filesystem.cache_clear()
    monkeypatch.delitem(_registry, "s3", raising=False)
    with pytest.raises(ConfigError, match="pip install s3fs"):
        files.resolve("s3://bucket/x")


@pytest.mark.slow
def test_a_run_in_a_bucket_resumes_bit_for_bit(store, monkeypatch, bucket):
    runs.share_compiled_step(monkeypatch)
    train.train(runs.tiny_config("whole"))
    for steps in (1, 2):
        cfg = runs.tiny_config(f"{fake.URL}/runs/a", num_steps=steps)
        assert train.train(cfg) == f"{fake.URL}/runs/a"
    whole, resumed = runs.last_arrays("whole"), runs.last_arrays(bucket / "runs" / "a")
    assert whole.keys() == resumed.keys()
    for name, x in whole.items():
        np.testing.assert_array_equal(x, resumed[name], err_msg=name)
    losses = [x["loss"] for x in runs.read_metrics(bucket / "runs" / "a")]
    assert losses == [x["loss"] for x in runs.read_metrics("whole")]
    assert len(json.loads((bucket / "runs/a/attempts.json").read_text())) == 2


@pytest.mark.slow
def test_generate_and_chat_use_a_bucket(model, bucket, golden_model, capsys, monkeypatch):
    assert pipeline.load(model, dtype="float32").source == model
    monkeypatch.setattr(pipeline, "load", lambda path, **_: golden_model)
    (bucket / "prompts.txt").write_text("a red fox\na tree\n")
    args = ["--model", model, "--prompts", f"{fake.URL}/prompts.txt", "--steps", "1"]
    generate.main([*args, "--out", f"{fake.URL}/images", "--json", f"{fake.URL}/report.json"])
    images = json.loads((bucket / "report.json").read_text())["images"]
    assert [x["file"] for x in images] == [f"{fake.URL}/images/{n:04}.png" for n in range(2)]
    assert Image.open(bucket / "images" / "0001.png").size == (golden_model.cfg.image_size,) * 2
    capsys.readouterr()
    url = f"{fake.URL}/images/0000.png"
    chat.main(["--model", model, "--image", url, "--prompt", "What?", "--max-new-tokens", "4"])
    picture = str(bucket / "images" / "0000.png")
    want = golden_model.chat("What?", picture, max_new_tokens=4)
    assert capsys.readouterr().out.strip() == want


def test_evaluate_writes_its_report_into_a_bucket(model, bucket, monkeypatch):
    monkeypatch.setattr(losses_lib, "measure", lambda *_: {"loss": 1.5})
    config = f"--config={runs.ROOT / 'configs' / 'emoji.py'}"
    evaluate.main(["--model", model, "--suite=losses", config, f"--out={fake.URL}/eval.json"])
    report = json.loads((bucket / "eval.json").read_text())
    assert report["losses"] == {"loss": 1.5} and report["settings"]["model"] == model


@pytest.mark.slow
def test_conversion_and_export_through_a_bucket_give_the_same_bytes(bucket):
    for place in (fake.URL, "local"):
        convert_checkpoint.main(convert_args(f"{place}/models/tiny"))
        export_checkpoint.main(["--model", f"{place}/models/tiny", "--out", f"{place}/exported"])
        again = ["--janusflow", f"{place}/exported", "--out", f"{place}/again"]
        convert_checkpoint.main(again)
    for name in ("model.safetensors", "vae/diffusion_pytorch_model.safetensors", "README.md"):
        local = pathlib.Path("local") / "exported" / name
        assert (bucket / "exported" / name).read_bytes() == local.read_bytes(), name
    remote, local = (model_folder.load_model(f"{x}/again") for x in (fake.URL, "local"))
    jax.tree.map(np.testing.assert_array_equal, remote.params, local.params)


@pytest.mark.filterwarnings("ignore:.*base_sha256")
def test_an_adapter_in_a_bucket_is_added(bucket):
    llm = {"layers": {"block": {"attn": {}, "mlp": {}}}}
    for target, part in LORA_TARGETS.items():
        kernel = np.zeros((1, 3, 5), np.float32)
        llm["layers"]["block"][part][target] = {"kernel": kernel}
    name = "base_model.model.model.layers.0.self_attn.q_proj.lora_"
    tensors = {f"{name}A.weight": np.ones((2, 3)), f"{name}B.weight": np.ones((5, 2))}
    (bucket / "adapter").mkdir(parents=True)
    about = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["q_proj"]}
    (bucket / "adapter" / "adapter_config.json").write_text(json.dumps(about))
    tensors = {n: x.astype(np.float32) for n, x in tensors.items()}
    save_file(tensors, bucket / "adapter" / "adapter_model.safetensors")
    block = adapters.apply(llm, f"{fake.URL}/adapter")["layers"]["block"]
    assert (block["attn"]["q"]["kernel"] == 4).all() and not block["attn"]["k"]["kernel"].any()


def test_a_data_set_and_its_cache_in_a_bucket(bucket, tmp_path):
    (tmp_path / "in").mkdir()
    for i in range(5):
        (tmp_path / "in" / f"{i}.png").write_bytes(records.png(i))
        (tmp_path / "in" / f"{i}.txt").write_text(f"number {i}")
    inputs = str(tmp_path / "in")
    for out in (f"{fake.URL}/data", "local"):
        options = ["folder", inputs, "--out", out, "--tokenizer", str(records.HUB)]
        parsed = prepare_data.parser().parse_args(options)
        build.prepare(prepare_data.options_of(parsed), out, engines.local(1))
    prepare_data.dry_run(prepare_data.options_of(parsed), f"{fake.URL}/sheet.png")
    assert Image.open(bucket / "sheet.png").width > 0
    remote, local = (sources.open_source(x, "train") for x in (f"{fake.URL}/data", "local"))
    assert len(remote) == 5 and [remote[i] for i in range(5)] == [local[i] for i in range(5)]
    chat = chat_format.ChatFormat.load(records.HUB)
    (lengths,) = packing.load_lengths(remote, remote.path, "train", "generate", "plain", chat)
    assert len(lengths) == 5

    manifest = latent_cache.Manifest(
        task="generate",
        split="train",
        records=5,
        pictures=latent_cache.fingerprint(remote),
        image_size=4,
        crops=1,
        seed=0,
        dtype="float32",
        computed_in="float32",
        shard_records=3,
        vae="v",
        siglip="",
        latent_shape=(1, 1, 4),
        feature_shape=(),
    )
    folder = f"{fake.URL}/cache"
    latent_cache.create(folder, manifest)
    for k in range(2):
        with latent_cache.shard_writers(folder, manifest, k) as writers:
            for i in manifest.shard_range(k):
                value = np.full((2, 1, 1, 4), i, np.float32)
                crc = zlib.crc32(remote[i]["image"])
                writers["latents"].write(latent_cache.entry([crc], [value], "float32"))
    cache = latent_cache.Cache(folder)
    for i in range(5):
        assert cache.latents(i, 0, remote[i]["image"])[0].tolist() == [[[i] * 4]]


def test_compiled_programs_are_read_from_a_bucket(bucket, monkeypatch):
    names = ("jax_compilation_cache_dir", "jax_persistent_cache_min_compile_time_secs")
    before = {name: getattr(jax.config, name) for name in names}
    monkeypatch.setenv(compile_cache.VARIABLE, f"{fake.URL}/cache")
    monkeypatch.setattr(compile_cache, "MIN_SECONDS", 0.0)
    events = []
    listen = lambda event, **_: events.append(event.rpartition("/")[2])  # noqa: E731
    jax.monitoring.register_event_listener(listen)
    try:
        jax.config.update(names[0], None)
        assert compile_cache.enable() == f"{fake.URL}/cache"
        for _ in range(2):
            jax.jit(lambda x: x * 5 + 2).lower(np.ones(3)).compile()
    finally:
        jax.monitoring.unregister_event_listener(listen)
        for name, value in before.items():
            jax.config.update(name, value)
        compile_cache.compilation_cache.reset_cache()
    assert len(list((bucket / "cache").glob("jit_*-cache"))) == 1
    assert (events.count("cache_misses"), events.count("cache_hits")) == (1, 1)


def test_what_reaches_a_bucket_has_errors_of_its_own(bucket):
    def fails(where, error):
        with pytest.raises(Exception) as caught, workdir.explained(epath.Path(where)):
            raise error
        return caught.value

    refused = fails(f"{fake.URL}/run", RuntimeError("HTTP 503: try again"))
    assert isinstance(refused, CheckpointError) and "cannot be written: HTTP 503" in str(refused)
    for where, error in [
        ("run", RuntimeError("a bug")),
        (f"{fake.URL}/run", jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: 9 GiB")),
        (f"{fake.URL}/run", ConfigError("another")),
    ]:
        assert fails(where, error) is error
