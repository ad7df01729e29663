"""The README is short, its commands are CI's, and its numbers are in a record."""

from __future__ import annotations

import json
import re
from statistics import mean
from typing import Any

import pytest

from benchmarks.records import file_name
from benchmarks.rivals import RIVALS
from helpers.pages import README as PATH
from helpers.pages import blocks, links
from helpers.running import ROOT, rows

README = PATH.read_text()
RESULTS = ROOT / "examples" / "results"
ARMS = [method + kind for method in ("SimCLR", "BYOL", "VICReg") for kind in ("", ", attached")]
RESNET50 = "ResNet-50, 224"
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


def row_of(arm: str) -> list[str]:
    return [
        form.format(over_seeds(data, arm, value))
        for data in ("CIFAR-10", "Tiny-ImageNet-50")
        for value, form in (("linear", "{:.1f}"), ("combined", "{:.3f}"))
    ]


def test_its_table_is_of_the_records() -> None:
    table = README.split("\n## Results\n")[1].split("\n- ")[0]
    _, *shown = rows(table.replace("**", ""))
    assert [row[0] for row in shown] == ARMS
    for row in shown:
        assert row[1:] == row_of(row[0]), row[0]


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


def long_training(method: str) -> list[str]:
    """The numbers of the long training, as the README writes them: bare, then attached."""
    runs = [record(f"natural-long/CIFAR-10-{method}{arm}-0.json") for arm in ("", "-attached")]
    found = []
    for whole in (run["results"]["whole"] for run in runs):
        found += [f"{whole['linear']:.1f}", f"{mean(whole['combined'].values()):.3f}"]
    return found


def test_its_long_training_is_of_the_records() -> None:
    longer = README.split("- **Longer training")[1].split("\n- ")[0]
    simclr, byol, vicreg = map(long_training, ("SimCLR", "BYOL", "VICReg"))
    assert "SimCLR has {} % and {}. Attached it has {} % and {}".format(*simclr) in longer
    assert "BYOL has {} % and {}, and attached {} % and {}".format(*byol) in longer
    assert "VICReg has {} % and {}, and attached {} % and {}".format(*vicreg) in longer
    setting = record("natural-long/CIFAR-10-SimCLR-0.json")["options"]
    assert f"After {setting['epochs']} epochs on all 50,000 images" in longer
    assert setting["limit"] == "None"


def beside_rivals() -> tuple[list[str], str]:
    """Mean R² as papers measure it: attached, by the paper alone, by the best rival; its name."""
    found = {}
    for arm in ("SimCLR, attached", "SimCLR, attached, preset='paper'", *RIVALS):
        run = record(f"natural-field/{file_name(data='CIFAR-10', arm=arm, seed=0)}.json")
        found[arm] = mean(run["results"]["whole"]["paper"]["alone"].values())
    ours, papers, *rivals = found.values()
    best = max(RIVALS, key=found.__getitem__)
    return [f"{r2:.3f}" for r2 in (ours, papers, max(rivals))], best


def test_its_rivals_are_of_the_records() -> None:
    line = README.split("- **Beside rivals.**")[1].split("\n- ")[0]
    numbers, best = beside_rivals()
    assert re.findall(r"\d\.\d{3}", line) == numbers
    assert best == "SimCLR + AugSelf"
    assert "AugSelf, which is given every change" in line


ROTATED = ["VICReg + recon_aux", "SIE", "VICReg"]


def rotation_of(arm: str) -> float:
    found = [json.loads(path.read_text()) for path in (RESULTS / "views3d").glob("*.json")]
    mine = [run["results"]["whole"]["rotation mlp"] for run in found if run["arm"] == arm]
    assert len(mine) == 3
    return mean(mine)


@pytest.mark.parametrize("arm", ROTATED)
def test_its_rotations_are_of_the_records(arm: str) -> None:
    objects = README.split("- **Objects in 3D.**")[1].split("\n- ")[0]
    assert f"{rotation_of(arm):.3f}" in objects


def flops_of_resnet50() -> float:
    (found,) = (x["results"] for x in record("flops.json") if x["case"]["model"] == RESNET50)
    return float(found["FLOPs"])


def times_on_a_gpu() -> list[float]:
    time = record("overhead-h200.json")[0]["results"]["time"]
    return sorted(loop["ratio"] for loop in time.values())


def test_its_costs_are_of_the_records() -> None:
    cost = README.split("- **Cost.**")[1].split("\n\n")[0]
    assert f"{flops_of_resnet50():.4f} times the FLOPs" in cost
    assert "{:.2f} to {:.2f} times as long".format(*times_on_a_gpu()) in cost


# --- no other numbers ---

NO_RESULTS = [
    r"Python 3\.10( or later)?",
    r"torch 2\.6",
    r"2 CPU cores",
    r"1 is perfect\. 0 is no better",
    r"\(2024\)",
    # of a picture, and test_docs compares the options with the code
    r"view [12]",
    r"(?s)\| option \|.*?\n\n",
]
"""What has numbers that nobody measured."""


def numbers_in(text: str) -> list[str]:
    """The numbers in prose and tables, but those of code, of links and of :data:`NO_RESULTS`."""
    for left_out in (r"(?ms)^```.*?^```$", r"`[^`\n]*`", r"\]\([^)\s]*\)", *NO_RESULTS):
        text = re.sub(left_out, " ", text)
    # 3D and ResNet-50 are names
    return re.findall(r"(?<![\w.-])\d+(?:[.,]\d+)*(?!\w)", text)


def measured() -> set[str]:
    """All numbers of the records that the README may have, as it writes them."""
    digits, natural = record("digits.json"), record("natural/Tiny-ImageNet-50-SimCLR-0.json")
    found = {cell for arm in ARMS for cell in row_of(arm)}
    for arm in ("attached", "bare"):
        whole = digits["results"][arm]["whole"]
        found |= {f"{whole['linear']:.1f}", *(f"{r2:.2f}" for r2 in whole["combined"].values())}
    found |= {f"{sum(digits['seconds'].values()) / 60:.0f}", digits["options"]["seed"]}
    setting = natural["options"]
    found |= {f"{int(setting['limit']):,}", setting["epochs"], natural["data"].split("-")[-1]}
    # CIFAR-10's train images
    found |= {
        *long_training("SimCLR"),
        *long_training("BYOL"),
        *long_training("VICReg"),
        record("natural-long/CIFAR-10-SimCLR-0.json")["options"]["epochs"],
    }
    found |= {"50,000"}
    found |= {*beside_rivals()[0]} | {f"{rotation_of(arm):.3f}" for arm in ROTATED}
    found |= {f"{flops_of_resnet50():.4f}", *(f"{ratio:.2f}" for ratio in times_on_a_gpu())}
    return found


def test_every_number_is_of_a_record() -> None:
    found, known = numbers_in(README), measured()
    assert len(found) > 40
    assert [number for number in found if number not in known] == []


def test_numbers_are_seen() -> None:
    text = "| 46.8 | **0.3** |, 3D, ResNet-50 `1` [2](x3.md): 10,000 of 8. Python 3.10, torch 2.7\n"
    assert numbers_in(text) == ["46.8", "0.3", "2", "10,000", "8", "2.7"]
