"""Language models of `tests/data/make_families.py`, and folders as their makers publish them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import safe_open
from safetensors.numpy import save_file

from helpers import golden
from janusflow_jax.data import chat_format

DATA = Path(__file__).parents[1] / "data" / "families"
NAMES = sorted(path.stem for path in DATA.glob("*.safetensors"))
FORMS = [name for name in NAMES if name not in ("granite", "granite4", "ernie4_5")]
"""Those that are no plain Llama once they are converted."""


def read(name: str) -> tuple[dict[str, np.ndarray], dict[str, Any], np.ndarray, np.ndarray]:
    """Tensors, config.json, tokens and logits."""
    with safe_open(DATA / f"{name}.safetensors", "numpy") as file:
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
        config = json.loads(file.metadata()["config"])
    return tensors, config, tensors.pop("tokens"), tensors.pop("logits")


def write(folder: Path, tensors: dict[str, np.ndarray], config: dict[str, Any]) -> Path:
    """A published folder, with a tokenizer that has no image tags."""
    folder.mkdir()
    save_file(tensors, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(config))
    for name in ("tokenizer.json", "tokenizer_config.json"):
        text = (golden.TINY / "janusflow" / name).read_text()
        for i, tag in enumerate(chat_format.DEFAULT_TAGS.values()):
            text = text.replace(tag, f"<spare_{i}>")
        (folder / name).write_text(text)
    return folder
