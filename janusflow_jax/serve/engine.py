"""One engine a device: images and conversations of many requests together, step by step.

A thread takes turns. In a turn every running image moves by one step of the solver, one piece of a
waiting prompt is computed, and every conversation gets a few tokens. Requests therefore begin and
end at any turn, whatever their settings, and none waits until a batch is complete. Results are read
one turn late, while the device computes the next, so that it never waits for Python.
"""

from __future__ import annotations

import bisect
import collections
import dataclasses
import functools
import itertools
import logging
import math
import threading
import time
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np

from janusflow_jax.config.errors import JanusFlowError
from janusflow_jax.serve import jobs, programs as programs_lib
from janusflow_jax.serve.jobs import ChatJob, Image, ImageJob, Job
from janusflow_jax.serve.order import Order
from janusflow_jax.serve.requests import (
    Draining,
    EngineSettings,
    EngineStatus,
    Event,
    Failed,
    Finished,
    Histogram,
    ImageDone,
    OnEvent,
    Preview,
    Queued,
    QueueFull,
    Request,
    Text,
)

MAX_RESETS, RESET_SECONDS = 3, 600.0
"""An engine that was reset so often in this time ends."""
IDLE_SECONDS = 0.5
BOUNDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 25.0, 50.0, 100.0, 250.0)
HISTOGRAMS = ("queue", "image", "first_token", "between_tokens", "turn")

log = logging.getLogger(__name__)


class Engine:
    """Serves one model on one device.

    `start` it, `submit` requests from any thread, and `close` it. Without `start` a caller takes
    the turns itself, by `turn`; tests do.

    Args:
      model: a `Pipeline` without a mesh.
      device: of `jax.local_devices()`; None: the first.
      programs: None: the compiled ones of the model.
      clock: seconds, of deadlines too.
    """

    def __init__(
        self,
        model: Any,
        settings: EngineSettings,
        *,
        device: Any = None,
        programs: Any = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        context = settings.context or programs_lib.default_context(model)
        settings = dataclasses.replace(settings, context=context)
        self.settings, self._clock = settings, clock
        self.limits = programs_lib.limits(model, settings)
        self._model = model
        self._programs = programs or programs_lib.Programs(model, settings, device)
        self._rows: list[Image | None] = [None] * settings.rows
        self._lanes: list[ChatJob | None] = [None] * settings.lanes
        self._image_order, self._chat_order = Order(), Order()
        self._pending: list[Callable[[], None]] = []  # what reads the results of the last turn
        self._last_turn: tuple[float, int, int] | None = None  # its time, rows and tokens
        self._resets: list[float] = []
        self._histograms = {name: _Values() for name in HISTOGRAMS}
        self._counters: collections.Counter[str] = collections.Counter()
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        # Below: shared between threads, under the lock.
        self._lock = threading.Condition()
        self._jobs: dict[str, Job] = {}  # unfinished, in order of arrival
        self._draining = self._stopped = self._warm = False
        self._error, self._beat = "", self._clock()

    # --- for any thread

    def start(self) -> None:
        """Starts the thread, which compiles and then serves. Requests may come before that."""
        self._thread.start()

    def submit(self, request: Request, on_event: OnEvent) -> None:
        """Takes a request.

        Raises:
          JanusFlowError: it cannot be served, as it is or by this model.
          QueueFull: too much is waiting.
          Draining: the engine is ending, or has failed.
        """
        job = jobs.prepare(request, self._model, self.limits)
        job.on_event, job.since = on_event, self._clock()
        with self._lock:
            if self._draining or self._stopped or self._error:
                raise Draining(self._error or "the server is shutting down: try another")
            if request.id in self._jobs:
                raise JanusFlowError(f"id: expected a new one; got {request.id!r} again")
            self._check_room(job)
            self._jobs[request.id] = job
            self._lock.notify_all()

    def _check_room(self, job: Job) -> None:
        waiting = [x for x in self._jobs.values() if x.waiting]
        own = [x for x in waiting if x.client == job.client]
        for some, limit, whose in (
            (waiting, self.settings.queue, ""),
            (own, self.settings.queue_per_client, " of this client"),
        ):
            count = sum(x.waiting for x in some)
            if some and count + job.waiting > limit:
                raise QueueFull(
                    f"queue: expected at most {limit} waiting images and chats{whose}; got {count} "
                    f"and {job.waiting} more: try again later",
                    min(max(self._seconds(some) / 2, 1.0), 60.0),
                )

    def _seconds(self, some: Iterable[Job]) -> float:
        """How long images take, and how long chats, one after the other; added up."""
        orders = (ImageJob, self._image_order), (ChatJob, self._chat_order)
        return sum(
            (x.work() / order.speed for kind, order in orders for x in some if isinstance(x, kind)),
            0.0,
        )

    def seconds_left(self) -> float:
        """Of everything that runs or waits."""
        with self._lock:
            return self._seconds(self._jobs.values())

    def cancel(self, id: str) -> None:
        """Ends a request as soon as possible, with Failed("cancelled"). Unknown ids are ignored."""
        with self._lock:
            if job := self._jobs.get(id):
                job.cancelled = True
                self._lock.notify_all()

    def drain(self, seconds: float) -> bool:
        """Takes no more requests, and waits until all are finished; after so many seconds it ends
        the others with Failed("draining"). Returns whether none had to be."""
        with self._lock:
            self._draining = True
            self._lock.notify_all()
            finished = self._lock.wait_for(lambda: not self._jobs, seconds)
        self.close()
        return finished

    def close(self) -> None:
        """Ends all requests, and the thread."""
        with self._lock:
            self._draining = self._stopped = True
            self._lock.notify_all()
        if self._thread.ident:
            self._thread.join(timeout=5)  # it may hang in a program

    def status(self) -> EngineStatus:
        now = self._clock()
        with self._lock:
            unfinished = list(self._jobs.values())
            beats = now - self._beat < self.settings.watchdog
            return EngineStatus(
                ready=self._warm and not (self._draining or self._stopped or self._error),
                # Compilation may take longer than the watchdog.
                alive=self._thread.is_alive() and not self._error and (beats or not self._warm),
                draining=self._draining,
                rows=len(self._rows),
                rows_used=sum(x is not None for x in self._rows),
                lanes=len(self._lanes),
                lanes_used=sum(x is not None for x in self._lanes),
                waiting_images=sum(x.waiting for x in unfinished if isinstance(x, ImageJob)),
                waiting_chats=sum(x.waiting for x in unfinished if isinstance(x, ChatJob)),
                running_images=sum(len(x.running) for x in unfinished if isinstance(x, ImageJob)),
                running_chats=sum(x is not None for x in self._lanes),
                counters=dict(self._counters, compilations=self._programs.compilations()),
                histograms={n: x.histogram() for n, x in self._histograms.items()},
                error=self._error,
            )

    # --- the engine's thread

    def _run(self) -> None:
        try:
            with self._programs.context():
                self.warm_up()
                while not self._stopped:
                    self._beat = self._clock()
                    if not self.turn():
                        with self._lock:
                            self._lock.wait_for(lambda: self._jobs or self._stopped, IDLE_SECONDS)
        except Exception as error:
            log.exception("the engine failed")
            with self._lock:  # from here on `submit` refuses
                self._error = f"{type(error).__name__}: {error}"
        code = "engine_reset" if self._error else "draining"
        for job in self._unfinished():
            self._end(job, Failed(code, "the server is shutting down"))

    def _unfinished(self) -> list[Job]:
        with self._lock:
            return list(self._jobs.values())

    def warm_up(self) -> None:
        """Compiles the programs and measures their speed."""
        seconds = self._programs.warm_up()
        if seconds:
            self._image_order.speed = len(self._rows) / seconds
            self._chat_order.speed = len(self._lanes) * self._programs.decode_tokens / seconds
        self._warm = True

    def turn(self) -> bool:
        """One turn; whether there was anything to do. A program that fails ends what is running."""
        start = self._clock()
        try:
            previous, self._pending = self._pending, []
            unfinished = self._unfinished()
            self._drop(unfinished, start)
            images = [x for x in unfinished if isinstance(x, ImageJob) and not x.ended]
            chats = [x for x in unfinished if isinstance(x, ChatJob) and not x.ended]
            self._begin_images(images, start)
            self._begin_chats(chats, start)
            rows = self._step()
            self._prefill(chats)
            tokens = self._decode(chats)
            for read in previous:
                read()
        except Exception as error:
            self._reset(error)
            return True
        self._measure(start, rows, tokens)
        return bool(self._pending or previous or unfinished)

    def _drop(self, unfinished: Iterable[Job], now: float) -> None:
        for job in unfinished:
            deadline = job.request.deadline
            if job.cancelled:
                self._end(job, Failed("cancelled", "cancelled by the client"))
            elif deadline is not None and now >= deadline:
                self._end(job, Failed("deadline", "not finished before its deadline"))

    # images

    def _begin_images(self, images: list[ImageJob], now: float) -> None:
        """Gives rows to waiting images. Nothing overtakes the first in the order."""
        while waiting := [x for x in images if x.waiting]:
            job = self._image_order.sorted(waiting, now)[0]
            free = [row for row, image in enumerate(self._rows) if image is None]
            if len(free) < job.branches:
                break
            self._begin_image(job, (free[0], free[job.branches - 1]), now)
        self._report_positions(self._image_order.sorted([x for x in images if x.waiting], now))

    def _begin_image(self, job: ImageJob, rows: tuple[int, int], now: float) -> None:
        request = job.request
        image = Image(job=job, index=job.begun, rows=rows, step=job.first)
        # Before any program runs: one that fails must end the request that it ran for.
        job.begun += 1
        job.running.append(image)
        for row in rows:
            self._rows[row] = image
        self._image_order.begun(job.client, job.image_work(), now)
        if image.index == 0:
            self._histograms["queue"].add(now - job.since)
            job.prefix = self._programs.prefix(job.ids)
            job.start = self._programs.encode(request.image)
        seed, t = request.seeds[image.index], float(job.times[job.first])
        keep = self._programs.no_cells if job.keep is None else job.keep
        self._programs.insert(job.prefix, rows, seed, job.start, keep, t)
        if not job.waiting:
            job.prefix = job.start = None
        if image.step == job.steps:  # strength 0
            self._finish_image(image)

    def _step(self) -> int:
        """Moves every running image by a step. Returns the number of rows."""
        running = sorted({i.rows[0]: i for i in self._rows if i is not None}.items())
        images = [image for _, image in running]
        used = sorted({row for image in images for row in image.rows})
        if not used:
            return 0
        count = next(n for n in self._programs.row_counts if n >= len(used))
        idle = [row for row, image in enumerate(self._rows) if image is None]
        rows = [*used, *idle[: count - len(used)]]
        places, numbers = np.zeros((5, count), np.int32), np.zeros((5, count), np.float32)
        places[:3] = rows, range(count), range(count)
        for image in images:
            job, k = image.job, image.step
            cond, uncond = (rows.index(row) for row in image.rows)
            # NOTE: both branches are at the prompt's full length; the second sees its head alone.
            places[1:, uncond] = cond, uncond, self._model.text.head, len(job.ids)
            places[1:, cond] = cond, uncond, len(job.ids), len(job.ids)
            numbers[0, uncond] = job.times[k]
            numbers[:, cond] = job.times[k], *job.lengths[:, k], job.scales[k], job.times[k + 1]
        finite = self._programs.step(places, numbers)
        firsts = [rows.index(image.rows[0]) for image in images]
        self._later(self._check_rows, images, firsts, finite)
        self._counters["row_steps"] += len(used)
        for image in images:
            image.step += 1
            if image.step == image.job.steps:
                self._finish_image(image)
            elif image.step in image.job.preview_steps():
                pixels = self._programs.pixels(image.rows[0], estimate=True)
                self._later(self._preview, image, image.step, pixels)
        return len(used)

    def _finish_image(self, image: Image) -> None:
        pixels = self._programs.pixels(image.rows[0])
        self._later(self._image_done, image, pixels)
        self._release(image)

    def _release(self, image: Image) -> None:
        image.job.running.remove(image)
        for row in image.rows:
            self._rows[row] = None

    def _check_rows(self, images: list[Image], places: list[int], finite: Any) -> None:
        finite = self._programs.read(finite)
        for image, place in zip(images, places, strict=True):
            if not finite[place]:
                self._not_finite(image.job, f"image {image.index}")

    def _preview(self, image: Image, step: int, pixels: Any) -> None:
        pixels, finite = self._programs.read(pixels)
        if finite and not image.job.ended:
            self._counters["previews"] += 1
            self._emit(image.job, Preview(image.index, step, _pasted(image.job, pixels)))

    def _image_done(self, image: Image, pixels: Any) -> None:
        job = image.job
        pixels, finite = self._programs.read(pixels)
        if job.ended:
            return
        if not finite:
            self._not_finite(job, f"image {image.index}")
            return
        job.done += 1
        self._counters["images"] += 1
        self._histograms["image"].add(self._clock() - job.since)
        seed = job.request.seeds[image.index]
        self._emit(job, ImageDone(image.index, seed, _pasted(job, pixels)))
        if job.done == len(job.request.seeds):
            size = self._model.cfg.num_image_tokens
            self._end(job, Finished("done", len(job.ids), job.done * size))

    # conversations

    def _begin_chats(self, chats: list[ChatJob], now: float) -> None:
        waiting = self._chat_order.sorted([x for x in chats if x.waiting], now)
        for lane, chat in enumerate(self._lanes):
            if chat is None and waiting:
                job, *_ = waiting
                job.lane, self._lanes[lane] = lane, job
                self._histograms["queue"].add(now - job.since)
                self._chat_order.begun(job.client, job.work(), now)
                waiting = self._chat_order.sorted(waiting[1:], now)
        self._report_positions(waiting)

    def _prefill(self, chats: list[ChatJob]) -> None:
        """One image or one chunk of one prompt, so that nothing else waits for long."""
        ids = lambda x: len(x.ids)  # noqa: E731
        job = next((x for x in chats if x.lane is not None and x.prefilled < ids(x)), None)
        if job is None:
            return
        if len(job.slots) < len(job.pixels):
            job.slots.append(self._programs.slot(job.pixels[len(job.slots)]))
            return
        if job.embedded is None:
            job.embedded = self._programs.embed(job.ids, job.slots, job.slot_starts)
        assert job.lane is not None
        position = job.lane, job.prefilled, len(job.ids)
        self._programs.extend(job.embedded, *position, job.request.seed)
        job.prefilled += self._programs.prefill_tokens
        if job.prefilled >= len(job.ids):
            job.embedded, job.slots = None, []
            self._counters["prompt_tokens"] += len(job.ids)

    def _decode(self, chats: list[ChatJob]) -> int:
        """The next tokens of every conversation. Returns their number."""
        live = [
            x
            for x in chats
            if x.lane is not None and x.prefilled >= len(x.ids) and x.asked < x.max_tokens
        ]
        if not live:
            return 0
        lanes = np.zeros((3, len(self._lanes)))
        lanes[2] = 1.0
        for job in live:
            lanes[:, job.lane] = 1, job.request.temperature, job.request.top_p
            job.asked += self._programs.decode_tokens
        tokens = self._programs.decode(*lanes)
        self._later(self._read_tokens, live, tokens)
        return len(live) * self._programs.decode_tokens

    def _read_tokens(self, live: list[ChatJob], tokens: Any) -> None:
        tokens = self._programs.read(tokens)
        for job in live:
            if job.ended:
                continue
            new = tokens[job.lane].tolist()
            if programs_lib.NON_FINITE in new:
                self._not_finite(job, "the answer")
                continue
            before = len(job.tokens)
            piece, reason = job.grow(new, self._model.text)
            self._measure_tokens(job, len(job.tokens) - before, first=not before)
            if piece:
                self._emit(job, Text(piece))
            if reason:
                self._counters["chats"] += 1
                self._end(job, Finished(reason, len(job.ids), len(job.tokens)))

    # every job

    def _later(self, read: Callable[..., None], *args: Any) -> None:
        self._pending.append(functools.partial(read, *args))

    def _emit(self, job: Job, event: Event) -> None:
        try:
            job.on_event(event)
        except Exception:
            log.exception("a listener failed: its request is cancelled")
            job.cancelled = True

    def _end(self, job: Job, event: Finished | Failed) -> None:
        """Frees what a job holds, and sends its last event."""
        if job.ended:
            return
        job.ended = True
        if isinstance(job, ImageJob):
            for image in list(job.running):
                self._release(image)
            job.prefix = job.start = None
        elif isinstance(job, ChatJob):
            if job.lane is not None:
                self._lanes[job.lane] = None
            job.embedded, job.slots = None, []
        if isinstance(event, Failed):
            self._counters[f"failed_{event.code}"] += 1
        self._emit(job, event)
        with self._lock:
            del self._jobs[job.request.id]
            self._lock.notify_all()

    def _not_finite(self, job: Job, what: str) -> None:
        if not job.ended:
            advice = "use a lower guidance scale" if isinstance(job, ImageJob) else "ask otherwise"
            self._end(job, Failed("not_finite", f"{what}: NaN or infinity: {advice}"))

    def _report_positions(self, waiting: Iterable[Job]) -> None:
        ahead = 0
        for job in waiting:
            if ahead != job.position and not (isinstance(job, ImageJob) and job.begun):
                job.position = ahead
                self._emit(job, Queued(ahead))
            ahead += job.waiting

    def _reset(self, error: Exception) -> None:
        """After a failed program: its arrays are lost, so everything that runs ends; what waits
        stays. Raises the error if that happens often."""
        log.error("the engine is reset", exc_info=error)
        now = self._clock()
        self._counters["engine_resets"] += 1
        self._resets = [x for x in self._resets if now - x < RESET_SECONDS] + [now]
        self._pending, self._last_turn = [], None
        for job in self._unfinished():
            if (job.begun > 0) if isinstance(job, ImageJob) else not job.waiting:
                self._end(job, Failed("engine_reset", "the engine failed and was reset: try again"))
        if len(self._resets) >= MAX_RESETS:
            raise error
        self._programs.reset()

    # measurements

    def _measure(self, start: float, rows: int, tokens: int) -> None:
        """Speeds, by the time from one turn with work to the next: the device is a turn behind."""
        if self._last_turn is not None:
            before, last_rows, last_tokens = self._last_turn
            self._histograms["turn"].add(start - before)
            self._image_order.measured(last_rows, start - before)
            self._chat_order.measured(last_tokens, start - before)
        self._last_turn = (start, rows, tokens) if rows or tokens else None

    def _measure_tokens(self, job: ChatJob, count: int, first: bool) -> None:
        now = self._clock()
        self._counters["completion_tokens"] += count
        if first:
            self._histograms["first_token"].add(now - job.since)
        elif count:
            self._histograms["between_tokens"].add((now - job.last_piece) / count, count)
        job.last_piece = now


def _pasted(job: ImageJob, pixels: np.ndarray) -> np.ndarray:
    """With a mask: the pixels that stay are those of the request's image."""
    if job.request.mask is None or job.request.image is None:
        return pixels
    return np.where(job.request.mask[..., None], pixels, job.request.image)


class _Values:
    """A histogram of seconds that grows."""

    def __init__(self) -> None:
        self._counts, self._total = [0] * (len(BOUNDS) + 1), 0.0

    def add(self, seconds: float, times: int = 1) -> None:
        self._counts[bisect.bisect_left(BOUNDS, seconds)] += times
        self._total += seconds * times

    def histogram(self) -> Histogram:
        counts = tuple(itertools.accumulate(self._counts))
        return Histogram((*BOUNDS, math.inf), counts, self._total)
