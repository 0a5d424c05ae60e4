"""VLMEvalKit with our models, by its own command line.

    python -m janusflow_jax.harness.vlmeval --path MODEL --data POPE MME --work-dir OUT

Other arguments are VLMEvalKit's (`vlmeval/run.py`). docs/benchmarks.md has the set-up.
"""

from __future__ import annotations

import argparse
import functools
import sys
from typing import Any

import numpy as np
import vlmeval.config  # pyright: ignore[reportMissingImports]
import vlmeval.run  # pyright: ignore[reportMissingImports]
from PIL import Image
from vlmeval.vlm.base import BaseModel  # pyright: ignore[reportMissingImports]
from vlmeval.vlm.janus import Janus  # pyright: ignore[reportMissingImports]

from janusflow_jax import pipeline
from janusflow_jax.eval.benchmarks.answer import MMVET_SYSTEM

NAME = "janusflow_jax"

Message = list[dict[str, Any]]


class JanusFlow(Janus):
    """Answers with our model and the prompts of the authors of Janus, which it inherits.

    VLMEvalKit asks one question at a time. The first that has no answer yet is answered in a batch
    with the next ones of the data set.

    Args:
      path: a model, as `pipeline.load` takes it.
      batch: questions at once.
      max_new_tokens: of an answer.
    """

    INSTALL_REQ = False

    def __init__(self, path: str, batch: int = 16, max_new_tokens: int = 2048) -> None:
        BaseModel.__init__(self)  # Janus's own loads the PyTorch model
        self._model = pipeline.load(path)
        self._batch, self._max_new_tokens = batch, max_new_tokens
        self._answers: dict[Any, str] = {}
        self._messages: dict[Any, Message] = {}

    def set_dump_image(self, dump_image_func: Any) -> None:
        """VLMEvalKit calls this with a method of each data set before its first question."""
        super().set_dump_image(dump_image_func)
        data = dump_image_func.__self__
        name = data.dataset_name
        build = (
            functools.partial(self.build_prompt, dataset=name)
            if self.use_custom_prompt(name)
            else data.build_prompt
        )
        messages = [self.preproc_content(build(line)) for _, line in data.data.iterrows()]
        self._messages, self._answers = {_key(message): message for message in messages}, {}

    def generate_inner(self, message: Message, dataset: str | None = None) -> str:
        if (key := _key(message)) not in self._answers:
            keys = [*self._messages]
            begin = keys.index(key) if key in self._messages else len(keys)
            rest = [other for other in keys[begin:] if other not in self._answers] or [key]
            batch = {other: self._messages.get(other, message) for other in rest[: self._batch]}
            system = MMVET_SYSTEM if dataset and "MMVet" in dataset else ""
            turns = [self._turns(own, system) for own in batch.values()]
            answers = self._model.chat(turns, max_new_tokens=self._max_new_tokens)
            self._answers |= dict(zip(batch, answers, strict=True))
        return self._answers[key]

    def _turns(self, message: Message, system: str) -> list[dict[str, Any]]:
        """Images and texts in their order, as the published code joins them."""
        tag, content, images = self._model.text.image_tag, "", []
        for part in message:
            if part["type"] == "image":
                content += tag
                with Image.open(part["value"]) as image:
                    images.append(np.asarray(image.convert("RGB")))
            else:
                content += part["value"]
        user = {"role": "User", "content": content, "images": images}
        return [{"role": "System", "content": system}, user]


def _key(message: Message) -> Any:
    return tuple((part["type"], part["value"]) for part in message)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("--path", required=True, help="model folder, workdir or checkpoint")
    parser.add_argument("--batch", type=int, default=16, help="questions at once")
    parser.add_argument("--max-new-tokens", type=int, default=2048, help="longest answer")
    own, rest = parser.parse_known_args()
    load = functools.partial(JanusFlow, own.path, own.batch, own.max_new_tokens)
    vlmeval.config.supported_VLM[NAME] = load
    sys.argv = [sys.argv[0], *rest, "--model", NAME]
    vlmeval.run.main()


if __name__ == "__main__":
    main()
