"""docs/finetuning.md shows what docs/forgetting.json holds; the tool gathers what runs measured."""

import copy
import json
import pathlib

import pytest

from experiments import (
    forgetting,
    small_scale,
    small_scale_plots as plots,
    small_scale_tables as tables,
)
from janusflow_jax.checkpoints import checksums

ROOT = pathlib.Path(__file__).resolve().parents[1]
STORED = json.loads((ROOT / "docs" / "forgetting.json").read_text())


def _exact(numbers, kind, split):
    runs = {n: x["captions"][split] for n, x in numbers["runs"].items() if n.startswith(f"{kind}-")}
    return [runs[name] for name in sorted(runs)]


def _run(folder, name, losses=()):
    run = folder / name
    run.mkdir(parents=True)
    lines = [{"step": 1, "loss": 1.0}]
    for step, loss in enumerate(losses):
        numbers = dict.fromkeys((f"eval/{x}" for x in forgetting.LOSSES), loss)
        averaged = {f"eval_ema/{x}": loss - 0.5 for x in forgetting.LOSSES} if step else {}
        lines.append({"step": 100 * step, **numbers, **averaged})
    (run / "metrics.jsonl").write_text("\n".join(map(json.dumps, lines)) + "\n")
    config = {"num_steps": 100, "batch_rows": 8, "start": "runs/F-1", "seed": 1}
    (run / "config.json").write_text(json.dumps(config | {"optim": {"lr": 1e-3, "ema": 0.99}}))
    (run / "attempts.json").write_text(json.dumps([{"began": 0.0, "alive": 60.0}]))
    step = run / "checkpoints" / "100"
    step.mkdir(parents=True)
    (step / checksums.MARKER).write_text("")
    return run


def _args(tmp_path):
    folders = [f"--{x}={tmp_path / x}" for x in ("runs", "bases", "reports")]
    return forgetting.parse(folders)


def test_the_document_has_the_stored_numbers():
    text = (ROOT / "docs" / "finetuning.md").read_text()
    parts = {"forgetting": forgetting.table(STORED)}
    assert tables.fill(text, parts) == text, "run `python experiments/forgetting.py --redraw`"
    other = copy.deepcopy(STORED)
    other["runs"]["replay-1"]["captions"]["train"] += 0.1
    assert tables.fill(text, {"forgetting": forgetting.table(other)}) != text
    assert (ROOT / "docs" / "forgetting.png").stat().st_size < 100_000


def test_a_document_without_its_marker_is_refused():
    with pytest.raises(ValueError, match="forgetting"):
        tables.fill("nothing", {"forgetting": ""})


def test_both_stored_runs_of_a_seed_have_the_same_settings():
    for seed in (1, 2, 3):
        one, two = (STORED["settings"][f"{k}-{seed}"] for k in forgetting.KINDS)
        assert one == two
        for name in ("steps", "batch_rows"):
            one, two = (STORED["runs"][f"{k}-{seed}"]["training"][name] for k in forgetting.KINDS)
            assert one == two
        assert STORED["settings"][f"replay-{seed}"]["start"] == f"F-{seed}"
        assert STORED["settings"][f"replay-{seed}"]["seed"] == seed


def test_without_replay_old_drawings_and_captions_are_forgotten():
    """What docs/finetuning.md says of the stored numbers, of every seed apart."""
    for split in ("heldout_pairs", "heldout_views"):
        before, without, replay = (_exact(STORED, k, split) for k in ("F", *forgetting.KINDS))
        assert len(before) == len(without) == len(replay) == 3
        for was, lost, replayed in zip(before, without, replay, strict=True):
            assert lost < was and 0.96 * was < replayed
    for seed in (1, 2, 3):
        for kind, low, high in (("without", 1.5, 1.7), ("replay", 1.0, 1.25)):
            loss = STORED["runs"][f"{kind}-{seed}"]["curve"]["replay_generate/loss_rf"]
            assert low < loss[-1] / loss[0] < high


def test_what_is_gathered(tmp_path, monkeypatch):
    for name in ("without-1", "replay-1"):
        _run(tmp_path / "runs", name, losses=(1.0, 2.0))
    unended = _run(tmp_path / "runs", "replay-2", losses=(1.0,))
    (unended / "checkpoints" / "100").rename(unended / "checkpoints" / "50")
    _run(tmp_path / "bases", "F-1")

    def score(run, file, args, **settings):
        assert settings["prompts"] == 0 and settings["captions"] == forgetting.CAPTIONS
        exact = {"exact": {"constant": {"score": 0.25 if run.name == "F-1" else 0.5}}}
        report = {"software": {}, "data": {}, "model": {}, "captions": {}}
        report["captions"] = dict.fromkeys(forgetting.SPLITS, exact)
        file.parent.mkdir(exist_ok=True)
        file.write_text(json.dumps(report))

    monkeypatch.setattr(small_scale, "score", score)
    numbers = forgetting.gather(_args(tmp_path))
    assert sorted(numbers["runs"]) == ["F-1", "replay-1", "without-1"]
    assert numbers["settings"]["replay-1"] == {"start": "F-1", "seed": 1, "lr": 1e-3, "ema": 0.99}
    curve = numbers["runs"]["replay-1"]["curve"]
    assert curve["step"] == [0, 100] and curve["mine_generate/loss_rf"] == [1.0, 1.5]
    before, without, _ = forgetting.table(numbers).splitlines()[2:]
    assert (
        before.startswith("| before | 1 | 25.0% (one run)") and "1.000 (1.000 .. 1.000)" in before
    )
    assert without.startswith("| without replay | 1 | 50.0%") and "1.500 (one run)" in without

    def scored_elsewhere(run, file, args, **settings):
        score(run, file, args, **settings)
        if run.name == "replay-1":
            file.write_text(json.dumps(json.loads(file.read_text()) | {"software": {"jax": "9"}}))

    monkeypatch.setattr(small_scale, "score", scored_elsewhere)
    with pytest.raises(ValueError, match=r"replay-1\.json: expected runs scored in the same way"):
        forgetting.gather(_args(tmp_path))


def test_runs_without_their_pair_or_of_another_start(tmp_path, capsys):
    for name in ("without-2", "replay-2"):
        _run(tmp_path / "runs", name)
    with pytest.raises(ValueError, match="got no seed with all three"):
        forgetting.gather(_args(tmp_path))
    assert f"{tmp_path / 'bases' / 'F-2'}: skipped" in capsys.readouterr().out
    _run(tmp_path / "bases", "F-2")
    with pytest.raises(ValueError, match=r"without-2: expected start .*F-2; got 'runs/F-1'"):
        forgetting.gather(_args(tmp_path))


def test_the_plot_is_drawn(tmp_path):
    plots.save(plots.forgetting(STORED, forgetting.KINDS, forgetting.LOSSES), tmp_path / "a.png")
    assert 5_000 < (tmp_path / "a.png").stat().st_size < 100_000
