"""The Python API: load a model, generate images, answer questions about images.

    model = janusflow_jax.load("runs/emoji")
    model.generate("a red apple")[0].save("apple.png")
    model.chat("What is in the image?", images=["apple.png"])

Shapes are rounded up to a few sizes (`sampling/inputs.py`) and compiled programs are cached on
disk, so a new prompt seldom compiles anything.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import Array, Float, Int
from PIL import Image

from janusflow_jax.checkpoints import model_folder
from janusflow_jax.config import UNDERSTAND, ModelConfig, parts as parts_lib
from janusflow_jax.config.errors import CheckpointError, DivergedError, JanusFlowError
from janusflow_jax.data import chat_format, images as images_lib
from janusflow_jax.hub import adapters
from janusflow_jax.models import int8 as int8_lib, janusflow, llama
from janusflow_jax.parallel import compile_cache, numerics, sharding
from janusflow_jax.sampling import inputs, programs

CHUNK_TOKENS = 16
MAX_BATCH = programs.IMAGES_AT_ONCE
DTYPES = ("float32", "bfloat16")

ImageLike = Any
"""What `data.images.read` reads: a path, bytes, a file, a PIL image, or uint8[H, W, 3]."""

NON_FINITE_ADVICE = (
    "use other weights, an adapter of this model, a lower guidance scale or dtype float32"
)


def load(
    path: Any,
    dtype: str | None = None,
    mesh: Any = None,
    weights: str = "ema",
    int8: bool = False,
    adapter: Any = "",
) -> Pipeline:
    """Loads a model to generate images, chat and encode images.

    A model without some parts does what the other parts can do; a call that needs them raises.

    Args:
      path: a model folder, the workdir of a training run, or one of its checkpoints.
      dtype: 'float32' or 'bfloat16'; None: float32 on CPU, bfloat16 on TPU and GPU.
      mesh: a `jax.sharding.Mesh` to spread the parameters over; None: one device.
      weights: 'ema', or 'params' for the raw weights. Folders without an EMA have only these.
      int8: keep the weights of the language model, and its keys and values in `chat`, as int8
        (extra `int8`); benchmarks/RESULTS.md has the cost in accuracy.
      adapter: a folder of `tools/export_checkpoint.py --adapter-only`, added to the language model.
    Raises:
      CheckpointError: there is no model that loads.
      JanusFlowError: an unknown dtype, a tokenizer of another model, or adapters of another base.
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
    params, loaded.params = loaded.params or {}, None  # no second reference: see Pipeline
    if adapter:
        params["llm"] = adapters.apply(params.get("llm"), adapter)
    options = {"dtype": dtype, "mesh": mesh, "source": loaded.source, "int8": int8}
    return Pipeline(loaded.cfg, params, loaded.vae, chat, **options)


class Pipeline:
    """A loaded model. Use `load` to construct it.

    Consumes `params`: it empties the tree part by part, so that no array is in memory twice.
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
        cast = lambda tree: jax.tree.map(lambda x: jnp.asarray(x, jnp.dtype(dtype)), tree)  # noqa: E731
        index = jax.jit(lambda x, i: x[i].astype(dtype))
        # Host arrays stay on the host until they are placed: on a mesh one device has no room.
        layer = lambda x, i: x[i] if isinstance(x, np.ndarray) else index(x, i)  # noqa: E731
        self.params, self.vae = {}, cast(vae_params or {})
        for part in sorted(params):
            tree = params.pop(part)
            if part == "llm":
                tree = llama.unstack(tree, layer)
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
        guidance_scale: float = 2.0,
        num_steps: int = 30,
        order: int = 1,
        shift: float = 1.0,
        guidance_interval: tuple[float, float] = (0.0, 1.0),
        seed: int | Sequence[int] = 0,
        images_per_prompt: int = 1,
        noise: Any = None,
        output: str = "pil",
        cfg_weight: float | None = None,
    ) -> Any:
        """Generates images, prompt by prompt.

        Args:
          guidance_scale: of classifier-free guidance; 1 runs the conditional branch only.
          num_steps: of the solver.
          order: 1 is Euler's method; 2 is Adams-Bashforth, more accurate at the same cost.
          shift: of the times of the steps; above 1: more of them near noise (docs/sampling.md).
          guidance_interval: the times at which guidance acts, from 0 (noise) to 1 (image); outside
            the conditional branch runs alone.
          seed: image n of the output gets seed + n; a list has the first seed of each prompt. In
            batches of one shape (`inputs.batch_shape`) the other prompts change no bit of an image.
          images_per_prompt: number of images of each prompt.
          noise: float32[B, h, w, C], instead of noise drawn from the seeds.
          output: 'pil'; 'numpy' uint8[B, H, W, 3]; 'latent' float32[B, h, w, C], scaled;
            'trajectory' float32[N + 1, B, h, w, C], the noise first.
        Raises:
          JanusFlowError: an empty or too long prompt, a number out of range, a wrong noise shape or
            an unknown output.
          CheckpointError: the model lacks parts that generation needs.
          DivergedError: some images are non-finite; its `images` has None in their places.
        """
        if cfg_weight is not None:  # the name of 0.1; remove in 0.3
            guidance_scale = cfg_weight
        if isinstance(prompts, str):
            prompts = [prompts]
        prompts = list(prompts) if np.iterable(prompts) else []
        sampler = inputs.check_generate(
            prompts,
            images_per_prompt,
            output,
            guidance_scale,
            num_steps,
            order,
            shift,
            guidance_interval,
        )
        if guidance_scale == 1:
            sampler = dataclasses.replace(sampler, guide_until=0.0)
        decodes = output in ("pil", "numpy")
        self._require(
            "generating", *parts_lib.needed_for("generate", self.cfg), *(["vae"] if decodes else [])
        )
        ids = [x for x in self.prompt_ids(prompts) for _ in range(images_per_prompt)]
        if noise is None:
            noise = self._noise(inputs.image_seeds(seed, len(prompts), images_per_prompt))
        noise = np.asarray(noise, np.float32)
        shape = (len(prompts) * images_per_prompt, *self.cfg.latent_shape)
        if noise.shape != shape:
            raise JanusFlowError(f"noise: expected shape {shape} (one an image); got {noise.shape}")
        tokens, lengths = inputs.pad(ids, self.text.pad_id)

        def sample(tokens: Any, lengths: Any, noise: Any) -> Any:
            run = programs.trajectory if output == "trajectory" else programs.sample
            return run(
                self.model,
                self.params,
                tokens,
                lengths,
                noise,
                jnp.float32(guidance_scale),
                head=self.text.head,
                sampler=sampler,
            )

        axis = int(output == "trajectory")
        latents = self._batched(sample, tokens, lengths, noise, axis=axis)
        if decodes:
            return self.decode_latents(latents, output)
        _check_finite("generate", latents[-1] if axis else latents)
        return latents

    def prompt_ids(self, prompts: Sequence[str]) -> list[list[int]]:
        """Token ids of prompts for `generate`.

        Raises: JanusFlowError: a prompt and its image are longer than the model's positions.
        """
        ids = [self.text.generation_ids(p) for p in prompts]
        self._check_lengths("prompt", ids, self.cfg.slot_len)
        return ids

    def _check_lengths(self, what: str, ids: Sequence[Any], more: int) -> None:
        """Raises JanusFlowError if ids and `more` positions to generate exceed the limit."""
        limit = self.text.max_length
        for i, x in enumerate(ids):
            if len(x) + more > limit:
                raise JanusFlowError(
                    f"{what} {i}: expected at most {limit} positions (model_max_length of "
                    f"tokenizer_config.json); got {len(x)} of text and images and {more} to "
                    "generate: shorten it or generate less"
                )

    def decode_latents(self, latents: Any, output: str = "pil") -> Any:
        """Scaled latents float32[B, h, w, C] -> images, 'pil' or 'numpy' uint8[B, H, W, 3]."""
        self._require("decoding latents", "vae")
        latents = np.asarray(latents, np.float32)
        if latents.ndim != 4 or latents.shape[1:] != self.cfg.latent_shape or not len(latents):
            raise JanusFlowError(
                f"latents: expected shape (B, *{self.cfg.latent_shape}); got {latents.shape}"
            )
        if output not in ("pil", "numpy"):
            raise JanusFlowError(f"output: expected 'pil' or 'numpy'; got {output!r}")
        decode = functools.partial(programs.latents_to_pixels, self.cfg, self.dtype, self.vae)
        pixels, finite = self._batched(decode, latents)
        images = [Image.fromarray(p) for p in pixels] if output == "pil" else pixels
        _check_finite("generate", latents, finite, images)
        return images

    def encode_image(self, images: ImageLike | Sequence[ImageLike]) -> np.ndarray:
        """Images, cropped to squares -> scaled latents float32[B, h, w, C] (posterior mean)."""
        self._require("encoding images", "vae")
        many = images if isinstance(images, (list, tuple)) else [images]
        if not many:
            raise JanusFlowError("encode_image: expected at least one image; got an empty list")
        size = self.cfg.image_size
        pixels = np.stack([images_lib.for_generation(images_lib.read(x), size) for x in many])
        encode = functools.partial(programs.pixels_to_latents, self.cfg, self.dtype, self.vae)
        latents = self._batched(encode, pixels)
        _check_finite("encode_image", latents)
        return latents

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
          conversation: a question, or turns {'role': 'System' | 'User' | 'Assistant', 'content':
            ...}; a User turn may have 'images'. `<image_placeholder>` marks the place of an image;
            a question without it gets its images in front. A first System turn replaces the default
            prompt; a last Assistant turn with text is continued.
          images: in order; for several conversations a list of lists. Empty if the turns hold them.
          max_new_tokens: longest answer.
          temperature: 0 is greedy.
          top_p: share of probability of nucleus sampling.
          seed: conversation n samples with seed + n.
        Raises:
          JanusFlowError: lists, turns, tags or options that do not fit; too many positions.
          CheckpointError: the model lacks parts that answering needs.
          DivergedError: the logits are non-finite.
        """
        options = (max_new_tokens, temperature, top_p)
        prompts, images, single = self._prompts(conversation, images, *options, seed)
        answers: list[str] = []
        for begin in range(0, len(prompts), MAX_BATCH):
            rows = slice(begin, begin + MAX_BATCH)
            texts = [""]
            for texts in self._stream(prompts[rows], images[rows], *options, seed + begin):  # noqa: B007
                pass
            answers += [text.strip() for text in texts]
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
        """`chat` for one conversation, in pieces as they are generated; joined, they are the answer
        of `chat`."""
        options = (max_new_tokens, temperature, top_p)
        prompts, images, single = self._prompts(conversation, images, *options, seed)
        if not single:
            raise JanusFlowError("stream: expected one conversation; got a list of them: use chat")
        return text_pieces(text for (text,) in self._stream(prompts, images, *options, seed))

    def _prompts(
        self,
        conversation: Any,
        images: Any,
        max_new_tokens: int,
        temperature: float,
        top_p: float,
        seed: int,
    ) -> tuple[list[chat_format.Encoded], list[list[Any]], bool]:
        """Checks the arguments of `chat`; prompts, images, and whether there is a single one."""
        self._require("answering", "llm")
        many, images, single = inputs.conversations(conversation, images, self.text.image_tag)
        inputs.check_chat(max_new_tokens, temperature, top_p, seed, len(many))
        prompts = [
            self.text.conversation(turns, len(own), closed=False, system=system)
            for (system, turns), own in zip(map(inputs.split_system, many), images, strict=True)
        ]
        self._check_lengths("conversation", [p.ids for p in prompts], max_new_tokens)
        return prompts, images, single

    def _stream(
        self,
        prompts: list[chat_format.Encoded],
        images: list[list[Any]],
        max_new_tokens: int,
        temperature: float,
        top_p: float,
        seed: int,
    ) -> Iterator[list[str]]:
        """The whole text so far of every conversation, after each compiled chunk of tokens."""
        slots = self.understanding_slots([x for own in images for x in own])
        eos = self.text.eos_id
        for out in self._tokens(prompts, slots, max_new_tokens, temperature, top_p, seed):
            yield [self.text.decode(inputs.before_eos(row, eos)) for row in out]

    def understanding_slots(self, images: Sequence[ImageLike]) -> Float[Array, "M S D"] | None:
        """The vectors of images in a prompt; M is rounded up to a power of two. None: no images.

        Raises:
          DataError: not an image that can be read.
          CheckpointError: the model lacks parts that understanding needs.
        """
        if not images:
            return None
        self._require("understanding images", *parts_lib.needed_for("understand", self.cfg))
        size = self.cfg.image_size
        pixels = np.stack([images_lib.for_understanding(images_lib.read(x), size) for x in images])
        padded = self._place(inputs.fill(pixels, inputs.batch_bucket(len(pixels))))
        return self._run(programs.encode_images, self.model, self.params, self.vae, padded)

    def greedy_tokens(
        self,
        prompts: Sequence[chat_format.Encoded],
        slots: Float[Array, "M S D"] | None,
        max_new_tokens: int,
    ) -> list[list[int]]:
        """Greedy answers to encoded prompts: the ids, with EOS at the end of a complete answer.

        Args:
          prompts: of `ChatFormat.conversation`.
          slots: the vectors of their images in order, of `understanding_slots`.
        Raises:
          JanusFlowError: too many positions.
          DivergedError: the logits are non-finite.
        """
        self._require("answering", "llm")
        self._check_lengths("prompt", [p.ids for p in prompts], max_new_tokens)
        out = np.zeros((len(prompts), 0), np.int32)
        for out in self._tokens(list(prompts), slots, max_new_tokens, 0.0, 1.0, 0):  # noqa: B007
            pass
        ends = [[*inputs.before_eos(row, self.text.eos_id), self.text.eos_id] for row in out]
        return [ids[:max_new_tokens] for ids in ends]

    def _tokens(
        self,
        prompts: list[chat_format.Encoded],
        slots: Any,
        max_new_tokens: int,
        temperature: float,
        top_p: float,
        seed: int,
    ) -> Iterator[Int[np.ndarray, "B n"]]:
        """All new tokens so far, after each compiled chunk of them."""
        state = self._prefill(prompts, slots, max_new_tokens, seed)
        eos = self.text.eos_id
        out = np.zeros((len(prompts), 0), np.int32)
        while out.shape[1] < max_new_tokens:
            state, tokens = self._run(
                programs.decode,
                self.model,
                self.params,
                state,
                jnp.float32(temperature),
                jnp.float32(top_p),
                num_tokens=CHUNK_TOKENS,
                eos_id=eos,
            )
            if not (finite := np.asarray(state["finite"])[: len(prompts)]).all():
                raise DivergedError(
                    f"chat: expected finite logits; got NaN or infinity in {(~finite).sum()} of "
                    f"{len(prompts)} conversations: {NON_FINITE_ADVICE}"
                )
            out = np.concatenate([out, np.asarray(tokens)[: len(prompts)]], axis=1)
            out = out[:, :max_new_tokens]
            yield out
            if (out == eos).any(1).all():
                return

    def _prefill(
        self, prompts: list[chat_format.Encoded], slots: Any, max_new: int, seed: int
    ) -> Any:
        """The state of decoding after prompts with the vectors of their images, in order."""
        rows = inputs.batch_bucket(len(prompts))
        most = max(len(p.slot_starts) for p in prompts)
        shape = (rows, inputs.batch_bucket(most) if most else 0)
        start, task, index = (np.zeros(shape, np.int32) for _ in range(3))
        number = 0
        for i, prompt in enumerate(prompts):
            for j, position in enumerate(prompt.slot_starts):
                index[i, j], start[i, j], task[i, j] = number, position, UNDERSTAND
                number += 1
        # The buffer holds whole chunks and doubles in size, so that few sizes compile.
        room = CHUNK_TOKENS * inputs.batch_bucket(-(-max_new // CHUNK_TOKENS))
        tokens, lengths = inputs.pad([p.ids for p in prompts], self.text.pad_id)
        tokens, lengths = inputs.fill(tokens, rows), inputs.fill(lengths, rows)
        seeds = ((np.arange(rows) + seed) % inputs.SEED_LIMIT).astype(np.uint32)
        prompt = (tokens, slots, index, start, task, lengths, seeds)
        return self._run(programs.prefill, self.model, self.params, *prompt, max_new=room)

    def _noise(self, seeds: list[int]) -> np.ndarray:
        """float32[B, h, w, C], each row from its own seed alone."""
        padded = inputs.fill(np.asarray(seeds, np.uint32), inputs.batch_bucket(len(seeds)))
        noise = self._run(programs.draw_noise, padded, self.cfg.latent_shape)
        return np.asarray(noise)[: len(seeds)]

    def _require(self, what: str, *parts: str) -> None:
        has = set(self.params) | ({"vae"} if self.vae else set())
        if missing := [p for p in parts if p not in has]:
            raise CheckpointError(
                f"{what}: expected a model with the parts {list(parts)}; "
                f"{self.source or 'this one'} lacks {missing}: load another model"
            )

    def _batched(self, fn: Any, *arrays: np.ndarray, axis: int = 0) -> Any:
        """Runs `fn` on at most MAX_BATCH rows at a time, in few sizes; joins along `axis`."""
        parts = []
        for begin in range(0, len(arrays[0]), MAX_BATCH):
            rows = [x[begin : begin + MAX_BATCH] for x in arrays]
            size = inputs.batch_bucket(len(rows[0]))
            out = self._run(fn, *(self._place(inputs.fill(x, size)) for x in rows))
            real = np.arange(len(rows[0]))
            parts.append(jax.tree.map(lambda x: np.take(np.asarray(x), real, axis=axis), out))  # noqa: B023
        return jax.tree.map(lambda *xs: np.concatenate(xs, axis=axis), *parts)

    def _place(self, x: np.ndarray) -> Any:
        """On a mesh: rows over the devices, if they divide."""
        if self.mesh is None:
            return x
        spec = PartitionSpec(sharding.BATCH, *[None] * (x.ndim - 1))
        return jax.device_put(x, NamedSharding(self.mesh, sharding.fit(spec, x.shape, self.mesh)))

    @numerics.fixed()
    def _run(self, fn: Any, *args: Any, **kwargs: Any) -> Any:
        if self.mesh is None:
            return fn(*args, **kwargs)
        with jax.set_mesh(self.mesh):
            return fn(*args, **kwargs)


def _check_finite(what: str, latents: np.ndarray, finite: Any = True, images: Any = None) -> None:
    """Raises DivergedError that names the non-finite images of latents [B, h, w, C].

    Args:
      finite: bool[B], what else is known of each image.
      images: for the error; default: the latents.
    """
    finite = np.isfinite(latents).all((1, 2, 3)) & finite
    if finite.all():
        return
    images = latents if images is None else images
    raise DivergedError(
        f"{what}: expected finite images; got NaN or infinity in images "
        f"{np.flatnonzero(~finite).tolist()} of {len(finite)}: {NON_FINITE_ADVICE}",
        [x if ok else None for x, ok in zip(images, finite, strict=True)],
    )


def text_pieces(texts: Iterator[str]) -> Iterator[str]:
    """Growing texts -> the pieces by which they grow; joined, they are the last text, stripped."""
    text = sent = ""
    for text in texts:
        text = text.strip()
        # Spaces at the end may be stripped later, and half a character may become another.
        complete = text.rstrip("\ufffd").rstrip()
        if len(complete) > len(sent) and complete.startswith(sent):
            yield complete[len(sent) :]
            sent = complete
    if text != sent:
        yield text[len(sent) :]


JanusFlowPipeline = Pipeline  # the name of 0.1; remove in 0.3
