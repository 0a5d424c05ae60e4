"""The published parts of tests/data/torch_parts, and what an assembled language model computes."""

import shutil

import jax
import jax.numpy as jnp

from helpers import golden
from janusflow_jax.data import chat_format
from janusflow_jax.models import janusflow

PARTS = golden.ROOT.parent / "torch_parts"


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
