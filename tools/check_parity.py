"""Compares our model with PyTorch on the same weights, layer by layer.

    pip install -e '.[dev]'
    python tools/check_parity.py --janusflow DIR --vae DIR [--model CONVERTED] [--steps 4]

DIR: the folders as published. Our side is CONVERTED, the folder that `tools/convert_checkpoint.py`
wrote; without it, they are converted into a temporary folder. The other side is
`tools/torch_reference.py`: transformers' Llama, diffusers' AutoencoderKL, the rest in plain torch.
Both compute in float32, ours on JAX's device, theirs on the CPU. The row of a part gets the
reference's inputs. Answers, latents and images are computed by each side from the tokens on, so
that differences of the parts add up. One model is in memory at a time. By arithmetic, not measured:
1.3B takes about 20 GB and, on two cores, a minute a step.

Exit status: 0 if every row agrees, 1 if one does not, 2 if there is nothing to compare.
"""

from __future__ import annotations

import argparse
import dataclasses
import gc
import operator
import tempfile
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image, ImageDraw

from janusflow_jax import cli, hub, pipeline
from janusflow_jax.config import UNDERSTAND
from janusflow_jax.config.errors import JanusFlowError
from janusflow_jax.data import images
from janusflow_jax.models import encode, siglip, vae
from janusflow_jax.sampling import image as image_sampling, text as text_sampling

PART, WHOLE = 1e-5, 5e-5
"""Largest relative differences (max |a - b| / max |b|). Anything above is a bug, not rounding."""


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    p = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    p.add_argument("--janusflow", required=True, metavar="DIR", help="the published JanusFlow")
    p.add_argument("--vae", required=True, metavar="DIR", help="the SDXL-VAE, diffusers' form")
    p.add_argument("--model", metavar="CONVERTED", help="our side; default: convert now")
    p.add_argument("--image", metavar="FILE", help="an image to ask about; default: one is drawn")
    p.add_argument("--question", default="What is in the picture?")
    p.add_argument("--prompt", default="A red fox sits in the snow beside a quiet river.")
    p.add_argument("--steps", type=int, default=30, help="Euler steps; default 30")
    p.add_argument("--guidance-scale", type=float, default=2.0, help="default 2")
    p.add_argument("--cfg", dest="guidance_scale", type=float, help=argparse.SUPPRESS)  # old name
    p.add_argument("--tokens", type=int, default=24, help="most greedy tokens; default 24")
    p.add_argument("--seed", type=int, default=0, help="seed of the noise")
    return p.parse_args(argv)


def draw_scene() -> Image.Image:
    """An image wider than high: a sun over a hill."""
    image = Image.new("RGB", (200, 130), (120, 180, 240))
    pen = ImageDraw.Draw(image)
    pen.ellipse((130, 15, 170, 55), fill=(250, 220, 60))
    pen.polygon([(0, 130), (70, 50), (150, 130)], fill=(60, 140, 70), outline=(0, 0, 0))
    return image


def load_ours(args: argparse.Namespace) -> pipeline.Pipeline:
    """Our model in float32: a converted folder, or the published ones converted now."""
    if args.model:
        return pipeline.load(args.model, dtype="float32")
    with tempfile.TemporaryDirectory() as folder:
        hub.convert(args.janusflow, args.vae, f"{folder}/model", log=lambda line: None)
        return pipeline.load(f"{folder}/model", dtype="float32")


@dataclasses.dataclass
class Table:
    """Rows of comparisons, printed as they are added."""

    failed: int = 0
    rows: int = 0

    def add(self, name: str, got: Any, want: Any, limit: float) -> None:
        """Compares arrays of floats by their largest difference."""
        got, want = np.asarray(got), np.asarray(want)
        if got.shape != want.shape:
            return self._print(name, f"shape {got.shape}", f"not {want.shape}", "", False)
        absolute = float(np.abs(got - want).max())
        relative = absolute / max(float(np.abs(want).max()), 1e-30)
        ok = bool(np.isfinite(got).all()) and relative <= limit
        return self._print(name, f"{absolute:.1e}", f"{relative:.1e}", f"{limit:.0e}", ok)

    def same(self, name: str, got: Any, want: Any) -> None:
        """Compares ids or text, which must be equal."""
        got, want = list(got), list(want)
        equal = sum(a == b for a, b in zip(got, want, strict=False))
        share = f"{equal}/{max(len(got), len(want))}"
        self._print(name, share, "", "equal", got == want)

    def _print(self, name: str, absolute: str, relative: str, limit: str, ok: bool) -> None:
        self.rows, self.failed = self.rows + 1, self.failed + (not ok)
        verdict = "ok" if ok else "FAIL"
        print(f"{name:34} {absolute:>12} {relative:>12} {limit:>8}  {verdict}", flush=True)


def compare_understanding(
    table: Table,
    ours: pipeline.Pipeline,
    want: dict[str, Any],
    args: argparse.Namespace,
    image: Image.Image,
) -> None:
    model, params, cfg = ours.model, ours.params, ours.cfg
    run = lambda method, *a, **k: jax.jit(  # noqa: E731
        lambda p, a: model.apply({"params": p}, *a, method=method, **k)
    )(params, a)
    array = images.for_understanding(images.read(image), cfg.image_size)
    turns = [{"role": "user", "content": f"{ours.text.image_tag}\n{args.question}"}]
    prompt = ours.text.conversation(turns, 1)
    table.same("question: token ids", prompt.ids.tolist(), want["ids"])
    pixels = np.asarray(encode.to_float(jnp.asarray(array), jnp.float32))
    table.add("image: pixels", pixels[None], want["pixels"], PART)
    pixels = jnp.asarray(want["pixels"])
    for count in range(1, cfg.und.num_layers + 1):
        part = dataclasses.replace(cfg.und, num_layers=count, final_norm=False)
        tower = dict(params["und_encoder"])
        tower["layers"] = jax.tree.map(operator.itemgetter(slice(count)), tower["layers"])
        got = jax.jit(siglip.Siglip(part).apply)({"params": tower}, pixels)
        table.add(f"SigLIP: block {count}", got, want["siglip"][count], PART)
    table.add("SigLIP: features", run("siglip", pixels), want["siglip"][-1], PART)
    slots = jax.jit(lambda p, x: text_sampling.encode_images(model, p, x))(params, pixels)[None]
    ids = jnp.asarray(want["ids"])[None]
    start, task = jnp.asarray([prompt.slot_starts]), jnp.asarray([[UNDERSTAND]])
    x = text_sampling.embed_prompt(model, params, ids, slots, start, task)
    table.add("LLM: input", x, want["embeds"], PART)
    mask = jnp.tril(jnp.ones((1, x.shape[1], x.shape[1]), bool))
    positions = jnp.arange(x.shape[1])[None]
    hidden, _, blocks = run("run_llm", jnp.asarray(want["embeds"]), positions, mask, keep="hidden")
    for i, state in enumerate(blocks[:-1], 1):
        table.add(f"LLM: block {i}", state, want["hidden"][i], PART)
    table.add("LLM: last block and final norm", hidden, want["hidden"][-1], PART)
    table.add("LLM: logits", run("logits", hidden), want["logits"], PART)
    lengths, keys = jnp.asarray([x.shape[1]]), jax.random.split(jax.random.key(0), 1)
    state = jax.jit(lambda p, x: text_sampling.prefill(model, p, x, lengths, keys, args.tokens))(
        params, x
    )
    _, tokens = jax.jit(
        lambda p, s: text_sampling.decode(
            model,
            p,
            s,
            jnp.float32(0),
            jnp.float32(1),
            num_tokens=args.tokens,
            eos_id=ours.text.eos_id,
        )
    )(params, state)
    table.same(
        "answer: greedy tokens", np.asarray(tokens)[0][: len(want["tokens"])], want["tokens"]
    )
    answer = ours.chat(args.question, [image], max_new_tokens=args.tokens)
    table.same("answer: text", answer, ours.text.decode(want["tokens"]).strip())


def compare_generation(
    table: Table, ours: pipeline.Pipeline, want: dict[str, Any], args: argparse.Namespace
) -> None:
    model, params = ours.model, ours.params
    ids = ours.text.generation_ids(args.prompt)
    table.same("prompt: token ids", ids, want["ids"])
    noise = jnp.asarray(want["trajectory"][0])

    @jax.jit
    def first(p: Any, hidden: Any) -> Any:
        run = {"params": p}
        _, features, t_emb = model.apply(run, noise, jnp.zeros((1,)), method="generation_slot")
        twice = [jnp.concatenate([x, x]) for x in (features, t_emb)]
        part = model.apply(run, hidden, *twice, method="velocity")
        tokens, lengths = jnp.asarray([want["ids"]]), jnp.asarray([len(want["ids"])])
        field = image_sampling.velocity_field(model, p, tokens, lengths, ours.text.head)
        return features, t_emb, part, field(noise, jnp.float32(0), jnp.float32(0), True)

    features, t_emb, part, (cond, uncond) = first(params, jnp.asarray(want["hidden"]))
    table.add("generation encoder: features", features, want["features"], PART)
    table.add("generation encoder: time", t_emb, want["t_emb"], PART)
    table.add("generation decoder: velocity", part, want["velocity"], PART)
    table.add("first step: conditional velocity", cond, want["velocity"][:1], PART)
    table.add("first step: unconditional velocity", uncond, want["velocity"][1:], PART)
    options = {"noise": noise, "num_steps": args.steps, "guidance_scale": args.guidance_scale}
    path = ours.generate(args.prompt, output="trajectory", **options)
    for k in sorted({1, args.steps // 4, args.steps // 2, args.steps} - {0}):
        table.add(f"latents: step {k}", path[k], want["trajectory"][k], WHOLE)
    module = vae.Vae(ours.cfg.vae)
    decode_vae = jax.jit(lambda p, z: module.apply({"params": p}, z, method="decode"))
    latents = vae.unscale(ours.cfg.vae, jnp.asarray(want["trajectory"][-1]))
    decoded = decode_vae(ours.vae, latents)
    table.add("VAE: decoded latents", jnp.clip(decoded, -1, 1), want["image"], PART)
    pixels = ours.generate(args.prompt, output="numpy", **options).astype(np.float32)
    expected = np.round((want["image"] + 1) * 127.5)
    table.add("image: pixels, 0 to 255", pixels, expected, 1.001 / 255)  # one step of rounding


def compare_encoder(
    table: Table, ours: pipeline.Pipeline, pixels: np.ndarray, want: np.ndarray
) -> None:
    module = vae.Vae(ours.cfg.vae)
    encode_vae = jax.jit(lambda p, x: module.apply({"params": p}, x, method="encode")[0])
    latents = vae.scale(ours.cfg.vae, encode_vae(ours.vae, jnp.asarray(pixels)))
    table.add("VAE: encoded image", latents, want, WHOLE)


def main(argv: list[str] | None = None) -> int:
    """Returns the exit status."""
    args = parse(argv)
    try:
        import torch_reference
    except ImportError as error:
        raise JanusFlowError(
            f"expected the extra `dev` (pip install -e '.[dev]'); {error}"
        ) from error
    jax.config.update("jax_default_matmul_precision", "highest")
    image = Image.open(args.image).convert("RGB") if args.image else draw_scene()
    # One model in memory at a time: first all of theirs, then ours.
    reference = torch_reference.Reference(args.janusflow, args.vae)
    side = reference.image_size // 2 ** (len(reference.vae.config.block_out_channels) - 1)
    shape = (1, side, side, reference.vae.config.latent_channels)
    noise = np.random.default_rng(args.seed).standard_normal(shape, np.float32)
    understood = reference.understand(image, args.question, args.tokens)
    generated = reference.generate(args.prompt, noise, args.steps, args.guidance_scale)
    latents = reference.encode(understood["pixels"])
    del reference
    gc.collect()
    ours, table = load_ours(args), Table()
    print(f"{'':34} {'max |a-b|':>12} {'/ max |b|':>12} {'limit':>8}")
    compare_understanding(table, ours, understood, args, image)
    compare_generation(table, ours, generated, args)
    compare_encoder(table, ours, understood["pixels"], latents)
    print(f"{table.rows - table.failed} of {table.rows} rows agree")
    return int(table.failed > 0)


if __name__ == "__main__":
    cli.run(main, error_code=2)
