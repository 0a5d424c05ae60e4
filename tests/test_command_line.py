"""The commands on the golden model: what they write, print and refuse; the cache on disk."""

import io
import json
import os
import pathlib
import re
import sys

import jax
import numpy as np
import pytest
from etils import epath
from helpers import golden
from PIL import Image

from janusflow_jax import chat, cli, evaluate, generate, pipeline
from janusflow_jax.config.errors import ConfigError
from janusflow_jax.data import image_files
from janusflow_jax.parallel import compile_cache, processes

PICTURE = str(golden.TINY / "images" / "0.png")


@pytest.fixture
def loaded(golden_model, monkeypatch):
    monkeypatch.setattr(pipeline, "load", lambda path, **_: golden_model)
    return golden_model


@pytest.mark.slow
def test_generate_writes_a_sheet_files_and_a_report(loaded, tmp_path, capsys):
    (tmp_path / "prompts.txt").write_text("a red fox\n\nTwo yellow taxis\n")
    out, report = tmp_path / "pictures", tmp_path / "report.json"
    args = f"--model m --prompts {tmp_path}/prompts.txt --steps 2 --seed 5 9 --json {report}"
    generate.main([*args.split(), "--prompt", "a tree", "--seed", "1", "5", "9", "--out", str(out)])
    said = json.loads(report.read_text())
    assert [(x["prompt"], x["seed"]) for x in said["images"]] == [
        ("a tree", 1),
        ("a red fox", 5),
        ("Two yellow taxis", 9),
    ]
    want = {"cfg_weight": 2.0, "num_steps": 2, "order": 1, "shift": 1.0}
    want |= {"guidance_interval": [0.0, 1.0], "dtype": "float32", "int8": False}
    assert said["settings"] == want
    assert {(x["rows"], x["positions"]) for x in said["images"]} == {(4, 32)}
    assert said["numerics"]["random_generator"] == "threefry2x32"
    again = loaded.generate("Two yellow taxis", seed=9, num_steps=2, output="numpy")[0]
    file = Image.open(said["images"][2]["file"])
    assert np.abs(np.asarray(file).astype(int) - again).max() <= 1
    settings = json.loads(file.text[image_files.TEXT_KEY])
    assert (settings["prompt"], settings["seed"]) == ("Two yellow taxis", 9)
    assert settings["num_inference_steps"] == 2 and len(settings["model_sha256"]) == 64
    written = capsys.readouterr()
    assert "3 of 3 images" in written.err and "in float32" in written.err
    assert written.out == f"{out}/0000.png .. {out}/0002.png\n"
    sheet = tmp_path / "new" / "sheet.png"
    args = ["--model", "m", "--steps", "2", "--images-per-prompt", "2", "--out", str(sheet)]
    generate.main([*args, "--prompt", "a tree", "--prompt", "a fox"])
    assert Image.open(sheet).width > 4 * 128


def test_chat_answers_and_talks(loaded, monkeypatch, capsys):
    ask = ["--model", "m", "--max-new-tokens", "8"]
    chat.main([*ask, "--image", PICTURE, "--prompt", "What is it?"])
    assert capsys.readouterr().out.strip() == loaded.chat("What is it?", PICTURE, max_new_tokens=8)
    seen = []
    monkeypatch.setattr(
        type(loaded),
        "stream",
        lambda self, turns, pictures, **_: seen.append((turns, pictures)) or iter(("yes", " no")),
    )
    lines = [f"/image {PICTURE}", "One?", "/what", "/image no.png", "Two?", "/new", "Three?"]
    monkeypatch.setattr(sys, "stdin", io.StringIO("\n".join(lines)))
    chat.main([*ask, "--system", "Be brief."])
    written = capsys.readouterr()
    assert written.out == "yes no\n" * 3
    assert "unknown command /what" in written.err and "no.png: no such file" in written.err
    roles = [[t["role"] for t in turns] for turns, _ in seen]
    assert roles == [["System", "User"], ["System", "User", "Assistant", "User"], roles[0]]
    assert seen[1][0][1]["content"] == "<image_placeholder>\nOne?"
    assert seen[1][0][2]["content"] == "yes no"
    assert [len(pictures) for _, pictures in seen] == [1, 1, 0]


@pytest.mark.parametrize(
    ("error", "says"),
    [
        (ValueError("odd"), "ValueError: odd"),
        (TypeError("odd"), "TypeError: odd"),
        (OSError("odd"), "error: odd"),
        (MemoryError(), "too little memory"),
        (jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: 30G"), "use a shorter text"),
        (jax.errors.JaxRuntimeError("INTERNAL: x: Out of memory"), "use a shorter text"),
        (None, "expected Unicode text"),
    ],
)
def test_no_message_ends_a_conversation(error, says, loaded, monkeypatch, capsys):
    seen, stream = [], type(loaded).stream

    def answer(self, turns, images, **options):
        seen.append(turns)
        if len(seen) == 2 and error:
            raise error
        return stream(self, turns, images, **options) if len(seen) == 2 else iter(("yes",))

    monkeypatch.setattr(type(loaded), "stream", answer)
    second = "Two?" if error else "\udce4?"  # a byte that is not UTF-8
    monkeypatch.setattr(sys, "stdin", io.StringIO(f"One?\n{second}\nThree?"))
    chat.main(["--model", "m"])
    written = capsys.readouterr()
    assert written.out == "yes\n" * 2 and says in written.err
    said = [turn["content"] for turn in seen[2] if turn["role"] == "User"]
    assert said == ["One?", "Three?"]


@pytest.mark.parametrize(
    ("module", "args", "says"),
    [
        (generate, "--prompt x --model /no/where", "error: /no/where: no such folder; expected"),
        (generate, "--model m", "error: expected --prompt TEXT or --prompts FILE"),
        (generate, "--model m --prompts /no/file", "error: .*No such file"),
        (generate, "--model m --prompt x --out a.jpg", "error: --out: expected a .png file or a"),
        (
            generate,
            "--model m --prompt x --steps 0",
            "error: generate: num_steps: expected an integer",
        ),
        (chat, "--model m --image no.png --prompt x", "error: image no.png: no such file"),
        (chat, "--model m --temperature -1", "error: chat: temperature: expected a finite"),
        (generate, "--model m --prompt x --json .", "error: --json: expected a file that can be"),
        (generate, "--model m --prompt x --cfg nan", "error: generate: guidance_scale: expected"),
        (generate, "--model m --prompt x --cfg 1e300", "error: generate: guidance_scale: expected"),
        (generate, "--model m --prompt x --out /dev/null/x.png", "error: --out: expected a file"),
        (generate, "--model m --prompt x --out /dev/null/images", "error: --out: expected a file"),
        (chat, "--model m --temperature inf", "error: chat: temperature: expected a finite"),
        (chat, "--model m --seed -1", "error: seed: expected 0 to"),
        (chat, "--model m --image http://x/y.png", "error: http://x/y.png: expected a path, or"),
        (evaluate, "--model m --steps 0", "error: generate: num_steps: expected an int"),
        (evaluate, "--model m --guidance-scale inf", "error: generate: guidance_scale: expected"),
        (evaluate, "--model m --prompts 1", "error: --prompts, --captions: expected"),
        (evaluate, "--model m --out .", r"error: --out: expected a .*'\.' \(Is a directory\)"),
        (evaluate, "--model m --out /dev/null/x.json", "error: --out: expected a file that can"),
        (evaluate, "--model m --out x.png", "error: --out: expected a file such as"),
        (evaluate, "--model m --seed 4294967000", "error: seed: expected 0 to"),
    ],
)
def test_bad_input_is_one_message(module, args, says, monkeypatch, tmp_path, capsys):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as end:
        cli.run(lambda: module.main(args.split()))
    assert end.value.code == 1 and re.match(says, capsys.readouterr().err)


def test_a_report_is_not_overwritten_unasked(monkeypatch, tmp_path, capsys):
    monkeypatch.chdir(tmp_path)
    pathlib.Path("eval.json").write_text("of another model")
    with pytest.raises(SystemExit):
        cli.run(lambda: evaluate.main(["--model", "m"]))
    assert "error: eval.json exists" in capsys.readouterr().err
    assert pathlib.Path("eval.json").read_text() == "of another model"


@pytest.mark.skipif(not pathlib.Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_full_disk_is_met_before_the_work(monkeypatch, tmp_path, capsys):
    full = pathlib.Path("/dev/full")
    path_type = type(epath.Path("x"))
    monkeypatch.setattr(path_type, "write_bytes", lambda self, data: full.write_bytes(data))
    for args in (["--out", "x.png"], ["--out", "images"], ["--json", "x.json"]):
        monkeypatch.chdir(tmp_path)
        with pytest.raises(SystemExit):
            cli.run(lambda: generate.main(["--model", "m", "--prompt", "x", *args]))  # noqa: B023
        assert "No space left" in capsys.readouterr().err


def test_check_writable_leaves_a_file_as_it_was(tmp_path):
    file = tmp_path / "new" / "report.json"
    assert cli.check_writable(str(file), "--out") == file
    assert file.parent.is_dir() and not list(file.parent.iterdir())
    file.write_text("old")
    cli.check_writable(str(file), "--out")
    assert file.read_text() == "old"


@pytest.mark.parametrize(
    "error",
    [
        ZeroDivisionError(),
        ValueError("ours"),
        RuntimeError("ours"),
        jax.errors.JaxRuntimeError("INVALID_ARGUMENT: ours"),
    ],
)
def test_our_own_mistakes_keep_their_traceback(error):
    def main():
        raise error

    with pytest.raises(type(error)):
        cli.run(main)


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (ConfigError("lr: expected > 0"), "error: lr"),
        (OSError("disk full"), "error: disk full"),
        (ImportError("install tensorboardX"), "error: install"),
        (OSError(28, "No space left on device", "out/a"), "error: the disk is full"),
        (RuntimeError("write() failed: No space left on device; writing d/x"), "error: the disk"),
        (ValueError("RESOURCE_EXHAUSTED: Error writing: No space left on device"), "error: the di"),
        (OSError(122, "Disk quota exceeded"), "error: the disk is full"),
        (ValueError("DATA_LOSS: Error reading d/manifest.ocdbt"), "error: a file cannot be read"),
        (MemoryError(), "error: this machine has too little memory"),
        (np.linalg.LinAlgError("SVD did not converge"), "error: numbers that are not finite"),
        (jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: 30G\nallocations"), "error: out of mem"),
        (jax.errors.JaxRuntimeError("INTERNAL: Error: Out of memory 8"), "error: out of memory on"),
    ],
)
def test_errors_that_users_can_fix_are_one_message(error, message, capsys):
    def main():
        raise error

    with pytest.raises(SystemExit) as end:
        cli.run(main, error_code=2)
    err = capsys.readouterr().err
    assert end.value.code == 2 and err.startswith(message) and "allocations" not in err


@pytest.mark.parametrize(
    ("error", "message"),
    [("RESOURCE_EXHAUSTED: 30G", "fewer rows"), ("connection reset", "one of them has died")],
)
def test_a_job_of_several_processes_exits_without_its_peers(error, message, monkeypatch, capsys):
    monkeypatch.setattr(processes, "count", lambda: 2)
    monkeypatch.setattr(processes.os, "_exit", sys.exit)

    def main():
        raise jax.errors.JaxRuntimeError(error)

    with pytest.raises(SystemExit):
        cli.run(main, out_of_memory="use fewer rows")
    assert message in capsys.readouterr().err


def test_ctrl_c_ends_with_130(capsys):
    def main():
        raise KeyboardInterrupt

    with pytest.raises(SystemExit) as end:
        cli.run(main, rerun="the same command resumes")
    assert end.value.code == 130 and "resumes" in capsys.readouterr().err


def test_the_old_name_of_the_guidance_scale_is_accepted():
    for args in (["--cfg", "3"], ["--guidance-scale", "3"]):
        assert generate.parse(["--model", "m", *args]).guidance_scale == 3.0
    assert generate.parse(["--model", "m"]).guidance_scale is None, "the model's"


@pytest.mark.parametrize("module", [generate, chat, evaluate])
def test_help_teaches(module, capsys):
    with pytest.raises(SystemExit):
        module.parse(["--help"])
    said = capsys.readouterr().out
    assert "--model" in said and "bfloat16" in said and f"{module.__name__}" in said


def test_the_cache_keeps_programs_and_can_be_turned_off(monkeypatch, tmp_path):
    before = {
        n: getattr(jax.config, n)
        for n in (
            "jax_compilation_cache_dir",
            "jax_persistent_cache_min_compile_time_secs",
            "jax_compilation_cache_max_size",
        )
    }
    assert compile_cache.enable() == before["jax_compilation_cache_dir"]  # JAX's own stays
    try:
        jax.config.update("jax_compilation_cache_dir", None)
        monkeypatch.setenv(compile_cache.VARIABLE, "off")
        assert compile_cache.enable() is None
        monkeypatch.setenv(compile_cache.VARIABLE, str(tmp_path / "cache"))
        monkeypatch.setattr(compile_cache, "MIN_SECONDS", 0.0)
        assert compile_cache.enable() == str(tmp_path / "cache")
        jax.jit(lambda x: x * 3 + 1).lower(np.ones(7)).compile()
        assert list((tmp_path / "cache").glob("jit_*"))
        jax.config.update("jax_compilation_cache_dir", None)
        with monkeypatch.context() as full, pytest.warns(UserWarning, match="disk is full"):
            full.setattr(compile_cache, "MIN_FREE_BYTES", 2**62)
            assert compile_cache.enable() is None
        jax.config.update("jax_compilation_cache_dir", None)
        blocked = tmp_path / "file"
        blocked.write_text("")
        for setting in (str(blocked / "cache"), "/proc/cache", "~nobody-here/cache", "no://x/y"):
            monkeypatch.setenv(compile_cache.VARIABLE, setting)
            with pytest.warns(UserWarning, match=compile_cache.VARIABLE):
                assert compile_cache.enable() is None
        monkeypatch.delenv(compile_cache.VARIABLE)
        monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
        monkeypatch.setattr(os.path, "expanduser", lambda path: path)  # no HOME, no passwd entry
        with pytest.warns(UserWarning, match="no home"):
            assert compile_cache.enable() is None
    finally:
        for name, value in before.items():
            jax.config.update(name, value)
        compile_cache.compilation_cache.reset_cache()
