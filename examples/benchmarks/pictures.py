"""Pictures of views and of what is rebuilt of them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import matplotlib.pyplot as plt
import torch
from torch import Tensor, nn

from benchmarks.images import TwoViews, denormalize
from recon_aux import ReconAux


@torch.no_grad()
def save_reconstructions(
    encoder: nn.Module, aux: ReconAux, images: Tensor, seed: int, path: Path
) -> None:
    """Save a picture of views of some images, each rebuilt in the context of another view."""
    device = next(encoder.parameters()).device
    encoder.eval()
    aux.to(device).eval()
    images = images[:: max(1, len(images) // 10)][:10]
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        views, _ = TwoViews(flip=False)([(image, torch.tensor(0)) for image in images])
    view, other = (view.to(device) for view in views)
    rebuilt = aux.rebuild(encoder(view), encoder(other))
    rows = {"view": view, "other view": other, "reconstruction": rebuilt}
    save_pictures([list(row) for row in rows.values()], list(rows), path)


def save_pictures(rows: Sequence[Sequence[Tensor]], labels: Sequence[str], path: Path) -> None:
    """Save rows of images as the encoders see them, each row with what it shows."""
    shape = len(rows), len(rows[0])
    figure, axes = plt.subplots(*shape, figsize=(shape[1] * 1.1, shape[0] * 1.15), squeeze=False)
    for label, pictures, line in zip(labels, rows, axes, strict=True):
        for picture, axis in zip(pictures, line, strict=True):
            axis.imshow(denormalize(picture.float().cpu()).permute(1, 2, 0))
            axis.set(xticks=[], yticks=[])
        line[0].set_ylabel(label, rotation=0, ha="right", va="center", fontsize=12)
    figure.tight_layout(pad=0.3)
    figure.savefig(path, dpi=100)
    plt.close(figure)
