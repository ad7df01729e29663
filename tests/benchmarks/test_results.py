"""What the README's tables and the results' say was measured is what the runs' records say."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from itertools import takewhile
from pathlib import Path
from statistics import mean
from typing import Any

import pytest

from benchmarks import natural_images, pair_check
from benchmarks.records import kept, results_of
from benchmarks.views3d import compare
from helpers.running import rows

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "examples" / "results"
README = (ROOT / "README.md").read_text()


def made_of(folder: Path) -> str:
    """Make a folder's table anew."""
    if folder.name == "pair-check":
        return pair_check.table(kept(folder))
    make = natural_images.tables if folder.name.startswith("natural") else compare.table
    return make(kept(folder))


def first_table(text: str, after: str) -> list[list[str]]:
    """Read the first table of encoders after some words, which are in the text once."""
    (_, text) = text.split(after) if after else ("", text)
    lines = text[text.index("| encoder") :].splitlines()
    return rows("\n".join(takewhile(lambda line: line.startswith("|"), lines)))


@pytest.mark.parametrize(
    "folder", [p for p in RESULTS.iterdir() if p.is_dir()], ids=lambda p: p.name
)
def test_tables_are_made_of_the_records(folder: Path) -> None:
    assert rows((folder / "table.md").read_text()) == rows(made_of(folder))


def column(table: list[list[str]], name: str) -> list[str]:
    """Give the first column of a name, without its title."""
    index = table[0].index(name)
    return [row[index] for row in table[1:]]


@pytest.mark.parametrize(
    ("before", "folder", "title", "part"),
    [
        ("\nCIFAR-10:\n", "natural", "CIFAR-10: the whole feature", ""),
        ("\n50 classes of Tiny ImageNet:\n", "natural", "Tiny-ImageNet-50: the whole feature", ""),
        ("views3d/objects.jpg)", "views3d", "", ", whole"),
    ],
)
def test_the_readmes_tables_are_those_of_the_records(
    before: str, folder: str, title: str, part: str
) -> None:
    shown = first_table(README, after=before)
    head, *body = first_table(made_of(RESULTS / folder), after=title)
    # all encoders, in their order
    whole = [
        head,
        *([row[0].removesuffix(part), *row[1:]] for row in body if row[0].endswith(part)),
    ]
    assert len(shown) > 5
    for name in shown[0]:
        assert column(shown, name) == column(whole, name), name


def over_seeds(
    runs: list[dict[str, Any]], arm: str, value: Callable[[dict[str, Any]], float]
) -> float:
    """Mean over three seeds."""
    results = results_of(runs, arm)
    assert len(results) == 3
    return mean(value(result) for result in results)


@pytest.mark.parametrize("data", ["CIFAR-10", "Tiny-ImageNet-50"])
@pytest.mark.parametrize("method", ["SimCLR", "BYOL", "VICReg"])
def test_natural_images_meet_the_targets(data: str, method: str) -> None:
    runs = [run for run in kept(RESULTS / "natural") if run["data"] == data]

    def of(arm: str, part: str) -> tuple[float, float]:
        r2 = over_seeds(runs, arm, lambda found: natural_images.mean_r2(found[part]))
        return r2, over_seeds(runs, arm, lambda found: found[part]["linear"])

    bare, attached = of(method, "whole"), of(f"{method}, attached", "whole")
    assert attached[0] >= bare[0] + 0.15
    assert attached[1] > bare[1]
    assert of(f"{method}, attached", "equivariant")[0] > bare[0]


def whole(key: str, found: dict[str, Any]) -> float:
    """What the whole feature has of it."""
    value: float = found["whole"][key]
    return value


def test_objects_meet_the_targets() -> None:
    runs = kept(RESULTS / "views3d")
    accuracy, rotation, colour = (
        {
            arm: over_seeds(runs, arm, partial(whole, key))
            for arm in ("VICReg", "SIE", "VICReg + recon_aux")
        }
        for key in ("accuracy", "rotation mlp", "color mlp")
    )
    ours = "VICReg + recon_aux"
    assert accuracy[ours] >= accuracy["VICReg"] - 0.5
    assert rotation[ours] >= rotation["SIE"] - 0.02
    assert rotation[ours] >= rotation["VICReg"] + 0.15
    assert colour[ours] >= colour["SIE"]


def test_objects_meet_the_rotation_target_with_more_seeds_too() -> None:
    runs = kept(RESULTS / "views3d-more-seeds")
    assert {run["seed"] for run in runs} == {3, 4, 5}
    ours, told = (
        over_seeds(runs, arm, lambda found: found["whole"]["rotation mlp"])
        for arm in ("VICReg + recon_aux", "SIE")
    )
    assert ours >= told - 0.02


def test_the_readmes_ablations_are_those_of_the_records() -> None:
    names = {
        "bare": "SimCLR",
        "attached, as shipped": "SimCLR, attached",
        "no split (`equivariant_dim=0`)": "equivariant_dim=0",
        "split alone (`weight=1e-12`)": "weight=1e-12",
        "task alone (`weight=1000`, next to nothing of SimCLR's loss)": "weight=1000",
        "`target_size=16`: all terms see 16×16 pixels": "target_size=16",
        "all three 0, `weight=4`: reconstruction alone": (
            "registration=0, statistics=0, edges=0, weight=4"
        ),
    }
    runs = {run["arm"]: run["results"]["whole"] for run in kept(RESULTS / "natural-ablations")}
    _, text = README.split("**What matters**")
    _, *shown = rows(
        "\n".join(line.strip() for line in text.split("The split brings")[0].splitlines())
    )
    assert len(shown) == 10
    for row in shown:
        name = names.get(row[0].strip("*"), row[0].strip("`"))
        found = runs[name if name.startswith("SimCLR") else f"SimCLR, attached, {name}"]
        r2 = found["combined"]
        told = [found["linear"], found["1 % of labels"], found["10 % of labels"]]
        pair = {key: f"{r2[key]:.2f}" for key in r2}
        assert row[1:] == [
            *(f"{value:.1f}" for value in told),
            f"{natural_images.mean_r2(found):.3f}",
            pair["rotation"],
            f"{pair['translation_x']}, {pair['translation_y']}",
            pair["scale"],
            pair["contrast"],
            f"{pair['saturation']}, {pair['hue']}",
        ], row[0]


def test_the_readmes_costs_are_those_of_the_records() -> None:
    found = {}
    for run in json.loads((RESULTS / "overhead.json").read_text()):
        case, got = run["case"], run["results"]
        ratios = (
            f"{time['ratio']:.2f} ({time['least']:.2f} to {time['most']:.2f})"
            for time in (got["time"]["Lightning"], got["time"]["own loop"])
        )
        found[f"{case['model']} px, {case['method']}"] = [
            f"{got['time']['own loop']['bare ms']:.0f}",
            *ratios,
            f"{got['bare MiB']:.0f} → {got['attached MiB']:.0f}",
            f"{got['inference']:.2f}, {'the same' if got['same operations'] else 'others'}",
        ]
    lines = [row for row in rows(README) if row[0] in found]
    assert len(lines) == 6
    assert {row[0]: row[1:] for row in lines} == found


def test_the_first_screens_figures_are_of_the_digits_record() -> None:
    parts = json.loads((RESULTS / "digits.json").read_text())["results"]
    attached, bare = (parts[arm]["whole"] for arm in ("attached", "bare"))
    text = README.split("```bash")[0].split("```python")[1]
    for name in ("rotation", "brightness", "hue"):
        told = f"{name} {attached['combined'][name]:.2f} instead of {bare['combined'][name]:.2f}"
        assert told in text
    means = [natural_images.mean_r2(part) for part in (attached, bare)]
    assert "mean R² of {:.2f} instead of {:.2f}".format(*means) in text
    assert f"{attached['linear']:.1f} % instead of {bare['linear']:.1f} %" in text


def test_the_table_of_the_pair_check_is_that_of_the_records() -> None:
    _, text = (ROOT / "docs" / "results.md").read_text().split("## Are the two views of the same")
    assert rows(text.split("\n## ")[0]) == rows(made_of(RESULTS / "pair-check"))


def test_the_pair_check_has_no_false_alarm_and_misses_hardly_any() -> None:
    runs = kept(RESULTS / "pair-check")
    found = [sizes for run in runs for name in run["results"].values() for sizes in name.values()]
    assert sum(sizes["paired"]["runs"] for sizes in found) >= 9_000
    assert sum(sizes["paired"]["reported"] for sizes in found) == 0
    wrong = [sizes[kind] for sizes in found for kind in pair_check.WRONG]
    assert sum(kind["reported"] for kind in wrong) > 0.99 * sum(kind["runs"] for kind in wrong)
