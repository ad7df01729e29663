"""Draw bars of bare and attached methods, next to each other."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import matplotlib.pyplot as plt

from benchmarks.records import Record, results_of


@dataclass(frozen=True)
class Measure:
    """What a bar's height is, and which arms are lines across."""

    title: str
    of: Callable[[dict[str, Any]], float]
    lines: Mapping[str, str]

    def values(self, runs: list[Record], arm: str) -> list[float]:
        """Give an arm's values, one for each seed."""
        return [self.of(results) for results in results_of(runs, arm)]


def draw(
    groups: dict[str, list[Record]],
    methods: list[str],
    attached: str,
    measures: list[Measure],
    path: Path,
) -> None:
    """Save a picture: one row for each group of runs, one column for each measure.

    Args:
        groups: records of all arms and seeds, by what the row is called.
        methods: their bare and attached arms become bars, with the standard deviation over seeds.
            Methods without a record are left out.
        attached: what the attached arms have behind the method's name.
        measures: what is drawn.
        path: of the image file.
    """
    done = {run["arm"] for runs in groups.values() for run in runs}
    methods = [method for method in methods if {method, method + attached} & done]
    shape = len(groups), len(measures)
    size = 4.5 * shape[1], 2.6 * shape[0]
    figure, axes = plt.subplots(*shape, figsize=size, squeeze=False)
    for row, (name, runs) in zip(axes, groups.items(), strict=True):
        for axis, measure in zip(row, measures, strict=True):
            _draw_bars(axis, runs, methods, {"bare": "", "attached": attached}, measure)
            for arm, style in measure.lines.items():
                values = measure.values(runs, arm)
                if values:
                    axis.plot([-0.5, len(methods) - 0.5], [mean(values)] * 2, style, label=arm)
            axis.set_title(": ".join(filter(None, (name, measure.title))))
    axes[0, -1].legend(loc="upper left", bbox_to_anchor=(1, 1))
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    plt.close(figure)


def draw_across(axis: Any, found: Mapping[str, list[float]]) -> None:
    """Draw a bar across for each arm, the mean over seeds, with the standard deviation.

    Args:
        axis: to draw on.
        found: each arm's values, one for each seed; none leave a gap.
    """
    heights = [mean(values) if values else float("nan") for values in found.values()]
    # one seed has no standard deviation
    spread = [stdev(values) if len(values) > 1 else float("nan") for values in found.values()]
    ours = [
        ("attached" in arm or "recon_aux" in arm) and "preset='paper'" not in arm for arm in found
    ]
    colors = ["tab:orange" if is_ours else "tab:blue" for is_ours in ours]
    axis.barh(range(len(found)), heights, xerr=spread, color=colors, capsize=2)


def _draw_bars(
    axis: Any,
    runs: list[Record],
    methods: list[str],
    kinds: dict[str, str],
    measure: Measure,
) -> None:
    """Draw one group's bars of one measure."""
    for shift, (kind, behind) in zip((-0.2, 0.2), kinds.items(), strict=True):
        found = [measure.values(runs, method + behind) for method in methods]
        places = [x + shift for x, values in enumerate(found) if values]
        heights = [mean(values) for values in found if values]
        # one seed has no standard deviation
        spread = [stdev(v) if len(v) > 1 else float("nan") for v in found if v]
        axis.bar(places, heights, 0.38, yerr=spread, capsize=3, label=kind)
    axis.set_xticks(range(len(methods)), methods)
