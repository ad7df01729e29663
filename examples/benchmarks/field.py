"""Lay all arms of the natural images beside each other, in the paper's protocol and in ours.

``python examples/benchmarks/field.py FOLDER ...`` prints a table for each data set, from the
records that natural_images.py has left in the folders. ``--figure FILE`` draws it, too. Records
that are older than the paper's protocol are left out; ``natural_images.py --remeasure`` adds it.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import mean
from typing import Any

import matplotlib.pyplot as plt

from recon_aux.probe import SETS, markdown_table

# let this file be run by its path
sys.path.insert(0, str(Path(__file__).parents[1]))
from benchmarks.bars import draw_across
from benchmarks.options import refuse_others
from benchmarks.records import Record, as_text, by_data, kept, results_of, with_spread

MEASURES: dict[str, Callable[[dict[str, Any]], float]] = {
    "linear %": lambda whole: whole["linear"],
    "R² one at a time": lambda whole: mean(whole["paper"]["alone"].values()),
    "R² all at once": lambda whole: mean(whole["combined"].values()),
    "R² unseen": lambda whole: mean(whole["unseen"]["alone"].values()),
    "R² unseen, all at once": lambda whole: mean(whole["unseen"]["combined"].values()),
}
"""What is measured of the whole feature, by its name in tables and figures.

``R² one at a time`` is the mean of the paper's protocol: an MLP, one transformation at a time.
``R² all at once`` is ours: ridge regression, all transformations at once.
"""


def tables(data: str, runs: Sequence[Record], arms: Sequence[str]) -> list[str]:
    """Write both tables of a data set: protocols side by side, and each unseen transformation.

    Args:
        data: the data set's name.
        runs: its records.
        arms: in the order of the rows.

    Returns:
        Headings and tables; none if no record has the paper's protocol.
    """
    runs = in_both(runs)
    arms = [arm for arm in arms if results_of(runs, arm)]
    if not arms:
        return []
    paper, unseen = (list(SETS[name].alone) for name in ("paper", "unseen"))
    both = markdown_table(["seeds", *MEASURES, *paper, "spread of the MLP"])
    each = markdown_table(["seeds", *unseen])
    for arm in arms:
        wholes = [found["whole"] for found in results_of(runs, arm)]
        digits = [1, 3, 3, 3, 3]
        cells = [
            with_spread([of(whole) for whole in wholes], places)
            for of, places in zip(MEASURES.values(), digits, strict=True)
        ]
        seeds = str(len(wholes))
        alone = [_mean(wholes, "paper", name) for name in paper]
        spread = mean(whole["paper"]["spread"]["alone"]["mean"] for whole in wholes)
        both.add_row(arm, seeds, *cells, *alone, f"{spread:.3f}")
        each.add_row(arm, seeds, *(_mean(wholes, "unseen", name) for name in unseen))
    return [
        f"{data}: all encoders, one transformation at a time and all at once",
        as_text(both),
        f"{data}: R² of each unseen transformation alone",
        as_text(each),
    ]


def in_both(runs: Sequence[Record]) -> list[Record]:
    """Give the records that have both protocols."""
    return [run for run in runs if {"paper", "unseen"} <= run["results"]["whole"].keys()]


def _mean(wholes: Sequence[dict[str, Any]], kind: str, name: str) -> str:
    """Write the mean over seeds of one transformation's R²."""
    return f"{mean(whole[kind]['alone'][name] for whole in wholes):.3f}"


def draw(groups: dict[str, list[Record]], path: Path) -> None:
    """Save a picture: a row for each data set, a column for each measure, a bar for each arm.

    The arm with the largest R² of one transformation at a time is on top.
    """
    everything = [run for runs in groups.values() for run in runs]
    of_one = MEASURES["R² one at a time"]
    means = {
        arm: mean(of_one(found["whole"]) for found in results_of(everything, arm))
        for arm in dict.fromkeys(run["arm"] for run in everything)
    }
    arms = sorted(means, key=means.__getitem__, reverse=True)
    shape = len(groups), len(MEASURES)
    size = 2.2 * shape[1] + 2, (0.28 * len(arms) + 0.9) * shape[0]
    figure, axes = plt.subplots(*shape, figsize=size, squeeze=False, sharey=True)
    for line, (data, runs) in zip(axes, groups.items(), strict=True):
        for axis, (title, of) in zip(line, MEASURES.items(), strict=True):
            # an arm that another data set has leaves a gap
            draw_across(
                axis,
                {arm: [of(result["whole"]) for result in results_of(runs, arm)] for arm in arms},
            )
            axis.set_title(title, fontsize=9)
        line[0].set_yticks(range(len(arms)), arms, fontsize=8)
        line[0].set_ylabel(data)
    # the first arm on top
    axes[0, 0].invert_yaxis()
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    plt.close(figure)


def read(folders: Sequence[Path]) -> list[Record]:
    """Read the records of several folders, and refuse those of other options.

    Raises:
        SystemExit: if records were made with other options than the first one.
    """
    runs = [(folder, run) for folder in folders for run in kept(folder)]
    for folder, run in runs:
        refuse_others(runs[0][1]["options"], argparse.Namespace(**run["options"]), folder)
    return [run for _, run in runs]


def main() -> None:
    """Read the command line, print the tables."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folders", type=Path, nargs="+", metavar="FOLDER")
    parser.add_argument("--figure", type=Path, help="draw it here")
    args = parser.parse_args()
    runs = in_both(read(args.folders))
    if not runs:
        raise SystemExit(
            f"expected records with the paper's protocol in {', '.join(map(str, args.folders))}, "
            "found none. Run natural_images.py --remeasure on them."
        )
    groups = by_data(runs)
    for data, group in groups.items():
        print("\n".join(tables(data, group, list(dict.fromkeys(run["arm"] for run in group)))))
    if args.figure:
        draw(groups, args.figure)
        print(f"saved in {args.figure}")


if __name__ == "__main__":
    main()
