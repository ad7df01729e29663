"""How the cost of a step changes as one thing grows: the cases, and their picture."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt

from benchmarks.loops import Case


def grown(case: Case, *, small: bool) -> dict[str, list[tuple[int, Case]]]:
    """Let one thing grow at a time."""
    # the field that grows, how much one unit of it is, and its values
    growing: dict[str, tuple[str, int, list[int]]] = {
        "images in a batch": ("batch_size", 1, [8, 16, 32, 64, 128]),
        "side of the images": ("image_size", 1, [32, 64, 96, 128, 192]),
        "width of the feature": ("width", 8, [64, 128, 256, 512]),
        "small crops": ("crops", 1, [0, 2, 4, 6, 8]),
    }
    cases: dict[str, list[tuple[int, Case]]] = {}
    for what, (field, unit, values) in growing.items():
        changes: list[tuple[int, dict[str, Any]]] = [(v, {field: v // unit}) for v in values]
        chosen = changes[:1] if small else changes
        cases[what] = [(value, replace(case, **change)) for value, change in chosen]
    return cases


def draw(curves: dict[str, list[tuple[int, float, float]]], path: Path) -> None:
    """Draw the cost of a step, attached over bare, against what grows."""
    figure, axes = plt.subplots(1, len(curves), figsize=(3.2 * len(curves), 2.8), sharey=True)
    for (what, points), axis in zip(curves.items(), axes, strict=True):
        values, times, counts = zip(*points, strict=True)
        axis.plot(values, times, "o-", label="time")
        axis.plot(values, counts, "s--", label="FLOPs")
        axis.axhline(1, color="gray", linewidth=0.8)
        axis.set(xlabel=what)
    axes[0].set(ylabel="attached / bare")
    axes[0].legend()
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    plt.close(figure)
