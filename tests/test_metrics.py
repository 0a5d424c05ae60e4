"""The metrics file survives resumes, crashes and NaN; the progress line reads well."""

import json
import sys
import types

import numpy as np
import pytest
from PIL import Image

from janusflow_jax.config.errors import ConfigError
from janusflow_jax.training import metrics


def _lines(workdir):
    return [json.loads(x) for x in (workdir / metrics.FILE).read_text().splitlines()]


def test_resume_drops_steps_that_come_again(tmp_path):
    writer = metrics.Writer(tmp_path)
    for step in (1, 10, 20, 30):
        writer.write(step, {"loss": np.float32(step)})
    writer.close()
    with (tmp_path / metrics.FILE).open("a") as f:
        f.write('{"step": 15, "lo')  # the process died in the middle of a line
    writer = metrics.Writer(tmp_path, resume_step=20)
    writer.write(30, {"loss": 0.5})
    writer.close()
    assert [(x["step"], x["loss"]) for x in _lines(tmp_path)] == [
        (1, 1.0),
        (10, 10.0),
        (20, 20.0),
        (30, 0.5),
    ]


def test_fresh_start_empties_the_file(tmp_path):
    for value in (1.0, 2.0):
        writer = metrics.Writer(tmp_path / "new")
        writer.write(1, {"loss": value})
        writer.close()
    assert [x["loss"] for x in _lines(tmp_path / "new")] == [2.0]


def test_lines_are_on_disk_at_once_and_nan_is_named(tmp_path):
    writer = metrics.Writer(tmp_path)
    writer.write(3, {"loss": np.nan, "grad_norm": -np.inf, "ok": np.bool_(False)})
    (line,) = _lines(tmp_path)  # not closed yet
    assert line["loss"] is None and line["grad_norm"] is None and line["ok"] == 0.0
    assert line["non_finite"] == {"loss": "nan", "grad_norm": "-inf"}
    assert "NaN" not in (tmp_path / metrics.FILE).read_text()
    writer.close()


def test_tensorboard_missing_is_said_before_anything_is_lost(tmp_path, monkeypatch):
    writer = metrics.Writer(tmp_path)
    writer.write(5, {"loss": 1.0})
    writer.close()
    monkeypatch.setitem(sys.modules, "tensorboardX", None)
    with pytest.raises(ImportError, match=r"pip install 'janusflow_jax\[tensorboard\]'"):
        metrics.Writer(tmp_path, resume_step=0, tensorboard=True)
    assert len(_lines(tmp_path)) == 1


def test_weights_and_biases_gets_numbers_and_images(tmp_path, monkeypatch):
    """A run that resumes continues the same run there."""
    runs = []

    class Run:
        def __init__(self, **options):
            self.options, self.logged, self.finished = options, [], False
            runs.append(self)

        def log(self, values, step):
            self.logged.append((step, values))

        def finish(self):
            self.finished = True

    fake = types.SimpleNamespace(init=Run, Image=lambda image: image.size)
    monkeypatch.setitem(sys.modules, "wandb", fake)
    for step in (1, 2):
        options = {"project": "drawings", "name": "emoji"}
        writer = metrics.Writer(tmp_path / "run", resume_step=step - 1, wandb=options)
        writer.write(step, {"loss": np.float32(0.5)})
        writer.image(step, "sheet", Image.new("RGB", (4, 3)))
        writer.close()
    assert runs[0].options == runs[1].options
    assert runs[0].options.items() >= {"project": "drawings", "resume": "allow"}.items()
    assert runs[1].logged == [(2, {"loss": 0.5}), (2, {"sheet": (4, 3)})]
    assert runs[1].finished
    refuse = types.SimpleNamespace(init=lambda **_: 1 / 0)
    monkeypatch.setitem(sys.modules, "wandb", refuse)
    with pytest.raises(ConfigError, match="wandb: .*division by zero.*WANDB_MODE=offline"):
        metrics.Writer(tmp_path / "run", resume_step=2, wandb={"project": "drawings"})
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(ImportError, match=r"pip install 'janusflow_jax\[wandb\]'"):
        metrics.Writer(tmp_path / "run", resume_step=0, wandb={"project": "drawings"})
    assert len(_lines(tmp_path / "run")) == 2


def test_tensorboard_gets_numbers_and_pictures(tmp_path):
    writer = metrics.Writer(tmp_path, resume_step=7, tensorboard=True)
    writer.write(8, {"loss": 2})
    writer.image(8, "sheet", Image.new("L", (4, 6)))
    writer.close()
    (events,) = (tmp_path / "tensorboard").iterdir()
    data = events.read_bytes()
    assert b"loss" in data and b"sheet" in data and b"\x89PNG" in data


def test_a_store_that_cannot_append_gets_the_whole_file(tmp_path):
    writer = metrics.Writer(tmp_path)
    writer._remote = tmp_path / "copy.jsonl"
    writer.write(1, {"loss": 1.0})
    writer.sync()
    writer.write(2, {"loss": 1.0})
    assert len((tmp_path / "copy.jsonl").read_text().splitlines()) == 1
    writer.close()
    assert len((tmp_path / "copy.jsonl").read_text().splitlines()) == 2


def test_progress(monkeypatch):
    now = [100.0]
    monkeypatch.setattr(metrics.time, "perf_counter", lambda: now[0])
    progress = metrics.Progress(num_steps=50, first_step=10, peak_tflops=20.0)
    assert progress.rates() == {} and progress.seconds_left() is None
    now[0] += 60  # compilation
    sums = {"images": 8, "positions": 1000, "tflops": 12.0}
    progress.count(wait=0.0, **sums)
    for _ in range(10):
        now[0] += 2
        progress.count(wait=0.5, **sums)
    rates = progress.rates()
    assert rates == {
        "steps_per_s": 0.5,
        "data_wait": 0.25,
        "images_per_s": 4.0,
        "positions_per_s": 500.0,
        "tflops_per_s": 6.0,
        "mfu": 0.3,
    }
    assert progress.seconds_left() == pytest.approx((50 - 21) * 2)
    line = progress.line(20, {"loss": 1.5, "loss_ar": 1, "loss_rf": 0.5, "lr": 3, **rates})
    assert line == "step 20/50  loss 1.5000  ar 1.0000  rf 0.5000  4.0 images/s  30% MFU  58 s left"
    assert "left" not in progress.line(50, rates)


@pytest.mark.parametrize(
    ("seconds", "text"), [(45.2, "45 s"), (720.0, "12 min"), (11100.0, "3 h 05 min"), (-1.0, "0 s")]
)
def test_duration(seconds, text):
    assert metrics.duration(seconds) == text
