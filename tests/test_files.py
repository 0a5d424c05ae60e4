"""Paths, sizes, and files and folders that are written whole or not at all."""

import grp
import os
import pathlib
import pwd
import re
import socket
import subprocess
import sys

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


def test_of_a_link_what_it_leads_to_is_replaced(tmp_path):
    (tmp_path / "disk" / "folder").mkdir(parents=True)
    (tmp_path / "link").symlink_to(tmp_path / "disk" / "folder")
    for text in ("first", "second"):
        write(tmp_path / "link", text)
        assert (tmp_path / "disk" / "folder" / "file").read_text() == text
    assert (tmp_path / "link").is_symlink() and os.listdir(tmp_path / "disk") == ["folder"]
    files.remove(tmp_path / "link")
    assert os.listdir(tmp_path) == ["disk"] and os.listdir(tmp_path / "disk") == ["folder"]


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


def tree(folder, *names):
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("ours" if name.endswith("mark.json") else "years of work")


@pytest.mark.parametrize(
    ("out", "overwrite", "is_free"),
    [
        ("new", False, True),
        ("new/below", True, True),
        ("empty", False, True),
        ("ours", False, False),
        ("ours", True, True),
        ("ours-and-more", True, False),
        ("ours-and-a-folder", True, False),
        ("mark-of-others", True, False),
        ("others", True, False),
        ("file.tex", True, False),
        ("source", True, False),
        ("source/below/it", True, False),
        ("above", True, False),
        ("above/source/mark.json", True, False),
        ("link", True, False),
        (".", True, False),
        ("others/../source", True, False),
    ],
)
def test_only_what_the_command_wrote_is_replaced(tmp_path, out, overwrite, is_free):
    tree(tmp_path, "ours/mark.json", "ours/a.array", "ours-and-more/mark.json")
    tree(tmp_path, "ours-and-more/thesis.tex", "ours-and-a-folder/mark.json")
    tree(tmp_path, "ours-and-a-folder/thesis/a.array", "others/thesis.tex", "file.tex")
    tree(tmp_path, "source/mark.json", "above/mark.json", "above/source/mark.json")
    tree(tmp_path, "mark-of-others/notes")
    (tmp_path / "mark-of-others" / "mark.json").write_text("theirs")
    (tmp_path / "empty").mkdir()
    (tmp_path / "link").symlink_to("source")
    inputs = [tmp_path / "source", tmp_path / "above" / "source"]
    problem = files.problem_of_out(
        epath.Path(tmp_path / out), overwrite, ("mark.json", "ours"), ("*.json", "*.array"), inputs
    )
    assert (problem == "") == is_free, problem
    assert is_free or str(tmp_path / out) in problem


def test_an_input_in_the_home_folder_is_not_replaced(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    tree(tmp_path, "source/mark.json")
    rest = ("mark.json", "ours"), ("*.json",), ["~/source"]
    assert files.problem_of_out(epath.Path(tmp_path / "source"), True, *rest)


KILLED = """
import os, pathlib, signal, sys
from janusflow_jax.config import files
path, moment = pathlib.Path(sys.argv[1]), sys.argv[2]
if moment == "between the renames":
    pathlib.Path.replace = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
with files.replacing(path) as part:
    part.mkdir()
    (part / "file").write_text("new")
    if moment == "writing":
        os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.mark.parametrize("moment", ["writing", "between the renames"])
def test_what_a_killed_process_left_is_removed(tmp_path, moment):
    path = tmp_path / "folder"
    write(path, "first")
    done = subprocess.run([sys.executable, "-c", KILLED, str(path), moment])
    assert done.returncode == -9 and len(os.listdir(tmp_path)) > 1 - path.exists()
    host = socket.gethostname()
    running = {f".folder.partial-{host}-{os.getppid()}", ".folder.partial-elsewhere-1"}
    for name in running:
        (tmp_path / name).mkdir()
    with pytest.raises(ZeroDivisionError), files.replacing(path) as part:
        assert (path / "file").read_text() == "first"  # also when it was moved away
        assert {*os.listdir(tmp_path)} == {"folder", *running}
        assert not part.exists() and 1 / 0
    write(path, "second")
    assert {*os.listdir(tmp_path)} == {"folder", *running}
    assert (path / "file").read_text() == "second"


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
