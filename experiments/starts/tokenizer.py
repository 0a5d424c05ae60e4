"""The quick start's tokenizer: a small byte-level BPE in DeepSeek's form.

Writes the files that a JanusFlow folder has: tokenizer.json, tokenizer_config.json,
special_tokens_map.json, processor_config.json, preprocessor_config.json.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

from etils import epath

from janusflow_jax.data import chat_format, samples
from janusflow_jax.openmoji import classes, drawings, prompts

BOS = "<｜begin▁of▁sentence｜>"
EOS = "<｜end▁of▁sentence｜>"
PAD = "<｜▁pad▁｜>"
IMAGE, IMAGE_BEGIN, IMAGE_END = "<image_placeholder>", "<image_beg>", "<image_end>"
GENERATION = "<｜begin▁of▁generation｜>"
SPECIALS = (BOS, EOS, IMAGE, IMAGE_BEGIN, IMAGE_END, GENERATION, PAD)
"""Special tokens in the order of their ids."""


def training_texts() -> Iterator[str]:
    """The fixed words of the chat, and all captions.

    The system prompt is repeated so that its words become single tokens (36 in all).
    """
    for _ in range(200):
        yield f"{chat_format.SYSTEM_PROMPT}\n\nUser: \n{samples.QUESTION}\n\nAssistant:"
        yield chat_format.CAPTION_REQUEST
    for name in classes.CLASSES.values():
        for color in prompts.PALETTE:
            for text in drawings.captions(color, name):
                yield f"User: {text}\n\nAssistant: {text}"


def train_tokenizer(
    out: epath.PathLike, vocab_size: int, num_image_tokens: int, image_size: int
) -> None:
    """Trains the tokenizer and writes its folder; the same files every time.

    Args:
      out: folder, created if missing.
      vocab_size: maximum number of ids, including the 256 bytes and the special tokens.
      num_image_tokens: features per image, for processor_config.json.
      image_size: side in pixels, for preprocessor_config.json.
    """
    import tokenizers
    from tokenizers import decoders, models, pre_tokenizers, trainers

    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        min_frequency=2,
        special_tokens=list(SPECIALS),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(training_texts(), trainer)
    names = {"bos_token": BOS, "eos_token": EOS, "pad_token": PAD}
    files: dict[str, dict[str, Any]] = {
        "tokenizer.json": json.loads(tokenizer.to_str()),
        "tokenizer_config.json": {
            "add_bos_token": True,
            "add_eos_token": False,
            **names,
            "clean_up_tokenization_spaces": False,
            "model_max_length": 4096,
            "unk_token": None,
            "tokenizer_class": "PreTrainedTokenizerFast",
        },
        "special_tokens_map.json": {
            **names,
            "additional_special_tokens": [IMAGE, IMAGE_BEGIN, IMAGE_END, GENERATION],
        },
        "processor_config.json": {
            "processor_class": "VLChatProcessor",
            "image_tag": IMAGE,
            "image_start_tag": IMAGE_BEGIN,
            "image_end_tag": IMAGE_END,
            "image_gen_tag": GENERATION,
            "num_image_tokens": num_image_tokens,
            "add_special_token": False,
            "sft_format": "deepseek_old",
            "mask_prompt": True,
            "ignore_id": -100,
        },
        "preprocessor_config.json": {
            "processor_class": "VLChatProcessor",
            "image_processor_type": "VLMImageProcessor",
            "image_size": image_size,
            "min_size": 14,
            "image_mean": [0.5, 0.5, 0.5],
            "image_std": [0.5, 0.5, 0.5],
            "rescale_factor": 1 / 255,
            "do_normalize": True,
            "background_color": [127, 127, 127],
        },
    }
    folder = epath.Path(out)
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        text = json.dumps(content, indent=1, ensure_ascii=False)
        (folder / name).write_text(text + "\n", encoding="utf-8")
