"""The same work on other engines and in other stores than this machine's."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
import tarfile
from pathlib import Path

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from etils import epath
from etils.epath import backend
from fsspec.implementations.memory import MemoryFileSystem
from helpers import scenes

from janusflow_jax.config.errors import DataError
from janusflow_jax.data import sources
from janusflow_jax.data.prepare import build, engines, files
from janusflow_jax.data.prepare.records import Options

ROOT = Path(__file__).resolve().parents[1]
HUB = ROOT / "tests" / "data" / "golden" / "tiny" / "janusflow"


class FakeS3(MemoryFileSystem):
    """A store under s3:// that is no folder of this machine: what is not opened there fails."""

    protocol = "s3"
    store: dict = {}  # noqa: RUF012
    pseudo_dirs = [""]  # noqa: RUF012

    @classmethod
    def _strip_protocol(cls, path):
        path = str(path).removeprefix("s3://").strip("/")
        return f"/{path}" if path else ""


@pytest.fixture
def bucket():
    fsspec.register_implementation("s3", FakeS3, clobber=True)
    backend.fsspec_backend._get_filesystem.cache_clear()
    FakeS3.store, FakeS3.pseudo_dirs = {}, [""]
    yield epath.Path("s3://bucket")
    backend.fsspec_backend._get_filesystem.cache_clear()


def tar(keys: range) -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as file:
        for i in keys:
            for ext, data in (
                ("jpg", scenes.encoded(quality=50 + i)),
                ("txt", b"wall %d" % i),
            ):
                info = tarfile.TarInfo(f"{i:06}.{ext}")
                info.size = len(data)
                file.addfile(info, io.BytesIO(data))
    return out.getvalue()


def fill(folder) -> None:
    """Inputs of every form."""
    (folder / "tars").mkdir(parents=True)
    for shard in range(2):
        (folder / "tars" / f"{shard:05}.tar").write_bytes(tar(range(shard * 8, shard * 8 + 8)))
    (folder / "pairs" / "sub").mkdir(parents=True)
    for i in range(9):
        (folder / "pairs" / "sub" / f"{i}.jpg").write_bytes(scenes.encoded(quality=60 + i))
        (folder / "pairs" / "sub" / f"{i}.txt").write_text(f"wall {i}")
    (folder / "pairs" / "sub" / "alone.jpg").write_bytes(scenes.encoded())
    turns = [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "A wall."}]
    talks = [{"id": str(i), "image": f"{i}.jpg", "conversations": turns} for i in range(12)]
    (folder / "talks.json").write_text(json.dumps(talks))
    rows = [
        {"image": {"bytes": scenes.encoded(quality=40 + i)}, "caption": f"wall {i}"}
        for i in range(10)
    ]
    table = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(rows), table, row_group_size=4)
    (folder / "a.parquet").write_bytes(table.getvalue())
    (folder / "a.jsonl").write_text("\n".join(json.dumps({"text": f"text {i}"}) for i in range(30)))


def options(form: str, folder) -> Options:
    changes: dict = {
        "folder": {"inputs": (str(folder / "pairs"),)},
        "webdataset": {"inputs": (str(folder / "tars" / "*.tar"),)},
        "llava": {
            "inputs": (str(folder / "talks.json"),),
            "images": str(folder / "pairs" / "sub"),
            "kind": "conversation",
            "lengths": ("understand:chat",),
        },
        "parquet": {"inputs": (str(folder / "a.parquet"),)},
        "text": {
            "inputs": (str(folder / "a.jsonl"),),
            "kind": "text",
            "lengths": ("text:plain",),
            "shard_bytes": 100,
        },
    }
    given = {"tokenizer": str(HUB), "lengths": ("generate:chat",), "shard_records": 4}
    return Options(form, **(given | changes[form]))


def contents(out) -> dict[str, bytes]:
    """Every file below a folder, by its path in it."""
    found = {}
    for path in out.iterdir():
        if path.is_dir():
            found |= {f"{path.name}/{n}": data for n, data in contents(path).items()}
        else:
            found[path.name] = path.read_bytes()
    return found


@pytest.mark.parametrize("form", ["folder", "webdataset", "parquet", "llava", "text"])
def test_a_bucket_gives_the_same_bytes_as_this_machine(form, bucket, tmp_path, monkeypatch):
    monkeypatch.setattr(build, "_MERGE_BYTES", 4000)
    fill(tmp_path / "in")
    fill(bucket / "in")
    local = build.prepare(options(form, tmp_path / "in"), tmp_path / "out", engines.local(1))
    stops = iter(range(2))  # the first run stops in the middle; the second resumes

    def stopping(function, jobs):
        for job in jobs:
            if next(stops, None) is None and not stopped:
                stopped.append(job)
                raise KeyboardInterrupt
            yield function(job)

    stopped: list = []
    out = bucket / "out"
    with pytest.raises(KeyboardInterrupt):
        build.prepare(options(form, bucket / "in"), out, stopping)
    assert stopped and (out / ".prepare_data" / "plan.json").exists()
    report = build.prepare(options(form, bucket / "in"), out, engines.local(1))
    assert report.records == local.records and report.num_records > 6
    got, want = contents(out), contents(tmp_path / "out")
    if form == "folder":  # the report names the file in the details of what is missing
        assert json.loads(got["report.json"]).keys() == json.loads(want["report.json"]).keys()
    assert {n: d for n, d in got.items() if n != "report.json"} == {
        n: d for n, d in want.items() if n != "report.json"
    }


def test_a_data_set_in_a_store_that_array_record_cannot_read_is_refused(bucket):
    with pytest.raises(DataError, match="s3://bucket/out"):
        sources.open_source(bucket / "out", "train")


def test_a_missing_or_short_file_is_an_error(tmp_path):
    with pytest.raises(OSError, match="gone"):
        files.merge((str(tmp_path / "out"), [(str(tmp_path / "gone"), [True, False])]))
    with files.writer(epath.Path(tmp_path / "short")) as file:
        file.write(b"a record")
    with pytest.raises(OSError, match="short: expected 2"):
        files.merge((str(tmp_path / "out"), [(str(tmp_path / "short"), [True, False])]))
    assert [p.name for p in tmp_path.iterdir()] == ["short"]


@pytest.mark.slow
@pytest.mark.parametrize(
    "engine",
    [
        ["beam"],
        [
            "beam",
            "--beam=--runner=DirectRunner",
            "--beam=--direct_num_workers=2",
            "--beam=--direct_running_mode=multi_processing",
        ],
        ["ray", "--ray-address", "local"],
    ],
    ids=["beam", "beam_processes", "ray"],
)
def test_other_engines_give_the_same_bytes(engine, tmp_path):
    pytest.importorskip({"beam": "apache_beam", "ray": "ray"}[engine[0]])
    fill(tmp_path / "in")
    build.prepare(options("webdataset", tmp_path / "in"), tmp_path / "one", engines.local(1))
    inputs = str(tmp_path / "in" / "tars" / "*.tar")
    paths = ["webdataset", inputs, "--out", str(tmp_path / "out"), "--tokenizer", str(HUB)]
    more = ["--lengths", "generate:chat", "--engine", *engine]
    command = [sys.executable, str(ROOT / "tools" / "prepare_data.py"), *paths, *more]
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, capture_output=True, text=True, env=env)
    assert done.returncode == 0, done.stderr[-2000:]
    assert contents(tmp_path / "out") == contents(tmp_path / "one")
    assert "train: 16 records" in done.stdout


@pytest.mark.parametrize("name", ["beam", "ray"])
def test_an_engine_that_is_not_installed_says_what_to_install(name, monkeypatch):
    monkeypatch.setitem(sys.modules, {"beam": "apache_beam", "ray": "ray"}[name], None)
    with pytest.raises(DataError, match="pip install"):
        engines.beam([]) if name == "beam" else engines.ray("local")
