"""A run's adapters alone as a folder in PEFT's layout, and back onto their base.

`adapter_model.safetensors` has `base_model.model.<module>.lora_A.weight` [R, in] and
`lora_B.weight` [out, R] for each layer; `adapter_config.json` PEFT's fields, and under
`janusflow_jax` the SHA-256 of the kernels that the adapters were trained beside, so that another
base is refused. PEFT's own adapters have no such sum: they are put on, and a warning says that the
base could not be checked. What is more than scaled products added to kernels is refused by name.
"""

from __future__ import annotations

import hashlib
import json
import re
import warnings
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np
from etils import epath

from janusflow_jax import config as config_lib
from janusflow_jax.checkpoints import checksums, model_folder
from janusflow_jax.config import LORA_TARGETS, TrainConfig, parts as parts_lib
from janusflow_jax.config.errors import CheckpointError, ConvertError
from janusflow_jax.hub import names as tensor_names, peft_config
from janusflow_jax.hub.safetensors import LazyTensor, Made, open_folder, write_folder
from janusflow_jax.models import lora
from janusflow_jax.parallel import trees

WEIGHTS, CONFIG = "adapter_model", peft_config.CONFIG
BASE = "base_model.model."
HEADS = ("language_model.model.", "model.", "")
"""What may stand before 'layers.0...': the whole model was adapted (ours), its LLM alone
(LlamaForCausalLM), or that without its head (LlamaModel)."""
SHOWN = 8
"""How many of the same kind of problem a message lists."""


def save(run: Any, out: Any, weights: str = "ema") -> str:
    """Writes the adapters of a training run (or one of its checkpoints) to the folder `out`.

    Returns: what was written, in a line.
    Raises:
      ConvertError: the run has none, or has trained more than them.
      CheckpointError: nothing there that loads, or `out` exists.
    """
    folder = epath.Path(out).resolve()
    if folder.exists():
        raise CheckpointError(f"{folder}: exists; choose another path")
    if (epath.Path(run) / model_folder.MODEL_FILE).exists():
        raise ConvertError(
            f"{run}: a model folder, which has no adapters: expected a run with "
            "--config.lora.rank above 0 (its folder, or one of its checkpoints)"
        )
    loaded = model_folder.load_model(run, weights=weights, merged=False)
    given = loaded.meta.get("config")
    cfg = config_lib.from_dict(TrainConfig, given) if given else None
    if cfg is None or not cfg.lora.rank:
        raise ConvertError(
            f"{loaded.source}: expected a run with --config.lora.rank above 0; this one has no "
            "adapters: export the model itself"
        )
    if more := sorted(parts_lib.trained_parts(cfg)):
        raise ConvertError(
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
                name = f"{BASE}{module.format(i)}.lora_{letter.upper()}.weight"
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
            "run": cfg.name,
            "step": loaded.meta.get("step"),
        },
    }
    folder.mkdir(parents=True)
    write_folder(folder, WEIGHTS, made)
    (folder / CONFIG).write_text(json.dumps(about, indent=1) + "\n")  # last: without it, no adapter
    size = sum(x.nbytes for x in made.values()) / 1e6
    return f"{folder}: {len(made)} tensors, {size:.1f} MB, of rank {cfg.lora.rank}"


def apply(llm: dict[str, Any] | None, path: Any) -> dict[str, Any]:
    """The LLM's tree (stacked layers) with the adapters of a folder added to its kernels.

    Warns where the adapters do not say which base they were trained beside.

    Raises:
      ConvertError: no adapter, settings that we do not support, tensors that do not fit, or
        another base; all that is wrong in one message.
      CheckpointError: a config file that cannot be read.
    """
    folder = epath.Path(path).resolve()
    if llm is None:
        raise ConvertError(f"{folder}: expected a model with a language model; this one has none")
    if not (folder / CONFIG).exists():
        raise ConvertError(
            f"{folder}: expected {CONFIG} and {WEIGHTS}.safetensors, as written by "
            "tools/export_checkpoint.py --adapter-only; found none"
        )
    given = checksums.read_json(folder / CONFIG)
    if not isinstance(given, dict):
        raise ConvertError(
            f"{folder / CONFIG}: expected PEFT's fields, a JSON object; got "
            f"{peft_config.short(given)}"
        )
    problems: list[str] = []
    about = peft_config.read(given, problems)
    stored = open_folder(folder, (WEIGHTS,))
    problems += stored.problems
    tensors, head = ({}, "") if stored.problems else _plainly_named(stored.tensors, problems)
    modules: dict[str, tuple[str, int]] = {}
    if about and not problems:
        modules = _modules(llm, about, head, problems)
        problems += _unfit(llm, about, modules, tensors) if modules else []
    targets = {target for target, _ in modules.values()}
    if about and not problems and about.base and about.base != digest(llm, targets):
        problems.append(
            "they were trained beside other weights than these: load "
            f"{given.get('base_model_name_or_path') or 'the model that they name'}"
        )
    if problems or not about:
        listed = "\n".join(f"  - {p}" for p in problems)
        raise ConvertError(f"{folder}: these adapters cannot be put onto this model:\n{listed}")
    _warn(folder, given, about)
    leaves = trees.flat(llm)
    for target in sorted(targets):
        where = f"layers/block/{LORA_TARGETS[target]}/{target}/kernel"
        leaves[where] = np.asarray(leaves[where]).astype(np.float32)
    for module, (target, i) in modules.items():
        kernels = leaves[f"layers/block/{LORA_TARGETS[target]}/{target}/kernel"]
        a, b = (np.asarray(tensors[f"{BASE}{module}.lora_{x}.weight"]).T for x in "AB")
        adapted = {
            "kernel": kernels[i],
            "lora_a": a,
            "lora_b": b,
            parts_lib.LORA_SCALE: about.scale_of(module),
        }
        kernels[i] = lora.merge(adapted)["kernel"]
    return trees.nested(leaves)


def _warn(folder: epath.Path, given: dict[str, Any], about: peft_config.About) -> None:
    """Says what could not be made sure of, on stderr."""
    notes = []
    if not about.base:
        named = given.get("base_model_name_or_path")
        notes.append(
            f"{CONFIG} has no janusflow_jax.base_sha256, so nobody checked that this model is the "
            f"one that they were trained beside{f' ({named})' if named else ''}"
        )
    if unknown := sorted(name for name, x in given.items() if x and name not in peft_config.KNOWN):
        notes.append(f"{CONFIG} has fields that we do not know, which are ignored: {unknown}")
    if notes:
        warnings.warn(f"{folder}: {'; '.join(notes)}", stacklevel=4)


def _plainly_named(
    stored: dict[str, LazyTensor], problems: list[str]
) -> tuple[dict[str, LazyTensor], str]:
    """The tensors without an adapter's name in theirs ('lora_A.default.weight'), and their head."""
    named = re.compile(r"(\.lora_[AB])(?:\.([^.]+))?\.weight$")
    names = {found[2] or "" for n in stored if (found := named.search(n))}
    if len(names) > 1:
        problems.append(
            f"{WEIGHTS}: expected one adapter; got tensors of {len(names)}, named {sorted(names)}"
        )
    for head in HEADS:
        if any(n.startswith(f"{BASE}{head}layers.") for n in stored):
            return {named.sub(r"\1.weight", n): x for n, x in stored.items()}, head
    expected = ", ".join(f"{BASE}{h}layers.0..." for h in HEADS)
    some = ", ".join(sorted(stored)[:2]) or "none"
    problems.append(
        f"{WEIGHTS}: expected tensors whose names begin with one of {expected}; got {len(stored)}"
        f", such as {some}"
    )
    return {}, ""


def _modules(
    llm: dict[str, Any], about: peft_config.About, head: str, problems: list[str]
) -> dict[str, tuple[str, int]]:
    """Path of a module with an adapter -> target and layer; targets that are none of ours."""
    every = {
        _module(target, head).format(i): (target, i)
        for target in LORA_TARGETS
        for i in range(len(_node(llm, target)["kernel"]))
    }
    out = {module: x for module, x in every.items() if about.targeted(module)}
    bad = [t for t in about.targets if not any(peft_config.named_by(t, m) for m in every)]
    if isinstance(about.targets, str):
        bad = [] if out else [about.targets]
    problems += _some(
        [f"target_modules: {t} is none of ours, such as {next(iter(every))}" for t in bad],
        "more of target_modules that are none of ours",
    )
    return out


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


def _module(target: str, head: str = HEADS[0]) -> str:
    """The published path of a target, with '{}' for the layer."""
    named = {r.paths[0]: r.name for r in tensor_names.llm_rules()}
    name = named[f"{parts_lib.LORA_BLOCK}/{LORA_TARGETS[target]}/{target}/kernel"]
    return head + name.removeprefix("model.").removesuffix(".weight")


def _unfit(
    llm: dict[str, Any],
    about: peft_config.About,
    modules: Mapping[str, tuple[str, int]],
    tensors: Mapping[str, Any],
) -> list[str]:
    """Every missing, unknown and misshaped tensor; of many of a kind, the first and a count."""
    want = {}
    for module, (target, _) in modules.items():
        _, width, out = _node(llm, target)["kernel"].shape
        rank = about.rank_of(module)
        want[f"{BASE}{module}.lora_A.weight"] = (rank, width)
        want[f"{BASE}{module}.lora_B.weight"] = (out, rank)
    missing = [f"{n}: missing, expected shape {x}" for n, x in want.items() if n not in tensors]
    unknown = [f"{n}: unknown" for n in tensors if n not in want]
    misshaped = [
        f"{n}: expected shape {x}; got {tuple(tensors[n].shape)}"
        for n, x in want.items()
        if n in tensors and tuple(tensors[n].shape) != x
    ]
    return [
        *_some(missing, "more missing"),
        *_some(unknown, "more unknown"),
        *_some(misshaped, "more of another shape"),
    ]


def _some(lines: list[str], what: str) -> list[str]:
    more = len(lines) - SHOWN
    return sorted(lines)[:SHOWN] + ([f"... and {more} {what}"] if more > 0 else [])
