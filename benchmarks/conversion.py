"""Converts a random checkpoint of the released size: peak memory, and time against copying it.

    python benchmarks/conversion.py --scratch /tmp/conversion

Creates (once) a JanusFlow with the released names and shapes in bfloat16 (4.09 GB) and an SDXL-VAE
in float32 (0.33 GB) in the scratch folder, which needs 15 GB. Then alternates between `cp` + `sync`
of the weights and tools/convert_checkpoint.py + `sync`. Memory is the peak of the resident pages of
the converting process, mapped files included.
"""

from __future__ import annotations

import argparse
import json
import os
import pathlib
import shutil
import statistics
import subprocess
import sys
import time
from functools import partial

import ml_dtypes
import numpy as np
from etils import epath

from janusflow_jax import config as c
from janusflow_jax.hub import configs as hub_configs, names, safetensors, tensors

ROOT = pathlib.Path(__file__).resolve().parents[1]
GOLDEN = ROOT / "tests" / "data" / "golden"
GIB = 1 << 30


def random_tensor(shape: tuple[int, ...], dtype: np.dtype, seed: int) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return (rng.standard_normal(shape, np.float32) * 0.02).astype(dtype)


def create_checkpoint(scratch: pathlib.Path) -> None:
    """Writes the two folders in the released layout, with random weights."""
    model, autoencoder = scratch / "janusflow", scratch / "vae"
    for folder in (model, autoencoder):
        folder.mkdir(parents=True, exist_ok=True)
    cfg = c.model_config("1p3b")
    files = hub_configs.model_config_to_hf(cfg, {})
    files["config.json"]["torch_dtype"] = "bfloat16"
    for name in ("config.json", "preprocessor_config.json"):
        (model / name).write_text(json.dumps(files[name]))
    (autoencoder / "config.json").write_text(json.dumps(files["vae/config.json"]))
    for name in ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"):
        shutil.copy(GOLDEN / "tiny" / "janusflow" / name, model)
    processor = json.loads((GOLDEN / "tiny/janusflow/processor_config.json").read_text())
    (model / "processor_config.json").write_text(json.dumps(processor | {"num_image_tokens": 576}))
    shapes = json.loads((GOLDEN / "janusflow_1p3b_tensors.json").read_text())
    vae_tensors = tensors.to_torch(tensors.vae_shapes(cfg.vae), names.vae_rules(cfg.vae))
    folders = (
        (model, "model", shapes, np.dtype(ml_dtypes.bfloat16)),
        (
            autoencoder,
            "diffusion_pytorch_model",
            {name: x.shape for name, x in vae_tensors.items()},
            np.dtype(np.float32),
        ),
    )
    for folder, name, shapes, dtype in folders:
        weights = {
            n: safetensors.LazyTensor(tuple(shape), dtype, partial(random_tensor, shape, dtype, i))
            for i, (n, shape) in enumerate(shapes.items())
        }
        safetensors.write_folder(epath.Path(folder), name, weights, 1 << 40)


def measure(command: list[str]) -> tuple[float, int]:
    """Seconds and peak resident bytes of a command."""
    start = time.perf_counter()
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        sys.exit(f"{command} failed with {os.waitstatus_to_exitcode(status)}")
    subprocess.run(["sync"], check=True)
    return time.perf_counter() - start, usage.ru_maxrss * 1024


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    p.add_argument("--scratch", required=True)
    p.add_argument("--rounds", type=int, default=3)
    args = p.parse_args()
    scratch = pathlib.Path(args.scratch)
    weights = scratch / "janusflow" / "model.safetensors"
    if not weights.exists():
        create_checkpoint(scratch)
    source = [weights, scratch / "vae" / "diffusion_pytorch_model.safetensors"]
    print(f"{sum(f.stat().st_size for f in source) / 1e9:.2f} GB, {os.cpu_count()} cores")
    subprocess.run(["sync"], check=True)
    copies, conversions, peaks = [], [], []
    for n in range(args.rounds):
        seconds, _ = measure(["cp", *map(str, source), str(empty(scratch / "copy"))])
        copies.append(seconds)
        out = scratch / "model"
        command = [sys.executable, "tools/convert_checkpoint.py", "--janusflow"]
        command += [str(scratch / "janusflow"), "--vae", str(scratch / "vae"), "--out", str(out)]
        seconds, peak = measure([*command, "--overwrite"])
        conversions.append(seconds)
        peaks.append(peak)
        print(
            f"round {n + 1}: cp + sync {copies[-1]:.1f} s, conversion + sync {seconds:.1f} s "
            f"({seconds / copies[-1]:.2f} x), peak {peak / GIB:.2f} GiB",
            flush=True,
        )
        shutil.rmtree(out)
    ratio = statistics.median(conversions) / statistics.median(copies)
    print(
        f"median: cp + sync {statistics.median(copies):.1f} s, conversion "
        f"{statistics.median(conversions):.1f} s, {ratio:.2f} x; peak {max(peaks) / GIB:.2f} GiB"
    )


def empty(folder: pathlib.Path) -> pathlib.Path:
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    return folder


if __name__ == "__main__":
    main()
