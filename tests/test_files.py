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


def test_an_error_that_names_no_file_gets_the_name(tmp_path):
    """A full disk: write() answers with a number only. A name that is there stays."""
    for error, name in ((OSError(28, "full"), "folder"), (OSError(2, "none", "other"), "other")):
        with pytest.raises(OSError, match=name), files.replacing(tmp_path / "folder"):
            raise error
    assert not os.listdir(tmp_path)


def test_what_is_unfinished_can_be_removed_by_a_process_about_to_exit(tmp_path):
    write(tmp_path / "folder", "first")
    with pytest.raises(OSError), files.replacing(tmp_path / "folder") as part:
        part.mkdir()
        with files.replacing(tmp_path / "file") as other:
            other.write_text("half")
            files.remove_unfinished()
            assert os.listdir(tmp_path) == ["folder"]
    assert (tmp_path / "folder" / "file").read_text() == "first"
    files.remove_unfinished()  # nothing is left to do
    assert os.listdir(tmp_path) == ["folder"]
