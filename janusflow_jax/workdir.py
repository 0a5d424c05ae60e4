"""A run's folder: what it holds from the start, and whether a config may go on in it."""

from __future__ import annotations

import json
from typing import Any

from etils import epath

from janusflow_jax import checkpoint
from janusflow_jax import config as config_lib
from janusflow_jax.config import TrainConfig

# What a run may change when it goes on: everything else makes it another run.
MAY_CHANGE = frozenset(
    "workdir num_steps log_every_steps save_every_steps keep_checkpoints sheet_every_steps "
    "tensorboard prompts heldout heldout_captions sheet_cfg_weight sheet_num_steps mesh init start "
    "made_by data.num_threads data.max_bad_share attention remat max_bad_steps peak_tflops".split()
)


def start(workdir: epath.Path, cfg: TrainConfig, *, vae: Any, hub: Any) -> None:
    """Makes a run's folder, or checks that the one that is there is the same run.

    Raises:
      checkpoint.CheckpointError: it holds a run of another config (lists every difference).
    """
    file = workdir / "config.json"
    now = _flat_config(config_lib.to_dict(cfg))
    if file.exists():
        # a field that the run's version did not have stood at what is now its default
        then = _flat_config(config_lib.to_dict(TrainConfig())) | _flat_config(
            checkpoint.read_json(file)
        )
        differ = [
            f"{n}: {then.get(n)!r} then, {now.get(n)!r} now"
            for n in sorted(then.keys() | now)
            if then.get(n) != now.get(n) and not _may_change(n)
        ]
        if differ:
            listed = "\n".join(f"  - {d}" for d in differ)
            raise checkpoint.CheckpointError(
                f"{workdir}: holds a run of another config:\n{listed}\nUse another folder "
                "(--config.workdir=...), or the old config to go on with it"
            )
    workdir.mkdir(parents=True, exist_ok=True)
    if not (workdir / "base" / checkpoint.MODEL_FILE).exists():
        checkpoint.save_model(
            workdir / "base",
            model_cfg=cfg.model,
            params=None,
            vae=vae,
            hub_files=hub,
            extra={"made_by": "train"},
            overwrite=True,
        )
    file.write_text(json.dumps(config_lib.to_dict(cfg), indent=1))


def _may_change(name: str) -> bool:
    return any(name == n or name.startswith(f"{n}.") for n in MAY_CHANGE)


def _flat_config(values: Any, prefix: str = "") -> dict[str, Any]:
    if isinstance(values, list):  # of sources, the only lists of dicts: each with its defaults
        source = config_lib.to_dict(config_lib.SourceConfig())
        values = [source | v if isinstance(v, dict) else v for v in values]
    if not isinstance(values, dict):
        return {prefix[:-1]: values}
    out: dict[str, Any] = {}
    for name, value in values.items():
        out |= _flat_config(value, f"{prefix}{name}.")
    return out
