"""The engine on the golden model: the same bits whatever runs beside a request."""

import random

import jax
import numpy as np
import pytest
from helpers import golden

from janusflow_jax.config import SamplerConfig
from janusflow_jax.serve import engine as engine_lib
from janusflow_jax.serve.requests import (
    ChatRequest,
    EngineSettings,
    Finished,
    ImageDone,
    ImageRequest,
    Preview,
    Text,
)

PROMPTS = ["a red fox", "Two yellow taxis in the snow beside a quiet river", "a tree", "a frog"]
SETTINGS = EngineSettings(rows=8, lanes=2, context=320, prompt_tokens=32, invariant=True)


class Compilations:
    """Names of what JAX compiles inside a `with`."""

    def __enter__(self):
        self.names = []
        jax.monitoring.register_event_duration_secs_listener(self._heard)
        return self

    def __exit__(self, *_):
        jax.monitoring.unregister_event_duration_listener(self._heard)

    def _heard(self, event, duration, **said):
        if event.endswith("jaxpr_to_mlir_module_duration"):
            self.names.append(said.get("fun_name", event))


@pytest.fixture(scope="module")
def engine(golden_model):
    out = engine_lib.Engine(golden_model, SETTINGS)
    with out._programs.context():
        out.warm_up()
    return out


def serve(engine, requests, arrivals=None):
    """The events of each request; the k-th arrives before turn arrivals[k]."""
    events = {request.id: [] for request in requests}
    waiting = sorted(zip(arrivals or [0] * len(requests), range(len(requests)), strict=True))
    turn = 0
    with engine._programs.context():
        while waiting or engine._jobs or engine._pending:
            while waiting and waiting[0][0] <= turn:
                request = requests[waiting.pop(0)[1]]
                engine.submit(request, events[request.id].append)
            engine.turn()
            turn += 1
            assert turn < 2000
    return [events[request.id] for request in requests]


def images(count=12):
    return [
        ImageRequest(
            id=f"image{i}",
            client=f"client{i % 3}",
            prompt=PROMPTS[i % 4],
            seeds=(7 + i, 100 + i)[: 1 + (i % 5 == 0)],
            guidance_scale=(2.0, 1.0, 5.0)[i % 3],
            sampler=SamplerConfig(steps=(6, 9, 4, 12)[i % 4]),
            previews=2,
        )
        for i in range(count)
    ]


def chats(temperature=0.0):
    cases = golden.facts("expected")["chat"]
    out = []
    for i, case in enumerate(cases):
        from janusflow_jax.data import images as images_lib
        pixels = tuple(images_lib.read(golden.TINY / "images" / n) for n in case["images"])
        turns = [
            {"role": t["role"], "content": t["content"].split("<image_placeholder>")}
            for t in case["conversation"]
        ]
        out.append(ChatRequest(id=f"chat{i}", client="c", messages=turns, images=pixels, max_tokens=24, temperature=temperature, top_p=0.9, seed=5 + i))
    return out


def pictures(events):
    return [(e.index, e.image) for e in events if isinstance(e, (ImageDone, Preview))]


def test_first(engine, golden_model):
    req = images()
    rng = random.Random(0)
    mixed = serve(engine, req, [rng.randrange(20) for _ in req])
    alone = [serve(engine, [r])[0] for r in req]
    for r, a, b in zip(req, mixed, alone):
        assert isinstance(a[-1], Finished), a[-1]
        pa, pb = sorted(pictures(a), key=lambda x: x[0]), sorted(pictures(b), key=lambda x: x[0])
        assert len(pa) == 3 * len(r.seeds)
        for x, y in zip(pa, pb, strict=True):
            np.testing.assert_array_equal(x[1], y[1])
        want = golden_model.generate([r.prompt] * len(r.seeds), seed=list(r.seeds), num_steps=r.sampler.steps, guidance_scale=r.guidance_scale, output="numpy")
        got = {e.index: e.image for e in a if isinstance(e, ImageDone)}
        print(np.abs(want.astype(int) - np.stack([got[i] for i in range(len(got))])).max())


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_second(engine, golden_model, temperature):
    req = chats(temperature)
    got = serve(engine, req, [0, 1, 2][:len(req)])
    cases = golden.facts("expected")["chat"]
    for i, (r, e) in enumerate(zip(req, got)):
        text = "".join(x.piece for x in e if isinstance(x, Text))
        want = golden_model.chat(cases[i]["conversation"], [str(golden.TINY / "images" / n) for n in cases[i]["images"]], max_new_tokens=24, temperature=temperature, top_p=.9, seed=5+i)
        print(repr(text), repr(want), e[-1])
        assert text == want
