"""A model of the Hugging Face Hub -> a model folder in the cache, converted once."""

from __future__ import annotations

import os
import re
import sys
from pathlib import Path
from typing import Any

import huggingface_hub
from etils import epath

from janusflow_jax.checkpoints import model_folder
from janusflow_jax.config import files
from janusflow_jax.config.errors import CheckpointError
from janusflow_jax.hub import import_janusflow

PREFIX = "hf://"
VAE = "hf://stabilityai/sdxl-vae"
"""The released JanusFlow has its VAE in this repository."""

_REPOSITORY = re.compile(r"(?P<id>[\w.-]+/[\w.-]+?)(@(?P<revision>[\w./-]+))?")
_MODEL_FILES = ["*.json", "*.safetensors", "*.md", "*.txt", "LICENSE*", "NOTICE*"]
_VAE_FILES = ["config.json", "diffusion_pytorch_model*.safetensors*", "*.md", "LICENSE*"]


def is_repository(path: Any) -> bool:
    """Whether a path has the form hf://..."""
    return isinstance(path, str) and path.startswith(PREFIX)


def advice(path: Any) -> str:
    """What to do about a missing path, if it looks like the name of a repository; else ''."""
    if isinstance(path, str) and _REPOSITORY.fullmatch(path) and not files.resolve(path).exists():
        return f"write {PREFIX}{path} for a model of the Hugging Face Hub"
    return ""


def model_of(url: str) -> epath.Path:
    """The model folder of a published JanusFlow; the first call downloads and converts it.

    Safetensors, JSON and license files are all that is downloaded; nothing of them is run. Folders
    are named after the commits of the model and of its VAE, so another revision is another folder.

    Args:
      url: hf://org/name or hf://org/name@revision. Its folder `vae/` is used if there is one; else
        `VAE`.
    Raises:
      CheckpointError: another form; or the Hub cannot be reached, or has no such model.
      ConvertError: what is there is no JanusFlow.
    """
    janusflow = _snapshot(url, [*_MODEL_FILES, *(f"vae/{name}" for name in _VAE_FILES)])
    vae = janusflow / "vae"
    if not vae.is_dir():
        vae = _snapshot(VAE, _VAE_FILES)
    name = "--".join(url.removeprefix(PREFIX).split("@")[0].split("/"))
    commits = "-".join(x.name[:12] for x in (janusflow, vae) if x.parent != janusflow)
    base = os.path.expanduser(os.environ.get("XDG_CACHE_HOME") or "~/.cache")
    out = epath.Path(base) / "janusflow_jax" / "models" / f"{name}-{commits}"
    if not model_folder.is_model(out):
        out.parent.mkdir(parents=True, exist_ok=True)
        import_janusflow.convert(janusflow, vae, out, overwrite=True, log=_log)
    return out


def _snapshot(url: str, patterns: list[str]) -> Path:
    """The local copy of a repository; its folder has the name of the commit."""
    match = _REPOSITORY.fullmatch(url.removeprefix(PREFIX))
    if match is None:
        raise CheckpointError(
            f"{url}: expected {PREFIX}organization/name or {PREFIX}organization/name@revision"
        )
    try:
        folder = huggingface_hub.snapshot_download(
            match["id"], revision=match["revision"], allow_patterns=patterns
        )
    except (OSError, ValueError) as error:  # not reachable, not there, not allowed; a wrong name
        reason = (str(error).splitlines() or [""])[0]
        raise CheckpointError(
            f"{url}: expected a repository of the Hugging Face Hub that can be read: {reason}"
        ) from error
    return Path(folder)


def _log(text: str) -> None:
    """Progress goes to stderr: commands print results."""
    print(text, file=sys.stderr, flush=True)
