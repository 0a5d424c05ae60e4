"""Every test runs on 8 fake CPU devices, in full float32 precision, and downloads nothing."""

import atexit
import os
import pathlib
import shutil
import tempfile

# The environment is for processes that tests start; JAX may be imported already (jaxtyping's
# pytest plugin comes first), so this one is told by its config. Nearly all the time of a test is
# compilation: less of it is optimized (half the time), none is done twice in a session.
_TINY = pathlib.Path(__file__).parent / "data" / "golden" / "tiny"
# With pytest-xdist the workers are processes that the first one starts: they share its cache.
_CACHE = os.environ.get("JANUSFLOW_TEST_CACHE", "")
if not _CACHE:
    _CACHE = os.environ["JANUSFLOW_TEST_CACHE"] = tempfile.mkdtemp(prefix="janusflow-test-")
    atexit.register(shutil.rmtree, _CACHE, ignore_errors=True)
os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["JAX_NUM_CPU_DEVICES"] = "8"
os.environ["JAX_DEFAULT_MATMUL_PRECISION"] = "highest"
os.environ["JAX_COMPILATION_CACHE_DIR"] = _CACHE
os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.5"
os.environ["XLA_FLAGS"] = "--xla_backend_optimization_level=0"
os.environ["HF_HUB_OFFLINE"] = "1"

import jax  # noqa: E402
import pytest  # noqa: E402

jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_default_matmul_precision", "highest")
jax.config.update("jax_compilation_cache_dir", _CACHE)
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)


@pytest.fixture(scope="session")
def golden_folder(tmp_path_factory):
    """The golden model as a folder, with the tokenizer whose BOS is in its config only."""
    from helpers import golden

    names = ("janusflow", "tokenizer_bos_by_config")
    files = [p for n in names for p in (golden.TINY / n).iterdir() if p.suffix == ".json"]
    hub = {p.name: p.read_bytes() for p in files}  # the second tokenizer over the first
    return golden.save(tmp_path_factory.mktemp("golden") / "model", hub)


@pytest.fixture(scope="session")
def golden_model(golden_folder):
    """That folder, loaded as anybody would."""
    import janusflow_jax

    return janusflow_jax.load(golden_folder, dtype="float32")


@pytest.fixture
def folder(tmp_path):
    """A copy of the published JanusFlow folder of the golden numbers, for a test to change."""
    return shutil.copytree(_TINY / "janusflow", tmp_path / "janusflow")


@pytest.fixture
def vae_folder(tmp_path):
    """The same of its VAE."""
    return shutil.copytree(_TINY / "vae", tmp_path / "vae")


@pytest.fixture
def store(monkeypatch, tmp_path):
    """The records of every data set that a training run opens; the working directory is empty.

    Runs use two of the eight devices: saving tiny arrays from eight takes most of a test's time.
    """
    from helpers import records, runs

    from janusflow_jax.data import sources
    from janusflow_jax.parallel import sharding

    make_mesh, two = sharding.make_mesh, jax.devices()[:2]
    monkeypatch.setattr(sharding, "make_mesh", lambda cfg, devices=two: make_mesh(cfg, devices))
    out = records.Store(runs.record(i) for i in range(30))
    monkeypatch.setattr(sources, "open_source", lambda path, split: out)
    monkeypatch.chdir(tmp_path)
    return out


@pytest.fixture
def stores(monkeypatch, tmp_path):
    """Two data sets in memory by their path, "a" and "b"; the working directory is empty."""
    from helpers import records

    from janusflow_jax.data import sources

    out = {n: records.Store(records.record(i) for i in range(k)) for n, k in (("a", 41), ("b", 23))}
    monkeypatch.setattr(sources, "open_source", lambda path, split: out[pathlib.Path(path).name])
    monkeypatch.chdir(tmp_path)
    return out


@pytest.fixture(scope="session")
def referee(tmp_path_factory):
    """A fresh judge of the polygons in `helpers.drawings`, written and read."""
    import numpy as np
    from helpers import drawings

    from janusflow_jax.openmoji import judge

    folder = tmp_path_factory.mktemp("judge")
    cfg, params = drawings.save_judge(folder)
    loaded = judge.load(folder)
    kernel = np.asarray(params["image_head"]["kernel"])
    np.testing.assert_allclose(loaded.params["image_head"]["kernel"], kernel, rtol=1e-2)
    assert loaded.cfg == cfg and len(loaded.sha256) == 64
    return loaded


@pytest.fixture
def shown(monkeypatch):
    """The references of the suite when its sheet shows the first 24 polygons; 12 are left."""
    from helpers import drawings

    from janusflow_jax.openmoji import prompts, scores, suite

    images, labels = drawings.draw_all()
    sheet = tuple((x.color, x.name, True) for x in labels[:24])
    monkeypatch.setattr(prompts, "SHEET", sheet)
    monkeypatch.setattr(prompts, "PROMPTS", tuple(prompts.caption(c, n) for c, n, _ in sheet))
    gallery = scores.make_gallery(images, labels)
    out = suite.References(gallery, *drawings.real_drawings(labels))
    monkeypatch.setattr(suite, "references", lambda path: out)
    return out
