"""Draw what attaching buys: methods bare and attached, next to each other."""

from __future__ import annotations

from pathlib import Path
from statistics import mean, stdev
from typing import Any

import matplotlib.pyplot as plt
from records import results_of

_KINDS = {"bare": "", "attached": ", attached"}
_MEASURES = {"linear": "linear accuracy, %", "R²": "mean R²"}


def draw(
    runs: list[dict[str, Any]], methods: list[str], untrained: str, ceiling: str, path: Path
) -> None:
    """Save a picture: accuracy and mean R² of whole features, one row for each data set.

    Args:
        runs: records of all arms and seeds.
        methods: whose bare and attached arms are bars, with the standard deviation over seeds.
        untrained: the arm that is a line below.
        ceiling: the arm that is a line above, of R² alone, for which it is trained.
        path: of the image file.
    """
    names = list(dict.fromkeys(run["data"] for run in runs))
    figure, axes = plt.subplots(len(names), 2, figsize=(9, 2.6 * len(names)), squeeze=False)
    for row, name in zip(axes, names, strict=True):
        here = [run for run in runs if run["data"] == name]
        for axis, what in zip(row, _MEASURES, strict=True):
            _draw_bars(axis, here, methods, what)
            lines = {untrained: "k:", ceiling: "k--"} if what == "R²" else {untrained: "k:"}
            for arm, style in lines.items():
                values = of_wholes(here, arm, what)
                if values:
                    axis.plot([-0.5, len(methods) - 0.5], [mean(values)] * 2, style, label=arm)
            axis.set_title(f"{name}: {_MEASURES[what]}")
    axes[0, 1].legend(loc="upper left", bbox_to_anchor=(1, 1))
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    plt.close(figure)


def _draw_bars(axis: Any, runs: list[dict[str, Any]], methods: list[str], what: str) -> None:
    """Draw one data set's bars of one measure."""
    for shift, (kind, behind) in zip((-0.2, 0.2), _KINDS.items(), strict=True):
        found = [of_wholes(runs, method + behind, what) for method in methods]
        places = [x + shift for x, values in enumerate(found) if values]
        heights = [mean(values) for values in found if values]
        # no bar of error where there is nothing to tell it from
        spread = [stdev(v) if len(v) > 1 else float("nan") for v in found if v]
        axis.bar(places, heights, 0.38, yerr=spread, capsize=3, label=kind)
    axis.set_xticks(range(len(methods)), methods)


def of_wholes(runs: list[dict[str, Any]], arm: str, what: str) -> list[float]:
    """Give an arm's accuracy or mean R², of the whole feature, one for each seed."""
    wholes = [result["whole"] for result in results_of(runs, arm)]
    if what == "R²":
        return [mean_r2(whole) for whole in wholes]
    return [whole[what] for whole in wholes]


def mean_r2(part: dict[str, Any], kind: str = "combined") -> float:
    """Of a part of a feature, over the parameters, applied all at once or each ``"alone"``."""
    return mean(part[kind].values())
