"""Trains the judge of the suite `emoji` on OpenMoji and saves it for `starts/`.

    python experiments/starts/train_judge.py --data data/openmoji --out starts/emoji_judge

An image tower (a fresh SigLIP) and a text tower (embeddings of class and color, then an MLP) learn
a common space: of the texts of all 1,864 pairs, an image's own must be the nearest (softmax).
Training uses every pair, held-out ones too, in views that the test splits do not have. Half of the
images are reconstructions of the quick start's VAE; all are blurred, shifted and noisy like
generated images. The judge never sees a generated image, nor the SigLIP that REPA aligns with.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from experiments.starts import notice
from janusflow_jax import cli, config as c
from janusflow_jax.checkpoints import model_folder
from janusflow_jax.config import files
from janusflow_jax.config.errors import CheckpointError
from janusflow_jax.data import images, sources
from janusflow_jax.models import encode, vae
from janusflow_jax.openmoji import judge, prompts
from janusflow_jax.openmoji.scores import Label
from janusflow_jax.parallel import numerics
from janusflow_jax.training import optim

EMA = 0.995
SHIFT = 4  # pixels
TEST_VIEW = "-1"  # this view of a held-out pair is for testing


def load(data: str, split: str, size: int) -> tuple[np.ndarray, list[Label], list[str]]:
    """All images of a split, uint8[N, size, size, 3], their labels and ids."""
    source = sources.open_source(data, split)
    records = [source[i] for i in range(len(source))]
    pixels = [images.for_generation(images.decode(r["image"]), size) for r in records]
    labels = [Label(r["class"], r["colour"]) for r in records]
    return np.stack(pixels), labels, [r["id"] for r in records]


def reconstruct(path: str, pixels: np.ndarray) -> np.ndarray:
    """Reconstructions of images by the VAE, uint8."""
    loaded = model_folder.load_model(path)
    params = jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), loaded.vae)
    run = jax.jit(lambda p, x: vae.Vae(loaded.cfg.vae).apply({"params": p}, x))
    out = []
    for i in range(0, len(pixels), 32):
        x = np.pad(pixels[i : i + 32], ((0, max(0, i + 32 - len(pixels))), *[(0, 0)] * 3))
        y = jnp.clip(run(params, encode.to_float(jnp.asarray(x), jnp.float32)), -1, 1)
        out.append(np.asarray(jnp.round((y + 1) * 127.5)).astype(np.uint8))
    return np.concatenate(out)[: len(pixels)]


def augment(key: jax.Array, x: jax.Array) -> jax.Array:
    """Shifts, blurs half of the images, changes contrast and colors a little, adds noise.

    x: float32[B, H, W, 3] in [-1, 1].
    """
    keys = jax.random.split(key, 6)
    b, side = len(x), x.shape[1]
    padded = jnp.pad(x, ((0, 0), (SHIFT, SHIFT), (SHIFT, SHIFT), (0, 0)), constant_values=1.0)
    place = jax.random.randint(keys[0], (b, 2), 0, 2 * SHIFT + 1)
    cut = lambda p, at: jax.lax.dynamic_slice(p, (at[0], at[1], 0), (side, side, 3))  # noqa: E731
    x = jax.vmap(cut)(padded, place)
    each = (b, 1, 1, 1)
    x = jnp.where(jax.random.bernoulli(keys[1], 0.5, each), blurred(x), x)
    gain = jax.random.uniform(keys[2], (b, 1, 1, 3), minval=0.85, maxval=1.1)
    x = 1 - (1 - x) * gain  # white stays white
    x = jnp.where(jax.random.bernoulli(keys[3], 0.5, each), x[:, :, ::-1], x)
    sigma = jax.random.uniform(keys[4], each, maxval=0.15)
    return jnp.clip(x + sigma * jax.random.normal(keys[5], x.shape), -1, 1)


def blurred(x: jax.Array) -> jax.Array:
    """Binomial over 3 x 3 pixels, white outside."""
    p = jnp.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)), constant_values=1.0)
    p = (p[:, :-2] + 2 * p[:, 1:-1] + p[:, 2:]) / 4
    return (p[:, :, :-2] + 2 * p[:, :, 1:-1] + p[:, :, 2:]) / 4


def accuracy(loaded: judge.LoadedJudge, pixels: np.ndarray, labels: list[Label]) -> Any:
    """How often the nearest of all texts is the image's own; has its class; has its color."""
    every = loaded.cfg.labels
    cosines = loaded.embed_images(list(pixels)) @ loaded.embed_texts(every).T
    nearest = [every[i] for i in cosines.argmax(1)]
    pairs = list(zip(nearest, labels, strict=True))
    return {
        "images": len(labels),
        "candidates": len(every),
        "pair": round(float(np.mean([a == b for a, b in pairs])), 4),
        "class": round(float(np.mean([a.name == b.name for a, b in pairs])), 4),
        "color": round(float(np.mean([a.color == b.color for a, b in pairs])), 4),
    }


def train(
    cfg: judge.JudgeConfig,
    args: argparse.Namespace,
    views: tuple[np.ndarray, np.ndarray],
    labels: list[Label],
) -> Any:
    """The EMA of the parameters after `args.steps` steps.

    Args: views: the images, and their reconstructions by the VAE, uint8[N, H, W, 3] each.
    """
    classes, colors = judge.label_indices(cfg, cfg.labels)
    own_class, own_color = judge.label_indices(cfg, labels)
    targets = own_class * len(cfg.colors) + own_color
    key = numerics.key(args.seed)
    params = judge.init_params(cfg, key)
    options = c.OptimConfig(
        name="muon",
        lr=args.lr,
        b2=0.99,
        warmup_steps=50,
        decay_steps=args.steps // 2,
        weight_decay=0.05,
    )
    tx = optim.make_optimizer(options, args.steps)

    def loss_fn(params: Any, x: jax.Array, target: jax.Array) -> Any:
        scores = judge.Judge(cfg).apply({"params": params}, x, classes, colors)
        right = jnp.mean(jnp.argmax(scores, axis=-1) == target)
        return jnp.mean(optax.softmax_cross_entropy_with_integer_labels(scores, target)), right

    @jax.jit
    def step(params: Any, ema: Any, opt: Any, x: jax.Array, target: jax.Array, n: jax.Array) -> Any:
        x = augment(jax.random.fold_in(key, n), encode.to_float(x, jnp.float32))
        (loss, right), grads = jax.value_and_grad(loss_fn, has_aux=True)(params, x, target)
        updates, opt = tx.update(grads, opt, params)
        params = optax.apply_updates(params, updates)
        return params, optim.update_ema(ema, params, EMA, n), opt, (loss, right)

    ema, opt = params, tx.init(params)
    generator, count = np.random.default_rng(args.seed), len(labels)
    order = np.concatenate(
        [generator.permutation(count) for _ in range(args.steps * args.batch // count + 1)]
    )
    began = time.time()
    for n in range(args.steps):
        pick = order[n * args.batch : (n + 1) * args.batch]
        reconstructed = generator.random(len(pick)) < 0.5
        x = np.where(reconstructed[:, None, None, None], views[1][pick], views[0][pick])
        params, ema, opt, (loss, right) = step(params, ema, opt, x, targets[pick], jnp.int32(n))
        if (n + 1) % 100 == 0 or n == 0:
            left = (time.time() - began) / (n + 1) * (args.steps - n - 1) / 60
            print(
                f"step {n + 1}/{args.steps} loss {float(loss):.3f} right {float(right):.2f} "
                f"{left:.1f} min left",
                flush=True,
            )
    return ema


def main(argv: list[str] | None = None) -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    p.add_argument("--data", default="data/openmoji")
    p.add_argument("--vae", default="starts/emoji_vae")
    p.add_argument("--out", default=judge.START)
    p.add_argument("--steps", type=int, default=1500)
    p.add_argument("--batch", type=int, default=64)
    p.add_argument("--lr", type=float, default=3e-3)
    p.add_argument("--layers", type=int, default=4)
    p.add_argument("--patch", type=int, default=8)
    p.add_argument("--seed", type=int, default=0)
    p.add_argument(
        "--overwrite", action="store_true", help="replace a folder that this command wrote"
    )
    args = p.parse_args(argv)
    out = files.resolve(args.out)
    mark, made = (judge.FILE, '"classes"'), (judge.FILE, judge.WEIGHTS, "README.md")
    if problem := files.problem_of_out(out, args.overwrite, mark, made, [args.data, args.vae]):
        raise CheckpointError(problem)
    began = time.time()
    tower = c.SiglipConfig(
        image_size=64,
        patch_size=args.patch,
        width=96,
        num_layers=args.layers,
        num_heads=3,
        mlp_width=384,
    )
    pixels, labels, _ = load(args.data, "train", tower.image_size)
    pairs, pair_labels, ids = load(args.data, "heldout_pairs", tower.image_size)
    known = np.array([not x.endswith(TEST_VIEW) for x in ids])
    pixels = np.concatenate([pixels, pairs[known]])
    labels += [x for x, k in zip(pair_labels, known, strict=True) if k]
    cfg = judge.JudgeConfig(
        image=tower,
        classes=tuple(sorted({x.name for x in labels})),
        colors=tuple(prompts.PALETTE),
    )
    print(f"{len(labels)} images of {len(set(labels))} pairs", flush=True)
    again = reconstruct(args.vae, pixels)
    print(f"reconstructed by the VAE after {time.time() - began:.0f} s", flush=True)
    params = train(cfg, args, (pixels, again), labels)
    judge.save(out, cfg, params, {})
    loaded = judge.load(out)  # scored as shipped, in bfloat16
    views, view_labels, _ = load(args.data, "heldout_views", tower.image_size)
    new = [x for x, k in zip(pair_labels, known, strict=True) if not k]
    soft = np.asarray(
        jnp.round((blurred(encode.to_float(jnp.asarray(views), jnp.float32)) + 1) * 127.5)
    )
    scores = {
        "heldout_views": accuracy(loaded, views, view_labels),
        "heldout_views, VAE": accuracy(loaded, reconstruct(args.vae, views), view_labels),
        "heldout_views, blurred": accuracy(loaded, soft.astype(np.uint8), view_labels),
        "heldout_pairs, a view of its own": accuracy(loaded, pairs[~known], new),
    }
    for name, score in scores.items():
        print(f"{name}: {score}", flush=True)
    options = f"--steps {args.steps} --batch {args.batch} --lr {args.lr} --layers {args.layers}"
    options += f" --patch {args.patch} --seed {args.seed}"
    command = f"python experiments/starts/train_judge.py {options} --out {judge.START}"
    judge.save(out, cfg, params, {"made_by": command, "accuracy": scores})
    purpose = (
        "Two towers that score the images of the quick start (`janusflow_jax/openmoji/judge.py`);\n"
        "no training starts from them."
    )
    notice.write(out, "The judge of the quick start's images", command, purpose)
    print(f"saved to {out} after {(time.time() - began) / 60:.1f} min")


if __name__ == "__main__":
    cli.run(main)
