"""Random models as our model folder and in the published layout, fixed prompts, packed rows."""

from __future__ import annotations

import json
import pathlib
import types
from typing import Any

import jax
import numpy as np

from janusflow_jax import config as c, hub
from janusflow_jax.checkpoints import model_folder
from janusflow_jax.config import GENERATE, UNDERSTAND
from janusflow_jax.hub import configs as hub_configs
from janusflow_jax.models import janusflow, vae

GOLDEN = pathlib.Path(__file__).resolve().parents[1] / "tests/data/golden/tiny/janusflow"


def folders(
    scratch: pathlib.Path, size: str, peers: bool = True
) -> tuple[pathlib.Path, pathlib.Path]:
    """(model folder, published folder) with the same random weights, created once.

    The tokenizer is the small one of the golden model: the benchmarks use token ids.

    Args: peers: whether to create the published folder; the size `emoji` has no published form.
    """
    ours, published = scratch / size, scratch / f"{size}-published"
    if not model_folder.is_model(ours):
        cfg = c.model_config(size)
        key = jax.random.key(0)
        params = jax.jit(janusflow.init_params, static_argnums=0)(cfg, key)
        params = dict(params) | {"gen_decoder": _nonzero(params["gen_decoder"])}
        hub_files = {p.name: p.read_bytes() for p in GOLDEN.iterdir() if p.name.startswith("token")}
        processor = json.loads((GOLDEN / "processor_config.json").read_text())
        processor["num_image_tokens"] = cfg.num_image_tokens
        hub_files["processor_config.json"] = json.dumps(processor).encode()
        files = hub_configs.model_config_to_hf(cfg, {})
        hub_files["config.json"] = json.dumps(files["config.json"]).encode()
        model_folder.save_model(
            ours,
            model_cfg=cfg,
            params=params,
            vae=jax.jit(vae.init_params, static_argnums=0)(cfg.vae, key),
            hub_files=hub_files,
            extra={"made_by": "benchmarks"},
            overwrite=True,
        )
    if peers and not published.exists():
        hub.export(ours, published, log=lambda line: None)
    return ours, published


def _nonzero(decoder: Any) -> Any:
    """A fresh output convolution is zero, and velocities of zero would compare nothing."""
    kernel = decoder["out_conv"]["kernel"]
    noise = jax.random.normal(jax.random.key(1), kernel.shape, kernel.dtype)
    return {**decoder, "out_conv": {**decoder["out_conv"], "kernel": 0.05 * noise}}


def prompt(cfg: c.ModelConfig, length: int, seed: int = 0) -> np.ndarray:
    """int64[length] token ids, none of them special."""
    return np.random.default_rng(seed).integers(16, cfg.llm.vocab_size, length)


class FixedText:
    """Replaces a model's tokenizer: every prompt has the same ids, and EOS never comes."""

    image_tag, pad_id, eos_id = "<image_placeholder>", 0, -1
    max_length, head = 4096, 1

    def __init__(self, ids: np.ndarray, slot_at: int = -1) -> None:
        """Args: slot_at: position of the image slot in `ids`; -1: none."""
        self.ids = [int(i) for i in ids]
        self.starts = [slot_at] if slot_at >= 0 else []

    def generation_ids(self, prompt: str, form: str = "chat") -> list[int]:
        return self.ids

    def conversation(self, turns: Any, num_images: int, **_: Any) -> Any:
        return types.SimpleNamespace(ids=self.ids, slot_starts=self.starts)

    def decode(self, ids: Any) -> str:
        return " ".join(str(int(i)) for i in ids)


def rows(cfg: c.ModelConfig, tasks: str, text: int) -> tuple[dict[str, np.ndarray], int, int]:
    """One packed row with a sample per letter: g generates, u understands, t is text only.

    Args: text: tokens of each sample beside its image; of a u sample half of them are targets.
    Returns: the row as a batch of one, generation slots, understanding slots.
    """
    gen, und = tasks.count("g"), tasks.count("u")
    slots, side = gen + und, cfg.image_size
    parts = [text + (cfg.slot_len if t in "gu" else 0) for t in tasks]
    length = -(-sum(parts) // 128) * 128
    rng = np.random.default_rng(0)
    out: dict[str, np.ndarray] = {
        "row": np.zeros(1, np.uint32),
        "tokens": rng.integers(16, cfg.llm.vocab_size, (1, length)).astype(np.int32),
        "segment_ids": np.zeros((1, length), np.int32),
        "positions": np.zeros((1, length), np.int32),
        "target_mask": np.zeros((1, length), bool),
        "images": rng.integers(0, 256, (1, slots, side, side, 3)).astype(np.uint8),
        "slot_start": np.zeros((1, slots), np.int32),
        "slot_task": np.zeros((1, slots), np.int32),
    }
    at, next_slot = 0, {"g": 0, "u": gen}
    for i, (task, size) in enumerate(zip(tasks, parts, strict=True)):
        sample = slice(at, at + size)
        out["segment_ids"][0, sample] = i + 1
        out["positions"][0, sample] = np.arange(size)
        if task in next_slot:
            slot, front = next_slot[task], text if task == "g" else text // 4
            next_slot[task] += 1
            out["slot_start"][0, slot] = at + front
            out["slot_task"][0, slot] = GENERATE if task == "g" else UNDERSTAND
        if task != "g":
            targets = text // 2 if task == "u" else text - 1
            out["target_mask"][0, at + size - 1 - targets : at + size - 1] = True
        at += size
    return out, gen, und
