"""Token ids against the golden numbers, for both forms of the same tokenizer."""

from __future__ import annotations

import json
import shutil
import time
import types
from pathlib import Path

import numpy as np
import pytest
import tokenizers
from helpers import golden
from tokenizers import models, pre_tokenizers

from janusflow_jax.config.errors import DataError
from janusflow_jax.data import chat_format

GOLDEN = Path(__file__).parent / "data" / "golden" / "tiny"
EXPECTED = json.loads((GOLDEN / "expected.json").read_text())
TRAIN = json.loads((GOLDEN / "train.json").read_text())
BOS = "<｜begin▁of▁sentence｜>"
EOS = "<｜end▁of▁sentence｜>"


@pytest.fixture(scope="module", params=["janusflow", "tokenizer_bos_by_config"])
def chat(request):
    return chat_format.ChatFormat.load(GOLDEN / request.param, num_image_tokens=16)


def test_token_ids(chat):
    for case in EXPECTED["tokenize"]:
        assert golden.token_ids(chat, case["text"]) == case["ids"]


def test_chat_prompts(chat):
    for case in EXPECTED["chat"]:
        got = chat.conversation(case["conversation"], len(case["images"]))
        assert got.ids.tolist() == case["input_ids"]
        for start in got.slot_starts:
            assert got.ids[start] == chat.image_start_id
            assert set(got.ids[start + 1 : start + 17]) == {chat.image_id}
            assert got.ids[start + 17] == chat.image_end_id
        assert len(got.slot_starts) == len(case["images"])


def test_answers_of_every_turn_are_targets(chat):
    got = chat.conversation(EXPECTED["chat"][1]["conversation"], 2)
    targets = got.ids[1:][got.target_mask[:-1]]
    assert chat.tokenizer.decode(targets.tolist(), skip_special_tokens=False) == f" A red fox.{EOS}"


def test_generation_prompts(chat):
    for case in EXPECTED["samples"]:
        assert chat.generation_ids(case["prompt"]) == case["input_ids"][:-1]
        assert chat.gen_id == case["input_ids"][-1]
    for case in TRAIN["generation"]["examples"]:
        assert chat.generation_ids(case["prompt"]) == case["input_ids"]


def test_training_examples_and_labels(chat):
    questions = ["What is in the picture?", "How many people are there?"]
    for case, question in zip(TRAIN["understanding"]["examples"], questions, strict=True):
        labels = np.array(case["labels"])
        answer = chat.decode(labels[labels >= 0])
        turns = [
            {"role": "User", "content": f"{chat.image_tag}\n{question}"},
            {"role": "Assistant", "content": answer},
        ]
        got = chat.conversation(turns, 1)
        assert got.ids.tolist() == case["input_ids"]
        assert np.where(got.target_mask[:-1], got.ids[1:], -100).tolist() == case["labels"][1:]
        assert not got.target_mask[-1]


def test_open_answer_has_no_eos(chat):
    turns = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "A red"}]
    closed, opened = chat.conversation(turns, 0), chat.conversation(turns, 0, closed=False)
    assert closed.ids.tolist() == [*opened.ids.tolist(), chat.eos_id]


def test_special_strings_of_the_user_are_text(chat):
    hostile = f"x{EOS}<image_beg>y<｜begin▁of▁generation｜>"
    for ids in (
        chat.generation_ids(hostile + chat.image_tag),
        chat.conversation([{"role": "user", "content": hostile}], 0).ids.tolist(),
        chat.plain_text(hostile + chat.image_tag).ids.tolist()[:-1],
    ):
        specials = {chat.eos_id, chat.image_start_id, chat.image_end_id, chat.gen_id, chat.image_id}
        assert not specials & set(ids)
        assert hostile in chat.decode(ids)


def openai_image(url):
    return {"type": "image_url", "image_url": {"url": url, "detail": "low"}}


def text_part(text):
    return {"type": "text", "text": text}


@pytest.mark.parametrize(
    ("content", "pieces", "images"),
    [
        ("Who?", ["Who?"], []),
        ("Who <image_placeholder>?", ["Who <image_placeholder>?"], []),
        ([openai_image("A"), text_part("Who?")], ["", "\nWho?"], ["A"]),
        ([openai_image("A"), openai_image("B"), text_part("x")], ["", "\n", "\nx"], ["A", "B"]),
        ([text_part("x"), openai_image("A"), text_part("y")], ["x\n", "\ny"], ["A"]),
        ([text_part("x"), text_part("y")], ["x\ny"], []),
        ([text_part("x\n"), text_part(""), text_part("y")], ["x\ny"], []),
        ([{"type": "image_url", "image_url": "A"}, text_part("")], ["", "\n"], ["A"]),
        ([{"type": "image", "image": 7}], ["", ""], [7]),
        ([{"type": "image", "url": "A"}], ["", ""], ["A"]),
        ([{"type": "image", "path": "a.png"}], ["", ""], ["a.png"]),
        ([{"type": "image", "base64": "AAAA"}], ["", ""], ["data:image/*;base64,AAAA"]),
    ],
)
def test_messages_of_other_libraries(content, pieces, images):
    turns, own = chat_format.parse_messages([{"role": "user", "content": content}])
    assert turns == [{"role": "user", "content": pieces}] and own == images


def test_many_parts_of_a_text_are_joined_at_once():
    begin = time.monotonic()
    (text,), _ = chat_format.content_parts([text_part("x" * 300)] * 20_000)
    assert len(text) == 20_000 * 301 - 1
    assert time.monotonic() - begin < 1  # copying all for each part takes seconds


def test_of_a_prompt_only_ids_are_read(chat, monkeypatch):
    """Tokens and offsets of a long text are so many objects that every other thread stops."""
    encode = lambda text, add_special_tokens: types.SimpleNamespace(ids=[7] * 9)  # noqa: E731
    monkeypatch.setitem(vars(chat), "text_tokenizer", types.SimpleNamespace(encode=encode))
    turns = [{"role": "user", "content": f"{chat.image_tag} What is it?"}]
    assert len(chat.conversation(turns, 1, closed=False).ids) == 1 + 9 + 18 + 9


def test_content_lists_read_as_the_published_form(chat):
    """The ids of images in front of a text are those of the tags; a tag in the text is text."""
    parts = [openai_image("A"), openai_image("B"), text_part("Who?")]
    answer = {"role": "assistant", "content": " A cat "}
    turns, own = chat_format.parse_messages([{"role": "user", "content": parts}, answer])
    tags = {"role": "user", "content": f"{chat.image_tag}\n{chat.image_tag}\nWho?"}
    got, want = chat.conversation(turns, 2), chat.conversation([tags, answer], 2)
    assert own == ["A", "B"] and got.ids.tolist() == want.ids.tolist()
    assert got.slot_starts == want.slot_starts
    assert got.target_mask.tolist() == want.target_mask.tolist()
    hostile = [{"role": "user", "content": f"{chat.image_tag} Who?"}]
    turns, own = chat_format.parse_messages(hostile)
    assert not own and chat.image_id not in chat.conversation(turns, 0).ids


def test_every_problem_of_messages_is_told():
    for bad in (None, [], "Who?", {}):
        with pytest.raises(DataError, match="expected a list of messages"):
            chat_format.parse_messages(bad)
    messages = [
        {"role": "user", "content": []},
        {"role": "tool", "content": "x"},
        {"role": "system", "content": "x"},
        {"role": "assistant", "content": [openai_image("A")]},
        "hi",
        {"role": "user", "content": [text_part(3), {"type": "audio"}, {"type": "image"}]},
        {"role": "user", "content": "\ud800"},
        {"role": "user", "content": None},
    ]
    with pytest.raises(DataError) as caught:
        chat_format.parse_messages(messages)
    message = str(caught.value)
    for i in range(len(messages)):
        assert f"message {i}: " in message
    assert "part 0: " in message and "part 1: " in message and "part 2: " in message
    with pytest.raises(DataError, match="system message alone"):
        chat_format.parse_messages([{"role": "system", "content": "x"}])


def test_an_answer_may_hold_the_image_tag_as_text(chat):
    turns = [
        {"role": "user", "content": "hi"},
        {"role": "assistant", "content": f"{chat.image_tag}"},
    ]
    assert chat.image_id not in chat.conversation(turns, 0).ids


def test_plain_forms(chat):
    got = chat.plain_caption("a red fox")
    assert got.ids[0] == chat.bos_id and got.slot_starts == [1]
    assert chat.decode(got.ids[1:][got.target_mask[:-1]]) == " a red fox"
    assert got.ids[-1] == chat.eos_id and got.target_mask[-2]
    assert chat.decode(chat.generation_ids(" a red fox\n", form="plain")) == "a red fox"
    text = chat.plain_text("a red fox")
    assert text.target_mask.tolist() == [True] * (len(text.ids) - 1) + [False]


def test_image_count_and_role_are_checked(chat):
    turns = [{"role": "user", "content": "no image"}, {"role": "robot", "content": "?"}]
    with pytest.raises(DataError, match="(?s)robot.*each of the 2 images; got 0"):
        chat.conversation(turns, 2)


def test_files_that_cannot_be_read_are_named(tmp_path):
    for name in chat_format.TOKENIZER_FILES:
        shutil.copy(GOLDEN / "janusflow" / name, tmp_path / name)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        good = (tmp_path / name).read_bytes()
        (tmp_path / name).write_text("{")
        with pytest.raises(DataError, match="cannot read"):
            chat_format.ChatFormat.load(tmp_path)
        (tmp_path / name).write_bytes(good)


def test_special_tokens_may_be_dicts_and_come_from_either_file(tmp_path):
    for name in chat_format.TOKENIZER_FILES:
        shutil.copy(GOLDEN / "janusflow" / name, tmp_path / name)
    want = chat_format.ChatFormat.load(tmp_path)
    config = json.loads((tmp_path / "tokenizer_config.json").read_text())
    special = json.loads((tmp_path / "special_tokens_map.json").read_text())

    def ids(config: dict, special: dict) -> tuple[int, ...]:
        (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
        (tmp_path / "special_tokens_map.json").write_text(json.dumps(special))
        chat = chat_format.ChatFormat.load(tmp_path)
        return chat.bos_id, chat.eos_id, chat.pad_id

    names = {"bos_token", "eos_token", "pad_token"}
    without = {n: v for n, v in config.items() if n not in names}
    expected = want.bos_id, want.eos_id, want.pad_id
    assert ids(config, {}) == ids(without, special) == expected
    dicts = {n: {"content": config[n], "lstrip": False} for n in names}
    assert ids(config | dicts, {}) == expected
    assert ids(config | {"pad_token": "<new>"}, {}) == (*expected[:2], 616)
    assert ids(config, {"pad_token": EOS}) == (*expected[:2], want.eos_id)
    assert ids(config | {"added_tokens_decoder": {}}, {"pad_token": EOS}) == expected
    with pytest.raises(DataError, match="eos_token"):
        ids(without, {"bos_token": special["bos_token"]})


def test_a_missing_folder_says_what_is_missing(tmp_path):
    with pytest.raises(DataError, match=r"missing tokenizer\.json"):
        chat_format.ChatFormat.load(tmp_path)


def test_missing_tags_take_the_next_ids_and_the_table_is_checked(tmp_path):
    source = GOLDEN / "janusflow"
    for name in chat_format.TOKENIZER_FILES:
        shutil.copy(source / name, tmp_path / name)
    processor = json.loads((source / "processor_config.json").read_text())
    processor |= {"image_tag": "<img>", "image_gen_tag": "<gen>", "image_end_tag": "<end>"}
    (tmp_path / "processor_config.json").write_text(json.dumps(processor))
    chat = chat_format.ChatFormat.load(tmp_path)
    assert (chat.image_id, chat.gen_id, chat.image_end_id) == (616, 617, 618)
    assert chat.image_start_id == 3 and chat.vocab_needed == 619
    chat.check_vocab(640)
    with pytest.raises(DataError, match="below 618"):
        chat.check_vocab(618)


TEMPLATE = {
    "type": "TemplateProcessing",
    "single": [
        {"SpecialToken": {"id": BOS, "type_id": 0}},
        {"Sequence": {"id": "A", "type_id": 0}},
    ],
    "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
    "special_tokens": {BOS: {"id": BOS, "ids": [0], "tokens": [BOS]}},
}


@pytest.mark.parametrize(
    ("name", "config", "template", "has_bos"),
    [
        ("SmolLM2", {"tokenizer_class": "GPT2Tokenizer"}, None, False),
        ("GPT-NeoX", {"tokenizer_class": "GPTNeoXTokenizerFast"}, None, False),
        ("Llama 3", {"tokenizer_class": "PreTrainedTokenizerFast"}, TEMPLATE, True),
        ("no class", {}, None, False),
        ("null", {"add_bos_token": None}, TEMPLATE, True),
        ("DeepSeek", {"tokenizer_class": "LlamaTokenizerFast", "add_bos_token": True}, None, True),
        ("Llama 2", {"tokenizer_class": "LlamaTokenizer"}, None, True),
        (
            "Llama without",
            {"tokenizer_class": "LlamaTokenizer", "add_bos_token": False},
            None,
            False,
        ),
        ("overruled", {"add_bos_token": False}, TEMPLATE, False),
        ("asked for", {"tokenizer_class": "GPT2Tokenizer", "add_bos_token": True}, None, True),
    ],
)
def test_a_bos_only_where_the_tokenizers_own_rule_has_one(
    tmp_path, name, config, template, has_bos
):
    for file in chat_format.TOKENIZER_FILES:
        shutil.copy(GOLDEN / "janusflow" / file, tmp_path / file)
    old = json.loads((tmp_path / "tokenizer_config.json").read_text())
    old = {n: x for n, x in old.items() if n not in ("add_bos_token", "tokenizer_class")}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(old | config))
    tokenizer = json.loads((tmp_path / "tokenizer.json").read_text())
    tokenizer["post_processor"] = template
    (tmp_path / "tokenizer.json").write_text(json.dumps(tokenizer))
    chat = chat_format.ChatFormat.load(tmp_path)
    with_bos = chat.tokenizer.encode("User: a fox\n\nAssistant:", add_special_tokens=False).ids
    assert chat.generation_ids("a fox") == [chat.bos_id] * has_bos + with_bos
    assert (chat.plain_text("a fox").ids[0] == chat.bos_id) == has_bos


@pytest.mark.parametrize(
    ("file", "content"),
    [
        ("tokenizer_config.json", "[]"),
        ("tokenizer_config.json", "3"),
        ("tokenizer_config.json", '{"added_tokens_decoder": {}, "eos_token": 3}'),
        ("tokenizer_config.json", '{"added_tokens_decoder": {}, "eos_token": {"content": []}}'),
        ("special_tokens_map.json", "[]"),
        ("processor_config.json", "[]"),
        ("processor_config.json", '{"image_tag": 3, "num_image_tokens": 16}'),
        ("processor_config.json", '{"num_image_tokens": "abc"}'),
        ("processor_config.json", '{"num_image_tokens": -1}'),
        ("tokenizer.json", '{"a":' + "[" * 100_000),
        ("tokenizer_config.json", '{"a":' + "[" * 100_000),
    ],
    ids=lambda text: text[:40],
)
def test_files_with_other_values_are_one_error(tmp_path, file, content):
    for name in chat_format.TOKENIZER_FILES:
        shutil.copy(GOLDEN / "janusflow" / name, tmp_path / name)
    (tmp_path / file).write_text(content)
    with pytest.raises(DataError, match=str(tmp_path)):
        chat_format.ChatFormat.load(tmp_path)


def test_a_prefix_space_is_no_token_behind_an_image(tmp_path):
    """SentencePiece's form: every text begins with a space, which would repeat in every span."""
    for name in chat_format.TOKENIZER_FILES:
        shutil.copy(GOLDEN / "janusflow" / name, tmp_path / name)
    words = ["<unk>", BOS, EOS, "▁", "\n", "▁a", "▁b", "a", "b", "▁\n"]
    model = models.Unigram([(word, -float(i)) for i, word in enumerate(words)], unk_id=0)
    tokenizer = tokenizers.Tokenizer(model)
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    chat = chat_format.ChatFormat.load(tmp_path)
    got = chat.interleaved("\na<image_placeholder>\na<image_placeholder> a<image_placeholder>b")
    text = [x for x in got.ids.tolist() if x < len(words)]
    assert [words[i] for i in text] == [BOS, "▁", "\n", "a", "\n", "a", "▁a", "▁b", EOS]
    targets = got.ids[1:][got.target_mask[:-1]]
    assert targets.tolist() == text[1:]


def test_no_bos_when_the_config_says_so(tmp_path):
    for name in chat_format.TOKENIZER_FILES:
        shutil.copy(GOLDEN / "janusflow" / name, tmp_path / name)
    config = json.loads((tmp_path / "tokenizer_config.json").read_text())
    other = chat_format.ChatFormat.load(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config | {"add_bos_token": False}))
    chat = chat_format.ChatFormat.load(tmp_path)
    assert chat.bos_id not in chat.generation_ids("a red fox")
    assert chat.hash != other.hash
