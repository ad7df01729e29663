"""Every example is a template: short, on its own, and it runs from a copy as it is."""

from __future__ import annotations

import ast
import importlib.metadata
import json
import runpy
import shutil
import sys
from contextlib import redirect_stdout
from functools import partial
from io import StringIO
from pathlib import Path

import pytest
import torchvision

from benchmarks import natural_images
from benchmarks.images import load
from helpers.running import call_example, rows, run_python
from recon_aux.probe import COMBINED, compare, probe

EXAMPLES = Path(__file__).parents[2] / "examples"
TEMPLATES = sorted(path.name for path in EXAMPLES.glob("*.py"))
PARTS = ["bare whole", *(f"attached {part}" for part in ("whole", "invariant", "equivariant"))]


def solo_learn_is_githubs() -> bool:
    """Whether solo-learn is installed, and is the version whose methods take a config."""
    try:
        return importlib.metadata.version("solo-learn") >= "1.0.6"
    except importlib.metadata.PackageNotFoundError:
        return False


def printed_alone(template: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """What a template prints that runs for an epoch, copied into an empty folder."""
    shutil.copy(EXAMPLES / template, folder)
    monkeypatch.chdir(folder)
    monkeypatch.setattr(sys, "argv", [template, "--epochs", "1"])
    # fewer images are probed, since that takes longer than the training
    for name, measure in (("compare", compare), ("probe", probe)):
        monkeypatch.setattr(f"recon_aux.probe.{name}", partial(measure, pairs=(300, 150)))
    with redirect_stdout(StringIO()) as printed:
        runpy.run_path(str(folder / template), run_name="__main__")
    return printed.getvalue()


def test_there_is_a_template_for_each_framework_and_method() -> None:
    methods = ("byol", "simclr", "vicreg")
    named = [f"{framework}_{m}.py" for framework in ("lightly", "solo") for m in methods]
    assert (
        sorted([*named, "lightly_train_simclr.py", "pytorch_simclr.py", "spt_simclr.py"])
        == TEMPLATES
    )


@pytest.mark.parametrize("template", TEMPLATES)
def test_a_template_is_short_and_imports_nothing_from_beside_it(template: str) -> None:
    text = (EXAMPLES / template).read_text()
    assert len(text.splitlines()) <= 70
    beside = {path.stem for path in EXAMPLES.iterdir()}
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import):
            assert not {name.name.split(".")[0] for name in node.names} & beside
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0
            assert str(node.module).split(".")[0] not in beside


# what the first one prints is compared with the study's numbers, see below
@pytest.mark.parametrize("template", [x for x in TEMPLATES if x != "lightly_simclr.py"])
def test_a_template_compares_bare_and_attached(
    template: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if template.startswith("solo") and not solo_learn_is_githubs():
        pytest.skip("solo-learn 1.0.6, from GitHub, is not installed")
    for prefix, package in {"lightly_train": "lightly_train", "spt": "stable_pretraining"}.items():
        if template.startswith(prefix):
            pytest.importorskip(package)
    head, *body = rows(printed_alone(template, tmp_path, monkeypatch))
    combined, alone = body[:4], body[5:]
    assert [row[0] for row in combined] == [row[0] for row in alone] == PARTS
    assert head[4:] == [name.replace("translation_", "t") for name in COMBINED]
    accuracies = [float(cell) for row in combined for cell in row[1:3]]
    assert 10 < min(accuracies) < max(accuracies) <= 100
    r2 = [float(cell) for row in (*combined, *alone) for cell in row[3:]]
    assert max(r2) <= 1
    # an epoch is enough to know something
    assert max(r2) > 0.5


def test_the_study_makes_the_numbers_of_the_first_template_and_keeps_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    arms, alone = ["SimCLR", "SimCLR, attached"], tmp_path / "alone"
    alone.mkdir()
    options = ["--views", "unflipped", "--image-size", "16", "--epochs", "1", "--device", "cpu"]
    options += ["--pairs", "300", "--seeds", "0", "--out", str(tmp_path), "--protocols"]
    call_example(natural_images.main, "--data", "digits=digits", *options, "--arms", *arms)
    runs = {
        run["arm"]: run for run in map(json.loads, (p.read_text() for p in tmp_path.glob("*.json")))
    }
    assert set(runs) == set(arms)
    printed = printed_alone("lightly_simclr.py", alone, monkeypatch)
    table = {row[0]: row[1:] for row in rows(printed)[:5]}
    for name, arm in (("bare", arms[0]), ("attached", arms[1])):
        for part, found in runs[arm]["results"].items():
            r2 = found["combined"].values()
            assert table[f"{name} {part}"] == [
                f"{found['linear']:.1f}",
                f"{found['knn']:.1f}",
                f"{sum(r2) / len(r2):.3f}",
                *(f"{value:.2f}" for value in r2),
            ]
    assert all(run["seconds"] > 0 for run in runs.values())
    (drawn,) = tmp_path.glob("*-0.png")
    assert torchvision.io.read_image(str(drawn)).float().std() > 10


def test_a_script_is_run_by_its_path() -> None:
    scripts = [path for path in EXAMPLES.rglob("*.py") if "def main()" in path.read_text()]
    assert len(scripts) > 5
    code = f"""
import runpy, sys
paths = [path for path in sys.path if path != {str(EXAMPLES)!r}]
for script in {[str(path) for path in scripts]!r}:
    for name in [name for name in sys.modules if name.startswith("benchmarks")]:
        del sys.modules[name]
    sys.path = [*paths]
    runpy.run_path(script)
"""
    result = run_python("-c", code)
    assert result.returncode == 0, result.stderr[-3000:]


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
