"""Draw checkpoints side by side: what the probe measured, and images rebuilt from features."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor, nn
from torchvision.transforms import Normalize

from recon_aux import ReconAux
from recon_aux.cli.errors import UserError
from recon_aux.monitor.picture import inverse_of
from recon_aux.probe import COMBINED, ProbeResult, draw_parameters, transform
from recon_aux.task.contexts import evaluating

_IMAGES = 8


@dataclass
class Rebuilder:
    """An encoder whose views can be rebuilt.

    Attributes:
        encoder: images ``(B, 3, H, W)`` -> features ``(B, D)``.
        aux: the task, with its trained decoder.
        normalize: what its images go through.
        images: held-out ones ``(N, 3, H, W)`` of its size, uint8.
    """

    encoder: nn.Module
    aux: ReconAux
    normalize: Normalize
    images: Tensor

    @torch.no_grad()
    def __call__(self) -> tuple[Tensor, Tensor, Tensor]:
        """Give two views of a few images, always the same, and the first as it is rebuilt."""
        parameter = next(self.encoder.parameters())
        some = self.images[:: max(1, len(self.images) // _IMAGES)][:_IMAGES].float() / 255
        generator = torch.Generator().manual_seed(0)
        views = [transform(some, draw_parameters(len(some), generator=generator)) for _ in range(2)]
        with evaluating(self.encoder), evaluating(self.aux):
            own, other = (self.encoder(self.normalize(x.to(parameter.device))) for x in views)
            rebuilt = self.aux.to(parameter.device).rebuild(own, other)
        return views[0], views[1], inverse_of(self.normalize, rebuilt)(rebuilt).cpu()


def check_picture(path: Path) -> None:
    """Refuse a picture's name before anything is computed.

    Raises:
        UserError: if its ending names no format.
    """
    formats = Figure().canvas.get_supported_filetypes()
    if path.suffix[1:].lower() not in formats:
        raise UserError(
            f"expected --picture as a file like probe.png, got {path}. Pass one that ends in "
            ".png, .pdf, .svg or .jpg."
        )


def save_picture(
    path: Path,
    results: Mapping[str, ProbeResult],
    rebuilders: Mapping[str, Rebuilder],
) -> list[str]:
    """Draw bars of R² for each encoder, and below them views that were rebuilt.

    Args:
        path: where to save it; its ending chooses the format.
        results: by the name of the checkpoint.
        rebuilders: of those whose views can be rebuilt.

    Returns:
        Labels of rows in which more than a third of the values can't be shown.
    """
    rows = _rebuilt_rows(rebuilders)
    figure = Figure(figsize=(11, 4 + len(rows)), layout="constrained")
    grid = figure.add_gridspec(4 + len(rows), _IMAGES + 2)
    _draw_bars(figure.add_subplot(grid[:4, :]), results)
    for row, (label, pictures) in enumerate(rows.items(), start=4):
        axis = figure.add_subplot(grid[row, :2])
        axis.axis("off")
        axis.text(1, 0.5, label, ha="right", va="center")
        for column, picture in enumerate(pictures, start=2):
            axis = figure.add_subplot(grid[row, column])
            axis.axis("off")
            axis.imshow(picture.permute(1, 2, 0).clamp(0, 1).numpy())
    figure.savefig(path, dpi=110)
    return [label for label, pictures in rows.items() if _mostly_clipped(pictures)]


def _mostly_clipped(images: Tensor) -> bool:
    """Whether a third of the values are too far from 0..1 for a picture to show."""
    return bool(((images < -0.1) | (images > 1.1)).float().mean() > 1 / 3)


def _draw_bars(axis: Axes, results: Mapping[str, ProbeResult]) -> None:
    names = [*COMBINED, "mean"]
    width = 0.8 / len(results)
    for i, (label, result) in enumerate(results.items()):
        whole = result.parts["whole"]
        heights = [*(whole.combined[name] for name in COMBINED), whole.mean_combined]
        accuracy = "" if math.isnan(whole.linear) else f" (linear accuracy {whole.linear:.1f} %)"
        places = [x + (i - (len(results) - 1) / 2) * width for x in range(len(names))]
        axis.bar(places, [max(height, 0) for height in heights], width, label=label + accuracy)
    axis.set(ylabel="R², all transformations at once", ylim=(0, 1))
    axis.set_xticks(range(len(names)), [name.replace("_", "\n") for name in names])
    axis.spines[["top", "right"]].set_visible(False)
    axis.legend(loc="lower left", bbox_to_anchor=(0, 1), frameon=False)


def _rebuilt_rows(rebuilders: Mapping[str, Rebuilder]) -> dict[str, Tensor]:
    rows: dict[str, Tensor] = {}
    for name, rebuild in rebuilders.items():
        view, other, rebuilt = rebuild()
        # encoders of other sizes see the same views in another resolution: show the first's
        rows = {"view": view, "other view": other, **rows, f"rebuilt by\n{name}": rebuilt}
    return rows
