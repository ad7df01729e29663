"""The README is short, its commands are CI's, and its numbers are in a record."""

from __future__ import annotations

import json
import re
from statistics import mean
from typing import Any

import pytest

from helpers.pages import README as PATH
from helpers.pages import blocks, links
from helpers.running import ROOT, rows

README = PATH.read_text()
RESULTS = ROOT / "examples" / "results"
HOSTS = ("lightly", "solo-learn", "stable-pretraining", "LightlyTrain", "TorchGeo")


def record(name: str) -> Any:
    return json.loads((RESULTS / name).read_text())


# --- its form; test_docs counts the words of its sentences ---


def test_it_is_short() -> None:
    assert len(README.splitlines()) <= 220


def test_its_first_screen_is_the_product() -> None:
    first = README.split("\n## ")[0]
    assert len(first.splitlines()) <= 50
    assert "![" in first
    assert "model = attach(SimCLR())  # the one line" in first
    assert len(blocks(first, "bash")) == 2
    assert all(f"**{host}**" in first for host in HOSTS)


def test_it_has_a_snippet_for_each_host_and_six_options() -> None:
    use = README.split("\n## Use it\n")[1].split("\n## ")[0]
    sections = use.split("\n### ")[1:]
    assert [section.splitlines()[0] for section in sections] == [*HOSTS, "Your own loop"]
    assert all(len(blocks(section, "python")) == 1 for section in sections)
    options = README.split("\n## Options\n")[1].split("\n## ")[0]
    assert len(rows(options)) == 1 + 6


def test_ci_runs_its_test_command() -> None:
    commands = re.findall(r"^python3 -m venv .*$", README, re.MULTILINE)
    assert len(commands) == 2
    assert commands[1] in (ROOT / ".ci" / "run").read_text().splitlines()


def test_its_pictures_say_in_words_what_they_show() -> None:
    # PyPI has no files beside the README
    pictures = re.findall(r"!\[([^\]]*)\]", README)
    assert len(pictures) == 2
    assert all(len(text.split()) >= 20 for text in pictures)
    assert not [link for link in links(README) if link.startswith(("http:", "/"))]


# --- its numbers ---


def over_seeds(data: str, arm: str, value: str) -> float:
    runs = [record(f"natural/{data}-{arm.replace(', ', '-')}-{seed}.json") for seed in range(3)]
    whole = [run["results"]["whole"] for run in runs]
    if value == "linear":
        return mean(one["linear"] for one in whole)
    return mean(mean(one["combined"].values()) for one in whole)


def test_its_table_is_of_the_records() -> None:
    table = README.split("\n## Results\n")[1].split("\n- ")[0]
    _, *shown = rows(table.replace("**", ""))
    assert len(shown) == 6
    for row in shown:
        expected = [
            form.format(over_seeds(data, row[0], value))
            for data in ("CIFAR-10", "Tiny-ImageNet-50")
            for value, form in (("linear", "{:.1f}"), ("combined", "{:.3f}"))
        ]
        assert row[1:] == expected, row[0]


def test_its_first_commands_numbers_are_of_the_record() -> None:
    parts = record("digits.json")["results"]
    attached, bare = (parts[arm]["whole"] for arm in ("attached", "bare"))
    for name in ("rotation", "brightness", "hue"):
        pair = attached["combined"][name], bare["combined"][name]
        assert "{} {:.2f} instead of {:.2f}".format(name, *pair) in README
    assert f"{attached['linear']:.1f} % instead of {bare['linear']:.1f} %" in README
    start = (ROOT / "docs" / "index.md").read_text()
    means = [mean(one["combined"].values()) for one in (attached, bare)]
    assert "mean R² is {:.2f} instead of {:.2f}".format(*means) in start
    assert f"{attached['linear']:.1f} % instead of {bare['linear']:.1f} %" in start


@pytest.mark.parametrize("arm", ["VICReg + recon_aux", "SIE", "VICReg"])
def test_its_rotations_are_of_the_records(arm: str) -> None:
    found = [json.loads(path.read_text()) for path in (RESULTS / "views3d").glob("*.json")]
    mine = [run["results"]["whole"]["rotation mlp"] for run in found if run["arm"] == arm]
    assert len(mine) == 3
    objects = README.split("- **Objects in 3D.**")[1].split("\n- ")[0]
    assert f"{mean(mine):.3f}" in objects


def test_its_costs_are_of_the_records() -> None:
    cost = README.split("- **Cost.**")[1].split("\n\n")[0]
    (flops,) = (
        x["results"] for x in record("flops.json") if x["case"]["model"] == "ResNet-50, 224"
    )
    assert f"{flops['FLOPs']:.4f} times the FLOPs" in cost
    time = record("overhead-h200.json")[0]["results"]["time"]
    ratios = sorted(loop["ratio"] for loop in time.values())
    assert "{:.2f} to {:.2f} times as long".format(*ratios) in cost
