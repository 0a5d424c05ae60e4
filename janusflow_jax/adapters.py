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
import math
import re
import warnings
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from etils import epath

from janusflow_jax import checkpoint, checksums, torch_names, train_step, trees
from janusflow_jax import config as config_lib
from janusflow_jax.config import LORA_TARGETS, TrainConfig
from janusflow_jax.models import lora
from janusflow_jax.safetensor_files import LazyTensor, Made, open_folder, write_folder

WEIGHTS, CONFIG = "adapter_model", "adapter_config.json"
BASE = "base_model.model."
HEADS = ("language_model.model.", "model.", "")
"""What may stand before 'layers.0...': the whole model was adapted (ours), its LLM alone
(LlamaForCausalLM), or that without its head (LlamaModel)."""
REFUSED = (
    "use_dora", "bias", "lora_bias", "modules_to_save", "fan_in_fan_out", "layers_to_transform",
    "exclude_modules", "layer_replication", "target_parameters", "trainable_token_indices",
    "use_qalora", "use_bdlora", "alora_invocation_tokens", "arrow_config", "kasa_config",
    "monteclora_config",
)  # fmt: skip
"""PEFT's fields that make an adapter more than scaled products added to kernels, where set."""
KNOWN = {
    *REFUSED, "alpha_pattern", "auto_mapping", "base_model_name_or_path", "corda_config",
    "ensure_weight_tying", "eva_config", "inference_mode", "init_lora_weights", "janusflow_jax",
    "layers_pattern", "loftq_config", "lora_alpha", "lora_dropout", "lora_ga_config",
    "megatron_core", "peft_type", "peft_version", "qalora_group_size", "r", "rank_pattern",
    "revision", "runtime_config", "target_modules", "task_type", "use_rslora", "velora_config",
}  # fmt: skip
"""All that we read or refuse, and what changes nothing of a trained adapter."""
INITS = (True, None, False, "gaussian", "orthogonal", "eva")
"""Starts of an adapter that leave the base as it is; others (PiSSA, OLoRA, LoftQ) change it."""
SHOWN = 8
"""How many of the same kind of problem a message lists."""


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
            "run": cfg.name, "step": loaded.meta.get("step"),
        },
    }  # fmt: skip
    folder.mkdir(parents=True)
    write_folder(folder, WEIGHTS, made)
    (folder / CONFIG).write_text(json.dumps(about, indent=1) + "\n")  # last: without it, no adapter
    size = sum(x.nbytes for x in made.values()) / 1e6
    return f"{folder}: {len(made)} tensors, {size:.1f} MB, of rank {cfg.lora.rank}"


class _About(NamedTuple):
    """What a config file says, checked; ranks and alphas: by pattern; base: '' where not said."""

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
        return any(_named_by(t, module) for t in self.targets)

    def rank_of(self, module: str) -> int:
        return _by_pattern(self.ranks, module, self.rank)

    def scale_of(self, module: str) -> float:
        rank = self.rank_of(module)
        return _by_pattern(self.alphas, module, self.alpha) / (
            math.sqrt(rank) if self.rslora else rank
        )


def _named_by(target: str, module: str) -> bool:
    return module == target or module.endswith(f".{target}")


def _by_pattern(patterns: dict[str, Any], module: str, default: Any) -> Any:
    """PEFT's rule (`get_pattern_key`): the first that fits the end of the module's path."""
    fits = (x for p, x in patterns.items() if re.match(rf"(.*\.)?({p})$", module))
    return next(fits, default)


def apply(llm: dict[str, Any] | None, path: Any) -> dict[str, Any]:
    """The LLM's tree (stacked layers) with the adapters of a folder added to its kernels.

    Warns where the adapters do not say which base they were trained beside.

    Raises:
      AdapterError: no adapter, settings that we do not support, tensors that do not fit, or
        another base; all that is wrong in one message.
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
    given = checksums.read_json(folder / CONFIG)
    if not isinstance(given, dict):
        raise AdapterError(
            f"{folder / CONFIG}: expected PEFT's fields, a JSON object; got {_short(given)}"
        )
    problems: list[str] = []
    about = _read_about(given, problems)
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
        raise AdapterError(f"{folder}: these adapters cannot be put onto this model:\n{listed}")
    _warn(folder, given, about)
    leaves = trees.flat(llm)
    for target in sorted(targets):
        where = f"layers/block/{LORA_TARGETS[target]}/{target}/kernel"
        leaves[where] = np.asarray(leaves[where]).astype(np.float32)
    for module, (target, i) in modules.items():
        kernels = leaves[f"layers/block/{LORA_TARGETS[target]}/{target}/kernel"]
        a, b = (np.asarray(tensors[f"{BASE}{module}.lora_{x}.weight"]).T for x in "AB")
        adapted = {
            "kernel": kernels[i], "lora_a": a, "lora_b": b, lora.SCALE: about.scale_of(module)
        }  # fmt: skip
        kernels[i] = lora.merge(adapted)["kernel"]
    return trees.nested(leaves)


def _warn(folder: epath.Path, given: dict[str, Any], about: _About) -> None:
    """Says what could not be made sure of, on stderr."""
    notes = []
    if not about.base:
        named = given.get("base_model_name_or_path")
        notes.append(
            f"{CONFIG} has no janusflow_jax.base_sha256, so nobody checked that this model is the "
            f"one that they were trained beside{f' ({named})' if named else ''}"
        )
    if unknown := sorted(name for name, x in given.items() if x and name not in KNOWN):
        notes.append(f"{CONFIG} has fields that we do not know, which are ignored: {unknown}")
    if notes:
        warnings.warn(f"{folder}: {'; '.join(notes)}", stacklevel=4)


def _short(value: Any) -> str:
    """A value in a message."""
    text = json.dumps(value)
    return text if len(text) <= 80 else f"{text[:76]} ..."


def _read_about(given: dict[str, Any], problems: list[str]) -> _About | None:
    """The settings of a config file; None, and all that is wrong added to `problems`."""
    bad: list[str] = []

    def expect(right: bool, name: str, what: str, value: Any) -> None:
        if not right:
            bad.append(f"{CONFIG}: {name}: expected {what}; got {_short(value)}")

    if lacking := [n for n in ("r", "lora_alpha", "target_modules") if given.get(n) is None]:
        bad.append(f"{CONFIG}: expected PEFT's fields; it lacks {lacking}")
    kind = given.get("peft_type") or "LORA"
    expect(kind == "LORA", "peft_type", '"LORA", the only kind that we put onto a model', kind)
    rank, alpha = given.get("r", 1), given.get("lora_alpha", 1)
    targets = given.get("target_modules")
    items = [targets] if isinstance(targets, str) else targets
    right = isinstance(items, list) and items and all(isinstance(t, str) and t for t in items)
    if isinstance(targets, str):
        right = right and _compiles(targets)
    checks = (
        ("r", _is_rank(rank), "a whole number of 1 or more"),
        ("lora_alpha", _is_alpha(alpha), "a number above 0"),
        ("target_modules", right, "names of modules, or a regular expression of their paths"),
    )
    for name, right, what in checks:
        if name not in lacking:
            expect(bool(right), name, what, given[name])
    rslora = given.get("use_rslora")
    expect(rslora in (None, True, False), "use_rslora", "true or false", rslora)
    ranks, alphas = (given.get(n) or {} for n in ("rank_pattern", "alpha_pattern"))
    right = isinstance(ranks, dict) and all(_compiles(p) and _is_rank(x) for p, x in ranks.items())
    expect(right, "rank_pattern", "names or regular expressions with ranks", ranks)
    right = isinstance(alphas, dict) and all(
        _compiles(p) and _is_alpha(x) for p, x in alphas.items()
    )
    expect(right, "alpha_pattern", "names or regular expressions with numbers above 0", alphas)
    expect(
        given.get("init_lora_weights") in INITS, "init_lora_weights",
        f"one of {_short(INITS)}: others change the base, so that the product alone is not it",
        given.get("init_lora_weights"),
    )  # fmt: skip
    refused = [n for n in REFUSED if given.get(n) not in (None, False, "none", [], {})]
    bad += [f"{CONFIG}: {n}: expected it off; got {_short(given[n])}" for n in refused]
    if refused:
        bad.append("what we cannot apply, PEFT can: merge_and_unload there, and convert the result")
    ours = given.get("janusflow_jax") or {}
    base = (ours.get("base_sha256") or "") if isinstance(ours, dict) else ""
    expect(isinstance(ours, dict), "janusflow_jax", "an object with base_sha256, or none", ours)
    expect(isinstance(base, str), "janusflow_jax.base_sha256", "a SHA-256", base)
    problems += bad
    return None if bad else _About(rank, alpha, bool(rslora), targets or "", ranks, alphas, base)


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
    llm: dict[str, Any], about: _About, head: str, problems: list[str]
) -> dict[str, tuple[str, int]]:
    """Path of a module with an adapter -> target and layer; targets that are none of ours."""
    every = {
        _module(target, head).format(i): (target, i)
        for target in LORA_TARGETS
        for i in range(len(_node(llm, target)["kernel"]))
    }
    out = {module: x for module, x in every.items() if about.targeted(module)}
    bad = [t for t in about.targets if not any(_named_by(t, m) for m in every)]
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
    named = {r.paths[0]: r.name for r in torch_names.llm_rules()}
    name = named[f"{lora.BLOCK}/{LORA_TARGETS[target]}/{target}/kernel"]
    return head + name.removeprefix("model.").removesuffix(".weight")


def _unfit(
    llm: dict[str, Any],
    about: _About,
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
