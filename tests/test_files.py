"""Files and folders that are written as a whole or not at all."""

import os
import pathlib

import pytest

from janusflow_jax.config import files


def write(path, text):
    with files.replacing(path) as part:
        part.mkdir()
        (part / "file").write_text(text)


def test_a_folder_is_replaced_and_nothing_else_is_left(tmp_path):
    for text in ("first", "second"):
        write(tmp_path / "folder", text)
        assert (tmp_path / "folder" / "file").read_text() == text
        assert os.listdir(tmp_path) == ["folder"]


@pytest.mark.parametrize("failing", ["mkdir", "replace"])
def test_after_an_error_the_old_folder_is_there(tmp_path, monkeypatch, failing):
    write(tmp_path / "folder", "first")

    def fail(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(pathlib.Path, failing, fail)
    with pytest.raises(KeyboardInterrupt):
        write(tmp_path / "folder", "second")
    assert (tmp_path / "folder" / "file").read_text() == "first"
    assert os.listdir(tmp_path) == ["folder"]
