"""What the probe found, as numbers and as tables."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from recon_aux.probe.transformations import COMBINED, TRANSFORMATIONS


@dataclass
class PartResult:
    """What one part of the feature knows.

    Attributes:
        linear: test accuracy of logistic regression on the labels, in percent; ``nan`` without.
        knn: test accuracy of a 20-nearest-neighbour vote by cosine similarity, in percent.
        alone: test R² of ridge regression for each parameter, with its transformation alone.
        combined: the same with all transformations of :data:`COMBINED` at once.
    """

    linear: float
    knn: float
    alone: dict[str, float] = field(default_factory=dict)
    combined: dict[str, float] = field(default_factory=dict)

    @property
    def mean_combined(self) -> float:
        """Mean R² over the parameters of the combined transformation."""
        return sum(self.combined.values()) / len(self.combined)


@dataclass
class ProbeResult:
    """What an encoder knows. Printing it prints its tables.

    Attributes:
        parts: a result for ``"whole"``, and where the feature is split for ``"invariant"`` and
            ``"equivariant"``.
    """

    parts: dict[str, PartResult]

    def to_dict(self) -> dict[str, Any]:
        """Return plain numbers, ready for JSON."""
        return {name: asdict(part) for name, part in self.parts.items()}

    def __str__(self) -> str:
        return render({"": self})


def table(results: Mapping[str, ProbeResult]) -> Table:
    """Put results side by side as a Markdown table, with one row for each part of each encoder.

    Args:
        results: results by the name of their encoder.

    Returns:
        A table for rich's ``print``: accuracies, and R² of the combined transformation.
    """
    grid = markdown_table(["linear %", "k-NN %", "mean R²", *COMBINED])
    for name, result in results.items():
        for part_name, part in result.parts.items():
            numbers = [f"{part.linear:.1f}", f"{part.knn:.1f}", f"{part.mean_combined:.3f}"]
            numbers += [f"{part.combined[parameter]:.2f}" for parameter in COMBINED]
            grid.add_row(f"{name} {part_name}".strip(), *numbers)
    return grid


def alone_table(results: Mapping[str, ProbeResult]) -> Table:
    """Like :func:`table`, with R² of each transformation alone."""
    grid = markdown_table(TRANSFORMATIONS)
    for name, result in results.items():
        for part_name, part in result.parts.items():
            numbers = [f"{r2:.2f}" for r2 in part.alone.values()]
            grid.add_row(f"{name} {part_name}".strip(), *numbers)
    return grid


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
    """Return both tables as text.

    Example:
        >>> r2 = dict.fromkeys(TRANSFORMATIONS, 0.5)
        >>> part = PartResult(linear=90.0, knn=80.0, alone=r2, combined=r2)
        >>> print(render({"bare": ProbeResult({"whole": part})}).splitlines()[0])
        R² with all transformations combined
    """
    console = Console(width=140)
    with console.capture() as capture:
        console.print("R² with all transformations combined", table(results))
        console.print("R² with each transformation alone", alone_table(results))
    return capture.get()
