"""A run's LoRA adapters as a folder in PEFT's layout, and back onto their base.

`adapter_model.safetensors` has `base_model.model.<module>.lora_A.weight` [R, in] and
`lora_B.weight` [out, R] for each layer. `adapter_config.json` has PEFT's fields, read by PEFT's own
rules. Under `janusflow_jax` we add the SHA-256 of the kernels that the adapters were trained with,
so that another base is refused. Adapters by PEFT have no such sum; a warning says so.
"""

from __future__ import annotations

import functools
import hashlib
import json
import math
import re
import warnings
from collections.abc import Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath

from janusflow_jax import config as config_lib
from janusflow_jax.checkpoints import checksums, model_folder
from janusflow_jax.config import LORA_TARGETS, LlamaConfig, TrainConfig, files, parts as parts_lib
from janusflow_jax.config.errors import CheckpointError, ConvertError
from janusflow_jax.hub import names
from janusflow_jax.hub.safetensors import LazyTensor, open_folder, write_folder
from janusflow_jax.hub.tensors import raise_problems
from janusflow_jax.models import lora
from janusflow_jax.parallel import trees

WEIGHTS, CONFIG = "adapter_model", "adapter_config.json"
BASE = "base_model.model."
PREFIXES = ("language_model.model.", "model.language_model.", "model.", "")
"""What may precede 'layers.0...': the whole model was adapted (ours, and as transformers 5 names
it), its LLM alone (LlamaForCausalLM), or that without its head (LlamaModel)."""
KNOWN = """
    alpha_pattern auto_mapping base_model_name_or_path corda_config ensure_weight_tying eva_config
    inference_mode init_lora_weights janusflow_jax layers_pattern loftq_config lora_alpha
    lora_dropout lora_ga_config loraplus_lr_embedding loraplus_lr_ratio megatron_core peft_type
    peft_version qalora_group_size r rank_pattern revision runtime_config target_modules task_type
    unsloth_version use_rslora velora_config
""".split()
"""PEFT's fields that are read here, and those that change nothing of a trained adapter. An adapter
that sets any other (use_dora, modules_to_save) may be more than scaled products."""
MERGE_ELSEWHERE = "if PEFT can apply it, use merge_and_unload there and convert the result"
MAX_ALPHA = 1e6
"""A larger alpha is a mistake: logits would overflow."""
INITS = (True, None, False, "gaussian", "orthogonal", "eva")
"""Initializations that leave the base unchanged; others (PiSSA, OLoRA, LoftQ) change it."""


def save_adapter(run: Any, out: Any, weights: str = "ema") -> str:
    """Writes the adapters of a training run (or one of its checkpoints) to the folder `out`.

    Returns: a line that describes what was written.
    Raises:
      ConvertError: the run has no adapters, or has trained more than them.
      CheckpointError: no checkpoint that loads, or `out` exists.
    """
    folder = files.resolve(out)
    if folder.exists():
        raise CheckpointError(f"{folder}: exists; choose another path")
    loaded = model_folder.load_model(run, weights=weights, merged=False)
    values = loaded.meta["config"]  # of a run, or of a model alone
    if not values.get("lora", {}).get("rank"):
        raise ConvertError(
            f"{run}: no adapters: expected a training run with lora.rank above 0; export the model "
            "itself"
        )
    cfg = config_lib.from_dict(TrainConfig, values)
    if trained := sorted(parts_lib.trained_parts(cfg)):
        raise ConvertError(
            f"{loaded.source}: {trained} were trained too, and adapters do not hold them; export "
            "the model itself"
        )
    llm = (loaded.params or {})["llm"]
    published: dict[str, LazyTensor] = {}
    for target in cfg.lora.targets:
        node, module = _node(llm, target), _module(target)
        for letter in "ab":
            for i, x in enumerate(np.asarray(node[f"lora_{letter}"], np.float32)):
                name = f"{BASE}{module.format(i)}.lora_{letter.upper()}.weight"
                load = functools.partial(np.transpose, x)
                published[name] = LazyTensor(x.shape[::-1], x.dtype, load)
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
    write_folder(folder, WEIGHTS, published)
    # The config comes last: without it the folder is no adapter.
    (folder / CONFIG).write_text(json.dumps(about, indent=1) + "\n")
    size = sum(x.nbytes for x in published.values()) / 1e6
    return f"{folder}: {len(published)} tensors, {size:.1f} MB, of rank {cfg.lora.rank}"


def apply(llm: dict[str, Any] | None, path: Any) -> dict[str, Any]:
    """The LLM's tree (stacked layers) with the adapters of a folder added to its kernels.

    Warns if the adapters do not name their base by a checksum.

    Raises:
      ConvertError: no adapter, settings that are not supported, tensors that do not fit (lists
        them), or another base.
      CheckpointError: a config file that cannot be read.
    """
    folder = files.resolve(path)
    if llm is None:
        raise ConvertError(f"{folder}: expected a model with a language model; this one has none")
    if not (folder / CONFIG).exists():
        raise ConvertError(f"{folder}: expected an adapter ({CONFIG}, {WEIGHTS}.safetensors)")
    values = read_config(folder)
    stored = open_folder(folder, (WEIGHTS,))
    if empty := [name for name, x in stored.items() if 0 in x.shape]:
        raise ConvertError(
            f"{folder}: expected tensors with values; {empty[0]} is empty, as DeepSpeed's ZeRO-3 "
            "saves them: set stage3_gather_16bit_weights_on_model_save there, and save it again"
        )
    prefix = _prefix(folder, stored)
    modules: dict[str, tuple[str, int]] = {}
    shapes: dict[str, jax.ShapeDtypeStruct] = {}
    for target in LORA_TARGETS:
        layers, width, out = _node(llm, target)["kernel"].shape
        for i in range(layers):
            module = _module(target, prefix).format(i)
            if not _is_target(values["target_modules"], module):
                continue
            modules[module] = target, i
            rank = _by_pattern(values, "rank_pattern", module, values["r"])
            for letter, shape in (("A", (rank, width)), ("B", (out, rank))):
                name = f"{BASE}{module}.lora_{letter}.weight"
                shapes[name] = jax.ShapeDtypeStruct(shape, np.float32)
    problems = trees.mismatches(shapes, stored, folder.name)
    raise_problems(
        f"{folder}: this adapter does not fit the model's layers; {MERGE_ELSEWHERE}", problems
    )
    targets = sorted({target for target, _ in modules.values()})
    base = values.get("base_model_name_or_path")
    ours = values.get("janusflow_jax")
    checksum = ours.get("base_sha256") if isinstance(ours, dict) else None
    if checksum and checksum != digest(llm, targets):
        raise ConvertError(
            f"{folder}: trained with another base: load {base or 'the model it was trained on'}"
        )
    if not checksum:
        warnings.warn(
            f"{folder}: {CONFIG} has no janusflow_jax.base_sha256, so it was not checked that the "
            f"adapter was trained with this model ({base or 'it names no base'})",
            stacklevel=3,
        )

    leaves = trees.flatten(llm)
    paths = {t: f"layers/block/{LORA_TARGETS[t]}/{t}/kernel" for t in targets}
    for kernel in paths.values():
        leaves[kernel] = np.array(leaves[kernel], np.float32)
    for module, (target, i) in modules.items():
        a, b = (_finite(folder, stored, f"{BASE}{module}.lora_{x}.weight").T for x in "AB")
        kernels = leaves[paths[target]]
        alpha = _by_pattern(values, "alpha_pattern", module, values["lora_alpha"])
        scale = alpha / (math.sqrt(a.shape[1]) if values.get("use_rslora") else a.shape[1])
        adapted = {"kernel": kernels[i], "lora_a": a, "lora_b": b, parts_lib.LORA_SCALE: scale}
        kernels[i] = lora.merge(adapted)["kernel"]
        if not trees.is_finite(kernels[i]):
            raise ConvertError(
                f"{folder}: {module}: {trees.NON_FINITE} in the adapted kernel: its scale of "
                f"{scale:g} is too large for its values"
            )
    return trees.unflatten(leaves)


def _finite(folder: epath.Path, stored: dict[str, LazyTensor], name: str) -> np.ndarray:
    x = np.asarray(stored[name])
    if not trees.is_finite(x):
        raise ConvertError(f"{folder}: {name}: {trees.NON_FINITE}: its training diverged")
    return x


def digest(llm: dict[str, Any], targets: Iterable[str]) -> str:
    """SHA-256 of the targets' kernels rounded to bfloat16, so that it is the same in any dtype."""
    out = hashlib.sha256()
    for target in sorted(targets):
        for x in _node(llm, target)["kernel"]:
            rounded = np.asarray(x).astype(jnp.bfloat16)
            out.update(f"{target} {rounded.shape};".encode())
            out.update(np.ascontiguousarray(rounded).view(np.uint16).data)
    return out.hexdigest()


def read_config(folder: epath.Path) -> dict[str, Any]:
    """The values of an adapter's config.

    Raises:
      ConvertError: no LoRA, or every setting that is not supported.
      CheckpointError: no JSON file.
    """
    values = checksums.read_json(folder / CONFIG)
    required = ("r", "lora_alpha", "target_modules")
    if not isinstance(values, dict) or not all(values.get(name) for name in required):
        raise ConvertError(f"{folder / CONFIG}: expected a LoRA adapter with {', '.join(required)}")
    ranks, alphas = values.get("rank_pattern") or {}, values.get("alpha_pattern") or {}
    for name, value in (("r", values["r"]), *ranks.items()):
        if not isinstance(value, int) or value < 1:
            raise ConvertError(f"{folder / CONFIG}: {name}: expected a rank; got {value!r}")
    for name, value in (("lora_alpha", values["lora_alpha"]), *alphas.items()):
        if not isinstance(value, int | float) or not 0 < value < MAX_ALPHA:
            raise ConvertError(
                f"{folder / CONFIG}: {name}: expected a number above 0 and below {MAX_ALPHA:g}; "
                f"got {value!r}"
            )
    targets = values["target_modules"]
    for pattern in (*ranks, *alphas, *([targets] if isinstance(targets, str) else [])):
        try:
            re.compile(pattern)
        except re.error as error:
            raise ConvertError(
                f"{folder / CONFIG}: expected a regular expression; got {pattern!r} ({error})"
            ) from error
    unsupported = [n for n, x in values.items() if n not in KNOWN and x and x != "none"]
    if values.get("peft_type") not in (None, "LORA"):
        unsupported.append("peft_type")
    if values.get("init_lora_weights") not in INITS:
        unsupported.append("init_lora_weights")
    if unsupported:
        settings = ", ".join(f"{name} = {json.dumps(values[name])}" for name in unsupported)
        raise ConvertError(
            f"{folder / CONFIG}: not supported: {settings}; {MERGE_ELSEWHERE}; if a setting only "
            "describes how the adapter was trained, remove it from the file"
        )
    return values


def _is_target(targets: list[str] | str, module: str) -> bool:
    """Whether a module has an adapter, by PEFT's rule (`check_target_module_exists`)."""
    if isinstance(targets, str):
        all_linear = targets.lower() == "all-linear"
        return all_linear or re.fullmatch(targets, module) is not None
    return any(module == t or module.endswith(f".{t}") for t in targets)


def _by_pattern(values: dict[str, Any], field: str, module: str, default: Any) -> Any:
    """PEFT's rule (`get_pattern_key`): the first pattern that fits the end of the path."""
    patterns = values.get(field) or {}
    matches = (x for p, x in patterns.items() if re.match(rf"(.*\.)?({p})$", module))
    return next(matches, default)


def _prefix(folder: epath.Path, stored: Iterable[str]) -> str:
    """The one of PREFIXES that an adapter's tensors have."""
    for prefix in PREFIXES:
        if any(n.startswith(f"{BASE}{prefix}layers.") for n in stored):
            return prefix
    expected = ", ".join(f"{BASE}{p}layers.0..." for p in PREFIXES)
    raise ConvertError(
        f"{folder}: expected tensor names that begin with one of {expected}; got "
        f"{sorted(stored)[:2]}"
    )


def _node(llm: dict[str, Any], target: str) -> dict[str, Any]:
    return llm["layers"]["block"][LORA_TARGETS[target]][target]


def _module(target: str, prefix: str = PREFIXES[0]) -> str:
    """The published path of a target, with '{}' for the layer."""
    published = {r.paths[0]: r.name for r in names.llm_rules(LlamaConfig())}
    name = published[f"{parts_lib.LORA_BLOCK}/{LORA_TARGETS[target]}/{target}/kernel"]
    return prefix + name.removeprefix("model.").removesuffix(".weight")
