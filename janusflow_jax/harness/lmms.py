"""lmms-eval with our models: `--model janusflow_jax --model_args path=MODEL`.

lmms-eval finds `manifest` by the entry point in pyproject.toml; docs/benchmarks.md has its set-up.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from lmms_eval.api.model import lmms  # pyright: ignore[reportMissingImports]
from lmms_eval.models.registry_v2 import ModelManifest  # pyright: ignore[reportMissingImports]

from janusflow_jax import pipeline
from janusflow_jax.config.errors import ConfigError, DataError

DEFAULT_TOKENS = 1024
"""New tokens where a task names no number."""


def manifest() -> ModelManifest:
    """What lmms-eval registers."""
    return ModelManifest("janusflow_jax", simple_class_path=f"{__name__}.Model")


class Model(lmms):
    """Answers the requests of lmms-eval in batches.

    Args:
      path: a model, as `pipeline.load` takes it.
      system: the system prompt. The published scores of Janus have none, but for MM-Vet.
      dtype, weights: as of `pipeline.load`.
      batch_size: lmms-eval's `--batch_size`.
    """

    is_simple = True

    def __init__(
        self,
        path: str,
        system: str = "",
        dtype: str | None = None,
        weights: str = "ema",
        batch_size: int | str = 16,
        **unused: Any,  # lmms-eval's device and max_batch_size
    ) -> None:
        super().__init__()
        if not str(batch_size).isdigit() or not int(batch_size):
            raise ConfigError(f"--batch_size: expected a positive number; got {batch_size!r}")
        self._model = pipeline.load(path, dtype=dtype, weights=weights)
        self._system, self._batch_size = system, int(batch_size)

    def generate_until(self, requests: list[Any]) -> list[str]:
        """The answer to every request; its text is cut at the first stop string."""
        answers = [""] * len(requests)
        # Requests of one batch share their options, and almost their length.
        keys = [(sorted(_options(r.args[1]).items()), len(r.args[0])) for r in requests]
        order = sorted(range(len(requests)), key=keys.__getitem__)
        while order:
            options, _ = keys[order[0]]
            same = [n for n in order[: self._batch_size] if keys[n][0] == options]
            order = order[len(same) :]
            turns = [self._turns(*requests[n].args) for n in same]
            for n, answer in zip(same, self._model.chat(turns, **dict(options)), strict=True):
                stops = requests[n].args[1].get("until") or []
                for stop in [stops] if isinstance(stops, str) else stops:
                    answer = answer.split(stop)[0] if stop else answer
                answers[n] = answer
        return answers

    def _turns(
        self, text: str, _: Any, doc_to_visual: Any, doc_id: Any, task: str, split: str
    ) -> list[dict[str, Any]]:
        images = doc_to_visual(self.task_dict[task][split][doc_id]) or []
        if not all(hasattr(image, "convert") for image in images):
            raise DataError(f"task {task}, document {doc_id}: expected images only; got {images!r}")
        pixels = [np.asarray(image.convert("RGB")) for image in images]
        tag = self._model.text.image_tag
        if images and text.count("<image>") == len(images):  # the task places them
            content = text.replace("<image>", tag)
        else:
            content = f"{tag * len(images)}\n{text}" if images else text
        return [
            {"role": "System", "content": self._system},
            {"role": "User", "content": content, "images": pixels},
        ]

    def loglikelihood(self, requests: list[Any]) -> Any:
        raise NotImplementedError("janusflow_jax only runs tasks that generate text")

    def generate_until_multi_round(self, requests: list[Any]) -> Any:
        raise NotImplementedError("janusflow_jax only runs tasks of one round")


def _options(task: dict[str, Any]) -> dict[str, Any]:
    """A task's generation_kwargs -> options of `Pipeline.chat`."""
    temperature = float(task.get("temperature") or 0)
    sampled = bool(task.get("do_sample", temperature > 0)) and temperature > 0
    return {
        "max_new_tokens": int(task.get("max_new_tokens") or DEFAULT_TOKENS),
        "temperature": temperature if sampled else 0.0,
        "top_p": float(task.get("top_p") or 1.0) if sampled else 1.0,
    }
