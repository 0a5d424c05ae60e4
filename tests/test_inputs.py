"""Requests: numbers, seeds, texts and turns. Each is read, or is one error."""

import jax.numpy as jnp
import numpy as np
import pytest

from janusflow_jax.config.errors import JanusFlowError
from janusflow_jax.sampling import inputs

TAG = "<image_placeholder>"
NAN, INF = float("nan"), float("inf")


@pytest.mark.parametrize(
    ("option", "good", "bad"),
    [
        ("num_steps", [1, np.int64(30), jnp.int32(2), None], [0, -1, 2.0, 2.5, "2", NAN, INF]),
        ("order", [1, np.int64(2)], [0, 3, 1.0, "1", None]),
        ("shift", [1, 0.5, np.float32(3)], [0, -1.0, NAN, INF, "1", None]),
        (
            "guidance_interval",
            [(0, 1), [0.2, 0.5], (0.5, 0.5)],
            [0.5, (0.5,), (-0.1, 1), (0, NAN), (0.6, 0.4)],
        ),
        ("per_prompt", [1, np.uint8(4)], [0, -3, 1.0, "1", None]),
        (
            "guidance_scale",
            [1, 2.5, -1.0, np.float32(3), jnp.float32(2), None],
            [NAN, INF, -INF, 1e300, "2", 10**400, [2.0]],
        ),
        ("output", ["pil", "latent"], ["jpeg", ""]),
        ("prompts", [["a"], ("ä 🦊",)], [[], [""], [" \n"], ["a", None], [b"a"], ["a \udce4"]]),
    ],
)
def test_what_generate_accepts(option, good, bad):
    request = {"prompts": ["a"], "per_prompt": 1}
    for value in good:
        inputs.check_generate(**{**request, option: value})
    for value in bad:
        with pytest.raises(JanusFlowError, match="generate: "):
            inputs.check_generate(**{**request, option: value})


@pytest.mark.parametrize(
    ("option", "good", "bad"),
    [
        ("max_new_tokens", [1, np.int32(512)], [0, -1, 2.5, "8", None, NAN]),
        ("temperature", [0, 0.7, 100, np.float32(1)], [-1, NAN, INF, 1e300, "1", None]),
        ("top_p", [1, 0.1, 1e-6], [0, -0.1, 1.01, NAN, INF, 1e-300, None]),
        ("seed", [0, 2**32 - 1, np.int64(3), jnp.int32(3)], [-1, 2**32, 3.0, NAN, None, "3", [3]]),
    ],
)
def test_what_chat_accepts(option, good, bad):
    request = {"max_new_tokens": 1, "temperature": 1.0, "top_p": 1.0, "seed": 0}
    for value in good:
        inputs.check_chat(**{**request, option: value})
    for value in bad:
        with pytest.raises(JanusFlowError, match=option):
            inputs.check_chat(**{**request, option: value})


@pytest.mark.parametrize(
    ("seed", "want"),
    [
        (7, [7, 8, 9, 10]),
        (jnp.int32(7), [7, 8, 9, 10]),
        ([5, 9], [5, 6, 9, 10]),
        (np.asarray([5, 9]), [5, 6, 9, 10]),
        (2**32 - 4, [*range(2**32 - 4, 2**32)]),
    ],
)
def test_seeds_of_images(seed, want):
    assert inputs.image_seeds(seed, 2, 2) == want


@pytest.mark.parametrize("seed", [-1, 2**32 - 3, [1], [1, 2, 3], [1, 2.0], [1, None], "12", 1.0])
def test_bad_seeds(seed):
    with pytest.raises(JanusFlowError, match="seed: expected"):
        inputs.image_seeds(seed, 2, 2)


def user(content, **more):
    return {"role": "User", "content": content, **more}


ANSWER = {"role": "Assistant", "content": ""}


@pytest.mark.parametrize(
    ("conversation", "images", "contents", "read"),
    [
        ("Who?", (), ["Who?"], []),
        ("Who?", None, ["Who?"], []),
        ("Who?", "a", [f"{TAG}\nWho?"], ["a"]),
        ("Who?", ["a", "b"], [f"{TAG}\n{TAG}\nWho?"], ["a", "b"]),
        (f"Who {TAG}?", ["a"], [f"Who {TAG}?"], ["a"]),
        ("An <image> tag", (), ["An <image> tag"], []),
        # the published form: images in their turn
        ([user(f"{TAG}\nWho?", images=["a"]), ANSWER], (), [f"{TAG}\nWho?", ""], ["a"]),
        ([user("Who?", images=["a"])], (), [f"{TAG}\nWho?"], ["a"]),
        ([user("Who?", images="a")], (), [f"{TAG}\nWho?"], ["a"]),
        ([user("Who?", images=[])], (), ["Who?"], []),
        ([user("1", images=["a"]), ANSWER, user("2", images=["b"])], (), None, ["a", "b"]),
        ([user(f"{TAG} 1"), ANSWER, user(f"{TAG} 2")], ["a", "b"], None, ["a", "b"]),
        ([{"role": "system", "content": "Hm."}, user("Who?")], (), ["Hm.", "Who?"], []),
    ],
)
def test_turns_and_their_images(conversation, images, contents, read):
    (turns,), (own,), single = inputs.conversations(conversation, images, TAG)
    assert single and own == read
    assert contents is None or [t["content"] for t in turns] == contents
    assert sum(t["content"].count(TAG) for t in turns) == len(read)


def test_content_lists():
    """A tag in their text is text; all forms of an image may be mixed with turns of plain text."""
    parts = [{"type": "image", "image": "a"}, {"type": "text", "text": f"Who {TAG}?"}]
    turns = [{"role": "system", "content": [{"type": "text", "text": "Hm."}]}, user(parts), ANSWER]
    turns += [user("And?", images=["b"])]
    (turns,), (own,), single = inputs.conversations(turns, (), TAG)
    assert single and own == ["a", "b"]
    system, rest = inputs.split_system(turns)
    assert system == "Hm."
    assert [t["content"] for t in rest] == [["", f"\nWho {TAG}?"], "", f"{TAG}\nAnd?"]


def test_several_conversations():
    many = ["Who?", [user("What?", images=["b"])], [user("Why?")]]
    turns, own, single = inputs.conversations(many, [["a"], [], []], TAG)
    assert not single and own == [["a"], ["b"], []] and len(turns) == 3


@pytest.mark.parametrize(
    ("conversation", "images"),
    [
        (None, ()),
        ([], ()),
        (3, ()),
        (user("a"), ()),
        ([[]], ()),
        ([None], ()),
        ([user("a"), "b"], ()),
        (["a", "b"], ["x", "y"]),
        (["a", "b"], "x"),
        (["a", "b"], [["x"]]),
        ("<image>\nWho?", ["x"]),
        ("a \udce4", ()),
        ([user("a", image="x")], ()),
        ([user("a", video="x")], ()),
        ([user("a", images=["x"])], ["y"]),
        ([user(f"{TAG} a", images=["x", "y"])], ()),
        ([user(f"{TAG} {TAG} a", images=["x"]), user("b", images=["y"])], ()),
        ([user("<image> a", images=["x"])], ()),
        ([user("a"), {"role": "Assistant", "content": "b", "images": ["x"]}], ()),
        ([user("a \udce4")], ()),
        ([user(None)], ()),
        ([user([{"type": "video", "video": "x"}])], ()),
        ([user([{"type": "image", "image": "x"}], images=["y"])], ()),
        ([user([{"type": "image", "image": "x"}])], ["y"]),
        ([user("a"), {"role": "assistant", "content": [{"type": "image", "image": "x"}]}], ()),
        ([{"role": "User"}], ()),
        ([{"content": "a"}], ()),
        ([{"role": "<|User|>", "content": "a"}], ()),
        ([{"from": "human", "value": "a"}], ()),
    ],
)
def test_what_is_no_conversation_is_one_error(conversation, images):
    with pytest.raises(JanusFlowError, match="chat: "):
        inputs.conversations(conversation, images, TAG)


@pytest.mark.parametrize(
    ("text", "stops", "complete", "want"),
    [
        ("a b. c", ("b", "."), False, ("a ", True)),
        ("one two th", ("three",), False, ("one two ", False)),
        ("one two th", ("three",), True, ("one two th", False)),
        ("aab", ("aaa", "bc"), False, ("aa", False)),
        ("aab", (), False, ("aab", False)),
    ],
)
def test_an_answer_ends_before_a_stop_string(text, stops, complete, want):
    assert inputs.before_stop(text, stops, complete) == want


def test_a_long_stop_string_costs_no_more_than_the_text():
    looked = []

    class Stop(str):
        def __getitem__(self, key):
            looked.append(key)
            return str.__getitem__(self, key)

    text = "one two ab"
    assert inputs.before_stop(text, (Stop("ab" * 1000),), False) == ("one two ", False)
    assert len(looked) <= len(text)
