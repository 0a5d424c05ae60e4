"""A run's adapters alone as a folder in PEFT's layout, and back onto their base.

`adapter_model.safetensors` has `base_model.model.<module>.lora_A.weight` [R, in] and
`lora_B.weight` [out, R] for each layer; `adapter_config.json` PEFT's fields, and under
`janusflow_jax` the SHA-256 of the kernels that the adapters were trained beside, so that another
base is refused.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np
from etils import epath

from janusflow_jax import checkpoint, checksums, torch_names, train_step, trees
from janusflow_jax import config as config_lib
from janusflow_jax.config import LORA_TARGETS, TrainConfig
from janusflow_jax.models import lora
from janusflow_jax.safetensor_files import Made, read_header, write_folder

WEIGHTS, CONFIG = "adapter_model", "adapter_config.json"
PREFIX = "language_model."


class AdapterError(ValueError):
    """A folder that holds no adapters for this base; every problem at once."""


def save(run: Any, out: Any, weights: str = "ema") -> str:
    """Writes the adapters of a training run (or one of its checkpoints) to the folder `out`.

    Returns: what was written, in a line.
    Raises:
      AdapterError: the run has none, or has trained more than them.
      checkpoint.CheckpointError: nothing there that loads, or `out` exists.
    """
    folder = epath.Path(out).resolve()
    if folder.exists():
        raise checkpoint.CheckpointError(f"{folder}: exists; choose another path")
    if (epath.Path(run) / checkpoint.MODEL_FILE).exists():
        raise AdapterError(
            f"{run}: a model folder, which has no adapters: expected a run with "
            "--config.lora.rank above 0 (its folder, or one of its checkpoints)"
        )
    loaded = checkpoint.load_model(run, weights=weights, merged=False)
    given = loaded.meta.get("config")
    cfg = config_lib.from_dict(TrainConfig, given) if given else None
    if cfg is None or not cfg.lora.rank:
        raise AdapterError(
            f"{loaded.source}: expected a run with --config.lora.rank above 0; this one has no "
            "adapters: export the model itself"
        )
    if more := sorted(train_step.trained_parts(cfg)):
        raise AdapterError(
            f"{loaded.source}: has trained {more} too, which adapters alone do not hold; export "
            "the model itself (without --adapter-only)"
        )
    llm = (loaded.params or {})["llm"]
    made: dict[str, Made] = {}
    for target in cfg.lora.targets:
        node, module = _node(llm, target), _module(target)
        for letter in "ab":
            stack = np.asarray(node[f"lora_{letter}"], np.float32)
            for i, x in enumerate(stack):
                name = f"{module.format(i)}.lora_{letter.upper()}.weight"
                made[name] = Made(x.T.shape, x.dtype, lambda x=x: x.T)
    about = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "r": cfg.lora.rank,
        "lora_alpha": cfg.lora.alpha,
        "lora_dropout": 0.0,
        "bias": "none",
        "target_modules": [f"{t}_proj" for t in cfg.lora.targets],
        "base_model_name_or_path": cfg.start,
        "janusflow_jax": {
            "base_sha256": digest(llm, cfg.lora.targets),
            "weights": "ema" if weights == "ema" and cfg.optim.ema else "params",
            "run": cfg.name, "step": loaded.meta.get("step"),
        },
    }  # fmt: skip
    folder.mkdir(parents=True)
    write_folder(folder, WEIGHTS, made)
    (folder / CONFIG).write_text(json.dumps(about, indent=1) + "\n")  # last: without it, no adapter
    size = sum(x.nbytes for x in made.values()) / 1e6
    return f"{folder}: {len(made)} tensors, {size:.1f} MB, of rank {cfg.lora.rank}"


def apply(llm: dict[str, Any] | None, path: Any) -> dict[str, Any]:
    """The LLM's tree (stacked layers) with the adapters of a folder added to its kernels.

    Raises:
      AdapterError: no adapter, tensors that do not fit (all listed), or another base.
      checkpoint.CheckpointError: a config file that cannot be read.
    """
    folder = epath.Path(path).resolve()
    if llm is None:
        raise AdapterError(f"{folder}: expected a model with a language model; this one has none")
    if not (folder / CONFIG).exists():
        raise AdapterError(
            f"{folder}: expected {CONFIG} and {WEIGHTS}.safetensors, as written by "
            "tools/export_checkpoint.py --adapter-only; found none"
        )
    about = checksums.read_json(folder / CONFIG)
    if lacking := [n for n in ("r", "lora_alpha", "target_modules") if not about.get(n)]:
        raise AdapterError(f"{folder / CONFIG}: expected PEFT's fields; it lacks {lacking}")
    tensors = read_header(folder / f"{WEIGHTS}.safetensors")
    targets = [t.removesuffix("_proj") for t in about["target_modules"]]
    problems = [
        f"target_modules: {t}_proj is none of ours" for t in targets if t not in LORA_TARGETS
    ]
    if not problems:
        problems = _unfit(llm, targets, int(about["r"]), tensors)
    want = about.get("janusflow_jax", {}).get("base_sha256")
    if not problems and want and want != digest(llm, targets):
        problems.append(
            "they were trained beside other weights than these: load "
            f"{about.get('base_model_name_or_path') or 'the model that they name'}"
        )
    if problems:
        listed = "\n".join(f"  - {p}" for p in problems)
        raise AdapterError(f"{folder}: these adapters are not for this model:\n{listed}")
    scale = float(about["lora_alpha"]) / int(about["r"])
    leaves = trees.flat({"llm": llm})
    for target in targets:
        module = _module(target)
        where = f"{lora.BLOCK}/{LORA_TARGETS[target]}/{target}"
        count = len(leaves[f"{where}/kernel"])
        for letter in "ab":
            names = (f"{module.format(i)}.lora_{letter.upper()}.weight" for i in range(count))
            leaves[f"{where}/lora_{letter}"] = np.stack([np.asarray(tensors[n]).T for n in names])
        leaves[f"{where}/{lora.SCALE}"] = np.full((count,), scale, np.float32)
    return lora.merge(trees.nested(leaves))["llm"]


def digest(llm: dict[str, Any], targets: Any) -> str:
    """SHA-256 of the targets' kernels rounded to bfloat16: the same whatever type holds them."""
    out = hashlib.sha256()
    for target in sorted(targets):
        for x in _node(llm, target)["kernel"]:
            rounded = np.asarray(x).astype(jnp.bfloat16)
            out.update(f"{target} {rounded.shape};".encode())
            out.update(np.ascontiguousarray(rounded).view(np.uint16).data)
    return out.hexdigest()


def _node(llm: dict[str, Any], target: str) -> dict[str, Any]:
    return llm["layers"]["block"][LORA_TARGETS[target]][target]


def _module(target: str) -> str:
    """PEFT's name of a target, with '{}' for the layer."""
    named = {r.paths[0]: r.name for r in torch_names.llm_rules(PREFIX)}
    name = named[f"{lora.BLOCK}/{LORA_TARGETS[target]}/{target}/kernel"]
    return f"base_model.model.{name.removesuffix('.weight')}"


def _unfit(llm: dict[str, Any], targets: Any, rank: int, tensors: Mapping[str, Any]) -> list[str]:
    """Every missing, unknown and misshaped tensor."""
    want = {}
    for target in targets:
        layers, width, out = _node(llm, target)["kernel"].shape
        for i in range(layers):
            name = _module(target).format(i)
            want[f"{name}.lora_A.weight"] = (rank, width)
            want[f"{name}.lora_B.weight"] = (out, rank)
    bad = [f"{n}: missing, expected shape {want[n]}" for n in want.keys() - tensors.keys()]
    bad += [f"{n}: unknown" for n in tensors.keys() - want.keys()]
    bad += [
        f"{n}: expected shape {want[n]}; got {tuple(tensors[n].shape)}"
        for n in want.keys() & tensors.keys()
        if tuple(tensors[n].shape) != want[n]
    ]
    return sorted(bad)
