"""From captions, conversations and text: prepare with the tool, train two steps, resume."""

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
    """A JPEG of its own size, its colours turned."""
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


FORMS = {
    webdataset: ("generate", "understand"),
    llava: ("understand",),
    text: ("text",),
}


@pytest.mark.slow
@pytest.mark.parametrize("form", FORMS, ids=lambda form: form.__name__)
def test_prepare_train_two_steps_resume(form, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "in").mkdir()
    arguments = [*form(tmp_path / "in"), "--out", "data", "--tokenizer", str(HUB)]
    monkeypatch.setattr(sys, "argv", ["prepare_data.py", *arguments, "--workers", "1"])
    assert runpy.run_path(str(ROOT / "tools" / "prepare_data.py"))["main"]() == 0
    report = json.loads((tmp_path / "data" / "report.json").read_text())
    assert report["records"] == {"train": COUNT}
    assert report["num_skipped"] == 0
    # training uses the stored lengths: it measures nothing
    monkeypatch.setattr(packing, "measure_lengths", lambda *_: pytest.fail("lengths were measured"))
    cfg = runpy.run_path(str(ROOT / "configs" / "emoji.py"))["get_config"]("test")
    cfg.tokenizer, cfg.workdir, cfg.prompts, cfg.heldout = str(HUB), "run", (), ()
    cfg.data.sources = tuple(
        c.SourceConfig(name=task, path="data", task=task) for task in FORMS[form]
    )
    cfg.num_steps = 2
    train.train(cfg)
    cfg.num_steps = 4
    train.train(cfg)
    lines = [json.loads(line) for line in Path("run/metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2, 3, 4]
    assert all(np.isfinite(line["loss"]) and line["bad_samples"] == 0 for line in lines)
    targets, generated = (sum(x[n] for x in lines) for n in ("count_ar", "count_rf"))
    assert targets > 0
    assert (generated > 0) == ("generate" in FORMS[form])
