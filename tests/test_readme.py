"""What the README says to run and to set is what there is."""

from __future__ import annotations

import inspect
import re
from pathlib import Path

from recon_aux import ReconAux
from recon_aux.engine.api import attach
from recon_aux.integrations.lightly import _WEIGHTS

ROOT = Path(__file__).parent.parent
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
    alone |= {"features", "views"}
    alone |= {"feature_dim", "spatial"}
    assert listed == taken - alone
    assert all(f"`{name}`" in table for name in alone - {"model", "options"})


def test_each_promise_names_its_test() -> None:
    promises = README.split("## What we promise")[1].split("\n## ")[0]
    lines = [line for line in promises.splitlines() if line.startswith("- ")]
    named = {name for line in lines for name in re.findall(r"`(test_\w+)", line)}
    assert len(lines) == 9
    assert all(re.search(r"\(`test_\w+", line) for line in lines)
    assert all((ROOT / "tests" / f"{name}.py").is_file() for name in named)


def test_the_default_weights_are_the_readmes() -> None:
    numbers = [f"{weight:g}" for weight in _WEIGHTS.values()]
    row = next(line for line in README.splitlines() if line.startswith("| `weight`"))
    assert re.findall(r"\d[\d.]*", row)[: len(numbers)] == numbers
