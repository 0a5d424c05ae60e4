"""The Python face: load a model, paint, read pictures, answer.

    model = janusflow_jax.load("runs/emoji")
    model.generate("a red apple")[0].save("apple.png")
    model.chat("What is in the picture?", images=["apple.png"])

Shapes are bucketed (prompt lengths, batch sizes), so a new prompt seldom compiles anything.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image

from janusflow_jax import checkpoint, decode, losses, sampler, sharding
from janusflow_jax.config import ModelConfig
from janusflow_jax.data import chat_format, images
from janusflow_jax.models import janusflow, vae

PROMPT_BUCKET = 32
CHUNK_TOKENS = 16
MAX_BATCH = 16

ImageLike = Any
"""A path, a PIL image, encoded bytes, or uint8[H, W, 3]."""
Turns = list[dict[str, str]]


def load(
    path: str, dtype: str | None = None, mesh: Any = None, weights: str = "ema"
) -> JanusFlowPipeline:
    """Loads a model folder, a workdir or one of its checkpoints.

    Args:
      dtype: 'float32' or 'bfloat16'; None: float32 on CPU, bfloat16 on TPU and GPU.
      mesh: a `jax.sharding.Mesh` to spread the parameters over; None: one device.
      weights: 'ema' or 'params' (raw); folders without an EMA have only 'params'.
    Raises:
      checkpoint.CheckpointError: nothing there that loads, or a part is missing.
    """
    if dtype is None:
        dtype = "float32" if jax.default_backend() == "cpu" else "bfloat16"
    loaded = checkpoint.load_model(path, weights=weights)
    need = set(janusflow.param_shapes(loaded.cfg)) - {"repa_head"}
    lacking = sorted(need - set(loaded.params or {})) + ([] if loaded.vae else ["vae"])
    if lacking:
        raise checkpoint.CheckpointError(
            f"{path}: expected a whole model; the parts {lacking} are not in it. It is a start "
            "for training (config field `init`), not a model to run"
        )
    return JanusFlowPipeline(
        loaded.cfg,
        loaded.params,
        loaded.vae,
        chat_format.ChatFormat.load(loaded.hub, loaded.cfg.num_image_tokens),
        dtype=dtype,
        mesh=mesh,
    )


class JanusFlowPipeline:
    """A loaded model. Not to be built by hand: see `load`."""

    def __init__(
        self,
        cfg: ModelConfig,
        params: Any,
        vae_params: Any,
        chat: Any,
        *,
        dtype: str = "float32",
        mesh: Any = None,
    ) -> None:
        self.cfg, self.dtype, self.mesh, self.text = cfg, dtype, mesh, chat
        self.model = janusflow.JanusFlow(cfg, jnp.dtype(dtype))
        kept = {k: v for k, v in params.items() if k != "repa_head"}
        cast = lambda t, d: jax.tree.map(lambda x: jnp.asarray(x, d), t)  # noqa: E731
        self.params, self.vae = cast(kept, jnp.dtype(dtype)), cast(vae_params, jnp.dtype(dtype))
        if mesh is not None:
            self.params = jax.device_put(self.params, sharding.tree_shardings(self.params, mesh))

    def generate(
        self,
        prompts: str | Sequence[str],
        *,
        cfg_weight: float = 2.0,
        num_steps: int = 30,
        seed: int | Sequence[int] = 0,
        images_per_prompt: int = 1,
        noise: np.ndarray | None = None,
        output: str = "pil",
    ) -> Any:
        """Paints pictures, prompt by prompt.

        Args:
          cfg_weight: guidance; 1 runs the conditional branch only.
          num_steps: Euler steps.
          seed: picture n of the output uses seed + n; a list gives each prompt its first.
          noise: float32[B, h, w, C] instead of the seeds.
          output: 'pil'; 'numpy' uint8[B, H, W, 3]; 'latent' float32[B, h, w, C], scaled;
            'trajectory' float32[N + 1, B, h, w, C], the noise first.
        Raises:
          ValueError: an empty prompt, a wrong noise shape or an unknown output.
        """
        prompts = [prompts] if isinstance(prompts, str) else list(prompts)
        total = len(prompts) * images_per_prompt
        _check_generate(prompts, num_steps, images_per_prompt, output)
        if noise is None:
            noise = self._noise(_seeds(seed, len(prompts), images_per_prompt))
        noise = np.asarray(noise, np.float32)
        if noise.shape != (total, *self.cfg.latent_shape):
            raise ValueError(
                f"noise: expected shape {(total, *self.cfg.latent_shape)} (one per picture); "
                f"got {noise.shape}"
            )
        ids = [self.text.generation_ids(p) for p in prompts for _ in range(images_per_prompt)]
        tokens, lengths = _pad(ids, self.text.pad_id)
        parts = []
        for at in range(0, total, MAX_BATCH):
            here = slice(at, min(at + MAX_BATCH, total))
            size = _bucket_batch(here.stop - at)
            parts.append(
                self._run(
                    _sample,
                    self.model,
                    self.params,
                    _fill(tokens[here], size),
                    _fill(lengths[here], size),
                    _fill(noise[here], size),
                    jnp.float32(cfg_weight),
                    num_steps=num_steps,
                    guided=cfg_weight != 1,
                    trajectory=output == "trajectory",
                )
            )
            rows = (slice(None),) * (output == "trajectory") + (slice(0, here.stop - at),)
            parts[-1] = parts[-1][rows]
        latents = np.concatenate(
            [np.asarray(p) for p in parts], axis=1 if output == "trajectory" else 0
        )
        return (
            latents if output in ("latent", "trajectory") else self.decode_latents(latents, output)
        )

    def decode_latents(self, latents: np.ndarray, output: str = "pil") -> Any:
        """Scaled latents float32[B, h, w, C] -> pictures, 'pil' or 'numpy' uint8[B, H, W, 3]."""
        latents, parts = np.asarray(latents, np.float32), []
        for at in range(0, len(latents), MAX_BATCH):
            part = latents[at : at + MAX_BATCH]
            out = self._run(
                _decode_vae, self.cfg, self.dtype, self.vae, _fill(part, _bucket_batch(len(part)))
            )
            parts.append(np.asarray(out)[: len(part)])
        pixels = np.concatenate(parts)
        return [Image.fromarray(p) for p in pixels] if output == "pil" else pixels

    def encode_image(self, pictures: ImageLike | Sequence[ImageLike]) -> np.ndarray:
        """Pictures -> float32[B, h, w, C]: the posterior's mean times the scaling factor."""
        many = pictures if isinstance(pictures, (list, tuple)) else [pictures]
        pixels = np.stack(
            [images.for_generation(images.read(p), self.cfg.image_size) for p in many]
        )
        parts = []
        for at in range(0, len(pixels), MAX_BATCH):
            part = pixels[at : at + MAX_BATCH]
            out = self._run(
                _encode_vae, self.cfg, self.dtype, self.vae, _fill(part, _bucket_batch(len(part)))
            )
            parts.append(np.asarray(out)[: len(part)])
        return np.concatenate(parts)

    def chat(
        self,
        conversation: str | Turns | Sequence[str | Turns],
        images: Sequence[Any] = (),
        *,
        max_new_tokens: int = 512,
        temperature: float = 0.0,
        top_p: float = 1.0,
        seed: int = 0,
    ) -> Any:
        """Answers one conversation (-> str) or a list of them (-> list of str).

        Args:
          conversation: turns {'role': 'System' | 'User' | 'Assistant', 'content': ...}, or just
            the question; `<image_placeholder>` marks where a picture stands (a question as a
            string gets them in front).
          images: pictures in order; for several conversations a list of lists.
        """
        many, pictures, single = _conversations(conversation, images, self.text.image_tag)
        text = [""] * len(many)
        for pieces in self._stream(many, pictures, max_new_tokens, temperature, top_p, seed):
            text = pieces
        answers = [t.strip() for t in text]
        return answers[0] if single else answers

    def stream(
        self, conversation: str | Turns, images: Sequence[Any] = (), **options: Any
    ) -> Iterator[str]:
        """Like `chat` for one conversation, as pieces of text as they come."""
        many, pictures, single = _conversations(conversation, images, self.text.image_tag)
        if not single:
            raise ValueError("stream: expected one conversation; got a list of them, use chat")
        defaults = {"max_new_tokens": 512, "temperature": 0.0, "top_p": 1.0, "seed": 0}
        unknown = sorted(set(options) - set(defaults))
        if unknown:
            raise TypeError(f"stream: unknown options {unknown}; known are {sorted(defaults)}")
        said = ""
        for pieces in self._stream(many, pictures, **{**defaults, **options}):
            now = pieces[0].lstrip()
            # A piece may end inside a character of several bytes: hold it back.
            if not now.endswith("\ufffd") and now.startswith(said):
                yield now[len(said) :]
                said = now
        if now != said:
            yield now[len(said) :]

    def _stream(
        self, many: list, pictures: list, max_new_tokens: int, temperature: float, top_p: float,
        seed: int,
    ) -> Iterator[list[str]]:  # fmt: skip
        """All text so far of every row, after each compiled chunk of tokens."""
        if max_new_tokens < 1:
            raise ValueError(f"max_new_tokens: expected >= 1; got {max_new_tokens}")
        state = self._start_decode(many, pictures, max_new_tokens, seed)
        out = np.zeros((len(many), 0), np.int32)
        while out.shape[1] < max_new_tokens:
            state, tokens = self._run(
                _advance,
                self.model,
                self.params,
                state,
                jnp.float32(temperature),
                jnp.float32(top_p),
                num_tokens=CHUNK_TOKENS,
                eos_id=self.text.eos_id,
            )
            out = np.concatenate([out, np.asarray(tokens)[: len(many)]], axis=1)
            out = out[:, :max_new_tokens]
            yield [self.text.decode(_until(row, self.text.eos_id)) for row in out]
            if (out == self.text.eos_id).any(1).all():
                return

    def _start_decode(self, many: list, pictures: list, max_new: int, seed: int) -> Any:
        size = self.cfg.image_size
        prompts = [
            self.text.conversation(rest, len(p), closed=False, system=system)
            for (system, rest), p in zip(map(_system, many), pictures, strict=True)
        ]
        tokens, lengths = _pad([p.ids for p in prompts], self.text.pad_id)
        num_slots = max(len(p) for p in pictures)
        rows = _bucket_batch(len(many))
        start = np.zeros((rows, num_slots), np.int32)
        task = np.zeros((rows, num_slots), np.int32)
        pixels = np.zeros((rows, num_slots, size, size, 3), np.uint8)
        for i, (prompt, given) in enumerate(zip(prompts, pictures, strict=True)):
            for j, picture in enumerate(given):
                pixels[i, j] = images.for_understanding(images.read(picture), size)
                start[i, j], task[i, j] = prompt.slot_starts[j], janusflow.UNDERSTAND
        # Room in the buffer comes in whole chunks and doubles, so that few sizes compile.
        room = CHUNK_TOKENS * _bucket_batch(-(-max_new // CHUNK_TOKENS))
        keys = jax.vmap(jax.random.key)(jnp.arange(rows) + seed)
        return self._run(
            _start,
            self.model,
            self.params,
            _fill(tokens, rows),
            pixels if num_slots else None,
            start,
            task,
            _fill(lengths, rows),
            keys,
            max_new=room,
        )

    def _noise(self, seeds: list[int]) -> np.ndarray:
        draw = lambda s: jax.random.normal(jax.random.key(s), self.cfg.latent_shape)  # noqa: E731
        return np.asarray(jax.vmap(draw)(jnp.asarray(seeds)))

    def _run(self, fn: Any, *args: Any, **kwargs: Any) -> Any:
        if self.mesh is None:
            return fn(*args, **kwargs)
        with jax.set_mesh(self.mesh):
            return fn(*args, **kwargs)


_sample = jax.jit(
    sampler.sample, static_argnums=0, static_argnames=("num_steps", "guided", "trajectory")
)
_advance = jax.jit(
    decode.advance,
    static_argnums=0,
    static_argnames=("num_tokens", "eos_id"),
    donate_argnums=2,
)


@functools.partial(jax.jit, static_argnums=0, static_argnames="max_new")
def _start(
    model: Any, params: Any, tokens: Any, pixels: Any, start: Any, task: Any, lengths: Any,
    keys: Any, max_new: int,
) -> Any:  # fmt: skip
    pixels = None if pixels is None else losses.to_float(pixels, model.dtype)
    x = decode.embed_prompt(model, params, tokens, pixels, start, task)
    return decode.start(model, params, x, lengths, keys, max_new)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _decode_vae(cfg: ModelConfig, dtype: str, params: Any, latents: Any) -> Any:
    module = vae.Vae(cfg.vae, jnp.dtype(dtype))
    x = module.apply({"params": params}, latents / cfg.vae.scaling_factor, method="decode")
    # NOTE(parity): rounded; the published demo truncates.
    return jnp.round((jnp.clip(x, -1, 1) + 1) * 127.5).astype(jnp.uint8)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _encode_vae(cfg: ModelConfig, dtype: str, params: Any, pixels: Any) -> Any:
    return losses.encode_latents(params, pixels[:, None], None, cfg, jnp.dtype(dtype))[:, 0]


def _check_generate(prompts: list, num_steps: int, per_prompt: int, output: str) -> None:
    known = ("pil", "numpy", "latent", "trajectory")
    empty = [i for i, p in enumerate(prompts) if not str(p).strip()]
    problems = [f"prompt {i} is empty: expected words for what to paint" for i in empty]
    problems += [] if prompts else ["no prompt"]
    problems += [] if num_steps >= 1 else [f"num_steps: expected >= 1; got {num_steps}"]
    problems += [] if per_prompt >= 1 else [f"images_per_prompt: expected >= 1; got {per_prompt}"]
    problems += [] if output in known else [f"output: expected one of {known}; got {output!r}"]
    if problems:
        raise ValueError("generate: " + "; ".join(problems))


def _seeds(seed: int | Sequence[int], num_prompts: int, per_prompt: int) -> list[int]:
    if isinstance(seed, (int, np.integer)):
        return [int(seed) + n for n in range(num_prompts * per_prompt)]
    if len(seed) != num_prompts:
        raise ValueError(f"seed: expected one or {num_prompts} (one a prompt); got {len(seed)}")
    return [int(s) + j for s in seed for j in range(per_prompt)]


def _pad(ids: Sequence[Any], pad_id: int) -> tuple[np.ndarray, np.ndarray]:
    """Right-padded int32[B, P], P in buckets, and lengths int32[B]."""
    lengths = np.asarray([len(x) for x in ids], np.int32)
    size = -(-int(lengths.max()) // PROMPT_BUCKET) * PROMPT_BUCKET
    tokens = np.full((len(ids), size), pad_id, np.int32)
    for row, x in zip(tokens, ids, strict=True):
        row[: len(x)] = x
    return tokens, lengths


def _bucket_batch(n: int) -> int:
    """The next power of two."""
    return 1 << (n - 1).bit_length()


def _fill(x: np.ndarray, size: int) -> np.ndarray:
    """Repeats the last row up to `size` rows."""
    return np.concatenate([x, np.repeat(x[-1:], size - len(x), axis=0)]) if len(x) < size else x


def _system(turns: Turns) -> tuple[str, Turns]:
    """The system prompt and the other turns: a first System turn replaces the default."""
    if turns and turns[0]["role"].lower() == "system":
        return turns[0]["content"], turns[1:]
    return chat_format.SYSTEM_PROMPT, turns


def _until(row: np.ndarray, eos_id: int) -> list[int]:
    end = np.flatnonzero(row == eos_id)
    return row[: end[0] if len(end) else len(row)].tolist()


def _conversations(conversation: Any, pictures: Sequence[Any], tag: str) -> tuple[list, list, bool]:
    """Normalises to (list of turns, list of picture lists, was it one conversation)."""
    is_turns = isinstance(conversation, list) and all(isinstance(t, dict) for t in conversation)
    single = isinstance(conversation, str) or is_turns
    many = [conversation] if single else list(conversation)
    given = [list(pictures)] if single else [list(p) for p in pictures] or [[] for _ in many]
    if not many or len(given) != len(many):
        raise ValueError(
            f"chat: expected one list of images a conversation; got {len(many)} conversations "
            f"and {len(given)} lists"
        )
    out = []
    for turns, own in zip(many, given, strict=True):
        if isinstance(turns, str):
            front = "" if tag in turns else f"{tag}\n" * len(own)
            turns = [
                {"role": "User", "content": front + turns},
                {"role": "Assistant", "content": ""},
            ]
        out.append(turns)
    return out, given, single
