"""Converts the weights of FID's Inception network into a folder that loads without torch.

    python tools/convert_scorer.py weights-inception-2015-12-05-6726825d.pth --out scorers/inception

Reads the state dict of torch-fidelity or pytorch-fid (the same file under two names; Apache-2.0),
as .pth (which needs torch once) or as .safetensors. CLIP needs no conversion: pass its folder as
published (config.json, model.safetensors, tokenizer.json).
"""

from __future__ import annotations

if __name__ == "__main__":  # before the imports, which take seconds
    from janusflow_jax.config import signals

    signals.end_on_signals()

import argparse
import pickle
from collections.abc import Mapping
from typing import Any

from janusflow_jax import cli
from janusflow_jax.checkpoints import checksums
from janusflow_jax.config import files
from janusflow_jax.config.errors import ConvertError
from janusflow_jax.eval import inception
from janusflow_jax.hub import safetensors as safetensors_io


def read(path: Any) -> Mapping[str, Any]:
    """The tensors of a .safetensors or .pth file.

    Raises:
      ConvertError: no such file, or not a state dict.
    """
    if path.suffix == ".safetensors":
        return safetensors_io.open_file(path)
    import torch  # pyright: ignore[reportMissingImports]

    try:
        tensors = torch.load(safetensors_io.local(path), map_location="cpu", weights_only=True)
        return {name: x.numpy() for name, x in tensors.items()}
    except (AttributeError, EOFError, RuntimeError, ValueError, pickle.UnpicklingError) as error:
        raise ConvertError(
            f"{path}: expected a state dict of tensors; got {type(error).__name__}: download "
            f"*-inception-2015-12-05-{inception.OFFICIAL}.pth again"
        ) from error


def main(argv: list[str] | None = None) -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    p.add_argument("weights", help="the .pth or .safetensors file of FID's Inception network")
    p.add_argument("--out", required=True, help="the new folder")
    args = p.parse_args(argv)
    path, out = files.resolve(args.weights), files.resolve(args.out)
    if out.exists():
        raise ConvertError(f"{out}: expected a new folder; got one that exists: choose another")
    net = inception.save(out, inception.from_torch(read(path)), checksums.file_sha256(path))
    if not net.official:
        cli.log(
            f"{path}: not the published file (its SHA-256 begins with {inception.OFFICIAL}), so "
            "distances do not compare with published FIDs"
        )
    print(f"saved to {out}")


if __name__ == "__main__":
    cli.run(main)
