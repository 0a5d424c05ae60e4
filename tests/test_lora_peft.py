"""Adapters that others wrote in PEFT's layout: applied as PEFT does, or refused by name."""

from __future__ import annotations

import json
import math
import warnings

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from janusflow_jax import config as c
from janusflow_jax.config.errors import CheckpointError, ConvertError
from janusflow_jax.hub import adapters

LAYERS, WIDTH, OUT = 2, 6, 5
LLM = {
    "layers": {
        "block": {
            part: {
                t: {"kernel": np.zeros((LAYERS, WIDTH, OUT), np.float32)}
                for t, where in c.LORA_TARGETS.items()
                if where == part
            }
            for part in ("attn", "mlp")
        }
    }
}
ALONE = "model."  # the LLM's own names: a Llama adapted alone
EVERY = [
    f"layers.{i}.{'mlp' if part == 'mlp' else 'self_attn'}.{t}_proj"
    for t, part in c.LORA_TARGETS.items()
    for i in range(LAYERS)
]
QV = [m for m in EVERY if m.endswith((".q_proj", ".v_proj"))]
# As PEFT 0.21 writes them beside the ones that count, at their defaults.
DEFAULTS = {
    "alora_invocation_tokens": None,
    "alpha_pattern": {},
    "arrow_config": None,
    "auto_mapping": None,
    "base_model_name_or_path": "somebody/model",
    "bias": "none",
    "corda_config": None,
    "ensure_weight_tying": False,
    "eva_config": None,
    "exclude_modules": None,
    "fan_in_fan_out": False,
    "inference_mode": True,
    "init_lora_weights": True,
    "kasa_config": None,
    "layer_replication": None,
    "layers_pattern": None,
    "layers_to_transform": None,
    "loftq_config": {},
    "lora_bias": False,
    "lora_dropout": 0.05,
    "lora_ga_config": None,
    "megatron_config": None,
    "megatron_core": "megatron.core",
    "modules_to_save": None,
    "monteclora_config": None,
    "peft_type": "LORA",
    "peft_version": "0.21.2",
    "qalora_group_size": 16,
    "rank_pattern": {},
    "revision": None,
    "target_parameters": None,
    "task_type": "CAUSAL_LM",
    "trainable_token_indices": None,
    "use_bdlora": None,
    "use_dora": False,
    "use_qalora": False,
    "use_rslora": False,
    "velora_config": None,
}
PLAIN = {**DEFAULTS, "r": 2, "lora_alpha": 4, "target_modules": ["q_proj", "v_proj"]}


def write(folder, about, modules=(), *, head=ALONE, ranks=None):
    """An adapter whose product is 1 everywhere: what is added to a kernel is the scale."""
    folder.mkdir(exist_ok=True)
    tensors = {}
    for module in modules:
        rank = (ranks or {}).get(module, 2)
        name = f"base_model.model.{head}{module}.lora_"
        tensors[f"{name}A.weight"] = np.full((rank, WIDTH), 1 / rank, np.float32)
        tensors[f"{name}B.weight"] = np.ones((OUT, rank), np.float32)
    (folder / "adapter_config.json").write_text(json.dumps(about))
    save_file(tensors, folder / "adapter_model.safetensors")
    return folder


def scales(folder) -> dict[str, float]:
    """Module -> what was added to its kernel; those with nothing left out."""
    with pytest.warns(UserWarning, match="base_sha256"):
        block = adapters.apply(LLM, folder)["layers"]["block"]
    out = {}
    for module in EVERY:
        _, i, _, name = module.split(".")
        target = name.removesuffix("_proj")
        kernel = block[c.LORA_TARGETS[target]][target]["kernel"][int(i)]
        assert kernel.min() == pytest.approx(kernel.max())
        if kernel.max():
            out[module] = pytest.approx(float(kernel.max()))
    return out


def refused(folder) -> str:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with pytest.raises((ConvertError, CheckpointError)) as error:
            adapters.apply(LLM, folder)
    return str(error.value)


Q0, Q1, V0, V1 = QV
# changes of the config -> ranks other than 2, scales; all compared with PEFT 0.21.2's `scaling`.
SCALES = {
    "plain": ({}, {}, (2, 2, 2, 2)),
    "rslora": ({"use_rslora": True}, {}, [4 / math.sqrt(2)] * 4),
    "alpha": ({"alpha_pattern": {"v_proj": 10}}, {}, (2, 2, 5, 5)),
    "alpha by path": ({"alpha_pattern": {"model.layers.1.self_attn.q_proj": 6}}, {}, (2, 3, 2, 2)),
    "alpha by expression": ({"alpha_pattern": {r"1\..*[qv]_proj": 6}}, {}, (2, 3, 2, 3)),
    "whole names": ({"alpha_pattern": {"^layers.1.*": 6, "proj": 8}}, {}, (2, 2, 2, 2)),
    "the first counts": ({"alpha_pattern": {".*q_proj": 6, "q_proj": 8}}, {}, (3, 3, 2, 2)),
    "rank": ({"rank_pattern": {"q_proj": 4}}, {Q0: 4, Q1: 4}, (1, 1, 2, 2)),
    "all": (
        {
            "rank_pattern": {"0.self_attn.v_proj": 9},
            "alpha_pattern": {"v_proj": 6},
            "use_rslora": True,
        },
        {V0: 9},
        (4 / math.sqrt(2), 4 / math.sqrt(2), 2, 6 / math.sqrt(2)),
    ),
}


@pytest.mark.parametrize("case", SCALES)
def test_scales_are_pefts(tmp_path, case):
    changes, ranks, want = SCALES[case]
    folder = write(tmp_path / "adapter", {**PLAIN, **changes}, QV, ranks=ranks)
    assert scales(folder) == dict(zip(QV, want, strict=True))


TARGETS = {
    "all-linear": ("all-linear", EVERY),
    "expression": (r".*\.1\.mlp\.[a-z]*_proj", [m for m in EVERY if "1.mlp." in m]),
    "paths": (["model.layers.0.self_attn.q_proj", "self_attn.v_proj"], [Q0, V0, V1]),
    "part and name": (["mlp.up_proj"], [m for m in EVERY if "up_proj" in m]),
}


@pytest.mark.parametrize("case", TARGETS)
def test_targets_are_read_as_peft_reads_them(tmp_path, case):
    targets, want = TARGETS[case]
    folder = write(tmp_path / "adapter", {**PLAIN, "target_modules": targets}, want)
    assert scales(folder) == dict.fromkeys(want, 2)


@pytest.mark.parametrize("head", ["language_model.model.", "model.language_model.", "model.", ""])
def test_layouts_of_names(tmp_path, head):
    folder = write(tmp_path / "adapter", PLAIN, QV, head=head)
    assert scales(folder) == dict.fromkeys(QV, 2)


def test_the_base_is_checked_if_the_adapter_names_it(tmp_path):
    folder = write(tmp_path / "adapter", {**PLAIN, "janusflow_jax": None}, QV)
    with pytest.warns(UserWarning) as caught:
        adapters.apply(LLM, folder)
    (message,) = (str(w.message) for w in caught)
    for text in (str(folder), "somebody/model", "base_sha256"):
        assert text in message
    about = {**PLAIN, "janusflow_jax": {"base_sha256": adapters.digest(LLM, ("q", "v"))}}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        adapters.apply(LLM, write(folder, about, QV))
    about["janusflow_jax"]["base_sha256"] = "0" * 64
    assert "trained with another base: load somebody/model" in refused(write(folder, about, QV))


def test_what_is_not_supported_is_refused_by_name(tmp_path):
    wrong = {
        "peft_type": "LOHA",
        "use_dora": True,
        "bias": "lora_only",
        "lora_bias": True,
        "modules_to_save": ["lm_head"],
        "fan_in_fan_out": True,
        "layers_to_transform": [0],
        "exclude_modules": ["v_proj"],
        "layer_replication": [[0, 1]],
        "use_qalora": True,
        "target_parameters": ["x"],
        "trainable_token_indices": [1],
        "use_bdlora": {"a": 1},
        "alora_invocation_tokens": [1],
        "arrow_config": {"top_k": 3},
        "kasa_config": {"beta": 1},
        "monteclora_config": {"n": 1},
        "init_lora_weights": "pissa_niter_4",
        "use_tomorrow": 3,
    }
    folder = tmp_path / "adapter"
    message = refused(write(folder, {**PLAIN, **wrong}, QV))
    for name, value in wrong.items():
        assert f"{name} = {json.dumps(value)}" in message
        alone = refused(write(folder, {**PLAIN, name: value}, QV))
        assert f"{name} = " in alone and alone.count(" = ") == 1
    assert "merge_and_unload" in message


@pytest.mark.parametrize(
    ("about", "message"),
    [
        ({"r": 2}, "expected a LoRA adapter with r, lora_alpha, target_modules"),
        ([], "expected a LoRA adapter with r, lora_alpha, target_modules"),
        (
            {**PLAIN, "lora_alpha": "x"},
            "lora_alpha: expected a number above 0 and below 1e+06; got 'x'",
        ),
        (
            {**PLAIN, "lora_alpha": float("nan")},
            "lora_alpha: expected a number above 0 and below 1e+06; got nan",
        ),
        ({**PLAIN, "target_modules": "(q"}, "expected a regular expression; got '(q'"),
        ({**PLAIN, "r": 3}, "lora_A.weight: expected shape (3, 6); got (2, 6)"),
        ({**PLAIN, "target_modules": ["a_proj"]}, "q_proj.lora_A.weight: unknown"),
        ({**PLAIN, "target_modules": "all-linear"}, "k_proj.lora_A.weight: missing"),
    ],
)
def test_a_config_of_other_tensors(tmp_path, about, message):
    assert message in refused(write(tmp_path / "adapter", about, QV))


@pytest.mark.parametrize("value", [np.nan, np.inf, 3e38])
@pytest.mark.parametrize("letter", "AB")
def test_values_that_no_model_can_use_are_named(tmp_path, letter, value):
    folder = write(tmp_path / "adapter", PLAIN, QV)
    tensors = load_file(folder / "adapter_model.safetensors")
    name = f"base_model.model.model.{Q1}.lora_{letter}.weight"
    tensors[name] = np.full_like(tensors[name], value)
    save_file(tensors, folder / "adapter_model.safetensors")
    expected = name.removesuffix(f".lora_{letter}.weight") if value == 3e38 else name
    message = refused(folder)
    assert str(folder) in message and expected.removeprefix("base_model.model.") in message


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"lora_alpha": 1e30}, "lora_alpha"),
        ({"alpha_pattern": {"q_proj": 1e30}}, "q_proj"),
        ({"lora_alpha": 10**400}, "lora_alpha"),
    ],
)
def test_a_scale_that_overflows_is_refused(tmp_path, change, message):
    assert message in refused(write(tmp_path / "adapter", {**PLAIN, **change}, QV))


def test_empty_tensors_of_deepspeed_are_explained(tmp_path):
    folder = write(tmp_path / "adapter", PLAIN, QV)
    tensors = load_file(folder / "adapter_model.safetensors")
    empty = {name: np.zeros(0, np.float32) for name in tensors}
    save_file(empty, folder / "adapter_model.safetensors")
    assert "DeepSpeed" in refused(folder)


def test_fields_of_trainers_change_nothing(tmp_path):
    about = {**PLAIN, "unsloth_version": "2025.9", "loraplus_lr_ratio": 16.0}
    assert scales(write(tmp_path / "adapter", about, QV)) == dict.fromkeys(QV, 2)


def test_bad_weights(tmp_path):
    folder = write(tmp_path / "adapter", PLAIN, QV, head="transformer.model.")
    message = refused(folder)
    for text in (
        "begin with one of base_model.model.language_model.model.layers.0...",
        "base_model.model.model.layers.0...",
        "base_model.model.transformer.model.layers.0.self_attn.q_proj.lora_A.weight",
    ):
        assert text in message
    (folder / "adapter_model.safetensors").unlink()
    (folder / "adapter_model.bin").touch()
    message = refused(folder)
    assert "expected adapter_model.safetensors" in message and "pickle" in message
