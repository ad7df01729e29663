"""Every example runs as it is, and refuses what it can't use."""

from __future__ import annotations

import json
import runpy
import sys
from pathlib import Path

import pytest
import torchvision
from images import load

EXAMPLES = Path(__file__).parents[2] / "examples"
SMALL = ["--epochs", "1", "--limit", "128", "--batch-size", "64", "--device", "cpu"]


def run(monkeypatch: pytest.MonkeyPatch, script: str, *options: str) -> None:
    monkeypatch.setattr(sys, "argv", [str(EXAMPLES / script), *options])
    runpy.run_path(str(EXAMPLES / script), run_name="__main__")


@pytest.mark.parametrize(
    "script", ["lightly_simclr.py", "lightly_byol.py", "lightly_vicreg.py", "pytorch_simclr.py"]
)
def test_an_example_compares_bare_and_attached(
    script: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run(monkeypatch, script, *SMALL, "--out", str(tmp_path / "out"))
    printed = capsys.readouterr().out
    assert "bare whole" in printed
    assert "attached equivariant" in printed
    record = json.loads((tmp_path / "out" / "results.json").read_text())
    assert set(record["results"]) == {"bare", "attached"}
    picture = torchvision.io.read_image(str(tmp_path / "out" / "reconstructions.png"))
    assert picture.float().std() > 10
    with pytest.raises(SystemExit, match=r"holds another run; --overwrite"):
        run(monkeypatch, script, *SMALL, "--out", str(tmp_path / "out"))


def test_without_comparison_and_with_options(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    options = ["--no-compare", "--weight", "2", "--equivariant-dim", "32", "--out", str(out)]
    run(monkeypatch, "lightly_simclr.py", *SMALL, *options)
    record = json.loads((out / "results.json").read_text())
    assert set(record["results"]) == {"attached"}
    assert record["options"]["weight"] == "2.0"
    assert record["seconds"].keys() == {"attached"}
    run(monkeypatch, "lightly_simclr.py", *SMALL, *options, "--overwrite")


def pictures(folder: Path, splits: tuple[str, ...], classes: int, count: int) -> None:
    (images, _), _ = load("digits", 32, limit=max(8, count))
    for split in splits:
        for label in range(classes):
            (folder / split / f"class{label}").mkdir(parents=True)
            for i in range(count):
                path = folder / split / f"class{label}" / f"{i}.png"
                torchvision.io.write_png(images[i], str(path))


def test_a_folder_of_images_is_read_with_val_in_place_of_test(tmp_path: Path) -> None:
    pictures(tmp_path, ("train", "val"), classes=2, count=3)
    train, test = load(str(tmp_path), image_size=24)
    assert train[0].shape == test[0].shape == (6, 3, 24, 24)
    assert test[1].tolist() == [0, 0, 0, 1, 1, 1]


@pytest.mark.parametrize(
    ("splits", "classes", "count", "message"),
    [
        ((), 0, 0, "is not a folder"),
        (("train",), 2, 1, "has no val/"),
        (("train", "test"), 1, 1, "two or more class folders of images .* found 1"),
        (("train", "test"), 2, 0, "expected images in every class folder"),
    ],
)
def test_a_folder_that_cannot_be_used_is_named(
    tmp_path: Path, splits: tuple[str, ...], classes: int, count: int, message: str
) -> None:
    pictures(tmp_path / "data", splits, classes, count)
    with pytest.raises(SystemExit, match=message):
        load(str(tmp_path / "data"), image_size=32)
