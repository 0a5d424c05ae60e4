"""Trains the quick start's VAE on OpenMoji and saves it for `starts/`, in three runs.

    python experiments/starts/train_vae.py --out starts/emoji_vae
    python experiments/starts/train_vae.py --out starts/emoji_vae --overwrite \\
        --decoder-of starts/emoji_vae --noise 0.5 --batch 8 --lr 0.001 --steps 1200
    python experiments/starts/train_vae.py --out starts/emoji_vae --overwrite \\
        --start starts/emoji_vae --noise 0.5 --half-weight 0.5 --batch 8 --lr 0.001 --steps 700

The architecture is SDXL's at small widths. The loss is L1 and squared error of pixels, L1 of their
local means (color) and of the differences between neighbors (edges), and a small KL term. JanusFlow
multiplies latents by SDXL's 0.13025. So an affine map per channel is folded into quant_conv at the
end, and its inverse into post_quant_conv: the scaled latents of the training images then have mean
0 and variance 1, and reconstructions do not change.
"""

from __future__ import annotations

import argparse
import functools
import sys
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from etils import epath

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from experiments.starts import notice
from janusflow_jax import cli, config as c
from janusflow_jax.checkpoints import model_folder
from janusflow_jax.data import images, sources
from janusflow_jax.eval import sheet
from janusflow_jax.models import encode, vae
from janusflow_jax.parallel import numerics
from janusflow_jax.training import optim

EMA = 0.995
DECODER = ("decoder", "post_quant_conv")
MAKER = "experiments/starts/train_vae.py"
FURTHER = {"decoder": "--decoder-of", "start": "--start"}  # options of a run, by its name in meta


def load_split(data: str, split: str, size: int) -> np.ndarray:
    """All images of a split, uint8[N, size, size, 3]."""
    source = sources.open_source(data, split)
    decoded = (images.decode(source[i]["image"]) for i in range(len(source)))
    return np.stack([images.for_generation(x, size) for x in decoded])


def augment(key: jax.Array, x: jax.Array) -> jax.Array:
    """Mirrors half of the images."""
    return jnp.where(jax.random.bernoulli(key, 0.5, (len(x), 1, 1, 1)), x[:, :, ::-1], x)


def pool(x: jax.Array, size: int) -> jax.Array:
    """Means over size x size squares."""
    b, h, w, n = x.shape
    return jnp.mean(x.reshape(b, h // size, size, w // size, size, n), axis=(2, 4))


def pixel_loss(error: jax.Array) -> tuple[jax.Array, dict[str, jax.Array]]:
    """L1 + MSE + L1 of 4x4 and 8x8 means + edge L1 of float32[B, H, W, 3], and the four alone.

    With L1 on pixels alone, colors are learned long after outlines: the median is a gray image.
    """
    edges = jnp.mean(jnp.abs(jnp.diff(error, axis=1))) + jnp.mean(jnp.abs(jnp.diff(error, axis=2)))
    l1, mse = jnp.mean(jnp.abs(error)), jnp.mean(error**2)
    color = jnp.mean(jnp.abs(pool(error, 4))) + jnp.mean(jnp.abs(pool(error, 8)))
    loss = l1 + mse + color + 0.25 * edges
    return loss, {"l1": l1, "mse": mse, "color": color, "edges": edges}


def loss_fn(
    params: Any,
    x: jax.Array,
    key: jax.Array,
    cfg: c.VaeConfig,
    kl_weight: float,
    noise: float,
    half_weight: float,
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """`pixel_loss` of reconstructions + KL. x: float32[B, H, W, 3] in [-1, 1].

    Args:
      noise: if > 0, half of the images are decoded from latents with noise, whose deviation is
        uniform in [0, noise] relative to the channel's; the encoder gets no gradient from these.
      half_weight: of the loss of latents at half the resolution, which should decode to the image
        at half the resolution (EQ-VAE, arXiv 2502.09509).
    """
    module, variables = vae.Vae(cfg), {"params": params}
    mean, logvar = module.apply(variables, x, method="encode")
    posterior, deviation, normal = jax.random.split(key, 3)
    latents = mean + jnp.exp(0.5 * logvar) * jax.random.normal(posterior, mean.shape)
    z, noisy = latents, len(x) // 2 if noise else 0
    if noise:
        std = noise * jax.random.uniform(deviation, (noisy, 1, 1, 1)) * jnp.std(mean, (0, 1, 2))
        spoiled = mean[:noisy] + std * jax.random.normal(normal, mean[:noisy].shape)
        z = jnp.concatenate([jax.lax.stop_gradient(spoiled), latents[noisy:]])
    loss, out = pixel_loss(module.apply(variables, z, method="decode") - x)
    if half_weight:
        again = module.apply(variables, pool(latents, 2), method="decode")
        half, _ = pixel_loss(again - pool(x, 2))
        loss, out = loss + half_weight * half, {**out, "half": half}
    kl = 0.5 * jnp.mean(jnp.sum(mean**2 + jnp.exp(logvar) - 1 - logvar, axis=(1, 2, 3)))
    kl = kl / np.prod(x.shape[1:])
    return loss + kl_weight * kl, {**out, "kl": kl}


def decoder_loss(
    params: Any, x: jax.Array, key: jax.Array, cfg: c.VaeConfig, noise: float
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """`pixel_loss` of decoded latents with noise; the encoder gets no gradient.

    Args:
      noise: the deviation is uniform in [0, noise] for each image, in units of scaled latents.
    """
    module, variables = vae.Vae(cfg), {"params": params}
    mean, _ = module.apply(variables, x, method="encode")
    a, b = jax.random.split(key)
    std = noise * jax.random.uniform(a, (len(x), 1, 1, 1)) / cfg.scaling_factor
    z = jax.lax.stop_gradient(mean) + std * jax.random.normal(b, mean.shape)
    return pixel_loss(module.apply(variables, z, method="decode") - x)


def standardize(params: Any, cfg: c.VaeConfig, pixels: np.ndarray) -> Any:
    """Changes the latent basis so that scaled latents of `pixels` have mean 0 and std 1.

    z' = (z - m) / (s * factor) for each channel; the posterior's std is divided as well. The
    inverse goes into post_quant_conv, so decode(encode(x)) does not change.
    """
    run = jax.jit(lambda p, x: vae.Vae(cfg).apply({"params": p}, x, method="encode"))
    parts = [
        run(params, encode.to_float(jnp.asarray(pixels[i : i + 32]), jnp.float32))
        for i in range(0, len(pixels), 32)
    ]
    mean = np.concatenate([np.asarray(p[0]) for p in parts]).reshape(-1, cfg.latent_channels)
    var = np.concatenate([np.exp(p[1]) for p in parts]).reshape(-1, cfg.latent_channels)
    shift = jnp.asarray(mean.mean(0))
    scale = jnp.asarray(np.sqrt(mean.var(0) + var.mean(0))) * cfg.scaling_factor
    params = jax.tree.map(lambda x: x, params)
    quant, post = params["quant_conv"], params["post_quant_conv"]
    n = cfg.latent_channels
    kernel, bias = quant["kernel"], quant["bias"]
    params["quant_conv"] = {
        "kernel": kernel.at[:, :n].set(kernel[:, :n] / scale),
        "bias": jnp.concatenate([(bias[:n] - shift) / scale, bias[n:] - 2 * jnp.log(scale)]),
    }
    params["post_quant_conv"] = {
        "kernel": post["kernel"] * scale[:, None],
        "bias": post["bias"] + shift @ post["kernel"],
    }
    return params


def commands(about: dict[str, Any]) -> list[str]:
    """The runs that made a VAE, in their order; about: what it was saved with."""
    lines = [f"python {MAKER} --steps {about['steps']} --out starts/emoji_vae"]
    for name, flag in FURTHER.items():
        if name in about:
            options = " ".join(f"--{k.replace('_', '-')} {v}" for k, v in about[name].items())
            folder = "starts/emoji_vae"
            lines.append(f"python {MAKER} --out {folder} --overwrite {flag} {folder} {options}")
    return lines


def psnr(params: Any, cfg: c.VaeConfig, pixels: np.ndarray) -> tuple[float, np.ndarray]:
    """Mean PSNR in dB of reconstructions (posterior mean), and the reconstructions uint8."""
    run = jax.jit(lambda p, x: vae.Vae(cfg).apply({"params": p}, x))
    out, ratio = [], []
    for i in range(0, len(pixels), 32):
        x = encode.to_float(jnp.asarray(pixels[i : i + 32]), jnp.float32)
        y = jnp.clip(run(params, x), -1, 1)
        mse = np.asarray(jnp.mean((x - y) ** 2, axis=(1, 2, 3))) / 4
        ratio.append(-10 * np.log10(np.maximum(mse, 1e-10)))
        out.append(np.asarray(jnp.round((y + 1) * 127.5)).astype(np.uint8))
    return float(np.concatenate(ratio).mean()), np.concatenate(out)


def save_comparison(path: epath.Path, pixels: np.ndarray, again: np.ndarray) -> None:
    """A PNG: rows of originals over rows of their reconstructions."""
    rows = []
    for i in range(0, min(len(pixels), 48), 16):
        rows += [*pixels[i : i + 16], *again[i : i + 16]]
    with path.open("wb") as f:
        sheet.image_grid(rows, [""] * len(rows), columns=16, scale=1).save(f, "PNG")


def main(argv: list[str] | None = None) -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    p.add_argument("--data", default="data/openmoji")
    p.add_argument("--out", default="starts/emoji_vae")
    p.add_argument("--steps", type=int, default=3400)
    p.add_argument("--batch", type=int, default=4)
    p.add_argument("--lr", type=float, default=2e-3)
    p.add_argument("--kl-weight", type=float, default=5e-4)
    p.add_argument(
        "--decoder-of",
        default="",
        metavar="FOLDER",
        help="keep the encoder of this VAE and train its decoder further (the second run)",
    )
    p.add_argument(
        "--start", default="", metavar="FOLDER", help="train all of this VAE further (the third)"
    )
    p.add_argument(
        "--half-weight", type=float, default=0.0, help="of the loss at half the resolution"
    )
    p.add_argument("--noise", type=float, default=0.0, help="in latents to decode")
    p.add_argument("--seed", type=int, default=0)
    p.add_argument("--preview", default="runs/train_vae/preview.png")
    p.add_argument(
        "--overwrite", action="store_true", help="replace a folder that this command wrote"
    )
    args = p.parse_args(argv)
    if bool(args.decoder_of) + bool(args.start) != (args.noise > 0):
        p.error("--decoder-of or --start, and --noise: expected both or neither")
    if args.half_weight and not args.start:
        p.error("--half-weight: expected --start")
    began = time.time()
    model_folder.check_out(args.out, args.overwrite, [args.data], made=[notice.FILE])
    model = c.model_config("emoji")
    cfg = model.vae
    pixels = load_split(args.data, "train", model.image_size)
    print(f"{len(pixels)} training images, {time.time() - began:.1f} s", flush=True)
    key = numerics.key(args.seed)
    fixed: Any = {}
    params: Any = vae.init_params(cfg, key)
    weights = {"noise": args.noise, "half_weight": args.half_weight}
    loss = functools.partial(loss_fn, cfg=cfg, kl_weight=args.kl_weight, **weights)
    about: dict[str, Any] = {"made_by": MAKER, "steps": args.steps}
    if args.decoder_of or args.start:
        start = model_folder.load_model(args.decoder_of or args.start)
        params = jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), start.vae)
        options = {name: getattr(args, name) for name in ("batch", "lr", "steps", "noise")}
        if args.start:
            options["half_weight"] = args.half_weight
        earlier = {name: start.meta[name] for name in ("steps", *FURTHER) if name in start.meta}
        about |= earlier | {"decoder" if args.decoder_of else "start": options}
    if args.decoder_of:
        fixed = {name: params[name] for name in params if name not in DECODER}
        params = {name: params[name] for name in DECODER}
        loss = functools.partial(decoder_loss, cfg=cfg, noise=args.noise)
    # After the same minute Muon is 4 dB better than Adam, which learns outlines first and colors
    # only after hundreds of steps (docs/decisions.md).
    tx = optim.make_optimizer(
        c.OptimConfig(
            name="muon", lr=args.lr, b2=0.99, warmup_steps=60, decay_steps=args.steps - 60
        ),
        args.steps,
    )

    @jax.jit
    def step(params: Any, ema: Any, opt: Any, x: jax.Array, n: jax.Array) -> Any:
        a, b = jax.random.split(jax.random.fold_in(key, n))
        x = augment(a, encode.to_float(x, jnp.float32))
        grads, out = jax.grad(lambda p: loss({**fixed, **p}, x, b), has_aux=True)(params)
        updates, opt = tx.update(grads, opt, params)
        params = optax.apply_updates(params, updates)
        ema = jax.tree.map(lambda e, q: EMA * e + (1 - EMA) * q, ema, params)
        return params, ema, opt, out

    ema, opt = params, tx.init(params)
    generator = np.random.default_rng(args.seed)
    epochs = args.steps * args.batch // len(pixels) + 1
    order = np.concatenate([generator.permutation(len(pixels)) for _ in range(epochs)])
    for n in range(args.steps):
        x = pixels[order[n * args.batch : (n + 1) * args.batch]]
        params, ema, opt, out = step(params, ema, opt, x, jnp.int32(n))
        if (n + 1) % 50 == 0 or n == 0:
            line = " ".join(f"{k} {float(v):.4f}" for k, v in out.items())
            left = (time.time() - began) / (n + 1) * (args.steps - n - 1) / 60
            print(f"step {n + 1}/{args.steps} {line} {left:.1f} min left", flush=True)
    if not fixed:
        ema = standardize(ema, cfg, pixels[:: max(1, len(pixels) // 512)])
    ema = jax.tree.map(lambda x: x.astype(jnp.bfloat16), {**fixed, **ema})  # scored as shipped
    shipped = jax.tree.map(lambda x: x.astype(jnp.float32), ema)
    scores = {}
    for split in ("heldout_pairs", "heldout_views"):
        held = load_split(args.data, split, model.image_size)[::7]
        scores[split], again = psnr(shipped, cfg, held)
        print(f"{split}: PSNR {scores[split]:.2f} dB on {len(held)} images")
    preview = epath.Path(args.preview)
    preview.parent.mkdir(parents=True, exist_ok=True)
    save_comparison(preview, held, again)
    notice.remove(args.out)
    model_folder.save_model(
        args.out,
        model_cfg=model,
        params=None,
        vae=ema,
        hub_files=None,
        extra=about | {"psnr_db": scores},
        overwrite=args.overwrite,
    )
    notice.write(args.out, "The quick start's VAE", "\n    ".join(commands(about)))
    print(f"saved to {args.out} after {(time.time() - began) / 60:.1f} min; see {preview}")


if __name__ == "__main__":
    cli.run(main)
