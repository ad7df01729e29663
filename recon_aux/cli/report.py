"""Tables for the terminal: results side by side, and what is in a checkpoint."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

from rich import box
from rich.table import Table
from rich.text import Text
from torch import Tensor

from recon_aux.cli.finding import Saved
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
    # two rows begin with "translation"
    grid.add_column("", no_wrap=True, min_width=max(map(len, TRANSFORMATIONS)))
    for heading, _ in columns:
        grid.add_column(heading, justify="right", overflow="fold")

    def add(name: str, value: Callable[[PartResult], float], digits: int = 2) -> None:
        cells = [value(part) for _, part in columns]
        grid.add_row(name, *("-" if math.isnan(x) else f"{x:.{digits}f}" for x in cells))

    add("linear %", lambda part: part.linear, 1)
    add("k-NN %", lambda part: part.knn, 1)
    grid.add_section()
    grid.add_row(Text("R², all combined", style="bold"))
    add("mean R²", lambda part: part.mean_combined, 3)
    for name in COMBINED:
        add(name, lambda part, name=name: part.combined[name])  # type: ignore[misc]
    grid.add_section()
    grid.add_row(Text("R², each alone", style="bold"))
    add("mean R²", lambda part: part.mean_alone, 3)
    for name in TRANSFORMATIONS:
        add(name, lambda part, name=name: part.alone[name])  # type: ignore[misc]
    return grid


def parts_table(tensors: Mapping[str, Tensor]) -> Table:
    """List a checkpoint's modules with their sizes."""
    groups: dict[str, dict[str, Tensor]] = {}
    for key, value in tensors.items():
        parts = key.split(".")
        # state_dict.backbone; of a plain state_dict: layer1
        depth = 2 if parts[0] in ("state_dict", "model", "module") else 1
        groups.setdefault(".".join(parts[:depth]), {})[key] = value
    grid = Table("part", "tensors", "numbers", "size", box=box.SIMPLE_HEAD)
    for name, group in groups.items():
        count = sum(x.numel() for x in group.values())
        grid.add_row(name, str(len(group)), f"{count:,}", in_megabytes(group))
    return grid


def saved_table(saved: Saved) -> Table:
    """List what recon_aux saved: its options, and what the weight came to."""
    grid = Table("option", "value", box=box.SIMPLE_HEAD)
    for name, value in saved.options.items():
        grid.add_row(name, saved.weight if name == "weight" else str(value))
    grid.add_section()
    grid.add_row("seed", str(saved.values["seed"]))
    grid.add_row("calls so far", str(int(saved.values["calls"])))
    grid.add_row("decoder", in_megabytes(saved.state))
    return grid


def in_megabytes(tensors: Mapping[str, Tensor]) -> str:
    """Say how large tensors are together.

    Example:
        >>> in_megabytes({"weight": Tensor(500, 500)})
        '1.0 MB'
    """
    return f"{sum(x.numel() * x.element_size() for x in tensors.values()) / 1e6:.1f} MB"
