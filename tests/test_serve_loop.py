"""The engine's loop on programs that compute nothing: every row and lane is free again after any
sequence of events, and nothing is mixed up."""

import contextlib
import dataclasses
import random
import threading
import time
import types

import numpy as np
import pytest
from helpers import runs

from janusflow_jax.config import SamplerConfig, parts
from janusflow_jax.config.errors import JanusFlowError
from janusflow_jax.data import chat_format
from janusflow_jax.serve import engine as engine_lib, jobs, replicas
from janusflow_jax.serve.requests import (
    ChatRequest,
    Draining,
    EngineSettings,
    Failed,
    Finished,
    ImageDone,
    ImageRequest,
    Queued,
    QueueFull,
    Text,
)

CFG = runs.tiny_config("").model
TEXT = chat_format.ChatFormat.load(runs.HUB, CFG.num_image_tokens)
MODEL = types.SimpleNamespace(
    cfg=CFG, text=TEXT, params=dict.fromkeys(parts.MODEL_PARTS, {}), vae={"decoder": {}}
)
BROKEN = 666
"""The seed of an image whose row becomes non-finite."""
WORD = TEXT.generation_ids("a", "plain")[-1]


class Programs:
    """A row holds (seed, steps it moved); the pixels of a row are those two numbers."""

    def __init__(self, settings, fail=lambda: False):
        self.row_counts = (2, 4, settings.rows)
        self.decode_tokens, self.prefill_tokens = 4, 64
        self.no_cells = np.zeros(CFG.latent_shape[:2], bool)
        self.lanes, self.fail, self.resets = settings.lanes, fail, 0
        self.step_seconds = 0.0

    context = staticmethod(contextlib.nullcontext)
    compilations = staticmethod(lambda: 0)
    read = staticmethod(lambda x: x)

    def warm_up(self):
        self.reset()
        return 0.001

    def reset(self):
        self.rows, self.texts, self.resets = {}, {}, getattr(self, "resets", 0) + 1

    def _maybe_fail(self):
        if self.fail():
            raise RuntimeError("RESOURCE_EXHAUSTED: out of memory")

    def prefix(self, ids):
        self._maybe_fail()
        return tuple(ids)

    def encode(self, pixels):
        return pixels

    def insert(self, prefix, rows, seed, start, keep, t):
        self.rows[rows[0]] = [seed, 0]

    def step(self, places, numbers):
        self._maybe_fail()
        time.sleep(self.step_seconds)
        rows = places[0].tolist()
        assert len(rows) in self.row_counts and len({*rows}) == len(rows)
        for i, row in enumerate(rows):
            if numbers[1, i] > 0:  # the row of an image's state
                self.rows[row][1] += 1
        return np.array([self.rows.get(row, [0])[0] != BROKEN for row in rows])

    def pixels(self, row, estimate=False):
        seed, steps = self.rows[row]
        return np.array([[[seed, steps, 0]]], np.uint8), True

    def slot(self, pixels):
        return "slot"

    def embed(self, ids, slots, starts):
        assert len(slots) == len(starts)
        return len(ids)

    def extend(self, x, lane, begin, length, seed):
        assert x == length and begin == (self.texts[lane][1] if begin else 0)
        self.texts[lane] = [seed, begin + self.prefill_tokens, 0]

    def decode(self, live, temperature, top_p):
        """The answer of seed s has s words."""
        self._maybe_fail()
        out = np.full((self.lanes, self.decode_tokens), TEXT.eos_id)
        for lane in np.flatnonzero(live):
            seed, _, said = self.texts[lane]
            self.texts[lane][2] += self.decode_tokens
            out[lane, : max(seed - said, 0)] = WORD
        return out


class Clock:
    """Seconds that a test decides."""

    now = 0.0

    def __call__(self):
        return self.now


def make(fail=lambda: False, clock=time.monotonic, **settings):
    settings = EngineSettings(rows=8, lanes=3, context=256, prompt_tokens=32, **settings)
    engine = engine_lib.Engine(MODEL, settings, programs=Programs(settings, fail), clock=clock)
    engine.warm_up()
    return engine


def image(name, seeds=(1,), client="a", steps=3, scale=2.0, **more):
    return ImageRequest(
        id=name,
        client=client,
        prompt="a fox",
        seeds=seeds,
        guidance_scale=scale,
        sampler=SamplerConfig(steps=steps),
        **more,
    )


def chat(name, words=5, max_tokens=20, client="a", **more):
    return ChatRequest(
        id=name,
        client=client,
        messages=[{"role": "user", "content": ["hello"]}],
        seed=words,
        max_tokens=max_tokens,
        **more,
    )


def finish(engine, turns=500):
    for _ in range(turns):
        if not engine.turn():
            return
    raise AssertionError(f"not finished after {turns} turns: {engine.status()}")


def random_request(draw, name, now):
    client, deadline = draw.choice("abc"), None
    if draw.random() < 0.1:
        deadline = now + draw.choice([-1.0, 2.0, 10.0])
    if draw.random() < 0.4:
        words, limit = draw.randrange(30), draw.randrange(1, 25)
        return chat(name, words, limit, client, deadline=deadline)
    seeds = tuple(draw.randrange(1, 200) for _ in range(draw.choice([1, 1, 1, 4, 10])))
    if draw.random() < 0.05:
        seeds = (*seeds, BROKEN)
    steps, scale = draw.randrange(1, 9), draw.choice([1.0, 2.0])
    previews = draw.randrange(0, steps + 1)
    return image(name, seeds, client, steps, scale, previews=previews, deadline=deadline)


def check_result(request, events):
    """One last event, nothing after it, and results of this request alone."""
    last = [i for i, e in enumerate(events) if isinstance(e, Finished | Failed)]
    assert last == [len(events) - 1], events
    end = events[-1]
    if isinstance(end, Failed):
        return end.code
    if isinstance(request, ImageRequest):
        done = {e.index: e for e in events if isinstance(e, ImageDone)}
        assert sorted(done) == [*range(len(request.seeds))]
        for i, seed in enumerate(request.seeds):
            assert done[i].seed == seed
            assert done[i].image[0, 0].tolist() == [seed, request.sampler.steps, 0]
        return "done"
    words = min(request.seed, request.max_tokens)
    want = TEXT.decode([WORD] * words).strip()
    assert "".join(e.piece for e in events if isinstance(e, Text)) == want
    assert end.reason == ("stop" if request.seed < request.max_tokens else "length")
    assert end.completion_tokens == min(request.seed + 1, request.max_tokens)
    return end.reason


@pytest.mark.parametrize("seed", [0, pytest.param(1, marks=pytest.mark.slow)])
def test_any_sequence_leaves_every_row_and_lane_free(seed, monkeypatch):
    draw = random.Random(seed)
    monkeypatch.setattr(engine_lib, "MAX_RESETS", 10**9)
    clock = Clock()
    engine = make(fail=lambda: draw.random() < 0.003, clock=clock, queue=24)
    requests, events = {}, {}
    for turn in range(600):
        clock.now += 1.0
        for _ in range(draw.choice([0, 0, 0, 1, 1, 4]) if turn % 100 < 75 else 0):
            request = random_request(draw, f"{turn}-{len(requests)}", clock.now)
            heard = []
            with contextlib.suppress(QueueFull):
                engine.submit(request, heard.append)
                requests[request.id], events[request.id] = request, heard
        if requests and draw.random() < 0.1:
            engine.cancel(draw.choice([*requests]))
        engine.turn()
        running = {id(x) for x in engine._rows if x is not None}
        held = [x for job in engine._jobs.values() for x in getattr(job, "running", [])]
        assert running == {id(x) for x in held}
        lanes = [x for x in engine._lanes if x is not None]
        assert all(job.request.id in engine._jobs for job in lanes)
    finish(engine)
    codes = {check_result(requests[n], events[n]) for n in requests}
    expected = {"done", "stop", "length", "cancelled", "deadline", "engine_reset", "not_finite"}
    assert codes == expected
    status = engine.status()
    assert status.rows_used == status.lanes_used == status.waiting_images == 0
    assert not engine._jobs and not engine._pending


def test_nothing_overtakes_for_ever():
    """A guided image needs two rows; images of one row keep arriving."""
    clock = Clock()
    engine, heard = make(clock=clock, queue=16), []
    for n in range(100):
        if n == 3:
            engine.submit(image("guided", (1,) * 4, "big", steps=20), heard.append)
        for k in range(4):  # more than 8 rows can serve in the 3 turns of each
            with contextlib.suppress(QueueFull):
                small = image(f"{n}-{k}", (2,), f"c{n}-{k}", scale=1.0)
                engine.submit(small, lambda event: None)
        engine.turn()
        clock.now += 1.0
    assert isinstance(heard[-1], Finished)


def test_a_failing_program_ends_what_runs_only(monkeypatch):
    fails = [False]
    engine, running, waiting = make(fail=lambda: fails[0]), [], []
    engine.submit(image("running", (1, 2, 3, 4), steps=5), running.append)
    engine.turn()
    engine.submit(image("waiting", (5,), steps=5), waiting.append)
    fails[0] = True
    engine.turn()
    fails[0] = False
    finish(engine)
    assert running[-1].code == "engine_reset" and isinstance(waiting[-1], Finished)
    assert engine.status().counters["engine_resets"] == 1


def test_an_engine_that_keeps_failing_ends():
    engine, heard = make(fail=lambda: True), []
    engine.start()
    for n in range(engine_lib.MAX_RESETS):
        heard.append([])
        with contextlib.suppress(Draining):
            engine.submit(image(f"{n}"), heard[-1].append)
        wait_for(lambda: not engine._jobs)
    engine._thread.join(5)
    status = engine.status()
    assert not status.alive and "out of memory" in status.error
    assert all(events[-1].code == "engine_reset" for events in heard)
    with pytest.raises(Draining, match="out of memory"):
        engine.submit(image("late"), heard[-1].append)


def wait_for(condition, seconds=5.0):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.002)


def test_threads_drain_and_close():
    engine, events = make(), [[] for _ in range(8)]
    assert not engine.status().alive
    engine.start()
    wait_for(lambda: engine.status().ready)
    threads = [
        threading.Thread(target=engine.submit, args=(image(f"{i}", (i + 1,)), heard.append))
        for i, heard in enumerate(events)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert engine.drain(10.0)
    assert all(isinstance(heard[-1], Finished) for heard in events)
    assert not engine._thread.is_alive() and not engine.status().ready
    with pytest.raises(Draining):
        engine.submit(image("late"), events[0].append)


def test_drain_ends_what_takes_too_long():
    engine, heard = make(), []
    engine._programs.step_seconds = 0.02
    engine.start()
    engine.submit(image("long", steps=100), heard.append)
    assert not engine.drain(0.1)
    assert heard[-1].code == "draining"


def test_the_watchdog_sees_a_program_that_hangs():
    engine, release = make(watchdog=0.05), threading.Event()
    engine._programs.encode = lambda pixels: release.wait(5)
    engine.start()
    wait_for(lambda: engine.status().ready)
    # An idle engine beats more seldom than this watchdog allows, but a busy one does not.
    engine.submit(image("hangs"), lambda event: None)
    time.sleep(0.2)
    assert not engine.status().alive
    release.set()
    wait_for(lambda: engine.status().alive)
    engine.close()


def test_the_queue_is_limited_for_all_and_for_each():
    engine = make(queue=12, queue_per_client=5)
    ignore = lambda event: None  # noqa: E731
    engine.submit(image("a", (1,) * 5), ignore)
    with pytest.raises(QueueFull, match="of this client; got 5 and 1 more") as refused:
        engine.submit(chat("b"), ignore)
    assert 1 <= refused.value.retry_after <= 60
    engine.submit(image("c", (1,) * 5, "second"), ignore)
    with pytest.raises(QueueFull, match="at most 12 waiting"):
        engine.submit(image("d", (1,) * 3, "third"), ignore)
    finish(engine)


def test_waiting_requests_hear_their_position():
    engine, heard = make(), []
    engine.submit(image("a", (1,) * 6, steps=2), lambda event: None)
    engine.submit(image("b", steps=30), heard.append)
    finish(engine)
    assert [e.position for e in heard if isinstance(e, Queued)] == [2]


def test_a_listener_that_raises_loses_its_own_request():
    engine, heard = make(), []

    def listen(event):
        heard.append(event)
        raise ConnectionError

    engine.submit(image("a", (1, 2, 3), steps=3, previews=2), listen)
    finish(engine)
    assert heard[-1].code == "cancelled"


def test_stop_strings_end_an_answer():
    engine, heard = make(), []
    answer = TEXT.decode([WORD] * 20).strip()
    stop = answer[3:6]
    engine.submit(chat("a", words=20, max_tokens=30, stop=(stop,)), heard.append)
    finish(engine)
    text = "".join(e.piece for e in heard if isinstance(e, Text))
    assert text == answer[: answer.index(stop)].rstrip() and heard[-1].reason == "stop"


def test_without_guidance_its_interval_changes_no_step():
    """As of `Pipeline.generate`: order 2 does not begin again where guidance would."""
    cut = SamplerConfig(steps=6, order=2, guide_from=0.2, guide_until=0.7)
    limits = make().limits
    plain, both = (
        jobs.prepare(
            dataclasses.replace(image("x", scale=1.0), sampler=sampler), MODEL, limits
        ).lengths
        for sampler in (SamplerConfig(steps=6, order=2), cut)
    )
    np.testing.assert_array_equal(both, plain)
    guided = dataclasses.replace(image("x", scale=2.0), sampler=cut)
    assert (jobs.prepare(guided, MODEL, limits).lengths != plain).any()


@pytest.mark.parametrize(
    ("request_", "message"),
    [
        (image("x", seeds=(2**32,)), "seed: expected 0 to"),
        (image("x", steps=0), "num_steps: expected"),
        (image("x", previews=9), "previews: expected 0 to 3; got 9"),
        (image("x", strength=0.5), "expected an image with them"),
        (image("x", image=np.zeros((3, 3, 3), np.uint8)), r"image: expected uint8\[64, 64, 3\]"),
        (chat("x", temperature=-1.0), "temperature: expected"),
        (chat("x", stop=("",)), "stop: expected texts"),
        (chat("x", max_tokens=0), "max_new_tokens: expected"),
    ],
)
def test_requests_are_checked(request_, message):
    with pytest.raises(JanusFlowError, match=message):
        make().submit(request_, print)


def test_prompts_have_limits():
    engine = make()
    long = "a red fox and " * 40
    with pytest.raises(JanusFlowError, match="prompt: expected at most 32 tokens"):
        engine.submit(ImageRequest(id="x", client="a", prompt=long, seeds=(1,)), print)
    turns = [{"role": "user", "content": [long * 3]}]
    with pytest.raises(JanusFlowError, match="chat: expected at most 255 positions"):
        engine.submit(ChatRequest(id="x", client="a", messages=turns), print)


def test_replicas_share_the_work():
    ours, events = replicas.Replicas([make(queue=4), make(queue=4)]), [[] for _ in range(8)]
    for i, heard in enumerate(events):
        ours.submit(image(f"{i}", (i + 1,)), heard.append)
    with pytest.raises(QueueFull):
        ours.submit(image("more", (1,) * 2), print)
    assert [len(engine._jobs) for engine in ours._engines] == [4, 4]
    assert ours.status().waiting_images == 8
    ours.cancel("0")
    ours.start()
    assert ours.drain(10.0)
    assert [type(heard[-1]) for heard in events] == [Failed, *[Finished] * 7]
    assert ours.status().counters["images"] == 7
