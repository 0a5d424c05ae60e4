"""The likelihood of captions, and the best of several images, on the golden model."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import golden

from janusflow_jax import cli, generate
from janusflow_jax.config import UNDERSTAND
from janusflow_jax.data import samples
from janusflow_jax.models import janusflow
from tools import filter_generated

PATHS = [str(golden.TINY / "images" / f"{n}.png") for n in range(2)]
CAPTIONS = ["a red fox", "Two yellow taxis in the snow"]
QUICK = {"num_steps": 2, "seed": 7}


@pytest.fixture
def model(golden_model):
    return golden_model


def by_hand(model, path, caption):
    """The log-likelihood of an answer and its EOS, one sequence without padding."""
    question = f"{model.text.image_tag}\n{samples.QUESTION}"
    turns = [{"role": "User", "content": question}, {"role": "Assistant", "content": caption}]
    prompt = model.text.conversation(turns, 1)
    (start,) = prompt.slot_starts
    run = lambda *args, method: model.model.apply({"params": model.params}, *args, method=method)  # noqa: E731
    slots = model.understanding_slots([path])[None]
    x = run(jnp.asarray(prompt.ids)[None], method="embed_tokens")
    x = janusflow.place_slots(x, None, slots, jnp.array([[start]]), jnp.array([[UNDERSTAND]]))
    size = x.shape[1]
    hidden, _, _ = run(
        x, jnp.arange(size)[None], jnp.tril(jnp.ones((1, size, size), bool)), method="run_llm"
    )
    logs = jax.nn.log_softmax(run(hidden[0], method="logits"))
    question_ids = model.text.conversation(turns[:1], 1).ids
    assert prompt.ids[: len(question_ids)].tolist() == question_ids.tolist()
    return sum(logs[i - 1, prompt.ids[i]] for i in range(len(question_ids), size))


def test_a_score_is_the_log_likelihood_of_the_answer(model):
    scores = model.caption_scores(PATHS, CAPTIONS)
    want = [by_hand(model, *pair) for pair in zip(PATHS, CAPTIONS, strict=True)]
    np.testing.assert_allclose(scores, want, rtol=2e-6)
    np.testing.assert_allclose(model.caption_scores(PATHS[1], CAPTIONS[1]), want[1:], rtol=2e-6)
    other = model.caption_scores(PATHS[::-1], CAPTIONS)
    assert np.abs(other - scores).min() > 1e-3  # the image counts


@pytest.mark.slow
def test_the_best_of_several_images_is_the_most_likely(model):
    many = model.generate(CAPTIONS, images_per_prompt=4, output="numpy", **QUICK)
    scores = model.caption_scores(list(many), [c for c in CAPTIONS for _ in range(4)])
    best = scores.reshape(2, 4).argmax(1)
    assert best.any()  # not the first images, which one would get without ranking
    want = many.reshape(2, 4, *many.shape[1:])[[0, 1], best]
    got = model.generate(CAPTIONS, best_of=4, output="numpy", **QUICK)
    np.testing.assert_array_equal(got, want)
    two = model.generate(CAPTIONS[0], images_per_prompt=2, best_of=2, output="numpy", **QUICK)
    pairs = scores[:4].reshape(2, 2).argmax(1)
    want = many[[pairs[0], 2 + pairs[1]]].astype(int)
    np.testing.assert_allclose(two, want, atol=1)  # other rounding: four rows, not eight


def test_the_best_of_one_is_the_image(model):
    got = model.generate(CAPTIONS, best_of=1, output="latent", **QUICK)
    np.testing.assert_array_equal(got, model.generate(CAPTIONS, output="latent", **QUICK))


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda m: m.generate("a", best_of=0), "best_of: expected an integer >= 1; got 0"),
        (lambda m: m.generate("a", best_of=2, output="trajectory"), "expected 1 for output"),
        (lambda m: m.caption_scores(PATHS, ["a"]), "got 2 images and 1 prompts"),
    ],
)
def test_what_cannot_be_ranked_says_why(model, call, says):
    with pytest.raises(ValueError, match=says):
        call(model)


def test_the_filter_keeps_the_most_likely_images_of_every_prompt(model, monkeypatch, tmp_path):
    monkeypatch.setattr(cli, "load", lambda args: model)
    report, out = tmp_path / "images.json", tmp_path / "rows.jsonl"
    args = ["--model", "m", "--steps", "2", "--images-per-prompt", "3", "--json", str(report)]
    prompts = [x for caption in CAPTIONS for x in ("--prompt", caption)]
    generate.main([*args, *prompts, "--out", str(tmp_path / "images")])
    files = [str(tmp_path / "images" / f"{n:04d}.png") for n in range(6)]
    scores = model.caption_scores(files, [c for c in CAPTIONS for _ in range(3)])
    best = [int(scores[:3].argmax()), 3 + int(scores[3:].argmax())]
    args = ["--model", "m", "--report", str(report), "--out", str(out)]
    filter_generated.main([*args, "--keep", "0.3"])
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert [(x["image"], x["caption"]) for x in rows] == [
        (f"{n:04d}.png", c) for n, c in zip(best, CAPTIONS, strict=True)
    ]
    filter_generated.main([*args, "--keep", "0.5"])
    assert len(out.read_text().splitlines()) == 4
    with pytest.raises(ValueError, match="--keep: expected a share above 0"):
        filter_generated.main([*args, "--keep", "0"])
    report.write_text("{}")
    with pytest.raises(ValueError, match="expected a report of `generate --json`"):
        filter_generated.main(args)
