"""Data sets that tfds holds already: other field names by the config, with clear errors."""

from __future__ import annotations

import contextlib
import io
from pathlib import Path
from typing import ClassVar

import numpy as np
import pytest
from helpers import scenes

from janusflow_jax import config as config_lib
from janusflow_jax.config import checks as config_checks
from janusflow_jax.config.errors import DataError
from janusflow_jax.data import chat_format, packing, rows, sources

HUB = Path(__file__).parent / "data" / "golden" / "tiny" / "janusflow"
MODEL = config_lib.model_config("test")


@pytest.fixture(scope="module")
def catalog(tmp_path_factory):
    """A data set as tfds's own builders make them: fields of COCO's and of ImageNet's names."""
    import tensorflow_datasets as tfds

    class Pictures(tfds.core.GeneratorBasedBuilder, skip_registration=True):
        VERSION = tfds.core.Version("1.0.0")
        url_infos: ClassVar = {}

        def _info(self):
            f = tfds.features
            features = {
                "picture": f.Image(shape=(None, None, 3)),
                "annotations": f.Sequence({"id": f.Scalar(np.int64), "words": f.Text()}),
                "text": f.Text(),
                "label": f.ClassLabel(names=["tabby cat", "beagle"]),
                "area": f.Scalar(np.float32),
            }
            return tfds.core.DatasetInfo(builder=self, features=f.FeaturesDict(features))

        def _split_generators(self, dl_manager):
            return {"train": self._generate_examples()}

        def _generate_examples(self):
            for i in range(9):
                said = [{"id": 7, "words": f"a wall, {i}"}, {"id": 8, "words": "red and blue"}]
                yield (
                    i,
                    {
                        "picture": io.BytesIO(scenes.encoded()),
                        "annotations": said,
                        "text": f"text {i}",
                        "label": i % 2,
                        "area": 0.5,
                    },
                )

    builder = Pictures(data_dir=tmp_path_factory.mktemp("tfds"), file_format="array_record")
    with contextlib.redirect_stdout(io.StringIO()):
        builder.download_and_prepare()
    return Path(str(builder.data_dir))


COCO = (("image", "picture"), ("captions", "annotations/words"))
CLASSES = (("image", "picture"), ("captions", "label"))


def opened(path, fields, task="generate"):
    return sources.mapped(sources.open_source(path, "train"), fields, task)


def test_fields_have_our_names(catalog):
    source = opened(catalog, COCO)
    (record,) = (r for r in map(source.__getitem__, range(9)) if r["text"] == "text 3")
    assert record["captions"] == ["a wall, 3", "red and blue"]
    assert record["image"] == scenes.encoded()  # bytes as they were prepared
    assert set(record) == {"image", "captions", "text", "label", "area"}
    assert {opened(catalog, CLASSES)[i]["captions"][0] for i in range(9)} == {"tabby cat", "beagle"}
    documents = opened(catalog, (("images", "picture"), ("captions", "text")), "understand")
    assert documents[0]["images"] == [scenes.encoded()]
    assert documents[0]["captions"][0].startswith("text ")
    plain = sources.open_source(catalog, "train")
    assert sources.mapped(plain, (), "text") is plain


@pytest.mark.parametrize(
    ("fields", "task", "word"),
    [
        ((), "generate", "image or images"),
        ((("image", "picture"),), "generate", "field captions"),
        ((("captions", "caption"),), "text", "'caption'"),
        ((("captions", "annotations/text"),), "text", "'annotations/text'"),
        ((("caption", "text"),), "text", "caption: "),
        ((("image", "label"),), "generate", "'label' to hold"),
        ((("text", "area"),), "text", "'area' to hold"),
    ],
)
def test_wrong_fields_are_listed(catalog, fields, task, word):
    with pytest.raises(DataError, match="annotations/words, area, label, picture, text") as e:
        opened(catalog, fields, task)
    assert word in str(e.value)


def test_other_file_formats_are_refused(catalog, tmp_path):
    copy = tmp_path / "copy"
    copy.mkdir()
    for file in catalog.iterdir():
        text = file.read_bytes()
        if file.name == "dataset_info.json":
            text = text.replace(b'"array_record"', b'"tfrecord"')
        (copy / file.name).write_bytes(text)
    with pytest.raises(DataError, match="tfrecord"):
        sources.open_source(copy, "train")


def test_rows_read_mapped_fields_and_lengths_are_of_them(catalog):
    chat = chat_format.ChatFormat.load(HUB)
    tails = []
    for fields in (COCO, CLASSES):
        source = config_lib.SourceConfig(path=str(catalog), fields=fields, format="plain")
        cfg = config_lib.DataConfig(sources=(source,), row_len=128, gen_slots=2, und_slots=2)
        made = rows.Rows(cfg, MODEL, chat)
        row, bad = made.row(0)
        assert not bad and (row["slot_task"] == 1).any()
        tails.append(made.sources[0].bins.samples.length.tolist())
        file = packing.lengths_path(catalog, "train", "generate", "plain", chat, fields)
        assert file.exists()
    assert tails[0] != tails[1]


def test_a_config_with_fields_is_checked_and_read_back():
    source = config_lib.SourceConfig(path="a", fields=COCO)
    cfg = config_lib.DataConfig(sources=(source,))
    assert config_lib.from_dict(config_lib.DataConfig, config_lib.to_dict(cfg)) == cfg
    wrong = config_lib.SourceConfig(name="w", path="a", fields=(("image", "a"), ("image", "b")))
    train = config_lib.TrainConfig(data=config_lib.DataConfig(sources=(wrong,)))
    problems = config_checks.train_problems(train)
    assert any("fields" in problem and "pairs" in problem for problem in problems)
    train.data.sources = (source, source)
    assert any("different names" in problem for problem in config_checks.train_problems(train))
