"""What the probe found, as numbers and as tables."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from statistics import fmean
from typing import Any

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from recon_aux.task.checks import check_choice


@dataclass
class PartResult:
    """What one part of the feature knows.

    Attributes:
        linear: test accuracy of logistic regression on the labels, in percent; ``nan`` if
            there are no labels.
        knn: test accuracy of a 20-nearest-neighbour vote by cosine similarity, in percent.
        alone: test R² of each transformation alone, the mean over its parameters.
        combined: test R² of each parameter of all transformations at once; empty if
            none are combined.
        spread: standard deviations over the seeds of the MLP: of ``"alone"`` and ``"combined"``,
            for each name in them and for their ``"mean"``. Empty for ridge regression.
    """

    linear: float
    knn: float
    alone: dict[str, float] = field(default_factory=dict)
    combined: dict[str, float] = field(default_factory=dict)
    spread: dict[str, dict[str, float]] = field(default_factory=dict)

    @property
    def mean_alone(self) -> float:
        """Mean R² over the transformations that are made alone; ``nan`` if there are none."""
        return fmean(self.alone.values()) if self.alone else math.nan

    @property
    def mean_combined(self) -> float:
        """Mean R² over the parameters of the combined transformation; ``nan`` if there are none."""
        return fmean(self.combined.values()) if self.combined else math.nan


@dataclass
class ProbeResult:
    """What an encoder knows. Printing it prints its tables.

    Attributes:
        parts: a result for ``"whole"``, and where the feature is split for ``"invariant"`` and
            ``"equivariant"``.
    """

    parts: dict[str, PartResult]

    def to_dict(self) -> dict[str, Any]:
        """Return plain numbers, ready for JSON; None for an accuracy that wasn't measured."""
        return {
            name: {key: _or_none(value) for key, value in asdict(part).items() if value != {}}
            for name, part in self.parts.items()
        }

    def __str__(self) -> str:
        return render({"": self})


def table(results: Mapping[str, ProbeResult], kind: str | None = None) -> Table:
    """Put results side by side as a Markdown table, with one row for each part of each encoder.

    Args:
        results: results by the name of their encoder.
        kind: ``"combined"`` for R² of all transformations at once, and the accuracies; ``"alone"``
            for R² of each transformation alone. By default the first, if it was measured.

    Returns:
        A table for rich's ``print``.

    Raises:
        ValueError: if there is no such kind, or it wasn't measured.
    """
    rows = _rows(results)
    measured = [k for k in ("combined", "alone") if any(getattr(part, k) for _, part in rows)]
    kind = kind or measured[0]
    check_choice("kind", kind, measured)
    accuracies = {"linear %": "linear", "k-NN %": "knn"} if kind == "combined" else {}
    # encoders may have been measured by other transformations
    names = list(dict.fromkeys(key for _, part in rows for key in getattr(part, kind)))
    grid = markdown_table([*accuracies, "mean R²", *names])
    for name, part in rows:
        r2, spread = getattr(part, kind), part.spread.get(kind, {})
        numbers = [f"{getattr(part, accuracy):.1f}" for accuracy in accuracies.values()]
        numbers += [_cell(getattr(part, f"mean_{kind}"), spread.get("mean"), 3)]
        numbers += [_cell(r2.get(key, math.nan), spread.get(key)) for key in names]
        grid.add_row(escape(name), *numbers)
    return grid


def _or_none(value: Any) -> Any:
    """Put None for nan, which JSON doesn't have."""
    return None if isinstance(value, float) and math.isnan(value) else value


def _rows(results: Mapping[str, ProbeResult]) -> list[tuple[str, PartResult]]:
    """Give each part of each encoder, with its name."""
    return [
        (f"{name} {part_name}".strip(), part)
        for name, result in results.items()
        for part_name, part in result.parts.items()
    ]


def _cell(r2: float, spread: float | None, digits: int = 2) -> str:
    """Write R², with its standard deviation where there is one; "-" if it wasn't measured."""
    if math.isnan(r2):
        return "-"
    return f"{r2:.{digits}f}" + ("" if spread is None else f" ± {spread:.{digits}f}")


def markdown_table(columns: Iterable[str]) -> Table:
    """Make an empty table of encoders, which rich prints as Markdown.

    Args:
        columns: their headings, after that of the encoder's name.

    Example:
        >>> [column.header for column in markdown_table(["linear %", "translation_x"]).columns]
        ['encoder', 'linear %', 'tx']
    """
    grid = Table(box=box.MARKDOWN)
    grid.add_column("encoder", no_wrap=True)
    for column in columns:
        grid.add_column(column.replace("translation_", "t"), justify="right", no_wrap=True)
    return grid


def render(results: Mapping[str, ProbeResult]) -> str:
    """Return both tables as text, or one if no transformations are combined.

    Example:
        >>> r2 = {"rotation": 0.5, "hue": 0.5}
        >>> part = PartResult(linear=90.0, knn=80.0, alone=r2, combined=r2)
        >>> print(render({"bare": ProbeResult({"whole": part})}).splitlines()[0])
        R² with all transformations combined
    """
    # as wide as the widest table: a narrow one would lose its columns
    console = Console(width=300)
    with console.capture() as capture:
        if any(part.combined for _, part in _rows(results)):
            console.print("R² with all transformations combined", table(results, "combined"))
        console.print("R² with each transformation alone", table(results, "alone"))
    return capture.get()
