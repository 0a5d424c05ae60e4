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
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import Array, Float, Int
from PIL import Image

from janusflow_jax.checkpoints import model_folder
from janusflow_jax.config import UNDERSTAND, ModelConfig, SamplerConfig, parts as parts_lib
from janusflow_jax.config.errors import CheckpointError, DivergedError, JanusFlowError
from janusflow_jax.data import chat_format, images as images_lib, samples
from janusflow_jax.hub import adapters, download
from janusflow_jax.models import int8 as int8_lib, janusflow, llama
from janusflow_jax.parallel import compile_cache, numerics, sharding
from janusflow_jax.sampling import flow, inputs, programs

CHUNK_TOKENS = 16
MAX_BATCH = programs.IMAGES_AT_ONCE
DTYPES = ("float32", "bfloat16")

ImageLike = Any
"""What `data.images.read` reads: a path, bytes, a file, a PIL image, or uint8[H, W, 3]."""

OnStep = Callable[[int, float, np.ndarray], Any]
"""(step, from 0; time of the latents, 0 noise to 1 image; latents float32[B, h, w, C]) -> None, or
latents that replace them. An exception ends the generation."""

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
      path: a model folder, the workdir of a training run, or one of its checkpoints; or
        hf://organization/name[@revision], a published JanusFlow, which is downloaded and converted
        once (`hub.download`).
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
    if download.is_repository(path):
        path = download.model_of(path)
    elif advice := download.advice(path):
        raise CheckpointError(f"{path}: expected a model folder; got no such folder: {advice}")
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


@dataclasses.dataclass(frozen=True, eq=False)
class Images:
    """What `Pipeline.__call__` returns."""

    images: Any
    seeds: list[int] | None
    """Of the images; None if their noise was given."""


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
        guidance_scale: float | int | None = None,
        num_steps: int | None = None,
        order: int = 1,
        shift: float = 1.0,
        guidance_interval: tuple[float, float] = (0.0, 1.0),
        seed: int | Sequence[int] = 0,
        images_per_prompt: int = 1,
        best_of: int = 1,
        noise: Any = None,
        output: str = "pil",
        on_step: OnStep | None = None,
        cfg_weight: float | None = None,
    ) -> Any:
        """Generates images, prompt by prompt.

        Args:
          guidance_scale: of classifier-free guidance; 1 runs the conditional branch only. None: 2;
            of a student 1.
          num_steps: of the solver. None: 30; of a student its own.
          order: 1 is Euler's method; 2 is Adams-Bashforth, more accurate at the same cost.
          shift: of the times of the steps; above 1: more of them near noise (docs/sampling.md).
          guidance_interval: the times at which guidance acts, from 0 (noise) to 1 (image); outside
            the conditional branch runs alone.
          seed: image n of the output gets seed + n; a list has the first seed of each prompt. In
            batches of one shape (`inputs.batch_shape`) the other prompts change no bit of an image.
          images_per_prompt: number of images of each prompt.
          best_of: every image of the output is that one of so many, with consecutive seeds, for
            which the model finds the prompt most likely (`caption_scores`).
          noise: float32[B, h, w, C], instead of noise drawn from the seeds.
          output: 'pil'; 'numpy' uint8[B, H, W, 3]; 'latent' float32[B, h, w, C], scaled;
            'trajectory' float32[N + 1, B, h, w, C], the noise first.
          on_step: called after every step, for at most MAX_BATCH images (`OnStep`).
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
        sampler, guidance_scale = inputs.check_generate(
            prompts,
            images_per_prompt,
            output,
            guidance_scale,
            num_steps,
            order,
            shift,
            guidance_interval,
            self.cfg.student,
        )
        inputs.check_best_of(best_of, output)
        if guidance_scale == 1:
            sampler = dataclasses.replace(sampler, guide_until=0.0)
        decodes = output in ("pil", "numpy")
        images_per_prompt *= best_of
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
        if on_step is not None and (output == "trajectory" or len(ids) > MAX_BATCH):
            raise JanusFlowError(
                "on_step: expected another output than 'trajectory', and at most "
                f"{MAX_BATCH} images; got output {output!r} and {len(ids)} images"
            )

        def sample(tokens: Any, lengths: Any, noise: Any) -> Any:
            if on_step is not None:
                prompt = (tokens, lengths)
                return self._step_by_step(prompt, noise, len(ids), guidance_scale, sampler, on_step)
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
        if best_of > 1:
            pixels = self.decode_latents(latents, "numpy")
            labels = [p for p in prompts for _ in range(images_per_prompt)]
            scores = self.caption_scores(list(pixels), labels).reshape(-1, best_of)
            best = np.arange(len(scores)) * best_of + scores.argmax(1)
            if output == "pil":
                return [Image.fromarray(p) for p in pixels[best]]
            return pixels[best] if decodes else latents[best]
        if decodes:
            return self.decode_latents(latents, output)
        _check_finite("generate", latents[-1] if axis else latents)
        return latents

    def _step_by_step(
        self,
        prompt: tuple[Any, Any],
        noise: Any,
        count: int,
        guidance_scale: float,
        sampler: SamplerConfig,
        on_step: OnStep,
    ) -> np.ndarray:
        """`programs.sample`, a call of `programs.step` for each step.

        Args:
          prompt: tokens and lengths, also of rows that only fill the batch.
          count: of the rows that are images.
        """
        z = jnp.asarray(noise)
        before = jnp.zeros_like(z) if sampler.order == 2 else None
        times = flow.step_times(sampler)
        h, half_r = flow.coefficients(sampler)
        for k, guided in enumerate(flow.guided_steps(sampler)):
            z, before = self._run(
                programs.step,
                self.model,
                self.params,
                *prompt,
                z,
                before,
                (times[k], times[k + 1], h[k], half_r[k]),
                jnp.float32(guidance_scale),
                head=self.text.head,
                guided=bool(guided),
            )
            latents = np.asarray(z)[:count]
            replaced = on_step(k, float(times[k + 1]), latents)
            if replaced is not None:
                replaced = np.asarray(replaced, np.float32)
                if replaced.shape != latents.shape:
                    raise JanusFlowError(
                        f"on_step: expected latents of shape {latents.shape} or None; got "
                        f"{replaced.shape}"
                    )
                z = jnp.asarray(inputs.fill(replaced, len(z)))
        return np.asarray(z)

    def __call__(
        self,
        prompt: str | Sequence[str],
        *,
        num_inference_steps: int | None = None,
        guidance_scale: float | int | None = None,
        num_images_per_prompt: int = 1,
        generator: Any = None,
        latents: Any = None,
        output_type: str = "pil",
        negative_prompt: Any = None,
        height: int | None = None,
        width: int | None = None,
        callback_on_step_end: Any = None,
    ) -> Images:
        """`generate` under the argument names of diffusers' pipelines.

        Args:
          generator: the seed of the first image, or a list with one for each image; seeds, or
            objects with `initial_seed()`, such as torch.Generator. None: a random seed.
          latents: noise, float32[B, h, w, C].
          output_type: 'pil', 'np' (float32[B, H, W, 3] from 0 to 1) or 'latent'.
          negative_prompt, height, width: None, or the model's size; it has no other.
          callback_on_step_end: called after every step as f(pipeline, step, time, {'latents':
            ...}), with the time of the latents, from 0 (noise) to 1 (image). May return {'latents':
            others}.
        Raises: as `generate`.
        """
        size = self.cfg.image_size
        if negative_prompt not in (None, "", []) or {height, width} - {None, size}:
            raise JanusFlowError(
                f"generate: expected no negative_prompt, and height and width of {size} (the "
                f"model's) or none; got {negative_prompt!r}, {height} and {width}"
            )
        outputs = {"pil": "pil", "np": "numpy", "latent": "latent"}
        if output_type not in outputs:
            raise JanusFlowError(
                f"output_type: expected one of {list(outputs)}; got {output_type!r}"
            )
        prompts = [prompt] if isinstance(prompt, str) else prompt
        prompts = list(prompts) if np.iterable(prompts) else []
        inputs.check_generate(prompts, num_images_per_prompt)
        prompts = [x for x in prompts for _ in range(num_images_per_prompt)]
        seed = inputs.generator_seeds(generator, len(prompts))

        def on_step(step: int, time: float, latents: np.ndarray) -> Any:
            changed = callback_on_step_end(self, step, time, {"latents": latents})
            return (changed or {}).get("latents")

        images = self.generate(
            prompts,
            guidance_scale=guidance_scale,
            num_steps=num_inference_steps,
            seed=seed,
            noise=latents,
            output=outputs[output_type],
            on_step=None if callback_on_step_end is None else on_step,
        )
        if output_type == "np":
            images = images.astype(np.float32) / 255
        return Images(images, None if latents is not None else seed)

    def vary(
        self,
        images: ImageLike | Sequence[ImageLike],
        prompts: str | Sequence[str],
        *,
        strength: float = 0.6,
        seed: int | Sequence[int] = 0,
        output: str = "pil",
        **solver: Any,
    ) -> Any:
        """Generates images that start from others (SDEdit, arXiv 2108.01073; image-to-image).

        Args:
          images: cropped to squares; one for each prompt.
          strength: share of the steps that are generated again: 1 is `generate` and ignores the
            images, 0 gives them back as the VAE decodes them.
          seed: as of `generate`.
          output: 'pil', 'numpy' or 'latent', as of `generate`.
          solver: `guidance_scale`, `num_steps`, `order`, `shift` and `guidance_interval` of
            `generate`.
        Raises: as `generate`; DataError: an image that cannot be read.
        """
        return self._resample(images, None, prompts, strength, seed, output, solver)

    def inpaint(
        self,
        images: ImageLike | Sequence[ImageLike],
        masks: Any,
        prompts: str | Sequence[str],
        *,
        strength: float = 1.0,
        seed: int | Sequence[int] = 0,
        output: str = "pil",
        **solver: Any,
    ) -> Any:
        """Generates the marked part of images again and keeps the pixels of the rest.

        Args:
          masks: one for each image and of its size; white, transparent or True pixels are generated
            again (`data.images.read_mask`).
          images, prompts, strength, seed, output, solver: as of `vary`.
        Raises: as `vary`; DataError: a mask of another size, or without a marked pixel.
        """
        masks, prompts = inputs.pairs("inpaint", masks, prompts, "masks")
        return self._resample(images, masks, prompts, strength, seed, output, solver)

    def _resample(
        self,
        images: Any,
        masks: list[Any] | None,
        prompts: Any,
        strength: Any,
        seed: Any,
        output: str,
        solver: dict[str, Any],
    ) -> Any:
        """`vary`, or `inpaint` if there are masks."""
        what = "vary" if masks is None else "inpaint"
        images, prompts = inputs.pairs(what, images, prompts)
        sampler, scale, first = inputs.check_edit(
            what, prompts, strength, output, self.cfg.student, **solver
        )
        if scale == 1:
            sampler = dataclasses.replace(sampler, guide_until=0.0)
        self._require(what, *parts_lib.needed_for("generate", self.cfg), "vae")
        ids = self.prompt_ids(prompts)
        noise = self._noise(inputs.image_seeds(seed, len(prompts), 1))
        originals = [images_lib.read(x) for x in images]
        size, keep = self.cfg.image_size, ()
        marked = np.ones((len(images), size, size, 1), bool)
        if masks is not None:
            for i, (mask, image) in enumerate(zip(masks, originals, strict=True)):
                marked[i, ..., 0] = images_lib.read_mask(mask, image.shape[:2], size)
            side = self.cfg.latent_shape[0]
            keep = (~np.stack([images_lib.mask_cells(m[..., 0], side) for m in marked]),)
        tokens, lengths = inputs.pad(ids, self.text.pad_id)

        def run(tokens: Any, lengths: Any, noise: Any, x: Any, keep: Any = None) -> Any:
            prompt = (self.model, self.params, tokens, lengths)
            options: Any = {"sampler": sampler, "first": first, "head": self.text.head}
            return programs.resample(*prompt, noise, x, keep, jnp.float32(scale), **options)

        x = self.encode_image(originals)
        latents = self._batched(run, tokens, lengths, noise, x, *keep)
        if output == "latent":
            _check_finite(what, latents)
            return latents
        pixels = self.decode_latents(latents, "numpy")
        squares = np.stack([images_lib.for_generation(x, size) for x in originals])
        pixels = np.where(marked, pixels, squares)
        return [Image.fromarray(p) for p in pixels] if output == "pil" else pixels

    def edit(
        self,
        images: ImageLike | Sequence[ImageLike],
        prompts: str | Sequence[str],
        *,
        sources: str | Sequence[str] | None = None,
        source_guidance_scale: float = 2.0,
        strength: float = 1.0,
        seed: int | Sequence[int] = 0,
        output: str = "pil",
        **solver: Any,
    ) -> Any:
        """Changes what the prompts change and keeps the rest (FlowEdit, arXiv 2412.08629).

        Args:
          images: cropped to squares; one for each prompt.
          prompts: what the images will show.
          sources: what they show now; None: as `describe` says.
          source_guidance_scale: of the sources. The paper's authors take 1.5 to 3.5 here and 5 to
            14 for `guidance_scale`, with a strength of 0.65 to 0.85; their models are other ones.
          strength: share of the steps that change the image; 0 changes nothing.
          seed: as of `generate`.
          output: 'pil', 'numpy' or 'latent', as of `generate`.
          solver: `guidance_scale`, `num_steps`, `shift` and `guidance_interval` of `generate`.
        Raises: as `vary`.
        """
        images, prompts = inputs.pairs("edit", images, prompts)
        if self.cfg.student.steps:
            raise JanusFlowError(
                "edit: expected a model with velocities; got a student, which has steps: use its "
                "teacher"
            )
        sampler, scale, first = inputs.check_edit(
            "edit", prompts, strength, output, self.cfg.student, **solver
        )
        if sampler.order != 1:
            raise JanusFlowError(
                "edit: expected order 1, because the noise is new at every step; got 2"
            )
        if scale == source_guidance_scale == 1:
            sampler = dataclasses.replace(sampler, guide_until=0.0)
        self._require("edit", *parts_lib.needed_for("generate", self.cfg), "vae")
        originals = [images_lib.read(x) for x in images]
        sources = self.describe(originals) if sources is None else sources
        sources, _ = inputs.pairs("edit", sources, prompts, "sources")
        if empty := [i for i, words in enumerate(sources) if not str(words).strip()]:
            raise JanusFlowError(
                f"edit: expected words for what image {empty[0]} shows now; got none, from you or "
                "from the model: say it (sources, --source)"
            )
        inputs.check_generate(sources, 1, guidance_scale=source_guidance_scale)
        tokens, lengths = inputs.pad(self.prompt_ids(sources + prompts), self.text.pad_id)
        seeds = np.asarray(inputs.image_seeds(seed, len(prompts), 1), np.uint32)

        def run(source: Any, target: Any, lengths: Any, seeds: Any, x: Any) -> Any:
            scales = jnp.repeat(jnp.float32([source_guidance_scale, scale]), len(x))
            prompt = (jnp.concatenate([source, target]), lengths.T.reshape(-1))
            options: Any = {"sampler": sampler, "first": first, "head": self.text.head}
            return programs.edit(self.model, self.params, *prompt, seeds, x, scales, **options)

        source, target = np.split(tokens, 2)
        lengths = np.stack(np.split(lengths, 2), 1)
        x = self.encode_image(originals)
        latents = self._batched(run, source, target, lengths, seeds, x)
        if output != "latent":
            return self.decode_latents(latents, output)
        _check_finite("edit", latents)
        return latents

    def describe(self, images: Sequence[ImageLike]) -> list[str]:
        """What the model sees in each image, as a prompt; greedy."""
        return self.chat([samples.QUESTION] * len(images), [[image] for image in images])

    def prompt_ids(self, prompts: Sequence[str]) -> list[list[int]]:
        """Token ids of prompts for `generate`.

        Raises:
          JanusFlowError: a prompt and its image are longer than the model's positions.
          CheckpointError: the model has no language model.
        """
        self._require("generating", "llm")
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

    def caption_scores(
        self, images: Sequence[ImageLike], captions: Sequence[str]
    ) -> Float[np.ndarray, " n"]:
        """The log-likelihood of each caption as the model's answer to what its image shows.

        Compares images for one caption; between captions the longer one is less likely.

        Raises: as `chat`.
        """
        self._require("scoring captions", "llm")
        images, captions = inputs.pairs("caption_scores", images, captions)
        turns = [{"role": "User", "content": f"{self.text.image_tag}\n{samples.QUESTION}"}]
        prompts = [
            self.text.conversation([*turns, {"role": "Assistant", "content": [caption]}], 1)
            for caption in captions
        ]
        self._check_lengths("caption", [p.ids for p in prompts], 0)
        scores = []
        for begin in range(0, len(prompts), MAX_BATCH):
            batch = prompts[begin : begin + MAX_BATCH]
            tokens, index, start, task, _ = self._rows(batch)
            targets = np.zeros(tokens.shape, bool)
            for row, prompt in zip(targets, batch, strict=False):
                row[: len(prompt.ids)] = prompt.target_mask
            most = inputs.length_bucket(max(int(p.target_mask.sum()) for p in batch))
            slots = self.understanding_slots(images[begin : begin + MAX_BATCH])
            rows = (tokens, slots, index, start, task, targets)
            got = self._run(
                programs.log_likelihood,
                self.model,
                self.params,
                *rows,
                most=min(most, tokens.shape[1]),
            )
            scores.append(np.asarray(got)[: len(batch)])
        return np.concatenate(scores)

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
        tokens, index, start, task, lengths = self._rows(prompts)
        rows = len(tokens)
        # The buffer holds whole chunks and doubles in size, so that few sizes compile.
        room = CHUNK_TOKENS * inputs.batch_bucket(-(-max_new // CHUNK_TOKENS))
        seeds = ((np.arange(rows) + seed) % inputs.SEED_LIMIT).astype(np.uint32)
        prompt = (tokens, slots, index, start, task, lengths, seeds)
        return self._run(programs.prefill, self.model, self.params, *prompt, max_new=room)

    def _rows(self, prompts: list[chat_format.Encoded]) -> tuple[np.ndarray, ...]:
        """Rows of a program: tokens [B, P], the numbers of the images in order, the starts and
        tasks of their slots [B, K], and lengths [B]."""
        rows = inputs.batch_bucket(len(prompts))
        most = max(len(p.slot_starts) for p in prompts)
        shape = (rows, inputs.batch_bucket(most) if most else 0)
        start, task, index = (np.zeros(shape, np.int32) for _ in range(3))
        number = 0
        for i, prompt in enumerate(prompts):
            for j, position in enumerate(prompt.slot_starts):
                index[i, j], start[i, j], task[i, j] = number, position, UNDERSTAND
                number += 1
        tokens, lengths = inputs.pad([p.ids for p in prompts], self.text.pad_id)
        return inputs.fill(tokens, rows), index, start, task, inputs.fill(lengths, rows)

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
        if piece := inputs.next_piece(text, sent, complete=False):
            yield piece
            sent += piece
    if piece := inputs.next_piece(text, sent, complete=True):
        yield piece


JanusFlowPipeline = Pipeline  # the name of 0.1; remove in 0.3
