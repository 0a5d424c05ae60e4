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
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from etils import epath

from janusflow_jax import config as config_lib
from janusflow_jax.checkpoints import checksums, model_folder
from janusflow_jax.config import LORA_TARGETS, TrainConfig, parts as parts_lib
from janusflow_jax.config.errors import CheckpointError, ConvertError
from janusflow_jax.hub import names
from janusflow_jax.hub.safetensors import LazyTensor, open_folder, write_folder
from janusflow_jax.hub.tensors import raise_problems
from janusflow_jax.models import lora
from janusflow_jax.parallel import trees

WEIGHTS, CONFIG = "adapter_model", "adapter_config.json"
BASE = "base_model.model."
PREFIXES = ("language_model.model.", "model.", "")
"""What may precede 'layers.0...': the whole model was adapted (ours), its LLM alone
(LlamaForCausalLM), or that without its head (LlamaModel)."""
SHOWN = 8
"""How many problems of one kind a message lists."""

UNSUPPORTED = """
    use_dora bias lora_bias modules_to_save fan_in_fan_out layers_to_transform exclude_modules
    layer_replication target_parameters trainable_token_indices use_qalora use_bdlora
    alora_invocation_tokens arrow_config kasa_config monteclora_config
""".split()
"""PEFT's fields that, if set, make an adapter more than scaled products added to kernels."""
KNOWN = """
    alpha_pattern auto_mapping base_model_name_or_path corda_config ensure_weight_tying eva_config
    inference_mode init_lora_weights janusflow_jax layers_pattern loftq_config lora_alpha
    lora_dropout lora_ga_config megatron_core peft_type peft_version qalora_group_size r
    rank_pattern revision runtime_config target_modules task_type use_rslora velora_config
""".split()
"""Other fields: those that are read, and those that change nothing of a trained adapter."""
INITS = (True, None, False, "gaussian", "orthogonal", "eva")
"""Initializations that leave the base unchanged; others (PiSSA, OLoRA, LoftQ) change it."""


class AdapterConfig(NamedTuple):
    """The fields of `adapter_config.json` that count. `base`: '' if it names no checksum."""

    rank: int
    alpha: float
    rslora: bool
    targets: list[str] | str
    ranks: dict[str, int]
    alphas: dict[str, float]
    base: str

    def targeted(self, module: str) -> bool:
        """Whether a module has an adapter, by PEFT's rule (`check_target_module_exists`)."""
        if isinstance(self.targets, str):
            every = self.targets.lower() == "all-linear"
            return every or re.fullmatch(self.targets, module) is not None
        return any(_names_module(t, module) for t in self.targets)

    def rank_of(self, module: str) -> int:
        return _by_pattern(self.ranks, module, self.rank)

    def scale_of(self, module: str) -> float:
        rank = self.rank_of(module)
        alpha = _by_pattern(self.alphas, module, self.alpha)
        return alpha / (math.sqrt(rank) if self.rslora else rank)


def _names_module(target: str, module: str) -> bool:
    return module == target or module.endswith(f".{target}")


def _by_pattern(patterns: dict[str, Any], module: str, default: Any) -> Any:
    """PEFT's rule (`get_pattern_key`): the first pattern that fits the end of the path."""
    matches = (x for p, x in patterns.items() if re.match(rf"(.*\.)?({p})$", module))
    return next(matches, default)


def save_adapter(run: Any, out: Any, weights: str = "ema") -> str:
    """Writes the adapters of a training run (or one of its checkpoints) to the folder `out`.

    Returns: a line that describes what was written.
    Raises:
      ConvertError: the run has no adapters, or has trained more than them.
      CheckpointError: no checkpoint that loads, or `out` exists.
    """
    folder = epath.Path(out).resolve()
    if folder.exists():
        raise CheckpointError(f"{folder}: exists; choose another path")
    is_run = not (epath.Path(run) / model_folder.MODEL_FILE).exists()
    loaded = model_folder.load_model(run, weights=weights, merged=False) if is_run else None
    values = loaded.meta.get("config") if loaded else None
    cfg = config_lib.from_dict(TrainConfig, values) if values else None
    if loaded is None or cfg is None or not cfg.lora.rank:
        raise ConvertError(
            f"{run}: no adapters: expected a training run with lora.rank above 0; export the model "
            "itself"
        )
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
      ConvertError: no adapter, settings that are not supported, tensors that do not fit, or
        another base; one message lists all.
      CheckpointError: a config file that cannot be read.
    """
    folder = epath.Path(path).resolve()
    if llm is None:
        raise ConvertError(f"{folder}: expected a model with a language model; this one has none")
    if not (folder / CONFIG).exists():
        raise ConvertError(f"{folder}: expected an adapter ({CONFIG}, {WEIGHTS}.safetensors)")
    values = checksums.read_json(folder / CONFIG)
    if not isinstance(values, dict):
        raise ConvertError(f"{folder / CONFIG}: expected a JSON object; got {_short(values)}")
    cfg, problems = read_config(values)
    stored = open_folder(folder, (WEIGHTS,))
    problems += stored.problems
    tensors, prefix = ({}, "") if stored.problems else _plain_names(stored.tensors, problems)
    modules: dict[str, tuple[str, int]] = {}
    if cfg and not problems:
        modules = _modules(llm, cfg, prefix, problems)
        problems += _misfits(llm, cfg, modules, tensors) if modules else []
    targets = sorted({target for target, _ in modules.values()})
    base = values.get("base_model_name_or_path")
    if cfg and not problems and cfg.base and cfg.base != digest(llm, targets):
        problems.append(f"trained with another base: load {base or 'the model it was trained on'}")
    raise_problems(f"{folder}: this adapter does not fit the model", problems)
    assert cfg is not None
    notes = []
    if not cfg.base:
        notes.append(
            f"{CONFIG} has no janusflow_jax.base_sha256, so it was not checked that the adapter "
            f"was trained with this model ({base or 'it names no base'})"
        )
    known = {*UNSUPPORTED, *KNOWN}
    if unknown := sorted(name for name, x in values.items() if x and name not in known):
        notes.append(f"unknown fields in {CONFIG} are ignored: {unknown}")
    if notes:
        warnings.warn(f"{folder}: {'; '.join(notes)}", stacklevel=3)

    leaves = trees.flatten(llm)
    paths = {t: f"layers/block/{LORA_TARGETS[t]}/{t}/kernel" for t in targets}
    for kernel in paths.values():
        leaves[kernel] = np.array(leaves[kernel], np.float32)
    for module, (target, i) in modules.items():
        a, b = (np.asarray(tensors[f"{BASE}{module}.lora_{x}.weight"]).T for x in "AB")
        kernels = leaves[paths[target]]
        scale = cfg.scale_of(module)
        adapted = {"kernel": kernels[i], "lora_a": a, "lora_b": b, parts_lib.LORA_SCALE: scale}
        kernels[i] = lora.merge(adapted)["kernel"]
    return trees.unflatten(leaves)


def digest(llm: dict[str, Any], targets: Iterable[str]) -> str:
    """SHA-256 of the targets' kernels rounded to bfloat16, so that it is the same in any dtype."""
    out = hashlib.sha256()
    for target in sorted(targets):
        for x in _node(llm, target)["kernel"]:
            rounded = np.asarray(x).astype(jnp.bfloat16)
            out.update(f"{target} {rounded.shape};".encode())
            out.update(np.ascontiguousarray(rounded).view(np.uint16).data)
    return out.hexdigest()


def read_config(values: dict[str, Any]) -> tuple[AdapterConfig | None, list[str]]:
    """(settings, []) of an `adapter_config.json`, or (None, everything that is wrong with it)."""
    rank: Any = values.get("r")
    alpha: Any = values.get("lora_alpha")
    targets: Any = values.get("target_modules")
    ranks, alphas, ours = (
        values.get(n) or {} for n in ("rank_pattern", "alpha_pattern", "janusflow_jax")
    )
    base = ours.get("base_sha256") or "" if isinstance(ours, dict) else ours
    if isinstance(targets, str):
        valid_targets = bool(targets) and _compiles(targets)
    else:
        valid_targets = isinstance(targets, list) and all(isinstance(t, str) and t for t in targets)
    checks = (
        ("peft_type", values.get("peft_type") in (None, "", "LORA"), '"LORA"'),
        ("r", _is_rank(rank), "a whole number of 1 or more"),
        ("lora_alpha", _is_alpha(alpha), "a number above 0"),
        (
            "target_modules",
            valid_targets and targets,
            "names of modules, or a regular expression of their paths",
        ),
        ("use_rslora", values.get("use_rslora") in (None, True, False), "true or false"),
        ("rank_pattern", _is_table(ranks, _is_rank), "names or regular expressions with ranks"),
        (
            "alpha_pattern",
            _is_table(alphas, _is_alpha),
            "names or regular expressions with numbers above 0",
        ),
        (
            "init_lora_weights",
            values.get("init_lora_weights") in INITS,
            f"one of {_short(INITS)} (others change the base too)",
        ),
        ("janusflow_jax", isinstance(base, str), "an object with base_sha256, or none"),
    )
    problems = [
        f"{CONFIG}: {name}: expected {what}; got {_short(values.get(name))}"
        for name, valid, what in checks
        if not valid
    ]
    unsupported = [n for n in UNSUPPORTED if values.get(n) not in (None, False, "none", [], {})]
    problems += [f"{CONFIG}: {n}: expected it off; got {_short(values[n])}" for n in unsupported]
    if unsupported:
        problems.append("PEFT can apply it: use merge_and_unload there and convert the result")
    if problems:
        return None, problems
    rslora = bool(values.get("use_rslora"))
    return AdapterConfig(rank, alpha, rslora, targets, ranks, alphas, base), []


def _is_table(x: Any, valid: Callable[[Any], bool]) -> bool:
    """Whether x is a dict of patterns with valid values."""
    return isinstance(x, dict) and all(_compiles(p) and valid(v) for p, v in x.items())


def _is_rank(x: Any) -> bool:
    return isinstance(x, int) and not isinstance(x, bool) and x >= 1


def _is_alpha(x: Any) -> bool:
    return isinstance(x, int | float) and not isinstance(x, bool) and 0 < x < math.inf


def _compiles(pattern: str) -> bool:
    try:
        re.compile(f"({pattern})")
    except re.error:
        return False
    return True


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 80 else f"{text[:76]} ..."


def _plain_names(
    stored: dict[str, LazyTensor], problems: list[str]
) -> tuple[dict[str, LazyTensor], str]:
    """The tensors without the adapter's name in theirs ('lora_A.default.weight'), and a prefix."""
    pattern = re.compile(r"(\.lora_[AB])(?:\.([^.]+))?\.weight$")
    adapters = {match[2] or "" for n in stored if (match := pattern.search(n))}
    if len(adapters) > 1:
        problems.append(
            f"{WEIGHTS}: expected one adapter; got {len(adapters)}, named {sorted(adapters)}"
        )
    for prefix in PREFIXES:
        if any(n.startswith(f"{BASE}{prefix}layers.") for n in stored):
            return {pattern.sub(r"\1.weight", n): x for n, x in stored.items()}, prefix
    expected = ", ".join(f"{BASE}{p}layers.0..." for p in PREFIXES)
    examples = ", ".join(sorted(stored)[:2]) or "none"
    problems.append(
        f"{WEIGHTS}: expected names that begin with one of {expected}; got {len(stored)}, such as "
        f"{examples}"
    )
    return {}, ""


def _modules(
    llm: dict[str, Any], cfg: AdapterConfig, prefix: str, problems: list[str]
) -> dict[str, tuple[str, int]]:
    """Path of each module with an adapter -> (target, layer)."""
    every = {
        _module(target, prefix).format(i): (target, i)
        for target in LORA_TARGETS
        for i in range(len(_node(llm, target)["kernel"]))
    }
    out = {module: x for module, x in every.items() if cfg.targeted(module)}
    if isinstance(cfg.targets, str):
        unknown = [] if out else [cfg.targets]
    else:
        unknown = [t for t in cfg.targets if not any(_names_module(t, m) for m in every)]
    example = next(iter(every))
    problems += _first([f"target_modules: {t}: unknown; we have {example} ..." for t in unknown])
    return out


def _node(llm: dict[str, Any], target: str) -> dict[str, Any]:
    return llm["layers"]["block"][LORA_TARGETS[target]][target]


def _module(target: str, prefix: str = PREFIXES[0]) -> str:
    """The published path of a target, with '{}' for the layer."""
    published = {r.paths[0]: r.name for r in names.llm_rules()}
    name = published[f"{parts_lib.LORA_BLOCK}/{LORA_TARGETS[target]}/{target}/kernel"]
    return prefix + name.removeprefix("model.").removesuffix(".weight")


def _misfits(
    llm: dict[str, Any],
    cfg: AdapterConfig,
    modules: Mapping[str, tuple[str, int]],
    tensors: Mapping[str, Any],
) -> list[str]:
    """Every missing, unknown and misshaped tensor; of each kind the first few."""
    shapes = {}
    for module, (target, _) in modules.items():
        _, width, out = _node(llm, target)["kernel"].shape
        rank = cfg.rank_of(module)
        shapes[f"{BASE}{module}.lora_A.weight"] = (rank, width)
        shapes[f"{BASE}{module}.lora_B.weight"] = (out, rank)
    missing = [f"{n}: missing, expected shape {s}" for n, s in shapes.items() if n not in tensors]
    unknown = [f"{n}: unknown" for n in tensors if n not in shapes]
    misshaped = [
        f"{n}: expected shape {s}; got {tuple(tensors[n].shape)}"
        for n, s in shapes.items()
        if n in tensors and tuple(tensors[n].shape) != s
    ]
    return [*_first(missing), *_first(unknown), *_first(misshaped)]


def _first(lines: list[str]) -> list[str]:
    """At most SHOWN lines, and how many more there are of their kind."""
    more = len(lines) - SHOWN
    return sorted(lines)[:SHOWN] + ([f"... and {more} more like these"] if more > 0 else [])
