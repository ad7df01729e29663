"""Good and bad runs: a small version, and what the kept ones show."""

from __future__ import annotations

from pathlib import Path
from statistics import median

import pytest

from benchmarks import curves
from benchmarks.records import kept
from helpers.pages import text_of
from helpers.running import ROOT, call_example, rows

OPTIONS = ["--limit", "64", "--batch-size", "16", "--image-size", "16", "--device", "cpu"]
OPTIONS += ["--steps", "11", "--every", "11"]
BAD = {"learning rate too high": "runs away", "views of other images": "of the same images"}


@pytest.mark.slow
def test_runs_are_trained_measured_and_drawn(tmp_path: Path) -> None:
    arms = [curves.BARE, curves.GOOD[0], *BAD]
    printed = call_example(curves.main, "--out", tmp_path, *OPTIONS, "--arms", *arms)
    runs = {run["arm"]: run for run in kept(tmp_path)}
    assert set(runs) == set(arms)
    assert rows((tmp_path / "table.md").read_text()) == rows(curves.table(kept(tmp_path)))
    assert [row[0] for row in rows(printed)[1:]] == [name for name in curves.RUNS if name in arms]
    assert (tmp_path / "table.png").is_file()
    assert "recon_aux" not in runs[curves.BARE]
    for name, run in runs.items():
        found = run["results"]["curves"]
        assert [step for step, _ in found["monitor/whole/knn"]] == [0, 11], name
        assert ("recon_aux/loss" in found) == (name != curves.BARE)
    good = runs[curves.GOOD[0]]["results"]
    assert [step for step, _ in good["curves"]["recon_aux/share"]] == [1, 6, 11]
    assert good["warnings"] == []
    for name, words in BAD.items():
        assert [words in text for text in runs[name]["results"]["warnings"]] == [True], name


def test_an_unknown_run_is_refused() -> None:
    with pytest.raises(SystemExit, match=r"--arms expects any of .*SimCLR, bare.* got .*VICReg"):
        call_example(curves.main, "--arms", "VICReg")


# --- what the kept runs show, and the page says ---

KEPT = {run["arm"]: run for run in kept(ROOT / "examples" / "results" / "curves")}


def values(arm: str, name: str) -> list[float]:
    return [value for _, value in KEPT[arm]["results"]["curves"][name]]


def ratio(arm: str) -> float:
    return median(values(arm, "recon_aux/gradient_ratio"))


def last(arm: str, name: str) -> float:
    return values(arm, name)[-1]


def test_the_pages_table_is_that_of_the_records() -> None:
    head, *made = rows(curves.table(list(KEPT.values())))
    titles, *shown = rows(text_of("is_it_working"))
    assert len(shown) == len(curves.RUNS)
    assert len(titles) == 8
    places = [head.index(title) for title in titles]
    assert shown == [[row[place] for place in places] for row in made]


BARE_R2 = last(curves.BARE, "monitor/whole/r2")


@pytest.mark.parametrize("arm", curves.GOOD)
def test_good_runs_are_as_the_page_says(arm: str) -> None:
    loss = values(arm, "recon_aux/loss")
    assert loss[-1] < 0.6 * loss[0]
    assert last(arm, "monitor/equivariant/r2") > BARE_R2 + 0.1
    accuracies = values(arm, "monitor/whole/knn")
    assert (round(accuracies[0], 1), accuracies[-1] > 23.7) == (17.8, True)
    ratios = values(arm, "recon_aux/gradient_ratio")
    assert 0.8 < min(ratios) < max(ratios) < 15
    assert KEPT[arm]["results"]["warnings"] == []


def test_bad_weights_are_as_the_page_says() -> None:
    shipped, small, large = curves.GOOD[0], "weight far too small", "weight far too large"
    assert max(values(small, "recon_aux/gradient_ratio")) < 0.01
    assert abs(last(small, "monitor/equivariant/r2") - BARE_R2) < 0.05
    assert last(small, "recon_aux/loss") < 0.7 * values(small, "recon_aux/loss")[0]
    assert min(values(large, "recon_aux/gradient_ratio")) >= 800
    assert last(large, "monitor/equivariant/r2") > BARE_R2 + 0.1
    assert last(large, "monitor/whole/knn") < last(shipped, "monitor/whole/knn") - 3


def test_other_bad_runs_are_as_the_page_says() -> None:
    shipped, fast, frozen, others, simsiam = curves.GOOD[0], *list(curves.RUNS)[6:]
    for arm, words in BAD.items():
        assert [words in text for text in KEPT[arm]["results"]["warnings"]] == [True]
    assert last(fast, "monitor/whole/std") < 0.02
    ends = [sum(values(arm, "recon_aux/loss")[-10:]) / 10 for arm in (frozen, shipped)]
    assert [round(end) for end in ends] == [28, 22]
    assert last(frozen, "monitor/equivariant/r2") > BARE_R2 + 0.1
    assert min(values(others, "recon_aux/registration")) > 1.6
    assert round(last(shipped, "recon_aux/registration"), 1) == 1.2
    assert last(others, "monitor/invariant/std") < last(shipped, "monitor/invariant/std") - 0.1
    loss = KEPT[simsiam]["results"]["curves"]["loss"]
    assert max(value for step, value in loss if step >= 100) < -0.85
    assert values(simsiam, "monitor/invariant/std")[-1] > 0.3
    assert values(simsiam, "recon_aux/gradient_ratio")[-1] > 1000
    for arm in (frozen, others):
        assert 0.7 < ratio(arm) < 15
    for arm in (fast, simsiam):
        assert ratio(arm) > 100
