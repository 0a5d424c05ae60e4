"""The quick start's data set: the sheet, the held-out pairs, the colors, the files."""

from __future__ import annotations

import collections
import io
import runpy
import sys
from pathlib import Path

import pytest
from PIL import Image

from experiments.starts import tokenizer
from janusflow_jax import config as config_lib
from janusflow_jax.config import GENERATE, UNDERSTAND
from janusflow_jax.config.errors import DataError
from janusflow_jax.data import chat_format, images, rows, sources
from janusflow_jax.openmoji import (
    build,
    classes,
    drawings,
    prompts,
    scores,
)
from tools import prepare_openmoji

ROOT = Path(__file__).parents[1]
NAMES = list(classes.CLASSES.values())


def few(monkeypatch) -> None:
    """Only the sheet's classes, and a few more, so that a build takes a second."""
    wanted = {name for _, name, _ in prompts.SHEET} | set(NAMES[:12])
    small = {p: n for p, n in classes.CLASSES.items() if n in wanted}
    monkeypatch.setattr(classes, "CLASSES", small)


def test_the_sheet_has_every_color_three_times():
    sheet = prompts.SHEET
    assert len(sheet) == 24 and len({name for _, name, _ in sheet}) == 24
    assert collections.Counter(c for c, _, _ in sheet) == dict.fromkeys(prompts.PALETTE, 3)
    assert sum(not trained for _, _, trained in sheet) == 8
    assert prompts.PROMPTS[0] == "a red apple" and "an orange cat" in prompts.PROMPTS
    assert len(NAMES) >= 200 and len(set(NAMES)) == len(NAMES)
    assert {name for _, name, _ in sheet} <= set(NAMES)
    words = {word for name in NAMES for word in name.split()}
    assert not words & set(prompts.PALETTE)


@pytest.mark.parametrize("train_views", [3, 24])
def test_what_is_held_out_is_never_trained(train_views):
    splits = build.split_items(NAMES, train_views)
    pairs = {s: {(p.name, p.color) for p in items} for s, items in splits.items()}
    assert not pairs["train"] & pairs["heldout_pairs"]
    assert pairs["heldout_views"] == pairs["train"]
    for color, name, trained in prompts.SHEET:
        assert ((name, color) in pairs["train"]) == trained
        assert ((name, color) in pairs["heldout_pairs"]) != trained
    everything = len(NAMES) * len(prompts.PALETTE)
    assert len(pairs["train"]) + len(pairs["heldout_pairs"]) == everything
    assert 0.09 < len(pairs["heldout_pairs"]) / everything < 0.12
    by_class = collections.Counter(name for name, _ in pairs["train"])
    assert min(by_class[name] for name in NAMES) >= 5
    by_color = collections.Counter(color for _, color in pairs["heldout_pairs"])
    assert len(set(by_color.values())) == 1
    ids = [p.id for items in splits.values() for p in items]
    assert len(set(ids)) == len(ids)
    views = {build.view_of(p) for items in splits.values() for p in items}
    assert len(views) == len(ids)  # no held-out view is a training view
    assert len(splits["train"]) == train_views * len(pairs["train"])
    usual = build.split_items(NAMES)
    assert set(usual.pop("train")) <= set(splits["train"])
    assert usual.items() <= splits.items()


@pytest.mark.parametrize("color", prompts.PALETTE)
def test_recolored_drawings_have_the_hue(color):
    i = list(prompts.PALETTE).index(color)
    for point, name in [*classes.CLASSES.items(), *classes.NEW.items()][i::8]:
        drawing = drawings.load_class(point, name)
        image = images.decode(drawings.render(drawing.recolored(color), drawings.View(), 64))
        assert image.shape == (64, 64, 3)
        hue = scores.dominant_hue(image)
        assert scores.hue_distance(hue, prompts.PALETTE[color]) <= 20, name
        assert (image[0, 0] == 255).all()


@pytest.mark.slow
def test_the_build_is_whole_repeatable_and_trains(monkeypatch, tmp_path):
    few(monkeypatch)
    with pytest.raises(DataError, match="--views: expected 1 or more; got 0"):
        build.build(tmp_path / "a", 32, train_views=0)
    counts = build.build(tmp_path / "a", 32)
    with pytest.raises(DataError, match="--overwrite"):
        build.build(tmp_path / "a", 32)
    for _ in range(2):
        build.build(tmp_path / "b", 32, overwrite=True)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a", "b"]  # no temporary folder is left
    assert "CC BY-SA 4.0" in (tmp_path / "a" / "CREDITS.txt").read_text()
    for split, count in counts.items():
        one = sources.open_source(tmp_path / "a", split)
        two = sources.open_source(tmp_path / "b", split)
        assert len(one) == len(two) == count
        assert all(one[i] == two[i] for i in range(count))
    record = one[0]
    assert set(record) == {"id", "image", "captions", "class", "colour"}
    assert record["captions"][0] == prompts.caption(record["colour"], record["class"])
    assert record["id"].startswith(record["class"].replace(" ", "_"))
    assert Image.open(io.BytesIO(record["image"])).mode == "RGB"
    with pytest.raises(DataError, match=r"one of \['heldout_pairs'.*got 'test'"):
        sources.open_source(tmp_path / "a", "test")

    tokenizer.train_tokenizer(tmp_path / "hub", 640, num_image_tokens=16, image_size=64)
    chat = chat_format.ChatFormat.load(tmp_path / "hub")
    cfg = config_lib.DataConfig(
        sources=tuple(
            config_lib.SourceConfig(name=task, path=str(tmp_path / "a"), task=task)
            for task in ("generate", "understand")
        ),
        row_len=160,
        gen_slots=4,
        und_slots=2,
    )
    all_rows = rows.Rows(cfg, config_lib.model_config("emoji"), chat)
    tasks = set()
    for r in range(6):
        row, bad = all_rows.row(r)
        assert not bad
        tasks |= set(row["slot_task"].tolist())
    assert {GENERATE, UNDERSTAND} <= tasks


@pytest.mark.slow
def test_the_quick_start_reads_what_the_tool_writes(monkeypatch, tmp_path):
    few(monkeypatch)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["prepare_openmoji.py"])
    prepare_openmoji.main()
    cfg = runpy.run_path(str(ROOT / "configs" / "emoji.py"))["get_config"]("")
    chat = chat_format.ChatFormat.load(ROOT / "starts" / "emoji_llm" / "hub")
    all_rows = rows.Rows(cfg.data, cfg.model, chat, repa=True)
    row, bad = all_rows.row(0)
    assert not bad and row["images"].size == 0
    assert {"latent_mean", "repa_target", "und_features"} <= row.keys()
    build.build(tmp_path / "data" / "openmoji", 32, overwrite=True)
    assert not (tmp_path / "data" / "openmoji" / "cache").exists()


MARK = '{"moduleName": "janusflow_jax.data.openmoji_build"}'


def test_an_interrupted_build_changes_nothing(monkeypatch, tmp_path):
    few(monkeypatch)
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "dataset_info.json").write_text(MARK)

    def stop(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(build, "render_item", stop)
    with pytest.raises(KeyboardInterrupt):
        build.build(tmp_path / "a", 32, overwrite=True)
    assert [p.name for p in tmp_path.iterdir()] == ["a"]
    assert (tmp_path / "a" / "dataset_info.json").read_text() == MARK


def test_a_data_set_with_a_file_of_the_user_is_not_overwritten(tmp_path):
    (tmp_path / "dataset_info.json").write_text(MARK)
    (tmp_path / "eval.json").write_text("years of work")
    with pytest.raises(DataError, match=r"eval\.json"):
        build.build(tmp_path, 32, overwrite=True)


@pytest.mark.parametrize("name", ["thesis.tex", "dataset_info.json", "latents/manifest.json"])
def test_a_folder_of_other_files_is_not_overwritten(tmp_path, name):
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).write_text('{"moduleName": "janusflow_jax.data.prepare_files"}')
    with pytest.raises(DataError):
        build.build(tmp_path, 32, overwrite=True)
    assert (tmp_path / name).exists()


def test_the_tokenizer_is_repeatable_and_fits(tmp_path):
    for name in ("a", "b"):
        tokenizer.train_tokenizer(tmp_path / name, 640, 16, 64)
    one, two = (chat_format.ChatFormat.load(tmp_path / name) for name in ("a", "b"))
    assert one.hash == two.hash and one.vocab_needed <= 640 and one.num_image_tokens == 16
    prompt = one.conversation([], 0)
    assert len(prompt.ids) < 45  # BOS, the system prompt, 'Assistant:'
    text = "a drawing of an orange wine glass, é 🙂"
    assert one.decode(one.generation_ids(text, form="plain")) == text
