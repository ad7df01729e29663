"""What the pages' tables and the results' say was measured is what the runs' records say."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from itertools import takewhile
from pathlib import Path
from statistics import mean
from typing import Any

import pytest

from benchmarks import curves, decoders, field, frozen, homography, natural_images, pair_check
from benchmarks.records import kept, results_of
from benchmarks.views3d import compare
from helpers.pages import text_of
from helpers.running import rows

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "examples" / "results"


def made_of(folder: Path) -> str:
    """Make a folder's table anew."""
    if folder.name in ("curves", "pair-check"):
        return {"curves": curves, "pair-check": pair_check}[folder.name].table(kept(folder))
    if folder.name.startswith(("decoders", "homography")):
        return frozen.table(kept(folder))
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
    ("page", "before", "folder", "title", "part"),
    [
        ("natural_images", "\nCIFAR-10:\n", "natural", "CIFAR-10: the whole feature", ""),
        (
            "natural_images",
            "\n50 classes of Tiny ImageNet:\n",
            "natural",
            "Tiny-ImageNet-50: the whole feature",
            "",
        ),
        ("objects", "views3d/objects.jpg)", "views3d", "", ", whole"),
    ],
)
def test_the_pages_tables_are_those_of_the_records(
    page: str, before: str, folder: str, title: str, part: str
) -> None:
    shown = first_table(text_of(page), after=before)
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


def test_long_training_meets_the_targets_and_the_page_shows_it() -> None:
    runs = kept(RESULTS / "natural-long")
    shown = first_table(text_of("natural_images"), after="## Long training")
    expected = []
    for method in dict.fromkeys(run["arm"].removesuffix(", attached") for run in runs):
        bare, attached = (
            {name: of(results_of(runs, arm)[0]["whole"]) for name, of in field.MEASURES.items()}
            for arm in (method, f"{method}, attached")
        )
        assert attached["linear %"] >= bare["linear %"] + 2
        assert attached["R² all at once"] >= bare["R² all at once"] + 0.25
        for name in ("R² unseen", "R² unseen, all at once"):
            assert attached[name] >= bare[name] + 0.15
    for arm in dict.fromkeys(run["arm"] for run in runs):
        (found,) = results_of(runs, arm)
        linear, *r2 = (of(found["whole"]) for of in field.MEASURES.values())
        cells = [f"{linear:.1f}", f"{found['whole']['knn']:.1f}", *(f"{x:.3f}" for x in r2)]
        expected.append([arm, *cells])
    assert shown[0] == ["encoder", "linear %", "k-NN %", *list(field.MEASURES)[1:]]
    assert sorted(shown[1:]) == sorted(expected)


FIELD = kept(RESULTS / "natural-field")


@pytest.mark.parametrize("data", dict.fromkeys(run["data"] for run in FIELD))
def test_in_both_protocols_attached_is_ahead_and_the_page_shows_it(data: str) -> None:
    found = {run["arm"]: run["results"]["whole"] for run in FIELD if run["data"] == data}
    _, named = Path(field.__file__).with_suffix(".args").read_text().split("--arms\n")
    assert sorted(found) == sorted(named.splitlines())
    # SimCLR's is above all arms, VICReg's above VICReg's, which SIE is by itself
    rivals = {"SimCLR": found.keys(), "VICReg": [x for x in found if x.startswith(("V", "SIE"))]}
    for method, arms in rivals.items():
        ours = f"{method}, attached"
        attached, bare = found[ours], found[method]
        for name, of in field.MEASURES.items():
            others = [of(found[arm]) for arm in arms if arm not in (ours, "ceiling")]
            assert of(attached) > max(others), name
        assert field.MEASURES["R² unseen"](attached) >= field.MEASURES["R² unseen"](bare) + 0.15
    section = text_of("comparisons")
    heading = {"CIFAR-10": "CIFAR-10"}.get(data, "50 classes of Tiny ImageNet")
    shown = first_table(section, after=f"\n{heading}, all encoders:\n")
    whole_table = first_table(
        (RESULTS / "natural-field" / "table.md").read_text(),
        after=f"{data}: all encoders, one transformation at a time and all at once",
    )
    assert len(shown) == len(found) + 1
    for name in shown[0]:
        assert column(shown, name) == column(whole_table, name), name


def test_the_pages_gains_of_unseen_transformations_are_those_of_the_records() -> None:
    _, text = text_of("comparisons").split("## What the unseen transformations gain")
    head, *shown = rows(text.split("\n- ")[0])
    found = {(run["data"], run["arm"]): run["results"]["whole"]["unseen"] for run in FIELD}
    for row in shown:
        method, label = row[0].split(", ")
        data = {"Tiny ImageNet": "Tiny-ImageNet-50"}.get(label, label)
        bare, attached = (found[data, arm] for arm in (method, f"{method}, attached"))
        gains = {k: attached["alone"][k] - r2 for k, r2 in bare["alone"].items()}
        assert head[1:] == list(gains)
        assert row[1:] == [f"{gain:.2f}".replace("-", "−") for gain in gains.values()]
        # what the page says about them
        assert gains["shear"] + gains["perspective"] > 0.6 * sum(gains.values())
        assert gains["upside down"] < 0.03
        assert attached["combined"]["occluder_y"] < bare["combined"]["occluder_y"]
    assert len(shown) == 4


def test_the_page_says_how_gains_change_with_training() -> None:
    folders = {"natural-field": "10,000", "natural-all-images": "50,000", "natural-long": "50,000"}
    expected = [["training", "linear", "k-NN", "mean R²"]]
    for folder, images in folders.items():
        found = {run["arm"]: run for run in kept(RESULTS / folder) if run["data"] == "CIFAR-10"}
        bare, attached = (found[arm] for arm in ("SimCLR", "SimCLR, attached"))
        was, now = (run["results"]["whole"] for run in (bare, attached))
        row = [f"{bare['options']['epochs']} epochs of {images} images"]
        row += [f"{now[key] - was[key]:.1f}" for key in ("linear", "knn")]
        gain = field.MEASURES["R² all at once"](now) - field.MEASURES["R² all at once"](was)
        expected.append([*row, f"{gain:.2f}"])
    _, text = text_of("natural_images").split("the gain in accuracy doesn't")
    assert rows(text.split("\n- ")[0]) == expected


def test_the_pages_tuning_is_that_of_the_records() -> None:
    runs = {run["arm"]: run["results"]["whole"] for run in kept(RESULTS / "natural-tune")}
    shown = first_table(text_of("comparisons"), after="## How the weights were tuned")
    names = ["linear %", "R² one at a time", "R² all at once"]
    assert shown == [
        ["encoder", *names],
        *(
            [
                arm,
                *(f"{field.MEASURES[x](of):.{y}f}" for x, y in zip(names, (1, 3, 3), strict=True)),
            ]
            for arm, of in runs.items()
        ),
    ]


def test_the_pages_corner_errors_are_those_of_the_records() -> None:
    runs = kept(RESULTS / "homography")
    errors = {run["arm"]: run["results"][homography.ERROR] for run in runs}
    nothing = {f"{run['results'][homography.MEANS]:.2f}" for run in runs}
    _, *shown = first_table(text_of("comparisons"), after="## A task that needs it")
    assert shown[0] == ["none: the mean prediction", *nothing]
    assert shown[1:] == [[arm, f"{error:.2f}"] for arm, error in errors.items()]
    assert errors["SimCLR, attached"] < errors["SimCLR"] - 1
    runs = kept(RESULTS / "homography-field")
    errors = {run["arm"]: run["results"][homography.ERROR] for run in runs}
    _, *shown = first_table(text_of("comparisons"), after="The same for CIFAR-10's encoders of")
    assert sorted(shown) == sorted([arm, f"{error:.2f}"] for arm, error in errors.items())
    attached = {f"{method}, attached" for method in ("SimCLR", "VICReg")}
    others = [error for arm, error in errors.items() if arm not in attached]
    assert max(errors[arm] for arm in attached) < min(others)


def test_the_pages_decoders_are_those_of_the_record() -> None:
    (run,) = kept(RESULTS / "decoders")
    shown = rows(text_of("ablations").split("is worth to the decoder")[1])
    assert shown[1][1:] == [f"{run['results'][context]:.2f}" for context in decoders.CONTEXTS]


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


def test_the_pages_ablations_are_those_of_the_records() -> None:
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
    _, text = text_of("ablations").split("## The terms and the split")
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


def test_the_pages_costs_are_those_of_the_records() -> None:
    found = {}
    records = ("overhead.json", "overhead-tiny.json")
    runs = [run for name in records for run in json.loads((RESULTS / name).read_text())]
    for run in runs:
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
    lines = [row for row in rows(text_of("costs")) if row[0] in found]
    assert len(lines) == 9
    assert {row[0]: row[1:] for row in lines} == found


def test_the_pages_flops_are_those_of_the_records() -> None:
    found = [run["results"]["FLOPs"] for run in json.loads((RESULTS / "flops.json").read_text())]
    row = next(row for row in rows(text_of("costs")) if row[0] == "FLOPs")
    assert len(row) == 6
    assert [float(cell) for cell in row[1:]] == [
        pytest.approx(ratio, abs=0.5 * 10 ** -len(cell.split(".")[1]))
        for ratio, cell in zip(found, row[1:], strict=True)
    ]


def test_the_pages_costs_on_a_gpu_are_those_of_the_record() -> None:
    time = json.loads((RESULTS / "overhead-h200.json").read_text())[0]["results"]["time"]
    shown = {row[0]: row[1] for row in rows(text_of("costs")) if len(row) == 2}
    for name, loop in (("Lightning's", "Lightning"), ("a loop of our own", "own loop")):
        found = time[loop]
        ratio = f"{found['ratio']:.2f} ({found['least']:.2f} to {found['most']:.2f})"
        assert shown[name] == ratio


def test_the_weights_to_choose_from_are_those_of_the_records() -> None:
    runs = {
        run["arm"].removeprefix("SimCLR, attached, "): run["results"]["whole"]
        for folder in ("natural-ablations", "natural-more")
        for run in kept(RESULTS / folder)
    }
    names = {"bare, not attached": "SimCLR", "1": "SimCLR, attached"}
    _, *shown = rows(text_of("choosing").split("seed 0 ([setting]")[1].split("\n## ")[0])
    assert len(shown) == 6
    for name, *told in shown:
        found = runs[names.get(name, f"weight={name}")]
        assert told == [f"{found['linear']:.1f}", f"{natural_images.mean_r2(found):.3f}"], name


def test_the_pair_check_has_no_false_alarm_and_misses_hardly_any() -> None:
    runs = kept(RESULTS / "pair-check")
    found = [sizes for run in runs for name in run["results"].values() for sizes in name.values()]
    right = [sizes["paired"] for sizes in found]
    wrong = [sizes[kind] for sizes in found for kind in pair_check.WRONG]
    counts = [sum(kind["runs"] for kind in kinds) for kinds in (right, wrong)]
    assert [kind["reported"] for kind in right] == [0] * len(right)
    assert sum(kind["reported"] for kind in wrong) == counts[1] - 1
    told = (
        "None of {:,} runs with correct pairs was reported. Of {:,} runs with wrong pairs, all but"
    )
    assert told.format(*counts) in text_of("pair_check")
