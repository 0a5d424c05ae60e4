"""Bad and odd conversations (elements of one JSON array, and files of their own) and texts.

A case is (name, how to make it, what must come out): see bad_folder.
"""

from __future__ import annotations

import gzip
import json
import random
from pathlib import Path

from helpers.bad_folder import GOOD

ASK, SAY = {"from": "human", "value": "<image>\nWhat is it?"}, {"from": "gpt", "value": "A wall."}
PLAIN = {"from": "human", "value": "What is it?"}
END = "file: not JSON to its end"
NOISE = random.Random(0).randbytes(999).hex().encode()
COUNT = 4000  # characters that a turn of these tests may have


def talk(*turns: object, **changes: object):
    """An element in LLaVA's form; `...` leaves a field out."""

    def make(name: str) -> str:
        fields = {"id": name, "image": "good.jpg", "conversations": list(turns) or [ASK, SAY]}
        return json.dumps({k: v for k, v in (fields | changes).items() if v is not ...})

    return make


def line(text: str):
    return lambda name: text.replace("NAME", name)


def says(role: str, value: object) -> dict:
    return {"from": role, "value": value}


TURNLESS = "conversation: turn without role and text"
TALKS = [
    ("talk_llava", talk(), GOOD),
    ("talk_text_only", talk(PLAIN, SAY, image=...), GOOD),
    (
        "talk_two_images",
        talk(says("human", "<image><image>\nSame?"), SAY, image=["good.jpg", "good.jpg"]),
        GOOD,
    ),
    (
        "talk_openai",
        talk(
            conversations=...,
            messages=[
                {
                    "role": "user",
                    "content": [
                        {"type": "image", "text": None},
                        {"type": "text", "text": "What is it?"},
                    ],
                },
                {"role": "assistant", "content": [{"type": "text", "text": "A wall."}]},
            ],
        ),
        GOOD,
    ),
    (
        "talk_struct_of_lists",  # as datasets and tfds store a list of turns
        talk(conversations={"role": ["user", "assistant"], "content": ["<image>\nHi?", "A wall."]}),
        GOOD,
    ),
    (
        "talk_struct_of_lists_short",
        talk(conversations={"role": ["user", "assistant"], "content": ["<image>\nHi?"]}),
        "conversation: not a list of turns",
    ),
    ("talk_system", talk(says("system", "Be short."), ASK, SAY), GOOD),
    ("talk_system_empty", talk(says("system", ""), ASK, SAY), GOOD),
    ("talk_last_question", talk(ASK, SAY, PLAIN), GOOD),
    (
        "talk_pairs",
        talk(conversations=..., texts=[{"user": "What is it?", "assistant": "A wall."}]),
        GOOD,
    ),
    ("talk_as_text", talk(conversations=json.dumps([ASK, SAY])), GOOD),
    ("talk_mark_in_answer", talk(ASK, says("gpt", "I see <image> and <image_placeholder>.")), GOOD),
    ("talk_begins_with_answer", talk(SAY, ASK, SAY), "conversation: turns do not alternate"),
    ("talk_more_images", talk(image=["good.jpg", "good.jpg"]), "images: more than their marks"),
    ("talk_unmarked_image", talk(PLAIN, SAY), "images: more than their marks"),
    (
        "talk_more_marks",
        talk(says("human", "<image><image>"), SAY),
        "images: fewer than their marks",
    ),
    ("talk_no_image", talk(image=...), "images: fewer than their marks"),
    ("talk_image_null", talk(image=None), "images: fewer than their marks"),
    ("talk_image_in_last_question", talk(PLAIN, SAY, ASK), "images: more than their marks"),
    (
        "talk_our_tag",
        talk(says("human", "<image> is <image_placeholder>?"), SAY),
        "text: holds the image tag",
    ),
    ("talk_absent", talk(conversations=...), "conversation: missing"),
    ("talk_null", talk(conversations=None), "conversation: missing"),
    ("talk_empty", talk(conversations=[]), "conversation: no answer"),
    ("talk_words", talk(conversations="hello"), "conversation: not a list of turns"),
    ("talk_number", talk(conversations=3), "conversation: not a list of turns"),
    ("talk_object", talk(conversations={"from": "human"}), "conversation: not a list of turns"),
    ("talk_of_words", talk("hello", "hi"), TURNLESS),
    ("talk_no_role", talk({"value": "hello"}, SAY), TURNLESS),
    ("talk_role_number", talk({"from": 1, "value": "hello"}, SAY), TURNLESS),
    (
        "talk_role_unknown",
        talk(says("narrator", "Once upon a time"), SAY),
        "conversation: unknown role",
    ),
    ("talk_tool", talk(ASK, says("tool", "{}"), SAY), "conversation: unknown role"),
    ("talk_no_value", talk({"from": "human"}, SAY), "turn: missing"),
    ("talk_value_null", talk(ASK, says("gpt", None)), "turn: missing"),
    ("talk_value_number", talk(ASK, says("gpt", 3)), "turn: not text"),
    ("talk_value_nan", talk(ASK, says("gpt", float("nan"))), "turn: not text"),
    ("talk_question_empty", talk(says("human", " "), SAY, image=...), "turn: empty"),
    ("talk_answer_empty", talk(ASK, says("gpt", "\n")), "turn: empty"),
    ("talk_answer_huge", talk(ASK, says("gpt", "x" * (COUNT + 1))), "turn: too long"),
    ("talk_answer_control", talk(ASK, says("gpt", "a\u0000b")), "turn: control characters"),
    ("talk_half_character", talk(ASK, says("gpt", "\ud83d")), "turn: not UTF-8"),
    (
        "talk_part_unknown",
        talk(conversations=[{"role": "user", "content": [{"type": "audio", "audio": "x"}]}, SAY]),
        "conversation: part that is neither text nor image",
    ),
    ("talk_two_questions", talk(ASK, PLAIN, SAY), "conversation: turns do not alternate"),
    ("talk_two_answers", talk(ASK, SAY, SAY), "conversation: turns do not alternate"),
    ("talk_no_answer", talk(ASK), "conversation: no answer"),
    ("talk_only_system", talk(says("system", "Be short.")), "conversation: no answer"),
    (
        "talk_late_system",
        talk(ASK, SAY, says("system", "Be short.")),
        "conversation: turns do not alternate",
    ),
    ("talk_image_gone", talk(image="gone.jpg"), "image: missing"),
    ("talk_image_cut", talk(image="half.jpg"), "image: truncated or broken"),
    ("talk_traversal", talk(image="../secret.jpg"), "image: outside its folder"),
    ("talk_url", talk(image="https://example.org/a.jpg"), "image: a web address, not a file"),
    ("talk_same_id", talk(id="talk_llava"), "id: duplicate"),
    ("talk_id_object", talk(id={"a": 1}), "id: neither text nor number"),
    ("talk_no_object", line("17"), "row: not an object"),
    ("talk_no_comma", lambda name: talk()(name) + " " + talk(id=name + "_b")(name), [GOOD, GOOD]),
    (
        "talk_broken",
        line('{"id": "NAME", "image": "good.jpg", "conversations": [{"from": "hu}'),
        END,
    ),
]

JSON_FILES = [
    ("json_empty.json", b"", "file: not a JSON array"),
    ("json_object.json", b'{"id": "a"}', "file: not a JSON array"),
    ("json_words.json", b"hello", "file: not a JSON array"),
    ("json_cut.json", ("[" + talk()("json_cut") + ', {"id": "json_cut').encode(), [GOOD, END]),
    ("json_open.json", ("[" + talk()("json_open")).encode(), [GOOD, END]),
    ("json_deep.json", b"[" * 100_000, END),
    (
        "json_latin1.json",
        ("[" + talk(ASK, says("gpt", "BAER"))("json_latin1") + "]")
        .encode()
        .replace(b"BAER", b"B\xe4r"),
        "turn: not UTF-8",
    ),
    ("json_lines.jsonl", (talk()("json_lines") + "\n{\n").encode(), [GOOD, "line: not JSON"]),
    ("json_lines_gz.jsonl.gz", gzip.compress(talk()("json_lines_gz").encode()), GOOD),
    (
        "json_lines_cut.jsonl.gz",
        gzip.compress(talk()("json_lines_cut").encode())[:-20],
        "file: truncated or broken",
    ),
    ("json_no_gz.jsonl.gz", b"no gzip at all", "file: truncated or broken"),
]

TEXTS = [
    ("text_lines.txt", b"one document\n\nanother\r\n", [GOOD, GOOD]),
    ("text_bom.txt", b"\xef\xbb\xbfone document", GOOD),
    ("text_tags.txt", "<image_placeholder> <image> <｜end▁of▁sentence｜>".encode(), GOOD),
    ("text_page_break.txt", b"one\x0cpage", GOOD),
    ("text_gz.txt.gz", gzip.compress(b"one\ntwo"), [GOOD, GOOD]),
    ("text_empty.txt", b"", "file: empty"),
    ("text_blank.txt", b"\n \n\t\n", "file: empty"),
    ("text_latin1.txt", b"B\xe4r\nfox", ["text: not UTF-8", GOOD]),
    ("text_utf16.txt", "fox\nbear".encode("utf-16"), [GOOD, GOOD]),
    ("text_nul.txt", b"a\0b\nfox", ["text: control characters", GOOD]),
    ("text_huge.txt", b"x" * (COUNT + 1) + b"\nfox", ["text: too long", GOOD]),
    ("text_huge_line.txt", b"x" * (9 * COUNT) + b"\nfox", ["text: too long", GOOD]),
    (
        "text_gz_cut.txt.gz",
        gzip.compress(b"fox\n" + NOISE)[:-30],
        [GOOD, "file: truncated or broken"],
    ),
    ("text_no_gz.txt.gz", b"plain text", "file: truncated or broken"),
    ("lines_good.jsonl", b'{"text": "one"}\n{"text": "two", "meta": {}}', [GOOD, GOOD]),
    ("lines_gz.jsonl.gz", gzip.compress(b'{"text": "one"}'), GOOD),
    (
        "lines_broken.jsonl",
        b'{"text": "one"}\n{"text": "t\n{"text": "three"}',
        [GOOD, "line: not JSON", GOOD],
    ),
    ("lines_list.jsonl", b'["one"]', "row: not an object"),
    ("lines_no_text.jsonl", b'{"title": "one"}', "text: missing"),
    ("lines_null.jsonl", b'{"text": null}', "text: missing"),
    ("lines_nan.jsonl", b'{"text": NaN}', "text: missing"),
    ("lines_number.jsonl", b'{"text": 3}', "text: not text"),
    ("lines_of_texts.jsonl", b'{"text": ["one", "two"]}', "text: not text"),
    ("lines_empty.jsonl", b'{"text": ""}', "text: empty"),
    ("lines_latin1.jsonl", b'{"text": "B\xe4r"}', "line: not UTF-8"),
    ("lines_half.jsonl", b'{"text": "\\ud83d"}', "text: not UTF-8"),
    (
        "lines_ids.jsonl",
        b'{"id": "lines_ids", "text": "a"}\n{"id": "lines_ids", "text": "b"}',
        [GOOD, "id: duplicate"],
    ),
]


def write(folder: Path, cases) -> None:
    for name, data, _ in cases:
        (folder / name).write_bytes(data)
