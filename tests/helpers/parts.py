"""The published parts of tests/data/torch_parts, and what an assembled language model computes."""

import shutil
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from helpers import golden, vaes
from janusflow_jax import hub
from janusflow_jax.data import chat_format
from janusflow_jax.models import janusflow

PARTS = golden.ROOT.parent / "torch_parts"
TOWERS = golden.ROOT.parent / "towers"


def llm_folder(out):
    """The Llama with a tokenizer that has no image tags."""
    shutil.copytree(PARTS / "llama", out)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        text = (golden.TINY / "janusflow" / name).read_text()
        for i, tag in enumerate(chat_format.DEFAULT_TAGS.values()):
            text = text.replace(tag, f"<spare_{i}>")
        (out / name).write_text(text)
    return out


def logits(loaded, tokens):
    model = janusflow.JanusFlow(loaded.cfg)
    length = tokens.shape[1]
    mask = jnp.tril(jnp.ones((len(tokens), length, length), bool))
    positions = jnp.broadcast_to(jnp.arange(length), tokens.shape)

    def run(m):
        return m.logits(m.run_llm(m.embed_tokens(tokens), positions, mask)[0])

    return model.apply({"params": jax.tree.map(jnp.asarray, loaded.params)}, method=run)


def open_start(folder: Path, llm: Any = None, **options: Any) -> Path:
    """A start of SigLIP 2 (NaFlex, tanh GELU), FLUX.2's VAE and a Llama, or the folder `llm`."""
    llm, tower, vae = llm or llm_folder(folder / "llm"), folder / "siglip", folder / "vae"
    shutil.copytree(TOWERS / "naflex", tower)
    shutil.copytree(vaes.FOLDER / "flux2", vae)
    for part in (tower, vae):
        (part / "expected.safetensors").unlink()
        (part / "LICENSE").write_text(f"the license of {part.name}")
    (vae / "README.md").write_text("---\nlicense: apache-2.0\n---\n")
    options = {"gen_width": 32, "log": lambda line: None, **options}
    hub.assemble(llm, tower, vae, folder / "model", **options)
    return folder / "model"
