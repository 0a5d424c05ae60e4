"""The Python face: load a model, paint, read pictures, answer.

    model = janusflow_jax.load("runs/emoji")
    model.generate("a red apple")[0].save("apple.png")
    model.chat("What is in the picture?", images=["apple.png"])

Shapes are bucketed (`data/requests.py`) and compiled programs are kept on disk
(`compile_cache.py`), so a new prompt seldom compiles anything.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec
from PIL import Image

from janusflow_jax.checkpoints import model_folder
from janusflow_jax.config import UNDERSTAND, ModelConfig, parts as parts_lib
from janusflow_jax.config.errors import CheckpointError, JanusFlowError
from janusflow_jax.data import chat_format, images as pictures_lib
from janusflow_jax.hub import adapters
from janusflow_jax.models import encode, int8 as int8_lib, janusflow, llama, vae
from janusflow_jax.parallel import compile_cache, sharding
from janusflow_jax.sampling import image as image_sampling, inputs, text as text_sampling

CHUNK_TOKENS = 16
MAX_BATCH = 16
DTYPES = ("float32", "bfloat16")
"""The parts that painting, and answering about pictures by each understanding encoder, need."""

ImageLike = Any
"""A path, a PIL image, encoded bytes, or uint8[H, W, 3]."""


def load(
    path: Any,
    dtype: str | None = None,
    mesh: Any = None,
    weights: str = "ema",
    int8: bool = False,
    adapter: Any = "",
) -> JanusFlowPipeline:
    """Loads a model folder, a workdir or one of its checkpoints.

    A folder with some parts only does what those parts can do; the rest says what is missing.

    Args:
      dtype: 'float32' or 'bfloat16'; None: float32 on CPU, bfloat16 on TPU and GPU.
      mesh: a `jax.sharding.Mesh` to spread the parameters over; None: one device.
      weights: 'ema' or 'params' (raw); folders without an EMA have only 'params'.
      int8: the language model's weights, and its keys and values in `chat`, take a byte each
        (`models/int8.py`; benchmarks/RESULTS.md has what it costs in accuracy).
      adapter: a folder of `tools/export_checkpoint.py --adapter-only`.
    Raises:
      CheckpointError: nothing there that loads.
      JanusFlowError: another dtype, a tokenizer of another model, or adapters of another base.
    """
    if dtype is None:
        dtype = "float32" if jax.default_backend() == "cpu" else "bfloat16"
    if dtype not in DTYPES:
        raise JanusFlowError(
            f"dtype: expected one of {DTYPES}; got {dtype!r} (the VAE overflows in float16)"
        )
    compile_cache.enable()
    loaded = model_folder.load_model(path, weights=weights)
    chat = None
    if loaded.params and "llm" in loaded.params:
        chat = chat_format.ChatFormat.load(loaded.hub, loaded.cfg.num_image_tokens)
        chat.check_vocab(loaded.cfg.llm.vocab_size)
    params, loaded.params = loaded.params or {}, None  # the one reference goes along
    if adapter:
        params["llm"] = adapters.apply(params.get("llm"), adapter)
    options = {"dtype": dtype, "mesh": mesh, "source": loaded.source, "int8": int8}
    return JanusFlowPipeline(loaded.cfg, params, loaded.vae, chat, **options)


class JanusFlowPipeline:
    """A loaded model. Not to be built by hand: see `load`.

    Takes the parameters over: what it is given is emptied, so that no array is held twice.
    """

    def __init__(
        self,
        cfg: ModelConfig,
        params: Any,
        vae_params: Any,
        chat: Any,
        *,
        dtype: str = "float32",
        mesh: Any = None,
        source: str = "",
        int8: bool = False,
    ) -> None:
        self.cfg, self.dtype, self.mesh, self.text, self.source = cfg, dtype, mesh, chat, source
        self.model = janusflow.JanusFlow(cfg, jnp.dtype(dtype))
        cast = lambda t: jax.tree.map(lambda x: jnp.asarray(x, jnp.dtype(dtype)), t)  # noqa: E731
        pick = jax.jit(lambda x, i: x[i].astype(dtype))  # not of host arrays: a mesh takes those
        take = lambda x, i: x[i] if isinstance(x, np.ndarray) else pick(x, i)  # noqa: E731
        self.params, self.vae = {}, cast(vae_params or {})
        for part in sorted(params):
            tree = params.pop(part)
            if part == "llm":
                tree = llama.unstack(tree, take)
            if not part.startswith("repa"):
                self.params[part] = cast(tree)
        if int8:
            int8_lib.quantize_llm(self.params["llm"])
        if mesh is not None:
            self.params = jax.device_put(self.params, sharding.tree_shardings(self.params, mesh))
            self.vae = jax.device_put(self.vae, NamedSharding(mesh, PartitionSpec()))

    def generate(
        self,
        prompts: str | Sequence[str],
        *,
        cfg_weight: float = 2.0,
        num_steps: int = 30,
        seed: int | Sequence[int] = 0,
        images_per_prompt: int = 1,
        noise: Any = None,
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
          JanusFlowError: an empty prompt, a wrong noise shape, a seed out of range or an unknown
            output (all in one message).
          CheckpointError: the model has no parts that paint.
        """
        prompts = [prompts] if isinstance(prompts, str) else list(prompts)
        inputs.check_generate(prompts, num_steps, images_per_prompt, output)
        self._need(
            "painting",
            *parts_lib.needed_to_generate(),
            *(["vae"] if output in ("pil", "numpy") else []),
        )
        total = len(prompts) * images_per_prompt
        if noise is None:
            seeds = inputs.picture_seeds(seed, len(prompts), images_per_prompt)
            noise = self._noise(np.asarray(seeds, np.uint32))
        noise = np.asarray(noise, np.float32)
        if noise.shape != (total, *self.cfg.latent_shape):
            raise JanusFlowError(
                f"noise: expected shape {(total, *self.cfg.latent_shape)} (one per picture); "
                f"got {noise.shape}"
            )
        ids = [self.text.generation_ids(p) for p in prompts for _ in range(images_per_prompt)]
        tokens, lengths = inputs.pad(ids, self.text.pad_id)
        fn = _trajectory if output == "trajectory" else _sample

        def paint(tokens: Any, lengths: Any, noise: Any) -> Any:
            return fn(
                self.model,
                self.params,
                tokens,
                lengths,
                noise,
                jnp.float32(cfg_weight),
                num_steps=num_steps,
                guided=cfg_weight != 1,
            )

        axis = int(output == "trajectory")
        latents = self._batched(paint, tokens, lengths, noise, axis=axis)
        if output in ("latent", "trajectory"):
            return latents
        return self.decode_latents(latents, output)

    def decode_latents(self, latents: Any, output: str = "pil") -> Any:
        """Scaled latents float32[B, h, w, C] -> pictures, 'pil' or 'numpy' uint8[B, H, W, 3]."""
        self._need("decoding latents", "vae")
        latents = np.asarray(latents, np.float32)
        if latents.ndim != 4 or latents.shape[1:] != self.cfg.latent_shape or not len(latents):
            raise JanusFlowError(
                f"latents: expected shape (B, *{self.cfg.latent_shape}); got {latents.shape}"
            )
        if output not in ("pil", "numpy"):
            raise JanusFlowError(f"output: expected 'pil' or 'numpy'; got {output!r}")
        fn = functools.partial(_decode_vae, self.cfg, self.dtype, self.vae)
        pixels = self._batched(fn, latents)
        return [Image.fromarray(p) for p in pixels] if output == "pil" else pixels

    def encode_image(self, images: ImageLike | Sequence[ImageLike]) -> np.ndarray:
        """Pictures (a square of each) -> float32[B, h, w, C]: posterior mean times the scale."""
        self._need("encoding pictures", "vae")
        many = images if isinstance(images, (list, tuple)) else [images]
        if not many:
            raise JanusFlowError("encode_image: expected at least one picture; got an empty list")
        size = self.cfg.image_size
        pixels = np.stack([pictures_lib.for_generation(pictures_lib.read(p), size) for p in many])
        return self._batched(functools.partial(_encode_vae, self.cfg, self.dtype, self.vae), pixels)

    def chat(
        self,
        conversation: Any,
        images: Any = (),
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
            string gets them in front). A first System turn replaces the default prompt; a last
            Assistant turn with text is continued.
          images: pictures in order; for several conversations a list of lists.
          temperature: 0 is greedy. top_p: nucleus. seed: conversation n draws with seed + n.
        Raises:
          JanusFlowError: lists, turns, tags or options that do not fit.
        """
        options = (max_new_tokens, temperature, top_p)
        inputs.check_chat(*options)
        self._need("answering", "llm")
        many, given, single = inputs.conversations(conversation, images, self.text.image_tag)
        answers: list[str] = []
        for at in range(0, len(many), MAX_BATCH):
            said = [""]
            here = slice(at, at + MAX_BATCH)
            for said in self._stream(many[here], given[here], *options, seed + at):  # noqa: B007
                pass
            answers += [text.strip() for text in said]
        return answers[0] if single else answers

    def stream(
        self,
        conversation: Any,
        images: Any = (),
        *,
        max_new_tokens: int = 512,
        temperature: float = 0.0,
        top_p: float = 1.0,
        seed: int = 0,
    ) -> Iterator[str]:
        """Like `chat` for one conversation, as pieces of text as they come; joined, they are
        `chat`'s answer."""
        options = (max_new_tokens, temperature, top_p)
        inputs.check_chat(*options)
        self._need("answering", "llm")
        many, given, single = inputs.conversations(conversation, images, self.text.image_tag)
        if not single:
            raise JanusFlowError("stream: expected one conversation; got a list of them, use chat")
        return self._pieces(self._stream(many, given, *options, seed))

    @staticmethod
    def _pieces(texts: Iterator[list[str]]) -> Iterator[str]:
        now = said = ""
        for (text,) in texts:
            now = text.strip()
            # The end may be inside a character of several bytes: held back, as ending spaces are.
            sure = now.rstrip("\ufffd").rstrip()
            if len(sure) > len(said) and sure.startswith(said):
                yield sure[len(said) :]
                said = sure
        if now != said:
            yield now[len(said) :]

    def _stream(
        self,
        many: list,
        pictures: list,
        max_new_tokens: int,
        temperature: float,
        top_p: float,
        seed: int,
    ) -> Iterator[list[str]]:
        """All text so far of every row, after each compiled chunk of tokens."""
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
            yield [self.text.decode(inputs.until(row, self.text.eos_id)) for row in out]
            if (out == self.text.eos_id).any(1).all():
                return

    def _start_decode(self, many: list, pictures: list, max_new: int, seed: int) -> Any:
        prompts = [
            self.text.conversation(rest, len(p), closed=False, system=system)
            for (system, rest), p in zip(map(inputs.split_system, many), pictures, strict=True)
        ]
        tokens, lengths = inputs.pad([p.ids for p in prompts], self.text.pad_id)
        rows = inputs.batch_bucket(len(many))
        most = max(len(p) for p in pictures)
        shape = (rows, inputs.batch_bucket(most) if most else 0)
        start, task, which = (np.zeros(shape, np.int32) for _ in range(3))
        pixels: list[np.ndarray] = []
        for i, (prompt, given) in enumerate(zip(prompts, pictures, strict=True)):
            for j, picture in enumerate(given):
                which[i, j], start[i, j] = len(pixels), prompt.slot_starts[j]
                task[i, j] = UNDERSTAND
                image = pictures_lib.read(picture)
                pixels.append(pictures_lib.for_understanding(image, self.cfg.image_size))
        slots = None
        if pixels:
            self._need("reading pictures", *parts_lib.needed_to_understand(self.cfg))
            flat = inputs.fill(np.stack(pixels), inputs.batch_bucket(len(pixels)))
            slots = self._run(_read, self.model, self.params, self.vae, self._place(flat))
        # Room in the buffer comes in whole chunks and doubles, so that few sizes compile.
        room = CHUNK_TOKENS * inputs.batch_bucket(-(-max_new // CHUNK_TOKENS))
        seeds = ((np.arange(rows) + seed) % inputs.SEED_LIMIT).astype(np.uint32)
        tokens, lengths = inputs.fill(tokens, rows), inputs.fill(lengths, rows)
        prompt = (tokens, slots, which, start, task, lengths, seeds)
        return self._run(_start, self.model, self.params, *prompt, max_new=room)

    def _noise(self, seeds: np.ndarray) -> np.ndarray:
        """float32[B, h, w, C], each row of its own seed alone."""
        padded = inputs.fill(seeds, inputs.batch_bucket(len(seeds)))
        return np.asarray(_draw_noise(padded, self.cfg.latent_shape))[: len(seeds)]

    def _need(self, what: str, *parts: str) -> None:
        has = set(self.params) | ({"vae"} if self.vae else set())
        if lacking := [p for p in parts if p not in has]:
            raise CheckpointError(
                f"{what}: expected a model with all of {list(parts)}; {self.source or 'this one'} "
                f"lacks {lacking}. Use a trained or converted model"
            )

    def _batched(self, fn: Any, *arrays: np.ndarray, axis: int = 0) -> np.ndarray:
        """Runs `fn` over rows, at most MAX_BATCH at a time in few sizes; joins on `axis`."""
        parts = []
        for at in range(0, len(arrays[0]), MAX_BATCH):
            rows = [x[at : at + MAX_BATCH] for x in arrays]
            size = inputs.batch_bucket(len(rows[0]))
            out = self._run(fn, *(self._place(inputs.fill(x, size)) for x in rows))
            parts.append(np.take(np.asarray(out), np.arange(len(rows[0])), axis=axis))
        return np.concatenate(parts, axis=axis)

    def _place(self, x: np.ndarray) -> Any:
        """On a mesh: rows over its devices (where they divide)."""
        if self.mesh is None:
            return x
        spec = PartitionSpec(sharding.BATCH, *[None] * (x.ndim - 1))
        return jax.device_put(x, NamedSharding(self.mesh, sharding.fit(spec, x.shape, self.mesh)))

    def _run(self, fn: Any, *args: Any, **kwargs: Any) -> Any:
        if self.mesh is None:
            return fn(*args, **kwargs)
        with jax.set_mesh(self.mesh):
            return fn(*args, **kwargs)


# --- what is compiled; buffers that are used up are donated

_sample = jax.jit(
    image_sampling.sample,
    static_argnums=0,
    static_argnames=("num_steps", "guided"),
    donate_argnames="noise",
)
_trajectory = jax.jit(
    functools.partial(image_sampling.sample, trajectory=True),
    static_argnums=0,
    static_argnames=("num_steps", "guided"),
)
_advance = jax.jit(
    text_sampling.advance,
    static_argnums=0,
    static_argnames=("num_tokens", "eos_id"),
    donate_argnames="state",
)


@functools.partial(jax.jit, static_argnums=1)
def _draw_noise(seeds: Any, shape: tuple[int, ...]) -> Any:
    return jax.vmap(lambda s: jax.random.normal(jax.random.key(s), shape))(seeds)


@functools.partial(jax.jit, static_argnums=0)
def _read(model: Any, params: Any, vae_params: Any, pixels: Any) -> Any:
    images = encode.understanding_input(vae_params, pixels, model.cfg, model.dtype)
    return text_sampling.read_pictures(model, params, images, MAX_BATCH)


@functools.partial(jax.jit, static_argnums=0, static_argnames="max_new")
def _start(
    model: Any,
    params: Any,
    tokens: Any,
    slots: Any,
    which: Any,
    start: Any,
    task: Any,
    lengths: Any,
    seeds: Any,
    max_new: int,
) -> Any:
    slots = None if slots is None else jnp.take(slots, which, axis=0)
    x = text_sampling.embed_prompt(model, params, tokens, slots, start, task)
    return text_sampling.start(model, params, x, lengths, jax.vmap(jax.random.key)(seeds), max_new)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _decode_vae(cfg: ModelConfig, dtype: str, params: Any, latents: Any) -> Any:
    module = vae.Vae(cfg.vae, jnp.dtype(dtype))
    x = module.apply({"params": params}, latents / cfg.vae.scaling_factor, method="decode")
    # NOTE(parity): rounded; the published demo truncates.
    return jnp.round((jnp.clip(x, -1, 1) + 1) * 127.5).astype(jnp.uint8)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _encode_vae(cfg: ModelConfig, dtype: str, params: Any, pixels: Any) -> Any:
    return encode.encode_latents(params, pixels[:, None], None, cfg, jnp.dtype(dtype))[:, 0]
