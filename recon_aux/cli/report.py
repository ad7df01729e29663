"""Tables for the terminal, with a column for each checkpoint."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

from rich import box
from rich.table import Table

from recon_aux.probe import COMBINED, TRANSFORMATIONS, PartResult, ProbeResult


def side_by_side(results: Mapping[str, ProbeResult]) -> Table:
    """Put results side by side, one column for each part of each encoder.

    Example:
        >>> r2 = dict.fromkeys(TRANSFORMATIONS, 0.5)
        >>> result = ProbeResult({"whole": PartResult(90.0, 80.0, alone=r2, combined=r2)})
        >>> [column.header for column in side_by_side({"a": result, "b": result}).columns]
        ['', 'a\\nwhole', 'b\\nwhole']
    """
    columns = [
        (f"{name}\n{part_name}", part)
        for name, result in results.items()
        for part_name, part in result.parts.items()
    ]
    grid = Table(box=box.SIMPLE_HEAD)
    grid.add_column("")
    for heading, _ in columns:
        grid.add_column(heading, justify="right", overflow="fold")

    def add(name: str, value: Callable[[PartResult], float], digits: int = 2) -> None:
        cells = [value(part) for _, part in columns]
        grid.add_row(name, *("-" if math.isnan(x) else f"{x:.{digits}f}" for x in cells))

    add("linear accuracy %", lambda part: part.linear, 1)
    add("k-NN accuracy %", lambda part: part.knn, 1)
    grid.add_section()
    grid.add_row("[bold]R² of each alone")
    for name in TRANSFORMATIONS:
        add(name, lambda part, name=name: part.alone[name])  # type: ignore[misc]
    grid.add_section()
    grid.add_row("[bold]R² of all at once")
    for name in COMBINED:
        add(name, lambda part, name=name: part.combined[name])  # type: ignore[misc]
    add("mean", lambda part: part.mean_combined)
    return grid


def as_json(result: ProbeResult) -> dict[str, Any]:
    """Give a result's numbers; what wasn't measured is None, since JSON has no nan."""
    parts = result.to_dict()
    for part in parts.values():
        for name in ("linear", "knn"):
            part[name] = None if math.isnan(part[name]) else part[name]
    return parts


def in_megabytes(size: int) -> str:
    """Say how many bytes in megabytes."""
    return f"{size / 1e6:.1f} MB"
