"""The compiled programs of an engine and the arrays that they update, on one device.

Every shape is fixed, so nothing compiles after `warm_up`: an image's row is written by `insert` and
moved by `step`, whatever runs in the other rows; a conversation's lane is written by `extend`, a
chunk of its prompt at a time, and continued by `decode`. All methods return before the device has
finished; `read` waits for a result.

The row of an image is a branch: a guided image has two, and its state is in the first of them.
"""

from __future__ import annotations

import functools
import math
import time
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Float, Int, UInt8

from janusflow_jax import pipeline
from janusflow_jax.config import UNDERSTAND, ModelConfig, parts
from janusflow_jax.models import janusflow, llama
from janusflow_jax.parallel import numerics
from janusflow_jax.sampling import flow, image, inputs, programs, text
from janusflow_jax.serve.limits import MAX_IMAGES
from janusflow_jax.serve.requests import EngineLimits, EngineSettings

DECODE_TOKENS = 8
PREFILL_TOKENS = 256
"""Positions of a prompt that one call of `extend` computes, at most."""
NON_FINITE = -1
TEXT_POSITIONS, MAX_CONTEXT = 1024, 4096

State = dict[str, Array]

_compilations = [0]


def _count_compilation(event: str, duration_secs: float, **_: Any) -> None:
    _compilations[0] += event.endswith("jaxpr_to_mlir_module_duration")


jax.monitoring.register_event_duration_secs_listener(_count_compilation)


# --- images


@functools.partial(jax.jit, static_argnums=0)
def image_prefix(
    model: janusflow.JanusFlow, params: Any, tokens: Int[Array, "1 P"], lengths: Int[Array, "1"]
) -> Any:
    return image.prefill(model, params, tokens, lengths)


@functools.partial(jax.jit, donate_argnums=(0, 1))
def insert_image(
    cache: Any,
    state: State,
    prefix: Any,
    rows: Int[Array, "2"],
    seed: Array,
    x: Float[Array, "1 h w C"],
    keep: Bool[Array, "h w"],
    t: Float[Array, ""],
) -> tuple[Any, State]:
    """Puts an image into its rows, the first of which holds its state; both are equal if it has
    one.

    Args:
      prefix: of its prompt.
      x: latents of the image that it starts from at time t; anything if t is 0.
      keep: cells that stay on the path from the noise to x.
    """
    x = x[0]
    noise = programs.draw_noise(seed[None], x.shape)[0]
    new = {"x": x, "noise": noise, "keep": keep, "z": flow.interpolate(x, noise, t)}
    new |= {"velocity": jnp.zeros_like(x), "clean": x}
    cache = jax.tree.map(lambda c, p: c.at[rows].set(jnp.concatenate([p, p])), cache, prefix)
    return cache, {n: state[n].at[rows[0]].set(new[n]) for n in state}


@functools.partial(jax.jit, static_argnums=0, donate_argnums=3)
def step_images(
    model: janusflow.JanusFlow,
    params: Any,
    cache: Any,
    state: State,
    places: Int[Array, "5 b"],
    numbers: Float[Array, "5 b"],
) -> tuple[State, Bool[Array, " b"]]:
    """One step of the solver for b rows, each at its own time, with its own guidance and solver.

    Args:
      places: of every row its index in the state, which of the b rows holds its image, which is its
        image's other branch, the prompt's positions that it sees, and the slot's first position.
      numbers: time, h and r/2 of `flow.coefficients`, guidance scale, and the time after the step.
    Returns:
      the state, and which of the rows are finite.
    """
    rows, source, other, seen, start = places
    t, h, half_r, scale, t_next = (x[:, None, None, None] for x in numbers)
    prefix = jax.tree.map(lambda x: x[rows], cache)
    mask = image.slot_mask(seen, jax.tree.leaves(cache)[0].shape[-3], model.cfg.slot_len)
    positions = start[:, None] + jnp.arange(model.cfg.slot_len)
    own = {n: x[rows] for n, x in state.items()}
    z = own["z"]
    times = numbers[0], numbers[4]
    v = image.velocities(model, params, z[source], *times, prefix, mask, positions, lambda x: x)
    v = flow.guide(v, v[other], scale)
    new = flow.advance(z, v, own["velocity"], h, half_r)
    new = jnp.where(own["keep"][..., None], t_next * own["x"] + (1 - t_next) * own["noise"], new)
    updates = {"z": new, "velocity": v, "clean": z + (1 - t) * v}
    state = state | {n: state[n].at[rows].set(x) for n, x in updates.items()}
    return state, jnp.isfinite(new).all((1, 2, 3))


@functools.partial(jax.jit, static_argnums=(0, 1))
def row_pixels(
    cfg: ModelConfig, dtype: str, vae_params: Any, latents: Float[Array, "R h w C"], row: Array
) -> tuple[UInt8[Array, "H W 3"], Array]:
    """The image of one row, and whether it is finite."""
    own = lax.dynamic_index_in_dim(latents, row)
    pixels, finite = programs.latents_to_pixels(cfg, dtype, vae_params, own)
    return pixels[0], finite[0] & jnp.isfinite(own).all()


# --- conversations


@functools.partial(jax.jit, static_argnums=0)
def embed_chat(
    model: janusflow.JanusFlow,
    params: Any,
    tokens: Int[Array, "1 S"],
    slots: tuple[Array, ...],
    slot_start: Int[Array, "1 K"],
    slot_task: Int[Array, "1 K"],
) -> Float[Array, "1 S D"]:
    stacked = jnp.stack(slots, axis=1) if slots else None
    return text.embed_prompt(model, params, tokens, stacked, slot_start, slot_task)


@functools.partial(jax.jit, static_argnums=0, static_argnames="size", donate_argnums=2)
def extend_lane(
    model: janusflow.JanusFlow,
    params: Any,
    state: text.State,
    x: Float[Array, "1 S D"],
    lane: Array,
    begin: Array,
    length: Array,
    seed: Array,
    *,
    size: int,
) -> text.State:
    """Writes `size` positions of a prompt, from `begin`, into a lane. After the last of them it is
    ready to decode."""
    x = lax.dynamic_slice_in_dim(x, begin, size, axis=1)
    own = jax.tree.map(lambda c: lax.dynamic_slice_in_dim(c, lane, 1), state["cache"])
    own, logits = text.extend(model, params, x, own, begin, length[None])
    new = text.decoding(own, logits, length[None], numerics.key(seed)[None])
    write = lambda buffer, x: lax.dynamic_update_slice_in_dim(buffer, x, lane, 0)  # noqa: E731
    return jax.tree.map(write, state, new)


@functools.partial(jax.jit, static_argnums=0, static_argnames="eos_id", donate_argnums=2)
def decode_lanes(
    model: janusflow.JanusFlow,
    params: Any,
    state: text.State,
    live: Bool[Array, " D"],
    temperature: Float[Array, " D"],
    top_p: Float[Array, " D"],
    *,
    eos_id: int,
) -> tuple[text.State, Int[Array, "D n"]]:
    """The next tokens of the live lanes; NON_FINITE where a lane's logits are not finite."""
    ended = state["done"]
    state, tokens = text.decode(
        model,
        params,
        {**state, "done": ended | ~live},
        temperature,
        top_p,
        num_tokens=DECODE_TOKENS,
        eos_id=eos_id,
    )
    tokens = jnp.where(state["finite"][:, None], tokens, NON_FINITE)
    return {**state, "done": jnp.where(live, state["done"], ended)}, tokens


# --- on a device


def default_context(model: Any) -> int:
    """Room for MAX_IMAGES and TEXT_POSITIONS, at most MAX_CONTEXT; a token reads all of it."""
    positions = MAX_IMAGES * (model.cfg.num_image_tokens + 2) + TEXT_POSITIONS
    return min(-(-positions // 64) * 64, MAX_CONTEXT)


def limits(model: Any, settings: EngineSettings) -> EngineLimits:
    """What a `Pipeline` can do, and how much of it at once."""
    has = {*model.params, *(["vae"] if model.vae else [])}
    can = {t: {*parts.needed_for(t, model.cfg)} <= has for t in ("generate", "understand", "text")}
    room = (settings.context - 1) // (model.cfg.num_image_tokens + 2)
    return EngineLimits(
        generates=can["generate"] and "vae" in has,
        understands=can["understand"] and can["text"],
        chats=can["text"],
        image_size=model.cfg.image_size,
        context=settings.context,
        prompt_tokens=settings.prompt_tokens,
        images_per_chat=min(room, MAX_IMAGES) if can["understand"] else 0,
        student=model.cfg.student,
    )


class Programs:
    """A model and the state of an engine on one device.

    Args:
      model: of one device, without a mesh.
      device: None: the first.
    """

    def __init__(
        self, model: pipeline.Pipeline, settings: EngineSettings, device: Any = None
    ) -> None:
        self._module, self._cfg, self._dtype = model.model, model.cfg, model.dtype
        self._text, self._settings = model.text, settings
        self._device = device or jax.local_devices()[0]
        self._params, self._vae = jax.device_put((model.params, model.vae), self._device)
        self._can = limits(model, settings)
        sizes = [settings.rows]
        while not settings.invariant and sizes[0] > 2:
            sizes.insert(0, inputs.batch_bucket(sizes[0]) // 2)
        self.row_counts = tuple(sizes)
        """The numbers of rows that `step` takes."""
        self.decode_tokens = DECODE_TOKENS
        self._images: Any = None
        self._prefixes: Any = None
        self._lanes: Any = None
        self.prefill_tokens = math.gcd(settings.context, PREFILL_TOKENS)

    context = staticmethod(numerics.fixed)
    compilations = staticmethod(lambda: _compilations[0])

    def reset(self) -> None:
        """Empty rows and lanes."""
        self._images = self._prefixes = self._lanes = None  # frees their memory first
        if self._can.generates:
            rows, shape = self._settings.rows, self._cfg.latent_shape
            zeros = jnp.zeros((rows, *shape))
            names = ("x", "noise", "z", "velocity", "clean")
            state = {"keep": jnp.zeros((rows, *shape[:2]), bool)} | dict.fromkeys(names, zeros)
            cache = jax.tree.map(
                lambda x: jnp.zeros((rows, *x.shape[1:]), x.dtype),
                jax.eval_shape(lambda: self.prefix([0])),
            )
            self._images, self._prefixes = self._place((state, cache))
            self._no_latents = self._place(zeros[:1])
        if self._can.chats:
            lanes, llm = self._settings.lanes, self._cfg.llm
            size, dtype = self._settings.context, jnp.dtype(self._dtype)
            cache = llama.empty_cache(llm, self._params["llm"], lanes, size, dtype)
            lengths = jnp.zeros((lanes,), jnp.int32)
            logits = jnp.zeros((lanes, llm.vocab_size))
            keys = jax.vmap(numerics.key)(lengths.astype(jnp.uint32))
            self._lanes = self._place(text.decoding(cache, logits, lengths, keys))

    def warm_up(self) -> float:
        """Compiles everything. Returns the seconds of a step of all rows."""
        self.reset()
        seconds = 0.0
        if self._can.generates:
            image = np.zeros((self._cfg.image_size, self._cfg.image_size, 3), np.uint8)
            self.insert(self.prefix([0]), (0, 0), 0, self.encode(image), self.no_cells, 0.0)
            for count in self.row_counts:
                places = np.zeros((5, count), np.int32)
                places[:3] = np.arange(count)
                for _ in range(2):  # the second is not compiled
                    start = time.monotonic()
                    self.read(self.step(places, np.zeros((5, count), np.float32)))
                    seconds = time.monotonic() - start
            for estimate in (False, True):
                self.read(self.pixels(0, estimate))
        if self._can.chats:
            self.extend(self.embed([0], [], []), 0, 0, 1, 0)
            if self._can.understands:
                image = np.zeros((self._cfg.image_size, self._cfg.image_size, 3), np.uint8)
                self.embed([0], [self.slot(image)], [0])
            idle = np.zeros(self._settings.lanes)
            for live, temperature in ((False, 0.0), (True, 1.0)):
                self.read(self.decode(idle + live, idle + temperature, idle + 1.0))
        self.reset()
        return seconds

    @staticmethod
    def read(x: Any) -> Any:
        """Waits for arrays, and brings them to the host."""
        return jax.device_get(x)

    def _place(self, x: Any) -> Any:
        # A copy: equal zeros may share a buffer, which cannot be donated twice.
        return jax.tree.map(lambda x: jax.device_put(x, self._device, may_alias=False), x)

    # images

    @property
    def no_cells(self) -> Bool[np.ndarray, "h w"]:
        return np.zeros(self._cfg.latent_shape[:2], bool)

    def prefix(self, ids: Sequence[int]) -> Any:
        """Keys and values of a prompt."""
        tokens = np.full((1, self._settings.prompt_tokens), self._text.pad_id, np.int32)
        tokens[0, : len(ids)] = ids
        lengths = np.asarray([len(ids)], np.int32)
        return image_prefix(self._module, self._params, tokens, lengths)

    def encode(self, pixels: UInt8[np.ndarray, "H W 3"] | None) -> Any:
        """Latents [1, h, w, C] of an image; zeros of None."""
        if pixels is None:
            return self._no_latents
        return programs.pixels_to_latents(self._cfg, self._dtype, self._vae, pixels[None])

    def insert(
        self, prefix: Any, rows: tuple[int, int], seed: int, x: Any, keep: np.ndarray, t: float
    ) -> None:
        """See `insert_image`."""
        self._prefixes, self._images = insert_image(
            self._prefixes,
            self._images,
            prefix,
            np.asarray(rows, np.int32),
            np.uint32(seed),
            x,
            keep,
            np.float32(t),
        )

    def step(self, places: Int[np.ndarray, "5 b"], numbers: Float[np.ndarray, "5 b"]) -> Any:
        """See `step_images`; b is one of `row_counts`. -> which rows are finite"""
        self._images, finite = step_images(
            self._module, self._params, self._prefixes, self._images, places, numbers
        )
        return finite

    def pixels(self, row: int, estimate: bool = False) -> Any:
        """The image of a row as it is, or where it is heading. -> uint8[H, W, 3], finite"""
        latents = self._images["clean" if estimate else "z"]
        return row_pixels(self._cfg, self._dtype, self._vae, latents, np.int32(row))

    # conversations

    def slot(self, pixels: UInt8[np.ndarray, "H W 3"]) -> Any:
        """The vectors of an image in a conversation, [1, slot, D]."""
        return programs.encode_images(self._module, self._params, self._vae, pixels[None])

    def embed(self, ids: Sequence[int], slots: Sequence[Any], starts: Sequence[int]) -> Any:
        """The vectors of a prompt, [1, context, D], with those of its images in their places."""
        tokens = np.full((1, self._settings.context), self._text.pad_id, np.int32)
        tokens[0, : len(ids)] = ids
        room = self._can.images_per_chat if slots else 0
        start, task = np.zeros((2, 1, room), np.int32)
        start[0, : len(starts)], task[0, : len(starts)] = starts, UNDERSTAND
        padded = (*slots, *[slots[-1]] * (room - len(slots))) if slots else ()
        return embed_chat(self._module, self._params, tokens, padded, start, task)

    def extend(self, x: Any, lane: int, begin: int, length: int, seed: int) -> None:
        """See `extend_lane`; computes `prefill_tokens` positions."""
        self._lanes = extend_lane(
            self._module,
            self._params,
            self._lanes,
            x,
            np.int32(lane),
            np.int32(begin),
            np.int32(length),
            np.uint32(seed),
            size=self.prefill_tokens,
        )

    def decode(self, live: np.ndarray, temperature: np.ndarray, top_p: np.ndarray) -> Any:
        """See `decode_lanes`. -> tokens int[D, n]"""
        self._lanes, tokens = decode_lanes(
            self._module,
            self._params,
            self._lanes,
            live.astype(bool),
            temperature.astype(np.float32),
            top_p.astype(np.float32),
            eos_id=self._text.eos_id,
        )
        return tokens
