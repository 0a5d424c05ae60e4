"""docs/finetuning.md: its commands, run as they stand but for the number of steps."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import runpy
import shlex
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from PIL import Image

from janusflow_jax import config as c
from janusflow_jax.config import checks as config_checks, parts as parts_lib
from janusflow_jax.planning import compile as plan_compile
from janusflow_jax.training import heldout

ROOT = Path(__file__).resolve().parents[1]
SHORT = {
    "janusflow_jax.train": "--config.num_steps=2 --config.evaluate.rows=2 --config.batch_rows=2 "
    "--config.save_every_steps=0 --config.optim.warmup_steps=1",
    "janusflow_jax.generate": "--steps 2",
}


def commands() -> list[list[str]]:
    text = (ROOT / "docs" / "finetuning.md").read_text()
    blocks = re.findall(r"```bash\n(.*?)```", text, re.DOTALL)
    return [shlex.split(line) for block in blocks for line in block.splitlines() if line]


def config(arg: str) -> c.TrainConfig:
    return runpy.run_path(str(ROOT / "configs" / "finetune.py"))["get_config"](arg)


@pytest.mark.slow
def test_the_commands_of_the_doc(tmp_path):
    for name in ("configs", "starts", "tools", "janusflow_jax"):
        (tmp_path / name).symlink_to(ROOT / name)
    # pictures of a few processes: no fake devices, a cache of compiled programs for all
    env = {**os.environ, "JAX_NUM_CPU_DEVICES": "1", "PYTHONPATH": str(ROOT)}

    def run(words: list[str]) -> str:
        assert words[0] == "python"
        short = next((SHORT[w] for w in words if w in SHORT), "").split()
        done = subprocess.run(
            [sys.executable, *words[1:], *short],
            cwd=tmp_path,
            env=env,
            text=True,
            capture_output=True,
        )
        assert done.returncode == 0, f"{shlex.join(words)}\n{done.stdout}\n{done.stderr}"
        return done.stdout

    run(shlex.split("python tools/prepare_openmoji.py --out data/openmoji"))
    train = "python -m janusflow_jax.train --config=configs/emoji.py"
    run(shlex.split(f"{train} --config.prompts=() --config.heldout=()"))  # for runs/emoji
    said = [run(words) for words in commands()]
    assert len(said) == 6
    assert "replay_understand ar" in said[1] and "mine_generate rf" in said[1]
    assert json.loads((tmp_path / "owl_adapter" / "adapter_config.json").read_text())["r"] == 16
    for name in ("owl.png", "owl_lora.png"):
        assert np.asarray(Image.open(tmp_path / name)).shape == (64, 64, 3)


@pytest.mark.parametrize(
    ("arg", "tasks", "trained"),
    [
        ("generate", ["generate"], {"llm", "gen_decoder"}),
        ("understand", ["understand"], {"llm", "und_aligner"}),
        (
            "generate,understand,replay",
            ["generate", "understand"] * 2,
            {"llm", "gen_decoder", "und_begin"},
        ),
        ("generate,lora,light", ["generate"], set()),
        ("generate,replay,lora", ["generate", "generate", "understand"], set()),
        ("understand,lora,test", ["understand"], set()),
        ("generate,replay,emoji", ["generate", "generate", "understand"], {"llm", "gen_decoder"}),
    ],
)
def test_what_an_argument_trains(arg, tasks, trained):
    cfg = config(arg)
    assert not config_checks.train_problems(cfg)
    assert [s.task for s in cfg.data.sources] == tasks
    assert trained <= parts_lib.trained_parts(cfg) and (
        "lora" not in arg or parts_lib.trained_parts(cfg) == set()
    )
    assert "und_encoder" not in parts_lib.trained_parts(cfg)
    shares = [s.weight for s in cfg.data.sources]
    if "replay" in arg:
        kept = [s.weight for s in cfg.data.sources if s.name.startswith("replay")]
        assert sum(kept) / sum(shares) == pytest.approx(0.25)
        assert {s.task for s in cfg.evaluate.sources} == {"generate", "understand"}
    assert cfg.evaluate.max_rise and len(cfg.evaluate.sources) >= 3


@pytest.mark.parametrize("made_by", ["prepare_data", "prepare_openmoji", "", "broken"])
@pytest.mark.parametrize("arg", ["generate,emoji", "generate", "generate,emoji,test"])
@pytest.mark.parametrize("folder", ["data/mine", "elsewhere", "data/openmoji"])
def test_a_data_set_is_known_by_its_splits(tmp_path, monkeypatch, made_by, arg, folder):
    monkeypatch.chdir(tmp_path)
    split = {"prepare_data": "heldout", "prepare_openmoji": "heldout_pairs"}.get(made_by)
    if made_by:
        info = {"splits": [{"name": "train"}, {"name": split}]} if split else {"splits": 3}
        Path(folder).mkdir(parents=True)
        (Path(folder) / "dataset_info.json").write_text(json.dumps(info))
    cfg = config(arg if folder == "data/mine" and "test" not in arg else f"{arg},mine={folder}")
    (mine,) = (s for s in cfg.evaluate.sources if s.name.startswith("mine"))
    assert mine.path == folder
    assert not split or mine.split == split


def test_a_folder_to_watch_is_the_one_that_was_named():
    for arg, path in (("", "data/openmoji"), (",watch=data/replay", "data/replay")):
        cfg = config(f"generate,replay,emoji{arg}")
        replayed = {s.path for s in cfg.data.sources if s.name.startswith("replay")}
        assert replayed == {path}


def test_what_is_fine_tuned_must_be_said():
    with pytest.raises(c.ConfigError, match="expected generate, understand or both"):
        config("lora")


def test_the_twin_has_the_guard_of_its_run():
    for arg in ("generate,replay", "understand,lora"):
        run, twin = config(arg), config(f"{arg},test")
        names = [[s.name for s in x.evaluate.sources] for x in (run, twin)]
        assert names[0] == names[1] and run.evaluate.max_rise == twin.evaluate.max_rise
        assert {(s.path, s.split) for s in twin.evaluate.sources} == {
            ("data/openmoji", "heldout_pairs")
        }
        assert twin.evaluate.rows <= 8 and twin.evaluate.every_steps < twin.num_steps


@pytest.mark.parametrize("parts", [("und_aligner",), ("und_aligner", "und_begin/embedding"), ()])
def test_a_run_that_trains_nothing_is_refused(parts):
    cfg = dataclasses.replace(config("generate,test"), train_parts=parts)
    (said,) = config_checks.train_problems(cfg)
    assert "would train nothing" in said and f"got {parts}" in said
    assert "(generate)" in said and "llm, gen_encoder, gen_aligner, gen_norm, gen_head" in said
    # a part that is not reached stands beside others, or beside adapters
    for fine in (
        dataclasses.replace(cfg, train_parts=(*parts, "gen_head/kernel")),
        dataclasses.replace(cfg, lora=c.LoraConfig(rank=2)),
    ):
        assert not config_checks.train_problems(fine) and parts_lib.trained_paths(fine)
    reads = dataclasses.replace(config("understand,test"), train_parts=("gen_head",))
    (said,) = config_checks.train_problems(reads)
    assert "(understand)" in said and "llm, und_encoder, und_aligner, und_begin;" in said


def test_held_out_rows_are_the_same_with_replay_and_without():
    for task in ("generate", "understand"):
        for size in (",emoji", ",light", ""):
            one, two = config(f"{task}{size}"), config(f"{task},replay{size}")
            assert one.evaluate == two.evaluate and one.data.row_len == two.data.row_len
            for kind in ("generate", "understand"):
                assert heldout.slots_of(one, kind) == heldout.slots_of(two, kind)


GEN = ("gen_encoder", "gen_aligner", "gen_norm", "gen_head", "gen_decoder")


@pytest.mark.parametrize(
    ("row", "arg", "fields"),
    [
        ("`generate` (all", "generate", {}),
        ("`generate,light`", "generate,light", {}),
        ("`generate`, `train_parts`", "generate", {"train_parts": GEN}),
        ("the same, `frozen", "generate", {"train_parts": GEN, "frozen_dtype": "bfloat16"}),
        ("`generate,lora` (", "generate,lora", {}),
        ("`generate,lora,light`", "generate,lora,light", {}),
    ],
)
def test_what_the_memory_table_says_of_the_state(row, arg, fields):
    text = (ROOT / "docs" / "finetuning.md").read_text()
    (line,) = [x for x in text.splitlines() if x.startswith(f"| {row}")]
    _, trained, state = line.strip("| ").split(" | ")[:3]
    shapes = plan_compile.state_shapes(dataclasses.replace(config(arg), **fields))
    count = sum(x.size for x in jax.tree.leaves(shapes["params"]))
    held = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(shapes))
    assert trained == f"{count / 1e6:,.0f} M"
    assert state == f"{held / 2**30:.1f}"
