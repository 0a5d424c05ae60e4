"""The paper's stages: their values, their mixtures, and their test twins one after another."""

from __future__ import annotations

import runpy
from pathlib import Path

import jax
import numpy as np
import pytest
import test_train
from test_train import store  # noqa: F401 - a fixture

from janusflow_jax import checkpoint, config_checks, config_stages, train, train_step
from janusflow_jax import config as c
from janusflow_jax.data import packing

ROOT = Path(__file__).parents[1]
STAGES = ("adaptation", "pretrain", "sft")


def config(stage: str, arg: str | None = None) -> c.TrainConfig:
    return runpy.run_path(str(ROOT / "configs" / f"{stage}.py"))["get_config"](arg)


@pytest.mark.parametrize("arg", [None, "256", "test"])
@pytest.mark.parametrize("stage", STAGES)
def test_a_stage_can_work_and_says_who_it_is(stage, arg):
    cfg = config(stage, arg)
    assert not config_checks.train_problems(cfg)
    assert cfg.name == (f"{stage}-{arg}" if arg else stage)
    hash(cfg)
    if arg != "test":
        assert cfg.model.image_size == int(arg or 384) and not cfg.allow_fresh


@pytest.mark.parametrize(
    "stage, lr, warmup, steps, rows, frozen, mixture",
    [
        ("adaptation", 1e-4, 2000, 10_000, 512, {"llm", "und_encoder"}, [[50, 50]]),
        ("pretrain", 1e-4, 2000, 390_000, 512, {"und_encoder"}, [[30, 50, 20], [14, 80, 6]]),
        ("sft", 2e-5, 1000, 26_000, 256, set(), [[21, 70, 9]]),
    ],
)
def test_a_stage_has_the_papers_values(stage, lr, warmup, steps, rows, frozen, mixture):
    cfg = config(stage)
    assert (cfg.optim.lr, cfg.optim.warmup_steps, cfg.num_steps) == (lr, warmup, steps)
    assert (cfg.optim.b1, cfg.optim.b2, cfg.optim.weight_decay) == (0.9, 0.95, 0)
    assert (cfg.optim.clip_norm, cfg.optim.ema, cfg.optim.decay_steps) == (1.0, 0.99, 0)
    assert (cfg.batch_rows, cfg.data.row_len, cfg.data.drop_prompt) == (rows, 4096, 0.1)
    assert set(c.STAGE_PARTS) - set(cfg.train_parts) == frozen
    assert [w for _, w in cfg.data.phases()] == mixture
    assert [s.task for s in cfg.data.sources] == ["understand", "generate", "text"][
        : len(mixture[0])
    ]
    assert (cfg.loss.time, cfg.loss.time_shift, cfg.loss.norm) == ("logit_normal", 1.0, "per_task")
    if stage == "pretrain":
        assert cfg.data.change_row == 10_000 * 512
    slots = cfg.data.num_slots
    assert slots * cfg.model.slot_len <= cfg.data.row_len < (slots + 2) * cfg.model.slot_len


def test_a_change_of_the_mixture_keeps_every_sources_count():
    change, n = 137, 600
    before, _ = packing.mixture([30, 50, 20], [0.9, 0.8, 1.0], [False] * 3)
    after, _ = packing.mixture([14, 80, 6], [0.9, 0.8, 1.0], [False] * 3)
    ended = packing.count(change, before)
    assert sum(ended) == change
    seen = [0, 0, 0]
    for row in range(n):
        shares, first = (before, 0) if row < change else (after, change)
        source, k = packing.interleave(row - first, shares)
        assert k + (ended[source] if first else 0) == seen[source]
        seen[source] += 1


@pytest.mark.parametrize("shares", [[1, 2, 999_997], [1_000_000, 0, 0], [0, 1_000_000, 0]])
def test_count_is_what_interleave_gives(shares):
    got = np.bincount([packing.interleave(r, shares)[0] for r in range(300)], minlength=3)
    assert packing.count(300, shares) == got.tolist()


def test_per_sample_weights_follow_the_mixture():
    cfg = config("pretrain")
    early, late = (train_step.task_shares(cfg, step)["rf"] for step in (9_999, 10_000))
    np.testing.assert_allclose([early, late], [0.5, 0.8], rtol=1e-6)


def test_what_is_missing_is_said_before_anything_is_loaded(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(jax, "jit", None)  # nothing may be compiled
    with pytest.raises(c.ConfigError) as error:
        train.train(config("pretrain"))
    said = str(error.value)
    for path in ("data/understand", "data/generate", "data/text", "runs/adaptation"):
        assert path in said
    assert "array_record" in said
    with pytest.raises(c.ConfigError, match="convert_checkpoint.py --llm"):
        train.train(config("adaptation"))


@pytest.mark.slow
def test_the_stages_run_one_after_another(store, tmp_path):  # noqa: F811
    """Each starts from the last one's run; what is frozen stays bit for bit."""
    start, params = "", {}
    for stage in STAGES:
        cfg = config(stage, "test")
        cfg.tokenizer, cfg.start = str(test_train.HUB), start
        cfg.allow_fresh = not start
        start = train.train(cfg)
        metrics = test_train.lines(start)
        assert [x["step"] for x in metrics] == [1, 2, 3, 4] and metrics[-1]["ok"] == 1
        now = checkpoint.load_model(start, weights="params")
        assert now.vae is not None
        if params:
            for part, tree in checkpoint.flat(params).items():
                frozen = part.split("/")[0] not in cfg.train_parts
                same = np.array_equal(tree, checkpoint.flat(now.params)[part])
                assert same == frozen or not np.any(tree), part
        params = now.params


def test_the_parts_of_adaptation_are_all_but_the_pretrained():
    assert set(config_stages.ADAPTED) == set(c.STAGE_PARTS) - {"llm", "und_encoder"}
