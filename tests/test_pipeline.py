"""The Python API on the golden model: its numbers, and what must change nothing."""

import base64
import functools
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import golden, runs
from helpers.compilations import Compilations
from PIL import Image

import janusflow_jax
from janusflow_jax import config, pipeline
from janusflow_jax.config.errors import CheckpointError, JanusFlowError
from janusflow_jax.data import chat_format, images
from janusflow_jax.parallel import sharding
from janusflow_jax.sampling import flow, image as image_sampling, programs

QUICK = {"num_steps": 2, "output": "latent"}
PROMPTS = ["a red fox", "Two yellow taxis in the snow beside a quiet river", "a tree"]
LONG = "a red fox, a blue whale and a green frog sit in the snow beside a quiet river " * 2


@pytest.fixture
def model(golden_model):
    return golden_model


@functools.cache
def conversations():
    """The golden conversations and their pictures' paths."""
    cases = golden.facts("expected")["chat"]
    paths = [[str(golden.TINY / "images" / n) for n in case["images"]] for case in cases]
    return [case["conversation"] for case in cases], paths


def close(got, want, tolerance=1e-5):
    np.testing.assert_allclose(got, want, rtol=0, atol=tolerance)


# --- the golden numbers, through `load` and the API


def test_golden_pictures(model):
    case, want = golden.facts("expected")["samples"][1], golden.arrays("expected")
    path = golden.nhwc(want["sample1.trajectory"])
    options = {"guidance_scale": case["cfg_weight"], "num_steps": case["steps"], "noise": path[0]}
    got = model.generate(case["prompt"], output="trajectory", **options)
    assert golden.error(got, path) < 5e-6
    pixels = model.decode_latents(got[-1], "numpy")
    expected = (golden.nhwc(want["sample1.image"]) + 1) * 127.5
    assert pixels.dtype == np.uint8
    assert np.abs(pixels - expected).max() <= 0.5 + 127.5 * 2e-5
    (picture,) = model.decode_latents(got[-1])
    np.testing.assert_array_equal(np.asarray(picture), pixels[0])


@pytest.mark.parametrize("order", [1, 2])
def test_step_by_step_equals_the_scan(model, order):
    """Every state, with and without guidance in the steps; a callback may replace them."""
    options = {"order": order, "num_steps": 3, "guidance_interval": (0.0, 0.5), "seed": 4}
    path = model.generate(PROMPTS, output="trajectory", **options)
    states = []
    out = model.generate(
        PROMPTS, output="latent", on_step=lambda *state: states.append(state), **options
    )
    assert [k for k, _, _ in states] == [0, 1, 2]
    close([t for _, t, _ in states], [1 / 3, 2 / 3, 1])
    close(np.stack([z for _, _, z in states]), path[1:])
    close(out, path[-1])

    def stop_at_noise(k, t, latents):
        return np.zeros_like(latents) if k == 2 else None

    assert not model.generate(PROMPTS, output="latent", on_step=stop_at_noise, **options).any()
    for wrong, bad in ((lambda *_: np.zeros(3), {}), (print, {"output": "trajectory"})):
        with pytest.raises(JanusFlowError, match="on_step"):
            model.generate(PROMPTS, on_step=wrong, **{**options, **bad})


class Generator:
    """As torch.Generator."""

    def __init__(self, seed):
        self.seed = seed

    def initial_seed(self):
        return self.seed


@pytest.mark.slow
def test_names_of_diffusers(model):
    options = {"num_inference_steps": 2, "guidance_scale": 3.0}
    want = model.generate(PROMPTS[:1] * 2, guidance_scale=3.0, num_steps=2, seed=7, output="numpy")
    for generator in (7, Generator(7), [7, 8], [Generator(7 + 2**32), 8]):
        out = model(PROMPTS[0], num_images_per_prompt=2, generator=generator, **options)
        assert out.seeds == [7, 8]
        np.testing.assert_array_equal(np.stack([np.asarray(x) for x in out.images]), want)
    size = model.cfg.image_size
    out = model(PROMPTS[:1] * 2, generator=7, output_type="np", height=size, width=size, **options)
    close(out.images * 255, want.astype(np.float32), 1e-4)
    noise = np.zeros((1, *model.cfg.latent_shape), np.float32)
    out = model(PROMPTS[0], latents=noise, output_type="latent", **options)
    assert out.seeds is None
    close(out.images, model.generate(PROMPTS[0], guidance_scale=3.0, noise=noise, **QUICK))
    first, second = (model(PROMPTS[0], num_inference_steps=1).seeds for _ in range(2))
    assert first != second  # random, and told
    seen = []

    def callback(pipe, step, time, values):
        assert pipe is model
        seen.append((step, time))
        return {"latents": values["latents"] * 0} if step else {}

    out = model(PROMPTS[0], output_type="latent", callback_on_step_end=callback, **options)
    assert seen == [(0, 0.5), (1, 1.0)] and not out.images.any()


@pytest.mark.parametrize(
    "wrong",
    [
        {"negative_prompt": "blurry"},
        {"height": 512},
        {"output_type": "pt"},
        {"generator": [1, 2]},
        {"generator": "7"},
        {"num_images_per_prompt": 0},
        {"num_inference_steps": 0},
    ],
)
def test_what_the_names_of_diffusers_cannot_do_is_an_error(model, wrong):
    with pytest.raises(JanusFlowError, match="expected"):
        model("a red fox", **wrong)


def test_chat_takes_content_lists(model):
    """Of transformers and OpenAI: the same answer as by tags."""
    path = str(golden.TINY / "images" / golden.facts("expected")["chat"][0]["images"][0])
    encoded = base64.b64encode(pathlib.Path(path).read_bytes()).decode()
    want = model.chat("What is it?", [path], max_new_tokens=6)
    for part in (
        {"type": "image", "image": Image.open(path)},
        {"type": "image", "path": path},
        {"type": "image", "base64": encoded},
        {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{encoded}"}},
    ):
        content = [part, {"type": "text", "text": "What is it?"}]
        assert model.chat([{"role": "user", "content": content}], max_new_tokens=6) == want


def test_golden_answers(model):
    many, pictures = conversations()
    want = [text.strip() for text in golden.facts("expected")["greedy_text"]]
    assert model.chat(many, pictures, max_new_tokens=24) == want


def test_golden_latents(model):
    names = golden.facts("train")["generation"]["images"]
    paths = [golden.TINY / "images" / n for n in names]
    squares = [images.for_understanding(images.read(p), 64) for p in paths]
    want = golden.nhwc(golden.arrays("train")["train.latents"])
    assert golden.error(model.encode_image(squares), want) < 5e-6
    mixed = model.encode_image([squares[0], Image.fromarray(squares[1])])
    assert golden.error(mixed, want) < 5e-6


def test_both_forms_of_the_tokenizer_give_the_same_ids(model, tmp_path):
    other = janusflow_jax.load(golden.save(tmp_path / "model", golden.TINY / "janusflow"))
    assert other.text.hash != model.text.hash
    for case in golden.facts("expected")["samples"]:
        want = case["input_ids"][:-1]
        assert other.text.generation_ids(case["prompt"]) == want
        assert model.text.generation_ids(case["prompt"]) == want
    for case in golden.facts("expected")["chat"]:
        for text in (model.text, other.text):
            got = text.conversation(case["conversation"], len(case["images"]))
            assert got.ids.tolist() == case["input_ids"]


# --- what must change nothing


def test_a_picture_is_its_prompts_alone_with_its_seed(model):
    together = model.generate(PROMPTS, seed=7, **QUICK)
    alone = [model.generate(p, seed=7 + n, **QUICK)[0] for n, p in enumerate(PROMPTS)]
    close(together, alone)
    assert np.abs(together[0] - together[1]).max() > 0.1
    back = model.generate(PROMPTS[::-1], seed=[9, 8, 7], **QUICK)
    close(back[::-1], together)


def tiny_model(dtype):
    """A model of 60,000 parameters."""
    cfg = runs.tiny_config("").model
    params, vae_params = jax.device_get(runs.fresh_params(cfg, jax.random.key(0)))
    params, vae_params = jax.tree.map(lambda x: x + np.float32(0.02), (params, vae_params))
    text = chat_format.ChatFormat.load(runs.HUB, cfg.num_image_tokens)
    return pipeline.Pipeline(cfg, params, vae_params, text, dtype=dtype)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", pipeline.DTYPES)
def test_at_one_shape_neighbors_and_places_change_no_bit(dtype):
    """Four rows, 32 positions. At other shapes rounding differs."""
    model = tiny_model(dtype)
    prompts, seeds = [*PROMPTS, "a blue whale"], [7, 8, 9, 10]
    others = [["x"] * 4, ["an umbrella", PROMPTS[1], "a frog on a stone", "Why?"]]

    def images(prompts, seeds):
        return model.generate(prompts, seed=seeds, num_steps=2, output="numpy")

    want = images(prompts, seeds)
    assert len({x.tobytes() for x in want}) == 4
    np.testing.assert_array_equal(images(prompts[::-1], seeds[::-1])[::-1], want)
    np.testing.assert_array_equal(images(prompts[:3], seeds[:3]), want[:3])  # three fill four rows
    for place, neighbors in enumerate(others, start=1):
        neighbors[place] = prompts[0]
        row = images(neighbors, [seeds[0]] * 4)[place]
        np.testing.assert_array_equal(row, want[0])


@pytest.mark.slow
@pytest.mark.parametrize("dtype", pipeline.DTYPES)
def test_at_one_shape_neighbors_and_places_change_no_answer(dtype):
    model, prompts = tiny_model(dtype), [*PROMPTS, "a blue whale"]
    answers = model.chat(prompts, max_new_tokens=16)
    assert model.chat(prompts[::-1], max_new_tokens=16)[::-1] == answers
    assert model.chat(["x", "y", "z", prompts[0]], max_new_tokens=16)[3] == answers[0]


@pytest.mark.slow
def test_seeds_buckets_and_groups_change_nothing(model, monkeypatch):
    prompts = [PROMPTS[0], LONG]  # another bucket of prompt lengths
    both = model.generate(prompts, seed=[3, 11], images_per_prompt=2, **QUICK)
    one = model.generate(prompts[0], seed=3, images_per_prompt=2, **QUICK)
    close(both[:2], one)
    close(both[3], model.generate(LONG, seed=12, **QUICK)[0])
    noise = model.generate(LONG, seed=12, num_steps=2, output="trajectory")[0]
    close(model.generate(LONG, noise=jnp.asarray(noise), **QUICK)[0], both[3])
    monkeypatch.setattr(pipeline, "MAX_BATCH", 2)
    close(model.generate(prompts, seed=[3, 11], images_per_prompt=2, **QUICK), both)
    pixels = model.decode_latents(both, "numpy")
    close(pixels[2:3], model.decode_latents(both[2:3], "numpy"), 1)
    # Exact lengths, no bucket: the sampler itself.
    ids = jnp.asarray([model.text.generation_ids(LONG)])
    args = (model.model, model.params, ids, jnp.asarray([ids.shape[1]]), jnp.asarray(noise), 2.0)
    sampler = config.SamplerConfig(steps=2)
    close(image_sampling.sample(*args, head=1, sampler=sampler)[0], both[3])


@pytest.mark.slow
def test_guidance_of_one_is_the_conditional_branch_alone(model, monkeypatch):
    branches, sample = [], programs.sample

    def count(*args, head, sampler):
        branches.append(1 + int(flow.guided_steps(sampler).all()))
        return sample(*args, head=head, sampler=sampler)

    monkeypatch.setattr(programs, "sample", count)
    got = model.generate(PROMPTS[1], seed=5, guidance_scale=1.0, **QUICK)
    near = model.generate(PROMPTS[1], seed=5, guidance_scale=1 + 1e-7, **QUICK)
    assert branches == [1, 2]
    close(got, near)
    assert np.abs(got - model.generate(PROMPTS[1], seed=5, **QUICK)).max() > 1e-3


def euler_steps(guided):
    """The jaxpr of the Euler loop's body, for one prompt of 40 tokens."""
    tiny, params, _ = golden.model()
    tokens, noise = jnp.zeros((1, 40), jnp.int32), jnp.zeros((1, *tiny.cfg.latent_shape))
    sampler = config.SamplerConfig(steps=7, guide_until=float(guided))
    run = functools.partial(image_sampling.sample, tiny, head=1, sampler=sampler)
    jaxpr = jax.make_jaxpr(run)(params, tokens, jnp.asarray([38]), noise, 2.0)
    (loop,) = (e for e in walk(jaxpr.jaxpr) if e.params.get("length") == 7)
    return loop.params["jaxpr"].jaxpr


def walk(jaxpr):
    """Every equation, those of inner programs too."""
    for equation in jaxpr.eqns:
        yield equation
        for inner in jax.tree.leaves(
            list(equation.params.values()), is_leaf=lambda x: hasattr(x, "jaxpr")
        ):
            if hasattr(inner, "jaxpr"):
                yield from walk(inner.jaxpr)


@pytest.mark.parametrize("guided", [True, False])
def test_a_step_computes_no_prompt_and_only_the_branches_it_needs(guided):
    """17 positions of the slot are multiplied by the LLM's kernels, never the 40 of the prompt."""
    rows = set()
    for equation in walk(euler_steps(guided)):
        if equation.primitive.name == "dot_general":
            left, right = (v.aval.shape for v in equation.invars)
            if right == (64, 176):  # the LLM's MLP
                rows.add(int(np.prod(left[:-1])))
    assert rows == {(2 if guided else 1) * 17}


def test_the_old_name_of_the_guidance_scale_works_for_one_release(model):
    got = model.generate(PROMPTS[0], seed=5, cfg_weight=3.5, **QUICK)
    np.testing.assert_array_equal(
        got, model.generate(PROMPTS[0], seed=5, guidance_scale=3.5, **QUICK)
    )
    assert pipeline.Pipeline is pipeline.Pipeline


def test_a_new_prompt_compiles_nothing(model):
    model.generate(PROMPTS, seed=1, **QUICK)
    with Compilations() as seen:
        model.generate(["another thing", "x", "a whale"], seed=100, guidance_scale=3.5, **QUICK)
        model.generate([*PROMPTS, "a fourth"], seed=4, **QUICK)
    assert not seen.names
    with Compilations() as seen:  # the count counts
        model.generate("one", num_steps=3, output="latent")
    assert "sample" in str(seen.names)


def test_the_key_value_buffer_is_donated(model):
    many, pictures = conversations()
    prompts, pictures, _ = model._prompts(many, pictures, 24, 0.0, 1.0, 0)
    slots = model.understanding_slots([x for own in pictures for x in own])
    state = model._prefill(prompts, slots, 24, 0)
    args = (model.model, model.params, state, jnp.float32(0), jnp.float32(1))
    programs.decode(*args, num_tokens=pipeline.CHUNK_TOKENS, eos_id=model.text.eos_id)
    buffers = jax.tree.leaves(state["cache"])
    assert len(buffers) == 2 * model.cfg.llm.num_layers and all(x.is_deleted() for x in buffers)
    noise = jax.random.normal(jax.random.key(0), (1, *model.cfg.latent_shape))
    kept = np.array(noise)
    model.generate("a", noise=noise, **QUICK)  # the caller's own array is not used up
    np.testing.assert_array_equal(noise, kept)


@pytest.mark.slow
def test_a_new_question_compiles_nothing(model):
    picture = np.zeros((40, 30, 3), np.uint8)
    model.chat("What is it?", [picture], max_new_tokens=20)
    with Compilations() as seen:
        model.chat("Is it the red fox?", [picture[:20] + 9], max_new_tokens=30, seed=3)
        "".join(model.stream("Why?", [picture], max_new_tokens=17, temperature=0.5))
    assert not seen.names


@pytest.mark.slow
def test_streaming_equals_one_shot(model):
    (turns, _), (paths, _) = conversations()
    for options in ({"max_new_tokens": 40}, {"temperature": 1.0, "top_p": 0.9, "seed": 4}):
        options = {"max_new_tokens": 40} | options
        pieces = list(model.stream(turns, paths, **options))
        assert len(pieces) > 1 and all(pieces)
        assert "".join(pieces) == model.chat(turns, paths, **options)
    warm = [model.chat(turns, paths, temperature=1.0, seed=s, max_new_tokens=16) for s in (1, 1, 2)]
    assert warm[0] == warm[1] != warm[2]


def test_pieces_hold_back_half_a_character_and_spaces():
    texts = [" a", " a ", " a \ufffd", " a \u00e9 b", " a \u00e9 b\ufffd "]
    pieces = list(pipeline.text_pieces(iter(texts)))
    assert pieces == ["a", " \u00e9 b", "\ufffd"]
    assert "".join(pieces) == texts[-1].strip()


@pytest.mark.slow
def test_decoding_stops_at_eos(model, monkeypatch):
    (_, turns), (_, paths) = conversations()  # its answer is eos at once
    calls, advance = [], programs.decode
    count = lambda *a, **k: calls.append(a[2]) or advance(*a, **k)  # noqa: E731
    monkeypatch.setattr(programs, "decode", count)
    assert list(model.stream(turns, paths, max_new_tokens=512)) == [] and len(calls) == 1
    prompts, _, _ = model._prompts(turns, paths, 512, 0.0, 1.0, 0)
    state, _ = advance(
        model.model,
        model.params,
        model._prefill(prompts, model.understanding_slots(paths), 512, 0),
        jnp.float32(0),
        jnp.float32(1),
        num_tokens=16,
        eos_id=model.text.eos_id,
    )
    assert state["generated"].tolist() == [1]  # inside the compiled chunk too


@pytest.mark.slow
def test_conversations_together_equal_alone(model, monkeypatch):
    many, paths = conversations()
    many, paths = [*many, "Who are you?"], [*paths, []]
    options = {"max_new_tokens": 20}
    together = model.chat(many, paths, **options)
    alone = [model.chat(c, p, **options) for c, p in zip(many, paths, strict=True)]
    assert together == alone and together[0] and together[2]
    monkeypatch.setattr(pipeline, "MAX_BATCH", 2)
    assert model.chat(many[::-1], paths[::-1], **options)[::-1] == together
    pictures = [Image.open(p) for p in paths[0]]
    assert model.chat(many[0], pictures, **options) == together[0]
    assert model.chat(many[0], pictures[0], **options) == together[0]  # one, not in a list


def test_a_first_system_turn_replaces_the_prompt(model, monkeypatch):
    seen = []
    original = chat_format.ChatFormat.conversation

    def conversation(self, *args, **kwargs):
        seen.append(original(self, *args, **kwargs))
        raise InterruptedError

    monkeypatch.setattr(chat_format.ChatFormat, "conversation", conversation)
    user = [{"role": "User", "content": "Hi <image_end>"}]
    for start in ([{"role": "System", "content": "Be brief."}], []):
        with pytest.raises(InterruptedError):
            model.chat([*start, *user])
    texts = [model.text.tokenizer.decode(x.ids.tolist(), skip_special_tokens=False) for x in seen]
    assert texts[0].endswith("Be brief.\n\nUser: Hi <image_end>\n\nAssistant:")
    assert "helpful language" not in texts[0] and chat_format.SYSTEM_PROMPT in texts[1]
    assert model.text.image_end_id not in seen[0].ids  # a tag in a text is text


@pytest.mark.slow
def test_a_mesh_changes_nothing(golden_folder, model):
    mesh = sharding.make_mesh(config.MeshConfig(data=2, fsdp=2, tensor=2))
    spread = janusflow_jax.load(golden_folder, dtype="float32", mesh=mesh)
    kernel = spread.params["llm"]["head"]["kernel"]
    assert kernel.addressable_shards[0].data.size == kernel.size // 4
    want = model.generate(PROMPTS, seed=7, **QUICK)
    got = spread.generate(PROMPTS, seed=7, **QUICK)
    close(got, want, 2e-5)
    close(spread.decode_latents(got, "numpy"), model.decode_latents(want, "numpy"), 1)
    many, paths = conversations()
    assert spread.chat(many, paths, max_new_tokens=16) == model.chat(many, paths, max_new_tokens=16)
    close(spread.encode_image(paths[1]), model.encode_image(paths[1]), 2e-5)


# --- what is refused, and how


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda m: m.generate([]), "no prompt"),
        (lambda m: m.generate(["a", " "], num_steps=0), "prompt 1 is empty.*num_steps"),
        (lambda m: m.generate("a", output="jpeg"), "output: expected one of"),
        (lambda m: m.generate("a", noise=np.zeros((2, 8, 8, 4))), r"\(1, 8, 8, 4\).*got \(2,"),
        (lambda m: m.generate(["a", "b"], seed=[1]), "expected one or 2"),
        (lambda m: m.generate("a", seed=-1), "seed: expected 0 to"),
        (lambda m: m.decode_latents(np.zeros((8, 8, 4))), "latents: expected shape"),
        (lambda m: m.encode_image([]), "at least one image"),
        (lambda m: m.encode_image(["no.png"]), "no.png: no such file"),
        (lambda m: m.generate(["a", "a b" * 20000]), "prompt 1: expected at most 16384 positions"),
        (lambda m: m.chat("a b" * 20000), "conversation 0: expected at most 16384 positions"),
        (lambda m: m.chat("a", max_new_tokens=10**9), "conversation 0: expected at most"),
        (lambda m: m.chat(["a"] * 20 + ["a b" * 20000]), "conversation 20: expected at most"),
        (lambda m: m.generate("a", guidance_scale=np.inf), "guidance_scale: expected a finite"),
        (lambda m: m.chat(["a", "b"], seed=2**32 - 1), "seed: expected 0 to"),
        (lambda m: m.chat("a", max_new_tokens=0, top_p=2.0), "max_new_tokens.*top_p"),
        (lambda m: m.chat("<image_placeholder>"), "0 images; got 1"),
        (lambda m: m.chat(["a", "b"], images=["x.png"]), "a list of images for each"),
        (lambda m: m.chat(["a", "b"], images=[[]]), "2 conversations and 1 lists"),
        (lambda m: m.chat([{"role": "Bot", "content": "a"}]), "turn 0: .*'Bot'"),
        (lambda m: m.stream(["a", "b"]), "use chat"),
    ],
)
def test_what_cannot_be_done_says_why(model, call, says):
    with pytest.raises(ValueError, match=says):
        call(model)


def test_a_folder_of_some_parts_does_what_they_can():
    autoencoder = janusflow_jax.load("starts/emoji_vae")
    with pytest.raises(CheckpointError, match=r"generating: .* lacks \['llm', 'gen_enc"):
        autoencoder.generate("a red apple")
    with pytest.raises(CheckpointError, match=r"generating: .* lacks \['llm'\]"):
        autoencoder.prompt_ids(["a red apple"])
    with pytest.raises(CheckpointError, match=r"scoring captions: .* lacks \['llm'\]"):
        autoencoder.caption_scores([np.zeros((8, 8, 3), np.uint8)], ["a red apple"])
    reader = janusflow_jax.load("starts/emoji_llm")
    with pytest.raises(CheckpointError, match=r"encoding images: .* lacks \['vae'\]"):
        reader.encode_image(np.zeros((8, 8, 3), np.uint8))
    with pytest.raises(ValueError, match="overflows in float16"):
        janusflow_jax.load("starts/emoji_llm", dtype="float16")
