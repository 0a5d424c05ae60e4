"""Models of the Hugging Face Hub, with a replaced download."""

import fnmatch
import shutil

import huggingface_hub
import numpy as np
import pytest
from helpers import golden
from huggingface_hub import errors

import janusflow_jax
from janusflow_jax.config.errors import CheckpointError, ConvertError
from janusflow_jax.eval import provenance
from janusflow_jax.hub import download

NAME = "deepseek-ai/JanusFlow-1.3B"
COMMIT, OTHER, VAE_COMMIT = "1" * 40, "2" * 40, "3" * 40


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """The Hub, as two folders: what is asked for is copied from them. The calls so far."""
    calls = []
    commits = {
        (NAME, None): COMMIT,
        (NAME, "old"): OTHER,
        ("stabilityai/sdxl-vae", None): VAE_COMMIT,
    }

    def snapshot_download(name, *, revision, allow_patterns):
        calls.append((name, revision))
        if (name, revision) not in commits:
            raise errors.RepositoryNotFoundError("404: no such repository", response=Response())
        source = golden.TINY / ("janusflow" if name == NAME else "vae")
        folder = tmp_path / "snapshots" / commits[name, revision]
        if not folder.exists():
            folder.mkdir(parents=True)
            for path in [*source.iterdir(), tmp_path / "pytorch_model.bin"]:
                if any(fnmatch.fnmatch(path.name, pattern) for pattern in allow_patterns):
                    shutil.copy(path, folder)
        return str(folder)

    class Response:
        headers, request = {}, None

    (tmp_path / "pytorch_model.bin").write_bytes(b"pickle")
    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return calls


def test_a_released_model_is_converted_once(hub, tmp_path, golden_model, monkeypatch):
    model = janusflow_jax.load(f"hf://{NAME}", dtype="float32")
    options = {"num_steps": 1, "output": "latent"}
    got = model.generate("a red fox", **options)
    np.testing.assert_array_equal(got, golden_model.generate("a red fox", **options))
    (folder,) = (tmp_path / "cache" / "janusflow_jax" / "models").iterdir()
    assert folder.name == f"deepseek-ai--JanusFlow-1.3B-{COMMIT[:12]}-{VAE_COMMIT[:12]}"
    assert hub == [(NAME, None), ("stabilityai/sdxl-vae", None)]
    assert not list(tmp_path.glob("snapshots/**/*.bin"))

    monkeypatch.setattr(download.import_janusflow, "convert", None)  # a second call would raise
    assert str(download.model_of(f"hf://{NAME}")) == str(folder)
    assert str(provenance.resolve(f"hf://{NAME}")) == str(folder)


def test_another_revision_is_another_folder(hub):
    assert OTHER[:12] in download.model_of(f"hf://{NAME}@old").name


def test_a_vae_beside_the_model_is_used(hub, tmp_path):
    download.model_of(f"hf://{NAME}")
    shutil.copytree(golden.TINY / "vae", tmp_path / "snapshots" / COMMIT / "vae")
    hub.clear()
    assert download.model_of(f"hf://{NAME}").name.endswith(f"B-{COMMIT[:12]}")
    assert hub == [(NAME, None)]


@pytest.mark.parametrize(
    "url", ["hf://", "hf://JanusFlow", "hf://a/b/c", "hf://a b/c", "hf://a/b@"]
)
def test_other_urls_are_errors(hub, url):
    with pytest.raises(CheckpointError, match="hf://organization/name"):
        janusflow_jax.load(url)
    assert not hub


def test_what_the_hub_lacks_is_one_error(hub):
    with pytest.raises(CheckpointError, match=r"hf://no/such: .*404"):
        janusflow_jax.load("hf://no/such")


def test_another_model_leaves_nothing_that_loads(hub, tmp_path):
    download.model_of(f"hf://{NAME}")
    shutil.rmtree(tmp_path / "cache")
    (tmp_path / "snapshots" / COMMIT / "config.json").write_text("{}")
    with pytest.raises(ConvertError):
        janusflow_jax.load(f"hf://{NAME}")
    assert not list((tmp_path / "cache").rglob("model.json"))


def test_a_name_without_a_folder_names_the_form(hub, tmp_path, monkeypatch):
    """No download by surprise."""
    monkeypatch.chdir(tmp_path)
    with pytest.raises(CheckpointError, match=f"write hf://{NAME} for"):
        janusflow_jax.load(NAME)
    (tmp_path / "runs" / "emoji").mkdir(parents=True)
    with pytest.raises(CheckpointError) as caught:
        janusflow_jax.load("runs/emoji")
    assert "hf://" not in str(caught.value) and not hub
