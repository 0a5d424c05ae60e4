"""From captions, conversations and text: prepare with the tool, train two steps."""

from __future__ import annotations

import io
import json
import runpy
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest
from helpers import scenes
from PIL import Image

from janusflow_jax import config as c, train
from janusflow_jax.data import packing

ROOT = Path(__file__).resolve().parents[1]
HUB = ROOT / "tests" / "data" / "golden" / "tiny" / "janusflow"
COUNT = 24


def photo(i: int) -> bytes:
    """A JPEG of its own size, its colors turned."""
    picture = scenes.scene((80 + i, 70 - i))
    return scenes.encoded("JPEG", Image.fromarray(np.roll(np.asarray(picture), i, axis=2)))


def caption(i: int) -> str:
    return f"wall {i} " + "in red and blue " * (i % 3)


def talk(i: int) -> list[dict]:
    """LLaVA's turns; every fourth conversation has no picture."""
    mark = "" if i % 4 == 0 else "<image>\n"
    return [
        {"from": "human", "value": f"{mark}What is it?"},
        {"from": "gpt", "value": caption(i)},
        {"from": "human", "value": "Which colour?"},
        {"from": "gpt", "value": "red"},
    ]


def webdataset(into: Path) -> list[str]:
    for shard in range(2):
        with tarfile.open(into / f"{shard:05}.tar", "w") as tar:
            for i in range(shard, COUNT, 2):
                about = json.dumps({"caption": caption(i), "key": f"{i:09}"}).encode()
                for ext, data in (("jpg", photo(i)), ("json", about)):
                    info = tarfile.TarInfo(f"{i:09}.{ext}")
                    info.size = len(data)
                    tar.addfile(info, io.BytesIO(data))
    return ["webdataset", str(into / "*.tar")]


def llava(into: Path) -> list[str]:
    rows = []
    for i in range(COUNT):
        (into / f"{i}.jpg").write_bytes(photo(i))
        image = {} if i % 4 == 0 else {"image": f"{i}.jpg"}
        rows.append({"id": f"{i:06}", **image, "conversations": talk(i)})
    (into / "talks.json").write_text(json.dumps(rows))
    return ["llava", str(into / "talks.json"), "--images", str(into)]


def text(into: Path) -> list[str]:
    rows = [json.dumps({"text": caption(i) * (1 + i % 20)}) for i in range(COUNT)]
    (into / "a.jsonl").write_text("\n".join(rows))
    return ["text", str(into / "a.jsonl")]


@pytest.mark.slow
def test_prepare_three_formats_and_train_on_them(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for form in (webdataset, llava, text):
        folder = tmp_path / f"{form.__name__}_in"
        folder.mkdir()
        out = tmp_path / form.__name__
        arguments = [*form(folder), "--out", str(out), "--tokenizer", str(HUB), "--workers", "1"]
        monkeypatch.setattr(sys, "argv", ["prepare_data.py", *arguments])
        assert runpy.run_path(str(ROOT / "tools" / "prepare_data.py"))["main"]() == 0
        report = json.loads((out / "report.json").read_text())
        assert report["records"] == {"train": COUNT} and report["num_skipped"] == 0
    # training uses the stored lengths: it measures nothing
    monkeypatch.setattr(packing, "measure_lengths", lambda *_: pytest.fail("lengths were measured"))
    cfg = runpy.run_path(str(ROOT / "configs" / "emoji.py"))["get_config"]("test")
    cfg.tokenizer, cfg.workdir, cfg.prompts, cfg.heldout = str(HUB), "run", (), ()
    cfg.data.sources = (
        c.SourceConfig(name="generate", path="webdataset", task="generate"),
        c.SourceConfig(name="captions", path="webdataset", task="understand"),
        c.SourceConfig(name="talks", path="llava", task="understand"),
        c.SourceConfig(name="text", path="text", task="text"),
    )
    cfg.num_steps = 2
    train.train(cfg)
    lines = [json.loads(line) for line in Path("run/metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2]
    assert all(np.isfinite(line["loss"]) and line["bad_samples"] == 0 for line in lines)
    assert sum(line["count_ar"] for line in lines) > 0
    assert sum(line["count_rf"] for line in lines) > 0
