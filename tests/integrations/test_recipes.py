"""Every recipe is short, stands alone, and trains every weight of the model and the decoder."""

from __future__ import annotations

import ast
import importlib
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.cli import LightningCLI
from torch import Tensor

import recon_aux
from helpers.running import ROOT, rows, run_python
from helpers.weights import assert_same, weights_of
from recipes import lightning_cli
from recon_aux.integrations.lightly import attach

pytestmark = pytest.mark.slow

FOLDER = ROOT / "examples" / "recipes"
RECIPES = sorted(path.stem for path in FOLDER.glob("*.py") if path.stem != "__init__")


@pytest.fixture(autouse=True)
def in_an_empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Trainers write their logs into the folder that they run in."""
    monkeypatch.chdir(tmp_path)


def assert_all_changed(model: Any, before: dict[str, Tensor]) -> None:
    now = {name: weight.cpu() for name, weight in weights_of(model).items()}
    assert now.keys() == before.keys()
    assert any(name.startswith("recon_aux.") for name in now)
    assert [name for name, weight in now.items() if torch.equal(weight, before[name].cpu())] == []


@pytest.mark.parametrize("name", [name for name in RECIPES if name != "lightning_cli"])
def test_a_recipe_trains_every_weight(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = importlib.import_module(f"recipes.{name}")
    if name == "monitored":
        # four steps, and the monitor's 300 images
        x, y = recipe.load_digits(return_X_y=True)
        monkeypatch.setattr(recipe, "load_digits", lambda **_: (x[:556], y[:556]))
    model = recipe.build()
    before = weights_of(model)
    recipe.train(model)
    assert_all_changed(model, before)


# --- LightningCLI: three places for the one line ---


class Bare(lightning_cli.SimCLR):
    def __init__(self) -> None:
        super().__init__()
        recon_aux.detach(self)


class InSetup(Bare):
    def setup(self, stage: str) -> None:
        if not recon_aux.is_attached(self):
            attach(self)


class InConfigureModel(Bare):
    def configure_model(self) -> None:
        if not recon_aux.is_attached(self):
            attach(self)


class WeightsAtTheStart(Callback):
    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        self.weights = weights_of(pl_module)


@pytest.mark.parametrize("model", [lightning_cli.SimCLR, InSetup, InConfigureModel])
def test_a_module_of_lightnings_cli_attaches_to_itself_and_resumes(model: Any) -> None:
    def fit(*args: str) -> tuple[Any, WeightsAtTheStart]:
        start = WeightsAtTheStart()
        options: Any = {"callbacks": [start], "accelerator": "cpu"}
        images = lightning_cli.Images
        return LightningCLI(model, images, trainer_defaults=options, args=["fit", *args]), start

    cli, start = fit("--trainer.max_epochs=1")
    assert_all_changed(cli.model, start.weights)
    saved = cli.trainer.checkpoint_callback.best_model_path
    resumed, start = fit("--trainer.max_epochs=2", f"--ckpt_path={saved}")
    assert_same(start.weights, weights_of(cli.model))
    assert_all_changed(resumed.model, start.weights)


def test_the_cli_runs_as_a_script(tmp_path: Path) -> None:
    script = FOLDER / "lightning_cli.py"
    result = run_python(script, "fit", "--trainer.fast_dev_run=true", folder=tmp_path)
    assert result.returncode == 0, result.stderr[-3000:]


# --- what they look like ---


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_is_short_and_imports_nothing_from_beside_it(name: str) -> None:
    text = (FOLDER / f"{name}.py").read_text()
    assert len(text.splitlines()) < 50
    assert "# your own " in text
    imported = {
        str(node.module).split(".")[0] if isinstance(node, ast.ImportFrom) else node.names[0].name
        for node in ast.walk(ast.parse(text))
        if isinstance(node, (ast.Import, ast.ImportFrom))
    }
    # run as a script, it would be found in place of a package of its name
    assert not imported & {"recipes", *RECIPES}


def test_the_page_lists_every_recipe_and_its_line() -> None:
    page = (ROOT / "docs" / "recipes.md").read_text()
    _, *listed = rows(page)
    files = {row[2].split("](")[1].rstrip(")"): row[1].strip("`") for row in listed}
    assert sorted(files) == [f"../examples/recipes/{name}.py" for name in RECIPES]
    for file, line in files.items():
        assert line in (ROOT / "docs" / file).read_text(), file
