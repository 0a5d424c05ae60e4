"""The check of external scorers passes a scorer that sees and fails one that is blind."""

from __future__ import annotations

import json
import pathlib

import pytest
from PIL import Image

LAUNCH = str(pathlib.Path(__file__).resolve().parents[1] / "launch")


@pytest.fixture
def tool(monkeypatch):
    monkeypatch.syspath_prepend(LAUNCH)
    import check_scorer

    return check_scorer


def coco(images=40):
    """Image i shows a large object of class i // 2 and a small one of the next class."""
    categories = [{"id": 2 * n + 1, "name": f"c{n}"} for n in range(80)]
    annotations = []
    for i in range(images):
        for number, area in ((i // 2, 2000), (i // 2 + 1, 10)):
            annotation = {"image_id": i, "category_id": 2 * number + 1, "area": area, "iscrowd": 0}
            annotations.append(annotation)
    size = {"width": 100, "height": 100}
    sizes = [{"id": i, "file_name": f"{i}.jpg", **size} for i in range(images)]
    return {"categories": categories[::-1], "images": sizes, "annotations": annotations[::-1]}


def test_known_images_have_one_class_each_and_one_that_they_lack(tool):
    known = tool.known_images(coco())
    assert [x.file for x in known] == [f"{i}.jpg" for i in range(0, 40, 2)]
    assert [x.present for x in known] == [(i,) for i in range(20)]
    assert all(x.absent not in (i, i + 1) for i, x in enumerate(known))


def test_geneval_needs_a_detector_and_colors(tool):
    known = tool.known_images(coco())
    seen = {x.file: {*x.present, 79} for x in known}
    names = {rgb: name for name, rgb in tool.COLORS.items()}
    color = lambda image: names[image.getpixel((0, 0))]  # noqa: E731
    result = tool.check_geneval(known, seen.get, color)
    assert result["passed"] and json.dumps(result)
    seen |= {"0.jpg": set(), "2.jpg": set()}
    assert tool.check_geneval(known, seen.get, color)["passed"]  # 18 of 20
    assert not tool.check_geneval(known, (seen | {"4.jpg": set()}).get, color)["passed"]
    assert not tool.check_geneval(known, lambda file: set(), color)["passed"]
    assert not tool.check_geneval(known, seen.get, lambda image: "red")["passed"]
    assert not tool.check_geneval(known[:5], seen.get, color)["passed"]


def test_dpg_needs_answers_of_both_kinds(tool):
    known = tool.known_images(coco())
    present = {x.file: x.present for x in known}
    right = lambda file, number: "yes" if number in present[file] else "no"  # noqa: E731
    assert tool.check_dpg(known, right)["passed"]
    assert not tool.check_dpg(known, lambda file, number: "yes")["passed"]
    assert not tool.check_dpg(known, lambda file, number: "Yes")["passed"]


def test_grids_of_another_size_are_refused(tool, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(tool, "DPG_FILES", 2)
    for name in ("a.png", tool.DPG_LAST):
        Image.new("RGB", (16, 16)).save(tmp_path / name)
    assert tool.grid_problems(tmp_path, 8) == []
    assert len(tool.grid_problems(tmp_path, 4)) == 2
    args = ["--images", str(tmp_path), "--coco", str(tmp_path), "--out", str(tmp_path / "x.json")]
    assert tool.main(["dpg", "--resolution", "4", *args]) == 1
    assert "side 8" in capsys.readouterr().err
    (tmp_path / "a.png").rename(tmp_path / "results.txt")
    (tmp_path / tool.DPG_LAST).unlink()
    assert any(tool.DPG_LAST in x for x in tool.grid_problems(tmp_path, 8))
