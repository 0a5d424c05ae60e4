"""Paths, sizes, and files and folders that are written whole or not at all."""

import grp
import os
import pathlib
import pwd
import re

import pytest
from etils import epath

from janusflow_jax.checkpoints import checksums
from janusflow_jax.config import files
from janusflow_jax.data.prepare import build, records, text as texts

PACKAGE = pathlib.Path(files.__file__).parents[1]


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


@pytest.mark.parametrize(
    ("path", "ours"),
    [("starts/emoji_vae", True), ("starts/emoji_llm/hub", True), ("starts/no", False)],
)
def test_the_projects_starts_are_there_from_any_folder(path, ours, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    root = PACKAGE.parent if ours else tmp_path
    assert files.resolve(path) == epath.Path(root / path)
    (tmp_path / path).mkdir(parents=True)  # the user's own come first
    assert files.resolve(path) == epath.Path(tmp_path / path)


@pytest.fixture
def file(tmp_path, monkeypatch):
    """A file of seven bytes whose owner and group have no name, as in many containers."""

    def unknown(number):
        raise KeyError(number)

    monkeypatch.setattr(pwd, "getpwuid", unknown)
    monkeypatch.setattr(grp, "getgrgid", unknown)
    file = epath.Path(tmp_path / "a.txt")
    file.write_text("a text\n")
    with pytest.raises(KeyError):
        file.stat()
    return file


def test_a_file_whose_owner_has_no_name_has_a_size(file):
    assert files.size(file) == files.size(str(file)) == build._size(str(file)) == 7
    options = records.Options("text", (str(file),), kind="text")
    (shard,) = texts.plan(options, file.parent / "slices")
    assert (shard["begin"], shard["end"]) == (0, 7)
    checksums.write_sums(file.parent)
    assert checksums.damage(file.parent) == ""
    file.write_text("another\n")
    assert "a.txt" in checksums.damage(file.parent)


def test_nothing_asks_epath_for_an_owner_or_resolves_a_url():
    """`epath`'s stat fails without a name of the owner, and its resolve makes a URL a folder."""
    trap = re.compile(r"\.stat\(\)|Path\([^()]*\)\.(resolve|absolute|expanduser)\(\)")
    wrong = [
        f"{path.relative_to(PACKAGE)}: {line.strip()}"
        for path in PACKAGE.rglob("*.py")
        for line in path.read_text().splitlines()
        if trap.search(line) and path != pathlib.Path(files.__file__)
    ]
    assert not wrong, "\n".join(wrong)
