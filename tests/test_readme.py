"""What the README says to run and to set is what there is."""

from __future__ import annotations

import inspect
import re

from lightly.loss import NegativeCosineSimilarity, NTXentLoss, VICRegLoss

from helpers.models import Siamese
from helpers.running import ROOT
from recon_aux import ReconAux, attach
from recon_aux.integrations import lightly

README = (ROOT / "README.md").read_text()


def test_ci_runs_the_readmes_test_command() -> None:
    commands = re.findall(r"^python3 -m venv .*$", README, re.MULTILINE)
    assert len(commands) == 2
    assert commands[1] in (ROOT / ".ci" / "run").read_text().splitlines()


def test_every_option_is_in_the_readme_and_nothing_else() -> None:
    table = README.split("## Options")[1].split("## Results")[0]
    listed = {
        name
        for row in re.findall(r"^\| (`.*?) \|", table, re.MULTILINE)
        for name in re.findall(r"`(\w+)`", row)
    }
    taken = {*inspect.signature(ReconAux).parameters, *inspect.signature(attach).parameters}
    alone = {"model", "options", "backbone", "backbone_method", "heads", "image_size"}
    alone |= {"features", "views", "interleaved", "example_input", "momentum_encoders"}
    alone |= {"step_method", "feature_dim", "spatial"}
    assert listed == taken - alone
    assert all(f"`{name}`" in table for name in alone - {"model", "options"})


def test_the_readme_has_the_options_defaults() -> None:
    table = README.split("## Options")[1].split("## Results")[0]
    parameters = inspect.signature(ReconAux).parameters
    for row in re.findall(r"^\| (`.*?) \| (.*?) \|", table, re.MULTILINE):
        names = re.findall(r"`(\w+)`", row[0])
        # what is None by default is found elsewhere, which words say
        known = [
            name for name in names if getattr(parameters.get(name), "default", None) is not None
        ]
        for name in known:
            default = parameters[name].default
            text = f"{default:g}" if isinstance(default, float) else str(default)
            assert re.search(rf"(?<![\w.]){re.escape(text)}(?![\w.])", row[1]), name


def test_each_promise_names_its_test() -> None:
    promises = README.split("## What we promise")[1].split("\n## ")[0]
    lines = [line for line in promises.splitlines() if line.startswith("- ")]
    named = {name for line in lines for name in re.findall(r"`(test_\w+)", line)}
    assert len(lines) == 9
    assert all(re.search(r"\(`test_\w+", line) for line in lines)
    there = {path.stem for path in (ROOT / "tests").rglob("test_*.py")}
    assert named <= there


def test_the_default_weights_are_the_readmes() -> None:
    row = next(line for line in README.splitlines() if line.startswith("| `weight`"))
    weights = []
    for loss in (NTXentLoss(), VICRegLoss(), NegativeCosineSimilarity()):
        model = Siamese()
        model.criterion = loss
        weights.append(f"{lightly.attach(model).recon_aux.options['weight']:g}")
    assert re.findall(r"\d[\d.]*", row)[:3] == weights
