"""The adapters for lmms-eval and VLMEvalKit, against stand-ins for those packages.

docs/benchmarks.md says how they were run with the packages themselves.
"""

import collections
import importlib
import sys
import types

import pytest
from PIL import Image

from janusflow_jax import pipeline
from janusflow_jax.config.errors import ConfigError, DataError

TAG = "<image_placeholder>"


class FakeModel:
    """Answers with the text, the images' colors and the options; records its batches."""

    text = types.SimpleNamespace(image_tag=TAG)

    def __init__(self):
        self.batches = []

    def chat(self, conversations, **options):
        self.batches.append(len(conversations))
        answers = []
        for system, user in conversations:
            colors = [image[0, 0].tolist() for image in user.get("images", ())]
            assert user["content"].count(TAG) == len(colors)
            answers.append(f"{system['content']}|{user['content']}|{colors}|{options}")
        return answers


@pytest.fixture
def model(monkeypatch):
    fake = FakeModel()
    monkeypatch.setattr(pipeline, "load", lambda path, **_: fake)
    return fake


def install(monkeypatch, **modules: dict) -> None:
    for name, contents in modules.items():
        module = types.ModuleType(name.replace("__", "."))
        module.__dict__.update(contents)
        monkeypatch.setitem(sys.modules, module.__name__, module)


def square(color, mode="RGB") -> Image.Image:
    return Image.new("RGB", (4, 4), color).convert(mode)


# --- lmms-eval


@pytest.fixture
def lmms(monkeypatch):
    base = type("lmms", (), {"__init__": lambda self: setattr(self, "task_dict", {})})
    manifest = collections.namedtuple("ModelManifest", ["model_id", "simple_class_path"])
    install(
        monkeypatch,
        lmms_eval={},
        lmms_eval__api={},
        lmms_eval__api__model={"lmms": base},
        lmms_eval__models={},
        lmms_eval__models__registry_v2={"ModelManifest": manifest},
    )
    yield importlib.import_module("janusflow_jax.harness.lmms")
    del sys.modules["janusflow_jax.harness.lmms"]


def requests_of(*rows, split="test"):
    """Requests of rows (text, options, images), and lmms-eval's documents."""
    documents = {"task": {split: [images for _, _, images in rows]}}
    requests = [
        types.SimpleNamespace(args=(text, options, lambda x: x, n, "task", split))
        for n, (text, options, _) in enumerate(rows)
    ]
    return requests, documents


def test_lmms_eval_gets_the_answers_in_its_order(lmms, model):
    assert lmms.manifest() == ("janusflow_jax", "janusflow_jax.harness.lmms.Model")
    short = {"max_new_tokens": 4, "temperature": 0, "until": ["|["]}
    rows = [(f"{'long ' * (n % 3)}{n}", short, [square((n, 0, 0))]) for n in range(7)]
    rows += [("sampled", {"temperature": 0.5, "do_sample": True}, [square((9, 0, 0))] * 2)]
    rows += [("greedy", {"temperature": 0.5, "do_sample": False}, [])]
    rows += [("<image> or <image>?", {}, [square((1, 2, 3)), square((4, 5, 6), "RGBA")])]
    requests, documents = requests_of(*rows)
    adapter = lmms.Model("path", batch_size="3", device="cuda:0")
    adapter.task_dict = documents
    answers = adapter.generate_until(requests)
    for n in range(7):  # cut at the stop string
        assert answers[n] == f"|{TAG}\n{rows[n][0]}"
    assert answers[7].startswith(f"|{TAG}{TAG}\nsampled|") and "'temperature': 0.5" in answers[7]
    assert answers[8].startswith("|greedy|[]|") and "'temperature': 0.0" in answers[8]
    assert answers[9].startswith(f"|{TAG} or {TAG}?|[[1, 2, 3], [4, 5, 6]]|")
    assert sorted(model.batches) == [1, 1, 2, 3, 3]


def test_lmms_eval_errors(lmms, model):
    with pytest.raises(ConfigError):
        lmms.Model("path", batch_size="auto")
    requests, documents = requests_of(("what?", {}, ["video.mp4"]))
    adapter = lmms.Model("path")
    adapter.task_dict = documents
    with pytest.raises(DataError):
        adapter.generate_until(requests)


# --- VLMEvalKit


@pytest.fixture
def vlmeval(monkeypatch):
    class BaseModel:
        def __init__(self):
            self.dump_image_func = None

        def set_dump_image(self, function):
            self.dump_image_func = function

        def preproc_content(self, message):
            return message

    class Janus(BaseModel):
        def use_custom_prompt(self, dataset):
            return dataset == "MMBench"

        def build_prompt(self, line, dataset=None):
            image = {"type": "image", "value": self.dump_image_func(line)}
            return [image, {"type": "text", "value": f"\n{line['question']}"}]

    install(
        monkeypatch,
        vlmeval={},
        vlmeval__config={"supported_VLM": {}},
        vlmeval__run={"main": lambda: None},
        vlmeval__vlm={},
        vlmeval__vlm__base={"BaseModel": BaseModel},
        vlmeval__vlm__janus={"Janus": Janus},
    )
    package = sys.modules["vlmeval"]
    package.config, package.run = sys.modules["vlmeval.config"], sys.modules["vlmeval.run"]
    yield importlib.import_module("janusflow_jax.harness.vlmeval")
    del sys.modules["janusflow_jax.harness.vlmeval"]


class Table:
    """A data set of VLMEvalKit: question n is about image n // 2."""

    def __init__(self, name, folder, count):
        self.dataset_name, self.folder, self.data = name, folder, self
        self.rows = [{"question": f"What is {n}?", "image": n // 2} for n in range(count)]
        for n in range(count):
            square((n, 0, 0)).save(folder / f"{n}.png")

    def iterrows(self):
        return enumerate(self.rows)

    def dump_image(self, line):
        return str(self.folder / f"{line['image']}.png")

    def build_prompt(self, line):
        return [{"type": "text", "value": line["question"]}]


def test_vlmevalkit_asks_one_by_one_and_gets_batches(vlmeval, model, tmp_path):
    adapter = vlmeval.JanusFlow("path", batch=4, max_new_tokens=8)
    table = Table("MMBench", tmp_path, 10)
    adapter.set_dump_image(table.dump_image)
    for n, line in table.iterrows():
        if n < 2:  # answered before a restart
            continue
        message = adapter.build_prompt(line, "MMBench")
        answer = adapter.generate_inner(message, "MMBench")
        assert answer == f"|{TAG}\nWhat is {n}?|[[{n // 2}, 0, 0]]|{{'max_new_tokens': 8}}"
    assert model.batches == [4, 4]

    other = Table("MMVet", tmp_path, 3)
    adapter.set_dump_image(other.dump_image)
    first = adapter.generate_inner(other.build_prompt(other.rows[0]), "MMVet")
    assert first.startswith(f"{vlmeval.MMVET_SYSTEM}|What is 0?|[]|")
    unknown = [{"type": "text", "value": "not of the data set"}]
    assert "|not of the data set|" in adapter.generate_inner(unknown, "MMVet")
    assert model.batches == [4, 4, 3, 1]


def test_vlmevalkit_launcher_registers_the_model(vlmeval, model, monkeypatch):
    seen = []
    run = lambda: seen.append(sys.argv[1:])  # noqa: E731
    monkeypatch.setattr(sys.modules["vlmeval.run"], "main", run)
    arguments = ["--path", "M", "--batch", "2", "--data", "POPE", "MME", "--work-dir", "out"]
    monkeypatch.setattr(sys, "argv", ["vlmeval", *arguments])
    vlmeval.main()
    assert seen == [["--data", "POPE", "MME", "--work-dir", "out", "--model", "janusflow_jax"]]
    adapter = sys.modules["vlmeval.config"].supported_VLM["janusflow_jax"]()
    assert adapter.generate_inner([{"type": "text", "value": "hello"}]).startswith("|hello|[]|")
