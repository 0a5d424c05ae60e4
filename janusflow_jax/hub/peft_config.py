"""What PEFT's `adapter_config.json` says of an adapter, checked, by PEFT's own rules of matching.

What is more than scaled products added to kernels is refused by name. Standard library only.
"""

from __future__ import annotations

import json
import math
import re
from typing import Any, NamedTuple

CONFIG = "adapter_config.json"
REFUSED = (
    "use_dora",
    "bias",
    "lora_bias",
    "modules_to_save",
    "fan_in_fan_out",
    "layers_to_transform",
    "exclude_modules",
    "layer_replication",
    "target_parameters",
    "trainable_token_indices",
    "use_qalora",
    "use_bdlora",
    "alora_invocation_tokens",
    "arrow_config",
    "kasa_config",
    "monteclora_config",
)
"""PEFT's fields that make an adapter more than scaled products added to kernels, where set."""
KNOWN = {
    *REFUSED,
    "alpha_pattern",
    "auto_mapping",
    "base_model_name_or_path",
    "corda_config",
    "ensure_weight_tying",
    "eva_config",
    "inference_mode",
    "init_lora_weights",
    "janusflow_jax",
    "layers_pattern",
    "loftq_config",
    "lora_alpha",
    "lora_dropout",
    "lora_ga_config",
    "megatron_core",
    "peft_type",
    "peft_version",
    "qalora_group_size",
    "r",
    "rank_pattern",
    "revision",
    "runtime_config",
    "target_modules",
    "task_type",
    "use_rslora",
    "velora_config",
}
"""All that we read or refuse, and what changes nothing of a trained adapter."""
INITS = (True, None, False, "gaussian", "orthogonal", "eva")
"""Starts of an adapter that leave the base as it is; others (PiSSA, OLoRA, LoftQ) change it."""


class About(NamedTuple):
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
        return any(named_by(t, module) for t in self.targets)

    def rank_of(self, module: str) -> int:
        return _by_pattern(self.ranks, module, self.rank)

    def scale_of(self, module: str) -> float:
        rank = self.rank_of(module)
        return _by_pattern(self.alphas, module, self.alpha) / (
            math.sqrt(rank) if self.rslora else rank
        )


def named_by(target: str, module: str) -> bool:
    return module == target or module.endswith(f".{target}")


def _by_pattern(patterns: dict[str, Any], module: str, default: Any) -> Any:
    """PEFT's rule (`get_pattern_key`): the first that fits the end of the module's path."""
    fits = (x for p, x in patterns.items() if re.match(rf"(.*\.)?({p})$", module))
    return next(fits, default)


def read(given: dict[str, Any], problems: list[str]) -> About | None:
    """The settings of a config file; None, and all that is wrong added to `problems`."""
    bad: list[str] = []

    def expect(right: bool, name: str, what: str, value: Any) -> None:
        if not right:
            bad.append(f"{CONFIG}: {name}: expected {what}; got {short(value)}")

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
        given.get("init_lora_weights") in INITS,
        "init_lora_weights",
        f"one of {short(INITS)}: others change the base, so that the product alone is not it",
        given.get("init_lora_weights"),
    )
    refused = [n for n in REFUSED if given.get(n) not in (None, False, "none", [], {})]
    bad += [f"{CONFIG}: {n}: expected it off; got {short(given[n])}" for n in refused]
    if refused:
        bad.append("what we cannot apply, PEFT can: merge_and_unload there, and convert the result")
    ours = given.get("janusflow_jax") or {}
    base = (ours.get("base_sha256") or "") if isinstance(ours, dict) else ""
    expect(isinstance(ours, dict), "janusflow_jax", "an object with base_sha256, or none", ours)
    expect(isinstance(base, str), "janusflow_jax.base_sha256", "a SHA-256", base)
    problems += bad
    return None if bad else About(rank, alpha, bool(rslora), targets or "", ranks, alphas, base)


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


def short(value: Any) -> str:
    """A value in a message."""
    text = json.dumps(value)
    return text if len(text) <= 80 else f"{text[:76]} ..."
